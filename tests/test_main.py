"""The command line where no cluster is: exit statuses, and what a person reads on the terminal."""

from __future__ import annotations

import base64
import http.server
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import requests
import waitress
import yaml

import gitops_hook
from tests.measuring import MEASURING
from tests.starting import PROGRAM, argv_of, finding
from tests.waiting import eventually
from tests.world import Repository

ROOT = Path(__file__).resolve().parent.parent
TOKEN = b"whsec_" + base64.b64encode(b"k" * 32)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: "http://127.0.0.1:{port}"}}}}]
users: [{{name: u, user: {{}}}}]
contexts: [{{name: c, context: {{cluster: c, user: u}}}}]
current-context: c
"""
Done = subprocess.CompletedProcess[str]


def closed_port() -> int:
    """A port of the loopback address that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Place:
    """A directory with a configuration, secrets, a spool, and a kubeconfig that leads nowhere."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "config.yaml"
        self.secrets = directory / "secrets"
        self.spool = directory / "spool"
        self.settings: dict[str, Any] = {
            "apps": [
                {
                    "name": "shop",
                    "repository": str(directory / "shop.git"),
                    "build": {"image": "registry.example.com/demo/shop"},
                }
            ]
        }
        self.secrets.mkdir()
        self.signing_tokens = self.secrets / "webhook-signing-tokens"
        self.signing_tokens.write_bytes(TOKEN + b"\n")
        kubeconfig = directory / "kubeconfig"
        kubeconfig.write_text(KUBECONFIG.format(port=closed_port()))
        self.python = sys.executable
        self.environ = {
            **finding(),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(directory),
            "KUBECONFIG": str(kubeconfig),
            "GITOPS_HOOK_CONFIG": str(self.config),
            "GITOPS_HOOK_SECRETS": str(self.secrets),
            "GITOPS_HOOK_SPOOL": str(self.spool),
            "GITOPS_HOOK_LISTEN": "127.0.0.1:0",
            "GITOPS_HOOK_ADMIN_LISTEN": "127.0.0.1:0",
        }
        self.processes: list[subprocess.Popen[bytes]] = []

    def without_tools(self) -> None:
        """Let the program find neither kubectl nor git, not even beside its interpreter."""
        (self.directory / "bin").mkdir()
        self.python = str(self.directory / "bin" / "python")
        Path(self.python).symlink_to(Path(sys.executable).resolve())
        self.environ["PATH"] = str(self.directory / "bin")
        self.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)

    def run(self, *args: str, **environ: str) -> Done:
        """Run a command to its end."""
        return self.run_python(*argv_of(*args)[1:], **environ)

    def run_without_packages(self, *args: str, **environ: str) -> Done:
        """Run a command by a Python that has only its standard library, and what a path names."""
        return self.run_python("-S", str(PROGRAM), *args, **environ)

    def run_python(self, *args: str, **environ: str) -> Done:
        """Run Python to its end."""
        self.config.write_text(yaml.safe_dump(self.settings))
        return subprocess.run(
            [self.python, *args],
            env=self.environ | environ,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def serve(self, files: int = 0, **environ: str) -> Daemon:
        """Start the daemon, if so wanted with so few open files, and wait until it listens."""
        self.config.write_text(yaml.safe_dump(self.settings))
        log = self.directory / f"log-{len(self.processes)}"
        with log.open("wb") as file:
            argv = [self.python, *argv_of("serve")[1:]]
            if files:
                argv = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *argv]
            process = subprocess.Popen(argv, env=self.environ | environ, stderr=file)
        self.processes.append(process)
        return Daemon(process, log)


class Daemon:
    """A running daemon."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log
        line = eventually(lambda: self.find("serving"))
        self.port = int(line["port"])
        self.url = f"http://127.0.0.1:{self.port}"
        self.admin_url = f"http://127.0.0.1:{line['admin_port']}"

    def find(self, msg: str) -> dict[str, Any] | None:
        """The first log line with this message."""
        text = self.log.read_text()
        assert self.process.poll() is None or msg != "serving", text
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]
        return next((line for line in lines if line["msg"] == msg), None)

    def connect(self) -> socket.socket:
        """Return a connection to the first port."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def healthy(self) -> bool:
        """Whether the second port says that it lives and that it is ready."""
        return not self.troubles()

    def troubles(self) -> list[str]:
        """Return what the second port says that is wrong."""
        probes = [f"{self.admin_url}/{name}" for name in ("healthz", "readyz")]
        answers = [requests.get(probe, timeout=30) for probe in probes]
        return [answer.text for answer in answers if answer.status_code != 200]

    def resident(self) -> int:
        """Return the bytes of memory that it has had at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024

    def temporary(self) -> int:
        """Return the bytes in the files without a name that it has open."""
        total = 0
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(OSError):
                total += link.stat().st_size if "(deleted)" in os.readlink(link) else 0
        return total

    def seconds(self) -> float:
        """Return the seconds of a processor's time that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ready(self) -> int:
        """The status of /readyz."""
        return requests.get(f"{self.url}/readyz", timeout=30).status_code


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    for process in place.processes:
        with suppress(subprocess.TimeoutExpired):
            if MEASURING:  # which it says when it ends by itself
                process.terminate()
                process.wait(10)
        process.kill()
        process.wait()


def says(done: Done, status: int, *texts: str) -> None:
    """Assert an exit status and plain sentences on stderr: no traceback, nothing secret."""
    assert done.returncode == status, done
    printed = done.stdout + done.stderr
    assert not re.search(r"Traceback|whsec_[A-Za-z0-9]|File \"", printed)
    for text in texts:
        assert text in printed, printed


# Usage and configuration: 2


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["deploy"],
        ["push", "--app", "shop"],
        ["rollback"],
        ["rollback", "shop", "--to", "two"],
        ["status", "--output", "yaml"],
        ["rerun"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_explained(place: Place, args: list[str]) -> None:
    says(place.run(*args), 2, "usage: gitops-hook")


def test_help_and_version_succeed(place: Place) -> None:
    says(place.run("--help"), 0, "serve", "push", "status", "rollback", "rerun")
    says(place.run("push", "--help"), 0, "default: http://127.0.0.1:8080/webhook")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", place.run("--version").stdout)


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["rollback", "--help"]], ids=" ".join)
def test_help_and_version_need_no_package(place: Place, args: list[str]) -> None:
    done = place.run_without_packages(*args)
    says(done, 0)
    assert done.stdout == place.run(*args).stdout


@pytest.mark.parametrize("args", [["status"], ["serve", "--check"], ["clone"]], ids=" ".join)
def test_other_commands_without_their_packages_name_what_makes_the_environment(
    place: Place, args: list[str]
) -> None:
    done = place.run_without_packages(*args)
    says(done, 2, "the Python package prometheus_client is missing", "`make venv`")
    assert len(done.stderr.splitlines()) == 1


def test_a_package_is_missed_at_the_start_also_where_it_is_needed_later(
    place: Place, tmp_path: Path
) -> None:
    others = tmp_path / "packages"
    others.mkdir()
    for package in (prometheus_client, waitress, yaml):
        folder = Path(package.__file__).parent
        (others / folder.name).symlink_to(folder)
    done = place.run_without_packages("status", PYTHONPATH=str(others))
    says(done, 2, "the Python package requests is missing", "`make venv`")


def test_a_start_leaves_the_http_client_for_later() -> None:
    script = "import sys, gitops_hook; sys.exit('requests' in sys.modules)"
    argv = [sys.executable, "-P", "-c", script]
    assert subprocess.run(argv, env=os.environ | finding(), check=False).returncode == 0


def test_a_wrong_command_line_is_explained_without_packages(place: Place) -> None:
    says(place.run_without_packages("deploy"), 2, "usage: gitops-hook", "invalid choice")


def test_importing_it_without_packages_fails() -> None:
    argv = [sys.executable, "-S", "-c", "import gitops_hook"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: No module named 'prometheus_client'" in done.stderr


def test_help_explains_every_argument_and_the_exit_statuses(place: Place) -> None:
    root = gitops_hook.parser()
    assert str(root.epilog).startswith("Exit status: 0 done, 1 ")
    for command in root._subparsers._group_actions[0].choices.values():
        assert [a.dest for a in command._actions if not a.help] == []


@pytest.mark.parametrize(
    "command", [["serve"], ["serve", "--check"], ["status"], ["rollback", "shop"]]
)
def test_every_wrong_setting_is_named_at_once(place: Place, command: list[str]) -> None:
    place.settings["apps"][0]["tset"] = {}
    place.settings["apps"][0]["test"] = {"timeout": "15x"}
    place.settings["catch_up"] = 5
    done = place.run(*command)
    says(done, 2, "apps[0].tset", "apps[0].test.timeout", "15x", "catch_up")
    assert len(done.stderr.splitlines()) == 3
    assert not done.stdout
    assert not place.spool.exists()


def test_a_misspelt_variable_is_a_fault(place: Place) -> None:
    says(place.run("status", GITOPS_HOOK_SECRET="/x"), 2, "GITOPS_HOOK_SECRET")


def test_a_configuration_that_is_named_must_be_there(place: Place) -> None:
    done = place.run("status", GITOPS_HOOK_CONFIG=str(place.directory / "other.yaml"))
    says(done, 2, "other.yaml", "No such file")


def test_a_password_in_a_wrong_setting_is_not_printed(place: Place) -> None:
    place.settings["apps"][0]["repository"] = "https://bot:hunter2-hunter2@git.example.com/a.git"
    done = place.run("serve", "--check")
    says(done, 2, "https://***@git.example.com/a.git", "a user belongs in file git-credentials")
    assert "hunter2" not in done.stderr


def test_a_configuration_that_is_no_text_is_refused(place: Place) -> None:
    path = place.directory / "binary.yaml"
    path.write_bytes(b"apps: \xff\xfe")
    says(place.run("status", GITOPS_HOOK_CONFIG=str(path)), 2, "binary.yaml cannot be read")


@pytest.mark.parametrize("command", ["status", "rollback", "push"])
def test_an_unknown_application_is_a_wrong_command_line(place: Place, command: str) -> None:
    more = ["--app", "shpo", "--ref", "main", "--sha", COMMIT] if command == "push" else ["shpo"]
    says(place.run(command, *more), 2, "no app 'shpo' is configured, only: shop")


def test_an_unknown_environment_is_a_wrong_command_line(place: Place) -> None:
    done = place.run("rollback", "shop", "--environment", "prod")
    says(done, 2, "shop is not deployed to 'prod', only to: staging, production")


@pytest.mark.parametrize("number", ["0", "-1"])
def test_no_rollback_goes_to_what_is_live_or_comes_after_it(place: Place, number: str) -> None:
    done = place.run("rollback", "shop", "--to", number)
    says(done, 2, f"--to: '{number}' is neither how many versions, 1 or more, nor the id of a run")


def test_rollback_of_an_app_without_environments_says_so(place: Place) -> None:
    place.settings["apps"][0]["deploy"] = {"environments": []}
    done = place.run("rollback", "shop")
    says(done, 2, "shop has no environments, so nothing of it can be rolled back")


@pytest.mark.parametrize("command", ["clone", "collect"])
def test_commands_of_job_pods_say_where_they_belong(place: Place, command: str) -> None:
    says(place.run(command), 2, "this runs inside Job pods", "TERMINATION_LOG")


def test_commands_of_job_pods_take_variables_as_arguments_before_those_around_them(
    place: Place, tmp_path: Path
) -> None:
    log = tmp_path / "said"
    place.environ |= {"CLONE_URL": "https://gitlab.example.com/demo/shop.git", "CLONE_COMMIT": "-c"}
    place.environ |= {"TERMINATION_LOG": "/nowhere/log"}
    paths = [f"TERMINATION_LOG={log}", f"CREDENTIALS_FILE={tmp_path / 'none=here'}"]
    done = place.run("clone", *paths, f"CLONE_DIRECTORY={tmp_path / 'src'}")
    says(done, 1, "-c")
    assert "-c" in log.read_text("utf-8")


def test_a_reader_who_has_gone_does_no_harm(place: Place) -> None:
    place.config.write_text(yaml.safe_dump(place.settings))
    reading, writing = os.pipe()
    os.close(reading)
    argv = argv_of("serve", "--check")
    done = subprocess.run(
        argv, env=place.environ, stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


# Secrets, spool, ports: nothing is started that could not work


def test_serve_check_says_that_the_configuration_is_valid(place: Place) -> None:
    done = place.run("serve", "--check")
    says(done, 0, "the configuration is valid; apps: shop")
    assert not place.spool.exists()


@pytest.mark.parametrize("command", [["serve"], ["serve", "--check"], ["push"]], ids=" ".join)
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "webhook-signing-tokens is missing or empty"),
        (b"", "webhook-signing-tokens is missing or empty"),
        (b"\n \n", "webhook-signing-tokens is missing or empty"),
        (b"whsec_dG9vIHNob3J0\n", "webhook-signing-tokens, line 1"),
        (TOKEN + b"\nhunter2-hunter2\n", "webhook-signing-tokens, line 2"),
    ],
    ids=["missing", "empty", "blank", "short", "second line"],
)
def test_unusable_secrets_are_refused(
    place: Place, command: list[str], content: bytes | None, text: str
) -> None:
    place.signing_tokens.unlink()
    if content is not None:
        place.signing_tokens.write_bytes(content)
    more = ["--app", "shop", "--ref", "main", "--sha", COMMIT] if command == ["push"] else []
    done = place.run(*command, *more)
    says(done, 2, text)
    assert "hunter2" not in done.stderr


def test_an_unwritable_spool_is_refused(place: Place) -> None:
    (place.directory / "file").write_text("not a folder")
    done = place.run("serve", GITOPS_HOOK_SPOOL=str(place.directory / "file" / "spool"))
    says(done, 2, "spool", "Not a directory")


@pytest.mark.parametrize("variable", ["GITOPS_HOOK_LISTEN", "GITOPS_HOOK_ADMIN_LISTEN"])
def test_a_port_in_use_is_refused(place: Place, variable: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = place.run("serve", **{variable: address})
    says(done, 2, "cannot listen on", address, "Address already in use")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("address", ["192.0.2.1:80", "127.0.0.1:65536"])
def test_an_address_that_is_not_ours_is_refused(place: Place, address: str) -> None:
    says(place.run("serve", GITOPS_HOOK_LISTEN=address), 2, "cannot listen on", address)


# No kubectl, no cluster: 2

COMMANDS = [["status"], ["rollback", "shop"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_without_kubectl_commands_say_so(place: Place, command: list[str]) -> None:
    place.without_tools()
    done = place.run(*command)
    says(done, 2, "kubectl")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_without_a_cluster_commands_say_so(place: Place, command: list[str]) -> None:
    done = place.run(*command)
    says(done, 2, "no cluster answers", "KUBECONFIG", "was refused")
    assert len(done.stderr.splitlines()) == 1


class Refusing(http.server.BaseHTTPRequestHandler):
    """An API server that takes nobody's token."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        status = {"kind": "Status", "apiVersion": "v1", "reason": "Unauthorized", "code": 401}
        self.wfile.write(json.dumps({**status, "message": "Unauthorized"}).encode())

    def log_message(self, *args: Any) -> None:
        pass


def test_a_cluster_that_refuses_the_token_is_not_said_to_be_away(place: Place) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        kubeconfig = KUBECONFIG.format(port=server.server_address[1])
        (place.directory / "kubeconfig").write_text(kubeconfig)
        done = place.run("status")
        server.shutdown()
    says(done, 2, "no cluster answers, or it refuses this account", "must be logged in to the")
    assert len(done.stderr.splitlines()) == 1


def test_without_configuration_and_cluster_both_are_named(place: Place) -> None:
    done = place.run("status", GITOPS_HOOK_CONFIG="")
    says(done, 2, "no cluster answers", "gitops-hook", "was refused")


def test_a_context_that_is_not_there_is_no_cluster(place: Place) -> None:
    path = place.directory / "kubeconfig"
    path.write_text(path.read_text().replace("current-context: c", "current-context: gone"))
    says(place.run("status"), 2, "gone")


def test_without_git_rerun_says_so(place: Place) -> None:
    place.without_tools()
    done = place.run("rerun", "shop-01234567-abcd")
    says(done, 2, "git")


def test_rerun_of_an_unreachable_repository_has_failed(place: Place) -> None:
    says(place.run("rerun", "shop-01234567-abcd"), 1, "git ls-remote", "shop.git")


# The daemon without a cluster


def push(place: Place, url: str, **environ: str) -> Done:
    return place.run(
        *("push", "--app", "shop", "--ref", "main", "--sha", COMMIT, "--url", url), **environ
    )


def test_push_takes_the_beginning_of_a_head(place: Place) -> None:
    commit = Repository(place.directory).release("v1")
    daemon = place.serve()
    url = f"{daemon.url}/webhook"
    done = place.run("push", "--app", "shop", "--ref", "main", "--sha", commit[:7], "--url", url)
    says(done, 0, "202", "accepted", f"shop-{commit[:8]}-")


def test_push_of_an_unknown_short_commit_asks_for_the_full_id(place: Place) -> None:
    Repository(place.directory).release("v1")
    done = place.run("push", "--app", "shop", "--ref", "main", "--sha", COMMIT[:7])
    says(done, 3, f"commit {COMMIT[:7]} is unknown", "give the full commit id")


def test_push_of_what_is_no_commit_says_so(place: Place) -> None:
    done = place.run("push", "--app", "shop", "--ref", "main", "--sha", "HEAD")
    says(done, 2, "'HEAD' is not a commit id")


def test_push_to_nobody_fails(place: Place) -> None:
    url = f"http://127.0.0.1:{closed_port()}/webhook"
    done = push(place, url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"gitops-hook: no answer from {url}: [Errno 111] Connection refused\n"


def test_push_to_what_is_no_address_says_so(place: Place) -> None:
    says(push(place, "hooks.example.com"), 1, "Invalid URL 'hooks.example.com'")


@pytest.mark.parametrize("mode", ["signature", "token", "hmac"])
def test_push_is_accepted_and_stored_without_a_cluster(place: Place, mode: str) -> None:
    place.settings["webhook"] = {"verify": mode}
    (place.secrets / "webhook-tokens").write_text("a-plain-token\n")
    daemon = place.serve()
    done = push(place, f"{daemon.url}/webhook")
    says(done, 0, "202", "accepted", "shop-01234567-")
    assert len(list(place.spool.glob("*.json"))) == 1
    assert daemon.ready() == 200


def test_push_says_why_it_was_not_accepted(place: Place) -> None:
    daemon = place.serve()
    ignored = place.run(
        *("push", "--app", "shop", "--ref", "refs/tags/v1", "--sha", COMMIT),
        *("--url", f"{daemon.url}/webhook"),
    )
    says(ignored, 0, "200", "TagPush")
    place.signing_tokens.write_bytes(b"whsec_" + base64.b64encode(b"x" * 32))
    other = place.directory / "other"
    other.mkdir()
    (other / "webhook-signing-tokens").write_bytes(TOKEN)
    refused = push(place, f"{daemon.url}/webhook", GITOPS_HOOK_SECRETS=str(other))
    says(refused, 1, "401", "does not match")


def test_the_daemon_starts_without_cluster_and_kubectl_and_says_what_it_waits_for(
    place: Place,
) -> None:
    place.without_tools()
    daemon = place.serve()
    assert daemon.ready() == 200
    line = eventually(lambda: daemon.find("watch lost"))
    assert "kubectl" in line["detail"]


def test_a_pipe_among_the_stored_pushes_does_not_keep_the_daemon_from_starting(
    place: Place,
) -> None:
    place.spool.mkdir()
    os.mkfifo(place.spool / "00-x.json")
    daemon = place.serve()
    assert deliver(daemon).status_code == 202


# The daemon among strangers

GITLAB_WAITS = 10.0  # seconds, after which GitLab takes a delivery for failed
FORGED = b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
FORGED += b"webhook-id: x\r\nwebhook-timestamp: 1\r\nwebhook-signature: v1,x\r\n"


def send(daemon: Daemon, body: bytes, name: str = "", seconds: float = 60.0) -> requests.Response:
    """Send a signed body, as GitLab would; fails when there is no answer after some seconds."""
    name = name or str(uuid.uuid4())
    stamp = str(int(time.time()))
    key = gitops_hook.decode_signing_token(TOKEN, 1)
    headers = {"Content-Type": "application/json", "webhook-id": name, "webhook-timestamp": stamp}
    signature = gitops_hook.sign(key, name.encode(), stamp.encode(), body)
    headers["webhook-signature"] = signature.decode()
    return requests.post(f"{daemon.url}/webhook", data=body, headers=headers, timeout=seconds)


def deliver(
    daemon: Daemon, *, name: str = "", seconds: float = 60.0, **more: Any
) -> requests.Response:
    """Send a push; with a name it is a delivery that comes again."""
    ref = "refs/heads/main" if name else f"refs/heads/{uuid.uuid4()}"
    project = {"git_http_url": str(daemon.log.parent / "shop.git")}
    push = {"object_kind": "push", "ref": ref, "after": COMMIT, "project": project | more}
    return send(daemon, json.dumps(push).encode(), name, seconds)


@pytest.fixture
def many_files() -> Iterator[None]:
    """Allow the test's own process some thousand connections."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], min(4096, before[1])), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("many_files")
def test_seventeen_hundred_connections_neither_fail_a_probe_nor_keep_a_push_waiting(
    place: Place,
) -> None:
    daemon = place.serve()
    with ExitStack() as opened:
        for number in range(1700):
            raw = opened.enter_context(daemon.connect())
            with suppress(ConnectionError):
                raw.sendall([b"", b"P", FORGED][number % 3])
            if number % 100 == 0:
                assert daemon.healthy()
                assert deliver(daemon, seconds=GITLAB_WAITS).status_code == 202
        for _ in range(5):
            assert daemon.healthy()
            assert deliver(daemon, seconds=GITLAB_WAITS).status_code == 202
        assert len([*Path(f"/proc/{daemon.process.pid}/fd").iterdir()]) < 350


@pytest.mark.usefixtures("many_files")
def test_four_hundred_bodies_of_3_mb_hold_no_more_than_64_mib_and_nobody_up(place: Place) -> None:
    daemon = place.serve()
    body = b"x" * 2_999_000
    seen = []
    with ExitStack() as opened:
        for number in range(400):
            raw = opened.enter_context(daemon.connect())
            with suppress(ConnectionError):
                raw.sendall(FORGED + b"Content-Length: 3000000\r\n\r\n" + body)
            if number % 20 == 0:
                seen.append(daemon.temporary())
                assert daemon.healthy()
                assert deliver(daemon).status_code == 202
    assert 40e6 < max(seen) < 75e6
    assert daemon.resident() < 150e6


def test_a_delivery_with_an_address_of_megabytes_leaves_nothing_behind(place: Place) -> None:
    daemon = place.serve()
    answers = [
        deliver(daemon, web_url=f"https://{number}/" + "x" * 5_200_000) for number in range(30)
    ]
    assert deliver(daemon).status_code == 202
    assert daemon.resident() < 150e6
    for answer in answers:
        assert (answer.status_code, answer.json()["reason"]) == (400, "Malformed")


def test_several_bodies_that_become_large_objects_are_understood_one_by_one(place: Place) -> None:
    daemon = place.serve()
    body = b"[" + b"[[[[]]]]," * 580_000 + b"0]"
    with ThreadPoolExecutor(4) as pool:
        answers = [*pool.map(lambda _: send(daemon, body), range(4))]
    assert {answer.json()["text"] for answer in answers} == {"the body is not a JSON object"}
    assert daemon.resident() < 400e6


def test_without_file_descriptors_it_still_answers_and_writes_little(place: Place) -> None:
    daemon = place.serve(files=64)
    with ExitStack() as opened:
        for _ in range(200):
            with suppress(ConnectionError):
                opened.enter_context(daemon.connect()).sendall(FORGED + b"Content-Length: 9\r\n")
        assert daemon.troubles() == []
        assert deliver(daemon).status_code == 202
        until = time.monotonic() + 3
        size = daemon.log.stat().st_size
        busy = daemon.seconds()
        while time.monotonic() < until:
            with suppress(OSError):
                opened.enter_context(daemon.connect())
        assert daemon.log.stat().st_size - size < 100_000
    assert daemon.troubles() == []
    assert daemon.seconds() - busy < 3


@pytest.mark.parametrize("left", ["all", "the push", "its line"])
def test_a_delivery_that_comes_again_after_kill_9_is_a_duplicate(place: Place, left: str) -> None:
    daemon = place.serve()
    assert deliver(daemon, name="one").json()["status"] == "accepted"
    daemon.process.kill()
    daemon.process.wait()
    (stored,) = place.spool.glob("*.json")
    daemon = place.serve()
    if left != "all":
        daemon.process.kill()
        daemon.process.wait()
        (stored if left == "its line" else place.spool / "accepted").unlink(missing_ok=True)
        daemon = place.serve()
    assert deliver(daemon, name="one").json()["status"] == "duplicate"
    assert len([*place.spool.glob("*.json")]) == (0 if left == "its line" else 1)
    assert deliver(daemon, name="two").json()["status"] == "accepted"


# Its end


def test_sigterm_makes_it_unready_at_once_and_lets_requests_end(place: Place) -> None:
    daemon = place.serve()
    port = int(daemon.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        head = b"POST /webhook HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
        slow.sendall(head)
        sent = time.monotonic()
        daemon.process.send_signal(signal.SIGTERM)
        eventually(lambda: daemon.ready() == 503, 1.0)
        slow.sendall(b"{}")
        assert slow.recv(1000).startswith(b"HTTP/1.1 401 ")
    assert daemon.process.wait(50) == 0
    assert time.monotonic() - sent < grace_period()
    assert daemon.find("stopped")


def test_a_second_signal_changes_nothing(place: Place) -> None:
    daemon = place.serve()
    for _ in range(3):
        daemon.process.send_signal(signal.SIGTERM)
        eventually(lambda: daemon.ready() == 503, 1.0)
    assert daemon.process.wait(50) == 0


def grace_period() -> float:
    """How long a kubelet waits, by the manifest."""
    deployment = yaml.safe_load((ROOT / "manifests/base/deployment.yaml").read_text())
    return float(deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"])


def test_an_interrupted_command_says_so(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place.config.write_text(yaml.safe_dump(place.settings))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/webhook"
        argv = ["push", "--app", "shop", "--ref", "main", "--sha", COMMIT, "--url", url]
        process = subprocess.Popen(
            argv_of(*argv),
            env=place.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        place.processes.append(process)
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=20)
    says(subprocess.CompletedProcess(argv, process.returncode, stdout, stderr), 1, "interrupted")


@pytest.mark.parametrize(
    ("run", "app"),
    [
        ("x-deadbeef", "x"),
        ("x-deadbeef-12345678", "x-deadbeef"),
        ("x-deadbeef-12345678-0123456789", "x-deadbeef"),
        ("x-12345678-0123456789", "x"),
        ("x-12345678", "x"),
        ("x-dead", "x"),
    ],
)
def test_a_run_is_of_the_app_whose_name_it_begins_with_also_where_names_look_like_runs(
    run: str, app: str
) -> None:
    config = gitops_hook.load_config("""
        apps:
        - {name: x, repository: https://git.example.com/x.git, build: {builder: none}}
        - {name: x-deadbeef, repository: https://git.example.com/y.git, build: {builder: none}}
        """)
    tools: Any = gitops_hook.Tools(None, config, None, None)  # type: ignore[arg-type]
    assert tools.app_of(run).name == app
