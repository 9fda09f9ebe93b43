"""The command ``dead``: what a service could not handle, and what is to become of it."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import click

from ..admin.dead_letters import Choice, DeadLetters, Letter, Retrial, Retrials, why_not
from ..admin.places import clock, iso
from ..admin.streams import StreamAccess
from ..codec.codec import Codec
from ..codec.entry_ids import entry_id
from ..codec.records import REASONS, DeadLetter
from ..errors import DecodeError
from ..text import counted, plain, printable
from .arguments import read_names, read_span
from .base import Command, Group, Program, pass_program, service_of
from .output import span

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
        "payload": _marked(content.payload),
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


def as_json(letter: Letter, service: str, codec: Codec) -> str:
    """A dead letter as a JSON object in one line; its bytes are base64."""
    content = letter.content
    payload, cut = _payload(content, codec)
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
            "payload": payload,
            "payload_cut": cut,
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


def _payload(content: DeadLetter, codec: Codec) -> tuple[object, str | None]:
    """Return the payload, and the beginning of one that is cut and cannot be had whole."""
    if not content.payload:
        return None, None

    with suppress(ValueError, RecursionError):
        return _parsed(content.payload), None

    try:
        event = codec.decode(content.fields.get(b"event", b""), via="stream")
    except DecodeError:
        return None, content.payload

    return plain(dict(event.payload)), None


def _parsed(text: str) -> object:
    # Numbers past JSON's, which others and older versions write, become text.
    return plain(json.loads(text, parse_constant=lambda name: str(float(name))))


def _marked(text: str) -> str:
    """Return a payload for people, with a mark if it is cut."""
    try:
        _parsed(text or "{}")
    except (ValueError, RecursionError):
        return f"{text} ... (cut; see 'dead list --json')"

    return text


def _encoded(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    return {
        field.decode(errors="backslashreplace"): base64.b64encode(value).decode()
        for field, value in fields.items()
    }


def _bytes(value: bytes) -> str:
    return repr(value)[2:-1]


#: What ``CLIENT LIST`` shows.
CLIENT_NAME = "eventbus-dead"


@click.group(
    cls=Group,
    short_help="List dead letters, and retry or drop them.",
    epilog="""Examples:

    \b
      flask eventbus dead list --receiver send_welcome
      flask eventbus dead show 1763848800000-0
      flask eventbus dead retry --signal user_registered
      flask eventbus dead purge --older-than 30d
      python -m flask_eventbus --service mailer dead list --json

    Exit codes: 0 when it is done; 1 when it is not, in part or at all, which is said; 2 for
    a mistake in the command. 'flask eventbus dead COMMAND --help' has more.""",
)
def dead() -> None:
    """Look at the dead letters of this service, and decide what becomes of them.

    A dead letter is an event that one receiver was not able to handle, after all its retries or
    because it said so; or an entry of a stream that does not read. It stays until somebody
    retries it, drops it or purges it.
    """


def _choosing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which dead letters are meant."""
    for option in reversed(
        (
            click.option(
                "--signal",
                "signals",
                multiple=True,
                metavar="NAME",
                callback=_read_signals,
                help="Only of this signal, or of a pattern such as 'order_*'.",
            ),
            click.option(
                "--receiver",
                "receivers",
                multiple=True,
                metavar="NAME",
                help="Only of this receiver: 'mailer.receivers.send_welcome' or 'send_welcome'.",
            ),
            click.option(
                "--reason",
                "reasons",
                multiple=True,
                type=click.Choice(REASONS),
                help="Only those given up for this reason.",
            ),
            click.option(
                "--older-than",
                metavar="AGE",
                callback=read_span,
                help="Only those given up longer ago, for example '7d', '12h' or '30m'.",
            ),
            click.option(
                "--newer-than",
                metavar="AGE",
                callback=read_span,
                help="Only those given up since then.",
            ),
        )
    ):
        function = option(function)

    return function


def _choice(
    *,
    ids: Sequence[str] = (),
    signals: Sequence[str],
    receivers: Sequence[str],
    reasons: Sequence[str],
    older_than: int | None,
    newer_than: int | None,
) -> Choice:
    return Choice(
        ids=ids,
        signals=signals,
        receivers=receivers,
        reasons=reasons,
        older_than=older_than,
        newer_than=newer_than,
    )


def _read_signals(
    ctx: click.Context, param: click.Parameter, names: tuple[str, ...]
) -> tuple[str, ...]:
    return read_names(ctx, param, names) if names else ()


class _Desk:
    """The dead letters of a program's service, and those of them that are meant."""

    def __init__(self, access: StreamAccess, service: str) -> None:
        self.access = access
        self.service = service
        self.letters = DeadLetters(access, service)

    def find(self, choice: Choice) -> list[Letter]:
        """Those that are meant.

        :raises click.ClickException: one that was named is not there, or may be another.
        """
        found = list(self.letters.find(choice))
        self._refuse_namesakes(choice, found)
        known = {name for letter in found for name in (letter.id, letter.content.event_id)}
        missing = [name for name in choice.ids if name not in known]

        for name in missing:
            click.echo(f"{self.service!r} has no such dead letter: {printable(name)!r}.", err=True)

        if missing:
            raise click.ClickException(
                "Nothing was done. See what there is: flask eventbus dead list"
            )

        return found

    def _refuse_namesakes(self, choice: Choice, found: Sequence[Letter]) -> None:
        """Two signals may have a dead letter of the same id: one of them is meant."""
        for name in choice.ids:
            signals = sorted(letter.name for letter in found if letter.id == name)

            if len(signals) > 1:
                raise click.ClickException(
                    f"{name} is the id of several dead letters: of {', '.join(signals)}. Say which "
                    "with --signal."
                )


@contextmanager
def _desk(program: Program) -> Iterator[_Desk]:
    service = service_of(program)

    with StreamAccess(program.node.config, name=CLIENT_NAME) as access:
        yield _Desk(access, service)


def _chosen(ids: Sequence[str], of_all: bool, **options: Any) -> Choice:
    """What is meant, said in some way.

    :raises click.UsageError: nothing is said, or both something and everything.
    """
    choice = _choice(ids=ids, **options)

    if of_all and choice:
        raise click.UsageError("--all goes with no id and no other choice. Leave one out.")

    if not of_all and not choice:
        raise click.UsageError(
            "It is not said which. Name their ids, choose them by an option such as --signal, or "
            "take --all."
        )

    return choice


_all_option = click.option("--all", "of_all", is_flag=True, help="All of this service's.")
_ids_argument = click.argument("ids", nargs=-1, metavar="[ID]...")
_yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


@dead.command(
    "list",
    cls=Command,
    short_help="List them.",
    epilog="""Examples:

    \b
      flask eventbus dead list
      flask eventbus dead list --reason rejected --newer-than 1d
      flask eventbus dead list --limit 20
      flask eventbus dead list --json | jq -r .error | sort | uniq -c

    Exit codes: 0, also when there is none; 1 if Redis cannot be asked; 2 for a mistake in
    the command.""",
)
@_ids_argument
@_choosing
@click.option(
    "--limit", type=click.IntRange(1), metavar="N", help="Read and show the first N only."
)
@click.option("--json", "in_json", is_flag=True, help="One JSON object per line, in full.")
@pass_program
def list_(
    program: Program,
    /,
    ids: tuple[str, ...],
    limit: int | None,
    in_json: bool,
    **options: Any,
) -> None:
    """List dead letters, the oldest of each signal first.

    ID is that of a dead letter, or of an event.
    """
    with _desk(program) as desk:
        letters = desk.letters.find(_choice(ids=ids, **options))
        in_full = (
            as_json(letter, desk.service, program.node.codec) for letter in islice(letters, limit)
        )

        for line in in_full if in_json else list_report(letters, desk.service, limit):
            click.echo(line)


@dead.command(
    cls=Command,
    short_help="Show everything of some.",
    epilog="""Examples:

    \b
      flask eventbus dead show 1763848800000-0
      flask eventbus dead show 3f2a9c1b2d3e-17
      flask eventbus dead show --reason undecodable

    Exit codes: 0; 1 if one that is named is not there, or Redis cannot be asked; 2 for a
    mistake in the command.""",
)
@_ids_argument
@_choosing
@_all_option
@pass_program
def show(program: Program, /, ids: tuple[str, ...], of_all: bool, **options: Any) -> None:
    """Show dead letters in full: the payload, the error, and the traceback.

    ID is that of a dead letter, or of an event. Nothing in them can move the cursor of a
    terminal.
    """
    choice = _chosen(ids, of_all, **options)

    with _desk(program) as desk:
        letters = desk.find(choice)

    shown = "\n\n".join("\n".join(letter_report(letter)) for letter in letters)
    click.echo(shown or nothing(desk.service))


@dead.command(
    cls=Command,
    short_help="Let the receivers that failed run again.",
    epilog="""Examples:

    \b
      flask eventbus dead retry 1763848800000-0
      flask eventbus dead retry --receiver send_welcome --newer-than 1d
      flask eventbus dead retry --all --wait 60

    Exit codes: 0 only if all of them were handled; 1 if not, or Redis cannot be asked; 2 for
    a mistake in the command.""",
)
@_ids_argument
@_choosing
@_all_option
@click.option(
    "--wait",
    type=click.FloatRange(min=0, max=86_400),
    default=10.0,
    show_default=True,
    metavar="S",
    help="Seconds to watch what becomes of them.",
)
@pass_program
def retry(
    program: Program, /, ids: tuple[str, ...], of_all: bool, wait: float, **options: Any
) -> None:
    """Put dead letters back to be run, each for only the receiver that failed.

    A worker of the service runs it, with all its retries before it; this command runs no
    receiver, watches, and says what became of each.
    """
    choice = _chosen(ids, of_all, **options)

    with _desk(program) as desk:
        letters = desk.find(choice)

        if not letters:
            click.echo(nothing(desk.service))
            return

        if _retry(desk, letters, wait) < len(letters):
            raise click.exceptions.Exit(1)


def _retry(desk: _Desk, letters: Sequence[Letter], wait: float) -> int:
    """Put letters back, say what becomes of each, and return how many were handled."""
    retrials = Retrials(desk.access, desk.service)
    put_back = []

    for letter in letters:
        if reason := why_not(letter):
            click.echo(f"{printable(letter.shown)}: cannot be retried, {reason}")
        elif retrial := retrials.put_back(letter):
            put_back.append(retrial)
        else:
            click.echo(f"{printable(letter.shown)}: is gone; somebody else has seen to it.")

    for retrial in retrials.settled(put_back, wait):
        click.echo(retrial_report(retrial, desk.service, wait))

    for retrial in put_back:
        if not retrial.is_settled:
            click.echo(retrial_report(retrial, desk.service, wait))

    return sum(retrial.state == "handled" for retrial in put_back)


@dead.command(
    cls=Command,
    short_help="Delete some.",
    epilog="""Examples:

    \b
      flask eventbus dead drop 1763848800000-0
      flask eventbus dead drop --receiver send_welcome --yes

    Exit codes: 0 when they are deleted, or there was none; 1 if one that is named is not
    there, the answer was no, or Redis cannot be asked; 2 for a mistake in the command.""",
)
@_ids_argument
@_choosing
@_all_option
@_yes_option
@pass_program
def drop(
    program: Program, /, ids: tuple[str, ...], of_all: bool, yes: bool, **options: Any
) -> None:
    """Delete dead letters, after asking. They cannot be brought back.

    ID is that of a dead letter, or of an event.
    """
    choice = _chosen(ids, of_all, **options)

    with _desk(program) as desk:
        _drop(desk, desk.find(choice), yes)


@dead.command(
    cls=Command,
    short_help="Delete old ones, or all.",
    epilog="""Examples:

    \b
      flask eventbus dead purge --older-than 30d
      flask eventbus dead purge --reason undecodable --yes
      flask eventbus dead purge

    Exit codes: 0 when they are deleted, or there was none; 1 if the answer was no, or Redis
    cannot be asked; 2 for a mistake in the command.""",
)
@_choosing
@_yes_option
@pass_program
def purge(program: Program, /, yes: bool, **options: Any) -> None:
    """Delete all dead letters of this service that fit, after asking.

    Without an option those are all, and the count of dropped ones in 'status' begins anew. They
    cannot be brought back.
    """
    choice = _choice(**options)

    with _desk(program) as desk:
        _drop(desk, desk.find(choice), yes)

        if not choice:
            desk.letters.forget_dropped()


def _drop(desk: _Desk, letters: Sequence[Letter], yes: bool) -> None:
    if not letters:
        click.echo(nothing(desk.service))
        return

    what = counted(len(letters), "dead letter")

    if not yes:
        click.confirm(f"Delete {what} of {desk.service!r} for good?", abort=True)

    click.echo(f"Deleted {counted(desk.letters.drop(letters), 'dead letter')}.")
