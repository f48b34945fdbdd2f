"""Pod Security admission: the levels `baseline` and `restricted`, in the server's words."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Object = dict[str, Any]
LABEL = "pod-security.kubernetes.io/"
_DEFAULT_CAPABILITIES = frozenset(
    {
        "AUDIT_WRITE",
        "CHOWN",
        "DAC_OVERRIDE",
        "FOWNER",
        "FSETID",
        "KILL",
        "MKNOD",
        "NET_BIND_SERVICE",
        "SETFCAP",
        "SETGID",
        "SETPCAP",
        "SETUID",
        "SYS_CHROOT",
    }
)
_RESTRICTED_VOLUMES = frozenset(
    {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
)
_SAFE_SYSCTLS = frozenset(
    {
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.ping_group_range",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_syncookies",
    }
)
_SECCOMP = 'securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost"'


def _containers(spec: Object) -> list[Object]:
    kinds = ("initContainers", "containers", "ephemeralContainers")
    return [item for kind in kinds for item in spec.get(kind) or ()]


def _context(item: Object) -> Object:
    return item.get("securityContext") or {}


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _named(found: list[Object], noun: str = "container") -> str:
    names = [item["name"] for item in found]
    return f"{noun}{'s' if len(names) > 1 else ''} {_quoted(names)}"


def _capabilities(item: Object, kind: str) -> list[str]:
    return list((_context(item).get("capabilities") or {}).get(kind) or ())


def _privilege_escalation(spec: Object) -> str:
    found = [
        item
        for item in _containers(spec)
        if _context(item).get("allowPrivilegeEscalation") is not False
    ]
    if not found:
        return ""
    text = "must set securityContext.allowPrivilegeEscalation=false"
    return f"allowPrivilegeEscalation != false ({_named(found)} {text})"


def _added(spec: Object, allowed: frozenset[str]) -> str:
    found = [item for item in _containers(spec) if set(_capabilities(item, "add")) - allowed]
    if not found:
        return ""
    extra = sorted({cap for item in found for cap in _capabilities(item, "add")} - allowed)
    return f"{_named(found)} must not include {_quoted(extra)} in securityContext.capabilities.add"


def _baseline_capabilities(spec: Object) -> str:
    text = _added(spec, _DEFAULT_CAPABILITIES)
    return f"non-default capabilities ({text})" if text else ""


def _restricted_capabilities(spec: Object) -> str:
    keeping = [item for item in _containers(spec) if "ALL" not in _capabilities(item, "drop")]
    texts = []
    if keeping:
        texts.append(f'{_named(keeping)} must set securityContext.capabilities.drop=["ALL"]')
    added = _added(spec, frozenset({"NET_BIND_SERVICE"}))
    if added:
        texts.append(added)
    return f"unrestricted capabilities ({'; '.join(texts)})" if texts else ""


def _host_namespaces(spec: Object) -> str:
    found = [f"{name}=true" for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    return f"host namespaces ({', '.join(found)})" if found else ""


def _host_paths(spec: Object) -> str:
    found = [item for item in spec.get("volumes") or () if item.get("hostPath") is not None]
    return f"hostPath volumes ({_named(found, 'volume')})" if found else ""


def _host_ports(spec: Object) -> str:
    found = [
        item
        for item in _containers(spec)
        if any(port.get("hostPort") for port in item.get("ports") or ())
    ]
    if not found:
        return ""
    ports = sorted(
        {port["hostPort"] for item in found for port in item["ports"] if port.get("hostPort")}
    )
    use = "use" if len(found) > 1 else "uses"
    noun = "hostPorts" if len(ports) > 1 else "hostPort"
    return f"hostPort ({_named(found)} {use} {noun} {', '.join(map(str, ports))})"


def _privileged(spec: Object) -> str:
    found = [item for item in _containers(spec) if _context(item).get("privileged")]
    text = "must not set securityContext.privileged=true"
    return f"privileged ({_named(found)} {text})" if found else ""


def _restricted_volumes(spec: Object) -> str:
    found = [
        (item, kind)
        for item in spec.get("volumes") or ()
        for kind in item
        if kind != "name" and kind not in _RESTRICTED_VOLUMES
    ]
    if not found:
        return ""
    kinds = sorted({kind for _, kind in found})
    use = "use" if len(found) > 1 else "uses"
    noun = "types" if len(kinds) > 1 else "type"
    named = _named([item for item, _ in found], "volume")
    return f"restricted volume types ({named} {use} restricted volume {noun} {_quoted(kinds)})"


def _run_as_non_root(spec: Object) -> str:
    of_pod = _context(spec).get("runAsNonRoot")
    wrong = [item for item in _containers(spec) if _context(item).get("runAsNonRoot") is False]
    unset = [item for item in _containers(spec) if _context(item).get("runAsNonRoot") is None]
    texts = []
    if of_pod is False:
        texts.append("pod must not set securityContext.runAsNonRoot=false")
    if wrong:
        texts.append(f"{_named(wrong)} must not set securityContext.runAsNonRoot=false")
    if not texts and not of_pod and unset:
        texts.append(f"pod or {_named(unset)} must set securityContext.runAsNonRoot=true")
    return f"runAsNonRoot != true ({', '.join(texts)})" if texts else ""


def _run_as_user(spec: Object) -> str:
    texts = ["pod must not set runAsUser=0"] if _context(spec).get("runAsUser") == 0 else []
    found = [item for item in _containers(spec) if _context(item).get("runAsUser") == 0]
    if found:
        texts.append(f"{_named(found)} must not set runAsUser=0")
    return f"runAsUser=0 ({', '.join(texts)})" if texts else ""


def _profile(item: Object) -> str | None:
    kind = (_context(item).get("seccompProfile") or {}).get("type")
    return None if kind is None else str(kind)


def _unconfined(spec: Object) -> list[str]:
    text = 'must not set securityContext.seccompProfile.type to "Unconfined"'
    texts = [f"pod {text}"] if _profile(spec) == "Unconfined" else []
    found = [item for item in _containers(spec) if _profile(item) == "Unconfined"]
    return [*texts, f"{_named(found)} {text}"] if found else texts


def _baseline_seccomp(spec: Object) -> str:
    texts = _unconfined(spec)
    return f"seccompProfile ({', '.join(texts)})" if texts else ""


def _restricted_seccomp(spec: Object) -> str:
    texts = _unconfined(spec)
    unset = [item for item in _containers(spec) if _profile(item) is None]
    if not texts and _profile(spec) is None and unset:
        texts.append(f"pod or {_named(unset)} must set {_SECCOMP}")
    return f"seccompProfile ({', '.join(texts)})" if texts else ""


def _sysctls(spec: Object) -> str:
    names = [item.get("name", "") for item in _context(spec).get("sysctls") or ()]
    found = [name for name in names if name not in _SAFE_SYSCTLS]
    return f"forbidden sysctls ({', '.join(found)})" if found else ""


Check = Callable[[Object], str]
# In the order in which the server lists what is wrong.
_LEVELS: dict[str, tuple[Check, ...]] = {
    "privileged": (),
    "baseline": (
        _baseline_capabilities,
        _host_namespaces,
        _host_paths,
        _host_ports,
        _privileged,
        _baseline_seccomp,
        _sysctls,
    ),
    "restricted": (
        _privilege_escalation,
        _restricted_capabilities,
        _host_namespaces,
        _host_ports,
        _privileged,
        _restricted_volumes,
        _run_as_non_root,
        _run_as_user,
        _restricted_seccomp,
        _sysctls,
    ),
}


def violations(level: str, spec: Object) -> str:
    """Why a pod spec does not keep a level; '' when it does."""
    found = [check(spec) for check in _LEVELS.get(level, ())]
    return ", ".join(text for text in found if text)


def level_of(labels: Object, mode: str) -> tuple[str, str]:
    """(level, version) of a namespace for `enforce` or `warn`."""
    level = labels.get(LABEL + mode)
    version = labels.get(f"{LABEL}{mode}-version", "latest")
    if level is None and mode == "warn":
        # Without a level of its own, what would be refused as a pod is warned about.
        return level_of(labels, "enforce")
    return level or "privileged", version
