#!/usr/bin/env python3
"""gitops-hook: a GitLab push becomes a tested, built, blue-green-deployed version on Kubernetes.

The way of a push, and where to read about it:

    GitLab -> POST /webhook -> verify, parse, spool (fsync), 202        pushes, spool, HTTP
      intake     a batch of each app: suspended Jobs in one create      job manifests, controller
      controller slots are granted fairly; tests, then the image build  cluster mirror, decide
      worker     claim, render, apply, rollout status, preview,         app manifests, deploy
                 switch, verify, bake; sick: one patch takes the traffic back
      records    how runs ended, one bounded ConfigMap for each app     state
      catch-up   `git ls-remote` finds what GitLab failed to deliver    git, controller

The cluster's own objects are the state: a Job's conditions, a Deployment's status, a Service's
selector. Annotations are intents and history; where they disagree with the object, the object wins:
what today's traffic reaches is live.
Nothing that matters lives in memory only: kill it at any point, start it again, same end state.

Words: an *app* is one repository's deployment; a *run* is one commit of one ref of one app; a
*stage* is test, build or an environment; a *colour* is one of an app's two Deployments; a *release*
is the stored rendering of one run for one environment; the *claim* says who is changing an
environment; to *heal* is to put the rollback target back where a failed deployment overwrote it.

Each section uses only those above it; `grep '^# ==='` lists them. Exit status: 0 done, 1 tried and
failed, 2 usage, configuration, no kubectl or no cluster, 3 refused.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import copy
import difflib
import errno
import hashlib
import hmac
import http
import json
import logging
import math
import os
import queue
import random
import re
import resource
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from dataclasses import field as dataclass_field
from datetime import datetime
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Generic, NoReturn, TypeVar, cast, get_type_hints
from urllib.parse import quote, unquote, urlsplit
from xml.etree import ElementTree

import prometheus_client
import requests
import waitress.channel
import waitress.parser
import waitress.server
import waitress.utilities
import yaml

if TYPE_CHECKING:
    from typing import IO
    from wsgiref.types import StartResponse, WSGIEnvironment

__version__ = "0.2.0"

# === constants ====================================================================================

MANAGER = "gitops-hook"
ORCHESTRATION = "orchestration"  # the namespace of the daemon, its configuration and its state

LABEL_MANAGED = "app.kubernetes.io/managed-by"
LABEL_APP = "gitops-hook/app"
LABEL_RUN = "gitops-hook/run"
LABEL_STAGE = "gitops-hook/stage"
LABEL_VERSION = "version"  # blue or green, the key of the article

NOTE_REPOSITORY = "gitops-hook/repository"
NOTE_COMMIT = "gitops-hook/commit"
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
NOTE_WRITTEN = "gitops-hook/written-at"
NOTE_PUT_BACK = "gitops-hook/put-back-at"

LOOK_SECONDS = 2.0  # between looks at what is not watched
AGAIN_SECONDS = 10.0  # before an action whose effect does not show is tried again
COLOURS = ("blue", "green")
HISTORY_LENGTH = 10
PUT_BACKS = 3  # of a widened selector within so many seconds; then whoever widens it has his way
PUT_BACK_SECONDS = 600.0
REJECTED_LENGTH = 50
RUNS_LENGTH = 100  # the newest runs of an app that are recorded, besides those that have a Job
STATE_BYTES = 600 * 1024  # of all records of an app: a ConfigMap holds 1 MiB
RECORD_BYTES = 2048  # of one record
RECORD_VERSION = 1
STATE_TRIES = 5  # of a write that finds that another process has written meanwhile
ADOPTED = "adopted"  # the outcome of what was there before the first run
DETAIL_LENGTH = 1500  # characters of explanation kept on an object
SIGNATURE_TOLERANCE = 300  # seconds, as the Standard Webhooks libraries have it
DEDUPE_SECONDS = 1200  # twice the tolerance: a replay is refused by age before it is forgotten
DEDUPE_ENTRIES = 20_000
JOB_TTL = 3600  # seconds a finished Job is kept
UNRUN_TTL = 300  # seconds a Job is kept that never ran
LOG_BYTES = 64 * 1024  # of log tails that are kept of a run in a namespace
LOG_TTL = 86400.0  # seconds they are kept
LOGS_KEPT = 20  # of an app in a namespace
KUBECTL_TIMEOUT = 30.0  # seconds for one call, as in the article
WATCH_SECONDS = 300  # every watch ends and relists after this: a hung one looks like a quiet one
GIT_TIMEOUT = 60.0
HEADS_AT_ONCE = 4  # questions to one git server: a dead one delays only its own apps
VERIFY_SECONDS = 10.0  # the endpoints must have followed the selector by then
UNMOVED_SECONDS = 60.0  # ... unless nobody has acted on it: a controller-manager that starts anew
HEALTH_INTERVAL = 0.25  # seconds between health checks: three failures are seen within one second
UNREADY_SECONDS = 5.0  # readiness below the wanted number for so long is sickness
GONE_SECONDS = 1.0  # ... and so long with no ready pod at all: every visitor is refused
REPLACED_SECONDS = 20.0  # ... unless pods are starting in the place of those that were taken away
CHECK_GAP = 2.0  # between two health checks further apart than that, health is not known
FRESH_SECONDS = 5.0  # as old may be what the API server said of the pods that are judged
REBAKE_SECONDS = 15.0  # a bake that nobody watched to its end is watched for at least so long
ROLLOUT_PER_REPLICA = 20.0
CLAIM_SECONDS = 900.0  # a claim of a command that old belongs to a process that is gone
HEAD_GRACE = 30.0  # a git server may show a pushed head so much later than the webhook
HEAD_FRESH = 10.0  # age up to which a read head decides over a release
DELAYS = (1.0, 2.0, 5.0, 10.0, 30.0)  # back-off, the last one repeats
BATCH = 200  # Jobs in one create
TEST_JOBS = 1000  # unfinished Jobs of an app above which pushes that are only tested wait

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
SHA = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


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
    OUT_OF_DISK = "OutOfDisk"
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
    SELECTOR_CONTESTED = "SelectorContested"
    ENDPOINTS_MISSING = "EndpointsMissing"
    SICK_AFTER_SWITCH = "SickAfterSwitch"
    BOTH_SICK = "BothSick"
    UNJUDGED = "Unjudged"
    CLAIM_LOST = "ClaimLost"
    NOT_HEAD = "NotHead"
    REJECTED = "Rejected"
    ROLLED_BACK = "RolledBack"
    GIT_ERROR = "GitError"


class Phase(StrEnum):
    """How far the holder of a claim has come."""

    PREPARING = "preparing"
    BAKING = "baking"
    SWITCHED_BACK = "switched-back"
    ROLLBACK = "rollback"
    DRAINING = "draining"


# === errors =======================================================================================
# Everything raised on purpose is a HookError with fields; foreign text in it is clipped. They are
# caught where their meaning is known: a request, a run, a command. A broad except stands only where
# a request or a thread ends, and it logs and counts.


def clip(text: str, limit: int = 300) -> str:
    """Return foreign text fit for a log line: printable, one line, at most limit characters."""
    if len(text) <= limit and text.isprintable() and "  " not in text:
        return text.strip()
    # of megabytes only the beginning is looked at: the rest is cut off anyway
    flat = " ".join("".join(c if c.isprintable() else " " for c in text[: 20 * limit]).split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


class HookError(Exception):
    """The base of all errors raised on purpose."""


class ConfigError(HookError):
    """The configuration or the surroundings cannot work; carries every fault found."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = tuple(faults)


class DeliveryError(HookError):
    """A request ends early: with an HTTP status, a reason code and a sentence for its sender."""

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(text)
        self.status, self.code = status, code


LIBRARY_LOG = re.compile(r"(?m)^[EFIW][0-9]{4} .*$")  # what kubectl says around its own words


class ProcessError(HookError):
    """A program failed; with code None it was ended by its time limit, its effect unknown.

    `said` is what it wrote to stderr, made fit to be shown.
    """

    def __init__(self, argv: Sequence[str], code: int | None, stderr: str, out: str = "") -> None:
        self.code, self.stderr, self.stdout = code, stderr, out
        ended = "ended here" if code is None else f"exit status {code}"
        self.said = clip(LIBRARY_LOG.sub("", stderr)) or ended
        late = "no answer in time; " if code is None else ""
        call = f"{Path(argv[0]).name} {clip(' '.join(argv[1:4]), 80)}"
        super().__init__(f"{call}: {late}{self.said}")


class GitError(ProcessError):
    """git failed: no access, no such commit, no answer in time."""


UNREACHABLE = re.compile(
    r"connection refused|connection reset|no route to host|i/o timeout|TLS handshake timeout"
    r"|Client\.Timeout exceeded|context deadline exceeded|was refused - did you specify"
    r"|no such host|unexpected EOF|EOF$|http2: |server is currently unable|etcdserver"
    r"|no configuration has been provided|Unauthorized|must be logged in|too many requests"
    r"|context +does not exist|Error in configuration|network is unreachable|broken pipe"
    r"|timed out waiting for a connection|connection timed out|failure in name resolution|x509: "
)
OVERLOADED = {"InternalError", "ServerTimeout", "ServiceUnavailable", "Timeout", "TooManyRequests"}
NAMED = {"AlreadyExists", "Conflict", "NotFound", "Unknown"}  # these quote no more than a name
SERVER_WORD = re.compile(r'Error from server(?: \((\w+)\))?: |The \w+ (?:".*" )?is invalid')
QUOTED = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\Z)')  # also where the text was cut off


class KubectlError(ProcessError):
    """kubectl failed."""

    @property
    def kind(self) -> str:
        """The API server's word, such as Conflict; or Unreachable, Invalid, Denied, Unknown."""
        return self.word[0]

    @property
    def word(self) -> tuple[str, str]:
        """The kind, and the line that tells it, without the texts that the line quotes.

        Of several failures the one that may mend itself counts: the call is made again. But what
        follows a refusal of an object's content may be that content, whatever it looks like.
        """
        if self.code is None:
            return "Unreachable", ""
        first = "Unknown", ""
        for line in LIBRARY_LOG.sub("", self.stderr).split("\n"):
            kind, plain = failure_kind(line)
            if kind == "Unreachable":
                return kind, plain
            first = (kind, plain) if first[0] == "Unknown" else first
            if kind not in NAMED:
                break
        return first


def failure_kind(line: str) -> tuple[str, str]:
    """Return what one line of kubectl's complaints says, and the line without quoted texts."""
    plain, server = QUOTED.sub("", line), SERVER_WORD.match(line)
    word = server[1] if server else None
    if line.startswith("Warning: "):
        return "Unknown", plain
    if re.search("denied (the )?request", plain):  # most of them Forbidden besides
        return "Denied", plain
    if (line.startswith("The ") and server) or "etcdserver: request is too large" in plain:
        return "Invalid", plain
    away = word in OVERLOADED or (word is None and UNREACHABLE.search(plain))
    return "Unreachable" if away else word or "Unknown", plain


class RunError(HookError):
    """A run cannot go on, for a reason of the closed list."""

    outcome: Outcome  # where the reason says nothing else

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class StageError(RunError):
    """It ends red; live traffic is as it was, or was taken back."""

    outcome = Outcome.FAILED


def refuse(detail: str, reason: Reason = Reason.MANIFEST_REFUSED) -> NoReturn:
    """End a run because of its manifests."""
    raise StageError(reason, detail)


class SupersededError(RunError):
    """It ends because something newer, or someone, took its place."""

    outcome = Outcome.SUPERSEDED


class RefusedError(HookError):
    """A command was not carried out, for a reason that trying again does not mend: exit 3."""


# === configuration ================================================================================

T = TypeVar("T")
Object = dict[str, Any]
Parser = Callable[[Any], Any]
REQUIRED = ""  # in the place of a default


def matching(pattern: str, what: str, make: Parser = str, kind: type[Any] = str) -> Parser:
    """Return a parser for a value of a type whose text matches the whole pattern."""

    def parse(value: Any) -> Any:
        """Return the value, made what it stands for."""
        if type(value) is kind and re.fullmatch(pattern, str(value)):
            return make(value)
        raise ValueError(f"is not {what}")

    return parse


UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "KiB": 2**10, "MiB": 2**20}


def scaled(text: str) -> float:
    """Return an amount with a unit in seconds or bytes."""
    unit = text.lstrip("0123456789")
    return int(text.removesuffix(unit)) * UNITS[unit]


TEXT = matching(r"(?s)(?=.*\S)[^\x00]{1,10000}", "a text")
SHORT = "a DNS label of at most 30 characters that begins with a letter"  # as Services want it
NAME = matching(rf"(?![0-9]|.{{31}}){DNS_LABEL.pattern}", SHORT)
LABEL = matching(rf"(?!.{{64}}){DNS_LABEL.pattern}", "a DNS label")
BRANCH = matching(r"(?!refs/)[^\s~^:?*\[\\]{1,255}", "a branch name (without refs/heads/)")
FOLDER = matching(r"(?![/-])(?!(.*/)?\.\.(/|$))[^\x00]+", "a relative path within the repository")
REPOSITORY = matching(
    r"(file://)?/[^\s\x00]+|https?://[A-Za-z0-9._:\[\]-]+/[^\s@?#\x00]+",
    "an http(s) URL without user, query and fragment (a user belongs in file git-credentials)",
)
PATH = r"([a-z0-9][\w.-]*(:[0-9]+)?/)?[a-z0-9._/-]*"  # of an image: lower case but for its host
IMAGE = matching(rf"(?=[a-z0-9]){PATH}(:[\w.-]+)?(@\w+:[0-9a-f]+)?", "an image reference")
TARGET = matching(PATH, "an image without tag and digest")
ADDRESS = matching(r"[^\s/]+:[0-9]{1,5}", "host:port")
QUANTITY = matching(r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?", "a quantity (e.g. 250m, 1Gi)")
MODE = matching("signature|token|hmac", "signature, token or hmac")
BUILDS = matching("kaniko|none", "kaniko or none")
SWITCH = matching("True|False", "true or false", bool, bool)
NUMBER = matching("[0-9]{1,3}", "full or a whole number from 0 to 999", int, int)
# A setting is a type, the parser of its texts or numbers, its default as YAML text, its meaning.
Texts = Annotated[tuple[str, ...], TEXT]
Resources = Annotated[dict[str, dict[str, str]], lambda v: QUANTITY(str(v))]
Count = Annotated[int, matching("[1-9][0-9]{0,5}", "a whole number from 1 to 999999", int, int)]
Replicas = Annotated[int | None, lambda v: None if v == "full" else NUMBER(v)]
DURATION = "a duration (e.g. 90s, 15m, 2h)"
Seconds = Annotated[float, matching("[1-9][0-9]{0,4}[smh]", DURATION, scaled)]
Pause = Annotated[float, matching("[0-9]{1,5}(ms|[smh])", DURATION, scaled)]
SIZE = "(?!0)([1-5]?[0-9]|6[0-4])MiB|[1-9][0-9]{0,4}KiB"
Bytes = Annotated[int, matching(SIZE, "a size up to 64MiB", scaled)]
DiskBytes = Annotated[int, matching("[1-9][0-9]{0,3}MiB", "a size from 1MiB to 9999MiB", scaled)]

TESTS = "pip install -r requirements.txt && python -m pytest tests/ -v --junitxml=$JUNIT_XML"
TEST_POD = "{requests: {cpu: 250m, memory: 256Mi}, limits: {cpu: 500m, memory: 512Mi}}"
BUILD_POD = "{requests: {cpu: 500m, memory: 1Gi}, limits: {cpu: 2, memory: 4Gi}}"
NAMESPACES = "{test: test, build: build, staging: staging, production: production}"
KANIKO = "ghcr.io/osscontainertools/kaniko:v1.28.3"


@dataclass(frozen=True, kw_only=True, slots=True)
class TestSettings:
    """How the tests of an app are run."""

    image: Annotated[str, IMAGE, "python:3.12-slim", "image the tests run in"]
    command: Annotated[str, TEXT, TESTS, "run under `sh -ec`; $JUNIT_XML is where a report goes"]
    timeout: Annotated[Seconds, "15m", "from the pod's start"]
    resources: Annotated[Resources, TEST_POD, "of the test container; ephemeral-storage: 4Gi"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSettings:
    """How the image of an app is built."""

    builder: Annotated[str, BUILDS, "kaniko", "none: the manifests name images by digest"]
    image: Annotated[str, TARGET, "''", "where to push it, without a tag"]
    dockerfile: Annotated[str, FOLDER, "Dockerfile", "path in the repository"]
    args: Annotated[Texts, "[]", "more options for kaniko"]
    timeout: Annotated[Seconds, "20m", "from the pod's start"]
    resources: Annotated[Resources, BUILD_POD, "of the build container; ephemeral-storage: 10Gi"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """What makes a version healthy before and after the switch."""

    path: Annotated[str, matching(r"/[\x21-\x7e]*", "a path"), "/ready", "2xx or 3xx when healthy"]
    successes: Annotated[Count, "3", "answers in a row that let a version pass"]
    failures: Annotated[Count, "3", "failures in a row that make it sick"]
    timeout: Annotated[Seconds, "30s", "for the smoke test before the switch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploySettings:
    """How an app is deployed."""

    manifests: Annotated[str, FOLDER, "deploy", "folder of plain YAML or of a kustomization"]
    ignore_kinds: Annotated[Texts, "[]", "kinds in there that someone else applies"]
    environments: Annotated[Texts, "[staging, production]", "in order; the last bakes; []: none"]
    health: Health
    rollout_timeout: Annotated[Seconds, "300s", "at least; 20 s a replica if that is more"]
    log_tails: Annotated[bool, SWITCH, "true", "keep the last log lines of its pods that fail"]
    bake: Annotated[Pause, "60s", "sickness so long after the switch takes the traffic back"]
    drain: Annotated[Pause, "60s", "until the old colour is restarted or scaled down"]
    retain: Annotated[Replicas, "full", "or how many replicas of the old colour stay"]


@dataclass(frozen=True, kw_only=True, slots=True)
class App:
    """One repository and what becomes of its pushes."""

    name: Annotated[str, NAME, REQUIRED, "of Deployments, Services and Jobs, with a suffix"]
    repository: Annotated[str, REPOSITORY, REQUIRED, "clone URL; its ssh forms match as well"]
    branch: Annotated[str, BRANCH, "main", "pushes here are tested, built, deployed"]
    test_branches: Annotated[Texts, "['*']", "pushes here are only tested"]
    test: TestSettings
    build: BuildSettings
    deploy: DeploySettings

    @property
    def deploy_ref(self) -> str:
        """The ref whose pushes are deployed."""
        return f"refs/heads/{self.branch}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """The images of Job pods."""

    hook: Annotated[str, IMAGE, "gitops-hook:dev", "this program; `make apply` sets it"]
    kaniko: Annotated[str, IMAGE, KANIKO, "the builder"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Webhook:
    """How deliveries are judged."""

    verify: Annotated[str, MODE, "signature", "signature, token or hmac: what is required"]
    max_body: Annotated[Bytes, "5MiB", "larger bodies get a 413"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds on what runs at once."""

    max_running: Annotated[Count, "4", "Jobs released at once"]
    queue_timeout: Annotated[Seconds, "1h", "wait for quota or a free place"]
    spool_files: Annotated[Count, "10000", "pushes stored, 16 KiB each; then 503"]
    kubectl: Annotated[Count, "8", "kubectl processes at once, watches apart"]
    checkout: Annotated[DiskBytes, "64MiB", "what git may bring for one commit's manifests"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole configuration, valid."""

    apps: Annotated[tuple[App, ...], TEXT, REQUIRED, ""]
    namespaces: Annotated[dict[str, str], LABEL, NAMESPACES, "of stages, environments"]
    images: Images
    webhook: Webhook
    limits: Limits
    catch_up: Annotated[Seconds, "5m", "between looks at the heads of all repositories"]


def settings_of(section: type[Any]) -> dict[str, tuple[Any, Parser, str, str]]:
    """Return the type, parser, default as YAML text and meaning of every setting by its key."""
    hints = get_type_hints(section, include_extras=True)
    whole = {k: getattr(hint, "__metadata__", (TEXT, "{}", "")) for k, hint in hints.items()}
    return {k: (getattr(hints[k], "__origin__", hints[k]), *more) for k, more in whole.items()}


def load_section(section: Any, data: Any, path: str, faults: list[str]) -> Any:
    """Build a dataclass from YAML data; a wrong value adds a fault, and its default stands in."""
    if not isinstance(data, dict):
        faults.append(f"{path or 'configuration'}: is not a mapping")
        data = {}
    known, prefix, values = settings_of(section), f"{path}." if path else "", {}
    unknown = [clip(str(k), 60) for k in data if k not in known]
    faults += [f"{prefix}{k}: unknown key (known: {', '.join(known)})" for k in unknown]
    for key, (kind, parse, default, _) in known.items():
        values[key] = load(kind, parse, yaml.safe_load(default), "", []) if default else ()
        if data.get(key) is not None:
            given = load(kind, parse, data[key], prefix + key, faults)
            values[key] = values[key] if given is None else given
        elif not default:
            faults.append(f"{prefix}{key}: is required")
    return section(**values)


def load(kind: Any, parse: Parser, raw: Any, where: str, faults: list[str]) -> Any:
    """Return what a type makes of YAML data, None when it is wrong; every fault is added."""
    if is_dataclass(kind):
        return load_section(kind, raw, where, faults)
    family, inner = getattr(kind, "__origin__", None), getattr(kind, "__args__", [])
    if family is tuple and isinstance(raw, list):
        return tuple(load(inner[0], parse, v, f"{where}[{i}]", faults) for i, v in enumerate(raw))
    if family is dict and isinstance(raw, dict):
        return {str(k): load(inner[1], parse, v, f"{where}.{k}", faults) for k, v in raw.items()}
    if family in (tuple, dict):
        what = "list" if family is tuple else "mapping"
        faults.append(f"{where}: {clip(repr(raw), 80)} is not a {what}")
        return None
    try:
        return parse(raw)
    except ValueError as wrong:
        faults.append(f"{where}: {clip(repr(raw), 80)} {wrong}")
        return None


class ConfigLoader(yaml.SafeLoader):
    """YAML in which no key stands twice: the first of two values would be lost without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return a mapping's node; raises YAMLError for a key that is there again."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = [k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode)]
        if again := sorted({k for k in keys if keys.count(k) > 1}):
            raise yaml.YAMLError(f"{', '.join(again)} twice in one mapping{node.start_mark}")
        return node


def cross_faults(config: Config) -> Iterator[str]:
    """Yield what is wrong between settings that are each right."""
    names, spaces = [a.name for a in config.apps], config.namespaces
    distinct = {v for k, v in spaces.items() if DNS_LABEL.fullmatch(k)} - {ORCHESTRATION}
    if not {"test", "build"} <= spaces.keys() or len(distinct) < len(spaces):
        yield "namespaces: needs test, build and others, all different, none the daemon's own"
    taken = {f"{n}-{suffix}" for n in names for suffix in (*COLOURS, "preview")}
    for i, app in enumerate(config.apps):
        environments, image = app.deploy.environments, app.build.image
        where = f"apps[{i}].deploy.environments"
        if app.name and app.name in names[:i]:
            yield f"apps[{i}].name: {app.name!r} is the name of two apps"
        if app.name in taken:
            yield f"apps[{i}].name: {app.name!r} is the name of another app's Deployment or Service"
        if len(set(environments)) < len(environments):
            yield f"{where}: names one of them twice"
        for e in sorted({*filter(None, environments)} - (spaces.keys() - {"test", "build"})):
            yield f"{where}: {e!r} is not an environment in namespaces ({', '.join(spaces)})"
        if app.build.builder == "kaniko" and environments and not image:
            yield f"apps[{i}].build.image: is required with builder kaniko"
        if {*app.test.resources, *app.build.resources} - {"requests", "limits"}:
            yield f"apps[{i}]: resources have keys other than requests and limits"


def load_config(document: str) -> Config:
    """Parse and check the YAML text of the configuration; raises ConfigError with all faults."""
    try:
        data = yaml.load(document, ConfigLoader)  # noqa: S506 - a SafeLoader that is stricter
    except (yaml.YAMLError, ValueError, RecursionError) as wrong:
        raise ConfigError([f"configuration: not YAML: {clip(str(wrong))}"]) from wrong
    faults: list[str] = []
    config: Config = load_section(Config, data, "", faults)
    told = {fault.partition(":")[0] for fault in faults}
    faults += [f for f in cross_faults(config) if f.partition(":")[0] not in told]
    if faults:
        raise ConfigError(faults)
    return config


def settings_table(section: Any = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, meaning) of every setting, for the README."""
    for key, (kind, _, default, meaning) in settings_of(section).items():
        inner = getattr(kind, "__args__", [kind])[0]
        if is_dataclass(inner):
            yield from settings_table(inner, f"{prefix}{key}{'.' if inner is kind else '[].'}")
        else:
            yield prefix + key, default or "required", meaning


# What a kubelet sets in a pod beside a Service whose name begins with gitops-hook.
INJECTED = re.compile(r"GITOPS_HOOK(_\w+)?_(SERVICE_(HOST|PORT\w*)|PORT\w*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """What the environment variables GITOPS_HOOK_* say: files, folders and addresses."""

    config: Annotated[Path, Path, "/etc/gitops-hook/config.yaml", ""]
    secrets: Annotated[Path, Path, "/etc/gitops-hook/secrets", ""]
    spool: Annotated[Path, Path, "/var/spool/gitops-hook", ""]
    listen: Annotated[str, ADDRESS, "0.0.0.0:8080", ""]
    admin_listen: Annotated[str, ADDRESS, "127.0.0.1:8081", ""]

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Process:
        """Read GITOPS_HOOK_*; raises ConfigError for unknown names but those a kubelet injects."""
        faults: list[str] = []
        ours = [k for k in environ if k.startswith("GITOPS_HOOK_") and not INJECTED.fullmatch(k)]
        given = {k.removeprefix("GITOPS_HOOK_").lower(): environ[k] or None for k in ours}
        process: Process = load_section(cls, given, "", faults)
        if faults:
            named = (fault.partition(":") for fault in faults)
            raise ConfigError([f"GITOPS_HOOK_{key.upper()}:{rest}" for key, _, rest in named])
        return process


SIGNING_TOKENS, PLAIN_TOKENS = "webhook-signing-tokens", "webhook-tokens"
SECRET_OF_MODE = {"signature": SIGNING_TOKENS, "token": PLAIN_TOKENS, "hmac": PLAIN_TOKENS}
GIT_CREDENTIALS = "git-credentials"
SECRET_FILES = (SIGNING_TOKENS, PLAIN_TOKENS, GIT_CREDENTIALS)
KEY_BYTES = 32
SHORTEST_MASKED = 4  # what is shorter occurs in innocent words
# Bounded or possessive repetitions only: logs are searched with these, whatever is in them.
TOKEN_PREFIXES = (
    *("glpat-", "glptt-", "gldt-", "glrt-", "glcbt-", "glft-", "glimt-", "glsoat-", "glagent-"),
    *("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "dckr_pat_", "sk_live_", "rk_live_"),
    *("xoxa-", "xoxb-", "xoxe-", "xoxp-", "xoxr-", "xoxs-", "whsec_"),
)
KEYS = "(?:access|account|api|deploy|encryption|master|private|signing|ssh)[_-]?key"
WORDS = f"passw(?:or)?d|passphrase|secret|token|{KEYS}"
# Beside the words: DB_PASS, DB_KEY_2 and pwd, not bypass, monkey, keys, or the shell's PWD=/a/path.
SECRET_NAME = re.compile(
    rf"(?i:(?:{WORDS})[\w-]{{0,30}}"
    r"|(?:_key|[_-]pass|(?!(?-i:(?:(?<![A-Z_])|(?<=OLD))PWD=/))pwd)(?![a-z])[\w-]{0,30})"
)
# What follows a word in prose that tells no secret: "password is required", "--token or a file".
PROSE = (
    "(?:a|an|and|as|at|be|been|changed|correct|empty|expired|for|from|in|incorrect|invalid|is|it"
    "|masked|missing|must|no|none|not|null|of|on|option|optional|or|read|required|reset|set|stored"
    "|the|to|too|undefined|unknown|unset|used|valid|was|weak|with|without|wrong)\\b"
)
ASSIGNED = rf"{SECRET_NAME.pattern}[\"']?\s{{0,3}}[=:]\s{{0,3}}"
OPTION = rf"(?<![\w-])--?(?:[\w-]{{0,30}}?[_-])?(?:{WORDS}|pass|pwd)[\"']?,?\s{{1,3}}(?!-|{PROSE})"
SPOKEN = rf"\b(?:passw(?:or)?d|passphrase|pwd)\s{{1,3}}(?:is|was)\s{{1,3}}(?!{PROSE})"
SPOKEN += r"|\b(?:secret|token|key)\s{1,3}is\s{1,3}(?=\S{8})(?=\S{0,60}\d)"
VALUE = r"""(?:(?:bearer|basic)\s)?(?:"(?:[^"\\\n]|\\.){0,200}"|'(?:[^'\\\n]|\\.){0,200}')?\S*"""
SECRET = re.compile(
    rf"(?<=://)[^/\s@]+(?=@)|(?<![A-Za-z0-9])(?:{'|'.join(TOKEN_PREFIXES)})[\w+/=.-]{{8,}}"
    r"|(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{12,}"
    r"|(?<![\w-])eyJ[\w-]+\.[\w.-]{8,}|(?i:\b(?:bearer|basic)\s[\w+/=.~-]{16,})"
    rf"|(?i:({ASSIGNED}|{OPTION}|{SPOKEN})(?=\S){VALUE})"
)
# A private key goes to its last line, or to the end of what is left of it; where its beginning is
# cut off, it begins with what could be a part of it.
PEM_WORDS = "[A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
PEM = re.compile(
    rf"-----BEGIN {PEM_WORDS}[^-]*+(?:-(?!----)[^-]*+)*+(?:-----END {PEM_WORDS})?"
    rf"|(?<![\w+/=\s\\])[\w+/=\s\\]*+-----END {PEM_WORDS}"
)
# One of these is in whatever those find; looking for them is ten times as fast.
SECRET_HINTS = ["://", "akia", "asia", "eyj", "bearer", "basic", "passw", "passphrase", "pwd"]
SECRET_HINTS += ["secret", "token", "key", "_pass", "-pass", *TOKEN_PREFIXES]


class Secrets:
    """The secrets directory: one file a kind, one secret a line, read at use so that it rotates."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, tuple[Any, list[bytes]]] = {}  # as it was when it was read
        self._known: tuple[list[list[bytes]], list[str]] = [], []

    def lines(self, name: str) -> list[bytes]:
        """Return the secrets in a file, ends of lines dropped; none when it is absent."""
        path, (known, lines) = Path(f"{self.directory}/{name}"), self._files.get(name, (None, []))
        try:
            found = path.stat()
            state = found.st_mtime_ns, found.st_size, found.st_ino  # the last tells a changed link
            content = b"" if state == known else path.read_bytes()
        except OSError:
            return []
        if state != known:
            lines = [line for raw in content.split(b"\n") if (line := raw.strip(b" \t\r"))]
            self._files[name] = state, lines
        return lines

    def keys(self, mode: str) -> list[bytes]:
        """Return the keys to verify deliveries with; raises ConfigError if one is unusable."""
        name = SECRET_OF_MODE[mode]
        found = self.lines(name)
        if not found:
            raise ConfigError([f"secret file {self.directory / name} is missing or empty"])
        decoded = (decode_signing_token(token, i + 1) for i, token in enumerate(found))
        return [*decoded] if name == SIGNING_TOKENS else found

    def mask(self, value: T) -> T:
        """Return a text, or all texts within a value, without what is or looks like a secret."""
        secrets, (known, words) = [self.lines(f) for f in SECRET_FILES], self._known
        if secrets != known:
            words = secret_words(line.decode("utf-8", "replace") for f in secrets for line in f)
            self._known = secrets, words
        masked: T = without(value, words)
        return masked


def secret_words(lines: Iterable[str]) -> list[str]:
    """Return what must not be shown, longest first: secrets, and the passwords in their URLs."""
    known = {*lines}
    users = [u for k in known for u in re.findall(r"://([^/\s@]+)@", k)]
    words = {u.rpartition(":")[2] for u in users}
    known |= words | {unquote(w) for w in words}
    return sorted((k for k in known if len(k) >= SHORTEST_MASKED), key=len, reverse=True)


def without(value: Any, known: Sequence[str]) -> Any:
    """Return a value as JSON has them, its texts without known secrets and what looks like one."""
    if isinstance(value, dict):
        # a variable of a pod: its name tells what its value is
        hidden = "value" if SECRET_NAME.search(str(value.get("name", ""))) else None
        return {str(k): "***" if k == hidden else without(v, known) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without(v, known) for v in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    for secret in known:
        text = text.replace(secret, "***")
    lower = text.lower()
    if not any(h in lower for h in SECRET_HINTS):
        return text
    return SECRET.sub(r"\1***", PEM.sub("***", text))


def decode_signing_token(token: bytes, line: int) -> bytes:
    """Return the 32 key bytes of `whsec_` + base64; raises ConfigError naming only the line."""
    with suppress(binascii.Error):
        key = base64.b64decode(token.removeprefix(b"whsec_"), validate=True)
        if token.startswith(b"whsec_") and len(key) == KEY_BYTES:
            return key
    raise ConfigError([f"secret file {SIGNING_TOKENS}, line {line}: not whsec_ and 32 bytes"])


# === logging ======================================================================================

LOG = logging.getLogger("gitops_hook")
LOG_FIRST = ("run", "app", "environment", "delivery")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, msg, run, app, environment, delivery, then the rest."""

    def __init__(self, mask: Callable[[Object], Object]) -> None:
        super().__init__()
        self.mask = mask

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for one record, secrets masked."""
        given: Object = getattr(record, "fields", {})
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: Object = {"ts": f"{stamp}.{int(record.msecs):03d}Z"}
        line |= {"level": record.levelname.lower(), "msg": record.getMessage()}
        told = [k for k in (*LOG_FIRST, *given) if k not in line and given.get(k) not in (None, "")]
        line |= {k: given[k] for k in told}
        if record.exc_info:
            line["exc"] = "".join(traceback.format_exception(*record.exc_info))[-4000:]
        return json.dumps(self.mask(line))


def setup_logging(mask: Callable[[Object], Object]) -> None:
    """Send every log record of the program to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(mask))
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a burst of pushes is no news
    LOG.setLevel(logging.INFO)


def info(msg: str, **given: Any) -> None:
    """Log something that happened as it should: msg is constant, values go in fields."""
    LOG.info(msg, extra={"fields": given})


def warn(msg: str, **given: Any) -> None:
    """Log something that will be tried again."""
    LOG.warning(msg, extra={"fields": given})


def error(msg: str, **given: Any) -> None:
    """Log something that a person must look at; exc=True adds the traceback being handled."""
    exc = given.pop("exc", False)
    LOG.error(msg, extra={"fields": given}, exc_info=exc)


# === metrics ======================================================================================

ERRORS = (
    *("controller", "heads", "heal", "intake", "request", "secrets", "selector", "watch"),
    "worker",
)
STAGE_BUCKETS = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600)


class Metrics:
    """Every metric of the daemon, in a registry of its own; labels hold words of ours only."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        ours: Object = {"namespace": "gitops_hook", "registry": self.registry}
        counter: Any = partial(prometheus_client.Counter, **ours)
        gauge: Any = partial(prometheus_client.Gauge, **ours)
        histogram: Any = partial(prometheus_client.Histogram, buckets=STAGE_BUCKETS, **ours)
        place = ("app", "environment")
        self.deliveries = counter("deliveries", "Webhook requests by result.", ["result"])
        self.runs = counter("runs", "Ended runs.", ["app", "outcome", "stage", "reason"])
        self.switches = counter("switches", "Switched traffic.", [*place, "direction"])
        self.kubectl = counter("kubectl_calls", "kubectl processes ended.", ["verb", "result"])
        self.errors = counter("errors", "Errors that a person should look at.", ["where"])
        self.drift = counter("selector_drift", "Services changed by someone else.", place)
        self.catch_up = counter("catch_up_runs", "Runs GitLab failed to announce.", ["app"])
        self.spool = gauge("spool_files", "Pushes stored and not yet in the cluster.")
        self.waiting = gauge("waiting", "1 while it waits for something outside.", ["what"])
        self.queue = gauge("jobs", "Unfinished Jobs by state.", ["state"])
        self.stage_seconds = histogram("stage_seconds", "Stages.", ["app", "stage", "result"])

    def begin(self, apps: Iterable[App]) -> None:
        """Let what is counted begin at 0, where its labels are known: 1 from nothing is no rise."""
        for where in ERRORS:
            self.errors.labels(where)
        for app in apps:
            self.catch_up.labels(app.name)
            for environment in app.deploy.environments:
                self.drift.labels(app.name, environment)
                for direction in ("forward", "back", "rollback"):
                    self.switches.labels(app.name, environment, direction)


# === signatures ===================================================================================

SIGNED, TOKEN = ("webhook-id", "webhook-timestamp", "webhook-signature"), ("x-gitlab-token",)
NEEDED_HEADERS = {"signature": SIGNED, "token": TOKEN, "hmac": TOKEN}  # by what is required


def sign(key: bytes, message_id: bytes, stamp: bytes, body: bytes) -> bytes:
    """Return the webhook-signature that GitLab would send: Standard Webhooks v1, HMAC-SHA256.

    https://docs.gitlab.com/user/project/integrations/webhooks/ and
    https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
    """
    signed = b".".join((message_id, stamp, body))
    return b"v1," + base64.b64encode(hmac.digest(key, signed, "sha256"))


def hex_hmac(key: bytes, body: bytes) -> bytes:
    """Return the hex HMAC-SHA256 of a body: the article's scheme, for relays that sign."""
    return hmac.digest(key, body, "sha256").hex().encode()


def verify_delivery(
    mode: str, keys: Sequence[bytes], headers: Mapping[str, str], body: bytes, now: float
) -> None:
    """Check that a delivery is authentic; raises DeliveryError 401, which says what was wrong.

    Exactly the configured mode counts, there is no fallback. Header names are lower case.
    """
    names = NEEDED_HEADERS[mode]
    # WSGI hands the bytes of headers over as latin-1 text (PEP 3333)
    given = [headers.get(n, "").encode("latin-1", "replace") for n in names]
    entries, expected, age, refusal = given, keys, 0.0, ""
    if mode == "hmac":
        expected = [hex_hmac(k, body) for k in keys]
    elif mode == "signature":
        message_id, stamp, listed = given
        entries = listed.split(b" ")[:20]
        expected = [sign(k, message_id, stamp, body) for k in keys]
        age = abs(now - int(stamp)) if re.fullmatch(rb"[0-9]{1,12}", stamp) else math.inf
    # digests have one length, so that the time of a comparison tells nothing about lengths
    seen, right = ([hashlib.sha256(x).digest() for x in side] for side in (entries, expected))
    if not all(given):
        refusal = f"{', '.join(names)}: required"
    elif not any(hmac.compare_digest(a, b) for a in seen for b in right):
        refusal = f"{names[-1]} does not match"
    elif age > SIGNATURE_TOLERANCE:
        refusal = "webhook-timestamp is not a recent Unix time"
    if refusal:
        raise DeliveryError(401, "NotAuthentic", refusal)


# === pushes =======================================================================================

REF_LENGTH = 500  # characters; file systems hold 255 bytes between two slashes
# Digits of the hash in a run's id: as usual, where two pushes would have the same, in version 0.1.
ID_DIGITS = (10, 16, 4)
ADDRESS_LENGTH = 2048  # characters; urlsplit keeps the addresses that it has parsed last
FORBIDDEN_IN_REFS = re.compile(  # https://git-scm.com/docs/git-check-ref-format
    r"[\x00-\x20~^:?*\[\\\x7f]|\.\.|@\{|\.\Z|(\A|/)(\.|/|\Z)|\.lock(/|\Z)"
)


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


def run_id(app: str, ref: str, commit: str, digits: int = ID_DIGITS[0]) -> str:
    """Return the deterministic id: the same push always makes the same run."""
    digest = hashlib.sha256(f"{ref} {commit}".encode()).hexdigest()
    return f"{app}-{commit[:8]}-{digest[:digits]}"


def run_ids(app: str, ref: str, commit: str) -> list[str]:
    """Return every id that a push may have, the usual one first."""
    return [run_id(app, ref, commit, digits) for digits in ID_DIGITS]


def run_of(app: App, ref: str, commit: str, **more: Any) -> Run | None:
    """Return an app's run of a commit, None where it does not want the branch."""
    run = Run(id=run_id(app.name, ref, commit), app=app.name, ref=ref, commit=commit, **more)
    wanted = any(fnmatchcase(run.branch, p) for p in (app.branch, *app.test_branches))
    return run if wanted else None


def deny(status: int, code: str, text: str) -> NoReturn:
    """End a request early; with a 200 where nothing is wrong, or GitLab switches the hook off."""
    raise DeliveryError(status, code, text)


def typed(data: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """Return a field of a payload; a 400 that names it when it is missing or of another type."""
    value = data.get(key)
    if not isinstance(value, kind):
        deny(400, "Malformed", f"{key}: {'missing' if value is None else f'not a {kind.__name__}'}")
    return value


def parse_delivery(config: Config, body: bytes, **more: Any) -> list[Run]:
    """Return the run of each app that a push concerns; DeliveryError says why there is none.

    Clone URL, image names and commands never come from here.
    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as wrong:
        deny(400, "Malformed", f"the body is not JSON: {clip(str(wrong), 80)}")
    if not isinstance(data, dict):
        deny(400, "Malformed", "the body is not a JSON object")
    ref, commit = pushed_branch(data)
    before = data.get("before")
    if isinstance(before, str) and SHA.fullmatch(before):
        more["before"] = before
    more["title"], named = commit_title(data.get("commits"), commit), projects(data)
    apps = [a for a in config.apps if normalise_url(a.repository) in named]
    runs = [run for a in apps if (run := run_of(a, ref, commit, **more))]
    if not apps:
        urls = " ".join(f"{host}/{path}" for host, path in sorted(filter(None, named)))
        deny(200, "UnknownProject", f"no app has the repository {clip(urls)}")
    return runs or deny(200, "OtherBranch", f"no app asks for {clip(ref)}")


def pushed_branch(data: Mapping[str, Any]) -> tuple[str, str]:
    """Return the ref and commit of a pushed branch; DeliveryError for anything else.

    The body decides what it is, never the X-Gitlab-Event header: old servers send samples whose
    header and body disagree. Of system hooks, some have only `event_name`.
    """
    key = next((k for k in ("object_kind", "event_name") if k in data), "object_kind")
    if (kind := typed(data, key, str)) != "push":
        deny(200, "TagPush" if kind == "tag_push" else "OtherEvent", "only pushes start anything")
    ref, after = typed(data, "ref", str), typed(data, "after", str)
    if not ref.startswith("refs/heads/"):
        deny(200, "TagPush" if ref.startswith("refs/tags/") else "OtherRef", "it is no branch")
    if not SHA.fullmatch(after):
        deny(400, "Malformed", "after: not a full commit id")
    if set(after) == {"0"}:
        deny(200, "RefDeleted", "the branch was deleted")
    if FORBIDDEN_IN_REFS.search(ref):
        deny(400, "Malformed", "ref: not a branch name that git allows")
    if not valid_ref(ref):
        deny(200, "OtherRef", "the name of the branch is too long, not UTF-8, or has control codes")
    return ref, after


def valid_ref(ref: str) -> bool:
    """Whether git allows a name and we carry it: it is UTF-8, and one line for whoever reads it."""
    odd = re.search(r"[\x80-\x9f\u2028\u2029\ud800-\udfff]", ref)
    return len(ref) <= REF_LENGTH and not (odd or FORBIDDEN_IN_REFS.search(ref))


def commit_title(commits: Any, after: str) -> str:
    """Return the first line of the pushed commit's message where the payload has it, clipped."""
    listed = (c for c in commits if isinstance(c, dict)) if isinstance(commits, list) else ()
    message = next((c.get("message") for c in listed if c.get("id") == after), "")
    return clip(message.lstrip()[:1000].partition("\n")[0], 120) if isinstance(message, str) else ""


def projects(data: Mapping[str, Any]) -> set[tuple[str, str] | None]:
    """Return every address by which a payload names its project; a 400 when there is none."""
    keys, project = ("git_http_url", "git_ssh_url", "web_url"), typed(data, "project", dict)
    urls = [url for k in keys if isinstance(url := project.get(k), str)]
    if any(len(url) > ADDRESS_LENGTH for url in urls):
        deny(400, "Malformed", f"project: an address is longer than {ADDRESS_LENGTH} characters")
    found = {normalise_url(u) for u in urls} - {None}
    return found or deny(400, "Malformed", f"project: names no {', '.join(keys)}")


def normalise_url(url: str) -> tuple[str, str] | None:
    """Return (host, path) by which two addresses of one repository are equal, None if it is none.

    Scheme, user, port, case and `.git` do not count; `git@host:path` is read as ssh. A local path
    is compared as it is, with an empty host.
    """
    if not url.startswith("/") and "://" not in url:
        url = "ssh://" + url.replace(":", "/", 1)
    with suppress(ValueError):
        split = urlsplit(url)
        host, path = split.hostname or "", split.path.strip("/").removesuffix(".git").strip("/")
        if path and (host or split.scheme in ("", "file")):
            return host, path.casefold() if host else path
    return None


# === spool ========================================================================================

SPOOL_RECORD = 16384  # bytes a stored push has at most; times limits.spool_files the spool's bound
ACCEPTED_LINE = re.compile(rb"([0-9]{1,12}\.[0-9]{3}) ([0-9a-f]{64})")


class Accepted:
    """Which pushes of which deliveries were accepted lately, also before a restart.

    A stored push tells its delivery itself. When the cluster has it a line in a file does so, which
    is not synced: only a lost machine loses it. Ids of senders are hashed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self.times: OrderedDict[str, float] = OrderedDict()  # when, the oldest first
        self.handle, self._lines = -1, 0  # of the file, and how many are in it

    @staticmethod
    def key(run: Run) -> str:
        """Return the hash of a delivery and one of its runs, "" for a delivery without an id."""
        text = f"{run.delivery}\n{run.id}".encode(errors="replace")
        return hashlib.sha256(text).hexdigest() if run.delivery else ""

    def load(self, stored: Iterable[Run]) -> None:
        """Take over what the file and the stored pushes tell; raises OSError."""
        with suppress(FileNotFoundError):
            # what is no file, a pipe say, is not waited for
            with os.fdopen(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                lines = file.read(200 * DEDUPE_ENTRIES).split(b"\n")
            for match in filter(None, map(ACCEPTED_LINE.fullmatch, lines)):
                self.times[match[2].decode()] = float(match[1])
        self.add(stored)
        self._write_anew()

    def has(self, run: Run) -> bool:
        """Whether this push of this delivery was accepted before."""
        at = self.times.get(self.key(run), -math.inf)
        return abs(run.received - at) <= DEDUPE_SECONDS

    def add(self, runs: Iterable[Run]) -> None:
        """Remember pushes that are stored, and forget the oldest."""
        with self._lock:
            for key, at in ((self.key(run), run.received) for run in runs if run.delivery):
                self.times.pop(key, None)
                self.times[key] = at
            while len(self.times) > DEDUPE_ENTRIES:
                self.times.popitem(last=False)

    def write(self, key: str) -> None:
        """Write down a push that is stored no longer; the file is bounded as well."""
        with self._lock:
            if at := self.times.get(key):
                try:
                    # it begins a line: one that a full disk cut off spoils no other
                    os.write(self.handle, f"\n{at:.3f} {key}".encode())
                    self._lines += 1
                    if self._lines > 2 * DEDUPE_ENTRIES:
                        self._write_anew()
                except OSError as refused:
                    warn("an accepted delivery is not written down", detail=refused.strerror)

    def _write_anew(self) -> None:
        """Write the file with what is remembered; raises OSError."""
        part = Path(f"{self.path}.new")
        part.write_text("".join(f"\n{at:.3f} {key}" for key, at in self.times.items()))
        part.replace(self.path)
        if self.handle >= 0:
            os.close(self.handle)
        self.handle, self._lines = os.open(self.path, os.O_WRONLY | os.O_APPEND), len(self.times)


class Spool:
    """Accepted pushes on disk, one file a run, until the cluster has them.

    Threads may share it. What is no stored push is moved aside to `bad/`, never deleted.
    """

    def __init__(self, directory: Path, max_files: int) -> None:
        self.directory, self.max_files = directory, max_files
        self.scratch = directory / "scratch"  # for what need not outlive the process
        self._lock, self._folder = threading.Lock(), -1
        # what is stored or being stored, with its delivery: a count would drift
        self._names: dict[str, str] = {}
        self.accepted = Accepted(directory / "accepted")

    def __len__(self) -> int:
        return len(self._names)

    def prepare(self) -> None:
        """Create the folder, take stock, prove it writable; raises ConfigError."""
        try:
            (self.directory / "bad").mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.scratch, ignore_errors=True)  # what a killed daemon left
            self.scratch.mkdir(mode=0o700, exist_ok=True)
            self.probe()
            self._folder = os.open(self.directory, os.O_RDONLY)
            stored = self.read()
            self.accepted.load(run for _, run in stored)
        except OSError as refused:
            raise ConfigError([f"spool {self.directory}: {refused.strerror}"]) from refused
        for leftover in self.directory.glob("*.tmp"):
            self._set_aside(leftover, "half-written, its push was not accepted")
        self._names = {path.name: self.accepted.key(run) for path, run in stored}

    def probe(self) -> None:
        """Prove that a file can be written; raises OSError."""
        with tempfile.TemporaryFile(dir=self.directory) as file:
            file.write(b"x")

    def store(self, runs: Sequence[Run], spare: int = 0) -> None:
        """Write the runs of one push durably, all or none; raises DeliveryError with why not.

        So many files are spared for pushes that matter more.
        """
        paths = {self.directory / f"{time.time_ns():020d}-{run.id}.json": run for run in runs}
        with self._lock:
            if len(self) + len(paths) > self.max_files - spare:
                deny(503, "SpoolFull", f"{len(self)} pushes are waiting already")
            self._names |= {path.name: self.accepted.key(run) for path, run in paths.items()}
        try:
            for path, run in paths.items():
                record = {f.name: getattr(run, f.name) for f in fields(run)}
                part = Path(f"{path}.tmp")
                with part.open("xb") as file:
                    file.write(json.dumps(record).encode())
                    file.flush()
                    os.fsync(file.fileno())
                part.rename(path)
            os.fsync(self._folder)
        except OSError as refused:
            for path in paths:
                with suppress(OSError):
                    self.done(path)
                    Path(f"{path}.tmp").unlink(missing_ok=True)
            raise DeliveryError(503, "SpoolUnwritable", str(refused.strerror)) from refused
        self.accepted.add(runs)

    def read(self) -> list[tuple[Path, Run]]:
        """Return everything stored, oldest first."""
        found: list[tuple[Path, Run]] = []
        unread: list[str] = []
        for path in sorted(self.directory.glob("*.json")):
            try:
                found.append((path, parse_run(read_plain(path))))
            except FileNotFoundError:
                continue
            except ValueError as wrong:
                self._set_aside(path, str(wrong))
            except OSError as refused:
                unread.append(f"{path.name}: {refused.strerror}")
        if unread:  # one line, also when all are: there is no file descriptor left, say
            error("spool file cannot be read", count=len(unread), detail=unread[0])
        return found

    def _set_aside(self, path: Path, why: str) -> None:
        error("spool file moved aside", file=clip(path.name), detail=clip(why))
        with suppress(OSError):
            path.rename(self.directory / "bad" / path.name)

    def done(self, path: Path) -> None:
        """Forget a push that the cluster has or that needs nothing more."""
        with self._lock:
            delivery = self._names.pop(path.name, "")
        self.accepted.write(delivery)
        path.unlink(missing_ok=True)


def read_plain(path: Path) -> bytes:
    """Return what a stored push may hold; ValueError for a link, a pipe, a folder or the like."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("not a plain file")
    # what has taken its place since cannot hold the program up either
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
        return file.read(SPOOL_RECORD + 1)


def parse_run(content: bytes) -> Run:
    """Return the run in a spool file; raises ValueError for anything that is not one."""
    try:
        run = Run(**json.loads(content))
    except (TypeError, RecursionError) as wrong:
        raise ValueError("not a stored push") from wrong
    kinds = {f.name: type(getattr(run, f.name)) for f in fields(run)}
    if kinds != {**dict.fromkeys(kinds, str), "received": float}:
        raise ValueError("a field has another type")
    named = run.id in run_ids(run.app, run.ref, run.commit) and DNS_LABEL.fullmatch(run.id)
    pushed = SHA.fullmatch(run.commit) and valid_ref(run.ref) and math.isfinite(run.received)
    if not (named and pushed):
        raise ValueError("not a commit of a branch by its id")
    return run


# === kubectl ======================================================================================


OUTPUT_BYTES = 16 * 2**20  # of one call, or of one line of a watch; in Python it is some times that
COMPLAINT_BYTES = 2**20
API = {"jobs": "/apis/batch/v1", "pods": "/api/v1", "services": "/api/v1"}
PAGE = 100  # objects in one answer: a thousand Jobs at once are 50 MB of Python
MEMORY_BYTES = 160 * 2**20  # of a child: the largest kustomization that is read takes 130 MB
# A constant script: it sets the limits before the program begins, and for all that it starts.
# `preexec_fn` is not safe beside threads, and prlimit(2) may come too late. Never the address space
# (RLIMIT_AS), of which a Go program reserves more than it uses.
BOUNDED = ("/bin/sh", "-c", 'ulimit -d "$1"; ulimit -f "$2"; shift 2; exec "$@"', "sh")


def start(
    argv: Sequence[str], environ: Mapping[str, str] | None = None, **how: Any
) -> subprocess.Popen[bytes]:
    """Start a program, nothing of it read by a shell; raises ConfigError when it cannot be."""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    try:
        return subprocess.Popen(argv, env=environ, **how)  # noqa: S603 - no shell
    except OSError as missing:
        raise ConfigError([f"{argv[0]} cannot be started: {missing.strerror}"]) from missing


def execute(
    argv: Sequence[str],
    timeout: float,
    stdin: str = "",
    environ: Mapping[str, str] | None = None,
    file_bytes: int = OUTPUT_BYTES,
) -> tuple[int | None, bytes, bytes]:
    """Run a program to its end; return (exit code, stdout, stderr), the code None on a time-out.

    Its memory is bounded, and what it writes to a file or prints; no limit at all if that is 0.
    """
    if (program := shutil.which(argv[0])) is None:
        raise ConfigError([f"{argv[0]} cannot be started: {os.strerror(errno.ENOENT)}"])
    limits = (*BOUNDED, f"{MEMORY_BYTES >> 10}", f"{file_bytes >> 9}") if file_bytes else ()
    most = min(file_bytes or OUTPUT_BYTES, OUTPUT_BYTES)
    with memory_file(stdin.encode()) as given, memory_file() as out:
        how = {"stdin": given, "stdout": out, "process_group": 0}
        code, stderr = finish(start((*limits, program, *argv[1:]), environ, **how), timeout)
        if out.seek(0, os.SEEK_END) >= most:
            return -signal.SIGXFSZ, b"", f"more than {most >> 10} KiB of output".encode()
        out.seek(0)
        return code, out.read(), stderr


def memory_file(content: bytes = b"") -> IO[bytes]:
    """Return a file to talk to a program by: a full disk must not keep us from switching back."""
    try:
        memory = getattr(os, "memfd_create", None)  # Linux
        kind: Any = partial(os.fdopen, memory("file"), "w+b") if memory else tempfile.TemporaryFile
        file: IO[bytes] = kind()
    except OSError as refused:
        raise ConfigError([f"no program can be started: {refused.strerror}"]) from refused
    file.write(content)
    file.seek(0)
    return file


def finish(process: subprocess.Popen[bytes], timeout: float) -> tuple[int | None, bytes]:
    """Wait for the end of a group's leader; return its exit code, None on a time-out, and stderr.

    The rest of what is too long is read and dropped.
    """
    stderr, until = bytearray(), time.monotonic() + timeout
    with process, selectors.DefaultSelector() as pipe:
        pipe.register(cast(Any, process.stderr), selectors.EVENT_READ)
        while (left := until - time.monotonic()) > 0 and pipe.select(left):
            if chunk := os.read(cast(Any, process.stderr).fileno(), 65536):
                stderr += chunk[: COMPLAINT_BYTES - len(stderr)]
                continue
            with suppress(subprocess.TimeoutExpired):
                return process.wait(left), bytes(stderr)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while True:  # as process 1 of a container it inherits what its helpers left
                os.waitpid(-process.pid, 0)
    return None, bytes(stderr)


LOG_READ = 500 * 16 * 1024  # of 500 lines that is all, since container runtimes cut lines at 16 KiB


class Kubectl:
    """The one door to the cluster: each method is one kubectl process.

    Without `--request-timeout`, with which kubectl in a pod does not use the pod's account
    (kubernetes#93474): what does not end in time is ended here.
    """

    def __init__(self, metrics: Metrics, at_once: int = 8, program: str = "kubectl") -> None:
        self.program, self.metrics, self.at_once = program, metrics, at_once
        self._places = threading.BoundedSemaphore(at_once)

    def run(
        self, *args: str, namespace: str = "", stdin: str = "", timeout: float = KUBECTL_TIMEOUT
    ) -> str:
        """Return what one call prints; raises KubectlError, after a time-out of unknown effect."""
        with self._places:
            return self._call(args, namespace, stdin, timeout)

    def _call(self, args: Sequence[str], namespace: str, stdin: str, timeout: float) -> str:
        """Return what one call prints, without asking for a place."""
        code, *printed = execute((self.program, "-n", namespace, *args), timeout, stdin)
        stdout, stderr = (text.decode(errors="replace") for text in printed)
        failure = None if code == 0 else KubectlError([self.program, *args], code, stderr, stdout)
        self.metrics.kubectl.labels(args[0], failure.kind if failure else "ok").inc()
        if failure:
            raise failure
        return stdout

    def stream(self, *args: str, namespace: str) -> subprocess.Popen[bytes]:
        """Start a call that goes on: a watch, a rollout status. The caller ends it."""
        return start((self.program, "-n", namespace, *args))

    def get(self, resource: str, name: str, namespace: str) -> Object | None:
        """Return one object, or None when there is none."""
        args = ("get", f"{resource}/{name}", "-o", "json", "--ignore-not-found")
        found: Object | None = json.loads(self.run(*args, namespace=namespace).strip() or "null")
        return found

    def list(self, resource: str, namespace: str, *filters: str) -> list[Object]:
        """Return the objects that match, e.g. `-l`, "a=b" or `--field-selector`, "a=b"."""
        found = json.loads(self.run("get", resource, *filters, "-o", "json", namespace=namespace))
        return [*found["items"]]

    def pages(self, address: str, namespace: str) -> Iterator[Object]:
        """Yield a list in the API server's own words, some objects at a time."""
        token: str | None = ""
        while token is not None:
            args = ("get", "--raw", f"{address}&limit={PAGE}&continue={token}")
            yield (page := json.loads(self.run(*args, namespace=namespace)))
            token = page["metadata"].get("continue") or None

    def names(self, resource: str, namespace: str, labels: str) -> Sequence[str]:
        """Return the names of what has these labels; as a table, in which there is no content."""
        args = ("get", resource, "-l", labels, "--no-headers")
        rows = self.run(*args, namespace=namespace).split("\n")
        return [row.partition(" ")[0] for row in rows if row]

    def create(self, objects: Sequence[Object], namespace: str) -> None:
        """Create what is not there yet; what exists under the same name is left as it is."""
        for refused in self.create_each(objects, namespace).values():
            if refused.kind != "AlreadyExists":
                raise refused

    def create_each(self, objects: Sequence[Object], namespace: str) -> dict[str, KubectlError]:
        """Create objects in one call; return the refusal of each that was not created, by name.

        Exit 1 is not "nothing happened": kubectl creates what it can. It names what exists; the
        rest goes again, one at a time. Raises the KubectlError that is no object's own fault.
        """
        stdin = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        args = ("create", "-f", "-", "-o", "name", "--validate=false")
        try:
            self.run(*args, namespace=namespace, stdin=stdin, timeout=2 * KUBECTL_TIMEOUT)
        except KubectlError as failed:
            if failed.kind in ("Unreachable", "Forbidden", "NotFound"):
                raise
            named = {o["metadata"]["name"]: o for o in objects}
            if len(named) == 1:
                return dict.fromkeys(named, failed)
            exists = r'(?m)^Error from server \(AlreadyExists\): .*"([^"\n]+)" already exists$'
            known = re.finditer(exists, failed.stderr)
            told = {m[1]: KubectlError([self.program, *args], 1, m[0]) for m in known}
            refused = {name: told[name] for name in told.keys() & named.keys()}
            made = {line.rpartition("/")[2] for line in failed.stdout.split("\n")}
            for left in [o for n, o in named.items() if n not in made | refused.keys()]:
                refused |= self.create_each([left], namespace)
            return refused
        return {}

    def put(self, wanted: Object, found: Object | None, namespace: str, *options: str) -> str:
        """Write a whole object in the place of exactly what was read, or where nothing was.

        The server refuses unknown fields, and what was changed or made since (Conflict,
        AlreadyExists).
        """
        seen = {"resourceVersion": found["metadata"]["resourceVersion"]} if found else {}
        stdin = json.dumps({**wanted, "metadata": {**wanted["metadata"], **seen}})
        verb = "replace" if found else "create"
        return self.run(verb, "-f", "-", *options, namespace=namespace, stdin=stdin)

    def patch(self, resource: str, name: str, namespace: str, change: Object) -> Object:
        """Merge a change into an object, return it; with a resourceVersion it compares and sets."""
        # by stdin: one argument may not be larger than 128 KiB
        args = ("patch", f"{resource}/{name}", "--type=merge", "--patch-file=/dev/stdin", "-o=json")
        return dict(json.loads(self.run(*args, namespace=namespace, stdin=json.dumps(change))))

    def delete(self, resource: str, names: Iterable[str], namespace: str) -> None:
        """Delete objects by name without waiting; what is not there is fine."""
        if listed := [f"{resource}/{n}" for n in sorted(names)]:
            self.run("delete", *listed, "--wait=false", "--ignore-not-found", namespace=namespace)

    def logs(self, pod: str, container: str, namespace: str) -> str:
        """Return the last lines of a container, also of its last life; "" when there are none."""
        args = ("logs", pod, "-c", container, "--tail=500", f"--limit-bytes={LOG_READ}")
        for more in ((), ("--previous",)):
            with suppress(KubectlError):
                if printed := self.run(*args, *more, namespace=namespace, timeout=10.0).strip():
                    return printed[-2 * LOG_BYTES :]
        return ""

    def apart(self) -> Kubectl:
        """Return a door with one place of its own, whose calls are in nobody's way."""
        other = copy.copy(self)
        other._places = threading.BoundedSemaphore(1)
        return other


class UrgentKubectl(Kubectl):
    """A door with places of its own, for what cannot wait: to see health, and to take traffic back.

    A call that is not answered is made again and again, beside the one that hangs, and the first
    answer counts. So it is for reading, and for writes that compare and set or say the same twice.
    """

    AGAIN = 1.5  # seconds; a busy machine needs as long for an answer
    PATIENCE = (10.0, 4.0)  # seconds for the first process of a call, and for each one after it

    def run(
        self, *args: str, namespace: str = "", stdin: str = "", timeout: float = KUBECTL_TIMEOUT
    ) -> str:
        """Return what the first process prints that ends; raises KubectlError, ConfigError."""
        answers: queue.SimpleQueue[str | HookError] = queue.SimpleQueue()
        over, until = threading.Event(), time.monotonic() + timeout
        patience, again = self.PATIENCE

        def attempt(seconds: float) -> None:
            """Run one process, if there is a place for it while its answer is wanted."""
            if not self._places.acquire(timeout=seconds):
                return
            try:
                if not over.is_set():
                    answers.put(self._call(args, namespace, stdin, seconds))
            except HookError as failed:
                answers.put(failed)
            finally:
                self._places.release()

        try:
            while (left := until - time.monotonic()) > 0:
                seconds = min(left, patience)
                threading.Thread(target=attempt, args=(seconds,), daemon=True).start()
                patience = again
                with suppress(queue.Empty):
                    answer = answers.get(timeout=min(left, self.AGAIN))
                    if isinstance(answer, str):
                        return answer
                    if getattr(answer, "code", 0) is not None:  # None: only this process hung
                        raise answer
        finally:
            over.set()
        raise KubectlError([self.program, *args], None, "")


def list_address(resource: str, namespace: str, labels: str) -> str:
    """Return where the API server lists what has these labels."""
    path = f"{API[resource]}/namespaces/{namespace}/{resource}"
    return f"{path}?labelSelector={quote(labels, safe='')}"


# === git ==========================================================================================

CREDENTIAL_HELPER = (
    'credential.helper=!f() { test "$1" = get && test -r "$CREDENTIALS_FILE"'
    ' && git credential-store --file "$CREDENTIALS_FILE" get; }; f'
)
GIT = (
    *("git", "--literal-pathspecs", "-c", f"core.hooksPath={os.devnull}", "-c", CREDENTIAL_HELPER),
    # what is large is not unpacked in memory, and nothing file by file: one pack has one size
    *("-c", "core.bigFileThreshold=1m", "-c", "fetch.unpackLimit=1"),
)
GIT_ENVIRONMENT = {
    "GIT_ALLOW_PROTOCOL": "https:http:file",
    "GIT_ASKPASS": "",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_HTTP_LOW_SPEED_LIMIT": "1000",  # bytes a second; slower than that for so long is no answer
    "GIT_HTTP_LOW_SPEED_TIME": "60",
    "GIT_TERMINAL_PROMPT": "0",
}


HEADS_BYTES = 4 * 2**20  # of the list of branches; of some 40,000 with names of usual length
WARN_SECONDS = 3600.0
FOLDER_FILES = 500
GIT_FULL = re.compile(r"(?m)^(fatal|error): .*([Oo]ut of memory|Cannot allocate|File too large)")


class Git:
    """The one door to git: no hooks, no prompts, no submodules, nobody's configuration.

    Credentials are read by git's own helper from a file, so they are in no URL, argv or log.
    """

    def __init__(self, credentials: Path, timeout: float = GIT_TIMEOUT, limit: int = 2**26) -> None:
        self.credentials, self.timeout, self.limit = credentials, timeout, limit
        self.deployed: Mapping[str, Sequence[str]] = {}  # by address the refs that matter most
        self._places: dict[str, threading.Semaphore] = {}
        self._alone = threading.Semaphore()
        self._warned: dict[str, float] = {}  # by address, when of refs that are skipped

    def run(
        self,
        *args: str,
        directory: Path | None = None,
        patience: int = 1,
        file_bytes: int = OUTPUT_BYTES,
        stdin: str = "",
    ) -> str:
        """Return what one git call prints, bytes that are no UTF-8 as surrogates; or GitError."""
        kept = {k: v for k, v in os.environ.items() if not re.match(r"GIT_(?!SSL_)|LANG|LC_", k)}
        environ = {**kept, **GIT_ENVIRONMENT, "CREDENTIALS_FILE": str(self.credentials)}
        where = ("-C", str(directory)) if directory else ()
        timeout = patience * self.timeout
        code, *printed = execute((*GIT, *where, *args), timeout, stdin, environ, file_bytes)
        stdout, stderr = (text.decode(errors="surrogateescape") for text in printed)
        if code != 0:
            told = [a for a in args if not re.match(r"-|[A-Za-z.]+=", a)]  # the address above all
            raise GitError(("git", *told), code, stderr, stdout)
        return stdout

    def heads(self, url: str) -> dict[str, str]:
        """Return the commit of every branch, by full ref name; of too many only those deployed.

        Of one server, few at a time.
        """
        host = (normalise_url(url) or ("", ""))[0]
        place = self._places.setdefault(host, threading.Semaphore(HEADS_AT_ONCE))
        if not place.acquire(timeout=self.timeout):
            raise GitError(("git", "ls-remote"), None, f"too many wait for {clip(host)}")
        try:
            listed = self.run("ls-remote", "--heads", "--", url, file_bytes=HEADS_BYTES)
        except GitError as failed:
            full = failed.code == -signal.SIGXFSZ or GIT_FULL.search(failed.stderr)
            if not full or url not in self.deployed:
                raise
            listed = "\n".join(self._head(url, ref) for ref in self.deployed[url])
        finally:
            place.release()
        return self._carried(url, [line.partition("\t") for line in listed.split("\n")])

    def _head(self, url: str, ref: str) -> str:
        """Return a line with the commit of exactly this ref; empty where there is no such ref.

        A server that is asked to list refs lists all that end alike, and whoever may push any
        branch may push very many of these.
        """
        with tempfile.TemporaryDirectory(prefix="gitops-hook-") as folder:
            where: Any = {"directory": Path(folder)}
            self.run("init", "--quiet", "--bare", "--", folder)
            fetch = ("fetch", "--quiet", "--depth=1", "--filter=tree:0", "--no-tags")
            try:
                self.run(*fetch, "--", url, f"+{ref}:{ref}", **where)
            except GitError as failed:
                if "couldn't find remote ref" in failed.stderr:
                    return ""
                raise
            return self.run("for-each-ref", "--format=%(objectname)%09%(refname)", **where).strip()

    def _carried(self, url: str, lines: Sequence[tuple[str, str, str]]) -> dict[str, str]:
        """Return the commit of each ref, but for refs that we do not carry.

        Whoever may push one of those must not keep us from reading the others.
        """
        found = [(ref, sha) for sha, _, ref in lines if SHA.fullmatch(sha)]
        heads = {ref: sha for ref, sha in found if valid_ref(ref)}
        odd = [ref for ref, _ in found if ref not in heads]
        if len(heads) + len(odd) < len(found):
            raise GitError(("git", "ls-remote", url), 1, "it lists a branch twice")
        if odd and time.monotonic() > self._warned.get(url, 0.0):
            self._warned[url] = time.monotonic() + WARN_SECONDS
            first = clip(ascii(odd[0]), 120)
            warn("branches left out for their names", repository=url, count=len(odd), first=first)
        return heads

    def checkout(self, url: str, commit: str, directory: Path, *, symlinks: bool) -> None:
        """Put exactly this commit into a new directory; symlinks may become plain files."""
        self._init(commit, directory)
        fetch = ("fetch", "--quiet", "--depth=1", "--no-tags", "--", url, commit)
        # a large one takes its time; a server that does not send is cut off by the low speed
        self.run(*fetch, directory=directory, patience=10, file_bytes=0)
        links = f"core.symlinks={'true' if symlinks else 'false'}"
        write = ("-c", links, "checkout", "--quiet", "--detach", "FETCH_HEAD")
        self.run(*write, directory=directory, file_bytes=0)

    def _init(self, commit: str, directory: Path) -> None:
        if not SHA.fullmatch(commit):
            raise GitError(("git", "fetch"), 1, f"{commit!r} is not a commit id")
        form = {40: "sha1", 64: "sha256"}[len(commit)]
        self.run("init", "--quiet", f"--object-format={form}", "--", str(directory))

    @contextmanager
    def manifests(self, url: str, commit: str, path: str) -> Iterator[Path]:
        """Bring the top folder of a path at a commit; one block at a time reads what was brought.

        Raises StageError where that is too much, and GitError where another try may help.
        """
        top = (*PurePosixPath(path).parts, ".")[0]
        with tempfile.TemporaryDirectory(prefix="gitops-hook-") as folder:
            root = Path(folder) / "src"
            try:
                self._fetch_folder(url, commit, top, root)
                with self._alone:
                    self._write_folder(commit, top, root)
                    yield root
            except GitError as failed:
                known, full = failed.code == -signal.SIGXFSZ, GIT_FULL.search(failed.stderr)
                if known or full or any(f.lstat().st_size >= self.limit for f in root.rglob("*")):
                    why = failed.said if known else "git needs more disk or memory"
                    most = f"{FOLDER_FILES} files and {self.limit >> 20} MiB (limits.checkout)"
                    told = f"{clip(top, 80)!r} has more than {most}: {why}"
                    refuse(f"{told}; give the manifests a folder of their own")
                raise

    def _fetch_folder(self, url: str, commit: str, top: str, root: Path) -> None:
        """Fetch a commit without its files, then the files of a folder, once they are counted.

        A server that knows no filters sends all at once, to the same limit.
        """
        self._init(commit, root)
        remote = ("-c", f"remote.origin.url={url}", "-c", "remote.origin.promisor=true")
        fetch = (*remote, "fetch", "--quiet", "--no-tags", "--filter=blob:none")
        how: Any = {"directory": root, "patience": 10, "file_bytes": self.limit}
        self.run(*fetch, "--depth=1", "--", "origin", commit, **how)
        if blobs := "".join(f"{blob}\n" for _, _, blob, *_ in self._listed(commit, top, root)):
            self.run(*fetch, "--no-write-fetch-head", "--stdin", "origin", stdin=blobs, **how)

    def _write_folder(self, commit: str, top: str, root: Path) -> None:
        """Write out the files of a folder, once they are measured; links become plain files."""
        files = self._listed(commit, top, root, "--long")
        if (total := sum(int(size) for *_, size in files if size.isdigit())) > self.limit:
            raise GitError(("git", "ls-tree"), -signal.SIGXFSZ, f"it has {total >> 20} MiB")
        if files:
            write = ("-c", "core.symlinks=false", "checkout", "--quiet", commit, "--", top)
            self.run(*write, directory=root, file_bytes=self.limit)

    def _listed(self, commit: str, top: str, root: Path, *options: str) -> list[list[str]]:
        """Return mode, type, id and with --long the size of each file in a folder."""
        ask = ("ls-tree", "-r", "-z", *options, commit, "--", top)
        entries = self.run(*ask, directory=root, file_bytes=FOLDER_FILES * 4096).split("\0")[:-1]
        if len(entries) > FOLDER_FILES:
            raise GitError(("git", "ls-tree"), -signal.SIGXFSZ, f"it has {len(entries)} files")
        heads = [entry.partition("\t")[0].split() for entry in entries]
        return [head for head in heads if head[1] == "blob"]


# === job manifests ================================================================================

RUN_FIELDS = ("ref", "commit", "before", "title", "delivery")  # each an annotation of the Job
TEST_CONTAINER, BUILD_CONTAINER, RESULTS_CONTAINER = "test-runner", "kaniko", "results"
SOURCE, CREDENTIALS_MOUNT = "/workspace/src", "/var/run/gitops-hook"
BUILD_CONTEXT = "/kaniko/source/src"  # SOURCE, where no Dockerfile writes: kaniko leaves mounts out
# What every Job has; what every container has, fit for Pod Security `restricted`; what the builder
# has instead, which unpacks images over its own root, /tmp included, fit for `baseline`.
JOB, CONTAINER, BUILDER, REGISTRY = yaml.safe_load_all("""
apiVersion: batch/v1
kind: Job
spec:
  suspend: true  # so that the queue is in the cluster
  backoffLimit: 2
  podFailurePolicy:
    rules:  # in this order: an evicted test has an exit code too
    - {action: Ignore, onPodConditions: [{type: DisruptionTarget, status: "True"}]}
    - {action: FailJob, onExitCodes: {operator: NotIn, values: [0]}}
  template:
    spec:
      restartPolicy: Never
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: 5  # a shell as process 1 ignores SIGTERM anyway
      securityContext: {runAsNonRoot: true, runAsUser: 65532, runAsGroup: 65532, fsGroup: 65532,
                        seccompProfile: {type: RuntimeDefault}}
      volumes:
      - {name: workspace, emptyDir: {}}  # each with the size of what the main container may write
      - {name: tmp, emptyDir: {}}
      - {name: git, secret: {secretName: git-credentials, optional: true, defaultMode: 0400}}
---
env:
- {name: HOME, value: /tmp}
- {name: TERMINATION_LOG, value: /dev/termination-log}
- {name: JUNIT_XML, value: /workspace/results/junit.xml}
imagePullPolicy: IfNotPresent  # as the daemon's own: one of tag latest may be on the node only
resources: {requests: {cpu: 50m, memory: 64Mi, ephemeral-storage: 64Mi},
            limits: {cpu: 500m, memory: 512Mi, ephemeral-storage: 256Mi}}  # of what it prints
securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true,
                  capabilities: {drop: [ALL]}}
volumeMounts: [{name: workspace, mountPath: /workspace}, {name: tmp, mountPath: /tmp}]
---
env: [{name: container, value: kube}]  # it looks for that, or a token, before it writes to its root
securityContext: {runAsNonRoot: false, runAsUser: 0, runAsGroup: 0, allowPrivilegeEscalation: false,
  capabilities: {drop: [ALL], add: [CHOWN, DAC_OVERRIDE, FOWNER, SETUID, SETGID, SETFCAP]}}
volumeMounts: [{name: workspace, mountPath: /kaniko/source},
               {name: registry, mountPath: /kaniko/.docker}]
---
name: registry
secret: {secretName: registry-credentials, optional: true, defaultMode: 0400,
         items: [{key: .dockerconfigjson, path: config.json}]}
""")


def container(name: str, image: str, args: Sequence[str], **env: str) -> Object:
    """Return a container; Kubernetes expands $(NAME) and $$ in its texts: they are escaped."""
    made = {**CONTAINER, "name": name, "image": image, "args": [a.replace("$", "$$") for a in args]}
    told = [{"name": k, "value": v.replace("$", "$$")} for k, v in env.items()]
    return {**made, "env": [*CONTAINER["env"], *told]}


DISK = "ephemeral-storage"
# What a pod may write where the settings do not say: kaniko unpacks images over its own root.
DISK_LIMITS = {"test": "4Gi", "build": "10Gi"}


def bounded(resources: Mapping[str, Mapping[str, str]], limit: str) -> Object:
    """Return resources that bound the disk as well; a request of it is never above its limit."""
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    little = {} if DISK in {**requests, **limits} else {DISK: "256Mi"}
    most = {DISK: requests.get(DISK, limit), **limits}
    return {**resources, "requests": {**little, **requests}, "limits": most}


def job(config: Config, app: App, run: Run, stage: str, *containers: Object) -> Object:
    """Return the Job of a stage: side-cars and the clone of the commit, then the main container.

    Its deadline is only the backstop of a daemon that is down: waiting for quota counts towards it,
    so the time-out proper is the controller's.
    """
    *sidecars, main = containers
    labels = {LABEL_MANAGED: MANAGER, LABEL_APP: app.name, LABEL_RUN: run.id, LABEL_STAGE: stage}
    notes = {f"{MANAGER}/{name}": getattr(run, name) for name in RUN_FIELDS}
    notes |= {NOTE_REPOSITORY: app.repository, NOTE_RECEIVED: f"{run.received:.3f}"}
    meta: Object = {"name": f"{stage}-{run.id}", "namespace": config.namespaces[stage]}
    env = {"CLONE_URL": app.repository, "CLONE_COMMIT": run.commit, "CLONE_DIRECTORY": SOURCE}
    env["CREDENTIALS_FILE"] = f"{CREDENTIALS_MOUNT}/{GIT_CREDENTIALS}"
    clone = container("clone", config.images.hook, ["clone"], **env)
    git = {"name": "git", "mountPath": CREDENTIALS_MOUNT}
    made: Object = copy.deepcopy(JOB)
    spec, template, settings = made["spec"], made["spec"]["template"], getattr(app, stage)
    made["metadata"] = {**meta, "labels": labels, "annotations": notes}
    spec["activeDeadlineSeconds"] = int(settings.timeout + config.limits.queue_timeout)
    spec["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"] = main["name"]
    template["metadata"] = {"labels": labels}
    resources = bounded(settings.resources, DISK_LIMITS[stage])
    template["spec"] |= {
        "serviceAccountName": f"{stage}-runner-sa",
        # a side-car first: it is listening long before the tests can end
        "initContainers": [*sidecars, {**clone, "volumeMounts": [*clone["volumeMounts"], git]}],
        "containers": [{**main, "resources": resources}],
    }
    for volume in (v for v in template["spec"]["volumes"] if "emptyDir" in v):
        volume["emptyDir"]["sizeLimit"] = resources["limits"][DISK]
    return made


def test_job(config: Config, app: App, run: Run) -> Object:
    """Return the Job that checks out the commit, runs its tests and sums up their report."""
    results = container(RESULTS_CONTAINER, config.images.hook, ["collect"])
    env = {"CI": "true", "GIT_BRANCH": run.branch, "GIT_COMMIT": run.commit}
    tests = container(TEST_CONTAINER, app.test.image, [app.test.command], **env)
    tests |= {"command": ["sh", "-ec"], "workingDir": SOURCE}
    return job(config, app, run, "test", {**results, "restartPolicy": "Always"}, tests)


def build_job(config: Config, app: App, run: Run) -> Object:
    """Return the Job that builds and pushes the image; its last words are the digest."""
    options = [f"--context=dir://{BUILD_CONTEXT}", f"--dockerfile={app.build.dockerfile}"]
    options += [f"--destination={app.build.image}:{run.commit[:8]}", *app.build.args]
    options += ["--digest-file=/dev/termination-log"]
    build = container(BUILD_CONTAINER, config.images.kaniko, options)
    made = job(config, app, run, "build", {**build, **BUILDER})
    made["spec"]["template"]["spec"]["volumes"] += [REGISTRY]
    return made


def run_of_job(found: Object) -> Run:
    """Return the run that a Job of ours belongs to."""
    notes, labels = (found["metadata"].get(k) or {} for k in ("annotations", "labels"))
    given = {name: str(notes.get(f"{MANAGER}/{name}", "")) for name in RUN_FIELDS}
    known = {"id": labels.get(LABEL_RUN, ""), "app": labels.get(LABEL_APP, "")}
    return Run(**known, **given, received=seconds_of(notes.get(NOTE_RECEIVED)))


def seconds_of(value: Any) -> float:
    """Return a number of seconds kept as text, or 0 for anything else."""
    with suppress(TypeError, ValueError, OverflowError):
        seconds = float(value)
        return seconds if math.isfinite(seconds) else 0.0
    return 0.0


def junit_summary(report: Path) -> str:
    """Return the counts and the first failures of a JUnit report, "" when it cannot be read.

    It is the tests' own: a document type, which could declare entities, is refused, and how much
    is read the container's memory limits.
    """
    parser: Any = ElementTree.XMLPullParser(("end",))
    try:
        content = report.read_bytes()
        parser.feed(b"" if b"<!DOCTYPE" in content else content)
        parser.close()
        cases = [case for _, case in parser.read_events() if case.tag == "testcase"]
    except (OSError, ValueError, LookupError, ElementTree.ParseError):
        return ""
    red = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    names = [clip(f"{c.get('classname', '')}.{c.get('name', '')}", 120) for c in red[:5]]
    told = f": {', '.join(names)}" if names else ""
    return f"{len(cases) - len(red) - skipped} passed, {len(red)} failed{told}"


# === app manifests ================================================================================

MANIFEST_BYTES = 2 * 1024 * 1024  # of all files that are read, or of what kustomize prints
MANIFEST_NODES = 50_000  # keys and values in them, a kilobyte of memory each
LONGEST_NUMBER = 1000  # characters
CONFIGMAP_BYTES = 1024 * 1024 - 4096  # what the API server takes, its own additions left out
UNSHAPED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
INVALID = Reason.MANIFEST_INVALID
AppObjects = dict[str, dict[str, Object]]  # by kind and name: one Deployment, one Service, and maps
KINDS = {"Deployment": "apps/v1", "Service": "v1", "ConfigMap": "v1"}
DATA = ("data", "binaryData")  # of a ConfigMap
GENTLE = {"maxSurge": 1, "maxUnavailable": 0}
SERVICE_ACCOUNTS = ("serviceAccountName", "serviceAccount")
CONFIGMAP_REFERENCES = ("configMap", "configMapRef", "configMapKeyRef")
# What a folder may not say, by the key under which it stands: each would let one application's
# commit move another's traffic, pods or credentials, or reach the nodes. All other fields of a
# Deployment and a Service are applied as they are, and Pod Security judges them. A field that is
# empty, 0 or false says nothing and may stay.
HOST = "shares the node's; leave it out"
ROOT = "gives root on the node; leave it out"
EVICTS = "lets these pods evict those of others; leave it out"
ASKS = "lets the node ask another host; leave it out, and the pod itself is asked"
TOOL = "is what a tool or the cluster writes for itself; leave it out"
APART = "keeps nodes from pods of other namespaces; leave it out"
ELSEWHERE = ("namespaces", "namespaceSelector")
REFUSED = {
    "spec.externalIPs": "takes traffic for addresses of others; use a Service of type LoadBalancer",
    "spec.externalName": "leads to another host than the pods; write its name into a ConfigMap",
    "spec.publishNotReadyAddresses": "sends visitors to pods that are not ready; leave it out",
    "spec.nodeName": "goes past the scheduler; use nodeSelector or affinity",
    "spec.priorityClassName": EVICTS,
    "spec.priority": EVICTS,
    **{f"spec.{name}": HOST for name in ("hostNetwork", "hostPID", "hostIPC")},
    "ports.hostPort": "takes a port of the node; reach the pods through the Service",
    "securityContext.privileged": ROOT,
    "windowsOptions.hostProcess": ROOT,
    **{f"requiredDuringSchedulingIgnoredDuringExecution.{n}": APART for n in ELSEWHERE},
    "httpGet.host": ASKS,
    "tcpSocket.host": ASKS,
    "annotations.kubectl.kubernetes.io/last-applied-configuration": TOOL,
    "annotations.deployment.kubernetes.io/revision": TOOL,
}
OBJECT = {"apiVersion", "kind", "metadata"}
# Where only these fields may stand, and what is said of any other.
ALLOWED: dict[str, tuple[set[str], str]] = {
    "Deployment": ({*OBJECT, "spec"}, TOOL),
    "Service": ({*OBJECT, "spec"}, TOOL),
    "ConfigMap": ({*OBJECT, *DATA, "immutable"}, TOOL),
    "metadata": (
        {"name", "namespace", "labels", "annotations"},
        "is for the cluster to set, or ties it to other objects; leave it out",
    ),
    "volumes": (
        {
            *("name", "configMap", "secret", "emptyDir", "projected", "downwardAPI", "csi"),
            *("persistentVolumeClaim", "ephemeral", "image"),
        },
        "reaches the node or a disk past the cluster; use a persistentVolumeClaim",
    ),
    "sources": (  # of a projected volume; trust bundles are public
        {"configMap", "secret", "downwardAPI", "clusterTrustBundle"},
        "gives the pod credentials of the cluster; mount a Secret of this namespace",
    ),
}
MOST_REPLICAS = 1000
REFUSALS_TOLD = 10  # at once; the rest is counted
KUSTOMIZATIONS = ("kustomization.yaml", "kustomization.yml", "Kustomization")
KUSTOMIZATION_VISITS = 100  # each counts as often as it is named, since they multiply
KUSTOMIZE_PATHS = {  # the keys under which kustomize reads, or fetches, what is named there
    *("resources", "bases", "components", "crds", "configurations", "patches"),
    *("patchesstrategicmerge", "path", "files", "envs", "env"),
}
KUSTOMIZE_TEXTS = {"commonlabels", "commonannotations", "labels", "metadata", "generatoroptions"}
GO_FULL = re.compile(r"(?m)^fatal error: .*(out of memory|cannot allocate memory)")
KUSTOMIZE_REFUSED = {"generators", "transformers", "validators", "helmcharts", "helmglobals"}


class ManifestLoader(yaml.SafeLoader):
    """YAML with dates as texts, as kubectl reads it. The loader in C dies of deep nesting."""

    nodes = 0

    def count(self, nodes: int) -> None:
        """Count nodes, unless there were too many."""
        self.nodes += nodes
        if self.nodes > MANIFEST_NODES:
            raise yaml.YAMLError(f"more than {MANIFEST_NODES} keys and values")

    def compose_node(self, *where: Any) -> yaml.Node | None:
        """Return the next node; a long number is none, as reading one takes its length squared."""
        self.count(1)
        node: yaml.Node | None = super().compose_node(*where)
        number = isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float"))
        if node and number and len(node.value) > LONGEST_NUMBER:
            raise yaml.YAMLError(f"a number of {len(node.value)} characters{node.start_mark}")
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what `<<` names into a mapping, and so count it each time that it is put anywhere."""
        super().flatten_mapping(node)
        self.count(len(node.value))


ManifestLoader.yaml_implicit_resolvers = {
    first: [known for known in forms if not known[0].endswith(":timestamp")]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class Room:
    """How much may still be read for one environment, over all its files."""

    def __init__(self) -> None:
        self.bytes, self.characters = MANIFEST_BYTES, 2 * MANIFEST_BYTES + 2**19

    def take(self, source: str, amount: int = 0, expanded: int = 0) -> None:
        """Take bytes of a file, or characters of what its anchors expand to; end the run at 0."""
        self.bytes -= amount
        self.characters -= expanded
        if self.bytes < 0:
            told = f"the manifests that are read have more than {MANIFEST_BYTES >> 20} MiB together"
            refuse(f"{source}: {told}; take out what is not needed", INVALID)
        if self.characters < 0:
            refuse(f"{source}: expands to too much; its anchors multiply", INVALID)


def parse_documents(text: str, source: str, room: Room | None = None) -> list[Object]:
    """Return the documents of a YAML or JSON text; faults name file and line."""
    chunks, in_json, room = [], source.endswith(".json"), room or Room()
    try:
        read = [json.loads(text)] if in_json else yaml.load_all(text, ManifestLoader)
        # through JSON: what it cannot say is refused, and what anchors share is copied, to a limit
        for chunk in json.JSONEncoder(allow_nan=False, ensure_ascii=False).iterencode([*read]):
            chunks.append(chunk)
            room.take(source, expanded=len(chunk))
        documents = [d for d in json.loads("".join(chunks)) if d is not None]
    except (yaml.YAMLError, *UNSHAPED) as wrong:
        said = str(wrong).replace('"<unicode string>", ', "")
        refuse(f"{source}: {clip(said)}", INVALID)
    if not all(isinstance(d, dict) for d in documents):
        refuse(f"{source}: a document is not a mapping (links are not followed)", INVALID)
    return documents


def parse_objects(text: str, source: str, room: Room | None = None) -> list[tuple[str, Object]]:
    """Return the Kubernetes objects in a text, those in Lists too, each with what to call it."""
    found: list[Any] = []
    for document in parse_documents(text, source, room):
        items, kind = document.get("items"), str(document.get("kind"))
        found += items if isinstance(items, list) and kind.endswith("List") else [document]
    try:
        names = [" ".join((o["kind"], o["metadata"]["name"])) for o in found]
    except (KeyError, TypeError):
        refuse(f"{source}: not a Kubernetes object, kind or metadata.name is missing", INVALID)
    return [(f"{source}: {clip(n, 100)}", o) for n, o in zip(names, found, strict=True)]


def read_text(root: Path, file: Path, room: Room) -> tuple[str, str]:
    """Return the text of a file of the commit, and its path in there."""
    source = str(file.relative_to(root))
    if file.is_symlink() or not file.is_file():
        refuse(f"{source}: not a plain file", INVALID)
    room.take(source, file.stat().st_size)
    try:
        return file.read_bytes().decode("utf-8-sig"), source
    except UnicodeDecodeError:
        refuse(f"{source}: not UTF-8", INVALID)


def read_manifests(root: Path, path: str) -> list[tuple[str, Object]]:
    """Return the objects of an app's manifests folder, plain or built by kustomize."""
    root, directory, room = root.resolve(), (root / path).resolve(), Room()
    if not directory.is_dir() or not directory.is_relative_to(root):
        refuse(f"there is no folder {path!r} in the commit", INVALID)
    if any((directory / k).exists() for k in KUSTOMIZATIONS):
        check_kustomization(root, directory, [], room)
        return parse_objects(kustomize(directory), f"{path}/kustomization", room)
    files = [f for f in sorted(directory.iterdir()) if f.suffix in (".yaml", ".yml", ".json")]
    texts = [read_text(root, f, room) for f in files if not f.name.startswith(".")]
    return [o for text in texts for o in parse_objects(*text, room)]


def walk(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield a value and all that is in it, each with the key it stands under."""
    yield key, value
    listed = [(key, v) for v in value] if isinstance(value, list) else []
    for name, inner in value.items() if isinstance(value, dict) else listed:
        yield from walk(name, inner)


def check_kustomization(root: Path, directory: Path, visits: list[str], room: Room) -> None:
    """Refuse a kustomization that names what is not in the commit: kubectl would fetch it."""
    for file in [directory / k for k in KUSTOMIZATIONS if (directory / k).exists()]:
        text, where = read_text(root, file, room)
        visits.append(where)
        if len(visits) > KUSTOMIZATION_VISITS:
            refuse(f"{where}: includes itself, or is one of too many")
        documents = parse_documents(text, where, room)
        if len(documents) != 1:
            refuse(f"{where}: one document is needed", INVALID)
        # kustomize is to read what is checked here: its YAML is of another dialect
        file.write_text(json.dumps(documents[0]))
        for path in kustomize_paths(documents, where):
            # kustomize takes a URL for one, and github.com too, even where a file has that name
            named = re.fullmatch(r"(?!github\.com)[\w./ +=~-]{1,200}", path, re.IGNORECASE)
            target = (directory / path).resolve() if named else root.parent
            if not target.is_relative_to(root) or not target.exists():
                refuse(f"{where}: {clip(path, 80)!r} is not in the commit; copy it there")
            if target.is_dir():
                check_kustomization(root, target, visits, room)


def kustomize_paths(documents: Iterable[Object], where: str) -> list[str]:
    """Return every text in a kustomization that kustomize takes for a path."""
    items = [i for d in documents for i in d.items() if i[0].casefold() not in KUSTOMIZE_TEXTS]
    # kustomize does not tell upper from lower case in keys
    found = [(k.casefold(), v) for item in items for k, v in walk(*item)]
    if refused := KUSTOMIZE_REFUSED & {k for k, _ in found}:
        refuse(f"{where}: {min(refused)} is not supported; put what it makes into the repository")
    paths = [(k, v) for k, v in found if k in KUSTOMIZE_PATHS and isinstance(v, str)]
    outside = [(k, v) for k, v in paths if not (k.startswith("patches") and "\n" in v)]
    return [v.rpartition("=")[2] if k == "files" else v for k, v in outside]


def kustomize(directory: Path) -> str:
    """Return what `kubectl kustomize` makes of a folder, without git, network and home."""
    with tempfile.TemporaryDirectory() as home:
        closed = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
        environ = {"PATH": home, "HOME": home, "GOMAXPROCS": "1", **closed}
        argv = ("kubectl", "kustomize", str(directory))
        code, *printed = execute(argv, KUBECTL_TIMEOUT, "", environ, MANIFEST_BYTES)
    stdout, stderr = (text.decode(errors="replace") for text in printed)
    if code != 0:
        said = clip(stderr.replace(str(directory), "")) or "it makes too much, or does not end"
        memory = f"it takes more than {MEMORY_BYTES >> 20} MiB of memory; make it smaller"
        refuse(f"kustomize: {memory if GO_FULL.search(stderr) else said}", INVALID)
    return stdout


def refusals(item: Object, namespace: str) -> Iterator[str]:
    """Yield what an object of an app may not say, each with what to do about it."""
    shown = {k: "any" if k in DATA else v for k, v in item.items()}
    for key, part in walk(item["kind"], shown):
        allowed, advice = ALLOWED.get(key, (None, ""))
        for field, value in part.items() if isinstance(part, dict) else ():
            name = f"{key}.{clip(field, 80)}"
            if not value and not (value == {} and name in REFUSED):  # an empty selector is of all
                continue
            if name in REFUSED:
                yield f"{name} {REFUSED[name]}"
            elif key in ("labels", "annotations") and field.startswith(f"{MANAGER}/"):
                yield f"{name} is this program's own; leave it out"
            elif allowed and field not in allowed:
                yield f"{name} {advice}"
            elif name == "metadata.namespace" and value != namespace:
                yield f"names a namespace that is not {namespace!r}; leave it out"


def check_objects(
    app: App, namespace: str, found: Iterable[tuple[str, Object]]
) -> tuple[AppObjects, list[str]]:
    """Return the objects of an app, and what is ignored; end the run before anything changes.

    All that is refused is told at once.
    """
    kept: AppObjects = {kind: {} for kind in KINDS}
    ignored, refused = [], dict[str, None]()
    for where, item in found:
        kind, version = item["kind"], clip(str(item.get("apiVersion")), 40)
        name = item["metadata"]["name"]
        if kind in app.deploy.ignore_kinds:
            ignored.append(where)
            continue
        if (kind, version) not in KINDS.items():
            advice = "is not deployed; apply it, list its kind in ignore_kinds"
            refused[f"{where} of {version} {advice}"] = None
            continue
        if name in kept[kind]:
            refuse(f"{where} is there twice", INVALID)
        kept[kind][name] = item
        try:
            refused |= dict.fromkeys(f"{where}: {each}" for each in refusals(item, namespace))
        except RecursionError:
            refuse(f"{where}: nested too deeply", INVALID)
    if len(kept["Deployment"]) != 1 or list(kept["Service"]) != [app.name]:
        names = (", ".join(kept[kind]) or "none" for kind in ("Deployment", "Service"))
        told = clip("; Services: ".join(names))
        needed = f"needed: one Deployment and one Service {app.name!r}; Deployments: {told}"
        refused[needed] = None
    if refused:
        more = [f"and {len(refused) - REFUSALS_TOLD} more"] * (len(refused) > REFUSALS_TOLD)
        refuse("; ".join([*[*refused][:REFUSALS_TOLD], *more]))
    return kept, ignored


def manifest(kind: str, name: str, labels: Mapping[str, str], given: Object) -> Object:
    """Return an object with our labels, and the labels and annotations of a repository's."""
    meta: Object = {"name": name}
    for field in ("labels", "annotations"):
        meta[field] = {**(given.get(field) or {})}
    meta["labels"] |= {**labels, LABEL_MANAGED: MANAGER}
    return {"apiVersion": KINDS[kind], "kind": kind, "metadata": meta}


def immutable(name: str, labels: Mapping[str, str], given: Object, **content: Any) -> Object:
    """Return an immutable ConfigMap, its name followed by eight digits of its content's hash."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False).encode()
    if len(text) > CONFIGMAP_BYTES:
        refuse(f"ConfigMap {clip(name, 60)} of {len(text)} bytes: {CONFIGMAP_BYTES} are possible")
    made = manifest("ConfigMap", name, labels, given)
    # the app counts too: what two apps shared would go with the first of them
    hashed = labels[LABEL_APP].encode() + b" " + text
    if given:
        hashed += json.dumps(made["metadata"], sort_keys=True).encode()
    made["metadata"]["name"] += f"-{hashlib.sha256(hashed).hexdigest()[:8]}"
    return {**made, "immutable": True, **content}


def substance(configmap: Object) -> tuple[Any, ...]:
    """Return what counts of an immutable ConfigMap, as the API server keeps it."""
    texts, files = ({k: v or "" for k, v in (configmap.get(d) or {}).items()} for d in DATA)
    content = texts, {k: base64.b64decode(v) for k, v in files.items()}
    return configmap["metadata"].get("labels"), configmap.get("immutable"), content


def ports_like(ports: Iterable[Object], live: Iterable[Object] = ()) -> list[Object]:
    """Return ports with the node ports that a live Service has for them; none where it has none."""
    nodes = {(p["port"], p.get("protocol")): p["nodePort"] for p in live if p.get("nodePort")}
    made = []
    for port in ports:
        node = nodes.get((port["port"], port.get("protocol") or "TCP"))
        known = {"nodePort": node, **port} if node else port
        made.append({k: v for k, v in known.items() if nodes or k != "nodePort"})
    return made


def release_record(app: str, packed: str) -> Object:
    """Return the immutable ConfigMap with a packed release; its name tells whether it is whole."""
    labels = {LABEL_APP: app, LABEL_STAGE: "release"}
    return immutable(f"{app}-release", labels, {}, binaryData={"release": packed})


@dataclass(frozen=True, slots=True)
class Release:
    """The rendered objects of one run in one environment: what applying it again needs."""

    run: str
    commit: str
    image: str
    colour: str
    selector: dict[str, str]
    deployment: Object
    configmaps: list[Object]
    service: Object

    @property
    def ports(self) -> list[Object]:
        """The ports of the run's Service."""
        return list(self.service["spec"]["ports"])

    @property
    def wanted(self) -> int:
        """How many replicas the run was rendered with."""
        return int(self.deployment["spec"]["replicas"])

    def configmap(self, app: str) -> Object:
        """Return the immutable ConfigMap that records the release."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        packed = base64.b64encode(zlib.compress(json.dumps(content, sort_keys=True).encode()))
        return release_record(app, packed.decode())

    @classmethod
    def from_configmap(cls, found: Object) -> Release:
        """Return the release that a ConfigMap records; raises StageError when it cannot be read."""
        try:
            packed = base64.b64decode(found["binaryData"]["release"])
            return cls(**json.loads(zlib.decompress(packed)))
        except (KeyError, TypeError, ValueError, zlib.error):
            refuse("a release record cannot be read", INVALID)


def render(app: App, run: Run, image: str, place: tuple[str, int], objects: AppObjects) -> Release:
    """Return everything that a run puts into a place: a colour, and the size of the live one; pure.

    Only what is read here must have the right shape; the rest is for the API server to judge.
    """
    colour, live_replicas = place
    selector = {LABEL_APP: app.name, LABEL_VERSION: colour, LABEL_RUN: run.id}
    try:
        given = copy.deepcopy(objects)
        (deployment,) = given["Deployment"].values()
        service = live_service(app, given["Service"][app.name], selector)
        copies = {name: copied(app, m) for name, m in given["ConfigMap"].items()}
        pod = deployment["spec"]["template"]["spec"]
        if {pod.get(k) for k in SERVICE_ACCOUNTS} - {None, "", "default"}:
            refuse("the Deployment names a service account; its pods get the namespace's default")
        for key, value in walk("", pod):
            named = key in CONFIGMAP_REFERENCES and isinstance(value, dict) and value.get("name")
            if named in copies:
                value["name"] = copies[named]["metadata"]["name"]
        set_images(app, pod, image)
        set_probes(app, pod, service["spec"]["ports"][0])
        made = manifest("Deployment", f"{app.name}-{colour}", selector, deployment["metadata"])
        made["metadata"]["annotations"][NOTE_COMMIT] = run.commit
        made["spec"] = coloured(app, deployment["spec"], selector, live_replicas)
        identity = (run.id, run.commit, image, colour, selector)
        release = Release(*identity, made, [*copies.values()], service)
        release.configmap(app.name)  # refuses what is too large before anything changes
    except UNSHAPED as wrong:
        near = clip(repr(getattr(wrong, "obj", None) or wrong), 80)
        told = f"the Deployment or the Service is not formed well, near {near}"
        refuse(f"{told}; `kubectl apply --dry-run=server` on them says more", INVALID)
    return release


def live_service(app: App, given: Object, selector: Mapping[str, str]) -> Object:
    """Return the live Service as a first deployment creates it; later only its ports change."""
    spec, ports = given["spec"], ports_like(given["spec"]["ports"])
    if not ports or (len(ports) > 1 and not all(p.get("name") for p in ports)):
        refuse(f"Service {app.name} needs ports, and of several each a name", INVALID)
    if spec.get("type") == "ExternalName":
        refuse(f"Service {app.name} is an ExternalName, which selects no pods")
    labels = {LABEL_APP: app.name, LABEL_STAGE: "live"}
    made = manifest("Service", app.name, labels, given["metadata"])
    return {**made, "spec": {**spec, "selector": selector}}


def copied(app: App, given: Object) -> Object:
    """Return the immutable copy of a ConfigMap, its labels and annotations with it."""
    name, content = given["metadata"]["name"], {k: given.get(k) or {} for k in DATA}
    meta = {k: v for k, v in given["metadata"].items() if v and k in ("labels", "annotations")}
    if loose := [k for k, v in content["data"].items() if not isinstance(v, str | None)]:
        refuse(f"ConfigMap {clip(name, 60)}: {clip(loose[0], 60)} is not a text: quote it", INVALID)
    return immutable(name, {LABEL_APP: app.name}, meta, **content)


def repository_of(image: str) -> str:
    """Return the name of an image without its tag and digest."""
    host, slash, name = image.partition("@")[0].rpartition("/")
    return f"{host}{slash}{name.partition(':')[0]}"


def set_images(app: App, pod: Object, image: str) -> None:
    """Put the built image, by digest, wherever the manifests name it; end the run if nowhere.

    With builder none every image must already be named by digest.
    """
    containers = [*pod["containers"], *(pod.get("initContainers") or ())]
    images = [c["image"] for c in containers]
    if app.build.builder == "none":
        if loose := [i for i in images if not DIGEST.fullmatch(i.partition("@")[2])]:
            refuse(f"builder none: image {clip(loose[0], 120)!r} is not named by digest")
        return
    names = {app.build.image, app.name}
    ours = [c for c in containers if repository_of(c["image"]) in names]
    if not ours:
        refuse(f"no container's image is {app.build.image!r} (or {app.name!r}): nothing to set")
    for container in ours:
        container["image"] = image


def set_probes(app: App, pod: Object, port: Object) -> None:
    """Add a readiness probe and a preStop sleep where the app says nothing; never a liveness."""
    containers, inits = pod["containers"], pod.get("initContainers") or ()
    running = [*containers, *(c for c in inits if c.get("restartPolicy") == "Always")]
    target = port.get("targetPort") or port["port"]
    declared = [(c, p) for c in running for p in c.get("ports") or ()]
    serving = [c for c, p in declared if target in (p.get("name"), p.get("containerPort"))]
    if not serving and not isinstance(target, int):
        refuse(f"targetPort {clip(str(target), 60)!r} is no port of a container", INVALID)
    if not any(c.get("readinessProbe") for c in running):
        probe = {"httpGet": {"path": app.deploy.health.path, "port": target}}
        times = {"initialDelaySeconds": 5, "periodSeconds": 5}
        (serving or containers)[0]["readinessProbe"] = {**probe, **times}
    # Kubernetes refuses a sleep that is longer than the grace period
    if seconds := min(5, pod.get("terminationGracePeriodSeconds", 30)):
        sleep = {"preStop": {"sleep": {"seconds": seconds}}}
        for container in containers:
            container["lifecycle"] = {**sleep, **(container.get("lifecycle") or {})}


def coloured(app: App, spec: Object, selector: Mapping[str, str], live_replicas: int) -> Object:
    """Return the spec of a run's Deployment. What the app says stays, but labels and size."""
    meta = spec["template"].get("metadata") or {}
    labels = {**(meta.get("labels") or {}), LABEL_MANAGED: MANAGER, **selector}
    replicas = max(spec.get("replicas") or 0, live_replicas, 1)
    if replicas > MOST_REPLICAS:
        refuse(f"{replicas} replicas: {MOST_REPLICAS} are possible")
    calm = spec.get("minReadySeconds", 10)
    longest = max(app.deploy.rollout_timeout, replicas * max(ROLLOUT_PER_REPLICA, calm + 10))
    return {
        "minReadySeconds": 10,
        "revisionHistoryLimit": 3,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": GENTLE},
        **spec,
        "replicas": replicas,
        "paused": False,
        "progressDeadlineSeconds": max(int(longest), calm + 1),
        "selector": {"matchLabels": {k: selector[k] for k in (LABEL_APP, LABEL_VERSION)}},
        "template": {**spec["template"], "metadata": {**meta, "labels": labels}},
    }


# === cluster mirror ===============================================================================

SHORT_WATCH = 5.0  # a watch that ends so soon did not work
ODD = (AttributeError, LookupError, TypeError, ValueError)  # what another shape raises
# exit reasons after a machine was lost: they tell nothing about the program
NODE_LOST = ("ContainerStatusUnknown", "Unknown")
# what the kubelet says of such a pod; of a full node's pods it says "The node was low on resource"
OVERFULL = re.compile(
    r"Usage of EmptyDir volume|Pod ephemeral local .* exceeds|Container \S+ exceeded"
)
START = re.compile("(Create|Run)Container.*Error|StartError|ContainerCannotRun")


def epoch(stamp: str | None) -> float:
    """Return a Kubernetes time in seconds since the epoch, 0 for none."""
    with suppress(ValueError):
        return datetime.fromisoformat(stamp or "").timestamp()
    return 0.0


def true_condition(status: Object, *kinds: str) -> Object:
    """Return the first condition of one of these types that is True; empty when there is none."""
    found: list[Object] = status.get("conditions") or []
    return next((c for c in found if c["type"] in kinds and c["status"] == "True"), {})


class Container:
    """What a pod's status says about one container, in its current or last life."""

    def __init__(self, entry: Object, kind: str) -> None:
        state, last = entry.get("state") or {}, entry.get("lastState") or {}
        waiting = state.get("waiting") or {}
        ended = state.get("terminated") or last.get("terminated") or {}
        ended = {} if ended.get("reason") in NODE_LOST else ended
        self.name: str = entry["name"]
        self.kind = kind  # init, sidecar or app
        self.ready, self.running = bool(entry.get("ready")), "running" in state
        self.waiting: str = waiting.get("reason", "")
        self.words: str = ended.get("message") or ""  # its last ones: as good as lines of its log
        self.text: str = waiting.get("message") or ""  # of kubelet and runtime
        if not self.text and START.fullmatch(ended.get("reason", "")):
            self.text = self.words
        self.exits: int = (entry.get("restartCount") or 0) + (bool(ended) and not self.running)
        self.exit_code: int | None = ended.get("exitCode")  # of the last life that ended by itself
        self.exit_reason: str = ended.get("reason", "")
        self.ended = epoch(ended.get("finishedAt"))


class Pod:
    """What matters of a pod."""

    def __init__(self, found: Object) -> None:
        meta, spec, status = found["metadata"], found["spec"], found.get("status") or {}
        conditions = {c["type"]: c for c in status.get("conditions") or []}
        scheduled, ready = conditions.get("PodScheduled", {}), conditions.get("Ready", {})
        is_ready, changed = ready.get("status") == "True", epoch(ready.get("lastTransitionTime"))
        stuck, deleting = scheduled.get("reason") == "Unschedulable", "deletionTimestamp" in meta
        evicted, message = status.get("reason") == "Evicted", str(status.get("message"))
        disrupted = bool(true_condition(status, "DisruptionTarget"))
        inits, apps = (status.get(k) or [] for k in ("initContainerStatuses", "containerStatuses"))
        always = [c["name"] for c in spec.get("initContainers") or [] if "restartPolicy" in c]
        kinds = ["sidecar" if e["name"] in always else "init" for e in inits]
        self.name: str = meta["name"]
        self.version = int(meta["resourceVersion"])
        self.labels = {sys.intern(k): sys.intern(v) for k, v in (meta.get("labels") or {}).items()}
        self.run = self.labels.get(LABEL_RUN, "")
        # its uid: a deleted Job's pods may outlive it, beside a new one of the same name
        self.job = self.labels.get("batch.kubernetes.io/controller-uid", "")
        self.created = epoch(meta.get("creationTimestamp"))
        self.started = epoch(status.get("startTime"))
        self.ready = is_ready and not deleting
        self.changed = changed  # when it was last seen to become ready, or not to be any more
        # now or before: a condition that was never True is as old as the pod's start
        self.seen_ready = is_ready or 0 < self.started < changed - 1
        # by the kubelet's words, of a Job's pod that wrote more than it may: its own fault
        self.overfull = message.strip() if self.job and OVERFULL.match(message) else ""
        self.overfull = self.overfull if evicted and not disrupted else ""
        # the cluster takes it away, and replaces it
        self.leaving = deleting or disrupted or (evicted and not self.overfull)
        self.stays = not self.leaving and status.get("phase") not in ("Failed", "Succeeded")
        self.unschedulable: str = scheduled["message"] if stuck else ""
        self.containers = [*map(Container, inits, kinds), *(Container(e, "app") for e in apps)]


class Job:
    """What matters of a Job of ours."""

    def __init__(self, found: Object) -> None:
        meta, status = found["metadata"], found.get("status") or {}
        done = true_condition(status, "Complete")
        failed = true_condition(status, "Failed", "FailureTarget")
        waiting = "suspended" if found["spec"].get("suspend") else "active"
        notes: dict[str, str] = meta.get("annotations") or {}
        self.name: str = meta["name"]
        self.uid: str = meta["uid"]
        self.version = int(meta["resourceVersion"])
        self.namespace: str = meta["namespace"]
        self.stage: str = (meta.get("labels") or {}).get(LABEL_STAGE, "")
        self.run = run_of_job(found)
        self.notes = {k: v for k, v in notes.items() if k.startswith(MANAGER)}
        # of the run, if it has ended and this is its last Job
        self.outcome = notes.get(NOTE_OUTCOME, "")
        self.state = "succeeded" if done else "failed" if failed else waiting
        self.deleting = "deletionTimestamp" in meta
        self.reason: str = failed.get("reason", "")
        self.created = epoch(meta.get("creationTimestamp"))
        self.released = epoch(status.get("startTime"))
        self.finished = epoch((done or failed).get("lastTransitionTime"))


# Records are read from annotations, which anyone may write who may write the object: a field that
# does not hold what it may is left out, and so is one that nobody knows.
FAR_FUTURE = 1e11  # seconds since the epoch


def text(pattern: str) -> Callable[[Any], bool]:
    """Return whether a value is a text that matches the whole pattern, as a function."""
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def is_selector(value: Any) -> bool:
    """Whether a value can stand for a selector."""
    key, term = text(r"[\w./-]{1,317}"), text(r"[\w.-]{0,63}")
    return isinstance(value, dict) and all(key(k) and term(v) for k, v in value.items())


def are_ports(value: Any) -> bool:
    """Whether a value can stand for the ports of a Service."""
    whole = isinstance(value, list) and all(isinstance(p, dict) for p in value)
    return whole and all(type(p.get("port")) is int for p in value)


Name = Annotated[str, text(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?)?")]
Word = Annotated[str, text("[A-Za-z-]{0,40}")]
Prose = Annotated[str, text(r"(?s).{0,2000}")]
Colour = Annotated[str, text(f"({'|'.join(COLOURS)})?")]
Time = Annotated[float, lambda v: type(v) in (int, float) and 0 <= v < FAR_FUTURE]
Size = Annotated[int, lambda v: type(v) is int and 0 < v < 10**6]
Selector = Annotated[dict[str, str], is_selector]
PROVEN = (Outcome.DEPLOYED, ADOPTED)  # the outcomes of what a rollback may go to


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryEntry:
    """One switch of a live Service, as its annotation records it."""

    selector: Selector
    run: Name = ""
    commit: Annotated[str, text(f"({SHA.pattern})?")] = ""
    image: Annotated[str, text(r"[\x21-\x7e]{0,1000}")] = ""
    colour: Colour = ""
    ports: Annotated[list[Object], are_ports] = dataclass_field(default_factory=list)
    release: Name = ""  # the ConfigMap of its release
    replicas: Size = 1
    at: Time = 0.0
    by: Prose = ""  # who switched, or changed the selector since
    outcome: Word = ""  # none while it bakes, and where the bake told nothing
    reason: Word = ""
    detail: Prose = ""
    was: Selector = dataclass_field(default_factory=dict)  # what was narrowed to adopt it
    unjudged: Annotated[bool, lambda v: v is True] = False  # its bake could not tell its health
    v: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """Who is changing an environment, and what is to be put back there."""

    phase: Word
    run: Name = ""
    colour: Colour = ""
    since: Time = 0.0
    heal: Name = ""  # the release of the rollback target that stood in the colour
    v: int = 1


RECORDS = {kind: get_type_hints(kind, include_extras=True) for kind in (HistoryEntry, Claim)}


def read_record(kind: type[Any], record: Any) -> Object:
    """Return a record with all its fields; empty when it lacks the first one."""
    checks = {k: h.__metadata__[0] for k, h in RECORDS[kind].items() if hasattr(h, "__metadata__")}
    given = record if isinstance(record, dict) else {}
    fitting = {k: given[k] for k, check in checks.items() if k in given and check(given[k])}
    return asdict(kind(**fitting)) if fitting.get(next(iter(checks))) else {}


class Service:
    """The live Service of an app, with what our annotations on it say as far as it can be read.

    `run`: what today's traffic reaches, as far as the selector names it; `claim`: who is changing
    this environment; `history`: the switches, newest first. Each is empty when there is none.
    """

    def __init__(self, found: Object) -> None:
        meta, spec = found["metadata"], found["spec"]
        self.name: str = meta["name"]
        self.uid: str = meta.get("uid", "")
        self.version = int(meta["resourceVersion"])
        self.ports: list[Object] = spec.get("ports") or []
        self.selector: dict[str, str] = spec.get("selector") or {}
        self.run = self.selector.get(LABEL_RUN, "")
        # whether the selector names a run of ours, whatever else it asks for
        self.ours = self.selector.keys() >= {LABEL_APP, LABEL_VERSION, LABEL_RUN}
        self._notes: dict[str, str] = meta.get("annotations") or {}
        self.claim = read_record(Claim, self.note(NOTE_CLAIM, {}))
        told = (read_record(HistoryEntry, e) for e in self.note(NOTE_HISTORY, []))
        self.history = [e for e in told if e]

    @classmethod
    def recorded(cls, name: str, entry: Object) -> Service:
        """Return the Service that an entry is the whole history of."""
        notes = {NOTE_HISTORY: json.dumps([entry])}
        meta = {"name": name, "resourceVersion": "0", "annotations": notes}
        return cls({"metadata": meta, "spec": {"selector": entry["selector"]}})

    def note(self, key: str, empty: Any) -> Any:
        """Return the JSON in an annotation; empty when it is missing, broken or of another type."""
        with suppress(KeyError, ValueError, RecursionError):
            value = json.loads(self._notes[key])
            return value if isinstance(value, type(empty)) else empty
        return empty

    def notes(self) -> Object:
        """Return what our annotations say, as it is written; None for what is not there."""
        told = {NOTE_PREVIOUS: {}, NOTE_BAKE: 0.0, NOTE_PUT_BACK: []}
        return {
            NOTE_HISTORY: self.history or None,
            NOTE_CLAIM: self.claim or None,
            **{key: self.note(key, empty) or None for key, empty in told.items()},
        }

    @property
    def live(self) -> Object:
        """The entry of what today's traffic reaches."""
        same = (e for e in self.history if self.run and e["run"] == self.run)
        return next((e for e in self.history if e["selector"] == self.selector), next(same, {}))

    @property
    def in_order(self) -> bool:
        """Whether the selector is what the history says that it was set to last."""
        return self.live.get("selector") == self.selector and self.live == self.served

    @property
    def served(self) -> Object:
        """The entry of what is live as far as it is recorded, whatever the selector says now."""
        return next((e for e in self.history if e["outcome"] in ("", *PROVEN)), {})

    def entry(self, run: str, since: float = 0.0) -> Object:
        """Return the newest history entry of a run made at or after a time; empty when none."""
        ours = (e for e in self.history if e["run"] == run)
        return next((e for e in ours if e["at"] >= since), {})

    def reaches(self, entry: Object) -> bool:
        """Whether an entry is of what today's traffic reaches."""
        return entry["selector"] == self.selector or bool(self.run and entry["run"] == self.run)

    @property
    def targets(self) -> list[Object]:
        """The entries that a rollback can go to: the proven versions before the live one."""
        live, good = self.live, dict[str, Object]()
        if not (live or self.run):
            return []
        for entry in self.history[self.history.index(live) + 1 :] if live else self.history:
            if entry["outcome"] in PROVEN and not (entry["reason"] or self.reaches(entry)):
                good.setdefault(entry["run"], entry)
        return [*good.values()]

    def target(self, back: int = 1) -> Object:
        """Return the entry that a rollback goes to: the back-th proven version before the live."""
        return self.targets[back - 1] if 0 < back <= len(self.targets) else {}

    @property
    def before(self) -> Object:
        """What was live before, proven or not, if it is known; else where a rollback goes."""
        was = self.note(NOTE_PREVIOUS, {})
        stood = (e for e in self.history if e["selector"] == was and not self.reaches(e))
        return next(stood, {}) or self.target()


def app_service(names: Iterable[str], found: Object) -> Service | None:
    """Return the live Service of one of these apps; another Service is none of our business."""
    return Service(found) if found["metadata"]["name"] in names else None


V = TypeVar("V", Job, Pod, Service)


class Watch(Generic[V]):
    """A mirror of one resource type in one namespace: a list, then what changes after it.

    Both are the API server's own words, `kubectl get --raw`: its list carries the version from
    which its watch tells every change, one a line and in order. A watch's exit code says nothing,
    and a silent one may be dead: each ends after some time, and all is listed anew.
    """

    def __init__(
        self,
        kubectl: Kubectl,
        resource: str,
        namespace: str,
        view: Callable[[Object], V | None],
        selector: str,
    ) -> None:
        self.kubectl, self.resource, self.namespace = kubectl, resource, namespace
        self._address = list_address(resource, namespace, selector)
        self.changed, self.stopped = threading.Event(), threading.Event()
        # why it may not follow what is there: what it lacks is then not gone, only unseen
        self.trouble, self._lock = "not listed yet", threading.RLock()
        self._view: Callable[[Object], V | None] = view
        self._items: dict[str, V] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def items(self) -> list[V]:
        """Return what is known now."""
        with self._lock:
            return list(self._items.values())

    def find(self, name: str) -> V | None:
        """Return what is known now of one object."""
        with self._lock:
            return self._items.get(name)

    def learn(self, found: Object) -> None:
        """Take over what a patch returned, before the watch tells; what is gone stays so."""
        with self._lock:
            if found["metadata"]["name"] in self._items:
                self._take("MODIFIED", found)

    def stop(self) -> None:
        """End the watch; its thread returns."""
        self.stopped.set()
        if process := self._process:
            process.kill()

    def run(
        self, pulse: Callable[[], None] = lambda: None, changed: threading.Event | None = None
    ) -> None:
        """Keep the mirror until stopped; back off while the API server does not answer."""
        self.changed, failures = changed or self.changed, 0
        while not self.stopped.is_set():
            pulse()
            try:
                lost = self._follow(self._list(), pulse)
            except HookError as failed:
                lost = str(failed)
            except ODD as wrong:
                lost = f"not an API server's answer: {clip(repr(wrong))}"
            if lost and not (failures or self.stopped.is_set()):
                warn("watch lost", resource=self.resource, namespace=self.namespace, detail=lost)
            self.trouble, failures = lost, failures + 1 if lost else 0
            self.stopped.wait(backoff(failures - 1) if lost else 0.1)

    def _list(self) -> str:
        """Learn what is there; return the version at which that was so."""
        found: dict[str, V] = {}
        for page in self.kubectl.pages(self._address, self.namespace):
            found |= {v.name: v for v in map(self._read, page["items"]) if v}
        with self._lock:
            self._items = {name: self._newer(seen) for name, seen in found.items()}
        self.trouble = ""
        self.changed.set()
        return str(page["metadata"]["resourceVersion"])

    def _follow(self, version: str, pulse: Callable[[], None]) -> str:
        """Let what changes after a version change the mirror; return why it was no good watch."""
        began, seconds = time.monotonic(), math.ceil(jittered(WATCH_SECONDS))
        query = f"&watch=true&resourceVersion={version}&timeoutSeconds={seconds}"
        args = ("get", "--raw", self._address + query)
        process = self._process = self.kubectl.stream(*args, namespace=self.namespace)
        # for a silent server, and for a stop before there was a process
        deadline = threading.Timer(0 if self.stopped.is_set() else seconds * 1.05, process.kill)
        try:
            deadline.start()
            pulse()
            # of a line that is too long only a part is read, which is no JSON
            for line in iter(partial(cast(Any, process.stdout).readline, OUTPUT_BYTES), b""):
                pulse()
                event = json.loads(line.decode(errors="replace"))
                if event["type"] == "ERROR":  # 410 above all: the version is forgotten
                    break
                self._take(event["type"], event["object"])
        finally:
            deadline.cancel()
            process.kill()
            _, stderr = process.communicate()
        said = clip(stderr.decode(errors="replace")) or "ended at once"
        return said if time.monotonic() - began < SHORT_WATCH else ""

    def _take(self, kind: str, found: Object) -> None:
        """Let one event change the mirror."""
        if seen := self._read(found):
            with self._lock:
                if kind == "DELETED":
                    self._items.pop(seen.name, None)
                else:
                    self._items[seen.name] = self._newer(seen)
            self.changed.set()

    def _newer(self, seen: V) -> V:
        """Return what was told of an object, or what a patch returned of it since."""
        return max(seen, self._items.get(seen.name, seen), key=lambda view: view.version)

    def _read(self, found: Object) -> V | None:
        """Return the view of an object, if it has one; unreadable, what was last seen of it."""
        try:
            return self._view(found)
        except ODD:
            name = found["metadata"]["name"]
            error("object cannot be read", exc=True, resource=self.resource, name=clip(name))
            self.kubectl.metrics.errors.labels("watch").inc()
            return self._items.get(name)


def jittered(seconds: float) -> float:
    """Return about so many seconds, so that what failed together does not come back together."""
    return seconds * random.uniform(0.7, 1.3)  # noqa: S311 - it hides nothing


def backoff(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row."""
    return jittered(DELAYS[min(failures, len(DELAYS) - 1)])


# === decide =======================================================================================
# Pure: observed state in, what to do next out. Nothing here starts a program or asks for the time.

LAG = 10.0  # seconds that the pods' watch may be behind the Jobs'
NEVER = float("inf")
PULL = re.compile("ErrImage.*|ImagePullBackOff|ImageInspectError|InvalidImageName|Registry.*")
HOPELESS_PULL = re.compile(
    r"(?i)not found|(manifest|name) unknown|denied|unauthorized|forbidden|authentication required"
    r"|no basic auth|insufficient_scope|authorization failed|invalid reference|InvalidImageName"
    r"|couldn't parse image|does not exist|no match for platform"
)
HEALING_REFUSAL = re.compile(
    "Internal error|timed? ?out|etcd|cannot be fulfilled|status unknown|being terminated"
)
STAGES = {  # who works, who leaves its last words where, and how it fails
    "test": (TEST_CONTAINER, RESULTS_CONTAINER, NOTE_SUMMARY, Reason.TESTS_FAILED),
    "build": (BUILD_CONTAINER, BUILD_CONTAINER, NOTE_DIGEST, Reason.BUILD_FAILED),
}
Do = StrEnum("Do", "NOTHING WAIT RELEASE BUILD NOTE DEPLOY END")


@dataclass(frozen=True, slots=True)
class Symptom:
    """Something wrong with a pod that cannot heal once it lasts for `grace` seconds, or recurs."""

    key: str
    reason: Reason
    detail: str
    grace: float = 0.0
    times: int = 0
    cause: str = ""


def container_symptom(container: Container, pod: Pod) -> Symptom | None:
    """Return what is wrong with a container, by the texts a real cluster gives."""
    code, why, waiting = container.exit_code, container.exit_reason, container.waiting
    key, name = f"{pod.name}/{container.name}", f"container {container.name} of {pod.name}"
    text = f"{name}: {clip(container.text, 800)}"
    if PULL.fullmatch(waiting):
        unquoted = re.sub(r'"[^"]*"', "", container.text)  # an image may be called what it likes
        if HOPELESS_PULL.search(f"{waiting}: {unquoted}"):
            return Symptom(f"{key}/pull", Reason.IMAGE_NOT_FOUND, text)
        return Symptom(f"{key}/pull", Reason.IMAGE_PULL_FAILED, text, 60.0)
    if not container.running and (START.fullmatch(waiting) or START.fullmatch(why)):
        grace = NEVER if "failed to sync" in text else 30.0  # the kubelet's cache, not the object
        return Symptom(f"{key}/start", Reason.CONTAINER_CONFIG, text, grace)
    worked, oom = container.ready or pod.seen_ready, why == "OOMKilled"
    done = code is None or (code == 0 and container.kind != "app")
    if done or (worked and not oom) or (pod.job and container.kind == "sidecar"):
        return None
    reason = Reason.INIT_FAILED if container.kind == "init" else Reason.CRASH_LOOP
    reason, cause = Reason.OUT_OF_MEMORY if oom else reason, f"{code} ({why})"
    text = f"{name} ended {container.exits} times, last with exit code {cause}"
    grace = NEVER if worked or container.exits == 1 else 15.0
    return Symptom(f"{key}/exit", reason, text, grace, container.exits, cause)


def pod_symptoms(pod: Pod) -> Iterator[Symptom]:
    """Yield what is wrong with a pod; one that the cluster takes away is replaced, not sick."""
    if pod.leaving:
        return
    if pod.overfull:
        yield Symptom(f"{pod.name}/disk", Reason.OUT_OF_DISK, clip(pod.overfull))
    if pod.unschedulable:
        yield Symptom(f"{pod.name}/schedule", Reason.UNSCHEDULABLE, clip(pod.unschedulable), 120.0)
    yield from filter(None, (container_symptom(c, pod) for c in pod.containers))


def creation_symptom(message: str, key: str) -> Symptom:
    """Return why pods cannot be created, from a FailedCreate event or ReplicaFailure condition."""
    if "exceeded quota" in message:
        return Symptom(f"{key}/quota", Reason.QUOTA_EXCEEDED, clip(message), 15.0)
    heals = re.search(HEALING_REFUSAL, message)
    return Symptom(f"{key}/create", Reason.ADMISSION_REFUSED, clip(message), 60.0 if heals else 3.0)


class Doom:
    """Remembers since when each symptom is there, and so tells which one will not heal."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, Symptom]] = {}

    def verdict(self, symptoms: Iterable[Symptom], now: float) -> Symptom | None:
        """Return a symptom that has lasted too long or recurred; what is gone is forgotten."""
        present = {s.key: s for s in symptoms}
        self._first = {k: self._first.get(k, (now, s)) for k, s in present.items()}
        for key, found in present.items():
            since, first = self._first[key]
            again = found.times > first.times and found.cause == first.cause
            unwatched = first.times > 1 and found.grace < NEVER
            if again or unwatched or now - since >= found.grace:
                return found
        return None


@dataclass(frozen=True, slots=True)
class Action:
    """The next step of a run: what, and why."""

    do: Do
    stage: str = ""
    reason: Reason = Reason.OK
    detail: str = ""
    outcome: Outcome | None = None


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
    doomed: Symptom | None
    busy: frozenset[str]  # environments that a worker is changing
    now: float
    queue_timeout: float
    slot: bool = True  # whether one more Job of the run may start

    @property
    def report(self) -> str:
        """The sentence of the test report, if there is one."""
        test = self.jobs.get("test")
        return clip(test.notes.get(NOTE_SUMMARY, ""), 1000) if test else ""


def newest(jobs: Mapping[str, Job]) -> Run:
    """Return the run of a group of Jobs, as the one has it that was made or opened again last."""
    return max((j.run for j in jobs.values()), key=lambda run: run.received)


def over(jobs: Mapping[str, Job]) -> bool:
    """Whether a run has ended: its last Job says so, and not of the time before it was received."""
    last = jobs.get("build") or jobs["test"]
    ended = seconds_of(last.notes.get(NOTE_ENDED))
    return bool(last.outcome) and ended >= newest(jobs).received


def ends(outcome: Outcome, reason: Reason, detail: str, stage: str) -> Action:
    """Return that a run has ended."""
    return Action(Do.END, stage, reason, detail, outcome)


def decide(view: View) -> Action:
    """Return the next step of a run from what is observed; every call could be the first."""
    test, build = (view.jobs.get(stage) for stage in STAGES)
    if not view.jobs or over(view.jobs):
        return Action(Do.NOTHING)
    if test and (action := decide_job(view, test)):
        return action
    if view.run.ref != view.app.deploy_ref or not view.app.deploy.environments:
        return ends(Outcome.TESTED, Reason.OK, view.report, "test")
    if view.app.build.builder == "none":
        return decide_deploy(view)
    if not build or build.outcome:  # of the time before
        return decide_start(view, Do.BUILD, "build")
    return decide_job(view, build) or decide_deploy(view)


def outdated(view: View, stage: str) -> Action | None:
    """Return how a run ends, or that it waits for git, unless its commit is its ref's newest."""
    deploys = view.run.ref == view.app.deploy_ref  # another ref needs no git
    if view.head == "moved" if deploys else view.newer:
        return ends(Outcome.SUPERSEDED, Reason.NOT_HEAD, "the branch was pushed again", stage)
    if deploys and view.head == "unknown":
        return Action(Do.WAIT, stage, Reason.GIT_ERROR, "for the head of the branch")
    return None


def decide_start(view: View, do: Do, stage: str) -> Action:
    """Return whether a Job may start: of the newest commit, and where there is a free slot."""
    if action := outdated(view, stage):
        return action
    if view.slot:
        return Action(do, stage)
    if do is Do.RELEASE and view.now - view.jobs[stage].created > view.queue_timeout:
        return ends(Outcome.FAILED, Reason.QUEUE_TIMEOUT, "no free slot in time", stage)
    return Action(Do.WAIT, stage, detail="for a free slot")


def decide_job(view: View, found: Job) -> Action | None:
    """Return what a Job needs, or None when it has succeeded and said what it had to."""
    stage, (_, teller, note, _) = found.stage, STAGES[found.stage]
    if found.deleting:
        return Action(Do.WAIT, stage, detail=f"Job {found.name} is being deleted")
    if found.state == "suspended":
        return decide_start(view, Do.RELEASE, stage)
    pods = [p for p in view.pods if p.job == found.uid and not p.leaving]
    pods.sort(key=lambda p: -p.created)
    ended = [c for p in pods for c in p.containers if c.exit_code is not None]
    said = next((c.words.strip() for c in ended if c.name == teller and c.words), "")
    if note not in found.notes and (said if stage == "test" else DIGEST.fullmatch(said)):
        return Action(Do.NOTE, stage, detail=said)
    if found.state == "succeeded":
        return None if stage == "test" or note in found.notes else no_digest(view, found)
    if view.doomed:
        return ends(Outcome.FAILED, view.doomed.reason, view.doomed.detail, stage)
    failed, started = found.state == "failed", max((p.started for p in pods), default=0.0)
    return failure(view, found, ended) if failed else lateness(view, found, started)


def no_digest(view: View, build: Job) -> Action:
    """Return what to do about a finished build that left no digest: it is made once more."""
    if view.now - build.finished < LAG:
        return Action(Do.WAIT, "build", detail="for the digest")
    if NOTE_REMADE in build.notes:
        return ends(Outcome.FAILED, Reason.NO_DIGEST, "the build left no digest, twice", "build")
    return decide_start(view, Do.BUILD, "build")


def lateness(view: View, found: Job, started: float) -> Action:
    """Return what a released Job waits for, or which of its times is over."""
    stage, why = found.stage, found.notes.get(NOTE_DETAIL, "")
    limit = getattr(view.app, stage).timeout
    if started and view.now - started > limit:
        return ends(Outcome.FAILED, Reason.TIMEOUT, f"no result within {limit:.0f} s", stage)
    if not started and found.released and view.now - found.released > view.queue_timeout:
        why = why or "no pod could start in time"
        return ends(Outcome.FAILED, Reason.QUEUE_TIMEOUT, why, stage)
    return Action(Do.WAIT, stage, detail="its pod runs" if started else why or "for its pod")


def failure(view: View, found: Job, ended: Iterable[Container]) -> Action:
    """Return why a Job failed, by its pods or its own condition, or that they may yet tell."""
    main, _, _, red = STAGES[found.stage]
    report = view.report if found.stage == "test" else ""
    told = next((c for c in ended if c.exit_code and c.name in (main, "clone")), None)
    if told and told.exit_reason == "OOMKilled":
        reason, detail = Reason.OUT_OF_MEMORY, f"{told.name} was killed for its memory"
    elif told:
        # the clone's words are our own; those of pushed code may hold anything
        said = clip(told.words if told.name == "clone" else told.text)
        said = said or f"exit code {told.exit_code}"
        reason, detail = (red, report or said) if told.name == main else (Reason.CLONE_FAILED, said)
    elif found.reason == "DeadlineExceeded":
        reason, detail = Reason.TIMEOUT, "the Job's deadline passed"
    elif view.now - found.finished < LAG:
        return Action(Do.WAIT, found.stage, detail="for its pod's last words")
    else:
        reason = red if found.reason == "PodFailurePolicy" else Reason.VANISHED
        detail = report or f"its pods left no result ({clip(found.reason, 60)})"
    return ends(Outcome.FAILED, reason, detail, found.stage)


def decide_deploy(view: View) -> Action:
    """Return which environment comes next, or how the run ended there."""
    name, ended = "", (Outcome.SWITCHED_BACK, Outcome.ROLLED_BACK, Outcome.FAILED)
    for name in view.app.deploy.environments:
        service = view.services.get(name)
        switched = service is not None and service.run == view.run.id
        last = name == view.app.deploy.environments[-1]
        entry = service.entry(view.run.id, view.run.received) if service else {}
        live = service.live if service and switched else {}
        done = Outcome.DEPLOYED in (live.get("outcome"), entry.get("outcome"))
        # whoever confirmed it a moment ago may yet take the traffic back
        if done and not (switched and last and name in view.busy):
            continue
        if name in view.busy:
            return Action(Do.WAIT, name, detail=f"{name} is being changed")
        if (outcome := entry.get("outcome")) in ended:
            known = [r for r in Reason if r == entry.get("reason")] or [Reason.SICK_AFTER_SWITCH]
            return ends(Outcome(outcome), known[0], str(entry.get("detail", "")), name)
        stale = None if switched else outdated(view, name)
        return stale or Action(Do.DEPLOY, name)
    return ends(Outcome.DEPLOYED, Reason.OK, view.report, name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One Job that runs, or that a run wants to start."""

    run: str
    app: str
    deploys: bool
    received: float = 0.0


def grant_slots(
    wanted: Sequence[Slot], running: Sequence[Slot], served: Mapping[str, float], limit: int
) -> set[str]:
    """Return the runs that may start a Job now; `served` says when each app last started one.

    Deploy branches come before test-only branches, then apps in turn, then the newest push. One
    slot is left to deploy branches. An app has at most half of the slots while another one waits.
    """
    used, turns, granted = [*running], dict(served), set[str]()
    while True:
        tests = sum(not s.deploys for s in used)
        room_for_tests = tests < max(limit - 1, 1)
        waiting = [s for s in wanted if s.run not in granted and (s.deploys or room_for_tests)]
        apps = Counter(s.app for s in used)
        alone = len({s.app for s in waiting}) == 1
        most = limit if alone else (limit + 1) // 2
        fair = [s for s in waiting if apps[s.app] < most]
        if len(used) >= limit or not fair:
            return granted
        best = min(fair, key=lambda s: (not s.deploys, turns.get(s.app, 0.0), -s.received))
        granted.add(best.run)
        used.append(best)
        turns[best.app] = NEVER


def head_word(run: Run, heads: Mapping[str, str] | None, age: float, now: float) -> str:
    """Return what read heads say about a run: same, moved, or unknown where they are too old.

    A server that still shows the commit before the push may only lag behind its own webhook.
    """
    if heads is None or age > HEAD_FRESH:
        return "unknown"
    if (head := heads.get(run.ref, "")) == run.commit:
        return "same"
    lagging = head == run.before or (not head and set(run.before) == {"0"})
    return "unknown" if lagging and now - run.received < HEAD_GRACE else "moved"


def sickness(pods: Iterable[Pod], since: float) -> str:
    """Return how an app container of a switched-to run failed on its own since a time, or ""."""
    for pod in (p for p in pods if not p.leaving):
        for found in (c for c in pod.containers if c.kind == "app" and c.ended >= int(since)):
            if code := found.exit_code:
                return f"container {found.name} of {pod.name} ended with exit code {code}"
    return ""


def unready(pods: Iterable[Pod], since: float) -> list[Pod]:
    """Return the pods of the switch that are not ready, by the word of their own containers."""
    # not by the Ready condition: that falls with a lost node, too, which is no sickness
    old = (p for p in pods if p.created <= since and not p.leaving)
    return [p for p in old if not all(c.ready for c in p.containers if c.kind == "app")]


def shortage(pods: Iterable[Pod], since: float, now: float, *, starting: bool) -> Symptom | None:
    """Return how a switched-to run has too few ready pods, and for how long it may have.

    Since when it is so the pods say themselves, to a daemon that was not there to see it. No pod is
    there by the cluster's doing; `starting`: others are, in the place of those it took away.
    """
    pods = [*pods]
    down, served = unready(pods, since), any(p.ready for p in pods)
    if served and not down:
        return None
    grace = UNREADY_SECONDS if served else GONE_SECONDS
    grace = REPLACED_SECONDS if starting and not down else grace
    who = ", ".join(p.name for p in down) or "any pod"
    lasts = down and now - max(p.changed for p in down) > grace + 1.0  # it is in whole seconds
    key, detail = f"{served} {grace}", f"not ready for {grace:.0f} s: {who}"
    return Symptom(key, Reason.SICK_AFTER_SWITCH, detail, 0.0 if lasts else grace)


def disturbed(pods: Sequence[Pod], wanted: int) -> bool:
    """Whether the cluster took pods of a run away: eviction, a lost node, a deletion."""
    stayed = [p for p in pods if not p.leaving]
    asleep = (p for p in stayed if not p.ready and {c.ready for c in p.containers} == {True})
    running = [p for p in pods if any(c.running for c in p.containers)]
    return any(asleep) or len(stayed) < max(wanted, len(running))


@dataclass(slots=True)
class Checks:
    """What the health checks of a switched-to version have said, and for how long they did."""

    failures: int = 0  # in a row
    passes: int = 0  # in a row, none of them long after the one before
    refusal: str = ""
    judged: float = 0.0  # seconds
    at: float = -NEVER  # when the last one ended

    def add(self, now: float, refusal: str | None, *, clear: bool) -> None:
        """Take over one; the time since the last counts if that is near, and nothing is hidden."""
        gap = now - self.at
        near = gap <= CHECK_GAP
        self.judged += gap if near and clear else 0.0
        self.passes = 0 if refusal else 1 + (self.passes if near else 0)
        self.failures = self.failures + 1 if refusal else 0
        self.refusal = refusal or ""
        self.at = now

    def passing(self, now: float) -> int:
        """Return how many in a row have passed, up to now."""
        return self.passes if now - self.at <= CHECK_GAP else 0


def ahead(old: tuple[int, int], new: tuple[int, int]) -> int:
    """Return above 0 when a larger share of the old version's pods is well than of the new one's.

    Each is how many are well, and of how many: a version may have more pods than the one before.
    """
    return old[0] * max(new[1], 1) - new[0] * max(old[1], 1)


class Drift(StrEnum):
    """What a live selector is that someone else set."""

    NONE = ""
    KEPT = "Kept"  # it reaches the version that is recorded as live, and nothing else
    MOVED = "Moved"  # all traffic reaches one other run of the app: that is live now
    WIDENED = "Widened"  # it reaches another run of the app beside the recorded one: put back
    CONTESTED = "SelectorContested"  # the same, after it was put back too often
    ELSEWHERE = "Elsewhere"  # it reaches other pods, or none: somebody's intention


def runs_of(app: str, pods: Iterable[Pod]) -> set[str]:
    """Return the runs that pods are of, "" among them for a pod that is of no run of the app."""
    return {p.run if p.labels.get(LABEL_APP) == app else "" for p in pods}


def drift_of(recorded: str, reached: set[str], put_backs: int) -> Drift:
    """Return what a selector is that someone else set.

    From the run that is recorded as live, the runs of the pods that it reaches, and how often it
    was put back of late.
    """
    if not reached or "" in reached:
        return Drift.ELSEWHERE
    if len(reached) == 1:
        return Drift.KEPT if recorded in reached else Drift.MOVED
    if recorded not in reached:
        return Drift.ELSEWHERE
    return Drift.CONTESTED if put_backs >= PUT_BACKS else Drift.WIDENED


def moved(history: Sequence[Object], entry: Object, by: str, now: float) -> list[Object]:
    """Return a history in which someone else has made an entry's run the live one.

    It stays proven if it was. What is newer was left by that, and is no target any more.
    """
    place = history.index(entry) if entry in history else 1
    left = {"reason": str(Reason.SELECTOR_CHANGED), "detail": f"left by {by}"}
    newer = [e if e["reason"] else {**e, **left} for e in history[:place]]
    outcome = entry["outcome"] if entry["outcome"] in PROVEN else ""
    again = {**entry, "outcome": outcome, "reason": "", "detail": "", "by": by, "at": now}
    return [again, *newer, *(e for e in history[place:] if e != entry)][:HISTORY_LENGTH]


def chosen(service: Service, to: int | str) -> Object:
    """Return the history entry that a rollback goes to: so many proven versions back, or a run's.

    Raises RefusedError where there is none, or it is what is to be left.
    """
    runs = ", ".join(dict.fromkeys(e["run"] for e in service.history if e["run"])) or "none"
    if isinstance(to, int):
        if service.history and not (service.live or service.run):
            raise RefusedError(f"what is live is not known; say where to go, --to RUN, of: {runs}")
        if entry := service.target(to):
            return entry
        count = len(service.targets)
        some = f"{f'only {count}' if count else 'no'} proven version{'s' * (count > 1)}"
        raise RefusedError(f"{some} to go back to")
    if not (entry := service.entry(to)):
        raise RefusedError(f"{clip(to, 60)!r} is no run of the history: {runs}")
    if service.reaches(entry):
        raise RefusedError(f"{to} is what is live")
    outcome = entry["outcome"] if entry["outcome"] in PROVEN else str(Outcome.DEPLOYED)
    return {**entry, "outcome": outcome, "reason": "", "detail": ""}


def narrowed(
    selector: Mapping[str, str], pods: Sequence[Pod], new: Mapping[str, str]
) -> dict[str, str] | None:
    """Return a selector that matches today's pods and never the new ones; None if none does."""
    if any(new.get(k) != v for k, v in selector.items()):
        return dict(selector)
    shared = set.intersection(*(set(p.labels.items()) for p in pods)) if pods else set()
    apart = {key: value for key, value in sorted(shared) if new.get(key) != value}
    key = next((k for k in ("version", "pod-template-hash", *apart) if k in apart), None)
    return {**selector, key: apart[key]} if key else None


# === state ========================================================================================
# How runs ended and which commits are rejected: a ConfigMap for each app, a key for each record, so
# that what one app leaves in it neither stops nor delays another.


def recorded_ref(ref: str) -> str:
    """Return a ref as it is recorded: of a long one the beginning and a hash."""
    long = len(json.dumps(ref, ensure_ascii=False).encode()) > RECORD_BYTES // 4
    return f"{ref[:80]}~{hashlib.sha256(ref.encode()).hexdigest()}" if long else ref


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """How far a run has come, or how it ended: key `run-<id>`."""

    id: str
    ref: str
    commit: str
    before: str = ""
    delivery: str = ""
    received: float = 0.0
    outcome: str = ""  # empty while it is under way
    reason: str = ""
    stage: str = ""
    detail: str = ""
    ended: float = 0.0

    @property
    def key(self) -> str:
        """The key of the record in the ConfigMap."""
        return f"run-{self.id}"

    @classmethod
    def of(cls, run: Run) -> RunRecord:
        """Return the record of a run that has just begun."""
        copied = ("id", "commit", "before", "delivery", "received")
        return cls(ref=recorded_ref(run.ref), **{name: getattr(run, name) for name in copied})


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """Why a commit is not deployed again until `rerun`: key `rejected-<commit>`."""

    commit: str
    reason: str = ""
    at: float = 0.0

    @property
    def key(self) -> str:
        """The key of the record in the ConfigMap."""
        return f"rejected-{self.commit}"


Record = TypeVar("Record", RunRecord, Rejection)
RECORD_TYPES = {kind: get_type_hints(kind) for kind in (RunRecord, Rejection)}


def parse_record(kind: type[Record], text: Any, **more: Any) -> Record:
    """Return the record in a text, unknown fields ignored; raises ValueError for anything else."""
    if not isinstance(text, str) or len(text) > 4 * RECORD_BYTES:
        raise ValueError("not a text of a record's size")
    hints = RECORD_TYPES[kind]
    values = {k: v for k, v in {**json.loads(text), **more}.items() if k in hints}
    for name, value in values.items():
        number = type(value) in (int, float) and math.isfinite(value)
        if not (number if hints[name] is float else type(value) is str):
            raise ValueError(f"{name} has another type")
    return kind(**values)


def record_text(record: RunRecord | Rejection) -> str:
    """Return a record as it is stored, its detail cut until it has the size of one."""
    content = {f.name: getattr(record, f.name) for f in fields(record)} | {"v": RECORD_VERSION}
    kept = {k: v for k, v in content.items() if v not in ("", 0.0) and k != "id"}
    while len(json.dumps(kept, ensure_ascii=False).encode()) > RECORD_BYTES and kept.get("detail"):
        kept["detail"] = kept["detail"][: len(kept["detail"]) // 2]
    return json.dumps(kept, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class AppState:
    """What is recorded of one app."""

    runs: dict[str, RunRecord]  # by id
    rejected: dict[str, Rejection]  # by commit
    live: dict[str, Object]  # the history entry of what is live, by environment
    version: str  # the ConfigMap's resourceVersion, empty where there is none
    repairs: dict[str, str | None]  # what is to be written because of what was read

    @classmethod
    def from_configmap(cls, app: App, configmap: Object | None) -> AppState:
        """Return what a ConfigMap records; what cannot be read is dropped, with an error."""
        meta = (configmap or {}).get("metadata") or {}
        state = cls({}, {}, {}, str(meta.get("resourceVersion", "")), {})
        dropped = []
        for key, text in ((configmap or {}).get("data") or {}).items():
            try:
                state._take(app, key, text)
            except (LookupError, ValueError, TypeError, RecursionError) as wrong:
                dropped.append(clip(f"{key}: {wrong}", 120))
                state.repairs[key] = None
        if dropped:
            error("records dropped", app=app.name, count=len(dropped), detail=dropped[0])
        return state

    def _take(self, app: App, key: str, text: Any) -> None:
        """Take one entry over; raises what reading it raises."""
        kind, _, name = key.partition("-")
        if kind == "run":
            self.runs[name] = parse_record(RunRecord, text, id=name)
        elif kind == "rejected":
            self.rejected[name] = parse_record(Rejection, text, commit=name)
        elif kind == "live":
            if entry := read_record(HistoryEntry, json.loads(text[: 4 * RECORD_BYTES])):
                self.live[name] = entry
        elif kind == "ref":  # of version 0.1: the last push of each ref, by a hash of its name
            self.repairs[key] = None
            record = migrated(app, text)
            if record and self.runs.setdefault(record.id, record) is record:
                self.repairs[record.key] = record_text(record)

    def find(self, ref: str, commit: str) -> RunRecord | None:
        """Return the record of a push by what identifies it, whatever its id."""
        push, records = (recorded_ref(ref), commit), self.runs.values()
        return next((r for r in records if (r.ref, r.commit) == push), None)

    def last(self, ref: str) -> RunRecord | None:
        """Return the record of the newest push of a ref that was not found to be outdated."""
        short, records = recorded_ref(ref), self.runs.values()
        pushed = (r for r in records if r.ref == short and r.reason != Reason.NOT_HEAD)
        return max(pushed, key=lambda r: r.received, default=None)


def migrated(app: App, text: Any) -> RunRecord | None:
    """Return the record that an entry of version 0.1 becomes, None for a branch it only knew of."""
    old = json.loads(text)
    if old["outcome"] == "baseline":
        return None
    ref, outcome = old["ref"], old["outcome"] or ""
    kept = {**old, "ref": recorded_ref(ref), "outcome": outcome}
    push = parse_record(RunRecord, json.dumps(kept, ensure_ascii=False), id="")
    ended = push.received if outcome else 0.0
    return replace(push, id=run_id(app.name, ref, push.commit, ID_DIGITS[-1]), ended=ended)


def forgotten(state: AppState, deploy_ref: str, with_job: Set[str] | None) -> list[str]:
    """Return the keys of the records that are too many or too much, of test-only runs first.

    Kept are the newest runs and those that have a Job, all if that is not known, as far as there is
    room for them.
    """
    deploys = recorded_ref(deploy_ref)
    order = sorted(state.runs.values(), key=lambda r: (r.ref == deploys, r.received))
    newest = {r.id for r in order[-RUNS_LENGTH:]}
    sizes = {r.id: len(record_text(r).encode()) + len(r.key) for r in order}
    size, keys = sum(sizes.values()), []
    for record in order:
        spare = record.outcome and with_job is not None and record.id not in newest | with_job
        if spare or size > STATE_BYTES:
            size -= sizes[record.id]
            keys.append(record.key)
    rejected = sorted(state.rejected.values(), key=lambda r: r.at)
    return keys + [r.key for r in rejected[: max(0, len(rejected) - REJECTED_LENGTH)]]


class Clock:
    """The one door to time, so that a test can hold it."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


class StateStore:
    """Reads and writes what is recorded of the apps."""

    def __init__(self, kubectl: Kubectl, clock: Clock) -> None:
        self.kubectl, self.clock = kubectl, clock
        self._seen: dict[str, AppState] = {}
        self._locks: dict[str, threading.RLock] = {}

    def lock(self, app: App) -> threading.RLock:
        """Return the lock of what is written because of what was read."""
        return self._locks.setdefault(app.name, threading.RLock())

    def read(self, app: App) -> AppState:
        """Return what is recorded of an app now."""
        found = self.kubectl.get("configmap", f"{MANAGER}-{app.name}", ORCHESTRATION)
        state = self._seen[app.name] = AppState.from_configmap(app, found)
        return state

    def write(
        self,
        app: App,
        *records: RunRecord | Rejection,
        forget: Iterable[str] = (),
        with_job: Set[str] | None = None,
        live: Mapping[str, Object] | None = None,
    ) -> None:
        """Write records, forget keys, and what is too old: one compare-and-set patch.

        `with_job` has the ids of the runs that have a Job, if that is known, `live` the history
        entries of what is live by environment. Raises KubectlError.
        """
        change = {**dict.fromkeys(forget), **{r.key: record_text(r) for r in records}}
        entries = {f"live-{name}": json.dumps(entry) for name, entry in (live or {}).items()}
        change |= {k: text for k, text in entries.items() if len(text) <= 4 * RECORD_BYTES}
        with self.lock(app):
            for left in reversed(range(STATE_TRIES)):
                state = self._seen.get(app.name) or self.read(app)
                try:
                    return self._patch(app, state, change, with_job)
                except KubectlError as failed:
                    self._seen.pop(app.name, None)
                    if failed.kind not in ("NotFound", "Conflict") or not left:
                        raise
                    if failed.kind == "NotFound":
                        self._create(app)
        return None

    def _create(self, app: App) -> None:
        """Create the ConfigMap, empty."""
        labels = {LABEL_MANAGED: MANAGER, LABEL_APP: app.name}
        meta = {"name": f"{MANAGER}-{app.name}", "labels": labels}
        empty = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta}
        self.kubectl.create([empty], ORCHESTRATION)

    def _patch(
        self, app: App, state: AppState, change: Mapping[str, str | None], with_job: Set[str] | None
    ) -> None:
        """Merge a change into the ConfigMap that a state was read from."""
        name, data = f"{MANAGER}-{app.name}", {**state.repairs, **change}
        records: list[RunRecord | Rejection] = [*state.runs.values(), *state.rejected.values()]
        texts = {record.key: record_text(record) for record in records}
        after = {k: v for k, v in {**texts, **data}.items() if v is not None}
        merged = AppState.from_configmap(app, {"data": after})
        data |= dict.fromkeys(forgotten(merged, app.deploy_ref, with_job))
        if not data:
            return
        meta = {"resourceVersion": state.version} if state.version else {}
        body = {"metadata": meta, "data": data}
        patched = self.kubectl.patch("configmap", name, ORCHESTRATION, body)
        self._seen[app.name] = AppState.from_configmap(app, patched)

    def reject(self, app: App, commit: str, reason: str) -> None:
        """Reject a commit until `rerun`."""
        self.write(app, Rejection(commit=commit, reason=reason, at=self.clock.now()))


# === deploy =======================================================================================

LOG_PATIENCE = 2.0  # seconds that a failed deployment waits for the end of its logs to be kept
AGAIN = ("Conflict", "AlreadyExists", "Unreachable")  # look once more: it mends itself, or is done
HEAD_BYTES = 65_536  # of an answer's status and headers
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)


def health_refusal(url: str, patience: float = 2.0) -> str | None:
    """Return why a health path does not answer as healthy, or None; the one door to HTTP.

    There is one deadline for the whole answer, which is read to the end of its headers and no
    further. Raises OSError where it is this process that has no more files.
    """
    until, parts, head = time.monotonic() + patience, urlsplit(url), b""
    path = f"{parts.path or '/'}{'?' * bool(parts.query)}{parts.query}"
    lines = (f"GET {path} HTTP/1.1", f"Host: {parts.netloc}", "Accept: */*", "Connection: close")
    request = "\r\n".join([*lines, f"User-Agent: {MANAGER}/{__version__}", "", ""])
    try:
        with socket.create_connection((parts.hostname or "", parts.port), patience) as connection:
            connection.sendall(request.encode())
            while not re.search(rb"\n\r?\n", head) and len(head) < HEAD_BYTES:
                if (left := until - time.monotonic()) <= 0:
                    return f"no whole answer within {patience:.0f} s"
                connection.settimeout(left)
                if not (received := connection.recv(4096)):
                    break
                head += received
    except TimeoutError:
        return f"no whole answer within {patience:.0f} s"
    except OSError as failed:
        if failed.errno in OUT_OF_FILES:
            raise
        return type(failed).__name__
    status = re.match(rb"HTTP/1\.[01] ([1-9][0-9]{2})\b", head)
    if not status or not re.search(rb"\n\r?\n", head):
        return "not an HTTP answer"
    return None if b"200" <= status[1] < b"400" else f"status {status[1].decode()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One app in one environment, and the run that is on its way there."""

    app: App
    environment: str
    namespace: str
    run: Run
    image: str = ""

    @property
    def words(self) -> dict[str, Any]:
        """The fields of its log lines."""
        return {"run": self.run.id, "app": self.app.name, "environment": self.environment}

    @property
    def labels(self) -> tuple[str, str]:
        """The labels of its metrics."""
        return self.app.name, self.environment

    @property
    def last(self) -> bool:
        """Whether this is the environment that bakes."""
        return self.environment == self.app.deploy.environments[-1]


@dataclass(frozen=True, slots=True)
class Goal:
    """Where a rollback goes: an entry of the history, as it was and as it will be live.

    Overwritten: its pods are ready, but another run is in their Deployment.
    """

    target: Object
    entry: Object
    overwritten: bool


F = TypeVar("F", bound=Callable[..., Any])


def persistent(step: F, *, while_head: bool = False) -> F:
    """Repeat a step that looks and acts, until it gets an answer another try cannot change.

    After a conflict, and where no answer came, so that its effect is unknown. A step before the
    switch goes on only while its commit is the branch's head: what is tried for ever would keep
    the correction out.
    """

    def persist(self: Deployer, task: Task, *args: Any, **more: Any) -> Any:
        """Take the step until it is answered."""
        failures = 0
        asked = self.clock.monotonic()
        while True:
            try:
                return step(self, task, *args, **more)
            except KubectlError as failed:
                if failed.kind not in AGAIN:
                    raise
                if failures < len(DELAYS) or failures % 30 == 0:  # then every half a minute
                    warn("will look again", detail=str(failed), **task.words)
                self.pause(0.05 if failed.kind != "Unreachable" else min(backoff(failures), 1.0))
                failures += 1
            if while_head and task.run.ref and self.clock.monotonic() - asked > HEAD_FRESH:
                with suppress(GitError):
                    self.require_head(task)
                asked = self.clock.monotonic()

    return cast(F, persist)


class LogTails:
    """Keeps the last log lines of what failed in ConfigMap `log-RUN`, where they were printed.

    Nowhere else does what a container printed go. Best effort: a thread does it through a door of
    its own, so that it neither delays nor fails anything.
    """

    def __init__(self, kubectl: Kubectl, secrets: Secrets, clock: Clock) -> None:
        self.kubectl, self.secrets, self.clock = kubectl.apart(), secrets, clock
        self._places = threading.BoundedSemaphore(LOGS_KEPT)

    def start(self, work: Callable[[], Any], patience: float = 0.0) -> None:
        """Start a thread for some work of this class, and wait for it only so long.

        It does nothing while very many are busy.
        """

        def run() -> None:
            """Work, and say what does not work."""
            if not self._places.acquire(blocking=False):
                return
            try:
                work()
            except (HookError, *ODD) as failed:
                warn("logs not kept", detail=str(failed))
            finally:
                self._places.release()

        thread = threading.Thread(target=run, name="logs", daemon=True)
        with suppress(RuntimeError):  # no more threads: no log is kept
            thread.start()
            thread.join(patience)

    def keep(self, app: str, run: str, pods: Sequence[Pod], namespace: str) -> None:
        """Write the ConfigMap of a run's logs, in the place of an older one."""
        tails = {}
        for pod, container in speakers(pods):
            printed = self.kubectl.logs(pod.name, container.name, namespace)
            words = "" if container.words in printed else f"\n{container.words}"
            if text := self.secrets.mask(f"{printed}{words}".strip()[-2 * LOG_BYTES :]):
                tails[f"{pod.name}.{container.name}"] = text.encode()
        if not tails:
            return
        share = LOG_BYTES // len(tails)
        data = {key: text[-share:].decode("utf-8", "ignore") for key, text in tails.items()}
        labels = {LABEL_MANAGED: MANAGER, LABEL_APP: app, LABEL_RUN: run, LABEL_STAGE: "log"}
        meta = {"name": f"log-{run}", "labels": labels}
        self.prune(app, namespace, LOGS_KEPT - 1, meta["name"])
        made = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}
        self.kubectl.create([made], namespace)

    def tidy(self, app: App, namespaces: Mapping[str, str]) -> None:
        """Delete the logs of an app that are not to be kept any more."""
        for name in (*STAGES, *app.deploy.environments):
            kept = LOGS_KEPT if name in STAGES or app.deploy.log_tails else 0
            self.prune(app.name, namespaces[name], kept)

    def prune(self, app: str, namespace: str, most: int, again: object = None) -> None:
        """Delete logs that are too old, not among the newest so many, or written again."""
        terms = selector_text({LABEL_MANAGED: MANAGER, LABEL_APP: app, LABEL_STAGE: "log"})
        metas = [c["metadata"] for c in self.kubectl.list("configmaps", namespace, "-l", terms)]
        dated = sorted(((epoch(m["creationTimestamp"]), m["name"]) for m in metas), reverse=True)
        oldest = self.clock.now() - LOG_TTL
        gone = [n for i, (at, n) in enumerate(dated) if i >= most or at < oldest or n == again]
        self.kubectl.delete("configmap", gone, namespace)


def speakers(pods: Iterable[Pod]) -> list[tuple[Pod, Container]]:
    """Return the containers whose logs tell most: those that failed in the newest unready pod.

    Where none failed, what runs in it: a test that hangs, or a version that answers wrongly.
    """
    ordered = sorted(pods, key=lambda p: (p.ready, -p.created))
    all_ran = [(p, c) for p in ordered for c in p.containers if c.running or c.exits]
    ran = [(p, c) for p, c in all_ran if c.kind != "sidecar"]
    failed = [(p, c) for p, c in ran if c.exit_code or not c.ready]
    chosen = failed or [(p, c) for p, c in ran if c.kind == "app"]
    return [(p, c) for p, c in chosen if p is chosen[0][0]][:4]


class Deployer:
    """Brings runs into environments, and takes traffic back. Every step looks before it acts."""

    def __init__(self, kubectl: Kubectl, git: Git, secrets: Secrets, clock: Clock) -> None:
        self.kubectl, self.git, self.secrets, self.clock = kubectl, git, secrets, clock
        self.metrics, self.state = kubectl.metrics, StateStore(kubectl, clock)
        self.logs = LogTails(kubectl, secrets, clock)
        self.stop = threading.Event()  # ends all waiting
        # by app and environment: the live Service as it was when last in order, and what was said
        self.known: dict[tuple[str, str], Service] = {}
        self.drifts: dict[tuple[str, str], tuple[Drift, dict[str, str]]] = {}
        # itself with a door that is not waited for, for what is live
        self.urgent = self
        if not isinstance(kubectl, UrgentKubectl):
            door = UrgentKubectl(kubectl.metrics, 2 * kubectl.at_once, kubectl.program)
            self.urgent = Deployer(door, git, secrets, clock)
            self.urgent.stop, self.urgent.state = self.stop, self.state
            self.urgent.known, self.urgent.drifts = self.known, self.drifts

    def deploy(self, task: Task) -> None:
        """Bring a run into an environment, through its bake in the last one.

        Raises StageError when it cannot (live traffic is as before, or was taken back) and
        SupersededError when something newer, or someone, took its place.
        """
        with self.watched_pods(task) as pods:
            service = self.urgent.service(task)
            if service is None:
                self.require_undeleted(task)
            resumed = service is not None and service.run == task.run.id
            if not resumed:
                release, claimed = self.prepare(task, pods)
                self.switch(task, release, claimed)
                self.metrics.switches.labels(*task.labels, "forward").inc()
                info("switched", colour=release.colour, commit=release.commit, **task.words)
            self.settle(task, pods, resumed=resumed)

    def prepare(self, task: Task, pods: Watch[Pod]) -> tuple[Release, Service | None]:
        """Do everything before the switch; return what may go live, and the Service as claimed."""
        where = (task.app.repository, task.run.commit, path := task.app.deploy.manifests)
        with self.git.manifests(*where) as checkout:
            found = read_manifests(checkout, path)
        objects, ignored = check_objects(task.app, task.namespace, found)
        release = render(task.app, task.run, task.image, self.place(task), objects)
        claimed = self.claim(task, release)
        info("claimed", colour=release.colour, ignored=ignored or None, **task.words)
        try:
            self.apply(task, release, claimed)
            self.roll_out(task, release, pods)
            self.smoke_test(task, release)
        finally:
            # pods that someone else replaced meanwhile say nothing against this run
            self.check_claim(task, claimed, self.service(task))
        return release, claimed

    # What is there, and who may change it.

    def service(self, task: Task) -> Service | None:
        """Return the live Service as it is now; where its selector names no run, by its pods."""
        found = self.kubectl.get("service", task.app.name, task.namespace)
        service = Service(found) if found else None
        if service and not (service.run or service.live):
            ready = map(Pod, self.ready_pods(task.namespace, service.selector))
            runs = runs_of(task.app.name, ready)
            service.run = runs.pop() if len(runs) == 1 else ""
        return service

    def remember(self, task: Task, service: Service) -> None:
        """Keep a live Service that is in order, for when what is written on it is lost."""
        last = self.known.get(task.labels, service)
        if service.in_order and service.version >= last.version:
            self.known[task.labels] = service
            self.drifts.pop(task.labels, None)

    def recorded(self, task: Task, service: Service | None) -> Service | None:
        """Return the live Service as it is recorded: by itself, or, if it lost that, elsewhere."""
        if source := service if service and service.history else self.known.get(task.labels):
            return source
        entry = self.state.read(task.app).live.get(task.environment)
        if service and service.run and not entry:
            entry = self.released(task, service)
        return Service.recorded(task.app.name, entry) if entry else None

    def released(self, task: Task, service: Service) -> Object:
        """Return the history entry of the run that a Service reaches, by its release."""
        terms = f"{LABEL_APP}={task.app.name},{LABEL_STAGE}=release"
        for found in self.kubectl.list("configmaps", task.namespace, "-l", terms):
            with suppress(StageError):
                release = Release.from_configmap(found)
                colour = service.selector.get(LABEL_VERSION, release.colour)
                if (release.run, release.colour) == (service.run, colour):
                    return entry_of(release, task.app.name, self.clock.now())
        return {}

    def drift(self, task: Task, service: Service, source: Service | None) -> Drift:
        """Return what the selector of a live Service is beside what is recorded of it."""
        if source is None or not source.served or service.in_order:
            return Drift.NONE
        pods = map(Pod, self.staying(task.namespace, service.selector))
        put_backs = len(self.put_backs(source))
        return drift_of(source.served["run"], runs_of(task.app.name, pods), put_backs)

    def put_backs(self, source: Service) -> list[float]:
        """Return when a widened selector was put back of late."""
        since = self.clock.now() - PUT_BACK_SECONDS
        return [at for at in map(seconds_of, source.note(NOTE_PUT_BACK, [])) if at > since]

    @persistent
    def mend(self, task: Task) -> None:
        """See to a live Service that someone else changed: put it back, or write down what it is.

        What was written on it comes back, too, where it was deleted and made again.
        """
        service = self.service(task)
        source = self.recorded(task, service)
        if service is None or source is None or service.in_order:
            return
        drift, by = self.drift(task, service, source), self.last_change(task).get("manager")
        self.say_drift(task, service, drift, by := clip(str(by or "someone else"), 80))
        own = {k: v for k, v in service.notes().items() if v}
        notes, goal = {**source.notes(), **own}, None
        if drift is Drift.WIDENED:
            notes[NOTE_PUT_BACK] = [*self.put_backs(source), round(self.clock.now(), 3)]
            goal = source.served
        elif drift is Drift.KEPT:
            notes[NOTE_HISTORY] = [
                {**e, "by": by} if e == source.served else e for e in source.history
            ]
        elif drift is Drift.MOVED and service.run:
            unknown = {"run": service.run, "selector": service.selector}
            entry = source.entry(service.run) or self.released(task, service)
            entry = entry or read_record(HistoryEntry, unknown)
            notes[NOTE_HISTORY] = moved(source.history, entry, by, self.clock.now())
        if goal or notes[NOTE_HISTORY] != service.history:
            self.write(task, service, notes, goal)

    def say_drift(self, task: Task, service: Service, drift: Drift, by: str) -> None:
        """Say and count once what someone else made of a live selector."""
        if self.drifts.get(task.labels) != (drift, service.selector):
            self.drifts[task.labels] = drift, service.selector
            self.metrics.drift.labels(*task.labels).inc()
            contested = drift is Drift.CONTESTED
            reason = Reason.SELECTOR_CONTESTED if contested else Reason.SELECTOR_CHANGED
            words = {**task.words, "run": service.run}
            error("selector drift", drift=drift, reason=reason, by=by, **words)

    def pause(self, seconds: float) -> None:
        """Wait; raises InterruptedError when the program is to stop."""
        if self.stop.wait(seconds):
            raise InterruptedError

    def write(
        self, task: Task, seen: Service, notes: Object, goal: Object | None = None
    ) -> Service:
        """Compare-and-set the live Service: notes, None removes one, and where it points.

        The same patch stores the selector that it replaces, as the previous one.
        """
        spec: Object = {}
        if goal:
            # a merge keeps keys that are not named: those that must go are set to null
            spec["selector"] = {**dict.fromkeys(seen.selector), **goal["selector"]}
            notes = {NOTE_PREVIOUS: seen.live.get("selector") or seen.selector, **notes}
        if goal and goal.get("ports"):
            spec["ports"] = ports_like(goal["ports"], seen.ports)
        texts = {k: None if v is None else json.dumps(v) for k, v in notes.items()}
        labels = {LABEL_MANAGED: MANAGER, LABEL_APP: seen.name, LABEL_STAGE: "live"}
        meta = {"resourceVersion": str(seen.version), "annotations": texts, "labels": labels}
        change = {"metadata": meta, "spec": spec}
        written = Service(self.kubectl.patch("service", seen.name, task.namespace, change))
        self.remember(task, written)
        return written

    def place(self, task: Task) -> tuple[str, int]:
        """Return the idle colour, and how large the live one is.

        Live is what today's selector reaches, which may be what a person wrote: the two colours of
        our own pods among it, or neither; and, where there is no Service, what it reached.
        """
        service, name = self.service(task), task.app.name
        selector = service.selector if service else {}
        source = self.recorded(task, service)
        self.require_order(task, service, source)
        labels = [p["metadata"]["labels"] for p in self.staying(task.namespace, selector)]
        live = {k.get(LABEL_VERSION) for k in labels if k.get(LABEL_APP) == name}
        live.add(selector.get(LABEL_VERSION))
        if source and not service:
            live.add(source.served.get("colour"))
        foreign = service and not service.ours
        replicas, free = len(labels) if foreign else 0, [c for c in COLOURS if c not in live]
        detail = "both colours serve; point the Service at one of them"
        for colour in COLOURS:
            found = self.kubectl.get("deployment", f"{name}-{colour}", task.namespace)
            if found and colour in live:
                replicas = max(replicas, int(found["spec"].get("replicas", 1)))
            elif found and LABEL_APP not in found["spec"]["selector"].get("matchLabels", {}):
                detail = f"Deployment {name}-{colour} was not made here; delete or rename it"
                free.remove(colour)
        if not free:
            raise StageError(Reason.ADOPTION_REFUSED, detail)
        return free[0], replicas

    def require_order(self, task: Task, service: Service | None, source: Service | None) -> None:
        """Raise while the live selector reaches two versions; it is put back soon, or contested."""
        drift = self.drift(task, service, source) if service else Drift.NONE
        if drift is Drift.CONTESTED:
            raise StageError(Reason.SELECTOR_CONTESTED, self.last_manager(task))
        if drift is Drift.WIDENED:
            raise HookError("the selector of the live Service was widened, and is put back first")

    def require_undeleted(self, task: Task) -> None:
        """Raise while the live Service of a run that is verified or baked is deleted."""
        source = self.recorded(task, None)
        served = source.served if source else {}
        if served.get("run") == task.run.id and self.ready_pods(task.namespace, served["selector"]):
            raise HookError("someone deleted the live Service; the run goes on when it is there")

    def size(self, task: Task, selector: Mapping[str, str]) -> int:
        """Return how many pods a colour is to have now: an autoscaler may have changed it."""
        name = f"{task.app.name}-{selector.get(LABEL_VERSION, '')}"
        found = self.kubectl.get("deployment", name, task.namespace) or {}
        return int(found.get("spec", {}).get("replicas", 1))

    def pods(self, namespace: str, selector: Mapping[str, str]) -> list[Object]:
        """Return the pods that a selector reaches; an empty one reaches none."""
        terms = selector_text(selector)
        return self.kubectl.list("pods", namespace, "-l", terms) if terms else []

    def staying(self, namespace: str, selector: Mapping[str, str]) -> list[Object]:
        """Return the pods that a selector reaches and that neither have ended nor are to end."""
        return [p for p in self.pods(namespace, selector) if Pod(p).stays]

    def ready_pods(self, namespace: str, selector: Mapping[str, str]) -> list[Object]:
        """Return the ready pods that a selector reaches."""
        return [p for p in self.pods(namespace, selector) if Pod(p).ready]

    def note(self, run: str, colour: str, phase: str, heal: str = "") -> Object:
        """Return a claim; its time tells it from that of another process."""
        since = round(self.clock.now(), 3)
        return asdict(Claim(run=run, colour=colour, phase=str(phase), since=since, heal=heal))

    @partial(persistent, while_head=True)
    def claim(self, task: Task, release: Release) -> Service | None:
        """Say on the live Service that this run is changing the environment; None if there is none.

        The same patch remembers the release that stands in the idle colour if it is a rollback
        target, so that it can be healed, and narrows a foreign selector.
        """
        if (service := self.service(task)) is None:
            return None
        claim, colour = service.claim, release.colour
        if service.selector.get(LABEL_VERSION) == colour:
            raise SupersededError(Reason.CLAIM_LOST, "traffic was switched meanwhile")
        source = self.recorded(task, service)
        self.require_order(task, service, source)
        fresh = abs(self.clock.now() - seconds_of(claim.get("since"))) < CLAIM_SECONDS
        if fresh and claim.get("phase") == Phase.ROLLBACK:
            raise HookError("a rollback is under way")
        heal = claim.get("heal", "") if claim.get("colour") == colour else ""
        standing = self.kubectl.get("deployment", f"{task.app.name}-{colour}", task.namespace)
        labels = (standing or {"metadata": {}})["metadata"].get("labels") or {}
        stood = service.entry(labels.get(LABEL_RUN, ""))
        same = (claim.get("colour"), claim.get("run")) == (colour, stood.get("run"))
        if stood.get("colour") == colour and not same:
            heal = stood["release"] if stood.get("outcome") in (Outcome.DEPLOYED, "") else ""
        notes: Object = {NOTE_CLAIM: self.note(task.run.id, colour, Phase.PREPARING, heal)}
        goal = self.narrower(task, release, service, source)
        older = [e for e in service.history if e.get("outcome") != ADOPTED]
        if source and source.served.get("run") and not service.history:
            notes |= {NOTE_HISTORY: source.history}
        elif goal and not service.run and (service.live or not older):
            told = {"outcome": ADOPTED, "was": service.live.get("was") or service.selector, **goal}
            told |= {"ports": service.ports, "at": self.clock.now()}
            notes |= {NOTE_HISTORY: [asdict(HistoryEntry(**told)), *older]}
            notes |= {NOTE_PREVIOUS: goal["selector"]}
        return self.write(task, service, notes, goal)

    def narrower(
        self, task: Task, release: Release, service: Service, source: Service | None
    ) -> Object | None:
        """Return where a live Service has to point before there are new pods; None: it may stay.

        To the one run of the app that it reaches, or what was there before the first.
        """
        if service.ours:
            return None
        live = source.entry(service.run) if source and service.run else {}
        return {"selector": live.get("selector") or self.adopted(task, release, service)}

    def adopted(self, task: Task, release: Release, service: Service) -> dict[str, str]:
        """Return the selector that keeps a foreign Service on exactly today's pods."""
        pods = [Pod(p) for p in self.staying(task.namespace, service.selector)]
        labels = release.deployment["spec"]["template"]["metadata"]["labels"]
        found = narrowed(service.selector, pods, labels) if service.selector else None
        if found is None:
            call, terms = f"kubectl -n {task.namespace}", selector_text(service.selector)
            patch = '{"spec":{"selector":{"version":"before"}}}'
            run = f"{call} label pods -l {terms} version=before && "
            run += f"{call} patch service {task.app.name} -p '{patch}'"
            detail = f"its selector would also match the new pods; run: {run}"
            raise StageError(Reason.ADOPTION_REFUSED, detail)
        return found

    def check_claim(self, task: Task, claimed: Service | None, now: Service | None) -> None:
        """Raise when someone else holds the claim now or has changed the live Service.

        A Service that was deleted and made again has lost the claim, which nobody has taken.
        """
        if claimed is None and now is None:
            return
        if not (claimed and now) or now.claim != claimed.claim:
            who = str(now.claim.get("run", "")) if now else ""
            if who == task.run.id:
                raise HookError("another daemon has this run in hand")
            if not who and not (claimed and now and kept(claimed, now)):
                raise HookError("the live Service was deleted or made anew meanwhile")
            raise SupersededError(Reason.CLAIM_LOST, f"{who or 'someone else'} has taken the claim")
        if now.selector == claimed.selector:
            return
        # what only asks for more, and still reaches the same pods, is as good
        pods = map(Pod, self.staying(task.namespace, now.selector))
        same = claimed.selector.items() <= now.selector.items()
        if not (same and claimed.run and runs_of(task.app.name, pods) == {claimed.run}):
            raise StageError(Reason.SELECTOR_CHANGED, self.last_manager(task))

    def last_change(self, task: Task) -> Object:
        """Return what the managedFields of the live Service say of its last change."""
        args = ("get", "service", task.app.name, "-o", "json", "--show-managed-fields")
        with suppress(KubectlError, ValueError):
            meta = json.loads(self.kubectl.run(*args, namespace=task.namespace))["metadata"]
            managed = meta.get("managedFields") or [{}]
            spec = [m for m in managed if "f:selector" in json.dumps(m.get("fieldsV1"))]
            return dict(max(spec or managed, key=lambda m: str(m.get("time", ""))))
        return {}

    def last_manager(self, task: Task) -> str:
        """Return who changed the live Service last."""
        last = self.last_change(task)
        at = f" at {last['time']}" if "time" in last else ""
        return f"changed by {clip(str(last.get('manager', 'someone else')), 80)}{at}"

    # Apply and wait.

    @contextmanager
    def watched_pods(self, task: Task) -> Iterator[Watch[Pod]]:
        """Keep a mirror of an app's pods while the block runs, and their logs if it fails."""
        selector = f"{LABEL_APP}={task.app.name}"
        watch = Watch(self.kubectl, "pods", task.namespace, Pod, selector)
        thread = threading.Thread(target=watch.run, name=f"pods-{task.app.name}", daemon=True)
        thread.start()
        try:
            yield watch
        except StageError:
            self.keep_logs(task, [p for p in watch.items() if p.run == task.run.id])
            raise
        finally:
            watch.stop()
            thread.join(KUBECTL_TIMEOUT)

    @partial(persistent, while_head=True)
    def apply(self, task: Task, release: Release, claimed: Service | None) -> None:
        """Record a release, and put its Deployment in the place of what stands there.

        It is written against the version read before the look at the claim, and each write differs:
        the late write of one who has lost the claim meets a newer version and changes nothing.
        """
        made = copy.deepcopy(release.deployment)
        made["metadata"]["annotations"][NOTE_WRITTEN] = str(self.clock.now())
        self.record(task, release)
        found = self.kubectl.get("deployment", made["metadata"]["name"], task.namespace)
        self.check_claim(task, claimed, self.service(task))
        self.kubectl.put(made, found, task.namespace)

    def record(self, task: Task, release: Release) -> None:
        """Write a release and its copies of ConfigMaps; raises StageError where others are there.

        What cannot be changed any more is used only if it is exactly what was to be written.
        """
        records = [*release.configmaps, release.configmap(task.app.name)]
        wanted = {each["metadata"]["name"]: each for each in records}
        for name, refused in self.kubectl.create_each(records, task.namespace).items():
            if refused.kind != "AlreadyExists":
                raise refused
            if (found := self.kubectl.get("configmap", name, task.namespace)) is None:
                raise HookError(f"ConfigMap {name} was deleted this very moment")
            if substance(found) != substance(wanted[name]):
                detail = f"ConfigMap {name} is there with another content or other labels"
                raise StageError(Reason.ADOPTION_REFUSED, f"{detail}; delete or rename it")

    def roll_out(self, task: Task, release: Release, pods: Watch[Pod]) -> None:
        """Wait for the pods of a release; raises StageError at once for what cannot heal."""
        name = release.deployment["metadata"]["name"]
        timeout = int(release.deployment["spec"]["progressDeadlineSeconds"])
        args = ("rollout", "status", f"deployment/{name}", f"--timeout={timeout}s")
        doom, until = Doom(), self.clock.monotonic() + timeout
        while self.clock.monotonic() < until:
            process = self.kubectl.stream(*args, namespace=task.namespace)
            try:
                # bounded, since a process whose complaints nobody reads may hang on them
                while process.poll() is None and self.clock.monotonic() < until:
                    seen = self.symptoms(task, release, pods)
                    if symptom := doom.verdict(seen, self.clock.now()):
                        raise self.failed(release, pods, symptom)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(1.0)
                    self.pause(0)
            finally:
                process.kill()
                process.communicate()
            # what it says is no proof: it is content with no replicas, and with another's pods
            found = self.kubectl.get("deployment", name, task.namespace) or {"metadata": {}}
            if (found["metadata"].get("labels") or {}).get(LABEL_RUN) != release.run:
                raise HookError(f"Deployment {name} was deleted or replaced meanwhile")
            ready = len(self.ready_pods(task.namespace, release.selector))
            if proven(found, ready):
                return
            if process.returncode == 0:
                until = min(until, self.clock.monotonic() + VERIFY_SECONDS)
            self.pause(0.3)
        detail = f"{ready} of {release.wanted} pods ready within {timeout} s"
        raise self.failed(release, pods, Symptom("", Reason.NEVER_READY, detail))

    def symptoms(self, task: Task, release: Release, pods: Watch[Pod]) -> list[Symptom]:
        """Return what is wrong with a release's pods, also with those that cannot be created."""
        seen = [s for p in pods.items() if p.run == release.run for s in pod_symptoms(p)]
        with suppress(KubectlError):
            name = release.deployment["metadata"]["name"]
            found = self.kubectl.get("deployment", name, task.namespace) or {"metadata": {}}
            status = found.get("status") or {}
            # before that it speaks of what stood there
            current = status.get("observedGeneration", 0) >= found["metadata"].get("generation", 0)
            failure = true_condition(status, "ReplicaFailure") if current else None
            if failure:
                seen.append(creation_symptom(str(failure.get("message")), name))
        return seen

    def failed(self, release: Release, pods: Watch[Pod], symptom: Symptom) -> StageError:
        """Return the end of a rollout; one that is only late is told by what is wrong with it."""
        ours = [p for p in pods.items() if p.run == release.run]
        seen = (s for p in ours for s in pod_symptoms(p))
        told = symptom if symptom.key else next(seen, symptom)
        return StageError(told.reason, told.detail)

    def keep_logs(self, task: Task, pods: Sequence[Pod]) -> None:
        """Keep the end of the logs of pods that may soon be gone; wait for that only a moment."""
        if task.app.deploy.log_tails:
            words = (task.app.name, task.run.id, pods, task.namespace)
            self.logs.start(partial(self.logs.keep, *words), LOG_PATIENCE)

    def smoke_test(self, task: Task, release: Release) -> None:
        """Ask the new pods through the preview Service; raises StageError SmokeFailed."""
        url, health = self.preview(task, release), task.app.deploy.health
        until, passed = self.clock.monotonic() + health.timeout, 0
        while passed < health.successes:
            # the pods themselves first: the preview may lead to those before for a moment
            found = self.ready_pods(task.namespace, release.selector)
            own = [pod_address(p, release.ports[0], health.path) for p in found]
            refusal = next((r for u in (*own, url) if u and (r := health_refusal(u))), None)
            passed = 0 if refusal else passed + 1
            if refusal and len(found) < release.wanted:
                until += self.replaced(task, release)
            elif refusal and self.clock.monotonic() > until:
                raise StageError(Reason.SMOKE_FAILED, f"{health.path}: {refusal}")
            self.pause(HEALTH_INTERVAL if refusal else 0.05)

    def replaced(self, task: Task, release: Release) -> float:
        """Wait until pods that were taken away meanwhile are replaced; return how long it took."""
        began = self.clock.monotonic()
        with self.watched_pods(task) as pods:
            self.roll_out(task, release, pods)
        return self.clock.monotonic() - began

    @persistent
    def preview(self, task: Task, release: Release) -> str:
        """Point the preview Service at a release; return the address of its health path."""
        name, ports = f"{task.app.name}-preview", ports_like(release.ports)
        found = self.kubectl.get("service", name, task.namespace)
        if found is None:
            labels = {LABEL_APP: task.app.name, LABEL_STAGE: "preview"}
            made = manifest("Service", name, labels, {})
            made["spec"] = {"ports": ports, "selector": release.selector}
            self.kubectl.create([made], task.namespace)
            found = self.kubectl.get("service", name, task.namespace) or {"spec": {}}
        elif (found["metadata"].get("labels") or {}).get(LABEL_MANAGED) != MANAGER:
            raise StageError(Reason.ADOPTION_REFUSED, f"Service {name} belongs to someone else")
        elif found["spec"].get("selector") != release.selector:
            selector = {**dict.fromkeys(found["spec"].get("selector") or {}), **release.selector}
            change = {"spec": {"selector": selector, "ports": ports}}
            found = self.kubectl.patch("service", name, task.namespace, change)
        address, port = found["spec"].get("clusterIP", ""), ports[0]["port"]
        return web_address(address, port, task.app.deploy.health.path)

    # The switch and the way back.

    @persistent
    def switch(self, task: Task, release: Release, claimed: Service | None) -> None:
        """Point the live Service at a release in one compare-and-set patch, or make the first."""
        service = self.service(task)
        if service and service.run == release.run:
            return
        self.require_head(task)
        self.check_claim(task, claimed, service)
        source, entry = (
            self.recorded(task, service),
            entry_of(release, task.app.name, self.clock.now()),
        )
        history = [entry, *(source.history if source else ())][:HISTORY_LENGTH]
        claim = self.note(release.run, release.colour, Phase.BAKING)
        notes: Object = {NOTE_HISTORY: history, NOTE_CLAIM: claim}
        if task.last:
            notes[NOTE_BAKE] = round(self.clock.now() + task.app.deploy.bake, 3)
        if service:
            self.write(task, service, notes, entry)
            return
        live = copy.deepcopy(release.service)
        live["metadata"]["annotations"] |= {k: json.dumps(v) for k, v in notes.items()}
        self.kubectl.put(live, None, task.namespace)

    def require_head(self, task: Task) -> None:
        """Raise unless the commit is its branch's head; without an answer it is tried again."""
        heads = self.git.heads(task.app.repository)
        if (word := head_word(task.run, heads, 0, self.clock.now())) == "moved":
            raise SupersededError(Reason.NOT_HEAD, "the branch has another head")
        if word == "unknown":
            raise HookError("the git server does not show the push yet")

    def settle(self, task: Task, pods: Watch[Pod], *, resumed: bool = False) -> None:
        """Verify the switch, bake in the last environment, write the outcome."""
        service, release = self.urgent.switched(task)
        if release and task.last:
            Bake(self, task, release, pods).run(service, resumed=resumed)
        elif release:
            self.verify(task, release, seconds_of(service.live.get("at")))
            self.conclude(task)

    @persistent
    def switched(self, task: Task) -> tuple[Service, Release | None]:
        """Return the live Service and the release that it leads to, none if that has an outcome."""
        service = self.own_live(task)
        entry = service.live
        return service, None if entry["outcome"] else self.release(task, entry)

    def verify(self, task: Task, release: Release, since: float) -> None:
        """Wait for the endpoints of a switch; take traffic back if they do not come."""
        wanted = release.wanted
        if self.followed(task, release.selector, wanted, since):
            return
        detail = f"the endpoints did not become the {wanted} pods of {release.run}"
        ready = len(self.ready_pods(task.namespace, release.selector))
        target, old, _ = self.look_back(task, unhealthy=False)
        if ahead(old, (ready, wanted)) < 0 or (target and not old[0]):
            raise StageError(Reason.BOTH_SICK, f"{detail}; nothing better to go back to")
        self.switch_back(task, Outcome.FAILED, Reason.ENDPOINTS_MISSING, detail)
        raise StageError(Reason.ENDPOINTS_MISSING, detail)

    def release(self, task: Task, entry: Mapping[str, Any]) -> Release:
        """Return the release that a history entry names."""
        name = str(entry.get("release") or "none")
        found = self.kubectl.get("configmap", name, task.namespace)
        if not found:
            raise StageError(Reason.VANISHED, f"release record {name} is gone")
        packed = str((found.get("binaryData") or {}).get("release", ""))
        whole = release_record(task.app.name, packed)
        seen = (found["metadata"]["name"], substance(found))
        if seen != (whole["metadata"]["name"], substance(whole)):
            detail = f"release record {name} was changed, or is not one of {task.app.name}"
            raise StageError(Reason.ADOPTION_REFUSED, detail)
        return Release.from_configmap(found)

    def followed(self, task: Task, selector: Mapping[str, str], wanted: int, since: float) -> bool:
        """Whether the ready endpoints become the wanted pods of the live selector in time.

        Only the time between looks that were answered counts. That they are still all of another
        version says nothing against this one, nor does what the cluster took away or replaced since
        a time.
        """
        spent, limit, looked = 0.0, VERIFY_SECONDS, self.clock.monotonic()
        while spent < limit:
            with suppress(KubectlError):
                converged, moved = self.endpoints(task, selector, wanted, since)
                if converged:
                    return True
                limit = VERIFY_SECONDS if moved else UNMOVED_SECONDS
                spent += min(self.clock.monotonic() - looked, 1.0)
                wanted = min(wanted, self.size(task, selector))
            looked = self.clock.monotonic()
            self.still_live(task)
            self.pause(0.1)
        return False

    def endpoints(
        self, task: Task, selector: Mapping[str, str], wanted: int, since: float
    ) -> tuple[bool, bool]:
        """Return whether the ready endpoints are pods of a selector and enough, or some of them."""
        terms = f"kubernetes.io/service-name={task.app.name}"
        slices = self.kubectl.list("endpointslices", task.namespace, "-l", terms)
        ready = ready_endpoints(slices)
        pods = [Pod(p) for p in self.pods(task.namespace, selector)]
        known, stayed = {p.name for p in pods}, [p for p in pods if p.created <= since]
        enough = min(wanted, sum(not p.leaving for p in stayed))
        moved = bool(slices) and (not ready or bool(ready & known))
        return bool(ready and ready <= known and len(ready) >= enough), moved

    def still_live(self, task: Task) -> None:
        """Raise when the live Service was switched away from a run, as far as it can be seen."""
        with suppress(KubectlError):
            self.judge_live(task, self.service(task))

    def judge_live(self, task: Task, service: Service | None) -> Service:
        """Return the live Service while it selects the run; raises when it was switched away."""
        if service and service.run == task.run.id:
            return service
        if service and service.entry(task.run.id).get("outcome"):
            raise SupersededError(Reason.ROLLED_BACK, "rolled back by hand")
        source = self.recorded(task, service)
        drift = self.drift(task, service, source) if service else Drift.WIDENED
        if drift is Drift.WIDENED and source and source.served.get("run") == task.run.id:
            raise HookError("the live Service was widened, or deleted; it is put back first")
        contested = drift is Drift.CONTESTED
        reason = Reason.SELECTOR_CONTESTED if contested else Reason.SELECTOR_CHANGED
        raise SupersededError(reason, self.last_manager(task))

    def own_live(self, task: Task) -> Service:
        """Return the live Service, with its history, while it selects the run; else raise."""
        service = self.judge_live(task, self.service(task))
        if not service.live:
            self.mend(task)
            raise HookError("the history of the live Service was lost, and is put back first")
        return service

    def take_back(self, task: Task, sick: str, well: tuple[int, int] | None) -> None:
        """Switch back; raises StageError.

        Only onto a version of which a larger share is well: with both sick it stays. Where the
        health path failed, so that `well` is not known, the pods of both are asked one by one; the
        verdict is dropped when as many of the new ones answer: a lost machine has pods of both.
        """
        target, old, answering = self.look_back(task, unhealthy=well is None)
        if ahead(old, well or answering) > 0:
            self.switch_back(task, Outcome.SWITCHED_BACK, Reason.SICK_AFTER_SWITCH, sick)
            raise StageError(Reason.SICK_AFTER_SWITCH, sick)
        if not (target and answering[0]):
            other = "the version before is no better" if target else "there is no version before"
            raise StageError(Reason.BOTH_SICK, f"{sick}; {other}")

    @persistent
    def look_back(
        self, task: Task, *, unhealthy: bool
    ) -> tuple[Object, tuple[int, int], tuple[int, int]]:
        """Return what there is to go back to, how many of its pods are well, and of the live one.

        The latter only of an unhealthy one, by the word of the pods themselves, not of a Service.
        """
        service = self.service(task)
        target = service.before if service else {}
        both = target, service.live if service and unhealthy else {}
        with ThreadPoolExecutor(2) as at_once:
            old, new = at_once.map(partial(self.well, task, ask=unhealthy), both)
        return target, old, new

    def well(self, task: Task, entry: Object, *, ask: bool) -> tuple[int, int]:
        """Return how many pods of a history entry are well, and of how many.

        Well are those that are ready and, if they are asked, healthy within a second.
        """
        pods = self.staying(task.namespace, entry.get("selector", {}))
        port, path = (entry.get("ports") or [{}])[0], task.app.deploy.health.path
        ready = [p for p in pods if Pod(p).ready]
        ours = LABEL_VERSION in entry.get("selector", {})
        wanted = max(len(pods), self.size(task, entry["selector"]) if ours else 0)
        urls = [u for p in ready if ask and (u := pod_address(p, port, path))]
        with ThreadPoolExecutor(32) as at_once:
            refused = at_once.map(partial(health_refusal, patience=1.0), urls)
            return len(ready) - sum(map(bool, refused)), wanted

    def switch_back(self, task: Task, outcome: Outcome, reason: Reason, detail: str) -> None:
        """Point the live Service back at the version before, in one patch that carries the outcome.

        It does not look at the pods it leaves. Tried until it is done. Raises SupersededError when
        someone else has switched; a first deployment has nothing to go back to, so its Service is
        removed.
        """
        ended = {"outcome": str(outcome), "reason": str(reason), "detail": clip(detail)}
        if self.switched_back(task, ended):
            self.metrics.switches.labels(*task.labels, "back").inc()
            error("switched back", reason=reason, detail=clip(detail), **task.words)
        else:
            error("nothing to switch back to", reason=reason, detail=clip(detail), **task.words)

    @persistent
    def switched_back(self, task: Task, ended: Object) -> bool:
        """Switch back if there is a version before; return whether this was done, now or before."""
        service = self.service(task)
        if service is None:  # deleted, perhaps by the try before
            return False
        if service.entry(task.run.id).items() >= ended.items():
            return True
        service = self.own_live(task)
        target, live = service.before, service.live
        if not target and not service.note(NOTE_PREVIOUS, {}):
            self.known.pop(task.labels, None)
            self.state.write(task.app, forget=[f"live-{task.environment}"])
            self.kubectl.delete("service", [task.app.name], task.namespace)
        if not target:
            return False
        notes = {
            NOTE_HISTORY: [{**e, **ended} if e == live else e for e in service.history],
            NOTE_CLAIM: self.note(task.run.id, live.get("colour", ""), Phase.SWITCHED_BACK),
            NOTE_BAKE: None,
        }
        self.write(task, service, notes, target)
        return True

    @persistent
    def conclude(
        self, task: Task, proof: Callable[[], bool] = lambda: True, *, unjudged: bool = False
    ) -> bool:
        """Write that a version stays, and leave a claim by which the old one is drained.

        Each try of it asks for the proof that the version is healthy, after it has read what it is
        going to change; without it nothing is written, and the answer is False.
        """
        service = self.own_live(task)
        fresh = abs(self.clock.now() - seconds_of(service.claim.get("since"))) < CLAIM_SECONDS
        if fresh and service.claim.get("phase") == Phase.ROLLBACK:
            raise HookError("a rollback is under way")
        if not proof():
            return False
        live, old = service.live, service.before.get("colour", "")
        ended = {**live, "outcome": Outcome.DEPLOYED, **({"unjudged": True} if unjudged else {})}
        drain = {**self.note(task.run.id, old, Phase.DRAINING), "since": live.get("at", 0)}
        history = [ended if e == live else e for e in service.history]
        claim = drain if old in COLOURS else None
        self.write(task, service, {NOTE_HISTORY: history, NOTE_BAKE: None, NOTE_CLAIM: claim})
        return True

    # What is left behind.

    def tidy(self, task: Task, claim: Object) -> None:
        """Finish what a claim says is unfinished, then remove what nothing names any more."""
        service = self.service(task)
        if service is None or service.claim != claim:
            return
        colour, phase = str(claim.get("colour", "")), claim.get("phase")
        if phase == Phase.ROLLBACK and claim.get("heal"):
            self.heal(task, f"{task.app.name}-{colour}", service)
        elif colour in COLOURS and service.selector.get(LABEL_VERSION) != colour:
            name, retain = f"{task.app.name}-{colour}", task.app.deploy.retain
            if phase == Phase.PREPARING:
                self.heal(task, name, service)
            elif phase == Phase.SWITCHED_BACK:
                self.scale(task, name, 0, str(claim.get("run")))
            elif phase == Phase.DRAINING and retain is not None:
                self.scale(task, name, retain)
            elif phase == Phase.DRAINING:
                self.restart(task, name)

        self.hold(task, None, claim)
        self.collect_garbage(task)

    @persistent
    def hold(self, task: Task, claim: Object | None, was: Object | None = None) -> Service | None:
        """Put a claim in the place of another, or of any; None drops it."""
        service = self.service(task)
        if service is None or (was and service.claim != was):
            return service
        notes: Object = {NOTE_CLAIM: claim}
        if goal := None if claim else self.widened(task, service):
            history = [{**e, **goal} if e == service.live else e for e in service.history]
            notes |= {NOTE_HISTORY: history, NOTE_PREVIOUS: None}
        return self.write(task, service, notes, goal)

    def widened(self, task: Task, service: Service) -> Object | None:
        """Return the selector that a Service had before it was adopted, if it can have that again.

        Its owner goes on without us, and what he changes next may not fit a narrowed one. Raises
        HookError while it would reach pods of ours, too, that have not begun to end.
        """
        was, ours = service.live.get("was"), {LABEL_APP: task.app.name}
        if service.live.get("outcome") != ADOPTED or not was or was == service.selector:
            return None
        found = self.kubectl.list("deployments", task.namespace, "-l", selector_text(ours))
        if any(d["spec"].get("replicas", 1) for d in found):
            return None
        if self.staying(task.namespace, ours):
            raise HookError("the pods of the failed version are not gone yet")
        return {"selector": was}

    @persistent
    def scale(self, task: Task, name: str, replicas: int, run: str = "") -> None:
        """Set the size of a Deployment, with a run only if it still carries it."""
        found = self.kubectl.get("deployment", name, task.namespace)
        if found and (not run or found["metadata"]["labels"].get(LABEL_RUN) == run):
            meta = {"resourceVersion": found["metadata"]["resourceVersion"]}
            change = {"metadata": meta, "spec": {"replicas": replicas}}
            self.kubectl.patch("deployment", name, task.namespace, change)

    def restart(self, task: Task, name: str) -> None:
        """Restart what an old colour has of pods: so kept-alive connections move."""
        found = self.kubectl.get("deployment", name, task.namespace)
        if found and found["spec"].get("replicas"):
            self.kubectl.run("rollout", "restart", f"deployment/{name}", namespace=task.namespace)

    def heal(self, task: Task, name: str, service: Service) -> None:
        """Put the rollback target back into the idle colour that a failed deployment overwrote.

        From its release, never by `rollout undo`. Where no target stood, the Deployment goes. Tried
        once: what does not work is said and counted, unless only the API server is away.
        """
        record = service.claim.get("heal")
        try:
            if not record:
                return self.kubectl.delete("deployment", [name], task.namespace)
            release = self.release(task, {"release": record})
            self.apply(task, release, service)
            return info("healed", target=release.run, colour=release.colour, **task.words)
        except (StageError, KubectlError) as failed:
            if isinstance(failed, KubectlError) and failed.kind == "Unreachable":
                raise
            error("given up", what="heal", detail=str(failed), **task.words)
            self.metrics.errors.labels("heal").inc()

    def collect_garbage(self, task: Task) -> None:
        """Delete what a failed first deployment left, and records that nothing names any more."""
        namespace, name = task.namespace, task.app.name
        ours = f"{LABEL_MANAGED}={MANAGER},{LABEL_APP}={name}"
        service, named = self.service(task), ""
        source = self.recorded(task, service)
        # what a deleted Service named is in use, and is named again when it is back
        if source and (service is None or service.claim or not service.history):
            return
        deployments = self.kubectl.list("deployments", namespace, "-l", ours)
        if service:
            sets = self.kubectl.list("replicasets", namespace, "-l", f"{LABEL_APP}={name}")
            named = json.dumps([service.history, deployments, sets])
        else:
            metas = [d["metadata"] for d in deployments]
            left = [m["name"] for m in metas if m["labels"].get(LABEL_RUN) == task.run.id]
            self.kubectl.delete("deployment", left, namespace)
            self.kubectl.delete("service", [f"{name}-preview"], namespace)
        # logs go by their age and number
        found = self.kubectl.names("configmaps", namespace, f"{ours},{LABEL_STAGE}!=log")
        now = self.service(task)
        # whoever made one of them after the first look has claimed the Service by now
        if (now.version if now else 0) == (service.version if service else 0):
            # a release has the text of its copies: applying it makes them again
            self.kubectl.delete("configmap", [n for n in found if n not in named], namespace)

    # Rollback on request.

    def rollback(self, task: Task, service: Service, target: Object, reason: str) -> Object:
        """Switch an environment to an entry of its history; return the entry as it is live then.

        Works beside a daemon or without one. A target of which enough pods are ready is one patch
        away, and what overwrote its Deployment is undone afterwards; one that was scaled down is
        applied again and waited for. Raises RefusedError when someone else has switched meanwhile,
        and StageError when the target does not become ready.
        """
        task = replace(task, run=replace(task.run, id=target["run"]))
        claim = self.note(task.run.id, target["colour"], Phase.ROLLBACK)
        claimed, left = self.hold(task, claim) or service, service.claim or None
        switched = None
        try:
            if claimed.selector != service.selector:
                raise RefusedError("traffic was switched this very moment; look, and try again")
            goal = self.raise_target(task, claimed, target)
            switched = self.go_back(task, claimed, goal, reason)
            left = None
            if goal.overwritten and switched and switched.claim.get("heal"):
                self.heal(task, f"{task.app.name}-{target['colour']}", switched)
                claim = switched.claim
        finally:
            with suppress(HookError):
                if switched is None:
                    self.resume(task, f"{task.app.name}-{target['colour']}")
                self.hold(task, left, claim)
        return goal.entry

    def resume(self, task: Task, name: str) -> None:
        """Let a Deployment go on that a rollback has paused."""
        found = self.kubectl.get("deployment", name, task.namespace)
        if found and found["spec"].get("paused"):
            self.kubectl.patch("deployment", name, task.namespace, {"spec": {"paused": False}})

    @persistent
    def go_back(self, task: Task, claimed: Service, goal: Goal, reason: str) -> Service | None:
        """Point the live Service at a rollback's goal, if nobody else has taken over."""
        now = self.service(task)
        if now is None or now.selector == goal.entry["selector"]:
            return now
        if (now.claim, now.selector) != (claimed.claim, claimed.selector):
            raise RefusedError(f"{now.claim.get('run') or 'someone'} has taken over meanwhile")
        history = rolled_back(now.history, goal.target, goal.entry, reason)
        claim = {**claimed.claim, "heal": goal.target["release"]} if goal.overwritten else None
        notes = {NOTE_HISTORY: history, NOTE_CLAIM: claim, NOTE_BAKE: None}
        return self.write(task, now, notes, goal.entry)

    def raise_target(self, task: Task, claimed: Service, target: Object) -> Goal:
        """Return where a rollback goes once its pods are ready, brought back if need be."""
        app, live = task.app.name, claimed.selector.get(LABEL_VERSION, "")
        apart = target["run"] and target["colour"] != live
        carries = self.fenced(task, target) if apart else ""
        ready = len(self.ready_pods(task.namespace, target["selector"]))
        overwritten = bool(carries != target["run"])
        if ready >= target["replicas"] and (not overwritten or (carries and target["release"])):
            return Goal(target, target, overwritten)
        if not target["release"]:
            gone = "the version before has no ready pods and was not deployed from here"
            raise RefusedError(gone)
        release = self.release(task, target)
        colour = next(c for c in (release.colour, *COLOURS) if c != live)
        size = self.size(task, claimed.selector)
        release = recoloured(release, task.app, colour, max(size, release.wanted))
        record = release.configmap(app)
        with self.watched_pods(task) as pods:
            self.apply(task, release, claimed)
            self.roll_out(task, release, pods)
        changed = {"colour": colour, "selector": release.selector, "replicas": release.wanted}
        entry = {**target, **changed, "release": record["metadata"]["name"]}
        return Goal(target, entry, overwritten=False)

    @persistent
    def fenced(self, task: Task, target: Object) -> str:
        """Mark a target's Deployment as ours from now on; return the run it carries, "" for none.

        Ready pods are no proof that it stands: a rollout may be replacing them. And a write that is
        late, of a deployment that has lost its claim, finds a conflict after this.
        """
        name = f"{task.app.name}-{target.get('colour')}"
        fence = {"metadata": {"annotations": {NOTE_WRITTEN: str(self.clock.now())}}}
        try:
            found = self.kubectl.patch("deployment", name, task.namespace, fence)
        except KubectlError as gone:
            if gone.kind != "NotFound":
                raise
            return ""
        carries = str((found["metadata"].get("labels") or {}).get(LABEL_RUN, ""))
        if carries != target["run"] and target["release"]:
            # until it is put back: its rollout would take the target's pods away
            self.kubectl.patch("deployment", name, task.namespace, {"spec": {"paused": True}})
        return carries


def kept(claimed: Service, now: Service) -> bool:
    """Whether a Service is still the one that was claimed, with what was written on it."""
    return now.uid == claimed.uid and (bool(now.history) or not claimed.history)


def entry_of(release: Release, app: str, now: float) -> Object:
    """Return the history entry of a switch to a release."""
    told = ("run", "commit", "image", "colour", "selector", "ports")
    copied_fields: Object = {name: getattr(release, name) for name in told}
    record = release.configmap(app)["metadata"]["name"]
    more = {"release": record, "replicas": release.wanted, "at": round(now, 3), "by": MANAGER}
    return asdict(HistoryEntry(**copied_fields, **more))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """What the API server last said of the pods of a run in its bake."""

    at: float
    pods: tuple[Pod, ...] = ()
    wanted: int = 0
    urls: tuple[str, ...] = ()  # the health paths of those that were ready and stay


class Bake:
    """Watches a switched-to version until it is confirmed, or takes the traffic back.

    One thread asks for health and does nothing else, so that nothing holds it up. A second one asks
    the API server, and confirms. The worker itself judges what they have seen, and takes back.
    """

    def __init__(self, deployer: Deployer, task: Task, release: Release, pods: Watch[Pod]) -> None:
        self.deployer, self.urgent, self.clock = deployer, deployer.urgent, deployer.clock
        self.task, self.release, self.mirror = task, release, pods
        self.health, self.checks, self.doom = task.app.deploy.health, Checks(), Doom()
        at = -NEVER if pods.trouble else self.clock.monotonic()
        self.sight = Sight(at=at, pods=tuple(self.mirrored()), wanted=release.wanted)
        self.needed, self.began = task.app.deploy.bake, self.clock.monotonic()
        self.over = threading.Event()
        self.ended: RunError | None = None
        self.unjudged = self.confirmed = False
        self.since, self.url, self.lost = 0.0, "", 0  # the switch, whom to ask, answers lost

    def run(self, service: Service, *, resumed: bool) -> None:
        """Return when the version is confirmed; raises RunError when it is not going to be."""
        rest = seconds_of(service.note(NOTE_BAKE, 0.0)) - self.clock.now()
        if resumed:  # what was judged before this process, nobody knows
            self.needed = min(self.needed, max(rest, REBAKE_SECONDS))
        self.since = seconds_of(service.live.get("at"))
        threads = [threading.Thread(target=t, daemon=True) for t in (self.check, self.look)]
        try:
            for thread in threads:
                thread.start()
            while not (self.confirmed and self.healthy()):
                with self.unanswered():
                    self.judge()
                alive = all(thread.is_alive() for thread in threads)
                if self.ended:
                    raise self.ended
                if not (alive or self.confirmed):
                    raise HookError("a thread of the bake has ended")
                self.deployer.pause(0.1)
        finally:
            self.over.set()

    def check(self) -> None:
        """Ask for health, at most four times a second, until the bake is over."""
        took = 0.0
        while not self.over.wait(max(0.0, HEALTH_INTERVAL - took)):
            began = self.clock.monotonic()
            with suppress(OSError):  # no more files: nothing was learned
                if self.url:
                    refusal = health_refusal(self.url)
                    self.checks.add(self.clock.monotonic(), refusal, clear=self.clear())
            took = self.clock.monotonic() - began

    def look(self) -> None:
        """See the endpoints arrive, then look at the pods again and again; confirm in the end."""
        step = self.arrive
        while not (self.over.is_set() or self.ended or self.confirmed):
            try:
                with self.unanswered():
                    step()
                    step = self.refresh
                    if self.unjudged or self.checks.judged >= self.needed:
                        conclude = partial(self.deployer.conclude, self.task, self.proof)
                        self.confirmed = self.healthy() and conclude(unjudged=self.unjudged)
                    # at its end the bake waits for no look
                    self.over.wait(min(LOOK_SECONDS, max(0.5, self.needed - self.checks.judged)))
            except RunError as ended:
                self.ended = ended
            except InterruptedError:
                break

    def arrive(self) -> None:
        """Let health be asked for, and wait for the endpoints of the switch."""
        self.url = self.url or self.urgent.preview(self.task, self.release)
        self.urgent.verify(self.task, self.release, self.since)
        self.refresh()

    def refresh(self) -> None:
        """Read the live Service and the pods, whatever the mirror shows."""
        task, selector, began = self.task, self.release.selector, self.clock.monotonic()
        self.urgent.judge_live(task, self.urgent.service(task))
        wanted = self.urgent.size(task, selector)
        found = self.urgent.staying(task.namespace, selector)
        served = [p for p in found if Pod(p).seen_ready]
        urls = [pod_address(p, self.release.ports[0], self.health.path) for p in served]
        pods = tuple(map(Pod, found))
        self.sight = Sight(at=began, pods=pods, wanted=wanted, urls=tuple(filter(None, urls)))

    def mirrored(self) -> list[Pod]:
        """Return the pods of the run as the mirror has them, which may follow or not."""
        return [p for p in self.mirror.items() if p.run == self.release.run]

    def fresh(self) -> bool:
        """Whether the API server was heard a moment ago."""
        return self.clock.monotonic() - self.sight.at <= FRESH_SECONDS

    def clear(self) -> bool:
        """Whether health can be judged: no pod is missing, as far as a moment ago."""
        return self.fresh() and not disturbed(self.sight.pods, self.sight.wanted)

    def healthy(self) -> bool:
        """Whether the last checks passed, as many as it takes, and no container has failed."""
        passed = self.checks.passing(self.clock.monotonic()) >= self.health.successes
        return passed and not sickness([*self.sight.pods, *self.mirrored()], self.since)

    def proof(self) -> bool:
        """Whether the version may be confirmed now: its endpoints are there, and it is healthy."""
        wanted, selector = self.sight.wanted, self.release.selector
        arrived, _ = self.urgent.endpoints(self.task, selector, wanted, self.since)
        return arrived and self.healthy() and not self.over.is_set()

    def judge(self) -> None:
        """Take the traffic back from a version that is sick, or that nobody can judge."""
        sight, mirrored, fresh = self.sight, self.mirrored(), self.fresh()
        now, newer = self.clock.monotonic(), {p.name: p for p in mirrored}
        known = [max(p, newer.get(p.name, p), key=lambda pod: pod.version) for p in sight.pods]
        known = known if fresh else mirrored
        lacks = shortage(known, self.since, self.clock.now(), starting=bool(sight.pods))
        lacks = lacks if fresh or not self.mirror.trouble else None  # it may be over by now
        lasts = self.doom.verdict([lacks] if lacks and (known or fresh) else [], now)
        sick = sickness([*known, *mirrored], self.since) or (lasts.detail if lasts else "")
        failed = self.checks.failures >= self.health.failures and self.condemned()
        if failed:
            times = f"{self.checks.failures} times in a row: {self.checks.refusal}"
            sick = f"{self.health.path} failed {times}"
        if sick:
            sound = sum(p.ready and not sickness([p], self.since) for p in known)
            of_all = max(sight.wanted, sum(p.stays for p in known))
            self.urgent.take_back(self.task, sick, None if failed else (sound, of_all))
            self.checks.failures = 0
        elif not self.unjudged:
            self.compare(now - self.began - min(self.checks.judged, self.needed))

    def condemned(self) -> bool:
        """Whether failed checks count: not while they may be those of a pod that is taken away."""
        if self.clear() or not self.fresh():
            return True
        with ThreadPoolExecutor(32) as at_once:
            return any(at_once.map(partial(health_refusal, patience=1.0), self.sight.urls))

    def compare(self, spent: float) -> None:
        """Let the healthier version have the traffic where time does not tell; alike: the new."""
        if spent <= self.task.app.deploy.rollout_timeout:
            return
        _, old, new = self.urgent.look_back(self.task, unhealthy=True)
        new = new if self.healthy() else (0, new[1])
        detail = f"health could not be judged for {spent:.0f} s; now {new[0]} of {new[1]} pods"
        detail += f" are healthy, {old[0]} of {old[1]} of the version before"
        if ahead(old, new) > 0:
            self.urgent.switch_back(self.task, Outcome.FAILED, Reason.UNJUDGED, detail)
            raise StageError(Reason.UNJUDGED, detail)
        if not new[0]:
            raise StageError(Reason.BOTH_SICK, detail)
        warn("confirmed unjudged", detail=detail, **self.task.words)
        self.unjudged = True

    @contextmanager
    def unanswered(self) -> Iterator[None]:
        """Let a step that got no answer, or could not even be begun, be taken again."""
        try:
            yield
        except (RunError, InterruptedError):
            raise
        except (HookError, OSError, RuntimeError, *ODD) as lost:
            if self.lost % 60 == 0:
                warn("will look again", detail=clip(str(lost)), **self.task.words)
            self.lost += 1
            self.deployer.pause(0.5)


def rolled_back(history: list[Object], target: Object, goal: Object, reason: str) -> list[Object]:
    """Return a history in which what came after a target is rolled back; the target is `goal`."""
    keys = [(e.get("run"), e.get("at")) for e in history]
    if (key := (target.get("run"), target.get("at"))) not in keys:
        raise RefusedError("the history was changed meanwhile; look, and try again")
    place = keys.index(key)
    gone = {"outcome": Outcome.ROLLED_BACK, "reason": Reason.ROLLED_BACK, "detail": reason}
    stayed = (Outcome.DEPLOYED, "")
    newer = [{**e, **gone} if e.get("outcome") in stayed else e for e in history[:place]]
    return [*newer, goal, *history[place + 1 :]]


def selector_text(selector: Mapping[str, str]) -> str:
    """Return a selector as `-l` takes it."""
    return ",".join(f"{k}={v}" for k, v in selector.items())


def recoloured(release: Release, app: App, colour: str, replicas: int) -> Release:
    """Return a release as it is rendered for a colour and a size."""
    deployment = copy.deepcopy(release.deployment)
    deployment["metadata"]["name"] = f"{app.name}-{colour}"
    spec = deployment["spec"]
    spec["replicas"] = replicas
    template = spec["template"]["metadata"]["labels"]
    for labels in (deployment["metadata"]["labels"], template, spec["selector"]["matchLabels"]):
        labels[LABEL_VERSION] = colour
    selector = {**release.selector, LABEL_VERSION: colour}
    return replace(release, colour=colour, selector=selector, deployment=deployment)


def proven(deployment: Object, ready: int) -> bool:
    """Whether a Deployment's status and its ready pods prove that all wanted ones are ready."""
    meta, spec, status = deployment["metadata"], deployment["spec"], deployment.get("status") or {}
    counts = ("updatedReplicas", "readyReplicas", "availableReplicas", "replicas")
    wanted, current = spec.get("replicas", 1), status.get("observedGeneration", 0)
    whole = {status.get(k, 0) for k in counts} == {wanted} and ready >= wanted > 0
    return bool(whole and current >= meta["generation"])


def ready_endpoints(slices: Iterable[Object]) -> set[str]:
    """Return the names of the pods behind the ready endpoints of EndpointSlices."""
    endpoints = [e for s in slices for e in s.get("endpoints") or []]
    ready = [e for e in endpoints if (e.get("conditions") or {}).get("ready") is not False]
    return {(e.get("targetRef") or {}).get("name", e["addresses"][0]) for e in ready}


def web_address(host: str, port: Any, path: str) -> str:
    """Return an http address, also of an IPv6 host."""
    return f"http://[{host}]:{port}{path}" if ":" in host else f"http://{host}:{port}{path}"


def pod_address(pod: Object, port: Mapping[str, Any], path: str) -> str | None:
    """Return the address of a pod's health path by its Service's target port, None if unknown."""
    target, host = port.get("targetPort", port.get("port")), (pod.get("status") or {}).get("podIP")
    if isinstance(target, str):
        containers = [*pod["spec"]["containers"], *(pod["spec"].get("initContainers") or [])]
        ports = [p for c in containers for p in c.get("ports") or []]
        target = next((p["containerPort"] for p in ports if p.get("name") == target), None)
    return web_address(host, target, path) if target and host else None


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


class Once:
    """Remembers for a while what was done, and on what ground, until its effect shows."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._done: dict[Any, tuple[Any, float]] = {}

    def may(self, key: Any, ground: Any, seconds: float) -> bool:
        """Whether to do something: on another ground than the last time, or so long after it."""
        now = self.clock.monotonic()
        self._done = {k: done for k, done in self._done.items() if done[1] > now}
        if key in self._done and self._done[key][0] == ground:
            return False
        self._done[key] = ground, now + seconds
        return True


class Retry:
    """When each item that failed is tried again, while the others go on."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._failed: dict[str, tuple[int, float]] = {}

    def due(self, item: str) -> bool:
        """Whether an item may be tried now."""
        return self._failed.get(item, (0, 0.0))[1] <= self.clock.monotonic()

    def failed(self, item: str) -> int:
        """Put an item off, longer each time; return how often it has failed in a row."""
        failures = self._failed.get(item, (0, 0.0))[0] + 1
        self._failed[item] = failures, self.clock.monotonic() + backoff(failures - 1)
        return failures

    def succeeded(self, item: str) -> None:
        """Forget that an item had failed."""
        self._failed.pop(item, None)

    def pause(self, longest: float) -> float:
        """Return the seconds until the next item is due."""
        times = [until for _, until in self._failed.values()]
        return max(0.0, min([longest, *(t - self.clock.monotonic() for t in times)]))


CATCH_UP = "catch-up"  # in the place of a delivery's id
STEP_SECONDS = 300.0  # in which a thread must have moved
OUTCOMES = {  # of deployments that end otherwise than failed or superseded
    Reason.ROLLED_BACK: Outcome.ROLLED_BACK,
    Reason.SICK_AFTER_SWITCH: Outcome.SWITCHED_BACK,
}
FORGIVEN = {  # ends of a deployment that say nothing new against its commit
    *(Reason.BOTH_SICK, Reason.UNJUDGED, Reason.SELECTOR_CHANGED, Reason.SELECTOR_CONTESTED),
    *(Reason.ADOPTION_REFUSED, Reason.REJECTED),
    *(Reason.QUOTA_EXCEEDED, Reason.UNSCHEDULABLE),  # a full cluster
}
RETRIED = ("Unreachable", "Conflict", "Unknown", "Forbidden", "NotFound")  # nobody's fault, or ours


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Stored pushes of one app that get their Jobs in one call."""

    app: str
    deploys: bool
    pushes: tuple[tuple[Path, Run], ...]

    @property
    def name(self) -> str:
        """What it is tried again by."""
        return f"{self.app}, {'deployed' if self.deploys else 'only tested'}"


class Controller:
    """Observes, decides, acts: one thread decides, slow steps run in a worker an environment."""

    def __init__(self, config: Config, deployer: Deployer, spool: Spool) -> None:
        self.config, self.deployer, self.spool = config, deployer, spool
        self.kubectl, self.metrics, self.clock = deployer.kubectl, deployer.metrics, deployer.clock
        self.state, self.pulses = deployer.state, Pulses(self.clock)
        self.stop, self.wake, self.spooled = deployer.stop, threading.Event(), threading.Event()
        ours, spaces = f"{LABEL_MANAGED}={MANAGER}", config.namespaces
        stages = [spaces[s] for s in STAGES]
        self.jobs = [Watch(self.kubectl, "jobs", n, Job, ours) for n in stages]
        self.pods = [Watch(self.kubectl, "pods", n, Pod, ours) for n in stages]
        used = dict.fromkeys(e for app in config.apps for e in app.deploy.environments)
        self.apps = {a.name: a for a in config.apps}
        # by name, with whatever labels: one that lost ours is still what visitors ask
        live = partial(app_service, frozenset(self.apps))
        self.services = {e: Watch(self.kubectl, "services", spaces[e], live, "") for e in used}
        self.asked = {name: threading.Event() for name in self.apps}
        # by app: the time of the question, that of the answer on the other clock, the answer
        self.heads: dict[str, tuple[float, float, dict[str, str]]] = {}
        self.due = dict.fromkeys(self.apps, 0.0)  # when to compare them with what was last seen
        self.taken: dict[tuple[str, str], tuple[int, float]] = {}  # failures, and until when
        self.admissions = Retry(self.clock)  # by the name of a batch
        self.collisions: dict[str, tuple[str, str]] = {}  # ids that were taken, by ref and commit
        self.doom: dict[str, Doom] = {}
        self.known: dict[str, Job] = {}  # by name; what is gone until that is written down
        self.once = Once(self.clock)
        self.failing = -NEVER  # until when a run's step counts as failing: not each look takes it
        self.selectors: dict[tuple[str, str], dict[str, str]] = {}  # of live Services, last seen
        self.saved: dict[tuple[str, str], Object] = {}  # what is live, as it is written down
        self.threads: dict[str, threading.Thread] = {}
        self.troubles: dict[str, str] = {}  # by thread: why its last step failed
        self.metrics.spool.set_function(lambda: len(spool))
        self.metrics.begin(config.apps)

    # Threads.

    def watches(self) -> list[Watch[Any]]:
        """Return every mirror."""
        return [*self.jobs, *self.pods, *self.services.values()]

    def start(self) -> None:
        """Start every thread; none of them needs the cluster to be there."""
        for watch in self.watches():
            name = f"watch of {watch.resource} in {watch.namespace}"
            beat = partial(self.pulses.beat, name, WATCH_SECONDS + 120.0)
            self.spawn(name, partial(watch.run, beat, self.wake))
        self.repeat("intake", "intake waits for the cluster", self.intake, self.spooled)
        self.repeat("controller", "a step will be tried again", self.control, self.wake)
        for app in self.config.apps:
            step, asked = partial(self.read_heads, app), self.asked[app.name]
            self.repeat(f"heads of {app.name}", "catch-up waits", step, asked)

    def spawn(self, name: str, body: Callable[[], None], *, again: bool = True) -> None:
        """Run a thread; a bug in it is logged and counted, and its body run again if so wanted."""

        def run() -> None:
            """Run the body, and again after a bug in it if so wanted."""
            while not self.stop.is_set():
                try:
                    return body()
                except Exception:  # noqa: BLE001 - a thread ends here: logged, counted, run again
                    error("a thread failed", exc=True, thread=name)
                    self.metrics.errors.labels(name.partition(" ")[0]).inc()
                    if not again or self.stop.wait(1.0):
                        break
            return None

        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        self.threads[name] = thread

    def repeat(
        self, name: str, complaint: str, step: Callable[[], float], event: threading.Event
    ) -> None:
        """Run a thread that takes a step when its event is set, or so long after the last one."""

        def body() -> None:
            """Take step after step until stopped."""
            failures = 0
            while not self.stop.is_set():
                self.pulses.beat(name, STEP_SECONDS)
                event.clear()
                try:
                    pause, failures = step(), 0
                    if self.troubles.pop(name, ""):
                        info("goes on again", what=name)
                except (HookError, OSError) as lost:
                    self.troubles[name] = str(lost)
                    if failures < len(DELAYS) or failures % 10 == 0:  # then every five minutes
                        warn(complaint, what=name, detail=str(lost))
                    self.stop.wait(backoff(failures))
                    pause, failures = 0.0, failures + 1
                self.metrics.waiting.labels(name).set(bool(failures))
                self.pulses.beat(name, pause + STEP_SECONDS)
                event.wait(pause)
                self.stop.wait(0.05)  # a burst of events is one look

        self.spawn(name, body)

    def shut_down(self, seconds: float) -> None:
        """End every thread, then drain the spool; what is cut off the next process takes up."""
        until = self.clock.monotonic() + seconds
        self.stop.set()
        for watch in self.watches():
            watch.stop()
        for event in (self.wake, self.spooled, *self.asked.values()):
            event.set()
        for thread in [*self.threads.values()]:
            thread.join(max(0.0, until - self.clock.monotonic()))
        if self.clock.monotonic() < until - seconds / 2:  # else an API that hangs would take it all
            with suppress(HookError):
                self.intake()

    # Intake: from the spool into the cluster.

    def intake(self) -> float:
        """Turn what is spooled into suspended Jobs, a batch of each app, deploy branches first.

        What is left of one app is tried again by itself, and delays no other app.
        """
        for _ in range(5):  # a burst of pushes is one call
            stored = len(self.spool)
            if self.stop.wait(0.05) or len(self.spool) == stored:
                break
        pushes, unreachable = self.spool.read(), 0
        batches = [b for b in self.batches(pushes) if self.admissions.due(b.name)]
        for batch in batches:
            try:
                done = self.admit(batch.app, [run for _, run in batch.pushes])
            except KubectlError as failed:
                self.put_off(batch, failed)
                unreachable += failed.kind == "Unreachable"
                if unreachable > 1 or len(batches) == 1:  # it is the cluster, not what one app has
                    raise
                continue
            for path, run in batch.pushes:
                if run in done:
                    self.spool.done(path)
            if len(done) == len({run for _, run in batch.pushes}):
                self.admissions.succeeded(batch.name)
                self.metrics.waiting.labels(f"intake of {batch.app}").set(0)
            else:
                self.put_off(batch, None)
        again = any(len(b.pushes) == BATCH for b in batches)
        waits = len(pushes) > sum(len(b.pushes) for b in batches)
        return self.admissions.pause(0.0 if again else AGAIN_SECONDS if waits else 30.0)

    def batches(self, pushes: Sequence[tuple[Path, Run]]) -> list[Batch]:
        """Return what is admitted next: of each app what is deployed, then what is only tested.

        An app has a bounded number of each in the cluster; what is more waits in the spool.
        """
        groups: dict[tuple[bool, str], list[tuple[Path, Run]]] = {}
        for path, run in pushes:
            groups.setdefault((not self.slot(run).deploys, run.app), []).append((path, run))
        open_jobs = Counter(j.run.app for w in self.jobs for j in w.items() if not j.outcome)
        batches = []
        for (tests, app), listed in sorted(groups.items(), key=lambda group: group[0]):
            room = min(BATCH, (TEST_JOBS if tests else 2 * TEST_JOBS) - open_jobs[app])
            if room > 0:
                batches.append(Batch(app=app, deploys=not tests, pushes=tuple(listed[:room])))
        return batches

    def put_off(self, batch: Batch, failed: KubectlError | None) -> None:
        """Try an app's pushes again later, and say so now and then."""
        failures = self.admissions.failed(batch.name)
        self.metrics.waiting.labels(f"intake of {batch.app}").set(1)
        if failed and (failures <= len(DELAYS) or failures % 10 == 0):
            warn("intake waits for the cluster", app=batch.app, detail=str(failed))

    def recorded(self, app: App) -> AppState:
        """Return what is recorded of an app now, after mending what could not be read."""
        state = self.state.read(app)
        if state.repairs:
            self.state.write(app, with_job=self.runs_with_job(app.name))
        return state

    def runs_with_job(self, app: str) -> set[str]:
        """Return the ids of an app's runs of which there is a Job, as far as it can be seen."""
        return {j.run.id for w in self.jobs for j in w.items() if j.run.app == app}

    def runs_of_jobs(self, app: App, pushed: Iterable[Run]) -> list[Run]:
        """Return the runs of an app's Jobs; of these pushes, while the Jobs cannot be followed."""
        if not any(w.trouble for w in self.jobs):
            return [j.run for w in self.jobs for j in w.items() if j.run.app == app.name]
        ids = [k for run in pushed for k in run_ids(*run_key(run))]
        return [j.run for jobs in jobs_of(self.kubectl, self.config, ids).values() for j in jobs]

    def admit(self, name: str, pushed: Sequence[Run]) -> set[Run]:
        """Create the Jobs of an app's pushes that need one; return those that are dealt with."""
        if (app := self.apps.get(name)) is None:
            warn("push of an app that is not configured any more", app=name)
            return {*pushed}
        state = self.recorded(app)
        needless = self.needless(app, state) if any(r.ref == app.deploy_ref for r in pushed) else {}
        done, wanted = set[Run](), dict[str, list[Run]]()
        for run, id_ in self.identified(app, state, pushed):
            if why := self.needs_nothing(app, run, state.runs.get(id_), needless):
                info("push needs nothing", reason=why, **run_words(run))
                done.add(run)
            else:
                wanted.setdefault(id_, []).append(run)
        return done | self.create_jobs(app, wanted)

    def needs_nothing(
        self, app: App, run: Run, record: RunRecord | None, needless: Mapping[str, str]
    ) -> str:
        """Return why a push starts nothing, empty if it does: it is known, live or rejected."""
        same = record if record and run.delivery not in ("", CATCH_UP) else None
        if same and same.delivery == run.delivery and same.received > run.received - DEDUPE_SECONDS:
            return "Replayed"
        return needless.get(run.commit, "") if run.ref == app.deploy_ref else ""

    def create_jobs(self, app: App, wanted: Mapping[str, Sequence[Run]]) -> set[Run]:
        """Create suspended Jobs by run id, each for the newest of equal pushes; as in admit."""
        runs = {k: replace(max(v, key=lambda r: r.received), id=k) for k, v in wanted.items()}
        by_age = sorted(runs.values(), key=lambda r: r.received)
        jobs = [test_job(self.config, app, r) for r in by_age]
        refused = self.kubectl.create_each(jobs, self.config.namespaces["test"]) if jobs else {}
        refusals = {name.removeprefix("test-"): refusal for name, refusal in refused.items()}
        existing = [k for k, refusal in refusals.items() if refusal.kind == "AlreadyExists"]
        there = jobs_of(self.kubectl, self.config, existing)
        begun = [r for k, r in runs.items() if self.settle(r, refusals.get(k), there.get(k))]
        self.record_started(app, begun)
        left = runs.keys() - {r.id for r in begun} - there.keys()
        if left:
            why = refusals[min(left)].said
            warn("Jobs not created, will be tried again", count=len(left), detail=why)
        return {run for each in begun for run in wanted[each.id]}

    def identified(
        self, app: App, state: AppState, pushed: Sequence[Run]
    ) -> Iterator[tuple[Run, str]]:
        """Yield each push with the id of its run, the one that it has or a free one.

        A push is known by ref and commit: version 0.1 made shorter ids, and two pushes may have the
        same, by chance or by somebody's trying. Then the second gets a longer one.
        """
        ids = {(r.ref, r.commit): k for k, r in state.runs.items()}
        jobs = self.runs_of_jobs(app, pushed)
        ids |= {(recorded_ref(r.ref), r.commit): r.id for r in jobs}
        owners = {**self.collisions, **{k: push for push, k in ids.items()}}
        for run in pushed:
            push = recorded_ref(run.ref), run.commit
            if push not in ids:
                free = [k for k in run_ids(*run_key(run)) if owners.get(k, push) == push]
                ids[push] = free[0] if free else run.id
                owners[ids[push]] = push
                if ids[push] != run.id:
                    error("two pushes have the same run id", now=ids[push], **run_words(run))
            yield run, ids[push]

    def record_started(self, app: App, runs: Sequence[Run]) -> None:
        """Record that runs have their Jobs: from now on a missing one was deleted."""
        with self.state.lock(app):
            state = self.state.read(app) if runs else None
            # what has ended since it was pushed, or was pushed again, stays as it is
            records = [RunRecord.of(r) for r in runs if state and newer_than(r, state)]
            if records:
                ids = {r.id for r in records}
                self.state.write(app, *records, with_job=self.runs_with_job(app.name) | ids)

    def needless(self, app: App, state: AppState) -> dict[str, str]:
        """Return why commits are not to be deployed again: rejected, or live already."""
        needless = dict.fromkeys(state.rejected, str(Reason.REJECTED))
        for name in app.deploy.environments[-1:]:
            if found := self.kubectl.get("service", app.name, self.config.namespaces[name]):
                service = Service(found)
                # what is recorded goes with an uninstallation, what a Service tells of itself not
                old = [] if state.last(app.deploy_ref) else service.history[::-1]
                ended = {str(e.get("commit")): e.get("outcome") for e in old}
                gone = {c for c, o in ended.items() if o in OUTCOMES.values() and SHA.fullmatch(c)}
                needless |= dict.fromkeys(gone, str(Reason.REJECTED))
                for commit in sorted(gone - state.rejected.keys()):
                    self.state.reject(app, commit, Reason.ROLLED_BACK)
                needless[service.live.get("commit", "")] = "AlreadyLive"
        return needless

    def settle(self, run: Run, refusal: KubectlError | None, there: Sequence[Job] | None) -> bool:
        """Deal with a Job that was created or refused; return whether its push is dealt with."""
        self.pulses.beat("intake", STEP_SECONDS)
        if refusal and refusal.kind in ("Invalid", "Denied", "BadRequest"):
            self.finish(run, {}, ends(Outcome.FAILED, Reason.JOB_REFUSED, refusal.said, "test"))
            return True
        if other := next((j.run for j in there or () if run_key(j.run) != run_key(run)), None):
            # the next try takes another id
            self.collisions[run.id] = recorded_ref(other.ref), other.commit
            return False
        if there:
            dealt = reopen(self.kubectl, run, there)
            info("run known" if dealt else "an old Job is being deleted", **run_words(run))
            return dealt
        if not refusal:
            info("run queued", **run_words(run))
        return not refusal

    # Catch-up: what GitLab failed to announce, and what was lost while nobody looked.

    def read_heads(self, app: App) -> float:
        """Read an app's heads; now and then compare them with what was last seen."""
        asked = self.clock.now()
        heads = self.deployer.git.heads(app.repository)
        self.heads[app.name] = asked, self.clock.monotonic(), heads
        self.wake.set()
        if self.clock.monotonic() >= self.due[app.name]:
            self.catch_up(app, asked, heads)
            self.due[app.name] = self.clock.monotonic() + jittered(self.config.catch_up)
        self.stop.wait(0.25)  # whoever waits for a head asks all the time
        return max(0.0, self.due[app.name] - self.clock.monotonic())

    def catch_up(self, app: App, asked: float, heads: Mapping[str, str]) -> None:
        """Make a run of a deploy branch's head that nobody announced, and end runs that are lost.

        A lost push of a test-only branch is not looked for. Nothing is done about a head with a
        stored push, or that may be older than the last push.
        """
        state, ref = self.recorded(app), app.deploy_ref
        spooled = [r for _, r in self.spool.read() if r.app == app.name]
        stored = {(recorded_ref(r.ref), r.commit) for r in spooled}
        self.end_lost(app, state, asked, stored)
        last, commit, now = state.last(ref), heads.get(ref, ""), self.clock.now()
        pushed = run_of_record(app, last) if last else Run(id="", app=app.name, ref=ref, commit="")
        word = head_word(pushed, heads if asked >= pushed.received else None, 0.0, now)
        same, waits = pushed.commit == commit, any(r.ref == ref for r in spooled)
        if not commit or same or word == "unknown" or waits:
            return
        more = {"before": pushed.commit, "received": now, "delivery": CATCH_UP}
        run = run_of(app, ref, commit, **more)
        if run is None or commit in self.needless(app, state):
            return
        known = {run_key(r) for r in self.runs_of_jobs(app, [run])}
        if state.find(ref, commit) or run_key(run) not in known:
            info("head moved unannounced", **run_words(run))
            self.metrics.catch_up.labels(app.name).inc()
            self.spool.store([run])
            self.spooled.set()

    def end_lost(
        self, app: App, state: AppState, asked: float, stored: Set[tuple[str, str]]
    ) -> None:
        """End runs that are under way and have neither a Job nor a stored push: missing is failed.

        Their Jobs were deleted while nobody looked.
        """
        open_runs = [r for r in state.runs.values() if not r.outcome and r.received < asked]
        open_runs = [r for r in open_runs if (r.ref, r.commit) not in stored]
        with_job = self.runs_with_job(app.name)
        open_runs = [r for r in open_runs if r.id not in with_job][:BATCH]
        for run, jobs in jobs_of(self.kubectl, self.config, [r.id for r in open_runs]).items():
            if not jobs:
                lost = run_of_record(app, state.runs[run])
                self.finish(lost, {}, vanish("its Jobs are gone", "test"))

    # The loop.

    def control(self) -> float:
        """Decide for every run, while what is mirrored is what is there."""
        self.metrics.waiting.labels("cluster").set(any(w.trouble for w in self.watches()))
        stages: list[Watch[Any]] = [*self.jobs, *self.pods]
        if not any(w.trouble for w in stages):
            self.tick()
        self.metrics.waiting.labels("a step").set(self.clock.monotonic() < self.failing)
        return LOOK_SECONDS

    def grouped(self) -> dict[str, dict[str, Job]]:
        """Return the Jobs by run and stage."""
        runs: dict[str, dict[str, Job]] = {}
        for found in (j for w in self.jobs for j in w.items() if j.stage in STAGES):
            runs.setdefault(found.run.id, {})[found.stage] = found
        return runs

    def tick(self) -> None:
        """Take the next step of every run that has one; newest first."""
        runs = self.grouped()
        there = {j.name: j for g in runs.values() for j in g.values()}
        self.known |= there
        until = self.clock.monotonic() + LOOK_SECONDS
        for lost in [j for name, j in self.known.items() if name not in there]:
            if self.clock.monotonic() < until:
                with self.alone(lost.run):
                    self.vanished(lost, runs.get(lost.run.id, {}))
                    del self.known[lost.name]
        groups = [g for g in runs.values() if not over(g)]
        states = [j.state for g in groups for j in g.values()]
        for state in ("suspended", "active"):
            self.metrics.queue.labels(state).set(states.count(state))
        pods: dict[str, list[Pod]] = {}
        for pod in (p for w in self.pods for p in w.items()):
            pods.setdefault(pod.job, []).append(pod)
        active = sorted(((newest(g), g) for g in groups), key=lambda item: -item[0].received)
        self.doom = {run.id: self.doom.get(run.id, Doom()) for run, _ in active}
        pushed, steps = set[tuple[str, str]](), list[tuple[View, Action]]()
        for run, jobs in ((r, g) for r, g in active if r.app in self.apps):
            newer = (run.app, run.ref) in pushed
            pushed.add((run.app, run.ref))
            with self.alone(run):
                mine = [p for j in jobs.values() for p in pods.get(j.uid, [])]
                view = self.view(jobs, mine, newer=newer)
                steps.append((view, decide(view)))
        running = [self.slot(j.run) for g in groups for j in g.values() if j.state == "active"]
        self.act_on([*self.with_slots(steps, running)])
        self.sweep(runs)
        self.look_after([run for run, _ in active])

    def act_on(self, steps: Sequence[tuple[View, Action]]) -> None:
        """Carry out what is next; ends of test-only runs, of which there may be many, come last.

        Those that do not fit into this look are left to the next ones, after what came meanwhile.
        """
        ends_test = [a.do is Do.END and not self.slot(v.run).deploys for v, a in steps]
        until = self.clock.monotonic() + LOOK_SECONDS
        for late, (view, action) in sorted(zip(ends_test, steps, strict=True), key=lambda x: x[0]):
            if late and self.clock.monotonic() > until:
                self.wake.set()
                break
            with self.alone(view.run):
                self.act(view, action)

    def slot(self, run: Run) -> Slot:
        """Return what a Job of a run takes, or would take."""
        app = self.apps.get(run.app)
        deploys = app is not None and run.ref == app.deploy_ref
        return Slot(run=run.id, app=run.app, deploys=deploys, received=run.received)

    def with_slots(
        self, steps: Sequence[tuple[View, Action]], running: Sequence[Slot]
    ) -> Iterator[tuple[View, Action]]:
        """Yield each run's next step; one that would start a Job without a slot waits."""
        served = dict[str, float]()
        for found in (j for w in self.jobs for j in w.items()):
            served[found.run.app] = max(served.get(found.run.app, 0.0), found.released)
        wanted = [self.slot(v.run) for v, action in steps if action.do in (Do.RELEASE, Do.BUILD)]
        granted = grant_slots(wanted, running, served, self.config.limits.max_running)
        for view, action in steps:
            starts = action.do in (Do.RELEASE, Do.BUILD)
            if starts and view.run.id not in granted:
                without_slot = replace(view, slot=False)
                yield without_slot, decide(without_slot)
            else:
                yield view, action

    @contextmanager
    def alone(self, run: Run) -> Iterator[None]:
        """Let one run's trouble not hold back the others; the same is said once in five minutes."""
        self.pulses.beat("controller", STEP_SECONDS)
        try:
            yield
        except (KubectlError, RuntimeError) as lost:  # the latter: there are no more threads
            self.failing = self.clock.monotonic() + 2 * AGAIN_SECONDS
            if self.once.may((run.id, re.sub(r"\d+", "", str(lost))), None, 300.0):  # ports vary
                warn("a step will be tried again", detail=str(lost), **run_words(run))

    def sweep(self, runs: Mapping[str, Mapping[str, Job]]) -> None:
        """Delete what no time to live ends: Jobs of ended runs that never ran, and old logs."""
        due = (a for a in self.apps.values() if self.once.may(("logs", a.name), None, 3600.0))
        if app := next(due, None):  # one at each look
            self.deployer.logs.start(partial(self.deployer.logs.tidy, app, self.config.namespaces))
        until = self.clock.now() - UNRUN_TTL
        unran = [j for g in runs.values() for j in g.values() if j.state == "suspended"]
        old = [j for j in unran if j.outcome and seconds_of(j.notes.get(NOTE_ENDED)) < until]
        for found in old[:1]:  # and with it many others in one call
            names = [j.name for j in old if j.namespace == found.namespace][:BATCH]
            with self.alone(found.run):
                self.kubectl.delete("job", names, found.namespace)

    def view(self, jobs: Mapping[str, Job], pods: Sequence[Pod], *, newer: bool) -> View:
        """Gather what decides over one run."""
        run, now = newest(jobs), self.clock.now()
        # in this order: who is done with an environment has written on the Jobs how it ended
        busy = self.busy(run.app)
        jobs = {stage: self.mirror(j).find(j.name) or j for stage, j in jobs.items()}
        asked, read, heads = self.heads.get(run.app, (0.0, -NEVER, {}))
        age = self.clock.monotonic() - read
        services = {e: s for e, w in self.services.items() for s in w.items() if s.name == run.app}
        symptoms = [s for p in pods for s in pod_symptoms(p) if s.reason != Reason.UNSCHEDULABLE]
        idle = (j for j in jobs.values() if j.uid not in {p.job for p in pods})
        symptoms += [s for j in idle for s in self.creation_trouble(j)]
        return View(
            app=self.apps[run.app],
            run=run,
            jobs=jobs,
            pods=tuple(pods),
            services=services,
            head=head_word(run, heads if asked >= run.received else None, age, now),
            newer=newer,
            doomed=self.doom[run.id].verdict(symptoms, now),
            busy=busy,
            now=now,
            queue_timeout=self.config.limits.queue_timeout,
        )

    def busy(self, app: str) -> frozenset[str]:
        """Return the environments in which an app is changed, has to rest, or cannot be seen."""
        unseen = {e for e, w in self.services.items() if w.trouble}
        now, taken = self.clock.monotonic(), list(self.taken.items())
        return frozenset(e for (a, e), (_, until) in taken if a == app and until > now) | unseen

    def creation_trouble(self, found: Job) -> Iterator[Symptom]:
        """Note on a released Job why it has no pod, and yield it. Quota is only waited for."""
        if found.state != "active" or self.clock.now() - found.released < LOOK_SECONDS:
            return
        if self.once.may(found.name, "look", AGAIN_SECONDS):
            chosen = f"involvedObject.uid={found.uid},reason=FailedCreate"
            events = self.kubectl.list("events", found.namespace, "--field-selector", chosen)
            last = str(events[-1].get("message", "")) if events else ""
            if last and clip(last) != found.notes.get(NOTE_DETAIL):
                why = creation_symptom(last, "").reason
                self.note(found, {NOTE_REASON: why, NOTE_DETAIL: clip(last)})
        if found.notes.get(NOTE_REASON) == Reason.ADMISSION_REFUSED:
            yield creation_symptom(found.notes.get(NOTE_DETAIL, ""), found.name)

    def act(self, view: View, action: Action) -> None:
        """Carry out an action, once until the cluster shows its effect."""
        run, do, stage = view.run, action.do, action.stage
        if action.reason is Reason.GIT_ERROR:
            self.asked[run.app].set()
            if view.now - run.received > AGAIN_SECONDS:
                self.tell_wait(view.jobs.get("build") or view.jobs["test"], action)
        ground = (do, stage, *(j.version for j in view.jobs.values()))
        idle = do in (Do.NOTHING, Do.WAIT)
        # that an environment is being changed is known without looking
        if idle or not (do is Do.DEPLOY or self.once.may(run.id, ground, AGAIN_SECONDS)):
            return
        for waited in (j for j in view.jobs.values() if NOTE_REASON in j.notes):
            self.note(waited, {NOTE_REASON: None, NOTE_DETAIL: None})
        if do is Do.NOTE:
            key = NOTE_SUMMARY if stage == "test" else NOTE_DIGEST
            self.note(view.jobs[stage], {key: self.deployer.secrets.mask(action.detail)})
        elif do is Do.RELEASE:
            self.note(view.jobs[stage], {}, suspend=False)
        elif do is Do.DEPLOY:
            digest = view.jobs["build"].notes.get(NOTE_DIGEST, "") if "build" in view.jobs else ""
            image = f"{view.app.build.image}@{digest}" if digest else ""
            task = self.task(view.app, stage, run, image)
            self.start_worker(task, partial(self.deploy, task, view.jobs))
        elif do is Do.END:
            self.finish(run, view.jobs, action)
        else:
            self.build(view)

    def tell_wait(self, found: Job, action: Action) -> None:
        """Note on a Job that its run waits for git, and now and then what git says to it."""
        said = self.troubles.get(f"heads of {found.run.app}", "")
        new = self.once.may((found.run.id, bool(said)), "", 300.0)  # its words vary
        if new or found.notes.get(NOTE_REASON) != action.reason:
            words = "; ".join(filter(None, (action.detail, said)))
            detail = clip(self.deployer.secrets.mask(words))
            self.note(found, {NOTE_REASON: action.reason, NOTE_DETAIL: detail})

    def task(self, app: App, environment: str, run: Run, image: str = "") -> Task:
        """Return a run on its way into an environment."""
        namespace = self.config.namespaces[environment]
        return Task(app=app, environment=environment, namespace=namespace, run=run, image=image)

    def build(self, view: View) -> None:
        """Create a build Job, released; in the place of one whose digest was lost with its pod."""
        made = build_job(self.config, view.app, view.run)
        made["spec"]["suspend"] = False
        name, namespace = made["metadata"]["name"], made["metadata"]["namespace"]
        if "build" in view.jobs:
            made["metadata"]["annotations"][NOTE_REMADE] = "1"
            self.kubectl.run("delete", "job", name, "--ignore-not-found", namespace=namespace)
        try:
            self.kubectl.create([made], namespace)
        except KubectlError as refused:
            if refused.kind not in ("Invalid", "BadRequest", "Denied"):
                raise
            why = ends(Outcome.FAILED, Reason.JOB_REFUSED, refused.said, "build")
            self.finish(view.run, view.jobs, why)

    def mirror(self, found: Job) -> Watch[Job]:
        """Return the mirror that a Job is in."""
        return next(w for w in self.jobs if w.namespace == found.namespace)

    def note(self, found: Job, notes: Mapping[str, str | None], **spec: Any) -> None:
        """Write annotations on a Job; one that is gone needs none."""
        change: Object = {"metadata": {"annotations": dict(notes)}, "spec": spec}
        try:
            self.mirror(found).learn(self.kubectl.patch("job", found.name, found.namespace, change))
        except KubectlError as gone:
            if gone.kind != "NotFound":
                raise

    def finish(self, run: Run, jobs: Mapping[str, Job], action: Action) -> None:
        """Record how a run ended, mark its Jobs as done with; then say it."""
        outcome, stage = action.outcome or Outcome.FAILED, action.stage
        detail = self.deployer.secrets.mask(action.detail)
        bad = outcome in (Outcome.FAILED, Outcome.SWITCHED_BACK)
        at = max(self.clock.now(), run.received)  # by a clock that may be ahead
        self.record_end(run, action, outcome, at)
        if bad and stage in jobs and action.reason is not Reason.CLONE_FAILED:
            mine = [p for w in self.pods for p in w.items() if p.job == jobs[stage].uid]
            last = sorted(mine, key=lambda p: -p.created)[:1]
            logs, namespace = self.deployer.logs, jobs[stage].namespace
            logs.start(partial(logs.keep, run.app, run.id, last, namespace))
        notes: dict[str, str | None] = {NOTE_OUTCOME: str(outcome), NOTE_ENDED: f"{at:.3f}"}
        notes |= dict.fromkeys((NOTE_REASON, NOTE_DETAIL))  # what it waited for
        for found in jobs.values():
            stop = {"activeDeadlineSeconds": 1} if found.state == "active" else {}
            self.note(found, notes, ttlSecondsAfterFinished=JOB_TTL, **stop)
            if found.released and found.finished:
                measure = self.metrics.stage_seconds.labels(run.app, found.stage, found.state)
                measure.observe(max(0.0, found.finished - found.released))
        self.metrics.runs.labels(run.app, outcome, stage, action.reason).inc()
        why = {"outcome": outcome, "stage": stage, "reason": action.reason, "detail": detail}
        took = round(self.clock.now() - run.received, 1)
        (error if bad else info)("run ended", **why, seconds=took, **run_words(run))

    def record_end(self, run: Run, action: Action, outcome: Outcome, at: float) -> None:
        """Record how a run ended; reject its commit if a deployment says something against it."""
        if (app := self.apps.get(run.app)) is None:
            return
        detail = clip(self.deployer.secrets.mask(action.detail))
        ended = replace(
            RunRecord.of(run),
            outcome=str(outcome),
            reason=str(action.reason),
            stage=action.stage,
            detail=detail,
            ended=round(at, 3),
        )
        records: list[RunRecord | Rejection] = [ended]
        bad = outcome in (Outcome.FAILED, Outcome.SWITCHED_BACK)
        if bad and action.stage not in STAGES and action.reason not in FORGIVEN:
            reason, now = str(action.reason), self.clock.now()
            records.append(Rejection(commit=run.commit, reason=reason, at=now))
        self.state.write(app, *records, with_job=self.runs_with_job(app.name))

    def vanished(self, lost: Job, left: Mapping[str, Job]) -> None:
        """End a run whose Job disappeared before its end."""
        # only green tests are built; a finished build can be made once more
        green = "build" in left and not left["build"].outcome
        spare = green if lost.stage == "test" else lost.state == "succeeded"
        if spare or lost.outcome or over({lost.stage: lost, **left}):
            return
        app = self.apps.get(lost.run.app)
        record = self.state.read(app).runs.get(lost.run.id) if app else None
        # who ended the run since it was seen has recorded so
        if record is None or not record.outcome or record.ended < lost.run.received:
            why = vanish(f"Job {lost.name} was deleted", lost.stage)
            self.finish(lost.run, left or {lost.stage: lost}, why)

    # Workers.

    def start_worker(self, task: Task, body: Callable[[], None]) -> None:
        """Run one slow step for an environment; no two at once, and after a failure not at once."""
        failures, until = self.taken.get(task.labels, (0, 0.0))
        if until > self.clock.monotonic():
            return
        self.taken[task.labels] = failures, NEVER

        def run() -> None:
            """Let the body run, and the environment rest after a failure."""
            failed = failures + 1
            try:
                body()
                failed = 0
            except (HookError, OSError) as lost:
                if not self.stop.is_set():
                    warn("a worker will try again", detail=str(lost), **task.words)
            finally:
                rest = backoff(failures) if failed else 0.0
                self.taken[task.labels] = failed, self.clock.monotonic() + rest
                self.wake.set()

        try:
            self.spawn(f"worker of {task.app.name} in {task.environment}", run, again=False)
        except RuntimeError as full:  # of processes and threads, as the operating system counts
            self.taken[task.labels] = failures + 1, self.clock.monotonic() + backoff(failures)
            warn("a worker will try again", detail=str(full), **task.words)

    def deploy(self, task: Task, jobs: Mapping[str, Job]) -> None:
        """Deploy; write down how the run ended if it ended here."""
        started, place = self.clock.monotonic(), task.environment
        ended: Action | None = None
        try:
            # its end may not have been written down
            if task.run.commit in self.state.read(task.app).rejected:
                raise StageError(Reason.REJECTED, "the commit was rejected")
            self.deployer.deploy(task)
        except RunError as stopped:
            outcome = OUTCOMES.get(stopped.reason, stopped.outcome)
            ended = ends(outcome, stopped.reason, stopped.detail, place)
        except KubectlError as refused:
            service = self.deployer.service(task)
            # a role of ours that lacks a verb is not the manifest's fault, another Forbidden is
            kind, said = refused.word
            heals = HEALING_REFUSAL.search(said) or re.search("User  cannot [a-z]+ resource ", said)
            again = heals if kind == "Forbidden" else kind in RETRIED
            if again or (service and service.run == task.run.id):
                raise
            full = kind == "Forbidden" and "exceeded quota: " in said
            reason = Reason.QUOTA_EXCEEDED if full else Reason.MANIFEST_INVALID
            ended = ends(Outcome.FAILED, reason, self.deployer.secrets.mask(refused.said), place)
        took, result = self.clock.monotonic() - started, ended.outcome if ended else "ok"
        self.metrics.stage_seconds.labels(task.app.name, place, result).observe(took)
        if ended:
            if self.deployer.service(task) is None:
                self.deployer.collect_garbage(task)
            self.finish(task.run, jobs, ended)

    def look_after(self, runs: Iterable[Run]) -> None:
        """Say who pointed a Service elsewhere; start what claims of ended runs leave to do."""
        active = {r.id: r for r in runs if r.app in self.apps}
        waiting = {r.app for r in active.values() if r.ref == self.apps[r.app].deploy_ref}
        listed = [(e, s) for e, w in self.services.items() for s in w.items()]
        for environment, service in ((e, s) for e, s in listed if s.name in self.apps):
            app, claim, phase = self.apps[service.name], service.claim, service.claim.get("phase")
            run = Run(id=str(claim.get("run", "")), app=app.name, ref="", commit="")
            task = self.task(app, environment, run)
            with self.alone(run):
                self.look_at_traffic(task, service)
            after = app.deploy.drain if phase == Phase.DRAINING else 0.0
            after = CLAIM_SECONDS if phase == Phase.ROLLBACK else after
            due = seconds_of(claim.get("since")) + after
            # of the last environment the run ends first: it waits for whoever works there
            held = run.id in active and (phase != Phase.DRAINING or task.last)
            # a newer run overwrites the idle colour anyway: healing it would be in its way
            pointless = phase == Phase.PREPARING and app.name in waiting
            if claim and self.clock.now() >= due and not held and not pointless:
                self.start_worker(task, partial(self.deployer.tidy, task, claim))

    def look_at_traffic(self, task: Task, service: Service) -> None:
        """Keep what is live while a Service is in order; else see to it in a thread of its own."""
        was, live = self.selectors.get(task.labels), service.live
        self.selectors[task.labels], new = service.selector, was != service.selector
        if not service.in_order:
            # where the selector names no run, other pods may come to be reached
            rest = 6 * AGAIN_SECONDS if service.ours else AGAIN_SECONDS
            self.mend(task, service, rest)
            return
        self.deployer.remember(task, service)
        # with nothing seen before, a rollback may be long ago
        left = service.entry((was or {}).get(LABEL_RUN, ""))
        if new and left.get("outcome") == Outcome.ROLLED_BACK and live != service.history[0]:
            self.metrics.switches.labels(*task.labels, "rollback").inc()
            words = {**task.words, "run": left["run"], "live": live["run"]}
            warn("rolled back", detail=clip(left["detail"]), **words)
        new = self.saved.get(task.labels) != live
        if new and self.once.may(("what is live", *task.labels), None, AGAIN_SECONDS):
            self.state.write(task.app, live={task.environment: live})
            self.saved[task.labels] = live

    def mend(self, task: Task, service: Service, rest: float) -> None:
        """See to a live Service that someone else changed, beside any worker, and now and then."""

        def body() -> None:
            """Let the Service be seen to; what does not work is tried after the next look."""
            try:
                self.deployer.mend(task)
            except (HookError, OSError) as lost:
                if not self.stop.is_set():
                    warn("a live Service will be looked at again", detail=str(lost), **task.words)
            self.wake.set()

        name = f"selector of {task.app.name} in {task.environment}"
        running = name in self.threads and self.threads[name].is_alive()
        if not running and self.once.may(name, service.version, rest):
            self.spawn(name, body, again=False)


def vanish(detail: str, stage: str) -> Action:
    """Return that a run has ended because something of it is missing: missing is failed."""
    return ends(Outcome.FAILED, Reason.VANISHED, detail, stage)


def run_of_record(app: App, record: RunRecord) -> Run:
    """Return the run that a record is of."""
    copied = ("id", "ref", "commit", "before", "delivery", "received")
    return Run(app=app.name, **{name: getattr(record, name) for name in copied})


def run_key(run: Run) -> tuple[str, str, str]:
    """Return what identifies a push: app, ref and commit."""
    return run.app, run.ref, run.commit


def newer_than(run: Run, state: AppState) -> bool:
    """Whether a push came after what is recorded of its run."""
    record = state.runs.get(run.id)
    return record is None or max(record.received, record.ended) < run.received


def run_words(run: Run) -> dict[str, Any]:
    """Return the log fields of a run."""
    words = {"run": run.id, "app": run.app, "delivery": run.delivery}
    return {**words, "ref": clip(run.ref, 200), "commit": run.commit}


def jobs_of(kubectl: Kubectl, config: Config, runs: Iterable[str]) -> dict[str, list[Job]]:
    """Return the Jobs of each of these runs, in two calls for all of them."""
    found: dict[str, list[Job]] = {run: [] for run in runs}
    terms = f"{LABEL_RUN} in ({','.join(found)})"
    for stage in STAGES if found else ():
        for each in map(Job, kubectl.list("jobs", config.namespaces[stage], "-l", terms)):
            found[each.run.id].append(each)
    return found


def reopen(kubectl: Kubectl, run: Run, jobs: Sequence[Job]) -> bool:
    """Let a run that has ended go on where it failed; return whether its push is dealt with.

    A run under way is left alone. Green Jobs and the digest are reused; a failed Job is deleted, so
    that the next intake makes it anew, and until it is gone the answer is False.
    """
    if not jobs or any(j.deleting for j in jobs):
        return False
    ended = max(seconds_of(j.notes.get(NOTE_ENDED)) for j in jobs)
    if not over({j.stage: j for j in jobs}) or ended > run.received:
        return True
    failed = [j for j in jobs if j.state != "succeeded"]
    lost = jobs if any(j.stage == "test" for j in failed) else failed
    for known in lost:
        kubectl.delete("job", [known.name], known.namespace)
    told: Object = dict.fromkeys((NOTE_OUTCOME, NOTE_REASON, NOTE_DETAIL, NOTE_ENDED))
    for known in (j for j in reversed(jobs) if j not in lost):  # the last one tells
        notes = {**told, NOTE_RECEIVED: f"{run.received:.3f}", NOTE_DELIVERY: run.delivery}
        change = {"metadata": {"annotations": notes}, "spec": {"ttlSecondsAfterFinished": None}}
        kubectl.patch("job", known.name, known.namespace, change)
    return len(lost) < len(jobs)


# === HTTP =========================================================================================

Answer = tuple[int, Object | bytes]  # JSON, or metrics as Prometheus reads them
Routes = dict[str, tuple[str, "Callable[[WSGIEnvironment], Answer]"]]
# Seconds in which it must arrive; `more` is anything at all on a connection that was used before.
ARRIVAL = {"headers": 5.0, "body": 20.0, "more": 20.0}
OPEN_CONNECTIONS = 256  # of each port; at most as many as a quarter of the allowed open files
HELD_BYTES = 64 * 2**20  # of all bodies
HEADER_BYTES, HEADER_LINES = 16384, 100
# The expressions of waitress take minutes for what the first does not match, or the second finds.
FIRST_LINE = re.compile(rb"[^ \r]+ [^ \r]{1,2048}( HTTP/[0-9]\.[0-9])?\r\n")
BLANKS = re.compile(rb"[ \t]{9}")
REQUESTS_AT_ONCE = 16  # on one connection, before the first of them is answered
ACCEPTS_AT_ONCE = 32  # connections, before those that are open have their turn
LOOK_INTERVAL, LOOK_BYTES = 0.1, 2**20  # seconds, or bytes arrived, between looks at all of them
PAUSE_SECONDS = 1.0  # after a connection could not be accepted
QUIET_SECONDS = 300.0  # between log lines about connections that fail
LOOP_SECONDS = 15.0  # in which a server's loop must come round; when idle it does so every second
# poll, because select knows no file descriptor above 1023; strangers do not write the log
SERVER: Object = {"asyncore_use_poll": True, "ident": "", "log_socket_errors": False}
SERVER |= {"threads": 4, "max_request_header_size": HEADER_BYTES}


class Site:
    """A WSGI application that answers by a table of paths, each with its one method."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics, self.routes = metrics, Routes()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Answer one request; whatever it holds, there is an answer and the process lives."""
        path = environ.get("PATH_INFO", "")
        method, handler = self.routes.get(path, ("", None))
        headers = [("Content-Type", "application/json")]
        try:
            if handler is None:
                deny(404, "NotFound", "no such path")
            if environ["REQUEST_METHOD"] != method:
                headers.append(("Allow", method))
                deny(405, "MethodNotAllowed", f"only {method}")
            status, body = handler(environ)
        except DeliveryError as early:
            status, body = early.status, {"reason": early.code, "text": str(early)}
        except Exception:  # noqa: BLE001 - a request ends here; it is logged and counted
            error("request failed", exc=True, path=clip(path, 80))
            self.metrics.errors.labels("request").inc()
            status, body = 500, {"status": "error"}
        if isinstance(body, bytes):
            start_response("200 OK", [("Content-Type", prometheus_client.CONTENT_TYPE_LATEST)])
            return [body]
        fine = status < http.HTTPStatus.BAD_REQUEST
        body.setdefault("status", "ignored" if fine else "refused")
        if path == "/webhook" and handler:
            result = body.get("reason", body["status"])
            more = {k: body.get(k) for k in ("runs", "text")}
            self.metrics.deliveries.labels(result).inc()
            more |= {"delivery": delivery_id(environ), "status": status, "result": result}
            (info if fine else warn)("delivery", **more)
        start_response(f"{status} {http.HTTPStatus(status).phrase}", headers)
        return [json.dumps(body).encode() + b"\n"]

    def reads_body(self, _: Any) -> bool:
        """Whether the body of a request is wanted, by what its headers say."""
        return False


class WebhookApp(Site):
    """What is behind the Ingress: /webhook, and for one more minor version the probes."""

    def __init__(
        self, config: Config, secrets: Secrets, spool: Spool, controller: Controller
    ) -> None:
        super().__init__(controller.metrics)
        self.config, self.secrets, self.spool, self.controller = config, secrets, spool, controller
        self.clock, self.stopping = controller.clock, threading.Event()
        self._parsing = threading.Lock()  # in Python's objects a body can be 40 times as large
        self.probes: Routes = {"/healthz": ("GET", self.healthz), "/readyz": ("GET", self.readyz)}
        self.routes = {"/webhook": ("POST", self.webhook), **self.probes}

    def admin(self) -> Site:
        """Return what the second port answers, which strangers do not reach."""
        site, registry = Site(self.metrics), self.metrics.registry
        exposition = partial(prometheus_client.generate_latest, registry)
        site.routes = {"/metrics": ("GET", lambda _: (200, exposition())), **self.probes}
        return site

    def reads_body(self, request: Any) -> bool:
        """Whether a request is a delivery of the right size with what authenticates one."""
        needed = (n.upper().replace("-", "_") for n in NEEDED_HEADERS[self.config.webhook.verify])
        sized = request.content_length <= self.config.webhook.max_body
        delivery = (request.command, request.path.lstrip("/")) == ("POST", "webhook")
        return delivery and sized and all(map(request.headers.get, needed))

    def webhook(self, environ: WSGIEnvironment) -> Answer:
        """Authenticate, understand and store a delivery; in this order, for security."""
        limit, size = self.config.webhook.max_body, int(environ.get("CONTENT_LENGTH") or 0)
        if size > limit:
            deny(413, "TooLarge", f"more than {limit} bytes")
        body, now = environ["wsgi.input"].read(size), self.clock.now()
        try:
            keys = self.secrets.keys(self.config.webhook.verify)
        except ConfigError as broken:
            error("secrets cannot be used", detail=str(broken))
            self.metrics.errors.labels("secrets").inc()
            deny(503, "NoSecrets", "not configured")
        given = {k[5:].replace("_", "-").lower(): v for k, v in environ.items() if k[:5] == "HTTP_"}
        verify_delivery(self.config.webhook.verify, keys, given, body, now)
        kind = environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            deny(415, "NotJson", "send application/json")
        delivery = delivery_id(environ)
        with self._parsing:
            runs = parse_delivery(self.config, body, delivery=delivery, received=now)
        answer = {"status": "duplicate", "runs": [r.id for r in runs]}
        new = [r for r in runs if not self.spool.accepted.has(r)]
        if not new:
            return 200, answer
        deploy_refs = {(app.name, app.deploy_ref) for app in self.config.apps}
        deploys = any((run.app, run.ref) in deploy_refs for run in new)
        self.spool.store(new, spare=0 if deploys else self.spool.max_files // 10)
        self.controller.spooled.set()
        return 202, answer | {"status": "accepted"}

    def healthz(self, _: WSGIEnvironment) -> Answer:
        """Whether every thread moves."""
        late = ", ".join(self.controller.pulses.late())
        return 503 if late else 200, {"status": f"stuck: {late}" if late else "ok"}

    def readyz(self, _: WSGIEnvironment) -> Answer:
        """Whether deliveries can be authenticated and stored; never how cluster or git are."""
        trouble = "stopping" if self.stopping.is_set() else ""
        try:
            self.secrets.keys(self.config.webhook.verify)
            self.spool.probe()
        except (ConfigError, OSError) as broken:
            trouble = str(broken)
        return 503 if trouble else 200, {"status": trouble or "ok"}


def delivery_id(environ: WSGIEnvironment) -> str:
    """Return the id that stays when GitLab sends a delivery again, "" when there is none."""
    return clip(environ.get("HTTP_WEBHOOK_ID") or environ.get("HTTP_IDEMPOTENCY_KEY", ""), 100)


class Request(waitress.parser.HTTPRequestParser):  # type: ignore[misc]  # waitress has no types
    """A request as far as it has arrived; its body is taken only if the application wants it."""

    body_rcv: Any
    error: Any
    cut = False  # whether a part of it is left unread

    def __init__(self, adjustments: Any, site: Site) -> None:
        super().__init__(adjustments)
        self.site = site

    def refuse(self, text: str) -> None:
        """Answer a 400, and nothing more on this connection."""
        self.error = waitress.utilities.BadRequest(text)
        self.completed = True

    def parse_header(self, header_plus: bytes) -> None:
        """Understand the headers, if that takes no time; leave a body alone that nobody wants."""
        usual = FIRST_LINE.match(header_plus) and not BLANKS.search(header_plus)
        if not usual or header_plus.count(b"\r\n") > HEADER_LINES:
            raise waitress.parser.ParsingError("not a request line, or too many headers or blanks")
        super().parse_header(header_plus)
        if self.body_rcv is not None and not self.site.reads_body(self):
            self.headers["CONNECTION"] = "close"
            self.body_rcv, self.content_length, self.chunked = None, 0, False
            self.cut = True
        if self.body_rcv is None:
            self.expect_continue = False  # else waitress waits for more

    def received(self, data: bytes) -> int:
        """Take data and return how much of it; what waitress would be slow with is refused."""
        if self.chunked and data.count(b"\r\n") > 64 + len(data) // 16:
            self.refuse("too small chunks")
        if self.completed:
            return len(data)
        taken, body = int(super().received(data)), self.body_rcv
        if self.chunked and len(body.control_line) + len(body.trailer) > HEADER_BYTES:
            self.refuse("too long a line between chunks")
        return taken


class Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]  # waitress has no types
    """A connection whose every request must arrive in time, however steadily it drips."""

    last_activity: float  # when that began which it `awaits`
    close_when_flushed: bool
    used = lingering = False
    newest: Request

    def parser_class(self, adjustments: Any) -> Request:
        """Return a request that begins to arrive."""
        request = self.newest = Request(adjustments, self.server.site)
        if len(self.requests) >= REQUESTS_AT_ONCE:
            request.refuse("too many requests at once")
        return request

    @property
    def awaits(self) -> str:
        """What must arrive next: headers, a body, or more."""
        if self.request and not self.lingering:
            return "body" if self.request.headers_finished else "headers"
        return "more" if self.used and not self.lingering else "headers"

    @property
    def held(self) -> int:
        """How many bytes of bodies are kept."""
        return sum(r.body_bytes_received for r in (self.request, *self.requests) if r)

    def readable(self) -> bool:
        """Whether something may arrive; the number of a closed one may be another's by now."""
        return self.socket is not None and bool(super().readable())

    def writable(self) -> bool:
        """Whether the server's loop has something to send or to close here.

        Not while a request is answered: its thread sends for itself, and the loop, asking again and
        again for the lock that it holds, would keep it from going on.
        """
        return self.socket is not None and not self.requests and bool(super().writable())

    def handle_read(self) -> None:
        """Receive something."""
        awaited, since = self.awaits, self.last_activity
        super().handle_read()
        self.used = self.used or bool(self.requests)
        if self.awaits == awaited and not self.requests:
            self.last_activity = since

    def received(self, data: bytes) -> bool:
        """Understand what arrived, unless the last answer was given."""
        self.server.arrived += len(data)
        return not self.lingering and bool(super().received(data))

    def handle_write(self) -> None:
        """Send; where a part of the last request is unread, wait for the other side to close.

        To close then would be a reset, and destroy the answer.
        """
        if not (self.close_when_flushed and (self.newest.cut or self.newest.error)):
            super().handle_write()
            return
        self.close_when_flushed = False
        super().handle_write()
        self.close_when_flushed = bool(self.total_outbufs_len)
        if self.connected and not self.close_when_flushed:
            self.lingering = True
            self.last_activity = time.time()
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)

    def handle_expt(self) -> None:
        """Close: urgent data is not HTTP, and the loop would be told of it again and again."""
        self.handle_close()

    def handle_error(self) -> None:
        """Close: its body could not be written to a file, say."""
        self.server.complain("a connection failed")
        self.handle_close()


class Server(waitress.server.TcpWSGIServer):  # type: ignore[misc]  # waitress has no types
    """A server that strangers cannot fill: what waits longest for a request gives way."""

    def __init__(
        self, site: Site, bound: socket.socket, beat: Callable[[], None], **more: Any
    ) -> None:
        self.site, self.beat, self.arrival = site, beat, ARRIVAL
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        self.most = min(OPEN_CONNECTIONS, max(8, allowed))
        self.failures, self.quiet_until, self.paused_until = 0, 0.0, 0.0
        self.arrived, self.look_at = 0, 0.0  # bytes since the last look, and when the next one is
        where = (bound.family, bound.type, bound.proto, bound.getsockname())
        super().__init__(site, _sock=bound, bind_socket=False, sockinfo=where, **SERVER, **more)

    def readable(self) -> bool:
        """Whether a connection may be accepted; the loop asks in each of its turns."""
        self.beat()
        now = time.monotonic()
        if now >= self.look_at or self.arrived > LOOK_BYTES:
            self.make_room()
        room = len(self.active_channels) <= self.most
        return self.accepting and now >= self.paused_until and room

    def make_room(self) -> None:
        """Close connections that are late, and while there is too much those that wait longest."""
        self.look_at, self.arrived = time.monotonic() + LOOK_INTERVAL, 0
        now, channels = time.time(), [*self.active_channels.values()]
        held = sum(c.held for c in channels)
        waiting = (c for c in channels if not c.requests)
        for channel in sorted(waiting, key=lambda c: c.last_activity):
            late = now - channel.last_activity > self.arrival[channel.awaits]
            too_large = held > HELD_BYTES and channel.held
            if late or too_large or len(self.active_channels) > self.most:
                held -= channel.held
                channel.handle_close()

    def handle_accept(self) -> None:
        """Accept some connections, then make room for them.

        The other way round a new one might get the number of a closed one, and what came for it.
        """
        for _ in range(ACCEPTS_AT_ONCE):
            if (accepted := self.accept()) is None:
                break
            self.set_socket_options(accepted[0])
            Channel(self, *accepted, self.adj, map=self._map)
        if len(self.active_channels) > self.most:
            self.make_room()

    def handle_error(self) -> None:
        """Pause, or the loop would try again at once; waitress would stop listening."""
        self.paused_until = time.monotonic() + PAUSE_SECONDS
        self.complain("no connection can be accepted")

    def complain(self, what: str) -> None:
        """Log the exception being handled, seldom, with the number of those before it."""
        self.failures += 1
        if (now := time.monotonic()) >= self.quiet_until:
            error(what, count=self.failures, detail=clip(repr(sys.exc_info()[1])))
            self.failures, self.quiet_until = 0, now + QUIET_SECONDS


def make_server(
    site: Site, listen: str, max_body: int, beat: Callable[[], None] = lambda: None
) -> Server:
    """Return a server: bounded threads, time and sizes; slow clients hold no thread.

    Chunked bodies of up to twice the limit reach the application, which says what is wrong.
    """
    host, _, port = listen.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        both = host == "[::]" and socket.has_dualstack_ipv6()
        where = (host.strip("[]"), int(port))
        bound = socket.create_server(where, family=family, dualstack_ipv6=both)
    except (OSError, ValueError, OverflowError) as wrong:
        raise ConfigError([f"cannot listen on {clip(listen, 80)!r}: {wrong}"]) from wrong
    return Server(site, bound, beat, max_request_body_size=2 * max_body + 1)


# === commands =====================================================================================

OPEN_FILES = 4096  # for two ports' connections, their bodies, kubectl and git
NO_SERVICE: Object = {"metadata": {"name": "", "resourceVersion": "0"}, "spec": {}}
LINGER = 2.0  # seconds in which a stopping daemon still answers, while its endpoint is taken away
SHUTDOWN_SECONDS = 40.0  # for the threads and the last intake; the grace period allows for it
REOPEN_TRIES = 60  # half seconds in which a deleted Job must be gone
TOLD = ("run", "app", "ref", "commit", "received", "stage", "state", "outcome", "reason", "detail")
TITLES = ("RUN", "REF", "STAGE", "STATE", "OUTCOME", "REASON", "AGE", "DETAIL")
AGES = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
UNCOMPARED = "\n  not compared: "  # no line of a difference begins so
START_SECONDS = 5.0  # from a pod's creation until it is ready, by and large
# What the daemon must be able to do, as its Roles grant it, by group/resource/subresource.
EVERY = "get list watch create patch delete"
PODS = {"/pods": "get list watch", "/pods/log": "get"}
STATE_RIGHTS = {"/configmaps": "get create patch"}
JOB_RIGHTS = {"batch/jobs": EVERY, **PODS, "/events": "list", "/configmaps": "list create delete"}
APP_RIGHTS = {"apps/deployments": f"{EVERY} update", "/services": EVERY, **PODS}
APP_RIGHTS |= {"apps/replicasets": "list", "discovery.k8s.io/endpointslices": "list"}
APP_RIGHTS |= {"/configmaps": "get list create delete"}


@dataclass(frozen=True, slots=True)
class Tools:
    """What every command works with."""

    process: Process
    config: Config
    deployer: Deployer

    @classmethod
    def load(cls, environ: Mapping[str, str]) -> Tools:
        """Read the configuration; raises ConfigError with every fault.

        Without a file, commands read the daemon's ConfigMap with the caller's own kubeconfig.
        """
        process, metrics = Process.from_environ(environ), Metrics()
        try:
            document = process.config.read_text("utf-8")
        except (OSError, ValueError) as wrong:
            if environ.get("GITOPS_HOOK_CONFIG") or not isinstance(wrong, FileNotFoundError):
                raise ConfigError([f"{process.config} cannot be read: {wrong}"]) from wrong
            found = Kubectl(metrics).get("configmap", MANAGER, ORCHESTRATION)
            if found is None:
                where = f"no file {process.config}, no ConfigMap {MANAGER} in {ORCHESTRATION}"
                raise ConfigError([f"{where}: is this the right cluster?"]) from wrong
            document = (found.get("data") or {}).get("config.yaml", "")
        config, secrets = load_config(document), Secrets(process.secrets)
        kubectl = Kubectl(metrics, config.limits.kubectl)
        git = Git(secrets.directory / GIT_CREDENTIALS, limit=config.limits.checkout)
        refs = {(a.repository, a.deploy_ref) for a in config.apps}
        git.deployed = {url: [ref for u, ref in refs if u == url] for url, _ in refs}
        return cls(process, config, Deployer(kubectl, git, secrets, Clock()))

    def app(self, name: str) -> App:
        """Return the app of that name; raises ConfigError when there is none."""
        apps = {a.name: a for a in self.config.apps}
        if name not in apps:
            raise ConfigError([f"no app {clip(name, 60)!r} is configured, only: {', '.join(apps)}"])
        return apps[name]


def say(text: str) -> None:
    """Print a command's answer; a reader who has gone, `head` say, does not stop the command."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def serve(tools: Tools, args: argparse.Namespace) -> int:
    """Run the daemon until SIGTERM, or with --check only say that it could."""
    process, config, deployer = tools.process, tools.config, tools.deployer
    setup_logging(deployer.secrets.mask)
    deployer.secrets.keys(config.webhook.verify)
    names = [a.name for a in config.apps]
    if args.check:
        say(f"the configuration is valid; apps: {', '.join(names) or 'none'}")
        return 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, OPEN_FILES)), hard))
    spool = Spool(process.spool, config.limits.spool_files)
    spool.prepare()
    tempfile.tempdir = str(spool.scratch)
    controller = Controller(config, deployer, spool)
    app = WebhookApp(config, deployer.secrets, spool, controller)
    beat = partial(controller.pulses.beat, "first port", LOOP_SECONDS)
    server = make_server(app, process.listen, config.webhook.max_body, beat)
    admin = make_server(app.admin(), process.admin_listen, 0)
    stop_on_signals(app.stopping)
    threading.Thread(target=admin.run, name="admin", daemon=True).start()
    controller.start()
    ports = {"port": server.effective_port, "admin_port": admin.effective_port}
    info("serving", version=__version__, apps=names, **ports)
    server.run()
    controller.shut_down(SHUTDOWN_SECONDS)
    info("stopped", spooled=len(spool))
    return 0


def stop_on_signals(stopping: threading.Event) -> None:
    """On SIGTERM or SIGINT: unready at once, and the server ends a moment later.

    As process 1 the default would be to ignore SIGTERM. A second signal changes nothing.
    """

    def leave(number_: int, _frame: Any) -> None:
        """Be unready at once, and end when the alarm rings."""
        if number_ == signal.SIGALRM:
            raise SystemExit(0)
        if not stopping.is_set():
            stopping.set()
            signal.setitimer(signal.ITIMER_REAL, LINGER)

    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(each, leave)


def push(tools: Tools, args: argparse.Namespace) -> int:
    """Send a signed test delivery, as GitLab would; 0 if accepted, a duplicate or ignored."""
    project = {"git_http_url": tools.app(args.app).repository}
    ref = args.ref if args.ref.startswith("refs/") else f"refs/heads/{args.ref}"
    payload = {"object_kind": "push", "ref": ref, "after": args.sha, "project": project}
    body, delivery = json.dumps(payload).encode(), str(uuid.uuid4())
    headers = {"Content-Type": "application/json", "webhook-id": delivery}
    mode, secrets = tools.config.webhook.verify, tools.deployer.secrets
    key = secrets.keys(mode)[0]
    if mode == "signature":
        stamp = str(int(tools.deployer.clock.now()))
        signature = sign(key, delivery.encode(), stamp.encode(), body)
        headers |= {"webhook-timestamp": stamp, "webhook-signature": signature.decode()}
    else:
        token = key if mode == "token" else hex_hmac(key, body)
        headers["X-Gitlab-Token"] = token.decode("latin-1")
    try:
        answer = requests.post(args.url, body, headers=headers, timeout=10, allow_redirects=False)
    except requests.RequestException as failed:
        cause: BaseException = failed
        while cause.__context__:  # the first of them says it without addresses of objects
            cause = cause.__context__
        raise HookError(f"no answer from {args.url}: {clip(str(cause))}") from failed
    say(f"{answer.status_code} {clip(answer.text, 2000)}")
    return 0 if answer.status_code in (http.HTTPStatus.OK, http.HTTPStatus.ACCEPTED) else 1


def status(tools: Tools, args: argparse.Namespace) -> int:
    """Print what is live where, what it could go back to, and the runs the cluster knows."""
    apps = [tools.app(args.app)] if args.app else list(tools.config.apps)
    live = {a.name: environment_status(tools, a) for a in apps}
    runs = run_status(tools, apps)
    rows = [("APP", "ENVIRONMENT", "LIVE", "COLOUR", "BEFORE", "ROLLBACK", "UNDER WAY", "REVERTED")]
    for app, environments in live.items():
        for name, e in environments.items():
            old, claim = e["previous"], e["deploying"] or {}
            for run in (r for r in runs if r["run"] == claim.get("run") and r["state"] != "ended"):
                run |= {"stage": name, "state": claim["phase"]}
            how = "at once" if e["rollback_ready"] else "by a rollout" if old else "impossible"
            before = old.get("run") or ("adopted" if old else "")
            under_way = f"{claim.get('phase', '')} {claim.get('run', '')} {e['drift']}".strip()
            back = clip(": ".join(filter(None, e["reverted"].values())), 100)
            rows.append((app, name, e["run"], e["colour"], before, how, under_way, back))
    if args.output == "json":
        listed = [{"name": name, "environments": found} for name, found in live.items()]
        say(json.dumps({"apps": listed, "runs": runs}, indent=2))
        return 0
    say(columns(rows))
    now = tools.deployer.clock.now()
    for r in runs:
        short = {"ref": r["ref"].removeprefix("refs/heads/"), "age": age(r["received"], now)}
        r |= {**short, "detail": r["detail"].partition("\n")[0]}
    cells = [[clip(r[title.lower()]) for title in TITLES] for r in runs]
    say(f"\n{columns([TITLES, *cells])}" if runs else "\nno runs")
    return 0


def explain(tools: Tools, args: argparse.Namespace) -> int:
    """Print how a run stands, and with --log the last lines that its failed containers printed."""
    run, now = args.run, tools.deployer.clock.now()
    if not re.fullmatch("[a-z0-9-]{1,63}", run):
        raise ConfigError([f"{clip(run, 80)!r} is no id of a run; `status` shows them"])
    app = tools.app(run.rsplit("-", 2)[0])
    logs = list(kept_logs(tools, app, run)) if args.log else []
    stood = next((r for r in run_status(tools, [app]) if r["run"] == run), None)
    if not (stood or logs):
        raise HookError(f"nothing is known of {run} any more")
    if stood:
        stood["received"] = f"{age(stood['received'], now)} ago"
        say("\n".join(f"{key + ':':10}{clip(str(stood[key]), DETAIL_LENGTH)}" for key in stood))
    for title, text in logs:
        say(f"\n--- {title}\n" + "\n".join(map(printable, text.split("\n"))))
    if args.log and not logs:
        say("\nno log is kept: it is for a day, where something failed")
    return 0


def kept_logs(tools: Tools, app: App, run: str) -> Iterator[tuple[str, str]]:
    """Yield where and when each kept log of a run was printed, and the log."""
    shown = app.deploy.environments if app.deploy.log_tails else ()
    terms = selector_text({LABEL_MANAGED: MANAGER, LABEL_STAGE: "log", LABEL_RUN: run})
    for namespace in (tools.config.namespaces[name] for name in (*STAGES, *shown)):
        try:
            logs = tools.deployer.kubectl.list("configmaps", namespace, "-l", terms)
        except KubectlError as refused:
            if refused.kind != "Forbidden":
                raise
            yield namespace, "not readable with this account"
            continue
        for log in logs:
            at = printable(log["metadata"].get("creationTimestamp", ""))
            for key, text in sorted((log.get("data") or {}).items()):
                yield f"{namespace} {key}, kept {at}", text


def printable(line: str) -> str:
    """Return a line of anyone's for a terminal: what is no letter or sign is spelled out."""
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in line)


def age(then: float, now: float) -> str:
    """Return how long ago a time was, in the largest unit of which that is two; "" for none."""
    past = max(0.0, now - then)
    unit = next((u for u, seconds in AGES.items() if past >= 2 * seconds), "s")
    return f"{past // AGES[unit]:.0f}{unit}" if then else ""


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of texts as lines in which the columns stand under each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pairs = [zip([cell or "-" for cell in row], widths, strict=True) for row in rows]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in p).rstrip() for p in pairs)


def environment_status(tools: Tools, app: App) -> dict[str, Object]:
    """Return what is live of an app in each of its environments, and what it could go back to."""
    found, keys = {}, ("colour", "run", "commit", "image")
    for name in app.deploy.environments:
        namespace = tools.config.namespaces[name]
        run = Run(id="", app=app.name, ref="", commit="")
        task = Task(app=app, environment=name, namespace=namespace, run=run)
        service = tools.deployer.service(task) or Service(NO_SERVICE)
        target, wanted = service.target(), service.target().get("replicas", 1)
        source = service if service.in_order else tools.deployer.recorded(task, service)
        entry = service.live or (source.entry(service.run) if source and service.run else {})
        there = tools.deployer.ready_pods(namespace, target["selector"]) if target else []
        back = next((e for e in service.history[:1] if e.get("reason") and e != service.live), {})
        found[name] = {
            **{k: entry.get(k, "") for k in keys},
            "run": service.run or entry.get("run", ""),
            "drift": str(tools.deployer.drift(task, service, source)),
            "previous": {k: target.get(k, "") for k in keys} if target else {},
            "rollback_ready": bool(target) and len(there) >= wanted,
            "deploying": service.claim or None,
            "bake_until": service.note(NOTE_BAKE, 0.0) or None,
            "reverted": {k: back[k] for k in ("run", "reason", "detail") if k in back},
        }
    return found


def run_status(tools: Tools, apps: Sequence[App]) -> list[Object]:
    """Return the runs that Jobs tell of, newest first; where those are gone, each branch's last."""
    pages, spaces = tools.deployer.kubectl.pages, [tools.config.namespaces[s] for s in STAGES]
    where = [(list_address("jobs", n, f"{LABEL_MANAGED}={MANAGER}"), n) for n in spaces]
    jobs: dict[str, dict[str, Job]] = {}
    for job in (Job(j) for place in where for page in pages(*place) for j in page["items"]):
        jobs.setdefault(job.run.id, {})[job.stage] = job
    rows = list[Object]()
    for app in apps:
        state = tools.deployer.state.read(app)
        mine = {k: group for k, group in jobs.items() if newest(group).app == app.name}
        for run in mine.keys() | state.runs.keys():
            row = run_row(state.runs.get(run), mine.get(run, {}), app)
            why = state.rejected.get(row["commit"])
            if why and row["outcome"] == Outcome.DEPLOYED:
                row |= {"outcome": Outcome.ROLLED_BACK, "reason": Reason.ROLLED_BACK}
                row["detail"] = "" if why.reason == Reason.ROLLED_BACK else why.reason
            rows.append(row)
    return sorted(rows, key=lambda row: (-row["received"], row["run"]))


def run_row(record: RunRecord | None, jobs: Mapping[str, Job], app: App) -> Object:
    """Return what `status` says of a run by its record and its Jobs; there is one of them."""
    run = newest(jobs) if jobs else run_of_record(app, cast(RunRecord, record))
    row: Object = {"run": run.id, **{k: getattr(run, k) for k in TOLD[1:5]}}
    if record and record.outcome and record.ended >= run.received:
        row |= {k: getattr(record, k) for k in ("stage", "outcome", "reason", "detail")}
        return row | {"state": "ended"}
    if not jobs:
        return row | dict.fromkeys(TOLD[5:], "") | {"state": "lost"}
    last = jobs.get("build") or jobs["test"]
    row |= {"stage": last.stage, "state": "ended" if over(jobs) else last.state}
    texts = {"reason": last.notes.get(NOTE_REASON, ""), "detail": last.notes.get(NOTE_DETAIL, "")}
    return row | {"outcome": last.outcome, **texts}


def rollback(tools: Tools, args: argparse.Namespace) -> int:
    """Switch an environment back to a proven version, and reject the commit that is left."""
    app, deployer = tools.app(args.app), tools.deployer
    if args.to in range(-(10**6), 1):
        fault = f"--to {args.to}: how many proven versions back, so 1 or more; or a run"
        raise ConfigError([fault])
    names = app.deploy.environments or ("",)
    environment = args.environment or names[-1]
    if environment not in app.deploy.environments:
        fault = f"{app.name} is not deployed to {environment!r}, only to: {', '.join(names)}"
        raise ConfigError([fault])
    place = {"environment": environment, "namespace": tools.config.namespaces[environment]}
    task = Task(app=app, run=Run(id="", app=app.name, ref="", commit=""), **place)
    service = deployer.service(task) or Service(NO_SERVICE)
    try:
        target = chosen(service, args.to)
    except RefusedError as refused:
        raise RefusedError(f"{app.name} in {environment}: {refused}") from refused
    left = service.live
    say(f"{app.name} {environment}: from {version_words(left)} to {version_words(target)}")
    target = deployer.rollback(task, service, target, clip(args.reason))
    say(f"{app.name} {environment}: back on {version_words(target)}")
    if commit := left.get("commit"):
        reason = clip(args.reason) or Reason.ROLLED_BACK
        rejection = Rejection(commit=commit, reason=reason, at=deployer.clock.now())
        deployer.state.write(app, rejection, live={environment: target})
        say(f"{left['run']} is rejected until `rerun {left['run']}`")
    arrive(deployer, task, left, target)
    return 0


def arrive(deployer: Deployer, task: Task, left: Object, target: Object) -> None:
    """Let a target be as large as what is left, and wait for its endpoints."""
    # what served alone until now may be larger than the target was in its time
    size = deployer.size(task, left.get("selector", {}))
    if deployer.size(task, target["selector"]) < size:
        deployer.scale(task, f"{task.app.name}-{target['colour']}", size)
    task = replace(task, run=replace(task.run, id=target["run"]))
    selector, wanted = target["selector"], target["replicas"]
    if not deployer.followed(task, selector, wanted, deployer.clock.now()):
        raise StageError(Reason.ENDPOINTS_MISSING, "switched, but no endpoints follow")


def version_words(entry: Object) -> str:
    """Return how a history entry is called."""
    if not entry:
        return "what is not in the history"
    return f"{entry['run'] or 'what was there before'} ({entry['colour'] or 'adopted'})"


def rerun(tools: Tools, args: argparse.Namespace) -> int:
    """Let a branch's head go on, rejected or not, if it has ended and is not live everywhere."""
    deployer, app = tools.deployer, tools.app(args.run.rsplit("-", 2)[0])
    heads = deployer.git.heads(app.repository).items()
    named = [(r, c) for r, c in heads if args.run in run_ids(app.name, r, c)]
    if not named:
        raise RefusedError(f"{clip(args.run)} is not the head of a branch; only that can go again")
    (ref, commit), now = named[0], deployer.clock.now()
    record, namespace = deployer.state.read(app).find(ref, commit), tools.config.namespaces["test"]
    name = record.id if record else args.run
    run = Run(id=name, app=app.name, ref=ref, commit=commit, delivery="rerun", received=now)
    if ref == app.deploy_ref:  # another branch may be put on the same commit
        deployer.state.write(app, forget=[Rejection(commit=commit).key])
    places = environment_status(tools, app).values()
    if places and all(e["run"] == run.id and not e["bake_until"] for e in places):
        say(f"{run.id} is live")
        return 0
    for _ in range(REOPEN_TRIES):
        made = deployer.kubectl.create_each([test_job(tools.config, app, run)], namespace)
        refused = made.get(f"test-{run.id}")
        if refused and refused.kind != "AlreadyExists":
            raise StageError(Reason.JOB_REFUSED, refused.said)
        there = jobs_of(deployer.kubectl, tools.config, [run.id] if refused else [])
        if not refused or reopen(deployer.kubectl, run, there[run.id]):
            if newer_than(run, deployer.state.read(app)):  # it may have ended again by now
                deployer.state.write(app, RunRecord.of(run))
            say(f"{run.id} goes on; `status {app.name}` tells how far it is")
            return 0
        deployer.stop.wait(0.5)
    raise HookError(f"the old Jobs of {run.id} are still being deleted; try again in a minute")


def plan(tools: Tools, args: argparse.Namespace) -> int:
    """Print what a push of a commit would do now, changing nothing; 1 if some cannot be told."""
    app, deployer, spaces = tools.app(args.app), tools.deployer, tools.config.namespaces
    if args.commit and not SHA.fullmatch(args.commit):
        raise ConfigError([f"{clip(args.commit, 60)!r} is not a full commit id"])
    head = deployer.git.heads(app.repository).get(ref := app.deploy_ref, "")
    if not (commit := args.commit or head):
        raise RefusedError(f"{app.repository} has no branch {app.branch!r}")
    run = Run(id=run_id(app.name, ref, commit), app=app.name, ref=ref, commit=commit)
    say(f"run: {run.id}" + (f", superseded: {app.branch} is at {head}" if commit != head else ""))
    ask = partial(show, tools)
    told = [ask("rejected", rejection, run), ask("permissions", missing_rights, app)]
    with deployer.git.manifests(app.repository, commit, app.deploy.manifests) as checkout:
        for name in ("test", "build", *app.deploy.environments):
            told += [ask(f"{name}, quota", quota, spaces[name])]
        for name in app.deploy.environments:
            # by tag, as it has no digest before it is built
            place = {"environment": name, "namespace": spaces[name]}
            task = Task(app=app, run=run, image=f"{app.build.image}:{commit[:8]}", **place)
            told += [ask(f"{name}, live", live_version, task)]
            told += [ask(f"{name}, next", next_version, task, checkout)]
    return 0 if all(told) else 1


def show(tools: Tools, title: str, find: Callable[..., str], *given: Any) -> bool:
    """Print an answer, or why there is none; return whether all of it could be told."""
    try:
        answer = find(tools, *given)
    except (KubectlError, StageError) as failed:
        kind = failed.kind if isinstance(failed, KubectlError) else ""
        if kind == "Unreachable":
            raise
        unread = find is quota and kind == "Forbidden"  # as the daemon's own account may not
        why = printable(tools.deployer.secrets.mask(f"failed: {failed}"))
        answer = "not readable with this account" if unread else why
    say(f"{title}: {answer}")
    return not re.match(f"failed: |.*{UNCOMPARED}", answer)


def rejection(tools: Tools, run: Run) -> str:
    """Return whether a commit is rejected, and why."""
    rejected = tools.deployer.state.read(tools.app(run.app)).rejected.get(run.commit)
    return f"{rejected.reason}; only `rerun {run.id}` deploys it" if rejected else "no"


def missing_rights(tools: Tools, app: App) -> str:
    """Return what the daemon must be able to do, by its Roles, and the caller may not."""
    spaces = tools.config.namespaces
    needed = {ORCHESTRATION: STATE_RIGHTS, spaces["test"]: JOB_RIGHTS, spaces["build"]: JOB_RIGHTS}
    needed |= {spaces[name]: APP_RIGHTS for name in app.deploy.environments}
    rights = [(n, what, v) for n in needed for what in needed[n] for v in needed[n][what].split()]
    kind = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
    reviews, missing = [], dict[str, list[str]]()
    for namespace, what, verb in rights:
        group, resource, part = f"{what}/".split("/")[:3]
        asked = {"namespace": namespace, "verb": verb, "group": group, "resource": resource}
        reviews.append({**kind, "spec": {"resourceAttributes": {**asked, "subresource": part}}})
    stdin = json.dumps({"apiVersion": "v1", "kind": "List", "items": reviews})
    args = ("create", "-f", "-", "-o", 'jsonpath={.status.allowed}{"\\n"}', "--validate=false")
    answers = tools.deployer.kubectl.run(*args, stdin=stdin).split()
    for (namespace, what, verb), allowed in zip(rights, answers, strict=True):
        if allowed != "true":
            missing.setdefault(f"{what.strip('/')} in {namespace}", []).append(verb)
    return "; ".join(f"{', '.join(verbs)} {what}" for what, verbs in missing.items()) or "all there"


def quota(tools: Tools, namespace: str) -> str:
    """Return how much of each quota of a namespace is used."""
    listed = tools.deployer.kubectl.list("resourcequotas", namespace)
    found = [o["status"] for o in listed if o.get("status", {}).get("used")]
    told = [f"{k} {s['used'].get(k, 0)} of {most}" for s in found for k, most in s["hard"].items()]
    return ", ".join(told) or "none"


def live_version(tools: Tools, task: Task) -> str:
    """Return what is live in an environment, and what has drifted of it since."""
    service = tools.deployer.service(task)
    live = service.live if service else {}
    if not live.get("release"):
        return "not deployed from here" if service else "nothing"
    same = ", this commit" if live["commit"] == task.run.commit else ""
    deployed = tools.deployer.release(task, live).deployment
    drift = difference(tools, task.namespace, deployed)
    return f"{live['run']} ({live['colour']}){same}{drift or ', as it was deployed'}"


def next_version(tools: Tools, task: Task, checkout: Path) -> str:
    """Return what would be applied to an environment, and how long its pods would take."""
    kubectl, manifests = tools.deployer.kubectl, read_manifests(checkout, task.app.deploy.manifests)
    objects, _ = check_objects(task.app, task.namespace, manifests)
    release = render(task.app, task.run, task.image, tools.deployer.place(task), objects)
    deployment, names = release.deployment, [c["metadata"]["name"] for c in release.configmaps]
    new = [n for n in names if not kubectl.get("configmap", n, task.namespace)]
    standing = kubectl.get("deployment", deployment["metadata"]["name"], task.namespace)
    # where pods stand they are replaced one by one, else all start at once
    steps = release.wanted if standing and standing["spec"].get("replicas") else 1
    seconds = steps * (deployment["spec"]["minReadySeconds"] + START_SECONDS)
    told = f"{release.colour}, {release.wanted} pods in about {seconds:.0f} s"
    told += f", new ConfigMaps: {', '.join(new) or 'none'}"
    return told + difference(tools, task.namespace, deployment)


def difference(tools: Tools, namespace: str, wanted: Object) -> str:
    """Return what writing a Deployment would change in its spec, as lines, secrets masked.

    Not by `kubectl diff`, in whose text the value of a variable may stand without its name.
    """
    kubectl, mask = tools.deployer.kubectl, tools.deployer.secrets.mask
    name = wanted["metadata"]["name"]
    now = kubectl.get("deployment", name, namespace)
    try:
        then = json.loads(kubectl.put(wanted, now, namespace, "--dry-run=server", "-o=json"))
    except KubectlError as refused:
        return mask(f"{UNCOMPARED}{refused}")
    specs = [mask(found["spec"]) for found in (now or {"spec": {}}, then)]
    for spec in specs:  # what a drain has restarted has not drifted
        meta = spec.get("template", {}).get("metadata", {})
        notes = {**meta.pop("annotations", {}), "kubectl.kubernetes.io/restartedAt": None}
        meta["annotations"] = {k: v for k, v in notes.items() if v is not None}
    old, new = (yaml.safe_dump(spec).split("\n")[:-1] for spec in specs)
    lines = difflib.unified_diff(old, new, f"{name} now", f"{name} then", lineterm="")
    return "".join(f"\n  {line}" for line in lines)


def pod_variables(environ: Mapping[str, str], *names: str) -> list[str]:
    """Return what a Job's manifest sets; raises ConfigError outside of such a pod."""
    if missing := [n for n in names if n not in environ]:
        raise ConfigError([f"this runs inside Job pods, where {', '.join(missing)} would be set"])
    return [environ[n] for n in names]


def clone(environ: Mapping[str, str]) -> int:
    """Inside a Job pod: check out the pushed commit, or leave for the hook why not."""
    names = ("CLONE_URL", "CLONE_COMMIT", "CLONE_DIRECTORY", "CREDENTIALS_FILE", "TERMINATION_LOG")
    url, commit, directory, credentials, log = pod_variables(environ, *names)
    git, target = Git(Path(credentials)), Path(directory)
    try:
        git.checkout(url, commit, target, symlinks=True)
    except GitError as failed:
        text = Secrets(git.credentials.parent).mask(str(failed))
        Path(log).write_text(text)
        raise HookError(text) from failed
    (target.parent / "results").mkdir(exist_ok=True)
    return 0


def collect(environ: Mapping[str, str]) -> int:
    """Inside a test pod: wait until the tests have ended, then leave a summary of their report."""
    report, log = pod_variables(environ, "JUNIT_XML", "TERMINATION_LOG")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    ended.wait()
    Path(log).write_text(junit_summary(Path(report)))
    return 0


# === main =========================================================================================

COMMANDS = {c.__name__: c for c in (serve, push, status, explain, plan, rollback, rerun)}
JOB_COMMANDS = {c.__name__: c for c in (clone, collect)}


def back_or_run(text: str) -> int | str:
    """Return how many versions back to go, or the run to go to; raises ValueError."""
    if re.fullmatch("-?[0-9]{1,6}", text):
        return int(text)
    if not re.fullmatch(rf"{DNS_LABEL.pattern}-[0-9a-f]{{8}}-[0-9a-f]{{4,16}}", text):
        raise ValueError("neither a number nor the id of a run")
    return text


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    root = argparse.ArgumentParser(prog="gitops-hook", description="from a push to a deployment")
    root.epilog = "Exit status: 0 done, 1 tried and failed, 2 usage or surroundings, 3 refused."
    root.add_argument("--version", action="version", version=__version__)
    add = root.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser
    one = add("serve", help="run the daemon")
    one.add_argument("--check", action="store_true", help="check configuration and secrets only")
    one = add("push", help="send a signed test delivery")
    for name, what in (("--app", "its name"), ("--ref", "its branch"), ("--sha", "its commit")):
        one.add_argument(name, required=True, help=what)
    one.add_argument("--url", default="http://127.0.0.1:8080/webhook", help="default: %(default)s")
    one = add("status", help="what is live where, and the runs")
    one.add_argument("app", nargs="?", default="", help="all of them if not given")
    one.add_argument("--output", choices=("text", "json"), default="text", help="text if not given")
    one = add("explain", help="how a run stands, and what it printed")
    one.add_argument("run", help="its id")
    one.add_argument("--log", action="store_true", help="the last lines of what failed")
    one = add("rollback", help="switch back to a proven version")
    one.add_argument("app", help="its name")
    one.add_argument("--environment", default="", help="the app's last one if not given")
    where = "so many proven versions back, or a run of the history"
    one.add_argument("--to", type=back_or_run, default="1", metavar="N|RUN", help=where)
    one.add_argument("--reason", default="", help="why; `status` shows it")
    add("rerun", help="let a run that has ended go again").add_argument("run", help="its id")
    one = add("plan", help="what a push would do now; changes nothing")
    one.add_argument("app", help="its name")
    one.add_argument("commit", nargs="?", default="", help="the branch's head if not given")
    add("clone", help="inside a Job pod: check out the commit")
    add("collect", help="inside a test pod: summarise the report")
    return root


def verdict(failed: HookError) -> tuple[int, Sequence[str]]:
    """Return the exit status and what to say: 1 failed, 2 usage or surroundings, 3 refused."""
    if isinstance(failed, ConfigError):
        return 2, failed.faults
    kind = failed.kind if isinstance(failed, KubectlError) else ""
    if kind == "Unreachable":
        return 2, [f"no cluster answers or takes this account; is KUBECONFIG right? {failed}"]
    refused = isinstance(failed, RefusedError | SupersededError) or kind == "Conflict"
    return 3 if refused else 1, [str(failed)]


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one command and return its exit status; what went wrong is said on stderr."""
    args = parser().parse_args(argv)
    logging.basicConfig(format="gitops-hook: %(message)s", level=logging.WARNING)
    try:
        if args.command in JOB_COMMANDS:
            return JOB_COMMANDS[args.command](environ)
        return COMMANDS[args.command](Tools.load(environ), args)
    except HookError as failed:
        code, lines = verdict(failed)
    except KeyboardInterrupt:
        code, lines = 1, ["interrupted; `status` shows how things stand"]
    sys.stderr.writelines(f"gitops-hook: {without(line, ())}\n" for line in lines)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
