"""Certificates for development: `forge certs`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from cognateforge.cli.session import Session, command, print_line, say

if TYPE_CHECKING:
    from cognateforge.certificates import Issued

_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


class _First(NamedTuple):
    """A certificate that `init` makes: its hosts, and its roles at each service."""

    name: str
    hosts: tuple[str, ...]
    at_cognate: tuple[str, ...]
    at_agent: tuple[str, ...]


_FIRST = (
    _First("cognate", _LOCAL_HOSTS, (), ()),
    _First("agent", _LOCAL_HOSTS, ("agent_service",), ()),
    _First("operator", (), ("operator", "viewer"), ("operator", "viewer")),
    _First("viewer", (), ("viewer",), ("viewer",)),
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the authority.")]
Days = Annotated[float, typer.Option(min=0.0001, help="Days until the certificate expires.")]
Hosts = Annotated[
    list[str] | None, typer.Option("--host", help="DNS name or address that it serves as. May be repeated.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    certs = typer.Typer(help="Make certificates for development.", no_args_is_help=True)
    app.add_typer(certs, name="certs")

    @command(certs)
    def init(
        session: Session,
        folder: Folder,
        trust_domain: Annotated[str, typer.Option(help="First part of every SPIFFE id.")] = "cognateforge.local",
        days: Days = 30.0,
        keep: Annotated[bool, typer.Option("--keep", help="Leave a folder that has an authority as it is.")] = False,
    ) -> None:
        """Make an authority, and certificates for both services, an operator and a viewer on this machine."""
        from cognateforge.certificates import CA_CERT, Authority

        if keep and (folder / CA_CERT).exists():
            Authority.open(folder)  # which says what is wrong with one that cannot be used
            if not session.as_json:
                print_line(f"{folder} has an authority: nothing was changed")
            for first in _FIRST:
                if not (folder / f"{first.name}.pem").exists():
                    say(f"{folder} has no certificate {first.name}.pem: forge certs issue {folder} {first.name}")
            return
        authority = Authority.create(folder, trust_domain)
        for first in _FIRST:
            _tell(session, authority.issue(first.name, hosts=first.hosts, days=days))
        cognate = _server(folder, "cognate", {f.name: f.at_cognate for f in _FIRST}, trust_domain)
        agent = _server(folder, "agent", {f.name: f.at_agent for f in _FIRST}, trust_domain)
        agent += _section("cognate.tls", folder, ca_file="ca.pem", cert_file="agent.pem", key_file="agent.key")
        for name, lines in (("cognate.toml", cognate), ("agent.toml", agent)):
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
            if not session.as_json:
                print_line(f"settings for --settings: {folder / name}")

    @command(certs)
    def issue(
        session: Session,
        folder: Folder,
        name: Annotated[str, typer.Argument(metavar="NAME", help="The id is spiffe://TRUST_DOMAIN/NAME.")],
        host: Hosts = None,
        days: Days = 30.0,
    ) -> None:
        """Make a certificate, or replace the one of this name, with its hosts unless others are given."""
        from cognateforge.certificates import Authority

        authority = Authority.open(folder)
        _tell(session, authority.issue(name, hosts=host or authority.hosts_of(name), days=days))


def _server(folder: Path, name: str, roles: Mapping[str, tuple[str, ...]], trust_domain: str) -> list[str]:
    lines = _section("security.tls", folder, cert_file=f"{name}.pem", key_file=f"{name}.key", client_ca_file="ca.pem")
    lines.append("[security.roles]")
    lines += [
        f'"spiffe://{trust_domain}/{caller}" = {json.dumps(played)}' for caller, played in roles.items() if played
    ]
    return lines


def _section(section: str, folder: Path, **files: str) -> list[str]:
    return [f"[{section}]", *(f"{key} = {json.dumps(str((folder / file).resolve()))}" for key, file in files.items())]


def _tell(session: Session, issued: Issued) -> None:
    row = {
        "spiffe_id": issued.spiffe_id,
        "cert": str(issued.cert),
        "key": str(issued.key),
        "expires": issued.expires.isoformat(),
    }
    if session.as_json:
        session.emit(row)
    else:
        print_line(f"{issued.spiffe_id}  {issued.cert}  {issued.key}  expires {issued.expires:%Y-%m-%d %H:%M} UTC")
