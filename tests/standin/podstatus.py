"""What a pod's status says, computed from the states of its containers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.standin.store import now

Object = dict[str, Any]
KUBELET_CONDITIONS = (
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "PodScheduled",
)
MEMORY_UNITS = (("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10))


@dataclass
class ContainerState:
    """One container as its status shows it; `kind` is init, sidecar or main."""

    spec: Object
    kind: str
    state: Object
    last: Object = field(default_factory=dict)
    ready: bool = False
    started: bool = False
    restarts: int = 0
    image: str = ""
    image_id: str = ""
    container_id: str = ""

    @property
    def name(self) -> str:
        """The container's name."""
        return str(self.spec["name"])

    @property
    def running(self) -> bool:
        """Whether its process runs."""
        return "running" in self.state

    @property
    def exit_code(self) -> int | None:
        """The exit code, once it has terminated."""
        ended = self.state.get("terminated")
        return None if ended is None else int(ended["exitCode"])

    @property
    def initialized(self) -> bool:
        """Whether the containers after it may start."""
        return self.exit_code == 0 if self.kind == "init" else self.started

    def shown(self) -> Object:
        """The entry of containerStatuses."""
        resources = self.spec.get("resources") or {}
        entry: Object = {}
        if self.container_id and "requests" in resources:
            entry["allocatedResources"] = resources["requests"]
        if self.container_id:
            entry["containerID"] = self.container_id
        entry["image"] = self.image or self.spec["image"]
        entry["imageID"] = self.image_id
        entry["lastState"] = self.last
        entry["name"] = self.name
        entry["ready"] = self.ready
        if self.container_id and resources:
            entry["resources"] = resources
        entry["restartCount"] = self.restarts
        entry["started"] = self.started and self.running
        entry["state"] = self.state
        if mounts := self.spec.get("volumeMounts"):
            entry["volumeMounts"] = [_mount(mount) for mount in mounts]
        return entry


@dataclass(frozen=True)
class PodView:
    """All that a status is made of."""

    pod: Object
    containers: list[ContainerState]
    host_ip: str
    pod_ip: str
    network: bool
    finished: bool
    started_at: str
    ending: Object = field(default_factory=dict)


def computed_phase(view: PodView) -> str:
    """The phase that the containers' states amount to."""
    policy = view.pod["spec"].get("restartPolicy", "Always")
    inits = [item for item in view.containers if item.kind == "init"]
    mains = [item for item in view.containers if item.kind == "main"]
    if policy == "Never" and any(item.exit_code for item in inits):
        return "Failed"
    if view.finished:
        if view.ending:
            return "Failed"
        ended = all(item.exit_code == 0 for item in mains)
        return "Succeeded" if ended else "Failed"
    if not all(item.initialized for item in inits):
        return "Pending"
    if any("waiting" in item.state and not item.last for item in mains):
        return "Pending"
    helpers = [item for item in view.containers if item.kind == "sidecar"]
    if any(item.running for item in mains + helpers):
        return "Running"
    codes = [item.exit_code for item in mains]
    if policy == "Always" or None in codes:
        return "Running"
    if not any(codes):
        return "Succeeded"
    return "Failed" if policy == "Never" else "Running"


def pod_status(view: PodView, old: Object) -> Object:
    """The whole status, given the one that is stored."""
    phase = computed_phase(view)
    shown = phase
    if phase in ("Succeeded", "Failed") and not view.finished:
        # The pod itself ends only when everything of it was cleared away.
        shown = old.get("phase", "Pending")
    status: Object = {}
    if resources := _total(view, "requests"):
        status["allocatedResources"] = resources
    status["conditions"] = _conditions(view, phase, old.get("conditions") or [])
    status["containerStatuses"] = [item.shown() for item in view.containers if item.kind == "main"]
    status["hostIP"], status["hostIPs"] = view.host_ip, [{"ip": view.host_ip}]
    inits = [item.shown() for item in view.containers if item.kind != "main"]
    if inits:
        status["initContainerStatuses"] = inits
    status["observedGeneration"] = view.pod["metadata"].get("generation", 1)
    status["phase"] = shown
    if view.pod_ip:
        status["podIP"], status["podIPs"] = view.pod_ip, [{"ip": view.pod_ip}]
    status["qosClass"] = old.get("qosClass") or qos_class(view.pod["spec"])
    limits = _total(view, "limits")
    if resources or limits:
        status["resources"] = {
            name: value for name, value in (("limits", limits), ("requests", resources)) if value
        }
    status["startTime"] = view.started_at
    for field_name in ("reason", "message"):
        if field_name in old:
            status[field_name] = old[field_name]
    return status | view.ending


def qos_class(spec: Object) -> str:
    """Guaranteed, Burstable or BestEffort, from what the containers ask for."""
    asked = [
        item.get("resources") or {}
        for item in (spec.get("initContainers") or []) + spec["containers"]
    ]
    if not any(item.get("requests") or item.get("limits") for item in asked):
        return "BestEffort"
    for item in asked:
        limits = item.get("limits") or {}
        if set(limits) < {"cpu", "memory"} or (item.get("requests") or limits) != limits:
            return "Burstable"
    return "Guaranteed"


def set_condition(conditions: list[Object], new: Object) -> None:
    """Replace the condition of that type, or add it; the time moves only with the status."""
    for index, item in enumerate(conditions):
        if item["type"] == new["type"]:
            if item["status"] == new["status"]:
                new = {**new, "lastTransitionTime": item["lastTransitionTime"]}
            conditions[index] = new
            return
    conditions.append(new)


def _conditions(view: PodView, phase: str, old: list[Object]) -> list[Object]:
    before = {item["type"]: item for item in old}
    generation = view.pod["metadata"].get("generation", 1)
    found = [item for item in old if item["type"] not in KUBELET_CONDITIONS]
    for kind, (status, reason, message) in _states(view, phase).items():
        condition: Object = {"lastProbeTime": None, "lastTransitionTime": now()}
        if kind in before and before[kind]["status"] == status:
            condition["lastTransitionTime"] = before[kind]["lastTransitionTime"]
        if message:
            condition["message"] = message
        condition["observedGeneration"] = generation
        if reason:
            condition["reason"] = reason
        found.append({**condition, "status": status, "type": kind})
    return found


def _states(view: PodView, phase: str) -> dict[str, tuple[str, str, str]]:
    inits = [item for item in view.containers if item.kind != "main"]
    waiting = [item.name for item in inits if not item.initialized and phase != "Succeeded"]
    unready = [item.name for item in view.containers if item.kind != "init" and not item.ready]
    initialized = ("True", "PodCompleted" if phase == "Succeeded" else "", "")
    if waiting and not _were_initialized(view):
        text = f"containers with incomplete status: [{' '.join(waiting)}]"
        initialized = ("False", "ContainersNotInitialized", text)
    ready = ("True", "", "")
    if phase in ("Succeeded", "Failed"):
        ready = ("False", "PodCompleted" if phase == "Succeeded" else "PodFailed", "")
    elif unready:
        text = f"containers with unready status: [{' '.join(unready)}]"
        ready = ("False", "ContainersNotReady", text)
    return {
        "PodReadyToStartContainers": ("True" if view.network else "False", "", ""),
        "Initialized": initialized,
        "Ready": ready,
        "ContainersReady": ready,
        "PodScheduled": ("True", "", ""),
    }


def _were_initialized(view: PodView) -> bool:
    """Once a main container has run, side-cars that ended do not undo it."""
    return any(item.kind == "main" and (item.container_id or item.last) for item in view.containers)


def _mount(mount: Object) -> Object:
    shown = {name: mount[name] for name in ("mountPath", "name", "readOnly") if mount.get(name)}
    if mount.get("readOnly"):
        shown["recursiveReadOnly"] = "Disabled"
    return shown


def _total(view: PodView, kind: str) -> Object:
    """The sum over everything that runs at the same time."""
    sums: dict[str, int] = {}
    for item in view.containers:
        if item.kind == "init":
            continue
        for name, text in ((item.spec.get("resources") or {}).get(kind) or {}).items():
            if name in ("cpu", "memory"):
                sums[name] = sums.get(name, 0) + _amount(name, str(text))
    return {name: _format(name, value) for name, value in sums.items()}


def _amount(name: str, text: str) -> int:
    if name == "cpu":
        return int(text[:-1]) if text.endswith("m") else round(float(text) * 1000)
    for unit, size in MEMORY_UNITS:
        if text.endswith(unit):
            return round(float(text.removesuffix(unit)) * size)
    units = {"k": 10**3, "M": 10**6, "G": 10**9}
    return round(float(text.rstrip("kMG")) * units.get(text[-1], 1))


def _format(name: str, value: int) -> str:
    if name == "cpu":
        return str(value // 1000) if value % 1000 == 0 else f"{value}m"
    for unit, size in MEMORY_UNITS:
        if value % size == 0:
            return f"{value // size}{unit}"
    return str(value)
