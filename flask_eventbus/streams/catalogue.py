"""Finds the streams of a service's subscriptions."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Set

import redis

from ..codec.records import before_moment, id_text
from ..config import SIGNAL_NAME
from ..logs import BoundedLog, get_logger
from ..routing.options import is_pattern, matches
from ..routing.subscriptions import NEW, Subscription
from ..transport.connection import milliseconds_of
from ..transport.connections import Context
from ..transport.keys import SEARCH, SINCE, TIME, grant_its_user
from ..transport.pipe import Pipe
from .alarms import too_many_names

logger = get_logger(__name__)

#: Maximum number of digits of a stored time in milliseconds.
MAX_DIGITS = 15

#: Seconds between two checks whether the subscribed streams and their receivers have changed.
CHECK_EVERY = 1.0


class Catalogue:
    """Finds the streams of the subscriptions, the id at which to start each, and the refused ones.

    Only the reading thread may call its methods, except :meth:`update`.

    :param grouped: True for subscriptions with a consumer group, False for those without.
    """

    def __init__(self, pipe: Pipe, context: Context, *, grouped: bool) -> None:
        self._pipe = pipe
        self._service = context.config.service
        self._timing = timing = context.timing
        self._keys = context.keys
        self._grouped = grouped
        self._receivers = context.registry.connected_to
        #: All subscriptions of the service to streams, by name or pattern.
        self._all: Mapping[str, Subscription] = {}
        #: Those with a group, or those without.
        self.subscribed: dict[str, Subscription] = {}
        #: The subscriptions that were divided last into patterns and names, and the two parts.
        self._divided: Mapping[str, Subscription] = {}
        self._by_pattern: dict[str, Subscription] = {}
        self._by_name: dict[str, Subscription] = {}
        #: Monotonic time at which to call :meth:`names` again.
        self.due_at = 0.0
        self._check_every = min(
            pipe.wait_at_most(CHECK_EVERY),
            timing.list_streams_every,
            timing.list_many_streams_every,
            timing.ask_stream_again_after,
        )
        #: Streams that this process does not read, because it has no receiver for them.
        self.without_receiver: frozenset[str] = frozenset()
        #: The alarm that the patterns match too many streams; ``None`` if they do not.
        self.alarm: str | None = None
        #: Streams that match the patterns.
        self._found: set[str] = set()
        #: Monotonic time of the next search, and the patterns of the last one.
        self._search_at = 0.0
        self._searched: set[str] = set()
        #: The names that the last search with these patterns listed; ``None`` if there was none, or
        #: if they are too many to keep.
        self._listed: frozenset[bytes] | None = None
        self._patterns: tuple[str, ...] = ()
        #: The first of these patterns that matches a stream, by the name of the stream.
        self._pattern_of: dict[str, str] = {}
        self._log = BoundedLog(logger)
        #: Time at which the service first subscribed to each pattern, in milliseconds since 1970.
        self._since: dict[str, int] = {}
        #: Streams that Redis refuses, with the errors.
        self.refused: dict[str, str] = {}
        #: Monotonic time after which refused streams are read again.
        self.ask_again_at = 0.0

    @property
    def alarms(self) -> dict[str, str]:
        """The alarm that patterns match too many streams, by pattern."""
        alarm = self.alarm
        return {} if alarm is None else dict.fromkeys(self._searched, alarm)

    def is_complete(self, read: Set[str]) -> bool:
        """Return True if each subscription is a known pattern, or a stream read or refused."""
        return self.subscribed.keys() <= read | self.refused.keys() | self._since.keys()

    def update(self, subscriptions: Mapping[str, Subscription]) -> None:
        """Use these subscriptions to streams from now on; any thread may call it."""
        self._all = subscriptions
        self.subscribed = {
            name: found for name, found in subscriptions.items() if found.group is self._grouped
        }
        self.due_at = 0.0

    def names(self) -> dict[str, Subscription]:
        """Return the subscribed streams, each with its subscription.

        A stream without a receiver in this process is listed in :attr:`without_receiver`. The
        result contains it if it is subscribed by name, and omits it if only a pattern matches it.

        :raises redis.ConnectionError: Redis is unreachable.
        """
        # Set first: another thread may subscribe in between, and sets it to 0.
        self.due_at = time.monotonic() + self._check_every
        subscribed = self.subscribed

        if subscribed is not self._divided:
            self._divided = subscribed
            names = [name for name in subscribed if not is_pattern(name)]
            self._by_name = {name: subscribed[name] for name in names}
            self._by_pattern = {
                name: subscribed[name] for name in subscribed if name not in self._by_name
            }

        patterns, streams = self._by_pattern, dict(self._by_name)

        if tuple(patterns) != self._patterns:
            self._patterns = tuple(patterns)
            self._pattern_of = {}
            self._listed = None

        if patterns and (
            time.monotonic() >= self._search_at or not self._searched.issuperset(patterns)
        ):
            self._search(patterns)

        for name in sorted(self._found - self._all.keys()):
            pattern = self._first_match(name)

            if pattern is not None:
                self._pattern_of[name] = pattern
                streams[name] = patterns[pattern]

        without = frozenset(name for name in streams if not self._receivers(name))
        self._report(without - self.without_receiver, self.without_receiver - without)
        self.without_receiver = without

        if not without:
            return streams

        return {
            name: found
            for name, found in streams.items()
            if name not in without or found.name == name
        }

    def _report(self, new: Set[str], over: Set[str]) -> None:
        text = (
            "Nothing here receives %r, so this process of %r does not read its stream. The events "
            "wait for a process with a receiver. Connect one with @bus.on(%r), add its module to "
            "'EVENTBUS_RECEIVERS', or remove the name from 'EVENTBUS_SUBSCRIBE'."
        )

        for name in sorted(new):
            self._log.error(f"without {name}", text, name, self._service, name)

        text = "%r has a receiver here now, or is no longer subscribed."

        for name in sorted(over):
            self._log.over(f"without {name}", text, name)

    def refuse(
        self, name: str, reason: Exception, advice: str, *, level: int = logging.ERROR
    ) -> None:
        """Note that Redis refuses a stream, and log each refusal once."""
        self.ask_again_at = time.monotonic() + self._timing.ask_stream_again_after

        if self.refused.get(name) == str(reason):
            return

        self.refused = {**self.refused, name: str(reason)}
        write = self._log.error if level == logging.ERROR else self._log.warning
        text = "Redis refuses to let %r read the stream of %r: %s. %s"
        extra = {"signal": name, "service": self._service}
        write(f"refused {name}", text, self._service, name, reason, advice, extra=extra)

    def grant(self, name: str) -> None:
        """Note that Redis lets this process read a stream; log it after a refusal."""
        if name in self.refused:
            self.refused = {known: self.refused[known] for known in self.refused if known != name}
            text = "Redis lets %r read the stream of %r again."
            extra = {"signal": name, "service": self._service}
            self._log.over(f"refused {name}", text, self._service, name, extra=extra)

    def start_of(self, name: str, subscription: Subscription) -> str:
        """Return the id at which a new group of a stream starts."""
        if subscription.start == NEW and is_pattern(subscription.name):
            # The first events of the stream may be older than the search that found it.
            return id_text(before_moment(self._since[subscription.name]))

        return subscription.start

    def _search(self, patterns: Collection[str]) -> None:
        """Search for streams that match the patterns. If Redis refuses, log it and go on."""
        try:
            self._store_since([name for name in patterns if name not in self._since])
            names = self._pipe.ask("SMEMBERS", self._keys.names)
        except redis.ResponseError as error:
            # Streams subscribed by name do not depend on the search.
            text = (
                "Redis refuses to list the streams for %s: %s. Patterns do not find new streams. "
                "%s Delete these keys if another program wrote them."
            )
            since = self._keys.since(self._service)
            advice = grant_its_user({self._keys.names: SEARCH, since: SINCE, "": TIME})
            shown = ", ".join(patterns)
            self._log.once("refused", text, shown, error, advice, level=logging.ERROR)
        else:
            self._log.over("refused", "Redis lists the streams for %s again.", ", ".join(patterns))
            self._add_matching(frozenset(names))

        # Not if the connection was lost: the next call searches again.
        timing, self._searched = self._timing, set(patterns)
        self._search_at = time.monotonic() + (
            timing.list_streams_every if self.alarm is None else timing.list_many_streams_every
        )

    def _add_matching(self, listed: frozenset[bytes]) -> None:
        """Add the streams among all names that match the patterns."""
        # Almost every search lists what the last one listed.
        if listed == self._listed:
            return

        names = {name.decode(errors="replace") for name in listed}
        valid = filter(SIGNAL_NAME.fullmatch, names)
        self._add({name for name in valid if self._first_match(name) is not None})
        self._listed = listed if len(listed) <= self._timing.max_remembered else None

    def _first_match(self, name: str) -> str | None:
        """Return the first pattern that matches ``name``."""
        known = self._pattern_of.get(name)
        return known or next((each for each in self._patterns if matches(each, name)), None)

    def _add(self, found: set[str]) -> None:
        """Add streams to those that are read, up to the limit; known streams stay."""
        alarm = too_many_names(self._keys.names, len(found), self._timing.max_names)

        if alarm is not None and self.alarm is None:
            self._log.error("names", "%s", alarm)

        if alarm is None and self.alarm is not None:
            # The names of streams that do not exist were removed.
            self._found &= found
            self._log.over("names", "Patterns match all their streams again.")

        self.alarm = alarm and str(alarm)
        room = max(0, self._timing.max_names - len(self._found))
        # Known streams stay even if they are not found: Redis may have been flushed.
        self._found |= set(sorted(found - self._found)[:room])

    def _store_since(self, patterns: list[str]) -> None:
        key = self._keys.since(self._service)

        for pattern in patterns:
            now = milliseconds_of(self._pipe.ask("TIME"))
            self._pipe.ask("HSETNX", key, pattern, now)
            since = self._pipe.ask("HGET", key, pattern)
            # The value is missing after a flush, and invalid if another program wrote it.
            is_valid = since and since.isdigit() and len(since) <= MAX_DIGITS
            self._since[pattern] = int(since) if is_valid else now
