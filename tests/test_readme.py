"""The README tells what the program does: its tables are compared with the code.

`python -m tests.test_readme` writes the tables anew.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

import gitops_hook
from tests import prose
from tests.deliveries import Receiver
from tests.settings import settings_by_path
from tests.test_app_manifests import checked_objects
from tests.test_fields import SET_FIELDS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MAX_LINES = 550
# What a reader meets in `status`, in logs and in metrics.
WORDS = {
    *("app", "run", "stage", "environment", "colour"),
    *("live version", "release", "claim", "bake", "outcome", "head", "rejected"),
}


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def settings() -> str:
    rows = [
        (f"`{path}`", f"`{setting.default}`" if setting.default else "required", setting.meaning)
        for path, setting in settings_by_path().items()
    ]
    return table(("setting", "default", "meaning"), rows)


def process() -> str:
    settings = gitops_hook.settings_of(gitops_hook.Process).items()
    named = [f"`GITOPS_HOOK_{key.upper()}` (`{setting.default}`)" for key, setting in settings]
    return ", ".join(named) + "."


def metrics() -> str:
    rows = []
    for metric in vars(gitops_hook.Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.collect()
            name = family.name.removeprefix("gitops_hook_")
            name += "_total" * (family.type == "counter")
            labels = ", ".join(f"`{label}`" for label in metric._labelnames)
            rows.append((f"`{name}`", labels, family.documentation))
    return table(("metric", "labels", "meaning"), rows)


def reasons() -> str:
    kinds = {
        "Verdicts": gitops_hook.VERDICTS,
        "Circumstances": gitops_hook.PASSING_CIRCUMSTANCES,
        "Circumstances after which nothing is tried again": gitops_hook.FINAL_CIRCUMSTANCES,
    }
    named = {kind: ", ".join(f"`{r}`" for r in table) for kind, table in kinds.items()}
    return "\n".join(f"- {kind}: {names}." for kind, names in named.items())


def fields() -> str:
    rows = [(f"`{field}`", words) for field, words in SET_FIELDS.items()]
    return table(("field", "what it becomes"), rows)


TABLES = {
    "reasons": reasons,
    "settings": settings,
    "process": process,
    "metrics": metrics,
    "fields": fields,
}


def block(name: str) -> re.Pattern[str]:
    """What stands between the marks of a generated part."""
    return re.compile(rf"(?s)(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)")


def rewrite() -> None:
    """Write the generated tables into the README."""
    text = README.read_text()
    for name, generate in TABLES.items():
        new = generate() + "\n"
        text = block(name).sub(lambda _, new=new: new, text)
    README.write_text(text)


def written(readme: str) -> str:
    """Return what people wrote of a README: all but the generated parts."""
    for name in TABLES:
        readme = block(name).sub("", readme)
    return readme


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text()


def test_it_can_be_read_in_one_go(readme: str) -> None:
    assert len(readme.splitlines()) <= MAX_LINES


def test_its_only_picture_is_of_the_page(readme: str) -> None:
    assert not re.search("[\U0001f000-\U0001ffff\u2600-\u27bf]", readme)
    assert re.findall(r"!\[.*?\]\((.*?)\)", readme) == ["docs/page.png"]
    assert readme.count("![") == 1


def test_its_lines_fit_into_a_window(readme: str) -> None:
    lines = written(readme).splitlines()
    assert not [line for line in lines if len(line) > prose.LONGEST_LINE]


def test_its_sentences_are_short(readme: str) -> None:
    assert len(list(prose.sentences(written(readme)))) > 100
    assert not prose.long_sentences(written(readme))


def test_its_contents_list_every_heading(readme: str) -> None:
    contents, first, _ = readme.partition("\n## ")
    assert first
    listed = re.findall(r"\[([^]]+)\]\(#([\w-]+)\)", contents)
    assert listed == [(title, prose.anchor(title)) for title in prose.headings(readme)]


def test_its_example_of_a_repository_is_deployed_as_it_says(readme: str, tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    files = {m[1]: b for b in blocks if (m := re.match(r"# (deploy/\S+)\n", b))}
    (settings,) = [block for block in blocks if block.startswith("apps:\n")]
    for name, text in files.items():
        for path in (name, name.replace("/production/", "/staging/")):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
    (app,) = gitops_hook.load_config(settings).apps
    run = gitops_hook.Run(
        id="shop-1a2b3c4d-5e6f", app="shop", ref="refs/heads/main", commit="1" * 40
    )
    for environment in app.deploy.environments:
        manifests = gitops_hook.read_manifests(tmp_path, app.deploy.folder(environment))
        checked = checked_objects(app, environment, manifests, environment)
        release = gitops_hook.render(
            app, run, "x@sha256:" + "0" * 64, gitops_hook.Placement("blue", 1), checked
        )
        assert release.wanted == 4
        assert release.configmaps[0]["data"] == {"PUBLIC_HOST": "shop.example.com"}


def test_its_examples_of_tests_are_settings(readme: str) -> None:
    blocks = re.findall(r"```yaml\n(test:.*?)```", readme, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        test = yaml.safe_load(block)["test"]
        app = {
            "name": "shop",
            "repository": "/shop.git",
            "build": {"builder": "none"},
            "test": test,
        }
        config = gitops_hook.load_config(yaml.safe_dump({"apps": [app]}))
        assert [*gitops_hook.quota_warnings(config)] == []


def test_its_links_lead_to_headings(readme: str) -> None:
    anchors = {prose.anchor(title) for title in prose.headings(readme)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", readme)) <= anchors


def test_its_words_are_explained_before_their_first_use(readme: str) -> None:
    before, _, after = readme.partition("## Words\n| word | meaning |\n")
    rows = after.partition("\n\n")[0]
    assert set(re.findall(r"(?m)^\| ([a-z ]+) \| \S", rows)) == WORDS
    assert not [word for word in WORDS if re.search(rf"\b{word}s?\b", before, re.IGNORECASE)]


@pytest.mark.parametrize("name", TABLES)
def test_its_tables_are_those_of_the_code(readme: str, name: str) -> None:
    (part,) = block(name).findall(readme)
    assert part == TABLES[name]() + "\n", "python -m tests.test_readme writes them anew"


def test_it_names_every_command_and_option(readme: str) -> None:
    (rows,) = re.findall(r"(?s)\| command \| does \|\n(.*?)\n\n", readme)
    commands = gitops_hook.parser()._subparsers._group_actions[0].choices
    named = re.findall(r"(?m)^\| `([^|]*)` \|", rows)
    assert {word for cell in named for word in re.findall(r"^\w+|(?<=`)\w+", cell)} == {*commands}
    for name, command in commands.items():
        options = {o for a in command._actions for o in a.option_strings if o[:2] == "--"}
        (cell,) = [cell for cell in named if re.search(rf"\b{name}\b", cell)]
        assert set(re.findall(r"--\w+", cell)) == options - {"--help"}


def test_it_names_every_outcome(readme: str) -> None:
    assert all(f"`{outcome}`" in readme for outcome in gitops_hook.Outcome)


def test_its_reasons_are_those_of_the_program(readme: str) -> None:
    (rows,) = re.findall(r"(?s)\| what you see \|.*?\n\n", readme)
    named = re.findall(r"`(?:failed )?([A-Z][a-z]+[A-Z][A-Za-z]+)`", rows)
    assert len(named) >= 5
    assert {*named} <= {*gitops_hook.Reason, "NotAuthentic"}


def test_its_log_lines_are_those_of_the_program(readme: str) -> None:
    source = (ROOT / "gitops_hook.py").read_text()
    named = re.findall(r"[Ll]og `([a-z -]+)`|(?<=, )`([a-z ]+ [a-z ]+)`", readme)
    messages = {first or second for first, second in named}
    assert len(messages) >= 4
    said = r"(info|warn|error|say|repeat)\)?\([^)]*"
    assert not {m for m in messages if not re.search(f'{said}"{m}"', source)}


def test_its_metrics_in_prose_exist(readme: str) -> None:
    text = block("metrics").sub("", readme)
    named = set(re.findall(r"`(\w+?)(?:\{.*?\})?`", text)) & set(re.findall(r"\w+_\w+", text))
    names = re.findall(r"(?m)^\| `(\w+)`", metrics())
    assert {n for n in named if n.endswith(("_total", "_files", "_seconds"))} <= {*names}


def test_its_make_targets_exist(readme: str) -> None:
    targets = re.findall(r"(?m)^([a-z]+):.*## ", (ROOT / "Makefile").read_text())
    named = re.findall(r"`make ([a-z]+)", readme)
    assert {"demo", "test", "kind", "image", "apply", "delete", "check"} <= {*named} <= {*targets}


def named_word(match: re.Match[str]) -> str:
    """The last words of a route, as the README writes them: apps/APP for apps/*."""
    return f"{match[1]}s/{match[1].upper()}"


def test_its_routes_are_those_of_the_program(readme: str, tmp_path: Path) -> None:
    (rows,) = re.findall(r"(?s)\| route \| answers \|\n(.*?)\n\n", readme)
    named = {route: methods for methods, route in re.findall(r"(?m)^\| `(\w+) (/\S*)`", rows)}
    app = Receiver(tmp_path).app
    routes = {**app.routes, **app.admin().routes}
    ours = {re.sub("(app|run)s/[*]$", named_word, path): r for path, r in routes.items()}
    assert named == {path: route.methods.split(", ")[0] for path, route in ours.items()}


def test_its_files_exist(readme: str) -> None:
    files = re.findall(r"\]\(([\w./]+)\)|`((?:manifests|tests)/[\w./]+)`", readme)
    assert len(files) >= 4
    assert all((ROOT / (linked or named)).exists() for linked, named in files)


if __name__ == "__main__":
    rewrite()
