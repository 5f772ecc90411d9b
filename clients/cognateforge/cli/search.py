"""Options of lists of models and agents: which versions, and in what order."""

from __future__ import annotations

import enum
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from cognateforge.cli.names import check_artifact_name

if TYPE_CHECKING:
    from cognateforge.artifact.v1 import artifact_pb2
    from cognateforge.cli.exits import Exit

_RESULT = re.compile(r"(?P<metric>[^@<>=\s]+)(@(?P<dataset>[^<>=\s]+))?(?P<way>>=|<=)(?P<value>\S+)")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Tier(enum.StrEnum):
    """Where bytes are kept."""

    STANDARD = "standard"
    ARCHIVE = "archive"


# Each option of a list: what it is on the command line, and what it is when left out.
OPTIONS: Mapping[str, tuple[Any, Any]] = {
    "family": (Annotated[str, typer.Option(help="Only this family.", callback=check_artifact_name)], ""),
    "data": (Annotated[str, typer.Option(help="Only what was trained on this set, by its name or digest.")], ""),
    "result": (
        Annotated[
            list[str] | None,
            typer.Option(help="Only what was measured so: 'METRIC[@SET]>=VALUE' or '<='; may be repeated."),
        ],
        None,
    ),
    "since": (Annotated[str, typer.Option(help="Published then or later: 2026-12-24T18:00:00Z, or 2d ago.")], ""),
    "before": (Annotated[str, typer.Option(help="Published before then, in the same forms.")], ""),
    "tier": (Annotated[list[Tier] | None, typer.Option(help="Only what is kept there; may be repeated.")], None),
    "pinned": (Annotated[bool, typer.Option("--pinned", help="Only what is held for good.")], False),
    "damaged": (Annotated[bool, typer.Option("--damaged", help="Only what was found damaged.")], False),
    "order": (Annotated[str, typer.Option(help="What it is ordered by: created, size, or METRIC@SET.")], "created"),
    "ascending": (
        Annotated[bool, typer.Option("--ascending", help="Smallest or oldest first, not largest or newest.")],
        False,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Search:
    """What the options of a list say."""

    family: str
    data: str
    result: list[str] | None
    since: str
    before: str
    tier: list[Tier] | None
    pinned: bool
    damaged: bool
    order: str
    ascending: bool

    @functools.cached_property
    def filter(self) -> artifact_pb2.ArtifactFilter:
        """Return the contract's filter. Errors: BadParameter."""
        from cognateforge.artifact.v1 import artifact_pb2, storage_pb2
        from cognateforge.cli.moments import moment

        found = artifact_pb2.ArtifactFilter(
            results=map(_bound, self.result or ()),
            tiers=[storage_pb2.Tier.Value(f"TIER_{tier.name}") for tier in self.tier or ()],
            pinned=self.pinned,
            damaged=self.damaged,
        )
        if _DIGEST.fullmatch(self.data):
            found.data_digest = self.data
        else:
            found.data = self.data
        if self.since:
            found.create_time_from.CopyFrom(moment(self.since, option="--since", ago=True))
        if self.before:
            found.create_time_before.CopyFrom(moment(self.before, option="--before", ago=True))
        return found

    @property
    def by_result(self) -> tuple[str, str] | None:
        """The metric and the set that the list is ordered by, if it is by a result. Errors: BadParameter."""
        if self.order in ("created", "size"):
            return None
        metric, at, dataset = self.order.partition("@")
        if not (metric and at and dataset):
            raise typer.BadParameter(
                f"{self.order!r} is no order: give created, size, or METRIC@SET, as in "
                "gsm8k_exact_match@gsm8k/validation",
                param_hint="--order",
            )
        return metric, dataset

    @property
    def ordering(self) -> artifact_pb2.ArtifactOrder:
        """Return the contract's order. Errors: BadParameter."""
        from cognateforge.artifact.v1 import artifact_pb2

        found = artifact_pb2.ArtifactOrder(ascending=self.ascending)
        if self.by_result:
            found.key = artifact_pb2.ORDER_KEY_RESULT
            found.metric, found.dataset = self.by_result
        else:
            found.key = artifact_pb2.ORDER_KEY_SIZE if self.order == "size" else artifact_pb2.ORDER_KEY_CREATE_TIME
        return found

    def measured(self, results: Any) -> tuple[str, ...]:
        """Return the cell with the result that the list is ordered by, the newest of several; none in other lists."""
        if self.by_result is None:
            return ()
        values = [one.value for one in results if (one.metric, one.dataset) == self.by_result]
        return (f"{values[-1]:.6g}" if values else "",)

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of that cell."""
        return () if self.by_result is None else (self.by_result[0],)


def searching(function: Callable[..., Exit | None]) -> Callable[..., Exit | None]:
    """Give a command the options of a list in place of its parameter `search`."""

    @functools.wraps(function)
    def run(*given: Any, **values: Any) -> Exit | None:
        return function(*given, search=Search(**{name: values.pop(name) for name in OPTIONS}), **values)

    own = inspect.signature(function).parameters
    hints = get_type_hints(function, include_extras=True)
    hints.pop("search")
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in OPTIONS.items()
    ]
    kept = [own[name].replace(annotation=hints[name]) for name in own if name != "search"]
    run.__annotations__ = {**hints, **{name: kind for name, (kind, _) in OPTIONS.items()}}
    run.__signature__ = inspect.Signature([*kept, *options])  # type: ignore[attr-defined]
    return run


def _bound(text: str) -> artifact_pb2.ResultFilter:
    from cognateforge.artifact.v1 import artifact_pb2

    found = _RESULT.fullmatch(text.replace(" ", ""))
    value = _number(found["value"]) if found else None
    if found is None or value is None:
        raise typer.BadParameter(
            f"{text!r} is no bound: give METRIC>=VALUE or METRIC@SET<=VALUE, as in "
            "'gsm8k_exact_match@gsm8k/validation>=0.1'",
            param_hint="--result",
        )
    bound = artifact_pb2.ResultFilter(metric=found["metric"], dataset=found["dataset"] or "")
    if found["way"] == ">=":
        bound.at_least = value
    else:
        bound.at_most = value
    return bound


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
