"""What each stage does with a task: settings of which every task has its own."""

from dataclasses import dataclass, field

from llmr_ray.labeling.settings import TaskQuestions
from llmr_ray.later import later


@dataclass(frozen=True, kw_only=True)
class TaskMine:
    """Candidates of one task."""

    num_bm25: int = 4
    """Best documents by BM25."""
    num_dense: int = 4
    """Best documents by the miner's embeddings."""
    same_task_first: bool = later(False)
    """Dense search: of the `depth` best, examples of the query's own data set come first (LLM-R, B.3)."""
    num_random: int = 0
    """Documents drawn from the query's range of the pool."""
    num_given: int = later(0)
    """Best of the candidates that come with the data (in its rows, or in datasets.*.candidates), before all other
    sources."""
    with_gold: bool = later(True)
    """Documents that the data labels relevant are candidates whether found or not. False: only what is found (ARL2,
    whose labels come from the LLM)."""
    depth: int = 50
    """How deep each retriever looks before gold and duplicates are taken out."""
    skip_top: int = 0
    """Leave out the best so many of each retriever (false negatives of tasks trained on labels)."""
    skip_same_input: bool = later(False)
    """Leave out documents that begin with the query's text: examples of the same input (LLM-R, B.3)."""

    @property
    def most(self) -> int:
        """Candidates that a query has at the most: those of all sources, and a gold document."""
        return self.num_given + self.num_bm25 + self.num_dense + self.num_random + 1


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """LLM feedback of one task (methods.md A.4)."""

    feedback: str = "none"
    """none, likelihood (of the desired output), rank (rank-aware reward), label (by the LLM in words, C.1), or given:
    scores of a teacher that come with the data (teacher_scores), for which no LLM is asked."""
    samples: str = "shared"
    """rank only. fresh: N outputs are drawn per candidate; shared: the outputs drawn without retrieval are rescored."""
    num_samples: int = 10
    """rank only: N."""
    max_new_tokens: int = 32
    """rank only: length of a sampled output."""
    sample_temperature: float = 1.0
    """rank only."""
    normalization: str = "mean"
    """mean (per token) or sum: the likelihood by which outputs are compared."""
    over_options: bool = False
    """likelihood only, and only where a query has options: the score is the log of the gold option's share, softmax
    over the options' likelihoods (UPRISE normalises losses so). Without it a candidate that makes every option likelier
    counts as good."""
    same_task: bool = later(False)
    """Examples: the LLM is asked only about candidates of the query's own data set; the others rank below all of these
    (LLM-R, B.4: -100 for other tasks)."""
    same_label: bool = later(False)
    """Examples of a classification: the LLM is asked only about candidates with the desired output's label (B.4)."""
    num_candidates: int = later(0)
    """The LLM is asked about so many candidates of a query, gold ones and then drawn ones (LLM-R, B.4: 32 of 100); a
    reward model scores them all. 0: all."""
    num_first: int = later(0)
    """likelihood and rank: the LLM is asked about the first so many candidates of a query, gold ones and then the best
    of each source; the others are candidates that rank below all of these (AAR, D.2 and D.5: 10 of 100). 0: all."""
    max_queries: int = later(0)
    """The LLM is asked about so many queries at the most, by equal shares of the data sets that have so many (LLM-R,
    B.4: 200,000); a reward model scores the others. 0: all."""
    prompt: str = later("llm_embedder")
    """Examples: llm_embedder, or llm_r: a blank line behind the candidate, and the first of several desired outputs
    (B.4) instead of one that is drawn."""
    passages_per_call: int = later(5)
    """label only: passages that the LLM is shown at once."""
    check_evidence: bool = later(True)
    """label only: a score above 0 loses 0.5 where its evidence is not in the passage."""
    label_votes: int = later(1)
    """label only: how often each pair is asked, in different company. Votes that differ by 1 are no label."""
    evidence_chars: int = later(60)
    """label only: length of a quote at the most."""


@dataclass(frozen=True, kw_only=True)
class TaskGroup:
    """From scores to training groups (methods.md A.5.1). Filters drop queries, each with a counted reason."""

    min_reward: float | None = None
    """Drop a query whose best reward is below this."""
    min_margin: float = 0.0
    """Drop a query whose best and worst reward differ by no more than this."""
    same_label_negatives: bool = True
    """False: in classification, an example of the query's own data set and label is never its negative (LLM-R, B.8)."""
    with_gold: bool = later(True)
    """False: what the data labels relevant plays no part, a candidate like others, whose place the LLM alone decides
    (REPLUG, Atlas). With mine.with_gold=false it is no candidate either unless it is found."""
    pseudo_weight: float = later(1.0)
    """What a label that the retriever gave itself weighs in the losses of graded labels, beside one of the LLM at 1
    (methods.md C.3). 0: it is a document of the group whose label nothing is learned from."""
    evidence_weight: float = later(0.0)
    """label only: what the LLM quotes from a document that it labels 1 is a positive of its own, which weighs this in
    the losses of graded labels (methods.md C.2 (i): 0.5). 0: quotes only check labels."""


@dataclass(frozen=True, kw_only=True)
class TaskTrain:
    """Sampling and losses of one task (methods.md A.5)."""

    positive: str = "first"
    """first (gold), random (of the gold ones), teacher (best reward of all), teacher_gold (best of the gold ones) or
    gold_and_teacher (the gold ones and the num_preferred best of all: AAR; with num_positives). A query that has
    rewards but no gold document takes teacher in place of first, random and teacher_gold."""
    num_preferred: int = later(2)
    """gold_and_teacher: so many documents that the LLM likes best are positives beside the gold ones, and none of them
    a negative (AAR: 2)."""
    num_positives: int = 1
    """How many of them a group may hold, each against the negatives alone (AAR, D.6); the rest of the group are
    negatives."""
    top_positives: int = 1
    """teacher: the positive is one of so many best, in turn by epoch; none of them is a negative (LLM-R, B.5: 3). A
    query that has no more documents than these is left out."""
    negatives: str = "random"
    """random, first, lowest or highest by reward; sampled anew at every step."""
    bottom_negatives: int = 0
    """lowest: negatives are taken from so many lowest, in turn by epoch (LLM-R, B.5: 16); 0: always the lowest."""
    contrastive_weight: float = 0.0
    """Weight of the contrastive loss (A.5.2)."""
    full_contrastive_weight: float = 0.0
    """Weight of the contrastive loss with queries and positives as negatives too (B.8; LLM-R: 0.2 beside KL)."""
    graded_weight: float = 0.0
    """Weight of graded distillation (A.5.4)."""
    kl_weight: float = 0.0
    """Weight of the group KL (A.5.3)."""
    marginal_weight: float = 0.0
    """Weight of the marginal likelihood of the desired output (EMDR2, F); rewards should be log-likelihoods."""
    listwise_weight: float = 0.0
    """Weight of the listwise loss on graded labels (C.3)."""
    pairwise_weight: float = 0.0
    """Weight of the pairwise loss on graded labels (C.3; ARL2: 0.5 beside listwise)."""
    reward_temperature: float = 1.0
    """Softmax temperature on rewards (teacher)."""
    reward_form: str = "raw"
    """Rewards as the softmax of graded and KL takes them: raw, exp (probabilities of likelihoods), zscore, minmax."""
    student_temperature: float = 1.0
    """kl and marginal: divides the similarities once more."""
    kl_direction: str = "teacher_student"
    """kl: teacher_student, KL(teacher || student), or student_teacher."""
    tie_policy: str = "sorted"
    """graded: strict (tied documents are not each other's negatives) or sorted (released code)."""
    position0: str = "gold_first"
    """graded: gold_first (the chosen positive stays first whatever its reward) or by_reward."""
    include_self: bool = True
    """graded: a document stands in its own denominator (released code); False: as printed, unbounded below, for
    study."""
    lone_weight: str = later("used")
    """The weight of a loss that is a task's only one: used, or ignored (it counts as 1), as that of distillation is in
    LLM-Embedder's released code (I.8)."""
    repeat: int = 1
    """How often the data set occurs in an epoch."""

    @property
    def learns_from_rewards(self) -> bool:
        """Whether a loss, or the choice of a document, needs rewards."""
        by_reward = self.positive in ("teacher", "teacher_gold", "gold_and_teacher") or self.negatives in (
            "lowest",
            "highest",
        )
        return self._weights_on_rewards > 0 or by_reward

    @property
    def has_graded_labels(self) -> bool:
        """Whether a loss takes the rewards as graded labels: above 0 is relevant to some degree (C.3)."""
        return self.listwise_weight + self.pairwise_weight > 0

    @property
    def has_loss(self) -> bool:
        """Whether any term of the loss has weight."""
        return self.contrastive_weight + self.full_contrastive_weight + self._weights_on_rewards > 0

    @property
    def _weights_on_rewards(self) -> float:
        on_group = self.graded_weight + self.kl_weight + self.marginal_weight
        return on_group + self.listwise_weight + self.pairwise_weight


@dataclass(frozen=True, kw_only=True)
class TaskEmbed:
    """Where texts of one task are embedded shorter than others: LLM-Embedder evaluates passages of 128 tokens with an
    embedder trained on 256 (methods.md A.2). Training cuts all tasks at the embedder's limits."""

    max_query_tokens: int = 0
    """0: embedder.max_query_tokens, which is the most."""
    max_document_tokens: int = 0
    """0: embedder.max_document_tokens, which is the most."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One task: instructions of both sides, and what each stage does with it."""

    query_instruction: str = ""
    """Put before a query (methods.md A.2.1)."""
    document_instruction: str = ""
    """Put before a document."""
    embed: TaskEmbed = field(default_factory=TaskEmbed, metadata={"later": True})
    questions: TaskQuestions = field(default_factory=TaskQuestions)
    mine: TaskMine = field(default_factory=TaskMine)
    mine_again: TaskMine | None = None
    """Candidates of the rounds after the first, whose miner is the last round's embedder; without it as `mine`. LLM-R
    mines by BM25 first and by the embedder then (methods.md B.1)."""
    score: TaskScore = field(default_factory=TaskScore)
    group: TaskGroup = field(default_factory=TaskGroup)
    train: TaskTrain = field(default_factory=TaskTrain)

    def mine_in(self, *, again: bool) -> TaskMine:
        """How candidates are mined in the first round, or again."""
        return self.mine_again if again and self.mine_again else self.mine

    def instruction(self, side: str) -> str:
        """What is put before a "query" or a "document"."""
        return {"query": self.query_instruction, "document": self.document_instruction}[side]
