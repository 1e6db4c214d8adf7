"""Training data on disk, and what a rank takes from the global batch."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
import torch

from llmr_ray.config import TaskTrain
from llmr_ray.schemas import table_of
from llmr_ray.training import groups
from llmr_ray.training.batches import Plan
from llmr_ray.training.bi_encoder import nearness
from llmr_ray.training.dataset import read_training_data, write_shard
from llmr_ray.training.objective import dealt, local_batch
from tests.training_setup import TASKS, groups_table


def tokenize(texts, instruction, limit):
    """One number per character."""
    return [[ord(letter) for letter in instruction + text][:limit] for text in texts]


def write(table, folder, tokenize=tokenize):
    write_shard(
        table,
        folder,
        tokenize=tokenize,
        instructions={task: (f"{task}?", f"{task}!") for task in TASKS},
        max_query_tokens=20,
        max_document_tokens=30,
    )


def read(table, root, cuts=()):
    """The data of a table whose shards end at the rows `cuts`."""
    folders = []
    for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, table.num_rows], strict=True)):
        folders.append(root / f"{number:05d}")
        write(table.slice(start, end - start), folders[-1])
    return read_training_data(folders)


def crossing_table(num_queries=60, num_texts=12, words=1):
    """Queries and documents drawn from few texts, so that every batch and every two shards have some in common."""
    rng = np.random.default_rng(0)
    texts = [f"{number} " * words for number in range(num_texts)]
    rows = [
        {
            "query_id": str(number),
            "task": task,
            "dataset": task,
            "query": texts[rng.integers(num_texts)],
            "doc_ids": [str(place) for place in range(5)],
            "docs": [texts[place] for place in rng.permutation(num_texts)[:5]],
            "roles": ["gold"] + 4 * ["candidate"],
            "rewards": None if task == "tool" else rng.random(5).tolist(),
            "weights": None if task == "tool" else rng.random(5).tolist(),
        }
        for number in range(num_queries)
        for task in [list(TASKS)[number % len(TASKS)]]
    ]
    return table_of("groups", rows)


def take(data, step, *, batching="mixed", rank=0, world_size=1):
    plan = Plan(data.rows_by("dataset"), repeats={}, batch_size=8, batching=batching, seed=3)
    return local_batch(data, plan.block(step), tasks=TASKS, group_size=4, seed=3, rank=rank, world_size=world_size)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return read(groups_table(), tmp_path_factory.mktemp("data"), cuts=(50, 75))


def test_texts_come_back_with_their_instruction_and_limit(data):
    """Prevents tokens of another text, a missing instruction, and the query's limit on documents."""
    rows = groups_table().to_pylist()
    for row in (0, 30, 70, 95):
        query, task = rows[row]["query"], rows[row]["task"]
        assert (data.query_id(row), data.task(row)) == (rows[row]["query_id"], task)
        assert "".join(map(chr, data.text(data.query_texts([row])[0]))) == f"{task}?{query}"[:20]
        texts = ["".join(map(chr, data.text(number))) for number in data.pool_texts(row)]
        assert texts == [f"{task}!{doc}"[:30] for doc in rows[row]["docs"]]
        pool = data.pool(row)
        assert pool.is_gold.tolist() == [True] + [False] * 5
        if task == "tool":
            assert pool.rewards is None
        else:
            np.testing.assert_allclose(pool.rewards, rows[row]["rewards"])


def test_equal_texts_have_one_key_wherever_they_stand(tmp_path):
    """Prevents a copy under another id, of another task or in another shard from being taken for another document."""
    shared = {"dataset": "x", "roles": ["gold", "candidate"], "rewards": None, "weights": None}
    rows = [
        {"query_id": "1", "task": "qa", "query": "a", "doc_ids": ["d1", "d2"], "docs": ["same", "other"], **shared},
        {"query_id": "2", "task": "qa", "query": "same", "doc_ids": ["d3", "d4"], "docs": ["third", "same"], **shared},
        {"query_id": "3", "task": "icl", "query": "a", "doc_ids": ["d1", "d3"], "docs": ["same", "third"], **shared},
    ]
    data = read(table_of("groups", rows), tmp_path, cuts=(1,))
    (same, other), (third, *_) = data.pool(0).keys, data.pool(1).keys
    assert len({same, other, third}) == 3
    assert data.pool(1).keys.tolist() == [third, same]
    assert data.pool(2).keys.tolist() == [same, third]

    def keys(row):
        """Of what is encoded: the query and the documents with their task's instructions."""
        return data.text_keys([*data.query_texts([row]), *data.pool_texts(row)]).tolist()

    first, second, third = keys(0), keys(1), keys(2)
    assert second[2] == first[1]
    assert len({*first, *second, *third}) == 3 + 2 + 3


def test_a_text_is_tokenised_once_in_a_shard(tmp_path):
    """Prevents the tokens of a passage that many queries share from being stored once for each."""
    seen = []

    def counting(texts, instruction, limit):
        seen.extend((instruction, text) for text in texts)
        return tokenize(texts, instruction, limit)

    table = crossing_table()
    write(table, tmp_path / "data", counting)
    pairs = [(f"{row['task']}?", row["query"]) for row in table.to_pylist()]
    pairs += [(f"{row['task']}!", doc) for row in table.to_pylist() for doc in row["docs"]]
    assert sorted(seen) == sorted(set(pairs))


@pytest.mark.parametrize("cuts", [(7, 30), (0, 20, 20, 60), tuple(range(1, 60, 5))])
def test_batches_do_not_depend_on_where_the_data_is_cut(tmp_path, cuts):
    """Prevents groups, masks, or an order of texts that another cut into shards, or an empty shard, would change."""
    table = crossing_table()
    whole, cut = read(table, tmp_path / "whole"), read(table, tmp_path / "cut", cuts)
    for batching in ("homogeneous", "mixed"):
        for step in range(6):
            one, other = take(whole, step, batching=batching), take(cut, step, batching=batching)
            for name in ("query_B", "doc_BG", "rewards_BG", "has_rewards_B", "same_BGG", "others_BC"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            if one.peers_BN is not None:
                np.testing.assert_array_equal(one.peers_BN, other.peers_BN)
            assert (one.dataset, one.tasks_B) == (other.dataset, other.tasks_B)
            tokens = [[data.text(n).tolist() for n in batch.texts] for data, batch in ((whole, one), (cut, other))]
            assert tokens[0] == tokens[1]
            assert len(set(map(tuple, tokens[0]))) == len(tokens[0])


def test_memory_of_training_data_is_a_few_numbers_a_row(tmp_path):
    """Prevents texts, tokens or pools from being held in memory: a fifth of what is on the disk would be too much."""
    table = crossing_table(num_queries=500, num_texts=2500, words=20)
    write(table, tmp_path / "data")
    size = sum(path.stat().st_size for path in (tmp_path / "data").iterdir()) / table.num_rows

    def held(copies):
        """Bytes of Python, numpy and Arrow once batches were made."""
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        data = read_training_data([tmp_path / "data"] * copies)
        plan = Plan(data.rows_by("dataset"), repeats={}, batch_size=32, batching="mixed", seed=3)
        for step in range(3):
            local_batch(data, plan.block(step), tasks=TASKS, group_size=4, seed=3, rank=0, world_size=1)
        peak = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
        tracemalloc.stop()
        return peak

    held(1)
    each = (held(40) - held(10)) / (30 * table.num_rows)
    assert each < size / 5, (each, size)


def test_nearness_is_the_mean_over_pairs():
    """Prevents texts from being compared with themselves, which would hide a collapse behind their number."""
    embedding = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    each = [
        float(torch.exp(-2 * (embedding[i] - embedding[j]).pow(2).sum())) for i in range(5) for j in range(5) if i != j
    ]
    assert nearness(embedding) == pytest.approx(sum(each) / 20, rel=1e-5)
    assert nearness(embedding[:1].expand(7, -1)) == pytest.approx(1)
    assert nearness(embedding[:1]) == 1


def test_a_query_s_peers_ask_for_something_else():
    """Prevents a question asked twice, or one with the same answer, from being pushed away as a negative."""
    positive = np.array([10, 11, 10, 13, 14])
    gold = [np.array([10, 14]), np.array([11])]
    found = groups.peers(positive, gold, np.array([0, 1, 2, 1, 4]), range(2))
    assert found.tolist() == [[False, True, False, True, False], [True, False, True, False, True]]


def test_a_shard_is_there_whole_or_not_at_all(tmp_path):
    """Prevents a shard that failed half way from being taken for done."""

    def failing(texts, instruction, limit):
        raise RuntimeError("out of words")

    with pytest.raises(RuntimeError, match="out of words"):
        write(groups_table(2), tmp_path / "data", failing)
    assert list(tmp_path.iterdir()) == []
    write(groups_table(2), tmp_path / "data")
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    write(groups_table(2), tmp_path / "data")
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before


def test_what_may_be_no_negative_is_none(tmp_path):
    """Prevents the role `same_label` from being lost between the groups and a step."""
    row = groups_table(1, tasks=("chat",)).to_pylist()[0]
    rows = [{**row, "roles": ["candidate", *["same_label"] * 4, "candidate"]}]
    data = read(table_of("groups", rows), tmp_path)
    assert data.pool(0).is_barred.tolist() == [False, *[True] * 4, False]
    plan = Plan(data.rows_by("dataset"), repeats={}, batch_size=1, batching="mixed", seed=3)
    batch = local_batch(data, plan.block(0), tasks=TASKS, group_size=6, seed=3, rank=0, world_size=1)
    negatives = {"".join(map(chr, data.text(batch.texts[at]))) for at in batch.doc_BG[0, 1:]}
    assert negatives == {f"chat!{row['docs'][5]}"[:30]}


@pytest.mark.parametrize(
    ("loss", "is_negative"), [("listwise_weight", False), ("pairwise_weight", False), ("kl_weight", True)]
)
def test_what_helps_a_little_is_no_in_batch_negative(tmp_path, loss, is_negative):
    """Prevents a passage labelled 0.5 from being pushed away as another question's document (methods.md C.3)."""
    shared = {"task": "qa", "dataset": "qa", "weights": None, "roles": ["gold", "candidate", "candidate"]}
    rows = [
        {"query_id": "a", "query": "a", "docs": ["one", "half", "none"], "rewards": [1.0, 0.5, 0.0]},
        {"query_id": "b", "query": "b", "docs": ["half", "none", "other"], "rewards": [1.0, 0.0, 0.0]},
    ]
    rows = [row | shared | {"doc_ids": row["docs"]} for row in rows]
    data = read(table_of("groups", rows), tmp_path)
    plan = Plan(data.rows_by("dataset"), repeats={}, batch_size=2, batching="mixed", seed=3)
    block = plan.block(0)
    tasks = {"qa": TaskTrain(positive="teacher", **{loss: 1.0})}
    # Two documents a group: the one labelled 0.5 need not be in the own one.
    for seed in range(20):
        batch = local_batch(data, block, tasks=tasks, group_size=2, seed=seed, rank=0, world_size=1)
        texts = np.array(["".join(map(chr, data.text(text)))[len("qa!") :] for text in batch.texts], object)
        columns = texts[batch.doc_BG].reshape(-1)
        query = [*map(int, block.rows)].index(0)
        own = columns[2 * query : 2 * query + 2]
        for column, text in enumerate(columns):
            if column // 2 != query:
                expected = text not in own and text != "one" and (text != "half" or is_negative)
                assert batch.others_BC[query, column] == expected
        assert "half" in columns[2 - 2 * query : 4 - 2 * query]


@pytest.mark.parametrize("batching", ["homogeneous", "mixed"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_cut_the_batch_of_one_worker(data, batching, world_size):
    """Prevents groups, masks or rewards that depend on how many workers there are; who has which query may."""
    for step in range(6):
        whole = take(data, step, batching=batching)
        parts = [take(data, step, batching=batching, rank=rank, world_size=world_size) for rank in range(world_size)]
        queries = np.concatenate([data.text_keys(part.texts)[part.query_B] for part in parts])
        expected = data.text_keys(whole.texts)[whole.query_B]
        # A query that stands twice has the same group both times.
        order = np.empty(8, int)
        order[np.argsort(expected, kind="stable")] = np.argsort(queries, kind="stable")
        np.testing.assert_array_equal(queries[order], expected)
        for name in ("rewards_BG", "has_rewards_B", "same_BGG"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined[order], getattr(whole, name))
        others = np.concatenate([part.others_BC for part in parts]).reshape(8, 8, -1)
        np.testing.assert_array_equal(others[order][:, order].reshape(8, -1), whole.others_BC)
        assert [part.first for part in parts] == [rank * 8 // world_size for rank in range(world_size)]
        assert [[task for part in parts for task in part.tasks_B][at] for at in order] == whole.tasks_B
        keys = np.concatenate([data.text_keys(part.texts)[part.doc_BG] for part in parts])
        np.testing.assert_array_equal(keys[order], data.text_keys(whole.texts)[whole.doc_BG])
        assert len(np.unique(data.text_keys(whole.texts))) == len(whole.texts)


def test_hands_are_equal_in_number_and_about_equal_in_cost():
    """Prevents ranks that wait for the one with the long texts, and a query that is dealt twice or to nobody."""
    costs = np.random.default_rng(0).lognormal(4, 1, 64)
    for num_hands in (1, 2, 8):
        order = dealt(costs, num_hands)
        assert sorted(order) == list(range(64))
        hands = costs[order].reshape(num_hands, -1).sum(axis=1)
        assert hands.max() < 1.05 * hands.mean()
        unsorted = costs.reshape(num_hands, -1).sum(axis=1)
        assert num_hands == 1 or hands.max() < unsorted.max()
    assert dealt(costs, 1).tolist() == list(range(64))
    assert dealt([9.0, 1.0, 1.0, 1.0], 2).tolist() in ([0, 3, 1, 2], [0, 1, 2, 3], [0, 2, 1, 3])


# --- as LLM-Embedder's released code has it --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crossing(tmp_path_factory):
    return read(crossing_table(), tmp_path_factory.mktemp("released"))


def taken(data, block, **settings):
    return local_batch(data, block, tasks=TASKS, group_size=4, seed=3, rank=0, world_size=1, **settings)


def test_false_negatives_can_be_kept(crossing):
    """Released: every document of another query is a negative, whatever its text, and a repeated one its own."""
    plan = Plan(crossing.rows_by("dataset"), repeats={}, batch_size=8, batching="mixed", seed=3)
    masked = taken(crossing, plan.block(0))
    kept = taken(crossing, plan.block(0), keeps_false_negatives=True)
    own = np.arange(32)[None, :] // 4 == np.arange(8)[:, None]
    np.testing.assert_array_equal(kept.others_BC, ~own)
    assert masked.others_BC.sum() < kept.others_BC.sum() == 8 * 28
    np.testing.assert_array_equal(kept.same_BGG, np.broadcast_to(np.eye(4, dtype=bool), (8, 4, 4)))


def test_groups_can_be_drawn_once(crossing):
    """Released: the documents of a group are frozen in a cached map; corrected, an epoch draws anew."""
    plan = Plan(crossing.rows_by("dataset"), repeats={}, batch_size=8, batching="mixed", seed=3)
    drawn = {True: {}, False: {}}
    for once, of in drawn.items():
        for step in range(4 * plan.parts_per_epoch):
            block = plan.block(step)
            batch = taken(crossing, block, sampled_once=once)
            for row, texts in zip(block.rows, batch.texts[batch.doc_BG], strict=True):
                of.setdefault(int(row), set()).add(tuple(texts))
    assert {len(groups) for groups in drawn[True].values()} == {1}
    assert max(len(groups) for groups in drawn[False].values()) > 1
