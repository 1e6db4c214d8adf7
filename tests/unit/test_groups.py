"""Sampling of groups, and the join that makes pools."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from llmr_ray import loading
from llmr_ray.artifacts import Artifact, ArtifactSpec, Counts, seed_of
from llmr_ray.config import Config, DatasetConfig, TaskConfig, TaskGroup, TaskScore, TaskTrain
from llmr_ray.errors import ConfigError, DataError
from llmr_ray.schemas import table_of
from llmr_ray.training.groups import Pool, in_batch_negatives, pool_rewards, reject_reason, sample
from llmr_ray.training.pools import group_row, join_pools, quotes
from llmr_ray.training.stage import group_spec, run_group, training_tasks

CONF = Path(__file__).parents[2] / "conf"


def pool(keys, gold=(), rewards=None):
    return Pool(
        keys=np.asarray(keys),
        is_gold=np.isin(np.arange(len(keys)), gold),
        rewards=None if rewards is None else np.asarray(rewards, np.float32),
    )


def draw(of, size=4, positive="first", negatives="random", seed=0):
    return sample(of, size=size, positive=positive, negatives=negatives, rng=np.random.default_rng(seed))[0]


def draw_several(of, count, size=4, positive="first", seed=0):
    rng = np.random.default_rng(seed)
    chosen, found = sample(of, size=size, positive=positive, negatives="first", rng=rng, num_positives=count)
    return chosen[:found].tolist(), chosen[found:].tolist()


REWARDED = pool([10, 11, 12, 13, 14, 15], gold=[1, 3], rewards=[0.5, 0.1, 0.9, 0.4, -1.0, 0.3])


@pytest.mark.parametrize(
    ("policy", "expected"), [("first", {1}), ("random", {1, 3}), ("teacher", {2}), ("teacher_gold", {3})]
)
def test_positive_policies(policy, expected):
    """Prevents a policy from choosing among the wrong documents (methods.md A.5.1)."""
    assert {int(draw(REWARDED, positive=policy, seed=seed)[0]) for seed in range(30)} == expected


@pytest.mark.parametrize(
    ("policy", "count", "expected"),
    [
        ("first", 2, ([1, 3], [0, 2])),
        ("first", 9, ([1, 3], [0, 2])),
        ("teacher", 2, ([2, 0], [4, 5])),  # what else is gold is no negative
        ("teacher", 3, ([2, 0, 3], [4])),
        ("teacher_gold", 2, ([3, 1], [0, 2])),
    ],
)
def test_several_positives_in_the_order_of_the_policy(policy, count, expected):
    """Prevents a positive among the negatives, and a group without negatives."""
    assert draw_several(REWARDED, count, positive=policy) == expected


def test_positives_are_of_different_texts_and_leave_a_negative():
    """Prevents one text from counting twice, and a group of positives alone where all documents are liked."""
    copies = pool([1, 1, 2, 3], gold=[0, 1, 2])
    assert draw_several(copies, 3) == ([0, 2], [3, 3])
    assert draw_several(pool([1, 2, 3], rewards=[3, 2, 1]), 3, positive="teacher") == ([0, 1], [2, 2])
    assert {tuple(sorted(draw_several(copies, 2, positive="random", seed=seed)[0])) for seed in range(20)} <= {
        (0, 2),
        (1, 2),
    }


@pytest.mark.parametrize(("policy", "expected"), [("first", [0, 2]), ("lowest", [4, 5]), ("highest", [2, 0])])
def test_negative_policies(policy, expected):
    """Prevents negatives by the wrong end of the rewards."""
    assert draw(REWARDED, size=3, negatives=policy)[1:].tolist() == expected


def union_naively(of, num_preferred):
    """D+ of AAR, by a loop: the texts of gold documents, and those of the highest finite rewards."""
    gold = {int(key) for key, is_gold in zip(of.keys, of.is_gold, strict=True) if is_gold}
    best = []
    for place in sorted(range(len(of.keys)), key=lambda place: (-of.rewards[place], place)):
        if np.isfinite(of.rewards[place]) and of.keys[place] not in best and len(best) < num_preferred:
            best.append(int(of.keys[place]))
    return gold | set(best)


@pytest.mark.parametrize("seed", range(40))
def test_positives_of_people_and_llm_together(seed):
    """Prevents what the LLM prefers among the negatives, a third best where gold is among the two best (the union is
    of two then, methods.md D.3), and a preference for what nobody asked about."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(4, 9))
    rewards = rng.choice([0.1, 0.2, 0.3, 0.4, -np.inf], size, p=[0.2, 0.2, 0.2, 0.2, 0.2])
    rewards[0] = 0.25
    of = pool(rng.integers(0, 9, size), gold=rng.choice(size, int(rng.integers(0, 3)), replace=False), rewards=rewards)
    if reject_reason(of, positive="gold_and_teacher", min_reward=None, min_margin=-1) is not None:
        liked = union_naively(of, 1) if not of.is_gold.any() else union_naively(of, 0)
        assert not set(of.keys.tolist()) - liked
        return
    chosen, found = sample(
        of, size=8, positive="gold_and_teacher", negatives="random", rng=rng, num_positives=7, num_preferred=2
    )
    positives, negatives = set(of.keys[chosen[:found]].tolist()), set(of.keys[chosen[found:]].tolist())
    expected = union_naively(of, 2)
    if set(of.keys.tolist()) - expected:
        assert positives == expected
    assert positives <= expected
    assert len(positives) == found
    assert negatives
    assert not positives & negatives
    assert not negatives & union_naively(of, 0)


def test_of_more_positives_than_a_group_holds_none_is_a_negative():
    """Prevents the LLM's second choice from being pushed away where the group has room for the gold document alone."""
    chosen, found = sample(
        REWARDED, size=6, positive="gold_and_teacher", negatives="first", rng=np.random.default_rng(0), num_positives=1
    )
    assert (chosen[:found].tolist(), set(chosen[found:].tolist())) == ([1], {4, 5})


def test_gold_documents_and_their_texts_are_never_negatives():
    """Prevents teaching that a correct passage is wrong, under its own id or as a copy under another."""
    copies = pool([1, 2, 1, 3, 2, 4, 5], gold=[0, 1])
    for seed in range(50):
        chosen = draw(copies, size=4, positive="random", seed=seed)
        assert set(copies.keys[chosen[1:]]) == {3, 4, 5}
    teacher = pool([1, 2, 2, 3], gold=[0], rewards=[0, 9, 1, 0])
    assert set(teacher.keys[draw(teacher, positive="teacher", size=5)[1:]]) == {3}


def test_too_few_negatives_repeat_in_turn():
    """Prevents short groups, and one text standing twice while others wait."""
    small = pool([1, 2, 3, 3], gold=[0])
    chosen = small.keys[draw(small, size=6)]
    assert chosen[0] == 1
    assert sorted(Counter(chosen[1:].tolist()).values()) == [2, 3]


def test_sampling_depends_on_seed_epoch_and_query_alone_and_changes_by_epoch():
    """Prevents negatives frozen for all epochs, as in the released code, and runs that do not repeat."""
    big = pool(np.arange(40), gold=[0])

    def at(epoch, query):
        return draw(big, size=8, seed=seed_of(7, "group", epoch, query)).tolist()

    assert at(0, "q") == at(0, "q")
    assert len({tuple(at(epoch, "q")) for epoch in range(10)}) == 10
    assert at(0, "q") != at(0, "p")


def test_every_eligible_document_is_drawn_equally_often():
    """Prevents a biased draw: 8 of 40 eligible negatives, each with probability 0.2."""
    big = pool(np.arange(41), gold=[0])
    counts = Counter(int(n) for seed in range(3000) for n in draw(big, size=9, seed=seed)[1:])
    assert set(counts) == set(range(1, 41))
    assert max(abs(count / 3000 - 0.2) for count in counts.values()) < 0.04


@pytest.mark.parametrize(
    ("of", "changes", "reason"),
    [
        (REWARDED, {}, None),
        (REWARDED, {"min_reward": 0.95}, "below_min_reward"),
        (REWARDED, {"min_reward": 0.9}, None),
        (REWARDED, {"min_margin": 1.9}, "below_min_margin"),
        (pool([1, 2], gold=[0], rewards=[1, 1]), {}, "below_min_margin"),
        (pool([1, 2]), {}, "no_gold_document"),
        (pool([1, 2], rewards=[1, 2]), {}, None),
        (pool([1, 2], rewards=[1, 2]), {"positive": "random"}, None),
        (pool([1, 1], rewards=[1, 2]), {}, "no_negative"),
        (pool([1, 2], rewards=[1, 2]), {"positive": "teacher"}, None),
        (pool([1, 1], rewards=[1, 2]), {"positive": "teacher"}, "no_negative"),
        (pool([1, 2], gold=[0, 1]), {}, "no_negative"),
        (pool([1, 1], gold=[0]), {}, "no_negative"),
        (pool([1, 2], gold=[0], rewards=[1, 2]), {"positive": "teacher"}, "no_negative"),
        (pool([1, 2], gold=[0], rewards=[2, 1]), {"positive": "teacher"}, None),
        (pool([]), {"positive": "teacher"}, "no_negative"),
    ],
)
def test_reject_reasons(of, changes, reason):
    """Prevents a query without a group from reaching training, and a filter off by its boundary."""
    settings = {"positive": "first", "min_reward": None, "min_margin": 0.0} | changes
    assert reject_reason(of, **settings) == reason
    if reason is None:
        draw(of, positive=settings["positive"])
    elif reason.startswith("no_"):
        with pytest.raises(DataError):
            draw(of, positive=settings["positive"])


def go_round(of, turn, size=4, top=3, bottom=5):
    """The documents of LLM-R's policy at a turn."""
    places, count = sample(
        of,
        size=size,
        positive="teacher",
        negatives="lowest",
        rng=np.random.default_rng(0),
        top_positives=top,
        bottom_negatives=bottom,
        turn=turn,
    )
    assert count == 1
    return int(places[0]), places[1:].tolist()


def test_positives_and_negatives_go_round():
    """Prevents LLM-R's released defect, by which the same documents recur in every epoch (methods.md B.5)."""
    of = pool(np.arange(9), rewards=[0.5, 0.9, -3, 0.8, -1, 0.7, -2, 0.1, 0.2])
    assert [go_round(of, turn)[0] for turn in range(4)] == [1, 3, 5, 1]
    lowest = [2, 6, 4, 7, 8]
    assert [go_round(of, turn)[1] for turn in range(3)] == [[2, 6, 4], [7, 8, 2], [6, 4, 7]]
    seen = Counter(place for turn in range(5) for place in go_round(of, turn)[1])
    assert seen == dict.fromkeys(lowest, 3)


def test_what_may_be_a_positive_is_no_negative_in_any_turn():
    """Prevents the overlap of the lists from teaching both that a document is good and that it is bad."""
    of = pool([1, 2, 3, 4, 4], rewards=[4, 3, 2, 1, 0])
    for turn in range(6):
        positive, negatives = go_round(of, turn, bottom=16)
        assert positive in (0, 1, 2)
        assert set(of.keys[negatives]) == {4}


@pytest.mark.parametrize(
    ("keys", "reason"), [([1, 2, 3, 4], None), ([1, 2, 3], "too_few_documents"), ([1, 2, 3, 3], "too_few_documents")]
)
def test_a_query_needs_more_documents_than_positives(keys, reason):
    """Prevents groups without negatives of their own: LLM-R leaves out queries of fewer than 4 candidates."""
    of = pool(keys, rewards=np.arange(len(keys)))
    assert reject_reason(of, positive="teacher", min_reward=None, min_margin=0, top_positives=3) == reason
    assert reject_reason(of, positive="teacher", min_reward=None, min_margin=0) is None


def test_barred_documents_may_be_positives_but_no_negatives():
    """Prevents an example of the right label from being pushed away (methods.md B.8), also as a copy."""
    plain = pool([1, 2, 3, 2, 4], rewards=[5, 1, 2, 0, 3])
    of = dataclasses.replace(plain, is_barred=np.array([True, True, False, False, False]))
    for policy in ("lowest", "random", "first"):
        chosen = draw(of, size=3, positive="teacher", negatives=policy)
        assert chosen[0] == 0
        assert set(chosen[1:]) == {2, 4}
    settings = {"positive": "teacher", "min_reward": None, "min_margin": 0.0}
    assert reject_reason(of, **settings) is None
    everything = dataclasses.replace(plain, is_barred=np.ones(5, bool))
    assert reject_reason(everything, **settings) == "no_negative"
    with pytest.raises(DataError):
        draw(everything, positive="teacher")
    all_but_the_best = dataclasses.replace(plain, is_barred=np.array([False, True, True, True, True]))
    assert reject_reason(all_but_the_best, **settings) == "no_negative"


@pytest.mark.parametrize(
    ("barred", "expected"), [(True, ["candidate", "same_label", "gold"]), (False, ["candidate", "candidate", "gold"])]
)
def test_groups_say_which_documents_have_the_query_s_label(barred, expected):
    """Prevents the setting from being passed over, and a gold document from losing its role."""
    corpus = pa.table(
        {
            "title": [None, None, None],
            "text": ["x\nNo", "y\nYes", "z\nYes"],
            "meta": ['{"dataset": "rte"}'] * 3,
        },
        schema=pa.schema([("title", pa.string()), ("text", pa.string()), ("meta", pa.string())]),
    )
    query = {"query_id": "q", "task": "icl", "dataset": "rte", "query": "w", "options": ["No", "Yes"], "gold_option": 1}
    found = {"doc_id": ["1", "2", "3"], "row": [0, 1, 2], "gold": [False, False, True]}
    found |= {"reward": [0.0, 1.0, 2.0], "judged": [True] * 3, "source": ["llm"] * 3}
    task = TaskConfig(
        score=TaskScore(feedback="likelihood"),
        group=TaskGroup(same_label_negatives=not barred),
        train=TaskTrain(positive="teacher", kl_weight=1.0),
    )
    row, _ = group_row(query, task, found, corpus, is_classification=True)
    assert row["roles"] == expected


@pytest.mark.parametrize("positive", ["first", "random", "teacher_gold"])
def test_without_labels_the_llm_chooses_the_positive(positive):
    """Users with answers but no labelled passages would train on nothing, although the LLM told which ones help."""
    unlabelled = pool([1, 2, 3, 4], rewards=[0, 1, 3, 2])
    assert {int(draw(unlabelled, size=3, positive=positive, seed=seed)[0]) for seed in range(5)} == {2}


def test_rewards_are_asked_for_by_name():
    """Prevents a labels-only pool from being sorted by rewards it does not have."""
    with pytest.raises(DataError, match=r"score\.feedback"):
        draw(pool([1, 2, 3], gold=[0]), negatives="lowest")


def test_every_document_of_label_1_is_a_positive_in_some_epoch():
    """Prevents the second passage of a question that needs two from never training: it is no negative either."""
    labels = [0.0, 1.0, 0.0, 1.0, 0.5, 1.0, 0.0, 0.0]
    of = pool(range(8), gold=[1, 3, 5], rewards=labels)
    for path in ("arl2_recipe", "arl2"):
        config = loading.load(CONF / f"{path}.yaml")
        trained, size = config.tasks["qa"].train, config.train.group_size
        seen = Counter()
        for epoch in range(30):
            chosen, count = sample(
                of,
                size=size,
                positive=trained.positive,
                negatives=trained.negatives,
                num_positives=trained.num_positives,
                rng=np.random.default_rng(seed_of(1, "group", epoch, "q")),
            )
            assert 0 < sum(labels[place] == 1 for place in chosen) == count < size - 1
            seen.update(chosen.tolist())
        assert set(seen) == set(range(8))
        assert len({seen[1], seen[3], seen[5]}) == 1 or min(seen[1], seen[3], seen[5]) > 10


def test_relevant_documents_are_those_labelled_above_0():
    of = pool([1, 2, 3, 4], gold=[0], rewards=[1.0, 0.5, 0.0, -np.inf])
    assert of.relevant_keys(by_label=True).tolist() == [1, 2]
    assert of.relevant_keys(by_label=False).tolist() == [1], "a log-likelihood above 0 says nothing"
    assert pool([1, 2], gold=[1]).relevant_keys(by_label=True).tolist() == [2]


def test_in_batch_negatives_against_a_loop():
    """Prevents a document that is right for a query from being its in-batch negative, by id or by equal text."""
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 12, (6, 3))
    gold = [rng.integers(0, 12, 2) for _ in range(6)]
    found = in_batch_negatives(keys, gold[2:5], range(2, 5))
    for place, row in enumerate(range(2, 5)):
        for other in range(6):
            for position in range(3):
                key = keys[other, position]
                expected = other != row and key not in keys[row] and key not in gold[row]
                assert found[place, other * 3 + position] == expected


# --- the join --------------------------------------------------------------------------------------------------------


def tables():
    corpus = table_of(
        "corpus",
        [
            {
                "doc_id": f"d{n}",
                "pool": "p",
                "position": n,
                "task": "qa",
                "title": "T" if n == 0 else None,
                "text": text,
            }
            for n, text in enumerate(["zero", "one", "two", "three"])
        ],
    )
    qrels = table_of(
        "qrels",
        [{"query_id": "a", "doc_id": "d3", "relevance": 1}, {"query_id": "a", "doc_id": "d2", "relevance": 0}],
    )
    mined = [("a", "d2", "bm25"), ("a", "d0", "dense"), ("b", "d1", "gold"), ("b", "d0", "random")]
    candidates = table_of("candidates", [{"query_id": q, "doc_id": d, "source": s} for q, d, s in mined])
    rewards = table_of(
        "rewards",
        [
            {"query_id": q, "doc_id": d, "reward": r, "reward_source": "llm"}
            for q, d, r in [("b", "d0", 0.25), ("a", "d3", 1.0), ("a", "d2", 0.5)]
        ],
    )
    return qrels, candidates, rewards, corpus


def trained(feedback):
    return dataclasses.replace(task(feedback), train=TaskTrain(graded_weight=1.0))


def task(feedback, positive="first", **group):
    return TaskConfig(score=TaskScore(feedback=feedback), train=TaskTrain(positive=positive), group=TaskGroup(**group))


def test_labels_of_the_retriever_weigh_what_the_task_says():
    """Prevents pseudo-labels from counting as much as the LLM's, and weights from standing at other documents."""
    qrels, candidates, rewards, corpus = tables()
    sources = ["pseudo" if row["doc_id"] == "d3" else "label" for row in rewards.to_pylist()]
    rewards = rewards.set_column(rewards.column_names.index("reward_source"), "reward_source", pa.array(sources))
    found = join_pools(qrels, candidates, rewards, corpus)["a"]
    query = {"query_id": "a", "task": "qa", "dataset": "x", "query": "?", "split": "train"}
    row, _ = group_row(query, task("label", pseudo_weight=0.5), found, corpus)
    assert dict(zip(row["doc_ids"], row["weights"], strict=True)) == {"d2": 1.0, "d3": 0.5}
    row, _ = group_row(query, task("label"), found, corpus)
    assert row["weights"] is None


@pytest.mark.parametrize(
    ("weight", "extra"), [(0.0, {}), (0.5, {"d3#evidence": ("from three", "gold", 1.0, 0.5)})], ids=["off", "on"]
)
def test_a_quote_is_a_positive_beside_the_document_it_stands_in(weight, extra):
    """Prevents quotes of half-right documents and of other questions from training, and weights at other documents."""
    qrels, candidates, rewards, corpus = tables()
    evidence = {"d0": "from zero", "d2": "from two", "d3": "from three"}
    said = pa.array([evidence[name] for name in rewards["doc_id"].to_pylist()])
    rewards = rewards.set_column(rewards.column_names.index("evidence"), "evidence", said)
    found = join_pools(qrels, candidates, rewards, corpus)["a"]
    query = {"query_id": "a", "task": "qa", "dataset": "x", "query": "?", "split": "train"}
    row, _ = group_row(query, task("label", evidence_weight=weight), found, corpus, quoted=quotes(rewards))
    weights = row["weights"] or [1.0] * len(row["docs"])
    columns = zip(row["docs"], row["roles"], row["rewards"], weights, strict=True)
    expected = {"d2": ("two", "candidate", 0.5, 1.0), "d3": ("three", "gold", 1.0, 1.0)} | extra
    assert dict(zip(row["doc_ids"], columns, strict=True)) == expected
    table_of("groups", [row])


def test_groups_are_joined_on_ids_with_gold_from_labels_and_candidates():
    """Prevents scores that shift by a row, lost gold documents, and relevance 0 counted as gold."""
    qrels, candidates, rewards, corpus = tables()
    found = join_pools(qrels, candidates, rewards, corpus)
    query = {"query_id": "a", "task": "qa", "dataset": "x", "query": "?", "split": "train"}
    row, without = group_row(query, task("rank"), found["a"], corpus)
    assert without == 1
    assert row["doc_ids"] == ["d2", "d3"]
    assert row["docs"] == ["two", "three"]
    assert row["roles"] == ["candidate", "gold"]
    assert row["rewards"] == [0.5, 1.0]
    assert row["weights"] is None, "what the LLM said weighs 1"
    row, without = group_row(query, task("none"), found["a"], corpus)
    assert (row["doc_ids"], row["docs"], row["rewards"]) == (["d2", "d0", "d3"], ["two", "T zero", "three"], None)
    assert without == 0
    table_of("groups", [row])


def test_where_labels_of_the_data_play_no_part_gold_is_a_candidate():
    """Prevents the document that the LLM should place from being left out of its distribution (REPLUG, Atlas)."""
    qrels, candidates, rewards, corpus = tables()
    found = join_pools(qrels, candidates, rewards, corpus)["a"]
    query = {"query_id": "a", "task": "qa", "dataset": "x", "query": "?", "split": "train"}
    row, _ = group_row(query, task("likelihood", positive="teacher", with_gold=False), found, corpus)
    assert (row["doc_ids"], row["roles"]) == (["d2", "d3"], ["candidate", "candidate"])


@pytest.mark.parametrize(
    ("of", "with_task", "reason"),
    [
        ("a", task("rank", min_reward=2.0), "below_min_reward"),
        ("b", task("rank"), "below_min_margin"),
        ("c", task("none"), "no_candidates"),
        ("a", None, "task_does_not_train"),
    ],
)
def test_every_query_left_out_has_a_reason(of, with_task, reason):
    """Prevents rows that vanish: each drop is counted under a name."""
    qrels, candidates, rewards, corpus = tables()
    found = join_pools(qrels, candidates, rewards, corpus)
    assert group_row({"query_id": of, "task": "qa"}, with_task, found.get(of), corpus)[0] == reason


def test_a_query_without_any_reward_is_left_out():
    """Prevents a task with feedback from training on labels in silence where scoring failed."""
    qrels, candidates, _, corpus = tables()
    none = table_of("rewards", [])
    found = join_pools(qrels, candidates, none, corpus)
    assert group_row({"query_id": "b", "task": "qa"}, task("rank"), found["b"], corpus) == ("no_rewards", 2)


def test_the_stage_counts_every_training_query(tmp_path):
    """Prevents queries of other splits from training, and rows that are lost between the tables."""
    qrels, candidates, rewards, corpus = tables()
    queries = table_of(
        "queries",
        [
            {
                "query_id": name,
                "task": "qa",
                "dataset": "x",
                "split": split,
                "query": "?",
                "targets": ["t"],
                "pool": "p",
            }
            for name, split in [("a", "train"), ("b", "train"), ("c", "train"), ("d", "test")]
        ],
    )

    def made(stage, **content):
        artifact = Artifact(tmp_path, ArtifactSpec(stage=stage, version=1, config={}, inputs={}))
        artifact.begin()
        artifact.write_shard(0, content, Counts(rows_in=1, ok=1))
        artifact.commit(1, seconds=0)
        return artifact

    config = Config(datasets={"x": DatasetConfig(num_train=3)}, tasks={"qa": trained("rank")})
    inputs = (
        made("prepare", queries=queries, corpus=corpus, qrels=qrels),
        made("mine", candidates=candidates),
        made("reward", rewards=rewards),
    )
    artifact = Artifact(tmp_path, group_spec(config, *inputs))
    artifact.begin()
    run_group(config, artifact, *inputs)
    counts = artifact.require()["counts"]
    assert (counts["rows_in"], counts["ok"]) == (3, 1)
    assert counts["skipped"] == {"below_min_margin": 1, "no_candidates": 1}
    assert artifact.require()["extra"]["documents_without_reward"] == 2
    assert artifact.read("groups")["query_id"].to_pylist() == ["a"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TaskConfig(), "no loss"),
        (TaskConfig(train=TaskTrain(graded_weight=1.0)), "feedback is none"),
        (TaskConfig(train=TaskTrain(contrastive_weight=1.0, positive="teacher")), "feedback is none"),
        (TaskConfig(train=TaskTrain(contrastive_weight=1.0, negatives="lowest")), "feedback is none"),
        (TaskConfig(train=TaskTrain(full_contrastive_weight=0.2, pairwise_weight=0.5)), "feedback is none"),
    ],
)
def test_settings_that_cannot_train_are_refused_before_anything_runs(task, message):
    """Prevents hours of scoring before a task turns out to have no loss, or to lack the rewards it asks for."""
    with pytest.raises(ConfigError, match=message):
        training_tasks(Config(datasets={"x": DatasetConfig(num_train=1)}, tasks={"qa": task}))


def test_documents_that_the_corpus_lacks_stop_the_join():
    """Prevents training on a candidate file of another corpus."""
    qrels, candidates, rewards, corpus = tables()
    with pytest.raises(DataError, match="corpus lacks"):
        join_pools(qrels, candidates, rewards, pa.table(corpus).slice(0, 2))


def test_documents_below_all_others_stay_negatives():
    """Candidates of another task or label are what LLM-R learns to push away; dropped, only near misses are left."""
    qrels, _, _, corpus = tables()
    mined = [{"query_id": "b", "doc_id": doc_id, "source": "bm25"} for doc_id in ("d1", "d0")]
    rewards = table_of(
        "rewards",
        [
            {"query_id": "b", "doc_id": "d1", "reward": None, "reward_source": "other_label"},
            {"query_id": "b", "doc_id": "d0", "reward": -7.5, "reward_source": "llm"},
        ],
    )
    found = join_pools(qrels.slice(0, 0), table_of("candidates", mined), rewards, corpus)["b"]
    query = {"query_id": "b", "task": "icl", "dataset": "x", "query": "?"}
    row, without = group_row(query, task("likelihood", positive="teacher"), found, corpus)
    assert (row["doc_ids"], row["rewards"], without) == (["d1", "d0"], [None, -7.5], 0)
    assert table_of("groups", [row])["rewards"].to_pylist() == [[None, -7.5]]
    below = Pool(keys=np.arange(4), is_gold=np.zeros(4, bool), rewards=pool_rewards([None, -9.0, None, -3.0]))
    assert reject_reason(below, positive="teacher", min_reward=-4.0, min_margin=0.0) is None
    assert draw(below, positive="teacher", negatives="lowest").tolist() == [3, 0, 2, 1]
    assert draw(below, positive="teacher", negatives="highest").tolist() == [3, 1, 0, 2]
