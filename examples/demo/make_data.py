"""Fetch the emoji of the demo from npm and render its training pictures with captions.

    python examples/demo/make_data.py --out runs/demo/data

The emoji are Microsoft's Fluent Emoji in 3D (MIT). Each picture is one of them on a plain background,
128 × 128 px, with a caption in a .txt file of the same name:

    base/    48 objects on seven colors each, for the base model
    prior/   one picture of each of these objects, to mix into a LoRA's training
    panda/   16 pictures of the panda, for the LoRA
"""

from __future__ import annotations

import argparse
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from catalog import COLORS, HELD_OUT, OBJECTS, PANDA_COLORS, caption, trained_colors
from PIL import Image

EMOJI_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
SIDE = 128
SCALES = (0.76, 0.9)
"""Longest side of the emoji, as a share of the picture's."""
PANDAS = 16
SEED = 7


def main() -> None:
    """Render the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo/data"))
    parser.add_argument("--npm", type=Path, default=Path("runs/demo/npm"), help="downloads")
    parser.add_argument("--views", type=int, default=6, help="pictures of an object and a color")
    parser.add_argument("--only-lora", action="store_true", help="leave out base/")
    options = parser.parse_args()
    emoji = fetch(EMOJI_PACKAGE, options.npm) / "assets"
    views = [] if options.only_lora else base_views(options.views)
    views += prior_views() + panda_views()
    with ProcessPoolExecutor() as pool:
        jobs = [(emoji, options.out, *view) for view in views]
        list(pool.map(write_picture, jobs, chunksize=32))
    print(f"{len(views)} pictures in {options.out}")


def fetch(package: str, folder: Path) -> Path:
    """Download and unpack an npm package by its name and version; returns its folder."""
    target = folder / package.lstrip("@").replace("/", "-").replace("@", "-")
    if not (target / "package").is_dir():
        target.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", package, "--pack-destination", str(target)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        with tarfile.open(target / packed.splitlines()[-1]) as tar:
            tar.extractall(target, filter="data")
    return target / "package"


def base_views(count: int) -> list[tuple[str, str, str, str, int]]:
    """(folder, stem, name, color, seed) of the base model's pictures."""
    return [
        ("base", f"{name}-{color}-{k}", name, color, k)
        for name in OBJECTS
        for color in trained_colors(name)
        for k in range(count)
    ]


def prior_views() -> list[tuple[str, str, str, str, int]]:
    """One picture of each base object, the colors in turn."""
    chosen = {
        name: trained_colors(name)[number % len(trained_colors(name))]
        for number, name in enumerate(OBJECTS)
    }
    return [("prior", f"{name}-{color}", name, color, 1000) for name, color in chosen.items()]


def panda_views() -> list[tuple[str, str, str, str, int]]:
    """The LoRA's pictures: the panda on six of the eight colors."""
    return [
        ("panda", f"panda-{k:02d}-{color}", "panda", color, 2000 + k)
        for k, color in ((k, PANDA_COLORS[k % len(PANDA_COLORS)]) for k in range(PANDAS))
    ]


def write_picture(job: tuple[Path, Path, str, str, str, str, int]) -> None:
    """Render one picture and write its caption beside it."""
    emoji, out, folder, stem, name, color, seed = job
    code = {**OBJECTS, **HELD_OUT}[name]
    random = np.random.default_rng((SEED, int(code, 16), list(COLORS).index(color), seed))
    picture = compose(cut_out(emoji / f"{code}.webp"), COLORS[color], random)
    (out / folder).mkdir(parents=True, exist_ok=True)
    picture.save(out / folder / f"{stem}.png")
    (out / folder / f"{stem}.txt").write_text(caption(name, color) + "\n")


def cut_out(path: Path) -> Image.Image:
    """An emoji without its empty margin, RGBA."""
    with Image.open(path) as image:
        whole = image.convert("RGBA")
    return whole.crop(whole.getchannel("A").getbbox())


def compose(
    emoji: Image.Image, color: tuple[int, int, int], random: np.random.Generator
) -> Image.Image:
    """An emoji at a random size and place on a plain background."""
    scale = random.uniform(*SCALES) * SIDE / max(emoji.size)
    width, height = (max(1, round(scale * side)) for side in emoji.size)
    small = emoji.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    middle = ((SIDE - width) / 2, (SIDE - height) / 2)
    limit = (1 - SCALES[1]) / 2 * SIDE  # 6 px: the emoji stays within the picture
    left, top = (round(at + random.uniform(-limit, limit)) for at in middle)
    picture = Image.new("RGB", (SIDE, SIDE), color)
    picture.paste(small, (left, top), small)
    return picture


if __name__ == "__main__":
    main()
