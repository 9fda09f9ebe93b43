"""No password of a URL is shown, wherever it stands and however it is written."""

from __future__ import annotations

import traceback

import pytest

from flask_eventbus import ConfigError
from flask_eventbus.transport.connections import Connections

SECRET = "s3cr3t"  # noqa: S105 - of no server

SHOWN = {
    f"redis://ada:{SECRET}@host:6379/0": "redis://ada:***@host:6379/0",
    f"redis://:{SECRET}@host/0": "redis://:***@host/0",
    f"redis://host/0?password={SECRET}": "redis://host/0",
    f"redis://host/0?pass%77ord={SECRET}": "redis://host/0",
    f"rediss://host/0?ssl_keyfile=k&ssl_password={SECRET}": "rediss://host/0",
    f"unix:///run/redis.sock?password={SECRET}": "unix:///run/redis.sock",
    f"redis+sentinel://ada:{SECRET}@one:26379,two/m/0": "redis+sentinel://ada:***@one:26379,two/m/0",
    # Not quoted: where the password ends cannot be known.
    f"redis://host/0?password={SECRET}@1": "redis://***",
}


@pytest.mark.parametrize(("url", "shown"), SHOWN.items())
def test_a_url_is_shown_without_its_password_and_options(url: str, shown: str) -> None:
    assert Connections(url, name="tests").shown == shown


@pytest.mark.parametrize("end", ["/x", "?x", "#x", "/x@y"])
@pytest.mark.parametrize("start", ["", "1234", "x/", "x?y="])
def test_an_error_about_a_url_shows_no_part_of_an_unquoted_password(start: str, end: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Connections(f"redis://ada:{start}{SECRET}{end}@host:port/0", name="tests")

    said = "".join(traceback.format_exception(caught.value))
    assert SECRET not in said.replace(__file__, "")
    assert "redis://***" in str(caught.value)
