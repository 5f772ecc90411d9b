"""How near a written answer is to one of those that are accepted: exact match and token F1, as SQuAD scores them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Return a text in lower case without punctuation and English articles, its words apart by one space.

    Source: Rajpurkar et al. 2016, arXiv:1606.05250, and its evaluation script, in this order.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """Return 1 when the normalized answer equals one of the accepted ones, 0 otherwise.

    Source: Rajpurkar et al. 2016, section 6.1.
    """
    return _best(lambda one: float(normalize(answer) == normalize(one)), accepted)


def token_f1(answer: str, accepted: Sequence[str]) -> float:
    """Return the largest F1 of the answer's words and an accepted one's, each as a bag: 2 P R / (P + R).

    P is the share of the answer's words that are among the accepted one's, R the share of those that were given. Where
    one of the two has no words left, they agree when both have none.

    Source: Rajpurkar et al. 2016, section 6.1.
    """

    def f1(one: str) -> float:
        given, wanted = normalize(answer).split(), normalize(one).split()
        if not given or not wanted:
            return float(given == wanted)
        common = (Counter(given) & Counter(wanted)).total()
        return 2 * common / (len(given) + len(wanted))

    return _best(f1, accepted)


def _best(score: Callable[[str], float], accepted: Sequence[str]) -> float:
    if not accepted:
        raise ValueError("there is no accepted answer to compare with")
    return max(score(one) for one in accepted)
