"""Previews: what the model makes of the recipe's prompts while it is trained.

`prepare` has encoded the prompts, so that the text encoder stays out of the training; the VAE comes for the
time of a preview. diffusers' pipeline denoises with the model as it is in the engine, at any ZeRO stage,
and the prompts are divided among the processes. Nothing of it reaches the training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageOps

from flux2_ds.engine import Engine
from flux2_ds.errors import UserError
from flux2_ds.model.pipeline import load_image_pipeline
from flux2_ds.prepared import check_prompts
from flux2_ds.processes import Process, barrier
from flux2_ds.recipe import Preview, Recipe
from flux2_ds.rendering import Prompt, grid, open_reference, render
from flux2_ds.spec import Spec

log = logging.getLogger("flux2_ds")

_COLUMNS, _THUMBNAIL = 8, 256

Rendered = list[tuple[str, Path]]
"""Prompts and their pictures."""


def check_previews(recipe: Recipe, directory: Path) -> None:
    """Refuse, before the model is loaded, what no preview can be made of.

    Raises:
        UserError: a prompt that has not been encoded, a reference image, or a model without VAE.
    """
    check_prompts(recipe)
    for path in recipe.preview.references:
        open_reference(path)
    for part in ("vae", "scheduler"):
        if not (directory / part).is_dir():
            raise UserError(
                f"preview.every is set, and model.path {directory} has no {part}. Add it, or remove "
                "preview.every."
            )


class Previews:
    """Renders the prompts every `every` steps into `folder`/step_N, and an overview beside the folder."""

    def __init__(
        self,
        engine: Engine,
        settings: Preview,
        spec: Spec,
        directory: Path,
        folder: Path,
        process: Process,
        prompts: Sequence[Prompt],
        every: int,
    ) -> None:
        self._engine, self._settings, self._spec = engine, settings, spec
        self._directory, self._folder, self._process = directory, folder, process
        self._prompts = prompts
        self._references = [open_reference(path) for path in settings.references]
        self.every = every

    def render(self, step: int, moving: Callable[[], None] = lambda: None) -> Rendered:
        """Render all prompts with the weights after `step`; `moving` is called at each denoising step.
        Collective.

        Raises:
            UserError: before step 1, memory is short or the disk full. Later there is a warning instead.
        """
        target = self._folder / f"step_{step:08d}"
        target.mkdir(parents=True, exist_ok=True)
        moving()
        with self._surviving(step):
            self._render(target, moving)
        barrier()
        if self._process.first:
            with self._surviving(step):
                self._overview(target.name).save(self._folder.with_suffix(".png"))
        paths = [target / f"{number}.png" for number in range(len(self._prompts))]
        made = zip(self._settings.prompts, paths, strict=True)
        return [(prompt, path) for prompt, path in made if path.is_file()]

    @contextmanager
    def _surviving(self, step: int) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, OSError) as error:
            size = f"{self._settings.width}x{self._settings.height}"
            reason = f"previews of {size} cannot be made ({str(error).splitlines()[0]})"
            if step == 0:
                raise UserError(
                    f"{reason}. If memory is short, lower preview.width and preview.height or set cuda_graphs: "
                    "false, transposed_base: false; or remove preview.every."
                ) from error
            log.warning("step %d: %s; training goes on", step, reason)

    @torch.no_grad()
    def _render(self, target: Path, moving: Callable[[], None]) -> None:
        # Compiled blocks would compile once more for these shapes.
        with self._engine.evaluating(), torch.compiler.set_stance("force_eager"):
            pipeline = load_image_pipeline(
                self._directory, self._spec, self._engine.model, self._process.device
            )
            pipeline.set_progress_bar_config(disable=True)
            last = len(self._prompts) - 1
            # As many in every process, because at stage 3 all of them take part in each forward pass.
            for turn in range(math.ceil(len(self._prompts) / self._process.world)):
                number = turn * self._process.world + self._process.rank
                prompt = self._prompts[min(number, last)]
                picture = render(pipeline, self._settings, prompt, self._references, moving)
                if number <= last:
                    picture.save(target / f"{number}.png")

    def _overview(self, newest: str) -> Image.Image:
        """A row a prompt, a column for each of some steps, the first and the `newest` among them."""
        # Later ones are of an earlier start, whose steps after its last checkpoint are done again.
        folders = sorted(path for path in self._folder.glob("step_*") if path.name <= newest)
        count = min(len(folders), _COLUMNS)
        chosen = [folders[round(n * (len(folders) - 1) / max(1, count - 1))] for n in range(count)]
        wide, high = self._settings.width, self._settings.height
        scale = min(1, _THUMBNAIL / max(wide, high))
        size = (round(wide * scale), round(high * scale))
        columns = [
            [_thumbnail(folder / f"{n}.png", size) for n in range(len(self._prompts))]
            for folder in chosen
        ]
        titles = [f"step {int(folder.name.removeprefix('step_'))}" for folder in chosen]
        return grid(self._settings.prompts, titles, columns)


def _thumbnail(path: Path, size: tuple[int, int]) -> Image.Image:
    """White where there is no picture."""
    if not path.is_file():
        return Image.new("RGB", size, "white")
    with Image.open(path) as picture:
        return ImageOps.pad(picture.convert("RGB"), size, color="white")
