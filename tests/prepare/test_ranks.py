"""Several ranks prepare one folder: the shards are those of one process, whatever was killed."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from forked import Ranks
from test_prepare import add_photo, model, photos, recipe_for, report, run, shard_bytes, truncate

from flux2_ds.config.recipe import Prepare, Recipe, recipe_values
from flux2_ds.data.index import read_index
from flux2_ds.errors import run_root
from flux2_ds.prepare import __main__ as root
from flux2_ds.prepare import captions, images
from flux2_ds.prepare import encode as rounds

__all__ = ["model", "photos"]  # fixtures


def prepare(_orders: object, config: Path) -> None:
    """`prepare` as a rank runs it, slowly, with notes of what it encodes."""
    encode, encode_captions = images.latents.encode, captions.CaptionEncoder.encode
    write = images.ShardWriter.write
    rounds._CAPTIONS_A_RANK = 1  # so that a second text encoder pays

    def note(kind: str, what: Any) -> None:
        with config.with_suffix(".done").open("a") as file:
            file.write(f"{os.environ['RANK']} {kind} {what}\n")

    def slowly(*given: Any) -> Any:
        time.sleep(0.3)
        return encode(*given)

    def encode_noted(self: Any, batch: Any) -> Any:
        note("captions", batch)
        return encode_captions(self, batch)

    def write_noted(self: Any, job: Any) -> Any:
        note("shard", job.name)
        return write(self, job)

    images.latents.encode = slowly
    captions.CaptionEncoder.encode, images.ShardWriter.write = encode_noted, write_noted
    sys.argv = ["prepare", "--config", str(config)]
    run_root(root.main)


def start(folder: Path, *recipes: Recipe) -> Ranks:
    """A process for each recipe, as a launcher starts the ranks of a run."""
    configs = [folder / f"rank_{rank}.yaml" for rank in range(len(recipes))]
    for config, recipe in zip(configs, recipes, strict=True):
        config.write_text(yaml.safe_dump(recipe_values(recipe)))
    return Ranks(prepare, [(config,) for config in configs])


def finished(shards: Path) -> set[str]:
    return {path.name.removesuffix(".json") for path in (shards / "prepared").glob("*.tar.json")}


def done(folder: Path) -> list[tuple[str, str, str]]:
    """(rank, kind, what) of all that was encoded, and forget it."""
    lines = []
    for path in folder.glob("*.done"):
        lines += [tuple(line.split(" ", 2)) for line in path.read_text().splitlines()]
        path.unlink()
    return lines


def test_a_killed_rank_costs_no_finished_shard_and_changes_nothing(model, photos, tmp_path):
    for number in range(24):
        (photos / f"copy{number}.png").symlink_to(photos / "a.png")
        (photos / f"copy{number}.txt").write_text(f"caption {number}")
    add_photo(photos, "broken", (96, 96), "broken")
    truncate(photos / "broken.png")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(recipe_for(model, photos, whole, samples_per_shard=2, prepare=Prepare(text_batch_size=2)))
    rounds = Prepare(scratch_gb=0.002, text_batch_size=2)
    recipe = recipe_for(model, photos, cut, samples_per_shard=2, prepare=rounds)

    for killed in (1, 0):
        before = finished(cut)
        ranks = start(tmp_path, recipe, recipe)
        deadline = time.monotonic() + 240
        while len(finished(cut)) < len(before) + 2:
            assert not ranks.ended(), ranks.said()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        ranks.processes[killed].kill()
        codes = ranks.wait()
        # Rank 1's own output is in its log.
        said = ranks.said() + (cut / "logs" / "rank_1.log").read_text()
        assert codes[1 - killed] == 1 and f"rank {killed} on " in said and "it was killed" in said
        times = {name: (cut / name).stat().st_mtime_ns for name in finished(cut)}
        assert not (cut / "index.json").exists()
    assert len(done(tmp_path)) > 4

    ranks = start(tmp_path, recipe, recipe)
    assert ranks.wait() == [0, 0], ranks.said()
    encoded = done(tmp_path)
    assert len(encoded) == len({item[1:] for item in encoded})  # nothing twice
    assert {item[:2] for item in encoded} == {(r, k) for r in "01" for k in ("captions", "shard")}
    assert {name: (cut / name).stat().st_mtime_ns for name in times} == times
    assert shard_bytes(cut) == shard_bytes(whole)
    assert read_index(cut) == read_index(whole)
    assert report(cut)["skipped"] == report(whole)["skipped"]
    left = {path.name for path in cut.iterdir()} - {"logs"}
    assert left == {path.name for path in whole.iterdir()}


def test_a_rank_with_another_setting_ends_all(model, photos, tmp_path):
    recipe = recipe_for(model, photos, tmp_path / "s")
    other = recipe_for(model, photos, tmp_path / "s", prepare=Prepare(text_weights="bf16"))
    ranks = start(tmp_path, recipe, other)
    ranks.wait()
    assert "prepare.text_weights was 'fp32', is 'bf16'" in ranks.said()
    assert not finished(tmp_path / "s")
