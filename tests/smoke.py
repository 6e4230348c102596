"""The smoke test: the main job from pictures to a picture, by the commands a user would type.

Prepares sixteen pictures of a panda, trains a LoRA over the demo's small klein, which has never seen one, on two
CPU processes with previews, stops it by a signal, resumes it, exports the adapter, and renders without and with
it. Ends with the files made.

    python tests/smoke.py [--seed 1]        # what is given goes to every command
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops

Record = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ["--config", "recipes/smoke-cpu.yaml", *sys.argv[1:]]
SMOKE = ROOT / "smoke"
RUN = SMOKE / "run"
PANDAS = ROOT / "examples" / "panda"
STOP_AT = 60
STEPS = 160
EXIT_STOPPED = 75
LIMIT = 600.0
"""s to reach STOP_AT, and again to save and stop; a quiet machine needs a tenth."""


def main() -> None:
    started = time.monotonic()
    shutil.rmtree(SMOKE, ignore_errors=True)
    say("prepare: 16 pictures of a panda to latents and text embeddings in WebDataset shards")
    flux2_ds("prepare", *RECIPE)
    say("plan")
    flux2_ds("plan", *RECIPE)
    say(f"train on two processes; SIGTERM after step {STOP_AT}")
    before = train_and_stop()
    say("resume: the same command again")
    flux2_ds("train", *RECIPE)
    say("export the adapter for diffusers")
    flux2_ds("export", *RECIPE)
    say("render with diffusers, without and with the adapter")
    flux2_ds("sample", *RECIPE)
    check_results(before)
    say(f"done in {time.monotonic() - started:.0f} s; made:")
    for path in files_made():
        print(f"  {path.relative_to(ROOT)}{'/' if path.is_dir() else ''}")


def flux2_ds(*arguments: str) -> None:
    """Run a command as a user would; a failure ends the smoke test."""
    print(f"$ flux2-ds {' '.join(arguments)}", flush=True)
    code = subprocess.run([command(), *arguments], cwd=ROOT, check=False).returncode
    if code != 0:
        sys.exit(f"smoke test failed: flux2-ds {arguments[0]} exited with {code}")


def train_and_stop() -> list[Record]:
    """Start training, send SIGTERM in the middle, and expect code 75; the records so far."""
    print(f"$ flux2-ds train {' '.join(RECIPE)}", flush=True)
    process = subprocess.Popen([command(), "train", *RECIPE], cwd=ROOT)
    deadline = time.monotonic() + LIMIT
    try:
        while process.poll() is None and last_step() < STOP_AT:
            expect(time.monotonic() < deadline, f"no step {STOP_AT} after {LIMIT:.0f} s")
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        code = process.wait(LIMIT)
    finally:
        process.kill()  # its keeper ends the training
    expect(code == EXIT_STOPPED, f"training stopped by SIGTERM exited with {code}, not 75")
    return read_records()


def last_step() -> int:
    records = read_records()
    return records[-1]["step"] if records else 0


def read_records() -> list[Record]:
    path = RUN / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def check_results(before: list[Record]) -> None:
    """What the commands cannot know: that the two halves make one run, and that it learned."""
    records = read_records()
    # Times are among the values, so a run that began anew would not repeat them.
    expect(records[: len(before)] == before, "the resumed run has not gone on from the checkpoint")
    steps = [record["step"] for record in records]
    losses = [record["train/loss"] for record in records]
    expect(steps == sorted(set(steps)) and steps[-1] == STEPS, f"steps are not one run: {steps}")
    expect(all(math.isfinite(loss) for loss in losses), f"losses are not finite: {losses}")
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    expect(last < first, f"the loss did not fall: {first:.4f} to {last:.4f}")
    print(f"loss {first:.4f} (first records) to {last:.4f} (last records)")
    expect(bool(list(RUN.glob("wandb/offline-run-*"))), "no offline W&B run")
    steps = sorted(int(path.name[-8:]) for path in RUN.glob("previews/step_*"))
    expect(steps == [0, 80, STEPS], f"previews of steps {steps}")
    with Image.open(RUN / "samples" / f"step_{STEPS:08d}.png") as sheet:
        for prompt in (0, 1):
            check_pictures(sheet.convert("RGB"), prompt)


def check_pictures(sheet: Image.Image, prompt: int) -> None:
    """The adapter draws a panda where the base model does not, in training as in `sample`."""
    with Image.open(RUN / "previews" / f"step_{STEPS:08d}" / f"{prompt}.png") as picture:
        width, height = picture.size
        top = 52 + prompt * (height + 32)
        before, after = (
            sheet.crop((left, top, left + width, top + height))
            for left in (6, sheet.width // 2 + 3)
        )
        furthest = max(high for _, high in ImageChops.difference(picture, after).getextrema())
    expect(furthest <= 2, f"preview {prompt} is {furthest} levels from sample's picture")
    without, likeness = panda_likeness(before), panda_likeness(after)
    print(
        f"likeness of picture {prompt} to a panda: {without:.2f} without, {likeness:.2f} with the adapter"
    )
    expect(without < 0.3, f"picture {prompt} shows a panda without the adapter")
    expect(likeness > 0.5, f"picture {prompt} shows no panda with the adapter")


def panda_likeness(picture: Image.Image) -> float:
    """Correlation of a picture's middle with that of the mean training picture, in gray."""
    pandas = [middle(Image.open(path)) for path in sorted(PANDAS.glob("*.png"))]
    return float(np.corrcoef(np.mean(pandas, axis=0), middle(picture))[0, 1])


def middle(picture: Image.Image) -> NDArray[np.float64]:
    """The middle 80 of 128 px, in gray, at 20 × 20 px."""
    gray = picture.convert("L").crop((24, 24, 104, 104)).resize((20, 20))
    return np.asarray(gray, dtype=np.float64).ravel()


def files_made() -> list[Path]:
    fixed = [
        SMOKE / "shards" / "index.json",
        SMOKE / "shards" / "contact_sheets",
        SMOKE / "shards" / "report.json",
        RUN / "recipe.yaml",
        RUN / "metrics.jsonl",
        RUN / "loss.png",
        RUN / "report.html",
        RUN / "previews.png",
    ]
    patterns = (
        "checkpoints/step_*",
        "export/*.safetensors",
        "samples/*.png",
        "wandb/offline-run-*",
    )
    found = [*fixed, *(path for pattern in patterns for path in sorted(RUN.glob(pattern)))]
    for path in found:
        expect(path.exists(), f"{path} was not made")
    return found


def command() -> str:
    return str(Path(sys.executable).with_name("flux2-ds"))


def expect(holds: bool, complaint: str) -> None:
    if not holds:
        sys.exit(f"smoke test failed: {complaint}")


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
