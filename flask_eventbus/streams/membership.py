"""Finds the streams of a service's subscriptions, and joins the consumer group on each."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence, Set

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
from .alarms import Trims, too_many_names
from .decoder import Duplicates, Intake
from .group import Group, GroupGoneError
from .reclaim import Reclaimer

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
        patterns = {name: found for name, found in subscribed.items() if is_pattern(name)}

        if patterns and (
            time.monotonic() >= self._search_at or not self._searched.issuperset(patterns)
        ):
            self._search(patterns)

        streams = {name: found for name, found in subscribed.items() if not is_pattern(name)}

        for name in sorted(self._found - self._all.keys()):
            pattern = next((found for found in patterns if matches(found, name)), None)

            if pattern is not None:
                streams[name] = patterns[pattern]

        without = frozenset(name for name in streams if not self._receivers(name))
        self._report(without - self.without_receiver, self.without_receiver - without)
        self.without_receiver = without
        return {
            name: found
            for name, found in streams.items()
            if name not in without or found.name == name
        }

    def _report(self, new: Set[str], over: Set[str]) -> None:
        for name in sorted(new):
            self._log.error(
                f"without {name}",
                "Nothing here receives %r, so this process of %r does not read its stream. The "
                "events wait for a process with a receiver. Connect one with @bus.on(%r), "
                "add its module to 'EVENTBUS_RECEIVERS', or remove the name from "
                "'EVENTBUS_SUBSCRIBE'.",
                name,
                self._service,
                name,
            )

        for name in sorted(over):
            text = "%r has a receiver here now, or is no longer subscribed."
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
        write(
            f"refused {name}",
            "Redis refuses to let %r read the stream of %r: %s. %s",
            self._service,
            name,
            reason,
            advice,
            extra={"signal": name, "service": self._service},
        )

    def grant(self, name: str) -> None:
        """Note that Redis lets this process read a stream; log it after a refusal."""
        if name in self.refused:
            self.refused = {known: self.refused[known] for known in self.refused if known != name}
            self._log.over(
                f"refused {name}",
                "Redis lets %r read the stream of %r again.",
                self._service,
                name,
                extra={"signal": name, "service": self._service},
            )

    def start_of(self, name: str, subscription: Subscription) -> str:
        """Return the id at which a new group of a stream starts."""
        if subscription.start == NEW and is_pattern(subscription.name):
            # The first events of the stream may be older than the search that found it.
            return id_text(before_moment(self._since[subscription.name]))

        return subscription.start

    def _search(self, patterns: Collection[str]) -> None:
        """Search for streams that match the patterns. If Redis refuses, log it and go on."""
        self._searched = set(patterns)

        try:
            self._store_since([name for name in patterns if name not in self._since])
            names = self._pipe.ask("SMEMBERS", self._keys.names)
        except redis.ResponseError as error:
            # Streams subscribed by name do not depend on the search.
            self._log.once(
                "refused",
                "Redis refuses to list the streams for %s: %s. Patterns do not find new streams. "
                "%s Delete these keys if another program wrote them.",
                ", ".join(patterns),
                error,
                grant_its_user(
                    {
                        self._keys.names: SEARCH,
                        self._keys.since(self._service): SINCE,
                        "": TIME,
                    }
                ),
                level=logging.ERROR,
            )
        else:
            self._log.over("refused", "Redis lists the streams for %s again.", ", ".join(patterns))
            known = {name.decode(errors="replace") for name in names}
            valid = filter(SIGNAL_NAME.fullmatch, known)
            self._add({name for name in valid if any(matches(each, name) for each in patterns)})

        timing = self._timing
        self._search_at = time.monotonic() + (
            timing.list_streams_every if self.alarm is None else timing.list_many_streams_every
        )

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


#: Number of entries that one step looks up.
COUNT = 64

#: Errors of a server without streams.
_UNKNOWN = tuple(
    f"unknown command {quote}{command}" for quote in "'`" for command in ("XREADGROUP", "XGROUP")
)


class Membership:
    """Joins the group on each subscribed stream, and creates missing groups.

    When it joins a group, it also takes the entries that Redis sent to this consumer in a lost
    answer, and the entries that other workers released. Only the reading thread may use it.
    """

    def __init__(
        self, context: Context, *, group: Group, intake: Intake, reclaimer: Reclaimer
    ) -> None:
        self._config = context.config
        self._counters = context.counters
        self.group = group
        self.catalogue = Catalogue(group.pipe, context, grouped=True)
        self.duplicates = Duplicates(group.pipe, context)
        self.trims = Trims(group, service=self._config.service, counters=self._counters)
        self._intake = intake
        self._acknowledger = intake.acknowledger
        self._reclaimer = reclaimer
        #: The subscriptions whose streams are read, by name.
        self.joined: dict[str, Subscription] = {}
        #: Streams with a group that this process does not read, because it has no receiver.
        self._unread: frozenset[str] = frozenset()
        #: Streams whose group this process has joined or created before. If the group is gone, a
        #: new one starts at the first entry.
        self.known: set[str] = set()
        #: The error of a server that has no streams; reading ends for good.
        self.fatal: Exception | None = None

    @property
    def alarms(self) -> dict[str, str]:
        """Alarms about streams whose events do not arrive, by stream or pattern."""
        return {**self.catalogue.alarms, **self._reclaimer.alarms, **self.trims.alarms}

    @property
    def is_complete(self) -> bool:
        """Return True if each subscribed stream is read or refused."""
        return self.catalogue.is_complete(self.joined.keys() | self._unread)

    def join(self) -> tuple[dict[str, Subscription], bool]:
        """Join the groups of streams that are new, and create missing groups.

        :return: the streams to read, and True if there were new ones.
        :raises redis.ConnectionError: Redis is unreachable.
        """
        subscribed = self.catalogue.names()
        without = self.catalogue.without_receiver
        self._unread &= without

        if without & self.joined.keys():
            self.joined = {name: self.joined[name] for name in self.joined if name not in without}

        known = self.joined.keys() | self._unread

        if time.monotonic() <= self.catalogue.ask_again_at:
            known |= self.catalogue.refused.keys()

        is_new = not subscribed.keys() <= known

        if is_new:
            self._join_new(subscribed, [name for name in subscribed if name not in known])

        if self.joined.keys() <= subscribed.keys():
            return self.joined, is_new

        return {name: self.joined[name] for name in subscribed if name in self.joined}, is_new

    def reset(self) -> None:
        """Forget the groups, and try refused streams again, after the connection was lost."""
        self.joined = {}
        self._unread = frozenset()
        self.catalogue.due_at = self.catalogue.ask_again_at = 0.0

    def leave_all(self, error: GroupGoneError) -> None:
        """Leave all groups after one was deleted; :meth:`join` creates missing groups again."""
        logger.warning(
            "A stream or the group of %r is gone (%s). A new group is created at the first entry "
            "of the stream. Redis was flushed, or restarted without its data, or the group was "
            "deleted.",
            self._config.service,
            error,
            extra={"service": self._config.service},
        )
        self._counters.add("groups_lost")
        self.trims.reset()

        for name in self.joined:
            if self._is_gone(name):
                self.duplicates.forget(name)

        self.joined = {}
        self.catalogue.due_at = 0.0

    def refuse(self, name: str, subscription: Subscription, reason: Exception) -> None:
        """Leave the group of a stream that Redis refuses, and log the refusal once."""
        self.end_without_streams(reason)
        self.joined = {known: self.joined[known] for known in self.joined if known != name}
        self.catalogue.due_at = 0.0
        advice = self.group.remedy(name, reason)

        if subscription.via == "stream":
            advice = f"This service gets no events from it. {advice}"
            self.catalogue.refuse(name, reason, advice)
        else:
            effect = "The service listens to the channel only."
            advice = f"{effect} {advice} Or subscribe with 'via': 'channel'."
            self.catalogue.refuse(name, reason, advice, level=logging.WARNING)

    def end_without_streams(self, error: Exception) -> None:
        """Set :attr:`fatal` if the error says that this server has no streams.

        :raises redis.ConnectionError: if it has none.
        """
        # redis-py removes "ERR" from the text. 'rename-command' may have removed other commands.
        if not str(error).startswith(_UNKNOWN):
            return

        self.fatal = error
        logger.critical(
            "This Redis has no streams (%s), so %r cannot read any. Use Redis 6.2 or later, or "
            "Valkey.",
            error,
            self._config.service,
        )
        raise redis.ConnectionError(str(error)) from error

    def _join_new(self, subscribed: dict[str, Subscription], new: Sequence[str]) -> None:
        # The position of a deleted group is lost, so the new one starts at the first entry.
        starts = {
            name: "0" if name in self.known else self.catalogue.start_of(name, subscribed[name])
            for name in new
        }
        self.trims.check_before_next_read()
        refusals = self.group.join(starts)
        joined = dict(self.joined)
        without = self.catalogue.without_receiver
        # Their groups exist, so that events wait until some process connects a receiver.
        self._unread |= without & refusals.keys()

        for name, refusal in refusals.items():
            if name in without:
                # If the group is deleted before it is read, all entries of the stream are unread.
                if refusal is None:
                    self.known.add(name)
                    self.catalogue.grant(name)

                continue

            obstacle = self._recover(name, subscribed[name])
            # If reading works, the group exists, and a refused XGROUP CREATE does not matter.
            refusal = obstacle and (refusal or obstacle)

            if refusal is None:
                joined[name] = subscribed[name]
                self.catalogue.grant(name)
            elif isinstance(refusal, GroupGoneError):
                self.catalogue.due_at = 0.0
            else:
                self.refuse(name, subscribed[name], refusal)

        self.joined = joined

    def _recover(self, name: str, subscription: Subscription) -> Exception | None:
        """Take this consumer's pending entries and the released ones; return a refusal."""
        try:
            self.group.try_to_read(name)
            self.known.add(name)

            # Under the lock, so that no entry is acknowledged or claimed in between.
            with self._acknowledger.lock:
                self._recover_pending(name, subscription)

            self._reclaimer.reclaim_all_released({name: subscription})
        except (GroupGoneError, redis.ResponseError) as refusal:
            return refusal

        return None

    def _recover_pending(self, name: str, subscription: Subscription) -> None:
        """Take the entries that Redis sent to this consumer in a lost answer."""
        lost = self._intake.in_flight.missing(
            name, [found.id for found in self.group.own_pending(name)]
        )

        for start in range(0, len(lost), COUNT):
            entries = self.group.look_up(name, lost[start : start + COUNT])
            found = self._intake.decoder.decode(entries, {name: subscription})
            self.trims.report(name, found.trimmed)
            # These entries are handled in any case. Store them, so that a copy is a duplicate.
            self.duplicates.find(found.deliveries)
            self._intake.add(found.deliveries)
            self._intake.end(found)

    def _is_gone(self, name: str) -> bool:
        try:
            return self.group.position(name) is None
        except redis.ResponseError as error:
            logger.debug("Redis refuses to report the group of %r: %s", name, error)
            return True
