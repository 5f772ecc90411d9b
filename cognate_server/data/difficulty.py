"""How difficult a document is, and where the easiest share of a set ends.

A difficulty is a grade with the text's length below it, which decides among documents of one grade. It compares
documents of one set only.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from cognate_server.data.gsm8k import ArithmeticProblem
from cognate_server.data.hotpotqa import LEVELS, TwoHopQuestion

# 16 grades of 4,096 lengths fill a uint16.
DIFFICULTIES = 1 << 16
_GRADES = 16
_LENGTHS = DIFFICULTIES // _GRADES
# The longest real document has about 15,000 characters.
_LENGTH_UNIT_CHARS = 4
# 64 Ki documents: half a MiB while they are counted.
_PIECE_DOCUMENTS = 1 << 16


def arithmetic_difficulty(problem: ArithmeticProblem, text: str) -> int:
    """Return a word problem's difficulty: its reasoning steps, then its length."""
    return _difficulty(len(problem.steps), text)


def twohop_difficulty(question: TwoHopQuestion, text: str) -> int:
    """Return a two-hop question's difficulty: its level, then bridge after comparison, then its length.

    A comparison names both of its pages; a bridge hides the second behind the first. The length holds the distractors.
    """
    return _difficulty(2 * LEVELS.index(question.level) + (question.kind == "bridge"), text)


def _difficulty(grade: int, text: str) -> int:
    return min(grade, _GRADES - 1) * _LENGTHS + min(len(text) // _LENGTH_UNIT_CHARS, _LENGTHS - 1)


class Admission:
    """One set's order of difficulty, as a histogram: memory does not grow with the set.

    difficulties_D: uint16, one for each of D documents. They are read in pieces.
    """

    def __init__(self, difficulties_D: npt.NDArray[np.uint16]) -> None:
        self._difficulties_D = difficulties_D
        counts = np.zeros(DIFFICULTIES, dtype=np.int64)
        for start in range(0, len(difficulties_D), _PIECE_DOCUMENTS):
            counts += np.bincount(difficulties_D[start : start + _PIECE_DOCUMENTS], minlength=DIFFICULTIES)
        self._cumulative = np.cumsum(counts)

    def limit(self, competence: float) -> int:
        """Return the difficulty up to which documents are admitted: at least this share of them, never none."""
        wanted = max(1, math.ceil(competence * int(self._cumulative[-1]) - 1e-9))
        return int(np.searchsorted(self._cumulative, wanted))

    def admits(self, document: int, limit: int) -> bool:
        """Whether a document's difficulty is within the limit."""
        return int(self._difficulties_D[document]) <= limit
