"""Plans against published costs, and the simulation against what must hold of any."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmr_ray import loading
from llmr_ray.assets import Asset
from llmr_ray.cli import app
from llmr_ray.errors import ConfigError
from llmr_ray.pipeline import _asset_names
from llmr_ray.planning.counts import num_compared, num_documents
from llmr_ray.planning.hardware import GPUS, Assumptions, gpu_of, seconds
from llmr_ray.planning.models import size_of
from llmr_ray.planning.simulation import simulate, time_of
from llmr_ray.planning.stages import plan
from llmr_ray.planning.work import Work
from llmr_ray.stages import StagePlan

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
    # MMLU and PopQA have copies of the corpora of MS MARCO and NQ.
    documents = 2 * (8_841_823 + 21_051_324) + 54_573_064 + 6_283_120 + 10_439
    own = 14 + 1
    chat, texts = (48_925 + 2_763) * own, (30_000 + 8 * 3_757) * (64 + 1)
    assert works["index_base"].units == documents + chat + texts
    assert works["index_base"].storage_bytes == (documents + chat + texts) * 768 * 4
    queries = works["embed_base"].units - works["index_base"].units
    tokens = (documents + chat + texts + queries) * 128
    assert works["embed_base"].flops == pytest.approx(2 * 85.6e6 * tokens)
    per_query = 128 + 8 * 128
    assert works["train"].tokens == 10_000 * 800 * per_query
    assert works["train"].flops == pytest.approx(6 * 85.6e6 * 10_000 * 800 * per_query)
    assert works["train"].memory_bytes > 16 * 109e6


PLANNED = [
    # Files without a name are bases of others.
    *(
        (path.relative_to(CONF).as_posix(), [])
        for path in sorted(CONF.rglob("*.yaml"))
        if "\nname: " in path.read_text() and path.parent.name != "studies"
    ),
    ("llm_r.yaml", ["rounds=3", "reward_model.model=''"]),
    ("arl2.yaml", ["annotators.other.model=Qwen/Qwen2.5-0.5B-Instruct", "rounds=2"]),
    ("arl2.yaml", ["labeling.enabled=false", "labeling.num_canaries=0"]),
    ("arl2_gold.yaml", ["rounds=2"]),
    ("small.yaml", ["tasks.qa.questions.num_documents=50"]),
]


@pytest.mark.parametrize(("path", "overrides"), PLANNED, ids=lambda value: str(value))
def test_a_plan_has_the_stages_that_run(path, overrides, tmp_path):
    """Prevents stages that nobody priced: the paper's seven compared embedders were most of its storage."""
    config = loading.load(CONF / path, overrides)
    asset = Asset(name="any", kind="model", path=tmp_path, fingerprint="any")
    annotators = {name: (asset, "asks") for name in config.annotators}
    real = StagePlan(config, dict.fromkeys(_asset_names(config), asset), "asks", annotators=annotators)
    assert [work.stage for work in plan(config, ASSUMED)] == [stage.name for stage in real.stages]


def test_embedders_that_are_compared_are_encoded_indexed_and_searched(paper):
    """Prevents a plan in which only the base and the trained embedder cost anything."""
    alone = replace(paper, evaluate=replace(paper.evaluate, methods=["none", "bm25", "base", "trained"]))
    with_one = replace(paper, evaluate=replace(paper.evaluate, methods=["none", "bm25", "base", "AAR", "trained"]))
    before, after = ({work.stage: work for work in plan(config, ASSUMED)} for config in (alone, with_one))
    assert set(after) - set(before) == {"embed_AAR", "index_AAR"}
    base = after["embed_base"]
    # T5's encoder, and the keys and values of its decoder: 85.0M + 12 layers * 2 * 768 ** 2 a token.
    assert after["embed_AAR"].flops == pytest.approx(base.flops * (85.0e6 + 12 * 2 * 768**2) / 85.6e6, rel=1e-3)
    assert after["embed_AAR"].storage_bytes == base.storage_bytes
    assert after["index_AAR"].storage_bytes == after["index_base"].storage_bytes
    # Each test query against its pool: its own corpus, or all examples.
    asked = {"nq": 3_610, "popqa": 14_267, "mmlu": 14_042, "qrecc": 8_209, "toolbench": 100}
    compared = sum(number * paper.datasets[name].num_documents for name, number in asked.items())
    icl = [data for data in paper.datasets.values() if data.task == "icl"]
    compared += sum(data.num_test for data in icl) * sum(data.num_documents for data in icl)
    per_core = ASSUMED.core_flops * ASSUMED.utilisation
    queries = sum(data.num_test for data in paper.datasets.values())
    further = after["evaluate"].cpu_seconds - before["evaluate"].cpu_seconds
    assert further == pytest.approx(2 * 768 * compared / per_core + queries / 50)
    on_gpus = replace(with_one, runtime=replace(paper.runtime, index_gpus=1))
    (search,) = (work for work in plan(on_gpus, ASSUMED) if work.stage == "evaluate")
    assert search.flops - after["evaluate"].flops == pytest.approx(3 * 2 * 768 * compared)


def test_a_shared_pool_is_searched_as_a_whole():
    """Prevents questions without passages from being planned as if they searched nothing, or brought a corpus."""
    config = loading.load(CONF / "arl2.yaml")
    assert num_documents(config, ASSUMED) == 5000 + 1000
    assert num_compared(config, ASSUMED, [(config.datasets["nq_open"], 7)]) == 7 * (5000 + 1000)


def test_another_embedder_is_priced_by_its_own_size():
    """Prevents a large retriever that is planned with the vectors of the base embedder."""
    config = loading.load(CONF / "small.yaml", ["evaluate.methods=[base,BGE,trained]", BGE_LARGE])
    works = {work.stage: work for work in plan(config, ASSUMED)}
    assert works["index_BGE"].storage_bytes == works["index_base"].storage_bytes * 1024 / 384
    told = json.loads(planned(CONF / "small.yaml", "evaluate.methods=[base,BGE,trained]", BGE_LARGE))
    assert told["guessed_sizes"] == ["some/encoder-large"]


BGE_LARGE = (
    "evaluate.embedders={BGE: {model: some/encoder-large, pooling: cls, max_query_tokens: 64, max_document_tokens: 64}}"
)


def planned(path, *overrides):
    """What `llmr plan --json` prints."""
    done = CliRunner().invoke(app, ["plan", str(path), *overrides, "--json"])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_later_rounds_mine_as_they_are_told_and_read_what_is_new():
    """LLM-R's second round mines BM25's 100 and its embedder's 100: twice the pairs to teach and to group."""
    config = loading.load(CONF / "paper" / "llm_r.yaml")
    works = {work.stage: work for work in plan(config, ASSUMED)}
    queries = sum(data.num_train for data in config.datasets.values())
    assert works["teach_1"].units == queries * 101
    assert works["teach"].units == queries * 201
    assert works["teach"].flops == pytest.approx(works["teach_1"].flops * 201 / 101)
    for stage in ("mine", "group", "reward"):
        assert works[stage].storage_bytes == pytest.approx(works[f"{stage}_1"].storage_bytes * 201 / 101)
    # BM25 alone mines first: nothing is compared with the index but by BM25.
    assert works["mine"].cpu_seconds > works["mine_1"].cpu_seconds
    # The store has the answers of eight methods; the second embedder's are new.
    tested = sum(min(limit, config.datasets[name].num_test) for name, limit in config.evaluate.num_llm_queries.items())
    assert (works["evaluate_1"].units, works["evaluate"].units) == (9 * tested, tested)
    assert works["evaluate"].cpu_seconds > works["evaluate_1"].cpu_seconds


def test_a_candidate_without_a_limit_of_its_own_is_no_free_one():
    """`llm.max_candidate_tokens: 0` cuts candidates only where the prompt is too long."""
    limited, whole = (
        next(work.tokens for work in plan(loading.load(CONF / "paper" / "llm_r.yaml", [setting]), ASSUMED)
             if work.stage == "score")
        for setting in ("llm.max_candidate_tokens=512", "llm.max_candidate_tokens=0")
    )  # fmt: skip
    assert whole > limited


def test_what_does_not_fit_is_told(monkeypatch):
    """Prevents 146 GB of a training on two workers from standing beside A100-40G hours without a word."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = CONF / "paper" / "llm_embedder_acl.yaml"

    def train(*overrides):
        return next(stage for stage in json.loads(planned(path, *overrides))["stages"] if stage["stage"] == "train")

    two = train("runtime.train_workers=2")
    # Half of 800 queries, each of 128 + 8 * 128 tokens, 34 * 12 bytes a token and dimension; weights and moments.
    assert two["memory_bytes"] == pytest.approx(400 * 1152 * 768 * 34 * 12 + 16 * 109.5e6)
    assert two["too_small"] == list(GPUS)
    assert train("runtime.train_workers=8")["too_small"] == ["T4", "L4", "V100"]
    cached = train("runtime.train_workers=2", "runtime.train_grad_cache=true")
    assert cached["memory_bytes"] == pytest.approx(32768 * 768 * 34 * 12 + 16 * 109.5e6)
    done = CliRunner().invoke(app, ["plan", str(path), "runtime.train_workers=2", "runtime.llm_gpus=1"])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "! train takes 146GB of each GPU" in said
    assert "runtime.train_grad_cache" in said
    hours = next(line for line in done.output.split("GPU hours")[1].splitlines() if line.startswith("train "))
    assert hours.count("!") == len(GPUS)
    # Every worker of mine maps the whole index; its workers on one node share it.
    works = {work.stage: work for work in plan(loading.load(path), ASSUMED)}
    assert works["mine"].memory_bytes == 0
    assert works["mine"].node_bytes == works["index_base"].storage_bytes * 5 / 4
    assert "! mine opens" in said
    assert "! mine" not in CliRunner().invoke(app, ["plan", str(path), "--node-memory-gb", "1000"]).output


def test_a_model_over_several_gpus_takes_a_part_of_each():
    """Prevents the warning from staying where its own advice was taken."""
    path = CONF / "paper" / "llm_embedder_acl.yaml"
    one, two = (
        next(work for work in plan(loading.load(path, [f"runtime.llm_gpus={gpus}"]), ASSUMED) if work.stage == "score")
        for gpus in (1, 2)
    )
    assert one.memory_bytes - two.memory_bytes == pytest.approx(6.74e9)
    assert not one.fits(replace(GPUS["T4"], memory_bytes=1e10))
    assert two.fits(replace(GPUS["T4"], memory_bytes=1e10))


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
                *(f"datasets.{name}.num_train=0" for name, data in paper.datasets.items() if data.task == "icl"),
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
