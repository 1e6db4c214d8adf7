"""Fetching: nothing unchecked, nothing half, nothing twice. pip is real; its index is a folder of the test."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from llmr_ray import assets
from llmr_ray.artifacts import sha256_file
from llmr_ray.assets import Entry, Package, resolve
from llmr_ray.errors import ResourceError


def make_wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index; LLMR_CACHE points beside it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LLMR_CACHE", str(tmp_path / "cache"))
    return folder


def offer(
    monkeypatch: pytest.MonkeyPatch, wheel: Path, *, sha256: str = "", content: str = "toy/data", gguf: str = ""
) -> None:
    package = Package("toy", "1.0", sha256 or sha256_file(wheel), wheel.stat().st_size)
    monkeypatch.setattr(assets, "CATALOGUE", {"toy-data": Entry("data", package, content, gguf)})


def no_process(*args: object, **kwargs: object) -> None:
    raise AssertionError("a second call started a process")


def test_fetched_once_then_never_again(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without a network must start from the cache; only the catalogue's part of a wheel is unpacked."""
    wheel = make_wheel(index, "toy", {"toy/data/a.json": "[1]", "toy/other.py": "raise SystemExit"})
    offer(monkeypatch, wheel)
    first = resolve("toy-data")
    assert (first.path / "a.json").read_text() == "[1]"
    assert first.fingerprint == sha256_file(wheel)
    assert not list(first.path.parent.rglob("*.py"))
    monkeypatch.setattr(subprocess, "Popen", no_process)
    wheel.unlink()
    assert resolve("toy-data") == first
    assert not list((tmp_path / "cache").glob("*.tmp-*"))


def test_wrong_checksum_is_refused_and_removed(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that serves other bytes under the pinned name must not feed them to anybody."""
    wheel = make_wheel(index, "toy", {"toy/data/a.json": "[2]"})
    offer(monkeypatch, wheel, sha256="ab" * 32)
    with pytest.raises(ResourceError) as caught:
        resolve("toy-data")
    assert "ab" * 32 in str(caught.value)
    assert sha256_file(wheel) in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.json"))
    assert not list((tmp_path / "cache").rglob("*.whl"))


@pytest.mark.parametrize("member", ["../evil.txt", "/tmp/evil.txt", "toy/../../evil.txt", "toy\\..\\evil.txt"])
def test_member_outside_the_folder_is_refused(tmp_path: Path, member: str) -> None:
    """A wheel may not write beside its folder."""
    wheel = make_wheel(tmp_path / "w", "toy", {"toy/data/a.json": "[]", member: "x"})
    with pytest.raises(ResourceError, match="outside"):
        assets.extract_members(wheel, ["toy/data"], tmp_path / "out")
    assert not (tmp_path / "evil.txt").exists()
    assert not (tmp_path / "out").exists()


def test_offline_says_what_to_do(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the message must name the ways out, not show pip's stack."""
    wheel = make_wheel(index, "toy", {"toy/data/a.json": "[]"})
    offer(monkeypatch, wheel)
    wheel.unlink()
    with pytest.raises(ResourceError, match=r"toy==1\.0.*PIP_FIND_LINKS.*LLMR_CACHE"):
        resolve("toy-data")


def test_killed_fetch_leaves_nothing_half(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that a killed process left must neither be used nor stay."""
    offer(monkeypatch, make_wheel(index, "toy", {"toy/data/a.json": "[1]"}))
    half = tmp_path / "cache" / "toy-1.0.tmp-dead" / "toy" / "data"
    half.mkdir(parents=True)
    (half / "a.json").write_text("[")
    assert (resolve("toy-data").path / "a.json").read_text() == "[1]"
    assert not half.exists()


def cached_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sha256: str = "") -> None:
    """A cache that already holds the unpacked package of a GGUF model."""
    gguf = tmp_path / "cache" / "toy-1.0" / "toy" / "m.gguf"
    gguf.parent.mkdir(parents=True)
    gguf.write_text("weights")
    offer(monkeypatch, gguf, content="toy/m.gguf", gguf=sha256 or sha256_file(gguf))


def test_failed_conversion_leaves_nothing_half(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model folder without its weights would be loaded with random ones."""
    cached_gguf(tmp_path, monkeypatch)

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        (Path(command[-1]) / "config.json").write_text("{}")
        return subprocess.CompletedProcess(command, 1, "", "no memory")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ResourceError, match="no memory"):
        resolve("toy-data")
    assert not (tmp_path / "cache" / "toy-data-bfloat16").exists()
    assert not list((tmp_path / "cache").glob("*.tmp-*"))


def test_wrong_gguf_is_refused(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unpacked weights are checked too: the cache may have been touched since."""
    cached_gguf(tmp_path, monkeypatch, sha256="cd" * 32)
    with pytest.raises(ResourceError, match="cd" * 32):
        resolve("toy-data")


def test_onnx_model_is_converted_like_another_asset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package without a tokenizer needs the other one to be converted, and is another model with another one."""
    monkeypatch.setenv("LLMR_CACHE", str(tmp_path))
    source, like = tmp_path / "bare-1.0" / "bare" / "model" / "m.onnx", tmp_path / "toy-1.0" / "toy"
    for folder in (source.parent, like):
        folder.mkdir(parents=True)
    source.write_text("weights")

    def catalogue(sha256: str) -> dict[str, Entry]:
        bare = Entry("model", Package("bare", "1.0", "ab", 1), "bare/model/m.onnx", sha256_file(source), like="toy-l6")
        return {"toy-l3": bare, "toy-l6": Entry("model", Package("toy", "1.0", sha256, 1), "toy")}

    asked = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command[-3:-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(assets, "CATALOGUE", catalogue("cd"))
    first = resolve("toy-l3")
    assert first.path == tmp_path / "toy-l3-float32"
    assert first.fingerprint not in ("ab", "cd")
    shutil.rmtree(like)
    assert resolve("toy-l3") == first
    assert asked == [[str(source), str(like)]]
    monkeypatch.setattr(assets, "CATALOGUE", catalogue("ef"))
    assert resolve("toy-l3").fingerprint != first.fingerprint


def test_wrong_model_file_names_the_folder_to_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deleting less than the package's folder leaves one that is taken for complete."""
    monkeypatch.setenv("LLMR_CACHE", str(tmp_path))
    source = tmp_path / "bare-1.0" / "bare" / "model" / "m.onnx"
    source.parent.mkdir(parents=True)
    source.write_text("weights")
    bare = Entry("model", Package("bare", "1.0", "ab", 1), "bare/model/m.onnx", "cd" * 32)
    monkeypatch.setattr(assets, "CATALOGUE", {"toy": bare})
    with pytest.raises(ResourceError, match=rf"Delete {tmp_path / 'bare-1.0'};"):
        resolve("toy")


def test_local_fingerprint_is_the_content(tmp_path: Path) -> None:
    """Changed user data must redo the stages; a copy of the same data must not."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "qrels").mkdir(parents=True)
        (folder / "queries.jsonl").write_text("{}")
        (folder / "qrels" / "test.tsv").write_text("a\tb\t1")
        (folder / ".cache").write_text(folder.name)
    assert resolve(str(one)).fingerprint == resolve(str(two)).fingerprint
    (two / "qrels" / "test.tsv").write_text("a\tb\t2")
    assert resolve(str(one)).fingerprint != resolve(str(two)).fingerprint
    (two / "qrels" / "test.tsv").rename(two / "qrels" / "dev.tsv")
    (two / "qrels" / "dev.tsv").write_text("a\tb\t1")
    assert resolve(str(one)).fingerprint != resolve(str(two)).fingerprint
    file = resolve(str(one / "queries.jsonl"))
    assert (file.kind, file.path) == ("local", one / "queries.jsonl")


def test_unknown_name_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped asset must not end in a stack trace of the hub's client."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match=r"minilm-l7.*minilm-l6"):
        resolve("minilm-l7")
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE"):
        resolve("nobody/no-such-model")


def test_stdlib_files_are_source_and_long() -> None:
    """Test data, tables and short modules in the pool would make the memory task a different one."""
    asset = resolve(assets.STDLIB)
    files = assets.stdlib_files(asset.path)
    names = {path.relative_to(asset.path).as_posix() for path in files}
    assert {"argparse.py", "asyncio/base_events.py"} <= names
    assert not [name for name in names if {"test", "tests", "encodings", "site-packages"} & set(name.split("/"))]
    assert not [name for name in names if "_sysconfigdata" in name]
    assert all(path.stat().st_size >= 20_000 for path in files)
