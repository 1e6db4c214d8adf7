"""One local Ray for the whole ray suite."""

from collections.abc import Iterator

import pytest

from llmr_ray import cluster
from llmr_ray.config import RuntimeConfig


@pytest.fixture(scope="session")
def local_ray() -> Iterator[RuntimeConfig]:
    runtime = RuntimeConfig(object_store_mb=256)
    cluster.start(runtime)
    yield runtime
    cluster.stop()
