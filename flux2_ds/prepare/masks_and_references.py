"""The mask and the reference images that belong to an image.

boat.png            the image
boat.mask.png       white where it is trained on, black where not; also boat-masklabel.png
boat.reference.png  what it was made from; boat.reference1.png, boat.reference2.png, ... for several

These are the default suffixes. Capitals and small letters are the same in them.
"""

from __future__ import annotations

import re
from dataclasses import replace

from flux2_ds.prepare.source_images import SourceImage, stem


def attach(
    found: list[SourceImage], mask_suffixes: list[str], reference_suffixes: list[str]
) -> list[SourceImage]:
    """Join masks and references to their images. What looks like one but has no image is an image."""
    masks, references = (
        "|".join(map(re.escape, suffixes)) or "(?!)"  # which nothing matches
        for suffixes in (mask_suffixes, reference_suffixes)
    )
    pattern = re.compile(
        rf"(?P<image>.+)(?P<mask>{masks})|(?P<edited>.+)(?:{references})(?P<number>\d*)",
        re.IGNORECASE,
    )
    stems = {stem(image.key) for image in found}
    belonging: dict[str, list[tuple[bool, int, SourceImage]]] = {}
    images = []
    for image in found:
        name = pattern.fullmatch(stem(image.key))
        owner = name and (name["image"] or name["edited"])
        if name is None or owner not in stems:
            images.append(image)
            continue
        role = (name["mask"] is None, int(name["number"] or 0), image)
        belonging.setdefault(owner, []).append(role)
    return [_joined(image, belonging.get(stem(image.key), [])) for image in images]


def _joined(image: SourceImage, belonging: list[tuple[bool, int, SourceImage]]) -> SourceImage:
    """`image` with its mask and references, whose stamps become part of its own."""
    if not belonging:
        return image
    ordered = sorted(belonging, key=lambda each: each[:2])
    masks = [each.blob for is_reference, _, each in ordered if not is_reference]
    problem = image.problem or next((each.problem for _, _, each in ordered if each.problem), None)
    if len({each[:2] for each in ordered}) < len(ordered):
        names = ", ".join(sorted(each.key for _, _, each in ordered))
        problem = problem or f"two masks or references of one name: {names}"
    return replace(
        image,
        stamp="|".join([image.stamp, *(f"{each.key}={each.stamp}" for _, _, each in ordered)]),
        problem=problem,
        mask=masks[0] if masks else None,
        references=tuple(each for is_reference, _, each in ordered if is_reference),
    )
