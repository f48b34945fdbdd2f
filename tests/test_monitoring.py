"""The alerts ring when they should, and every query asks for metrics that the daemon has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

import gitops_hook as hook
from tests import prose
from tests.installing import EXAMPLE, ROOT, Installed, Object, rendered
from tests.schemas import require_valid

FOLDER = ROOT / "manifests" / "monitoring"
PAGE = (FOLDER / "README.md").read_text("utf-8")
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text("utf-8"))
GRAFANA = {"$__rate_interval": "5m", "$app": "shop"}
# Labels that Prometheus adds to what it scrapes.
SCRAPED = {"up": {"namespace", "job"}}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The example with the component, as a user adds it."""
    folder = tmp_path_factory.mktemp("overlay") / "manifests"
    shutil.copytree(ROOT / "manifests", folder)
    overlay = folder / EXAMPLE.name / "kustomization.yaml"
    kustomization = yaml.safe_load(overlay.read_text("utf-8"))
    kustomization["components"].append("../monitoring")
    overlay.write_text(yaml.safe_dump(kustomization))
    return Installed(rendered(overlay.parent))


def alerts() -> list[Object]:
    """The alerts as they are in the folder."""
    rule = yaml.safe_load((FOLDER / "prometheusrule.yaml").read_text("utf-8"))
    (group,) = rule["spec"]["groups"]
    return list(group["rules"])


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)


# === What is installed ===


def test_the_component_adds_three_objects_to_the_example_and_changes_nothing_else(
    installed: Installed,
) -> None:
    before = rendered(EXAMPLE)
    added = [o for o in installed.objects if o not in before]
    assert len(installed.objects) == len(before) + len(added)
    kinds = {o["kind"]: o["metadata"] for o in added}
    assert set(kinds) == {"ServiceMonitor", "PrometheusRule", "ConfigMap"}
    assert {meta["namespace"] for meta in kinds.values()} == {"orchestration"}
    assert kinds["ConfigMap"]["labels"]["grafana_dashboard"] == "1"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_a_file_holds_the_one_kind_it_is_named_after(path: Path) -> None:
    (document,) = yaml.safe_load_all(path.read_text("utf-8"))
    names = {document["kind"].lower()}
    assert path.stem in names | ({"kustomization"} if names == {"component"} else set())


def test_prometheus_scrapes_the_second_port_of_the_daemon_by_its_service(
    installed: Installed,
) -> None:
    monitor = installed.one("ServiceMonitor", "gitops-hook", "orchestration")["spec"]
    service = installed.one("Service", "gitops-hook", "orchestration")
    wanted = monitor["selector"]["matchLabels"]
    assert wanted.items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["endpoints"]
    ports = {port["name"]: port for port in service["spec"]["ports"]}
    containers = {port["name"]: port for port in installed.container["ports"]}
    assert containers[ports[endpoint["port"]]["targetPort"]]["containerPort"] == 8081


def test_the_policy_that_the_page_shows_opens_the_second_port() -> None:
    (text,) = re.findall(r"(?s)```yaml\n(.*?)```", PAGE)
    policy = yaml.safe_load(text)
    require_valid(policy)
    (rule,) = policy["spec"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 8081}]


# === Queries ===


def queries() -> list[str]:
    """Every query of the dashboard, with values in the place of Grafana's variables."""
    texts = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    for name, value in GRAFANA.items():
        texts = [text.replace(name, value) for text in texts]
    return texts


def declared() -> dict[str, set[str]]:
    """The labels of every series of the daemon, by its name."""
    series = dict(SCRAPED)
    for metric in vars(hook.Metrics()).values():
        if not isinstance(metric, MetricWrapperBase):
            continue
        (family,) = metric.collect()
        labels = {*metric._labelnames}
        if family.type == "histogram":
            series[f"{family.name}_bucket"] = labels | {"le"}
            series |= {f"{family.name}_{part}": labels for part in ("sum", "count")}
        else:
            series[family.name + "_total" * (family.type == "counter")] = labels
    return series


def faults_of(expr: str) -> Iterator[str]:
    """Yield what a query names that the daemon does not have."""
    series = declared()
    bare = re.sub(r'"[^"]*"', '""', expr)
    named = re.findall(r"\b(gitops_hook_\w+|up)\b(?:\{([^}]*)\})?", bare)
    if not named:
        yield "no metric"
    labels: set[str] = set()
    for name, matchers in named:
        own = series.get(name)
        if own is None:
            yield f"no metric {name}"
            continue
        labels |= own
        asked = {*re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)}
        yield from (f"no label {label} of {name}" for label in asked - own)
    grouped = {w for by in re.findall(r"\bby \(([^)]*)\)", bare) for w in by.split(", ")}
    yield from (f"no label {label} to group by" for label in grouped - labels)


@pytest.mark.parametrize("expr", [*queries(), *(alert["expr"] for alert in alerts())])
def test_a_query_asks_for_metrics_and_labels_that_the_daemon_has(expr: str) -> None:
    assert [*faults_of(expr)] == []


@pytest.mark.parametrize(
    "expr",
    [
        "gitops_hook_run_total",
        'gitops_hook_runs_total{result="x"}',
        "sum by (stage, where) (gitops_hook_runs_total)",
        "gitops_hook_stage_seconds",
        "vector(1)",
    ],
)
def test_a_query_that_asks_for_anything_else_would_be_seen(expr: str) -> None:
    assert len([*faults_of(expr)]) == 1


def test_prometheus_takes_every_alert_and_every_query(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    records = [{"record": f"query:{n}", "expr": expr} for n, expr in enumerate(queries())]
    group = {"name": "all", "rules": [*records, *alerts()]}
    rules.write_text(yaml.safe_dump({"groups": [group]}))
    checked = promtool("check", "rules", rules)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(group['rules'])} rules found" in checked.stdout
    rules.write_text(rules.read_text().replace("sum by", "sum bye"))
    assert promtool("check", "rules", rules).returncode != 0


def test_the_dashboard_shows_what_people_ask_for() -> None:
    shown = " ".join(queries())
    for name in declared().keys() - {"up", "gitops_hook_selector_drift_total"}:
        asked_elsewhere = name in {
            "gitops_hook_kubectl_calls_total", "gitops_hook_statuses_total",
            "gitops_hook_catch_up_runs_total",
        }  # fmt: skip
        assert name in shown or asked_elsewhere, name
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    legends = [(t["expr"], t["legendFormat"]) for p in DASHBOARD["panels"] for t in p["targets"]]
    for expr, legend in legends:
        names = set(re.findall(r"\{\{(\w+)\}\}", legend))
        grouped = re.search(r"by \(([^)]*)\)", expr)
        metric = re.search(r"gitops_hook_\w+", expr)
        assert metric
        labels = {*grouped[1].split(", ")} - {"le"} if grouped else declared()[metric[0]]
        assert names <= labels


def test_no_panel_hides_another() -> None:
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(cells) == len({*cells})
    assert max(x for x, _ in cells) < 24


# === Alerts ===


@dataclass(frozen=True)
class Case:
    """When an alert rings: these series, a value a minute, and the labels that it has then."""

    series: dict[str, str]
    minutes: int  # after which it rings, and not a minute before
    labels: dict[str, str] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)  # series with which it never rings


PLACE = '{app="shop",environment="production"}'
SHOP = {"app": "shop", "environment": "production"}
SWITCHES = 'gitops_hook_switches_total{app="shop",environment="production",direction="'
END = '"}'
UP = 'up{namespace="orchestration",job="gitops-hook"}'
CASES = {
    "GitopsHookDown": Case(
        {UP: "1 0x60"},
        6,  # the first one was answered
        silent={UP: "0 0 0 1x60"},
    ),
    "GitopsHookNoLiveEndpoints": Case(
        {f"gitops_hook_live_endpoints{PLACE}": "2 0x60"},
        3,
        SHOP,
        {f"gitops_hook_live_endpoints{PLACE}": "2 0 1x60"},
    ),
    "GitopsHookSwitchedBack": Case(
        {f"{SWITCHES}back{END}": "0 0 1x60"},
        2,
        SHOP,
        {f"{SWITCHES}forward{END}": "0+1x60"},
    ),
    "GitopsHookWaits": Case(
        {'gitops_hook_waiting{what="cluster"}': "0 1x60"},
        11,
        {"what": "cluster"},
        {'gitops_hook_waiting{what="cluster"}': "0 1x8 0x60"},
    ),
    "GitopsHookErrors": Case(
        {'gitops_hook_errors_total{where="worker"}': "0 0 1x60"},
        2,
        {"where": "worker"},
        {'gitops_hook_errors_total{where="worker"}': "3x60"},
    ),
    "GitopsHookSelectorChanged": Case(
        {f"gitops_hook_selector_drift_total{PLACE}": "0 0 1x60"},
        2,
        SHOP,
        {f"gitops_hook_selector_drift_total{PLACE}": "7x60"},
    ),
    "GitopsHookQueueSlow": Case(
        {'gitops_hook_queue_wait_seconds{reason="FreeSlot"}': "0+60x60"},
        31,
        {"reason": "FreeSlot"},
        {'gitops_hook_queue_wait_seconds{reason="FreeSlot"}': "0+60x30 0x30"},
    ),
    "GitopsHookPushesUnannounced": Case(
        {'gitops_hook_catch_up_runs_total{app="shop"}': "0 0 1x60"},
        2,
        {"app": "shop"},
        {'gitops_hook_catch_up_runs_total{app="shop"}': "2x60"},
    ),
    "GitopsHookRollbackNotReady": Case(
        {f"gitops_hook_rollback_ready{PLACE}": "1 0x60"},
        31,
        SHOP,
        {f"gitops_hook_rollback_ready{PLACE}": "1 0x28 1x60"},
    ),
    "GitopsHookReportsFail": Case(
        {'gitops_hook_reports_failed_total{sink="statuses"}': "0+1x60"},
        4,
        {"sink": "statuses"},
        {'gitops_hook_reports_failed_total{sink="statuses"}': "0 1x60"},
    ),
}  # fmt: skip


def ringing(alert: Object, labels: dict[str, str]) -> Object:
    """Return an alert that rings, as promtool expects it."""
    texts = {
        key: re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda m: labels[m[1]], text)
        for key, text in alert["annotations"].items()
    }
    return {"exp_labels": {**labels, **alert["labels"]}, "exp_annotations": texts}


def at(minute: int, name: str, *expected: Object) -> Object:
    return {"eval_time": f"{minute}m", "alertname": name, "exp_alerts": [*expected]}


def written(folder: Path, alert: Object, case: Case) -> Path:
    """Write a test for promtool: silent until the last minute, then ringing; and never ringing."""

    def group(series: dict[str, str], *checks: Object) -> Object:
        values: Any = [{"series": name, "values": text} for name, text in series.items()]
        return {"interval": "1m", "input_series": values, "alert_rule_test": [*checks]}

    name = alert["alert"]
    (folder / "rules.yaml").write_text(
        yaml.safe_dump({"groups": [{"name": "one", "rules": [alert]}]})
    )
    first = at(case.minutes, name, ringing(alert, case.labels))
    tests = [
        group(case.series, *(at(n, name) for n in range(case.minutes)), first),
        group(case.silent, *(at(n, name) for n in range(60))),
    ]
    path = folder / "tests.yaml"
    whole = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests}
    path.write_text(yaml.safe_dump(whole))
    return path


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: str(alert["alert"]))
def test_an_alert_rings_when_it_should_and_not_before(alert: Object, tmp_path: Path) -> None:
    tested = promtool("test", "rules", written(tmp_path, alert, CASES[alert["alert"]]))
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_an_alert_that_does_not_ring_would_be_seen(tmp_path: Path) -> None:
    alert = next(alert for alert in alerts() if alert["alert"] == "GitopsHookNoLiveEndpoints")
    mute = {**alert, "expr": "gitops_hook_live_endpoints < 0"}
    tested = promtool("test", "rules", written(tmp_path, mute, CASES[alert["alert"]]))
    assert tested.returncode == 1
    assert "GitopsHookNoLiveEndpoints" in tested.stdout + tested.stderr


def test_every_alert_has_a_case_and_a_paragraph() -> None:
    names = [alert["alert"] for alert in alerts()]
    assert {*names} == {*CASES}
    assert [title for title in prose.headings(PAGE) if title.startswith("GitopsHook")] == names


def test_the_paragraphs_name_every_sink_and_what_the_daemon_may_wait_for() -> None:
    _, _, text = PAGE.partition("### GitopsHookReportsFail")
    assert {*re.findall(r"`(\w+s)`", text)} == {*hook.SINKS}
    text = PAGE.partition("### GitopsHookWaits")[2].partition("###")[0]
    source = Path(hook.__file__).read_text("utf-8")
    waits = re.findall(r'(?:repeat\(|waiting\.labels\()f?"([\w ]+?)(?: \{\w|[")])', source)
    assert {"cluster", "GitLab", "a step", "intake", "measurements"} <= {*waits}
    assert {re.sub(" of APP", "", w) for w in re.findall(r"`([\w ]+)`", text)} <= {
        re.sub(" of$", "", w) for w in waits
    }


def test_the_page_is_plain() -> None:
    assert not prose.long_sentences(PAGE)
    assert not [line for line in PAGE.splitlines() if len(line) > prose.LONGEST_LINE]
