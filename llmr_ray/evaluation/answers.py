"""How an answer in words is judged: exact match and token F1 after a normalisation, ROUGE-L.

Each takes the output and all accepted answers and returns the best over the answers, in [0, 1]. An alias that merely
occurs inside the output is no match: the released PopQA code counts substrings and calls it exact match (methods.md
A.7, I.20).
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION: dict[str, dict[int, str | None]] = {
    "squad": dict.fromkeys(map(ord, string.punctuation)),
    "trivia_qa": dict.fromkeys(map(ord, string.punctuation + "‘’´"), " "),
}


def normalize(text: str, normalization: str = "squad") -> str:
    """Lower case, no punctuation, no articles, single spaces.

    squad: ASCII punctuation is taken out. trivia_qa: it becomes a space, and so do typographic quotes (TriviaQA's
    evaluation, which LLM-R applies to natural_questions): "U.S.A." is "usa" in the one and "u s" in the other.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION[normalization])).split())


def exact_match(output: str, answers: Sequence[str], normalization: str = "squad") -> float:
    """1.0 when the normalised output equals one of the normalised answers (SQuAD v1.1 evaluation)."""
    said = normalize(output, normalization)
    return float(any(said == normalize(answer, normalization) for answer in answers))


def alias_inside(output: str, answers: Sequence[str]) -> float:
    """1.0 when an answer stands anywhere in the output: as it is, in lower case or capitalised, as LLM-Embedder's code
    counts PopQA. "York" is then in "New Yorker", and a short alias in almost any sentence."""
    return float(any(form in output for answer in answers for form in (answer, answer.lower(), answer.capitalize())))


def token_f1(output: str, answers: Sequence[str], normalization: str = "squad") -> float:
    """The best F1 over bags of normalised tokens (SQuAD v1.1 evaluation)."""
    said = normalize(output, normalization).split()
    return max((_f1(said, normalize(answer, normalization).split()) for answer in answers), default=0.0)


def rouge_l(output: str, answers: Sequence[str]) -> float:
    """The best ROUGE-L F-measure, with Google's ``rouge_score`` (the released code uses pltrdy's ``rouge``)."""
    scorer = _rouge()
    return max((float(scorer.score(answer, output)["rougeL"].fmeasure) for answer in answers), default=0.0)


def _f1(output: list[str], answer: list[str]) -> float:
    if not output or not answer:
        return float(output == answer)
    shared = (Counter(output) & Counter(answer)).total()
    return 2.0 * shared / (len(output) + len(answer))


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)
