"""The rules that objects must keep, and the words in which the API server says so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from tests.standin.errors import invalid
from tests.standin.quantities import parse
from tests.standin.resources import resource_of
from tests.standin.selectors import matches_selector

Object = dict[str, Any]
Cause = tuple[str, str, str]

MAX_ANNOTATIONS = 262_144
MAX_DATA = 1_048_576
_SUBDOMAIN_FORMAT = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_LABEL_FORMAT = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_LABEL_1035_FORMAT = r"[a-z]([-a-z0-9]*[a-z0-9])?"
_VALUE_FORMAT = r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?"
_NAME_FORMAT = r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]"
_CONFIG_KEY_FORMAT = r"[-._a-zA-Z0-9]+"

SUBDOMAIN = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or "
    "'.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used "
    f"for validation is '{_SUBDOMAIN_FORMAT}')"
)
LABEL = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and "
    "must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used "
    f"for validation is '{_LABEL_FORMAT}')"
)
LABEL_1035 = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an "
    "alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', "
    f"regex used for validation is '{_LABEL_1035_FORMAT}')"
)
LABEL_VALUE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or "
    "'.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value', "
    f" or '12345', regex used for validation is '{_VALUE_FORMAT}')"
)
QUALIFIED_NAME = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end "
    "with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for "
    f"validation is '{_NAME_FORMAT}')"
)
CONFIG_KEY = (
    "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. "
    "'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is "
    f"'{_CONFIG_KEY_FORMAT}')"
)
PORT_RANGE = "must be between 1 and 65535, inclusive"
_LABEL_NAMES = frozenset({"namespaces"})
_FREE_NAMES = frozenset({"roles", "rolebindings", "clusterroles", "clusterrolebindings"})


def shown(value: Any) -> str:
    """A value as it stands in a message."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False)


def wrong(field: str, value: Any, why: str) -> Cause:
    """An invalid value."""
    return field, "FieldValueInvalid", f"Invalid value: {shown(value)}: {why}"


def missing(field: str, why: str = "") -> Cause:
    """A required value that is not there."""
    return field, "FieldValueRequired", f"Required value: {why}" if why else "Required value"


def banned(field: str, why: str) -> Cause:
    """Something that may not be set or changed."""
    return field, "FieldValueForbidden", f"Forbidden: {why}"


def unsupported(field: str, value: Any, known: Iterable[str]) -> Cause:
    """A value out of a closed list."""
    listed = ", ".join(f'"{item}"' for item in known)
    text = f"Unsupported value: {shown(value)}: supported values: {listed}"
    return field, "FieldValueNotSupported", text


def duplicate(field: str, value: Any) -> Cause:
    """A value that may stand only once."""
    return field, "FieldValueDuplicate", f"Duplicate value: {shown(value)}"


def too_long(field: str, limit: int) -> Cause:
    """Something that is too large."""
    return field, "FieldValueTooLong", f"Too long: may not be more than {limit} bytes"


def _matches(pattern: str, text: str) -> bool:
    return re.fullmatch(pattern, text) is not None


def _dns(field: str, value: str, pattern: str, why: str, limit: int) -> list[Cause]:
    if len(value) > limit:
        return [wrong(field, value, f"must be no more than {limit} bytes")]
    return [] if _matches(pattern, value) else [wrong(field, value, why)]


def _label_name(field: str, value: str) -> list[Cause]:
    return _dns(field, value, _LABEL_FORMAT, LABEL, 63)


def _labels(field: str, labels: Object | None) -> list[Cause]:
    found = []
    for key, value in (labels or {}).items():
        found += _qualified(field, key)
        if len(value) > 63:
            found.append(wrong(field, value, "must be no more than 63 bytes"))
        elif not _matches(_VALUE_FORMAT, value):
            found.append(wrong(field, value, LABEL_VALUE))
    return found


def _qualified(field: str, key: str) -> list[Cause]:
    prefix, slash, name = key.rpartition("/")
    found = []
    if slash and not _matches(_SUBDOMAIN_FORMAT, prefix):
        found.append(wrong(field, key, f"prefix part {SUBDOMAIN}"))
    if len(name) > 63:
        found.append(wrong(field, key, "name part must be no more than 63 bytes"))
    elif not _matches(_NAME_FORMAT, name):
        found.append(wrong(field, key, QUALIFIED_NAME))
    return found


def _name(resource: str, name: str) -> list[Cause]:
    field = "metadata.name"
    if resource in _LABEL_NAMES:
        return _label_name(field, name)
    if resource == "services":
        return _dns(field, name, _LABEL_1035_FORMAT, LABEL_1035, 63)
    if resource in _FREE_NAMES:
        bad = name in (".", "..") or "/" in name or "%" in name
        return [wrong(field, name, "may not contain '/'")] if bad else []
    return _dns(field, name, _SUBDOMAIN_FORMAT, SUBDOMAIN, 253)


def _metadata(resource: str, meta: Object) -> list[Cause]:
    name = meta.get("name")
    if not name:
        return [missing("metadata.name", "name or generateName is required")]
    annotations = meta.get("annotations") or {}
    found = [*_name(resource, name), *_labels("metadata.labels", meta.get("labels"))]
    for key in annotations:
        found += _qualified("metadata.annotations", key.lower())
    size = sum(len(key.encode()) + len(value.encode()) for key, value in annotations.items())
    if size > MAX_ANNOTATIONS:
        found.append(too_long("metadata.annotations", MAX_ANNOTATIONS))
    return found


# Pods and their templates


def _port(field: str, value: Any) -> list[Cause]:
    good = isinstance(value, int) and 1 <= value <= 65535
    return [] if good else [wrong(field, value, PORT_RANGE)]


def _port_name(field: str, name: str) -> list[Cause]:
    if len(name) > 15:
        return [wrong(field, name, "must be no more than 15 characters")]
    if not _matches(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name):
        why = (
            "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)"
            if not _matches(r"[-a-z0-9]*", name)
            else "must not begin or end with a hyphen"
        )
        return [wrong(field, name, why)]
    if not re.search("[a-z]", name):
        return [wrong(field, name, "must contain at least one letter (a-z)")]
    return []


def _probe(field: str, probe: Object | None) -> list[Cause]:
    if probe is None:
        return []
    if not any(probe.get(kind) for kind in ("httpGet", "exec", "tcpSocket", "grpc")):
        return [missing(field, "must specify a handler type")]
    found = []
    for kind in ("httpGet", "tcpSocket"):
        port = (probe.get(kind) or {}).get("port")
        if probe.get(kind) and isinstance(port, int):
            found += _port(f"{field}.{kind}.port", port)
        elif probe.get(kind) and port is None:
            found += [wrong(f"{field}.{kind}.port", 0, PORT_RANGE)]
    for name in ("initialDelaySeconds", "periodSeconds", "timeoutSeconds", "failureThreshold"):
        if probe.get(name, 0) < 0:
            why = "must be greater than or equal to 0"
            found.append(wrong(f"{field}.{name}", probe[name], why))
    if "liveness" in field and probe.get("successThreshold", 1) != 1:
        found.append(wrong(f"{field}.successThreshold", probe["successThreshold"], "must be 1"))
    return found


def _resources(field: str, resources: Object) -> list[Cause]:
    found = []
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    for kind, values in (("limits", limits), ("requests", requests)):
        for name, value in values.items():
            if parse(value) < 0:
                why = "must be greater than or equal to 0"
                found.append(wrong(f"{field}.{kind}.{name}", value, why))
    for name, value in requests.items():
        if name in limits and parse(value) > parse(limits[name]):
            why = f"must be less than or equal to {name} limit of {limits[name]}"
            found.append(wrong(f"{field}.requests", value, why))
    return found


def _mounts(field: str, mounts: list[Object], volumes: set[str]) -> list[Cause]:
    found = []
    paths: set[str] = set()
    for at, mount in enumerate(mounts):
        here = f"{field}[{at}]"
        if not mount.get("name"):
            found.append(missing(f"{here}.name"))
        elif mount["name"] not in volumes:
            text = f"Not found: {shown(mount['name'])}"
            found.append((f"{here}.name", "FieldValueNotFound", text))
        path = mount.get("mountPath")
        if not path:
            found.append(missing(f"{here}.mountPath"))
        elif path in paths:
            found.append(wrong(f"{here}.mountPath", path, "must be unique"))
        paths.add(path or "")
    return found


_ENV_NAME = (
    "a valid environment variable name must consist only of printable ASCII characters other "
    "than '='"
)


def _env(field: str, items: list[Object]) -> list[Cause]:
    found = []
    for at, item in enumerate(items):
        name = item.get("name")
        if not name:
            found.append(missing(f"{field}[{at}].name"))
        elif not _matches(r"[ -<>-~]+", name):
            found.append(wrong(f"{field}[{at}].name", name, _ENV_NAME))
        if item.get("value") and item.get("valueFrom"):
            why = "may not be specified when `value` is not empty"
            found.append(wrong(f"{field}[{at}].valueFrom", "", why))
    return found


_POLICIES = ("Always", "IfNotPresent", "Never")


def _container(field: str, container: Object, volumes: set[str]) -> list[Cause]:
    found = []
    if not container.get("name"):
        found.append(missing(f"{field}.name"))
    else:
        found += _label_name(f"{field}.name", container["name"])
    if not container.get("image"):
        found.append(missing(f"{field}.image"))
    policy = container.get("imagePullPolicy")
    if policy not in _POLICIES:
        found.append(unsupported(f"{field}.imagePullPolicy", policy, _POLICIES))
    found += _container_ports(f"{field}.ports", container.get("ports") or [])
    found += _env(f"{field}.env", container.get("env") or [])
    found += _mounts(f"{field}.volumeMounts", container.get("volumeMounts") or [], volumes)
    found += _resources(f"{field}.resources", container.get("resources") or {})
    for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
        found += _probe(f"{field}.{kind}", container.get(kind))
    for kind in ("preStop", "postStart"):
        hook = (container.get("lifecycle") or {}).get(kind)
        if hook is not None and not any(
            hook.get(way) for way in ("exec", "httpGet", "tcpSocket", "sleep")
        ):
            found.append(missing(f"{field}.lifecycle.{kind}", "must specify a handler type"))
    return found


def _container_ports(field: str, ports: list[Object]) -> list[Cause]:
    found = []
    names: set[str] = set()
    for at, port in enumerate(ports):
        here = f"{field}[{at}]"
        name = port.get("name")
        if name:
            found += _port_name(f"{here}.name", name)
            if name in names:
                found.append(duplicate(f"{here}.name", name))
            names.add(name)
        if not port.get("containerPort"):
            found.append(missing(f"{here}.containerPort"))
        else:
            found += _port(f"{here}.containerPort", port["containerPort"])
        if port.get("protocol") not in ("TCP", "UDP", "SCTP"):
            found.append(
                unsupported(f"{here}.protocol", port.get("protocol"), ("SCTP", "TCP", "UDP"))
            )
    return found


def _volumes(field: str, volumes: list[Object]) -> list[Cause]:
    found = []
    names: set[str] = set()
    for at, volume in enumerate(volumes):
        name = volume.get("name")
        if not name:
            found.append(missing(f"{field}[{at}].name"))
            continue
        found += _label_name(f"{field}[{at}].name", name)
        if name in names:
            found.append(duplicate(f"{field}[{at}].name", name))
        names.add(name)
        if len(volume) > 2:
            extra = sorted(key for key in volume if key != "name")[1]
            why = "may not specify more than 1 volume type"
            found.append(banned(f"{field}[{at}].{extra}", why))
        if "configMap" in volume and not volume["configMap"].get("name"):
            found.append(missing(f"{field}[{at}].configMap.name"))
        if "secret" in volume and not volume["secret"].get("secretName"):
            found.append(missing(f"{field}[{at}].secret.secretName"))
    return found


def _pod_spec(field: str, spec: Object | None) -> list[Cause]:
    if not spec:
        return [missing(f"{field}.containers")]
    volumes = {item.get("name", "") for item in spec.get("volumes") or ()}
    found = _volumes(f"{field}.volumes", spec.get("volumes") or [])
    if not spec.get("containers"):
        found.append(missing(f"{field}.containers"))
    names: set[str] = set()
    for kind in ("containers", "initContainers"):
        for at, container in enumerate(spec.get(kind) or ()):
            here = f"{field}.{kind}[{at}]"
            found += _container(here, container, volumes)
            if kind == "initContainers":
                found += _init_container(here, container)
            if container.get("name") in names:
                found.append(duplicate(f"{here}.name", container["name"]))
            names.add(container.get("name", ""))
    policy = spec.get("restartPolicy")
    if policy not in ("Always", "OnFailure", "Never"):
        known = ("Always", "OnFailure", "Never")
        found.append(unsupported(f"{field}.restartPolicy", policy, known))
    if spec.get("terminationGracePeriodSeconds", 0) < 0:
        value = spec["terminationGracePeriodSeconds"]
        why = "must be greater than or equal to 0"
        found.append(wrong(f"{field}.terminationGracePeriodSeconds", value, why))
    found += _labels(f"{field}.nodeSelector", spec.get("nodeSelector"))
    return found


def _init_container(field: str, container: Object) -> list[Cause]:
    policy = container.get("restartPolicy")
    if policy == "Always":
        return []
    found = []
    if policy is not None:
        found.append(unsupported(f"{field}.restartPolicy", policy, ("Always",)))
    for kind in ("livenessProbe", "readinessProbe", "startupProbe", "lifecycle"):
        if container.get(kind):
            why = "may not be set for init containers without restartPolicy=Always"
            found.append(banned(f"{field}.{kind}", why))
    return found


def _template(spec: Object, *, restart: tuple[str, ...]) -> list[Cause]:
    template = spec.get("template") or {}
    found = _labels("spec.template.labels", (template.get("metadata") or {}).get("labels"))
    found += _pod_spec("spec.template.spec", template.get("spec"))
    policy = (template.get("spec") or {}).get("restartPolicy")
    if template.get("spec") and policy not in restart:
        if len(restart) > 1:
            text = 'valid values: "OnFailure", "Never"'
            found.append(missing("spec.template.spec.restartPolicy", text))
        else:
            found.append(unsupported("spec.template.spec.restartPolicy", policy, restart))
    return found


def _pod(new: Object, old: Object | None) -> list[Cause]:
    if old is None:
        return _pod_spec("spec", new.get("spec"))
    if _frozen_pod(new["spec"]) == _frozen_pod(old["spec"]):
        return []
    why = (
        "pod updates may not change fields other than `spec.containers[*].image`,"
        "`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only "
        "additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be "
        "set to 1 if it was previously negative)"
    )
    return [banned("spec", why)]


def _frozen_pod(spec: Object) -> Object:
    """A pod's spec without what may change."""
    kept = {
        key: value
        for key, value in spec.items()
        if key not in ("activeDeadlineSeconds", "tolerations", "nodeName")
    }
    for kind in ("containers", "initContainers"):
        kept[kind] = [{**item, "image": ""} for item in spec.get(kind) or ()]
    return kept


# Workloads


def _selected(spec: Object, old: Object | None, *, restart: tuple[str, ...]) -> list[Cause]:
    """Workloads with a selector: required, fits the template, never changes."""
    selector = spec.get("selector")
    labels = ((spec.get("template") or {}).get("metadata") or {}).get("labels") or {}
    found = []
    empty = not selector or not (selector.get("matchLabels") or selector.get("matchExpressions"))
    if not selector:
        found.append(missing("spec.selector"))
    elif empty:
        found.append(wrong("spec.selector", selector, "empty selector is invalid for deployment"))
    if not empty and not matches_selector(selector, labels):
        why = "`selector` does not match template `labels`"
        found.append(wrong("spec.template.metadata.labels", labels, why))
    found += _template(spec, restart=restart)
    for name in ("replicas", "minReadySeconds", "revisionHistoryLimit"):
        if spec.get(name, 0) < 0:
            why = "must be greater than or equal to 0"
            found.append(wrong(f"spec.{name}", spec[name], why))
    if old is not None and old["spec"].get("selector") != selector:
        found.append(wrong("spec.selector", selector, "field is immutable"))
    return found


def _deployment(new: Object, old: Object | None) -> list[Cause]:
    spec = new["spec"]
    found = _selected(spec, old, restart=("Always",))
    strategy = spec.get("strategy") or {}
    if strategy.get("type") not in ("Recreate", "RollingUpdate"):
        known = ("Recreate", "RollingUpdate")
        found.append(unsupported("spec.strategy.type", strategy.get("type"), known))
    rolling = strategy.get("rollingUpdate")
    if strategy.get("type") == "Recreate" and rolling is not None:
        why = "may not be specified when strategy `type` is 'Recreate'"
        found.append(banned("spec.strategy.rollingUpdate", why))
    elif rolling and not _amount(rolling["maxUnavailable"]) and not _amount(rolling["maxSurge"]):
        field = "spec.strategy.rollingUpdate.maxUnavailable"
        value = rolling["maxUnavailable"]
        found.append(wrong(field, value, "may not be 0 when `maxSurge` is 0"))
    if spec["progressDeadlineSeconds"] <= spec.get("minReadySeconds", 0):
        why = "must be greater than minReadySeconds"
        value = spec["progressDeadlineSeconds"]
        found.append(wrong("spec.progressDeadlineSeconds", value, why))
    return found


def _amount(value: Any) -> int:
    text = str(value).removesuffix("%")
    return int(text) if text.isdigit() else 0


def _replicaset(new: Object, old: Object | None) -> list[Cause]:
    return _selected(new["spec"], old, restart=("Always",))


_JOB_NUMBERS = (
    "parallelism",
    "completions",
    "backoffLimit",
    "activeDeadlineSeconds",
    "ttlSecondsAfterFinished",
)
# What may change in the template of a Job that has never run.
_SCHEDULING = ("nodeSelector", "tolerations", "affinity", "schedulingGates")


def _job(new: Object, old: Object | None) -> list[Cause]:
    spec = new["spec"]
    found = []
    for name in _JOB_NUMBERS:
        if spec.get(name, 0) < 0:
            why = "must be greater than or equal to 0"
            found.append(wrong(f"spec.{name}", spec[name], why))
    found += _failure_policy(spec)
    found += _template(spec, restart=("OnFailure", "Never"))
    if old is None:
        return found
    before = old["spec"]
    fixed = ["selector", "completionMode", "podFailurePolicy", "backoffLimitPerIndex"]
    if spec.get("completionMode") != "Indexed":
        fixed.insert(0, "completions")
    found += [
        wrong(f"spec.{name}", spec.get(name), "field is immutable")
        for name in fixed
        if spec.get(name) != before.get(name)
    ]
    if not _same_template(spec, before, old.get("status") or {}):
        found.append(wrong("spec.template", spec.get("template"), "field is immutable"))
    return found


def _same_template(new: Object, old: Object, status: Object) -> bool:
    left, right = new.get("template") or {}, old.get("template") or {}
    if not old.get("suspend") or status.get("startTime"):
        return bool(left == right)

    def fixed(template: Object) -> Object:
        spec = template.get("spec") or {}
        return {key: value for key, value in spec.items() if key not in _SCHEDULING}

    return fixed(left) == fixed(right)


def _failure_policy(spec: Object) -> list[Cause]:
    policy = spec.get("podFailurePolicy")
    if policy is None:
        return []
    found = []
    names = {
        item.get("name")
        for kind in ("containers", "initContainers")
        for item in ((spec.get("template") or {}).get("spec") or {}).get(kind) or ()
    }
    for at, rule in enumerate(policy.get("rules") or ()):
        here = f"spec.podFailurePolicy.rules[{at}]"
        codes = rule.get("onExitCodes") or {}
        if bool(codes) == bool(rule.get("onPodConditions")):
            why = "specifying one of OnExitCodes and OnPodConditions is required"
            found.append(wrong(here, rule, why))
        container = codes.get("containerName")
        if container and container not in names:
            why = "must be one of the container or initContainer names in the pod template"
            found.append(wrong(f"{here}.onExitCodes.containerName", container, why))
        if codes.get("operator") == "In" and 0 in (codes.get("values") or ()):
            index = codes["values"].index(0)
            field = f"{here}.onExitCodes.values[{index}]"
            found.append(wrong(field, 0, "must not be 0 for the In operator"))
    template = (spec.get("template") or {}).get("spec") or {}
    if template.get("restartPolicy") != "Never":
        why = 'only "Never" is supported when podFailurePolicy is specified'
        value = template.get("restartPolicy")
        found.append(wrong("spec.template.spec.restartPolicy", value, why))
    return found


# Everything else

_SERVICE_TYPES = ("ClusterIP", "ExternalName", "LoadBalancer", "NodePort")
_EXTERNAL_TYPES = ("LoadBalancer", "NodePort")
_ROUTING_VALUES = {
    "internalTrafficPolicy": ("Cluster", "Local"),
    "trafficDistribution": ("PreferClose", "PreferSameNode", "PreferSameZone"),
}
_BALANCER_FIELDS = (
    "allocateLoadBalancerNodePorts",
    "loadBalancerClass",
    "loadBalancerSourceRanges",
)
AFFINITY_SECONDS = 86400
CRON_FIELDS = 5


def _service(new: Object, old: Object | None) -> list[Cause]:
    spec = new["spec"]
    ports = spec.get("ports") or []
    found = []
    headless = spec.get("clusterIP") == "None"
    if not ports and not headless and spec.get("type") != "ExternalName":
        found.append(missing("spec.ports"))
    names: set[str] = set()
    seen: set[tuple[Any, Any]] = set()
    for at, port in enumerate(ports):
        here = f"spec.ports[{at}]"
        found += _service_port(here, port, several=len(ports) > 1)
        name = port.get("name")
        if name and name in names:
            found.append(duplicate(f"{here}.name", name))
        names.add(name or "")
        key = (port.get("port"), port.get("protocol"))
        if key in seen:
            found.append(duplicate(here, {"port": key[0], "protocol": key[1]}))
        seen.add(key)
    found += _labels("spec.selector", spec.get("selector"))
    found += _service_routing(spec)
    return found + _service_type(spec, (old or {}).get("spec") or {})


def _service_routing(spec: Object) -> list[Cause]:
    """How a Service chooses among its endpoints."""
    found = []
    affinity = spec.get("sessionAffinity")
    config = spec.get("sessionAffinityConfig")
    if affinity not in ("ClientIP", "None"):
        found.append(unsupported("spec.sessionAffinity", affinity, ("ClientIP", "None")))
    if affinity == "None" and config is not None:
        why = "must not be set when session affinity is None"
        found.append(banned("spec.sessionAffinityConfig", why))
    if affinity == "ClientIP":
        seconds = config["clientIP"]["timeoutSeconds"]
        if not 0 < seconds <= AFFINITY_SECONDS:
            field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
            why = f"must be greater than 0 and less than {AFFINITY_SECONDS}"
            found.append(wrong(field, seconds, why))
    for field, values in _ROUTING_VALUES.items():
        if (value := spec.get(field)) and value not in values:
            found.append(unsupported(f"spec.{field}", value, values))
    return found


def _service_type(spec: Object, before: Object) -> list[Cause]:
    """What the type of a Service allows, and what stays when it is changed."""
    found = []
    if spec.get("type") not in _SERVICE_TYPES:
        found.append(unsupported("spec.type", spec.get("type"), _SERVICE_TYPES))
    address = before.get("clusterIP")
    if (
        address
        and spec.get("clusterIP") != address
        and "ExternalName"
        not in (
            spec.get("type"),
            before.get("type"),
        )
    ):
        field, value = "spec.clusterIPs[0]", spec.get("clusterIP")
        found.append(wrong(field, [value], "may not change once set"))
        if value == "None" and spec.get("type") in _EXTERNAL_TYPES:
            why = f"may not be set to 'None' for {spec['type']} services"
            found.append(wrong(field, value, why))
    policy = spec.get("externalTrafficPolicy")
    if policy and spec.get("type") not in _EXTERNAL_TYPES:
        why = "may only be set for externally-accessible services"
        found.append(wrong("spec.externalTrafficPolicy", policy, why))
    if spec.get("type") == "ClusterIP":
        why = "may not be used when `type` is 'ClusterIP'"
        numbers = [port.get("nodePort") for port in spec.get("ports") or []]
        found += [banned(f"spec.ports[{at}].nodePort", why) for at, n in enumerate(numbers) if n]
    return found + _service_balancer(spec, before)


def _service_balancer(spec: Object, before: Object) -> list[Cause]:
    """What only a Service of type LoadBalancer has, and what stays of that."""
    if spec.get("type") != "LoadBalancer":
        why = "may only be used when `type` is 'LoadBalancer'"
        return [banned(f"spec.{key}", why) for key in _BALANCER_FIELDS if spec.get(key) is not None]
    name = spec.get("loadBalancerClass")
    if before.get("type") == "LoadBalancer" and name != before.get("loadBalancerClass"):
        return [wrong("spec.loadBalancerClass", name, "may not change once set")]
    return []


def _cronjob(new: Object, _: Object | None) -> list[Cause]:
    schedule = str(new["spec"].get("schedule", ""))
    fields = schedule.split()
    if schedule.startswith("@") or len(fields) == CRON_FIELDS:
        return []
    why = f"expected exactly {CRON_FIELDS} fields, found {len(fields)}: [{' '.join(fields)}]"
    return [wrong("spec.schedule", schedule, why)]


def _service_port(field: str, port: Object, *, several: bool) -> list[Cause]:
    found = []
    if several and not port.get("name"):
        found.append(missing(f"{field}.name"))
    elif port.get("name"):
        found += _label_name(f"{field}.name", port["name"])
    found += _port(f"{field}.port", port.get("port", 0))
    if port.get("protocol") not in ("TCP", "UDP", "SCTP"):
        found.append(unsupported(f"{field}.protocol", port.get("protocol"), ("SCTP", "TCP", "UDP")))
    target = port.get("targetPort")
    if isinstance(target, int):
        found += _port(f"{field}.targetPort", target)
    elif isinstance(target, str):
        found += _port_name(f"{field}.targetPort", target)
    return found


def _config(new: Object, old: Object | None) -> list[Cause]:
    found = []
    size = 0
    for field in ("data", "binaryData"):
        for key, value in (new.get(field) or {}).items():
            size += len(value.encode())
            if not _matches(_CONFIG_KEY_FORMAT, key):
                found.append(wrong(f"{field}[{key}]", key, CONFIG_KEY))
    if size > MAX_DATA:
        found.append(too_long("[]", MAX_DATA))
    if old is not None and old.get("immutable"):
        why = "field is immutable when `immutable` is set"
        found += [
            banned(field, why)
            for field in ("immutable", "data", "binaryData")
            if (new.get(field) or None) != (old.get(field) or None)
        ]
    if old is not None and old.get("type") != new.get("type"):
        found.append(wrong("type", new.get("type"), "field is immutable"))
    return found


def _ingress(new: Object, _: Object | None) -> list[Cause]:
    spec = new.get("spec") or {}
    found = []
    if not spec.get("rules") and not spec.get("defaultBackend"):
        why = "either `defaultBackend` or `rules` must be specified"
        found.append(wrong("spec", spec, why))
    for at, rule in enumerate(spec.get("rules") or ()):
        for number, path in enumerate((rule.get("http") or {}).get("paths") or ()):
            here = f"spec.rules[{at}].http.paths[{number}]"
            if not path.get("pathType"):
                found.append(missing(f"{here}.pathType", "pathType must be specified"))
            service = (path.get("backend") or {}).get("service")
            if not service:
                found.append(missing(f"{here}.backend", "cannot set both resource and service"))
            elif not service.get("name"):
                found.append(missing(f"{here}.backend.service.name"))
    return found


def _role(new: Object, _: Object | None) -> list[Cause]:
    found = []
    for at, rule in enumerate(new.get("rules") or ()):
        if not rule.get("verbs"):
            found.append(missing(f"rules[{at}].verbs", "verbs must contain at least one value"))
        if not rule.get("nonResourceURLs") and not rule.get("apiGroups"):
            why = "resource rules must supply at least one api group"
            found.append(missing(f"rules[{at}].apiGroups", why))
        if not rule.get("nonResourceURLs") and not rule.get("resources"):
            why = "resource rules must supply at least one resource"
            found.append(missing(f"rules[{at}].resources", why))
    return found


def _role_binding(new: Object, old: Object | None) -> list[Cause]:
    found = []
    reference = new.get("roleRef") or {}
    if not reference.get("name"):
        found.append(missing("roleRef.name"))
    for at, subject in enumerate(new.get("subjects") or ()):
        if subject.get("kind") not in ("ServiceAccount", "User", "Group"):
            known = ("ServiceAccount", "User", "Group")
            found.append(unsupported(f"subjects[{at}].kind", subject.get("kind"), known))
        if not subject.get("name"):
            found.append(missing(f"subjects[{at}].name"))
        in_cluster = "namespace" not in new["metadata"]
        if subject.get("kind") == "ServiceAccount" and in_cluster and not subject.get("namespace"):
            found.append(missing(f"subjects[{at}].namespace"))
    if old is not None and old.get("roleRef") != reference:
        found.append(wrong("roleRef", reference, "cannot change roleRef"))
    return found


_RULES: dict[str, Callable[[Object, Object | None], list[Cause]]] = {
    "pods": _pod,
    "deployments": _deployment,
    "replicasets": _replicaset,
    "jobs": _job,
    "services": _service,
    "cronjobs": _cronjob,
    "configmaps": _config,
    "secrets": _config,
    "ingresses": _ingress,
    "roles": _role,
    "clusterroles": _role,
    "rolebindings": _role_binding,
    "clusterrolebindings": _role_binding,
}


def validate(resource: str, new: Object, old: Object | None) -> None:
    """Nothing when the object keeps the rules of its kind, else ApiError 422 with every fault."""
    causes = _metadata(resource, new["metadata"])
    rules = _RULES.get(resource)
    if rules is not None:
        causes += rules(new, old)
    if causes:
        raise invalid(resource_of(resource).name, new["metadata"].get("name", ""), causes)
