"""The built-in notifier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cognateforge.cli.exits import Exit
from cognateforge.cli.jobs import Service
from cognateforge.cli.session import Session, command, print_line, say

if TYPE_CHECKING:
    from cognateforge.alerts.notifier import Sent
    from cognateforge.alerts.settings import NotifySettings


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app)
    def notify(
        session: Session,
        settings: Annotated[Path | None, typer.Option(help="TOML file: docs/alerts.md has its keys.")] = None,
        webhook: Annotated[
            list[str] | None, typer.Option(help="URL that takes Alertmanager's webhooks. May be repeated.")
        ] = None,
        state: Annotated[Path | None, typer.Option(help="File that remembers what was told.")] = None,
        interval: Annotated[float | None, typer.Option(min=0.1, help="Seconds between two looks.")] = None,
        service: Annotated[
            Service | None, typer.Option(help="Watch this service alone. Default: both; one that is not there is down.")
        ] = None,
        once: Annotated[
            bool, typer.Option("--once", help="Look and tell once. Exit code 4: somebody could not be told.")
        ] = False,
    ) -> Exit:
        """Watch both services and tell people what is wrong, until it is ended. Needs no Prometheus."""
        chosen = _settings(settings, webhook or [], state, interval)
        return _run(session, chosen, service, once=once)


def _settings(file: Path | None, webhooks: list[str], state: Path | None, interval: float | None) -> NotifySettings:
    import dataclasses

    from cognateforge.alerts.settings import NotifySettings, WebhookSettings, load, read_secrets

    chosen = load(file) if file else NotifySettings()
    more = tuple(WebhookSettings(name=f"webhook-{number}", url=url) for number, url in enumerate(webhooks, 1))
    chosen = dataclasses.replace(
        chosen,
        webhooks=(*chosen.webhooks, *more),
        state_file=state or chosen.state_file,
        interval_s=interval or chosen.interval_s,
    )
    chosen.check()
    read_secrets(chosen)
    return chosen


def _run(session: Session, settings: NotifySettings, service: Service | None, *, once: bool) -> Exit:
    import asyncio
    import signal

    from cognateforge.alerts.evaluator import Evaluator
    from cognateforge.alerts.notifier import Notifier
    from cognateforge.alerts.receivers import Mail, Receiver, Webhook

    receivers: list[Receiver] = [*map(Webhook, settings.webhooks), *map(Mail, settings.mails)]

    async def run() -> Exit:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        async with session.async_cognate_client() as cognate, session.async_agent_client() as agent:
            evaluator = Evaluator(
                cognate if service is not Service.AGENT else None,
                agent if service is not Service.COGNATE else None,
                limits=settings.limits,
            )
            notifier = Notifier(evaluator, receivers, settings)
            if not once:
                await notifier.run(stop, lambda sent: _show(session, sent))
                return Exit.OK
            all_sent = await notifier.once()
            for sent in all_sent:
                _show(session, sent)
            return Exit.UNAVAILABLE if any(sent.error for sent in all_sent) else Exit.OK

    return asyncio.run(run())


def _show(session: Session, sent: Sent) -> None:
    """Print a line for each message: who, what, and why not."""
    if session.as_json:
        import dataclasses

        session.emit(dataclasses.asdict(sent))
        return
    line = f"{sent.receiver}: {sent.status} {sent.alertname} ({sent.service}), {sent.alerts} in all"
    if sent.error:
        say(f"{line}: not taken: {sent.error}; it is tried again")
    else:
        print_line(line)
