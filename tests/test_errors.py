"""What errors say, and how the failures of kubectl are classified."""

from __future__ import annotations

import json
import re
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import gitops_hook
from gitops_hook import (
    ConfigError,
    Fault,
    GitError,
    KubectlError,
    ManifestError,
    Outcome,
    Reason,
    StageError,
    clip,
)

DATA = Path(__file__).resolve().parent / "data"
AWAY = "The connection to the server 127.0.0.1:1 was refused"
REFUSED = f"{AWAY} - did you specify the right host or port?"


@given(st.text(), st.integers(3, 400))
def test_clipped_text_is_one_printable_line_of_bounded_length(text: str, limit: int) -> None:
    clipped = clip(text, limit)
    assert len(clipped) <= limit
    assert clipped.isprintable()
    assert not re.search(r"^ |  | $", clipped)


def test_short_text_is_not_changed() -> None:
    assert clip("no such file") == "no such file"


def test_only_the_beginning_of_a_text_of_megabytes_is_read() -> None:
    tracemalloc.start()
    assert clip("x y " * 1_000_000, 20) == "x y x y x y x y x..."
    assert tracemalloc.get_traced_memory()[1] < 8_000_000  # twice the text itself
    tracemalloc.stop()


def test_what_is_cut_is_marked() -> None:
    assert clip("x" * 20, 10) == "x" * 7 + "..."


def test_a_configuration_error_names_all_faults() -> None:
    wrong = ConfigError(["a: is required", "b: unknown key"])
    assert wrong.faults == ("a: is required", "b: unknown key")
    assert str(wrong) == "a: is required; b: unknown key"


def test_a_refusal_of_manifests_has_each_fault_on_a_line_of_its_own() -> None:
    refusal = ManifestError([Fault("a\nb\x1b[31m"), Fault("c" * 5000)])
    assert refusal.detail == f"a b [31m\n{'c' * 497}..."
    assert refusal.outcome is Outcome.FAILED


def test_of_very_many_faults_the_first_are_listed_and_the_others_counted() -> None:
    lines = ManifestError([Fault(str(n)) for n in range(1000)]).detail.split("\n")
    assert lines == [*map(str, range(50)), "950 more are not listed."]


@pytest.mark.parametrize(
    ("reasons", "reason"),
    [
        ([Reason.MANIFEST_REFUSED], Reason.MANIFEST_REFUSED),
        ([Reason.MANIFEST_INVALID, Reason.MANIFEST_REFUSED], Reason.MANIFEST_REFUSED),
        ([Reason.MANIFEST_INVALID, Reason.MANIFEST_INVALID], Reason.MANIFEST_INVALID),
    ],
)
def test_a_refusal_that_a_setting_may_lift_gives_the_reason(
    reasons: list[Reason], reason: Reason
) -> None:
    assert ManifestError([Fault("x", each) for each in reasons]).reason is reason


def kubectl(stderr: str, code: int | None = 1) -> KubectlError:
    return KubectlError(["kubectl", "get", "service", "shop", "-o", "json"], code, stderr)


@pytest.mark.parametrize(
    ("stderr", "kind"),
    [
        ('Error from server (AlreadyExists): jobs.batch "x" already exists', "AlreadyExists"),
        ('Error from server (Conflict): Operation cannot be fulfilled on services "x"', "Conflict"),
        ('Error from server (NotFound): services "x" not found', "NotFound"),
        ('Error from server (Forbidden): services "x" is forbidden: User "y"', "Forbidden"),
        ("Error from server (InternalError): an error on the server", "Unreachable"),
        ("Error from server (TooManyRequests): the server has received too many", "Unreachable"),
        ("Error from server (Timeout): request timed out", "Unreachable"),
        ("Error from server (ServerTimeout): could not be completed at this time", "Unreachable"),
        ('The Service "x" is invalid: spec.ports: Required value', "Invalid"),
        (REFUSED, "Unreachable"),
        ("Unable to connect to the server: dial tcp: lookup x: no such host", "Unreachable"),
        ("Unable to connect to the server: net/http: TLS handshake timeout", "Unreachable"),
        ("error: You must be logged in to the server (Unauthorized)", "Unreachable"),
        ('error: context "gone" does not exist', "Unreachable"),
        ("Error in configuration: context was not found for specified context: x", "Unreachable"),
        ("error: unknown flag: --wait-a-minute", "Unknown"),
        ("", "Unknown"),
    ],
)
def test_a_failure_of_kubectl_is_classified_by_its_words(stderr: str, kind: str) -> None:
    assert kubectl(stderr).kind == kind


EXISTS = 'Error from server (AlreadyExists): error when creating "STDIN": jobs "x" already exists'
OVERLOADED = (
    'Error from server (InternalError): error when creating "STDIN": an error on the server'
)


@pytest.mark.parametrize(
    "stderr", [f"{EXISTS}\n{OVERLOADED}", f"{OVERLOADED}\n{EXISTS}\n", f"{EXISTS}\n{REFUSED}"]
)
def test_among_several_failures_one_that_may_pass_by_itself_counts(stderr: str) -> None:
    assert kubectl(stderr).kind == "Unreachable"


def test_among_several_failures_that_stay_the_first_counts() -> None:
    assert kubectl(f'{EXISTS}\nThe Job "y" is invalid: spec').kind == "AlreadyExists"


def test_a_reason_that_a_refusal_quotes_is_not_the_servers() -> None:
    quoted = 'Error from server (Forbidden): jobs "Error from server (Timeout)" is forbidden'
    assert kubectl(quoted).kind == "Forbidden"


TRANSPORT = 'Get "https://10.0.0.1/api": dial tcp 10.0.0.1:443: connect: connection refused'
HOSTILE = [
    "connection refused",
    "Error from server (ServiceUnavailable): the server is currently unable to handle the request",
    "denied: etcdserver: request timed out",
    "Unable to connect to the server: EOF",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        ('The Deployment "shop-blue" is invalid: spec: Invalid value: "{}": must', "Invalid"),
        ("The Deployment \"shop\" is invalid: \n* metadata.labels: Invalid value: '{}'", "Invalid"),
        ('The ConfigMap "x" is invalid: data[a]: Invalid value: "b\n{}\n"', "Invalid"),
        ("The request is invalid: patch: \n{}", "Invalid"),
        ('Error from server (BadRequest): strict decoding: unknown field "{}"', "BadRequest"),
        ('Error from server (BadRequest): json: cannot unmarshal "\n{}', "BadRequest"),
        ('Error from server (Forbidden): pods "x" is forbidden: violates "{}"', "Forbidden"),
        ('Error from server: admission webhook "x" denied the request: \n{}', "Denied"),
        ('error: resource mapping not found for name: "{}" from "STDIN"', "Unknown"),
        ('Warning: unknown field "spec.\\"{}"', "Unknown"),
    ],
    ids=["invalid", "several", "lines", "request", "field", "type", "forbidden", "webhook", "own",
         "warning"],
)  # fmt: skip
def test_a_text_of_a_manifest_is_not_taken_for_an_outage(
    refusal: str, kind: str, text: str
) -> None:
    assert kubectl(refusal.format(text)).kind == kind
    assert kubectl("Warning: old\n" + refusal.format(text) + "\n").kind == kind


@pytest.mark.parametrize(
    "stderr",
    [
        f'error when creating "STDIN": {TRANSPORT}',
        f"error: failed to download openapi: {TRANSPORT}",
        "Error from server: etcdserver: leader changed",
        "Error from server: error dialing backend: dial tcp 10.0.0.2:10250: connection refused",
        'Error from server (InternalError): Internal error occurred: failed calling webhook "x"',
        f"{REFUSED}\nsome more",
    ],
    ids=["create", "openapi", "etcd", "backend", "webhook", "first"],
)
def test_an_outage_is_recognised_by_lines_that_quote_no_manifest(stderr: str) -> None:
    assert kubectl(stderr).kind == "Unreachable"


@pytest.mark.parametrize("said", ["Error from server: ", "Error from server (InternalError): "])
def test_what_is_too_large_for_the_cluster_is_not_tried_again(said: str) -> None:
    assert kubectl(f"{said}etcdserver: request is too large").kind == "Invalid"


def test_the_message_of_a_failure_lacks_what_the_line_quotes() -> None:
    said = 'Error from server (Forbidden): x "exceeded quota: y" is forbidden: "a \\" etcd" b'
    failed = kubectl(f"Warning: old\n{said}\nsecond")
    assert failed.kind == "Forbidden"
    assert failed.message == "Error from server (Forbidden): x  is forbidden:  b"


def test_no_answer_in_time_is_unreachable() -> None:
    failed = kubectl("", None)
    assert failed.kind == "Unreachable"
    assert str(failed) == "kubectl get service shop: no answer in time; it was stopped"


def test_a_refusal_by_name_counts_even_where_a_time_out_is_quoted() -> None:
    text = 'Error from server (Conflict): "x" was modified: context deadline exceeded'
    assert kubectl(text).kind == "Conflict"


def test_a_failure_names_the_call_and_what_was_said_on_one_line() -> None:
    failed = kubectl("error: first\nsecond\n")
    assert str(failed) == "kubectl get service shop: error: first second"
    assert failed.stderr == "error: first\nsecond\n"


def recorded(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def test_kubectl_is_quoted_without_its_hints() -> None:
    said = {
        entry["note"].partition(":")[0]: kubectl(entry["stderr"])
        for entry in recorded("hints.jsonl")
    }
    assert {note: failed.said for note, failed in said.items()} == {
        "the schema for validation cannot be read": (
            'error: error validating "STDIN": error validating data: failed to download openapi: '
            'Get "https://127.0.0.1:1/openapi/v2?timeout=32s": dial tcp 127.0.0.1:1: connect: '
            "connection refused"
        ),
        "no server listens": AWAY,
        "an unknown flag": "error: unknown flag: --no-such-flag",
        "a missing argument": "error: exactly one NAME is required, got 0",
    }
    kinds = [failed.kind for failed in said.values()]
    assert kinds == ["Unreachable", "Unreachable", "Unknown", "Unknown"]


def test_the_log_of_the_client_library_is_not_repeated() -> None:
    log = (
        'E1122 23:24:08.903402    7210 memcache.go:381] "Couldn\'t get current server API group"\n'
    )
    assert str(kubectl(log + log + REFUSED)) == f"kubectl get service shop: {AWAY}"
    assert kubectl(log + log + REFUSED).kind == "Unreachable"


def test_a_silent_failure_still_says_something() -> None:
    assert str(GitError(["git", "fetch"], 128, "")) == "git fetch: exit status 128"


def recorded_failures() -> list[tuple[str, str]]:
    """What a real kubectl printed when a server refused, with the server's word for it."""
    failures = []
    for path in sorted(DATA.rglob("*.jsonl")):
        for line in path.read_text().splitlines():
            call = json.loads(line)
            if isinstance(call, dict) and call.get("exit") and call.get("stderr"):
                word = re.search(r"Error from server \((\w+)\)", call["stderr"])
                if word:
                    failures.append((call["stderr"], word[1]))
    return failures


def test_recorded_refusals_are_understood() -> None:
    failures = recorded_failures()
    assert len(failures) >= 5
    overloaded = {"InternalError", "ServiceUnavailable", "Timeout", "TooManyRequests"}
    for stderr, word in failures:
        assert kubectl(stderr).kind == ("Unreachable" if word in overloaded else word)


@pytest.mark.parametrize(
    "piece", ['\\"', '"', "\\", 'x"\\'], ids=["escaped", "quote", "slash", "mix"]
)
def test_a_quote_that_was_cut_off_is_read_fast_and_is_not_kubectls_word(
    piece: str,
) -> None:
    said = f'The Deployment "shop" is invalid: spec.x: Invalid value: "{piece * 300_000}'
    began = time.monotonic()
    assert kubectl(f"{said}: connection refused").kind == "Invalid"
    assert time.monotonic() - began < 10


def test_every_recorded_refusal_is_classified() -> None:
    failures = {entry["note"]: kubectl(entry["stderr"]) for entry in recorded("refusals.jsonl")}
    assert {note: failed.kind for note, failed in failures.items()} == {
        "companions: one of three is invalid": "Invalid",
        "a kind that the cluster does not have": "Unknown",
        "… second half": "Invalid",
        "the same node port in another Service": "Invalid",
        "clusterIP to None is refused": "Invalid",
        "the same Event again": "AlreadyExists",
    }


def test_the_error_that_ends_a_run_carries_its_reason() -> None:
    ended = StageError(Reason.IMAGE_NOT_FOUND, "shop:1: not found")
    assert (ended.reason, ended.detail) == ("ImageNotFound", "shop:1: not found")
    assert str(ended) == "ImageNotFound: shop:1: not found"


def test_reasons_are_words_in_camel_case_and_outcomes_in_lower_case() -> None:
    assert all(re.fullmatch(r"([A-Z][a-z]+)+", reason) for reason in Reason)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)?", outcome) for outcome in Outcome)


def test_every_reason_and_outcome_is_used() -> None:
    source = Path(gitops_hook.__file__).read_text()
    for word in (*Reason, *Outcome):
        assert re.search(rf"\b{type(word).__name__}\.{word.name}\b", source), word
