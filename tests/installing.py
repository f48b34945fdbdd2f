"""Installing as a person does: `make`, `kubectl kustomize`, and what they give."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.standin.kubectl import find_kubectl

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "manifests" / "example"
IMAGE = "registry.example.com:5000/tools/gitops-hook:1.2.3"

Object = dict[str, Any]


def make(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run make as from a fresh shell without a terminal, whatever make this test runs under."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments, *(f"{name}={value}" for name, value in variables.items())],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def rendered(directory: Path) -> list[Object]:
    """What `kubectl kustomize` makes of a directory; of our own, which do not change, only once."""
    text = kustomized_once(directory) if directory.is_relative_to(ROOT) else kustomized(directory)
    return list(yaml.load_all(text, yaml.CSafeLoader))


def kustomized(directory: Path) -> str:
    """The text that `kubectl kustomize` prints, and nothing besides."""
    done = subprocess.run(
        [find_kubectl(), "kustomize", str(directory)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


kustomized_once = cache(kustomized)


class Installed:
    """The objects of one rendering, by kind, namespace and name."""

    def __init__(self, objects: list[Object]) -> None:
        self.objects = objects

    def all(self, kind: str, namespace: str | None = None) -> list[Object]:
        return [
            thing
            for thing in self.objects
            if thing["kind"] == kind and namespace in (None, thing["metadata"].get("namespace"))
        ]

    def one(self, kind: str, name: str, namespace: str | None = None) -> Object:
        found = [o for o in self.all(kind, namespace) if o["metadata"]["name"] == name]
        assert len(found) == 1, f"{len(found)} of {kind} {namespace}/{name}"
        return found[0]

    @property
    def daemon(self) -> Object:
        return self.one("Deployment", "gitops-hook", "orchestration")

    @property
    def pod(self) -> Object:
        spec: Object = self.daemon["spec"]["template"]["spec"]
        return spec

    @property
    def container(self) -> Object:
        (container,) = self.pod["containers"]
        return container  # type: ignore[no-any-return]
