"""The thread that reads what the workers of a service share: their groups' streams."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import redis

from .backoff import Backoff
from .catalogue import Catalogue
from .claims import Claims
from .config import Config
from .counters import BoundedLog, Counters
from .deliveries import Hand
from .duplicates import Duplicates
from .group import Entry, Group, GroupGoneError
from .lineup import Lineup
from .logs import get_logger
from .outcomes import Outcomes
from .reading import Reading
from .settler import Settler
from .stream_intake import StreamIntake
from .subscriptions import Subscription
from .trims import Trims

logger = get_logger(__name__)

#: Seconds that Redis holds a read back where there is nothing to read; less than the five after
#: which a server that hangs is given up.
BLOCK = 1.0

#: Entries of one stream that are read at once.
COUNT = 200

#: Seconds after which a stream that Redis refuses is asked for again.
ASK_AGAIN = 5.0

#: Events whose outcome Redis does not take, from which on no more are read.
MOST_UNSETTLED = 1_000


class StreamReader:
    """Reads streams in a thread of its own, and connects again whenever that ends.

    :param wanted: whether there still is what the events are for.
    :param attend: told that there is something in hand.
    :param given_away: the streams of which this process handed something back by itself.
    :param lost: told when Redis is lost, with the error.
    :param found: told when every stream can be read.
    :param ended: told when nothing is read any more, though nobody said to stop.
    """

    def __init__(
        self,
        *,
        config: Config,
        catalogue: Catalogue,
        group: Group,
        duplicates: Duplicates,
        intake: StreamIntake,
        hand: Hand,
        lineup: Lineup,
        outcomes: Outcomes,
        settler: Settler,
        claims: Claims,
        trims: Trims,
        counters: Counters,
        node: str,
        wanted: Callable[[], bool],
        attend: Callable[[], None],
        given_away: Callable[[], set[str]],
        lost: Callable[[Exception], None],
        found: Callable[[], None],
        ended: Callable[[], None],
    ) -> None:
        self._config = config
        self._catalogue = catalogue
        self._group = group
        self._duplicates = duplicates
        self._intake = intake
        self._hand = hand
        self._lineup = lineup
        self._outcomes = outcomes
        self._settler = settler
        self._claims = claims
        self._trims = trims
        self._counters = counters
        self._attend = attend
        self._given_away = given_away
        self._lost = lost
        self._found = found
        self._ended = ended
        self._log = BoundedLog(logger)
        self._reading = Reading(
            failed="The stream reader failed; it connects anew.",
            thread=f"eventbus-streams-{node}",
            read=self._consume,
            lost=self._lose,
            close=group.pipe.close,
            wanted=lambda: wanted() and self.fatal is None,
            counters=counters,
            ended=self._conclude,
        )
        self._block = group.pipe.wait_at_most(BLOCK)
        #: Notified when it is known of more streams whether they can be read.
        self.changed = threading.Condition()
        #: The streams that are read, by name.
        self.joined: dict[str, Subscription] = {}
        #: Streams that Redis refuses, with its reasons; and those that only their channel serves.
        self.refused: dict[str, str] = {}
        self._ask_again = 0.0
        #: Whether Redis is there, and was asked for what there is to be read.
        self._is_there = False
        #: What was told of streams that are refused: it is told once.
        self._told: dict[str, str] = {}
        #: The streams whose group was there once: if it is gone, it is made again at the start.
        self._known: set[str] = set()
        #: What no server of this kind will ever do.
        self.fatal: Exception | None = None
        self.last_heard: float | None = None

    @property
    def is_own_thread(self) -> bool:
        """Whether the calling thread is the one that reads."""
        return self._reading.is_own_thread

    @property
    def was_joined(self) -> set[str]:
        """The streams that were read at any time."""
        return self._known

    @property
    def ready(self) -> bool:
        """Whether Redis is there, and each stream subscribed is read or refused."""
        answered = self.joined.keys() | self.refused.keys() | self._catalogue.patterns
        return (
            self._reading.lives and self._is_there and self._catalogue.wanted().keys() <= answered
        )

    def start(self) -> None:
        """Start the thread, once."""
        self._reading.start()

    def stop(self) -> None:
        """Stop reading, now."""
        self._reading.stop()
        self._lineup.close()
        self._group.pipe.interrupt()

        with self.changed:
            self.changed.notify_all()

    def end(self) -> None:
        """Wait for the thread's end."""
        self._reading.end()

    def disown(self) -> None:
        """In a forked child: end what came along of it."""
        self._reading.disown()

    # -- the reading thread ---------------------------------------------------------------

    def _conclude(self) -> None:
        if self.fatal is None:
            self._ended()
            return

        # Channels are heard all the same.
        with self.changed:
            self.changed.notify_all()

    def _lose(self, error: Exception) -> None:
        with self.changed:
            self._is_there = False
            self.joined = {}
            self.refused = {}

        if not self._reading.is_stopping:
            self._lost(error)

    def _consume(self, backoff: Backoff) -> None:
        while self._reading.goes_on:
            names = self._join()

            if not names or len(self._settler) > MOST_UNSETTLED:
                self._reading.pause(self._block)
            elif self._lineup.wait_for_room(self._block):
                self._read(names)
            else:
                # What comes meanwhile may be trimmed before it is read.
                self._trims.busy = True

            backoff.reset()

    def _read(self, names: dict[str, Subscription]) -> None:
        count = max(1, min(COUNT, self._lineup.room))

        try:
            self._trims.look(names)
            self._take_back_given_away(names)
            entries = self._group.read(list(names), count=count, block=self._block)
        except GroupGoneError as error:
            self._rejoin(error)
            return
        except redis.ResponseError as error:
            self._sort_out(names, error)
            return

        self.last_heard = time.monotonic()

        if entries:
            self._trims.busy = len(entries) >= count
            self._take(entries, names)
        else:
            self._trims.busy = False

    def _take_back_given_away(self, names: Mapping[str, Subscription]) -> None:
        given_away = self._given_away()

        if given_away:
            self._claims.take_back({name: names[name] for name in given_away if name in names})

    def _take(self, entries: Sequence[Entry], names: dict[str, Subscription]) -> None:
        found = self._intake.sort(list(entries), names)
        fresh = found.deliveries
        known = set(self._duplicates.find(fresh))

        if known:
            self._counters.add("duplicates", len(known))
            fresh = [delivery for delivery in fresh if delivery not in known]

        self._counters.add("received", len(fresh))
        self._hand.take(fresh)
        self._attend()
        self._lineup.put(fresh)

        outcomes = [self._outcomes.skipped(entry) for entry in found.skipped]
        outcomes += [
            self._outcomes.skipped(Entry(delivery.name, delivery.entry, None)) for delivery in known
        ]
        outcomes += [self._outcomes.rejected(entry, letter) for entry, letter in found.dead]

        if outcomes:
            self._settler.settle(outcomes)

    # -- its groups -----------------------------------------------------------------------

    def _join(self) -> dict[str, Subscription]:
        """Make the groups that are missing; the streams that can be read."""
        wanted = self._catalogue.names()

        left = () if time.monotonic() > self._ask_again else self.refused
        new = [name for name in wanted if name not in self.joined and name not in left]

        if new:
            self._join_new(wanted, new)

        if new or not self._is_there:
            self._arrive()

        return {name: self.joined[name] for name in wanted if name in self.joined}

    def _join_new(self, wanted: dict[str, Subscription], new: Sequence[str]) -> None:
        starts = {name: self._start_of(name, wanted[name]) for name in new}
        refusals = self._group.join(starts)
        joined = dict(self.joined)

        for name, refusal in refusals.items():
            refusal = refusal or self._take_up(name, wanted[name])

            if refusal is None:
                joined[name] = wanted[name]
                self._told.pop(name, None)
                self.refused = {one: self.refused[one] for one in self.refused if one != name}
            elif not isinstance(refusal, GroupGoneError):
                self._refuse(name, wanted[name], refusal)

        self.joined = joined

    def _arrive(self) -> None:
        with self.changed:
            self._is_there = True
            self.changed.notify_all()

        if self.ready:
            self._found()

    def _take_up(self, name: str, subscription: Subscription) -> Exception | None:
        """Take up what this consumer has of a stream; what refused it."""
        self._known.add(name)

        try:
            self._group.try_to_read(name)
            # All of this is older than what is read then.
            self._recover(name, subscription)
            self._claims.take_back({name: subscription})
        except (GroupGoneError, redis.ResponseError) as refusal:
            return refusal

        return None

    def _start_of(self, name: str, subscription: Subscription) -> str:
        # Where a group was and is gone, so is the knowledge of how far it had come.
        return "0" if name in self._known else self._catalogue.start_of(name, subscription)

    def _recover(self, name: str, subscription: Subscription) -> None:
        """Take up what Redis gave this consumer in an answer that never arrived."""
        # With the turn, so that nothing is settled or taken over between two looks.
        with self._settler.turn:
            self._recover_lost(name, subscription)

    def _recover_lost(self, name: str, subscription: Subscription) -> None:
        lost = self._hand.without(name, [found.id for found in self._group.own(name)])

        for start in range(0, len(lost), COUNT):
            entries = self._group.look_up(name, lost[start : start + COUNT])
            found = self._intake.sort(entries, {name: subscription})
            self._trims.count(name, found.trimmed)
            # They are handled in any case; what is sent a second time is to be known.
            self._duplicates.find(found.deliveries)
            self._hand.take(found.deliveries)
            self._lineup.put(found.deliveries)
            self._settler.settle(
                [self._outcomes.skipped(entry) for entry in found.skipped]
                + [self._outcomes.rejected(entry, letter) for entry, letter in found.dead]
            )

    def _rejoin(self, error: GroupGoneError) -> None:
        logger.warning(
            "A stream or the group of %r is gone (%s): it is made again at the beginning of what "
            "the stream has. Redis was flushed, or restarted without its data, or somebody "
            "deleted it.",
            self._config.service,
            error,
        )
        self._counters.add("groups_lost")
        self._trims.reset()

        for name in self.joined:
            if self._is_gone(name):
                self._duplicates.forget(name)

        with self.changed:
            self.joined = {}

    def _is_gone(self, name: str) -> bool:
        try:
            return self._group.position(name) is None
        except redis.ResponseError as error:
            logger.debug("Redis does not tell whether %r is gone: %s", name, error)
            return True

    def _sort_out(self, names: dict[str, Subscription], error: redis.ResponseError) -> None:
        """Find out which of the streams it is that Redis refuses to have read."""
        self._end_without_streams(error)

        for name, subscription in names.items():
            try:
                entries = self._group.read([name], count=1, block=0)
            except GroupGoneError as gone:
                self._rejoin(gone)
                return
            except redis.ResponseError as refusal:
                self.joined = {known: sub for known, sub in self.joined.items() if known != name}
                self._refuse(name, subscription, refusal)
            else:
                self._take(entries, names)

    def _end_without_streams(self, error: Exception) -> None:
        # redis-py takes "ERR" off.
        if not str(error).startswith(("unknown command", "unknown subcommand")):
            return

        self.fatal = error
        logger.critical(
            "This Redis has no streams (%s): %r hears none. Use Redis 6.2 or later, or Valkey.",
            error,
            self._config.service,
        )
        raise redis.ConnectionError(str(error)) from error

    def _refuse(self, name: str, subscription: Subscription, reason: Exception) -> None:
        self._end_without_streams(reason)
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
            )
