"""Pictures of prompts by diffusers' pipeline, without a text encoder, and sheets of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image, ImageDraw

from flux2_ds.data.images import UnreadableImageError, load_upright
from flux2_ds.errors import UserError
from flux2_ds.fonts import font_for
from flux2_ds.recipe import Preview
from flux2_ds.spec import Spec

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
    moving: Callable[[], None] = lambda: None,
) -> Image.Image:
    """One picture; the same prompt starts from the same noise every time. `moving` is called at each step."""

    def moved(pipeline: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        moving()
        return kept

    weights = pipeline.vae
    picture: Image.Image = pipeline(
        **{name: text.to(weights.device, weights.dtype) for name, text in prompt.items()},
        image=references or None,
        height=preview.height,
        width=preview.width,
        num_inference_steps=preview.steps,
        guidance_scale=preview.guidance,
        generator=torch.Generator().manual_seed(preview.seed),
        callback_on_step_end=moved,
    ).images[0]
    return picture


def open_reference(path: str) -> Image.Image:
    """A reference image as training reads them: upright, in RGB, on white.

    Raises:
        UserError: it cannot be read, or inference does not take it.
    """
    try:
        upright = load_upright(path)
        Flux2ImageProcessor.check_image_input(upright)
    except (UnreadableImageError, ValueError) as error:
        raise UserError(f"preview.references: {path} cannot be used ({error}).") from error
    return upright


def grid(
    prompts: list[str], titles: Sequence[str], columns: Sequence[list[Image.Image]]
) -> Image.Image:
    """A row a prompt with its text above, a column for each title."""
    width, height = columns[0][0].size
    font = font_for([*prompts, *titles], 14)
    head, gap = 26, 6
    cell = max(width, 200)
    sheet = Image.new(
        "RGB",
        (len(columns) * (cell + gap) + gap, head + len(prompts) * (height + head + gap)),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for column, (title, pictures) in enumerate(zip(titles, columns, strict=True)):
        left = gap + column * (cell + gap)
        draw.text((left, 5), title, fill="black", font=font)
        for row, picture in enumerate(pictures):
            top = head + row * (height + head + gap)
            if column == 0:
                draw.text((left, top + 3), prompts[row], fill="dimgray", font=font)
            sheet.paste(picture, (left, top + head))
    return sheet
