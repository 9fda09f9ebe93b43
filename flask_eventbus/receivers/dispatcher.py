"""Runs the receivers of an event, each in its own scope, and reports events that conflict."""

from __future__ import annotations

import asyncio
import inspect
import random
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, auto
from functools import partial
from typing import Any

from ..config import TIMING
from ..coroutines import run_coroutine
from ..errors import ReceiverError, Reject, Retry
from ..event import Event, PackedPayload, handling, opened
from ..logs import BoundedLog, Tally, get_logger, text_of
from ..routing.bus_signal import BusSignal
from ..routing.options import Receiver, name_of
from ..signals import emit, emit_now, event_conflict, receiver_failed, receiver_succeeded
from ..transport.connections import Context

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """A receiver and the exception that it raised."""

    receiver: Receiver
    error: BaseException
    #: Name of the receiver; empty if the teardown after the receiver failed.
    name: str = ""


#: The scope of receivers that need none. Any number of threads may be in it.
_NO_SCOPE: AbstractContextManager[object] = nullcontext()


class Dispatcher:
    """Calls the receivers of an event one by one; a failure does not stop the next receiver.

    :param scope: returns the context manager in which a receiver runs; in Flask, a new app context.
        Exceptions of the receiver pass through it. ``None`` if receivers need none.
    :param undo: called in the scope of a receiver that failed; must not raise.
    """

    def __init__(
        self,
        context: Context,
        *,
        scope: Callable[[], AbstractContextManager[object]] | None,
        undo: Callable[[], None],
    ) -> None:
        registry = context.registry
        self._service = context.config.service
        self._logs_events = context.config.log_events
        self._counters = context.counters
        self._signals = registry.namespace
        self._search = registry.receivers_of
        self._timeout = registry.timeout_of
        #: Returns the receivers of a signal, from any source, in the order of their connection.
        self.connected = registry.connected_to
        self._scope = scope
        self._undo = undo
        self._log = BoundedLog(logger)
        #: Callers of :meth:`dispatch` log the failures here, once they have decided about a retry.
        self.failures = FailureLog(self._service)

    def has_receivers(self, name: str) -> bool:
        """Return True if this process has a receiver for ``name``, from any source."""
        return bool(self.connected(name))

    def receivers(self, event: Event, *, only: str | None = None) -> Sequence[Receiver]:
        """Return the receivers to run for ``event``.

        :param only: return the receiver with this name only.
        """
        signal = self._signals.get(event.name)
        found: Sequence[Receiver] | None = None

        # A signal of the bus empties its cache as soon as a receiver connects or disconnects.
        if isinstance(signal, BusSignal) and not signal.is_muted:
            found = signal.cached_receivers.get(event.source)

        found = found or self._search(event.name, event.source)

        if only is None:
            return found

        return [receiver for receiver in found if self._name(event.name, receiver) == only]

    def dispatch(
        self, event: Event, *, only: str | None = None, receivers: Sequence[Receiver] | None = None
    ) -> Sequence[Failure] | None:
        """Run the receivers for ``event``, each in its own scope. Never raises.

        Return the failures, or ``None`` if no receiver is connected. The caller logs the failures
        with :attr:`failures`.

        :param only: run the receiver with this name only.
        :param receivers: the result of :meth:`receivers`, if the caller has it already.
        """
        if only is not None or receivers is None:
            receivers = self.receivers(event, only=only)

        if not receivers:
            if only is None:
                self._skip(event)

            return None

        token = handling.set(None)

        try:
            failures = self._run(receivers, event)
        finally:
            handling.reset(token)

        self._counters.add("handled")
        return failures

    def dispatch_once(self, event: Event, *, only: str | None = None) -> Sequence[Failure]:
        """Run receivers as :meth:`dispatch` does, and log the failures as final."""
        failures = self.dispatch(event, only=only) or ()

        for failure in failures:
            self.failures.final(event, failure)

        return failures

    def dispatch_all(self, events: Iterable[Event], handled: Tally) -> None:
        """Run the receivers of events one after another, and log the failures as final.

        :param handled: counts the events that had a receiver.
        """
        token = handling.set(None)

        try:
            for event in events:
                try:
                    receivers = self.receivers(event)
                    failures = self._run(receivers, event) if receivers else ()
                    handled.count += bool(receivers)

                    if failures or not receivers:
                        handling.set(None)
                        self._report(event, failures)
                except Exception:
                    logger.exception(
                        "The event %s of %r was not dispatched.",
                        event.id,
                        event.name,
                        extra=event.fields,
                    )
        finally:
            handling.reset(token)

    def _report(self, event: Event, failures: Sequence[Failure]) -> None:
        """Log the failures as final; without any, log that the event had no receiver."""
        if not failures:
            self._skip(event)

        for failure in failures:
            self.failures.final(event, failure)

    def _run(self, receivers: Iterable[Receiver], event: Event) -> Sequence[Failure]:
        """Run receivers with ``event`` as the current event, and return the failures.

        The caller resets :data:`.handling`.
        """
        if type(event.payload) is PackedPayload:
            # The application decodes its types, which belongs to no event before.
            handling.set(None)
            event = opened(event)

        failures: list[Failure] = []
        is_plain = self._scope is None and not self._logs_events
        handling.set(event)

        for receiver in receivers:
            if not is_plain or receiver_succeeded.receivers:
                self._run_in_scope(receiver, event, failures)
                continue

            try:
                if (result := receiver(event.source, **event.payload)) is not None:
                    self._await(result, receiver, event)
            except BaseException as error:
                self._undo()
                failures.append(
                    self._failed(receiver, self._name(event.name, receiver), event, error)
                )

        return failures

    def _await(self, result: object, receiver: Receiver, event: Event) -> None:
        """Run what an asynchronous receiver has returned."""
        if inspect.iscoroutine(result):
            timeout = self._timeout(event.name, receiver)
            run_coroutine(result if timeout is None else _in_time(result, timeout))

    def _run_in_scope(self, receiver: Receiver, event: Event, failures: list[Failure]) -> None:
        """Run one receiver in its scope, and append its failures."""
        is_timed = self._logs_events or receiver_succeeded.receivers
        start = time.monotonic() if is_timed else 0.0
        has_started = False
        raised: BaseException | None = None

        try:
            with _NO_SCOPE if self._scope is None else self._scope():
                has_started = True

                try:
                    if (result := receiver(event.source, **event.payload)) is not None:
                        self._await(result, receiver, event)
                except BaseException as error:
                    # Also SystemExit: a receiver must not end the process.
                    raised = error
                    self._undo()
                    raise
        except BaseException as error:
            if raised is None and not has_started:
                # The scope failed, so the receiver did not run.
                raised = error
            elif error is not raised:
                failures.append(self._failed(receiver, "", event, error))

        if raised is not None:
            name = self._name(event.name, receiver)
            failures.append(self._failed(receiver, name, event, raised))
        elif is_timed:
            self._succeeded(receiver, event, time.monotonic() - start)

    def _succeeded(self, receiver: Receiver, event: Event, seconds: float) -> None:
        if self._logs_events:
            name = self._name(event.name, receiver)
            logger.info(
                "Handled the event %s of %r from %r with %s in %.1f ms.",
                event.id,
                event.name,
                event.source,
                name,
                seconds * 1000,
                extra={**event.fields, "service": self._service, "receiver": name},
            )

        emit_now(receiver_succeeded, self._service, receiver=receiver, event=event, seconds=seconds)

    def _failed(self, receiver: Receiver, name: str, event: Event, error: BaseException) -> Failure:
        error = explain(receiver, event, error)
        self._counters.add("failed")
        emit_now(receiver_failed, self._service, receiver=receiver, event=event, error=error)
        return Failure(receiver, error, name)

    def _name(self, event_name: str, receiver: Receiver) -> str:
        """Return a unique name of a receiver, which is the same in each process of the service.

        If several receivers have one name, as closures may, all but the first get a number.
        """
        name = name_of(receiver)
        same = [found for found in self.connected(event_name) if name_of(found) == name]
        number = next((n for n, found in enumerate(same) if found == receiver), 0)
        return f"{name}#{number + 1}" if number else name

    def _skip(self, event: Event) -> None:
        if self.has_receivers(event.name):
            # The receivers accept other sources only, or the signal is muted.
            self._counters.add("passed_over")
            return

        self._counters.add("unknown")
        self._log.warning(
            f"unknown {event.name}",
            "Nothing here receives %r: the event %s from %r is skipped. Connect a receiver with "
            "bus.on(%r), or remove the name from 'EVENTBUS_SUBSCRIBE'.",
            event.name,
            event.id,
            event.source,
            event.name,
            extra={**event.fields, "service": self._service},
        )


async def _in_time(coroutine: Coroutine[Any, Any, Any], seconds: float) -> None:
    """Await a receiver, and cancel it after ``seconds``.

    :raises TimeoutError: if it took longer.
    """
    limit = asyncio.timeout(seconds)

    try:
        async with limit:
            await coroutine
    except TimeoutError:
        # The receiver itself may have raised a TimeoutError.
        if limit.expired():
            raise TimeoutError(f"It took longer than its timeout of {seconds:g} s.") from None

        raise


def explain(receiver: Receiver, event: Event, error: BaseException) -> BaseException:
    """Return a :class:`ReceiverError` for a ``TypeError`` if the payload does not fit.

    Return every other error unchanged.
    """
    misfit = misfit_of(receiver, event.payload) if isinstance(error, TypeError) else None

    if misfit is None:
        return error

    unfit = unfit_signature(receiver, event.payload)
    advice = (
        "Send the missing key, or give the parameter a default"
        if misfit.startswith("missing")
        else "Add a parameter for each key, or '**extra', to the receiver"
    )
    reason, advice = unfit or (misfit, advice)
    explained = ReceiverError(
        f"The receiver {name_of(receiver)} does not accept the event {event.id} of "
        f"{event.name!r}: {reason}. Its payload has the keys {sorted(event.payload)}. {advice}.",
        is_final=unfit is not None,
    )
    explained.__cause__ = error
    return explained


def unfit_signature(receiver: Receiver, payload: Iterable[str] = ()) -> tuple[str, str] | None:
    """Return why ``receiver`` cannot take any event with these keys, and the remedy.

    Return ``None`` if it can, or if its signature is unknown.
    """
    signature = signature_of(receiver)

    if signature is None:
        return None

    parameters = list(signature.parameters.values())

    try:
        signature.bind_partial(None)
    except TypeError:
        return "it has no parameter for the sender", "Add 'sender' as its first parameter"

    for parameter in parameters[1:]:
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            reason = f"it needs {parameter.name!r} by position, and payloads come by name"
            return reason, "Remove the '/' from its parameters"

    first = parameters[0]

    if first.kind is first.POSITIONAL_OR_KEYWORD and first.name in payload:
        return (
            f"its first parameter is {first.name!r}, which gets the sender, and the payload has a "
            "value of that name too",
            f"Add 'sender' as its first parameter, before {first.name!r}",
        )

    return None


def misfit_of(receiver: Receiver, payload: Iterable[str]) -> str | None:
    """Return why ``receiver`` cannot be called with the keys of ``payload``, or ``None``."""
    signature = signature_of(receiver)

    if signature is None:
        return None

    try:
        signature.bind(None, **dict.fromkeys(payload))
    except TypeError as error:
        return str(error)

    return None


def signature_of(receiver: Receiver) -> inspect.Signature | None:
    """Return the signature of a receiver; ``None`` if it is unknown."""
    try:
        return inspect.signature(receiver)
    except Exception:
        # A receiver may be any object, with or without a signature.
        return None


#: Longest delay of a retry in seconds.
MAX_DELAY = 300.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The decision after a failure: a dead letter with a reason, or a retry after a delay."""

    #: Reason of the dead letter, one of :data:`.records.REASONS`; ``None`` for a retry.
    reason: str | None = None
    #: Delay of the retry in seconds.
    after: float = 0.0


def judge(
    error: BaseException,
    *,
    attempts: int,
    retries: int,
    jitter: float = TIMING.retry_jitter,
    first: float = TIMING.first_retry,
) -> Verdict:
    """Decide what follows after a receiver failed.

    :param error: the exception that the receiver raised.
    :param attempts: number of the failed attempt, from 1.
    :param retries: maximum number of retries.
    :param first: delay of the first retry in seconds.
    """
    if isinstance(error, Reject):
        return Verdict(reason="rejected")

    if attempts > retries or (isinstance(error, ReceiverError) and error.is_final):
        return Verdict(reason="retries")

    if isinstance(error, Retry) and error.after is not None:
        return Verdict(after=max(0.0, error.after))

    return Verdict(after=delay(attempts, jitter=jitter, first=first))


def delay(
    attempts: int,
    *,
    jitter: float = TIMING.retry_jitter,
    first: float = TIMING.first_retry,
) -> float:
    """Return the seconds to wait after attempt ``attempts``: 1, 2, 4, ... up to 300."""
    wait = min(MAX_DELAY, first * 2.0 ** min(attempts - 1, 30))
    longer: float = wait * random.uniform(1.0, 1.0 + jitter)  # noqa: S311 - spreads load
    return min(MAX_DELAY, longer)


class FailureLog:
    """Logs each failed attempt, up to a limit per minute and receiver.

    :param service: name of this service.
    """

    def __init__(self, service: str) -> None:
        self._service = service
        self._log = BoundedLog(logger)

    def final(self, event: Event, failure: Failure) -> None:
        """Log a failure that is not retried."""
        if failure.name:
            text = "The receiver %s failed at the event %s of %r from %r: %s"
        else:
            text = "After a receiver%s, at the event %s of %r from %r, a teardown failed: %s"

        self._write(partial(self._log.error, exc_info=failure.error), event, failure, text)

    def judged(
        self,
        event: Event,
        failure: Failure,
        verdict: Verdict,
        *,
        due: float,
        is_known: bool = False,
    ) -> None:
        """Log a failure at a stream event, and the decision about it.

        :param due: time of the retry, in seconds since 1970.
        :param is_known: True if the attempt before had the same traceback; it is not logged again.
        """
        again = f"and is tried again in {verdict.after:.1f} s, at {_moment(due)}"
        dead = f"now a dead letter of {self._service!r}"
        log: Callable[..., None]

        if verdict.reason == "rejected":
            log, text, follows = self._log.warning, "rejects the event", dead
        elif isinstance(failure.error, Retry) and verdict.reason is None:
            log, text, follows = self._log.info, "asks for another attempt at the event", again
        else:
            log = partial(self._log.error, exc_info=None if is_known else failure.error)
            text, follows = "failed at the event", f"the last, {dead}" if verdict.reason else again

        text = f"The receiver %s {text} %s of %r from %r, attempt {event.attempt}, {follows}: %s"
        self._write(log, event, failure, text)

    def _write(self, log: Callable[..., None], event: Event, failure: Failure, text: str) -> None:
        log(
            f"{text[:20]} {failure.name} {event.name}",
            text,
            failure.name,
            event.id,
            event.name,
            event.source,
            f"{type(failure.error).__name__}: {text_of(failure.error)}",
            extra={**event.fields, "service": self._service, "receiver": failure.name},
        )


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


#: Prefix of each body before it is hashed, so that no publisher can construct equal hashes. It
#: differs in each process.
SECRET = secrets.token_bytes(16)


class Finding(Enum):
    """The result of comparing an event with the earlier ones."""

    #: An event with the same bytes came before.
    REPEATED = auto()
    #: The id, the node or the number contradicts another event: one of the two is forged.
    CONFLICT = auto()


def compare(known: OrderedDict[str, int], id: str, digest: int, most: int) -> Finding | None:
    """Compare an event with the one of the same id in ``known``, and store it there.

    Return ``None`` if ``known`` has no event with this id.

    :param digest: ``hash(SECRET + body)`` of the event's bytes.
    :param most: maximum number of ids in ``known``; the oldest is dropped first.
    """
    before = known.get(id)

    if before == digest:
        return Finding.REPEATED

    known[id] = digest

    if len(known) > most:
        known.popitem(last=False)

    return None if before is None else Finding.CONFLICT


class Conflicts:
    """Counts and logs events that contradict each other, and sends ``event_conflict``.

    They are delivered, because either may be genuine.
    """

    def __init__(self, context: Context) -> None:
        self._service = context.config.service
        self._counters = context.counters
        self._log = BoundedLog(logger)

    def report(self, event: Event) -> None:
        """Report an event that contradicts another one by its id, node or number."""
        self._counters.add("conflicts")
        self._log.error(
            f"conflict {event.name}",
            "The event %s of %r, which says it is from %r, contradicts another one. The same id or "
            "number came with other bytes, or its number is impossibly high, or its node belongs "
            "to another service. One of the two is forged. Both are delivered. Check in the ACL "
            "which users may publish %r.",
            event.id,
            event.name,
            event.source,
            event.name,
            extra={**event.fields, "service": self._service},
        )
        emit(event_conflict, self._service, name=event.name, event=event)
