"""A webhook's receiver and a mail server on this machine, which can be told to be away."""

from __future__ import annotations

import json
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class WebhookServer:
    """Keeps what is POSTed to it. answer: the status that it gives; with another than 200 it keeps nothing.

    breaks_off: whether it promises a body and closes the connection without one.
    """

    def __init__(self) -> None:
        self.answer = 200
        self.breaks_off = False
        self.bodies: list[dict[str, Any]] = []
        self.tokens: list[str] = []
        self.tries = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.tries += 1
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if outer.answer == 200:
                    outer.bodies.append(body)
                    outer.tokens.append(self.headers.get("Authorization", ""))
                self.send_response(outer.answer)
                if outer.answer == 302:
                    self.send_header("Location", "/elsewhere")
                if outer.breaks_off:
                    self.send_header("Transfer-Encoding", "chunked")
                else:
                    self.send_header("Content-Length", "0")
                self.end_headers()
                self.close_connection |= outer.breaks_off

            def do_GET(self) -> None:
                raise AssertionError("a redirect was followed")

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/hook"

    def told(self) -> list[tuple[str, str, str]]:
        """Return name, status and job of every alert of every message, in their order."""
        return [
            (alert["labels"]["alertname"], alert["status"], alert["labels"].get("job", ""))
            for body in self.bodies
            for alert in body["alerts"]
        ]

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def webhook_server() -> Iterator[WebhookServer]:
    """Yield a receiver that listens."""
    server = WebhookServer()
    try:
        yield server
    finally:
        server.close()


class MailServer(socketserver.ThreadingTCPServer):
    """Speaks as much SMTP as a client needs that insists on STARTTLS and a login. Keeps what it takes.

    secure: what was said before each mail: whether TLS was on, and the login's base64.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, folder: Path, *, offers_tls: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _MailHandler)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(folder / "server.pem", folder / "server.key")
        self.offers_tls = offers_tls
        self.goodbye = "221 bye"
        self.mails: list[str] = []
        self.recipients: list[str] = []
        self.secure: list[tuple[bool, str]] = []

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])


class _MailHandler(socketserver.BaseRequestHandler):
    server: MailServer

    def handle(self) -> None:
        connection, secure, login, recipients = self.request, False, "", []
        connection.settimeout(10)
        file = connection.makefile("rwb")

        def say(text: str) -> None:
            file.write(text.encode() + b"\r\n")
            file.flush()

        say("220 mail.test")
        while line := file.readline().decode().strip():
            word = line.split(" ")[0].upper()
            if word == "EHLO":
                offered = ["AUTH PLAIN"] if secure else ["STARTTLS"] if self.server.offers_tls else []
                for extension in ["mail.test", *offered]:
                    say(f"250-{extension}")
                say("250 HELP")
            elif word == "STARTTLS":
                say("220 go ahead")
                file.close()
                connection = self.server.context.wrap_socket(connection, server_side=True)
                file, secure = connection.makefile("rwb"), True
            elif word == "AUTH":
                login = line.rpartition(" ")[2]
                say("235 welcome")
            elif word == "RCPT":
                recipients.append(line.partition(":")[2])
                say("250 ok")
            elif word == "DATA":
                say("354 go on")
                lines = []
                while (text := file.readline().decode()) != ".\r\n":
                    lines.append(text)
                self.server.mails.append("".join(lines))
                self.server.recipients += recipients
                self.server.secure.append((secure, login))
                say("250 taken")
            elif word == "QUIT":
                say(self.server.goodbye)
                return
            else:
                say("250 ok")


@contextmanager
def mail_server(folder: Path, *, offers_tls: bool = True) -> Iterator[MailServer]:
    """Yield a mail server with the certificate `server` of a folder."""
    with MailServer(folder, offers_tls=offers_tls) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
