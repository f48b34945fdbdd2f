"""One pod on the node: a thread that starts its containers, watches over them and ends them."""

from __future__ import annotations

import hashlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from tests.standin.clock import Clock
from tests.standin.images import Image, Images, InvalidName, PullError
from tests.standin.podstatus import ContainerState, PodView, pod_status
from tests.standin.probes import Probe, Target
from tests.standin.processes import Command, Exit, Process, Processes, StartError
from tests.standin.sandbox import ConfigError, ContainerPlace, MountError, Sandbox
from tests.standin.store import ApiError, Store, now

log = logging.getLogger(__name__)

Object = dict[str, Any]
# Delays of the recorded kubelet, in seconds of the API's time.
FIRST_SYNC = 0.85
RESYNC = 12.0
FIRST_RESTART = 0.75
BACKOFF_LAG = 2.3
FIRST_BACKOFF = 10.0
LONGEST_BACKOFF = 300.0
MESSAGE_BYTES = 4096
FALLBACK_BYTES = 2048
SIDECAR_GRACE = 2.0
SILENT_LOOK = 0.2  # between two looks whether a silent registry has answered
PROBE_FIELDS = ("startup", "liveness", "readiness")


@dataclass(frozen=True)
class Node:
    """What a pod worker needs of its node."""

    store: Store
    images: Images
    processes: Processes
    clock: Clock
    name: str
    address: str
    pulled: set[str]


@dataclass
class Container:
    """A container of the pod: what is shown of it, and what runs."""

    shown: ContainerState
    steps: Iterator[float] | None = None
    due: float = 0.0
    process: Process | None = None
    place: ContainerPlace | None = None
    probes: list[Probe] = field(default_factory=list)
    attempt: int = -1
    backoff: float = 0.0
    stopping: bool = False
    since: float = 0.0

    @property
    def name(self) -> str:
        """The container's name."""
        return self.shown.name


class PodWorker:
    """Runs one pod from its binding to its end, in a thread."""

    def __init__(self, node: Node, sandbox: Sandbox, on_end: Callable[[PodWorker], None]) -> None:
        self.node = node
        self.sandbox = sandbox
        self.pod = sandbox.pod
        self.name = str(self.pod["metadata"]["name"])
        self.uid = self.pod["metadata"]["uid"]
        self._on_end = on_end
        self._messages: SimpleQueue[tuple[str, Any, Any]] = SimpleQueue()
        self._network = self._address_known = self._finished = False
        self._started_at = now()
        self._deadline: float | None = None
        self.containers = [Container(state) for state in _states(self.pod)]
        self._thread = threading.Thread(target=self._run, name=f"pod-{self.name}", daemon=True)

    # What others call

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self) -> None:
        """Wait until nothing of the pod is left."""
        self._thread.join()

    def changed(self, pod: Object) -> None:
        """The stored pod has changed."""
        self._messages.put(("pod", pod, None))

    def gone(self) -> None:
        """The pod is not there any more, or the cluster stops: end everything without a word."""
        self._messages.put(("gone", None, None))

    def kill(self, container: str) -> None:
        """Kill a container's processes, as the kernel would."""
        for item in self.containers:
            if item.name == container and item.process is not None:
                self.node.processes.signal(item.process, signal.SIGKILL)

    # The thread

    def _run(self) -> None:
        try:
            self._live()
        except _Gone:
            log.debug("pod %s is gone", self.name)
        finally:
            self._abandon()
            self._on_end(self)

    def _live(self) -> None:
        self._publish()
        self._prepare()
        while not self._finished:
            if self._is_deleted():
                self._terminate()
                return
            self._advance()
            if self._is_done():
                self._finish()
                break
            self._handle(self._next_due())
        # A finished pod stays as it is until it is deleted.
        while not self._is_deleted():
            self._handle(None)
        self._delete()

    def _prepare(self) -> None:
        """Volumes and network; waits for what is missing."""
        wait = 0.5
        while not self._is_deleted():
            try:
                self.sandbox.populate()
            except MountError as error:
                self._record("Warning", "FailedMount", str(error))
                self._pause(wait)
                wait = min(wait * 2, 120)
            else:
                self._network = True
                self._publish()
                self._address_known = True
                return

    def _advance(self) -> None:
        """Let every container that may take its next step."""
        for item in self.containers:
            state = item.shown
            self._step(item)
            if state.kind != "main" and not state.initialized:
                return

    def _step(self, item: Container) -> None:
        while item.process is None:
            if item.steps is None:
                if not self._wanted(item):
                    return
                item.steps, item.due = self._launch(item), 0.0
            if item.due > time.monotonic():
                return
            try:
                item.due = time.monotonic() + self.node.clock.real(next(item.steps))
            except StopIteration:
                item.steps = None

    def _wanted(self, item: Container) -> bool:
        """Whether a container that does not run should."""
        code, policy = item.shown.exit_code, self.pod["spec"].get("restartPolicy", "Always")
        if code is None:
            return True
        if item.shown.kind == "sidecar":
            return not self._mains_ended()
        if item.shown.kind == "init":
            return code != 0 and policy != "Never"
        return policy == "Always" or (policy == "OnFailure" and code != 0)

    def _launch(self, item: Container) -> Iterator[float]:
        """Start a container, as often as it takes; yields how long to wait."""
        if item.shown.exit_code is not None:
            yield from self._back_off(item)
        image, pulled = yield from self._pull(item)
        first = True
        while True:
            self._record("Normal", "Pulled", pulled, item)
            try:
                item.place = self.sandbox.container(item.shown.spec, image, item.attempt + 1)
                command = item.place.command()
            except ConfigError as error:
                self._record("Warning", "Failed", f"Error: {error}", item)
                if not first:
                    self._wait_for(item, "CreateContainerConfigError", str(error))
                yield FIRST_SYNC if first else RESYNC
                first = False
            else:
                self._execute(item, image, command)
                return

    def _back_off(self, item: Container) -> Iterator[float]:
        """The delay before a restart: none to speak of the first time, then longer and longer."""
        if not item.backoff:
            item.backoff = FIRST_BACKOFF
            yield FIRST_RESTART
            return
        seconds = int(item.backoff)
        where = f"{self.name}_{self.sandbox.namespace}({self.uid})"
        self._record(
            "Warning",
            "BackOff",
            f"Back-off restarting failed container {item.name} in pod {where}",
            item,
        )
        text = f"back-off {seconds}s restarting failed container={item.name} pod={where}"
        if item.shown.kind == "main":
            yield 1.0
            self._crash_looping(item, text)
            yield item.backoff + BACKOFF_LAG - 1.0
        else:
            yield item.backoff + BACKOFF_LAG
            self._crash_looping(item, text)
        item.backoff = min(item.backoff * 2, LONGEST_BACKOFF)

    def _crash_looping(self, item: Container, text: str) -> None:
        item.shown.last = item.shown.state
        self._wait_for(item, "CrashLoopBackOff", text)

    def _pull(self, item: Container) -> Generator[float, None, tuple[Image, str]]:
        """Get the image, however long it takes; and what is told about it."""
        reference, policy = item.shown.spec["image"], item.shown.spec.get("imagePullPolicy")
        backoff, lag = FIRST_BACKOFF, FIRST_SYNC
        images = self.node.images
        present = images.is_local(reference) or reference in self.node.pulled
        while True:
            try:
                if policy == "Never" and not present:
                    yield from self._never(item)
                if not present:
                    yield from self._ask_registry(item, reference)
                image = images.pull(reference)
            except InvalidName as error:
                yield from self._invalid_name(item, str(error))
            except PullError as error:
                failed = f'Failed to pull image "{reference}": {error}'
                self._record("Warning", "Failed", failed, item)
                self._record("Warning", "Failed", "Error: ErrImagePull", item)
                yield lag
                self._wait_for(item, "ErrImagePull", str(error))
                text = f'Back-off pulling image "{reference}"'
                self._record("Normal", "BackOff", text, item)
                self._record("Warning", "Failed", "Error: ImagePullBackOff", item)
                yield backoff + 0.7
                self._wait_for(item, "ImagePullBackOff", f"{text}: ErrImagePull: {error}")
                backoff, lag = min(backoff * 2, LONGEST_BACKOFF), RESYNC
            else:
                if not present:
                    self.node.pulled.add(reference)
                return image, _pulled_text(reference, present)

    def _ask_registry(self, item: Container, reference: str) -> Iterator[float]:
        """Begin a pull; a silent registry keeps it waiting without a word."""
        self._record("Normal", "Pulling", f'Pulling image "{reference}"', item)
        while self.node.images.is_silent(reference):
            yield SILENT_LOOK

    def _invalid_name(self, item: Container, text: str) -> Iterator[float]:
        self._record("Warning", "InspectFailed", text, item)
        self._record("Warning", "Failed", "Error: InvalidImageName", item)
        yield FIRST_SYNC
        self._wait_for(item, "InvalidImageName", text)
        yield RESYNC

    def _never(self, item: Container) -> Iterator[float]:
        reference = item.shown.spec["image"]
        text = f'Container image "{reference}" is not present with pull policy of Never'
        while reference not in self.node.pulled:
            self._record("Warning", "ErrImageNeverPull", text, item)
            self._record("Warning", "Failed", "Error: ErrImageNeverPull", item)
            yield FIRST_SYNC
            self._wait_for(item, "ErrImageNeverPull", text)
            yield RESYNC

    def _execute(self, item: Container, image: Image, command: Command) -> None:
        item.attempt += 1
        item.since = time.monotonic()
        state = item.shown
        identity = hashlib.sha256(f"{self.uid}/{item.name}/{item.attempt}".encode()).hexdigest()
        if state.exit_code is not None or state.last:
            state.last = state.state if "terminated" in state.state else state.last
            state.restarts += 1
        state.container_id = f"containerd://{identity}"
        state.image, state.image_id = image.shown, image.digest
        self._record("Normal", "Created", "Container created", item)
        try:
            item.process = self.node.processes.start(
                command, lambda how: self._messages.put(("exit", item, how))
            )
        except StartError as error:
            self._not_started(item, str(error))
            return
        state.state = {"running": {"startedAt": now()}}
        gated = "startupProbe" in state.spec
        state.started = not gated
        state.ready = state.kind != "init" and not gated and "readinessProbe" not in state.spec
        self._record("Normal", "Started", "Container started", item)
        self._probe(item, ("startup",) if gated else ("liveness", "readiness"))
        self._publish()

    def _not_started(self, item: Container, error: str) -> None:
        text = (
            "failed to create containerd task: failed to create shim task: OCI runtime create "
            "failed: runc create failed: unable to start container process: error during "
            f"container init: {error}"
        )
        self._record("Warning", "Failed", f"Error: {text}", item)
        how = {"exitCode": 128, "message": text, "reason": "StartError"}
        self._ended(item, {**how, "startedAt": "1970-01-01T00:00:00Z", "finishedAt": now()})

    # Probes

    def _probe(self, item: Container, kinds: tuple[str, ...]) -> None:
        ports = {
            port["name"]: port["containerPort"]
            for port in item.shown.spec.get("ports") or []
            if "name" in port
        }
        place = item.place
        assert place is not None
        target = Target(
            self.sandbox.address, ports, lambda argv, limit: self._run_in(place, argv, limit)
        )
        for kind in kinds:
            if spec := item.shown.spec.get(f"{kind}Probe"):
                probe = Probe(
                    kind,
                    spec,
                    target,
                    speed=self.node.clock.speed,
                    verdict=lambda kind, fine: self._messages.put(("probe", item, (kind, fine))),
                    unhealthy=lambda text: self._record("Warning", "Unhealthy", text, item),
                )
                item.probes.append(probe)
                probe.start()

    def _run_in(self, place: ContainerPlace, argv: list[str], limit: float) -> tuple[int, str]:
        """Execute something in a container; its exit code and output."""
        output = place.log.with_suffix(f".exec-{threading.get_ident()}")
        output.unlink(missing_ok=True)
        try:
            process = self.node.processes.start(place.another(argv, output))
        except StartError as error:
            return 128, str(error)
        how = process.wait(limit)
        if how is None:
            self.node.processes.signal(process, signal.SIGKILL)
            return 124, f'command "{" ".join(argv)}" timed out'
        try:
            return how.code, output.read_text(encoding="utf-8", errors="replace")
        except OSError:
            # The pod's end was faster, and took its directory along.
            return how.code, ""

    def _probed(self, item: Container, kind: str, fine: bool) -> None:
        if item.process is None:
            return
        if kind == "readiness":
            if item.shown.ready != fine:
                item.shown.ready = fine
                self._publish()
        elif kind == "startup" and fine:
            self._stop_probes(item)
            item.shown.started = True
            item.shown.ready = "readinessProbe" not in item.shown.spec
            self._probe(item, ("liveness", "readiness"))
            self._publish()
        elif not fine and not self._is_deleted():
            text = f"Container {item.name} failed {kind} probe, will be restarted"
            self._record("Normal", "Killing", text, item)
            self._stop([item], self._grace())

    def _stop_probes(self, item: Container) -> None:
        for probe in item.probes:
            probe.stop()
        item.probes.clear()

    # The end of containers

    def _exited(self, item: Container, how: Exit) -> None:
        item.process, item.stopping = None, False
        if time.monotonic() - item.since > self.node.clock.real(2 * LONGEST_BACKOFF):
            item.backoff = 0.0
        reason = "OOMKilled" if how.out_of_memory else "Error" if how.code else "Completed"
        state: Object = {"containerID": item.shown.container_id, "exitCode": how.code}
        state["finishedAt"] = now()
        if message := self._message(item, how):
            state["message"] = message
        started = item.shown.state.get("running", {}).get("startedAt", now())
        self._ended(item, {**state, "reason": reason, "startedAt": started})

    def _ended(self, item: Container, terminated: Object) -> None:
        self._stop_probes(item)
        item.shown.state = {"terminated": terminated}
        item.shown.started = False
        item.shown.ready = item.shown.kind == "init" and terminated["exitCode"] == 0
        if self._deadline is None:
            self._publish()

    def _message(self, item: Container, how: Exit) -> str:
        assert item.place is not None
        data = item.place.message.read_bytes()[:MESSAGE_BYTES]
        fallback = item.shown.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError"
        if not data and fallback and how.code:
            lines = item.place.log.read_bytes()[-FALLBACK_BYTES:].splitlines(keepends=True)
            data = b"".join(lines[-80:])
        return data.decode("utf-8", errors="replace")

    def _mains_ended(self) -> bool:
        mains = [item for item in self.containers if item.shown.kind == "main"]
        return all(item.shown.exit_code is not None and not self._wanted(item) for item in mains)

    def _is_done(self) -> bool:
        """Whether nothing is left to run; ends the side-cars when only they are."""
        never = self.pod["spec"].get("restartPolicy", "Always") == "Never"
        failed = any(item.shown.kind == "init" and item.shown.exit_code for item in self.containers)
        if not (self._mains_ended() or (never and failed)):
            return False
        helpers = [item for item in self.containers if item.shown.kind == "sidecar"]
        for item in reversed(helpers):
            if item.process is not None:
                self._end_in_turn([item], time.monotonic() + self._grace())
        return True

    def _finish(self) -> None:
        """Show the last state of the containers for a moment, then the pod's own end."""
        self._pause_real(self.node.clock.tick)
        self._network = False
        self._finished = True
        self._publish()

    def _terminate(self) -> None:
        """The pod was deleted: stop it within its grace period, and let it go."""
        self._deadline = time.monotonic() + self._grace()
        for item in self.containers:
            item.steps = None
            if "waiting" in item.shown.state and item.shown.last:
                # Its last end is what is shown from now on.
                item.shown.state = item.shown.last
            elif "waiting" in item.shown.state:
                several = any(other.shown.kind != "main" for other in self.containers)
                reason = "PodInitializing" if several else "ContainerCreating"
                item.shown.state = {"waiting": {"reason": reason}}
        self._publish()
        mains = [item for item in self.containers if item.shown.kind != "sidecar"]
        self._end_in_turn(mains, self._deadline)
        for item in reversed(self.containers):
            if item.process is not None:
                rest = max(self._deadline - time.monotonic(), self.node.clock.real(SIDECAR_GRACE))
                self._end_in_turn([item], time.monotonic() + rest)
        self._pause_real(self.node.clock.tick)
        self._network = False
        self._finished = True
        prepared = all(
            item.shown.initialized for item in self.containers if item.shown.kind == "init"
        )
        for item in self.containers:
            if prepared and item.shown.kind == "main" and "waiting" in item.shown.state:
                item.shown.state = {"terminated": dict(UNKNOWN_END)}
        self._publish()
        self._delete()

    def _end_in_turn(self, items: list[Container], deadline: float) -> None:
        running = [item for item in items if item.process is not None]
        if not running:
            return
        for item in running:
            self._record("Normal", "Killing", f"Stopping container {item.name}", item)
        self._stop(running, max(deadline - time.monotonic(), 0))
        while any(item.process is not None for item in running):
            self._handle(None)

    def _stop(self, items: list[Container], grace: float) -> None:
        """Ask containers to end, in the background; they are killed after the grace period."""
        for item in items:
            if item.process is not None and not item.stopping:
                item.stopping = True
                threading.Thread(
                    target=self._stop_one, args=(item, item.process, grace), daemon=True
                ).start()

    def _stop_one(self, item: Container, process: Process, grace: float) -> None:
        deadline = time.monotonic() + grace
        hook = (item.shown.spec.get("lifecycle") or {}).get("preStop") or {}
        try:
            if "sleep" in hook:
                process.wait(min(self.node.clock.real(hook["sleep"]["seconds"]), grace))
            elif "exec" in hook and item.place is not None:
                self._run_in(item.place, hook["exec"]["command"], grace)
            number = (item.shown.spec.get("lifecycle") or {}).get("stopSignal", "SIGTERM")
            if process.exit is None:
                self.node.processes.signal(process, signal.Signals[number])
            while process.exit is None and (left := self._left(deadline)) > 0:
                process.wait(min(left, 1.0))
            if process.exit is None:
                self.node.processes.signal(process, signal.SIGKILL)
        except StartError:
            log.debug("the cluster stopped while %s was ending", item.name)

    def _left(self, deadline: float) -> float:
        """The rest of a grace period, which a second delete may have shortened."""
        limits = [deadline] if self._deadline is None else [deadline, self._deadline]
        return min(limits) - time.monotonic()

    def _grace(self) -> float:
        meta, spec = self.pod["metadata"], self.pod["spec"]
        seconds = meta.get(
            "deletionGracePeriodSeconds", spec.get("terminationGracePeriodSeconds", 30)
        )
        return self.node.clock.real(seconds)

    # Messages and the stored pod

    def _is_deleted(self) -> bool:
        return "deletionTimestamp" in self.pod["metadata"]

    def _next_due(self) -> float | None:
        waiting = [item.due for item in self.containers if item.steps is not None]
        return max(min(waiting) - time.monotonic(), 0.0) if waiting else None

    def _handle(self, timeout: float | None) -> None:
        """Wait for one message and act on it."""
        try:
            kind, subject, detail = self._messages.get(timeout=timeout)
        except Empty:
            return
        if kind == "gone":
            raise _Gone
        if kind == "pod":
            self.pod = self.sandbox.pod = subject
            if self._deadline is not None:
                self._deadline = min(self._deadline, time.monotonic() + self._grace())
        elif kind == "exit":
            self._exited(subject, detail)
        elif kind == "probe":
            self._probed(subject, *detail)

    def _pause(self, seconds: float) -> None:
        self._pause_real(self.node.clock.real(seconds))

    def _pause_real(self, seconds: float) -> None:
        """Wait, but not longer than the pod is wanted."""
        end, deleted = time.monotonic() + seconds, self._is_deleted()
        while (left := end - time.monotonic()) > 0 and deleted == self._is_deleted():
            self._handle(left)

    def _wait_for(self, item: Container, reason: str, message: str) -> None:
        item.shown.state = {"waiting": {"message": message, "reason": reason}}
        self._publish()

    def _publish(self) -> None:
        """Store the status; nothing happens when it is the same."""
        view = PodView(
            self.pod,
            [item.shown for item in self.containers],
            self.node.address,
            self.sandbox.address if self._address_known else "",
            self._network,
            self._finished,
            self._started_at,
        )

        def change(pod: Object) -> None:
            if pod["metadata"]["uid"] == self.uid:
                pod["status"] = pod_status(view, pod.get("status") or {})

        meta = self.pod["metadata"]
        try:
            self.node.store.update_status("pods", meta["namespace"], meta["name"], change)
        except ApiError as error:
            raise _Gone from error

    def _delete(self) -> None:
        meta = self.pod["metadata"]
        stored = self.node.store.find_stored("pods", meta["namespace"], meta["name"])
        if stored is None or stored.object["metadata"]["uid"] != self.uid:
            raise _Gone
        self.node.store.delete("pods", meta["namespace"], meta["name"], grace=0)
        while True:
            self._handle(None)

    def _record(self, kind: str, reason: str, message: str, item: Container | None = None) -> None:
        path = None
        if item is not None:
            group = "containers" if item.shown.kind == "main" else "initContainers"
            path = f"spec.{group}{{{item.name}}}"
        try:
            self.node.store.record_event(
                self.pod, kind, reason, message, "kubelet", field_path=path, host=self.node.name
            )
        except ApiError as error:
            log.debug("event %s of %s is not stored: %s", reason, self.name, error)

    def _abandon(self) -> None:
        """Kill what still runs, then clear the directory away."""
        left = [item for item in self.containers if item.process is not None]
        for item in self.containers:
            self._stop_probes(item)
        for item in left:
            try:
                assert item.process is not None
                self.node.processes.signal(item.process, signal.SIGKILL)
                item.process.wait()
            except StartError:
                log.debug("the cluster stopped before %s", item.name)
        self.sandbox.remove()


class _Gone(Exception):
    """The pod is not there any more."""


UNKNOWN_END: Object = {
    "exitCode": 137,
    "finishedAt": None,
    "message": "The container could not be located when the pod was terminated",
    "reason": "ContainerStatusUnknown",
    "startedAt": None,
}


def _pulled_text(reference: str, present: bool) -> str:
    if not present:
        return f'Successfully pulled image "{reference}" in 1ms (1ms including waiting)'
    return (
        f'Container image "{reference}" already present on machine and can be accessed by the pod'
    )


def _states(pod: Object) -> list[ContainerState]:
    inits, mains = pod["spec"].get("initContainers") or [], pod["spec"]["containers"]
    reason = "PodInitializing" if inits else "ContainerCreating"

    def state(spec: Object, kind: str) -> ContainerState:
        return ContainerState(spec, kind, {"waiting": {"reason": reason}})

    return [
        *(
            state(spec, "sidecar" if spec.get("restartPolicy") == "Always" else "init")
            for spec in inits
        ),
        *(state(spec, "main") for spec in mains),
    ]
