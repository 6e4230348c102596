"""Previews: diffusers' own pictures, divided among processes, and nothing that ends a run."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from factories import load_pipeline
from PIL import Image
from safetensors.torch import save_file

from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Data, Model, Preview, Recipe
from flux2_ds.data.dataset import check_previews
from flux2_ds.data.index import PROMPTS_NAME
from flux2_ds.distributed import Process
from flux2_ds.errors import UserError
from flux2_ds.model import transformer
from flux2_ds.model.activation_checkpointing import configure_blocks
from flux2_ds.model.load import read_weights
from flux2_ds.model.text_encoder import TextEncoder
from flux2_ds.training import previews as preview
from flux2_ds.training.previews import Previews, as_prompt

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("process_group")
PROMPTS = ["a cat", "a dog", "a red house"]
SETTINGS = Preview(every=2, prompts=PROMPTS, height=64, width=96, steps=2)

Make = Callable[..., Previews]


@pytest.fixture
def previews(tiny_model: Path, tiny_spec: Spec, tmp_path: Path) -> Make:
    """Makes previews of the tiny model as process `rank` of `world_size`."""
    with torch.device("meta"):
        model = transformer.build_transformer(tiny_model)
    read_weights(model, tiny_model / "transformer", torch.float32, CPU, None)
    encoder = TextEncoder(tiny_model, tiny_spec, torch.float32, CPU)
    empty = encoder.encode([""])
    prompts = [as_prompt(tiny_spec, encoder.encode([prompt]), empty) for prompt in PROMPTS]

    @contextmanager
    def evaluating() -> Iterator[None]:
        model.eval()
        yield
        model.train()

    def make(rank: int = 0, world_size: int = 1, folder: str = "run") -> Previews:
        configure_blocks(model, checkpointed=0, compiled=True, attention=None)
        engine: Any = SimpleNamespace(model=model.train(), evaluating=evaluating)
        return Previews(
            engine, SETTINGS, tiny_spec, tiny_model, tmp_path / folder / "previews",
            Process(rank, world_size, CPU), prompts, metrics=None, heartbeat=lambda step, phase: None,
        )  # fmt: skip

    return make


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def images(run_dir: Path, step: int = 4) -> list[Path]:
    return sorted((run_dir / "previews" / f"step_{step:08d}").iterdir())


def test_they_are_diffusers_own_and_compile_nothing(previews, tiny_model, tiny_spec, tmp_path):
    torch._dynamo.utils.counters.clear()
    previews().render(4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    paths = images(tmp_path / "run")
    reference = load_pipeline(tiny_model, tiny_spec, torch.float32)
    reference.set_progress_bar_config(disable=True)
    for prompt, path in zip(PROMPTS, paths, strict=True):
        expected = reference(
            prompt=prompt, height=64, width=96, num_inference_steps=2, guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
        ).images[0]  # fmt: skip
        assert np.abs(pixels(path) - np.asarray(expected).astype(int)).max() <= 1
    first, *others = map(pixels, paths)
    assert all((first != other).any() for other in others)


def test_processes_divide_the_prompts_and_make_as_many_passes(previews, tmp_path, monkeypatch):
    previews().render(4)
    full = {path.name: pixels(path) for path in images(tmp_path / "run")}
    calls = {0: 0, 1: 0}
    render = preview.render
    for rank in (1, 0):

        def counted(*arguments: Any, rank: int = rank) -> Image.Image:
            calls[rank] += 1
            return render(*arguments)

        monkeypatch.setattr(preview, "render", counted)
        previews(rank, 2, "two").render(4)
        found = images(tmp_path / "two")
        if rank == 1:
            assert [path.name for path in found] == ["1.png"]
    assert calls == {0: 2, 1: 2}
    assert {path.name for path in found} == full.keys()
    for path in found:
        assert (pixels(path) == full[path.name]).all()


def test_the_overview_has_the_first_and_the_last_step(previews, tmp_path, monkeypatch):
    monkeypatch.setattr(Previews, "_render", lambda self, step, paths: save(paths))

    def save(paths: list[Path]) -> None:
        paths[0].parent.mkdir(parents=True)
        paths[0].touch()

    columns = Mock(return_value=Image.new("RGB", (8, 8)))
    monkeypatch.setattr(preview, "grid", columns)
    made = previews()
    (tmp_path / "run" / "previews" / "step_00000002.keep").mkdir(parents=True)  # the user's
    for step in range(0, 40, 2):
        made.render(step)
    titles = columns.call_args.args[1]
    assert titles[0] == "step 0" and titles[-1] == "step 38" and len(titles) == 8
    assert (tmp_path / "run" / "previews.png").is_file()


@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("no room"), OSError(28, "No space left")]
)
def test_what_goes_wrong_ends_a_run_only_before_its_first_step(
    previews, tmp_path, monkeypatch, caplog, failure
):
    monkeypatch.setattr(preview, "render", Mock(side_effect=failure))
    with pytest.raises(UserError, match=r"previews of 96x64 cannot be made \(.*preview\.every"):
        previews().render(0)
    with caplog.at_level(logging.WARNING):
        previews().render(4)
    assert "step 4: previews of 96x64 cannot be made" in caplog.text
    assert previews()._engine.model.training
    # A disk on which no folder can be made, as a file in its place: other ranks need this one's passes.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "previews").touch()
    passes = Mock(return_value=Image.new("RGB", (96, 64)))
    monkeypatch.setattr(preview, "render", passes)
    previews().render(6)
    assert passes.call_count == len(PROMPTS) and "step 6: previews of 96x64" in caplog.text


def test_what_cannot_be_previewed_is_refused_before_the_model_is_loaded(tmp_path):
    recipe = Recipe(
        run_dir="r",
        model=Model(path="m"),
        data=Data(images="i", shards=str(tmp_path)),
        preview=Preview(every=5, prompts=["a cat", "a dog"]),
    )
    with pytest.raises(UserError, match=r"no prompt 'a cat'\. Run `flux2-ds prepare`"):
        check_previews(recipe, tmp_path, prepared=True)
    save_file({"a cat": torch.zeros(2)}, tmp_path / PROMPTS_NAME)
    with pytest.raises(UserError, match=r"no prompt 'a dog'"):
        check_previews(recipe, tmp_path, prepared=True)
    save_file({"a cat": torch.zeros(2), "a dog": torch.zeros(2)}, tmp_path / PROMPTS_NAME)
    with pytest.raises(UserError, match=r"model\.path .* has no vae"):
        check_previews(recipe, tmp_path, prepared=True)
    (tmp_path / "vae").mkdir()
    (tmp_path / "scheduler").mkdir()
    check_previews(recipe, tmp_path, prepared=True)


def test_images_of_an_earlier_start_are_not_in_the_overview(previews, tmp_path):
    overview = tmp_path / "run" / "previews.png"
    previews().render(2)
    alone = pixels(overview)
    previews().render(4)
    assert pixels(overview).shape[1] > alone.shape[1]
    previews().render(2)  # that start left no checkpoint
    assert (pixels(overview) == alone).all()


def test_a_preview_that_was_cut_short_is_not_made(previews, tmp_path):
    made = previews()
    assert not made.made(4)
    made.render(4)
    assert made.made(4) and not made.made(2)
    last = images(tmp_path / "run")[-1]
    whole = last.read_bytes()
    for missing in (40, 20, 1):
        last.write_bytes(whole[:-missing])
        assert not made.made(4), missing
