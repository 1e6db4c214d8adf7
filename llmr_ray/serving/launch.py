"""What `llmr serve` settles before anything starts: what is served, who may reach it, and whether its port is free."""

import atexit
import dataclasses
import ipaddress
import logging
import os
import shutil
import socket
import tempfile
from pathlib import Path

import psutil

from llmr_ray import loading
from llmr_ray.config import Config
from llmr_ray.errors import ConfigError, ResourceError
from llmr_ray.serving.models import run_reward_model
from llmr_ray.serving.settings import ServingSettings, environment_values

RESOLVED = "config.resolved.yaml"
"""A run's folder has its configuration under this name."""

PROXIES = {
    # A dead proxy is replaced after three failed checks: 3 s without an answer instead of 30.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # One that starts is given up after 5 s by default, and the server with it; on a busy machine it takes longer.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""The environment of Serve in any mode, in which every node of Ray has to start."""

FAST = PROXIES | {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # What is asked changes nothing, so a request whose process died may be sent to another.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response response-timeout",
    "RAY_SERVE_HAPROXY_INGRESS_RETRY_ON": "conn-failure empty-response response-timeout",
    "RAY_SERVE_HAPROXY_NBTHREAD": "2",
    # A client that stops sending, or reading its answer, loses its connection; as long as idle ones are kept.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "90",
    # The second line goes into HAProxy's defaults below the first: headers must be there within 10 s, or 4,096
    # connections that send them byte by byte would be all that HAProxy takes. Serve has no variable for it.
    "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "leastconn\n    timeout http-request 10s",
    # How long a replica that ends goes on answering, for HAProxy to hear of it; Serve's own 30 s hold up its end.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
}
"""That of its throughput-optimised mode."""

log = logging.getLogger(__name__)


def configured(run_or_config: str, overrides: list[str]) -> tuple[Path, Config, ServingSettings]:
    """The configuration file of a run, what it says, and how the run is to be served.

    A setting is taken from the command line, else from `LLMR_SERVE_*` variables, else from the file.
    """
    path = Path(run_or_config)
    source = path / RESOLVED if path.is_dir() else path
    if path.is_dir() and not source.exists():
        raise ConfigError(f"{path} is no run: it has no {RESOLVED}. Give the folder of a run, or a configuration.")
    config = loading.load(source, overrides)
    said = {item.partition("=")[0].removeprefix("serving.") for item in overrides if item.startswith("serving.")}
    from_environment = {name: value for name, value in environment_values().items() if name not in said}
    settings = config.serving.changed(from_environment)
    absent = {
        "artifact_root": config.runtime.artifact_root,
        "cache_root": config.runtime.cache_root,
        "collection": config.name,
    }
    settings = settings.changed({name: value for name, value in absent.items() if not getattr(settings, name)})
    return source, config, settings


def with_reward_model(config: Config, settings: ServingSettings, folder: Path) -> ServingSettings:
    """Settings in which `reward_model` is that of the run; its folder is where the run made it."""
    if settings.reranker != "reward_model":
        return settings
    path = run_reward_model(config, folder)
    return dataclasses.replace(settings, reranker=path, reranker_max_tokens=config.reward_model.max_tokens)


def check_host(host: str, settings: ServingSettings, *, open_to_all: bool) -> bool:
    """Whether only this machine can reach the server at an address.

    Raises:
        ConfigError: others can, and there are no API keys.
    """
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    if not is_local and not settings.keys_file and not open_to_all:
        raise ConfigError(
            f"at {host} other machines could read the collection, and there are no API keys. Make keys (`llmr keys "
            "add NAME`) and name their file (--keys FILE), or let everybody in with --open-to-all."
        )
    return is_local


def check_port(host: str, port: int) -> None:
    """Raises ResourceError naming the port and who has it, where it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ResourceError(
                f"port {port} of {host} cannot be used ({error.strerror}); {_owner(port)}. Stop that, or choose "
                "another port with --port."
            ) from error


def _owner(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()}) listens there"
    except psutil.Error:
        pass
    return "who has it is not visible to this user"


def free_port() -> int:
    """A port that nobody has just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def prepare(*, fast: bool) -> None:
    """Sets the environment of Serve, throughput-optimised or not; to be called before Ray starts.

    HAProxy's files and side ports are this server's own: by default they are the same for every Serve of a machine. The
    folder of the files goes with this process.
    """
    for name, value in (_fast() if fast else PROXIES).items():
        os.environ.setdefault(name, value)


def _fast() -> dict[str, str]:
    folder = tempfile.mkdtemp(prefix="llmr-serve-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return FAST | {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
    }


def warn_if_slow(settings: ServingSettings) -> None:
    """Logs that `fast` has no effect, where Ray was started without its environment. To be called in a replica."""
    modes = ("RAY_SERVE_THROUGHPUT_OPTIMIZED", "RAY_SERVE_ENABLE_HA_PROXY")
    absent = [name for name in modes if os.environ.get(name) != "1"]
    if settings.fast and absent:
        log.warning(
            "serving.fast has no effect: Ray started without %s=1, so requests go through Serve's Python proxy, about "
            "ten times slower. Start every node with the variables of deploy/kuberay/rayservice.yaml, or set "
            "serving.fast=false.",
            "=1 and ".join(absent),
        )
