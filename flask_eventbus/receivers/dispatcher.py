"""The inbound half: runs a service's receivers for an event, each by itself."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..coroutines import run_coroutine
from ..errors import ReceiverError
from ..event import Event, handling, opened
from ..logs import BoundedLog, Counters, get_logger
from ..routing.bus_signal import Receiver
from ..signals import emit_now, receiver_failed, receiver_succeeded
from .retries import Failure, FailureLog

logger = get_logger(__name__)


class Status(Enum):
    """How the receivers of an event ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    #: There is no receiver, so nothing ran.
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Result:
    """How the receivers of an event ended, with an entry for each error."""

    status: Status
    #: Failed receivers, and teardowns that raised. The latter do not make the status FAILED.
    failures: Sequence[Failure] = ()


_SUCCEEDED = Result(Status.SUCCEEDED)
_GONE = Result(Status.GONE)


class Dispatcher:
    """Re-emits events as local signals, so that no receiver can stop another.

    :param service: this service, for logs.
    :param receivers: the receivers here of an event, by its name and its source.
    :param scope: what each receiver runs in: in Flask, a fresh app context. What the receiver
        raises passes through it.
    :param tells: whether to log each event that a receiver handled: ``EVENTBUS_LOG_EVENTS``.
    :param undo: called in the scope of a receiver that failed; never raises.
    :param connected: the receivers of a name, in the order in which they were connected.
    :param timeout: the seconds that a receiver which is a coroutine function has; ``None`` for all.
    """

    def __init__(
        self,
        *,
        service: str,
        receivers: Callable[[str, str], Sequence[Receiver]],
        scope: Callable[[], AbstractContextManager[object]],
        counters: Counters,
        timeout: Callable[[str, Receiver], float | None] = lambda name, receiver: None,
        connected: Callable[[str], Sequence[Receiver]] = lambda name: (),
        undo: Callable[[], None] = lambda: None,
        tells: bool = False,
    ) -> None:
        self._service = service
        self._receivers = receivers
        self._scope = scope
        self._timeout = timeout
        self._connected = connected
        self._undo = undo
        self._tells = tells
        self._counters = counters
        self._log = BoundedLog(logger)
        #: Where callers of :meth:`dispatch` log what failed, once they know what follows.
        self.failures = FailureLog(service)

    def has_receivers(self, name: str) -> bool:
        """Return True if anything here receives ``name``, from any service or some."""
        return bool(self._connected(name))

    def receivers(self, event: Event, *, only: str | None = None) -> Sequence[Receiver]:
        """The receivers of ``event`` that are to run here.

        :param only: the name of the one that is asked for.
        """
        found = self._receivers(event.name, event.source)

        if only is None:
            return found

        return [receiver for receiver in found if self._name(event.name, receiver) == only]

    def dispatch(
        self, event: Event, *, only: str | None = None, receivers: Sequence[Receiver] | None = None
    ) -> Result:
        """Run every receiver for ``event``, each in a scope of its own; never raises.

        The caller logs the failures in :attr:`failures`: it knows what follows.

        :param only: the name of the receiver that is to run alone.
        :param receivers: what :meth:`receivers` returned, if the caller asked for it.
        """
        if receivers is None:
            receivers = self.receivers(event, only=only)

        if not receivers:
            if only is None:
                self._skip(event)

            return _GONE

        failures: list[Failure] = []
        event = opened(event)
        token = handling.set(event)

        try:
            for receiver in receivers:
                self._run(receiver, event, failures)
        finally:
            handling.reset(token)

        self._counters.add("handled")

        if not failures:
            return _SUCCEEDED

        has_failed = any(failure.name for failure in failures)
        return Result(Status.FAILED if has_failed else Status.SUCCEEDED, failures)

    def dispatch_once(self, event: Event, *, only: str | None = None) -> Sequence[Failure]:
        """Run receivers as :meth:`dispatch` does, and log failures as final."""
        failures = self.dispatch(event, only=only).failures

        for failure in failures:
            self.failures.final(event, failure)

        return failures

    def _run(self, receiver: Receiver, event: Event, failures: list[Failure]) -> None:
        """Run one receiver in its scope, and note what went wrong."""
        begin = time.monotonic()
        has_begun = False
        raised: BaseException | None = None

        try:
            with self._scope():
                has_begun = True

                try:
                    self._call(receiver, event)
                except BaseException as error:
                    # Even SystemExit: a receiver cannot end the process that others depend on.
                    raised = error
                    self._undo()
                    raise
        except BaseException as error:
            if raised is None and not has_begun:
                # Without its scope the receiver cannot run.
                raised = error
            elif error is not raised:
                failures.append(self._failed(receiver, "", event, error))

        if raised is not None:
            name = self._name(event.name, receiver)
            failures.append(self._failed(receiver, name, event, raised))
        elif self._tells or receiver_succeeded.receivers:
            self._succeeded(receiver, event, time.monotonic() - begin)

    def _call(self, receiver: Receiver, event: Event) -> None:
        result = receiver(event.source, **event.payload)

        if result is not None and inspect.iscoroutine(result):
            timeout = self._timeout(event.name, receiver)
            run_coroutine(result if timeout is None else _in_time(result, timeout))

    def _succeeded(self, receiver: Receiver, event: Event, seconds: float) -> None:
        if self._tells:
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
        """What tells a receiver from the others of an event, in every process of the service.

        Where several have one name, as functions that a decorator made may, those after the first
        get a number.
        """
        name = name_of(receiver)
        same = [found for found in self._connected(event_name) if name_of(found) == name]
        number = next((n for n, found in enumerate(same) if found == receiver), 0)
        return f"{name}#{number + 1}" if number else name

    def _skip(self, event: Event) -> None:
        if self.has_receivers(event.name):
            # They hear other services only, or the signal is muted.
            self._counters.add("passed_over")
            return

        self._counters.add("unknown")
        self._log.warning(
            f"unknown {event.name}",
            "Nothing here receives %r: the event %s from %r is skipped. Connect a receiver with "
            "bus.on(%r), or take the name out of 'EVENTBUS_SUBSCRIBE'.",
            event.name,
            event.id,
            event.source,
            event.name,
            extra={**event.fields, "service": self._service},
        )


def name_of(receiver: object) -> str:
    """The receiver as a reader of logs would look for it: ``module.qualname``."""
    try:
        function = inspect.unwrap(receiver) if callable(receiver) else receiver
        function = getattr(function, "__func__", function)
        name = getattr(function, "__qualname__", None)
        return f"{function.__module__}.{name}" if name else repr(receiver)
    except Exception:
        # It may be any object, and do anything when it is asked for its name.
        return object.__repr__(receiver)


async def _in_time(coroutine: Coroutine[Any, Any, Any], seconds: float) -> None:
    """Await a receiver, and cancel it when its time is over.

    :raises TimeoutError: it is.
    """
    limit = asyncio.timeout(seconds)

    try:
        async with limit:
            await coroutine
    except TimeoutError:
        # It may be one of its own.
        if limit.expired():
            raise TimeoutError(f"It took longer than its timeout of {seconds:g} s.") from None

        raise


def explain(receiver: Receiver, event: Event, error: BaseException) -> BaseException:
    """A :class:`ReceiverError` in place of a ``TypeError`` when the payload does not fit."""
    if not isinstance(error, TypeError):
        return error

    misfit = misfit_of(receiver, event.payload)

    if misfit is None:
        return error

    unfit = unfit_signature(receiver, event.payload)
    advice = (
        "Send what is missing, or give the parameter a default"
        if misfit.startswith("missing")
        else "Let the receiver take them, or let it end with **extra"
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
    """Return why ``receiver`` can take no event with these keys, and the remedy."""
    try:
        signature = inspect.signature(receiver)
        parameters = list(signature.parameters.values())
    except Exception:
        # It has none, or it is an object that does anything when it is asked for it.
        return None

    try:
        signature.bind_partial(None)
    except TypeError:
        return "it has no parameter for the sender", "Let it begin with 'sender'"

    for parameter in parameters[1:]:
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            reason = f"it needs {parameter.name!r} by position, and payloads come by name"
            return reason, "Take the '/' out of its parameters"

    first = parameters[0]

    if first.kind is first.POSITIONAL_OR_KEYWORD and first.name in payload:
        return (
            f"its first parameter is {first.name!r}, which gets the sender, and the payload has a "
            "value of that name too",
            f"Let it begin with 'sender', followed by {first.name!r}",
        )

    return None


def misfit_of(receiver: Receiver, payload: Iterable[str]) -> str | None:
    """What keeps ``receiver`` from being called with ``payload``'s keys; ``None`` if nothing."""
    try:
        signature = inspect.signature(receiver)
    except Exception:
        # It has none, or it is an object that does anything when it is asked for it.
        return None

    try:
        signature.bind(None, **dict.fromkeys(payload))
    except TypeError as error:
        return str(error)

    return None
