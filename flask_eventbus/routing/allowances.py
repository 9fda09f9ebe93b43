"""What a receiver is allowed: how often it is tried again, and how long it may take."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from ..errors import ConfigError
from .bus_signal import Receiver
from .options import matches
from .subscriptions import read_retries


@dataclass(frozen=True, slots=True)
class Allowance:
    """What one receiver asked for; ``None`` where it did not."""

    retries: int | None = None
    #: Seconds.
    timeout: float | None = None

    def check(self, receiver: Receiver, where: str) -> None:
        """Refuse a timeout that could not be kept.

        :raises ConfigError: the receiver is no coroutine function.
        """
        if self.timeout is not None and not is_coroutine_function(receiver):
            raise ConfigError(
                f"{where}: {receiver!r} has a timeout, and Python cannot interrupt a function that "
                "is no 'async def'. Write it as one, or take the timeout off and set one where it "
                "waits, for example requests.get(..., timeout=5)."
            )


NOTHING = Allowance()


class Allowances:
    """What the receivers of a bus asked for, by the name or pattern they were connected with."""

    def __init__(self) -> None:
        self._asked: dict[object, list[tuple[str, Receiver, Allowance]]] = {}

    def note(self, name: str, receiver: Receiver, allowance: Allowance) -> None:
        """Keep what a receiver asked for when it was connected."""
        if allowance != NOTHING:
            self._asked.setdefault(_identity(receiver), []).append((name, receiver, allowance))

    def of(self, name: str, receiver: Receiver) -> Allowance:
        """What a receiver asked for at events of ``name``; of two, what it asked for last."""
        asked = self._asked.get(_identity(receiver), ())
        return next((found for known, _, found in reversed(asked) if matches(known, name)), NOTHING)


def read_allowance(retries: object, timeout: object, where: str) -> Allowance:
    """Check what a receiver asks for.

    :raises ConfigError: one of it is wrong.
    """
    asked = None if retries is None else read_retries(f"{where}['retries']", retries)

    if timeout is None:
        return Allowance(asked)

    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)

    if not is_number or not 0 < timeout <= 86_400:  # type: ignore[operator]  # a number by then
        raise ConfigError(
            f"{where}['timeout'] is {timeout!r}. Set it to a number of seconds, more than 0."
        )

    return Allowance(asked, float(timeout))  # type: ignore[arg-type]  # a number by then


def is_coroutine_function(receiver: Receiver) -> bool:
    """Whether calling it makes a coroutine."""
    call = getattr(receiver, "__call__", None)  # noqa: B004 - the method itself is looked at
    return inspect.iscoroutinefunction(receiver) or inspect.iscoroutinefunction(call)


def _identity(receiver: Receiver) -> object:
    """The same for a method however often it is looked up."""
    owner = getattr(receiver, "__self__", None)
    function = getattr(receiver, "__func__", None)
    return id(receiver) if owner is None or function is None else (id(owner), id(function))
