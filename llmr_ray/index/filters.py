"""Filters of a search: which documents may be found, by their columns and their metadata.

One tree of comparisons, parsed from two forms that clients know:

    OpenAI   {"type": "eq", "key": "year", "value": 2024}      eq, ne, gt, gte, lt, lte, in, nin
             {"type": "and", "filters": [...]}                 and, or
    Qdrant   {"must": [...], "should": [...], "must_not": [...]} of {"key": "year", "match": {"value": 2024}}
             (value, any, except) and {"key": "year", "range": {"gte": 2020}}

A field is a column (doc_id, task, pool, position, title) or a key of the metadata; "a.b" is the key b of the object a.
Numbers compare with numbers, strings with strings (by code points), booleans with booleans; whatever else a comparison
meets, also a missing field, it does not hold. Of a list, one element that it holds for is enough. `ne` and `nin` are
the opposite of `eq` and `in`, so they hold where the field is missing.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any as JSON

import numpy as np
import pyarrow as pa

from llmr_ray.artifacts import sha256_text

COLUMNS = ("doc_id", "task", "pool", "position", "title")
"""Fields that are columns of the corpus; metadata under these names is not seen."""

MAX_DEPTH = 8
MAX_CLAUSES = 64
MAX_VALUES = 1024
"""Values of one `in`, `nin`, `any` or `except`."""

_ORDERS = ("gt", "gte", "lt", "lte")
_OPPOSITES = {"ne": "eq", "nin": "in"}


class FilterError(ValueError):
    """A filter that cannot be read. The message names the rule and repeats nothing of the input."""


@dataclass(frozen=True)
class Comparison:
    """A field compared with a value; op: eq, gt, gte, lt, lte, or in, whose value is a tuple."""

    field: str
    op: str
    value: JSON


@dataclass(frozen=True)
class All:
    """Every one of the filters holds; without filters, always."""

    filters: tuple["Filter", ...]


@dataclass(frozen=True)
class Any:
    """At least one of the filters holds; without filters, never."""

    filters: tuple["Filter", ...]


@dataclass(frozen=True)
class Not:
    """The filter does not hold."""

    filter: "Filter"


Filter = Comparison | All | Any | Not


def key_of(chosen: Filter) -> str:
    """What tells filters apart, short however long a filter is. (Python's own equality takes 1 for True.)"""
    return sha256_text(repr(chosen))


# --- parsing ---------------------------------------------------------------------------------------------------------


def parse_filter(value: JSON) -> Filter:
    """The filter that a JSON value says, in either form.

    Raises:
        FilterError: it is in neither form, or nested deeper than MAX_DEPTH, or of more than MAX_CLAUSES clauses.
    """
    parsed = _parsed(value, 1)
    if (clauses := sum(1 for _ in _clauses(parsed))) > MAX_CLAUSES:
        raise FilterError(f"a filter may hold {MAX_CLAUSES} comparisons at the most, this one has {clauses}.")
    return parsed


def _parsed(value: JSON, depth: int) -> Filter:
    if depth > MAX_DEPTH:
        raise FilterError(f"a filter may be nested {MAX_DEPTH} deep at the most.")
    if not isinstance(value, Mapping):
        raise FilterError("a filter must be a JSON object.")
    if "type" in value:
        return _openai(value, depth)
    if {"must", "should", "must_not"} & value.keys():
        return _qdrant(value, depth)
    if "key" in value:
        return _condition(value)
    raise FilterError(
        'a filter has "type" (eq, ne, gt, gte, lt, lte, in, nin, and, or), or "must", "should" or "must_not".'
    )


def _openai(value: Mapping[str, JSON], depth: int) -> Filter:
    kind = value["type"]
    if kind in ("and", "or"):
        _only(value, {"type", "filters"})
        parts = tuple(_parsed(item, depth + 1) for item in _items(value.get("filters"), '"filters"'))
        return All(parts) if kind == "and" else Any(parts)
    _only(value, {"type", "key", "value"})
    return _comparison(value.get("key"), kind, value.get("value"))


def _qdrant(value: Mapping[str, JSON], depth: int) -> Filter:
    _only(value, {"must", "should", "must_not"})
    clauses: list[Filter] = []
    for name in ("must", "should", "must_not"):
        if value.get(name) is None:
            continue
        given = value[name] if not isinstance(value[name], Mapping) else [value[name]]
        parts = tuple(_parsed(item, depth + 1) for item in _items(given, f'"{name}"'))
        if name == "must":
            clauses += parts
        elif name == "must_not":
            clauses += [Not(part) for part in parts]
        elif parts:
            clauses.append(Any(parts))
    return All(tuple(clauses))


def _condition(value: Mapping[str, JSON]) -> Filter:
    """One of Qdrant's conditions on a field."""
    _only(value, {"key", "match", "range"})
    clauses: list[Filter] = []
    if value.get("match") is not None:
        match = _object(value["match"], '"match"')
        _only(match, {"value", "any", "except"})
        names = {"value": "eq", "any": "in", "except": "nin"}
        clauses += [_comparison(value["key"], names[name], item) for name, item in match.items()]
    if value.get("range") is not None:
        limits = _object(value["range"], '"range"')
        _only(limits, set(_ORDERS))
        clauses += [_comparison(value["key"], op, item) for op, item in limits.items() if item is not None]
    if not clauses:
        raise FilterError('a condition on a key needs "match" or "range".')
    return clauses[0] if len(clauses) == 1 else All(tuple(clauses))


def _comparison(field: JSON, op: JSON, value: JSON) -> Filter:
    if not isinstance(field, str) or not field or len(field) > 256:
        raise FilterError('a filter\'s "key" must be a name of 1 to 256 characters.')
    if op not in ("eq", "in", *_ORDERS, *_OPPOSITES):
        raise FilterError('a filter\'s "type" must be one of eq, ne, gt, gte, lt, lte, in, nin, and, or.')
    if op in _OPPOSITES:
        return Not(_comparison(field, _OPPOSITES[op], value))
    if op == "in":
        return Comparison(field, op, tuple(_scalar(item) for item in _items(value, "the list of values", MAX_VALUES)))
    value = _scalar(value)
    if op in _ORDERS and isinstance(value, bool):
        raise FilterError("gt, gte, lt and lte compare numbers or strings, not true or false.")
    return Comparison(field, op, value)


def _scalar(value: JSON) -> JSON:
    if not isinstance(value, str | int | float) or value != value or value in (float("inf"), float("-inf")):
        raise FilterError("a filter's value must be a string, a finite number, true or false.")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise FilterError("a filter's value holds a lone surrogate, which is no character.") from None
    return value


def _items(value: JSON, what: str, most: int = MAX_CLAUSES) -> Sequence[JSON]:
    if not isinstance(value, list | tuple):
        raise FilterError(f"{what} of a filter must be a list.")
    if len(value) > most:
        raise FilterError(f"{what} of a filter may hold {most} entries at the most.")
    return value


def _object(value: JSON, what: str) -> Mapping[str, JSON]:
    if not isinstance(value, Mapping):
        raise FilterError(f"{what} of a filter must be a JSON object.")
    return value


def _only(value: Mapping[str, JSON], known: set[str]) -> None:
    if value.keys() - known:
        raise FilterError(f"this part of a filter may only have {', '.join(sorted(known))}.")


def _clauses(chosen: Filter) -> Iterator[Comparison]:
    if isinstance(chosen, Comparison):
        yield chosen
    else:
        for part in (chosen.filter,) if isinstance(chosen, Not) else chosen.filters:
            yield from _clauses(part)


# --- evaluation ------------------------------------------------------------------------------------------------------


class Attributes:
    """What filters see of N documents, by field. Metadata is parsed at once: some ten seconds for a million documents.

    Args:
        table: columns COLUMNS and `meta` (JSON text or null) of the corpus.
    """

    def __init__(self, table: pa.Table) -> None:
        self.num_rows = table.num_rows
        self._table = table.select(COLUMNS)
        self._columns: dict[str, _Field] = {}
        self._metadata = _of_metadata(table["meta"])

    def mask(self, chosen: Filter) -> np.ndarray:
        """The documents that a filter lets through: bool [N]."""
        if isinstance(chosen, Not):
            return ~self.mask(chosen.filter)
        if isinstance(chosen, Comparison):
            field = self._field(chosen.field)
            return field.mask(chosen) if field else np.zeros(self.num_rows, bool)
        result = np.full(self.num_rows, isinstance(chosen, All))
        for part in chosen.filters:
            result = result & self.mask(part) if isinstance(chosen, All) else result | self.mask(part)
        return result

    def _field(self, name: str) -> "_Field | None":
        if name not in COLUMNS:
            return self._metadata.get(name)
        if name not in self._columns:
            self._columns[name] = _of_column(self._table[name])
        return self._columns[name]


class _Field:
    """A field's distinct values, and which row has which; a row may have none or several."""

    def __init__(self, values: Sequence[JSON], rows: np.ndarray, codes: np.ndarray, num_rows: int) -> None:
        self.rows, self.codes, self.num_rows = rows, codes, num_rows
        self.code_of = {(type(value) is bool, value): code for code, value in enumerate(values)}
        self._ordered: dict[bool, tuple[list[JSON], np.ndarray]] = {}

    def mask(self, chosen: Comparison) -> np.ndarray:
        """The rows of which a value compares as asked: bool [N]."""
        hit = np.zeros(len(self.code_of), bool)
        if chosen.op in ("eq", "in"):
            for value in chosen.value if chosen.op == "in" else (chosen.value,):
                if (code := self.code_of.get((type(value) is bool, value))) is not None:
                    hit[code] = True
        else:
            values, codes = self._in_order(isinstance(chosen.value, str))
            # Equal values belong to gte and lte.
            cut = (bisect_left if chosen.op in ("gte", "lt") else bisect_right)(values, chosen.value)
            hit[codes[cut:] if chosen.op in ("gt", "gte") else codes[:cut]] = True
        result = np.zeros(self.num_rows, bool)
        result[self.rows[hit[self.codes]]] = True
        return result

    def _in_order(self, is_text: bool) -> tuple[list[JSON], np.ndarray]:
        """The strings or the numbers, ascending, and their codes; sorted once, so that a comparison need not see all.

        In Python: NumPy would round integers beyond 2**53. NaN, which no comparison holds for, is left out.
        """
        if is_text not in self._ordered:
            found = sorted(
                (value, code)
                for (is_bool, value), code in self.code_of.items()
                if not is_bool and isinstance(value, str) == is_text and value == value
            )
            codes = np.asarray([code for _, code in found], np.int64)
            self._ordered[is_text] = [value for value, _ in found], codes
        return self._ordered[is_text]


def _of_column(column: pa.ChunkedArray) -> _Field:
    encoded = column.combine_chunks().dictionary_encode()
    rows = np.flatnonzero(np.asarray(encoded.is_valid()))
    codes = np.asarray(encoded.indices.drop_null(), np.int32)
    return _Field(encoded.dictionary.to_pylist(), rows, codes, len(column))


def _of_metadata(column: pa.ChunkedArray) -> dict[str, _Field]:
    """The fields of all keys, from one pass over the JSON texts."""
    pairs: dict[str, tuple[dict[JSON, int], list[int], list[int]]] = {}
    for row, text in enumerate(column):
        if not text.is_valid:
            continue
        for name, value in _flat(json.loads(text.as_py()), "", 1):
            codes, at, which = pairs.setdefault(name, ({}, [], []))
            at.append(row)
            which.append(codes.setdefault((type(value) is bool, value), len(codes)))
    return {
        name: _Field([value for _, value in codes], np.asarray(at, np.int64), np.asarray(which, np.int32), len(column))
        for name, (codes, at, which) in pairs.items()
    }


def _flat(value: JSON, name: str, depth: int) -> Iterator[tuple[str, JSON]]:
    """(path, scalar) of everything inside a JSON value; null is nothing."""
    if isinstance(value, dict) and depth <= MAX_DEPTH:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key, depth + 1)
    elif isinstance(value, list) and depth <= MAX_DEPTH:
        for inner in value:
            yield from _flat(inner, name, depth + 1)
    elif name and isinstance(value, str | int | float):
        yield name, value
