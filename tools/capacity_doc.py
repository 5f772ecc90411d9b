"""Write what docs/capacity.md repeats of figures and of the command's answers: `make docs`.

The page is written by people but for what stands between a line `<!-- NAME -->` and the line `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from tools import capacity
from tools.capacity_model import MEASURED_FILE, ROOT, Figure, Measured

TARGET = ROOT / "docs" / "capacity.md"
SCALES = ("laptop", "machine", "cluster", "thousands")
_PART = re.compile(r"(?ms)^<!-- ([a-z ]+) -->\n.*?^<!-- end -->$")
_WIDTH = 120


def answer(name: str, measured: Measured) -> str:
    """Return a command and the table that it prints."""
    found = capacity.text(capacity.forecast(capacity.load_scale(name), measured))
    lines = ["```text", f'$ make capacity ARGS="{name}"', *found.splitlines(), "```"]
    return "\n".join(_folded(line) for line in lines)


def figures(measured: Measured) -> str:
    """Return the table of all measured figures."""
    rows = [f"| {one.what} | {amount(one)} | {reach(one)} | {one.source} |" for one in measured.figures.values()]
    return "\n".join(["| what | figure | measured up to | source |", "| --- | --- | --- | --- |", *rows])


def amount(figure: Figure) -> str:
    """Return a figure as people read it."""
    if figure.unit == "bytes":
        return capacity.size(figure.value)
    if figure.unit == "s":
        for unit, length in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)):
            if figure.value >= length:
                return f"{figure.value / length:.3g} {unit}"
    return f"{figure.value:,.4g} {figure.unit}"


def reach(figure: Figure) -> str:
    """Return up to where a figure was measured."""
    return "" if figure.most is None else f"{figure.most:,.0f} {figure.most_of}"


def _folded(line: str) -> str:
    """Break what is too long for a page, which only warnings are."""
    if len(line) <= _WIDTH:
        return line
    cut = line.rfind(" ", 0, _WIDTH)
    return line[:cut] + "\n" + _folded("    " + line[cut + 1 :])


def render(page: str) -> str:
    """Return the page with its parts written anew. Errors: KeyError, for one that nobody writes."""
    measured = Measured.load(MEASURED_FILE)
    parts: Mapping[str, Callable[[], str]] = {
        "figures": lambda: figures(measured),
        **{name: lambda name=name: answer(name, measured) for name in SCALES},  # type: ignore[misc]
    }
    return _PART.sub(lambda found: f"<!-- {found[1]} -->\n\n{parts[found[1]]()}\n\n<!-- end -->", page)


def main() -> None:
    TARGET.write_text(render(TARGET.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
