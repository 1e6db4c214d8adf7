"""Prompts within a model's own chat template: the tokens must be those the model was tuned on."""

from dataclasses import replace

import pytest
from tokenizers.processors import TemplateProcessing

from llmr_ray.config import Config, LLMConfig, RuntimeConfig
from llmr_ray.errors import ConfigError
from llmr_ray.evaluation import memory
from llmr_ray.feedback.chat import ChatTemplate
from llmr_ray.feedback.client import LocalClient
from llmr_ray.feedback.engine import EngineSettings, open_engine, scorer_id
from llmr_ray.feedback.fitting import fit_targets
from llmr_ray.feedback.requests import LLMRequest, Segment
from llmr_ray.feedback.store import LLMStore
from tests.tiny_llm import make_tokenizer, save_model

TURNS = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
ASKED = LLMRequest(
    request_id="r",
    unit="u",
    segments=(
        Segment(text="Question: "),
        Segment(text="what is the capital of France?", trim_order=1),
        Segment(text="\n\nAnswer:"),
    ),
    targets=(" Paris", " the river"),
    max_new_tokens=1,
)


def tokenizer_with(template, **special):
    tokenizer = make_tokenizer(**special)
    tokenizer.chat_template = template
    return tokenizer


def wrapped(tokenizer, request=ASKED):
    [result] = ChatTemplate.of(tokenizer, "tiny").wrap([request])
    return result


def conversation(tokenizer, prompt, answer=""):
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + answer


def test_prompt_and_targets_are_the_tokens_of_the_template():
    tokenizer = tokenizer_with(TURNS)
    request = wrapped(tokenizer)
    prompt = "Question: what is the capital of France?\n\nAnswer:"
    for fitted, answer in zip(
        fit_targets(tokenizer, request, request.targets, 200), ("Paris", "the river"), strict=True
    ):
        assert (
            list(fitted.prompt_ids + fitted.target_ids)
            == tokenizer(conversation(tokenizer, prompt, answer))["input_ids"]
        )
        assert tokenizer.decode(fitted.target_ids) == answer


def test_line_break_that_ends_a_plain_prompt_does_not_end_the_turn():
    """The break separates prompt and output where nothing else does (icl); the template has its own."""
    tokenizer = tokenizer_with(TURNS)
    asked = replace(ASKED, segments=(Segment(text="the old town ", trim_order=1), Segment(text="\n")))
    assert "".join(segment.text for segment in wrapped(tokenizer, asked).segments) == conversation(
        tokenizer, "the old town"
    )


@pytest.mark.parametrize("adds", [True, False])
def test_text_begins_with_one_bos(adds):
    """Two BOS tokens are a beginning that the model never saw; none is one it never saw either."""
    tokenizer = tokenizer_with("{{ bos_token }}" + TURNS, bos_token="<s>")
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    request = wrapped(tokenizer)
    [fitted] = fit_targets(tokenizer, request, request.targets[:1], 200)
    assert fitted.prompt_ids[:2].count(0) == 1
    assert fitted.prompt_ids[0] == 0


def test_nothing_of_the_template_is_cut():
    """A model that is not told where its turn begins answers something else."""
    tokenizer = tokenizer_with(TURNS)
    request = wrapped(tokenizer, replace(ASKED, segments=(Segment(text="the sea " * 300, trim_order=1),)))
    [fitted] = fit_targets(tokenizer, request, request.targets[:1], 60)
    assert fitted.truncated
    assert len(fitted.prompt_ids + fitted.target_ids) <= 60
    text = tokenizer.decode(fitted.prompt_ids)
    assert text.startswith("<turn>user\nthe sea")
    assert text.endswith("</turn>\n<turn>assistant\n")


def test_prompt_does_not_name_the_day():
    """Llama 3 templates write today's date, and tomorrow's prompt would be another one."""
    dated = (
        "{% if not date_string %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}\n" + TURNS
    )
    assert ChatTemplate.of(tokenizer_with(dated), "tiny").head.startswith("26 Jul 2024\n")


def test_running_text_is_asked_as_it_is():
    query = {"query_id": "q", "task": "lrlm", "query": "its mill ", "context": "The town and ", "targets": ["the sea"]}
    asked = memory.text_request("r", query, [], document_tokens=8, window_tokens=64)
    assert wrapped(tokenizer_with(TURNS), asked) == asked


@pytest.mark.parametrize(
    ("template", "words"), [(None, "no chat template"), ("fixed words", "0 times"), (TURNS + TURNS, "2 times")]
)
def test_template_that_cannot_be_used_is_refused(template, words):
    with pytest.raises(ConfigError, match=words):
        ChatTemplate.of(tokenizer_with(template), "tiny")


def test_answers_are_those_to_the_wrapped_prompt(tmp_path):
    """What a client with a template answers is what the conversation, written out, is answered; stored apart."""
    folder = save_model(tmp_path / "llm")
    tokenizer = tokenizer_with(TURNS)
    tokenizer.save_pretrained(folder)
    llm = LLMConfig(engine="transformers", max_model_tokens=200)
    engine = open_engine(EngineSettings.of(Config(llm=llm, runtime=RuntimeConfig(llm_threads=1)), folder))
    store = LLMStore(tmp_path / "store")
    client = LocalClient("scorer", store, engine)
    client.template = ChatTemplate.load(folder)
    prompt = conversation(tokenizer, "Question: what is the capital of France?\n\nAnswer:")
    spelled = replace(ASKED, segments=(Segment(text=prompt),), targets=("Paris", "the river"))
    [answer] = client.answer([ASKED], label="chat")
    [oracle] = LocalClient("oracle", LLMStore(tmp_path / "oracle"), engine).answer([spelled], label="plain")
    for got, expected in zip(answer.token_logprobs, oracle.token_logprobs, strict=True):
        assert got == pytest.approx(expected, abs=1e-4)
    assert client.missing([ASKED]) == 0
    assert client.stored([ASKED])[0].cached
    assert LocalClient("scorer", store, engine).missing([ASKED]) == 2


def test_scorer_with_a_template_is_another():
    assert scorer_id("model", LLMConfig(chat_template=True)) != scorer_id("model", LLMConfig())
