"""The Kubernetes manifest: its parts fit each other and the launcher. That it is one for Kubernetes was
checked with its schemas (docs/kubernetes.md)."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flux2_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR
from launcher import cli
from launcher.hosts import read_hostfile

ROOT = Path(cli.__file__).parents[1]


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    text = (ROOT / "examples" / "kubernetes.yaml").read_text()
    return {part["kind"]: part for part in yaml.safe_load_all(text)}


def test_its_command_starts_the_part_of_its_pod(parts, tmp_path):
    (container,) = parts["Job"]["spec"]["template"]["spec"]["containers"]
    (tmp_path / "hostfile").write_text(parts["ConfigMap"]["data"]["hostfile"])
    program = Path(sys.executable).with_name("flux2-ds")
    (tmp_path / "flux2-ds").write_text(f'#!/bin/sh\nexec {program} "$@" --dry-run\n')
    (tmp_path / "flux2-ds").chmod(0o755)
    (script,) = container["args"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "1"}
    done = subprocess.run(
        [*container["command"], script.replace("/etc/flux2", str(tmp_path))],
        env=os.environ | environment | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    *plan, command = done.stdout.splitlines()
    assert "64 global = 1 micro × 4 accumulation × 16 processes" in "\n".join(plan)
    words = shlex.split(command)
    assert "NCCL_SOCKET_IFNAME=eth0" in words
    start = words[words.index("--no_ssh") :]
    where = ["--master_addr", "flux2-0.flux2", "--node_rank", "1", "--master_port", "29500"]
    assert start[1:7] == where
    assert start[start.index("--module") + 1] == "flux2_ds.train"
    assert "--node-rank" not in words


def test_its_parts_fit_each_other(parts, tmp_path):
    job, service = parts["Job"]["spec"], parts["Service"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (tmp_path / "hostfile").write_text(parts["ConfigMap"]["data"]["hostfile"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    name = parts["Job"]["metadata"]["name"]
    assert read_hostfile(tmp_path / "hostfile") == {
        f"{name}-{index}.{pod['subdomain']}": gpus for index in range(job["completions"])
    }
    assert job["parallelism"] == job["completions"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    actions = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert actions == {EXIT_USER_ERROR: "FailJob", EXIT_STOPPED: "Ignore"}
