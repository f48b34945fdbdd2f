"""ResourceQuota and LimitRange."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from tests.standin.errors import forbidden
from tests.standin.quantities import is_binary, parse, show
from tests.standin.resources import RESOURCES, resource_of

if TYPE_CHECKING:
    from tests.standin.store import Store

Object = dict[str, Any]
Usage = dict[str, Fraction]
_COMPUTE = ("cpu", "memory", "ephemeral-storage")
_OLD_COUNTS = frozenset(
    {
        "pods",
        "services",
        "secrets",
        "configmaps",
        "resourcequotas",
        "persistentvolumeclaims",
        "replicationcontrollers",
    }
)


def _totals(spec: Object, kind: str) -> Usage:
    """What a pod needs of cpu, memory and so on: the most that runs at one time."""
    running: Usage = {}
    highest: Usage = {}
    for container in spec.get("initContainers") or ():
        own = _amounts(container, kind)
        if container.get("restartPolicy") == "Always":
            running = _plus(running, own)
            highest = _most(highest, running)
        else:
            highest = _most(highest, _plus(running, own))
    for container in spec.get("containers") or ():
        running = _plus(running, _amounts(container, kind))
    return _most(highest, running)


def _amounts(container: Object, kind: str) -> Usage:
    values = (container.get("resources") or {}).get(kind) or {}
    return {name: parse(value) for name, value in values.items()}


def _plus(left: Usage, right: Usage) -> Usage:
    names = left.keys() | right.keys()
    return {name: left.get(name, Fraction(0)) + right.get(name, Fraction(0)) for name in names}


def _most(left: Usage, right: Usage) -> Usage:
    names = left.keys() | right.keys()
    return {name: max(left.get(name, Fraction(0)), right.get(name, Fraction(0))) for name in names}


def usage_of(resource: str, obj: Object) -> Usage:
    """What one object uses, by the names that quotas use."""
    used: Usage = {f"count/{resource_of(resource).qualified}": Fraction(1)}
    if resource in _OLD_COUNTS:
        used[resource] = Fraction(1)
    if resource == "services":
        kind, ports = obj["spec"].get("type"), len(obj["spec"].get("ports") or ())
        used["services.nodeports"] = Fraction(ports if kind in ("NodePort", "LoadBalancer") else 0)
        used["services.loadbalancers"] = Fraction(int(kind == "LoadBalancer"))
    if resource == "pods":
        for name, value in _totals(obj["spec"], "requests").items():
            used[f"requests.{name}"] = value
            used[name] = value
        for name, value in _totals(obj["spec"], "limits").items():
            used[f"limits.{name}"] = value
    return used


def counts(resource: str, obj: Object) -> bool:
    """Whether an object counts against a quota: a pod that has ended does not."""
    return resource != "pods" or (obj.get("status") or {}).get("phase") not in (
        "Succeeded",
        "Failed",
    )


def _in_scope(quota: Object, resource: str, obj: Object) -> bool:
    scopes = quota["spec"].get("scopes") or ()
    if not scopes:
        return True
    if resource != "pods":
        return False
    best_effort = obj.get("status", {}).get("qosClass") == "BestEffort"
    ending = obj["spec"].get("activeDeadlineSeconds") is not None
    holds = {
        "BestEffort": best_effort,
        "NotBestEffort": not best_effort,
        "Terminating": ending,
        "NotTerminating": not ending,
    }
    return all(holds.get(scope, True) for scope in scopes)


def _counted_resources(hard: Iterable[str]) -> list[str]:
    found = []
    for resource in RESOURCES:
        names = {f"count/{resource.qualified}", resource.name}
        if resource.name == "services":
            names |= {"services.nodeports", "services.loadbalancers"}
        if resource.name == "pods":
            names |= {f"{kind}{name}" for kind in ("", "requests.", "limits.") for name in _COMPUTE}
        if names & set(hard):
            found.append(resource.name)
    return found


def _used(store: Store, quota: Object) -> Usage:
    hard = quota["spec"].get("hard") or {}
    total: Usage = {name: Fraction(0) for name in hard}
    for resource in _counted_resources(hard):
        for stored in store.snapshot(resource, quota["metadata"]["namespace"])[0]:
            obj = stored.object
            if counts(resource, obj) and _in_scope(quota, resource, obj):
                for name, value in usage_of(resource, obj).items():
                    if name in total:
                        total[name] += value
    return total


def _spelled(usage: Usage, hard: Object, names: list[str]) -> str:
    return ",".join(f"{name}={_show(name, usage[name], hard)}" for name in names)


def _show(name: str, value: Fraction, hard: Object) -> str:
    return show(value, binary=is_binary(str(hard.get(name, ""))) or "memory" in name)


def check_quota(store: Store, resource: str, new: Object) -> None:
    """ApiError 403 when a quota of the namespace does not allow one more such object."""
    for stored in store.snapshot("resourcequotas", new["metadata"].get("namespace"))[0]:
        quota = stored.object
        hard = quota["spec"].get("hard") or {}
        wanted = usage_of(resource, new)
        if not _in_scope(quota, resource, new):
            continue
        title, name = quota["metadata"]["name"], new["metadata"]["name"]
        if resource == "pods":
            unsaid = _unspecified(new["spec"], hard)
            if unsaid:
                text = f"failed quota: {title}: must specify {unsaid}"
                raise forbidden("pods", name, text)
        used = _used(store, quota)
        over = sorted(
            item
            for item in wanted
            if item in hard and wanted[item] and used[item] + wanted[item] > parse(hard[item])
        )
        if over:
            limited = ",".join(f"{item}={hard[item]}" for item in over)
            text = (
                f"exceeded quota: {title}, requested: {_spelled(wanted, hard, over)}, "
                f"used: {_spelled(used, hard, over)}, limited: {limited}"
            )
            raise forbidden(resource, name, text)


def _unspecified(spec: Object, hard: Object) -> str:
    """Which containers do not say what the quota wants to know."""
    found = []
    containers = [*(spec.get("containers") or ()), *(spec.get("initContainers") or ())]
    for item in sorted(hard):
        kind, _, name = item.rpartition(".")
        if name not in _COMPUTE or kind not in ("", "requests", "limits"):
            continue
        without = [
            container["name"]
            for container in containers
            if name not in _amounts(container, kind or "requests")
        ]
        if without:
            found.append(f"{item} for: {','.join(sorted(without))}")
    return "; ".join(found)


def refresh_quotas(store: Store, namespace: str) -> None:
    """Bring the status of a namespace's quotas up to date."""
    for stored in store.snapshot("resourcequotas", namespace)[0]:
        quota = stored.object
        hard = quota["spec"].get("hard") or {}
        used = {name: _show(name, value, hard) for name, value in _used(store, quota).items()}
        status = {"hard": dict(hard), "used": used}
        if quota.get("status") != status:
            name = quota["metadata"]["name"]

            def change(obj: Object, status: Object = status) -> None:
                obj["status"] = status

            store.update_status("resourcequotas", namespace, name, change)


# LimitRange


def _limits(store: Store, namespace: str, kind: str) -> list[Object]:
    return [
        limit
        for stored in store.snapshot("limitranges", namespace)[0]
        for limit in stored.object["spec"].get("limits") or ()
        if limit.get("type") == kind
    ]


def apply_limit_ranges(store: Store, pod: Object) -> None:
    """Fill in the default requests and limits of the namespace."""
    notes = []
    for limit in _limits(store, pod["metadata"].get("namespace", ""), "Container"):
        for kind in ("containers", "initContainers"):
            for container in pod["spec"].get(kind) or ():
                word = "container" if kind == "containers" else "init container"
                notes += _fill(container, limit, word)
    if notes:
        annotations = pod["metadata"].setdefault("annotations", {})
        annotations["kubernetes.io/limit-ranger"] = "LimitRanger plugin set: " + "; ".join(notes)


def _fill(container: Object, limit: Object, word: str) -> list[str]:
    notes = []
    resources = container.setdefault("resources", {})
    for kind, source in (("requests", "defaultRequest"), ("limits", "default")):
        added = []
        for name, value in (limit.get(source) or {}).items():
            if name not in (resources.get(kind) or {}):
                resources.setdefault(kind, {})[name] = value
                added.append(name)
        if added:
            noun = kind.removesuffix("s")
            notes.append(f"{', '.join(sorted(added))} {noun} for {word} {container['name']}")
    return notes


def check_limit_ranges(store: Store, pod: Object) -> None:
    """ApiError 403 when a container or the pod is outside of the namespace's limits."""
    namespace = pod["metadata"].get("namespace", "")
    spec = pod["spec"]
    containers = [*(spec.get("containers") or ()), *(spec.get("initContainers") or ())]
    texts = []
    for limit in _limits(store, namespace, "Container"):
        for item in containers:
            texts += _outside(limit, _amounts(item, "requests"), _amounts(item, "limits"))
    for limit in _limits(store, namespace, "Pod"):
        texts += _outside(limit, _totals(spec, "requests"), _totals(spec, "limits"))
    if texts:
        joined = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
        raise forbidden("pods", pod["metadata"]["name"], joined)


def _outside(limit: Object, requests: Usage, limits: Usage) -> list[str]:
    texts = []
    of = limit["type"]
    for name, bound in sorted((limit.get("min") or {}).items()):
        start = f"minimum {name} usage per {of} is {bound}"
        if name not in requests:
            texts.append(f"{start}.  No request is specified")
        elif requests[name] < parse(bound):
            value = show(requests[name], binary="memory" in name)
            texts.append(f"{start}, but request is {value}")
    for name, bound in sorted((limit.get("max") or {}).items()):
        start = f"maximum {name} usage per {of} is {bound}"
        if name not in limits:
            texts.append(f"{start}.  No limit is specified")
        elif limits[name] > parse(bound):
            value = show(limits[name], binary="memory" in name)
            texts.append(f"{start}, but limit is {value}")
    return texts
