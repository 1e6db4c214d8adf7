"""Question patterns, their clusters, and the choice of demonstrations."""

from collections import Counter

import numpy as np
import pytest

from llmr_ray.labeling.patterns import choose_demonstrations, cluster, draw_demonstrations, mask


@pytest.mark.parametrize(
    ("question", "pattern"),
    [
        ("Who wrote Dune?", "Who wrote [entity]?"),
        ("What is the capital of France?", "What is the capital of [entity]?"),
        ("Who directed The Lord of the Rings in 2001?", "Who directed The [entity] in [number]?"),
        ("Which treaty ended World War I?", "Which treaty ended [entity]?"),
        ("When did J. R. R. Tolkien meet Dr. O'Brien?", "When did [entity] meet [entity]?"),
        ("What was Shakespeare's wife's name?", "What was [entity]'s wife's name?"),
        ("Einstein was born where?", "[entity] was born where?"),
        ("Did the U.S. Senate pass it?", "Did the [entity] pass it?"),
        ("Who said “I have a dream”?", "Who said [quote]?"),
        ("What does 'Semper fi' mean?", "What does [quote] mean?"),
        ("Who doesn't like it, and why don't they?", "Who doesn't like it, and why don't they?"),
        ("How much is $1,250.50 or 12% in the 1990s?", "How much is [number] or [number] in the [number]?"),
        ("Who was the 44th president of the United States?", "Who was the [number] president of the [entity]?"),
        ("How old is a 20-year-old?", "How old is a [number]-year-old?"),
        ("Wer schrieb Über den Fluß?", "[entity] schrieb [entity] den [entity]?"),
        ("who wrote dune?", "who wrote dune?"),
        ("", ""),
        ("Paris?", "[entity]?"),
    ],
)
def test_patterns(question, pattern):
    """Prevents names from deciding which questions are alike, and question words from being taken for names."""
    assert mask(question) == pattern
    assert mask(pattern) == pattern


def test_clusters_of_well_parted_vectors_are_found():
    """Prevents clusters by length: vectors of one direction belong together."""
    rng = np.random.default_rng(0)
    truth = np.concatenate([np.arange(6), rng.integers(0, 6, 200)])
    vector_ND = np.eye(8)[truth] * rng.uniform(0.1, 9, 206)[:, None] + rng.normal(0, 0.01, (206, 8)) * 0.1
    # Numbered as they occur, and the first six occur in order.
    assert cluster(vector_ND, num_clusters=6, seed=3).tolist() == truth.tolist()
    assert (cluster(vector_ND, num_clusters=6, seed=4) == truth).all()


@pytest.mark.parametrize("begin", [1, 3, 8])
def test_limits_of_width_and_distance_find_how_many_clusters_there_are(begin):
    """Prevents patterns that are forced into a number of clusters that nobody could know before."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(3), 12)
    vector_ND = np.eye(8)[truth] + rng.normal(0, 0.05, (36, 8))
    found = cluster(vector_ND, num_clusters=begin, split_above=0.1, merge_below=0.5, seed=0)
    assert found.tolist() == truth.tolist()
    assert len(set(cluster(vector_ND, num_clusters=8, merge_below=0.5, seed=0).tolist())) == 3
    assert len(set(cluster(vector_ND, num_clusters=8, split_above=0.1, seed=0).tolist())) == 8


def test_limits_that_contradict_each_other_come_to_an_end():
    """What is split for its width and merged for its nearness must not go round for ever."""
    vector_ND = np.random.default_rng(1).normal(size=(40, 4))
    found = cluster(vector_ND, num_clusters=4, split_above=0.01, merge_below=1.5, seed=0)
    assert len(found) == 40


def test_equal_patterns_share_a_cluster_and_few_patterns_have_few():
    """Prevents a failure on small data, and demonstrations of one pattern from counting as different ones."""
    vector_ND = np.random.default_rng(0).normal(size=(4, 5))[[0, 1, 0, 2, 3, 1, 0]]
    assert cluster(vector_ND, num_clusters=10, seed=0).tolist() == [0, 1, 0, 2, 3, 1, 0]
    assert cluster(vector_ND[:1], num_clusters=10, seed=0).tolist() == [0]


def unit(rng, *shape):
    vectors = rng.normal(size=shape)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def world(num_documents=40, num_questions=120, seed=0):
    rng = np.random.default_rng(seed)
    doc_ids = [f"d{n:02d}" for n in rng.permutation(num_documents)]
    about = rng.integers(0, 2 * num_documents, (num_questions, 2))
    return {
        "doc_ids": doc_ids,
        "document_MD": unit(rng, num_documents, 6),
        "question_ids": [f"q{n}" for n in range(num_questions)],
        "question_ND": unit(rng, num_questions, 6),
        "cluster_N": rng.integers(0, 9, num_questions),
        "passages": [{doc_ids[n] for n in pair if n < num_documents} for pair in about],
    }


def naive(doc_ids, document_MD, question_ids, question_ND, cluster_N, passages, nearest, number):
    """The rule of methods.md C.1.2, one question at a time."""
    used, chosen = Counter(), {}
    for doc_id in sorted(doc_ids):
        vector = document_MD[doc_ids.index(doc_id)]
        others = [n for n in range(len(question_ids)) if doc_id not in passages[n]]
        near = sorted(others, key=lambda n: -float(question_ND[n] @ vector))[:nearest]
        best = {}
        for n in near:
            if cluster_N[n] not in best:
                best[cluster_N[n]] = n
        picked = sorted(best, key=lambda name: (used[name], name))[:number]
        for name in picked:
            used[name] += 1
        chosen[doc_id] = {question_ids[best[name]] for name in picked}
    return chosen


@pytest.mark.parametrize(("nearest", "number"), [(50, 5), (7, 3), (1, 5)])
def test_demonstrations_against_a_naive_walk(nearest, number):
    """Prevents demonstrations of one cluster, of an overused one, or of the document's own question."""
    given = world()
    found = choose_demonstrations(**given, seed=1, nearest=nearest, number=number)
    chosen = {}
    for row in found.to_pylist():
        assert row["place"] == len(chosen.setdefault(row["doc_id"], []))
        chosen[row["doc_id"]].append(row["question_id"])
    expected = naive(**given, nearest=nearest, number=number)
    assert {doc_id: set(ids) for doc_id, ids in chosen.items()} == expected
    clusters = dict(zip(given["question_ids"], given["cluster_N"], strict=True))
    for ids in chosen.values():
        assert len({clusters[name] for name in ids}) == len(ids)


def test_demonstrations_do_not_depend_on_the_order_of_documents():
    """Prevents another sharding from choosing other demonstrations."""
    given = world()
    order = np.random.default_rng(5).permutation(40)
    moved = given | {"doc_ids": [given["doc_ids"][n] for n in order], "document_MD": given["document_MD"][order]}
    assert choose_demonstrations(**given, seed=1).equals(choose_demonstrations(**moved, seed=1))


def test_demonstrations_are_shuffled_for_each_document():
    """Prevents the most similar question, or one cluster, from always standing in the same place."""
    given = world(num_documents=60)
    tables = [choose_demonstrations(**given, seed=seed).to_pylist() for seed in (1, 2)]
    assert tables[0] != tables[1]
    sets = [{(row["doc_id"], row["question_id"]) for row in rows} for rows in tables]
    assert sets[0] == sets[1]
    clusters = dict(zip(given["question_ids"], given["cluster_N"], strict=True))
    first = Counter(int(clusters[row["question_id"]]) for row in tables[0] if row["place"] == 0)
    assert len(first) > 3


def test_drawn_demonstrations_are_never_the_document_s_own():
    """Prevents a comparison with choosing that is spoiled by copies; each document is drawn for by itself."""
    given = {name: value for name, value in world().items() if name in ("doc_ids", "question_ids", "passages")}
    about = dict(zip(given["question_ids"], given["passages"], strict=True))
    rows = draw_demonstrations(**given, seed=1).to_pylist()
    drawn = {}
    for row in rows:
        assert row["doc_id"] not in about[row["question_id"]]
        drawn.setdefault(row["doc_id"], []).append(row["question_id"])
    assert {len(set(ids)) for ids in drawn.values()} == {5}
    assert len({tuple(ids) for ids in drawn.values()}) == len(given["doc_ids"])
    some = draw_demonstrations(**given | {"doc_ids": given["doc_ids"][:9]}, seed=1).to_pylist()
    assert some == [row for row in rows if row["doc_id"] in given["doc_ids"][:9]]
    assert draw_demonstrations(**given, seed=2).to_pylist() != rows
    few = given | {"question_ids": ["q0"], "passages": [{given["doc_ids"][0]}]}
    assert {row["doc_id"] for row in draw_demonstrations(**few, seed=1).to_pylist()} == set(given["doc_ids"][1:])
