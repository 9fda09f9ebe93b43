"""What is heard for `tail`, and what those who hear tell the one who shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..codec.codec import Codec
from ..errors import DecodeError
from ..event import Event

#: Bytes that are shown of what is no event.
SAMPLE = 64


@dataclass(frozen=True, slots=True)
class Heard:
    """An event, and the id of its entry where it came over a stream."""

    event: Event
    entry: str | None = None


class Spectator(Protocol):
    """Takes what is heard over channels and over streams; any thread may call it."""

    def show(self, heard: Sequence[Heard]) -> None:
        """Events came."""

    def tell(self, sentence: str) -> None:
        """Something is to be said to the person who watches."""

    def found(self, way: str) -> None:
        """All that is wanted is heard over ``way`` from now on, or is refused."""

    def refuse(self, way: str, name: str, sentence: str) -> None:
        """Redis does not let this user hear ``name`` over ``way``."""


def read_event(codec: Codec, name: str, body: bytes, *, via: str) -> Event:
    """The event of which ``body`` is the bytes.

    :raises DecodeError: it is none, or it is one of another name.
    """
    event = codec.decode(body, via=via)

    if event.name != name:
        raise DecodeError(f"It says it is {event.name!r}.", reason="wrong_channel")

    return event


def no_event(where: str, body: bytes, error: DecodeError) -> str:
    """A sentence about bytes that are no event."""
    return f"Not an event {where} ({error.reason}): {error} It begins with {body[:SAMPLE]!r}."
