#!/usr/bin/env python3
"""gitops-hook: a GitLab push becomes a tested, built, blue-green-deployed version on Kubernetes.

The way of a push, and where to read about it:

    GitLab -> POST /webhook -> verify, parse, spool (fsync), 202          signatures, pushes, spool, HTTP
      intake     everything spooled becomes suspended Jobs in one create  job manifests, controller
      controller released newest first; tests, then the image build       cluster mirror, decide
      worker     claim, render, apply, rollout status, preview, switch,   app manifests, deploy
                 verify, bake; sick: one patch takes the traffic back
      catch-up   `git ls-remote` finds what GitLab failed to deliver      git, controller

The cluster's own objects are the state: a Job's conditions, a Deployment's status, a Service's
selector. Annotations are intents and history; where they disagree with the object, the object wins.
Nothing that matters lives in memory only: kill it at any point, start it again, same end state.

Words: an *app* is one repository's deployment; a *run* is one commit of one ref of one app; a
*stage* is test, build or an environment; a *colour* is one of an app's two Deployments; a *release*
is the stored rendering of one run for one environment; the *claim* says who is changing an
environment; to *heal* is to put the rollback target back where a failed deployment overwrote it.

Sections: constants, errors, configuration, logging, metrics, signatures, pushes, spool, kubectl,
git, job manifests, app manifests, cluster mirror, decide, deploy, controller, HTTP, commands, main.
Each uses only those above it. Exit status: 0 done, 1 tried and failed, 2 usage, configuration, no
kubectl or no cluster, 3 refused.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import calendar
import codecs
import copy
import gzip
import hashlib
import hmac
import http
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar
from urllib.parse import urlsplit
from xml.etree import ElementTree

import prometheus_client
import requests
import waitress.server
import yaml

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__version__ = "0.1.0"

# === constants ====================================================================================

MANAGER = "gitops-hook"
ORCHESTRATION = "orchestration"  # the namespace of the daemon, its configuration and its state

LABEL_MANAGED = "app.kubernetes.io/managed-by"
LABEL_APP = "gitops-hook/app"
LABEL_RUN = "gitops-hook/run"
LABEL_STAGE = "gitops-hook/stage"
LABEL_VERSION = "version"  # blue or green, the key of the article

NOTE_REPOSITORY = "gitops-hook/repository"
NOTE_REF = "gitops-hook/ref"
NOTE_COMMIT = "gitops-hook/commit"
NOTE_BEFORE = "gitops-hook/before"
NOTE_TITLE = "gitops-hook/title"
NOTE_DELIVERY = "gitops-hook/delivery"
NOTE_RECEIVED = "gitops-hook/received-at"
NOTE_OUTCOME = "gitops-hook/outcome"
NOTE_REASON = "gitops-hook/reason"
NOTE_DETAIL = "gitops-hook/detail"
NOTE_ENDED = "gitops-hook/ended-at"
NOTE_DIGEST = "gitops-hook/digest"
NOTE_SUMMARY = "gitops-hook/summary"
NOTE_REMADE = "gitops-hook/remade"
NOTE_PREVIOUS = "gitops-hook/previous-selector"
NOTE_HISTORY = "gitops-hook/history"
NOTE_CLAIM = "gitops-hook/deploying"
NOTE_BAKE = "gitops-hook/bake-until"

COLOURS = ("blue", "green")
HISTORY_LENGTH = 10
REJECTED_LENGTH = 50
DETAIL_LENGTH = 1500  # characters of explanation kept on an object
TERMINATION_LENGTH = 4096  # bytes a container may leave behind, a kubelet's limit
SIGNATURE_TOLERANCE = 300  # seconds, as the Standard Webhooks libraries have it
DEDUPE_SECONDS = 1200  # twice the tolerance: a replay is refused by age before it is forgotten
DEDUPE_ENTRIES = 20_000
JOB_TTL = 3600  # seconds a finished Job is kept
KUBECTL_TIMEOUT = 30.0  # seconds for one call, as in the article
WATCH_SECONDS = 300  # every watch ends and relists after this: a hung one looks like a quiet one
GIT_TIMEOUT = 60.0
VERIFY_SECONDS = 10.0  # the endpoints must have followed the selector by then
HEALTH_INTERVAL = 0.25  # seconds between health checks: three failures are seen within one second
UNREADY_SECONDS = 5.0  # readiness below the wanted number for so long is sickness
REBAKE_SECONDS = 15.0  # a bake that nobody watched to its end is watched for at least so long
ROLLOUT_PER_REPLICA = 20.0
CLAIM_SECONDS = 900.0  # a claim of a command that old belongs to a process that is gone
HEAD_GRACE = 30.0  # a git server may show a pushed head so much later than the webhook
HEAD_FRESH = 10.0  # age up to which a read head decides over a release
DELAYS = (1.0, 2.0, 5.0, 10.0, 30.0)  # back-off, the last one repeats
POD_UID = 65532
BATCH = 200  # Jobs in one create

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
SHA = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
IMAGE = re.compile(
    r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?(:[0-9]+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)


class Outcome(StrEnum):
    """How a run ended."""

    TESTED = "tested"
    DEPLOYED = "deployed"
    FAILED = "failed"
    SWITCHED_BACK = "switched-back"
    ROLLED_BACK = "rolled-back"
    SUPERSEDED = "superseded"


class Reason(StrEnum):
    """Why a run ended or waits: the same word in annotation, log, metric and `status`."""

    OK = "Ok"
    TESTS_FAILED = "TestsFailed"
    BUILD_FAILED = "BuildFailed"
    NO_DIGEST = "NoDigest"
    CLONE_FAILED = "CloneFailed"
    IMAGE_NOT_FOUND = "ImageNotFound"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CONTAINER_CONFIG = "ContainerConfigError"
    CRASH_LOOP = "CrashLoop"
    OUT_OF_MEMORY = "OutOfMemory"
    INIT_FAILED = "InitContainerFailed"
    QUOTA_EXCEEDED = "QuotaExceeded"
    ADMISSION_REFUSED = "AdmissionRefused"
    UNSCHEDULABLE = "Unschedulable"
    NEVER_READY = "NeverReady"
    TIMEOUT = "Timeout"
    QUEUE_TIMEOUT = "QueueTimeout"
    VANISHED = "Vanished"
    MANIFEST_INVALID = "ManifestInvalid"
    MANIFEST_REFUSED = "ManifestRefused"
    ADOPTION_REFUSED = "AdoptionRefused"
    JOB_REFUSED = "JobRefused"
    SMOKE_FAILED = "SmokeFailed"
    SELECTOR_CHANGED = "SelectorChanged"
    ENDPOINTS_MISSING = "EndpointsMissing"
    SICK_AFTER_SWITCH = "SickAfterSwitch"
    BOTH_SICK = "BothSick"
    CLAIM_LOST = "ClaimLost"
    NOT_HEAD = "NotHead"
    REJECTED = "Rejected"
    ROLLED_BACK = "RolledBack"
    CLUSTER_ERROR = "ClusterError"
    GIT_ERROR = "GitError"
    BUG = "Bug"


class Phase(StrEnum):
    """How far the holder of a claim has come."""

    PREPARING = "preparing"
    BAKING = "baking"
    SWITCHED_BACK = "switched-back"
    HEALING = "healing"
    DRAINING = "draining"


# === errors =======================================================================================
# Everything raised on purpose is a HookError with fields; foreign text in it is clipped. They are
# caught where their meaning is known: a request, a run, a command. A broad except stands only where
# a request or a thread ends, and it logs and counts.


def clip(text: str, limit: int = 300) -> str:
    """Return foreign text fit for a log line: printable, one line, at most limit characters."""
    flat = "".join(c if c.isprintable() else " " for c in text)
    flat = " ".join(flat.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


class HookError(Exception):
    """The base of all errors raised on purpose."""


class ConfigError(HookError):
    """The configuration or the surroundings cannot work; carries every fault found."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = tuple(faults)


class DeliveryError(HookError):
    """A request is refused with an HTTP status, a reason code and a sentence for its sender."""

    def __init__(self, status: http.HTTPStatus, code: str, text: str) -> None:
        super().__init__(text)
        self.status, self.code = status, code


class ProcessError(HookError):
    """A program did not do what it was started for: kubectl or git."""

    def __init__(
        self, argv: Sequence[str], code: int | None, stderr: str, stdout: str = ""
    ) -> None:
        text = stderr if code is not None else f"no answer in time; {stderr}"
        super().__init__(f"{Path(argv[0]).name} {clip(' '.join(argv[1:4]), 80)}: {clip(text)}")
        self.code, self.stderr, self.stdout = code, stderr, stdout

    @property
    def timed_out(self) -> bool:
        """Whether it was ended by its time limit, so that its effect is unknown."""
        return self.code is None


class KubectlError(ProcessError):
    """kubectl failed. `kind` is the API server's word for it, or Unreachable, or Unknown."""

    @property
    def kind(self) -> str:
        """Return AlreadyExists, Conflict, NotFound, Forbidden, Invalid, Unreachable or Unknown."""
        if found := re.search(r"Error from server \((\w+)\)", self.stderr):
            word = found[1]
            gone = {"InternalError", "ServiceUnavailable", "Timeout", "TooManyRequests"}
            return "Unreachable" if word in gone else word
        if re.search(r"^The \w+ .* is invalid", self.stderr, re.MULTILINE):
            return "Invalid"
        if re.search(UNREACHABLE, self.stderr) or self.timed_out:
            return "Unreachable"
        return "Unknown"


UNREACHABLE = (
    r"connection refused|connection reset|no route to host|i/o timeout|TLS handshake timeout"
    r"|Client\.Timeout exceeded|context deadline exceeded|was refused - did you specify"
    r"|no such host|unexpected EOF|EOF$|http2: |server is currently unable|etcdserver"
    r"|no configuration has been provided|Unauthorized|the server has received too many requests"
)


class GitError(ProcessError):
    """git failed: no access, no such commit, no answer in time."""


class StageError(HookError):
    """A run cannot go on: it ends red with this reason; live traffic is as it was."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class SupersededError(HookError):
    """A run stops because something newer, or someone, took its place."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class RefusedError(HookError):
    """A command was not carried out, for a reason that trying again does not mend: exit 3."""


class SpoolError(HookError):
    """A push cannot be stored now: the spool is full or the disk refuses."""


# === configuration ================================================================================

T = TypeVar("T")
Object = dict[str, Any]
REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Setting:
    """The declaration of one setting: parser, default as written in YAML, one line of prose."""

    parse: Callable[[Any], Any] | Section
    default: Any
    doc: str


@dataclass(frozen=True, slots=True)
class Section:
    """A parser for a nested mapping, or for a list of them."""

    cls: type[Any]
    many: bool = False


def setting(parse: Callable[[Any], Any] | Section, default: Any, doc: str) -> Any:
    """Declare a dataclass field as a setting; default REQUIRED makes it mandatory."""
    return field(metadata={"setting": Setting(parse, default, doc)})


def text(value: Any) -> str:
    """Parse a non-empty string."""
    if not isinstance(value, str) or not value.strip() or "\x00" in value:
        raise ValueError("is not a text")
    return value


def matching(pattern: str, what: str, limit: int = 255) -> Callable[[Any], str]:
    """Return a parser for a string that matches the whole pattern."""

    def parse(value: Any) -> str:
        if not isinstance(value, str) or len(value) > limit or not re.fullmatch(pattern, value):
            raise ValueError(f"is not {what}")
        return value

    return parse


def one_of(*words: str) -> Callable[[Any], str]:
    """Return a parser that accepts only these words."""
    return matching("|".join(words), "one of " + ", ".join(words))


def number(low: int, high: int) -> Callable[[Any], int]:
    """Return a parser for a whole number within bounds."""

    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"is not a whole number from {low} to {high}")
        return value

    return parse


def duration(value: Any) -> float:
    """Parse 500ms, 90s, 15m or 2h into seconds."""
    found = re.fullmatch(r"([0-9]{1,7})(ms|s|m|h)", value) if isinstance(value, str) else None
    if not found:
        raise ValueError("is not a duration (e.g. 90s, 15m, 2h)")
    return int(found[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}[found[2]]


def size(value: Any) -> int:
    """Parse 512KiB or 5MiB into bytes."""
    found = re.fullmatch(r"([0-9]{1,6})(KiB|MiB)", value) if isinstance(value, str) else None
    if not found or int(found[1]) == 0:
        raise ValueError("is not a size (e.g. 512KiB, 5MiB)")
    return int(found[1]) * {"KiB": 1024, "MiB": 1024 * 1024}[found[2]]


def listing(parse: Callable[[Any], T]) -> Callable[[Any], tuple[T, ...]]:
    """Return a parser for a list, each entry parsed alike."""

    def parse_all(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise ValueError("is not a list")
        return tuple(parse(v) for v in value)

    return parse_all


def repository_url(value: Any) -> str:
    """Parse an http(s) URL without user and query, or an absolute path (also file://)."""
    local = isinstance(value, str) and re.fullmatch(r"(file://)?/[^\s\x00]+", value)
    if not local and not re.fullmatch(r"https?://[A-Za-z0-9._:\[\]-]+/[^\s@?#\x00]+", text(value)):
        raise ValueError("is not an http(s) URL without user, query and fragment")
    return str(value)


def folder(value: Any) -> str:
    """Parse a relative path that stays below its root."""
    path = PurePosixPath(text(value))
    if path.is_absolute() or ".." in path.parts or str(value).startswith("-"):
        raise ValueError("is not a relative path within the repository")
    return str(path)


def resources(value: Any) -> dict[str, dict[str, str]]:
    """Parse a container's resources: requests and limits of cpu and memory."""
    quantity = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?")
    if not isinstance(value, dict) or not value.keys() <= {"requests", "limits"}:
        raise ValueError("is not {requests: {cpu, memory}, limits: {cpu, memory}}")
    for part in value.values():
        ok = isinstance(part, dict) and all(quantity.fullmatch(str(q)) for q in part.values())
        if not ok:
            raise ValueError("holds something that is not a quantity (e.g. 250m, 512Mi)")
    return {k: {n: str(q) for n, q in part.items()} for k, part in value.items()}


def retained(value: Any) -> int | None:
    """Parse `full` (None) or a number of replicas."""
    return None if value == "full" else number(0, 1000)(value)


def namespace_map(value: Any) -> dict[str, str]:
    """Parse the map of stage or environment to namespace: test, build, and one environment each."""
    parse = matching(DNS_LABEL.pattern, "a map of DNS labels", 63)
    if not isinstance(value, dict) or not {"test", "build"} <= value.keys():
        raise ValueError("is not a map with test, build and the environments")
    spaces = {parse(k): parse(v) for k, v in value.items()}
    if len(set(spaces.values())) < len(spaces) or ORCHESTRATION in spaces.values():
        raise ValueError("uses a namespace twice, or the daemon's own")
    return spaces


image_name = matching(IMAGE.pattern, "an image reference", 400)


@dataclass(frozen=True, kw_only=True, slots=True)
class TestSettings:
    """How the tests of an app are run."""

    image: str = setting(image_name, "python:3.12-slim", "image the tests run in")
    command: str = setting(
        text,
        "pip install -r requirements.txt && python -m pytest tests/ -v --junitxml=$JUNIT_XML",
        "run under `sh -ec` in the checked-out commit; $JUNIT_XML is where a report is read from",
    )
    timeout: float = setting(duration, "15m", "from the pod's start")
    resources: dict[str, dict[str, str]] = setting(
        resources,
        {
            "requests": {"cpu": "250m", "memory": "256Mi"},
            "limits": {"cpu": "500m", "memory": "512Mi"},
        },
        "of the test container",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSettings:
    """How the image of an app is built."""

    builder: str = setting(one_of("kaniko", "none"), "kaniko", "none: manifests name digests")
    image: str = setting(
        lambda v: v and image_name(v), "", "repository the image is pushed to, without a tag"
    )
    dockerfile: str = setting(folder, "Dockerfile", "path in the repository")
    args: tuple[str, ...] = setting(
        listing(matching(r"--[^\s\x00][^\x00]*", "an option")), [], "more options for kaniko"
    )
    timeout: float = setting(duration, "20m", "from the pod's start")
    resources: dict[str, dict[str, str]] = setting(
        resources,
        {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "4Gi"}},
        "of the build container",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """What makes a version healthy before and after the switch."""

    path: str = setting(matching(r"/[\x21-\x7e]*", "a path"), "/ready", "answers 2xx when healthy")
    successes: int = setting(number(1, 100), 3, "answers in a row that let a version pass")
    failures: int = setting(number(1, 100), 3, "failures in a row that make it sick")
    timeout: float = setting(duration, "30s", "for the smoke test before the switch")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploySettings:
    """How an app is deployed."""

    manifests: str = setting(folder, "deploy", "folder in the repository: YAML or a kustomization")
    ignore_kinds: tuple[str, ...] = setting(listing(text), [], "kinds someone else applies")
    environments: tuple[str, ...] = setting(
        listing(text), ["staging", "production"], "in this order; the last one bakes; []: only test"
    )
    health: Health = setting(Section(Health), {}, "")
    rollout_timeout: float = setting(duration, "300s", "at least; 20 s a replica if that is more")
    bake: float = setting(duration, "60s", "sickness after the switch takes the traffic back")
    drain: float = setting(duration, "60s", "before the old colour is restarted or scaled down")
    retain: int | None = setting(retained, "full", "replicas of the old colour after the drain")


@dataclass(frozen=True, kw_only=True, slots=True)
class App:
    """One repository and what becomes of its pushes."""

    name: str = setting(matching(DNS_LABEL.pattern, "a DNS label of at most 30", 30), REQUIRED, "")
    repository: str = setting(repository_url, REQUIRED, "clone URL; its ssh forms match too")
    branch: str = setting(text, "main", "pushes here are tested, built, deployed")
    test_branches: tuple[str, ...] = setting(listing(text), ["*"], "pushes here are only tested")
    test: TestSettings = setting(Section(TestSettings), {}, "")
    build: BuildSettings = setting(Section(BuildSettings), {}, "")
    deploy: DeploySettings = setting(Section(DeploySettings), {}, "")

    @property
    def deploy_ref(self) -> str:
        """The ref whose pushes are deployed."""
        return f"refs/heads/{self.branch}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """The images of Job pods."""

    hook: str = setting(image_name, "gitops-hook:dev", "this program; `make apply` sets it")
    kaniko: str = setting(image_name, "ghcr.io/osscontainertools/kaniko:v1.28.3", "the builder")


@dataclass(frozen=True, kw_only=True, slots=True)
class Webhook:
    """How deliveries are judged."""

    verify: str = setting(
        one_of("signature", "token", "hmac"), "signature", "exactly this is required, see Routes"
    )
    max_body: int = setting(size, "5MiB", "larger bodies get a 413")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds on what runs at once."""

    max_running: int = setting(number(1, 1000), 4, "Jobs released at once")
    queue_timeout: float = setting(duration, "1h", "wait for quota or a free place")
    spool_files: int = setting(number(1, 1_000_000), 10_000, "pushes stored, then 503")
    kubectl: int = setting(number(1, 64), 8, "kubectl processes at once, watches apart")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole configuration, valid."""

    apps: tuple[App, ...] = setting(Section(App, many=True), REQUIRED, "")
    namespaces: dict[str, str] = setting(
        namespace_map,
        {"test": "test", "build": "build", "staging": "staging", "production": "production"},
        "of the stages and the environments",
    )
    images: Images = setting(Section(Images), {}, "")
    webhook: Webhook = setting(Section(Webhook), {}, "")
    limits: Limits = setting(Section(Limits), {}, "")
    catch_up: float = setting(duration, "5m", "between looks at the heads of all repositories")

    def app(self, name: str) -> App:
        """Return the app of that name; raises RefusedError when there is none."""
        for app in self.apps:
            if app.name == name:
                return app
        raise RefusedError(
            f"no app {clip(name, 60)!r}; known: {', '.join(a.name for a in self.apps)}"
        )

    def environments(self) -> dict[str, str]:
        """Return the namespaces that apps are deployed to, by environment, in order of first use."""
        names = dict.fromkeys(e for app in self.apps for e in app.deploy.environments)
        return {name: self.namespaces[name] for name in names}


def load_section(section: Section, data: Any, path: str, faults: list[str]) -> Any:
    """Build a dataclass from YAML data, adding every fault found with its path."""
    if section.many:
        if not isinstance(data, list):
            faults.append(f"{path}: is not a list")
            return ()
        one = Section(section.cls)
        return tuple(load_section(one, d, f"{path}[{i}]", faults) for i, d in enumerate(data))
    if not isinstance(data, dict):
        faults.append(f"{path or 'configuration'}: is not a mapping")
        return None
    known: dict[str, Setting] = {f.name: f.metadata["setting"] for f in fields(section.cls)}
    prefix = f"{path}." if path else ""
    faults += [
        f"{prefix}{k}: unknown key (known: {', '.join(known)})" for k in data if k not in known
    ]
    values = {
        n: load_value(s, data.get(n, s.default), prefix + n, faults) for n, s in known.items()
    }
    return section.cls(**values)


def load_value(declared: Setting, raw: Any, where: str, faults: list[str]) -> Any:
    """Parse one setting; a fault is added and None returned when it is missing or wrong."""
    if raw is REQUIRED:
        faults.append(f"{where}: is required")
    elif isinstance(declared.parse, Section):
        return load_section(declared.parse, raw, where, faults)
    else:
        try:
            return declared.parse(raw)
        except (ValueError, TypeError) as error:
            faults.append(f"{where}: {clip(repr(raw), 80)} {error}")
    return None


def cross_faults(config: Config) -> Iterator[str]:
    """Yield what is wrong between settings that are each right."""
    names = [a.name for a in config.apps]
    if any(names.count(n) > 1 for n in names):
        yield "apps: two apps have the same name"
    taken = {f"{n}-{suffix}" for n in names for suffix in (*COLOURS, "preview")}
    for i, app in enumerate(config.apps):
        if app.name in taken:
            yield f"apps[{i}].name: {app.name!r} is the name of another app's Deployment or Service"
        for e in app.deploy.environments:
            if e in ("test", "build") or e not in config.namespaces:
                yield f"apps[{i}].deploy.environments: {e!r} is not an environment in namespaces"
        if app.build.builder == "kaniko" and app.deploy.environments and not app.build.image:
            yield f"apps[{i}].build.image: is required with builder kaniko"
        if re.search(r"@|:[^/]*$", app.build.image.partition("/")[2]):
            yield f"apps[{i}].build.image: {app.build.image!r} must not carry a tag or digest"


def load_config(document: str) -> Config:
    """Parse and check the YAML text of the configuration; raises ConfigError with all faults."""
    try:
        data = yaml.safe_load(document)
    except yaml.YAMLError as error:
        raise ConfigError([f"configuration: not YAML: {clip(str(error))}"]) from error
    faults: list[str] = []
    config = load_section(Section(Config), data, "", faults)
    if not faults:
        faults += cross_faults(config)
    if faults:
        raise ConfigError(faults)
    return config  # type: ignore[no-any-return]  # load_section builds what its Section names


def settings_table(section: type[Any] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, meaning) of every setting, for the README."""
    for f in fields(section):
        declared: Setting = f.metadata["setting"]
        name = prefix + f.name
        if isinstance(declared.parse, Section):
            yield from settings_table(
                declared.parse.cls, name + ("[]." if declared.parse.many else ".")
            )
        else:
            default = "required" if declared.default is REQUIRED else json.dumps(declared.default)
            yield name, default, declared.doc


PROCESS_SETTINGS = {
    "GITOPS_HOOK_CONFIG": "/etc/gitops-hook/config.yaml",
    "GITOPS_HOOK_SECRETS": "/etc/gitops-hook/secrets",
    "GITOPS_HOOK_SPOOL": "/var/spool/gitops-hook",
    "GITOPS_HOOK_LISTEN": "0.0.0.0:8080",
    "GITOPS_HOOK_ADMIN_LISTEN": "127.0.0.1:8081",
}


@dataclass(frozen=True, slots=True)
class Process:
    """What the environment variables say: files, folders and addresses."""

    config: Path
    secrets: Path
    spool: Path
    listen: str
    admin_listen: str

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Process:
        """Read GITOPS_HOOK_*; raises ConfigError for unknown names but those a kubelet injects."""
        ours = [k for k in environ if k.startswith("GITOPS_HOOK_") and k not in PROCESS_SETTINGS]
        injected = re.compile(r"GITOPS_HOOK(_\w+)?_(SERVICE_(HOST|PORT\w*)|PORT\w*)")
        faults = [f"{k}: unknown variable" for k in ours if not injected.fullmatch(k)]
        value = {k: environ.get(k) or default for k, default in PROCESS_SETTINGS.items()}
        for key in ("GITOPS_HOOK_LISTEN", "GITOPS_HOOK_ADMIN_LISTEN"):
            if not re.fullmatch(r"[^\s/]+:[0-9]{1,5}", value[key]):
                faults.append(f"{key}: {value[key]!r} is not host:port")
        if faults:
            raise ConfigError(faults)
        config, secrets, spool, listen, admin = value.values()
        return cls(Path(config), Path(secrets), Path(spool), listen, admin)


SECRET_OF_MODE = {
    "signature": "webhook-signing-tokens",
    "token": "webhook-tokens",
    "hmac": "webhook-tokens",
}
GIT_CREDENTIALS = "git-credentials"


@dataclass(frozen=True, slots=True)
class Secrets:
    """The secrets directory: one file a kind, one secret a line, read at use so that it rotates."""

    directory: Path

    def lines(self, name: str) -> list[bytes]:
        """Return the secrets in a file, newest or oldest first as written; none when it is absent."""
        try:
            content = (self.directory / name).read_bytes()
        except OSError:
            return []
        return [line for raw in content.split(b"\n") if (line := raw.strip(b" \t\r"))]

    def keys(self, mode: str) -> list[bytes]:
        """Return the keys that deliveries are verified with; raises ConfigError if there are none."""
        name = SECRET_OF_MODE[mode]
        keys = self.lines(name)
        if not keys:
            raise ConfigError([f"secret {name}: missing or empty in {self.directory}"])
        if mode == "signature":
            return [decode_signing_token(k, i + 1) for i, k in enumerate(keys)]
        return keys

    def mask(self, text: str) -> str:
        """Return text without secrets: known values, credentials in URLs, the usual token shapes."""
        for name in (*SECRET_OF_MODE.values(), GIT_CREDENTIALS):
            for line in self.lines(name):
                known = line.decode("utf-8", "replace")
                parts = [known, *([p] if (p := urlsplit(known).password) else [])]
                for part in parts:
                    text = text.replace(part, "***") if len(part) > 3 else text
        text = re.sub(r"(\w+://)[^/\s:@]*:?[^/\s@]*@", r"\1***@", text)
        text = re.sub(r"\b(glpat-|ghp_|whsec_|eyJ[\w-]+\.)[\w+/=.-]{8,}", "***", text)
        pattern = r"(?i)\b([\w-]*(?:password|passwd|secret|token|api_?key)[\w-]*\s*[=:]\s*)\S+"
        return re.sub(pattern, r"\1***", text)


def decode_signing_token(token: bytes, line: int) -> bytes:
    """Return the 32 key bytes of `whsec_` + base64; raises ConfigError naming only the line."""
    try:
        key = base64.b64decode(token.removeprefix(b"whsec_"), validate=True)
    except binascii.Error:
        key = b""
    if not token.startswith(b"whsec_") or len(key) != 32:
        raise ConfigError([f"secret webhook-signing-tokens: line {line} is not whsec_ + 32 bytes"])
    return key


# === logging ======================================================================================

LOG = logging.getLogger("gitops_hook")
LOG_FIRST = ("run", "app", "environment", "delivery")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, msg, then run, app, environment, delivery, then the rest."""

    def __init__(self, mask: Callable[[str], str]) -> None:
        super().__init__()
        self.mask = mask

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for one record, secrets masked."""
        given: dict[str, Any] = getattr(record, "fields", {})
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "ts": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "msg": record.getMessage(),
        }
        line |= {k: str(given[k]) for k in LOG_FIRST if given.get(k)}
        line |= {k: v for k, v in given.items() if k not in LOG_FIRST and v is not None}
        if record.exc_info:
            line["exc"] = "".join(traceback.format_exception(*record.exc_info))[-4000:]
        return self.mask(json.dumps(line, default=str))


def setup_logging(mask: Callable[[str], str]) -> None:
    """Send every log record of the program to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(mask))
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    LOG.setLevel(logging.INFO)


def info(msg: str, **given: Any) -> None:
    """Log something that happened as it should: msg is constant, values go in fields."""
    LOG.info(msg, extra={"fields": given})


def warn(msg: str, **given: Any) -> None:
    """Log something that will be tried again."""
    LOG.warning(msg, extra={"fields": given})


def error(msg: str, *, exc: bool = False, **given: Any) -> None:
    """Log something that a person must look at; exc adds the traceback being handled."""
    LOG.error(msg, extra={"fields": given}, exc_info=exc)


# === metrics ======================================================================================

STAGE_BUCKETS = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600)


class Metrics:
    """Every metric of the daemon, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()

        def counter(name: str, doc: str, *labels: str) -> prometheus_client.Counter:
            return prometheus_client.Counter(
                name, doc, labels, namespace="gitops_hook", registry=self.registry
            )

        def gauge(name: str, doc: str, *labels: str) -> prometheus_client.Gauge:
            return prometheus_client.Gauge(
                name, doc, labels, namespace="gitops_hook", registry=self.registry
            )

        self.deliveries = counter("deliveries", "Webhook requests by result.", "result")
        self.runs = counter("runs", "Ended runs.", "app", "outcome", "stage", "reason")
        self.switches = counter("switches", "Switched traffic.", "app", "environment", "direction")
        self.kubectl = counter("kubectl_calls", "kubectl processes ended.", "verb", "result")
        self.errors = counter("errors", "Errors that a person should look at.", "where")
        self.drift = counter(
            "selector_drift", "Services changed by someone else.", "app", "environment"
        )
        self.catch_up = counter("catch_up_runs", "Runs GitLab failed to announce.", "app")
        self.spool = gauge("spool_files", "Pushes stored and not yet in the cluster.")
        self.waiting = gauge("waiting", "1 while the daemon waits for something outside.", "what")
        self.queue = gauge("jobs", "Unfinished Jobs by state.", "state")
        self.stage_seconds = prometheus_client.Histogram(
            "stage_seconds",
            "Duration of stages.",
            ("app", "stage", "result"),
            namespace="gitops_hook",
            registry=self.registry,
            buckets=STAGE_BUCKETS,
        )

    def render(self) -> bytes:
        """Return the Prometheus text format."""
        return prometheus_client.generate_latest(self.registry)


# === signatures ===================================================================================


def verify_delivery(
    mode: str, keys: list[bytes], headers: Mapping[str, str], body: bytes, now: float
) -> None:
    """Check that a delivery is authentic; raises DeliveryError 401, which says what was missing.

    Exactly the configured mode counts: there is no fallback to a weaker one. Header names are lower
    case. See https://docs.gitlab.com/user/project/integrations/webhooks/ and
    https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md.
    """
    if mode == "signature":
        refusal = signature_refusal(keys, headers, body, now)
    else:
        given = header_bytes(headers, "x-gitlab-token")
        expected = keys if mode == "token" else [hex_hmac(k, body) for k in keys]
        matches = [hmac.compare_digest(sha256(e), sha256(given)) for e in expected]
        refusal = None if given and any(matches) else "X-Gitlab-Token does not match"
    if refusal:
        raise DeliveryError(http.HTTPStatus.UNAUTHORIZED, "NotAuthentic", refusal)


def signature_refusal(
    keys: list[bytes], headers: Mapping[str, str], body: bytes, now: float
) -> str | None:
    """Return why a signed delivery is refused, or None: Standard Webhooks v1, HMAC-SHA256."""
    stamp, given = headers.get("webhook-timestamp", ""), header_bytes(headers, "webhook-signature")
    message_id = header_bytes(headers, "webhook-id")
    if not (stamp and given and message_id):
        return "webhook-id, webhook-timestamp and webhook-signature are required"
    if not re.fullmatch(r"[0-9]{1,12}", stamp, re.ASCII):
        return "webhook-timestamp is not a Unix time"
    signed = b".".join((message_id, stamp.encode(), body))
    expected = [base64.b64encode(hmac.digest(k, signed, "sha256")) for k in keys]
    entries = [e.removeprefix(b"v1,") for e in given.split(b" ") if e.startswith(b"v1,")]
    matches = [hmac.compare_digest(e, x) for e in entries[:20] for x in expected]
    if not any(matches):
        return "webhook-signature does not match"
    if abs(now - int(stamp)) > SIGNATURE_TOLERANCE:
        return "webhook-timestamp is not recent"
    return None


def header_bytes(headers: Mapping[str, str], name: str) -> bytes:
    """Return a header's bytes as they came: WSGI hands them over as latin-1 text (PEP 3333)."""
    return headers.get(name, "").encode("latin-1", "replace")


def hex_hmac(key: bytes, body: bytes) -> bytes:
    """Return the hex HMAC-SHA256 of a body: the article's scheme, for relays that sign."""
    return hmac.digest(key, body, "sha256").hex().encode()


def sha256(value: bytes) -> bytes:
    """Return a digest of fixed length, so that a comparison tells nothing about lengths."""
    return hashlib.sha256(value).digest()


def sign(token: bytes, message_id: str, stamp: int, body: bytes) -> str:
    """Return the webhook-signature header that GitLab would send for these bytes."""
    signed = b".".join((message_id.encode(), str(stamp).encode(), body))
    digest = hmac.digest(decode_signing_token(token, 1), signed, "sha256")
    return "v1," + base64.b64encode(digest).decode()


# === pushes =======================================================================================


@dataclass(frozen=True, kw_only=True, slots=True)
class Push:
    """One branch that moved, as a delivery or the catch-up tells it."""

    urls: tuple[str, ...]
    ref: str
    commit: str
    before: str = ""
    title: str = ""
    delivery: str = ""


@dataclass(frozen=True, slots=True)
class Ignored:
    """A delivery that is in order and asks for nothing, with its reason code."""

    reason: str


def bad(text: str) -> NoReturn:
    """Refuse a delivery as malformed."""
    raise DeliveryError(http.HTTPStatus.BAD_REQUEST, "Malformed", text)


def typed(data: Mapping[str, Any], key: str, kind: type[T], where: str = "") -> T:
    """Return a field of a payload; a 400 that names it when it is missing or of another type."""
    value = data.get(key)
    if not isinstance(value, kind):
        bad(f"{where}{key}: {'missing' if value is None else 'not a ' + kind.__name__}")
    return value


def parse_delivery(body: bytes, delivery: str) -> Push | Ignored:
    """Return what a delivery says, reading only the fields it needs; raises DeliveryError 400.

    The body decides what it is, never the X-Gitlab-Event header: old servers send samples whose
    header and body disagree. Clone URL, image and commands never come from here.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as wrong:
        bad(f"the body is not JSON: {clip(str(wrong), 80)}")
    if not isinstance(data, dict):
        bad("the body is not a JSON object")
    kind = data.get("object_kind", data.get("event_name"))
    if not isinstance(kind, str):
        bad("object_kind: missing or not a text")
    if kind != "push":
        return Ignored("TagPush" if kind == "tag_push" else "OtherEvent")
    ref, after = typed(data, "ref", str), typed(data, "after", str)
    if not ref.startswith("refs/heads/"):
        return Ignored("TagPush" if ref.startswith("refs/tags/") else "OtherRef")
    if not SHA.fullmatch(after):
        bad("after: not a full commit id")
    if set(after) == {"0"}:
        return Ignored("RefDeleted")
    if not valid_ref(ref):
        bad("ref: not a branch name that git allows")
    before = data.get("before")
    before = before if isinstance(before, str) and SHA.fullmatch(before) else ""
    urls = project_urls(data)
    title = commit_title(data.get("commits"), after)
    return Push(urls=urls, ref=ref, commit=after, before=before, title=title, delivery=delivery)


def valid_ref(ref: str) -> bool:
    """Whether git would accept the name: https://git-scm.com/docs/git-check-ref-format."""
    parts = ref.split("/")
    return (
        len(ref) <= 250
        and ref.isprintable()
        and not re.search(r"[ ~^:?*\[\\\x7f]|\.\.|@\{|\.$", ref)
        and all(p and not p.startswith(".") and not p.endswith(".lock") for p in parts)
    )


def project_urls(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Return every address by which a payload names its project; a 400 when there is none."""
    project = typed(data, "project", dict)
    repository = data.get("repository")
    named = [
        project.get(k) for k in ("git_http_url", "git_ssh_url", "http_url", "ssh_url", "web_url")
    ]
    if isinstance(repository, dict):
        named += [repository.get(k) for k in ("git_http_url", "git_ssh_url")]
    urls = tuple(dict.fromkeys(u for u in named if isinstance(u, str) and u))
    return urls or bad("project: names no git_http_url, git_ssh_url or web_url")


def commit_title(commits: Any, after: str) -> str:
    """Return the first line of the pushed commit's message where the payload has it, clipped."""
    for commit in commits if isinstance(commits, list) else []:
        if isinstance(commit, dict) and commit.get("id") == after:
            lines = str(commit.get("message") or commit.get("title") or "").strip().splitlines()
            return clip(lines[0], 120) if lines else ""
    return ""


def normalise_url(url: str) -> tuple[str, str]:
    """Return (host, path) by which two addresses of one repository are equal.

    Scheme, user, port, case and `.git` do not count; `git@host:path` is read as ssh. A local path
    is compared as it is, with an empty host.
    """
    if url.startswith(("/", "file://")):
        return "", url.removeprefix("file://").rstrip("/").removesuffix(".git")
    if "://" not in url and (scp := re.fullmatch(r"(?:[^@/:]+@)?([^/:]+):/?(.+)", url)):
        host, path = scp[1], scp[2]
    else:
        try:
            split = urlsplit(url)
            host, path = split.hostname or "", split.path
        except ValueError:
            return "", ""
    return host.casefold(), path.strip("/").removesuffix(".git").strip("/").casefold()


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One commit of one ref of one app: what its Jobs say about where it came from."""

    id: str
    app: str
    ref: str
    commit: str
    before: str = ""
    title: str = ""
    delivery: str = ""
    received: float = 0.0

    @property
    def branch(self) -> str:
        """The ref without refs/heads/, slashes and all."""
        return self.ref.removeprefix("refs/heads/")


def run_id(app: str, ref: str, commit: str) -> str:
    """Return the deterministic id: the same push always makes the same run."""
    return f"{app}-{commit[:8]}-{hashlib.sha256(f'{ref} {commit}'.encode()).hexdigest()[:4]}"


def runs_of_push(config: Config, push: Push, now: float) -> list[Run] | Ignored:
    """Return the runs that a push asks for, one for each app that it concerns."""
    named = {normalise_url(u) for u in push.urls}
    apps = [a for a in config.apps if normalise_url(a.repository) in named]
    if not apps:
        return Ignored("UnknownProject")
    branch = push.ref.removeprefix("refs/heads/")
    wanted = [
        a
        for a in apps
        if branch == a.branch or any(fnmatchcase(branch, p) for p in a.test_branches)
    ]
    if not wanted:
        return Ignored("OtherBranch")
    return [
        Run(
            id=run_id(a.name, push.ref, push.commit),
            app=a.name,
            ref=push.ref,
            commit=push.commit,
            before=push.before,
            title=push.title,
            delivery=push.delivery,
            received=now,
        )
        for a in wanted
    ]


class Deliveries:
    """The ids of recent deliveries, bounded in number and age; safe to share between threads."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, float] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, delivery: str, now: float) -> bool:
        """Whether this id was remembered lately; forgets what is too old."""
        with self._lock:
            while self._seen and now - next(iter(self._seen.values())) > DEDUPE_SECONDS:
                self._seen.popitem(last=False)
            return delivery in self._seen

    def remember(self, delivery: str, now: float) -> None:
        """Remember an id whose push is stored."""
        with self._lock:
            self._seen[delivery] = now
            if len(self._seen) > DEDUPE_ENTRIES:
                self._seen.popitem(last=False)


# === spool ========================================================================================


class Spool:
    """Accepted pushes on disk, one file a run, until the cluster has them.

    A file is there after a crash once `store` has returned. What cannot be read is moved aside to
    `bad/`, never deleted.
    """

    def __init__(self, directory: Path, max_files: int) -> None:
        self.directory, self.max_files = directory, max_files
        self._lock = threading.Lock()
        self._count = 0

    def prepare(self) -> None:
        """Create the folder, count what is there, prove it writable; raises SpoolError."""
        try:
            (self.directory / "bad").mkdir(parents=True, exist_ok=True)
            self._count = sum(1 for _ in self.directory.glob("*.json"))
            for leftover in self.directory.glob("*.tmp"):
                leftover.unlink()
            self.probe()
        except OSError as refused:
            raise SpoolError(f"spool {self.directory}: {refused.strerror}") from refused

    def probe(self) -> None:
        """Prove that a file can be written; raises OSError."""
        with tempfile.TemporaryFile(dir=self.directory) as file:
            file.write(b"x")

    def __len__(self) -> int:
        return self._count

    def store(self, runs: Sequence[Run]) -> None:
        """Write the runs of one push durably; raises SpoolError when full or refused by the disk."""
        with self._lock:
            if self._count + len(runs) > self.max_files:
                raise SpoolError(f"{self._count} pushes are waiting already")
            self._count += len(runs)
        written = 0
        try:
            for run in runs:
                self._write(run)
                written += 1
            self._sync_directory()
        except OSError as refused:
            with self._lock:
                self._count -= len(runs) - written
            raise SpoolError(f"the disk refuses: {refused.strerror}") from refused

    def _write(self, run: Run) -> None:
        name = f"{time.time_ns():020d}-{run.id}.json"
        part = self.directory / f"{name}.{uuid.uuid4().hex}.tmp"
        record = {f.name: getattr(run, f.name) for f in fields(run)}
        with part.open("xb") as file:
            file.write(json.dumps(record).encode())
            file.flush()
            os.fsync(file.fileno())
        part.rename(self.directory / name)

    def _sync_directory(self) -> None:
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def read(self) -> list[tuple[Path, Run]]:
        """Return everything stored, oldest first."""
        found = []
        for path in sorted(self.directory.glob("*.json")):
            try:
                found.append((path, parse_run(path.read_bytes())))
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as wrong:
                error("spool file moved aside", file=path.name, detail=clip(str(wrong)))
                path.rename(self.directory / "bad" / path.name)
        with self._lock:
            self._count = max(len(found), 0)
        return found

    def done(self, path: Path) -> None:
        """Forget a push that the cluster has or that needs nothing more."""
        path.unlink(missing_ok=True)
        with self._lock:
            self._count = max(self._count - 1, 0)


def parse_run(content: bytes) -> Run:
    """Return the run in a spool file; raises ValueError for anything that is not one."""
    data = json.loads(content)
    if not isinstance(data, dict) or data.keys() != {f.name for f in fields(Run)}:
        raise ValueError("not a stored push")
    texts = {k: v for k, v in data.items() if k != "received"}
    if not all(isinstance(v, str) for v in texts.values()) or not isinstance(
        data["received"], float
    ):
        raise ValueError("a field has another type")
    if not SHA.fullmatch(data["commit"]) or not valid_ref(data["ref"]):
        raise ValueError("not a commit of a branch")
    if data["id"] != run_id(data["app"], data["ref"], data["commit"]) or not DNS_LABEL.fullmatch(
        data["id"]
    ):
        raise ValueError("its id is not that of its commit")
    return Run(**data)


# === kubectl ======================================================================================


def execute(
    argv: Sequence[str],
    *,
    timeout: float,
    stdin: str = "",
    environ: Mapping[str, str] | None = None,
) -> tuple[int | None, str, str]:
    """Run a program to its end; return (exit code, stdout, stderr), the code None on a time-out.

    The one door to programs that end by themselves. Never a shell; what the program prints is text
    of unknown origin. A program that is not there raises ConfigError.
    """
    try:
        done = subprocess.run(  # noqa: S603 - argv is a list made here, no shell
            argv,
            input=stdin.encode(),
            capture_output=True,
            timeout=timeout,
            env=None if environ is None else dict(environ),
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return (
            None,
            (late.stdout or b"").decode(errors="replace"),
            (late.stderr or b"").decode(errors="replace"),
        )
    except OSError as missing:
        raise ConfigError([f"{argv[0]} cannot be started: {missing.strerror}"]) from missing
    return (
        done.returncode,
        done.stdout.decode(errors="replace"),
        done.stderr.decode(errors="replace"),
    )


class Kubectl:
    """The one door to the cluster: each method is one kubectl process."""

    def __init__(self, metrics: Metrics, at_once: int = 8, program: str = "kubectl") -> None:
        self.program, self.metrics = program, metrics
        self._places = threading.BoundedSemaphore(at_once)

    def run(
        self, *args: str, namespace: str = "", stdin: str = "", timeout: float = KUBECTL_TIMEOUT
    ) -> str:
        """Return what one call prints; raises KubectlError, whose effect is unknown on a time-out."""
        where = ["-n", namespace] if namespace else []
        argv = [self.program, *where, *args, f"--request-timeout={int(timeout * 0.8) or 1}s"]
        with self._places:
            code, stdout, stderr = execute(argv, timeout=timeout, stdin=stdin)
        failure = None if code == 0 else KubectlError([self.program, *args], code, stderr, stdout)
        self.metrics.kubectl.labels(args[0], failure.kind if failure else "ok").inc()
        if failure:
            raise failure
        return stdout

    def stream(self, *args: str, namespace: str) -> subprocess.Popen[bytes]:
        """Start a call that goes on: a watch, a rollout status. The caller ends it."""
        argv = [self.program, "-n", namespace, *args]
        try:
            return subprocess.Popen(  # noqa: S603 - argv is a list made here, no shell
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        except OSError as missing:
            raise ConfigError(
                [f"{self.program} cannot be started: {missing.strerror}"]
            ) from missing

    def get(self, resource: str, name: str, namespace: str) -> dict[str, Any] | None:
        """Return one object, or None when there is none."""
        args = ("get", resource, name, "-o", "json", "--ignore-not-found")
        printed = self.run(*args, namespace=namespace)
        return json.loads(printed) if printed.strip() else None

    def list(self, resource: str, namespace: str, *filters: str) -> list[dict[str, Any]]:
        """Return the objects that match, e.g. `-l`, "a=b" or `--field-selector`, "a=b"."""
        found = json.loads(self.run("get", resource, *filters, "-o", "json", namespace=namespace))
        items: list[dict[str, Any]] = found["items"]
        return items

    def create(self, objects: Sequence[Mapping[str, Any]], namespace: str) -> None:
        """Create what is not there yet; what exists under the same name is left as it is."""
        refused = self.create_each(objects, namespace)
        if left := {k: e for k, e in refused.items() if "(AlreadyExists)" not in e}:
            raise KubectlError([self.program, "create"], 1, next(iter(left.values())))

    def create_each(self, objects: Sequence[Mapping[str, Any]], namespace: str) -> dict[str, str]:
        """Create objects in one call; return the refusal of each that was not created, by name.

        Exit 1 is not "nothing happened": kubectl creates what it can, prints the created names and
        one line for every other. What neither stream mentions raises the KubectlError itself.
        """
        stdin = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        names = {o["metadata"]["name"] for o in objects}
        args = ("create", "-f", "-", "-o", "name", "--validate=false")
        try:
            self.run(*args, namespace=namespace, stdin=stdin, timeout=KUBECTL_TIMEOUT * 2)
        except KubectlError as partly:
            made = {line.rpartition("/")[2] for line in partly.stdout.split()}
            refused = dict(refusals(partly.stderr, names - made))
            if names - made - refused.keys():
                raise
            return refused
        return {}

    def apply(self, objects: Sequence[Mapping[str, Any]], namespace: str) -> None:
        """Apply objects as a person would; the server refuses unknown fields."""
        stdin = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        self.run("apply", "-f", "-", namespace=namespace, stdin=stdin)

    def patch(
        self, resource: str, name: str, namespace: str, change: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Merge a change into an object and return it; with a resourceVersion it is a compare-and-set."""
        args = ("patch", resource, name, "--type=merge", "-p", json.dumps(change), "-o", "json")
        patched: dict[str, Any] = json.loads(self.run(*args, namespace=namespace))
        return patched

    def delete(self, resource: str, names: Iterable[str], namespace: str) -> None:
        """Delete objects by name without waiting; what is not there is fine."""
        if listed := sorted(names):
            args = ("delete", resource, *listed, "--wait=false", "--ignore-not-found")
            self.run(*args, namespace=namespace)

    def logs(self, pod: str, container: str, namespace: str) -> str:
        """Return the last lines of a container, also of its last life; "" when there are none."""
        for more in ((), ("--previous",)):
            with suppress(KubectlError):
                args = ("logs", pod, "-c", container, "--tail=20", *more)
                if printed := self.run(*args, namespace=namespace, timeout=10.0).strip():
                    return printed
        return ""


def refusals(stderr: str, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, line) for every object that kubectl says it could not create."""
    lines = [
        line for line in stderr.splitlines() if re.match(r"Error from server|The \w+ \"", line)
    ]
    for name in names:
        for line in lines:
            if not re.search(UNREACHABLE, line) and f'"{name}"' in line:
                yield name, line
                break


# === git ==========================================================================================

CREDENTIAL_HELPER = (
    '!f() { test "$1" = get && test -r "$CREDENTIALS_FILE"'
    ' && git credential-store --file "$CREDENTIALS_FILE" get; }; f'
)
GIT_OPTIONS = (
    *("-c", "core.hooksPath=/dev/null", "-c", "protocol.allow=never"),
    *("-c", "protocol.https.allow=always", "-c", "protocol.http.allow=always"),
    *("-c", "protocol.file.allow=always", "-c", "credential.helper="),
    *(
        "-c",
        f"credential.helper={CREDENTIAL_HELPER}",
        "-c",
        "gc.auto=0",
        "-c",
        "init.defaultBranch=main",
    ),
)


class Git:
    """The one door to git: no hooks, no prompts, no submodules, nobody's configuration.

    Credentials are read by git's own helper from a file, so they are in no URL, argv or log.
    """

    def __init__(self, credentials: Path) -> None:
        self.credentials = credentials

    def run(self, *args: str, directory: Path | None = None) -> str:
        """Return what one git call prints; raises GitError."""
        environ = {
            **os.environ,
            "CREDENTIALS_FILE": str(self.credentials),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "LC_ALL": "C",
        }
        where = ("-C", str(directory)) if directory else ()
        argv = ("git", *where, *GIT_OPTIONS, *args)
        code, stdout, stderr = execute(argv, timeout=GIT_TIMEOUT, environ=environ)
        if code != 0:
            raise GitError(("git", *args), code, stderr, stdout)
        return stdout

    def heads(self, url: str) -> dict[str, str]:
        """Return the commit of every branch, by full ref name."""
        found = {}
        for line in self.run("ls-remote", "--heads", "--", url).splitlines():
            commit, _, ref = line.partition("\t")
            if SHA.fullmatch(commit) and valid_ref(ref):
                found[ref] = commit
        return found

    def checkout(self, url: str, commit: str, directory: Path, *, symlinks: bool) -> None:
        """Put exactly this commit into a new directory; without symlinks they become plain files."""
        self.run("init", "--quiet", str(directory))
        self.run(
            "fetch", "--quiet", "--depth=1", "--no-tags", "--", url, commit, directory=directory
        )
        links = f"core.symlinks={'true' if symlinks else 'false'}"
        self.run("-c", links, "checkout", "--quiet", "--detach", "FETCH_HEAD", directory=directory)


# === job manifests ================================================================================

RUN_NOTES = {
    "ref": NOTE_REF,
    "commit": NOTE_COMMIT,
    "before": NOTE_BEFORE,
    "title": NOTE_TITLE,
    "delivery": NOTE_DELIVERY,
}
TEST_CONTAINER, BUILD_CONTAINER, RESULTS_CONTAINER = "test-runner", "kaniko", "results"
TERMINATION_LOG = "/dev/termination-log"
CREDENTIALS_MOUNT = "/var/run/gitops-hook"
SMALL = {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"cpu": "500m", "memory": "256Mi"}}
LOCKED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
KANIKO_CAPABILITIES = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "SETUID", "SETGID", "SETFCAP"]


def environment(**values: str) -> list[dict[str, str]]:
    """Return a container's env list."""
    return [{"name": k, "value": v} for k, v in values.items()]


def mounts(**paths: str) -> list[dict[str, Any]]:
    """Return volumeMounts by volume name."""
    return [{"name": k, "mountPath": v} for k, v in paths.items()]


def clone_container(config: Config, app: App, run: Run) -> dict[str, Any]:
    """Return the init container that checks out exactly the pushed commit."""
    return {
        "name": "clone",
        "image": config.images.hook,
        "args": ["clone"],
        "env": environment(
            CLONE_URL=app.repository,
            CLONE_COMMIT=run.commit,
            CLONE_DIRECTORY="/workspace/src",
            CREDENTIALS_FILE=f"{CREDENTIALS_MOUNT}/{GIT_CREDENTIALS}",
            TERMINATION_LOG=TERMINATION_LOG,
            HOME="/tmp",  # noqa: S108 - an emptyDir of this pod
        ),
        "resources": SMALL,
        "securityContext": {**LOCKED, "runAsNonRoot": True, "runAsUser": POD_UID},
        "volumeMounts": [
            *mounts(workspace="/workspace", tmp="/tmp"),  # noqa: S108 - an emptyDir of this pod
            {"name": "git", "mountPath": CREDENTIALS_MOUNT, "readOnly": True},
        ],
    }


def results_container(config: Config) -> dict[str, Any]:
    """Return the side-car that reads the JUnit report when the tests have ended."""
    return {
        "name": RESULTS_CONTAINER,
        "image": config.images.hook,
        "args": ["collect"],
        "restartPolicy": "Always",
        "env": environment(
            JUNIT_XML="/workspace/results/junit.xml", TERMINATION_LOG=TERMINATION_LOG
        ),
        "resources": SMALL,
        "securityContext": LOCKED,
        "volumeMounts": mounts(workspace="/workspace", tmp="/tmp"),  # noqa: S108 - an emptyDir
    }


def secret_volume(name: str, secret: str, key: str, path: str) -> dict[str, Any]:
    """Return a volume of one optional Secret, readable by its pod's group only."""
    items = [{"key": key, "path": path}]
    source = {"secretName": secret, "optional": True, "defaultMode": 0o400, "items": items}
    return {"name": name, "secret": source}


def job(config: Config, app: App, run: Run, stage: str, pod: dict[str, Any]) -> dict[str, Any]:
    """Return a suspended Job of one stage around its pod.

    Suspended, so that the queue is in the cluster. Its deadline is only the backstop of a daemon
    that is down: waiting for quota counts towards it, so the time-out proper is the controller's.
    """
    timeout = app.test.timeout if stage == "test" else app.build.timeout
    labels = {LABEL_MANAGED: MANAGER, LABEL_APP: app.name, LABEL_RUN: run.id, LABEL_STAGE: stage}
    notes = {note: getattr(run, name) for name, note in RUN_NOTES.items()}
    notes |= {NOTE_REPOSITORY: app.repository, NOTE_RECEIVED: f"{run.received:.3f}"}
    main = pod["containers"][0]["name"]
    volumes: list[Object] = [{"name": n, "emptyDir": {}} for n in ("workspace", "tmp")]
    volumes.append(secret_volume("git", GIT_CREDENTIALS, GIT_CREDENTIALS, GIT_CREDENTIALS))
    pod_spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        **pod,
        "volumes": [*volumes, *pod.get("volumes", [])],
    }
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": main, "operator": "NotIn", "values": [0]},
        },
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": f"{stage}-{run.id}",
            "namespace": config.namespaces[stage],
            "labels": labels,
            "annotations": notes,
        },
        "spec": {
            "suspend": True,
            "backoffLimit": 2,
            "activeDeadlineSeconds": int(timeout + config.limits.queue_timeout),
            "podFailurePolicy": {"rules": rules},
            "template": {"metadata": {"labels": labels}, "spec": pod_spec},
        },
    }


def test_job(config: Config, app: App, run: Run) -> dict[str, Any]:
    """Return the Job that checks out the commit and runs its tests, fit for `restricted`."""
    tests = {
        "name": TEST_CONTAINER,
        "image": app.test.image,
        "command": ["sh", "-ec"],
        "args": [app.test.command],
        "workingDir": "/workspace/src",
        "env": environment(
            CI="true",
            JUNIT_XML="/workspace/results/junit.xml",
            GIT_BRANCH=run.branch,
            GIT_COMMIT=run.commit,
            HOME="/tmp",  # noqa: S108 - an emptyDir of this pod
        ),
        "resources": app.test.resources,
        "securityContext": LOCKED,
        "volumeMounts": mounts(workspace="/workspace", tmp="/tmp"),  # noqa: S108 - an emptyDir
    }
    user = {"runAsUser": POD_UID, "runAsGroup": POD_UID, "fsGroup": POD_UID}
    pod = {
        "serviceAccountName": "test-runner-sa",
        "securityContext": {
            "runAsNonRoot": True,
            **user,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        # the side-car first: it is listening long before the tests can end
        "initContainers": [results_container(config), clone_container(config, app, run)],
        "containers": [tests],
    }
    return job(config, app, run, "test", pod)


def build_job(config: Config, app: App, run: Run) -> dict[str, Any]:
    """Return the Job that builds and pushes the image, fit for `baseline`; it leaves the digest."""
    context = "/workspace/src"
    security = {"allowPrivilegeEscalation": False, "runAsUser": 0}
    build = {
        "name": BUILD_CONTAINER,
        "image": config.images.kaniko,
        "args": [
            f"--context=dir://{context}",
            f"--dockerfile={app.build.dockerfile}",
            f"--destination={app.build.image}:{run.commit[:8]}",
            f"--digest-file={TERMINATION_LOG}",
            *app.build.args,
        ],
        "resources": app.build.resources,
        "securityContext": {
            **security,
            "capabilities": {"drop": ["ALL"], "add": KANIKO_CAPABILITIES},
        },
        "volumeMounts": mounts(workspace="/workspace", registry="/kaniko/.docker"),
    }
    registry = secret_volume("registry", "registry-credentials", ".dockerconfigjson", "config.json")
    pod = {
        "serviceAccountName": "build-runner-sa",
        "securityContext": {"fsGroup": POD_UID, "seccompProfile": {"type": "RuntimeDefault"}},
        "initContainers": [clone_container(config, app, run)],
        "containers": [build],
        "volumes": [registry],
    }
    return job(config, app, run, "build", pod)


def run_of_job(found: Mapping[str, Any]) -> Run:
    """Return the run that a Job of ours belongs to."""
    meta = found["metadata"]
    notes, labels = meta.get("annotations") or {}, meta.get("labels") or {}
    given = {name: str(notes.get(note, "")) for name, note in RUN_NOTES.items()}
    return Run(
        id=labels.get(LABEL_RUN, ""),
        app=labels.get(LABEL_APP, ""),
        received=seconds_of(notes.get(NOTE_RECEIVED, "0")),
        **given,
    )


def seconds_of(value: Any) -> float:
    """Return a number of seconds kept as text, or 0 for anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def junit_summary(report: Path) -> str:
    """Return counts and the names of failures of a JUnit report, at most 4096 bytes of JSON.

    "" when there is no report that can be read. The report is the tests' own, so it is read as a
    stream, up to 20 MB, and entity declarations are refused.
    """
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    failed: list[str] = []
    kinds = {"failure": "failures", "error": "errors", "skipped": "skipped"}
    try:
        content = report.read_bytes()[: 20 * 1024 * 1024]
        if b"<!DOCTYPE" in content or b"<!ENTITY" in content:
            return ""
        for case in ElementTree.fromstring(content).iter("testcase"):  # noqa: S314 - no entities
            counts["tests"] += 1
            for kind in {kinds[c.tag] for c in case if c.tag in kinds}:
                counts[kind] += 1
                if kind != "skipped" and len(failed) < 20:
                    failed.append(clip(f"{case.get('classname', '')}.{case.get('name', '')}", 120))
    except (OSError, ElementTree.ParseError):
        return ""
    return json.dumps({**counts, "failed": failed})[:TERMINATION_LENGTH]


def summary_text(summary: str) -> str:
    """Return a JUnit summary as a sentence, "" when there is none."""
    try:
        found = json.loads(summary)
        bad_ones = found["failures"] + found["errors"]
        names = ": " + ", ".join(map(str, found["failed"][:5])) if found["failed"] else ""
        return f"{found['tests'] - bad_ones - found['skipped']} passed, {bad_ones} failed{names}"
    except (ValueError, KeyError, TypeError):
        return ""


# === app manifests ================================================================================


class ManifestLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML as kubectl reads it: what looks like a date stays a text."""


ManifestLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if tag != "tag:yaml.org,2002:timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

REMOTE = re.compile(r"([\w.-]+=)?([A-Za-z][\w+.-]*:(//|:)|[\w.-]+@[\w.-]+:)")
LOCAL_LISTS = (
    "resources",
    "bases",
    "components",
    "crds",
    "configurations",
    "transformers",
    "generators",
    "validators",
)
KUSTOMIZATIONS = ("kustomization.yaml", "kustomization.yml", "Kustomization")
MANIFEST_NODES = 100_000


def invalid(detail: str) -> NoReturn:
    """End a run because its manifests cannot be read."""
    raise StageError(Reason.MANIFEST_INVALID, detail)


def refuse(detail: str) -> NoReturn:
    """End a run because its manifests ask for what the hook does not do."""
    raise StageError(Reason.MANIFEST_REFUSED, detail)


def count_nodes(value: Any, left: int = MANIFEST_NODES) -> int:
    """Return how many nodes are left of a budget; a document that expands beyond it is refused."""
    if left <= 0:
        invalid("a document expands to too much; its anchors multiply")
    if isinstance(value, dict):
        for k, v in value.items():
            if not isinstance(k, str):
                invalid(f"key {clip(repr(k), 40)} is not a text")
            left = count_nodes(v, left - 1)
    elif isinstance(value, list):
        for v in value:
            left = count_nodes(v, left - 1)
    return left - 1


def parse_documents(text: str, source: str) -> list[tuple[str, Object]]:
    """Return the objects in one YAML text with where each came from; faults name file and line."""
    found = []
    try:
        for document in yaml.load_all(text, Loader=ManifestLoader):  # noqa: S506 - a safe loader
            count_nodes(document)
            if document is None:
                continue
            if not isinstance(document, dict) or not isinstance(document.get("kind"), str):
                invalid(f"{source}: a document is not a Kubernetes object (links are not followed)")
            items = document.get("items") if document["kind"].endswith("List") else [document]
            found += [(source, item) for item in items or [] if isinstance(item, dict)]
    except yaml.YAMLError as wrong:
        mark = getattr(wrong, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        invalid(f"{source}{line}: {clip(str(getattr(wrong, 'problem', None) or wrong), 120)}")
    except RecursionError:
        invalid(f"{source}: nested too deeply")
    return found


def read_manifests(root: Path, path: str) -> list[tuple[str, Object]]:
    """Return the objects of an app's manifests folder, plain or built by kustomize, with sources."""
    directory = root / path
    if not directory.is_dir():
        invalid(f"there is no folder {path!r} in the commit")
    if any((directory / k).is_file() for k in KUSTOMIZATIONS):
        check_kustomization(root, directory)
        return parse_documents(kustomize(directory), f"{path}/kustomization")
    found = []
    for file in sorted(p for p in directory.iterdir() if p.suffix in (".yaml", ".yml", ".json")):
        if file.stat().st_size > 2 * 1024 * 1024:
            invalid(f"{path}/{file.name}: larger than 2 MiB")
        try:
            found += parse_documents(file.read_text("utf-8-sig"), f"{path}/{file.name}")
        except UnicodeDecodeError:
            invalid(f"{path}/{file.name}: not UTF-8")
    return found


def check_kustomization(root: Path, directory: Path, depth: int = 0) -> None:
    """Refuse a kustomization that reaches outside of the commit, before kubectl sees it."""
    inside = directory.resolve()
    if depth > 20 or not inside.is_relative_to(root.resolve()):
        refuse("a kustomization reaches outside of the repository")
    for file in (inside / k for k in KUSTOMIZATIONS if (inside / k).is_file()):
        where = str(file.relative_to(root.resolve()))
        for _, document in parse_documents(
            "kind: Kustomization\n" + file.read_text("utf-8"), where
        ):
            if "helmCharts" in document or "helmGlobals" in document:
                refuse(
                    f"{where}: helmCharts are not supported; render the chart into the repository"
                )
            check_strings(document, where)
            for entry in itertools.chain.from_iterable(document.get(k) or [] for k in LOCAL_LISTS):
                if not isinstance(entry, str) or not (inside / entry).exists():
                    refuse(
                        f"{where}: {clip(str(entry), 80)!r} is not a file or folder of the commit"
                    )
                if (inside / entry).is_dir():
                    check_kustomization(root, inside / entry, depth + 1)


def check_strings(value: Any, where: str) -> None:
    """Refuse any text in a kustomization that names something remote."""
    if isinstance(value, str) and REMOTE.match(value):
        refuse(f"{where}: {clip(value, 80)!r} is remote; copy it into the repository")
    for inner in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        check_strings(inner, where)


def kustomize(directory: Path) -> str:
    """Return what `kubectl kustomize` makes of a folder, with an empty HOME and a time limit."""
    with tempfile.TemporaryDirectory() as home:
        environ = {"PATH": os.environ.get("PATH", os.defpath), "HOME": home}
        argv = ("kubectl", "kustomize", str(directory))
        code, stdout, stderr = execute(argv, timeout=KUBECTL_TIMEOUT, environ=environ)
    if code != 0:
        invalid(
            f"kustomize: {clip(stderr.replace(str(directory), ''), 300) or 'no answer in time'}"
        )
    return stdout


@dataclass(frozen=True, slots=True)
class AppObjects:
    """What an app's manifests hold, checked: one Deployment, one Service, ConfigMaps."""

    deployment: Object
    service: Object
    configmaps: tuple[Object, ...]
    ignored: tuple[str, ...]


def check_objects(app: App, namespace: str, found: Sequence[tuple[str, Object]]) -> AppObjects:
    """Return the objects of an app, or end the run before anything changes, saying what to do."""
    kept: dict[str, list[Object]] = {"Deployment": [], "Service": [], "ConfigMap": []}
    ignored = []
    for source, item in found:
        kind, meta = item["kind"], item.get("metadata")
        if not isinstance(meta, dict) or not isinstance(meta.get("name"), str):
            invalid(f"{source}: a {clip(kind, 40)} without metadata.name")
        name = f"{clip(kind, 40)} {clip(meta['name'], 60)}"
        if kind in app.deploy.ignore_kinds:
            ignored.append(name)
        elif kind not in kept:
            refuse(
                f"{source}: {name}: this kind is not deployed; apply it yourself and list it in ignore_kinds"
            )
        elif meta.get("namespace") not in (None, namespace):
            refuse(
                f"{source}: {name} names namespace {clip(str(meta['namespace']), 63)!r}; leave it out"
            )
        else:
            kept[kind].append(item)
    if len(kept["Deployment"]) != 1 or len(kept["Service"]) != 1:
        counts = f"{len(kept['Deployment'])} and {len(kept['Service'])}"
        refuse(
            f"{app.deploy.manifests}: exactly one Deployment and one Service are needed, found {counts}"
        )
    deployment, service = kept["Deployment"][0], kept["Service"][0]
    if service["metadata"]["name"] != app.name:
        refuse(f"the Service must be named like the app, {app.name!r}")
    check_pod(deployment)
    if not isinstance(service.get("spec"), dict) or not service["spec"].get("ports"):
        invalid("the Service has no ports")
    return AppObjects(deployment, service, tuple(kept["ConfigMap"]), tuple(ignored))


def check_pod(deployment: Object) -> None:
    """End the run if a Deployment has no usable pod template or names a service account."""
    pod = pod_spec(deployment)
    containers = pod.get("containers") if isinstance(pod, dict) else None
    if not isinstance(containers, list) or not all(
        isinstance(c, dict) and c.get("image") for c in containers
    ):
        invalid("the Deployment has no containers with images")
    if pod.get("serviceAccountName") or pod.get("serviceAccount"):
        refuse("the Deployment names a service account; pods run with the namespace's default one")


def pod_spec(deployment: Object) -> Any:
    """Return the pod spec of a Deployment, or None where it has none."""
    with suppress(KeyError, TypeError):
        return deployment["spec"]["template"]["spec"]
    return None


def all_containers(pod: Object) -> list[Object]:
    """Return the containers and init containers of a pod spec."""
    return [*pod["containers"], *(pod.get("initContainers") or [])]


def repository_of(image: str) -> str:
    """Return an image reference without tag and digest."""
    return re.sub(r":[^/:]*$", "", image.partition("@")[0])


def set_images(app: App, pod: Object, image: str) -> None:
    """Put the built image, by digest, wherever the manifests name it; end the run if nowhere.

    With builder none every image must already be named by digest.
    """
    containers = all_containers(pod)
    if app.build.builder == "none":
        if loose := [
            c["image"]
            for c in containers
            if not re.search(r"@sha256:[0-9a-f]{64}$", str(c["image"]))
        ]:
            refuse(f"builder none: image {clip(str(loose[0]), 120)!r} is not named by digest")
        return
    ours = [c for c in containers if repository_of(str(c["image"])) in (app.build.image, app.name)]
    if not ours:
        refuse(f"no container's image is {app.build.image!r} (or {app.name!r}): nothing to set")
    for container in ours:
        container["image"] = image


def configmap_copies(app: App, maps: Iterable[Object]) -> dict[str, Object]:
    """Return immutable copies of ConfigMaps by their original name, named by their content."""
    copies = {}
    for original in maps:
        content = {k: original[k] for k in ("data", "binaryData") if original.get(k)}
        name = f"{original['metadata']['name']}-{short_hash(content)}"
        labels = {LABEL_MANAGED: MANAGER, LABEL_APP: app.name}
        copies[original["metadata"]["name"]] = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name, "labels": labels},
            "immutable": True,
            **content,
        }
    return copies


def short_hash(value: Any) -> str:
    """Return eight hex digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def rewrite_references(pod: Object, copies: Mapping[str, Object]) -> None:
    """Point every reference to a ConfigMap at its copy: volumes, projected, env, envFrom."""
    volumes = pod.get("volumes") or []
    sources = [s for v in volumes for s in (v.get("projected") or {}).get("sources") or []]
    named = [holder.get("configMap") for holder in [*volumes, *sources]]
    for container in all_containers(pod):
        env = [e.get("valueFrom") or {} for e in container.get("env") or []]
        named += [e.get("configMapKeyRef") for e in env]
        named += [e.get("configMapRef") for e in container.get("envFrom") or []]
    for reference in named:
        if reference and reference.get("name") in copies:
            reference["name"] = copies[reference["name"]]["metadata"]["name"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where and as what a run is rendered."""

    app: App
    run: Run
    namespace: str
    colour: str
    image: str
    live_replicas: int

    @property
    def name(self) -> str:
        """The name of the Deployment."""
        return f"{self.app.name}-{self.colour}"

    @property
    def selector(self) -> dict[str, str]:
        """What a Service selects to reach exactly this run: always the same three keys."""
        return {LABEL_APP: self.app.name, LABEL_VERSION: self.colour, LABEL_RUN: self.run.id}


def render_deployment(
    place: Placement, objects: AppObjects, copies: Mapping[str, Object]
) -> Object:
    """Return the coloured Deployment of a run; pure. What the app says stays, but names and labels."""
    deployment = copy.deepcopy(objects.deployment)
    meta, spec = deployment["metadata"], deployment["spec"]
    ours = {LABEL_MANAGED: MANAGER, **place.selector}
    deployment["metadata"] = {
        "name": place.name,
        "labels": {**(meta.get("labels") or {}), **ours},
        "annotations": {**(meta.get("annotations") or {}), NOTE_COMMIT: place.run.commit},
    }
    deployment.pop("status", None)
    pod = pod_spec(deployment)
    template_meta = spec["template"].get("metadata") or {}
    labels = {**(template_meta.get("labels") or {}), **ours}
    spec["template"]["metadata"] = {**template_meta, "labels": labels}
    spec["selector"] = {"matchLabels": {LABEL_APP: place.app.name, LABEL_VERSION: place.colour}}
    wanted = spec.get("replicas")
    wanted = wanted if isinstance(wanted, int) and not isinstance(wanted, bool) else 1
    spec["replicas"] = max(wanted, place.live_replicas, 1)
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    for key, value in {
        "minReadySeconds": 10,
        "revisionHistoryLimit": 3,
        "strategy": rolling,
    }.items():
        spec.setdefault(key, value)
    longest = max(place.app.deploy.rollout_timeout, ROLLOUT_PER_REPLICA * spec["replicas"])
    spec["progressDeadlineSeconds"] = max(int(longest), int(spec["minReadySeconds"]) + 1)
    set_images(place.app, pod, place.image)
    rewrite_references(pod, copies)
    set_probes(place.app, pod, objects.service)
    return deployment


def set_probes(app: App, pod: Object, service: Object) -> None:
    """Add a readiness probe and a preStop sleep where the app says nothing; never a liveness probe."""
    port = service["spec"]["ports"][0]
    target = port.get("targetPort", port.get("port"))
    probe = {"httpGet": {"path": app.deploy.health.path, "port": target}}
    if not any(c.get("readinessProbe") for c in pod["containers"]):
        pod["containers"][0]["readinessProbe"] = {
            **probe,
            "initialDelaySeconds": 5,
            "periodSeconds": 5,
        }
    for container in pod["containers"]:
        lifecycle = container.setdefault("lifecycle", {})
        lifecycle.setdefault("preStop", {"sleep": {"seconds": 5}})


def service_object(
    app: App, name: str, spec: Object, selector: Mapping[str, str], stage: str
) -> Object:
    """Return a Service of ours; stage tells the live one from the preview."""
    labels = {LABEL_MANAGED: MANAGER, LABEL_APP: app.name, LABEL_STAGE: stage}
    meta = {"name": name, "labels": labels}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        "spec": {**spec, "selector": dict(selector)},
    }


def plain_ports(ports: Iterable[Object]) -> list[Object]:
    """Return Service ports without node ports."""
    return [{k: v for k, v in p.items() if k != "nodePort"} for p in ports]


def ports_like(ports: Iterable[Object], live: Iterable[Object]) -> list[Object]:
    """Return ports that keep the node ports which a live Service already has for them."""
    nodes = {
        (p.get("protocol", "TCP"), p["port"]): p["nodePort"] for p in live if p.get("nodePort")
    }
    kept = []
    for port in ports:
        node = nodes.get((port.get("protocol", "TCP"), port["port"]))
        kept.append({**port, "nodePort": node} if node and "nodePort" not in port else dict(port))
    return kept


@dataclass(frozen=True, slots=True)
class Release:
    """The rendered objects of one run in one environment: what applying it again needs."""

    run: str
    commit: str
    ref: str
    image: str
    colour: str
    selector: dict[str, str]
    deployment: Object
    configmaps: tuple[Object, ...]
    service: Object

    @property
    def ports(self) -> list[Object]:
        """The ports of the run's Service."""
        return list(self.service["ports"])

    @property
    def wanted(self) -> int:
        """How many replicas the run was rendered with."""
        return int(self.deployment["spec"]["replicas"])

    def configmap(self, app: str) -> Object:
        """Return the immutable ConfigMap that records the release."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        packed = gzip.compress(json.dumps(content, sort_keys=True).encode(), mtime=0)
        name = f"{app}-release-{short_hash(content)}"
        labels = {LABEL_MANAGED: MANAGER, LABEL_APP: app, LABEL_STAGE: "release"}
        data = {"release": base64.b64encode(packed).decode()}
        meta = {"name": name, "labels": labels}
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": meta,
            "immutable": True,
            "binaryData": data,
        }

    @classmethod
    def from_configmap(cls, found: Object) -> Release:
        """Return the release that a ConfigMap records; raises StageError when it cannot be read."""
        try:
            packed = base64.b64decode(found["binaryData"]["release"])
            content = json.loads(gzip.decompress(packed))
            return cls(**{**content, "configmaps": tuple(content["configmaps"])})
        except (KeyError, TypeError, ValueError, OSError, EOFError) as wrong:
            raise StageError(Reason.MANIFEST_INVALID, "a release record cannot be read") from wrong


def render(place: Placement, objects: AppObjects) -> Release:
    """Return everything that a run puts into an environment; pure."""
    copies = configmap_copies(place.app, objects.configmaps)
    return Release(
        run=place.run.id,
        commit=place.run.commit,
        ref=place.run.ref,
        image=place.image,
        colour=place.colour,
        selector=place.selector,
        deployment=render_deployment(place, objects, copies),
        configmaps=tuple(copies.values()),
        service={k: v for k, v in objects.service["spec"].items() if k != "selector"},
    )


# === cluster mirror ===============================================================================


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """What a pod's status says about one container, in its current or last life."""

    name: str
    kind: str  # init, sidecar or app
    ready: bool
    restarts: int
    running: bool
    waiting: str  # reason
    text: str  # the message beside a waiting reason, or the termination message
    exit_code: int | None  # of the last life that ended
    exit_reason: str
    ended: float  # seconds since the epoch

    @property
    def exits(self) -> int:
        """How often it has ended."""
        return self.restarts + (
            1 if self.exit_code is not None and not self.running and not self.waiting else 0
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Pod:
    """What matters of a pod."""

    name: str
    version: int
    run: str
    job: str
    labels: Mapping[str, str]
    phase: str
    ready: bool
    deleting: bool
    disrupted: bool
    created: float
    started: float
    ip: str
    unschedulable: str
    containers: tuple[Container, ...]

    def container(self, name: str) -> Container | None:
        """Return a container by name."""
        return next((c for c in self.containers if c.name == name), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What matters of a Job of ours."""

    name: str
    version: int
    namespace: str
    stage: str
    run: Run
    notes: Mapping[str, str]
    state: str  # suspended, active, succeeded or failed
    deleting: bool
    reason: str
    released: float

    @property
    def outcome(self) -> str:
        """The outcome of the run, if it has ended and this is its last Job."""
        return self.notes.get(NOTE_OUTCOME, "")


def epoch(stamp: Any) -> float:
    """Return a Kubernetes time in seconds since the epoch, 0 for none."""
    with suppress(TypeError, ValueError):
        return float(calendar.timegm(time.strptime(stamp[:19], "%Y-%m-%dT%H:%M:%S")))
    return 0.0


def true_condition(status: Mapping[str, Any], *kinds: str) -> dict[str, Any] | None:
    """Return the first condition of one of these types that is True."""
    found = [
        c for c in status.get("conditions") or [] if c["type"] in kinds and c["status"] == "True"
    ]
    return found[0] if found else None


def view_job(found: Object) -> Job:
    """Reduce a Job to what matters."""
    meta, spec, status = found["metadata"], found["spec"], found.get("status") or {}
    failed = true_condition(status, "Failed", "FailureTarget")
    state = "suspended" if spec.get("suspend") else "active"
    if true_condition(status, "Complete"):
        state = "succeeded"
    elif failed:
        state = "failed"
    return Job(
        name=meta["name"],
        version=int(meta["resourceVersion"]),
        namespace=meta["namespace"],
        stage=(meta.get("labels") or {}).get(LABEL_STAGE, ""),
        run=run_of_job(found),
        notes={
            k: v for k, v in (meta.get("annotations") or {}).items() if k.startswith("gitops-hook/")
        },
        state=state,
        deleting="deletionTimestamp" in meta,
        reason=(failed or {}).get("reason", ""),
        released=epoch(status.get("startTime")),
    )


def view_containers(found: Object) -> Iterator[Container]:
    """Yield what the status of a pod says about its containers, init containers first."""
    spec, status = found["spec"], found.get("status") or {}
    sidecars = {
        c["name"] for c in spec.get("initContainers") or [] if c.get("restartPolicy") == "Always"
    }
    for key, kind in (("initContainerStatuses", "init"), ("containerStatuses", "app")):
        for entry in status.get(key) or []:
            state = entry.get("state") or {}
            waiting, now = state.get("waiting") or {}, state.get("terminated")
            ended = now or (entry.get("lastState") or {}).get("terminated") or {}
            yield Container(
                name=entry["name"],
                kind="sidecar" if entry["name"] in sidecars else kind,
                ready=bool(entry.get("ready")),
                restarts=int(entry.get("restartCount") or 0),
                running="running" in state,
                waiting=waiting.get("reason", ""),
                text=str(
                    waiting.get("message")
                    or (now or {}).get("message")
                    or ended.get("message")
                    or ""
                ),
                exit_code=ended.get("exitCode"),
                exit_reason=ended.get("reason", ""),
                ended=epoch(ended.get("finishedAt")),
            )


def view_pod(found: Object) -> Pod:
    """Reduce a pod to what matters."""
    meta, status = found["metadata"], found.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    scheduled = conditions.get("PodScheduled", {})
    stuck = scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
    labels = meta.get("labels") or {}
    return Pod(
        name=meta["name"],
        version=int(meta["resourceVersion"]),
        run=labels.get(LABEL_RUN, ""),
        job=labels.get("batch.kubernetes.io/job-name", ""),
        labels=labels,
        phase=status.get("phase", ""),
        ready=bool(true_condition(status, "Ready")) and "deletionTimestamp" not in meta,
        deleting="deletionTimestamp" in meta,
        disrupted=bool(true_condition(status, "DisruptionTarget"))
        or status.get("reason") == "Evicted",
        created=epoch(meta.get("creationTimestamp")),
        started=epoch(status.get("startTime")),
        ip=status.get("podIP", ""),
        unschedulable=str(scheduled.get("message", "")) if stuck else "",
        containers=tuple(view_containers(found)),
    )


@dataclass(frozen=True, slots=True)
class Service:
    """The live Service of an app, with what our annotations on it say."""

    name: str
    version: int
    found: Object

    @property
    def selector(self) -> dict[str, str]:
        """What it selects now: the truth about which version is live."""
        return dict(self.found["spec"].get("selector") or {})

    def note(self, key: str, empty: Any) -> Any:
        """Return the JSON in an annotation; empty when it is missing, broken or of another type."""
        try:
            value = json.loads((self.found["metadata"].get("annotations") or {})[key])
        except (KeyError, ValueError, TypeError):
            return empty
        return value if isinstance(value, type(empty)) else empty

    @property
    def history(self) -> list[Object]:
        """The switches, newest first, as far as they can be read."""
        return [
            e
            for e in self.note(NOTE_HISTORY, [])
            if isinstance(e, dict) and isinstance(e.get("selector"), dict)
        ]

    @property
    def claim(self) -> Object:
        """Who is changing this environment; empty when nobody is."""
        claim: Object = self.note(NOTE_CLAIM, {})
        return claim

    @property
    def live(self) -> Object:
        """The history entry of what is live by the selector; empty when it is not ours."""
        return next((e for e in self.history if e["selector"] == self.selector), {})

    @property
    def run(self) -> str:
        """The id of the live run, or ""."""
        return self.selector.get(LABEL_RUN, "")

    @property
    def ours(self) -> bool:
        """Whether the selector is one that this program sets."""
        return self.selector.keys() == {LABEL_APP, LABEL_VERSION, LABEL_RUN}

    def entry(self, run: str, since: float = 0.0) -> Object:
        """Return the newest history entry of a run made at or after a time; empty when none."""
        return next(
            (e for e in self.history if e.get("run") == run and seconds_of(e.get("at")) >= since),
            {},
        )

    def target(self, back: int = 1) -> Object:
        """Return the entry that a rollback goes to: the back-th proven one before the live one."""
        entries = self.history
        place = next((i for i, e in enumerate(entries) if e["selector"] == self.selector), -1)
        good = [
            e for e in entries[place + 1 :] if e.get("outcome") in (Outcome.DEPLOYED, "adopted")
        ]
        good = [e for e in good if e["selector"] != self.selector]
        return good[back - 1] if 0 < back <= len(good) else {}


def view_service(found: Object) -> Service:
    """Reduce a Service to what matters."""
    meta, spec = found["metadata"], found["spec"]
    kept = {
        k: meta[k]
        for k in ("name", "namespace", "resourceVersion", "labels", "annotations")
        if k in meta
    }
    return Service(meta["name"], int(meta["resourceVersion"]), {"metadata": kept, "spec": spec})


def decode_stream(chunks: Iterable[bytes]) -> Iterator[Object]:
    """Yield the JSON objects in a stream of bytes as each is complete.

    kubectl's watch output is indented, several lines an object, flushed an event at a time.
    """
    decode, buffer = json.JSONDecoder().raw_decode, ""
    incremental = codecs.getincrementaldecoder("utf-8")("replace")
    for chunk in chunks:
        buffer = (buffer + incremental.decode(chunk)).lstrip()
        while buffer:
            try:
                value, end = decode(buffer)
            except ValueError:
                break
            buffer = buffer[end:].lstrip()
            yield value


V = TypeVar("V", Job, Pod, Service)


class Watch(Generic[V]):
    """A mirror of one resource type in one namespace, kept by list and `kubectl get --watch`.

    A watch's exit code says nothing and a silent one may be dead, so each ends after WATCH_SECONDS
    and the next begins with a list. `gone` collects what disappeared, as it was last seen.
    """

    def __init__(
        self,
        kubectl: Kubectl,
        resource: str,
        namespace: str,
        view: Callable[[Object], V],
        selector: str,
    ) -> None:
        self.kubectl, self.resource, self.namespace = kubectl, resource, namespace
        self.view, self.selector = view, selector
        self.changed = threading.Event()
        self.synced = threading.Event()
        self.trouble = ""
        self.stopped = threading.Event()
        self._items: dict[str, V] = {}
        self._gone: list[V] = []
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def items(self) -> list[V]:
        """Return what is known now."""
        with self._lock:
            return list(self._items.values())

    def take_gone(self) -> list[V]:
        """Return what disappeared since the last call."""
        with self._lock:
            gone, self._gone = self._gone, []
            return gone

    def stop(self) -> None:
        """End the watch; its thread returns."""
        self.stopped.set()
        if process := self._process:
            process.kill()

    def run(
        self, pulse: Callable[[], None] = lambda: None, changed: threading.Event | None = None
    ) -> None:
        """Keep the mirror until stopped; back off while the API server does not answer."""
        if changed:
            self.changed = changed
        failures = 0
        while not self.stopped.is_set():
            pulse()
            try:
                self._cycle(pulse)
                failures, pause = 0, 0.2
            except (KubectlError, ConfigError) as lost:
                pause = backoff(failures)
                if failures == 0:
                    warn(
                        "watch lost",
                        resource=self.resource,
                        namespace=self.namespace,
                        detail=str(lost),
                    )
                failures += 1
                self.trouble = str(lost)
                self.changed.set()
            self.stopped.wait(pause)

    def _cycle(self, pulse: Callable[[], None]) -> None:
        """List once and follow the watch to its end."""
        args = ("get", self.resource, "-l", self.selector, "-o", "json")
        seconds = f"--request-timeout={WATCH_SECONDS + random.randrange(30)}s"  # noqa: S311 - jitter
        watch = (*args, "--watch", "--output-watch-events", seconds)
        process = self._process = self.kubectl.stream(*watch, namespace=self.namespace)
        try:
            listed = self.kubectl.list(self.resource, self.namespace, "-l", self.selector)
            self._replace([self.view(o) for o in listed])
            self.trouble = ""
            if self.stopped.is_set():
                return
            for event in decode_stream(read_chunks(process)):
                pulse()
                self._event(event)
        finally:
            end_process(process)

    def _replace(self, views: list[V]) -> None:
        with self._lock:
            fresh = {v.name: v for v in views}
            self._gone += [v for name, v in self._items.items() if name not in fresh]
            self._items = fresh
        self.synced.set()
        self.changed.set()

    def _event(self, event: Object) -> None:
        kind, found = event.get("type"), event.get("object") or {}
        if kind not in ("ADDED", "MODIFIED", "DELETED") or "metadata" not in found:
            return
        seen = self.view(found)
        with self._lock:
            known = self._items.get(seen.name)
            if known and known.version > seen.version:
                return
            if kind != "DELETED":
                self._items[seen.name] = seen
            elif self._items.pop(seen.name, None):
                self._gone.append(seen)
        self.changed.set()


def read_chunks(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Yield what a process prints as it comes, until it ends."""
    assert process.stdout is not None  # noqa: S101 - stream() always pipes it
    while chunk := os.read(process.stdout.fileno(), 1 << 16):
        yield chunk


def end_process(process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """End a process if it has not ended, reap it, and return the rest of its output."""
    process.kill()
    stdout, stderr = process.communicate()
    return stdout.decode(errors="replace"), stderr.decode(errors="replace")


def backoff(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row, with jitter."""
    return DELAYS[min(failures, len(DELAYS) - 1)] * random.uniform(0.7, 1.3)  # noqa: S311 - jitter


# === decide =======================================================================================
# Pure: observed state in, what to do next out. Nothing here calls a program, a clock or the network.


@dataclass(frozen=True, slots=True)
class Symptom:
    """Something wrong with a pod that cannot heal once it has lasted for `grace` seconds."""

    key: str
    reason: Reason
    detail: str
    grace: float = 0.0


HOPELESS_PULL = re.compile(
    r"not found|manifest unknown|denied|unauthorized|authentication required|no basic auth"
    r"|invalid reference|couldn't parse image|does not exist|no match for platform",
    re.IGNORECASE,
)
PULL_REASONS = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "RegistryUnavailable",
)
CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")


def container_symptom(container: Container, pod: str) -> Symptom | None:
    """Return what is wrong with a container, by the texts a real cluster gives."""
    name = f"container {container.name} of {pod}"
    if container.waiting in PULL_REASONS:
        hopeless = container.waiting == "InvalidImageName" or HOPELESS_PULL.search(container.text)
        reason = Reason.IMAGE_NOT_FOUND if hopeless else Reason.IMAGE_PULL_FAILED
        return Symptom(
            f"{pod}/{container.name}/pull",
            reason,
            f"{name}: {clip(container.text)}",
            0 if hopeless else 60,
        )
    if container.waiting in CONFIG_REASONS:
        detail = f"{name}: {clip(container.text)}"
        return Symptom(f"{pod}/{container.name}/config", Reason.CONTAINER_CONFIG, detail, 30)
    exits = container.restarts + (0 if container.running else 1)
    if container.exit_code and exits >= 2:
        end = f"{name} ended {exits} times, last with exit code {container.exit_code} ({container.exit_reason})"
        if container.exit_reason == "OOMKilled":
            return Symptom(f"{pod}/{container.name}/oom", Reason.OUT_OF_MEMORY, end)
        reason = Reason.INIT_FAILED if container.kind == "init" else Reason.CRASH_LOOP
        return Symptom(f"{pod}/{container.name}/crash", reason, end)
    return None


def pod_symptoms(pod: Pod) -> Iterator[Symptom]:
    """Yield what is wrong with a pod; an evicted or ending one is replaced, not sick."""
    if pod.disrupted or pod.deleting:
        return
    if pod.unschedulable:
        yield Symptom(f"{pod.name}/schedule", Reason.UNSCHEDULABLE, clip(pod.unschedulable), 120)
    for container in pod.containers:
        if not container.ready and (found := container_symptom(container, pod.name)):
            yield found


def creation_symptom(message: str, key: str) -> Symptom:
    """Return why pods cannot be created, from a FailedCreate event or ReplicaFailure condition."""
    if "exceeded quota" in message:
        return Symptom(f"{key}/quota", Reason.QUOTA_EXCEEDED, clip(message), 15)
    return Symptom(f"{key}/create", Reason.ADMISSION_REFUSED, clip(message), 3)


class Doom:
    """Remembers since when each symptom lasts, and so tells which one has lasted too long."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def verdict(self, symptoms: Iterable[Symptom], now: float) -> Symptom | None:
        """Return a symptom whose time is over; those that are gone are forgotten."""
        present = {s.key: s for s in symptoms}
        self._since = {k: self._since.get(k, now) for k in present}
        late = [s for k, s in present.items() if now - self._since[k] >= s.grace]
        return late[0] if late else None


class Do(StrEnum):
    """What the controller can do next for a run."""

    NOTHING = "nothing"
    WAIT = "wait"
    RELEASE = "release"
    BUILD = "build"
    REMAKE = "remake"
    NOTE = "note"
    DEPLOY = "deploy"
    END = "end"


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """The next step of a run: what, and why."""

    do: Do
    reason: Reason = Reason.OK
    detail: str = ""
    outcome: Outcome | None = None
    stage: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """Everything observed that decides over one run."""

    app: App
    run: Run
    jobs: Mapping[str, Job]  # by stage
    pods: tuple[Pod, ...]
    services: Mapping[str, Service]  # the live Service by environment
    head: str  # same, moved or unknown: what git says about the run's ref
    newer: bool  # the same ref was pushed again
    places: int  # how many more Jobs may run
    doomed: Symptom | None
    busy: frozenset[str]  # environments that a worker is changing
    now: float
    queue_timeout: float
    recorded: Action | None = None  # how the run ended, when only its Jobs do not know it yet


def waits(reason: Reason, detail: str, stage: str = "") -> Action:
    """Return that a run waits, and for what."""
    return Action(do=Do.WAIT, reason=reason, detail=detail, stage=stage)


def ends(outcome: Outcome, reason: Reason, detail: str, stage: str) -> Action:
    """Return that a run has ended."""
    return Action(do=Do.END, outcome=outcome, reason=reason, detail=detail, stage=stage)


def decide(view: View) -> Action:
    """Return the next step of a run from what is observed; every call could be the first."""
    jobs = view.jobs
    if any(j.outcome for j in jobs.values()) or not jobs:
        return Action(do=Do.NOTHING)
    if view.recorded:
        return view.recorded
    if any(j.deleting for j in jobs.values()):
        return waits(Reason.OK, "a Job is being deleted")
    test, build = jobs.get("test"), jobs.get("build")
    if test and not build and (action := decide_job(view, test)):
        return action
    if view.run.ref != view.app.deploy_ref or not view.app.deploy.environments:
        return ends(Outcome.TESTED, Reason.OK, test_detail(test), "test")
    if view.app.build.builder != "none":
        if not build:
            return decide_start(view, Do.BUILD, "build")
        if action := decide_job(view, build) or decide_digest(view, build):
            return action
    return decide_deploy(view)


def test_detail(test: Job | None) -> str:
    """Return the sentence of the test report."""
    return summary_text(test.notes.get(NOTE_SUMMARY, "")) if test else ""


def decide_start(view: View, do: Do, stage: str) -> Action:
    """Return whether a Job may start: newest of its ref, head of a deploy branch, a free place."""
    deploys = view.run.ref == view.app.deploy_ref
    if view.newer and not deploys:
        return ends(Outcome.SUPERSEDED, Reason.NOT_HEAD, "the branch was pushed again", stage)
    if deploys and view.head == "moved":
        return ends(Outcome.SUPERSEDED, Reason.NOT_HEAD, "the branch has another head", stage)
    if view.now - view.run.received > view.queue_timeout and do is Do.RELEASE:
        return ends(Outcome.FAILED, Reason.QUEUE_TIMEOUT, "no free place in time", stage)
    if view.places <= 0:
        return waits(Reason.OK, "for a free place", stage)
    if deploys and view.head == "unknown":
        return waits(Reason.GIT_ERROR, "for the head of the branch", stage)
    return Action(do=do, stage=stage)


def decide_job(view: View, found: Job) -> Action | None:
    """Return what a Job needs, or None when it has succeeded and said what it had to."""
    stage = found.stage
    if found.state == "suspended":
        return decide_start(view, Do.RELEASE, stage)
    if found.state == "failed":
        reason, detail = failure_of(view, found)
        return ends(Outcome.FAILED, reason, detail, stage)
    if (
        stage == "test"
        and NOTE_SUMMARY not in found.notes
        and (said := last_words(view, found, RESULTS_CONTAINER))
    ):
        return Action(do=Do.NOTE, stage=stage, detail=said)
    if found.state == "succeeded":
        return None
    if view.doomed:
        return ends(Outcome.FAILED, view.doomed.reason, view.doomed.detail, stage)
    started = max((p.started for p in view.pods if p.job == found.name), default=0.0)
    limit = view.app.test.timeout if stage == "test" else view.app.build.timeout
    if started and view.now - started > limit:
        return ends(Outcome.FAILED, Reason.TIMEOUT, f"no result within {limit:.0f} s", stage)
    if not started and found.released and view.now - found.released > view.queue_timeout:
        return ends(Outcome.FAILED, Reason.QUEUE_TIMEOUT, "no pod could start in time", stage)
    return waits(Reason.OK, "its pod runs" if started else "for its pod", stage)


def last_words(view: View, found: Job, container: str) -> str:
    """Return the termination message of a container of a Job's newest pod that ended."""
    for pod in sorted(view.pods, key=lambda p: -p.created):
        ended = pod.container(container) if pod.job == found.name else None
        if ended and ended.exit_code is not None and not ended.running and ended.text:
            return ended.text[:TERMINATION_LENGTH]
    return ""


def failure_of(view: View, found: Job) -> tuple[Reason, str]:
    """Return why a Job failed, from its pods first and its own condition second."""
    main = TEST_CONTAINER if found.stage == "test" else BUILD_CONTAINER
    if view.doomed:
        return view.doomed.reason, view.doomed.detail
    for pod in sorted((p for p in view.pods if p.job == found.name), key=lambda p: -p.created):
        clone, container = pod.container("clone"), pod.container(main)
        if clone and clone.exit_code:
            return Reason.CLONE_FAILED, clip(
                clone.text
            ) or f"clone ended with exit code {clone.exit_code}"
        if container and container.exit_reason == "OOMKilled":
            return Reason.OUT_OF_MEMORY, f"the {found.stage} was killed for its memory"
        if container and container.exit_code:
            said = test_detail(found) or clip(container.text)
            reason = Reason.TESTS_FAILED if found.stage == "test" else Reason.BUILD_FAILED
            return reason, said or f"exit code {container.exit_code}"
    if found.reason == "DeadlineExceeded":
        return Reason.TIMEOUT, "the Job's deadline passed"
    if found.reason == "PodFailurePolicy":
        reason = Reason.TESTS_FAILED if found.stage == "test" else Reason.BUILD_FAILED
        return reason, test_detail(found) or "its pod is gone"
    return Reason.VANISHED, f"its pods left no result ({clip(found.reason, 60)})"


def decide_digest(view: View, build: Job) -> Action | None:
    """Return how to get at the digest of a finished build, or None when it is known."""
    if DIGEST.fullmatch(build.notes.get(NOTE_DIGEST, "")):
        return None
    if DIGEST.fullmatch(said := last_words(view, build, BUILD_CONTAINER).strip()):
        return Action(do=Do.NOTE, stage="build", detail=said)
    if build.notes.get(NOTE_REMADE):
        return ends(Outcome.FAILED, Reason.NO_DIGEST, "the build left no digest, twice", "build")
    return Action(do=Do.REMAKE, stage="build")


def decide_deploy(view: View) -> Action:
    """Return which environment comes next, or how the run ended there."""
    for name in view.app.deploy.environments:
        if name in view.busy:
            return waits(Reason.OK, f"{name} is being changed", name)
        service = view.services.get(name)
        entry = service.entry(view.run.id, view.run.received) if service else {}
        outcome, reason = entry.get("outcome", ""), entry.get("reason", "")
        if outcome in (Outcome.SWITCHED_BACK, Outcome.ROLLED_BACK, Outcome.FAILED):
            known = Reason(reason) if reason in list(Reason) else Reason.SICK_AFTER_SWITCH
            return ends(Outcome(outcome), known, str(entry.get("detail", "")), name)
        if (
            service
            and service.run == view.run.id
            and service.live.get("outcome") == Outcome.DEPLOYED
        ):
            continue
        switched = bool(service and service.run == view.run.id)
        if view.head == "moved" and not switched:
            return ends(Outcome.SUPERSEDED, Reason.NOT_HEAD, "the branch has another head", name)
        if view.head == "unknown" and not switched:
            return waits(Reason.GIT_ERROR, "for the head of the branch", name)
        return Action(do=Do.DEPLOY, stage=name)
    return ends(
        Outcome.DEPLOYED,
        Reason.OK,
        test_detail(view.jobs.get("test")),
        view.app.deploy.environments[-1],
    )


def head_word(run: Run, heads: Mapping[str, str] | None, age: float, now: float) -> str:
    """Return what read heads say about a run: same, moved, or unknown where they are too old.

    A server that still shows the commit before the push may only lag behind its own webhook.
    """
    if heads is None or age > HEAD_FRESH:
        return "unknown"
    head = heads.get(run.ref, "")
    if head == run.commit:
        return "same"
    lagging = head == run.before or (not head and set(run.before) == {"0"})
    return "unknown" if lagging and now - run.received < HEAD_GRACE else "moved"


def sickness(pods: Iterable[Pod], run: str, since: float) -> str:
    """Return how an app container of a switched-to run failed on its own since a time, or ""."""
    for pod in pods:
        if pod.run != run or pod.disrupted or pod.deleting:
            continue
        for container in pod.containers:
            if container.kind == "app" and container.exit_code and container.ended >= int(since):
                return f"container {container.name} of {pod.name} ended with exit code {container.exit_code}"
    return ""


def unready(pods: Iterable[Pod], run: str, since: float) -> list[str]:
    """Return the pods that were ready at the switch and are not now by their own containers' word.

    The Ready condition also falls with a node; what the containers say does not, so that a lost node
    is not sickness.
    """
    ours = [
        p for p in pods if p.run == run and not (p.disrupted or p.deleting) and p.created <= since
    ]
    return [p.name for p in ours if not all(c.ready for c in p.containers if c.kind == "app")]


def disturbed(pods: Sequence[Pod], run: str, wanted: int) -> bool:
    """Whether the cluster took pods of a run away: eviction, a lost node, a deletion."""
    ours = [p for p in pods if p.run == run]
    lost = [p for p in ours if p.disrupted or p.deleting]
    asleep = [
        p for p in ours if not p.ready and p.containers and all(c.ready for c in p.containers)
    ]
    return bool(lost or asleep or len(ours) < wanted)


def narrowed(
    selector: Mapping[str, str], pods: Sequence[Pod], new: Mapping[str, str]
) -> dict[str, str] | None:
    """Return a selector that matches exactly today's pods and never the new ones; None if there is none."""
    if any(new.get(k) != v for k, v in selector.items()):
        return dict(selector)
    shared = set.intersection(*(set(p.labels.items()) for p in pods)) if pods else set()
    order = {"version": 0, "pod-template-hash": 1}
    for key, value in sorted(shared, key=lambda kv: (order.get(kv[0], 2), kv)):
        if new.get(key) != value:
            return {**selector, key: value}
    return None


# === deploy =======================================================================================


class Clock:
    """The one door to time, so that a test can hold it."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)


def health_refusal(url: str) -> str | None:
    """Return why a health path does not answer as healthy, or None; the one door to HTTP."""
    try:
        with requests.Session() as session:
            session.trust_env = False
            with session.get(url, timeout=(1.0, 2.0), allow_redirects=False, stream=True) as answer:
                return None if 200 <= answer.status_code < 400 else f"status {answer.status_code}"
    except requests.RequestException as failed:
        return type(failed).__name__


class Ledger:
    """Per app, in a ConfigMap: the last seen commit of each ref with its outcome, and what is rejected.

    Each entry has its own key, so that concurrent writers merge instead of overwriting each other.
    """

    def __init__(self, kubectl: Kubectl, clock: Clock) -> None:
        self.kubectl, self.clock = kubectl, clock

    def read(self, app: str) -> tuple[dict[str, Object], dict[str, Object]]:
        """Return (last seen by ref, rejected by commit); raises KubectlError."""
        found = self.kubectl.get("configmap", f"{MANAGER}-{app}", ORCHESTRATION) or {}
        refs, rejected = {}, {}
        for key, value in (found.get("data") or {}).items():
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(value)
                if key.startswith("ref-"):
                    refs[entry["ref"]] = entry
                elif key.startswith("rejected-"):
                    rejected[entry["commit"]] = entry
        return refs, rejected

    def write(self, app: str, data: Mapping[str, Object | None]) -> None:
        """Merge entries into the ConfigMap, creating it first if need be; None removes one."""
        if not data:
            return
        name = f"{MANAGER}-{app}"
        change = {"data": {k: v and json.dumps(v) for k, v in data.items()}}
        try:
            self.kubectl.patch("configmap", name, ORCHESTRATION, change)
        except KubectlError as missing:
            if missing.kind != "NotFound":
                raise
            meta = {"name": name, "labels": {LABEL_MANAGED: MANAGER, LABEL_APP: app}}
            self.kubectl.create(
                [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta}], ORCHESTRATION
            )
            self.kubectl.patch("configmap", name, ORCHESTRATION, change)

    def seen(
        self, run: Run, outcome: str | None, reason: str = "", stage: str = ""
    ) -> dict[str, Object | None]:
        """Return the entry that a run is the last seen of its ref."""
        key = "ref-" + hashlib.sha256(run.ref.encode()).hexdigest()[:16]
        entry = {"ref": run.ref, "commit": run.commit, "run": run.id, "at": self.clock.now()}
        return {key: {**entry, "outcome": outcome, "reason": reason, "stage": stage}}

    def rejection(self, app: str, commit: str, reason: str) -> dict[str, Object | None]:
        """Return the entry that rejects a commit until `rerun`, and drop the oldest of too many."""
        _, known = self.read(app)
        oldest = sorted(known.values(), key=lambda e: seconds_of(e.get("at")))
        drop = oldest[: max(0, len(oldest) + 1 - REJECTED_LENGTH)]
        entry: Object = {"commit": commit, "reason": reason, "at": self.clock.now()}
        return {**{f"rejected-{e['commit']}": None for e in drop}, f"rejected-{commit}": entry}


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One run of one app on its way into one environment."""

    app: App
    run: Run
    environment: str
    namespace: str
    image: str

    @property
    def last(self) -> bool:
        """Whether this is the environment that bakes."""
        return self.environment == self.app.deploy.environments[-1]

    @property
    def words(self) -> dict[str, str]:
        """The fields of its log lines."""
        return {"run": self.run.id, "app": self.app.name, "environment": self.environment}


class Deployer:
    """Brings runs into environments, and takes traffic back. Every step looks before it acts.

    `holder` tells this process from another in a claim; `stop` ends waiting.
    """

    def __init__(
        self, kubectl: Kubectl, git: Git, secrets: Secrets, metrics: Metrics, clock: Clock
    ) -> None:
        self.kubectl, self.git, self.secrets = kubectl, git, secrets
        self.metrics, self.clock = metrics, clock
        self.holder = uuid.uuid4().hex[:12]
        self.stop = threading.Event()

    # The way of a deployment.

    def deploy(self, task: Task) -> None:
        """Bring a run into an environment, through its bake in the last one.

        Raises StageError when it cannot (live traffic is as before, or was taken back) and
        SupersededError when something newer, or someone, took its place.
        """
        with self.watched_pods(task.app.name, task.namespace) as pods:
            service = self.service(task)
            if not (service and service.run == task.run.id):
                release = self.prepare(task, pods)
                self.switch(task, release)
            self.settle(task, pods)

    def prepare(self, task: Task, pods: Watch[Pod]) -> Release:
        """Do everything before the switch; return what traffic may be switched to."""
        with tempfile.TemporaryDirectory(prefix="gitops-hook-") as folder:
            self.git.checkout(task.app.repository, task.run.commit, Path(folder), symlinks=False)
            found = read_manifests(Path(folder), task.app.deploy.manifests)
        objects = check_objects(task.app, task.namespace, found)
        place = self.place(task, objects)
        release = render(place, objects)
        service = self.claim(task, release)
        info("claimed", colour=release.colour, ignored=objects.ignored or None, **task.words)
        record = release.configmap(task.app.name)
        self.kubectl.create([*release.configmaps, record], task.namespace)
        self.check_claim(task, service)
        self.roll_out(task, release, pods)
        self.check_claim(task, service)
        self.preview(task, release)
        return release

    def service(self, task: Task) -> Service | None:
        """Return the live Service as it is now."""
        found = self.kubectl.get("service", task.app.name, task.namespace)
        return view_service(found) if found else None

    def place(self, task: Task, objects: AppObjects) -> Placement:
        """Choose the idle colour, and see how large the live one is."""
        service = self.service(task)
        live = service.selector.get(LABEL_VERSION, "") if service and service.ours else ""
        free = [c for c in COLOURS if c != live]
        replicas = 0
        for colour in COLOURS:
            found = self.kubectl.get("deployment", f"{task.app.name}-{colour}", task.namespace)
            if colour == live and found:
                replicas = int(found["spec"].get("replicas", 1))
            elif found and LABEL_APP not in found["spec"]["selector"].get("matchLabels", {}):
                free.remove(colour)
        if not free:
            names = " and ".join(f"{task.app.name}-{c}" for c in COLOURS)
            raise StageError(
                Reason.ADOPTION_REFUSED, f"Deployments {names} belong to someone else; rename one"
            )
        return Placement(
            app=task.app, run=task.run, namespace=task.namespace, colour=free[0],
            image=task.image, live_replicas=replicas,
        )  # fmt: skip

    def claim(self, task: Task, release: Release) -> Service | None:
        """Say on the live Service that this run is changing the environment; None if there is none.

        A compare-and-set that also marks what stands in the idle colour as overwritten and remembers
        its release, so that it can be healed. A foreign selector is narrowed in the same patch.
        """
        for _ in range(5):
            service = self.service(task)
            if service is None:
                return None
            claim, history = service.claim, service.history
            fresh = self.clock.now() - seconds_of(claim.get("since")) < CLAIM_SECONDS
            if fresh and claim.get("phase") == "rollback":
                raise SupersededError(
                    Reason.CLAIM_LOST, f"a rollback to {claim.get('run')} is under way"
                )
            stood = [
                e for e in history if e.get("colour") == release.colour and not e.get("overwritten")
            ]
            heal = stood[0].get("release", "") if stood else ""
            if not stood and claim.get("colour") == release.colour:
                heal = claim.get("heal", "")
            notes: Object = {
                NOTE_CLAIM: self.claim_note(task.run.id, release.colour, Phase.PREPARING, heal)
            }
            selector = service.selector if service.ours else self.adopted(task, release, service)
            if not history:
                first = {
                    "run": "",
                    "colour": "",
                    "selector": selector,
                    "outcome": "adopted",
                    "at": self.clock.now(),
                }
                history = [{**first, "ports": service.found["spec"].get("ports") or []}]
                notes[NOTE_PREVIOUS] = selector
            notes[NOTE_HISTORY] = [{**e, "overwritten": True} if e in stood else e for e in history]
            with self.retried("claim"):
                return self.patch_service(task.namespace, service, notes, selector=selector)
        raise StageError(
            Reason.CLUSTER_ERROR, "the Service changes all the time; no claim possible"
        )

    @contextmanager
    def retried(self, what: str) -> Iterator[None]:
        """Let a conflicting or unanswered write be looked at again by the loop around it."""
        try:
            yield
        except KubectlError as failed:
            if failed.kind not in ("Conflict", "Unreachable", "AlreadyExists"):
                raise
            warn("write to be looked at again", what=what, detail=str(failed))
            self.stop.wait(0.2 if failed.kind == "Conflict" else 1.0)

    def adopted(self, task: Task, release: Release, service: Service) -> dict[str, str]:
        """Return the selector that keeps a foreign Service on exactly today's pods."""
        selector = service.selector
        terms = ",".join(f"{k}={v}" for k, v in selector.items())
        pods = (
            [view_pod(p) for p in self.kubectl.list("pods", task.namespace, "-l", terms)]
            if terms
            else []
        )
        labels = release.deployment["spec"]["template"]["metadata"]["labels"]
        found = narrowed(selector, pods, labels) if terms else None
        if found is None:
            command = f"kubectl -n {task.namespace} label pods -l {terms} version=before && kubectl -n {task.namespace}"
            command += f""" patch service {task.app.name} -p '{{"spec":{{"selector":{{"version":"before"}}}}}}'"""
            detail = f"its selector would also match the new pods; run: {command}"
            raise StageError(Reason.ADOPTION_REFUSED, detail)
        return found

    def claim_note(self, run: str, colour: str, phase: str, heal: str = "") -> Object:
        """Return the claim of this process."""
        since = round(self.clock.now(), 3)
        return {
            "run": run,
            "colour": colour,
            "phase": phase,
            "since": since,
            "holder": self.holder,
            "heal": heal,
        }

    def check_claim(self, task: Task, claimed: Service | None) -> Service | None:
        """Return the live Service if it is still as claimed; raises when someone else changed it."""
        service = self.service(task)
        if claimed is None or service is None:
            if service is not claimed:
                raise SupersededError(
                    Reason.CLAIM_LOST, "the Service appeared or disappeared meanwhile"
                )
            return None
        if service.claim.get("holder") != self.holder or service.claim.get("run") != task.run.id:
            raise SupersededError(
                Reason.CLAIM_LOST, f"{service.claim.get('run') or 'nobody'} holds the claim now"
            )
        if service.selector != claimed.selector:
            raise StageError(
                Reason.SELECTOR_CHANGED, f"the Service was changed by {self.last_manager(task)}"
            )
        return service

    def last_manager(self, task: Task) -> str:
        """Return who changed the live Service last, by its managedFields; counts the drift."""
        self.metrics.drift.labels(task.app.name, task.environment).inc()
        args = ("get", "service", task.app.name, "-o", "json", "--show-managed-fields")
        with suppress(KubectlError, ValueError):
            managed = json.loads(self.kubectl.run(*args, namespace=task.namespace))["metadata"].get(
                "managedFields"
            )
            spec = [m for m in managed or [] if "f:selector" in json.dumps(m.get("fieldsV1"))]
            latest = max(spec or managed or [{}], key=lambda m: m.get("time", ""))
            return f"{clip(str(latest.get('manager')), 80)} at {latest.get('time')}"
        return "someone"

    def patch_service(
        self, namespace: str, service: Service, notes: Mapping[str, Any],
        selector: Mapping[str, str] | None = None, ports: Sequence[Object] = (),
    ) -> Service:  # fmt: skip
        """Compare-and-set annotations (None removes), selector and ports of a Service in one patch."""
        texts = {
            k: None if v is None else json.dumps(v, separators=(",", ":")) for k, v in notes.items()
        }
        labels = {LABEL_MANAGED: MANAGER, LABEL_APP: service.name, LABEL_STAGE: "live"}
        change: Object = {
            "metadata": {
                "resourceVersion": str(service.version),
                "annotations": texts,
                "labels": labels,
            }
        }
        if selector is not None and selector != service.selector:
            # a merge keeps keys that are not named: those that must go are set to null
            change["spec"] = {"selector": {**dict.fromkeys(service.selector), **selector}}
        if ports:
            live = service.found["spec"].get("ports") or []
            change.setdefault("spec", {})["ports"] = ports_like(ports, live)
        return view_service(self.kubectl.patch("service", service.name, namespace, change))

    # Apply and wait.

    @contextmanager
    def watched_pods(self, app: str, namespace: str) -> Iterator[Watch[Pod]]:
        """Keep a mirror of an app's pods in one namespace while the block runs."""
        watch = Watch(self.kubectl, "pods", namespace, view_pod, f"{LABEL_APP}={app}")
        thread = threading.Thread(target=watch.run, name=f"pods-{app}", daemon=True)
        thread.start()
        try:
            yield watch
        finally:
            watch.stop()
            thread.join(KUBECTL_TIMEOUT)

    def roll_out(self, task: Task, release: Release, pods: Watch[Pod]) -> None:
        """Apply a release and wait for its pods; raises StageError at once for what cannot heal."""
        name = release.deployment["metadata"]["name"]
        try:
            self.kubectl.apply([release.deployment], task.namespace)
        except KubectlError as refused:
            if refused.kind in ("Invalid", "BadRequest", "Forbidden"):
                raise StageError(
                    Reason.MANIFEST_INVALID, self.secrets.mask(clip(refused.stderr))
                ) from refused
            raise
        started, doom = self.clock.monotonic(), Doom()
        timeout = float(release.deployment["spec"]["progressDeadlineSeconds"])
        args = ("rollout", "status", f"deployment/{name}", f"--timeout={int(timeout)}s")
        process = self.kubectl.stream(*args, namespace=task.namespace)
        try:
            while process.poll() is None:
                ours = [p for p in pods.items() if p.run == release.run]
                symptoms = [s for p in ours for s in pod_symptoms(p)] + self.creation_symptoms(
                    task, name
                )
                if symptom := doom.verdict(symptoms, self.clock.now()):
                    raise StageError(
                        symptom.reason, self.with_logs(symptom.detail, ours, task.namespace)
                    )
                self.wait_change(pods, 1.0)
        finally:
            _, stderr = end_process(process)
        if process.returncode == 0:
            self.prove(task.namespace, release, timeout - (self.clock.monotonic() - started))
        elif "deadline" in stderr or "timed out" in stderr:
            ours = [p for p in pods.items() if p.run == release.run]
            detail = f"{sum(p.ready for p in ours)} of {release.wanted} pods ready within {timeout:.0f} s"
            raise StageError(Reason.NEVER_READY, self.with_logs(detail, ours, task.namespace))
        else:
            raise StageError(Reason.CLUSTER_ERROR, f"rollout status: {clip(stderr)}")

    def wait_change(self, pods: Watch[Pod], seconds: float) -> None:
        """Wait for a change of the pods, or so long; raises when the program is to stop."""
        pods.changed.wait(seconds)
        pods.changed.clear()
        if self.stop.is_set():
            raise InterruptedError

    def creation_symptoms(self, task: Task, name: str) -> list[Symptom]:
        """Return why a Deployment's pods cannot be created, if so."""
        with suppress(KubectlError):
            found = self.kubectl.get("deployment", name, task.namespace) or {}
            if failure := true_condition(found.get("status") or {}, "ReplicaFailure"):
                return [creation_symptom(str(failure.get("message")), name)]
        return []

    def with_logs(self, detail: str, pods: Iterable[Pod], namespace: str) -> str:
        """Return a detail with the last log lines of what failed, secrets masked."""
        for pod in sorted(pods, key=lambda p: (p.ready, -p.created)):
            for container in pod.containers:
                if container.kind != "sidecar" and (container.exit_code or not container.ready):
                    if printed := self.kubectl.logs(pod.name, container.name, namespace):
                        tail = "\n".join(clip(line, 200) for line in printed.splitlines()[-20:])
                        return self.secrets.mask(f"{detail}\n{tail}")
                    return detail
        return detail

    def prove(self, namespace: str, release: Release, seconds: float) -> None:
        """Prove that as many pods of exactly this run are ready as wanted; raises StageError.

        `rollout status` is no proof: it is content with no replicas, and a status may be the old pods'.
        """
        name, run = release.deployment["metadata"]["name"], release.run
        until = self.clock.monotonic() + max(seconds, VERIFY_SECONDS)
        while True:
            found = self.kubectl.get("deployment", name, namespace) or {"metadata": {}, "spec": {}}
            if proven(found, self.ready_pods(namespace, release.selector), run):
                return
            if self.clock.monotonic() > until:
                raise StageError(Reason.NEVER_READY, f"the pods of {run} are not all ready")
            self.stop.wait(0.3)

    def ready_pods(self, namespace: str, selector: Mapping[str, str]) -> int:
        """Return how many pods that match a selector are ready."""
        terms = ",".join(f"{k}={v}" for k, v in selector.items())
        return sum(view_pod(p).ready for p in self.kubectl.list("pods", namespace, "-l", terms))

    def preview(self, task: Task, release: Release) -> None:
        """Ask the new pods through a Service of their own; raises StageError SmokeFailed."""
        url = self.preview_url(task, release)
        health, refusal = task.app.deploy.health, None
        until, passed = self.clock.monotonic() + health.timeout, 0
        while passed < health.successes:
            refusal = health_refusal(url)
            passed = 0 if refusal else passed + 1
            if refusal and self.clock.monotonic() > until:
                raise StageError(Reason.SMOKE_FAILED, f"{health.path}: {refusal}")
            self.stop.wait(HEALTH_INTERVAL if refusal else 0.05)
        info("preview passed", **task.words)

    def preview_url(self, task: Task, release: Release) -> str:
        """Point the preview Service at a release; return the address of its health path."""
        name, ports = f"{task.app.name}-preview", plain_ports(release.ports)
        found = self.kubectl.get("service", name, task.namespace)
        if found is None:
            preview = service_object(task.app, name, {"ports": ports}, release.selector, "preview")
            self.kubectl.create([preview], task.namespace)
            found = self.kubectl.get("service", name, task.namespace)
        else:
            old = found["spec"].get("selector") or {}
            spec = {"selector": {**dict.fromkeys(old), **release.selector}, "ports": ports}
            found = self.kubectl.patch("service", name, task.namespace, {"spec": spec})
        if not found:
            raise StageError(Reason.CLUSTER_ERROR, f"Service {name} disappeared")
        address = found["spec"]["clusterIP"]
        host = f"[{address}]" if ":" in address else address
        return f"http://{host}:{found['spec']['ports'][0]['port']}{task.app.deploy.health.path}"

    # The switch and the way back.

    def switch(self, task: Task, release: Release) -> None:
        """Point the live Service at a release: one compare-and-set patch, looked at until it is done."""
        self.require_head(task)
        entry = {
            "run": release.run, "commit": release.commit, "image": release.image, "colour": release.colour,
            "selector": release.selector, "ports": release.ports, "at": round(self.clock.now(), 3), "by": MANAGER,
            "release": release.configmap(task.app.name)["metadata"]["name"], "outcome": "",
        }  # fmt: skip
        claim = self.claim_note(release.run, release.colour, Phase.BAKING)
        notes: Object = {NOTE_CLAIM: claim}
        if task.last:
            notes[NOTE_BAKE] = round(self.clock.now() + task.app.deploy.bake, 3)
        while True:
            service = self.service(task)
            if service and service.run == release.run:
                break
            with self.retried("switch"):
                if service is None:
                    self.create_live(task, release, {**notes, NOTE_HISTORY: [entry]})
                    continue
                self.check_claim(task, service)
                history = [entry, *service.history][:HISTORY_LENGTH]
                more = {**notes, NOTE_PREVIOUS: service.selector, NOTE_HISTORY: history}
                self.patch_service(
                    task.namespace, service, more, selector=release.selector, ports=release.ports
                )
        self.metrics.switches.labels(task.app.name, task.environment, "forward").inc()
        info("switched", colour=release.colour, commit=release.commit, **task.words)

    def create_live(self, task: Task, release: Release, notes: Mapping[str, Any]) -> None:
        """Create the live Service of a first deployment."""
        live = service_object(task.app, task.app.name, release.service, release.selector, "live")
        live["metadata"]["annotations"] = {k: json.dumps(v) for k, v in notes.items()}
        refused = self.kubectl.create_each([live], task.namespace)
        for line in refused.values():
            raise KubectlError([self.kubectl.program, "create"], 1, line)

    def require_head(self, task: Task) -> None:
        """Return only while the commit is its branch's head by git; waits while git does not answer."""
        failures = 0
        while True:
            try:
                word = head_word(task.run, self.git.heads(task.app.repository), 0, self.clock.now())
            except GitError as lost:
                warn("waiting for git", detail=str(lost), **task.words)
                word = "unknown"
            if word == "same":
                return
            if word == "moved":
                raise SupersededError(Reason.NOT_HEAD, "the branch has another head")
            if self.stop.wait(backoff(failures)):
                raise InterruptedError
            failures += 1

    def settle(self, task: Task, pods: Watch[Pod]) -> None:
        """Verify the switch, bake in the last environment, write the outcome, drain the old colour."""
        service = self.service(task)
        entry = service.live if service else {}
        if service is None or service.run != task.run.id:
            raise SupersededError(Reason.ROLLED_BACK, "the Service was switched to something else")
        if not entry.get("outcome"):
            release = self.release(task, entry)
            self.verify(task, release)
            if task.last:
                self.bake(task, release, pods, service)
            self.conclude(task)

    def release(self, task: Task, entry: Mapping[str, Any]) -> Release:
        """Return the release that a history entry names."""
        found = self.kubectl.get("configmap", str(entry.get("release") or "none"), task.namespace)
        if not found:
            raise StageError(Reason.VANISHED, f"release record {entry.get('release')} is gone")
        return Release.from_configmap(found)

    def verify(self, task: Task, release: Release) -> None:
        """See the ready endpoints follow the selector; else put the old selector back and raise."""
        until = self.clock.monotonic() + VERIFY_SECONDS
        while True:
            with suppress(KubectlError):
                terms = f"kubernetes.io/service-name={task.app.name}"
                slices = self.kubectl.list("endpointslices", task.namespace, "-l", terms)
                terms = ",".join(f"{k}={v}" for k, v in release.selector.items())
                ours = {
                    p["metadata"]["name"]
                    for p in self.kubectl.list("pods", task.namespace, "-l", terms)
                }
                ready = ready_endpoints(slices)
                if ready and ready <= ours and len(ready) >= release.wanted:
                    return
            if self.clock.monotonic() > until:
                break
            self.stop.wait(0.1)
        detail = f"the endpoints did not become the {release.wanted} pods of {release.run}"
        self.switch_back(task, Outcome.FAILED, Reason.ENDPOINTS_MISSING, detail)
        raise StageError(Reason.ENDPOINTS_MISSING, detail)

    def bake(self, task: Task, release: Release, pods: Watch[Pod], service: Service) -> None:
        """Watch a switched-to version; sick: take the traffic back and raise StageError."""
        since = seconds_of(service.live.get("at"))
        until = max(
            seconds_of(service.note(NOTE_BAKE, 0.0)),
            self.clock.now() + min(REBAKE_SECONDS, task.app.deploy.bake),
        )
        url, health = self.preview_url(task, release), task.app.deploy.health
        failures, sound, looked = 0, self.clock.monotonic(), self.clock.monotonic()
        while self.clock.now() < until:
            self.wait_change(pods, HEALTH_INTERVAL)
            known = pods.items()
            refusal = health_refusal(url)
            failures = (
                failures + 1 if refusal and not disturbed(known, release.run, release.wanted) else 0
            )
            down = unready(known, release.run, since)
            sound = sound if down else self.clock.monotonic()
            sick = sickness(known, release.run, since)
            if failures >= health.failures:
                sick = sick or f"{health.path} failed {failures} times in a row: {refusal}"
            if self.clock.monotonic() - sound > UNREADY_SECONDS:
                sick = sick or f"not ready for {UNREADY_SECONDS:.0f} s: {', '.join(down)}"
            if sick:
                self.take_back(task, sick, pods, unhealthy=failures >= health.failures)
            if self.clock.monotonic() - looked > 2.0:
                looked = self.clock.monotonic()
                self.still_live(task)

    def still_live(self, task: Task) -> None:
        """Raise SupersededError when the live Service was switched away from a run meanwhile."""
        with suppress(KubectlError):
            service = self.service(task)
            if service is None or service.run != task.run.id:
                if not (service and service.entry(task.run.id).get("outcome")):
                    raise SupersededError(
                        Reason.SELECTOR_CHANGED,
                        f"the Service was changed by {self.last_manager(task)}",
                    )
                raise SupersededError(Reason.ROLLED_BACK, "rolled back during the bake")

    def take_back(self, task: Task, sick: str, pods: Watch[Pod], *, unhealthy: bool) -> NoReturn:
        """Switch back first, then gather why and end the sick pods; raises StageError.

        Only onto a version with more ready pods than the sick one: with both sick it stays.
        """
        service = self.service(task)
        target = service.target() if service else {}
        new = 0 if unhealthy else sum(p.ready for p in pods.items() if p.run == task.run.id)
        old = self.answering(task, target) if target else 0
        if old <= new:
            detail = f"{sick}; {'the version before is no better' if target else 'there is no version before'}"
            raise StageError(Reason.BOTH_SICK, detail)
        self.switch_back(task, Outcome.SWITCHED_BACK, Reason.SICK_AFTER_SWITCH, sick)
        ours = [p for p in pods.items() if p.run == task.run.id]
        raise StageError(Reason.SICK_AFTER_SWITCH, self.with_logs(sick, ours, task.namespace))

    def answering(self, task: Task, target: Mapping[str, Any]) -> int:
        """Return how many ready pods of a rollback target also answer their health path."""
        terms = ",".join(f"{k}={v}" for k, v in target["selector"].items())
        found = self.kubectl.list("pods", task.namespace, "-l", terms)
        port = (target.get("ports") or [{}])[0]
        urls = [
            health_address(p, port, task.app.deploy.health.path) for p in found if view_pod(p).ready
        ]
        return sum(not (url and health_refusal(url)) for url in urls)

    def switch_back(self, task: Task, outcome: Outcome, reason: Reason, detail: str) -> None:
        """Point the live Service back at the version before, in one patch that carries the outcome.

        It does not look at the pods it leaves. Tried until it is done or someone else has switched;
        a first deployment has nothing to go back to, so its Service is removed.
        """
        failures = 0
        while not self.stop.is_set():
            try:
                service = self.service(task)
                if service is None or service.run != task.run.id:
                    return
                target = service.target()
                if not target:
                    self.kubectl.delete("service", [task.app.name], task.namespace)
                    return
                ended = {"outcome": outcome, "reason": reason, "detail": clip(detail)}
                history = [{**e, **ended} if e == service.live else e for e in service.history]
                claim = self.claim_note(
                    task.run.id, service.selector.get(LABEL_VERSION, ""), Phase.SWITCHED_BACK
                )
                notes = {
                    NOTE_HISTORY: history,
                    NOTE_CLAIM: claim,
                    NOTE_BAKE: None,
                    NOTE_PREVIOUS: service.selector,
                }
                selector, ports = target["selector"], target.get("ports") or ()
                self.patch_service(task.namespace, service, notes, selector=selector, ports=ports)
                self.metrics.switches.labels(task.app.name, task.environment, "back").inc()
                error("switched back", reason=reason, detail=clip(detail), **task.words)
            except KubectlError as failed:
                warn("switch back to be tried again", detail=str(failed), **task.words)
                self.stop.wait(0.05 if failed.kind == "Conflict" else min(backoff(failures), 2.0))
                failures += 1

    def conclude(self, task: Task) -> None:
        """Write that a version stays, and leave a claim that says until when the old one drains."""
        for _ in range(20):
            service = self.service(task)
            if service is None or service.run != task.run.id:
                raise SupersededError(
                    Reason.ROLLED_BACK, "the Service was switched to something else"
                )
            entry = service.live
            history = [
                {**e, "outcome": Outcome.DEPLOYED} if e == entry else e for e in service.history
            ]
            old = service.target().get("colour", "")
            claim: Object | None = {
                **self.claim_note(task.run.id, old, Phase.DRAINING),
                "since": entry.get("at", 0),
            }
            notes = {
                NOTE_HISTORY: history,
                NOTE_BAKE: None,
                NOTE_CLAIM: claim if old in COLOURS else None,
            }
            with self.retried("conclude"):
                self.patch_service(task.namespace, service, notes)
                return
        raise StageError(Reason.CLUSTER_ERROR, "the outcome could not be written")

    # What is left behind.

    def tidy(self, app: App, namespace: str, service: Service | None) -> None:
        """Finish what a claim says is unfinished, then remove what nothing names any more."""
        claim = service.claim if service else {}
        phase, colour = claim.get("phase", ""), str(claim.get("colour", ""))
        name = f"{app.name}-{colour}"
        if service and colour in COLOURS and service.selector.get(LABEL_VERSION) != colour:
            if phase == Phase.SWITCHED_BACK:
                self.scale(namespace, name, str(claim.get("run", "")), 0)
            elif phase == Phase.DRAINING:
                self.drain(app, namespace, name)
            else:
                self.heal(app, namespace, service)
        if service and claim:
            history = service.history
            if phase in (Phase.PREPARING, Phase.HEALING) and claim.get("heal"):
                healed = [e for e in history if e.get("release") == claim["heal"]]
                history = [{**e, "overwritten": False} if e in healed else e for e in history]
            self.patch_service(namespace, service, {NOTE_CLAIM: None, NOTE_HISTORY: history})
        self.collect_garbage(app, namespace)

    def scale(self, namespace: str, name: str, run: str, replicas: int) -> None:
        """Set the size of a Deployment if it still carries a run ("" for any)."""
        found = self.kubectl.get("deployment", name, namespace)
        if found and (not run or found["metadata"]["labels"].get(LABEL_RUN) == run):
            self.kubectl.patch("deployment", name, namespace, {"spec": {"replicas": replicas}})

    def drain(self, app: App, namespace: str, name: str) -> None:
        """Move what is still connected to the old colour: restart it, or shrink it to `retain`."""
        if app.deploy.retain is not None:
            self.scale(namespace, name, "", app.deploy.retain)
        elif (found := self.kubectl.get("deployment", name, namespace)) and found["spec"].get(
            "replicas"
        ):
            self.kubectl.run("rollout", "restart", f"deployment/{name}", namespace=namespace)

    def heal(self, app: App, namespace: str, service: Service) -> None:
        """Put the rollback target back into the idle colour that a failed deployment overwrote.

        By applying its release, never by `rollout undo`, which leaves last-applied wrong. Tried once.
        """
        claim = service.claim
        record = (
            self.kubectl.get("configmap", str(claim.get("heal")), namespace)
            if claim.get("heal")
            else None
        )
        if record is None:
            self.kubectl.delete("deployment", [f"{app.name}-{claim['colour']}"], namespace)
            return
        release = Release.from_configmap(record)
        self.kubectl.create(release.configmaps, namespace)
        self.kubectl.apply([release.deployment], namespace)
        info("healed", app=app.name, run=release.run, colour=release.colour)

    def collect_garbage(self, app: App, namespace: str) -> None:
        """Delete what a failed first deployment left, and copies and releases that nothing names."""
        service = self.kubectl.get("service", app.name, namespace)
        ours = f"{LABEL_MANAGED}={MANAGER},{LABEL_APP}={app.name}"
        if service is None:
            found = self.kubectl.list("deployments", namespace, "-l", ours)
            self.kubectl.delete("deployment", [d["metadata"]["name"] for d in found], namespace)
            self.kubectl.delete("service", [f"{app.name}-preview"], namespace)
        view = view_service(service) if service else None
        named = json.dumps([view.history, view.claim] if view else [])
        if service:
            named += json.dumps(self.kubectl.list("deployments", namespace, "-l", ours))
            named += json.dumps(
                self.kubectl.list("replicasets", namespace, "-l", f"{LABEL_APP}={app.name}")
            )
        maps = self.kubectl.list("configmaps", namespace, "-l", ours)
        kept = [m for m in maps if m["metadata"]["name"] in named]
        for record in kept:
            if record["metadata"]["labels"].get(LABEL_STAGE) == "release":
                named += json.dumps(
                    [c["metadata"]["name"] for c in Release.from_configmap(record).configmaps]
                )
        gone = [m["metadata"]["name"] for m in maps if m["metadata"]["name"] not in named]
        self.kubectl.delete("configmap", gone, namespace)

    # Rollback on request.

    def rollback(
        self, app: App, environment: str, namespace: str, back: int, reason: str
    ) -> Object:
        """Switch an environment to a proven earlier version; return its history entry.

        Works beside a daemon or without one. A target that still stands is one patch away; one that
        was scaled down is scaled up first, an overwritten one is applied again and waited for.
        Raises RefusedError without a target and StageError when it does not become ready.
        """
        run = Run(id="", app=app.name, ref="", commit="")
        task = Task(app=app, run=run, environment=environment, namespace=namespace, image="")
        service = self.service(task)
        target = service.target(back) if service else {}
        if not service or not target:
            raise RefusedError(
                f"{app.name} in {environment}: there is no proven version to go back to"
            )
        task = replace(task, run=replace(run, id=str(target.get("run", ""))))
        left, claim = (
            service.live,
            self.claim_note(task.run.id, str(target.get("colour", "")), "rollback"),
        )
        service = self.patch_service(namespace, service, {NOTE_CLAIM: claim})
        target = self.raise_target(task, service, target)
        while service.selector != target["selector"]:
            history = []
            for e in service.history:
                gone = {
                    "outcome": Outcome.ROLLED_BACK,
                    "reason": Reason.ROLLED_BACK,
                    "detail": clip(reason),
                }
                is_target = e.get("at") == target.get("at") and e.get("run") == target.get("run")
                history.append({**e, **gone} if e == left else target if is_target else e)
            notes = {
                NOTE_HISTORY: history,
                NOTE_CLAIM: None,
                NOTE_BAKE: None,
                NOTE_PREVIOUS: service.selector,
            }
            with self.retried("rollback"):
                ports = target.get("ports") or ()
                self.patch_service(
                    namespace, service, notes, selector=target["selector"], ports=ports
                )
            service = self.service(task) or service
            if service.claim and service.claim.get("holder") != self.holder:
                raise RefusedError(f"someone else took over: {service.claim.get('run')}")
        self.metrics.switches.labels(app.name, environment, "rollback").inc()
        return {"left": left, "target": target}

    def raise_target(self, task: Task, service: Service, target: Object) -> Object:
        """Return the entry of a rollback target once it has ready pods, brought back if need be."""
        if self.ready_pods(task.namespace, target["selector"]) > 0:
            return target
        if not target.get("release"):
            raise RefusedError(
                "the version before has no ready pods and was not deployed by this program"
            )
        release = self.release(task, target)
        live = service.selector.get(LABEL_VERSION, "")
        if release.colour == live:
            release = recoloured(release, task.app.name, next(c for c in COLOURS if c != live))
        self.kubectl.create([*release.configmaps, release.configmap(task.app.name)], task.namespace)
        with self.watched_pods(task.app.name, task.namespace) as pods:
            self.roll_out(task, release, pods)
        name = release.configmap(task.app.name)["metadata"]["name"]
        changed = {
            "colour": release.colour,
            "selector": release.selector,
            "release": name,
            "overwritten": False,
        }
        return {**target, **changed}


def recoloured(release: Release, app: str, colour: str) -> Release:
    """Return a release as it is rendered for the other colour."""
    text = json.dumps(release.deployment)
    deployment = json.loads(text)
    deployment["metadata"]["name"] = f"{app}-{colour}"
    labels = [
        deployment["metadata"]["labels"],
        deployment["spec"]["template"]["metadata"]["labels"],
    ]
    for found in [*labels, deployment["spec"]["selector"]["matchLabels"]]:
        found[LABEL_VERSION] = colour
    selector = {**release.selector, LABEL_VERSION: colour}
    return replace(release, colour=colour, selector=selector, deployment=deployment)


def proven(deployment: Object, ready: int, run: str) -> bool:
    """Whether a Deployment's status and its pods prove that all wanted pods of a run are ready."""
    meta, spec, status = deployment["metadata"], deployment["spec"], deployment.get("status") or {}
    wanted = spec.get("replicas", 1)
    counts = [
        status.get(k, 0)
        for k in ("updatedReplicas", "readyReplicas", "availableReplicas", "replicas")
    ]
    current = status.get("observedGeneration", 0) >= meta.get("generation", 1)
    label = spec.get("template", {}).get("metadata", {}).get("labels", {}).get(LABEL_RUN)
    return bool(
        current and wanted > 0 and set(counts) == {wanted} and label == run and ready >= wanted
    )


def ready_endpoints(slices: Iterable[Object]) -> set[str]:
    """Return the names of the pods behind the ready endpoints of EndpointSlices."""
    endpoints = [e for s in slices for e in s.get("endpoints") or []]
    ready = [e for e in endpoints if (e.get("conditions") or {}).get("ready") is not False]
    return {(e.get("targetRef") or {}).get("name", e["addresses"][0]) for e in ready}


def health_address(pod: Object, port: Mapping[str, Any], path: str) -> str | None:
    """Return the address of a pod's health path by its Service's target port, or None if unnamed."""
    target = port.get("targetPort", port.get("port"))
    if isinstance(target, str):
        named = [
            p
            for c in pod["spec"]["containers"]
            for p in c.get("ports") or []
            if p.get("name") == target
        ]
        target = named[0]["containerPort"] if named else None
    address = (pod.get("status") or {}).get("podIP", "")
    host = f"[{address}]" if ":" in address else address
    return f"http://{host}:{target}{path}" if target and address else None


# === controller ===================================================================================


class Pulses:
    """When each thread must have moved again, so that liveness can fail."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._due: dict[str, float] = {}

    def beat(self, name: str, allowed: float) -> None:
        """Note that a thread moves, and promise the next beat within so many seconds."""
        self._due[name] = self.clock.monotonic() + allowed

    def late(self) -> list[str]:
        """Return the threads that have not kept their promise."""
        now = self.clock.monotonic()
        return sorted(name for name, due in list(self._due.items()) if due < now)


REJECTING = frozenset(Reason) - {
    *(Reason.BOTH_SICK, Reason.CLUSTER_ERROR, Reason.GIT_ERROR, Reason.CLAIM_LOST, Reason.NOT_HEAD),
    *(Reason.SELECTOR_CHANGED, Reason.ADOPTION_REFUSED, Reason.BUG),
}


class Controller:
    """Observes, decides, acts: one thread decides, slow steps run in a worker an environment."""

    def __init__(self, config: Config, deployer: Deployer, spool: Spool, pulses: Pulses) -> None:
        self.config, self.deployer, self.spool, self.pulses = config, deployer, spool, pulses
        self.kubectl, self.metrics, self.clock = deployer.kubectl, deployer.metrics, deployer.clock
        self.ledger = Ledger(self.kubectl, self.clock)
        self.stop = deployer.stop
        self.wake, self.spooled = threading.Event(), threading.Event()
        ours = f"{LABEL_MANAGED}={MANAGER}"
        spaces = [config.namespaces["test"], config.namespaces["build"]]
        self.jobs = [Watch(self.kubectl, "jobs", n, view_job, ours) for n in spaces]
        self.pods = [Watch(self.kubectl, "pods", n, view_pod, ours) for n in spaces]
        self.services = {
            e: Watch(self.kubectl, "services", n, view_service, f"{ours},{LABEL_STAGE}=live")
            for e, n in config.environments().items()
        }
        self.heads: dict[str, tuple[float, dict[str, str]]] = {}
        self.asked = {a.name: threading.Event() for a in config.apps}
        self.busy: set[tuple[str, str]] = set()
        self.doom: dict[str, Doom] = {}
        self.acted: dict[str, tuple[Any, float]] = {}
        self.paused: dict[tuple[str, str], tuple[int, float]] = {}
        self.threads: list[threading.Thread] = []

    # Threads.

    def watches(self) -> list[Watch[Any]]:
        """Return every mirror."""
        return [*self.jobs, *self.pods, *self.services.values()]

    def start(self) -> None:
        """Start every thread; none of them needs the cluster to be there."""
        for watch in self.watches():
            name = f"watch-{watch.namespace}-{watch.resource}"
            beat = self.beater(name, WATCH_SECONDS + 120)
            self.spawn(name, lambda w=watch, b=beat: w.run(b, self.wake))  # type: ignore[misc]
        self.spawn("intake", self.intake)
        self.spawn("controller", self.control)
        for app in self.config.apps:
            self.spawn(f"heads-{app.name}", lambda a=app: self.follow_heads(a))  # type: ignore[misc]

    def beater(self, name: str, allowed: float) -> Callable[[], None]:
        """Return the beat of one thread."""
        return lambda: self.pulses.beat(name, allowed)

    def spawn(self, name: str, body: Callable[[], None]) -> None:
        """Run a thread that starts its body again after a bug, which is logged and counted."""

        def run() -> None:
            while not self.stop.is_set():
                try:
                    return body()
                except Exception:  # noqa: BLE001 - a thread ends here; it is logged, counted, restarted
                    error("a thread failed", exc=True, thread=name)
                    self.metrics.errors.labels(name.partition("-")[0]).inc()
                    self.stop.wait(1.0)
            return None

        thread = threading.Thread(target=run, name=name, daemon=True)
        self.threads = [t for t in self.threads if t.is_alive()] + [thread]
        thread.start()

    def shut_down(self, seconds: float) -> None:
        """End every thread, a last intake included; what is cut off is taken up by the next process."""
        until = self.clock.monotonic() + seconds
        self.stop.set()
        for watch in self.watches():
            watch.stop()
        for event in (self.wake, self.spooled, *self.asked.values()):
            event.set()
        for thread in self.threads:
            thread.join(max(0.0, until - self.clock.monotonic()))
        with suppress(KubectlError, ConfigError):
            self.take_in(self.spool.read())

    # Intake: from the spool into the cluster.

    def intake(self) -> None:
        """Turn everything spooled into suspended Jobs, in as few calls as possible; nothing is lost."""
        failures = 0
        while not self.stop.is_set():
            self.pulses.beat("intake", 300)
            self.spooled.clear()
            stored = self.spool.read()
            self.metrics.spool.set(len(stored))
            left = 0
            if stored:
                try:
                    left, failures = self.take_in(stored), 0
                except (KubectlError, ConfigError) as lost:
                    warn("intake waits for the cluster", stored=len(stored), detail=str(lost))
                    self.stop.wait(backoff(failures))
                    failures, left = failures + 1, 1
            self.spooled.wait(0.5 if left else 30.0)

    def take_in(self, stored: Sequence[tuple[Path, Run]]) -> int:
        """Bring stored pushes into the cluster; return how many must stay. Raises KubectlError."""
        left = 0
        known = {a.name: a for a in self.config.apps}
        for name in {run.app for _, run in stored}:
            mine = [(p, r) for p, r in stored if r.app == name]
            for start in range(0, len(mine), BATCH):
                batch = mine[start : start + BATCH]
                done = (
                    self.admit(known[name], {r.id: r for _, r in batch}) if name in known else set()
                )
                if name not in known:
                    warn("push of an app that is not configured any more", app=name)
                    done = {r.id for _, r in batch}
                for path, run in batch:
                    if run.id in done:
                        self.spool.done(path)
                left += sum(run.id not in done for _, run in batch)
        return left

    def admit(self, app: App, runs: dict[str, Run]) -> set[str]:
        """Create the Jobs of pushes that ask for a run; return the ids that are dealt with."""
        _, rejected = self.ledger.read(app.name)
        live = self.live_commit(app)
        done = set()
        for run in runs.values():
            why = (
                "AlreadyLive"
                if run.commit == live
                else Reason.REJECTED
                if run.commit in rejected
                else ""
            )
            if why and run.ref == app.deploy_ref:
                info("push needs nothing", reason=why, **run_words(run))
                done.add(run.id)
        wanted = {k: r for k, r in runs.items() if k not in done}
        if not wanted:
            return done
        jobs = [test_job(self.config, app, r) for r in wanted.values()]
        refused = self.kubectl.create_each(jobs, self.config.namespaces["test"])
        entries: dict[str, Object | None] = {}
        for run in sorted(wanted.values(), key=lambda r: r.received):
            line = refused.get(f"test-{run.id}", "")
            if line and not self.settle_refusal(app, run, line):
                continue
            info("run queued" if not line else "run known", **run_words(run))
            entries |= self.ledger.seen(run, None)
            done.add(run.id)
        self.ledger.write(app.name, entries)
        return done

    def live_commit(self, app: App) -> str:
        """Return the commit that is live in the last environment, "" when none is."""
        for name in app.deploy.environments[-1:]:
            found = self.kubectl.get("service", app.name, self.config.namespaces[name])
            return str(view_service(found).live.get("commit", "")) if found else ""
        return ""

    def settle_refusal(self, app: App, run: Run, line: str) -> bool:
        """Deal with a Job that was not created; return whether the push is dealt with."""
        if "(AlreadyExists)" in line:
            return reopen(self.kubectl, self.config, run)
        if "is invalid" in line or "BadRequest" in line:
            error("job refused", reason=Reason.JOB_REFUSED, detail=clip(line), **run_words(run))
            self.metrics.runs.labels(app.name, Outcome.FAILED, "test", Reason.JOB_REFUSED).inc()
            return True
        warn("job not created, will be tried again", detail=clip(line), **run_words(run))
        return False

    # Catch-up: what GitLab failed to announce.

    def follow_heads(self, app: App) -> None:
        """Read an app's heads now and then, and when asked; compare them with what was last seen."""
        due, failures = 0.0, 0
        while not self.stop.is_set():
            self.pulses.beat(f"heads-{app.name}", self.config.catch_up + 4 * GIT_TIMEOUT)
            self.asked[app.name].clear()
            try:
                heads = self.deployer.git.heads(app.repository)
                self.heads[app.name] = self.clock.monotonic(), heads
                self.wake.set()
                if self.clock.monotonic() >= due:
                    self.catch_up(app, heads)
                    due = self.clock.monotonic() + self.config.catch_up * random.uniform(0.9, 1.1)  # noqa: S311 - jitter
                failures = 0
            except (GitError, KubectlError, ConfigError, SpoolError) as lost:
                if failures == 0:
                    warn("catch-up waits", app=app.name, detail=str(lost))
                failures += 1
            self.metrics.waiting.labels(f"catch-up of {app.name}").set(bool(failures))
            if self.stop.wait(backoff(failures - 1) if failures else 0.5):
                return
            self.asked[app.name].wait(
                max(0.0, due - self.clock.monotonic()) if not failures else 0.0
            )

    def catch_up(self, app: App, heads: Mapping[str, str]) -> None:
        """Make runs of heads that moved unannounced; the first sight of a test-only ref is a baseline."""
        refs, rejected = self.ledger.read(app.name)
        live = self.live_commit(app)
        entries: dict[str, Object | None] = {}
        for ref, commit in heads.items():
            found = runs_of_push(
                self.config, Push(urls=(app.repository,), ref=ref, commit=commit), self.clock.now()
            )
            run = (
                next((r for r in found if r.app == app.name), None)
                if isinstance(found, list)
                else None
            )
            seen = refs.get(ref)
            if run is None or (seen and seen.get("commit") == commit):
                continue
            if (not seen and ref != app.deploy_ref) or commit == live or commit in rejected:
                entries |= self.ledger.seen(run, "baseline")
                continue
            run = replace(run, before=str((seen or {}).get("commit", "")), delivery="catch-up")
            if run.id not in {r.id for _, r in self.spool.read()} | set(self.grouped()):
                info("head moved unannounced", **run_words(run))
                self.metrics.catch_up.labels(app.name).inc()
                self.spool.store([run])
                self.spooled.set()
        entries |= {
            k: None
            for r in refs.keys() - heads.keys()
            for k in self.ledger.seen(Run(id="", app="", ref=r, commit=""), None)
        }
        self.ledger.write(app.name, entries)

    # The loop.

    def control(self) -> None:
        """Decide for every run whenever something changed, and at least every few seconds."""
        while not self.stop.is_set():
            self.pulses.beat("controller", 300)
            self.wake.clear()
            trouble = [w.trouble for w in self.watches() if w.trouble]
            self.metrics.waiting.labels("cluster").set(bool(trouble))
            if all(w.synced.is_set() for w in self.watches()):
                try:
                    self.tick()
                except KubectlError as lost:
                    warn("a step will be tried again", detail=str(lost))
                    self.stop.wait(1.0)
            self.wake.wait(2.0)
            self.stop.wait(0.05)  # a burst of events is one look

    def grouped(self) -> dict[str, dict[str, Job]]:
        """Return the Jobs by run and stage."""
        runs: dict[str, dict[str, Job]] = {}
        for found in (j for w in self.jobs for j in w.items()):
            runs.setdefault(found.run.id, {})[found.stage] = found
        return runs

    def tick(self) -> None:
        """Take the next step of every run that has one; newest first."""
        runs = self.grouped()
        for watch in self.jobs:
            for lost in watch.take_gone():
                self.vanished(lost, runs)
        unfinished = [
            j
            for g in runs.values()
            for j in g.values()
            if j.state in ("suspended", "active") and not j.outcome
        ]
        states = [j.state for j in unfinished]
        for state in ("suspended", "active"):
            self.metrics.queue.labels(state).set(states.count(state))
        places = self.config.limits.max_running - states.count("active")
        active = {k: g for k, g in runs.items() if not any(j.outcome for j in g.values())}
        pods = [p for w in self.pods for p in w.items()]
        apps = {a.name: a for a in self.config.apps}
        release: list[Job] = []
        for jobs in sorted(active.values(), key=lambda g: -newest(g).received):
            run = newest(jobs)
            if run.app not in apps:
                continue
            view = self.view(
                apps[run.app],
                run,
                jobs,
                [p for p in pods if p.run == run.id],
                list(active.values()),
                places,
            )
            action = decide(view)
            if action.do in (Do.RELEASE, Do.BUILD, Do.REMAKE):
                places -= 1
            self.act(view, action, release)
        for namespace in {j.namespace for j in release}:
            names = [j.name for j in release if j.namespace == namespace]
            change = json.dumps({"spec": {"suspend": False}})
            self.kubectl.run(
                "patch", "job", *names, "--type=merge", "-p", change, namespace=namespace
            )
        self.look_after(set(active), {newest(g).app for g in active.values()})

    def view(
        self,
        app: App,
        run: Run,
        jobs: dict[str, Job],
        pods: list[Pod],
        active: list[dict[str, Job]],
        places: int,
    ) -> View:  # noqa: PLR0913, PLR0917 - gathers one value
        """Gather what decides over one run."""
        read = self.heads.get(app.name)
        age = self.clock.monotonic() - read[0] if read else 0.0
        now = self.clock.now()
        if read and now - age < run.received:
            read = None
        newer = any(
            r.app == run.app and r.ref == run.ref and r.received > run.received
            for r in map(newest, active)
        )
        doom = self.doom.setdefault(run.id, Doom())
        services = {e: s for e, w in self.services.items() for s in w.items() if s.name == app.name}
        return View(
            app=app, run=run, jobs=jobs, pods=tuple(pods), services=services,
            head=head_word(run, read[1] if read else None, age, now), newer=newer, places=places,
            doomed=doom.verdict((s for p in pods for s in pod_symptoms(p)), now),
            busy=frozenset(e for a, e in self.busy if a == app.name), now=now,
            queue_timeout=self.config.limits.queue_timeout,
        )  # fmt: skip

    def act(self, view: View, action: Action, release: list[Job]) -> None:
        """Carry out one action; the same one is not repeated until the cluster shows its effect."""
        run = view.run
        if action.do is Do.WAIT and action.reason is Reason.GIT_ERROR:
            self.asked[run.app].set()
        if action.do in (Do.NOTHING, Do.WAIT):
            return
        mark = (action.do, action.stage, tuple(j.version for j in view.jobs.values()))
        before, at = self.acted.get(run.id, (None, 0.0))
        if before == mark and self.clock.monotonic() - at < 10:
            return
        self.acted[run.id] = mark, self.clock.monotonic()
        if action.do is Do.RELEASE:
            release.append(view.jobs[action.stage])
        elif action.do is Do.BUILD:
            build = build_job(self.config, view.app, run)
            build["spec"]["suspend"] = False
            self.kubectl.create([build], build["metadata"]["namespace"])
        elif action.do is Do.REMAKE:
            self.remake(view, run)
        elif action.do is Do.NOTE:
            self.note(
                view.jobs[action.stage],
                {NOTE_SUMMARY if action.stage == "test" else NOTE_DIGEST: action.detail},
            )
        elif action.do is Do.DEPLOY:
            self.start_deploy(view, action.stage)
        else:
            self.finish(view.jobs, action)

    def remake(self, view: View, run: Run) -> None:
        """Make a build once more whose digest was lost with its pod."""
        namespace = self.config.namespaces["build"]
        self.kubectl.run(
            "delete", "job", f"build-{run.id}", "--ignore-not-found", namespace=namespace
        )
        build = build_job(self.config, view.app, run)
        build["spec"]["suspend"] = False
        build["metadata"]["annotations"][NOTE_REMADE] = "1"
        self.kubectl.create([build], namespace)

    def note(self, found: Job, notes: Mapping[str, str | None], **spec: Any) -> None:
        """Write annotations on a Job."""
        change: Object = {"metadata": {"annotations": dict(notes)}}
        self.kubectl.patch(
            "job", found.name, found.namespace, {**change, **({"spec": spec} if spec else {})}
        )

    def finish(self, jobs: Mapping[str, Job], action: Action) -> None:
        """Write down how a run ended: the ledger first, then its Jobs; then say it."""
        last = jobs.get("build") or jobs["test"]
        run, outcome = last.run, action.outcome or Outcome.FAILED
        entries = self.ledger.seen(run, outcome, action.reason, action.stage)
        if outcome in (Outcome.FAILED, Outcome.SWITCHED_BACK, Outcome.ROLLED_BACK):
            if action.stage not in ("test", "build") and action.reason in REJECTING:
                entries |= self.ledger.rejection(run.app, run.commit, action.reason)
        self.ledger.write(run.app, entries)
        detail = action.detail
        if outcome is Outcome.FAILED and action.stage in jobs:
            detail = self.with_logs(jobs[action.stage], detail)
        notes = {
            NOTE_OUTCOME: outcome, NOTE_REASON: action.reason, NOTE_DETAIL: detail[:DETAIL_LENGTH],
            NOTE_ENDED: f"{self.clock.now():.3f}",
        }  # fmt: skip
        for found in jobs.values():
            stop = {"activeDeadlineSeconds": 1} if found.state == "active" else {}
            with suppress_kind("NotFound"):
                self.note(
                    found, notes if found is last else {}, ttlSecondsAfterFinished=JOB_TTL, **stop
                )
        self.metrics.runs.labels(run.app, outcome, action.stage, action.reason).inc()
        took = self.clock.now() - run.received
        say = error if outcome in (Outcome.FAILED, Outcome.SWITCHED_BACK) else info
        say(
            "run ended",
            outcome=outcome,
            stage=action.stage,
            reason=action.reason,
            seconds=round(took, 1),
            detail=detail or None,
            **run_words(run),
        )
        self.doom.pop(run.id, None)

    def with_logs(self, found: Job, detail: str) -> str:
        """Return a detail with the last log lines of a failed Job's newest pod, secrets masked."""
        pods = [p for w in self.pods for p in w.items() if p.job == found.name]
        return self.deployer.with_logs(
            detail, sorted(pods, key=lambda p: -p.created)[:1], found.namespace
        )

    def vanished(self, lost: Job, runs: Mapping[str, Mapping[str, Job]]) -> None:
        """End a run whose Job disappeared before its end: missing is failed."""
        left = runs.get(lost.run.id, {})
        remade = self.acted.get(lost.run.id, ((None,), 0.0))[0][0] is Do.REMAKE
        if lost.outcome or lost.deleting and lost.state == "failed" or lost.stage in left or remade:
            return
        if any(j.outcome for j in left.values()):
            return
        action = ends(Outcome.FAILED, Reason.VANISHED, f"Job {lost.name} was deleted", lost.stage)
        self.finish(left or {lost.stage: lost}, action)

    # Workers.

    def start_deploy(self, view: View, environment: str) -> None:
        """Start a worker that brings a run into an environment."""
        build = view.jobs.get("build")
        digest = build.notes.get(NOTE_DIGEST, "") if build else ""
        task = Task(
            app=view.app, run=view.run, environment=environment,
            namespace=self.config.namespaces[environment], image=f"{view.app.build.image}@{digest}",
        )  # fmt: skip
        self.start_worker(view.app, environment, lambda: self.deploy(task, view.jobs))

    def start_worker(self, app: App, environment: str, body: Callable[[], None]) -> None:
        """Run one slow step for an environment; no two at once, and a failed one not at once again."""
        key = app.name, environment
        failures, until = self.paused.get(key, (0, 0.0))
        if key in self.busy or self.clock.monotonic() < until:
            return
        self.busy.add(key)

        def run() -> None:
            try:
                body()
                self.paused.pop(key, None)
            except InterruptedError:
                return
            except (KubectlError, GitError, ConfigError) as lost:
                warn(
                    "a worker will try again",
                    app=app.name,
                    environment=environment,
                    detail=str(lost),
                )
                self.paused[key] = failures + 1, self.clock.monotonic() + backoff(failures)
            finally:
                self.busy.discard(key)
                self.acted.clear()
                self.wake.set()

        self.spawn(f"worker-{app.name}-{environment}", run)

    def deploy(self, task: Task, jobs: Mapping[str, Job]) -> None:
        """Deploy and write down the outcome if the run ended here."""
        started = self.clock.monotonic()
        result = "failed"
        try:
            self.deployer.deploy(task)
            result = "ok"
        except SupersededError as stopped:
            result = "superseded"
            if stopped.reason is Reason.CLAIM_LOST and self.other_holder(task):
                return
            back = stopped.reason is Reason.ROLLED_BACK
            outcome = Outcome.ROLLED_BACK if back else Outcome.SUPERSEDED
            self.finish(jobs, ends(outcome, stopped.reason, stopped.detail, task.environment))
        except StageError as failed:
            back = failed.reason is Reason.SICK_AFTER_SWITCH
            outcome = Outcome.SWITCHED_BACK if back else Outcome.FAILED
            self.finish(jobs, ends(outcome, failed.reason, failed.detail, task.environment))
            if self.deployer.service(task) is None:
                self.deployer.collect_garbage(task.app, task.namespace)
        except KubectlError as refused:
            if refused.kind in ("Unreachable", "Conflict", "Unknown"):
                raise
            detail = self.deployer.secrets.mask(clip(refused.stderr))
            self.finish(jobs, ends(Outcome.FAILED, Reason.CLUSTER_ERROR, detail, task.environment))
        seconds = self.clock.monotonic() - started
        self.metrics.stage_seconds.labels(task.app.name, task.environment, result).observe(seconds)

    def other_holder(self, task: Task) -> bool:
        """Whether another daemon holds the claim for the very same run, and so reports it."""
        service = self.deployer.service(task)
        return bool(
            service
            and service.claim.get("run") == task.run.id
            and service.claim.get("holder") != self.deployer.holder
        )

    def look_after(self, active: set[str], apps_active: set[str]) -> None:
        """Start what claims of ended runs leave to do: heal, scale down, drain."""
        now = self.clock.now()
        for environment, watch in self.services.items():
            for service in watch.items():
                app = next((a for a in self.config.apps if a.name == service.name), None)
                claim = service.claim
                if not app or not claim or claim.get("run") in active:
                    if not (app and claim.get("phase") == Phase.DRAINING):
                        continue
                since = seconds_of(claim.get("since"))
                wait = {Phase.DRAINING: app.deploy.drain, "rollback": CLAIM_SECONDS}.get(
                    str(claim.get("phase")), 0.0
                )
                healing = claim.get("phase") in (Phase.PREPARING, Phase.HEALING)
                if now - since < wait or (healing and app.name in apps_active):
                    continue
                namespace = self.config.namespaces[environment]
                self.start_worker(
                    app,
                    environment,
                    lambda a=app, n=namespace, s=service: self.deployer.tidy(a, n, s),
                )  # type: ignore[misc]


def newest(jobs: Mapping[str, Job]) -> Run:
    """Return the run of a group of Jobs, as its test Job has it if that is still there."""
    return (jobs.get("test") or next(iter(jobs.values()))).run


def run_words(run: Run) -> dict[str, str]:
    """Return the log fields of a run."""
    return {
        "run": run.id,
        "app": run.app,
        "delivery": run.delivery,
        "ref": run.ref,
        "commit": run.commit,
    }


@contextmanager
def suppress_kind(kind: str) -> Iterator[None]:
    """Let one kind of KubectlError pass."""
    try:
        yield
    except KubectlError as failed:
        if failed.kind != kind:
            raise


def reopen(kubectl: Kubectl, config: Config, run: Run) -> bool:
    """Let a run that has ended go on where it failed; return whether its push is dealt with.

    A run under way is left alone. Green Jobs and the digest are reused; a failed Job is deleted, so
    that the next intake makes it anew, and until it is gone the answer is False.
    """
    jobs = []
    for stage in ("test", "build"):
        found = kubectl.get("job", f"{stage}-{run.id}", config.namespaces[stage])
        jobs += [view_job(found)] if found else []
    for known in jobs:
        if (known.run.ref, known.run.commit) != (run.ref, run.commit):
            error(
                "two pushes have the same run id",
                detail=f"{known.run.ref} {known.run.commit}",
                **run_words(run),
            )
            return True
    if any(j.deleting for j in jobs):
        return False
    ended = max((seconds_of(j.notes.get(NOTE_ENDED)) for j in jobs), default=0.0)
    if not any(j.outcome for j in jobs) or ended > run.received:
        return bool(jobs)
    failed = [j for j in jobs if j.state != "succeeded"]
    if any(j.stage == "test" for j in failed):
        failed = jobs
    for known in failed:
        kubectl.delete("job", [known.name], known.namespace)
    for known in jobs:
        if known not in failed:
            cleared: Object = dict.fromkeys((NOTE_OUTCOME, NOTE_REASON, NOTE_DETAIL, NOTE_ENDED))
            notes = {**cleared, NOTE_RECEIVED: f"{run.received:.3f}", NOTE_DELIVERY: run.delivery}
            change = {"metadata": {"annotations": notes}, "spec": {"ttlSecondsAfterFinished": None}}
            kubectl.patch("job", known.name, known.namespace, change)
    return not any(j.stage == "test" for j in failed)


# === HTTP =========================================================================================

Answer = tuple[http.HTTPStatus, Object]


class WebhookApp:
    """The WSGI application behind the Ingress: /webhook, and the probes."""

    def __init__(
        self, config: Config, secrets: Secrets, spool: Spool, controller: Controller
    ) -> None:
        self.config, self.secrets, self.spool, self.controller = config, secrets, spool, controller
        self.metrics, self.clock = controller.metrics, controller.clock
        self.deliveries = Deliveries()
        self.stopping = threading.Event()
        self.routes: dict[str, dict[str, Callable[[WSGIEnvironment], Answer]]] = {
            "/webhook": {"POST": self.webhook},
            "/healthz": {"GET": self.healthz},
            "/readyz": {"GET": self.readyz},
        }

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Answer one request; whatever it holds, there is an answer and the process lives."""
        path = environ.get("PATH_INFO", "")
        route = self.routes.get(path)
        headers = []
        try:
            if route is None:
                raise DeliveryError(http.HTTPStatus.NOT_FOUND, "NotFound", "no such path")
            handler = route.get(environ["REQUEST_METHOD"])
            if handler is None:
                headers.append(("Allow", ", ".join(route)))
                raise DeliveryError(
                    http.HTTPStatus.METHOD_NOT_ALLOWED, "MethodNotAllowed", "see Allow"
                )
            status, body = handler(environ)
        except DeliveryError as refused:
            status, body = (
                refused.status,
                {"status": "refused", "reason": refused.code, "text": str(refused)},
            )
        except Exception:  # noqa: BLE001 - a request ends here; it is logged and counted
            error("request failed", exc=True, path=clip(path, 80))
            self.metrics.errors.labels("request").inc()
            status, body = http.HTTPStatus.INTERNAL_SERVER_ERROR, {"status": "error"}
        if path == "/webhook":
            self.report(environ, status, body)
        content = json.dumps(body).encode() + b"\n"
        headers += [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
        start_response(f"{status.value} {status.phrase}", headers)
        return [content]

    def report(self, environ: WSGIEnvironment, status: http.HTTPStatus, body: Object) -> None:
        """Log and count what became of a delivery."""
        result = body.get("reason") or body["status"]
        self.metrics.deliveries.labels(result).inc()
        delivery = clip(
            environ.get("HTTP_WEBHOOK_ID") or environ.get("HTTP_IDEMPOTENCY_KEY", ""), 60
        )
        say = info if status < http.HTTPStatus.BAD_REQUEST else warn
        say(
            "delivery",
            delivery=delivery,
            status=status.value,
            result=result,
            runs=body.get("runs"),
            text=body.get("text"),
        )

    def webhook(self, environ: WSGIEnvironment) -> Answer:
        """Authenticate, understand and store a delivery; in this order, for security."""
        body = self.body(environ)
        headers = {
            k[5:].replace("_", "-").lower(): v for k, v in environ.items() if k.startswith("HTTP_")
        }
        mode = self.config.webhook.verify
        try:
            keys = self.secrets.keys(mode)
        except ConfigError as broken:
            error("secrets cannot be used", detail=str(broken))
            raise DeliveryError(
                http.HTTPStatus.SERVICE_UNAVAILABLE, "NoSecrets", "not configured"
            ) from broken
        verify_delivery(mode, keys, headers, body, self.clock.now())
        kind = environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise DeliveryError(
                http.HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "NotJson", "send application/json"
            )
        delivery = clip(headers.get("webhook-id") or headers.get("idempotency-key", ""), 100)
        push = parse_delivery(body, delivery)
        found = (
            push if isinstance(push, Ignored) else runs_of_push(self.config, push, self.clock.now())
        )
        if isinstance(found, Ignored):
            return http.HTTPStatus.OK, {"status": "ignored", "reason": found.reason}
        return self.store(found, delivery)

    def store(self, runs: list[Run], delivery: str) -> Answer:
        """Spool the runs of a delivery unless it is known."""
        ids = [r.id for r in runs]
        if delivery and self.deliveries.known(delivery, self.clock.now()):
            return http.HTTPStatus.OK, {"status": "duplicate", "runs": ids}
        try:
            self.spool.store(runs)
        except SpoolError as full:
            raise DeliveryError(
                http.HTTPStatus.SERVICE_UNAVAILABLE, "SpoolFull", str(full)
            ) from full
        self.deliveries.remember(delivery, self.clock.now())
        self.controller.spooled.set()
        return http.HTTPStatus.ACCEPTED, {"status": "accepted", "runs": ids}

    def body(self, environ: WSGIEnvironment) -> bytes:
        """Read a body up to the limit, whatever its declared length; 413 beyond."""
        limit, declared = self.config.webhook.max_body, environ.get("CONTENT_LENGTH") or "0"
        if not re.fullmatch(r"[0-9]{1,18}", declared):
            bad("Content-Length is not a number")
        content: bytes = environ["wsgi.input"].read(
            min(int(declared), limit) + 1 if int(declared) else limit + 1
        )
        if int(declared) > limit or len(content) > limit:
            raise DeliveryError(
                http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "TooLarge", f"more than {limit} bytes"
            )
        return content

    def healthz(self, _: WSGIEnvironment) -> Answer:
        """Whether every thread moves."""
        late = self.controller.pulses.late()
        status = http.HTTPStatus.SERVICE_UNAVAILABLE if late else http.HTTPStatus.OK
        return status, {"status": "stuck" if late else "ok", "late": late}

    def readyz(self, _: WSGIEnvironment) -> Answer:
        """Whether deliveries can be authenticated and stored; never the cluster's or git's health."""
        why = "stopping" if self.stopping.is_set() else ""
        try:
            self.secrets.keys(self.config.webhook.verify)
            self.spool.probe()
        except ConfigError as broken:
            why = why or str(broken)
        except OSError as refused:
            why = why or f"spool: {refused.strerror}"
        status = http.HTTPStatus.SERVICE_UNAVAILABLE if why else http.HTTPStatus.OK
        return status, {"status": why or "ok"}


def admin_app(metrics: Metrics) -> WSGIApplication:
    """Return the application of the second port: /metrics."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        found = environ.get("PATH_INFO") == "/metrics" and environ["REQUEST_METHOD"] == "GET"
        status = "200 OK" if found else "404 Not Found"
        start_response(status, [("Content-Type", prometheus_client.CONTENT_TYPE_LATEST)])
        return [metrics.render() if found else b"not found\n"]

    return app


def make_server(app: WSGIApplication, listen: str, max_body: int) -> Any:
    """Return a waitress server: bounded threads, time and sizes; slow clients hold no thread."""
    return waitress.server.create_server(
        app,
        listen=listen,
        threads=8,
        ident="",
        max_request_body_size=max_body + 1,
        max_request_header_size=65536,
        connection_limit=1000,
        channel_timeout=20,
        cleanup_interval=5,
        asyncore_use_poll=True,
        clear_untrusted_proxy_headers=True,
    )


# === commands =====================================================================================

LINGER = 2.0  # seconds in which a stopping daemon still answers, while its endpoint is taken away
SHUTDOWN_SECONDS = 40.0  # for the threads and the last intake; the grace period allows for it


@dataclass(frozen=True, slots=True)
class Tools:
    """What every command works with."""

    process: Process
    config: Config
    secrets: Secrets
    metrics: Metrics
    deployer: Deployer

    @classmethod
    def load(cls, environ: Mapping[str, str]) -> Tools:
        """Read configuration and secrets' place; raises ConfigError with every fault.

        Without a configuration file, the daemon's ConfigMap is read from the cluster.
        """
        process = Process.from_environ(environ)
        metrics, secrets = Metrics(), Secrets(process.secrets)
        kubectl = Kubectl(metrics)
        try:
            document = process.config.read_text()
        except OSError:
            try:
                found = kubectl.get("configmap", MANAGER, ORCHESTRATION) or {"data": {}}
            except KubectlError as lost:
                raise ConfigError(
                    [f"no {process.config}, and no cluster to read it from: {lost}"]
                ) from lost
            document = found["data"].get("config.yaml", "")
        config = load_config(document)
        kubectl = Kubectl(metrics, config.limits.kubectl)
        git = Git(secrets.directory / GIT_CREDENTIALS)
        return cls(
            process, config, secrets, metrics, Deployer(kubectl, git, secrets, metrics, Clock())
        )


def serve(tools: Tools, *, check: bool) -> int:
    """Run the daemon until SIGTERM, or with check only say that it could; 0 in both cases."""
    process, config = tools.process, tools.config
    setup_logging(tools.secrets.mask)
    tools.secrets.keys(config.webhook.verify)
    if check:
        print(f"configuration is valid: {len(config.apps)} apps")  # noqa: T201 - a command's answer
        return 0
    spool = Spool(process.spool, config.limits.spool_files)
    try:
        spool.prepare()
    except SpoolError as refused:
        raise ConfigError([str(refused)]) from refused
    pulses = Pulses(tools.deployer.clock)
    controller = Controller(config, tools.deployer, spool, pulses)
    app = WebhookApp(config, tools.secrets, spool, controller)
    server = make_server(app, process.listen, config.webhook.max_body)
    admin = make_server(admin_app(tools.metrics), process.admin_listen, 0)
    stop_on_signals(app.stopping)
    threading.Thread(target=admin.run, name="admin", daemon=True).start()
    controller.start()
    port, admin_port = server.effective_port, admin.effective_port
    info(
        "serving",
        version=__version__,
        port=port,
        admin_port=admin_port,
        apps=[a.name for a in config.apps],
    )
    server.run()
    app.stopping.set()
    controller.shut_down(SHUTDOWN_SECONDS)
    info("stopped", spooled=len(spool))
    return 0


def stop_on_signals(stopping: threading.Event) -> None:
    """On SIGTERM or SIGINT: unready at once, and the server ends a moment later.

    As process 1 the default would be to ignore SIGTERM. A second signal changes nothing.
    """

    def unready(_signal: int, _frame: Any) -> None:
        if not stopping.is_set():
            stopping.set()
            signal.setitimer(signal.ITIMER_REAL, LINGER)

    def leave(_signal: int, _frame: Any) -> NoReturn:
        raise SystemExit(0)

    signal.signal(signal.SIGALRM, leave)
    for number_ in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number_, unready)


def push(tools: Tools, args: argparse.Namespace) -> int:
    """Send a signed test delivery, as GitLab would; 0 if it was accepted, a duplicate or ignored."""
    app = tools.config.app(args.app)
    ref = args.ref if args.ref.startswith("refs/") else f"refs/heads/{args.ref}"
    project = {"git_http_url": app.repository, "web_url": app.repository}
    payload = {
        "object_kind": "push",
        "ref": ref,
        "before": "0" * 40,
        "after": args.sha,
        "project": project,
    }
    body, message_id = json.dumps(payload).encode(), str(uuid.uuid4())
    key = tools.secrets.lines(SECRET_OF_MODE[tools.config.webhook.verify])[:1] or [b""]
    headers = {"Content-Type": "application/json", "X-Gitlab-Event": "Push Hook"}
    headers |= {"webhook-id": message_id, "Idempotency-Key": message_id}
    tools.secrets.keys(tools.config.webhook.verify)
    if tools.config.webhook.verify == "signature":
        stamp = int(tools.deployer.clock.now())
        headers |= {
            "webhook-timestamp": str(stamp),
            "webhook-signature": sign(key[0], message_id, stamp, body),
        }
    else:
        token = key[0] if tools.config.webhook.verify == "token" else hex_hmac(key[0], body)
        headers["X-Gitlab-Token"] = token.decode("latin-1")
    try:
        answer = requests.post(
            args.url, data=body, headers=headers, timeout=10, allow_redirects=False
        )
    except requests.RequestException as failed:
        print(f"no answer from {args.url}: {type(failed).__name__}", file=sys.stderr)  # noqa: T201 - a command's answer
        return 1
    print(f"{answer.status_code} {clip(answer.text)}")  # noqa: T201 - a command's answer
    return 0 if answer.status_code in (200, 202) else 1


def status(tools: Tools, args: argparse.Namespace) -> int:
    """Print what is live where, what it could go back to, and the runs the cluster knows."""
    apps = [tools.config.app(args.app)] if args.app else list(tools.config.apps)
    kubectl, spaces = tools.deployer.kubectl, tools.config.namespaces
    runs = []
    for space in (spaces["test"], spaces["build"]):
        runs += [
            view_job(j) for j in kubectl.list("jobs", space, "-l", f"{LABEL_MANAGED}={MANAGER}")
        ]
    report = {
        "apps": [
            app_status(tools.deployer, a, {e: spaces[e] for e in a.deploy.environments})
            for a in apps
        ],
        "runs": run_status(runs, {a.name for a in apps}),
    }
    if args.output == "json":
        print(json.dumps(report, indent=2))  # noqa: T201 - a command's answer
        return 0
    for app in report["apps"]:
        for name, e in app["environments"].items():
            ready = "rollback ready" if e["rollback_ready"] else "no rollback ready"
            doing = f", {e['deploying']['phase']} {e['deploying']['run']}" if e["deploying"] else ""
            print(f"{app['name']} {name}: {e['run'] or 'nothing'} {e['colour']} ({ready}{doing})")  # noqa: T201 - a command's answer
    for r in report["runs"]:
        print(
            f"{r['run']}: {r['stage']} {r['outcome'] or r['state']} {r['reason']} {clip(r['detail'], 120)}".rstrip()
        )  # noqa: T201 - a command's answer
    return 0


def app_status(deployer: Deployer, app: App, spaces: Mapping[str, str]) -> Object:
    """Return what is live of an app in each of its environments."""
    environments = {}
    for name, namespace in spaces.items():
        found = deployer.kubectl.get("service", app.name, namespace)
        service = view_service(found) if found else None
        live, target = (service.live, service.target()) if service else ({}, {})
        ready = deployer.ready_pods(namespace, target["selector"]) > 0 if target else False
        environments[name] = {
            "colour": live.get("colour", ""),
            "run": live.get("run", ""),
            "commit": live.get("commit", ""),
            "image": live.get("image", ""),
            "previous": {k: target.get(k, "") for k in ("run", "commit", "colour")}
            if target
            else {},
            "rollback_ready": ready,
            "deploying": (service.claim if service else None) or None,
            "bake_until": service.note(NOTE_BAKE, 0.0) if service else 0.0,
        }
    return {"name": app.name, "environments": environments}


def run_status(jobs: Iterable[Job], apps: set[str]) -> list[Object]:
    """Return the runs that Jobs tell of, newest first."""
    last: dict[str, Job] = {}
    for found in jobs:
        if found.run.app in apps and (found.stage == "build" or found.run.id not in last):
            last[found.run.id] = found
    return [
        {
            "run": j.run.id, "app": j.run.app, "ref": j.run.ref, "commit": j.run.commit, "stage": j.stage,
            "state": "ended" if j.outcome else j.state, "outcome": j.outcome,
            "reason": j.notes.get(NOTE_REASON, ""), "detail": j.notes.get(NOTE_DETAIL, ""),
        }
        for j in sorted(last.values(), key=lambda j: -j.run.received)
    ]  # fmt: skip


def rollback(tools: Tools, args: argparse.Namespace) -> int:
    """Switch an environment back to a proven version, and reject the commit that is left."""
    app = tools.config.app(args.app)
    environment = args.environment or (app.deploy.environments or ("",))[-1]
    if environment not in app.deploy.environments:
        raise RefusedError(f"{app.name} is not deployed to {environment!r}")
    namespace = tools.config.namespaces[environment]
    done = tools.deployer.rollback(app, environment, namespace, args.to, args.reason)
    left, target = done["left"], done["target"]
    if left.get("commit"):
        ledger = Ledger(tools.deployer.kubectl, tools.deployer.clock)
        ledger.write(
            app.name,
            ledger.rejection(app.name, left["commit"], clip(args.reason) or Reason.ROLLED_BACK),
        )
    what = f"{target.get('run') or 'what was there before'} ({target.get('colour') or 'adopted'})"
    print(
        f"{app.name} {environment}: back on {what}; {left.get('run') or 'what was live'} is rejected"
    )  # noqa: T201 - a command's answer
    return 0


def rerun(tools: Tools, args: argparse.Namespace) -> int:
    """Let a run go again that has ended, rejected or not; refused if it is not its branch's head."""
    kubectl, clock = tools.deployer.kubectl, tools.deployer.clock
    for app in tools.config.apps:
        ledger = Ledger(kubectl, clock)
        refs, rejected = ledger.read(app.name)
        entry = next((e for e in refs.values() if e.get("run") == args.run), None)
        if entry is None:
            continue
        if tools.deployer.git.heads(app.repository).get(entry["ref"]) != entry["commit"]:
            raise RefusedError(f"{args.run} is not the head of {entry['ref']}")
        run = Run(
            id=args.run, app=app.name, ref=entry["ref"], commit=entry["commit"],
            delivery="rerun", received=clock.now(),
        )  # fmt: skip
        if entry["commit"] in rejected:
            ledger.write(app.name, {f"rejected-{entry['commit']}": None})
        for _ in range(60):
            refused = kubectl.create_each(
                [test_job(tools.config, app, run)], tools.config.namespaces["test"]
            )
            if not refused or reopen(kubectl, tools.config, run):
                ledger.write(app.name, ledger.seen(run, None))
                print(f"{args.run} goes again")  # noqa: T201 - a command's answer
                return 0
            clock.sleep(0.5)
        return 1
    raise RefusedError(f"no run {clip(args.run, 60)!r} is the last seen of any branch")


def clone(environ: Mapping[str, str]) -> int:
    """Inside a Job pod: check out the pushed commit; the reason of a failure is left for the hook."""
    git = Git(Path(environ["CREDENTIALS_FILE"]))
    for attempt in range(3):
        target = Path(environ["CLONE_DIRECTORY"])
        try:
            git.checkout(environ["CLONE_URL"], environ["CLONE_COMMIT"], target, symlinks=True)
            (target.parent / "results").mkdir(exist_ok=True)
            return 0
        except GitError as failed:
            text = Secrets(git.credentials.parent).mask(str(failed))
            print(text, file=sys.stderr)  # noqa: T201 - a container's log
            Path(environ["TERMINATION_LOG"]).write_text(text)
            shutil.rmtree(target, ignore_errors=True)
            time.sleep(attempt)
    return 1


def collect(environ: Mapping[str, str]) -> int:
    """Inside a test pod: wait until the tests have ended, then leave a summary of their report."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    ended.wait()
    Path(environ["TERMINATION_LOG"]).write_text(junit_summary(Path(environ["JUNIT_XML"])))
    return 0


# === main =========================================================================================


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    root = argparse.ArgumentParser(prog="gitops-hook", description="push to deploy, blue-green")
    root.add_argument("--version", action="version", version=__version__)
    commands = root.add_subparsers(dest="command", required=True)
    one = commands.add_parser("serve", help="run the daemon")
    one.add_argument(
        "--check", action="store_true", help="check configuration and secrets, then stop"
    )
    one = commands.add_parser("push", help="send a signed test delivery")
    one.add_argument("--app", required=True)
    one.add_argument("--ref", required=True)
    one.add_argument("--sha", required=True)
    one.add_argument("--url", default="http://127.0.0.1:8080/webhook")
    one = commands.add_parser("status", help="what is live, and the runs")
    one.add_argument("app", nargs="?", default="")
    one.add_argument("--output", choices=("text", "json"), default="text")
    one = commands.add_parser("rollback", help="switch back to a proven version")
    one.add_argument("app")
    one.add_argument("--environment", default="")
    one.add_argument("--to", type=int, default=1, help="how many proven versions back")
    one.add_argument("--reason", default="")
    commands.add_parser("rerun", help="let a run go again").add_argument("run")
    commands.add_parser("clone", help="inside a Job pod: check out the commit")
    commands.add_parser("collect", help="inside a test pod: summarise the report")
    return root


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one command; return its exit status: 0 done, 1 failed, 2 usage or surroundings, 3 refused."""
    args = parser().parse_args(argv)
    if args.command in ("clone", "collect"):
        return {"clone": clone, "collect": collect}[args.command](environ)
    try:
        tools = Tools.load(environ)
        if args.command == "serve":
            return serve(tools, check=args.check)
        return {"push": push, "status": status, "rollback": rollback, "rerun": rerun}[args.command](
            tools, args
        )
    except ConfigError as wrong:
        code, lines = 2, list(wrong.faults)
    except RefusedError as refused:
        code, lines = 3, [str(refused)]
    except KubectlError as failed:
        code, lines = (
            2 if failed.kind == "Unreachable" else 3 if failed.kind == "Conflict" else 1,
            [str(failed)],
        )
    except HookError as failed:
        code, lines = 1, [str(failed)]
    for line in lines:
        print(f"gitops-hook: {line}", file=sys.stderr)  # noqa: T201 - a command's answer
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
