"""Pushes in a burst, beside one kubectl a push; the daemon's start, memory and idling."""

from __future__ import annotations

import json
import os
import statistics
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path

import yaml

import gitops_hook as hook
from tests.bench.clients import SENDERS, send, serve_like_the_article
from tests.bench.observing import Recorder, Row, percentile, timed
from tests.deliveries import payload
from tests.fleet import Fleet
from tests.standin.kubectl import Kubectl
from tests.world import TOKEN, Object, eventually

PUSHES, MANY = 100, 1000
SPAWN = get_context("spawn")


@contextmanager
def article(world: Fleet, kubectl: Kubectl) -> Iterator[int]:
    """Yield the port of the baseline's server while its process lives."""
    ours, theirs = SPAWN.Pipe()
    config = yaml.safe_dump(world.config)
    args = (theirs, config, kubectl.command(), kubectl.environment)
    process = SPAWN.Process(target=serve_like_the_article, args=args, daemon=True)
    process.start()
    try:
        assert ours.poll(30), "the server of the baseline does not start"
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def deliveries(world: Fleet, name: str, count: int) -> list[bytes]:
    """Return signed pushes to as many test branches, as they go over the wire."""
    made, key = [], hook.decode_signing_token(TOKEN, 1)
    for number in range(count):
        project = {"git_http_url": str(world["shop"].repository.bare)}
        fields = {"ref": f"refs/heads/{name}-{number}", "after": uuid.uuid4().hex + "0" * 8}
        body = json.dumps(payload(**fields, project=project, repository=None)).encode()
        ident, stamp = str(uuid.uuid4()), str(int(time.time()))
        signature = hook.sign(key, ident.encode(), stamp.encode(), body).decode()
        lines = ["POST /webhook HTTP/1.1", "Host: hook", "Connection: close"]
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        lines += [f"webhook-id: {ident}", f"webhook-timestamp: {stamp}"]
        made.append(
            "\r\n".join([*lines, f"webhook-signature: {signature}\r\n\r\n"]).encode() + body
        )
    return made


def burst(world: Fleet, clients: Pool, port: int, name: str, count: int) -> Object:
    """Send pushes at once; seconds to the acks, and from the first push to the last Job."""
    requests = deliveries(world, name, count)
    with Recorder(world, "jobs") as recorder:
        answers = clients.apply(send, (port, requests))
        assert {status for *_, status in answers} == {202}, {status for *_, status in answers}
        began, wanted = min(at for at, *_ in answers), f"refs/heads/{name}-"

        def created() -> list[float]:
            mine = {}
            for at, kind, job in list(recorder.seen):
                notes = job["metadata"].get("annotations") or {}
                if kind == "ADDED" and notes.get("gitops-hook/ref", "").startswith(wanted):
                    mine.setdefault(job["metadata"]["name"], at)
            return [*mine.values()] if len(mine) == count else []

        jobs = max(eventually(created, 180, f"{count} Jobs exist")) - began
    acks = [took for _, took, _ in answers]
    return {"p50": percentile(acks, 0.5), "p99": percentile(acks, 0.99), "jobs": jobs}


def rate(world: Fleet, clients: Pool, port: int, name: str, count: int) -> float:
    """Send pushes for ten seconds; return how many were accepted a second."""
    answers = clients.apply(send, (port, deliveries(world, name, count), 10.0))
    refused = sum(status != 202 for *_, status in answers)
    assert not refused, f"{refused} of {len(answers)} pushes were refused"
    return len(answers) / (max(at + took for at, took, _ in answers) - min(a for a, *_ in answers))


def clear_jobs(world: Fleet) -> None:
    """Take every Job out of the cluster, and what is recorded of its run: nothing was lost."""
    for name in world.jobs():
        world.cluster.store.remove("jobs", "test", name)
    world.cluster.store.remove("configmaps", "orchestration", "gitops-hook-shop")


def fsync(file: Path) -> None:
    """Write something durably."""
    with file.open("wb") as opened:
        opened.write(b"x" * 2000)
        opened.flush()
        os.fsync(opened.fileno())


def floors(world: Fleet, kubectl: Kubectl) -> Object:
    """Return what one fsync and one kubectl call for all Jobs take."""
    config = hook.load_config(yaml.safe_dump(world.config))
    jobs = []
    for number in range(PUSHES):
        run = hook.Run(id=f"shop-floor-{number}", app="shop", ref=f"f{number}", commit="f" * 40)
        jobs.append(hook.test_job(config, config.apps[0], run))
    stdin = json.dumps({"apiVersion": "v1", "kind": "List", "items": jobs})
    kubectl.run("get", "jobs", "-n", "test")  # which also fills its cache
    call = ("create", "-n", "test", "-f", "-", "--validate=false")
    create = timed(lambda: kubectl.run(*call, stdin=stdin))
    assert len(world.jobs()) == PUSHES
    clear_jobs(world)
    disk = [timed(lambda: fsync(world.spool / "floor.tmp")) for _ in range(50)]
    return {"ack": statistics.median(disk), "jobs": create}


def measure_pushes(world: Fleet, clients: Pool, rounds: int) -> Iterator[Row]:
    """Pushes in a burst, here and with one kubectl a push."""
    world.stop()
    kubectl = Kubectl(world.directory, world.cluster.kubeconfig("orchestration/orchestration-sa"))
    floor, theirs = floors(world, kubectl), []
    for number in range(rounds):
        with article(world, kubectl) as port:
            theirs.append(burst(world, clients, port, f"article{number}", PUSHES))
        clear_jobs(world)
    world.start()
    port = int(world.url.rpartition(":")[2])
    ours = [burst(world, clients, port, f"ours{number}", PUSHES) for number in range(rounds)]
    here = {key: statistics.median(one[key] for one in ours) for key in ours[0]}
    there = {key: statistics.median(one[key] for one in theirs) for key in theirs[0]}
    name = f"{PUSHES} pushes, {SENDERS} senders: "
    yield Row(name + "ack p50", here["p50"], "s", None, there["p50"], floor["ack"])
    yield Row(name + "ack p99, stored", here["p99"], "s", 0.05, there["p99"], floor["ack"])
    yield Row(name + "all Jobs exist", here["jobs"], "s", 1.5, there["jobs"], floor["jobs"])
    clear_jobs(world)


# The daemon's process.


def rss(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024 / 1e6


def cpu(pid: int) -> float:
    """Return the seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle_share(pid: int, seconds: float) -> float:
    """Return the share of a core in percent that a process uses while nothing happens."""
    before = cpu(pid)
    time.sleep(seconds)  # the measurement itself
    return 100 * (cpu(pid) - before) / seconds


def measure_process(world: Fleet, clients: Pool) -> Iterator[Row]:
    """Start, memory, idling, and many runs."""
    world.stop()
    kubectl = Kubectl(world.directory, world.cluster.kubeconfig("orchestration/orchestration-sa"))
    with article(world, kubectl) as port:
        theirs = rate(world, clients, port, "theirs", 3000)
    clear_jobs(world)
    began = time.time()
    world.start()
    stamp = world.said("serving")[-1]["ts"]
    started = hook.epoch(stamp) - began
    yield Row("start to ready", started, "s", 1.0)
    assert world.process is not None
    pid = world.process.pid
    yield Row("idle CPU, 0 runs", idle_share(pid, 60.0), "% of a core", 1.0)
    yield Row("memory, 0 runs", rss(pid), "MB", 60.0)
    port = int(world.url.rpartition(":")[2])
    many = burst(world, clients, port, "many", MANY)
    yield Row(f"{MANY} pushes: all Jobs exist", many["jobs"], "s", 10.0)
    time.sleep(3.0)  # let the daemon see them all
    yield Row(f"memory, {MANY} runs", rss(pid), "MB", 80.0)
    yield Row(f"idle CPU, {MANY} runs", idle_share(pid, 20.0), "% of a core")
    world.cluster.down()  # so that storing alone is measured; the baseline needs the cluster
    stored = rate(world, clients, port, "outage", 15_000)
    yield Row("pushes a second for 10 s", stored, "pushes/s", None, theirs, higher_is_better=True)
