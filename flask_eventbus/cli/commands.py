"""The commands run, tail, publish, routes and check, and the list of all commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import click

from ..admin.overview import Overview
from ..admin.publish import Receipt, publish_one
from ..admin.server import census
from ..admin.tail import Filter, Tail
from ..admin.tail_sources import TailEvent
from ..bus import run_until_signal
from ..checks.doctor import check as check_node
from ..checks.findings import Finding
from ..checks.findings import error as error_finding
from ..errors import ConfigError
from ..node import Node
from .arguments import read_name, read_names, read_pairs, read_payload, values_of
from .base import Command, Program, log_to_stderr, pass_program, reader_is_gone
from .dead import dead
from .output import as_json, as_line, findings_report, live_report, routes_report
from .relay import relay
from .replay import replay
from .seek import seek
from .services import services
from .status import status


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
    node = program.node

    if not node.config.enabled:
        raise ConfigError(
            "'EVENTBUS_ENABLED' is False, so no event would be received. Set it to True to listen."
        )

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
@click.argument("names", nargs=-1, metavar="[NAME]...", callback=read_names)
@click.option(
    "--json", "in_json", is_flag=True, help="Print each event as one JSON object per line, in full."
)
@click.option(
    "--source", "sources", multiple=True, metavar="SERVICE", help="Only events from SERVICE."
)
@click.option(
    "--match",
    "pairs",
    multiple=True,
    metavar="KEY=VALUE",
    callback=read_pairs,
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
    source = _tail(program.node, names)
    shown_events = Filter(sources=sources, values=pairs)
    shown = 0

    with suppress(KeyboardInterrupt):
        for heard in _until_gone(source.events(seconds)):
            if shown_events.accepts(heard.event):
                line = as_line(heard.event)
                click.echo(as_json(heard.event, heard.entry) if in_json else line)
                shown += 1

            if shown == count:
                return

    if count is not None or not source.connected:
        raise click.exceptions.Exit(1)


def _tail(node: Node, names: tuple[str, ...]) -> Tail:
    config = node.config
    return Tail(
        url=config.url,
        prefix=config.prefix,
        codec=node.registry.codec.limited(config.max_event_bytes),
        names=names,
        notify=lambda notice: click.echo(notice, err=True),
    )


def _until_gone(batches: Iterator[list[TailEvent]]) -> Iterator[TailEvent]:
    """Yield events until the reader of stdout exits.

    :raises BrokenPipeError: the reader of stdout has exited.
    """
    for heard in batches:
        yield from heard

        if reader_is_gone():
            raise BrokenPipeError("The reader of stdout has exited.")


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
@click.argument("name", metavar="NAME", callback=read_name)
@click.argument("pairs", nargs=-1, metavar="[KEY=VALUE]...", callback=read_pairs)
@click.option(
    "--json",
    "payload",
    metavar="OBJECT",
    callback=read_payload,
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
    payload: dict[str, Any],
    stream: bool,
) -> None:
    """Publish one event as this service, and print its id.

    The event takes the app's route for NAME, or a channel if there is none. For a channel the
    command prints how many listeners got the event; for a stream, the id of its entry.
    """
    node = program.node

    if not node.config.enabled:
        raise ConfigError(
            "'EVENTBUS_ENABLED' is False, so nothing is published. Set it to True to publish."
        )

    receipt = publish_one(node, name, {**payload, **values_of(pairs)}, stream=stream)
    heard = _heard(receipt.listeners) if receipt.entry is None else _kept(receipt)
    click.echo(f"Published {receipt.event_id}. {heard}")


def _kept(receipt: Receipt) -> str:
    return f"Entry {receipt.entry} in the stream {receipt.key!r}."


def _heard(listeners: int) -> str:
    if not listeners:
        return "No listener got it."

    return "1 listener got it." if listeners == 1 else f"{listeners} listeners got it."


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
@click.option("--json", "in_json", is_flag=True, help="Print one JSON object.")
@pass_program
def routes(program: Program, in_json: bool) -> None:
    """List what this app publishes and subscribes to, and its receivers.

    The command does not connect to Redis. Without an app, it connects, and lists the channels
    that have listeners now, the streams with their groups, and the services that listen.
    """
    node = program.node
    found = Overview(node).as_json() if program.declares else census(node)
    report = routes_report if program.declares else live_report
    click.echo(json.dumps(found, indent=2) if in_json else "\n".join(report(found)))


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
@click.option("--json", "in_json", is_flag=True, help="Print a JSON list of findings.")
@pass_program
def check(program: Program, strict: bool, in_json: bool) -> None:
    """Check this app and its Redis, and print what is wrong and how to fix it.

    The command publishes nothing, runs no receiver, and does not start to listen.
    """
    findings = _findings(program)
    bad = {"error", "warning"} if strict else {"error"}

    if in_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        click.echo("\n".join(findings_report(findings)))

    if any(finding.level in bad for finding in findings):
        raise click.exceptions.Exit(1)


def _findings(program: Program) -> list[Finding]:
    try:
        node = program.node
    except ConfigError as error:
        return [
            error_finding(
                str(error), "Fix this first, then run the check again: nothing else was checked."
            )
        ]

    return check_node(node, program=program.declares)


COMMANDS = (run, tail, publish, routes, check, relay, status, dead, replay, seek, services)
