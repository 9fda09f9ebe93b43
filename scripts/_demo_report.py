"""Tries the demo's services out, and shows who reacted to what, and how fast."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from _demo_options import Options, read_options, shown
from _demo_programs import MAILERS, WORKERS
from _demo_screen import Screen, in_milliseconds
from _demo_services import NOT_YET, SKU, Seen, Services
from _environment import ROOT

EMAIL = "ada@example.com"
PRICE = "9.99"

#: Who registers while a worker of mailer is killed.
MANY = tuple(f"user{number}@example.com" for number in range(1, 31))

#: How many of their mails a worker sends before it is killed.
SOME = 3

#: Where a service's processes log, if there is more than one.
LOGS = {"mailer": ("mailer", *MAILERS)}

#: How often to look whether a service is ready, and whether it has reacted, in seconds.
LOOK_READY = 0.05
LOOK_REACTED = 0.001


@dataclass(frozen=True, slots=True)
class Step:
    """Something that a service is expected to do, and how to see that it was done."""

    service: str
    words: str
    look: Callable[[], Seen | None]


class Report:
    """One screen: the services, a user, a price, a worker that is killed, what to try."""

    def __init__(self, options: Options, screen: Screen) -> None:
        self._options = options
        self._screen = screen
        self._services = Services(options)
        #: Those of catalog, by process id.
        self._workers: list[int] = []
        #: The services that did not do what was expected.
        self._missing: list[str] = []

    def run(self) -> int:
        """The exit code."""
        self._screen.title(f"Five services, and {self._options.url} as their Redis")
        self._await_services()

        if not self._missing:
            self._register()
            self._change_price()

        if not self._missing:
            self._kill_a_worker()

        if self._missing:
            self._show_logs()
            return 1

        self._end_or_stay()
        return 0

    def _await_services(self) -> None:
        deadline = time.monotonic() + self._options.patience

        for step in self._readiness():
            self._await([step], deadline, LOOK_READY)

    def _readiness(self) -> list[Step]:
        services, smtp = self._services, self._options.port("smtp")
        accounts, analytics = (partial(services.healthy, who) for who in ("accounts", "analytics"))
        return [
            self._serving("accounts", "registers users", accounts),
            self._serving("mailer", f"welcomes them by SMTP to :{smtp}", services.mailer_ready),
            Step("mailer", f"has {len(MAILERS)} workers that do it", services.mailers_ready),
            self._serving("catalog", f"has {WORKERS} workers that cache prices", self._cached),
            self._serving("analytics", "counts all API calls", analytics),
            Step("audit", "a script without Flask, writes all events", services.audit_hears),
        ]

    def _serving(self, service: str, words: str, look: Callable[[], Seen | None]) -> Step:
        return Step(service, f":{self._options.port(service)} {words}", look)

    def _cached(self) -> Seen | None:
        self._workers = self._services.caching_workers()
        return Seen(time.time()) if len(self._workers) == WORKERS else None

    def _register(self) -> None:
        services = self._services
        self._request(
            "accounts",
            "POST /register",
            {"email": EMAIL, "name": "Ada"},
            Step("mailer", "mail is at the SMTP server", partial(services.mail_came, EMAIL)),
            Step("mailer", "plug-in put her on its list", partial(services.is_reader, EMAIL)),
            Step("analytics", "counted the API call", partial(services.counted, "accounts")),
            self._audited("user_registered", "stream"),
        )

    def _change_price(self) -> None:
        services = self._services
        workers = " and ".join(str(worker) for worker in self._workers)
        serve = partial(services.serve, self._workers, PRICE)
        self._request(
            "catalog",
            f"PUT /products/{SKU}/price",
            {"price": PRICE},
            Step("catalog", f"workers {workers} serve the new price", serve),
            self._audited("price_changed", "channel"),
        )

    def _audited(self, name: str, via: str) -> Step:
        words = f"wrote {name}, by {via}"
        return Step("audit", words, partial(self._services.audited, name, via))

    def _kill_a_worker(self) -> None:
        """Let users register, kill a worker at their mails, and wait for those."""
        self._screen.line()
        self._screen.title(f"{len(MANY)} users register; at their mails, kill -9 ends a worker")
        begin, deadline = time.time(), time.monotonic() + self._options.patience
        before = self._services.mails_by_worker()

        with ThreadPoolExecutor(1) as pool:
            registering = pool.submit(self._register_all)
            killed = self._kill_at_work(before, deadline)
            registering.result()

        if killed is None:
            self._miss("mailer", f"no worker sent {SOME} mails within {self._options.patience:g} s")
            return

        self._screen.done("mailer", f"worker {killed} is gone, in the middle of a mail")
        once = partial(self._services.mailed_once, MANY)
        step = Step("mailer", f"{len(MANY)} users have one mail each, and no event is left", once)
        self._await([step], deadline, LOOK_READY, sent=begin)
        sent = (self._services.mails_by_worker() - before).most_common()
        shares = " and ".join(f"{worker} sent {count}" for worker, count in sent)
        self._screen.line(f"               {shares} of them")

    def _kill_at_work(self, before: Counter[int], deadline: float) -> int | None:
        """Kill a worker that has just noted a mail: it is at the next by now; its process id."""
        while time.monotonic() < deadline:
            for worker, count in (self._services.mails_by_worker() - before).items():
                if count >= SOME:
                    os.kill(worker, signal.SIGKILL)
                    return worker

            time.sleep(LOOK_REACTED)

        return None

    def _register_all(self) -> None:
        for email in MANY:
            self._services.request("accounts", "POST /register", {"email": email, "name": "User"})

    def _request(self, service: str, what: str, body: object, *reactions: Step) -> None:
        """Send a request, and wait for what comes of it."""
        self._screen.line()

        try:
            answer = self._services.request(service, what, body)
        except NOT_YET as error:
            self._miss(service, f"did not answer {what}: {error}")
            return

        took = in_milliseconds(answer.received - answer.sent)
        self._screen.title(f"{what} {json.dumps(body)}", f"{answer.status} after {took}")

        if answer.status >= 400:
            self._miss(service, f"says: {answer.body.get('error')}")
            return

        deadline = time.monotonic() + self._options.patience
        self._await(reactions, deadline, LOOK_REACTED, sent=answer.sent)

    def _await(
        self, steps: Sequence[Step], deadline: float, pause: float, sent: float | None = None
    ) -> None:
        """Wait until each step is done, then tick them off, the first one first."""
        seen = [(step, _look(step)) for step in steps]

        while any(found is None for _, found in seen) and time.monotonic() < deadline:
            time.sleep(pause)
            seen = [(step, found or _look(step)) for step, found in seen]

        for step, found in sorted(seen, key=_moment):
            if found is None:
                self._miss(step.service, f"not within {self._options.patience:g} s: {step.words}")
            else:
                after = in_milliseconds(found.at - sent) if sent else ""
                self._screen.done(step.service, step.words + found.more, after)

    def _miss(self, service: str, words: str) -> None:
        self._screen.failed(service, words)
        self._missing.append(service)

    def _show_logs(self) -> None:
        for service in dict.fromkeys(self._missing):
            for name in LOGS.get(service, [service]):
                log = self._options.log(name)
                self._screen.line(f"The end of {shown(log)}:")
                self._screen.end_of(log)

    def _end_or_stay(self) -> None:
        self._screen.line()

        if self._options.once:
            self._screen.line("Everything reacted.")
        else:
            self._show_what_to_try()
            # Until all programs are told to end.
            signal.pause()

    def _show_what_to_try(self) -> None:
        options = self._options
        accounts, catalog = options.address("accounts"), options.address("catalog")
        price = json.dumps({"price": "8.50"})
        python = shown(ROOT / ".venv" / "bin" / "python")
        self._screen.title("Try it; Ctrl-C ends everything")
        self._screen.line(f"  curl {accounts}/register -d email=bob@example.com -d name=Bob")
        self._screen.line(f"  curl -X PUT {catalog}/products/B2/price --json '{price}'")
        self._screen.line(f"  {python} -m flask_eventbus --url {options.url} tail")
        self._screen.line(f"  {python} -m flask_eventbus --url {options.url} status")
        self._screen.line(f"  http://{options.address('analytics')}/ shows the calls, live")
        self._screen.line(f"Logs, mails and databases are in {shown(options.folder)}")


def _look(step: Step) -> Seen | None:
    try:
        return step.look()
    except NOT_YET:
        return None


def _moment(step: tuple[Step, Seen | None]) -> float:
    return step[1].at if step[1] else math.inf


if __name__ == "__main__":
    sys.exit(Report(read_options(None), Screen.from_settings(os.environ)).run())
