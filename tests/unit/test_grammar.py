"""The reference engine writes what a JSON schema allows, whatever the LLM would like to write."""

import json
import re

import pytest

from llmr_ray.feedback.engine import EngineSettings, Sampling, open_engine
from llmr_ray.feedback.labels import answer_schema
from tests.tiny_llm import save_model


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("llm"))
    settings = EngineSettings(
        path=str(folder),
        engine="transformers",
        dtype="float32",
        max_model_tokens=250,
        num_threads=1,
        kv_cache_gb=1.0,
        max_batched_tokens=512,
        max_sequences=8,
    )
    return open_engine(settings)


def job(engine, text, **fields):
    ids = tuple(engine.tokenizer(text)["input_ids"])
    plain = {"num_samples": 1, "max_new_tokens": 200, "temperature": 0.0, "seed": 0}
    return Sampling(prompt_ids=ids, **(plain | {"output_schema": answer_schema(2, 12)} | fields))


@pytest.mark.parametrize("drawn", [{}, {"num_samples": 12, "temperature": 3.0}], ids=["greedy", "drawn"])
def test_every_output_obeys_the_schema(engine, drawn):
    """An LLM with random weights never writes JSON of its own accord, so one missed token shows."""
    [free] = engine.sample([job(engine, "Question: what", output_schema="", max_new_tokens=40)])
    assert "evidence" not in free.texts[0]
    [sampled] = engine.sample([job(engine, "Question: what", **drawn)])
    for text in sampled.texts:
        answer = json.loads(text, strict=False)
        assert list(answer) == ["1", "2"]
        for entry in answer.values():
            assert list(entry) == ["evidence", "score"]
            assert entry["score"] in (0, 0.5, 1)
            assert len(entry["evidence"]) <= 12
        # No room is lost to blanks: a small LLM would fill all of it with line feeds.
        assert re.sub(r'"(\\.|[^"\\])*"', "", text).count(" ") <= 3
        assert "\n" not in text
    assert len(set(sampled.texts)) == len(sampled.texts)


def test_among_what_is_allowed_the_llm_chooses(engine):
    """A mask that is off by one token would still give outputs that parse, but always the same."""
    letters = json.dumps({"enum": [0, 0.5, 1]})
    texts = [engine.sample([job(engine, text, output_schema=letters)])[0].texts[0] for text in "abcdefgh"]
    assert set(texts) <= {"0", "0.5", "1"}
    assert len(set(texts)) > 1, "the test needs prompts that lead to different outputs"


def test_an_output_may_be_cut_short(engine):
    """The limit stands above the grammar, so whoever reads outputs must expect half of one."""
    [sampled] = engine.sample([job(engine, "Question: what", max_new_tokens=9)])
    assert sampled.num_output_tokens == 9
    with pytest.raises(json.JSONDecodeError):
        json.loads(sampled.texts[0])


def test_a_schema_is_no_part_of_the_next_job(engine):
    """A grammar that is kept by mistake would bind the outputs of rank feedback."""
    free = job(engine, "Question: what", output_schema="", max_new_tokens=20)
    alone = engine.sample([free])
    together = engine.sample([job(engine, "Question: what"), free, job(engine, "Question: what")])
    assert together[1] == alone[0]
    assert together[0] == together[2]
