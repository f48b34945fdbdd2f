"""`make demo`: the daemon at work on a stand-in cluster, told line by line.

BREAK=no-switch-back keeps it from switching back, so that the demo must fail; KEEP=1 leaves
everything running after the story. Exit status 0 only if everything expected was observed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from tests.demo.observer import Say
from tests.demo.owner import Owner
from tests.demo.processes import PRODUCT, Broken
from tests.demo.setting import (
    APP,
    BAKE,
    DRAIN,
    configuration,
    install,
    start_cluster,
    start_daemon,
)
from tests.demo.story import Story

SABOTAGE = "no-switch-back"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LAST_LINES = 15


COLUMNS = 100
RED, GREEN, AMBER = 31, 32, 33
TONES = {  # of what is told, the first that fits
    r"switched back|TestsFailed|BuildFailed|not built|^broken|FAILED": RED,
    r"bakes for|^watch": AMBER,
    r"is live|to stay|green: |(is|are) available|^ok": GREEN,
}


class Teller:
    """Prints what happens with the seconds since the beginning, in colour on a terminal."""

    def __init__(self, *, colourful: bool) -> None:
        self._began = time.monotonic()
        self.colourful = colourful

    def say(self, who: str, text: str) -> None:
        """Print one message at once, on as many lines as it takes."""
        head = f"{time.monotonic() - self._began:6.1f}  {who:<10}  "
        lines = textwrap.wrap(text, COLUMNS - len(head), break_long_words=False) or [""]
        tone = next((t for words, t in TONES.items() if re.search(words, f"{who} {text}")), 0)
        for number, line in enumerate(lines):
            print(f"{' ' * len(head) if number else head}{self.paint(line, tone)}", flush=True)

    def paint(self, text: str, tone: int) -> str:
        """Return a text in a colour, where there are any."""
        return f"\033[{tone}m{text}\033[0m" if tone and self.colourful else text


def introduce(teller: Teller) -> None:
    """What is going to happen, and what is not as it would be on a cluster."""
    print("Four versions of a small shop are pushed; gitops-hook tests, builds and deploys them.")
    print("Visitors ask the shop all the time. No request may fail, whatever a version does.")
    print("The cluster is a stand-in, and its pods are local processes; kubectl and git are real.")
    print(f"Times are shortened: bake {BAKE} s, drain {DRAIN} s, minReadySeconds 1.\n", flush=True)


def perform(directory: Path, stack: ExitStack, say: Say, sabotage: bool) -> Story:
    """Set the stage and play the story; what was seen of it, also when it broke off."""
    owner = Owner(directory)
    kubectl = start_cluster(directory, stack)
    say("cluster", "the stand-in is up; kubectl and git are the real ones")
    count = install(kubectl, directory, configuration(owner.repository))
    say("cluster", f"kubectl applied manifests/: {count} objects")
    daemon = start_daemon(kubectl, directory, stack)
    say("daemon", f"gitops_hook.py serves {daemon.webhook} as orchestration-sa")
    story = Story(owner, daemon, kubectl, say, sabotage)
    stack.callback(story.stop)
    try:
        story.play()
    except Broken as broken:
        say("broken", str(broken))
    story.stop()
    return story


def show_end(log: Path) -> None:
    """The last lines of a log, and where the rest of it is."""
    print(f"\nthe end of {log}:")
    print("\n".join(log.read_text("utf-8").splitlines()[-LAST_LINES:]))


NEXT = """
Try next:
  KEEP=1 make demo                 leave it running, with a page to look at and commands to paste
  BREAK=no-switch-back make demo   forbid the daemon to switch back, and see the demo fail
  make apply OVERLAY=DIRECTORY     install it on a cluster of yours, as the README says
"""


def report(story: Story, teller: Teller) -> bool:
    """Print every verdict and, last, how the visitors fared; whether all is as expected."""
    verdicts = story.judge()
    good = all(verdict.met for verdict in verdicts)
    if not good:
        show_end(story.daemon.program.log)
    print()
    for verdict in verdicts:
        word = "ok" if verdict.met else "FAILED"
        tone = GREEN if verdict.met else RED
        print(f"{teller.paint(f'{word:<8}', tone)}{verdict.text}")
    print(NEXT)
    answers = story.load.answers() if story.load else []
    failed = sum(bool(answer.failure) for answer in answers)
    print(f"{len(answers)} requests, {failed} failed", flush=True)
    return good


def keep(story: Story) -> None:
    """Leave everything running until a signal comes."""
    daemon, service = story.daemon, story.observer.sight.live("production")
    names = ("GITOPS_HOOK_CONFIG", "GITOPS_HOOK_SECRETS", "KUBECONFIG")
    settings = " ".join(f"{name}={daemon.env[name]}" for name in names)
    print(f"\nkubeconfig  export KUBECONFIG={story.kubectl.environment['KUBECONFIG']}")
    if service is not None:
        print(
            f"shop        http://{service['spec']['clusterIP']}:{service['spec']['ports'][0]['port']}/"
        )
    print(f"webhook     {daemon.webhook}")
    print(f"page        {daemon.page}")
    print(f"metrics     {daemon.metrics}")
    print(f"log         {daemon.program.log}")
    print(f"repository  git clone {story.owner.repository}")
    print(f"look        {settings} {sys.executable} {PRODUCT} status")
    print(f"go back     {settings} {sys.executable} {PRODUCT} rollback {APP}")
    print(f"deliver     {settings} {sys.executable} {PRODUCT} push --app {APP} --ref main \\")
    print(f"              --url {daemon.webhook} --sha COMMIT")
    print("Ctrl-C ends it all.", flush=True)
    while True:
        signal.pause()


def clean(directory: Path, keep_logs: bool) -> None:
    """Remove what the demo made, but for the logs of one that failed."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif not (keep_logs and path.suffix == ".log"):
            path.unlink()
    if not keep_logs:
        shutil.rmtree(directory, ignore_errors=True)


def interrupt(*_: object) -> NoReturn:
    """However the demo is told to end, it is as by Ctrl-C."""
    raise KeyboardInterrupt


def main(environ: Mapping[str, str]) -> int:
    """Run the demo: 0 all observed, 1 something was not, 2 wrong usage, 130 interrupted."""
    if environ.get("BREAK", "") not in ("", SABOTAGE):
        print(f"BREAK={environ['BREAK']}: only BREAK={SABOTAGE} is known", file=sys.stderr)
        return 2
    for number in ENDING:
        signal.signal(number, interrupt)
    directory, code = Path(tempfile.mkdtemp(prefix="gitops-hook-demo-")), 130
    try:
        with ExitStack() as stack:
            stack.callback(lambda: clean(directory, keep_logs=code == 1))
            try:
                colourful = sys.stdout.isatty() and not environ.get("NO_COLOR")
                teller = Teller(colourful=colourful)
                introduce(teller)
                story = perform(directory, stack, teller.say, bool(environ.get("BREAK")))
                code = 0 if report(story, teller) else 1
                if environ.get("KEEP"):
                    keep(story)
            except Broken as broken:
                code = 1
                for log in (path for path in directory.glob("*.log") if path.stat().st_size):
                    show_end(log)
                print(f"the demo did not begin: {broken}", file=sys.stderr)
            finally:
                # What was started is ended, however impatient somebody is.
                for number in ENDING:
                    signal.signal(number, signal.SIG_IGN)
    except KeyboardInterrupt:
        print("\nended", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(os.environ))
