"""Small files in the formats in which data sets of this field are published; every row was written for these tests."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmr_ray.config import DatasetConfig
from llmr_ray.data.example_tasks import TASKS
from llmr_ray.data.records import Record, Source
from llmr_ray.data.sources import reader

RTE = "{} Based on the paragraph above can we conclude that it is wet? Yes or No?".format
NAN = float("nan")


def read(path: Path, kind: str, name: str = "", *, tokenizer: Path | None = None, **settings: Any) -> list[Record]:
    config = DatasetConfig(source=kind, **{"task": "qa", **settings})
    return list(reader(kind)(Source(name=name or kind, config=config, path=path, tokenizer=tokenizer or path)))


def kinds(records: list[Record], kind: type) -> list[Any]:
    return [record for record in records if isinstance(record, kind)]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n"
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


NQ_CORPUS = [
    {"title": "Moon", "text": "It circles the Earth."},
    {"title": "", "text": "Rivers run to the sea."},
    {"title": None, "text": "Bread is baked."},
    b'{"title": "broken',
    {"title": "Tin", "text": "A metal."},
    {"title": "Moon", "text": "It circles the Earth."},  # a copy
]
NQ_TRAIN: list[dict[str, Any]] = [
    {
        "query": "what circles the earth",
        "answers": ["the Moon"],
        "pos": ["Moon It circles the Earth."],
        "neg": ["Rivers run to the sea.", "Cars drive.", "Tin A metal."],
        "pos_index": [0],
        "teacher_scores": [-0.5, -2.0, NAN, -3.0],
        "task": "qa",
        "query_id": 7,
    },
    # Without answers; texts that the corpus has in another form, known by their rows; fields that are there but null.
    {
        "query": "where do rivers run",
        "pos": ["the sea it is"],
        "neg": None,
        "pos_index": 1,
        "neg_index": None,
        "query_id": "8",
    },
    # The same id for another row, and a row that is there twice.
    {"query": "what is baked", "answers": None, "pos": ["Bread is baked."], "neg": ["A metal."], "query_id": 7},
    {
        "query": "where do rivers run",
        "pos": ["the sea it is"],
        "neg": None,
        "pos_index": 1,
        "neg_index": None,
        "query_id": "8",
    },
    # Scores that are not one for each.
    {"query": "short", "pos": ["Bread is baked."], "neg": ["Cars drive."], "teacher_scores": [-1.0], "query_id": 9},
]
NQ_TEST = [
    {"query": "which metal", "query_id": 7, "pos_index": ["4"], "answers": ["tin"], "key": ["x"], "key_index": [1]},
    {"query": "no such row", "query_id": 1, "pos_index": [99], "answers": ["x"]},
]
MMLU = [
    {"query": "What is tin?", "choices": ["a fish", "a metal"], "answer": 1, "subject": "chemistry", "query_id": 0},
    {"query": "What is bread?", "choices": ["a food", "a metal"], "answer": 5, "subject": "cooking", "query_id": 1},
]
POPQA = [{"query": "Who baked it?", "obj": "Ann", "prop_id": 22, "possible_answers": '["Ann", "Annie"]', "query_id": 3}]
QRECC = [
    {
        "query": "rivers? and the sea?",
        "pos": ["Rivers run to the sea."],
        "neg": ["Cars drive."],
        "pos_index": [54000000],
    }
]
MSC = [
    {
        "query": "Do you still bake?",
        "answers": ["Every day."],
        "history": ["Speaker 1: Hi.\nSpeaker 2: I bake.", "", "Speaker 1: Nice.\nSpeaker 2: It is."],
        "teacher_scores": [-0.2, -9.0, float("-inf")],
        "task": "chat",
    },
    {"query": "Hello?", "answers": ["Hi."], "history": [""], "task": "chat"},
]
LRLM_TRAIN = [
    {
        "query": "chunk nine",
        "pos": [],
        "neg": ["chunk one", "chunk two"],
        "teacher_scores": [-1.5, -0.5],
        "answers": ["chunk ten"],
        "context": "",
        "query_inputs": [1, 2],
        "task": "lrlm",
    }
]
ICL_CORPUS = [
    {"contents": RTE("It rains.") + "\nYes", "task_name": "rte"},
    {"contents": RTE("It snows.") + "\nNo", "task_name": "rte"},
    {"contents": "What is hot?\nfire", "task_name": "arc_e"},
    {"contents": RTE("It pours.") + "\nYes", "task_name": "rte"},  # a test query's input
    {"contents": "no task"},
]
ICL_TRAIN = [
    {
        "query": RTE("It rains."),
        "pos": [ICL_CORPUS[1]["contents"]],
        "pos_scores": [-5.0],
        "neg": ["What is hot?\nfire", ICL_CORPUS[1]["contents"]],
        "neg_score": [-6.0, -7.0],
        "teacher_scores": [-5.0, -6.0, -7.0],
        "task": "icl",
    },
    {"query": "What is cold?", "pos": ["What is hot?\nfire"], "neg": [], "teacher_scores": [-1.0], "task": "icl"},
]
ICL_TEST = [
    {"query": RTE("It pours."), "answers": ["0"], "options": ["Yes", "No"], "task_name": "rte"},
    {"query": "What is cold?", "answers": ["1"], "options": ["fire", "ice"], "task_name": "arc_e"},
]
TOOL_CORPUS = [{"text": "weather: tells the weather"}, {"text": "clock: tells the time"}]
TOOL_TRAIN = [
    {"query": "is it late", "pos": ["clock: tells the time"], "neg": ["weather: tells the weather"], "qid": "a1"}
]


def llm_embedder(root: Path) -> Path:
    """LLM-Embedder's archive in small."""
    files: dict[str, list[Any]] = {
        "qa/nq/corpus.json": NQ_CORPUS,
        "qa/nq/train.json": NQ_TRAIN,
        "qa/nq/test.json": NQ_TEST,
        "qa/popqa/test.json": POPQA,
        "qa/msmarco/corpus.json": [{"title": "", "text": "Tin is a metal."}],
        "qa/msmarco/train.json": [{"query": "tin", "pos": ["Tin is a metal."], "neg": ["A fish."], "query_id": 1}],
        "qa/mmlu/test.json": MMLU,
        "convsearch/qrecc/train.json": [{"query": "not this form"}],
        "convsearch/qrecc/train.concat.json": QRECC,
        "convsearch/qrecc/corpus.json.gz": [{"text": "Rivers run to the sea."}],
        "chat/msc/train.json": MSC,
        "lrlm/arxiv/train.json": LRLM_TRAIN,
        "icl/icl/corpus.json": ICL_CORPUS,
        "icl/icl/train.json": ICL_TRAIN,
        "icl/icl/test.json": ICL_TEST,
        "tool/toolbench/corpus.json": TOOL_CORPUS,
        "tool/toolbench/train.json": TOOL_TRAIN,
        "tool/toolbench/test.json": [{"query": "rain?", "qid": "a1", "pos_index": [0]}],
    }
    for name, rows in files.items():
        write_lines(root / name, rows)
    return root


RELATIONS = (22, 218, 91, 257, 182, 164, 526, 97, 533, 639, 472, 106, 560, 484, 292, 422)
SUBJECTS = ("abstract_algebra", "philosophy", "sociology", "virology", "anatomy")


def whole_llm_embedder(root: Path) -> Path:
    """LLM-Embedder's archive with every data set of the paper in it, a few rows each."""
    llm_embedder(root)
    files: dict[str, list[Any]] = {
        "qa/nq/dev.json": [{"query": f"which is it {n}", "answers": [f"it {n}"], "query_id": n} for n in range(12)],
        "qa/popqa/test.json": [
            {"query": f"Who is {n} of {p}?", "obj": f"Ann {p}", "prop_id": p, "possible_answers": f'["Ann {p}"]'}
            for p in RELATIONS
            for n in range(2)
        ],
        "qa/mmlu/test.json": [
            {"query": f"What is {s} {n}?", "choices": ["a fish", "tin", "ice", "sun"], "answer": n, "subject": s}
            for s in SUBJECTS
            for n in range(2)
        ],
        "convsearch/qrecc/test.concat.json": [{"query": "sea? river?", "pos": ["Rivers run to the sea."]}],
        "chat/msc/test.json": [
            {"query": "Do you bake?", "answers": ["I do."], "history": ["Speaker 1: Hi.\nSpeaker 2: Hello."]}
        ],
    }
    for number, name in enumerate(("arxiv", "books3", "codeparrot", "pg19")):
        text = "".join(f"{number}{place:04d} goes on. " for place in range(300))
        files[f"lrlm/{name}/test.json"] = [{"text": text}]
        if name != "pg19":
            files[f"lrlm/{name}/train.json"] = LRLM_TRAIN
    corpus, train, test = [], [], []
    for name, task in TASKS.items():
        options = [*task.labels] or (["a fish", "a metal"] if task.kind == "choice" else [])
        answer = options[0] if options else "the answer"
        if not task.pool and name != "wsc273":
            inputs = [f"Input {number} of {name}" for number in range(3)]
            corpus += [{"contents": f"{text}\n{answer}", "task_name": name} for text in inputs]
            train.append({"query": inputs[0], "pos": [f"{inputs[1]}\n{answer}"], "neg": [f"{inputs[2]}\n{answer}"]})
            train[-1] |= {"teacher_scores": [-1.0, -2.0], "answers": [answer], "task": "icl"}
        if name != "mnli":
            row = {"query": f"Test of {name}", "options": options or [""], "task_name": name}
            test.append(row | {"answers": ["0" if options else answer]})
    files |= {"icl/icl/corpus.json": corpus, "icl/icl/train.json": train, "icl/icl/test.json": test}
    for file, rows in files.items():
        write_lines(root / file, rows)
    return root


def api(tool: str, name: str, description: str) -> dict[str, Any]:
    return {
        "category_name": "Home",
        "tool_name": tool,
        "api_name": name,
        "api_description": description,
        "required_parameters": [{"name": "q"}],
        "optional_parameters": [],
        "method": "GET",
        "template_response": {"ok": "bool"},
    }


APIS = [
    api("Clock", "now", 'tells\tthe "time"\nof day'),
    api("Sky", "rain", "tells rain"),
    api("Sky", "sun", "tells sun"),
]


def toolbench(root: Path) -> Path:
    """The tables of ToolBench's retriever in small, as pandas writes them."""
    root.mkdir(parents=True)

    def write(name: str, rows: list[list[Any]]) -> None:
        with (root / name).open("w", newline="") as file:
            csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)

    documents = [[number, json.dumps(item)] for number, item in enumerate(APIS, 1)]
    write("corpus.tsv", [["docid", "document_content"], *documents, documents[0], [9, "{cut"]])
    write("train.query.txt", [[1, "what time\tis it"], [2, "rain or sun?"], [2, "rain or sun?"]])
    write("test.query.txt", [[3, "rain?"], [4, "nothing?"]])
    write("qrels.train.tsv", [[1, 0, 1, 1], [2, 0, 2, 1], [2, 0, 3, 1]])
    write("qrels.test.tsv", [[3, 0, 2, 1], [4, 0, 77, 1]])
    return root


def instructions(root: Path) -> Path:
    """ToolBench's instructions in small."""
    rows = [
        {"api_list": APIS, "query": "what time?", "relevant APIs": [["Clock", "now"]], "query_id": 11},
        {"api_list": APIS[1:], "query": ["rain?"], "relevant APIs": [["Sky", "rain"], ["Sky", "sun"]]},
        {"api_list": APIS[1:], "query": "lost?", "relevant APIs": [["Sea", "tide"]], "query_id": 13},
    ]
    (root / "instruction").mkdir(parents=True)
    (root / "instruction" / "G1_query.json").write_text(json.dumps(rows, indent=2))
    (root / "test_query_ids").mkdir()
    (root / "test_query_ids" / "G1_tool.json").write_text(json.dumps({"11": 0}))
    return root


def mteb(root: Path) -> Path:
    """A retrieval data set as the hub lays it out: Parquet in folders, one for each table."""
    tables = {
        "corpus/corpus-00000-of-00002.parquet": [{"_id": "d1", "title": "Tin", "text": "a metal"}],
        "corpus/corpus-00001-of-00002.parquet": [{"_id": "d2", "title": "", "text": "a river"}],
        "queries/queries-00000-of-00001.parquet": [{"_id": "q1", "text": "metal?"}, {"_id": "q2", "text": "river?"}],
        "data/validation-00000-of-00001.parquet": [{"query-id": "q1", "corpus-id": "d1", "score": 2.0}],
        "data/test-00000-of-00001.parquet": [
            {"query-id": "q2", "corpus-id": "d2", "score": 1.0},
            {"query-id": "q2", "corpus-id": "d1", "score": 0.0},
        ],
    }
    for name, rows in tables.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), root / name)
    return root
