"""pods/log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.standin.asked import TRUE, Asked
from tests.standin.errors import bad_request, not_found
from tests.standin.httpd import Closed, Response
from tests.standin.store import Store

Object = dict[str, Any]
# (namespace, pod, container, previous, tail) -> what the container has written
LogSource = Callable[[str, str, str, bool, int | None], bytes]
FOLLOW_EVERY = 0.2
_PULLING = ("ErrImagePull", "ImagePullBackOff")
_LISTS = ("initContainers", "containers", "ephemeralContainers")


def _containers(pod: Object) -> list[str]:
    return [item["name"] for field in _LISTS for item in pod["spec"].get(field) or ()]


def _chosen(pod: Object, asked: Asked) -> str:
    """The container that is meant; ApiError 400 when it is none or not clear."""
    wanted, name = asked.query.get("container"), pod["metadata"]["name"]
    if wanted:
        if wanted not in _containers(pod):
            raise bad_request(f"container {wanted} is not valid for pod {name}")
        return wanted
    main = [item["name"] for item in pod["spec"]["containers"]]
    if len(main) == 1 and not pod["spec"].get("initContainers"):
        return str(main[0])
    first = [item["name"] for item in pod["spec"].get("initContainers") or ()]
    choices = f"choose one of: [{' '.join(main)}]"
    if first:
        choices += f" or one of the init containers: [{' '.join(first)}]"
    raise bad_request(f"a container name must be specified for pod {name}, {choices}")


def _status(pod: Object, container: str) -> Object | None:
    status = pod.get("status", {})
    for field in ("initContainerStatuses", "containerStatuses"):
        for item in status.get(field) or ():
            if item["name"] == container:
                return dict(item)
    return None


def _check_started(pod: Object, container: str, *, previous: bool) -> bool:
    """Whether there can be a log; ApiError 400 when the container has not got that far."""
    if not pod["spec"].get("nodeName"):
        return False
    name, status = pod["metadata"]["name"], _status(pod, container)
    last = ((status or {}).get("lastState") or {}).get("terminated")
    if previous:
        if last is None:
            raise bad_request(
                f'previous terminated container "{container}" in pod "{name}" not found'
            )
        return True
    waiting = ((status or {}).get("state") or {}).get("waiting")
    if status is None:
        waiting = {"reason": "ContainerCreating"}
    if waiting is None or last is not None:
        return True
    reason = waiting.get("reason") or "ContainerCreating"
    text = "trying and failing to pull image" if reason in _PULLING else reason
    raise bad_request(f'container "{container}" in pod "{name}" is waiting to start: {text}')


def serve_log(store: Store, asked: Asked, source: LogSource | None) -> Response | None:
    """A container's log, at once or as it grows."""
    stored = store.find_stored("pods", asked.namespace, asked.name)
    if stored is None:
        raise not_found("pods", asked.name)
    container = _chosen(stored.object, asked)
    previous = asked.query.get("previous") in TRUE
    tail = asked.query.get("tailLines")
    started = _check_started(stored.object, container, previous=previous)
    read = source if source and started else _nothing
    lines = int(tail) if tail else None
    if asked.query.get("follow") in TRUE and started:
        _follow(store, asked, container, read, lines)
        return None
    found = read(asked.namespace, asked.name, container, previous, lines)
    limit = asked.query.get("limitBytes")
    return Response(200, found[: int(limit)] if limit else found, "text/plain")


def _nothing(*_: object) -> bytes:
    return b""


def _follow(store: Store, asked: Asked, container: str, read: LogSource, tail: int | None) -> None:
    connection = asked.http.connection
    connection.begin_stream("text/plain")
    where = (asked.namespace, asked.name, container, False)
    whole = read(*where, None)
    first = read(*where, tail) if tail is not None else whole
    shown = len(whole)
    if first:
        connection.write_chunk(first)
    while not connection.gone.wait(FOLLOW_EVERY):
        stored = store.find_stored("pods", asked.namespace, asked.name)
        ended = stored is None or _has_ended(stored.object, container)
        whole = read(*where, None)
        if len(whole) > shown:
            connection.write_chunk(whole[shown:])
            shown = len(whole)
        if ended:
            connection.stop_watching()
            connection.end_stream()
            return
    raise Closed


def _has_ended(pod: Object, container: str) -> bool:
    state = (_status(pod, container) or {}).get("state") or {}
    return "terminated" in state
