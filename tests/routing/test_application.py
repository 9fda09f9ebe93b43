"""The application face: declaring, sending and connecting through ``app.signal``."""

from __future__ import annotations

import asyncio
import copy
import doctest
import functools
import gc
import inspect
import pickle
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import blinker
import flask
import pytest
from flask import Blueprint, Flask, current_app
from waiting import wait_until

from flask_eventbus import Bus, ConfigError, EventBus, PayloadError, current_event
from flask_eventbus.checks.program import check_program
from flask_eventbus.codec.codec import Codec
from flask_eventbus.config import TIMING, Timing
from flask_eventbus.event import Event, handling
from flask_eventbus.extension import AppSignals
from flask_eventbus.routing.bus_signal import BusNamespace, BusSignal
from flask_eventbus.testing import Isolation


class App(Flask):
    """A Flask app with the attribute that the extension gives it, for the type checker."""

    signal: AppSignals


def make_app(bus: EventBus | None = None, **settings: Any) -> App:
    app = App(__name__)
    app.config.from_mapping(
        {"EVENTBUS_SERVICE": "accounts", "EVENTBUS_URL": "memory://application", **settings}
    )
    (bus or EventBus()).init_app(app)
    return app


def test_a_decorated_function_declares_the_signal_and_receives_it() -> None:
    app = make_app()
    received = []

    @app.signal("user_registered")
    def welcome(sender: Any, username: str) -> str:
        received.append((sender, username))
        return f"welcome, {username}"

    results = app.signal("user_registered")(app, "ada")

    assert received == [(app, "ada")]
    assert results == [(welcome, "welcome, ada")]


def test_a_bare_decorator_names_the_signal_after_the_function() -> None:
    app = make_app()
    received: list[Any] = []

    @app.signal
    def signal_user_registered(sender: Any, username: str) -> None:
        received.append(username)

    @app.signal
    def order_paid(sender: Any, number: int) -> None:
        received.append(number)

    app.signal("user_registered")(app, username="ada")
    app.signal("order_paid")(app, 7)

    assert received == ["ada", 7]


def test_bus_on_without_a_name_says_how_to_name_the_signal() -> None:
    def greet(sender: Any, **payload: Any) -> None: ...

    with pytest.raises(ConfigError, match=r"greet\(\) names no signal\. Name it, for example"):
        EventBus().on(greet)  # type: ignore[arg-type]


def test_a_closure_made_inside_a_view_stays_connected() -> None:
    app = make_app()
    received = []

    @app.get("/")
    def view() -> str:
        def closure(sender: Any, **payload: Any) -> None:
            received.append(payload)

        current_app.signal("user_registered").connect(closure)  # type: ignore[attr-defined]
        return ""

    app.test_client().get("/")
    gc.collect()
    app.signal("user_registered")(app, username="ada")

    assert received == [{"username": "ada"}]


def test_a_blueprint_sends_and_receives_through_current_app() -> None:
    app = make_app()
    shop = Blueprint("shop", __name__)
    received = []

    @shop.record
    def declare(state: Any) -> None:
        blueprint_app: App = state.app

        @blueprint_app.signal("order_paid")
        def receive(sender: Any, number: int) -> None:
            received.append((sender.name, number))

    @shop.post("/pay")
    def pay() -> str:
        current_app.signal("order_paid")(current_app, 7)  # type: ignore[attr-defined]
        return ""

    app.register_blueprint(shop)
    app.test_client().post("/pay")

    assert received == [(app.name, 7)]


@pytest.mark.parametrize(
    ("args", "payload", "words"),
    [
        ((), {}, "missing a required argument: 'username'"),
        (("ada", "en", "more"), {}, "too many positional arguments"),
        (("ada",), {"username": "ada"}, "multiple values for argument 'username'"),
        ((), {"user": "ada"}, "missing a required argument: 'username'"),
        (("ada",), {"user": "ada"}, "got an unexpected keyword argument 'user'"),
    ],
)
def test_a_call_that_does_not_fit_the_declared_parameters_is_a_type_error(
    args: tuple[Any, ...], payload: dict[str, Any], words: str
) -> None:
    app = make_app()

    @app.signal("user_registered")
    def welcome(sender: Any, username: str, language: str = "en") -> None: ...

    with pytest.raises(TypeError, match=rf"user_registered\(username.*{words}"):
        app.signal("user_registered")(app, *args, **payload)


def test_defaults_of_the_declaration_travel_along() -> None:
    app = make_app()
    received = []

    @app.signal("user_registered")
    def welcome(sender: Any, username: str, language: str = "en", **extra: Any) -> None:
        received.append((username, language, extra))

    app.signal("user_registered")(app, "ada", shoe_size=7)

    assert received == [("ada", "en", {"shoe_size": 7})]


def test_positional_values_of_an_undeclared_signal_are_a_type_error() -> None:
    app = make_app()

    with pytest.raises(TypeError, match="order_paid was sent 1 positional values, but its param"):
        app.signal("order_paid")(app, 7)


def test_another_receiver_must_accept_the_declared_parameters() -> None:
    app = make_app()

    @app.signal("user_registered")
    def welcome(sender: Any, username: str) -> None: ...

    @app.signal("user_registered")
    def tolerant(sender: Any, **payload: Any) -> None: ...

    with pytest.raises(
        ConfigError, match="other does not accept the parameters of 'user_registered', which"
    ):

        @app.signal("user_registered")
        def other(sender: Any, name: str) -> None: ...


def test_a_declaration_without_a_sender_or_with_star_args_is_refused() -> None:
    app = make_app()

    with pytest.raises(ConfigError, match="nobody has no parameter for the sender"):

        @app.signal("a")
        def nobody() -> None: ...

    with pytest.raises(ConfigError, match=r"many declares '\*values', whose values have no name"):

        @app.signal("b")
        def many(sender: Any, *values: Any) -> None: ...


def test_the_flask_app_is_a_sender_although_it_is_callable() -> None:
    app = make_app()
    received = []
    app.signal("ping").connect(lambda sender: received.append(sender))

    app.signal("ping")(app)

    assert received == [app]


class Caller:
    """A sender that could be called."""

    def __call__(self, sender: Any) -> None:
        raise AssertionError("It is a sender.")

    def method(self, sender: Any) -> None:
        raise AssertionError("It is a sender.")


@pytest.mark.parametrize("sender", [Caller(), Caller().method, Caller, functools.partial(print)])
def test_whatever_is_no_plain_function_is_a_sender(sender: Any) -> None:
    app = make_app()
    received = []
    app.signal("ping").connect(lambda sender: received.append(sender))

    app.signal("ping")(sender)

    assert received == [sender]


def test_a_declared_receiver_gets_no_remote_event_until_it_is_subscribed() -> None:
    bus = EventBus()
    app = make_app(bus, EVENTBUS_SUBSCRIBE=["order_paid"])

    @app.signal("user_registered")
    def welcome(sender: Any, username: str) -> None: ...

    app.signal("order_paid").connect(lambda sender: None)

    assert set(bus.node(app).subscriptions) == {"order_paid"}


def test_app_signal_takes_a_name_or_a_function_and_nothing_else() -> None:
    app = make_app()

    with pytest.raises(TypeError, match=r"app\.signal\(\) got 7"):
        app.signal(7)  # type: ignore[call-overload]  # which is the point


def test_async_receivers_run_when_a_signal_is_sent_locally() -> None:
    app = make_app()
    received = []

    @app.signal("ping")
    async def receive(sender: Any, n: int) -> None:
        received.append(n)

    app.signal("ping")(app, 1)

    assert received == [1]


@pytest.mark.parametrize("flask_async", [True])
def test_async_receivers_run_where_a_loop_runs_already(flask_async: bool) -> None:
    app = make_app()
    received = []

    @app.signal("ping")
    async def receive(sender: Any, n: int) -> None:
        await asyncio.sleep(0)
        received.append(n)

    async def view() -> None:
        app.signal("ping")(app, 1)

    asyncio.run(view())

    assert received == [1]


def test_send_async_awaits_receivers_and_publishes() -> None:
    bus = Bus("memory://async", service="x", publish=["ping"])
    received = []

    @bus.on("ping")
    async def receive(sender: Any, n: int) -> None:
        received.append(n)

    asyncio.run(bus.signal("ping").send_async("test", n=1))

    assert received == [1]
    assert bus.flush(5)
    assert bus.health().counts["published"] == 1
    bus.stop()


def test_a_payload_key_called_sender_is_refused_at_send() -> None:
    app = make_app()
    received: list[Any] = []
    app.signal("ping").connect(lambda sender, **payload: received.append(payload))

    with pytest.raises(PayloadError, match="'ping' has a key 'sender', which every receiver"):
        app.signal("ping").send(app, **{"sender": "me"})

    assert received == []


def test_local_receivers_run_before_the_event_is_published() -> None:
    bus = Bus("memory://order", service="x", publish=["ping"])
    seen: list[int] = []
    for number in range(10):
        bus.on("ping")(_noting(seen, bus, number))

    with pytest.raises(PayloadError):
        bus.signal("ping").send("test", value=object())

    assert sorted(seen) == list(range(10))
    bus.stop()


def _noting(seen: list[int], bus: Bus, number: int) -> Callable[..., None]:
    def note(sender: Any, **payload: Any) -> None:
        seen.append(number)

    return note


def test_existing_code_on_blinkers_own_signals_is_bridged_by_configuration_alone() -> None:
    name = f"user_registered_{time.time_ns()}"
    # What the program had before: a signal, a sender and a receiver that know of no bus.
    existing = blinker.signal(name)
    received: list[Any] = []
    existing.connect(lambda sender, **payload: received.append((str(sender), payload)), weak=False)
    app = Flask(__name__)
    app.config.from_mapping(
        EVENTBUS_SERVICE="accounts",
        EVENTBUS_URL=f"memory://{name}",
        EVENTBUS_PUBLISH=["user_registered_*"],
        EVENTBUS_SUBSCRIBE=[name],
    )
    other = Bus(f"memory://{name}", service="shop", publish=[name])

    bus = EventBus(app, namespace=blinker.default_namespace)
    bus.start()
    assert bus.ready(10)
    existing.send(app, user_id=7)
    assert bus.flush(5)
    other.signal(name).send("test", user_id=8)

    wait_until(lambda: len(received) == 2, what="the other service is received")
    assert received == [(str(app), {"user_id": 7}), ("shop", {"user_id": 8})]
    assert bus.health().counts["published"] == 1
    bus.stop()
    other.stop()
    del blinker.default_namespace[name]


def test_buses_that_share_a_namespace_run_its_receivers_once() -> None:
    first = Bus("memory://once", service="first", publish=["ping"])
    second = Bus("memory://once", service="second", namespace=first.namespace)
    received: list[Any] = []
    second.on("ping")(lambda sender: received.append(sender))
    second.start()
    assert second.ready(10)

    first.signal("ping").send("test")
    assert first.flush(5)

    wait_until(lambda: second.health().counts.get("echoes") == 1, what="the event comes back")
    assert received == ["test"]
    first.stop()
    second.stop()


def test_a_receiver_stays_connected_without_another_reference() -> None:
    bus = Bus("memory://strong", service="x")
    received: list[int] = []

    def connect() -> None:
        @bus.on("ping")
        def closure(sender: Any, n: int) -> None:
            received.append(n)

    connect()
    gc.collect()
    bus.signal("ping").send("test", n=1)

    assert received == [1]


class BrokenError(Exception):
    """An error that a view raises."""


FLASKS_OWN = {
    "template_rendered": {"template": "None", "url": "/page"},
    "before_render_template": {"template": "None", "url": "/page"},
    "request_started": {"url": "/page"},
    "request_finished": {"url": "/page", "status": 200},
    "request_tearing_down": {"url": "/page"},
    "got_request_exception": {"url": "/broken", "error": "BrokenError"},
    "message_flashed": {"url": "/page", "text": "hello"},
    "appcontext_pushed": {},
    "appcontext_popped": {},
}


def plainly(sender: Flask, **extra: Any) -> dict[str, Any]:
    """Plain values of the live objects that Flask's signals carry."""
    found: dict[str, Any] = {"url": flask.request.path} if flask.has_request_context() else {}
    plain: dict[str, Callable[[Any], dict[str, Any]]] = {
        "response": lambda response: {"status": response.status_code},
        "exception": lambda error: {"error": type(error).__name__},
        "template": lambda template: {"template": str(template.name)},
        "message": lambda text: {"text": text},
    }

    for key, value in extra.items():
        found.update(plain[key](value) if key in plain and value is not None else {})

    return found


def add_pages(app: Flask) -> None:
    """Add a page that sends most of Flask's signals, and one that fails."""

    @app.get("/page")
    def page() -> str:
        flask.flash("hello")
        return flask.render_template_string("{{ 7 }}")

    @app.get("/broken")
    def broken() -> str:
        raise BrokenError

    app.secret_key = "of a test"  # noqa: S105 - flash() needs one
    app.config["PROPAGATE_EXCEPTIONS"] = False


@pytest.mark.parametrize("name", FLASKS_OWN)
def test_flasks_own_signals_are_published(name: str) -> None:
    url = f"memory://{name}"
    route = {"signal": f"flask:{name}", "payload": plainly}
    bus = EventBus()
    app = make_app(bus, EVENTBUS_URL=url, EVENTBUS_PUBLISH={"api_call": route})
    received: list[Any] = []
    listener = Bus(url, service="analytics")
    listener.on("api_call")(lambda sender, **payload: received.append(payload))
    listener.start()
    assert listener.ready(10)

    add_pages(app)
    app.test_client().get("/page")
    app.test_client().get("/broken")
    assert bus.flush(5, app=app)

    wait_until(lambda: FLASKS_OWN[name] in received, what=f"it arrives, among {received}")
    bus.stop(app)
    listener.stop()


PAGE = {"method": "GET", "rule": "/page", "endpoint": "page"}
BROKEN = {"method": "GET", "rule": "/broken", "endpoint": "broken"}
BROKEN_ERROR = f"{BrokenError.__module__}.BrokenError"
BUILT_IN: dict[str, list[dict[str, Any]]] = {
    "request-started": [PAGE, BROKEN, {"method": "POST", "rule": None, "endpoint": None}],
    "request-finished": [
        {**PAGE, "status": 200},
        {**BROKEN, "status": 500},
        {"method": "POST", "rule": None, "endpoint": None, "status": 404},
    ],
    "request-tearing-down": [
        {**PAGE, "exception": None},
        {**BROKEN, "exception": BROKEN_ERROR},
        {"method": "POST", "rule": None, "endpoint": None, "exception": None},
    ],
    "got-request-exception": [{**BROKEN, "exception": BROKEN_ERROR}],
    "before-render-template": [{**PAGE, "template": None}],
    "template-rendered": [{**PAGE, "template": None}],
    "message-flashed": [{**PAGE, "message": "hello", "category": "message"}],
    "appcontext-pushed": [{}, {}, {}],
    "appcontext-popped": [{}, {}, {}],
    "appcontext-tearing-down": [
        {"exception": None},
        {"exception": BROKEN_ERROR},
        {"exception": None},
    ],
}


def test_flasks_own_signals_travel_as_plain_values_without_a_payload_function() -> None:
    names = [f"flask:{name.replace('-', '_')}" for name in BUILT_IN]
    bus = EventBus()
    app = make_app(bus, EVENTBUS_URL="memory://built-in", EVENTBUS_PUBLISH=names)
    received: dict[str, list[Any]] = {}
    listener = Bus("memory://built-in", service="analytics")

    @listener.on("*")
    def note(sender: str, **payload: Any) -> None:
        received.setdefault(current_event.name, []).append(payload)

    listener.start()
    assert listener.ready(10)

    add_pages(app)
    client = app.test_client()
    codes = [client.get("/page"), client.get("/broken"), client.post("/nowhere")]

    assert [found.status_code for found in codes] == [200, 500, 404]
    assert bus.flush(5, app=app)
    wait_until(lambda: received == BUILT_IN, what=f"all of them arrive, not {received}")
    bus.stop(app)
    listener.stop()


#: A trace context each: of a request, of an event, and of OpenTelemetry's current span.
HEADER, CAUSE, SPAN = (f"00-{n:032x}-{n:016x}-01" for n in (1, 2, 3))
HANDLED = Event(
    name="cause", source="x", id="x-1", time=datetime.now(UTC), payload={}, traceparent=CAUSE
)


@contextmanager
def span_that_goes_on() -> Iterator[None]:
    """The span SPAN, as OpenTelemetry's API makes it current; the SDK is not needed."""
    trace: Any = pytest.importorskip("opentelemetry.trace")
    context = trace.SpanContext(3, 3, is_remote=False, trace_flags=trace.TraceFlags(1))

    with trace.use_span(trace.NonRecordingSpan(context)):
        yield


@pytest.mark.parametrize(
    ("span", "cause", "expected"),
    [
        (span_that_goes_on, HANDLED, SPAN),
        (span_that_goes_on, None, SPAN),
        (nullcontext, HANDLED, CAUSE),
        (nullcontext, None, HEADER),
    ],
)
def test_an_event_carries_the_nearest_trace_context(
    eventbus: Isolation,
    span: Callable[[], AbstractContextManager[None]],
    cause: Event | None,
    expected: str,
) -> None:
    bus = EventBus()
    app = make_app(bus, EVENTBUS_PUBLISH=["ping"])
    token = handling.set(cause)

    with app.test_request_context(headers={"traceparent": HEADER}), span():
        bus.signal("ping").send(app)

    handling.reset(token)
    [event] = eventbus.published("ping")
    assert event.traceparent == expected


def test_a_program_without_flask_sends_in_the_current_span(eventbus: Isolation) -> None:
    bus = Bus("memory://trace", service="script", publish=["ping"])

    with span_that_goes_on():
        bus.signal("ping").send()
    bus.signal("ping").send()

    assert [event.traceparent for event in eventbus.published("ping")] == [SPAN, None]
    bus.stop()


def fail(sender: Any, **extra: Any) -> dict[str, Any]:
    """A payload function with a fault."""
    raise LookupError("the fault of a payload function")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"payload": fail}, "LookupError: the fault of a payload function"),
        ({"payload": lambda sender, **extra: {"error": object()}}, "PayloadError: "),
        ({"confirm": True}, "PublishError: "),
    ],
)
def test_a_bridge_does_not_replace_the_exception_of_the_program(
    caplog: pytest.LogCaptureFixture, options: dict[str, Any], reason: str
) -> None:
    app = make_app(
        EVENTBUS_URL="redis://127.0.0.1:1/0",
        EVENTBUS_ON_OUTAGE="raise",
        EVENTBUS_PUBLISH={"failures": {"signal": "flask:got_request_exception", **options}},
    )

    @app.get("/broken")
    def broken() -> str:
        raise BrokenError

    app.config["PROPAGATE_EXCEPTIONS"] = True
    with pytest.raises(BrokenError):
        app.test_client().get("/broken")

    [record] = [each for each in caplog.records if "was not published" in each.getMessage()]
    assert "'failures' was sent while BrokenError was being handled" in record.getMessage()
    assert reason in record.getMessage()


@pytest.fixture
def signals_of_a_module(monkeypatch: pytest.MonkeyPatch) -> blinker.Namespace:
    """The namespace of an app's own signals, one of which is on the top level of a module."""
    namespace = blinker.Namespace()
    module = ModuleType("shop_of_a_test")
    vars(module)["order_shipped"] = namespace.signal("order_shipped")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return namespace


def test_an_own_signal_of_the_app_that_is_not_published_is_reported(
    signals_of_a_module: blinker.Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    bus = EventBus()
    app = make_app(bus, EVENTBUS_PUBLISH={"order_shipped": "stream"})
    reported = (
        "no code has asked for with bus.signal('order_shipped'). shop_of_a_test:order_shipped"
    )

    for _ in range(2):
        app.test_client().get("/")

    [finding] = [found for found in check_program(bus.node(app)) if found.level == "error"]
    assert reported in finding.text
    assert "{'signal': 'shop_of_a_test:order_shipped'}" in finding.remedy
    assert "EventBus(namespace=...)" in finding.remedy
    assert caplog.text.count(reported) == 1


#: Programs with a signal ``order_shipped`` in different places, the finding and its remedy.
PLACES = {
    "a namespace": (
        "import blinker\nevents = blinker.Namespace()\nevents.signal('order_shipped')",
        "shop_of_a_test:events['order_shipped'] is another signal of that name",
        "Give the bus that namespace: EventBus(namespace=events), from shop_of_a_test.",
    ),
    "a class": (
        "import blinker\nclass Shop:\n    class Orders:\n"
        "        shipped = blinker.NamedSignal('order_shipped')\n",
        "shop_of_a_test:Shop.Orders.shipped is another signal of that name",
        "Give the route {'signal': 'shop_of_a_test:Shop.Orders.shipped'}",
    ),
    "a namespace of a class": (
        "import blinker\nclass Shop:\n    events = blinker.Namespace()\n"
        "Shop.events.signal('order_shipped')",
        "shop_of_a_test:Shop.events['order_shipped'] is another signal of that name",
        "Give the bus that namespace: EventBus(namespace=Shop.events), from shop_of_a_test.",
    ),
    "blinker's own namespace": (
        "import blinker\nkept = [blinker.signal('order_shipped')]",
        "blinker:default_namespace['order_shipped'] is another signal of that name",
        "Give the bus that namespace: EventBus(namespace=default_namespace), from blinker.",
    ),
    "an object": (
        "import blinker\nclass Shop:\n    def __init__(self):\n"
        "        self.shipped = blinker.NamedSignal('order_shipped')\nshop = Shop()",
        "A signal in an object or a function is another signal of that name",
        "Name the signal itself in the route, {'signal': SIGNAL}",
    ),
    "a closure": (
        "import blinker\ndef make():\n    shipped = blinker.NamedSignal('order_shipped')\n"
        "    return lambda: shipped.send()\nship = make()",
        "A signal in an object or a function is another signal of that name",
        "Name the signal itself in the route, {'signal': SIGNAL}",
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_own_signal_of_the_app_is_found_wherever_it_is_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    code, reported, advised = PLACES[place]
    file = tmp_path / "shop_of_a_test.py"
    file.write_text(code)
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec.loader.exec_module(module)
    bus = EventBus()
    app = make_app(bus, EVENTBUS_PUBLISH={"order_shipped": "stream"})

    app.test_client().get("/")
    found = [each for each in check_program(bus.node(app)) if each.level == "error"]
    blinker.default_namespace.pop("order_shipped", None)

    [finding] = found
    assert reported in finding.text
    assert advised in finding.remedy
    assert caplog.text.count(reported) == 1


def test_a_deleted_signal_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    cycle: list[Any] = [blinker.NamedSignal("order_shipped")]
    cycle.append(cycle)
    del cycle
    bus = EventBus()
    app = make_app(bus, EVENTBUS_PUBLISH={"order_shipped": "stream"})

    app.test_client().get("/")

    assert [found for found in check_program(bus.node(app)) if found.level == "error"] == []
    assert "no code has asked" not in caplog.text


@pytest.mark.parametrize("remedy", ["signal", "namespace", "path", "object", "publishes"])
def test_each_remedy_publishes_an_own_signal_of_the_app(
    signals_of_a_module: blinker.Namespace, caplog: pytest.LogCaptureFixture, remedy: str
) -> None:
    bus = EventBus(namespace=signals_of_a_module if remedy == "namespace" else None)
    own = signals_of_a_module.signal("order_shipped")
    paths = {"path": "shop_of_a_test:order_shipped", "object": own}
    route: Any = {"signal": paths[remedy]} if remedy in paths else "channel"
    app = make_app(bus, EVENTBUS_PUBLISH={"order_shipped": route})
    signal: blinker.Signal = own
    if remedy == "signal":
        signal = bus.signal("order_shipped")
    elif remedy == "publishes":
        signal = bus.publishes("order_shipped")

    app.test_client().get("/")
    signal.send(app, number=1)

    assert bus.flush(5, app=app)
    assert bus.health(app).counts["published"] == 1
    assert [found for found in check_program(bus.node(app)) if found.level == "error"] == []
    assert "no code has asked" not in caplog.text


def test_settings_are_read_once() -> None:
    bus = EventBus()
    app = make_app(bus)

    app.config["EVENTBUS_URL"] = "memory://elsewhere"
    app.config["EVENTBUS_SUBSCRIBE"] = ["ping"]

    assert bus.node(app).config.url == "memory://application"
    assert not bus.node(app).subscriptions


def test_an_app_whose_receivers_could_not_be_loaded_can_try_again() -> None:
    bus = EventBus()

    with pytest.raises(ConfigError, match="'no_such_module', named in 'EVENTBUS_RECEIVERS'"):
        make_app(bus, EVENTBUS_RECEIVERS=["no_such_module"])

    app = make_app(bus)
    app_again = App(__name__)
    app_again.config.from_mapping(EVENTBUS_SERVICE="x", EVENTBUS_RECEIVERS=["no_such_module"])
    with pytest.raises(ConfigError, match="no_such_module"):
        bus.init_app(app_again)
    app_again.config["EVENTBUS_RECEIVERS"] = []
    bus.init_app(app_again)

    assert bus.health(app).service == "accounts"
    assert bus.health(app_again).service == "x"


def test_several_apps_share_a_bus_and_each_publishes_its_own_signals() -> None:
    bus = EventBus()
    ping = bus.signal("ping")
    first = make_app(bus, EVENTBUS_SERVICE="first", EVENTBUS_PUBLISH=["ping"])
    second = make_app(bus, EVENTBUS_SERVICE="second", EVENTBUS_PUBLISH=["ping"])

    ping.send(first, n=1)
    with second.app_context():
        ping.send("anyone", n=2)
        ping.send(None, n=3)
        assert bus.flush(5)
    assert bus.flush(5, app=first)

    assert bus.health(first).counts["published"] == 1
    assert bus.health(second).counts["published"] == 2
    with pytest.raises(RuntimeError, match="serves 2 apps, and a signal was sent where none"):
        ping.send("anyone", n=4)
    with pytest.raises(RuntimeError, match="serves 2 apps and none of them is the current one"):
        bus.health()
    bus.stop(first)
    bus.stop(second)


def test_a_deleted_app_removes_its_bridges() -> None:
    bus = EventBus()
    ping = bus.signal("ping")
    assert isinstance(ping, BusSignal)
    other = blinker.NamedSignal("pong")
    bus.publishes(other)
    app = make_app(bus, EVENTBUS_PUBLISH=["ping"])
    assert ping.bridges
    assert other.receivers

    del app
    gc.collect()

    assert not ping.bridges
    assert not other.receivers


def test_a_deleted_app_stops_listening() -> None:
    bus = EventBus()
    bus.on("ping")(lambda sender: None)
    app = make_app(bus)
    bus.start(app)
    assert bus.ready(10, app=app)
    node = bus.health(app).node

    del app
    gc.collect()

    wait_until(
        lambda: not [thread for thread in threading.enumerate() if node in thread.name],
        what="its threads end",
    )


def test_an_app_is_freed_with_its_last_reference() -> None:
    bus = EventBus()
    gc.collect()
    gc.disable()

    try:
        app = make_app(
            bus,
            EVENTBUS_PUBLISH={"ping": "channel", "asked": {"signal": "flask:request_started"}},
        )
        bus.on("pong")(lambda sender: None)
        app.add_url_rule("/", view_func=lambda: "")
        app.test_client().get("/")
        bus.signal("ping").send(app)
        reference = weakref.ref(app)

        del app

        assert reference() is None
    finally:
        gc.enable()


def test_the_names_of_deleted_buses_do_not_pile_up() -> None:
    namespace = blinker.Namespace()
    few = Timing(max_former=5)
    lasting = Bus("memory://", service="lasting", namespace=namespace, _timing=few)

    for _ in range(8):
        Bus("memory://", service="passing", namespace=namespace)
        gc.collect()
    last = Bus("memory://", service="passing", namespace=namespace)

    assert len(lasting.siblings) <= 5 + 2
    assert lasting.node.name in last.siblings
    assert last.node.name in lasting.siblings


def test_a_bus_that_stops_remembers_a_bounded_number_of_its_names() -> None:
    bus = Bus("memory://", service="passing")
    first = bus.node.name

    bus.stop(flush=0)
    assert first in bus.siblings
    for _ in range(TIMING.max_former + 20):
        bus.siblings.add(bus.node, secrets.token_hex(6))

    assert first not in bus.siblings
    assert len(bus.siblings) == TIMING.max_former + 1


def test_a_namespace_keeps_nothing_of_deleted_buses() -> None:
    first = Bus("memory://", service="lasting")
    namespace = first.namespace
    assert isinstance(namespace, BusNamespace)

    for _ in range(8):
        Bus("memory://", service="passing", namespace=namespace)
        gc.collect()

    assert len(namespace._watchers) <= 2


def test_init_app_twice_is_an_error() -> None:
    bus = EventBus()
    app = make_app(bus)

    with pytest.raises(ConfigError, match="has an event bus already"):
        bus.init_app(app)


def test_an_app_of_another_bus_is_not_accepted() -> None:
    bus = EventBus()
    app = make_app()

    with pytest.raises(RuntimeError, match="does not use this event bus"):
        bus.health(app)


def test_a_receiver_gets_an_app_context_per_event_that_is_torn_down() -> None:
    bus = EventBus()
    app = make_app(bus)
    seen: list[Any] = []

    @app.teardown_appcontext
    def teardown(error: BaseException | None) -> None:
        seen.append("teardown")

    @bus.on("ping")
    def receive(sender: str, n: int) -> None:
        assert not hasattr(flask.g, "n")
        flask.g.n = n
        seen.append((current_app.name, sender, current_event.source, current_event.id))

    dispatch(bus, app, n=1)
    dispatch(bus, app, n=2)

    reported = (app.name, "elsewhere", "elsewhere", "abc-1")
    assert seen == [reported, "teardown", reported, "teardown"]
    assert not current_event


def dispatch(bus: EventBus, app: Flask, **payload: Any) -> list[Any]:
    """Dispatch as the listener would, in this thread."""
    codec = Codec()
    body = codec.envelope("elsewhere", "ping")(codec.pack_payload(payload), id="abc-1", time_ns=1)
    event: Event = codec.decode(body)
    return list(bus.node(app).dispatcher.dispatch(event) or ())


def test_a_failing_receiver_stops_no_other_and_a_failing_teardown_is_counted() -> None:
    bus = EventBus()
    app = make_app(bus)
    seen = []

    @bus.on("ping")
    def failing(sender: str, n: int) -> None:
        raise ValueError("no")

    @bus.on("ping")
    def leaving(sender: str, n: int) -> None:
        raise SystemExit(3)

    @bus.on("ping")
    def good(sender: str, n: int) -> None:
        seen.append(n)

    @app.teardown_appcontext
    def teardown(error: BaseException | None) -> None:
        raise RuntimeError("teardown")

    failures = dispatch(bus, app, n=1)

    assert seen == [1]
    assert sorted(type(failure.error).__name__ for failure in failures) == [
        "RuntimeError",
        "RuntimeError",
        "RuntimeError",
        "SystemExit",
        "ValueError",
    ]
    assert bus.health(app).counts["failed"] == 5


def test_current_event_outside_of_a_receiver_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"current_event\.id was read where no event is being"):
        _ = current_event.id


def test_current_event_outside_of_a_receiver_survives_introspection() -> None:
    module = ModuleType("a_module", ">>> 1\n1\n")
    vars(module)["current_event"] = current_event

    assert not hasattr(current_event, "nope")
    assert getattr(current_event, "id", None) is None
    assert dir(current_event) == []
    assert [found.name for found in doctest.DocTestFinder().find(module)] == ["a_module"]
    assert inspect.unwrap(current_event) is current_event  # type: ignore[arg-type]  # no function
    assert mock.create_autospec(current_event)
    assert copy.copy(current_event) is current_event
    assert pickle.loads(pickle.dumps(current_event)) is current_event  # noqa: S301 - of this test
    assert not isinstance(current_event, Event)
    assert repr(current_event) == "<current_event outside of receivers>"
    assert current_event != HANDLED


def test_current_event_inside_of_a_receiver_is_the_event() -> None:
    token = handling.set(HANDLED)
    found: list[Any] = [
        current_event.get(),
        copy.copy(current_event),
        copy.deepcopy(current_event),
        pickle.loads(pickle.dumps(current_event)),  # noqa: S301 - of this test
    ]

    match current_event:
        case Event(name=name):
            found.append(replace(current_event, name=name))

    assert isinstance(current_event, Event)
    assert current_event == HANDLED
    assert HANDLED.__eq__(current_event)
    assert {"id", "payload", "get"} <= set(dir(current_event))
    assert asdict(current_event) == asdict(HANDLED)
    assert not hasattr(current_event, "nope")
    handling.reset(token)

    # Each is kept, and an event for itself.
    assert found == [HANDLED] * 5
    assert all(type(each) is Event for each in found)


def test_a_receiver_can_hand_current_event_get_to_a_thread() -> None:
    read: list[str] = []

    def work(event: Event) -> None:
        with pytest.raises(RuntimeError, match=r"'current_event\.get\(\)'"):
            _ = current_event.id
        read.append(event.id)

    token = handling.set(HANDLED)
    thread = threading.Thread(target=work, args=[current_event.get()])
    thread.start()
    thread.join()
    handling.reset(token)

    assert read == ["x-1"]


def test_two_buses_share_a_namespace_and_both_publish_new_signals() -> None:
    first = Bus("memory://shared", service="first", publish=["order_*"])
    second = Bus("memory://shared", service="second", publish=["*"], namespace=first.namespace)

    second.signal("order_paid").send("test", n=1)

    assert first.flush(5)
    assert second.flush(5)
    assert first.health().counts["published"] == 1
    assert second.health().counts["published"] == 1
    first.stop()
    second.stop()


def test_async_receivers_leave_no_event_loop_behind_in_short_lived_threads() -> None:
    bus = Bus("memory://loops", service="x")
    loops: list[asyncio.AbstractEventLoop] = []

    @bus.on("ping")
    async def receive(sender: Any) -> None:
        loops.append(asyncio.get_running_loop())

    thread = threading.Thread(target=bus.signal("ping").send, args=("test",))
    thread.start()
    thread.join()

    assert [loop.is_closed() for loop in loops] == [True]


def test_receivers_of_a_pattern_include_those_that_connect_later() -> None:
    bus = Bus("memory://application", service="accounts")

    def first(sender: Any, **payload: Any) -> None: ...
    def second(sender: Any, **payload: Any) -> None: ...

    bus.on("orders/*")(first)
    assert bus.receivers_of_pattern("orders/paid") == [first]

    bus.on("orders/p*")(second)
    assert bus.receivers_of_pattern("orders/paid") == [first, second]
