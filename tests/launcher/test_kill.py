"""Random kills of any process at any moment of a training, on one host and on two: nothing is left behind, no
exit code is wrong, and the run ends with the bits of one that nobody has disturbed.

`make test-kill N=100 SEED=0`; a failure names the seed and the kill. Importing takes longest, so that 19 of 20 runs
are forked from what has imported everything (`ForkedTree`): the same processes, with less between them. A test of one
kill has no others.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from forked import ForkedTree
from PIL import Image
from safetensors.torch import load_file

from flux2_ds.commands.tiny import make_tiny
from flux2_ds.config.model_spec import read_spec
from flux2_ds.config.parse import load_recipe
from flux2_ds.prepare import __main__ as prepare

KILLS, SEED = int(os.environ.get("KILLS", "1")), int(os.environ.get("SEED", "0"))
STEPS, GONE = 6, 10.0  # s in which every process must have ended
RECIPE = f"""\
{{run_dir: run, steps: {STEPS}, precision: fp32, deepspeed: zero0, model: {{path: model}}, lora: {{rank: 2}},
data: {{images: photos, shards: shards, resolution: 64, bucket_step: 16}}, batch: {{global_size: 2, micro_size: 1}},
checkpoint: {{every: 2, background: true}},
preview: {{every: 2, prompts: [color 1], height: 64, width: 64, steps: 1}}, log: {{every: 1, wandb: disabled}}, launch: {{accelerator: cpu, processes: 2}}}}
"""
SSH = """\
#!/bin/sh
# As ssh and sshd do: the last word goes to a shell, which has few variables.
if [ "$1" = -G ]; then echo "hostname $(hostname)"; exit; fi
for last; do :; done
exec 3<&0  # a command in the background has no input but what it is given
env -i HOME="$HOME" PATH=/usr/bin:/bin sh -c "$last" <&3 3<&- &
wait $!
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run starts: a model, shards, a recipe, and two hosts; with a name that a shell would read."""
    folder = tmp_path_factory.mktemp("kill") / "it's $(here) & there"
    (folder / "photos").mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 30, 200)).save(folder / f"photos/{number}.png")
        (folder / f"photos/{number}.txt").write_text(f"color {number}")
    make_tiny(folder / "model", "klein")
    (folder / "hostfile").write_text("one slots=1\ntwo slots=1\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(SSH)
    (folder / "bin" / "ssh").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare.prepare(
            load_recipe(Path("recipe.yaml"), []), Path("model"), read_spec(Path("model"))
        )
    return folder


@pytest.fixture(autouse=True)
def end_all(folder: Path) -> Iterator[None]:
    yield
    for process in alive(folder):
        process.kill()


def alive(folder: Path) -> list[psutil.Process]:
    """Everything that has been started there, whoever its parent is by now."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or is a zombie
            if process.cwd() == str(folder):
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


class Executed(subprocess.Popen[bytes]):
    def __init__(self, argv: list[str], out: Path, folder: Path, variables: dict[str, str]) -> None:
        with out.open("w") as stream:
            super().__init__(argv, stdout=stream, stderr=stream, cwd=folder, start_new_session=True,
                             env=os.environ | variables)  # fmt: skip


def start(
    kind: type[Executed] | type[ForkedTree],
    folder: Path,
    run_dir: str,
    hosts: int,
    restarts: int,
    *more: str,
) -> Executed | ForkedTree:
    argv = [sys.executable, "-m", "launcher", "train", "--config", "recipe.yaml", "--run_dir", run_dir, *more]  # fmt: skip
    if hosts == 2:
        argv += ["--launch.hostfile", "hostfile", "--launch.processes", "null"]
    variables = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    variables |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    return kind([*argv, "--max-restarts", str(restarts)], folder / "out", folder, variables)


Result = tuple[dict[str, torch.Tensor], dict[int, float], dict[str, bytes]]


def result(run: Path) -> Result:
    """What a run has made: every tensor of its last checkpoint, the loss of each step, and the previews."""
    tensors: dict[str, torch.Tensor] = {}
    for file in (run / "checkpoints" / f"step_{STEPS:08d}").glob("*.safetensors"):
        tensors |= {f"{file.stem} {name}": tensor for name, tensor in load_file(file).items()}
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = {record["step"]: record["train/loss"] for record in records if record["step"]}
    images = {
        str(path.relative_to(run)): path.read_bytes() for path in run.glob("previews/**/*.png")
    }
    return tensors, losses, images


def check_same(found: Result, expected: Result) -> None:
    assert found[1] == expected[1] and len(found[1]) == STEPS
    assert found[2] == expected[2] and len(found[2]) > STEPS // 2
    assert found[0].keys() == expected[0].keys() and len(found[0]) > 30
    for name, tensor in expected[0].items():
        assert torch.equal(found[0][name], tensor), name


def test_whoever_is_killed_whenever_nothing_is_left_and_the_run_ends_alike(folder: Path) -> None:
    durations: dict[type, float] = {}
    ForkedTree(["-m", "launcher", "--version"], folder / "out", folder, {}).wait(900)  # imports
    for kind, run_dir, background in (
        (ForkedTree, "forked", "false"),
        (Executed, "executed", "true"),
    )[:KILLS]:
        began = time.monotonic()
        launcher = start(kind, folder, run_dir, 2, 0, "--checkpoint.background", background)
        assert launcher.wait(900) == 0, (folder / "out").read_text()
        durations[kind] = time.monotonic() - began
    expected = result(folder / "forked")
    if KILLS > 1:
        check_same(result(folder / "executed"), expected)
    print("undisturbed, in s:", *durations.values())

    draw = random.Random(SEED)
    kills, runs, done = 0, 0, False
    while True:
        run, hosts, restarts = folder / f"run {runs}", draw.choice((1, 2)), draw.choice((0, 0, 1))
        executed = draw.random() < 0.05 and KILLS > 1
        kind = Executed if executed else ForkedTree
        launcher = start(kind, folder, run.name, hosts, restarts)
        victim = ""
        if kills < KILLS and not done:  # what is done ends undisturbed, and another run begins
            durations[kind] *= 1.05
            try:
                launcher.wait(draw.uniform(0, durations[kind]))
                durations[kind] *= 0.8  # the machine is faster by now
            except subprocess.TimeoutExpired:
                if there := alive(folder):
                    chosen = draw.choice(there)
                    with suppress(psutil.NoSuchProcess):
                        command = " ".join(filter(None, chosen.cmdline()))[:140] or "one that ends"
                        chosen.kill()
                        kills += 1
                        victim = "the launcher" if chosen.pid == launcher.pid else command
        code = launcher.wait(900)
        deadline = time.monotonic() + GONE
        while (left := alive(folder)) and time.monotonic() < deadline:
            time.sleep(0.1)
        out = (folder / "out").read_text()
        done = (run / "checkpoints" / f"step_{STEPS:08d}").is_dir()
        what = f"seed {SEED}, kill {kills} of {victim or 'nobody'} on {hosts} hosts, {kind.__name__}, {restarts} "
        what += f"restarts: code {code}, {done=}"
        print(what, flush=True)
        assert not left, f"{what}, left {[process.cmdline() for process in left]}\n{out}"
        if victim == "the launcher" and code != 0:  # it may have been about to end
            assert code == -signal.SIGKILL, f"{what}\n{out}"
        elif code != 0:
            assert victim and code == 1 and not restarts and "\nerror: " in f"\n{out}", (
                f"{what}\n{out}"
            )
        else:
            assert done, f"{what}\n{out}"
        if code == 0:
            check_same(result(run), expected)
            runs, done = runs + 1, False
            if kills == KILLS:
                return
