"""The stages score and reward on a tiny LLM in this process, against a naive walk over every pair."""

import dataclasses
import math

import pytest

from llmr_ray.artifacts import Artifact
from llmr_ray.assets import Asset
from llmr_ray.config import TaskMine, TaskScore
from llmr_ray.feedback import scoring
from llmr_ray.feedback.client import LocalClient
from llmr_ray.feedback.engine import EngineSettings, open_engine, scorer_id
from llmr_ray.feedback.engine_routed import RoutedEngine
from llmr_ray.feedback.engine_tree import TreeScorer
from llmr_ray.feedback.jobs import drawn_candidates, equal_share
from llmr_ray.feedback.planning import PROBE_PAIRS, costs, probe, upper_costs
from llmr_ray.feedback.stage import reward_spec, run_reward, run_score, score_jobs, score_spec
from llmr_ray.feedback.store import LLMStore
from tests.feedback_world import PASSAGES, make_config, make_world
from tests.tiny_llm import save_model


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return Asset("tiny", "model", save_model(tmp_path_factory.mktemp("llm")), "f")


def make_client(config, llm, root):
    name = scorer_id(llm.fingerprint, config.llm)
    return LocalClient(name, LLMStore(root / "llm_store" / name), open_engine(EngineSettings.of(config, llm.path)))


def scored(config, client, llm, prepare, candidates):
    artifact = Artifact(config.runtime.artifact_root, score_spec(config, llm, prepare, candidates))
    artifact.begin()
    run_score(config, artifact, client, prepare, candidates)
    return artifact


def mean_likelihood(engine, prompt, output):
    """Tokenises prompt and output apart, which is right for this tokenizer and outputs that begin with a space."""
    ids = [tuple(engine.tokenizer(text)["input_ids"]) for text in (prompt, output)]
    [result] = engine.likelihood([(ids[0], ids[1])])
    return sum(result.logprobs) / len(result.logprobs)


@pytest.mark.parametrize("samples", ["shared", "fresh"])
def test_rank_scores_against_a_naive_walk(tmp_path, llm, samples):
    """Samples joined to the wrong query or prompt give ranks in the right range that mean nothing."""
    config = make_config(tmp_path, score=TaskScore(feedback="rank", samples=samples, num_samples=4, max_new_tokens=6))
    prepare, candidates = make_world(tmp_path)
    client = make_client(config, llm, tmp_path)
    asked = []
    answering = client.answer

    def spying(requests, *, label):
        results = answering(requests, label=label)
        asked.extend(zip(requests, results, strict=True))
        return results

    client.answer = spying
    artifact = scored(config, client, llm, prepare, candidates)
    drawn = {
        "".join(segment.text for segment in request.segments): [text.strip() for text in result.texts]
        for request, result in asked
        if request.num_samples
    }
    assert len(drawn) == (3 if samples == "shared" else 15)

    def rank(prompt, draws, target):
        own = mean_likelihood(client.engine, prompt, " " + target)
        others = [mean_likelihood(client.engine, prompt, " " + text) for text in draws if text and text != target]
        return 1 + sum(other > own for other in others)

    rows = [row for row in artifact.read("llm_scores").to_pylist() if row["kind"] == "rank"]
    assert len(rows) == 12
    chosen = {request.unit: request.targets[0].strip() for request, _ in asked if request.targets}
    for row in rows:
        alone = f"Question: what is number {row['query_id'][1:]}?\n\nAnswer:"
        shown = f"Knowledge: {PASSAGES[int(row['doc_id'][1:])]}\n\n{alone}"
        target = chosen[row["query_id"]]
        assert row["rank_without"] == rank(alone, drawn[alone], target)
        assert row["rank_with"] == rank(shown, drawn[alone if samples == "shared" else shown], target)
        assert row["llm_score"] == row["rank_without"] - row["rank_with"]


@pytest.mark.parametrize("normalization", ["mean", "sum"])
def test_ranks_that_were_settled_early_are_the_same(tmp_path, llm, monkeypatch, normalization):
    """Tokens that can change no rank are not read; every row of llm_scores is what it is when all are."""
    score = TaskScore(feedback="rank", num_samples=8, max_new_tokens=24, normalization=normalization)
    rows, tokens = [], []
    for root, long_output in ((tmp_path / "early", 16), (tmp_path / "whole", 10**6)):
        monkeypatch.setattr(scoring, "LONG_OUTPUT", long_output)
        config = make_config(root, score=score)
        prepare, candidates = make_world(root)
        client = make_client(config, llm, root)
        sampler, settings = client.engine, EngineSettings.of(config, llm.path)
        client.engine = RoutedEngine(sampler.tokenizer, 128, lambda s=sampler: s, lambda s=settings: TreeScorer(s))
        artifact = scored(config, client, llm, prepare, candidates)
        rows.append(artifact.read("llm_scores").to_pylist())
        tokens.append(artifact.manifest["counts"]["llm_tokens"])
    for early, whole in zip(*rows, strict=True):
        assert early == whole | {"llm_score": pytest.approx(whole["llm_score"], abs=1e-5)}
    assert len({row["rank_with"] for row in rows[0]}) > 2, "the test needs ranks that differ"
    assert tokens[0] < tokens[1]


def test_likelihood_scores_rewards_and_accounting(tmp_path, llm):
    """Every pair must be answered once, by its own prompt, and counted."""
    config = make_config(tmp_path, score=TaskScore(feedback="likelihood"))
    prepare, candidates = make_world(tmp_path, targets=("Paris",))
    client = make_client(config, llm, tmp_path)
    [cost] = costs(score_jobs(config, prepare, candidates), client)
    pairs, missing, tokens = cost.pairs, cost.missing, cost.tokens
    assert (pairs, missing) == (12, 12)
    assert tokens > 12 * 10
    artifact = scored(config, client, llm, prepare, candidates)
    for row in artifact.read("llm_scores").to_pylist():
        prompt = f"Knowledge: {PASSAGES[int(row['doc_id'][1:])]}\n\nQuestion: what is number {row['query_id'][1:]}?"
        expected = mean_likelihood(client.engine, f"{prompt}\n\nAnswer:", " Paris")
        assert row["llm_score"] == pytest.approx(expected, abs=1e-4)
        assert row["scorer_id"] == client.scorer_id
    counts = artifact.manifest["counts"]
    assert (counts["rows_in"], counts["ok"], counts["llm_tokens"] > 0) == (12, 12, True)
    [cost] = costs(score_jobs(config, prepare, candidates), client)
    assert (cost.pairs, cost.missing, cost.tokens) == (12, 0, 0)

    rewards = Artifact(tmp_path, reward_spec(config, prepare, artifact))
    rewards.begin()
    run_reward(config, rewards, prepare, artifact)
    table = rewards.read("rewards")
    assert table["reward"].to_pylist() == artifact.read("llm_scores")["llm_score"].to_pylist()
    assert set(table["reward_source"].to_pylist()) == {"llm"}


def test_the_llm_is_asked_about_the_drawn_pairs_alone(tmp_path, llm):
    """LLM-R pays for 32 of 100 candidates; pairs that are left out must be counted, and drawn the same way again."""
    config = make_config(tmp_path, score=TaskScore(feedback="likelihood", num_candidates=2, max_queries=2))
    prepare, candidates = make_world(tmp_path, targets=("Paris",))
    client = make_client(config, llm, tmp_path)
    artifact = scored(config, client, llm, prepare, candidates)
    asked = [(row["query_id"], row["doc_id"]) for row in artifact.read("llm_scores").to_pylist()]
    assert [len({row[place] for row in asked}) for place in (0, 1)] == [2, len({doc for _, doc in asked})]
    assert len(asked) == len(set(asked)) == 4
    counts = artifact.manifest["counts"]
    assert (counts["rows_in"], counts["ok"], counts["skipped"]) == (12, 4, {"not_drawn": 8})
    more = make_config(tmp_path, score=TaskScore(feedback="likelihood", num_candidates=3, max_queries=3))
    wider = score_jobs(more, prepare, candidates)
    assert wider.num_pairs == 9
    assert set(asked) < {
        (job.query_id, doc) for job in wider.of_shard(0) for doc in (row["doc_id"] for row in job.asked)
    }


@pytest.mark.parametrize("sizes", [[5, 1, 9], [3, 3], [100], [0, 4, 2], []])
def test_data_sets_share_a_limit_equally(sizes):
    """The largest cap that keeps the total, as LLM-R finds it by bisection."""
    for limit in range(len(sizes), sum(sizes) + 2):
        share = equal_share(sizes, limit)
        assert sum(min(size, share) for size in sizes) <= limit
        assert share >= max(sizes, default=0) or sum(min(size, share + 1) for size in sizes) > limit
    assert equal_share(sizes, 0) == max(sizes, default=0)


def test_gold_candidates_are_always_asked_about():
    gold = [False] * 8 + [True] * 2
    docs = [f"d{number}" for number in range(10)]
    for seed in range(20):
        drawn = drawn_candidates("q", docs, gold, 3, seed)
        assert {8, 9} < set(drawn)
        assert len(drawn) == 3
        assert drawn == sorted(drawn)
    assert drawn_candidates("q", docs, gold, 1, 0) == [8, 9]


def test_score_over_options_is_the_log_of_the_gold_share(tmp_path, llm):
    """A demonstration that makes every option likelier would be rewarded although the choice stays the same."""
    options = ["Paris", "the sea", "old town"]
    config = make_config(tmp_path, queries_task="icl", score=TaskScore(feedback="likelihood", over_options=True))
    prepare, candidates = make_world(tmp_path, task="icl", targets=("the sea",), options=options, gold_option=1)
    client = make_client(config, llm, tmp_path)
    rows = scored(config, client, llm, prepare, candidates).read("llm_scores").to_pylist()
    assert len(rows) == 12
    for row in rows:
        prompt = f"{PASSAGES[int(row['doc_id'][1:])]}\nwhat is number {row['query_id'][1:]}?\n"
        likelihoods = [mean_likelihood(client.engine, prompt, option) for option in options]
        expected = likelihoods[1] - math.log(sum(math.exp(value) for value in likelihoods))
        assert row["llm_score"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("feedback", ["rank", "likelihood"])
def test_a_probe_is_paid_for_once(tmp_path, llm, feedback):
    """A probe whose answers were thrown away would be money for a forecast; one that asks all is no probe."""
    config = make_config(tmp_path, score=TaskScore(feedback=feedback, num_samples=2, max_new_tokens=2))
    prepare, candidates = make_world(tmp_path, 120)
    client = make_client(config, llm, tmp_path)
    work = score_jobs(config, prepare, candidates)
    [before] = costs(work, client)
    speed = probe(work, client)
    [after] = costs(work, client)
    assert PROBE_PAIRS / 2 <= speed.pairs < before.pairs
    assert speed.tokens > 0
    assert after.missing <= before.missing - speed.pairs
    client.usage.computed_tokens = 0
    probe(work, client)
    [last] = costs(work, client)
    assert last.missing < after.missing


@pytest.mark.parametrize("samples", ["shared", "fresh"])
def test_the_plan_from_the_configuration_is_an_upper_bound(tmp_path, llm, samples):
    """A plan that promises less than is paid is worse than none."""
    config = make_config(tmp_path, score=TaskScore(feedback="rank", samples=samples, num_samples=2, max_new_tokens=4))
    prepare, candidates = make_world(tmp_path, 6)
    datasets = {"main": dataclasses.replace(config.datasets["main"], num_train=6)}
    tasks = {"qa": dataclasses.replace(config.tasks["qa"], mine=TaskMine(num_bm25=2, num_dense=2))}
    [bound] = upper_costs(dataclasses.replace(config, datasets=datasets, tasks=tasks))
    client = make_client(config, llm, tmp_path)
    [exact] = costs(score_jobs(config, prepare, candidates), client)
    assert bound.pairs == 6 * 5
    if samples == "fresh":  # two outputs of four tokens more for each pair, on average of half that length
        shared = dataclasses.replace(tasks["qa"], score=dataclasses.replace(tasks["qa"].score, samples="shared"))
        [less] = upper_costs(dataclasses.replace(config, datasets=datasets, tasks={"qa": shared}))
        assert bound.tokens - less.tokens >= bound.pairs * 2 * 4 // 2
    assert bound.pairs >= exact.pairs
    assert bound.tokens > exact.tokens
    scored(config, client, llm, prepare, candidates)
    assert bound.tokens > client.usage.computed_tokens


def test_a_second_run_costs_nothing_and_gives_the_same_bytes(tmp_path, llm):
    """Lost ledgers and other run names must not cost the LLM again, nor change a number."""
    prepare, candidates = make_world(tmp_path)
    config = make_config(tmp_path)
    first = scored(config, make_client(config, llm, tmp_path), llm, prepare, candidates)
    elsewhere = make_config(tmp_path / "other")
    client = make_client(elsewhere, llm, tmp_path)
    second = scored(elsewhere, client, llm, prepare, candidates)
    assert client.usage.computed_tokens == 0
    assert second.manifest["counts"]["cached"] == 12
    part = "parts/llm_scores-00000.parquet"
    assert (second.path / part).read_bytes() == (first.path / part).read_bytes()


def test_one_target_of_several_is_drawn_for_all_candidates(tmp_path, llm):
    """Candidates judged by different answers cannot be compared (methods.md A.4.2)."""
    config = make_config(tmp_path, score=TaskScore(feedback="likelihood", max_new_tokens=4))
    prepare, candidates = make_world(tmp_path, 8, targets=("Paris", "thank you very much, I am fine"))
    rows = scored(config, make_client(config, llm, tmp_path), llm, prepare, candidates).read("llm_scores").to_pylist()
    lengths = {}
    for row in rows:
        lengths.setdefault(row["query_id"], set()).add(row["num_target_tokens"])
    assert all(len(of_query) == 1 for of_query in lengths.values())
    assert len(set().union(*lengths.values())) == 2


def test_queries_without_target_are_quarantined_rows(tmp_path, llm):
    """A query that cannot be judged must stay visible, with its reason."""
    config = make_config(tmp_path)
    prepare, candidates = make_world(tmp_path, 1, targets=())
    artifact = scored(config, make_client(config, llm, tmp_path), llm, prepare, candidates)
    rows = artifact.read("llm_scores").to_pylist()
    assert {row["error"] for row in rows} == {"the query has no desired output"}
    assert artifact.manifest["counts"]["quarantined"] == {"the query has no desired output": 4}


def test_identity_holds_what_changes_scores(tmp_path, llm):
    """Scores served for other settings are stale; scores redone for another actor count are paid twice."""
    prepare, candidates = make_world(tmp_path)

    def made(llm=llm, **changes):
        return score_spec(make_config(tmp_path, **changes), llm, prepare, candidates).id

    assert made(score=TaskScore(feedback="likelihood")) != made()
    assert made(engine="vllm") != made()
    assert made(llm=Asset("tiny", "model", llm.path, "other")) != made()
    assert made(llm_actors=7, llm_scoring="tree") == made()


@pytest.mark.parametrize("feedback", ["likelihood", "rank"])
def test_pairs_that_a_rule_judges_are_not_asked(tmp_path, llm, feedback):
    """LLM-R pays for scores that it then overwrites with -100; here they cost nothing and still come out as rows."""
    settings = TaskScore(feedback=feedback, num_samples=2, max_new_tokens=4, same_task=True)
    config = make_config(tmp_path, queries_task="icl", score=settings)
    prepare, candidates = make_world(tmp_path, 1, task="icl", metas=[{"dataset": "main"}, None, {"dataset": "x"}, None])
    client = make_client(config, llm, tmp_path)
    work = score_jobs(config, prepare, candidates)
    [cost] = costs(work, client)
    assert (cost.pairs, cost.missing) == (1, 1)
    artifact = scored(config, client, llm, prepare, candidates)
    rows = [row for row in artifact.read("llm_scores").to_pylist() if row["kind"] == feedback]
    assert [(row["doc_id"], row["error"], row["llm_score"] is None) for row in rows] == [
        ("d0", None, False),
        *((f"d{n}", "other_task", True) for n in (1, 2, 3)),
    ]
    counts = artifact.manifest["counts"]
    assert (counts["ok"], counts["skipped"], counts["quarantined"]) == (1, {"other_task": 3}, {})
    rewards = Artifact(config.runtime.artifact_root, reward_spec(config, prepare, artifact))
    rewards.begin()
    run_reward(config, rewards, prepare, artifact)
    assert [row["reward"] is None for row in rewards.read("rewards").to_pylist()] == [False, True, True, True]


def test_llm_rs_prompt_has_a_blank_line_and_its_target_is_the_first(tmp_path, llm):
    """Without the blank line the example runs into the query, and the scores compare with nobody's (B.4)."""
    prepare, candidates = make_world(tmp_path, 8, task="icl", targets=("Paris", "the sea"))
    settings = TaskScore(feedback="likelihood", prompt="llm_r")
    jobs = score_jobs(make_config(tmp_path, queries_task="icl", score=settings), prepare, candidates).of_shard(0)
    asked = [request for job in jobs for request in scoring.scoring_requests(job, {})]
    texts = {"".join(segment.text for segment in request.segments) for request in asked if request.unit == "q0"}
    assert texts == {f"{passage}\n\nwhat is number 0?\n" for passage in PASSAGES}
    assert {request.targets for request in asked} == {("Paris",)}
