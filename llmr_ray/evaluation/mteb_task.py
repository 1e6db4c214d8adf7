"""A data set of a run as a retrieval task of MTEB: any of its models, or RaySearch, measured on the run's own queries.

prepared = Pipeline(loading.load("conf/quickstart.yaml")).prepared
mteb.evaluate(model, retrieval_task(prepared, "hotpotqa"))
"""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from llmr_ray.artifacts import Artifact
from llmr_ray.data.text import document_texts
from llmr_ray.errors import DataError
from llmr_ray.evaluation.metrics import relevance_by_query


class RunRetrieval(AbsTaskRetrieval):
    """What `retrieval_task` makes a subclass of: MTEB wants one for each task. Texts are read when it asks for them."""

    data_loaded: bool

    def __init__(self, prepare: Artifact, queries: pa.Table, relevant: dict[str, dict[str, int]]) -> None:
        self._prepare, self._queries, self._relevant = prepare, queries, relevant
        super().__init__()

    def load_data(self, *_: Any, **__: Any) -> None:
        """Reads the corpus into memory, as MTEB wants it."""
        if self.data_loaded:
            return
        [split] = self.metadata.eval_splits
        queries = self._queries
        corpus = self._prepare.read("corpus", columns=["doc_id", "pool", "title", "text"])
        corpus = corpus.filter(pc.equal(corpus["pool"], queries["pool"][0]))
        documents = Dataset.from_dict({"id": corpus["doc_id"].to_pylist(), "text": document_texts(corpus)})
        asked = Dataset.from_dict({"id": queries["query_id"].to_pylist(), "text": queries["query"].to_pylist()})
        part = {"corpus": documents, "queries": asked, "relevant_docs": self._relevant, "top_ranked": None}
        self.dataset = {"default": {split: part}}
        self.data_loaded = True


def retrieval_task(prepare: Artifact, dataset: str, *, split: str = "test", language: str = "eng-Latn") -> RunRetrieval:
    """A data set's labelled queries and the documents that they are searched in.

    Args:
        prepare: of a finished run, or of one that is prepared.
        dataset: its name in the configuration.
        split: test, or dev.
        language: of the texts, as MTEB writes it.

    Raises:
        DataError: the data set has no labelled query of the split, or its queries are searched in documents of their
            own (a dialogue's turns), which a task of MTEB cannot say.
    """
    queries, relevant = _labelled(prepare, dataset, split)
    metadata = TaskMetadata(
        name=dataset,
        description=f"Queries of '{dataset}' over the documents that an llmr_ray run prepared.",
        dataset={"path": prepare.id, "revision": prepare.id.rpartition("/")[2]},
        type="Retrieval",
        category="t2t",
        eval_splits=[split],
        eval_langs=[language],
        main_score="ndcg_at_10",
    )
    kind: type[RunRetrieval] = type(dataset, (RunRetrieval,), {"metadata": metadata})
    return kind(prepare, queries, relevant)


def _labelled(prepare: Artifact, dataset: str, split: str) -> tuple[pa.Table, dict[str, dict[str, int]]]:
    """The labelled queries of a data set's split, and the relevance of documents by query."""
    known_queries, relevant = prepare.read("queries"), relevance_by_query(prepare.read("qrels"))
    is_of_split = pc.and_(pc.equal(known_queries["dataset"], dataset), pc.equal(known_queries["split"], split))
    queries = known_queries.filter(is_of_split)
    queries = queries.filter(pc.is_in(queries["query_id"], value_set=pa.array(list(relevant), pa.string())))
    if not queries.num_rows:
        known = pc.unique(known_queries["dataset"]).to_pylist()
        raise DataError(
            f"{prepare.id} has no labelled queries of '{dataset}' in the split {split}, so nothing can be measured. "
            f"It has queries of {', '.join(sorted(known))}; labels come with tools, passages and labelled turns alone."
        )
    if len(pc.unique(queries["pool"])) > 1 or queries["history_end"].null_count < queries.num_rows:
        raise DataError(
            f"queries of '{dataset}' are searched in documents of their own, a dialogue's or a text's past, but a task "
            "of MTEB searches all documents for every query. Take its figures from the run's report."
        )
    return queries, {query_id: relevant[query_id] for query_id in queries["query_id"].to_pylist()}
