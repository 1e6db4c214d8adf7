"""The union of sources: what is excluded, who owns a document found twice, what chance decides."""

import numpy as np

from llmr_ray.mining.candidates import Candidate, Found, draw_random, own_first, text_key, union

TEXTS = ["gold", "Gold ", "own example", "own  EXAMPLE", "alpha", "ALPHA", "what is it", "beta", "gamma", "delta"]


def found(source: str, num: int, rows: list[int], skip_top: int = 0) -> Found:
    scores = np.linspace(1, 0.1, len(rows), dtype=np.float32)
    return Found(source=source, num=num, rows=np.asarray(rows), scores=scores, skip_top=skip_top)


def mine(*sources: Found, gold: tuple[int, ...] = (0,), own: int | None = 2):
    return union(
        gold_rows=gold, self_row=own, query="What is it", found=sources, key_of=lambda row: text_key(TEXTS[row])
    )


def test_every_kind_of_false_negative_is_passed_over_and_counted() -> None:
    """Gold under another id, the query's own example or a copy of another candidate spoils training as a negative."""
    candidates, excluded = mine(found("dense", 3, [0, 1, 2, 3, 6, 4, 5, 7, 8]))
    assert [candidate.row for candidate in candidates] == [0, 4, 7, 8]
    assert excluded == {"gold_text": 1, "self": 1, "self_text": 1, "query_text": 1, "candidate_text": 1}


def test_a_document_found_twice_belongs_to_the_first_source_and_the_next_goes_on() -> None:
    """Two rows for one document would double its weight; a short list would make groups of unequal size."""
    candidates, excluded = mine(found("dense", 2, [4, 7, 8]), found("bm25", 2, [7, 5, 9, 8]))
    assert [(candidate.row, candidate.source, candidate.rank) for candidate in candidates] == [
        (0, "gold", None),
        (4, "dense", 1),
        (7, "dense", 2),
        (9, "bm25", 3),
        (8, "bm25", 4),
    ]
    assert candidates[1].retrieval_score == 1.0
    assert candidates[0] == Candidate(row=0, source="gold")
    assert excluded == {"candidate_text": 1}


def test_skip_top_counts_the_retrievers_own_ranks() -> None:
    """Skipping after exclusion would skip deeper where gold is found, and leave out good negatives there."""
    candidates, excluded = mine(found("dense", 2, [0, 4, 7, 8], skip_top=2))
    assert [candidate.row for candidate in candidates] == [0, 7, 8]
    assert excluded == {"skip_top": 1}


def test_examples_of_the_same_input_are_passed_over_where_asked() -> None:
    """Under another label the same input says that the answer is wrong, and under the same one it is the answer."""
    texts = ["what is it\nyes", "What  is it no", "what is it's\nno", "it", "what is it"]

    def mined(**settings: bool) -> tuple[list[int], dict[str, int]]:
        candidates, excluded = union(
            gold_rows=(),
            self_row=None,
            query="What is it",
            found=[found("bm25", 9, [0, 1, 2, 3, 4])],
            key_of=lambda row: text_key(texts[row]),
            **settings,
        )
        return [candidate.row for candidate in candidates], dict(excluded)

    assert mined() == ([0, 1, 2, 3], {"query_text": 1})
    assert mined(skip_same_input=True) == ([2, 3], {"same_input": 2, "query_text": 1})


def test_fillers_and_missing_gold_are_no_candidates() -> None:
    """Row -1 read as an index is the last document of the corpus."""
    candidates, excluded = mine(found("bm25", 4, [-1, -1]), gold=(), own=None)
    assert candidates == []
    assert not excluded


def test_gold_stays_whatever_its_text() -> None:
    """Two gold documents of one text are both gold; dropping one would contradict the qrels."""
    candidates, _ = mine(gold=(0, 1, 6, 0))
    assert [candidate.row for candidate in candidates] == [0, 1, 6]


def test_examples_of_the_own_task_may_come_first() -> None:
    """LLM-R's dense miner puts other tasks' examples behind; a filler is no one's example."""
    rows, scores = np.asarray([[3, 0, 1, 2], [2, 1, -1, -1]]), np.asarray([[0.9, 0.8, 0.7, 0.6], [0.5, 0.4, 0.0, 0.0]])
    owners = ["boolq", "siqa", "boolq", None]
    sorted_rows, sorted_scores = own_first(rows, scores, ["boolq", "siqa"], owners)
    assert sorted_rows.tolist() == [[0, 2, 3, 1], [1, 2, -1, -1]]
    assert sorted_scores.tolist() == [[0.8, 0.6, 0.9, 0.7], [0.4, 0.5, 0.0, 0.0]]


def test_random_documents_depend_on_seed_and_query_alone() -> None:
    """Random candidates that depend on order or worker make every run another data set."""
    first = draw_random(100, 1000, 5, 42, "q1")
    assert first.rows.tolist() == draw_random(100, 1000, 5, 42, "q1").rows.tolist()
    assert first.rows.tolist() != draw_random(100, 1000, 5, 42, "q2").rows.tolist()
    assert first.rows.tolist() != draw_random(100, 1000, 5, 43, "q1").rows.tolist()
    assert first.rows.min() >= 100
    assert first.rows.max() < 1000
    assert len(set(first.rows.tolist())) == len(first.rows)
    assert sorted(draw_random(3, 7, 9, 1, "q").rows.tolist()) == [3, 4, 5, 6]
    assert draw_random(3, 3, 9, 1, "q").rows.tolist() == []
    assert draw_random(0, 10, 0, 1, "q").rows.tolist() == []


def test_random_candidates_have_no_rank() -> None:
    """A rank or score of 0 would read as the best or worst hit of a retriever."""
    candidates, _ = mine(draw_random(4, 10, 2, 42, "q1"))
    assert [(item.source, item.rank, item.retrieval_score) for item in candidates[1:]] == [("random", None, None)] * 2


def test_texts_that_look_alike_are_equal() -> None:
    """Width, case and white space hide copies from an exact comparison."""
    assert text_key("  The\u00a0ﬁrst\nTEST ") == text_key("the first test")
    assert text_key("the first test") != text_key("the first tests")
