"""Reader of tool retrieval: questions of the Berkeley Function Calling Leaderboard, whose gold calls name functions.

All functions of its single-turn files are one catalogue, as in ToolBench's retrieval task (methods.md E): a question
retrieves from all of them, not from the few it was shipped with.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from llmr_ray.data.records import (
    Bad,
    BadRow,
    Document,
    Query,
    Record,
    Skip,
    Source,
    check_text,
    one_line,
    read_json_lines,
    records_of,
)

GOLD_FILES = (
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
)
"""Files with gold calls (single turn, Python); their questions are the queries."""

TOOL_FILES = ("irrelevance", "live_irrelevance", "live_relevance", "simple_java", "simple_javascript")
"""Files that only add tools to the catalogue."""

MAX_FOREIGN = 0.2
"""Questions with a larger share of non-ASCII letters are in another language and left out."""


def read_bfcl_tools(source: Source) -> Iterator[Record]:
    """Questions with the tools their gold calls name, and the catalogue.

    A tool is known by its name: of several descriptions of one name the first, in the order of the files, is kept.
    """
    tools: dict[str, str] = {}
    for file in GOLD_FILES + TOOL_FILES:
        gold = _gold(source, file) if file in GOLD_FILES else None
        read = partial(_row, source, gold, tools)
        yield from records_of(read_json_lines(source.path / f"BFCL_v4_{file}.json"), read)


def _row(
    source: Source, gold: dict[str, list[str]] | None, tools: dict[str, str], where: str, row: dict[str, Any]
) -> Iterator[Record]:
    """The tools of a row that are new, which are added to `tools`, and its question; gold None: it has none."""
    for tool in row.get("function") or []:
        name = check_text(tool.get("name"), "function.name", source.config.max_text_chars)
        if name not in tools:
            tools[name] = tool_text(name, tool)
            yield Document(doc_id=_doc_id(source, name), pool=source.name, text=tools[name])
    if gold is not None:
        yield _query(source, where, row, gold, tools)


def tool_text(name: str, tool: dict[str, Any]) -> str:
    """``name: description Parameters: a (what it is), b.`` of a function's JSON description."""
    text = f"{name}: {one_line(str(tool.get('description') or ''))}"
    properties = (tool.get("parameters") or {}).get("properties") or {}
    if not properties:
        return text
    described = []
    for parameter, schema in properties.items():
        about = one_line(str(schema.get("description") or "")) if isinstance(schema, dict) else ""
        described.append(f"{parameter} ({about.rstrip('.')})" if about else parameter)
    return f"{text} Parameters: {', '.join(described)}."


def _query(
    source: Source, where: str, row: dict[str, Any], gold: dict[str, list[str]], tools: dict[str, str]
) -> Record:
    limit = source.config.max_text_chars
    identity = check_text(row.get("id"), "id", limit)
    turns = row.get("question") or []
    said = [message.get("content") for message in (turns[0] if turns else []) if message.get("role") == "user"]
    question = one_line(check_text(said[-1] if said else None, "question", limit))
    if sum(not letter.isascii() for letter in question) > MAX_FOREIGN * len(question):
        return Skip(row=where, reason="not_english")
    names = gold.get(identity)
    if not names:
        raise BadRow("no_gold_call", identity)
    unknown = [name for name in names if name not in tools]
    if unknown:
        raise BadRow("unknown_gold_tool", unknown)
    return Query(
        query_id=f"{source.name}:{identity}",
        query=question,
        targets=tuple(names),
        pool=source.name,
        split_key=identity,
        qrels=tuple((_doc_id(source, name), 1) for name in names),
        meta={"file": where.rpartition(":")[0]},
    )


def _gold(source: Source, file: str) -> dict[str, list[str]]:
    """Names of the functions in each question's gold calls, sorted."""
    result = {}
    for _, row in read_json_lines(source.path / "possible_answer" / f"BFCL_v4_{file}.json"):
        if not isinstance(row, Bad) and isinstance(row.get("id"), str):
            result[row["id"]] = sorted({name for call in row.get("ground_truth") or [] for name in call})
    return result


def _doc_id(source: Source, name: str) -> str:
    return f"{source.name}:{name}"
