"""What the demo asks of its services, over HTTP and in the files they write."""

from __future__ import annotations

import http.client
import json
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from _demo_options import Options
from _demo_programs import MAILERS, WORKERS
from _demo_screen import in_milliseconds

#: How long one request may take, in seconds.
TIMEOUT = 10.0

#: What a worker says once it hears.
READS = "Reading the streams of"

#: The product whose price changes.
SKU = "A1"

#: What tells that something is not there yet: nobody listens, or a table is not made.
NOT_YET = (OSError, http.client.HTTPException, sqlite3.OperationalError)


@dataclass(frozen=True, slots=True)
class Seen:
    """Something that has come to pass."""

    #: When, in seconds since the epoch: as written down by who did it, else as found here.
    at: float
    more: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back for a request. Times are seconds since the epoch."""

    status: int
    body: dict[str, Any]
    sent: float
    received: float


class Services:
    """The running services. What a method looks for and does not find yet is ``None``."""

    def __init__(self, options: Options) -> None:
        self._options = options
        #: When each worker of catalog was first seen to serve the new price, by process id.
        self._served: dict[int, float] = {}

    def request(self, service: str, line: str, body: object = None) -> Answer:
        """Send a request, like "GET /health", over a connection of its own."""
        sent = time.time()

        with closing(self._connected(service)) as connection:
            return _answer(connection, line, body, sent=sent)

    def mailer_ready(self) -> Seen | None:
        """It has its book, and the SMTP server takes mails."""
        return self.healthy("mailer") and self._takes_mails()

    def mailers_ready(self) -> Seen | None:
        """Its workers hear of users."""
        logs = [self._options.log(name).read_text(encoding="utf-8") for name in MAILERS]
        return Seen(time.time()) if all(READS in log for log in logs) else None

    def healthy(self, service: str) -> Seen | None:
        """Connected to Redis; accounts, which hears nothing, is ready to publish."""
        answer = self.request(service, "GET /health")
        ready = answer.body.get("connected", answer.body.get("publishing"))
        return Seen(answer.received) if answer.status == 200 and ready else None

    def mail_came(self, email: str) -> Seen | None:
        """The SMTP server has a mail for the address."""
        found = (mail for mail in _lines(self._mails) if email in mail["to"])
        return next((Seen(_seconds(mail["received"])) for mail in found), None)

    def mailed_once(self, emails: Collection[str]) -> Seen | None:
        """The SMTP server has one mail for each address, and mailer has no event left to handle."""
        wanted = set(emails)
        mails = [mail for mail in _lines(self._mails) if wanted.intersection(mail["to"])]
        counts = Counter(address for mail in mails for address in mail["to"])

        if counts != Counter(wanted) or not self._is_settled("mailer"):
            return None

        return Seen(max(_seconds(mail["received"]) for mail in mails))

    def mails_by_worker(self) -> Counter[int]:
        """How many mails each process of mailer has noted in its book, by its id."""
        query = "SELECT worker, count(*) FROM mail GROUP BY worker"
        rows = _rows(self._options.folder / "book.db", query)
        return Counter({int(name.rpartition("-")[2]): count for name, count in rows})

    def is_reader(self, email: str) -> Seen | None:
        """The plug-in has put the address on its list."""
        query = "SELECT 1 FROM reader WHERE email = ?"
        found = _rows(self._options.folder / "newsletter.db", query, email)
        return Seen(time.time()) if found else None

    def audit_hears(self) -> Seen | None:
        """The script is on the channels, and has found the stream."""
        seen = next((_written(line) for line in self._audit() if line["what"] == "connected"), None)
        return seen if seen and self._is_settled("audit") else None

    def audited(self, name: str, via: str) -> Seen | None:
        """The script has written the event of that name, which came that way."""
        events = (line for line in self._audit() if line["what"] == "event")
        found = (line for line in events if (line["name"], line["via"]) == (name, via))
        return next((_written(line) for line in found), None)

    def counted(self, service: str) -> Seen | None:
        """Analytics has counted a call of the service."""
        answer = self.request("analytics", "GET /counts.json")
        totals = {counts["name"]: counts["total"] for counts in answer.body.get("services", [])}
        return Seen(answer.received) if totals.get(service) else None

    def caching_workers(self) -> list[int]:
        """The workers of catalog that serve a price from their caches, by process id."""
        answers = self._ask_each_worker()
        return sorted({answer.body["worker"] for answer in answers if answer.body.get("cached")})

    def serve(self, workers: Sequence[int], price: str) -> Seen | None:
        """Each of the workers serves the price; when the last of them began to."""
        for answer in self._ask_each_worker():
            if answer.body.get("price") == price:
                self._served.setdefault(answer.body["worker"], answer.received)

        all_do = set(workers) <= set(self._served)
        return Seen(max(self._served.values())) if all_do else None

    def _ask_each_worker(self) -> list[Answer]:
        """A worker takes one connection at a time, so that as many open ones reach them all."""
        connections = [self._connected("catalog") for _ in range(WORKERS)]

        try:
            return [_answer(connection, f"GET /products/{SKU}") for connection in connections]
        finally:
            for connection in connections:
                connection.close()

    def _is_settled(self, service: str) -> bool:
        """Whether a service has no event of a stream before it, in hand or to be tried again."""
        command = [sys.executable, "-m", "flask_eventbus", "--url", self._options.url]
        words = ["--service", service, "status", "--json"]
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=TIMEOUT)
        streams = json.loads(done.stdout)["streams"] if done.returncode == 0 else []
        groups = [group for stream in streams for group in stream["groups"] if group["exists"]]
        counts = ("lag", "pending", "retries", "dead")
        return bool(groups) and not any(group[count] for group in groups for count in counts)

    @property
    def _mails(self) -> Path:
        return self._options.folder / "mails.jsonl"

    def _takes_mails(self) -> Seen | None:
        address = ("127.0.0.1", self._options.port("smtp"))

        with socket.create_connection(address, TIMEOUT) as connection:
            return Seen(time.time()) if connection.recv(3) == b"220" else None

    def _audit(self) -> Iterator[dict[str, Any]]:
        return _lines(self._options.folder / "audit.jsonl")

    def _connected(self, service: str) -> http.client.HTTPConnection:
        # Not urllib, which would ask a proxy that the environment names.
        port = self._options.port(service)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        connection.connect()
        return connection


def _answer(
    connection: http.client.HTTPConnection, line: str, body: object = None, *, sent: float = 0.0
) -> Answer:
    method, path = line.split()
    connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    received = time.time()
    return Answer(status=response.status, body=_object(text), sent=sent, received=received)


def _object(text: bytes) -> dict[str, Any]:
    """The JSON object of an answer, or what stands in its place."""
    try:
        body = json.loads(text)
    except ValueError:
        body = None

    return body if isinstance(body, dict) else {"error": text.decode(errors="replace")[:200]}


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one in each line, less one that is being written."""
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def _rows(file: Path, query: str, *values: str) -> list[Any]:
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
        return database.execute(query, values).fetchall()


def _written(line: dict[str, Any]) -> Seen:
    """When audit wrote a line, and if it is an event's, how long that was on its way."""
    at = _seconds(line["written"])
    took = (
        f", {in_milliseconds(at - _seconds(line['time']))} after send()" if "time" in line else ""
    )
    return Seen(at, took)


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
