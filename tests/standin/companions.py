"""What stands beside a Deployment: the numbers of its disruption budgets and its autoscalers."""

from __future__ import annotations

from typing import Any

from tests.standin.clock import Clock
from tests.standin.owned import is_deleted, is_finished, is_ready, share
from tests.standin.podstatus import set_condition
from tests.standin.selectors import matches_selector
from tests.standin.store import Store, now

Object = dict[str, Any]
AUTOSCALER_SECONDS = 15.0
NO_METRICS = (
    "failed to get {0} utilization: unable to get metrics for resource {0}: unable to fetch "
    "metrics from resource metrics API: the server could not find the requested resource "
    "(get pods.metrics.k8s.io)"
)
INVALID_METRICS = (
    "invalid metrics ({0} invalid out of {0}), first error is: failed to get {1} resource metric "
    "value: {2}"
)


class BudgetController:
    """Keeps the status of PodDisruptionBudgets."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def reconcile(self, namespace: str, name: str) -> float | None:
        """Count the pods of one budget."""
        stored = self._store.find_stored("poddisruptionbudgets", namespace, name)
        if stored is None or is_deleted(stored.object):
            return None
        spec = stored.object["spec"]
        pods = [
            item.object
            for item in self._store.snapshot("pods", namespace)[0]
            if matches_selector(spec.get("selector"), item.object["metadata"].get("labels") or {})
            and not is_finished(item.object)
        ]
        healthy = sum(is_ready(pod) and not is_deleted(pod) for pod in pods)
        wanted = _desired(spec, len(pods))
        generation = stored.object["metadata"].get("generation", 1)

        def change(budget: Object) -> None:
            status = budget.setdefault("status", {})
            allowed = max(healthy - wanted, 0) if pods else 0
            condition = {
                "lastTransitionTime": now(),
                "message": "",
                "observedGeneration": generation,
                "reason": "SufficientPods" if allowed else "InsufficientPods",
                "status": "True" if allowed else "False",
                "type": "DisruptionAllowed",
            }
            set_condition(status.setdefault("conditions", []), condition)
            status |= {
                "currentHealthy": healthy,
                "desiredHealthy": wanted,
                "disruptionsAllowed": allowed,
                "expectedPods": len(pods),
                "observedGeneration": generation,
            }

        self._store.update_status("poddisruptionbudgets", namespace, name, change)
        return None


def _desired(spec: Object, pods: int) -> int:
    """How many pods must stay healthy."""
    if "minAvailable" in spec:
        return share(spec["minAvailable"], pods, up=True)
    return max(pods - share(spec.get("maxUnavailable", 1), pods, up=True), 0)


class AutoscalerController:
    """Keeps the status of HorizontalPodAutoscalers as where nobody measures anything."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    def reconcile(self, namespace: str, name: str) -> float | None:
        """Look at the target of one, and in vain for its metrics; again 15 seconds later."""
        stored = self._store.find_stored("horizontalpodautoscalers", namespace, name)
        if stored is None or is_deleted(stored.object):
            return None
        scaler = stored.object
        target = scaler["spec"]["scaleTargetRef"]["name"]
        scaled = self._store.find_stored("deployments", namespace, target)
        metrics = scaler["spec"].get("metrics") or []
        measured = [item["resource"]["name"] for item in metrics if "resource" in item]
        if scaled is not None and measured:
            self._tell(scaler, scaled.object["spec"].get("replicas", 1), measured)
        return self._clock.real(AUTOSCALER_SECONDS)

    def _tell(self, scaler: Object, replicas: int, measured: list[str]) -> None:
        meta, why = scaler["metadata"], NO_METRICS.format(measured[0])
        conditions = {
            "AbleToScale": (
                "True",
                "SucceededGetScale",
                "the HPA controller was able to get the target's current scale",
            ),
            "ScalingActive": (
                "False",
                "FailedGetResourceMetric",
                f"the HPA was unable to compute the replica count: {why}",
            ),
        }

        def change(stored: Object) -> None:
            status = stored.setdefault("status", {})
            shown = status.setdefault("conditions", [])
            for kind, (state, reason, text) in conditions.items():
                new = {"lastTransitionTime": now(), "message": text, "reason": reason}
                set_condition(shown, {**new, "status": state, "type": kind})
            status |= {"currentMetrics": [{"type": ""}], "currentReplicas": replicas}

        invalid = INVALID_METRICS.format(len(measured), measured[0], why)
        for reason, text in (
            ("FailedGetResourceMetric", why),
            ("FailedComputeMetricsReplicas", invalid),
        ):
            manager = "horizontal-pod-autoscaler"
            self._store.record_event(scaler, "Warning", reason, text, manager)
        resource = "horizontalpodautoscalers"
        self._store.update_status(resource, meta["namespace"], meta["name"], change)
