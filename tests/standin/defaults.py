"""What the API server fills in where an object says nothing."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from typing import Any

Object = dict[str, Any]


def _image_policy(image: str) -> str:
    if "@" in image:
        return "IfNotPresent"
    tag = image.rpartition("/")[2].partition(":")[2]
    return "Always" if tag in ("", "latest") else "IfNotPresent"


def _set(target: Object, **values: Any) -> None:
    for name, value in values.items():
        if target.get(name) is None:
            target[name] = value


def _probe(probe: Object | None) -> None:
    if probe is None:
        return
    _set(probe, failureThreshold=3, periodSeconds=10, successThreshold=1, timeoutSeconds=1)
    _handler(probe)


def _handler(handler: Object | None) -> None:
    if handler and isinstance(handler.get("httpGet"), dict):
        _set(handler["httpGet"], path="/", scheme="HTTP")
    if handler and isinstance(handler.get("grpc"), dict):
        _set(handler["grpc"], service="")


def _drop_empty(target: Object, names: Iterable[str]) -> None:
    """Lists without an item are not kept."""
    for name in names:
        if target.get(name) == []:
            del target[name]


def _container(container: Object) -> None:
    _drop_empty(container, ("args", "command", "env", "envFrom", "ports", "volumeMounts"))
    _set(
        container,
        imagePullPolicy=_image_policy(container.get("image", "")),
        resources={},
        terminationMessagePath="/dev/termination-log",
        terminationMessagePolicy="File",
    )
    for port in container.get("ports") or ():
        _set(port, protocol="TCP")
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        _probe(container.get(name))
    for hook in (container.get("lifecycle") or {}).values():
        if isinstance(hook, dict):
            _handler(hook)
    for item in container.get("env") or ():
        reference = (item.get("valueFrom") or {}).get("fieldRef")
        if reference:
            _set(reference, apiVersion="v1")


_SOURCES_WITH_MODE = ("configMap", "secret", "downwardAPI", "projected")


def _volume(volume: Object) -> None:
    if len(volume) == 1:
        volume["emptyDir"] = {}
    for name in _SOURCES_WITH_MODE:
        if isinstance(volume.get(name), dict):
            _set(volume[name], defaultMode=420)
    if isinstance(volume.get("hostPath"), dict):
        _set(volume["hostPath"], type="")
    for source in (volume.get("projected") or {}).get("sources") or ():
        if isinstance(source.get("serviceAccountToken"), dict):
            _set(source["serviceAccountToken"], expirationSeconds=3600)
        _downward(source.get("downwardAPI"))
    _downward(volume.get("downwardAPI"))


def _downward(source: Object | None) -> None:
    for item in (source or {}).get("items") or ():
        if isinstance(item.get("fieldRef"), dict):
            _set(item["fieldRef"], apiVersion="v1")


def pod_spec(spec: Object) -> None:
    """Defaults of a pod spec, in a template or not."""
    _drop_empty(spec, ("imagePullSecrets", "initContainers", "tolerations", "volumes"))
    _set(
        spec,
        dnsPolicy="ClusterFirst",
        restartPolicy="Always",
        schedulerName="default-scheduler",
        securityContext={},
        terminationGracePeriodSeconds=30,
    )
    if spec.get("serviceAccountName"):
        spec["serviceAccount"] = spec["serviceAccountName"]
    elif spec.get("serviceAccount"):
        spec["serviceAccountName"] = spec["serviceAccount"]
    for container in [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]:
        _container(container)
    for volume in spec.get("volumes") or ():
        _volume(volume)


def _template(spec: Object) -> None:
    template = spec.get("template")
    if isinstance(template, dict):
        template.setdefault("metadata", {})
        if isinstance(template.get("spec"), dict):
            pod_spec(template["spec"])


def _pod(pod: Object) -> None:
    spec = pod.setdefault("spec", {})
    pod_spec(spec)
    _set(spec, enableServiceLinks=True)
    for container in [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]:
        resources = container["resources"]
        for name, value in (resources.get("limits") or {}).items():
            resources.setdefault("requests", {}).setdefault(name, value)
    status = pod.setdefault("status", {})
    _set(status, phase="Pending", qosClass=qos_class(spec))


def qos_class(spec: Object) -> str:
    """Guaranteed, Burstable or BestEffort."""
    containers = [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]
    requests = [(item.get("resources") or {}).get("requests") or {} for item in containers]
    limits = [(item.get("resources") or {}).get("limits") or {} for item in containers]
    if not any(requests) and not any(limits):
        return "BestEffort"
    guaranteed = all(
        {"cpu", "memory"} <= limit.keys() and limit == request
        for limit, request in zip(limits, requests, strict=True)
    )
    return "Guaranteed" if guaranteed else "Burstable"


def _deployment(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    _set(spec, replicas=1, revisionHistoryLimit=10, progressDeadlineSeconds=600)
    strategy = spec.setdefault("strategy", {})
    _set(strategy, type="RollingUpdate")
    if strategy["type"] == "RollingUpdate":
        rolling = strategy.get("rollingUpdate")
        if rolling is None:
            rolling = strategy["rollingUpdate"] = {}
        _set(rolling, maxSurge="25%", maxUnavailable="25%")
    _template(spec)
    obj.setdefault("status", {})


def _replicaset(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    _set(spec, replicas=1)
    _template(spec)
    _set(obj.setdefault("status", {}), replicas=0)


def _workload(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    _set(spec, revisionHistoryLimit=10)
    _template(spec)
    obj.setdefault("status", {})


def _job_spec(spec: Object) -> None:
    if spec.get("completions") is None and spec.get("parallelism") is None:
        spec["completions"] = 1
    policy = spec.get("podFailurePolicy")
    _set(
        spec,
        parallelism=1,
        backoffLimit=6,
        completionMode="NonIndexed",
        suspend=False,
        manualSelector=False,
        podReplacementPolicy="Failed" if policy else "TerminatingOrFailed",
    )
    for rule in (policy or {}).get("rules") or ():
        for condition in rule.get("onPodConditions") or ():
            _set(condition, status="True")
    _template(spec)


def _job(obj: Object) -> None:
    _job_spec(obj.setdefault("spec", {}))
    obj.setdefault("status", {})


def _cronjob(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    _set(
        spec,
        concurrencyPolicy="Allow",
        failedJobsHistoryLimit=1,
        successfulJobsHistoryLimit=3,
        suspend=False,
    )
    template = (spec.get("jobTemplate") or {}).get("spec")
    if isinstance(template, dict):
        _template(template)
    obj.setdefault("status", {})


def _service(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    _set(spec, sessionAffinity="None", type="ClusterIP")
    if spec["sessionAffinity"] == "ClientIP":
        _set(spec, sessionAffinityConfig={})
        _set(spec["sessionAffinityConfig"], clientIP={})
        _set(spec["sessionAffinityConfig"]["clientIP"], timeoutSeconds=10800)
    for port in spec.get("ports") or ():
        _set(port, protocol="TCP")
        _set(port, targetPort=port.get("port"))
    if spec["type"] != "ExternalName":
        _set(spec, internalTrafficPolicy="Cluster")
    if spec["type"] in ("NodePort", "LoadBalancer"):
        _set(spec, externalTrafficPolicy="Cluster")
    if spec["type"] == "LoadBalancer":
        _set(spec, allocateLoadBalancerNodePorts=True)
    _set(obj.setdefault("status", {}), loadBalancer={})


def _namespace(obj: Object) -> None:
    labels = obj["metadata"].setdefault("labels", {})
    if obj["metadata"].get("name"):
        labels["kubernetes.io/metadata.name"] = obj["metadata"]["name"]
    _set(obj.setdefault("spec", {}), finalizers=["kubernetes"])
    _set(obj.setdefault("status", {}), phase="Active")


def _networkpolicy(obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    types = ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]
    _set(spec, podSelector={}, policyTypes=types)
    for rule in [*(spec.get("ingress") or ()), *(spec.get("egress") or ())]:
        for port in (rule or {}).get("ports") or ():
            _set(port, protocol="TCP")


def _secret(obj: Object) -> None:
    for key, value in (obj.pop("stringData", None) or {}).items():
        obj.setdefault("data", {})[key] = base64.b64encode(value.encode()).decode()
    _set(obj, type="Opaque")


def _ingress(obj: Object) -> None:
    _set(obj.setdefault("status", {}), loadBalancer={})


def _role_binding(obj: Object) -> None:
    reference = obj.get("roleRef")
    if isinstance(reference, dict):
        _set(reference, apiGroup="rbac.authorization.k8s.io")
    for subject in obj.get("subjects") or ():
        if subject.get("kind") in ("User", "Group"):
            _set(subject, apiGroup="rbac.authorization.k8s.io")


def _endpointslice(obj: Object) -> None:
    for port in obj.get("ports") or ():
        _set(port, name="", protocol="TCP")


def _limitrange(obj: Object) -> None:
    for limit in obj.get("spec", {}).get("limits") or ():
        if limit.get("type") != "Container":
            continue
        for name, value in (limit.get("max") or {}).items():
            limit.setdefault("default", {}).setdefault(name, value)
        for name, value in (limit.get("default") or {}).items():
            limit.setdefault("defaultRequest", {}).setdefault(name, value)
        for name, value in (limit.get("min") or {}).items():
            limit.setdefault("defaultRequest", {}).setdefault(name, value)


def _budget(obj: Object) -> None:
    numbers = ("currentHealthy", "desiredHealthy", "disruptionsAllowed", "expectedPods")
    _set(obj.setdefault("status", {}), **dict.fromkeys(numbers, 0))


def _autoscaler(obj: Object) -> None:
    status = obj.setdefault("status", {})
    status.setdefault("currentMetrics", None)
    _set(status, desiredReplicas=0)


def _event(obj: Object) -> None:
    obj.setdefault("eventTime", None)
    _set(obj, reportingComponent="", reportingInstance="")


_DEFAULTS: dict[str, Callable[[Object], None]] = {
    "pods": _pod,
    "deployments": _deployment,
    "replicasets": _replicaset,
    "statefulsets": _workload,
    "daemonsets": _workload,
    "jobs": _job,
    "cronjobs": _cronjob,
    "services": _service,
    "events": _event,
    "poddisruptionbudgets": _budget,
    "horizontalpodautoscalers": _autoscaler,
    "namespaces": _namespace,
    "networkpolicies": _networkpolicy,
    "secrets": _secret,
    "ingresses": _ingress,
    "rolebindings": _role_binding,
    "clusterrolebindings": _role_binding,
    "endpointslices": _endpointslice,
    "limitranges": _limitrange,
}


def apply_defaults(resource: str, obj: Object) -> None:
    """Fill in the defaults of the kind, in place; what is set stays."""
    fill = _DEFAULTS.get(resource)
    if fill is not None:
        fill(obj)
