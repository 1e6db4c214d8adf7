"""Texts that talk to whoever judges them: what a person should look at before trusting a high label.

A short list of patterns, not a classifier: it knows the attacks of labeling/canaries.py and the commonest forms of
prompt injection in English, and a text about such attacks matches as well. A match is a reason to look, nothing is left
out for it.
"""

import polars as pl

PATTERNS = {
    "orders": r"(?:ignore|disregard|forget|override)\s+(?:all\s+|any\s+|the\s+|your\s+|of\s+|these\s+)*"
    r"(?:previous|prior|above|earlier|preceding|other)?\s*(?:instructions?|prompts?|rules|guidelines|passages|documents)",
    "claims": r"this\s+(?:passage|document|text|answer|tool|example)\s+(?:fully\s+|completely\s+|perfectly\s+)?"
    r"(?:answers\s+(?:the|your|any|every)|is\s+the\s+(?:best|only|most\s+(?:relevant|reliable)))",
    "scores": r"(?:this|the)\s+(?:passage|document|text|answer)\s+"
    r"(?:gets|deserves|must\s+get|should\s+(?:get|be)|has)\s+"
    r"(?:\w+\s+){0,3}(?:score|rating|label|grade|relevan\w+)",
    "forges": r'"?(?:score|relevance|label|rating)"?\s*[:=]\s*"?(?:1(?:\.0+)?|10|100|5)\b[^\n]{0,40}\}|'
    r'\{\s*"\d+"\s*:\s*\{',
    "repeats": r"here\s+is\s+the\s+(?:correct\s+|full\s+)?answer\s+to\s+(?:the|your)\s+question",
    "addresses": r"(?:you\s+are\s+(?:now\s+)?(?:an?|the)\s+"
    r"(?:ai|assistant|language\s+model|annotator|judge|grader|rater)|"
    r"(?:dear|attention|note\s+to)\s+(?:the\s+)?(?:ai|assistant|language\s+model|llm|annotator|judge|grader|rater)|"
    r"as\s+an\s+ai\s+language\s+model)",
    "markup": r"<\|(?:im_start|im_end|system|user|assistant|endoftext)\|>|\[/?INST\]|<</?SYS>>|"
    r"#{2,}\s*(?:system|instruction|assistant)\s*:",
}
"""Regular expressions by what they find; case does not count."""


def suspicions(texts: pl.Series) -> pl.DataFrame:
    """A row for each text, a column of booleans for each pattern."""
    return pl.DataFrame({name: texts.str.contains(f"(?i){pattern}") for name, pattern in PATTERNS.items()})
