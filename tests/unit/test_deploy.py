"""What lies in deploy/: manifests, images, dashboard, alerts, and `cluster.yaml`.

Pod templates, policies and claims are held against Kubernetes' own types, which its Python client brings. KubeRay's
CRDs come with no package that tests could install: the few fields that are KubeRay's are checked against
tests/kuberay_schema.json, kept by hand after its types; it refuses every other, which finds misspelt and misplaced
fields. The Serve configuration, the server's settings and cluster.yaml are checked by the code that reads them.
"""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pydantic
import pytest
import yaml
from kubernetes import client
from prometheus_client.parser import text_string_to_metric_families
from ray.autoscaler._private.util import validate_config
from ray.serve.schema import ServeDeploySchema

from llmr_ray import loading
from llmr_ray.serving import launch
from llmr_ray.serving.metrics import Metrics
from llmr_ray.serving.settings import ServingSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RAY = sorted((DEPLOY / "kuberay").glob("ray*.yaml"))
ray_manifests = pytest.mark.parametrize("path", RAY, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["spec"].get("rayClusterSpec") or manifest["spec"]["rayClusterConfig"]


def groups_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(manifest)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


# --- KubeRay ---------------------------------------------------------------------------------------------------------


@ray_manifests
def test_manifests_have_no_field_that_kuberay_does_not_know(path: Path) -> None:
    """The API server drops unknown fields without a word: a misspelt `authOptions` is an open cluster."""
    schema = json.loads((ROOT / "tests" / "kuberay_schema.json").read_text())
    jsonschema.validate(read(path), schema)
    wrong = read(path)
    cluster_of(wrong)["authOption"] = cluster_of(wrong).pop("authOptions")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


@ray_manifests
def test_pods_are_what_kubernetes_takes(path: Path) -> None:
    """Unknown fields are dropped without a word here too: a misspelt security context is a pod that runs as root."""
    for group in groups_of(read(path)):
        client.V1PodTemplateSpec.model_validate(group["template"])
    spec = group["template"]["spec"]
    spec["securityContexts"] = spec.pop("securityContext")
    spec["containers"][0]["ports"] = [{"name": "serve", "containerPort": "8000"}]
    del spec["volumes"][0]["name"]
    with pytest.raises(pydantic.ValidationError) as found:
        client.V1PodTemplateSpec.model_validate(group["template"])
    assert found.value.error_count() == 3


@pytest.mark.parametrize("name", ["base", "networkpolicy"])
def test_policies_and_claims_are_what_kubernetes_takes(name: str) -> None:
    for document in yaml.safe_load_all((DEPLOY / "kuberay" / f"{name}.yaml").read_text()):
        assert document["apiVersion"] == ("v1" if name == "base" else "networking.k8s.io/v1")
        getattr(client, f"V1{document['kind']}").model_validate(document)


@ray_manifests
def test_no_cluster_is_open_and_no_pod_is_root(path: Path) -> None:
    """An open Ray head runs commands for whoever finds it (ShadowRay)."""
    manifest = read(path)
    cluster = cluster_of(manifest)
    assert cluster["authOptions"] == {"mode": "token", "secretName": "llmr-ray-token"}
    assert cluster["rayVersion"] == version("ray")
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in groups_of(manifest):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        names = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {mount["name"] for mount in container["volumeMounts"]} == names
            assert set(container["resources"]["limits"]) >= {"cpu", "memory"}


def test_no_secret_stands_in_a_manifest() -> None:
    """What is committed once is known for ever; secrets are named, never given."""
    for path in DEPLOY.rglob("*.yaml"):
        for document in yaml.safe_load_all(path.read_text()):
            assert document.get("kind") != "Secret", path
    for path in RAY:
        for group in groups_of(read(path)):
            for container in group["template"]["spec"]["containers"]:
                for variable in container.get("env", []):
                    assert "valueFrom" in variable or not re.search("KEY|TOKEN|SECRET|PASSWORD", variable["name"])


@ray_manifests
def test_what_a_job_runs_is_there(path: Path) -> None:
    """A wrong path is only found after the GPUs have started."""
    manifest = read(path)
    if manifest["kind"] != "RayJob":
        return
    entry = manifest["spec"]["entrypoint"]
    configs = re.findall(r"conf/\S+\.yaml", entry)
    assert configs
    mounts = [one["mountPath"] for group in groups_of(manifest)
              for one in group["template"]["spec"]["containers"][0]["volumeMounts"]]  # fmt: skip
    for config in configs:
        runtime = loading.load(ROOT / config).runtime
        for folder in (runtime.artifact_root, runtime.run_root, runtime.cache_root):
            assert any(Path(folder).is_relative_to(mount) for mount in mounts), folder
        workers = cluster_of(manifest)["workerGroupSpecs"][0]
        gpus = workers["replicas"] * int(
            workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        )
        assert gpus == runtime.train_workers, "the job waits for GPUs that never come, or leaves some idle"
    stages = re.search(r"for stage in ([\w ]+);", entry)
    names = stages[1].split() if stages else re.findall(r"jobs/(\w+)\.py", entry)
    assert all((ROOT / "jobs" / f"{name}.py").exists() for name in names)


def test_the_service_is_one_that_serve_and_the_server_understand() -> None:
    """Serve reads this text long after `kubectl apply` said that all was well."""
    manifest = read(DEPLOY / "kuberay" / "rayservice.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    [application] = config.applications
    assert application.import_path == "llmr_ray.serving.app:app"
    settings = ServingSettings.of(application.args, environment={})
    assert settings.keys_file, "the pod's port is reached by other pods, so there must be keys"
    assert config.http_options.request_timeout_s > settings.request_timeout_s
    [workers] = cluster_of(manifest)["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    replicas = settings.ingress_replicas + settings.encoder_replicas + settings.shard_groups * settings.shard_replicas
    assert replicas <= workers["replicas"] * int(limits["cpu"]), "replicas that cannot be placed wait for ever"
    # KubeRay tells Ray the container's limit, 30% of which its object store takes.
    room = int(limits["memory"].removesuffix("Gi")) * 1024 * 0.7
    holding = settings.shard_groups * settings.shard_replicas
    assert 0 < settings.shard_memory_mb * -(-holding // workers["replicas"]) <= room, "likewise"
    mounts = [mount["mountPath"] for mount in workers["template"]["spec"]["containers"][0]["volumeMounts"]]
    for path in (settings.artifact_root, settings.cache_root, settings.keys_file):
        assert any(Path(path).is_relative_to(mount) for mount in mounts), path


def test_every_node_of_the_service_starts_in_the_fast_mode() -> None:
    """Serve reads the variables when its processes start; a setting of the application comes too late."""
    manifest = read(DEPLOY / "kuberay" / "rayservice.yaml")
    for group in groups_of(manifest):
        for container in group["template"]["spec"]["containers"]:
            given = {variable["name"]: variable["value"] for variable in container["env"]}
            assert {name: given.get(name) for name in launch.FAST} == launch.FAST
    [application] = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"])).applications
    assert ServingSettings.of(application.args, environment={}).fast


def test_the_network_is_closed_but_for_what_is_needed() -> None:
    """A policy that selects no pod, or an empty `from`, lets everything in."""
    policies = list(yaml.safe_load_all((DEPLOY / "kuberay" / "networkpolicy.yaml").read_text()))
    base = list(yaml.safe_load_all((DEPLOY / "kuberay" / "base.yaml").read_text()))
    namespace = base[0]["metadata"]["name"]
    assert all(one["metadata"]["namespace"] == namespace for one in [*policies, *base[1:], *map(read, RAY)])
    deny = policies[0]["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    labels = [group["template"]["metadata"]["labels"] for path in RAY for group in groups_of(read(path))]
    for policy in policies[1:]:
        spec = policy["spec"]
        chosen = spec["podSelector"].get("matchLabels", {})
        assert any(chosen.items() <= pod.items() for pod in labels), f"{policy['metadata']['name']} is for no pod"
        for rule in spec.get("ingress", []):
            assert rule["from"]
            outside = [peer for peer in rule["from"] if "podSelector" not in peer]
            assert not outside or rule["ports"], "from outside the cluster, ports are named"
            assert all(peer.get("namespaceSelector", {"x": 1}) for peer in rule["from"])
            assert not {port["port"] for port in rule.get("ports", [])} & {6379, 10001}
        for rule in spec.get("egress", []):
            assert rule["to"]
    claims = {one["metadata"]["name"] for one in base if one["kind"] == "PersistentVolumeClaim"}
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for path in RAY
        for group in groups_of(read(path))
        for volume in group["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert used == claims


# --- metrics ---------------------------------------------------------------------------------------------------------


def exported() -> dict[str, str]:
    """Each metric's kind by the name of its family, as the server writes them; counters with their ending."""
    metrics = Metrics()
    families = text_string_to_metric_families(metrics.text())
    return {one.name + ("_total" if one.type == "counter" else ""): one.type for one in families
            if not one.name.endswith("_created")}  # fmt: skip


def asked(expressions: list[str]) -> set[str]:
    """The families that PromQL expressions name."""
    names = {name for text in expressions for name in re.findall(r"\bllmr_\w+", text)}
    kinds = exported()
    histogram = {f"{name}{end}": name for name, kind in kinds.items() if kind == "histogram"
                 for end in ("_bucket", "_sum", "_count")}  # fmt: skip
    return {histogram.get(name, name) for name in names}


def test_the_dashboard_shows_exactly_what_is_exported() -> None:
    """A panel of a metric that was renamed stays empty, which looks like peace; one without a panel is unseen."""
    board = json.loads((DEPLOY / "grafana" / "llmr.json").read_text())
    shown = asked([target["expr"] for panel in board["panels"] for target in panel["targets"]])
    assert shown == set(exported())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_alerts_are_about_metrics_that_exist_and_say_what_to_do() -> None:
    """An alert about nothing never fires; one without advice wakes somebody who then starts to read code."""
    rules = [rule for group in read(DEPLOY / "prometheus" / "alerts.yaml")["groups"] for rule in group["rules"]]
    assert asked([rule["expr"] for rule in rules]) <= set(exported())
    for rule in rules:
        assert {"summary", "action"} <= set(rule["annotations"])
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert re.fullmatch(r"\d+m", rule["for"])


# --- images and `ray up` ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_images_are_of_the_pinned_ray_and_not_root(kind: str) -> None:
    """Head and workers of different Ray versions do not talk; weights in an image are published with it."""
    lines = (DEPLOY / f"Dockerfile.{kind}").read_text().splitlines()
    assert f"ARG RAY_IMAGE=rayproject/ray:{version('ray')}-py312-{kind}" in lines
    assert [line for line in lines if line.startswith("USER")][-1] == "USER 1000:100"
    text = "\n".join(lines)
    for setting in ("RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0", "HF_HUB_OFFLINE=1"):
        assert setting in text
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert all((ROOT / name).exists() for name in copied)
    allowed = (DEPLOY / f"Dockerfile.{kind}.dockerignore").read_text().splitlines()
    assert allowed[0] == "*"
    assert {name.split("/")[0] for name in copied} <= {line.removeprefix("!") for line in allowed}


def test_ray_up_takes_the_cluster_and_it_has_a_token() -> None:
    """Ray's own check of the file; and a head that wants a token must be brought one."""
    config = read(ROOT / "cluster.yaml")
    validate_config(config | {"cluster_synced_files": []})  # which `ray up` adds
    assert config["docker"]["image"] == f"rayproject/ray:{version('ray')}-py312-gpu"
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert "ray start" not in command or "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
