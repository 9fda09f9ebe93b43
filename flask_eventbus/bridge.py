"""Publishes what a signal sends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .errors import PayloadError
from .namespace import Outbound
from .routes import Route


class Bridge(Outbound):
    """Publishes a signal: one per signal, name on the wire, and node."""

    def __init__(
        self,
        name: str,
        route: Route,
        publish: Callable[[str, Mapping[str, Any], Route], None],
        owns: Callable[[Any], bool],
    ) -> None:
        self.name = name
        self.route = route
        self._publish = publish
        self._owns = owns

    def __call__(self, sender: Any, /, **payload: Any) -> None:
        """Publish one emission, if it is one of this node's.

        :raises PayloadError: a value cannot travel.
        :raises PublishError: Redis did not take it, and the route or the policy is to tell.
        :raises HopLimitError: the chain of causes is too long.
        """
        if not self._owns(sender):
            return

        found = self._extract(sender, payload)

        if found is not None:
            self._publish(self.name, found, self.route)

    async def publish(self, sender: Any, /, **payload: Any) -> None:
        """Publish one emission, as :meth:`__call__` does."""
        self(sender, **payload)

    def _extract(self, sender: Any, payload: dict[str, Any]) -> Mapping[str, Any] | None:
        if self.route.payload is None:
            return payload

        found = self.route.payload(sender, **payload)

        if found is None or isinstance(found, Mapping):
            return found

        raise PayloadError(
            f"The payload function of {self.name!r} returned {type(found).__name__}. "
            "Return a mapping, or None to leave this emission unpublished."
        )
