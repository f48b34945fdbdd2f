"""The stand-in answers the real kubectl as a real cluster did, call by recorded call."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.standin.api import Api
from tests.standin.cluster import Cluster
from tests.standin.kubectl import Kubectl, Result
from tests.standin.store import Store, copy_json, now
from tests.waiting import eventually

Object = dict[str, Any]
DATA = Path(__file__).parents[2] / "data" / "transcripts.jsonl"
RECORDED: list[Object] = [json.loads(line) for line in DATA.read_text().splitlines()]
PATIENCE = 20.0

# Which recorded calls (by their line in the file, from 0) are replayed, and where.
# Each created Job: the call that created it, then what `get job -o json` said of it.
JOBS = {
    0: 1,
    5: 6,
    9: 10,
    13: 14,
    17: 18,
    21: 22,
    25: 26,
    29: 30,
    33: 34,
    37: 38,
    40: None,
    42: None,
    99: 100,
    102: 104,
    106: 107,
    109: 110,
    146: None,
    150: None,
    154: None,
    158: None,
    162: None,
    165: None,
    168: None,
    171: None,
    175: None,
    179: None,
}
PODS = {0: 2, 5: 7, 13: 15, 21: 23, 25: 27, 29: 31, 99: 101, 106: 108, 109: 111}
PODS |= {146: 147, 150: 151, 154: 155, 158: 159, 162: 163, 165: 166, 168: 169, 171: 172, 175: 177}
LOGS = {5: 8, 13: 16, 21: 24, 25: 28, 29: 32, 0: 3, 146: 148, 150: 152, 154: 156, 158: 160}
DELETED = {146: 149, 150: 153, 154: 157, 158: 161, 162: 164, 165: 167, 168: 170, 171: 173}
DELETED |= {175: 178, 179: 181}
WITHOUT_PODS = (19, 35, 39, 105, 180)
SINGLE = (11, 12, 20, 36, 41, 69, 103)
JOB_LISTS = (4, 43, 44, 45, 46, 47, 48)
CLEANING = (49, 50)
ROLLOUTS = (51, 52, 53, 56, 57, 62, 63, 64, 66, 67, 70, 71, 72, 73, 74, 75, 76)
SERVICE = (54, 55, 58, 59, 61, 77)
ARTICLE_ACCOUNT = (78, 79, 80, 81, 82, 83, 84, 85, 86, 91)
OUTSIDE = (87, 88, 89, 90, 112)
RELEASE = (92, 93, 94, 95, 96, 97, 98, 113, 114)
ENDPOINTS = (123, 125)
SWITCH = (115, 116, 117, 118, 119, 120, 121, 122, 124, 126, 127, 128, 129)
COPIES = (130, 131, 132, 133)
AFTER = (134, 135, 136, 137, 138, 140, 142, 143, 144, 145)
CORDONING = (174, 176)
PATIENCE_CALLS = (182, 183, 184, 185, 186, 187, 188, 189, 190, 225, 226)
COMPANIONS = (191, 192, 193, 194, 195, 196, 197, 199, 200, 201, 202, 203, 204, 205, 206, 207, 224)
WHOLE_SERVICE = (208, 209, 210, 211, 212, 213, 214, 215, 216, 217, 218, 219, 220, 223)
WHOAMI = (221, 222)
COVERED = [
    *JOBS,
    *(at for at in JOBS.values() if at is not None),
    *PODS.values(),
    *LOGS.values(),
    *DELETED.values(),
    *CORDONING,
    *PATIENCE_CALLS,
    *COMPANIONS,
    *WHOLE_SERVICE,
    *WHOAMI,
    *WITHOUT_PODS,
    *SINGLE,
    *JOB_LISTS,
    *CLEANING,
    *ROLLOUTS,
    *SERVICE,
    *ARTICLE_ACCOUNT,
    *OUTSIDE,
    *RELEASE,
    *SWITCH,
    *ENDPOINTS,
    *COPIES,
    *AFTER,
]
_OVER_TIME = "is made by kubelet and controllers: test_scenarios.py replays how it comes about"
NOT_REPLAYED = {
    60: f"the EndpointSlice of two colours {_OVER_TIME} (service-switched)",
    65: f"the pods of a bad image: their status {_OVER_TIME} (deploy-bad-image)",
    68: f"the pods in a crash loop: their status {_OVER_TIME} (deploy-crash-loop)",
    139: f"the pods without their ConfigMap {_OVER_TIME} (deploy-missing-configmap)",
    141: f"the pods whose init container fails {_OVER_TIME} (deploy-init-fails)",
    198: "the numbers of HPA, PDB and rollout are made by controllers, those of HPA not modelled",
}

MASKS = (
    (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "UID"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", "TIME"),
    (r'("resourceVersion":) ?"\d+"', r"\1 VERSION"),
    (r"\b10\.96\.\d+\.\d+\b", "CLUSTER-IP"),
    (r"kube-api-access-\w{5}", "kube-api-access-XXXXX"),
    (r"E\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (\w+\.go):\d+\]", r"KLOG \1]"),
    (r"\b\d+s( +)\d+s\b", "SECONDS SECONDS"),
    (r"(Switched +)\d+s +", r"\1SECONDS "),
    (r'("(?:nodePort|healthCheckNodePort)":) 3[0-2]\d{3}\b', r"\1 NODE-PORT"),
    (r"-[0-9a-f]{7,10}-[a-z0-9]{5}\b", "-HASH-XXXXX"),
    (r"\bshop-[a-z0-9]{5}\b(?!-)", "shop-XXXXX"),
    (r"\b(10\.88|127\.\d+)\.\d+\.\d+\b", "POD-IP"),
)


def masked(text: str) -> str:
    for pattern, instead in MASKS:
        text = re.sub(pattern, instead, text)
    return text


def go_json(value: Any) -> str:
    """JSON as kubectl prints it."""
    text = json.dumps(value, indent=4, ensure_ascii=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f"{text}\n"


def recorded_output(at: int) -> str:
    entry = RECORDED[at]
    return go_json(entry["json"]) if "json" in entry else entry.get("stdout", "")


def without_openshift(text: str) -> str:
    """The recorded cluster carried a ConfigMap of OpenShift in its tokens; none here does."""
    value = json.loads(text)
    for pod in value["items"]:
        for volume in pod["spec"].get("volumes", ()):
            sources = (volume.get("projected") or {}).get("sources", [])
            sources[:] = [
                item
                for item in sources
                if item.get("configMap", {}).get("name") != "openshift-service-ca.crt"
            ]
    return go_json(value)


class Stage:
    """A store behind an API server, a kubectl, and the recorded calls to replay on them."""

    def __init__(self, directory: Path, store: Store, api: Api) -> None:
        self.store = store
        self.api = api
        self.kubectl = Kubectl(directory, api.kubeconfig(directory / "kubeconfig"))
        self.replayed: set[int] = set()

    def call(self, at: int, swap: dict[str, str] | None = None) -> Result:
        entry = RECORDED[at]
        argv, stdin = list(entry["argv"][1:]), entry.get("stdin")
        for old, new in (swap or {}).items():
            found = any(old in word for word in argv) or old in (stdin or "")
            assert found, f"call {at} has no {old!r} to swap"
            argv = [word.replace(old, new) for word in argv]
            stdin = stdin.replace(old, new) if stdin else stdin
        return self.kubectl.run(*argv, stdin=stdin)

    def compare(
        self,
        at: int,
        got: Result,
        swap: dict[str, str] | None = None,
        tidy: Callable[[str], str] = str,
    ) -> None:
        entry = RECORDED[at]
        out, err = got.out, got.err
        for old, new in (swap or {}).items():
            out, err = out.replace(new, old), err.replace(new, old)
        wanted = recorded_output(at)
        title = f"call {at} ({entry['note']}): {' '.join(entry['argv'])}"
        assert masked(err) == masked(entry.get("stderr", "")), title
        assert masked(tidy(out)) == masked(tidy(wanted)), title
        assert got.code == entry["exit"], title
        self.replayed.add(at)

    def replay(
        self,
        at: int,
        swap: dict[str, str] | None = None,
        tidy: Callable[[str], str] = str,
    ) -> None:
        self.compare(at, self.call(at, swap), swap, tidy)

    def status(self, resource: str, name: str, status: Object, namespace: str = "test") -> None:
        def change(obj: Object) -> None:
            obj["status"] = copy_json(status)

        self.store.update_status(resource, namespace, name, change)

    def version(self, resource: str, name: str, namespace: str = "production") -> str:
        found = self.store.get(resource, namespace, name)["metadata"]["resourceVersion"]
        return str(found)

    def add_pod(self, recorded: Object, owner: Object | None = None) -> Object:
        """The pod that a controller made of its template, with the recorded name and status."""
        template = copy_json((owner or {}).get("spec", {}).get("template") or recorded)
        old = recorded["metadata"]
        kept = ("generateName", "name", "namespace", "finalizers", "ownerReferences")
        meta = {key: old[key] for key in kept if key in old}
        meta["labels"] = template["metadata"].get("labels", {})
        self.store.create("pods", {"metadata": meta, "spec": template["spec"]})

        def run(pod: Object) -> None:
            if "nodeName" in recorded["spec"]:
                pod["spec"]["nodeName"] = recorded["spec"]["nodeName"]
            pod["status"] = copy_json(recorded["status"])

        return self.store.update_status("pods", old["namespace"], old["name"], run)

    def rolled(self, name: str, **numbers: int | str) -> None:
        """Give a Deployment a status that has seen its latest spec."""
        obj = self.store.get("deployments", "production", name)
        reason = numbers.pop("reason", "ReplicaSetUpdated")
        seen = int(numbers.pop("seen", obj["metadata"]["generation"]))
        progressing = {
            "type": "Progressing",
            "status": "False" if reason == "ProgressDeadlineExceeded" else "True",
            "reason": reason,
            "lastUpdateTime": now(),
            "lastTransitionTime": now(),
        }
        status = {**numbers, "observedGeneration": seen, "conditions": [progressing]}
        self.status("deployments", name, status, "production")

    def rollout(self, at: int, name: str, steps: list[Object], swap: dict[str, str]) -> None:
        """Replay `rollout status`: after each line that it prints the Deployment gets further."""
        self.rolled(name, **steps[0])
        argv = list(RECORDED[at]["argv"][1:])
        for old, new in swap.items():
            argv = [word.replace(old, new) for word in argv]
        process = self.kubectl.start(*argv)
        assert process.stdout is not None
        lines = []
        try:
            for number, line in enumerate(process.stdout):
                lines.append(line)
                if number + 1 < len(steps):
                    self.rolled(name, **steps[number + 1])
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
            process.wait()
        self.compare(at, Result(process.returncode, "".join(lines), err))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    store = Store()
    for name in ("test", "production", "orchestration"):
        store.create("namespaces", {"metadata": {"name": name}})
    with Api(store) as api:
        yield Stage(tmp_path, store, api)


def switched(store: Store, at: int) -> bool:
    """Whether the endpoints of the shop are of the colour that was recorded, all of them."""
    slices = store.list("endpointslices", "production")
    wanted = RECORDED[at]["json"]["items"]
    return targets(slices) == targets(wanted)


def targets(slices: list[Object]) -> list[tuple[str, bool]]:
    found = [end for item in slices for end in item["endpoints"] or ()]
    colours = [end["targetRef"]["name"].rsplit("-", 2)[0] for end in found]
    return [(name, end["conditions"]["ready"]) for name, end in zip(colours, found, strict=True)]


def job_name(at: int) -> str:
    return str(json.loads(RECORDED[at]["stdin"])["metadata"]["name"])


def replicas(updated: int, available: int, total: int = 2, **more: int | str) -> Object:
    """The numbers of a Deployment that are not zero."""
    numbers = {
        "replicas": total,
        "updatedReplicas": updated,
        "readyReplicas": available,
        "availableReplicas": available,
    }
    return {**{key: value for key, value in numbers.items() if value}, **more}


def test_every_recorded_call_is_replayed_or_listed_with_its_reason() -> None:
    assert sorted({*COVERED, *NOT_REPLAYED}) == list(range(len(RECORDED)))
    assert len(COVERED) == len(set(COVERED))
    assert not set(COVERED) & set(NOT_REPLAYED)
    failed = {at for at, entry in enumerate(RECORDED) if entry["exit"]}
    assert failed <= set(COVERED)
    for at, reason in NOT_REPLAYED.items():
        assert RECORDED[at]["argv"][3] == "get", f"{at} may not be left out: {reason}"


@pytest.mark.parametrize("at", JOBS, ids=job_name)
def test_a_created_job_and_its_pod_look_as_they_were_recorded(stage: Stage, at: int) -> None:
    stage.replay(at)
    seen, pods = JOBS[at], PODS.get(at)
    if seen is not None:
        stage.status("jobs", job_name(at), RECORDED[seen]["json"]["status"])
        stage.replay(seen)
    if pods is not None:
        job = stage.store.get("jobs", "test", job_name(at))
        stage.add_pod(RECORDED[pods]["json"]["items"][0], job)
        stage.replay(pods, tidy=without_openshift)
    if at in LOGS:
        text = RECORDED[LOGS[at]].get("stdout", "").encode()
        stage.api.log_source = lambda *_: text
        stage.replay(LOGS[at])
    if at in DELETED:
        stage.replay(DELETED[at])
    assert stage.replayed == {at, seen, pods, LOGS.get(at), DELETED.get(at)} - {None}


def test_no_pods_are_an_empty_list(stage: Stage) -> None:
    for at in WITHOUT_PODS:
        stage.replay(at)


def test_of_three_pods_kubectl_shows_the_log_of_the_recorded_one(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.replay(9)
    job = stage.store.get("jobs", "test", "test-retry")
    for pod in RECORDED[11]["json"]["items"]:
        created = pod["metadata"]["creationTimestamp"]
        monkeypatch.setattr("tests.standin.store.now", lambda _=0.0, at=created: at)
        stage.add_pod(pod, job)
    stage.api.log_source = lambda *_: b""
    stage.replay(11, tidy=without_openshift)
    stage.replay(12)


def test_logs_of_a_job_without_pods_time_out(stage: Stage) -> None:
    stage.replay(17)
    stage.replay(20, {"--tail=50": "--pod-running-timeout=1s"})


def test_the_quota_shows_what_is_used(stage: Stage) -> None:
    annotations = RECORDED[36]["json"]["metadata"]["annotations"]
    quota = annotations["kubectl.kubernetes.io/last-applied-configuration"]
    assert stage.kubectl.run("apply", "-f", "-", stdin=quota).code == 0
    stage.add_pod(RECORDED[27]["json"]["items"][0])
    stage.replay(36)


def test_a_job_is_deleted_without_waiting(stage: Stage) -> None:
    stage.replay(40)
    stage.replay(41)


def test_logs_of_several_pods_carry_their_names(stage: Stage) -> None:
    lines = RECORDED[69]["stdout"].splitlines(keepends=True)
    for pod in RECORDED[68]["json"]["items"]:
        stage.add_pod(pod)

    def source(_: str, pod: str, container: str, *__: object) -> bytes:
        start = f"[pod/{pod}/{container}] "
        return "".join(line.removeprefix(start) for line in lines if start in line).encode()

    stage.api.log_source = source
    # kubectl asks for the logs of a selector in an order of its own making.
    stage.replay(69, tidy=lambda text: "".join(sorted(text.splitlines(keepends=True))))


def test_a_pod_is_evicted_through_its_subresource(stage: Stage) -> None:
    pod = copy_json(RECORDED[101]["json"]["items"][0])
    pod["metadata"] |= {"name": "test-evict-bm52q", "generateName": "test-evict-"}
    pod["status"]["phase"] = "Running"
    stage.add_pod(pod)
    stage.replay(103)
    left = stage.store.get("pods", "test", "test-evict-bm52q")
    assert left["metadata"]["deletionTimestamp"]
    disrupted = [item.get("reason") for item in left["status"]["conditions"]]
    assert "EvictionByEvictionAPI" in disrupted


def test_lists_of_jobs_are_created_patched_and_deleted_as_recorded(stage: Stage) -> None:
    for at in (0, 5, 9, 13, 17, 21, 25, 29, 33, 37):
        stage.replay(at)
    for at in (4, 43, 44):
        stage.replay(at)
    patched = stage.store.get("jobs", "test", "test-ok")
    assert patched["spec"]["ttlSecondsAfterFinished"] == 60
    assert patched["metadata"]["annotations"] == {"gitops-hook/result": "done"}
    stage.store.delete("jobs", "test", "test-ok")
    for name in ("test-big", "test-l1", "test-l2"):
        stage.status("jobs", name, {"succeeded": 1})
    for at in (45, 46, 47, 48):
        stage.replay(at)
    assert stage.store.list("jobs") == []
    assert stage.replayed >= set(JOB_LISTS)


def test_everything_of_a_kind_is_deleted(stage: Stage) -> None:
    blue = json.loads(RECORDED[51]["stdin"])
    blue["metadata"]["name"] = "green-deployment"
    stage.store.create("deployments", blue)
    stage.store.create("services", json.loads(RECORDED[54]["stdin"]))
    for at in CLEANING:
        stage.replay(at)


def add_replicasets(stage: Stage, *templates: Object) -> None:
    """What the Deployment controller has left behind: a ReplicaSet for each revision."""
    owner = stage.store.get("deployments", "production", "my-app-blue")
    for revision, template in enumerate(templates, start=1):
        labels = template["metadata"]["labels"] | {"pod-template-hash": f"hash{revision}"}
        reference = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "name": "my-app-blue",
            "uid": owner["metadata"]["uid"],
            "controller": True,
        }
        meta = {
            "name": f"my-app-blue-hash{revision}",
            "namespace": "production",
            "labels": labels,
            "annotations": {"deployment.kubernetes.io/revision": str(revision)},
            "ownerReferences": [reference],
        }
        spec = {
            "replicas": 0,
            "selector": {"matchLabels": labels},
            "template": {**copy_json(template), "metadata": {"labels": labels}},
        }
        stage.store.create("replicasets", {"metadata": meta, "spec": spec})


def test_deployments_are_applied_and_rolled_out_as_recorded(stage: Stage) -> None:
    exceeded = {"reason": "ProgressDeadlineExceeded"}
    growing = [replicas(2, 0), replicas(2, 1), replicas(2, 2)]
    blue = "my-app-blue"
    stage.replay(51)
    first = stage.store.get("deployments", "production", blue)
    stage.rollout(52, blue, growing, {})
    stage.replay(53)
    assert stage.store.get("deployments", "production", blue)["metadata"]["generation"] == 1
    stage.replay(56)
    stage.rollout(57, "my-app-green", growing, {})
    stage.replay(62)
    stuck = replicas(1, 2, total=3)
    stage.rollout(63, blue, [stuck], {"15s": "1s"})
    stage.rollout(64, blue, [stuck, {**stuck, **exceeded}], {})
    stage.replay(66)
    begun = replicas(0, 2)
    steps = [
        {**stuck, "seen": 2},
        begun,
        {**begun, "readyReplicas": 1},
        stuck,
        {**stuck, "readyReplicas": 1},
    ]
    stage.rollout(67, blue, [*steps, {**stuck, **exceeded}], {})
    stage.replay(70)
    stage.rollout(71, blue, [stuck, {**stuck, "readyReplicas": 1}, {**stuck, **exceeded}], {})
    last = stage.store.get("deployments", "production", blue)
    add_replicasets(stage, first["spec"]["template"], last["spec"]["template"])
    stage.replay(72)
    undone = stage.store.get("deployments", "production", blue)
    assert undone["spec"]["template"] == first["spec"]["template"]
    stage.replay(73)
    stage.rollout(74, blue, [{}], {})
    stage.replay(75)
    stage.replay(76)
    assert stage.replayed == set(ROLLOUTS)


def test_a_service_is_applied_and_patched_as_recorded(stage: Stage) -> None:
    for at in SERVICE:
        stage.replay(at)


def allow(store: Store, namespace: str, role: str, rules: list[Object]) -> None:
    account = {"kind": "ServiceAccount", "name": "orchestration-sa", "namespace": "orchestration"}
    meta = {"name": role, "namespace": namespace}
    store.create("roles", {"metadata": meta, "rules": rules})
    reference = {"kind": "Role", "name": role, "apiGroup": "rbac.authorization.k8s.io"}
    binding = {"metadata": meta, "roleRef": reference, "subjects": [account]}
    store.create("rolebindings", binding)


def test_the_article_s_account_may_and_may_not_do_what_was_recorded(stage: Stage) -> None:
    jobs = {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "delete", "list"]}
    allow(stage.store, "test", "test-job-manager", [jobs])
    apps = {"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["get", "patch", "list"]}
    core = {"apiGroups": [""], "resources": ["services", "configmaps"], "verbs": ["get", "list"]}
    allow(stage.store, "production", "production-deployer", [apps, core])
    stage.store.create("deployments", json.loads(RECORDED[56]["stdin"]))
    stage.rolled("my-app-green", **replicas(2, 2))
    stage.store.create("services", json.loads(RECORDED[54]["stdin"]))
    stage.replay(78)
    stage.status("jobs", "test-as", {"startTime": now(), "active": 1})
    for at in range(79, 87):
        stage.replay(at)
    stage.replay(91)
    assert stage.replayed == set(ARTICLE_ACCOUNT)


def test_what_kubectl_says_without_or_outside_of_the_cluster(stage: Stage) -> None:
    stage.replay(87)
    assert stage.kubectl.run("get", "jobs").code == 0, (
        "the recorded call found the discovery cached"
    )
    stage.replay(88, {"https://127.0.0.1:6443": stage.api.url})
    stage.replay(89)
    stage.replay(90)
    stage.replay(112)


def test_suspended_jobs_are_released_listed_and_deleted_as_recorded(stage: Stage) -> None:
    for at in (92, 93):
        stage.replay(at)
    stage.status("jobs", "test-susp", RECORDED[94]["json"]["status"])
    job = stage.store.get("jobs", "test", "test-susp")
    stage.add_pod(RECORDED[95]["json"]["items"][0], job)
    stage.replay(94)
    stage.replay(95, tidy=without_openshift)
    for at in (96, 97, 98):
        stage.replay(at)
    assert [item["spec"]["suspend"] for item in stage.store.list("jobs", "test")] == [False] * 3
    for at in (99, 102, 106, 109):
        stage.replay(at)
    stage.replay(113, {"=3s": "=1s"})
    stage.replay(114)
    assert stage.replayed >= set(RELEASE)


def test_traffic_is_switched_as_recorded(stage: Stage) -> None:
    growing = [replicas(2, 0), replicas(2, 1), replicas(2, 2)]
    stage.replay(115)
    stage.rollout(116, "shop-blue", [replicas(0, 0, total=0), *growing], {})
    stage.replay(117)
    created = stage.version("services", "shop")
    stage.replay(118)
    stage.rollout(119, "shop-green", growing, {})
    stage.replay(120)
    stage.replay(121, {"7725": created})
    stage.replay(122, {"7764": stage.version("services", "shop")})
    stage.replay(124, {"7765": stage.version("services", "shop")})
    stage.replay(126)
    merged = stage.store.get("services", "production", "shop")["spec"]["selector"]
    assert merged == {
        "app": "shop",
        "gitops-hook/app": "shop",
        "gitops-hook/run": "r9",
        "version": "blue",
    }
    for at in (127, 128, 129):
        stage.replay(at)
    assert stage.replayed == set(SWITCH)


def test_endpoints_follow_a_switch_as_recorded(tmp_path: Path) -> None:
    with Cluster(tmp_path, speed=10) as cluster:
        cluster.store.create("namespaces", {"metadata": {"name": "production"}})
        stage = Stage(tmp_path, cluster.store, cluster.api)
        for at, name in ((115, "shop-blue"), (118, "shop-green")):
            stage.replay(at)
            stage.kubectl.run("-n", "production", "rollout", "status", f"deployment/{name}")
        stage.replay(117)
        blue = [("shop-blue", True)] * 2
        eventually(lambda: targets(cluster.store.list("endpointslices")) == blue)
        for switch, stale, seen in ((122, "7764", 123), (124, "7765", 125)):
            stage.replay(switch, {stale: stage.version("services", "shop")})
            eventually(
                lambda at=seen: switched(cluster.store, at), what=f"endpoints of call {seen}"
            )
            stage.replay(seen)


def test_an_immutable_copy_stays_what_it_is(stage: Stage) -> None:
    for at in COPIES:
        stage.replay(at)


def test_scaling_restarting_and_node_ports_go_as_recorded(stage: Stage) -> None:
    for at in (115, 118, 117):
        stage.replay(at)
    stage.replay(134)
    stage.replay(135)
    wanted = stage.store.get("deployments", "production", "shop-green")["spec"]["replicas"]
    assert wanted == 2
    stage.replay(136)
    begun = [replicas(1, 2, total=3, readyReplicas=ready) for ready in (3, 2, 3, 2)]
    ending = [replicas(2, 2, total=3, readyReplicas=ready) for ready in (3, 2)]
    stage.rollout(137, "shop-green", [*begun, *ending, replicas(2, 2)], {})
    for at in (138, 140, 142, 143):
        stage.replay(at)
    node_port = stage.store.get("services", "production", "np")["spec"]["ports"][0]["nodePort"]
    stage.replay(144, {"30741": str(node_port)})
    stage.replay(145)
    assert stage.replayed >= set(AFTER)


def test_a_node_is_cordoned_and_opened_as_recorded(tmp_path: Path) -> None:
    with Cluster(tmp_path, speed=10) as cluster:
        cluster.store.create("namespaces", {"metadata": {"name": "test"}})
        cluster.images.base("registry.test:5000/python:*")
        stage = Stage(tmp_path, cluster.store, cluster.api)
        stage.replay(174)
        node = cluster.store.get("nodes", None, "vm")
        assert node["spec"]["unschedulable"]
        stage.replay(175)
        eventually(lambda: why_unscheduled(cluster.store) == "1 node(s) were unschedulable")
        taints = cluster.store.get("nodes", None, "vm")["spec"]["taints"]
        assert [item["key"] for item in taints] == ["node.kubernetes.io/unschedulable"]
        stage.replay(176)
        eventually(lambda: cluster.store.get("jobs", "test", "svc-node")["status"].get("succeeded"))
        assert "taints" not in cluster.store.get("nodes", None, "vm")["spec"]


def why_unscheduled(store: Store) -> str:
    """The first reason of the scheduler, if it has refused a pod."""
    messages = [
        item.get("message", "")
        for pod in store.list("pods", "test")
        for item in pod["status"].get("conditions") or ()
        if item["type"] == "PodScheduled"
    ]
    return "".join(text.split(": ", 1)[-1].split(". ")[0] for text in messages)


def test_deployments_that_wait_are_rolled_out_as_recorded(stage: Stage) -> None:
    steps = [replicas(1, 0, total=1), replicas(1, 1, total=1)]
    stage.replay(182)
    stage.rollout(183, "late", steps, {})
    stage.replay(184)
    stage.replay(186)
    for at in (187, 188):
        stage.replay(at)
    stage.rollout(189, "tls", steps[1:], {})
    stage.replay(190)
    stage.replay(225)
    stage.rollout(226, "away", steps, {})
    stage.replay(185)
    assert stage.replayed == set(PATIENCE_CALLS)


def test_companions_are_applied_changed_and_pruned_as_recorded(stage: Stage) -> None:
    for at in (191, 192, 193, 194):
        stage.replay(at)
    steps = [replicas(1, 0, total=1), replicas(1, 1, total=1)]
    stage.rollout(195, "worker", steps, {})
    for at in (196, 197, 199):
        stage.replay(at)
    for resource, at in (("poddisruptionbudgets", 200), ("horizontalpodautoscalers", 201)):
        stage.status(resource, "web", RECORDED[at]["json"]["status"], "production")
        stage.replay(at)
    for at in (202, 203, 204, 205):
        stage.replay(at)
    stored = RECORDED[206]["json"]

    def roll(obj: Object) -> None:
        obj["metadata"]["annotations"] = copy_json(stored["metadata"]["annotations"])
        obj["status"] = copy_json(stored["status"])

    stage.store.update_status("deployments", "production", "sp", roll)
    stage.replay(206)
    stage.replay(207)
    stage.replay(224)
    assert stage.replayed == set(COMPANIONS)


def test_a_whole_service_is_patched_as_recorded(stage: Stage) -> None:
    stage.replay(208)
    addresses = ("10.88.0.182", "10.88.0.183")
    stage.store.create(
        "endpointslices",
        {
            "metadata": {
                "name": "full-x",
                "namespace": "production",
                "labels": {"kubernetes.io/service-name": "full"},
            },
            "addressType": "IPv4",
            "endpoints": [
                {"addresses": [item], "conditions": {"ready": True}} for item in addresses
            ],
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        },
    )
    stale = {209: "12291", 210: "12297", 211: "12303", 212: "12307", 213: "12307"}
    for at, version in stale.items():
        stage.compare(at, stage.call(at, {version: stage.version("services", "full")}))
    ports = stage.store.get("services", "production", "full")["spec"]["ports"]
    assert [item["nodePort"] for item in ports] == [30999]
    stage.replay(214)
    for at in (215, 216):
        stage.compare(at, stage.call(at, {"12311": stage.version("services", "full")}))
    uid = stage.store.get("services", "production", "full")["metadata"]["uid"]
    swap = {"3975f0b4-9e44-4b1b-aab3-1c4c5b1e1ee7": uid, "2026-11-29T19:06:06Z": now()}
    for at in (217, 218):
        stage.replay(at, swap)
    for at in (219, 220, 223):
        stage.replay(at)
    assert stage.replayed == set(WHOLE_SERVICE)


def test_the_cluster_names_who_asks_as_recorded(stage: Stage) -> None:
    for at in WHOAMI:
        stage.replay(at)
