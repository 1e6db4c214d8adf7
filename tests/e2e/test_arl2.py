"""Two rounds of ARL2, all parts real, each disturbed while the LLM labels: no label is lost, and none paid twice."""

import re
import signal
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from llmr_ray.labeling.calibration import is_calibration
from tests.e2e.conftest import TINY, Runner, kill_all, named

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

CONFIG = TINY.with_name("arl2.yaml")
CALLS, CALIBRATION = 48, 0.25
"""labeling.calls_per_round and calibration_fraction there."""
PSEUDO_LABELS = {("positive", "confident"): 1, ("negative", "confident"): 0}
LEFT = {"not_seeded", "budget", "no_answer", "audit_failed", "positives_cap", "well_trained"}
ROUNDS = pytest.mark.parametrize("of_round", ["_1", ""], ids=["first", "second"])


@dataclass
class ARL2(Runner):
    """`llmr run tests/e2e/arl2.yaml`: in the first round the driver is killed with all that it started while the LLM
    labels; it is started again, and in the second round the LLM's actor is killed."""

    at_kill: dict[str, int] = field(default_factory=dict)
    """What `finished` was at the first kill."""
    kept: set[bytes] = field(default_factory=set)
    """`answers` then."""

    def labels(self, number: int) -> bool:
        """Whether the LLM has answered something in this round, and not all."""
        if not self.at_work("score", number):
            return False
        return bool(self.answers(max(time for name, time in self.finished().items() if name.startswith("select/"))))

    def decisions(self, of_round: str) -> dict[tuple[str, str], tuple[str, str]]:
        """What became of each pair, and why."""
        rows = self.rows(f"label{of_round}", "decisions")
        found = {(row["query_id"], row["doc_id"]): (row["decision"], row["reason"]) for row in rows}
        assert len(found) == len(rows) > 0
        return found

    def labels_by(self, of_round: str, *, pseudo: bool) -> dict[tuple[str, str], Any]:
        source = self.pairs(f"label{of_round}", "labels", "source")
        of_all = self.pairs(f"label{of_round}", "labels", "label")
        return {pair: label for pair, label in of_all.items() if (source[pair] == "retriever") == pseudo}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    run = Runner(tmp_path_factory.mktemp("undisturbed"), CONFIG)
    done = run.run()
    assert done.returncode == 0, done.stdout + done.stderr
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> ARL2:
    run = ARL2(tmp_path_factory.mktemp("killed"), CONFIG)
    assert run.run_disturbed(lambda _: run.labels(1), kill_all) == -signal.SIGKILL, run.log
    assert not run.left
    run.at_kill, run.kept = run.finished(), set(run.answers())
    assert run.run_and_kill(lambda _: run.labels(2), named("EngineActor")) == 0, run.log
    return run


def test_what_was_answered_stays(run: ARL2) -> None:
    """An annotator's answers are what a run costs: each is on disk when the next is asked for."""
    assert run.at_kill.items() <= run.finished().items()
    keys = run.answers()
    assert len(keys) == len(set(keys)), "a committed label was paid for again"
    assert run.kept < set(keys)


def test_the_same_files_as_of_an_undisturbed_run(run: ARL2, undisturbed: Runner) -> None:
    assert run.files() == undisturbed.files()
    assert run.results["rows"] == undisturbed.results["rows"]


@ROUNDS
def test_every_pair_is_accounted_for(run: ARL2, of_round: str) -> None:
    """A candidate without a decision is a label that was paid for and lost, or a pair that nobody would ever ask of."""
    decisions, said = run.decisions(of_round), run.pairs(f"score{of_round}", "llm_scores", "label")
    candidates = run.pairs(f"mine{of_round}", "candidates", "source").keys()
    assert candidates <= decisions.keys()
    assert {pair for pair, (decision, _) in decisions.items() if decision == "ask"} <= said.keys()
    assert 0 < len(said) <= CALLS
    of_llm, of_retriever = (run.labels_by(of_round, pseudo=pseudo) for pseudo in (False, True))
    assert said.items() <= of_llm.items()
    for pair, (decision, reason) in decisions.items():
        if (decision, reason) in PSEUDO_LABELS:
            assert of_retriever[pair] == PSEUDO_LABELS[decision, reason]
        elif decision == "leave":
            assert reason in LEFT
            assert (pair in of_llm) == (reason == "no_answer")
        else:
            assert of_llm[pair] is not None
    assert not {pair for pair in of_retriever if is_calibration(pair[0], CALIBRATION)}


def test_the_second_round_keeps_the_labels_of_the_first(run: ARL2) -> None:
    """And asks about none of them again; only what the retriever said itself is decided anew."""
    first, second = (run.labels_by(of_round, pseudo=False) for of_round in ("_1", ""))
    asked = run.pairs("score", "llm_scores", "label")
    assert not first.keys() & asked.keys()
    assert second == first | asked
    decided = Counter(reason for _, reason in run.decisions("").values())
    assert decided["calibration"] > 0
    assert decided["uncertain"] > 0


@ROUNDS
def test_what_trains_is_what_was_labelled_but_for_calibration(run: ARL2, of_round: str) -> None:
    """Pairs that a retriever was trained on cannot tell how sure it may be."""
    labels = run.pairs(f"label{of_round}", "labels", "label")
    wanted = {
        pair: said for pair, said in labels.items() if said is not None and not is_calibration(pair[0], CALIBRATION)
    }
    assert run.pairs(f"label{of_round}", "rewards", "reward") == wanted
    assert {row["query_id"] for row in run.rows(f"group{of_round}", "groups")} <= {query_id for query_id, _ in wanted}


def test_a_score_above_zero_quotes_its_passage(run: ARL2) -> None:
    """The grammar makes any answer parse; that it is about the passage has to be seen."""
    texts = {row["doc_id"]: f"{row['title']} {row['text']}" for row in run.rows("prepare", "corpus")}
    rows = [*run.rows("score_1", "llm_scores"), *run.rows("score", "llm_scores")]
    assert {row["label"] for row in rows} <= {0, 0.5, 1, None}
    quoted = [row for row in rows if row["label"] and "evidence_not_in_passage" not in row["flags"]]
    assert quoted
    for row in quoted:
        words = re.findall(r"\w+", row["evidence"].lower())
        there = [word in texts[row["doc_id"]].lower() for word in words]
        assert sum(there) >= 0.8 * len(there) > 0, row["evidence"]


def test_the_report_tells_what_each_round_paid(run: ARL2) -> None:
    """A budget that nobody can check is none."""
    told = run.results["labeling"]
    asked = [len(run.pairs(stage, "llm_scores", "label")) for stage in ("score_1", "score")]
    assert [row["calls"] for row in told] == asked
    assert [row["spent"] for row in told] == [asked[0], sum(asked)]
    assert all(row["requests"] * 3 >= row["calls"] for row in told)
    assert "<svg" in (run.run_dir / "report.html").read_text()
