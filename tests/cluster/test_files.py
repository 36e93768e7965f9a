"""The files in cluster/: validated with the tools that read them, and with our own rules where no tool exists."""

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cxrscale import __version__, config
from cxrscale.config import API_KEY
from cxrscale.run.serving import NAME
from tests.conftest import REAL

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
PIN = next(
    line.split("==")[1].split()[0]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line[:5] == "ray=="
)
"""The Ray version of every file in cluster/."""
TAG = f"{__version__}-ray{PIN}"
"""The image's tag: the version of cxrscale, and the Ray version, which all nodes of a cluster must share."""
DIGEST = "@sha256:" + 64 * "0"
"""The place of an image's digest: no image has this one, so nothing starts before the right one is written there."""
TRAINING = ("kuberay-raycluster.yaml", "kuberay-rayjob.yaml")
SERVICE = "kuberay-rayservice.yaml"
KUBERAY = {
    "kuberay-raycluster.yaml": "ray.io_rayclusters.yaml",
    "kuberay-rayjob.yaml": "ray.io_rayjobs.yaml",
    SERVICE: "ray.io_rayservices.yaml",
}
"""Our file -> the KubeRay CRD of its kind."""
SECRET = re.compile(r"(key|token|password|secret)$", re.IGNORECASE)


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def tool(name: str) -> str:
    """A linter of the development environment."""
    installed = Path(sys.executable).with_name(name)
    path = str(installed) if installed.exists() else shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (it has no wheel for this platform)")
    return path


def dicts(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a YAML tree."""
    if isinstance(tree, dict):
        yield tree
    for child in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from dicts(child)


# Ray's cluster launcher


@pytest.fixture(scope="module")
def launcher() -> dict[str, Any]:
    """aws.yaml as `ray up` completes and validates it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(load("aws.yaml"))
    validate_config(prepared)
    return prepared


def test_ray_up_refuses_unknown_fields() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError, match="idle_minutes"):
        validate_config(prepare_config(load("aws.yaml") | {"idle_minutes": 5}))


def test_aws_installs_nothing_on_a_node(launcher: dict[str, Any]) -> None:
    assert [*launcher["head_setup_commands"], *launcher["worker_setup_commands"]] == []


def test_the_aws_head_runs_no_tasks_and_workers_are_autoscaled(launcher: dict[str, Any]) -> None:
    kinds = dict(launcher["available_node_types"])
    head = kinds.pop(launcher["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert "--num-cpus=0 " in launcher["head_start_ray_commands"][-1]
    assert {kind["min_workers"] for kind in kinds.values()} == {0}
    spot = {name: "InstanceMarketOptions" in kind["node_config"] for name, kind in kinds.items()}
    assert spot == {"gpu-spot": True, "gpu-on-demand": False}
    assert kinds["gpu-spot"]["priority"] > kinds["gpu-on-demand"]["priority"]
    assert kinds["gpu-spot"]["max_workers"] == launcher["max_workers"]


def test_aws_shared_memory_holds_the_object_store(launcher: dict[str, Any]) -> None:
    for options, command in (
        (launcher["docker"]["head_run_options"], launcher["head_start_ray_commands"][-1]),
        (launcher["docker"]["worker_run_options"], launcher["worker_start_ray_commands"][-1]),
    ):
        shm = next(int(o.removeprefix("--shm-size=")[:-1]) * 2**30 for o in options if o.startswith("--shm-size="))
        store = int(re.findall(r"--object-store-memory=(\d+)", command)[0])
        assert store < shm


@pytest.fixture
def amazon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """EC2, IAM and CloudFormation on this machine, and a writable home folder."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=free_port(), verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    yield
    server.stop()


@pytest.mark.usefixtures("amazon")
def test_ray_up_starts_nodes_with_the_profiles_of_the_cloudformation_stack(launcher: dict[str, Any]) -> None:
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    stacks = boto3.client("cloudformation", region_name="us-east-1")
    # The local server knows no bucket policies; the next test reads it.
    template, count = re.subn(r"  ShardsPolicy:\n(    .*\n)+", "", (CLUSTER / "aws-bucket.yaml").read_text())
    assert count == 1
    stacks.create_stack(
        StackName="cxrscale",
        TemplateBody=template,
        Parameters=[{"ParameterKey": "Bucket", "ParameterValue": "my-bucket"}],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    assert "my-bucket" in [bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]]

    ready = bootstrap_aws(launcher)  # type: ignore[no-untyped-call]
    machines = AWSNodeProvider(ready["provider"], ready["cluster_name"])  # type: ignore[no-untyped-call]
    images = boto3.client("ec2", region_name="us-east-1").describe_images(Owners=["amazon"])["Images"]
    started: dict[str, str] = {}
    for name, kind in ready["available_node_types"].items():
        # Amazon resolves this name; the local server does not.
        assert kind["node_config"]["ImageId"].startswith("resolve:ssm:/aws/service/deeplearning/ami/")
        node = kind["node_config"] | {"ImageId": images[0]["ImageId"]}
        started |= dict.fromkeys(machines.create_node(node, {}, 1), name)
    profiles = {
        started[machine["InstanceId"]]: machine["IamInstanceProfile"]["Arn"].rsplit("/")[-1]
        for group in boto3.client("ec2", region_name="us-east-1").describe_instances()["Reservations"]
        for machine in group["Instances"]
    }
    assert profiles == {"head": "cxrscale-head", "gpu-spot": "cxrscale-worker", "gpu-on-demand": "cxrscale-worker"}


def test_only_who_packs_may_overwrite_shards() -> None:
    resources = yaml.load((CLUSTER / "aws-bucket.yaml").read_text(), yaml.BaseLoader)["Resources"]
    for role, may_write in (("WorkerRole", "runs/*"), ("HeadRole", "runs/*"), ("PackerRole", "*")):
        policies = resources[role]["Properties"]["ManagedPolicyArns"]
        assert set(policies) <= set(resources), "a policy of Amazon's"
        statements = [
            statement
            for policy in policies
            for statement in resources[policy]["Properties"]["PolicyDocument"]["Statement"]
        ]
        writes = {s["Resource"] for s in statements if "s3:PutObject" in s["Action"]}
        assert writes == {f"${{Shards.Arn}}/{may_write}"}
        assert not [s for s in statements if "s3:DeleteObjectVersion" in s["Action"]]


def test_the_bucket_keeps_older_versions_and_is_reached_over_tls_alone() -> None:
    template = yaml.load((CLUSTER / "aws-bucket.yaml").read_text(), yaml.BaseLoader)
    assert template["Resources"]["Shards"]["Properties"]["VersioningConfiguration"] == {"Status": "Enabled"}
    policy = template["Resources"]["ShardsPolicy"]
    assert (policy["Type"], policy["Properties"]["Bucket"]) == ("AWS::S3::BucketPolicy", "Shards")
    (rule,) = policy["Properties"]["PolicyDocument"]["Statement"]
    assert (rule["Effect"], rule["Principal"], rule["Action"]) == ("Deny", "*", "s3:*")
    assert rule["Resource"] == ["Shards.Arn", "${Shards.Arn}/*"]
    assert rule["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_no_role_may_do_everything_to_everything() -> None:
    template = yaml.load((CLUSTER / "aws-bucket.yaml").read_text(), yaml.BaseLoader)
    allowed = [one for one in dicts(template) if one.get("Effect") == "Allow" and "Resource" in one]
    assert len(allowed) > 10
    for statement in allowed:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not [action for action in actions if "*" in action], statement
        reads = all(action.partition(":")[2].startswith("Describe") for action in actions)
        assert reads or statement["Resource"] != "*", statement
        if {"ec2:TerminateInstances", "ec2:CreateTags", "iam:PassRole"} & set(actions):
            assert "Condition" in statement


def test_aws_machines_give_their_credentials_only_to_sessions(launcher: dict[str, Any]) -> None:
    for kind in launcher["available_node_types"].values():
        options = kind["node_config"]["MetadataOptions"]
        assert options == {"HttpEndpoint": "enabled", "HttpTokens": "required", "HttpPutResponseHopLimit": 1}


def test_cloudformation_template_passes_cfn_lint() -> None:
    ran = subprocess.run([tool("cfn-lint"), CLUSTER / "aws-bucket.yaml"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr


# KubeRay


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_file_passes_the_schema_of_the_operator(name: str) -> None:
    folder = Path(os.environ.get("CXRSCALE_KUBERAY_CRDS", REAL.parent / "kuberay"))
    path = folder / KUBERAY[name]
    if not path.is_file():
        pytest.skip(f"no {path}: set CXRSCALE_KUBERAY_CRDS to helm-chart/kuberay-operator/crds of KubeRay")
    crd = yaml.load(path.read_text(), yaml.CSafeLoader)
    version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema = version["schema"]["openAPIV3Schema"]
    document = load(name)
    assert crd["spec"]["names"]["kind"] == document["kind"]
    jsonschema.Draft202012Validator(schema).validate(document)
    assert list(unknown(schema, document)) == []


def unknown(schema: dict[str, Any], value: Any, path: str = "") -> Iterator[str]:
    """Fields that are not in the schema; `kubectl apply` refuses them, but JSON Schema validation of a CRD does not."""
    if isinstance(value, list):
        for i, child in enumerate(value):
            yield from unknown(schema.get("items", {}), child, f"{path}[{i}]")
    elif isinstance(value, dict) and path != ".metadata" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        for name, child in value.items():
            inner = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
            if inner is None:
                yield f"{path}.{name}"
            else:
                yield from unknown(inner, child, f"{path}.{name}")


def test_an_unknown_field_is_found() -> None:
    schema = {"properties": {"a": {"items": {"properties": {"b": {}}}}, "c": {"additionalProperties": {}}}}
    document = {"a": [{"b": 1}, {"bb": 1}], "c": {"anything": 1}, "metadata": {"labels": {}}}
    assert list(unknown(schema | {"properties": {**schema["properties"], "metadata": {}}}, document)) == [".a[1].bb"]


@pytest.fixture(params=KUBERAY)
def kube(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One of our KubeRay documents."""
    document: dict[str, Any] = load(request.param)
    return document


@pytest.fixture(params=TRAINING)
def kube_training(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One of those for training."""
    document: dict[str, Any] = load(request.param)
    return document


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    cluster: dict[str, Any] = spec.get("rayClusterSpec", spec.get("rayClusterConfig", spec))
    return cluster


def groups(document: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(document)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def container(group: dict[str, Any]) -> dict[str, Any]:
    only: dict[str, Any]
    (only,) = group["template"]["spec"]["containers"]
    return only


def gib(quantity: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) / (1 if unit == "Gi" else 1024)


def test_kube_uses_the_pinned_ray(kube: dict[str, Any]) -> None:
    assert kube["apiVersion"] == "ray.io/v1"
    assert cluster_of(kube)["rayVersion"] == PIN
    assert {container(group)["image"].partition(":")[2] for group in groups(kube)} == {TAG + DIGEST}


def test_kube_requests_are_equal_to_limits(kube: dict[str, Any]) -> None:
    # Pods with requests below limits are evicted first; requests and limits of GPUs must be equal.
    for group in groups(kube):
        resources = container(group)["resources"]
        assert resources["requests"] == resources["limits"]


def test_kube_tasks_run_on_gpu_workers_only(kube_training: dict[str, Any]) -> None:
    limits = {g.get("groupName", "head"): container(g)["resources"]["limits"] for g in groups(kube_training)}
    assert {name: limit.get("nvidia.com/gpu") for name, limit in limits.items()} == {
        "head": None,
        "driver": None,
        "gpu": 1,
    }
    for group in groups(kube_training):
        cpus = group["rayStartParams"].get("num-cpus")
        assert cpus == (None if group.get("groupName") == "gpu" else "0")


def test_kube_shared_memory_holds_the_object_store_and_fits_the_container(kube: dict[str, Any]) -> None:
    for group in groups(kube):
        pod = group["template"]["spec"]
        mounted = {mount["mountPath"]: mount["name"] for mount in container(group)["volumeMounts"]}
        (shm,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == mounted["/dev/shm"]]
        assert shm["medium"] == "Memory"
        store = int(group["rayStartParams"]["object-store-memory"]) / 2**30
        assert store < gib(shm["sizeLimit"]) < gib(container(group)["resources"]["limits"]["memory"])


def test_kube_dataset_cache_is_smaller_than_its_volume(kube_training: dict[str, Any]) -> None:
    (group,) = [g for g in groups(kube_training) if g.get("groupName") == "gpu"]
    env = {item["name"]: item.get("value") for item in container(group)["env"]}
    mounted = {mount["mountPath"]: mount["name"] for mount in container(group)["volumeMounts"]}
    volumes = {v["name"]: v["emptyDir"] for v in group["template"]["spec"]["volumes"]}
    limit = gib(volumes[mounted[env["CXRSCALE_CACHE"]]]["sizeLimit"])
    assert int(env["CXRSCALE_CACHE_GB"]) * 1e9 < limit * 2**30
    assert limit < gib(container(group)["resources"]["limits"]["ephemeral-storage"])


def test_kube_names_its_queue(kube_training: dict[str, Any]) -> None:
    assert set(kube_training["metadata"]["labels"]) & {"volcano.sh/queue-name", "kueue.x-k8s.io/queue-name"}


def test_kube_survives_its_head(kube: dict[str, Any]) -> None:
    redis = cluster_of(kube)["gcsFaultToleranceOptions"]
    services = {d["metadata"]["name"]: d for d in once() if d["kind"] != "NetworkPolicy"}
    name, port = redis["redisAddress"].split(":")
    assert int(port) in [p["port"] for p in services[name].get("spec", {}).get("ports", [])] or name in services
    accounts = {group["template"]["spec"]["serviceAccountName"] for group in groups(kube)}
    assert accounts <= set(services)


def test_kube_pods_are_not_root(kube: dict[str, Any]) -> None:
    user = re.findall(r"^USER (\d+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    for group in groups(kube):
        security = group["template"]["spec"]["securityContext"]
        assert security["runAsNonRoot"]
        assert [str(security["runAsUser"])] == user


def pods(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a KubeRay document."""
    submitter = document["spec"].get("submitterPodTemplate")
    return [*(group["template"] for group in groups(document)), *([submitter] if submitter else [])]


def test_kube_pods_have_no_more_rights_than_they_need(kube: dict[str, Any]) -> None:
    redis = next(d for d in once() if d["kind"] == "StatefulSet")["spec"]["template"]
    for template in [*pods(kube), redis]:
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for one in pod["containers"]:
            assert one["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert one["image"].endswith(DIGEST)
            assert re.search(r":\d[\w.-]*@", one["image"]), "no version"
    for template in pods(kube):
        (one,) = template["spec"]["containers"]
        written = {mount["mountPath"] for mount in one["volumeMounts"]}
        home = re.findall(r"^ENV HOME=(\S+)", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
        assert {"/tmp", *home} <= written
    autoscaler = cluster_of(kube).get("autoscalerOptions")
    assert autoscaler is None or autoscaler["securityContext"]["readOnlyRootFilesystem"]


def once() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / "kuberay-once.yaml").read_text()))


def test_kube_pods_are_reached_by_each_other_and_the_operator_alone(kube: dict[str, Any]) -> None:
    policies = {d["metadata"]["name"]: d["spec"] for d in once() if d["kind"] == "NetworkPolicy"}
    assert set(policies) == {"cxrscale", "cxrscale-redis"}
    assert all(policy["policyTypes"] == ["Ingress", "Egress"] for policy in policies.values())
    own = policies["cxrscale"]["podSelector"]["matchLabels"]
    for template in pods(kube):
        assert own.items() <= template["metadata"]["labels"].items()
    among_nodes, operator, clients = policies["cxrscale"]["ingress"]
    assert among_nodes == {"from": [{"podSelector": {"matchLabels": own}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert clients["ports"] == [{"protocol": "TCP", "port": serve_config()["http_options"]["port"]}]
    assert clients["from"] == [{"podSelector": {"matchLabels": {"cxrscale-client": "true"}}}]
    redis = policies["cxrscale-redis"]
    pod = next(d for d in once() if d["kind"] == "StatefulSet")["spec"]["template"]
    assert redis["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert redis["ingress"] == [
        {"from": [{"podSelector": {"matchLabels": own}}], "ports": [{"protocol": "TCP", "port": 6379}]}
    ]
    assert redis.get("egress", []) == []
    # The metadata of a machine would give its role to whoever runs code in a pod.
    blocks = [to["ipBlock"] for rule in policies["cxrscale"]["egress"] for to in rule["to"] if "ipBlock" in to]
    assert all(block["except"] for block in blocks)


def test_rayjob_runs_a_real_command_of_cxrscale() -> None:
    spec = load("kuberay-rayjob.yaml")["spec"]
    command = shlex.split(spec["entrypoint"])
    assert command[:4] == ["python", "-m", "cxrscale", "train"]
    recipe = config.load_recipe(ROOT / command[4], command[5:])
    (gpu,) = [g for g in spec["rayClusterSpec"]["workerGroupSpecs"] if g["groupName"] == "gpu"]
    assert recipe.scaling.num_workers == gpu["replicas"]
    assert recipe.scaling.cpus_per_worker <= int(container(gpu)["resources"]["limits"]["cpu"])
    assert all(address.startswith("s3://") for address in (*recipe.data.shards, recipe.tracking.runs_dir))
    # Without a name, each attempt would be a new run and start from the beginning.
    assert recipe.tracking.name
    assert spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"]


def test_rayjob_gives_a_stopped_job_time_for_a_checkpoint() -> None:
    spec = load("kuberay-rayjob.yaml")["spec"]
    assert int(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_driver_pods_have_the_resources_of_the_entrypoint() -> None:
    spec = load("kuberay-rayjob.yaml")["spec"]
    required = json.loads(spec["entrypointResources"])
    for document in (load("kuberay-rayjob.yaml"), load("kuberay-raycluster.yaml")):
        (driver,) = [g for g in groups(document) if g.get("groupName") == "driver"]
        # KubeRay copies the string into a shell command without quoting.
        offered = json.loads(shlex.split(f"x={driver['rayStartParams']['resources']}")[0].removeprefix("x="))
        assert all(offered[name] >= amount for name, amount in required.items())


def serve_config() -> dict[str, Any]:
    """What the RayService tells Ray Serve."""
    config: dict[str, Any] = yaml.safe_load(load(SERVICE)["spec"]["serveConfigV2"])
    return config


def test_the_service_is_an_application_that_ray_serve_takes() -> None:
    from ray.serve.schema import RayActorOptionsSchema, ServeDeploySchema

    schema = ServeDeploySchema.model_validate(serve_config())
    (given,) = schema.applications
    module, _, name = given.import_path.partition(":")
    built = getattr(importlib.import_module(module), name)(given.args)
    front, replicas = given.deployments
    assert (front.name, replicas.name) == (built._bound_deployment.name, NAME)
    assert isinstance(replicas.ray_actor_options, RayActorOptionsSchema)
    (group,) = load(SERVICE)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert 0 < (replicas.ray_actor_options.num_cpus or 0) <= int(container(group)["resources"]["limits"]["cpu"])


def test_no_replica_of_the_service_starts_without_a_key() -> None:
    assert "api_key" not in serve_config()["applications"][0]["args"]
    for group in groups(load(SERVICE)):
        (key,) = [item for item in container(group)["env"] if item["name"] == API_KEY]
        assert "optional" not in key["valueFrom"]["secretKeyRef"]


def test_the_namespace_objects_pass_the_kubernetes_schema() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    documents = list(yaml.safe_load_all((CLUSTER / "kuberay-once.yaml").read_text()))
    assert documents
    for document in documents:
        validate.validate(document, "1.32", strict=True)
        with pytest.raises(validate.ValidationError):
            validate.validate({**document, "nonsense": 1}, "1.32", strict=True)


# All files


@pytest.mark.parametrize("name", ["aws.yaml", "aws-bucket.yaml", "kuberay-once.yaml", *KUBERAY])
def test_no_secret_in_plain_text(name: str) -> None:
    loader = yaml.BaseLoader if name == "aws-bucket.yaml" else yaml.SafeLoader
    for document in yaml.load_all((CLUSTER / name).read_text(), loader):
        for mapping in dicts(document):
            if SECRET.search(str(mapping.get("name", ""))) and {"value", "valueFrom"} & set(mapping):
                assert set(mapping) == {"name", "valueFrom"}, mapping
            if mapping.get("kind") == "Secret":
                pytest.fail(f"{name} holds a Secret; describe how to create it instead")
    for _, value in re.findall(r"([A-Z_]*(?:KEY|TOKEN|PASSWORD))=(\S+)", yaml.dump(load_plain(name))):
        assert value.startswith(("/", "$", '"$')), f"{name}: {value}"


def load_plain(name: str) -> list[Any]:
    """A YAML file without its comments, with all values as strings."""
    return list(yaml.load_all((CLUSTER / name).read_text(), yaml.BaseLoader))


def test_authentication_is_set_everywhere(launcher: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]
    assert re.search(r"^ +RAY_AUTH_MODE=token \\$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert "export RAY_AUTH_MODE" in (CLUSTER / "local.sh").read_text()
    for name in KUBERAY:
        assert cluster_of(load(name))["authOptions"] == {"mode": "token"}
        for group in groups(load(name)):
            assert {"name": "RAY_AUTH_MODE", "value": "token"} in container(group)["env"]


def test_one_image_for_every_node(launcher: dict[str, Any]) -> None:
    names = {container(group)["image"] for name in KUBERAY for group in groups(load(name))}
    assert names == {launcher["docker"]["image"]}
    assert not {"head_image", "worker_image"} & set(launcher["docker"])
    text = (CLUSTER / "Dockerfile").read_text()
    image, place, rest = launcher["docker"]["image"].partition(DIGEST)
    assert (place, rest) == (DIGEST, "")
    assert f"-t {image} ." in text
    assert image.endswith(f":{TAG}")
    assert re.search(rf"^ray=={re.escape(PIN)}$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_dockerfile_copies_exactly_the_files_of_the_context() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = set()
    text = "".join((CLUSTER / name).read_text() for name in ("Dockerfile", "Dockerfile.serve"))
    for line in re.findall(r"^COPY (?:--\S+ )*(.+)$", text, re.MULTILINE):
        copied |= set(line.split()[:-1])
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.serve"])
def test_dockerfile_passes_hadolint(name: str) -> None:
    ran = subprocess.run([tool("hadolint"), CLUSTER / name], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_readme_has_the_number_of_images_of_the_recipe(launcher: dict[str, Any]) -> None:
    text = (ROOT / "cluster" / "README.md").read_text()
    train, val, test = 75_312, 11_212, 25_596
    epochs = config.load_recipe(ROOT / "jobs" / "chexnet14.yaml").train.epochs
    images = epochs * (train + val) + val + test
    assert f"in each of {epochs} epochs" in text
    assert f"{images:,} in all" in text
    assert f"{images / 3600:.0f} / R" in text
    assert f"and {launcher['idle_timeout_minutes'] * 60:.0f} in which it is found idle" in text


# local.sh


def test_local_passes_shellcheck() -> None:
    ran = subprocess.run([tool("shellcheck"), CLUSTER / "local.sh"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def free_port() -> int:
    """A free port whose next one is free too."""
    while True:
        with socket.socket() as one, socket.socket() as next_one:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            try:
                next_one.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


@pytest.fixture
def local() -> Iterator[dict[str, str]]:
    """The environment of a local cluster on separate ports, which is stopped afterwards."""
    port = free_port()
    given = {"CXR_PORT": str(port), "CXR_DASHBOARD_PORT": str(free_port()), "CXR_OBJECT_STORE_MB": "128"}
    env = {**os.environ, **given, "CXR_DIR": f"/tmp/cxrscale-test-{port}", "VIRTUAL_ENV": sys.prefix}
    yield env
    subprocess.run([CLUSTER / "local.sh", "down"], env=env, timeout=60, check=True, capture_output=True)
    shutil.rmtree(env["CXR_DIR"])


def run_local(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CLUSTER / "local.sh", *arguments], env=env, capture_output=True, text=True, timeout=150)


def processes(env: dict[str, str]) -> list[int]:
    """Processes with the cluster's environment variable."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"CXRSCALE_LOCAL_CLUSTER={env['CXR_DIR']}".encode() in variables:
            pids.append(int(path.parent.name))
    return pids


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="local.sh finds its processes in /proc")
def test_a_local_cluster_starts_runs_a_job_and_stops(local: dict[str, str]) -> None:
    from ray.job_submission import JobSubmissionClient

    up = run_local(local, "up", "1")
    assert up.returncode == 0, up.stderr
    exports = dict(item.split("=", 1) for item in re.findall(r"\b\w+=\S+", up.stdout))
    assert exports["RAY_AUTH_MODE"] == "token"
    before = sorted(processes(local))
    assert run_local(local, "up", "1").returncode == 0
    assert set(before) <= set(processes(local)), "a second `up` restarted something"
    nodes = run_local(local, "status")
    assert nodes.returncode == 0, nodes.stderr
    assert "workers: 1," in nodes.stdout

    code = "import os, ray; ray.init(); print(ray.get(ray.remote(lambda: 42).remote()), len(ray.nodes()), os.getcwd())"
    token = Path(exports["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o077 == 0
    client = JobSubmissionClient(
        exports["RAY_API_SERVER_ADDRESS"], headers={"Authorization": f"Bearer {token.read_text()}"}
    )
    job = client.submit_job(entrypoint=f"python -c {shlex.quote(code)}")
    until = time.monotonic() + 90
    while not (status := client.get_job_status(job)).is_terminal() and time.monotonic() < until:
        time.sleep(0.5)
    assert status == "SUCCEEDED", client.get_job_logs(job)
    assert f"42 2 {ROOT}" in client.get_job_logs(job)

    # A running job has its own process session and must be stopped too.
    client.submit_job(entrypoint="sleep 600")
    down = run_local(local, "down")
    assert down.returncode == 0, down.stderr
    assert processes(local) == []
    assert run_local(local, "down").returncode == 0
    assert run_local(local, "status").returncode == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="local.sh finds its processes in /proc")
def test_a_local_cluster_interrupted_while_starting_leaves_no_process(local: dict[str, str]) -> None:
    starting = subprocess.Popen([CLUSTER / "local.sh", "up"], env=local, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 30
    while not processes(local) and time.monotonic() < until:
        time.sleep(0.1)
    starting.send_signal(signal.SIGINT)
    assert starting.wait(60) == 130
    assert processes(local) == []


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        (("up", "0"), {}, "whole number from 1"),
        (("up", "1"), {"CXR_DIR": "/tmp/" + "x" * 40}, "longer than 40 characters"),
        (("up", "1"), {"CXR_AUTH": "none"}, "neither token nor disabled"),
        (("status",), {}, "no cluster at"),
    ],
)
def test_local_gives_one_line_per_error(
    local: dict[str, str], arguments: tuple[str, ...], given: dict[str, str], message: str
) -> None:
    answer = run_local({**local, **given}, *arguments)
    assert answer.returncode == 2
    assert len(answer.stderr.splitlines()) == 1
    assert message in answer.stderr


def test_local_refuses_a_port_that_is_in_use(local: dict[str, str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        answer = run_local({**local, "CXR_DASHBOARD_PORT": str(other.getsockname()[1])}, "up", "1")
    assert answer.returncode == 2
    assert "taken by something else; give another CXR_DASHBOARD_PORT" in answer.stderr
