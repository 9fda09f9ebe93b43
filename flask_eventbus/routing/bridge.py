"""Publishes what a signal sends."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..counters import BoundedLog
from ..errors import PayloadError
from ..logs import get_logger, text_of
from .bus_signal import BusSignal, Outbound
from .routes import Route

logger = get_logger(__name__)


class Bridge(Outbound):
    """Publishes a signal: one per signal, name on the wire, and node."""

    def __init__(
        self,
        name: str,
        route: Route,
        publish: Callable[[str, Mapping[str, Any], Route], None],
        publish_async: Callable[[str, Mapping[str, Any], Route], Awaitable[None]],
        owns: Callable[[Any], bool],
    ) -> None:
        self.name = name
        self.route = route
        self._publish = publish
        self._publish_async = publish_async
        self._owns = owns
        self._log = BoundedLog(logger)

    def __call__(self, sender: Any, /, **payload: Any) -> None:
        """Publish one emission, if it is one of this node's.

        A signal of others may be sent while an exception is on its way, as
        ``got_request_exception`` is. An error of the bus would take its place, so it is logged.

        :raises PayloadError: a value cannot travel.
        :raises PublishError: Redis did not take it, and the route or the policy is to tell.
        :raises HopLimitError: the chain of causes is too long.
        """
        with self._keeping_program_error():
            found = self._extract(sender, payload)

            if found is not None:
                self._publish(self.name, found, self.route)

    async def publish(self, sender: Any, /, **payload: Any) -> None:
        """Publish one emission, as :meth:`__call__` does; the event loop goes on meanwhile."""
        with self._keeping_program_error():
            found = self._extract(sender, payload)

            if found is not None:
                await self._publish_async(self.name, found, self.route)

    @contextmanager
    def _keeping_program_error(self) -> Iterator[None]:
        program_error = sys.exception() if self._is_foreign else None

        try:
            yield
        except Exception as error:
            if program_error is None:
                raise

            self._log.error(
                "not published",
                "%r was sent while %s was on its way, and was not published: %s: %s",
                self.name,
                type(program_error).__name__,
                type(error).__name__,
                text_of(error),
                exc_info=error,
            )

    @property
    def _is_foreign(self) -> bool:
        return self.route.signal is not None and not isinstance(self.route.signal, BusSignal)

    def _extract(self, sender: Any, payload: dict[str, Any]) -> Mapping[str, Any] | None:
        """The payload of an emission; ``None`` if it is not this node's to publish."""
        if not self._owns(sender):
            return None

        if self.route.payload is None:
            return payload

        found = self.route.payload(sender, **payload)

        if found is None or isinstance(found, Mapping):
            return found

        raise PayloadError(
            f"The payload function of {self.name!r} returned {type(found).__name__}. "
            "Return a mapping, or None to leave this emission unpublished."
        )
