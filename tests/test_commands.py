"""The commands beside a cluster: one story is played once, and each test looks at a page of it."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import gitops_hook as hook
from tests.idle_controller import CONFIG
from tests.standin.kubectl import Kubectl
from tests.standin.resources import RESOURCES
from tests.starting import argv_of
from tests.world import (
    DEPLOYMENT,
    ROOT,
    SERVICE,
    Object,
    World,
    daemon_config,
    eventually,
    settings_map,
    world,
)

# The first test to run plays the whole story.
pytestmark = pytest.mark.timeout(300)
UNKNOWN = "shop-00000000-0000"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def config(repository: Path) -> Object:
    """One environment, no waiting, a test that is quickly over."""
    health = {"path": "/ready", "successes": 1}
    short = {"environments": ["production"], "bake": "2s", "drain": "0s", "health": health}
    settings = daemon_config(repository, **short)
    # what would change the title of a terminal, and turn its text round
    title = "printf '\\033]0;hi\\007 \\342\\200\\256txt token=hunter2\\n'"
    settings["apps"][0]["test"] = {"command": f"{title}; cat version; ! grep -q broken version"}
    return settings


def short(run: str) -> str:
    """The id of a run as `status` prints it, without the hash of its ref."""
    return run.rpartition("-")[0]


class Page:
    """What one command printed and how it ended, and what visitors then got."""

    def __init__(self, place: World, *args: str) -> None:
        done = place.command(*args)
        self.status = done.returncode
        self.stdout = done.stdout
        self.stderr = done.stderr
        answer = place.answer() if place.service() else {"version": "", "greeting": ""}
        self.version = answer["version"]
        self.answer = answer["version"], answer["greeting"]

    @property
    def json(self) -> Any:
        """What it printed, parsed."""
        return json.loads(self.stdout)

    @property
    def production(self) -> Object:
        """The environment in `status --output json`."""
        return dict(self.json["apps"][0]["environments"]["production"])

    def runs(self) -> dict[str, Object]:
        """The runs in `status --output json`, by id."""
        return {run["run"]: run for run in self.json["runs"]}


class Story:
    """What happened, page by page."""

    def __init__(self, place: World) -> None:
        self.world = place
        self.pages: dict[str, Page] = {}
        self.run: dict[str, str] = {}
        self.commit: dict[str, str] = {}
        self.kubectl = Kubectl(place.directory, place.cluster.kubeconfig())

    def page(self, name: str, *args: str) -> Page:
        """Run a command and keep what came of it."""
        self.pages[name] = Page(self.world, *args)
        return self.pages[name]

    def release(self, version: str, **more: Any) -> Object:
        """Push a version and wait for its end."""
        self.commit[version] = self.world.repository.release(version, **more)
        self.run[version] = self.world.push(self.commit[version], more.get("branch", "main"))
        return self.world.ended(self.run[version])

    def settled(self) -> None:
        """Wait until nobody changes the environment any more."""
        eventually(
            lambda: "gitops-hook/deploying" not in self.annotations(), what="no claim is left"
        )

    def annotations(self) -> Object:
        """The annotations of the live Service."""
        service = self.world.service()
        assert service is not None
        return dict(service["metadata"].get("annotations", {}))

    def ends(self, run: str) -> int:
        """How often the log says that a run ended."""
        lines = [e for e in self.world.logged() if e["msg"] == "run ended"]
        return sum(e.get("run") == run for e in lines)

    @contextmanager
    def daemon_held(self) -> Iterator[None]:
        """Let nothing happen by the daemon meanwhile."""
        process = self.world.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        yield
        process.send_signal(signal.SIGCONT)

    def rerun_to_its_end(self, name: str, version: str) -> None:
        """Rerun a version's run by its short id, and wait for its next end."""
        run = self.run[version]
        ends = self.ends(run)
        with self.daemon_held():
            self.page(name, "rerun", short(run))
            self.page(f"{name} twice", "rerun", run)
        eventually(lambda: self.ends(run) > ends, 60, f"{run} ends again")
        self.settled()
        assert self.ends(run) == ends + 1

    # The chapters

    def nothing_is_there(self) -> None:
        self.page("empty", "status")
        self.page("empty, json", "status", "--output", "json")
        self.page("rollback of nothing", "rollback", "shop")
        self.page("rerun of nothing", "rerun", UNKNOWN)
        self.page("short rerun of nothing", "rerun", UNKNOWN[:9])
        self.page("plan of nothing", "plan", "shop")
        self.page("nothing, explained", "explain", UNKNOWN)
        self.page("another app, explained", "explain", "other-00000000-0000")
        self.page("no id, explained", "explain", "shop,a!=b")

    def first_version(self) -> None:
        self.world.start()
        self.release("v1")
        self.page("rollback of the first", "rollback", "shop")

    def second_version(self) -> None:
        self.commit["v2"] = self.world.repository.release("v2")
        self.run["v2"] = self.world.push(self.commit["v2"])
        eventually(lambda: "gitops-hook/bake-until" in self.annotations(), what="v2 bakes")
        with self.daemon_held():
            self.page("baking", "status", "--output", "json")
            self.page("baking, text", "status", "shop")
            self.page("rerun under way", "rerun", self.run["v2"])
        self.world.ended(self.run["v2"])
        self.settled()
        self.page("two versions", "status", "--output", "json")
        self.page("two versions, text", "status")
        self.page("rollback --to 99", "rollback", "shop", "--to", "99")
        self.page("rollback to an unknown run", "rollback", "shop", "--to", UNKNOWN[:9])

    def third_version(self) -> None:
        self.release("v3")
        self.settled()
        self.page("rerun of a live run", "rerun", self.run["v3"])
        self.page("rollback --to 9", "rollback", "shop", "--to", "9")
        self.page("rollback --to 2", "rollback", "shop", "--to", "2", "--reason", "it is ugly")
        self.settled()  # what it left is drained by the daemon
        self.page("after the first rollback", "status", "--output", "json")
        self.page("after the first rollback, text", "status")

    def rejected_version(self) -> None:
        offset = self.world.log.stat().st_size
        self.world.push(self.commit["v3"])
        wanted = {"msg": "push needs nothing", "reason": "Rejected"}
        eventually(lambda: any(wanted.items() <= e.items() for e in self.world.logged(offset)))
        self.page("rejected", "status", "--output", "json")
        self.rerun_to_its_end("rerun of a rejected run", "v3")
        self.settled()
        self.page("after the rerun", "status", "--output", "json")

    def red_branch(self) -> None:
        self.release("broken", branch="feature/red")
        self.page("red", "status", "--output", "json")
        self.page("red, text", "status")
        logs = ("get", "configmaps", "-n", "test", "-l", "gitops-hook/stage=log", "-o", "name")
        eventually(lambda: self.kubectl.run(*logs).out, what="the log is kept")
        self.page("red, explained", "explain", self.run["broken"])
        self.page("red, explained by a short id", "explain", short(self.run["broken"]))
        self.page("red, log", "explain", self.run["broken"], "--log")
        self.rerun_to_its_end("rerun of a red run", "broken")

    def broken_version(self) -> None:
        self.bad = self.release("v4", modes="crash-at-start")
        self.settled()
        self.page("rerun of an old run", "rerun", self.run["v3"])
        self.page("v4, log", "explain", self.run["v4"], "--log")
        self.page("v3, log", "explain", self.run["v3"], "--log")
        self.page("after a failure", "status", "--output", "json")

    def back_without_the_daemon(self) -> None:
        self.stopped = self.world.stop()
        name = self.pages["after a failure"].production["previous"]["colour"]
        scale = ("scale", "deployment", f"shop-{name}", "--replicas=0", "--namespace=production")
        assert self.kubectl.run(*scale).code == 0
        labels = {"gitops-hook/run": self.run["v1"]}
        eventually(lambda: not self.pods(labels), what="the pods of v1 are gone")
        self.page("scaled down", "status", "--output", "json")
        to_run = ("--environment", "production", "--to", short(self.run["v1"]))
        self.page("rollback without the daemon", "rollback", "shop", *to_run)
        self.page("the end", "status", "--output", "json")

    def pods(self, labels: Object) -> list[Object]:
        """The pods in production with these labels."""
        pods = self.world.cluster.store.list("pods", "production")
        return [p for p in pods if labels.items() <= p["metadata"]["labels"].items()]

    def play(self) -> None:
        """All of it."""
        self.nothing_is_there()
        self.first_version()
        self.second_version()
        self.third_version()
        self.rejected_version()
        self.red_branch()
        self.broken_version()
        self.back_without_the_daemon()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with world(tmp_path_factory.mktemp("commands"), config, speed=4.0) as place:
        played = Story(place)
        played.play()
        yield played


# status


def test_status_of_an_empty_cluster_says_that_nothing_is_live(story: Story) -> None:
    page = story.pages["empty"]
    assert (page.status, page.stderr) == (0, "")
    assert page.stdout.splitlines()[0].split("  ")[0] == "APP"
    assert re.search(r"(?m)^shop +production +- +- +- +impossible +-$", page.stdout)


def test_status_of_an_empty_cluster_as_json_has_every_key(story: Story) -> None:
    production = story.pages["empty, json"].production
    assert story.pages["empty, json"].json["runs"] == []
    assert production == {
        **dict.fromkeys(("colour", "run", "commit", "image", "by"), ""),
        "previous": {},
        "rollback_ready": False,
        "deploying": None,
        "bake_until": None,
        "reverted": {},
        "drift": "",
        "left_behind": [],
        "companions": [],
    }


def test_status_shows_what_is_being_deployed_and_how_long_it_bakes(story: Story) -> None:
    production = story.pages["baking"].production
    assert production["run"] == production["deploying"]["run"] == story.run["v2"]
    assert production["deploying"]["phase"] == "baking"
    assert production["bake_until"] > production["deploying"]["since"]
    assert f"baking {short(story.run['v2'])}" in story.pages["baking, text"].stdout


def test_status_shows_how_far_a_run_is(story: Story) -> None:
    runs = story.pages["baking"].runs()
    run, first = runs[story.run["v2"]], runs[story.run["v1"]]
    assert (run["stage"], run["state"]) == ("production", "baking")
    assert (run["outcome"], run["reason"]) == ("", "")
    assert (first["state"], first["outcome"], first["reason"]) == ("ended", "deployed", "Ok")
    assert (first["app"], first["ref"]) == ("shop", "refs/heads/main")
    assert first["commit"] == story.commit["v1"]


def test_status_shows_the_last_of_the_environments_that_a_run_has_claimed() -> None:
    def claimed(environment: str, phase: str, run: str) -> hook.EnvironmentStatus:
        return hook.EnvironmentStatus(
            app="shop",
            environment=environment,
            live=hook.HistoryEntry(),
            target=hook.HistoryEntry(),
            rollback_ready=False,
            drift=hook.Drift.NONE,
            claim=hook.Claim(run=run, phase=phase),
            bake_until=0.0,
            reverted=hook.HistoryEntry(),
        )

    run = hook.RunStatus("shop-1", "shop", "refs/heads/main", COMMIT, 1.0, "build", "succeeded")
    places = [claimed("staging", "draining", run.run), claimed("production", "baking", run.run)]
    places.append(claimed("other", "baking", "shop-2"))
    assert run.as_claimed(places) == replace(run, stage="production", state="baking")
    ended = replace(run, state="ended")
    assert ended.as_claimed(places) == ended


def test_status_leaves_out_a_job_of_ours_that_is_of_no_stage() -> None:
    (app,) = hook.load_config(CONFIG).apps
    run = hook.Run(id="shop-1", app="shop", ref="refs/heads/main", commit=COMMIT)
    stray = hook.test_job(hook.load_config(CONFIG), app, run)
    stray["metadata"] |= {"resourceVersion": "1", "uid": "u"}
    stray["metadata"]["labels"][hook.LABEL_STAGE] = "release"
    kubectl = SimpleNamespace(pages=lambda *_: [{"items": [stray]}])
    state = SimpleNamespace(read=lambda _: hook.AppState())
    tools: Any = SimpleNamespace(
        config=hook.load_config(CONFIG),
        doors=SimpleNamespace(kubectl=kubectl),
        deployer=SimpleNamespace(state=state),
    )
    assert hook.read_runs(tools, [app], []) == []


def jobs_in_state(state: str, *names: str, ended: bool = False) -> list[dict[str, hook.Job]]:
    """The test Job of each of these runs, in one state."""
    (app,) = hook.load_config(CONFIG).apps
    groups = []
    for name in names:
        run = hook.Run(id=name, app="shop", ref="refs/heads/main", commit=COMMIT)
        job = hook.test_job(hook.load_config(CONFIG), app, run)
        job["metadata"] |= {"resourceVersion": "1", "uid": "u"}
        job["spec"]["suspend"] = state == "suspended"
        marks = {hook.ANNOTATION_OUTCOME: "failed", hook.ANNOTATION_ENDED: "9"}
        job["metadata"]["annotations"] |= marks if ended else {}
        groups.append({"test": hook.Job(job)})
    return groups


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (jobs_in_state("active", "b-2", "a-1"), "a free slot: 2 of 4 are taken by a-1, b-2"),
        (jobs_in_state("active", "b-2"), "a free slot: 1 of 4 is taken by b-2"),
        (
            jobs_in_state("active", "a-1", "b-2", "c-3", "d-4", "e-5"),
            "a free slot: 5 of 4 are taken by a-1, b-2, c-3, and 2 more",
        ),
        (jobs_in_state("suspended", "a-1"), "a free slot: 0 of 4 are taken"),
        (jobs_in_state("active", "a-1", ended=True), "a free slot: 0 of 4 are taken"),
    ],
    ids=["two", "one", "many", "none", "one that has ended"],
)
def test_a_suspended_run_waits_for_a_slot_and_it_is_said_who_takes_them(
    groups: list[dict[str, hook.Job]], words: str
) -> None:
    assert hook.slot_words(groups, 4) == words


def test_what_a_run_waits_for_is_shown_below_it_and_nothing_is_of_one_that_has_ended() -> None:
    words = ("shop-1", "shop", "refs/heads/main", COMMIT, 1.0)
    run = hook.RunStatus(*words, stage="test", state="suspended")
    assert run.waiting("a free slot").waits_for == "a free slot"
    assert run.waiting("a free slot").cells({"shop-1": "shop-1"}, 9.0)[-1] == "a free slot"
    told = replace(run, detail="for the head of the branch")
    assert told.waiting("a free slot").waits_for == "for the head of the branch"
    assert replace(told, state="ended").waiting("a free slot").waits_for == ""
    assert replace(run, state="active").waiting("a free slot").waits_for == ""


def test_status_shows_what_is_live_and_what_was_before(story: Story) -> None:
    production = story.pages["two versions"].production
    assert (production["run"], production["colour"]) == (story.run["v2"], "green")
    assert production["commit"] == story.commit["v2"]
    assert re.fullmatch(r"registry.example.com/demo/shop@sha256:[0-9a-f]{64}", production["image"])
    before = production["previous"]
    assert (before["run"], before["colour"]) == (story.run["v1"], "blue")
    assert before["commit"] == story.commit["v1"]
    assert production["rollback_ready"]
    assert (production["deploying"], production["bake_until"]) == (None, None)


def test_status_as_text_is_a_table(story: Story) -> None:
    lines = story.pages["two versions, text"].stdout.splitlines()
    cells = (short(story.run["v2"]), "green", short(story.run["v1"]), "at once", "-")
    assert re.split(r"  +", lines[1]) == ["shop", "production", *cells]
    assert lines[2] == ""
    newest = re.split(r"  +", lines[4])
    assert newest[:6] == [short(story.run["v2"]), "main", "production", "ended", "deployed", "Ok"]
    assert re.fullmatch(r"\d+[sm]", newest[6])
    assert re.split(r"  +", lines[3])[6:] == ["AGE"]


def test_status_shows_when_a_run_was_received(story: Story) -> None:
    runs = story.pages["two versions"].runs()
    first, second = (runs[story.run[v]]["received"] for v in ("v1", "v2"))
    assert 0 < second - first < 300
    assert first < runs[story.run["v2"]]["received"] < time.time()


def test_status_fits_a_terminal_of_100_columns(story: Story) -> None:
    texts = [page.stdout for name, page in story.pages.items() if name.endswith("text")]
    assert len(texts) >= 4
    assert max(len(each) for text in texts for each in text.splitlines()) <= 100


def test_a_table_wraps_between_words_what_is_longer_than_its_columns_can_be() -> None:
    branch = "feature/" + "-".join(["words"] * 12)
    rows = [[branch, "UnhealthyAfterSwitch" * 2, "", "and more " * 20]]
    lines = hook.table(["REF", "REASON", "EMPTY"], rows).splitlines()
    assert max(map(len, lines)) <= 100
    cells = [re.split("  +", line) for line in lines]
    assert cells[0] == ["REF", "REASON", "EMPTY"]
    assert cells[1][1:] == ["UnhealthyAfterSwitch" * 2, "-"]
    above = [line for line in lines[1:] if "and more" not in line]
    assert "".join(line.split("  ")[0] for line in above) == branch
    below = [line for line in lines if "and more" in line]
    assert " ".join(" ".join(below).split()) == ("and more " * 20).strip()
    assert all(line.startswith("    ") for line in below)


def test_a_table_breaks_words_only_where_all_are_too_long() -> None:
    lines = hook.table(["A", "B"], [["x" * 70, "y" * 70, ""]]).splitlines()
    assert max(map(len, lines)) <= 100
    assert "".join(lines[1:]).count("x") == "".join(lines[1:]).count("y") == 70


def test_a_run_has_a_short_id_unless_another_one_shares_it() -> None:
    runs = ["shop-01234567-0123456789", "shop-89abcdef-0123", "shop-89abcdef-0123456789", ""]
    assert hook.short_ids([*runs, runs[0]]) == {
        **{run: run for run in runs},
        runs[0]: "shop-01234567",
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0s"),
        (0, "0s"),
        (119.9, "119s"),
        (120, "2m"),
        (7199, "119m"),
        (7200, "2h"),
        (2e5, "2d"),
    ],
)
def test_an_age_is_in_the_largest_unit_of_which_it_is_two(seconds: float, text: str) -> None:
    assert hook.age(1e9, 1e9 + seconds) == text


def test_the_age_of_what_has_no_time_is_left_open() -> None:
    assert not hook.age(0.0, 1e9)


def test_status_says_when_going_back_takes_a_rollout(story: Story) -> None:
    production = story.pages["scaled down"].production
    assert production["previous"]["run"] == story.run["v1"]
    assert not production["rollback_ready"]


def test_status_shows_why_a_run_failed(story: Story) -> None:
    run = story.pages["after a failure"].runs()[story.run["v4"]]
    assert (run["stage"], run["outcome"], run["reason"]) == ("production", "failed", "CrashLoop")
    assert "hunter2" not in json.dumps(run)
    red = story.pages["red"].runs()[story.run["broken"]]
    assert (red["stage"], red["outcome"], red["reason"]) == ("test", "failed", "TestsFailed")


def test_status_says_that_a_deployed_run_was_rolled_back_and_why(story: Story) -> None:
    run = story.pages["after the first rollback"].runs()[story.run["v3"]]
    end = {k: run[k] for k in ("outcome", "reason", "detail")}
    assert end == {"outcome": "rolled-back", "reason": "RolledBack", "detail": "it is ugly"}


@pytest.mark.parametrize(
    ("answer", "by"),
    [
        ('{"status": {"userInfo": {"username": "alice\\n@example.com"}}}', "alice @example.com"),
        ('{"status": {}}', f"bob@{socket.gethostname()}"),
        ("not JSON", f"bob@{socket.gethostname()}"),
        (hook.KubectlError(["kubectl"], None, ""), f"bob@{socket.gethostname()}"),
    ],
)
def test_who_runs_a_command_is_the_user_of_the_cluster_or_else_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, answer: str | hook.KubectlError, by: str
) -> None:
    asked: list[Any] = []

    def run(*args: str, **how: Any) -> str:
        asked.append((args, how["timeout"]))
        if isinstance(answer, str):
            return answer
        raise answer

    monkeypatch.setenv("USER", "bob")
    doors = SimpleNamespace(kubectl=SimpleNamespace(run=run))
    assert hook.caller(SimpleNamespace(doors=doors)) == by  # type: ignore[arg-type]
    assert asked == [(("auth", "whoami", "-o", "json"), 2.0)]
    monkeypatch.delenv("USER")
    if "bob" in by:
        name = hook.caller(SimpleNamespace(doors=doors))  # type: ignore[arg-type]
        assert name.startswith(f"user {os.getuid()}@")


def test_status_does_not_repeat_the_reason_of_a_rollback_without_one(story: Story) -> None:
    run = story.pages["the end"].runs()[story.run["v3"]]
    assert (run["outcome"], run["reason"], run["detail"]) == ("rolled-back", "RolledBack", "")


def test_status_shows_of_each_environment_what_was_reverted_last_and_why(story: Story) -> None:
    assert story.pages["two versions"].production["reverted"] == {}
    reverted = {"run": story.run["v3"], "reason": "RolledBack", "detail": "it is ugly"}
    assert story.pages["after the first rollback"].production["reverted"] == reverted
    lines = story.pages["after the first rollback, text"].stdout.splitlines()[2:4]
    below = " ".join(map(str.strip, lines))
    by = "system:serviceaccount:orchestration:orchestration-sa"  # whose the command was
    reverted_by = f"RolledBack: it is ugly: by {by}"
    assert below == f"reverted: {short(story.run['v3'])}: {reverted_by}"
    assert story.pages["after the first rollback"].production["by"] == by
    assert story.pages["two versions"].production["by"] == "gitops-hook"
    assert story.pages["after the rerun"].production["reverted"] == {}


def test_status_says_why_a_run_failed_and_nothing_that_its_container_printed(
    story: Story,
) -> None:
    assert story.pages["red"].runs()[story.run["broken"]]["detail"] == "exit code 1"
    text = story.pages["red, text"].stdout
    assert re.search(rf"(?m)^{short(story.run['broken'])} .*\n    exit code 1$", text)


# explain


def test_explain_shows_how_a_run_stands(story: Story) -> None:
    page = story.pages["red, explained"]
    lines = dict(re.findall(r"(?m)^(\w+): +(.*)$", page.stdout))
    assert (page.status, lines["run"], lines["app"]) == (0, story.run["broken"], "shop")
    assert (lines["ref"], lines["commit"]) == ("refs/heads/feature/red", story.commit["broken"])
    assert (lines["outcome"], lines["reason"], lines["detail"]) == (
        *("failed", "TestsFailed"),
        "exit code 1",
    )
    assert re.fullmatch(r"\d+s ago", lines["received"])
    assert "broken\n" not in page.stdout.partition("detail")[2], "no log unless it is asked for"
    assert re.fullmatch(r"failed, began \d+s ago, took \d+s: exit code 1", lines["test"])


def test_explain_shows_the_stages_of_a_run_in_their_order(story: Story) -> None:
    lines = re.findall(r"(?m)^(\w+): +(passed.*)$", story.pages["v3, log"].stdout)
    assert [stage for stage, _ in lines] == ["test", "build", "production"]
    assert lines[-1][1].endswith(": is live")


def test_explain_takes_the_short_id_that_status_prints(story: Story) -> None:
    page = story.pages["red, explained by a short id"]
    assert page.status == 0
    assert re.search(rf"(?m)^run: +{story.run['broken']}$", page.stdout)


def test_explain_prints_the_log_of_a_red_test_fit_for_a_terminal(story: Story) -> None:
    page = story.pages["red, log"]
    assert page.status == 0
    assert re.search(r"(?m)^--- test test-\S+\.test-runner, kept 20\S+Z$", page.stdout)
    assert "\n\\x1b]0;hi\\x07 \\u202etxt token=***\nbroken\n" in page.stdout
    assert "\x1b" not in page.stdout


def test_explain_prints_the_log_of_a_version_that_crashed(story: Story) -> None:
    page = story.pages["v4, log"]
    words = r"\n--- production shop-\w+-\w+-\w+\.web, .*\ncannot log in with password=\*\*\*"
    assert re.search(words, page.stdout)


def test_explain_says_that_no_log_is_kept_of_a_run_that_is_well(story: Story) -> None:
    page = story.pages["v3, log"]
    assert page.status == 0
    last = "no log is kept: logs are kept for a day, and only of what failed\n"
    assert page.stdout.endswith(last)


@pytest.mark.parametrize(
    ("page", "status", "text"),
    [
        ("nothing, explained", 1, "shop-00000000-0000 is unknown: no Job, no record and no log"),
        ("another app, explained", 2, "no app 'other' is configured"),
        ("no id, explained", 2, "'shop,a!=b' is not the id of a run"),
    ],
)
def test_explain_says_what_is_not_known(story: Story, page: str, status: int, text: str) -> None:
    assert (story.pages[page].status, text in story.pages[page].stderr) == (status, True)


@pytest.mark.parametrize("beside", ["orchestration", "test"])
def test_explain_goes_on_where_an_account_may_not_look(story: Story, beside: str) -> None:
    place = story.world
    looker = f"looker-{beside}"
    subject = {"kind": "ServiceAccount", "name": looker, "namespace": "test"}
    rule = {"apiGroups": ["*"], "resources": ["jobs", "configmaps"], "verbs": ["get", "list"]}
    rbac = {"apiVersion": "rbac.authorization.k8s.io/v1"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": looker}
    bound = {"roleRef": role, "subjects": [subject]}
    for namespace in {"test", "build", beside}:
        meta = {"name": looker, "namespace": namespace}
        place.cluster.load(
            {**rbac, "metadata": meta, "kind": "Role", "rules": [rule]},
            {**rbac, "metadata": meta, "kind": "RoleBinding", **bound},
        )
    environ = {**place.environ, "KUBECONFIG": str(place.cluster.kubeconfig(f"test/{looker}"))}
    argv = argv_of("explain", story.run["broken"], "--log")
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    assert "\n--- production\nnot readable with this account\n" in done.stdout, done
    assert "token=***" in done.stdout
    assert "\nproduction: not readable with this account\n" in done.stdout
    assert ("\norchestration: not readable with this account\n" in done.stdout) == (
        beside != "orchestration"
    )


def test_status_shows_what_it_can_read_and_names_the_rest(story: Story) -> None:
    place = story.world
    rbac = {"apiVersion": "rbac.authorization.k8s.io/v1"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "partial"}
    subject = {"kind": "ServiceAccount", "name": "partial", "namespace": "test"}
    rule = {"apiGroups": ["*"], "resources": ["*"], "verbs": ["get", "list"]}
    for namespace in ("production", "build", "orchestration"):
        meta = {"name": "partial", "namespace": namespace}
        place.cluster.load(
            {**rbac, "metadata": meta, "kind": "Role", "rules": [rule]},
            {**rbac, "metadata": meta, "kind": "RoleBinding", "roleRef": role,
                "subjects": [subject]},
        )  # fmt: skip
    environ = {**place.environ, "KUBECONFIG": str(place.cluster.kubeconfig("test/partial"))}
    argv = argv_of("status", "shop")
    text, page = (
        subprocess.run([*argv, *more], env=environ, capture_output=True, text=True, check=False)
        for more in ((), ("--output", "json"))
    )
    assert (text.returncode, page.returncode) == (0, 0), (text, page)
    assert text.stdout.endswith("\nnot readable with this account: test\n")
    answer = json.loads(page.stdout)
    assert answer["unreadable"] == ["test"]
    assert [*answer["apps"][0]["environments"]] == ["production"]
    assert {run["run"] for run in answer["runs"]} >= {story.run["v4"]}


# rollback


def test_without_a_proven_version_rollback_is_refused(story: Story) -> None:
    for name in ("rollback of nothing", "rollback of the first"):
        page = story.pages[name]
        assert (page.status, page.stdout) == (3, "")
        assert re.fullmatch("gitops-hook: .*no proven version to go back to\n", page.stderr)
    assert story.pages["rollback of the first"].version == "v1"


def test_the_daemon_ends_with_status_0(story: Story) -> None:
    assert story.stopped == 0


def test_rollback_goes_several_versions_back_onto_one_whose_colour_was_overwritten(
    story: Story,
) -> None:
    page = story.pages["rollback --to 2"]
    assert (page.status, page.stderr, page.answer) == (0, "", ("v1", "hello from v1"))
    old, new = f"{story.run['v3']} (blue)", f"{story.run['v1']} (blue)"
    assert page.stdout.splitlines() == [
        f"shop production: from {old} to {new}",
        f"shop production: back on {story.run['v1']} (green)",
        f"{story.run['v3']} is rejected until `rerun {story.run['v3']}`",
    ]


def test_rollback_further_than_there_are_proven_versions_is_refused(story: Story) -> None:
    page = story.pages["rollback --to 9"]
    assert (page.status, page.version) == (3, "v3")
    text = "shop in production: only 2 proven versions to go back to"
    assert page.stderr == f"gitops-hook: {text}\n"
    page = story.pages["rollback --to 99"]
    assert (page.status, page.version) == (3, "v2")
    assert page.stderr.endswith(": only 1 proven version to go back to\n")


def test_after_a_rollback_nothing_is_under_way_and_nothing_is_further_back(story: Story) -> None:
    production = story.pages["after the first rollback"].production
    assert (production["run"], production["colour"]) == (story.run["v1"], "green")
    assert (production["deploying"], production["bake_until"]) == (None, None)
    assert production["previous"] == {}


def test_what_was_left_is_not_deployed_again_by_a_push(story: Story) -> None:
    page = story.pages["rejected"]
    assert page.version == "v1"
    assert page.production["run"] == story.run["v1"]


def test_after_a_failed_deployment_the_version_before_stands_again(story: Story) -> None:
    assert (story.bad["outcome"], story.bad["reason"]) == ("failed", "CrashLoop")
    page = story.pages["after a failure"]
    assert (page.version, page.production["run"]) == ("v3", story.run["v3"])
    assert page.production["previous"]["run"] == story.run["v1"]
    assert page.production["rollback_ready"]


def test_rollback_to_an_unknown_run_is_refused_with_those_it_could_go_to(story: Story) -> None:
    page = story.pages["rollback to an unknown run"]
    assert (page.status, page.version) == (3, "v2")
    runs = f"{story.run['v2']}, {story.run['v1']}"
    assert page.stderr.endswith(f"'{UNKNOWN[:9]}' is no run of the history: {runs}\n")


def test_rollback_takes_a_short_id_needs_no_daemon_and_scales_up_what_was_scaled_down(
    story: Story,
) -> None:
    page = story.pages["rollback without the daemon"]
    assert (page.status, page.stderr) == (0, "")
    assert page.answer == ("v1", "hello from v1")
    assert story.pages["the end"].production["run"] == story.run["v1"]


# rerun


@pytest.mark.parametrize(
    ("name", "run"), [("rerun of nothing", UNKNOWN), ("short rerun of nothing", UNKNOWN[:9])]
)
def test_rerun_of_an_unknown_run_is_refused(story: Story, name: str, run: str) -> None:
    assert story.pages[name].status == 3
    assert (
        f"{run} is unknown: neither a recorded run nor a branch's head" in story.pages[name].stderr
    )


def test_rerun_of_what_is_not_the_head_is_refused(story: Story) -> None:
    page = story.pages["rerun of an old run"]
    assert (page.status, page.version) == (3, "v3")
    assert f"{story.run['v3']} is not the head of a branch" in page.stderr


def test_rerun_of_a_rejected_run_deploys_it(story: Story) -> None:
    page = story.pages["rerun of a rejected run"]
    assert (page.status, page.stderr) == (0, "")
    assert page.stdout == f"{story.run['v3']} is under way; `status shop` shows how far it is\n"
    after = story.pages["after the rerun"]
    assert (after.version, after.production["run"]) == ("v3", story.run["v3"])
    assert after.production["previous"]["run"] == story.run["v1"]
    again = after.runs()[story.run["v3"]]
    assert (again["outcome"], again["reason"]) == ("deployed", "Ok")


def test_rerun_of_what_is_live_everywhere_says_so_and_starts_nothing(story: Story) -> None:
    page = story.pages["rerun of a live run"]
    assert (page.status, page.stdout, page.stderr) == (0, f"{story.run['v3']} is live\n", "")
    assert story.ends(story.run["v3"]) == 2  # its own end, and that after it was rejected


def test_rerun_of_a_run_whose_tests_failed_tests_again(story: Story) -> None:
    page = story.pages["rerun of a red run"]
    assert (page.status, page.stderr) == (0, "")
    assert "is under way" in page.stdout
    assert story.ends(story.run["broken"]) == 2


@pytest.mark.parametrize("name", ["rerun under way", "rerun of a red run twice"])
def test_rerun_of_a_run_under_way_leaves_it_alone(story: Story, name: str) -> None:
    page = story.pages[name]
    assert (page.status, page.stderr) == (0, "")
    assert "is under way" in page.stdout


# Configuration from the cluster


def test_without_a_file_the_configuration_comes_from_the_cluster(story: Story) -> None:
    place = story.world
    data = {"config.yaml": yaml.safe_dump(place.config)}
    meta = {"name": "gitops-hook", "namespace": "orchestration"}
    configmap = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}
    place.cluster.load(configmap)
    environ = {k: v for k, v in place.environ.items() if not k.startswith("GITOPS_HOOK_")}
    environ["KUBECONFIG"] = str(place.cluster.kubeconfig())
    argv = argv_of("status", "--output", "json")
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["apps"][0]["environments"]["production"]["colour"]
    place.cluster.store.delete("configmaps", "orchestration", "gitops-hook")
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no ConfigMap gitops-hook in orchestration" in done.stderr


def test_a_missing_permission_is_named(story: Story) -> None:
    place = story.world
    environ = place.environ | {"KUBECONFIG": str(place.cluster.kubeconfig("test/default"))}
    argv = argv_of("rollback", "shop")
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "(Forbidden)" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# plan


def versions(place: World) -> dict[tuple[str, str, str], str]:
    """Every object in the cluster with its version; events and the node's own signs aside."""
    store = place.cluster.store
    by_object = {}
    for resource in {r.name for r in RESOURCES} - {"events", "leases", "nodes"}:
        for meta in (o["metadata"] for o in store.list(resource)):
            key = resource, meta.get("namespace", ""), meta["name"]
            by_object[key] = meta["resourceVersion"]
    return by_object


def plan(place: World, *args: str, account: str | None = None, status: int = 0) -> list[str]:
    """What `plan` says to an administrator, or to an account, ending with a status."""
    environ = place.environ | {"KUBECONFIG": str(place.cluster.kubeconfig(account))}
    argv = argv_of("plan", "shop", *args)
    before = versions(place)
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, "")
    assert versions(place) == before
    return done.stdout.splitlines()


def line(lines: list[str], title: str) -> str:
    """What stands behind a title."""
    (text,) = [each for each in lines if each.startswith(f"{title}: ")]
    return text.removeprefix(f"{title}: ")


def test_plan_of_a_branch_that_is_not_there_is_refused(story: Story) -> None:
    page = story.pages["plan of nothing"]
    assert (page.status, page.stdout) == (3, "")
    assert page.stderr.endswith("shop.git has no branch 'main'\n")


def test_plan_of_what_is_no_commit_is_a_wrong_command_line(story: Story) -> None:
    done = story.world.command("plan", "shop", "main")
    assert (done.returncode, done.stderr) == (2, "gitops-hook: 'main' is not a commit id\n")


@pytest.mark.parametrize("commit", ["0" * 40, "0123456"])
def test_plan_of_an_unknown_commit_says_so(story: Story, commit: str) -> None:
    done = story.world.command("plan", "shop", commit)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"gitops-hook: commit {commit} is unknown")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("version", ["v4", "v1"], ids=["a head", "a recorded run"])
def test_plan_takes_the_beginning_of_a_commit(story: Story, version: str) -> None:
    lines = plan(story.world, story.commit[version][:10])
    assert line(lines, "run").split(",")[0] == story.run[version]


def test_plan_shows_what_is_live_and_what_would_come(story: Story) -> None:
    lines = plan(story.world)
    assert line(lines, "run") == story.run["v4"]
    assert line(lines, "rejected") == f"CrashLoop; only `rerun {story.run['v4']}` deploys it"
    assert line(lines, "permissions") == "all there"
    live = story.pages["the end"].production
    text = f"{story.run['v1']} ({live['colour']}), as it was deployed"
    assert line(lines, "production, live") == text
    colour = {"blue": "green", "green": "blue"}[live["colour"]]
    assert line(lines, "production, next").startswith(f"{colour}, 2 pods in about 10 s, ")
    image = f"  +      image: registry.example.com/demo/shop:{story.commit['v4'][:8]}"
    assert {f"  --- shop-{colour} now", f"  +++ shop-{colour} then", image} <= {*lines}


def a_template(grace: int | None = None, **handler: Any) -> Object:
    """The spec of pods with a grace period and a preStop handler."""
    web: Object = {"name": "web", "lifecycle": {"preStop": handler}}
    times = {} if grace is None else {"terminationGracePeriodSeconds": grace}
    return {"containers": [{"name": "side"}, web], **times}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (a_template(), ""),
        (a_template(2), ""),
        (a_template(1), "is 1: pods are killed"),
        (a_template(0), "is 0: pods are killed"),
        (a_template(30, sleep={"seconds": 28}), ""),
        (
            a_template(None, sleep={"seconds": 29}),
            "is 30, and the preStop .* web takes 29 s:",
        ),
        (a_template(20, exec={"command": ["sleep", "20"]}), "is 20, .* web takes 20 s:"),
        (a_template(9, exec={"command": ["sh", "-c", "nginx -s quit; sleep 9s"]}), "web takes 9 s"),
        (a_template(9, exec={"command": ["./sleepwalk", "10"]}), ""),
        (a_template(9, exec={"command": "sleep 10"}), ""),
        (a_template(9, httpGet={"path": "/quit"}), ""),
        ({"terminationGracePeriodSeconds": None, "containers": [{"name": "a"}]}, ""),
        ({"terminationGracePeriodSeconds": "x", "containers": [{"name": "a"}]}, ""),
        ({"terminationGracePeriodSeconds": 0, "containers": 5}, ""),
    ],
)
def test_plan_warns_of_pods_that_have_no_time_to_finish_their_requests(
    template: Object, text: str
) -> None:
    warning = hook.shutdown_warning(template)
    pattern = rf"\n  warning: terminationGracePeriodSeconds .*{text}.*" if text else ""
    assert re.fullmatch(pattern, warning)


def test_plan_prints_that_warning_below_what_would_come(story: Story) -> None:
    lines = plan(story.world)
    after = lines[[text.startswith("production, next: ") for text in lines].index(True) + 1]
    assert after == (
        "  warning: terminationGracePeriodSeconds is 2, and the preStop sleep of web takes 1 s: "
        "pods are killed before they can finish their requests"
    )


def test_plan_of_an_older_commit_says_that_it_would_not_be_deployed(story: Story) -> None:
    lines = plan(story.world, story.commit["v1"])
    assert line(lines, "run") == f"{story.run['v1']}, superseded: main is at {story.commit['v4']}"
    assert line(lines, "rejected") == "no"
    assert ", this commit, " in line(lines, "production, live")
    assert line(lines, "production, next").endswith("new ConfigMaps: none")


def test_plan_shows_how_much_of_each_quota_is_used(story: Story) -> None:
    lines = plan(story.world)
    assert re.search(r"(^|, )pods 0 of \d+(, |$)", line(lines, "test, quota"))
    assert line(lines, "production, quota") == "none"


def test_plan_masks_secrets_in_what_would_change(story: Story) -> None:
    deployment = copy.deepcopy(DEPLOYMENT)
    pod = deployment["spec"]["template"]["spec"]
    pod["volumes"] = [{"name": "key", "secret": {"secretName": "registry-token"}}]
    (web,) = pod["containers"]
    web["env"] = [{"name": "DB_PASSWORD", "value": "line one\nline two\n"}]
    web["args"] = ["--db=https://me:hunter2@db/shop"]
    pod["initContainers"] = [{"name": "migrate", "image": "registry.example.com/demo/migrate:1"}]
    files = {"deploy__app.yaml": yaml.safe_dump_all([deployment, SERVICE, settings_map("v5")])}
    commit = story.world.repository.release("v5", branch="feature/plan", **files)
    lines = plan(story.world, commit)
    text = "\n".join(lines)
    soon = line(lines, "production, next")
    assert re.search(r" new ConfigMaps: shop-settings-[0-9a-f]{8}$", soon)
    assert any(line.startswith("  container migrate: image registry.exam") for line in lines)
    assert "DB_PASSWORD" in text
    assert "secretName: registry-token" in text
    assert "--db=https://***@db/shop" in text
    assert not re.search("hunter2|line one|line two", text)


def test_plan_shows_what_has_drifted(story: Story) -> None:
    live = story.pages["the end"].production["colour"]
    change = (
        "patch",
        "deployment",
        f"shop-{live}",
        "-p",
        '{"spec":{"progressDeadlineSeconds":77}}',
    )
    assert story.kubectl.run(*change, "--namespace=production").code == 0

    def seen() -> bool:
        deployment = story.world.cluster.store.get("deployments", "production", f"shop-{live}")
        generation = deployment["metadata"]["generation"]
        return bool(deployment["status"]["observedGeneration"] == generation)

    eventually(seen, what="the change is noticed")
    lines = plan(story.world)
    assert line(lines, "production, live") == f"{story.run['v1']} ({live})"
    place = lines.index("  -progressDeadlineSeconds: 77")
    assert lines[place + 1].startswith("  +progressDeadlineSeconds: ")


def test_plan_shows_why_the_manifests_would_be_refused(story: Story) -> None:
    commit = story.world.repository.release("v6", branch="feature/no", **{"deploy__app.yaml": "5"})
    lines = plan(story.world, commit, status=1)
    assert line(lines, "production, next").startswith("failed: ManifestInvalid: deploy/app.yaml")


def test_plan_goes_on_while_an_object_beside_the_app_is_still_being_deleted(story: Story) -> None:
    labels = {
        "app.kubernetes.io/managed-by": "gitops-hook",
        "gitops-hook/app": "shop",
        "gitops-hook/stage": "companion",
    }
    extra = {"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": "b"}}
    meta = {"namespace": "production", "labels": labels, "finalizers": ["example.com/held"]}
    story.world.cluster.load({**extra, "metadata": {"name": "extra", **meta}})
    name = ("configmap", "extra", "--namespace=production")
    assert story.kubectl.run("delete", *name, "--wait=false").code == 0
    manifests = [DEPLOYMENT, SERVICE, settings_map("v7"), {**extra, "metadata": {"name": "extra"}}]
    files = {"deploy__app.yaml": yaml.safe_dump_all(manifests)}
    commit = story.world.repository.release("v7", branch="feature/held", **files)
    lines = plan(story.world, commit, status=1)
    assert line(lines, "production, next") == "failed: ConfigMap/extra is still being deleted"
    let_go = '{"metadata":{"finalizers":null}}'
    assert story.kubectl.run("patch", *name, "--type=merge", "-p", let_go).code == 0


def test_plan_goes_on_while_the_live_service_selects_two_versions(story: Story) -> None:
    service = story.world.service()
    assert service is not None
    selector = service["spec"]["selector"]
    name = ("patch", "service", "shop", "--namespace=production", "--type=merge", "-p")
    wide = {key: value if key == "gitops-hook/app" else None for key, value in selector.items()}

    def reached() -> int:
        """How many pods the Service leads to."""
        slices = story.world.cluster.store.list("endpointslices", "production")
        own = [s for s in slices if s["metadata"]["labels"]["kubernetes.io/service-name"] == "shop"]
        return sum(len(each["endpoints"]) for each in own)

    before = reached()
    try:
        assert story.kubectl.run(*name, json.dumps({"spec": {"selector": wide}})).code == 0
        eventually(lambda: reached() > before, what="both versions get traffic")
        lines = plan(story.world, status=1)
    finally:
        assert story.kubectl.run(*name, json.dumps({"spec": {"selector": selector}})).code == 0
    assert line(lines, "production, next").startswith("failed: the live Service selects two")
    eventually(lambda: reached() == before, what="one version gets traffic")


def test_plan_says_what_it_may_not_read_and_goes_on(story: Story) -> None:
    lines = plan(story.world, account="test/default", status=1)
    forbidden = re.compile(r"failed: kubectl get .*\(Forbidden\)")
    titles = ["rejected", "production, live", "production, next"]
    assert [t for t in titles if not forbidden.match(line(lines, t))] == []
    rights = line(lines, "permissions").split("; ")
    assert "get, create, patch configmaps in orchestration" in rights
    assert "get pods/log in production" in rights


def test_plan_is_whole_without_the_quotas_that_the_daemon_may_not_read(story: Story) -> None:
    lines = plan(story.world, account="orchestration/orchestration-sa")
    for name in ("test", "build", "production"):
        assert line(lines, f"{name}, quota") == "not readable with this account"
    assert line(lines, "production, live").startswith(story.run["v1"])


def test_plan_shows_a_reader_what_is_live_without_a_comparison(story: Story) -> None:
    place = story.world
    meta = {"name": "reader", "namespace": "production"}
    rule = {"apiGroups": ["*"], "resources": ["*"], "verbs": ["get", "list"]}
    rbac = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": meta}
    subject = {"kind": "ServiceAccount", "name": "reader", "namespace": "orchestration"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"}
    place.cluster.load(
        {**rbac, "kind": "Role", "rules": [rule]},
        {**rbac, "kind": "RoleBinding", "roleRef": role, "subjects": [subject]},
    )
    lines = plan(place, account="orchestration/reader", status=1)
    live = story.pages["the end"].production["colour"]
    assert line(lines, "production, live") == f"{story.run['v1']} ({live})"
    assert re.search("2 pods in about .*new ConfigMaps: ", line(lines, "production, next"))
    assert sum(text.startswith("  not compared: kubectl replace") for text in lines) == 2
    assert "(Forbidden)" in line(lines, "rejected")


def test_plan_asks_for_exactly_the_rights_of_the_daemon() -> None:
    roles = yaml.safe_load_all((ROOT / "manifests/base/roles.yaml").read_text("utf-8"))
    granted: dict[str, dict[str, set[str]]] = {}
    for role in roles:
        for rule in role["rules"]:
            for group, resource in itertools.product(rule["apiGroups"], rule["resources"]):
                rights = granted.setdefault(role["metadata"]["namespace"], {})
                rights[f"{group}/{resource}"] = {*rule["verbs"]}
    asked = {
        **dict.fromkeys(("test", "build"), hook.JOB_RIGHTS),
        "orchestration": hook.STATE_RIGHTS,
    }
    asked |= dict.fromkeys(("staging", "production"), hook.APP_RIGHTS)
    verbs = {n: {r: {*v.split()} for r, v in rights.items()} for n, rights in asked.items()}
    assert verbs == granted
