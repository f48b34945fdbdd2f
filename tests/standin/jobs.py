"""The Job controller."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from tests.standin.clock import Clock
from tests.standin.errors import ApiError
from tests.standin.owned import is_deleted, is_finished, is_ready, owned, phase, pod_from
from tests.standin.store import Store, copy_json, now

Object = dict[str, Any]
TRACKING = "batch.kubernetes.io/job-tracking"
COMPONENT = "job-controller"
FIRST_RETRY = 10.0
LONGEST_RETRY = 360.0
FIRST_CREATE_RETRY = 1.0
LONGEST_CREATE_RETRY = 60.0
SUSPENDED = ("Suspended", "Job suspended")
RESUMED = ("Resumed", "Job resumed")


@dataclass
class Memory:
    """What the controller remembers of a Job besides its status."""

    started: float = 0.0
    failures: int = 0
    last_failure: float = 0.0
    create_retry: float = 0.0
    create_after: float = 0.0
    event: tuple[str, str, str] | None = None


@dataclass
class Pods:
    """A Job's pods, sorted by what they mean for it."""

    active: list[Object] = field(default_factory=list)
    terminating: list[Object] = field(default_factory=list)
    succeeded: list[Object] = field(default_factory=list)
    failed: list[Object] = field(default_factory=list)
    ignored: list[Object] = field(default_factory=list)


class JobController:
    """Makes the pods of Jobs and keeps their status."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._memories: dict[str, Memory] = {}

    def forget(self, uid: str) -> None:
        """The Job is gone."""
        self._memories.pop(uid, None)

    def reconcile(self, namespace: str, name: str) -> float | None:
        """Bring the Job one step on; when to look again."""
        stored = self._store.find_stored("jobs", namespace, name)
        if stored is None:
            self._release_orphans(namespace, name)
            return None
        job = stored.object
        pods = owned(self._store, job, "pods")
        if is_deleted(job) or _has(job, "Complete") or _has(job, "Failed"):
            for pod in pods:
                self._release(pod)
            return None
        return _Sync(self._store, self._clock, self._memory(job), job).run(pods)

    def _memory(self, job: Object) -> Memory:
        return self._memories.setdefault(job["metadata"]["uid"], Memory())

    def _release_orphans(self, namespace: str, name: str) -> None:
        for stored in self._store.snapshot("pods", namespace)[0]:
            labels = stored.object["metadata"].get("labels") or {}
            if labels.get("batch.kubernetes.io/job-name") == name:
                self._release(stored.object)

    def _release(self, pod: Object) -> None:
        release(self._store, pod)


def release(store: Store, pod: Object) -> None:
    """Take the tracking finalizer off a pod."""
    meta = pod["metadata"]
    if TRACKING not in meta.get("finalizers", ()):
        return

    def change(stored: Object) -> None:
        left = [item for item in stored["metadata"].get("finalizers", []) if item != TRACKING]
        stored["metadata"]["finalizers"] = left
        if not left:
            del stored["metadata"]["finalizers"]

    store.update_status("pods", meta["namespace"], meta["name"], change)


class _Sync:
    """One look at one Job."""

    def __init__(self, store: Store, clock: Clock, memory: Memory, job: Object) -> None:
        self.store = store
        self.clock = clock
        self.memory = memory
        self.job = job
        self.spec = job["spec"]
        self.name = job["metadata"]["name"]
        self.namespace = job["metadata"]["namespace"]
        self.status: Object = copy_json(job.get("status") or {})
        self.again: list[float] = []
        self.policy: str | None = None
        self.resumed = False

    def run(self, all_pods: list[Object]) -> float | None:
        pods = self._sort(all_pods)
        suspended = bool(self.spec.get("suspend"))
        self._begin(suspended)
        if not self._target():
            self._judge(pods)
        if self._target():
            self._delete_active(pods, tell=self._target() == "FailureTarget")
        elif suspended:
            self._delete_active(pods, tell=True)
        else:
            self._manage(pods)
        self._count(pods)
        return min(self.again) if self.again else None

    def _sort(self, all_pods: list[Object]) -> Pods:
        pods = Pods()
        only_failed = self.spec.get("podReplacementPolicy") == "Failed"
        for pod in all_pods:
            gone = is_deleted(pod)
            if not is_finished(pod):
                (pods.terminating if gone else pods.active).append(pod)
            if TRACKING not in pod["metadata"].get("finalizers", ()):
                continue
            if phase(pod) == "Succeeded":
                pods.succeeded.append(pod)
            elif phase(pod) == "Failed" or (gone and not only_failed):
                (pods.ignored if self._is_ignored(pod) else pods.failed).append(pod)
        return pods

    def _is_ignored(self, pod: Object) -> bool:
        """Apply the podFailurePolicy: the first rule that matches decides."""
        if phase(pod) != "Failed":
            return False
        for index, rule in enumerate((self.spec.get("podFailurePolicy") or {}).get("rules") or []):
            if text := _match(rule, index, pod):
                if rule["action"] == "FailJob":
                    self.policy = text
                return bool(rule["action"] == "Ignore")
        return False

    def _begin(self, suspended: bool) -> None:
        self.status.setdefault("ready", 0)
        self.status.setdefault("terminating", 0)
        self.status.setdefault("uncountedTerminatedPods", {})
        was = _has(self.job, "Suspended")
        if suspended and not was:
            self.status.pop("startTime", None)
            self._set("Suspended", "JobSuspended", "Job suspended")
            self._tell("Normal", *SUSPENDED)
        elif not suspended:
            if was:
                self._set("Suspended", "JobResumed", "Job resumed", "False")
                self.resumed = True
                self.memory.started = 0.0
            self.status.setdefault("startTime", now())
            self.memory.started = self.memory.started or time.monotonic()

    def _judge(self, pods: Pods) -> None:
        """Set the condition that decides how the Job ends, if it is decided."""
        failed = self.status.get("failed", 0) + len(pods.failed) + self._restarts(pods)
        succeeded = self.status.get("succeeded", 0) + len(pods.succeeded)
        deadline = self.spec.get("activeDeadlineSeconds")
        left = None
        if deadline is not None and self.memory.started and not self.spec.get("suspend"):
            left = self.memory.started + self.clock.real(deadline) - time.monotonic()
        if self.policy:
            self._fail("PodFailurePolicy", self.policy)
        elif failed > self.spec.get("backoffLimit", 6):
            self._fail("BackoffLimitExceeded", "Job has reached the specified backoff limit")
        elif left is not None and left <= 0:
            self._fail("DeadlineExceeded", "Job was active longer than specified deadline")
        elif succeeded >= self.spec.get("completions", 1):
            text = "Reached expected number of succeeded pods"
            self._set("SuccessCriteriaMet", "CompletionsReached", text)
        elif left is not None:
            self.again.append(left)

    def _restarts(self, pods: Pods) -> int:
        if self.spec["template"]["spec"].get("restartPolicy") != "OnFailure":
            return 0
        return sum(
            status["restartCount"]
            for pod in pods.active
            for status in pod.get("status", {}).get("containerStatuses") or []
        )

    def _fail(self, reason: str, text: str) -> None:
        self._set("FailureTarget", reason, text)

    def _delete_active(self, pods: Pods, *, tell: bool) -> None:
        for pod in pods.active:
            name = pod["metadata"]["name"]
            self.store.delete("pods", self.namespace, name)
            if tell:
                self._tell("Normal", "SuccessfulDelete", f"Deleted pod: {name}")
            if self.spec.get("podReplacementPolicy") != "Failed" and self._target():
                pods.failed.append(pod)
        pods.terminating += pods.active
        pods.active = []

    def _manage(self, pods: Pods) -> None:
        succeeded = self.status.get("succeeded", 0) + len(pods.succeeded)
        wanted = min(self.spec.get("parallelism", 1), self.spec.get("completions", 1) - succeeded)
        there = len(pods.active)
        if self.spec.get("podReplacementPolicy") == "Failed":
            there += len(pods.terminating)
        if pods.failed:
            self.memory.failures += len(pods.failed)
            self.memory.last_failure = time.monotonic()
        for _ in range(there, wanted):
            wait = self._create_wait()
            if wait > 0:
                self.again.append(wait)
                return
            if not self._create(pods):
                return

    def _create_wait(self) -> float:
        earliest = self.memory.create_after
        if self.memory.failures:
            seconds = min(FIRST_RETRY * 2 ** (self.memory.failures - 1), LONGEST_RETRY)
            earliest = max(earliest, self.memory.last_failure + self.clock.real(seconds))
        return earliest - time.monotonic()

    def _create(self, pods: Pods) -> bool:
        pod = pod_from(self.job, self.spec["template"], finalizers=[TRACKING])
        try:
            created = self.store.create("pods", pod)
        except ApiError as error:
            self._tell("Warning", "FailedCreate", f"Error creating: {error.message}")
            retry = self.memory.create_retry or FIRST_CREATE_RETRY
            self.memory.create_retry = min(retry * 2, LONGEST_CREATE_RETRY)
            self.memory.create_after = time.monotonic() + self.clock.real(retry)
            self.again.append(self.clock.real(retry))
            return False
        self.memory.create_retry = 0.0
        pods.active.append(created)
        self._tell("Normal", "SuccessfulCreate", f"Created pod: {created['metadata']['name']}")
        return True

    def _count(self, pods: Pods) -> None:
        """Note ended pods, let them go, then count them: each step is visible."""
        self._numbers(pods)
        uncounted = {
            kind: [pod["metadata"]["uid"] for pod in items]
            for kind, items in (("failed", pods.failed), ("succeeded", pods.succeeded))
            if items
        }
        self.status["uncountedTerminatedPods"] = uncounted
        self._write()
        if self.resumed:
            self._tell("Normal", *RESUMED)
        for pod in pods.failed + pods.succeeded + pods.ignored:
            try:
                release(self.store, pod)
            except ApiError:
                # Deleted and gone meanwhile; it counts all the same.
                continue
        self.status["uncountedTerminatedPods"] = {}
        for kind, items in (("failed", pods.failed), ("succeeded", pods.succeeded)):
            if items:
                self.status[kind] = self.status.get(kind, 0) + len(items)
        self._end(pods)
        self._write()
        if self.memory.event is not None:
            self._tell(*self.memory.event)
            self.memory.event = None

    def _numbers(self, pods: Pods) -> None:
        self.status.pop("active", None)
        if pods.active:
            self.status["active"] = len(pods.active)
        self.status["ready"] = sum(is_ready(pod) for pod in pods.active)
        self.status["terminating"] = len(pods.terminating)

    def _end(self, pods: Pods) -> None:
        """Add the last condition once no pod is ending any more."""
        target = self._target()
        if not target or pods.terminating:
            return
        cause = next(item for item in self.status["conditions"] if item["type"] == target)
        if target == "SuccessCriteriaMet":
            self._set("Complete", cause["reason"], cause["message"])
            self.status["completionTime"] = now()
            self.memory.event = ("Normal", "Completed", "Job completed")
        else:
            self._set("Failed", cause["reason"], cause["message"])
            self.memory.event = ("Warning", cause["reason"], cause["message"])

    def _target(self) -> str:
        for item in self.status.get("conditions") or []:
            if item["type"] in ("FailureTarget", "SuccessCriteriaMet"):
                return str(item["type"])
        return ""

    def _set(self, kind: str, reason: str, text: str, status: str = "True") -> None:
        condition = {
            "lastProbeTime": now(),
            "lastTransitionTime": now(),
            "message": text,
            "reason": reason,
            "status": status,
            "type": kind,
        }
        conditions = self.status.setdefault("conditions", [])
        for index, item in enumerate(conditions):
            if item["type"] == kind:
                conditions[index] = condition
                return
        conditions.append(condition)

    def _write(self) -> None:
        status = copy_json(self.status)

        def change(job: Object) -> None:
            if job["metadata"]["uid"] == self.job["metadata"]["uid"]:
                job["status"] = status

        self.store.update_status("jobs", self.namespace, self.name, change)

    def _tell(self, kind: str, reason: str, text: str) -> None:
        self.store.record_event(self.job, kind, reason, text, COMPONENT)


def _has(job: Object, kind: str) -> bool:
    conditions = job.get("status", {}).get("conditions") or []
    return any(item["type"] == kind and item["status"] == "True" for item in conditions)


def _match(rule: Object, index: int, pod: Object) -> str:
    """What the Job's condition says if this rule of the podFailurePolicy matches, else ''."""
    where = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    action, status = rule["action"], pod.get("status", {})
    if "onExitCodes" in rule:
        asked = rule["onExitCodes"]
        for item in status.get("containerStatuses", []) + status.get("initContainerStatuses", []):
            code = item["state"].get("terminated", {}).get("exitCode", 0)
            if not code or asked.get("containerName") not in (None, item["name"]):
                continue
            if (code in asked["values"]) == (asked["operator"] == "In"):
                return (
                    f"Container {item['name']} for pod {where} failed with exit code {code} "
                    f"matching {action} rule at index {index}"
                )
    for wanted in rule.get("onPodConditions") or []:
        for item in status.get("conditions") or []:
            if item["type"] == wanted["type"] and item["status"] == wanted.get("status", "True"):
                return (
                    f"Pod {where} has condition {item['type']} matching {action} rule at index "
                    f"{index}"
                )
    return ""
