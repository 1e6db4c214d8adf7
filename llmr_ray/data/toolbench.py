"""Reader of ToolBench's own files (methods.md E, H.3): its retriever's tables, or the instructions they are made of.

    corpus.tsv                      docid, document_content (a JSON object); with a header, rows repeat
    train.query.txt, test.query.txt qid, query; without a header, rows repeat
    qrels.train.tsv, qrels.test.tsv qid, 0, docid, 1; without a header
    G1_query.json, …                [{api_list, query, "relevant APIs": [[tool, api], …], query_id}, …], beside or in
                                    a folder `instruction`; test_query_ids/G1_….json name those of the test split

Fields are tab separated with quotes as in CSV: texts hold tabs and line breaks. APIs of one content are one document;
which of them is relevant counts within a query's own api_list, so an equal API elsewhere is unlabelled.
"""

import csv
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from llmr_ray.data.files import Row, is_table, read_rows
from llmr_ray.data.judgements import Judgements
from llmr_ray.data.passages import Identities, Passage, Passages, RowQuery, identity_of, query_records
from llmr_ray.data.records import Bad, BadRow, Record, Skip, Source, open_bytes, read_json, records_of
from llmr_ray.errors import ConfigError, DataError

MAX_CELL_CHARS = 10_000_000
"""Of one field of a table; csv's own limit is shorter than some descriptions."""


def read_toolbench(source: Source) -> Iterator[Record]:
    """Queries with the APIs that are relevant to them, and all APIs as one catalogue."""
    if source.config.task != "tool":
        raise ConfigError(f"data set '{source.name}': the source 'toolbench' serves the task tool.")
    if (source.path / "corpus.tsv").exists():
        return _tables(source)
    return _instructions(source)


def api_text(api: dict[str, Any]) -> str:
    """An API as ToolBench's retriever reads it: names, description and parameters, joined by commas."""
    parts = [str(api.get(name) or "") for name in ("category_name", "tool_name", "api_name", "api_description")]
    named = {
        "required_params": "required_parameters",
        "optional_params": "optional_parameters",
        "return_schema": "template_response",
    }
    parts += [f"{shown}: {json.dumps(api.get(name, ''), ensure_ascii=False)}" for shown, name in named.items()]
    return ", ".join(parts)


# --- the retriever's tables ------------------------------------------------------------------------------------------


def _tables(source: Source) -> Iterator[Record]:
    passages = Passages(source)
    for where, cells in _cells(source.path / "corpus.tsv"):
        if cells[:1] == ["docid"]:
            continue
        yield _api_row(passages, where, cells)
    for split in ("train", "test"):
        queries = source.path / f"{split}.query.txt"
        if not queries.exists():
            continue
        judgements = Judgements([source.path / f"qrels.{split}.tsv"])
        yield from judgements.bad
        identities = Identities()
        for where, cells in _cells(queries):
            if len(cells) != 2:
                yield Bad(row=where, reason="bad_query_line", excerpt="\t".join(cells)[:160])
                continue
            relevant = [Passage(identity=document) for document in judgements.of(cells[0])]
            # A row for each pair that the query is in.
            unique = identities.take(cells[0], cells[1])
            if unique is None:
                yield Skip(row=where, reason="repeated_row")
                continue
            row = RowQuery(identity=f"{split}:{unique}", split=split, text=cells[1], positives=relevant)
            try:
                yield from query_records(passages, where, row)
            except BadRow as bad:
                yield bad.at(where)
        yield from judgements.leftovers(source.name)


def _api_row(passages: Passages, where: str, cells: list[str]) -> Record:
    try:
        if len(cells) != 2:
            raise BadRow("bad_corpus_line", cells)
        try:
            api = json.loads(cells[1])
        except (json.JSONDecodeError, RecursionError) as error:
            raise BadRow("invalid_json", cells[1]) from error
        if not isinstance(api, dict):
            raise BadRow("not_an_object", cells[1])
    except BadRow as bad:
        return bad.at(where)
    return passages.corpus_row(where, {"docid": cells[0], "text": api_text(api)})


def _cells(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Rows of a tab separated table, with the line on which each ends."""
    csv.field_size_limit(MAX_CELL_CHARS)
    with open_bytes(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        reader = csv.reader(lines, delimiter="\t")
        try:
            for cells in reader:
                if cells:
                    yield f"{path.name}:{reader.line_num}", cells
        except csv.Error as error:
            raise DataError(
                f"{path} is no table with quotes at line {reader.line_num}: {error}. Fetch or export it again."
            ) from error


# --- the instructions ------------------------------------------------------------------------------------------------


def _instructions(source: Source) -> Iterator[Record]:
    passages, identities = Passages(source), Identities()
    files = instruction_files(source.path)
    if not files:
        raise DataError(
            f"{source.path} holds neither corpus.tsv nor instructions like G1_query.json. Name a folder of ToolBench's "
            "data that holds one of them."
        )
    for file in files:
        group = file.name.partition("_query")[0]
        read = partial(_instruction, passages, identities, group, _test_ids(source.path, group))
        yield from records_of(read_rows(file), read)


def _instruction(
    passages: Passages, identities: Identities, group: str, held: set[str], where: str, row: Row
) -> Iterator[Record]:
    # A row without an id is known by its place, from 0: what the files of ids count with.
    own = identity_of(row, ("query_id",)) or str(int(where.rpartition(":")[2]) - 1)
    unique = identities.take(f"{group}-{own}", row)
    if unique is None:
        yield Skip(row=where, reason="repeated_row")
        return
    relevant, others = _apis(row)
    text = row.get("query")
    # The other APIs of its list are in the catalogue, but no more its negatives than any.
    yield from _catalogue(passages, where, others)
    yield from query_records(
        passages,
        where,
        RowQuery(
            identity=unique,
            split=("test" if own in held else "train") if held else None,
            text=text[0] if isinstance(text, list) and text else text,
            positives=relevant,
        ),
    )


def instruction_files(path: Path) -> list[Path]:
    """Files of instructions: one that is named, or those in a folder or in its folder `instruction`."""
    if path.is_file():
        return [path]
    found = [*path.glob("*_query.json*"), *(path / "instruction").glob("*_query.json*")]
    return sorted(file for file in found if is_table(file))


def _test_ids(path: Path, group: str) -> set[str]:
    """Ids of a group's test queries, the keys of its files in `test_query_ids`; none where there is no such file."""
    found: set[str] = set()
    for file in sorted((path / "test_query_ids").glob(f"{group}_*.json")):
        content = read_json(file)
        if not isinstance(content, (dict, list)):
            raise DataError(f"{file} holds a {type(content).__name__}, not the ids of test queries. Fetch it again.")
        found.update(map(str, content))
    return found


def _apis(row: dict[str, Any]) -> tuple[list[Passage], list[Passage]]:
    """The relevant APIs of a row's list and the others."""
    listed = row.get("api_list")
    if not isinstance(listed, list) or not all(isinstance(api, dict) for api in listed):
        raise BadRow("missing_field", "api_list")
    try:
        wanted = {(str(tool), str(api)) for tool, api in row.get("relevant APIs") or []}
    except (TypeError, ValueError) as error:
        raise BadRow("not_a_pair", f"relevant APIs: {row.get('relevant APIs')!r}") from error
    relevant: list[Passage] = []
    others: list[Passage] = []
    for api in listed:
        is_wanted = (str(api.get("tool_name")), str(api.get("api_name"))) in wanted
        (relevant if is_wanted else others).append(Passage(text=api_text(api)))
    if not relevant:
        raise BadRow("no_relevant_api", sorted(wanted))
    return relevant, others


def _catalogue(passages: Passages, where: str, apis: list[Passage]) -> Iterator[Record]:
    for api in apis:
        try:
            _, document = passages.taken(api)
        except BadRow as bad:
            yield bad.at(where)
            continue
        if document is not None:
            yield document
