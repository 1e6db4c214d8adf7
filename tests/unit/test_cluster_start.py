"""A local Ray on a machine that is too busy to start it in the time that Ray waits."""

import signal
import subprocess

import pytest
import ray

from llmr_ray import cluster
from llmr_ray.config import RuntimeConfig
from llmr_ray.errors import ResourceError

BUSY = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


@pytest.fixture
def daemons(monkeypatch):
    """What each start leaves behind; the first `failing` of them fail with `message`."""
    made, told = [], {"failing": 0, "message": BUSY}

    def init(**_):
        made.append(subprocess.Popen(["sleep", "600"]))
        if len(made) <= told["failing"]:
            raise Exception(told["message"])

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield made, told
    for daemon in made:
        daemon.kill()
        daemon.wait()


def test_a_start_that_took_too_long_is_tried_again_without_what_it_left(daemons):
    """A run of hours that is started again after a crash fell over the load that the crash had left."""
    made, told = daemons
    told["failing"] = 1
    cluster.start(RuntimeConfig())
    assert made[0].wait(10) == -signal.SIGKILL
    assert made[1].poll() is None


def test_a_machine_that_stays_busy_is_told_of(daemons):
    made, told = daemons
    told["failing"] = 9
    with pytest.raises(ResourceError, match=r"load average .* Run the same command again"):
        cluster.start(RuntimeConfig())
    assert [daemon.wait(10) for daemon in made] == [-signal.SIGKILL] * 2


def test_other_failures_of_ray_are_its_own(daemons):
    """Tried again they would fail again, and 'busy' would hide why."""
    made, told = daemons
    told |= {"failing": 1, "message": "no such address"}
    with pytest.raises(Exception, match="no such address"):
        cluster.start(RuntimeConfig())
    assert len(made) == 1
