"""The daemon's Roles are exact: every command of its works, and no verb is there without one.

The tables below hold each kubectl command of the program in the form in which it runs it. The
stand-in cluster evaluates the shipped Roles and logs what was asked of it.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import gitops_hook as hook
from tests.standin.api import Api
from tests.standin.cluster import Cluster
from tests.standin.faults import Request
from tests.standin.kubectl import Kubectl, Result, find_kubectl
from tests.standin.resources import find_kind
from tests.standin.store import Store
from tests.world import PROGRAM, ROOT, World, daemon_config, eventually, install

ACCOUNT = "orchestration/orchestration-sa"
USER = "system:serviceaccount:orchestration:orchestration-sa"
RUNS, LIVE, STATE = ("test", "build"), ("staging", "production"), ("orchestration",)
NAMESPACES = (*RUNS, *LIVE, *STATE)
OURS = "app.kubernetes.io/managed-by=gitops-hook"
Object = dict[str, Any]
Grant = tuple[str, str]  # resource, verb


# What is asked for and not granted, and why the command works all the same.
HARMLESS = {("namespaces", "get"): "kubectl get looks for the namespace where it found nothing"}
# What every account may ask.
ALLOWED = {("discovery", "get"), ("selfsubjectreviews", "create")}


@dataclass(frozen=True, kw_only=True)
class Command:
    """One kubectl command of the program, and the permissions that it asks for."""

    purpose: str
    argv: tuple[str, ...]
    needs: frozenset[Grant]
    stdin: Object | None = None
    code: int = 0
    says: str = ""

    @property
    def goes_on(self) -> bool:
        """Whether it ends by its time-out alone."""
        return "watch=true" in self.argv[-1] or self.argv[:2] == ("rollout", "status")

    def line(self, namespace: str) -> list[str]:
        """Return the arguments of kubectl in a namespace."""
        return ["-n", namespace, *(word.replace("{namespace}", namespace) for word in self.argv)]


def command(
    purpose: str, line: str, needs: str, stdin: Object | None = None, **more: Any
) -> Command:
    """Return a command; `needs` is written as in "jobs: get patch, pods: get"."""
    grants = [
        (resource.strip(), verb)
        for resource, _, verbs in (part.partition(":") for part in needs.split(","))
        for verb in verbs.split()
    ]
    argv, needed = tuple(line.split()), frozenset(grants)
    return Command(purpose=purpose, argv=argv, needs=needed, stdin=stdin, **more)


def page(purpose: str, resource: str, labels: str = OURS) -> Command:
    """Return the command that lists a page of what has these labels."""
    address = hook.list_address(resource, "{namespace}", labels)
    return command(purpose, f"get --raw {address}&limit=100&continue=", f"{resource}: list")


def mirror(resource: str) -> tuple[Command, Command]:
    """Return the two commands of a mirror: a page of its list, and its watch."""
    address = hook.list_address(resource, "{namespace}", OURS)
    changes = "&watch=true&resourceVersion=0&timeoutSeconds=2"
    return (
        page(f"which {resource} there are", resource),
        command(f"follow {resource}", f"get --raw {address}{changes}", f"{resource}: watch"),
    )


# === What the commands work on ===


def labelled(api: str, kind: str, name: str, **content: Any) -> Object:
    """Return an object with our labels."""
    key, _, value = OURS.partition("=")
    meta = {"name": name, "labels": {key: value, "app": "shop"}}
    return {"apiVersion": api, "kind": kind, "metadata": meta, **content}


def listed(*items: Object) -> Object:
    """Return a List, as the program sends it."""
    return {"apiVersion": "v1", "kind": "List", "items": list(items)}


def pod_spec() -> Object:
    """Return the pod of a test, fit for every one of our namespaces."""
    locked = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    few = {"cpu": "10m", "memory": "16Mi"}
    web = {"name": "web", "image": "web", "resources": {"requests": few, "limits": few}}
    return {"containers": [{**web, "securityContext": locked}]}


def job(name: str) -> Object:
    """Return a suspended Job."""
    pod = {**pod_spec(), "restartPolicy": "Never"}
    return labelled("batch/v1", "Job", name, spec={"suspend": True, "template": {"spec": pod}})


def deployment(name: str) -> Object:
    """Return a Deployment; nothing in the cluster at hand rolls it out."""
    labels = {"app": "shop", "version": name}
    template = {"metadata": {"labels": labels}, "spec": pod_spec()}
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}
    return labelled("apps/v1", "Deployment", name, spec=spec)


def service(name: str) -> Object:
    """Return a Service."""
    spec = {"selector": {"app": "shop"}, "ports": [{"port": 80}]}
    return labelled("v1", "Service", name, spec=spec)


def an_event(name: str) -> Object:
    """Return an Event about something, which need not be there."""
    about = {"apiVersion": "v1", "kind": "Service", "name": "shop", "uid": "one"}
    return labelled("v1", "Event", name, involvedObject=about, reason="Switched", type="Normal")


def configmap(name: str) -> Object:
    """Return a ConfigMap."""
    return labelled("v1", "ConfigMap", name, data={"key": "value"})


def autoscaler(name: str) -> Object:
    """Return an autoscaler."""
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "blue"}
    spec = {"maxReplicas": 2, "scaleTargetRef": target}
    return labelled("autoscaling/v2", "HorizontalPodAutoscaler", name, spec=spec)


def budget(name: str) -> Object:
    """Return a disruption budget."""
    spec = {"minAvailable": 1, "selector": {"matchLabels": {"app": "shop"}}}
    return labelled("policy/v1", "PodDisruptionBudget", name, spec=spec)


def cronjob(name: str) -> Object:
    """Return a CronJob."""
    spec = {"schedule": "0 3 * * *", "jobTemplate": {"spec": job("x")["spec"]}}
    return labelled("batch/v1", "CronJob", name, spec=spec)


# What may stand beside an app: by the address of its resource.
BESIDE = {
    "apis/autoscaling/v2/horizontalpodautoscalers": autoscaler,
    "apis/policy/v1/poddisruptionbudgets": budget,
    "apis/batch/v1/cronjobs": cronjob,
    "api/v1/services": service,
    "api/v1/configmaps": configmap,
}


def pod() -> Object:
    """Return a pod that runs, as far as its status says."""
    started = {"name": "web", "state": {"running": {}}, "lastState": {}}
    spec, status = {**pod_spec(), "nodeName": "node"}, {"containerStatuses": [started]}
    return labelled("v1", "Pod", "web-1", spec=spec, status=status)


# What stands in a namespace before each command, and what no command finds there.
STANDING: dict[str, tuple[Object, ...]] = {
    **dict.fromkeys(RUNS, (job("one"), job("two"), configmap("copy"), pod())),
    **dict.fromkeys(
        LIVE,
        (
            *(deployment("blue"), service("shop"), configmap("copy"), pod()),
            *(make("beside") for make in BESIDE.values()),
        ),
    ),
    **dict.fromkeys(STATE, (configmap("gitops-hook-shop"),)),
}
MADE = ("jobs", "deployments", "events", *(address.rpartition("/")[2] for address in BESIDE))

# === The commands, as the program runs them ===

NOTE: Object = {"metadata": {"annotations": {"gitops-hook/note": "something"}}}
MERGED = "--type=merge --patch-file=/dev/stdin -o=json"
LOGS = "logs web-1 -c web --tail=500 --limit-bytes=8192000"
QUIETLY = "--wait=false --ignore-not-found"
CREATE = "create -f - -o name --validate=false"
POD_FIELDS = "involvedObject.name=web-1,involvedObject.kind=Pod"
EVENTS_OF_POD = f"get events --field-selector {POD_FIELDS} -o json"

PODS = (
    *mirror("pods"),
    command("the end of a container's log", LOGS, "pods: get, pods/log: get"),
    command(
        "the end of the log before a restart",
        f"{LOGS} --previous",
        "pods: get, pods/log: get",
        code=1,
        says="previous terminated container",
    ),
)
KEPT = (
    command("copies, releases, logs", CREATE, "configmaps: create", listed(configmap("made"))),
    page("which there are", "configmaps"),
    command("what goes", f"delete configmap/copy {QUIETLY}", "configmaps: delete"),
)


TOLD = command("what happened", CREATE, "events: create", listed(an_event("made")))


def companion(address: str, make: Callable[[str], Object]) -> tuple[Command, ...]:
    """Return the commands that work on what stands beside an app."""
    api, _, resource = address.rpartition("/")
    changed = make("beside")
    changed["metadata"]["labels"]["changed"] = "yes"
    gone = {"propagationPolicy": "Orphan"}
    path = f"/{api}/namespaces/{{namespace}}/{resource}/beside"
    what = f"beside, {resource}"
    made = listed(make("made"))
    again = listed(changed)
    return (
        command(f"{what}: look", "get -f - -o json --ignore-not-found", f"{resource}: get", again),
        command(f"{what}: make", "create -f - -o name", f"{resource}: create", made),
        command(
            f"{what}: ask whether it would be taken",
            "create -f - -o name --dry-run=server",
            f"{resource}: create",
            made,
        ),
        command(f"{what}: change", "replace -f - -o name", f"{resource}: get update", again),
        command(f"{what}: end", f"delete --raw {path} -f -", f"{resource}: delete", gone),
    )


COMMANDS: dict[str, tuple[Command, ...]] = {
    **dict.fromkeys(
        RUNS,
        (
            command("a run's Job", CREATE, "jobs: create", listed(job("made"))),
            command("note an outcome", f"patch job/one {MERGED}", "jobs: get patch", NOTE),
            *mirror("jobs"),
            command("a run again", "get job/one -o json --ignore-not-found", "jobs: get"),
            command("what a rerun replaces", f"delete job/one {QUIETLY}", "jobs: delete"),
            command("a build again", "delete job one --ignore-not-found", "jobs: delete get"),
            command(
                "why a Job gets no pod",
                "get events --field-selector involvedObject.uid=one,reason=FailedCreate -o json",
                "events: list",
            ),
            command("why a pod does not start", EVENTS_OF_POD, "events: list"),
            TOLD,
            *KEPT,
            *PODS,
        ),
    ),
    **dict.fromkeys(
        LIVE,
        (
            command("what is live", "get service/shop -o json --ignore-not-found", "services: get"),
            command("switch", f"patch service/shop {MERGED}", "services: get patch", NOTE),
            command(
                "who changed it",
                "get service shop -o json --show-managed-fields",
                "services: get",
            ),
            command("a first Service", CREATE, "services: create", listed(service("made"))),
            command(
                "whether a Service would be taken",
                "create -f - --dry-run=server",
                "services: create",
                listed(service("made")),
            ),
            command(
                "a first one that failed", f"delete service/shop {QUIETLY}", "services: delete"
            ),
            *mirror("services"),
            command(
                "what stands", "get deployment/blue -o json --ignore-not-found", "deployments: get"
            ),
            command(
                "what is live, and what stands",
                "get service/shop deployment/blue deployment/green -o json --ignore-not-found",
                "services: get, deployments: get",
            ),
            command(
                "what stands, and then what is live",
                "get deployment/blue service/shop -o json --ignore-not-found",
                "services: get, deployments: get",
            ),
            page("our colours", "deployments"),
            page("workers of others", "deployments", "gitops-hook/app!=shop"),
            command(
                "a colour's first time",
                "create -f -",
                "deployments: create",
                listed(deployment("made")),
            ),
            command(
                "a colour again",
                "replace -f -",
                "deployments: get update",
                listed(
                    {**deployment("blue"), "spec": {**deployment("blue")["spec"], "replicas": 2}}
                ),
            ),
            command(
                "scale down",
                f"patch deployment/blue {MERGED}",
                "deployments: get patch",
                {"spec": {"replicas": 0}},
            ),
            command("what failed", f"delete deployment/blue {QUIETLY}", "deployments: delete"),
            # a server that cannot stream its lists is asked for `list` too
            command(
                "wait for a colour",
                "rollout status deployment/blue --timeout=2s",
                "deployments: get watch",
                code=1,
                says="timed out waiting for the condition",
            ),
            page("copies in use", "replicasets", "app=shop"),
            page("did the switch arrive", "endpointslices", "kubernetes.io/service-name=shop"),
            page("ready pods", "pods", "app=shop,version=blue"),
            command("why a pod does not start", EVENTS_OF_POD, "events: list"),
            TOLD,
            command(
                "a release", "get configmap/copy -o json --ignore-not-found", "configmaps: get"
            ),
            *KEPT,
            command(
                "copies there are", f"get configmaps -l {OURS} --no-headers", "configmaps: list"
            ),
            *(c for address, make in BESIDE.items() for c in companion(address, make)),
            *PODS,
        ),
    ),
    **dict.fromkeys(
        STATE,
        (
            command(
                "who runs a command: nobody needs a right to ask that",
                "auth whoami -o json",
                "",
            ),
            command(
                "an app's state",
                "get configmap/gitops-hook-shop -o json --ignore-not-found",
                "configmaps: get",
            ),
            command(
                "last seen and rejected commits",
                f"patch configmap/gitops-hook-shop {MERGED}",
                "configmaps: get patch",
                {"data": {"ref-1": "{}"}},
            ),
            command("a first push", CREATE, "configmaps: create", listed(configmap("made"))),
        ),
    ),
}


# === What the Roles grant ===


def roles(documents: Iterator[Object]) -> dict[str, Object]:
    """Return the Roles by namespace; there is one in each."""
    found = [d for d in documents if d["kind"] == "Role"]
    assert sorted(r["metadata"]["namespace"] for r in found) == sorted(NAMESPACES)
    return {r["metadata"]["namespace"]: r for r in found}


ROLES = roles(yaml.safe_load_all((ROOT / "manifests/base/roles.yaml").read_text("utf-8")))
GRANTED: dict[str, frozenset[Grant]] = {
    namespace: frozenset(
        (resource, verb)
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    )
    for namespace, role in ROLES.items()
}
EACH_GRANT = [(n, *grant) for n in NAMESPACES for grant in sorted(GRANTED[n])]
EACH_COMMAND = [(n, c) for n in NAMESPACES for c in COMMANDS[n] if not c.goes_on]
EACH_STREAM = [(n, c) for n in NAMESPACES for c in COMMANDS[n] if c.goes_on]


def without(role: Object, resource: str, verb: str) -> Object:
    """Return a Role that lacks one verb."""
    changed = [
        {**rule, "verbs": [v for v in rule["verbs"] if v != verb]}
        if resource in rule["resources"]
        else rule
        for rule in role["rules"]
    ]
    return {**role, "rules": [rule for rule in changed if rule["verbs"]]}


class Desk:
    """An API server with the shipped manifests, and kubectl as the daemon's account.

    Nothing runs there: no controller, no pod. So the same command finds the same each time.
    """

    def __init__(self, directory: Path, api: Api, manifests: Sequence[Object]) -> None:
        self.directory, self.api, self.store = directory, api, api.store
        for item in sorted(manifests, key=lambda o: o["kind"] != "Namespace"):
            self.put(item)
        api.log_source = lambda *_: b"the last words\n"
        self.kubectl = self.kubectl_of(ACCOUNT)

    def kubectl_of(self, account: str) -> Kubectl:
        """Return kubectl as some service account."""
        path = self.directory / account.replace("/", "-")
        return Kubectl(self.directory, self.api.kubeconfig(path, account))

    def put(self, item: Object) -> None:
        """Put an object into the cluster, in the place of what has its name."""
        kind, meta = find_kind(item["apiVersion"], item["kind"]), item["metadata"]
        assert kind is not None, item["kind"]
        namespace = meta.get("namespace") if kind.namespaced else None
        self.store.remove(kind.name, namespace, meta["name"])
        self.store.create(kind.name, item)
        if status := item.get("status"):
            change = partial(dict.update, status=status)
            self.store.update_status(kind.name, namespace, meta["name"], change)

    def prepare(self, namespace: str) -> None:
        """Put back what stands in a namespace, and remove what a command has made."""
        for resource in MADE:
            self.store.remove(resource, namespace, "made")
        for item in STANDING[namespace]:
            self.put({**item, "metadata": {**item["metadata"], "namespace": namespace}})
        self.api.faults.forget()

    def run(self, wanted: Command, namespace: str) -> Result:
        """Run a command as the daemon's account, with everything in its place."""
        self.prepare(namespace)
        stdin = json.dumps(wanted.stdin) if wanted.stdin else None
        return self.kubectl.run(*wanted.line(namespace), stdin=stdin)

    @contextmanager
    def lacking(self, namespace: str, resource: str, verb: str) -> Iterator[None]:
        """Take one verb away while the block runs."""
        self.put(without(ROLES[namespace], resource, verb))
        try:
            yield
        finally:
            self.put(ROLES[namespace])

    def can(self, account: str, *words: str) -> str:
        """Return what `auth can-i` answers an account."""
        return self.kubectl_of(account).run("auth", "can-i", *words).out.strip()


def asked(log: Sequence[Request], namespace: str) -> frozenset[Grant]:
    """Return what the daemon's account asked for in a namespace."""
    return frozenset(
        (r.resource, r.verb) for r in log if (r.user, r.namespace) == (USER, namespace)
    )


def forbidden(log: Sequence[Request]) -> list[Request]:
    """Return the refused requests of the daemon's account that matter."""
    refused = [r for r in log if r.user == USER and r.code == 403]
    return [r for r in refused if (r.resource, r.verb) not in HARMLESS]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    directory = tmp_path_factory.mktemp("desk")
    render = [find_kubectl(), "kustomize", str(ROOT / "manifests")]
    rendered = subprocess.run(render, check=True, capture_output=True, text=True).stdout
    with Api(Store()) as api:
        yield Desk(directory, api, list(yaml.safe_load_all(rendered)))


# === Every command works, and every verb has a command ===


def test_the_shipped_roles_are_those_of_the_base(desk: Desk) -> None:
    stored = roles(iter(desk.store.list("roles")))
    assert {n: r["rules"] for n, r in stored.items()} == {n: r["rules"] for n, r in ROLES.items()}


@pytest.mark.parametrize(
    ("namespace", "wanted"), EACH_COMMAND, ids=[f"{n}: {c.purpose}" for n, c in EACH_COMMAND]
)
def test_a_command_works_and_asks_for_what_the_table_says(
    desk: Desk, namespace: str, wanted: Command
) -> None:
    done = desk.run(wanted, namespace)
    assert done.code == wanted.code, done
    assert wanted.says in done.err, done
    assert not forbidden(desk.api.faults.log)
    assert asked(desk.api.faults.log, namespace) == wanted.needs


def test_what_goes_on_works_and_asks_for_what_the_table_says(desk: Desk) -> None:
    for namespace in NAMESPACES:
        desk.prepare(namespace)
    begun = [(n, c, desk.kubectl.start(*c.line(n))) for n, c in EACH_STREAM]
    try:
        ended = [(n, c, p, p.communicate(timeout=30)[1]) for n, c, p in begun]
    finally:
        for _, _, process in begun:
            process.kill()
            process.communicate()
    log = desk.api.faults.log
    assert not forbidden(log)
    for namespace, wanted, process, said in ended:
        assert (process.returncode, wanted.says in said) == (wanted.code, True), (wanted, said)
        resources = {resource for resource, _ in wanted.needs}
        assert {g for g in asked(log, namespace) if g[0] in resources} == wanted.needs, wanted


@pytest.mark.parametrize(
    ("namespace", "resource", "verb"), EACH_GRANT, ids=[f"{n}: {r} {v}" for n, r, v in EACH_GRANT]
)
def test_without_a_verb_a_command_says_forbidden(
    desk: Desk, namespace: str, resource: str, verb: str
) -> None:
    users = [c for c in COMMANDS[namespace] if (resource, verb) in c.needs]
    assert users, "no command needs it"
    with desk.lacking(namespace, resource, verb):
        done = desk.run(users[0], namespace)
    said = done.err.replace('\\"', '"')  # client-go's own log quotes what it quotes
    assert f'User "{USER}" cannot {verb} resource "{resource}"' in said, users[0].purpose


# === Nothing else is allowed ===


def permissions(listing: str) -> frozenset[Grant]:
    """Return what `auth can-i --list` prints, without what every account may ask about itself."""
    rows = re.findall(r"(?m)^(\S+) +\[[^]]*\] +\[([^]]*)\] +\[([^]]+)\]$", listing)
    assert rows, listing
    found = {(r.split(".")[0], v) for r, names, verbs in rows if not names for v in verbs.split()}
    return frozenset(g for g in found if not g[0].startswith("self"))


@pytest.mark.parametrize("namespace", [*NAMESPACES, "default", "kube-system"])
def test_the_daemon_may_do_what_its_role_says_and_nothing_else(desk: Desk, namespace: str) -> None:
    listing = desk.can(ACCOUNT, "--list", "-n", namespace)
    assert permissions(listing) == GRANTED.get(namespace, frozenset())


@pytest.mark.parametrize(
    "words",
    [
        *(f"{verb} secrets -n {n}" for n in NAMESPACES for verb in ("get", "list")),
        *(f"create pods/exec -n {n}" for n in (*RUNS, *LIVE)),
        "get deployments.apps -n test",
        "create deployments.apps -n build",
        "create jobs.batch -n staging",
        "create jobs.batch -n production",
        "create rolebindings.rbac.authorization.k8s.io -n production",
        "get pods -A",
        "list jobs.batch -A",
        "get namespaces",
        "get nodes",
    ],
)
def test_the_daemon_may_not(desk: Desk, words: str) -> None:
    assert desk.can(ACCOUNT, *words.split()) == "no"


@pytest.mark.parametrize(
    "account", ["test/test-runner-sa", "build/build-runner-sa", "test/default"]
)
def test_the_accounts_of_pods_may_do_nothing(desk: Desk, account: str) -> None:
    for namespace in NAMESPACES:
        assert not permissions(desk.can(account, "--list", "-n", namespace)), namespace


# === The tables are whole: nothing in the program, and nothing that it runs, is missing ===

CALLS = (
    r'kubectl\.(get|list|patch|delete|run|stream)\(\s*"(\w+)"(?:,\s*"(\w+)")?',
    r'\bargs = \(\s*"(\w+)",\s*"(\w+)"()',
    r'\bWatch\(\s*(?:self\.)?(kubectl),\s*"(\w+)"()',
)
METHODS = {"list": "get", "kubectl": "get", "create_each": "create", "put": "replace"}
METHODS |= {"read": "get -f", "delete_exactly": "delete --raw"}
SINGULAR = re.compile(r"s$")


def calls_in(source: str) -> set[str]:
    """Return each kubectl command in a program's text: verb and resource, or the verb alone."""
    found = set()
    for method, first, second in (m for call in CALLS for m in re.findall(call, source)):
        words = (first, second) if method in ("run", "stream") else (method, first)
        found.add(" ".join((METHODS.get(words[0], words[0]), SINGULAR.sub("", words[1]))))
    alone = re.findall(r"kubectl\.(create|create_each|put|logs|read|delete_exactly)\(", source)
    return found | {METHODS.get(verb, verb) for verb in alone}


def call_of(argv: Sequence[str]) -> str:
    """Return the same of a command line."""
    if argv[0] in ("create", "replace", "logs"):
        return argv[0]
    if argv[1] == "-f" or argv[:2] == ("delete", "--raw"):
        return " ".join(argv[:2])
    if argv[1] == "--raw":
        argv = (argv[0], argv[2].partition("?")[0].rpartition("/")[2])
    resource = argv[1].partition("/")[0]
    return f"{argv[0]} {resource if argv[0] == 'rollout' else SINGULAR.sub('', resource)}"


# `plan` runs with its caller's permissions, and says so where they do not suffice.
CALLERS = {"get resourcequota"}


def test_each_kubectl_command_in_the_program_is_in_the_tables_and_no_other() -> None:
    tables = {call_of(c.argv) for commands in COMMANDS.values() for c in commands} | CALLERS
    assert {SINGULAR.sub("", call) for call in calls_in(PROGRAM.read_text("utf-8"))} == {
        SINGULAR.sub("", call) for call in tables
    }


def shape(argv: Sequence[str]) -> str:
    """Return a command line without the names, selectors and seconds of one case."""
    kept: list[str] = []
    names_from = 1 if argv[0] == "logs" else 2
    for at, word in enumerate(argv):
        option, is_option = argv[at - 1] if at else "", word.startswith("-")
        given = option in ("-l", "-c", "-p", "--field-selector")
        named = not is_option and at >= names_from and "/" not in word
        if option == "--raw":
            short = re.sub("=[^&]*", "=…", re.sub("/namespaces/[^/]+/", "/…/", word))
        elif given or (named and option not in ("-f", "-o")):
            short = "…"
        elif is_option:
            short = re.sub("(timeout)=.*", r"\1", word)
        else:
            short = re.sub("/.*", "/…", word)
        if kept[-1:] != [short]:  # several names are as one
            kept.append(short)
    return " ".join(kept)


# What is not needed in the world below, and when it is.
RARE: dict[tuple[str, Grant], str] = {
    ("test", ("events", "list")): "a released Job that has no pod after seconds: quota",
    ("build", ("events", "list")): "a released Job that has no pod after seconds: quota",
    ("staging", ("events", "list")): "a pod that is not ready after seconds",
    ("production", ("events", "list")): "a pod that is not ready after seconds",
    ("build", ("events", "create")): "a build that fails, or waits for something",
    ("build", ("jobs", "delete")): "a rerun after a failed build, or one whose digest is lost",
    ("test", ("configmaps", "list")): "the logs that are old, a minute after the start",
    ("build", ("configmaps", "list")): "the logs that are old, a minute after the start",
    ("build", ("configmaps", "create")): "the log of a failed build",
    ("build", ("configmaps", "delete")): "the log of a build that failed a day ago, or again",
    ("build", ("pods", "get")): "the log of a failed build",
    ("build", ("pods/log", "get")): "the log of a failed build",
    ("production", ("configmaps", "delete")): "a release that no history names any more",
    ("production", ("deployments", "delete")): "a first deployment that failed",
    ("production", ("services", "delete")): "a first deployment that failed after its preview",
    ("staging", ("services", "delete")): "a first deployment that failed after its preview",
    ("production", ("pods", "get")): "the log of pods that failed only here",
    ("production", ("pods/log", "get")): "the log of pods that failed only here",
    **{
        (namespace, (address.rpartition("/")[2], verb)): "an app that has one beside it"
        for namespace in LIVE
        for address in BESIDE
        for verb in ("get", "create", "update", "delete")
        if address.startswith("apis/") or verb == "update"
    },
}


class Recorded(World):
    """A world that writes down each kubectl command of the program."""

    @property
    def environ(self) -> dict[str, str]:
        """The environment, with a kubectl that writes its arguments to a file of its own."""
        shims, calls = self.directory / "shims", self.directory / "calls"
        if not shims.exists():
            calls.mkdir()
            shims.mkdir()
            shim = shims / "kubectl"
            note = f"printf '%s\\037' \"$@\" > '{calls}'/$$"
            shim.write_text(f"#!/bin/sh\n{note}\nexec '{find_kubectl()}' \"$@\"\n")
            shim.chmod(0o755)
        known = super().environ
        return {**known, "PATH": f"{shims}:{known['PATH']}"}

    @property
    def calls(self) -> list[list[str]]:
        """The command lines so far."""
        files = (self.directory / "calls").iterdir()
        return [file.read_text("utf-8").split("\037")[:-1] for file in files]

    def ends(self, run: str, times: int = 1) -> Object:
        """Wait until a run has ended so many times; return the last line about it."""

        def lines() -> list[Object]:
            said = [e for e in self.logged() if e["msg"] == "run ended" and e["run"] == run]
            return said if len(said) >= times else []

        return dict(eventually(lines, 60, f"{run} ends")[-1])

    def kept(self, run: str) -> str:
        """Return the uid of the log that is kept of a red test, if there is one."""
        found = self.cluster.store.find("configmaps", "test", f"log-{run}")
        return str(found["metadata"]["uid"]) if found else ""

    def outcome(self, version: str, modes: str = "") -> str:
        """Release a version, push it and return how that ended."""
        run = self.push(self.repository.release(version, modes=modes))
        return str(self.ends(run)["outcome"])


def short(repository: Path) -> Object:
    """Return a configuration with short times, and tests that fail where a file says so."""
    config = daemon_config(
        repository, bake="1s", drain="1s", health={"path": "/ready", "successes": 1}
    )
    config["apps"][0]["test"] = {"command": "if test -e broken; then echo why; exit 1; fi"}
    return config


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """A world in which most of what can happen to a push has happened."""
    directory = tmp_path_factory.mktemp("lived")
    with Cluster(directory / "cluster", speed=4) as cluster:
        install(cluster)
        made = Recorded(directory, cluster, short)
        try:
            made.start()
            assert made.outcome("1", "crash-at-start") == "failed"
            assert [made.outcome(version) for version in ("2", "3", "3-again")] == ["deployed"] * 3
            assert made.outcome("4", "crash-at-start") == "failed"
            eventually(
                lambda: "restored" in {e["msg"] for e in made.logged()}, 20, "it is restored"
            )
            for command in (["status"], ["rollback", "shop"]):
                assert made.command(*command).returncode == 0
            broken = made.push(made.repository.release("5", broken="yes"))
            assert made.ends(broken)["stage"] == "test"
            first = eventually(lambda: made.kept(broken), 20, "the log is kept")
            assert made.command("rerun", broken).returncode == 0
            assert made.ends(broken, times=2)["stage"] == "test"
            eventually(lambda: made.kept(broken) not in ("", first), 20, "the new one is kept")
            made.end()
            yield made
        finally:
            made.end()


def test_nothing_that_a_deployment_needs_is_forbidden(lived: Recorded) -> None:
    log = lived.cluster.faults.log
    assert not forbidden(log)
    assert not (asked(log, "") - set(HARMLESS) - ALLOWED)
    for namespace in NAMESPACES:
        assert asked(log, namespace) <= GRANTED[namespace], namespace
    assert {r.namespace for r in log if r.user == USER} == {"", *NAMESPACES}


def test_what_is_granted_is_used_or_known_to_be_rare(lived: Recorded) -> None:
    rare = {(n, grant) for n, grant in RARE}
    unused = {(n, g) for n in NAMESPACES for g in GRANTED[n] - asked(lived.cluster.faults.log, n)}
    assert unused <= rare
    assert rare <= {(n, g) for n in NAMESPACES for g in GRANTED[n]}


def test_each_command_of_a_deployment_is_in_the_tables_as_it_is(lived: Recorded) -> None:
    tables = {n: {shape(c.argv) for c in COMMANDS[n]} for n in NAMESPACES}
    unknown = set()
    for flag, namespace, *argv in lived.calls:
        if (flag, namespace) == ("label", "--local"):
            continue  # it reads manifests, and asks no API server
        assert flag == "-n"
        if shape(argv) not in tables[namespace]:
            unknown.add((namespace, shape(argv)))
    assert not unknown
