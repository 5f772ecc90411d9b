"""Moments on the command line: as RFC 3339 writes them, or so long from now."""

from __future__ import annotations

import re
import time

import typer
from google.protobuf.timestamp_pb2 import Timestamp

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def moment(text: str, *, option: str, ago: bool = False) -> Timestamp:
    """Return "2026-12-24T18:00:00Z" or "8h" as a time. Errors: BadParameter, about the option.

    ago: a span counts back from now, not ahead.
    """
    result = Timestamp()
    ahead = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if ahead is not None:
        # Rounded down: "0s" is no moment ahead.
        span_s = int(ahead[1]) * _UNITS_S[ahead[2]]
        result.FromSeconds(int(time.time()) + (-span_s if ago else span_s))
        return result
    try:
        result.FromJsonString(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is no moment: give a time as 2026-12-24T18:00:00Z, or how long {'ago' if ago else 'from now'} "
            "as 90s, 30m, 8h or 2d",
            param_hint=option,
        ) from None
    return result
