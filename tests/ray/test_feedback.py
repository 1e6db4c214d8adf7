"""The pool of engine actors under Ray, and vLLM against the reference engine on a real LLM."""

import dataclasses
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from ray import cloudpickle

from llmr_ray.artifacts import Artifact
from llmr_ray.assets import Asset, resolve
from llmr_ray.config import BudgetConfig, Config, LLMConfig, RuntimeConfig
from llmr_ray.errors import BudgetError, ResourceError
from llmr_ray.feedback import labels, pool
from llmr_ray.feedback.engine import EngineSettings, Sampling, open_engine
from llmr_ray.feedback.fitting import fit_prompt
from llmr_ray.feedback.pool import RayClient
from llmr_ray.feedback.requests import LLMRequest, Segment
from llmr_ray.feedback.stage import run_score, score_spec
from llmr_ray.feedback.store import LLMStore
from tests.feedback_world import PASSAGES, make_config, make_world
from tests.tiny_llm import save_model

# Ray's workers cannot import a test module by name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return Asset("tiny", "model", save_model(tmp_path_factory.mktemp("llm")), "f")


def scored(root, llm, num_queries, **runtime):
    config = make_config(root, **runtime)
    prepare, candidates = make_world(root, num_queries)
    artifact = Artifact(root, score_spec(config, llm, prepare, candidates))
    artifact.begin()
    client = RayClient(config, llm)
    try:
        run_score(config, artifact, client, prepare, candidates)
    finally:
        client.close()
    return artifact, client


def kill_an_actor_when(store, num_answers, killed):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not killed:
        if len(LLMStore(store)) >= num_answers:
            for process in psutil.Process().children(recursive=True):  # our own Ray's, not a neighbour's
                if "EngineActor.compute" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)
                    return
        time.sleep(0.02)


def test_killed_actor_costs_nothing_committed_and_changes_no_byte(local_ray, tmp_path, llm):
    """Labelling runs for days on machines that go away: a kill may cost seconds, never answers or numbers."""
    whole, _ = scored(tmp_path / "whole", llm, 24)
    config = make_config(tmp_path / "hurt")
    killed = []
    store = RayClient(config, llm).store.folder
    killer = threading.Thread(target=kill_an_actor_when, args=(store, 40, killed), daemon=True)
    killer.start()
    hurt, _ = scored(tmp_path / "hurt", llm, 24)
    killer.join()
    assert killed, "the work was over before the actor could be killed"
    part = "parts/llm_scores-00000.parquet"
    assert (hurt.path / part).read_bytes() == (whole.path / part).read_bytes()
    keys = [key for segment in store.glob("seg-*.parquet") for key in pq.read_table(segment)["key"].to_pylist()]
    assert len(keys) == len(set(keys))


def test_actor_count_does_not_change_a_byte(local_ray, tmp_path, llm):
    """Order of completion and number of actors are speed, not science."""
    one, _ = scored(tmp_path / "one", llm, 10)
    two, _ = scored(tmp_path / "two", llm, 10, llm_actors=2)
    part = "parts/llm_scores-00000.parquet"
    assert (one.path / part).read_bytes() == (two.path / part).read_bytes()


def test_engine_that_cannot_start_is_an_error_at_once(local_ray, tmp_path, llm):
    """With endless restarts a missing model would otherwise look like slow progress for ever."""
    client = RayClient(make_config(tmp_path), Asset("none", "model", tmp_path / "nothing", "f"))
    with pytest.raises(ResourceError, match=r"config\.json"):
        client.answer([question()], label="test")


def test_stall_is_an_error_that_says_what_was_waited_for(local_ray, tmp_path, llm):
    """A hang must never be silent."""
    client = RayClient(make_config(tmp_path, stall_timeout_s=0.1), llm)
    with pytest.raises(ResourceError, match="stall_timeout_s"):
        client.answer([question()], label="test")
    client.close()


class DeadlyActor(pool.EngineActor):
    """Dies over every prompt that holds the word poison."""

    def compute(self, chunk, route):
        if any("poison" in segment.text for request in chunk.requests for segment in request.segments):
            os.kill(os.getpid(), signal.SIGKILL)
        return pool.EngineActor.compute(self, chunk, route)


@pytest.mark.slow
def test_a_request_that_kills_the_engine_is_a_row_error(local_ray, tmp_path, llm, monkeypatch):
    """One prompt that is too much for the memory must not restart actors for ever, nor cost its neighbours."""
    monkeypatch.setattr(pool, "EngineActor", DeadlyActor)
    client = RayClient(make_config(tmp_path), llm)
    texts = [f"Question {n}:" for n in range(150)]
    texts[70] = "Question poison:"
    results = client.answer([question(request_id=text, segments=(Segment(text=text),)) for text in texts], label="test")
    client.close()
    assert [result.request_id for result in results if result.error is not None] == ["Question poison:"]
    assert "died" in results[70].error
    assert len(client.store) == 149


class StillbornActor(pool.EngineActor):
    """Dies while it starts, the first three times on a machine."""

    def __init__(self, settings, name, folder):
        marks = Path(folder).parent / "marks"
        marks.mkdir(parents=True, exist_ok=True)
        if len(list(marks.iterdir())) < 3:
            (marks / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().__init__(settings, name, folder)


@pytest.mark.slow
def test_actors_that_die_while_they_start_are_no_matter_of_what_they_were_asked(local_ray, tmp_path, llm, monkeypatch):
    """Requests that are asked one by one, as after deaths over them, have other numbers in bfloat16 than together."""
    whole, _ = scored(tmp_path / "whole", llm, 24)
    monkeypatch.setattr(pool, "EngineActor", StillbornActor)
    hurt, client = scored(tmp_path / "hurt", llm, 24)
    part = "parts/llm_scores-00000.parquet"
    assert (hurt.path / part).read_bytes() == (whole.path / part).read_bytes()
    assert len(list((client.store.folder.parent / "marks").iterdir())) == 3
    segments = [len(list((tmp_path / name).rglob("seg-*.parquet"))) for name in ("whole", "hurt")]
    assert segments[0] == segments[1], "chunks were taken apart"


class SleepyActor(pool.EngineActor):
    """Is stopped, as if it hung, the first time that a machine-wide mark is not there yet."""

    def compute(self, chunk, route):
        mark = Path(self.client.store.folder).parent / "mark"
        if not mark.exists():
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        return pool.EngineActor.compute(self, chunk, route)


@pytest.mark.slow
def test_an_engine_that_hangs_is_replaced(local_ray, tmp_path, llm, monkeypatch):
    """A driver bug that freezes one GPU must cost its chunk and a time-out, not the night."""
    monkeypatch.setattr(pool, "EngineActor", SleepyActor)
    client = RayClient(make_config(tmp_path, stall_timeout_s=45), llm)
    results = client.answer([question(request_id=str(n), seed=n) for n in range(3)], label="test")
    client.close()
    assert [result.error for result in results] == [None] * 3


def test_a_budget_stops_the_run_and_the_next_goes_on(local_ray, tmp_path, llm):
    """Money runs out in the middle of a job: what was paid for must be there the next day."""
    limited = dataclasses.replace(make_config(tmp_path), budget=BudgetConfig(max_tokens=500))
    asked = [question(request_id=str(n), segments=(Segment(text=f"Question {n}: what?"),)) for n in range(500)]
    client = RayClient(limited, llm)
    with pytest.raises(BudgetError, match=r"budget\.max_tokens"):
        client.answer(asked, label="test")
    client.close()
    paid = len(client.store)
    assert 0 < paid < 500
    client = RayClient(make_config(tmp_path), llm)
    results = client.answer(asked, label="test")
    client.close()
    assert sum(result.cached for result in results) == paid
    assert all(result.error is None for result in results)


def question(**fields):
    return LLMRequest(
        **({"request_id": "r", "unit": "u", "segments": (Segment(text="Q:"),), "targets": (" Paris",)} | fields)
    )


class EngineHost:
    """An engine in an actor. vLLM cannot start where llvmlite is loaded (it walks over every loaded module), and numba,
    which the tests of BM25 bring along, loads it.
    """

    def __init__(self, settings):
        self.engine = open_engine(settings)

    def ask(self, method, *args):
        return getattr(self.engine, method)(*args)


class RemoteEngine:
    """The methods of an engine, asked of its host."""

    def __init__(self, host, tokenizer):
        self.host, self.tokenizer = host, tokenizer

    def __getattr__(self, method):
        return lambda *args: ray.get(self.host.ask.remote(method, *args))


@pytest.fixture(scope="module")
def engines(local_ray):
    path = resolve("smollm2-135m-instruct").path
    config = Config(llm=LLMConfig(max_model_tokens=512, engine="transformers"), runtime=RuntimeConfig(llm_threads=1))
    reference = open_engine(EngineSettings.of(config, path))
    config = Config(llm=LLMConfig(max_model_tokens=512), runtime=RuntimeConfig(llm_threads=1))
    host = ray.remote(EngineHost).remote(EngineSettings.of(config, path))
    yield RemoteEngine(host, reference.tokenizer), reference
    ray.kill(host)


def some_pairs(tokenizer):
    text = "\n".join(f"{n}. {passage}" for n, passage in enumerate(Path(__file__).read_text().split("\n")))
    ids = tuple(tokenizer(text)["input_ids"])
    # Prompts around and at whole cache blocks, where the cache holds the row that predicts the first target token.
    pairs = [
        (ids[:length], ids[500 + 9 * number : 504 + 10 * number])
        for length in (1, 31, 32, 33, 64, 100, 128)
        for number in range(4)
    ]
    return [*pairs, (ids[:64], ids[64:130]), (ids[:40], ids[40:104])]


def test_vllm_gives_the_reference_s_log_probabilities(engines):
    """Read from the prefix cache, log-probabilities of cached positions are stale memory (the guard of engine_vllm)."""
    vllm, reference = engines
    pairs = some_pairs(vllm.tokenizer)
    expected = reference.likelihood(pairs)
    vllm.begin()
    first = vllm.likelihood(pairs)
    again = vllm.likelihood(pairs)
    vllm.begin()
    afresh = vllm.likelihood(pairs)
    for results in (first, again, afresh):
        for result, oracle in zip(results, expected, strict=True):
            assert result.logprobs == pytest.approx(oracle.logprobs, abs=1e-2)
    assert [result.logprobs for result in afresh] == [result.logprobs for result in first]
    computed = sum(result.num_computed_tokens for result in first)
    assert computed < 0.9 * sum(result.num_computed_tokens for result in expected)


def test_vllm_goes_on_after_a_call_that_fails(engines):
    """A poison row must cost itself alone: its neighbours are asked again, one by one, by the same engine."""
    vllm, _ = engines
    sound = some_pairs(vllm.tokenizer)[8]
    vllm.begin()
    expected = vllm.likelihood([sound])
    with pytest.raises(ray.exceptions.RayTaskError):
        vllm.likelihood([sound, ((5, 6, 10**7), (8, 9))])  # no such token
    vllm.begin()
    assert vllm.likelihood([sound]) == expected


def test_vllm_samples_by_seed_and_agrees_when_greedy(engines):
    """A draw that cannot be repeated makes a rank reward that cannot be checked."""
    vllm, reference = engines
    ids = tuple(vllm.tokenizer("Question: What is the capital of France?\n\nAnswer:")["input_ids"])
    greedy = Sampling(prompt_ids=ids, num_samples=1, max_new_tokens=8, temperature=0.0, seed=0, stop=("\n",))
    vllm.begin()
    assert vllm.sample([greedy])[0].texts == reference.sample([greedy])[0].texts
    silent = tuple(vllm.tokenizer("Question: What is the capital of France?\nAnswer: Paris.")["input_ids"])
    must = dataclasses.replace(greedy, prompt_ids=silent, says_something=True)
    assert vllm.sample([dataclasses.replace(must, says_something=False)])[0].texts == ("",)
    [spoken] = vllm.sample([must])
    assert spoken.texts[0].strip()
    assert spoken.texts == reference.sample([must])[0].texts
    drawn = Sampling(prompt_ids=ids, num_samples=4, max_new_tokens=8, temperature=1.0, seed=2**62 + 5)
    vllm.begin()
    [first] = vllm.sample([drawn])
    vllm.begin()
    assert vllm.sample([drawn]) == [first]
    assert len(set(first.texts)) > 1


def test_every_label_of_a_real_llm_parses(engines):
    """A model of 135M parameters writes no JSON of its own accord; vLLM and the reference must mask the same tokens."""
    vllm, reference = engines
    passages = PASSAGES[:3]
    answers = {"num_samples": 1, "temperature": 0.0, "max_new_tokens": labels.answer_tokens(len(passages), 40)}
    jobs = []
    for number in range(6):
        segments = labels.label_segments(f"What is the capital of country {number}?", passages, 60)
        asked = LLMRequest(
            request_id=str(number),
            unit="u",
            segments=segments,
            output_schema=labels.answer_schema(len(passages), 40),
            **answers,
        )
        fitted = fit_prompt(vllm.tokenizer, asked, 512)
        jobs.append(Sampling(prompt_ids=fitted.prompt_ids, seed=0, output_schema=asked.output_schema, **answers))
    vllm.begin()
    found = vllm.sample(jobs)
    for sampled in found:
        said = labels.parse_answer(sampled.texts[0], len(passages))
        assert not [reason for reason in said.values() if isinstance(reason, str)], sampled.texts[0]
    assert [result.texts for result in found[:1]] == [result.texts for result in reference.sample(jobs[:1])]
    free = dataclasses.replace(jobs[0], output_schema="", max_new_tokens=8)
    assert vllm.sample([free])[0].texts == reference.sample([free])[0].texts
