"""What the cluster adds to objects, and refuses, before they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.standin.defaults import apply_defaults
from tests.standin.errors import invalid

if TYPE_CHECKING:
    from tests.standin.store import Store


class ClusterHooks:
    """Defaults, validation and admission of the stand-in, as the store calls them."""

    def prepare(
        self, store: Store, resource: str, new: dict[str, Any], old: dict[str, Any] | None
    ) -> None:
        """Fill defaults and what admission sets, in place."""
        apply_defaults(resource, new)

    def check(
        self, store: Store, resource: str, new: dict[str, Any], old: dict[str, Any] | None
    ) -> None:
        """Raise ApiError where validation or admission refuses."""

    def written(
        self,
        store: Store,
        resource: str,
        new: dict[str, Any] | None,
        old: dict[str, Any] | None,
    ) -> None:
        """Keep what follows from a change."""


def refuse_nameless(resource: str) -> None:
    """Raise what an object without a name gets."""
    text = "name or generateName is required"
    raise invalid(
        resource, "", [("metadata.name", "FieldValueRequired", f"Required value: {text}")]
    )


def warnings(store: Store, resource: str, obj: dict[str, Any]) -> list[str]:
    """What the server says about an object that it has stored all the same."""
    return []
