"""Previews: what the model makes of the recipe's prompts while it is trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image, ImageDraw, ImageOps

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.memory import PREVIEW_ADVICE
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Preview
from flux2_ds.data.contact_sheet import caption_font
from flux2_ds.data.images import (
    UnreadableImageError,
    cover,
    is_aligned,
    load_upright,
    reference_bucket,
)
from flux2_ds.distributed import Process, barrier, broadcast_from_rank0
from flux2_ds.engine.engine import Engine
from flux2_ds.errors import UserError
from flux2_ds.model.pipeline import load_image_pipeline
from flux2_ds.run.atomic import atomic_path
from flux2_ds.run.logging import progress_bar
from flux2_ds.run.metrics import Metrics
from flux2_ds.run.report import evenly
from flux2_ds.run.run_dir import step_folders

log = logging.getLogger("flux2_ds")

_COLUMNS, _THUMBNAIL = 8, 256


class Previews:
    """Renders the prompts into `folder`/step_N, and an overview beside the folder.

    `heartbeat` is called with (step, phase) at each denoising step. `metrics` is None in all ranks but 0.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Preview,
        spec: Spec,
        directory: Path,
        folder: Path,
        process: Process,
        prompts: Sequence[Prompt],
        metrics: Metrics | None,
        heartbeat: Callable[[int, str], None],
    ) -> None:
        self._engine, self._settings, self._spec = engine, settings, spec
        self._directory, self._folder, self._process = directory, folder, process
        self._prompts, self._metrics, self._heartbeat = prompts, metrics, heartbeat
        self._references = [open_reference(path, settings) for path in settings.references]

    def _paths(self, step: int) -> list[Path]:
        folder = self._folder / f"step_{step:08d}"
        return [folder / f"{number}.png" for number in range(len(self._prompts))]

    def made(self, step: int) -> bool:
        """Whether rank 0 finds all images of `step`, none of them cut short. Collective."""
        found = all(map(_is_readable, self._paths(step)))
        return bool(broadcast_from_rank0(int(found), self._process.device))

    def render(self, step: int) -> None:
        """Render all prompts with the weights after `step`. Collective.
        Memory or a disk that is full is refused before step 1; later it is a warning.
        """
        paths = self._paths(step)
        self._heartbeat(step, "rendering")
        with self._surviving(step):
            self._render(step, paths)
        barrier()
        prompts = zip(self._settings.prompts, paths, strict=True)
        made = [(prompt, path) for prompt, path in prompts if path.is_file()]
        if made and self._process.is_rank0:
            with self._surviving(step), atomic_path(self._folder.with_suffix(".png")) as partial:
                self._overview(step).save(partial, "PNG")
            if self._metrics is not None:
                self._metrics.show(step, made)
            log.info("step %d: previews in %s", step, paths[0].parent)

    @contextmanager
    def _surviving(self, step: int) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, OSError) as error:
            size = f"{self._settings.width}x{self._settings.height}"
            reason = f"previews of {size} cannot be made ({str(error).splitlines()[0]})"
            if step == 0:
                full = isinstance(error, torch.OutOfMemoryError)
                remedy = PREVIEW_ADVICE if full else "Free some space, or remove preview.every."
                raise UserError(f"{reason}. {remedy}") from error
            log.warning("step %d: %s; training goes on", step, reason)

    @torch.no_grad()
    def _render(self, step: int, paths: list[Path]) -> None:
        # Compiled blocks would compile once more for these shapes.
        with self._engine.evaluating(), torch.compiler.set_stance("force_eager"):
            pipeline = load_image_pipeline(
                self._directory, self._spec, self._engine.model, self._process.device
            )
            last, images = len(self._prompts) - 1, dict[Path, Image.Image]()
            world_size = self._process.world_size
            # As many in every rank, because at stage 3 all of them take part in each forward pass.
            turns = math.ceil(len(self._prompts) / world_size)
            with progress_bar("previews", turns * self._settings.steps, "pass") as bar:

                def moved() -> None:
                    self._heartbeat(step, "rendering")
                    bar.update()

                for turn in range(turns):
                    number = turn * world_size + self._process.rank
                    prompt = self._prompts[min(number, last)]
                    image = render(pipeline, self._settings, prompt, self._references, moved)
                    if number <= last:
                        images[paths[number]] = image
        # Only now: a rank whose disk is full must not miss in passes that others make with it.
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for path, image in images.items():
            with atomic_path(path) as partial:
                image.save(partial, "PNG")

    def _overview(self, step: int) -> Image.Image:
        """A row a prompt, a column for each of some steps, the first and `step` among them."""
        # Later ones are of an earlier start, whose steps after its last checkpoint are done again.
        folders = [each for each in step_folders(self._folder).items() if each[0] <= step]
        chosen = evenly(folders, _COLUMNS)
        wide, high = self._settings.width, self._settings.height
        scale = min(1, _THUMBNAIL / max(wide, high))
        size = (round(wide * scale), round(high * scale))
        columns = [
            [_thumbnail(folder / f"{n}.png", size) for n in range(len(self._prompts))]
            for _, folder in chosen
        ]
        titles = [f"step {number}" for number, _ in chosen]
        return grid(self._settings.prompts, titles, columns)


def _is_readable(path: Path) -> bool:
    """Whether there is an image, and all of it."""
    try:
        with Image.open(path) as image:
            image.load()  # which needs the pixels alone
        return path.read_bytes()[-8:-4] == b"IEND"
    except (OSError, SyntaxError):  # Pillow's word for a broken PNG chunk
        return False


def _thumbnail(path: Path, size: tuple[int, int]) -> Image.Image:
    """White where there is no image."""
    if not _is_readable(path):
        return Image.new("RGB", size, "white")
    with Image.open(path) as image:
        return ImageOps.pad(image.convert("RGB"), size, color="white")


Prompt = dict[str, torch.Tensor]
"""What the pipeline takes in place of a prompt."""


def as_prompt(spec: Spec, text: torch.Tensor, empty: torch.Tensor) -> Prompt:
    """An encoded prompt and, beside it, an encoded empty one for classifier-free guidance; each
    [1, 512, text width]."""
    prompt = {"prompt_embeds": text}
    if spec.variant == "klein":  # dev has a guidance input in its place
        prompt["negative_prompt_embeds"] = empty
    return prompt


def render(
    pipeline: Any,
    preview: Preview,
    prompt: Prompt,
    references: list[Image.Image],
    heartbeat: Callable[[], object] = lambda: None,
) -> Image.Image:
    """One image; the same prompt starts from the same noise every time. `heartbeat` is called at each step."""

    def moved(pipeline: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        heartbeat()
        return kept

    weights = pipeline.vae
    image: Image.Image = pipeline(
        **{name: text.to(weights.device, weights.dtype) for name, text in prompt.items()},
        image=references or None,
        height=preview.height,
        width=preview.width,
        num_inference_steps=preview.steps,
        guidance_scale=preview.guidance,
        generator=torch.Generator().manual_seed(preview.seed),
        callback_on_step_end=moved,
    ).images[0]
    return image


def open_reference(path: str, preview: Preview) -> Image.Image:
    """A reference image as training reads them: upright, in RGB, on white; one of the preview's proportions
    has the preview's size. Refuses what inference does not take.
    """
    try:
        upright = load_upright(path)
        size = (preview.width, preview.height)
        if is_aligned(upright.size, size):
            bucket = Bucket(preview.height, preview.width)
            upright = cover(upright, reference_bucket(upright.size, size, bucket))
        Flux2ImageProcessor.check_image_input(upright)
    except (UnreadableImageError, ValueError) as error:
        raise UserError(f"preview.references: {path} cannot be used ({error}).") from error
    return upright


def grid(
    prompts: list[str], titles: Sequence[str], columns: Sequence[list[Image.Image]]
) -> Image.Image:
    """A row a prompt with its text above, a column for each title."""
    width, height = columns[0][0].size
    font = caption_font(14)
    head, gap = 26, 6
    cell = max(width, 200)
    sheet = Image.new(
        "RGB",
        (len(columns) * (cell + gap) + gap, head + len(prompts) * (height + head + gap)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, (title, images) in enumerate(zip(titles, columns, strict=True)):
        left = gap + column * (cell + gap)
        draw.text((left, 5), title, fill="black", font=font)
        for row, image in enumerate(images):
            top = head + row * (height + head + gap)
            if column == 0:
                draw.text((left, top + 3), prompts[row], fill="dimgray", font=font)
            sheet.paste(image, (left, top + head))
    return sheet
