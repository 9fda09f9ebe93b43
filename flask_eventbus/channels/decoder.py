"""What becomes of one body from a channel: an event for the receivers, or a number that grows."""

from __future__ import annotations

from collections.abc import Callable, Container

from ..codec.codec import Codec
from ..config import Config
from ..counters import BoundedLog, Counters
from ..errors import DecodeError
from ..event import Event
from ..lifecycle import tell
from ..logs import get_logger
from ..receivers.conflicts import Conflicts
from ..routing.subscriptions import Subscription
from ..signals import event_rejected, events_missed
from .sequences import Finding, Sequences

logger = get_logger(__name__)

#: Bytes of a rejected body that are logged.
SAMPLE = 64


class Intake:
    """Decodes and checks what came, and lets through what this node is to handle.

    :param node: this node's name; its own events are echoes.
    :param issued: how many events this node has made.
    :param siblings: nodes of this process whose local receivers ran at ``send()``.
    """

    def __init__(
        self,
        *,
        config: Config,
        codec: Codec,
        counters: Counters,
        node: str,
        issued: Callable[[], int],
        siblings: Container[str],
    ) -> None:
        self._config = config
        self._codec = codec
        self._counters = counters
        self._node = node
        self._issued = issued
        self._siblings = siblings
        self._log = BoundedLog(logger)
        self._sequences = Sequences()
        self._conflicts = Conflicts(config=config, counters=counters)

    def event(self, name: str, body: bytes, subscription: Subscription) -> tuple[Event, int] | None:
        """The event that came on the channel of ``name``, if it is one to handle.

        :return: the event, and the bytes of memory that it takes while it waits.
        """
        try:
            event, size = self._codec.decode_to_wait(body)
            self._check(event, name)
        except DecodeError as error:
            self._reject(name, body, error)
            return None

        found = self._sequences.observe(event, body)

        if found is Finding.REPEATED:
            self._counters.add("duplicates")
            return None
        if found is Finding.CONFLICT:
            self._conflicts.report(event)
        elif found:
            self._count_missed(event, found)

        return (event, size) if self._wanted(event, subscription) else None

    def _check(self, event: Event, name: str) -> None:
        if event.name != name:
            raise DecodeError(
                f"The event {event.id} on the channel of {name!r} says it is {event.name!r}.",
                reason="wrong_channel",
            )

        if event.node != self._node:
            return

        number = int(event.id.rpartition("-")[2])

        if event.source != self._config.service or number > self._issued():
            raise DecodeError(
                f"The event {event.id} from {event.source!r} bears this node's name, but this "
                "node did not make it.",
                reason="forged_source",
            )

    def _wanted(self, event: Event, subscription: Subscription) -> bool:
        if event.node == self._node or event.node in self._siblings:
            if not subscription.echo:
                self._counters.add("echoes")

            return subscription.echo

        if not subscription.hears(event.source):
            self._counters.add("filtered")
            return False

        return True

    def _reject(self, name: str, body: bytes, error: DecodeError) -> None:
        self._counters.add("rejected")
        self._counters.add(f"rejected_{error.reason}")
        self._log.warning(
            f"rejected {error.reason}",
            "Bytes on the channel of %r are rejected (%s): %s They begin with %r.",
            name,
            error.reason,
            error,
            body[:SAMPLE],
            extra={"signal": name, "service": self._config.service},
        )
        tell(event_rejected, self._config.service, name=name, reason=error.reason, error=error)

    def _count_missed(self, event: Event, count: int) -> None:
        self._counters.add("missed", count)
        self._log.warning(
            f"missed {event.name}",
            "%d events of %r from %r (node %s) never arrived; the next one is %s.",
            count,
            event.name,
            event.source,
            event.node,
            event.id,
            extra={**event.fields, "service": self._config.service},
        )
        tell(
            events_missed,
            self._config.service,
            name=event.name,
            source=event.source,
            node=event.node,
            count=count,
        )
