"""Readers of memory tasks: earlier exchanges of a dialogue, earlier chunks of a text, turns told to an assistant.

Every dialogue and every text is a pool of its own, in its own order. A query sees what came before it: `history_end` is
the number of documents that were complete before the query began.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmr_ray.assets import stdlib_files
from llmr_ray.data.records import (
    Bad,
    BadRow,
    Document,
    Query,
    Record,
    Skip,
    Source,
    check_text,
    check_texts,
    one_line,
    read_json,
    read_json_lines,
    records_of,
)
from llmr_ray.data.splits import lowest
from llmr_ray.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MIN_SESSIONS = 3
"""Pairs of speakers that met less often have no long-term memory to test."""
MIN_EXCHANGES = 8
"""A query has at least this many documents to retrieve from."""
MIN_WORDS = 4
"""Shorter utterances ("ok", "haha") neither ask for a memory nor show one."""
MAX_PAIR_QUERIES = 8
"""Queries of one pair at the most, the lowest by hash: pairs that met sixty times would be most of the data."""

CHUNK_TOKENS = 128
"""LLM tokens of a chunk (methods.md A.7)."""
MAX_CHUNKS = 256
"""The last 32,768 tokens of a text are used (A.7)."""
MAX_CHARS = 160_000
"""Characters of a text that are tokenised (A.7); they hold MAX_CHUNKS chunks of any readable text."""
TARGET_CHUNKS = 8
"""The last 1,024 tokens are desired outputs, chunk by chunk (A.7)."""

SCENARIOS = ("customer", "finance", "healthcare", "notetaker", "student")
QUOTED_WORDS = 6
"""Words of a quotation that must stand in a turn for the turn to be its source."""


def read_chitchat(source: Source) -> Iterator[Record]:
    """Chitchat: students in pairs, some of whom meet again and again; a stand-in for multi-session chat (A.7, MSC).

    Speaker 1 of a pair is who spoke first when they met first. A document is an exchange, "Speaker 1: …⏎Speaker 2: …";
    a query is Speaker 1's utterance in a later session, its desired output Speaker 2's reply, and the exchanges before
    it its memory. Pairs are split as a whole.
    """
    content = read_json(source.path)
    if not isinstance(content, dict):
        raise DataError(f"{source.path} holds a {type(content).__name__}, but chitchat is an object of conversations.")
    sessions: dict[tuple[str, ...], list[tuple[str, str, list[tuple[str, str]]]]] = defaultdict(list)
    for identity, conversation in content.items():
        try:
            turns = _turns(conversation)
            start = check_text(conversation.get("start"), "start", source.config.max_text_chars)
        except BadRow as bad:
            yield bad.at(identity)
            continue
        speakers = tuple(sorted({speaker for speaker, _ in turns}))
        if len(speakers) != 2:
            yield Skip(row=identity, reason="not_two_speakers")
        else:
            sessions[speakers].append((start, identity, turns))
    for pair, met in sorted(sessions.items()):
        if len(met) < MIN_SESSIONS:
            for _, identity, _ in met:
                yield Skip(row=identity, reason="pair_met_too_seldom")
        else:
            yield from _pair(source, pair, sorted(met))


def _turns(conversation: Any) -> list[tuple[str, str]]:
    """(speaker, what was said) with the messages that one speaker sent in a row as one turn; blank ones left out."""
    try:
        messages = [message for block in conversation["messages"] for message in block]
        said = [(str(message["sender"]), one_line(message["text"])) for message in messages]
    except (KeyError, TypeError, AttributeError) as error:
        raise BadRow("missing_field", f"messages: {error!r}") from error
    spoken = [(speaker, text) for speaker, text in said if text]
    return [
        (speaker, " ".join(text for _, text in group))
        for speaker, group in itertools.groupby(spoken, lambda turn: turn[0])
    ]


def _pair(source: Source, pair: tuple[str, ...], met: list[tuple[str, str, list[tuple[str, str]]]]) -> Iterator[Record]:
    limit = source.config.max_text_chars
    first_speaker = met[0][2][0][0]
    pool = f"{source.name}:{pair[0][:8]}+{pair[1][:8]}"
    position = 0
    queries: list[Query] = []
    for session, (_, identity, turns) in enumerate(met):
        for number, ((speaker, utterance), (_, reply)) in enumerate(itertools.pairwise(turns)):
            if speaker != first_speaker:
                continue
            row = f"{identity}:{number}"
            try:
                check_text(utterance, "text", limit)
                check_text(reply, "text", limit)
            except BadRow as bad:
                yield bad.at(row)
                continue
            meta = {"session": session, "turn": number}
            told = min(len(utterance.split()), len(reply.split())) >= MIN_WORDS
            if session > 0 and position >= MIN_EXCHANGES and told:
                query = Query(
                    query_id=f"{source.name}:{row}",
                    query=utterance,
                    targets=(reply,),
                    pool=pool,
                    split_key=pool,
                    history_end=position,
                    meta=meta,
                )
                queries.append(query)
            yield Document(
                doc_id=f"{pool}:{position}",
                pool=pool,
                position=position,
                text=f"Speaker 1: {utterance}\nSpeaker 2: {reply}",
                meta=meta,
            )
            position += 1
    chosen = lowest(pool, [query.query_id for query in queries], MAX_PAIR_QUERIES)
    for query in queries:
        yield query if query.query_id in chosen else Skip(row=query.query_id, reason="pair_has_enough_queries")


def read_stdlib(source: Source) -> Iterator[Record]:
    """Long-range language modelling over the Python standard library's sources, cut into chunks of LLM tokens (A.7).

    Document k is chunk k, with chunk k + 1 as its continuation. Query: the chunk right before the desired one. What may
    be retrieved ends before the recent window (window_tokens) begins, continuation included, so nothing the LLM sees
    anyway (and nothing of the future) is ever retrieved. Files are split as a whole.
    """
    tokenizer = text_tokenizer(source)
    for path in stdlib_files(source.path):
        name = path.relative_to(source.path).as_posix()
        yield from text_records(source, tokenizer, name, path.read_text(encoding="ascii"))


def text_tokenizer(source: Source) -> "Tokenizer":
    """The LLM's tokenizer; ConfigError where there is none."""
    from tokenizers import Tokenizer

    model = source.tokenizer / "tokenizer.json"
    if not model.exists():
        raise ConfigError(
            f"the source '{source.config.source}' cuts text by the LLM's tokens, but there is no {model}."
        )
    return Tokenizer.from_file(str(model))


def text_records(
    source: Source, tokenizer: "Tokenizer", name: str, whole: str, split: str | None = None
) -> Iterator[Record]:
    """A long text as a pool of its chunks, and as queries its last ones (methods.md A.7).

    Args:
        source: the data set.
        tokenizer: of the LLM.
        name: of the text, unique in the data set.
        whole: the text. Its last MAX_CHARS are used, or where the window ends with the text, the first, as published.
        split: where the data fixes it.
    """
    is_published = source.config.window_end == "text"
    text = whole[:MAX_CHARS] if is_published else whole[max(0, len(whole) - MAX_CHARS) :]
    encoding = tokenizer.encode(text, add_special_tokens=False)
    yield from _chunks(source, name, text, [start for start, _ in encoding.offsets], split)


def _chunks(source: Source, name: str, text: str, starts: list[int], split: str | None = None) -> Iterator[Record]:
    """Chunks of a text whose tokens begin at `starts`; full chunks only, counted from the end of the text."""
    number = min(len(starts) // CHUNK_TOKENS, MAX_CHUNKS)
    cuts = [starts[len(starts) - CHUNK_TOKENS * (number - k)] for k in range(number)] + [len(text)]
    chunks = [text[start:end] for start, end in itertools.pairwise(cuts)]
    pool = f"{source.name}:{name}"
    for k in range(number - 1):
        yield Document(
            doc_id=f"{pool}:{k}", pool=pool, position=k, text=chunks[k], continuation=chunks[k + 1], meta={"file": name}
        )
    in_window = source.config.window_tokens // CHUNK_TOKENS
    for k in range(max(number - 1 - TARGET_CHUNKS, 0), number - 1):
        # The chunks that the window ends before: the desired one, or those of the text.
        end = number if source.config.window_end == "text" else k + 1
        # Document i ends with chunk i + 1, which must lie before the window's first chunk.
        history_end = end - in_window - 1
        row = f"{pool}:{k}"
        if history_end < MIN_EXCHANGES:
            yield Skip(row=row, reason="too_little_history")
            continue
        yield Query(
            query_id=row,
            query=chunks[k],
            targets=(chunks[k + 1],),
            context="".join(chunks[end - in_window : k]),
            pool=pool,
            split_key=name,
            split=split,
            history_end=history_end,
            meta={"file": name, "chunk": k},
        )


def read_bfcl_memory(source: Source) -> Iterator[Record]:
    """BFCL's memory questions: what a user told an assistant over many sessions, and a later question about it.

    Evaluation only, all queries are test queries. A turn in which the question's verbatim source is found is gold;
    questions whose source is found nowhere are left out.
    """
    turns: dict[str, list[str]] = {}
    for scenario in SCENARIOS:
        turns[scenario] = []
        path = source.path / "memory_prereq_conversation" / f"memory_{scenario}.json"
        for where, row in read_json_lines(path):
            if isinstance(row, Bad):
                yield row
                continue
            for session in row.get("question") or []:
                for message in session:
                    try:
                        text = one_line(check_text(message.get("content"), "content", source.config.max_text_chars))
                    except BadRow as bad:
                        yield bad.at(where)
                        continue
                    position = len(turns[scenario])
                    turns[scenario].append(text)
                    yield Document(
                        doc_id=f"{source.name}:{scenario}:{position}",
                        pool=f"{source.name}:{scenario}",
                        position=position,
                        text=text,
                        meta={"session": row.get("id"), "topic": row.get("topic")},
                    )
    gold = {}
    for _, row in read_json_lines(source.path / "possible_answer" / "BFCL_v4_memory.json"):
        if not isinstance(row, Bad):
            gold[row.get("id")] = row
    rows = read_json_lines(source.path / "BFCL_v4_memory.json")
    yield from records_of(rows, lambda _, row: [_memory_query(source, row, gold.get(row.get("id"), {}), turns)])


def _memory_query(source: Source, row: dict[str, Any], gold: dict[str, Any], turns: dict[str, list[str]]) -> Record:
    limit = source.config.max_text_chars
    identity = check_text(row.get("id"), "id", limit)
    scenario = check_text(row.get("scenario"), "scenario", limit)
    question = one_line(
        check_text(row["question"][0][0]["content"] if row.get("question") else None, "question", limit)
    )
    answers = check_texts(gold.get("ground_truth"), "ground_truth", limit)
    found = locate(check_text(gold.get("source"), "source", limit), turns.get(scenario, []))
    if not found:
        return Skip(row=identity, reason="source_not_found")
    return Query(
        query_id=f"{source.name}:{identity}",
        query=question,
        targets=answers,
        pool=f"{source.name}:{scenario}",
        split_key=identity,
        split="test",
        qrels=tuple((f"{source.name}:{scenario}:{position}", 1) for position in found),
        meta={"scenario": scenario},
    )


def locate(quotation: str, turns: list[str]) -> list[int]:
    """Positions of the turns that a quotation is taken from.

    A quotation may join pieces with "..." and put a heading ("Monday: …") before one: of each piece the first
    QUOTED_WORDS words, with or without a heading, must stand in a turn, case and punctuation aside.
    """
    words = [f" {_words(turn)} " for turn in turns]
    found: set[int] = set()
    for piece in re.split(r"\.\.\.|…", quotation):
        for form in (piece, piece.partition(":")[2]):
            start = " ".join(_words(form).split()[:QUOTED_WORDS])
            hits = {position for position, turn in enumerate(words) if f" {start} " in turn} if " " in start else set()
            if hits:
                found |= hits
                break
    return sorted(found)


def _words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower().replace("'", "").replace("’", "")))
