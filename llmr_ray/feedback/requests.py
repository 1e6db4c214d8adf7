"""What is asked of a language model, and what it answers: the border between the tasks and the engines.

A request is rendered text cut into segments, so that the engine, which owns the tokenizer, can shorten what may be
shortened (a candidate, a long history) and never what may not (the instruction, the desired output).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

CHARS_PER_TOKEN = 4
"""Of English text, for forecasts."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of prompt text.

    trim_order: 0 is never cut; otherwise segments are cut in ascending order until the prompt fits.
    trim_side: the side that loses tokens ("left" keeps the most recent text).
    max_tokens: cut to this many tokens in any case (0: no own limit).
    separates: it parts the segment before it from what follows, and goes when all of that is cut away.
    """

    text: str
    trim_order: int = 0
    trim_side: str = "right"
    max_tokens: int = 0
    separates: bool = False


@dataclass(frozen=True, kw_only=True)
class LLMRequest:
    """Likelihoods of `targets` after the prompt, or `num_samples` outputs sampled after it (exactly one of the two).

    `unit` names the work that belongs together (a query with all its candidates): requests of one unit go to one
    engine, in order, in one call: they share computed prefixes and give the same floats whenever they are asked.
    Targets bring their own leading space where one belongs: prompts end without trailing white space.
    """

    request_id: str
    unit: str
    segments: tuple[Segment, ...]
    targets: tuple[str, ...] = ()
    num_samples: int = 0
    max_new_tokens: int = 32
    max_tokens: int = 0
    """Of prompt and output together; 0: what the engine reads, which is the limit in any case."""
    temperature: float = 1.0
    """0: greedy, and then num_samples must be 1."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    says_something: bool = False
    """The output's first token neither ends it nor begins with a stop string (LLM-R, methods.md B.9)."""
    output_schema: str = ""
    """With num_samples only: a JSON schema. The engine's grammar lets nothing else be written, properties in the order
    of the schema, without free white space. Who reads outputs must still expect others: max_new_tokens may cut one
    short, and an endpoint may ignore the schema."""
    rank_by: str = ""
    """mean or sum: of the targets behind the first it matters only which are likelier than the first by this measure
    (rewards.likelihood). Then tokens that can change nothing may stay unread; their log-probability is given as 0, the
    highest there is, so that a likelihood is an upper bound and every comparison comes out the same."""
    continues_text: bool = False
    """The prompt is running text that goes on in the output, not a question: no chat template is put around it."""

    @property
    def estimated_prompt_tokens(self) -> int:
        """From characters, for forecasts."""
        return sum(len(segment.text) for segment in self.segments) // CHARS_PER_TOKEN + 1


@dataclass(frozen=True, kw_only=True)
class LLMResult:
    """The answer to one request. With `error` set the rest is empty.

    token_logprobs: for each target, the natural-log probability of each of its tokens (see `rank_by`).
    texts: the sampled outputs, without the stop string.
    cached: nothing was computed, all came from the store.
    num_computed_tokens: tokens the LLM really processed for this answer (prompt and output; 0 when cached).
    num_least_tokens: the fewest it could have processed, the nodes that the answer adds to the token trie of the call
    (`performance.md` 1). Both are meant for sums: what answers share is charged to one of them.
    """

    request_id: str
    token_logprobs: tuple[tuple[float, ...], ...] = ()
    texts: tuple[str, ...] = ()
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    num_least_tokens: int = 0
    truncated: bool = False
    cached: bool = False
    prompt_sha: str = ""
    error: str | None = None


class LLMClient(Protocol):
    """Anything that answers requests: the Ray pool of engine actors, or one engine in this process."""

    scorer_id: str

    def answer(self, requests: Sequence[LLMRequest], *, label: str) -> list[LLMResult]:
        """Answers in the order of the requests; shows progress under `label`. Row errors are in the results."""
        ...

    def missing(self, requests: Sequence[LLMRequest]) -> int:
        """How many (prompt, target) or (prompt, sampling) keys are not in the store yet."""
        ...
