"""The doctor: what it makes of a machine, a recipe, and hosts that differ."""

import dataclasses
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flux2_ds.commands.probe import link_of, runs_on
from flux2_ds.config.memory import checkpoint_bytes
from flux2_ds.config.model_spec import RELEASED
from flux2_ds.config.recipe import Checkpoint, Data, Launch, Log, Model, Recipe
from flux2_ds.errors import UserError
from flux2_ds.run.run_dir import check_run_dir
from launcher import cli, doctor, supervise
from launcher import host_checks as checks
from launcher.doctor import Finding, Findings, odd_ones_out
from launcher.hosts import Hosts

ROOT = Path(cli.__file__).parents[1]
DEV = RELEASED["black-forest-labs/FLUX.2-dev"]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(
        run_dir=str(tmp_path / "runs" / "x"),
        model=Model(path=str(tmp_path / "model")),
        data=Data(images="p", shards=str(tmp_path / "shards")),
        log=Log(wandb="online"),
    )


def statuses(findings: Findings) -> dict[str, str]:
    return {line.name: line.status for line in findings.lines}


def nvidia_smi(folder: Path, body: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "nvidia-smi").chmod(0o755)


def test_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = Findings()
    checks.check_gpus(missing, 1)
    assert statuses(missing) == {"gpus": "failure"}
    nvidia_smi(tmp_path, "echo 'H100, 570.1, 81559, 4'; echo 'H100, 570.1, 81559, 40000'")
    findings = Findings()
    checks.check_gpus(findings, 2)
    assert statuses(findings) == {"gpus": "ok", "gpu memory": "warning"}
    assert "GPU 1: 40000 of 81559 MiB" in findings.lines[1].text
    assert findings.facts == {"gpus": "2 × H100", "driver": "570.1"}
    few = Findings()
    checks.check_gpus(few, 3)
    assert "there are 3 processes" in few.lines[0].text
    nvidia_smi(tmp_path, "echo 'driver/library version mismatch'; exit 9")
    broken = Findings()
    checks.check_gpus(broken, 1)
    assert broken.lines[0].text == "driver/library version mismatch"


def test_a_look_at_torch_that_hangs_costs_no_other_finding(tmp_path, monkeypatch, capsys):
    """As it does where nvidia-smi works and CUDA waits for ever."""
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 20\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setattr(doctor, "_PROBE_LIMIT", 0.2)
    arguments = [*doctor._WITHOUT, "--without-recipe", "--launch.accelerator=cpu"]
    monkeypatch.setattr("sys.argv", ["host_checks", *arguments])
    checks.main()
    found = {line["name"]: line for line in json.loads(capsys.readouterr().out)["lines"]}
    assert "--accelerator cpu` has not ended in 0 s" in found["torch"]["text"]
    assert found["packages"]["status"] == "ok"


def test_packages(monkeypatch):
    good = Findings()
    checks.check_packages(good)
    assert statuses(good) == {"packages": "ok"}
    monkeypatch.setattr(
        checks.importlib.metadata,
        "requires",
        lambda name: ["torch>=99", "nothing-like-it", "x; extra == 'dev'"],
    )
    bad = Findings()
    checks.check_packages(bad)
    (line,) = bad.lines
    assert line.status == "failure"
    assert "needs >=99; nothing-like-it is missing" in line.text
    less = Findings()
    checks.check_packages(less, without=("nothing-like-it",))
    assert less.lines[0].text.endswith("needs >=99")


def test_a_recipe_that_nothing_is_there_for(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    findings = Findings()
    checks.check_recipe(findings, recipe, 3, str(tmp_path / "not_there"))
    assert statuses(findings) == {
        "recipe": "failure",
        "run_dir": "failure",
        "model": "failure",
        "shards": "failure",
        "wandb": "warning",
    }
    assert "put run_dir on a file system that all hosts share" in str(findings.lines)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    findings = Findings()
    recipe = dataclasses.replace(recipe, model=Model(path="nobody/has-this"))
    checks.check_recipe(findings, recipe, 2, None)
    assert "wandb" not in statuses(findings)
    assert statuses(findings)["model"] == "warning"  # it would be fetched
    assert "secret" not in str(findings)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_disk_for_checkpoints(recipe, monkeypatch, method):
    usage = SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    keep = Checkpoint(every=10, keep_last=2, keep_every=20)
    recipe = dataclasses.replace(recipe, method=method, steps=80, checkpoint=keep)
    one = checkpoint_bytes(DEV, recipe)
    found = []
    for there in (0, 5, 6):  # of 2 + 1 + 4 for good
        for step in range(there):
            place = Path(recipe.run_dir) / "checkpoints" / f"step_{step:08d}"
            place.mkdir(parents=True, exist_ok=True)
            place.with_suffix(".damaged").mkdir(exist_ok=True)
        for usage.free in ((7 - there) * one - 1, (7 - there) * one + 1):
            findings = Findings()
            checks.check_disk(findings, recipe, DEV, None)
            found.append((findings.lines[0].status, findings.lines[0].text.split(", ")[-1]))
    size = {"lora": "2.2", "full": "3.6e+02"}[method]
    text = "for {} checkpoints of " + size + " GiB"
    assert found == [
        ("warning", text.format(7)),
        ("ok", text.format(7)),
        ("warning", text.format(2)),
        ("ok", text.format(2)),
        ("warning", text.format(1).replace("checkpoints", "checkpoint")),
        ("ok", text.format(1).replace("checkpoints", "checkpoint")),
    ]


def test_a_disk_holds_the_download_the_shards_and_the_checkpoints(recipe, tmp_path, monkeypatch):
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name in ("a.png", "a.txt", "more/b.JPG"):
        (tmp_path / "photos" / name).touch()
    monkeypatch.setattr(checks, "HF_HUB_CACHE", str(tmp_path / "hub" / "cache"))
    data = dataclasses.replace(
        recipe.data, images=str(tmp_path / "photos"), shards=str(tmp_path / "none")
    )
    recipe = dataclasses.replace(recipe, data=data)
    taken = checks.checkpoints_to_come(recipe) * checkpoint_bytes(DEV, recipe)
    taken += 64.45e9 + 48e9 + 2 * (4096 * 128 * 4 + 512 * 15360 * 2)
    for free, status in ((taken * 0.999, "warning"), (taken * 1.001, "ok")):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free)
        )
        findings = Findings()
        checks.check_disk(findings, recipe, DEV, None, fetched=False)
        (line,) = findings.lines
        assert line.status == status
        assert "a download of 105 GiB, shards of 2 images, at most 0.033 GiB" in line.text


@pytest.mark.parametrize(
    ("card", "built", "expected"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),
        ((8, 9), ["sm_90"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_90"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["compute_90a"], False),
    ],
)
def test_whether_torch_is_built_for_a_card(card, built, expected):
    assert runs_on(card, built) == expected


@pytest.mark.parametrize(
    ("rate", "link"), [(3e9, "pcie3"), (13e9, "pcie3"), (22e9, "pcie4"), (55e9, "pcie5")]
)
def test_a_measured_link_is_named_as_the_recipe_does(rate, link):
    assert link_of(rate) == link


def test_the_odd_host_is_named():
    usual = {"torch": "2.13", "driver": "570"}
    facts = {"node01": usual, "node02": usual | {"driver": "535"}, "node03": usual}
    (line,) = odd_ones_out(facts)
    assert line.text == "node02 has driver 535, the others 570"
    assert odd_ones_out({"node01": usual, "node03": usual}) == []
    (line,) = odd_ones_out({"node01": usual, "node02": {"torch": "2.13"}})
    assert line.text == "node02 has driver nothing, the others 570"


def test_hosts_that_say_the_same_are_one_line():
    ok = Finding("ok", "disk", "9 GiB")
    bad = Finding("failure", "gpus", "7", "ask for fewer")
    merged = doctor.grouped({"node01": [ok], "node02": [ok, bad]})
    assert [str(line) for line in merged] == [
        "ok       disk         all 2 hosts: 9 GiB",
        "failure  gpus         node02: 7 -> ask for fewer",
    ]


def ask(folder: Path, monkeypatch: pytest.MonkeyPatch, host: str, answer: str) -> Finding:
    """The finding of a host that answers so, over a stand-in for ssh and for Python."""
    for name in ("ssh", "python"):
        (folder / name).write_text(f"#!/bin/sh\n{answer}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), ":")
    monkeypatch.setattr("sys.executable", str(folder / "python"))
    (line,) = doctor.ask_hosts({host: 8}, [])[host].lines
    return line


def test_hosts_are_asked_over_ssh(tmp_path, monkeypatch):
    """By a stand-in that gives the command to a shell with few variables, as sshd does."""
    here = tmp_path / "it's $(here) & there"
    here.mkdir()
    (tmp_path / "ssh").write_text(
        '#!/bin/sh\nfor last; do :; done\nexec env -i HOME="$HOME" PATH=/usr/bin:/bin sh -c "$last"\n'
    )
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.chdir(here)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("HF_HOME", "a 'b' $(touch owned)")
    prompts = json.dumps(['it\'s a "cat"\n$(touch owned)'])
    arguments = ["--run_dir=$(touch owned)", "--model.path=.", "--data.images=.", "--data.shards=it's",
                 "--preview.prompts", prompts, "--launch.accelerator=cpu", "--all-processes=2"]  # fmt: skip
    findings = doctor.ask_hosts({"one": 1}, arguments)["one"]
    said = {line.name: line for line in findings.lines}
    assert said["torch"].status == "ok" and findings.facts["python"] == platform.python_version()
    assert "cpu adam" not in said  # which is compiled only for a config that offloads
    assert "data.shards it's has no index.json" in said["shards"].text
    assert list(here.iterdir()) == []


def test_a_host_that_does_not_answer_is_a_failure(tmp_path, monkeypatch):
    line = ask(tmp_path, monkeypatch, "node02", "echo ssh: no route to host >&2; exit 255")
    assert (line.status, line.name) == ("failure", "ssh")
    assert "no route to host (node02)" in line.text
    line = ask(tmp_path, monkeypatch, "node02", "echo No module named launcher >&2; exit 1")
    assert line.text == "No module named launcher"
    monkeypatch.setattr(doctor, "_LIMIT", 0.2)
    line = ask(tmp_path, monkeypatch, "", "sleep 61.5")
    assert line.text == "this host did not answer in 0 s"
    commands = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert ["sleep", "61.5"] not in commands  # nor what the host has started


def test_a_clock_that_is_off_is_a_warning(tmp_path, monkeypatch):
    values = json.dumps({"lines": [], "facts": {}, "clock": 1.0})
    line = ask(tmp_path, monkeypatch, "node02", f"echo '{values}'")
    assert (line.status, line.name) == ("warning", "clock")


def test_failure_is_the_exit_code_and_nothing_is_left_behind(recipe, tmp_path, monkeypatch, capsys):
    """A stand-in for Python counts the tokens that it sees."""
    values = {"lines": [{"status": "failure", "name": "shards", "text": "none", "remedy": ""}]}
    values |= {"facts": {}, "clock": time.time()}
    tokens = f"ls {tmp_path}/.doctor-* >> {tmp_path}/seen"
    (tmp_path / "python").write_text(f"#!/bin/sh\n{tokens}\necho '{json.dumps(values)}'\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "index.json").touch()
    assert not doctor.examine(recipe, Launch(), Hosts(2), [])
    assert capsys.readouterr().out == "failure  shards       none\n1 failures, 0 warnings\n"
    assert len((tmp_path / "seen").read_text().splitlines()) == 1
    assert list(tmp_path.glob(".doctor-*")) == []


def test_shards_that_are_not_prepared_yet_are_no_failure(recipe, tmp_path, monkeypatch, capsys):
    line = {"status": "ok", "name": "disk", "text": "9 GiB", "remedy": ""}
    answer = json.dumps({"lines": [line], "facts": {}, "clock": time.time()})
    (tmp_path / "python").write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\necho '{answer}'\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    assert doctor.examine(recipe, Launch(), Hosts(1), ["--config", "my recipe"])
    shards = tmp_path / "shards"
    assert capsys.readouterr().out == (
        "ok       disk         9 GiB\n"
        f"warning  shards       {shards} is not prepared yet -> flux2-ds prepare --config 'my recipe'\n"
        "0 failures, 1 warnings\n"
    )
    shards.mkdir()
    (shards / "index.json").touch()
    assert doctor.examine(recipe, Launch(), Hosts(1), [])
    assert capsys.readouterr().out.endswith("9 GiB\n0 failures, 0 warnings\n")
    asked = (tmp_path / "asked").read_text().splitlines()
    assert ["--without-shards" in line for line in asked] == [True, False]
    for prepared in (False, True):  # what the option does on each host
        findings = Findings()
        checks.check_recipe(findings, recipe, 1, None, prepared=prepared)
        assert ("shards" in statuses(findings)) == prepared


def test_its_own_file_does_not_make_run_dir_another_programs(recipe):
    Path(recipe.run_dir, "logs").mkdir(parents=True)
    token = doctor.place_token(recipe)
    assert token is not None and token.parent == Path(recipe.run_dir)
    check_run_dir(recipe)
    (token.parent / "thesis.tex").touch()
    with pytest.raises(UserError, match="is not a run of flux2-ds"):
        check_run_dir(recipe)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ('{"status": "ok", "name": "bandwidth", "text": "1 GB/s", "remedy": ""}', ["ok"]),
        ("ncclSystemError; exit 1", ["failure"]),
        ("", ["failure"]),
        ("waiting for rank 1; sleep 60", ["failure"]),
    ],
)
def test_the_measurement_is_believed_when_it_has_said_something(
    tmp_path, monkeypatch, said, expected
):
    words = said.split("; ")
    (tmp_path / "deepspeed").write_text(
        f"#!/bin/sh\necho '{words[0]}'\n{words[1] if len(words) > 1 else ''}\n"
    )
    (tmp_path / "deepspeed").chmod(0o755)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if "sleep" in said:
        monkeypatch.setattr(doctor, "_LIMIT", 1)
        monkeypatch.setattr(supervise, "PATIENCE", 0.1)
    found = doctor.measure(Launch(accelerator="cpu"), Hosts(2))
    assert [line.status for line in found] == expected
    assert ("still at it after 1 s" in found[0].text) == ("sleep" in said)


def test_doctor_wants_a_recipe_for_more(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["flux2-ds", "doctor", "--gpus", "2"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "give --config RECIPE, or nothing" in capsys.readouterr().err
