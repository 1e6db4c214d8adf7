"""From request to log-probabilities: token spans, cutting, engines, and who pays for what."""

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from llmr_ray.errors import ConfigError, DataError, ResourceError
from llmr_ray.evaluation.examples import request as prompt_of_examples
from llmr_ray.feedback import chunks
from llmr_ray.feedback.client import LocalClient
from llmr_ray.feedback.engine import EngineSettings, Sampled, Sampling, Scored, open_engine, silent_ids
from llmr_ray.feedback.fitting import FitError, fit_prompt, fit_targets
from llmr_ray.feedback.prompts import EXAMPLE_END, feedback_segments
from llmr_ray.feedback.requests import LLMRequest, Segment
from llmr_ray.feedback.store import LLMStore
from tests.tiny_llm import TEXT, make_tokenizer, save_model


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def request(*texts, **fields):
    segments = tuple(text if isinstance(text, Segment) else Segment(text=text) for text in texts)
    return LLMRequest(**({"request_id": "r", "unit": "u", "segments": segments, "max_new_tokens": 1} | fields))


def fit(tokenizer, asked, target, limit=200):
    [fitted] = fit_targets(tokenizer, asked, [target], limit)
    if isinstance(fitted, FitError):
        raise fitted
    return fitted


# --- spans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [" Paris", " thank you very much.", " naïve 日本 👍🏽", "\nParis"])
def test_target_tokens_are_those_of_the_joint_text(tokenizer, target):
    """A token too many or too few in the span shifts every likelihood (methods.md I.16)."""
    prompt = "Question: what is the capital of France?\n\nAnswer:"
    fitted = fit(tokenizer, request(prompt), target)
    assert list(fitted.prompt_ids + fitted.target_ids) == tokenizer(prompt + target)["input_ids"]
    assert tokenizer.decode(fitted.prompt_ids) == prompt
    assert tokenizer.decode(fitted.target_ids) == target
    assert not fitted.truncated


def test_token_across_the_border_belongs_to_the_prompt(tokenizer):
    """Tokenising prompt and target apart would score tokens that the joint text does not have."""
    whole = tokenizer(" capital")["input_ids"]
    assert len(whole) == 1, "the test needs a merged word"
    fitted = fit(tokenizer, request("The cap"), "ital of France")
    assert tokenizer.decode(fitted.prompt_ids) == "The capital"
    assert tokenizer.decode(fitted.target_ids) == " of France"


def test_special_tokens_in_front_stay_and_those_behind_go():
    """A BOS the model was trained with must be there; an EOS in the middle ends the text before the target."""
    tokenizer = make_tokenizer(bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fitted = fit(tokenizer, request("Question: what?"), " Paris")
    ids = fitted.prompt_ids + fitted.target_ids
    assert ids[0] == 0
    assert 1 not in ids
    assert tokenizer.decode(fitted.target_ids) == " Paris"


# --- cutting ---------------------------------------------------------------------------------------------------------


def test_cutting_follows_the_order_and_the_side(tokenizer):
    """The candidate goes first, the query's beginning next; instructions and the desired output never."""
    candidate = Segment(text="The river runs through the old town. " * 3, trim_order=1)
    query = Segment(text=" hello there, how are you doing today?", trim_order=2, trim_side="left")
    asked = request("Knowledge:", candidate, " Question:", query, " Answer:")
    full = len(fit(tokenizer, asked, " Paris").prompt_ids)

    some = fit(tokenizer, asked, " Paris", limit=full - 5)
    text = tokenizer.decode(some.prompt_ids)
    assert some.truncated
    assert len(some.prompt_ids + some.target_ids) <= full - 5
    assert text.startswith("Knowledge:The river runs")
    assert text.endswith(" Question: hello there, how are you doing today? Answer:")

    least = fit(tokenizer, asked, " Paris", limit=18)
    text = tokenizer.decode(least.prompt_ids)
    assert text.startswith("Knowledge: Question:")
    assert text.endswith(" today? Answer:")
    assert tokenizer.decode(least.target_ids) == " Paris"
    assert len(least.prompt_ids + least.target_ids) <= 18


@pytest.mark.parametrize("limit", range(20, 60))
def test_never_longer_than_allowed_nor_shorter_than_needed(tokenizer, limit):
    """One token too long is an engine error; cutting far too much throws the candidate away."""
    asked = request("Knowledge:", Segment(text=" 日本語 naïve the mill" * 8, trim_order=1), " Answer:")
    fitted = fit(tokenizer, asked, " Paris", limit=limit)
    assert limit - 4 <= len(fitted.prompt_ids + fitted.target_ids) <= limit


@pytest.mark.parametrize("own", [24, 500])
def test_a_requests_own_limit_holds_beside_the_engines(tokenizer, own):
    """A task's published limit that is ignored, or one above what the engine reads, which fails there."""
    asked = request(Segment(text=TEXT, trim_order=1), " Answer:", max_tokens=own, max_new_tokens=8)
    assert fit(tokenizer, asked, " Paris", limit=40) == fit(
        tokenizer, request(Segment(text=TEXT, trim_order=1), " Answer:", max_new_tokens=8), " Paris", limit=min(own, 40)
    )
    assert len(fit_prompt(tokenizer, asked, 40).prompt_ids) == min(own, 40) - 8


def test_segments_own_limit(tokenizer):
    """Candidates are cut to 512 tokens in any case (methods.md A.4.2), also when the prompt would fit."""
    asked = request(Segment(text=TEXT, max_tokens=5, trim_order=1), "\nQ:")
    fitted = fit(tokenizer, asked, " Paris")
    assert fitted.truncated
    kept = tokenizer.decode(fitted.prompt_ids).removesuffix("\nQ:")
    assert TEXT.startswith(kept)
    assert len(tokenizer(kept)["input_ids"]) == 5


@pytest.mark.parametrize("layout", ["llm_embedder", "llm_r"])
def test_an_example_that_is_cut_keeps_its_answer(tokenizer, layout):
    """Prevents long examples (a text and its summary) from being judged by their input alone (methods.md B.4)."""
    document = {"text": f"{TEXT}\nIn short: the sea.", "continuation": None}
    segments = feedback_segments("icl", {"query": "What?"}, document, max_candidate_tokens=12, layout=layout)
    fitted = fit(tokenizer, request(*segments), "Paris")
    assert fitted.truncated
    prompt = tokenizer.decode(fitted.prompt_ids)
    assert TEXT[:20] not in prompt
    assert "In short: the sea.\n" in prompt


@pytest.mark.parametrize("layout", ["llm_embedder", "llm_r"])
def test_examples_that_are_cut_away_leave_no_blank_lines(tokenizer, layout):
    """LLM-R cuts whole prompts on the left: eight long examples became six blank lines and two examples (B.9)."""
    examples = [{"text": f"{TEXT} {number}\nso {number}.", "continuation": None} for number in range(8)]
    asked = prompt_of_examples(
        "r",
        {"query_id": "q", "query": "What?", "options": None},
        examples,
        demonstration_tokens=0,
        max_new_tokens=4,
        protocol=layout,
    )
    fitted = fit_prompt(tokenizer, asked, 3 * len(tokenizer(TEXT)["input_ids"]))
    prompt = tokenizer.decode(fitted.prompt_ids)
    end = EXAMPLE_END[layout]
    assert not prompt.startswith("\n")
    assert prompt.endswith(f"so 1.{end}{TEXT} 0\nso 0.{end}What?\n")
    assert prompt.count("so ") == 3
    segments = feedback_segments("icl", {"query": "What?"}, examples[0], layout=layout)
    limit = len(tokenizer("What?\nParis")["input_ids"])
    assert tokenizer.decode(fit(tokenizer, request(*segments), "Paris", limit=limit).prompt_ids) == "What?\n"


def test_prompt_of_a_target_does_not_depend_on_its_company(tokenizer):
    """Answers are stored by (prompt, target): the same key must always mean the same tokens."""
    asked = request(Segment(text=TEXT, trim_order=1), " Answer:", max_new_tokens=8)
    alone = fit_targets(tokenizer, asked, [" Paris"], 40)
    together = fit_targets(tokenizer, asked, [" thank you", " Paris", " the sea"], 40)
    assert together[1] == alone[0]
    assert len({fitted.prompt_ids for fitted in together}) == 1


@pytest.mark.parametrize(
    ("asked", "target", "why"),
    [
        (request("Answer:"), "  ", "empty"),
        (request(""), "Paris", "nothing precedes"),
        (request("Answer:"), " the sea" * 60, "llm.max_model_tokens"),
        (request("Answer: \ud800"), " Paris", "Unicode"),
        (request(" capita"), "l", "no token of its own"),
    ],
)
def test_rows_that_cannot_be_asked_say_why(tokenizer, asked, target, why):
    """A target cut or scored from nothing gives a number that looks like any other."""
    with pytest.raises(FitError, match=why):
        fit(tokenizer, asked, target, limit=40)


def test_sampling_prompt_leaves_room(tokenizer):
    """Without room the engine would end the output early, or refuse the prompt."""
    asked = request(Segment(text=TEXT, trim_order=1), " Answer:", num_samples=1, max_new_tokens=16)
    assert len(fit_prompt(tokenizer, asked, 40).prompt_ids) == 24
    with pytest.raises(FitError, match="may not be cut"):
        fit_prompt(tokenizer, request(TEXT, num_samples=1), 40)


# --- the reference engine --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return open_engine(settings(save_model(tmp_path_factory.mktemp("llm"))))


def settings(folder, **changes):
    fields = {
        "path": str(folder),
        "engine": "transformers",
        "dtype": "float32",
        "max_model_tokens": 128,
        "num_threads": 1,
        "kv_cache_gb": 1.0,
        "max_batched_tokens": 512,
        "max_sequences": 8,
    }
    return EngineSettings(**(fields | changes))


def test_reference_engine_against_next_token_distributions(engine):
    """Off by one row, each token gets the probability of its neighbour: sums look plausible and are wrong."""
    ids = tuple(engine.tokenizer(TEXT)["input_ids"])[:40]
    [scored] = engine.likelihood([(ids[:30], ids[30:])])
    naive = []
    for place in range(30, 40):
        with torch.inference_mode():
            logits = engine.model(input_ids=torch.tensor([ids[:place]])).logits[0, -1].double()
        naive.append(float(logits[ids[place]] - torch.logsumexp(logits, 0)))
    np.testing.assert_allclose(scored.logprobs, naive, atol=1e-5)


def test_reference_engine_samples_the_model_s_distribution(engine):
    """A sampler that is off draws outputs the LLM would not give, and ranks against them mean nothing."""
    ids = tuple(engine.tokenizer("Question: what")["input_ids"])
    job = Sampling(prompt_ids=ids, num_samples=400, max_new_tokens=1, temperature=1.0, seed=3)
    [sampled] = engine.sample([job])
    with torch.inference_mode():
        best = engine.model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
    probability, token = best.max(-1)
    share = np.mean([text == engine.tokenizer.decode([int(token)]) for text in sampled.texts])
    assert abs(share - float(probability)) < 4 * np.sqrt(0.25 / 400)
    assert engine.sample([job]) == [sampled]


def test_greedy_output_stops_before_the_stop_string(engine):
    """Text after the stop string is the next question, not the answer."""
    ids = tuple(engine.tokenizer("Question: what")["input_ids"])
    greedy = {"prompt_ids": ids, "num_samples": 1, "max_new_tokens": 8, "temperature": 0.0, "seed": 0}
    [free] = engine.sample([Sampling(**greedy)])
    stop = free.texts[0][3:5]
    [stopped] = engine.sample([Sampling(**greedy, stop=(stop,))])
    assert stopped.texts[0] == free.texts[0][: free.texts[0].index(stop)]


def test_an_output_that_must_say_something_begins_with_no_stop_string(engine):
    """LLM-R bans the newline as first token; else a small LLM's answer is often empty and counts as wrong."""
    ids = tuple(engine.tokenizer("Question: what")["input_ids"])
    greedy = {"prompt_ids": ids, "num_samples": 1, "max_new_tokens": 3, "temperature": 0.0, "seed": 0}
    [free] = engine.sample([Sampling(**greedy)])
    stop = (free.texts[0][0],)
    [silent] = engine.sample([Sampling(**greedy, stop=stop)])
    [spoken] = engine.sample([Sampling(**greedy, stop=stop, says_something=True)])
    assert silent.texts == ("",)
    assert spoken.texts[0].strip()
    silent_tokens = silent_ids(engine.tokenizer, stop)
    texts = {token: engine.tokenizer.decode([token]).lstrip(" ") for token in range(len(engine.tokenizer))}
    assert silent_tokens == [token for token, text in texts.items() if text[:1] == stop[0]]


def test_model_window_is_checked_before_any_work(tmp_path):
    """A prompt longer than the model's window gives garbage or a crash hours later."""
    with pytest.raises(ConfigError, match="255"):
        open_engine(settings(save_model(tmp_path), max_model_tokens=256))


# --- who pays --------------------------------------------------------------------------------------------------------


class CountingEngine:
    """An engine whose answers are a function of the ids, and that remembers what it was asked."""

    max_model_tokens = 128

    def __init__(self, tokenizer, fail_after=10**9):
        self.tokenizer, self.fail_after = tokenizer, fail_after
        self.scored, self.begun, self.calls = [], 0, []

    def begin(self):
        self.begun += 1

    def likelihood(self, pairs, rivals=()):
        if len(self.scored) >= self.fail_after:
            raise RuntimeError("the engine broke")
        self.scored += pairs
        self.calls.append(len(pairs))
        return [Scored(logprobs=tuple(-0.1 * t for t in target), num_computed_tokens=5) for _, target in pairs]

    def sample(self, jobs):
        return [
            Sampled(
                texts=tuple(f" {job.seed} {number}" for number in range(job.num_samples)),
                num_output_tokens=2,
                num_computed_tokens=3,
            )
            for job in jobs
        ]


def questions(count, targets=(" Paris", " the sea")):
    return [
        request(f"Question {number}:", request_id=f"r{number}", unit=f"u{number // 2}", targets=targets)
        for number in range(count)
    ]


def test_nothing_is_paid_twice(tmp_path, tokenizer):
    """The LLM is what costs: equal questions, later runs and other processes must find the answer in the store."""
    engine = CountingEngine(tokenizer)
    client = LocalClient("s", LLMStore(tmp_path), engine)
    asked = questions(6) + questions(3)
    first = client.answer(asked, label="test")
    assert len(engine.scored) == len(set(engine.scored)) == 12
    assert [r.request_id for r in first] == [r.request_id for r in asked]
    assert sum(r.num_computed_tokens for r in first) == 60
    assert not any(r.cached for r in first)

    other = LocalClient("s", LLMStore(tmp_path), CountingEngine(tokenizer))
    second = other.answer(asked, label="test")
    assert other.engine.scored == []
    assert all(r.cached and r.num_computed_tokens == 0 for r in second)
    assert [r.token_logprobs for r in second] == [r.token_logprobs for r in first]
    assert (other.missing(asked), other.missing(questions(7))) == (0, 2)
    assert other.stored(questions(7))[-1] is None
    assert other.stored(questions(7))[:6] == second[:6]


def test_a_broken_engine_keeps_what_was_answered(tmp_path, tokenizer, monkeypatch):
    """An engine error must stop the run, and cost no more than the chunk it happened in."""
    monkeypatch.setattr(chunks, "CHUNK_REQUESTS", 2)
    client = LocalClient("s", LLMStore(tmp_path), CountingEngine(tokenizer, fail_after=8))
    with pytest.raises(RuntimeError, match="broke"):
        client.answer(questions(6), label="test")
    again = LocalClient("s", LLMStore(tmp_path), CountingEngine(tokenizer))
    results = again.answer(questions(6), label="test")
    assert len(again.engine.scored) == 4
    assert all(r.error is None for r in results)
    assert [r.cached for r in results] == [True] * 4 + [False] * 2


def test_answers_are_durable_before_the_call_ends(tmp_path, tokenizer, monkeypatch):
    """A kill may cost at most a chunk of answers, not the whole call."""
    monkeypatch.setattr(chunks, "CHUNK_REQUESTS", 2)
    engine = CountingEngine(tokenizer)
    client = LocalClient("s", LLMStore(tmp_path), engine)
    seen = []  # what another process would find in the store at each question to the engine
    scored = engine.likelihood

    def spying(pairs, rivals):
        seen.append(len(LLMStore(tmp_path)))
        return scored(pairs)

    engine.likelihood = spying
    client.answer(questions(12), label="test")
    assert seen == [0, 4, 8, 12, 16, 20]


def test_a_row_the_engine_cannot_digest_costs_no_neighbour(tmp_path, tokenizer):
    """One poisoned prompt in a chunk of 64 must not lose 63 answers, nor be stored as an answer."""
    engine = CountingEngine(tokenizer)
    scored = engine.likelihood

    def choking(pairs, rivals):
        if any("Question 3:" in tokenizer.decode(prompt) for prompt, _ in pairs):
            raise FloatingPointError("poison")
        return scored(pairs)

    engine.likelihood = choking
    client = LocalClient("s", LLMStore(tmp_path), engine)
    results = client.answer(questions(120, (" Paris",)), label="test")
    assert [n for n, result in enumerate(results) if result.error is not None] == [3]
    assert "poison" in results[3].error
    assert client.missing(questions(120, (" Paris",))) == 1


@pytest.mark.parametrize("logprobs", [(float("nan"),), (float("-inf"),), (), (-0.1, -0.2, -0.3)])
def test_garbage_from_the_engine_is_an_error_of_the_row(tmp_path, tokenizer, logprobs):
    """A NaN or a missing token stored as a score would be served to every later run."""
    engine = CountingEngine(tokenizer)
    engine.likelihood = lambda pairs, rivals: [Scored(logprobs=logprobs, num_computed_tokens=1) for _ in pairs]
    client = LocalClient("s", LLMStore(tmp_path), engine)
    [result] = client.answer([request("Q:", targets=(" a",))], label="test")
    assert "finite" in result.error
    assert client.missing([request("Q:", targets=(" a",))]) == 1


def test_a_full_disk_is_said_and_keeps_what_was_stored(tmp_path, tokenizer, monkeypatch):
    """A disk that fills up must stop the run with the place named, and leave the store whole."""
    monkeypatch.setattr(chunks, "CHUNK_REQUESTS", 2)
    client = LocalClient("s", LLMStore(tmp_path), CountingEngine(tokenizer))
    put = client.store.put

    def full(answers):
        if len(client.store) >= 4:
            raise OSError(28, "No space left on device")
        put(answers)

    monkeypatch.setattr(client.store, "put", full)
    with pytest.raises(ResourceError, match=rf"{tmp_path}.*No space left"):
        client.answer(questions(6), label="test")
    assert LocalClient("s", LLMStore(tmp_path), CountingEngine(tokenizer)).missing(questions(6)) == 8


def test_a_failed_row_is_a_result_and_many_are_an_error(tmp_path, tokenizer):
    """One bad row must not stop a run, a wrong setting must; neither may leave an error in the store."""
    client = LocalClient("s", LLMStore(tmp_path), CountingEngine(tokenizer))
    results = client.answer([*questions(3), request("Q:", request_id="bad", targets=("",))], label="test")
    assert [r.error for r in results[:3]] == [None] * 3
    assert "empty" in results[3].error
    assert results[3].token_logprobs == ()
    assert client.usage.errors == 1
    with pytest.raises(DataError, match="bad0"):
        client.answer([request(f"Q {n}:", request_id=f"bad{n}", targets=("",)) for n in range(3)], label="test")
    assert client.missing([request("Q:", targets=("",))]) == 1


def test_samples_and_targets_of_one_unit(tmp_path, tokenizer):
    """Mixed units must give each request its own kind of answer."""
    client = LocalClient("s", LLMStore(tmp_path), CountingEngine(tokenizer))
    drawn, scored = client.answer(
        [request("Q:", request_id="a", num_samples=2, seed=9), request("Q:", request_id="b", targets=(" x",))],
        label="test",
    )
    assert drawn.texts == (" 9 0", " 9 1")
    assert drawn.token_logprobs == ()
    assert len(scored.token_logprobs) == 1
    with pytest.raises(ValueError, match="output_schema"):
        client.answer([request("Q:", targets=(" x",), output_schema="{}")], label="test")
    with pytest.raises(ValueError, match="targets or num_samples"):
        client.answer([request("Q:")], label="test")
