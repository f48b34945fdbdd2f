"""What the cluster adds to objects, and refuses, before they are stored."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from tests.standin import podsecurity
from tests.standin.defaults import apply_defaults, qos_class
from tests.standin.errors import forbidden, invalid, not_found
from tests.standin.quota import (
    apply_limit_ranges,
    check_limit_ranges,
    check_quota,
    counts,
    refresh_quotas,
)
from tests.standin.resources import resource_of
from tests.standin.validation import missing, validate, wrong

if TYPE_CHECKING:
    from tests.standin.store import Store

Object = dict[str, Any]
NODE_PORTS = range(30000, 32768)
TOKEN_PATH = "/var/run/secrets/kubernetes.io/serviceaccount"
_TEMPLATES = ("deployments", "replicasets", "statefulsets", "daemonsets", "jobs")
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
_NOT_WHILE_TERMINATING = "because it is being terminated"


class ClusterHooks:
    """Defaults, validation and admission of the stand-in, as the store calls them."""

    def prepare(self, store: Store, resource: str, new: Object, old: Object | None) -> None:
        """Fill defaults and what admission sets, in place."""
        if old is None:
            _check_namespace(store, resource, new)
        apply_defaults(resource, new)
        if resource == "services":
            _allocate(store, new, old)
        elif resource == "jobs" and old is None:
            _select_own_pods(new)
        elif resource == "pods" and old is None:
            _complete_pod(store, new)

    def check(self, store: Store, resource: str, new: Object, old: Object | None) -> None:
        """Raise ApiError where validation or admission refuses."""
        validate(resource, new, old)
        if old is not None:
            return
        if resource == "pods":
            check_limit_ranges(store, new)
            _check_pod_security(store, new)
        if resource_of(resource).namespaced:
            check_quota(store, resource, new)

    def written(self, store: Store, resource: str, new: Object | None, old: Object | None) -> None:
        """Keep what follows from a change."""
        subject = new or old
        if subject is None:
            return
        if resource == "namespaces" and old is None:
            _furnish(store, subject["metadata"]["name"])
        namespace = subject["metadata"].get("namespace")
        if namespace and (
            resource == "resourcequotas"
            or new is None
            or old is None
            or counts(resource, new) != counts(resource, old)
        ):
            refresh_quotas(store, namespace)


def _check_namespace(store: Store, resource: str, new: Object) -> None:
    namespace = new["metadata"].get("namespace")
    if not namespace:
        return
    stored = store.find_stored("namespaces", None, namespace)
    if stored is None:
        raise not_found("namespaces", namespace)
    if "deletionTimestamp" in stored.object["metadata"]:
        text = f"unable to create new content in namespace {namespace} {_NOT_WHILE_TERMINATING}"
        raise forbidden(resource, new["metadata"].get("name", ""), text)


def _furnish(store: Store, namespace: str) -> None:
    """What controllers put into every new namespace."""
    store.create("serviceaccounts", {"metadata": {"name": "default", "namespace": namespace}})
    meta = {"name": "kube-root-ca.crt", "namespace": namespace}
    store.create("configmaps", {"metadata": meta, "data": {"ca.crt": ""}})


# Services


def _allocate(store: Store, new: Object, old: Object | None) -> None:
    spec, before = new["spec"], (old or {}).get("spec") or {}
    if spec["type"] == "ExternalName":
        return
    if not spec.get("clusterIP") and spec.get("clusterIPs"):
        spec["clusterIP"] = spec["clusterIPs"][0]
    if not spec.get("clusterIP"):
        spec["clusterIP"] = before.get("clusterIP") or store.allocate_ip()
    spec.setdefault("clusterIPs", [spec["clusterIP"]])
    spec.setdefault("ipFamilies", before.get("ipFamilies") or ["IPv4"])
    spec.setdefault("ipFamilyPolicy", before.get("ipFamilyPolicy") or "SingleStack")
    if spec["type"] in ("NodePort", "LoadBalancer"):
        _allocate_node_ports(store, new, before)
    if spec["type"] == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local":
        spec.setdefault("healthCheckNodePort", random.choice(NODE_PORTS))
    else:
        _drop_unchanged(spec, before, "healthCheckNodePort")
    if spec["type"] == "ClusterIP" and before.get("type") in ("NodePort", "LoadBalancer"):
        for port in spec.get("ports") or ():
            port.pop("nodePort", None)
        _drop_unchanged(spec, before, "externalTrafficPolicy")
    if spec["type"] != "LoadBalancer":
        _drop_unchanged(spec, before, "allocateLoadBalancerNodePorts")
        _drop_unchanged(spec, before, "loadBalancerClass")


def _drop_unchanged(spec: Object, before: Object, field: str) -> None:
    """Take away what the new type does not have, unless it was set together with the type."""
    if field in before and spec.get(field) == before[field]:
        spec.pop(field, None)


def _allocate_node_ports(store: Store, new: Object, before: Object) -> None:
    meta = new["metadata"]
    taken = {
        port["nodePort"]
        for stored in store.snapshot("services")[0]
        if stored.object["metadata"]["uid"] != meta.get("uid")
        for port in stored.object["spec"].get("ports") or ()
        if port.get("nodePort")
    }
    # a port is the same one as long as its name is
    kept = {port.get("name"): port.get("nodePort") for port in before.get("ports") or ()}
    used = {port.get("nodePort") for port in new["spec"].get("ports") or ()}
    kept = {name: number for name, number in kept.items() if number not in used}
    causes = []
    for at, port in enumerate(new["spec"].get("ports") or ()):
        asked = port.get("nodePort") or kept.get(port.get("name"))
        field = f"spec.ports[{at}].nodePort"
        if asked in taken:
            causes.append(wrong(field, asked, "provided port is already allocated"))
        elif asked and asked not in NODE_PORTS:
            why = "provided port is not in the valid range. The range of valid ports is 30000-32767"
            causes.append(wrong(field, asked, why))
        port["nodePort"] = asked or random.choice(
            [item for item in NODE_PORTS if item not in taken]
        )
        taken.add(port["nodePort"])
    if causes:
        raise invalid("services", meta["name"], causes)


# Jobs


def _select_own_pods(job: Object) -> None:
    spec, meta = job["spec"], job["metadata"]
    if spec.get("manualSelector"):
        return
    uid, name = meta["uid"], meta.get("name", "")
    own = {"batch.kubernetes.io/controller-uid": uid}
    labels = spec.setdefault("template", {}).setdefault("metadata", {}).setdefault("labels", {})
    labels |= {
        **own,
        "batch.kubernetes.io/job-name": name,
        "controller-uid": uid,
        "job-name": name,
    }
    spec.setdefault("selector", {"matchLabels": own})


# Pods


def _complete_pod(store: Store, pod: Object) -> None:
    spec = pod["spec"]
    apply_limit_ranges(store, pod)
    pod["status"]["qosClass"] = qos_class(spec)
    account = _account(store, pod)
    spec.setdefault("priority", 0)
    spec.setdefault("preemptionPolicy", "PreemptLowerPriority")
    tolerations = spec.setdefault("tolerations", [])
    for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
        if not any(item.get("key") in (key, None) for item in tolerations):
            tolerations.append(
                {"effect": "NoExecute", "key": key, "operator": "Exists", "tolerationSeconds": 300}
            )
    if not spec.get("imagePullSecrets") and account.get("imagePullSecrets"):
        spec["imagePullSecrets"] = [dict(item) for item in account["imagePullSecrets"]]
    mount = spec.get("automountServiceAccountToken")
    if mount is None:
        mount = account.get("automountServiceAccountToken")
    if mount is not False:
        _mount_token(spec)


def _account(store: Store, pod: Object) -> Object:
    spec, meta = pod["spec"], pod["metadata"]
    name = spec.get("serviceAccountName") or "default"
    spec["serviceAccountName"] = spec["serviceAccount"] = name
    stored = store.find_stored("serviceaccounts", meta.get("namespace"), name)
    if stored is None:
        text = (
            f"error looking up service account {meta.get('namespace')}/{name}: "
            f'serviceaccount "{name}" not found'
        )
        raise forbidden("pods", meta["name"], text)
    return stored.object


def _mount_token(spec: Object) -> None:
    containers = [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]
    name = "kube-api-access-" + "".join(random.choices(_ALPHABET, k=5))
    used = False
    for container in containers:
        mounts = container.setdefault("volumeMounts", [])
        if not any(item.get("mountPath") == TOKEN_PATH for item in mounts):
            mounts.append({"mountPath": TOKEN_PATH, "name": name, "readOnly": True})
            used = True
    if used:
        spec.setdefault("volumes", []).append({"name": name, "projected": _token_sources()})


def _token_sources() -> Object:
    field = {"apiVersion": "v1", "fieldPath": "metadata.namespace"}
    authority = {"items": [{"key": "ca.crt", "path": "ca.crt"}], "name": "kube-root-ca.crt"}
    return {
        "defaultMode": 420,
        "sources": [
            {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
            {"configMap": authority},
            {"downwardAPI": {"items": [{"fieldRef": field, "path": "namespace"}]}},
        ],
    }


def _namespace_labels(store: Store, obj: Object) -> Object:
    stored = store.find_stored("namespaces", None, obj["metadata"].get("namespace") or "")
    return {} if stored is None else stored.object["metadata"].get("labels") or {}


def _check_pod_security(store: Store, pod: Object) -> None:
    level, version = podsecurity.level_of(_namespace_labels(store, pod), "enforce")
    found = podsecurity.violations(level, pod["spec"])
    if found:
        text = f'violates PodSecurity "{level}:{version}": {found}'
        raise forbidden("pods", pod["metadata"]["name"], text)


def refuse_nameless(resource: str) -> None:
    """Raise what an object without a name gets."""
    cause = missing("metadata.name", "name or generateName is required")
    raise invalid(resource, "", [cause])


def warnings(store: Store, resource: str, obj: Object) -> list[str]:
    """What the server says about an object that it has stored all the same."""
    if resource not in _TEMPLATES and resource != "pods":
        return []
    spec = obj["spec"] if resource == "pods" else obj["spec"]["template"].get("spec") or {}
    level, version = podsecurity.level_of(_namespace_labels(store, obj), "warn")
    found = podsecurity.violations(level, spec)
    return [f'would violate PodSecurity "{level}:{version}": {found}'] if found else []
