"""A whole stand-in cluster: store, API server, node, controllers, proxy."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from tests.standin.addresses import Addresses
from tests.standin.api import Api
from tests.standin.clock import Clock
from tests.standin.controllers import Controllers
from tests.standin.errors import ApiError
from tests.standin.faults import Faults
from tests.standin.images import Images
from tests.standin.kubelet import Kubelet
from tests.standin.podstatus import set_condition
from tests.standin.proxy import Proxy
from tests.standin.resources import find_kind
from tests.standin.sandbox import Context
from tests.standin.store import Store, copy_json, now

log = logging.getLogger(__name__)

Object = dict[str, Any]
NAMESPACES = ("default", "kube-system")
FIXED = ("uid", "resourceVersion", "creationTimestamp", "generation")


class Cluster:
    """A cluster for tests, in threads of this process; everything of it lies in `directory`.

    `speed` divides the durations that objects ask for (back-offs, grace periods, probe periods,
    minReadySeconds, deadlines, times to live); `tick` is the delay of the cluster's own work.
    """

    def __init__(self, directory: Path, *, tick: float = 0.05, speed: float = 1.0) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.clock = Clock(speed, tick)
        self._addresses = Addresses()
        self.store = Store(allocate_ip=self._addresses.service)
        self.faults = Faults()
        self.images = Images(directory / "images")
        self.api = Api(self.store, self.faults)
        context = Context(self.store, self._token, self.api.ca_pem.decode)
        self.kubelet = Kubelet(
            directory / "pods", context, self.images, self._addresses, self.clock
        )
        self.controllers = Controllers(self.store, self.clock)
        self.proxy = Proxy(self.store)
        self.api.log_source = self.kubelet.logs
        self._running = False

    # Life

    def start(self) -> Cluster:
        """Listen, and bring everything to life."""
        for name in NAMESPACES:
            if self.store.find("namespaces", None, name) is None:
                self.store.create("namespaces", {"metadata": {"name": name}})
        self.controllers.start()
        self.proxy.start()
        self.kubelet.start()
        self.api.start()
        self._running = True
        return self

    def stop(self) -> None:
        """End every process and thread that the cluster started; twice does no harm."""
        if not self._running:
            return
        self._running = False
        self.api.stop()
        self.controllers.stop()
        self.proxy.stop()
        self.kubelet.stop()
        self._addresses.close()

    def down(self) -> None:
        """The API server refuses connections; pods go on running."""
        self.api.down()

    def up(self) -> None:
        """The API server is back, on the same port."""
        self.api.up()

    def freeze(self) -> None:
        """The API server is stopped: it answers nobody; pods go on running."""
        self.api.freeze()

    def thaw(self) -> None:
        """The API server goes on where it was stopped."""
        self.api.thaw()

    def __enter__(self) -> Cluster:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # Set-up

    def kubeconfig(self, account: str | None = None) -> Path:
        """A kubeconfig: of the administrator, or of a service account `namespace/name`."""
        name = "kubeconfig" if account is None else f"kubeconfig-{account.replace('/', '-')}"
        return self.api.kubeconfig(self.directory / name, account)

    def load(self, *objects: Object) -> None:
        """Create objects, or replace those that are there; nobody's permissions are asked."""
        for item in sorted(_flat(objects), key=lambda each: each["kind"] != "Namespace"):
            resource = find_kind(item["apiVersion"], item["kind"])
            if resource is None:
                raise ValueError(f"not served: {item['apiVersion']} {item['kind']}")
            meta = item["metadata"]
            namespace = meta.get("namespace") or "default"
            try:
                self.store.create(resource.name, item)
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise
                self.store.update(resource.name, namespace, meta["name"], _replacing(item))

    def load_yaml(self, text: str) -> None:
        """The same for a YAML stream."""
        self.load(*(item for item in yaml.safe_load_all(text) if item))

    # Mishaps

    def evict(self, namespace: str, pod: str) -> None:
        """Evict a pod as `kubectl drain` would."""
        self.store.evict(namespace, pod)

    def cordon(self, cordoned: bool = True) -> None:
        """Let the node take no new pods, as `kubectl cordon` would, or take them again."""
        self.kubelet.cordon(cordoned)

    def kill_container(self, namespace: str, pod: str, container: str) -> None:
        """Kill a container's processes; the kubelet restarts it as its policy says."""
        self.kubelet.kill_container(namespace, pod, container)

    def lose_pod(self, namespace: str, pod: str) -> None:
        """A pod vanishes: its processes and its object are gone, without any status."""
        self.kubelet.lose(namespace, pod)
        self.store.remove("pods", namespace, pod)

    def lose_node_of(self, namespace: str, pod: str) -> None:
        """The machine under this pod dies: the pod fails as disrupted, and is taken away."""
        self.kubelet.lose(namespace, pod)
        disrupted = _condition(
            "DisruptionTarget",
            "True",
            "DeletionByTaintManager",
            "Taint manager: deleting due to NoExecute taint",
        )

        def fail(stored: Object) -> None:
            conditions = stored["status"].setdefault("conditions", [])
            for kind in ("Ready", "ContainersReady"):
                set_condition(conditions, _condition(kind, "False", "NodeNotReady", ""))
            set_condition(conditions, disrupted)
            stored["status"]["phase"] = "Failed"

        self.store.update_status("pods", namespace, pod, fail)
        self.store.delete("pods", namespace, pod, grace=0)

    # Inside

    def _token(self, namespace: str, account: str) -> str:
        return self.api.tokens.of_account(namespace, account)


def _flat(objects: tuple[Object, ...]) -> list[Object]:
    found: list[Object] = []
    for item in objects:
        if item["kind"].endswith("List") and "items" in item:
            found += _flat(tuple(item["items"]))
        else:
            found.append(item)
    return found


def _replacing(item: Object) -> Any:
    def change(stored: Object) -> Object:
        new: Object = copy_json(item)
        for field in FIXED:
            if field in stored["metadata"]:
                new["metadata"][field] = stored["metadata"][field]
        new["metadata"].pop("resourceVersion", None)
        if "status" in stored:
            new.setdefault("status", stored["status"])
        return new

    return change


def _condition(kind: str, status: str, reason: str, text: str) -> Object:
    condition: Object = {"lastProbeTime": None, "lastTransitionTime": now()}
    if text:
        condition["message"] = text
    return {**condition, "reason": reason, "status": status, "type": kind}
