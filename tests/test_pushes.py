"""Every kind of delivery has one defined answer; names are matched as git and GitLab mean them."""

from __future__ import annotations

import json
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings

import gitops_hook as hook
from tests.deliveries import DATA, HEAD, NAMES, NOW, config, payload, recorded
from tests.fuzz import TARGETS

ZEROS = "0" * 40


def parsed(body: Any, settings: hook.Config | None = None) -> list[hook.Run]:
    """The runs of a delivery."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return hook.parse_delivery(settings or config(), content, delivery="id", received=NOW)


def answer(body: Any, settings: hook.Config | None = None) -> tuple[int, str, str]:
    """Status, reason and sentence for a delivery that is no run."""
    with pytest.raises(hook.DeliveryError) as early:
        parsed(body, settings)
    return early.value.status, early.value.code, str(early.value)


def ignored(body: Any, settings: hook.Config | None = None) -> str:
    """For which reason a delivery asks for nothing."""
    status, reason, text = answer(body, settings)
    assert (status, bool(text)) == (200, True)
    return reason


def refusal(body: Any) -> str:
    """What is wrong with a delivery."""
    status, reason, text = answer(body)
    assert (status, reason) == (400, "Malformed")
    return text


def push(**changes: Any) -> hook.Run:
    (run,) = parsed(payload(**changes))
    return run


# === The kinds of deliveries ===

ANSWERS: dict[str, str] = {
    "gitlab-push-branch": "refs/heads/main",
    "gitlab-push-branch-slash": "refs/heads/feature/add-login/v2",
    "gitlab-push-new-branch": "refs/heads/release-2",
    "gitlab-push-subgroup": "refs/heads/main",
    "gitlab-push-delete-branch": "RefDeleted",
    "gitlab-tag-push": "TagPush",
    "gitlab-tag-delete": "TagPush",
    "gitlab-merge-request-open": "OtherEvent",
}


def test_every_recorded_delivery_has_its_answer_here() -> None:
    assert sorted(ANSWERS) == NAMES
    assert len(NAMES) == len(list(DATA.glob("gitlab-*.headers.json")))


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_delivery_is_a_push_of_a_whole_ref_or_ignored_for_a_reason(name: str) -> None:
    body = recorded(name).body
    if "/" in ANSWERS[name]:
        assert [run.ref for run in parsed(body)] == [ANSWERS[name]]
    else:
        assert ignored(body) == ANSWERS[name]


def test_a_push_tells_its_commit_the_one_before_and_the_title_of_the_head() -> None:
    (run,) = parsed(recorded("gitlab-push-branch").body)
    body = json.loads(recorded("gitlab-push-branch").body)
    assert (run.commit, run.before) == (body["after"], body["before"])
    assert run.title == body["commits"][-1]["title"]
    assert run.by == body["user_username"]
    assert (run.delivery, run.received) == ("id", NOW)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"object_kind": "tag_push", "ref": "refs/tags/v1"}, "TagPush"),
        ({"ref": "refs/tags/v1"}, "TagPush"),  # old samples: header and body disagree
        ({"ref": "refs/merge-requests/1/head"}, "OtherRef"),
        ({"ref": "main"}, "OtherRef"),
        ({"after": ZEROS, "checkout_sha": None}, "RefDeleted"),
        ({"after": "0" * 64}, "RefDeleted"),
        ({"object_kind": "merge_request"}, "OtherEvent"),
        ({"object_kind": "repository_update"}, "OtherEvent"),
        ({"object_kind": "pipeline"}, "OtherEvent"),
        ({"object_kind": None, "event_name": "repository_update"}, "OtherEvent"),
        ({"object_kind": None, "event_name": "project_create"}, "OtherEvent"),
        ({"object_kind": ""}, "OtherEvent"),
    ],
)
def test_what_is_no_push_of_a_branch_is_ignored(changes: dict[str, Any], reason: str) -> None:
    assert ignored(payload(**changes)) == reason


@pytest.mark.parametrize(
    "changes",
    [
        {"commits": []},  # reset to an older commit, system hooks
        {"commits": None, "total_commits_count": None, "ref_protected": None},  # old servers
        {"before": ZEROS, "commits": []},  # a new branch
        {"checkout_sha": None},  # seen with new branches
        {"object_kind": None},  # a system hook has event_name only
        {"user_email": "[REDACTED]", "message": None},  # sent again by hand
        {"repository": None},  # a sample of an empty repository
        {"after": "a" * 64, "before": "b" * 64},  # a repository with SHA-256
    ],
)
def test_fields_that_only_some_pushes_have_are_not_needed(changes: dict[str, Any]) -> None:
    assert push(**changes).ref == "refs/heads/main"


def test_the_head_is_never_taken_from_the_list_of_commits() -> None:
    commits = [{"id": "b" * 40, "message": "newest first, as the Test button has it"}]
    run = push(commits=commits)
    assert (run.commit, run.title) == (HEAD, "")


@pytest.mark.parametrize("key", ["object_kind", "ref", "after", "project"])
def test_a_field_that_is_needed_and_missing_is_named(key: str) -> None:
    changes = {key: None} | ({"event_name": None} if key == "object_kind" else {})
    assert refusal(payload(**changes)) == f"{key}: missing"


@pytest.mark.parametrize("wrong", [0, True, 1.5, [], ["push"], {}, {"a": "b"}], ids=repr)
@pytest.mark.parametrize("key", ["object_kind", "ref", "after"])
def test_a_text_of_another_type_is_refused_and_named(key: str, wrong: Any) -> None:
    assert refusal(payload(**{key: wrong})) == f"{key}: not a str"


@pytest.mark.parametrize("wrong", [0, "text", [], [{}]], ids=repr)
def test_a_project_of_another_type_is_refused(wrong: Any) -> None:
    assert refusal(payload(project=wrong)) == "project: not a dict"


@pytest.mark.parametrize("wrong", [None, 0, "", [], {}, "https://", "nonsense"], ids=repr)
def test_a_project_without_an_address_is_refused(wrong: Any) -> None:
    for project in ({"name": "x", "web_url": wrong}, {"git_http_url": 5, "git_ssh_url": wrong}):
        assert "names no git_http_url" in refusal(payload(project=project))


@pytest.mark.parametrize("key", ["git_http_url", "git_ssh_url", "web_url"])
def test_an_address_that_is_too_long_is_refused_before_it_is_parsed_and_kept(key: str) -> None:
    project = payload()["project"]
    room = hook.ADDRESS_LENGTH - len("https://h/")
    assert push(project=project | {key: "https://h/" + "x" * room}).ref == "refs/heads/main"
    before = urlsplit.cache_info().misses  # type: ignore[attr-defined]
    text = refusal(payload(project=project | {key: "https://h/" + "x" * (room + 1)}))
    assert text == "project: an address is longer than 2048 characters"
    assert urlsplit.cache_info().misses == before  # type: ignore[attr-defined]


def test_a_message_of_megabytes_costs_no_more_than_its_beginning() -> None:
    message = "first line " * 2 + "x y " * 1_000_000
    body = json.dumps(payload(commits=[{"id": HEAD, "message": message}])).encode()
    tracemalloc.start()
    (run,) = parsed(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert run.title.startswith("first line first line x y x y")
    assert len(run.title) == 120
    assert peak < 4 * len(body)


@pytest.mark.parametrize("wrong", [0, "x", [], {}, [[]], [None], [{"id": 5}]], ids=repr)
def test_fields_that_nothing_depends_on_may_have_any_type(wrong: Any) -> None:
    run = push(commits=wrong, before=wrong, repository=wrong)
    assert (run.title, run.before) == ("", "")


@pytest.mark.parametrize(
    ("account", "name", "by"),
    [
        ("lena", "Lena Müller", "lena"),
        (None, "Lena Müller", "Lena Müller"),
        ("", "Lena", "Lena"),
        (["lena"], {"name": "Lena"}, ""),
        ("le\nna\x1b[31m \u202e", "", "le na [31m"),
        ("x" * 5_000_000, "", "x" * 97 + "..."),
    ],
    ids=["account", "no-account", "empty-account", "other-types", "control-codes", "megabytes"],
)
def test_a_push_names_who_pushed_on_one_short_line(account: Any, name: Any, by: str) -> None:
    assert push(user_username=account, user_name=name).by == by


@pytest.mark.parametrize("message", [None, 5, {"a": {}}, "", " \n ", ["x"]], ids=repr)
def test_a_commit_without_a_message_has_no_title(message: Any) -> None:
    assert push(commits=[{"id": HEAD, "message": message}]).title == ""


@pytest.mark.parametrize(
    "after", ["", "HEAD", "a" * 39, "a" * 41, "A" * 40, "g" * 40, " " + "a" * 39]
)
def test_what_is_no_full_commit_id_is_refused(after: str) -> None:
    assert refusal(payload(after=after)) == "after: not a full commit id"


def test_a_line_end_after_a_commit_id_is_refused() -> None:
    assert refusal(payload(after="a" * 40 + "\n")) == "after: not a full commit id"
    assert push(before="a" * 40 + "\n").before == ""


# === Bodies that are no payload ===


@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b"nul", b"\xff\xfe", b"payload=%7B%7D", b"{'a': 1}", b'{"a": 1} x',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'\x00{"a": 1}',
    ],
    ids=lambda b: repr(b[:12]),
)  # fmt: skip
def test_a_body_that_is_no_json_is_refused_briefly(body: bytes) -> None:
    text = refusal(body)
    assert text.startswith("the body is not JSON: ")
    assert len(text) < 120


@pytest.mark.parametrize("body", [b"null", b"5", b'"push"', b"[]", b"NaN", b"1e999"])
def test_json_that_is_no_object_is_refused(body: bytes) -> None:
    assert refusal(body) == "the body is not a JSON object"


@pytest.mark.parametrize("body", [{}, {"oversize": True}, {"text": "a custom template"}])
def test_a_custom_template_without_the_kind_is_refused_with_the_missing_field(body: Any) -> None:
    assert refusal(body) == "object_kind: missing"


def test_of_a_key_that_is_there_twice_the_last_counts() -> None:
    body = json.dumps(payload()).encode()
    twice = b'{"object_kind": 5, ' + body[1:-1] + b', "ref": "refs/tags/v1"}'
    assert ignored(twice) == "TagPush"


def test_big_numbers_and_odd_constants_elsewhere_do_no_harm() -> None:
    body = json.dumps(payload()).encode()
    odd = b'{"a": 123456789012345678901234567890, "b": NaN, "c": -Infinity, "d": 1e400, ' + body[1:]
    assert [run.id for run in parsed(odd)] == [push().id]


# === Branch names ===

GOOD_BRANCHES = [
    "main", "feature/add-login/v2", "feature/JIRA-1_x.y", "Üben", "修正/一", "🚀", "a@b", "a#b",
    "a+b=c", "100%", "a'b\"c", "$(reboot)", "`id`", "a;b|c&d", "<script>", "-x", "@", "a{b}",
    "👩\u200d💻", "e\u0301", "a\u00a0b", "x" * 255, "refs/heads/main", "HEAD", "a.b", "a.lockx",
]  # fmt: skip
BAD_BRANCHES = [
    "", "/a", "a/", "a//b", ".a", "a/.b", "a.", "a..b", "a.lock", "a.lock/b", "a b", "a\tb", "a\nb",
    "a\x00b", "a\x7fb", "a~1", "a^", "a:b", "a?", "a*", "a[b", "a\\b", "a@{1}", ".a\ud800",
]  # fmt: skip
NOT_CARRIED = {  # git allows them
    "line separator": "main\u2028x",
    "paragraph separator": "main\u2029x",
    "next line": "main\x85x",
    "control code": "a\x9bb",
    "no UTF-8": "a\ud800",
    "bytes": "a\udcffb",
    "too long": "x/" * 300 + "x",
}


@pytest.mark.parametrize("branch", GOOD_BRANCHES, ids=ascii)
def test_a_branch_name_that_git_allows_arrives_whole(branch: str) -> None:
    run = push(ref=f"refs/heads/{branch}")
    assert (run.ref, run.branch) == (f"refs/heads/{branch}", branch)
    assert hook.DNS_LABEL.fullmatch(run.id)


@pytest.mark.parametrize("branch", BAD_BRANCHES, ids=ascii)
def test_a_branch_name_that_git_does_not_allow_is_refused(branch: str) -> None:
    assert refusal(payload(ref=f"refs/heads/{branch}")) == "ref: not a branch name that git allows"


def test_what_git_says_about_branch_names_is_what_we_say(tmp_path: Path) -> None:
    checked = [b for b in GOOD_BRANCHES + BAD_BRANCHES if "\x00" not in b and "\ud800" not in b]
    for branch in (*checked, *NOT_CARRIED.values()):
        name = f"refs/heads/{branch}"
        ref = name.encode("utf-8", "surrogatepass" if "\ud800" in name else "surrogateescape")
        done = subprocess.run(["git", "check-ref-format", ref], check=False, cwd=tmp_path)
        carried = branch not in NOT_CARRIED.values()
        assert hook.valid_ref(name) is (done.returncode == 0 and carried), branch
        assert carried or done.returncode == 0, branch


@pytest.mark.parametrize("branch", NOT_CARRIED.values(), ids=NOT_CARRIED)
def test_a_push_of_a_branch_that_is_not_carried_is_ignored(branch: str) -> None:
    assert ignored(payload(ref=f"refs/heads/{branch}")) == "OtherRef"


# === Titles ===


@pytest.mark.parametrize(
    ("message", "title"),
    [
        ("Fix it\n\nlong story", "Fix it"),
        ("\n  Fix\tit \r\nmore", "Fix it"),
        ("x" * 500, "x" * 117 + "..."),
        ("a\x00b\x1b[31m\ud800c", "a b [31m c"),
        ("one\u2028two", "one two"),
    ],
)
def test_a_title_is_one_printable_line(message: str, title: str) -> None:
    assert push(commits=[{"id": HEAD, "message": message}]).title == title


# === Projects ===

SAME = [
    "https://gitlab.example.com/example-group/demo-app.git",
    "https://gitlab.example.com/example-group/demo-app",
    "https://gitlab.example.com/example-group/demo-app/",
    "https://gitlab.example.com/example-group/demo-app.git/",
    "http://gitlab.example.com/example-group/demo-app.git",
    "HTTPS://GitLab.Example.COM/Example-Group/Demo-App.git",
    "https://gitlab.example.com:8443/example-group/demo-app.git",
    "https://user:password@gitlab.example.com/example-group/demo-app.git",
    "git@gitlab.example.com:example-group/demo-app.git",
    "git@gitlab.example.com:/example-group/demo-app.git",
    "other@gitlab.example.com:example-group/demo-app",
    "gitlab.example.com:example-group/demo-app.git",
    "ssh://git@gitlab.example.com/example-group/demo-app.git",
    "ssh://git@gitlab.example.com:2222/example-group/demo-app.git",
    "git+ssh://git@gitlab.example.com/example-group/demo-app.git",
]
OTHERS = [
    "https://gitlab.example.com/example-group/demo-app2.git",
    "https://gitlab.example.com/example-group/demo-app/sub",
    "https://gitlab.example.com/demo-app.git",
    "https://evil.example.com/example-group/demo-app.git",
    "https://gitlab.example.com.evil.com/example-group/demo-app.git",
    "https://gitlab.example.com@evil.com/example-group/demo-app.git",
    "git@evil.com:gitlab.example.com/example-group/demo-app.git",
    "/example-group/demo-app.git",
    "file:///gitlab.example.com/example-group/demo-app.git",
]
NONE = [
    "",
    ":",
    "/",
    "//",
    "https://",
    "https:///x",
    "https://[::1",
    "git@[::1]:a/b",
    "x",
    "git@:p",
]


@pytest.mark.parametrize("url", SAME)
def test_all_addresses_of_one_repository_are_one(url: str) -> None:
    assert hook.normalise_url(url) == "gitlab.example.com/example-group/demo-app"


@pytest.mark.parametrize("url", OTHERS)
def test_the_address_of_another_repository_is_another(url: str) -> None:
    assert hook.normalise_url(url) not in {hook.normalise_url(u) for u in SAME}


def test_what_is_no_address_matches_nothing() -> None:
    for url in NONE:
        assert hook.normalise_url(url) == "", url
        assert "names no git_http_url" in refusal(payload(project={"git_http_url": url}))


def test_a_local_repository_is_its_path_to_the_letter() -> None:
    assert hook.normalise_url("/srv/Git/app.git/") == hook.normalise_url("file:///srv/Git/app")
    assert hook.normalise_url("/srv/Git/app") != hook.normalise_url("/srv/git/app")


# === Runs ===


def test_a_push_is_a_run_of_the_app_whose_repository_it_names() -> None:
    run = push()
    assert (run.app, run.ref, run.commit, run.received) == ("shop", "refs/heads/main", HEAD, NOW)
    assert run.id == hook.run_id("shop", run.ref, run.commit)


def test_a_project_in_a_subgroup_is_found_by_its_whole_path() -> None:
    assert [run.app for run in parsed(recorded("gitlab-push-subgroup").body)] == ["api"]


@pytest.mark.parametrize("key", ["git_http_url", "git_ssh_url", "web_url"])
def test_any_of_the_addresses_in_a_payload_is_enough(key: str) -> None:
    project = json.loads(recorded("gitlab-push-branch").body)["project"]
    assert push(project={key: project[key]}, repository=None).app == "shop"


def test_a_project_that_nobody_configured_is_ignored() -> None:
    body = payload(project={"web_url": "https://gitlab.example.com/else"}, repository=None)
    text = "no app has the repository gitlab.example.com/else"
    assert answer(body) == (200, "UnknownProject", text)


def test_the_sample_of_an_empty_repository_is_a_project_that_nobody_configured() -> None:
    project = {"id": 15, "name": "gitlab", "web_url": "http://test.example.com/gitlab/gitlab"}
    body = payload(project=project, repository=None)
    assert ignored(body | {"after": "da1560886d4f094c3e6c9ef40349f7d38b5d27d7"}) == "UnknownProject"


BRANCHES = """
apps:
  - {name: a, repository: https://git.example.com/x, branch: main, test_branches: ["feature/*"],
     deploy: {environments: []}}
  - {name: b, repository: https://git.example.com/x, branch: live, test_branches: [],
     deploy: {environments: []}}
"""


@pytest.mark.parametrize(
    ("branch", "apps"),
    [
        ("main", ["a"]), ("live", ["b"]), ("feature/a/b", ["a"]), ("feature", []), ("Main", []),
        ("main2", []), ("x/main", []), ("xfeature/a", []), ("refs/heads/main", []),
    ],
)  # fmt: skip
def test_a_branch_is_matched_whole_and_by_case(branch: str, apps: list[str]) -> None:
    body = payload(project={"web_url": "https://git.example.com/x"}, ref=f"refs/heads/{branch}")
    settings = hook.load_config(BRANCHES)
    if apps:
        assert [run.app for run in parsed(body, settings)] == apps
    else:
        assert ignored(body, settings) == "OtherBranch"


def test_the_same_push_is_the_same_run_and_any_other_is_another() -> None:
    a = hook.run_id("shop", "refs/heads/main", HEAD)
    assert a == hook.run_id("shop", "refs/heads/main", HEAD)
    assert a.startswith("shop-da156088-")
    others = {
        hook.run_id("shop", "refs/heads/main2", HEAD),
        hook.run_id("shop", "refs/heads/main", HEAD[:-1] + "0"),
        hook.run_id("shop2", "refs/heads/main", HEAD),
    }
    assert len(others | {a}) == 4
    assert len(f"build-{hook.run_id('a' * 30, 'refs/heads/main', HEAD)}") <= 63


# === Anything else ===


@settings(max_examples=250, deadline=None, database=None)
@given(TARGETS["pushes"].inputs)
def test_no_body_is_more_than_a_push_ignored_or_malformed(body: bytes) -> None:
    TARGETS["pushes"].run(body)


@settings(max_examples=250, deadline=None, database=None)
@given(TARGETS["urls"].inputs)
def test_no_text_is_more_than_an_address_or_none(text: bytes) -> None:
    TARGETS["urls"].run(text)
