"""The groups of a service that this process reads for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence, Set

import redis

from ..codec.entry_ids import before_moment, id_text
from ..config import SIGNAL_NAME, Config
from ..logs import BoundedLog, Counters, get_logger
from ..receivers.delivery import InFlight
from ..receivers.workers import DeliveryQueue
from ..routing.options import is_pattern, matches
from ..routing.subscriptions import NEW, Subscription
from ..transport.keys import StreamKeys
from ..transport.pipe import Pipe
from .acknowledger import Acknowledger
from .alarms import MOST_NAMES, too_many_names
from .decoder import EntryDecoder
from .duplicates import Duplicates
from .group import Group, GroupGoneError
from .outcomes import Outcomes
from .reclaim import Reclaimer, Trims

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

    def subscribed(self) -> dict[str, Subscription]:
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
        wanted = self.subscribed()
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


#: Entries that are looked up at once.
COUNT = 64

#: How a server that has no streams answers.
_UNKNOWN = tuple(
    f"unknown command {quote}{command}" for quote in "'`" for command in ("XREADGROUP", "XGROUP")
)

#: Seconds after which a stream that Redis refuses is asked for again.
ASK_AGAIN = 5.0


class Membership:
    """Joins the group on each stream subscribed, and makes groups that are missing.

    With a group comes what this process, or one that ended, was given of it and had not settled.
    For one thread, the one that reads.
    """

    def __init__(
        self,
        *,
        config: Config,
        catalogue: Catalogue,
        group: Group,
        duplicates: Duplicates,
        decoder: EntryDecoder,
        in_flight: InFlight,
        queue: DeliveryQueue,
        outcomes: Outcomes,
        acknowledger: Acknowledger,
        reclaimer: Reclaimer,
        trims: Trims,
        counters: Counters,
    ) -> None:
        self._config = config
        self._catalogue = catalogue
        self._group = group
        self._duplicates = duplicates
        self._decoder = decoder
        self._in_flight = in_flight
        self._queue = queue
        self._outcomes = outcomes
        self._acknowledger = acknowledger
        self._reclaimer = reclaimer
        self._trims = trims
        self._counters = counters
        self._log = BoundedLog(logger)
        #: The streams that are read, by name.
        self.joined: dict[str, Subscription] = {}
        #: Streams that Redis refuses, with its reasons; and those that only their channel serves.
        self.refused: dict[str, str] = {}
        self._ask_again = 0.0
        #: Streams whose group was made, and that are not read here: no receiver is connected.
        self._left: frozenset[str] = frozenset()
        #: What was told of streams that are refused: it is told once.
        self._told: dict[str, str] = {}
        #: The streams that were read, or whose group was made, at any time: if their group is gone,
        #: it is made again at the start.
        self.known: set[str] = set()
        #: What no server of this kind will ever do.
        self.fatal: Exception | None = None

    @property
    def without_receiver(self) -> frozenset[str]:
        """The streams that are not read, because this process has no receiver for them."""
        return self._catalogue.without_receiver

    @property
    def alarms(self) -> dict[str, str]:
        """What somebody did to streams so that their events are not heard, by stream."""
        return {**self._catalogue.alarms, **self._reclaimer.alarms, **self._trims.alarms}

    @property
    def is_complete(self) -> bool:
        """Whether each stream subscribed is read or refused."""
        answered = self.joined.keys() | self.refused.keys() | self._catalogue.patterns | self._left
        return self._catalogue.subscribed().keys() <= answered

    def join(self) -> tuple[dict[str, Subscription], bool]:
        """Make the groups that are missing.

        :return: the streams that can be read, and whether Redis was asked for any.
        :raises redis.ConnectionError: Redis is away.
        """
        wanted = self._catalogue.names()
        without = self._catalogue.without_receiver
        self._left &= without

        if without & self.joined.keys():
            self.joined = {name: self.joined[name] for name in self.joined if name not in without}

        refused = () if time.monotonic() > self._ask_again else self.refused
        known = {*self.joined, *refused, *self._left}
        new = [name for name in wanted if name not in known]

        if new:
            self._join_new(wanted, new)

        return {name: self.joined[name] for name in wanted if name in self.joined}, bool(new)

    def lose(self) -> None:
        """Redis is lost, and what it refused may be granted when it is back."""
        self.joined = {}
        self._left = frozenset()
        self.refused = {}

    def give_up(self, error: GroupGoneError) -> None:
        """Be in no group any more, so that :meth:`join` makes those again that are gone."""
        logger.warning(
            "A stream or the group of %r is gone (%s): it is made again at the beginning of what "
            "the stream has. Redis was flushed, or restarted without its data, or somebody "
            "deleted it.",
            self._config.service,
            error,
            extra={"service": self._config.service},
        )
        self._counters.add("groups_lost")
        self._trims.reset()

        for name in self.joined:
            if self._is_gone(name):
                self._duplicates.forget(name)

        self.joined = {}

    def refuse(self, name: str, subscription: Subscription, reason: Exception) -> None:
        """Be out of the group of a stream that Redis refuses, and say so once."""
        self.end_without_streams(reason)
        self.joined = {known: sub for known, sub in self.joined.items() if known != name}
        self._ask_again = time.monotonic() + ASK_AGAIN
        self.refused = {**self.refused, name: str(reason)}

        if self._told.get(name) == str(reason):
            return

        self._told[name] = str(reason)

        if subscription.via == "stream":
            self._log.error(
                f"refused {name}",
                "Redis refuses to let %r read the stream of %r: %s. This service does not hear it. "
                "%s",
                self._config.service,
                name,
                reason,
                self._group.remedy(name, reason),
                extra={"signal": name, "service": self._config.service},
            )
        else:
            self._log.warning(
                f"refused {name}",
                "Redis refuses to let %r read the stream of %r: %s. It hears the channel alone. "
                "%s Or subscribe with 'via': 'channel'.",
                self._config.service,
                name,
                reason,
                self._group.remedy(name, reason),
                extra={"signal": name, "service": self._config.service},
            )

    def end_without_streams(self, error: Exception) -> None:
        """Give up for good where Redis knows no streams.

        :raises redis.ConnectionError: it does not.
        """
        # redis-py takes "ERR" off. Any other command may be missing by 'rename-command'.
        if not str(error).startswith(_UNKNOWN):
            return

        self.fatal = error
        logger.critical(
            "This Redis has no streams (%s): %r hears none. Use Redis 6.2 or later, or Valkey.",
            error,
            self._config.service,
        )
        raise redis.ConnectionError(str(error)) from error

    def _join_new(self, wanted: dict[str, Subscription], new: Sequence[str]) -> None:
        starts = {name: self._start_of(name, wanted[name]) for name in new}
        self._trims.check_before_next_read()
        refusals = self._group.join(starts)
        joined = dict(self.joined)
        without = self._catalogue.without_receiver
        # Events wait there until a receiver is connected, here or in another process.
        self._left |= without & refusals.keys()

        for name, refusal in refusals.items():
            if name in without:
                # Should it be gone by then, everything in the stream has waited.
                if refusal is None:
                    self.known.add(name)

                continue

            obstacle = self._take_up(name, wanted[name])
            # Where the group is there, it does not matter that another may not be made.
            refusal = obstacle and (refusal or obstacle)

            if refusal is None:
                joined[name] = wanted[name]
                self._note_granted(name)
                self.refused = {one: self.refused[one] for one in self.refused if one != name}
            elif not isinstance(refusal, GroupGoneError):
                self.refuse(name, wanted[name], refusal)

        self.joined = joined

    def _note_granted(self, name: str) -> None:
        if self._told.pop(name, None) is not None:
            self._log.over(
                f"refused {name}",
                "Redis lets %r read the stream of %r again.",
                self._config.service,
                name,
                extra={"signal": name, "service": self._config.service},
            )

    def _take_up(self, name: str, subscription: Subscription) -> Exception | None:
        """Take up what this consumer has of a stream; what refused it."""
        try:
            self._group.try_to_read(name)
            self.known.add(name)
            # All of this is older than what is read then.
            self._recover(name, subscription)
            self._reclaimer.reclaim_all_released({name: subscription})
        except (GroupGoneError, redis.ResponseError) as refusal:
            return refusal

        return None

    def _start_of(self, name: str, subscription: Subscription) -> str:
        # Where a group was and is gone, so is the knowledge of how far it had come.
        return "0" if name in self.known else self._catalogue.start_of(name, subscription)

    def _recover(self, name: str, subscription: Subscription) -> None:
        """Take up what Redis gave this consumer in an answer that never arrived."""
        # With the turn, so that nothing is settled or taken over between two looks.
        with self._acknowledger.lock:
            self._recover_lost(name, subscription)

    def _recover_lost(self, name: str, subscription: Subscription) -> None:
        lost = self._in_flight.missing(name, [found.id for found in self._group.own_pending(name)])

        for start in range(0, len(lost), COUNT):
            entries = self._group.look_up(name, lost[start : start + COUNT])
            found = self._decoder.decode(entries, {name: subscription})
            self._trims.report(name, found.trimmed)
            # They are handled in any case; what is sent a second time is to be known.
            self._duplicates.find(found.deliveries)
            self._in_flight.add(found.deliveries)
            self._queue.put(found.deliveries)
            self._acknowledger.write(
                [self._outcomes.skipped(entry) for entry in found.skipped]
                + [self._outcomes.rejected(entry, letter) for entry, letter in found.dead]
            )

    def _is_gone(self, name: str) -> bool:
        try:
            return self._group.position(name) is None
        except redis.ResponseError as error:
            logger.debug("Redis does not tell whether %r is gone: %s", name, error)
            return True
