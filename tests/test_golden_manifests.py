"""What rendering makes of whole manifests folders, compared with what was written down before.

`python -m tests.test_golden_manifests` writes that anew. The folders are like those of real
repositories; settings.yaml of each says what is special about it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml

from gitops_hook import (
    App,
    HealthCheck,
    Placement,
    StageError,
    image_remarks,
    read_manifests,
    render,
)
from tests.test_app_manifests import RUN, Object, app_of, checked_objects
from tests.test_fields import differences, entries

DATA = Path(__file__).resolve().parent / "data" / "manifests"
FOLDERS = sorted(path.name for path in DATA.iterdir())
IMAGE = "registry.example.com/team/shop"
BUILT = f"{IMAGE}@sha256:{'0f' * 32}"


def app_in(folder: Path) -> App:
    """The app, with the settings that a folder needs."""
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    return app_of(**{"build": {"image": IMAGE}, **settings})


def rendering(app: App, checkout: Path, environment: str) -> Object:
    """What becomes of a checkout in an environment: why it is refused, or the objects."""
    path = app.deploy.manifests.replace("{environment}", environment)
    try:
        manifests = read_manifests(checkout, path)
        checked = checked_objects(app, environment, manifests, environment)
        release = render(app, RUN, BUILT, Placement("blue", 0), checked)
    except StageError as refused:
        return {"refused": refused.detail}
    remarks = [*image_remarks(app, checked)]
    rendered = [release.deployment, release.service, *release.configmaps]
    beside = release.companions_for(app.name)
    written = [checked.deployment, checked.service, *checked.configmaps.values()]
    pairs = zip(written, rendered, strict=True)
    lost = [d for one, other in pairs for d in differences(one, other, one["kind"])]
    assert [path for path in lost if not entries(path)] == [], "the table of the README says so"
    checks = release.checks(app.deploy.health)
    health = {"pods": asked(checks.pods), "Service": asked(checks.service)}
    answer = {"health": health, "ignored": checked.ignored, "plan": remarks, "objects": rendered}
    return {**answer, **({"beside": beside} if beside else {})}


def asked(check: HealthCheck) -> str:
    """What health is asked by."""
    address = f"port {check.port}"
    return f"{check.scheme} {check.path} at {address}" if check.path else f"connection to {address}"


def golden(folder: Path) -> str:
    """What becomes of a folder in each environment, as it is written down."""
    app = app_in(folder)
    environments = {}
    for environment in app.deploy.environments:
        with tempfile.TemporaryDirectory() as checkout:
            shutil.copytree(folder, checkout, dirs_exist_ok=True)
            environments[environment] = rendering(app, Path(checkout), environment)
    return json.dumps(environments, indent=1, sort_keys=True) + "\n"


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_becomes_what_was_written_down(name: str) -> None:
    assert golden(DATA / name) == (DATA / name / "golden.json").read_text()


def test_of_grpc_alone_readiness_decides_and_nothing_is_asked_by_http() -> None:
    for rendered in json.loads(golden(DATA / "case-09")).values():
        (web,) = rendered["objects"][0]["spec"]["template"]["spec"]["containers"]
        assert web["readinessProbe"] == {"grpc": {"port": 8080}}
        assert rendered["health"] == {
            "pods": "connection to port 8080",
            "Service": "connection to port 50051",
        }


if __name__ == "__main__":
    for name in FOLDERS:
        (DATA / name / "golden.json").write_text(golden(DATA / name))
