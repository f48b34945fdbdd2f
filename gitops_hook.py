#!/usr/bin/env python3
"""gitops-hook turns a GitLab push into a tested and built version that Kubernetes runs, blue-green.

The way of a push, and the sections of this file that have it:

    webhook     POST /webhook: verify, parse, store with fsync, 202  HTTP, signatures, pushes, spool
    intake      one `kubectl create` for many suspended Jobs         job manifests, intake
    controller  Jobs are unsuspended fairly: tests, then the build   informers, decide, controller
    deployment  claim, render, apply, roll out, smoke test, switch   app manifests, health, rollout
    bake        watch the new version; switch back if unhealthy      live service, bake
    records     how each run ended, in one bounded ConfigMap an app  state
    reports     each change of state is one Transition               reports, logging, metrics
    page        what is live, what happens and why, for people       page, HTTP
    catch-up    `git ls-remote` finds what GitLab did not deliver    git, intake

The cluster's own objects are the state: a Job's conditions, a Deployment's status, a Service's
selector. Annotations say what is intended and what happened. Where they disagree with the object,
the object is right: what today's traffic reaches is live. Nothing that matters is only in memory:
kill the daemon at any point and start it again, and the end is the same.

The words: an *app* is a repository in the configuration, and what is done with its pushes. A
*run* is one commit of one ref of one app, and its *stages* are test, build and the environments.
A *colour* is one of an app's two Deployments in an environment. A *release* is the recorded
rendering of a run in an environment. The *claim* on a live Service says who is changing an
environment. The daemon *switches back* during the bake, a person *rolls back*. A deployment that
failed has overwritten a version that `rollback` could go to: to *restore* is to apply that again.

Each section uses only those above it; `grep '^# ==='` lists them.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import copy
import ctypes
import difflib
import errno
import hashlib
import hmac
import html
import http.cookiejar
import importlib
import importlib.util
import itertools
import json
import logging
import math
import os
import platform
import queue
import random
import re
import resource
import selectors
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import typing
import uuid
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import KW_ONLY, asdict, dataclass, fields, is_dataclass, replace
from dataclasses import field as dataclass_field
from datetime import UTC, datetime
from decimal import Decimal
from enum import IntEnum, StrEnum
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Generic, NoReturn, TypeVar, cast, get_type_hints
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit
from xml.parsers import expat

try:
    import prometheus_client
    import waitress.channel
    import waitress.parser
    import waitress.server
    import waitress.utilities
    import yaml
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    MISSING_PACKAGE = str(missing.name)
else:  # `http_client` imports requests
    MISSING_PACKAGE = "" if importlib.util.find_spec("requests") else "requests"

if TYPE_CHECKING:
    from types import ModuleType
    from typing import IO
    from wsgiref.types import StartResponse, WSGIEnvironment

__version__ = "0.2.0"

# === command line =================================================================================
# It stands above all that needs a package, so that --help and --version need none.

EXIT_STATUS = "Exit status: 0 done, 1 tried and failed, 2 wrong usage or configuration, no kubectl "
EXIT_STATUS += "or no cluster, 3 refused."
EXIT_REFUSED = 3
VARIABLE_HELP = "a variable, which counts more than one of the environment"
# An id of a run, or its beginning from the first digit of the commit on, after the app's name.
RUN_ID_END = "(?:[0-9a-f]{1,8}|[0-9a-f]{8}-[0-9a-f]{0,16})"
RUN_ID = re.compile(f"([a-z0-9][a-z0-9-]*?)-{RUN_ID_END}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    about = "A GitLab push becomes a tested, built and deployed version on Kubernetes."
    root = argparse.ArgumentParser(prog="gitops-hook", description=about, epilog=EXIT_STATUS)
    root.add_argument("--version", action="version", version=__version__)
    add = root.add_subparsers(dest="command", required=True, metavar="COMMAND").add_parser
    check = "only check the configuration and the secrets"
    add("serve", help="run the daemon").add_argument("--check", action="store_true", help=check)
    one = add("push", help="send a signed test delivery, as GitLab would")
    sha = "id of the commit, which may be short for the head of a branch"
    for name, what in (("--app", "name of the app"), ("--ref", "the branch"), ("--sha", sha)):
        one.add_argument(name, required=True, help=what)
    one.add_argument("--url", default="http://127.0.0.1:8080/webhook", help="default: %(default)s")
    one = add("status", help="show what is live where, and how each run stands")
    one.add_argument("app", nargs="?", default="", help="name of the app; all apps without it")
    one.add_argument("--output", choices=("text", "json"), default="text", help="default: text")
    one = add("explain", help="show how one run stands, and why")
    one.add_argument("run", help="id of the run, or its beginning")
    one.add_argument("--log", action="store_true", help="show the last lines of what failed, too")
    one = add("rollback", help="switch an environment back to an earlier version")
    one.add_argument("app", help="name of the app")
    one.add_argument("--environment", default="", help="default: the last one of the app")
    where = "how many proven versions back, or which run of the history (default: %(default)s)"
    one.add_argument("--to", type=versions_or_run, default="1", metavar="N|RUN", help=where)
    one.add_argument("--reason", default="", help="why; `status` shows it")
    one = add("plan", help="show what a push would do now, and change nothing")
    one.add_argument("app", help="name of the app")
    one.add_argument("commit", nargs="?", default="", help="id, or its beginning (default: head)")
    one = add("rerun", help="let a run that has ended run again")
    one.add_argument("run", help="id of the run, or its beginning")
    for name, what in (("clone", "check out the commit"), ("collect", "summarise the report")):
        one = add(name, help=f"inside a Job pod: {what}")
        one.add_argument("variables", nargs="*", metavar="NAME=VALUE", help=VARIABLE_HELP)
    return root


def versions_or_run(text: str) -> int | str:
    """Return how many versions to go back, or the run to go back to."""
    if re.fullmatch("[1-9][0-9]{0,5}", text):
        return int(text)
    if RUN_ID.fullmatch(text):
        return text
    wrong = f"{text!r} is neither how many versions, 1 or more, nor the id of a run"
    raise argparse.ArgumentTypeError(wrong)


if MISSING_PACKAGE:
    parser().parse_args()  # answers --help and --version, and refuses what is no command
    what = f"the Python package {MISSING_PACKAGE} is missing for {sys.executable}"
    parser().exit(2, f"gitops-hook: {what}; run `make venv`, then use .venv/bin/python\n")

# === constants ====================================================================================

MANAGER = "gitops-hook"  # the field manager of every write, and the value of LABEL_MANAGED
ORCHESTRATION = "orchestration"  # the namespace of the daemon, its configuration and its state
COLOURS = ("blue", "green")

RESTARTED = "kubectl.kubernetes.io/restartedAt"  # what `rollout restart` annotates
LABEL_MANAGED = "app.kubernetes.io/managed-by"
LABEL_APP = "gitops-hook/app"
LABEL_RUN = "gitops-hook/run"
LABEL_STAGE = "gitops-hook/stage"
LABEL_WORKER = "gitops-hook/worker"  # on a worker's pods: a hash of their template
LABEL_BESIDE = "gitops-hook/beside"  # on pods beside an app that repel each other: the app
LABEL_WORKER_OF = "gitops-hook/worker-of"  # on a worker's pods: the app
LABEL_VERSION = "version"  # the colour of a pod
LABEL_SERVICE = "kubernetes.io/service-name"  # of an EndpointSlice
LABEL_COLOUR = "gitops-hook/colour"  # of a pod whose app uses the label `version` itself

ANNOTATION_REPOSITORY = "gitops-hook/repository"
ANNOTATION_COMMIT = "gitops-hook/commit"
ANNOTATION_DELIVERY = "gitops-hook/delivery"
ANNOTATION_BY = "gitops-hook/by"
ANNOTATION_RECEIVED = "gitops-hook/received-at"
ANNOTATION_OUTCOME = "gitops-hook/outcome"
ANNOTATION_REASON = "gitops-hook/reason"
ANNOTATION_DETAIL = "gitops-hook/detail"
ANNOTATION_ENDED = "gitops-hook/ended-at"
ANNOTATION_DIGEST = "gitops-hook/digest"
ANNOTATION_SUMMARY = "gitops-hook/summary"
ANNOTATION_REMADE = "gitops-hook/remade"
ANNOTATION_PREVIOUS = "gitops-hook/previous-selector"
ANNOTATION_REPLACED = "gitops-hook/replaced"
ANNOTATION_HISTORY = "gitops-hook/history"
ANNOTATION_CLAIM = "gitops-hook/deploying"
ANNOTATION_BAKE = "gitops-hook/bake-until"
ANNOTATION_WRITTEN = "gitops-hook/written-at"
ANNOTATION_APPLIED = "gitops-hook/applied"
ANNOTATION_PUT_BACK = "gitops-hook/put-back-at"

# Deliveries.
SIGNATURE_TOLERANCE = 300  # seconds that the time of a signature may differ from ours
DEDUPE_SECONDS = 1200  # how long a delivery is remembered; longer than a replay could be authentic
DEDUPE_ENTRIES = 20_000  # deliveries that are remembered at most

# Runs and their records.
# What stands in the place of a delivery's id where GitLab sent none. No sender can take such a
# name: each begins with a blank, which `clip` strips from ids, as it did in every older version.
CATCH_UP = " catch-up"  # a head that GitLab did not announce
NEXT_TRY = " next-try"  # a run that ended by a circumstance is tried again
RERUN = " rerun"  # a person lets a run that has ended run again
UNANNOUNCED = ("", CATCH_UP, NEXT_TRY, RERUN)  # of which there may be several for one push
HISTORY_LENGTH = 10  # entries in the history of a live Service
REJECTED_LENGTH = 50  # rejected commits that are recorded of an app
RUNS_LENGTH = 100  # the newest runs of an app that are recorded, besides those that have a Job
STATE_BYTES = 600 * 1024  # of all records of an app: a ConfigMap holds 1 MiB
RECORD_BYTES = 2048  # of one record
COMPANION_RECORDS = 500  # of an app in all environments
RECORD_VERSION = 1  # of the format of a record
STATE_TRIES = 5  # attempts to write records that another process changes at the same time
ADOPTED = "adopted"  # the outcome of the version that was live before the first run
COMPANION = "companion"  # the value of LABEL_STAGE on what stands beside an app

# Jobs and logs.
BATCH = 200  # Jobs that one call creates
TEST_JOBS = 1000  # unfinished Jobs of an app above which its test-only pushes stay in the spool
JOB_TTL = 3600  # seconds that a finished Job is kept
UNRUN_TTL = 300  # seconds that a Job is kept after the end of its run if it never started
LOG_BYTES = 64 * 1024  # of log tails that are kept of one run in one namespace
LOG_TTL = 86400.0  # seconds that they are kept
LOGS_KEPT = 20  # runs of an app whose log tails are kept in one namespace

# Calls and retries.
KUBECTL_TIMEOUT = 30.0  # seconds for one call
WATCH_SECONDS = 300  # after which every watch is renewed: one that hangs looks like a quiet one
GIT_TIMEOUT = 60.0  # seconds for one call, and for the silence of a server within a longer one
HEADS_AT_ONCE = 4  # git servers' heads read at the same time; a dead server delays only its apps
HEAD_FRESH = 10.0  # seconds for which a head that was read decides what may be deployed
HEAD_GRACE = 300.0  # seconds after a push in which git may still show a commit from before it
HEAD_PAUSE = 5.0  # seconds between two questions for the head of a push that git does not show
DELAYS = (1.0, 2.0, 5.0, 10.0, 30.0)  # seconds before each retry; the last delay repeats
TRY_DELAYS = (60.0, 300.0, 900.0, 3600.0)  # seconds after each try; the last delay repeats
TRY_SECONDS = 86400.0  # after which what ends by circumstances is not tried again by itself
LOOK_SECONDS = 2.0  # between two looks at something that no informer reports
AGAIN_SECONDS = 10.0  # after which an action that has shown no effect is repeated
EVENTS_SECONDS = 4.0  # between two looks at the Events of a pod that does not start

# Deployments.
ROLLOUT_PER_REPLICA = 20.0  # seconds that a rollout may take at least for each replica
STATUS_SECONDS = 30.0  # after which `rollout status` is asked anew: one that hangs looks patient
VERIFY_SECONDS = 10.0  # in which the endpoints must converge on the selector
UNMOVED_SECONDS = 60.0  # in which a first endpoint must change: their controller may restart
HEALTH_INTERVAL = 0.25  # seconds between health checks: three failures take less than a second
PATIENCE = 2.0  # seconds in which an app must answer a health check
IMPATIENCE = 1.0  # the same where three checks have failed, and it is asked once more
CHECK_GAP = 2.0  # seconds from a health check after which it tells no more what is so now
FRESH_SECONDS = 5.0  # for which the pods, as they were read, may be used to judge health
UNREADY_SECONDS = 5.0  # that pods of the live version may be unready before it is unhealthy
GONE_SECONDS = 1.0  # that it may have no ready pod at all: then every visitor is refused
REPLACED_SECONDS = 20.0  # that pods may be missing while the cluster replaces some that it evicted
REBAKE_SECONDS = 15.0  # that a bake takes at least after the daemon was restarted during it
CLAIM_SECONDS = 900.0  # that a rollback may take beside the waiting for pods
PUT_BACKS = 3  # times that a widened selector is put back within PUT_BACK_SECONDS
PUT_BACK_SECONDS = 600.0

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
SHA = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
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
    REGISTRY_UNAVAILABLE = "RegistryUnavailable"
    NO_DIGEST = "NoDigest"
    CLONE_FAILED = "CloneFailed"
    CLONE_REFUSED = "CloneRefused"
    IMAGE_NOT_FOUND = "ImageNotFound"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CONTAINER_CONFIG = "ContainerConfigError"
    VOLUME_UNAVAILABLE = "VolumeUnavailable"
    SERVICE_FAILED = "ServiceFailed"
    WORKER_FAILED = "WorkerFailed"
    CRASH_LOOP = "CrashLoop"
    OUT_OF_MEMORY = "OutOfMemory"
    OUT_OF_DISK = "OutOfDisk"
    INIT_FAILED = "InitContainerFailed"
    QUOTA_EXCEEDED = "QuotaExceeded"
    ADMISSION_REFUSED = "AdmissionRefused"
    PODS_NOT_CREATED = "PodsNotCreated"
    UNSCHEDULABLE = "Unschedulable"
    NEVER_STARTED = "NeverStarted"
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
    UNHEALTHY_AFTER_SWITCH = "UnhealthyAfterSwitch"
    BOTH_UNHEALTHY = "BothUnhealthy"
    UNJUDGED = "Unjudged"
    CLAIM_LOST = "ClaimLost"
    NOT_HEAD = "NotHead"
    REJECTED = "Rejected"
    ROLLED_BACK = "RolledBack"
    GIT_ERROR = "GitError"
    GAVE_UP = "GaveUp"

    @property
    def is_verdict(self) -> bool:
        """Whether the commit itself is the reason, so that another try would end alike."""
        return self in VERDICTS

    @property
    def advice(self) -> str:
        """One sentence that says what helps."""
        return (VERDICTS | CIRCUMSTANCES)[self]

    @classmethod
    def of(cls, word: str) -> Reason | None:
        """Return the reason that a recorded word is, None for one that this version lacks."""
        return next((reason for reason in cls if reason == word), None)


# A verdict says that the commit is at fault: nothing is tried again by itself. After a circumstance
# it is, unless that is a final one: someone else has taken over, or traffic was switched already.
VERDICTS = {
    Reason.OK: "Nothing is to be done.",
    Reason.TESTS_FAILED: "Read why with `explain RUN`, mend tests or code, and push again.",
    Reason.BUILD_FAILED: "Read what the builder printed with `explain RUN --log`, and push again.",
    Reason.CLONE_REFUSED: "Set apps[].clone as the text says, and use `rerun`.",
    Reason.CRASH_LOOP: "Read what the container printed with `explain RUN --log`, and push again.",
    Reason.OUT_OF_MEMORY: "Raise the memory limit of the container, or let it use less.",
    Reason.OUT_OF_DISK: "Raise the limit of ephemeral storage, or write less to disk.",
    Reason.INIT_FAILED: "Read what the init container printed with `explain RUN --log`.",
    Reason.ADMISSION_REFUSED: "Change the manifest as the text says, and push again.",
    Reason.NEVER_READY: "Look at the readiness probe, or raise deploy.rollout_timeout.",
    Reason.TIMEOUT: "Raise the time-out of the stage, or find out what still runs.",
    Reason.MANIFEST_INVALID: "Mend the manifest as the text says, and push again.",
    Reason.MANIFEST_REFUSED: "Change the manifest or the configuration as the text says.",
    Reason.SMOKE_FAILED: "See why its pods do not answer as its probe or deploy.health asks.",
    Reason.UNHEALTHY_AFTER_SWITCH: "Read the log of the version with `explain RUN --log`.",
    Reason.WORKER_FAILED: "Read the log of the worker with `explain RUN --log`, and push again.",
    Reason.REJECTED: "Push a commit that mends it, or use `rerun`.",
    Reason.ROLLED_BACK: "Push a commit that mends it, or use `rerun`.",
}
PASSING_CIRCUMSTANCES = {
    Reason.REGISTRY_UNAVAILABLE: "See whether the registry answers, and what Secret "
    "registry-credentials of the build namespace has.",
    Reason.NO_DIGEST: "See who deletes the pods of builds before their digest is read.",
    Reason.CLONE_FAILED: "See whether the git server answers, and what file git-credentials has.",
    Reason.IMAGE_NOT_FOUND: "Push the image, correct its name, or give the pods credentials.",
    Reason.IMAGE_PULL_FAILED: "See whether the nodes reach the registry.",
    Reason.CONTAINER_CONFIG: "Create the Secret or ConfigMap that the text names.",
    Reason.VOLUME_UNAVAILABLE: "Create what the text names: a Secret, ConfigMap or volume claim.",
    Reason.SERVICE_FAILED: "Read its log with `explain RUN --log`, and correct test.services.",
    Reason.QUOTA_EXCEEDED: "Raise the quota of the namespace, or request less.",
    Reason.PODS_NOT_CREATED: "See what the text says; an admission webhook may be away.",
    Reason.UNSCHEDULABLE: "Make room in the cluster, or request less.",
    Reason.NEVER_STARTED: "Look at the Events of the pod; a registry may not answer.",
    Reason.QUEUE_TIMEOUT: "Raise limits.max_running, or make room in the cluster.",
    Reason.VANISHED: "See who deletes Jobs and pods of gitops-hook.",
    Reason.ADOPTION_REFUSED: "Delete or rename the object that the text names.",
    Reason.JOB_REFUSED: "Change what the text names in the configuration or in the cluster.",
    Reason.SELECTOR_CHANGED: "See who else changes the live Service.",
    Reason.SELECTOR_CONTESTED: "See who else changes the live Service.",
    Reason.GIT_ERROR: "See whether the git server answers.",
    Reason.GAVE_UP: "Remove the cause that the text names, and use `rerun`.",
}
FINAL_CIRCUMSTANCES = {
    Reason.ENDPOINTS_MISSING: "See whether the cluster updates the endpoints of Services.",
    Reason.BOTH_UNHEALTHY: "Look for what both versions need, such as a database.",
    Reason.UNJUDGED: "Look at the new version yourself; its health could not be judged.",
    Reason.CLAIM_LOST: "See who took over the environment, and use `rerun` if it is to go on.",
    Reason.NOT_HEAD: "Nothing is to be done; a newer commit took its place.",
}
CIRCUMSTANCES = PASSING_CIRCUMSTANCES | FINAL_CIRCUMSTANCES
# What is special about some of them.
OUTCOMES = {  # of deployments that end otherwise than failed or superseded
    Reason.ROLLED_BACK: Outcome.ROLLED_BACK,
    Reason.UNHEALTHY_AFTER_SWITCH: Outcome.SWITCHED_BACK,
    Reason.WORKER_FAILED: Outcome.SWITCHED_BACK,
}
CONFIGURED_REASONS = (Reason.MANIFEST_REFUSED, Reason.CLONE_REFUSED)  # by the app's settings
# By these a run may end in an environment before its tests are over: see ManifestChecks.
EARLY_REASONS = (Reason.MANIFEST_REFUSED, Reason.MANIFEST_INVALID)
CREATION_REASONS = (Reason.JOB_REFUSED, Reason.QUOTA_EXCEEDED)  # of a Job that may get no pod


class Phase(StrEnum):
    """What is left to do in an environment when the holder of its claim has ended, or has died.

    phase          written by                 what finishes it
    preparing      a run, before it changes   restore what stood in the idle colour
    baking         the switch                 nothing: a run that is open goes on with its bake
    switched-back  the switch back            scale the version that was left to 0
    rollback       a person's `rollback`      restore what stood in the target's colour
    draining       confirmation, `rollback`   restart the version that was left, or scale it down

    `ServiceReconciler.is_claim_due` says when: never while the claim's run is open, but for what
    drains in an environment that is not the last; `draining` after deploy.drain, counted from the
    switch; `rollback` once its command must be dead; `preparing` not while a newer run is open.
    `Deployer.finish_colour` does it, and touches no colour that is live by then.
    """

    PREPARING = "preparing"
    BAKING = "baking"
    SWITCHED_BACK = "switched-back"
    ROLLBACK = "rollback"
    DRAINING = "draining"


# === errors =======================================================================================
# Everything raised on purpose is a HookError with fields; text from outside is clipped in it.
# A broad except stands only where a request or a thread ends, and it logs and counts.
#
# error                       caught by, and what happens then
# ConfigError, RefusedError   main: the command ends with exit status 2 or 3
# DeliveryError               Site: it is the answer to the request
# KubectlError                `retried`: the step is repeated if nobody knows what was done
# RunError                    Workers: the run ends, with the outcome of its reason
# NotNowError, all others     Retry.contain: tried again later; main: exit status 1


def clip(text: str, limit: int = 300) -> str:
    """Return outside text fit for a log line: printable, one line, at most limit characters."""
    if len(text) <= limit and text.isprintable() and "  " not in text:
        return text.strip()
    # only the beginning of megabytes is read, since the rest is cut off anyway
    flat = " ".join("".join(c if c.isprintable() else " " for c in text[: 20 * limit]).split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


def printable(text: str) -> str:
    """Return anyone's text fit for a terminal: control characters and the like are spelled out."""
    return "".join(c if c.isprintable() or c in "\t\n" else repr(c)[1:-1] for c in text)


# What Python raises where a value from outside does not have the expected shape.
SHAPE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class HookError(Exception):
    """The base of all errors raised on purpose."""


class NotNowError(HookError):
    """Nothing is wrong, but a step has to wait for something, and is to be taken again later."""


class ConfigError(HookError):
    """The configuration or the environment of the process cannot work; carries every fault."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = tuple(faults)


class DeliveryError(HookError):
    """A request ends early: with an HTTP status, a reason code and a sentence for its sender."""

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.code = code


# Lines that kubectl's client library logs, and advice for a person who types the command.
CLIENT_LOG_LINE = re.compile(r"(?m)^[EFIW][0-9]{4} .*$")
KUBECTL_HINT = re.compile(
    r"; if you choose to ignore these errors, turn validation off with --validate=false"
    r"| - did you specify the right host or port\?"
    r"|(?m:^See 'kubectl .*' for (usage\.|help and examples)$)"
)


class ProcessError(HookError):
    """A program failed. Code None means that it ran into its time limit and its effect is unknown.

    `said` is what it wrote to stderr, fit to be shown: one line, clipped, without kubectl's hints.
    """

    def __init__(self, argv: Sequence[str], code: int | None, stderr: str, out: str = "") -> None:
        self.code = code
        self.stderr = stderr
        self.stdout = out
        ended = "it was stopped" if code is None else f"exit status {code}"
        self.said = clip(KUBECTL_HINT.sub("", CLIENT_LOG_LINE.sub("", stderr))) or ended
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
WITHOUT_CONTENT = {"AlreadyExists", "Conflict", "NotFound", "Unknown"}  # they quote names at most
SERVER_REASON = re.compile(r'Error from server(?: \((\w+)\))?: |The \w+ (?:".*" )?is invalid')
QUOTED_TEXT = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\Z)')  # also where the text was cut off


class KubectlError(ProcessError):
    """kubectl failed.

    `kind` is the API server's reason, such as Conflict; or Unreachable, Invalid, Denied, Unknown.
    `message` is the line that says so, without the texts that it quotes: these may come from a
    manifest.
    """

    def __init__(self, argv: Sequence[str], code: int | None, stderr: str, out: str = "") -> None:
        super().__init__(argv, code, stderr, out)
        self.kind = "Unreachable" if code is None else "Unknown"
        self.message = ""
        # If one of several failures may pass by itself, that one counts: the call is repeated then.
        # Lines after the refusal of an object's content are not read: they may be that content.
        for line in CLIENT_LOG_LINE.sub("", stderr).split("\n") if code is not None else ():
            message = QUOTED_TEXT.sub("", line)
            kind = kind_of(line, message)
            if kind == "Unreachable" or self.kind == "Unknown":
                self.kind = kind
                self.message = message
            if kind not in WITHOUT_CONTENT:
                break


def kind_of(line: str, message: str) -> str:
    """Return what one line of kubectl's stderr means, from it and from what it does not quote."""
    server = SERVER_REASON.match(line)
    reason = server[1] if server else None
    if line.startswith("Warning: "):
        return "Unknown"
    if re.search("denied (the )?request", message):  # most of them are Forbidden as well
        return "Denied"
    if (line.startswith("The ") and server) or "etcdserver: request is too large" in message:
        return "Invalid"
    if reason in OVERLOADED or (reason is None and UNREACHABLE.search(message)):
        return "Unreachable"
    return reason or "Unknown"


class Obstacle(StrEnum):
    """What keeps GitLab from taking a commit status."""

    AWAY = "away"  # no answer, or a fault of the server: what it has done is not known
    LIMITED = "limited"  # it had too many requests
    BUSY = "busy"  # another request changes the same commit
    REFUSED = "refused"  # no token may do that
    REJECTED = "rejected"  # it does not take this status, or has no such commit


class GitLabError(HookError):
    """GitLab's API has not done what it was asked; `pause`: the seconds that it asks us to wait."""

    def __init__(self, obstacle: Obstacle, text: str, pause: float = 0.0) -> None:
        super().__init__(text)
        self.obstacle = obstacle
        self.pause = pause


class ReportError(HookError):
    """A test report cannot be read; the text says why, and quotes nothing of it."""


class OversizedError(ReportError):
    """A test report is larger than what is read."""


class RunError(HookError):
    """A run cannot go on, for a reason of the closed list."""

    outcome: Outcome  # of the run, unless its reason has an outcome of its own in OUTCOMES

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class StageError(RunError):
    """The run failed; live traffic is as it was, or was switched back."""

    outcome = Outcome.FAILED


LISTED_FAULTS = 50  # at once; the rest is counted
FAULT_LENGTH = 500  # characters
UNLISTED = re.compile(r"([0-9]+) more are not listed\..*")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is refused of an app's manifests, and the reason with which that ends a run."""

    text: str
    reason: Reason = Reason.MANIFEST_REFUSED


class ManifestError(StageError):
    """Manifests are refused: each fault is a line of the detail.

    The reason is ManifestInvalid only if no setting of the app can allow any of them.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(replace(f, text=clip(f.text, FAULT_LENGTH)) for f in faults)
        reasons = {fault.reason for fault in faults}
        allowable = Reason.MANIFEST_REFUSED in reasons
        reason = Reason.MANIFEST_REFUSED if allowable else Reason.MANIFEST_INVALID
        lines = [fault.text for fault in self.faults[:LISTED_FAULTS]]
        if (rest := len(faults) - LISTED_FAULTS) > 0:
            lines.append(f"{rest} more are not listed.")
        super().__init__(reason, "\n".join(lines))


def refuse(detail: str, reason: Reason = Reason.MANIFEST_REFUSED) -> NoReturn:
    """Raise the ManifestError that ends a run because of its manifests."""
    raise ManifestError([Fault(detail, reason)])


def clip_lines(text: str) -> str:
    """Return outside text as lines fit for a log, as many as a refusal of manifests has at most."""
    return "\n".join(clip(line) for line in text.split("\n")[: LISTED_FAULTS + 1])


def shortened(detail: str) -> str:
    """Return a detail with one line less, which its last line then counts; of one line the half."""
    lines = detail.split("\n")
    count = UNLISTED.fullmatch(lines[-1])
    left = lines[:-1] if count else lines
    rest = int(count[1]) + 1 if count else 1
    if not left[1:]:
        return detail[: len(detail) // 2]
    return "\n".join([*left[:-1], f"{rest} more are not listed. `plan` shows them."])


class SupersededError(RunError):
    """The run ends because something newer, or a person, took its place."""

    outcome = Outcome.SUPERSEDED


class RefusedError(HookError):
    """A command is not carried out, for a reason that repeating it does not change: exit 3."""


# === configuration ================================================================================

T = TypeVar("T")
Object = dict[str, Any]  # JSON as kubectl, YAML files and payloads have it
Parser = Callable[[Any], Any]
REQUIRED = ""  # the default of a setting that has none
HIGHEST_PORT = 65535


def matching(
    pattern: str, what: str, convert: Parser = str, types: tuple[type[Any], ...] = (str,)
) -> Parser:
    """Return a parser for values of these types whose text matches the whole pattern."""

    def parse(value: Any) -> Any:
        """Return the value, converted; raises ValueError that says what was expected."""
        if type(value) in types and re.fullmatch(pattern, str(value)):
            return convert(value)
        raise ValueError(f"is not {what}")

    return parse


UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "KiB": 2**10, "MiB": 2**20}


def parse_amount(text: str) -> float:
    """Return a whole number with a unit, in seconds or bytes."""
    unit = text.lstrip("0123456789")
    return int(text.removesuffix(unit)) * UNITS[unit]


def parse_replicas(value: Any) -> int | None:
    """Return a number of replicas, None for `full`; raises ValueError for anything else."""
    return None if value == "full" else REPLICAS(value)


def parse_depth(value: Any) -> int:
    """Return a number of commits, 0 for `full`; raises ValueError for anything else."""
    return 0 if value == "full" else COUNT(value)


def parse_choice(text: str | bool) -> str:
    """Return `true`, `false` or "", which means that nobody has decided."""
    return str(text).lower()


def parse_port(text: str | int) -> str | int:
    """Return a port's number or name, "" where nobody has decided; raises ValueError for others."""
    if not str(text).isdigit():
        return text
    if int(text) > HIGHEST_PORT:
        raise ValueError(f"is more than {HIGHEST_PORT}")
    return int(text)


TEXT = matching(r"(?s)(?=.*\S)[^\x00]{1,10000}", "a text")
PLAIN = matching(r"[^\x00-\x1f\x7f]{0,10000}", "a text of one line", str, (str, int, float))
SHORT = "a DNS label of at most 30 characters that begins with a letter"  # as Services want it
NAME = matching(rf"(?![0-9]|.{{31}}){DNS_LABEL.pattern}", SHORT)
LABEL = matching(rf"(?!.{{64}}){DNS_LABEL.pattern}", "a DNS label")
BRANCH = matching(r"(?!refs/)[^\s~^:?*\[\\]{1,255}", "a branch name (without refs/heads/)")
SERVICE = matching(r"|(?!.{64})[a-z]([-a-z0-9]*[a-z0-9])?", "a name that a Service can have")
FOLDER = matching(r"(?![/-])(?!(.*/)?\.\.(/|$))[^\x00]+", "a relative path within the repository")
ENVIRONMENT = "{environment}"  # in deploy.manifests: the name of each environment


def parse_folders(value: Any) -> str:
    """Return the path of the folder of each environment; raises ValueError for anything else."""
    path = str(FOLDER(value))
    if re.search("[{}]", path.replace(ENVIRONMENT, "")):
        raise ValueError(f"has another placeholder than {ENVIRONMENT}")
    if ENVIRONMENT in top_folder(path):
        raise ValueError(f"has {ENVIRONMENT} in its first folder, which must have all environments")
    return path


def top_folder(path: str) -> str:
    """Return the first folder of a path, which is what git fetches of a commit."""
    return (*PurePosixPath(path).parts, ".")[0]


URL_PATH = matching(r"(/[\x21-\x7e]{0,2000})?", "a path")
PORT_TEXT = "|[1-9][0-9]{0,4}|(?=.*[a-z])[a-z0-9-]{1,15}"
PORT = matching(PORT_TEXT, "the number or the name of a port", parse_port, (int, str))
SCHEME = matching("(?i:https?)?", "HTTP or HTTPS", str.upper)
HEADER_VALUE = matching(r"[^\x00-\x1f\x7f]{0,1000}", "a text of one line", str, (str, int, float))
ABSOLUTE = matching(r"(/(?!\.\.?(/|$))[\w.+-]{1,100}){1,20}", "an absolute path without . and ..")
SUBDOMAIN = rf"(?!.{{254}}){DNS_LABEL.pattern}(\.{DNS_LABEL.pattern})*"
OBJECT_NAME = matching(SUBDOMAIN, "the name of an object")
CLAIM_NAME = matching(f"|{SUBDOMAIN}", "the name of a claim")
SHELL = matching(r"[^\x00]{0,10000}", "a text")
REPOSITORY = matching(
    r"(file://)?/[^\s\x00]+|https?://[A-Za-z0-9._:\[\]-]+/[^\s@?#\x00]+",
    "an http(s) URL without user, query and fragment (a user belongs in file git-credentials)",
)
WEB_ADDRESS = matching(
    r"|https?://[A-Za-z0-9._:\[\]-]+(/[^\s@?#\x00]*)?",
    "an http(s) URL without user, query and fragment",
)
IMAGE_PATH = r"([a-z0-9][\w.-]*(:[0-9]+)?/)?[a-z0-9._/-]*"  # only its host may have capitals
IMAGE = matching(rf"(?=[a-z0-9]){IMAGE_PATH}(:[\w.-]+)?(@\w+:[0-9a-f]+)?", "an image reference")
TARGET = matching(IMAGE_PATH, "an image without tag and digest")
ADDRESS = matching(r"[^\s/]+:[0-9]{1,5}", "host:port")
AMOUNT = r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?"
QUANTITY = matching(AMOUNT, "a quantity (e.g. 250m, 1Gi)", str, (str, int, float))
MODE = matching("signature|token|hmac", "signature, token or hmac")
BUILD_TOOL = matching("kaniko|none", "kaniko or none")
SWITCH = matching("True|False", "true or false", bool, (bool,))
IGNORED = matching(
    r"[A-Za-z]\w{0,99}(/[a-z0-9][a-z0-9.-]{0,252})?", "Kind or Kind/name (e.g. CronJob/night)"
)
# What no app may have applied: it gives rights, holds data, or concerns the whole cluster.
NEVER_COMPANIONS = {
    *("Secret", "Job", "Pod", "Deployment", "ReplicaSet", "DaemonSet", "PersistentVolumeClaim"),
    *("Role", "RoleBinding", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Namespace"),
    *("CustomResourceDefinition", "PersistentVolume", "ResourceQuota", "LimitRange", "Endpoints"),
    *("EndpointSlice", "ReplicationController"),
}
KIND = matching(r"[A-Z]\w{0,99}", "a Kind (e.g. Ingress)")
CHOICE = matching("|[Tt]rue|[Ff]alse", "true, false or empty", parse_choice, (str, bool))
COUNT = matching("[1-9][0-9]{0,5}", "a whole number from 1 to 999999", int, (int,))
PORT_NUMBER = "[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
LISTEN_PORT = matching(PORT_NUMBER, "a port from 1 to 65535", int, (int,))
USER = matching("[1-9][0-9]{0,8}", "the number of a user that is not root", int, (int,))
REPLICAS = matching("[0-9]{1,3}", "full or a whole number from 0 to 999", int, (int,))
DURATION = matching("[1-9][0-9]{0,4}[smh]", "a duration (e.g. 90s, 15m, 2h)", parse_amount)
PAUSE = matching("[0-9]{1,5}(ms|[smh])", "a duration (e.g. 90s, 15m, 2h)", parse_amount)
SMALL_SIZES = "(?!0)([1-5]?[0-9]|6[0-4])MiB|[1-9][0-9]{0,4}KiB"
SIZE = matching(SMALL_SIZES, "a size up to 64MiB", parse_amount)
DISK_SIZE = matching("[1-9][0-9]{0,3}MiB", "a size from 1MiB to 9999MiB", parse_amount)

TESTS = "pip install -r requirements.txt && python -m pytest tests/ -v --junitxml=$JUNIT_XML"
TEST_POD = "{requests: {cpu: 250m, memory: 256Mi}, limits: {cpu: 500m, memory: 512Mi}}"
SERVICE_POD = "{requests: {cpu: 100m, memory: 128Mi}, limits: {cpu: 500m, memory: 512Mi}}"
BUILD_POD = "{requests: {cpu: 500m, memory: 1Gi}, limits: {cpu: 2, memory: 4Gi}}"
NAMESPACES = "{test: test, build: build, staging: staging, production: production}"
KANIKO = "ghcr.io/osscontainertools/kaniko:v1.28.3"


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is declared of one setting."""

    kind: Any  # its type: a section, a list, a mapping, or what the parser returns
    parse: Parser  # of its value, or of each text and number in its list or mapping
    default: str  # as YAML text
    meaning: str


def setting(*, parse: Parser = TEXT, default: str = REQUIRED, meaning: str = "") -> Any:
    """Declare a field of a section to be a setting."""
    return dataclass_field(metadata={"parse": parse, "default": default, "meaning": meaning})


@dataclass(frozen=True, kw_only=True, slots=True)
class CloneSettings:
    """What the Jobs of an app get of its repository."""

    depth: int = setting(
        parse=parse_depth, default="1", meaning="commits of history: a number, or `full`"
    )
    tags: bool = setting(
        parse=SWITCH,
        default="false",
        meaning="whether tags come too; with depth 1 then all history, for `git describe`",
    )
    submodules: str = setting(
        parse=CHOICE,
        default="''",
        meaning="`true`: fetched; `false`: left empty; empty: a commit that has some is red",
    )
    lfs: str = setting(
        parse=CHOICE,
        default="''",
        meaning="the same for files in git LFS, of which `false` leaves the pointers",
    )

    @property
    def depth_options(self) -> tuple[str, ...]:
        """The options of `git fetch` for this depth, where a tag is described from all history."""
        is_whole = self.depth == 0 or (self.tags and self.depth == 1)
        return () if is_whole else (f"--depth={self.depth}",)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSettings:
    """A program that runs beside the tests of an app, such as a database."""

    name: str = setting(parse=NAME, meaning="name of a service's container; at most 5 services")
    image: str = setting(parse=IMAGE, meaning="image of a service that the tests use")
    port: int = setting(
        parse=LISTEN_PORT,
        meaning="port that it listens on; the tests begin when it does, on localhost",
    )
    command: str = setting(
        parse=SHELL, default="''", meaning="command for `sh -ec` instead of the image's own"
    )
    env: dict[str, str] = setting(parse=PLAIN, default="{}", meaning="variables of the service")
    user: int = setting(parse=USER, default="65532", meaning="user that it runs as, never root")
    writable: tuple[str, ...] = setting(
        parse=ABSOLUTE,
        default="[]",
        meaning="empty folders that it may write to, besides `/tmp`; all else is read-only",
    )
    resources: dict[str, dict[str, str]] = setting(
        parse=QUANTITY,
        default=SERVICE_POD,
        meaning="its requests and limits; `ephemeral-storage: 1Gi` if not set",
    )
    start_timeout: float = setting(
        parse=DURATION, default="60s", meaning="how long it may take until it listens"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TestSettings:
    """How the tests of an app are run."""

    image: str = setting(
        parse=IMAGE, default="python:3.12-slim", meaning="image in which the tests run"
    )
    command: str = setting(
        default=TESTS,
        meaning="test command for `sh -ec`; it may write a JUnit report to $JUNIT_XML",
    )
    timeout: float = setting(
        parse=DURATION, default="15m", meaning="how long the tests may run, from their pod's start"
    )
    resources: dict[str, dict[str, str]] = setting(
        parse=QUANTITY,
        default=TEST_POD,
        meaning="requests and limits of the test container; `ephemeral-storage: 4Gi` if not set",
    )
    env: dict[str, str] = setting(parse=PLAIN, default="{}", meaning="variables of the tests")
    env_from: tuple[str, ...] = setting(
        parse=OBJECT_NAME,
        default="[]",
        meaning="Secrets of namespace `test` whose keys become variables of the tests",
    )
    services: tuple[ServiceSettings, ...] = setting(default="[]")
    cache: str = setting(
        parse=CLAIM_NAME,
        default="''",
        meaning="PersistentVolumeClaim of namespace `test` that is mounted at `/cache`",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildSettings:
    """How the image of an app is built."""

    builder: str = setting(
        parse=BUILD_TOOL,
        default="kaniko",
        meaning="`kaniko`, or `none` if the manifests name images by digest",
    )
    image: str = setting(
        parse=TARGET, default="''", meaning="where the image is pushed, without a tag"
    )
    context: str = setting(
        parse=FOLDER, default=".", meaning="folder of the repository that the build sees"
    )
    dockerfile: str = setting(
        parse=FOLDER, default="Dockerfile", meaning="path of the Dockerfile in that folder"
    )
    args: tuple[str, ...] = setting(default="[]", meaning="further options for kaniko")
    timeout: float = setting(
        parse=DURATION, default="20m", meaning="how long a build may run, from its pod's start"
    )
    resources: dict[str, dict[str, str]] = setting(
        parse=QUANTITY,
        default=BUILD_POD,
        meaning="requests and limits of the build container; `ephemeral-storage: 10Gi` if not set",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """What makes a version healthy before and after the switch."""

    path: str = setting(
        parse=URL_PATH,
        default="''",
        meaning="path that is answered with 200 to 399; empty: as the readiness probe says",
    )
    port: int | str = setting(
        parse=PORT,
        default="''",
        meaning="port of the pods, by number or name; empty: as the probe says",
    )
    scheme: str = setting(
        parse=SCHEME, default="''", meaning="`HTTP` or `HTTPS`; empty: as the probe says"
    )
    headers: dict[str, str] = setting(
        parse=HEADER_VALUE, default="{}", meaning="headers of the request; empty: as the probe says"
    )
    successes: int = setting(
        parse=COUNT, default="3", meaning="passed checks in a row that make a version healthy"
    )
    failures: int = setting(
        parse=COUNT, default="3", meaning="failed checks in a row that make a version unhealthy"
    )
    timeout: float = setting(
        parse=DURATION, default="30s", meaning="how long the smoke test before the switch may take"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploySettings:
    """How an app is deployed."""

    manifests: str = setting(
        parse=parse_folders,
        default="deploy",
        meaning="folder of manifests, plain YAML or a kustomization; `deploy/{environment}`: each "
        "environment has its own, and what they share is below the first folder, too",
    )
    ignore: tuple[str, ...] = setting(
        parse=IGNORED,
        default="[]",
        meaning="what others apply of that folder: `Kind`, for all of a kind, or `Kind/name`",
    )
    service: str = setting(
        parse=SERVICE,
        default="''",
        meaning="name of the live Service in that folder; empty: the name of the app",
    )
    companions: tuple[str, ...] = setting(
        parse=KIND,
        default="[]",
        meaning="further kinds that are applied beside the app, as `Ingress`; the Role must "
        "allow get, create, update and delete",
    )
    ignore_kinds: tuple[str, ...] = setting(
        default="[]", meaning="an older name of `ignore`; both are heeded"
    )
    service_accounts: tuple[str, ...] = setting(
        parse=OBJECT_NAME,
        default="[]",
        meaning="service accounts that the pods may run as, besides `default`",
    )
    environments: tuple[str, ...] = setting(
        default="[staging, production]",
        meaning="where the app is deployed, in this order; the bake is in the last; `[]`: nowhere",
    )
    health: Health
    rollout_timeout: float = setting(
        parse=DURATION,
        default="300s",
        meaning="how long new pods may take to become ready; at least 20 s for each replica",
    )
    crashes: int = setting(
        parse=COUNT,
        default="2",
        meaning="exits of a container for the same cause, before it was ready, that end a rollout",
    )
    log_tails: bool = setting(
        parse=SWITCH, default="true", meaning="whether the last log lines of failed pods are kept"
    )
    bake: float = setting(
        parse=PAUSE,
        default="60s",
        meaning="how long after the switch an unhealthy version is switched back automatically",
    )
    drain: float = setting(
        parse=PAUSE,
        default="60s",
        meaning="how long after the switch the old pods are left alone, to finish their requests",
    )
    retain: int | None = setting(
        parse=parse_replicas,
        default="full",
        meaning="old pods that are kept for a rollback after that, restarted: `full` or a number",
    )

    def folder(self, environment: str) -> str:
        """Return the folder with the manifests of an environment."""
        return self.manifests.replace(ENVIRONMENT, environment)

    def ignores(self, kind: str, name: str) -> bool:
        """Whether an object of the manifests folder is left to others."""
        return not {kind, f"{kind}/{name}"}.isdisjoint((*self.ignore, *self.ignore_kinds))


@dataclass(frozen=True, kw_only=True, slots=True)
class App:
    """One repository and what becomes of its pushes."""

    name: str = setting(
        parse=NAME, meaning="name of the app; names of its Deployments and Jobs contain it"
    )
    repository: str = setting(
        parse=REPOSITORY, meaning="clone URL; pushes that name an ssh URL of it match as well"
    )
    branch: str = setting(
        parse=BRANCH, default="main", meaning="pushes to it are tested, built and deployed"
    )
    test_branches: tuple[str, ...] = setting(
        default="['*']", meaning="patterns of branches whose pushes are only tested"
    )
    clone: CloneSettings
    test: TestSettings
    build: BuildSettings
    deploy: DeploySettings

    @property
    def deploy_ref(self) -> str:
        """The ref whose pushes are deployed."""
        return f"refs/heads/{self.branch}"

    @property
    def service_name(self) -> str:
        """The name of the live Service."""
        return self.deploy.service or self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class Images:
    """The images of Job pods."""

    hook: str = setting(
        parse=IMAGE,
        default="gitops-hook:dev",
        meaning="this program's image, of the same version; `make apply` sets it",
    )
    kaniko: str = setting(parse=IMAGE, default=KANIKO, meaning="image of the builder")


@dataclass(frozen=True, kw_only=True, slots=True)
class Webhook:
    """Which deliveries are accepted."""

    verify: str = setting(
        parse=MODE,
        default="signature",
        meaning="what proves that GitLab sent a delivery: `signature`, `token` or `hmac`",
    )
    max_body: int = setting(
        parse=SIZE, default="5MiB", meaning="larger deliveries are refused with status 413"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class GitLabSettings:
    """How GitLab is told what becomes of a push."""

    url: str = setting(
        parse=WEB_ADDRESS,
        default="''",
        meaning="address of GitLab, if it is not the host of the repository by https",
    )
    statuses: bool = setting(
        parse=SWITCH,
        default="true",
        meaning="whether commits get statuses; they need Secret file `gitlab-token`",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds on what the daemon uses."""

    max_running: int = setting(
        parse=COUNT, default="4", meaning="Jobs that may run (be unsuspended) at the same time"
    )
    queue_timeout: float = setting(
        parse=DURATION,
        default="1h",
        meaning="how long a Job may wait to be unsuspended, and then for its pod to start",
    )
    spool_files: int = setting(
        parse=COUNT,
        default="10000",
        meaning="pushes stored on disk, 16 KiB each; more are refused with status 503; one app "
        "has at most nine tenths, and half of those that are only tested",
    )
    kubectl: int = setting(
        parse=COUNT, default="8", meaning="kubectl processes at the same time, besides watches"
    )
    checkout: int = setting(
        parse=DISK_SIZE, default="64MiB", meaning="what git may fetch for one commit's manifests"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole configuration, valid."""

    apps: tuple[App, ...] = setting()
    namespaces: dict[str, str] = setting(
        parse=LABEL, default=NAMESPACES, meaning="namespace of each stage and each environment"
    )
    images: Images
    webhook: Webhook
    gitlab: GitLabSettings
    external_url: str = setting(
        parse=WEB_ADDRESS,
        default="''",
        meaning="where people reach the page; commit statuses link to it",
    )
    job_env: dict[str, str] = setting(
        parse=PLAIN,
        default="{}",
        meaning="variables of every Job container and of the daemon's git, such as `HTTPS_PROXY`",
    )
    limits: Limits
    catch_up: float = setting(
        parse=DURATION,
        default="5m",
        meaning="how often deploy branches are searched for pushes that GitLab did not deliver",
    )


def load_config(document: str) -> Config:
    """Return the configuration in a YAML text; raises ConfigError with all its faults."""
    try:
        data = yaml.load(document, ConfigLoader)  # noqa: S506 - a SafeLoader that is stricter
    except (yaml.YAMLError, ValueError, RecursionError) as wrong:
        raise ConfigError([f"configuration: not YAML: {clip(str(wrong))}"]) from wrong
    faults: list[str] = []
    config: Config = load_section(Config, data, "", faults)
    faulty = {fault.partition(":")[0] for fault in faults}
    faults += [f for f in cross_faults(config) if f.partition(":")[0] not in faulty]
    if faults:
        raise ConfigError(faults)
    return config


class ConfigLoader(yaml.SafeLoader):
    """YAML without repeated keys, of which one value would be dropped silently."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Return a mapping's node; raises YAMLError for a repeated key."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"{', '.join(repeated)} twice in one mapping{node.start_mark}")
        return node


def load_section(section: Any, data: Any, path: str, faults: list[str]) -> Any:
    """Return a section as YAML data has it; a wrong value adds a fault, and its default is used."""
    if not isinstance(data, dict):
        faults.append(f"{path or 'configuration'}: is not a mapping")
        data = {}
    settings = settings_of(section)
    prefix = f"{path}." if path else ""
    unknown = [clip(str(key), 60) for key in data if key not in settings]
    faults += [f"{prefix}{key}: unknown key (known: {', '.join(settings)})" for key in unknown]
    values: Object = {}
    for key, declared in settings.items():
        raw = data.get(key)
        value = None if raw is None else load_value(declared, raw, prefix + key, faults)
        if value is None and declared.default != REQUIRED:
            value = load_value(declared, parsed_default(declared.default), "", [])
        elif raw is None:
            faults.append(f"{prefix}{key}: is required")
        values[key] = value
    return section(**values)


@cache  # since each of many apps has the same ones
def parsed_default(text: str) -> Any:
    """Return what a default means in YAML; nobody changes it."""
    (value,) = own_yaml(text)
    return value


def own_yaml(text: str) -> Iterator[Any]:
    """Yield the documents in a YAML text of this file; libyaml, where it is there, reads faster."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    yield from yaml.load_all(text, loader)


@cache
def settings_of(section: type[Any]) -> Mapping[str, Setting]:
    """Return the settings of a section by key; a section within it is one of them."""
    kinds = get_type_hints(section)
    nested: Object = {"parse": TEXT, "default": "{}", "meaning": ""}
    return {f.name: Setting(kind=kinds[f.name], **(f.metadata or nested)) for f in fields(section)}


def load_value(declared: Setting, raw: Any, path: str, faults: list[str]) -> Any:
    """Return what YAML data means for a setting, None if it is wrong; adds every fault."""
    if is_dataclass(declared.kind):
        return load_section(declared.kind, raw, path, faults)
    family = typing.get_origin(declared.kind)
    if family in (tuple, dict):
        inner = replace(declared, kind=typing.get_args(declared.kind)[family is dict])
        if family is tuple and isinstance(raw, list):
            return tuple(load_value(inner, v, f"{path}[{i}]", faults) for i, v in enumerate(raw))
        if family is dict and isinstance(raw, dict):
            return {str(k): load_value(inner, v, f"{path}.{k}", faults) for k, v in raw.items()}
        what = "list" if family is tuple else "mapping"
        faults.append(f"{path}: {clip(repr(raw), 80)} is not a {what}")
        return None
    try:
        return declared.parse(raw)
    except ValueError as wrong:
        faults.append(f"{path}: {clip(repr(raw), 80)} {wrong}")
        return None


def cross_faults(config: Config) -> Iterator[str]:
    """Yield what is wrong between settings that are each valid."""
    namespaces = config.namespaces
    own = {v for k, v in namespaces.items() if DNS_LABEL.fullmatch(k)} - {ORCHESTRATION}
    if not {"test", "build"} <= namespaces.keys() or len(own) < len(namespaces):
        needed = f"test, build and each environment need one of their own, none {ORCHESTRATION}"
        yield f"namespaces: {needed}; their keys must be DNS labels"
    apps = config.apps or ()  # None where they are missing
    names = [app.name for app in apps]
    taken = {f"{name}-{suffix}" for name in names for suffix in (*COLOURS, "preview")}
    for i, app in enumerate(apps):
        environments = app.deploy.environments
        where = f"apps[{i}].deploy.environments"
        if app.name and app.name in names[:i]:
            yield f"apps[{i}].name: {app.name!r} is the name of two apps"
        if app.name in taken:
            yield f"apps[{i}].name: {app.name!r} is the name of another app's Deployment or Service"
        if len(set(environments)) < len(environments):
            yield f"{where}: names an environment twice"
        for name in sorted({*filter(None, environments)} - (namespaces.keys() - {"test", "build"})):
            yield f"{where}: {name!r} is not an environment in namespaces ({', '.join(namespaces)})"
        if app.build.builder == "kaniko" and environments and not app.build.image:
            yield f"apps[{i}].build.image: is required with builder kaniko"
        for stage, settings in (("test", app.test), ("build", app.build)):
            yield from resource_faults(settings.resources, f"apps[{i}].{stage}")
        for kind in sorted({*(app.deploy.companions or ())} & NEVER_COMPANIONS):
            yield f"apps[{i}].deploy.companions: {kind} is never applied beside an app"
        yield from variable_faults(app.test.env or {}, f"apps[{i}].test.env", TEST_VARIABLE)
        yield from side_car_faults(app.test.services or (), f"apps[{i}].test.services")
    yield from service_faults(apps)
    yield from header_faults(apps)
    yield from variable_faults(config.job_env or {}, "job_env", OWN_VARIABLE)


def service_faults(apps: Sequence[App]) -> Iterator[str]:
    """Yield which apps name a Service that another app, or gitops-hook itself, has."""
    previews = {f"{app.name}-preview" for app in apps}
    for i, app in enumerate(apps):
        if app.deploy.service in previews:
            yield f"apps[{i}].deploy.service: {app.deploy.service!r} is a preview Service's name"
        environments = {*app.deploy.environments}
        same = [
            other.name
            for other in apps[:i]
            if other.service_name == app.service_name
            and environments.intersection(other.deploy.environments)
        ]
        if same and app.name not in same:
            used = f"{app.service_name!r} is the live Service of app {same[0]!r}, too"
            yield f"apps[{i}].deploy.service: {used}"


def header_faults(apps: Iterable[App]) -> Iterator[str]:
    """Yield what is wrong with the names of headers."""
    for i, app in enumerate(apps):
        for name in app.deploy.health.headers:
            if not HEADER_NAME.fullmatch(name):
                yield f"apps[{i}].deploy.health.headers: {clip(repr(name), 60)} is no header's name"


def resource_faults(resources: Mapping[str, Any], where: str) -> Iterator[str]:
    """Yield what is wrong with the keys of a container's resources."""
    for key in sorted(resources.keys() - {"requests", "limits"}):
        yield f"{where}.resources: {key!r} is neither requests nor limits"


def variable_faults(
    variables: Mapping[str, str], where: str, reserved: re.Pattern[str]
) -> Iterator[str]:
    """Yield what is wrong with the names of variables."""
    for name in variables:
        if not VARIABLE.fullmatch(name):
            yield f"{where}.{clip(name, 60)}: is no name of an environment variable"
        elif reserved.fullmatch(name):
            yield f"{where}.{name}: is set by this program, or would change how it works"


def side_car_faults(services: Sequence[ServiceSettings], where: str) -> Iterator[str]:
    """Yield what is wrong with the services of a test pod, which share an address."""
    if len(services) > MOST_SERVICES:
        yield f"{where}: {len(services)} are too many (at most {MOST_SERVICES})"
    for i, service in enumerate(services):
        before = services[:i]
        here = f"{where}[{i}]"
        if service.name in (*TEST_CONTAINERS, *(other.name for other in before)):
            yield f"{here}.name: {service.name!r} is the name of another container"
        if service.port in [other.port for other in before]:
            yield f"{here}.port: {service.port} is the port of another service"
        folders = [*filter(None, service.writable or ())]
        for path in dict.fromkeys(folders):
            inner = [p for p in (*folders, *TAKEN_PATHS) if is_within(p, path)]
            if len(inner) > 1 or any(is_within(path, taken) for taken in TAKEN_PATHS):
                yield f"{here}.writable: {path} is mounted already, or holds such a folder"
        yield from variable_faults(service.env or {}, f"{here}.env", SERVICE_VARIABLE)
        yield from resource_faults(service.resources or {}, here)


def is_within(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it."""
    return PurePosixPath(path).is_relative_to(folder)


MOST_SERVICES = 5  # of one test pod
TEST_CONTAINER = "test-runner"
RESULTS_CONTAINER = "results"
TEST_CONTAINERS = (TEST_CONTAINER, RESULTS_CONTAINER, "clone")
TEMPORARY = "/tmp"  # noqa: S108 - in a service's container
TAKEN_PATHS = (TEMPORARY, "/dev", "/proc", "/sys")
TEST_VARIABLE = re.compile("CA_BUNDLE|CI|GIT_BRANCH|GIT_COMMIT|JUNIT_XML|TERMINATION_LOG")
SERVICE_VARIABLE = re.compile("TERMINATION_LOG")
VARIABLE = re.compile("[A-Za-z_][A-Za-z0-9_]{0,99}")
# Variables that the programs in Job pods get from us, or whose value says what they load and run.
OWN_VARIABLE = re.compile(
    r"(?:CLONE_|GIT_|GITOPS_HOOK_|KUBE|LD_|PYTHON)\w*|BASH_ENV|CA_BUNDLE|CA_FILE|CI|COLLECTING"
    r"|CREDENTIALS_FILE|ENV|HOME|IFS|JUNIT_XML|PATH|TERMINATION_LOG|container"
)
# What a kubelet sets in a pod beside a Service whose name begins with gitops-hook.
INJECTED = re.compile(r"GITOPS_HOOK(_\w+)?_(SERVICE_(HOST|PORT\w*)|PORT\w*)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """What the environment variables GITOPS_HOOK_* say: files, folders and addresses."""

    config: Path = setting(parse=Path, default="/etc/gitops-hook/config.yaml")
    secrets: Path = setting(parse=Path, default="/etc/gitops-hook/secrets")
    spool: Path = setting(parse=Path, default="/var/spool/gitops-hook")
    listen: str = setting(parse=ADDRESS, default="0.0.0.0:8080")
    admin_listen: str = setting(parse=ADDRESS, default="127.0.0.1:8081")
    ca: Path = setting(parse=Path, default="/etc/gitops-hook-ca/ca.crt")

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Process:
        """Read GITOPS_HOOK_*; raises ConfigError for unknown names but those a kubelet injects."""
        faults: list[str] = []
        ours = [k for k in environ if k.startswith("GITOPS_HOOK_") and not INJECTED.fullmatch(k)]
        values = {k.removeprefix("GITOPS_HOOK_").lower(): environ[k] or None for k in ours}
        process: Process = load_section(cls, values, "", faults)
        if faults:
            named = (fault.partition(":") for fault in faults)
            raise ConfigError([f"GITOPS_HOOK_{key.upper()}:{rest}" for key, _, rest in named])
        return process


SIGNING_TOKENS = "webhook-signing-tokens"
PLAIN_TOKENS = "webhook-tokens"
GIT_CREDENTIALS = "git-credentials"
GITLAB_TOKENS = "gitlab-token"
SECRET_FILES = (SIGNING_TOKENS, PLAIN_TOKENS, GIT_CREDENTIALS, GITLAB_TOKENS)
SECRET_OF_MODE = {"signature": SIGNING_TOKENS, "token": PLAIN_TOKENS, "hmac": PLAIN_TOKENS}
KEY_BYTES = 32  # of a decoded signing token
WORDS_SECONDS = 1.0  # after which a secret that nobody has used yet is masked, too


class Secrets:
    """The secrets directory: one file a kind, one secret a line, read at use so that it rotates."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # each delivery asks for the state of all files, and to put a path together takes longer
        self._paths = {name: directory / name for name in SECRET_FILES}
        # what was read last, by the state of the file
        self._files: dict[str, dict[tuple[int, int, int], list[bytes]]] = {}
        self._words: list[str] = []
        self._words_until = 0.0  # when the files are looked at again, by the monotonic clock
        # held while words are read, so that a slow thread does not replace newer ones with older
        self._looking = threading.RLock()

    def keys(self, mode: str) -> list[bytes]:
        """Return the keys to verify deliveries with; raises ConfigError if one is unusable."""
        name = SECRET_OF_MODE[mode]
        lines = self.lines(name)
        if not lines:
            raise ConfigError([f"secret file {self.directory / name} is missing or empty"])
        if name != SIGNING_TOKENS:
            return lines
        return [decode_signing_token(token, number) for number, token in enumerate(lines, 1)]

    def mask(self, value: T) -> T:
        """Return a text, or all texts within a value, without what is or looks like a secret."""
        masked: T = mask_value(value, self.words())
        return masked

    def words(self) -> list[str]:
        """Return what `mask_value` is not to show: every secret, and the passwords in URLs.

        Every line of the log needs them, so the files are looked at once in a second. A new secret
        is among them as soon as it is read for any use, at the latest one second after the change.
        """
        if self._words_are_old():
            with self._looking:
                if self._words_are_old():
                    # first, so that a file which is read meanwhile counts
                    self._words_until = time.monotonic() + WORDS_SECONDS
                    lines = [line for name in SECRET_FILES for line in self.lines(name)]
                    self._words = secret_words(line.decode("utf-8", "replace") for line in lines)
        return self._words

    def _words_are_old(self) -> bool:
        return time.monotonic() >= self._words_until or not self._words

    def lines(self, name: str) -> list[bytes]:
        """Return the secrets in a file, without white space around them; none if it is absent."""
        path = self._paths.get(name) or self.directory / name
        try:
            status = path.stat()
            # the inode tells that a link was changed, as a kubelet does it
            state = (status.st_mtime_ns, status.st_size, status.st_ino)
            lines = self._files.get(name, {}).get(state)
            if lines is None:
                lines = [line.strip(b" \t\r") for line in path.read_bytes().split(b"\n")]
                lines = [line for line in lines if line]
                self._files[name] = {state: lines}
                self._words_until = 0.0
        except OSError:
            self._files.pop(name, None)  # so that it counts as new when it is back
            return []
        return lines


def decode_signing_token(token: bytes, line: int) -> bytes:
    """Return the 32 key bytes of `whsec_` + base64; raises ConfigError naming only the line."""
    with suppress(binascii.Error):
        key = base64.b64decode(token.removeprefix(b"whsec_"), validate=True)
        if token.startswith(b"whsec_") and len(key) == KEY_BYTES:
            return key
    fault = f"is not whsec_ and the base64 of {KEY_BYTES} bytes"
    raise ConfigError([f"secret file {SIGNING_TOKENS}, line {line}: {fault}"])


SHORTEST_MASKED = 4  # characters; shorter secrets occur in innocent words
# Repetitions in these expressions are bounded, lazy or possessive, so that searching a log takes
# time in proportion to its length, whatever is in it.
TOKEN_PREFIXES = (
    *("glpat-", "glptt-", "gldt-", "glrt-", "glcbt-", "glft-", "glimt-", "glsoat-", "glagent-"),
    *("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "dckr_pat_", "sk_live_", "rk_live_"),
    *("xoxa-", "xoxb-", "xoxe-", "xoxp-", "xoxr-", "xoxs-", "whsec_"),
)
KEYS = "(?:access|account|api|deploy|encryption|master|private|signing|ssh)[_-]?key"
WORDS = f"passw(?:or)?d|passphrase|secret|token|{KEYS}"
# Names of variables whose values are secrets: those words, and DB_PASS, DB_KEY_2 and pwd; but not
# bypass, monkey, keys, or the shell's PWD=/a/path.
SECRET_NAME = re.compile(
    rf"(?i:(?:{WORDS})[\w-]{{0,30}}"
    r"|(?:_key|[_-]pass|(?!(?-i:(?:(?<![A-Z_])|(?<=OLD))PWD=/))pwd)(?![a-z])[\w-]{0,30})"
)
# Words after such a name that show it to be prose: "password is required", "--token or a file".
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
# A private key is masked up to its last line, or to the end of the text where that is cut off;
# where its first line is cut off, from the first character that could be a part of it.
PEM_WORDS = "[A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
PEM = re.compile(
    rf"-----BEGIN {PEM_WORDS}[\s\S]*?(?:-----END {PEM_WORDS}|(?=-----)|\Z)"
    rf"|(?<![\w+/=\s\\])[\w+/=\s\\]*+-----END {PEM_WORDS}"
)
# Every text that those expressions match contains one of these; this search is ten times as fast.
SECRET_HINTS = ["://", "akia", "asia", "eyj", "bearer", "basic", "passw", "passphrase", "pwd"]
SECRET_HINTS += ["secret", "token", "key", "_pass", "-pass", *TOKEN_PREFIXES]


def secret_words(lines: Iterable[str]) -> list[str]:
    """Return what must not be shown, longest first: secrets, and the passwords in their URLs."""
    words = {*lines}
    users = [user for line in words for user in re.findall(r"://([^/\s]+)@", line)]
    passwords = {user.rpartition(":")[2] for user in users}
    passwords |= {user.partition(":")[2] for user in users}  # a password may have a colon
    plain = {unquote(password) for password in passwords}
    words |= passwords | plain | {quote(password, safe="") for password in plain}
    return sorted((w for w in words if len(w) >= SHORTEST_MASKED), key=len, reverse=True)


def mask_value(value: Any, words: Sequence[str]) -> Any:
    """Return a JSON value whose texts have neither these words nor what looks like a secret."""
    if isinstance(value, dict):
        # the name of an environment variable tells whether its value is a secret
        hidden = "value" if SECRET_NAME.search(str(value.get("name", ""))) else None
        return {str(k): "***" if k == hidden else mask_value(v, words) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [mask_value(element, words) for element in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    for word in words:
        text = text.replace(word, "***")
    lower = text.lower()
    if not any(hint in lower for hint in SECRET_HINTS):
        return text
    return SECRET.sub(r"\1***", PEM.sub("***", text))


# === logging ======================================================================================

LOG = logging.getLogger("gitops_hook")
LOG_FIRST = ("run", "app", "environment", "delivery")  # fields that stand before all others


def setup_logging(mask: Callable[[Object], Object]) -> None:
    """Send every log record of the program to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(mask))
    logging.root.handlers = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns of every burst
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # what it warns of is reported here
    LOG.setLevel(logging.INFO)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, msg, run, app, environment, delivery, then the rest."""

    def __init__(self, mask: Callable[[Object], Object]) -> None:
        super().__init__()
        self.mask = mask

    def format(self, record: logging.LogRecord) -> str:
        """Return the line for one record: fields without a value left out, secrets masked."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: Object = {"ts": f"{stamp}.{int(record.msecs):03d}Z"}
        line |= {"level": record.levelname.lower(), "msg": record.getMessage()}
        values: Object = getattr(record, "fields", {})
        for key in (*LOG_FIRST, *values):
            if values.get(key) not in (None, ""):
                line.setdefault(key, values[key])
        if record.exc_info:
            line["exc"] = "".join(traceback.format_exception(*record.exc_info))[-4000:]
        return json.dumps(self.mask(line))


def info(msg: str, **values: Any) -> None:
    """Log something that happened as it should: msg is constant, values go in fields."""
    LOG.info(msg, extra={"fields": values})


def warn(msg: str, **values: Any) -> None:
    """Log something that will be tried again."""
    LOG.warning(msg, extra={"fields": values})


def error(msg: str, **values: Any) -> None:
    """Log something that a person must look at; exc=True adds the traceback being handled."""
    exc = values.pop("exc", False)
    LOG.error(msg, extra={"fields": values}, exc_info=exc)


# === metrics ======================================================================================

# The parts of the daemon in which errors are counted.
ERRORS = (
    *("companions", "controller", "events", "heads", "intake", "measurements", "request"),
    *("reader", "restore", "secrets", "selector", "service", "statuses", "watch", "worker"),
)
SINKS = ("events", "logs", "statuses")  # where reports go that may fail
STAGE_BUCKETS = (0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600)  # seconds


class Metrics:
    """Every metric of the daemon, in a registry of its own; labels hold words of ours only."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        ours: Object = {"namespace": "gitops_hook", "registry": self.registry}
        counter: Any = partial(prometheus_client.Counter, **ours)
        gauge: Any = partial(prometheus_client.Gauge, **ours)
        histogram: Any = partial(prometheus_client.Histogram, buckets=STAGE_BUCKETS, **ours)
        where = ("app", "environment")
        self.deliveries = counter("deliveries", "Requests to /webhook.", ["result"])
        self.runs = counter("runs", "Runs that have ended.", ["app", "outcome", "stage", "reason"])
        self.switches = counter("switches", "Switches of live traffic.", [*where, "direction"])
        self.kubectl = counter("kubectl_calls", "Ended kubectl processes.", ["verb", "result"])
        self.errors = counter("errors", "Errors that a person should look at.", ["where"])
        self.drift = counter("selector_drift", "Live Services changed by someone else.", where)
        self.catch_up = counter("catch_up_runs", "Runs that GitLab did not announce.", ["app"])
        self.statuses = counter("statuses", "Commit statuses for GitLab.", ["result"])
        self.spool = gauge("spool_files", "Pushes stored on disk that are not in the cluster yet.")
        self.waiting = gauge("waiting", "1 while the daemon waits for it, otherwise 0.", ["what"])
        self.queue = gauge("jobs", "Jobs that have not ended.", ["state"])
        self.queue_wait = gauge(
            "queue_wait_seconds", "For how long the run waits that waits longest.", ["reason"]
        )
        self.endpoints = gauge("live_endpoints", "Ready endpoints of the live Service.", where)
        self.rollback_ready = gauge(
            "rollback_ready", "1 if all pods kept of the rollback's target are ready, or 0.", where
        )
        self.last_success = gauge(
            "last_success_timestamp_seconds", "When the newest confirmed version went live.", where
        )
        self.reports_failed = counter("reports_failed", "Reports that failed.", ["sink"])
        stage = ("app", "stage", "result")
        self.stage_seconds = histogram("stage_seconds", "Seconds that stages took.", stage)

    def begin(self, apps: Iterable[App]) -> None:
        """Start the counters whose labels are known at 0: the first event shows as an increase."""
        for where in ERRORS:
            self.errors.labels(where)
        for result in ("sent", "unchanged", *Obstacle):
            self.statuses.labels(str(result))
        for sink in SINKS:
            self.reports_failed.labels(sink)
        for app in apps:
            self.catch_up.labels(app.name)
            for environment in app.deploy.environments:
                self.drift.labels(app.name, environment)
                for direction in ("forward", "back", "rollback"):
                    self.switches.labels(app.name, environment, direction)


# === signatures ===================================================================================

NEEDED_HEADERS = {  # by what webhook.verify requires
    "signature": ("webhook-id", "webhook-timestamp", "webhook-signature"),
    "token": ("x-gitlab-token",),
    "hmac": ("x-gitlab-token",),
}


def verify_delivery(
    mode: str, keys: Sequence[bytes], headers: Mapping[str, str], body: bytes, now: float
) -> None:
    """Check that a delivery is authentic; raises DeliveryError 401, which says what was wrong.

    Exactly the configured mode counts, there is no fallback. Header names are lower case.
    """
    names = NEEDED_HEADERS[mode]
    # WSGI hands the bytes of headers over as latin-1 text (PEP 3333)
    values = [headers.get(name, "").encode("latin-1", "replace") for name in names]
    if not all(values):
        raise DeliveryError(401, "NotAuthentic", f"{', '.join(names)}: required")
    if mode == "signature":
        message_id, stamp, signatures = values
        offered = signatures.split(b" ")[:20]
        expected = [sign(key, message_id, stamp, body) for key in keys]
    else:
        offered = values
        expected = [hex_hmac(key, body) for key in keys] if mode == "hmac" else [*keys]
    # compared as hashes of one length: the time that it takes tells nothing about a secret
    digests = [hashlib.sha256(value).digest() for value in offered]
    wanted = [hashlib.sha256(value).digest() for value in expected]
    if not any(hmac.compare_digest(one, other) for one in digests for other in wanted):
        raise DeliveryError(401, "NotAuthentic", f"{names[-1]} does not match")
    if mode == "signature":
        number = re.fullmatch(rb"[0-9]{1,12}", stamp)
        if not number or abs(now - int(stamp)) > SIGNATURE_TOLERANCE:
            raise DeliveryError(401, "NotAuthentic", "webhook-timestamp is not a recent Unix time")


def sign(key: bytes, message_id: bytes, stamp: bytes, body: bytes) -> bytes:
    """Return the webhook-signature that GitLab would send: Standard Webhooks v1, HMAC-SHA256.

    https://docs.gitlab.com/user/project/integrations/webhooks/ and
    https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
    """
    signed = b".".join((message_id, stamp, body))
    return b"v1," + base64.b64encode(hmac.digest(key, signed, "sha256"))


def hex_hmac(key: bytes, body: bytes) -> bytes:
    """Return the hex HMAC-SHA256 of a body, as relays send it that sign for old GitLab servers."""
    return hmac.digest(key, body, "sha256").hex().encode()


# === pushes =======================================================================================

REF_LENGTH = 500  # characters; a file name holds 255 bytes between two slashes
ID_DIGITS = (10, 16, 4)  # of the hash in a run's id: usual, after a collision, of version 0.1
ADDRESS_LENGTH = 2048  # characters; longer URLs are refused, because urlsplit caches what it parses
FORBIDDEN_IN_REFS = re.compile(  # https://git-scm.com/docs/git-check-ref-format
    r"[\x00-\x20~^:?*\[\\\x7f]|\.\.|@\{|\.\Z|(\A|/)(\.|/|\Z)|\.lock(/|\Z)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One commit of one ref of one app, and what is known of the push that brought it."""

    id: str
    app: str
    ref: str
    commit: str
    before: str = ""  # the commit that the ref had before the push
    title: str = ""
    by: str = ""  # who pushed it, or let it run again
    delivery: str = ""
    received: float = 0.0  # seconds since the epoch

    @property
    def branch(self) -> str:
        """The ref without refs/heads/, slashes and all."""
        return self.ref.removeprefix("refs/heads/")


def parse_delivery(config: Config, body: bytes, **details: Any) -> list[Run]:
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
        details["before"] = before
    details["title"] = commit_title(data.get("commits"), commit)
    details["by"] = pusher(data)
    addresses = project_addresses(data)
    apps = [app for app in config.apps if normalise_url(app.repository) in addresses]
    if not apps:
        listed = " ".join(sorted(addresses))
        deny(200, "UnknownProject", f"no app has the repository {clip(listed)}")
    runs = [run for app in apps if (run := run_of(app, ref, commit, **details))]
    return runs or deny(200, "OtherBranch", f"no app tests or deploys {clip(ref)}")


def pushed_branch(data: Mapping[str, Any]) -> tuple[str, str]:
    """Return the ref and the commit that was pushed to it; DeliveryError where it is no branch.

    The body decides what it is, never the X-Gitlab-Event header: old servers send samples whose
    header and body disagree. Of system hooks, some have only `event_name`.
    """
    key = next((k for k in ("object_kind", "event_name") if k in data), "object_kind")
    kind = field_of(data, key, str)
    if kind != "push":
        deny(200, "TagPush" if kind == "tag_push" else "OtherEvent", "only pushes start a run")
    ref = field_of(data, "ref", str)
    commit = field_of(data, "after", str)
    if not ref.startswith("refs/heads/"):
        deny(200, "TagPush" if ref.startswith("refs/tags/") else "OtherRef", "it is not a branch")
    if not SHA.fullmatch(commit):
        deny(400, "Malformed", "after: not a full commit id")
    if set(commit) == {"0"}:
        deny(200, "RefDeleted", "the branch was deleted")
    if FORBIDDEN_IN_REFS.search(ref):
        deny(400, "Malformed", "ref: not a branch name that git allows")
    if not valid_ref(ref):
        deny(200, "OtherRef", "the name of the branch is too long, not UTF-8, or has control codes")
    return ref, commit


def commit_title(commits: Any, commit: str) -> str:
    """Return the first line of a commit's message where the payload has it, clipped."""
    listed = (c for c in commits if isinstance(c, dict)) if isinstance(commits, list) else ()
    message = next((c.get("message") for c in listed if c.get("id") == commit), "")
    return clip(message.lstrip()[:1000].partition("\n")[0], 120) if isinstance(message, str) else ""


def pusher(data: Mapping[str, Any]) -> str:
    """Return who pushed, by the name of the account; "" where the payload does not say it."""
    names = (data.get(key) for key in ("user_username", "user_name"))
    return next((clip(name[:1000], 100) for name in names if isinstance(name, str) and name), "")


def project_addresses(data: Mapping[str, Any]) -> set[str]:
    """Return every address by which a payload names its project; a 400 when there is none."""
    keys = ("git_http_url", "git_ssh_url", "web_url")
    project = field_of(data, "project", dict)
    urls = [url for key in keys if isinstance(url := project.get(key), str)]
    if any(len(url) > ADDRESS_LENGTH for url in urls):
        deny(400, "Malformed", f"project: an address is longer than {ADDRESS_LENGTH} characters")
    addresses = {address for url in urls if (address := normalise_url(url))}
    return addresses or deny(400, "Malformed", f"project: names no {', '.join(keys)}")


def normalise_url(url: str) -> str:
    """Return `host/path` of a repository, the same for all its URLs; "" if a text is no URL.

    Scheme, user, port, case and `.git` do not count; `git@host:path` is read as ssh. A local path
    has no host, and its case counts.
    """
    if not url.startswith("/") and "://" not in url:
        url = "ssh://" + url.replace(":", "/", 1)
    with suppress(ValueError):
        split = urlsplit(url)
        host = split.hostname or ""
        path = split.path.strip("/").removesuffix(".git").strip("/")
        if path and (host or split.scheme in ("", "file")):
            return f"{host}/{path.casefold() if host else path}"
    return ""


def run_of(app: App, ref: str, commit: str, **details: Any) -> Run | None:
    """Return an app's run of a commit, None if the app neither tests nor deploys the branch."""
    run = Run(id=run_id(app.name, ref, commit), app=app.name, ref=ref, commit=commit, **details)
    wanted = any(fnmatchcase(run.branch, p) for p in (app.branch, *app.test_branches))
    return run if wanted else None


def run_id(app: str, ref: str, commit: str, digits: int = ID_DIGITS[0]) -> str:
    """Return the id of a run: the same push always has the same one."""
    digest = hashlib.sha256(f"{ref} {commit}".encode()).hexdigest()
    return f"{app}-{commit[:8]}-{digest[:digits]}"


def run_ids(app: str, ref: str, commit: str) -> list[str]:
    """Return every id that a run may have, the usual one first."""
    return [run_id(app, ref, commit, digits) for digits in ID_DIGITS]


def valid_ref(ref: str) -> bool:
    """Whether git allows a ref name, and it is short, UTF-8 and one line for whoever reads it."""
    odd = re.search(r"[\x80-\x9f\u2028\u2029\ud800-\udfff]", ref)
    return len(ref) <= REF_LENGTH and not (odd or FORBIDDEN_IN_REFS.search(ref))


def field_of(data: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """Return a field of a payload; a 400 that names it when it is missing or of another type."""
    value = data.get(key)
    if not isinstance(value, kind):
        deny(400, "Malformed", f"{key}: {'missing' if value is None else f'not a {kind.__name__}'}")
    return value


def deny(status: int, code: str, text: str) -> NoReturn:
    """End a request early; with a 200 where nothing is wrong, or GitLab switches the hook off."""
    raise DeliveryError(status, code, text)


# === spool ========================================================================================

SPOOL_RECORD = 16384  # bytes of a stored push at most; the spool holds limits.spool_files of them
ACCEPTED_LINE = re.compile(rb"([0-9]{1,12}\.[0-9]{3}) ([0-9a-f]{64})")


class StoredPush(typing.NamedTuple):
    """A run in the spool, and the file in which it is."""

    path: Path
    run: Run


class Spool:
    """Accepted pushes on disk, one file a run, until the cluster has them.

    Threads may share it. Files that are not stored pushes are moved to `bad/`, never deleted.
    """

    def __init__(self, directory: Path, max_files: int) -> None:
        self.directory = directory
        self.max_files = max_files
        self.scratch = directory / "scratch"  # for files that need not outlive the process
        self.accepted = Accepted(directory / "accepted")
        self._lock = threading.Lock()
        self._folder = -1  # the descriptor by which the folder is synced
        # by file name, the app and the delivery of each push that is stored or being stored
        self._pushes: dict[str, tuple[str, str]] = {}
        self._of_apps: Counter[str] = Counter()  # how many of them each app has

    def __len__(self) -> int:
        return len(self._pushes)

    def prepare(self) -> None:
        """Create the folder, prove it writable, read what is stored; raises ConfigError."""
        try:
            (self.directory / "bad").mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.scratch, ignore_errors=True)  # what a killed daemon left
            self.scratch.mkdir(mode=0o700, exist_ok=True)
            self.probe()
            self._folder = os.open(self.directory, os.O_RDONLY)
            stored = self.read()
            self.accepted.load(push.run for push in stored)
        except OSError as refused:
            raise ConfigError([f"spool {self.directory}: {refused.strerror}"]) from refused
        for leftover in self.directory.glob("*.tmp"):
            self._set_aside(leftover, "half-written, its push was not accepted")
        self._pushes = {push.path.name: self._entry(push.run) for push in stored}
        self._of_apps = Counter(push.run.app for push in stored)

    def probe(self) -> None:
        """Prove that a file can be written; raises OSError."""
        with tempfile.TemporaryFile(dir=self.directory) as file:
            file.write(b"x")

    def store(self, runs: Sequence[Run], *, only_tested: bool = False) -> None:
        """Write the runs of one push durably, all or none; raises DeliveryError with why not.

        A tenth of the room is kept for pushes that are deployed. One app leaves a tenth to others,
        and half of it where its pushes are only tested. What the daemon itself stores always fits.
        """
        paths = {self.directory / f"{time.time_ns():020d}-{run.id}.json": run for run in runs}
        with self._lock:
            self._require_room(runs, only_tested=only_tested)
            self._pushes |= {path.name: self._entry(run) for path, run in paths.items()}
            self._of_apps.update(run.app for run in paths.values())
        try:
            for path, run in paths.items():
                record = {each.name: getattr(run, each.name) for each in fields(run)}
                write_durably(path, json.dumps(record).encode())
            os.fsync(self._folder)
        except OSError as refused:
            for path in paths:
                with suppress(OSError):
                    self.done(path)
                    Path(f"{path}.tmp").unlink(missing_ok=True)
            raise DeliveryError(503, "SpoolUnwritable", str(refused.strerror)) from refused
        self.accepted.add(runs)

    def _require_room(self, runs: Sequence[Run], *, only_tested: bool) -> None:
        if all(run.delivery in (CATCH_UP, NEXT_TRY) for run in runs):
            return  # it follows from what git says, so there is one at most of each app
        tenth = self.max_files // 10
        room = self.max_files - (tenth if only_tested else 0)
        share = math.ceil(room / 2) if only_tested else room - tenth
        if len(self) + len(runs) > room:
            deny(503, "SpoolFull", f"{len(self)} pushes are waiting already")
        for app, count in Counter(run.app for run in runs).items():
            waiting = self._of_apps[app]
            if waiting + count > share:
                deny(503, "SpoolFull", f"{waiting} pushes of {app} are waiting already")

    def _entry(self, run: Run) -> tuple[str, str]:
        return run.app, self.accepted.key(run)

    def read(self) -> list[StoredPush]:
        """Return everything stored, oldest first."""
        pushes: list[StoredPush] = []
        unread: list[str] = []
        for path in sorted(self.directory.glob("*.json")):
            try:
                pushes.append(StoredPush(path, parse_run(read_plain(path))))
            except FileNotFoundError:
                continue
            except ValueError as wrong:
                self._set_aside(path, str(wrong))
            except OSError as refused:
                unread.append(f"{path.name}: {refused.strerror}")
        if unread:  # one line for all of them: no file can be opened when descriptors run out
            error("spool files cannot be read", count=len(unread), detail=unread[0])
        return pushes

    def _set_aside(self, path: Path, why: str) -> None:
        error("spool file moved to folder bad", file=clip(path.name), detail=clip(why))
        with suppress(OSError):
            path.rename(self.directory / "bad" / path.name)

    def done(self, path: Path) -> None:
        """Remove a push that needs nothing more; raises OSError, and then it is still stored."""
        self.accepted.write(self._pushes.get(path.name, ("", ""))[1])
        try:
            path.unlink(missing_ok=True)
        finally:
            if not os.path.lexists(path):
                with self._lock:
                    if gone := self._pushes.pop(path.name, None):
                        self._of_apps[gone[0]] -= 1


class Accepted:
    """Which pushes of which deliveries were accepted lately, also before a restart.

    A stored push itself says of which delivery it is. When it is removed a line in a file says so,
    which is not synced: only the loss of the machine loses it. Ids of senders are hashed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.times: OrderedDict[str, float] = OrderedDict()  # when by key, the oldest first
        self.handle = -1  # the descriptor by which lines are appended to the file
        self._lines = 0  # in the file
        self._lock = threading.Lock()

    @staticmethod
    def key(run: Run) -> str:
        """Return the hash of a delivery and one of its runs, "" for a delivery without an id."""
        text = f"{run.delivery}\n{run.id}".encode(errors="replace")
        return hashlib.sha256(text).hexdigest() if run.delivery else ""

    def load(self, stored: Iterable[Run]) -> None:
        """Remember what the file and the stored pushes say; raises OSError."""
        with suppress(FileNotFoundError):
            # not blocking: a pipe in the place of the file must not hold the program up
            with os.fdopen(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                lines = file.read(200 * DEDUPE_ENTRIES).split(b"\n")
            for match in filter(None, map(ACCEPTED_LINE.fullmatch, lines)):
                key = match[2].decode()
                self.times.pop(key, None)  # its newest line counts, also for its age
                self.times[key] = float(match[1])
        self.add(stored)
        self._rewrite()

    def has(self, run: Run) -> bool:
        """Whether this push of this delivery was accepted before."""
        at = self.times.get(self.key(run), -math.inf)
        return abs(run.received - at) <= DEDUPE_SECONDS

    def add(self, runs: Iterable[Run]) -> None:
        """Remember pushes that are stored, and forget the oldest."""
        with self._lock:
            for run in (run for run in runs if run.delivery):
                self.times[self.key(run)] = run.received
                self.times.move_to_end(self.key(run))
            while len(self.times) > DEDUPE_ENTRIES:
                self.times.popitem(last=False)

    def write(self, key: str) -> None:
        """Write down a push that is not stored any more; the file is bounded as well."""
        with self._lock:
            if at := self.times.get(key):
                try:
                    # the newline comes first, so that a line cut off by a full disk spoils no other
                    os.write(self.handle, f"\n{at:.3f} {key}".encode())
                    self._lines += 1
                    if self._lines > 2 * DEDUPE_ENTRIES:
                        self._rewrite()
                except OSError as refused:
                    warn("accepted delivery cannot be written down", detail=refused.strerror)

    def _rewrite(self) -> None:
        """Replace the file by one with just what is remembered; raises OSError."""
        part = Path(f"{self.path}.new")
        part.write_text("".join(f"\n{at:.3f} {key}" for key, at in self.times.items()))
        # opened before the old one is closed, whose number could be another file's by the next line
        handle = os.open(part, os.O_WRONLY | os.O_APPEND)
        try:
            part.replace(self.path)
        except OSError:
            os.close(handle)
            raise
        if self.handle >= 0:
            os.close(self.handle)
        self.handle = handle
        self._lines = len(self.times)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file under another name, sync it and give it its name; raises OSError.

    The answer to a push waits for this, and a file object would take three calls more.
    """
    part = Path(f"{path}.tmp")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        while content:
            content = content[os.write(handle, content) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    part.rename(path)


def read_plain(path: Path) -> bytes:
    """Return what a stored push may hold; ValueError for a link, a pipe, a folder or the like."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a plain file")
    size = min(status.st_size, SPOOL_RECORD + 1)
    content = b""
    # not blocking: what has taken the file's place since must not hold the program up either
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        # a failing disk gives what it has read first, and its error only at the next call
        while len(content) < size and (part := os.read(handle, size - len(content))):
            content += part
    finally:
        os.close(handle)
    return content


def parse_run(content: bytes) -> Run:
    """Return the run in a spool file; raises ValueError for anything that is not one."""
    try:
        record = json.loads(content)
        run = Run(**record)
    except (TypeError, RecursionError) as wrong:
        raise ValueError("not a stored push") from wrong
    if any(type(record[n]) is not (float if n == "received" else str) for n in record):
        raise ValueError("a field has another type")
    named = run.id in run_ids(run.app, run.ref, run.commit) and DNS_LABEL.fullmatch(run.id)
    pushed = SHA.fullmatch(run.commit) and valid_ref(run.ref) and math.isfinite(run.received)
    if not (named and pushed):
        raise ValueError("not a commit of a branch by its id")
    return run


# === kubectl ======================================================================================

OUTPUT_BYTES = 16 * 2**20  # of one call, or of one line of a watch; parsing takes five times that
STDERR_BYTES = 2**20
API_PATHS = {  # of what is listed in pages, or followed
    "configmaps": "/api/v1",
    "deployments": "/apis/apps/v1",
    "endpointslices": "/apis/discovery.k8s.io/v1",
    "jobs": "/apis/batch/v1",
    "pods": "/api/v1",
    "replicasets": "/apis/apps/v1",
    "services": "/api/v1",
}
PLURALS = {
    ("api/v1", "ConfigMap"): "configmaps",
    ("api/v1", "Service"): "services",
    ("apis/autoscaling/v2", "HorizontalPodAutoscaler"): "horizontalpodautoscalers",
    ("apis/batch/v1", "CronJob"): "cronjobs",
    ("apis/policy/v1", "PodDisruptionBudget"): "poddisruptionbudgets",
}
PAGE_SIZE = 100  # objects in one answer: a thousand Jobs at once are 50 MB of Python
PAGE_BYTES = 4 * 2**20  # of one answer; a page that is larger is asked for in halves
# What is kept of each pod of a list: pushed code says how large the rest is.
POD_METADATA = ("name", "resourceVersion", "labels", "creationTimestamp", "deletionTimestamp")
POD_CONTAINER = ("name", "restartPolicy", "ports", "readinessProbe")
LOG_READ = 500 * 16 * 1024  # all of 500 lines, since container runtimes cut lines at 16 KiB
MEMORY_BYTES = 160 * 2**20  # of a program: the largest kustomization that is read takes 130 MB
# A constant script: it sets the limits before the program begins, and for all that it starts.
# `preexec_fn` is not safe beside threads, and prlimit(2) may come too late. Never the address space
# (RLIMIT_AS), of which a Go program reserves more than it uses.
WITH_LIMITS = ("/bin/sh", "-c", 'ulimit -d "$1"; ulimit -f "$2"; shift 2; exec "$@"', "sh")

SYSTEM_FOLDERS = ("/bin", "/lib", "/lib64", "/usr")  # where a shell and its libraries are
# By machine: the number that the kernel has for it, and its number of socket(2).
SOCKET_CALLS = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
# The operations of a filter of system calls: on one word of a call, and how it ends.
BPF_LOAD = 0x20
BPF_EQUAL = 0x15
BPF_AT_LEAST = 0x35
BPF_RETURN = 0x06


class Kubectl:
    """Every call of the cluster is a kubectl process that is started here.

    Without `--request-timeout`, with which kubectl in a pod does not use the pod's account
    (kubernetes#93474): a call that does not end in time is killed here.
    """

    def __init__(self, metrics: Metrics, at_once: int = 8, program: str = "kubectl") -> None:
        self.program = program
        self.metrics = metrics
        self.at_once = at_once
        self._slots = threading.BoundedSemaphore(at_once)

    def run(
        self,
        *args: str,
        namespace: str = "",
        stdin: str = "",
        timeout: float = KUBECTL_TIMEOUT,
        most: int = OUTPUT_BYTES,
    ) -> str:
        """Return what one call prints; raises KubectlError, after a time-out of unknown effect."""
        with self._slots:
            return self._call(args, namespace, stdin, timeout, most)

    def _call(
        self, args: Sequence[str], namespace: str, stdin: str, timeout: float, most: int
    ) -> str:
        """Return what one call prints; the caller holds a slot."""
        argv = (self.program, "-n", namespace, *args)
        finished = run_program(argv, timeout, stdin, file_bytes=most)
        stdout = finished.stdout.decode(errors="replace")
        if finished.code == 0:
            self.metrics.kubectl.labels(args[0], "ok").inc()
            return stdout
        stderr = finished.stderr.decode(errors="replace")
        failure = KubectlError([self.program, *args], finished.code, stderr, stdout)
        self.metrics.kubectl.labels(args[0], failure.kind).inc()
        raise failure

    def stream(self, *args: str, namespace: str) -> subprocess.Popen[bytes]:
        """Start a call that goes on, such as a watch or a rollout status. The caller ends it."""
        return start_program((self.program, "-n", namespace, *args))

    def get(self, resource: str, name: str, namespace: str) -> Object | None:
        """Return one object, or None when there is none."""
        args = ("get", f"{resource}/{name}", "-o", "json", "--ignore-not-found")
        printed = self.run(*args, namespace=namespace).strip()
        return dict(json.loads(printed)) if printed else None

    def get_each(self, namespace: str, *references: str) -> Sequence[Object | None]:
        """Return objects such as "service/shop" in this order by one call; None: there is none."""
        args = ("get", *references, "-o", "json", "--ignore-not-found")
        items = printed_objects(self.run(*args, namespace=namespace))
        by_reference = {f"{o['kind'].lower()}/{o['metadata']['name']}": o for o in items}
        return [by_reference.get(reference) for reference in references]

    def list(
        self, resource: str, namespace: str, *filters: str, timeout: float = KUBECTL_TIMEOUT
    ) -> list[Object]:
        """Return the objects that match, e.g. `-l`, "a=b" or `--field-selector`, "a=b".

        Pods have only what is looked at. Raises KubectlError, also where more is left than a call
        may print.
        """
        if filters[:1] != ("-l",) or resource not in API_PATHS:
            args = ("get", resource, *filters, "-o", "json")
            return [*json.loads(self.run(*args, namespace=namespace, timeout=timeout))["items"]]
        address = list_address(resource, namespace, filters[1])
        items: list[Object] = []
        size = 0
        for page in self.pages(address, namespace, timeout):
            for item in page["items"]:
                kept = pod_essentials(item) if resource == "pods" else item
                size += len(json.dumps(kept))
                if size > OUTPUT_BYTES:
                    why = f"the {resource} of {namespace} are more than {OUTPUT_BYTES >> 10} KiB"
                    raise KubectlError([self.program, "get", resource], 1, why)
                items.append(kept)
        return items

    def pages(
        self, address: str, namespace: str, timeout: float = KUBECTL_TIMEOUT
    ) -> Iterator[Object]:
        """Yield the lists of which a long list consists, as the API server sends them.

        Their items have kind and apiVersion. Where objects are so large that a page of them would
        be, the pages have fewer.
        """
        token: str | None = ""
        limit = PAGE_SIZE
        while token is not None:
            args = ("get", "--raw", f"{address}&limit={limit}&continue={token}")
            most = PAGE_BYTES if limit > 1 else OUTPUT_BYTES
            try:
                printed = self.run(*args, namespace=namespace, timeout=timeout, most=most)
            except KubectlError as failure:
                if failure.code != -signal.SIGXFSZ or limit == 1:
                    raise
                limit //= 2
                continue
            page = json.loads(printed)
            kind = str(page.get("kind")).removesuffix("List")
            types = {"kind": kind, "apiVersion": page.get("apiVersion")}
            yield {**page, "items": [{**types, **item} for item in page["items"]]}
            token = (page.get("metadata") or {}).get("continue") or None

    def names(self, resource: str, namespace: str, labels: str) -> Sequence[str]:
        """Return the names of what has these labels; as a table, in which there is no content."""
        args = ("get", resource, "-l", labels, "--no-headers")
        rows = self.run(*args, namespace=namespace).split("\n")
        return [row.partition(" ")[0] for row in rows if row]

    def create(self, objects: Sequence[Object], namespace: str) -> None:
        """Create what is not there yet; an object that exists by the same name stays as it is."""
        for refusal in self.create_each(objects, namespace).values():
            if refusal.kind != "AlreadyExists":
                raise refusal

    def create_each(self, objects: Sequence[Object], namespace: str) -> dict[str, KubectlError]:
        """Create objects in one call; return the refusal of each that was not created, by name.

        Exit 1 does not mean that nothing happened: kubectl creates what it can, and names what
        exists. The others are tried again, one at a time. Raises the KubectlError that is no
        object's own fault.
        """
        stdin = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        args = ("create", "-f", "-", "-o", "name", "--validate=false")
        try:
            self.run(*args, namespace=namespace, stdin=stdin, timeout=2 * KUBECTL_TIMEOUT)
        except KubectlError as failure:
            if failure.kind in ("Unreachable", "Forbidden", "NotFound"):
                raise
            by_name = {item["metadata"]["name"]: item for item in objects}
            if len(by_name) == 1:
                return dict.fromkeys(by_name, failure)
            exists = r'(?m)^Error from server \(AlreadyExists\): .*"([^"\n]+)" already exists$'
            refusals = {
                match[1]: KubectlError([self.program, *args], 1, match[0])
                for match in re.finditer(exists, failure.stderr)
                if match[1] in by_name
            }
            created = {line.rpartition("/")[2] for line in failure.stdout.split("\n")}
            for name, item in by_name.items():
                if name not in created and name not in refusals:
                    refusals |= self.create_each([item], namespace)
            return refusals
        return {}

    def read(self, objects: Sequence[Object], namespace: str) -> Sequence[Object]:
        """Return which objects of an apiVersion, kind and name are there, in order, by one call."""
        stdin = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        args = ("get", "-f", "-", "-o", "json", "--ignore-not-found")
        return printed_objects(self.run(*args, namespace=namespace, stdin=stdin))

    def write(self, verb: str, objects: Sequence[Object], namespace: str, *options: str) -> None:
        """Create or replace whole objects of any kinds in one call, as many as can be.

        Those with a resourceVersion are replaced only as they were read. Raises KubectlError that
        names the refused ones.
        """
        stdin = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
        args = (verb, "-f", "-", "-o", "name", *options)
        self.run(*args, namespace=namespace, stdin=stdin, timeout=2 * KUBECTL_TIMEOUT)

    def plural(self, api: str, kind: str) -> str:
        """Return the resource of a kind as addresses name it; raises HookError where it is not."""
        if plural := PLURALS.get((api, kind)):
            return plural
        answer = json.loads(self.run("get", "--raw", f"/{api}"))
        names = [r["name"] for r in answer["resources"] if r.get("kind") == kind]
        if not names:
            raise HookError(f"the cluster has no {kind} in {api}")
        return str(min(names, key=len))  # the others are its parts, as in `ingresses/status`

    def put(self, wanted: Object, current: Object | None, namespace: str, *options: str) -> str:
        """Write a whole object in the place of exactly the one that was read, or of none.

        The server refuses unknown fields, and what was changed or created since (Conflict,
        AlreadyExists).
        """
        version = {"resourceVersion": current["metadata"]["resourceVersion"]} if current else {}
        stdin = json.dumps({**wanted, "metadata": {**wanted["metadata"], **version}})
        verb = "replace" if current else "create"
        return self.run(verb, "-f", "-", *options, namespace=namespace, stdin=stdin)

    def patch(
        self, resource: str, name: str, namespace: str, change: Object, *options: str
    ) -> Object:
        """Merge a change into an object, return it; with a resourceVersion it compares and sets."""
        # by stdin: one argument may not be larger than 128 KiB
        args = ("patch", f"{resource}/{name}", "--type=merge", "--patch-file=/dev/stdin", "-o=json")
        stdin = json.dumps(change)
        return dict(json.loads(self.run(*args, *options, namespace=namespace, stdin=stdin)))

    def delete(self, resource: str, names: Iterable[str], namespace: str) -> None:
        """Delete objects by name without waiting; a name that does not exist is no error."""
        if listed := [f"{resource}/{n}" for n in sorted(names)]:
            self.run("delete", *listed, "--wait=false", "--ignore-not-found", namespace=namespace)

    def delete_exactly(
        self, api: str, resource: str, current: Object, policy: str = "Background"
    ) -> None:
        """Delete an object if nobody has changed it since it was read.

        What it owns goes, too, or stays by the policy Orphan.
        """
        meta = current["metadata"]
        exactly = {key: meta[key] for key in ("uid", "resourceVersion")}
        options = {"propagationPolicy": policy, "preconditions": exactly}
        address = f"/{api}/namespaces/{meta['namespace']}/{resource}/{meta['name']}"
        args = ("delete", "--raw", address, "-f", "-")
        self.run(*args, namespace=meta["namespace"], stdin=json.dumps(options))

    def logs(self, pod: str, container: str, namespace: str, *, previous: bool = False) -> str:
        """Return the last log lines of a container, of its run before this one first if asked.

        Where that life printed nothing, it is those of the other one, else an empty text.
        """
        args = ("logs", pod, "-c", container, "--tail=500", f"--limit-bytes={LOG_READ}")
        for option in sorted([(), ("--previous",)], reverse=previous):
            with suppress(KubectlError):
                if printed := self.run(*args, *option, namespace=namespace, timeout=10.0).strip():
                    return printed[-2 * LOG_BYTES :]
        return ""

    def with_own_slot(self) -> Kubectl:
        """Return a copy that runs one process at a time, beside the slots that all others share."""
        other = copy.copy(self)
        other._slots = threading.BoundedSemaphore(1)
        return other


class UrgentKubectl(Kubectl):
    """kubectl with slots of its own, for what cannot wait: to see health, and to switch traffic.

    A call without an answer is repeated beside the one that hangs, and the first answer counts.
    Use it only for reading, and for writes that compare and set, or that may be made twice.
    """

    REPEAT_SECONDS = 1.5  # a busy machine needs as long for an answer
    FIRST_SECONDS = 10.0  # the time limit of the first process of a call
    REPEATED_SECONDS = 4.0  # and of those after it

    def run(
        self,
        *args: str,
        namespace: str = "",
        stdin: str = "",
        timeout: float = KUBECTL_TIMEOUT,
        most: int = OUTPUT_BYTES,
    ) -> str:
        """Return what the first process prints that ends; raises KubectlError, ConfigError."""
        answers: queue.SimpleQueue[str | HookError] = queue.SimpleQueue()
        answered = threading.Event()
        until = time.monotonic() + timeout

        def attempt(seconds: float) -> None:
            """Run one process, if a slot becomes free while an answer is still wanted."""
            if not self._slots.acquire(timeout=seconds):
                return
            try:
                if not answered.is_set():
                    answers.put(self._call(args, namespace, stdin, seconds, most))
            except HookError as failure:
                answers.put(failure)
            finally:
                self._slots.release()

        limit = self.FIRST_SECONDS
        try:
            while (left := until - time.monotonic()) > 0:
                threading.Thread(target=attempt, args=(min(left, limit),), daemon=True).start()
                limit = self.REPEATED_SECONDS
                with suppress(queue.Empty):
                    answer = answers.get(timeout=min(left, self.REPEAT_SECONDS))
                    if isinstance(answer, str):
                        return answer
                    if getattr(answer, "code", 0) is not None:  # None: only this process hung
                        raise answer
        finally:
            answered.set()
        raise KubectlError([self.program, *args], None, "")


def printed_objects(printed: str) -> list[Object]:
    """Return the objects that kubectl has printed as JSON: a list, one alone, or nothing."""
    answer = json.loads(printed) if printed.strip() else {"items": []}
    return [*answer["items"]] if answer.get("kind", "List") == "List" else [answer]


def pod_essentials(pod: Object) -> Object:
    """Return what is looked at in a pod of a list."""
    spec = pod.get("spec") or {}
    containers = {
        key: [{k: c[k] for k in POD_CONTAINER if k in c} for c in spec.get(key) or []]
        for key in ("containers", "initContainers")
    }
    meta = {key: pod["metadata"][key] for key in POD_METADATA if key in pod["metadata"]}
    return {"kind": "Pod", "metadata": meta, "spec": containers, "status": pod.get("status") or {}}


def list_address(resource: str, namespace: str, labels: str) -> str:
    """Return where the API server lists what has these labels."""
    path = f"{API_PATHS[resource]}/namespaces/{namespace}/{resource}"
    return f"{path}?labelSelector={quote(labels, safe='')}"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a program may take in all, and for how long it may do nothing; in seconds."""

    seconds: float
    silence: float = math.inf


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program ended: its exit code, None at the time limit, and what it printed."""

    code: int | None
    stdout: bytes
    stderr: bytes


def run_program(
    argv: Sequence[str],
    timeout: float | Patience,
    stdin: str = "",
    environ: Mapping[str, str] | None = None,
    file_bytes: int = OUTPUT_BYTES,
) -> Finished:
    """Run a program until it ends, or kill it with all that it started when its time is over.

    Its memory is limited, and the bytes that it prints or writes to one file. With file_bytes 0
    neither memory nor files are. Raises ConfigError when it cannot be started.
    """
    limits = (*WITH_LIMITS, f"{MEMORY_BYTES >> 10}", f"{file_bytes >> 9}") if file_bytes else ()
    most = min(file_bytes or OUTPUT_BYTES, OUTPUT_BYTES)
    with memory_file(stdin.encode()) as source, memory_file() as output:
        files = {"stdin": source, "stdout": output}
        finished = wait_for_end(
            start_program(argv, environ, limits, process_group=0, **files), timeout
        )
        if output.seek(0, os.SEEK_END) >= most:
            complaint = f"it printed more than {most >> 10} KiB"
            return Finished(-signal.SIGXFSZ, b"", complaint.encode())
        output.seek(0)
        return replace(finished, stdout=output.read())


def start_program(
    argv: Sequence[str],
    environ: Mapping[str, str] | None = None,
    limits: Sequence[str] = (),
    **how: Any,
) -> subprocess.Popen[bytes]:
    """Start a program without a shell; raises ConfigError when it cannot be started."""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    command = (*limits, program_path(argv[0]), *argv[1:])
    try:
        return subprocess.Popen(command, env=environ, **how)  # noqa: S603 - no shell
    except OSError as failure:
        raise ConfigError([f"{argv[0]} cannot be started: {failure.strerror}"]) from failure


def program_path(name: str) -> str:
    """Return where a program is: on the PATH, or beside the interpreter; raises ConfigError."""
    beside = str(Path(sys.executable).parent)  # where a virtual environment has kubectl
    if path := shutil.which(name) or shutil.which(name, path=beside):
        return path
    raise ConfigError([f"{name} cannot be started: {os.strerror(errno.ENOENT)}"])


def confined(action: Callable[[], T], readable: Iterable[str | Path]) -> T:
    """Run an action whose programs can reach neither the network nor most files; return its result.

    They open no connection, and no file but those in readable and the system's own. The action has
    a thread of its own: what the kernel closes to a thread, and to what that starts, stays closed.
    Raises ConfigError where the kernel does not close the network.
    """

    def run() -> T:
        """Close everything, then act."""
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            close_network(libc)
            close_files(libc, [*SYSTEM_FOLDERS, Path(sys.executable).parent, *readable])
        except (AttributeError, KeyError, OSError) as failure:
            advice = "Run this on Linux with seccomp, on x86_64 or aarch64."
            why = f"the system cannot close the network to kubectl: {failure}. {advice}"
            raise ConfigError([why]) from failure
        return action()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def close_network(libc: Any) -> None:
    """Refuse this thread, and what it starts, every socket but those of one machine.

    Raises OSError, AttributeError or KeyError where the system has no way to do it.
    """
    architecture, socket_call = SOCKET_CALLS[platform.machine()]
    program = (  # operation, steps to skip if true, steps to skip if false, value
        (BPF_LOAD, 0, 0, 4),
        (BPF_EQUAL, 0, 8, architecture),
        (BPF_LOAD, 0, 0, 0),
        (BPF_AT_LEAST, 6, 0, 0x40000000),  # another way of calling the kernel, with other numbers
        (BPF_EQUAL, 3, 0, 425),  # io_uring_setup, by which sockets can be opened too
        (BPF_EQUAL, 0, 3, socket_call),
        (BPF_LOAD, 0, 0, 16),
        (BPF_EQUAL, 1, 0, socket.AF_UNIX),
        (BPF_RETURN, 0, 0, 0x50000 | errno.EACCES),
        (BPF_RETURN, 0, 0, 0x7FFF0000),  # go on
        (BPF_RETURN, 0, 0, 0x80000000),  # end the process
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    whole = struct.pack("HP", len(program), ctypes.addressof(code))
    libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_void_p] * 4)
    no_new_privileges = libc.prctl(38, 1, 0, 0, 0)
    if no_new_privileges or libc.prctl(22, 2, whole, 0, 0):  # seccomp, by a filter
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def close_files(libc: Any, readable: Iterable[str | Path]) -> None:
    """Let this thread, and what it starts, read nothing but these files and what is in folders.

    A kernel without Landlock leaves it to kustomize, which reads no file outside of a folder with
    a kustomization; the image of the daemon has no such folder. Raises OSError.
    """
    read_file = 4
    ruleset = libc.syscall(444, struct.pack("Q", read_file), 8, 0)
    if ruleset < 0:
        return
    try:
        for path in filter(os.path.exists, readable):
            opened = os.open(path, os.O_PATH)
            libc.syscall(445, ruleset, 1, struct.pack("=Qi", read_file, opened), 0)
            os.close(opened)
        if libc.syscall(446, ruleset, 0):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(ruleset)


def memory_file(content: bytes = b"") -> IO[bytes]:
    """Return a file in memory: a full disk must not keep us from switching traffic back."""
    try:
        memory = getattr(os, "memfd_create", None)  # on Linux only
        make: Any = partial(os.fdopen, memory("file"), "w+b") if memory else tempfile.TemporaryFile
        file: IO[bytes] = make()
    except OSError as failure:
        raise ConfigError([f"no program can be started: {failure.strerror}"]) from failure
    file.write(content)
    file.seek(0)
    return file


def path_of(file: IO[bytes]) -> str:
    """Return a path by which the programs that are started here can open a file in memory."""
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def wait_for_end(process: subprocess.Popen[bytes], timeout: float | Patience) -> Finished:
    """Wait for a process that leads its group, and read its stderr; at the time limit, kill all.

    What is too long is read and dropped.
    """
    stderr = bytearray()
    patience = timeout if isinstance(timeout, Patience) else Patience(timeout)
    activity = Activity(process.pid, patience.silence)
    until = time.monotonic() + patience.seconds
    pipe: Any = process.stderr
    with process, selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while (left := until - time.monotonic()) > 0 and not activity.stalled():
            if not selector.select(min(left, patience.silence / 4)):
                continue
            if chunk := os.read(pipe.fileno(), 65536):
                stderr += chunk[: STDERR_BYTES - len(stderr)]
                continue
            with suppress(subprocess.TimeoutExpired):
                return Finished(process.wait(left), b"", bytes(stderr))
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while True:  # as process 1 of a container it inherits what its helpers left
                os.waitpid(-process.pid, 0)
    return Finished(None, b"", bytes(stderr))


@dataclass(frozen=True, slots=True)
class Work:
    """What programs have done so far."""

    moved: int = 0  # bytes that they have read and written
    used: float = 0.0  # seconds of a processor


class Activity:
    """Whether a program, with all that it started, goes on: it reads, writes or computes.

    Nothing else tells a server that sends a few bytes now and then, to say that it is at work, from
    one that is silent: libcurl counts whole bytes a second, and git's keep-alives are less.
    """

    BUSY_SECONDS = 1.0  # of a processor, which nobody uses who only waits

    def __init__(self, group: int, silence: float) -> None:
        self.group = group
        self.silence = silence
        self.last = Work()
        self.since = time.monotonic()
        self.looked = self.since

    def stalled(self) -> bool:
        """Whether it has done nothing for too long; never where the system does not tell."""
        now = time.monotonic()
        if now - self.looked < self.silence / 4:
            return False
        self.looked = now
        try:
            work = self.measured()
        except (OSError, ValueError, LookupError):
            self.since = now
            return False
        if work.moved != self.last.moved or work.used > self.last.used + self.BUSY_SECONDS:
            self.last = work
            self.since = now
        return now - self.since >= self.silence

    def measured(self) -> Work:
        """Return what the group has done; raises OSError, ValueError and LookupError if unknown."""
        moved: list[int] = []
        ticks = 0
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                # the name in brackets may hold blanks: state, parent and group follow it
                values = entry.read_text().rpartition(")")[2].split()
                if int(values[2]) == self.group:
                    counters = (entry.parent / "io").read_text().split()
                    moved += [int(counters[1]), int(counters[3])]
                    ticks += int(values[11]) + int(values[12])
        if not moved:
            raise LookupError(f"no process of group {self.group} is seen")
        return Work(sum(moved), ticks / os.sysconf("SC_CLK_TCK"))


# === git ==========================================================================================

# What was refused is given once only: git-lfs would ask for it and send it for ever.
CREDENTIAL_HELPER = (
    'credential.helper=!f() { case "$1" in erase) : > "$CREDENTIALS_FILE";;'
    ' get) git credential-store --file "$CREDENTIALS_FILE" get;; esac; }; f'
)
GIT = (
    *("git", "-c", f"core.hooksPath={os.devnull}", "-c", CREDENTIAL_HELPER),
    # large files are not unpacked in memory, nor file by file: one pack has one size
    *("-c", "core.bigFileThreshold=1m", "-c", "fetch.unpackLimit=1"),
)
GIT_ENVIRONMENT = {
    "GIT_ALLOW_PROTOCOL": "https:http:file",
    "GIT_ASKPASS": "",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_TERMINAL_PROMPT": "0",
}
LITERAL = "--literal-pathspecs"  # for paths that come from outside
CLONED_REF = f"refs/{MANAGER}/commit"  # while git fetches tags: it brings those of what has a name
CREDENTIALS_TRIED = 8  # lines for one repository: a server may shut out who fails too often
# How git and git-lfs say that a server refuses a credential. GitLab answers 404 where a token is
# valid but may not read the project.
CREDENTIAL_REFUSED = re.compile(
    r"Authentication failed for|could not read (Username|Password) for|Authorization error:"
    r"|The requested URL returned error: 40[134]\b|(?m:^fatal: repository '.*' not found$)"
    r"|Authentication required: |(?i:batch response: .*(forbidden|not found|credentials))"
)
# A line of file git-credentials: scheme, user and password, host, path of a project or a group.
CREDENTIAL = re.compile(r"(https?)://([^/\s]+:[^/\s]*)@([^/@\s?#]+)(/[^\s?#]*)?")
SERVER_URL = re.compile(r"(https?)://(?:[^/?#]*@)?([^/?#]*)([^?#]*)")
# What libcurl or a server may resolve to another path than the one that is written. No path of a
# project in GitLab has such.
LEADS_ELSEWHERE = re.compile(r"[%\\]|//|/\.\.?(?![^/])")
PUBLIC_AUTHORITIES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")
CA_BYTES = 2**20  # as much as a ConfigMap holds
HEADS_BYTES = 4 * 2**20  # of a list of branches: some 40,000 with names of usual length
DEFAULT_CLONE: CloneSettings = load_section(CloneSettings, {}, "", [])
WARN_SECONDS = 3600.0
FOLDER_FILES = 500
OUT_OF_ROOM = re.compile(r"(?m)^(fatal|error): .*([Oo]ut of memory|Cannot allocate|File too large)")


@dataclass(frozen=True, slots=True)
class Credential:
    """One line of file git-credentials, encoded as in a URL."""

    scheme: str
    login: str  # user and password
    host: str  # with its port
    path: str  # of a project or a group; "" for all that the server has

    @classmethod
    def parse(cls, line: bytes) -> Credential | None:
        """Return what a line says, None if git could not use it either."""
        match = CREDENTIAL.fullmatch(line.decode(errors="surrogateescape"))
        if match is None:
            return None
        user, _, password = match[2].partition(":")
        login = ":".join(quote(unquote_to_bytes(word), safe="") for word in (user, password))
        return cls(match[1], login, host_of(match[1], match[3]), project_path(match[4] or ""))

    def fits(self, url: str) -> bool:
        """Whether it may be shown to the server of a URL for what the URL names."""
        match = SERVER_URL.match(url)
        if match is None or (self.scheme, self.host) != (match[1], host_of(match[1], match[2])):
            return False
        if not self.path:
            return True
        within = f"{project_path(match[3])}/".startswith(f"{self.path}/")
        return within and not LEADS_ELSEWHERE.search(match[3])


def host_of(scheme: str, netloc: str) -> str:
    """Return the host and port of a URL, the port only where it is not the usual one."""
    return netloc.lower().removesuffix(":80" if scheme == "http" else ":443")


def project_path(path: str) -> str:
    """Return what is compared of the path of a repository, as servers do."""
    return path.strip("/").removesuffix(".git").strip("/").lower()


def logins_for(credentials: Sequence[Credential], url: str) -> list[str]:
    """Return what may be tried for a URL, best first, each as a file for git's credential-store.

    A line that names more of the path comes first. Each file has one login for the URL's server,
    and of other servers, to which it may lead, the lines that name no path.
    """
    match = SERVER_URL.match(url)
    host = match[2] if match else ""  # as git looks for it
    fitting = [credential for credential in credentials if credential.fits(url)]
    fitting.sort(key=lambda credential: -len(credential.path))
    elsewhere = [c for c in credentials if not c.path and c not in fitting]
    others = "".join(f"{c.scheme}://{c.login}@{c.host}\n" for c in elsewhere)
    best = fitting[:CREDENTIALS_TRIED]
    return [f"{c.scheme}://{c.login}@{host}\n{others}" for c in best] or [others]


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """What git, and who asks GitLab, need to reach servers: variables, and a private authority."""

    variables: Mapping[str, str] = dataclass_field(default_factory=dict)
    ca: Path | None = None

    def authorities(self) -> bytes:
        """Return the public authorities and the private one; b"" where there is no private one.

        Variables that name a file of authorities replace the public ones, so it has both.
        """
        try:
            private = read_beginning(self.ca, CA_BYTES) if self.ca else b""
        except OSError:
            private = b""
        if not private.strip():
            return b""
        return read_beginning(Path(self.public_authorities()), OUTPUT_BYTES) + b"\n" + private

    def public_authorities(self) -> str:
        """Return the path of the file with the public authorities."""
        chosen = os.environ.get("GIT_SSL_CAINFO", "")
        files = (file for file in (chosen, *PUBLIC_AUTHORITIES) if file and Path(file).is_file())
        return next(files, "") or str(http_client().certs.where())


def http_client() -> ModuleType:
    """Return the library `requests`.

    Importing it takes a fifth of a program's start. The daemon needs it only after that, and most
    containers of Jobs never.
    """
    return importlib.import_module("requests")


def read_beginning(path: Path, size: int) -> bytes:
    """Return at most so many bytes of a file; raises OSError."""
    with path.open("rb") as file:
        return file.read(size)


class Git:
    """The only way to git: no hooks, no prompts, nobody's configuration.

    Credentials are read by git's own helper from a file, so they are in no URL, argv or log.
    """

    def __init__(
        self,
        credentials: Path,
        timeout: float = GIT_TIMEOUT,
        limit: int = 2**26,
        deployed_refs: Mapping[str, Sequence[str]] | None = None,
        surroundings: Surroundings | None = None,
    ) -> None:
        self.credentials = credentials
        self.secrets = Secrets(credentials.parent)
        self.surroundings = surroundings or Surroundings()
        self.timeout = timeout
        self.limit = limit
        self.deployed_refs = deployed_refs or {}  # by URL, for servers that list too many
        self._slots: dict[str, threading.Semaphore] = {}  # by host
        self._reading = threading.Semaphore()
        self._quiet_until: dict[str, float] = {}  # by URL; no warning before that time
        self._accepted: dict[str, str] = {}  # the login that worked last, by URL

    def reach(self, url: str, *args: str, **how: Any) -> str:
        """Return what one call prints that asks the server of a URL; raises GitError.

        The lines of git-credentials that fit the URL are tried until the server accepts one. Any
        other failure ends that at once.
        """
        lines = self.secrets.lines(self.credentials.name)
        credentials = [c for c in map(Credential.parse, lines) if c is not None]
        logins = logins_for(credentials, url)
        logins.sort(key=lambda login: login != self._accepted.get(url))
        while True:
            login, *logins = logins
            try:
                printed = self.run(*args, login=login, **how)
            except GitError as failure:
                if not (logins and CREDENTIAL_REFUSED.search(failure.stderr)):
                    raise
            else:
                self._accepted[url] = login
                return printed

    def run(
        self,
        *args: str,
        directory: Path | None = None,
        patience: int = 1,
        file_bytes: int = OUTPUT_BYTES,
        stdin: str = "",
        login: str = "",
    ) -> str:
        """Return what one call prints, bytes that are no UTF-8 as surrogates; raises GitError.

        The call may take patience times the usual time, as long as the server says anything. It has
        no credentials but the login.
        """
        where = ("-C", str(directory)) if directory else ()
        argv = (*GIT, *where, *args)
        limits = Patience(patience * self.timeout, self.timeout)
        authorities = self.surroundings.authorities()
        with memory_file(login.encode()) as store, memory_file(authorities) as bundle:
            environ = {**self.environ(), "CREDENTIALS_FILE": path_of(store)}
            if authorities:
                environ["GIT_SSL_CAINFO"] = path_of(bundle)
            finished = run_program(argv, limits, stdin, environ, file_bytes)
        stdout = finished.stdout.decode(errors="surrogateescape")
        if finished.code != 0:
            stderr = finished.stderr.decode(errors="surrogateescape")
            words = [a for a in args if not re.match(r"-|[A-Za-z.]+=", a)]  # the URL above all
            raise GitError(("git", *words), finished.code, stderr, stdout)
        return stdout

    def environ(self) -> dict[str, str]:
        """Return the environment in which git runs."""
        kept = {k: v for k, v in os.environ.items() if not re.match(r"GIT_(?!SSL_)|LANG|LC_", k)}
        return {**kept, **self.surroundings.variables, **GIT_ENVIRONMENT}

    def heads(self, url: str) -> dict[str, str]:
        """Return the commit of every branch, by full ref name; of the deployed ones where too many.

        Only a few calls ask one server at a time.
        """
        host = normalise_url(url).partition("/")[0]
        slots = self._slots.setdefault(host, threading.Semaphore(HEADS_AT_ONCE))
        if not slots.acquire(timeout=self.timeout):
            raise GitError(("git", "ls-remote"), None, f"too many calls wait for {clip(host)}")
        try:
            ask = ("ls-remote", "--heads", "--", url)
            listed = self.reach(url, *ask, file_bytes=HEADS_BYTES)
        except GitError as failure:
            too_long = failure.code == -signal.SIGXFSZ or OUT_OF_ROOM.search(failure.stderr)
            if not too_long or url not in self.deployed_refs:
                raise
            listed = "\n".join(self._listed_head(url, ref) for ref in self.deployed_refs[url])
        finally:
            slots.release()
        return self._supported_heads(url, listed)

    def _listed_head(self, url: str, ref: str) -> str:
        """Return the line of one ref as `git ls-remote` prints it, "" where there is no such ref.

        A server that is asked to list one ref lists all that end alike, and whoever may push any
        branch may push very many of these. So the ref is fetched.
        """
        with tempfile.TemporaryDirectory(prefix="gitops-hook-") as folder:
            where: Any = {"directory": Path(folder)}
            self.run("init", "--quiet", "--bare", "--", folder)
            fetch = ("fetch", "--quiet", "--depth=1", "--filter=tree:0", "--no-tags")
            try:
                self.reach(url, *fetch, "--", url, f"+{ref}:{ref}", **where)
            except GitError as failure:
                if "couldn't find remote ref" in failure.stderr:
                    return ""
                raise
            return self.run("for-each-ref", "--format=%(objectname)%09%(refname)", **where).strip()

    def _supported_heads(self, url: str, listed: str) -> dict[str, str]:
        """Return the commits of the listed refs; those with unsupported names are ignored.

        Whoever may push such a ref must not keep us from reading the others.
        """
        heads: dict[str, str] = {}
        ignored: list[str] = []
        for sha, _, ref in (line.partition("\t") for line in listed.split("\n")):
            if not SHA.fullmatch(sha):
                continue
            if ref in heads:
                raise GitError(("git", "ls-remote", url), 1, f"the server lists {ref} twice")
            if valid_ref(ref):
                heads[ref] = sha
            else:
                ignored.append(ref)
        if ignored and time.monotonic() > self._quiet_until.get(url, 0.0):
            self._quiet_until[url] = time.monotonic() + WARN_SECONDS
            details = {"count": len(ignored), "first": clip(ascii(ignored[0]), 120)}
            warn("ignored branches with unsupported names", repository=url, **details)
        return heads

    def checkout(
        self,
        url: str,
        commit: str,
        directory: Path,
        *,
        symlinks: bool,
        settings: CloneSettings | None = None,
    ) -> None:
        """Put exactly this commit into a new directory; without symlinks these are plain files."""
        self._create_repository(commit, directory)
        settings = settings or DEFAULT_CLONE
        fetch = ("fetch", "--quiet", *settings.depth_options)
        # a large one takes its time; a server that says nothing is cut off long before
        how: Any = {"directory": directory, "patience": 10, "file_bytes": 0}
        if settings.tags:
            self.reach(url, *fetch, "--", url, f"+{commit}:{CLONED_REF}", **how)
            self.run("update-ref", "-d", CLONED_REF, directory=directory)
        else:
            self.reach(url, *fetch, "--no-tags", "--", url, commit, **how)
        links = f"core.symlinks={'true' if symlinks else 'false'}"
        write = ("-c", links, "checkout", "--quiet", "--detach", commit)
        self.run(*write, directory=directory, file_bytes=0)

    @contextmanager
    def manifests(self, url: str, commit: str, path: str) -> Iterator[Path]:
        """Fetch the top folder of a path at a commit; only one block at a time runs with it.

        Raises StageError where it is too much, and GitError where another try may help.
        """
        top = top_folder(path)
        with tempfile.TemporaryDirectory(prefix="gitops-hook-") as folder:
            root = Path(folder) / "src"
            try:
                self._fetch_folder(url, commit, top, root)
                with self._reading:
                    self._write_folder(commit, top, root)
                    yield root
            except GitError as failure:
                full = OUT_OF_ROOM.search(failure.stderr)
                if failure.code == -signal.SIGXFSZ:
                    cause = failure.said
                elif full or any(f.lstat().st_size >= self.limit for f in root.rglob("*")):
                    cause = "git needs more disk or memory"
                else:
                    raise
                most = f"{FOLDER_FILES} files or {self.limit >> 20} MiB (limits.checkout)"
                advice = "Put the manifests into a folder of their own."
                refuse(f"The folder {clip(top, 80)!r} has more than {most}: {cause}. {advice}")

    def _create_repository(self, commit: str, directory: Path) -> None:
        """Create an empty repository that can hold a commit."""
        if not SHA.fullmatch(commit):
            raise GitError(("git", "fetch"), 1, f"{commit!r} is not a commit id")
        form = {40: "sha1", 64: "sha256"}[len(commit)]
        self.run("init", "--quiet", f"--object-format={form}", "--", str(directory))

    def _fetch_folder(self, url: str, commit: str, top: str, root: Path) -> None:
        """Fetch a commit without its files, then the files of one folder, once they are counted.

        A server that does not know filters sends all at once, up to the same limit.
        """
        self._create_repository(commit, root)
        remote = ("-c", f"remote.origin.url={url}", "-c", "remote.origin.promisor=true")
        fetch = (*remote, "fetch", "--quiet", "--no-tags", "--filter=blob:none")
        how: Any = {"directory": root, "patience": 10, "file_bytes": self.limit}
        self.reach(url, *fetch, "--depth=1", "--", "origin", commit, **how)
        if ids := self._listed(commit, top, root):
            blobs = "".join(f"{blob}\n" for blob in ids)
            ask = (*fetch, "--no-write-fetch-head", "--stdin", "origin")
            self.reach(url, *ask, stdin=blobs, **how)

    def _write_folder(self, commit: str, top: str, root: Path) -> None:
        """Write the files of one folder, once they are measured; links become plain files."""
        sizes = self._listed(commit, top, root, "--long")
        if (total := sum(int(size) for size in sizes if size.isdigit())) > self.limit:
            raise GitError(("git", "ls-tree"), -signal.SIGXFSZ, f"it has {total >> 20} MiB")
        if sizes:
            plain = (LITERAL, "-c", "core.symlinks=false")
            write = (*plain, "checkout", "--quiet", commit, "--", top)
            self.run(*write, directory=root, file_bytes=self.limit)

    def _listed(self, commit: str, top: str, root: Path, *options: str) -> list[str]:
        """Return the id of each file of one folder, or with option --long its size."""
        ask = (LITERAL, "ls-tree", "-r", "-z", *options, commit, "--", top)
        entries = self.run(*ask, directory=root, file_bytes=FOLDER_FILES * 4096).split("\0")[:-1]
        if len(entries) > FOLDER_FILES:
            raise GitError(("git", "ls-tree"), -signal.SIGXFSZ, f"it has {len(entries)} files")
        rows = [entry.partition("\t")[0].split() for entry in entries]  # mode, type, id, size
        return [row[-1] for row in rows if row[1] == "blob"]


SUBMODULES = 200  # of one commit, those of submodules included
SUBMODULE_LEVELS = 8
PATHS_SHOWN = 3
OLDER_SECONDS = 5.0
POINTERS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
SUBMODULE_URL = re.compile(r"submodule\.[^\n]*\.url\n(.*)", re.DOTALL)
# All files come, also those that .lfsconfig leaves out; without one of them nothing is checked out.
LFS_OPTIONS = (
    *("-c", "lfs.fetchinclude=", "-c", "lfs.fetchexclude="),
    *("-c", "filter.lfs.process=git-lfs filter-process", "-c", "filter.lfs.required=true"),
)


class Cloner:
    """Clones for the Jobs of an app, as its settings say.

    Submodules and files in git LFS are fetched, left out, or a reason to refuse the commit: an
    empty folder or a pointer must not go live unnoticed.
    """

    def __init__(self, git: Git, app: str, settings: CloneSettings) -> None:
        self.git = git
        self.app = app
        self.settings = settings
        self._submodules = 0  # that were seen so far

    def clone(self, url: str, commit: str, directory: Path) -> None:
        """Put a commit into a new directory; raises GitError, and RefusedError for its content."""
        self.git.checkout(url, commit, directory, symlinks=True, settings=self.settings)
        # relative URLs of submodules are resolved against it, and git-lfs wants to know it
        self.git.run("config", "remote.origin.url", url, directory=directory)
        self._complete(url, directory, SUBMODULE_LEVELS)

    def _complete(self, url: str, directory: Path, levels: int) -> None:
        """Fetch what a checkout has only references to, and the same in its submodules."""
        settings = self.settings
        submodules = [] if settings.submodules == "false" else self._gitlinks(directory)
        pointers = [] if settings.lfs == "false" else self._pointers(directory)
        refusals = []
        if submodules and not settings.submodules:
            refusals.append(self._undecided("submodules", submodules, "submodules"))
        if pointers and not settings.lfs:
            refusals.append(self._undecided("files in git LFS", pointers, "lfs"))
        if refusals:
            raise RefusedError(" ".join(refusals))
        if pointers:
            self._fetch_large_files(url, directory, pointers)
        if submodules:
            self._fetch_submodules(url, directory, submodules, levels)

    def _undecided(self, what: str, paths: Sequence[str], key: str) -> str:
        """Return the sentence that says what a commit has and which setting decides on it."""
        shown = [clip(path, 60) for path in paths[:PATHS_SHOWN]]
        more = len(paths) - len(shown)
        some = ", ".join(shown) + (f", and {more} more" if more else "")
        advice = f"Set clone.{key} of app {self.app} to true or false."
        return f"The commit has {what} ({some}). {advice}"

    def _gitlinks(self, directory: Path) -> list[str]:
        """Return the paths of the submodules, from the list of all files, which may be long."""
        argv = (*GIT, "-C", str(directory), "ls-files", "--stage", "-z")
        paths = []
        rest = b""
        listing = start_program(argv, self.git.environ(), stderr=subprocess.DEVNULL)
        with listing, cast("IO[bytes]", listing.stdout) as output:
            while chunk := output.read(65536):
                *entries, rest = (rest + chunk).split(b"\0")
                paths += [e.partition(b"\t")[2] for e in entries if e.startswith(b"160000 ")]
        if listing.returncode != 0:
            raise GitError(("git", "ls-files"), listing.returncode, "")
        return [os.fsdecode(path) for path in paths]

    def _pointers(self, directory: Path) -> list[str]:
        """Return the paths of the files that are pointers to files in git LFS."""
        ask = ("ls-files", "-z", "--", ":(attr:filter=lfs)")
        paths = self.git.run(*ask, directory=directory).split("\0")[:-1]
        return [path for path in paths if is_pointer(directory / path)]

    def _fetch_large_files(self, url: str, directory: Path, pointers: Sequence[str]) -> None:
        """Replace the pointers of a checkout by what they point to, from the server of its URL."""
        endpoint = f"{url.rstrip('/').removesuffix('.git')}.git/info/lfs"
        if is_local(url):
            endpoint = f"file://{url.removeprefix('file://')}"
        options = (*LFS_OPTIONS, "-c", f"lfs.url={endpoint}")
        how: Any = {"directory": directory, "patience": 10, "file_bytes": 0}
        self.git.reach(url, *options, "lfs", "fetch", "origin", "HEAD", **how)
        # not by `git lfs checkout`, after which git takes the files for changed ones
        for path in pointers:
            (directory / path).unlink()
        self.git.run(*options, "checkout", "--quiet", "--force", "HEAD", **how)
        if left := self._pointers(directory):
            raise GitError(("git", "lfs", "fetch"), 1, f"{left[0]} is still a pointer")
        # Of a file that is older than the index git believes that it has not changed. Else it would
        # compare it with the pointer in the tests, where there is no git-lfs.
        for path in pointers:
            written = (directory / path).lstat().st_mtime - OLDER_SECONDS
            os.utime(directory / path, (written, written))
        self.git.run(*options, "status", "--porcelain", "--untracked-files=no", **how)

    def _fetch_submodules(
        self, url: str, directory: Path, paths: Sequence[str], levels: int
    ) -> None:
        """Fetch the submodules of a checkout, each at its commit, and complete them."""
        self._submodules += len(paths)
        if self._submodules > SUBMODULES or levels == 0:
            most = f"{SUBMODULES} submodules, or {SUBMODULE_LEVELS} levels of them"
            raise RefusedError(f"The commit has more than {most}.")
        for path in paths:
            source = self._submodule_url(directory, path)
            if not SERVER_URL.match(source) and (SERVER_URL.match(url) or not is_local(source)):
                raise self._unusable(path, "its URL is neither http nor https")
            update = ("submodule", "--quiet", "update", "--checkout", "--depth=1", "--", path)
            how: Any = {"directory": directory, "patience": 10, "file_bytes": 0}
            self.git.reach(source, LITERAL, *update, **how)
            inner = directory / path
            # without a repository of its own git would take the one around it
            if not (inner / ".git").is_file() or inner.resolve() != directory.resolve() / path:
                raise self._unusable(path, "git did not fetch it")
            self._complete(source, inner, levels - 1)

    def _submodule_url(self, directory: Path, path: str) -> str:
        """Return the full URL from which git will fetch a submodule; raises RefusedError.

        It is the one that git writes into its own configuration for this path. Whoever reads
        .gitmodules again may get another: attributes make the file differ from the commit's, and
        it can say several things of one path.
        """
        listing = ("config", "--local", "--null", "--list")
        try:
            before = self.git.run(*listing, directory=directory).split("\0")
            self.git.run(LITERAL, "submodule", "--quiet", "init", "--", path, directory=directory)
            entries = self.git.run(*listing, directory=directory).split("\0")
        except GitError as failure:
            raise self._unusable(path, failure.said) from failure
        new = map(SUBMODULE_URL.fullmatch, {*entries} - {*before})
        urls = [match[1] for match in new if match]
        if len(urls) != 1:
            raise self._unusable(path, "git has no URL that is for this path only")
        return urls[0]

    def _unusable(self, path: str, why: str) -> RefusedError:
        """Return the error for a submodule that cannot be fetched whatever the server does."""
        advice = f"Correct .gitmodules, or set clone.submodules of app {self.app} to false."
        return RefusedError(f"Submodule {clip(path, 80)} cannot be fetched: {why}. {advice}")


def is_local(url: str) -> bool:
    """Whether a URL names a folder of this machine."""
    return url.startswith(("/", "file:///"))


def is_pointer(path: Path) -> bool:
    """Whether a file stands for one in git LFS."""
    with suppress(OSError):
        if stat.S_ISREG(path.lstat().st_mode):
            return read_beginning(path, 100).startswith(POINTERS)
    return False


# === retry ========================================================================================


class Clock:
    """The time by which things are decided, so that a test can hold it."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)
    thread_time = staticmethod(time.thread_time)  # processor seconds of the thread that asks


def jittered(seconds: float) -> float:
    """Return about so many seconds, so that what failed together does not come back together."""
    return seconds * random.uniform(0.7, 1.3)  # noqa: S311 - it hides nothing


class Retry:
    """When each item that failed is tried again, and which of its failures are reported.

    The delays of an item grow and then stay the same; meanwhile the other items are processed. If
    the `news` of an item, a version say, are greater than at the last failure, it is due at once.
    As many of the first failures are reported as there are delays, and then every tenth, or as
    chosen. Threads may share it.
    """

    def __init__(
        self, clock: Clock, delays: Sequence[float] = DELAYS, report_every: int = 10
    ) -> None:
        self.clock = clock
        self.delays = delays
        self.report_every = report_every
        self._lock = threading.Lock()
        self._failures: dict[str, int] = {}  # in a row, by item
        self._due: dict[str, float] = {}  # when each of them is tried again, by the clock
        self._news: dict[str, Any] = {}  # what was known of each of them

    @contextmanager
    def contain(self, item: str, complaint: str, news: Any = None, **words: Any) -> Iterator[None]:
        """Put an item off if its block raises, and report that; else forget its failures.

        A HookError or an OSError ends here. Any other exception is a bug, and is raised.
        """
        is_bug = True
        try:
            yield
            is_bug = False
            self.succeeded(item)
        except (HookError, OSError) as failure:
            is_bug = False
            if self.failed(item, news):
                warn(complaint, detail=str(failure), **words)
        finally:
            if is_bug:
                self.failed(item, news)

    def failed(self, item: str, news: Any = None) -> bool:
        """Put an item off, longer each time; return whether this failure is to be reported."""
        with self._lock:
            failures = self._failures.get(item, 0)
            delay = self.delays[min(failures, len(self.delays) - 1)]
            self._failures[item] = failures + 1
            self._due[item] = self.clock.monotonic() + jittered(delay)
            if news is not None:
                self._news[item] = news
        return failures < len(self.delays) or failures % self.report_every == 0

    def succeeded(self, item: str) -> bool:
        """Forget the failures of an item; return whether there were any."""
        with self._lock:
            self._due.pop(item, None)
            self._news.pop(item, None)
            return self._failures.pop(item, 0) > 0

    def due(self, item: str, news: Any = None) -> bool:
        """Whether an item may be tried now: its delay is over, or there are news of it."""
        if self.delay(item) <= 0:
            return True
        return news is not None and (item not in self._news or news > self._news[item])

    def delay(self, item: str) -> float:
        """Return the seconds until an item is tried again without news, 0 if it is due."""
        return max(0.0, self._due.get(item, 0.0) - self.clock.monotonic())

    def failing(self) -> bool:
        """Whether any item has failed and not succeeded since."""
        return bool(self._failures)

    def wait(self, longest: float) -> float:
        """Return the seconds until the next waiting item is due, at most the longest."""
        now = self.clock.monotonic()
        with self._lock:
            return min([longest, *(at - now for at in self._due.values() if at > now)])


class Heartbeats:
    """When each thread must have moved again, so that liveness can fail."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._due: dict[str, float] = {}

    def beat(self, name: str, allowed: float) -> None:
        """Record that a thread moves, and expect its next heartbeat within so many seconds."""
        self._due[name] = self.clock.monotonic() + allowed

    def late(self) -> list[str]:
        """Return the threads whose next heartbeat is overdue."""
        now = self.clock.monotonic()
        return sorted(name for name, due in list(self._due.items()) if due < now)


class Cooldown:
    """Keeps an action from being repeated on the same state until its effect must have shown.

    It is for what was done. When to repeat what has failed is for a Retry to say.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._states: dict[str, Any] = {}
        self._until: dict[str, float] = {}

    def allows(self, key: str, state: Any = None) -> bool:
        """Whether to do something: in another state than the last time, or long enough after it."""
        over = self._until.get(key, -math.inf) <= self.clock.monotonic()
        return over or self._states[key] != state

    def start(self, key: str, seconds: float, state: Any = None) -> None:
        """Remember that something was done, for so many seconds."""
        now = self.clock.monotonic()
        for expired in [key for key, until in self._until.items() if until <= now]:
            del self._until[expired], self._states[expired]
        self._until[key] = now + seconds
        self._states[key] = state


# === job manifests ================================================================================

RUN_FIELDS = ("ref", "commit", "before", "title", "by", "delivery")  # each an annotation of the Job
BUILD_CONTAINER = "kaniko"
SOURCE = "/workspace/src"
TERMINATION_LOG = "/dev/termination-log"  # where Kubernetes reads what a container has to say
JUNIT_XML = "/workspace/results/junit.xml"  # where tests leave their report
COLLECTING = "/workspace/.collecting"  # is there once the side-car of the tests listens
CREDENTIALS_MOUNT = "/var/run/gitops-hook"
CA_MOUNT = "/var/run/gitops-hook-ca"
CA_BUNDLE = "/workspace/ca-certificates.crt"  # where the clone writes public and private ones
# A constant script: where the clone wrote a bundle, the tests use it: git, OpenSSL, curl, requests,
# pip and Node.js, unless a variable names another one already.
TRUSTING = """if [ -s "$CA_BUNDLE" ]; then
  : "${GIT_SSL_CAINFO:=$CA_BUNDLE}" "${SSL_CERT_FILE:=$CA_BUNDLE}" "${PIP_CERT:=$CA_BUNDLE}"
  : "${CURL_CA_BUNDLE:=$CA_BUNDLE}" "${REQUESTS_CA_BUNDLE:=$CA_BUNDLE}"
  : "${NODE_EXTRA_CA_CERTS:=$CA_BUNDLE}"
  export GIT_SSL_CAINFO SSL_CERT_FILE PIP_CERT CURL_CA_BUNDLE REQUESTS_CA_BUNDLE NODE_EXTRA_CA_CERTS
fi
exec sh -ec "$0"
"""
# Docker's predefined arguments of a build, which the commands of a Dockerfile get as variables.
PROXIES = re.compile("(?i:(?:https?|ftp|no|all)_proxy)")
BUILD_CONTEXT = "/kaniko/source/src"  # SOURCE, where no Dockerfile writes: kaniko leaves mounts out
# What every Job has; what every container has, fit for Pod Security `restricted`; what the builder
# has instead, which unpacks images over its own root, /tmp included, fit for `baseline`.
JOB, CONTAINER, BUILDER, REGISTRY = own_yaml("""
apiVersion: batch/v1
kind: Job
spec:
  suspend: true  # so that the queue is in the cluster
  backoffLimit: 2
  podFailurePolicy:
    rules:  # in this order: an evicted test has an exit code too
    - {action: Ignore, onPodConditions: [{type: DisruptionTarget, status: "True"}]}
    - {action: FailJob, onExitCodes: {operator: NotIn, values: [0]}}
    - {action: FailJob, onExitCodes: {containerName: clone, operator: In, values: [3]}}  # refused
  template:
    spec:
      restartPolicy: Never
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: 5  # a shell as process 1 ignores SIGTERM anyway
      securityContext: {runAsNonRoot: true, runAsUser: 65532, runAsGroup: 65532, fsGroup: 65532,
                        fsGroupChangePolicy: OnRootMismatch,  # a cache may have very many files
                        seccompProfile: {type: RuntimeDefault}}
      volumes:
      - {name: workspace, emptyDir: {}}  # each with the size of what the main container may write
      - {name: tmp, emptyDir: {}}
      - {name: git, secret: {secretName: git-credentials, optional: true, defaultMode: 0400}}
      - {name: ca, configMap: {name: gitops-hook-ca, optional: true}}
---
env: [{name: HOME, value: /tmp}]
imagePullPolicy: IfNotPresent  # as the daemon's own: one of tag latest may be on the node only
resources: {requests: {cpu: 50m, memory: 64Mi, ephemeral-storage: 64Mi},
            limits: {cpu: 500m, memory: 512Mi, ephemeral-storage: 256Mi}}  # of what it prints
securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true,
                  capabilities: {drop: [ALL]}}
volumeMounts: [{name: workspace, mountPath: /workspace}, {name: tmp, mountPath: /tmp}]
---
terminationMessagePolicy: FallbackToLogsOnError  # which says whether a registry was away
env:
- {name: container, value: kube}  # it looks for that, or a token, before it writes to its root
# the public authorities are in the first folder, of which its image names no other
- {name: SSL_CERT_DIR, value: "/kaniko/ssl/certs:/etc/ssl/certs:/kaniko/ca"}
securityContext: {runAsNonRoot: false, runAsUser: 0, runAsGroup: 0, allowPrivilegeEscalation: false,
  capabilities: {drop: [ALL], add: [CHOWN, DAC_OVERRIDE, FOWNER, SETUID, SETGID, SETFCAP]}}
volumeMounts: [{name: workspace, mountPath: /kaniko/source},
               {name: ca, mountPath: /kaniko/ca}, {name: registry, mountPath: /kaniko/.docker}]
---
name: registry
secret: {secretName: registry-credentials, optional: true, defaultMode: 0400,
         items: [{key: .dockerconfigjson, path: config.json}]}
""")
# What is read of a test report: pushed code writes it.
REPORT_BYTES = 10 * 2**20
REPORT_PIECE = 64 * 1024  # bytes that are parsed at once
PROLOG_PIECE = 16  # the same before the first element
PROLOG_BYTES = 64 * 1024  # before the first element
REPORT_DEPTH = 100  # elements within each other
REPORT_ELEMENTS = 500_000  # in all: the kubelet waits five seconds for the sum
REPORT_NAMES = 5  # of what failed, that are listed
NAME_READ = 2000  # characters of each name that are looked at
REPORT_EXPLAINED = 10  # of what failed, that are printed with the report's reasons
REASON_READ = 8000  # characters of each reason that are looked at
REASON_LINES = 12  # of each, that are printed
REPORT_REASONS = ("failure", "error")  # elements that say why a testcase or a suite failed
REPORT_SUITES = ("testsuites", "testsuite")
REPORT_COUNTS = ("failures", "errors")  # attributes of suites
NO_REPORT = "no test report"
GREEN_REPORT = re.compile("[0-9]+ passed, 0 failed")
RED_REPORT = re.compile("[0-9]+ passed, 0*[1-9][0-9]* failed")
LOST_REPORT = "the result of the tests is lost"
DISK = "ephemeral-storage"
# What a pod may write where the settings do not say: kaniko unpacks images over its own root.
DISK_LIMITS = {"test": "4Gi", "build": "10Gi", "service": "1Gi"}
START_MARGIN = 30  # seconds in which the daemon ends a run before the kubelet kills its service
CACHE = "/cache"
CACHED = {  # where these programs keep what they have downloaded: a folder for each
    "PIP_CACHE_DIR": f"{CACHE}/pip",
    "UV_CACHE_DIR": f"{CACHE}/uv",
    "npm_config_cache": f"{CACHE}/npm",
    "GOCACHE": f"{CACHE}/go-build",
    "GOMODCACHE": f"{CACHE}/go-mod",
    "CARGO_HOME": f"{CACHE}/cargo",
    "MAVEN_ARGS": f"-Dmaven.repo.local={CACHE}/maven",
}


def test_job(config: Config, app: App, run: Run) -> Object:
    """Return the Job that checks out the commit, runs its tests and sums up their report."""
    settings = app.test
    said = {"TERMINATION_LOG": TERMINATION_LOG, "JUNIT_XML": JUNIT_XML, "COLLECTING": COLLECTING}
    results = hook_container(config, RESULTS_CONTAINER, "collect", said)
    env = {"CI": "true", "GIT_BRANCH": run.branch, "GIT_COMMIT": run.commit, "CA_BUNDLE": CA_BUNDLE}
    env["JUNIT_XML"] = JUNIT_XML
    env |= {**(CACHED if settings.cache else {}), **settings.env}
    tests = new_container(TEST_CONTAINER, settings.image, [settings.command], **env)
    tests |= {"command": ["sh", "-ec", TRUSTING], "workingDir": SOURCE}
    if settings.env_from:
        tests["envFrom"] = [{"secretRef": {"name": name}} for name in settings.env_from]
    # a side-car first, for which the clone waits: it listens before the tests can end
    job = stage_job(config, app, run, "test", {**results, "restartPolicy": "Always"}, tests)
    pod = job["spec"]["template"]["spec"]
    pod["initContainers"][-1]["args"] += [f"COLLECTING={COLLECTING}"]
    for service in settings.services:
        pod["initContainers"] += [with_variables(service_container(service), config.job_env)]
        pod["volumes"] += service_volumes(service)
    if settings.cache:  # for each app and kind of branch: it is a way into what comes later
        folder = "deploy" if run.branch == app.branch else "branches"
        mount = {"name": "cache", "mountPath": CACHE, "subPath": f"{app.name}/{folder}"}
        pod["containers"][0]["volumeMounts"] = [*tests["volumeMounts"], mount]
        claim = {"claimName": settings.cache}
        pod["volumes"] += [{"name": "cache", "persistentVolumeClaim": claim}]
    return job


def service_container(service: ServiceSettings) -> Object:
    """Return a side-car of the tests, which begin when it listens.

    The daemon ends a run whose service does not start; the kubelet would start it for ever.
    """
    container = new_container(service.name, service.image, [service.command], **service.env)
    container["command"] = ["sh", "-ec"]
    if not service.command:
        del container["command"], container["args"]
    mounts = zip(service_volumes(service), (TEMPORARY, *service.writable), strict=True)
    return {
        **container,
        "restartPolicy": "Always",
        "ports": [{"containerPort": service.port}],
        "resources": with_disk_limit(service.resources, DISK_LIMITS["service"]),
        "securityContext": {**container["securityContext"], "runAsUser": service.user},
        "startupProbe": {
            "tcpSocket": {"port": service.port},
            "periodSeconds": 1,
            "failureThreshold": math.ceil(service.start_timeout) + START_MARGIN,
        },
        "volumeMounts": [{"name": v["name"], "mountPath": path} for v, path in mounts],
    }


def service_volumes(service: ServiceSettings) -> list[Object]:
    """Return the empty folders of a service, that of /tmp first."""
    disk = with_disk_limit(service.resources, DISK_LIMITS["service"])["limits"][DISK]
    names = (f"{service.name}-{n}" for n in range(1 + len(service.writable)))
    return [{"name": name, "emptyDir": {"sizeLimit": disk}} for name in names]


def build_job(config: Config, app: App, run: Run) -> Object:
    """Return the Job that builds and pushes the image; its termination message is the digest."""
    context = PurePosixPath(BUILD_CONTEXT, app.build.context)
    options = [f"--context=dir://{context}", f"--dockerfile={app.build.dockerfile}"]
    proxies = [f"{n}={value}" for n, value in config.job_env.items() if PROXIES.fullmatch(n)]
    options += [f"--build-arg={proxy}" for proxy in proxies]
    options += [f"--destination={app.build.image}:{run.commit[:8]}", *app.build.args]
    options += [f"--digest-file={TERMINATION_LOG}"]
    build = new_container(BUILD_CONTAINER, config.images.kaniko, options)
    job = stage_job(config, app, run, "build", {**build, **BUILDER})
    job["spec"]["template"]["spec"]["volumes"] += [REGISTRY]
    return job


def stage_job(config: Config, app: App, run: Run, stage: str, *containers: Object) -> Object:
    """Return the Job of a stage: side-cars, the clone of the commit, and the last container.

    Its deadline is a backstop for a daemon that is down: it includes the time that the Job waits
    for quota. The time-out proper is the controller's.
    """
    *sidecars, main = containers
    settings = getattr(app, stage)
    labels = {LABEL_MANAGED: MANAGER, LABEL_APP: app.name, LABEL_RUN: run.id, LABEL_STAGE: stage}
    annotations = {f"{MANAGER}/{name}": getattr(run, name) for name in RUN_FIELDS}
    annotations[ANNOTATION_REPOSITORY] = app.repository
    annotations[ANNOTATION_RECEIVED] = f"{run.received:.3f}"
    names = {"name": f"{stage}-{run.id}", "namespace": config.namespaces[stage]}
    job: Object = copy.deepcopy(JOB)
    job["metadata"] = {**names, "labels": labels, "annotations": annotations}
    spec = job["spec"]
    spec["activeDeadlineSeconds"] = int(settings.timeout + config.limits.queue_timeout)
    spec["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"] = main["name"]
    spec["template"]["metadata"] = {"labels": labels}
    resources = with_disk_limit(settings.resources, DISK_LIMITS[stage])
    pod = spec["template"]["spec"]
    pod["serviceAccountName"] = f"{stage}-runner-sa"
    pod["initContainers"] = [*sidecars, clone_container(config, app, run)]
    pod["containers"] = [{**main, "resources": resources}]
    for key in ("initContainers", "containers"):
        pod[key] = [with_variables(container, config.job_env) for container in pod[key]]
    for volume in pod["volumes"]:
        if "emptyDir" in volume:
            volume["emptyDir"]["sizeLimit"] = resources["limits"][DISK]
    return job


def clone_container(config: Config, app: App, run: Run) -> Object:
    """Return the container that checks out the commit; only it sees the git credentials."""
    said = {"CLONE_URL": app.repository, "CLONE_COMMIT": run.commit, "CLONE_DIRECTORY": SOURCE}
    said |= {"CLONE_APP": app.name, "CA_FILE": f"{CA_MOUNT}/ca.crt", "CA_BUNDLE": CA_BUNDLE}
    said |= {"TERMINATION_LOG": TERMINATION_LOG, **clone_variables(app.clone)}
    said["CREDENTIALS_FILE"] = f"{CREDENTIALS_MOUNT}/{GIT_CREDENTIALS}"
    clone = hook_container(config, "clone", "clone", said)
    mounts = [{"name": "git", "mountPath": CREDENTIALS_MOUNT}]
    mounts += [{"name": "ca", "mountPath": CA_MOUNT}]
    return {**clone, "volumeMounts": [*clone["volumeMounts"], *mounts]}


def clone_variables(settings: CloneSettings) -> dict[str, str]:
    """Return the settings of a clone that are not as by default, as variables of its container."""
    depth = {} if settings.depth == 1 else {"CLONE_DEPTH": str(settings.depth or "full")}
    tags = {"CLONE_TAGS": "true"} if settings.tags else {}
    choices = {"CLONE_SUBMODULES": settings.submodules, "CLONE_LFS": settings.lfs}
    return {**depth, **tags, **{name: choice for name, choice in choices.items() if choice}}


def hook_container(config: Config, name: str, command: str, values: Mapping[str, str]) -> Object:
    """Return a container with a command of this program, which gets these values by their names.

    It gets them as arguments: the API server needs twice the room to keep variables.
    """
    args = [command, *(f"{variable}={value}" for variable, value in values.items())]
    return new_container(name, config.images.hook, args)


def new_container(name: str, image: str, args: Sequence[str], **env: str) -> Object:
    """Return a container; Kubernetes expands $(NAME) and $$ in its texts, so they are escaped."""
    texts = {"name": name, "image": image, "args": [arg.replace("$", "$$") for arg in args]}
    return {**CONTAINER, **texts, "env": [*CONTAINER["env"], *env_of(env)]}


def env_of(variables: Mapping[str, str]) -> list[Object]:
    """Return variables as a container has them, escaped."""
    return [{"name": name, "value": v.replace("$", "$$")} for name, v in variables.items()]


def with_variables(container: Object, variables: Mapping[str, str]) -> Object:
    """Return a container that has more variables; its own of the same names count, the last one."""
    both = [*env_of(variables), *container["env"]]
    return {**container, "env": [*{variable["name"]: variable for variable in both}.values()]}


def with_disk_limit(resources: Mapping[str, Mapping[str, str]], limit: str) -> Object:
    """Return resources that limit the disk as well; a request of it is never above its limit."""
    requests = resources.get("requests", {})
    limits = resources.get("limits", {})
    default = {} if DISK in {**requests, **limits} else {DISK: "256Mi"}
    most = {DISK: requests.get(DISK, limit), **limits}
    return {**resources, "requests": {**default, **requests}, "limits": most}


def run_of_job(job: Object) -> Run:
    """Return the run that a Job of ours belongs to."""
    annotations = job["metadata"].get("annotations") or {}
    labels = job["metadata"].get("labels") or {}
    ids = {"id": labels.get(LABEL_RUN, ""), "app": labels.get(LABEL_APP, "")}
    push = {name: str(annotations.get(f"{MANAGER}/{name}", "")) for name in RUN_FIELDS}
    return Run(**ids, **push, received=seconds_of(annotations.get(ANNOTATION_RECEIVED)))


def seconds_of(value: Any) -> float:
    """Return a number of seconds that is kept as text, or 0 for anything else."""
    with suppress(TypeError, ValueError, OverflowError):
        seconds = float(value)
        return seconds if math.isfinite(seconds) else 0.0
    return 0.0


@dataclass(frozen=True, slots=True)
class ReportSummary:
    """What a JUnit report says.

    The sentence is "N passed, M failed" with the first failures, NO_REPORT, or why the report
    cannot be read: never "", and never more than 3 KB. The failures say why the first ones failed.
    """

    sentence: str
    failures: str = ""


def junit_summary(report: Path) -> ReportSummary:
    """Return what a JUnit report says.

    Pushed code writes the report and whatever stands in its place, so it is read without a tree.
    """
    counts = ReportCounts()
    try:
        with open_report(report) as stream:
            read_report(stream, counts)
    except FileNotFoundError:
        return ReportSummary(NO_REPORT)
    except OversizedError as fault:
        return ReportSummary(f"the test report {fault}")
    except (OSError, ReportError) as fault:
        why = fault.strerror if isinstance(fault, OSError) else str(fault)
        before = f", after {counts.sentence}" if counts.passed or counts.red else ""
        return ReportSummary(f"the test report cannot be read: {why}{before}", counts.failures)
    return ReportSummary(counts.sentence, counts.failures)


def open_report(report: Path) -> IO[bytes]:
    """Open the report if it is a regular file of a size that is read; raises ReportError, OSError.

    No link is followed, and nothing that stands in its place lets the caller wait.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(report, flags)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= REPORT_BYTES:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        raise oversized(status.st_size)
    raise ReportError("it is not a regular file")


def oversized(size: int) -> OversizedError:
    """Return the error that a report of so many bytes is."""
    most = REPORT_BYTES // 2**20
    return OversizedError(f"has {math.ceil(size / 2**20)} MiB; at most {most} MiB are read")


def read_report(stream: IO[bytes], counts: ReportCounts) -> None:
    """Count what a report holds, piece by piece; raises ReportError and OSError.

    Expat goes on to the end of a piece after a handler has raised. Until the first element has
    begun, pieces are too short to declare an entity and use it.
    """
    parser = expat.ParserCreate(intern=None)
    parser.buffer_text = True  # fewer pieces of text, however they are escaped
    parser.StartDoctypeDeclHandler = refuse_document_type
    parser.StartElementHandler = counts.begin
    parser.EndElementHandler = counts.end
    parser.CharacterDataHandler = counts.read_text
    # a newer expat collects the pieces of what is long, and then takes them at once
    put_off = getattr(parser, "SetReparseDeferralEnabled", lambda _: None)
    size = 0
    try:
        while piece := stream.read(REPORT_PIECE if counts.elements else PROLOG_PIECE):
            size += len(piece)
            if size > REPORT_BYTES:  # it has grown since it was opened
                raise oversized(size)
            if size > PROLOG_BYTES and not counts.elements:
                raise ReportError("no element is in its first 64 KiB")
            put_off(counts.elements > 0)
            parser.Parse(piece, False)
        parser.Parse(b"", True)
    except expat.ExpatError as fault:
        raise ReportError(str(fault)) from fault
    except (LookupError, ValueError) as fault:  # its words may quote the report
        raise ReportError("its encoding is not supported") from fault
    if not counts.is_report:
        raise ReportError("it has neither testsuites nor testcases")


def refuse_document_type(*_: object) -> NoReturn:
    """Refuse a document type, in whatever encoding: it could declare entities."""
    raise ReportError("it has a document type")


@dataclass(slots=True)
class ReportElement:
    """An element of a report that has not ended yet."""

    tag: str
    name: str = ""
    message: str = ""  # why it failed, in few words
    text: str = ""  # the beginning of the rest that is said of that
    declared: int = 0  # failures and errors, by its attributes
    red_before: int = 0  # all that was red when it began
    is_red: bool = False
    is_skipped: bool = False


class ReportCounts:
    """Counts the testcases of a report as its elements begin and end.

    A suite that says it has failures, and has no testcase that shows one, failed as a whole: so
    do suites that could not be loaded. Reports differ in what they declare beside their testcases.
    """

    def __init__(self) -> None:
        self.passed = 0
        self.red = 0
        self.is_report = False
        self.elements = 0
        self._names: list[str] = []
        self._explained: list[str] = []
        self._open: list[ReportElement] = []

    @property
    def sentence(self) -> str:
        """How many passed and failed, and the names of the first that failed."""
        names = f": {', '.join(self._names)}" if self._names else ""
        return f"{self.passed} passed, {self.red} failed{names}"

    @property
    def failures(self) -> str:
        """Why the first ones failed: each name, and below it the report's words."""
        return "\n".join(self._explained)

    def begin(self, tag: str, attributes: Mapping[str, str]) -> None:
        """Take the beginning of an element; raises ReportError where there are too many."""
        self.elements += 1
        if self.elements > REPORT_ELEMENTS:
            raise ReportError(f"it has more than {REPORT_ELEMENTS} elements")
        if len(self._open) >= REPORT_DEPTH:
            raise ReportError(f"it has more than {REPORT_DEPTH} elements within each other")
        element = ReportElement(tag.rpartition(":")[2], red_before=self.red)
        if element.tag == "testcase":
            self.is_report = True
            name = attributes.get("name", "")[:NAME_READ]  # it may hold megabytes
            name = f"{attributes.get('classname', '')[:NAME_READ]}.{name}"
            element.name = name.strip(".") or "a testcase"
        elif element.tag in REPORT_SUITES:
            self.is_report = True
            element.name = f"suite {attributes.get('name', '')[:NAME_READ]}"
            counts = [attributes.get(key, "") for key in REPORT_COUNTS]
            element.declared = sum(int(n) for n in counts if re.fullmatch("[0-9]{1,9}", n))
        elif self._open:
            parent = self._open[-1]
            parent.is_skipped |= element.tag == "skipped"
            if element.tag in REPORT_REASONS:
                parent.is_red = True
                parent.message = parent.message or attributes.get("message", "")[:REASON_READ]
        self._open.append(element)

    def read_text(self, text: str) -> None:
        """Take a piece of text: of what says why something failed, the beginning is kept."""
        if self._open and self._open[-1].tag in REPORT_REASONS and self._open[1:]:
            parent = self._open[-2]
            parent.text += text[: REASON_READ - len(parent.text)]

    def end(self, _tag: str) -> None:
        """Take the end of the element that began last."""
        element = self._open.pop()
        if element.tag == "testcase":
            if element.is_red:
                self._add_red(element, 1)
            elif not element.is_skipped:
                self.passed += 1
        elif element.tag in REPORT_SUITES and element.red_before == self.red:
            self._add_red(element, max(element.declared, element.is_red))

    def _add_red(self, element: ReportElement, count: int) -> None:
        """Count what failed, and keep its name and its reason if it is one of the first."""
        self.red += count
        if count and len(self._names) < REPORT_NAMES:
            self._names.append(clip(element.name, 120))
        if count and len(self._explained) < REPORT_EXPLAINED:
            self._explained.append(explained(element))


def explained(element: ReportElement) -> str:
    """Return what failed, and below it the first lines of its message and of its traceback."""
    lines = [line.rstrip() for line in element.text.split("\n") if line.strip()][:REASON_LINES]
    message = [line.rstrip() for line in element.message.split("\n") if line.strip()][:3]
    if message and not any(message[0] in line for line in lines):  # it does not repeat it
        lines = [*message, *lines]
    shown = (f"    {printable(line)[:300]}" for line in lines)
    return "\n".join([clip(element.name, 200), *shown])


# === app manifests ================================================================================

MANIFEST_BYTES = 2 * 1024 * 1024  # of all plain files that are read
MANIFEST_SUFFIXES = (".yaml", ".yml", ".json")
PRINTED_BYTES = 4 * MANIFEST_BYTES  # of what kubectl prints, which is indented
MANIFEST_LINES = 100_000  # in it, one for each key and value; Python needs some 300 bytes for each
TOO_LARGE = "The manifests are too large. Shorten them."
NO_LABEL = f"{MANAGER}/nothing-"
CONFIGMAP_BYTES = 1024 * 1024  # of texts and files: what the API server takes
REQUEST_BYTES = 3 * 1024 * 1024 - 65_536  # of JSON: the same, the rest of the object left out
INVALID = Reason.MANIFEST_INVALID
REFUSED = Reason.MANIFEST_REFUSED
KINDS = {"Deployment": "apps/v1", "Service": "v1", "ConfigMap": "v1"}
AUTOSCALER = "HorizontalPodAutoscaler"
BUDGET = "PodDisruptionBudget"
# What may stand beside an app without a setting, and by which API it is read.
COMPANION_KINDS = {
    "Deployment": "apps/v1",
    AUTOSCALER: "autoscaling/v2",
    BUDGET: "policy/v1",
    "CronJob": "batch/v1",
    "Service": "v1",
    "ConfigMap": "v1",
}
# Where in its spec an object has the template of the pods that it makes: a Deployment, a CronJob,
# and the ScaledJob of an autoscaler.
TEMPLATES = (("template",), ("jobTemplate", "spec", "template"), ("jobTargetRef", "template"))
MOST_COMPANIONS = 50  # of an app in an environment
# Of one: what was written last is an annotation, of 256 KiB at most; and of all of an app.
COMPANION_BYTES = 128 * 1024
COMPANIONS_BYTES = 1024 * 1024
POD_BYTES = 16 * 1024  # of a pod with its status, at least
PODS_BYTES = 64 * 1024 * 1024  # of the pods of an app in an environment, which the API server keeps
OLD_APIS = ("extensions/v1beta1", "apps/v1beta1", "apps/v1beta2")
CONFIGMAP_DATA = ("data", "binaryData")
ACCOUNT_FIELDS = ("spec.serviceAccountName", "spec.serviceAccount")
CONFIGMAP_REFERENCES = ("configMap", "configMapRef", "configMapKeyRef")
ONE_BY_ONE = {"maxSurge": 1, "maxUnavailable": 0}
MOST_REPLICAS = 1000
SIZES = {  # fields that hold a number of pods; the last ones are those of KEDA
    *("spec.replicas", "spec.minReplicas", "spec.maxReplicas"),
    *("spec.parallelism", "spec.completions"),
    *("jobTargetRef.parallelism", "jobTargetRef.completions"),
    *("spec.minReplicaCount", "spec.maxReplicaCount", "spec.idleReplicaCount", "fallback.replicas"),
}
NUMBERS = {name.rpartition(".")[2] for name in SIZES}  # without what the field is in
MIN_READY_SECONDS = 10  # that a pod must have been ready for, if the app does not say it
LONGEST_DEADLINE = 86_400  # seconds that a rollout may take, whatever the app says
EXTERNAL_TYPES = ("NodePort", "LoadBalancer")
SERVICE_METADATA_BYTES = 32 * 1024  # beside the history, and what undoes a switch, in 256 KiB
# The fields of a Service that a switch carries, besides selector and ports, with their defaults:
# these change how traffic is routed, and can be undone.
SWITCHED_FIELDS: Object = {
    "sessionAffinity": "None",
    "sessionAffinityConfig": None,
    "internalTrafficPolicy": "Cluster",
    "trafficDistribution": None,
}
# Fields that are applied once a version is confirmed, since another value gives other addresses.
# Those that the cluster chooses where the manifest has none are left as they are then.
CONFIRMED_FIELDS = ("externalTrafficPolicy", "loadBalancerIP", "loadBalancerSourceRanges")
CHOSEN_FIELDS = ("ipFamilies", "ipFamilyPolicy", "healthCheckNodePort", "loadBalancerClass")
PROBE_LENGTH = 8000  # characters of the path and the headers of a readiness probe
URL_SAFE = "/%?&=+,;:@!$'()*[]~"
KUSTOMIZATIONS = ("kustomization.yaml", "kustomization.yml", "Kustomization")
# What tells where an object is written, in a text that nobody parses: YAML of the usual form.
BETWEEN_WORDS = re.compile(r"[\s\"',\[\]{}]+")
SEARCHED_LENGTH = 65_536  # characters of a kustomization in which names of files are looked for
WRITTEN_KIND = re.compile(r"(?m)^kind:[ \t]*[\"']?(\w+)[\"']?[ \t]*(?:#.*)?\r?$")
WRITTEN_NAME = re.compile(
    r"(?m)^metadata:[ \t]*"
    r"(?:\{(?:(?:[^{}\n]|\{[^{}\n]*\})*,)?[ \t]*"  # in braces, or on lines of equal indentation
    r"|(?:\r?\n)+( {1,8})(?! )(?:(?!name:).*\n(?:\r?\n)*\1)*?)"
    r"name:[ \t]*[\"']?([^\s,}\"']+)"
)
MOST_WRITTEN = 500  # objects and patches among which one is looked for
MOST_PLACES = 3  # of one object, patches among them
CHART = "Chart.yaml"
RENDER_CHART = "Commit what `helm template` prints of it."
OVERLAYS = re.compile(r"(^|/)(overlays|environments|envs?)/[^/]+$|(^|/)(staging|production|prod)$")
OUTSIDE = "What it names is outside of the commit. Copy it there."
# What kubectl says of a kustomization, and what it is called here; the first that matches counts.
KUSTOMIZE_WORDS = {
    r'Get "([^"]*)"': "{} is outside of the commit. Copy it there.",
    "no 'git' program on path": OUTSIDE,
    r"(?:failure on|security; file|target for path|new root) '/": OUTSIDE,
    r"KV pairs.* failure on '([^']+)'": "{} is not in the commit. "
    "If it is secret, do not commit it: make a Secret in each namespace.",
    r"failure on '([^']+)'": "{} is not in the commit. Add it, or do not name it.",
    r"security; file '([^']+)'": "{} is not below the folder of the kustomization that names it. "
    "Name a folder with a kustomization.",
    r"target for path '([^']+)': unable to find": "{} has no kustomization. Add one.",
    "must specify --enable-helm": f"It has a Helm chart. {RENDER_CHART}",
    "external plugins disabled": "It runs a plugin, which is not done here. Commit what it makes.",
    r"cycle detected: candidate root '([^']+)'": "{} includes itself. Do not name it there.",
    r"already registered id: ([^\s']+)": "{} occurs twice. Remove one of the two.",
    r"'([^']+)': missing Resource metadata": "{} is not a Kubernetes object.",
    r'(line \d+): mapping key \\*"([^"\\]+)\\*" already': "{} of a document: the key {} is there "
    "twice. Remove one of the two.",
}
# The same for plain files.
FILE_WORDS = {
    r"Object '(\w+)' is missing": "It is not a Kubernetes object: it lacks {}.",
    r"unmarshal \w+ into Go value of type unstructured": "A document is not a mapping. "
    "Links are not followed.",
    r"unmarshal (\w+) into Go struct field \w+\.(metadata\S*) of type \S*string": "{1} has a {0} "
    "where a text must stand. Put it in quotes.",
    r"unmarshal (\w+) into Go struct field \w+\.(metadata\S*)": "{1} cannot be a {0}.",
    r"is not a list: no Items": "A List stands in another one. Write its objects into one List.",
    r"yaml: (line \d+): (.*)": "{0} of a document: {1}",
    r"(?:yaml|json): (.*)": "{}",
}
OTHERS_SIGNALS = (-signal.SIGKILL, -signal.SIGTERM)  # as the kernel ends one where memory is short
MOST_WORDS = 20_000  # characters that are read of what kubectl says
# A Go program that gets no more memory ends by this fatal error, or breaks where it needs it.
GO_OUT_OF_MEMORY = re.compile(
    r"(?m)^(fatal error: .*(out of memory|cannot allocate memory)|SIGSEGV: |runtime: )"
)
# What a folder may not say, by the key under which it stands: each would let one application's
# commit move another's traffic, pods or credentials, or reach the nodes. All other fields of a
# Deployment and a Service are applied as they are, and Pod Security judges them. A field that is
# empty, 0 or false says nothing and may stay.
ROOT = "gives root on the node. Remove it."
EVICTS = "lets these pods evict those of other apps. Remove it."
ASKS = "makes the node ask another host. Remove it, so that the pod itself is asked."
WRITTEN = "is written by a tool or by the cluster. Remove it."
REPELS = "keeps pods of other namespaces away from nodes. Remove it."
CONTROL_PLANE = "let these pods run on the control plane. Use the key of another taint."
# What distributions call the taint of those nodes.
CONTROL_PLANE_TAINTS = [
    f"node-role.kubernetes.io/{role}"
    for role in ("control-plane", "master", "controlplane", "etcd")
]
REQUIRED_TERM = "requiredDuringSchedulingIgnoredDuringExecution"
APART = (
    "a required podAntiAffinity may only keep these pods apart from each other. "
    "Use preferredDuringSchedulingIgnoredDuringExecution."
)
REFUSED_FIELDS = {
    "spec.externalIPs": "takes traffic of other addresses. Use a Service of type LoadBalancer.",
    "spec.externalName": "leads to another host than the pods. Write its name into a ConfigMap.",
    "spec.publishNotReadyAddresses": "sends visitors to pods that are not ready. Remove it.",
    "spec.nodeName": "bypasses the scheduler. Use nodeSelector or affinity.",
    "spec.priorityClassName": EVICTS,
    "spec.priority": EVICTS,
    "spec.paused": "keeps a version from starting. Remove it.",
    "spec.hostNetwork": "shares the network of the node. Remove it.",
    "spec.hostPID": "shares the processes of the node. Remove it.",
    "spec.hostIPC": "shares the memory of the node's processes. Remove it.",
    "ports.hostPort": "takes a port of the node. Remove it, and use the Service.",
    "securityContext.privileged": ROOT,
    "windowsOptions.hostProcess": ROOT,
    f"{REQUIRED_TERM}.namespaces": REPELS,
    f"{REQUIRED_TERM}.namespaceSelector": REPELS,
    "httpGet.host": ASKS,
    "tcpSocket.host": ASKS,
    "annotations.kubectl.kubernetes.io/last-applied-configuration": WRITTEN,
    "annotations.deployment.kubernetes.io/revision": WRITTEN,
    **{f"{kind}.*": WRITTEN for kind in COMPANION_KINDS},
    "metadata.*": "is set by the cluster, or ties the object to others. Remove it.",
    "volumes.*": "reaches the node or a disk past the cluster. Use a persistentVolumeClaim.",
    "sources.*": "gives the pod credentials of the cluster. Mount a Secret of this namespace.",
}
OBJECT_FIELDS = {"apiVersion", "kind", "metadata"}
# Under these keys no other fields may stand; REFUSED_FIELDS has what is said of others as `key.*`.
ALLOWED_FIELDS = {
    **{kind: {*OBJECT_FIELDS, "spec"} for kind in COMPANION_KINDS},
    "ConfigMap": {*OBJECT_FIELDS, *CONFIGMAP_DATA, "immutable"},
    "metadata": {"name", "namespace", "labels", "annotations"},
    "volumes": {
        *("name", "configMap", "secret", "emptyDir", "projected", "downwardAPI", "csi"),
        *("persistentVolumeClaim", "ephemeral", "image"),
    },
    # of a projected volume; trust bundles are public
    "sources": {"configMap", "secret", "downwardAPI", "clusterTrustBundle"},
}
# What to do about an object of a kind that is not deployed. The default is for all other kinds.
BY_HAND = "List {entry} in deploy.ignore and apply it by hand"
BY_OTHERS = "list {entry} in deploy.ignore and apply it by hand"
LISTED = "List {kind} in deploy.companions to have it applied, or {entry} in deploy.ignore."
ADMINISTRATOR = f"It concerns the whole cluster. {BY_HAND}."
CLUSTER_KINDS = (
    *("Namespace", "ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"),
    *("PersistentVolume", "StorageClass", "PriorityClass", "IngressClass", "RuntimeClass"),
)
KIND_ADVICE = {
    **dict.fromkeys(sorted(NEVER_COMPANIONS), f"{BY_HAND}."),
    "Secret": "Create it by hand in each namespace, and remove it from git.",
    "Job": "Use an init container of the Deployment: it ends before a version gets traffic.",
    AUTOSCALER: f"Its scaleTargetRef must name a Deployment here. Correct it, or {BY_OTHERS}.",
    BUDGET: f"Its selector must reach pods of a Deployment here. Correct it, or {BY_OTHERS}.",
    "Service": f"Its selector must reach pods of a Deployment here. Correct it, or {BY_OTHERS}.",
    "StatefulSet": LISTED,
    "PersistentVolumeClaim": f"{BY_HAND}; the pods of both colours use it at once.",
    "ServiceAccount": f"{BY_HAND}; deploy.service_accounts lets pods run as it.",
    **dict.fromkeys(CLUSTER_KINDS, ADMINISTRATOR),
    "": LISTED,
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """An object as the commit has it, and the words that name it: its file, kind and name."""

    where: str
    content: Object

    @property
    def kind(self) -> str:
        """Its kind, which may be anything."""
        return str(self.content["kind"])

    @property
    def name(self) -> str:
        """Its name, which may be anything."""
        return str(self.content["metadata"]["name"])

    @property
    def entry(self) -> str:
        """What names it in a list of the settings."""
        return f"{self.kind}/{self.name}"

    @property
    def version(self) -> str:
        """The version of its API, as much as fits into a text."""
        return clip(str(self.content.get("apiVersion")), 40)


class Faults:
    """Collects what is refused of an app's manifests, each fault once, so that all is said."""

    def __init__(self) -> None:
        self._faults: dict[Fault, None] = {}

    def add(self, faults: Iterable[Fault]) -> None:
        """Collect faults."""
        self._faults |= dict.fromkeys(faults)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Collect what the block is refused for, another shape than expected too, and go on."""
        try:
            yield
        except ManifestError as refusal:
            self.add(refusal.faults)
        except SHAPE_ERRORS as failure:
            near = clip(repr(getattr(failure, "obj", None) or failure), 80)
            fault = f"The Deployment or the Service is not well formed, near {near}."
            advice = "`kubectl apply --dry-run=server` on them says more."
            self.add([Fault(f"{fault} {advice}", INVALID)])

    def require_none(self) -> None:
        """Raise ManifestError where any fault was collected."""
        if self._faults:
            raise ManifestError([*self._faults])


def read_manifests(root: Path, path: str) -> list[Manifest]:
    """Return the objects of an app's manifests folder, plain or built by kustomize.

    Raises StageError, and ConfigError where the system cannot keep kubectl from the network.
    """
    root = root.resolve()
    directory = (root / path).resolve()
    if not directory.is_dir() or not directory.is_relative_to(root):
        refuse(advice_for_no_folder(root, path))
    if (directory / CHART).exists():
        refuse(f"{path} is a Helm chart. {RENDER_CHART}")
    with tempfile.TemporaryDirectory(prefix="gitops-hook-") as home:
        return ManifestReader(root, directory, Path(home)).read()


@dataclass(frozen=True, slots=True)
class ManifestReader:
    """Reads one folder of a commit by kubectl, which has no network and no other files."""

    root: Path  # of the commit
    directory: Path
    home: Path  # an empty folder; kubectl has no other home

    def read(self) -> list[Manifest]:
        """Return the objects of the folder; raises StageError, ConfigError."""
        folder = self.directory
        kustomizations = [*filter(os.path.lexists, map(folder.joinpath, KUSTOMIZATIONS))]
        if kustomizations:
            return self.read_built(self.plain_file(kustomizations[0]))
        files = manifest_files(folder)
        if not files:
            refuse(advice_for_no_files(self.root, folder))
        return self.read_files({self.plain_file(file): file for file in files})

    def plain_file(self, file: Path) -> str:
        """Return the name of a file in the commit; raises StageError when it is no plain file."""
        source = str(file.relative_to(self.root))
        if file.is_symlink() or not file.is_file():
            refuse(f"{source}: It is not a plain file. Links are not followed.", INVALID)
        return source

    def read_files(self, sources: Mapping[str, Path]) -> list[Manifest]:
        """Return the objects of plain files, by one call of kubectl."""
        if sum(file.stat().st_size for file in sources.values()) > MANIFEST_BYTES:
            most = f"{MANIFEST_BYTES >> 20} MiB together"
            refuse(f"The manifests have more than {most}. Shorten them.", INVALID)
        for source, file in sources.items():
            try:
                file.read_text("utf-8")
            except UnicodeDecodeError:
                refuse(f"{source}: It is not UTF-8.", INVALID)
        # kubectl does not say from which file an object is, so one of ours precedes each file
        divider = f"File{uuid.uuid4().hex}"
        for i, (source, file) in enumerate(sources.items()):
            mark = {"apiVersion": "v1", "kind": divider, "metadata": {"name": source}}
            (self.home / f"{i:04}-.json").write_text(json.dumps(mark))
            (self.home / f"{i:04}.yaml").symlink_to(file)
        manifests = []
        for item in self.read_by("", "-f", self.home):
            if item["kind"] == divider:
                source = item["metadata"]["name"]
            else:
                manifests.append(self.manifest(source, item))
        return manifests

    def read_built(self, kustomization: str) -> list[Manifest]:
        """Return the objects of the folder's kustomization, each with where it is written."""
        items = self.read_by(kustomization, "-k", self.directory)
        written = written_objects(self.root, self.root / kustomization)
        through = f" (by way of {self.directory.relative_to(self.root)})"
        manifests = []
        for item in items:
            name = str(part_of(item, "metadata").get("name"))
            files = places_of(item["kind"], name, written)
            below = all(file.parent == self.directory for file in files)
            names = " and ".join(str(file.relative_to(self.root)) for file in files)
            source = f"{names}{'' if below else through}" or kustomization
            manifests.append(self.manifest(source, item))
        return manifests

    def manifest(self, source: str, item: Object) -> Manifest:
        """Return an object with the words that name it."""
        kind = item["kind"]
        metadata = item.get("metadata")
        name = metadata.get("name") if isinstance(metadata, dict) else None
        if not isinstance(name, str) or not name:  # of what stands in a List, kubectl tells nothing
            refuse(f"{source}: {clip(kind, 80)} has no metadata.name. Add it.", INVALID)
        return Manifest(f"{source}: {clip(f'{kind} {name}', 100)}", item)

    def read_by(self, kustomization: str, option: str, folder: Path) -> list[Object]:
        """Return the objects that kubectl reads from a folder; raises StageError, ConfigError."""
        # all that it does with an object is to take away a label that none has
        argv = ("kubectl", "label", "--local", "-o=json", NO_LABEL, option, str(folder))
        environ = {"PATH": str(self.home), "HOME": str(self.home), "GOMAXPROCS": "1"}
        run = partial(run_program, argv, KUBECTL_TIMEOUT, "", environ, PRINTED_BYTES)
        finished = confined(run, [self.root, self.home, program_path("kubectl")])
        if finished.code in OTHERS_SIGNALS:  # which is no fault of the manifests
            raise KubectlError(argv, finished.code, finished.stderr.decode(errors="replace"))
        if finished.code != 0:
            self.refuse_unread(kustomization, finished)
        printed = finished.stdout.decode(errors="replace").strip()
        if printed.count("\n") > MANIFEST_LINES:  # a line for each key and each value
            refuse(TOO_LARGE, INVALID)
        try:
            # texts have no line ends here, so that only between two objects stands this
            return list(json.loads("[" + printed.replace("\n}\n{", "\n},{") + "]"))
        except RecursionError:
            refuse(TOO_LARGE, INVALID)

    def refuse_unread(self, kustomization: str, finished: Finished) -> NoReturn:
        """Raise the StageError that says in plain words why kubectl could not read a folder."""
        stderr = finished.stderr.decode(errors="replace")
        where = kustomization or str(self.directory.relative_to(self.root))
        if finished.code is None:
            refuse(f"{where}: kubectl does not come to an end with it. Make it smaller.", INVALID)
        if finished.code == -signal.SIGXFSZ or GO_OUT_OF_MEMORY.search(stderr):
            refuse(f"{where}: {TOO_LARGE}", INVALID)
        if kustomization:
            cause = kustomize_cause(stderr, self.root)
            refused = self.or_elsewhere(in_plain_words(cause, KUSTOMIZE_WORDS))
            refuse(f"{where}: {refused or clip(cause)}", REFUSED if refused else INVALID)
        faults = [*dict.fromkeys(self.file_faults(stderr, where))]
        raise ManifestError([Fault(fault, INVALID) for fault in faults])

    def or_elsewhere(self, words: str) -> str:
        """Return words for what is missing, or other ones for what nobody has fetched."""
        match = re.match(r"(\S+) is not in the commit\.", words)
        top = self.directory.relative_to(self.root).parts[:1]
        if match and top and PurePosixPath(match[1]).parts[:1] != top:
            return f"{match[1]} is not below {top[0]}, the only folder that is read. Move it there."
        return words

    def file_faults(self, stderr: str, where: str) -> Iterator[str]:
        """Yield what kubectl complains of in plain files, each with the name of its file."""
        files = manifest_files(self.directory)
        for line in stderr.removeprefix("error: ").strip().split("\n")[: len(files) + 1000]:
            match = re.search(rf"{re.escape(str(self.home))}/([0-9]+)\.yaml\"?: (.*)", line)
            source = str(files[int(match[1])].relative_to(self.root)) if match else where
            cause = match[2] if match else line.replace(str(self.home), where)
            yield f"{source}: {in_plain_words(cause, FILE_WORDS) or clip(cause)}"


@dataclass(frozen=True, slots=True)
class Written:
    """An object, or a patch of one, as the text of a file seems to have it."""

    file: Path
    kind: str
    name: str


def written_objects(root: Path, kustomization: Path) -> list[Written]:
    """Return what the files seem to hold of which a kustomization consists, the farthest first.

    No YAML is parsed for that: a word of a kustomization that names a file, or a folder with a
    kustomization, is taken for a part of it. Of more than may be read there is nothing.
    """
    there: set[str] = set()
    for folder, folders, names in os.walk(root):
        folders[:] = {*folders} - {".git"}  # what git keeps is no part of the commit
        there |= {f"{folder}/{name}" for name in names}
    left = MANIFEST_BYTES
    files = [kustomization]
    written: list[Written] = []
    for file in files:  # which become more meanwhile
        left -= file.stat().st_size
        if left < 0:
            return []
        text = file.read_text("utf-8", "replace")
        if file.name in KUSTOMIZATIONS:
            named = {*named_files(there, file.parent, text)} - {*files}
            files += sorted(named)
            continue
        for document in text.split("\n---"):
            kind = WRITTEN_KIND.search(document)
            name = WRITTEN_NAME.search(document)
            if kind and name:
                written.append(Written(file, kind[1], name[2]))
    return written[::-1] if len(written) <= MOST_WRITTEN else []


def named_files(there: Set[str], folder: Path, text: str) -> Iterator[Path]:
    """Yield the plain files with manifests, of those that are there, that a kustomization names."""
    for word in dict.fromkeys(BETWEEN_WORDS.split(text[:SEARCHED_LENGTH])):
        path = os.path.normpath(f"{folder}/{word}")
        names = (path, *(f"{path}/{kustomization}" for kustomization in KUSTOMIZATIONS))
        for file in map(Path, {*names} & there):
            is_read = file.suffix in MANIFEST_SUFFIXES or file.name in KUSTOMIZATIONS
            if is_read and not file.is_symlink():
                yield file


def places_of(kind: str, name: str, written: Iterable[Written]) -> list[Path]:
    """Return the files with what is nearest to an object's name, none where that is no help."""
    alike = [w for w in written if w.kind == kind and w.name in name]  # prefix and suffix
    longest = max((len(w.name) for w in alike), default=0)
    files = [*dict.fromkeys(w.file for w in alike if len(w.name) == longest)]
    return files if len(files) <= MOST_PLACES else []


def manifest_files(folder: Path) -> list[Path]:
    """Return the files of a folder that kubectl reads, in the order of their names."""
    files = [f for f in sorted(folder.iterdir()) if f.suffix in MANIFEST_SUFFIXES]
    return [f for f in files if not f.name.startswith(".") and not f.is_dir()]


def folders_with_manifests(folder: Path) -> list[Path]:
    """Return the folders within a folder that have files with manifests."""
    return [f for f in sorted(folder.glob("*/**")) if f.is_dir() and manifest_files(f)]


def unread_warning(root: Path, path: str) -> str:
    """Return a line about folders that are not read, "" where a kustomization says what is."""
    folder = root / path
    if any(map(os.path.lexists, map(folder.joinpath, KUSTOMIZATIONS))):
        return ""
    names = [str(f.relative_to(root)) for f in folders_with_manifests(folder)]
    unread = "these folders are not read, since no kustomization names them"
    return f"\n  warning: {unread}: {clip(', '.join(names), 200)}" if names else ""


def kustomize_cause(stderr: str, root: Path) -> str:
    """Return what the last error of kustomize comes down to, without paths of this machine."""
    said = " ".join(re.split("(?m)^error: ", stderr[-MOST_WORDS:])[-1].split())
    said = said.replace(f"{root}/", "").replace(str(root), ".")
    # it says as whose part it reads a file, and then that the file is no folder
    innermost = said.rpartition("accumulating resources from ")[2]
    cause = innermost.partition(": must build at directory")[0]
    pairs = "KV pairs" if "KV pairs" in said else ""
    return f"{pairs} {cause}".strip()


def in_plain_words(cause: str, words: Mapping[str, str]) -> str:
    """Return the words for what kubectl says, "" where there are none."""
    for pattern, text in words.items():
        if match := re.search(pattern, cause):
            return text.format(*[clip(part, 80) for part in match.groups()])
    return ""


def advice_for_no_folder(root: Path, path: str) -> str:
    """Return what to do where a commit has no such folder, with the folders that it has there."""
    parent = PurePosixPath(path).parent
    near = root / parent
    names = [f.name for f in sorted(near.iterdir()) if f.is_dir()] if near.is_dir() else []
    there = f" {parent} has: {clip(', '.join(names), 120)}." if names and path != "." else ""
    return f"The commit has no folder {path!r}. Add it, or correct deploy.manifests.{there}"


def advice_for_no_files(root: Path, folder: Path) -> str:
    """Return what to do with a folder that has no manifests, by the folders that are in it."""
    inside = folders_with_manifests(folder)
    folders = [f.relative_to(root) for f in inside if f.name not in ("base", "bases")]
    charts = [f for f in inside if (f / CHART).exists()]
    nothing = f"The folder {str(folder.relative_to(root))!r} has no manifests"
    if charts:
        return f"{nothing}, but a Helm chart. {RENDER_CHART}"
    overlays = [f for f in folders if OVERLAYS.search(str(f))]
    if len(overlays) > 1:
        parent = overlays[0].parent
        names = ", ".join(f.name for f in overlays if f.parent == parent)
        advice = f"Set deploy.manifests to {parent}/{ENVIRONMENT}"
        return f"{nothing} itself. {advice}; there are: {clip(names, 120)}."
    if folders:
        names = clip(", ".join(map(str, folders)), 120)
        return f"{nothing} itself. Set deploy.manifests to one of: {names}."
    return f"{nothing}. Add some, or correct deploy.manifests."


@dataclass(frozen=True, slots=True)
class AppObjects:
    """What the manifests of an app hold."""

    deployment: Object
    service: Object
    configmaps: dict[str, Object]  # by name
    ignored: list[str]  # what was left out, by the app's `ignore`
    companions: list[Object] = dataclass_field(default_factory=list)  # what stands beside it

    @property
    def follows_size(self) -> bool:
        """Whether a version is to be as large as the live one, and not as the commit says."""
        spec = part_of(self.deployment, "spec")
        return spec.get("replicas") is None or self.size_limits is not None

    @property
    def size_limits(self) -> SizeLimits | None:
        """Between which sizes an autoscaler keeps the app, None where there is none."""
        front = self.deployment["metadata"]["name"]
        scalers = [c for c in self.companions if scaled_by(c) == front]
        return SizeLimits.of(part_of(scalers[0], "spec")) if scalers else None


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """How many pods an autoscaler keeps at least and at most."""

    least: int
    most: int

    @classmethod
    def of(cls, spec: Object) -> SizeLimits:
        """Return those of an autoscaler; raises ManifestError where they are no sizes."""
        least = spec.get("minReplicas")
        least = 1 if least is None else least
        most = spec.get("maxReplicas")
        if type(least) is not int or type(most) is not int or most < max(least, 1):
            refuse(f"{AUTOSCALER}: minReplicas and maxReplicas must be sizes of the app.", INVALID)
        return cls(max(least, 1), most)


def is_companion(item: Object, kind: str) -> bool:
    """Whether an object is of a kind that stands beside an app, and of the API that we read."""
    return (item.get("kind"), item.get("apiVersion")) == (kind, COMPANION_KINDS[kind])


def scaled_by(item: Object) -> str:
    """Return the name of the Deployment that an autoscaler scales; empty for anything else."""
    target = part_of(item, "spec", "scaleTargetRef")
    scales = is_companion(item, AUTOSCALER) and target.get("kind") == "Deployment"
    return str(target.get("name")) if scales else ""


def is_aimed_at(item: Object, deployment: Object) -> bool:
    """Whether an autoscaler, a budget or a Service is for the pods of a Deployment."""
    if is_companion(item, AUTOSCALER):
        return scaled_by(item) == str(deployment["metadata"]["name"])
    selector = part_of(item, "spec", "selector")
    if is_companion(item, "Service"):
        selector = {"matchLabels": selector}
    elif not is_companion(item, BUDGET):
        return False
    labels = part_of(deployment, "spec", "template", "metadata", "labels")
    with suppress(*SHAPE_ERRORS):
        return selects(selector, labels)
    return False


def check_objects(
    app: App, namespace: str, manifests: Iterable[Manifest], environment: str, faults: Faults
) -> AppObjects:
    """Return the objects of an app, and collect faults; raises ManifestError if one is missing."""
    chosen = SortedManifests(app, manifests)
    faults.add(map(Fault, chosen.faults(namespace, environment)))
    return chosen.objects(faults)


def object_words(item: Object) -> str:
    """Return the kind and the name of an object."""
    return f"{clip(item['kind'], 60)} {clip(item['metadata']['name'], 60)}"


def name_faults(objects: AppObjects, own: str, others: Sequence[App]) -> Iterator[str]:
    """Yield which objects of an app would have a name that another app of its environment needs.

    The other one may not have made that object yet. The names of its immutable ConfigMaps cannot be
    foretold here, but whoever knows its commits can: their form is kept free.
    """
    needed = {reference: app.name for app in others for reference in needed_names(app)}
    named = [(item["kind"], item["metadata"]["name"]) for item in objects.companions]
    names = {app.name for app in others}
    for kind, name in [*named, *(("ConfigMap", name) for name in objects.configmaps)]:
        where = f"{clip(kind, 60)} {clip(name, 60)}"
        if owner := needed.get((kind, name)):
            yield f"{where} has a name that app {owner} needs. Rename it."
        elif (kind, name) in named and (owner := owner_by_name(name, own, names)) in names:
            yield f"{where} has a name that begins with that of app {owner}. Rename it."
        elif others and kind == "ConfigMap" and (kind, name) in named and RECORD.search(name):
            yield f"{where} has the form of names of records, which every app needs. Rename it."


def owner_by_name(name: str, own: str, others: Iterable[str]) -> str:
    """Return the app with whose name that of an object begins, the longest one; "" for none."""
    fitting = (app for app in (own, *others) if f"{name}-".startswith(f"{app}-"))
    return max(fitting, key=len, default="")


def share_faults(objects: AppObjects, own: str, others: Sequence[App]) -> Iterator[str]:
    """Yield what pods may not say where other apps are in the environment, with what to do.

    The name of a pod by its subdomain, and that of a Service, are looked up by pods of all apps.
    """
    for item in (objects.deployment, *objects.companions):
        subdomain = pod_of(item).get("subdomain")
        if subdomain and owner_by_name(str(subdomain), own, (app.name for app in others)) != own:
            advice = "Rename it and its Service."
            yield f"{object_words(item)}: its subdomain does not begin with {own}. {advice}"


def without_service_links(objects: AppObjects) -> None:
    """Let pods get no variables of Services, which may be other apps', if they do not ask for it.

    Such a variable takes the place of one that the image sets: SERVER_PORT, say.
    """
    for item in (objects.deployment, *objects.companions):
        pod = pod_of(item)
        if pod and pod.get("enableServiceLinks") is None:
            pod["enableServiceLinks"] = False


def needed_names(app: App) -> Iterator[tuple[str, str]]:
    """Yield the kind and the name of each object that an app has in its environments."""
    yield from (("Deployment", f"{app.name}-{colour}") for colour in COLOURS)
    yield from (("Service", name) for name in (app.service_name, f"{app.name}-preview"))
    yield from (("ConfigMap", f"{app.name}-{suffix}") for suffix in ("adopted", "release"))


# How the names of releases, of copies and of logs end: with a hash, or with the id of a run.
RECORD = re.compile(r"-[0-9a-f]{8}\Z|\Alog-.+-[0-9a-f]{8}-[0-9a-f]{4,16}\Z")


class SortedManifests:
    """The manifests of an app, sorted by what becomes of them.

    `service` is what traffic comes by, and `front` the Deployment whose pods it selects, or the
    only one; each is None where there is none, or more than one could be it.
    """

    def __init__(self, app: App, manifests: Iterable[Manifest]) -> None:
        self.app = app
        self.all = [*manifests]
        self.used = [m for m in self.all if not app.deploy.ignores(m.kind, m.name)]
        # what gets the traffic comes first: what becomes of all others depends on that
        services = (m for m in self.of_kind("Service") if m.name == app.service_name)
        self.service = next(services, None)
        deployments = self.of_kind("Deployment")
        self.selected = [
            d for d in deployments if self.service and is_aimed_at(self.service.content, d.content)
        ]
        fronts = self.selected or deployments
        self.front = fronts[0] if len({d.name for d in fronts}) == 1 else None
        self.workers = [d for d in deployments if self.front and d is not self.front]
        pods = [pod_of(d.content) for d in (self.front, *self.workers) if d]
        configmaps = {m.name for m in self.of_kind("ConfigMap")}
        self.configmaps = configmaps & configmap_names(pods) if any(pods) else configmaps
        self.named_beside = configmap_names([m.content for m in self.used if m.kind not in KINDS])
        self.companions = [m for m in self.used if self.is_beside(m)]

    def of_kind(self, kind: str) -> list[Manifest]:
        """Return the manifests of one of our kinds."""
        return [m for m in self.used if (m.kind, m.version) == (kind, KINDS[kind])]

    def objects(self, faults: Faults) -> AppObjects:
        """Return the objects of the app; raises ManifestError where one of them is missing."""
        if self.front is None or self.service is None:
            faults.require_none()
            raise AssertionError("what is missing is a fault")
        configmaps = (m for m in self.of_kind("ConfigMap") if m.name in self.configmaps)
        copied = {m.name: m.content for m in configmaps}
        ignored = [m.where for m in self.all if self.app.deploy.ignores(m.kind, m.name)]
        beside = [m.content for m in self.companions]
        return AppObjects(self.front.content, self.service.content, copied, ignored, beside)

    def is_beside(self, manifest: Manifest) -> bool:
        """Whether an object is a companion: it stands beside the app, and follows its versions.

        A ConfigMap is one if no pod of the Deployment names it, or if a companion does.
        """
        if COMPANION_KINDS.get(manifest.kind) != manifest.version:
            return manifest.kind in self.app.deploy.companions and manifest.kind not in KINDS
        if manifest.kind == "ConfigMap":
            return self.front is not None and (
                manifest.name not in self.configmaps or manifest.name in self.named_beside
            )
        if self.front is None or manifest.kind == "CronJob":
            return manifest.kind not in ("Service", "Deployment")
        if manifest.kind == "Deployment":
            return manifest in self.workers
        is_live = manifest.name == self.app.service_name and manifest.kind == "Service"
        return not is_live and bool(self.aims(manifest))

    def aims(self, manifest: Manifest) -> list[Manifest]:
        """Return the Deployments that an autoscaler, a budget or a Service is for."""
        deployments = [d for d in (self.front, *self.workers) if d]
        return [d for d in deployments if is_aimed_at(manifest.content, d.content)]

    def faults(self, namespace: str, environment: str) -> Iterator[str]:
        """Yield everything that is wrong with them, each with what to do about it."""
        seen = set()
        claims = self.claims_of_one_node()
        beside = {id(manifest) for manifest in self.companions}
        for manifest in self.used:
            name = (manifest.kind, manifest.version, manifest.name)
            if name in seen:
                yield f"{manifest.where} occurs twice. Remove one of the two."
            elif self.is_deployed(manifest) or id(manifest) in beside:
                disks = claims if self.is_deployed(manifest) else None
                for fault in object_faults(
                    manifest.content, namespace, environment, self.app.deploy, disks
                ):
                    yield f"{manifest.where}: {fault}"
            else:
                yield f"{manifest.where}{self.kind_fault(manifest)}"
            seen.add(name)
        yield from self.companion_faults()
        if self.service is None:
            names = clip(", ".join(m.name for m in self.of_kind("Service")) or "none")
            fault = f"There is no Service named {self.app.service_name!r} (there are: {names})"
            yield f"{fault}. Add it, rename one, or set deploy.service."
        if self.front is None:
            yield from self.front_faults()

    def is_deployed(self, manifest: Manifest) -> bool:
        """Whether an object is one of ours. What could be the front, or the Service, counts too."""
        if manifest.version != KINDS.get(manifest.kind):
            return False
        if manifest.kind == "ConfigMap":
            return manifest.name in self.configmaps
        chosen = self.front if manifest.kind == "Deployment" else self.service
        return chosen is None or manifest is chosen

    def kind_fault(self, manifest: Manifest) -> str:
        """Return why an object is not deployed, and what to do."""
        values = {"entry": clip(manifest.entry, 100), "kind": clip(manifest.kind, 60)}
        if manifest.kind == "Deployment" and manifest.version in OLD_APIS:
            return f" is of the old {manifest.version}. Write apiVersion: apps/v1."
        wanted = COMPANION_KINDS.get(manifest.kind, manifest.version)
        group = manifest.version.rpartition("/")[0]
        if manifest.version != wanted and group == wanted.rpartition("/")[0]:
            return f" is of {manifest.version}. Write apiVersion: {wanted}."
        ours = manifest.version == KINDS.get(manifest.kind, wanted)
        advice = KIND_ADVICE.get(manifest.kind if ours else "", KIND_ADVICE[""])
        return f" of {manifest.version} is not deployed. {advice.format(**values)}"

    def companion_faults(self) -> Iterator[str]:
        """Yield what is wrong with the companions together."""
        if len(self.companions) > MOST_COMPANIONS:
            count = len(self.companions)
            advice = "List some of them in deploy.ignore."
            yield f"{count} objects stand beside the app, but {MOST_COMPANIONS} may. {advice}"
        taken = [f"{self.app.name}-{colour}" for colour in COLOURS]
        scalers: dict[str, str] = {}
        budgets = [m for m in self.companions if m.kind == BUDGET]
        whole = {m.name for m in budgets if self.front in self.aims(m)}
        halves = {f"{name}-{colour}" for name in whole for colour in COLOURS} - whole
        for manifest in self.companions:
            if manifest.kind == BUDGET and manifest.name in halves:
                yield f"{manifest.where} has the name of a colour of a budget. Rename it."
            if (manifest.kind, manifest.name) == ("Service", f"{self.app.name}-preview"):
                yield f"{manifest.where} has the name of the preview Service. Rename it."
            if manifest.kind == "Deployment" and manifest.name in taken:
                yield f"{manifest.where} has the name of a colour of the app. Rename it."
            if self.front and names_deployment(manifest, self.front.name):
                named = f"{manifest.where} names Deployment {clip(self.front.name, 60)}"
                advice = (
                    f"Use a {AUTOSCALER}, or list {clip(manifest.entry, 100)} in deploy.ignore."
                )
                yield f"{named}, which runs as {' or '.join(taken)}. {advice}"
            aims = self.aims(manifest)
            if self.front in aims and len(aims) > 1:
                names = clip(", ".join(d.name for d in aims))
                advice = "Write one for each, and tell their pods apart by a label."
                yield f"{manifest.where} selects the pods of {names}. {advice}"
            if target := scaled_by(manifest.content):
                if target in scalers:
                    both = clip(f"{scalers[target]}, {manifest.name}")
                    yield f"{both} scale the same Deployment. Keep one of them."
                scalers[target] = manifest.name

    def front_faults(self) -> Iterator[str]:
        """Yield why it is not clear which Deployment gets the traffic."""
        if not any(m.kind == "Deployment" for m in self.used):
            yield "There is no Deployment. Add one, whose pods the Service selects."
        elif self.service and self.of_kind("Deployment"):
            names = clip(", ".join(m.name for m in self.selected) or "none")
            fault = f"Service {self.app.service_name!r} must select the pods of one Deployment"
            yield f"{fault} (selected: {names}). Correct its selector."

    def claims_of_one_node(self) -> set[str]:
        """Return the names of claims, also ignored ones, whose disk only one node can use."""
        claims = [m for m in self.all if m.kind == "PersistentVolumeClaim"]
        shared = ("ReadWriteMany", "ReadOnlyMany")
        modes = {m.name: part_of(m.content, "spec").get("accessModes") for m in claims}
        lists = {name: m if isinstance(m, list) else [] for name, m in modes.items()}
        return {name for name, m in lists.items() if not any(mode in m for mode in shared)}


def part_of(value: Any, *keys: str) -> Object:
    """Return a mapping within parsed JSON, an empty one where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def names_deployment(manifest: Manifest, name: str) -> bool:
    """Whether an object of a listed kind is for the Deployment of a name, which it scales, say."""
    if manifest.kind in COMPANION_KINDS:
        return False
    for key, part in walk("", manifest.content.get("spec")):
        if isinstance(part, dict) and part.get("name") == name:
            default = "Deployment" if key == "scaleTargetRef" else ""
            if (part.get("kind") or default) == "Deployment":
                return True
    return False


def pod_of(item: Object) -> Object:
    """Return the spec of the pods that an object beside an app makes; empty where it makes none."""
    pods = (part_of(item, "spec", *path, "spec") for path in TEMPLATES)
    return next((pod for pod in pods if pod.get("containers")), {})


def configmap_names(objects: Any) -> set[str]:
    """Return the names of the ConfigMaps that are used by pods, or by what makes some."""
    parts = [part for key, part in walk("", objects) if key in CONFIGMAP_REFERENCES]
    names = [part.get("name") for part in parts if isinstance(part, dict)]
    return {name for name in names if isinstance(name, str)}


def selects(selector: Object, labels: Mapping[str, Any]) -> bool:
    """Whether a label selector that asks for anything reaches pods with these labels."""
    wanted = part_of(selector, "matchLabels")
    terms = selector.get("matchExpressions") or []
    # a text: comparing anything deeper may not end well
    pairs = (isinstance(v, str) and labels.get(key) == v for key, v in wanted.items())
    held = (term_holds(term, labels.get(term["key"])) for term in terms)
    return bool(wanted or terms) and all(pairs) and all(held)


def term_holds(term: Object, value: Any) -> bool:
    """Whether the value of a label, None where there is none, is as a selector's term wants it."""
    values = term.get("values") or ()
    holds = {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }
    return holds.get(term["operator"], False)


def object_faults(
    item: Object,
    namespace: str,
    environment: str,
    deploy: DeploySettings,
    claims: Set[str] | None,
) -> Iterator[str]:
    """Yield what an object of an app may not say, each with what to do about it.

    `claims` are those of one node; None for what stands beside an app, of which two versions never
    run at once.
    """
    shown = {k: "any" if k in CONFIGMAP_DATA else v for k, v in item.items()}
    for key, part in walk(item["kind"], shown):
        if key == "tolerations" and isinstance(part, dict) and tolerates_control_plane(part):
            yield f"{key} {CONTROL_PLANE}"
        for field, value in part.items() if isinstance(part, dict) else ():
            name = f"{key}.{clip(field, 80)}"
            fault = REFUSED_FIELDS.get(name)
            # what is empty says nothing, but an empty selector selects everything
            if not value and name not in SIZES and not (value == {} and fault):
                continue
            if not fault and key in ("labels", "annotations") and field.startswith(f"{MANAGER}/"):
                fault = f"is reserved for {MANAGER}. Remove it."
            elif not fault and field not in ALLOWED_FIELDS.get(key, {field}):
                fault = REFUSED_FIELDS[f"{key}.*"]
            elif name == "metadata.namespace" and value != namespace:
                setting = f"namespaces.{environment or '<environment>'}"
                fault = f"is not {namespace!r}. Remove it, or change {setting}."
            if fault := fault or value_fault(name, value, deploy, claims):
                yield f"{name} {fault}"


def value_fault(name: str, value: Any, deploy: DeploySettings, claims: Set[str] | None) -> str:
    """Return why a field may not have its value, and what to do; empty where it may."""
    if name in ACCOUNT_FIELDS and value not in ("default", *deploy.service_accounts):
        return "is not in deploy.service_accounts. Remove it, or add it there."
    if claims is None and name in SIZES and not is_size(value):
        return f"is no whole number from 0 to {MOST_REPLICAS}. Use one."
    if claims is not None and (name, value) == ("strategy.type", "Recreate"):
        return "is Recreate, but two versions run side by side. Use RollingUpdate and shared data."
    claimed = name == "persistentVolumeClaim.claimName" and isinstance(value, str)
    if claimed and value in (claims or ()):
        return "is a disk of one node, but two versions run side by side. Use ReadWriteMany."
    if name == "spec.progressDeadlineSeconds" and isinstance(value, int):
        return "is more than a day. Use less." if value > LONGEST_DEADLINE else ""
    return ""


def is_size(value: Any) -> bool:
    """Whether a value is a number of pods that is possible. None says nothing."""
    return value is None or (type(value) is int and 0 <= value <= MOST_REPLICAS)


def tolerates_control_plane(toleration: Object) -> bool:
    """Whether a toleration lets pods run on nodes of the control plane, or on all nodes."""
    key = toleration.get("key") or ""
    return not key or key in CONTROL_PLANE_TAINTS


def walk(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield a value and all that is in it, as items() does: each with the key it stands under."""
    pending = [(key, value)]
    while pending:  # of any depth
        name, part = pending.pop()
        yield name, part
        if isinstance(part, dict):
            pending += reversed(part.items())
        elif isinstance(part, list):
            pending += [(name, element) for element in reversed(part)]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a run goes in an environment: the idle colour, and as many replicas as the live one."""

    colour: str
    replicas: int


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
    # What stands beside the app, before it is given a colour; None where nobody recorded it, as
    # before version 0.2: then nothing is known of it, and nothing is touched.
    companions: list[Object] | None = None

    def companions_for(self, app: str, selector: Mapping[str, str] | None = None) -> list[Object]:
        """Return the companions of an app, pointed at this release, or at what a selector says."""
        live = selector or self.selector
        beside = [(item, self.workers_of(item)) for item in self.companions or ()]
        return [of_workers(item, ws) if ws else coloured(item, app, live) for item, ws in beside]

    @property
    def plain_budgets(self) -> list[Object]:
        """The budgets of the app without a colour, as they would count the pods of both."""
        budgets = [item for item in self.companions or () if is_companion(item, BUDGET)]
        return [item for item in budgets if not self.workers_of(item)]

    def workers_of(self, item: Object) -> list[Object]:
        """Return the workers whose pods a companion is for, which then has no colour."""
        return [worker for worker in self.workers if is_aimed_at(item, worker)]

    @property
    def workers(self) -> list[Object]:
        """The other Deployments, which follow traffic."""
        return [item for item in self.companions or () if is_companion(item, "Deployment")]

    @property
    def worker_configmaps(self) -> list[Object]:
        """The copies of ConfigMaps that workers name."""
        names = configmap_names([pod_of(worker) for worker in self.workers])
        return [copied for copied in self.configmaps if copied["metadata"]["name"] in names]

    @property
    def ports(self) -> list[Object]:
        """The ports of the run's Service."""
        return list(self.service["spec"]["ports"])

    @property
    def wanted(self) -> int:
        """How many replicas the run was rendered with."""
        return int(self.deployment["spec"]["replicas"])

    @property
    def pod(self) -> Object:
        """The spec of its pods."""
        spec: Object = self.deployment["spec"]["template"]["spec"]
        return spec

    def checks(self, health: Health) -> ReleaseChecks:
        """Return how its pods, and a Service before them, are asked whether they are healthy."""
        return release_checks(health, self.pod, self.ports)

    def configmap(self, app: str) -> Object:
        """Return the immutable ConfigMap that records the release."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.companions is None:
            del content["companions"]
        packed = packed_json(content)
        if (count := content_bytes(binaryData={"release": packed})) > CONFIGMAP_BYTES:
            size = f"{count} bytes when compressed, but {CONFIGMAP_BYTES} are possible"
            refuse(f"The manifests have {size}. Make the ConfigMaps smaller.")
        return release_record(app, packed)

    @classmethod
    def from_configmap(cls, record: Object) -> Release:
        """Return the release that a ConfigMap records; raises StageError when it cannot be read."""
        try:
            content = unpacked_json(record["binaryData"]["release"])
            names = [f.name for f in fields(cls) if f.name in content]
            return cls(**{name: content[name] for name in names})
        except (KeyError, TypeError, ValueError, zlib.error):
            refuse("The release record cannot be read.", INVALID)


def render(app: App, run: Run, image: str, placement: Placement, objects: AppObjects) -> Release:
    """Return everything that a run puts into a placement, and change nothing.

    Only what is read here must have the right shape; the API server judges the rest. Raises
    ManifestError with everything that is refused.
    """
    faults = Faults()
    label = colour_label(objects.deployment)
    selector = {LABEL_APP: app.name, label: placement.colour, LABEL_RUN: run.id}
    service: Object = {}
    deployment: Object = {}
    with faults.collect():
        objects = copy.deepcopy(objects)
    with faults.collect():
        service = rendered_service(app, objects.service, selector)
    copies: dict[str, Object] = {}  # of ConfigMaps, by the names in the manifests
    for name, item in objects.configmaps.items():
        with faults.collect():
            copies[name] = configmap_copy(app, item)
    companions = rendered_companions(app, objects, image, copies, faults)
    with faults.collect():
        pod = objects.deployment["spec"]["template"]["spec"]
        with faults.collect():
            set_references(pod, copies)
        with faults.collect():
            set_images(app, pod, image)
        with faults.collect():
            if service:
                set_probes(app, pod, service["spec"]["ports"])
    with faults.collect():
        deployment = rendered_deployment(app, objects, selector, placement)
        deployment["metadata"]["annotations"][ANNOTATION_COMMIT] = run.commit
    faults.require_none()
    rendered = (deployment, [*copies.values()], service, companions)
    release = Release(run.id, run.commit, image, placement.colour, selector, *rendered)
    require_storable(release, app.name, objects.size_limits)
    return release


def rendered_deployment(
    app: App, objects: AppObjects, selector: Mapping[str, str], placement: Placement
) -> Object:
    """Return a run's Deployment in its placement, as large as it is to be."""
    limits = objects.size_limits
    written = objects.deployment
    name = f"{app.name}-{placement.colour}"
    deployment = new_object("Deployment", name, selector, written["metadata"])
    committed = None if limits else written["spec"].get("replicas")
    replicas = wanted_size(committed, placement.replicas, limits)
    spec = rendered_spec(app, written["spec"], selector, replicas)
    labels = spec["template"]["metadata"]["labels"]
    terms = required_terms(spec["template"]["spec"])
    where = f"Deployment {clip(written['metadata']['name'], 60)}"
    bind_terms(terms, labels, spec["selector"]["matchLabels"], where)
    return {**deployment, "spec": spec}


def require_storable(release: Release, app: str, limits: SizeLimits | None) -> None:
    """Raise ManifestError if a release, or all its pods together, are too large to be kept."""
    release.configmap(app)
    companions = release.companions or []
    numbers = {scaled_by(item): part_of(item, "spec").get("maxReplicas") for item in companions}
    total = 0
    for item in (release.deployment, *companions):
        scaled = numbers.get(item["metadata"]["name"])
        most = limits.most if limits and item is release.deployment else scaled
        asked = [most, *(value for key, value in walk("", item) if key in NUMBERS)]
        number = max((n for n in asked if type(n) is int), default=1)
        templates = [part_of(item, "spec", *path) for path in TEMPLATES]
        sizes = [max(POD_BYTES, json_bytes(template)) for template in templates if template]
        total += number * max(sizes, default=0)
    if total > PODS_BYTES:
        advice = "Ask for fewer, or make their templates smaller."
        refuse(f"All pods together have more than {PODS_BYTES >> 20} MiB. {advice}")


def rendered_companions(
    app: App, objects: AppObjects, image: str, copies: Mapping[str, Object], faults: Faults
) -> list[Object]:
    """Return what stands beside an app, with our labels and the built image, in no colour yet."""
    rendered: list[Object] = []
    scaled = {scaled_by(item) for item in objects.companions}
    front = pod_of(objects.deployment)
    for item in objects.companions:
        with faults.collect():
            if is_companion(item, "Deployment"):
                set_references(pod_of(item), copies)
                # without a probe a worker is ready at once, even one that ends at once
                if item["spec"].get("minReadySeconds") is None:
                    item["spec"]["minReadySeconds"] = MIN_READY_SECONDS
                if item["metadata"]["name"] in scaled:  # an autoscaler says how many there are
                    item["spec"].pop("replicas", None)
            if pod := pod_of(item):
                put_image(built_names(app, front), pod, image)
            rendered.append(rendered_companion(app, item))
    with faults.collect():
        if json_bytes(rendered) > COMPANIONS_BYTES:
            advice = "Make them smaller, or list some of them in deploy.ignore."
            refuse(
                f"The objects beside the app have more than {COMPANIONS_BYTES >> 10} KiB. {advice}"
            )
    return rendered


def companion_labels(app: str) -> dict[str, str]:
    """Return the labels by which something that stands beside an app is ours."""
    return {LABEL_MANAGED: MANAGER, LABEL_APP: app, LABEL_STAGE: COMPANION}


def rendered_companion(app: App, written: Object) -> Object:
    """Return one of them; raises StageError where it cannot be applied."""
    item = copy.deepcopy(written)
    meta = item["metadata"]
    where = object_words(item)
    labels = {**(meta.get("labels") or {}), **companion_labels(app.name)}
    item["metadata"] = {"name": meta["name"], "labels": labels}
    if meta.get("annotations"):
        item["metadata"]["annotations"] = {**meta["annotations"]}
    if is_companion(item, "Service"):
        ports_like(item["spec"].get("ports") or ())  # must have the shape that is read later
    data = item.get("data") or {} if is_companion(item, "ConfigMap") else {}
    if loose := [key for key, value in data.items() if not isinstance(value, str | None)]:
        refuse(f"{where}: {clip(loose[0], 60)} is not a text. Put it in quotes.", INVALID)
    keep_companion_apart(app, item, where)
    if is_companion(item, "Deployment"):
        label_worker(app, item)
    # the annotation is written as Python writes JSON, the object as Go does
    if max(len(json.dumps(item)), json_bytes(item)) > COMPANION_BYTES:
        advice = "Make it smaller, or list it in deploy.ignore."
        refuse(f"{where} has more than {COMPANION_BYTES >> 10} KiB. {advice}")
    return item


def keep_companion_apart(app: App, item: Object, where: str) -> None:
    """Label the pods of a companion that must be apart, and let that concern them alone.

    Raises ManifestError where it concerns others, or where it is not known whose pods it is about.
    """
    unbound = len(required_terms(item))
    for path in TEMPLATES:
        template = part_of(item, "spec", *path)
        if terms := required_terms(template.get("spec")):
            meta = template.get("metadata") or {}
            labels = {**(meta.get("labels") or {}), LABEL_BESIDE: app.name}
            template["metadata"] = {**meta, "labels": labels}
            bind_terms(terms, labels, {LABEL_BESIDE: app.name}, where)
            unbound -= len(terms)
    if unbound:
        refuse(f"{where}: {APART}")


def label_worker(app: App, worker: Object) -> None:
    """Label the pods of a worker by their template, so that they are known from those before."""
    template = worker["spec"]["template"]
    text = json.dumps([app.name, worker["metadata"]["name"], template], sort_keys=True)
    meta = template.get("metadata") or {}
    digits = hashlib.sha256(text.encode()).hexdigest()[:16]
    template["metadata"] = {**meta, "labels": {**(meta.get("labels") or {}), LABEL_WORKER: digits}}


def of_workers(item: Object, workers: Iterable[Object]) -> Object:
    """Return a companion of workers; a budget counts no pods but theirs, of this version.

    What it selects besides cannot be evicted, whoever's pods these are.
    """
    labels = [label for worker in workers if (label := worker_label(worker))]
    if not is_companion(item, BUDGET) or not labels:
        return item
    spec = part_of(item, "spec")
    selector = part_of(spec, "selector")
    own = {"key": LABEL_WORKER, "operator": "In", "values": labels}
    terms = [*(selector.get("matchExpressions") or ()), own]
    return {**item, "spec": {**spec, "selector": {**selector, "matchExpressions": terms}}}


def worker_label(worker: Object) -> str:
    """Return the label by which the pods of a worker are known, "" where it has none."""
    labels = part_of(worker, "spec", "template", "metadata", "labels")
    return str(labels.get(LABEL_WORKER, ""))


def coloured(item: Object, app: str, selector: Mapping[str, str]) -> Object:
    """Return a companion pointed at the pods that a selector selects."""
    colour = colour_of(selector)
    own = {key: value for key, value in selector.items() if key != LABEL_RUN}
    spec = part_of(item, "spec")
    if is_companion(item, AUTOSCALER):
        target = {"apiVersion": KINDS["Deployment"], "kind": "Deployment"}
        return {**item, "spec": {**spec, "scaleTargetRef": {**target, "name": f"{app}-{colour}"}}}
    if is_companion(item, "Service"):
        return {**item, "spec": {**spec, "selector": {**selector}}}
    if is_companion(item, BUDGET):
        labels = {**part_of(spec, "selector", "matchLabels"), **own}
        selected = {**part_of(spec, "selector"), "matchLabels": labels}
        meta = {**item["metadata"], "name": f"{item['metadata']['name']}-{colour}"}
        return {**item, "metadata": meta, "spec": {**spec, "selector": selected}}
    return item


def set_references(pod: Object, copies: Mapping[str, Object]) -> None:
    """Let a pod name the copies of its ConfigMaps."""
    for key, value in walk("", pod):
        names_one = key in CONFIGMAP_REFERENCES and isinstance(value, dict)
        if names_one and (copied := copies.get(value.get("name", ""))):
            value["name"] = copied["metadata"]["name"]


def rendered_service(app: App, written: Object, selector: Mapping[str, str]) -> Object:
    """Return the live Service as a first deployment creates it."""
    spec = written["spec"]
    ports = ports_like(spec["ports"])
    name = app.service_name
    kind = spec.get("type") or "ClusterIP"
    if not ports or (len(ports) > 1 and not all(p.get("name") for p in ports)):
        refuse(f"Service {name} must have ports, and several ports must have names.", INVALID)
    if kind == "ExternalName":
        refuse(f"Service {name} is an ExternalName, which selects no pods. Change its type.")
    if kind not in EXTERNAL_TYPES and any(port.get("nodePort") for port in spec["ports"]):
        advice = "Set the type to NodePort or LoadBalancer, or remove nodePort."
        refuse(f"Service {name} has a nodePort, but the type {clip(str(kind), 40)}. {advice}")
    labels = {LABEL_APP: app.name, LABEL_STAGE: "live"}
    service = new_object("Service", name, labels, written["metadata"])
    size = len(json.dumps(service["metadata"]))
    if size > SERVICE_METADATA_BYTES:
        most = f"{SERVICE_METADATA_BYTES >> 10} KiB"
        refuse(f"Service {name}: labels and annotations have more than {most}. Shorten them.")
    return {**service, "spec": {**spec, "selector": selector}}


def configmap_copy(app: App, written: Object) -> Object:
    """Return the immutable copy of a ConfigMap, with its labels and annotations."""
    name = written["metadata"]["name"]
    content = {key: written.get(key) or {} for key in CONFIGMAP_DATA}
    meta = {k: v for k, v in written["metadata"].items() if v and k in ("labels", "annotations")}
    if loose := [k for k, v in content["data"].items() if not isinstance(v, str | None)]:
        where = f"ConfigMap {clip(name, 60)}: {clip(loose[0], 60)}"
        refuse(f"{where} is not a text. Put it in quotes.", INVALID)
    return immutable(name, {LABEL_APP: app.name}, meta, **content)


def set_images(app: App, pod: Object, image: str) -> None:
    """Put the built image, by digest, wherever the manifests name it; end the run if nowhere."""
    names = built_names(app, pod)
    if names and not any(repository_of(c["image"]) in names for c in all_containers(pod)):
        needed = f"No container has the image {app.build.image!r} (or {app.name!r})"
        refuse(f"{needed}, so the build would not be deployed. Name it in the Deployment.")
    put_image(names, pod, image)


def built_names(app: App, pod: Object) -> set[str]:
    """Return by which names, without tags, the objects of an app mean the built image.

    If the app's own pod has none of the expected ones, it is what its only container has. There are
    none if nothing is built.
    """
    if app.build.builder == "none":
        return set()
    names = {repository_of(app.build.image), app.name}
    images = [repository_of(c["image"]) for c in (all_containers(pod) if pod else ())]
    if names.isdisjoint(images) and len(pod.get("containers") or ()) == 1:
        names.add(images[0])
    return names


def put_image(names: Set[str], pod: Object, image: str) -> None:
    """Put the built image wherever a pod means it; if none is built, all must have a digest."""
    images = [] if names else [c["image"] for c in all_containers(pod)]
    if loose := [i for i in images if not DIGEST.fullmatch(i.partition("@")[2])]:
        why = "build.builder is none, so every image must be"
        refuse(f"The image {clip(loose[0], 120)!r} is not named by digest. {why}.")
    for container in all_containers(pod):
        if repository_of(container["image"]) in names:
            container["image"] = image


def all_containers(pod: Object) -> list[Object]:
    """Return the containers of a pod, those that begin before the others too."""
    return [*pod["containers"], *(pod.get("initContainers") or ())]


def image_remarks(app: App, objects: AppObjects) -> Iterator[str]:
    """Yield what a reader of a plan should know of the images that a commit names."""
    expected = {repository_of(app.build.image), app.name}
    names = built_names(app, pod_of(objects.deployment))
    registry = repository_of(app.build.image).rpartition("/")[0]
    for item in (objects.deployment, *objects.companions):
        beside = (
            "" if item is objects.deployment else f"{item['kind']} {item['metadata']['name']}, "
        )
        pod = pod_of(item)
        for container in all_containers(pod) if pod else ():
            image = container["image"]
            repository = repository_of(image)
            name = f"{beside}container {clip(str(container.get('name')), 60)}"
            words = f"{clip(name, 160)}: image {clip(image, 120)}"
            if repository in names:
                if repository not in expected:
                    yield f"{words} is replaced by the built image"
            elif registry and repository.startswith(f"{registry}/") and "@sha256:" not in image:
                yield f"{words} is not named by digest, so it may change without a push"


def repository_of(image: str) -> str:
    """Return the name of an image without its tag and digest, nor the registry that goes unsaid."""
    host, slash, name = image.partition("@")[0].rpartition("/")
    return re.sub(r"^(index\.)?docker\.io/", "", f"{host}{slash}{name.partition(':')[0]}")


def set_probes(app: App, pod: Object, ports: Sequence[Object]) -> None:
    """Add a readiness probe and a preStop sleep where the app has none; never a liveness probe."""
    set_readiness_probe(app.deploy.health, pod, ports)
    # Kubernetes refuses a sleep that is longer than the grace period
    grace = pod.get("terminationGracePeriodSeconds")
    if seconds := min(5, 30 if grace is None else grace):
        sleep = {"preStop": {"sleep": {"seconds": seconds}}}
        for container in pod["containers"]:
            own = {k: v for k, v in (container.get("lifecycle") or {}).items() if v is not None}
            container["lifecycle"] = {**sleep, **own}


def set_readiness_probe(health: Health, pod: Object, ports: Sequence[Object]) -> None:
    """Add a readiness probe if there is none and one is set; refuse what cannot be asked."""
    if not tcp_ports(ports):
        refuse("The Service has no TCP port, so its health cannot be judged. Add one.")
    running = running_containers(pod)
    serving = serving_of(health, pod, ports)
    if port_number(running, serving.target) is None:
        where = f"the targetPort {clip(str(serving.target), 60)!r}"
        refuse(f"No container has a port with {where}.", INVALID)
    if health.port and port_number(running, health.port) is None:
        refuse(f"deploy.health.port {health.port!r} is no port of the pods. Correct one of them.")
    if health.path and not serving.container.get("readinessProbe"):
        headers = [{"name": name, "value": value} for name, value in health.headers.items()]
        more = {"scheme": health.scheme, "httpHeaders": headers}
        asked = {"path": health.path, "port": health.port or serving.target}
        probe = {"httpGet": {**asked, **{key: value for key, value in more.items() if value}}}
        times = {"initialDelaySeconds": 5, "periodSeconds": 5}
        serving.container["readinessProbe"] = {**probe, **times}
    refuse_probe(serving.container)


def refuse_probe(container: Object) -> None:
    """Raise StageError for a readiness probe by HTTP that cannot be asked as it says."""
    probe = (container.get("readinessProbe") or {}).get("httpGet") or {}
    where = f"The readinessProbe of container {clip(container['name'], 63)}"
    if probe and port_number([container], probe["port"]) is None:
        named = f"port {clip(str(probe['port']), 60)!r}, which the container does not have"
        refuse(f"{where} asks {named}. Name the port there.", INVALID)
    headers = probe.get("httpHeaders") or ()
    if len(json.dumps([probe.get("path"), headers])) > PROBE_LENGTH:
        refuse(f"{where} has more than {PROBE_LENGTH} characters. Shorten it.", INVALID)
    if wrong := [h["name"] for h in headers if not header_line(h)]:
        named = f"the header {clip(repr(wrong[0]), 60)}, which cannot be sent"
        refuse(f"{where} has {named}. Write its value on one line.", INVALID)


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthCheck:
    """What is asked at an address to learn whether an app is healthy."""

    port: int
    host: str = ""
    path: str = ""  # of a request; where there is none, a TCP connection is all that is asked for
    scheme: str = "HTTP"
    headers: tuple[str, ...] = ()  # lines

    def __str__(self) -> str:
        return self.path or f"port {self.port}"

    @property
    def request(self) -> bytes:
        """The request; the app's own headers take the place of ours."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        agent = f"User-Agent: {MANAGER}/{__version__}"
        ours = (f"Host: {host}:{self.port}", agent, "Accept: */*", "Connection: close")
        theirs = {line.partition(":")[0].lower() for line in self.headers}
        lines = [line for line in ours if line.partition(":")[0].lower() not in theirs]
        return "\r\n".join([f"GET {self.path} HTTP/1.1", *lines, *self.headers, "", ""]).encode()


@dataclass(frozen=True, slots=True)
class ReleaseChecks:
    """How the pods of a release are asked, and a Service before them."""

    pods: HealthCheck
    service: HealthCheck


def release_checks(health: Health, pod: Object, ports: Sequence[Object]) -> ReleaseChecks:
    """Return how pods with this spec are asked, and a Service with these ports before them.

    As their readiness probe asks by HTTP, but for what the settings say. Another probe is for the
    kubelet alone: then, and without any probe, a connection is enough. So it is at a Service that
    does not lead to the port.
    """
    running = running_containers(pod)
    serving = serving_of(health, pod, ports)
    probe = serving.http_probe
    wanted = (health.port, probe.get("port"), serving.target)
    numbers = (port_number([serving.container, *running], port) for port in wanted if port)
    check = HealthCheck(port=next(filter(None, numbers), serving.port["port"]))
    if health.path or probe:
        written = [{"name": k, "value": v} for k, v in health.headers.items()]
        lines = map(header_line, written or probe.get("httpHeaders") or ())
        path = quote((health.path or probe.get("path") or "").partition("#")[0], URL_SAFE)
        check = replace(
            check,
            path=path if path.startswith("/") else f"/{path}",
            scheme=health.scheme or probe.get("scheme") or "HTTP",
            headers=tuple(filter(None, lines)),
        )
    leading = [
        port["port"]
        for port in (serving.port, *tcp_ports(ports))
        if port_number(running, target_of(port)) == check.port
    ]
    other = HealthCheck(port=serving.port["port"])
    service = replace(check, port=leading[0]) if leading else other
    return ReleaseChecks(check, service)


def header_line(header: Object) -> str:
    """Return a header of a probe as a line of a request, "" where it would be more than that."""
    name = str(header["name"])
    value = str(header.get("value") or "")
    fits = re.fullmatch(r"[^\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]*", value)
    return f"{name}: {value}" if fits and HEADER_NAME.fullmatch(name) else ""


def running_containers(pod: Object) -> list[Object]:
    """Return the containers of a pod that run as long as it does, side-cars among them."""
    inits = pod.get("initContainers") or ()
    return [*pod["containers"], *(c for c in inits if c.get("restartPolicy") == "Always")]


def tcp_ports(ports: Iterable[Object]) -> list[Object]:
    """Return the ports of a Service that are TCP."""
    return [port for port in ports if (port.get("protocol") or "TCP") == "TCP"]


@dataclass(frozen=True, slots=True)
class Serving:
    """The port of a Service by which health is judged, and the container that it leads to."""

    port: Object
    container: Object

    @property
    def target(self) -> int | str:
        """The port of the pods, by number or name."""
        return target_of(self.port)

    @property
    def is_grpc(self) -> bool:
        """Whether the Service says that gRPC is spoken there."""
        return "grpc" in f"{self.port.get('appProtocol')} {self.port.get('name')}".lower()

    @property
    def http_probe(self) -> Object:
        """What the container's readiness probe asks by HTTP, nothing where it is another."""
        return (self.container.get("readinessProbe") or {}).get("httpGet") or {}


def serving_of(health: Health, pod: Object, ports: Sequence[Object]) -> Serving:
    """Return by what the health of these pods is judged: the first port of their Service.

    Where that is gRPC, it is the first other one that is to be asked by HTTP.
    """
    running = running_containers(pod)
    listed = tcp_ports(ports) or ports
    first, *others = [Serving(p, owner_of(running, target_of(p))) for p in listed]
    for other in others if first.is_grpc else ():
        elsewhere = other.container is not first.container and other.http_probe
        if not other.is_grpc and (health.path or elsewhere):
            return other
    return first


def target_of(port: Object) -> int | str:
    """Return where a port of a Service leads to: a port of the pods, by number or name."""
    target: int | str = port.get("targetPort") or port["port"]
    return target


def owner_of(running: Sequence[Object], target: int | str) -> Object:
    """Return the container that has a port, by number or name; one of them where none says so."""
    for container in running:
        for declared in container.get("ports") or ():
            if target in (declared.get("name"), declared.get("containerPort")):
                return container
    return next((c for c in running if c.get("readinessProbe")), running[0])


def port_number(containers: Iterable[Object], port: int | str) -> int | None:
    """Return the number of a port that may be a name; None where no container has that name."""
    if isinstance(port, int):
        return port
    declared = [p for c in containers for p in c.get("ports") or ()]
    return next((int(p["containerPort"]) for p in declared if p.get("name") == port), None)


def rendered_spec(app: App, spec: Object, selector: Mapping[str, str], replicas: int) -> Object:
    """Return the spec of a run's Deployment. What the app says stays, but for labels and size."""
    meta = spec["template"].get("metadata") or {}
    # whose pods they are is for the app to say, since what selects them may ask for it
    labels = {LABEL_MANAGED: MANAGER, **(meta.get("labels") or {}), **selector}
    own = {key: value for key, value in selector.items() if key != LABEL_RUN}
    for separate in spread_selectors(spec["template"]["spec"]):
        if selects(separate, labels):  # so that pods of the other colour do not count
            colour = {k: v for k, v in own.items() if k != LABEL_APP}
            separate["matchLabels"] = {**(separate.get("matchLabels") or {}), **colour}
    spec = {key: value for key, value in spec.items() if value is not None}  # null says nothing
    min_ready = spec.get("minReadySeconds", MIN_READY_SECONDS)
    return {
        "minReadySeconds": MIN_READY_SECONDS,
        "revisionHistoryLimit": 3,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": ONE_BY_ONE},
        **spec,
        "replicas": replicas,
        "paused": False,
        "progressDeadlineSeconds": max(
            rollout_seconds(app, replicas, min_ready),
            min_ready + 1,
            spec.get("progressDeadlineSeconds") or 0,
        ),
        "selector": {"matchLabels": own},
        "template": {**spec["template"], "metadata": {**meta, "labels": labels}},
    }


def rollout_seconds(app: App, replicas: int, min_ready: int = 0) -> int:
    """Return for how many seconds a rollout of so many pods may make no progress."""
    return int(max(app.deploy.rollout_timeout, replicas * max(ROLLOUT_PER_REPLICA, min_ready + 10)))


def colour_label(deployment: Object) -> str:
    """Return the key of the label that holds the colour: `version`, unless the app uses that."""
    own = part_of(deployment, "metadata", "labels")
    labels = {**own, **part_of(deployment, "spec", "template", "metadata", "labels")}
    return LABEL_COLOUR if LABEL_VERSION in labels else LABEL_VERSION


def colour_of(labels: Mapping[str, str]) -> str:
    """Return the colour that labels or a selector name, by either key; empty where none does."""
    return labels.get(LABEL_COLOUR) or labels.get(LABEL_VERSION) or ""


def spread_selectors(pod: Object) -> list[Object]:
    """Return the label selectors of the spread constraints and the anti-affinity of a pod."""
    anti_affinity = part_of(pod, "affinity", "podAntiAffinity")
    parts = walk("", [pod.get("topologySpreadConstraints"), anti_affinity])
    return [part for key, part in parts if key == "labelSelector" and isinstance(part, dict)]


def required_terms(value: Any) -> list[Object]:
    """Return the terms of each anti-affinity within a value that keep pods from nodes for sure."""
    parts = [part_of(part) for key, part in walk("", value) if key == "podAntiAffinity"]
    return [term for part in parts for term in part.get(REQUIRED_TERM) or ()]


def bind_terms(
    terms: Iterable[Object], labels: Mapping[str, str], own: Mapping[str, str], where: str
) -> None:
    """Let terms of an anti-affinity select pods with labels of our own only.

    Kubernetes applies them in both directions: new pods of others that a term selects are kept
    away, too. Raises ManifestError for a term that does not select the pods that have it.
    """
    for term in terms:
        selector = part_of(term, "labelSelector")
        if not selects(selector, labels):
            refuse(f"{where}: {APART}")
        selector["matchLabels"] = {**(selector.get("matchLabels") or {}), **own}


def wanted_size(committed: int | None, live: int, limits: SizeLimits | None) -> int:
    """Return how many pods a version has: as committed, else as the live one, within limits."""
    if committed is None and limits:
        return min(max(live, limits.least), limits.most, MOST_REPLICAS)
    if committed is None:
        return max(live, 1)
    if type(committed) is not int:
        refuse("spec.replicas is no whole number. Write one without quotes.", INVALID)
    if committed < 1:
        refuse(f"spec.replicas is {committed}, so nothing would serve. Set it to 1 or more.")
    if committed > MOST_REPLICAS:
        refuse(f"{committed} replicas are too many. At most {MOST_REPLICAS} are possible.")
    return committed


def ports_like(
    ports: Iterable[Object], live: Iterable[Object] = (), *, external: bool = False
) -> list[Object]:
    """Return ports with the node ports that a live Service has for them, by name, else by number.

    Where it has none they have none, unless the Service is to be reached from outside.
    """
    ports = [*ports]
    names = {port["name"] for port in ports if port.get("name")}
    wanted = {port.get("nodePort") for port in ports}
    node_ports: dict[Any, int] = {}
    for port in live:
        if node_port := port.get("nodePort"):
            external = True
            same = port.get("name") if port.get("name") in names else port_key(port)
            node_ports |= {} if node_port in wanted else {same: node_port}
    result = []
    for port in ports:
        node_port = node_ports.get(port.get("name")) or node_ports.get(port_key(port))
        merged = {"nodePort": node_port, **port} if node_port else port
        result.append({k: v for k, v in merged.items() if external or k != "nodePort"})
    return result


def shared_node_ports(releases: Mapping[str, Release]) -> Iterator[str]:
    """Yield what is wrong with node ports that the manifests of two environments name.

    A cluster has each of them once, for all namespaces. The releases are given by environment.
    """
    owners: dict[int, str] = {}
    for environment, release in releases.items():
        beside = [c for c in release.companions or () if is_companion(c, "Service")]
        further = [port for c in beside for port in part_of(c, "spec").get("ports") or ()]
        for port in [*release.ports, *further]:
            number = port.get("nodePort")
            owner = owners.setdefault(number, environment) if number else environment
            if owner != environment:
                advice = "Give each environment its own, or let the cluster choose."
                yield f"nodePort {number} is that of {owner} and of {environment}. {advice}"


def port_key(port: Object) -> Any:
    """Return what tells the ports of a Service apart, besides their names."""
    return port["port"], port.get("protocol") or "TCP"


def json_bytes(content: Any) -> int:
    """Return the size of JSON as kubectl and the API server write it, or little more.

    Go writes six bytes for characters that Python escapes in less, or not at all. For the last two
    only its older versions do.
    """
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    escapes = text.replace("\\\\", "")  # of which none is a backslash
    more = {"<": 5, ">": 5, "&": 5, "\u2028": 3, "\u2029": 3, "\\b": 4, "\\f": 4}
    added = sum(count * escapes.count(character) for character, count in more.items())
    return len(text.encode("utf-8", "surrogatepass")) + added


def packed_json(content: Any) -> str:
    """Return JSON as `binaryData` of a ConfigMap holds it, compressed."""
    return base64.b64encode(zlib.compress(json.dumps(content, sort_keys=True).encode())).decode()


def unpacked_json(packed: str) -> Any:
    """Return what was packed; raises TypeError, ValueError or zlib.error for anything else."""
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def release_record(app: str, packed: str) -> Object:
    """Return the immutable ConfigMap with a packed release; its name tells whether it is whole."""
    labels = {LABEL_APP: app, LABEL_STAGE: "release"}
    return immutable(f"{app}-release", labels, {}, binaryData={"release": packed})


def immutable(name: str, labels: Mapping[str, str], meta: Object, **content: Any) -> Object:
    """Return an immutable ConfigMap, its name followed by eight digits of its content's hash."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False).encode()
    size = content_bytes(**content)
    written = json_bytes(content)
    if size > CONFIGMAP_BYTES or written > REQUEST_BYTES:
        sizes = f"{max(size, written // 3)} bytes, but {CONFIGMAP_BYTES} are possible"
        refuse(f"ConfigMap {clip(name, 60)} has {sizes}. Make it smaller.")
    configmap = new_object("ConfigMap", name, labels, meta)
    # the app counts too: what two apps shared would go with the first of them
    hashed = labels[LABEL_APP].encode() + b" " + text
    if meta:
        hashed += json.dumps(configmap["metadata"], sort_keys=True).encode()
    configmap["metadata"]["name"] += f"-{hashlib.sha256(hashed).hexdigest()[:8]}"
    return {**configmap, "immutable": True, **content}


def content_bytes(binaryData: Object, data: Object | None = None) -> int:  # noqa: N803 - a key
    """Return the size of a ConfigMap as the API server counts it: of texts, and of files."""
    texts = sum(len((text or "").encode()) for text in (data or {}).values())
    files = [file or "" for file in binaryData.values()]
    # base64 has four letters for three bytes
    return texts + sum(len(file) * 3 // 4 - file.count("=") for file in files)


def new_object(kind: str, name: str, labels: Mapping[str, str], meta: Object) -> Object:
    """Return an object with our labels, and with the labels and annotations of a metadata."""
    labels = {**(meta.get("labels") or {}), **labels, LABEL_MANAGED: MANAGER}
    annotations = {**(meta.get("annotations") or {})}
    metadata = {"name": name, "labels": labels, "annotations": annotations}
    return {"apiVersion": KINDS[kind], "kind": kind, "metadata": metadata}


def same_configmap(standing: Object, wanted: Object) -> bool:
    """Whether an immutable ConfigMap has the content and all labels of another.

    Others may add labels: a policy of the cluster, or who restores a backup.
    """

    def kept(configmap: Object) -> Object:
        """Return what counts of a ConfigMap."""
        data = {key: text or "" for key, text in (configmap.get("data") or {}).items()}
        files = (configmap.get("binaryData") or {}).items()
        data |= {key: base64.b64decode(file or "") for key, file in files}
        return {"immutable": configmap.get("immutable"), "data": data}

    labels = part_of(standing, "metadata", "labels")
    has_labels = wanted["metadata"]["labels"].items() <= labels.items()
    return has_labels and kept(standing) == kept(wanted)


# === objects ======================================================================================

SHORT_WATCH = 5.0  # a watch that ends so soon did not work
WORDS_LENGTH = 800  # characters of what the cluster says about a pod: a quota's are the longest
LOG_PATIENCE = 2.0  # seconds that a failed deployment waits until its logs are kept
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
    conditions: list[Object] = status.get("conditions") or []
    return next((c for c in conditions if c["type"] in kinds and c["status"] == "True"), {})


class Container:
    """What a pod's status says about one container, in its current or last life."""

    def __init__(self, entry: Object, kind: str) -> None:
        state = entry.get("state") or {}
        last = entry.get("lastState") or {}
        waiting = state.get("waiting") or {}
        ended = state.get("terminated") or last.get("terminated") or {}
        self.lost = ended.get("reason") in NODE_LOST  # with its node: how it ended is not known
        ended = {} if self.lost else ended
        self.name: str = entry["name"]
        self.kind = kind  # init, sidecar or app
        self.ready = bool(entry.get("ready"))
        self.running = "running" in state
        self.waiting: str = waiting.get("reason", "")
        self.words: str = ended.get("message") or ""  # its last ones: as good as lines of its log
        self.text: str = waiting.get("message") or ""  # of kubelet and runtime
        if not self.text and START.fullmatch(ended.get("reason", "")):
            self.text = self.words
        self.started = entry.get("started") is True
        self.restarts: int = entry.get("restartCount") or 0
        self.exits: int = self.restarts + (bool(ended) and not self.running)
        self.exit_code: int | None = ended.get("exitCode")  # of the last life that ended by itself
        self.exit_reason: str = ended.get("reason", "")
        self.ended = epoch(ended.get("finishedAt"))


class Pod:
    """What matters of a pod."""

    def __init__(self, manifest: Object) -> None:
        meta = manifest["metadata"]
        status = manifest.get("status") or {}
        conditions = {c["type"]: c for c in status.get("conditions") or []}
        ready = conditions.get("Ready", {})
        scheduled = conditions.get("PodScheduled", {})
        is_ready = ready.get("status") == "True"
        deleting = "deletionTimestamp" in meta
        evicted = status.get("reason") == "Evicted"
        disrupted = bool(true_condition(status, "DisruptionTarget"))
        self.name: str = meta["name"]
        self.version = int(meta["resourceVersion"])
        self.labels = {sys.intern(k): sys.intern(v) for k, v in (meta.get("labels") or {}).items()}
        self.run = self.labels.get(LABEL_RUN, "")
        # the Job's uid: a deleted Job's pods may outlive it, beside a new one of the same name
        self.job = self.labels.get("batch.kubernetes.io/controller-uid", "")
        self.created = epoch(meta.get("creationTimestamp"))
        self.started = epoch(status.get("startTime"))
        self.ready = is_ready and not deleting
        # when it was last seen to become ready, or not to be any more
        self.changed = epoch(ready.get("lastTransitionTime"))
        # now or before: a condition that was never True is as old as the pod's start
        self.seen_ready = is_ready or 0 < self.started < self.changed - 1
        # the kubelet's words where a Job's pod wrote more than it may: that is its own fault
        message = str(status.get("message"))
        own_fault = self.job and OVERFULL.match(message) and evicted and not disrupted
        self.overfull = message.strip() if own_fault else ""
        # whether the cluster takes it away, and replaces it
        self.leaving = deleting or disrupted or (evicted and not self.overfull)
        self.stays = not self.leaving and status.get("phase") not in ("Failed", "Succeeded")
        unschedulable = scheduled.get("reason") == "Unschedulable"
        self.unschedulable: str = scheduled["message"] if unschedulable else ""
        self.containers = containers_of(manifest["spec"], status)


def containers_of(spec: Object, status: Object) -> list[Container]:
    """Return the containers of a pod, those that begin before the app's own first."""
    inits = status.get("initContainerStatuses") or []
    apps = status.get("containerStatuses") or []
    sidecars = [c["name"] for c in spec.get("initContainers") or [] if "restartPolicy" in c]
    kinds = ["sidecar" if entry["name"] in sidecars else "init" for entry in inits]
    return [*map(Container, inits, kinds), *(Container(entry, "app") for entry in apps)]


class PodEvent:
    """What matters of an Event: what the cluster says of a pod or of a Job, how often and when."""

    def __init__(self, manifest: Object) -> None:
        about = manifest.get("involvedObject") or {}
        series = manifest.get("series") or {}
        meta = manifest.get("metadata") or {}
        begun = manifest.get("firstTimestamp") or manifest.get("eventTime")
        first: str = begun or meta.get("creationTimestamp") or ""
        container = re.fullmatch(r"spec\.\w+\{(.*)\}", str(about.get("fieldPath")))
        self.pod = str(about.get("name"))
        self.container = container[1] if container else ""
        self.reason = str(manifest.get("reason"))
        self.text = clip(str(manifest.get("message")), WORDS_LENGTH)
        self.is_warning = manifest.get("type") == "Warning"
        self.times = int(series.get("count") or manifest.get("count") or 1)
        self.first = epoch(first)
        self.last = epoch(series.get("lastObservedTime") or manifest.get("lastTimestamp") or first)


class Job:
    """What matters of a Job of ours."""

    def __init__(self, manifest: Object) -> None:
        meta = manifest["metadata"]
        status = manifest.get("status") or {}
        done = true_condition(status, "Complete")
        failed = true_condition(status, "Failed", "FailureTarget")
        waiting = "suspended" if manifest["spec"].get("suspend") else "active"
        annotations: dict[str, str] = meta.get("annotations") or {}
        self.name: str = meta["name"]
        self.uid: str = meta["uid"]
        self.version = int(meta["resourceVersion"])
        self.namespace: str = meta["namespace"]
        self.stage: str = (meta.get("labels") or {}).get(LABEL_STAGE, "")
        self.run = run_of_job(manifest)
        self.annotations = {k: v for k, v in annotations.items() if k.startswith(MANAGER)}
        # of the run, if it has ended and this is its last Job
        self.outcome = annotations.get(ANNOTATION_OUTCOME, "")
        self.ended = seconds_of(annotations.get(ANNOTATION_ENDED))
        self.state = "succeeded" if done else "failed" if failed else waiting
        self.deleting = "deletionTimestamp" in meta
        self.reason: str = failed.get("reason", "")
        self.created = epoch(meta.get("creationTimestamp"))
        self.unsuspended = epoch(status.get("startTime"))
        self.finished = epoch((done or failed).get("lastTransitionTime"))


# Records are read from annotations, which anyone may write who may write the object: a field that
# does not hold what it may is left out, and so is one that nobody knows.
FAR_FUTURE = 1e11  # seconds since the epoch


def text_like(pattern: str) -> Callable[[Any], bool]:
    """Return whether a value is a text that matches the whole pattern, as a function."""
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def is_selector(value: Any) -> bool:
    """Whether a value can stand for a selector."""
    is_key = text_like(r"[\w./-]{1,317}")
    is_value = text_like(r"[\w.-]{0,63}")
    return isinstance(value, dict) and all(is_key(k) and is_value(v) for k, v in value.items())


def are_ports(value: Any) -> bool:
    """Whether a value can stand for the ports of a Service."""
    whole = isinstance(value, list) and all(isinstance(p, dict) for p in value)
    return whole and all(type(p.get("port")) is int for p in value)


NameField = Annotated[str, text_like(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?)?")]
WordField = Annotated[str, text_like("[A-Za-z-]{0,40}")]
ProseField = Annotated[str, text_like(r"(?s).{0,2000}")]
ColourField = Annotated[str, text_like(f"({'|'.join(COLOURS)})?")]
TimeField = Annotated[float, lambda v: type(v) in (int, float) and 0 <= v < FAR_FUTURE]
SizeField = Annotated[int, lambda v: type(v) is int and 0 < v < 10**6]
Selector = Annotated[dict[str, str], is_selector]
PROVEN = (Outcome.DEPLOYED, ADOPTED)  # the outcomes of what a rollback may go to


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryEntry:
    """One switch of a live Service, as its annotation records it.

    Where nothing is recorded the entry is empty, and then it is false.
    """

    selector: Selector = dataclass_field(default_factory=dict)
    run: NameField = ""
    commit: Annotated[str, text_like(f"({SHA.pattern})?")] = ""
    image: Annotated[str, text_like(r"[\x21-\x7e]{0,1000}")] = ""
    colour: ColourField = ""
    ports: Annotated[list[Object], are_ports] = dataclass_field(default_factory=list)
    release: NameField = ""  # the ConfigMap of its release
    replicas: SizeField = 1
    at: TimeField = 0.0
    by: ProseField = ""  # who switched, or changed the selector since
    outcome: WordField = ""  # "" while it bakes; that stays where the bake ended with no verdict
    reason: WordField = ""
    detail: ProseField = ""
    was: Selector = dataclass_field(default_factory=dict)  # what was narrowed to adopt it
    unjudged: Annotated[bool, lambda v: v is True] = False  # its bake could not tell its health
    has_companions: Annotated[bool, lambda v: v is True] = False
    v: int = 1

    def __bool__(self) -> bool:
        return bool(self.selector)

    @classmethod
    def from_json(cls, data: Any) -> HistoryEntry:
        """Return the entry in parsed JSON, an empty one where it has no selector."""
        entry = cls(**fitting_fields(cls, data))
        return entry or cls()

    def to_json(self) -> Object:
        """Return the entry as it is written into an annotation."""
        return written_fields(self)

    @property
    def proven(self) -> bool:
        """Whether this version was confirmed, so that a rollback may go to it."""
        return self.outcome in PROVEN


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """Who is changing an environment, and what is to be restored there.

    Where nobody is, the claim is empty, and then it is false.
    """

    phase: WordField = ""
    run: NameField = ""
    colour: ColourField = ""
    since: TimeField = 0.0
    restore: NameField = ""  # the release of the rollback target that stood in the colour
    v: int = 1

    def __bool__(self) -> bool:
        return bool(self.phase)

    @classmethod
    def from_json(cls, data: Any) -> Claim:
        """Return the claim in parsed JSON, an empty one where it has no phase."""
        claim = cls(**fitting_fields(cls, data))
        return claim or cls()

    def to_json(self) -> Object:
        """Return the claim as it is written into an annotation."""
        return written_fields(self)


# What fields are called in annotations, so that older daemons understand them, too.
WRITTEN_AS = {"has_companions": "beside", "restore": "heal"}


def written_fields(record: HistoryEntry | Claim) -> Object:
    """Return a record as it is written into an annotation."""
    return {WRITTEN_AS.get(key, key): value for key, value in asdict(record).items()}


def fitting_fields(kind: type[Any], data: Any) -> Object:
    """Return the fields of a record that parsed JSON has and that hold what they may."""
    hints = get_type_hints(kind, include_extras=True)
    checks = {k: h.__metadata__[0] for k, h in hints.items() if hasattr(h, "__metadata__")}
    values = data if isinstance(data, dict) else {}
    read = {k: values[w] for k in checks if (w := WRITTEN_AS.get(k, k)) in values}
    return {k: value for k, value in read.items() if checks[k](value)}


def are_texts(value: Any) -> bool:
    """Whether a value can stand for labels or annotations of others, or a patch of them."""
    return isinstance(value, dict) and all(
        not k.startswith(f"{MANAGER}/") and isinstance(v, str | None) for k, v in value.items()
    )


def are_switched(value: Any) -> bool:
    """Whether a value can stand for what a switch carries of the spec of a Service."""
    is_part = isinstance(value, dict) and value.keys() <= {*SWITCHED_FIELDS, "ports"}
    return is_part and are_ports(value.get("ports", []))


Texts = Annotated[dict[str, str | None], are_texts]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceFields:
    """What a switch carries of a Service besides the selector, or a patch of it.

    None stands for what is not there. It is false where there is nothing at all.
    """

    labels: Texts = dataclass_field(default_factory=dict)
    annotations: Texts = dataclass_field(default_factory=dict)
    spec: Annotated[Object, are_switched] = dataclass_field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.labels or self.annotations or self.spec)

    @classmethod
    def of(cls, manifest: Object) -> ServiceFields:
        """Return these fields of a Service, without labels and annotations of ours."""
        meta = manifest.get("metadata") or {}
        spec = manifest.get("spec") or {}
        texts = [
            {k: v for k, v in (meta.get(part) or {}).items() if not k.startswith(f"{MANAGER}/")}
            for part in ("labels", "annotations")
        ]
        texts[0].pop(LABEL_MANAGED, None)
        values = {k: spec.get(k) or default for k, default in SWITCHED_FIELDS.items()}
        ports = [
            {"protocol": "TCP", "targetPort": p.get("port")}
            | {k: v for k, v in p.items() if v is not None}
            for p in spec.get("ports") or []
        ]
        return cls(labels=texts[0], annotations=texts[1], spec={**values, "ports": ports})

    @classmethod
    def from_json(cls, data: Any) -> ServiceFields:
        """Return the patch in parsed JSON, an empty one where it has none."""
        return cls(**fitting_fields(cls, data))

    def to_json(self) -> Object:
        """Return it as it is written into an annotation."""
        return asdict(self)

    def patch_to(self, fields: ServiceFields) -> ServiceFields:
        """Return the patch after which a Service with these fields has others.

        It removes the labels and annotations that only these have; those of others stay.
        """
        return ServiceFields(
            labels={**dict.fromkeys(self.labels), **fields.labels},
            annotations={**dict.fromkeys(self.annotations), **fields.annotations},
            spec={**fields.spec},
        )

    def changed_by(self, patch: ServiceFields) -> ServiceFields:
        """Return the fields that a patch changes, as they are before it: the patch to undo it."""

        def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Object:
            """Return the old values of what is new."""
            return {key: old.get(key) for key, value in new.items() if value != old.get(key)}

        return ServiceFields(
            labels=changed(self.labels, patch.labels),
            annotations=changed(self.annotations, patch.annotations),
            spec=changed(self.spec, patch.spec),
        )

    def fitted(self, live: Object) -> ServiceFields:
        """Return them with the node ports of a live Service, by its spec."""
        if not (ports := self.spec.get("ports")):
            return self
        external = live.get("type") in EXTERNAL_TYPES
        ports = ports_like(ports, live.get("ports") or [], external=external)
        return replace(self, spec={**self.spec, "ports": ports})


def confirmed_changes(live: Object, wanted: Object) -> Object:
    """Return what confirming a version changes in the spec of its live Service."""
    kind = wanted.get("type") or "ClusterIP"
    values: Object = {key: wanted.get(key) or None for key in CONFIRMED_FIELDS}
    values |= {"type": kind, "allocateLoadBalancerNodePorts": None}
    if kind in EXTERNAL_TYPES:
        values["externalTrafficPolicy"] = values["externalTrafficPolicy"] or "Cluster"
        ports = wanted.get("ports") or []
        node_ports = {port.get("nodePort") for port in ports} - {None}
        live_ports = live.get("ports") or []
        if node_ports - {port.get("nodePort") for port in live_ports}:
            values["ports"] = ports_like(ports, live_ports, external=True)
    if kind == "LoadBalancer":
        allocated = wanted.get("allocateLoadBalancerNodePorts")
        values["allocateLoadBalancerNodePorts"] = True if allocated is None else allocated
    values |= {key: wanted[key] for key in CHOSEN_FIELDS if wanted.get(key)}
    return {key: value for key, value in values.items() if live.get(key) != value}


def fixed_field(live: Object, wanted: Object) -> str:
    """Return the field of a live Service that cannot be changed and would be, "" for none."""
    addresses = wanted.get("clusterIPs")
    first = addresses[0] if isinstance(addresses, list) and addresses else ""
    address = wanted.get("clusterIP") or first
    is_headless = live.get("clusterIP") == "None"
    if (address or is_headless) and address != live.get("clusterIP"):
        return "clusterIP"
    both = live.get("type") == wanted.get("type") == "LoadBalancer"
    class_name = wanted.get("loadBalancerClass")
    if both and class_name and class_name != live.get("loadBalancerClass"):
        return "loadBalancerClass"
    return ""


class Service:
    """The live Service of an app, with what our annotations on it say as far as it can be read.

    `run`: what today's traffic reaches, as far as the selector names it, or the argument `run`;
    `claim`: who is changing this environment; `history`: the switches, newest first. Each is empty
    when there is none, and so is each of these entries of the history:

    live                what today's traffic reaches: by its selector, else by its run
    live_by_history     what was recorded as live last, whatever the selector says now
    switch_back_target  what the bake goes back to: what was live before, proven or not
    rollback_target     what a person goes back to: a proven version before the live one
    entry(run)          the newest one of that run
    """

    def __init__(self, manifest: Object, run: str = "") -> None:
        meta = manifest["metadata"]
        spec = manifest["spec"]
        self.name: str = meta["name"]
        self.uid: str = meta.get("uid", "")
        self.version = int(meta["resourceVersion"])
        self.spec: Object = spec
        self.fields = ServiceFields.of(manifest)
        self.ports: list[Object] = spec.get("ports") or []
        self.selector: dict[str, str] = spec.get("selector") or {}
        self.run = self.selector.get(LABEL_RUN) or run
        # whether the selector names a run of ours, whatever else it asks for
        named = self.selector.keys() >= {LABEL_APP, LABEL_RUN}
        self.ours = named and bool(colour_of(self.selector))
        # the apps that its label and its selector name
        apps = ((meta.get("labels") or {}).get(LABEL_APP), self.selector.get(LABEL_APP))
        self.apps = {*filter(None, apps)}
        self._annotations: dict[str, str] = meta.get("annotations") or {}
        self.claim = Claim.from_json(self.annotation(ANNOTATION_CLAIM, {}))
        entries = map(HistoryEntry.from_json, self.annotation(ANNOTATION_HISTORY, []))
        self.history = [entry for entry in entries if entry]

    @classmethod
    def from_entry(cls, name: str, entry: HistoryEntry) -> Service:
        """Return a stand-in for a Service whose whole history is one entry."""
        annotations = {ANNOTATION_HISTORY: json.dumps([entry.to_json()])}
        meta = {"name": name, "resourceVersion": "0", "annotations": annotations}
        return cls({"metadata": meta, "spec": {"selector": entry.selector}})

    def annotation(self, key: str, empty: Any) -> Any:
        """Return the JSON in an annotation; empty when it is missing, broken or of another type."""
        with suppress(KeyError, ValueError, RecursionError):
            value = json.loads(self._annotations[key])
            return value if isinstance(value, type(empty)) else empty
        return empty

    def annotations(self) -> Object:
        """Return what our annotations say, as it is written; None for what is not there."""
        others: Object = {ANNOTATION_PREVIOUS: {}, ANNOTATION_REPLACED: {}}
        others |= {ANNOTATION_BAKE: 0.0, ANNOTATION_PUT_BACK: []}
        return {
            ANNOTATION_HISTORY: self.history,
            ANNOTATION_CLAIM: self.claim,
            **{key: self.annotation(key, empty) or None for key, empty in others.items()},
        }

    @property
    def live(self) -> HistoryEntry:
        """The entry of what today's traffic reaches."""
        same = (e for e in self.history if self.run and e.run == self.run)
        return next(
            (e for e in self.history if e.selector == self.selector), next(same, HistoryEntry())
        )

    @property
    def in_order(self) -> bool:
        """Whether the selector is what the history says that it was set to last."""
        live = self.live
        return bool(live) and live.selector == self.selector and live == self.live_by_history

    @property
    def live_by_history(self) -> HistoryEntry:
        """The entry of what is live as far as it is recorded, whatever the selector says now."""
        return next((e for e in self.history if not e.outcome or e.proven), HistoryEntry())

    def entry(self, run: str, since: float = 0.0) -> HistoryEntry:
        """Return the newest history entry of a run made at or after a time; empty when none."""
        ours = (e for e in self.history if e.run == run)
        return next((e for e in ours if e.at >= since), HistoryEntry())

    def reaches(self, entry: HistoryEntry) -> bool:
        """Whether an entry is of what today's traffic reaches."""
        return entry.selector == self.selector or bool(self.run and entry.run == self.run)

    @property
    def rollback_targets(self) -> list[HistoryEntry]:
        """The entries that a rollback can go to: the proven versions before the live one."""
        live = self.live
        good = dict[str, HistoryEntry]()
        if not (live or self.run):
            return []
        for entry in self.history[self.history.index(live) + 1 :] if live else self.history:
            if entry.proven and not (entry.reason or self.reaches(entry)):
                good.setdefault(entry.run, entry)
        return [*good.values()]

    def rollback_target(self, back: int = 1) -> HistoryEntry:
        """Return the entry that a rollback goes to: the back-th proven version before the live."""
        targets = self.rollback_targets
        return targets[back - 1] if 0 < back <= len(targets) else HistoryEntry()

    @property
    def switch_back_target(self) -> HistoryEntry:
        """What was live before, proven or not, if it is known; else where a rollback goes."""
        was = self.annotation(ANNOTATION_PREVIOUS, {})
        stood = (e for e in self.history if e.selector == was and not self.reaches(e))
        return next(stood, HistoryEntry()) or self.rollback_target()


def app_service(names: Iterable[str], manifest: Object) -> Service | None:
    """Return the live Service of one of these apps, None for any other Service."""
    return Service(manifest) if manifest["metadata"]["name"] in names else None


# === informers ====================================================================================

V = TypeVar("V", Job, Pod, Service)


class Informer(Generic[V]):
    """Knows the objects of one resource type in one namespace: a list, then each change after it.

    Both are the API server's own words, `kubectl get --raw`: its list carries the version from
    which its watch tells every change, one a line and in order. A watch's exit code says nothing,
    and a silent one may be dead: each ends after some time, and all is listed anew.
    """

    def __init__(
        self,
        kubectl: Kubectl,
        resource: str,
        namespace: str,
        parse: Callable[[Object], V | None],
        selector: str,
    ) -> None:
        self.kubectl = kubectl
        self.resource = resource
        self.namespace = namespace
        # why it may lag behind the cluster; then what it lacks is not gone, only unseen
        self.trouble = "not listed yet"
        self.changed = threading.Event()
        self.stopped = threading.Event()
        self._address = list_address(resource, namespace, selector)
        self._parse: Callable[[Object], V | None] = parse
        self._items: dict[str, V] = {}
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None

    def items(self) -> list[V]:
        """Return every object as it is known now."""
        with self._lock:
            return list(self._items.values())

    def find(self, name: str) -> V | None:
        """Return one object as it is known now."""
        with self._lock:
            return self._items.get(name)

    def learn(self, manifest: Object) -> None:
        """Take over what a patch returned, before the watch tells it; what is gone stays so."""
        with self._lock:
            if manifest["metadata"]["name"] in self._items:
                self._take("MODIFIED", manifest)

    def stop(self) -> None:
        """End the watch; its thread returns."""
        self.stopped.set()
        if process := self._process:
            process.kill()

    def run(
        self, beat: Callable[[], None] = lambda: None, changed: threading.Event | None = None
    ) -> None:
        """Follow the cluster until stopped; wait longer each time that the API server is away."""
        self.changed = changed or self.changed
        retry = Retry(Clock())
        while not self.stopped.is_set():
            beat()
            lost = self._list_and_watch(beat)
            if not lost:
                retry.succeeded(self.resource)
            elif not retry.failing() and not self.stopped.is_set():
                warn("watch lost", resource=self.resource, namespace=self.namespace, detail=lost)
            if lost:
                retry.failed(self.resource)
            self.trouble = lost
            self.stopped.wait(retry.wait(DELAYS[-1] * 2) if lost else 0.1)

    def _list_and_watch(self, beat: Callable[[], None]) -> str:
        """List, then watch until that ends; return why it did not work, or ""."""
        try:
            return self._watch(self._list(), beat)
        except HookError as failed:
            return str(failed)
        except SHAPE_ERRORS as wrong:
            return f"not an API server's answer: {clip(repr(wrong))}"

    def _list(self) -> str:
        """Learn what is there; return the version at which that was so."""
        items: dict[str, V] = {}
        for page in self.kubectl.pages(self._address, self.namespace):
            items |= {item.name: item for item in map(self._read, page["items"]) if item}
        with self._lock:
            self._items = {name: self._newer(item) for name, item in items.items()}
        self.trouble = ""
        self.changed.set()
        return str(page["metadata"]["resourceVersion"])

    def _watch(self, version: str, beat: Callable[[], None]) -> str:
        """Take over each change after a version; return why it was no good watch, or ""."""
        began = time.monotonic()
        seconds = math.ceil(jittered(WATCH_SECONDS))
        query = f"&watch=true&resourceVersion={version}&timeoutSeconds={seconds}"
        args = ("get", "--raw", self._address + query)
        process = self._process = self.kubectl.stream(*args, namespace=self.namespace)
        # for a silent server, and for a stop before there was a process
        deadline = threading.Timer(0 if self.stopped.is_set() else seconds * 1.05, process.kill)
        try:
            deadline.start()
            beat()
            # of a line that is too long only a part is read, which is no JSON
            for line in iter(partial(cast(Any, process.stdout).readline, OUTPUT_BYTES), b""):
                beat()
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

    def _take(self, kind: str, manifest: Object) -> None:
        """Take over one event."""
        if item := self._read(manifest):
            with self._lock:
                if kind == "DELETED":
                    self._items.pop(item.name, None)
                else:
                    self._items[item.name] = self._newer(item)
            self.changed.set()

    def _newer(self, item: V) -> V:
        """Return an object as it was told, or as a patch returned it since."""
        return max(item, self._items.get(item.name, item), key=lambda each: each.version)

    def _read(self, manifest: Object) -> V | None:
        """Return the object parsed; where that fails, as it was last known."""
        try:
            return self._parse(manifest)
        except SHAPE_ERRORS:
            name = manifest["metadata"]["name"]
            error("object cannot be read", exc=True, resource=self.resource, name=clip(name))
            self.kubectl.metrics.errors.labels("watch").inc()
            return self._items.get(name)


# === decide =======================================================================================
# Pure: observed state in, what to do next out. Nothing here starts a program or asks for the time.

LAG = 10.0  # seconds that the pods' watch may be behind the Jobs'
NEVER = float("inf")
PROOF_SECONDS = 10.0  # at least, between the first and the last sign of what cannot heal
REFUSED_SECONDS = 30.0  # that a refusal stands, by when the kubelet must have asked again
PULL = re.compile("ErrImage.*|ImagePullBackOff|ImageInspectError|Registry.*")
BARE_BACK_OFF = re.compile('(Back-off pulling image "[^"]*")?')  # of kubelets before 1.29
HOPELESS_PULL = re.compile(
    r"(?i)not found|(manifest|name) unknown|denied|unauthorized|forbidden|authentication required"
    r"|no basic auth|insufficient_scope|authorization failed|invalid reference"
    r"|does not exist|no match for platform"
)
PASSING_PULL = re.compile(
    r"(?i)connection refused|timed? ?out|no such host|too ?many ?requests|\b5[0-9]{2} [A-Z]"
)
# How kaniko's last line begins, and what it holds where a base image did not come.
DOCKERFILE_ERROR = re.compile(
    "failed to execute command|parsing dockerfile|dockerfile parse|get fileinfo|no such file"
)
KANIKO_ERROR = re.compile("error (building image|checking push permissions|pushing image)")
BASE_AWAY = re.compile(
    f"{PASSING_PULL.pattern}|status code (429|5[0-9]{{2}})|no route to host|connection reset"
    "|server misbehaving|deadline exceeded|stream error|unexpected EOF"
)
PASSING_REFUSAL = re.compile(
    "Internal error|timed? ?out|etcd|cannot be fulfilled|status unknown|being terminated"
)
# What may be away or behind when a pod is created. What a policy refuses may hold any words.
PASSING_CREATION = re.compile(
    f"{PASSING_REFUSAL.pattern}|serviceaccount +not found|failed calling webhook|connection refused"
)
REFUSAL = re.compile("forbidden|is invalid|denied|must specify")  # other words are of trouble
POLICY = re.compile("denied the request|violates PodSecurity|must specify|m(ax|in)imum ")
QUOTA = re.compile("exceeded quota: [^ ]+, requested: ([^ ]+), used: [^ ]+, limited: ([^ ]+)")
QUANTITY_TEXT = re.compile("([0-9]+(?:[.][0-9]+)?)(e[+-]?[0-9]{1,2}|[numkMGTPE]|[KMGTPE]i)?")
UNIT_POWERS = {"n": -3, "u": -2, "m": -1, "": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}
CLAIM = re.compile("(?i)persistentvolumeclaim")
SERVICE_EXITS = 2  # of a service before it listens, after which it is not waited for
VOLUME_EVENTS = ("FailedMount", "FailedAttachVolume", "FailedMapVolume")
STEPS = ("Pulling", "Pulled", "Created", "Started")  # of a container on its way to run
STARTING = ("ContainerCreating", "PodInitializing")  # of which the status says nothing more


@dataclass(frozen=True, slots=True)
class TestReport:
    """What a sentence says of the report of tests: the side-car left it, and the Job keeps it."""

    sentence: str

    @property
    def is_missing(self) -> bool:
        """Whether the tests have left no report."""
        return self.sentence == NO_REPORT

    @property
    def is_lost(self) -> bool:
        """Whether nothing is known of a report that may have been there."""
        return self.sentence.startswith(LOST_REPORT)

    @property
    def is_green(self) -> bool:
        """Whether tests were counted, and none has failed."""
        return GREEN_REPORT.fullmatch(self.sentence) is not None

    @property
    def is_red(self) -> bool:
        """Whether it speaks against the tests; if in doubt it does."""
        return not (self.is_missing or self.is_green)

    @property
    def text(self) -> str:
        """The sentence as it is shown, "" where there was no report."""
        return "" if self.is_missing else clip(self.sentence, 1000)

    def beside(self, message: str) -> str:
        """Return why tests failed: what it counts as red says it alone, else both say it."""
        if RED_REPORT.match(self.text):
            return self.text
        if self.is_green:
            return f"{self.text}, but {message}"
        return f"{message}; {self.text}" if self.text else message


@dataclass(frozen=True, slots=True)
class JobStage:
    """How a stage that is a Job works."""

    worker: str  # the container that does the work
    reporter: str  # the container whose termination message is the result
    annotation: str  # of the Job, where the result is kept
    failure: Reason


JOB_STAGES = {
    "test": JobStage(TEST_CONTAINER, RESULTS_CONTAINER, ANNOTATION_SUMMARY, Reason.TESTS_FAILED),
    "build": JobStage(BUILD_CONTAINER, BUILD_CONTAINER, ANNOTATION_DIGEST, Reason.BUILD_FAILED),
}
FREE_SLOT = "FreeSlot"  # beside the reasons: what a run waits for while others have all slots
Do = StrEnum("Do", "NOTHING WAIT ASK_HEAD UNSUSPEND BUILD ANNOTATE DEPLOY END")


# What a cluster says of a pod, the reason that it is, and what proves that it cannot heal. Until
# then it is waited for; what nothing proves ends with the time of the stage or of the rollout.
#
#     the image has no valid name              ManifestInvalid, JobRefused     at once
#     a registry refuses the image             ImageNotFound                   twice, or for 30 s
#     a registry does not answer               ImagePullFailed                 nothing
#     a Secret, a volume or room is missing    ContainerConfigError, …         nothing
#     a container ended                        CrashLoop, OutOfMemory, …       deploy.crashes alike
#     too much was written to disk             OutOfDisk                       at once
#     a service of the tests does not listen   ServiceFailed                   twice, or too late
#     more is asked than the quota allows      QuotaExceeded                   at once
#     the quota is used up                     QuotaExceeded                   nothing
#     a policy refuses the pod                 AdmissionRefused, JobRefused    3 s
#     the pod cannot be created otherwise      PodsNotCreated                  nothing
#     the live version lacks ready pods        UnhealthyAfterSwitch            1 s, 5 s or 20 s


@dataclass(frozen=True, slots=True)
class After:
    """It cannot heal once it has lasted for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Exits:
    """A container cannot heal once it has ended often enough in the same way."""

    total: int  # its ends until now, whatever their cause was
    first: int  # how many of them count where they are seen first
    enough: int


@dataclass(frozen=True, slots=True)
class Refusals:
    """An image cannot be pulled once it was refused twice alike, or stands refused for so long."""

    seconds: float
    renewed: bool  # whether it was just refused, rather than waits to be asked for again


AT_ONCE = After(0.0)
UNPROVEN = After(NEVER)


@dataclass(frozen=True, slots=True)
class PodProblem:
    """Something wrong with a pod, and what proves that it cannot heal."""

    key: str  # by which it is known from look to look
    reason: Reason
    detail: str
    _: KW_ONLY
    proof: After | Exits | Refusals
    cause: str = ""  # another one begins anew; "" where it is not said


def container_problem(
    container: Container, pod: Pod, events: Sequence[PodEvent], crashes: int, *, ready_counts: bool
) -> PodProblem | None:
    """Return what is wrong with a container, by the texts a real cluster gives."""
    key = f"{pod.name}/{container.name}"
    waiting = container.waiting
    text = f"container {container.name} of {pod.name}: {clip(container.text, WORDS_LENGTH)}"
    if waiting == "InvalidImageName":  # the kubelet does not even ask for it
        reason = Reason.JOB_REFUSED if pod.job else Reason.MANIFEST_INVALID
        return PodProblem(f"{key}/pull", reason, text, proof=AT_ONCE)
    if PULL.fullmatch(waiting):
        own = [e for e in events if (e.pod, e.container) == (pod.name, container.name)]
        return pull_problem(container, f"{key}/pull", text, own)
    if START.fullmatch(waiting) and not START.fullmatch(container.exit_reason):
        return PodProblem(f"{key}/start", Reason.CONTAINER_CONFIG, text, proof=UNPROVEN)
    worked = ready_counts and (container.ready or pod.seen_ready)
    return exit_problem(container, pod, crashes, worked=worked)


def pull_problem(
    container: Container, key: str, text: str, events: Sequence[PodEvent]
) -> PodProblem:
    """Return what is wrong with a pull: refused, which two refusals prove, or not answered."""
    if not (cause := refusal_of(container.text)):
        cause = "" if BARE_BACK_OFF.fullmatch(container.text) else "away"
        return PodProblem(key, Reason.IMAGE_PULL_FAILED, text, proof=UNPROVEN, cause=cause)
    refused = [e for e in events if e.reason == "Failed" and refusal_of(e.text) == cause]
    proven = sum(e.times for e in refused) > 1 and (
        max(e.last for e in refused) - min(e.first for e in refused) >= PROOF_SECONDS
    )
    renewed = container.waiting.startswith("ErrImage")
    proof = Refusals(0.0 if proven else REFUSED_SECONDS, renewed)
    return PodProblem(key, Reason.IMAGE_NOT_FOUND, text, proof=proof, cause=cause)


def refusal_of(text: str) -> str:
    """Return with which words a registry refuses an image, "" where it does not or is away."""
    unquoted = re.sub(r'"[^"]*"', "", text)  # an image may be called what it likes
    refusal = None if PASSING_PULL.search(unquoted) else HOPELESS_PULL.search(unquoted)
    return refusal[0].lower() if refusal else ""


def exit_problem(
    container: Container, pod: Pod, crashes: int, *, worked: bool
) -> PodProblem | None:
    """Return what is wrong with a container that ended, unless it may or has worked before."""
    key = f"{pod.name}/{container.name}/exit"
    code = container.exit_code
    out_of_memory = container.exit_reason == "OOMKilled"
    done = code is None or (code == 0 and container.kind != "app")
    if done or (worked and not out_of_memory) or (pod.job and container.kind == "sidecar"):
        return None
    reason = Reason.INIT_FAILED if container.kind == "init" else Reason.CRASH_LOOP
    if out_of_memory:
        reason = Reason.OUT_OF_MEMORY
    cause = f"{code} ({container.exit_reason})"
    text = f"container {container.name} of {pod.name} ended {container.exits} times"
    text += f", last with exit code {cause}"
    if START.fullmatch(container.exit_reason):  # the runtime's words: nothing of it has run
        text += f": {clip(container.words, WORDS_LENGTH)}"
    proof = Exits(container.exits, 1 if worked else container.exits, crashes)
    return PodProblem(key, reason, text, proof=proof, cause=cause)


def pod_problems(
    pod: Pod, events: Sequence[PodEvent] = (), crashes: int = 2, *, ready_counts: bool = True
) -> Iterator[PodProblem]:
    """Yield what is wrong with a pod; one that the cluster takes away is replaced, not sick.

    Where `ready_counts`, a container that was ready has worked, and may end afterwards.
    """
    if pod.leaving:
        return
    if pod.overfull:
        text = clip(pod.overfull)
        yield PodProblem(f"{pod.name}/disk", Reason.OUT_OF_DISK, text, proof=AT_ONCE)
    if pod.unschedulable:
        reason = Reason.UNSCHEDULABLE
        if CLAIM.search(pod.unschedulable):
            reason = Reason.VOLUME_UNAVAILABLE
        text = clip(pod.unschedulable, WORDS_LENGTH)
        yield PodProblem(f"{pod.name}/schedule", reason, text, proof=UNPROVEN)
    for container in pod.containers:
        if problem := container_problem(container, pod, events, crashes, ready_counts=ready_counts):
            yield problem


def times_words(number: int) -> str:
    """Return how often something has happened, as a sentence has it."""
    return "once" if number == 1 else f"{number} times"


def service_problems(pod: Pod, services: Sequence[ServiceSettings]) -> Iterator[PodProblem]:
    """Yield which services of a test pod do not listen, for which its tests wait.

    The Job itself would wait for ever. Two exits prove it, or the end of the service's time.
    """
    begun = any(c.kind == "app" and not c.waiting for c in pod.containers)
    by_name = {} if begun or not pod.stays else {service.name: service for service in services}
    for container in pod.containers:
        service = by_name.get(container.name)
        if service is None or container.started or not (container.running or container.exits):
            continue
        text = f"service {service.name} does not listen on port {service.port}"
        if container.exits:
            cause = f"exit code {container.exit_code} ({container.exit_reason})"
            text += f"; it ended {times_words(container.exits)}, last with {cause}"
        proof = AT_ONCE if container.exits >= SERVICE_EXITS else After(service.start_timeout)
        key = f"{pod.name}/{service.name}/service"
        yield PodProblem(key, Reason.SERVICE_FAILED, text, proof=proof)


def container_to_start(pod: Pod) -> Container | None:
    """Return the container that is to start next; None where the one before it is at work."""
    for container in pod.containers:
        if container.waiting:
            return container
        at_work = container.running and container.kind != "app"
        if at_work and not (container.kind == "sidecar" and container.ready):
            return None
    return None


def held_container(pod: Pod) -> Container | None:
    """Return the container for which a pod is not ready: it has to start, or to become ready."""
    running = (c for c in pod.containers if c.running and c.kind == "app" and not c.ready)
    return container_to_start(pod) or next(running, None)


def is_unexplained(pod: Pod) -> bool:
    """Whether the Events of a pod say more than its status about why it is not ready."""
    container = held_container(pod) if pod.stays and not pod.unschedulable else None
    if container is None:
        return False
    waiting = container.waiting
    return not waiting or waiting in STARTING or PULL.fullmatch(waiting) is not None


def start_problem(pod: Pod, events: Iterable[PodEvent]) -> PodProblem | None:
    """Return why a pod is not ready of which the status does not say it, by its newest Event."""
    if not is_unexplained(pod) or not (container := held_container(pod)):
        return None
    own = [e for e in events if e.pod == pod.name and (e.is_warning or e.reason in STEPS)]
    newest = max(reversed(own), key=lambda event: event.last, default=None)
    what = "not started" if container.waiting else "not ready"
    reason = Reason.NEVER_STARTED if container.waiting else Reason.NEVER_READY
    if newest and newest.reason in VOLUME_EVENTS:
        reason = Reason.VOLUME_UNAVAILABLE
    text = f"container {container.name} of {pod.name} is {what}"
    if words := newest.text if newest else container.waiting:
        text += f": {words}"
    return PodProblem(f"{pod.name}/start", reason, text, proof=UNPROVEN)


def holdup(pods: Sequence[Pod], events: Sequence[PodEvent], crashes: int = 2) -> PodProblem | None:
    """Return what pods wait for: what is wrong with them, else which container has to start."""
    problems = (problem for pod in pods for problem in pod_problems(pod, events, crashes))
    starts = (problem for pod in pods if (problem := start_problem(pod, events)))
    return next(problems, None) or next(starts, None)


def creation_problem(message: str, key: str) -> PodProblem:
    """Return why pods cannot be created, from a FailedCreate event or ReplicaFailure condition."""
    text = clip(message, WORDS_LENGTH)
    if "exceeded quota: " in message:
        proof = AT_ONCE if is_above_quota(message) else UNPROVEN
        return PodProblem(f"{key}/quota", Reason.QUOTA_EXCEEDED, text, proof=proof)
    unquoted = re.sub(r'"[^"]*"', "", message)  # a pod may be called what it likes
    passes = PASSING_CREATION.search(unquoted) or not REFUSAL.search(unquoted)
    if passes and not POLICY.search(unquoted):
        return PodProblem(f"{key}/create", Reason.PODS_NOT_CREATED, text, proof=UNPROVEN)
    return PodProblem(f"{key}/create", Reason.ADMISSION_REFUSED, text, proof=After(3.0))


def job_creation_problem(message: str, key: str) -> PodProblem:
    """Return why the pods of a Job cannot be created: these are as the configuration has them."""
    problem = creation_problem(message, key)
    if problem.reason is Reason.ADMISSION_REFUSED:
        return replace(problem, reason=Reason.JOB_REFUSED)
    return problem


def is_above_quota(message: str) -> bool:
    """Whether a quota's refusal says that more is requested than the quota ever allows."""
    if not (amounts := QUOTA.search(message)):
        return False
    requested, limited = (
        dict(item.split("=", 1) for item in group.split(",") if "=" in item)
        for group in amounts.groups()
    )
    nothing = Decimal(0)
    return any(quantity(requested.get(n, ""), nothing) > quantity(limited[n]) for n in limited)


def quantity(text: str, other: Decimal = Decimal("Infinity")) -> Decimal:
    """Return a Kubernetes quantity, such as 250m or 1Gi, as a number; `other` for another text."""
    if not (parts := QUANTITY_TEXT.fullmatch(text)):
        return other
    unit = parts[2] or ""
    if unit.endswith("i"):
        return Decimal(parts[1]) * Decimal(1024) ** UNIT_POWERS[unit[0].replace("K", "k")]
    if unit[1:]:
        return Decimal(parts[1] + unit)
    return Decimal(parts[1]) * Decimal(1000) ** UNIT_POWERS[unit]


@dataclass(frozen=True, slots=True)
class Followed:
    """How long, and how often, a problem has been seen with the same cause."""

    problem: PodProblem  # as it is now
    since: float
    times: int

    @classmethod
    def at_first_look(cls, problem: PodProblem, now: float) -> Followed:
        """Return it as it is seen first."""
        return cls(problem, now, problem.proof.first if isinstance(problem.proof, Exits) else 1)

    def at_next_look(self, problem: PodProblem, now: float) -> Followed:
        """Return it as it is seen again; another cause begins anew.

        The kubelet alternates while an image is refused. It says why after each pull, ErrImagePull,
        and nothing but ImagePullBackOff until the next one. So the cause is kept over the silence,
        and each time that it is said anew, `renewed`, counts as one more refusal.
        """
        before = self.problem
        if isinstance(before.proof, Refusals) and not problem.cause:
            silent = replace(before.proof, renewed=False)
            return replace(self, problem=replace(before, proof=silent))
        again = 0
        match before.proof, problem.proof:
            case Exits(), Exits():
                again = max(0, problem.proof.total - before.proof.total)
            case Refusals(renewed=False), Refusals(renewed=True):
                again = int(now - self.since >= PROOF_SECONDS)
        if problem.cause != before.cause:
            return Followed(problem, now, again or 1)
        return Followed(problem, self.since, self.times + again)

    def is_fatal(self, now: float) -> bool:
        """Whether it is proven that it cannot heal."""
        lasted = now - self.since
        match self.problem.proof:
            case After(seconds):
                return lasted >= seconds
            case Exits(enough=enough):
                return self.times >= enough and lasted >= PROOF_SECONDS
            case Refusals(seconds):
                return lasted >= seconds or (self.times > 1 and lasted >= PROOF_SECONDS)


class ProblemTracker:
    """Follows each problem while it is there, and so knows which one is fatal."""

    def __init__(self) -> None:
        self._followed: dict[str, Followed] = {}

    def fatal(self, problems: Iterable[PodProblem], now: float) -> PodProblem | None:
        """Return a problem that cannot heal; what is gone is forgotten."""
        before = self._followed
        self._followed = {
            key: before[key].at_next_look(problem, now)
            if key in before
            else Followed.at_first_look(problem, now)
            for key, problem in {p.key: p for p in problems}.items()
        }
        fatal = (f.problem for f in self._followed.values() if f.is_fatal(now))
        return next(fatal, None)


class Head(StrEnum):
    """What the head of a run's branch is."""

    SAME = "same"  # the commit of the run
    NEWER = "newer"  # another commit, or none
    UNKNOWN = "unknown"  # git did not answer, or may still show the commit before the push


@dataclass(frozen=True, slots=True)
class Action:
    """The next step of a run: what, and why."""

    do: Do
    stage: str = ""
    reason: Reason = Reason.OK
    detail: str = ""
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """How far the manifests of a run are read beside its tests; a deployment reads them anyway."""

    under_way: bool = False
    done: bool = False
    end: Action | None = None  # how the run ends by them


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """Everything observed that decides over one run."""

    app: App
    run: Run
    jobs: Mapping[str, Job]  # by stage
    pods: tuple[Pod, ...]
    services: Mapping[str, Service]  # the live Service by environment
    head: Head  # what git says about the run's ref
    newer: bool  # the same ref was pushed again
    fatal_problem: PodProblem | None
    busy: frozenset[str]  # environments that a worker is changing
    now: float
    queue_timeout: float
    slot: bool = True  # whether one more Job of the run may start
    holdup: PodProblem | None = None  # what its pods wait for
    reading: Reading = Reading()

    @property
    def restarted_services(self) -> str:
        """Which services of the tests ended, and were started again, meanwhile."""
        names = [service.name for service in self.app.test.services]
        ours = [c for pod in self.pods if pod.job for c in pod.containers if c.name in names]
        texts = [
            f"service {c.name} was restarted {times_words(c.restarts)}" for c in ours if c.restarts
        ]
        return "; ".join(texts)

    @property
    def report(self) -> TestReport:
        """The test report, as far as it is kept."""
        test = self.jobs.get("test")
        return (kept_report(test) if test else None) or TestReport(NO_REPORT)


def newest_run(jobs: Mapping[str, Job]) -> Run:
    """Return the run of a group of Jobs, as the one has it that was made or opened again last."""
    return max((j.run for j in jobs.values()), key=lambda run: run.received)


# A run can begin again: by its next try, by `rerun` or by a new delivery. No object stands for a
# try. It begins when the run is received, which `reopen` writes on its Jobs. What is older is of an
# earlier try: ends of Jobs, entries of the history, claims and records.


def has_ended(jobs: Mapping[str, Job]) -> bool:
    """Whether a run has ended: its last Job says so, and not of an earlier try of the run."""
    last = jobs.get("build") or jobs["test"]
    return bool(last.outcome) and last.ended >= newest_run(jobs).received


def ends(outcome: Outcome, reason: Reason, detail: str, stage: str) -> Action:
    """Return that a run has ended."""
    return Action(Do.END, stage, reason, detail, outcome)


def fails(reason: Reason, detail: str, stage: str) -> Action:
    """Return that a run has failed."""
    return ends(Outcome.FAILED, reason, detail, stage)


def end_by_faults(faults: Mapping[str, Sequence[Fault]]) -> Action | None:
    """Return how a run ends by the faults of its manifests in each environment, if there are any.

    What is refused in all of them is said once, anything else behind the names of environments.
    """
    places: dict[Fault, list[str]] = {}
    for environment, own in faults.items():
        for fault in own:
            places.setdefault(fault, []).append(environment)
    if not places:
        return None
    named = [
        fault
        if len(names) == len(faults)
        else replace(fault, text=f"{', '.join(names)}: {fault.text}")
        for fault, names in places.items()
    ]
    refusal = ManifestError(named)
    first = next(environment for environment, own in faults.items() if own)
    return fails(refusal.reason, refusal.detail, first)


# Each stage of a run is asked in turn what is to be done next. None always means: nothing here, so
# the run goes on.


def decide(observed: Observation) -> Action:
    """Return the next step of a run, from nothing but what is observed."""
    if not observed.jobs or has_ended(observed.jobs):
        return Action(Do.NOTHING)
    step = decide_tests(observed) or decide_build(observed) or decide_deploy(observed)
    return decide_manifests(observed, step) or step


def decide_tests(observed: Observation) -> Action | None:
    """Return what the tests of a run need; where nothing is deployed, it ends with them."""
    if test := observed.jobs.get("test"):
        report = new_report(test, pods_of(observed, test))
        # that there is none need not be kept before the run goes on
        result = "" if report is None or report.is_missing else report.sentence
        if action := decide_job(observed, test, result) or judge_report(observed, test, report):
            return action
    if observed.run.ref != observed.app.deploy_ref or not observed.app.deploy.environments:
        return ends(Outcome.TESTED, Reason.OK, observed.report.text, "test")
    return None


def judge_report(observed: Observation, test: Job, new: TestReport | None) -> Action | None:
    """Return what is wrong with tests that ended with exit code 0, by their report."""
    report = kept_report(test) or new
    if was_accepted(observed, report):
        return None
    if report is None:
        if observed.now - test.finished < LAG:
            return Action(Do.WAIT, "test", detail="for what its pod says of the test report")
        return Action(Do.ANNOTATE, "test", detail=f"{LOST_REPORT}: its pod is gone")
    if report.is_lost:
        return fails(Reason.VANISHED, report.sentence, "test")
    detail = f"exit code 0, but {observed.report.text}"
    return with_services(observed, fails(Reason.TESTS_FAILED, detail, "test"))


def with_services(observed: Observation, action: Action) -> Action:
    """Return an end of red tests that also names the services that ended meanwhile."""
    ended = observed.restarted_services if action.reason is Reason.TESTS_FAILED else ""
    return replace(action, detail=f"{action.detail}; {ended}") if ended else action


def was_accepted(observed: Observation, report: TestReport | None) -> bool:
    """Whether succeeded tests are green: by their report, or because an older version said so.

    A deployment that it has begun is not stopped half-way. Where it kept nothing of a report, and
    the pod is gone, what it did after the tests tells.
    """
    run = observed.run
    build = observed.jobs.get("build")
    services = [*observed.services.values()]
    if any(s.claim.run == run.id and s.claim.since >= run.received for s in services):
        return True
    if report:
        return not report.is_red
    finished = observed.jobs["test"].finished
    switched = any(service.entry(run.id, finished) for service in services)
    return switched or (build is not None and not build.outcome)


def new_report(test: Job, pods: Iterable[Pod]) -> TestReport | None:
    """Return the report that pods of tests left, newest first, unless their Job has it.

    Where tests ran in two pods, because a container of the first one that is not ours failed, say,
    a red report counts, whatever was kept before.
    """
    kept = kept_report(test)
    reports = [report for pod in pods if (report := report_of(test, pod))]
    red = [report for report in reports if report.is_red and not report.is_lost]
    if kept is None:
        return next(iter(red or reports), None)
    return None if kept.is_red else next(iter(red), None)


def report_of(test: Job, pod: Pod) -> TestReport | None:
    """Return the report that a pod left whose tests have ended.

    The side-car leaves a sentence whatever it reads; the one of an older version left none where
    there was no report. One that was killed could not look.
    """
    reporter = reporter_of(test, pod)
    if reporter and (words := reporter.words.strip()):
        return TestReport(words)
    if reporter is None or test.state != "succeeded":
        return None
    code = reporter.exit_code
    lost = f"{LOST_REPORT}: container {reporter.name} ended with exit code {code}"
    return TestReport(lost if code else NO_REPORT)


def kept_report(test: Job) -> TestReport | None:
    """Return the report that the Job of tests keeps, None where nothing of it is known yet."""
    sentence = test.annotations.get(ANNOTATION_SUMMARY)
    return None if sentence is None else TestReport(sentence)


def is_reusable(job: Job) -> bool:
    """Whether a finished Job need not run again: it succeeded, and its result is kept and good."""
    if job.stage == "build":
        return job.state == "succeeded" and ANNOTATION_DIGEST in job.annotations
    report = kept_report(job)
    return job.state == "succeeded" and not (report and report.is_red)


def decide_build(observed: Observation) -> Action | None:
    """Return what the build of a run needs, if its app is built."""
    if observed.app.build.builder == "none":
        return None
    build = observed.jobs.get("build")
    if not build or build.outcome:  # it belongs to an earlier try of this run
        return decide_start(observed, Do.BUILD, "build")
    digest = new_digest(build, pods_of(observed, build))
    return decide_job(observed, build, digest) or await_digest(observed, build)


def new_digest(build: Job, pods: Iterable[Pod]) -> str:
    """Return the digest that a build's pods left, newest first, unless its Job has it."""
    if ANNOTATION_DIGEST in build.annotations:
        return ""
    reporters = (container for pod in pods if (container := reporter_of(build, pod)))
    digests = (container.words.strip() for container in reporters)
    return next((digest for digest in digests if DIGEST.fullmatch(digest)), "")


def await_digest(observed: Observation, build: Job) -> Action | None:
    """Return what to do about a finished build that left no digest: it is made once more."""
    if ANNOTATION_DIGEST in build.annotations:
        return None
    if observed.now - build.finished < LAG:
        return Action(Do.WAIT, "build", detail="for the digest")
    if ANNOTATION_REMADE in build.annotations:
        return fails(Reason.NO_DIGEST, "the build left no digest, twice", "build")
    return decide_start(observed, Do.BUILD, "build")


def decide_deploy(observed: Observation) -> Action:
    """Return which environment comes next, or how the run ended there."""
    for name in observed.app.deploy.environments:
        if action := decide_environment(observed, name):
            return action
    last = observed.app.deploy.environments[-1]
    return ends(Outcome.DEPLOYED, Reason.OK, observed.report.text, last)


def decide_environment(observed: Observation, name: str) -> Action | None:
    """Return what a run needs in an environment until it is deployed there."""
    run = observed.run
    service = observed.services.get(name)
    entry = service.entry(run.id, run.received) if service else HistoryEntry()
    switched = service is not None and service.run == run.id
    # an earlier delivery of the commit may have made it live, which the entry above leaves out
    live = service.live if service and switched else HistoryEntry()
    confirmed = Outcome.DEPLOYED in (entry.outcome, live.outcome)
    bakes_here = name == observed.app.deploy.environments[-1]
    # the bake writes the confirmation, looks once more, and may yet switch back
    may_be_withdrawn = switched and bakes_here
    if name in observed.busy and (not confirmed or may_be_withdrawn):
        return Action(Do.WAIT, name, detail=f"{name} is being changed")
    if confirmed:
        return None
    if entry.outcome in (Outcome.SWITCHED_BACK, Outcome.ROLLED_BACK, Outcome.FAILED):
        reason = Reason.of(entry.reason) or Reason.UNHEALTHY_AFTER_SWITCH
        return ends(Outcome(entry.outcome), reason, entry.detail, name)
    held_up = None if switched else check_head(observed, name)
    return held_up or Action(Do.DEPLOY, name)


def decide_manifests(observed: Observation, step: Action) -> Action | None:
    """Return what the manifests of a run have against a step of it, until it has deployed some."""
    run = observed.run
    services = observed.services.values()
    begun = any(s.claim.run == run.id or s.entry(run.id, run.received) for s in services)
    deploys = step.do is Do.DEPLOY and not begun
    if step.do is Do.END or not (deploys or step.stage in JOB_STAGES):
        return None
    if observed.reading.under_way and deploys:
        return Action(Do.WAIT, step.stage, detail="for its manifests to be read")
    return observed.reading.end


def reads_manifests(observed: Observation, step: Action) -> bool:
    """Whether to read the manifests of a run now: beside its tests and its build, or before."""
    app = observed.app
    deploys = observed.run.ref == app.deploy_ref and bool(app.deploy.environments)
    moved_on = observed.head == Head.NEWER or (observed.newer and observed.head != Head.SAME)
    due = step.stage in JOB_STAGES and step.do is not Do.END and observed.reading == Reading()
    return deploys and due and not moved_on


def decide_job(observed: Observation, job: Job, result: str) -> Action | None:
    """Return what a Job needs until it has succeeded; a result that is new is kept first."""
    if job.deleting:
        return Action(Do.WAIT, job.stage, detail=f"Job {job.name} is being deleted")
    if job.state == "suspended":
        return decide_start(observed, Do.UNSUSPEND, job.stage)
    if result:
        return Action(Do.ANNOTATE, job.stage, detail=result)
    if job.state == "succeeded":
        return None
    if problem := observed.fatal_problem:
        return fails(problem.reason, problem.detail, job.stage)
    failed = job.state == "failed"
    return job_failure(observed, job) if failed else lateness(observed, job)


def decide_start(observed: Observation, do: Do, stage: str) -> Action:
    """Return whether a Job may start: of the newest commit, and where there is a free slot."""
    if action := check_head(observed, stage):
        return action
    start = Action(do, stage)
    return start if observed.slot else without_slot(observed, start)


def without_slot(observed: Observation, start: Action) -> Action:
    """Return what becomes of a step that would start a Job, where there is no free slot."""
    stage = start.stage
    queued = start.do is Do.UNSUSPEND
    if queued and observed.now - observed.jobs[stage].created > observed.queue_timeout:
        return fails(Reason.QUEUE_TIMEOUT, "no free slot in time", stage)
    return Action(Do.WAIT, stage, detail="for a free slot")


def check_head(observed: Observation, stage: str) -> Action | None:
    """Return how a run ends, or that git is to be asked, unless its commit is its ref's newest."""
    superseded = ends(Outcome.SUPERSEDED, Reason.NOT_HEAD, "the branch was pushed again", stage)
    if observed.run.ref != observed.app.deploy_ref:  # only what is deployed needs git
        return superseded if observed.newer else None
    if observed.head == Head.UNKNOWN:
        return Action(Do.ASK_HEAD, stage, Reason.GIT_ERROR, "for the head of the branch")
    return superseded if observed.head == Head.NEWER else None


def pods_of(observed: Observation, job: Job) -> list[Pod]:
    """Return the pods of a Job that the cluster does not take away, newest first."""
    pods = (p for p in observed.pods if p.job == job.uid and not p.leaving)
    return sorted(pods, key=lambda p: -p.created)


def reporter_of(job: Job, pod: Pod) -> Container | None:
    """Return the container that leaves the result of a pod, None until the pod's work has ended."""
    stage = JOB_STAGES[job.stage]
    ended = {c.name: c for c in pod.containers if c.exit_code is not None and not c.running}
    return ended.get(stage.reporter) if stage.worker in ended else None


def lateness(observed: Observation, job: Job) -> Action:
    """Return what an unsuspended Job waits for, or which of its times is over."""
    pods = pods_of(observed, job)
    why = job.annotations.get(ANNOTATION_DETAIL, "")
    limit = getattr(observed.app, job.stage).timeout
    started = max((p.started for p in pods), default=0.0)
    late = started and observed.now - started > limit
    waited = observed.now - job.unsuspended
    lost = not started and job.unsuspended and waited > observed.queue_timeout
    if observed.holdup and (late or lost):  # it never came to its work
        return fails(observed.holdup.reason, observed.holdup.detail, job.stage)
    if late:
        running = still_running(job, pods[:1], NEVER)
        detail = f"{running} after {limit:.0f} s" if running else f"no result within {limit:.0f} s"
        return fails(Reason.TIMEOUT, detail, job.stage)
    if lost:
        return fails(Reason.QUEUE_TIMEOUT, why or "no pod could start in time", job.stage)
    return Action(Do.WAIT, job.stage, detail="its pod runs" if started else why or "for its pod")


def still_running(job: Job, pods: Iterable[Pod], since: float) -> str:
    """Return which container of a Job's pods still runs, or ended only since then; "" for none.

    Side-cars run until the others have ended. Beside the container that does the work none is
    named: one that a service mesh added, say, runs as long as it does at least.
    """
    late = [c for p in pods for c in p.containers if c.running or c.ended >= since]
    names = [c.name for c in late if c.kind != "sidecar"]
    worker = JOB_STAGES[job.stage].worker
    names = [worker] if worker in names else names
    if len(names) == 1:
        return f"container {names[0]} still runs"
    return f"containers {clip(', '.join(names))} still run" if names else ""


def job_failure(observed: Observation, job: Job) -> Action:
    """Return why a Job failed, by its pods or its own condition, or that they may yet tell."""
    stage = JOB_STAGES[job.stage]
    report = observed.report if job.stage == "test" else TestReport(NO_REPORT)
    containers = (c for p in pods_of(observed, job) for c in p.containers)
    ended = [c for c in containers if c.exit_code is not None]
    names = (stage.worker, "clone")
    culprit = next((c for c in ended if c.exit_code and c.name in names), None)
    if culprit and lacks_report(observed, job):
        return Action(Do.WAIT, job.stage, detail="for what its pod says of the test report")
    if culprit:
        return with_services(observed, culprit_failure(job, culprit, report))
    if job.reason == "DeadlineExceeded" and not ended and (waited := waited_for(job)):
        return waited
    if job.reason == "DeadlineExceeded":
        # its pods are deleted then
        pods = sorted((p for p in observed.pods if p.job == job.uid), key=lambda p: -p.created)
        running = still_running(job, pods[:1], job.finished)
        detail = f"the Job's deadline passed{running and ': '}{running}"
        return fails(Reason.TIMEOUT, detail, job.stage)
    if observed.now - job.finished < LAG:
        return Action(Do.WAIT, job.stage, detail="for its pod's last words")
    own = [p for p in observed.pods if p.job == job.uid]
    taken = any(p.leaving or any(c.lost for c in p.containers) for p in own)
    exited = job.reason == "PodFailurePolicy" and not taken
    reason = stage.failure if exited else Reason.VANISHED
    detail = report.beside(f"its pods left no result ({clip(job.reason, 60)})")
    return fails(reason, detail, job.stage)


def lacks_report(observed: Observation, job: Job) -> bool:
    """Whether the pods of failed tests may still leave their report, which the side-car reads."""
    reporters = {c.name: c for p in pods_of(observed, job) for c in p.containers if c.running}
    late = observed.now - job.finished >= LAG
    return job.stage == "test" and not late and RESULTS_CONTAINER in reporters


def waited_for(job: Job) -> Action | None:
    """Return the end of a Job whose deadline passed while its pod waited, if it did."""
    reason = Reason.of(job.annotations.get(ANNOTATION_REASON, ""))
    if reason not in CIRCUMSTANCES:
        return None
    return fails(reason, job.annotations.get(ANNOTATION_DETAIL, ""), job.stage)


def culprit_failure(job: Job, culprit: Container, report: TestReport) -> Action:
    """Return why a Job failed, by the container that did."""
    if culprit.exit_reason == "OOMKilled":
        detail = f"{culprit.name} was killed for its memory"
        return fails(Reason.OUT_OF_MEMORY, detail, job.stage)
    # the clone's words are our own; those of pushed code may hold anything
    message = clip(culprit.words if culprit.name == "clone" else culprit.text)
    message = message or f"exit code {culprit.exit_code}"
    if culprit.name == "clone":
        is_refusal = culprit.exit_code == EXIT_REFUSED
        reason = Reason.CLONE_REFUSED if is_refusal else Reason.CLONE_FAILED
        return fails(reason, message, job.stage)
    if job.stage == "build" and (trouble := registry_trouble(culprit.words)):
        return fails(Reason.REGISTRY_UNAVAILABLE, trouble, job.stage)
    return fails(JOB_STAGES[job.stage].failure, report.beside(message), job.stage)


def registry_trouble(printed: str) -> str:
    """Return what a registry kept the builder from, by the end of its log; "" for nothing.

    No Dockerfile can be blamed for a push that failed. A base image may be misnamed, and a step of
    the Dockerfile may reach what is away, so those count only where a registry did not answer.
    """
    errors = [line for line in printed.split("\n") if KANIKO_ERROR.match(line)]
    last = errors[-1] if errors else ""
    if last.startswith("error building"):
        away = not DOCKERFILE_ERROR.search(last) and BASE_AWAY.search(re.sub('"[^"]*"', "", last))
        return "a base image could not be pulled, since its registry did not answer" if away else ""
    how = "`explain RUN --log` shows what the registry answered"
    return f"the image could not be pushed; {how}" if last else ""


@dataclass(frozen=True, slots=True)
class Wait:
    """What a run waits for before the work of its stage begins, a word of ours, and since when."""

    reason: str
    since: float


def wait_of(observed: Observation, action: Action) -> Wait | None:
    """Return what keeps the Job of a run from its work, None where nothing does."""
    if action.do not in (Do.WAIT, Do.ASK_HEAD) or action.stage not in JOB_STAGES:
        return None
    job = observed.jobs.get(action.stage)
    if job and job.state == "active":
        reason = job.annotations.get(ANNOTATION_REASON, "")  # which anyone may write
        return Wait(reason, job.unsuspended) if reason in CIRCUMSTANCES else None
    reason = str(action.reason) if observed.slot else FREE_SLOT
    if reason == Reason.OK:
        return None
    since = job.created if job else observed.jobs["test"].finished
    return Wait(reason, max(since, observed.run.received))


def grant_slots(
    wanted: Sequence[Run],
    running: Sequence[Run],
    last_started: Mapping[str, float],
    limit: int,
    is_deployed: Callable[[Run], bool],
) -> set[str]:
    """Return the runs that may start a Job now; `last_started` says when each app started one.

    Deploy branches come before test-only branches, then apps in turn, then the newest push. One
    slot is left to deploy branches. An app has at most half of the slots while another one waits.
    """
    used = [*running]
    turns = dict(last_started)
    granted = set[str]()
    while True:
        tests = sum(not is_deployed(run) for run in used)
        room_for_tests = tests < max(limit - 1, 1)
        waiting = [r for r in wanted if r.id not in granted and (room_for_tests or is_deployed(r))]
        apps = Counter(run.app for run in used)
        alone = len({run.app for run in waiting}) == 1
        most = limit if alone else (limit + 1) // 2
        fair = [run for run in waiting if apps[run.app] < most]
        if len(used) >= limit or not fair:
            return granted
        best = min(fair, key=lambda r: (not is_deployed(r), turns.get(r.app, 0.0), -r.received))
        granted.add(best.id)
        used.append(best)
        turns[best.app] = NEVER


def head_of(
    run: Run, heads: Mapping[str, str] | None, age: float, now: float, older: Set[str] = frozenset()
) -> Head:
    """Return what heads that were read `age` seconds ago say about a run.

    A server that still shows a commit from before the push may only lag behind its own webhook.
    """
    if heads is None or age > HEAD_FRESH:
        return Head.UNKNOWN
    if (head := heads.get(run.ref, "")) == run.commit:
        return Head.SAME
    lagging = head in {run.before, *older} if head else set(run.before) == {"0"}
    return Head.UNKNOWN if lagging and now - run.received < HEAD_GRACE else Head.NEWER


def commits_before(run: Run, before: Mapping[str, str]) -> frozenset[str]:
    """Return the commits that a ref had before a push, from the commit before each push of it."""
    older: dict[str, None] = {}
    commit = run.before
    while commit and commit != run.commit and commit not in older:
        older[commit] = None
        commit = before.get(commit, "")
    return frozenset(older)


def container_failure(pods: Iterable[Pod], since: float) -> str:
    """Return which app container of a switched-to run ended with an error since then, or ""."""
    for pod in (p for p in pods if not p.leaving):
        for container in pod.containers:
            failed = container.kind == "app" and container.exit_code
            if failed and container.ended >= int(since):
                code = container.exit_code
                return f"container {container.name} of {pod.name} ended with exit code {code}"
    return ""


def unready(pods: Iterable[Pod], since: float) -> list[Pod]:
    """Return the pods of the switch that are not ready, by the word of their own containers."""
    # not by the Ready condition: that falls with a lost node, too, which is no sickness
    old = (p for p in pods if p.created <= since and not p.leaving)
    return [p for p in old if not all(c.ready for c in p.containers if c.kind == "app")]


def readiness_shortage(
    pods: Iterable[Pod], since: float, now: float, *, replacing: bool
) -> PodProblem | None:
    """Return how a switched-to run has too few ready pods, and for how long it may have.

    The pods say themselves since when they are not ready, to a daemon that did not see it begin.
    `replacing`: the run has pods, so that the cluster is replacing those that it took away.
    """
    pods = [*pods]
    down = unready(pods, since)
    some_ready = any(p.ready for p in pods)
    if some_ready and not down:
        return None
    grace = UNREADY_SECONDS if some_ready else GONE_SECONDS
    if replacing and not down:
        grace = REPLACED_SECONDS
    kind = f"not ready for {grace:.0f} s"  # one that changes its kind begins anew
    detail = f"{kind}: {', '.join(p.name for p in down) or 'any pod'}"
    lasts = down and now - max(p.changed for p in down) > grace + 1.0  # it is in whole seconds
    proof = AT_ONCE if lasts else After(grace)
    return PodProblem(kind, Reason.UNHEALTHY_AFTER_SWITCH, detail, proof=proof)


def pods_taken_away(pods: Sequence[Pod], wanted: int) -> bool:
    """Whether the cluster took pods of a run away: eviction, a lost node, a deletion."""
    stayed = [p for p in pods if not p.leaving]
    asleep = (p for p in stayed if not p.ready and {c.ready for c in p.containers} == {True})
    running = [p for p in pods if any(c.running for c in p.containers)]
    return any(asleep) or len(stayed) < max(wanted, len(running))


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthChecks:
    """What the health checks of a switched-to version have shown, and for how long."""

    asked: int = 0  # in all
    failures: int = 0  # in a row
    passes: int = 0  # in a row, none of them long after the one before
    refusal: str = ""
    judged_seconds: float = 0.0  # between two that passed, while nothing was hidden
    last_at: float = -NEVER  # when the last one ended

    def after(self, now: float, refusal: str | None, *, clear: bool) -> HealthChecks:
        """Return them with one more; `clear`: nothing that it does not show was hidden."""
        passes = 0 if refusal else 1 + self.passing(now)
        seconds = now - self.last_at if clear and passes > 1 else 0.0
        return HealthChecks(
            asked=self.asked + 1,
            failures=self.failures + 1 if refusal else 0,
            passes=passes,
            refusal=refusal or "",
            judged_seconds=self.judged_seconds + seconds,
            last_at=now,
        )

    def passing(self, now: float) -> int:
        """Return how many in a row have passed, up to now."""
        return self.passes if now - self.last_at <= CHECK_GAP else 0


@dataclass(frozen=True, slots=True)
class WorkersSeen:
    """How the workers of a version are: what they wait for, and which of them has failed, or ""."""

    waits: str = ""
    failed: str = ""
    never_ready: bool = False  # whether they run, and are not ready of their own accord


@dataclass(frozen=True, kw_only=True, slots=True)
class BakeLook:
    """What the API server last said of a version in its bake; times are monotonic."""

    read_at: float = -NEVER  # when the pods were read
    pods: tuple[Pod, ...] = ()
    wanted: int = 0
    checks: tuple[HealthCheck, ...] = ()  # of the pods that were ready and stay
    workers: WorkersSeen = WorkersSeen()
    preview: HealthCheck | None = None  # whom to ask for health
    endpoints_came: bool | None = None  # None while they are waited for
    proved_at: float | None = None  # when the proof was taken on which it is confirmed
    confirmed_at: float | None = None  # when the confirmation on that proof was written
    end: RunError | None = None  # what ends the bake otherwise

    def is_fresh(self, now: float) -> bool:
        """Whether the API server was heard a moment ago."""
        return now - self.read_at <= FRESH_SECONDS

    def is_complete(self, now: float) -> bool:
        """Whether no pod was missing a moment ago."""
        return self.is_fresh(now) and not pods_taken_away(self.pods, self.wanted)

    def is_proven(self, now: float) -> bool:
        """Whether the proof was fresh when the confirmation was written, or is while it is not."""
        at = now if self.confirmed_at is None else self.confirmed_at
        return self.proved_at is not None and at - self.proved_at <= CHECK_GAP


class Verdict(StrEnum):
    """What is to become of a version in its bake."""

    WATCH = "it is healthy so far, or not unhealthy for long enough"
    CONFIRM = "it is proven"
    STAYS = "it is confirmed: the bake is over"
    WORKER_FAILED = "its worker has failed"
    CHECKS_FAILED = "its health checks failed"
    PODS_FAILED = "its pods say themselves that they are unhealthy"
    ENDPOINTS_MISSING = "its endpoints did not come"
    UNJUDGEABLE = "nobody could tell for too long"


@dataclass(frozen=True, kw_only=True, slots=True)
class BakeObservation:
    """Everything observed of a version in its bake that decides over it."""

    settings: DeploySettings
    now: float
    look: BakeLook
    checks: HealthChecks
    excused: int = 0  # so many of the first checks that were asked, whose failures do not count
    pods_fault: str = ""  # why its pods are unhealthy by their own word
    healthy: bool = False  # whether the last checks passed, and no container has failed
    judged_seconds_needed: float
    unjudged_seconds: float = 0.0
    gave_up: bool = False  # judging it: it may be confirmed without

    @property
    def is_unjudged_too_long(self) -> bool:
        """Whether nobody could tell its health for as long as a rollout may take."""
        return self.unjudged_seconds > self.settings.rollout_timeout


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is to become of a version in its bake, and why."""

    verdict: Verdict
    why: str = ""


def judgement(seen: BakeObservation) -> Judgement:
    """Return what is to become of a version in its bake, and why.

    What counts depends on how far it has come, by what the observer has put into its look:

    watched    nothing is proven     every objection counts, the first one as they are listed
    proven     `proved_at` is fresh  the confirmation is being written: only pods that fail count
    confirmed  `confirmed_at` is set it stays, unless `confirmation_stands` says no: then the bake
                                     goes on, as if it was proven or watched only
    """
    look = seen.look
    if look.confirmed_at is not None and confirmation_stands(seen):
        return Judgement(Verdict.STAYS)
    proven = look.is_proven(seen.now)
    for verdict, why in objections(seen).items():
        if why and (not proven or verdict is Verdict.PODS_FAILED):
            return Judgement(verdict, why)
    judged = seen.checks.judged_seconds >= seen.judged_seconds_needed and not look.workers.waits
    # whoever confirms it hears the API server first, so that this need not be fresh
    provable = seen.healthy and look.endpoints_came
    return Judgement(Verdict.CONFIRM if provable and (judged or seen.gave_up) else Verdict.WATCH)


def confirmation_stands(seen: BakeObservation) -> bool:
    """Whether a version that was confirmed may be left alone now.

    Writing that may have been held up until its proof was an old one. Then it has to be healthy
    still; if nobody can tell for too long, it stays as well.
    """
    proven = seen.look.is_proven(seen.now)
    return not seen.pods_fault and (proven or seen.healthy or seen.is_unjudged_too_long)


def objections(seen: BakeObservation) -> dict[Verdict, str]:
    """Return what speaks against a version in its bake, the most telling first; "" for nothing."""
    failures = min(seen.checks.failures, seen.checks.asked - seen.excused)
    failed = failures >= seen.settings.health.failures
    refused = f"failed {failures} times in a row: {seen.checks.refusal}"
    unjudged = f"health could not be judged for {seen.unjudged_seconds:.0f} s"
    no_endpoints = seen.look.endpoints_came is False
    return {
        Verdict.WORKER_FAILED: seen.look.workers.failed,
        Verdict.CHECKS_FAILED: refused if failed else "",
        Verdict.PODS_FAILED: seen.pods_fault,
        Verdict.ENDPOINTS_MISSING: "they did not come" if no_endpoints else "",
        Verdict.UNJUDGEABLE: unjudged if seen.is_unjudged_too_long else "",
    }


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


def history_after_move(
    history: Sequence[HistoryEntry], entry: HistoryEntry, by: str, now: float
) -> list[HistoryEntry]:
    """Return a history in which someone else has made an entry's run the live one.

    It stays proven if it was. What is newer was left by that, and is no target any more.
    """
    place = history.index(entry) if entry in history else 1
    reason = str(Reason.SELECTOR_CHANGED)
    detail = f"left by {by}"
    newer = [e if e.reason else replace(e, reason=reason, detail=detail) for e in history[:place]]
    outcome = entry.outcome if entry.proven else ""
    again = replace(entry, outcome=outcome, reason="", detail="", by=by, at=now)
    return bounded_history([again, *newer, *(e for e in history[place:] if e != entry)], again)


def bounded_history(entries: Sequence[HistoryEntry], live: HistoryEntry) -> list[HistoryEntry]:
    """Return the newest entries, and those that may be gone back to, however many are newer.

    Else so many failed versions in a row would push out the live one, or what was proven last.
    """
    proven = [entry for entry in entries if entry.proven and not entry.reason]
    kept = [entry for entry in entries if entry in (entries[0], live, *proven[:2])]
    others = [entry for entry in entries if entry not in kept]
    kept += others[: HISTORY_LENGTH - len(kept)]
    return [entry for entry in entries if entry in kept][:HISTORY_LENGTH]


def rollback_entry(service: Service, to: int | str) -> HistoryEntry:
    """Return what a rollback goes to, by versions back or by its run; raises RefusedError."""
    runs = ", ".join(dict.fromkeys(e.run for e in service.history if e.run)) or "none"
    if isinstance(to, int):
        if service.history and not (service.live or service.run):
            raise RefusedError(f"what is live is not known; say where to go, --to RUN, of: {runs}")
        if entry := service.rollback_target(to):
            return entry
        count = len(service.rollback_targets)
        some = f"{f'only {count}' if count else 'no'} proven version{'s' * (count > 1)}"
        raise RefusedError(f"{some} to go back to")
    if not (entry := service.entry(to)):
        raise RefusedError(f"{clip(to, 60)!r} is no run of the history: {runs}")
    if service.reaches(entry):
        raise RefusedError(f"{to} is what is live")
    outcome = entry.outcome if entry.proven else str(Outcome.DEPLOYED)
    return replace(entry, outcome=outcome, reason="", detail="")


def narrowed(
    selector: Mapping[str, str], pods: Sequence[Pod], new: Mapping[str, str]
) -> dict[str, str] | None:
    """Return a selector that matches today's pods and never the new ones; None if none does."""
    if any(new.get(k) != v for k, v in selector.items()):
        return dict(selector)
    shared = set.intersection(*(set(p.labels.items()) for p in pods)) if pods else set()
    apart = {key: value for key, value in sorted(shared) if new.get(key) != value}
    # where our own pods have a `version` of the app, the next one may be theirs
    first = () if LABEL_COLOUR in new else (LABEL_VERSION,)
    key = next((k for k in (*first, "pod-template-hash", *apart) if k in apart), None)
    return {**selector, key: apart[key]} if key else None


# === state ========================================================================================
# How runs ended and which commits are rejected: a ConfigMap for each app, a key for each record, so
# that what one app leaves in it neither stops nor delays another.

COPIED_FIELDS = ("id", "ref", "commit", "before", "by", "delivery", "received")  # of a run


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
    by: str = ""
    delivery: str = ""
    received: float = 0.0
    outcome: str = ""  # empty while it is under way
    reason: str = ""
    stage: str = ""
    detail: str = ""
    ended: float = 0.0
    config: str = ""  # the configuration of the app by which it was refused, as a hash
    tries: int = 0  # that ended by a circumstance, in a row
    tried_since: float = 0.0  # when the first of them ended
    next_try: float = 0.0  # when it is tried again by itself, 0 for never

    @property
    def key(self) -> str:
        """The key of the record in the ConfigMap."""
        return f"run-{self.id}"

    @classmethod
    def of(cls, run: Run) -> RunRecord:
        """Return the record of a run that has just begun."""
        copied = {name: getattr(run, name) for name in COPIED_FIELDS}
        return cls(**{**copied, "ref": recorded_ref(run.ref)})

    def started_again(self, run: Run) -> RunRecord:
        """Return the record of another try of the run; a push of it has all its tries before it."""
        record = RunRecord.of(run)
        if run.delivery != NEXT_TRY:
            return record
        return replace(record, tries=self.tries, tried_since=self.tried_since)

    def tried_again(self) -> RunRecord:
        """Return the record of an end by a circumstance, with the time of the next try if any."""
        since = self.tried_since or self.ended
        if self.ended - since >= TRY_SECONDS:
            detail = clip(f"{self.reason}: {self.detail}")
            return replace(self, reason=str(Reason.GAVE_UP), detail=detail, tried_since=since)
        delay = TRY_DELAYS[min(self.tries, len(TRY_DELAYS) - 1)]
        next_try = round(self.ended + delay, 3)
        return replace(self, tries=self.tries + 1, tried_since=since, next_try=next_try)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """Why a commit is not deployed again until `rerun`: key `rejected-<commit>`."""

    commit: str
    reason: str = ""
    at: float = 0.0
    config: str = ""  # the configuration of the app by which it was refused, as a hash

    @property
    def key(self) -> str:
        """The key of the record in the ConfigMap."""
        return f"rejected-{self.commit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusRecord:
    """Says that GitLab shows every final status of a run that ended then: key `statuses-<id>`.

    It has a key of its own, because another thread writes it than the run's record.
    """

    id: str
    ended: float = 0.0

    @property
    def key(self) -> str:
        """The key of the record in the ConfigMap."""
        return f"statuses-{self.id}"


Identity = tuple[str, str, str]  # the API group, the kind and the name of an object


@dataclass(frozen=True, kw_only=True, slots=True)
class CompanionRecord:
    """An object that stands beside an app, or is to: key `companion-<environment>.<hash>`."""

    environment: str
    api: str  # its apiVersion
    kind: str
    name: str
    uid: str = ""  # of what was made; only that may be deleted

    @property
    def identity(self) -> Identity:
        """What tells it from other objects of its namespace, in whichever version it is read."""
        return identity_of(self.reference)

    @property
    def key(self) -> str:
        """The key of the record in the ConfigMap."""
        digits = hashlib.sha256("/".join(self.identity).encode()).hexdigest()[:16]
        return f"companion-{self.environment}.{digits}"

    @property
    def reference(self) -> Object:
        """What is given to read it."""
        return {"apiVersion": self.api, "kind": self.kind, "metadata": {"name": self.name}}

    @classmethod
    def of(cls, environment: str, item: Object) -> CompanionRecord:
        """Return the record of an object, or of one that is to be made."""
        api = str(item["apiVersion"])
        _, kind, name = identity_of(item)
        uid = str(item["metadata"].get("uid") or "")
        return cls(environment=environment, api=api, kind=kind, name=name, uid=uid)

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


def identity_of(item: Object) -> Identity:
    """Return what tells an object from others of its namespace, in whichever version it is read."""
    group = str(item["apiVersion"]).rpartition("/")[0]
    return (group, str(item["kind"]), str(item["metadata"]["name"]))


AnyRecord = RunRecord | Rejection | StatusRecord | CompanionRecord
Record = TypeVar("Record", RunRecord, Rejection, StatusRecord, CompanionRecord)
LARGEST_NUMBER = 2**53  # in a record; whole numbers above it are not exact as a float
RECORD_TYPES = {kind: get_type_hints(kind) for kind in typing.get_args(AnyRecord)}


def parse_record(kind: type[Record], text: Any, **more: Any) -> Record:
    """Return the record in a text, unknown fields ignored; raises ValueError for anything else."""
    if not isinstance(text, str) or len(text) > 4 * RECORD_BYTES:
        raise ValueError("not a text of a record's size")
    hints = RECORD_TYPES[kind]
    values = {k: v for k, v in {**json.loads(text), **more}.items() if k in hints}
    for name, value in values.items():
        if type(value) is not hints[name] and (hints[name], type(value)) != (float, int):
            raise ValueError(f"{name} has another type")
        # the comparison is false for NaN, too
        if isinstance(value, (int, float)) and not abs(value) < LARGEST_NUMBER:
            raise ValueError(f"{name} is out of range")
    return kind(**values)


def record_text(record: AnyRecord) -> str:
    """Return a record as it is stored, its detail cut until it has the size of one."""
    content = {name: getattr(record, name) for name in RECORD_TYPES[type(record)] if name != "id"}
    kept = {k: v for k, v in {**content, "v": RECORD_VERSION}.items() if v not in ("", 0)}
    text = json.dumps(kept, ensure_ascii=False)
    while len(text.encode()) > RECORD_BYTES and kept.get("detail"):
        kept["detail"] = shortened(kept["detail"])
        text = json.dumps(kept, ensure_ascii=False)
    return text


@dataclass(frozen=True, slots=True)
class AppState:
    """What is recorded of one app."""

    version: str = ""  # the ConfigMap's resourceVersion, empty where there is none
    runs: dict[str, RunRecord] = dataclass_field(default_factory=dict)  # by id
    rejected: dict[str, Rejection] = dataclass_field(default_factory=dict)  # by commit
    # the history entry of what is live, by environment
    live: dict[str, HistoryEntry] = dataclass_field(default_factory=dict)
    # what is to be written because of what was read
    repairs: dict[str, str | None] = dataclass_field(default_factory=dict)
    statuses: dict[str, StatusRecord] = dataclass_field(default_factory=dict)  # by id of the run
    companions: dict[str, CompanionRecord] = dataclass_field(default_factory=dict)  # by key

    @classmethod
    def from_configmap(cls, app: App, configmap: Object | None) -> AppState:
        """Return what a ConfigMap records; what cannot be read is dropped, with an error."""
        meta = (configmap or {}).get("metadata") or {}
        state = cls(str(meta.get("resourceVersion", "")))
        state._take_all(app, (configmap or {}).get("data") or {})
        return state

    def _take_all(self, app: App, entries: Mapping[str, Any]) -> None:
        """Take entries over by key; drop what cannot be read, with an error."""
        dropped = []
        for key, text in entries.items():
            try:
                self._take(app, key, text)
            except SHAPE_ERRORS as wrong:
                dropped.append(clip(f"{key}: {wrong}", 120))
                self.repairs[key] = None
        if dropped:
            error("records dropped", app=app.name, count=len(dropped), detail=dropped[0])

    def _take(self, app: App, key: str, text: Any) -> None:
        """Take one entry over; raises what reading it raises."""
        kind, _, name = key.partition("-")
        if kind == "run":
            self.runs[name] = parse_record(RunRecord, text, id=name)
        elif kind == "companion":
            record = parse_record(CompanionRecord, text, environment=name.partition(".")[0])
            if record.key != key or len(self.companions) >= COMPANION_RECORDS:
                raise ValueError("not the record of a companion")
            self.companions[key] = record
        elif kind == "rejected":
            self.rejected[name] = parse_record(Rejection, text, commit=name)
        elif kind == "statuses":
            self.statuses[name] = parse_record(StatusRecord, text, id=name)
        elif kind == "live":
            if entry := HistoryEntry.from_json(json.loads(text[: 4 * RECORD_BYTES])):
                self.live[name] = entry
        elif kind == "ref":  # of version 0.1: the last push of each ref, by a hash of its name
            self.repairs[key] = None
            old = migrated(app, text)
            if old and self.runs.setdefault(old.id, old) is old:
                self.repairs[old.key] = record_text(old)

    def changed(self, app: App, data: Mapping[str, str | None]) -> AppState:
        """Return its runs, rejections and statuses after a change by key; None removes an entry."""
        state = AppState(runs={**self.runs}, rejected={**self.rejected}, statuses={**self.statuses})
        kinds: dict[str, dict[str, Any]] = {"run": state.runs, "rejected": state.rejected}
        kinds["statuses"] = state.statuses
        for key in data:
            kind, _, name = key.partition("-")
            kinds.get(kind, {}).pop(name, None)
        entries = {k: v for k, v in data.items() if v is not None and k.partition("-")[0] in kinds}
        state._take_all(app, entries)
        return state

    def companions_in(self, environment: str) -> dict[Identity, CompanionRecord]:
        """Return the companions that stand in an environment, or may, by identity."""
        records = self.companions.values()
        return {r.identity: r for r in records if r.environment == environment}

    def rejection(self, app: App, commit: str) -> Rejection | None:
        """Return why a commit is not deployed again, unless the app is configured anew since."""
        rejection = self.rejected.get(commit)
        return rejection if rejection and rejection.config in ("", config_hash(app)) else None

    def find(self, ref: str, commit: str) -> RunRecord | None:
        """Return the record of a push by what identifies it, whatever its id."""
        push = (recorded_ref(ref), commit)
        return next((r for r in self.runs.values() if (r.ref, r.commit) == push), None)

    def last(self, ref: str) -> RunRecord | None:
        """Return the record of the newest push of a ref that was not found to be outdated."""
        short = recorded_ref(ref)
        runs = self.runs.values()
        pushed = (r for r in runs if r.ref == short and r.reason != Reason.NOT_HEAD)
        return max(pushed, key=lambda r: r.received, default=None)


def run_of_record(app: App, record: RunRecord) -> Run:
    """Return the run that a record is of."""
    return Run(app=app.name, **{name: getattr(record, name) for name in COPIED_FIELDS})


def config_hash(app: App) -> str:
    """Return a short hash of an app's configuration: another one may allow what was refused."""
    return hashlib.sha256(repr(app).encode()).hexdigest()[:16]


def migrated(app: App, text: Any) -> RunRecord | None:
    """Return the record that an entry of version 0.1 becomes, None for a branch it only knew of."""
    old = json.loads(text)
    if old["outcome"] == "baseline":
        return None
    ref = old["ref"]
    outcome = old["outcome"] or ""
    kept = {**old, "ref": recorded_ref(ref), "outcome": outcome}
    push = parse_record(RunRecord, json.dumps(kept, ensure_ascii=False), id="")
    ended = push.received if outcome else 0.0
    return replace(push, id=run_id(app.name, ref, push.commit, ID_DIGITS[-1]), ended=ended)


def forgotten(state: AppState, deploy_ref: str, with_job: Set[str] | None) -> list[str]:
    """Return the keys of the records that are too many or too much, of test-only runs first.

    The newest runs are kept, and all that have a Job, or may have one, as far as there is room.
    """
    deploys = recorded_ref(deploy_ref)
    order = sorted(state.runs.values(), key=lambda r: (r.ref == deploys, r.received))
    newest = {r.id for r in order[-RUNS_LENGTH:]}
    sizes = {r.id: len(record_text(r).encode()) + len(r.key) for r in order}
    size = sum(sizes.values())
    keys = []
    for record in order:
        spare = record.outcome and with_job is not None and record.id not in newest | with_job
        if spare or size > STATE_BYTES:
            size -= sizes[record.id]
            keys.append(record.key)
    left = state.runs.keys() - {key.removeprefix("run-") for key in keys}
    keys += [record.key for id_, record in state.statuses.items() if id_ not in left]
    rejected = sorted(state.rejected.values(), key=lambda r: r.at)
    return keys + [r.key for r in rejected[: max(0, len(rejected) - REJECTED_LENGTH)]]


class StateStore:
    """Reads and writes what is recorded of the apps."""

    def __init__(self, kubectl: Kubectl, clock: Clock) -> None:
        self.kubectl = kubectl
        self.clock = clock
        self._seen: dict[str, AppState] = {}
        self._last: dict[str, AppState] = {}  # the same, and what may be old
        self._locks: dict[str, threading.RLock] = {}

    def lock(self, app: App) -> threading.RLock:
        """Return the lock of what is written because of what was read."""
        return self._locks.setdefault(app.name, threading.RLock())

    def read(self, app: App) -> AppState:
        """Return what is recorded of an app now."""
        configmap = self.kubectl.get("configmap", f"{MANAGER}-{app.name}", ORCHESTRATION)
        return self._keep(app, configmap)

    def recent(self, app: App) -> AppState:
        """Return what is recorded of an app, as this process has read or written it last."""
        return self._seen.get(app.name) or self.read(app)

    def last(self, app: App) -> AppState | None:
        """Return what this process saw last of an app's records, asking nobody; None: nothing."""
        return self._last.get(app.name)

    def _keep(self, app: App, configmap: Object | None) -> AppState:
        """Return what a ConfigMap records, which is what this process has seen last."""
        state = AppState.from_configmap(app, configmap)
        self._seen[app.name] = state
        self._last[app.name] = state
        return state

    def write(
        self,
        app: App,
        *records: AnyRecord,
        forget: Iterable[str] = (),
        with_job: Set[str] | None = None,
        live: Mapping[str, HistoryEntry] | None = None,
    ) -> None:
        """Write records, forget keys, and what is too old: one compare-and-set patch.

        `with_job` has the ids of the runs that have a Job, if that is known, `live` the history
        entries of what is live by environment. Raises KubectlError.
        """
        change = {**dict.fromkeys(forget), **{r.key: record_text(r) for r in records}}
        entries = {
            f"live-{name}": json.dumps(entry.to_json()) for name, entry in (live or {}).items()
        }
        change |= {k: text for k, text in entries.items() if len(text) <= 4 * RECORD_BYTES}
        with self.lock(app):
            for left in reversed(range(STATE_TRIES)):
                state = self.recent(app)
                try:
                    return self._merge(app, state, change, with_job)
                except KubectlError as failed:
                    self._seen.pop(app.name, None)
                    if failed.kind not in ("NotFound", "AlreadyExists", "Conflict") or not left:
                        raise
        return None

    def _merge(
        self, app: App, state: AppState, change: Mapping[str, str | None], with_job: Set[str] | None
    ) -> None:
        """Merge a change into the ConfigMap that a state was read from, or create it."""
        name = f"{MANAGER}-{app.name}"
        data = {**state.repairs, **change}
        after = state.changed(app, data)
        data |= dict.fromkeys(forgotten(after, app.deploy_ref, with_job))
        if not data:
            return
        if state.version:
            body = {"metadata": {"resourceVersion": state.version}, "data": data}
            self._keep(app, self.kubectl.patch("configmap", name, ORCHESTRATION, body))
            return
        configmap = new_object("ConfigMap", name, {LABEL_APP: app.name}, {})
        configmap["data"] = {key: text for key, text in data.items() if text is not None}
        for refusal in self.kubectl.create_each([configmap], ORCHESTRATION).values():
            raise refusal
        self._last[app.name] = AppState.from_configmap(app, configmap)
        self._seen.pop(app.name, None)  # only the server knows its resourceVersion

    def reject(self, app: App, commit: str, reason: str) -> None:
        """Reject a commit until `rerun`."""
        self.write(app, Rejection(commit=commit, reason=reason, at=self.clock.now()))


# === reports ======================================================================================
# What becomes known outside: every change of state is one Transition, from which each report is
# made; and the last log lines of what failed are kept for a day.


class State(StrEnum):
    """What happened to a run or an environment, as the log says it."""

    QUEUED = "run queued"
    RERUN = "run again"
    WAITS = "waits"
    CLAIMED = "claimed"
    SWITCHED = "switched"
    SWITCHED_BACK = "switched back"
    REMOVED = "nothing to switch back to"
    ROLLED_BACK = "rolled back"
    RESTORED = "restored"
    ADOPTED = "taken over"
    UNJUDGED = "confirmed unjudged"
    DRIFTED = "selector drift"
    ENDED = "run ended"


BAD_OUTCOMES = (Outcome.FAILED, Outcome.SWITCHED_BACK)
ALARMING_STATES = (State.SWITCHED_BACK, State.REMOVED, State.DRIFTED)
NOTABLE_STATES = (State.ROLLED_BACK, State.UNJUDGED)
DIRECTIONS = {  # of the traffic, by the state that follows
    State.SWITCHED: "forward",
    State.SWITCHED_BACK: "back",
    State.ROLLED_BACK: "rollback",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Transition:
    """One change of the state of a run or of an environment."""

    state: State
    run: str
    app: str
    environment: str = ""
    stage: str = ""
    outcome: str = ""
    reason: str = ""
    detail: str = ""
    at: float
    by: str = ""  # who did it, where that was not this program
    more: Mapping[str, Any] = dataclass_field(default_factory=dict)  # for the log line alone


class Reports:
    """Gives each Transition to every sink: log and metrics, and those that were added."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.sinks: list[Callable[[Transition], None]] = []  # that neither wait nor raise

    def emit(self, transition: Transition) -> None:
        """Log and count a change of state."""
        values = {f.name: getattr(transition, f.name) for f in fields(transition)}
        values |= values.pop("more")
        del values["at"]  # the line has a time of its own
        log = warn if transition.state in NOTABLE_STATES else info
        if transition.state in ALARMING_STATES or transition.outcome in BAD_OUTCOMES:
            log = error
        if transition.state is not State.WAITS:  # which comes and goes, and `status` shows it
            log(str(values.pop("state")), **values)
        place = (transition.app, transition.environment)
        if direction := DIRECTIONS.get(transition.state):
            self.metrics.switches.labels(*place, direction).inc()
        elif transition.state is State.DRIFTED:
            self.metrics.drift.labels(*place).inc()
        elif transition.state is State.ENDED:
            labels = (transition.app, transition.outcome, transition.stage, transition.reason)
            self.metrics.runs.labels(*labels).inc()
        for sink in self.sinks:
            sink(transition)


STATUS_LOOK = 10.0  # seconds in which one look sends, and between two records of what was sent
UNCHANGED_SECONDS = 30.0  # between two looks while nothing is to be sent
EVENTS_QUEUED = 1000  # Transitions that wait for their Events; the oldest give way
EVENTS_AT_ONCE = 100  # Transitions of which Events are made in one go
EVENT_BYTES = 1000  # of a message, of which an API server takes 1024
REPEATED_SECONDS = 300.0  # in which it is not said again that a run waits for the same


@dataclass(frozen=True, slots=True)
class EventKind:
    """What an Event says of a state: its reason, in CamelCase, and a sentence."""

    reason: str
    text: str  # with the run, why, and who
    is_warning: bool = False


EVENT_KINDS: dict[str, EventKind] = {  # by state, or by the outcome of a run that has ended
    State.WAITS: EventKind("Waiting", "Run {run} waits: {why}"),
    State.RERUN: EventKind("Rerun", "{by} lets run {run} run again."),
    State.CLAIMED: EventKind("Claimed", "Run {run} is being deployed."),
    State.SWITCHED: EventKind("Switched", "The traffic goes to run {run}."),
    State.SWITCHED_BACK: EventKind(
        "SwitchedBack", "The traffic went back from run {run}: {why}", is_warning=True
    ),
    State.REMOVED: EventKind(
        "Removed", "Run {run} was unhealthy, and no version was before it: {why}", is_warning=True
    ),
    State.ROLLED_BACK: EventKind("RolledBack", "{by} rolled back from run {run}: {why}"),
    State.RESTORED: EventKind("Restored", "What run {run} overwrote was applied again."),
    State.ADOPTED: EventKind("Adopted", "Run {run} takes over what is beside the app: {why}"),
    State.UNJUDGED: EventKind(
        "Unjudged", "Run {run} stays, though its health was not known: {why}", is_warning=True
    ),
    State.DRIFTED: EventKind("SelectorChanged", "The selector was {by}.", is_warning=True),
    Outcome.DEPLOYED: EventKind("Deployed", "Run {run} is live, and stays."),
    Outcome.FAILED: EventKind("Failed", "Run {run} has failed: {why}", is_warning=True),
    Outcome.SUPERSEDED: EventKind("Superseded", "Run {run} is not deployed: {why}"),
}


def event_kind(transition: Transition) -> EventKind | None:
    """Return what an Event says of a Transition, None where there is to be none."""
    if transition.state is not State.ENDED:
        return EVENT_KINDS.get(transition.state)
    kind = EVENT_KINDS.get(transition.outcome)
    is_told = transition.outcome == Outcome.FAILED and transition.reason in {*Reason}
    return replace(kind, reason=transition.reason) if kind and is_told else kind


class Events:
    """Tells in the cluster what happens: a sink of Transitions that `kubectl describe` shows.

    Their Events are on the live Service, on the Deployment of the run and on its Job. Nothing waits
    for them, and what was not told when the process ends is not told any more. A name follows from
    the content, so that an Event that is created again exists already.
    """

    def __init__(
        self,
        config: Config,
        kubectl: Kubectl,
        secrets: Secrets,
        clock: Clock,
        jobs_by_run: Callable[[], Mapping[str, Mapping[str, Job]]],
    ) -> None:
        self.apps = {app.name: app for app in config.apps}
        self.namespaces = config.namespaces
        self.kubectl = kubectl.with_own_slot()
        self.secrets = secrets
        self.clock = clock
        self.jobs_by_run = jobs_by_run
        self.news = threading.Event()  # set to have Events created
        self.ended = threading.Event()  # set to have none created any more
        self.failing = False
        self._queue: deque[Transition] = deque(maxlen=EVENTS_QUEUED)
        self._taken: list[Transition] = []  # from the queue, and not told yet
        self._waits = Cooldown(clock)

    def take(self, transition: Transition) -> None:
        """Have the Events of a Transition created, in the place of the oldest where many wait."""
        if event_kind(transition):
            if len(self._queue) == EVENTS_QUEUED:
                self.kubectl.metrics.reports_failed.labels("events").inc()
            self._queue.append(transition)
            self.news.set()

    def send_all(self) -> float:
        """Create what is to be created; return the seconds after which to go on."""
        until = self.clock.monotonic() + STATUS_LOOK
        while self._taken or self._queue:
            if self.ended.is_set() or self.clock.monotonic() > until:
                return 0.0
            while self._queue and len(self._taken) < EVENTS_AT_ONCE:
                self._taken += filter(self.is_news, [self._queue.popleft()])
            if not self._taken:
                break
            place = self.place(self._taken[0])
            here = [t for t in self._taken if self.place(t) == place]
            try:
                self.create(place, here)
            except HookError as failed:
                self.kubectl.metrics.reports_failed.labels("events").inc()
                if not self.failing:  # of such failures in a row, the first is logged
                    warn("Events not created", detail=str(failed))
                self.failing = True
                if isinstance(failed, KubectlError) and failed.kind == "Unreachable":
                    return AGAIN_SECONDS
            else:
                self.failing = False
            self._taken = [t for t in self._taken if self.place(t) != place]
        return UNCHANGED_SECONDS

    def place(self, transition: Transition) -> tuple[str, str]:
        """Return the app of a Transition and its environment, "" for none."""
        app = self.apps.get(transition.app)
        stage = transition.environment or transition.stage
        return transition.app, stage if app and stage in app.deploy.environments else ""

    def create(self, place: tuple[str, str], transitions: Iterable[Transition]) -> None:
        """Create the Events of Transitions of one place.

        Raises the last HookError, after what could be created was.
        """
        name, environment = place
        standing = self.standing(name, environment) if environment else []
        jobs_by_run = self.jobs_by_run()
        events: dict[str, dict[str, Object]] = {}  # by namespace and name
        for transition in transitions:
            jobs = jobs_by_run.get(transition.run, {})
            job = jobs.get(transition.stage) or jobs.get("build") or jobs.get("test")
            objects = [*standing]
            if job:
                meta = {"name": job.name, "namespace": job.namespace, "uid": job.uid}
                objects.append({"apiVersion": "batch/v1", "kind": "Job", "metadata": meta})
            for item in objects:
                run = part_of(item, "metadata", "labels").get(LABEL_RUN)
                if item["kind"] != "Deployment" or run == transition.run:
                    event = self.event(transition, item)
                    here = events.setdefault(item["metadata"]["namespace"], {})
                    here[event["metadata"]["name"]] = event
        failed: HookError | None = None
        for namespace, by_name in events.items():
            try:
                refusals = self.kubectl.create_each([*by_name.values()], namespace).values()
                failed = next((r for r in refusals if r.kind != "AlreadyExists"), failed)
            except HookError as failure:
                failed = failure
        if failed:
            raise failed

    def standing(self, name: str, environment: str) -> list[Object]:
        """Return the live Service of an app and its Deployments; raises KubectlError."""
        references = [f"service/{self.apps[name].service_name}"]
        references += [f"deployment/{name}-{colour}" for colour in COLOURS]
        return [*filter(None, self.kubectl.get_each(self.namespaces[environment], *references))]

    def is_news(self, transition: Transition) -> bool:
        """Whether it was not said just now that a run waits for the same."""
        if transition.state is not State.WAITS:
            return True
        key = f"{transition.run} {transition.reason}"
        is_news = self._waits.allows(key)
        if is_news:
            self._waits.start(key, REPEATED_SECONDS)
        return is_news

    def event(self, transition: Transition, item: Object) -> Object:
        """Return the Event of a Transition on an object."""
        kind = event_kind(transition) or EventKind("", "")
        why = ": ".join(filter(None, (transition.reason, transition.detail)))
        if kind.reason == transition.reason:
            why = transition.detail
        by = transition.by or "Somebody"
        text = kind.text.format(run=transition.run, why=why, by=by).rstrip(": ")
        text = clip(self.secrets.mask(text), EVENT_BYTES)
        meta = item["metadata"]
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(transition.at))
        content = json.dumps([meta["uid"], kind.reason, text, transition.at])
        name = f"{meta['name']}.{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": meta["namespace"]},
            "involvedObject": {
                "apiVersion": item["apiVersion"],
                "kind": item["kind"],
                **{key: meta[key] for key in ("name", "namespace", "uid")},
            },
            "type": "Warning" if kind.is_warning else "Normal",
            "reason": kind.reason,
            "message": text.encode()[:EVENT_BYTES].decode(errors="ignore"),
            "source": {"component": MANAGER},
            "reportingComponent": MANAGER,
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "count": 1,
        }


class LogTails:
    """Keeps the last log lines of what failed in ConfigMap `log-RUN`, where they were printed.

    What a container printed goes nowhere else. A failure to keep it fails nothing else: threads do
    it, through a kubectl of their own.
    """

    def __init__(self, kubectl: Kubectl, secrets: Secrets, clock: Clock) -> None:
        self.kubectl = kubectl.with_own_slot()
        self.secrets = secrets
        self.clock = clock
        self._permits = threading.BoundedSemaphore(LOGS_KEPT)

    def start(self, work: Callable[[], Any], patience: float = 0.0) -> None:
        """Start a thread for some work of this class, and wait for it at most so many seconds.

        While very many such threads are busy, the work is left out.
        """

        def run() -> None:
            """Do the work, and log why it failed."""
            if not self._permits.acquire(blocking=False):
                return
            try:
                work()
            except (HookError, *SHAPE_ERRORS) as failed:
                warn("logs not kept", detail=str(failed))
                self.kubectl.metrics.reports_failed.labels("logs").inc()
            finally:
                self._permits.release()

        thread = threading.Thread(target=run, name="logs", daemon=True)
        with suppress(RuntimeError):  # there can be no more threads: then no log is kept
            thread.start()
            thread.join(patience)

    def keep(self, app: str, run: str, pods: Sequence[Pod], namespace: str) -> None:
        """Write the ConfigMap of a run's logs, in the place of an older one."""
        tails = {}
        for spoken in speakers(pods):
            is_service = spoken.container.kind == "sidecar"
            names = (spoken.pod.name, spoken.container.name, namespace)
            printed = self.kubectl.logs(*names, previous=is_service)
            message = spoken.container.words
            whole = printed if message in printed else f"{printed}\n{message}"
            if tail := self.secrets.mask(whole.strip()[-2 * LOG_BYTES :]):
                tails[f"{spoken.pod.name}.{spoken.container.name}"] = tail.encode()
        if not tails:
            return
        share = LOG_BYTES // len(tails)
        data = {key: tail[-share:].decode("utf-8", "ignore") for key, tail in tails.items()}
        labels = {LABEL_MANAGED: MANAGER, LABEL_APP: app, LABEL_RUN: run, LABEL_STAGE: "log"}
        meta = {"name": f"log-{run}", "labels": labels}
        self.delete_surplus(app, namespace, LOGS_KEPT - 1, replaced=meta["name"])
        configmap = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}
        self.kubectl.create([configmap], namespace)

    def delete_expired(self, app: App, namespaces: Mapping[str, str]) -> None:
        """Delete the logs of an app that are not to be kept any more."""
        for name in (*JOB_STAGES, *app.deploy.environments):
            keeps = name in JOB_STAGES or app.deploy.log_tails
            self.delete_surplus(app.name, namespaces[name], LOGS_KEPT if keeps else 0)

    def delete_surplus(self, app: str, namespace: str, most: int, replaced: object = None) -> None:
        """Delete logs that are too old, are not among the newest, or are written again."""
        terms = selector_text({LABEL_MANAGED: MANAGER, LABEL_APP: app, LABEL_STAGE: "log"})
        metas = [c["metadata"] for c in self.kubectl.list("configmaps", namespace, "-l", terms)]
        metas.sort(key=lambda meta: epoch(meta["creationTimestamp"]), reverse=True)
        oldest = self.clock.now() - LOG_TTL
        surplus = {meta["name"] for meta in metas[most:]}
        surplus |= {m["name"] for m in metas if epoch(m["creationTimestamp"]) < oldest}
        surplus |= {replaced} & {m["name"] for m in metas}
        self.kubectl.delete("configmap", surplus, namespace)


@dataclass(frozen=True, slots=True)
class Speaker:
    """A container whose log says why something failed."""

    pod: Pod
    container: Container

    @property
    def is_failed_service(self) -> bool:
        """Whether it is a service of tests that ended too early, or for which they wait."""
        waited_for = all(c.waiting for c in self.pod.containers if c.kind == "app")
        failed = self.container.restarts or (waited_for and not self.container.started)
        return bool(self.pod.job and self.container.name != RESULTS_CONTAINER and failed)


def speakers(pods: Iterable[Pod]) -> list[Speaker]:
    """Return the containers whose logs say most: those that failed in the newest unready pod.

    Where none failed, they are what runs in it: a test that hangs, or a version that answers wrong.
    """
    ordered = sorted(pods, key=lambda p: (p.ready, -p.created))
    ran = [Speaker(p, c) for p in ordered for c in p.containers if c.running or c.exits]
    ran = [s for s in ran if s.container.kind != "sidecar" or s.is_failed_service]
    failed = [s for s in ran if s.container.exit_code or not s.container.ready]
    chosen = failed or [s for s in ran if s.container.kind == "app"]
    said = [s for s in chosen if s.pod is chosen[0].pod][:4]
    return [*said, *(reporters(said[0].pod) if said else ())]


def reporters(pod: Pod) -> list[Speaker]:
    """Return the container of a pod that has read the report of its tests, if it has one."""
    collectors = (c for c in pod.containers if pod.job and c.name == RESULTS_CONTAINER)
    return [Speaker(pod, c) for c in collectors if c.words not in ("", NO_REPORT)]


def selector_text(selector: Mapping[str, str]) -> str:
    """Return a selector as `-l` takes it."""
    return ",".join(f"{k}={v}" for k, v in selector.items())


# === statuses =====================================================================================
# What GitLab shows beside a commit: a status of each stage, of what is observed of its runs.


class StatusState(StrEnum):
    """What a commit status says, in GitLab's words."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCESS = "success"
    FAILED = "failed"
    CANCELED = "canceled"


OPEN_STATES = (StatusState.PENDING, StatusState.RUNNING)
END_STATES: dict[str, StatusState] = {  # of the stage in which a run ended
    Outcome.TESTED: StatusState.SUCCESS,
    Outcome.DEPLOYED: StatusState.SUCCESS,
    Outcome.FAILED: StatusState.FAILED,
    Outcome.SWITCHED_BACK: StatusState.FAILED,
    Outcome.ROLLED_BACK: StatusState.FAILED,
    Outcome.SUPERSEDED: StatusState.CANCELED,
}
STATUS_LENGTH = 255  # characters of a description, of an address, and of the name of a branch
GITLAB_SECONDS = 15.0  # for one request: GitLab itself waits for ten seconds for a lock
STATUS_DELAYS = (2.0, 5.0, 15.0, 60.0, 300.0)  # before each further try
REJECTED_DELAYS = (*STATUS_DELAYS, 3600.0)  # the same of one run, where GitLab answers
REFUSED_DELAYS = (900.0,)  # the same, where no token is good enough
REFUSED_REPORTS = 96  # tries, of which one is logged: those of a day
LONGEST_PAUSE = 600.0  # seconds that GitLab may ask for
STATUS_AGE = 86400.0  # seconds after its end for which a run is reported
ANSWER_BYTES = 2**18  # of an answer
REQUESTS_OPEN = 4  # requests that are not answered in time, and still wait
TOKEN = re.compile(r"[\x21-\x7e]{1,1000}")
UNCHANGED = re.compile("Cannot transition status")
UNKNOWN_PROJECT = re.compile("404 Project Not Found")
OBSTACLES: dict[int, Obstacle] = {409: Obstacle.BUSY, 429: Obstacle.LIMITED}


@dataclass(frozen=True, slots=True)
class StageStatus:
    """What GitLab is to show of one stage of a run."""

    stage: str
    state: StatusState
    text: str = ""
    closes: bool = False  # whether it only ends what is pending or running there

    @property
    def is_final(self) -> bool:
        """Whether GitLab would show another status beside it, if one was sent after it."""
        return self.state not in OPEN_STATES

    def is_missing(self, shown: str | None) -> bool:
        """Whether it is to be sent where GitLab shows a state, "" for none, None if unknown."""
        if self.closes and shown is not None:
            return shown in OPEN_STATES
        return shown != self.state


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportedRun:
    """What is observed of a run, from which its commit statuses follow."""

    app: App
    run: Run
    jobs: Mapping[str, Job]  # by stage
    services: Mapping[str, Service]  # the live Service by environment
    end: RunRecord | None = None  # how it ended, None while it is under way
    settled: float = 0.0  # when it ended, by the end of which GitLab shows every final status

    @classmethod
    def of(
        cls,
        app: App,
        state: AppState,
        id_: str,
        jobs: Mapping[str, Job],
        services: Mapping[str, Service],
    ) -> ReportedRun:
        """Return what is observed of a run that has Jobs, or a record, or both."""
        record = state.runs.get(id_)
        run = newest_run(jobs) if jobs or not record else run_of_record(app, record)
        ended = record and record.outcome and record.ended >= run.received
        settled = state.statuses.get(id_, StatusRecord(id="")).ended
        end = record if ended else None
        return cls(app=app, run=run, jobs=jobs, services=services, end=end, settled=settled)

    @property
    def stages(self) -> list[str]:
        """The stages that it goes through, if all goes well."""
        environments = self.app.deploy.environments
        if self.run.ref != self.app.deploy_ref or not environments:
            return ["test"]
        build = ["build"] * (self.app.build.builder != "none")
        return ["test", *build, *environments]

    def statuses(self) -> list[StageStatus]:
        """Return what GitLab is to show, of the stages that were reached, in their order."""
        return self._at_end(self.end) if self.end else self._under_way()

    def _under_way(self) -> list[StageStatus]:
        """Return the stages that are done, and the one that comes next."""
        statuses: list[StageStatus] = []
        for stage in self.stages if "test" in self.jobs else ():
            is_job = stage in JOB_STAGES
            statuses.append(self._of_job(stage) if is_job else self._of_environment(stage))
            if statuses[-1].state is not StatusState.SUCCESS:
                break
        return statuses

    def _of_job(self, stage: str) -> StageStatus:
        """Return how a Job stands, of which the run's record says how it ends otherwise."""
        job = self.jobs.get(stage)
        if job is None or job.deleting or (stage == "build" and job.outcome):
            return StageStatus(stage, StatusState.PENDING, "is to begin")
        if is_green(job):
            return StageStatus(stage, StatusState.SUCCESS, self._praise(stage))
        if job.state == "suspended":
            return StageStatus(stage, StatusState.PENDING, waiting_words(job))
        return StageStatus(stage, StatusState.RUNNING, waiting_words(job) or "is under way")

    def _of_environment(self, name: str) -> StageStatus:
        """Return how the deployment to an environment stands; in the last one its end is recorded.

        What is confirmed there may yet be switched back.
        """
        service = self.services.get(name)
        if service is None:
            return StageStatus(name, StatusState.PENDING, "is to begin")
        entry = service.entry(self.run.id, self.run.received)
        live = service.live if service.run == self.run.id else HistoryEntry()
        is_last = name == self.app.deploy.environments[-1]
        if Outcome.DEPLOYED in (entry.outcome, live.outcome) and not is_last:
            return StageStatus(name, StatusState.SUCCESS, "is live")
        if entry or live:
            return StageStatus(name, StatusState.RUNNING, "is live, and watched")
        if service.claim.run == self.run.id:
            return StageStatus(name, StatusState.RUNNING, "is rolled out")
        return StageStatus(name, StatusState.PENDING, "is to begin")

    def _at_end(self, end: RunRecord) -> list[StageStatus]:
        """Return what is to be shown of a run that has ended; before its next try it is pending."""
        stages = self.stages
        place = stages.index(end.stage) if end.stage in stages else 0
        before = [self._before_end(stage, end) for stage in stages[:place]]
        state = END_STATES.get(end.outcome, StatusState.FAILED)
        if end.next_try:
            waits = f"tried again {time.strftime('at %H:%M UTC', time.gmtime(end.next_try))}"
            text = f"{waits}: {end.reason}: {end.detail}"
            return [*before, StageStatus(end.stage, StatusState.PENDING, text)]
        last = StageStatus(end.stage, state, self._last_words(end))
        # an earlier try may have been further
        later = [s for s in stages[place:] if s != end.stage]
        over = [StageStatus(s, StatusState.CANCELED, "did not begin", closes=True) for s in later]
        return [*before, last, *over]

    def _before_end(self, stage: str, end: RunRecord) -> StageStatus:
        """Return what is to be shown of a stage before the one in which a run ended."""
        job = self.jobs.get(stage)
        if end.reason not in EARLY_REASONS or (job and is_green(job)):
            return StageStatus(stage, StatusState.SUCCESS, self._praise(stage))
        text = f"stopped: the manifests for {end.stage} are refused"
        return StageStatus(stage, StatusState.CANCELED, text, closes=True)

    def _last_words(self, end: RunRecord) -> str:
        """Return what is said of the stage in which a run ended."""
        if end.outcome == Outcome.DEPLOYED:
            return "is live" if end.reason == Reason.OK else f"is live: {end.reason}"
        if end.outcome == Outcome.TESTED:
            return end.detail or self._praise("test")
        if end.reason == Reason.TESTS_FAILED or end.outcome == Outcome.SUPERSEDED:
            return end.detail or end.reason
        taken_back = (Outcome.SWITCHED_BACK, Outcome.ROLLED_BACK)
        what = end.outcome.replace("-", " ") if end.outcome in taken_back else end.reason
        return f"{what}: {end.detail}" if end.detail else what

    def _praise(self, stage: str) -> str:
        """Return what is said of a stage that went well."""
        if stage == "test":
            report = kept_report(self.jobs["test"]) if "test" in self.jobs else None
            return report.sentence if report and report.is_green else "passed"
        return "the image is built" if stage == "build" else "is live"


def is_green(job: Job) -> bool:
    """Whether a Job has succeeded, and what it left is kept and good."""
    kept = JOB_STAGES[job.stage].annotation in job.annotations
    return kept and is_reusable(job)


def waiting_words(job: Job) -> str:
    """Return what a Job waits for, as its annotations say it; "" where they say nothing."""
    words = (job.annotations.get(key, "") for key in (ANNOTATION_REASON, ANNOTATION_DETAIL))
    return ": ".join(filter(None, words))


@dataclass(frozen=True, slots=True)
class Project:
    """Where GitLab has the project of an app's repository."""

    server: str  # the address of GitLab
    path: str

    @classmethod
    def of(cls, app: App, server: str) -> Project | None:
        """Return the project of an app; None where its repository is no project of a server.

        Without the address of a server it is the repository's host, always by https.
        """
        match = SERVER_URL.match(app.repository)
        if match is None:
            return None
        host = host_of(match[1], match[2])
        if match[1] == "http":  # whose port is none of https
            host = re.sub(":[0-9]+$", "", host)
        path = unquote(match[3]).strip("/").removesuffix(".git").strip("/")
        if root := urlsplit(server).path.strip("/"):
            path = path.removeprefix(f"{root}/")
        return cls(server.rstrip("/") or f"https://{host}", path)

    def url(self, *words: str) -> str:
        """Return the address of something in the project."""
        parts = (self.path, *words)
        return "/".join([f"{self.server}/api/v4/projects", *(quote(p, safe="") for p in parts)])


@dataclass(frozen=True, slots=True)
class GitLabAnswer:
    """What GitLab answered, its body cut off where it is too long; status 0 if it did not."""

    status: int
    body: bytes = b""
    pause: float = 0.0  # seconds that it wants to be left
    failure: str = ""  # why there is no answer

    @property
    def is_refusal(self) -> bool:
        """Whether another token may be answered otherwise."""
        if self.status == http.HTTPStatus.NOT_FOUND:
            return UNKNOWN_PROJECT.search(self.text) is not None
        return self.status in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN)

    @property
    def text(self) -> str:
        """What it says, fit for a log line."""
        return clip(self.body.decode(errors="replace"))

    def error(self) -> GitLabError:
        """Return why a request was not done."""
        text = self.failure or f"status {self.status}: {self.text}"
        away = not self.status or self.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR
        obstacle = OBSTACLES.get(self.status, Obstacle.AWAY if away else Obstacle.REJECTED)
        if self.is_refusal:
            obstacle = Obstacle.REFUSED
        return GitLabError(obstacle, text, self.pause)


class GitLab:
    """The only way to GitLab's API, with the tokens in file gitlab-token; raises GitLabError.

    Each request has one deadline for its whole answer. Nothing is followed elsewhere.
    """

    def __init__(
        self,
        secrets: Secrets,
        surroundings: Surroundings | None = None,
        deadline: float = GITLAB_SECONDS,
    ) -> None:
        self.secrets = secrets
        self.surroundings = surroundings or Surroundings()
        self.deadline = deadline
        self._accepted: dict[Project, str] = {}  # the token that was good last
        self._sessions: list[Any] = []  # whose connections are free
        self._open: set[str] = set()  # addresses of requests that have no answer yet

    def tokens(self, project: Project | None = None) -> list[str]:
        """Return the tokens, the one first that was good last; none where GitLab is not told."""
        lines = [line.decode("latin-1") for line in self.secrets.lines(GITLAB_TOKENS)]
        tokens = [line for line in lines if TOKEN.fullmatch(line)][:CREDENTIALS_TRIED]
        accepted = self._accepted.get(project) if project else ""
        return sorted(tokens, key=lambda token: token != accepted)

    def status(self, project: Project, commit: str, name: str, branch: str) -> str:
        """Return the state of the newest status of that name, "" where there is none."""
        url = project.url("repository", "commits", commit, "statuses")
        fields = {"name": name, "per_page": "100", **branch_field(branch)}
        answer = self._ask(project, "GET", url, params=fields)
        if answer.status != http.HTTPStatus.OK:
            raise answer.error()
        try:
            entries = [e for e in json.loads(answer.body) if e["name"] == name]
            entries = [e for e in entries if e.get("ref") == branch or not branch]
            newest_entry = max(entries, key=lambda entry: int(entry["id"]), default={"status": ""})
            return str(newest_entry["status"])[:STATUS_LENGTH]
        except SHAPE_ERRORS as wrong:
            text = f"not a list of statuses: {type(wrong).__name__}"
            raise GitLabError(Obstacle.REJECTED, text) from wrong

    def set_status(self, project: Project, commit: str, fields: Mapping[str, str]) -> bool:
        """Send a status; return whether that changed what GitLab shows."""
        url = project.url("statuses", commit)
        answer = self._ask(project, "POST", url, json=fields)
        if answer.status in (http.HTTPStatus.OK, http.HTTPStatus.CREATED):
            with suppress(*SHAPE_ERRORS):
                if json.loads(answer.body)["status"] == fields["state"]:
                    return True
            # a proxy that wants a login, say, may have answered
            raise GitLabError(Obstacle.AWAY, f"not a status: {answer.text}")
        if answer.status == http.HTTPStatus.BAD_REQUEST and UNCHANGED.search(answer.text):
            return False
        raise answer.error()

    def _ask(self, project: Project, method: str, url: str, **content: Any) -> GitLabAnswer:
        """Return the answer to a request with the first token that is good enough."""
        missing = f"file {GITLAB_TOKENS} has no token".encode()
        answer = GitLabAnswer(http.HTTPStatus.UNAUTHORIZED, missing)
        for token in self.tokens(project):
            exchange = partial(self._exchange, method, url, token, **content)
            answer = self._answer(url, exchange)
            if not answer.is_refusal:
                self._accepted[project] = token
                break
        return answer

    def _answer(self, url: str, exchange: Callable[[], GitLabAnswer]) -> GitLabAnswer:
        """Return the answer that comes in time.

        A thread waits for it, since one that drips would outlast every timeout of a socket. While
        it does, the commit is not asked about again: what was sent last may yet have its effect.
        """
        if url in self._open or len(self._open) >= REQUESTS_OPEN:
            return GitLabAnswer(0, failure="an earlier request has no answer yet")
        self._open.add(url)
        answers: queue.SimpleQueue[GitLabAnswer] = queue.SimpleQueue()

        def wait() -> None:
            """Put the answer into the queue, or why there is none."""
            try:
                answer = exchange()
            except (HookError, OSError, *SHAPE_ERRORS) as failure:
                answer = GitLabAnswer(0, failure=first_cause(failure))
            finally:
                self._open.discard(url)  # before the next request may be sent
            answers.put(answer)

        try:
            threading.Thread(target=wait, name="gitlab", daemon=True).start()
            return answers.get(timeout=self.deadline)
        except RuntimeError as full:
            self._open.discard(url)
            return GitLabAnswer(0, failure=str(full))
        except queue.Empty:
            return GitLabAnswer(0, failure=f"no whole answer within {self.deadline:.0f} s")

    def _exchange(self, method: str, url: str, token: str, **content: Any) -> GitLabAnswer:
        """Send a request, and read the beginning of its answer."""
        until = time.monotonic() + self.deadline
        session = self._sessions.pop() if self._sessions else new_session()
        authorities = self.surroundings.authorities()
        with memory_file(authorities) as bundle:
            trusted = path_of(bundle) if authorities else self.surroundings.public_authorities()
            with session.request(
                method,
                url,
                **content,
                headers={"PRIVATE-TOKEN": token, "User-Agent": f"{MANAGER}/{__version__}"},
                timeout=self.deadline,
                allow_redirects=False,
                stream=True,
                verify=trusted,
                proxies=self.proxies(url),
            ) as response:
                body = b""
                for part in response.iter_content(8192):
                    body += part
                    if len(body) > ANSWER_BYTES or time.monotonic() > until:
                        break
                pause = seconds_of(response.headers.get("Retry-After"))
                answer = GitLabAnswer(response.status_code, body[:ANSWER_BYTES], pause)
        self._sessions.append(session)
        return answer

    def proxies(self, url: str) -> dict[str, str]:
        """Return the proxy for a URL, as git would find it in its variables."""
        environ = {**os.environ, **self.surroundings.variables}
        lower = {key.lower(): value for key, value in environ.items()}
        if http_client().utils.should_bypass_proxies(url, no_proxy=lower.get("no_proxy", "")):
            return {}
        names = {scheme: lower.get(f"{scheme}_proxy", "") for scheme in ("http", "https")}
        return {scheme: proxy for scheme, proxy in names.items() if proxy}


def new_session() -> Any:
    """Return a session that keeps connections, and nothing that a server or this machine says."""
    session = http_client().Session()
    session.trust_env = False  # it would send what somebody's .netrc has
    session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
    return session


def first_cause(failure: BaseException) -> str:
    """Return what was wrong at first: that is said without the addresses of Python objects."""
    while failure.__context__:
        failure = failure.__context__
    return clip(str(failure)) or type(failure).__name__


class CommitStatuses:
    """Keeps the commit statuses in GitLab as the runs are: a sink of Transitions.

    A Transition only says when to look. What is to be sent follows from what is observed of the
    runs and from what was sent before, so that nothing is lost with the process, and of each stage
    only the newest state is sent. GitLab adds a second status after a final one: so where this
    process does not know what it shows, a final one is sent only after reading that.
    """

    def __init__(
        self,
        config: Config,
        gitlab: GitLab,
        observe: Callable[[], list[ReportedRun] | None],
        state: StateStore,
    ) -> None:
        self.gitlab = gitlab
        self.observe = observe
        self.state = state
        self.clock = state.clock
        self.metrics = state.kubectl.metrics
        self.news = threading.Event()  # set to have the runs looked at
        self.ended = threading.Event()  # set to have nothing more sent
        self.away = Retry(self.clock, STATUS_DELAYS)  # by server
        self.retry = Retry(self.clock, REJECTED_DELAYS)  # by run
        self.refused = Retry(self.clock, REFUSED_DELAYS, REFUSED_REPORTS)  # by app and branch
        self.apps = {app.name: app for app in config.apps} if config.gitlab.statuses else {}
        self.page = config.external_url.rstrip("/")
        self.projects = {n: Project.of(app, config.gitlab.url) for n, app in self.apps.items()}
        shared = Counter(normalise_url(app.repository) for app in self.apps.values())
        self.prefixes = {
            name: f"{MANAGER}/{name}/" if shared[normalise_url(a.repository)] > 1 else f"{MANAGER}/"
            for name, a in self.apps.items()
        }
        self._sent: dict[str, dict[str, str]] = {}  # by run and stage, as far as it is certain
        self._settled: dict[str, tuple[str, float]] = {}  # app and end, by run; not recorded yet
        self._paused: dict[str, float] = {}  # servers that want to be left, and until when
        self._recorded = 0.0  # when settled runs were recorded last
        self._tokens: set[str] = set()  # at the last look
        self._changes = 0  # of the tokens, until now: news for what was refused

    def take(self, _transition: Transition) -> None:
        """Have the runs looked at, since one of them has changed."""
        self.news.set()

    def send_all(self) -> float:
        """Send what GitLab does not show yet; return the seconds after which to look again."""
        tokens = {*self.gitlab.tokens()} if any(self.projects.values()) else set()
        self._changes += tokens != self._tokens
        self._tokens = tokens
        waiting = bool(tokens) and (self.away.failing() or self.refused.failing())
        self.metrics.waiting.labels("GitLab").set(waiting)
        runs = self.observe() if tokens else []
        if runs is None:
            return LOOK_SECONDS
        runs = [run for run in runs if self.projects.get(run.app.name) and not self.is_done(run)]
        for gone in self._sent.keys() - {run.run.id for run in runs}:
            del self._sent[gone]
            self.retry.succeeded(gone)
        until = self.clock.monotonic() + STATUS_LOOK
        for run in sorted(runs, key=lambda run: -run.run.received):
            if self.clock.monotonic() > until or self.ended.is_set():
                return 0.0
            self.send(run)
        self.record_settled()
        return LOOK_SECONDS if runs or self._settled else UNCHANGED_SECONDS

    def is_done(self, run: ReportedRun) -> bool:
        """Whether nothing is to be sent of a run any more, or its commit has no id."""
        if not SHA.fullmatch(run.run.commit):
            return True
        if run.end is None:
            return False
        _, settled = self._settled.get(run.run.id, ("", run.settled))
        return settled == run.end.ended or run.end.ended < self.clock.now() - STATUS_AGE

    def send(self, run: ReportedRun) -> None:
        """Send the statuses of a run that GitLab does not show, unless that is put off."""
        project = self.projects[run.app.name]
        missing = self.missing(run)
        if project is None or (missing and not self.is_due(run, project)):
            return
        try:
            for status in missing:
                if self.ended.is_set():
                    return
                self.send_status(run, project, status)
        except GitLabError as failed:
            self.put_off(run, project, failed)
            return
        self.retry.succeeded(run.run.id)
        if run.end and not run.end.next_try:
            self._settled[run.run.id] = (run.app.name, run.end.ended)

    def missing(self, run: ReportedRun) -> list[StageStatus]:
        """Return the statuses of a run that GitLab does not show, as far as that is certain.

        What begins comes before what ends: between the two the commit would look done.
        """
        sent = self._sent.get(run.run.id, {})
        statuses = [s for s in run.statuses() if s.is_missing(sent.get(s.stage))]
        return sorted(statuses, key=lambda status: status.is_final)

    def is_due(self, run: ReportedRun, project: Project) -> bool:
        """Whether a run may be tried now: it, its server and what the tokens may do."""
        paused = self._paused.get(project.server, 0.0) > self.clock.monotonic()
        tried = self.retry.due(run.run.id) and self.away.due(project.server)
        return tried and not paused and self.refused.due(self.permission(run), self._changes)

    def permission(self, run: ReportedRun) -> str:
        """Return what is refused together: a token that is good for one branch may lack another."""
        kind = "deploy branch" if run.run.ref == run.app.deploy_ref else "other branches"
        return f"{run.app.name}, {kind}"

    def send_status(self, run: ReportedRun, project: Project, status: StageStatus) -> None:
        """Bring GitLab to show a status; raises GitLabError."""
        sent = self._sent.setdefault(run.run.id, {})
        name = self.prefixes[run.app.name] + status.stage
        commit = run.run.commit
        branch = self.branch(run.run)
        if status.is_final and status.stage not in sent:
            sent[status.stage] = self.gitlab.status(project, commit, name, branch)
        if not status.is_missing(sent.get(status.stage)):
            return
        text = clip(self.gitlab.secrets.mask(status.text), STATUS_LENGTH)
        fields = {"state": str(status.state), "name": name, "description": text}
        address = f"{self.page}/runs/{quote(run.run.id)}"
        if self.page and len(address) <= STATUS_LENGTH:
            fields["target_url"] = address
        try:
            is_new = self.gitlab.set_status(project, commit, {**fields, **branch_field(branch)})
        except GitLabError as failed:
            if failed.obstacle is Obstacle.AWAY:
                sent.pop(status.stage, None)
            raise
        sent[status.stage] = str(status.state)
        self.metrics.statuses.labels("sent" if is_new else "unchanged").inc()
        self.refused.succeeded(self.permission(run))
        if self.away.succeeded(project.server):
            info("recovered", what="commit statuses")

    def branch(self, run: Run) -> str:
        """Return the branch that GitLab is told, "" where its name is not known or not to be shown.

        Of a very long one only the beginning is recorded. GitLab looks for the branch then.
        """
        whole = "~" not in run.branch and len(run.branch) <= STATUS_LENGTH
        return run.branch if whole and self.gitlab.secrets.mask(run.branch) == run.branch else ""

    def put_off(self, run: ReportedRun, project: Project, failed: GitLabError) -> None:
        """Have it tried again later: the run, all of its server, or all that is refused alike."""
        self.metrics.statuses.labels(str(failed.obstacle)).inc()
        self.metrics.reports_failed.labels("statuses").inc()
        words = {"app": run.app.name, "run": run.run.id, "detail": str(failed)}
        if failed.obstacle is Obstacle.REFUSED:
            self.metrics.errors.labels("statuses").inc()
            if self.refused.failed(self.permission(run), self._changes):
                needed = "a token with scope api that may push to the branch"
                error("GitLab refuses commit statuses", needed=needed, **words)
            return
        if failed.obstacle in (Obstacle.AWAY, Obstacle.LIMITED):
            pause = min(failed.pause, LONGEST_PAUSE)
            self._paused[project.server] = self.clock.monotonic() + pause
            if self.away.failed(project.server):
                warn("commit statuses wait for GitLab", **words)
        elif self.retry.failed(run.run.id):
            warn("GitLab does not take a commit status", **words)

    def record_settled(self) -> None:
        """Record, now and then, of which runs GitLab shows all: the next process need not ask."""
        if not self._settled or self.clock.monotonic() < self._recorded + STATUS_LOOK:
            return
        self._recorded = self.clock.monotonic()
        for name in {app for app, _ in self._settled.values()}:
            runs = {run: ended for run, (app, ended) in self._settled.items() if app == name}
            records = [StatusRecord(id=run, ended=ended) for run, ended in runs.items()]
            with self.retry.contain(f"record of {name}", "sent statuses not recorded", app=name):
                self.state.write(self.apps[name], *records)
                for run in runs:
                    del self._settled[run]


def branch_field(branch: str) -> dict[str, str]:
    """Return the field that names a branch, none where GitLab is to look for it."""
    return {"ref": branch} if branch else {}


# === health =======================================================================================
# Whether a version is healthy: by its pods, by its endpoints, and by what they answer.

HEAD_BYTES = 65_536  # of an answer's status and headers
HEAD_END = re.compile(rb"\n\r?\n")
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
UNCERTAIN = ("Conflict", "AlreadyExists", "Unreachable")  # the step looks again, and acts again


@dataclass(frozen=True, kw_only=True, slots=True)
class Doors:
    """kubectl, git, the clock, the reports and the stop signal, as all that deploys uses them."""

    kubectl: Kubectl
    git: Git
    secrets: Secrets
    clock: Clock
    reports: Reports
    stop: threading.Event  # ends all waiting

    def pause(self, seconds: float) -> None:
        """Wait; raises InterruptedError when the program is to stop."""
        if self.stop.wait(seconds):
            raise InterruptedError

    def urgent(self) -> Doors:
        """Return the same doors with a kubectl that waits for no other call."""
        calls = 2 * self.kubectl.at_once
        return replace(
            self, kubectl=UrgentKubectl(self.kubectl.metrics, calls, self.kubectl.program)
        )

    def report(self, task: Task, state: State, more: Object | None = None, **values: Any) -> None:
        """Report that something has changed in the environment of a task.

        `values` are fields of the Transition, `more` further fields of its log line.
        """
        values = {**task.words, **values, "more": more or {}}
        self.reports.emit(Transition(state=state, at=self.clock.now(), **values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One app in one environment, and the run that is on its way there."""

    app: App
    environment: str
    namespace: str
    run: Run
    image: str = ""
    older: frozenset[str] = frozenset()  # what the run's branch had before, as far as that is known
    job: Job | None = None  # the run's last Job, which is annotated with what the run waits for

    @property
    def words(self) -> dict[str, Any]:
        """The fields of its log lines."""
        return {"run": self.run.id, "app": self.app.name, "environment": self.environment}

    @property
    def labels(self) -> tuple[str, str]:
        """The labels of its metrics, by which an environment of an app is known."""
        return self.app.name, self.environment

    @property
    def last(self) -> bool:
        """Whether this is the environment that bakes."""
        return self.environment == self.app.deploy.environments[-1]


def read_events(kubectl: Kubectl, namespace: str, *terms: str) -> list[PodEvent]:
    """Return the Events of which all terms of a field selector are true; raises KubectlError."""
    listed = kubectl.list("events", namespace, "--field-selector", ",".join(terms))
    return [*map(PodEvent, listed)]


def require_head(doors: Doors, task: Task) -> None:
    """Raise unless the commit is its branch's head; without an answer it is tried again."""
    heads = doors.git.heads(task.app.repository)
    head = head_of(task.run, heads, 0, doors.clock.now(), task.older)
    if head is Head.NEWER:
        raise SupersededError(Reason.NOT_HEAD, "the branch has another head")
    if head is Head.UNKNOWN:
        raise NotNowError("the git server does not show the push yet")


F = TypeVar("F", bound=Callable[..., Any])


def retried(step: F, *, while_head: bool = False) -> F:
    """Repeat a step that looks and then acts, until it has succeeded or failed for good.

    It is repeated after a conflict, and where no answer came, so that its effect is unknown. A step
    before the switch goes on only while its commit is the branch's head: a step that is tried for
    ever would keep the correction out.
    """

    def repeat(self: Any, task: Task, *args: Any, **more: Any) -> Any:
        """Take the step until it is answered."""
        doors: Doors = self.doors
        retry = Retry(doors.clock, report_every=30)
        checked = doors.clock.monotonic()
        while True:
            try:
                return step(self, task, *args, **more)
            except KubectlError as failed:
                if failed.kind not in UNCERTAIN:
                    raise
                if retry.failed("step"):
                    words = {"step": step.__name__, "detail": str(failed)}
                    warn("a step is tried again", **words, **task.words)
                doors.pause(retry.wait(1.0) if failed.kind == "Unreachable" else 0.05)
            if while_head and task.run.ref and doors.clock.monotonic() - checked > HEAD_FRESH:
                with suppress(GitError):
                    require_head(doors, task)
                checked = doors.clock.monotonic()

    return cast(F, repeat)


@dataclass(frozen=True, slots=True)
class PodHealth:
    """How many pods of a version are healthy, and how many it is to have."""

    ready: int = 0
    wanted: int = 0

    def better_than(self, other: PodHealth) -> bool:
        """Whether a larger share of these pods is healthy; versions may differ in size."""
        return self.ready * max(other.wanted, 1) > other.ready * max(self.wanted, 1)


@dataclass(frozen=True, slots=True)
class EndpointState:
    """What the endpoints of a Service say after a switch."""

    converged: bool  # they are pods of the selected version alone, and enough
    reacted: bool  # at least one of them is, or none is left: a controller has acted on the switch


class Workloads:
    """The pods and Deployments of an app: how many there are, and how many are healthy."""

    def __init__(self, doors: Doors) -> None:
        self.doors = doors
        self.kubectl = doors.kubectl

    def health(
        self,
        task: Task,
        entry: HistoryEntry,
        ask: Callable[[], Object] | None,
        patience: float = PATIENCE,
    ) -> PodHealth:
        """Return how many pods of a history entry are healthy.

        Healthy are those that are ready and, if they are asked, answer as healthy within so many
        seconds: as the spec says that `ask` returns, and where that is empty, as their own does.
        """
        pods = self.staying(task.namespace, entry.selector)
        ready = [p for p in pods if Pod(p).ready]
        wanted = len(pods)
        if colour_of(entry.selector):
            wanted = max(wanted, self.size(task, entry.selector))
        health = task.app.deploy.health
        checks = list[HealthCheck]()
        spec = ask() if ask else {}
        for pod in ready if ask and entry.ports else ():
            check = release_checks(health, spec or pod["spec"], entry.ports).pods
            checks += at_pods(check, [pod])
        return PodHealth(len(ready) - len(refusals_of(checks, patience)), wanted)

    def endpoints(
        self, task: Task, selector: Mapping[str, str], wanted: int, since: float
    ) -> EndpointState:
        """Return whether the ready endpoints are the wanted pods of a selector.

        Pods that the cluster took away or replaced since a time are not waited for.
        """
        terms = f"{LABEL_SERVICE}={task.app.service_name}"
        slices = self.kubectl.list("endpointslices", task.namespace, "-l", terms)
        ready = ready_endpoints(slices)
        pods = [Pod(p) for p in self.pods(task.namespace, selector)]
        names = {p.name for p in pods}
        enough = min(wanted, sum(p.created <= since and not p.leaving for p in pods))
        converged = bool(ready and ready <= names and len(ready) >= enough)
        return EndpointState(converged, reacted=bool(slices) and (not ready or bool(ready & names)))

    def size(self, task: Task, selector: Mapping[str, str]) -> int:
        """Return how many pods a colour is to have now: an autoscaler may have changed it."""
        name = f"{task.app.name}-{colour_of(selector)}"
        return replicas_of(self.kubectl.get("deployment", name, task.namespace))

    def staying(self, namespace: str, selector: Mapping[str, str]) -> list[Object]:
        """Return the pods that a selector reaches and that neither have ended nor are to end."""
        return [p for p in self.pods(namespace, selector) if Pod(p).stays]

    def ready(self, namespace: str, selector: Mapping[str, str]) -> list[Object]:
        """Return the ready pods that a selector reaches."""
        return [p for p in self.pods(namespace, selector) if Pod(p).ready]

    def pods(self, namespace: str, selector: Mapping[str, str]) -> list[Object]:
        """Return the pods that a selector reaches; an empty one reaches none."""
        terms = selector_text(selector)
        return self.kubectl.list("pods", namespace, "-l", terms) if terms else []

    @retried
    def scale(
        self, task: Task, name: str, replicas: int, still_due: Callable[[], bool] = lambda: True
    ) -> None:
        """Set the size of a Deployment, which is read before it is asked whether that is due."""
        deployment = self.own(task, name)
        if deployment and still_due():
            meta = {"resourceVersion": deployment["metadata"]["resourceVersion"]}
            change = {"metadata": meta, "spec": {"replicas": replicas}}
            self.kubectl.patch("deployment", name, task.namespace, change)

    @retried
    def drain(
        self, task: Task, name: str, since: float, still_due: Callable[[], bool] = lambda: True
    ) -> None:
        """Let connections that are kept alive leave the pods of a version that was left at a time.

        Its pods are restarted, once, or scaled down to `deploy.retain`. The Deployment is read
        before it is asked whether that is still due, and written only as it was read: who takes the
        traffic back to it writes to it first.
        """
        deployment = self.own(task, name)
        if deployment is None or not still_due():
            return
        retain = task.app.deploy.retain
        spec = part_of(deployment, "spec")
        restarted = part_of(spec, "template", "metadata", "annotations").get(RESTARTED)
        if retain is not None:
            change: Object = {"replicas": min(retain, replicas_of(deployment))}
        elif spec.get("replicas") and epoch(restarted) < since:
            stamp = datetime.fromtimestamp(self.doors.clock.now(), UTC).isoformat(
                timespec="seconds"
            )
            change = {"template": {"metadata": {"annotations": {RESTARTED: stamp}}}}
        else:
            return
        meta = {"resourceVersion": deployment["metadata"]["resourceVersion"]}
        self.kubectl.patch("deployment", name, task.namespace, {"metadata": meta, "spec": change})

    @retried
    def unpause(self, task: Task, name: str) -> None:
        """Let the rollout of a Deployment go on that a rollback has paused."""
        deployment = self.own(task, name)
        if deployment and deployment["spec"].get("paused"):
            change = {"spec": {"paused": False}}
            self.kubectl.patch("deployment", name, task.namespace, change)

    def own(self, task: Task, name: str) -> Object | None:
        """Return a Deployment that the app has made; None where there is none, or another's."""
        deployment = self.kubectl.get("deployment", name, task.namespace)
        return deployment if is_colour_of(deployment, task.app.name) else None


def is_colour_of(deployment: Object | None, app: str) -> bool:
    """Whether an app has made a Deployment: its selector says so, which nobody can change."""
    return part_of(deployment, "spec", "selector", "matchLabels").get(LABEL_APP) == app


def replicas_of(deployment: Object | None) -> int:
    """Return how many pods a Deployment is to have, 1 where there is none."""
    return int((deployment or {}).get("spec", {}).get("replicas", 1))


def refusals_of(checks: Iterable[HealthCheck], patience: float) -> list[str]:
    """Return why some of these do not answer as healthy within some seconds; all are asked at once.

    Raises OSError where it is this process that can open no more files.
    """
    with ThreadPoolExecutor(32) as at_once:
        answers = at_once.map(partial(health_refusal, patience=patience), checks)
        return [refusal for refusal in answers if refusal]


def health_refusal(check: HealthCheck, patience: float = PATIENCE) -> str | None:
    """Return why an app does not answer a check as healthy, or None; the one door to apps.

    There is one deadline, in seconds, for the whole answer, which is read to the end of its headers
    and no further. Raises OSError where it is this process that can open no more files.
    """
    deadline = time.monotonic() + patience
    head = bytearray()
    seen = 0  # bytes in which no end begins: to search all of them at each byte would take long
    try:
        with connected(check, deadline) as connection:
            if not check.path:
                return None
            connection.sendall(check.request)
            while not HEAD_END.search(head, seen) and len(head) < HEAD_BYTES:
                seen = max(0, len(head) - 2)
                connection.settimeout(seconds_until(deadline))
                if not (received := connection.recv(4096)):
                    break
                head += received
    except TimeoutError:
        return f"no whole answer within {patience:.0f} s"
    except OSError as failed:
        if failed.errno in OUT_OF_FILES:
            raise
        name = type(failed).__name__
        why = getattr(failed, "reason", None)  # of TLS
        return f"{name}: {why}" if why else name
    status = re.match(rb"HTTP/1\.[01] ([1-9][0-9]{2})\b", head)
    if not status or not HEAD_END.search(head):
        return "not an HTTP answer"
    return None if b"200" <= status[1] < b"400" else f"status {status[1].decode()}"


@contextmanager
def connected(check: HealthCheck, deadline: float) -> Iterator[socket.socket]:
    """Connect to where a check asks; no certificate is verified, as the kubelet does not either."""
    address = (check.host, check.port)
    with socket.create_connection(address, seconds_until(deadline)) as connection:
        if not check.path or check.scheme != "HTTPS":
            yield connection
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection.settimeout(seconds_until(deadline))  # of the whole handshake
        with context.wrap_socket(connection) as encrypted:
            yield encrypted


def seconds_until(deadline: float) -> float:
    """Return the seconds that are left; raises TimeoutError when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def at_pods(check: HealthCheck, pods: Iterable[Object]) -> list[HealthCheck]:
    """Return a check at the address of each pod that has one."""
    hosts = [(pod.get("status") or {}).get("podIP") for pod in pods]
    return [replace(check, host=host) for host in hosts if host]


def ready_endpoints(slices: Iterable[Object]) -> set[str]:
    """Return the names of the pods behind the ready endpoints of EndpointSlices."""
    endpoints = [e for s in slices for e in s.get("endpoints") or []]
    ready = [e for e in endpoints if (e.get("conditions") or {}).get("ready") is not False]
    return {(e.get("targetRef") or {}).get("name", e["addresses"][0]) for e in ready}


def rolled_out(deployment: Object, ready: int) -> bool:
    """Whether a Deployment's status and its ready pods prove that all wanted ones are ready."""
    status = deployment.get("status") or {}
    wanted = deployment["spec"].get("replicas", 1)
    counts = ("updatedReplicas", "readyReplicas", "availableReplicas", "replicas")
    complete = {status.get(k, 0) for k in counts} == {wanted} and ready >= wanted > 0
    current = status.get("observedGeneration", 0) >= deployment["metadata"]["generation"]
    return bool(complete and current)


# === live service =================================================================================
# What visitors reach: the live Service of an app in an environment, who may change it, and the
# patches that move traffic. Each of them compares and sets.


@dataclass(frozen=True, slots=True)
class ReportedDrift:
    """What was last reported of a selector that someone else changed."""

    drift: Drift
    selector: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class RecordedFields:
    """What the release that is live, by the name of its record, has of a Service."""

    record: str
    fields: ServiceFields


@dataclass(frozen=True, slots=True)
class RecordedCompanions:
    """The companions of a release, by the name of its record; None: unknown."""

    record: str
    objects: list[Object] | None
    configmaps: Sequence[Object]  # that its workers name


@dataclass(slots=True)
class Remembered:
    """What this process remembers of live Services, each by app and environment."""

    in_order: dict[tuple[str, str], Service] = dataclass_field(default_factory=dict)
    drifts: dict[tuple[str, str], ReportedDrift] = dataclass_field(default_factory=dict)
    removed: set[str] = dataclass_field(default_factory=set)  # uids of Services
    fields: dict[tuple[str, str], RecordedFields] = dataclass_field(default_factory=dict)
    companions: dict[tuple[str, str], RecordedCompanions] = dataclass_field(default_factory=dict)


class LiveServices:
    """Reads and writes live Services, and what is recorded of them, there and elsewhere."""

    def __init__(self, doors: Doors, state: StateStore, remembered: Remembered) -> None:
        self.doors = doors
        self.kubectl = doors.kubectl
        self.state = state
        self.remembered = remembered
        self.workloads = Workloads(doors)

    def read(self, task: Task) -> Service | None:
        """Return the live Service as it is now; where its selector names no run, by its pods."""
        manifest = self.kubectl.get("service", task.app.service_name, task.namespace)
        return self.service_of(task, manifest)

    def service_of(self, task: Task, manifest: Object | None) -> Service | None:
        """Return the live Service that was read; where its selector names no run, by its pods."""
        service = Service(manifest) if manifest else None
        if manifest and service and not (service.run or service.live):
            ready = map(Pod, self.workloads.ready(task.namespace, service.selector))
            runs = runs_of(task.app.name, ready)
            return Service(manifest, run=runs.pop() if len(runs) == 1 else "")
        return service

    def left_behind(self, task: Task) -> list[Service]:
        """Return the live Services that an app had before deploy.service was changed."""
        terms = f"{LABEL_APP}={task.app.name},{LABEL_STAGE}=live"
        services = map(Service, self.kubectl.list("services", task.namespace, "-l", terms))
        return [service for service in services if service.name != task.app.service_name]

    def remember(self, task: Task, service: Service) -> None:
        """Keep a live Service that is in order, for when what is written on it is lost."""
        last = self.remembered.in_order.get(task.labels, service)
        removed = service.uid and service.uid in self.remembered.removed
        if service.in_order and service.version >= last.version and not removed:
            self.remembered.in_order[task.labels] = service
            self.remembered.drifts.pop(task.labels, None)

    def remove(self, task: Task, service: Service) -> None:
        """Delete a live Service that has nothing to go back to, and forget what was live.

        An informer may show it a while longer: then it is not remembered again.
        """
        self.remembered.removed.add(service.uid)
        self.remembered.in_order.pop(task.labels, None)
        self.state.write(task.app, forget=[f"live-{task.environment}"])
        self.kubectl.delete("service", [task.app.service_name], task.namespace)

    def with_history(self, task: Task, service: Service | None) -> Service | None:
        """Return the live Service with its history: its own, or else what is recorded elsewhere."""
        if service and service.history:
            return service
        if remembered := self.remembered.in_order.get(task.labels):
            return remembered
        entry = self.state.read(task.app).live.get(task.environment)
        if service and service.run and not entry:
            entry = self.entry_from_release(task, service)
        return Service.from_entry(task.app.service_name, entry) if entry else None

    def entry_from_release(self, task: Task, service: Service) -> HistoryEntry:
        """Return the history entry of the run that a Service reaches, by its recorded release."""
        terms = f"{LABEL_APP}={task.app.name},{LABEL_STAGE}=release"
        address = list_address("configmaps", task.namespace, terms)
        pages = self.kubectl.pages(address, task.namespace)  # ten of a megabyte each, perhaps
        for configmap in (item for page in pages for item in page["items"]):
            with suppress(StageError):
                release = Release.from_configmap(configmap)
                colour = colour_of(service.selector) or release.colour
                if (release.run, release.colour) == (service.run, colour):
                    return entry_of(release, task.app.name, self.doors.clock.now())
        return HistoryEntry()

    def release(self, task: Task, name: str) -> Release:
        """Return a recorded release; raises StageError where it is gone or was changed."""
        name = name or "none"
        configmap = self.kubectl.get("configmap", name, task.namespace)
        if not configmap:
            raise StageError(Reason.VANISHED, f"release record {name} is gone")
        packed = str((configmap.get("binaryData") or {}).get("release", ""))
        genuine = release_record(task.app.name, packed)
        same_name = configmap["metadata"]["name"] == genuine["metadata"]["name"]
        if not (same_name and same_configmap(configmap, genuine)):
            detail = f"release record {name} was changed, or is not one of {task.app.name}"
            raise StageError(Reason.ADOPTION_REFUSED, detail)
        return Release.from_configmap(configmap)

    def write(
        self,
        task: Task,
        service: Service,
        annotations: Object,
        goal: HistoryEntry | None = None,
        patch: ServiceFields | None = None,
    ) -> Service:
        """Change annotations and, with a goal, where the Service points, in one patch.

        It compares and sets: if the Service has changed since it was read, it is a Conflict. An
        empty value removes an annotation; what is not named stays. With a goal, the selector that
        is replaced is annotated, too, and what undoes the patch of further fields; annotations that
        are given take precedence. Without such a patch only the goal's ports go with the selector.
        """
        if not goal:
            return self.patch(task, service, annotations, patch or ServiceFields())
        # a merge keeps keys that are not named: those that must go are set to null
        selector = {**dict.fromkeys(service.selector), **goal.selector}
        previous = service.live.selector or service.selector
        annotations = {ANNOTATION_PREVIOUS: previous, ANNOTATION_REPLACED: None, **annotations}
        if patch is not None:
            annotations[ANNOTATION_REPLACED] = service.fields.changed_by(patch).to_json()
        elif goal.ports:
            patch = ServiceFields(spec={"ports": ports_like(goal.ports, service.ports)})
        patch = patch or ServiceFields()
        patch = replace(patch, spec={**patch.spec, "selector": selector})
        return self.patch(task, service, annotations, patch)

    def patch(
        self, task: Task, service: Service, annotations: Object, patch: ServiceFields, *options: str
    ) -> Service:
        """Compare and set our annotations and other fields; an empty annotation is removed."""
        if service.apps and task.app.name not in service.apps:
            raise foreign_service_error(service, task.app.name)
        ours = {key: annotation_text(value) for key, value in annotations.items()}
        labels = {LABEL_MANAGED: MANAGER, LABEL_APP: task.app.name, LABEL_STAGE: "live"}
        meta = {
            "resourceVersion": str(service.version),
            "annotations": {**patch.annotations, **ours},
            "labels": {**patch.labels, **labels},
        }
        change = {"metadata": meta, "spec": patch.spec}
        place = (service.name, task.namespace)
        written = Service(self.kubectl.patch("service", *place, change, *options))
        if not options:
            self.remember(task, written)
        return written

    def require_accepted(self, task: Task, service: Service | None, release: Release) -> None:
        """Raise unless the API server would take the Service of a release, as it says itself.

        Raises StageError for a field that cannot be changed, and KubectlError for its refusal.
        """
        if service is None:
            self.kubectl.put(release.service, None, task.namespace, "--dry-run=server")
            return
        spec = release.service["spec"]
        if field := fixed_field(service.spec, spec):
            advice = "Restore its value, or delete the Service to have it made anew."
            refuse(f"{field} of Service {service.name} cannot be changed. {advice}")
        wanted = ServiceFields.of(release.service).fitted(service.spec)
        later = confirmed_changes(service.spec, spec)
        if later or service.fields.changed_by(wanted):
            patch = replace(wanted, spec={**wanted.spec, **later})
            self.patch(task, service, {}, patch, "--dry-run=server")

    def patch_to(self, task: Task, service: Service, release: Release) -> ServiceFields:
        """Return the patch that gives a live Service all that a switch to a release carries.

        It removes what only the release before had, as far as that is recorded.
        """
        live = self.recorded_fields(task, service.live)
        wanted = ServiceFields.of(release.service).fitted(service.spec)
        return (live or ServiceFields()).patch_to(wanted)

    def patch_back(
        self, task: Task, service: Service, target: HistoryEntry
    ) -> ServiceFields | None:
        """Return the patch that gives a live Service back what it had with a version before.

        That is what the last switch replaced, if it was from that version: it is at hand. Else it
        is what the releases of both have; None where that of the version before is not recorded.
        """
        undo = service.annotation(ANNOTATION_REPLACED, {})
        if undo and target.selector == service.annotation(ANNOTATION_PREVIOUS, {}):
            return ServiceFields.from_json(undo).fitted(service.spec)
        wanted = self.recorded_fields(task, target)
        if wanted is None:
            return None
        live = self.recorded_fields(task, service.live) or ServiceFields()
        return live.patch_to(wanted.fitted(service.spec))

    def recorded_fields(self, task: Task, entry: HistoryEntry) -> ServiceFields | None:
        """Return what the recorded release of a history entry has of a Service, None for none.

        A record never changes: that of the last switch need not be read again.
        """
        last = self.remembered.fields.get(task.labels)
        if last and last.record == entry.release:
            return last.fields
        with suppress(StageError):
            return ServiceFields.of(self.release(task, entry.release).service)
        return None

    def go_back(
        self,
        task: Task,
        service: Service,
        annotations: Object,
        goal: HistoryEntry,
        patch: ServiceFields | None,
    ) -> Service:
        """Point a live Service at a version before, with what a patch gives back to it.

        Where the API server refuses that, traffic moves all the same, with its ports alone.
        """
        try:
            return self.write(task, service, annotations, goal, patch)
        except KubectlError as refused:
            if refused.kind in UNCERTAIN or not patch:
                raise
            error("the live Service was not restored", detail=refused.said, **task.words)
            self.kubectl.metrics.errors.labels("service").inc()
        # a node port of it may belong to another Service by now
        ports = ports_like(ports_like(goal.ports), service.ports)
        return self.write(task, service, annotations, replace(goal, ports=ports))

    def last_manager(self, task: Task) -> str:
        """Return a sentence about who changed the live Service last."""
        last = self.last_change(task)
        at = f" at {last['time']}" if "time" in last else ""
        return f"changed by {clip(str(last.get('manager', 'someone else')), 80)}{at}"

    def last_change(self, task: Task) -> Object:
        """Return what the managedFields of the live Service say of its last change."""
        args = ("get", "service", task.app.service_name, "-o", "json", "--show-managed-fields")
        with suppress(KubectlError, ValueError):
            meta = json.loads(self.kubectl.run(*args, namespace=task.namespace))["metadata"]
            managers = meta.get("managedFields") or [{}]
            spec = [m for m in managers if "f:selector" in json.dumps(m.get("fieldsV1"))]
            return dict(max(spec or managers, key=lambda m: str(m.get("time", ""))))
        return {}


def require_service_of(service: Service | None, app: str) -> None:
    """Raise StageError for a live Service whose label or selector names another app."""
    if service and service.apps - {app}:
        raise foreign_service_error(service, app)


def foreign_service_error(service: Service, app: str) -> StageError:
    """Return the error that a Service by the name of an app's live one is another app's."""
    others = clip(", ".join(sorted(service.apps - {app})), 60)
    words = f"Service {service.name} belongs to app {others}; delete or rename it"
    return StageError(Reason.ADOPTION_REFUSED, words)


def create_immutable(kubectl: Kubectl, configmaps: Sequence[Object], namespace: str) -> None:
    """Create immutable ConfigMaps; raises StageError where others of their names are there.

    What cannot be changed any more is used only if it is exactly what was to be written.
    """
    wanted = {configmap["metadata"]["name"]: configmap for configmap in configmaps}
    for name, refused in kubectl.create_each(configmaps, namespace).items():
        if refused.kind != "AlreadyExists":
            raise refused
        standing = kubectl.get("configmap", name, namespace)
        if standing is None:
            raise NotNowError(f"ConfigMap {name} was deleted this very moment")
        if not same_configmap(standing, wanted[name]):
            detail = f"ConfigMap {name} is there with another content or other labels"
            raise StageError(Reason.ADOPTION_REFUSED, f"{detail}; delete or rename it")


def with_entry_replaced(
    history: Iterable[HistoryEntry], old: HistoryEntry, new: HistoryEntry
) -> list[HistoryEntry]:
    """Return a history with a new entry in the place of an old one."""
    return [new if entry == old else entry for entry in history]


def annotation_text(value: Any) -> str | None:
    """Return a value as an annotation holds it; None, which removes that, for an empty one."""
    return json.dumps(value, default=lambda record: record.to_json()) if value else None


def entry_of(release: Release, app: str, now: float, by: str = "") -> HistoryEntry:
    """Return the history entry of a switch to a release, by this program if by nobody else."""
    return HistoryEntry(
        run=release.run,
        commit=release.commit,
        image=release.image,
        colour=release.colour,
        selector=release.selector,
        ports=release.ports,
        release=release.configmap(app)["metadata"]["name"],
        replicas=release.wanted,
        at=round(now, 3),
        by=by or MANAGER,
        has_companions=bool(release.companions),
    )


class SelectorGuard:
    """Sees to live Services that someone else changed: puts them back, or writes down what is."""

    def __init__(self, live: LiveServices) -> None:
        self.live = live
        self.doors = live.doors

    @retried
    def repair(self, task: Task) -> None:
        """Put a changed selector back, or record what it reaches now.

        What was written on the Service comes back, too, where it was deleted and made again.
        """
        service = self.live.read(task)
        source = self.live.with_history(task, service)
        if service is None or source is None or service.in_order:
            return
        drift = self.drift(task, service, source)
        by = clip(str(self.live.last_change(task).get("manager") or "someone else"), 80)
        self.report(task, service, drift, by)
        own = {key: value for key, value in service.annotations().items() if value}
        annotations = {**source.annotations(), **own}
        history = service.history or source.history
        goal = None
        if drift is Drift.WIDENED:
            now = round(self.doors.clock.now(), 3)
            annotations[ANNOTATION_PUT_BACK] = [*self.put_backs(source), now]
            goal = source.live_by_history
        elif drift is Drift.KEPT:
            history = with_entry_replaced(
                source.history, source.live_by_history, replace(source.live_by_history, by=by)
            )
        elif drift is Drift.MOVED and service.run:
            history = self.history_of_move(task, service, source, by)
        if goal or history != service.history:
            self.live.write(task, service, {**annotations, ANNOTATION_HISTORY: history}, goal)

    def history_of_move(
        self, task: Task, service: Service, source: Service, by: str
    ) -> list[HistoryEntry]:
        """Return the history after someone else has moved all traffic to another run."""
        entry = source.entry(service.run) or self.live.entry_from_release(task, service)
        entry = entry or HistoryEntry(run=service.run, selector=service.selector)
        return history_after_move(source.history, entry, by, self.doors.clock.now())

    def report(self, task: Task, service: Service, drift: Drift, by: str) -> None:
        """Report once what someone else made of a live selector."""
        reported = ReportedDrift(drift, service.selector)
        if self.live.remembered.drifts.get(task.labels) == reported:
            return
        self.live.remembered.drifts[task.labels] = reported
        contested = drift is Drift.CONTESTED
        self.doors.report(
            task,
            State.DRIFTED,
            {"drift": drift},
            run=service.run,
            reason=Reason.SELECTOR_CONTESTED if contested else Reason.SELECTOR_CHANGED,
            by=by,
        )

    def drift(self, task: Task, service: Service, source: Service | None) -> Drift:
        """Return what the selector of a live Service is beside what is recorded of it."""
        if source is None or not source.live_by_history or service.in_order:
            return Drift.NONE
        pods = map(Pod, self.live.workloads.staying(task.namespace, service.selector))
        put_backs = len(self.put_backs(source))
        return drift_of(source.live_by_history.run, runs_of(task.app.name, pods), put_backs)

    def put_backs(self, source: Service) -> list[float]:
        """Return when a widened selector was put back of late."""
        since = self.doors.clock.now() - PUT_BACK_SECONDS
        times = map(seconds_of, source.annotation(ANNOTATION_PUT_BACK, []))
        return [at for at in times if at > since]

    def require_order(self, task: Task, service: Service | None, source: Service | None) -> None:
        """Raise while the live selector reaches two versions; it is put back soon, or contested."""
        drift = self.drift(task, service, source) if service else Drift.NONE
        if drift is Drift.CONTESTED:
            raise StageError(Reason.SELECTOR_CONTESTED, self.live.last_manager(task))
        if drift is Drift.WIDENED:
            raise NotNowError(
                "the live Service selects two versions; its selector is put back first"
            )

    def require_undeleted(self, task: Task) -> None:
        """Raise if the live Service was deleted while this run was verified or baked."""
        source = self.live.with_history(task, None)
        served = source.live_by_history if source else HistoryEntry()
        if served.run != task.run.id or not served:
            return
        if any(service.run == served.run for service in self.live.left_behind(task)):
            return  # it only has another name now
        if self.live.workloads.ready(task.namespace, served.selector):
            raise NotNowError(
                "the live Service was deleted; the run goes on when it is there again"
            )

    def read_selected(self, task: Task) -> Service:
        """Return the live Service, with its history, while it selects the run; raises else."""
        return self.require_selected_history(task, self.live.read(task))

    def require_selected_history(self, task: Task, service: Service | None) -> Service:
        """Return a live Service that was read, as `read_selected` does."""
        service = self.require_selected(task, service)
        if not service.live:
            self.repair(task)
            raise NotNowError("the history of the live Service was lost, and is put back first")
        return service

    def require_selected(self, task: Task, service: Service | None) -> Service:
        """Return the live Service while it selects the run; raises when it was switched away."""
        if service and service.run == task.run.id:
            return service
        left = service.entry(task.run.id) if service else HistoryEntry()
        if left.outcome:
            why = f": {clip(left.detail)}" if left.detail else ""
            raise SupersededError(Reason.ROLLED_BACK, f"rolled back by hand{why}")
        source = self.live.with_history(task, service)
        live_by_history = source is not None and source.live_by_history.run == task.run.id
        if service is None and live_by_history:
            raise NotNowError(
                "the live Service was deleted; the run goes on when it is there again"
            )
        drift = self.drift(task, service, source) if service else Drift.NONE
        if drift is Drift.WIDENED and live_by_history:
            raise NotNowError(
                "the live Service selects two versions; its selector is put back first"
            )
        contested = drift is Drift.CONTESTED
        reason = Reason.SELECTOR_CONTESTED if contested else Reason.SELECTOR_CHANGED
        raise SupersededError(reason, self.live.last_manager(task))


class ForeignService:
    """Takes over a live Service that was there before the first deployment, and gives it back.

    Before there are new pods, its selector is narrowed to those of today, so that it never reaches
    both. If the first version does not stay, its owner gets the selector back. For example:

    step                       selector                                      newest of the history
    before                     app: shop                                     none
    the first claim            app: shop, pod-template-hash: 5d8f            adopted, was app: shop
    the first switch           gitops-hook/app: shop, version: blue, ...     the run
    given back, if it failed   app: shop                                     adopted
    """

    def __init__(self, live: LiveServices) -> None:
        self.live = live
        self.doors = live.doors

    def narrower(
        self, task: Task, release: Release, service: Service, source: Service | None
    ) -> HistoryEntry | None:
        """Return where a Service must point before there are new pods, None if it may stay.

        That is the one run of the app that it reaches, or else what was there before the first.
        """
        if service.ours:
            return None
        live = source.entry(service.run) if source and service.run else HistoryEntry()
        return HistoryEntry(selector=live.selector or self.narrow_selector(task, release, service))

    def narrow_selector(self, task: Task, release: Release, service: Service) -> dict[str, str]:
        """Return the selector that keeps a foreign Service on exactly today's pods."""
        pods = [Pod(p) for p in self.live.workloads.staying(task.namespace, service.selector)]
        labels = release.deployment["spec"]["template"]["metadata"]["labels"]
        selector = narrowed(service.selector, pods, labels) if service.selector else None
        if selector is None:
            call = f"kubectl -n {task.namespace}"
            patch = '{"spec":{"selector":{"version":"before"}}}'
            terms = selector_text(service.selector)
            commands = f"{call} label pods -l {terms} version=before && "
            commands += f"{call} patch service {task.app.service_name} -p '{patch}'"
            detail = f"its selector would also match the new pods; run: {commands}"
            raise StageError(Reason.ADOPTION_REFUSED, detail)
        return selector

    def history_at_claim(
        self, service: Service, source: Service | None, goal: HistoryEntry | None
    ) -> Object:
        """Return the annotations about the history that a claim writes; most often there are none.

        A Service that has lost its history gets it again. What stands there and was not made here
        is adopted: it is the first entry, and the rollback target.
        """
        if source and source.live_by_history.run and not service.history:
            return {ANNOTATION_HISTORY: source.history}
        older = [e for e in service.history if e.outcome != ADOPTED]
        if not goal or service.run or (older and not service.live):
            return {}
        adopted = replace(
            goal,
            outcome=ADOPTED,
            was=service.live.was or service.selector,
            ports=service.ports,
            at=self.doors.clock.now(),
        )
        return {ANNOTATION_HISTORY: [adopted, *older], ANNOTATION_PREVIOUS: goal.selector}

    def wider(self, task: Task, service: Service) -> HistoryEntry | None:
        """Return where a Service pointed before it was adopted, if it can have that again.

        Its owner goes on without us, and what he changes next may not fit a narrowed one. Raises
        HookError while it would reach pods of ours, too, that have not begun to end.
        """
        was = service.live.was
        if service.live.outcome != ADOPTED or not was or was == service.selector:
            return None
        ours = {LABEL_APP: task.app.name}
        terms = f"{selector_text(ours)},{LABEL_STAGE}!={COMPANION}"
        deployments = self.doors.kubectl.list("deployments", task.namespace, "-l", terms)
        if any(d["spec"].get("replicas", 1) for d in deployments):
            return None
        if self.live.workloads.staying(task.namespace, ours):
            raise NotNowError("the pods of the failed version are not gone yet")
        return HistoryEntry(selector=was)


class Claims:
    """Says on a live Service who is changing its environment; one at a time."""

    # Three races remain, and each has its answer:
    # Two claim at once. A claim compares and sets: the second meets another version of the Service.
    # One that has lost its claim goes on to write a Deployment. That write is a conflict: it has
    #   read the Deployment before it looked at its claim, and who took the claim over wrote first.
    # One that has lost its claim goes on to switch. That is a conflict, too: it has read the
    #   Service with the claim, and the switch compares and sets.

    def __init__(self, live: LiveServices, guard: SelectorGuard) -> None:
        self.live = live
        self.guard = guard
        self.foreign = ForeignService(live)
        self.doors = live.doors

    def new(self, run: str, colour: str, phase: Phase, restore: str = "") -> Claim:
        """Return a claim; its time tells it from that of another process."""
        since = round(self.doors.clock.now(), 3)
        return Claim(run=run, colour=colour, phase=str(phase), since=since, restore=restore)

    @partial(retried, while_head=True)
    def take(self, task: Task, release: Release) -> Service | None:
        """Claim the environment for a run; return the Service as claimed, None if there is none.

        The same patch remembers the release that stands in the idle colour if it is a rollback
        target, so that it can be restored, and narrows a foreign selector.
        """
        # in this order: who takes the claim after the first look makes the patch a conflict
        manifest, standing = self.doors.kubectl.get_each(
            task.namespace,
            f"service/{task.app.service_name}",
            f"deployment/{task.app.name}-{release.colour}",
        )
        service = self.live.service_of(task, manifest)
        require_service_of(service, task.app.name)
        self.live.require_accepted(task, service, release)
        if service is None:
            return None
        if colour_of(service.selector) == release.colour:
            raise SupersededError(Reason.CLAIM_LOST, "traffic was switched meanwhile")
        source = self.live.with_history(task, service)
        self.guard.require_order(task, service, source)
        self.require_no_rollback(task.app, service)
        restore = release_to_restore(service, release.colour, standing)
        claim = self.new(task.run.id, release.colour, Phase.PREPARING, restore)
        goal = self.foreign.narrower(task, release, service, source)
        history = self.foreign.history_at_claim(service, source, goal)
        annotations = {ANNOTATION_CLAIM: claim, **history}
        return self.live.write(task, service, annotations, goal)

    def require_no_rollback(self, app: App, service: Service) -> None:
        """Raise while a person rolls the environment back; such a claim is not for ever."""
        claim = service.claim
        fresh = abs(self.doors.clock.now() - claim.since) < rollback_seconds(app, service)
        if fresh and claim.phase == Phase.ROLLBACK:
            raise NotNowError("a rollback is under way")

    def check(self, task: Task, claimed: Service | None, now: Service | None) -> None:
        """Raise when someone else holds the claim now or has changed the live Service.

        What the claim on the Service says now, None being no Service, and what that does:

        the same; there never was a Service     nothing, if the selector is the same
        a rollback                              SupersededError: the run ends
        another claim of the same run           NotNowError: it is tried again
        a claim of another run                  SupersededError
        none, and the Service is a new one      NotNowError: it was deleted or made anew
        none, and the Service is the same one   SupersededError
        """
        if claimed is None and now is None:
            return
        if claimed and now and now.claim == claimed.claim:
            self.check_selector(task, claimed, now)
            return
        holder = now.claim.run if now else ""
        if now and now.claim.phase == Phase.ROLLBACK:
            raise SupersededError(Reason.CLAIM_LOST, "a person has called `rollback`")
        if holder == task.run.id:
            raise NotNowError("another process holds the claim for the same run")
        is_same_service = claimed and now and still_claimed(claimed, now)
        if not holder and not is_same_service:
            raise NotNowError("the live Service was deleted or made anew meanwhile")
        taker = holder or "someone else"
        raise SupersededError(Reason.CLAIM_LOST, f"{taker} has taken the claim")

    def check_selector(self, task: Task, claimed: Service, now: Service) -> None:
        """Raise when the live Service does not reach what it reached when it was claimed."""
        if now.selector == claimed.selector:
            return
        # what only asks for more, and still reaches the same pods, is as good
        pods = map(Pod, self.live.workloads.staying(task.namespace, now.selector))
        same = claimed.selector.items() <= now.selector.items()
        if not (same and claimed.run and runs_of(task.app.name, pods) == {claimed.run}):
            raise StageError(Reason.SELECTOR_CHANGED, self.live.last_manager(task))

    @retried
    def put(self, task: Task, claim: Claim, expected: Claim | None = None) -> Service | None:
        """Put a claim in the place of an expected one, or of any; an empty one drops it."""
        service = self.live.read(task)
        if service is None or (expected is not None and service.claim != expected):
            return service
        goal = None if claim else self.foreign.wider(task, service)
        return self.rewrite(task, service, claim, goal)

    @retried
    def widen(self, task: Task, expected: Claim) -> None:
        """Give a Service the selector again that it had before it was adopted, under its claim."""
        service = self.live.read(task)
        if service and service.claim == expected and (goal := self.foreign.wider(task, service)):
            self.rewrite(task, service, expected, goal)

    def rewrite(
        self, task: Task, service: Service, claim: Claim, goal: HistoryEntry | None
    ) -> Service:
        """Write a claim on the live Service, and where it points if that is another place."""
        annotations: Object = {ANNOTATION_CLAIM: claim}
        if goal:
            annotations[ANNOTATION_PREVIOUS] = None
            widened = replace(service.live, selector=goal.selector)
            annotations[ANNOTATION_HISTORY] = with_entry_replaced(
                service.history, service.live, widened
            )
        return self.live.write(task, service, annotations, goal)

    def idle_colour_and_size(self, task: Task) -> Placement:
        """Return the idle colour, and how large the live version is.

        Raises StageError where no colour can be used.
        """
        names = [f"{task.app.name}-{colour}" for colour in COLOURS]
        references = (f"service/{task.app.service_name}", *(f"deployment/{n}" for n in names))
        manifest, *deployments = self.doors.kubectl.get_each(task.namespace, *references)
        standing = dict(zip(COLOURS, deployments, strict=True))
        service = self.live.service_of(task, manifest)
        require_service_of(service, task.app.name)
        source = self.live.with_history(task, service)
        self.guard.require_order(task, service, source)
        selector = service.selector if service else {}
        pods = [*map(Pod, self.live.workloads.staying(task.namespace, selector))]
        live = live_colours(task.app, service, source, pods)
        sizes = [replicas_of(standing[colour]) for colour in live if standing[colour]]
        if service and not service.ours:
            sizes.append(len(pods))
        return Placement(idle_colour(task.app, standing, live), max(sizes, default=0))


def live_colours(
    app: App, service: Service | None, source: Service | None, pods: Iterable[Pod]
) -> Set[str]:
    """Return the colours that traffic reaches: by the selector, and by the pods that match it.

    A selector that a person wrote may reach both, or neither. Where there is no Service, it is the
    colour that was live last.
    """
    colours = {colour_of(p.labels) for p in pods if p.labels.get(LABEL_APP) == app.name}
    if service:
        colours.add(colour_of(service.selector))
    elif source:
        colours.add(source.live_by_history.colour)
    return colours & {*COLOURS}


def idle_colour(app: App, standing: Mapping[str, Object | None], live: Set[str]) -> str:
    """Return the first colour that is not live, and in which only what we have made may stand."""
    idle = [colour for colour in COLOURS if colour not in live]
    for colour in idle:
        spec = part_of(standing[colour] or {}, "spec")
        if not spec or is_colour_of(standing[colour], app.name):
            return colour
    if idle:
        require_colour_of(standing[idle[-1]], app.name)
    fault = "both colours serve; point the Service at one of them"
    raise StageError(Reason.ADOPTION_REFUSED, fault)


def require_colour_of(deployment: Object | None, app: str) -> None:
    """Raise StageError for a Deployment that is there and that this app has not made."""
    if deployment and not is_colour_of(deployment, app):
        raise foreign_error("Deployment", deployment, app)


def foreign_error(kind: str, item: Object, app: str) -> StageError:
    """Return the error that an object has a name that an app needs, and what to do about it."""
    owner = part_of(item, "metadata", "labels").get(LABEL_APP, app)
    whose = "was not made here" if owner == app else f"belongs to app {clip(str(owner), 40)}"
    words = f"{kind} {item['metadata']['name']} {whose}; delete or rename it"
    return StageError(Reason.ADOPTION_REFUSED, words)


def release_to_restore(service: Service, colour: str, standing: Object | None) -> str:
    """Return the release that is to be restored in a colour if the next run fails there.

    It is "" for none. The claim before may remember one, which its run has overwritten and nobody
    has restored yet. What stands in the colour tells:

    nothing, or a version that never served there  what is remembered
    the run of the claim before                    what is remembered
    a version that traffic was taken from          none: nobody goes back to it
    another version that has served                its own release
    """
    claim = service.claim
    remembered = claim.restore if claim.colour == colour else ""
    entry = service.entry(part_of(standing or {}, "metadata", "labels").get(LABEL_RUN, ""))
    has_served = entry.colour == colour
    has_overwritten = (claim.colour, claim.run) == (colour, entry.run)
    if not has_served or has_overwritten:
        return remembered
    return entry.release if entry.outcome in (Outcome.DEPLOYED, "") else ""


def still_claimed(claimed: Service, now: Service) -> bool:
    """Whether a Service is still the one that was claimed, with what was written on it."""
    return now.uid == claimed.uid and (bool(now.history) or not claimed.history)


def rollback_seconds(app: App, service: Service) -> float:
    """Return after how long the claim of a rollback counts as left by a dead process."""
    return CLAIM_SECONDS + rollout_seconds(
        app, max((e.replicas for e in service.history), default=1)
    )


class Traffic:
    """Moves traffic: forward to a new version, or back to the one before."""

    def __init__(self, guard: SelectorGuard, claims: Claims) -> None:
        self.guard = guard
        self.live = guard.live
        self.claims = claims
        self.doors = guard.doors
        self.workloads = guard.live.workloads

    @retried
    def switch(self, task: Task, release: Release, claimed: Service | None) -> None:
        """Point the live Service at a release in one compare-and-set patch, or make the first."""
        service = self.live.read(task)
        if service and service.run == release.run:
            return
        require_head(self.doors, task)
        self.claims.check(task, claimed, service)
        source = self.live.with_history(task, service)
        now = self.doors.clock.now()
        by = task.run.by if task.run.delivery == RERUN else ""
        entry = entry_of(release, task.app.name, now, by)
        before = source.history if source else []
        history = bounded_history([entry, *before], source.live if source else entry)
        claim = self.claims.new(release.run, release.colour, Phase.BAKING)
        annotations: Object = {ANNOTATION_HISTORY: history, ANNOTATION_CLAIM: claim}
        if task.last:
            annotations[ANNOTATION_BAKE] = round(now + task.app.deploy.bake, 3)
        if service:
            patch = self.live.patch_to(task, service, release)
            self.live.write(task, service, annotations, entry, patch)
            carried = RecordedFields(entry.release, ServiceFields.of(release.service))
            self.live.remembered.fields[task.labels] = carried
            return
        live = copy.deepcopy(release.service)
        live["metadata"]["annotations"] |= {k: annotation_text(v) for k, v in annotations.items()}
        self.doors.kubectl.put(live, None, task.namespace)

    def verify(self, task: Task, release: Release, since: float) -> None:
        """Wait for the endpoints of a switch; switch back, and raise, if they do not come."""
        if not self.endpoints_converge(task, release.selector, release.wanted, since):
            self.switch_back_for_endpoints(task, release)

    def switch_back_for_endpoints(self, task: Task, release: Release) -> NoReturn:
        """Switch back since endpoints did not come, unless there is nothing better to go back to.

        Raises StageError in both cases. A first version that has no ready pod serves nobody: its
        Service is removed.
        """
        wanted = release.wanted
        detail = f"the endpoints did not become the {wanted} pods of {release.run}"
        ready = len(self.workloads.ready(task.namespace, release.selector))
        versions = self.compare_versions(task, ask=False)
        better = PodHealth(ready, wanted).better_than(versions.previous)
        if better or (versions.target and not versions.previous.ready):
            raise StageError(Reason.BOTH_UNHEALTHY, f"{detail}; nothing better to go back to")
        self.switch_back(task, Outcome.FAILED, Reason.ENDPOINTS_MISSING, detail)

    def endpoints_converge(
        self, task: Task, selector: Mapping[str, str], wanted: int, since: float
    ) -> bool:
        """Wait until the ready endpoints are the wanted pods of the live selector; False if late.

        Only the time between looks that were answered counts. Endpoints that have not moved at all
        have longer, and what the cluster took away or replaced since a time is not waited for.
        """
        clock = self.doors.clock
        answered_seconds = 0.0
        limit = VERIFY_SECONDS
        looked = clock.monotonic()
        while answered_seconds < limit:
            with suppress(KubectlError):
                endpoints = self.workloads.endpoints(task, selector, wanted, since)
                if endpoints.converged:
                    return True
                limit = VERIFY_SECONDS if endpoints.reacted else UNMOVED_SECONDS
                answered_seconds += min(clock.monotonic() - looked, 1.0)
                wanted = min(wanted, self.workloads.size(task, selector))
            looked = clock.monotonic()
            with suppress(KubectlError):
                self.guard.require_selected(task, self.live.read(task))
            self.doors.pause(0.1)
        return False

    def switch_back_if_worse(self, task: Task, why: str, health: PodHealth | None) -> None:
        """Act on a version that looks unhealthy, by how it and the version before are doing.

        a larger share of the version before is healthy   switch back; StageError
        its health path failed, its own pods answer       return: the bake goes on
        else, and if there is no version before           traffic stays; StageError BothUnhealthy

        `health`: of the live version; None where its health path failed. Then the pods of both
        versions are asked one by one, and traffic may have failed on its way to them.
        """
        versions = self.compare_versions(task, ask=health is None)
        live = health or versions.live
        if versions.target and versions.previous.better_than(live):
            self.switch_back(task, Outcome.SWITCHED_BACK, Reason.UNHEALTHY_AFTER_SWITCH, why)
        pods_answer = live.ready if versions.target else live.ready == live.wanted > 0
        if health is None and pods_answer:
            return
        other = "the version before is no better" if versions.target else "there is none before"
        raise StageError(Reason.BOTH_UNHEALTHY, f"{why}; {other}")

    def switch_back_for_worker(self, task: Task, why: str) -> NoReturn:
        """Switch back from a version whose worker failed, where the version before has pods."""
        versions = self.compare_versions(task, ask=False)
        if versions.previous.ready:
            self.switch_back(task, Outcome.SWITCHED_BACK, Reason.WORKER_FAILED, why)
        other = (
            "the version before has no ready pods" if versions.target else "there is none before"
        )
        raise StageError(Reason.BOTH_UNHEALTHY, f"{why}; {other}")

    @retried
    def compare_versions(self, task: Task, *, ask: bool) -> Versions:
        """Return how healthy the version before is and, where pods are asked, the live one.

        By the word of the pods themselves, not of a Service.
        """
        service = self.live.read(task)
        target = service.switch_back_target if service else HistoryEntry()
        live = service.live if service and ask else HistoryEntry()
        with ThreadPoolExecutor(2) as at_once:
            previous = at_once.submit(self.measure, task, target, ask=ask)
            # it was asked all the time: what hangs now is not to delay the switch back
            current = at_once.submit(self.measure, task, live, ask=ask, patience=IMPATIENCE)
            return Versions(target, previous.result(), current.result())

    def measure(
        self, task: Task, entry: HistoryEntry, *, ask: bool, patience: float = PATIENCE
    ) -> PodHealth:
        """Return how healthy the pods of an entry are, and ask them as their release says."""
        if not ask:
            return self.workloads.health(task, entry, None)
        with ThreadPoolExecutor(1) as beside:
            spec = beside.submit(self.recorded_spec, task, entry)
            return self.workloads.health(task, entry, spec.result, patience)

    def recorded_spec(self, task: Task, entry: HistoryEntry) -> Object:
        """Return the spec of the pods of a release, before any service mesh; {} if it is gone."""
        with suppress(StageError):
            return self.live.release(task, entry.release).pod if entry.release else {}
        return {}

    def switch_back(self, task: Task, outcome: Outcome, reason: Reason, detail: str) -> NoReturn:
        """Point the live Service back at the version before, in one patch with the outcome.

        It does not look at the pods it leaves. Tried until it is done. Raises StageError then, and
        SupersededError when someone else has switched. Without a version before the Service is
        removed; callers have that done only where no pod is ready.
        """
        ended = Ended(str(outcome), str(reason), clip(detail))
        back = self.try_switch_back(task, ended)
        state = State.SWITCHED_BACK if back else State.REMOVED
        self.doors.report(task, state, reason=reason, detail=clip(detail))
        raise StageError(reason, detail)

    @retried
    def try_switch_back(self, task: Task, ended: Ended) -> bool:
        """Switch back if there is a version before; return whether this was done, now or before."""
        service = self.live.read(task)
        if service is None:  # deleted, perhaps by the try before
            return False
        entry = service.entry(task.run.id)
        if entry and Ended(entry.outcome, entry.reason, entry.detail) == ended:
            return True
        service = self.guard.require_selected_history(task, service)
        live = service.live
        target = service.switch_back_target
        if not target and service.annotation(ANNOTATION_PREVIOUS, {}):
            lost = f"{ended.detail}; the history does not say what was live before"
            raise StageError(Reason.BOTH_UNHEALTHY, lost)
        if not target:
            self.live.remove(task, service)
            return False
        annotations = {
            ANNOTATION_HISTORY: with_entry_replaced(service.history, live, ended.mark(live)),
            ANNOTATION_CLAIM: self.claims.new(task.run.id, live.colour, Phase.SWITCHED_BACK),
            ANNOTATION_BAKE: None,
        }
        patch = self.live.patch_back(task, service, target)
        self.live.go_back(task, service, annotations, target, patch)
        return True

    @retried
    def confirm(
        self,
        task: Task,
        release: Release,
        proof: Callable[[], bool] = lambda: True,
        *,
        unjudged: bool = False,
    ) -> bool:
        """Record that a version stays, and leave a claim by which the old one is drained.

        Each try of it asks for the proof that the version is healthy, after it has read what it is
        going to change; without it nothing is written, and the answer is False.
        """
        service = self.guard.read_selected(task)
        self.claims.require_no_rollback(task.app, service)
        live = service.live
        if live.outcome == Outcome.DEPLOYED:  # by a try whose answer was lost
            return True
        if not proof():
            return False
        old = service.switch_back_target.colour
        confirmed = replace(live, outcome=str(Outcome.DEPLOYED), unjudged=live.unjudged or unjudged)
        drained = old if old in COLOURS else ""
        drain = replace(self.claims.new(task.run.id, drained, Phase.DRAINING), since=live.at)
        annotations = {
            ANNOTATION_HISTORY: with_entry_replaced(service.history, live, confirmed),
            ANNOTATION_BAKE: None,
            ANNOTATION_CLAIM: drain if drain.colour or live.has_companions else None,
        }
        self.write_confirmed(task, service, release, annotations)
        return True

    def write_confirmed(
        self, task: Task, service: Service, release: Release, annotations: Object
    ) -> None:
        """Write that a version stays, and with it the fields that were not to be switched.

        Where the API server refuses these, it is reported: the version is healthy, and stays.
        """
        changes = confirmed_changes(service.spec, release.service["spec"])
        try:
            self.live.write(task, service, annotations, patch=ServiceFields(spec=changes))
        except KubectlError as refused:
            if refused.kind in UNCERTAIN or not changes:
                raise
            advice = f"Correct {', '.join(sorted(changes))} in the manifest, and push again."
            words = {"detail": refused.said, "advice": advice, **task.words}
            error("the live Service was not changed", **words)
            self.doors.kubectl.metrics.errors.labels("service").inc()
            self.live.write(task, service, annotations)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a version left the traffic, as its history entry records it."""

    outcome: str
    reason: str
    detail: str

    def mark(self, entry: HistoryEntry) -> HistoryEntry:
        """Return the entry of a version that left the traffic so."""
        return replace(entry, outcome=self.outcome, reason=self.reason, detail=self.detail)


@dataclass(frozen=True, slots=True)
class Versions:
    """The version before, to which traffic could go back, and how healthy both are."""

    target: HistoryEntry
    previous: PodHealth
    live: PodHealth  # empty where its pods were not asked


# === rollout ======================================================================================


class Rollout:
    """Brings a release into its colour, and finds out whether its pods are healthy there."""

    def __init__(self, claims: Claims, logs: LogTails) -> None:
        self.doors = claims.doors
        self.kubectl = claims.doors.kubectl
        self.live = claims.live
        self.claims = claims
        self.workloads = claims.live.workloads
        self.logs = logs

    @contextmanager
    def follow_pods(self, task: Task) -> Iterator[Informer[Pod]]:
        """Run an informer of an app's pods during the block, and keep their logs if it fails."""
        selector = f"{LABEL_APP}={task.app.name}"
        informer = Informer(self.kubectl, "pods", task.namespace, Pod, selector)
        thread = threading.Thread(target=informer.run, name=f"pods-{task.app.name}", daemon=True)
        thread.start()
        try:
            yield informer
        except StageError as ended:
            if ended.reason is not Reason.WORKER_FAILED:  # then they are those of the worker
                self.keep_logs(task, [p for p in informer.items() if p.run == task.run.id])
            raise
        finally:
            informer.stop()
            thread.join(KUBECTL_TIMEOUT)

    def keep_logs(self, task: Task, pods: Sequence[Pod]) -> None:
        """Keep the end of the logs of pods that may soon be gone; wait for that only a moment."""
        if task.app.deploy.log_tails:
            keep = partial(self.logs.keep, task.app.name, task.run.id, pods, task.namespace)
            self.logs.start(keep, LOG_PATIENCE)

    @partial(retried, while_head=True)
    def apply(self, task: Task, release: Release, claimed: Service | None) -> None:
        """Record a release, and put its Deployment in the place of what stands there.

        It is written against the version that was read before the look at the claim. Each write
        makes a newer version, by an annotation that differs. So the late write of a run that has
        lost its claim is a conflict, and changes nothing.
        """
        deployment = copy.deepcopy(release.deployment)
        deployment["metadata"]["annotations"][ANNOTATION_WRITTEN] = str(self.doors.clock.now())
        self.record(task, release)
        references = (
            f"deployment/{deployment['metadata']['name']}",
            f"service/{task.app.service_name}",
        )
        standing, manifest = self.kubectl.get_each(task.namespace, *references)
        self.claims.check(task, claimed, self.live.service_of(task, manifest))
        require_colour_of(standing, task.app.name)
        if standing and standing["spec"]["selector"] != deployment["spec"]["selector"]:
            # the label of the colour is another now, and a selector cannot be changed
            self.kubectl.delete_exactly("apis/apps/v1", "deployments", standing)
            standing = None
        self.kubectl.put(deployment, standing, task.namespace)

    def record(self, task: Task, release: Release) -> None:
        """Write a release and its copies of ConfigMaps; raises StageError for another's."""
        records = [*release.configmaps, release.configmap(task.app.name)]
        create_immutable(self.kubectl, records, task.namespace)

    def wait(self, task: Task, release: Release, pods: Informer[Pod]) -> None:
        """Wait for the pods of a release; raises StageError as soon as it is proven hopeless."""
        watch = RolloutWatch(self.doors, task, release, pods)
        try:
            self.wait_until_ready(task, release, watch)
        finally:
            watch.end()

    def wait_until_ready(self, task: Task, release: Release, watch: RolloutWatch) -> None:
        """Wait for the pods of a release, which a watch looks at."""
        clock = self.doors.clock
        name = release.deployment["metadata"]["name"]
        timeout = int(release.deployment["spec"]["progressDeadlineSeconds"])
        began = clock.monotonic()
        deadline = began + timeout
        settled = math.inf  # when the cluster must show what `rollout status` has said
        ready = 0
        while clock.monotonic() < min(deadline, settled):
            exit_code = self.follow_status(task, release, watch, deadline)
            # what it says is no proof: it is content with no replicas, and with another's pods
            deployment = self.kubectl.get("deployment", name, task.namespace) or {"metadata": {}}
            if (deployment["metadata"].get("labels") or {}).get(LABEL_RUN) != release.run:
                raise NotNowError(f"Deployment {name} was deleted or replaced meanwhile")
            ready = len(self.workloads.ready(task.namespace, release.selector))
            if rolled_out(deployment, ready):
                return
            settled = min(settled, clock.monotonic() + VERIFY_SECONDS)
            if exit_code != 0:  # it still waits, for a pod in the place of an evicted one, say
                settled = math.inf
            self.doors.pause(0.3)
        seconds = round(clock.monotonic() - began)
        raise watch.lateness(f"{ready} of {release.wanted} pods ready after {seconds} s")

    def follow_status(
        self, task: Task, release: Release, watch: RolloutWatch, deadline: float
    ) -> int | None:
        """Run `kubectl rollout status` to its end or for some time; return its exit code.

        Raises RunError for what the watch sees.
        """
        clock = self.doors.clock
        name = release.deployment["metadata"]["name"]
        until = min(deadline, clock.monotonic() + STATUS_SECONDS)
        seconds = max(1, math.ceil(until - clock.monotonic()))
        args = ("rollout", "status", f"deployment/{name}", f"--timeout={seconds}s")
        process = self.kubectl.stream(*args, namespace=task.namespace)
        try:
            # bounded, since a process whose complaints nobody reads may hang on them
            while process.poll() is None and clock.monotonic() < until:
                watch.look()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1.0)
                self.doors.pause(0)
        finally:
            process.kill()
            process.communicate()
        return process.returncode

    def smoke_test(
        self, task: Task, release: Release, pods: Informer[Pod], preview: HealthCheck
    ) -> HealthCheck:
        """Ask the new pods, and the preview Service, too; raises StageError SmokeFailed.

        The check of the preview Service that passed last is returned.
        """
        clock = self.doors.clock
        health = task.app.deploy.health
        check = release.checks(health).pods
        deadline = clock.monotonic() + health.timeout
        passed = 0
        while passed < health.successes:
            # the pods themselves first: the preview may lead to those before for a moment
            ready = self.workloads.ready(task.namespace, release.selector)
            own = at_pods(check, ready)
            refused = refusals_of(own, 2.0) if own else ["no pod is ready"]
            refusal = next(iter(refused), None) or health_refusal(preview)
            passed = 0 if refusal else passed + 1
            wanted = release.wanted
            if refusal:  # an autoscaler may have changed it
                wanted = min(wanted, self.workloads.size(task, release.selector))
            if refusal and len(ready) < wanted:
                # pods were taken away; the time until they are replaced does not count
                began = clock.monotonic()
                self.wait(task, release, pods)
                deadline += clock.monotonic() - began
            elif refusal and clock.monotonic() > deadline:
                raise StageError(Reason.SMOKE_FAILED, f"{check}: {refusal}")
            if refusal:  # someone may have deleted or changed it
                preview = self.preview(task, release)
            self.doors.pause(HEALTH_INTERVAL if refusal else 0.05)
        return preview

    @retried
    def preview(self, task: Task, release: Release) -> HealthCheck:
        """Point the preview Service at a release; return how it is asked about health."""
        return self.try_preview(task, release)

    def try_preview(self, task: Task, release: Release) -> HealthCheck:
        """Do that in one try; raises KubectlError where the API server does not answer."""
        name = f"{task.app.name}-preview"
        ports = ports_like(release.ports)
        service = self.kubectl.get("service", name, task.namespace)
        if service is None:
            labels = {LABEL_APP: task.app.name, LABEL_STAGE: "preview"}
            preview = new_object("Service", name, labels, {})
            preview["spec"] = {"ports": ports, "selector": release.selector}
            self.kubectl.create([preview], task.namespace)
            service = self.kubectl.get("service", name, task.namespace)
            if service is None:
                raise NotNowError("the preview Service was deleted this very moment")
        require_preview_of(service, task.app.name)
        if service["spec"].get("selector") != release.selector:
            selector = {**dict.fromkeys(service["spec"].get("selector") or {}), **release.selector}
            change = {"spec": {"selector": selector, "ports": ports}}
            service = self.kubectl.patch("service", name, task.namespace, change)
        check = release.checks(task.app.deploy.health).service
        return replace(check, host=service["spec"]["clusterIP"])

    @retried
    def require_own_preview(self, task: Task) -> None:
        """Raise StageError while the preview Service is someone else's, before a try is begun."""
        if service := self.kubectl.get("service", f"{task.app.name}-preview", task.namespace):
            require_preview_of(service, task.app.name)

    def restore(self, task: Task, name: str, service: Service) -> None:
        """Put the rollback target back into the idle colour that a failed deployment overwrote.

        From its release, never by `rollout undo`. Where no target stood, the Deployment goes. Tried
        once: what does not work is reported and counted, unless only the API server is away.
        """
        record = service.claim.restore
        try:
            if not record:
                return self.delete_overwritten(task, name, service)
            release = self.live.release(task, record)
            self.apply(task, release, service)
        except (StageError, KubectlError) as failed:
            if isinstance(failed, KubectlError) and failed.kind in ("Unreachable", "Conflict"):
                raise
            error("the rollback target was not restored", detail=str(failed), **task.words)
            self.kubectl.metrics.errors.labels("restore").inc()
            return None
        more = {"target": release.run, "colour": release.colour}
        return self.doors.report(task, State.RESTORED, more)

    def delete_overwritten(self, task: Task, name: str, service: Service) -> None:
        """Delete a Deployment that stands where none stood, while the claim for that is there.

        It is read before the claim, and deleted as it was read: who takes the claim over writes to
        it first.
        """
        deployment = self.kubectl.get("deployment", name, task.namespace)
        now = self.live.read(task)
        is_claimed = now is not None and now.claim == service.claim
        if deployment and is_claimed and is_colour_of(deployment, task.app.name):
            self.kubectl.delete_exactly("apis/apps/v1", "deployments", deployment)


def require_preview_of(service: Object, app: str) -> None:
    """Raise StageError for a preview Service that another has made, or that has no address."""
    if not is_made_for(service, app):
        raise foreign_error("Service", service, app)
    address = str(service["spec"].get("clusterIP"))
    if service["spec"].get("type") == "ExternalName" or not re.search(r"[.:]", address):
        words = f"Service {service['metadata']['name']} has no cluster IP"
        raise StageError(Reason.ADOPTION_REFUSED, f"{words}; delete it, and it is made anew")


def is_made_for(item: Object, app: str) -> bool:
    """Whether an object has our labels, as one of this app, and does not stand beside it."""
    labels = part_of(item, "metadata", "labels")
    ours = {LABEL_MANAGED: MANAGER, LABEL_APP: app}
    return ours.items() <= labels.items() and labels.get(LABEL_STAGE) != COMPANION


def creation_failure(deployment: Object) -> PodProblem | None:
    """Return why the pods of a Deployment cannot be created, as it says itself."""
    status = deployment.get("status") or {}
    failure = true_condition(status, "ReplicaFailure")
    # before that it speaks of what stood there
    generation = deployment["metadata"].get("generation", 0)
    if not failure or status.get("observedGeneration", 0) < generation:
        return None
    return creation_problem(str(failure.get("message")), deployment["metadata"]["name"])


class PodEvents:
    """Reads the Events of pods that are not ready, now and then."""

    def __init__(self, doors: Doors, namespace: str) -> None:
        self.kubectl = doors.kubectl
        self.namespace = namespace
        self.cooldown = Cooldown(doors.clock)
        # a rollout that takes no longer than usual costs no calls for this
        self.cooldown.start("events", LOOK_SECONDS)
        self.events: list[PodEvent] = []

    def of(self, pods: Iterable[Pod]) -> list[PodEvent]:
        """Return the Events of a pod that is not ready; an account may lack the right.

        One pod stands for all: those of one release wait for the same.
        """
        unexplained = sorted(pod.name for pod in pods if is_unexplained(pod))
        if unexplained and self.cooldown.allows("events"):
            self.cooldown.start("events", EVENTS_SECONDS)
            with suppress(KubectlError, *SHAPE_ERRORS):
                terms = (f"involvedObject.name={unexplained[0]}", "involvedObject.kind=Pod")
                self.events = read_events(self.kubectl, self.namespace, *terms)
        return self.events


class RolloutWatch:
    """Looks at the pods of a rollout: whether it is hopeless, and what it waits for meanwhile."""

    def __init__(self, doors: Doors, task: Task, release: Release, pods: Informer[Pod]) -> None:
        self.doors = doors
        self.kubectl = doors.kubectl
        self.task = task
        self.release = release
        self.informer = pods
        self.tracker = ProblemTracker()
        self.events = PodEvents(doors, task.namespace)
        self.cooldown = Cooldown(doors.clock)
        # a rollout that takes no longer than usual costs no calls for these
        self.cooldown.start("show", EVENTS_SECONDS)
        self.cooldown.start("head", HEAD_FRESH)
        self.holdup: PodProblem | None = None
        self.shown = ""
        self.asking: threading.Thread | None = None
        self.superseded: SupersededError | None = None

    def look(self) -> None:
        """Look once, and show what is waited for.

        Raises StageError for what cannot heal, and SupersededError where the branch has moved on.
        """
        problems = self.observe()
        if fatal := self.tracker.fatal(problems, self.doors.clock.monotonic()):
            raise StageError(fatal.reason, fatal.detail)
        self.show(self.holdup)
        if self.holdup:
            self.ask_for_head()
        if self.superseded:
            raise self.superseded

    def lateness(self, detail: str) -> StageError:
        """Return the end of a rollout whose time is over: it ends with what it waited for."""
        self.observe()
        if self.holdup and self.holdup.reason is not Reason.NEVER_READY:
            return StageError(self.holdup.reason, self.holdup.detail)
        if not (self.own_pods() or self.holdup):
            return StageError(Reason.PODS_NOT_CREATED, detail)
        words = f"{detail}; {self.holdup.detail}" if self.holdup else detail
        return StageError(Reason.NEVER_READY, words)

    def end(self) -> None:
        """Show no longer what is waited for."""
        if self.shown:
            self.write({ANNOTATION_REASON: None, ANNOTATION_DETAIL: None})

    def own_pods(self) -> list[Pod]:
        """Return the pods of the release."""
        return [pod for pod in self.informer.items() if pod.run == self.release.run]

    def observe(self) -> list[PodProblem]:
        """Return what is wrong with the pods, also with those that cannot be created."""
        pods = self.own_pods()
        events = self.events.of(pods)
        crashes = self.task.app.deploy.crashes
        problems: list[PodProblem] = []
        with suppress(KubectlError):
            problems += self.creation_problems()
        self.holdup = next(iter(problems), None) or holdup(pods, events, crashes)
        return problems + [q for pod in pods for q in pod_problems(pod, events, crashes)]

    def creation_problems(self) -> list[PodProblem]:
        """Return why pods cannot be created, as the Deployment says it; raises KubectlError."""
        name = self.release.deployment["metadata"]["name"]
        deployment = self.kubectl.get("deployment", name, self.task.namespace)
        failure = creation_failure(deployment) if deployment else None
        return [failure] if failure else []

    def show(self, problem: PodProblem | None) -> None:
        """Show what is waited for where `status` reads it, if the words have changed."""
        text = clip(self.doors.secrets.mask(problem.detail), WORDS_LENGTH) if problem else ""
        if text != self.shown and self.cooldown.allows("show"):
            self.cooldown.start("show", EVENTS_SECONDS)
            self.shown = text
            reason = str(problem.reason) if problem else None
            self.write({ANNOTATION_REASON: reason, ANNOTATION_DETAIL: text or None})

    def write(self, annotations: Mapping[str, str | None]) -> None:
        """Annotate the run's last Job; that this fails is no trouble of the rollout."""
        if job := self.task.job:
            with suppress(KubectlError):
                change: Object = {"metadata": {"annotations": annotations}}
                self.kubectl.patch("job", job.name, job.namespace, change)

    def ask_for_head(self) -> None:
        """Have git asked, now and then, whether the run is superseded: it may wait for long.

        In a thread of its own, since git may take its time.
        """
        asking = self.asking is not None and self.asking.is_alive()
        if self.task.run.ref and not asking and self.cooldown.allows("head"):
            self.cooldown.start("head", HEAD_FRESH)
            self.asking = threading.Thread(target=self.check_head, daemon=True)
            with suppress(RuntimeError):  # no more threads
                self.asking.start()

    def check_head(self) -> None:
        """Remember that the run is superseded, if git says so."""
        try:
            require_head(self.doors, self.task)
        except SupersededError as superseded:
            self.superseded = superseded
        except HookError:
            pass  # what git does not answer is asked again


# === companions ===================================================================================
# What stands beside an app in an environment, and follows its live version.

NO_KIND = re.compile(r'no matches for kind "([^"]+)" in version "([^"]+)"')
NO_VERB = re.compile(
    r'cannot ([a-z]+) resource "([^"]+)" in API group "([^"]*)" in the namespace "([^"]+)"'
)
NO_KIND_ADVICE = "Install its definition, or list it in deploy.ignore."
SAID = re.compile(r"(?m)^(?:Error from server|The .* is invalid|error: ).*$")
SETTLE_ROUNDS = 5  # in which the companions must come to what is wanted
# What an object may say that manages it, and still be nobody's but its owner's.
FREE_HANDS = ("", MANAGER, "kubectl", "kustomize")
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
REVISION = "deployment.kubernetes.io/revision"
POD_LABELS = ("spec", "template", "metadata", "labels")
SELECTED_LABELS = ("spec", "selector", "matchLabels")
EXTERNAL_FIELDS = (*CONFIRMED_FIELDS, "healthCheckNodePort", "allocateLoadBalancerNodePorts")


class Moment(IntEnum):
    """When something is done to a companion, in the order of a deployment."""

    BEFORE_THE_ROLLOUT = 0
    WITH_THE_SWITCH = 1
    WHEN_IT_IS_CONFIRMED = 2
    AFTER_THE_DRAIN = 3

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")


@dataclass(frozen=True, slots=True)
class Times:
    """When a companion is created, changed to what a version wants, and deleted if it wants none.

    What was created before and is gone again comes back when it would be changed.
    """

    created: Moment
    changed: Moment
    deleted: Moment = Moment.WHEN_IT_IS_CONFIRMED


# Before the switch a Deployment or a CronJob would start work of a version that is not live, and an
# autoscaler would scale one.
TIMES = {
    "Deployment": Times(Moment.WITH_THE_SWITCH, Moment.WITH_THE_SWITCH),
    AUTOSCALER: Times(Moment.WITH_THE_SWITCH, Moment.WITH_THE_SWITCH),
    "CronJob": Times(Moment.WHEN_IT_IS_CONFIRMED, Moment.WHEN_IT_IS_CONFIRMED),
    "Service": Times(Moment.BEFORE_THE_ROLLOUT, Moment.WITH_THE_SWITCH),
    BUDGET: Times(Moment.BEFORE_THE_ROLLOUT, Moment.WITH_THE_SWITCH, Moment.AFTER_THE_DRAIN),
}
OTHER_TIMES = Times(Moment.BEFORE_THE_ROLLOUT, Moment.WHEN_IT_IS_CONFIRMED)
# A budget of a colour counts the pods of its version alone: none of them ever serves without.
COLOUR_TIMES = replace(TIMES[BUDGET], changed=Moment.BEFORE_THE_ROLLOUT)


@dataclass(frozen=True, slots=True)
class Companion:
    """An object beside an app: as a version wants it, as it stands, and as it is recorded.

    What is not wanted, or not there, is empty, and then it is false.
    """

    identity: Identity
    wanted: Object
    standing: Object
    record: CompanionRecord | None

    def __str__(self) -> str:
        return "/".join(self.identity[1:])

    @property
    def differs(self) -> bool:
        """Whether what stands is not what is wanted."""
        if self.wanted and self.standing:
            return applied_last(self.standing) != self.wanted
        return bool(self.wanted or self.standing)

    def is_made_here(self, app: str) -> bool:
        """Whether exactly what stands is recorded, and carries our labels still."""
        return is_recorded(self.record, self.standing) and is_ours(self.standing, app)

    @property
    def times(self) -> Times:
        """When something is done to it."""
        _, kind, name = self.identity
        return TIMES.get(kind, OTHER_TIMES) if name == self.plain_name else COLOUR_TIMES

    @property
    def plain_name(self) -> str:
        """The name that it has in the manifests, without the colour of a budget."""
        _, kind, name = self.identity
        plain, _, colour = name.rpartition("-")
        return plain if kind == BUDGET and colour in COLOURS else name


@dataclass(frozen=True, slots=True)
class Standing:
    """What stands beside an app, by identity, and the live Service as it was read after that."""

    objects: dict[Identity, Object]
    service: Service | None
    unread: frozenset[Identity] = frozenset()  # what could not be read, so that nobody knows of it

    def companions(
        self, wanted: Iterable[Object], records: Mapping[Identity, CompanionRecord]
    ) -> list[Companion]:
        """Return what is wanted, then what else is recorded, but not what could not be read."""
        by_identity = kept_apart({identity_of(item): item for item in wanted}, self.objects)
        return [
            Companion(i, by_identity.get(i, {}), self.objects.get(i, {}), records.get(i))
            for i in dict.fromkeys([*by_identity, *records])
            if i not in self.unread
        ]


def kept_apart(
    wanted: Mapping[Identity, Object], standing: Mapping[Identity, Object]
) -> dict[Identity, Object]:
    """Return what is wanted so that workers and their Services select no pods of other apps.

    A label says whose pods they are. A worker that stands gets it with its next change, so that no
    pod restarts for it, and keeps its selector, which cannot be changed. A Service asks for the
    label once all pods have it, so that none is without its pods meanwhile.
    """
    apart = dict(wanted)
    workers = [i for i, item in wanted.items() if is_companion(item, "Deployment")]
    for identity in workers:
        apart[identity] = own_worker(wanted[identity], standing.get(identity, {}))
    for identity, item in wanted.items():
        if not is_companion(item, "Service"):
            continue
        aimed = [worker for worker in workers if is_aimed_at(item, wanted[worker])]
        there = standing.get(identity, {})
        labels = [part_of(apart[worker], *POD_LABELS) for worker in aimed]
        have_label = labels and all(LABEL_WORKER_OF in each for each in labels)
        if have_label and all(are_own_pods(standing.get(w, {}), there) for w in aimed):
            own = {LABEL_WORKER_OF: labels[0][LABEL_WORKER_OF]}
            selector = {**part_of(item, "spec", "selector"), **own}
            apart[identity] = {**item, "spec": {**item["spec"], "selector": selector}}
    return apart


def own_worker(worker: Object, standing: Object) -> Object:
    """Return a worker whose pods have the label of their app, if they change or have it already.

    One that is given back as it was before the app is not changed, unless it stands with a selector
    of ours.
    """
    app = part_of(standing, *SELECTED_LABELS).get(LABEL_WORKER_OF)
    own = {LABEL_WORKER_OF: app or part_of(worker, "metadata", "labels").get(LABEL_APP, "")}
    has_label = LABEL_WORKER_OF in part_of(standing, *POD_LABELS)
    same = standing and not has_label and worker_label(standing) == worker_label(worker)
    if same or not (worker_label(worker) or app):
        return worker
    spec = worker["spec"]
    meta = part_of(spec, "template", "metadata")
    labelled = {**meta, "labels": {**part_of(meta, "labels"), **own}}
    template = {**spec["template"], "metadata": labelled}
    selector = part_of(spec, "selector")
    # one that says nothing is for the API server to refuse
    says = part_of(selector, "matchLabels") or selector.get("matchExpressions")
    if says and (app or not standing):
        selector = {**selector, "matchLabels": {**part_of(selector, "matchLabels"), **own}}
        return {**worker, "spec": {**spec, "selector": selector, "template": template}}
    return {**worker, "spec": {**spec, "template": template}}


def are_own_pods(worker: Object, service: Object) -> bool:
    """Whether all pods that a Service leads to have the label of their app, or will have it.

    Once it asks for the label, each of them has it, also during a rollout. While no such worker
    stands, it may lead to the pods of one with another name.
    """
    asks = LABEL_WORKER_OF in part_of(service, "spec", "selector")
    if not worker:
        return asks or not service
    has_label = LABEL_WORKER_OF in part_of(worker, *POD_LABELS)
    return has_label and ((asks and is_aimed_at(service, worker)) or has_one_template(worker))


class Companions:
    """Brings the companions of an app to where its live version is; never what is not ours.

    What is to be is told by the live Service alone: its run, and whether that is confirmed. So each
    step can be taken again by anyone. An object is replaced only as it was read, and it was read
    before the Service: who has moved traffic since has changed it, or will.
    """

    def __init__(self, live: LiveServices) -> None:
        self.live = live
        self.doors = live.doors
        self.kubectl = live.doors.kubectl
        self.state = live.state
        self.adoption = Adoption(live)

    # Before the switch.

    @partial(retried, while_head=True)
    def require_accepted(self, task: Task, release: Release) -> None:
        """Raise unless the API server would take all companions of a release.

        Raises StageError for what is not ours, and ManifestError for what it refuses, or what it
        does not let this account do.
        """
        wanted = release.companions_for(task.app.name)
        if not wanted:
            return
        try:
            standing = self.look(task, records_of(task, [*wanted, *release.plain_budgets]))
            records = self.records(task)
            taken = self.adoption.takeable(task, standing, records)
            plain = [c for c in standing.companions(release.plain_budgets, records) if c.wanted]
            require_no_plain_budget(task, [c for c in plain if c.identity not in taken])
            standing = replace(standing, objects={**standing.objects, **taken})
            companions = [c for c in standing.companions(wanted, records) if c.wanted]
            require_writable(task, companions)
            due = [companion for companion in companions if companion.differs]
            carry_out(self.kubectl, task.namespace, due, "--dry-run=server")
        except KubectlError as refused:
            was_killed = refused.code is None or refused.code < 0
            # an API server that is still starting does not know its roles yet
            passing = was_killed or re.search(f"RBAC: |{PASSING_REFUSAL.pattern}", refused.message)
            if passing or refused.kind in UNCERTAIN:
                raise
            raise ManifestError(companion_faults(task, refused)) from refused

    @partial(retried, while_head=True)
    def prepare(self, task: Task, release: Release) -> None:
        """Record the companions of a release, and create those that may be there before its pods.

        Services lead to the pods of today until traffic is switched.
        """
        wanted = release.companions_for(task.app.name)
        if not wanted:
            return
        listed = records_of(task, [*wanted, *release.plain_budgets])
        standing = self.look(task, listed)
        if self.adoption.take(task, standing, self.records(task)):
            standing = self.look(task, listed)
        records = self.records(task)
        if new := [record for record in records_of(task, wanted) if record.identity not in records]:
            self.state.write(task.app, *new)
        self.remember(task, release.configmap(task.app.name)["metadata"]["name"], release)
        selector = standing.service.selector if standing.service else release.selector
        today = release.companions_for(task.app.name, selector)
        services = [item for item in today if is_companion(item, "Service")]
        first = Moment.BEFORE_THE_ROLLOUT
        companions = standing.companions([*wanted, *services], {})  # of one name the last counts
        early = [companion for companion in companions if companion.times.created is first]
        require_writable(task, early)
        if due := [c for c in early if c.differs and (not c.standing or c.times.changed is first)]:
            carry_out(self.kubectl, task.namespace, due)
            companions = self.look(task, listed).companions(wanted, self.records(task))
            self.record(task, [c for c in companions if c.wanted])

    def protect(self, task: Task, entry: HistoryEntry) -> None:
        """Create the budgets of a version that gets the traffic back, before it does.

        That this fails is reported, and holds nothing up.
        """
        try:
            wanted = self.wanted_by(task, entry) or []
            if budgets := [with_applied(o, o) for o in wanted if is_companion(o, BUDGET)]:
                self.kubectl.create(budgets, task.namespace)
        except (HookError, *SHAPE_ERRORS) as failed:
            self.complain(task, clip(str(failed)))

    # After it.

    @contextmanager
    def following(self, task: Task) -> Iterator[None]:
        """Follow in a thread during the block: nothing may hold up the judgement of a version."""
        over = threading.Event()
        thread = threading.Thread(target=self.follow_until, args=(task, over), daemon=True)
        try:
            with suppress(RuntimeError):  # no more threads: it is done after the block
                thread.start()
            yield
        finally:
            over.set()
            if thread.is_alive():
                thread.join(KUBECTL_TIMEOUT)

    def follow_until(self, task: Task, over: threading.Event) -> None:
        """Follow, and try again what does not work, until that is over or the program stops."""
        with suppress(InterruptedError):
            while not (self.follow(task) or over.wait(AGAIN_SECONDS)):
                self.doors.pause(0)

    def follow(
        self,
        task: Task,
        reached: Moment = Moment.WHEN_IT_IS_CONFIRMED,
        *,
        has_companions: bool = False,
    ) -> bool:
        """Bring the companions to where the live version is; return whether they are there.

        What does not work is reported and counted: the step that comes next tries it again, and
        traffic stays where it is. Where none is recorded no call is made, unless it is known that
        the live version has companions, or that the one before had some.
        """
        try:
            if has_companions or self.records(task):
                self.settle(task, reached)
        except (HookError, *SHAPE_ERRORS) as failed:
            self.complain(task, clip(str(failed)))
            return False
        return True

    @retried
    def settle(self, task: Task, reached: Moment) -> None:
        """Do what is due until nothing is left; raises HookError.

        It goes in rounds. Each reads what is recorded, then those objects, and the Service last,
        which alone tells what is wanted. What is wanted and not recorded yet was not read: a round
        records it, and the next one reads it. What a round has created the next one records with
        its uid.
        """
        for _ in range(SETTLE_ROUNDS):
            records = self.records(task)
            standing = self.look_at_readable(task, [*records.values()])
            service = standing.service
            wanted = self.wanted_by(task, service.live if service else None)
            if wanted is None:
                return
            is_confirmed = service is None or service.live.proven
            companions = standing.companions(wanted, records)
            # until a version is confirmed nothing is forgotten: the one before may come back
            self.record(task, [c for c in companions if c.wanted or is_confirmed])
            if any(companion.record is None for companion in companions):
                continue
            due = self.due(task, companions, reached if is_confirmed else Moment.WITH_THE_SWITCH)
            if not due:
                return
            self.create_configmaps(task, due)
            carry_out(self.kubectl, task.namespace, due)
        raise NotNowError("what stands beside the app is changed by someone else all the time")

    def wanted_by(self, task: Task, entry: HistoryEntry | None) -> list[Object] | None:
        """Return the companions of a version, or of no version; None where that is not recorded."""
        if entry is None:
            return None if self.live.with_history(task, None) else []
        if entry.outcome == ADOPTED:
            return self.adoption.given_back(task, entry)
        last = self.live.remembered.companions.get(task.labels)
        if last is None or last.record != entry.release:
            if not entry.release:
                return None
            release = self.live.release(task, entry.release)
            last = self.remember(task, entry.release, release)
        return last.objects

    def remember(self, task: Task, record: str, release: Release) -> RecordedCompanions:
        """Keep the companions of a release, for when it is live; return them."""
        objects = None if release.companions is None else release.companions_for(task.app.name)
        last = RecordedCompanions(record, objects, release.worker_configmaps)
        self.live.remembered.companions[task.labels] = last
        return last

    def due(self, task: Task, companions: Iterable[Companion], reached: Moment) -> list[Companion]:
        """Return to what something is to be done by now, and may be; report what is not ours."""
        due = []
        for companion in companions:
            times = companion.times
            if (times.changed if companion.wanted else times.deleted) > reached:
                continue
            if fault := writing_fault(task, companion):
                self.complain(task, str(fault))
            elif companion.differs and (companion.wanted or is_deletable(task, companion)):
                due.append(companion)
        return due

    def create_configmaps(self, task: Task, due: Iterable[Companion]) -> None:
        """Create what the pods of workers name, which may have been deleted since they ran last."""
        last = self.live.remembered.companions.get(task.labels)
        if last and last.configmaps and any(is_companion(c.wanted, "Deployment") for c in due):
            create_immutable(self.kubectl, last.configmaps, task.namespace)

    # What both use.

    def records(self, task: Task) -> dict[Identity, CompanionRecord]:
        """Return the companions that stand, or may, as they are recorded."""
        return self.state.recent(task.app).companions_in(task.environment)

    def look(self, task: Task, records: Iterable[CompanionRecord]) -> Standing:
        """Read companions, then the live Service, in one call; of two records the last counts."""
        live = CompanionRecord(environment="", api="v1", kind="Service", name=task.app.service_name)
        listed = {record.identity: record.reference for record in (*records, live)}
        items = self.kubectl.read([*listed.values()], task.namespace)
        objects = {identity_of(item): item for item in items}
        service = objects.pop(live.identity, None)
        return Standing(objects, self.live.service_of(task, service))

    def look_at_readable(self, task: Task, records: Sequence[CompanionRecord]) -> Standing:
        """Read companions; where one cannot be read, only those of the usual kinds."""
        try:
            return self.look(task, records)
        except KubectlError as failed:
            usual = [r for r in records if COMPANION_KINDS.get(r.kind) == r.api]
            if failed.kind in UNCERTAIN or len(usual) == len(records):
                raise
            self.complain(task, failed.said)
            unread = {r.identity for r in records} - {r.identity for r in usual}
            return replace(self.look(task, usual), unread=frozenset(unread))

    def complain(self, task: Task, detail: str) -> None:
        """Report and count what does not follow; the step that comes next tries it again."""
        error("what stands beside the app did not follow", detail=detail, **task.words)
        self.kubectl.metrics.errors.labels("companions").inc()

    def record(self, task: Task, companions: Iterable[Companion]) -> None:
        """Record what is wanted, with its uid once it is there; forget what is neither.

        It is written only where that is news, and before an object is created.
        """
        news = []
        forgotten = []
        for companion in companions:
            ours = is_ours(companion.standing, task.app.name)
            if companion.wanted:
                item = companion.standing if ours else companion.wanted
                record = CompanionRecord.of(task.environment, item)
                if companion.record is None or (ours and companion.record != record):
                    news.append(record)
            elif companion.record and not companion.standing:
                forgotten.append(companion.record.key)
        if news or forgotten:
            self.state.write(task.app, *news, forget=forgotten)


class Adoption:
    """Takes over what stands beside an app that ran here before its first deployment.

    What it was is kept in a ConfigMap, so that going back to that version restores it. Only what
    the commit names is taken over, and only while nothing says that somebody else has it.
    """

    def __init__(self, live: LiveServices) -> None:
        self.live = live
        self.doors = live.doors
        self.kubectl = live.doors.kubectl

    # What is taken over.

    def take(
        self, task: Task, standing: Standing, records: Mapping[Identity, CompanionRecord]
    ) -> bool:
        """Take over what may be, after it was kept as it was; return whether that was anything.

        Raises HookError.
        """
        taken = self.takeable(task, standing, records)
        if not taken:
            return False
        self.keep(task, [standing.objects[identity] for identity in taken])
        new = records_of(task, taken.values())
        self.live.state.write(task.app, *new)
        self.kubectl.write("replace", [*taken.values()], task.namespace)
        detail = clip(", ".join(sorted(map(str, new))))
        self.doors.report(task, State.ADOPTED, detail=detail)
        return True

    def takeable(
        self, task: Task, standing: Standing, records: Mapping[Identity, CompanionRecord]
    ) -> dict[Identity, Object]:
        """Return what is to be taken over, as it will be then; most often it is nothing.

        What is recorded by its uid was made here, or was taken over before.
        """
        taken = {
            identity: handed_over(item, task.app.name)
            for identity, item in standing.objects.items()
            if is_free(item, task.app.name) and not is_recorded(records.get(identity), item)
        }
        return taken if taken and self.is_due(task, standing.service) else {}

    def is_due(self, task: Task, service: Service | None) -> bool:
        """Whether what is live is what ran here before the first deployment."""
        if service is None:
            return False
        source = self.live.with_history(task, service)
        return source is None or source.live_by_history.outcome == ADOPTED

    # What is kept of it.

    def keep(self, task: Task, items: Iterable[Object]) -> None:
        """Write down what objects were, beside what is written down already."""
        current = self.kept(task)
        before = unpacked_objects(current) if current else []
        as_they_were = [as_it_was(item, task.app.name) for item in items]
        by_identity = {identity_of(item): item for item in (*before, *as_they_were)}
        labels = {LABEL_APP: task.app.name, LABEL_STAGE: ADOPTED}
        wanted = new_object("ConfigMap", adopted_name(task.app.name), labels, {})
        wanted["binaryData"] = {"objects": packed_json([*by_identity.values()])}
        if content_bytes(binaryData=wanted["binaryData"]) > CONFIGMAP_BYTES:
            refuse("What stands beside the app is too large to be taken over. Delete some of it.")
        self.kubectl.put(wanted, current, task.namespace)

    def kept(self, task: Task) -> Object | None:
        """Return the ConfigMap with what objects were; raises StageError if it is not ours."""
        name = adopted_name(task.app.name)
        configmap = self.kubectl.get("configmap", name, task.namespace)
        labels = part_of(configmap, "metadata", "labels")
        ours = {LABEL_APP: task.app.name, LABEL_STAGE: ADOPTED}
        if configmap is None or ours.items() <= labels.items():
            return configmap
        raise foreign_error("ConfigMap", configmap, task.app.name)

    # What is given back.

    def given_back(self, task: Task, adopted: HistoryEntry) -> list[Object] | None:
        """Return the companions of the version that was adopted; None where none was taken over.

        While the live Service has a narrower selector than it had, so have the others of its pods.
        """
        configmap = self.kept(task)
        if configmap is None:
            return None
        items = unpacked_objects(configmap)
        workers = [item for item in items if is_companion(item, "Deployment")]
        was = adopted.was
        narrower = {k: v for k, v in adopted.selector.items() if was and was.get(k) != v}
        for item in items:
            if is_companion(item, "Service") and not any(is_aimed_at(item, w) for w in workers):
                item["spec"]["selector"] = {**part_of(item, "spec", "selector"), **narrower}
        return items


def adopted_name(app: str) -> str:
    """Return the name of the ConfigMap with what stood beside an app before it was adopted."""
    return f"{app}-adopted"


def unpacked_objects(configmap: Object) -> list[Object]:
    """Return the objects that a ConfigMap keeps; raises StageError where they cannot be read."""
    try:
        return [dict(item) for item in unpacked_json(configmap["binaryData"]["objects"])]
    except (KeyError, TypeError, ValueError, zlib.error):
        refuse(f"ConfigMap {configmap['metadata']['name']} cannot be read.", INVALID)


def is_free(item: Object, app: str) -> bool:
    """Whether an object belongs to an app already, or to nobody: no app, no owner, no tool."""
    if is_ours(item, app):
        return True
    meta = item["metadata"]
    labels = part_of(item, "metadata", "labels")
    by_hand = labels.get(LABEL_MANAGED, "") in FREE_HANDS
    taken = LABEL_APP in labels or meta.get("ownerReferences") or meta.get("deletionTimestamp")
    return by_hand and not taken


def handed_over(item: Object, app: str) -> Object:
    """Return an object with our labels; what kubectl applied to it last counts as ours."""
    labels = {**part_of(item, "metadata", "labels"), **companion_labels(app)}
    annotations = part_of(item, "metadata", "annotations")
    before = annotations.get(ANNOTATION_APPLIED) or annotations.get(LAST_APPLIED)
    if before:
        annotations = {**annotations, ANNOTATION_APPLIED: before}
    meta = {**item["metadata"], "labels": labels}
    return {**item, "metadata": {**meta, "annotations": annotations} if before else meta}


def as_it_was(item: Object, app: str) -> Object:
    """Return an object as it can be written again, with our labels: it stays handed over."""
    annotations = {
        key: value
        for key, value in part_of(item, "metadata", "annotations").items()
        if key not in (LAST_APPLIED, ANNOTATION_APPLIED, REVISION)
    }
    meta = {
        "name": item["metadata"]["name"],
        "labels": {**part_of(item, "metadata", "labels"), **companion_labels(app)},
        **({"annotations": annotations} if annotations else {}),
    }
    return {**{key: value for key, value in item.items() if key != "status"}, "metadata": meta}


def carry_out(
    kubectl: Kubectl, namespace: str, companions: Sequence[Companion], *options: str
) -> None:
    """Bring companions to what is wanted, as many as can be; raises KubectlError after all."""
    replaced = [replacement(c.standing, c.wanted) for c in companions if c.wanted and c.standing]
    created = [with_applied(c.wanted, c.wanted) for c in companions if not c.standing]
    written = {"replace": replaced, "create": created}
    calls = [partial(kubectl.write, v, o, namespace, *options) for v, o in written.items() if o]
    calls += [partial(delete_companion, kubectl, c.standing) for c in companions if not c.wanted]
    failures: list[KubectlError] = []
    for call in calls:
        try:
            call()
        except KubectlError as failed:
            failures.append(failed)
    # one that passes by itself makes the caller look again
    if failures:
        raise min(failures, key=lambda failure: failure.kind not in UNCERTAIN)


def delete_companion(kubectl: Kubectl, item: Object) -> None:
    """Delete exactly what was read; the Jobs of a CronJob run to their end."""
    version = str(item["apiVersion"])
    api = f"apis/{version}" if "/" in version else f"api/{version}"
    policy = "Orphan" if is_companion(item, "CronJob") else "Background"
    try:
        resource = kubectl.plural(api, item["kind"])
        kubectl.delete_exactly(api, resource, item, policy)
    except KubectlError as failed:
        if failed.kind != "NotFound":
            raise


# A worker's own faults, beside those that are verdicts: an image that cannot be pulled.
WORKER_FAULTS = (Reason.IMAGE_NOT_FOUND, Reason.IMAGE_PULL_FAILED)
CLOCK_SECONDS = 30.0  # by which the clock of the cluster may be behind ours


class WorkerWatch:
    """Looks at the workers of a version that has the traffic.

    Only their pods that were created since the switch count: what a version has left as it was is
    no reason to switch back from it.
    """

    def __init__(self, doors: Doors, task: Task, release: Release) -> None:
        self.kubectl = doors.kubectl
        self.clock = doors.clock
        self.task = task
        self.workers = release.workers
        self.tracker = ProblemTracker()
        self.events = PodEvents(doors, task.namespace)
        self.pods: list[Pod] = []

    def look(self, since: float) -> WorkersSeen:
        """Return how they are since a switch; raises KubectlError."""
        if not self.workers:
            return WorkersSeen()
        crashes = self.task.app.deploy.crashes
        names = (f"deployment/{worker['metadata']['name']}" for worker in self.workers)
        deployments = self.kubectl.get_each(self.task.namespace, *names)
        labels = ",".join(worker_label(worker) for worker in self.workers)
        terms = f"{LABEL_WORKER} in ({labels})"
        pods = map(Pod, self.kubectl.list("pods", self.task.namespace, "-l", terms))
        self.pods = [pod for pod in pods if pod.created >= since - CLOCK_SECONDS]
        events = self.events.of(self.pods)
        created = [d for d in deployments if d]
        problems = [*filter(None, map(creation_failure, created))]
        # a worker has no readiness probe as a rule: it is ready as soon as it runs
        look = partial(pod_problems, events=events, crashes=crashes, ready_counts=False)
        problems += [problem for pod in self.pods for problem in look(pod)]
        own = [q for q in problems if q.reason.is_verdict or q.reason in WORKER_FAULTS]
        fatal = self.tracker.fatal(own, self.clock.monotonic())
        late = [
            worker["metadata"]["name"]
            for worker, deployment in zip(self.workers, deployments, strict=True)
            if not is_worker_ready(worker, deployment)
        ]
        holding = next(iter(problems), None) or holdup(self.pods, events, crashes)
        waits = f"workers are not ready: {', '.join(late)}" if late else ""
        waits += f"; {holding.detail}" if waits and holding else ""
        failed = f"worker: {fatal.reason}: {fatal.detail}" if fatal else ""
        never_ready = bool(late and holding and holding.reason is Reason.NEVER_READY)
        return WorkersSeen(waits, failed, never_ready)


def is_worker_ready(worker: Object, deployment: Object | None) -> bool:
    """Whether the Deployment of a worker has only pods of this template, and all are ready."""
    if deployment is None or worker_label(deployment) != worker_label(worker):
        return False
    return has_one_template(deployment)


def has_one_template(deployment: Object) -> bool:
    """Whether a Deployment has only pods of its present template, all that it wants, and ready."""
    status = deployment.get("status") or {}
    wanted = replicas_of(deployment)
    counts = ("updatedReplicas", "availableReplicas", "replicas")
    current = status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0)
    return bool(current and {status.get(key) or 0 for key in counts} == {wanted})


def records_of(task: Task, items: Iterable[Object]) -> list[CompanionRecord]:
    """Return the records of objects of an environment."""
    return [CompanionRecord.of(task.environment, item) for item in items]


def is_recorded(record: CompanionRecord | None, item: Object) -> bool:
    """Whether exactly this object is recorded, as made here or taken over."""
    return record is not None and record.uid == item["metadata"].get("uid")


def is_ours(item: Object, app: str) -> bool:
    """Whether an object carries our labels, as what stands beside this app."""
    return companion_labels(app).items() <= part_of(item, "metadata", "labels").items()


def is_deletable(task: Task, companion: Companion) -> bool:
    """Whether a companion may be deleted: only what was made here may.

    What the settings leave to others stays, and so does a claim, whatever it holds.
    """
    _, kind, _ = companion.identity
    ignored = task.app.deploy.ignores(kind, companion.plain_name)
    is_going = companion.standing["metadata"].get("deletionTimestamp")
    if ignored or is_going or kind == "PersistentVolumeClaim":
        return False
    if companion.is_made_here(task.app.name):
        return True
    detail = f"{companion} stays: it is not what was made here"
    warn("what stands beside the app stays", detail=detail, **task.words)
    return False


def require_writable(task: Task, companions: Iterable[Companion]) -> None:
    """Raise the first HookError for what is there and may not be changed."""
    for fault in filter(None, (writing_fault(task, companion) for companion in companions)):
        raise fault


def writing_fault(task: Task, companion: Companion) -> HookError | None:
    """Return why a companion that is wanted and there may not be changed, None where it may."""
    if not (companion.wanted and companion.standing):
        return None
    if not is_ours(companion.standing, task.app.name):
        return StageError(Reason.ADOPTION_REFUSED, foreign_words(task, companion))
    if companion.standing["metadata"].get("deletionTimestamp"):
        return HookError(f"{companion} is still being deleted")
    return None


def foreign_words(task: Task, companion: Companion) -> str:
    """Return why an object is not changed, and how its owner can hand it over."""
    owner = part_of(companion.standing, "metadata", "labels").get(LABEL_APP)
    if owner and owner != task.app.name:
        return f"{companion} belongs to app {clip(str(owner), 40)}; rename one of the two"
    terms = " ".join(f"{k}={v}" for k, v in companion_labels(task.app.name).items())
    command = f"kubectl -n {task.namespace} label --overwrite {companion} {terms}"
    advice = f"delete or rename it, or hand it over: {command}"
    return f"{companion} is there without our labels; {advice}"


def require_no_plain_budget(task: Task, plain: Iterable[Companion]) -> None:
    """Raise StageError where a budget of both colours stands: it would forbid every eviction."""
    for budget in plain:
        if budget.standing and not budget.is_made_here(task.app.name):
            name = budget.identity[2]
            each = " and ".join(f"{name}-{colour}" for colour in COLOURS)
            detail = f"{budget} would count the pods of both colours; delete it: {each} replace it"
            raise StageError(Reason.ADOPTION_REFUSED, detail)


def companion_faults(task: Task, refused: KubectlError) -> list[Fault]:
    """Return what the API server says against what stands beside an app, with what to do."""
    text = refused.stderr
    faults = [
        Fault(f"The cluster has no {kind} of {version}. {NO_KIND_ADVICE}")
        for kind, version in NO_KIND.findall(text)
    ]
    for verb, plural, group, namespace in NO_VERB.findall(text):
        where = f"{plural}{'.' if group else ''}{group}"
        role = f"Role {task.environment}-deployer of namespace {namespace}"
        faults.append(Fault(f"{role} lacks the verb {verb} for {where}. Add it, and use `rerun`."))
    if not faults:
        faults = [Fault(line, INVALID) for line in SAID.findall(text)]
    return [*dict.fromkeys(faults)] or [Fault(refused.said, INVALID)]


def applied_last(current: Object) -> Object:
    """Return what was written last of an object."""
    with suppress(ValueError, RecursionError):
        text = part_of(current, "metadata", "annotations").get(ANNOTATION_APPLIED)
        value = json.loads(text) if isinstance(text, str) else {}
        return value if isinstance(value, dict) else {}
    return {}


def with_applied(item: Object, wanted: Object) -> Object:
    """Return an object on which it is written down what of it is ours.

    `kubectl replace` would change the annotation that `kubectl apply` has for that.
    """
    meta = item["metadata"]
    annotations = {**(meta.get("annotations") or {}), ANNOTATION_APPLIED: json.dumps(wanted)}
    return {**item, "metadata": {**meta, "annotations": annotations}}


def replacement(current: Object, wanted: Object) -> Object:
    """Return an object as replacing it writes it.

    What others have written stays; what was applied last and is not wanted any more goes.
    """
    item = with_applied(three_way(current, applied_last(current), wanted), wanted)
    if is_companion(item, "Service"):
        spec = item["spec"]
        external = spec.get("type") in EXTERNAL_TYPES
        live = current["spec"].get("ports") or () if external else ()
        ports = ports_like(spec.get("ports") or (), live, external=external)
        asked = part_of(wanted, "spec")
        dropped = () if external else [k for k in EXTERNAL_FIELDS if k not in asked]
        item["spec"] = {k: v for k, v in spec.items() if k not in dropped} | {"ports": ports}
    return item


def three_way(current: Object, before: Object, wanted: Object) -> Object:
    """Return a mapping with what is wanted, and without what only was wanted before."""
    merged = {k: v for k, v in current.items() if k in wanted or k not in before}
    for key, value in wanted.items():
        parts = (part_of(current, key), part_of(before, key))
        merged[key] = three_way(*parts, value) if isinstance(value, dict) else value
    return merged


class Operations:
    """Everything that reads and changes environments, through one set of doors."""

    def __init__(self, doors: Doors, state: StateStore, remembered: Remembered) -> None:
        self.doors = doors
        self.live = LiveServices(doors, state, remembered)
        self.workloads = self.live.workloads
        self.guard = SelectorGuard(self.live)
        self.claims = Claims(self.live, self.guard)
        self.traffic = Traffic(self.guard, self.claims)
        self.rollout = Rollout(self.claims, LogTails(doors.kubectl, doors.secrets, doors.clock))
        self.companions = Companions(self.live)


@dataclass(frozen=True, slots=True)
class Selecting:
    """An object of an app that selects pods, and by which selectors."""

    item: Object
    owner: str
    selectors: list[Object]

    def __str__(self) -> str:
        return f"{object_words(self.item)} of app {clip(self.owner, 40)}"

    def reaches(self, other: Object) -> bool:
        """Whether it selects the pods that another object makes."""
        templates = (part_of(other, "spec", *path) for path in TEMPLATES)
        labels = [part_of(template, "metadata", "labels") for template in templates]
        return any(selects(s, each) for s in self.selectors for each in labels)


class PodLabels:
    """Keeps the pods of an app from being selected by what others have, if that asks for no app.

    A live Service that was not deployed from here yet selects as someone has written it, and does
    so again when it is given back. A worker that stood before keeps the selector that it had.
    """

    def __init__(self, doors: Doors) -> None:
        self.doors = doors
        self.kubectl = doors.kubectl

    @partial(retried, while_head=True)
    def require_apart(self, task: Task, release: Release, others: Sequence[App]) -> None:
        """Raise ManifestError where something of another app selects the pods of a release.

        What cannot be read of others, as it is too large, holds up nobody: it is not compared, and
        that is logged. Raises KubectlError where kubectl fails for any other reason.
        """
        selecting = [one for other in others for one in self.live_service(task, other)]
        selecting += self.workers(task) if others else []
        advice = "Give these pods other labels."
        faults = [
            Fault(f"{object_words(item)}: {other} selects its pods. {advice}")
            for other in selecting
            for item in (release.deployment, *(release.companions or ()))
            if other.reaches(item)
        ]
        if faults:
            raise ManifestError(faults)

    def live_service(self, task: Task, other: App) -> list[Selecting]:
        """Return the live Service of another app, with what it selected before its adoption."""
        item: Object | None = None
        with self.uncompared(task):
            item = self.kubectl.get("service", other.service_name, task.namespace)
        if item is None:
            return []
        service = Service(item)
        adopted = [entry for entry in service.history if entry.outcome == ADOPTED]
        before = (s for entry in adopted for s in (entry.selector, entry.was))
        selectors = [{"matchLabels": s} for s in (service.selector, *before)]
        return [Selecting(item, other.name, selectors)]

    def workers(self, task: Task) -> list[Selecting]:
        """Return the workers of other apps, which may be scaled by what their selector reaches."""
        address = list_address("deployments", task.namespace, f"{LABEL_APP}!={task.app.name}")
        workers = []
        with self.uncompared(task):
            for page in self.kubectl.pages(address, task.namespace):
                for item in page["items"]:
                    owner = part_of(item, "metadata", "labels").get(LABEL_APP)
                    if owner and LABEL_WORKER_OF not in part_of(item, *SELECTED_LABELS):
                        chosen = part_of(item, "spec", "selector")
                        workers.append(Selecting(item, str(owner), [chosen]))
        return workers

    @contextmanager
    def uncompared(self, task: Task) -> Iterator[None]:
        """Go on after the block where what others have is too large to be read, and log that."""
        try:
            yield
        except KubectlError as failed:
            if failed.code != -signal.SIGXFSZ:
                raise
            warn("pods are not compared with others", detail=failed.said, **task.words)


# === bake =========================================================================================


class Bake:
    """Watches a switched-to version until it is confirmed, or switches back.

    The worker alone judges, by `judgement`, and moves traffic. Nothing holds it up: the checker
    asks for health, and the observer asks the API server, and writes the confirmation when the
    worker's `verdict` is that. Each of the two puts immutable values into one slot, `checks` and
    `look`, which nobody else writes. `watch` is the observer's, too, and `lost_answers` locks; all
    else is the worker's.
    """

    def __init__(
        self,
        steady: Operations,
        urgent: Operations,
        task: Task,
        release: Release,
        pods: Informer[Pod],
    ) -> None:
        self.steady = steady
        self.urgent = urgent
        self.clock = steady.doors.clock
        self.task = task
        self.release = release
        self.informer = pods
        self.settings = task.app.deploy
        self.watch = WorkerWatch(urgent.doors, task, release)
        self.lost_answers = Retry(self.clock, (0.5,), report_every=60)
        self.over = threading.Event()
        self.switched_at = 0.0  # when traffic was switched, by the clock of the cluster
        self.judging_since = self.clock.monotonic()
        self.judged_seconds_needed = self.settings.bake if task.last else 0.0
        self.gave_up = ""  # judging it, with what was seen then
        self.excused = 0  # so many of the first checks, whose failures do not count
        self.tracker = ProblemTracker()
        self.verdict = Verdict.WATCH
        self.checks = HealthChecks()
        self.look = BakeLook(
            read_at=-NEVER if pods.trouble else self.judging_since,
            pods=tuple(self.informed()),
            wanted=release.wanted,
            workers=WorkersSeen(waits="nobody has looked yet" if release.workers else ""),
        )

    def run(self, service: Service, preview: HealthCheck | None) -> None:
        """Return when the version is confirmed; raises RunError when it is not going to be.

        `preview`: whom to ask for health from the start; None where another process has switched to
        the version. Then nobody is asked before the preview Service was looked for.
        """
        self.look = replace(self.look, preview=preview)
        rest = seconds_of(service.annotation(ANNOTATION_BAKE, 0.0)) - self.clock.now()
        if preview is None:  # nobody knows what was judged before this process
            self.judged_seconds_needed = min(self.judged_seconds_needed, max(rest, REBAKE_SECONDS))
        self.switched_at = service.live.at
        steps = (self.check_health, self.observe_cluster)
        threads = [threading.Thread(target=step, daemon=True) for step in steps]
        try:
            for thread in threads:
                thread.start()
            while self.verdict is not Verdict.STAYS:
                self.attempt(self.judge)
                if not all(thread.is_alive() for thread in threads):
                    raise self.look.end or HookError("a thread of the bake has ended")
                self.steady.doors.pause(0.1)
        except StageError as ended:
            # one that was confirmed too late stays, too, where nothing is better
            if self.look.confirmed_at is None or ended.reason is not Reason.BOTH_UNHEALTHY:
                raise
        finally:
            self.over.set()
        if self.gave_up:
            self.steady.doors.report(self.task, State.UNJUDGED, detail=self.gave_up)

    # The first thread: health.

    def check_health(self) -> None:
        """Ask for health, at most four times a second, until the bake is over."""
        took = 0.0
        while not self.over.wait(max(0.0, HEALTH_INTERVAL - took)):
            began_at = self.clock.monotonic()
            with suppress(OSError):  # no more files: nothing was learned
                if preview := self.look.preview:
                    refusal = health_refusal(preview)
                    refusal = refusal or refusal_of_a_pod(self.look, self.checks.asked)
                    now = self.clock.monotonic()
                    look = self.look
                    clear = look.is_complete(now) and not look.workers.waits
                    self.checks = self.checks.after(now, refusal, clear=clear)
            took = self.clock.monotonic() - began_at

    # The second thread: the API server.

    def observe_cluster(self) -> None:
        """Look at what the API server says, and confirm the version when it is proven."""
        try:
            while not self.over.is_set():
                if self.attempt(self.observe):
                    # at its end the bake waits for no look
                    rest = self.judged_seconds_needed - self.checks.judged_seconds
                    self.over.wait(min(LOOK_SECONDS, max(0.5, rest)))
        except RunError as ended:
            self.look = replace(self.look, end=ended)
        except InterruptedError:
            return

    def observe(self) -> None:
        """See the preview Service and the endpoints come, then look at pods and workers."""
        if self.look.endpoints_came is None:
            release = self.release
            # again, since someone may have changed it after the smoke test
            preview = self.urgent.rollout.preview(self.task, release)
            self.look = replace(self.look, preview=preview)
            converge = self.urgent.traffic.endpoints_converge
            came = converge(self.task, release.selector, release.wanted, self.switched_at)
            self.look = replace(self.look, endpoints_came=came)
        self.read_pods()
        self.attempt(self.read_workers)  # without it the version can still be given up, and stay
        doubted = self.excused and self.checks.failures
        if doubted and self.look.is_complete(self.clock.monotonic()):
            self.attempt(self.repair_preview)
        if self.verdict is Verdict.CONFIRM:
            confirm = self.steady.traffic.confirm
            if confirm(self.task, self.release, self.proof, unjudged=bool(self.gave_up)):
                self.read_pods()  # for those that failed while it was written
                self.look = replace(self.look, confirmed_at=self.clock.monotonic())

    def read_pods(self) -> None:
        """Read the live Service and the pods, whatever the informer shows."""
        began_at = self.clock.monotonic()
        selector = self.release.selector
        self.urgent.guard.require_selected(self.task, self.urgent.live.read(self.task))
        wanted = self.urgent.workloads.size(self.task, selector)
        manifests = self.urgent.workloads.staying(self.task.namespace, selector)
        served = [p for p in manifests if Pod(p).seen_ready]
        checks = tuple(at_pods(self.release.checks(self.settings.health).pods, served))
        pods = tuple(map(Pod, manifests))
        self.look = replace(self.look, read_at=began_at, pods=pods, wanted=wanted, checks=checks)

    def read_workers(self) -> None:
        """See how the workers of the version are."""
        self.look = replace(self.look, workers=self.watch.look(self.switched_at))

    def repair_preview(self) -> None:
        """Make the preview Service again, or point it again: the checks through it alone fail."""
        try:
            preview = self.urgent.rollout.try_preview(self.task, self.release)
        except StageError as foreign:  # no reason to end the bake
            raise HookError(str(foreign)) from foreign
        self.look = replace(self.look, preview=preview)

    def proof(self) -> bool:
        """Whether the version may be confirmed now: its endpoints are there, and it is healthy."""
        endpoints = self.urgent.workloads.endpoints(
            self.task, self.release.selector, self.look.wanted, self.switched_at
        )
        provable = self.healthy() and (self.gave_up or not self.look.workers.waits)
        proven = bool(provable and endpoints.converged and not self.over.is_set())
        self.look = replace(self.look, proved_at=self.clock.monotonic() if proven else None)
        return proven

    # The worker: the verdict.

    def judge(self) -> None:
        """Judge what was seen until now, and act on it."""
        judged = judgement(self.observation())
        self.verdict = judged.verdict
        why = judged.why
        traffic = self.urgent.traffic
        match self.verdict:
            case Verdict.WORKER_FAILED:
                self.switch_back_for_worker(why)
            case Verdict.CHECKS_FAILED:
                self.doubt_checks(f"{self.release.checks(self.settings.health).pods} {why}")
            case Verdict.PODS_FAILED:
                traffic.switch_back_if_worse(self.task, why, self.pod_health())
            case Verdict.ENDPOINTS_MISSING:
                traffic.switch_back_for_endpoints(self.task, self.release)
            case Verdict.UNJUDGEABLE:
                self.give_up_judging(why)

    def observation(self) -> BakeObservation:
        """Return what is seen of the version by now."""
        look = self.look
        pods = self.newest_pods(look)
        crash = container_failure([*pods, *self.informed()], self.switched_at)
        now = self.clock.monotonic()
        judged_seconds = min(self.checks.judged_seconds, self.judged_seconds_needed)
        return BakeObservation(
            settings=self.settings,
            now=now,
            look=look,
            checks=self.checks,
            excused=self.excused,
            pods_fault=crash or self.lasting_shortage(look, pods),
            healthy=self.healthy(),
            judged_seconds_needed=self.judged_seconds_needed,
            unjudged_seconds=now - self.judging_since - judged_seconds,
            gave_up=bool(self.gave_up),
        )

    def newest_pods(self, look: BakeLook) -> list[Pod]:
        """Return the pods last read, each as the informer has it where that is newer."""
        informed = self.informed()
        if not look.is_fresh(self.clock.monotonic()):
            return informed
        newer = {p.name: p for p in informed}
        return [max(p, newer.get(p.name, p), key=lambda pod: pod.version) for p in look.pods]

    def lasting_shortage(self, look: BakeLook, pods: Sequence[Pod]) -> str:
        """Return that too few pods have been ready for too long, or ""."""
        now = self.clock.monotonic()
        replacing = bool(look.pods)
        lacks = readiness_shortage(pods, self.switched_at, self.clock.now(), replacing=replacing)
        # what nobody has seen lately may be over by now
        unseen = not look.is_fresh(now) and (self.informer.trouble or not pods)
        fatal = self.tracker.fatal([lacks] if lacks and not unseen else [], now)
        return fatal.detail if fatal else ""

    def switch_back_for_worker(self, why: str) -> NoReturn:
        """Switch back for the fault of a worker, whose log is kept."""
        self.steady.rollout.keep_logs(self.task, self.watch.pods)
        self.urgent.traffic.switch_back_for_worker(self.task, why)

    def doubt_checks(self, why: str) -> None:
        """Switch back for failed checks, unless as many of its own pods answer after all.

        While a pod is taken away, the failed checks may have been its own. Then, unless another pod
        refuses as well, nothing is decided yet: they count as one less than enough, so that the
        next one that fails raises the same doubt.
        """
        look = self.look
        now = self.clock.monotonic()
        none_is_taken_away = look.is_complete(now)
        nobody_knows = not look.is_fresh(now)
        if none_is_taken_away or nobody_knows or refusals_of(look.checks, IMPATIENCE):
            self.excused = self.checks.asked
            self.urgent.traffic.switch_back_if_worse(self.task, why, None)
        else:
            self.excused = self.checks.asked - (self.settings.health.failures - 1)

    def pod_health(self) -> PodHealth:
        """Return how many pods are healthy by their own word."""
        pods = self.newest_pods(self.look)
        healthy = sum(p.ready and not container_failure([p], self.switched_at) for p in pods)
        return PodHealth(healthy, max(self.look.wanted, sum(p.stays for p in pods)))

    def give_up_judging(self, why: str) -> None:
        """After too long without a judgement give the healthier version the traffic.

        If they are alike, the new one keeps it, and may be confirmed unjudged. Where that does not
        come in as long again, the run ends, and the version stays as it is.
        """
        workers = self.look.workers
        if workers.never_ready:
            self.switch_back_for_worker(workers.waits)
        versions = self.urgent.traffic.compare_versions(self.task, ask=True)
        live = versions.live if self.healthy() else PodHealth(0, versions.live.wanted)
        previous = versions.previous
        detail = (
            f"{why}; now {live.ready} of {live.wanted} pods are healthy,"
            f" {previous.ready} of {previous.wanted} of the version before"
        )
        detail += f"; {workers.waits}" if workers.waits else ""
        if previous.better_than(live):
            self.urgent.traffic.switch_back(self.task, Outcome.FAILED, Reason.UNJUDGED, detail)
        if self.gave_up or not live.ready:
            raise StageError(Reason.UNJUDGED if live.ready else Reason.BOTH_UNHEALTHY, detail)
        self.gave_up = detail
        self.judged_seconds_needed = 0.0
        self.judging_since = self.clock.monotonic()

    # What several of them ask.

    def informed(self) -> list[Pod]:
        """Return the pods of the run as the informer has them, which may follow or not."""
        return [p for p in self.informer.items() if p.run == self.release.run]

    def healthy(self) -> bool:
        """Whether the last checks passed, as many as it takes, and no container has failed."""
        if self.checks.passing(self.clock.monotonic()) < self.settings.health.successes:
            return False
        return not container_failure([*self.look.pods, *self.informed()], self.switched_at)

    def attempt(self, step: Callable[[], None]) -> bool:
        """Take a step; return False if it got no answer, or could not even be begun."""
        try:
            step()
        except (RunError, InterruptedError):
            raise
        except (HookError, OSError, RuntimeError, *SHAPE_ERRORS) as lost:
            name = step.__name__
            if self.lost_answers.failed("step"):
                why = clip(str(lost))
                warn("a step of the bake is tried again", step=name, detail=why, **self.task.words)
            self.steady.doors.pause(0.5)
            return False
        return True


def refusal_of_a_pod(look: BakeLook, asked: int) -> str | None:
    """Return why a pod is not healthy, where its preview Service does not lead to the port asked.

    The pods take turns, as they would behind a Service: `asked` counts the checks until now.
    """
    checks = look.checks
    is_led_there = look.preview is not None and look.preview.path
    if is_led_there or not (checks and checks[0].path):
        return None
    return health_refusal(checks[asked % len(checks)])


# === deploy =======================================================================================
# The story of a run in one environment, of a rollback by hand, and of what both leave behind.

UNBUILT = f"image@sha256:{'0' * 64}"  # while it is only asked whether manifests can be rendered


def unbuilt_release(task: Task, objects: AppObjects) -> Release:
    """Return the release of objects whose image is not built yet; raises ManifestError."""
    return render(task.app, task.run, UNBUILT, Placement(COLOURS[0], 1), objects)


@dataclass(frozen=True, slots=True)
class Switched:
    """A release that this process has switched to, and how its preview is asked about health."""

    release: Release
    preview: HealthCheck


class LastObjects:
    """Keeps what the manifests of the last commits hold, until these are deployed.

    A commit does not change: what was read while its tests ran need not be read again.
    """

    KEPT = 16  # environments
    BYTES = 2**17  # of one environment, so that all together take a few megabytes

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], AppObjects] = {}
        self._lock = threading.Lock()

    def keep(self, task: Task, objects: AppObjects) -> None:
        """Keep the objects of a commit in an environment, unless they are large."""
        parts = [objects.deployment, objects.service, objects.configmaps, objects.companions]
        size = len(json.dumps(parts))
        with self._lock:
            self._kept.pop(self._key(task), None)
            if size <= self.BYTES:
                self._kept[self._key(task)] = objects
            for oldest in [*self._kept][: -self.KEPT]:
                del self._kept[oldest]

    def get(self, task: Task) -> AppObjects | None:
        """Return the objects of a commit in an environment, None where they are not kept."""
        with self._lock:
            return self._kept.get(self._key(task))

    def _key(self, task: Task) -> tuple[str, ...]:
        """Return what a commit in an environment is kept by."""
        return (task.app.name, task.environment, task.run.commit)


class Deployer:
    """Brings runs into environments. Every step looks before it acts."""

    def __init__(self, doors: Doors, apps: Sequence[App] = ()) -> None:
        self.doors = doors
        self.apps = apps  # all that are configured: none may have what another one needs
        self.state = StateStore(doors.kubectl, doors.clock)
        self.remembered = Remembered()
        self.objects = LastObjects()
        self.labels = PodLabels(doors)
        self.steady = Operations(doors, self.state, self.remembered)
        # for what is live: its calls of kubectl wait for no others, but for those to the records
        self.urgent = Operations(doors.urgent(), self.state, self.remembered)

    def deploy(self, task: Task) -> None:
        """Bring a run into an environment, through its bake in the last one.

        Raises StageError when it cannot (live traffic is as before, or was switched back) and
        SupersededError when something newer, or someone, took its place.
        """
        with self.steady.rollout.follow_pods(task) as pods:
            service = self.urgent.live.read(task)
            if service is None:
                self.urgent.guard.require_undeleted(task)
            resumed = service is not None and service.run == task.run.id
            switched = None if resumed else self.promote(task, pods)
            try:
                self.verify_and_bake(task, pods, switched)
            except StageError:
                # traffic has moved back, and what stands beside the app follows it
                self.steady.companions.follow(task)
                raise

    def promote(self, task: Task, pods: Informer[Pod]) -> Switched:
        """Do everything up to the switch, and switch; return what is live then."""
        objects = self.objects.get(task)
        if objects is None:
            with self.checkout(task.app, task.run.commit) as checkout:
                objects = self.read_objects(task, checkout)
        if task.run.delivery == NEXT_TRY:
            # what can be seen without it costs no rollback target again
            self.steady.rollout.require_own_preview(task)
        placement = self.steady.claims.idle_colour_and_size(task)
        release = render(task.app, task.run, task.image, placement, objects)
        self.require_accepted(task, release)
        claimed = self.steady.claims.take(task, release)
        more = {"colour": release.colour, "ignored": objects.ignored or None}
        self.doors.report(task, State.CLAIMED, more)
        try:
            self.steady.companions.prepare(task, release)
            self.steady.rollout.apply(task, release, claimed)
            # before the pods are there, so that the preview's endpoints come with them
            preview = self.steady.rollout.preview(task, release)
            self.steady.rollout.wait(task, release, pods)
            preview = self.steady.rollout.smoke_test(task, release, pods, preview)
            if objects.follows_size:
                release = self.as_large_as_live(task, release, claimed, pods, objects.size_limits)
        except HookError:
            # pods that someone else replaced meanwhile say nothing against this run
            self.steady.claims.check(task, claimed, self.live_service(task))
            raise
        self.steady.traffic.switch(task, release, claimed)
        more = {"colour": release.colour, "commit": release.commit}
        self.doors.report(task, State.SWITCHED, more)
        return Switched(release, preview)

    def require_accepted(self, task: Task, release: Release) -> None:
        """Raise HookError where others, or the API server, do not let a release in."""
        self.labels.require_apart(task, release, self.others(task))
        self.steady.companions.require_accepted(task, release)

    def others(self, task: Task) -> list[App]:
        """Return the other apps that are configured for an environment."""
        beside = (app for app in self.apps if task.environment in app.deploy.environments)
        return [app for app in beside if app.name != task.app.name]

    def as_large_as_live(
        self,
        task: Task,
        release: Release,
        claimed: Service | None,
        pods: Informer[Pod],
        limits: SizeLimits | None,
    ) -> Release:
        """Return a release, its pods ready, that is as large as the live one is by now."""
        live = self.steady.claims.idle_colour_and_size(task).replicas
        size = wanted_size(None, live, limits)
        if size == release.wanted:
            return release
        release = recoloured(release, task.app, release.colour, size)
        self.steady.rollout.apply(task, release, claimed)
        self.steady.rollout.wait(task, release, pods)
        return release

    def checkout(self, app: App, commit: str) -> AbstractContextManager[Path]:
        """Return a block in which the manifests of a commit are there, as files."""
        return self.doors.git.manifests(app.repository, commit, app.deploy.manifests)

    def read_objects(self, task: Task, checkout: Path) -> AppObjects:
        """Return the objects that a checkout has for an environment.

        Raises ManifestError with everything that is refused of them, also in their rendering.
        """
        faults = Faults()
        manifests = read_manifests(checkout, task.app.deploy.folder(task.environment))
        objects = check_objects(task.app, task.namespace, manifests, task.environment, faults)
        if others := self.others(task):
            faults.add(map(Fault, name_faults(objects, task.app.name, others)))
            faults.add(map(Fault, share_faults(objects, task.app.name, others)))
            without_service_links(objects)
        with faults.collect():
            unbuilt_release(task, objects)
        faults.require_none()
        return objects

    def manifest_faults(self, tasks: Sequence[Task]) -> dict[str, Sequence[Fault]]:
        """Return what is refused of a commit's manifests, by environment; a task for each.

        Raises HookError where that is not known, since git is away, say.
        """
        faults: dict[str, Sequence[Fault]] = {task.environment: () for task in tasks}
        releases: dict[str, Release] = {}
        try:
            with self.checkout(tasks[0].app, tasks[0].run.commit) as checkout:
                for task in tasks:
                    try:
                        objects = self.read_objects(task, checkout)
                        releases[task.environment] = unbuilt_release(task, objects)
                        self.objects.keep(task, objects)
                    except ManifestError as refusal:
                        faults[task.environment] = refusal.faults
        except ManifestError as refusal:  # of the whole folder
            faults = dict.fromkeys(faults, refusal.faults)
        shared = [*map(Fault, shared_node_ports(releases))]
        return {name: [*faults[name], *shared] for name in faults}

    def verify_and_bake(
        self, task: Task, pods: Informer[Pod], switched: Switched | None = None
    ) -> None:
        """Verify the switch, bake in the last environment, write the outcome.

        The release is read where it was not switched to by this process.
        """
        service = self.read_own(task)
        entry = service.live
        if entry.outcome:
            return
        release = switched.release if switched else self.live_release(task, service)
        with self.steady.companions.following(task):
            if task.last or release.workers:
                bake = Bake(self.steady, self.urgent, task, release, pods)
                bake.run(service, switched.preview if switched else None)
            else:
                self.steady.traffic.verify(task, release, entry.at)
                self.steady.traffic.confirm(task, release)
        self.steady.companions.follow(task)

    def live_release(self, task: Task, service: Service) -> Release:
        """Return the release that is live, by its record, or else by what stands in its colour.

        A version whose record was deleted is watched like any other.
        """
        entry = service.live
        try:
            return self.urgent.live.release(task, entry.release)
        except RunError as lost:
            name = f"{task.app.name}-{entry.colour}"
            deployment = self.urgent.live.kubectl.get("deployment", name, task.namespace)
            if deployment is None:
                raise
            error("the record of a live version is lost", detail=str(lost), **task.words)
        run = (entry.run, entry.commit, entry.image, entry.colour, entry.selector)
        return Release(*run, deployment, [], {"metadata": {}, "spec": service.spec})

    @retried
    def read_own(self, task: Task) -> Service:
        """Return the live Service while it selects the run; raises when it was switched away."""
        return self.urgent.guard.read_selected(task)

    def is_live(self, task: Task) -> bool:
        """Whether the traffic of an environment reaches a run. Raises KubectlError."""
        service = self.live_service(task)
        return service is not None and service.run == task.run.id

    @retried
    def live_service(self, task: Task) -> Service | None:
        """Return the live Service: what is to be said of a run is not lost by one lost answer."""
        return self.steady.live.read(task)

    # What is left behind.

    def finish_claim(self, task: Task, claim: Claim) -> None:
        """Do what a claim leaves to do, drop it, and delete what nothing names any more."""
        service = self.steady.live.read(task)
        if service is None or service.claim != claim:
            return
        self.steady.companions.follow(
            task, Moment.AFTER_THE_DRAIN, has_companions=service.live.has_companions
        )
        left = self.finish_colour(task, service)
        if service.live.outcome == ADOPTED:
            # what its owner changes next may not fit narrowed Services
            self.steady.claims.widen(task, claim)
            self.steady.companions.follow(task, Moment.AFTER_THE_DRAIN)
        self.steady.claims.put(task, left, claim)
        self.collect_garbage(task)

    def finish_colour(self, task: Task, service: Service) -> Claim:
        """Do what the claim of a Service leaves to do in its colour; return the claim after that.

        See Phase. Where a `rollback` was killed after its switch, the colour that it claimed is
        live. Then it is restored, and the other colour is drained next.
        """
        claim = service.claim
        name = f"{task.app.name}-{claim.colour}"
        is_live = colour_of(service.selector) == claim.colour
        if claim.colour not in COLOURS:
            return Claim()
        if claim.phase == Phase.ROLLBACK and claim.restore:
            self.steady.rollout.restore(task, name, service)
            other = next(colour for colour in COLOURS if colour != claim.colour)
            return self.steady.claims.new(claim.run, other, Phase.DRAINING) if is_live else Claim()
        if claim.phase == Phase.ROLLBACK:
            self.steady.workloads.unpause(task, name)
        elif claim.phase == Phase.PREPARING and not is_live:
            self.steady.rollout.restore(task, name, service)
        elif claim.phase == Phase.SWITCHED_BACK and not is_live:
            self.steady.workloads.scale(task, name, 0, partial(self.still_claims, task, claim))
        elif claim.phase == Phase.DRAINING and not is_live:
            due = partial(self.still_claims, task, claim)
            self.steady.workloads.drain(task, name, claim.since, due)
        return Claim()

    def still_claims(self, task: Task, claim: Claim) -> bool:
        """Whether a claim stands, as the live Service says now."""
        service = self.steady.live.read(task)
        return service is not None and service.claim == claim

    def collect_garbage(self, task: Task) -> None:
        """Delete what a failed first deployment left, and records that nothing names any more."""
        kubectl = self.doors.kubectl
        namespace = task.namespace
        app = task.app.name
        ours = f"{LABEL_MANAGED}={MANAGER},{LABEL_APP}={app}"
        service = self.steady.live.read(task)
        source = self.steady.live.with_history(task, service)
        # what a deleted Service named is in use, and is named again when it is back
        if source and (service is None or service.claim or not service.history):
            return
        deployments = kubectl.list("deployments", namespace, "-l", ours)
        in_use: set[str] = set()
        if service:
            terms = (f"{LABEL_APP}={app}", *worker_terms(d for d in deployments if is_ours(d, app)))
            sets = [kubectl.list("replicasets", namespace, "-l", each) for each in terms]
            in_use = configmap_names([deployments, sets]) | {e.release for e in service.history}
            if any(e.outcome == ADOPTED for e in service.history):
                in_use.add(adopted_name(app))
        else:
            metas = [d["metadata"] for d in deployments]
            left = [m["name"] for m in metas if m["labels"].get(LABEL_RUN) == task.run.id]
            kubectl.delete("deployment", left, namespace)
            preview = kubectl.get("service", f"{app}-preview", namespace) or {}
            if is_made_for(preview, app):
                kubectl.delete("service", [f"{app}-preview"], namespace)
            self.steady.companions.follow(task, Moment.AFTER_THE_DRAIN)
        # logs go by their age and number
        names = kubectl.names(
            "configmaps", namespace, f"{ours},{LABEL_STAGE} notin (log,{COMPANION})"
        )
        now = self.steady.live.read(task)
        # whoever made one of them after the first look has claimed the Service by now
        if (now.version if now else 0) == (service.version if service else 0):
            # a release has the text of its copies: applying it makes them again
            kubectl.delete("configmap", [n for n in names if n not in in_use], namespace)


def worker_terms(workers: Iterable[Object]) -> Iterator[str]:
    """Yield by which labels the ReplicaSets of workers are selected, each labels once.

    They are those of the worker's pods, on which none says whose app it is.
    """
    selectors = (part_of(worker, "spec", "selector", "matchLabels") for worker in workers)
    for labels in dict.fromkeys(map(selector_text, selectors)):
        yield f"{LABEL_WORKER},{labels}" if labels else LABEL_WORKER


@dataclass(frozen=True, slots=True)
class Goal:
    """Where a rollback goes: an entry of the history, as it was and as it will be live.

    They differ where its pods had to be brought back, in another colour or size.
    """

    target: HistoryEntry
    entry: HistoryEntry
    overwritten: bool = False  # its pods still run, and another run is in their Deployment already


class Rollback:
    """Switches an environment to an entry of its history, at a person's request."""

    def __init__(self, operations: Operations) -> None:
        self.doors = operations.doors
        self.live = operations.live
        self.claims = operations.claims
        self.rollout = operations.rollout
        self.companions = operations.companions
        self.workloads = operations.workloads

    def run(self, task: Task, left: Service, target: HistoryEntry, reason: str) -> HistoryEntry:
        """Switch to a target from a live Service as it was read; return the entry as it is then.

        Works beside a daemon or without one. A target of which enough pods are ready is one patch
        away, and what overwrote its Deployment is undone afterwards; one that was scaled down is
        applied again and waited for. Raises RefusedError when someone else has switched meanwhile,
        and StageError when the target does not become ready.
        """
        # whatever is written from here on is of the run that is gone to, its claim as well
        task = replace(task, run=replace(task.run, id=target.run))
        restore = left.claim.restore if left.claim.colour == target.colour else ""
        claim = self.claims.new(task.run.id, target.colour, Phase.ROLLBACK, restore)
        name = f"{task.app.name}-{target.colour}"
        claimed = self.claim(task, left, claim)
        switched = None
        try:
            goal = self.ready_goal(task, left, claimed, target)
            if goal.entry.has_companions or goal.entry.outcome == ADOPTED:
                self.companions.protect(task, goal.entry)
            switched = self.switch(task, claimed, goal, reason)
        finally:
            if switched is None:
                self.undo_claim(task, name, left, claim)
        try:
            self.record(task, left, goal.entry, reason)
        finally:  # whoever may not write records can still complete what traffic has left behind
            if goal.entry.has_companions or left.live.has_companions:
                self.companions.follow(task, has_companions=True)
            if switched.claim.restore:
                self.restore(task, name, left, switched)
        return goal.entry

    def undo_claim(self, task: Task, name: str, left: Service, claim: Claim) -> None:
        """Give the environment back as it was found, since traffic was not switched.

        What does not work now the daemon does, once this claim counts as that of a dead process.
        """
        with suppress(HookError):
            self.workloads.unpause(task, name)
        with suppress(HookError):
            self.claims.put(task, left.claim, claim)

    def restore(self, task: Task, name: str, left: Service, switched: Service) -> None:
        """Undo what overwrote the Deployment of the target; then claim to drain what was left.

        What does not work now the daemon does, by the claim that is left then.
        """
        with suppress(HookError):
            self.rollout.restore(task, name, switched)
            self.claims.put(task, self.drain_of(task, left), switched.claim)

    def claim(self, task: Task, service: Service, claim: Claim) -> Service:
        """Return the live Service with a claim written on it.

        Raises RefusedError where someone else has claimed it since it was read.
        """
        try:
            return self.live.write(task, service, {ANNOTATION_CLAIM: claim})
        except KubectlError:
            claimed = self.claims.put(task, claim, service.claim) or service
        if claimed.claim != claim:
            taker = claimed.claim.run or "someone else"
            raise RefusedError(f"{taker} has changed {task.environment} meanwhile; try again")
        return claimed

    @retried
    def record(self, task: Task, left: Service, live: HistoryEntry, reason: str) -> None:
        """Reject the commit that a rollback has left, and lift the rejection of its target.

        A target that is proven here was rejected by another environment: that rejection stays.
        """
        commit = left.live.commit
        reason = reason or str(Reason.ROLLED_BACK)
        rejection = Rejection(commit=commit, reason=reason, at=self.doors.clock.now())
        lifted = live.commit != commit and not left.entry(live.run).proven
        self.live.state.write(
            task.app,
            *([rejection] if commit else []),
            forget=[Rejection(commit=live.commit).key] if lifted else [],
            live={task.environment: live},
        )

    def drain_of(self, task: Task, left: Service) -> Claim:
        """Return the claim by which the daemon drains the version that a rollback has left."""
        colour = left.live.colour or colour_of(left.selector)
        return self.claims.new(task.run.id, colour, Phase.DRAINING)

    def ready_goal(
        self, task: Task, service: Service, claimed: Service, target: HistoryEntry
    ) -> Goal:
        """Return where a rollback goes once its pods are ready, brought back if need be."""
        if claimed.selector != service.selector:
            raise RefusedError("traffic was switched this very moment; look, and try again")
        standing = ""  # the run in the target's Deployment, if that can have one of its own
        if target.run and target.colour != colour_of(claimed.selector):
            standing = self.fence(task, target)
        ready = len(self.workloads.ready(task.namespace, target.selector)) >= target.replicas
        if ready and standing == target.run:
            return Goal(target, target)
        if ready and standing and target.release:
            return Goal(target, target, overwritten=True)
        if not target.release:
            few = "what was there before the first version has too few ready pods"
            raise RefusedError(f"{few}, and cannot be started again from here")
        if service.claim.phase == Phase.BAKING:
            self.keep_way_back(task, service, target)
        return self.apply_again(task, claimed, target)

    def apply_again(self, task: Task, claimed: Service, target: HistoryEntry) -> Goal:
        """Bring a target that has too few ready pods back from its release, as large as the live.

        It keeps its colour unless that is live by now.
        """
        live = colour_of(claimed.selector)
        release = self.live.release(task, target.release)
        colour = next(c for c in (release.colour, *COLOURS) if c != live)
        size = max(self.workloads.size(task, claimed.selector), release.wanted)
        release = recoloured(release, task.app, colour, size)
        with self.rollout.follow_pods(task) as pods:
            self.rollout.apply(task, release, claimed)
            self.rollout.wait(task, release, pods)
        entry = replace(
            target,
            colour=colour,
            selector=release.selector,
            replicas=release.wanted,
            release=release.configmap(task.app.name)["metadata"]["name"],
        )
        return Goal(target, entry)

    def keep_way_back(self, task: Task, service: Service, target: HistoryEntry) -> None:
        """Raise RefusedError if a target would overwrite the version that a bake may go back to.

        Both need the colour that is not live, and traffic may go back to it at any moment.
        """
        before = service.switch_back_target
        if before.run != target.run and self.workloads.ready(task.namespace, before.selector):
            first = f"`rollback {task.app.name} --to {before.run}` goes there at once"
            why = f"{service.claim.run} is not confirmed, so {before.run} has to stand until then"
            raise RefusedError(f"{why}; {first}, and another one then goes further back")

    @retried
    def fence(self, task: Task, target: HistoryEntry) -> str:
        """Return the run that a target's Deployment carries, "" for none, and keep others off it.

        Ready pods are no proof that the target stands: a rollout may be replacing them, and then it
        is paused. A late write, of a deployment that has lost its claim, meets a conflict.
        """
        name = f"{task.app.name}-{target.colour}"
        mark = {"metadata": {"annotations": {ANNOTATION_WRITTEN: str(self.doors.clock.now())}}}
        try:
            deployment = self.doors.kubectl.patch("deployment", name, task.namespace, mark)
        except KubectlError as gone:
            if gone.kind != "NotFound":
                raise
            return ""
        carries = str((deployment["metadata"].get("labels") or {}).get(LABEL_RUN, ""))
        if carries != target.run and target.release:
            # until it is restored: its rollout would take the target's pods away
            self.doors.kubectl.patch("deployment", name, task.namespace, {"spec": {"paused": True}})
        return carries

    def switch(self, task: Task, claimed: Service, goal: Goal, reason: str) -> Service:
        """Point the live Service at a rollback's goal, if nobody else has taken over."""
        try:
            return self.move(task, claimed, goal, reason)
        except KubectlError:  # most likely a Conflict: it has been changed since it was claimed
            return self.move_what_is_there(task, claimed, goal, reason)

    @retried
    def move_what_is_there(self, task: Task, claimed: Service, goal: Goal, reason: str) -> Service:
        """Point the live Service, as it is now, at a rollback's goal."""
        now = self.live.read(task)
        if now is None:
            raise RefusedError("the live Service was deleted meanwhile; look, and try again")
        if now.selector == goal.entry.selector:
            return now
        if (now.claim, now.selector) != (claimed.claim, claimed.selector):
            raise RefusedError(f"{now.claim.run or 'someone'} has taken over meanwhile")
        return self.move(task, now, goal, reason)

    def move(self, task: Task, now: Service, goal: Goal, reason: str) -> Service:
        """Point a live Service that was read and is in this rollback's hand at its goal."""
        claim = self.drain_of(task, now)
        if goal.overwritten:
            claim = replace(now.claim, restore=goal.target.release)
        annotations = {
            ANNOTATION_HISTORY: rolled_back(now.history, goal, reason),
            ANNOTATION_CLAIM: claim,
            ANNOTATION_BAKE: None,
        }
        patch = self.live.patch_back(task, now, goal.target)
        return self.live.go_back(task, now, annotations, goal.entry, patch)


def rolled_back(history: Sequence[HistoryEntry], goal: Goal, reason: str) -> list[HistoryEntry]:
    """Return a history in which what came after a rollback's target is rolled back.

    Raises RefusedError where the target is not in it any more.
    """
    same = [(e.run, e.at) == (goal.target.run, goal.target.at) for e in history]
    if not any(same):
        raise RefusedError("the history was changed meanwhile; look, and try again")
    place = same.index(True)
    ended = Ended(str(Outcome.ROLLED_BACK), str(Reason.ROLLED_BACK), reason)
    stayed = (Outcome.DEPLOYED, "")
    newer = [ended.mark(e) if e.outcome in stayed else e for e in history[:place]]
    return [*newer, goal.entry, *history[place + 1 :]]


def recoloured(release: Release, app: App, colour: str, replicas: int) -> Release:
    """Return a release as it is rendered for a colour and a size."""
    deployment = copy.deepcopy(release.deployment)
    deployment["metadata"]["name"] = f"{app.name}-{colour}"
    spec = deployment["spec"]
    spec["replicas"] = replicas
    longest = rollout_seconds(app, replicas, spec.get("minReadySeconds", 0))
    spec["progressDeadlineSeconds"] = max(spec.get("progressDeadlineSeconds", 0), longest)
    template = spec["template"]["metadata"]["labels"]
    label = LABEL_COLOUR if LABEL_COLOUR in release.selector else LABEL_VERSION
    places = [deployment["metadata"]["labels"], template, spec["selector"]["matchLabels"]]
    spread = spread_selectors(part_of(spec, "template", "spec"))
    places += [s["matchLabels"] for s in spread if part_of(s, "matchLabels").get(label) in COLOURS]
    for labels in places:
        labels[label] = colour
    selector = {**release.selector, label: colour}
    return replace(release, colour=colour, selector=selector, deployment=deployment)


# === intake =======================================================================================
# From a push to a run: stored pushes become suspended Jobs, what GitLab did not announce is found
# on the git server, and how each run began and ended is recorded.

STEP_SECONDS = 300.0  # in which a thread must have moved
STEP_FAILED = "controller step failed, will be tried again"
REFUSED_FOR_GOOD = ("Invalid", "Denied", "BadRequest")  # kinds of refusals of a Job
NO_WAIT = dict.fromkeys((ANNOTATION_REASON, ANNOTATION_DETAIL))  # on Jobs that wait for nothing


class ControllerContext:
    """What the parts of the controller share."""

    def __init__(self, config: Config, deployer: Deployer, spool: Spool) -> None:
        self.config = config
        self.apps = {app.name: app for app in config.apps}
        self.deployer = deployer
        self.doors = deployer.doors
        self.kubectl = deployer.doors.kubectl
        self.clock = deployer.doors.clock
        self.metrics = self.kubectl.metrics
        self.stop = deployer.doors.stop
        self.state = deployer.state
        self.spool = spool
        self.informers = Informers(config, self.kubectl)
        self.recorder = RunRecorder(self)
        self.heartbeats = Heartbeats(self.clock)
        self.retry = Retry(self.clock)  # of the steps of the controller's loop
        self.heads_wanted = {app: threading.Event() for app in self.apps}  # set to have heads read
        self.wake = threading.Event()  # set to have the runs reconciled at once
        self.spooled = threading.Event()  # set to have the spool read at once

    def attempt(self, item: str, step: Callable[[], Any], news: Any = None, **words: Any) -> None:
        """Take a step of the controller's loop if it is due; its error holds back no other step."""
        self.heartbeats.beat("controller", STEP_SECONDS)
        if self.retry.due(item, news):
            with self.retry.contain(item, STEP_FAILED, news, **words):
                step()

    def reported_runs(self) -> list[ReportedRun] | None:
        """Return what is observed of every run, None while the informers cannot follow.

        Raises KubectlError where records were never read and the cluster is away.
        """
        if any(informer.trouble for informer in self.informers.all()):
            return None
        return self.observed_runs({n: self.state.recent(app) for n, app in self.apps.items()})

    def observed_runs(self, states: Mapping[str, AppState]) -> list[ReportedRun]:
        """Return what is in memory of every run, by what is recorded of each app."""
        jobs_by_app: dict[str, dict[str, dict[str, Job]]] = {name: {} for name in self.apps}
        for run, jobs in self.informers.jobs_by_run().items():
            jobs_by_app.get(newest_run(jobs).app, {})[run] = jobs
        services = self.informers.services.items()
        runs = []
        for name, app in self.apps.items():
            live = {e: s for e, i in services if (s := i.find(app.service_name))}
            for id_ in {**states[name].runs, **jobs_by_app[name]}:
                jobs = jobs_by_app[name].get(id_, {})
                runs.append(ReportedRun.of(app, states[name], id_, jobs, live))
        return runs

    def is_deployed(self, run: Run) -> bool:
        """Whether a run is of its app's deploy branch."""
        app = self.apps.get(run.app)
        return app is not None and run.ref == app.deploy_ref


class Intake:
    """Turns stored pushes into suspended Jobs: the queue of runs is in the cluster."""

    def __init__(self, context: ControllerContext) -> None:
        self.context = context
        self.retry = Retry(context.clock)  # by the name of a batch
        self._collisions: dict[str, tuple[str, str]] = {}  # ids that are taken, by ref and commit

    def admit_all(self) -> float:
        """Create the Jobs of the stored pushes, a batch of each app, deploy branches first.

        Returns the seconds after which to look again. A batch that fails is tried again by itself,
        and delays no other app. Raises KubectlError when the cluster is away.
        """
        self.await_end_of_burst()
        began = self.context.clock.thread_time()
        pushes = self.context.spool.read()
        batches = self.batches(pushes)
        batches = {n: batch for n, batch in batches.items() if self.retry.due(n, batch[-1].path)}
        if not batches:  # each push has all that wait read again: a tenth of a core is enough
            self.context.stop.wait(min(5.0, 9 * (self.context.clock.thread_time() - began)))
        unreachable = 0
        for name, batch in batches.items():
            try:
                self.admit_batch(name, batch)
            except OSError as failed:  # of this machine's disk, say; other apps are not held up
                if self.put_off(name, batch):
                    error("stored pushes wait", app=batch[0].run.app, detail=str(failed))
            except KubectlError as failed:
                unreachable += failed.kind == "Unreachable"
                if unreachable == min(2, len(batches)):  # it is the cluster, not what one app has
                    raise
                if self.put_off(name, batch):
                    app = batch[0].run.app
                    warn("intake waits for the cluster", app=app, detail=str(failed))
        sizes = [len(batch) for batch in batches.values()]
        if BATCH in sizes:
            return 0.0
        return self.retry.wait(AGAIN_SECONDS if len(pushes) > sum(sizes) else 30.0)

    def await_end_of_burst(self) -> None:
        """Wait while pushes come, but only a moment: a burst of them is one call."""
        for _ in range(5):
            stored = len(self.context.spool)
            if self.context.stop.wait(0.05) or len(self.context.spool) == stored:
                break

    def batches(self, pushes: Iterable[StoredPush]) -> dict[str, list[StoredPush]]:
        """Return what is admitted next, oldest first: what gets its Jobs in one call, by a name.

        Of each app it is what is deployed, then what is only tested. An app has a bounded number of
        each in the cluster; what is more waits in the spool.
        """
        groups: dict[tuple[bool, str], list[StoredPush]] = {}
        for push in pushes:
            only_tested = not self.context.is_deployed(push.run)
            groups.setdefault((only_tested, push.run.app), []).append(push)
        jobs = self.context.informers.all_jobs()
        open_jobs = Counter(job.run.app for job in jobs if not job.outcome)
        batches = {}
        for only_tested, app in sorted(groups):
            most = TEST_JOBS if only_tested else 2 * TEST_JOBS
            room = max(0, min(BATCH, most - open_jobs[app]))
            if first := groups[only_tested, app][:room]:
                batches[f"{app}, {'only tested' if only_tested else 'deployed'}"] = first
        return batches

    def put_off(self, name: str, batch: Sequence[StoredPush]) -> bool:
        """Try a batch again later; return whether to report that."""
        self.context.metrics.waiting.labels(f"intake of {batch[0].run.app}").set(1)
        return self.retry.failed(name, batch[-1].path)

    def admit_batch(self, name: str, batch: Sequence[StoredPush]) -> None:
        """Admit the pushes of a batch, and remove from the spool those that are done with."""
        app = batch[0].run.app
        runs = [push.run for push in batch]
        done = self.admit(app, runs)
        for push in batch:
            if push.run in done:
                self.context.spool.done(push.path)
        if done == set(runs):
            self.retry.succeeded(name)
            self.context.metrics.waiting.labels(f"intake of {app}").set(0)
        else:
            self.put_off(name, batch)

    def admit(self, name: str, pushes: Sequence[Run]) -> set[Run]:
        """Create the Jobs of an app's pushes that need one; return those that are done with."""
        app = self.context.apps.get(name)
        if app is None:
            warn("push of an app that is no longer configured", app=name)
            return {*pushes}
        state = self.context.recorder.repaired_state(app)
        deploys = any(run.ref == app.deploy_ref for run in pushes)
        needless = self.needless_commits(app, state) if deploys else {}
        done = set[Run]()
        wanted: dict[str, list[Run]] = {}
        for run, id_ in self.ids_of(app, state, pushes).items():
            reason = needless.get(run.commit, "") if run.ref == app.deploy_ref else ""
            record = state.runs.get(id_)
            if record and record.delivery == run.delivery not in UNANNOUNCED:
                recent = record.received > run.received - DEDUPE_SECONDS
                reason = "Replayed" if recent else reason
            if reason:
                info("push needs nothing", reason=reason, **run_words(run))
                if record and record.next_try and reason != "Replayed":
                    self.context.state.write(app, replace(record, next_try=0.0))
                done.add(run)
            else:
                wanted.setdefault(id_, []).append(run)
        return done | self.create_jobs(app, wanted)

    def needless_commits(self, app: App, state: AppState) -> dict[str, str]:
        """Return why commits are not to be deployed again, by commit: rejected, or live already."""
        rejected = {commit for commit in state.rejected if state.rejection(app, commit)}
        needless = dict.fromkeys(rejected, str(Reason.REJECTED))
        if not app.deploy.environments:
            return needless
        namespace = self.context.config.namespaces[app.deploy.environments[-1]]
        if manifest := self.context.kubectl.get("service", app.service_name, namespace):
            service = Service(manifest)
            taken_back = self.recorded_as_rejected(app, state, service.history)
            needless |= dict.fromkeys(taken_back, str(Reason.REJECTED))
            if not has_other_commit_elsewhere(app, state, service.live.commit):
                needless[service.live.commit] = "AlreadyLive"
        return needless

    def recorded_as_rejected(
        self, app: App, state: AppState, history: Sequence[HistoryEntry]
    ) -> set[str]:
        """Record what a history says was taken back, where no record of the app is left.

        An uninstallation deletes what is recorded, and not what a Service says of itself. Returns
        the commits; there are none while records are left.
        """
        if state.last(app.deploy_ref):
            return set()
        outcomes = {entry.commit: entry.outcome for entry in reversed(history)}
        taken_back = {c for c, o in outcomes.items() if c and o in OUTCOMES.values()}
        for commit in sorted(taken_back - state.rejected.keys()):
            self.context.state.reject(app, commit, Reason.ROLLED_BACK)
        return taken_back

    def ids_of(self, app: App, state: AppState, pushes: Iterable[Run]) -> dict[Run, str]:
        """Return the id of each push's run: the one that it has already, or a free one.

        A push is known by ref and commit: version 0.1 made shorter ids, and two pushes may have the
        same, by chance or by somebody's trying. Then the second gets a longer one.
        """
        ids = {(record.ref, record.commit): id_ for id_, record in state.runs.items()}
        runs = self.context.informers.runs_with_jobs(app, pushes)
        ids |= {recorded_push(run): run.id for run in runs}
        owners = {**self._collisions, **{id_: push for push, id_ in ids.items()}}
        for run in pushes:
            push = recorded_push(run)
            if push in ids:
                continue
            free = (id_ for id_ in run_ids(*run_key(run)) if owners.get(id_, push) == push)
            ids[push] = next(free, run.id)
            owners[ids[push]] = push
            if ids[push] != run.id:
                error("two pushes have the same run id", now=ids[push], **run_words(run))
        return {run: ids[recorded_push(run)] for run in pushes}

    def create_jobs(self, app: App, wanted: Mapping[str, Sequence[Run]]) -> set[Run]:
        """Create suspended Jobs by run id, each for the newest of equal pushes.

        Returns the pushes that are done with. Who pushed and the title are masked from here on:
        the Jobs are what others may read, and what a run is read from after a restart.
        """
        newest = {id_: max(pushes, key=lambda run: run.received) for id_, pushes in wanted.items()}
        mask = self.context.doors.secrets.mask
        runs = [
            replace(run, id=id_, title=mask(run.title), by=mask(run.by))
            for id_, run in newest.items()
        ]
        runs.sort(key=lambda run: run.received)
        jobs = [test_job(self.context.config, app, run) for run in runs]
        namespace = self.context.config.namespaces["test"]
        kubectl = self.context.kubectl
        refused = kubectl.create_each(jobs, namespace) if jobs else {}
        refusals = {name.removeprefix("test-"): refusal for name, refusal in refused.items()}
        taken = [id_ for id_, refusal in refusals.items() if refusal.kind == "AlreadyExists"]
        existing = jobs_of(kubectl, self.context.config, taken)
        started = [
            run
            for run in runs
            if self.handle_create_result(run, refusals.get(run.id), existing.get(run.id, []))
        ]
        self.context.recorder.record_started(app, started)
        missing = {run.id for run in runs} - {run.id for run in started} - existing.keys()
        if missing:
            reason = refusals[min(missing)].said
            warn("Jobs were not created, will be tried again", count=len(missing), detail=reason)
        return {push for run in started for push in wanted[run.id]}

    def handle_create_result(
        self, run: Run, refusal: KubectlError | None, existing: Sequence[Job]
    ) -> bool:
        """Handle the creation of a run's Job, or its refusal; return whether its push is done with.

        Where the Job exists already, `existing` has the Jobs of that id.
        """
        self.context.heartbeats.beat("intake", STEP_SECONDS)
        if refusal and refusal.kind in REFUSED_FOR_GOOD:
            end = ends(Outcome.FAILED, Reason.JOB_REFUSED, refusal.said, "test")
            self.context.recorder.finish(run, {}, end)
            return True
        if other := next((j.run for j in existing if run_key(j.run) != run_key(run)), None):
            # the next try takes another id
            self._collisions[run.id] = recorded_push(other)
            return False
        if existing:
            reopened = reopen(self.context.kubectl, run, existing)
            message = "the run exists already" if reopened else "an old Job is being deleted"
            info(message, **run_words(run))
            return reopened
        if not refusal:
            now = self.context.clock.now()
            self.context.recorder.report(run, {}, state=State.QUEUED, at=now, by=run.by)
        return not refusal


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadHeads:
    """The heads of an app's branches, as the git server told them."""

    asked: float = 0.0  # when, in seconds since the epoch
    answered: float = -NEVER  # when, by the monotonic clock
    commits: Mapping[str, str] = dataclass_field(default_factory=dict)  # by ref

    def relation(self, run: Run, clock: Clock, older: Set[str] = frozenset()) -> Head:
        """Return what they say about a run now, from what its ref had before."""
        commits = self.commits if self.asked >= run.received else None
        return head_of(run, commits, clock.monotonic() - self.answered, clock.now(), older)


class CatchUp:
    """Reads the heads of the git server, and finds what GitLab did not announce."""

    def __init__(self, context: ControllerContext, intake: Intake) -> None:
        self.context = context
        self.clock = context.clock
        self.intake = intake
        self.heads = dict.fromkeys(context.apps, ReadHeads())  # the last answer, by app
        self.errors: dict[str, str] = {}  # why there was no answer to the last question, by app
        self._due = dict.fromkeys(context.apps, 0.0)  # when to compare the heads, by app

    def read_heads(self, app: App) -> float:
        """Read an app's heads, and compare them now and then with what was last recorded.

        Returns the seconds until that is due again. Raises HookError.
        """
        asked = self.clock.now()
        try:
            commits = self.context.doors.git.heads(app.repository)
        except HookError as failed:
            self.errors[app.name] = str(failed)
            raise
        self.errors.pop(app.name, None)
        heads = ReadHeads(asked=asked, answered=self.clock.monotonic(), commits=commits)
        self.heads[app.name] = heads
        self.context.wake.set()
        if self.clock.monotonic() >= self._due[app.name]:
            self.catch_up(app, heads)
            pause = jittered(self.context.config.catch_up)
            self._due[app.name] = self.clock.monotonic() + pause
        until_try = self.start_tries(app, heads) - self.clock.now()
        self.context.stop.wait(0.25)  # whoever waits for a head asks all the time
        return max(0.0, min(until_try, self._due[app.name] - self.clock.monotonic()))

    def head(self, run: Run) -> Head:
        """Return what the heads that were read last say about a run."""
        heads = self.heads[run.app]
        head = heads.relation(run, self.clock)
        if head is not Head.NEWER:
            return head
        return heads.relation(run, self.clock, self.older_commits(run))

    def older_commits(self, run: Run) -> frozenset[str]:
        """Return what a run's ref had before, by the pushes of which there are Jobs."""
        jobs = self.context.informers.all_jobs()
        runs = (job.run for job in jobs if job.run.app == run.app)
        return commits_before(
            run, {each.commit: each.before for each in runs if each.ref == run.ref}
        )

    def start_tries(self, app: App, heads: ReadHeads) -> float:
        """Try the runs again whose time has come, if they are still heads of their branches.

        Returns when to look again, in seconds since the epoch. Raises HookError.
        """
        state = self.context.state.recent(app)
        if any(0 < record.next_try <= heads.asked for record in state.runs.values()):
            state = self.context.recorder.repaired_state(app)  # `rerun` is another process
        waiting = [record for record in state.runs.values() if record.next_try > 0]
        due = [record for record in waiting if record.next_try <= heads.asked]
        pushes = self.context.spool.read() if due else []
        stored = {push.run.ref for push in pushes if push.run.app == app.name}
        refs = {recorded_ref(ref): ref for ref in heads.commits} if due else {}
        for record in due:
            run = replace(run_of_record(app, record), ref=refs.get(record.ref, record.ref))
            if run.ref in stored:
                continue
            head = self.head_for_try(app, state, heads, run)
            if head is Head.NEWER:
                self.supersede(app, record, self.clock.now())
            elif head is Head.SAME:
                # what was pushed since the heads were asked for is newer
                again = replace(run, received=heads.asked, delivery=NEXT_TRY)
                info("tried again", tries=record.tries, reason=record.reason, **run_words(again))
                self.context.spool.store([again])
                self.context.spooled.set()
        soon = [self.clock.now() + AGAIN_SECONDS] if due else []
        later = [record.next_try for record in waiting if record.next_try > heads.asked]
        return min([*soon, *later], default=NEVER)

    def head_for_try(self, app: App, state: AppState, heads: ReadHeads, run: Run) -> Head:
        """Return what is known about a run that is due for its next try.

        Of a test-only branch the newest push counts that was announced, and git need not list it:
        of too many branches only the deployed ones are read.
        """
        last = state.last(run.ref)
        is_older = last is not None and last.received > run.received
        if run.ref != app.deploy_ref:
            listed = run.ref in heads.commits or heads.commits.keys() - {app.deploy_ref}
            if is_older or not listed:
                return Head.NEWER if is_older else Head.SAME
        elif is_older and last and not last.outcome:
            return Head.UNKNOWN  # that one asks git itself
        before = {record.commit: record.before for record in state.runs.values()}
        return heads.relation(run, self.clock, commits_before(run, before))

    def supersede(self, app: App, record: RunRecord, now: float) -> None:
        """Record that a run that waited for its next try is not a head any more."""
        left = replace(
            record,
            outcome=str(Outcome.SUPERSEDED),
            reason=str(Reason.NOT_HEAD),
            detail=f"the branch was pushed again; before: {record.reason}",
            ended=round(now, 3),
            next_try=0.0,
        )
        self.context.state.write(app, left)

    def catch_up(self, app: App, heads: ReadHeads) -> None:
        """Make a run of a deploy branch's head that nobody announced, and end runs that are lost.

        A lost push of a test-only branch is not looked for. Nothing is done about a head with a
        stored push, or that may be older than the last push.
        """
        state = self.context.recorder.repaired_state(app)
        pushes = self.context.spool.read()
        stored = [push.run for push in pushes if push.run.app == app.name]
        self.end_lost_runs(app, state, heads, stored)
        ref = app.deploy_ref
        last = state.last(ref)
        pushed = run_of_record(app, last) if last else Run(id="", app=app.name, ref=ref, commit="")
        commit = heads.commits.get(ref, "")
        before = {record.commit: record.before for record in state.runs.values()}
        older = commits_before(pushed, before)
        unknown = heads.relation(pushed, self.clock, older) is Head.UNKNOWN
        refused_before = last is not None and last.config not in ("", config_hash(app))
        same = commit == pushed.commit and not refused_before
        if unknown or same or not commit or any(run.ref == ref for run in stored):
            return
        now = self.clock.now()
        run = run_of(app, ref, commit, before=pushed.commit, received=now, delivery=CATCH_UP)
        if run is None or commit in self.intake.needless_commits(app, state):
            return
        with_jobs = map(run_key, self.context.informers.runs_with_jobs(app, [run]))
        if state.find(ref, commit) or run_key(run) not in with_jobs:
            anew = "configured anew since it was refused"
            info(anew if commit == pushed.commit else "head moved unannounced", **run_words(run))
            self.context.metrics.catch_up.labels(app.name).inc()
            self.context.spool.store([run])
            self.context.spooled.set()

    def end_lost_runs(
        self, app: App, state: AppState, heads: ReadHeads, stored: Sequence[Run]
    ) -> None:
        """End runs that are under way and have neither a Job nor a stored push: missing is failed.

        Their Jobs were deleted while nobody looked.
        """
        pushes = {recorded_push(run) for run in stored}
        with_job = self.context.informers.ids_with_job(app)
        records = [r for r in state.runs.values() if not r.outcome and r.received < heads.asked]
        records = [r for r in records if (r.ref, r.commit) not in pushes and r.id not in with_job]
        ids = [record.id for record in records[:BATCH]]
        jobs_by_run = jobs_of(self.context.kubectl, self.context.config, ids)
        for id_ in (id_ for id_, jobs in jobs_by_run.items() if not jobs):
            lost = run_of_record(app, state.runs[id_])
            end = ends(Outcome.FAILED, Reason.VANISHED, "its Jobs are gone", "test")
            self.context.recorder.finish(lost, {}, end)


class RunRecorder:
    """Records how runs begin and end: in the app's records, on Jobs, in log and metrics."""

    def __init__(self, context: ControllerContext) -> None:
        self.context = context
        self.doors = context.doors
        self.state = context.state
        self.logs = context.deployer.steady.rollout.logs

    def repaired_state(self, app: App) -> AppState:
        """Return what is recorded of an app now, after repairing what could not be read."""
        state = self.state.read(app)
        if state.repairs:
            self.state.write(app, with_job=self.context.informers.ids_with_job(app))
        return state

    def record_started(self, app: App, runs: Sequence[Run]) -> None:
        """Record that runs have their Jobs: from now on a missing one was deleted."""
        if not runs:
            return
        with self.state.lock(app):
            state = self.state.read(app)
            # what has ended since it was pushed, or was pushed again, stays as it is
            begun = [run for run in runs if newer_than(run, state)]
            records = [state.runs.get(r.id, RunRecord.of(r)).started_again(r) for r in begun]
            if records:
                with_job = self.context.informers.ids_with_job(app) | {r.id for r in records}
                self.state.write(app, *records, with_job=with_job)

    def finish(
        self, run: Run, jobs: Mapping[str, Job], action: Action, *, switched: bool = False
    ) -> None:
        """Record how a run ended, mark its Jobs as done with, and report it.

        `switched`: traffic has reached it where it ended, so that nothing is tried again by itself.
        """
        detail = self.doors.secrets.mask(action.detail)
        end = replace(action, detail=detail)
        at = max(self.doors.clock.now(), run.received)  # by a clock that may be ahead
        record = self.record_end(run, end, round(at, 3), switched=switched)
        bad = end.outcome in BAD_OUTCOMES
        job = jobs.get(end.stage)
        if bad and job and end.reason is not Reason.CLONE_FAILED:
            pods = [pod for pod in self.context.informers.all_pods() if pod.job == job.uid]
            last = sorted(pods, key=lambda pod: -pod.created)[:1]
            self.logs.start(partial(self.logs.keep, run.app, run.id, last, job.namespace))
        self.mark_jobs(jobs, record)
        if record.reason == Reason.GAVE_UP:
            detail = record.detail
        words = {"outcome": record.outcome, "reason": record.reason, "detail": detail, "at": at}
        more = {"tries": record.tries, "next_try": record.next_try} if record.next_try else {}
        self.report(run, more, state=State.ENDED, stage=end.stage, **words)

    def report(self, run: Run, words: Mapping[str, Any], **values: Any) -> None:
        """Report a Transition of a run, with how long after its push it came."""
        more = {"seconds": round(values["at"] - run.received, 1), **run_words(run), **words}
        self.doors.reports.emit(Transition(run=run.id, app=run.app, more=more, **values))

    def record_end(self, run: Run, end: Action, at: float, *, switched: bool) -> RunRecord:
        """Record how a run ended, and when it is tried again; return the record.

        A commit is rejected if a deployment says something against it.
        """
        reason = str(end.reason)
        record = replace(RunRecord.of(run), outcome=str(end.outcome), reason=reason)
        record = replace(record, stage=end.stage, detail=clip_lines(end.detail), ended=at)
        app = self.context.apps.get(run.app)
        if app is None:
            return record
        last = self.state.recent(app).runs.get(run.id)
        if last and last.outcome and last.reason == reason and last.ended >= run.received:
            return last  # a process that was killed has recorded it
        config = config_hash(app) if end.reason in CONFIGURED_REASONS else ""
        record = replace(record, config=config)
        if last and is_try_of(run, last):
            record = replace(record, tries=last.tries, tried_since=last.tried_since)
        if may_be_tried_again(end) and not switched:
            record = record.tried_again()
        records: list[RunRecord | Rejection] = [record]
        if rejects(end):
            now = self.doors.clock.now()
            records.append(Rejection(commit=run.commit, reason=reason, at=now, config=config))
        self.state.write(app, *records, with_job=self.context.informers.ids_with_job(app))
        if record.next_try:
            self.context.heads_wanted[app.name].set()  # whose thread starts the next try
        return record

    def mark_jobs(self, jobs: Mapping[str, Job], record: RunRecord) -> None:
        """Mark Jobs as those of a run that has ended; one that still runs is stopped.

        What the next try uses again is kept until then.
        """
        annotations = {ANNOTATION_OUTCOME: record.outcome, ANNOTATION_ENDED: f"{record.ended:.3f}"}
        for job in jobs.values():
            stop = {"activeDeadlineSeconds": 1} if job.state == "active" else {}
            marks = {**annotations, **NO_WAIT}
            kept_from = job.finished or record.ended
            lasting = JOB_TTL + max(0, math.ceil(record.next_try - kept_from))
            self.context.informers.annotate(job, marks, ttlSecondsAfterFinished=lasting, **stop)
            # what finished before this try was counted then
            if job.unsuspended and job.finished >= job.run.received:
                seconds = max(0.0, job.finished - job.unsuspended)
                labels = (job.run.app, job.stage, job.state)
                self.doors.reports.metrics.stage_seconds.labels(*labels).observe(seconds)


def is_try_of(run: Run, last: RunRecord) -> bool:
    """Whether a run goes on with a series of tries, which its last record counts.

    Either it is the next try, or it was one when its start was recorded.
    """
    recorded_start = last.received >= run.received
    return run.delivery == NEXT_TRY or (recorded_start and last.delivery == NEXT_TRY)


def may_be_tried_again(end: Action) -> bool:
    """Whether an end is a circumstance that another try of the same commit may not meet."""
    stopped = end.outcome in (Outcome.FAILED, Outcome.SUPERSEDED)
    return stopped and end.reason in PASSING_CIRCUMSTANCES


def rejects(end: Action) -> bool:
    """Whether an end rejects the commit: a verdict of an environment, unless it repeats one."""
    bad = end.outcome in BAD_OUTCOMES and end.stage not in JOB_STAGES
    return bad and end.reason.is_verdict and end.reason is not Reason.REJECTED


class Informers:
    """The informers of our Jobs and pods, and of the apps' live Services."""

    def __init__(self, config: Config, kubectl: Kubectl) -> None:
        self.config = config
        self.kubectl = kubectl
        ours = f"{LABEL_MANAGED}={MANAGER}"
        namespaces = [config.namespaces[stage] for stage in JOB_STAGES]
        self.jobs = [Informer(kubectl, "jobs", name, Job, ours) for name in namespaces]
        self.pods = [Informer(kubectl, "pods", name, Pod, ours) for name in namespaces]
        self.services: dict[str, Informer[Service]] = {}  # by environment
        for environment, namespace in config.namespaces.items():
            if apps := self.apps_in(environment):
                # with whatever labels: one that lost ours is still what visitors ask
                live = partial(app_service, apps.keys())
                self.services[environment] = Informer(kubectl, "services", namespace, live, "")

    def apps_in(self, environment: str) -> dict[str, App]:
        """Return the apps that are deployed to an environment, by the name of the live Service."""
        apps = [app for app in self.config.apps if environment in app.deploy.environments]
        return {app.service_name: app for app in apps}

    def all(self) -> list[Informer[Any]]:
        """Return every informer."""
        return [*self.jobs, *self.pods, *self.services.values()]

    def all_jobs(self) -> list[Job]:
        """Return all Jobs."""
        return [job for informer in self.jobs for job in informer.items()]

    def all_pods(self) -> list[Pod]:
        """Return all pods of Jobs."""
        return [pod for informer in self.pods for pod in informer.items()]

    def jobs_by_run(self) -> dict[str, dict[str, Job]]:
        """Return the Jobs by run and stage."""
        runs: dict[str, dict[str, Job]] = {}
        for job in self.all_jobs():
            if job.stage in JOB_STAGES:
                runs.setdefault(job.run.id, {})[job.stage] = job
        return runs

    def ids_with_job(self, app: App) -> set[str]:
        """Return the ids of an app's runs of which there is a Job, as far as it can be seen."""
        return {job.run.id for job in self.all_jobs() if job.run.app == app.name}

    def runs_with_jobs(self, app: App, pushes: Iterable[Run]) -> list[Run]:
        """Return the runs of an app's Jobs; while those cannot be followed, of these pushes only.

        Raises KubectlError.
        """
        if not any(informer.trouble for informer in self.jobs):
            return [job.run for job in self.all_jobs() if job.run.app == app.name]
        ids = [id_ for run in pushes for id_ in run_ids(*run_key(run))]
        jobs_by_run = jobs_of(self.kubectl, self.config, ids)
        return [job.run for job in itertools.chain(*jobs_by_run.values())]

    def of(self, job: Job) -> Informer[Job]:
        """Return the informer that follows a Job."""
        return next(informer for informer in self.jobs if informer.namespace == job.namespace)

    def annotate(self, job: Job, annotations: Mapping[str, str | None], **spec: Any) -> None:
        """Write annotations on a Job, and fields of its spec; one that is gone needs none.

        Raises KubectlError.
        """
        change: Object = {"metadata": {"annotations": dict(annotations)}, "spec": spec}
        try:
            patched = self.kubectl.patch("job", job.name, job.namespace, change)
        except KubectlError as failed:
            if failed.kind != "NotFound":
                raise
        else:
            self.of(job).learn(patched)

    def keep_no_report(self, jobs: Mapping[str, Job]) -> None:
        """Keep that tests left no report, once their run goes on; it does not wait for this."""
        if (test := jobs.get("test")) and ANNOTATION_SUMMARY not in test.annotations:
            self.annotate(test, {ANNOTATION_SUMMARY: NO_REPORT})


def task_of(config: Config, app: App, environment: str, run: Run | None = None) -> Task:
    """Return a run on its way into an environment of its app, or whatever run is there."""
    run = run or Run(id="", app=app.name, ref="", commit="")
    namespace = config.namespaces[environment]
    return Task(app=app, environment=environment, namespace=namespace, run=run)


def run_key(run: Run) -> tuple[str, str, str]:
    """Return what identifies a push: app, ref and commit."""
    return run.app, run.ref, run.commit


def recorded_push(run: Run) -> tuple[str, str]:
    """Return what identifies a push among the records of its app: ref and commit."""
    return recorded_ref(run.ref), run.commit


def has_other_commit_elsewhere(app: App, state: AppState, commit: str) -> bool:
    """Whether an environment before the last one has another commit, whose run has ended.

    Then a push of what is live in the last one has something to do. While that run has not ended,
    its commit is on its way here.
    """
    entries = (state.live.get(name) for name in app.deploy.environments[:-1])
    others = [entry for entry in entries if entry and entry.commit != commit]
    records = [state.runs.get(entry.run) for entry in others]
    return any(record is None or record.outcome for record in records)


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
    jobs_by_run: dict[str, list[Job]] = {run: [] for run in runs}
    terms = f"{LABEL_RUN} in ({','.join(jobs_by_run)})"
    for stage in JOB_STAGES if jobs_by_run else ():
        for job in map(Job, kubectl.list("jobs", config.namespaces[stage], "-l", terms)):
            if job.stage in JOB_STAGES:
                jobs_by_run[job.run.id].append(job)
    return jobs_by_run


def reopen(kubectl: Kubectl, run: Run, jobs: Sequence[Job]) -> bool:
    """Let a run that has ended go on where it failed; return whether its push is done with.

    A run under way is left alone. Green Jobs and the digest are reused; a failed Job, also one that
    succeeded with a red report, is deleted, so that the next intake makes it anew, and until it is
    gone the answer is False.
    """
    if not jobs or any(job.deleting for job in jobs):
        return False
    ended = max(job.ended for job in jobs)
    if not has_ended({job.stage: job for job in jobs}) or ended > run.received:
        return True
    failed = [job for job in jobs if not is_reusable(job)]
    obsolete = jobs if any(job.stage == "test" for job in failed) else failed
    for job in obsolete:
        kubectl.delete("job", [job.name], job.namespace)
    annotations = {
        **dict.fromkeys((ANNOTATION_OUTCOME, ANNOTATION_ENDED)),
        **NO_WAIT,
        ANNOTATION_RECEIVED: f"{run.received:.3f}",
        ANNOTATION_DELIVERY: run.delivery,
        ANNOTATION_BY: run.by,
    }
    change = {"metadata": {"annotations": annotations}, "spec": {"ttlSecondsAfterFinished": None}}
    for job in reversed(jobs):  # the last one says whether the run has ended
        if job not in obsolete:
            kubectl.patch("job", job.name, job.namespace, change)
    return len(obsolete) < len(jobs)


# === controller ===================================================================================
# The daemon behind the webhook: one thread observes the cluster, decides what is next for each run,
# and executes it; slow steps run in workers.

RETRIED = ("Unreachable", "Conflict", "Unknown", "NotFound")  # nobody's fault, or ours
WORKER_FAILED = "deployment step failed, will be tried again"
READING_FAILED = "manifests could not be read, will be tried again"
READER = "reader"  # the kind of worker that reads manifests beside the tests
MEASURE_SECONDS = 30.0  # between two measurements of what serves the environments
OLD_LOGS_DELAY = 60.0  # seconds from the start to the first deletion of old logs
READ_AT_ONCE = 4  # runs whose manifests are read; a dead server delays only some of them


class Controller:
    """Puts the parts together, starts their threads and ends them."""

    def __init__(
        self, config: Config, deployer: Deployer, spool: Spool, gitlab: GitLab | None = None
    ) -> None:
        context = ControllerContext(config, deployer, spool)
        self.context = context
        self.clock = context.clock
        self.metrics = context.metrics
        self.heartbeats = context.heartbeats
        self.spooled = context.spooled
        self.informers = context.informers
        self.supervisor = Supervisor(context)
        self.intake = Intake(context)
        self.catch_up = CatchUp(context, self.intake)
        self.workers = Workers(context, self.supervisor)
        self.runs = RunReconciler(context, self.catch_up, self.workers)
        self.services = ServiceReconciler(context, self.workers)
        self.measurements = Measurements(context)
        words = (context.doors.secrets, context.clock)
        jobs_by_run = self.informers.jobs_by_run
        self.events = Events(config, context.kubectl, *words, jobs_by_run)
        gitlab = gitlab or GitLab(context.doors.secrets)
        self.statuses = CommitStatuses(config, gitlab, context.reported_runs, context.state)
        context.doors.reports.sinks += [self.statuses.take, self.events.take]
        self.metrics.spool.set_function(lambda: len(spool))
        self.metrics.begin(config.apps)

    def start(self) -> None:
        """Start every thread; none of them needs the cluster to be there."""
        wake = self.context.wake
        for informer in self.informers.all():
            name = f"watch of {informer.resource} in {informer.namespace}"
            beat = partial(self.heartbeats.beat, name, WATCH_SECONDS + 120.0)
            self.supervisor.spawn(name, partial(informer.run, beat, wake))
        repeat = self.supervisor.repeat
        repeat("intake", "intake waits for the cluster", self.intake.admit_all, self.spooled)
        repeat("controller", STEP_FAILED, self.reconcile, wake)
        repeat("statuses", "commit statuses wait", self.statuses.send_all, self.statuses.news)
        repeat("events", "Events wait", self.events.send_all, self.events.news)
        measure = self.measurements.measure_all
        repeat("measurements", "environments not measured", measure, self.measurements.wanted)
        for app in self.context.config.apps:
            read = partial(self.catch_up.read_heads, app)
            wanted = self.context.heads_wanted[app.name]
            repeat(f"heads of {app.name}", "catch-up waits", read, wanted)

    def reconcile(self) -> float:
        """Reconcile runs and Services, if the informers follow; return when to do so again."""
        retry = self.context.retry
        used = self.clock.thread_time()
        away = any(informer.trouble for informer in self.informers.all())
        self.metrics.waiting.labels("cluster").set(away)
        stages: list[Informer[Any]] = [*self.informers.jobs, *self.informers.pods]
        if not any(informer.trouble for informer in stages):
            open_runs = self.runs.reconcile()
            self.services.reconcile(open_runs)
        self.metrics.waiting.labels("a step").set(retry.failing())
        # where there are many runs, a look takes long, and pushes are to be accepted meanwhile
        self.context.stop.wait(2 * (self.clock.thread_time() - used))
        return min(retry.wait(LOOK_SECONDS), self.workers.retry.wait(LOOK_SECONDS))

    def shut_down(self, seconds: float) -> None:
        """End every thread, then admit what is spooled; the next process does what is cut off."""
        until = self.clock.monotonic() + seconds
        self.context.stop.set()
        self.statuses.ended.set()
        self.events.ended.set()
        for informer in self.informers.all():
            informer.stop()
        wanted = self.context.heads_wanted.values()
        waiting = (self.measurements.wanted, self.statuses.news, self.events.news)
        for event in (self.context.wake, self.spooled, *waiting, *wanted):
            event.set()
        self.supervisor.join(until)
        if self.clock.monotonic() < until - seconds / 2:  # else an API that hangs would take it all
            with suppress(HookError):
                self.intake.admit_all()


@dataclass(frozen=True, slots=True)
class Step:
    """The next step of a run, and what it was decided on."""

    observed: Observation
    action: Action

    @property
    def waits_in_queue(self) -> bool:
        """Whether nothing is to be done but to wait, as for most runs where there are many."""
        job = self.observed.jobs.get(self.action.stage)
        return self.action.do is Do.WAIT and (job is None or job.state == "suspended")

    @property
    def can_wait(self) -> bool:
        """Whether the step can be left to a later look: no run goes on by it."""
        return self.action.do in (Do.END, Do.ASK_HEAD)


class RunReconciler:
    """Brings each run one step further: it observes, decides and executes."""

    def __init__(self, context: ControllerContext, catch_up: CatchUp, workers: Workers) -> None:
        self.context = context
        self.informers = context.informers
        self.catch_up = catch_up
        self.workers = workers
        self.reader = ManifestChecks(context, workers)
        self.waits = Waits(context)
        self.reruns = Reruns(context)
        self.cooldown = Cooldown(context.clock)
        self.trackers: dict[str, ProblemTracker] = {}  # of open runs
        self.events: dict[str, list[PodEvent]] = {}  # of their pods, as far as they were read
        self.jobs: dict[str, Job] = {}  # by name; what is gone until its run's end is recorded
        for app in context.apps:  # a start has more urgent things to do
            self.cooldown.start(f"logs of {app}", OLD_LOGS_DELAY)

    def reconcile(self) -> list[Run]:
        """Take the next step of every open run that has one; return these runs, newest first."""
        jobs_by_run = self.informers.jobs_by_run()
        self.end_vanished_runs(jobs_by_run)
        open_runs = [jobs for jobs in jobs_by_run.values() if not has_ended(jobs)]
        open_runs.sort(key=lambda jobs: -newest_run(jobs).received)
        jobs = [job for jobs in open_runs for job in jobs.values()]
        states = Counter(job.state for job in jobs)
        for state in ("suspended", "active"):
            self.context.metrics.queue.labels(state).set(states[state])
        self.reruns.report(map(newest_run, open_runs))
        active = [job.run for job in jobs if job.state == "active"]
        steps = [Step(observed, decide(observed)) for observed in self.observe_all(open_runs)]
        self.reader.start_all(steps)
        steps = [*self.within_slots(steps, active)]
        self.waits.show(steps)
        self.waits.report(jobs)
        self.execute_all(steps)
        self.context.attempt("Jobs that never ran", self.delete_unrun_jobs)
        self.delete_old_logs()
        return [newest_run(jobs) for jobs in open_runs]

    def end_vanished_runs(self, jobs_by_run: Mapping[str, Mapping[str, Job]]) -> None:
        """End the runs whose Jobs are gone; as many as there is time for in this look."""
        existing = {job.name: job for jobs in jobs_by_run.values() for job in jobs.values()}
        self.jobs |= existing
        until = self.context.clock.monotonic() + LOOK_SECONDS
        states: dict[str, AppState] = {}

        def state(app: App) -> AppState:
            """Return what is recorded of an app, read once in this look."""
            if app.name not in states:
                states[app.name] = self.context.state.read(app)
            return states[app.name]

        for lost in [job for name, job in self.jobs.items() if name not in existing]:
            if self.context.clock.monotonic() < until:
                step = partial(self.end_vanished, lost, jobs_by_run.get(lost.run.id, {}), state)
                self.context.attempt(f"lost {lost.name}", step, **run_words(lost.run))

    def end_vanished(
        self, lost: Job, remaining: Mapping[str, Job], state: Callable[[App], AppState]
    ) -> None:
        """End a run if one of its Jobs disappeared that it still needed, and forget that Job."""
        # only green tests are built; a finished build can be made once more
        green = "build" in remaining and not remaining["build"].outcome
        spare = green if lost.stage == "test" else lost.state == "succeeded"
        if not (spare or lost.outcome or has_ended({lost.stage: lost, **remaining})):
            app = self.context.apps.get(lost.run.app)
            record = state(app).runs.get(lost.run.id) if app else None
            # who ended the run since it was seen has recorded so
            if record is None or not record.outcome or record.ended < lost.run.received:
                detail = f"Job {lost.name} was deleted"
                end = ends(Outcome.FAILED, Reason.VANISHED, detail, lost.stage)
                self.context.recorder.finish(lost.run, remaining or {lost.stage: lost}, end)
        self.jobs.pop(lost.name, None)

    def observe_all(self, open_runs: Sequence[Mapping[str, Job]]) -> Iterator[Observation]:
        """Yield what decides over each run that may be tried now, and forget runs that ended."""
        pods_by_job: dict[str, list[Pod]] = {}
        for pod in self.informers.all_pods():
            pods_by_job.setdefault(pod.job, []).append(pod)
        for ended in self.trackers.keys() - {newest_run(jobs).id for jobs in open_runs}:
            del self.trackers[ended]
            self.events.pop(ended, None)
            self.context.retry.succeeded(ended)
        self.reader.keep({newest_run(jobs).id for jobs in open_runs})
        refs = set[tuple[str, str]]()
        for jobs in open_runs:
            run = newest_run(jobs)
            pods = [pod for job in jobs.values() for pod in pods_by_job.get(job.uid, [])]
            newer = (run.app, run.ref) in refs
            refs.add((run.app, run.ref))
            due = self.context.retry.due(run.id, latest_version(jobs, pods))
            if due and run.app in self.context.apps:
                yield self.observe(jobs, pods, newer=newer)

    def observe(self, jobs: Mapping[str, Job], pods: Sequence[Pod], *, newer: bool) -> Observation:
        """Return what decides over one run."""
        run = newest_run(jobs)
        # in this order: who is done with an environment has written on the Jobs how it ended
        busy = self.workers.busy(run)
        jobs = {s: self.informers.of(job).find(job.name) or job for s, job in jobs.items()}
        informers = self.informers.services.items()
        unseen = frozenset(environment for environment, i in informers if i.trouble)
        events = self.events.get(run.id, [])
        problems = [p for pod in pods for p in pod_problems(pod, events)]
        app = self.context.apps[run.app]
        silent = [p for pod in pods for p in service_problems(pod, app.test.services)]
        stuck = [p for p in pods if p.stays and (p.unschedulable or container_to_start(p))]
        for job in jobs.values():
            refused = job.annotations.get(ANNOTATION_REASON) in CREATION_REASONS
            if refused and lacks_pod(job, pods):
                detail = job.annotations.get(ANNOTATION_DETAIL, "")
                problems.append(job_creation_problem(detail, job.name))
        now = self.context.clock.now()
        tracker = self.trackers.setdefault(run.id, ProblemTracker())
        return Observation(
            app=app,
            run=run,
            jobs=jobs,
            pods=tuple(pods),
            services={e: s for e, i in informers if (s := i.find(app.service_name))},
            head=self.catch_up.head(run),
            newer=newer,
            fatal_problem=tracker.fatal(problems + silent, now),
            busy=busy | unseen,
            now=now,
            queue_timeout=self.context.config.limits.queue_timeout,
            holdup=holdup(stuck, events) or next(iter(silent), None),
            reading=self.reader.reading(run),
        )

    def within_slots(self, steps: Sequence[Step], active: Sequence[Run]) -> Iterator[Step]:
        """Yield each run's next step; one that would start a Job without a slot waits."""
        last_started: dict[str, float] = {}  # when each app last got a slot
        for job in self.informers.all_jobs():
            last = last_started.get(job.run.app, 0.0)
            last_started[job.run.app] = max(last, job.unsuspended)
        starting = (Do.UNSUSPEND, Do.BUILD)
        wanted = [s.observed.run for s in steps if s.action.do in starting]
        most = self.context.config.limits.max_running
        granted = grant_slots(wanted, active, last_started, most, self.context.is_deployed)
        for step in steps:
            if step.action.do in starting and step.observed.run.id not in granted:
                observed = replace(step.observed, slot=False)
                yield Step(observed, without_slot(observed, step.action))
            else:
                yield step

    def execute_all(self, steps: Iterable[Step]) -> None:
        """Execute steps: first those of environments, since a version may be live and unhealthy.

        Ends and questions about the head, of which pushes can make many, come last, and the apps
        take turns. Those that do not fit into this look are left to the next ones, after what came
        meanwhile.
        """
        until = self.context.clock.monotonic() + LOOK_SECONDS
        due = [step for step in steps if not step.waits_in_queue]
        due.sort(key=lambda step: (step.can_wait, step.action.do is not Do.DEPLOY))
        first = [step for step in due if not step.can_wait]
        for step in [*first, *in_turn(due[len(first) :], self.context.is_deployed)]:
            if step.can_wait and self.context.clock.monotonic() > until:
                self.context.wake.set()
                break
            run = step.observed.run
            news = latest_version(step.observed.jobs, step.observed.pods)
            self.context.attempt(run.id, partial(self.execute, step), news, **run_words(run))

    def execute(self, step: Step) -> None:
        """Execute an action, and not again until the cluster shows its effect."""
        observed = step.observed
        action = step.action
        if action.do is Do.ASK_HEAD:
            self.ask_for_head(observed, action)
        elif action.do is Do.WAIT and action.stage in observed.jobs:
            self.wait_for_pod(observed.jobs[action.stage], observed)
        if action.do in (Do.NOTHING, Do.WAIT, Do.ASK_HEAD):
            return
        state = (action.do, action.stage, *(job.version for job in observed.jobs.values()))
        # that an environment is being changed is known without looking
        if action.do is not Do.DEPLOY and not self.cooldown.allows(observed.run.id, state):
            return
        for job in observed.jobs.values():
            if ANNOTATION_REASON in job.annotations:
                self.informers.annotate(job, NO_WAIT)
        self.carry_out(observed, action)
        if action.do in (Do.BUILD, Do.DEPLOY):
            self.informers.keep_no_report(observed.jobs)
        self.cooldown.start(observed.run.id, AGAIN_SECONDS, state)

    def carry_out(self, observed: Observation, action: Action) -> None:
        """Do what an action says."""
        jobs = observed.jobs
        stage = action.stage
        if action.do is Do.ANNOTATE:
            detail = self.context.doors.secrets.mask(action.detail)
            self.informers.annotate(jobs[stage], {JOB_STAGES[stage].annotation: detail})
        elif action.do is Do.UNSUSPEND:
            self.informers.annotate(jobs[stage], {}, suspend=False)
        elif action.do is Do.BUILD:
            self.build(observed)
        elif action.do is Do.DEPLOY:
            digest = jobs["build"].annotations.get(ANNOTATION_DIGEST) if "build" in jobs else ""
            image = f"{observed.app.build.image}@{digest}" if digest else ""
            task = task_of(self.context.config, observed.app, stage, observed.run)
            older = self.catch_up.older_commits(observed.run)
            task = replace(task, image=image, older=older, job=jobs.get("build") or jobs["test"])
            step = partial(self.workers.deploy, task, jobs)
            self.workers.start("worker", task, step, observed.run.received)
        else:
            service = observed.services.get(stage)
            switched = bool(service and service.entry(observed.run.id, observed.run.received))
            self.context.recorder.finish(observed.run, jobs, action, switched=switched)

    def build(self, observed: Observation) -> None:
        """Create a build Job, unsuspended, in the place of one whose pod took its digest along."""
        job = build_job(self.context.config, observed.app, observed.run)
        job["spec"]["suspend"] = False
        namespace = job["metadata"]["namespace"]
        if "build" in observed.jobs:
            if not observed.jobs["build"].outcome:  # else it belongs to an earlier try of the run
                job["metadata"]["annotations"][ANNOTATION_REMADE] = "1"
            args = ("delete", "job", job["metadata"]["name"], "--ignore-not-found")
            self.context.kubectl.run(*args, namespace=namespace)
        try:
            self.context.kubectl.create([job], namespace)
        except KubectlError as refused:
            if refused.kind not in REFUSED_FOR_GOOD:
                raise
            end = ends(Outcome.FAILED, Reason.JOB_REFUSED, refused.said, "build")
            self.context.recorder.finish(observed.run, observed.jobs, end)

    def ask_for_head(self, observed: Observation, action: Action) -> None:
        """Have the heads read, and annotate a run that waits for them with git's last error.

        A server that does not show a push yet is asked less often as time goes on.
        """
        asked = self.catch_up.heads[observed.run.app].asked
        pause = min(HEAD_PAUSE, (observed.now - observed.run.received) / 10)
        if asked < observed.run.received or observed.now - asked >= pause:
            self.context.heads_wanted[observed.run.app].set()
        if observed.now - observed.run.received <= AGAIN_SECONDS:
            return
        job = observed.jobs.get("build") or observed.jobs["test"]
        trouble = self.catch_up.errors.get(observed.run.app, "")
        key = f"{observed.run.id} waits for git, {bool(trouble)}"  # the words of an error vary
        if self.cooldown.allows(key) or job.annotations.get(ANNOTATION_REASON) != action.reason:
            detail = f"{action.detail}; {trouble}" if trouble else action.detail
            detail = clip(self.context.doors.secrets.mask(detail))
            annotations = {ANNOTATION_REASON: str(action.reason), ANNOTATION_DETAIL: detail}
            self.informers.annotate(job, annotations)
            self.cooldown.start(key, 300.0)

    def wait_for_pod(self, job: Job, observed: Observation) -> None:
        """Annotate a Job whose pod is not there or does not start with what is waited for."""
        key = f"Events of {job.name}"
        late = job.state == "active" and 0 < job.unsuspended <= observed.now - LOOK_SECONDS
        # one reading a look holds up no other run
        if not (late and self.cooldown.allows(key) and self.cooldown.allows("Events")):
            return
        self.cooldown.start("Events", LOOK_SECONDS / 4)
        self.cooldown.start(key, EVENTS_SECONDS)
        has_pod = not lacks_pod(job, observed.pods)
        problem = observed.holdup if has_pod else missing_pod(self.context.kubectl, job)
        unexplained = [pod for pod in observed.pods if pod.job == job.uid and is_unexplained(pod)]
        if unexplained:
            with suppress(KubectlError, *SHAPE_ERRORS):
                terms = (f"involvedObject.name={unexplained[0].name}", "involvedObject.kind=Pod")
                events = read_events(self.context.kubectl, job.namespace, *terms)
                self.events[observed.run.id] = events
            problem = holdup(unexplained, self.events.get(observed.run.id, []))
        if problem:
            detail = clip(self.context.doors.secrets.mask(problem.detail), WORDS_LENGTH)
            words = {ANNOTATION_REASON: str(problem.reason), ANNOTATION_DETAIL: detail}
            if any(job.annotations.get(key) != text for key, text in words.items()):
                self.informers.annotate(job, words)
        elif has_pod and ANNOTATION_REASON in job.annotations:
            self.informers.annotate(job, NO_WAIT)

    def delete_unrun_jobs(self) -> None:
        """Delete Jobs of runs that ended without them: those have no time to live."""
        ended = self.context.clock.now() - UNRUN_TTL
        unrun = [j for j in self.informers.all_jobs() if j.outcome and j.state == "suspended"]
        due = [j for j in unrun if j.ended < ended]
        if due:
            namespace = due[0].namespace  # the other one at the next look
            names = [job.name for job in due if job.namespace == namespace][:BATCH]
            self.context.kubectl.delete("job", names, namespace)

    def delete_old_logs(self) -> None:
        """Have the kept logs of an app looked through, of one at each look."""
        due = (a for a in self.context.apps.values() if self.cooldown.allows(f"logs of {a.name}"))
        if app := next(due, None):
            logs = self.context.recorder.logs
            logs.start(partial(logs.delete_expired, app, self.context.config.namespaces))
            self.cooldown.start(f"logs of {app.name}", 3600.0)


def in_turn(steps: Iterable[Step], is_deployed: Callable[[Run], bool]) -> list[Step]:
    """Return steps so that each app has one, then each a second one, and so on.

    Those of an app that tell most come first: of a run that is deployed, and was not superseded.
    """

    def tells_less(step: Step) -> tuple[bool, bool]:
        """Return where a step stands among those of its app."""
        superseded = step.action.outcome is Outcome.SUPERSEDED
        return superseded, not is_deployed(step.observed.run)

    turns = Counter[str]()
    ranked: list[tuple[int, Step]] = []
    for step in sorted(steps, key=tells_less):
        app = step.observed.run.app
        ranked.append((turns[app], step))
        turns[app] += 1
    return [step for _, step in sorted(ranked, key=lambda pair: pair[0])]


def missing_pod(kubectl: Kubectl, job: Job) -> PodProblem | None:
    """Return why no pod of a Job can be created, as its newest Event says it."""
    terms = (f"involvedObject.uid={job.uid}", "reason=FailedCreate")
    events: list[PodEvent] = []
    with suppress(KubectlError, *SHAPE_ERRORS):
        events = read_events(kubectl, job.namespace, *terms)
    newest = max(events, key=lambda event: event.last, default=None)
    return job_creation_problem(newest.text, job.name) if newest else None


def lacks_pod(job: Job, pods: Iterable[Pod]) -> bool:
    """Whether a Job that may run has no pod."""
    return job.state == "active" and job.uid not in {pod.job for pod in pods}


def latest_version(jobs: Mapping[str, Job], pods: Iterable[Pod]) -> int:
    """Return the version of the object of a run that was changed last."""
    return max([*(job.version for job in jobs.values()), *(pod.version for pod in pods)])


class Waits:
    """Shows in metrics and reports what the Jobs of runs wait for."""

    def __init__(self, context: ControllerContext) -> None:
        self.context = context
        self.reasons: set[str] = set()  # since the start
        self.words: dict[str, str] = {}  # of what was reported, by run

    def show(self, steps: Iterable[Step]) -> None:
        """Show for how long each thing has been waited for, 0 where nothing waits for it now."""
        longest = dict.fromkeys(self.reasons, 0.0)
        for step in steps:
            if wait := wait_of(step.observed, step.action):
                seconds = max(0.0, step.observed.now - wait.since)
                longest[wait.reason] = max(longest.get(wait.reason, 0.0), seconds)
        for reason, seconds in longest.items():
            self.context.metrics.queue_wait.labels(reason).set(seconds)
        self.reasons = {*longest}

    def report(self, jobs: Iterable[Job]) -> None:
        """Report what open runs have begun to wait for, as it is written on their Jobs."""
        waiting = {job.run.id: job for job in jobs if ANNOTATION_REASON in job.annotations}
        words = {run: waiting_words(job) for run, job in waiting.items()}
        for run in [run for run, text in words.items() if text != self.words.get(run)]:
            job = waiting[run]
            transition = Transition(
                state=State.WAITS,
                run=run,
                app=job.run.app,
                stage=job.stage,
                reason=clip(job.annotations[ANNOTATION_REASON], 40),
                detail=job.annotations.get(ANNOTATION_DETAIL, ""),
                at=self.context.clock.now(),
            )
            self.context.doors.reports.emit(transition)
        self.words = words


class Reruns:
    """Reports which runs a person lets run again.

    After a start of the process, those that are still under way are reported once more.
    """

    def __init__(self, context: ControllerContext) -> None:
        self.context = context
        self.reported: dict[str, float] = {}  # when runs were let run again

    def report(self, runs: Iterable[Run]) -> None:
        """Report the reruns among open runs that were not reported yet."""
        reruns = {run.id: run for run in runs if run.delivery == RERUN}
        for run in reruns.values():
            if self.reported.get(run.id) != run.received:
                values = {"stage": "test", "by": run.by, "at": run.received}
                self.context.recorder.report(run, {}, state=State.RERUN, **values)
        self.reported = {run.id: run.received for run in reruns.values()}


class ManifestChecks:
    """Reads the manifests of runs in workers, each once, and remembers how a run ends by them."""

    def __init__(self, context: ControllerContext, workers: Workers) -> None:
        self.context = context
        self.workers = workers
        self._under_way: set[str] = set()
        self._ends: dict[str, Action | None] = {}  # by run; None where no manifest has a fault

    def reading(self, run: Run) -> Reading:
        """Return how far the manifests of a run are read."""
        # in this order: a worker writes down what it has read before it ends
        if run.id in self._under_way:
            return Reading(under_way=True)
        return Reading(done=run.id in self._ends, end=self._ends.get(run.id))

    def keep(self, runs: Set[str]) -> None:
        """Forget all runs but these."""
        for run in self._ends.keys() - runs:
            self._ends.pop(run, None)

    def start_all(self, steps: Iterable[Step]) -> None:
        """Start to read what is to be read, for as many runs at a time as is allowed."""
        for observed in (s.observed for s in steps if reads_manifests(s.observed, s.action)):
            if len(self._under_way) < READ_AT_ONCE:
                start = partial(self.start, observed.app, observed.run)
                self.context.attempt("reading of manifests", start, **run_words(observed.run))

    def start(self, app: App, run: Run) -> None:
        """Start to read the manifests of a run, unless those of another run of its app are read."""
        tasks = [task_of(self.context.config, app, e, run) for e in app.deploy.environments]
        self._under_way.add(run.id)
        started = False
        try:
            read = partial(self._read, run, tasks)
            started = self.workers.start(READER, tasks[0], read, run.received)
        finally:
            if not started:
                self._under_way.discard(run.id)

    def _read(self, run: Run, tasks: Sequence[Task]) -> None:
        """Read the manifests of a run for each of its environments; the step of a worker."""
        try:
            app = tasks[0].app
            before = recorded_end(self.context.state.recent(app), app, run)
            faults = {} if before else self.context.deployer.manifest_faults(tasks)
            self._ends[run.id] = before or end_by_faults(faults)
        finally:
            self._under_way.discard(run.id)


class ServiceReconciler:
    """Follows live Services: has drift repaired, reports rollbacks, finishes what claims left."""

    def __init__(self, context: ControllerContext, workers: Workers) -> None:
        self.context = context
        self.workers = workers
        self.cooldown = Cooldown(context.clock)
        self.services: dict[str, Service] = {}  # at the last look
        self.saved: dict[str, HistoryEntry] = {}  # what is live, as it is recorded

    def reconcile(self, open_runs: Sequence[Run]) -> None:
        """Follow each live Service; start what the claims of ended runs left to do."""
        for environment, informer in self.context.informers.services.items():
            apps = self.context.informers.apps_in(environment)
            for service in informer.items():
                app = apps[service.name]
                run = Run(id=service.claim.run, app=app.name, ref="", commit="")
                task = task_of(self.context.config, app, environment, run)
                item = f"live Service of {app.name} in {environment}"
                step = partial(self.follow, item, task, service)
                self.context.attempt(item, step, service.version, **task.words)
                if self.is_claim_due(task, service, open_runs):
                    finish = partial(self.context.deployer.finish_claim, task, service.claim)
                    start = partial(self.workers.start, "worker", task, finish)
                    self.context.attempt(f"claim of {item}", start, **task.words)

    def follow(self, item: str, task: Task, service: Service) -> None:
        """Record what is live while a Service is in order; else have it repaired."""
        before = self.services.get(item)
        self.services[item] = service
        if not service.in_order:
            # where the selector names no run, other pods may come to be reached
            seconds = 6 * AGAIN_SECONDS if service.ours else AGAIN_SECONDS
            if self.cooldown.allows(item, service.version):
                repair = partial(self.context.deployer.steady.guard.repair, task)
                if self.workers.start("selector", task, repair, service.version):
                    self.cooldown.start(item, seconds, service.version)
            return
        self.context.deployer.steady.live.remember(task, service)
        # with nothing seen before, a rollback may be long ago
        if before and before.selector != service.selector:
            self.report_rollback(task, before, service)
        if self.saved.get(item) != service.live:
            self.context.state.write(task.app, live={task.environment: service.live})
            self.saved[item] = service.live

    def report_rollback(self, task: Task, before: Service, service: Service) -> None:
        """Report a rollback that a command has made."""
        left = service.entry(before.run)
        if left.outcome == Outcome.ROLLED_BACK and service.live != service.history[0]:
            transition = Transition(
                state=State.ROLLED_BACK,
                **{**task.words, "run": left.run},
                detail=clip(left.detail),
                at=self.context.clock.now(),
                by="" if service.live.by == MANAGER else clip(service.live.by, 100),
                more={"live": service.live.run},
            )
            self.context.doors.reports.emit(transition)

    def is_claim_due(self, task: Task, service: Service, open_runs: Iterable[Run]) -> bool:
        """Whether a claim is to be finished: its time has come and its run has ended."""
        claim = service.claim
        pauses: dict[str, float] = {
            Phase.DRAINING: task.app.deploy.drain,
            Phase.ROLLBACK: rollback_seconds(task.app, service),
        }
        pause = pauses.get(claim.phase, 0.0)
        if not claim or self.context.clock.now() < claim.since + pause:
            return False
        runs = [run for run in open_runs if run.app == task.app.name]
        # a newer run overwrites the idle colour anyway: restoring it would be in its way
        if claim.phase == Phase.PREPARING and any(map(self.context.is_deployed, runs)):
            return False
        # in the last environment also what drains waits: draining makes the environment busy,
        # and in a busy one the end of a run is not seen
        if claim.phase == Phase.DRAINING and not task.last:
            return True
        return all(run.id != task.run.id for run in runs)


class Measurements:
    """Measures what serves each environment, for the metrics alone: nothing is decided by it."""

    def __init__(self, context: ControllerContext) -> None:
        self.context = context
        self.kubectl = context.kubectl.with_own_slot()
        self.wanted = threading.Event()  # set to have it measured at once

    def measure_all(self) -> float:
        """Measure every environment; return the seconds after which to do so again.

        Raises the last HookError; what could not be measured stays as it was.
        """
        failed: HookError | None = None
        pause = MEASURE_SECONDS
        for environment, informer in self.context.informers.services.items():
            self.context.heartbeats.beat("measurements", STEP_SECONDS)
            if informer.trouble:
                pause = LOOK_SECONDS
                continue
            try:
                self.measure(environment, informer.items())
            except HookError as failure:
                failed = failure
        if failed:
            raise failed
        return pause

    def measure(self, environment: str, services: Iterable[Service]) -> None:
        """Measure the apps of an environment, in two calls; an app without a Service has no values.

        Raises KubectlError.
        """
        apps = self.context.informers.apps_in(environment)
        namespace = self.context.config.namespaces[environment]
        terms = f"{LABEL_SERVICE} in ({','.join(apps)})"
        slices_by_service: dict[str, list[Object]] = {}
        for item in self.kubectl.list("endpointslices", namespace, "-l", terms):
            name = item["metadata"]["labels"][LABEL_SERVICE]
            slices_by_service.setdefault(name, []).append(item)
        deployments = self.deployments_in(namespace)
        recorded = {service.name: service for service in services if service.history}
        metrics = self.context.metrics
        for name, app in apps.items():
            where = (app.name, environment)
            service = recorded.get(name)
            ready = len(ready_endpoints(slices_by_service.get(name, []))) if service else None
            show(metrics.endpoints, where, ready)
            target = service.rollback_target() if service else HistoryEntry()
            deployment = deployments.get(f"{app.name}-{target.colour}")
            is_kept = is_ready_for_rollback(deployment, target) if target.colour else None
            show(metrics.rollback_ready, where, is_kept)
            show(metrics.last_success, where, last_success(service) if service else None)

    def deployments_in(self, namespace: str) -> dict[str, Object]:
        """Return the Deployments of all apps by name, without their templates, which may be large.

        Raises KubectlError.
        """
        address = list_address("deployments", namespace, f"{LABEL_MANAGED}={MANAGER}")
        return {
            deployment["metadata"]["name"]: {
                "metadata": {"labels": part_of(deployment, "metadata", "labels")},
                "spec": {"replicas": replicas_of(deployment)},
                "status": part_of(deployment, "status"),
            }
            for page in self.kubectl.pages(address, namespace)
            for deployment in page["items"]
        }


def show(gauge: Any, where: Sequence[str], value: float | None) -> None:
    """Set a gauge, or take its value away where there is nothing to measure."""
    if value is None:
        gauge.remove(*where)
    else:
        gauge.labels(*where).set(value)


def is_ready_for_rollback(deployment: Object | None, target: HistoryEntry) -> bool:
    """Whether the Deployment of a rollback's target is there, and all pods that it keeps ready."""
    if part_of(deployment or {}, "metadata", "labels").get(LABEL_RUN) != target.run:
        return False  # a newer version stands in its colour, or nothing does
    ready = part_of(deployment or {}, "status").get("readyReplicas", 0)
    return bool(ready >= replicas_of(deployment))


def last_success(service: Service) -> float | None:
    """Return when the newest version went live that was deployed and confirmed, None for never."""
    times = [entry.at for entry in service.history if entry.outcome == Outcome.DEPLOYED]
    return max(times, default=None)


class Workers:
    """Runs the slow steps in threads, one at a time for each app and environment."""

    def __init__(self, context: ControllerContext, supervisor: Supervisor) -> None:
        self.context = context
        self.supervisor = supervisor
        self.retry = Retry(context.clock)  # by the name of a worker
        self._running: set[str] = set()

    def busy(self, run: Run) -> frozenset[str]:
        """Return the environments in which a run's app is changed, or tried again later.

        A push that is newer than the one that failed there need not wait for that.
        """
        environments = self.context.apps[run.app].deploy.environments
        names = {e: f"worker of {run.app} in {e}" for e in environments}
        return frozenset(e for e, name in names.items() if self._blocked(name, run.received))

    def start(self, kind: str, task: Task, step: Callable[[], None], news: Any = None) -> bool:
        """Run a step in a thread, unless one of its kind runs there, or waits for its next try.

        Returns whether it was started. Raises HookError when there can be no more threads.
        """
        name = f"{kind} of {task.app.name} in {task.environment}"
        if self._blocked(name, news):
            return False
        self._running.add(name)
        try:
            run = partial(self._run, name, task, step, news)
            self.supervisor.spawn(name, run, again=False)
        except HookError:
            self._running.discard(name)
            raise
        return True

    def _blocked(self, name: str, news: Any) -> bool:
        """Whether a worker of that name runs, or has failed and waits for its next try."""
        # in this order: one that fails meanwhile is put off before it is no longer running
        return name in self._running or not self.retry.due(name, news)

    def _run(self, name: str, task: Task, step: Callable[[], None], news: Any) -> None:
        """Take a step in its thread; the controller looks at the effect at once."""
        complaint = READING_FAILED if name.startswith(READER) else WORKER_FAILED
        try:
            with self.retry.contain(name, complaint, news, **task.words):
                try:
                    step()
                except (HookError, OSError):
                    if not self.context.stop.is_set():
                        raise
        finally:
            self._running.discard(name)
            self.context.wake.set()

    def deploy(self, task: Task, jobs: Mapping[str, Job]) -> None:
        """Deploy a run, and record how it ended if it ended here; the step of a worker."""
        started = self.context.clock.monotonic()
        end = self._end_of_deployment(task)
        seconds = self.context.clock.monotonic() - started
        labels = (task.app.name, task.environment, end.outcome if end else "ok")
        self.context.metrics.stage_seconds.labels(*labels).observe(seconds)
        if end:
            service = self.context.deployer.live_service(task)
            if service is None:
                self.context.deployer.collect_garbage(task)
            switched = bool(service and service.entry(task.run.id, task.run.received))
            self.context.recorder.finish(task.run, jobs, end, switched=switched)

    def _end_of_deployment(self, task: Task) -> Action | None:
        """Deploy a run; return how it ended, or None when it is live in this environment.

        Raises HookError for what another try may change.
        """
        try:
            # a run that was rejected before a crash may still look open
            state = self.context.state.read(task.app)
            if end := recorded_end(state, task.app, task.run):
                return end
            rejected = state.rejection(task.app, task.run.commit)
            # what is live already is watched to its end, whatever another environment has said
            if rejected and not self.context.deployer.is_live(task):
                raise StageError(Reason.REJECTED, "the commit was rejected")
            self.context.deployer.deploy(task)
        except RunError as stopped:
            outcome = OUTCOMES.get(stopped.reason, stopped.outcome)
            return ends(outcome, stopped.reason, stopped.detail, task.environment)
        except KubectlError as refused:
            is_live = self.context.deployer.is_live(task)
            reason = refusal_reason(refused)
            if reason is None or is_live:
                raise
            return ends(Outcome.FAILED, reason, refused.said, task.environment)
        return None


def recorded_end(state: AppState, app: App, run: Run) -> Action | None:
    """Return the recorded end of a run whose commit is rejected, where its Jobs lack it yet.

    One in words that only a newer version has is not known.
    """
    record = state.runs.get(run.id)
    rejected = state.rejection(app, run.commit) and not newer_than(run, state)
    reason = Reason.of(record.reason) if record else None
    if not (rejected and record and reason and record.outcome in set(Outcome)):
        return None
    return ends(Outcome(record.outcome), reason, record.detail, record.stage)


def refusal_reason(refused: KubectlError) -> Reason | None:
    """Return why a deployment ends that the API server refused, None where another try may help."""
    message = refused.message
    if refused.kind in RETRIED:
        return None
    if refused.kind == "Forbidden":
        # A role of ours that lacks a verb is not the manifest's fault, another Forbidden is.
        # There are two spaces in the text because quoted names were taken out of it.
        if PASSING_REFUSAL.search(message) or re.search("User  cannot [a-z]+ resource ", message):
            return None
        if "exceeded quota: " in message:
            return Reason.QUOTA_EXCEEDED
    return Reason.MANIFEST_INVALID


class Supervisor:
    """Starts the threads, runs them again after a bug, and ends them."""

    def __init__(self, context: ControllerContext) -> None:
        self.context = context
        self.retry = Retry(context.clock)  # by the name of a thread
        self._threads: dict[str, threading.Thread] = {}

    def repeat(
        self, name: str, complaint: str, step: Callable[[], float], event: threading.Event
    ) -> None:
        """Run a thread that takes a step when its event is set, or so long after the last one."""

        def body() -> None:
            """Take step after step until stopped."""
            while not self.context.stop.is_set():
                self.context.heartbeats.beat(name, STEP_SECONDS)
                event.clear()
                pause: float | None = None
                with self.retry.contain(name, complaint, what=name):
                    pause = step()
                    if self.retry.succeeded(name):
                        info("recovered", what=name)
                self.context.metrics.waiting.labels(name).set(pause is None)
                if pause is None:
                    self.context.stop.wait(self.retry.delay(name))
                    continue
                self.context.heartbeats.beat(name, pause + STEP_SECONDS)
                event.wait(pause)
                self.context.stop.wait(0.05)  # a burst of events is one look

        self.spawn(name, body)

    def spawn(self, name: str, body: Callable[[], None], *, again: bool = True) -> None:
        """Run a thread; a bug in it is logged and counted, and its body run again if so wanted.

        Raises HookError when there can be no more threads.
        """

        def run() -> None:
            """Run the body, and again after a bug in it if so wanted."""
            while not self.context.stop.is_set():
                try:
                    body()
                    break
                except Exception:  # noqa: BLE001 - a thread ends here: logged, counted, run again
                    error("a thread failed", exc=True, thread=name)
                    self.context.metrics.errors.labels(name.partition(" ")[0]).inc()
                    if not again or self.context.stop.wait(1.0):
                        break

        thread = threading.Thread(target=run, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as full:  # of processes and threads, as the operating system counts
            raise HookError(str(full)) from full
        self._threads[name] = thread

    def join(self, until: float) -> None:
        """Wait for the end of every thread, at most until a time of the monotonic clock."""
        for thread in [*self._threads.values()]:
            thread.join(max(0.0, until - self.context.clock.monotonic()))


# === page =========================================================================================
# How environments and runs stand, as commands and the page show it; and the page itself: HTML
# without scripts, made of what is in memory, and of nothing from outside that is not escaped.

NAMED_RUNS = 3  # of those that take the slots, in what another one waits for
AGE_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
NEWEST_RUNS = 30  # that the first page lists
APP_RUNS = 200  # that the page of an app lists
SHOWN_LENGTH = 500  # characters of one text
REFRESH_SECONDS = 5  # after which a browser loads a page again on which something is under way
LOG_SECONDS = 2.0  # in which the log of a run must be read
PLACE_TITLES = ("Live version", "Since", "Rollback to", "Under way")
RUN_TITLES = ("Run", "Stages", "State", "What there is to say")
STAGE_TITLES = ("Stage", "State", "Began", "Ended", "Took", "What it says")
SWITCH_TITLES = ("When", "Version", "Outcome", "By", "Why")
STAGE_WORDS = {
    StatusState.PENDING: "waiting",
    StatusState.RUNNING: "running",
    StatusState.SUCCESS: "passed",
    StatusState.FAILED: "failed",
    StatusState.CANCELED: "stopped",
}
STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f6f8fa; --text: #1b1f24; --soft: #57606a;
  --line: #d0d7de; --link: #0550ae; --good: #0c5a26; --on-good: #d8f5df; --bad: #9a0d22;
  --on-bad: #ffe6e4; --busy: #0a4a94; --on-busy: #dcebff; --wait: #6a4a00; --on-wait: #fdf0c8;
  --on-off: #eaeef2; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --card: #161b22; --text: #e6edf3;
  --soft: #9aa5b1; --line: #30363d; --link: #79b8ff; --good: #7ee29a; --on-good: #12331d;
  --bad: #ffa198; --on-bad: #47191c; --busy: #a5d0ff; --on-busy: #12305a; --wait: #f0cf7a;
  --on-wait: #3b2f0b; --on-off: #262c36; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer { max-width: 76rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 1rem; }
footer { padding-top: 1.5rem; padding-bottom: 2rem; color: var(--soft); font-size: .87em; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .6rem 0 .8rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
a { color: var(--link); text-underline-offset: .15em; }
a:focus-visible, pre:focus-visible { outline: 3px solid var(--link); outline-offset: 2px;
  border-radius: 3px; }
nav ol { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem .5rem; margin: 0;
  padding: 0; }
nav li + li::before { content: "/"; color: var(--soft); margin-right: .5rem; }
code, pre, .id { font-size: .93em;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.soft { color: var(--soft); font-weight: 400; }
time { white-space: nowrap; }
time.soft { display: block; }
.notice { margin: .8rem 0; padding: .6rem .9rem; border-radius: 6px; background: var(--on-wait);
  color: var(--wait); }
table { width: 100%; border-collapse: collapse; border: 1px solid var(--line); }
th, td { padding: .5rem .7rem; text-align: left; vertical-align: top; overflow-wrap: anywhere;
  border-top: 1px solid var(--line); }
thead th { background: var(--card); color: var(--soft); font-size: .87em; font-weight: 600;
  border-top: 0; white-space: nowrap; }
tbody th { font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) minmax(0, 1fr);
  gap: .4rem 1.2rem; margin: 0; padding: .9rem 1rem; border: 1px solid var(--line);
  border-radius: 6px; background: var(--card); }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.lines { white-space: pre-line; }
pre { margin: 0; padding: .8rem 1rem; max-height: 32rem; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); }
.bar { display: flex; flex-wrap: wrap; gap: 3px; list-style: none; margin: 0; padding: 0; }
.bar li { flex: 0 0 6.9rem; font-size: .87em; line-height: 1.35; border-radius: 4px;
  padding: .15rem .5rem; }
.bar b { display: block; font-weight: 600; }
.state { border-radius: 4px; padding: .1rem .5rem; white-space: nowrap; font-weight: 600; }
.off { background: var(--on-off); color: var(--soft); }
.success { background: var(--on-good); color: var(--good); }
.failed { background: var(--on-bad); color: var(--bad); }
.running { background: var(--on-busy); color: var(--busy); }
.pending { background: var(--on-wait); color: var(--wait); }
.canceled { background: var(--on-off); color: var(--text); }
.success > i::before { content: "\\2713  " / ""; }
.failed > i::before { content: "\\2717  " / ""; }
.running > i::before { content: "\\25CF  " / ""; }
.pending > i::before { content: "\\25CB  " / ""; }
.canceled > i::before { content: "\\2013  " / ""; }
i { font-style: normal; }
@media (min-width: 70rem) { .bar { min-width: 28.2rem; } tbody th { min-width: 9.5rem; } }
@media (max-width: 50rem) {
  header, main, footer { padding-left: .9rem; padding-right: .9rem; }
  table, tbody, tr, th, td { display: block; }
  table { border: 0; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tbody tr { border: 1px solid var(--line); border-radius: 6px; margin-bottom: .7rem;
    padding: .3rem 0; }
  tbody th, tbody td { border: 0; padding: .25rem .8rem; display: grid; gap: .6rem;
    grid-template-columns: 6.5rem minmax(0, 1fr); }
  tbody th::before, tbody td::before { content: attr(data-title); color: var(--soft);
    font-weight: 400; font-size: .87em; }
  tbody td:empty { display: none; }
  .bar li { flex-basis: 6.4rem; }
}
@media (max-width: 30rem) {
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: .5rem; }
}
"""
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
CONTENT_POLICY = f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; base-uri 'none'; "
CONTENT_POLICY += "form-action 'none'; frame-ancestors 'none'"
PAGE_HEADERS = (
    ("Content-Type", "text/html; charset=utf-8"),
    ("Content-Security-Policy", CONTENT_POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
)


class Html(str):
    """Text that is HTML already: what Markup makes, and constants."""

    __slots__ = ()


class PageWriter:
    """Writes the page of all apps, of one, or of one run, each from one look at what is in memory.

    Only the log of a run is read from the cluster, on the page of that run.
    """

    def __init__(self, context: ControllerContext, markup: Markup, logs: KeptLogs) -> None:
        self.apps = context.apps
        self.look = look_at(context)
        self.markup = markup
        self.logs = logs
        self.tag = markup.tag
        self.ids = short_ids([seen.run.id for seen in self.look.runs])

    def overview(self, _name: str) -> Html:
        """Return the page of all apps."""
        titles = ("App", "Environment", *PLACE_TITLES)
        rows = [
            [self.app_link(place.app), place.environment, *self.place_cells(place)]
            for place in self.look.places
        ]
        newest_runs = self.look.runs[:NEWEST_RUNS]
        content = [
            self.tag("h2", "Environments"),
            self.table(titles, rows, "No app has an environment."),
            self.tag("h2", "Newest runs"),
            self.runs(newest_runs, len(self.look.runs)),
        ]
        return self.page("Apps and runs", [], content, self.look.is_busy())

    def app(self, name: str) -> Html | None:
        """Return the page of an app, None if there is no such app."""
        app = self.apps.get(name)
        if app is None:
            return None
        places = [place for place in self.look.places if place.app == name]
        runs = [seen for seen in self.look.runs if seen.app is app]
        rows = [[place.environment, *self.place_cells(place)] for place in places]
        content = [
            self.terms({"Repository": app.repository, "Branch": app.branch}),
            self.tag("h2", "Environments"),
            self.table(("Environment", *PLACE_TITLES), rows, "It has no environments."),
            self.tag("h2", "Runs"),
            self.runs(runs[:APP_RUNS], len(runs)),
            self.tag("h2", "Switches") if places else Html(),
            *(self.switches(place) for place in places),
        ]
        return self.page(name, [], content, self.look.is_busy(name))

    def run(self, name: str) -> Html | None:
        """Return the page of a run, None if nothing is left of it."""
        seen = next((seen for seen in self.look.runs if seen.run.id == name), None)
        if seen is None:
            return None
        status = self.look.status(seen)
        content = [
            self.facts(seen, status),
            self.tag("h2", "Stages"),
            self.stages(seen),
            self.tag("h2", "Log"),
            self.log(status, seen.app),
        ]
        trail = [self.app_link(seen.app.name)]
        return self.page(f"Run {self.ids[name]}", trail, content, self.look.is_open(seen))

    def missing(self) -> Html:
        """Return the page that says that there is no such page."""
        text = "No app has this name, or nothing is left of this run: no Job and no record."
        return self.page("Not found", [], [self.tag("p", text)], busy=False)

    def page(self, title: str, trail: Sequence[Html], content: Sequence[Html], busy: bool) -> Html:
        """Return a whole document."""
        home = self.markup.link("gitops-hook")
        trail = [home, *trail, self.tag("span", title, aria_current="page")]
        steps = [self.tag("li", step) for step in trail]
        refresh = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">' if busy else ""
        again = f"It is loaded again every {REFRESH_SECONDS} seconds while something is under way."
        shown_at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.look.now))
        notices = [self.tag("p", n, class_="notice", role="status") for n in self.look.notices]
        footer = f"As it was at {shown_at}. {again if busy else 'Nothing here is under way.'}"
        body = [
            self.tag("header", self.tag("nav", self.tag("ol", *steps), aria_label="Where you are")),
            self.tag("main", self.tag("h1", title), *notices, *content),
            self.tag("footer", footer),
        ]
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        named = self.tag("title", f"{title} - gitops-hook")
        start = f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}{refresh}{named}'
        style = f"<style>{STYLE}</style></head>"
        return Html("\n".join([start, style, "<body>", *body, "</body>\n</html>\n"]))

    def place_cells(self, place: EnvironmentStatus) -> list[Html]:
        """Return what is live in an environment, since when, and the rest of PLACE_TITLES."""
        versions = (self.version(place.live), self.version(place.target))
        return [versions[0], self.moment(place.live.at), versions[1], self.doings(place)]

    def doings(self, place: EnvironmentStatus) -> Html:
        """Return what happens in an environment, or is wrong there."""
        lines = []
        if place.claim:
            bakes = place.bake_until > self.look.now and place.claim.phase == Phase.BAKING
            more = f", {age(self.look.now, place.bake_until)} left" if bakes else ""
            phase = self.badge(f"{place.claim.phase}{more}", "running")
            lines.append(self.tag("div", phase, Html(" "), self.run_link(place.claim.run)))
        if place.drift:
            lines.append(self.tag("div", f"Someone changed the selector: {place.drift}"))
        if place.reverted:
            why = f": {place.reverted.reason}: {place.reverted.detail}"
            left = f"{place.reverted.outcome or 'left'}{why}"
            lines.append(self.tag("div", self.version(place.reverted), Html(" "), left))
        return Html("".join(lines))

    def version(self, entry: HistoryEntry) -> Html:
        """Return a version: its commit, as a link to its run if that is there, and its colour."""
        if not (entry or entry.run):
            return self.tag("span", "none", class_="soft")
        shown = self.run_link(entry.run, entry.commit[:8]) if entry.run else "adopted"
        return Html(f"{shown} {self.tag('span', entry.colour, class_='soft')}")

    def runs(self, runs: Sequence[ReportedRun], total: int) -> Html:
        """Return the table of runs, newest first, and how many more there are."""
        rows = [self.run_cells(seen) for seen in runs]
        shown = self.table(RUN_TITLES, rows, "There is no run yet.")
        if len(runs) == total:
            return shown
        more = self.tag("p", f"These are the newest {len(runs)} of {total} runs.", class_="soft")
        return Html(shown + more)

    def run_cells(self, seen: ReportedRun) -> list[Html]:
        """Return the row of a run."""
        status = self.look.status(seen)
        branch = self.tag("div", seen.run.branch, class_="soft")
        name = Html(f"{self.run_link(seen.run.id)}{branch}")
        state = Html(self.run_state(status) + self.tag("div", self.moment(seen.run.received)))
        reason = self.tag("b", status.reason) if status.reason not in ("", Reason.OK) else ""
        texts = [status.waits_for or status.detail, status.next_words(self.look.now), status.advice]
        said = Html(reason + "".join(map(self.lines, texts)))
        return [name, self.bar(seen), state, said]

    def run_state(self, status: RunStatus) -> Html:
        """Return how a run stands, in the words of `status`."""
        kind = END_STATES.get(status.outcome, StatusState.RUNNING)
        words = status.outcome or f"{status.stage} {status.state}"
        if status.next_try:
            words = f"{status.outcome} for now"
        if status.next_try or status.state in ("suspended", "lost", "unknown"):
            kind = StatusState.PENDING
        return self.badge(words, str(kind))

    def badge(self, words: str, kind: str) -> Html:
        """Return the words of a state, with a sign and in colours of their own."""
        return self.tag("span", self.tag("i", words), class_=f"state {kind}")

    def bar(self, seen: ReportedRun) -> Html:
        """Return the stages of a run side by side, each with its state as a word."""
        items = []
        for stage, view in stages_of(seen).items():
            word = self.tag("i", view.word)
            items.append(self.tag("li", self.tag("b", stage), Html(" "), word, class_=view.kind))
        return self.tag("ol", *items, class_="bar", aria_label="Stages")

    def facts(self, seen: ReportedRun, status: RunStatus) -> Html:
        """Return what there is to say of a run, as a list of terms."""
        run = seen.run
        waits = "" if status.waits_for == status.detail else status.waits_for
        return self.terms(
            {
                "Id": self.tag("span", run.id, class_="id"),
                "App": self.app_link(seen.app.name),
                "Branch": run.branch,
                "Commit": self.markup.commit(seen.app, run.commit),
                "Title": run.title,
                "Run again by" if run.delivery == RERUN else "Pushed by": run.by,
                "Pushed": self.whole_moment(run.received),
                "State": self.run_state(status),
                "Reason": status.reason,
                "Details": self.lines(status.detail),
                "Waits for": waits,
                "Advice": status.advice,
                "Next try": status.next_words(self.look.now),
            }
        )

    def terms(self, texts: Mapping[str, str]) -> Html:
        """Return a list of terms and what is said of each, without those of which nothing is."""
        pairs = [(self.tag("dt", term), self.tag("dd", t)) for term, t in texts.items() if t]
        return self.tag("dl", *itertools.chain(*pairs))

    def stages(self, seen: ReportedRun) -> Html:
        """Return the table of a run's stages."""
        rows = []
        for stage, view in stages_of(seen).items():
            badge = self.badge(view.word, view.kind)
            moments = (self.whole_moment(view.began), self.whole_moment(view.ended), view.took)
            rows.append([stage, badge, *moments, self.lines(view.text)])
        return self.table(STAGE_TITLES, rows, "")

    def switches(self, place: EnvironmentStatus) -> Html:
        """Return the history of an environment: its switches, newest first."""
        rows = []
        for entry in place.history:
            why = ": ".join(filter(None, (entry.reason, entry.detail)))
            words = (entry.outcome or "not confirmed", entry.by or MANAGER, why)
            rows.append([self.whole_moment(entry.at), self.version(entry), *words])
        shown = self.table(SWITCH_TITLES, rows, "Nothing was switched yet.")
        return Html(self.tag("h3", place.environment) + shown)

    def log(self, status: RunStatus, app: App) -> Html:
        """Return the kept log of a run, or why there is none."""
        try:
            texts = self.logs.read(app, status)
        except HookError as failed:
            return self.tag("p", f"The log cannot be read now: {failed}", class_="notice")
        blocks = []
        for title, text in texts.items():
            block = self.markup.block(text)
            blocks.append(self.tag("h3", title))
            blocks.append(self.tag("pre", block, tabindex="0", role="region", aria_label="Log"))
        none = "No log is kept: logs are kept for a day, and only of what failed."
        return Html("".join(blocks)) if blocks else self.tag("p", none)

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[str]], none: str) -> Html:
        """Return a table, in each row first its head; without rows it is what is said of `none`."""
        if not rows:
            return self.tag("p", none)
        heads = [self.tag("th", title, scope="col", role="columnheader") for title in titles]
        body = []
        for row in rows:
            cells = [
                self.tag("td", self.tag("div", cell) if cell else cell, role="cell", data_title=t)
                for t, cell in zip(titles[1:], row[1:], strict=True)
            ]
            first = self.tag("div", row[0])
            words = {"scope": "row", "role": "rowheader", "data_title": titles[0]}
            body.append(self.tag("tr", self.tag("th", first, **words), *cells, role="row"))
        head = self.tag("thead", self.tag("tr", *heads, role="row"), role="rowgroup")
        return self.tag("table", head, self.tag("tbody", *body, role="rowgroup"), role="table")

    def lines(self, text: str) -> Html:
        """Return a text of several lines; nothing where there is none."""
        return self.tag("div", text, class_="lines") if text else Html()

    def app_link(self, name: str) -> Html:
        """Return a link to the page of an app."""
        return self.markup.link(name, "apps", name)

    def run_link(self, run: str, words: str = "") -> Html:
        """Return a link to the page of a run; only its id if nothing is left of it."""
        words = words or self.ids.get(run, run)
        if run not in self.ids:
            return self.tag("span", words, class_="id")
        return self.tag("span", self.markup.link(words, "runs", run), class_="id")

    def whole_moment(self, at: float) -> Html:
        """Return how long ago something was, and below it when; nothing for no time."""
        shown = self.moment(at)
        stamp = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at)) if shown else ""
        return Html(shown + self.tag("time", stamp, class_="soft")) if shown else shown

    def moment(self, at: float) -> Html:
        """Return how long ago something was, with the time itself as its title."""
        if not 0 < at < FAR_FUTURE:
            return Html()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
        words = f"{age(at, self.look.now)} ago"
        return self.tag("time", words, datetime=stamp, title=stamp)


class Markup:
    """Makes HTML: whatever is put into it, and is not Html, is masked, bounded and escaped."""

    def __init__(self, secrets: Sequence[str], home: str) -> None:
        self.secrets = secrets
        self.home = home  # a relative link to the first page: behind a proxy it may be anywhere
        self._texts: dict[str, Html] = {}  # many occur often

    def text(self, value: str) -> Html:
        """Return outside text as HTML: lines in which blanks stand for what is not printable."""
        if value not in self._texts:
            masked = str(mask_value(value, self.secrets))[: 20 * SHOWN_LENGTH]
            lines = (clip(line, SHOWN_LENGTH) for line in masked.split("\n")[: LISTED_FAULTS + 1])
            self._texts[value] = Html(html.escape("\n".join(lines)))
        return self._texts[value]

    def block(self, value: str) -> Html:
        """Return a log as HTML, its end at most, with control characters spelled out."""
        masked = str(mask_value(value, self.secrets))
        return Html(html.escape(printable(masked[-LOG_BYTES:])))

    def tag(self, name: str, *content: str, **attributes: str) -> Html:
        """Return an element; names of attributes may end in _, and have _ in the place of -.

        Attributes are our own words. They are escaped, and nothing is hidden in them.
        """
        inner = "".join(c if isinstance(c, Html) else self.text(c) for c in content)
        more = "".join(
            f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
            for key, value in attributes.items()
        )
        return Html(f"<{name}{more}>{inner}</{name}>")

    def link(self, words: str, *path: str) -> Html:
        """Return a link to another page of ours, to the first one without a path."""
        address = self.home + "/".join(quote(part, safe="") for part in path)
        return self.tag("a", words, href=address or "./")

    def commit(self, app: App, commit: str) -> Html:
        """Return a commit, as a link to GitLab where the repository has a web address."""
        base = app.repository.removesuffix(".git")
        shown = self.tag("span", commit, class_="id")
        if not (re.match("https?://", base) and SHA.fullmatch(commit)):
            return shown
        address = f"{base}/-/commit/{commit}"
        return self.tag("a", shown, href=address, rel="noreferrer noopener")


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What one look at what is in memory has shown; nothing changes it."""

    now: float
    runs: Sequence[ReportedRun]  # newest first
    places: Sequence[EnvironmentStatus]
    states: Mapping[str, AppState]  # by app
    slots: str  # who takes the slots
    notices: Sequence[str]

    def status(self, seen: ReportedRun) -> RunStatus:
        """Return how a run stands, as `status` says it."""
        state = self.states[seen.app.name]
        status = run_status(seen.app, state, seen.run.id, seen.jobs).waiting(self.slots)
        return status.as_claimed([p for p in self.places if p.app == seen.app.name])

    def is_open(self, seen: ReportedRun) -> bool:
        """Whether a run is under way."""
        claimed = any(place.claim.run == seen.run.id for place in self.places)
        return claimed or (seen.end is None and bool(seen.jobs) and not has_ended(seen.jobs))

    def is_busy(self, app: str = "") -> bool:
        """Whether anything is under way, of one app or of all."""
        claimed = any(place.claim for place in self.places if app in ("", place.app))
        own = (seen for seen in self.runs if app in ("", seen.app.name) and seen.end is None)
        return claimed or any(map(self.is_open, own))


def look_at(context: ControllerContext) -> Look:
    """Return what is in memory now, whatever other threads change; the cluster is not asked."""
    seen_states = {name: context.state.last(app) for name, app in context.apps.items()}
    states = {name: state or AppState() for name, state in seen_states.items()}
    runs = context.observed_runs(states)
    runs.sort(key=lambda seen: (-seen.run.received, seen.run.id))
    notices = []
    if trouble := next((i.trouble for i in context.informers.all() if i.trouble), ""):
        notices.append(f"The cluster cannot be followed, so this may be old: {trouble}")
    if unread := [name for name, state in seen_states.items() if state is None]:
        notices.append(f"Records are not read yet of: {', '.join(unread)}.")
    if stored := len(context.spool):
        notices.append(f"Pushes that are stored, and not in the cluster yet: {stored}.")
    places = (
        place_of(context, app, environment, states[app.name])
        for app in context.config.apps
        for environment in app.deploy.environments
    )
    groups = (seen.jobs for seen in runs if seen.jobs)
    return Look(
        now=context.clock.now(),
        runs=runs,
        places=tuple(places),
        states=states,
        slots=slot_words(groups, context.config.limits.max_running),
        notices=notices,
    )


def place_of(
    context: ControllerContext, app: App, environment: str, state: AppState
) -> EnvironmentStatus:
    """Return what is live in an environment, as far as it is in memory."""
    informer = context.informers.services.get(environment)
    service = (informer.find(app.service_name) if informer else None) or Service(NO_SERVICE)
    entry = state.live.get(environment)
    recorded = Service.from_entry(app.service_name, entry) if entry else None
    source = service if service.history else recorded
    place = EnvironmentStatus.of(app, environment, service, source)
    reported = context.deployer.steady.live.remembered.drifts.get((app.name, environment))
    if reported is None or reported.selector != service.selector:
        return place
    return replace(place, drift=reported.drift)


@dataclass(frozen=True, slots=True)
class StageView:
    """How a stage of a run is shown; times are 0 where they are not known or not yet there."""

    word: str
    kind: str  # of its badge
    text: str
    began: float
    ended: float

    @property
    def took(self) -> str:
        """How long it took; "" where that is not known."""
        return age(self.began, self.ended) if self.began and self.ended else ""


def stages_of(seen: ReportedRun) -> dict[str, StageView]:
    """Return how each stage of a run stands, also those that it has not reached."""
    reached = {status.stage: status for status in seen.statuses()}
    return {s: stage_view(seen, s, reached.get(s)) for s in (*seen.stages, *reached)}


def stage_view(seen: ReportedRun, stage: str, status: StageStatus | None) -> StageView:
    """Return how a stage stands, and its times: of a Job, or of a deployment up to its switch."""
    end = seen.end.ended if seen.end and seen.end.stage == stage else 0.0
    began = 0.0
    if job := seen.jobs.get(stage):
        began = job.unsuspended
        end = job.finished or end
    elif service := seen.services.get(stage):
        began = service.claim.since if service.claim.run == seen.run.id else 0.0
        end = service.entry(seen.run.id, seen.run.received).at or end
    if status is None:
        return StageView("not begun", "off", "", began, 0.0)
    state = status.state
    return StageView(STAGE_WORDS[state], state, status.text, began, end if status.is_final else 0.0)


class KeptLogs:
    """Reads the kept logs of runs, one at a time: whoever else wants one is not kept waiting."""

    def __init__(self, config: Config, kubectl: Kubectl) -> None:
        self.namespaces = config.namespaces
        self.kubectl = kubectl.with_own_slot()
        self._reading = threading.Lock()

    def read(self, app: App, status: RunStatus) -> dict[str, str]:
        """Return the last lines of what failed of a run, by where they were printed.

        Raises HookError, after LOG_SECONDS at the latest.
        """
        good = (Outcome.TESTED, Outcome.DEPLOYED)
        failed = status.state == "ended" and status.outcome not in good
        kept = status.stage in JOB_STAGES or app.deploy.log_tails
        namespace = self.namespaces.get(status.stage, "")
        if not (failed and kept and namespace):
            return {}
        if not self._reading.acquire(blocking=False):
            raise HookError("another page is reading one; load this page again")
        try:
            configmaps = logs_of(self.kubectl, status.run, namespace, LOG_SECONDS)
            return {
                "Failing tests" if is_of_report(key) else f"{namespace}: {key}": str(text)
                for configmap in configmaps
                for key, text in ordered_logs(configmap)
            }
        except SHAPE_ERRORS as wrong:
            raise HookError("the cluster's answer has no logs") from wrong
        finally:
            self._reading.release()


def logs_of(kubectl: Kubectl, run: str, namespace: str, timeout: float) -> list[Object]:
    """Return the ConfigMaps with the kept logs of a run in a namespace; raises KubectlError."""
    terms = selector_text({LABEL_MANAGED: MANAGER, LABEL_STAGE: "log", LABEL_RUN: run})
    return kubectl.list("configmaps", namespace, "-l", terms, timeout=timeout)


def ordered_logs(configmap: Object) -> list[tuple[str, str]]:
    """Return the texts of a kept log with their keys: first why tests failed."""
    texts = (configmap.get("data") or {}).items()
    return sorted(texts, key=lambda item: (not is_of_report(item[0]), item[0]))


def is_of_report(key: str) -> bool:
    """Whether a text in a kept log says why tests failed, by their report."""
    return key.endswith(f".{RESULTS_CONTAINER}")


NO_SERVICE: Object = {"metadata": {"name": "", "resourceVersion": "0"}, "spec": {}}


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvironmentStatus:
    """What is live of an app in an environment, and what else stands there."""

    app: str
    environment: str
    live: HistoryEntry  # with the run that today's traffic reaches
    target: HistoryEntry  # where a rollback would go
    claim: Claim
    bake_until: float
    reverted: HistoryEntry  # what the last switch left, and why
    history: Sequence[HistoryEntry] = ()  # the switches, newest first
    rollback_ready: bool = False  # whether enough pods of the target are ready
    drift: Drift = Drift.NONE
    left_behind: tuple[str, ...] = ()  # live Services of the app under other names
    companions: tuple[str, ...] = ()  # what stands beside the app

    @classmethod
    def of(
        cls, app: App, environment: str, service: Service, source: Service | None
    ) -> EnvironmentStatus:
        """Return what a live Service says, and where it was recorded last: `source`."""
        live = service.live
        if not live and source and service.run:
            live = source.entry(service.run)
        newest_entry = next(iter(service.history), HistoryEntry())
        left = newest_entry.reason and newest_entry != service.live
        return cls(
            app=app.name,
            environment=environment,
            live=replace(live, run=service.run or live.run),
            target=service.rollback_target(),
            claim=service.claim,
            bake_until=service.annotation(ANNOTATION_BAKE, 0.0),
            reverted=newest_entry if left else HistoryEntry(),
            history=tuple(service.history),
        )

    @property
    def runs(self) -> list[str]:
        """The ids of all runs in it."""
        return [self.live.run, self.target.run, self.claim.run, self.reverted.run]

    def cells(self, ids: Mapping[str, str]) -> list[str]:
        """Return its row in the table of `status`, with short ids, and the text below the row."""
        rollback_cells = ["", "impossible"]
        if self.target:
            how = "at once" if self.rollback_ready else "by a rollout"
            rollback_cells = [ids[self.target.run] or "adopted", how]
        under_way = f"{self.claim.phase} {ids[self.claim.run]} {self.drift}"
        reverted = ["reverted", ids[self.reverted.run], self.reverted.reason, self.reverted.detail]
        if self.reverted.outcome == Outcome.ROLLED_BACK and self.live.by not in ("", MANAGER):
            reverted.append(f"by {self.live.by}")
        below = [clip(": ".join(filter(None, reverted)))] if self.reverted else []
        if self.left_behind:
            names = clip(", ".join(self.left_behind))
            below.append(f"Service {names} is not switched any more; delete it when it is unused.")
        if self.companions:
            below.append(clip(f"beside it: {', '.join(self.companions)}"))
        live = [self.app, self.environment, ids[self.live.run], self.live.colour]
        return [*live, *rollback_cells, under_way, "\n".join(below)]

    def to_json(self) -> Object:
        """Return it as `status --output json` prints it."""
        version = ("colour", "run", "commit", "image")
        end = ("run", "reason", "detail")
        return {
            **{key: getattr(self.live, key) for key in version},
            "by": self.live.by,
            "drift": str(self.drift),
            "previous": {key: getattr(self.target, key) for key in version if self.target},
            "rollback_ready": self.rollback_ready,
            "deploying": self.claim.to_json() if self.claim else None,
            "bake_until": self.bake_until or None,
            "reverted": {key: getattr(self.reverted, key) for key in end if self.reverted},
            "left_behind": [*self.left_behind],
            "companions": [*self.companions],
        }


@dataclass(frozen=True, slots=True)
class RunStatus:
    """How a run stands; the fields are the keys of `status --output json`."""

    run: str
    app: str
    ref: str
    commit: str
    received: float
    by: str = ""  # who pushed it, or let it run again
    stage: str = ""
    state: str = "lost"  # where nothing is left that says more
    outcome: str = ""
    reason: str = ""
    detail: str = ""
    waits_for: str = ""
    advice: str = ""  # what helps
    tries: int = 0  # that ended by a circumstance
    next_try: float | None = None  # when it is tried again by itself

    def as_claimed(self, places: Sequence[EnvironmentStatus]) -> RunStatus:
        """Return it as far as the claims of environments, in their order, say that it has come."""
        for place in reversed(places):
            if place.claim.run == self.run and self.state != "ended":
                return replace(self, stage=place.environment, state=place.claim.phase)
        return self

    def waiting(self, slots: str) -> RunStatus:
        """Return it with what it waits for, if it does; `slots` says who takes the slots."""
        if self.state == "ended":
            return self
        return replace(self, waits_for=self.detail or (slots if self.state == "suspended" else ""))

    def cells(self, ids: Mapping[str, str], now: float) -> list[str]:
        """Return its row in the table of `status`, with a short id, and the text below the row."""
        texts = [self.stage, self.state, self.outcome, self.reason, age(self.received, now)]
        detail = clip_lines(self.waits_for or self.detail)
        below = "\n".join(filter(None, (detail, self.next_words(now), self.advice)))
        return [ids[self.run], self.ref.removeprefix("refs/heads/"), *texts, below]

    def next_words(self, now: float) -> str:
        """Return when it is tried again, in words; "" for never."""
        if self.next_try is None:
            return ""
        when = f"in {age(now, self.next_try)}" if self.next_try > now else "now"
        return f"Try {self.tries + 1} {when}, if it is still the head."


def slot_words(groups: Iterable[Mapping[str, Job]], limit: int) -> str:
    """Return what a suspended Job waits for: a slot; and who takes how many of so many."""
    going = [jobs for jobs in groups if not has_ended(jobs)]
    takers = [job.run.id for jobs in going for job in jobs.values() if job.state == "active"]
    names = sorted(takers)[:NAMED_RUNS]
    if more := len(takers) - len(names):
        names.append(f"and {more} more")
    by = f" by {', '.join(names)}" if names else ""
    verb = "is" if len(takers) == 1 else "are"
    return f"a free slot: {len(takers)} of {limit} {verb} taken{by}"


def run_status(app: App, state: AppState, name: str, jobs: Mapping[str, Job]) -> RunStatus:
    """Return how a run stands by its record and its Jobs by stage; one of them is there."""
    record = state.runs.get(name)
    run = newest_run(jobs) if jobs else run_of_record(app, state.runs[name])
    status = RunStatus(run.id, run.app, run.ref, run.commit, run.received, run.by)
    if record and record.outcome and record.ended >= run.received:
        copied = ("stage", "outcome", "reason", "detail", "tries")
        end = {key: getattr(record, key) for key in copied}
        helps = Reason.of(record.reason) or Reason.OK
        advice = "" if helps is Reason.OK else helps.advice
        status = replace(status, state="ended", advice=advice, **end)
        status = replace(status, next_try=record.next_try or None)
    elif jobs:
        last = jobs.get("build") or jobs["test"]
        reason = last.annotations.get(ANNOTATION_REASON, "")
        detail = last.annotations.get(ANNOTATION_DETAIL, "")
        end = {"outcome": last.outcome, "reason": reason, "detail": detail}
        now = "ended" if has_ended(jobs) else last.state
        status = replace(status, stage=last.stage, state=now, **end)
    rejection = state.rejected.get(run.commit)
    live = [state.live.get(n, HistoryEntry()).run for n in app.deploy.environments[-1:]]
    if status.outcome != Outcome.DEPLOYED or not rejection or name in live:
        return status
    detail = "" if rejection.reason == Reason.ROLLED_BACK else rejection.reason
    return replace(status, outcome=Outcome.ROLLED_BACK, reason=Reason.ROLLED_BACK, detail=detail)


def short_ids(ids: Iterable[str]) -> dict[str, str]:
    """Return each run's id without its last part, where that is still the id of only one run."""
    short = {run: re.sub("(-[0-9a-f]{8})-[0-9a-f]+$", r"\1", run) for run in ids}
    uses = Counter(short.values())
    return {run: text if uses[text] == 1 else run for run, text in short.items()}


def age(then: float, now: float) -> str:
    """Return how long ago a time was, in the largest unit of which that is two; "" for none."""
    past = max(0.0, now - then)
    unit = next((u for u, seconds in AGE_UNITS.items() if past >= 2 * seconds), "s")
    return f"{past // AGE_UNITS[unit]:.0f}{unit}" if then else ""


# === HTTP =========================================================================================

OPEN_CONNECTIONS = 256  # of each port; no more than a quarter of the files that may be open
HELD_BYTES = 64 * 2**20  # that all connections of a port have received or are yet to be sent
HEADER_BYTES = 16384  # of one request
HEADER_LINES = 100  # of one request
REQUESTS_AT_ONCE = 16  # that one connection sends without waiting for answers
EMPTY_REQUESTS = 4  # in a row, each of two line ends: RFC 9112 lets them be ignored
ACCEPTS_AT_ONCE = 32  # new connections, before those that are open have their turn
# Seconds in which each must arrive; `more` is the next request on a connection.
ARRIVAL = {"headers": 5.0, "body": 20.0, "more": 20.0}
LOOK_INTERVAL = 0.1  # seconds between looks at all connections
LOOK_BYTES = 2**20  # received bytes after which there is a look before that
PAUSE_SECONDS = 1.0  # after a connection could not be accepted
QUIET_SECONDS = 300.0  # between log lines about connections that fail
LOOP_SECONDS = 15.0  # in which a server's loop must come round; when idle it does so every second
# The expressions of waitress take minutes for a first line that does not match the first of these,
# and for headers that contain the second.
FIRST_LINE = re.compile(rb"[^ \r]+ [^ \r]{1,2048}( HTTP/[0-9]\.[0-9])?\r\n")
BLANKS = re.compile(rb"[ \t]{9}")
SERVER: Object = {
    "asyncore_use_poll": True,  # select cannot handle file descriptors above 1023
    "ident": "",
    "log_socket_errors": False,  # strangers cause them
    "max_request_header_size": HEADER_BYTES,
    "outbuf_high_watermark": sys.maxsize,  # above it a thread would wait; see Server.add_task
    "threads": 4,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request is answered with: JSON, metrics as Prometheus reads them, or a page."""

    status: int
    body: Object | bytes | Html


@dataclass(frozen=True, slots=True)
class Route:
    """The methods that a path takes, and what answers it."""

    methods: str
    handler: Callable[[WSGIEnvironment], Answer]


class Site:
    """A WSGI application that answers by a table of paths."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics
        self.routes: dict[str, Route] = {}

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        """Answer one request; whatever it holds, there is an answer and the process lives."""
        path = environ.get("PATH_INFO", "")
        # the last word of a path may be a name
        route = self.routes.get(path) or self.routes.get(f"{path.rpartition('/')[0]}/*")
        answer = self.answer(environ, route)
        line = f"{answer.status} {http.HTTPStatus(answer.status).phrase}"
        if isinstance(answer.body, bytes):
            start_response(line, [("Content-Type", prometheus_client.CONTENT_TYPE_LATEST)])
            return [answer.body]
        if isinstance(answer.body, Html):
            page = answer.body.encode()
            start_response(line, [*PAGE_HEADERS, ("Content-Length", str(len(page)))])
            return [page] * (environ["REQUEST_METHOD"] != "HEAD")
        content = json.dumps(answer.body).encode() + b"\n"
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(content)))]
        if route and answer.status == http.HTTPStatus.METHOD_NOT_ALLOWED:
            headers.append(("Allow", route.methods))
        if route and path == "/webhook":
            result = answer.body.get("reason", answer.body["status"])
            self.metrics.deliveries.labels(result).inc()
            details = {"delivery": delivery_id(environ), "status": answer.status, "result": result}
            details |= {key: answer.body.get(key) for key in ("runs", "text")}
            (info if answer.status < http.HTTPStatus.BAD_REQUEST else warn)("delivery", **details)
        start_response(line, headers)
        # a body after HEAD would be read as the beginning of the next answer
        return [content] * (environ["REQUEST_METHOD"] != "HEAD")

    def answer(self, environ: WSGIEnvironment, route: Route | None) -> Answer:
        """Return what a route answers, or why there is no such answer."""
        try:
            if route is None:
                deny(404, "NotFound", "no such path")
            if environ["REQUEST_METHOD"] not in route.methods.split(", "):
                deny(405, "MethodNotAllowed", f"only {route.methods}")
            return route.handler(environ)
        except DeliveryError as early:
            word = "ignored" if early.status < http.HTTPStatus.BAD_REQUEST else "refused"
            return Answer(early.status, {"status": word, "reason": early.code, "text": str(early)})
        except Exception:  # noqa: BLE001 - a request ends here; it is logged and counted
            error("request failed", exc=True, path=clip(environ.get("PATH_INFO", ""), 80))
            self.metrics.errors.labels("request").inc()
            return Answer(500, {"status": "error"})

    def reads_body(self, _: Any) -> bool:
        """Whether the body of a request is wanted, by what its headers say."""
        return False


class WebhookApp(Site):
    """What is behind the Ingress: /webhook and, for manifests of version 0.1, the probes."""

    def __init__(
        self, config: Config, secrets: Secrets, spool: Spool, controller: Controller
    ) -> None:
        super().__init__(controller.metrics)
        self.config = config
        self.secrets = secrets
        self.spool = spool
        self.controller = controller
        self.logs = KeptLogs(config, controller.context.kubectl)
        self.stopping = threading.Event()
        self._parsing = threading.Lock()  # one at a time: a parsed body is up to 40 times as large
        self.probes = {"/healthz": Route("GET", self.healthz), "/readyz": Route("GET", self.readyz)}
        self.routes = {"/webhook": Route("POST", self.webhook)}
        for path, trouble in (("/healthz", "stuck"), ("/readyz", "not ready")):
            self.routes[path] = Route("GET", partial(self.brief, path, trouble))

    def admin(self) -> Site:
        """Return the site of the second port, which strangers do not reach: all but the webhook."""
        site = Site(self.metrics)
        latest = partial(prometheus_client.generate_latest, self.metrics.registry)

        def page(write: Callable[[PageWriter, str], Html | None], home: str = "../") -> Route:
            """Return the route of a page, which is of what the last word of the path names."""

            def show(environ: WSGIEnvironment) -> Answer:
                """Answer with the page, or with one that says that it is not there."""
                markup = Markup(self.secrets.words(), home)
                writer = PageWriter(self.controller.context, markup, self.logs)
                body = write(writer, environ["PATH_INFO"].rpartition("/")[2])
                return Answer(200, body) if body else Answer(404, writer.missing())

            return Route("GET, HEAD", show)

        site.routes = {
            "/metrics": Route("GET", lambda _: Answer(200, latest())),
            **self.probes,
            "/": page(PageWriter.overview, home=""),
            "/apps/*": page(PageWriter.app),
            "/runs/*": page(PageWriter.run),
        }
        return site

    def reads_body(self, request: Any) -> bool:
        """Whether a request is a delivery of the right size with what authenticates one."""
        needed = (n.upper().replace("-", "_") for n in NEEDED_HEADERS[self.config.webhook.verify])
        sized = request.content_length <= self.config.webhook.max_body
        delivery = (request.command, request.path.lstrip("/")) == ("POST", "webhook")
        return delivery and sized and all(map(request.headers.get, needed))

    def webhook(self, environ: WSGIEnvironment) -> Answer:
        """Authenticate, understand and store a delivery; in this order, for security."""
        now = self.controller.clock.now()
        body = self.authentic_body(environ, now)
        with self._parsing:
            delivery = delivery_id(environ)
            runs = parse_delivery(self.config, body, delivery=delivery, received=now)
        new = [run for run in runs if not self.spool.accepted.has(run)]
        if new:
            deploy_refs = {(app.name, app.deploy_ref) for app in self.config.apps}
            deploys = any((run.app, run.ref) in deploy_refs for run in new)
            self.spool.store(new, only_tested=not deploys)
            self.controller.spooled.set()
        word = "accepted" if new else "duplicate"
        return Answer(202 if new else 200, {"status": word, "runs": [run.id for run in runs]})

    def authentic_body(self, environ: WSGIEnvironment, now: float) -> bytes:
        """Return the body of a delivery that may be parsed; raises DeliveryError for any other."""
        limit = self.config.webhook.max_body
        size = int(environ.get("CONTENT_LENGTH") or 0)
        if size > limit:
            deny(413, "TooLarge", f"more than {limit} bytes")
        body: bytes = environ["wsgi.input"].read(size)
        try:
            keys = self.secrets.keys(self.config.webhook.verify)
        except ConfigError as broken:
            error("secrets cannot be used", detail=str(broken))
            self.metrics.errors.labels("secrets").inc()
            deny(503, "NoSecrets", "not configured")
        fields = {
            k[5:].replace("_", "-").lower(): v for k, v in environ.items() if k[:5] == "HTTP_"
        }
        verify_delivery(self.config.webhook.verify, keys, fields, body, now)
        kind = environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            deny(415, "NotJson", "send application/json")
        return body

    def brief(self, path: str, trouble: str, environ: WSGIEnvironment) -> Answer:
        """Answer a probe in two words: names of threads and paths are no business of strangers."""
        answer = self.probes[path].handler(environ)
        if answer.status == http.HTTPStatus.OK:
            return answer
        return Answer(answer.status, {"status": trouble})

    def healthz(self, _: WSGIEnvironment) -> Answer:
        """Answer whether every thread moves."""
        late = ", ".join(self.controller.heartbeats.late())
        return Answer(503 if late else 200, {"status": f"stuck: {late}" if late else "ok"})

    def readyz(self, _: WSGIEnvironment) -> Answer:
        """Answer whether deliveries can be authenticated and stored; never how the cluster is."""
        trouble = "stopping" if self.stopping.is_set() else ""
        try:
            self.secrets.keys(self.config.webhook.verify)
            self.spool.probe()
        except (ConfigError, OSError) as broken:
            trouble = str(broken)
        return Answer(503 if trouble else 200, {"status": trouble or "ok"})


def delivery_id(environ: WSGIEnvironment) -> str:
    """Return the id that stays when GitLab sends a delivery again, "" when there is none.

    It is never one of UNANNOUNCED but "", whatever the sender says.
    """
    return clip(environ.get("HTTP_WEBHOOK_ID") or environ.get("HTTP_IDEMPOTENCY_KEY", ""), 100)


class Server(waitress.server.TcpWSGIServer):  # type: ignore[misc]  # waitress has no types
    """A server that strangers cannot fill: what waits longest for a request gives way.

    Threads, time and sizes are bounded; slow clients hold no thread. Chunked bodies of up to twice
    the limit reach the application, which says what is wrong.
    """

    def __init__(
        self, site: Site, listen: str, max_body: int, beat: Callable[[], None] = lambda: None
    ) -> None:
        """Listen; raises ConfigError if the address cannot be listened on."""
        host, _, port = listen.rpartition(":")
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        try:
            both = host == "[::]" and socket.has_dualstack_ipv6()
            address = (host.strip("[]"), int(port))
            bound = socket.create_server(address, family=family, dualstack_ipv6=both)
        except (OSError, ValueError, OverflowError) as wrong:
            raise ConfigError([f"cannot listen on {clip(listen, 80)!r}: {wrong}"]) from wrong
        self.site = site
        self.beat = beat
        self.arrival = ARRIVAL
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        self.most = min(OPEN_CONNECTIONS, max(8, allowed))
        self.paused_until = 0.0
        self.look_at = 0.0  # when the next look at all connections is
        self.arrived = 0  # bytes since the last look
        self.failures = 0  # since they were last logged
        self.cooldown = Cooldown(Clock())
        sockinfo = (bound.family, bound.type, bound.proto, bound.getsockname())
        limits = {**SERVER, "max_request_body_size": 2 * max_body + 1}
        super().__init__(site, _sock=bound, bind_socket=False, sockinfo=sockinfo, **limits)

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
        self.look_at = time.monotonic() + LOOK_INTERVAL
        self.arrived = 0
        now = time.time()
        channels = [*self.active_channels.values()]
        held = sum(channel.held for channel in channels)
        waiting = (channel for channel in channels if not channel.is_being_answered)
        for channel in sorted(waiting, key=lambda channel: channel.last_activity):
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

    def add_task(self, task: Channel) -> None:
        """Let a thread answer the next request of a connection, once its last answer is sent.

        So no thread waits until a client reads, and a connection keeps one answer at most. The loop
        sends the rest of it, and comes back here.
        """
        task.paused = bool(task.total_outbufs_len)
        if not task.paused:
            super().add_task(task)

    def handle_error(self) -> None:
        """Pause: waitress would stop listening, and without a pause the loop would spin."""
        self.paused_until = time.monotonic() + PAUSE_SECONDS
        self.complain("no connection can be accepted")

    def complain(self, what: str) -> None:
        """Log the exception being handled, but seldom, and how many there were since the last."""
        self.failures += 1
        if self.cooldown.allows("failures"):
            self.cooldown.start("failures", QUIET_SECONDS)
            error(what, count=self.failures, detail=clip(repr(sys.exc_info()[1])))
            self.failures = 0


class Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]  # waitress has no types
    """A connection whose every request must arrive in time, however steadily it drips."""

    last_activity: float  # when the time began in which `awaits` must arrive
    close_when_flushed: bool
    used = False  # whether a request has arrived
    paused = False  # whether the next request waits until the last answer is sent
    lingering = False  # whether all is answered, and the other side is waited for to close
    empty = 0  # how many empty requests came since the last one that says something
    newest: Request | None = None

    def parser_class(self, adjustments: Any) -> Request:
        """Return a request that begins to arrive."""
        # waitress drops an empty one without an answer, so that `requests` does not count it
        self.empty = self.empty + 1 if self.newest and self.newest.empty else 0
        request = self.newest = Request(adjustments, self.server.site)
        if self.empty > EMPTY_REQUESTS:
            request.refuse("too many empty lines")
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
    def is_being_answered(self) -> bool:
        """Whether a thread answers a request, or is about to."""
        return bool(self.requests) and not self.paused

    @property
    def is_cut(self) -> bool:
        """Whether the last request was understood as far as it will be, and what follows is not."""
        return self.newest is not None and bool(self.newest.cut or self.newest.error)

    @property
    def held(self) -> int:
        """How many bytes of bodies and of an answer are kept."""
        bodies = sum(r.body_bytes_received for r in (self.request, *self.requests) if r)
        return int(bodies + self.total_outbufs_len)

    def readable(self) -> bool:
        """Whether something may arrive; the number of a closed one may be another's by now."""
        return self.socket is not None and bool(super().readable())

    def writable(self) -> bool:
        """Whether the server's loop has something to send or to close here.

        Not while a request is answered: its thread sends for itself, and the loop, asking again and
        again for the lock that it holds, would keep it from going on.
        """
        return self.socket is not None and not self.is_being_answered and bool(super().writable())

    def handle_read(self) -> None:
        """Receive something; only what completes a step begins the time of the next one anew."""
        awaited = self.awaits
        since = self.last_activity
        super().handle_read()
        self.used = self.used or bool(self.requests)
        if self.awaits == awaited and not self.requests:
            self.last_activity = since

    def received(self, data: bytes) -> bool:
        """Understand what arrived, unless it belongs to a request that is left unread."""
        self.server.arrived += len(data)
        return not self.is_cut and bool(super().received(data))

    def handle_write(self) -> None:
        """Send; where a part of the last request is unread, wait for the other side to close.

        To close then would be a reset, and destroy the answer.
        """
        if not (self.close_when_flushed and self.is_cut):
            super().handle_write()
            if self.paused and self.connected:
                self.server.add_task(self)
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
        """Close, because its body could not be written to a file, for example."""
        self.server.complain("a connection failed")
        self.handle_close()


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
        try:
            super().parse_header(header_plus)
        except ValueError as wrong:  # a number of thousands of digits, or a bracket in an address
            raise waitress.parser.ParsingError("not a length, or not an address") from wrong
        if self.body_rcv is not None and not self.site.reads_body(self):
            self.headers["CONNECTION"] = "close"
            self.body_rcv = None
            self.content_length = 0
            self.chunked = False
            self.cut = True
        if self.body_rcv is None:
            self.expect_continue = False  # else waitress waits for more

    def received(self, data: bytes) -> int:
        """Take data and return how much of it; what waitress would be slow with is refused."""
        if self.chunked and data.count(b"\r\n") > 64 + len(data) // 16:
            self.refuse("too small chunks")
        if self.completed:
            return len(data)
        taken = int(super().received(data))
        if self.error:
            self.expect_continue = False  # else waitress waits for more, and never answers
        if self.cut or self.error:
            return len(data)  # what follows is no other request
        body = self.body_rcv
        if self.chunked and len(body.control_line) + len(body.trailer) > HEADER_BYTES:
            self.refuse("too long a line between chunks")
        return taken


# === commands =====================================================================================

OPEN_FILES = 4096  # for two ports' connections, their bodies, kubectl and git
LINGER_SECONDS = 2.0  # in which a stopping daemon still answers, until its endpoint is gone
SHUTDOWN_SECONDS = 40.0  # for the threads and the last intake; the grace period allows for it
REOPEN_SECONDS = 30.0  # in which a deleted Job must be gone
TABLE_COLUMNS = 100  # characters
APP_TITLES = ("APP", "ENVIRONMENT", "LIVE", "COLOUR", "BEFORE", "ROLLBACK", "UNDER WAY")
STATUS_TITLES = ("RUN", "REF", "STAGE", "STATE", "OUTCOME", "REASON", "AGE")
UNREADABLE = "not readable with this account"
UNREADABLE_KINDS = ("Forbidden", "NotFound")  # of the errors of one namespace, not of the cluster
START_SECONDS = 5.0  # from a pod's creation until it is ready, by and large
LEAST_GRACE = 2  # seconds between SIGTERM and SIGKILL, in which a pod can finish requests at all
# What the daemon must be able to do, as its Roles grant it: verbs by group/resource/subresource.
EVERY = "get list watch create patch delete"
PODS = {"/pods": "get list watch", "/pods/log": "get"}
STATE_RIGHTS = {"/configmaps": "get create patch"}
JOB_RIGHTS = {"batch/jobs": EVERY, **PODS, "/configmaps": "list create delete"}
JOB_RIGHTS |= {"/events": "list create"}
APP_RIGHTS = {"apps/deployments": f"{EVERY} update", "/services": f"{EVERY} update", **PODS}
APP_RIGHTS |= {"apps/replicasets": "list", "discovery.k8s.io/endpointslices": "list"}
APP_RIGHTS |= {"/configmaps": "get list create update delete", "/events": "list create"}
BESIDE = ("autoscaling/horizontalpodautoscalers", "policy/poddisruptionbudgets", "batch/cronjobs")
APP_RIGHTS |= dict.fromkeys(BESIDE, "get create update delete")


@dataclass(frozen=True, slots=True)
class Tools:
    """What every command works with."""

    process: Process
    config: Config
    doors: Doors
    deployer: Deployer

    @classmethod
    def load(cls, environ: Mapping[str, str]) -> Tools:
        """Read the configuration; raises ConfigError with every fault."""
        process = Process.from_environ(environ)
        config = load_config(read_config(process.config, bool(environ.get("GITOPS_HOOK_CONFIG"))))
        metrics = Metrics()
        refs = {(a.repository, a.deploy_ref) for a in config.apps}
        deployed = {url: [ref for u, ref in refs if u == url] for url, _ in refs}
        credentials = process.secrets / GIT_CREDENTIALS
        surroundings = Surroundings(variables=config.job_env, ca=process.ca)
        limit = config.limits.checkout
        git = Git(credentials, limit=limit, deployed_refs=deployed, surroundings=surroundings)
        doors = Doors(
            kubectl=Kubectl(metrics, config.limits.kubectl),
            git=git,
            secrets=git.secrets,  # one for all: what git reads is masked everywhere at once
            clock=Clock(),
            reports=Reports(metrics),
            stop=threading.Event(),
        )
        return cls(process, config, doors, Deployer(doors, config.apps))

    def app(self, name: str) -> App:
        """Return the app of that name; raises ConfigError when there is none."""
        apps = {a.name: a for a in self.config.apps}
        if name not in apps:
            raise ConfigError([f"no app {clip(name, 60)!r} is configured, only: {', '.join(apps)}"])
        return apps[name]

    def app_of(self, run: str) -> App:
        """Return the app of a run by its id, which may be short; raises ConfigError.

        The name of one app may look like a run of another one: then the longest name counts.
        """
        match = RUN_ID.fullmatch(run)
        if not match:
            raise ConfigError([f"{clip(run, 80)!r} is not the id of a run; `status` lists them"])
        names = [app.name for app in self.config.apps]
        fitting = [name for name in names if re.fullmatch(f"{name}-{RUN_ID_END}", run)]
        return self.app(max(fitting, key=len, default=match[1]))

    def full_commit(self, app: App, text: str, *, recorded: bool) -> str:
        """Return the id of a commit: a full one, or of the branch's head that begins with a text.

        Recorded runs are looked at, too, if so wanted. Raises ConfigError and RefusedError.
        """
        if SHA.fullmatch(text):
            return text
        if not re.fullmatch("[0-9a-f]{4,63}", text):
            raise ConfigError([f"{clip(text, 60)!r} is not a commit id"])
        commits = list(self.doors.git.heads(app.repository).values())
        if recorded:
            commits += [record.commit for record in self.deployer.state.read(app).runs.values()]
        if commit := completed(text, commits):
            return commit
        where = "no head of a branch or recorded run" if recorded else "no head of a branch"
        raise RefusedError(f"commit {text} is unknown, {where} has it: give the full commit id")


def read_config(path: Path, named: bool) -> str:
    """Return the text of the configuration: of the file, or without one of the daemon's ConfigMap.

    The ConfigMap is read with the caller's own kubeconfig. A file that was named must be there.
    """
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as failure:
        if named or not isinstance(failure, FileNotFoundError):
            raise ConfigError([f"{path} cannot be read: {failure}"]) from failure
    configmap = Kubectl(Metrics()).get("configmap", MANAGER, ORCHESTRATION)
    if configmap is None:
        where = f"no file {path} and no ConfigMap {MANAGER} in {ORCHESTRATION}"
        raise ConfigError([f"there is {where}: is this the right cluster?"])
    return str((configmap.get("data") or {}).get("config.yaml", ""))


def serve(tools: Tools, args: argparse.Namespace) -> int:
    """Run the daemon until SIGTERM, or with --check only say that it could run."""
    process = tools.process
    config = tools.config
    secrets = tools.doors.secrets
    setup_logging(secrets.mask)
    secrets.keys(config.webhook.verify)
    names = [a.name for a in config.apps]
    if args.check:
        print_text(f"the configuration is valid; apps: {', '.join(names) or 'none'}")
        for warning in quota_warnings(config):
            print_text(warning)
        return 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, OPEN_FILES)), hard))
    spool = Spool(process.spool, config.limits.spool_files)
    spool.prepare()
    tempfile.tempdir = str(spool.scratch)
    gitlab = GitLab(secrets, tools.doors.git.surroundings)
    controller = Controller(config, tools.deployer, spool, gitlab)
    app = WebhookApp(config, secrets, spool, controller)
    beat = partial(controller.heartbeats.beat, "first port", LOOP_SECONDS)
    server = Server(app, process.listen, config.webhook.max_body, beat)
    admin = Server(app.admin(), process.admin_listen, 0)
    stop_on_signals(app.stopping)
    threading.Thread(target=admin.run, name="admin", daemon=True).start()
    controller.start()
    ports = {"port": server.effective_port, "admin_port": admin.effective_port}
    info("serving", version=__version__, apps=names, **ports)
    server.run()
    controller.shut_down(SHUTDOWN_SECONDS)
    info("stopped", spooled=len(spool))
    return 0


# The hard limits in manifests/base/resourcequotas.yaml.
SHIPPED_QUOTA = {
    "requests.cpu": "2",
    "requests.memory": "4Gi",
    "limits.cpu": "4",
    "limits.memory": "8Gi",
    f"requests.{DISK}": "8Gi",
    f"limits.{DISK}": "48Gi",
}


def quota_warnings(config: Config) -> Iterator[str]:
    """Yield which test or build pods ask for more than the quota that is shipped ever allows."""
    nobody = Run(id="x", app="", ref="", commit="0" * 40)
    stages = (("test", test_job), ("build", build_job))
    for app, (stage, job) in itertools.product(config.apps, stages):
        pod = job(config, app, nobody)["spec"]["template"]["spec"]
        for name, limit in SHIPPED_QUOTA.items():
            if (asked := pod_total(pod, *name.split("."))) > quantity(limit):
                where = f"apps.{app.name}.{stage}: a pod asks for {name} of {asked.normalize():f}"
                advice = f"Raise it in ResourceQuota {stage}-quota, or ask for less."
                yield f"{where}, but the shipped quota allows {limit}. {advice}"


def pod_total(pod: Object, kind: str, name: str) -> Decimal:
    """Return what a pod requests or limits in all, as a quota counts it."""
    total = most = Decimal(0)
    for container in pod["initContainers"]:
        text = str(container["resources"].get(kind, {}).get(name, "0"))
        most = max(most, total + quantity(text))
        if "restartPolicy" in container:  # a side-car stays
            total += quantity(text)
    for container in pod["containers"]:
        total += quantity(str(container["resources"].get(kind, {}).get(name, "0")))
    return max(most, total)


def stop_on_signals(stopping: threading.Event) -> None:
    """On SIGTERM or SIGINT become unready at once, and end the server a moment later.

    Without this, process 1 of a container ignores SIGTERM. A second signal changes nothing.
    """

    def stop(number: int, _frame: Any) -> None:
        """Become unready and set the alarm, at which the server ends."""
        if number == signal.SIGALRM:
            raise SystemExit(0)
        if not stopping.is_set():
            stopping.set()
            signal.setitimer(signal.ITIMER_REAL, LINGER_SECONDS)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, stop)


def push(tools: Tools, args: argparse.Namespace) -> int:
    """Send a signed test delivery, as GitLab would; 0 if accepted, a duplicate or ignored."""
    app = tools.app(args.app)
    ref = args.ref if args.ref.startswith("refs/") else f"refs/heads/{args.ref}"
    commit = tools.full_commit(app, args.sha, recorded=False)
    project = {"git_http_url": app.repository}
    payload = {"object_kind": "push", "ref": ref, "after": commit, "project": project}
    payload["user_username"] = local_user()
    body = json.dumps(payload).encode()
    headers = delivery_headers(tools, body)
    requests = http_client()
    try:
        answer = requests.post(args.url, body, headers=headers, timeout=10, allow_redirects=False)
    except requests.RequestException as failure:
        raise HookError(f"no answer from {args.url}: {first_cause(failure)}") from failure
    print_text(f"{answer.status_code} {clip(answer.text, 2000)}")
    return 0 if answer.status_code in (http.HTTPStatus.OK, http.HTTPStatus.ACCEPTED) else 1


def delivery_headers(tools: Tools, body: bytes) -> dict[str, str]:
    """Return the headers with which the daemon takes a body, by its mode and first secret."""
    mode = tools.config.webhook.verify
    key = tools.doors.secrets.keys(mode)[0]
    delivery = str(uuid.uuid4())
    headers = {"Content-Type": "application/json", "webhook-id": delivery}
    if mode == "signature":
        stamp = str(int(tools.doors.clock.now()))
        signature = sign(key, delivery.encode(), stamp.encode(), body)
        return {**headers, "webhook-timestamp": stamp, "webhook-signature": signature.decode()}
    token = key if mode == "token" else hex_hmac(key, body)
    return {**headers, "X-Gitlab-Token": token.decode("latin-1")}


def status(tools: Tools, args: argparse.Namespace) -> int:
    """Print what is live where, where a rollback would go, and how each run stands.

    What this account cannot read is named, and the rest is printed.
    """
    apps = [tools.app(args.app)] if args.app else list(tools.config.apps)
    unreadable: list[str] = []
    places: list[EnvironmentStatus] = []
    for task in (task_of(tools.config, a, e) for a in apps for e in a.deploy.environments):
        with noting_unreadable(task.namespace, unreadable):
            places.append(read_environment(tools, task.app, task.environment))
    runs = [run.as_claimed(places) for run in read_runs(tools, apps, unreadable)]
    unreadable = [*dict.fromkeys(unreadable)]
    if args.output == "json":
        listed: dict[str, Object] = {app.name: {} for app in apps}
        for place in places:
            listed[place.app][place.environment] = place.to_json()
        entries = [{"name": name, "environments": inside} for name, inside in listed.items()]
        answer = {"apps": entries, "runs": [asdict(run) for run in runs], "unreadable": unreadable}
        print_text(json.dumps(answer, indent=2))
        return 0
    now = tools.doors.clock.now()
    ids = short_ids([run.run for run in runs] + [name for place in places for name in place.runs])
    print_text(table(APP_TITLES, [place.cells(ids) for place in places]))
    rows = [run.cells(ids, now) for run in runs]
    print_text(f"\n{table(STATUS_TITLES, rows)}" if rows else "\nno runs")
    if unreadable:
        print_text(f"\n{UNREADABLE}: {', '.join(unreadable)}")
    return 0


@contextmanager
def noting_unreadable(namespace: str, unreadable: list[str]) -> Iterator[None]:
    """Note a namespace in which the block may not read, or that is not there, and go on."""
    try:
        yield
    except KubectlError as refusal:
        if refusal.kind not in UNREADABLE_KINDS:
            raise
        unreadable.append(namespace)


def read_environment(tools: Tools, app: App, environment: str) -> EnvironmentStatus:
    """Return what is live of an app in one of its environments."""
    task = task_of(tools.config, app, environment)
    operations = tools.deployer.steady
    service = operations.live.read(task) or Service(NO_SERVICE)
    source = service if service.in_order else operations.live.with_history(task, service)
    place = EnvironmentStatus.of(app, environment, service, source)
    target = place.target
    ready = operations.workloads.ready(task.namespace, target.selector) if target else []
    return replace(
        place,
        rollback_ready=bool(target) and len(ready) >= target.replicas,
        drift=operations.guard.drift(task, service, source),
        left_behind=tuple(other.name for other in operations.live.left_behind(task)),
        companions=tuple(sorted(map(str, operations.companions.records(task).values()))),
    )


def read_runs(tools: Tools, apps: Sequence[App], unreadable: list[str]) -> list[RunStatus]:
    """Return the runs of apps that have a Job or a record, newest first.

    Namespaces of Jobs that cannot be read are added to a list.
    """
    jobs: dict[str, dict[str, Job]] = {}
    for namespace in (tools.config.namespaces[stage] for stage in JOB_STAGES):
        address = list_address("jobs", namespace, f"{LABEL_MANAGED}={MANAGER}")
        with noting_unreadable(namespace, unreadable):
            for page in tools.doors.kubectl.pages(address, namespace):
                for job in map(Job, page["items"]):
                    if job.stage in JOB_STAGES:
                        jobs.setdefault(job.run.id, {})[job.stage] = job
    slots = slot_words(jobs.values(), tools.config.limits.max_running)
    runs: list[RunStatus] = []
    for app in apps:
        state = AppState()
        with noting_unreadable(ORCHESTRATION, unreadable):
            state = tools.deployer.state.read(app)
        own = {name: group for name, group in jobs.items() if newest_run(group).app == app.name}
        names = own.keys() | state.runs.keys()
        statuses = [run_status(app, state, name, own.get(name, {})) for name in names]
        if unreadable:  # it may well be there
            statuses = [replace(s, state="unknown") if s.state == "lost" else s for s in statuses]
        runs += [run.waiting(slots) for run in statuses]
    return sorted(runs, key=lambda run: (-run.received, run.run))


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines of at most TABLE_COLUMNS; the last text of a row stands below it.

    Cells are wrapped where that is needed, between words as long as possible.
    """
    grid = [titles, *([clip(cell) or "-" for cell in row[:-1]] for row in rows)]
    columns = [*zip(*grid, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    words = [max(map(len, re.split("(?<=[- ])", " ".join(column)))) for column in columns]
    while sum(widths) + 2 * (len(widths) - 1) > TABLE_COLUMNS:
        spare = [width - word for width, word in zip(widths, words, strict=True)]
        most = spare if max(spare) > 0 else widths
        widths[most.index(max(most))] -= 1
    lines = []
    for row, below in zip(grid, ["", *(row[-1] for row in rows)], strict=True):
        cells = [textwrap.wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            padded = [part.ljust(width) for part, width in zip(parts, widths, strict=True)]
            lines.append("  ".join(padded).rstrip())
        for text in below.split("\n"):
            lines += [f"    {part}" for part in textwrap.wrap(clip(text), TABLE_COLUMNS - 4)]
    return "\n".join(lines)


def explain(tools: Tools, args: argparse.Namespace) -> int:
    """Print how a run and its stages stand, and with --log what its failed containers printed."""
    app = tools.app_of(args.run)
    runs = {run.run: run for run in read_runs(tools, [app], [])}
    name = completed(args.run, runs) or args.run
    logs = list(kept_logs(tools, app, name)) if args.log else []
    if name in runs:
        values = asdict(runs[name])
        if values["waits_for"] == values["detail"]:
            del values["waits_for"]
        now = tools.doors.clock.now()
        values["received"] = f"{age(values['received'], now)} ago"
        values["next_try"] = runs[name].next_words(now)
        for key in filter(values.get, values):
            lines = printable(str(values[key])).split("\n")
            title = key.removesuffix("_for")
            print_text(f"{title + ':':10}" + f"\n{'':10}".join(lines))
        for line in timeline(tools, app, name):
            print_text(line)
        for text in failing_tests(tools, runs[name]) if not args.log else ():
            print_text(f"\n{text}")
    elif not logs:
        raise HookError(f"{name} is unknown: no Job, no record and no log of it is left")
    if args.log and not logs:
        logs = ["no log is kept: logs are kept for a day, and only of what failed"]
    for text in logs:
        print_text(f"\n{text}")
    return 0


def timeline(tools: Tools, app: App, name: str) -> Iterator[str]:
    """Yield a line for each stage of a run that has Jobs or a record, as far as one may look."""
    unreadable: list[str] = []
    state = AppState()
    jobs: dict[str, Job] = {}
    services: dict[str, Service] = {}
    with noting_unreadable(ORCHESTRATION, unreadable):
        state = tools.deployer.state.recent(app)
    with noting_unreadable("its Jobs", unreadable):
        listed = jobs_of(tools.doors.kubectl, tools.config, [name])[name]
        jobs = {job.stage: job for job in listed}
    for environment in app.deploy.environments:
        task = task_of(tools.config, app, environment)
        with noting_unreadable(task.namespace, unreadable):
            if service := tools.deployer.steady.live.read(task):
                services[environment] = service
    if jobs or name in state.runs:
        seen = ReportedRun.of(app, state, name, jobs, services)
        for stage, view in stages_of(seen).items():
            began = age(view.began, tools.doors.clock.now())
            words = [view.word, began and f"began {began} ago", view.took and f"took {view.took}"]
            said = f": {view.text}" if view.text else ""
            yield printable(f"{stage + ':':9} {', '.join(filter(None, words))}{said}")
    for namespace in unreadable:
        yield f"{namespace}: {UNREADABLE}"


def kept_logs(tools: Tools, app: App, run: str) -> Iterator[str]:
    """Yield the kept logs of a run as they are printed, each below where and when that was."""
    shown = app.deploy.environments if app.deploy.log_tails else ()
    for namespace in (tools.config.namespaces[name] for name in (*JOB_STAGES, *shown)):
        try:
            configmaps = logs_of(tools.doors.kubectl, run, namespace, KUBECTL_TIMEOUT)
        except KubectlError as refusal:
            if refusal.kind != "Forbidden":
                raise
            yield f"--- {namespace}\n{UNREADABLE}"
            continue
        for configmap in configmaps:
            at = printable(configmap["metadata"].get("creationTimestamp", ""))
            for key, text in ordered_logs(configmap):
                yield f"--- {namespace} {key}, kept {at}\n{printable(text)}"


def failing_tests(tools: Tools, run: RunStatus) -> Iterator[str]:
    """Yield why the tests of a run failed, as far as that is kept and may be read."""
    if run.reason != Reason.TESTS_FAILED:
        return
    with suppress(KubectlError):  # a failure to read is told with --log
        namespace = tools.config.namespaces["test"]
        for configmap in logs_of(tools.doors.kubectl, run.run, namespace, LOG_SECONDS):
            texts = (text for key, text in ordered_logs(configmap) if is_of_report(key))
            yield from map(printable, texts)


def rollback(tools: Tools, args: argparse.Namespace) -> int:
    """Switch an environment back to an earlier version, and reject the commit that is left."""
    app = tools.app(args.app)
    environment = environment_of(app, args.environment)
    task = task_of(tools.config, app, environment)
    with ThreadPoolExecutor(1) as beside:
        by = beside.submit(caller, tools)
        service = tools.deployer.steady.live.read(task) or Service(NO_SERVICE)
    to = args.to
    if isinstance(to, str):
        to = completed(to, [entry.run for entry in service.history]) or to
    try:
        target = replace(rollback_entry(service, to), by=by.result())
    except RefusedError as refusal:
        raise RefusedError(f"{app.name} in {environment}: {refusal}") from refusal
    left = service.live
    where = f"{app.name} {environment}"
    print_text(f"{where}: from {version_words(left)} to {version_words(target)}")
    if (entry := service.entry(target.run)).outcome in (Outcome.SWITCHED_BACK, Outcome.FAILED):
        print_text(f"{target.run} was never proven: it ended {entry.outcome} ({entry.reason})")
    with ThreadPoolExecutor(1) as beside:  # before the daemon drains it
        size = beside.submit(tools.deployer.steady.workloads.size, task, left.selector)
        target = Rollback(tools.deployer.steady).run(task, service, target, clip(args.reason))
    print_text(f"{where}: back on {version_words(target)}")
    if left.commit:
        print_text(f"{left.run} is rejected until `rerun {left.run}`")
    scale_up_and_await_endpoints(tools.deployer, task, size.result(), target)
    return 0


def environment_of(app: App, name: str) -> str:
    """Return the environment of an app that is asked for, the last one if none is."""
    names = app.deploy.environments
    if not names:
        raise ConfigError([f"{app.name} has no environments, so nothing of it can be rolled back"])
    if name and name not in names:
        wrong = f"{app.name} is not deployed to {name!r}, only to: {', '.join(names)}"
        raise ConfigError([wrong])
    return name or names[-1]


def caller(tools: Tools) -> str:
    """Return who runs this command: the user that the cluster knows, else that of this machine."""
    with suppress(HookError, *SHAPE_ERRORS):
        args = ("auth", "whoami", "-o", "json")
        answer = tools.doors.kubectl.run(*args, namespace=ORCHESTRATION, timeout=LOOK_SECONDS)
        return clip(str(json.loads(answer)["status"]["userInfo"]["username"]), 100)
    return local_user()


def local_user() -> str:
    """Return who runs this command, as this machine names them."""
    user = os.environ.get("USER") or f"user {os.getuid()}"
    return clip(f"{user}@{socket.gethostname()}", 100)


def scale_up_and_await_endpoints(
    deployer: Deployer, task: Task, size: int, target: HistoryEntry
) -> None:
    """Let a target be as large as what was left, and wait for its endpoints.

    What served alone until now may be larger than the target was in its time.
    """
    workloads = deployer.steady.workloads
    if workloads.size(task, target.selector) < size:
        workloads.scale(task, f"{task.app.name}-{target.colour}", size)
    task = replace(task, run=replace(task.run, id=target.run))
    since = deployer.doors.clock.now()
    traffic = deployer.steady.traffic
    if not traffic.endpoints_converge(task, target.selector, target.replicas, since):
        detail = "the Service was switched, but its endpoints did not follow"
        raise StageError(Reason.ENDPOINTS_MISSING, detail)


def version_words(entry: HistoryEntry) -> str:
    """Return what a person reads for a history entry."""
    if not entry:
        return "what is not in the history"
    return f"{entry.run or 'what was there before'} ({entry.colour or 'adopted'})"


def rerun(tools: Tools, args: argparse.Namespace) -> int:
    """Let a run that has ended run again, rejected or not, if it is the head of a branch."""
    app = tools.app_of(args.run)
    run = head_to_rerun(tools, app, args.run)
    if run.ref == app.deploy_ref:  # another branch may be put on the same commit
        tools.deployer.state.write(app, forget=[Rejection(commit=run.commit).key])
    places = [read_environment(tools, app, name) for name in app.deploy.environments]
    if places and all(p.live.run == run.id and not p.bake_until for p in places):
        print_text(f"{run.id} is live")
        return 0
    until = tools.doors.clock.monotonic() + REOPEN_SECONDS
    while not reopened(tools, app, run):
        if tools.doors.clock.monotonic() > until:
            text = f"the old Jobs of {run.id} are still being deleted; try again in a minute"
            raise HookError(text)
        tools.doors.pause(0.5)
    if newer_than(run, tools.deployer.state.read(app)):  # it may have ended again by now
        tools.deployer.state.write(app, RunRecord.of(run))
    print_text(f"{run.id} is under way; `status {app.name}` shows how far it is")
    return 0


def head_to_rerun(tools: Tools, app: App, text: str) -> Run:
    """Return the run of a branch's head whose id begins with a text; raises RefusedError."""
    heads = {
        run_id(app.name, ref, commit, max(ID_DIGITS)): (ref, commit)
        for ref, commit in tools.doors.git.heads(app.repository).items()
    }
    if longest := completed(text, heads):  # of each push, since all its ids begin that one
        ref, commit = heads[longest]
        ids = run_ids(app.name, ref, commit)
        record = tools.deployer.state.read(app).find(ref, commit)
        name = record.id if record else text if text in ids else ids[0]
        now = tools.doors.clock.now()
        push = {"ref": ref, "commit": commit, "by": caller(tools), "delivery": RERUN}
        return Run(id=name, app=app.name, **push, received=now)
    if run := completed(text, [entry.run for entry in read_runs(tools, [app], [])]):
        raise RefusedError(f"{run} is not the head of a branch; only that can run again")
    raise RefusedError(f"{text} is unknown: neither a recorded run nor a branch's head has this id")


def reopened(tools: Tools, app: App, run: Run) -> bool:
    """Create the test Job of a run, or open its Jobs again; False until its old Jobs are gone."""
    kubectl = tools.doors.kubectl
    name = f"test-{run.id}"
    jobs = [test_job(tools.config, app, run)]
    refusal = kubectl.create_each(jobs, tools.config.namespaces["test"]).get(name)
    if refusal is None:
        return True
    if refusal.kind != "AlreadyExists":
        raise StageError(Reason.JOB_REFUSED, refusal.said)
    return reopen(kubectl, run, jobs_of(kubectl, tools.config, [run.id])[run.id])


def plan(tools: Tools, args: argparse.Namespace) -> int:
    """Print what a push of a commit would do now, changing nothing; 1 if a part is missing."""
    app = tools.app(args.app)
    ref = app.deploy_ref
    head = tools.doors.git.heads(app.repository).get(ref, "")
    commit = tools.full_commit(app, args.commit, recorded=True) if args.commit else head
    if not commit:
        raise RefusedError(f"{app.repository} has no branch {app.branch!r}")
    run = Run(id=run_id(app.name, ref, commit), app=app.name, ref=ref, commit=commit)
    answers = Plan(tools, app, run)
    try:
        with tools.deployer.checkout(app, commit) as checkout:
            superseded = f", superseded: {app.branch} is at {head}" if commit != head else ""
            print_text(f"run: {run.id}{superseded}")
            answers.print_all(checkout)
    except GitError as failure:
        if "not our ref" in failure.stderr:
            text = f"commit {commit} is unknown: {app.repository} does not have it"
            raise RefusedError(text) from failure
        raise
    return 0 if answers.complete else 1


@dataclass(slots=True)
class Plan:
    """What a push of one run would do now; nothing is changed in the cluster."""

    tools: Tools
    app: App
    run: Run
    complete: bool = True  # whether all that was asked could be answered

    def print_all(self, checkout: Path) -> None:
        """Print every answer; the manifests of the commit are in the checkout."""
        namespaces = self.tools.config.namespaces
        self.print_one("rejected", self.rejection)
        self.print_one("permissions", self.missing_rights)
        for name in (*JOB_STAGES, *self.app.deploy.environments):
            self.print_one(f"{name}, quota", self.quota, namespaces[name])
        for name in self.app.deploy.environments:
            # by tag, since it has no digest before it is built
            image = f"{self.app.build.image}:{self.run.commit[:8]}"
            task = replace(task_of(self.tools.config, self.app, name, self.run), image=image)
            self.print_one(f"{name}, live", self.live_version, task)
            self.print_one(f"{name}, next", self.next_version, task, checkout)

    def print_one(self, title: str, answer: Callable[..., str], *about: Any) -> None:
        """Print an answer, or why there is none."""
        try:
            text = answer(*about)
        except ConfigError:
            raise
        except HookError as failure:
            if isinstance(failure, KubectlError) and failure.kind == "Unreachable":
                raise
            text = printable(self.tools.doors.secrets.mask(f"failed: {failure}"))
            text = text.replace("\n", "\n  ")
            self.complete = False
        print_text(f"{title}: {text}")

    def rejection(self) -> str:
        """Return whether the commit is rejected and why, or else how its run ended before."""
        state = self.tools.deployer.state.read(self.app)
        again = f"only `rerun {self.run.id}` deploys it"
        if rejected := state.rejection(self.app, self.run.commit):
            return f"{rejected.reason}; {again}"
        record = state.find(self.run.ref, self.run.commit)
        if record is None or record.outcome in ("", Outcome.DEPLOYED):
            return "no"
        ended = f"no, but its run ended {record.outcome} at {record.stage}: {record.reason}"
        if not record.next_try:
            return f"{ended}; `rerun {record.id}` runs it again"
        return f"{ended}; it is tried again in {age(self.tools.doors.clock.now(), record.next_try)}"

    def missing_rights(self) -> str:
        """Return what the daemon must be able to do, by its Roles, and the caller may not."""
        reviews = [*self.access_reviews()]
        stdin = json.dumps({"apiVersion": "v1", "kind": "List", "items": reviews})
        args = ("create", "-f", "-", "-o", 'jsonpath={.status.allowed}{"\\n"}', "--validate=false")
        answers = self.tools.doors.kubectl.run(*args, stdin=stdin).split()
        missing: dict[str, list[str]] = {}
        for review, allowed in zip(reviews, answers, strict=True):
            if allowed != "true":
                right = review["spec"]["resourceAttributes"]
                parts = filter(None, (right["group"], right["resource"], right["subresource"]))
                where = f"{'/'.join(parts)} in {right['namespace']}"
                missing.setdefault(where, []).append(right["verb"])
        texts = [f"{', '.join(verbs)} {where}" for where, verbs in missing.items()]
        return "; ".join(texts) or "all there"

    def access_reviews(self) -> Iterator[Object]:
        """Yield by what to ask the API server for all that the daemon's Roles grant it here."""
        namespaces = self.tools.config.namespaces
        tables = {ORCHESTRATION: STATE_RIGHTS}
        tables |= {namespaces[stage]: JOB_RIGHTS for stage in JOB_STAGES}
        tables |= {namespaces[name]: APP_RIGHTS for name in self.app.deploy.environments}
        kind = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
        for namespace, rights in tables.items():
            for path, verbs in rights.items():
                group, resource, subresource = f"{path}/".split("/")[:3]
                right = {"namespace": namespace, "group": group, "resource": resource}
                right["subresource"] = subresource
                for verb in verbs.split():
                    yield {**kind, "spec": {"resourceAttributes": {**right, "verb": verb}}}

    def quota(self, namespace: str) -> str:
        """Return how much of each quota of a namespace is used, if the account may read that."""
        try:
            quotas = self.tools.doors.kubectl.list("resourcequotas", namespace)
        except KubectlError as refusal:
            if refusal.kind != "Forbidden":
                raise
            return UNREADABLE  # as for the daemon's own account, which is no fault
        counted = [quota["status"] for quota in quotas if quota.get("status", {}).get("used")]
        texts = [
            f"{name} {status['used'].get(name, 0)} of {most}"
            for status in counted
            for name, most in status["hard"].items()
        ]
        return ", ".join(texts) or "none"

    def live_version(self, task: Task) -> str:
        """Return what is live in an environment, and what was changed of it since."""
        services = self.tools.deployer.steady.live
        service = services.read(task)
        live = service.live if service else HistoryEntry()
        if not live.release:
            return "not deployed from here" if service else "nothing"
        same = ", this commit" if live.commit == self.run.commit else ""
        deployed = services.release(task, live.release).deployment
        changes = self.changes(task.namespace, deployed) or ", as it was deployed"
        return f"{live.run} ({live.colour}){same}{changes}"

    def next_version(self, task: Task, checkout: Path) -> str:
        """Return what would be applied to an environment, and how long its pods would take."""
        kubectl = self.tools.doors.kubectl
        objects = self.tools.deployer.read_objects(task, checkout)
        placement = self.tools.deployer.steady.claims.idle_colour_and_size(task)
        release = render(task.app, task.run, task.image, placement, objects)
        services = self.tools.deployer.steady.live
        services.require_accepted(task, services.read(task), release)
        self.tools.deployer.require_accepted(task, release)
        companions = self.tools.deployer.steady.companions
        deployment = release.deployment
        names = [c["metadata"]["name"] for c in release.configmaps]
        new = [n for n in names if not kubectl.get("configmap", n, task.namespace)]
        idle = kubectl.get("deployment", deployment["metadata"]["name"], task.namespace)
        # where pods stand they are replaced one by one, else all start at once
        steps = release.wanted if idle and idle["spec"].get("replicas") else 1
        seconds = steps * (deployment["spec"]["minReadySeconds"] + START_SECONDS)
        forecast = f"{release.colour}, {release.wanted} pods in about {seconds:.0f} s"
        if placement.replicas not in (0, release.wanted):
            forecast += f", replicas: {placement.replicas} → {release.wanted}"
        forecast += f", new ConfigMaps: {', '.join(new) or 'none'}"
        warning = probe_warning(task.app.deploy.health, release) + shutdown_warning(release.pod)
        warning += unread_warning(checkout, task.app.deploy.folder(task.environment))
        warning += "".join(f"\n  {remark}" for remark in image_remarks(task.app, objects))
        warning += "".join(f"\n  {line}" for line in companion_lines(companions, task, release))
        return forecast + warning + self.changes(task.namespace, deployment)

    def changes(self, namespace: str, wanted: Object) -> str:
        """Return what writing a Deployment would change in its spec, as lines, secrets masked.

        Not by `kubectl diff`, in whose text the value of a variable may stand without its name.
        Where the server refuses to compare, the plan is not complete.
        """
        kubectl = self.tools.doors.kubectl
        mask = self.tools.doors.secrets.mask
        name = wanted["metadata"]["name"]
        current = kubectl.get("deployment", name, namespace)
        try:
            text = kubectl.put(wanted, current, namespace, "--dry-run=server", "-o=json")
        except KubectlError as refusal:
            self.complete = False
            return mask(f"\n  not compared: {refusal}")
        before = spec_lines(mask(current or {"spec": {}}))
        after = spec_lines(mask(json.loads(text)))
        lines = difflib.unified_diff(before, after, f"{name} now", f"{name} then", lineterm="")
        return "".join(f"\n  {line}" for line in lines)


def companion_lines(companions: Companions, task: Task, release: Release) -> list[str]:
    """Return what deploying a release would do to each object beside an app, a line for each."""
    wanted = release.companions_for(task.app.name)
    records: dict[Identity, CompanionRecord] = {}
    with noting_unreadable(task.namespace, []):  # the caller's account may be a reader's
        records = companions.records(task)
    plain = records_of(task, release.plain_budgets)
    listed = [*plain, *records.values(), *records_of(task, wanted)]
    if not listed:
        return []
    standing = companions.look(task, listed)
    taken = companions.adoption.takeable(task, standing, records)
    records |= {record.identity: record for record in plain if record.identity in taken}
    by_identity = {c.identity: c for c in standing.companions(wanted, records)}
    return [
        companion_line(companion, taken=identity in taken)
        for identity, companion in sorted(by_identity.items())
        if companion.wanted or companion.standing
    ]


def companion_line(companion: Companion, *, taken: bool) -> str:
    """Return what becomes of a companion; `taken`: whether it is taken over from its owner."""
    if not companion.differs:
        return f"{companion}: unchanged"
    times = companion.times
    words = f"changed {times.changed}"
    if not companion.standing:
        words = f"created {times.created}"
    elif not companion.wanted:
        words = f"deleted {times.deleted}"
    return f"{companion}: taken over, {words}" if taken else f"{companion}: {words}"


def probe_warning(health: Health, release: Release) -> str:
    """Return a line about pods of which nothing tells that they are ready, "" for others."""
    container = serving_of(health, release.pod, release.ports).container
    if container.get("readinessProbe"):
        return ""
    ready = f"container {container['name']} counts as ready once it runs and takes connections"
    return f"\n  warning: no readiness probe: {ready}; add one, or set deploy.health.path"


def shutdown_warning(pod: Object) -> str:
    """Return a line about a pod that is killed before it can finish its requests, "" for others."""
    with suppress(*SHAPE_ERRORS):  # the API server refuses what has another shape
        grace = pod.get("terminationGracePeriodSeconds")
        grace = 30 if grace is None else int(grace)
        sleeps = {str(c["name"]): pre_stop_sleep(c) for c in pod["containers"]}
        name, sleep = max(sleeps.items(), key=lambda item: item[1])
        if grace - sleep < LEAST_GRACE:
            taken = f", and the preStop sleep of {clip(name, 63)} takes {sleep} s" if sleep else ""
            needed = "pods are killed before they can finish their requests"
            return f"\n  warning: terminationGracePeriodSeconds is {grace}{taken}: {needed}"
    return ""


def pre_stop_sleep(container: Object) -> int:
    """Return the seconds that a container sleeps before it gets SIGTERM, as far as one can see."""
    handler = (container.get("lifecycle") or {}).get("preStop") or {}
    if seconds := (handler.get("sleep") or {}).get("seconds"):
        return int(seconds)
    command = " ".join((handler.get("exec") or {}).get("command") or ())
    match = re.search(r"(?<!\S)(?:/bin/)?sleep ([0-9]{1,6})s?(?![\w.])", command)
    return int(match[1]) if match else 0


def spec_lines(deployment: Object) -> list[str]:
    """Return a Deployment's spec as lines of YAML; that a drain has restarted it is no change."""
    spec = deployment["spec"]
    meta = spec.get("template", {}).get("metadata", {})
    annotations = {**(meta.get("annotations") or {}), RESTARTED: None}
    meta["annotations"] = {key: value for key, value in annotations.items() if value is not None}
    return yaml.safe_dump(spec).split("\n")[:-1]


COLLECTOR_SECONDS = 60.0


def clone(environ: Mapping[str, str]) -> int:
    """Inside a Job pod: check out the pushed commit, or write why not where the daemon reads it."""
    names = ("CLONE_URL", "CLONE_COMMIT", "CLONE_DIRECTORY", "CREDENTIALS_FILE", "TERMINATION_LOG")
    require_variables(environ, *names)
    surroundings = Surroundings(ca=Path(environ.get("CA_FILE", os.devnull)))
    git = Git(Path(environ["CREDENTIALS_FILE"]), surroundings=surroundings)
    directory = Path(environ["CLONE_DIRECTORY"])
    cloner = Cloner(git, environ.get("CLONE_APP", ""), clone_settings(environ))
    try:
        cloner.clone(environ["CLONE_URL"], environ["CLONE_COMMIT"], directory)
    except (GitError, RefusedError) as failure:
        text = git.secrets.mask(str(failure))
        Path(environ["TERMINATION_LOG"]).write_text(text)
        kind = RefusedError if isinstance(failure, RefusedError) else HookError
        raise kind(text) from failure
    (directory.parent / "results").mkdir(exist_ok=True)
    if authorities := surroundings.authorities():
        Path(environ["CA_BUNDLE"]).write_bytes(authorities)
    await_collector(environ.get("COLLECTING", ""))
    return 0


def await_collector(path: str) -> None:
    """Wait until the side-car of the tests listens, for a limited time.

    It would not hear the end of tests that are over before that, and their report would be lost.
    """
    until = time.monotonic() + COLLECTOR_SECONDS
    while path and not Path(path).exists() and time.monotonic() < until:
        threading.Event().wait(0.05)


def clone_settings(environ: Mapping[str, str]) -> CloneSettings:
    """Return the settings that a Job's manifest has in variables; raises ConfigError."""
    texts = {f.name: environ.get(f"CLONE_{f.name.upper()}", "") for f in fields(CloneSettings)}
    faults: list[str] = []
    values = {name: yaml.safe_load(text) for name, text in texts.items()}
    settings: CloneSettings = load_section(CloneSettings, values, "", faults)
    if faults:
        raise ConfigError(faults)
    return settings


def collect(environ: Mapping[str, str]) -> int:
    """Inside a test pod: wait until the tests have ended, then write a summary of their report.

    Why tests failed is printed: the container's log is kept, as that of the tests is.
    """
    require_variables(environ, "JUNIT_XML", "TERMINATION_LOG")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    if listening := environ.get("COLLECTING"):
        Path(listening).touch()
    ended.wait()
    summary = junit_summary(Path(environ["JUNIT_XML"]))
    Path(environ["TERMINATION_LOG"]).write_text(summary.sentence, "utf-8")
    if summary.failures:
        print_text(f"{summary.sentence}\n\n{summary.failures}")
    return 0


def assigned(assignments: Iterable[str]) -> dict[str, str]:
    """Return the variables that a Job's manifest sets by arguments."""
    parts = (assignment.partition("=") for assignment in assignments)
    return {name: value for name, _, value in parts}


def require_variables(environ: Mapping[str, str], *names: str) -> None:
    """Raise ConfigError where the variables are missing that a Job's manifest sets."""
    if missing := [name for name in names if name not in environ]:
        raise ConfigError([f"this runs inside Job pods, where {', '.join(missing)} would be set"])


def completed(text: str, ids: Iterable[str]) -> str:
    """Return the only one of these ids that a text begins, "" for none.

    Raises ConfigError where it begins several of them.
    """
    matches = sorted({each for each in ids if each.startswith(text)})
    if len(matches) > 1 and text not in matches:
        some = f"{len(matches)} ids begin with it, such as {', '.join(matches[:5])}"
        raise ConfigError([f"{text} is ambiguous: {some}"])
    return text if text in matches else "".join(matches)


def print_text(text: str) -> None:
    """Print a command's answer; a reader who has gone, `head` say, does not stop the command."""
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# === main =========================================================================================

COMMANDS = {c.__name__: c for c in (serve, push, status, explain, plan, rollback, rerun)}
JOB_COMMANDS = {c.__name__: c for c in (clone, collect)}


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one command and return its exit status; what went wrong is written to stderr."""
    args = parser().parse_args(argv)
    logging.basicConfig(format="gitops-hook: %(message)s", level=logging.WARNING)
    try:
        if args.command in JOB_COMMANDS:
            return JOB_COMMANDS[args.command]({**environ, **assigned(args.variables)})
        return COMMANDS[args.command](Tools.load(environ), args)
    except HookError as failure:
        code = exit_status(failure)
        lines = failure.faults if isinstance(failure, ConfigError) else [str(failure)]
        if isinstance(failure, KubectlError) and failure.kind == "Unreachable":
            away = "no cluster answers, or it refuses this account; is KUBECONFIG right?"
            lines = [f"{away} {failure}"]
    except KeyboardInterrupt:
        code = 1
        lines = ["interrupted; `status` shows how things stand"]
    sys.stderr.writelines(f"gitops-hook: {mask_value(line, ())}\n" for line in lines)
    return code


def exit_status(failure: HookError) -> int:
    """Return the exit status for a failure: 1 tried, 2 usage or surroundings, 3 refused."""
    kind = failure.kind if isinstance(failure, KubectlError) else ""
    if isinstance(failure, ConfigError) or kind == "Unreachable":
        return 2
    is_refusal = isinstance(failure, RefusedError | SupersededError) or kind == "Conflict"
    return EXIT_REFUSED if is_refusal else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
