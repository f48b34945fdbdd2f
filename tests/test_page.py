"""The page says what is live, what happens and why, and lets nothing from outside into its HTML."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import re
import statistics
import threading
import time
from pathlib import Path

import pytest

import gitops_hook as hook
from gitops_hook import Outcome, Reason
from tests.gallery import APPS, LOG, MAIN, NOW, Gallery, full_gallery
from tests.idle_controller import refused

CANARY = "glpat-canary-0123456789"
MARKUP = "<script>alert('x')</script><img src=x onerror=alert(1)>\" onclick='y' &amp;"
VOID = {"meta", "img", "br", "link", "input"}


class Outline(html.parser.HTMLParser):
    """The elements of a page, with their attributes and texts; fails where they do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"] and data.strip():
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def attributes(self, tag: str, name: str) -> list[str]:
        return [values[name] for each, values in self.elements if each == tag and name in values]


def outline(gallery: Gallery, path: str) -> Outline:
    return Outline(gallery.html(path))


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    return Gallery(tmp_path)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return full_gallery(tmp_path_factory.mktemp("full"))


def run_of(gallery: Gallery, commit: str) -> hook.Run:
    """The run of the commit that begins so."""
    runs = gallery.context.observed_runs(gallery.states())
    return next(seen.run for seen in runs if seen.run.commit.startswith(commit))


# === What it says ===


def test_the_first_page_has_each_environment_with_its_version_and_rollback(full: Gallery) -> None:
    page = outline(full, "/")
    for words in (
        "shop staging e2a81b64 green 2m ago 7be4d013 blue",
        "shop production e2a81b64 green 40s ago 7be4d013 blue baking, 20s left shop-e2a81b64",
        "blog production 44d1a9b0 blue 8d ago none b7720e5c green rolled-back: RolledBack",
    ):
        assert words in page.text
    for link in ("apps/shop", "apps/blog", f"runs/{run_of(full, 'e2a81b64').id}"):
        assert link in page.attributes("a", "href")


def test_the_stages_of_a_run_are_words_beside_each_other(full: Gallery) -> None:
    text = outline(full, "/").text
    stages = "test passed build passed staging passed production running production baking 5m ago"
    assert f"shop-e2a81b64 main {stages}" in text
    assert "test passed build passed staging waiting production not begun failed for now" in text
    assert "vouchers test failed failed 15m ago TestsFailed 131 passed, 2 failed: tests." in text
    assert "test waiting test suspended 20s ago a free slot: 0 of 4 are taken" in text


def test_a_run_that_is_tried_again_says_when_and_what_helps(full: Gallery) -> None:
    page = outline(full, f"/runs/{run_of(full, '5e61f3aa').id}").text
    assert "Reason ImagePullFailed Details registry.example.com: connection refused" in page
    assert Reason.IMAGE_PULL_FAILED.advice in page
    assert "Next try Try 3 in 3m, if it is still the head." in page


def test_the_page_of_an_app_has_its_runs_and_switches_with_who_and_why(full: Gallery) -> None:
    page = outline(full, "/apps/blog").text
    assert "shop" not in page
    assert page.index("blog-5e61f3aa") < page.index("blog-b7720e5c") < page.index("blog-44d1a9b0")
    assert "green rolled-back alice RolledBack: comments are slow" in page
    assert "blue deployed gitops-hook" in page
    sick = "green switched-back gitops-hook UnhealthyAfterSwitch: /ready failed 3 times: status 503"
    assert sick in outline(full, "/apps/shop").text


def test_the_page_of_a_run_has_its_commit_title_times_and_failing_tests(full: Gallery) -> None:
    run = run_of(full, "0d5c7e18")
    page = outline(full, f"/runs/{run.id}")
    link = f"https://gitlab.example.com/demo/shop/-/commit/{run.commit}"
    assert link in page.attributes("a", "href")
    assert "Title Vouchers" in page.text
    assert "tests.test_cart.test_total, tests.test_cart.test_voucher" in page.text
    assert re.search(
        r"test failed 14m ago [\d: -]+ UTC 13m ago [\d: -]+ UTC 80s 131 passed", page.text
    )


def test_a_repository_without_a_web_address_has_no_link(gallery: Gallery) -> None:
    run = gallery.run("ab12cd34", 60, "tools")
    gallery.end(run, Outcome.TESTED, stage="test", ended=NOW - 10)
    page = outline(gallery, f"/runs/{run.id}")
    assert run.commit in page.text
    assert not [link for link in page.attributes("a", "href") if ":" in link or "srv" in link]


def test_links_lead_to_pages_that_are_there(full: Gallery) -> None:
    seen = set[str]()
    waiting = ["/"]
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for link in outline(full, path).attributes("a", "href"):
            if not link.startswith("https://gitlab.example.com/"):
                base = path.rpartition("/")[0]
                target = link.removeprefix("./")
                while target.startswith("../"):
                    base = base.rpartition("/")[0]
                    target = target.removeprefix("../")
                waiting.append(f"{base}/{target}")
    assert {"/", "/apps/shop", "/apps/blog"} < seen
    assert len([path for path in seen if path.startswith("/runs/")]) == 9


def test_an_app_that_is_only_tested_has_no_environments(gallery: Gallery) -> None:
    assert "It has no environments." in outline(gallery, "/apps/tools").text
    assert "There is no run yet." in outline(gallery, "/apps/tools").text


def test_an_environment_with_nothing_in_it_is_shown_as_empty(gallery: Gallery) -> None:
    assert "blog staging none none" in outline(gallery, "/").text


def test_a_service_that_lost_its_history_is_known_by_its_record(gallery: Gallery) -> None:
    run = gallery.run("ab12cd34", 600)
    entry = gallery.entry(run, "blue", 500)
    live = {"staging": hook.HistoryEntry.from_json(entry)}
    gallery.context.state.write(gallery.context.apps["shop"], live=live)
    gallery.live("shop", "staging", [entry])
    manifest = {
        "metadata": {"name": "shop", "resourceVersion": "2"},
        "spec": {"selector": entry["selector"]},
    }
    gallery.controller.informers.services["staging"]._take("MODIFIED", manifest)
    assert "shop staging ab12cd34 blue 8m ago none" in outline(gallery, "/").text


def test_a_selector_that_someone_changed_is_named_until_it_is_another(gallery: Gallery) -> None:
    run = gallery.run("ab12cd34", 600)
    entry = gallery.entry(run, "blue", 500)
    gallery.live("shop", "staging", [entry])
    drift = hook.ReportedDrift(hook.Drift.ELSEWHERE, entry["selector"])
    drifts = gallery.context.deployer.steady.live.remembered.drifts
    drifts["shop", "staging"] = drift
    assert "Someone changed the selector: Elsewhere" in outline(gallery, "/").text
    drifts["shop", "staging"] = hook.ReportedDrift(hook.Drift.ELSEWHERE, {"app": "other"})
    assert "Someone changed" not in outline(gallery, "/").text


# === While something is under way, and while the cluster is away ===


def refreshes(page: Outline) -> bool:
    return "refresh" in page.attributes("meta", "http-equiv")


def test_it_is_loaded_again_only_while_something_is_under_way(full: Gallery) -> None:
    running = run_of(full, "e2a81b64").id
    ended = run_of(full, "0d5c7e18").id
    assert [refreshes(outline(full, p)) for p in ("/", "/apps/shop", f"/runs/{running}")] == [
        True
    ] * 3
    assert [refreshes(outline(full, p)) for p in ("/apps/blog", f"/runs/{ended}")] == [False] * 2
    assert full.html("/").count('<meta http-equiv="refresh" content="5">') == 1


def test_while_the_cluster_cannot_be_followed_it_shows_what_was_seen_last(gallery: Gallery) -> None:
    run = gallery.run("ab12cd34", 60)
    gallery.job(run, "test", "active", 50)
    gallery.controller.informers.jobs[0].trouble = "connection refused"
    page = outline(gallery, "/").text
    assert "The cluster cannot be followed, so this may be old: connection refused" in page
    assert "shop-ab12cd34" in page


def test_records_that_were_never_read_are_named_and_not_waited_for(gallery: Gallery) -> None:
    gallery.context.state._last.clear()
    gallery.context.state._seen.clear()
    assert "Records are not read yet of: shop, blog, tools." in outline(gallery, "/").text


def test_a_failed_write_leaves_on_the_page_what_was_read_before(gallery: Gallery) -> None:
    run = gallery.run("ab12cd34", 60)
    gallery.end(run, Outcome.TESTED, stage="test", ended=NOW - 10)
    gallery.context.state._seen.clear()  # as a failed write does
    assert "shop-ab12cd34" in outline(gallery, "/").text


def test_pushes_that_wait_for_the_cluster_are_counted(gallery: Gallery) -> None:
    gallery.context.spool.store([gallery.run("ab12cd34", 60)])
    assert "not in the cluster yet: 1." in outline(gallery, "/").text


@pytest.mark.cluster
def test_it_can_be_read_while_everything_changes(gallery: Gallery) -> None:
    runs = [gallery.run(f"{n:08x}", 60 + n) for n in range(40)]
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            for run in runs:
                manifest = gallery.job(run, "test", "active", 50)
                gallery.end(run, Outcome.TESTED, stage="test", ended=NOW - 10)
                gallery.controller.informers.jobs[0]._take("DELETED", manifest)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(60):
            Outline(gallery.html("/"))
            Outline(gallery.html("/apps/shop"))
    finally:
        ended.set()
        thread.join()


# === The log ===


def test_the_log_of_a_run_is_read_only_for_its_own_page(full: Gallery) -> None:
    full.kubectl.calls.clear()
    for path in ("/", "/apps/shop", f"/runs/{run_of(full, '7be4d013').id}"):
        full.html(path)
    assert full.kubectl.calls == []
    run = run_of(full, "0d5c7e18")
    page = outline(full, f"/runs/{run.id}")
    (call,) = full.kubectl.calls
    assert call.startswith("test ")
    assert call.endswith(" 2.0")
    assert f"{hook.LABEL_RUN}={run.id}" in call
    assert "FAILED tests/test_cart.py::test_voucher - KeyError: 'voucher'" in page.text
    assert page.attributes("pre", "tabindex") == ["0"]


@pytest.mark.parametrize(
    "failure",
    [
        refused("connection refused"),
        refused("", None),
        hook.HookError("<b>no</b>"),
        KeyError("items"),
    ],
    ids=["refused", "too late", "markup", "no list"],
)
def test_a_log_that_cannot_be_read_is_said_and_the_rest_is_shown(
    full: Gallery, failure: Exception
) -> None:
    full.kubectl.failure = failure
    try:
        page = outline(full, f"/runs/{run_of(full, '0d5c7e18').id}")
    finally:
        full.kubectl.failure = None
    assert "The log cannot be read now: " in page.text
    assert "131 passed, 2 failed" in page.text
    assert not page.attributes("pre", "tabindex")


def test_of_two_logs_at_once_the_second_is_not_waited_for(full: Gallery) -> None:
    path = f"/runs/{run_of(full, '0d5c7e18').id}"
    logs = full.logs
    with logs._reading:
        assert "another page is reading one" in outline(full, path).text
    assert "FAILED tests/test_cart.py" in outline(full, path).text


def test_the_log_of_pods_is_not_shown_where_none_is_to_be_kept(tmp_path: Path) -> None:
    config = APPS.replace("demo/shop}", "demo/shop}\n    deploy: {log_tails: false}")
    gallery = Gallery(tmp_path, config)
    run = gallery.run("ab12cd34", 60)
    gallery.end(run, Outcome.FAILED, Reason.CRASH_LOOP, stage="staging", ended=NOW - 10)
    gallery.kubectl.logs[run.id] = {"pod.web": LOG}
    assert "No log is kept" in outline(gallery, f"/runs/{run.id}").text
    assert gallery.kubectl.calls == []


# === What comes from outside ===


def test_markup_and_secrets_from_outside_stay_text_and_hidden(tmp_path: Path) -> None:
    (tmp_path / "webhook-tokens").write_text("a-secret-of-the-webhook\n")
    gallery = Gallery(tmp_path)
    said = f"{MARKUP} {CANARY} a-secret-of-the-webhook https://u:hunter2@h/ \u202egnp.exe\x1b[31m"
    run = gallery.run("ab12cd34", 60, ref=f"refs/heads/{MARKUP}", title=said * 100)
    gallery.job(run, "test", "failed", 50, 10)
    gallery.end(run, Outcome.FAILED, Reason.TESTS_FAILED, stage="test", ended=NOW, detail=said)
    gallery.kubectl.logs[run.id] = {f"pod.{MARKUP}": f"{said}\n" * 1000}
    entry = gallery.entry(run, "blue", 500, by=said, reason="Odd", detail=said)
    other = gallery.entry(gallery.run("ee55ff66", 600), "green", 550)
    gallery.live("shop", "staging", [entry, other])
    gallery.controller.informers.jobs[1].trouble = said
    (answer,) = (gallery.context.observed_runs(gallery.states()),)
    assert len(answer) == 1
    for path in ("/", "/apps/shop", f"/runs/{run.id}"):
        body = gallery.html(path)
        page = Outline(body)
        assert not {"script", "img", "b onclick"} & {tag for tag, _ in page.elements}
        assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
        assert "<script>alert('x')</script>" in page.text
        for hidden in (CANARY, "a-secret-of-the-webhook", "hunter2", "\u202e", "\x1b"):
            assert hidden not in body
        assert len(body) < 200_000


def test_a_long_title_is_cut_and_a_long_log_keeps_its_end(gallery: Gallery) -> None:
    run = gallery.run("ab12cd34", 60, title="<b>" * 3000)
    gallery.job(run, "test", "failed", 50, 10)
    gallery.end(run, Outcome.FAILED, Reason.TESTS_FAILED, stage="test", ended=NOW)
    gallery.kubectl.logs[run.id] = {"pod.tests": "x" * 10**6 + "\nthe end"}
    body = gallery.html(f"/runs/{run.id}")
    assert len(body) < 2 * hook.LOG_BYTES
    assert body.count("&lt;b&gt;") < 200
    assert "the end" in body


def test_a_token_at_the_place_where_a_text_is_cut_is_not_shown_in_part(gallery: Gallery) -> None:
    detail = "x " * (hook.SHOWN_LENGTH // 2 - 5) + CANARY
    run = gallery.run("ab12cd34", 60, title=detail)
    gallery.job(run, "test", "active", 50)
    assert "glpat-" not in gallery.html(f"/runs/{run.id}")


# === HTTP ===


def test_every_page_forbids_scripts_and_knows_its_own_style(full: Gallery) -> None:
    for path in ("/", "/apps/shop", "/runs/none"):
        _, headers, body = full.get(path)
        (style,) = re.findall("(?s)<style>(.*?)</style>", body)
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        policy = headers["Content-Security-Policy"]
        assert policy == (
            f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'"
        )
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert "style=" not in body
        assert '<html lang="en">' in body


@pytest.mark.parametrize(
    "path", ["/apps/none", "/apps/", "/runs/none", "/runs/", f"/runs/{MARKUP[:8]}"]
)
def test_what_is_not_there_is_a_page_with_a_way_home(full: Gallery, path: str) -> None:
    status, headers, body = full.get(path)
    assert status == "404 Not Found"
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "../" in Outline(body).attributes("a", "href")
    assert "<script" not in body


@pytest.mark.parametrize("path", ["/", "/apps/shop", "/runs/none"])
def test_it_is_only_read(full: Gallery, path: str) -> None:
    status, headers, body = full.get(path, "HEAD")
    assert body == ""
    assert int(headers["Content-Length"]) > 1000
    assert status == full.get(path)[0]
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "GET, HEAD", ""):
        status, headers, _ = full.get(path, method)
        assert status == "405 Method Not Allowed"
        assert headers["Allow"] == "GET, HEAD"


# === What it costs ===


def test_twenty_apps_and_a_thousand_runs_are_shown_in_fifty_milliseconds(tmp_path: Path) -> None:
    names = [f"app-{n}" for n in range(20)]
    lines = [
        f"  - {{name: {name}, repository: https://gitlab.example.com/demo/{name}.git, "
        f"build: {{image: registry.example.com/demo/{name}}}}}"
        for name in names
    ]
    gallery = Gallery(tmp_path, "apps:\n" + "\n".join(lines))
    for place, name in enumerate(names):
        records = []
        for number in range(50):
            commit = f"{place:04x}{number:04x}"
            run = gallery.run(commit, 60.0 * (number + 1), name, ref=MAIN)
            detail = "131 passed, 2 failed: tests.test_cart.test_total: assert 3 == 2 " * 3
            entry = hook.RunRecord.of(run)
            ended = {"outcome": "failed", "reason": "TestsFailed", "stage": "test"}
            records.append(hook.replace(entry, **ended, detail=detail, ended=run.received + 30))
            if number < 5:
                gallery.job(run, "test", "failed", 50, 10)
        gallery.context.state.write(gallery.context.apps[name], *records)
        for environment in ("staging", "production"):
            gallery.live(name, environment, [gallery.entry(run, "blue", 100)] * 10)
    seconds: dict[str, float] = {}
    for path in ("/", "/apps/app-7", f"/runs/{run.id}"):
        took = []
        for _ in range(9):
            began = time.thread_time()  # others share the machine
            gallery.html(path)
            took.append(time.thread_time() - began)
        seconds[path] = statistics.median(took)
    print({path: f"{1000 * median:.1f} ms" for path, median in seconds.items()})
    assert "These are the newest 30 of 1000 runs." in gallery.html("/")
    # on a machine that is not slowed down by others; even its own time grows then
    assert max(seconds.values()) < 4 * 0.05
