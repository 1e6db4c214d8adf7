"""The endpoint engine against a real server: vLLM serving the real model on this machine."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmr_ray.assets import resolve
from llmr_ray.config import Config, LLMConfig, RuntimeConfig
from llmr_ray.feedback.engine import Engine, EngineSettings, Sampling, open_engine
from llmr_ray.feedback.labels import Said, answer_schema, parse_answer

pytestmark = pytest.mark.slow

NAME = "served"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("vllm") / "log").open("w+")
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)),
        *("--model", str(resolve("smollm2-135m-instruct").path), "--served-model-name", NAME, "--dtype", "float32"),
        *("--max-model-len", "1024", "--enforce-eager", "--block-size", "32", "--max-num-seqs", "16"),
    ]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
    }
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    deadline = time.monotonic() + 300
    try:
        while True:
            assert server.poll() is None, Path(log.name).read_text()[-3000:]
            assert time.monotonic() < deadline, Path(log.name).read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=60)


def open_one(engine: str, **llm: str) -> Engine:
    config = Config(llm=LLMConfig(engine=engine, max_model_tokens=512, **llm), runtime=RuntimeConfig(llm_threads=2))
    return open_engine(EngineSettings.of(config, resolve("smollm2-135m-instruct").path))


@pytest.mark.timeout(600)
def test_a_served_model_scores_and_answers_like_the_model_itself(endpoint: str) -> None:
    """Spans, order and seeds must survive the way over HTTP."""
    served = open_one("openai", endpoint=endpoint, endpoint_model=NAME)
    reference = open_one("transformers")
    ids = tuple(served.tokenizer(Path(__file__).read_text())["input_ids"])
    pairs = [(ids[start : start + 40 + start % 7], ids[start + 60 : start + 61 + start % 5]) for start in range(40)]
    for got, expected in zip(served.likelihood(pairs), reference.likelihood(pairs), strict=True):
        assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-2)
    prompt = tuple(served.tokenizer("Question: What is the capital of France?\n\nAnswer:")["input_ids"])
    greedy = Sampling(prompt_ids=prompt, num_samples=1, max_new_tokens=8, temperature=0.0, seed=0, stop=("\n",))
    assert served.sample([greedy])[0].texts == reference.sample([greedy])[0].texts
    drawn = Sampling(prompt_ids=prompt, num_samples=4, max_new_tokens=8, temperature=1.0, seed=2**40)
    [first] = served.sample([drawn])
    assert len(set(first.texts)) > 1
    assert served.sample([drawn])[0].texts == first.texts
    label = replace(greedy, max_new_tokens=80, stop=(), output_schema=answer_schema(1, 20))
    [said] = parse_answer(served.sample([label])[0].texts[0], 1).values()
    assert isinstance(said, Said)


@pytest.mark.timeout(600)
def test_a_chat_answers_like_the_model_in_its_template(endpoint: str) -> None:
    """The route sends text and the server puts its template around it: what comes back must be the model's turn."""
    chat, reference = open_one("openai_chat", endpoint=endpoint, endpoint_model=NAME), open_one("transformers")
    text = "What is the capital of France?"
    turn = [{"role": "user", "content": text}]
    templated = reference.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    asked, expected = (
        Sampling(
            prompt_ids=tuple(reference.tokenizer(prompt)["input_ids"]),
            num_samples=1,
            max_new_tokens=8,
            temperature=0.0,
            seed=0,
        )
        for prompt in (text, templated)
    )
    [said] = chat.sample([asked])
    assert said.texts == reference.sample([expected])[0].texts
    assert said.num_computed_tokens == len(expected.prompt_ids) + 8, "the endpoint's own count, its template with it"
    drawn = replace(asked, num_samples=4, temperature=1.0, seed=2**40)
    assert len(set(chat.sample([drawn])[0].texts)) > 1
    label = replace(asked, max_new_tokens=80, output_schema=answer_schema(1, 20))
    [parsed] = parse_answer(chat.sample([label])[0].texts[0], 1).values()
    assert isinstance(parsed, Said)
