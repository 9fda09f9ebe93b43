"""Dead letters as people read them, and as programs do."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping

import click

from ..admin.dead_letters import Letter
from ..admin.dead_retry import Retrial
from ..admin.places import clock, iso
from ..codec.entry_ids import entry_id
from ..text import counted, plain, printable
from .tables import span

#: What the reasons mean.
_REASONS = {
    "retries": "it failed at every attempt that it had",
    "rejected": "the receiver rejected it",
    "killed": "its worker died each time",
    "gone": "no such receiver is connected any more",
    "undecodable": "it does not read as an event",
}


def nothing(service: str) -> str:
    """That there is none."""
    return f"{service!r} has no such dead letters."


def list_report(letters: Iterable[Letter], service: str, limit: int | None = None) -> Iterator[str]:
    """The lines of `dead list`: two for each, and how many they are.

    :param limit: how many are shown at most; the last line says so if there are more.
    """
    counts = itertools.count()

    for letter in letters:
        if next(counts) == limit:
            yield f"The first {counted(limit, 'dead letter')}; there are more."
            return

        yield click.style(_where(letter), bold=True)
        yield _fitted(f"  {printable(letter.content.reason)}: {printable(letter.content.error)}")

    count = next(counts)
    yield f"{counted(count, 'dead letter')}." if count else nothing(service)


def letter_report(letter: Letter) -> Iterator[str]:
    """The lines of `dead show`: everything that is known of one."""
    content = letter.content
    yield f"{letter.id}  {letter.name}"

    for name, text in {
        "given up": clock(entry_id(letter.id)[0]),
        "reason": ": ".join(part for part in (content.reason, _meaning(letter)) if part),
        "receiver": content.receiver,
        "attempts": _attempts(letter),
        "event": _event(letter),
        "entry": _entry(content.entry),
        "error": content.error,
        "payload": content.payload,
    }.items():
        yield f"  {name:<10} {printable(text) or '-'}"

    for field, value in content.fields.items():
        if field != b"event" or not content.payload:
            # As Python writes bytes: nothing else shows what cannot be read.
            yield f"  {_bytes(field):<10} {_bytes(value)}"

    if content.traceback:
        yield "  traceback"

    for line in content.traceback.splitlines():
        yield f"    {printable(line)}"


def as_json(letter: Letter, service: str) -> str:
    """A dead letter as a JSON object in one line; its bytes are base64."""
    content = letter.content
    return json.dumps(
        {
            "id": letter.id,
            "signal": letter.name,
            "service": service,
            "reason": content.reason,
            "receiver": content.receiver or None,
            "attempts": content.attempts,
            "first_failed": iso(content.first),
            "last_failed": iso(content.last),
            "given_up": iso(entry_id(letter.id)[0]),
            "event_id": content.event_id or None,
            "source": content.source or None,
            "entry": content.entry or None,
            "error": content.error,
            "traceback": content.traceback,
            "payload": _payload(content.payload),
            "fields": _encoded(content.fields),
        },
        allow_nan=False,
    )


def retrial_report(retrial: Retrial, service: str, seconds: float) -> str:
    """What became of a dead letter that was put back."""
    return f"{printable(retrial.letter.shown)}: {_outcome(retrial, service, seconds)}"


def _outcome(retrial: Retrial, service: str, seconds: float) -> str:
    error = printable(retrial.error)

    if retrial.state == "handled":
        return "handled."

    if retrial.state == "dead":
        return f"a dead letter again: {error}"

    if retrial.state == "failed":
        return f"failed again, next attempt in {span(retrial.after)}: {error}"

    if retrial.state == "running":
        return f"still running after {seconds:g} s."

    return (
        f"put back, but no worker of {service!r} took it within {seconds:g} s. One that listens "
        "will: flask eventbus run"
    )


def _where(letter: Letter) -> str:
    age = max(0.0, time.time() - entry_id(letter.id)[0] / 1000)
    return f"{letter.id}  {letter.name}  {_receiver(letter)}  {span(age)} ago"


def _receiver(letter: Letter) -> str:
    return printable(letter.content.receiver) or "no receiver"


def _fitted(line: str) -> str:
    """The line, in a terminal no longer than that is wide."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else len(line)
    return line if len(line) <= width else f"{line[: width - 3]}..."


def _meaning(letter: Letter) -> str:
    return _REASONS.get(letter.content.reason, "")


def _attempts(letter: Letter) -> str:
    content = letter.content

    if not content.attempts:
        return ""

    times = f"{clock(content.first)} to {clock(content.last)}"
    return f"{content.attempts}, {times}" if content.first else f"{content.attempts}"


def _event(letter: Letter) -> str:
    content = letter.content
    return " from ".join(part for part in (content.event_id, content.source) if part)


def _entry(text: str) -> str:
    try:
        return f"{text}, added {clock(entry_id(text)[0])}"
    except ValueError:
        # Somebody may have edited it.
        return text


def _payload(text: str) -> object:
    try:
        # Numbers past JSON's, which others and older versions write, become text.
        return plain(json.loads(text, parse_constant=lambda name: str(float(name))))
    except (ValueError, RecursionError):
        # Cut, or written by somebody else.
        return text or None


def _encoded(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    return {
        field.decode(errors="backslashreplace"): base64.b64encode(value).decode()
        for field, value in fields.items()
    }


def _bytes(value: bytes) -> str:
    return repr(value)[2:-1]
