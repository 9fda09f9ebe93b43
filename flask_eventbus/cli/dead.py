"""The commands ``dead list``, ``show``, ``retry``, ``drop`` and ``purge``."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from itertools import islice
from typing import Any, cast

import click

from ..admin.dead_letters import (
    Choice,
    DeadLetters,
    Letter,
    Retrial,
    read_payload,
    why_not,
)
from ..admin.streams import read_age
from ..codec.records import REASONS, DeadLetter, entry_id
from ..text import clock, counted, printable
from .base import (
    Group,
    Program,
    confirm,
    json_option,
    parsed,
    pass_program,
    read_names,
    yes_option,
)
from .output import cut, span, terminal_width, to_json

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

#: What each reason means.
_REASONS = {
    "retries": "every attempt failed",
    "rejected": "the receiver rejected it",
    "killed": "its worker died at every attempt",
    "gone": "the receiver is not connected any more",
    "undecodable": "it cannot be decoded",
}


def nothing(service: str, choice: Choice) -> str:
    """Return the sentence that nothing was found."""
    return f"{service!r} has no {'such ' if choice else ''}dead letters."


def list_report(
    letters: Iterable[Letter], service: str, choice: Choice, limit: int | None = None
) -> Iterator[str]:
    """Yield the lines of `dead list`: two for each dead letter, then their number.

    :param choice: the filter that selected the dead letters.
    :param limit: the most dead letters to show; the last line says if there are more.
    """
    counts = itertools.count()

    for letter in letters:
        if next(counts) == limit:
            yield f"The first {counted(limit, 'dead letter')}; there are more."
            return

        yield click.style(_where(letter), bold=True)
        line = f"  {printable(letter.content.reason)}: {printable(letter.content.error)}"
        yield cut(line, terminal_width())

    count = next(counts)
    yield f"{counted(count, 'dead letter')}." if count else nothing(service, choice)


def letter_report(letter: Letter) -> Iterator[str]:
    """Yield the lines of `dead show` for one dead letter."""
    content = letter.content
    yield f"{letter.id}  {letter.name}"

    for name, text in {
        "given up": clock(entry_id(letter.id)[0]),
        "reason": _joined(": ", content.reason, _REASONS.get(content.reason, "")),
        "receiver": content.receiver,
        "attempts": _attempts(content),
        "event": _joined(" from ", content.event_id, content.source),
        "entry": _entry(content.entry),
        "error": content.error,
        "payload": _marked(content.payload),
    }.items():
        yield f"  {name:<10} {printable(text) or '-'}"

    for field, value in content.fields.items():
        if field != b"event" or not content.payload:
            # As a bytes literal: an undecodable value cannot be shown as text.
            yield f"  {repr(field)[2:-1]:<10} {repr(value)[2:-1]}"

    if content.traceback:
        yield "  traceback"

    for line in content.traceback.splitlines():
        yield f"    {printable(line)}"


def retrial_report(retrial: Retrial, kept: DeadLetters, seconds: float) -> str:
    """Return one line about the retry of a dead letter: its outcome so far."""
    error = printable(retrial.error)
    outcome = {
        "handled": "handled.",
        "dead": f"a dead letter again: {error}",
        "failed": f"failed again, next attempt in {span(retrial.after)}: {error}",
        "running": f"still running after {seconds:g} s.",
        "waiting": (
            f"put back, but no worker of {kept.service!r} took it within {seconds:g} s. Start a "
            f"worker: {kept.command} run"
        ),
    }[retrial.state]
    return f"{printable(retrial.letter.shown)}: {outcome}"


def _where(letter: Letter) -> str:
    age = max(0.0, time.time() - entry_id(letter.id)[0] / 1000)
    receiver = printable(letter.content.receiver) or "no receiver"
    return f"{letter.id}  {letter.name}  {receiver}  {span(age)} ago"


def _joined(by: str, *parts: str) -> str:
    return by.join(part for part in parts if part)


def _attempts(content: DeadLetter) -> str:
    if not content.attempts:
        return ""

    times = f"{clock(content.first)} to {clock(content.last)}"
    return f"{content.attempts}, {times}" if content.first else f"{content.attempts}"


def _entry(text: str) -> str:
    try:
        return f"{text}, added {clock(entry_id(text)[0])}"
    except ValueError:
        # Another program may have written it.
        return text


def _marked(text: str) -> str:
    """Return a payload as text, marked if it is truncated."""
    try:
        read_payload(text or "{}")
    except (ValueError, RecursionError):
        return f"{text} ... (cut; see 'dead list --json')"

    return text


@click.group(
    cls=Group,
    short_help="List, retry and delete dead letters.",
    epilog="""Examples:

    \b
      flask eventbus dead list --receiver send_welcome
      flask eventbus dead show 1763848800000-0
      flask eventbus dead retry --signal user_registered
      flask eventbus dead purge --older-than 30d
      python -m flask_eventbus --service mailer dead list --json

    Exit codes: 0 if all was done; 1 if some or all was not, with the reason on stderr; 2 for
    a wrong argument. 'flask eventbus dead COMMAND --help' has more.""",
)
def dead() -> None:
    """List, retry and delete the dead letters of this service.

    A dead letter is an event that one receiver failed at every retry or rejected, or a stream
    entry that cannot be decoded. It stays until it is retried, dropped or purged.
    """


_FILTERS = {
    "signals": click.option(
        "--signal",
        "signals",
        multiple=True,
        metavar="NAME",
        callback=parsed(read_names),
        help="Only of this signal, or of a pattern such as 'order_*'.",
    ),
    "receivers": click.option(
        "--receiver",
        "receivers",
        multiple=True,
        metavar="NAME",
        help="Only of this receiver: 'mailer.receivers.send_welcome' or 'send_welcome'.",
    ),
    "reasons": click.option(
        "--reason",
        "reasons",
        multiple=True,
        type=click.Choice(REASONS),
        help="Only with this reason.",
    ),
    "older_than": click.option(
        "--older-than",
        metavar="AGE",
        callback=parsed(read_age),
        help="Only older than AGE, for example '7d', '12h' or '30m'.",
    ),
    "newer_than": click.option(
        "--newer-than", metavar="AGE", callback=parsed(read_age), help="Only newer than AGE."
    ),
}
_ids_argument = click.argument("ids", nargs=-1, metavar="[ID]...")
_all_option = click.option(
    "--all", "of_all", is_flag=True, help="Select all dead letters of this service."
)


def _selects(*selectors: _Decorator) -> _Decorator:
    """Add options that select dead letters to a command.

    The command gets the dead letters of the service, and the filter that the options stand for.

    :param selectors: options besides the filters. With ``--all``, one of them must be given.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(
            program: Program,
            /,
            ids: Sequence[str] = (),
            of_all: bool | None = None,
            **options: Any,
        ) -> None:
            choice = Choice(ids=ids, **{name: options.pop(name) for name in _FILTERS})

            if of_all and choice:
                raise click.UsageError(
                    "--all cannot be combined with ids or filters. Remove --all, or the others."
                )

            if of_all is False and not choice:
                raise click.UsageError(
                    "No dead letters selected. Pass ids, a filter such as --signal, or --all."
                )

            service = program.service

            with program.streams("dead") as access:
                function(DeadLetters(access, service, command=program.command), choice, **options)

        command: Any = pass_program(run)

        for option in reversed((*_FILTERS.values(), *selectors)):
            command = option(command)

        return cast(Callable[..., Any], command)

    return decorate


@dead.command(
    "list",
    short_help="List dead letters.",
    epilog="""Examples:

    \b
      flask eventbus dead list
      flask eventbus dead list --reason rejected --newer-than 1d
      flask eventbus dead list --limit 20
      flask eventbus dead list --json | jq -r .error | sort | uniq -c

    Exit codes: 0, also if there is none; 1 if Redis is not available; 2 for a wrong
    argument.""",
)
@_selects(_ids_argument)
@click.option(
    "--limit", type=click.IntRange(1), metavar="N", help="Read and show only the first N."
)
@json_option("Print each dead letter as one JSON object per line, in full.")
@pass_program
def list_(
    program: Program, kept: DeadLetters, choice: Choice, limit: int | None, in_json: bool
) -> None:
    """List dead letters, the oldest of each signal first.

    ID is the id of a dead letter or of an event.
    """
    letters = kept.find(choice)

    if in_json:
        for letter in islice(letters, limit):
            click.echo(to_json(letter.as_json(kept.service, program.node.codec)))
    else:
        for line in list_report(letters, kept.service, choice, limit):
            click.echo(line)


@dead.command(
    short_help="Show dead letters in full.",
    epilog="""Examples:

    \b
      flask eventbus dead show 1763848800000-0
      flask eventbus dead show 3f2a9c1b2d3e-17
      flask eventbus dead show --reason undecodable

    Exit codes: 0; 1 if an ID was not found, or Redis is not available; 2 for a wrong
    argument.""",
)
@_selects(_ids_argument, _all_option)
def show(kept: DeadLetters, choice: Choice) -> None:
    """Show dead letters in full: the payload, the error, and the traceback.

    ID is the id of a dead letter or of an event. Control characters are escaped.
    """
    shown = "\n\n".join("\n".join(letter_report(letter)) for letter in kept.select(choice))
    click.echo(shown or nothing(kept.service, choice))


@dead.command(
    short_help="Run the receivers that failed again.",
    epilog="""Examples:

    \b
      flask eventbus dead retry 1763848800000-0
      flask eventbus dead retry --receiver send_welcome --newer-than 1d
      flask eventbus dead retry --all --wait 60

    Exit codes: 0 if all were handled within --wait; 1 if not, or Redis is not available;
    2 for a wrong argument.""",
)
@_selects(_ids_argument, _all_option)
@click.option(
    "--wait",
    type=click.FloatRange(min=0, max=86_400),
    default=10.0,
    show_default=True,
    metavar="S",
    help="Seconds to wait for the outcomes.",
)
def retry(kept: DeadLetters, choice: Choice, wait: float) -> None:
    """Put dead letters back, each for the one receiver that failed.

    A worker of the service runs the receiver, with all its retries again. This command runs no
    receiver: it waits, and prints the outcome of each dead letter.
    """
    letters = kept.select(choice)
    put_back = []

    for letter in letters:
        if reason := why_not(letter, kept.command):
            click.echo(f"{printable(letter.shown)}: cannot be retried, {reason}")
        elif retrial := kept.put_back(letter):
            put_back.append(retrial)
        else:
            click.echo(
                f"{printable(letter.shown)}: no longer exists; it was retried or deleted meanwhile."
            )

    for retrial in kept.settled(put_back, wait):
        click.echo(retrial_report(retrial, kept, wait))

    for retrial in put_back:
        if not retrial.is_settled:
            click.echo(retrial_report(retrial, kept, wait))

    if not letters:
        click.echo(nothing(kept.service, choice))

    if sum(retrial.state == "handled" for retrial in put_back) < len(letters):
        raise click.exceptions.Exit(1)


@dead.command(
    short_help="Delete selected dead letters.",
    epilog="""Examples:

    \b
      flask eventbus dead drop 1763848800000-0
      flask eventbus dead drop --receiver send_welcome --yes

    Exit codes: 0 if they were deleted, or there was none; 1 if an ID was not found, you
    answered no, or Redis is not available; 2 for a wrong argument.""",
)
@_selects(_ids_argument, _all_option)
@yes_option
def drop(kept: DeadLetters, choice: Choice, yes: bool) -> None:
    """Delete dead letters for good, after asking.

    ID is the id of a dead letter or of an event.
    """
    _drop(kept, choice, yes)


@dead.command(
    short_help="Delete old dead letters, or all.",
    epilog="""Examples:

    \b
      flask eventbus dead purge --older-than 30d
      flask eventbus dead purge --reason undecodable --yes
      flask eventbus dead purge

    Exit codes: 0 if they were deleted, or there was none; 1 if you answered no, or Redis
    is not available; 2 for a wrong argument.""",
)
@_selects()
@yes_option
def purge(kept: DeadLetters, choice: Choice, yes: bool) -> None:
    """Delete all dead letters of this service that match the options, after asking.

    Without an option, all are deleted, and 'status' counts dropped dead letters from zero
    again. Deleted dead letters cannot be restored.
    """
    _drop(kept, choice, yes)

    if not choice:
        kept.forget_dropped()


def _drop(kept: DeadLetters, choice: Choice, yes: bool) -> None:
    letters = kept.select(choice)

    if not letters:
        click.echo(nothing(kept.service, choice))
        return

    what = counted(len(letters), "dead letter")

    confirm(f"Delete {what} of {kept.service!r} for good?", yes)
    click.echo(f"Deleted {counted(kept.drop(letters), 'dead letter')}.")
