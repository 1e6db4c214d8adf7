"""Filters: both forms, every operator against a naive reading of each document, and what is refused."""

import json

import numpy as np
import pytest

from llmr_ray.index import filters
from llmr_ray.index.filters import All, Any, Attributes, Comparison, FilterError, Not, key_of, parse_filter
from llmr_ray.schemas import table_of
from tests.collections_world import document

METAS = [
    None,
    {"year": 2020, "lang": "en", "tags": ["a", "b"]},
    {"year": 2021.5, "lang": "de", "open": True},
    {"year": "2021", "lang": "en", "author": {"name": "x", "age": 40}},
    {"year": True, "tags": [], "open": False},
    {"year": None, "lang": "fr", "tags": ["b", 3]},
    {"year": 2**60 + 1, "open": 1},
    {"a.b": "flat", "a": {"b": "nested"}},
]
DOCUMENTS = [
    document(
        f"d{row}",
        row,
        meta=json.dumps(meta) if meta is not None else None,
        task="qa" if row % 2 else "chat",
        title=f"title {row}" if row % 3 else None,
    )
    for row, meta in enumerate(METAS)
]


def values_of(row, field):
    """All scalars of a document under a field, by walking it."""
    if field in ("doc_id", "task", "pool", "title"):
        return [row.get(field)] if row.get(field) is not None else []
    found = []

    def walk(value, path):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else key)
        elif isinstance(value, list):
            for inner in value:
                walk(inner, path)
        elif value is not None and path == field:
            found.append(value)

    walk(json.loads(row["meta"]) if row.get("meta") else {}, "")
    return found


def kind(value):
    return "bool" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"


def naive(chosen, row):
    if isinstance(chosen, Not):
        return not naive(chosen.filter, row)
    if isinstance(chosen, All):
        return all(naive(part, row) for part in chosen.filters)
    if isinstance(chosen, Any):
        return any(naive(part, row) for part in chosen.filters)
    operations = {
        "eq": lambda a, b: a == b,
        "gt": lambda a, b: a > b,
        "gte": lambda a, b: a >= b,
        "lt": lambda a, b: a < b,
        "lte": lambda a, b: a <= b,
    }
    wanted = chosen.value if chosen.op == "in" else [chosen.value]
    compare = operations["eq" if chosen.op == "in" else chosen.op]
    return any(kind(v) == kind(w) and compare(v, w) for v in values_of(row, chosen.field) for w in wanted)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "eq", "key": "year", "value": 2020},
        {"type": "eq", "key": "year", "value": 1},
        {"type": "eq", "key": "year", "value": True},
        {"type": "eq", "key": "open", "value": 1},
        {"type": "ne", "key": "lang", "value": "en"},
        {"type": "gt", "key": "year", "value": 2020},
        {"type": "gte", "key": "year", "value": 2**60 + 1},
        {"type": "gt", "key": "year", "value": 2**60},
        {"type": "lt", "key": "year", "value": "3"},
        {"type": "lte", "key": "author.age", "value": 40.0},
        {"type": "in", "key": "tags", "value": ["b", "z"]},
        {"type": "nin", "key": "tags", "value": ["b"]},
        {"type": "in", "key": "doc_id", "value": ["d1", "d5", "gone"]},
        {"type": "eq", "key": "task", "value": "chat"},
        {"type": "gte", "key": "title", "value": "title 4"},
        {"type": "eq", "key": "missing", "value": 1},
        {"type": "eq", "key": "a.b", "value": "nested"},
        {"type": "and", "filters": []},
        {"type": "or", "filters": []},
        {
            "type": "or",
            "filters": [
                {"type": "and", "filters": [{"type": "eq", "key": "lang", "value": "en"}]},
                {"type": "eq", "key": "open", "value": True},
            ],
        },
        {"must": [{"key": "lang", "match": {"value": "en"}}], "must_not": [{"key": "tags", "match": {"any": ["a"]}}]},
        {
            "should": [
                {"key": "year", "range": {"gte": 2020, "lt": 2021.5}},
                {"key": "lang", "match": {"except": ["en"]}},
            ]
        },
        {"must": {"should": [{"key": "open", "match": {"value": True}}]}},
        {"must": []},
    ],
    ids=lambda form: json.dumps(form)[:60],
)
def test_a_filter_lets_through_what_a_naive_reading_does(form) -> None:
    """A filter that means something else than it says shows users what they must not see."""
    chosen = parse_filter(form)
    expected = [naive(chosen, row) for row in DOCUMENTS]
    np.testing.assert_array_equal(Attributes(table_of("corpus", DOCUMENTS)).mask(chosen), expected)


def test_a_comparison_does_not_look_at_every_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests with the most clauses that are allowed would hold up every search for seconds."""
    rows = [document(f"d{row}", row, meta=json.dumps({"n": row, "nan": float("nan")})) for row in range(2000)]
    attributes = Attributes(table_of("corpus", rows))
    for key, value, num in (("doc_id", "d1500", 1440), ("n", 700, 1299), ("nan", 0, 0)):
        attributes.mask(Comparison(key, "gt", value))  # sorted now
        with monkeypatch.context() as patch:
            patch.setattr(attributes._field(key), "code_of", SizedOnly(2000))
            for op, expected in (("gt", num), ("gte", num + (num > 0))):
                assert attributes.mask(Comparison(key, op, value)).sum() == expected


class SizedOnly(dict):
    """Distinct values that nobody may go through."""

    def __init__(self, num):
        super().__init__()
        self.num = num

    def __len__(self):
        return self.num

    def items(self):
        raise AssertionError


def test_a_column_is_not_what_metadata_calls_by_its_name() -> None:
    """Keys are bound to columns; a document that calls itself of another pool in its metadata must not be shown."""
    metas = [{"pool": "open", "year": 1}, {"pool": "p", "year": 1}]
    rows = [document(f"d{row}", row, meta=json.dumps(meta)) for row, meta in enumerate(metas)]
    attributes = Attributes(table_of("corpus", rows))
    for _ in range(2):  # before the metadata was looked at, and after
        assert attributes.mask(Comparison("pool", "eq", "p")).tolist() == [True, True]
        assert attributes.mask(Comparison("pool", "eq", "open")).tolist() == [False, False]
        assert attributes.mask(Comparison("year", "eq", 1)).tolist() == [True, True]


def test_both_forms_are_one() -> None:
    """Two meanings of one question would give two answers to two clients."""
    openai = parse_filter({"type": "and", "filters": [{"type": "nin", "key": "a", "value": ["x", 1]}]})
    assert openai == parse_filter({"must": [{"key": "a", "match": {"except": ["x", 1]}}]})
    assert openai == All((Not(Comparison("a", "in", ("x", 1))),))


def test_filters_are_told_apart_by_type() -> None:
    """Python takes 1 for True: a cache by equality would answer one with the other's documents."""
    assert Comparison("a", "eq", 1) == Comparison("a", "eq", True)
    assert key_of(Comparison("a", "eq", 1)) != key_of(Comparison("a", "eq", True))
    assert len(key_of(Comparison("a", "eq", "x" * 10_000))) == 64  # caches keep it


SECRET = "s3cret-value"


def deep(depth):
    value = {"type": "eq", "key": "a", "value": 1}
    for _ in range(depth):
        value = {"type": "and", "filters": [value]}
    return value


@pytest.mark.parametrize(
    "form",
    [
        None,
        [],
        SECRET,
        {},
        {SECRET: 1},
        {"type": SECRET, "key": "a", "value": 1},
        {"type": ["eq"], "key": "a", "value": 1},
        {"type": "eq", "key": "a", "value": None},
        {"type": "eq", "key": "a", "value": {"x": SECRET}},
        {"type": "eq", "key": "a", "value": float("nan")},
        {"type": "eq", "key": "a", "value": float("inf")},
        {"type": "eq", "key": "a", "value": "\ud800"},
        {"type": "eq", "key": 3, "value": 1},
        {"type": "eq", "key": "", "value": 1},
        {"type": "eq", "key": "a" * 300, "value": 1},
        {"type": "eq", "key": "a", "value": 1, SECRET: 2},
        {"type": "gt", "key": "a", "value": True},
        {"type": "in", "key": "a", "value": SECRET},
        {"type": "in", "key": "a", "value": [1] * (filters.MAX_VALUES + 1)},
        {"type": "and", "filters": [{"type": "eq", "key": "a", "value": 1}] * (filters.MAX_CLAUSES + 1)},
        {"type": "and", "filters": SECRET},
        {"must": [{"key": "a"}]},
        {"must": [{"key": "a", "match": SECRET}]},
        {"must": [{"key": "a", "range": {SECRET: 1}}]},
        {"must": 3},
        deep(filters.MAX_DEPTH),
        deep(5000),
        {
            "must": [
                {"should": [{"key": "a", "match": {"value": 1}}] * 40},
                {"should": [{"key": "a", "match": {"value": 1}}] * 40},
            ]
        },
    ],
    ids=range(28),
)
def test_what_cannot_be_read_is_refused_without_an_echo(form) -> None:
    """A server that repeats its input back, or ends over it, can be used against its users."""
    with pytest.raises(FilterError) as caught:
        parse_filter(form)
    assert SECRET not in str(caught.value)


def test_a_filter_of_the_longest_kind_is_read() -> None:
    """Limits that also refuse what they allow are limits one lower."""
    parse_filter(deep(filters.MAX_DEPTH - 1))
    parse_filter({"type": "or", "filters": [{"type": "eq", "key": "a", "value": 1}] * filters.MAX_CLAUSES})
