"""Rows that a hub streams: a break in the stream is told as what it is, and never taken for the set's end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from cognateforge.exceptions import DataUnavailableError


def unbroken(name: str, rows: Iterable[Mapping[str, object]], *, remedy: str) -> Iterator[Mapping[str, object]]:
    """Yield rows of the hub; half a set is no set, so a break ends the job.

    remedy: what else to do than to start the job again. Errors: DataUnavailableError.
    """
    number = 0
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # whatever a network and a foreign library can raise
            raise DataUnavailableError(
                f"the hub broke off {name} after {number} rows ({type(error).__name__}); start the job again, or "
                f"{remedy}"
            ) from error
        number += 1
        yield row
