"""The commands run, tail, publish, routes and check, and the group ``flask eventbus`` of all."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from reprlib import repr as short
from typing import Any

import click

from ..admin.overview import Overview
from ..admin.server import census, publish_one
from ..admin.tail import Filter, Tail, TailEvent
from ..bus import run_until_signal
from ..checks.findings import Finding
from ..checks.server import check as check_node
from ..errors import ConfigError
from ..text import counted, read_value
from .base import (
    AppProgram,
    Command,
    Group,
    Program,
    json_option,
    log_to_stderr,
    name_argument,
    parsed,
    pass_program,
    read_names,
    reader_is_gone,
)
from .dead import dead
from .output import as_json, as_line, findings_report, live_report, routes_report, to_json
from .relay import relay
from .replay import replay, seek
from .status import services, status


@click.command(
    cls=Command,
    short_help="Run a worker that only listens.",
    epilog="""Examples:

    \b
      flask --app mailer eventbus run
      flask --app mailer eventbus run --concurrency 8

    Exit codes: 0 after SIGTERM or Ctrl-C; 1 if there is nothing to listen to or a
    setting is wrong; 2 for a wrong argument. A second signal ends the process at once, with
    128 plus the signal's number.""",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 1_000),
    metavar="N",
    help="Run at most N receivers at the same time.  [default: EVENTBUS_CONCURRENCY]",
)
@pass_program
def run(program: Program, concurrency: int | None) -> None:
    """Run a worker: listen to events and run receivers, until SIGTERM or Ctrl-C.

    Receivers then get 'EVENTBUS_GRACE' seconds to finish. If Redis is not available, the
    worker reconnects by itself.
    """
    node = program.enabled_node("no event would be received", "listen")

    if not node.subscriptions:
        raise ConfigError(
            "There is nothing to listen to. Connect a receiver with @bus.on('user_registered'), "
            "or name its module in 'EVENTBUS_RECEIVERS'."
        )

    if concurrency is not None:
        node.config = replace(node.config, concurrency=concurrency)
        # Stopping the node makes it read its settings again at the next start.
        node.stop()

    log_to_stderr()
    run_until_signal(node)


def _read_pairs(texts: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return each ``KEY=VALUE`` as a key and the text after ``=``.

    :raises ValueError: a text has no key or no ``=``.
    """
    pairs = [text.partition("=") for text in texts]

    for text, (key, equals, _) in zip(texts, pairs, strict=True):
        if not key or not equals:
            raise ValueError(f"{text!r} is not KEY=VALUE. Write for example 'user_id=7'.")

    return tuple((key, value) for key, _, value in pairs)


@click.command(
    cls=Command,
    short_help="Show live events, one line each.",
    epilog="""Examples:

    \b
      flask eventbus tail
      flask eventbus tail user_registered 'order_*'
      flask eventbus tail --source accounts --match user_id=7
      flask eventbus tail --json price_changed | jq .data.price
      flask eventbus tail --count 1 --seconds 30 user_registered

    Exit codes: 0 after --count, --seconds or Ctrl-C; 1 if Redis refuses, was never
    reached, or fewer than --count events came; 2 for a wrong argument.""",
)
@click.argument("names", nargs=-1, metavar="[NAME]...", callback=parsed(read_names))
@json_option("Print each event as one JSON object per line, in full.")
@click.option(
    "--source", "sources", multiple=True, metavar="SERVICE", help="Only events from SERVICE."
)
@click.option(
    "--match",
    "pairs",
    multiple=True,
    metavar="KEY=VALUE",
    callback=parsed(_read_pairs),
    help="Only events whose payload has VALUE under KEY.",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="Exit after N events.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="Exit after S seconds.",
)
@pass_program
def tail(
    program: Program,
    names: tuple[str, ...],
    in_json: bool,
    sources: tuple[str, ...],
    pairs: tuple[tuple[str, str], ...],
    count: int | None,
    seconds: float | None,
) -> None:
    """Show live events, one line each: time, transport, name, source, id, payload.

    NAME is a signal or a pattern such as 'order_*'; the default is all signals. The transport
    is 'channel' or 'stream', and the command shows both. It also shows this service's own
    events, runs no receiver, leaves streams unchanged, and reconnects if Redis goes away.
    Notices, such as bytes that are not an event, go to stderr.
    """
    config = program.node.config
    source = Tail(
        url=config.url,
        prefix=config.prefix,
        codec=program.node.registry.codec.limited(config.max_event_bytes),
        names=names or ("*",),
        notify=lambda notice: click.echo(notice, err=True),
    )
    wanted = Filter(sources=sources, values=pairs)
    shown = 0

    with suppress(KeyboardInterrupt):
        for found in _until_gone(source.events(seconds)):
            if wanted.accepts(found.event):
                click.echo(as_json(found.event, found.entry) if in_json else as_line(found.event))
                shown += 1

            if shown == count:
                return

    if count is not None or not source.connected:
        raise click.exceptions.Exit(1)


def _until_gone(batches: Iterator[list[TailEvent]]) -> Iterator[TailEvent]:
    """Yield events until the reader of stdout exits.

    :raises BrokenPipeError: the reader of stdout has exited.
    """
    for events in batches:
        yield from events

        if reader_is_gone():
            raise BrokenPipeError("The reader of stdout has exited.")


def _read_payload(text: str) -> dict[str, Any]:
    """Return a JSON object; ``-`` reads it from stdin.

    :raises ValueError: the text is not a JSON object.
    """
    if text == "-":
        text = sys.stdin.read()

    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{short(text)} is not JSON: {error}.") from error

    if isinstance(value, dict):
        return value

    raise ValueError(f"{short(text)} is not a JSON object. Write for example '{{\"a\": 1}}'.")


@click.command(
    cls=Command,
    short_help="Publish one event.",
    epilog="""A VALUE that is a JSON number, true, false, null, a list or an object is read as
    JSON. Any other VALUE is text. For the text "7", use --json.

    Examples:

    \b
      flask eventbus publish user_registered user_id=7 email=ada@example.com
      flask eventbus publish price_changed sku=A-1 price=9.5 'tags=["new"]'
      flask eventbus publish price_changed --json '{"sku": "7", "price": 9.5}'
      cat event.json | flask eventbus publish price_changed --json -
      python -m flask_eventbus publish --stream user_registered user_id=7

    Exit codes: 0 if Redis has the event, with or without listeners; 1 if it was not
    published, if that is not known, or if too few replicas have it; 2 for a wrong argument.""",
)
@name_argument
@click.argument("pairs", nargs=-1, metavar="[KEY=VALUE]...", callback=parsed(_read_pairs))
@click.option(
    "--json",
    "payload",
    metavar="OBJECT",
    callback=parsed(_read_payload),
    help="Payload as a JSON object; '-' reads it from stdin. KEY=VALUE adds keys to it.",
)
@click.option(
    "--stream",
    is_flag=True,
    help="Publish to the stream, even if the app has no such route, or there is no app.",
)
@pass_program
def publish(
    program: Program,
    name: str,
    pairs: tuple[tuple[str, str], ...],
    payload: dict[str, Any] | None,
    stream: bool,
) -> None:
    """Publish one event as this service, and print its id.

    The event takes the app's route for NAME, or a channel if there is none. For a channel the
    command prints how many listeners got the event; for a stream, the id of its entry.
    """
    node = program.enabled_node("nothing is published", "publish")
    values: dict[str, Any] = {}

    for key, text in pairs:
        if key in values:
            raise click.UsageError(f"{key!r} is given twice. Write one list: '{key}=[1, 2]'.")

        values[key] = read_value(text)

    receipt = publish_one(node, name, {**(payload or {}), **values}, stream=stream)

    if receipt.entry is not None:
        outcome = f"Entry {receipt.entry} in the stream {receipt.key!r}."
    else:
        listeners = counted(receipt.listeners, "listener") if receipt.listeners else "No listener"
        outcome = f"{listeners} got it."

    click.echo(f"Published {receipt.event_id}. {outcome}")


@click.command(
    cls=Command,
    short_help="List routes, subscriptions and receivers.",
    epilog="""Examples:

    \b
      flask eventbus routes
      flask eventbus routes --json | jq '.subscribes[].name'
      python -m flask_eventbus --url redis://localhost:6379/0 routes

    Exit codes: 0; 1 if the app cannot be loaded or Redis is not available; 2 for a wrong
    argument.""",
)
@json_option("Print one JSON object.")
@pass_program
def routes(program: Program, in_json: bool) -> None:
    """List what this app publishes and subscribes to, and its receivers.

    The command does not connect to Redis. Without an app, it connects, and lists the channels
    that have listeners now, the streams with their groups, and the services that listen.
    """
    node = program.node
    found = Overview(node).as_json() if program.declares else census(node)
    report = routes_report if program.declares else live_report
    click.echo(to_json(found, indent=2) if in_json else "\n".join(report(found)))


@click.command(
    cls=Command,
    short_help="Find mistakes in the app and in Redis, and how to fix them.",
    epilog="""Examples:

    \b
      flask eventbus check
      flask eventbus check --strict
      python -m flask_eventbus --url redis://localhost:6379/0 check

    Exit codes: 0 without errors (with --strict: without warnings too); 1 with some; 2 for
    a wrong argument.""",
)
@click.option("--strict", is_flag=True, help="Exit with 1 on warnings too.")
@json_option("Print a JSON list of findings.")
@pass_program
def check(program: Program, strict: bool, in_json: bool) -> None:
    """Check this app and its Redis, and print what is wrong and how to fix it.

    The command publishes nothing, runs no receiver, and does not start to listen.
    """
    try:
        findings = check_node(program.node, program=program.declares)
    except ConfigError as error:
        advice = "Fix this first, then run the check again: nothing else was checked."
        findings = [Finding("error", str(error), advice)]

    bad = {"error", "warning"} if strict else {"error"}

    if in_json:
        click.echo(to_json(findings, indent=2))
    else:
        click.echo("\n".join(findings_report(findings)))

    if any(finding.level in bad for finding in findings):
        raise click.exceptions.Exit(1)


COMMANDS = (run, tail, publish, routes, check, relay, status, dead, replay, seek, services)


@click.group(
    "eventbus",
    cls=Group,
    short_help="Inspect, check and run the event bus.",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="'flask eventbus COMMAND --help' has examples and exit codes.",
)
@click.pass_context
def flask_commands(context: click.Context) -> None:
    """Inspect, check and run the event bus of this app."""
    context.obj = AppProgram(context)


for command in COMMANDS:
    flask_commands.add_command(command)
