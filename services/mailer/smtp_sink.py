"""An SMTP server that takes every mail and delivers none: for trying the mailer out.

python smtp_sink.py --port 1025 --file mails.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from datetime import UTC, datetime
from email import message_from_bytes, policy
from pathlib import Path

from aiosmtpd.smtp import SMTP, Envelope, Session


class Sink:
    """Prints each mail as a line of JSON, and appends it to a file if one is given.

    :param pause: seconds that it takes for a recipient, as servers do that look one up.
    """

    def __init__(self, file: Path | None, pause: float) -> None:
        self._file = file
        self._pause = pause

    async def handle_RCPT(  # noqa: N802 - aiosmtpd's name
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        await asyncio.sleep(self._pause)
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd's name
        line = json.dumps(as_json(envelope), ensure_ascii=False)
        print(line, flush=True)

        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")

        return "250 OK"


def as_json(envelope: Envelope) -> dict[str, object]:
    """A mail as its reader sees it: when it came, headers and text decoded."""
    mail = message_from_bytes(envelope.original_content or b"", policy=policy.default)
    body = mail.get_body(("plain", "html"))
    return {
        "received": datetime.now(UTC).isoformat(),
        "from": envelope.mail_from,
        "to": envelope.rcpt_tos,
        "subject": mail["Subject"],
        "message_id": mail["Message-ID"],
        "text": body.get_content() if body else None,
    }


async def serve(host: str, port: int, sink: Sink) -> None:
    """Take mails until SIGTERM or Ctrl-C."""
    told = asyncio.Event()
    loop = asyncio.get_running_loop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)

    server = await loop.create_server(lambda: SMTP(sink, hostname="sink", loop=loop), host, port)
    print("Taking mails at {}:{}.".format(*server.sockets[0].getsockname()), flush=True)
    await told.wait()
    server.close()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=1025, help="0 takes a free one")
    parser.add_argument("--file", type=Path, help="append each mail to it, a line of JSON")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds for each recipient")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    asyncio.run(serve(given.host, given.port, Sink(given.file, given.pause)))
