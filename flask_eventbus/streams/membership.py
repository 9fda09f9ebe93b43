"""The groups of a service that this process reads for."""

from __future__ import annotations

import time
from collections.abc import Sequence

import redis

from ..config import Config
from ..counters import BoundedLog, Counters
from ..logs import get_logger
from ..receivers.delivery import Hand
from ..receivers.lineup import Lineup
from ..routing.subscriptions import Subscription
from .acknowledger import Settler
from .catalogue import Catalogue
from .decoder import StreamIntake
from .duplicates import Duplicates
from .group import Group, GroupGoneError
from .outcomes import Outcomes
from .reclaim import Claims
from .trims import Trims

logger = get_logger(__name__)

#: Entries that are looked up at once.
COUNT = 64

#: How a server that has no streams answers.
_UNKNOWN = tuple(
    f"unknown command {quote}{command}" for quote in "'`" for command in ("XREADGROUP", "XGROUP")
)

#: Seconds after which a stream that Redis refuses is asked for again.
ASK_AGAIN = 5.0


class Memberships:
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
        intake: StreamIntake,
        hand: Hand,
        lineup: Lineup,
        outcomes: Outcomes,
        settler: Settler,
        claims: Claims,
        trims: Trims,
        counters: Counters,
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
        return {**self._catalogue.alarms, **self._claims.alarms, **self._trims.alarms}

    @property
    def is_complete(self) -> bool:
        """Whether each stream subscribed is read or refused."""
        answered = self.joined.keys() | self.refused.keys() | self._catalogue.patterns | self._left
        return self._catalogue.wanted().keys() <= answered

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
        self._trims.look_next()
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
            self._claims.take_back({name: subscription})
        except (GroupGoneError, redis.ResponseError) as refusal:
            return refusal

        return None

    def _start_of(self, name: str, subscription: Subscription) -> str:
        # Where a group was and is gone, so is the knowledge of how far it had come.
        return "0" if name in self.known else self._catalogue.start_of(name, subscription)

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

    def _is_gone(self, name: str) -> bool:
        try:
            return self._group.position(name) is None
        except redis.ResponseError as error:
            logger.debug("Redis does not tell whether %r is gone: %s", name, error)
            return True
