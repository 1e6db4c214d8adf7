"""Benchmarks take too long to run with the tests. They must at least load."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))


def test_every_benchmark_loads() -> None:
    """One that names what is no longer there is found out on the day its figures are wanted. mypy sees to the rest."""
    assert {"loads", "serving", "encoding"} <= set(BENCHMARKS)
    load = f"import importlib\nfor name in {BENCHMARKS}: importlib.import_module(name)"
    path = f"{ROOT / 'benchmarks'}:{ROOT}"  # as `python benchmarks/NAME.py` has it, and `tests` for one of them
    done = subprocess.run(
        [sys.executable, "-c", load], env={"PATH": "/usr/bin", "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
