"""Commit statuses: what GitLab is told of a run, and that it is told so once, whatever happens."""

from __future__ import annotations

import json
import logging
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import responses
import trustme

import gitops_hook as hook
from gitops_hook import Outcome, Reason
from tests.gitlab_server import TOKEN, GitLabServer, Trouble, gitlab_server
from tests.idle_controller import FakeKubectl, HeldClock, add_job, idle_controller, synced
from tests.world import Object, eventually

COMMIT = "a" * 40
OTHER = "b" * 40
MAIN = "refs/heads/main"
SIDE = "refs/heads/side"
STARTED = 1_000_000.0
DIGEST = "sha256:" + "0" * 64
PROJECT = "demo/shop"
STATUSES = f"/api/v4/projects/demo%2Fshop/statuses/{COMMIT}"
API = f"https://git.example.com{STATUSES}"
CONFIG = """
apps:
  - name: shop
    repository: https://git.example.com/demo/shop.git
    build: {image: registry.example.com/demo/shop}
"""
STAGES = ("test", "build", "staging", "production")
RED = "131 passed, 2 failed: test_cart: assert 3 == 2"
# What two pods, a project or a person put into them must reach nobody.
CANARY = "glpat-canary-0123456789"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing of this machine lead requests elsewhere."""
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[GitLabServer]:
    with gitlab_server(PROJECT) as gitlab:
        yield gitlab


class Desk:
    """A sink, what it observes, and a clock and records that outlive it."""

    def __init__(
        self, folder: Path, config: str = CONFIG, url: str = "", token: str = TOKEN
    ) -> None:
        self.folder = folder
        self.config = hook.load_config(f"{config}\ngitlab: {{url: '{url}'}}\n")
        self.kubectl = FakeKubectl()
        self.clock = HeldClock()
        self.clock.now = lambda: STARTED + 100.0  # type: ignore[assignment]
        self.state = hook.StateStore(self.kubectl, self.clock)
        self.secrets = hook.Secrets(folder)
        self.runs: list[hook.ReportedRun] | None = []
        self.deadline = 5.0
        if token:
            self.write_token(token)
        self.sink = self.new_sink()

    def write_token(self, *tokens: str) -> None:
        (self.folder / "gitlab-token").write_text("".join(f"{token}\n" for token in tokens))

    def new_sink(self, door: Any = None) -> hook.CommitStatuses:
        """A sink that knows nothing but what is recorded."""
        door = door or hook.GitLab(self.secrets, deadline=self.deadline)
        self.sink = hook.CommitStatuses(self.config, door, lambda: self.runs, self.state)
        return self.sink

    def show(self, *runs: hook.ReportedRun) -> float:
        """Let the sink look at these runs, all pauses over; return when it looks again."""
        recorded = self.state.read(self.config.apps[0]).statuses
        marks = {id_: record.ended for id_, record in recorded.items()}
        self.runs = [replace(run, settled=marks.get(run.run.id, 0.0)) for run in runs]
        self.clock.time += 1000.0
        return self.sink.send_all()

    def app(self, name: str = "shop") -> hook.App:
        return next(app for app in self.config.apps if app.name == name)

    # Runs, as they are observed.

    def run(self, commit: str = COMMIT, ref: str = MAIN, app: str = "shop") -> hook.Run:
        id_ = hook.run_id(app, ref, commit)
        title = f"a title with {CANARY}"
        return hook.Run(id=id_, app=app, ref=ref, commit=commit, title=title, received=STARTED)

    def job(self, run: hook.Run, stage: str, state: str, **annotations: str) -> hook.Job:
        """A Job of a run; one that has succeeded has left its result."""
        build = hook.test_job if stage == "test" else hook.build_job
        manifest = build(self.config, self.app(run.app), run)
        manifest["metadata"] |= {"resourceVersion": "1", "uid": stage}
        result = {"test": "131 passed, 0 failed", "build": DIGEST}[stage]
        kept = {hook.JOB_STAGES[stage].annotation: result} if state == "succeeded" else {}
        words = {f"gitops-hook/{key}": value for key, value in annotations.items()}
        manifest["metadata"]["annotations"] |= {**kept, **words}
        manifest["spec"]["suspend"] = state == "suspended"
        condition = {"succeeded": "Complete", "failed": "Failed"}.get(state)
        conditions = [{"type": condition, "status": "True"}] if condition else []
        manifest["status"] = {"conditions": conditions}
        return hook.Job(manifest)

    def service(self, run: hook.Run, state: str) -> hook.Service:
        """A live Service: of another run, claimed by this one, switched to it, or confirmed."""
        selector = {hook.LABEL_APP: "shop", hook.LABEL_RUN: run.id, "version": "green"}
        entry = {"run": run.id, "selector": selector, "at": STARTED + 5, "colour": "green"}
        if state == "confirmed":
            entry["outcome"] = "deployed"
        history = [] if state in ("other", "claimed") else [entry]
        claim = (
            {"phase": "preparing", "run": run.id, "since": STARTED} if state == "claimed" else {}
        )
        texts = {"history": json.dumps(history), "deploying": json.dumps(claim)}
        annotations = {f"gitops-hook/{key}": text for key, text in texts.items()}
        live = selector if history else {**selector, hook.LABEL_RUN: "shop-older"}
        meta = {"name": "shop", "resourceVersion": "1", "annotations": annotations}
        return hook.Service({"metadata": meta, "spec": {"selector": live}})

    def looks(self, jobs: Object, services: Object | None = None, **more: Any) -> hook.ReportedRun:
        """A run with Jobs and Services in these states."""
        run = more.pop("run", None) or self.run(**more)
        return hook.ReportedRun(
            app=self.app(run.app),
            run=run,
            jobs={stage: self.job(run, stage, state) for stage, state in jobs.items()},
            services={e: self.service(run, state) for e, state in (services or {}).items()},
        )

    def ended(
        self,
        outcome: Outcome,
        reason: Reason = Reason.OK,
        stage: str = "production",
        detail: str = "",
        **more: Any,
    ) -> hook.ReportedRun:
        """A run that has ended; it is recorded, and so is its end."""
        jobs = more.pop("jobs", {})
        next_try = more.pop("next_try", 0.0)
        before = self.looks(jobs, **more)
        end = replace(hook.RunRecord.of(before.run), outcome=str(outcome), reason=str(reason))
        end = replace(end, stage=stage, detail=detail, ended=STARTED + 50, next_try=next_try)
        self.state.write(before.app, end)
        return replace(before, end=end)


@pytest.fixture
def desk(tmp_path: Path, server: GitLabServer) -> Desk:
    return Desk(tmp_path, url=server.url)


def whole_story(desk: Desk) -> list[hook.ReportedRun]:
    """What is observed of a run from its push until it is live, look by look."""
    green = {"test": "succeeded"}
    built = {**green, "build": "succeeded"}
    looks: list[tuple[Object, Object]] = [
        ({"test": "suspended"}, {}),
        ({"test": "active"}, {}),
        (green, {}),
        ({**green, "build": "active"}, {}),
        (built, {"staging": "other", "production": "other"}),
        (built, {"staging": "claimed", "production": "other"}),
        (built, {"staging": "confirmed", "production": "other"}),
        (built, {"staging": "confirmed", "production": "claimed"}),
        (built, {"staging": "confirmed", "production": "switched"}),
    ]
    last = desk.ended(Outcome.DEPLOYED, detail="131 passed, 0 failed", jobs=built)
    return [*(desk.looks(jobs, services) for jobs, services in looks), last]


def names(**states: str) -> dict[str, list[str]]:
    """Statuses as a server shows them, one of each stage."""
    return {f"gitops-hook/{stage}": [state] for stage, state in states.items()}


ALL_GREEN = dict.fromkeys(STAGES, "success")


# What is sent


def test_every_stage_of_a_push_has_a_status_from_the_queue_to_the_end(
    desk: Desk, server: GitLabServer
) -> None:
    for look in whole_story(desk):
        desk.show(look)
    assert server.shown(COMMIT) == names(**ALL_GREEN)
    sent = [(name.removeprefix("gitops-hook/"), state) for name, state in server.posts()]
    assert [state for stage, state in sent if stage == "test"] == ["pending", "running", "success"]
    for stage in ("build", "staging", "production"):
        own = [state for name, state in sent if name == stage]
        assert own == ["pending", "running", "success"]
    assert server.description("gitops-hook/test") == "131 passed, 0 failed"
    assert server.description("gitops-hook/production") == "is live"


def test_the_next_stage_is_pending_before_the_one_before_it_is_green(
    desk: Desk, server: GitLabServer
) -> None:
    for look in whole_story(desk)[:3]:
        desk.show(look)
    assert server.posts()[-2:] == [
        ("gitops-hook/build", "pending"),
        ("gitops-hook/test", "success"),
    ]


def test_of_states_that_came_and_went_only_the_newest_is_sent(
    desk: Desk, server: GitLabServer
) -> None:
    desk.show(whole_story(desk)[-1])
    assert [state for _, state in server.posts()] == ["success"] * 4


def test_a_run_of_which_all_is_shown_is_not_asked_about_again(
    desk: Desk, server: GitLabServer
) -> None:
    last = whole_story(desk)[-1]
    desk.show(last)
    desk.show(last)
    desk.show(last)
    count = len(server.requests)
    desk.new_sink()
    assert desk.show(last) == hook.UNCHANGED_SECONDS
    assert len(server.requests) == count
    assert json.loads(desk.kubectl.objects["configmap", "gitops-hook-shop"]["data"][
        f"statuses-{last.run.id}"
    ]) == {"ended": STARTED + 50, "v": 1}  # fmt: skip


def test_what_is_recorded_of_statuses_goes_with_the_record_of_its_run(desk: Desk) -> None:
    app = desk.app()
    mark = hook.StatusRecord(id="shop-11111111-1111111111", ended=STARTED)
    desk.state.write(app, mark)
    assert desk.state.read(app).statuses == {}
    desk.show(whole_story(desk)[-1])
    desk.show(whole_story(desk)[-1])
    assert len(desk.state.read(app).statuses) == 1
    many = [
        replace(hook.RunRecord.of(desk.run(f"{n:040x}")), outcome="tested", received=STARTED + n)
        for n in range(1, 150)
    ]
    desk.state.write(app, *many, with_job=set())
    state = desk.state.read(app)
    assert len(state.runs) == hook.RUNS_LENGTH
    assert state.statuses.keys() <= state.runs.keys()


# How runs end


BUILT = {"test": "succeeded", "build": "succeeded"}
ENDS: dict[str, tuple[Object, dict[str, str], str]] = {
    "tested": (
        {"outcome": Outcome.TESTED, "stage": "test", "detail": "5 passed, 0 failed", "ref": SIDE},
        {"test": "success"},
        "5 passed, 0 failed",
    ),
    "tested without a report": (
        {"outcome": Outcome.TESTED, "stage": "test", "ref": SIDE},
        {"test": "success"},
        "passed",
    ),
    "red tests": (
        {"outcome": Outcome.FAILED, "reason": Reason.TESTS_FAILED, "stage": "test", "detail": RED},
        {"test": "failed"},
        RED,
    ),
    "red tests of a branch": (
        {"outcome": Outcome.FAILED, "reason": Reason.TESTS_FAILED, "stage": "test", "ref": SIDE},
        {"test": "failed"},
        "TestsFailed",
    ),
    "red build": (
        {
            "outcome": Outcome.FAILED,
            "reason": Reason.BUILD_FAILED,
            "stage": "build",
            "detail": "no",
        },
        {"test": "success", "build": "failed"},
        "BuildFailed: no",
    ),
    "deployed": (
        {"outcome": Outcome.DEPLOYED, "detail": "5 passed, 0 failed"},
        ALL_GREEN,
        "is live",
    ),
    "deployed unjudged": (
        {"outcome": Outcome.DEPLOYED, "reason": Reason.UNJUDGED},
        ALL_GREEN,
        "is live: Unjudged",
    ),
    "crash in staging": (
        {"outcome": Outcome.FAILED, "reason": Reason.CRASH_LOOP, "stage": "staging", "detail": "3"},
        {"test": "success", "build": "success", "staging": "failed"},
        "CrashLoop: 3",
    ),
    "switched back": (
        {
            "outcome": Outcome.SWITCHED_BACK,
            "reason": Reason.UNHEALTHY_AFTER_SWITCH,
            "detail": "/ready failed 3 times: status 503",
        },
        {**ALL_GREEN, "production": "failed"},
        "switched back: /ready failed 3 times: status 503",
    ),
    "rolled back by a person": (
        {"outcome": Outcome.ROLLED_BACK, "reason": Reason.ROLLED_BACK, "detail": "by alice"},
        {**ALL_GREEN, "production": "failed"},
        "rolled back: by alice",
    ),
    "superseded in the queue": (
        {
            "outcome": Outcome.SUPERSEDED,
            "reason": Reason.NOT_HEAD,
            "stage": "test",
            "detail": "the branch was pushed again",
        },
        {"test": "canceled"},
        "the branch was pushed again",
    ),
    "superseded before production": (
        {"outcome": Outcome.SUPERSEDED, "reason": Reason.NOT_HEAD},
        {**ALL_GREEN, "production": "canceled"},
        "NotHead",
    ),
    "manifests refused after the tests": (
        {
            "outcome": Outcome.FAILED,
            "reason": Reason.MANIFEST_REFUSED,
            "stage": "staging",
            "jobs": {"test": "succeeded"},
            "detail": "Secret ten\nhostPID",
        },
        {"test": "success", "staging": "failed"},
        "ManifestRefused: Secret ten hostPID",
    ),
    "waiting for its next try": (
        {
            "outcome": Outcome.FAILED,
            "reason": Reason.IMAGE_NOT_FOUND,
            "stage": "staging",
            "detail": "gone",
            "next_try": 36_000.0,
        },
        {"test": "success", "build": "success", "staging": "pending"},
        "tried again at 10:00 UTC: ImageNotFound: gone",
    ),
    "given up": (
        {
            "outcome": Outcome.FAILED,
            "reason": Reason.GAVE_UP,
            "stage": "staging",
            "detail": "QuotaExceeded: too much",
        },
        {"test": "success", "build": "success", "staging": "failed"},
        "GaveUp: QuotaExceeded: too much",
    ),
    "in an environment that is no longer configured": (
        {"outcome": Outcome.FAILED, "reason": Reason.CRASH_LOOP, "stage": "europe", "detail": "3"},
        {"europe": "failed"},
        "CrashLoop: 3",
    ),
}


@pytest.mark.parametrize(("end", "states", "words"), ENDS.values(), ids=ENDS.keys())
def test_each_end_of_a_run_has_its_statuses(
    desk: Desk, server: GitLabServer, end: Object, states: dict[str, str], words: str
) -> None:
    run = desk.ended(**end)
    desk.show(run)
    assert server.shown(COMMIT) == names(**states)
    assert server.description(f"gitops-hook/{end.get('stage', 'production')}") == words


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason is not Reason.OK])
@pytest.mark.parametrize("stage", STAGES)
def test_every_reason_is_said_where_it_ended_a_run(
    tmp_path: Path, reason: Reason, stage: str
) -> None:
    desk = Desk(tmp_path)
    run = desk.ended(Outcome.FAILED, reason, stage, "because of it", jobs=BUILT)
    statuses = {s.stage: s for s in run.statuses() if not s.closes}
    place = STAGES.index(stage)
    early = reason in hook.EARLY_REASONS and stage == "production"
    before = [s for s in STAGES[:place] if not (early and s == "staging")]
    assert [s.state for s in statuses.values()] == ["success"] * len(before) + ["failed"]
    said = "because of it" if reason is Reason.TESTS_FAILED else f"{reason}: because of it"
    assert statuses[stage].text == said


def test_tests_that_refused_manifests_have_stopped_are_canceled(
    desk: Desk, server: GitLabServer
) -> None:
    desk.show(desk.looks({"test": "active"}))
    end = (Outcome.FAILED, Reason.MANIFEST_REFUSED, "staging", "Secret ten")
    desk.show(desk.ended(*end, jobs={"test": "failed"}))
    assert server.shown(COMMIT) == names(test="canceled", staging="failed")


def test_what_an_earlier_try_has_reached_does_not_stay_pending(
    desk: Desk, server: GitLabServer
) -> None:
    desk.show(desk.looks(BUILT, {"staging": "claimed"}))
    assert server.shown(COMMIT)["gitops-hook/staging"] == ["running"]
    desk.show(desk.ended(Outcome.FAILED, Reason.NO_DIGEST, "build", "twice"))
    assert server.shown(COMMIT)["gitops-hook/staging"] == ["canceled"]


def test_a_rerun_of_a_red_run_makes_a_second_status_of_what_was_red(
    desk: Desk, server: GitLabServer
) -> None:
    desk.show(desk.ended(Outcome.FAILED, Reason.BUILD_FAILED, "build", jobs=BUILT))
    again = replace(desk.run(), received=STARTED + 60)
    desk.show(desk.looks({"test": "succeeded", "build": "active"}, run=again))
    desk.new_sink()
    desk.show(desk.looks(BUILT, {"staging": "claimed"}, run=again))
    shown = server.shown(COMMIT)
    assert shown["gitops-hook/test"] == ["success"]
    assert shown["gitops-hook/build"] == ["failed", "success"]


def test_between_tries_a_stage_is_not_red_and_at_the_end_it_is_green(
    desk: Desk, server: GitLabServer
) -> None:
    waits = {"detail": "gone", "jobs": BUILT, "next_try": STARTED + 60}
    desk.show(desk.ended(Outcome.FAILED, Reason.IMAGE_NOT_FOUND, "staging", **waits))
    assert server.shown(COMMIT)["gitops-hook/staging"] == ["pending"]
    desk.show(whole_story(desk)[-1])
    assert server.shown(COMMIT) == names(**ALL_GREEN)


def test_what_a_job_waits_for_is_in_its_status(desk: Desk, server: GitLabServer) -> None:
    run = desk.run()
    words = {"reason": "QuotaExceeded", "detail": "pods need more than is left"}
    jobs = {"test": desk.job(run, "test", "active", **words)}
    desk.show(replace(desk.looks({}, run=run), jobs=jobs))
    said = "QuotaExceeded: pods need more than is left"
    assert server.description("gitops-hook/test") == said


def test_tests_that_have_left_no_result_yet_are_not_green(desk: Desk, server: GitLabServer) -> None:
    run = desk.run()
    job = desk.job(run, "test", "succeeded")
    del job.annotations[hook.ANNOTATION_SUMMARY]
    desk.show(replace(desk.looks({}, run=run), jobs={"test": job}))
    assert server.shown(COMMIT) == names(test="running")
    red = {"summary": RED}
    jobs = {"test": desk.job(run, "test", "succeeded", **red)}
    desk.show(replace(desk.looks({}, run=run), jobs=jobs))
    assert server.shown(COMMIT) == names(test="running")


def test_the_last_environment_is_green_only_when_the_run_has_ended(desk: Desk) -> None:
    look = desk.looks(BUILT, {"staging": "confirmed", "production": "confirmed"})
    assert [str(s.state) for s in look.statuses()] == ["success"] * 3 + ["running"]


# Restarts


class KilledError(BaseException):
    """The process ends here."""


class MortalGitLab(hook.GitLab):
    """A door that is killed in one of its requests, before or after that has its effect."""

    def __init__(self, secrets: hook.Secrets, lives: int, *, after: bool) -> None:
        super().__init__(secrets, deadline=5.0)
        self.lives = lives
        self.after = after

    def set_status(self, *args: Any) -> bool:
        self.lives -= 1
        if self.lives < 0 and not self.after:
            raise KilledError
        is_new = super().set_status(*args)
        if self.lives < 0:
            raise KilledError
        return is_new


@pytest.mark.parametrize("after", [False, True], ids=["before it is sent", "after it is sent"])
@pytest.mark.parametrize("lives", range(12))
def test_killed_in_any_send_it_ends_with_one_right_final_status_a_stage(
    desk: Desk, server: GitLabServer, lives: int, after: bool
) -> None:
    desk.new_sink(MortalGitLab(desk.secrets, lives, after=after))
    deaths = 0
    for look in whole_story(desk):
        try:
            desk.show(look)
        except KilledError:
            deaths += 1
            desk.new_sink()
            desk.show(look)
    assert deaths == 1
    assert server.shown(COMMIT) == names(**ALL_GREEN)


@pytest.mark.parametrize("after", [False, True], ids=["before it is sent", "after it is sent"])
@pytest.mark.parametrize("lives", range(10))
def test_killed_in_any_send_of_a_run_that_is_switched_back_it_ends_red(
    desk: Desk, server: GitLabServer, lives: int, after: bool
) -> None:
    desk.new_sink(MortalGitLab(desk.secrets, lives, after=after))
    end = desk.ended(Outcome.SWITCHED_BACK, Reason.UNHEALTHY_AFTER_SWITCH, detail="503", jobs=BUILT)
    for look in [*whole_story(desk)[:-1], end, end]:
        try:
            desk.show(look)
        except KilledError:
            desk.new_sink()  # and what it has not sent is found at the next look
    assert server.shown(COMMIT) == names(**{**ALL_GREEN, "production": "failed"})


@pytest.mark.parametrize("look", range(10))
def test_a_daemon_that_was_away_for_the_rest_of_a_run_sends_how_it_ended(
    desk: Desk, server: GitLabServer, look: int
) -> None:
    story = whole_story(desk)
    for seen in story[:look]:
        desk.show(seen)
    desk.new_sink()
    desk.show(story[-1])
    assert server.shown(COMMIT) == names(**ALL_GREEN)


def test_a_final_status_whose_answer_was_lost_is_not_sent_twice(
    desk: Desk, server: GitLabServer
) -> None:
    server.troubles = [Trouble(done=True, methods=("POST",)) for _ in range(3)]
    run = desk.ended(Outcome.TESTED, stage="test", ref=SIDE)
    for _ in range(5):
        desk.show(run)
    assert server.shown(COMMIT) == names(test="success")
    assert len(server.posts()) == 1


def test_what_ended_more_than_a_day_ago_is_not_sent(desk: Desk, server: GitLabServer) -> None:
    run = desk.ended(Outcome.TESTED, stage="test", ref=SIDE)
    desk.clock.now = lambda: STARTED + 51 + hook.STATUS_AGE  # type: ignore[assignment]
    assert desk.show(run) == hook.UNCHANGED_SECONDS
    assert server.requests == []


# Trouble


TROUBLES = {
    "another update is in progress": (Trouble(409), "busy"),
    "too many requests": (Trouble(429, {"Retry-After": "60"}), "limited"),
    "too many requests, for a year": (Trouble(429, {"Retry-After": "31536000"}), "limited"),
    "too many requests, in words": (Trouble(429, {"Retry-After": "a while"}), "limited"),
    "internal error": (Trouble(500), "away"),
    "bad gateway": (Trouble(502, body=b"<html>" + b"x" * 500_000), "away"),
    "no answer": (Trouble(), "away"),
    "something else": (Trouble(422, body=b"\xff\xfe\x00"), "rejected"),
    "elsewhere": (Trouble(302, {"Location": "http://127.0.0.1:1/"}), "rejected"),
}


@pytest.mark.parametrize(("trouble", "obstacle"), TROUBLES.values(), ids=TROUBLES.keys())
def test_after_trouble_it_is_tried_again_and_then_all_is_shown_once(
    desk: Desk, server: GitLabServer, trouble: Trouble, obstacle: str
) -> None:
    server.troubles = [replace(trouble), replace(trouble)]
    run = desk.ended(Outcome.TESTED, stage="test", ref=SIDE)
    for _ in range(4):
        desk.show(run)
    assert server.shown(COMMIT) == names(test="success")
    assert counted(desk, obstacle) == 2
    assert counted(desk, "sent") == 1


def counted(desk: Desk, result: str) -> float:
    """How often the metric has counted a result."""
    labels = {"result": result}
    value = desk.kubectl.metrics.registry.get_sample_value("gitops_hook_statuses_total", labels)
    return value or 0.0


def test_its_pauses_grow_and_a_server_may_ask_for_ten_minutes_at_most(
    desk: Desk, server: GitLabServer
) -> None:
    run = desk.ended(Outcome.TESTED, stage="test", ref=SIDE)
    desk.runs = [run]
    server.troubles = [Trouble(503) for _ in range(4)]
    pauses = []
    for _ in range(4):
        desk.sink.send_all()
        pauses.append(desk.sink.away.delay(server.url))
        desk.clock.time += pauses[-1] - 0.01
        count = len(server.requests)
        desk.sink.send_all()
        assert len(server.requests) == count
        desk.clock.time += 0.02
    assert pauses == sorted(pauses)
    assert pauses[0] < 3
    assert pauses[-1] > 40
    server.troubles = [Trouble(429, {"Retry-After": "1e300"})]
    desk.sink.send_all()
    desk.clock.time += hook.LONGEST_PAUSE - 1
    desk.sink.send_all()
    assert server.shown() == {}
    desk.clock.time += 2
    desk.sink.send_all()
    assert server.shown() == names(test="success")


def test_that_nothing_changes_counts_as_success(desk: Desk, server: GitLabServer) -> None:
    for _ in range(3):
        desk.new_sink()
        desk.show(desk.looks({"test": "active"}))
    assert server.shown() == names(test="running")
    assert (counted(desk, "sent"), counted(desk, "unchanged")) == (1, 2)


def test_a_commit_that_gitlab_does_not_have_yet_delays_no_other(
    desk: Desk, server: GitLabServer
) -> None:
    server.unknown = {COMMIT}
    both = [desk.looks({"test": "active"}, commit=c, ref=SIDE) for c in (COMMIT, OTHER)]
    desk.show(*both)
    assert server.shown() == names(test="running")
    server.unknown = set()
    desk.show(*both)
    assert server.shown(COMMIT) == names(test="running")


def is_waiting(desk: Desk) -> bool:
    """Whether the metric says that something waits for GitLab."""
    value = desk.kubectl.metrics.registry.get_sample_value(
        "gitops_hook_waiting", {"what": "GitLab"}
    )
    assert value is not None
    return bool(value)


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_not_good_enough_is_one_error_and_is_tried_again_rarely(
    desk: Desk, server: GitLabServer, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    server.users = {TOKEN: "guest"} if status == 403 else {}
    server.barred = {"guest"}
    run = desk.looks({"test": "active"})
    desk.runs = [run]
    for _ in range(200):
        desk.clock.time += 60.0
        desk.sink.send_all()
    assert 8 <= len(server.requests) <= 25  # in more than three hours
    errors = [line for line in caplog.records if line.levelno >= logging.WARNING]
    assert [line.message for line in errors] == ["GitLab refuses commit statuses"]
    assert is_waiting(desk)
    fields: Object = errors[0].fields  # type: ignore[attr-defined]
    assert str(status) in fields["detail"]
    assert "scope api" in fields["needed"]
    value = desk.kubectl.metrics.registry.get_sample_value
    assert value("gitops_hook_errors_total", {"where": "statuses"}) == len(server.requests)
    server.users = {"glpat-a-better-token": "bot"}
    desk.write_token("glpat-a-better-token")
    desk.sink.send_all()  # at once
    assert server.shown() == names(test="running")
    desk.sink.send_all()
    assert not is_waiting(desk)


def test_a_branch_that_the_token_may_not_push_to_delays_no_other(
    desk: Desk, server: GitLabServer
) -> None:
    server.protected = {"main"}
    other = desk.looks({"test": "active"}, commit=OTHER, ref=SIDE)
    desk.show(desk.looks({"test": "active"}), other)
    assert server.shown() == names(test="running")


def test_each_line_of_the_file_is_tried_and_the_one_that_was_good_first(
    desk: Desk, server: GitLabServer
) -> None:
    desk.write_token("glpat-expired", "not a token \x01", TOKEN)
    desk.show(desk.looks({"test": "suspended"}))
    desk.show(desk.looks({"test": "active"}))
    assert server.shown() == names(test="running")
    tokens = [request["headers"]["private-token"] for request in server.requests]
    assert tokens == ["glpat-expired", TOKEN, TOKEN]


def test_without_a_token_nothing_is_sent_and_nothing_complains(
    tmp_path: Path, server: GitLabServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    desk = Desk(tmp_path, url=server.url, token="")
    assert desk.show(desk.looks({"test": "active"})) == hook.UNCHANGED_SECONDS
    assert (server.requests, caplog.records) == ([], [])
    desk.write_token(TOKEN)
    desk.show(desk.looks({"test": "active"}))
    assert server.shown() == names(test="running")


def test_statuses_can_be_switched_off(tmp_path: Path, server: GitLabServer) -> None:
    desk = Desk(tmp_path, url=server.url)
    off = replace(desk.config.gitlab, statuses=False)
    desk.config = replace(desk.config, gitlab=off)
    desk.new_sink()
    desk.show(desk.looks({"test": "active"}))
    assert server.requests == []


def test_while_the_cluster_cannot_be_followed_nothing_is_concluded(
    desk: Desk, server: GitLabServer
) -> None:
    desk.runs = None
    assert desk.sink.send_all() == hook.LOOK_SECONDS
    assert server.requests == []


def test_an_answer_that_drips_ends_at_the_deadline_and_few_of_them_are_waited_for(
    tmp_path: Path, server: GitLabServer, caplog: pytest.LogCaptureFixture
) -> None:
    desk = Desk(tmp_path, url=server.url)
    desk.deadline = 0.3
    desk.new_sink()
    server.troubles = [Trouble(drips=True) for _ in range(hook.REQUESTS_OPEN)]
    began = time.monotonic()
    for number in range(hook.REQUESTS_OPEN + 3):
        desk.show(desk.looks({"test": "active"}, commit=f"{number:040x}"))
    assert time.monotonic() - began < 5.0
    assert len(server.requests) == hook.REQUESTS_OPEN
    assert counted(desk, "away") == hook.REQUESTS_OPEN + 3
    end_of_dripping(server)
    desk.show(desk.looks({"test": "active"}))
    assert server.shown() == names(test="running")


def end_of_dripping(server: GitLabServer) -> None:
    """Let answers that drip end, and wait until nobody waits for them."""
    server.ended.set()
    threads = [t for t in threading.enumerate() if t.name == "gitlab"]
    eventually(lambda: not any(thread.is_alive() for thread in threads))


def test_while_a_final_status_has_no_answer_it_is_not_sent_again(
    tmp_path: Path, server: GitLabServer
) -> None:
    desk = Desk(tmp_path, url=server.url)
    desk.deadline = 0.3
    desk.new_sink()
    server.troubles = [Trouble(drips=True, done=True, methods=("POST",))]
    run = desk.ended(Outcome.TESTED, stage="test", ref=SIDE)
    for _ in range(3):
        server.statuses, late = [], server.statuses  # as if it had no effect yet
        desk.show(run)
        server.statuses = late or server.statuses
    assert len(server.posts()) == 1
    end_of_dripping(server)
    desk.show(run)
    assert server.shown() == names(test="success")
    assert len(server.posts()) == 1


def test_an_answer_to_a_question_is_read_no_further_than_it_may_be_long(
    desk: Desk, server: GitLabServer
) -> None:
    long = b"[" + b'{"name": "x", "id": 1, "status": "success"},' * 10_000 + b"{}]"
    assert len(long) > hook.ANSWER_BYTES
    server.troubles = [
        Trouble(200, body=body, methods=("GET",))
        for body in (
            long,
            b"[[]]",
            b'[{"name": "gitops-hook/test", "ref": "side"}]',
            b"null",
            b"[" * 100_000,
        )
    ]
    run = desk.ended(Outcome.TESTED, stage="test", ref=SIDE)
    for _ in range(6):
        desk.show(run)
    assert counted(desk, "rejected") == 5
    assert server.shown() == names(test="success")


OK = b"HTTP/1.1 200 OK\r\n"
GARBAGE = {
    "no HTTP": b"\x16\x03\x01\x00 hello\r\n\r\n",
    "a negative length": OK + b"Content-Length: -5\r\n\r\n[]",
    "less than it promises": OK + b"Content-Length: 500\r\n\r\n[",
    "a broken chunk": OK + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n[]",
    "what is no gzip": OK + b"Content-Encoding: gzip\r\n\r\n[]",
    "an endless line": OK + b"X: " + b"x" * 200_000,
    "a thousand headers": OK + b"X: y\r\n" * 1000 + b"\r\n[]",
    "a strange status": b"HTTP/1.1 abc Hm\r\n\r\n",
    "a status of four digits": b"HTTP/1.1 9999 Hm\r\n\r\n",
    "a page": OK + b"Content-Length: 23\r\n\r\n<html>Log in!</html>....",
    "a header without a name": OK + b": x\r\nRetry-After: nan\r\n\r\n{",
    "cookies": OK + b"Set-Cookie: a=b\r\n" * 90 + b"Content-Length: 2\r\n\r\n[]",
}


@pytest.mark.parametrize("raw", GARBAGE.values(), ids=GARBAGE.keys())
def test_whatever_comes_as_an_answer_all_is_shown_at_the_end(
    desk: Desk, server: GitLabServer, raw: bytes
) -> None:
    server.troubles = [Trouble(raw=raw, methods=("GET",)), Trouble(raw=raw, methods=("POST",))]
    run = desk.ended(Outcome.TESTED, stage="test", ref=SIDE)
    for _ in range(4):
        desk.show(run)
    assert server.shown(COMMIT) == names(test="success")
    assert not any("cookie" in request["headers"] for request in server.requests)


def test_a_look_ends_in_time_and_goes_on_at_the_next_one(desk: Desk, server: GitLabServer) -> None:
    desk.runs = [
        desk.looks({"test": "active"}, commit=f"{n:040x}", ref=f"refs/heads/b{n}") for n in range(5)
    ]
    held = desk.clock.monotonic

    def slower() -> float:
        desk.clock.time += 2.0
        return float(held())

    desk.clock.monotonic = slower
    looks = 0
    while len(server.posts()) < 5:
        desk.sink.send_all()
        looks += 1
    assert looks > 1


# Where it is sent


@responses.activate
def test_the_api_is_asked_at_the_host_of_the_repository_by_https(tmp_path: Path) -> None:
    responses.post(API, json={"status": "running"}, status=201)
    desk = Desk(tmp_path)
    desk.show(desk.looks({"test": "active"}))
    (call,) = responses.calls
    assert call.request.url == API
    assert call.request.headers["PRIVATE-TOKEN"] == TOKEN
    assert json.loads(call.request.body or "") == {
        "state": "running",
        "name": "gitops-hook/test",
        "description": "is under way",
        "ref": "main",
    }


@pytest.mark.parametrize(
    ("repository", "url", "address"),
    [
        (
            "https://git.example.com/a/b/c.git",
            "",
            "https://git.example.com/api/v4/projects/a%2Fb%2Fc",
        ),
        (
            "https://git.example.com:8443/a/b",
            "",
            "https://git.example.com:8443/api/v4/projects/a%2Fb",
        ),
        (
            "http://git.example.com:8080/a/b.git/",
            "",
            "https://git.example.com/api/v4/projects/a%2Fb",
        ),
        (
            "https://git.example.com/gitlab/a/b.git",
            "https://api.example.com/gitlab/",
            "https://api.example.com/gitlab/api/v4/projects/a%2Fb",
        ),
        ("/srv/git/shop.git", "https://api.example.com", None),
        ("file:///srv/git/shop.git", "", None),
    ],
)
def test_a_project_is_the_path_of_the_repository(
    repository: str, url: str, address: str | None
) -> None:
    config = CONFIG.replace("https://git.example.com/demo/shop.git", repository)
    app = hook.load_config(config).apps[0]
    project = hook.Project.of(app, url)
    assert (project.url() if project else None) == address


def test_apps_of_one_repository_have_statuses_of_their_own(
    tmp_path: Path, server: GitLabServer
) -> None:
    second = CONFIG.replace("apps:", "").replace("name: shop", "name: api")
    desk = Desk(tmp_path, f"{CONFIG.rstrip()}{second}", server.url)
    desk.show(*(desk.looks({"test": "active"}, app=name) for name in ("shop", "api")))
    states = {"gitops-hook/shop/test": ["running"], "gitops-hook/api/test": ["running"]}
    assert server.shown() == states


@responses.activate
def test_what_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    responses.post(API, status=307, headers={"Location": "https://evil.example.com/"})
    desk = Desk(tmp_path)
    desk.show(desk.looks({"test": "active"}))
    assert len(responses.calls) == 1


def test_a_private_authority_is_trusted_as_git_does_it(
    tmp_path: Path, server: GitLabServer
) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ca = tmp_path / "ca.crt"
    with gitlab_server(PROJECT, context=context) as encrypted:
        desk = Desk(tmp_path, url=encrypted.url.replace("http:", "https:"))
        surroundings = hook.Surroundings(ca=ca)
        desk.new_sink(hook.GitLab(desk.secrets, surroundings, 5.0))
        desk.show(desk.looks({"test": "active"}))
        assert encrypted.requests == []
        assert counted(desk, "away") == 1
        authority.cert_pem.write_to_path(str(ca))
        desk.show(desk.looks({"test": "active"}))
        assert encrypted.shown() == names(test="running")


def test_a_proxy_is_used_as_git_uses_it(tmp_path: Path) -> None:
    variables = {"HTTPS_PROXY": "http://proxy:3128", "no_proxy": "inside.example.com"}
    gitlab = hook.GitLab(hook.Secrets(tmp_path), hook.Surroundings(variables=variables))
    assert gitlab.proxies("https://git.example.com/x") == {"https": "http://proxy:3128"}
    assert gitlab.proxies("https://inside.example.com/x") == {}


# What is not sent


def test_no_secret_is_in_any_request_but_the_token_in_its_header(
    desk: Desk, server: GitLabServer
) -> None:
    credentials = "hunter2-of-the-credentials"
    (desk.folder / "git-credentials").write_text(f"https://bot:{credentials}@git.example.com\n")
    (desk.folder / "webhook-tokens").write_text("a-secret-of-the-webhook\n")
    said = f"token={CANARY} https://u:{CANARY}@h/ {credentials} a-secret-of-the-webhook {TOKEN}"
    branch = f"refs/heads/{CANARY}"
    desk.show(desk.looks({"test": "active"}, ref=branch, commit=OTHER))
    desk.show(
        desk.ended(Outcome.FAILED, Reason.BUILD_FAILED, "build", f"{said}\nmore {said}"),
        desk.ended(Outcome.TESTED, Reason.OK, "test", said, ref=branch, commit=OTHER),
    )
    assert len(server.shown()["gitops-hook/test"]) == 2
    for request in server.requests:
        headers = {k: v for k, v in request["headers"].items() if k != "private-token"}
        sent = unquote(json.dumps([request["target"], request["fields"], headers]))
        for secret in (CANARY, credentials, "a-secret-of-the-webhook", TOKEN):
            assert secret not in sent


def test_a_description_fits_and_is_one_line_whatever_is_in_it(
    desk: Desk, server: GitLabServer
) -> None:
    hostile = "<script>\x00\n" + "é" * 10_000
    desk.show(desk.ended(Outcome.FAILED, Reason.BUILD_FAILED, "build", hostile))
    said = server.description("gitops-hook/build")
    assert said.startswith("BuildFailed: <script>")
    assert len(said) == 255
    assert "\n" not in said


def test_a_status_leads_to_the_page_of_its_run_where_that_can_be_reached(
    tmp_path: Path, server: GitLabServer
) -> None:
    desk = Desk(tmp_path, f"{CONFIG}external_url: https://gitops.example.com/hooks/", server.url)
    desk.show(desk.looks({"test": "active"}))
    run = hook.run_id("shop", MAIN, COMMIT)
    assert server.link("gitops-hook/test") == f"https://gitops.example.com/hooks/runs/{run}"
    long = Desk(tmp_path, f"{CONFIG}external_url: https://example.com/{'x' * 230}", server.url)
    long.show(desk.looks({"test": "active"}, commit=OTHER))
    assert server.link("gitops-hook/test") is None


def test_without_an_address_of_the_page_a_status_leads_nowhere(
    desk: Desk, server: GitLabServer
) -> None:
    desk.show(desk.looks({"test": "active"}))
    assert "target_url" not in server.requests[-1]["fields"]


def test_a_branch_with_a_strange_name_is_sent_as_it_is_and_a_long_one_is_not(
    desk: Desk, server: GitLabServer
) -> None:
    desk.show(desk.looks({"test": "active"}, ref="refs/heads/<script>/ö&x=1"))
    assert server.requests[0]["fields"]["ref"] == "<script>/ö&x=1"
    desk.show(desk.looks({"test": "active"}, ref=f"refs/heads/{'x' * 300}", commit=OTHER))
    assert "ref" not in server.requests[-1]["fields"]


def test_a_sink_that_has_ended_sends_nothing(desk: Desk, server: GitLabServer) -> None:
    desk.sink.ended.set()
    desk.show(desk.looks({"test": "active"}))
    assert server.requests == []


def test_a_sink_that_ends_within_a_run_leaves_the_rest_to_the_next_process(
    desk: Desk, server: GitLabServer
) -> None:
    class EndingGitLab(hook.GitLab):
        def set_status(self, *args: Any) -> bool:
            desk.sink.ended.set()
            return super().set_status(*args)

    last = whole_story(desk)[-1]
    desk.new_sink(EndingGitLab(desk.secrets))
    desk.show(last)
    assert server.shown() == names(test="success")
    desk.new_sink()
    desk.show(last)
    assert server.shown() == names(**ALL_GREEN)


def test_that_there_can_be_no_more_threads_is_trouble_like_other(
    desk: Desk, server: GitLabServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", start)
        for _ in range(hook.REQUESTS_OPEN + 1):
            desk.show(desk.looks({"test": "active"}))
    assert counted(desk, "away") == hook.REQUESTS_OPEN + 1
    desk.show(desk.looks({"test": "active"}))
    assert server.shown() == names(test="running")


def test_what_is_no_commit_is_not_sent(desk: Desk, server: GitLabServer) -> None:
    desk.show(desk.looks({"test": "active"}, commit="../../users"))
    assert server.requests == []


# In the daemon


def test_what_the_controller_knows_of_runs_is_what_is_reported(tmp_path: Path) -> None:
    controller = idle_controller(tmp_path)
    assert controller.context.reported_runs() is None
    synced(controller)
    assert controller.context.reported_runs() == []
    run = hook.Run(id="shop-1", app="shop", ref=MAIN, commit=COMMIT, received=10.0)
    add_job(controller, run)
    (seen,) = controller.context.reported_runs()
    assert (seen.run.id, seen.end, [*seen.jobs]) == ("shop-1", None, ["test"])
    ended = replace(hook.RunRecord.of(run), outcome="failed", ended=20.0, stage="test")
    controller.context.state.write(seen.app, ended)
    (seen,) = controller.context.reported_runs()
    assert seen.end == ended
    again = replace(run, received=30.0)
    add_job(controller, again)
    (seen,) = controller.context.reported_runs()
    assert seen.end is None


def test_a_transition_has_the_runs_looked_at_and_does_nothing_else(tmp_path: Path) -> None:
    controller = idle_controller(tmp_path)
    assert not controller.statuses.news.is_set()
    words = {"state": hook.State.QUEUED, "run": "shop-1", "app": "shop", "at": 1.0}
    controller.context.doors.reports.emit(hook.Transition(**words))
    assert controller.statuses.news.is_set()
