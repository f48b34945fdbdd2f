"""The stand-in image builder: what runs in place of kaniko, with kaniko's arguments.

Reads FROM, COPY, ADD of files, WORKDIR, ENV, CMD, ENTRYPOINT and what changes nothing here
(EXPOSE, LABEL, USER, ARG with a default, STOPSIGNAL, HEALTHCHECK); everything else, RUN above all,
is an error, since nothing is executed. The image is stored for the stand-in's kubelet by its
content: the same files and settings have the same digest.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.standin.images import ImageConfig, load_image, store_image

IGNORED = ("EXPOSE", "LABEL", "USER", "STOPSIGNAL", "HEALTHCHECK", "MAINTAINER", "VOLUME")
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::-([^}]*))?\})")


class BuildError(Exception):
    """The Dockerfile asks for something that the stand-in does not do, or that is not there."""


class PushError(Exception):
    """The registry does not take the image."""


@dataclass
class Stage:
    """The image as far as the Dockerfile was read."""

    context: Path
    root: Path
    images: Path
    workdir: str = "/"
    env: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, str] = field(default_factory=dict)
    cmd: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    begun: bool = False

    def expand(self, text: str) -> str:
        """Replace $NAME, ${NAME} and ${NAME:-default}."""
        known = {**self.arguments, **self.env}

        def value(found: re.Match[str]) -> str:
            name = found[1] or found[2]
            return known.get(name, "") or found[3] or ""

        return VARIABLE.sub(value, text)

    def place(self, path: str) -> str:
        """An absolute path in the image."""
        return str(PurePosixPath(self.workdir) / path)


def read_dockerfile(text: str) -> list[tuple[int, str, str]]:
    """(line number, INSTRUCTION, rest) of each instruction, continuation lines joined."""
    found: list[tuple[int, str, str]] = []
    joined, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        first = first or number
        joined += line.strip()
        if joined.endswith("\\"):
            joined = joined[:-1] + " "
            continue
        word, _, rest = joined.partition(" ")
        found.append((first, word.upper(), rest.strip()))
        joined, first = "", 0
    if joined:
        raise BuildError(f"Dockerfile:{first}: ends in the middle of an instruction")
    return found


def apply(stage: Stage, word: str, rest: str) -> None:
    """Carry out one instruction; BuildError when it is not one of those known."""
    if word == "ARG":
        name, _, default = rest.partition("=")
        stage.arguments.setdefault(name, stage.expand(default.strip("\"'")))
    elif word == "FROM":
        _from(stage, stage.expand(rest))
    elif not stage.begun:
        raise BuildError("the first instruction must be FROM")
    elif word in ("COPY", "ADD"):
        _copy(stage, rest)
    elif word == "WORKDIR":
        stage.workdir = stage.place(stage.expand(rest))
        _inside(stage.root, stage.workdir).mkdir(parents=True, exist_ok=True)
    elif word == "ENV":
        _env(stage, rest)
    elif word in ("CMD", "ENTRYPOINT"):
        setattr(stage, word.lower(), _exec_form(rest))
    else:
        _demand_harmless(word, rest)


def _demand_harmless(word: str, rest: str) -> None:
    if word == "RUN" and rest not in ("true", ":"):
        raise BuildError(f"RUN is not carried out by the stand-in builder: {rest}")
    if word not in (*IGNORED, "RUN"):
        raise BuildError(f"unknown instruction: {word}")


def build(stage: Stage, dockerfile: Path) -> ImageConfig:
    """Read the Dockerfile into the stage; how the image starts."""
    try:
        text = dockerfile.read_text(encoding="utf-8")
    except OSError as error:
        raise BuildError(
            f"error resolving dockerfile path: please provide a valid path to a Dockerfile within "
            f"the build context with --dockerfile ({error.strerror}: {dockerfile.name})"
        ) from error
    for number, word, rest in read_dockerfile(text):
        try:
            apply(stage, word, rest)
        except BuildError as error:
            raise BuildError(f"{dockerfile.name}:{number}: {error}") from error
    if not stage.begun:
        raise BuildError(f"{dockerfile.name}: no FROM")
    return ImageConfig(stage.entrypoint, stage.cmd, stage.env, stage.workdir)


def _from(stage: Stage, rest: str) -> None:
    words = [word for word in rest.split() if not word.startswith("--")]
    if stage.begun or len(words) != 1:
        raise BuildError("only one stage is built by the stand-in builder")
    stage.begun = True
    base = load_image(stage.images, words[0])
    if base is None:
        return
    stage.workdir = base.workdir or "/"
    stage.env.update(base.env)
    stage.cmd, stage.entrypoint = base.cmd, base.entrypoint
    if base.root is not None:
        shutil.copytree(base.root, stage.root, symlinks=True, dirs_exist_ok=True)


def _copy(stage: Stage, rest: str) -> None:
    words = json.loads(rest) if rest.startswith("[") else shlex.split(rest)
    words = [stage.expand(word) for word in words]
    options = [word for word in words if word.startswith("--")]
    if any(word.startswith("--from") for word in options):
        raise BuildError("COPY --from is not carried out by the stand-in builder")
    *sources, target = [word for word in words if not word.startswith("--")]
    if not sources:
        raise BuildError("COPY needs a source and a destination")
    place = _inside(stage.root, stage.place(target))
    found = [path for source in sources for path in _find(stage.context, source)]
    directory = target.endswith(("/", ".")) or len(found) > 1 or place.is_dir()
    for path in found:
        if path.is_dir():
            skip = shutil.ignore_patterns(".git")
            shutil.copytree(path, place, symlinks=True, dirs_exist_ok=True, ignore=skip)
        else:
            goal = place / path.name if directory else place
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, goal, follow_symlinks=False)


def _find(context: Path, source: str) -> list[Path]:
    if source.startswith(("http://", "https://")):
        raise BuildError("nothing is downloaded by the stand-in builder")
    relative = source.strip("/") or "."
    found = sorted(context.glob(relative)) if relative != "." else [context]
    if not found or any(not path.resolve().is_relative_to(context.resolve()) for path in found):
        raise BuildError(f"failed to get fileinfo for {source}: no such file in the context")
    return found


def _env(stage: Stage, rest: str) -> None:
    words = shlex.split(rest)
    if "=" not in words[0]:
        name, _, value = rest.partition(" ")
        words = [f"{name}={value.strip()}"]
    for word in words:
        name, _, value = word.partition("=")
        stage.env[name] = stage.expand(value)


def _exec_form(rest: str) -> tuple[str, ...]:
    if not rest.startswith("["):
        return ("/bin/sh", "-c", rest)
    try:
        return tuple(json.loads(rest))
    except ValueError as error:
        raise BuildError(f"not a JSON list: {rest}") from error


def _inside(root: Path, path: str) -> Path:
    target = Path(os.path.normpath(root / path.lstrip("/")))
    if not target.is_relative_to(root):
        raise BuildError(f"{path} lies outside of the image")
    return target


def _options(arguments: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """--name=value and --name value; build arguments apart."""
    options: dict[str, str] = {}
    given: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        if name == "--build-arg":
            key, _, value = value.partition("=")
            given[key] = value
        elif name == "--destination":
            options[name] = f"{options[name]} {value}" if name in options else value
        else:
            options[name] = value
    return options, given


def require_push(images: Path, destination: str) -> None:
    """Raise PushError while pushes are to fail; the words stand in a file."""
    broken = images / "no-push"
    if broken.exists():
        raise PushError(f"failed to push to destination {destination}: {broken.read_text('utf-8')}")


def main(arguments: list[str]) -> int:
    """Build and store; 0, or 1 with the reason on standard error."""
    options, given = _options(arguments)
    images = Path(os.environ["STANDIN_IMAGES"])
    context = Path(options.get("--context", "dir:///workspace").removeprefix("dir://"))
    dockerfile = context / options.get("--dockerfile", "Dockerfile")
    try:
        if "--destination" not in options:
            raise BuildError("you must provide --destination, or use --no-push")
        with tempfile.TemporaryDirectory(dir=images) as root:
            stage = Stage(context, Path(root), images, arguments=given)
            config = build(stage, dockerfile)
            for destination in options["--destination"].split():
                require_push(images, destination)
                digest = store_image(images, destination, Path(root), config)
                print(f"stored {destination}@{digest} (stand-in builder)", flush=True)
    except BuildError as error:
        print(f"error building image: {error}", file=sys.stderr)
        return 1
    except PushError as error:
        print(f"error pushing image: {error}", file=sys.stderr)
        return 1
    if target := options.get("--digest-file"):
        Path(target).write_text(digest, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
