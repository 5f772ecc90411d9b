"""This project's own problems, for where the real sets are not to be had.

`forge-arithmetic` rows have GSM8K's form and `forge-twohop` rows have HotpotQA's; nothing in them was copied from
either, and they never bear those names. Row n of a seed is the same on every machine, however many rows are asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from cognate_server.data.generate_arithmetic import arithmetic_row
from cognate_server.data.generate_twohop import twohop_row

Generator = Callable[[random.Random], dict[str, object]]

GENERATORS: dict[str, Generator] = {"forge-arithmetic": arithmetic_row, "forge-twohop": twohop_row}


def generate_rows(name: str, *, rows: int, seed: int) -> Iterator[dict[str, object]]:
    """Yield the first `rows` rows of the named set."""
    generator = GENERATORS[name]
    for index in range(rows):
        # Seeding with text hashes it with SHA-512, so neighbouring rows share nothing.
        yield generator(random.Random(f"{name}/{seed}/{index}"))  # noqa: S311 - problems, not secrets
