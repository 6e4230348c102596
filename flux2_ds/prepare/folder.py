"""The folder of shards: what may be written into it, and by whom. No torch: the launcher asks, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any, Literal

from flux2_ds.config.recipe import Recipe, is_url
from flux2_ds.data.index import FORMAT
from flux2_ds.errors import UserError
from flux2_ds.prepare.manifest import MANIFESTS, read_manifests
from flux2_ds.run.atomic import PARTIAL, atomic_write_text
from flux2_ds.run.run_dir import lock_file

CONTENTS_NAME = "content.json"
SETTINGS = (
    "resolution",
    "bucket_step",
    "max_aspect",
    "max_upscale",
    "max_crop",
    "crops",
    "horizontal_flip",
    "alpha_mask",
    "repeats_from_folders",
    "validation_fraction",
)
"""The data settings that decide which images are trained on, which part of them, and how large."""
_SECTIONS = {
    "shards": "the shards' ",
    "settings": "data.",
    "encoding": "prepare.",
    "model": "the model's ",
}


def contents(recipe: Recipe, fingerprint: dict[str, str]) -> dict[str, Any]:
    """What all samples in a folder of shards have in common."""
    settings = recipe.prepare
    return {
        "shards": {"format": FORMAT},
        "settings": {name: getattr(recipe.data, name) for name in SETTINGS},
        "encoding": {
            "text_weights": text_weights(recipe),
            "vae_precision": settings.vae_precision,
            "vae_tiling": settings.vae_tiling,
            "reference_resolution": settings.reference_resolution,
        },
        "model": fingerprint,
    }


def text_weights(recipe: Recipe) -> Literal["fp32", "bf16", "int8", "nf4"]:
    """The weights of the text encoder, with `auto` resolved."""
    given = recipe.prepare.text_weights
    if given != "auto":
        return given
    return "fp32" if recipe.precision == "fp32" else "bf16"


def check_folder(shards: str) -> Path:
    """Refuse a URL, and a folder that something else has filled."""
    folder = Path(shards)
    if is_url(shards):
        raise UserError(
            f"data.shards {shards} is a URL, and prepare writes to a file system. Give a folder, copy it "
            "to the store when it is finished, index.json last, and train from the URL."
        )
    if not ((folder / CONTENTS_NAME).is_file() or is_unused(folder)):
        raise UserError(
            f"data.shards {folder} is not empty and was not made by prepare. Give a new folder."
        )
    return folder


def check_contents(folder: Path, contents: dict[str, Any]) -> None:
    """Refuse a folder of other settings, or of another model."""
    path = folder / CONTENTS_NAME
    if not path.is_file():
        raise UserError(
            f"data.shards {folder} is not the folder into which rank 0 writes. All machines must share it."
        )
    before = json.loads(path.read_text())
    changed = [
        f"{_SECTIONS[part]}{name} was {before.get(part, {}).get(name)!r}, is {value!r}"
        for part, values in contents.items()
        for name, value in values.items()
        if before.get(part, {}).get(name) != value
    ]
    if changed:
        raise UserError(
            f"data.shards {folder} was prepared with something else ({path}): {'; '.join(changed)}. Set it "
            "back, give a new folder, or remove this one."
        )


def claim_contents(folder: Path, contents: dict[str, Any]) -> None:
    """Bind an unused folder to these contents."""
    if is_unused(folder):
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / CONTENTS_NAME, json.dumps(contents, indent=1) + "\n")


def is_unused(folder: Path) -> bool:
    """Whether nothing has been encoded into a folder: it is new, or an earlier start was refused or
    killed before, whose settings bind nobody."""
    ours = {CONTENTS_NAME, f"{CONTENTS_NAME}{PARTIAL}", MANIFESTS, "logs"}
    return not folder.exists() or (
        all(found.name in ours for found in folder.iterdir()) and not read_manifests(folder)
    )


def lock_folder(folder: Path, name: str = "lock") -> IO[str]:
    """Keep other starts of `prepare` out of a folder for as long as the returned file is open.

    Rank 0 holds the file `name`, and `flux2-ds prepare` one of its own, because rank 0 needs a while
    to start.
    """
    taken = f"another prepare is writing data.shards {folder}. Wait for it or stop it."
    return lock_file(folder / MANIFESTS / name, taken, "do not prepare twice at a time")
