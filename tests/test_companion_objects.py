"""What stands beside an app: how it is sorted, rendered, recorded, and told from that of others."""

from __future__ import annotations

import base64
import copy
import json
import re
import threading
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gitops_hook as hook
from gitops_hook import (
    AppObjects,
    AppState,
    CompanionRecord,
    Companions,
    ConfigError,
    Manifest,
    Placement,
    Reason,
    Release,
    Task,
    recoloured,
    render,
)
from tests.test_app_manifests import (
    BUILT,
    CONTROL_PLANE,
    IMAGE,
    OTHERS,
    RUN,
    Object,
    app_of,
    checked_objects,
    fault,
    objects,
)

LABELS = {
    "app.kubernetes.io/managed-by": "gitops-hook",
    "gitops-hook/app": "shop",
    "gitops-hook/stage": "companion",
}
APIS = {
    "HorizontalPodAutoscaler": "autoscaling/v2",
    "PodDisruptionBudget": "policy/v1",
    "CronJob": "batch/v1",
}


def item(kind: str, name: str = "x", api: str = "", **content: Any) -> Object:
    """An object as a commit has it."""
    version = api or APIS.get(kind, "v1")
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}, **content}


def scaler(name: str = "x", target: str = "web", **spec: Any) -> Object:
    """An autoscaler."""
    reference = {"apiVersion": "apps/v1", "kind": "Deployment", "name": target}
    limits = {"minReplicas": 3, "maxReplicas": 5}
    return item(
        "HorizontalPodAutoscaler", name, spec={**limits, **spec, "scaleTargetRef": reference}
    )


def budget(**selector: Any) -> Object:
    """A disruption budget."""
    chosen = selector or {"matchLabels": {"app": "shop"}}
    return item("PodDisruptionBudget", spec={"minAvailable": 1, "selector": chosen})


def cronjob(image: str = f"{IMAGE}:dev", **pod: Any) -> Object:
    """A CronJob."""
    spec = {"restartPolicy": "Never", "containers": [{"name": "c", "image": image}], **pod}
    template = {"spec": {"template": {"spec": spec}}}
    return item("CronJob", spec={"schedule": "0 3 * * *", "jobTemplate": template})


def peers(name: str = "peers", **spec: Any) -> Object:
    """A headless Service."""
    chosen = {"clusterIP": "None", "selector": {"app": "shop"}, "ports": [{"port": 7000}]}
    return item("Service", name, spec={**chosen, **spec})


def checked(*beside: Object, **deploy: Any) -> AppObjects:
    """The objects of an app that has something beside it."""
    items = [*objects(), *beside]
    manifests = [Manifest(f"app.json: {i['kind']} {i['metadata']['name']}", i) for i in items]
    return checked_objects(app_of(deploy=deploy), "production", manifests)


def released(*beside: Object, live: int = 0, **deploy: Any) -> Release:
    """The release of such an app."""
    app = app_of(deploy=deploy)
    return render(app, RUN, BUILT, Placement("green", live), checked(*beside, **deploy))


def beside(*items: Object, **deploy: Any) -> list[Object]:
    """What stands beside the app while its release is live."""
    return released(*items, **deploy).companions_for("shop")


# === What stands beside an app, and what is refused ===


@pytest.mark.parametrize(
    "companion",
    [
        scaler(),
        budget(),
        budget(matchExpressions=[{"key": "app", "operator": "In", "values": ["shop"]}]),
        cronjob(),
        peers(),
        item("ConfigMap", data={"a": "b"}),
    ],
    ids=["autoscaler", "budget", "expressions", "cronjob", "service", "configmap"],
)
def test_what_is_the_apps_stands_beside_it_as_it_is(companion: Object) -> None:
    assert checked(companion).companions == [companion]


def test_a_kind_stands_beside_it_only_if_a_setting_lists_it() -> None:
    ingress = item("Ingress", api="networking.k8s.io/v1", spec={"rules": []})
    said = fault(lambda: checked(ingress))[1]
    assert "List Ingress in deploy.companions to have it applied, or Ingress/x in deploy." in said
    assert checked(ingress, companions=["Ingress"]).companions == [ingress]
    assert checked(ingress, companions=["Ingress"], ignore=["Ingress"]).companions == []


@pytest.mark.parametrize(
    ("companion", "said"),
    [
        (scaler(target="worker"), "Its scaleTargetRef must name a Deployment here."),
        (
            budget(matchLabels={"app": "other"}),
            "Its selector must reach pods of a Deployment here.",
        ),
        (budget(matchLabels={}), "Its selector must reach pods of a Deployment here."),
        (budget(matchExpressions=5), "Its selector must reach pods of a Deployment here."),
        (peers(selector={"app": "other"}), "Its selector must reach pods of a Deployment here."),
        (peers(selector=None), "Its selector must reach pods of a Deployment here."),
        (peers("shop-preview"), "has the name of the preview Service. Rename it."),
        (peers(externalIPs=["10.0.0.1"]), "spec.externalIPs takes traffic of other addresses"),
        (cronjob(hostNetwork=True), "spec.hostNetwork shares the network of the node"),
        (
            cronjob(volumes=[{"name": "v", "hostPath": {"path": "/"}}]),
            "volumes.hostPath reaches the node",
        ),
        (cronjob(serviceAccountName="root"), "spec.serviceAccountName is not in deploy.service_"),
        ({**cronjob(), "status": {"active": 5}}, "CronJob.status is written by a tool"),
        (
            {**cronjob(), "apiVersion": "batch/v1beta1"},
            "is of batch/v1beta1. Write apiVersion: batch/v1.",
        ),
        (item("PersistentVolumeClaim"), "the pods of both colours use it at once."),
        (item("StatefulSet", api="apps/v1"), "List StatefulSet in deploy.companions"),
        (item("ConfigMap", data={"n": 5}), "ConfigMap x: n is not a text. Put it in quotes."),
        (item("ConfigMap", data={"n": "x" * 200_000}), "ConfigMap x has more than 128 KiB."),
        (item("ConfigMap", data={"n": "<" * 30_000}), "ConfigMap x has more than 128 KiB."),
        (item("ConfigMap", data={"n": "\u00e9" * 30_000}), "ConfigMap x has more than 128 KiB."),
        (scaler(maxReplicas="many"), "spec.maxReplicas is no whole number from 0 to 1000. Use"),
        (scaler(maxReplicas=2), "minReplicas and maxReplicas must be sizes of the app."),
    ],
)
def test_what_cannot_follow_or_harms_others_is_refused_with_advice(
    companion: Object, said: str
) -> None:
    assert said in fault(lambda: released(companion))[1]


@pytest.mark.parametrize(
    "companion",
    [
        *(peers(ports=ports) for ports in (5, ["x"], [{"nodePort": []}], {"a": 1})),
        {**cronjob(), "metadata": {"name": "x", "labels": 5}},
        {**cronjob(), "metadata": {"name": "x", "annotations": [5]}},
        cronjob(containers=[{"name": "c"}]),
        cronjob(containers=5),
    ],
)
def test_what_has_no_shape_is_refused_while_the_tests_run(companion: Object) -> None:
    assert fault(lambda: released(companion))[1]


@pytest.mark.parametrize("kind", [*APIS, "Service", "ConfigMap"])
@pytest.mark.parametrize("spec", [5, [], {}, "x", None, {"selector": 5}, {"jobTemplate": [1]}])
def test_an_object_of_any_shape_ends_in_a_release_or_a_refusal(kind: str, spec: Any) -> None:
    with suppress(hook.StageError):
        made = released(item(kind, spec=spec), live=2)
        assert len(made.companions_for("shop")) == 1
        assert [*hook.shared_node_ports({"staging": made, "production": made})] == []


def second() -> Object:
    """A Deployment like the app's own, beside it."""
    work = copy.deepcopy(objects()[0])
    work["metadata"]["name"] = "work"
    work["spec"]["template"]["metadata"]["labels"] = {"app": "work"}
    return work


def bounded(**fields: Any) -> list[Object]:
    """Objects of all kinds that say how many pods there are, with these numbers."""
    work = second()
    work["spec"]["replicas"] = fields.get("replicas", 1)
    jobs = {key: fields[key] for key in ("parallelism", "completions") if key in fields}
    nightly = cronjob()
    nightly["spec"]["jobTemplate"]["spec"] |= jobs
    sizes = {key: fields[key] for key in ("minReplicas", "maxReplicas") if key in fields}
    counts = {k: v for k, v in fields.items() if k in ("minReplicaCount", "maxReplicaCount")}
    scaled = item("ScaledJob", api="keda.sh/v1", spec={"jobTargetRef": jobs, **counts})
    database = item("StatefulSet", api="apps/v1", spec={"replicas": fields.get("replicas", 1)})
    return [work, nightly, scaler(**sizes), scaler("y", "work", **sizes), scaled, database]


@pytest.mark.parametrize("odd", [1001, 2**31 - 1, -1, True, False, "5", "", 2.5, [], {"a": 1}])
@pytest.mark.parametrize(
    ("field", "kinds"),
    [
        ("replicas", ["Deployment", "StatefulSet"]),
        ("minReplicas", ["HorizontalPodAutoscaler", "HorizontalPodAutoscaler"]),
        ("maxReplicas", ["HorizontalPodAutoscaler", "HorizontalPodAutoscaler"]),
        ("parallelism", ["CronJob", "ScaledJob"]),
        ("completions", ["CronJob", "ScaledJob"]),
        ("minReplicaCount", ["ScaledJob"]),
        ("maxReplicaCount", ["ScaledJob"]),
    ],
)
def test_a_companion_that_asks_for_more_pods_than_a_cluster_is_for_is_refused(
    field: str, kinds: list[str], odd: Any
) -> None:
    companions = ["ScaledJob", "StatefulSet"]
    most = {"maxReplicas": 1000, field: 1000}
    assert len(checked(*bounded(**most), companions=companions).companions) == 6
    said = fault(lambda: checked(*bounded(**{**most, field: odd}), companions=companions))[1]
    words = re.findall(r"app.json: (\w+) \w+: \w+\.(\w+) is no whole number from 0 to 1000\.", said)
    assert words == [(kind, field) for kind in kinds]


@pytest.mark.parametrize("toleration", CONTROL_PLANE)
def test_no_pod_beside_the_app_may_run_on_the_control_plane(toleration: Object) -> None:
    tolerations = [{"key": "gpu", "operator": "Exists"}, toleration]
    work = second()
    work["spec"]["template"]["spec"]["tolerations"] = tolerations
    other = item("StatefulSet", api="apps/v1", spec={"template": work["spec"]["template"]})
    beside_ = (work, cronjob(tolerations=tolerations), other)
    said = fault(lambda: checked(*beside_, companions=["StatefulSet"]))[1]
    words = "tolerations let these pods run on the control plane. Use the key of another taint."
    assert [line.partition(": ")[2].split()[0] for line in said.split("\n")] == [
        *("Deployment", "CronJob", "StatefulSet")
    ]
    assert said.count(words) == 3
    tolerations.pop()
    assert checked(*beside_, companions=["StatefulSet"]).companions


def test_all_that_stands_beside_an_app_together_is_bounded_as_well() -> None:
    large = [item("ConfigMap", f"c{i}", data={"n": "&" * 18_000}) for i in range(10)]
    assert len(released(*large[:-1]).companions_for("shop")) == 9
    assert fault(lambda: released(*large))[1] == (
        "The objects beside the app have more than 1024 KiB. "
        "Make them smaller, or list some of them in deploy.ignore."
    )


def with_large_pods(*beside_: Object, size: int, number: int, kilobytes: int) -> Release:
    """The release of a commit whose first companion, or the app itself, has such pods."""
    items = [copy.deepcopy(i) for i in (*objects(), *beside_)]
    large = [{"name": "A", "value": "a" * kilobytes * 1000}]
    target = items[size]
    hook.pod_of(target)["containers"][0]["env"] = large
    if target["kind"] == "CronJob":
        target["spec"]["jobTemplate"]["spec"]["parallelism"] = number
    elif not any(hook.scaled_by(i) == target["metadata"]["name"] for i in beside_):
        target["spec"]["replicas"] = number
    manifests = [Manifest(f"app.json: {i['kind']} {i['metadata']['name']}", i) for i in items]
    app = app_of()
    return render(
        app, RUN, BUILT, Placement("green", 0), checked_objects(app, "production", manifests)
    )


def front_of(items: list[Object]) -> int:
    """The place of the app's own Deployment."""
    return [i["kind"] for i in items].index("Deployment")


@pytest.mark.parametrize(
    "kind", ["the app", "the app, scaled", "a worker", "a worker, scaled", "a cronjob"]
)
def test_all_pods_of_a_commit_together_are_bounded(kind: str) -> None:
    front = front_of(objects())
    last = len(objects())
    name = objects()[front]["metadata"]["name"]
    rows: dict[str, tuple[int, list[Object]]] = {
        "the app": (front, []),
        "the app, scaled": (front, [scaler(target=name, maxReplicas=900)]),
        "a worker": (last, [second()]),
        "a worker, scaled": (
            last,
            [second(), scaler(target=second()["metadata"]["name"], maxReplicas=900)],
        ),
        "a cronjob": (last, [cronjob()]),
    }
    place, more = rows[kind]
    with_large_pods(*more, size=place, number=900, kilobytes=60)
    assert fault(lambda: with_large_pods(*more, size=place, number=900, kilobytes=90))[1] == (
        "All pods together have more than 64 MiB. Ask for fewer, or make their templates smaller."
    )


def repelling(selector: Any, field: str = "podAntiAffinity") -> Object:
    """An affinity of pods that must be apart from others."""
    term = {"topologyKey": "kubernetes.io/os", "labelSelector": selector}
    return {field: {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def repellers(selector: Any) -> list[Object]:
    """Objects of all kinds that make pods, which must be apart from others."""
    labels = {"app": "work"}
    kinds = second(), cronjob(), item("StatefulSet", api="apps/v1"), item("ScaledJob", api="a/v1")
    work, nightly, database, jobs = kinds
    pod_ = {"containers": [{"name": "c", "image": "x"}]}
    work["spec"]["template"]["spec"]["affinity"] = repelling(selector)
    nightly_jobs = nightly["spec"]["jobTemplate"]["spec"]["template"]
    nightly_jobs["spec"]["affinity"] = repelling(selector)
    nightly_jobs["metadata"] = {"labels": labels}
    made = {"metadata": {"labels": labels}, "spec": {**pod_, "affinity": repelling(selector)}}
    database["spec"] = {"template": made}
    jobs["spec"] = {"jobTargetRef": {"template": copy.deepcopy(made)}}
    return [work, nightly, database, jobs]


LISTED = ["StatefulSet", "ScaledJob", "Cluster"]


def test_pods_beside_the_app_that_must_be_apart_repel_those_of_this_app_only() -> None:
    own = {"app": "work", "gitops-hook/beside": "shop"}
    rendered = beside(*repellers({"matchLabels": {"app": "work"}}), companions=LISTED)
    templates = [
        hook.part_of(one, "spec", *path)
        for one in rendered
        for path in hook.TEMPLATES
        if hook.part_of(one, "spec", *path)
    ]
    assert len(templates) == 4
    for template in templates:
        assert template["metadata"]["labels"].items() >= own.items()
        assert template["spec"]["affinity"] == repelling({"matchLabels": own})


def test_pods_that_repel_none_get_no_label_for_it_and_are_not_restarted() -> None:
    work, nightly = beside(second(), cronjob())[-2:]
    assert "gitops-hook/beside" not in json.dumps([work, nightly])


@pytest.mark.parametrize("selector", OTHERS[:-1])
def test_no_pods_beside_the_app_may_repel_those_of_others(selector: Any) -> None:
    if "app" not in selector.get("matchLabels", {}):
        selector = {**selector, "matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}
    said = fault(lambda: released(*repellers(selector), companions=LISTED))[1]
    words = "a required podAntiAffinity may only keep these pods apart from each other. Use pref"
    names = [f"{one['kind']} {one['metadata']['name']}" for one in repellers(selector)]
    assert [line.split(": ")[0] for line in said.split("\n")] == names
    assert said.count(words) == len(names)


def test_an_anti_affinity_of_pods_that_nobody_knows_here_is_refused() -> None:
    database = item(
        "Cluster", api="a/v1", spec={"affinity": repelling({"matchLabels": {"a": "b"}})}
    )
    said = fault(lambda: released(database, companions=LISTED))[1]
    assert said.startswith("Cluster x: a required podAntiAffinity may only keep these pods apart")
    near = repelling({"matchLabels": {"a": "b"}}, "podAffinity")
    kept = beside(item("Cluster", api="a/v1", spec={"affinity": near}), companions=LISTED)
    assert [one["spec"]["affinity"] for one in kept] == [near]


def test_two_autoscalers_and_more_objects_than_are_possible_are_refused() -> None:
    said = fault(lambda: checked(scaler("a"), scaler("b")))[1]
    assert said == "a, b scale the same Deployment. Keep one of them."
    many = [item("ConfigMap", f"c{i}") for i in range(51)]
    assert fault(lambda: checked(*many))[1].startswith("51 objects stand beside the app, but 50 ")


@pytest.mark.parametrize(
    "kind",
    ["Secret", "Job", "RoleBinding", "PersistentVolumeClaim", "Pod", "ReplicaSet",
     "ReplicationController", "Endpoints", "EndpointSlice"],
)  # fmt: skip
def test_no_setting_lets_such_a_kind_be_applied(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"deploy.companions: {kind} is never applied"):
        app_of(deploy={"companions": [kind]})


@pytest.mark.parametrize("entry", ["", "ingress", "Ingress/web", "networking.k8s.io/Ingress", 5])
def test_what_is_no_kind_is_a_fault_of_the_configuration(entry: Any) -> None:
    with pytest.raises(ConfigError, match=r"deploy.companions\[0\]"):
        app_of(deploy={"companions": [entry]})


def test_a_configmap_that_a_cronjob_names_keeps_its_name_also_if_the_app_names_it() -> None:
    volumes = [{"name": "v", "configMap": {"name": "settings"}}]
    sorted_ones = checked(cronjob(volumes=volumes))
    assert [*sorted_ones.configmaps] == ["settings"]
    assert [c["kind"] for c in sorted_ones.companions] == ["ConfigMap", "CronJob"]


# === What a release makes of it ===


def test_each_companion_has_our_labels_and_follows_the_colour() -> None:
    rendered = {i["kind"]: i for i in beside(scaler(), budget(), cronjob(), peers())}
    assert all(i["metadata"]["labels"] == LABELS for i in rendered.values())
    own = {"gitops-hook/app": "shop", "version": "green"}
    target = rendered["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "shop-green"}
    assert rendered["PodDisruptionBudget"]["metadata"]["name"] == "x-green"
    chosen = rendered["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    assert chosen == {"app": "shop", **own}
    assert rendered["Service"]["spec"]["selector"] == {**own, "gitops-hook/run": RUN.id}
    pod = rendered["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == BUILT


def aimed(listed: str, field: str = "targetRef", **target: str) -> Object:
    """An object of a listed kind that names another one."""
    return item(listed, api="example.com/v1", spec={field: {"name": "web", **target}})


@pytest.mark.parametrize(
    "companion",
    [
        aimed("ScaledObject", "scaleTargetRef"),
        aimed("ScaledObject", "scaleTargetRef", apiVersion="apps/v1", kind="Deployment"),
        aimed("VerticalPodAutoscaler", apiVersion="apps/v1", kind="Deployment"),
        item("Canary", api="a/v1", spec={"in": [{"x": {"kind": "Deployment", "name": "web"}}]}),
    ],
    ids=["without-kind", "with-kind", "field", "deep"],
)
def test_what_names_the_deployment_of_the_app_is_refused_since_there_are_two_of_other_names(
    companion: Object,
) -> None:
    kind = companion["kind"]
    assert fault(lambda: checked(companion, companions=[kind]))[1] == (
        f"app.json: {kind} x names Deployment web, which runs as shop-blue or shop-green. "
        f"Use a HorizontalPodAutoscaler, or list {kind}/x in deploy.ignore."
    )
    checked(companion, companions=[kind], ignore=[kind])


def test_a_budget_that_is_called_like_another_ones_colour_is_refused() -> None:
    work = second()
    other = budget(matchLabels={"app": "work"})
    other["metadata"]["name"] = "x-green"
    said = "PodDisruptionBudget x-green has the name of a colour of a budget. Rename it."
    assert fault(lambda: checked(work, budget(), other))[1] == f"app.json: {said}"
    assert len(checked(work, other).companions) == 2


def test_what_names_a_worker_or_another_kind_is_not_refused() -> None:
    work = second()
    scaled = aimed("ScaledObject", "scaleTargetRef", name="work")
    other = aimed("ScaledObject", "scaleTargetRef", kind="StatefulSet")
    other["metadata"]["name"] = "y"
    assert len(checked(work, scaled, other, companions=["ScaledObject"]).companions) == 3


def test_jobs_that_an_autoscaler_starts_get_the_built_image_and_keep_their_configmaps() -> None:
    container = {"name": "c", "image": f"{IMAGE}:dev"}
    container |= {"envFrom": [{"configMapRef": {"name": "settings"}}]}
    template = {"spec": {"restartPolicy": "Never", "containers": [container]}}
    jobs = item("ScaledJob", api="keda.sh/v1alpha1", spec={"jobTargetRef": {"template": template}})
    configmap, rendered = beside(jobs, companions=["ScaledJob"])
    assert (configmap["kind"], configmap["metadata"]["name"]) == ("ConfigMap", "settings")
    pod = rendered["spec"]["jobTargetRef"]["template"]["spec"]
    assert pod == {**template["spec"], "containers": [{**container, "image": BUILT}]}


def test_a_configmap_that_a_listed_kind_names_keeps_its_own_name() -> None:
    backup = item("Backup", api="a/v1", spec={"hooks": [{"configMapRef": {"name": "settings"}}]})
    names = [i["metadata"]["name"] for i in beside(backup, companions=["Backup"])]
    assert names == ["settings", "x"]


def test_a_release_in_another_colour_has_its_companions_in_that_colour() -> None:
    release = recoloured(released(scaler(), budget()), app_of(), "blue", 2)
    names = [i["metadata"]["name"] for i in release.companions_for("shop")]
    assert names == ["x", "x-blue"]
    assert release.companions_for("shop")[0]["spec"]["scaleTargetRef"]["name"] == "shop-blue"


def test_a_foreign_image_of_a_cronjob_stays_unless_nothing_is_built() -> None:
    pod = beside(cronjob("busybox:1"))[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "busybox:1"
    app = app_of(build={"builder": "none"})
    objects_ = checked(cronjob("busybox:1"))
    objects_.deployment["spec"]["template"]["spec"]["containers"][0]["image"] = BUILT
    said = fault(lambda: render(app, RUN, BUILT, Placement("green", 0), objects_))[1]
    assert "The image 'busybox:1' is not named by digest" in said


@pytest.mark.parametrize(("live", "size"), [(0, 3), (2, 3), (4, 4), (9, 5)])
def test_with_an_autoscaler_a_version_is_as_large_as_the_live_one_within_its_limits(
    live: int, size: int
) -> None:
    assert released(scaler(), live=live).wanted == size
    assert checked(scaler()).follows_size


def test_a_release_keeps_its_companions_and_one_of_before_has_none_to_touch() -> None:
    release = released(scaler(), cronjob())
    assert Release.from_configmap(release.configmap("shop")) == release
    assert released().companions == []
    old = Release.from_configmap(replace(release, companions=None).configmap("shop"))
    assert (old.companions, old.companions_for("shop")) == (None, [])


def test_a_record_of_a_later_version_with_unknown_fields_can_be_read() -> None:
    record = released(cronjob()).configmap("shop")
    content = json.loads(zlib.decompress(base64.b64decode(record["binaryData"]["release"])))
    packed = zlib.compress(json.dumps({**content, "later": 5}).encode())
    record["binaryData"]["release"] = base64.b64encode(packed).decode()
    assert Release.from_configmap(record) == released(cronjob())


# === What is recorded of what was made ===

RECORD = CompanionRecord(environment="production", api="batch/v1", kind="CronJob", name="x")


def state_of(*records: CompanionRecord, **more: str) -> AppState:
    """The state of an app with these records."""
    data = {r.key: hook.record_text(r) for r in records}
    return AppState.from_configmap(app_of(), {"data": {**data, **more}})


def test_a_record_is_read_again_for_its_environment_alone() -> None:
    record = replace(RECORD, uid="1-2")
    state = state_of(record, replace(record, environment="staging", uid=""))
    assert state.companions_in("production") == {record.identity: record}
    assert [r.uid for r in state.companions_in("staging").values()] == [""]
    assert replace(RECORD, api="batch/v2").key == RECORD.key


@pytest.mark.parametrize("text", ["5", "{}", '{"api": 5}', '{"kind": "Pod"}', "x" * 9000])
def test_a_record_that_is_not_one_of_its_key_is_dropped(text: str) -> None:
    assert state_of(**{RECORD.key: text}).companions == {}


# === Whose it is ===


class MemoryKubectl:
    """A cluster of objects in a mapping, which knows what was written."""

    def __init__(self, standing: Sequence[Object]) -> None:
        self.objects = {self.key(i): copy.deepcopy(i) for i in standing}
        self.metrics = hook.Metrics()
        self.dry: list[str] = []

    @staticmethod
    def key(item: Object) -> tuple[str, str]:
        """What an object is known by."""
        return (item["kind"], item["metadata"]["name"])

    def read(self, references: Sequence[Object], _namespace: str) -> list[Object]:
        """Return those that are there."""
        keys = map(self.key, references)
        return [copy.deepcopy(self.objects[key]) for key in keys if key in self.objects]

    def write(self, verb: str, items: Sequence[Object], _namespace: str, *options: str) -> None:
        """Create or replace objects."""
        for wanted in items:
            there = self.objects.get(self.key(wanted))
            assert (there is not None) == (verb == "replace")
            meta = {"uid": f"uid-{len(self.objects)}", "resourceVersion": "1"}
            if there:
                meta = {k: there["metadata"][k] for k in ("uid", "resourceVersion")}
                assert wanted["metadata"]["uid"] == meta["uid"]
            if not options:
                changed = {**wanted, "metadata": {**wanted["metadata"], **meta}}
                self.objects[self.key(wanted)] = changed

    def get(self, _resource: str, name: str, _namespace: str) -> Object | None:
        """Return a ConfigMap."""
        return copy.deepcopy(self.objects.get(("ConfigMap", name)))

    def put(self, wanted: Object, current: Object | None, namespace: str) -> None:
        """Create or replace one object."""
        meta = {**wanted["metadata"], **({"uid": current["metadata"]["uid"]} if current else {})}
        verb = "replace" if current else "create"
        self.write(verb, [{**wanted, "metadata": meta}], namespace)

    def plural(self, _api: str, kind: str) -> str:
        """Return the resource of a kind."""
        return f"{kind.lower()}s"

    def delete_exactly(self, _api: str, _resource: str, current: Object, _policy: str) -> None:
        """Delete an object as it was read."""
        there = self.objects.pop(self.key(current))
        assert there["metadata"]["uid"] == current["metadata"]["uid"]


class MemoryState:
    """Records in memory."""

    def __init__(self, records: Sequence[CompanionRecord]) -> None:
        self.state = state_of(*records)

    def recent(self, _app: hook.App) -> AppState:
        """Return them."""
        return self.state

    def write(self, _app: hook.App, *records: CompanionRecord, forget: Sequence[str] = ()) -> None:
        """Write and forget some."""
        self.state.companions.update({r.key: r for r in records})
        for key in forget:
            self.state.companions.pop(key, None)


RUNNING = {"metadata": {"name": "shop", "resourceVersion": "1"}, "spec": {"selector": {"app": "x"}}}


def companions_of(
    cluster: MemoryKubectl,
    state: MemoryState,
    live: Release | None,
    *,
    confirmed: bool = True,
    service: Object | None = None,
) -> Companions:
    """Companions of an app whose live version is a release."""

    class Live:
        """Reads a live Service that never changes."""

        kubectl = cluster
        doors = hook.Doors(
            kubectl=cast(hook.Kubectl, cluster),
            git=cast(hook.Git, None),
            secrets=cast(hook.Secrets, None),
            clock=hook.Clock(),
            reports=hook.Reports(cluster.metrics),
            stop=threading.Event(),
        )
        remembered = hook.Remembered()

        def __init__(self) -> None:
            self.state = state

        def service_of(self, _task: Task, _manifest: Object | None) -> hook.Service | None:
            """Return the Service, None where there is no version."""
            if live is None:
                return hook.Service(service) if service else None
            entry = hook.entry_of(live, "shop", 1.0)
            entry = replace(entry, outcome="deployed" if confirmed else "")
            return hook.Service.from_entry("shop", entry)

        def with_history(self, _task: Task, service: hook.Service | None) -> hook.Service | None:
            """Return the Service where it has a history, as nothing is recorded elsewhere."""
            return service if service and service.history else None

        def release(self, _task: Task, _name: str) -> Release:
            """Return the live release."""
            assert live is not None
            return live

    return Companions(cast(hook.LiveServices, Live()))


def task(**deploy: Any) -> Task:
    """The task of the run."""
    app = app_of(deploy=deploy)
    return Task(app=app, environment="production", namespace="production", run=RUN)


DRAINED = hook.Moment.AFTER_THE_DRAIN
TEXT = st.sampled_from(["gitops-hook", "shop", "other", "companion", "live", "release", "helm"])
FOREIGN = st.fixed_dictionaries({}, optional=dict.fromkeys(LABELS, TEXT)).filter(
    lambda labels: not LABELS.items() <= labels.items()
)
NAMES = st.sampled_from(["x", "x-blue", "x-green", "peers", "night"])
KINDS = st.sampled_from([*APIS, "Service", "ConfigMap", "PersistentVolumeClaim"])


@st.composite
def standing_objects(draw: st.DrawFn, labels: st.SearchStrategy[Any]) -> list[Object]:
    """Some objects of a namespace."""
    chosen = draw(st.lists(st.tuples(KINDS, NAMES), unique=True, max_size=12))
    made = []
    for number, (kind, name) in enumerate(chosen):
        one = item(kind, name, spec={})
        meta = {"uid": f"old-{number}", "resourceVersion": "7", "labels": draw(labels)}
        one["metadata"] |= meta
        made.append(one)
    return made


def everything() -> list[Object]:
    """One companion of each kind."""
    return [scaler(), budget(), cronjob(), peers(), item("ConfigMap", data={"a": "b"})]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(standing=standing_objects(FOREIGN), drained=st.booleans(), confirmed=st.booleans())
def test_an_object_of_another_app_or_without_our_labels_is_never_changed_or_deleted(
    standing: list[Object], *, drained: bool, confirmed: bool
) -> None:
    # as if all of it had been made here before
    records = [CompanionRecord.of("production", one) for one in standing]
    for live in (released(*everything()), released(), None):
        cluster, state = MemoryKubectl(standing), MemoryState(records)
        companions = companions_of(cluster, state, live, confirmed=confirmed)
        companions.follow(task(), DRAINED if drained else hook.Moment.WHEN_IT_IS_CONFIRMED)
        for one in standing:
            assert cluster.objects[cluster.key(one)] == one


def is_somebodys(one: Object) -> bool:
    """Whether another app, an owner or a tool has an object, as its labels say."""
    labels = one["metadata"]["labels"]
    others = "gitops-hook/app" in labels and not labels.items() >= LABELS.items()
    tool = labels.get("app.kubernetes.io/managed-by", "") not in ("", "gitops-hook")
    return others or tool or bool(one["metadata"].get("ownerReferences"))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(standing=standing_objects(FOREIGN), owned=st.booleans())
def test_an_app_that_is_adopted_takes_over_nothing_that_somebody_else_has(
    standing: list[Object], *, owned: bool
) -> None:
    for one in standing:
        one["metadata"] |= {"ownerReferences": [{"kind": "ScaledObject"}]} if owned else {}
    cluster, state = MemoryKubectl(standing), MemoryState([])
    companions = companions_of(cluster, state, None, service=RUNNING)
    version = released(*everything())
    with suppress(hook.StageError):
        companions.require_accepted(task(), version)
        companions.prepare(task(), version)
    for one in filter(is_somebodys, standing):
        assert cluster.objects[cluster.key(one)] == one


def test_only_an_app_that_ran_before_takes_over_what_stands_beside_it() -> None:
    mine = {**cronjob(), "metadata": {"name": "x", "uid": "1", "resourceVersion": "1"}}
    version = released(cronjob())
    for service, accepted in ((RUNNING, True), (None, False)):
        companions = companions_of(MemoryKubectl([mine]), MemoryState([]), None, service=service)
        if accepted:
            companions.require_accepted(task(), version)
        else:
            said = fault(lambda c=companions: c.require_accepted(task(), version))
            assert said[0] is Reason.ADOPTION_REFUSED
    live = companions_of(MemoryKubectl([mine]), MemoryState([]), released())
    assert fault(lambda: live.require_accepted(task(), version))[0] is Reason.ADOPTION_REFUSED


def test_what_is_taken_over_is_kept_as_it_was_through_every_further_try() -> None:
    mine = {**cronjob(), "metadata": {"name": "x", "uid": "1", "resourceVersion": "1"}}
    cluster, state = MemoryKubectl([mine]), MemoryState([])
    companions = companions_of(cluster, state, None, service=RUNNING)
    for schedule in ("1 1 * * *", "2 2 * * *"):
        other = cronjob()
        other["spec"]["schedule"] = schedule
        companions.prepare(task(), released(other))
    entry = hook.HistoryEntry(selector={"app": "x"}, outcome="adopted")
    (kept,) = companions.adoption.given_back(task(), entry) or ()
    assert kept["spec"] == mine["spec"]
    assert kept["metadata"] == {"name": "x", "labels": LABELS}
    assert {r.kind: r.uid for r in state.state.companions.values()} == {"CronJob": "1"}


@pytest.mark.parametrize("stage", ["companion", "adopted"])
def test_what_another_app_has_under_the_name_is_not_taken_for_what_was_adopted(stage: str) -> None:
    mine = {**cronjob(), "metadata": {"name": "x", "uid": "1", "resourceVersion": "1"}}
    labels = {**LABELS, "gitops-hook/app": "evil", "gitops-hook/stage": stage}
    other = item("ConfigMap", "shop-adopted", data={"a": "b"})
    other["metadata"] |= {"uid": "2", "resourceVersion": "1", "labels": labels}
    cluster = MemoryKubectl([mine, other])
    companions = companions_of(cluster, MemoryState([]), None, service=RUNNING)
    reason, said = fault(lambda: companions.prepare(task(), released(cronjob())))
    assert reason is Reason.ADOPTION_REFUSED
    assert said == "ConfigMap shop-adopted belongs to app evil; delete or rename it"
    assert cluster.objects[cluster.key(other)] == other


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(standing=standing_objects(st.just(LABELS)), uids=st.lists(st.booleans(), min_size=12))
def test_what_was_not_made_here_is_never_deleted_and_a_claim_never(
    standing: list[Object], uids: list[bool]
) -> None:
    made = zip(standing, uids, strict=False)
    records = [
        CompanionRecord.of("production", one) if same else replace(
            CompanionRecord.of("production", one), uid="of another"
        )
        for one, same in made
    ]  # fmt: skip
    cluster = MemoryKubectl(standing)
    companions_of(cluster, MemoryState(records), released()).follow(task(), DRAINED)
    for one, same in zip(standing, uids, strict=False):
        stays = not same or one["kind"] == "PersistentVolumeClaim"
        assert (cluster.key(one) in cluster.objects) == stays


def test_a_release_of_before_touches_nothing() -> None:
    made = released(*everything())
    cluster, state = MemoryKubectl([]), MemoryState([RECORD])
    companions_of(cluster, state, made).follow(task())
    before = copy.deepcopy(cluster.objects)
    assert len(before) == len(everything())
    companions_of(cluster, state, replace(released(), companions=None)).follow(task(), DRAINED)
    assert cluster.objects == before


def test_what_follows_is_done_again_without_harm_and_goes_when_a_version_lacks_it() -> None:
    cluster, state = MemoryKubectl([]), MemoryState([RECORD])
    for _ in range(2):
        companions_of(cluster, state, released(*everything())).follow(task())
        assert len(cluster.objects) == len(everything())
        assert all(r.uid for r in state.state.companions.values())
    companions_of(cluster, state, released(cronjob())).follow(task())
    kinds = [kind for kind, _ in cluster.objects]
    assert kinds == ["PodDisruptionBudget", "CronJob"]
    companions_of(cluster, state, released(cronjob())).follow(task(), DRAINED)
    companions_of(cluster, state, None).follow(task(), DRAINED)
    assert (cluster.objects, state.state.companions) == ({}, {})


def test_what_the_settings_leave_to_others_from_now_on_stays() -> None:
    cluster, state = MemoryKubectl([]), MemoryState([RECORD])
    companions_of(cluster, state, released(budget(), cronjob())).follow(task())
    left = task(ignore=["PodDisruptionBudget/x", "CronJob"])
    companions_of(cluster, state, released()).follow(left, DRAINED)
    assert sorted(kind for kind, _ in cluster.objects) == ["CronJob", "PodDisruptionBudget"]


class NoCalls(MemoryKubectl):
    """A cluster of which nothing may be asked."""

    def read(self, references: Sequence[Object], namespace: str) -> list[Object]:
        """Fail."""
        raise AssertionError((references, namespace))


def test_an_app_that_has_nothing_beside_it_costs_no_call() -> None:
    plain = released()
    companions = companions_of(NoCalls([]), MemoryState([]), plain)
    companions.require_accepted(task(), plain)
    companions.prepare(task(), plain)
    with companions.following(task()):
        pass
    assert companions.follow(task(), DRAINED)


class Unreadable(MemoryState):
    """Records that an account may not read."""

    def recent(self, _app: hook.App) -> AppState:
        """Fail as the API server refuses a reader."""
        said = 'Error from server (Forbidden): configmaps "gitops-hook-shop" is forbidden'
        raise hook.KubectlError(["kubectl", "get"], 1, said)


def test_a_plan_goes_on_without_the_records_that_its_caller_may_not_read() -> None:
    companions = companions_of(NoCalls([]), Unreadable([]), released())
    assert hook.companion_lines(companions, task(), released()) == []
    companions = companions_of(MemoryKubectl([]), Unreadable([]), released(cronjob()))
    lines = hook.companion_lines(companions, task(), released(cronjob()))
    assert lines == ["CronJob/x: created when it is confirmed"]


def test_records_that_cannot_be_read_keep_no_live_version_from_being_judged() -> None:
    companions = companions_of(NoCalls([]), Unreadable([]), released())
    with companions.following(task()):
        judged = True
    assert judged


def test_until_a_version_is_confirmed_only_what_goes_with_traffic_changes() -> None:
    cluster, state = MemoryKubectl([]), MemoryState([RECORD])
    live = released(*everything())
    companions_of(cluster, state, live, confirmed=False).follow(task())
    assert sorted(kind for kind, _ in cluster.objects) == [
        "HorizontalPodAutoscaler",
        "PodDisruptionBudget",
        "Service",
    ]


def test_before_the_rollout_is_made_what_scales_nothing_and_starts_nothing() -> None:
    cluster, state = MemoryKubectl([]), MemoryState([])
    companions_of(cluster, state, None).prepare(task(), released(*everything()))
    kinds = sorted(kind for kind, _ in cluster.objects)
    assert kinds == ["ConfigMap", "PodDisruptionBudget", "Service"]
    recorded = {r.kind: bool(r.uid) for r in state.state.companions.values()}
    assert recorded == {
        "ConfigMap": True,
        "PodDisruptionBudget": True,
        "Service": True,
        "CronJob": False,
        "HorizontalPodAutoscaler": False,
    }


def test_a_budget_that_stands_in_the_colour_changes_before_the_rollout_and_a_plan_says_so() -> None:
    cluster, state = MemoryKubectl([]), MemoryState([])
    first, stricter = released(budget()), budget()
    companions = companions_of(cluster, state, first)
    companions.prepare(task(), first)
    stricter["spec"]["minAvailable"] = 2
    second = released(stricter)
    lines = hook.companion_lines(companions, task(), second)
    assert lines == ["PodDisruptionBudget/x-green: changed before the rollout"]
    companions.prepare(task(), second)
    assert cluster.objects["PodDisruptionBudget", "x-green"]["spec"]["minAvailable"] == 2
    assert hook.companion_lines(companions, task(), second) == [
        "PodDisruptionBudget/x-green: unchanged"
    ]


def test_what_is_there_already_is_refused_with_the_way_to_hand_it_over() -> None:
    mine = {**cronjob(), "metadata": {"name": "x", "uid": "1", "resourceVersion": "1"}}
    cluster = MemoryKubectl([mine])
    check = companions_of(cluster, MemoryState([]), None)
    reason, said = fault(lambda: check.require_accepted(task(), released(cronjob())))
    assert reason is Reason.ADOPTION_REFUSED
    assert "kubectl -n production label --overwrite CronJob/x app.kubernetes.io/" in said
    other = copy.deepcopy(mine)
    other["metadata"]["labels"] = {"gitops-hook/app": "cart"}
    check = companions_of(MemoryKubectl([other]), MemoryState([]), None)
    said = fault(lambda: check.require_accepted(task(), released(cronjob())))[1]
    assert said == "CronJob/x belongs to app cart; rename one of the two"


class Refusing(MemoryKubectl):
    """A cluster in which kubectl ends with these words."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__([])
        self.failure = hook.KubectlError(["kubectl"], code, words)

    def write(self, verb: str, items: Sequence[Object], _namespace: str, *options: str) -> None:
        """Fail."""
        raise self.failure


STARTING = 'Error from server (Forbidden): cronjobs.batch "x" is forbidden: User "me" cannot '
STARTING += 'create resource "cronjobs" in API group "batch" in the namespace "production": '
STARTING += 'RBAC: role.rbac.authorization.k8s.io "production-deployer" not found'


@pytest.mark.parametrize(("code", "words"), [(-9, ""), (1, STARTING)], ids=["killed", "starting"])
def test_what_passes_by_itself_is_not_said_against_the_manifests(code: int, words: str) -> None:
    check = companions_of(Refusing(code, words), MemoryState([]), None)
    with pytest.raises(hook.KubectlError):
        check.require_accepted(task(), released(cronjob()))


def test_a_budget_of_both_colours_is_refused() -> None:
    plain = {**budget(), "metadata": {"name": "x", "uid": "1", "resourceVersion": "1"}}
    check = companions_of(MemoryKubectl([plain]), MemoryState([]), None)
    said = fault(lambda: check.require_accepted(task(), released(budget())))[1]
    assert said.startswith("PodDisruptionBudget/x would count the pods of both colours; delete it")


# === What the API server says, and what is written ===


NO_KIND = """error: resource mapping not found for name: "m" namespace: "" from "STDIN": \
no matches for kind "ServiceMonitor" in version "monitoring.coreos.com/v1"
ensure CRDs are installed first
"""
NO_VERB = """Error from server (Forbidden): ingresses.networking.k8s.io "web" is forbidden: \
User "u" cannot get resource "ingresses" in API group "networking.k8s.io" in the namespace "prod"
"""
NONSENSE = """The CronJob "night" is invalid: spec.schedule: Invalid value: "nonsense": \
expected exactly 5 fields, found 1: [nonsense]
"""


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        (NO_KIND, "The cluster has no ServiceMonitor of monitoring.coreos.com/v1."),
        (NO_VERB, "Role production-deployer of namespace prod lacks the verb get for ingresses.n"),
        (NONSENSE, 'The CronJob "night" is invalid: spec.schedule'),
        ("something else\n", "something else"),
    ],
    ids=["kind", "verb", "value", "other"],
)
def test_a_refusal_of_the_cluster_says_what_is_missing(stderr: str, said: str) -> None:
    refused = hook.KubectlError(["kubectl", "create"], 1, stderr)
    (only,) = hook.companion_faults(task(), refused)
    assert only.text.startswith(said)


def test_replacing_keeps_what_others_wrote_and_removes_what_is_not_wanted_any_more() -> None:
    before = item("CronJob", spec={"schedule": "1 * * * *", "timeZone": "UTC"})
    current = hook.with_applied(before, before)
    current["metadata"] |= {"finalizers": ["theirs"], "resourceVersion": "7"}
    current["metadata"]["annotations"]["theirs"] = "1"
    current["spec"] = {**before["spec"], "suspend": True}
    wanted = item("CronJob", spec={"schedule": "2 * * * *"})
    written = hook.replacement(current, wanted)
    assert written["spec"] == {"schedule": "2 * * * *", "suspend": True}
    assert written["metadata"]["finalizers"] == ["theirs"]
    assert written["metadata"]["resourceVersion"] == "7"
    assert written["metadata"]["annotations"]["theirs"] == "1"
    assert hook.applied_last(written) == wanted


def test_a_service_keeps_its_node_ports_and_loses_them_with_its_type() -> None:
    port = {"name": "http", "port": 80}
    before = item("Service", spec={"type": "NodePort", "ports": [port]})
    current = hook.with_applied(before, before)
    live = {"externalTrafficPolicy": "Cluster", "clusterIP": "10.0.0.1"}
    current["spec"] = {**before["spec"], **live, "ports": [{**port, "nodePort": 30000}]}
    same = hook.replacement(current, item("Service", spec={**before["spec"], "a": 1}))
    assert same["spec"]["ports"] == [{"nodePort": 30000, **port}]
    plain = hook.replacement(current, item("Service", spec={"ports": [port]}))
    assert plain["spec"] == {"clusterIP": "10.0.0.1", "ports": [port]}
