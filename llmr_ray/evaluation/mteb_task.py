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


class RunRetrieval(AbsTaskRetrieval):
    """What `retrieval_task` makes a subclass of: MTEB wants one for each task. Texts are read when it asks for them."""

    data_loaded: bool

    def __init__(self, prepare: Artifact, dataset: str) -> None:
        self._prepare, self._of = prepare, dataset
        super().__init__()

    def load_data(self, *_: Any, **__: Any) -> None:
        """Reads corpus, queries and labels into memory, as MTEB wants them."""
        if self.data_loaded:
            return
        [split] = self.metadata.eval_splits
        queries, relevant = _labelled(self._prepare, self._of, split)
        corpus = self._prepare.read("corpus", columns=["doc_id", "pool", "title", "text"])
        corpus = corpus.filter(pc.equal(corpus["pool"], queries["pool"][0]))
        texts = document_texts(corpus.select(["title", "text"]))
        documents = Dataset.from_dict({"id": corpus["doc_id"].to_pylist(), "text": list(texts)})
        asked = Dataset.from_dict({"id": queries["query_id"].to_pylist(), "text": queries["query"].to_pylist()})
        part = {"corpus": documents, "queries": asked, "relevant_docs": relevant, "top_ranked": None}
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
    _labelled(prepare, dataset, split)
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
    return kind(prepare, dataset)


def _labelled(prepare: Artifact, dataset: str, split: str) -> tuple[pa.Table, dict[str, dict[str, int]]]:
    """The labelled queries of a data set's split, and the relevance of documents by query."""
    queries = prepare.read("queries")
    queries = queries.filter(pc.and_(pc.equal(queries["dataset"], dataset), pc.equal(queries["split"], split)))
    qrels = prepare.read("qrels")
    queries = queries.filter(pc.is_in(queries["query_id"], value_set=pc.unique(qrels["query_id"])))
    if not queries.num_rows:
        known = pc.unique(prepare.read("queries")["dataset"]).to_pylist()
        raise DataError(
            f"{prepare.id} has no labelled queries of '{dataset}' in the split {split}, so nothing can be measured. "
            f"It has queries of {', '.join(sorted(known))}; labels come with tools, passages and labelled turns alone."
        )
    if len(pc.unique(queries["pool"])) > 1 or queries["history_end"].null_count < queries.num_rows:
        raise DataError(
            f"queries of '{dataset}' are searched in documents of their own, a dialogue's or a text's past, but a task "
            "of MTEB searches all documents for every query. Take its figures from the run's report."
        )
    relevant: dict[str, dict[str, int]] = {query_id: {} for query_id in queries["query_id"].to_pylist()}
    for row in qrels.to_pylist():
        if row["query_id"] in relevant:
            relevant[row["query_id"]][row["doc_id"]] = row["relevance"]
    return queries, relevant
