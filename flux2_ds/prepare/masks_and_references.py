"""Pictures that belong to another picture: its mask and its reference images.

boat.png            the picture
boat.mask.png       white where it is trained on, black where not
boat.reference.png  what it was made from; boat.reference1.png, boat.reference2.png, ... for several
"""

from __future__ import annotations

import re
from dataclasses import replace

from flux2_ds.prepare.source_images import SourceImage, stem

_COMPANION = re.compile(r"(?P<picture>.+)\.(?P<role>mask|reference(?P<number>\d*))")


def attach(source_images: list[SourceImage]) -> list[SourceImage]:
    """Join companions to their pictures. What looks like one but has no picture is a picture."""
    stems = {stem(entry.key) for entry in source_images}
    masks_and_references: dict[str, list[tuple[str, int, SourceImage]]] = {}
    pictures = []
    for entry in source_images:
        found = _COMPANION.fullmatch(stem(entry.key))
        if found is None or found["picture"] not in stems:
            pictures.append(entry)
            continue
        role = found["role"] if found["role"] == "mask" else "reference"
        own = masks_and_references.setdefault(found["picture"], [])
        own.append((role, int(found["number"] or 0), entry))
    return [_joined(entry, masks_and_references.get(stem(entry.key), [])) for entry in pictures]


def _joined(
    entry: SourceImage, masks_and_references: list[tuple[str, int, SourceImage]]
) -> SourceImage:
    """`entry` with its companions, whose stamps become part of its own."""
    if not masks_and_references:
        return entry
    ordered = sorted(masks_and_references, key=lambda each: each[:2])
    masks = [each.blob for role, _, each in ordered if role == "mask"]
    problem = entry.problem or next((each.problem for _, _, each in ordered if each.problem), None)
    if len({each[:2] for each in ordered}) < len(ordered):
        names = ", ".join(sorted(each.key for _, _, each in ordered))
        problem = problem or f"two masks or references of one name: {names}"
    return replace(
        entry,
        stamp="|".join([entry.stamp, *(f"{each.key}={each.stamp}" for _, _, each in ordered)]),
        problem=problem,
        mask=masks[0] if masks else None,
        references=tuple(each.blob for role, _, each in ordered if role == "reference"),
    )
