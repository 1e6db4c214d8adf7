"""Plans against published costs, and the simulation against what must hold of any."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmr_ray import loading
from llmr_ray.cli import app
from llmr_ray.errors import ConfigError
from llmr_ray.planning.hardware import GPUS, Assumptions, gpu_of, seconds
from llmr_ray.planning.models import size_of
from llmr_ray.planning.simulation import simulate, time_of
from llmr_ray.planning.stages import Work, plan

CONF = Path(__file__).parents[2] / "conf"
ASSUMED = Assumptions()


@pytest.fixture(scope="module")
def paper():
    return loading.load(CONF / "paper" / "llm_embedder_released.yaml")


def prefill_hours(pairs: float, tokens: float, model: str, gpu: str) -> float:
    return seconds(GPUS[gpu], ASSUMED, flops=2 * size_of(model).body * pairs * tokens) / 3600


@pytest.mark.parametrize(
    ("pairs", "tokens", "model", "gpu", "published"),
    [
        # LLM-Embedder, FlagEmbedding issue 339: 400,000 queries with 200 passages each, 15 hours on 8 A100-40G.
        # Passages of MS MARCO have about 75 tokens, its question, template and answer 20.
        (80e6, 95, "meta-llama/Llama-2-7b-chat-hf", "A100-40G", 15 * 8),
        # LLM-R, methods B.4: 32 candidates of 200,000 questions, 12 hours on 8 V100; an example, a question of such a
        # task and its answer have about 250 tokens.
        (6.4e6, 250, "huggyllama/llama-7b", "V100", 12 * 8),
    ],
)
def test_scoring_takes_what_it_took_the_papers(pairs, tokens, model, gpu, published):
    """Prevents plans that are wrong by more than a factor of 2 where the true hours are known."""
    hours = prefill_hours(pairs, tokens, model, gpu)
    assert published / 2 < hours < published * 2


def test_llm_r_trains_both_models_in_less_than_the_paper_says():
    """Published: less than 10 hours for both on 8 V100."""
    config = loading.load(CONF / "paper" / "llm_r.yaml", ["rounds=1"])
    works = {work.stage: work for work in plan(config, ASSUMED)}
    hours = sum(works[stage].gpu_hours(GPUS["V100"], ASSUMED) for stage in ("reward_model", "train")) / 8
    assert 0.1 < hours < 10


def test_figures_of_a_plan_are_those_of_the_formulas(paper):
    """Prevents a factor of a thousand, or a stage whose documents are counted as queries."""
    works = {work.stage: work for work in plan(paper, ASSUMED)}
    documents = 8_841_823 + 21_051_324 + 54_573_064 + 6_283_120 + 10_439
    own = 14 + 1
    chat, texts = (48_925 + 2_763) * own, (30_000 + 2_757) * (64 + 1)
    assert works["index_base"].units == documents + chat + texts
    assert works["index_base"].storage_bytes == (documents + chat + texts) * 768 * 4
    queries = works["embed_base"].units - works["index_base"].units
    tokens = (documents + chat + texts + queries) * 128
    assert works["embed_base"].flops == pytest.approx(2 * 85.6e6 * tokens)
    per_query = 128 + 8 * 128
    assert works["train"].tokens == 10_000 * 800 * per_query
    assert works["train"].flops == pytest.approx(6 * 85.6e6 * 10_000 * 800 * per_query)
    assert works["train"].memory_bytes > 16 * 109e6


def test_ranks_cost_many_likelihoods(paper):
    """Published direction: fresh outputs for every candidate cost 20 likelihoods and more, shared ones about 11."""
    by = {}
    for name, overrides in {
        "likelihood": [],
        "shared": ["tasks.qa.score.feedback=rank"],
        "fresh": ["tasks.qa.score.feedback=rank", "tasks.qa.score.samples=fresh"],
    }.items():
        config = loading.load(
            CONF / "paper" / "llm_embedder_released.yaml",
            [
                *overrides,
                "llm.max_candidate_tokens=75",
                "datasets.examples.num_train=0",
                "tasks.qa.score.max_new_tokens=32",
            ],
        )
        (score,) = (work for work in plan(config, ASSUMED) if work.stage == "score")
        by[name] = score.gpu_hours(GPUS["A100-80G"], ASSUMED)
    # Computed tokens, with the prompt shared by its outputs: dearer, but not by the number of generations.
    assert 1.5 < by["shared"] / by["likelihood"] < 11
    assert by["fresh"] > 1.5 * by["shared"]


@pytest.mark.parametrize(
    ("name", "parameters", "is_known"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", 6.74e9, True),
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.5e9, False),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 360e6, False),
        ("some/encoder-large", 335e6, False),
        ("BAAI/bge-base-en-v1.5", 109.5e6, True),
    ],
)
def test_sizes_are_read_off_names(name, parameters, is_known):
    """Prevents the version in a name from counting as billions."""
    size = size_of(name)
    assert (size.parameters, size.is_known) == (parameters, is_known)


# --- simulation ------------------------------------------------------------------------------------------------------

H100 = GPUS["H100"]
WORK = Work(stage="score", unit="pairs", units=1, flops=3600 * H100.flops * ASSUMED.utilisation, shards=100)


def test_a_stage_of_few_shards_stops_where_they_are_dealt_out():
    """Prevents a plan that promises 512 GPUs' speed to work that comes in 100 pieces."""
    even = replace(ASSUMED, straggler=0.0)
    one, many, more = (time_of(WORK, count, H100, even) for count in (1, 64, 512))
    assert one.parts["work"] == pytest.approx(3600)
    # 100 shards on 64 workers: some have two, of 36 seconds each.
    assert many.parts["work"] + many.parts["too few shards"] == pytest.approx(72)
    assert more.workers == 100
    assert more.parts["work"] + more.parts["too few shards"] == pytest.approx(36)
    (scaling,) = simulate([WORK], H100, even)
    assert (scaling.stops_at, scaling.reason) == (512, "too few shards")


def test_training_stops_where_its_batch_does():
    """Prevents more workers than queries, or uneven slices, from being counted as speed."""
    work = Work(
        stage="train", unit="steps", units=100, tokens=100 * 96 * 1000, flops=1e19, steps=100, batch=96,
        gradient_bytes=4e8, weights=1e8,
    )  # fmt: skip
    times = {count: time_of(work, count, H100, ASSUMED) for count in (1, 8, 64, 512)}
    assert {count: time.workers for count, time in times.items()} == {1: 1, 8: 8, 64: 48, 512: 96}
    assert times[1].parts["gradient traffic"] == 0
    assert times[512].parts["gradient traffic"] == 0  # the products of 1,042 TFLOP a step hide it
    slow = time_of(replace(work, flops=1e16), 512, H100, ASSUMED)
    # 100 rings of 4e8 bytes, 2 * 95 / 96 times, at 25 GB/s, half of the products' time hidden.
    ring = 100 * 2 * 95 / 96 * 4e8 / 25e9
    assert slow.parts["gradient traffic"] == pytest.approx(ring - 1e16 / (989e12 * 0.45) / 96 / 2, rel=1e-3)


def test_more_gpus_never_take_longer(paper):
    """Prevents a simulation whose limits are counted twice."""
    for scaling in simulate(plan(paper, ASSUMED), H100, ASSUMED):
        times = [time.seconds for time in scaling.times.values()]
        # But for stragglers, traffic and uneven slices, which one GPU does not have.
        assert all(more <= 1.2 * fewer + 1 for fewer, more in pairwise(times)), scaling.stage
        for time in scaling.times.values():
            assert min(time.parts.values()) >= 0


def test_prepare_has_as_many_pieces_as_there_are_tasks(paper):
    """A shard of prepare is a task: the plan must say so, because no cluster makes it faster."""
    of = {scaling.stage: scaling for scaling in simulate(plan(paper, ASSUMED), H100, ASSUMED)}
    assert of["prepare"].times[512].workers == 6
    assert of["prepare"].stops_at == 8
    assert of["prepare"].reason == "too few shards"


def test_a_plan_is_printed_and_is_json(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = str(CONF / "paper" / "llm_embedder_acl.yaml")
    done = CliRunner().invoke(app, ["plan", path, "--simulate", "--gpu", "H200", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["gpu_hours"]["A100-40G"] > told["gpu_hours"]["H100"] > 0
    assert set(told["simulation"]["stages"][0]["seconds"]) == {"1", "8", "64", "512"}
    done = CliRunner().invoke(app, ["plan", path, "--simulate"])
    assert done.exit_code == 0, done.output
    assert "Simulated on H100" in done.stdout
    assert "stops scaling" in done.stdout
    with pytest.raises(ConfigError, match="A100-40G"):
        gpu_of("A100")
    assert CliRunner().invoke(app, ["plan", path, "--utilisation", "2"]).exit_code == 2
