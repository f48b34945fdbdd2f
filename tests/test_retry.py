"""When what failed is tried again, when what was done is done again, and which thread is late."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import gitops_hook as hook

DELAYS = hook.DELAYS


class HeldClock(hook.Clock):
    """A clock that a test holds."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.monotonic: Any = lambda: self.time


@pytest.fixture
def clock() -> HeldClock:
    return HeldClock()


@pytest.fixture
def retry(clock: HeldClock) -> hook.Retry:
    return hook.Retry(clock)


def delays_after_failures(retry: hook.Retry, count: int) -> list[float]:
    """Let an item fail so often; return how long it waits after each failure."""
    delays = []
    for _ in range(count):
        retry.failed("shop")
        delays.append(retry.delay("shop"))
    return delays


def test_an_item_that_never_failed_is_due(retry: hook.Retry) -> None:
    assert retry.due("shop")
    assert not retry.failing()
    assert retry.wait(30.0) == 30.0


def test_the_delays_of_an_item_grow_and_then_stay_the_same(clock: HeldClock) -> None:
    waits = [delays_after_failures(hook.Retry(clock), 8) for _ in range(300)]
    means = [sum(column) / len(waits) for column in zip(*waits, strict=True)]
    assert means == pytest.approx([*DELAYS, 30.0, 30.0, 30.0], rel=0.05)


def test_each_delay_varies_by_at_most_three_tenths(clock: HeldClock) -> None:
    waits = [delays_after_failures(hook.Retry(clock), 6) for _ in range(300)]
    for delay, column in zip((*DELAYS, 30.0), zip(*waits, strict=True), strict=True):
        assert delay * 0.7 <= min(column) < delay * 0.8
        assert delay * 1.2 < max(column) <= delay * 1.3


def test_an_item_is_due_again_after_its_delay(retry: hook.Retry, clock: HeldClock) -> None:
    retry.failed("shop")
    delay = retry.delay("shop")
    clock.time += delay - 0.01
    assert not retry.due("shop")
    clock.time += 0.02
    assert retry.due("shop")
    assert retry.failing()


def test_the_first_failures_are_reported_and_then_every_tenth(retry: hook.Retry) -> None:
    reported = [number for number in range(1, 42) if retry.failed("shop")]
    assert reported == [1, 2, 3, 4, 5, 11, 21, 31, 41]


def test_how_often_later_failures_are_reported_can_be_chosen(clock: HeldClock) -> None:
    retry = hook.Retry(clock, [1.0], report_every=30)
    assert [number for number in range(1, 92) if retry.failed("shop")] == [1, 31, 61, 91]


def test_a_success_says_whether_there_were_failures_and_forgets_them(retry: hook.Retry) -> None:
    assert not retry.succeeded("shop")
    delays_after_failures(retry, 7)
    assert retry.succeeded("shop")
    assert not retry.succeeded("shop")
    assert retry.due("shop")
    assert not retry.failing()
    assert delays_after_failures(retry, 1)[0] <= 1.3


def test_one_item_that_waits_holds_back_no_other(retry: hook.Retry) -> None:
    retry.failed("shop")
    assert not retry.due("shop")
    assert retry.due("blog")


def test_news_of_an_item_let_it_be_tried_at_once(retry: hook.Retry) -> None:
    for _ in range(4):
        retry.failed("shop", 5)
    assert not retry.due("shop")
    assert not retry.due("shop", 5)
    assert retry.due("shop", 6)
    retry.failed("shop", 6)
    assert not retry.due("shop", 5)
    assert not retry.due("shop", 6)
    assert retry.delay("shop") > 20.0  # it has failed for the fifth time all the same


def test_a_failure_without_news_keeps_those_of_before(retry: hook.Retry) -> None:
    retry.failed("shop", 5)
    retry.failed("shop")
    assert not retry.due("shop", 5)
    retry.succeeded("shop")
    retry.failed("shop")
    assert retry.due("shop", 5)


def test_the_wait_lasts_until_the_next_item_is_due(retry: hook.Retry, clock: HeldClock) -> None:
    delays_after_failures(retry, 5)
    retry.failed("blog")
    assert retry.wait(60.0) == retry.delay("blog")
    assert retry.wait(0.1) == 0.1
    clock.time += 2.0  # the other one is due, and whoever asks knows
    assert retry.wait(60.0) == retry.delay("shop") > 10.0
    retry.succeeded("shop")
    assert retry.wait(60.0) == 60.0


@pytest.mark.parametrize("wrong", [hook.HookError("no answer"), OSError("no answer")])
def test_an_error_is_contained_and_logged_as_often_as_it_is_to_be_reported(
    retry: hook.Retry, caplog: pytest.LogCaptureFixture, wrong: Exception
) -> None:
    for _ in range(11):
        with retry.contain("shop", "it waits", app="shop"):
            raise wrong
    assert not retry.due("shop")
    assert len(caplog.records) == 6
    line: Any = caplog.records[0]
    assert (line.levelname, line.message) == ("WARNING", "it waits")
    assert line.fields == {"detail": "no answer", "app": "shop"}


def test_a_bug_counts_as_a_failure_and_is_raised(
    retry: hook.Retry, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ZeroDivisionError), retry.contain("shop", "it waits"):
        raise ZeroDivisionError
    assert not retry.due("shop")
    assert caplog.records == []


def test_what_ends_well_is_due_and_was_no_failure(retry: hook.Retry) -> None:
    with retry.contain("shop", "it waits"):
        pass
    assert retry.due("shop")
    assert not retry.failing()


def test_threads_share_it_and_no_failure_is_lost(retry: hook.Retry) -> None:
    def use(thread: int) -> int:
        reports = 0
        for _ in range(1000):
            reports += retry.failed("all")
            retry.failed(f"own {thread}")
            retry.wait(30.0)
            retry.succeeded(f"own {thread}")
        return reports

    with ThreadPoolExecutor(8) as pool:
        reports = sum(pool.map(use, range(8)))
    # the first five of 8,000, and numbers 11, 21 and so on
    assert reports == 5 + 799
    assert retry.succeeded("all")
    assert not retry.failing()


def test_what_was_done_is_not_done_again_in_the_same_state_for_a_while(clock: HeldClock) -> None:
    cooldown = hook.Cooldown(clock)
    assert cooldown.allows("run", "a state")
    cooldown.start("run", 10.0, "a state")
    clock.time += 9.0
    assert not cooldown.allows("run", "a state")
    assert cooldown.allows("another", "a state")
    assert cooldown.allows("run", "another state")
    cooldown.start("run", 10.0, "another state")
    clock.time += 9.0
    assert not cooldown.allows("run", "another state")
    clock.time += 2.0
    assert cooldown.allows("run", "another state")


def test_a_cooldown_forgets_what_is_over(clock: HeldClock) -> None:
    cooldown = hook.Cooldown(clock)
    for number in range(100):
        cooldown.start(str(number), 10.0)
        clock.time += 1.0
    assert len(cooldown._until) == len(cooldown._states) == 10


def test_a_thread_is_late_when_it_has_not_moved_in_the_time_that_it_asked_for(
    clock: HeldClock,
) -> None:
    heartbeats = hook.Heartbeats(clock)
    heartbeats.beat("intake", 10.0)
    heartbeats.beat("controller", 20.0)
    clock.time += 11.0
    assert heartbeats.late() == ["intake"]
    heartbeats.beat("intake", 10.0)
    assert heartbeats.late() == []
