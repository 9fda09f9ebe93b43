"""What one connection hears: which subscriptions were asked for, confirmed and refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from ..logs import get_logger
from ..routing.options import is_pattern, matches
from ..routing.subscriptions import Subscription
from ..transport.connections import OUTAGE
from ..transport.keys import ChannelKeys
from .reader import ChannelReader, Frame

logger = get_logger(__name__)


class Hearing:
    """Asks for a service's subscriptions, and notes what Redis answers.

    Any thread may ask; the one that reads notes.

    :param subscriptions: what to hear, by name; asked for whenever it may have changed.
    """

    def __init__(
        self,
        *,
        service: str,
        keys: ChannelKeys,
        reader: ChannelReader,
        subscriptions: Callable[[], Mapping[str, Subscription]],
    ) -> None:
        self._service = service
        self._keys = keys
        self._reader = reader
        self._subscriptions = subscriptions
        #: Guards what follows, and is notified whenever any of it changes.
        self.changed = threading.Condition()
        self._open = False
        self._asked: set[str] = set()
        self._answered: set[str] = set()
        self._confirmed: set[str] = set()
        #: Confirmed patterns, in the order of the subscriptions.
        self._patterns: tuple[Subscription, ...] = ()
        self._refused: dict[str, str] = {}

    @property
    def complete(self) -> bool:
        """Whether everything subscribed is confirmed."""
        return self._open and _holds(self._confirmed, self._subscriptions())

    @property
    def settled(self) -> bool:
        """Whether everything subscribed is confirmed or refused."""
        return self._open and _holds(self._answered, self._subscriptions())

    @property
    def names(self) -> list[str]:
        """What is subscribed, confirmed or not."""
        return sorted(self._subscriptions())

    @property
    def refused(self) -> dict[str, str]:
        """Subscriptions that Redis refuses, with its reasons."""
        return dict(self._refused)

    def open(self) -> None:
        """Begin with a new connection: ask for everything."""
        with self.changed:
            self._open = True

        self.ask()

    def close(self) -> None:
        """The connection is gone, and everything with it."""
        with self.changed:
            self._open = False
            self._asked.clear()
            self._answered.clear()
            self._confirmed.clear()
            self._patterns = ()
            self.changed.notify_all()

    def ask(self) -> None:
        """Ask for what was subscribed since; nothing without a connection.

        :raises redis.ConnectionError: the connection is lost.
        """
        with self.changed:
            if not self._open:
                return

            new = self._subscriptions().keys() - self._asked
            self._asked |= new
            self._request(sorted(new))

    def ask_again(self) -> None:
        """Ask once more for what was refused: an ACL may have changed.

        :raises redis.ConnectionError: the connection is lost.
        """
        with self.changed:
            self._asked -= self._refused.keys()

        self.ask()

    def refresh(self) -> None:
        """Ask for what was subscribed since, in any thread."""
        try:
            self.ask()
        except OUTAGE as error:
            # The reading thread meets the same loss and asks for everything anew.
            logger.debug("Subscribing waits for the next connection: %s", error)

    def note(self, frame: Frame) -> None:
        """Take up an answer of Redis."""
        if frame.kind not in ("subscribe", "psubscribe", "refused"):
            return

        name = self._keys.name(_as_bytes(frame.subscribed))

        with self.changed:
            if name not in self._asked:
                return

            if frame.kind == "refused":
                self._refuse(name, frame.body.decode(errors="replace"))
            else:
                self._confirm(name)

            self._answered.add(name)
            self.changed.notify_all()

    def subscription_of(self, frame: Frame, name: str) -> Subscription | None:
        """The subscription that handles the event ``name`` in a frame, if it is to be handled.

        Redis delivers once per subscription that fits. One of those it has confirmed is to
        count: that of the name itself, else the first pattern.
        """
        if frame.kind == "message":
            return self._subscriptions().get(name)

        if name in self._confirmed:
            return None

        pattern = next((found for found in self._patterns if matches(found.name, name)), None)
        is_its = pattern and pattern.name == self._keys.name(_as_bytes(frame.subscribed))
        return pattern if is_its else None

    def _request(self, names: Sequence[str]) -> None:
        plain = [self._keys.key(name) for name in names if not is_pattern(name)]
        patterns = [self._keys.key(name) for name in names if is_pattern(name)]
        self._reader.subscribe(plain, patterns=False)
        self._reader.subscribe(patterns, patterns=True)

    def _confirm(self, name: str) -> None:
        self._confirmed.add(name)
        was_refused = self._refused.pop(name, None)

        if was_refused is not None:
            logger.warning(
                "Redis lets %r listen to %r again.",
                self._service,
                name,
                extra={"signal": name, "service": self._service},
            )

        if is_pattern(name):
            self._patterns = tuple(
                found
                for found in self._subscriptions().values()
                if is_pattern(found.name) and found.name in self._confirmed
            )

    def _refuse(self, name: str, reason: str) -> None:
        if name in self._refused:
            return

        self._refused[name] = reason
        logger.error(
            "Redis refuses to let %r listen to %r: %s. This service does not hear it. Grant its "
            "user (+%s &%s) in the ACL.",
            self._service,
            name,
            reason,
            "psubscribe" if is_pattern(name) else "subscribe",
            self._keys.key(name),
            extra={"signal": name, "service": self._service},
        )


def _holds(names: set[str], subscriptions: Mapping[str, Subscription]) -> bool:
    return len(names) >= len(subscriptions) and subscriptions.keys() <= names


def _as_bytes(key: str | bytes) -> bytes:
    return key.encode() if isinstance(key, str) else key
