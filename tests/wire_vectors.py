"""The test vectors of the wire format: what they say, and the program that wrote them.

``python tests/wire_vectors.py`` writes ``wire_vectors.json`` anew. A change of that file
is a change of the wire: other programs, in other languages, are held to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import msgpack

from flask_eventbus.codec.codec import Codec
from flask_eventbus.codec.records import DeadLetter, RetryRecord
from flask_eventbus.event import Event
from flask_eventbus.streams.outcomes import readable
from flask_eventbus.transport.keys import StreamKeys

FILE = Path(__file__).with_name("wire_vectors.json")
NOW = datetime(2024, 2, 29, 12, 30, 15, 123456, UTC)

#: The attributes that every vector begins with.
MINIMAL: dict[str, Any] = {
    "specversion": "1.0",
    "source": "accounts",
    "type": "user_registered",
    "id": "9f3ac2d1b07e-12",
    "time": NOW,
    "data": {"user_id": 7, "email": "ada@example.com"},
}

#: The attributes that have another name in :class:`Event`.
FIELDS = {
    "type": "name",
    "data": "payload",
    "correlationid": "correlation_id",
    "causationid": "causation_id",
    "partitionkey": "key",
}

#: How values are described that JSON does not have: ``{"$date": "2024-02-29"}``.
DESCRIPTIONS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    bytes: ("$bytes", bytes.hex),
    datetime: ("$datetime", datetime.isoformat),
    date: ("$date", date.isoformat),
    time: ("$time", time.isoformat),
    timedelta: ("$timedelta", lambda value: [value.days, value.seconds, value.microseconds]),
    Decimal: ("$decimal", str),
    UUID: ("$uuid", str),
    set: ("$set", lambda value: [described(member) for member in value]),
    frozenset: ("$frozenset", lambda value: [described(member) for member in value]),
    tuple: ("$tuple", lambda value: [described(member) for member in value]),
}
MEANINGS: dict[str, Callable[[Any], Any]] = {
    "$bytes": bytes.fromhex,
    "$datetime": datetime.fromisoformat,
    "$date": date.fromisoformat,
    "$time": time.fromisoformat,
    "$timedelta": lambda parts: timedelta(*parts),
    "$decimal": Decimal,
    "$uuid": UUID,
    "$set": lambda members: {meaning(member) for member in members},
    "$frozenset": lambda members: frozenset(meaning(member) for member in members),
    "$tuple": lambda members: tuple(meaning(member) for member in members),
    "$integer": int,
    "$float": float,
}


def described(value: Any) -> Any:
    """A value as JSON."""
    if isinstance(value, dict):
        return {key: described(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [described(inner) for inner in value]
    if type(value) in DESCRIPTIONS:
        tag, describe = DESCRIPTIONS[type(value)]
        return {tag: describe(value)}
    if type(value) is int and abs(value) > 2**53:
        return {"$integer": str(value)}

    return {"$float": str(value)} if value in (float("inf"), float("-inf")) else value


def meaning(description: Any) -> Any:
    """The value that some JSON describes."""
    if isinstance(description, list):
        return [meaning(inner) for inner in description]
    if not isinstance(description, dict):
        return description

    tag = next(iter(description), "")

    if tag in MEANINGS:
        return MEANINGS[tag](description[tag])

    return {key: meaning(inner) for key, inner in description.items()}


def body_of(vector: dict[str, Any]) -> bytes:
    """The bytes of a vector: ``hex``, or ``parts`` of hex and how often each comes; of an entry,
    those of its field ``event``.
    """
    if "fields" in vector:
        return bytes(meaning(vector["fields"])["event"])

    parts = vector.get("parts") or [[vector["hex"], 1]]
    return b"".join(bytes.fromhex(part) * times for part, times in parts)


def read() -> list[dict[str, Any]]:
    """All vectors."""
    vectors: list[dict[str, Any]] = json.loads(FILE.read_text())
    return vectors


def event_of(attributes: dict[str, Any]) -> Event:
    """The event that has these attributes."""
    named = {FIELDS.get(name, name): value for name, value in attributes.items()}
    del named["specversion"]
    return Event(**named)


def encode(attributes: dict[str, Any]) -> bytes:
    """The bytes of the event that has these attributes."""
    return Codec().encode(event_of(attributes))


def event(**changes: Any) -> dict[str, Any]:
    """The attributes of an event; ``...`` takes one out."""
    return {key: value for key, value in {**MINIMAL, **changes}.items() if value is not ...}


def packed(attributes: Any) -> bytes:
    """A map as msgpack alone writes it, datetimes as timestamps."""
    body: bytes = msgpack.packb(attributes, datetime=True)
    return body


def bad(**changes: Any) -> bytes:
    """An event that msgpack alone writes, with some attributes changed."""
    return packed(event(**changes))


def written() -> Iterator[tuple[str, dict[str, Any]]]:
    """Events that are written as they stand in the file."""
    yield "the attributes that every event has", event()
    yield "a channel event, with its running number", event(seq=3)
    yield (
        "every optional attribute",
        event(
            seq=2**64 - 1,
            correlationid="0a1b2c3d4e5f-7",
            causationid="0a1b2c3d4e5f-9",
            hops=2,
            traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            partitionkey="caf\u00e9",
        ),
    )
    yield "no payload", event(data={})
    yield (
        "falsy values",
        event(data={"none": None, "zero": 0, "text": "", "list": [], "map": {}, "no": False}),
    )
    yield (
        "msgpack's own types",
        event(
            data={
                "yes": True,
                "integers": [127, 128, -1, -33, 2**64 - 1, -(2**63)],
                "float": 1.5,
                "infinity": float("inf"),
                "text": "caf\u00e9 \u2615",
                "bytes": b"\x00\xff",
                "nested": {"lines": [{"sku": "A-1", "count": 2}, {"sku": "B-2", "count": 1}]},
            }
        ),
    )
    yield (
        "the ext types",
        event(
            data={
                "aware": datetime(2024, 2, 29, 12, 30, 0, 500000, timezone(timedelta(hours=2))),
                "naive": datetime(2024, 2, 29, 12, 30),
                "date": date(2024, 2, 29),
                "time": time(12, 30),
                "duration": timedelta(days=-1, seconds=2, microseconds=3),
                "decimal": Decimal("-12.50"),
                "uuid": UUID("0af76519-16cd-43dd-8448-eb211c80319c"),
                "set": {1},
                "frozenset": frozenset({2}),
                "large": 2**64,
                "small": -(2**63) - 1,
            }
        ),
    )
    yield (
        "sets of tuples and of sets",
        event(data={"points": {(1, (2, 3))}, "sets": {frozenset({Decimal("0")})}}),
    )
    yield "a time before 1970", event(time=datetime(1969, 7, 20, 20, 17, 40, tzinfo=UTC))
    yield "a time after 2514", event(time=datetime(2600, 1, 1, tzinfo=UTC))
    yield "an id of 85 bytes", event(id=f"{'n' * 64}-{'9' * 20}")
    yield "names of all legal characters", event(source="A-z_0.9", type="_a/B.c-1")


def foreign() -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Events that other libraries may write so: read, but written otherwise here."""
    yield (
        "another order, and a small seq",
        packed(dict(reversed(event(seq=3).items()))),
        event(seq=3),
    )
    yield (
        "a timestamp of 32 bits",
        bad(time=msgpack.Timestamp(1_709_209_815)),
        event(time=datetime(2024, 2, 29, 12, 30, 15, tzinfo=UTC)),
    )
    yield (
        "nanoseconds, which Python cuts to microseconds",
        bad(time=msgpack.Timestamp(1_709_209_815, 123_456_789)),
        event(),
    )
    yield (
        "a timestamp in the payload",
        bad(data={"at": NOW}),
        event(data={"at": NOW}),
    )
    yield (
        "optional attributes that are nil, and no hops",
        bad(seq=None, correlationid=None, causationid=None, traceparent=None, hops=0),
        event(),
    )
    yield (
        "attributes of later versions",
        bad(datacontenttype="application/msgpack", novelty=[msgpack.ExtType(20, b"?")]),
        event(),
    )


def refused() -> Iterator[tuple[str, str, bytes | list[tuple[bytes, int]]]]:
    """Bytes that are no event, with the reason."""
    good = packed(event())
    yield "not_msgpack", "nothing", b""
    yield "not_msgpack", "a byte that msgpack never uses", b"\xc1"
    yield "not_msgpack", "an event cut short", good[:-1]
    yield "not_msgpack", "an event and one byte more", good + b"\xc0"
    yield "not_msgpack", "text that is not UTF-8", good.replace(b"ada@", b"ad\xff@")
    yield "not_a_map", "an array", packed([event()])
    yield "not_a_map", "nil", packed(None)
    yield "version", "a later major version", bad(specversion="2.0")
    yield "version", "a later minor version", bad(specversion="1.1")
    yield "version", "a version that is no text", bad(specversion=1)
    yield "version", "a later version that lacks attributes", packed({"specversion": "2.0"})

    for name in MINIMAL:
        yield "missing_attribute", f"no {name}", bad(**{name: ...})

    yield "bad_attribute", "a source that is no text", bad(source=7)
    yield "bad_attribute", "an empty source", bad(source="")
    yield "bad_attribute", "a source with a space", bad(source="the accounts")
    yield "bad_attribute", "a source of 65 characters", bad(source="a" * 65)
    yield "bad_attribute", "a source beyond ASCII", bad(source="caf\u00e9")
    yield "bad_attribute", "a type that begins with a dot", bad(type=".registered")
    yield "bad_attribute", "a type of 129 characters", bad(type="a" * 129)
    yield "bad_attribute", "an id without a number", bad(id="9f3ac2d1b07e")
    yield "bad_attribute", "an id with an empty node", bad(id="-12")
    yield "bad_attribute", "an id of 86 bytes", bad(id=f"{'n' * 65}-{'9' * 20}")
    yield "bad_attribute", "a time that is text", bad(time="2024-02-29T12:30:15Z")
    yield "bad_attribute", "a time that is nil", bad(time=None)
    yield "bad_attribute", "seq 0", bad(seq=0)
    yield "bad_attribute", "a seq that is a float", bad(seq=1.0)
    yield "bad_attribute", "a seq that is true", bad(seq=True)
    yield "bad_attribute", "a correlationid that is no id", bad(correlationid="chain")
    yield "bad_attribute", "a causationid that is no id", bad(causationid="")
    yield "bad_attribute", "negative hops", bad(hops=-1)
    yield "bad_attribute", "65,536 hops", bad(hops=65_536)
    yield "bad_attribute", "an empty traceparent", bad(traceparent="")
    yield "bad_attribute", "a traceparent of 129 bytes", bad(traceparent="0" * 129)
    yield "bad_attribute", "an empty partitionkey", bad(partitionkey="")
    yield "bad_attribute", "a partitionkey of 257 bytes", bad(partitionkey="k" * 257)
    yield "bad_payload", "data that is nil", bad(data=None)
    yield "bad_payload", "data that is an array", bad(data=[7])
    yield "bad_payload", "a key that is an integer", bad(data={7: 1})
    yield "bad_payload", "a key that is bytes", bad(data={b"user_id": 7})
    yield "bad_payload", "a nested key that is an integer", bad(data={"prices": [{7: 1}]})
    yield "bad_payload", "a key named sender", bad(data={"sender": "me"})
    yield "bad_payload", "33 levels", bad(data={"deep": nested(32)})
    yield "bad_payload", "an unknown ext type", bad(data={"what": msgpack.ExtType(127, b"")})

    for code, contents, what in (
        (1, b"yesterday", "a datetime that is none"),
        (3, b"25:00", "a time of day that is none"),
        (4, b"\x00", "a timedelta of one byte"),
        (5, b"ten", "a decimal that is none"),
        (6, b"short", "a UUID of five bytes"),
        (7, b"\x07", "a set that is no array"),
        (7, b"\x91\x80", "a set of a map"),
        (7, b"\x91\xc7\x06\x08\x91\xc7\x03\x08\x91\x01", "three sets in one another"),
        (9, b"", "an integer of no bytes"),
        (9, b"\x01" * 1025, "an integer of 1,025 bytes"),
    ):
        yield "bad_payload", what, bad(data={"value": msgpack.ExtType(code, contents)})

    yield "bad_payload", "nine members of a set that Python hashes alike", bad(data=colliding())
    start = bad(data=None)[:-1] + b"\x81\xa4rows"
    too_many = b"\xdd" + (100_001).to_bytes(4)
    yield "bad_payload", "an array of 100,001 items", [(start + too_many, 1), (b"\xc0", 100_001)]
    yield "bad_payload", "5,000 arrays in one another", [(start, 1), (b"\x91", 5_000), (b"\xc0", 1)]
    yield (
        "too_large",
        "an event of more than a mebibyte",
        [
            (start + b"\xdb" + (1024 * 1024).to_bytes(4), 1),
            (b"x", 1024 * 1024),
        ],
    )


def nested(levels: int) -> Any:
    """Arrays in one another."""
    return [nested(levels - 1)] if levels else "inside"


def colliding() -> dict[str, msgpack.ExtType]:
    """A set of UUIDs that are multiples of 2**61 - 1, by which Python hashes."""
    members = [msgpack.ExtType(6, (number * (2**61 - 1)).to_bytes(16)) for number in range(1, 10)]
    return {"tags": msgpack.ExtType(7, packed(members))}


def messages() -> Iterator[tuple[str, bytes, list[dict[str, Any]]]]:
    """Messages of a channel: their events, or the reasons with which a reader rejects parts."""
    first, second = event(seq=1), event(id="9f3ac2d1b07e-13", seq=2)
    both = [{"event": described(first)}, {"event": described(second)}]
    bodies = encode(first), encode(second)
    yield "one event", bodies[0], both[:1]
    yield "two events, one directly after the other", b"".join(bodies), both
    yield (
        "a map that is no event, between two events",
        packed({"specversion": "2.0"}).join(bodies),
        [both[0], {"reason": "version"}, both[1]],
    )
    yield (
        "an event, and one cut short",
        bodies[0] + bodies[1][:-1],
        [both[0], {"reason": "not_msgpack"}],
    )
    yield (
        "an event, a byte that msgpack never uses, and an event that is lost with it",
        b"\xc1".join(bodies),
        [both[0], {"reason": "not_msgpack"}],
    )
    yield "an event and nil", bodies[0] + b"\xc0", [both[0], {"reason": "not_a_map"}]
    yield "an event and text", bodies[0] + b"hello", [both[0], {"reason": "not_msgpack"}]
    yield "nothing", b"", [{"reason": "not_msgpack"}]


#: The keys of the vectors of streams.
KEYS = StreamKeys("eventbus")

#: When the first attempt of these vectors failed: 31 seconds before the last.
FAILED = 1_709_209_816_000


def retries() -> Iterator[tuple[str, RetryRecord]]:
    """Receivers that failed, to be tried again."""
    record = RetryRecord(
        entry="1709209815124-0",
        event=encode(event()),
        receiver="mailer.receivers.send_welcome",
        attempts=1,
        first=FAILED,
        last=FAILED,
        error="ConnectionRefusedError: [Errno 111] Connection refused",
        traceback="Traceback (most recent call last):\n",
    )
    yield "a receiver that failed once", record
    yield (
        "a receiver that is being tried for the third time",
        replace(record, attempts=3, last=FAILED + 1_000, running=True),
    )


def dead_letters() -> Iterator[tuple[str, DeadLetter]]:
    """Return the dead letters of a service."""
    attributes = event()
    yield (
        "an event that a receiver failed at six times",
        DeadLetter(
            reason="retries",
            entry="1709209815124-0",
            fields={b"event": encode(attributes)},
            event_id=attributes["id"],
            source=attributes["source"],
            payload=readable(event_of(attributes)),
            receiver="mailer.receivers.send_welcome",
            error="ConnectionRefusedError: [Errno 111] Connection refused",
            traceback="Traceback (most recent call last):\n",
            attempts=6,
            first=FAILED,
            last=FAILED + 31_000,
        ),
    )
    yield (
        "an entry that is no event",
        DeadLetter(
            reason="undecodable",
            entry="1709209815124-1",
            fields={b"event": b"\xc1", b"reason": b"none"},
            error="not_msgpack: ...",
            first=FAILED,
            last=FAILED,
        ),
    )


def streams() -> Iterator[dict[str, Any]]:
    """Vectors of what is kept in streams and beside them."""
    attributes = event(partitionkey="7")
    yield {
        "what": "an entry of a stream",
        "key": KEYS.stream(attributes["type"]),
        "fields": described({"event": encode(attributes)}),
        "event": described(attributes),
        "exact": True,
    }

    for what, record in retries():
        yield {
            "what": what,
            "key": KEYS.retry(attributes["type"], "mailer"),
            "hex": record.packed().hex(),
            "retry": described(asdict(record)),
            "exact": True,
        }
    for what, letter in dead_letters():
        yield {
            "what": what,
            "key": KEYS.dead(attributes["type"], "mailer"),
            "fields": described(fields_of(letter)),
            "dead": True,
        }


def fields_of(letter: DeadLetter) -> dict[str, Any]:
    """The fields of a dead letter: text, and the bytes of what came."""
    flat = [part if isinstance(part, bytes) else part.encode() for part in letter.as_fields()]
    pairs = zip(flat[::2], flat[1::2], strict=True)
    return {
        name.decode(): content if is_original(name) else content.decode() for name, content in pairs
    }


def is_original(name: bytes) -> bool:
    """Return True if a field of a dead letter equals the bytes that arrived."""
    return name == b"event" or name.startswith(b"entry.")


def made() -> list[dict[str, Any]]:
    """All vectors anew."""
    vectors: list[dict[str, Any]] = []

    for what, attributes in written():
        body = encode(attributes).hex()
        vectors.append({"what": what, "hex": body, "event": described(attributes), "exact": True})
    for what, bytes_, attributes in foreign():
        vectors.append({"what": what, "hex": bytes_.hex(), "event": described(attributes)})
    for reason, what, body_ in refused():
        vectors.append({"what": what, **in_hex(body_), "reason": reason})

    for what, message, parts in messages():
        key = f"eventbus:{{{MINIMAL['type']}}}:channel"
        vectors.append({"what": what, "key": key, "hex": message.hex(), "message": parts})

    return [*vectors, *streams()]


def in_hex(body: bytes | list[tuple[bytes, int]]) -> dict[str, Any]:
    """Bytes as they stand in the file."""
    if isinstance(body, bytes):
        return {"hex": body.hex()}

    return {"parts": [[part.hex(), times] for part, times in body]}


def text_of(vectors: list[dict[str, Any]]) -> str:
    """The contents of the file: one vector a line."""
    lines = (json.dumps(vector, ensure_ascii=True) for vector in vectors)
    return "[\n" + ",\n".join(lines) + "\n]\n"


if __name__ == "__main__":
    FILE.write_text(text_of(made()))
