"""Pages as a browser shows them: headless Chromium, where it is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

needs_browser = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")


def rendered(url: str, profile: Path, *, wait_ms: int = 3000) -> str:
    """The document at `url` as HTML after its scripts ran for `wait_ms` of the browser's own time."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += [f"--virtual-time-budget={wait_ms}", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode()
