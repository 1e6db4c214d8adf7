"""The endpoint engine against a small HTTP server that answers as OpenAI-compatible servers do, and as they fail."""

import dataclasses
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llmr_ray import loading
from llmr_ray.config import ENDPOINTS
from llmr_ray.errors import ConfigError, ResourceError
from llmr_ray.feedback import engine_openai
from llmr_ray.feedback.engine import EngineSettings, Sampling
from llmr_ray.feedback.engine_openai import OpenAIChatEngine, OpenAIEngine
from tests.tiny_llm import TEXT, make_tokenizer


class Endpoint:
    """A server on a free port. The log-probability of token t at place p is -(t + p / 1000); `failures` come first."""

    def __init__(self, failures=(), *, echoes=True, extra_tokens=0, counts=True, withholds=False):
        self.counts, self.withholds = counts, withholds
        self.requests, self.failures = [], list(failures)
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.requests.append((self.path, self.headers["Authorization"], body))
                status, headers, answer = endpoint.failures.pop(0) if endpoint.failures else (200, {}, None)
                data = json.dumps(answer or endpoint.answer(body)).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.echoes, self.extra_tokens = echoes, extra_tokens
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, body):
        if "messages" in body:
            return self.chat(body)
        prompts, number = body["prompt"], body.get("n") or 1
        choices = []
        for prompt in prompts:
            for _ in range(number):
                logprobs = None
                if body.get("echo") and self.echoes:
                    values = [None, *(-(token + place / 1000) for place, token in enumerate(prompt) if place), -1.0]
                    logprobs = {"token_logprobs": values, "tokens": [], "top_logprobs": [], "text_offset": []}
                choices.append({"index": len(choices), "text": f" {sum(prompt)} {len(choices)}", "logprobs": logprobs,
                                "finish_reason": "stop"})  # fmt: skip
        choices.reverse()
        sent = sum(map(len, prompts)) + self.extra_tokens
        usage = {"prompt_tokens": sent, "completion_tokens": 2 * len(choices), "total_tokens": 0}
        return {"id": "x", "object": "text_completion", "created": 0, "model": body["model"], "choices": choices,
                "usage": usage}  # fmt: skip

    def chat(self, body):
        [turn] = body["messages"]
        said = [None if self.withholds else f"{turn['content']}!{number}" for number in range(body["n"])]
        choices = [
            {"index": number, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
            for number, content in reversed(list(enumerate(said)))
        ]
        usage = {"prompt_tokens": 50, "completion_tokens": 9, "total_tokens": 59} if self.counts else None
        return {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices,
                "usage": usage}  # fmt: skip

    def engine(self, made=OpenAIEngine, tokenizer=None):
        settings = EngineSettings(
            path="", engine="openai", dtype="float32", max_model_tokens=100, num_threads=1, kv_cache_gb=1,
            max_batched_tokens=1, max_sequences=64, endpoint=f"http://127.0.0.1:{self.server.server_port}/v1",
            endpoint_model="m",
        )  # fmt: skip
        return made(settings, tokenizer)


@pytest.fixture
def serve():
    made = []

    def make(*args, **kwargs):
        made.append(Endpoint(*args, **kwargs))
        return made[-1]

    yield make
    for endpoint in made:
        endpoint.server.shutdown()
        endpoint.server.server_close()


PAIRS = [((5, 6, 7), (8, 9)), *(((n, n), (n,)) for n in range(40))]
JOB = Sampling(prompt_ids=(1, 2), num_samples=3, max_new_tokens=4, temperature=1.0, seed=2**40 + 7, stop=("\n",))


def test_log_probabilities_are_those_of_the_target(serve, monkeypatch):
    """Shifted by one, or given to another prompt of the batch, they would still look like log-probabilities."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    endpoint = serve()
    scored = endpoint.engine().likelihood(PAIRS)
    assert scored[0].logprobs == pytest.approx((-8.003, -9.004))
    assert [result.logprobs for result in scored[1:]] == [pytest.approx((-(n + 0.002),)) for n in range(40)]
    assert sum(result.num_computed_tokens for result in scored) == 5 + 3 * 40
    assert len(endpoint.requests) == 3
    assert {header for _, header, _ in endpoint.requests} == {"Bearer secret"}


def test_samples_carry_their_settings(serve):
    """An endpoint's own defaults (top-p, length, no seed) would draw from another distribution."""
    endpoint = serve()
    [sampled] = endpoint.engine().sample([JOB])
    assert sampled.texts == (" 3 0", " 3 1", " 3 2")
    assert (sampled.num_output_tokens, sampled.num_computed_tokens) == (6, 8)
    body = endpoint.requests[0][2]
    expected = {"prompt": [[1, 2]], "n": 3, "max_tokens": 4, "temperature": 1.0, "seed": (2**40 + 7) % 2**31}
    assert {key: body[key] for key in expected} == expected
    assert body["stop"] == ["\n"]


def test_a_schema_travels_with_the_question(serve):
    """Without it a model chats about the passages, and nothing of that can be read. Others must not be sent one."""
    endpoint = serve()
    engine = endpoint.engine()
    engine.sample([dataclasses.replace(JOB, output_schema='{"type":"object"}'), JOB])
    bodies = [body for _, _, body in endpoint.requests]
    [asked] = [body["response_format"] for body in bodies if "response_format" in body]
    assert asked["type"] == "json_schema"
    assert asked["json_schema"]["schema"] == {"type": "object"}
    assert len(bodies) == 2


def test_the_chat_route_is_sent_the_prompt_as_a_turn(serve):
    """Most commercial endpoints have no other route; what is sent must be the prompt that was cut to fit, as text."""
    endpoint, tokenizer = serve(), make_tokenizer()
    job = dataclasses.replace(JOB, prompt_ids=tuple(tokenizer(TEXT)["input_ids"]), output_schema='{"type":"object"}')
    [sampled] = endpoint.engine(OpenAIChatEngine, tokenizer).sample([job])
    assert sampled.texts == tuple(f"{TEXT}!{number}" for number in range(3))
    assert (sampled.num_output_tokens, sampled.num_computed_tokens) == (9, 59)
    [(path, _, body)] = endpoint.requests
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": TEXT}]
    expected = {"n": 3, "max_completion_tokens": 4, "temperature": 1.0, "seed": (2**40 + 7) % 2**31, "stop": ["\n"]}
    assert {key: body[key] for key in expected} == expected
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert "echo" not in body


def test_a_chat_that_withholds_or_does_not_count(serve):
    """A refused turn has no content, and some endpoints tell no usage: neither may end a run."""
    tokenizer = make_tokenizer()
    job = dataclasses.replace(JOB, prompt_ids=tuple(tokenizer(TEXT)["input_ids"]), stop=())
    endpoint = serve(withholds=True, counts=False)
    [sampled] = endpoint.engine(OpenAIChatEngine, tokenizer).sample([job])
    assert (sampled.texts, sampled.num_output_tokens) == (("",) * 3, 0)
    assert sampled.num_computed_tokens == len(job.prompt_ids)
    assert "stop" not in endpoint.requests[0][2]


def test_a_chat_is_asked_for_no_likelihood(serve):
    """Made-up scores would train; the user must learn what the route cannot do, and what to do instead."""
    endpoint = serve()
    with pytest.raises(ConfigError, match=r"openai_chat.*reader"):
        endpoint.engine(OpenAIChatEngine).likelihood(PAIRS[:1])
    assert not endpoint.requests


def test_overload_is_waited_for(serve):
    """429 and 503 are the normal life of an endpoint, not the end of a run of days."""
    busy = {"error": {"message": "slow down"}}
    endpoint = serve([(429, {"Retry-After": "0"}, busy), (503, {"Retry-After": "0"}, busy)])
    assert endpoint.engine().likelihood(PAIRS[:1])[0].logprobs == pytest.approx((-8.003, -9.004))
    assert len(endpoint.requests) == 3


def test_an_endpoint_that_stays_away_is_an_error_to_resume_from(serve, monkeypatch):
    """After the retries the user must learn what is gone and that nothing is lost."""
    monkeypatch.setattr(engine_openai, "MAX_RETRIES", 1)
    endpoint = serve([(500, {"Retry-After": "0"}, {"error": {"message": "broken"}})] * 9)
    with pytest.raises(ResourceError, match=r"retries.*kept"):
        endpoint.engine().likelihood(PAIRS[:1])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_not_retried(serve, status):
    """A wrong key asked ten times over is ten lines in somebody's security log."""
    endpoint = serve([(status, {}, {"error": {"message": "no"}})])
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        endpoint.engine().sample([JOB])
    assert len(endpoint.requests) == 1


def test_an_endpoint_without_echo_is_told_apart(serve):
    """Most commercial endpoints ignore echo: scores made of nothing would be worse than an error."""
    with pytest.raises(ConfigError, match="does not return the log-probabilities"):
        serve(echoes=False).engine().likelihood(PAIRS[:1])


def test_another_tokenizer_is_told_apart(serve):
    """Ids of another vocabulary score another text, without any error."""
    engine = serve(extra_tokens=1).engine()
    with pytest.raises(ConfigError, match="another tokenizer"):
        engine.likelihood(PAIRS[:1])
    with pytest.raises(ConfigError, match="another tokenizer"):
        engine.sample([JOB])


def test_a_configuration_names_the_endpoint(tmp_path):
    """The mistake should show before data is prepared, not when the first question is asked."""
    path = tmp_path / "c.yaml"
    for engine in ENDPOINTS:
        path.write_text(f"llm: {{engine: {engine}, endpoint: 'http://x/v1'}}\n")
        with pytest.raises(ConfigError, match="endpoint_model"):
            loading.load(path)


def test_a_chat_cannot_rank_by_likelihood(tmp_path):
    """Else data is prepared, embedded and mined before the first question is refused."""
    path = tmp_path / "c.yaml"
    conf = Path(__file__).parents[2] / "conf"
    text = f"base: {conf / 'llm_embedder.yaml'}\n"
    text += "datasets: {squad: {task: qa, source: squad, num_train: 8}}\n"
    text += "llm: {engine: openai_chat, endpoint: 'http://x/v1', endpoint_model: m}\n"
    path.write_text(f"{text}tasks: {{qa: {{score: {{feedback: likelihood}}}}}}\n")
    with pytest.raises(ConfigError, match=r"openai_chat.*likelihood"):
        loading.load(path)
    path.write_text(f"{text}tasks: {{qa: {{score: {{feedback: label}}}}}}\n")
    assert loading.load(path).llm.engine == "openai_chat"
