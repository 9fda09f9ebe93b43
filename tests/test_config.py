"""Settings: read once, checked, and wrong ones named with the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import blinker
import flask
import pytest

from flask_eventbus import Bus, ConfigError, EventBus
from flask_eventbus.config import SETTINGS, Age, Config
from flask_eventbus.routing.routes import Route, read_routes
from flask_eventbus.routing.subscriptions import Subscription, read_subscriptions
from flask_eventbus.typing import Publish, Subscribe


def config(**settings: Any) -> Config:
    return Config.from_mapping({"EVENTBUS_SERVICE": "accounts", **settings})


def summary(sender: Any, **extra: Any) -> dict[str, Any]:
    return {}


WRONG = [
    ({"EVENTBUS_SERVICE": None}, "'EVENTBUS_SERVICE' is not set. Set it to this service's name"),
    ({"EVENTBUS_SERVICE": "my service"}, "'EVENTBUS_SERVICE' is 'my service'. A service's name"),
    ({"EVENTBUS_SERVICE": True}, "'EVENTBUS_SERVICE' is True."),
    ({"EVENTBUS_SERVICE": 1.5}, "'EVENTBUS_SERVICE' is 1.5."),
    (
        {"EVENTBUS_URL": "localhost:6379"},
        "has no '://', so it is not a URL of Redis. Begin it with one of",
    ),
    ({"EVENTBUS_URL": "http://x"}, "begins with 'http', so it is not a URL of Redis"),
    ({"EVENTBUS_PREFIX": "a{b}"}, r"'EVENTBUS_PREFIX' is 'a\{b\}'. A prefix is made of"),
    ({"EVENTBUS_ENABLED": "perhaps"}, "'EVENTBUS_ENABLED' is 'perhaps'. Set it to True or False"),
    ({"EVENTBUS_LISTEN": 2}, "'EVENTBUS_LISTEN' is 2. Set it to True or False"),
    ({"EVENTBUS_CONCURRENCY": 0}, "'EVENTBUS_CONCURRENCY' is 0. Set it to a whole number from 1"),
    ({"EVENTBUS_CONCURRENCY": True}, "'EVENTBUS_CONCURRENCY' is True"),
    ({"EVENTBUS_TIMEOUT": "soon"}, "'EVENTBUS_TIMEOUT' is 'soon'. Set it to a number of seconds"),
    ({"EVENTBUS_TIMEOUT": 0}, "'EVENTBUS_TIMEOUT' is 0"),
    ({"EVENTBUS_TIMEOUT": float("nan")}, "'EVENTBUS_TIMEOUT' is nan"),
    ({"EVENTBUS_ON_OUTAGE": "ignore"}, "'EVENTBUS_ON_OUTAGE' is 'ignore'. Set it to 'buffer'"),
    ({"EVENTBUS_BUFFER_SIZE": "many"}, "'EVENTBUS_BUFFER_SIZE' is 'many'"),
    ({"EVENTBUS_MAX_EVENT_BYTES": 1}, "'EVENTBUS_MAX_EVENT_BYTES' is 1"),
    ({"EVENTBUS_MAX_HOPS": -1}, "'EVENTBUS_MAX_HOPS' is -1"),
    ({"EVENTBUS_GRACE": -1}, "'EVENTBUS_GRACE' is -1"),
    ({"EVENTBUS_RECEIVERS": [7]}, r"'EVENTBUS_RECEIVERS' is \[7\]. Set it to a list of module"),
    (
        {"EVENTBUS_SERVCE": "x"},
        "'EVENTBUS_SERVCE' is not a setting. Did you mean 'EVENTBUS_SERVICE'",
    ),
    (
        {"EVENTBUS_COLOUR": "x"},
        "'EVENTBUS_COLOUR' is not a setting. Known are: EVENTBUS_BUFFER_SIZE",
    ),
    ({"EVENTBUS_service": "x"}, "'EVENTBUS_service' is not a setting"),
    ({"EVENTBUS_RETRIES": -1}, "'EVENTBUS_RETRIES' is -1. Set it to a whole number from 0"),
    ({"EVENTBUS_CLAIM_AFTER": 0}, "'EVENTBUS_CLAIM_AFTER' is 0. Set it to a number of seconds"),
    ({"EVENTBUS_MAXLEN": 0}, "'EVENTBUS_MAXLEN' is 0. Set it to the number of events"),
    ({"EVENTBUS_MAXLEN": "7 days"}, "is '7 days'.* or to their age, for example '7d', '12h'"),
    ({"EVENTBUS_REPLICAS": -1}, "'EVENTBUS_REPLICAS' is -1. Set it to a whole number from 0"),
    ({"EVENTBUS_DUPLICATE_WINDOW": -1}, "'EVENTBUS_DUPLICATE_WINDOW' is -1"),
    ({"EVENTBUS_SIGNING_KEY": "k"}, "'EVENTBUS_SIGNING_KEY' belongs to signed events"),
]


@pytest.mark.parametrize(("settings", "words"), WRONG)
def test_the_error_for_an_invalid_setting_names_its_value_and_the_remedy(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**settings)


def test_a_password_in_an_invalid_url_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        config(EVENTBUS_URL="reddis://user:hunter2@host")

    assert "hunter2" not in str(caught.value)


UNREADABLE = [
    "redis://[",
    "redis://h:99999999/0",
    "redis://h/0?db=first",
    "redis://h/0?socket_timeout=soon",
    "redis://h/0?no_such_option=1",
    "rediss://h/0?ssl_cert_reqs=perhaps",
    "unix:///run/redis.sock?db=first",
    "redis+sentinel://h/mymaster/0?socket_timeout=soon",
    "redis+sentinel://h:port/mymaster",
    "redis+sentinel://h",
    "redis+cluster://h,i:port",
    "redis+cluster://h?socket_timeout=soon",
    "embedded://../elsewhere",
]


@pytest.mark.parametrize("url", UNREADABLE)
def test_an_unusable_url_is_an_error_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match="EVENTBUS_URL"):
        Bus(url, service="x")


def test_other_keys_of_the_mapping_are_ignored() -> None:
    assert config(DEBUG=True, eventbus_x=1).service == "accounts"


def test_structured_settings_in_the_environment_are_json() -> None:
    read = Config.from_environ(
        {
            "EVENTBUS_SERVICE": "42",
            "EVENTBUS_PUBLISH": '{"user_registered": {"confirm": true}}',
            "EVENTBUS_SUBSCRIBE": "price_changed, order_*",
            "EVENTBUS_CONCURRENCY": "4",
            "EVENTBUS_ENABLED": "no",
            "EVENTBUS_TIMEOUT": "1.5",
            "HOME": "/",
        }
    )

    assert read.service == "42"
    assert read.publish == {"user_registered": {"confirm": True}}
    assert read.subscribe == ["price_changed", "order_*"]
    assert (read.concurrency, read.enabled, read.timeout) == (4, False, 1.5)


def test_broken_json_in_the_environment_is_an_error_that_shows_it() -> None:
    environ = {"EVENTBUS_SERVICE": "x", "EVENTBUS_PUBLISH": '{"a": '}

    with pytest.raises(ConfigError, match=r"'EVENTBUS_PUBLISH' is '\{\"a\": ', which is not JSON"):
        Config.from_environ(environ)


def test_flasks_prefixed_environment_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASK_EVENTBUS_SERVICE", "accounts")
    monkeypatch.setenv("FLASK_EVENTBUS_PUBLISH__user_registered", "channel")
    app = flask.Flask(__name__)
    app.config.from_prefixed_env()
    bus = EventBus(app)

    assert list(bus.node(app).routes) == ["user_registered"]


TEXTS = [
    ("SERVICE", "123", "123"),
    ("SERVICE", "007", "007"),
    ("SERVICE", '"1.50"', "1.50"),
    ("SERVICE", "true", ConfigError),
    ("SERVICE", "1.50", ConfigError),
    ("SERVICE", "", ConfigError),
    ("PREFIX", "1", "1"),
    *[("ENABLED", text, False) for text in ("0", "off", "OFF", "no", "No", "false", "False")],
    *[("ENABLED", text, True) for text in ("1", "on", "yes", "true", "TRUE")],
    ("ENABLED", "", ConfigError),
    ("ENABLED", "2", ConfigError),
    ("LISTEN", "null", True),
    ("PUBLISH", "", []),
    ("PUBLISH", "[]", []),
    ("PUBLISH", "order_paid", ["order_paid"]),
    ("PUBLISH", "order_paid, user_*", ["order_paid", "user_*"]),
    ("PUBLISH", '["order_paid"]', ["order_paid"]),
    ("PUBLISH", '{"order_paid": "stream"}', {"order_paid": "stream"}),
    ("PUBLISH", "{'order_paid': 'stream'}", ConfigError),
    ("SUBSCRIBE", "order_paid,", ["order_paid"]),
    ("SUBSCRIBE", "", []),
    ("RECEIVERS", "json, csv", ("json", "csv")),
    ("RECEIVERS", "", ()),
    ("MAXLEN", "7d", Age(7 * 86_400)),
    ("MAXLEN", "1000", 1_000),
    ("MAXLEN", "1e5", ConfigError),
    ("TIMEOUT", "0.5", 0.5),
    ("TIMEOUT", "NaN", ConfigError),
    ("CONCURRENCY", "4", 4),
    ("CONCURRENCY", "true", ConfigError),
]


@pytest.mark.parametrize(("name", "text", "value"), TEXTS)
def test_flask_and_from_env_read_text_alike(
    name: str, text: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = f"EVENTBUS_{name}"
    environ = {"EVENTBUS_SERVICE": "accounts", key: text}

    for other, given in environ.items():
        monkeypatch.setenv(f"FLASK_{other}", given)

    app = flask.Flask(__name__)
    app.config.from_prefixed_env()

    assert value_of(name, environ) == value
    assert value_of(name, app.config) == value


def value_of(name: str, found: Mapping[str, Any]) -> Any:
    """Return the value of a setting, or the class of its error."""
    read = Config.from_mapping if isinstance(found, flask.Config) else Config.from_environ

    try:
        return getattr(read(found), name.lower())
    except ConfigError as error:
        return ConfigError if f"EVENTBUS_{name}" in str(error) else error


def test_a_bus_takes_lower_case_settings_and_names_a_misspelt_one() -> None:
    assert Bus("redis://h/0", service="x", concurrency=3).node.config.concurrency == 3

    with pytest.raises(ConfigError, match="Did you mean 'EVENTBUS_CONCURRENCY'"):
        Bus("redis://h/0", service="x", concurency=3)  # type: ignore[call-arg]  # which is the point


def test_every_setting_of_the_class_is_a_known_key() -> None:
    for key in SETTINGS:
        # What is ``None`` is not set: only the key is looked at.
        Config.from_mapping({key: None} | {"EVENTBUS_SERVICE": "accounts"})

    assert {"EVENTBUS_SERVICE", "EVENTBUS_GRACE"} <= set(SETTINGS)


# -- routes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "user_registered",
        ["user_registered"],
        ("user_registered",),
        {"user_registered": "channel"},
        {"user_registered": {"via": "channel"}},
        {"user_registered": None},
    ],
)
def test_a_route_is_written_as_a_name_a_list_or_a_mapping(value: Any) -> None:
    assert read_routes(value) == {"user_registered": Route(name="user_registered")}


def test_a_route_is_a_signal_object_under_its_name_or_another() -> None:
    by_object = read_routes([flask.request_finished])
    by_path = read_routes(["flask:request_finished"])
    renamed = read_routes({"api_call": {"signal": "flask:request_finished", "payload": summary}})

    assert by_object == by_path
    assert by_object["request-finished"].signal is flask.request_finished
    assert renamed["api_call"].signal is flask.request_finished
    assert renamed["api_call"].payload is summary


def test_a_payload_function_is_named_by_its_import_path() -> None:
    routes = read_routes({"a": {"payload": "json:loads"}})

    import json

    assert routes["a"].payload is json.loads


WRONG_ROUTES = [
    (7, "EVENTBUS_PUBLISH is 7. Set it to a list of signal names"),
    (["a b"], r"EVENTBUS_PUBLISH\['a b'\]: 'a b' cannot be a signal's name"),
    ({"a{b}": "channel"}, "cannot be a signal's name"),
    ({7: "channel"}, "7 cannot be a signal's name"),
    (["a", "a"], "EVENTBUS_PUBLISH names 'a' twice"),
    ({"a": "chanel"}, r"EVENTBUS_PUBLISH\['a'\] asks for via 'chanel'. Use 'channel' \(only"),
    ({"a": 7}, r"EVENTBUS_PUBLISH\['a'\] is 7. Write 'channel', or a mapping"),
    ({"a": {"viaa": "channel"}}, "has no option 'viaa'. Did you mean 'via'"),
    ({"a": {"maxlen": 7}}, r"\['maxlen'\] belongs to streams"),
    ({"a": {"key": "id"}}, r"\['key'\] belongs to streams, .* Add 'via': 'stream', or remove"),
    ({"a": {"replicas": 1}}, r"\['replicas'\] belongs to streams"),
    ({"a": {"via": "stream", "key": 7}}, r"\['key'\] is 7. Set it to the name of a payload key"),
    ({"a": {"via": "stream", "key": ""}}, r"\['key'\] is ''"),
    ({"a": {"via": "stream", "maxlen": "x"}}, r"\['maxlen'\]. is 'x'. Set it to the number"),
    (
        {"a": {"via": "stream", "replicas": 1, "confirm": False}},
        "would not wait for the replicas. Remove one of the two",
    ),
    ({"a": {"via": "stream", "replicas": -1}}, r"\['replicas'\]. is -1. Set it to a whole"),
    ({"a": {"confirm": "yes"}}, r"\['confirm'\] is 'yes'. Set it to True or False"),
    ({"a": {"payload": 7}}, r"\['payload'\] is 7. Set it to a function"),
    ({"a": {"payload": "no.such:thing"}}, "'no.such:thing' cannot be imported: ModuleNotFoundE"),
    ({"a": {"payload": "..relative:thing"}}, "'..relative:thing' cannot be imported: TypeError"),
    ({"a": {"payload": "raising_module:x"}}, "cannot be imported: ZeroDivisionError: division"),
    ({"a": {"payload": "json:nothing"}}, "'json:nothing' cannot be imported"),
    ({"a": {"signal": "json:loads"}}, "which is not a blinker signal"),
    ({"a": {"signal": 7}}, r"\['signal'\] is 7, which is not a blinker signal"),
    ([blinker.Signal()], "has no name"),
    (["json:loads"], "which is not a blinker signal"),
]


@pytest.mark.parametrize(("value", "words"), WRONG_ROUTES)
def test_the_error_for_an_invalid_route_names_the_remedy(
    value: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raising_module.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(ConfigError, match=words):
        read_routes(value)


def test_an_invalid_route_fails_at_init_app() -> None:
    app = flask.Flask(__name__)
    app.config.from_mapping(EVENTBUS_SERVICE="x", EVENTBUS_PUBLISH={"a": "pigeon"})

    with pytest.raises(ConfigError, match="asks for via 'pigeon'"):
        EventBus(app)


def test_a_stream_takes_options_and_is_confirmed_by_default() -> None:
    routes = read_routes(
        {
            "a": "stream",
            "b": {"via": "stream", "confirm": False, "key": "id", "maxlen": 7},
            "c": {"via": "stream", "maxlen": "12h"},
        }
    )

    assert routes["a"] == Route(name="a", via="stream", confirm=True)
    assert routes["b"] == Route(name="b", via="stream", key="id", maxlen=7)
    assert routes["c"].maxlen == Age(12 * 3_600)


@pytest.mark.parametrize("declared", [False, True])
def test_a_stream_in_a_cluster_is_refused(declared: bool) -> None:
    publish: Publish = [] if declared else {"a": "stream"}

    with pytest.raises(ConfigError, match="'a' asks for via 'stream', and 'EVENTBUS_URL' is a clu"):
        Bus("redis+cluster://localhost", service="x", publish=publish).publishes("a", via="stream")


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("option", [{"via": "stream"}, {"group": None}], ids=["via", "group"])
def test_a_subscription_to_a_stream_in_a_cluster_is_refused(declared: bool, option: Any) -> None:
    subscribe: Subscribe = {} if declared else {"a": option}
    message = "The subscription to 'a' needs a stream, and 'EVENTBUS_URL' is a cluster"

    with pytest.raises(ConfigError, match=message):
        Bus("redis+cluster://localhost", service="x", subscribe=subscribe).on("a", **option)(print)


def test_subscriptions_take_options() -> None:
    read = read_subscriptions({"a": {"from": ["accounts"], "echo": True}, "b_*": "channel"})

    assert read["a"] == Subscription(name="a", sources=frozenset({"accounts"}), echo=True)
    assert read["b_*"] == Subscription(name="b_*", via="channel")
    assert list(read_subscriptions([blinker.signal("c")])) == ["c"]


WRONG_SUBSCRIPTIONS = [
    ({"a": {"group": "x"}}, r"EVENTBUS_SUBSCRIBE\['a'\]\['group'\] is 'x'. The group is the"),
    ({"a": {"group": None, "retries": 3}}, "has both 'group': None and 'retries'"),
    ({"a": {"retries": "no"}}, r"\['retries'\]. is 'no'. Set it to a whole number"),
    ({"a": {"start": "now"}}, r"\['start'\] is 'now'. Set it to 'new', 'earliest', the id"),
    ({"a": {"from": []}}, r"\['from'\] is \[\]. Set it to a list of service names"),
    ({"a": {"from": 7}}, r"\['from'\] is 7"),
    ({"a": {"from": ["a b"]}}, r"\['from'\] is \['a b'\]"),
    ({"a": {"eco": True}}, "has no option 'eco'. Did you mean 'echo'"),
    ({"a": "pigeon"}, "asks for via 'pigeon'"),
    (["a b"], "cannot be a signal's name"),
    (7, "EVENTBUS_SUBSCRIBE is 7"),
]


@pytest.mark.parametrize(("value", "words"), WRONG_SUBSCRIPTIONS)
def test_the_error_for_an_invalid_subscription_names_the_remedy(value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_subscriptions(value)


@pytest.mark.parametrize(
    "options",
    [{"retries": 3}, {"start": "earliest"}, {"group": None}],
    ids=str,
)
def test_a_stream_option_with_via_channel_is_refused(options: dict[str, Any]) -> None:
    subscribe: Any = {"tick": {"via": "channel", **options}}

    with pytest.raises(ConfigError, match="belongs to streams, and this subscription has 'via'"):
        Bus("memory://", service="x", subscribe=subscribe)
    with pytest.raises(ConfigError, match="Remove 'via', or remove the option"):
        Bus("memory://", service="x").on("tick", via="channel", **options)


def test_retries_without_a_group_are_refused_in_code_as_in_settings() -> None:
    with pytest.raises(ConfigError, match="has both 'group': None and 'retries'"):
        Bus("memory://", service="x").on("tick", group=None, retries=3)


SERVICE_LINKS = {
    "EVENTBUS_PORT": "tcp://10.96.0.7:6379",
    "EVENTBUS_PORT_6379_TCP": "tcp://10.96.0.7:6379",
    "EVENTBUS_PORT_6379_TCP_ADDR": "10.96.0.7",
    "EVENTBUS_PORT_6379_TCP_PORT": "6379",
    "EVENTBUS_PORT_6379_TCP_PROTO": "tcp",
    "EVENTBUS_SERVICE_HOST": "10.96.0.7",
    "EVENTBUS_SERVICE_PORT": "6379",
    "EVENTBUS_SERVICE_PORT_REDIS": "6379",
    "EVENTBUS_REDIS_PORT": "tcp://10.96.0.8:6379",
    "EVENTBUS_REDIS_SERVICE_HOST": "10.96.0.8",
}


def test_service_link_variables_of_kubernetes_are_ignored() -> None:
    environ = {"EVENTBUS_SERVICE": "accounts", **SERVICE_LINKS}

    assert Config.from_environ(environ) == Config(service="accounts")
    assert Config.from_mapping(environ) == Config(service="accounts")


def test_a_port_variable_that_is_not_a_service_link_is_an_unknown_key() -> None:
    with pytest.raises(ConfigError, match="EVENTBUS_PORT"):
        Config.from_mapping({"EVENTBUS_SERVICE": "accounts", "EVENTBUS_PORT": 6379})
