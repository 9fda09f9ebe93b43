"""Which streams a service reads: those of the names it subscribed to, and of its patterns."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Set

import redis

from ..codec.entry_ids import before_moment, id_text
from ..config import Config
from ..counters import BoundedLog
from ..logs import get_logger
from ..names import SIGNAL_NAME
from ..routing.options import is_pattern, matches
from ..routing.subscriptions import NEW, Subscription
from ..transport.keys import StreamKeys
from ..transport.pipe import Pipe
from .alarms import MOST_NAMES, too_many_names

logger = get_logger(__name__)

#: Digits of a moment in milliseconds, at most: enough for 30,000 years.
MOST_DIGITS = 15

#: Seconds between looks for streams that patterns stand for.
LOOK = 2.0

#: Seconds between them while there are more names than patterns stand for.
SELDOM = 30.0


class Catalogue:
    """Finds the streams of subscriptions, and where each begins.

    :param subscriptions: what the service hears; asked for whenever it may have changed.
    :param grouped: whether this is about what the workers share, or about what each hears.
    :param has_receivers: True if a receiver of a signal is connected in this process.
    """

    def __init__(
        self,
        pipe: Pipe,
        *,
        config: Config,
        keys: StreamKeys,
        subscriptions: Callable[[], Mapping[str, Subscription]],
        grouped: bool,
        has_receivers: Callable[[str], bool],
    ) -> None:
        self._pipe = pipe
        self._config = config
        self._keys = keys
        self._subscriptions = subscriptions
        self._grouped = grouped
        self._has_receivers = has_receivers
        #: The streams that this process leaves to others: it has no receiver for them.
        self.without_receiver: frozenset[str] = frozenset()
        #: Why not every stream that a pattern stands for is read.
        self.alarm: str | None = None
        self._found: set[str] = set()
        self._looked = 0.0
        #: The patterns that it was looked for.
        self._asked: set[str] = set()
        self._log = BoundedLog(logger)
        #: Since when the service has subscribed to each pattern, in milliseconds since 1970.
        self._since: dict[str, int] = {}

    @property
    def patterns(self) -> Set[str]:
        """The patterns of which it is known since when they are subscribed."""
        return self._since.keys()

    @property
    def alarms(self) -> dict[str, str]:
        """Why not every stream that a pattern stands for is read, by the patterns."""
        alarm = self.alarm
        return {} if alarm is None else dict.fromkeys(self._asked, alarm)

    def wanted(self) -> dict[str, Subscription]:
        """The subscriptions whose streams are read, by name or pattern."""
        return {
            name: found
            for name, found in self._subscriptions().items()
            if found.via != "channel" and found.group is self._grouped
        }

    def names(self) -> dict[str, Subscription]:
        """Return the streams subscribed, each with its subscription.

        A name that has no receiver here is among them, and in :attr:`without_receiver`; one that
        only a pattern stands for is left out then.

        :raises redis.ConnectionError: Redis is away.
        """
        wanted = self.wanted()
        patterns = [name for name in wanted if is_pattern(name)]

        if patterns:
            self._try_to_look(patterns)

        every = self._subscriptions()
        names = {name: found for name, found in wanted.items() if not is_pattern(name)}

        for name in sorted(self._found - every.keys()):
            pattern = next((found for found in patterns if matches(found, name)), None)

            if pattern is not None:
                names[name] = wanted[pattern]

        without = frozenset(name for name in names if not self._has_receivers(name))

        if without != self.without_receiver:
            self._report(without - self.without_receiver, self.without_receiver - without)
            self.without_receiver = without

        return {
            name: found
            for name, found in names.items()
            if name not in without or found.name == name
        }

    def _report(self, new: Set[str], over: Set[str]) -> None:
        for name in sorted(new):
            self._log.error(
                f"without {name}",
                "Nothing here receives %r, so this process of %r does not read its stream: the "
                "events wait for a process that has a receiver. Connect one with @bus.on(%r), "
                "name its module in 'EVENTBUS_RECEIVERS', or take the name out of "
                "'EVENTBUS_SUBSCRIBE'.",
                name,
                self._config.service,
                name,
            )

        for name in sorted(over):
            text = "%r has a receiver here now, or is not subscribed any more."
            self._log.over(f"without {name}", text, name)

    def start_of(self, name: str, subscription: Subscription) -> str:
        """Where the group of a stream begins that has none yet."""
        if subscription.start == NEW and is_pattern(subscription.name):
            # Its first events may be older than the look that found it.
            return id_text(before_moment(self._since[subscription.name]))

        return subscription.start

    def _try_to_look(self, patterns: list[str]) -> None:
        try:
            self._look(patterns)
            self._log.over(
                "refused", "Redis tells again which streams there are for %s.", ", ".join(patterns)
            )
        except redis.ResponseError as error:
            # What is subscribed by name does not depend on it.
            self._looked = time.monotonic()
            self._log.once(
                "refused",
                "Redis refuses to tell which streams there are for %s: %s. Patterns hear no stream "
                "that is not known yet. Grant the user of %r (+smembers +hsetnx +hget +time ~%s "
                "~%s) in the ACL, or remove what another program keeps there.",
                ", ".join(patterns),
                error,
                self._config.service,
                self._keys.names,
                self._keys.since(self._config.service),
                level=logging.ERROR,
            )

    def _look(self, patterns: list[str]) -> None:
        pause = LOOK if self.alarm is None else SELDOM

        if time.monotonic() - self._looked < pause and self._asked >= set(patterns):
            return

        self._asked = set(patterns)

        self._remember([name for name in patterns if name not in self._since])
        self._looked = time.monotonic()
        key = self._keys.names
        found = {name.decode(errors="replace") for name in self._pipe.ask("SMEMBERS", key)}
        self._note(
            {
                name
                for name in found
                if SIGNAL_NAME.fullmatch(name) and any(matches(each, name) for each in patterns)
            }
        )

    def _note(self, found: set[str]) -> None:
        """Add streams to those that are read, up to a bound; the ones that are read stay."""
        alarm = too_many_names(self._keys.names, len(found))

        if alarm is not None and self.alarm is None:
            self._log.error("names", "%s", alarm)

        if alarm is None and self.alarm is not None:
            # Somebody removed names that belong to no stream.
            self._found &= found
            self._log.over("names", "Patterns stand for every stream of theirs again.")

        self.alarm = alarm and str(alarm)
        room = max(0, MOST_NAMES - len(self._found))
        # What was there is still looked for: Redis may have been flushed.
        self._found |= set(sorted(found - self._found)[:room])

    def _remember(self, patterns: list[str]) -> None:
        key = self._keys.since(self._config.service)

        for pattern in patterns:
            seconds, micro = self._pipe.ask("TIME")
            now = int(seconds) * 1000 + int(micro) // 1000
            self._pipe.ask("HSETNX", key, pattern, now)
            since = self._pipe.ask("HGET", key, pattern)
            # Redis may have been flushed this moment, or somebody wrote something else there.
            is_moment = since and since.isdigit() and len(since) <= MOST_DIGITS
            self._since[pattern] = int(since) if is_moment else now
