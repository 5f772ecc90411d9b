"""`forge dashboard`: both services in a browser."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from cognateforge.cli.session import Session, command, print_line, say


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app)
    def dashboard(
        session: Session,
        host: Annotated[
            str, typer.Option(help="Address to listen on. Others than this machine reach it when it is not loopback.")
        ] = "127.0.0.1",
        port: Annotated[int, typer.Option(min=0, max=65_535, help="Port. 0: any that is free.")] = 7180,
        allow_host: Annotated[
            list[str] | None, typer.Option(help="A name under which a browser may open it. May be repeated.")
        ] = None,
        actions: Annotated[
            bool, typer.Option("--actions", help="Let the page pause, resume and cancel jobs, under your own role.")
        ] = False,
    ) -> None:
        """Show both services on a page of your browser, live. It only reads unless --actions is given."""
        from cognateforge.client import CallBreaker
        from cognateforge.exceptions import ClientSetupError

        try:
            from cognateforge.dashboard.guard import is_loopback
            from cognateforge.dashboard.serve import serve
            from cognateforge.dashboard.upstream import Upstreams
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in {"sse_starlette", "starlette", "uvicorn"}:
                raise
            raise ClientSetupError("the dashboard needs a web server: pip install 'cognateforge[dashboard]'") from error

        def ready(url: str) -> None:
            if session.as_json:
                session.emit({"url": url})
            else:
                print_line(f"the dashboard is at {url}; Ctrl-C ends it")
            if not is_loopback(host):
                say(f"warning: whoever reaches {host} reads what you may read: the page has no sign-in and no TLS")

        # A page that is open asks every two seconds: it should see within that time that a service is back.
        upstreams = Upstreams(
            session.async_cognate_client(CallBreaker("cognate", reset_timeout_s=2.0)),
            session.async_agent_client(CallBreaker("agent", reset_timeout_s=2.0)),
        )
        with contextlib.suppress(KeyboardInterrupt):  # the usual end
            serve(upstreams, host=host, port=port, actions=actions, names=allow_host or (), on_ready=ready)
