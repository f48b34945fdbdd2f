"""The node: schedules pods onto itself and runs each of them as local processes."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.standin.addresses import Addresses
from tests.standin.clock import Clock
from tests.standin.errors import ApiError, bad_request, not_found
from tests.standin.images import Images
from tests.standin.podstatus import set_condition
from tests.standin.podworker import Node, PodWorker
from tests.standin.processes import Processes
from tests.standin.sandbox import Context, Sandbox, parse_bytes
from tests.standin.store import now

log = logging.getLogger(__name__)

Object = dict[str, Any]
NODE = "vm"
NODE_CPU_MILLIS = 8000
NODE_MEMORY = "16Gi"
NODE_LABELS = {
    "beta.kubernetes.io/arch": "amd64",
    "beta.kubernetes.io/os": "linux",
    "kubernetes.io/arch": "amd64",
    "kubernetes.io/hostname": NODE,
    "kubernetes.io/os": "linux",
}
PREEMPTION = "no new claims to deallocate, preemption: 0/1 nodes are available: 1 "
CORDONED = "0/1 nodes are available: 1 node(s) were unschedulable. "
CORDONED += f"{PREEMPTION}Preemption is not helpful for scheduling."


class Kubelet:
    """Runs the store's pods; `stop` ends all of them."""

    def __init__(
        self,
        directory: Path,
        context: Context,
        images: Images,
        addresses: Addresses,
        clock: Clock,
    ) -> None:
        self._directory = directory
        self._context = context
        self._store = context.store
        self._addresses = addresses
        self._workers: dict[str, PodWorker] = {}
        self._lock = threading.Lock()
        self._lost: set[str] = set()
        self._cordoned = False
        self._processes = Processes()
        self._node = Node(
            self._store,
            images,
            self._processes,
            clock,
            NODE,
            addresses.host(),
            set(),
        )
        self._subscription = self._store.subscribe("pods")
        self._thread = threading.Thread(target=self._watch, name="kubelet", daemon=True)

    def start(self) -> None:
        """Make the node known and begin to run pods."""
        if self._store.find("nodes", None, NODE) is None:
            self._store.create("nodes", _node_object(self._node.address))
        self._thread.start()

    def stop(self) -> None:
        """End every pod's processes and threads; the stored objects stay."""
        self._subscription.close()
        self._thread.join()
        with self._lock:
            workers = list(self._workers.values())
        for worker in workers:
            worker.gone()
        self._processes.close()
        for worker in workers:
            worker.join()

    def logs(
        self,
        namespace: str,
        pod: str,
        container: str | None = None,
        previous: bool = False,
        tail: int | None = None,
    ) -> bytes:
        """What a container has written; ApiError as the API server answers."""
        data = self._log_path(namespace, pod, container, previous).read_bytes()
        if tail is None or tail < 0:
            return data
        return b"".join(data.splitlines(keepends=True)[-tail:]) if tail else b""

    def kill_container(self, namespace: str, pod: str, container: str) -> None:
        """Kill a container's processes as the kernel would; ApiError 404 if there is none."""
        self._worker(namespace, pod).kill(container)

    def lose(self, namespace: str, pod: str) -> None:
        """The pod's machine goes away: its processes stop, and nothing is reported any more."""
        worker = self._worker(namespace, pod)
        self._lost.add(worker.uid)
        worker.gone()
        worker.join()

    def cordon(self, cordoned: bool) -> None:
        """Take no new pods, or again those that are there."""
        self._cordoned = cordoned
        for pod in [] if cordoned else self._store.list("pods"):
            if not pod["spec"].get("nodeName"):
                with suppress(ApiError):  # it has gone meanwhile
                    self._schedule(pod)

    # Inside

    def _watch(self) -> None:
        while not self._subscription.closed:
            event = self._subscription.next_event()
            if event is None:
                continue
            pod = event.stored.object
            try:
                self._see(event.type, pod)
            except ApiError as error:
                log.debug("pod %s: %s", pod["metadata"]["name"], error)

    def _see(self, kind: str, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        with self._lock:
            worker = self._workers.get(uid)
        if kind == "DELETED":
            if worker is not None:
                worker.gone()
        elif worker is not None:
            worker.changed(pod)
        elif not pod["spec"].get("nodeName"):
            if "deletionTimestamp" not in pod["metadata"]:
                self._schedule(pod)
        elif uid not in self._lost and pod.get("status", {}).get("phase", "Pending") == "Pending":
            self._run(pod)

    def _schedule(self, pod: Object) -> None:
        meta = pod["metadata"]
        why = CORDONED if self._cordoned else _unschedulable(pod["spec"])
        if why is not None and _was_told(pod, why):
            return
        scheduled: Object = {"lastProbeTime": None, "lastTransitionTime": now()}
        if why:
            scheduled |= {"message": why, "reason": "Unschedulable"}
        scheduled |= {
            "observedGeneration": meta.get("generation", 1),
            "status": "False" if why else "True",
            "type": "PodScheduled",
        }

        def bind(stored: Object) -> None:
            set_condition(stored.setdefault("status", {}).setdefault("conditions", []), scheduled)
            if not why:
                stored["spec"]["nodeName"] = NODE

        name = f"{meta['namespace']}/{meta['name']}"
        self._store.update_status("pods", meta["namespace"], meta["name"], bind)
        kind, reason = ("Warning", "FailedScheduling") if why else ("Normal", "Scheduled")
        text = why or f"Successfully assigned {name} to {NODE}"
        self._store.record_event(pod, kind, reason, text, "default-scheduler")

    def _run(self, pod: Object) -> None:
        meta = pod["metadata"]
        place = self._directory / f"{meta['namespace']}_{meta['name']}_{meta['uid'][:8]}"
        place.mkdir(parents=True, exist_ok=True)
        sandbox = Sandbox(place, pod, self._addresses.pod(), self._context)
        worker = PodWorker(self._node, sandbox, self._ended)
        with self._lock:
            self._workers[worker.uid] = worker
        worker.start()

    def _ended(self, worker: PodWorker) -> None:
        self._addresses.release(worker.sandbox.address)
        with self._lock:
            self._workers.pop(worker.uid, None)

    def _worker(self, namespace: str, pod: str) -> PodWorker:
        with self._lock:
            for worker in self._workers.values():
                if worker.name == pod and worker.sandbox.namespace == namespace:
                    return worker
        raise not_found("pods", pod)

    def _log_path(self, namespace: str, pod: str, container: str | None, previous: bool) -> Path:
        stored = self._store.get("pods", namespace, pod)
        name = container or str(stored["spec"]["containers"][0]["name"])
        shown = [
            item
            for kind in ("containerStatuses", "initContainerStatuses")
            for item in stored.get("status", {}).get(kind, [])
            if item["name"] == name
        ]
        attempt = (shown[0]["restartCount"] if shown else 0) - int(previous)
        path = self._worker(namespace, pod).sandbox.log_path(name, attempt)
        if not path.exists():
            raise bad_request(
                f'container "{name}" in pod "{pod}" is waiting to start: ContainerCreating'
            )
        return path


def _unschedulable(spec: Object) -> str | None:
    """Why no node takes the pod, in the scheduler's words."""
    selector = (spec.get("nodeSelector") or {}).items()
    if not selector <= NODE_LABELS.items():
        return (
            "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector. "
            f"{PREEMPTION}Preemption is not helpful for scheduling."
        )
    requests = [(item.get("resources") or {}).get("requests") or {} for item in spec["containers"]]
    if sum(_millis(str(item.get("cpu", "0"))) for item in requests) > NODE_CPU_MILLIS:
        short = "cpu"
    elif sum(parse_bytes(str(item.get("memory", "0"))) for item in requests) > parse_bytes(
        NODE_MEMORY
    ):
        short = "memory"
    else:
        return None
    return (
        f"0/1 nodes are available: 1 Insufficient {short}. "
        f"{PREEMPTION}No preemption victims found for incoming pod."
    )


def _was_told(pod: Object, why: str) -> bool:
    conditions = pod.get("status", {}).get("conditions") or []
    return any(item["type"] == "PodScheduled" and item.get("message") == why for item in conditions)


def _millis(cpu: str) -> int:
    return int(cpu[:-1]) if cpu.endswith("m") else round(float(cpu) * 1000)


def _node_object(address: str) -> Object:
    capacity = {"cpu": str(NODE_CPU_MILLIS // 1000), "memory": NODE_MEMORY, "pods": "110"}
    ready = {
        "lastHeartbeatTime": now(),
        "lastTransitionTime": now(),
        "message": "kubelet is posting ready status",
        "reason": "KubeletReady",
        "status": "True",
        "type": "Ready",
    }
    return {
        "metadata": {"name": NODE, "labels": dict(NODE_LABELS)},
        "spec": {},
        "status": {
            "addresses": [{"address": address, "type": "InternalIP"}],
            "allocatable": capacity,
            "capacity": capacity,
            "conditions": [ready],
        },
    }
