"""kubectl as the program calls it: the real one on the stand-in cluster, and its recorded words."""

from __future__ import annotations

import errno
import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gitops_hook import (
    PAGE_SIZE,
    ConfigError,
    Finished,
    Kubectl,
    KubectlError,
    Metrics,
    UrgentKubectl,
    confined,
    list_address,
    run_program,
)
from tests.memory import peak_of
from tests.standin.cluster import Cluster
from tests.standin.faults import Fault
from tests.standin.kubectl import find_kubectl

Object = dict[str, Any]
SPACE = "production"
DATA = Path(__file__).with_name("data") / "transcripts.jsonl"
RECORDED = {e["note"]: e for e in map(json.loads, DATA.read_text().splitlines())}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("kubectl")
    with Cluster(home / "cluster") as running, pytest.MonkeyPatch.context() as patch:
        running.load({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SPACE}})
        patch.setenv("KUBECONFIG", str(running.kubeconfig()))
        patch.setenv("HOME", str(home))
        yield running


@pytest.fixture
def kubectl(cluster: Cluster) -> Iterator[Kubectl]:
    yield Kubectl(Metrics(), program=find_kubectl())
    cluster.faults.clear()


def configmap(name: str, **data: str) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def names(kubectl: Kubectl, *filters: str) -> set[str]:
    return {o["metadata"]["name"] for o in kubectl.list("configmaps", SPACE, *filters)}


def script(directory: Path, body: str) -> str:
    """A program that takes kubectl's place."""
    program = directory / "program"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    return str(program)


def saying(directory: Path, code: int, stdout: str = "", stderr: str = "") -> Kubectl:
    """kubectl that prints this and ends so."""
    for name, text in (("out", stdout), ("err", stderr)):
        (directory / name).write_text(text)
    body = f"cat > {directory}/in; cat {directory}/out; cat {directory}/err >&2; exit {code}"
    return Kubectl(Metrics(), program=script(directory, body))


# === What kubectl's words mean ===


@pytest.mark.parametrize(
    ("note", "kind"),
    [
        ("job-exists: create again", "AlreadyExists"),
        ("create the copy again", "AlreadyExists"),
        ("patch with a stale resourceVersion: conflict", "Conflict"),
        ("cut over with a resourceVersion that an annotation moved", "Conflict"),
        ("patch: no such service", "NotFound"),
        ("release two in one call, one missing", "NotFound"),
        ("as the article's account: get a job", "Forbidden"),
        ("as the article's account: apply a new deployment", "Forbidden"),
        ("unknown field, strict by default", "BadRequest"),
        ("invalid name", "Invalid"),
        ("immutable selector changed", "Invalid"),
        ("change an immutable copy", "Invalid"),
        ("a copy with the same nodePort", "Invalid"),
        ("json patch whose test fails", "Invalid"),
        ("API server down: connection refused", "Unreachable"),
        ("bad token", "Unreachable"),
        ("the article's command line", "Unknown"),
        ("rollout status, times out", "Unknown"),
    ],
)
def test_a_recorded_failure_has_its_kind(tmp_path: Path, note: str, kind: str) -> None:
    entry = RECORDED[note]
    stdout = entry.get("stdout", "")
    kubectl = saying(tmp_path, entry["exit"], stdout, entry["stderr"])
    with pytest.raises(KubectlError) as failed:
        kubectl.run("get", "jobs")
    assert (failed.value.kind, failed.value.stdout) == (kind, stdout)
    assert kubectl.metrics.kubectl.labels("get", kind)._value.get() == 1


def test_a_call_that_went_well_is_counted_by_its_verb(kubectl: Kubectl) -> None:
    kubectl.list("configmaps", SPACE)
    assert kubectl.metrics.kubectl.labels("get", "ok")._value.get() == 1


def test_nobody_listening_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    kubectl = Kubectl(Metrics(), program=find_kubectl())
    with pytest.raises(KubectlError) as failed:
        kubectl.run("get", "jobs", "--server=https://127.0.0.1:1")
    assert failed.value.kind == "Unreachable"


def test_a_server_that_accepts_and_says_nothing_is_unreachable_in_time(
    kubectl: Kubectl, cluster: Cluster
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        server = f"--server=https://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(KubectlError) as failed:
            kubectl.run("get", "configmaps", server, namespace=SPACE, timeout=2.0)
    assert failed.value.kind == "Unreachable"
    assert time.monotonic() - began < 10


def test_a_missing_kubectl_is_a_configuration_error(tmp_path: Path) -> None:
    kubectl = Kubectl(Metrics(), program=str(tmp_path / "kubectl"))
    for call in (lambda: kubectl.run("version"), lambda: kubectl.stream("get", namespace=SPACE)):
        with pytest.raises(ConfigError, match="kubectl cannot be started: No such file"):
            call()


def test_a_kubectl_beside_the_interpreter_is_used_where_the_path_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("venv", "path"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    kubectl = Kubectl(Metrics())
    with pytest.raises(ConfigError, match="kubectl cannot be started: No such file"):
        kubectl.run("version")
    for folder in ("venv", "path"):  # once there is one, the one on the PATH counts
        program = Path(script(tmp_path / folder, f'echo "{folder}: $*"'))
        program.rename(program.with_name("kubectl"))
        assert kubectl.run("get", "pods", namespace=SPACE) == f"{folder}: -n {SPACE} get pods\n"
        streamed, _ = kubectl.stream("get", "pods", namespace=SPACE).communicate()
        assert streamed == f"{folder}: -n {SPACE} get pods\n".encode()


# === Processes ===


def test_a_call_that_does_not_end_is_ended_with_everything_it_started(tmp_path: Path) -> None:
    body = f"sleep 600 & echo $! > {tmp_path}/pid; echo early; echo late >&2; wait"
    program = script(tmp_path, body)
    began = time.monotonic()
    with pytest.raises(KubectlError) as failed:
        Kubectl(Metrics(), program=program).run("get", "jobs", timeout=1.0)
    assert time.monotonic() - began < 10
    assert (failed.value.code, failed.value.kind) == (None, "Unreachable")
    assert (failed.value.stdout, failed.value.stderr) == ("early\n", "late\n")
    helper = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    until = time.monotonic() + 10
    while helper.exists() and helper.read_text().split()[2] != "Z":
        assert time.monotonic() < until, "the helper goes on"
        time.sleep(0.02)


def test_input_that_nobody_reads_does_no_harm() -> None:
    assert run_program(("true",), 10.0, stdin="x" * 1_000_000).code == 0


def test_output_that_is_not_utf8_is_still_text(tmp_path: Path) -> None:
    program = script(tmp_path, r"printf '\377 out'; printf '\377 err' >&2")
    assert run_program((program,), 10.0) == Finished(0, b"\377 out", b"\377 err")
    assert Kubectl(Metrics(), program=program).run("get") == "\ufffd out"


def test_what_ends_a_line_elsewhere_is_left_as_it_is(tmp_path: Path) -> None:
    program = script(tmp_path, r"printf 'a\rb\r\nc\342\200\250d\n'")
    assert Kubectl(Metrics(), program=program).run("get") == "a\rb\r\nc\u2028d\n"


@pytest.mark.cluster
@pytest.mark.parametrize("pipe", ["", ">&2"], ids=["stdout", "stderr"])
def test_300_megabytes_of_output_are_an_error_in_little_memory(tmp_path: Path, pipe: str) -> None:
    program = script(tmp_path, f"head -c 300000000 /dev/zero {pipe}; exit 1")
    said, peak = peak_of(
        """
import sys
try:
    gitops_hook.Kubectl(gitops_hook.Metrics(), program=sys.argv[1]).run("get", "jobs")
except gitops_hook.KubectlError as failed:
    print(failed.kind, len(failed.stdout), len(failed.stderr) <= 2**20, failed.said[:32])
""",
        program,
    )
    complaint = "it printed more than 16384 KiB" if not pipe else "exit status 1"
    assert said == f"Unknown 0 True {complaint}\n"
    assert peak < 150


LARGE_PAGES = """
import json, sys
words = sys.argv[-1].partition("?")[2].split("&")
query = dict(word.partition("=")[::2] for word in words)
first, limit = int(query["continue"] or 0), int(query["limit"])
padding = [{"name": f"V{n}", "value": "x"} for n in range(4000)]
last = min(first + limit, 300)
more = {"continue": str(last)} if last < 300 else {}
kind = {"kind": "PodList", "apiVersion": "v1", "metadata": {"resourceVersion": "1", **more}}
print(json.dumps(kind)[:-1] + ', "items": [', end="")
for number in range(first, last):
    meta = {"name": f"pod-{number}", "resourceVersion": "1", "annotations": {"words": "x" * 20000}}
    spec = {"containers": [{"name": "web", "env": padding}]}
    comma = "," if number > first else ""
    print(comma + json.dumps({"metadata": meta, "spec": spec, "status": {}}), end="")
print("]}")
"""


@pytest.mark.cluster
def test_many_pods_with_large_templates_are_listed_in_little_memory(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(LARGE_PAGES)
    program = script(tmp_path, f'exec {sys.executable} -S {tmp_path / "server.py"} "$@"')
    said, peak = peak_of(
        """
import sys
kubectl = gitops_hook.Kubectl(gitops_hook.Metrics(), program=sys.argv[1])
pods = kubectl.list("pods", "production", "-l", "app=shop")
print(len({pod["metadata"]["name"] for pod in pods}), pods[0]["spec"], pods[0]["kind"])
""",
        program,
    )
    spec = {"containers": [{"name": "web"}], "initContainers": []}
    assert said == f"300 {spec} Pod\n"
    assert peak < 250, "and 40 MB of text in all"


def test_a_list_of_more_than_one_call_may_print_is_an_error(
    cluster: Cluster, kubectl: Kubectl
) -> None:
    for number in range(20):
        meta = {"name": f"wide-{number}", "namespace": SPACE, "labels": {"app": "wide"}}
        data = {"a": "x" * 900_000}
        cluster.load({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data})
    why = r"the configmaps of [a-z]+ are more than 16384 KiB"
    with pytest.raises(KubectlError, match=why):
        kubectl.list("configmaps", SPACE, "-l", "app=wide")
    for number in range(20):  # other tests list all that is there
        cluster.store.remove("configmaps", SPACE, f"wide-{number}")


def test_objects_too_large_for_a_page_of_a_hundred_are_listed_all(
    cluster: Cluster, kubectl: Kubectl
) -> None:
    meta = {"labels": {"app": "swollen"}, "annotations": {"words": "x" * 200_000}}
    for number in range(70):
        named = {**meta, "name": f"swollen-{number}", "namespace": SPACE}
        spec = {"ports": [{"port": 80}]}
        cluster.load({"apiVersion": "v1", "kind": "Service", "metadata": named, "spec": spec})
    address = list_address("services", SPACE, "app=swollen")
    sizes = [len(page["items"]) for page in kubectl.pages(address, SPACE)]
    assert (sum(sizes), max(sizes) < 25) == (70, True)


def test_output_that_never_ends_is_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(KubectlError, match="it printed more than 16384 KiB"):
        Kubectl(Metrics(), program=script(tmp_path, "exec yes")).run("get", timeout=60)
    assert time.monotonic() - began < 30


def test_a_program_that_needs_too_much_memory_fails(tmp_path: Path) -> None:
    body = f"exec {sys.executable} -c 'bytearray(400_000_000)'"
    with pytest.raises(KubectlError, match="MemoryError"):
        Kubectl(Metrics(), program=script(tmp_path, body)).run("get")


def confined_python(script: str, *readable: Path) -> str:
    """What a script prints to which network and files are closed."""
    beside = (Path(sys.base_prefix), Path(sys.prefix), *readable)
    argv = (sys.executable, "-S", "-c", script)
    finished = confined(partial(run_program, argv, 60.0), beside)
    assert finished.code == 0, finished.stderr
    return finished.stdout.decode().strip()


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK"])
@pytest.mark.parametrize("within", ["", "os.fork() and (os.wait(), os._exit(0)); "])
def test_a_confined_program_opens_no_socket_that_leads_anywhere(family: str, within: str) -> None:
    script = f"""
import os, socket
{within}
try:
    socket.socket(socket.{family}, socket.SOCK_RAW)
    print("open", flush=True)
except OSError as refused:
    print(refused.strerror, flush=True)
"""
    assert confined_python(script) == "Permission denied"


def test_a_confined_program_gets_no_socket_from_a_ring_either() -> None:
    script = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(425, 8, ctypes.create_string_buffer(120)), ctypes.get_errno())
"""
    assert confined_python(script) == f"-1 {errno.EACCES}"


def test_a_confined_program_may_talk_to_itself() -> None:
    assert confined_python("import socket; print(len(socket.socketpair()))") == "2"


def test_a_confined_program_reads_no_file_but_those_that_are_named(tmp_path: Path) -> None:
    for name in ("commit/base/a", "outside", "commit-of-another"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "commit/link").symlink_to(tmp_path / "outside")
    script = f"""
import os
os.chdir({str(tmp_path)!r})
for path in ("commit/base/a", "outside", "commit-of-another", "commit/link", "commit/../outside"):
    try:
        print(open(path).read())
    except OSError as refused:
        print(refused.strerror)
"""
    printed = confined_python(script, tmp_path / "commit", tmp_path / "nowhere")
    assert printed.split("\n") == ["commit/base/a", *["Permission denied"] * 4]


def test_only_what_is_confined_is_closed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    assert confined(lambda: 5, []) == 5
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
    assert run_program(("cat", str(tmp_path / "file")), 30.0).stdout == b"content"


def test_without_a_way_to_close_the_network_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(ConfigError) as failed:
        confined((tmp_path / "proof").touch, [])
    said = "the system cannot close the network to kubectl: 'riscv64'. "
    assert failed.value.faults == (said + "Run this on Linux with seccomp, on x86_64 or aarch64.",)
    assert not (tmp_path / "proof").exists()


def test_in_a_pod_nothing_keeps_kubectl_from_the_account_of_the_pod(tmp_path: Path) -> None:
    """It uses that only while no flag or file touches its client configuration."""
    kubectl = Kubectl(Metrics(), program=script(tmp_path, 'printf "%s " "$@"'))
    assert kubectl.run("get", "x", namespace=SPACE, timeout=10) == f"-n {SPACE} get x "


def test_no_more_processes_run_at_once_than_there_are_slots(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = script(tmp_path, f"echo + >> {log}; sleep 0.1; echo - >> {log}")
    kubectl = Kubectl(Metrics(), at_once=2, program=program)
    threads = [threading.Thread(target=kubectl.run, args=("get",)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    running, most = 0, 0
    for line in log.read_text().split():
        running += 1 if line == "+" else -1
        most = max(most, running)
    assert (running, most) == (0, 2)


def hangs_first(folder: Path, times: int) -> str:
    """A kubectl of which so many processes never end, and the next ones answer."""
    count = f"echo >> {folder}/calls; n=$(wc -l < {folder}/calls)"
    return script(folder, f'{count}; [ "$n" -gt {times} ] || exec sleep 600; echo "answer $n"')


@pytest.mark.parametrize("times", [0, 1, pytest.param(3, marks=pytest.mark.cluster)])
def test_an_urgent_call_is_repeated_beside_those_that_hang(tmp_path: Path, times: int) -> None:
    kubectl = UrgentKubectl(Metrics(), program=hangs_first(tmp_path, times))
    began = time.monotonic()
    assert kubectl.run("get", "service/x") == f"answer {times + 1}\n"
    assert time.monotonic() - began < 10, "and not the 30 seconds of one call"


def test_an_urgent_call_takes_a_refusal_for_an_answer(tmp_path: Path) -> None:
    body = "echo 'Error from server (Conflict): changed' >&2; exit 1"
    with pytest.raises(KubectlError) as failed:
        UrgentKubectl(Metrics(), program=script(tmp_path, body)).run("patch", "service/x")
    assert failed.value.kind == "Conflict"


@pytest.mark.cluster
def test_urgent_calls_run_in_few_processes_at_once_however_many_hang(tmp_path: Path) -> None:
    kubectl = UrgentKubectl(Metrics(), at_once=2, program=hangs_first(tmp_path, 99))
    with pytest.raises(KubectlError) as failed:
        kubectl.run("get", "service/x", timeout=5.0)
    assert (failed.value.code, failed.value.kind) == (None, "Unreachable")
    assert (tmp_path / "calls").read_text().count("\n") == 2


def test_an_urgent_call_does_not_wait_for_a_kubectl_that_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be started"):
        UrgentKubectl(Metrics(), program=str(tmp_path / "missing")).run("get", "service/x")


def test_what_is_sent_is_in_no_argument(tmp_path: Path) -> None:
    program = script(tmp_path, f'echo "$@" >> {tmp_path}/argv; cat > {tmp_path}/in; echo "{{}}"')
    kubectl = Kubectl(Metrics(), program=program)
    kubectl.create([configmap("a", key="hunter2")], SPACE)
    kubectl.put(configmap("a", key="hunter2"), None, SPACE)
    kubectl.patch("configmap", "a", SPACE, {"data": {"key": "hunter2"}})
    assert "hunter2" in (tmp_path / "in").read_text()
    assert "hunter2" not in (tmp_path / "argv").read_text()


# === Reading and writing ===


def test_an_object_is_read_or_it_is_none(kubectl: Kubectl) -> None:
    kubectl.create([configmap("there", a="b")], SPACE)
    there = kubectl.get("configmap", "there", SPACE)
    assert there is not None
    assert there["data"] == {"a": "b"}
    assert kubectl.get("configmap", "nowhere", SPACE) is None


def test_several_objects_are_read_in_their_order_in_one_call(
    kubectl: Kubectl, cluster: Cluster
) -> None:
    kubectl.create([configmap("each-1", a="1"), configmap("each-3", a="3")], SPACE)
    asked = len(cluster.faults.log)
    names = ("each-3", "nowhere", "each-1")
    objects = kubectl.get_each(SPACE, *(f"configmap/{name}" for name in names))
    assert [o and o["data"] for o in objects] == [{"a": "3"}, None, {"a": "1"}]
    paths = [r.path.rpartition("/")[2] for r in [*cluster.faults.log][asked:]]
    assert [name for name in paths if name in names] == [*names]
    assert kubectl.get_each(SPACE, "configmap/nowhere", "configmap/neither") == [None, None]
    assert kubectl.get_each(SPACE, "configmap/nowhere") == [None]
    (alone,) = kubectl.get_each(SPACE, "configmap/each-1")
    assert (alone or {})["data"] == {"a": "1"}


@pytest.mark.parametrize("name", ["-h", "--kubeconfig=nowhere", "--all", "--raw=version"])
def test_a_name_that_looks_like_an_option_is_a_name(kubectl: Kubectl, name: str) -> None:
    kubectl.create([configmap("bystander")], SPACE)
    assert kubectl.get("configmap", name, SPACE) is None
    kubectl.delete("configmap", [name], SPACE)
    assert "bystander" in names(kubectl)


def test_a_patch_of_400_kilobytes_is_merged(kubectl: Kubectl) -> None:
    kubectl.create([configmap("large", kept="yes", gone="soon")], SPACE)
    change = {"data": {"gone": None, **{f"ref-{i}": "x" * 200 for i in range(2000)}}}
    patched = kubectl.patch("configmap", "large", SPACE, change)
    assert len(patched["data"]) == 2001
    assert patched["data"]["kept"] == "yes"


def test_a_patch_with_a_version_changes_only_what_is_as_it_was_seen(kubectl: Kubectl) -> None:
    kubectl.create([configmap("raced", a="1")], SPACE)
    seen = kubectl.patch("configmap", "raced", SPACE, {"data": {"a": "2"}})["metadata"]
    kubectl.patch("configmap", "raced", SPACE, {"data": {"a": "3"}})
    stale = {"metadata": {"resourceVersion": seen["resourceVersion"]}, "data": {"a": "4"}}
    with pytest.raises(KubectlError) as failed:
        kubectl.patch("configmap", "raced", SPACE, stale)
    assert failed.value.kind == "Conflict"
    assert (kubectl.get("configmap", "raced", SPACE) or {})["data"] == {"a": "3"}


def test_a_patch_that_was_done_but_never_answered_is_of_unknown_effect(
    kubectl: Kubectl, cluster: Cluster
) -> None:
    kubectl.create([configmap("answered", a="1")], SPACE)
    cluster.faults.add(Fault("hang-after", verb="patch", resource="configmaps"))
    args = ("patch", "configmap/answered", "--type=merge", "--patch-file=/dev/stdin")
    with pytest.raises(KubectlError) as failed:
        kubectl.run(*args, namespace=SPACE, stdin='{"data":{"a":"2"}}', timeout=2.0)
    assert failed.value.kind == "Unreachable"
    assert (kubectl.get("configmap", "answered", SPACE) or {})["data"] == {"a": "2"}


def test_a_whole_object_takes_the_place_of_exactly_what_was_read(kubectl: Kubectl) -> None:
    kubectl.put(configmap("whole", a="1", b="1"), None, SPACE)
    first = kubectl.get("configmap", "whole", SPACE)
    kubectl.put(configmap("whole", a="2"), first, SPACE)
    assert (kubectl.get("configmap", "whole", SPACE) or {})["data"] == {"a": "2"}
    for current, kind in ((first, "Conflict"), (None, "AlreadyExists")):
        with pytest.raises(KubectlError) as failed:
            kubectl.put(configmap("whole", a="3"), current, SPACE)
        assert failed.value.kind == kind
    assert (kubectl.get("configmap", "whole", SPACE) or {})["data"] == {"a": "2"}


def test_an_object_is_deleted_only_exactly_as_it_was_read(kubectl: Kubectl) -> None:
    kubectl.put(configmap("read", a="1"), None, SPACE)
    first = kubectl.get("configmap", "read", SPACE) or {}
    kubectl.put(configmap("read", a="2"), first, SPACE)
    with pytest.raises(KubectlError) as failed:
        kubectl.delete_exactly("api/v1", "configmaps", first)
    assert failed.value.kind == "Conflict"
    second = kubectl.get("configmap", "read", SPACE) or {}
    kubectl.delete_exactly("api/v1", "configmaps", second)
    assert kubectl.get("configmap", "read", SPACE) is None
    with pytest.raises(KubectlError) as failed:
        kubectl.delete_exactly("api/v1", "configmaps", second)
    assert failed.value.kind == "NotFound"


def test_a_whole_object_with_an_unknown_field_is_refused(kubectl: Kubectl) -> None:
    kubectl.put(configmap("strict"), None, SPACE)
    for name, current in (("strict", kubectl.get("configmap", "strict", SPACE)), ("new", None)):
        with pytest.raises(KubectlError) as failed:
            kubectl.put({**configmap(name), "dataa": {}}, current, SPACE)
        assert failed.value.kind == "BadRequest"
        assert 'unknown field "dataa"' in failed.value.stderr


def test_deleting_takes_what_is_there_and_leaves_the_rest(kubectl: Kubectl) -> None:
    kubectl.create([configmap("old-1"), configmap("old-10")], SPACE)
    kubectl.delete("configmap", ["old-1", "never-there"], SPACE)
    assert names(kubectl) & {"old-1", "old-10"} == {"old-10"}


def test_deleting_nothing_calls_nothing(tmp_path: Path) -> None:
    Kubectl(Metrics(), program=str(tmp_path / "missing")).delete("job", [], SPACE)


def test_a_list_can_be_filtered(kubectl: Kubectl) -> None:
    marked = configmap("marked")
    marked["metadata"]["labels"] = {"mark": "yes"}
    kubectl.create([marked, configmap("unmarked")], SPACE)
    assert names(kubectl, "-l", "mark=yes") == {"marked"}


def test_names_are_read_without_what_the_objects_hold(kubectl: Kubectl, cluster: Cluster) -> None:
    assert kubectl.names("configmaps", SPACE, "size=large") == []
    large = [configmap(f"large-{i}", text="x" * 900_000) for i in range(20)]
    for each in large:
        each["metadata"] |= {"labels": {"size": "large"}, "namespace": SPACE}
        cluster.store.create("configmaps", each)
    names = kubectl.names("configmaps", SPACE, "size=large")
    assert sorted(names) == sorted(m["metadata"]["name"] for m in large)
    with pytest.raises(KubectlError):
        kubectl.list("configmaps", SPACE, "-l", "size=large")
    for item in large:
        cluster.store.delete("configmaps", SPACE, item["metadata"]["name"])


def test_a_long_list_is_read_in_pages(kubectl: Kubectl) -> None:
    many = [configmap(f"part-{i}") for i in range(250)]
    for item in many:
        item["metadata"]["labels"] = {"list": "long"}
    kubectl.create(many, SPACE)
    address = f"/api/v1/namespaces/{SPACE}/configmaps?labelSelector=list%3Dlong"
    pages = [page["items"] for page in kubectl.pages(address, SPACE)]
    assert [len(items) for items in pages] == [100, 100, 50]
    listed = {item["metadata"]["name"] for items in pages for item in items}
    assert listed == {item["metadata"]["name"] for item in many}


# === Creating several ===


def kinds(refused: dict[str, KubectlError]) -> dict[str, str]:
    return {name: failed.kind for name, failed in refused.items()}


def test_each_refusal_belongs_to_its_object_even_when_names_begin_alike(kubectl: Kubectl) -> None:
    kubectl.create([configmap("shop"), configmap("shop-blue")], SPACE)
    asked = [configmap(n) for n in ("shop", "shop-b", "shop-blue", "shop-blue-1", "Shop_Bad")]
    refused = kubectl.create_each(asked, SPACE)
    assert kinds(refused) == {
        "shop": "AlreadyExists", "shop-blue": "AlreadyExists", "Shop_Bad": "Invalid",
    }  # fmt: skip
    assert '"shop-blue"' in refused["shop-blue"].said
    assert "RFC 1123" in refused["Shop_Bad"].said
    assert {"shop-b", "shop-blue-1"} <= names(kubectl)


def test_objects_that_all_exist_take_one_call(kubectl: Kubectl) -> None:
    many = [configmap(f"many-{i}") for i in range(500)]
    assert kubectl.create_each(many, SPACE) == {}
    assert set(kinds(kubectl.create_each(many, SPACE)).values()) == {"AlreadyExists"}
    assert kubectl.metrics.kubectl.labels("create", "ok")._value.get() == 1
    assert kubectl.metrics.kubectl.labels("create", "AlreadyExists")._value.get() == 1


def test_creating_again_leaves_what_is_there(kubectl: Kubectl) -> None:
    kubectl.create([configmap("first", by="us")], SPACE)
    kubectl.create([configmap("first", by="them"), configmap("second")], SPACE)
    assert (kubectl.get("configmap", "first", SPACE) or {})["data"] == {"by": "us"}
    assert "second" in names(kubectl)


def test_creating_what_the_server_refuses_raises_its_reason(kubectl: Kubectl) -> None:
    with pytest.raises(KubectlError) as failed:
        kubectl.create([configmap("Bad_Name")], SPACE)
    assert failed.value.kind == "Invalid"


def test_a_missing_namespace_is_an_error_of_the_whole_call(kubectl: Kubectl) -> None:
    with pytest.raises(KubectlError) as failed:
        kubectl.create_each([configmap("a"), configmap("b")], "nowhere")
    assert failed.value.kind == "NotFound"


def test_a_recorded_list_of_which_one_exists_is_read_from_both_streams(tmp_path: Path) -> None:
    entry = RECORDED["list-create: one of three exists already"]
    kubectl = saying(tmp_path, entry["exit"], entry["stdout"], entry["stderr"])
    refused = kubectl.create_each(json.loads(entry["stdin"])["items"], "test")
    assert kinds(refused) == {"test-ok": "AlreadyExists"}
    assert refused["test-ok"].stderr == entry["stderr"].strip()
    assert kubectl.metrics.kubectl.labels("create", "AlreadyExists")._value.get() == 1


CREATING = 'error when creating "STDIN": '
EXISTS = f'Error from server (AlreadyExists): {CREATING}jobs.batch "{{}}" already exists\n'
DENIED = (
    f'Error from server (Forbidden): {CREATING}admission webhook "policy.example.com" '
    "denied the request: images must be signed\n"
)
GONE = f'{CREATING}Post "https://10.0.0.1/apis": dial tcp: connect: connection refused\n'
BUSY = f"Error from server (TooManyRequests): {CREATING}the server has received too many requests\n"
FULL = f"Error from server (Forbidden): {CREATING}exceeded quota: few, requested: count/jobs=1\n"
INVALID = 'The Job "{}" is invalid: \n* spec: Required value\n* metadata.labels: Invalid: "b"\n'
NOBODY = "error: You must be logged in to the server (Unauthorized)\n"


def refusing(directory: Path, stdout: str, stderr: str, **alone: str) -> Kubectl:
    """kubectl that says this of several objects, and of one alone what its name is given here."""
    for name, text in {"out": stdout, "err": stderr, **alone}.items():
        (directory / name).write_text(text)
    one = "".join(f"""*'"items": [{{"'*'"{name}"'*) cat {name} >&2; exit 1;; """ for name in alone)
    several = """*'}, {'*) cat out; cat err >&2; exit 1;;"""
    body = f'cd {directory}; case "$(cat)" in {several} {one} esac'
    return Kubectl(Metrics(), program=script(directory, body))


@pytest.mark.parametrize(
    ("stdout", "stderr", "alone", "expected"),
    [
        ("job.batch/a\n", EXISTS.format("b") + EXISTS.format("c"), {},
         {"b": "AlreadyExists", "c": "AlreadyExists"}),
        ("job.batch/b\n", DENIED + EXISTS.format("c"), {"a": DENIED},
         {"a": "Denied", "c": "AlreadyExists"}),
        ("", INVALID.format("a") + EXISTS.format("b") + DENIED,
         {"a": INVALID.format("a"), "c": DENIED},
         {"a": "Invalid", "b": "AlreadyExists", "c": "Denied"}),
        ("", DENIED * 3, {"a": DENIED, "b": DENIED, "c": DENIED}, dict.fromkeys("abc", "Denied")),
        ("job.batch/a\n", EXISTS.format("b"), {}, {"b": "AlreadyExists"}),
        ("job.batch/a\n", EXISTS.format("b"), {"c": EXISTS.format("c")},
         {"b": "AlreadyExists", "c": "AlreadyExists"}),
        ("job.batch/a\n", GONE + GONE, {}, "Unreachable"),
        ("job.batch/a\n", BUSY + BUSY, {}, "Unreachable"),
        ("", INVALID.format("a") * 3, {"a": INVALID.format("a"), "b": GONE}, "Unreachable"),
        ("job.batch/a\n", FULL + FULL, {}, "Forbidden"),
        ("", NOBODY, {}, "Unreachable"),
    ],
    ids=["exist", "one-denied", "each-its-own", "all-denied", "one-unmentioned",
         "made-meanwhile", "server-gone", "server-busy", "server-gone-in-the-middle", "quota",
         "nobody-asked"],
)  # fmt: skip
def test_what_was_not_created_is_reported_object_by_object_or_not_at_all(
    tmp_path: Path, stdout: str, stderr: str, alone: dict[str, str], expected: dict[str, str] | str
) -> None:
    kubectl = refusing(tmp_path, stdout, stderr, **alone)
    objects = [configmap(n) for n in "abc"]
    if isinstance(expected, str):
        with pytest.raises(KubectlError) as failed:
            kubectl.create_each(objects, SPACE)
        assert failed.value.kind == expected
        return
    assert kinds(kubectl.create_each(objects, SPACE)) == expected


def test_a_server_that_fails_for_one_object_only_is_asked_again(
    kubectl: Kubectl, cluster: Cluster
) -> None:
    cluster.faults.add(Fault("500", verb="create", resource="configmaps", after=1))
    objects = [configmap(f"half-{i}") for i in range(3)]
    with pytest.raises(KubectlError):
        kubectl.create_each(objects, SPACE)
    refused = kubectl.create_each(objects, SPACE)
    assert set(kinds(refused).values()) == {"AlreadyExists"}
    assert {"half-0", "half-1", "half-2"} <= names(kubectl)


# === Logs ===


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [("now", "before", "now"), ("", "before", "before"), ("", "", "")],
    ids=["this-life", "previous-life", "none"],
)
def test_the_log_of_the_previous_life_stands_in_for_an_empty_one(
    tmp_path: Path, now: str, before: str, expected: str
) -> None:
    body = f'case "$*" in *--previous*) printf "{before}";; *) printf "{now}";; esac'
    kubectl = Kubectl(Metrics(), program=script(tmp_path, body))
    assert kubectl.logs("pod", "web", SPACE) == expected


def test_only_the_end_of_long_logs_is_kept_in_memory(tmp_path: Path) -> None:
    kubectl = saying(tmp_path, 0, "x" * 1_000_000 + "end")
    logs = kubectl.logs("pod", "container", "test")
    assert len(logs) == 2 * 64 * 1024
    assert logs.endswith("xend")


def test_logs_that_cannot_be_read_are_empty(kubectl: Kubectl) -> None:
    assert kubectl.logs("none", "web", SPACE) == ""


def test_a_stream_goes_on_until_its_caller_ends_it(kubectl: Kubectl) -> None:
    kubectl.create([configmap("streamed")], SPACE)
    process = kubectl.stream("get", "configmaps", "--watch", "-o", "name", namespace=SPACE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"configmap/")
    assert process.poll() is None
    assert os.getpgid(process.pid) == os.getpgid(0), "Ctrl-C reaches it"
    process.kill()
    process.communicate()


def test_a_thousand_pods_come_in_pages_that_kubectl_has_the_memory_for(
    cluster: Cluster, kubectl: Kubectl
) -> None:
    meta = {"labels": {"app": "large"}, "annotations": {"words": "x" * 30_000}}
    for number in range(4 * PAGE_SIZE + 50):
        name = f"large-{number}"
        cluster.load(
            {
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {**meta, "name": name, "namespace": SPACE},
                "spec": {"containers": [{"name": "web", "image": "nothing"}]},
            }
        )  # fmt: skip
    pods = kubectl.list("pods", SPACE, "-l", "app=large,app!=small")
    assert len({pod["metadata"]["name"] for pod in pods}) == 4 * PAGE_SIZE + 50
