"""What `forge notify` is told: whom to tell, how often, and where it keeps what it has told."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints
from urllib.parse import urlsplit

from cognateforge.alerts.conditions import Limits
from cognateforge.alerts.model import Severity
from cognateforge.exceptions import ClientSetupError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Secret:
    """Where a secret is: in an environment variable or a file, and never in the settings. Read when it is used."""

    env: str = ""
    file: str = ""

    def read(self) -> str:
        """Return it, "" where there is none. Errors: ClientSetupError, where it is not there."""
        if self.env:
            if self.env not in os.environ:
                raise ClientSetupError(f"the environment variable {self.env} is not set")
            return os.environ[self.env].strip()
        try:
            return Path(self.file).read_text(encoding="utf-8").strip() if self.file else ""
        except (OSError, UnicodeDecodeError) as error:
            raise ClientSetupError(f"the secret's file {self.file} cannot be read: {type(error).__name__}") from None

    def __bool__(self) -> bool:
        return bool(self.env or self.file)


@dataclass(frozen=True, kw_only=True)
class WebhookSettings:
    """A receiver of Alertmanager's webhooks.

    url: or url_env, or url_file, where the address itself is a secret. token_env, token_file: a bearer token.
    """

    name: str
    url: str = ""
    url_env: str = ""
    url_file: str = ""
    token_env: str = ""
    token_file: str = ""
    ca_file: str = ""
    timeout_s: float = 10.0
    min_severity: str = "warning"

    def check(self) -> None:
        """Errors: ClientSetupError, with the key."""
        if sum(map(bool, (self.url, self.url_env, self.url_file))) != 1:
            raise ClientSetupError(f"webhook {self.name!r} needs one of url, url_env and url_file")
        if self.token_env and self.token_file:
            raise ClientSetupError(f"webhook {self.name!r} has token_env and token_file: keep one")
        if self.url:
            self.address()

    def address(self) -> str:
        """Return the URL. Errors: ClientSetupError, where it is none that may be called."""
        url = self.url or Secret(env=self.url_env, file=self.url_file).read()
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ClientSetupError(f"the url of webhook {self.name!r} must begin with http:// or https:// and a host")
        if parts.scheme == "http" and self.token and not is_loopback(parts.hostname):
            raise ClientSetupError(f"webhook {self.name!r} would send its token in plaintext: use https")
        return url

    @property
    def token(self) -> Secret:
        """The bearer token."""
        return Secret(env=self.token_env, file=self.token_file)


@dataclass(frozen=True, kw_only=True)
class MailSettings:
    """Receivers of e-mail over one server.

    security: "starttls", "tls" from the first byte on, or "none", which is for a server on this machine.
    """

    name: str
    host: str
    from_address: str
    to: tuple[str, ...]
    port: int = 587
    security: str = "starttls"
    username: str = ""
    password_env: str = ""
    password_file: str = ""
    ca_file: str = ""
    timeout_s: float = 10.0
    min_severity: str = "warning"

    def check(self) -> None:
        """Errors: ClientSetupError, with the key."""
        if self.security not in ("starttls", "tls", "none"):
            raise ClientSetupError(f"security of mail {self.name!r} must be starttls, tls or none")
        if self.security == "none" and not is_loopback(self.host):
            raise ClientSetupError(f"mail {self.name!r} would go to {self.host} in plaintext: use starttls or tls")
        if not self.to or not all("@" in one and one.isprintable() for one in (*self.to, self.from_address)):
            raise ClientSetupError(f"mail {self.name!r} needs addresses of the form name@host in to and from_address")
        if bool(self.username) != bool(self.password) or (self.password_env and self.password_file):
            raise ClientSetupError(f"mail {self.name!r} needs username with one of password_env and password_file")

    @property
    def password(self) -> Secret:
        """The password."""
        return Secret(env=self.password_env, file=self.password_file)


@dataclass(frozen=True, kw_only=True)
class NotifySettings:
    """All of it.

    interval_s: between two looks. repeat_interval_s: until what goes on is told again. runbook_base_url: stands before
    a runbook's path. link: of a dashboard, for messages.
    """

    interval_s: float = 15.0
    repeat_interval_s: float = 4 * 3600.0
    state_file: Path = Path("var/notify/state.json")
    runbook_base_url: str = ""
    link: str = ""
    limits: Limits = dataclasses.field(default_factory=Limits)
    webhooks: tuple[WebhookSettings, ...] = ()
    mails: tuple[MailSettings, ...] = ()

    def check(self) -> None:
        """Errors: ClientSetupError, with the key and the remedy."""
        receivers: tuple[WebhookSettings | MailSettings, ...] = (*self.webhooks, *self.mails)
        if not receivers:
            raise ClientSetupError("nobody is to be told: give --webhook, or [[webhooks]] or [[mails]] in the settings")
        names = [one.name for one in receivers]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ClientSetupError(f"names of receivers must differ: {', '.join(sorted(twice))}")
        for one in receivers:
            if one.min_severity not in list(Severity):
                raise ClientSetupError(f"min_severity of {one.name!r} must be critical or warning")
            if one.timeout_s <= 0:
                raise ClientSetupError(f"timeout_s of {one.name!r} must be above 0")
            one.check()
        if self.interval_s <= 0 or self.repeat_interval_s <= 0:
            raise ClientSetupError("interval_s and repeat_interval_s must be above 0")


def read_secrets(settings: NotifySettings) -> None:
    """Read every secret once, so that a missing one is told at the start. Errors: ClientSetupError."""
    for webhook in settings.webhooks:
        webhook.address()
        webhook.token.read()
    for mail in settings.mails:
        mail.password.read()


def load(path: Path) -> NotifySettings:
    """Read a TOML file. Errors: ClientSetupError, which names the key."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ClientSetupError(f"{path}: {error}") from error
    try:
        limits = _made(Limits, _table(tables.pop("limits", {}), "limits"), "limits")
        webhooks = tuple(_made(WebhookSettings, one, "webhooks") for one in _tables(tables, "webhooks"))
        mails = tuple(_made(MailSettings, one, "mails") for one in _tables(tables, "mails"))
        plain = _made(NotifySettings, tables, "")
    except ClientSetupError as error:
        raise ClientSetupError(f"{path}: {error.message}") from error
    return dataclasses.replace(plain, limits=limits, webhooks=webhooks, mails=mails)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine for sure."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ClientSetupError(f"{where} must be a table")
    return value


def _tables(tables: dict[str, Any], where: str) -> list[Mapping[str, Any]]:
    value = tables.pop(where, [])
    if not isinstance(value, list):
        raise ClientSetupError(f"{where} must be tables: [[{where}]]")
    return [_table(one, where) for one in value]


def _made(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """Return a dataclass of plain values out of a table."""
    hints = get_type_hints(kind)
    place = f"{where}." if where else ""
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in hints:
            raise ClientSetupError(f"{place}{key} is no setting; there are {', '.join(hints)}")
        values[key] = _plain(hints[key], value, f"{place}{key}")
    required = {field.name for field in dataclasses.fields(kind) if _has_no_default(field)}  # type: ignore[arg-type]
    if missing := required - values.keys():
        raise ClientSetupError(f"{where} lacks {', '.join(sorted(missing))}")
    return kind(**values)


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _plain(kind: Any, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind == tuple[str, ...] and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return tuple(value)
    raise ClientSetupError(f"{where} has a value of the wrong type")
