"""Two rounds of LLM-R, all parts real, killed twice in the second round: nothing is lost, done again or paid twice."""

import math
import re
import signal
from collections import Counter
from dataclasses import dataclass, field

import pytest
from scipy.stats import kendalltau

from tests.e2e.conftest import TINY, Runner, kill_all

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

METHODS = {"none", "random", "kmeans", "bm25", "base", "round_1", "trained"}
ROUNDS = pytest.mark.parametrize("of_round", ["_1", ""], ids=["first", "second"])


@dataclass
class LLMR(Runner):
    """`llmr run tests/e2e/llm_r.yaml`, in the second round killed while the LLM was asked and while the reward model
    learned."""

    at_first_kill: dict[str, int] = field(default_factory=dict)
    """What `finished` was then."""
    kept: int = 0
    """Answers of the second round's scoring at the first kill."""
    paid: int = 0
    """The same at the second kill, when it had ended."""
    said: str = ""
    """What the last start printed."""

    def answers_again(self) -> list[bytes]:
        """Those since the second round's candidates were mined: until it is evaluated, what was scored in it."""
        return self.answers(max(time for name, time in self.finished().items() if name.startswith("mine/")))

    def verdicts(self, of_round: str) -> dict[tuple[str, str], str | None]:
        """Of each candidate the rule that puts it last, read off its id and its last line; None: the LLM decides."""
        queries = {row["query_id"]: row for row in self.rows("prepare", "queries")}
        texts = {row["doc_id"]: row["text"] for row in self.rows("prepare", "corpus")}
        found: dict[tuple[str, str], str | None] = {}
        for query_id, doc_id in self.pairs(f"mine{of_round}", "candidates", "source"):
            dataset, [target] = queries[query_id]["dataset"], queries[query_id]["targets"]
            is_worse = dataset == "rotten_tomatoes" and not texts[doc_id].endswith(f"\n{target}")
            found[query_id, doc_id] = "other_label" if is_worse else None
            if not doc_id.startswith(f"{dataset}:"):
                found[query_id, doc_id] = "other_task"
        return found

    def asked(self, of_round: str) -> set[tuple[str, str]]:
        return {pair for pair, rule in self.verdicts(of_round).items() if rule is None}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LLMR:
    run = LLMR(tmp_path_factory.mktemp("llm_r"), TINY.with_name("llm_r.yaml"))

    def asks_again(_: Runner) -> bool:
        return bool(run.at_work("score", 2) and run.answers_again())

    def learns_again(_: Runner) -> bool:
        return any([*path.glob("work/ckpt-????????/MANIFEST.json")] for path in run.at_work("reward_model", 2))

    assert run.run_disturbed(asks_again, kill_all) == -signal.SIGKILL, run.log
    assert not run.left
    run.at_first_kill, run.kept = run.finished(), len(run.answers_again())
    assert run.run_disturbed(learns_again, kill_all) == -signal.SIGKILL, run.log
    assert not run.left
    run.paid = len(run.answers_again())
    done = run.run()
    run.said = done.stdout + done.stderr
    assert done.returncode == 0, run.said
    return run


def test_what_was_finished_stays(run: LLMR) -> None:
    """A first round that is made anew after a kill costs hours, and may not be the one that the second was made of."""
    ids = {name: stage["artifact"] for name, stage in run.stages.items()}
    first = {ids[name] for name in ids if name.endswith("_1")}
    assert len(first) == 11
    assert first < run.at_first_kill.keys()
    assert run.at_first_kill.items() <= run.finished().items()
    assert set(ids.values()) == run.finished().keys(), "an artifact was made that no stage names"
    [step] = re.findall(r"reward_model: goes on from step (\d+)", run.said)
    assert int(step) > 0
    assert [row["step"] for row in run.rows("reward_model", "steps")] == list(range(24))


def test_only_pairs_that_were_never_asked_are_paid(run: LLMR) -> None:
    """A second round is affordable because of what the first one asked, if the store finds every single pair of it."""
    before, now = run.asked("_1"), run.asked("")
    assert before & now
    assert 0 < run.kept <= run.paid == len(now - before)
    first, second = run.stages["score_1"], run.stages["score"]
    assert (second["cached"], second["ok"]) == (len(before & now) + run.kept, len(now - before) - run.kept)
    assert (first["cached"], first["ok"]) == (0, len(before))
    keys = run.answers()
    assert len(keys) == len(set(keys)), "a committed LLM score was paid for again"
    scores = [run.pairs(stage, "llm_scores", "llm_score") for stage in ("score_1", "score")]
    assert all(scores[0][pair] == scores[1][pair] for pair in before & now)


@ROUNDS
def test_every_candidate_has_a_score_or_the_rule_that_puts_it_last(run: LLMR, of_round: str) -> None:
    """A pair that is lost on the way, or a rule that became a number, is learned from like any other."""
    verdicts = run.verdicts(of_round)
    assert set(verdicts.values()) == {"other_task", "other_label", None}
    assert run.pairs(f"score{of_round}", "llm_scores", "error") == verdicts
    scores = run.pairs(f"score{of_round}", "llm_scores", "llm_score")
    assert {pair for pair, score in scores.items() if score is not None} == run.asked(of_round)
    assert run.stages[f"score{of_round}"]["skipped"] == Counter(filter(None, verdicts.values()))
    comparable = {query_id for query_id, _ in run.asked(of_round)}
    sources = {pair: rule or "llm" for pair, rule in verdicts.items() if pair[0] in comparable}
    assert run.pairs(f"reward{of_round}", "rewards", "reward_source") == sources
    assert run.pairs(f"reward{of_round}", "rewards", "reward") == {pair: scores[pair] for pair in sources}


@ROUNDS
def test_the_reward_model_judges_all_and_is_judged_on_what_it_did_not_see(run: LLMR, of_round: str) -> None:
    """Nothing is learned from a candidate without a logit, and nothing told by queries that it has learned by heart."""
    taught, said = (run.pairs(f"{stage}{of_round}", "rewards", "reward") for stage in ("teach", "reward"))
    assert taught.keys() == run.verdicts(of_round).keys()
    assert all(map(math.isfinite, taught.values()))
    learned = {row["query_id"] for row in run.rows(f"reward_model{of_round}", "groups")}
    told = {row["query_id"]: row for row in run.rows(f"agree{of_round}", "agreement") if row["judge"] == "reward_model"}
    assert 0 < len(told) <= run.stages[f"reward_model{of_round}"]["skipped"]["held_out"]
    assert not told.keys() & learned
    for query_id, row in told.items():
        both = [(of_llm, taught[pair]) for pair, of_llm in said.items() if pair[0] == query_id and of_llm is not None]
        assert row["tau"] == pytest.approx(float(kendalltau(*zip(*both, strict=True)).statistic))


def test_the_results_compare_all_rounds(run: LLMR) -> None:
    """A round whose figures are missing, or change once the next is done, was not measured."""
    expected = {"rotten_tomatoes": 12, "openbookqa": 12, "average": 24}
    told = {(row["dataset"], row["method"]): row["n"] for row in run.results["rows"]}
    assert told == {(dataset, method): number for dataset, number in expected.items() for method in METHODS}
    of_one, of_both = (
        {(row["method"], row["measure"], row["query_id"]): row["value"] for row in run.rows(stage, "metrics")}
        for stage in ("evaluate_1", "evaluate")
    )
    assert {method for method, _, _ in of_one} == METHODS - {"trained"}
    assert of_one.items() <= of_both.items()
    assert {row["judge"] for row in run.results["agreement"]} == {"reward_model", "base", "round_1"}
    targets = {row["query_id"]: row["targets"][0] for row in run.rows("prepare", "queries")}
    of_other = {query_id for (query_id, _), rule in run.verdicts("").items() if rule == "other_label"}
    both = Counter(targets[query_id] for query_id in of_other & {query_id for query_id, _ in run.asked("")})
    assert {row["label"]: row["n"] for row in run.results["label_separation"]} == both
    assert "<svg" in (run.run_dir / "report.html").read_text()


def test_another_start_does_nothing(run: LLMR) -> None:
    """Whoever does not know whether a run has ended starts it again."""
    before, results = (run.finished(), len(run.answers())), run.results
    again = run.run()
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done already") == len(results["stages"]) == 26
    assert (run.finished(), len(run.answers())) == before
    assert run.results == results
