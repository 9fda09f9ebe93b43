"""Compare the bus with the least Python that does its job, and with other libraries.

Run it on demand, on a machine with nothing else to do::

    scripts/bench
    scripts/bench channel stream --rounds 7
    scripts/bench peers --json benchmarks/results.json

It starts a Redis of its own, runs the programs in turn, several rounds, and prints medians. A
peer is installed into an environment of its own at its first run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import redis
from contenders import BUS, BY_HAND, CHANNELS, FLOOR, PEERS, STREAMS, Contender, prepare
from measure import FailedError, Result, Server, exchange, redis_server
from own import backlog, contexts, growth, imports, requests, retries, services, threads
from report import chart, markdown
from steps import steps

Figures = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of each (default 5)")
    parser.add_argument("--count", type=int, default=100_000, help="events of a run")
    parser.add_argument("--seconds", type=float, default=3.0, help="time of a run at a rate")
    parser.add_argument(
        "--json",
        type=Path,
        help="write the figures to this file, and a chart of the peers beside it",
    )
    parser.add_argument(
        "--against", type=Path, help="fail if a ratio is half of that in this file, or less"
    )
    options = parser.parse_args()

    if wrong := set(options.subjects) - SUBJECTS.keys():
        parser.error(f"unknown: {', '.join(sorted(wrong))}; choose from {', '.join(SUBJECTS)}")

    with redis_server() as server:
        found = {
            "machine": machine(server, options.rounds),
            **{
                subject: SUBJECTS[subject](server, options)
                for subject in options.subjects or SUBJECTS
            },
        }

    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")

        if "peers" in found:
            options.json.with_suffix(".svg").write_text(chart(found["peers"]))

    print(markdown(found))

    if options.against:
        lost = losses(found, json.loads(options.against.read_text()))
        print("\n".join(lost) or "No ratio has fallen to half of the recorded one.")
        sys.exit(1 if lost else 0)


def losses(found: dict[str, Figures], recorded: dict[str, Figures]) -> list[str]:
    """Return a line for each rate whose ratio to the floor is half of the recorded one or less.

    Only ratios of the same run are compared, since the machine is another one.
    """
    lines = []

    for subject, figures in found.items():
        for name, each in figures.items() if subject != "machine" else ():
            before = recorded.get(subject, {}).get(name, {})

            if name.startswith(BUS.name) and "rate" in each and "rate" in before:
                now, then = each["rate"]["of_floor"], before["rate"]["of_floor"]

                if now <= then / 2:
                    lines.append(f"{subject}, {name}: {now:.2f} of the floor, was {then:.2f}.")

    return lines


def machine(server: Server, rounds: int) -> dict[str, Any]:
    """Return what a reader needs to judge the figures."""
    with open("/proc/cpuinfo") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]

    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "redis-py": redis.__version__,
        "redis": server.version,
        "rounds": rounds,
    }


def channel(server: Server, options: argparse.Namespace) -> Figures:
    return rounds(server, CHANNELS, options)


def stream(server: Server, options: argparse.Namespace) -> Figures:
    return rounds(server, STREAMS, options)


def peers(server: Server, options: argparse.Namespace) -> Figures:
    """Compare with other libraries; one that cannot be installed is listed with its error."""
    ready: list[Contender] = [FLOOR, BUS, STREAMS[2]]
    figures: Figures = {}
    versions = {}

    for peer in PEERS:
        try:
            versions[peer.name] = prepare(peer.peer)
            ready.append(peer)
        except subprocess.CalledProcessError as error:
            figures[peer.name] = {"error": f"It cannot be installed: {error}"}

    figures |= rounds(server, ready, options)

    for name, version in versions.items():
        figures[name]["version"] = version

    return figures


def fanout(server: Server, options: argparse.Namespace) -> Figures:
    """One publisher to 32 processes."""
    return rounds(server, [FLOOR, BUS], options, share=0.1, receivers=32, warm=100)


def paced(rate: int) -> Callable[[Server, argparse.Namespace], Figures]:
    """Return a subject: so many events a second, as a web service sends them."""

    def subject(server: Server, options: argparse.Namespace) -> Figures:
        count = round(rate * options.seconds)
        return rounds(server, [FLOOR, BUS, BY_HAND], options, count=count, rate=rate, warm=100)

    return subject


SUBJECTS: dict[str, Callable[[Server, argparse.Namespace], Figures]] = {
    "channel": channel,
    "stream": stream,
    "100/s": paced(100),
    "1000/s": paced(1_000),
    "fanout": fanout,
    "growth": growth,
    "threads": threads,
    "services": services,
    "retries": retries,
    "backlog": backlog,
    "contexts": contexts,
    "steps": steps,
    "requests": requests,
    "imports": imports,
    "peers": peers,
}


def rounds(
    server: Server,
    contenders: Sequence[Contender],
    options: argparse.Namespace,
    *,
    count: int = 0,
    share: float = 1.0,
    **more: Any,
) -> Figures:
    """Measure the contenders in turn, several times; return medians, spreads and ratios.

    :param count: events of a run; a part of ``--count`` unless given.
    """
    results: dict[Contender, list[Result]] = {contender: [] for contender in contenders}
    errors: dict[Contender, str] = {}

    for _ in range(options.rounds):
        for contender in contenders:
            events = count or max(100, round(options.count * contender.share * share))

            try:
                results[contender].append(exchange(server, contender, events, **more))
            except FailedError as error:
                errors[contender] = str(error)
                print(error, file=sys.stderr, flush=True)

    return {
        contender.name: summary(found, results[FLOOR]) if found else {"error": errors[contender]}
        for contender, found in results.items()
    }


def summary(found: Sequence[Result], floor: Sequence[Result]) -> dict[str, Any]:
    """Return for each figure its median, lowest, highest, and median ratio to the floor."""
    figures: dict[str, Any] = {}

    for name in asdict(found[0]):
        values = [getattr(each, name) for each in found]
        least = [getattr(each, name) for each in floor]

        if any(values):
            figures[name] = {
                "median": statistics.median(values),
                "lowest": min(values),
                "highest": max(values),
            }

            if pairs := [(a, b) for a, b in zip(values, least, strict=False) if b]:
                figures[name]["of_floor"] = statistics.median(a / b for a, b in pairs)

    return figures


if __name__ == "__main__":
    main()
