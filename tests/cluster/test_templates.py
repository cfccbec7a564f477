"""The templates that start a cluster: what all have in common, and the YAML against the services' own rules."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.submission import request
from tests.cluster.stage import REPOSITORY, TEMPLATES, Stage, code_of, options_of, staged, text_of, write_config

SCRIPTS = ("slurm.sbatch", "ssh-hosts.sh")


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with staged(tmp_path / "stage") as made:
        yield made


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the current folder."""
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path)


def test_every_template_has_a_section_in_the_page_on_clusters() -> None:
    page = (REPOSITORY / "docs" / "clusters.md").read_text(encoding="utf-8")
    headings = " ".join(line for line in page.splitlines() if line.startswith("## "))
    for template in TEMPLATES.iterdir():
        assert f"`{template.name}`" in headings
    for said in ("`fathom doctor --cluster`", "75", "`fathom submit --address", "-L 8265:localhost:8265", "token"):
        assert said in page


@pytest.mark.parametrize("name", sorted(path.name for path in TEMPLATES.iterdir()))
def test_a_template_begins_with_what_it_is_and_what_to_edit(name: str) -> None:
    lines = text_of(name).splitlines()
    head = lines[: 1 + next(n for n, line in enumerate(lines) if line and not line.startswith("#"))]
    assert "docs/clusters.md" in " ".join(head) and "What to edit" in " ".join(head)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", sorted(path.name for path in TEMPLATES.iterdir()))
def test_no_template_opens_the_dashboard_or_holds_a_secret(name: str) -> None:
    assert "0.0.0.0" not in text_of(name) and "dashboard-host" not in text_of(name)
    assert not re.search(r"[0-9a-f]{24}", text_of(name)) and not re.search("passw", code_of(name), re.IGNORECASE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_reads_the_scripts(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(TEMPLATES / name)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck")
    done = subprocess.run([shellcheck, "--shell=bash", str(TEMPLATES / name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_ends_a_ray_that_it_has_not_started(name: str) -> None:
    assert not re.search(r"ray stop|pkill|killall", code_of(name))


# -- KubeRay. Field names and types are those of its v1 API (docs/reference/api.md of version 1.7.0) and of Kubernetes'.

POD: dict[str, Any] = {
    "restartPolicy": str, "automountServiceAccountToken": bool, "terminationGracePeriodSeconds": int,
    "nodeSelector": {str: str}, "tolerations": [{"key": str, "operator": str, "effect": str}],
    "containers": [
        {
            "name": str, "image": str, "env": [{"name": str, "value": str}],
            "ports": [{"name": str, "containerPort": int}],
            "resources": {"requests": {str: str}, "limits": {str: str}},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }
    ],
    "volumes": [
        {
            "name": str, "persistentVolumeClaim": {"claimName": str},
            "emptyDir": {"medium": str, "sizeLimit": str},
        }
    ],
}  # fmt: skip
RAY_JOB: dict[str, Any] = {
    "apiVersion": str, "kind": str,
    "metadata": {"name": str, "annotations": {str: str}},
    "spec": {
        "entrypoint": str, "submissionMode": str, "runtimeEnvYAML": str, "backoffLimit": int,
        "preRunningDeadlineSeconds": int, "shutdownAfterJobFinishes": bool, "ttlSecondsAfterFinished": int,
        "rayClusterSpec": {
            "rayVersion": str,
            "authOptions": {"mode": str, "secretName": str},
            "headGroupSpec": {"serviceType": str, "rayStartParams": {str: str}, "template": {"spec": POD}},
            "workerGroupSpecs": [
                {
                    "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int,
                    "rayStartParams": {str: str}, "template": {"spec": POD},
                }
            ],
        },
    },
}  # fmt: skip


def misfits(value: Any, kind: Any, where: str = "") -> list[str]:
    """Where a document is not of a form: a type, a list of one form, a mapping of fields or of `{str: type}`."""
    if isinstance(kind, list):
        if not isinstance(value, list) or not value:
            return [f"{where}: no list"]
        return [found for number, item in enumerate(value) for found in misfits(item, kind[0], f"{where}[{number}]")]
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            return [f"{where}: no mapping"]
        free = kind.get(str)
        return [
            found
            for key, item in value.items()
            for found in (
                misfits(item, free or kind[key], f"{where}.{key}") if free or key in kind else [f"{where}.{key}: none"]
            )
        ]
    return [] if type(value) is kind else [f"{where}: {value!r} is no {kind.__name__}"]


@pytest.fixture(scope="module")
def ray_job() -> dict[str, Any]:
    found = yaml.safe_load(text_of("kuberay-rayjob.yaml"))
    assert isinstance(found, dict)
    return found


def pods(ray_job: Mapping[str, Any]) -> list[dict[str, Any]]:
    cluster = ray_job["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_ray_job_has_the_fields_and_types_of_its_definition(ray_job: dict[str, Any]) -> None:
    assert misfits(ray_job, RAY_JOB) == []
    assert misfits({"spec": {"backOffLimit": 3}}, RAY_JOB) == [".spec.backOffLimit: none"]
    assert misfits({"spec": {"backoffLimit": "3"}}, RAY_JOB) == [".spec.backoffLimit: '3' is no int"]
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")


def test_the_operator_would_take_the_ray_job(ray_job: dict[str, Any]) -> None:
    spec, cluster = ray_job["spec"], ray_job["spec"]["rayClusterSpec"]
    assert re.fullmatch("[a-z][a-z0-9-]{0,46}", ray_job["metadata"]["name"])
    assert spec["submissionMode"] == "HTTPMode" and spec["backoffLimit"] > 0 and spec["ttlSecondsAfterFinished"] > 0
    assert spec["shutdownAfterJobFinishes"]  # without it the time to live counts for nothing
    assert cluster["authOptions"]["mode"] == "token"
    tested = re.search(r"^ray==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert tested and cluster["rayVersion"] == tested[1]
    for pod in pods(ray_job):
        assert {"name", "image", "resources"} <= pod["containers"][0].keys()
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes
        assert pod["containers"][0]["resources"]["requests"] == pod["containers"][0]["resources"]["limits"]


def test_rays_own_parser_takes_the_groups_parameters(ray_job: dict[str, Any]) -> None:
    cluster = ray_job["spec"]["rayClusterSpec"]
    head, gpu = (
        options_of("ray start " + " ".join(f"--{name}={value}" for name, value in group["rayStartParams"].items()))
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    )
    assert head["num_cpus"] == 0 and gpu["num_cpus"] is None
    assert head["object_store_memory"] == gpu["object_store_memory"] == 2 << 30


def test_every_pod_sees_the_same_volume_and_enough_shared_memory(ray_job: dict[str, Any]) -> None:
    assert len({pod["containers"][0]["image"] for pod in pods(ray_job)}) == 1
    for pod in pods(ray_job):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        paths = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
        assert paths["/shared"]["persistentVolumeClaim"]["claimName"] == "fathom-shared"
        assert paths["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_a_pod_that_is_taken_away_drains_within_its_grace(ray_job: dict[str, Any]) -> None:
    for pod in pods(ray_job):
        env = {item["name"]: item["value"] for item in pod["containers"][0]["env"]}
        drain = int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert 120 <= drain < pod["terminationGracePeriodSeconds"]
    from ray._private import ray_constants

    assert hasattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
    variables = yaml.safe_load(ray_job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) >= 120 and all(isinstance(v, str) for v in variables.values())


def entrypoint_words(ray_job: Mapping[str, Any], stage: Stage, shared: Path) -> list[str]:
    """What the entrypoint calls the supervisor with, where /shared is `shared`."""
    command = ray_job["spec"]["entrypoint"].replace("/shared", str(shared))
    env = {**stage.env, "FAKE_VERB": "0"}
    assert subprocess.run(["sh", "-c", command], env=env, cwd=stage.folder).returncode == 0
    return shlex.split(stage.lines("verb: -- ")[-1].removeprefix("verb: -- "))


def test_the_entrypoint_begins_a_run_and_goes_on_with_one_that_has_begun(
    ray_job: dict[str, Any], stage: Stage, config: Path
) -> None:
    words = entrypoint_words(ray_job, stage, config.parent)
    assert "--begin-or-resume" in words and "--resume" not in words
    assert request(words, None).run_folder == str(config.parent / "runs" / "teacher")


def test_a_folder_of_the_image_hides_nothing_of_ours(ray_job: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "__init__.py").write_text('raise ImportError("the image\'s")\n')
    (tmp_path / "python").symlink_to(sys.executable)
    command = ray_job["spec"]["entrypoint"].replace("-- train", "--restarts none -- train")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    env |= {"PATH": f"{tmp_path}:{env['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["sh", "-c", command], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "usage: python -m launcher.supervisor" in done.stderr


def test_the_entrypoint_asks_for_as_many_workers_as_there_are_gpus(
    ray_job: dict[str, Any], stage: Stage, config: Path
) -> None:
    resolved = yaml.safe_load(request(entrypoint_words(ray_job, stage, config.parent), None).config or "")
    [group] = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert resolved["cluster"]["workers"] == group["replicas"] * int(limits["nvidia.com/gpu"])
    assert resolved["cluster"]["workers"] * resolved["cluster"]["threads"] <= group["replicas"] * int(limits["cpu"])
    assert resolved["cluster"]["use_gpu"] and resolved["cluster"]["address"] is None
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


# -- virtual machines


@pytest.fixture(scope="module")
def machines() -> dict[str, Any]:
    """As `ray up` completes it."""
    from ray.autoscaler._private.util import prepare_config

    found: dict[str, Any] = prepare_config(yaml.safe_load(text_of("ray-cluster.yaml")))
    return found


def commands(machines: Mapping[str, Any], kind: str) -> list[str]:
    return [str(command) for command in machines[kind]]


def test_ray_takes_the_cluster_of_machines(machines: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(machines)
    with pytest.raises(Exception, match="'idle_timeout' was unexpected"):
        validate_config({**machines, "idle_timeout": 5})


def test_the_head_has_no_room_for_ranks_and_the_gpus_are_spot(machines: dict[str, Any]) -> None:
    types = machines["available_node_types"]
    head, gpu = types[machines["head_node_type"]], types["gpu"]
    assert head["resources"] == {"CPU": 0} and "InstanceMarketOptions" not in head["node_config"]
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gpu["min_workers"] == gpu["max_workers"] == machines["max_workers"]  # a run asks for no machines
    assert machines["idle_timeout_minutes"] > 0


def test_the_machines_commands_are_shell_and_their_options_rays(machines: dict[str, Any]) -> None:
    kinds = [
        "initialization_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
        "worker_start_ray_commands",
    ]  # fmt: skip
    for command in (command for kind in kinds for command in commands(machines, kind)):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert "wheels" not in command  # of Ray's own defaults
    head, worker = (commands(machines, f"{kind}_start_ray_commands")[-1] for kind in ("head", "worker"))
    for command in (head, worker):
        assert "RAY_AUTH_MODE=token;" in command
    options = options_of(head[head.index("ray start") :])
    assert options["head"] and options["num_cpus"] == 0 and options["dashboard_host"] == "127.0.0.1"
    assert options["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert options_of(worker[worker.index("ray start") :])["address"] == "$RAY_HEAD_IP:6379"


def test_the_machines_get_the_token_and_keep_it_to_themselves(machines: dict[str, Any]) -> None:
    assert machines["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert commands(machines, "initialization_commands") == ["chmod 600 ~/.ray/auth_token"]
    groups = [kind["node_config"]["SecurityGroupIds"] for kind in machines["available_node_types"].values()]
    assert groups[0] == groups[1]  # else Ray makes one that lets ssh in from everywhere
