"""Events become bytes and come back; bytes that are no event are refused with one word."""

from __future__ import annotations

import time
import tracemalloc
import uuid
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from itertools import islice, product
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flask_eventbus.codec.codec import Codec
from flask_eventbus.codec.values import EXTENSIONS, MAX_COLLISIONS, MAX_ITEMS
from flask_eventbus.errors import ConfigError, DecodeError, PayloadError
from flask_eventbus.event import Event, opened

codec = Codec()
NOW = datetime(2024, 2, 29, 12, 30, 15, 123456, UTC)
NOW_NS = 1_709_209_815_123_456_000

EVENT = Event(
    name="user_registered",
    source="accounts",
    id="9f3ac2d1b07e-12",
    time=NOW,
    payload={"user_id": 7, "email": "ada@example.com"},
)
FULL = replace(
    EVENT,
    seq=3,
    correlation_id="0a1b2c3d4e5f-7",
    causation_id="0a1b2c3d4e5f-9",
    hops=2,
    traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    key="Ada",
)

ids = st.from_regex(r"[A-Za-z0-9_.-]{1,64}-[0-9]{1,20}", fullmatch=True)
events = st.builds(
    Event,
    name=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,127}", fullmatch=True),
    source=st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True),
    id=ids,
    time=st.datetimes(timezones=st.just(UTC)),
    payload=st.dictionaries(
        st.text().filter(lambda key: key != "sender"), st.integers() | st.text(), max_size=4
    ),
    seq=st.none() | st.integers(1, 2**64 - 1),
    correlation_id=st.none() | ids,
    causation_id=st.none() | ids,
    hops=st.integers(0, 65_535),
    traceparent=st.none() | st.text("0123456789abcdef-", min_size=1, max_size=128),
    key=st.none() | st.text(min_size=1, max_size=64),
)


def attributes(**changes: Any) -> dict[str, Any]:
    """An event's map as any msgpack library packs it; ``...`` takes an attribute out."""
    all_of_them = {
        "specversion": "1.0",
        "source": "accounts",
        "type": "user_registered",
        "id": "9f3ac2d1b07e-12",
        "time": msgpack.Timestamp(1_709_209_815, 123_456_000),
        "data": {"user_id": 7, "email": "ada@example.com"},
        **changes,
    }
    return {key: value for key, value in all_of_them.items() if value is not ...}


def packed(**changes: Any) -> bytes:
    body: bytes = msgpack.packb(attributes(**changes))
    return body


def ext(type_: type, data: bytes) -> msgpack.ExtType:
    return msgpack.ExtType(EXTENSIONS[type_], data)


def outcome(body: bytes) -> str:
    """``"event"``, or the reason of the refusal."""
    try:
        codec.decode(body)
    except DecodeError as error:
        return error.reason

    return "event"


@given(events)
@settings(deadline=None, max_examples=200)
def test_a_decoded_event_equals_the_encoded_one(event: Event) -> None:
    assert codec.decode(codec.encode(event)) == event


@given(events)
@settings(deadline=None, max_examples=100)
def test_an_envelope_encodes_like_encode_and_knows_its_length(event: Event) -> None:
    seal = codec.envelope(event.source, event.name)
    data = codec.pack_payload(event.payload)

    body = seal(
        data,
        id=event.id,
        time_ns=(event.time - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1) * 1000,
        seq=event.seq,
        correlation_id=event.correlation_id,
        causation_id=event.causation_id,
        hops=event.hops,
        traceparent=event.traceparent,
        key=event.key,
    )

    assert body == codec.encode(event)
    assert len(body) - len(data) <= seal.overhead


def test_the_overhead_of_an_envelope_is_that_of_the_longest_event() -> None:
    longest_id = f"{'n' * 64}-{'9' * 20}"
    event = replace(
        FULL,
        id=longest_id,
        correlation_id=longest_id,
        causation_id=longest_id,
        time=datetime(1969, 1, 1, tzinfo=UTC),
        hops=65_535,
        traceparent="0" * 128,
        key="\N{GRINNING FACE}" * 64,
    )

    body = codec.encode(event)

    overhead = codec.envelope(event.source, event.name).overhead
    assert len(body) - len(codec.pack_payload(event.payload)) == overhead
    assert codec.decode(body) == event


def test_a_decoded_event_is_a_frozen_event() -> None:
    event = codec.decode(codec.encode(FULL), via="stream")

    assert event == replace(FULL, via="stream")
    assert type(event) is Event
    assert event.node == "9f3ac2d1b07e"
    assert repr(event) == repr(replace(FULL, via="stream"))
    with pytest.raises(FrozenInstanceError):
        event.name = "another"  # type: ignore[misc]  # the attempt


def test_an_event_is_one_msgpack_map_that_other_libraries_decode() -> None:
    read = msgpack.unpackb(codec.encode(FULL))

    assert read == {
        **attributes(),
        "seq": 3,
        "correlationid": "0a1b2c3d4e5f-7",
        "causationid": "0a1b2c3d4e5f-9",
        "hops": 2,
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "partitionkey": "Ada",
    }


def test_an_event_that_another_msgpack_library_wrote_is_decoded() -> None:
    assert codec.decode(packed()) == EVENT


@pytest.mark.parametrize(
    "time_ns",
    [0, 1, -1, NOW_NS + 789, 2**34 * 10**9 - 1, 2**34 * 10**9, 253_402_300_799 * 10**9],
)
def test_a_time_is_carried_to_the_nanosecond(time_ns: int) -> None:
    body = codec.envelope("accounts", "tick")(b"\x80", id="a-1", time_ns=time_ns)

    assert msgpack.unpackb(body)["time"].to_unix_nano() == time_ns
    assert codec.decode(body).time == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(
        microseconds=time_ns // 1000
    )


def test_an_event_of_another_time_zone_is_carried_as_the_same_moment() -> None:
    event = replace(EVENT, time=NOW.astimezone(timezone(timedelta(hours=2))))

    assert codec.decode(codec.encode(event)) == EVENT


def test_an_empty_key_counts_as_no_key() -> None:
    assert codec.encode(replace(EVENT, key="")) == codec.encode(EVENT)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "x" * 257,
            r"The key 'x+\.\.\.x+' has 257 bytes, and the limit is 256",
        ),
        ("\N{GRINNING FACE}" * 65, "has 260 bytes, and the limit is 256"),
        ("caf\udce9", r"The key 'caf\\udce9' holds a lone surrogate"),
    ],
)
def test_a_key_that_decoding_would_reject_is_refused(key: str, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        codec.encode(replace(EVENT, key=key))


@pytest.mark.parametrize("source", ["", "a service", "x" * 65, "caf\u00e9", "a/b", "a\n"])
def test_a_service_name_that_decoding_would_reject_is_refused(source: str) -> None:
    with pytest.raises(ConfigError, match=r"The service name .* is not valid\. Use 1 to 64"):
        codec.envelope(source, "tick")


@pytest.mark.parametrize("name", ["", "a signal", ".a", "-a", "/a", "x" * 129, "caf\u00e9", "a\n"])
def test_a_signal_name_that_decoding_would_reject_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"The signal name .* is not valid\. Use 1 to 128"):
        codec.envelope("accounts", name)


def test_a_registered_type_travels_in_an_event() -> None:
    with_complex = Codec()
    smaller = with_complex.limited(1_000)
    with_complex.register_type(
        40, complex, pack=lambda z: str(z).encode(), unpack=lambda data: complex(data.decode())
    )

    for either in (with_complex, smaller):
        event = replace(EVENT, payload={"z": 1 + 2j})
        assert either.decode(either.encode(event)) == event


def test_an_encoded_value_of_a_registered_type_is_sent_as_it_is() -> None:
    with_complex = Codec()
    with_complex.register_type(
        40, complex, pack=lambda z: str(z).encode(), unpack=lambda data: complex(data.decode())
    )
    encoded = replace(EVENT, payload={"z": msgpack.ExtType(40, b"(1+2j)")})

    assert with_complex.decode(with_complex.encode(encoded)).payload == {"z": 1 + 2j}


def test_an_encoded_value_of_an_unknown_type_is_refused() -> None:
    with pytest.raises(PayloadError, match="payload: It holds ext type 41, unknown here"):
        codec.encode(replace(EVENT, payload={"z": msgpack.ExtType(41, b"?")}))


def test_a_queued_event_with_a_value_of_a_registered_type_stays_encoded() -> None:
    """The memory of such a value is unknown: here a few bytes become a megabyte."""

    class Picture:
        def __init__(self, size: int) -> None:
            self.pixels = bytes(size)

    codec = Codec()
    codec.register_type(
        41,
        Picture,
        pack=lambda picture: b"%d" % len(picture.pixels),
        unpack=lambda data: Picture(int(data)),
    )

    for payload in ({"p": Picture(1_000_000)}, {"deep": [{"p": Picture(1_000_000)}]}):
        body = codec.encode(replace(EVENT, payload=payload))
        tracemalloc.start()
        event, counted = codec.decode_for_queue(body)
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()

        assert taken < 10_000
        assert counted < 2_000
        assert opened(event).payload.keys() == payload.keys()


def test_the_size_limit_applies_to_encoding_and_decoding() -> None:
    event = replace(EVENT, payload={"text": "x" * 2_000})
    body = codec.encode(event)
    smaller = codec.limited(len(body) - 1)

    assert codec.limited(len(body)).decode(body) == event
    with pytest.raises(PayloadError, match="more than the 2"):
        smaller.encode(event)
    with pytest.raises(DecodeError, match=r"more than the \d+ of EVENTBUS_MAX_EVENT") as caught:
        smaller.decode(body)

    assert caught.value.reason == "too_large"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"PING",
        b'{"specversion": "1.0"}',
        packed()[:-1],
        packed()[:40],
        packed() + b"\xc0",
        packed(source=b"?").replace(b"\xc4\x01?", b"\xa1\xff"),
        packed(data={"text": b"?"}).replace(b"\xc4\x01?", b"\xdb\xff\xff\xff\xff?"),
    ],
)
def test_the_error_for_bytes_that_are_not_msgpack_says_so(body: bytes) -> None:
    assert outcome(body) == "not_msgpack"


@pytest.mark.parametrize("value", [None, 7, "text", b"bytes", [1], msgpack.Timestamp(0)])
def test_the_error_for_msgpack_that_is_not_a_map_says_so(value: Any) -> None:
    assert outcome(msgpack.packb(value)) == "not_a_map"


@pytest.mark.parametrize("version", ["1", "1.1", "2.0", "", b"1.0", 1, 1.0, None, ["1.0"]])
def test_a_newer_version_is_reported_before_any_other_fault(version: Any) -> None:
    assert outcome(packed(specversion=version, source=..., data=None)) == "version"


@pytest.mark.parametrize("name", ["specversion", "source", "type", "id", "time", "data"])
def test_the_error_names_a_missing_attribute(name: str) -> None:
    body = packed(**{name: ...})

    assert outcome(body) == "missing_attribute"
    with pytest.raises(DecodeError, match=f"It has no '{name}'"):
        codec.decode(body)


NO_TEXT = [None, 7, b"accounts", ["accounts"], True]
NO_NAME = ["", "a b", "caf\u00e9", "a\n", "\x00"]
NO_ID = ["", "a", "-1", "a-", "a-x", "a-1 ", "a-\u0661", "a b-1", f"{'n' * 65}-1", f"a-{'1' * 21}"]
NO_OPTIONAL_TEXT = [7, b"text", ["text"], {}, ""]
DATETIMES = [b"2024-02-29T12:00:00", b"2024-02-29T12:00:00+02:00"]
BAD_ATTRIBUTES = {
    "source": [*NO_TEXT, *NO_NAME, "x" * 65, "a/b"],
    "type": [*NO_TEXT, *NO_NAME, "x" * 129, ".a", "/a"],
    "id": [*NO_TEXT, *NO_ID],
    "time": [None, 7, 1.5, "2024-02-29T12:00:00Z", *(ext(datetime, text) for text in DATETIMES)],
    "seq": [0, -1, 1.0, True, "1", [], ext(int, (2**64).to_bytes(9))],
    "correlationid": [*NO_OPTIONAL_TEXT, *NO_ID],
    "causationid": [*NO_OPTIONAL_TEXT, *NO_ID],
    "hops": [-1, 65_536, 1.0, True, "1", []],
    "traceparent": [*NO_OPTIONAL_TEXT, "0" * 129, "\u00e9" * 65],
    "partitionkey": [*NO_OPTIONAL_TEXT, "x" * 257, "\u00e9" * 129],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, bad in BAD_ATTRIBUTES.items() for value in bad],
    ids=lambda value: repr(value)[:40],
)
def test_the_error_names_an_invalid_attribute(name: str, value: Any) -> None:
    body = packed(**{name: value})

    assert outcome(body) == "bad_attribute"
    with pytest.raises(DecodeError, match=f"Its '{name}' is not valid"):
        codec.decode(body)


def test_the_error_for_a_huge_value_is_short() -> None:
    nested: Any = "x" * 100_000

    for _ in range(400):
        nested = [nested] * 2 if isinstance(nested, str) else [nested]

    with pytest.raises(DecodeError) as caught:
        codec.decode(packed(id=nested))

    assert len(str(caught.value)) < 200


def nested(levels: int) -> Any:
    value: Any = 1

    for _ in range(levels):
        value = [value]

    return value


@pytest.mark.parametrize(
    "data",
    [
        None,
        7,
        [],
        "text",
        {"sender": "me"},
        {b"user_id": 7},
        {"prices": {b"EUR": 1}},
        {"prices": {7: 1}},
        {7: 1},
        {"deep": nested(32)},
        {"deep": nested(300)},
        {"rows": [None] * (MAX_ITEMS + 1)},
        {"rows": dict.fromkeys(map(str, range(MAX_ITEMS + 1)))},
        {"value": msgpack.ExtType(0, b"")},
        {"value": msgpack.ExtType(99, b"unknown")},
        {"value": ext(datetime, b"yesterday")},
        {"tags": ext(set, b"\x91\x80")},
        {"tags": ext(set, b"\x91\xc7\x00\x63")},
        {"tags": [ext(set, b"\x91\xc1")]},
    ],
)
def test_the_error_for_an_invalid_payload_says_what_is_wrong(data: Any) -> None:
    assert outcome(packed(data=data)) == "bad_payload"


@pytest.mark.parametrize(
    "data", [b"\x91" * 5_000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"]
)
def test_a_truncated_payload_that_claims_too_many_items_is_refused_for_the_claim(
    data: bytes,
) -> None:
    assert outcome(packed(data=None)[:-1] + data) == "bad_payload"


def test_a_payload_of_the_deepest_allowed_nesting_is_decoded() -> None:
    assert codec.decode(packed(data={"deep": nested(31)})).payload == {"deep": nested(31)}


def test_an_optional_attribute_that_is_nil_is_absent() -> None:
    optional = ["seq", "correlationid", "causationid", "hops", "traceparent", "partitionkey"]

    assert codec.decode(packed(**dict.fromkeys(optional))) == EVENT
    assert codec.decode(packed(hops=0)) == EVENT


def test_attributes_of_later_versions_are_ignored() -> None:
    later = {
        "datacontenttype": "application/msgpack",
        "signature": b"\x00\xff",
        "novelty": msgpack.ExtType(20, b"of a later version"),
        "map": {"deep": nested(100)},
    }

    assert codec.decode(packed(**later)) == EVENT


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=500)
def test_arbitrary_bytes_decode_to_an_event_or_a_decode_error(body: bytes) -> None:
    assert_event_or_decode_error(body)


BODIES = [
    codec.encode(FULL),
    codec.encode(
        replace(
            FULL,
            payload={
                "all": [None, True, 7, -7, 2**70, 1.5, "text", b"bytes", NOW, NOW.date()],
                "more": {"d": timedelta(1), "s": {1, (2, 3)}, "f": frozenset("ab")},
            },
        )
    ),
]  # fmt: skip
edits = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 3), st.binary(max_size=6)), min_size=1, max_size=5
)


@given(st.sampled_from(BODIES), edits)
@settings(deadline=None, max_examples=1_000)
def test_an_event_with_some_bytes_changed_decodes_or_raises_a_decode_error(
    body: bytes, edits: list[tuple[int, int, bytes]]
) -> None:
    for at, removed, added in edits:
        body = body[:at] + added + body[at + removed :]

    assert_event_or_decode_error(body)


foreign = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text()
    | st.binary()
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20))
    | st.builds(msgpack.ExtType, st.integers(1, 9), st.binary(max_size=20)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from([*attributes(), *BAD_ATTRIBUTES, "novelty"]), foreign)
@settings(deadline=None, max_examples=500)
def test_an_event_with_arbitrary_attributes_decodes_or_raises_a_decode_error(
    name: str, value: Any
) -> None:
    assert_event_or_decode_error(packed(**{name: value}))


OUTCOMES = {
    "event",
    "too_large",
    "not_msgpack",
    "not_a_map",
    "version",
    "missing_attribute",
    "bad_attribute",
    "bad_payload",
}


def assert_event_or_decode_error(body: bytes) -> None:
    """Assert that bytes are refused, or are an event that can be encoded again."""
    assert (how := outcome(body)) in OUTCOMES
    assert how != "event" or codec.encode(codec.decode(body))


# Bodies of a mebibyte that are made to keep a reader busy.

MIB = 1_040_000


def a_set(members: list[Any]) -> msgpack.ExtType:
    return ext(frozenset, msgpack.packb(members))


def colliding_uuid(number: int) -> msgpack.ExtType:
    """One of the UUIDs that Python hashes to zero, and compares slowly."""
    return ext(uuid.UUID, (number * (2**61 - 1)).to_bytes(16))


def sets_of_colliding_sets() -> list[Any]:
    """Sets whose members are sets of one hash that differ in their last member only."""
    shared = [colliding_uuid(number) for number in range(1, MAX_COLLISIONS)]
    sets = [a_set([*shared, colliding_uuid(1000 + n)]) for n in range(MAX_COLLISIONS)]
    outer = a_set(sets)
    return [outer] * (MIB // len(msgpack.packb(outer)))


HOSTILE: dict[str, Callable[[], Any]] = {
    "members of one hash": lambda: a_set([colliding_uuid(n) for n in range(1, MIB // 18)]),
    "tuples of one hash": lambda: a_set(
        [list(signs) for signs in islice(product((-1, -2), repeat=16), MIB // 19)]
    ),
    "sets of a few members of one hash": lambda: (
        [a_set([colliding_uuid(n) for n in range(1, MAX_COLLISIONS + 1)])]
        * (MIB // (18 * MAX_COLLISIONS + 8))
    ),
    "sets of sets of one hash": sets_of_colliding_sets,
    "empty lists": lambda: [[[]] * 99_999] * 10,
    "empty sets": lambda: [[a_set([])] * 34_000] * 10,
    "decimals of great exponents": lambda: a_set(
        [ext(Decimal, b"%de99999999999999999" % n) for n in range(MIB // 28)]
    ),
    "a decimal of a million digits": lambda: a_set([ext(Decimal, b"9" * MIB)]),
    "nested lists": lambda: nested(500),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_mebibyte_is_refused_within_a_second(make: Callable[[], Any]) -> None:
    body = packed(data={"value": make()})
    start = time.thread_time()

    how = outcome(body)

    # A tenth to eight tenths of a second where it was measured; minutes without the limits.
    assert time.thread_time() - start < 5
    assert how in {"event", "bad_payload"}
