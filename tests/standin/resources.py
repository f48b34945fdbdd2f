"""The resources that the stand-in serves, and how each is named."""

from __future__ import annotations

from dataclasses import dataclass

ALL_VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")


@dataclass(frozen=True)
class Resource:
    """One served resource; `name` is the plural and unique among all groups."""

    name: str
    kind: str
    group: str = ""
    version: str = "v1"
    namespaced: bool = True
    short: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()
    in_all: bool = False
    generation: bool = False
    verbs: tuple[str, ...] = ALL_VERBS

    @property
    def qualified(self) -> str:
        """The plural with its group, as it stands in messages."""
        return f"{self.name}.{self.group}" if self.group else self.name

    @property
    def api_version(self) -> str:
        """What objects carry as apiVersion."""
        return f"{self.group}/{self.version}" if self.group else self.version


_RBAC = "rbac.authorization.k8s.io"
_NETWORKING = "networking.k8s.io"
_AUTHORIZATION = "authorization.k8s.io"

RESOURCES: tuple[Resource, ...] = (
    Resource("configmaps", "ConfigMap", short=("cm",)),
    Resource("endpoints", "Endpoints", short=("ep",)),
    Resource("events", "Event", short=("ev",)),
    Resource("limitranges", "LimitRange", short=("limits",)),
    Resource("namespaces", "Namespace", namespaced=False, short=("ns",), subresources=("status",)),
    Resource("nodes", "Node", namespaced=False, short=("no",), subresources=("status",)),
    Resource(
        "persistentvolumeclaims",
        "PersistentVolumeClaim",
        short=("pvc",),
        subresources=("status",),
    ),
    Resource(
        "pods",
        "Pod",
        short=("po",),
        subresources=("status", "log", "eviction", "binding"),
        in_all=True,
        generation=True,
    ),
    Resource("resourcequotas", "ResourceQuota", short=("quota",), subresources=("status",)),
    Resource("secrets", "Secret"),
    Resource("serviceaccounts", "ServiceAccount", short=("sa",)),
    Resource("services", "Service", short=("svc",), subresources=("status",), in_all=True),
    Resource("controllerrevisions", "ControllerRevision", "apps"),
    Resource(
        "daemonsets",
        "DaemonSet",
        "apps",
        short=("ds",),
        subresources=("status",),
        in_all=True,
        generation=True,
    ),
    Resource(
        "deployments",
        "Deployment",
        "apps",
        short=("deploy",),
        subresources=("scale", "status"),
        in_all=True,
        generation=True,
    ),
    Resource(
        "replicasets",
        "ReplicaSet",
        "apps",
        short=("rs",),
        subresources=("scale", "status"),
        in_all=True,
        generation=True,
    ),
    Resource(
        "statefulsets",
        "StatefulSet",
        "apps",
        short=("sts",),
        subresources=("scale", "status"),
        in_all=True,
        generation=True,
    ),
    Resource(
        "cronjobs",
        "CronJob",
        "batch",
        short=("cj",),
        subresources=("status",),
        in_all=True,
        generation=True,
    ),
    Resource("jobs", "Job", "batch", subresources=("status",), in_all=True, generation=True),
    Resource(
        "horizontalpodautoscalers",
        "HorizontalPodAutoscaler",
        "autoscaling",
        "v2",
        short=("hpa",),
        subresources=("status",),
        in_all=True,
    ),
    Resource(
        "ingresses",
        "Ingress",
        _NETWORKING,
        short=("ing",),
        subresources=("status",),
        generation=True,
    ),
    Resource("networkpolicies", "NetworkPolicy", _NETWORKING, short=("netpol",), generation=True),
    Resource(
        "poddisruptionbudgets",
        "PodDisruptionBudget",
        "policy",
        short=("pdb",),
        subresources=("status",),
        generation=True,
    ),
    Resource("roles", "Role", _RBAC),
    Resource("rolebindings", "RoleBinding", _RBAC),
    Resource("clusterroles", "ClusterRole", _RBAC, namespaced=False),
    Resource("clusterrolebindings", "ClusterRoleBinding", _RBAC, namespaced=False),
    Resource("leases", "Lease", "coordination.k8s.io"),
    Resource("endpointslices", "EndpointSlice", "discovery.k8s.io", generation=True),
    Resource(
        "selfsubjectreviews",
        "SelfSubjectReview",
        "authentication.k8s.io",
        namespaced=False,
        verbs=("create",),
    ),
    Resource(
        "selfsubjectaccessreviews",
        "SelfSubjectAccessReview",
        _AUTHORIZATION,
        namespaced=False,
        verbs=("create",),
    ),
    Resource(
        "selfsubjectrulesreviews",
        "SelfSubjectRulesReview",
        _AUTHORIZATION,
        namespaced=False,
        verbs=("create",),
    ),
    Resource(
        "subjectaccessreviews",
        "SubjectAccessReview",
        _AUTHORIZATION,
        namespaced=False,
        verbs=("create",),
    ),
)

_BY_NAME = {resource.name: resource for resource in RESOURCES}
_BY_KIND = {(resource.group, resource.kind): resource for resource in RESOURCES}
_BY_PATH = {(resource.group, resource.version, resource.name): resource for resource in RESOURCES}


def resource_of(name: str) -> Resource:
    """The served resource of that plural; KeyError when there is none."""
    return _BY_NAME[name]


def find_kind(api_version: str, kind: str) -> Resource | None:
    """The resource whose objects say this apiVersion and kind, or None."""
    group, _, version = api_version.rpartition("/")
    found = _BY_KIND.get((group, kind))
    return found if found and found.version == version else None


def find_path(group: str, version: str, name: str) -> Resource | None:
    """The resource that a URL names, or None."""
    return _BY_PATH.get((group, version, name))
