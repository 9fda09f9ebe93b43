"""Streams as the bus keeps them, filled by hand: events, groups, retries and dead letters."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from click.testing import CliRunner, Result
from servers import RedisServer

from flask_eventbus.__main__ import main
from flask_eventbus.codec.codec import Codec
from flask_eventbus.codec.records import DeadLetter, RetryRecord
from flask_eventbus.event import Event
from flask_eventbus.transport.keys import StreamKeys

NODE = "3f2a9c1b2d3e"

_prefixes = itertools.count()


class StreamStore:
    """The streams of one prefix on a real server."""

    def __init__(self, server: RedisServer, prefix: str = "") -> None:
        self.url = server.url
        self.prefix = prefix or f"streams-{os.getpid()}-{next(_prefixes)}"
        #: What redis-py says of its answers helps no test.
        self.client: Any = server.client
        self.keys = StreamKeys(self.prefix)
        self._numbers = itertools.count(1)

    def run(self, *words: str, service: str | None = "mailer", **options: Any) -> Result:
        """Run a command without an app."""
        name = ["--service", service] if service else []
        settings = ["--url", self.url, "--prefix", self.prefix, *name]
        return CliRunner().invoke(main, [*settings, *words], **options)

    def event(self, name: str, *, source: str = "accounts", **payload: Any) -> Event:
        """An event that was never sent."""
        return Event(
            name=name,
            source=source,
            id=f"{NODE}-{next(self._numbers)}",
            time=datetime.now(UTC),
            payload=payload,
        )

    def add(
        self, name: str, *, id: str = "*", source: str = "accounts", **payload: Any
    ) -> tuple[str, Event]:
        """Add an event to a stream; the id of its entry, and the event."""
        event = self.event(name, source=source, **payload)
        return self.add_fields(name, {b"event": Codec().encode(event)}, id=id), event

    def add_together(self, name: str, *payloads: Mapping[str, Any]) -> list[str]:
        """Add events in one transaction; the ids of their entries.

        A worker reads all of them before it looks whether its receivers are slow, however slow the
        machine is.
        """
        self.client.sadd(self.keys.names, name)

        with self.client.pipeline(transaction=True) as together:
            for payload in payloads:
                body = Codec().encode(self.event(name, **payload))
                together.xadd(self.keys.stream(name), {b"event": body})

            return [entry.decode() for entry in together.execute()]

    def add_fields(self, name: str, fields: Mapping[bytes, bytes], *, id: str = "*") -> str:
        """Add an entry with any fields."""
        self.client.sadd(self.keys.names, name)
        entry = self.client.xadd(self.keys.stream(name), dict(fields), id=id)
        return str(entry.decode())

    def group(self, name: str, service: str = "mailer", start: str = "0") -> None:
        """Make a group."""
        self.client.xgroup_create(self.keys.stream(name), service, start, mkstream=True)

    def read(
        self, name: str, count: int, service: str = "mailer", consumer: str = f"web-1-4711-{NODE}"
    ) -> list[str]:
        """Let a consumer get some events, and return the ids of their entries."""
        found = self.client.xreadgroup(
            service, consumer, {self.keys.stream(name): ">"}, count=count
        )
        return [entry.decode() for _, entries in found for entry, _ in entries]

    def give_up(
        self, name: str, *, service: str = "mailer", id: str = "*", **facts: Any
    ) -> tuple[str, DeadLetter]:
        """Add a dead letter; its id, and what it says."""
        entry, event = facts.pop("entry", "1763848800000-0"), self.event(name, user_id=7)
        now = int(time.time() * 1000)
        known: dict[str, Any] = {
            "reason": "retries",
            "entry": entry,
            "fields": {b"event": Codec().encode(event)},
            "event_id": event.id,
            "source": event.source,
            "payload": json.dumps(dict(event.payload)),
            "receiver": "mailer.receivers.send_welcome",
            "error": "SMTPServerDisconnected: Connection unexpectedly closed",
            "traceback": 'Traceback:\n  File "receivers.py", line 3\n',
            "attempts": 6,
            "first": now - 60_000,
            "last": now,
        }
        letter = DeadLetter(**{**known, **facts})
        found = self.client.execute_command(
            "XADD", self.keys.dead(name, service), id, *letter.as_fields()
        )
        self.client.sadd(self.keys.names, name)
        return found.decode(), letter

    def give_up_unread(self, name: str, **facts: Any) -> str:
        """Add a dead letter of an entry that does not read as an event; its id."""
        nothing = {"event_id": "", "source": "", "payload": "", "receiver": "", "traceback": ""}
        found, _ = self.give_up(
            name,
            **{
                **nothing,
                "reason": "undecodable",
                "fields": {b"event": b"\xff\x00junk", b"reason": b"hi"},
                "error": "DecodeError: It is not msgpack",
                "attempts": 0,
                "first": 0,
                "last": 0,
                **facts,
            },
        )
        return found

    def dead(self, name: str, service: str = "mailer") -> list[str]:
        """The ids of the dead letters of a signal."""
        found = self.client.xrange(self.keys.dead(name, service))
        return [entry.decode() for entry, _ in found]

    def retries(self, name: str, service: str = "mailer") -> list[tuple[RetryRecord, float]]:
        """Return the retries, each with its due time."""
        found = self.client.zrange(self.keys.retry(name, service), 0, -1, withscores=True)
        return [(RetryRecord.unpacked(member), due) for member, due in found]

    def wait_for_retry(self, record: RetryRecord, name: str, service: str = "mailer") -> None:
        """Add something that is to be tried again."""
        self.client.zadd(self.keys.retry(name, service), {record.packed(): time.time() * 1000})

    def position(self, name: str, service: str = "mailer") -> str:
        """Return the last delivered id of a group."""
        groups = self.client.xinfo_groups(self.keys.stream(name))
        found = {group["name"].decode(): group["last-delivered-id"].decode() for group in groups}
        return str(found[service])
