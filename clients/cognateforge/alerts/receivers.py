"""How a message leaves: by webhook or by e-mail. Sending blocks, so it is for a thread."""

from __future__ import annotations

import contextlib
import http.client
import json
import smtplib
import ssl
import urllib.error
import urllib.request
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from typing import Any, Protocol

from cognateforge.alerts.message import Message
from cognateforge.alerts.settings import MailSettings, WebhookSettings
from cognateforge.exceptions import ForgeError


class SendError(Exception):
    """A receiver did not take a message. The text holds neither addresses nor secrets of the settings."""


class Receiver(Protocol):
    """Somebody who is told."""

    @property
    def name(self) -> str:
        """Its name in the settings."""

    @property
    def min_severity(self) -> str:
        """The least severity that it is told."""

    def send(self, message: Message) -> None:
        """Deliver. Errors: SendError."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST becomes a GET without its body, and a token would go to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow nothing."""


class Webhook:
    """POSTs Alertmanager's payload. Any answer but 2xx is a failure."""

    def __init__(self, settings: WebhookSettings) -> None:
        self._settings = settings
        self.name, self.min_severity = settings.name, settings.min_severity

    def send(self, message: Message) -> None:
        """Deliver. Errors: SendError."""
        settings = self._settings
        try:
            headers = {"Content-Type": "application/json", "User-Agent": "cognateforge-notify"}
            if settings.token:
                headers["Authorization"] = f"Bearer {settings.token.read()}"
            body = json.dumps(message.payload()).encode()
            request = urllib.request.Request(settings.address(), data=body, headers=headers)  # noqa: S310 - checked
            https = urllib.request.HTTPSHandler(context=_context(settings.ca_file))
            # The status is the answer: what comes behind it is not waited for, nor can it break what was taken.
            urllib.request.build_opener(_NoRedirect, https).open(request, timeout=settings.timeout_s).close()
        except urllib.error.HTTPError as error:
            raise SendError(f"HTTP status {error.code}") from None
        except ForgeError as error:
            raise SendError(error.message) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise SendError(_told(error)) from None


class Mail:
    """Sends an e-mail to all addresses of a receiver at once."""

    def __init__(self, settings: MailSettings) -> None:
        self._settings = settings
        self.name, self.min_severity = settings.name, settings.min_severity

    def send(self, message: Message) -> None:
        """Deliver. Errors: SendError. Addresses that the server refuses do not keep it from the others."""
        settings = self._settings
        try:
            password = settings.password.read()
            server = self._connected()
            try:
                if settings.username:
                    server.login(settings.username, password)
                server.send_message(_mail(message, settings))
                # Taken by now: how the goodbye goes makes no second mail.
                with contextlib.suppress(smtplib.SMTPException, OSError):
                    server.quit()
            finally:
                server.close()
        except ForgeError as error:
            raise SendError(error.message) from None
        except (smtplib.SMTPException, OSError, ValueError) as error:
            raise SendError(_told(error)) from None

    def _connected(self) -> smtplib.SMTP:
        settings = self._settings
        if settings.security == "tls":
            context = _context(settings.ca_file)
            return smtplib.SMTP_SSL(settings.host, settings.port, timeout=settings.timeout_s, context=context)
        server = smtplib.SMTP(settings.host, settings.port, timeout=settings.timeout_s)
        try:
            if settings.security == "starttls":
                server.starttls(context=_context(settings.ca_file))
        except BaseException:
            server.close()
            raise
        return server


def _mail(message: Message, settings: MailSettings) -> EmailMessage:
    mail = EmailMessage()
    mail["From"], mail["To"] = settings.from_address, ", ".join(settings.to)
    mail["Subject"] = message.subject()
    mail["Date"] = format_datetime(max(record.ended or record.seen for record in message.records))
    mail["Message-ID"] = make_msgid(domain=settings.from_address.rpartition("@")[2])
    mail["Auto-Submitted"] = "auto-generated"
    if message.critical:
        mail["Importance"] = "high"
    mail.set_content(message.text())
    return mail


def _context(ca_file: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca_file or None)


def _told(error: Exception) -> str:
    """Return an error's kind and, where it is known to hold nothing else, its number or reason."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, smtplib.SMTPResponseException):
        return f"{type(reason).__name__}, code {reason.smtp_code}"
    if isinstance(reason, OSError) and reason.strerror:
        return f"{type(reason).__name__}: {reason.strerror}"
    return type(reason).__name__
