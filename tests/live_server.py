"""The server's routes over real HTTP, in a thread, without Ray."""

import threading
import time
from typing import Any

import httpx
import uvicorn

from llmr_ray.serving.api import Service, build_api

HTTP = httpx.Client(timeout=30)
"""Making a client costs more than a request."""


class Server:
    """uvicorn in a thread."""

    def __init__(self, service: Service) -> None:
        self.service = service
        config = uvicorn.Config(build_api(service), port=0, log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return HTTP.post(self.url + path, json=body, headers=headers, timeout=30)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
