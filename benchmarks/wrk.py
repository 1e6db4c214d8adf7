"""What the benchmarks of servers share: a server in a process of its own, and wrk asking it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

LUA = """
wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
wrk.body = [==[%s]==]
local threads = {}
function setup(thread) table.insert(threads, thread) end
function init() ok, busy, other = 0, 0, 0 end
function response(status)
  if status == 200 then ok = ok + 1
  elseif status == 429 or status == 503 then busy = busy + 1
  else other = other + 1 end
end
function done()
  for _, thread in ipairs(threads) do
    print(string.format("statuses %%d %%d %%d", thread:get("ok"), thread:get("busy"), thread:get("other")))
  end
end
"""

PACED = """
local ffi = require("ffi")
ffi.cdef[[ struct moment { long s, us; }; int gettimeofday(struct moment *, void *); ]]
local moment, gap, due = ffi.new("struct moment"), %r, 0
function delay()
  ffi.C.gettimeofday(moment, nil)
  local now = tonumber(moment.s) * 1e3 + tonumber(moment.us) / 1e3
  due = math.max(due + gap, now)
  return due - now
end
"""
"""Requests are sent this many milliseconds apart at the least, over all connections; their latency begins then."""

_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}


def ask(
    url: str, body: dict[str, Any], connections: int, seconds: float, folder: Path, rate: float = 0
) -> dict[str, Any]:
    """Replies by status (200, 429 or 503, any other), broken connections, answers (200) a second, p50 and p99 in ms.

    An answer is waited for as long as a patient client would (30 s): wrk's own two seconds would count as broken what
    waits in the server's queue.

    Args:
        url: what is asked.
        body: of every request.
        connections: each has one request under way.
        seconds: for how long, rounded.
        folder: for wrk's script.
        rate: requests a second at the most; 0: as many as are answered.
    """
    seconds = max(1, round(seconds))  # wrk takes no fractions
    script = folder / "post.lua"
    script.write_text(LUA % json.dumps(body) + (PACED % (1e3 / rate) if rate else ""))
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "--latency"]
    said = subprocess.run([*command, "-s", str(script), url], capture_output=True, text=True, check=True).stdout
    times = re.findall(r"(50|99)%\s+([\d.]+)(us|ms|s)", said)
    p50_ms, p99_ms = (float(x) * _MILLISECONDS[unit] for _, x, unit in times)
    counted = re.findall(r"statuses (\d+) (\d+) (\d+)", said)
    ok, busy, other = (sum(int(row[place]) for row in counted) for place in range(3))
    broken = sum(map(int, re.findall(r"(?:connect|read|write|timeout) (\d+)", said)))
    found = {"ok": ok, "busy": busy, "other": other, "broken": broken, "answers_per_s": ok / seconds}
    return found | {"p50_ms": p50_ms, "p99_ms": p99_ms}


class Process:
    """A script that serves until its standard input is closed, and says "ready" when it does.

    Args:
        script: is run with the arguments.
        arguments: of the command line.
        log: takes its standard error.
    """

    def __init__(self, script: str, arguments: list[str], log: Path) -> None:
        pipe = subprocess.PIPE
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, script, *arguments], stdin=pipe, stdout=pipe, stderr=self._log, text=True
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        while (line := self._process.stdout.readline()) != "ready\n":
            if not line:
                raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")

    def close(self, patience: float = 120) -> None:
        """Ends it; after `patience` seconds, by a signal."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(60)
        self._log.close()
