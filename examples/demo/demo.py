"""Teach the demo's model a panda, and let an independent judge say what it draws.

    make demo

Trains a LoRA on sixteen pandas alone, and another with one picture of each base object mixed in, by the
commands a user would type. Draws with diffusers from fixed seeds, without and with each adapter, and
names what it sees by the centroids of `judge.py`. Ends with a sheet, a table and a JSON file in --out.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from catalog import COLORS, JUDGED, PANDA_COLORS, caption, trained_colors, untrained_color
from diffusers import Flux2KleinPipeline
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
NPM = Path("runs/demo/npm")
VARIANTS = {
    "pandas alone": ["panda.yaml"],
    "pandas and prior images": ["panda-mixed.yaml"],
    "DoRA": ["panda.yaml", "--method", "dora"],
    "rank 4": ["panda.yaml", "--lora.rank", "4"],
    "rank 64": ["panda.yaml", "--lora.rank", "64"],
    "nf4 base": ["panda.yaml", "--base_weights", "nf4"],
}
"""Adapters that can be trained: a recipe, and what differs from it."""
USUAL = list(VARIANTS)[:2]
STEPS, GUIDANCE = 12, 4.0
PANDAS = 16
"""Pictures of the panda: every color twice."""
PACKAGES = ("torch", "diffusers", "transformers", "deepspeed")

Pictures = list[Image.Image]


def main() -> None:
    """Train, draw, judge, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument(
        "--seeds", type=int, default=1, help="adapters of each kind, with seeds 0, 1, ..."
    )
    parser.add_argument("--kinds", nargs="+", choices=VARIANTS, default=USUAL, help="of adapters")
    options = parser.parse_args()
    started = time.monotonic()
    make_data()
    adapters = {
        (variant, seed): train(variant, seed, options.out)
        for variant in options.kinds
        for seed in range(options.seeds)
    }
    trained = time.monotonic() - started
    pipeline = Flux2KleinPipeline.from_pretrained(HERE / "model", dtype=torch.float32)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    before = draw_all(pipeline)
    after = {key: draw_all(pipeline, path) for key, path in adapters.items()}
    from judge import Judge, ceiling  # needs packages that only the demo does

    judge = Judge()
    result = report(judge, before, after)
    result["ceiling of 52"] = ceiling(judge, NPM, pipeline.vae)
    result["seconds"] = {
        "prepare, train, export": round(trained),
        "all": round(time.monotonic() - started),
    }
    sheet(before, {variant: after[variant, 0] for variant in options.kinds}).save(
        options.out / "demo.png"
    )
    (options.out / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "demo.md").write_text(table(result))
    print(table(result))
    for name in ("demo.png", "demo.md", "demo.json"):
        print(options.out / name)


def make_data() -> None:
    """Fetch the emoji and render the pictures, unless they are there."""
    if not Path("runs/demo/data/prior").is_dir():
        program = [sys.executable, str(HERE / "make_data.py"), "--only-lora", "--npm", str(NPM)]
        subprocess.run(program, check=True)


def train(variant: str, seed: int, out: Path) -> Path:
    """Prepare, train and export one adapter, and sample the first of its kind; returns its file."""
    recipe, *changes = VARIANTS[variant]
    run = out / f"{variant.replace(' ', '-')}-seed{seed}"
    arguments = ["--config", str(HERE / recipe), "--run_dir", str(run), "--seed", str(seed)]
    arguments += changes
    commands = ("prepare", "train", "export", *(["sample"] if seed == 0 else []))
    for command in commands:
        print(f"$ flux2-ds {command} {' '.join(arguments)}", flush=True)
        program = Path(sys.executable).with_name("flux2-ds")
        subprocess.run([program, command, *arguments], check=True)
    return sorted((run / "export").glob("*-diffusers.safetensors"))[-1]


def panda_colors() -> list[str]:
    """The background of each picture of the panda."""
    return [list(COLORS)[k % len(COLORS)] for k in range(PANDAS)]


def object_colors() -> list[str]:
    """The background of each judged object: for every other one the color it was never trained on."""
    return [
        untrained_color(name) if k % 2 else trained_colors(name)[k % 7]
        for k, name in enumerate(JUDGED)
    ]


def draw_all(pipeline: Flux2KleinPipeline, adapter: Path | None = None) -> dict[str, Pictures]:
    """The panda and the sixteen judged objects, without or with an adapter, always from the same noise."""
    if adapter is not None:
        pipeline.load_lora_weights(str(adapter))
    objects = [caption(name, color) for name, color in zip(JUDGED, object_colors(), strict=True)]
    pictures = {
        "panda": draw(pipeline, [caption("panda", color) for color in panda_colors()], 100),
        "objects": draw(pipeline, objects, 200),
    }
    if adapter is not None:
        pipeline.unload_lora_weights()
    return pictures


def draw(pipeline: Flux2KleinPipeline, prompts: list[str], seed: int, batch: int = 16) -> Pictures:
    """A picture of each prompt; the k-th starts from the noise of `seed` + k."""
    pipeline.set_progress_bar_config(disable=True)
    pictures: Pictures = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        pictures += pipeline(
            prompt=part,
            height=128,
            width=128,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed + start + k) for k in range(len(part))],
        ).images
    return pictures


def report(
    judge: Any, before: dict[str, Pictures], after: dict[tuple[str, int], dict[str, Pictures]]
) -> dict[str, Any]:
    """What the judge says, of the base model and of each adapter."""
    off = measure(judge, before, before)
    return {
        "base": off,
        "adapters": {
            variant: [measure(judge, before, after[key]) for key in after if key[0] == variant]
            for variant in dict.fromkeys(variant for variant, _ in after)
        },
        "pictures": {"panda": len(before["panda"]), "objects": len(before["objects"])},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
    }


def measure(
    judge: Any, before: dict[str, Pictures], after: dict[str, Pictures]
) -> dict[str, float]:
    """Of one set of pictures, against the base model's from the same noise.

    The judge chooses among the panda and the sixteen objects, 17 classes.
    """
    from judge import background

    among = ["panda", *JUDGED]
    panda = judge.cosines(after["panda"], among)
    base = judge.cosines(before["panda"], among)[:, 0]
    unseen = [k for k, color in enumerate(panda_colors()) if color not in PANDA_COLORS]
    named = panda.argmax(1) == 0
    objects = judge.names(after["objects"], among)
    right = [name == truth for name, truth in zip(objects, JUDGED, strict=True)]
    colors = [*zip(after["panda"], panda_colors(), strict=True),
              *zip(after["objects"], object_colors(), strict=True)]  # fmt: skip
    values = {
        "panda named": named.float().mean(),
        "panda named, new colors": named[unseen].float().mean(),
        "panda cosine": panda[:, 0].mean(),
        "panda rank": (1 + (panda[:, 1:] > panda[:, :1]).sum(1)).float().mean(),
        "pairs won": (panda[:, 0] > base).float().mean(),
        "mean gain": (panda[:, 0] - base).mean(),
        "objects named": np.mean(right),
        "objects named panda": np.mean([name == "panda" for name in objects]),
        "backgrounds right": np.mean([background(p) == color for p, color in colors]),
    }
    return {name: round(float(value), 3) for name, value in values.items()}


def table(result: dict[str, Any]) -> str:
    """The result in Markdown; with several seeds the mean and, in brackets, the range."""
    columns = {"base model": [result["base"]], **result["adapters"]}
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name in result["base"]:
        cells = [spread([run[name] for run in runs]) for runs in columns.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """A mean, with its range if there are several values."""
    mean = f"{float(np.mean(values)):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f})"


def sheet(before: dict[str, Pictures], after: dict[str, dict[str, Pictures]]) -> Image.Image:
    """Eight pandas and eight objects in columns; a row for the base model and for each adapter."""
    rows = {"base model": before, **after}
    blocks = [("panda", list(range(8))), ("objects", list(range(0, 16, 2)))]
    side, head, label = 128, 22, 22
    height = sum(head + len(rows) * (side + label) for _ in blocks)
    image = Image.new("RGB", (8 * side, height), "white")
    pen, top = ImageDraw.Draw(image), 0
    for kind, chosen in blocks:
        title = "a panda on each color" if kind == "panda" else "objects that the base model knows"
        pen.text((4, top + 5), title, fill="black")
        top += head
        for name, pictures in rows.items():
            pen.text((4, top + 5), name, fill="dimgray")
            for column, k in enumerate(chosen):
                image.paste(pictures[kind][k], (column * side, top + label))
            top += side + label
    return image


if __name__ == "__main__":
    main()
