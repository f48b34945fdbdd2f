"""What the shop does beside its front page: `python worker.py` counts the stock."""

from __future__ import annotations

import signal
import threading

SECONDS = 5.0


def main() -> None:
    """Count until SIGTERM."""
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    rounds = 0
    while not over.wait(SECONDS):
        rounds += 1
        print(f"the stock is counted for the {rounds}. time", flush=True)


if __name__ == "__main__":
    main()
