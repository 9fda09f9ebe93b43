"""Bytes that are no event, by the reason for which the codec refuses them."""

from __future__ import annotations

import time
from typing import Any

import msgpack


def event(**changes: Any) -> dict[str, Any]:
    """An event as a foreign program would make it; ``...`` takes an attribute out."""
    attributes = {
        "specversion": "1.0",
        "id": "foreign-1",
        "source": "elsewhere",
        "type": "tick",
        "time": msgpack.Timestamp.from_unix(time.time()),
        "data": {"n": 1},
        **changes,
    }
    return {key: value for key, value in attributes.items() if value is not ...}


def packed(**changes: Any) -> bytes:
    body: bytes = msgpack.packb(event(**changes))
    return body


def nested(depth: int) -> Any:
    value: Any = 1

    for _ in range(depth):
        value = [value]

    return value


BAD = {
    "not_msgpack": [b"", b"\xc1", b"hello, world" * 9, packed() + b"\x00"],
    "not_a_map": [msgpack.packb([1, 2]), msgpack.packb("text"), b"\x07", b"\xc0"],
    "too_large": [packed(data={"n": "x" * 2_000_000})],
    "version": [packed(specversion="2.0"), packed(specversion="9.9"), packed(specversion=1)],
    "missing_attribute": [packed(id=...), packed(source=...), packed(data=...), packed(time=...)],
    "bad_attribute": [
        packed(id=7),
        packed(id=""),
        packed(id="x" * 5000 + "-1"),
        packed(source=None),
        packed(source="a service"),
        packed(source="x" * 10_000),
        packed(time="yesterday"),
        packed(seq="first"),
        packed(seq=-1),
    ],
    "bad_payload": [
        b"\xdf\xff\xff\xff\xff",  # a map of four billion entries
        packed(data=[1]),
        packed(data={"n": nested(100)}),
        packed(data={"sender": "me"}),
        packed(data={7: 1}),
        packed(data={"n": msgpack.ExtType(99, b"?")}),
    ],
    "wrong_channel": [packed(type="tock")],
}
