"""A payload that cannot travel is refused where it is sent: with its path, why, and what to do."""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

import pytest

from flask_eventbus.codec.codec import Codec
from flask_eventbus.codec.values import MAX_CONTAINERS
from flask_eventbus.errors import PayloadError

ADVICE = (
    "Give the route a payload= function that returns plain values, or register the type "
    "with bus.register_type()."
)


class Address:
    pass


@dataclass(frozen=True)
class Person:
    name: str
    home: Any = None


@dataclass(eq=False)
class Branch:
    leaves: Any = None


class Choice(Enum):
    OBJECT = object()


def nested(levels: int) -> Any:
    value: Any = "inside"

    for _ in range(levels):
        value = [value]

    return value


def ring() -> list[Any]:
    ring: list[Any] = [1]
    ring.append(ring)
    return ring


def ring_of_sets() -> set[Branch]:
    branch = Branch()
    branch.leaves = {branch}
    return {branch}


def ring_of_dataclasses() -> Branch:
    branch = Branch()
    branch.leaves = {"first": branch}
    return branch


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "an object": (
        lambda: {"user": {"address": Address()}},
        f"payload.user.address: {__name__}.Address cannot be encoded. {ADVICE}",
    ),
    "an object in a list": (
        lambda: {"users": [{"name": "Ada"}, {"name": "Bob", "home address": Address()}]},
        f"payload.users[1]['home address']: {__name__}.Address cannot be encoded. {ADVICE}",
    ),
    "an object in a tuple of a dataclass": (
        lambda: {"person": Person("Ada", (1, Address()))},
        f"payload.person.home[1]: {__name__}.Address cannot be encoded. {ADVICE}",
    ),
    "an object in a set": (
        lambda: {"tags": {Address()}},
        f"payload.tags[member]: {__name__}.Address cannot be encoded. {ADVICE}",
    ),
    "an object behind an enum": (
        lambda: {"choice": Choice.OBJECT},
        f"payload.choice: object cannot be encoded. {ADVICE}",
    ),
    "a class": (lambda: {"kind": Address}, f"payload.kind: type cannot be encoded. {ADVICE}"),
    "a function": (lambda: {"call": nested}, f"payload.call: function cannot be encoded. {ADVICE}"),
    "a deque": (
        lambda: {"last": deque([1])},
        f"payload.last: collections.deque cannot be encoded. {ADVICE}",
    ),
    "a complex number": (lambda: {"z": 1j}, f"payload.z: complex cannot be encoded. {ADVICE}"),
    "sender": (
        lambda: {"sender": "me"},
        "payload.sender: every receiver already gets the sender as its first argument. "
        "Give the value another name.",
    ),
    "a name that is no text": (
        lambda: {7: 1},
        "payload: the key 7 is of type int, and keys must be strings. Convert it with str().",
    ),
    "a key that is no text": (
        lambda: {"prices": [{"EUR": 1}, {None: 2}]},
        "payload.prices[1]: the key None is of type NoneType, and keys must be strings. "
        "Convert it with str().",
    ),
    "a key of bytes": (
        lambda: {"prices": {b"EUR": 1}},
        "payload.prices: the key b'EUR' is of type bytes, and keys must be strings. "
        "Convert it with str().",
    ),
    "a ring": (
        lambda: {"ring": ring()},
        "payload.ring[1]: list contains itself. Send an id instead of the reference.",
    ),
    "a ring of dataclasses": (
        lambda: {"tree": ring_of_dataclasses()},
        "payload.tree.leaves.first: Branch contains itself. Send an id instead of the reference.",
    ),
    "a ring of sets": (
        lambda: {"tree": ring_of_sets()},
        "payload.tree[member].leaves[member]: Branch contains itself. "
        "Send an id instead of the reference.",
    ),
    "33 levels": (
        lambda: {"deep": nested(32)},
        f"payload.deep{'[0]' * 31}: nested deeper than 32 levels. Send a flatter payload.",
    ),
    "1,000 levels": (
        lambda: {"deep": nested(1_000)},
        f"payload.deep{'[0]' * 31}: nested deeper than 32 levels. Send a flatter payload.",
    ),
    "33 levels of dataclasses": (
        lambda: {"deep": [Person("Ada", Person("Bob", nested(30)))]},
        f"payload.deep[0].home.home{'[0]' * 28}: nested deeper than 32 levels. "
        "Send a flatter payload.",
    ),
    "a long list": (
        lambda: {"rows": [None] * 100_001},
        "payload.rows: 100001 items, and a list can have 100000. "
        "Send them in several events, or a reference to them.",
    ),
    "a long tuple": (
        lambda: {"rows": (None,) * 100_001},
        "payload.rows: 100001 items, and a tuple can have 100000. "
        "Send them in several events, or a reference to them.",
    ),
    "a long map": (
        lambda: {"rows": OrderedDict.fromkeys(map(str, range(100_001)))},
        "payload.rows: 100001 items, and a dict can have 100000. "
        "Send them in several events, or a reference to them.",
    ),
    "a long set": (
        lambda: {"rows": set(range(100_001))},
        "payload.rows: 100001 items, and a set can have 100000. "
        "Send them in several events, or a reference to them.",
    ),
    "many containers": (
        lambda: {"rows": [[[]] for _ in range(MAX_CONTAINERS // 2 + 1)]},
        "payload: It holds more than 100000 lists, maps and sets. Send them in several events.",
    ),
    "a set of members with one hash": (
        lambda: {"tags": {k * (2**61 - 1) for k in range(9)}},
        "payload.tags: More than 8 members of a set share one hash. Send a list.",
    ),
    "a set of what becomes a map": (
        lambda: {"people": {Person("Ada")}},
        "payload.people: A set has a member that is not hashable: unhashable type: 'dict'. "
        "Send a list.",
    ),
    "sets in sets in sets": (
        lambda: {"tags": {frozenset({frozenset({1})})}},
        "payload.tags: More than 2 sets are nested. Send lists.",
    ),
    "a lone surrogate": (
        lambda: {"file": ["caf\udce9"]},
        r"payload.file[0]: the text 'caf\udce9' holds a lone surrogate, which no other program "
        "can read. Decode the text without 'surrogateescape', or send bytes.",
    ),
    "a lone surrogate in a key": (
        lambda: {"sizes": {"caf\udce9": 1}},
        r"payload.sizes: the key 'caf\udce9' holds a lone surrogate, which no other program "
        "can read. Decode the text without 'surrogateescape', or send bytes.",
    ),
    "a long integer": (
        lambda: {"n": 1 << 8 * 1024},
        "payload.n: An integer of 1025 bytes is too long, the limit is 1024. Send it as bytes.",
    ),
    "a memoryview with holes": (
        lambda: {"pixels": memoryview(b"abcd")[::2]},
        "payload.pixels: memoryview cannot be encoded: BufferError: memoryview: underlying buffer "
        "is not C-contiguous",
    ),
    "no mapping": (
        lambda: ["user_id", 7],
        "payload: list is not a mapping. Let the route's payload= function return a dict of the "
        "keyword arguments that receivers get.",
    ),
}


@pytest.mark.parametrize(("make", "message"), FAULTS.values(), ids=FAULTS)
def test_a_payload_that_cannot_be_encoded_is_refused_with_path_reason_and_remedy(
    make: Callable[[], Any], message: str
) -> None:
    with pytest.raises(PayloadError) as caught:
        Codec().pack_payload(make())

    assert str(caught.value) == message


def test_a_payload_of_the_deepest_allowed_nesting_is_encoded() -> None:
    Codec().pack_payload({"deep": nested(31)})


def test_the_error_for_a_large_payload_names_its_size_and_the_setting() -> None:
    codec = Codec(max_bytes=1_000)

    codec.pack_payload({"text": "x" * 700}, overhead=200)
    with pytest.raises(PayloadError) as caught:
        codec.pack_payload({"text": "x" * 900}, overhead=200)

    assert str(caught.value) == (
        "payload: 909 bytes, and up to 200 for the rest of the event, are more than the 1000 of "
        "EVENTBUS_MAX_EVENT_BYTES. Send a reference to the data, or raise that setting in every "
        "service."
    )


def test_the_error_for_a_pack_function_that_raises_names_the_path() -> None:
    codec = Codec()
    codec.register_type(40, Address, pack=lambda _: bytes(1 // 0), unpack=lambda _: Address())

    message = re.escape("payload.homes[1]: Address cannot be encoded: ZeroDivisionError")
    with pytest.raises(PayloadError, match=message) as caught:
        codec.pack_payload({"homes": [None, Address()]})

    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_value_that_its_own_unpack_function_cannot_decode_is_not_sent() -> None:
    codec = Codec()
    codec.register_type(40, Address, pack=lambda _: b"", unpack=lambda _: None)  # type: ignore[arg-type,return-value]  # the mistake

    message = re.escape(
        "payload.home: Ext type 40 cannot be decoded: its unpack= returned NoneType"
    )
    with pytest.raises(PayloadError, match=message):
        codec.pack_payload({"home": Address()})


class Silent:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    "payload", [{"file": "\udce9" * 1_000_000}, {"keys": {Silent(): 1}}, {"x " * 9_999: Silent()}]
)
def test_every_payload_error_is_short(payload: dict[str, Any]) -> None:
    with pytest.raises(PayloadError) as caught:
        Codec().pack_payload(payload)

    assert len(str(caught.value)) < 300


def test_any_mapping_can_be_a_payload() -> None:
    codec = Codec()

    assert codec.pack_payload(MappingProxyType({"a": 1})) == codec.pack_payload({"a": 1})


def test_a_refused_payload_does_not_affect_the_next_one() -> None:
    codec = Codec()
    good = codec.pack_payload({"a": [1]})

    for make, _ in FAULTS.values():
        with pytest.raises(PayloadError):
            codec.pack_payload(make())

    assert codec.pack_payload({"a": [1]}) == good


# -- what packing did not raise -----------------------------------------------------------


class TimeLimitError(Exception):
    """An error that a signal handler raises at any point of the program."""


class Once:
    """Packs well, but for the first time, when a time limit strikes in the middle."""

    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = error

    def pack(self) -> bytes:
        error, self.error = self.error, None

        if error is not None:
            raise error

        return b"packed"


@pytest.mark.parametrize("error", [TimeLimitError("over"), ValueError("over"), KeyError("over")])
@pytest.mark.parametrize("wrap", [list, set])
def test_an_error_that_a_signal_handler_raises_while_packing_is_passed_on(
    error: Exception, wrap: Callable[[Any], Any]
) -> None:
    codec = Codec()
    codec.register_type(40, Once, pack=Once.pack, unpack=lambda data: Once(error))

    with pytest.raises(type(error)) as caught:
        codec.pack_payload({"values": wrap([Once(error)])})

    assert caught.value is error


def test_an_error_that_a_signal_handler_raises_while_unpacking_is_passed_on() -> None:
    codec = Codec()
    first = TimeLimitError("over")
    errors = [first]

    def unpack(data: bytes) -> Address:
        while errors:
            raise errors.pop()
        return Address()

    codec.register_type(40, Address, pack=lambda value: b"", unpack=unpack)

    with pytest.raises(TimeLimitError) as caught:
        codec.pack_payload({"home": Address()})

    assert caught.value is first


def test_a_pack_function_that_always_raises_is_a_payload_error_whatever_it_raises() -> None:
    codec = Codec()

    def pack(value: Address) -> bytes:
        raise TimeLimitError("each time")

    codec.register_type(40, Address, pack=pack, unpack=lambda data: Address())

    with pytest.raises(
        PayloadError, match=r"payload\.home: Address cannot be encoded: TimeLimitError"
    ):
        codec.pack_payload({"home": Address()})
