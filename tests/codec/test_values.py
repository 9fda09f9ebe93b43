"""Tests of values: they come back equal, or are refused."""

from __future__ import annotations

import enum
import threading
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from werkzeug.datastructures import MultiDict

from flask_eventbus.codec.values import (
    EXTENSIONS,
    MAX_COLLISIONS,
    MAX_CONTAINERS,
    MAX_INTEGER_BYTES,
    MAX_ITEMS,
    UnfitError,
    Values,
    survey,
)
from flask_eventbus.errors import ConfigError

values = Values()

# Whole seconds: Python itself reads an offset of microseconds as UTC.
offsets = st.integers(-86_399, 86_399).map(lambda seconds: timezone(timedelta(seconds=seconds)))
largest = 2 ** (8 * MAX_INTEGER_BYTES - 1) - 1
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(2**70), max_value=2**70),
    st.integers(min_value=-largest - 1, max_value=largest),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
    st.datetimes(),
    st.datetimes(timezones=offsets),
    st.dates(),
    st.times(),
    st.times(timezones=offsets),
    st.timedeltas(),
    st.decimals(allow_nan=False),
    st.uuids(),
)
members = scalars | st.tuples(scalars, scalars) | st.frozensets(scalars, max_size=4)
sets = st.sets(members, max_size=6) | st.frozensets(members, max_size=6)
anything = st.recursive(
    scalars | sets,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


def there_and_back(value: Any) -> Any:
    return values.unpack(values.pack(value))


def exactly(value: Any) -> Hashable:
    """A value with the types in it, so that ``1``, ``True`` and ``1.0`` differ."""
    if isinstance(value, dict):
        return frozenset((key, exactly(inner)) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return type(value), *map(exactly, value)
    if isinstance(value, set | frozenset):
        return type(value), frozenset(map(exactly, value))

    return type(value), str(value)


@given(anything)
@settings(deadline=None, max_examples=300)
def test_every_supported_value_comes_back_equal(value: Any) -> None:
    assert exactly(there_and_back(value)) == exactly(value)


@pytest.mark.parametrize("value", [None, 0, 0.0, "", b"", [], {}, False, set(), Decimal(0)])
def test_falsy_values_are_kept(value: Any) -> None:
    assert exactly(there_and_back({"value": value})) == exactly({"value": value})


@pytest.mark.parametrize("text", ["NaN", "sNaN", "Infinity", "-Infinity", "-0", "1.50", "1E+400"])
def test_a_decimal_keeps_its_digits_and_its_type(text: str) -> None:
    assert str(there_and_back(Decimal(text))) == text


def test_infinity_and_nan_are_kept() -> None:
    assert there_and_back(float("inf")) == float("inf")
    assert str(there_and_back(float("nan"))) == "nan"


def test_integers_on_both_sides_of_a_limit_come_back_equal() -> None:
    limits = [2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 2**71 - 1, 2**71, -(2**71), -(2**71) - 1]

    assert there_and_back([*limits, largest, -largest - 1]) == [*limits, largest, -largest - 1]


def test_an_integer_too_long_to_be_logged_is_refused() -> None:
    for value in (largest + 1, -largest - 2):
        with pytest.raises(UnfitError, match="of 1025 bytes is too long, the limit is 1024"):
            values.pack(value)

    assert str(largest)


def test_an_aware_datetime_keeps_its_offset() -> None:
    moment = datetime(2024, 2, 29, 12, 0, 0, 1, timezone(timedelta(hours=5, minutes=45)))

    arrived = there_and_back(moment)

    assert arrived.isoformat() == moment.isoformat()


def test_a_msgpack_timestamp_decodes_to_an_aware_datetime() -> None:
    body = msgpack.packb({"at": msgpack.Timestamp(1_700_000_000, 123_456_789)})

    assert values.unpack(body) == {"at": datetime(2023, 11, 14, 22, 13, 20, 123456, UTC)}


class Colour(enum.Enum):
    RED = "red"
    MANY = ("red", "green")
    HUGE = 2**70
    DAY = date(2024, 2, 29)


class Level(enum.IntEnum):
    HIGH = 3
    ENDLESS = 2**80


class Word(enum.StrEnum):
    YES = "yes"


class Weight(float):
    pass


class Number(int):
    pass


class Raw(bytes):
    pass


class Row(list[Any]):
    pass


class Moment(datetime):
    pass


class Tags(set[str]):
    pass


Point = namedtuple("Point", ["x", "y"])


@dataclass
class Address:
    street: str
    tags: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Person:
    name: str
    address: Address


@pytest.mark.parametrize(
    ("sent", "arrived"),
    [
        (Colour.RED, "red"),
        (Colour.MANY, ["red", "green"]),
        (Colour.HUGE, 2**70),
        (Colour.DAY, date(2024, 2, 29)),
        (Level.HIGH, 3),
        (Level.ENDLESS, 2**80),
        (Word.YES, "yes"),
        (Address("Main", {"a"}), {"street": "Main", "tags": {"a"}}),
        (Person("Ada", Address("M")), {"name": "Ada", "address": {"street": "M", "tags": set()}}),
        ((1, (2, 3)), [1, [2, 3]]),
        (Point(1, (2,)), [1, [2]]),
        (Markup("<b>"), "<b>"),
        (Weight(1.5), 1.5),
        (Number(7), 7),
        (Number(2**64), 2**64),
        (Raw(b"x"), b"x"),
        (Row([1, (2,)]), [1, [2]]),
        (defaultdict(list, a=[1]), {"a": [1]}),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        ({Word.YES: 1, Markup("b"): 2}, {"yes": 1, "b": 2}),
        (Moment(2024, 2, 29, tzinfo=UTC), datetime(2024, 2, 29, tzinfo=UTC)),
        (Tags({"a"}), {"a"}),
        ({Colour.RED, (1, Colour.MANY)}, {"red", (1, ("red", "green"))}),
        (bytearray(b"x"), b"x"),
        (memoryview(b"xyz")[1:], b"yz"),
    ],
)  # fmt: skip
def test_a_subclass_of_a_plain_type_arrives_as_that_type(sent: Any, arrived: Any) -> None:
    assert exactly(there_and_back(sent)) == exactly(arrived)


@dataclass(frozen=True)
class Money:
    cents: int
    currency: str


class Euro(Money):
    pass


def pack_money(money: Money) -> bytes:
    return f"{money.cents} {money.currency}".encode()


def unpack_money(data: bytes) -> Money:
    cents, currency = data.decode().split()
    return Money(int(cents), currency)


@pytest.fixture
def with_money() -> Values:
    with_money = Values()
    with_money.register(40, Money, pack_money, unpack_money)
    return with_money


def test_a_registered_dataclass_comes_back_as_itself(
    with_money: Values,
) -> None:
    prices = {"price": Money(250, "EUR"), "all": {Money(0, "EUR"), (Money(1, "USD"),)}}

    assert with_money.unpack(with_money.pack(prices)) == prices


def test_a_subclass_of_a_registered_type_travels_as_that_type(with_money: Values) -> None:
    arrived = with_money.unpack(with_money.pack(Euro(250, "EUR")))

    assert exactly(arrived) == exactly(Money(250, "EUR"))


def test_a_registered_type_takes_precedence_over_the_rule_for_enums() -> None:
    with_colour = Values()
    with_colour.register(41, Colour, lambda c: c.name.encode(), lambda data: Colour[data.decode()])

    assert with_colour.unpack(with_colour.pack(Colour.MANY)) is Colour.MANY


def test_the_error_for_an_unregistered_type_names_its_code(
    with_money: Values,
) -> None:
    arrived = values.unpack(with_money.pack({"lines": [{"price": Money(250, "EUR")}]}))

    with pytest.raises(UnfitError, match=r"ext type 40, unknown here\. Register the type"):
        survey(arrived)


@pytest.mark.parametrize("code", [-1, 0, 1, 31, 128, "40", 40.5])
def test_a_code_out_of_range_cannot_be_registered(code: Any) -> None:
    with pytest.raises(ConfigError, match=r"choose a code from 32 to 127"):
        Values().register(code, Money, pack_money, unpack_money)


def test_a_code_is_registered_once(with_money: Values) -> None:
    with pytest.raises(ConfigError, match=r"register_type\(40, ...\): the code is taken"):
        with_money.register(40, Address, pack_money, unpack_money)  # type: ignore[arg-type]  # refused


@pytest.mark.parametrize("type_", [Money, str, dict, set, datetime, memoryview])
def test_a_type_is_registered_once(with_money: Values, type_: type) -> None:
    with pytest.raises(ConfigError, match=f"41, {type_.__name__}, ...*is supported already"):
        with_money.register(41, type_, repr, repr)  # type: ignore[arg-type]  # refused


def test_the_error_names_a_pack_function_that_does_not_return_bytes() -> None:
    broken = Values()
    broken.register(40, Money, lambda money: "text", unpack_money)  # type: ignore[arg-type,return-value]  # the mistake

    with pytest.raises(UnfitError, match="The pack= of Money returned str"):
        broken.pack(Money(1, "EUR"))


@pytest.mark.parametrize("unpack", [lambda data: 1 / 0, lambda data: data])
def test_a_failing_unpack_function_raises_an_unfit_error(with_money: Values, unpack: Any) -> None:
    broken = Values()
    broken.register(40, Money, pack_money, unpack)

    with pytest.raises(UnfitError, match="Ext type 40 cannot be decoded"):
        broken.unpack(with_money.pack(Money(1, "EUR")))


def test_many_threads_can_pack_at_once() -> None:
    start = threading.Barrier(8)

    def work(number: int) -> bool:
        start.wait()
        value = {"n": number, "at": date(2024, 2, 29), "tags": {number, (number, "x")}}
        return all(there_and_back(value) == value for _ in range(200))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_packing_inside_a_pack_function_spoils_neither_value() -> None:
    inner: list[bytes] = []
    nested = Values()

    def pack(money: Money) -> bytes:
        inner.append(nested.pack(["inside"]))
        return pack_money(money)

    nested.register(40, Money, pack, unpack_money)
    outer = nested.pack(["before", Money(1, "EUR"), "after"])

    assert nested.unpack(outer) == ["before", Money(1, "EUR"), "after"]
    assert inner == [msgpack.packb(["inside"])]


# What hostile bytes may say.


def ext(type_: type, data: bytes) -> bytes:
    body: bytes = msgpack.packb(msgpack.ExtType(EXTENSIONS[type_], data))
    return body


def array(*items: bytes) -> bytes:
    header: bytes = msgpack.Packer().pack_array_header(len(items))
    return header + b"".join(items)


@pytest.mark.parametrize(
    "body",
    [
        ext(datetime, b"yesterday"),
        ext(datetime, b"\xff"),
        ext(date, b""),
        ext(time, b"25:00"),
        ext(timedelta, b"\x00"),
        ext(timedelta, b"\x7f\xff\xff\xff" + bytes(8)),
        ext(Decimal, b"ten"),
        ext(UUID, b"short"),
        ext(int, b""),
        ext(int, b"\x01" * (MAX_INTEGER_BYTES + 1)),
        ext(set, b""),
        ext(set, b"\x07"),
        ext(set, b"\x80"),
        ext(set, b"\x91\xc1"),
        ext(set, b"\x92\x01"),
        ext(set, b"\x91\x01\x01"),
        ext(set, b"\xdd\xff\xff\xff\xff"),
        ext(set, array(b"\x80")),
        ext(set, array(array(b"\x80"))),
        ext(set, array(ext(set, b"\x90"))),
        ext(frozenset, b"\x91\xa1\xff"),
        ext(frozenset, array(ext(Decimal, b"sNaN"))),
        ext(frozenset, b"\x91" * 3000),
    ],
)
def test_an_ext_type_with_wrong_contents_is_refused(body: bytes) -> None:
    with pytest.raises(UnfitError):
        values.unpack(body)


def same_hash(count: int) -> list[int]:
    """Integers that Python hashes alike: it takes them modulo 2**61 - 1."""
    return [k * (2**61 - 1) for k in range(1, count + 1)]


def packed_set(members: list[Any]) -> bytes:
    return ext(set, values.pack(members))


def test_a_set_with_many_members_of_the_same_hash_is_refused() -> None:
    body = packed_set(same_hash(50_000))

    with pytest.raises(UnfitError, match="More than 8 members of a set share one hash"):
        values.unpack(body)


def test_a_set_may_have_a_few_members_with_the_same_hash() -> None:
    corner = {(x, y, z) for x in (-1, -2) for y in (-1, -2) for z in (-1, -2)}
    grid = {(x, y) for x in range(-50, 50) for y in range(-50, 50)}

    assert len({hash(point) for point in corner}) == 1
    assert len(corner) == MAX_COLLISIONS
    assert there_and_back([corner, grid]) == [corner, grid]


def test_sets_are_nested_two_levels_at_most() -> None:
    two = {frozenset({1, (2, 3)})}
    three = array(b"\x01", ext(frozenset, array(ext(frozenset, b"\x91\x01"))))

    assert there_and_back(two) == two
    with pytest.raises(UnfitError, match="More than 2 sets are nested"):
        values.unpack(ext(set, three))


def test_refusing_deeply_nested_sets_is_cheap() -> None:
    body = b"\x90"

    for _ in range(5_000):
        body = array(ext(frozenset, body))

    with pytest.raises(UnfitError, match="More than 2 sets are nested"):
        values.unpack(body)


def test_a_short_body_that_claims_many_items_allocates_no_memory_for_them() -> None:
    with pytest.raises(ValueError, match=r"100000 exceeds max_array_len\(4500\)"):
        values.unpack(b"\xdd\x00\x01\x86\xa0" * 900)


@pytest.mark.parametrize(
    "body",
    [
        b"\x91" * 5_000,
        b"\xdf\xff\xff\xff\xff",
        b"\xdd" + (MAX_ITEMS + 1).to_bytes(4, "big"),
        b"\x81\x07\x07",
        b"\x81\xc0\x07",
        b"\x81\x90\x07",
        b"\x81\xd6\xff\x00\x00\x00\x00\x07",
        b"\xc7\x0c\xff" + b"\x00" * 4 + b"\x7f" * 8,
    ],
)
def test_valid_msgpack_that_breaks_a_rule_raises_an_unfit_error(body: bytes) -> None:
    with pytest.raises(UnfitError):
        values.unpack(body)


def test_the_number_of_containers_in_a_payload_is_limited() -> None:
    within: dict[str, Any] = {"rows": [[] for _ in range(MAX_ITEMS - 1)]}
    beyond: dict[str, Any] = {"rows": [[[], []] for _ in range(MAX_CONTAINERS // 2)]}

    assert survey(within) == {list}
    with pytest.raises(UnfitError, match="It holds more than 100000 lists, maps and sets"):
        survey(beyond)


# -- what would arrive changed --------------------------------------------------------------


class Color(enum.Enum):
    """Members that are equal to their values on the wire."""

    RED = 1


@dataclass
class Account:
    """A dataclass that hides a field from its repr()."""

    email: str = "ada@example.com"
    password: str = field(default="secret", repr=False)


@dataclass(repr=False)
class Hidden:
    """A dataclass that has no repr() of its fields at all."""

    password: str = ""


class Nanoseconds(datetime):
    """A moment of pandas: more than a datetime can tell."""

    nanosecond = 5


class NoTime(datetime):
    """pandas's NaT: a datetime that equals nothing."""

    def __eq__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        return True

    __hash__ = datetime.__hash__


class LongNanoseconds(timedelta):
    """A Timedelta of pandas."""

    nanoseconds = 5


Scalar = type("int64", (), {"__module__": "numpy", "item": lambda self: 3})
Array = type("ndarray", (), {"__module__": "numpy", "item": int, "__len__": lambda self: 3})

CHANGED: dict[str, tuple[Any, str]] = {
    "several values for a key": (MultiDict([("a", 1), ("a", 2)]), r".to_dict\(flat=False\)"),
    "an Enum beside its value": ({Color.RED, 1}, "2 members of a set become 1: .* Send a list"),
    "a hidden field": (Account(), "Account hides 'password' from its repr"),
    "a hidden dataclass": (Hidden(), "Hidden hides 'password' from its repr"),
    "nanoseconds": (Nanoseconds(2026, 1, 1), "has nanoseconds, and a datetime has microseconds"),
    "a time that is none": (NoTime(2026, 1, 1), "is not a time. Send None"),
    "a duration of nanoseconds": (LongNanoseconds(1), "has nanoseconds, and a timedelta"),
    "a time in a zone": (time(1, tzinfo=ZoneInfo("Europe/Berlin")), "zone would be lost"),
    "a scalar of numpy": (
        Scalar(),
        r"^numpy.int64 cannot be encoded. Send .* which .item\(\) returns",
    ),
    "an array of numpy": (
        Array(),
        r"^numpy.ndarray cannot be encoded. .* which .tolist\(\) returns",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_value_that_would_arrive_changed_is_refused_with_the_remedy(case: str) -> None:
    value, reason = CHANGED[case]

    with pytest.raises(UnfitError, match=reason):
        values.pack({"value": value})


def test_a_form_travels_as_a_dict_of_lists() -> None:
    form = MultiDict([("a", 1), ("a", 2)])

    assert there_and_back(form.to_dict(flat=False)) == {"a": [1, 2]}
