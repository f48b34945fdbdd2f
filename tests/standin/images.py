"""Images of the stand-in: content-addressed directories, and aliases of this machine.

An image is a tree of files and how to start it. Trees lie in `<directory>/sha256/<hex>/`, where
the stand-in builder, a process of its own, puts them too; references are small files beside them.
Base images have no tree: their programs are those of the virtual environment and of this machine.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import urllib.parse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

BASES = (
    "python:*",
    "python",
    "busybox*",
    "alpine*",
    "debian*",
    "ubuntu*",
    "buildpack-deps*",
    "scratch",
)
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_HOST = r"(?:[a-zA-Z0-9.-]+|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
REFERENCE = re.compile(
    rf"(?:{_HOST}/)?{_COMPONENT}(?:/{_COMPONENT})*(?::[\w][\w.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?"
)


class PullError(Exception):
    """An image cannot be had; the text is the one that a container's status shows."""


class InvalidName(PullError):
    """The reference is not one."""


@dataclass(frozen=True)
class Image:
    """What a container starts from; `root` is None where the machine itself is the image."""

    reference: str
    digest: str
    root: Path | None = None
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = ""

    @property
    def shown(self) -> str:
        """The reference as container statuses show it."""
        first, slash, _ = self.reference.partition("/")
        if slash and ("." in first or ":" in first or first == "localhost"):
            return self.reference
        return f"docker.io/{self.reference}" if slash else f"docker.io/library/{self.reference}"


@dataclass(frozen=True)
class ImageConfig:
    """How to start an image; part of what its digest is made of."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = ""


class Images:
    """The images that the kubelet finds; shared with the builder through the file system."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._bases = list(BASES)
        self._programs: dict[str, ImageConfig] = {
            "*kaniko*": ImageConfig(
                entrypoint=(sys.executable, str(Path(__file__).with_name("builder.py"))),
                env={"STANDIN_IMAGES": str(directory)},
            )
        }
        self._broken: dict[str, str] = {}
        self._held: set[str] = set()
        directory.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        reference: str,
        root: Path | None = None,
        entrypoint: Sequence[str] = (),
        cmd: Sequence[str] = (),
        env: dict[str, str] | None = None,
        workdir: str = "",
    ) -> str:
        """Store an image under `name:tag`; its digest (`name@sha256:…` then works as well)."""
        config = ImageConfig(tuple(entrypoint), tuple(cmd), dict(env or {}), workdir)
        return store_image(self.directory, reference, root, config)

    def base(self, pattern: str) -> None:
        """Make references of this pattern (`name:*`) mean this machine."""
        self._bases.append(pattern)

    def break_pull(self, reference: str, text: str | None) -> None:
        """Fail pulls of this reference with that text; None mends it."""
        if text is None:
            self._broken.pop(reference, None)
        else:
            self._broken[reference] = text

    def break_push(self, text: str | None) -> None:
        """Fail what builders push with that text; None mends it."""
        path = self.directory / "no-push"
        if text is None:
            path.unlink()
        else:
            path.write_text(text, encoding="utf-8")

    def hold_pull(self, reference: str, *, held: bool) -> None:
        """Let pulls of this reference hang, as by a registry that does not answer, or go on."""
        if held:
            self._held.add(reference)
        else:
            self._held.discard(reference)

    def is_held(self, reference: str) -> bool:
        """Whether pulls of this reference hang."""
        return reference in self._held

    def is_local(self, reference: str) -> bool:
        """Whether it is on the node without a pull."""
        away = reference in self._broken or reference in self._held
        return not away and self._machine(reference) is not None

    def pull(self, reference: str) -> Image:
        """The image; PullError with the text that the recordings show."""
        if not REFERENCE.fullmatch(reference):
            raise InvalidName(
                f'Failed to apply default image tag "{reference}": couldn\'t parse image name '
                f'"{reference}": invalid reference format'
            )
        if reference in self._broken:
            raise PullError(self._broken[reference])
        found = self._machine(reference) or load_image(self.directory, reference)
        if found is None:
            raise PullError(not_found_text(reference))
        return found

    def _machine(self, reference: str) -> Image | None:
        if load_digest(self.directory, reference):
            return None
        name = reference.partition("@")[0]
        digest = "sha256:" + hashlib.sha256(name.encode()).hexdigest()
        for pattern, config in self._programs.items():
            if fnmatch.fnmatchcase(name, pattern):
                return Image(reference, digest, None, config.entrypoint, (), config.env)
        short = name.removeprefix("docker.io/").removeprefix("library/")
        if any(fnmatch.fnmatchcase(short, pattern) for pattern in self._bases):
            default = ("python3",) if short.startswith("python") else ("sh",)
            return Image(reference, digest, None, (), default)
        return None


def not_found_text(reference: str) -> str:
    """What containerd says about an image that is not there."""
    host, _, rest = reference.partition("/")
    head = (
        f'failed to pull and unpack image "{reference}": failed to resolve reference "{reference}"'
    )
    if host.endswith(".invalid"):
        name, tag = split_reference(rest)
        url = f"https://{host}/v2/{name}/manifests/{tag}"
        lookup = f"dial tcp: lookup {host} on 10.255.255.53:53: no such host"
        return f'{head}: failed to do request: Head "{url}": {lookup}'
    return f"rpc error: code = NotFound desc = {head}: {reference}: not found"


def split_reference(reference: str) -> tuple[str, str]:
    """The repository and its tag or digest (`latest` where neither is given)."""
    if "@" in reference:
        name, _, digest = reference.partition("@")
        return split_reference(name)[0], digest
    head, slash, last = reference.rpartition("/")
    name, colon, tag = last.partition(":")
    return f"{head}{slash}{name}", tag if colon else "latest"


def store_image(directory: Path, reference: str, root: Path | None, config: ImageConfig) -> str:
    """Copy the tree in, name it; the same tree and configuration give the same digest."""
    parts = {"tree": hash_tree(root) if root else "", "config": asdict(config)}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    target = directory / "sha256" / digest
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=".new-"))
        if root is not None:
            shutil.copytree(root, staged / "root", symlinks=True)
        (staged / "config.json").write_text(json.dumps(asdict(config)), encoding="utf-8")
        try:
            staged.rename(target)
        except OSError:
            # Another build of the same content was faster.
            shutil.rmtree(staged)
    repository, tag = split_reference(reference)
    for name in (f"{repository}:{tag}", f"{repository}@sha256:{digest}"):
        _name(directory, name, f"sha256:{digest}")
    return f"sha256:{digest}"


def load_digest(directory: Path, reference: str) -> str:
    """The digest that a stored reference stands for, or an empty string."""
    repository, tag = split_reference(reference)
    mark = "@" if tag.startswith("sha256:") else ":"
    try:
        return _path(directory, f"{repository}{mark}{tag}").read_text(encoding="utf-8")
    except OSError:
        return ""


def load_image(directory: Path, reference: str) -> Image | None:
    """The stored image, or None."""
    digest = load_digest(directory, reference)
    if not digest:
        return None
    place = directory / "sha256" / digest.removeprefix("sha256:")
    raw = json.loads((place / "config.json").read_text(encoding="utf-8"))
    root = place / "root"
    return Image(
        reference,
        digest,
        root if root.is_dir() else None,
        tuple(raw["entrypoint"]),
        tuple(raw["cmd"]),
        dict(raw["env"]),
        raw["workdir"],
    )


def hash_tree(root: Path) -> str:
    """A hash of names, contents and executable bits; times and owners do not count."""
    total = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            kind, data = "link", os.readlink(path).encode()
        elif path.is_dir():
            kind, data = "directory", b""
        else:
            kind = "program" if os.access(path, os.X_OK) else "file"
            data = path.read_bytes()
        total.update(json.dumps([name, kind, hashlib.sha256(data).hexdigest()]).encode())
    return total.hexdigest()


def _path(directory: Path, name: str) -> Path:
    return directory / "references" / urllib.parse.quote(name, safe="")


def _name(directory: Path, name: str, digest: str) -> None:
    path = _path(directory, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, staged = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(digest)
    os.replace(staged, path)
