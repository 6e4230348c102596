"""The command line of the launcher, which answers without torch."""

import dataclasses
import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from forked import ForkedTree
from safetensors.numpy import save_file
from test_hosts import write_hostfile

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.parse import load_recipe, parse_recipe, recipe_parser
from flux2_ds.data.index import (
    CONDITIONING_NAME,
    PROMPTS_NAME,
    Index,
    Shard,
    read_index,
    write_index,
)
from flux2_ds.run.run_dir import lock_run_dir
from launcher import cli

RECIPE = """\
run_dir: runs/cats
batch: {global_size: 4, micro_size: 2}
model: {path: models/klein}
data: {images: photos, shards: shards}
launch: {accelerator: cpu, processes: 2}
"""
KLEIN = "black-forest-labs/FLUX.2-klein-base-4B"
ROOT = Path(cli.__file__).parents[1]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats.yaml").write_text(RECIPE)
    return "cats.yaml"


def call(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    """`flux2-ds` in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["flux2-ds", *argv])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0)])
def test_usage_lists_the_commands(monkeypatch, capsys, argv, code):
    assert call(monkeypatch, *argv) == code
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("usage: flux2-ds COMMAND")
    for command in ("prepare", "plan", "train", "slurm", "export", "sample", "tiny"):
        assert f"\n  {command} " in captured.out


def test_unknown_command_is_named_with_what_was_meant(monkeypatch, capsys):
    assert call(monkeypatch, "trian", "--config", "x") == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: there is no command 'trian'. Did you mean train? The commands: "
    )
    assert "bench-data, tiny" in error
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"flux2-ds {importlib.metadata.version('flux2-ds')}\n"


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3])
def test_ctrl_c_is_one_line_at_any_moment(recipe, delay):
    program = (
        f"import sys; from launcher import __main__ as root\nsys.argv = ['flux2-ds', 'plan', '--config', {recipe!r}]\n"
        "first = root._check_environment\nroot._check_environment = lambda: (print('in', flush=True), first())\n"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", f"{program}root.main()"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert started.stdout is not None
    while started.stdout.readline() != "in\n":
        pass
    time.sleep(delay)
    started.send_signal(signal.SIGINT)
    _, error = started.communicate(timeout=30)
    assert (started.returncode, error) in ((-signal.SIGINT, "interrupted\n"), (0, ""))


@pytest.mark.parametrize("argv", [["--help"], ["plan", "--config", "cats.yaml"]])
def test_output_that_nobody_reads_is_no_defect(recipe, argv):
    """As in `flux2-ds ... | head`, which ends before it has read."""
    reader, writer = os.pipe()
    os.close(reader)
    program = Path(sys.executable).with_name("flux2-ds")
    done = subprocess.run([program, *argv], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_dry_run_prints_the_command_that_would_run(recipe):
    """As installed, in a process of its own."""
    program = Path(sys.executable).with_name("flux2-ds")
    arguments = [
        *["--config", recipe, "--objective.logit_mean", "-1"],
        *["--preview.prompts", '["a cat", "b"]', "--steps=9"],
    ]
    argv = [program, "train", "--dry-run", *arguments[:2], "--gpus", "1", *arguments[2:]]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    *plan, command = done.stdout.splitlines()
    assert "4 global = 2 micro × 2 accumulation × 1 process" in "\n".join(plan)
    words = shlex.split(command)
    assert "DS_ACCELERATOR=cpu" in words
    deepspeed = words[words.index("deepspeed") :]
    assert deepspeed[:5] == ["deepspeed", "--log_level", "critical", "--num_gpus", "1"]
    # The recipe's arguments, in order, without the launcher's own.
    assert deepspeed[deepspeed.index("flux2_ds.train") + 1 :] == arguments
    parsed, _ = parse_recipe(recipe_parser("train", ""), arguments)
    assert (parsed.steps, parsed.objective.logit_mean, parsed.preview.prompts) == (
        9,
        -1,
        ["a cat", "b"],
    )


def test_gpus_may_be_written_with_an_equals_sign(recipe, monkeypatch, capsys):
    assert call(monkeypatch, "train", "--config", recipe, "--gpus=1", "--dry-run") == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.endswith(f"--module flux2_ds.train --config {recipe}")


@pytest.mark.parametrize("arguments", [["--dry"], ["--gpu", "1", "--dry-run"]])
def test_abbreviated_option_is_refused(recipe, monkeypatch, capsys, arguments):
    assert call(monkeypatch, "train", "--config", recipe, *arguments) == 2
    assert arguments[0] in capsys.readouterr().err


def prepare(folder: Path) -> None:
    """An index of one shard, as far as the launcher reads it."""
    (folder / "shards").mkdir()
    (folder / "shards" / "x.tar").write_bytes(b"12345")
    (folder / "shards" / CONDITIONING_NAME).touch()
    shard = Shard("x.tar", Bucket(32, 32), 3, 5, "")
    write_index(folder / "shards", Index("klein", 8, {}, {}, [shard]))


def other_run(folder: Path) -> None:
    (folder / "runs" / "cats").mkdir(parents=True)
    (folder / "runs" / "cats" / "thesis.tex").touch()


def other_model(folder: Path) -> None:
    (folder / "models" / "klein").mkdir(parents=True)
    (folder / "models" / "klein" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')


def distilled_model(folder: Path) -> None:
    klein = folder / "models" / "klein"
    (klein / "transformer").mkdir(parents=True)
    index = {
        "_class_name": "Flux2KleinPipeline",
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "is_distilled": True,
    }
    (klein / "model_index.json").write_text(json.dumps(index))
    config = {"_class_name": "Flux2Transformer2DModel"}
    (klein / "transformer" / "config.json").write_text(json.dumps(config))


def other_settings(folder: Path) -> None:
    index = dataclasses.replace(read_index(folder / "shards"), settings={"resolution": 512})
    write_index(folder / "shards", index)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: None, None),
        (other_settings, "data.resolution is 1024, but data.shards shards were prepared with 512"),
        (distilled_model, "models/klein is step-distilled"),
        (other_run, "is not a run of flux2-ds"),
        (lambda folder: (folder / "shards" / "x.tar").unlink(), "x.tar is missing"),
        (lambda folder: (folder / "shards" / "index.json").unlink(), "flux2-ds prepare"),
        (other_model, "holds a FluxPipeline"),
    ],
)
def test_train_checks_what_it_reads_before_it_starts(
    recipe, tmp_path, monkeypatch, capfd, spoil, message
):
    prepare(tmp_path)
    spoil(tmp_path)
    started = []
    monkeypatch.setattr("launcher.supervise.run", lambda *call: started.append(call) or 75)
    assert call(monkeypatch, "train", "--config", recipe) == (75 if message is None else 2)
    assert len(started) == (message is None)
    captured = capfd.readouterr()
    if message is None:
        (command,), *_ = started[0]
        assert captured.out.startswith(f"{command}\nloading torch")
    else:
        assert message in captured.err
        assert call(monkeypatch, "train", "--config", recipe, "--dry-run") == 0
        assert call(monkeypatch, "plan", "--config", recipe) == 2
        assert message in capfd.readouterr().err


def test_keys_that_deepspeed_does_not_know_are_refused(recipe, tmp_path):
    """Of a config of the user's own, which no shipped one is."""
    prepare(tmp_path)
    out, mine = tmp_path / "out", tmp_path / "mine.json"
    mine.write_text('{"zero_optimization": {"stage": 2, "typo": 1}}')
    argv = [sys.executable, "-m", "launcher", "plan", "--config", recipe, "--model.path", KLEIN]
    for config, code, said in (
        (str(mine), 2, "typo: Extra inputs are not permitted"),
        ("{zero_optimization: {stage: 2, overlap_comm: false}}", 0, "engine     ZeRO stage 2"),
    ):
        plan = ForkedTree([*argv, "--deepspeed", config], out, tmp_path, {})
        assert plan.wait(300) == code and said in out.read_text()


@pytest.mark.parametrize("command", ["train", "plan"])
def test_previews_of_prompts_that_nobody_encoded_are_refused(
    recipe, tmp_path, monkeypatch, capsys, command
):
    prepare(tmp_path)
    monkeypatch.setattr("launcher.supervise.run", lambda *call: 75)
    argv = [command, "--config", recipe, "--model.path", KLEIN, "--preview.prompts=[a cat]"]
    argv.append("--preview.every")
    assert call(monkeypatch, *argv, "5") == 2
    assert "prompts.safetensors has no prompt 'a cat'" in capsys.readouterr().err
    assert call(monkeypatch, *argv, "null") == (75 if command == "train" else 0)
    save_file({"a cat": np.zeros(2)}, tmp_path / "shards" / PROMPTS_NAME, {"format": "np"})
    assert call(monkeypatch, *argv, "5") == (75 if command == "train" else 0)
    assert call(monkeypatch, *argv, "5", "--preview.references=[nope.png]") == 2
    assert "preview.references: nope.png does not exist" in capsys.readouterr().err
    unused = call(monkeypatch, *argv, "null", "--preview.references=[nope.png]")
    assert unused == (75 if command == "train" else 0)


def test_a_run_directory_in_use_is_refused(recipe, tmp_path, monkeypatch, capsys):
    prepare(tmp_path)
    monkeypatch.setattr("launcher.supervise.run", lambda *call: 75)
    for name in (".lock", ".launcher.lock"):  # the trainer's, and another launcher's
        with lock_run_dir(load_recipe(tmp_path / recipe), name):
            assert call(monkeypatch, "train", "--config", recipe) == 2
        assert "another process is training in run_dir runs/cats" in capsys.readouterr().err
    assert call(monkeypatch, "train", "--config", recipe) == 75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--node-rank", "2"], "--node-rank is 2; launch.hostfile hostfile has the hosts 0 to 1"),
        (["--node-rank", "0", "--max-restarts", "1"], "and no --max-restarts"),
    ],
)
def test_a_part_that_cannot_be_started_is_refused(recipe, monkeypatch, capsys, options, message):
    Path("hostfile").write_text("node01 slots=1\nnode02 slots=1\n")
    hosts = ["--launch.hostfile", "hostfile", "--launch.processes", "null"]
    assert call(monkeypatch, "train", "--config", recipe, *hosts, *options) == 2
    assert message in capsys.readouterr().err


def test_each_host_starts_its_own_part(recipe, tmp_path, monkeypatch, capsys):
    prepare(tmp_path)
    Path("hostfile").write_text("node01 slots=1\nnode02 slots=1\n")
    hosts = ["--launch.hostfile", "hostfile", "--launch.processes", "null"]
    started = []
    monkeypatch.setattr(
        "launcher.supervise.run", lambda commands, *call: started.append(commands) or 75
    )
    monkeypatch.setenv("MASTER_PORT", "29511")
    # The first host's launcher holds the run directory.
    with lock_run_dir(load_recipe(tmp_path / recipe), ".launcher.lock"):
        argv = ["train", "--config", recipe, *hosts, "--node-rank"]
        assert call(monkeypatch, *argv, "0") == 2
        assert call(monkeypatch, *argv, "1") == 75
    ((command,),) = started
    assert command.host is None and command.environment["FLUX2_DS_SLOTS"] == "1"
    where = ["--master_addr", "node01", "--node_rank", "1", "--master_port", "29511"]
    assert command.argv[command.argv.index("--no_ssh") + 1 :][:6] == where


def test_more_processes_than_gpus_do_not_start(recipe, tmp_path, monkeypatch, capsys):
    prepare(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(cli, "supervise", lambda *call: pytest.fail("started"))
    argv = ["--config", recipe, *CUDA]
    assert call(monkeypatch, "train", *argv) == 2
    assert "2 processes (launch.processes or --gpus) for as many GPUs" in capsys.readouterr().err
    # To look at a plan for another machine is fine.
    assert call(monkeypatch, "train", *argv, "--dry-run") == 0
    assert call(monkeypatch, "plan", *argv) == 2
    assert "for as many GPUs" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "measures", "expected", "said"),
    [
        (247, False, 1, "error: a rank: killed by SIGKILL"),
        (2, False, 2, ""),
        (0, True, 0, ""),
        (0, False, 1, "error: DeepSpeed's launcher ended too early, perhaps killed: there is no result"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("given", [[], ["--result", "result.json"]])
def test_bench_starts_as_train_does_and_is_done_with_a_result(
    recipe, tmp_path, monkeypatch, capsys, code, measures, expected, said, given
):
    started = []
    (tmp_path / "result.json").write_text("an earlier one")
    os.utime(tmp_path / "result.json", (0, 0))

    def run(commands, stopper):
        started.extend(commands)
        if measures:
            Path(commands[0].argv[-1]).write_text("{}")
        return code

    monkeypatch.setattr(cli, "run", run)
    argv = ["bench", "--config", recipe, "--measure", "5", "--json", *given]
    assert call(monkeypatch, *argv, "--gpus", "2") == expected
    (command,) = started
    assert command.argv[3:5] == ["--num_gpus", "2"]
    start = ["--no_local_rank", "--module", "flux2_ds.commands.bench", *argv[1:6], "--result"]
    assert command.argv[-1 - len(start) : -1] == start
    captured = capsys.readouterr()
    assert captured.out == ""
    assert str(command) in captured.err
    assert (said in captured.err) if said else ("error" not in captured.err)


def test_bench_refuses_a_hostfile(recipe, tmp_path, monkeypatch, capsys):
    write_hostfile(tmp_path, "node01 slots=2\n")
    elsewhere = ["--launch.hostfile", "hostfile", "--launch.processes", "null"]
    assert call(monkeypatch, "bench", "--config", recipe, *elsewhere) == 2
    assert "launch.hostfile is hostfile, and bench times this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "prepared", "code", "errors"),
    [
        ([], True, 0, []),
        (["--steps=9"], False, 2, ["shards is not prepared. Run: flux2-ds prepare .* --steps=9$"]),
        (["--model.path=models/none"], True, 2, ["model.path 'models/none' is no directory"]),
        (
            ["--gpu", "24GiB", "--host=99GiB", "--model.path=black-forest-labs/FLUX.2-dev"],
            False,
            2,
            ["takes .* which --gpu 24GiB --host 99GiB does not have; add --deepspeed", "prepared"],
        ),
        (
            ["--gpu=rtx 3090", "--base_weights=fp8", "--model.path=black-forest-labs/FLUX.2-dev"],
            True,
            2,
            [
                "which --gpu RTX 3090 .* nf4",
                "base_weights is fp8, .* the GPU is RTX 3090. .* int8",
            ],
        ),
    ],
)
def test_plan_prints_the_arithmetic_and_refuses_what_train_would(
    recipe, tmp_path, monkeypatch, capsys, options, prepared, code, errors
):
    if prepared:
        prepare(tmp_path)
    argv = ["plan", "--config", recipe, "--model.path", KLEIN]
    assert call(monkeypatch, *argv, *options) == code
    out, err = capsys.readouterr()
    assert "4 global = 2 micro × 1 accumulation × 2 processes" in out
    assert ("3 samples, 1 step an epoch" if prepared else "is not prepared yet") in out
    lines = err.splitlines()
    assert len(lines) == len(errors)
    for line, expected in zip(lines, errors, strict=True):
        assert re.match(f"error: .*{expected}", line)


@pytest.mark.parametrize(
    ("prepared", "options", "words"),
    [
        (True, ["--steps", "7"], "3 samples, 1 step an epoch, 7 epochs in all"),
        (True, ["--epochs", "5"], "steps      5 = 20 samples"),
        (False, ["--epochs", "5"], "steps      of 5 epochs, once the data is prepared"),
    ],
)
def test_plan_prints_the_length(recipe, tmp_path, monkeypatch, capsys, prepared, options, words):
    if prepared:
        prepare(tmp_path)
    call(monkeypatch, "plan", "--config", recipe, *options)
    assert words in capsys.readouterr().out


def test_plan_names_a_bucket_that_fills_no_batch_and_that_nothing_is_held_out(
    recipe, tmp_path, monkeypatch, capsys
):
    prepare(tmp_path)
    sizes = {"x.tar": (Bucket(32, 32), 29), "y.tar": (Bucket(32, 64), 1)}
    for name in sizes:
        (tmp_path / "shards" / name).write_bytes(b"12345")
    shards = [Shard(name, *size, 5, "") for name, size in sizes.items()]
    write_index(tmp_path / "shards", Index("klein", 8, {}, {}, shards))
    call(monkeypatch, "plan", "--config", recipe, "--data.validation_fraction", "0.1")
    said = capsys.readouterr().out
    assert "bucket 64x32 has 1 of 30 samples (3.3%)" in said
    assert "validation_fraction is 0.1, but no image is held out" in said


def test_what_plan_offers_is_flags_that_fit(recipe, tmp_path, monkeypatch, capsys):
    argv = ["plan", "--config", recipe, "--model.path", "black-forest-labs/FLUX.2-dev",
            "--base_weights", "fp8", "--cache_transposed_base", "true",
            "--gpu", "24GiB", "--host", "128GiB"]  # fmt: skip
    assert call(monkeypatch, *argv) == 2
    out, err = capsys.readouterr()
    _, _, listed = out.partition("host GiB\n")
    offers = [line for line in listed.splitlines() if "--" in line]
    assert len(offers) > 5
    for line in (offers[0], offers[-1]):
        card, _, *flags = line.split()
        assert ("; add " + " ".join(flags) in err) == (line is offers[0])
        assert call(monkeypatch, *argv, "--json", *flags) == 2  # nothing is prepared
        out, again = capsys.readouterr()
        assert "which --gpu" not in again
        assert f"{json.loads(out)['gpu_total'] / 2**30:.1f}" == card


SLURM = ["--nodes", "2", "--gpus-per-node=1", "--time", "1:00:00", "--account", "lab"]
CUDA = ["--launch.accelerator", "cuda"]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("plan", ["--gpus=3"], "batch.global_size 4 "),
        ("plan", ["--gpus=0"], "launch.processes is 0|number of processes is 0"),
        ("plan", ["--gpus=-2"], "launch.processes is -2|number of processes is -2"),
        ("plan", ["--host=64GiB"], "--host is 64GiB, but only beside --gpu"),
        (
            "plan",
            ["--gpu=A100"],
            "--gpu is 'A100'; .* a size such as 24GiB .* one of .* A100 40GB, ",
        ),
        ("bench", ["--against=bare"], "--against bare .* Add --launch.processes 1"),
        (
            "bench",
            ["--gpus=1", "--against=bare"],
            "--against bare is plain torch.* deepspeed: zero0",
        ),
        ("bench", ["--width=100"], "--width 100 and --height 1024 must be multiples of 16"),
        ("bench", ["--gpus=3"], "batch.global_size 4 "),
        ("bench", CUDA, "no GPU is visible"),
        ("slurm", [*CUDA, "--nodes=0"], "--nodes must be at least 1"),
        ("slurm", ["--gpus-per-node=0"], "--gpus-per-node must be at least 1"),
        (
            "slurm",
            ["--launch.hostfile=h"],
            "hostfile is h, and Slurm chooses the hosts. Add --launch",
        ),
        ("slurm", ["--gpus-per-node=2"], "--gpus-per-node is 2, but launch.accelerator is cpu"),
        *(
            ("slurm", ["--job=prepare", f"{option}=1"], f"{option} is of a training")
            for option in ("--array", "--save-before")
        ),
        ("slurm", [*SLURM, *CUDA, "--submit"], "data.shards shards has no index.json"),
    ],
)
def test_what_cannot_run_ends_with_one_message(
    recipe, tmp_path, monkeypatch, capsys, command, options, message
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert call(monkeypatch, command, "--config", recipe, *options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.match(f"error: .*({message})", captured.err)
    assert captured.err.count("\n") == 1


def test_slurm_prints_a_script_with_the_recipes_arguments(recipe, monkeypatch, capsys):
    assert call(monkeypatch, "slurm", "--config", recipe, *SLURM, *CUDA, "--steps", "5") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --job-name=cats\n#SBATCH --nodes=2\n" in script
    assert "#SBATCH --account=lab" in script
    assert f"-m flux2_ds.train --config {recipe} --launch.accelerator cuda --steps 5 " in script


@pytest.mark.parametrize(
    ("options", "gpus"),
    [
        ([], 2),
        (["--gpus-per-node=1"], 1),
        (["--launch.processes=null", "--batch.global_size=16"], 8),
        (["--job=prepare"], 2),
    ],
)
def test_gpus_of_a_node_are_those_that_the_recipe_names(recipe, monkeypatch, capsys, options, gpus):
    assert call(monkeypatch, "slurm", "--config", recipe, *CUDA, *options) == 0
    assert f"#SBATCH --gpus-per-node={gpus}\n" in capsys.readouterr().out


def test_a_command_takes_the_launchers_place(tmp_path):
    """What signals the launcher signals the command, and its exit code is the launcher's."""
    (tmp_path / "told.py").write_text(
        "import os, sys\nprint(os.getpid(), *sys.argv[1:], os.environ['TOLD'], flush=True)\n"
        "sys.exit(3)"
    )
    call = "from launcher import cli; print('first')\ncli.run_module('told', ['a b'], TOLD='x')"
    launched = subprocess.Popen(
        [sys.executable, "-c", call],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
    )
    out, _ = launched.communicate(timeout=30)
    assert out == f"first\n{launched.pid} a b x\n"
    assert launched.returncode == 3


def test_script_is_handed_to_sbatch(recipe, tmp_path, monkeypatch, capsys):
    prepare(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = ["slurm", "--config", recipe, *SLURM, *CUDA, "--submit"]
    assert call(monkeypatch, *argv) == 2
    assert "sbatch is not on this machine" in capsys.readouterr().err
    (tmp_path / "sbatch").write_text("#!/bin/sh\n/bin/cat > submitted; exit 3\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert call(monkeypatch, *argv) == 3
    assert "#SBATCH --job-name=cats" in (tmp_path / "submitted").read_text()


def test_launcher_answers_without_torch(recipe):
    heavy = ["torch", "deepspeed", "diffusers", "transformers", "wandb", "matplotlib"]
    program = (
        "import sys\nfrom launcher import cli\n"
        f"sys.argv = ['flux2-ds', 'train', '--dry-run', '--config', {recipe!r}]\n"
        f"cli.main()\nprint([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "deepspeed --log_level critical --num_gpus 2" in done.stdout
