"""The story: four pushes, what is expected of each, and what was seen."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.demo.load import Answer, Load
from tests.demo.observer import Observer, Say, Sight, finished
from tests.demo.owner import Commit, Owner
from tests.demo.processes import Broken
from tests.demo.setting import APP, Daemon, ask, wait_until
from tests.standin.kubectl import Kubectl

STEP_SECONDS = 180.0
SABOTAGED_SECONDS = 15.0
ENDED_SECONDS = 30.0
QUIET_SECONDS = 2.0
MINIMUM_RATE = 50.0
WATCH = {  # what to watch for, by version
    1: "a first push: tests, image, staging, production, all by themselves",
    2: "a good version: visitors move to it without one failed request, and the worker follows",
    3: "it is green, but its health path fails once visitors come: traffic goes back by itself",
    4: "its tests are red: it is neither built nor deployed",
}
LAST = "production"


@dataclass(frozen=True)
class Verdict:
    """One expectation, and whether it was met."""

    text: str
    met: bool


@dataclass
class Story:
    """Plays the pushes; every verdict is kubectl's or the load generator's."""

    owner: Owner
    daemon: Daemon
    kubectl: Kubectl
    say: Say
    sabotage: bool
    load: Load | None = None
    commits: dict[int, Commit] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.observer = Observer(self.kubectl, self.say)

    def play(self) -> None:
        """Tell it to its end, or until something expected does not happen: Broken."""
        self._push(self.owner.push_first())
        self._first_version()
        self._push(self.owner.push_change(2))
        self._next_version()
        self._push(self.owner.push_change(3))
        self._sick_version()
        self._push(self.owner.push_change(4))
        self._untested_version()

    def stop(self) -> None:
        """Let the visitors go."""
        if self.load is not None:
            self.load.stop()

    # The pushes

    def _push(self, commit: Commit) -> None:
        self.commits[commit.version] = commit
        self.say("watch", WATCH[commit.version])
        self.observer.expect(commit)
        code, _, body = self.daemon.push(commit.sha).partition(" ")
        what = f"version {commit.version}, {commit.sha[:8]} “{commit.title}”"
        self.say("push", f"{what}: the webhook answers {code} {json.loads(body)['status']}")

    def _first_version(self) -> None:
        commit = self.commits[1]
        self._until("version 1 is live", lambda sight: sight.ready(LAST) == 2)
        service = self.observer.sight.live(LAST)
        assert service is not None
        host, port = service["spec"]["clusterIP"], service["spec"]["ports"][0]["port"]
        self.load = Load(host, port)
        wait_until(self.load.reachable, "the first version answers")
        self.load.start()
        self.say("load", f"visitors ask http://{host}:{port}/ from now on")
        self._until("version 1 stays", lambda sight: _outcome(sight, commit) == "deployed")

    def _next_version(self) -> None:
        commit = self.commits[2]
        self._until("version 2 is live", lambda sight: sight.is_live(LAST, commit))
        self._until_answered(2)
        self._until("version 2 stays", lambda sight: _outcome(sight, commit) == "deployed")

    def _sick_version(self) -> None:
        commit, seconds = self.commits[3], STEP_SECONDS
        self._until_answered(3)
        if self.sabotage:
            self._forbid_switching()
            seconds = SABOTAGED_SECONDS
        self._until(
            "version 3 is switched back",
            lambda sight: _outcome(sight, commit) == "switched-back",
            seconds,
        )
        self._until("nobody gets version 3 any more", lambda _: self._quiet(3))
        unhealthy = self.visits.of_version(3)
        gone = unhealthy[-1].at - unhealthy[0].at
        share = f"{len(unhealthy)} of {len(self.visits.answers())} requests"
        self.say("load", f"version 3 answered {share}, for {gone:.1f} s, and none since")
        self._until("the worker is of version 2 again", lambda sight: self._works(sight, 2))

    def _untested_version(self) -> None:
        commit = self.commits[4]
        self._until("version 4 ends red", lambda sight: bool(_reason(sight, commit)))
        self._until("version 4 is not deployed", lambda _: self._quiet(4))

    def _forbid_switching(self) -> None:
        """From outside: the daemon goes on and may do everything but move the live traffic."""
        role = ("--namespace", LAST, "{}", "role", "production-deployer")
        get, patch = ([word.format(verb) for word in role] for verb in ("get", "patch"))
        rules = json.loads(ask(self.kubectl, *get, "-o", "json"))["rules"]
        for rule in rules:
            if "services" in rule["resources"]:
                rule["verbs"].remove("patch")
        preview = {
            "apiGroups": [""],
            "resources": ["services"],
            "resourceNames": [f"{APP}-preview"],
        }
        rules.append({**preview, "verbs": ["patch"]})
        ask(self.kubectl, *patch, "--type=merge", "-p", json.dumps({"rules": rules}))
        self.say("sabotage", f"the daemon may not patch Service {APP} in production any more")

    # Waiting

    @property
    def visits(self) -> Load:
        """The load, once it has begun."""
        if self.load is None:
            raise Broken("the load never began")
        return self.load

    def _until(
        self, what: str, true: Callable[[Sight], bool], seconds: float = STEP_SECONDS
    ) -> None:
        until = time.monotonic() + seconds
        newest = self.commits[max(self.commits)]
        while not true(sight := self.observer.look()):
            self.daemon.ready()
            if _outcome(sight, newest) or _reason(sight, newest):  # nothing more will come of it
                until = min(until, time.monotonic() + ENDED_SECONDS)
            if time.monotonic() > until:
                raise Broken(f"not in time: {what}")

    def _until_answered(self, version: int) -> None:
        self._until(f"version {version} answers", lambda _: bool(self.visits.of_version(version)))
        self.say("load", f"first visitors get version {version}")

    def _quiet(self, version: int) -> bool:
        found = self.visits.of_version(version)
        last = found[-1].at if found else self.visits.began
        return time.monotonic() - last > QUIET_SECONDS

    def _works(self, sight: Sight, version: int) -> bool:
        commit = self.commits.get(version)
        wanted = f"{APP}-{commit.sha[:8]}-" if commit else "-"
        return sight.working(LAST).startswith(wanted)

    # Verdicts

    def judge(self) -> list[Verdict]:
        """What was expected and whether it was seen, by kubectl and by the load."""
        try:
            sight = self.observer.look()
        except Broken:
            sight = self.observer.sight
        return [*self._live_verdicts(sight), *self._red_verdicts(sight), *self._load_verdicts()]

    def _live_verdicts(self, sight: Sight) -> list[Verdict]:
        first, second, third = (self._answers(version) for version in (1, 2, 3))
        order = bool(first and second and third) and first[0].at < second[0].at < third[0].at
        moved = any(answer.kept for answer in second)
        return [
            Verdict("version 1 went live", bool(first) and self._ended(sight, 1) == "deployed"),
            Verdict("version 2 went live", bool(second) and self._ended(sight, 2) == "deployed"),
            Verdict("connections that visitors kept moved to it as well", moved),
            Verdict("version 3 went live after it", order),
            Verdict("version 3 was switched back", self._ended(sight, 3) == "switched-back"),
            Verdict("then only version 2 answered", self._only_since(2, third)),
            Verdict(
                "version 2 is live", 2 in self.commits and sight.is_live(LAST, self.commits[2])
            ),
            Verdict("the worker is of version 2 as well", self._works(sight, 2)),
        ]

    def _red_verdicts(self, sight: Sight) -> list[Verdict]:
        commit = self.commits.get(4)
        job = sight.job("test", commit) if commit else None
        failed = job is not None and finished(job) == "Failed"
        red = failed and _reason(sight, self.commits[4]) == "TestsFailed"
        unseen = commit is not None and not self._answers(4) and not sight.job("build", commit)
        return [
            Verdict("version 4 ended as TestsFailed", red),
            Verdict("version 4 was not built and never answered", unseen),
        ]

    def _load_verdicts(self) -> list[Verdict]:
        rate = self.load.rate() if self.load else 0.0
        failures = self.load.failures() if self.load else []
        first = f" ({failures[0].failure})" if failures else ""
        return [
            Verdict(f"visitors asked {rate:.0f} times a second", rate >= MINIMUM_RATE),
            Verdict(f"every visitor got an answer{first}", bool(self.load) and not failures),
        ]

    def _answers(self, version: int) -> list[Answer]:
        return self.load.of_version(version) if self.load else []

    def _only_since(self, version: int, before: list[Answer]) -> bool:
        """Whether after those answers all visitors, new and kept ones, got this version."""
        if not before:
            return False
        after = [answer for answer in self.visits.answers() if answer.at > before[-1].at]
        new = [answer.at for answer in after if not answer.kept]
        long = bool(new) and new[-1] - new[0] > QUIET_SECONDS / 2
        return long and {answer.version for answer in after} == {version}

    def _ended(self, sight: Sight, version: int) -> str:
        commit = self.commits.get(version)
        return _outcome(sight, commit) if commit else ""


def _outcome(sight: Sight, commit: Commit) -> str:
    return str(sight.entry(LAST, commit).get("outcome", ""))


def _reason(sight: Sight, commit: Commit) -> str:
    job = sight.job("test", commit)
    return sight.reason(job) if job else ""
