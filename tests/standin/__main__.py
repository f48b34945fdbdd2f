"""`python -m tests.standin --directory DIR`: a stand-in cluster until SIGTERM or SIGINT."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import signal
import sys
import threading
from pathlib import Path

from tests.standin.cluster import Cluster


def main(arguments: list[str] | None = None) -> int:
    """Run a cluster; prints one JSON line when it is ready."""
    parser = argparse.ArgumentParser(prog="tests.standin", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="where everything lies")
    parser.add_argument("--manifests", type=Path, nargs="*", default=[], help="YAML to begin with")
    parser.add_argument("--speed", type=float, default=1.0, help="divides durations of the API's")
    parser.add_argument(
        "--image", action="append", default=[], metavar="NAME=COMMAND", help="an image to store"
    )
    parser.add_argument(
        "--account", action="append", default=[], metavar="NAMESPACE/NAME", help="kubeconfig for it"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="standin: %(message)s")
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with Cluster(options.directory.resolve(), speed=options.speed) as cluster:
        for path in options.manifests:
            cluster.load_yaml(path.read_text(encoding="utf-8"))
        for image in options.image:
            name, _, command = image.partition("=")
            cluster.images.add(name, entrypoint=shlex.split(command))
        print(json.dumps(_addresses(cluster, options.account)), flush=True)
        ended.wait()
    return 0


def _addresses(cluster: Cluster, more_accounts: list[str]) -> dict[str, object]:
    accounts = set(more_accounts) | {
        f"{item['metadata']['namespace']}/{item['metadata']['name']}"
        for item in cluster.store.list("serviceaccounts")
        if item["metadata"]["name"] != "default"
    }
    return {
        "server": cluster.api.url,
        "kubeconfig": str(cluster.kubeconfig()),
        "accounts": {account: str(cluster.kubeconfig(account)) for account in sorted(accounts)},
        "directory": str(cluster.directory),
    }


if __name__ == "__main__":
    sys.exit(main())
