"""Reading a server's admin pages as a scraper does."""

import asyncio
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.support import waiting
from training_common.rpc.server import RunningServer

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"


@dataclass(frozen=True)
class Page:
    """An answer."""

    status: int
    kind: str
    text: str


async def get(server: RunningServer, path: str = "/metrics", *, accept: str = "", method: str = "GET") -> Page:
    """Ask for a page."""
    headers = {"Accept": accept} if accept else {}
    request = urllib.request.Request(f"http://{server.admin_address}{path}", headers=headers, method=method)

    def ask() -> Page:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                return Page(answer.status, answer.headers["Content-Type"], answer.read().decode())
        except urllib.error.HTTPError as error:
            return Page(error.code, error.headers["Content-Type"], error.read().decode())

    return await asyncio.to_thread(ask)


async def samples(server: RunningServer) -> list[Sample]:
    """Scrape, and return every sample of a look that began after this was called."""
    # A scrape shares what a look under way finds, and the server looks by itself now and then.
    await get(server)
    page = await get(server)
    assert page.status == 200
    return [sample for family in text_string_to_metric_families(page.text) for sample in family.samples]


async def value(server: RunningServer, name: str, **labels: str) -> float | None:
    """Return the value of the one series with those labels, None where there is none."""
    return value_of(await samples(server), name, **labels)


async def until(server: RunningServer, wanted: Callable[[list[Sample]], bool]) -> list[Sample]:
    """Scrape until the samples are what is wanted, and return them."""
    found: list[Sample] = []

    async def look() -> bool:
        found[:] = await samples(server)
        return wanted(found)

    await waiting.until(look, timeout_s=30)
    return found


def value_of(found: list[Sample], name: str, **labels: str) -> float | None:
    """Return the value of the one sample with those labels, None where there is none."""
    wanted: Mapping[str, str] = labels
    values = [s.value for s in found if s.name == name and wanted.items() <= s.labels.items()]
    assert len(values) <= 1, (name, values)
    return values[0] if values else None
