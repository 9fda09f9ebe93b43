"""Tests of the reader: it returns all messages that arrived, also if the connection breaks."""

from __future__ import annotations

import pytest
import redis
from servers import RedisServer

from flask_eventbus.channels.reader import ChannelReader
from flask_eventbus.transport.connections import Connections


def test_messages_that_arrived_before_the_connection_was_lost_are_read(
    redis_server: RedisServer,
) -> None:
    reader = ChannelReader(Connections(redis_server.url, name="tests"))
    reader.connect()
    reader.subscribe(["news"], patterns=False)
    kinds = [frame.kind for frame in reader.read()]

    with redis_server.client as client:
        for number in range(3):
            client.publish("news", number)

        client.client_kill_filter(_type="pubsub")

    kinds += [frame.kind for frame in reader.read()]

    assert kinds == ["subscribe", "message", "message", "message"]

    with pytest.raises(redis.ConnectionError):
        reader.read()

    reader.close()
