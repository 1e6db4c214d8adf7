"""The commands `llmr serve`, `llmr keys` and `llmr eval`, as far as they go before anything starts."""

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmr_ray.cli import app
from llmr_ray.config import Config, RewardModelConfig
from llmr_ray.errors import ConfigError, ResourceError
from llmr_ray.serving import launch
from llmr_ray.serving.keys import digest, read_keys
from llmr_ray.serving.settings import ServingSettings

ROOT = Path(__file__).parents[2]


def call(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.output


def test_keys_are_made_listed_and_revoked(tmp_path: Path) -> None:
    """The key is shown once; everything else shows its name alone."""
    file = str(tmp_path / "keys.json")
    code, secret = call("keys", "add", "app", "--file", file, "--scope", "read", "--scope", "admin")
    assert code == 0
    [key] = read_keys(Path(file))
    assert (key.name, key.scopes, key.sha256) == ("app", ("read", "admin"), digest(secret.strip()))
    chosen = '{"type": "eq", "key": "lang", "value": "en"}'
    assert call("keys", "add", "tenant", "--file", file, "--filter", chosen)[0] == 0
    assert read_keys(Path(file))[1].filter == json.loads(chosen)
    listed = call("keys", "list", "--file", file)[1]
    assert "app" in listed
    assert "tenant" in listed
    assert secret.strip() not in listed
    assert call("keys", "revoke", "app", "--file", file)[0] == 0
    assert call("keys", "revoke", "app", "--file", file)[0] == 2
    assert call("keys", "add", "x", "--file", file, "--filter", '{"type": "no"}')[0] == 2
    assert call("keys", "add", "x", "--file", file, "--scope", "root")[0] == 2


def test_a_server_for_all_needs_keys() -> None:
    """The mistake must end the command, before anything listens."""
    code, said = call("serve", str(ROOT / "conf" / "quickstart.yaml"), "--host", "0.0.0.0")
    assert code == 2
    assert "API keys" in said


def test_an_evaluation_needs_an_address() -> None:
    """Without one there is nothing that could be asked."""
    assert call("eval", str(ROOT / "conf" / "quickstart.yaml"))[0] == 2


def test_settings_of_the_command_go_before_the_environment_and_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit that an operator sets must not be undone by a file that came with the run."""
    file = tmp_path / "run.yaml"
    file.write_text("name: mine\nserving: {max_top_k: 5, max_texts: 6, max_documents: 7}\n")
    monkeypatch.setenv("LLMR_SERVE_MAX_TEXTS", "60")
    monkeypatch.setenv("LLMR_SERVE_MAX_DOCUMENTS", "70")
    source, config, settings = launch.configured(str(file), ["serving.max_documents=700"])
    assert source == file
    assert (settings.max_top_k, settings.max_texts, settings.max_documents) == (5, 60, 700)
    assert (settings.collection, settings.artifact_root) == ("mine", config.runtime.artifact_root)
    with pytest.raises(ConfigError, match="no run"):
        launch.configured(str(tmp_path), [])


def test_a_taken_port_names_its_owner() -> None:
    """Whoever starts a server wants to know what to stop."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"port {port} of 127.0.0.1 .* process \d+"):
            launch.check_port("127.0.0.1", port)
    launch.check_port("127.0.0.1", port)


def test_a_reward_model_that_reads_the_answer_is_not_served(tmp_path: Path) -> None:
    """It ranks by words that no client sends."""
    settings = ServingSettings(reranker="reward_model")
    for model, words in (
        (RewardModelConfig(), "trains none"),
        (RewardModelConfig(model="minilm-l6", sees_target=True), "desired output"),
    ):
        with pytest.raises(ConfigError, match=words):
            launch.with_reward_model(Config(reward_model=model), settings, tmp_path)
    model = RewardModelConfig(model="minilm-l6", sees_target=False, max_tokens=99)
    found = launch.with_reward_model(Config(reward_model=model), settings, tmp_path)
    assert (found.reranker, found.reranker_max_tokens) == (str(tmp_path), 99)
