"""A pod's directory on this machine, and the container's view of it.

There is no mount namespace: each path that a container would find mounted is rewritten to where
it really lies, in commands, arguments, environment values and the working directory.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.standin.images import Image
from tests.standin.processes import Command
from tests.standin.store import Store

Object = dict[str, Any]
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SHARED_DIRECTORIES = ("bin", "dev", "etc", "lib", "lib64", "proc", "sbin", "sys", "usr", "var")
TERMINATION_LOG = "/dev/termination-log"
# A pod has an interface of its own; here a server that listens on all of them must be told.
BIND_SHIM = Path(__file__).with_name("shim")
REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_.-][A-Za-z0-9_.-]*)\)")
UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "k": 10**3, "M": 10**6, "G": 10**9}


class ConfigError(Exception):
    """The container cannot be created from what it refers to: CreateContainerConfigError."""


class MountError(Exception):
    """A volume cannot be populated yet: the pod waits and FailedMount is told."""


@dataclass(frozen=True)
class Context:
    """What a pod's surroundings provide."""

    store: Store
    token: Callable[[str, str], str]
    certificate: Callable[[], str]


@dataclass
class Sandbox:
    """One pod's place: directory, address, volumes."""

    directory: Path
    pod: Object
    address: str
    context: Context
    volumes: dict[str, Path] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        """The pod's namespace."""
        return str(self.pod["metadata"]["namespace"])

    def populate(self) -> None:
        """Make and fill all volumes; MountError when something they need is not there.

        A volume that no container mounts is not made: what it names may be missing.
        """
        spec = self.pod["spec"]
        containers = (spec.get("initContainers") or []) + spec["containers"]
        mounted = {mount["name"] for item in containers for mount in item.get("volumeMounts") or []}
        for volume in spec.get("volumes") or []:
            if volume["name"] not in mounted:
                continue
            place = self.directory / "volumes" / volume["name"]
            if claim := (volume.get("persistentVolumeClaim") or {}).get("claimName"):
                # what is in it outlives the pod
                place = self.directory.parent / "claims" / f"{self.namespace}_{claim}"
            place.mkdir(parents=True, exist_ok=True)
            _fill(self, volume, place)
            self.volumes[volume["name"]] = place

    def overfull(self) -> str:
        """Which empty directory holds more than it may, in the kubelet's words; or nothing."""
        for volume in self.pod["spec"].get("volumes") or []:
            limit = (volume.get("emptyDir") or {}).get("sizeLimit")
            place = self.volumes.get(volume["name"])
            if limit and place is not None and _bytes_in(place) > parse_bytes(str(limit)):
                return f'Usage of EmptyDir volume "{volume["name"]}" exceeds the limit "{limit}". '
        return ""

    def has_services(self) -> bool:
        """Whether a side-car of the pod is waited for until it answers."""
        return any(
            item.get("restartPolicy") == "Always" and "startupProbe" in item
            for item in self.pod["spec"].get("initContainers") or []
        )

    def container(self, spec: Object, image: Image, attempt: int) -> ContainerPlace:
        """A fresh file system for one start of a container."""
        place = self.directory / "containers" / spec["name"]
        root = place / str(attempt)
        # What the start before has left is not kept, but for its output and message.
        for old in (root, place / str(attempt - 1)):
            shutil.rmtree(old, ignore_errors=True)
        if image.root is not None:
            shutil.copytree(image.root, root, symlinks=True)
        root.mkdir(parents=True, exist_ok=True)
        message = place / f"{attempt}.termination-log"
        message.touch()
        return ContainerPlace(self, spec, image, root, message, place / f"{attempt}.log")

    def log_path(self, container: str, attempt: int) -> Path:
        """Where the output of that start of the container is kept."""
        return self.directory / "containers" / container / f"{attempt}.log"

    def remove(self) -> None:
        """Delete everything, also what a container made unreadable."""
        shutil.rmtree(self.directory, onerror=_force)


@dataclass
class ContainerPlace:
    """One start of one container, before it happens."""

    sandbox: Sandbox
    spec: Object
    image: Image
    root: Path
    message: Path
    log: Path
    started: Command | None = None
    rewrite: Callable[[str], str] = str

    def command(self) -> Command:
        """What to execute; ConfigError where a reference in the environment leads nowhere."""
        mounts = self._mounts()
        env = self._environment()
        argv = self._argv(env)
        rewrite = self.rewrite = rewriter(mounts)
        workdir = self.spec.get("workingDir") or self.image.workdir or "/"
        cwd = Path(rewrite(workdir) if rewrite(workdir) != workdir else f"{self.root}{workdir}")
        cwd.mkdir(parents=True, exist_ok=True)
        finished = self._finished({name: rewrite(value) for name, value in env.items()}, mounts)
        limit = (self.spec.get("resources") or {}).get("limits", {}).get("memory")
        memory = parse_bytes(limit) if limit else None
        self.started = Command([rewrite(word) for word in argv], finished, cwd, self.log, memory)
        return self.started

    def another(self, argv: list[str], log: Path) -> Command:
        """Something else to execute in the container that was started with command()."""
        assert self.started is not None
        words = [self.rewrite(word) for word in argv]
        return Command(words, self.started.env, self.started.cwd, log)

    def _argv(self, env: Mapping[str, str]) -> list[str]:
        command, args = self.spec.get("command"), self.spec.get("args")
        entry = [expand(word, env) for word in command or ()] or list(self.image.entrypoint)
        if args is not None:
            rest = [expand(word, env) for word in args]
        else:
            rest = [] if command else list(self.image.cmd)
        if not entry + rest:
            raise ConfigError("no command specified")
        return entry + rest

    def _environment(self) -> dict[str, str]:
        env = dict(self.image.env)
        for source in self.spec.get("envFrom") or []:
            prefix = source.get("prefix", "")
            found = _all_values(self.sandbox, source)
            env.update({prefix + name: value for name, value in found.items()})
        for item in self.spec.get("env") or []:
            if "valueFrom" in item:
                value = _value_from(self.sandbox, self.spec, item["valueFrom"])
                if value is None:
                    continue
            else:
                value = expand(item.get("value", ""), env)
            env[item["name"]] = value
        return env

    def _finished(self, env: dict[str, str], mounts: dict[str, str]) -> dict[str, str]:
        programs = str(Path(sys.executable).parent)
        env["PATH"] = f"{programs}:{env.get('PATH', SYSTEM_PATH)}"
        env.setdefault("HOME", str(self.root))
        env.setdefault("LANG", "C.UTF-8")
        env["POD_IP"] = self.sandbox.address
        if "/tmp" in mounts:
            env.setdefault("TMPDIR", mounts["/tmp"])
        if self.spec.get("ports") or self.sandbox.has_services():
            rest = env.get("PYTHONPATH")
            env["PYTHONPATH"] = f"{BIND_SHIM}:{rest}" if rest else str(BIND_SHIM)
        return env

    def _mounts(self) -> dict[str, str]:
        """Paths of the container and where they lie."""
        found: dict[str, str] = {}
        if self.image.root is not None:
            for path in _tops(self.image.root):
                found[f"/{path}"] = str(self.root / path)
        if self.image.workdir.strip("/"):
            found[self.image.workdir] = f"{self.root}{self.image.workdir}"
        mounts = self.spec.get("volumeMounts") or []
        for mount in sorted(mounts, key=lambda item: len(item["mountPath"])):
            place = self._mount(mount)
            path = mount["mountPath"].rstrip("/")
            self._link(path, place, found)
            found[path] = str(place)
        found[self.spec.get("terminationMessagePath") or TERMINATION_LOG] = str(self.message)
        return found

    def _mount(self, mount: Object) -> Path:
        volume = self.sandbox.volumes.get(mount["name"])
        if volume is None:
            raise ConfigError(f'volume "{mount["name"]}" is not there')
        part = mount.get("subPath") or ""
        if not part:
            return volume
        place = Path(os.path.normpath(volume / part))
        if not place.is_relative_to(volume):
            raise ConfigError(f"subPath {part} leaves the volume")
        if not place.exists():
            place.mkdir(parents=True)
        return place

    def _link(self, path: str, place: Path, found: dict[str, str]) -> None:
        """Let relative paths below the image or another mount lead to the volume as well."""
        shown = Path(rewriter(found)(path))
        if str(shown) == path:
            shown = Path(f"{self.root}{path}")
        shown.parent.mkdir(parents=True, exist_ok=True)
        if shown.is_dir() and not shown.is_symlink():
            if not shown.is_relative_to(self.root):
                return
            shutil.rmtree(shown)
        shown.unlink(missing_ok=True)
        shown.symlink_to(place)


def _tops(root: Path) -> list[str]:
    """What of an image's tree hides this machine's: directories, but single files of /usr."""
    found: list[str] = []
    for path in sorted(root.iterdir()):
        if path.name in SHARED_DIRECTORIES:
            found += [str(item.relative_to(root)) for item in path.rglob("*") if item.is_file()]
        else:
            found.append(path.name)
    return found


def rewriter(mounts: Mapping[str, str]) -> Callable[[str], str]:
    """A function that replaces container paths by where they lie, longest first."""
    if not mounts:
        return lambda text: text
    paths = "|".join(re.escape(path) for path in sorted(mounts, key=len, reverse=True))
    # Not in the middle of a path or a name; "dir:///workspace" begins one, "https://" does not.
    pattern = re.compile(rf"(?:(?<=://)|(?<![\w.\-/}})*~$]))(?:{paths})(?=/|$|[^\w.\-])")

    def rewrite(text: str) -> str:
        # What lies below a mount path on this machine, a repository say, is not the pod's.
        path = text[text.find("=") + 1 :]  # of NAME=/path as well
        if path not in mounts and path.startswith("/") and os.path.exists(path):
            return text
        return pattern.sub(lambda found: mounts[found[0]], text)

    return rewrite


def expand(text: str, env: Mapping[str, str]) -> str:
    """Replace $(NAME) as Kubernetes does; unknown names stay."""

    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        return env.get(found[1], found[0])

    return REFERENCE.sub(value, text)


def parse_bytes(quantity: str) -> int:
    """The number of bytes in a memory quantity."""
    for unit, size in UNITS.items():
        if quantity.endswith(unit):
            return int(float(quantity.removesuffix(unit)) * size)
    return int(float(quantity))


def field_value(sandbox: Sandbox, path: str) -> str:
    """What a downward API fieldPath stands for."""
    pod = sandbox.pod
    meta, spec = pod["metadata"], pod["spec"]
    if found := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
        return str((meta.get(found[1]) or {}).get(found[2], ""))
    if path in ("metadata.labels", "metadata.annotations"):
        items = sorted((meta.get(path.removeprefix("metadata.")) or {}).items())
        return "".join(f'{name}="{value}"\n' for name, value in items)
    known = {
        "metadata.name": meta["name"],
        "metadata.namespace": meta["namespace"],
        "metadata.uid": meta["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", ""),
        "status.podIP": sandbox.address,
        "status.podIPs": sandbox.address,
        "status.hostIP": pod.get("status", {}).get("hostIP", ""),
    }
    if path not in known:
        raise ConfigError(f"unsupported fieldPath: {path}")
    return str(known[path])


def _value_from(sandbox: Sandbox, spec: Object, source: Object) -> str | None:
    if "fieldRef" in source:
        return field_value(sandbox, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        kind, _, name = source["resourceFieldRef"]["resource"].partition(".")
        return str((spec.get("resources") or {}).get(kind, {}).get(name, "0"))
    kind = "configmaps" if "configMapKeyRef" in source else "secrets"
    reference = source.get("configMapKeyRef") or source.get("secretKeyRef") or {}
    values = _values(sandbox, kind, reference)
    if values is not None and reference["key"] in values:
        return values[reference["key"]].decode(errors="replace")
    if reference.get("optional"):
        return None
    title = "ConfigMap" if kind == "configmaps" else "Secret"
    raise ConfigError(
        f"couldn't find key {reference['key']} in {title} {sandbox.namespace}/{reference['name']}"
    )


def _all_values(sandbox: Sandbox, source: Object) -> dict[str, str]:
    kind = "configmaps" if "configMapRef" in source else "secrets"
    values = _values(sandbox, kind, source.get("configMapRef") or source["secretRef"])
    return {name: value.decode(errors="replace") for name, value in (values or {}).items()}


def _values(sandbox: Sandbox, kind: str, reference: Object) -> dict[str, bytes] | None:
    """The content of a ConfigMap or Secret; None if it is not there and need not be."""
    found = sandbox.context.store.find(kind, sandbox.namespace, reference["name"])
    if found is None:
        if reference.get("optional"):
            return None
        title = "configmap" if kind == "configmaps" else "secret"
        raise ConfigError(f'{title} "{reference["name"]}" not found')
    if kind == "secrets":
        return {key: base64.b64decode(text) for key, text in (found.get("data") or {}).items()}
    values = {key: text.encode() for key, text in (found.get("data") or {}).items()}
    binary = found.get("binaryData") or {}
    return values | {key: base64.b64decode(text) for key, text in binary.items()}


def _fill(sandbox: Sandbox, volume: Object, place: Path) -> None:
    mode = 0o644
    try:
        if "projected" in volume:
            mode = volume["projected"].get("defaultMode", mode)
            for source in volume["projected"].get("sources") or []:
                _fill_source(sandbox, volume["name"], source, place, mode)
        elif "configMap" in volume or "secret" in volume or "downwardAPI" in volume:
            source = volume.get("configMap") or volume.get("secret") or volume["downwardAPI"]
            source = {"name": source.get("secretName"), **source}
            mode = source.get("defaultMode", mode)
            kind = next(name for name in ("configMap", "secret", "downwardAPI") if name in volume)
            _fill_source(sandbox, volume["name"], {kind: source}, place, mode)
        elif not volume.keys() & {"emptyDir", "persistentVolumeClaim"}:
            kinds = ", ".join(key for key in volume if key != "name")
            raise ConfigError(f"volumes of this kind are not modelled: {kinds}")
    except ConfigError as error:
        raise MountError(
            f'MountVolume.SetUp failed for volume "{volume["name"]}" : {error}'
        ) from error


def _fill_source(sandbox: Sandbox, name: str, source: Object, place: Path, mode: int) -> None:
    if "serviceAccountToken" in source:
        account = sandbox.pod["spec"].get("serviceAccountName", "default")
        token = sandbox.context.token(sandbox.namespace, account)
        _write(place, source["serviceAccountToken"]["path"], token.encode(), mode)
    elif "downwardAPI" in source:
        for item in source["downwardAPI"].get("items") or []:
            value = field_value(sandbox, item["fieldRef"]["fieldPath"])
            _write(place, item["path"], value.encode(), item.get("mode", mode))
    else:
        kind = "configmaps" if "configMap" in source else "secrets"
        reference = source.get("configMap") or source["secret"]
        # The API server's own certificates are offered, not demanded.
        offered = {"optional": True} if name.startswith("kube-api-access-") else {}
        values = _values(sandbox, kind, {**reference, **offered}) or {}
        if not values and reference.get("name") == "kube-root-ca.crt":
            values = {"ca.crt": sandbox.context.certificate().encode()}
        _write_items(place, reference, values, mode)


def _write_items(place: Path, reference: Object, values: dict[str, bytes], mode: int) -> None:
    items = reference.get("items")
    if items is None:
        items = [{"key": key, "path": key} for key in values]
    for item in items:
        if item["key"] in values:
            _write(place, item["path"], values[item["key"]], item.get("mode", mode))
        elif values and not reference.get("optional"):
            raise ConfigError(f"references non-existent config key: {item['key']}")


def _write(place: Path, path: str, data: bytes, mode: int) -> None:
    target = place / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.write_bytes(data)
    target.chmod(mode)


def _bytes_in(place: Path) -> int:
    total = 0
    for directory, _, names in os.walk(place):
        for name in names:
            # A file may go away while they are counted.
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(directory, name)).st_size
    return total


def _force(function: Callable[[str], Any], path: str, _: Any) -> None:
    """rmtree met something that its owner may not remove: make it so, or leave it."""
    try:
        os.chmod(os.path.dirname(path), 0o700)
        function(path)
    except OSError:
        return
