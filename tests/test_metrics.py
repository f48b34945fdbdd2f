"""What is counted can be scraped, and nobody outside can make it grow."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

import gitops_hook as hook
from tests.deliveries import Delivery, Receiver, payload, recorded, signed


@pytest.fixture
def receiver(tmp_path: Path) -> Receiver:
    return Receiver(tmp_path)


def results(receiver: Receiver) -> dict[str, float]:
    (family,) = [f for f in receiver.metrics.registry.collect() if f.name.endswith("deliveries")]
    return {s.labels["result"]: s.value for s in family.samples if s.name.endswith("_total")}


def test_two_daemons_in_one_process_count_apart() -> None:
    one = hook.Metrics()
    other = hook.Metrics()
    one.errors.labels("request").inc()
    assert b'gitops_hook_errors_total{where="request"} 1.0' in generate_latest(one.registry)
    assert b'where="request"' not in generate_latest(other.registry)


def test_every_metric_is_ours_by_name_and_says_what_it_means() -> None:
    text = generate_latest(hook.Metrics().registry).decode()
    families = list(text_string_to_metric_families(text))
    assert {f.name for f in families} == {
        f"gitops_hook_{name}" for name in (
            "deliveries", "runs", "switches", "kubectl_calls", "errors", "selector_drift",
            "catch_up_runs", "statuses", "spool_files", "waiting", "jobs", "stage_seconds",
            "queue_wait_seconds", "live_endpoints", "rollback_ready", "reports_failed",
            "last_success_timestamp_seconds",
        )
    }  # fmt: skip
    assert all(f.documentation.endswith(".") for f in families)


def samples(metrics: hook.Metrics) -> dict[str, set[tuple[str, ...]]]:
    """The label values of every sample that a scrape finds at 0, by metric."""
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    zeros = [s for f in families for s in f.samples if s.name.endswith("_total") and not s.value]
    names = {s.name.removeprefix("gitops_hook_").removesuffix("_total") for s in zeros}
    return {n: {(*s.labels.values(),) for s in zeros if f"hook_{n}_total" in s.name} for n in names}


def test_the_first_of_a_kind_is_an_increase_since_all_that_can_happen_is_0_at_the_start(
    tmp_path: Path,
) -> None:
    apps = "apps: [{name: shop, repository: /x.git, build: {builder: none}}]"
    metrics = hook.Metrics()
    doors = hook.Doors(
        kubectl=hook.Kubectl(metrics),
        git=hook.Git(tmp_path),
        secrets=hook.Secrets(tmp_path),
        clock=hook.Clock(),
        reports=hook.Reports(metrics),
        stop=threading.Event(),
    )
    deployer = hook.Deployer(doors)
    hook.Controller(hook.load_config(apps), deployer, hook.Spool(tmp_path, 1))
    places = {("shop", "staging"), ("shop", "production")}
    zeros = samples(metrics)
    assert zeros["selector_drift"] == places
    directions = ("forward", "back", "rollback")
    turns = {tuple(sorted((*p, d))) for p in places for d in directions}
    assert {tuple(sorted(values)) for values in zeros["switches"]} == turns
    assert zeros["catch_up_runs"] == {("shop",)}
    # what counts an error, or names a thread whose bugs are counted by the first word of its name
    source = Path(hook.__file__).read_text("utf-8")
    counting = r"(?:errors\.labels\(|\brepeat\(|\bworkers\.start\(|\bname = )"
    words = {*re.findall(counting + r'f?"([a-z]+)(?: of |")', source)}
    words |= {getattr(hook, constant) for constant in re.findall(counting + r"([A-Z]+)\b", source)}
    assert {word for (word,) in zeros["errors"]} == words
    assert {"worker", "watch", "intake", "heads", "secrets", "reader"} <= words


def test_a_delivery_is_counted_by_what_became_of_it(receiver: Receiver) -> None:
    accepted = signed(payload())
    for delivery in (accepted, accepted, recorded("gitlab-tag-push"), signed(b"{")):
        receiver.post(delivery)
    receiver.post(Delivery({}, b"{}"))
    receiver.request("GET", "/webhook")
    counted = {"accepted": 1, "duplicate": 1, "TagPush": 1, "Malformed": 1}
    assert results(receiver) == counted | {"NotAuthentic": 1, "MethodNotAllowed": 1}


def test_no_text_from_outside_becomes_a_label(receiver: Receiver) -> None:
    for number in range(50):
        evil = f"evil-{number}"
        receiver.post(signed(payload(object_kind=evil)))
        receiver.post(signed(payload(ref=f"refs/heads/{evil}")))
        receiver.post(signed(payload(project={"web_url": f"https://{evil}/x"}, repository=None)))
        receiver.post(signed(payload(after=evil)))
        receiver.post(Delivery({"webhook-id": evil, "X-Gitlab-Token": evil}, b"{}"))
        receiver.request("GET", f"/{evil}")
    assert set(results(receiver)) <= {
        "accepted", "OtherEvent", "UnknownProject", "Malformed", "NotAuthentic",
    }  # fmt: skip
    assert b"evil" not in generate_latest(receiver.metrics.registry)


def test_probes_and_wrong_paths_are_not_deliveries(receiver: Receiver) -> None:
    for path in ("/healthz", "/readyz", "/", "/webhook/", "/metrics"):
        receiver.request("GET", path)
    assert results(receiver) == {}


def test_durations_are_told_from_a_tenth_of_a_second_to_an_hour() -> None:
    metrics = hook.Metrics()
    metrics.stage_seconds.labels("shop", "test", "ok").observe(3.0)
    text = generate_latest(metrics.registry).decode()
    bounds = re.findall(r'stage_seconds_bucket{app="shop",le="([^"]+)"', text)
    assert (bounds[0], bounds[-2:]) == ("0.1", ["3600.0", "+Inf"])
