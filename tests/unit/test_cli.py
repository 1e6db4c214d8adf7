"""What the command line hands on; what is done with it is tested where it is done."""

import sys

import pytest
from typer.testing import CliRunner

from llmr_ray import cli, pipeline


@pytest.fixture
def calls(monkeypatch):
    """The calls of run_config: positional arguments, then those by name."""
    found = []
    monkeypatch.setattr(pipeline, "run_config", lambda *given, **named: found.append((given, named)))
    return found


@pytest.mark.parametrize("flags", [[], ["--allow-restart"]])
def test_only_who_says_so_trains_anew_and_it_is_no_setting(calls, monkeypatch, flags):
    """Prevents the flag from being lost, from being read as a setting, or from being on by itself."""
    assert CliRunner().invoke(cli.app, ["run", "x.yaml", "seed=3", *flags]).exit_code == 0
    monkeypatch.setattr(sys, "argv", ["train.py", "x.yaml", "seed=3", *flags])
    cli.run_stage("train")
    for given, named in calls:
        assert given == ("x.yaml", ["seed=3"])
        assert named["allow_restart"] is bool(flags)
    assert len(calls) == 2
