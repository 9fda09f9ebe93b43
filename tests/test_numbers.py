"""The numbers that the pages name are those of the code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from flask_eventbus import ending, logs, node
from flask_eventbus.admin import server, services, streams
from flask_eventbus.channels import listener
from flask_eventbus.checks import server as checks_server
from flask_eventbus.codec import codec, records, values
from flask_eventbus.config import TIMING, Config
from flask_eventbus.database import after_commit, relay
from flask_eventbus.publisher import buffer, connection
from flask_eventbus.receivers import dispatcher, workers
from flask_eventbus.streams import (
    consumer,
    decoder,
    fanout,
    maintenance,
    outcomes,
)
from flask_eventbus.transport import pipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("services/*/README.md")), ROOT / "README.md"]

WORDS = {
    "two": 2,
    "three": 3,
    "five": 5,
    "eight": 8,
    "ten": 10,
    "twenty": 20,
    "two and a half": 2.5,
}

MIB = 1024 * 1024

#: A page, a sentence of it with its number in parentheses, and what the code has in that place.
SENTENCES = [
    ("commands", r"Redis has (\S+) seconds to begin each answer", streams.TIMEOUT),
    ("commands", r"update of `status` wait (\S+) seconds at most in total", server.PATIENCE),
    ("commands", r"dead retry --wait S` takes at most (\S+) seconds longer", streams.TIMEOUT),
    ("streams", r"done in the last (\S+) milliseconds may not be", consumer.WRITE_EVERY * 1_000),
    ("streams", r"failed receiver after (\S+) second, then 2, 4, 8", TIMING.first_retry),
    ("streams", r"and so on up to (\S+) minutes\. A", dispatcher.MAX_DELAY / 60),
    ("streams", r"but not beyond (\S+) minutes", dispatcher.MAX_DELAY / 60),
    (
        "stream-workers",
        r"no sign of life for (\S+) minutes is removed",
        TIMING.idle_consumer_after / 60,
    ),
    (
        "stream-workers",
        r"A worker gives one every ([a-z ]+) minutes",
        TIMING.idle_consumer_after / maintenance.SIGNS_OF_LIFE / 60,
    ),
    ("stream-workers", r"a difference of more than (\S+) seconds when", pipe.MAX_APART),
    ("stream-losses", r"differs from it by more than (\S+) seconds", connection.MAX_SKEW),
    ("stream-losses", r"and (\S+) bytes of a digest", decoder.DIGEST_BYTES),
    ("stream-losses", r"with more than (\S+) events behind it, such a loss", TIMING.max_counted),
    ("stream-subscriptions", r"that both have, of the (\S+) that it read last", fanout.REMEMBERED),
    ("configuration", r"from one second to (\S+) minutes", dispatcher.MAX_DELAY / 60),
    ("configuration", r"or more than (\S+) MiB of them", buffer.MAX_BYTES / MIB),
    ("configuration", r"A stop takes at most (\S+) seconds longer", node.LONGEST_STOP),
    ("configuration", r"The replicas have (\S+) of `EVENTBUS_TIMEOUT`", connection.REPLICAS_SHARE),
    ("serving", r"publishes the buffered events, for (\S+) seconds", ending.FLUSH_AT_EXIT),
    ("serving", r"events, which takes (\S+) seconds at most", ending.FLUSH_AT_EXIT),
    ("deploying", r"(\S+) s for what is still to be published", ending.FLUSH_AT_EXIT),
    ("deploying", r"for receivers that run and (\S+) s more, at most", node.LONGEST_STOP),
    ("deploying", r"and (\S+) s to hand back what was read", node.STOP_OVERHEAD),
    ("sizing", r"while receivers are slow \| (\S+) \|", workers.MAX_EVENTS),
    ("sizing", r"while receivers are slow \| \S+ \| (\S+) MiB", workers.MAX_BYTES / MIB),
    ("sizing", r"while Redis is away \| \S+, \S+ \| (\S+) MiB", buffer.MAX_BYTES / MIB),
    ("tls-and-failover", r"a publisher notices after (\S+) s", TIMING.write_timeout),
    (
        "tls-and-failover",
        r"a listener after (\S+) s; both",
        TIMING.ping_after + TIMING.ping_timeout,
    ),
    ("what-happens-when", r"It asks every (\S+) seconds, so `health\(\)`", TIMING.ping_after),
    ("what-happens-when", r"It waits (\S+) seconds, then logs the ids", ending.FLUSH_AT_EXIT),
    ("what-happens-when", r"sign of life after (\S+) seconds of silence", TIMING.ping_after),
    ("what-happens-when", r"and connects anew after (\S+) more", TIMING.ping_timeout),
    ("what-happens-to-streams", r"after 1 s, 2 s, up to (\S+) minutes", dispatcher.MAX_DELAY / 60),
    (
        "stream-subscriptions",
        r"finds the streams that match within (\S+) seconds",
        TIMING.list_streams_every,
    ),
    ("damaged-streams", r"a pattern stands for (\S+) streams, and matches", TIMING.max_names),
    (
        "streams",
        r"finds them, within (\S+) minutes after that hour",
        TIMING.search_orphans_every / 60,
    ),
    ("monitoring", r"its first (\S+) characters, on one line, and the last", logs.MAX_ERROR_CHARS),
    ("monitoring", r"on one line, and the last (\S+) of its", logs.MAX_TRACEBACK_CHARS),
    ("monitoring", r"Of each kind of line (\S+) a minute are logged", logs.LINES_PER_MINUTE),
    ("sizing", r"(\S+) KiB once it is read, or that has", codec.MAX_DECODED / 1024),
    ("sizing", r"Of each stream at most (\S+) entries are read", workers.MAX_READ),
    ("stream-format", r"the last error, (\S+) characters at most", records.MAX_ERROR_CHARS),
    (
        "stream-format",
        r"end of its traceback, (\S+) characters at most",
        records.MAX_TRACEBACK_CHARS,
    ),
    (
        "stream-format",
        r"as JSON\]\(#an-event-as-json\), cut to (\S+) characters",
        outcomes.MAX_PAYLOAD,
    ),
    ("stream-format", r"entry.FIELD.sample`, the first (\S+) bytes", pipe.SAMPLE),
    ("stream-format", r"For each of the first (\S+) fields it has", decoder.MAX_FIELDS),
    (
        "wire-format",
        r"remembers the bytes of the last (\S+) events of each as a hash",
        listener.REPEATABLE,
    ),
    ("wire-format", r"among the last (\S+) events without `seq`", TIMING.max_remembered),
    ("wire-format", r"A number more than (\S+) beyond the last", listener.MAX_MISSED),
    ("stream-subscriptions", r"ids and bytes of the last (\S+) events that", TIMING.max_remembered),
    ("wire-format", r"`traceparent` \| text, 1 to (\S+) bytes", codec.MAX_TRACEPARENT_BYTES),
    ("wire-format", r"`partitionkey` \| text, 1 to (\S+) bytes", codec.MAX_KEY_BYTES),
    ("wire-format", r"an array or a map has more than (\S+) items", values.MAX_ITEMS),
    ("publish-and-subscribe", r"it travels as text, of (\S+) bytes at most", codec.MAX_KEY_BYTES),
    ("commands", r"Redis has (\S+) seconds to begin each answer", server.TIMEOUT),
    ("commands", r"in total, and `publish` (\S+) seconds", server.TIMEOUT),
    ("check", r"this machine's by more than (\S+) seconds", checks_server.MAX_SKEW),
    ("check", r"less than (\S+) large events behind", checks_server.LEAST_BEHIND),
    ("status", r"was killed is removed after (\S+) minutes", TIMING.idle_consumer_after / 60),
    ("status", r"more than (\S+) names of streams exist", TIMING.max_names),
    ("stream-commands", r"killed counts as gone after (\S+) minutes", services.GONE / 60),
    ("outbox", r"is tried again every (\S+) seconds", TIMING.refused_again_after),
    ("outbox", r"are tried again every (\S+) seconds", relay.WRITE_AGAIN),
    ("transactions", r"the ids of the first (\S+)\. ", after_commit.SHOWN),
]


@pytest.mark.parametrize(("page", "sentence", "value"), SENTENCES)
def test_the_numbers_on_the_pages_are_those_of_the_code(
    page: str, sentence: str, value: float
) -> None:
    text = " ".join((DOCS / f"{page}.md").read_text().split())
    found = re.findall(sentence, text)

    assert len(found) == 1, "The sentence has changed: write it here as it stands there."
    assert number(found[0]) == pytest.approx(value)


def test_every_default_on_a_page_is_that_of_the_setting() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    named = [
        (page.name, setting, number(reported) * (MIB if unit == " MiB" else 1))
        for page in PAGES
        for setting, reported, unit in re.findall(
            r"`EVENTBUS_(\w+)`[,\s]+\(?(\d[\d,.]*\d|\d)( s| MiB)?\)", page.read_text()
        )
    ]

    assert len(named) >= 8
    assert [found for found in named if found[2] != defaults[found[1].lower()]] == []


def test_the_range_of_each_setting_is_in_its_section() -> None:
    page = (DOCS / "configuration.md").read_text()
    checked = 0

    for field in dataclasses.fields(Config):
        limits = getattr(field.metadata["read"], "keywords", {})
        section = page.partition(f"\n## EVENTBUS_{field.name.upper()}\n")[2].partition("\n## ")[0]
        reported = [
            (number(least), number(most) * (MIB if unit else 1))
            for least, most, unit in re.findall(
                r"(\d[\d.,]*)(?: bytes)? to (\d[\d,]*)( MiB)?", " ".join(section.split())
            )
        ]

        # "1 or more": the largest number of dead letters is no use to anybody.
        if "least" in limits and field.name != "dead_maxlen":
            assert (limits["least"], limits["most"]) in reported, field.name
            checked += 1

    assert checked >= 10


def test_the_durations_of_retries_on_the_page_match_the_code() -> None:
    text = " ".join((DOCS / "configuration.md").read_text().split())
    [(twelve, thirty)] = re.findall(r"12 take (\S+) minutes, 30 take (\S+) hours", text)

    assert number(twelve) == round(lasting(12) / 60, 1)
    assert number(thirty) == round(lasting(30) / 3_600, 1)
    assert "5 retries take half a minute" in text
    assert lasting(5) == pytest.approx(30, abs=2)


def test_the_table_of_retries_matches_the_code() -> None:
    units = {"s": 1, "minutes": 60, "hours": 3_600}
    text = (DOCS / "streams.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\S+) (s|minutes|hours) \|$", text, re.MULTILINE)

    assert len(rows) == 5
    for retries_, attempts_, span, unit in rows:
        assert int(attempts_) == int(retries_) + 1
        assert lasting(int(retries_)) / units[unit] == pytest.approx(float(span), rel=0.01)


def lasting(count: int) -> float:
    """Seconds from the first failure to the last of so many retries, at least."""
    return sum(dispatcher.delay(attempt, jitter=0.0) for attempt in range(1, count + 1))


def number(reported: str) -> float:
    """Return the number that a page writes as a word or in digits."""
    return WORDS[reported] if reported in WORDS else float(reported.replace(",", ""))
