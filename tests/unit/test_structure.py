"""Rules of the code base that hold because a test holds them."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "llmr_ray"
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def uses(path: Path, library: str) -> bool:
    return any(name == library or name.startswith(library + ".") for name in imports(path))


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("ray", r"(.*/stage|training/fit|feedback/pool|cluster|pipeline|index/searcher|serving/app)\.py"),
        ("vllm", r"feedback/engine_vllm\.py"),
        ("faiss", r"index/(shards|approximate|gpu)\.py"),
        ("torch.distributed", r"training/(gather|step)\.py"),
        ("bm25s", r"mining/bm25\.py"),
        ("peft", r"training/adapters\.py"),
        ("onnx", r"conversion\.py"),
        ("mteb", r"evaluation/mteb_(search|task)\.py"),
        ("httpx", r"clients/http\.py"),
        ("langchain_core", r"clients/langchain\.py"),
        ("llama_index", r"clients/llama_index\.py"),
    ],
)
def test_heavy_libraries_stay_at_their_edge(library: str, allowed: str) -> None:
    """Logic that imports Ray or vLLM cannot be tested or read without them."""
    strays = [
        path for path in MODULES if uses(path, library) and not re.fullmatch(allowed, str(path.relative_to(PACKAGE)))
    ]
    assert strays == []


def test_stages_do_not_import_each_other() -> None:
    """The pipeline composes stages; a stage that calls another cannot be run alone."""
    for path in PACKAGE.rglob("stage.py"):
        others = [name for name in imports(path) if re.fullmatch(r"llmr_ray\.\w+\.stage(\..*)?", name)]
        own = f"llmr_ray.{path.parent.name}.stage"
        assert [name for name in others if not name.startswith(own)] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_fit_a_head_and_say_what_they_are(path: Path) -> None:
    """A file without a docstring, or of a thousand lines, is one that nobody reads."""
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), path
    assert len(text.splitlines()) <= 450, path


FORBIDDEN = (
    r"pickle\.load|torch\.load\(|trust_remote_code=True|allow_pickle=True|yaml\.load\(|shell=True|(?<![\w.])eval\("
)


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "jobs").glob("*.py"))], ids=lambda path: path.name)
def test_nothing_runs_code_from_data(path: Path) -> None:
    """Pickle, remote code, eval and shells built from data turn a data file into a program."""
    assert not re.search(FORBIDDEN, path.read_text())


def test_no_job_hides_a_standard_module() -> None:
    """A script's folder comes first on the path: beside jobs/select.py, `import select` loads that."""
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} & sys.stdlib_module_names == set()
