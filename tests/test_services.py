"""Tests with services, variables and a cache: real Jobs and a real daemon.

The services are programs in side-cars of the test pod, which share its address.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fleet import Fleet, Member, fleet
from tests.standin.images import Images
from tests.world import Object, eventually

LISTENS = """
import os, socket, sys
print("listens on", os.environ["PORT"], flush=True)
with socket.create_server(("", int(os.environ["PORT"]))) as server:
    while True:
        client, _ = server.accept()
        if client.recv(3) == b"die":
            print("the disk is full", flush=True)
            sys.exit(7)
        client.close()
"""
BREAKS = "print('no data folder', flush=True); raise SystemExit(1)"
WAITS = "import time; print('reads its journal', flush=True); time.sleep(600)"
WITHIN = 30.0  # seconds; the stand-in's node is no faster than a real one


def service(name: str, port: int, image: str = "listens:1", **more: object) -> Object:
    """Return the settings of a service."""
    small = {"requests": {"cpu": "10m", "memory": "16Mi"}}
    env = {"PORT": str(port)}
    return {"name": name, "image": image, "port": port, "env": env, "resources": small, **more}


def asks(*ports: int, text: str = "hi!") -> str:
    """Return a test command that sends a text to services, and ends when they have read it."""
    lines = ["import socket", f"for port in {ports}:"]
    lines += ["    with socket.create_connection(('127.0.0.1', port), 10) as c:"]
    lines += [f"        c.sendall(b'{text}')", "        c.recv(1)"]
    newline = "\n"
    return f'python -c "{newline.join(lines)}"'


SECRET = 'test "$PASSWORD" = of-the-secret && test "$MODE" = ci && test "$HTTP_PROXY" = ""'
# counts the runs in the cache, and compares that with what the commit expects
CACHED = 'mkdir -p "$PIP_CACHE_DIR"; echo x >> "$PIP_CACHE_DIR/runs"; '
CACHED += 'test $(wc -l < "$PIP_CACHE_DIR/runs") = $(cat runs)'


def add_programs(images: Images, directory: Path) -> None:
    """Register the services' images."""
    for name, program in (("listens", LISTENS), ("breaks", BREAKS), ("waits", WAITS)):
        source = directory / name
        source.mkdir()
        (source / "main.py").write_text(program)
        images.add(f"{name}:1", source, cmd=[sys.executable, "/main.py"], workdir="/")


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Applications that differ in what their tests have beside them."""
    two = [service("db", 7001), service("queue", 7002)]
    settings: dict[str, Object] = {
        "two": {"test": asks(7001, 7002), "test_settings": {"services": two}},
        "broken": {
            "test": "true",
            "test_settings": {"services": [two[0], service("bad", 7003, "breaks:1")]},
        },
        "late": {
            "test": "true",
            "test_settings": {"services": [service("bad", 7004, "waits:1", start_timeout="3s")]},
        },
        "dying": {
            "test": f"{asks(7001, text='die')}; sleep 2; exit 4",
            "test_settings": {"services": [two[0]]},
        },
        "missing": {
            "test": "true",
            "test_settings": {"services": [service("db", 7005, "registry.example.com/no/such:1")]},
        },
        "secret": {
            "test": SECRET,
            "test_settings": {
                "env": {"MODE": "ci", "HTTP_PROXY": ""},
                "env_from": ["test-secrets"],
            },
        },
        "cached": {"test": CACHED, "test_settings": {"cache": "cache"}},
    }
    directory = tmp_path_factory.mktemp("services")
    proxy = {"HTTP_PROXY": "http://127.0.0.1:9"}
    images = {"hook": "gitops-hook:dev"}
    with fleet(directory, settings, images=images, job_env=proxy) as running:
        add_programs(running.cluster.images, directory)
        objects: list[Object] = [
            {"kind": "Secret", "stringData": {"PASSWORD": "of-the-secret"}},
            {"kind": "PersistentVolumeClaim", "spec": CLAIM},
        ]
        names = ("test-secrets", "cache")
        for item, name in zip(objects, names, strict=True):
            item |= {"apiVersion": "v1", "metadata": {"name": name}}
            done = running.kubectl("create", "-n", "test", "-f", "-", stdin=json.dumps(item))
            assert done.code == 0, done
        yield running


CLAIM = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}


def ends(app: Member, version: str = "v1", **more: Any) -> Object:
    """Deploy a version; return how its run ended."""
    return app.deployed(version, WITHIN, **more)


def logs(apps: Fleet, run: str) -> str:
    """Return what `explain --log` prints of a run."""

    def printed() -> str:
        done = apps.command("explain", run, "--log")
        assert done.returncode == 0, done
        return done.stdout if "bad" in done.stdout.partition("log")[2] else ""

    return str(eventually(printed, 20, "the log is kept"))


def test_tests_that_need_two_services_are_green(apps: Fleet) -> None:
    assert ends(apps["two"])["outcome"] == "deployed"


def test_a_service_that_ends_before_it_listens_is_named_and_its_words_are_kept(
    apps: Fleet,
) -> None:
    ended = ends(apps["broken"])
    assert (ended["outcome"], ended["reason"]) == ("failed", "ServiceFailed")
    text = "service bad does not listen on port 7003; it ended 2 times, last with exit code 1"
    assert ended["detail"].startswith(text)
    assert "no data folder" in logs(apps, ended["run"])


def test_a_service_that_never_listens_ends_the_run_after_its_time(apps: Fleet) -> None:
    ended = ends(apps["late"])
    assert (ended["outcome"], ended["reason"]) == ("failed", "ServiceFailed")
    assert ended["detail"] == "service bad does not listen on port 7004"
    assert "reads its journal" in logs(apps, ended["run"])


def test_a_service_that_dies_during_the_tests_is_named_beside_their_result(apps: Fleet) -> None:
    ended = ends(apps["dying"])
    assert (ended["outcome"], ended["reason"]) == ("failed", "TestsFailed")
    assert ended["detail"] == "exit code 4; service db was restarted once"


def test_the_image_of_a_service_is_judged_like_others(apps: Fleet) -> None:
    ended = apps["missing"].deployed("v1", 60.0)
    assert (ended["outcome"], ended["reason"]) == ("failed", "ImageNotFound")
    assert "container db" in ended["detail"]


def test_tests_get_variables_of_the_settings_and_of_secrets(apps: Fleet) -> None:
    assert ends(apps["secret"])["outcome"] == "deployed"


def test_a_cache_is_kept_and_what_a_test_branch_writes_reaches_no_deploy_branch(
    apps: Fleet,
) -> None:
    cached = apps["cached"]
    for branch, count in (("main", 1), ("topic", 1), ("topic", 2), ("main", 2)):
        ended = ends(cached, f"{branch}-{count}", branch=branch, files={"runs": f"{count}"})
        assert ended["outcome"] == ("deployed" if branch == "main" else "tested"), ended
