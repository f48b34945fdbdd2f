"""What the cluster adds to objects, and refuses, before they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.standin.store import Store


class ClusterHooks:
    """Defaults, validation and admission of the stand-in, as the store calls them."""

    def prepare(
        self, store: Store, resource: str, new: dict[str, Any], old: dict[str, Any] | None
    ) -> None:
        """Fill defaults and what admission sets, in place."""

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
