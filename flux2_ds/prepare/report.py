"""The end of `prepare`: index.json, and for people report.json, report.txt and contact sheets."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.model_spec import TEXT_TOKENS, Spec
from flux2_ds.config.recipe import Recipe
from flux2_ds.data.contact_sheet import contact_sheet
from flux2_ds.data.dataset import CAPTIONS, build_order, given_captions
from flux2_ds.data.index import CONDITIONING_NAME, Index, write_index
from flux2_ds.data.shards import full_part, tensors_in
from flux2_ds.errors import counted
from flux2_ds.prepare.folder import CONTENTS_NAME
from flux2_ds.prepare.images import decode
from flux2_ds.prepare.manifest import Manifest, indexed_shards
from flux2_ds.prepare.plan import NO_CAPTION, Plan, bucket_lines, nothing_usable
from flux2_ds.prepare.source_images import PlannedImage
from flux2_ds.run.atomic import atomic_write_text

log = logging.getLogger("flux2_ds")

REPORT_NAME, SUMMARY_NAME, SHEETS = "report.json", "report.txt", "contact_sheets"
_SHEET_IMAGES, _SHEET_SIDE = 36, 192
_EXAMPLES = 5


def finish(
    recipe: Recipe,
    spec: Spec,
    plan: Plan,
    written: list[Manifest],
    long_captions: dict[str, int],
    seconds: float,
) -> Index:
    """Write the report and, last, the index."""
    folder = Path(recipe.data.shards)
    for manifest in written:
        for key, (_, reason) in manifest.skipped.items():
            plan.skipped.add(f"{manifest.shard.source}/{key}", reason)
    contents = json.loads((folder / CONTENTS_NAME).read_text())
    given = given_captions(recipe)
    conditioning = (folder / CONDITIONING_NAME).read_bytes()
    index = Index(
        spec.variant,
        spec.text_width,
        contents["model"],
        contents["settings"] | ({CAPTIONS: given} if given else {}),
        indexed_shards([*plan.manifests, *written], plan.comparison.dropped),
        full_part(conditioning),
        str(tensors_in(memoryview(conditioning))["empty_text"].dtype).removeprefix("torch."),
    )
    if not index.samples:
        raise nothing_usable(str(recipe.data.images))
    encoded = sum(len(manifest.rows) for manifest in written)
    images = [*plan.comparison.kept, *plan.images]
    images = [each for each in images if each.image.name not in plan.skipped.reasons]
    images.sort(key=lambda each: each.image.name)
    warnings = build_order(recipe, index.part(held_out=False)).warnings()
    notes = collect_notes([*plan.manifests, *written], plan.comparison.dropped)
    report = Report(index, plan, images, encoded, long_captions, seconds, warnings, notes)
    summary = report.summary()
    values = json.dumps(report.values(), indent=1, ensure_ascii=False)
    atomic_write_text(folder / REPORT_NAME, values + "\n")
    unused = plan.unused.line().strip()  # said at the start
    atomic_write_text(folder / SUMMARY_NAME, summary + f"{unused}\n" * bool(unused))
    write_contact_sheets(folder / SHEETS, images)
    log.info("%s%s", summary, write_index(folder, index))
    return index


@dataclass(frozen=True)
class Report:
    """What became of the images; `images` are those that are in the index."""

    index: Index
    plan: Plan
    images: list[PlannedImage]
    encoded: int
    long_captions: dict[str, int]
    seconds: float
    warnings: list[str]
    notes: dict[str, dict[str, str]]
    """What there is to say of images that are used: details by image, by kind."""

    @property
    def dropped(self) -> int:
        """Samples of earlier starts that are no longer in the index."""
        return sum(map(len, self.plan.comparison.dropped.values()))

    def values(self) -> dict[str, Any]:
        """The report as JSON values."""
        index, images = self.index, self.images
        return {
            "samples": index.samples,
            "kept": len(self.plan.comparison.kept),
            "encoded": self.encoded,
            "dropped": self.dropped,
            "images_per_second": round(self.encoded / self.seconds, 3) if self.encoded else None,
            "bytes_a_sample": round(sum(shard.size for shard in index.shards) / index.samples),
            "held_out": index.part(held_out=True).samples,
            "sources": dict(Counter(each.image.source for each in images)),
            "buckets": {str(bucket): count for bucket, count in index.bucket_counts().items()},
            "with_mask": sum(each.image.mask is not None for each in images),
            "with_references": sum(bool(each.image.references) for each in images),
            "texts": len({text for each in images for text in each.image.captions}),
            "text_bytes": sum(shard.text_bytes for shard in index.shards),
            "notes": self.notes,
            "warnings": self.warnings,
            "captions_cut": self.long_captions,
            "skipped": self.plan.skipped.reasons,
            "unused_files": self.plan.unused.files,
        }

    def summary(self) -> str:
        """The report for people."""
        index, skipped = self.index, self.plan.skipped.reasons
        kept = len(self.plan.comparison.kept)
        lines = [
            f"{counted(index.samples, 'sample')} in {counted(len(index.shards), 'shard')}: {kept} kept from before, "
            f"{self.encoded} encoded, {self.dropped} dropped because their image is gone or changed",
            f"{index.part(held_out=True).samples} of them held out for validation",
            *bucket_lines(s.bucket for s in index.shards for _ in range(s.samples)),
            *index.stored_lines(),
            *self.warnings,
        ]
        lines += [
            f"{counted(len(details), 'image')} with {kind}: "
            + some([name + f" ({detail})" * bool(detail) for name, detail in details.items()])
            for kind, details in self.notes.items()
        ]
        if self.long_captions:
            lines.append(
                f"{counted(len(self.long_captions), 'caption')} longer than {TEXT_TOKENS} tokens with the "
                "template; what is beyond is not seen in training:"
            )
            longest = sorted(self.long_captions.items(), key=lambda item: -item[1])
            lines += [f"  {count:5d} tokens: {text[:70]}…" for text, count in longest[:_EXAMPLES]]
        lines.append(f"{counted(len(skipped), 'image')} skipped")
        kinds: dict[str, list[str]] = {}
        for name, reason in skipped.items():
            kinds.setdefault(_kind(reason), []).append(name)
        for kind, names in sorted(kinds.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(names):5d} {kind}: {some(names)}")
        return "\n".join(lines) + "\n"


def collect_notes(
    manifests: list[Manifest], dropped: dict[str, list[int]]
) -> dict[str, dict[str, str]]:
    """The notes on the images that are in the index: details by image, by kind."""
    kinds: dict[str, dict[str, str]] = {}
    for manifest in manifests:
        gone = set(dropped.get(manifest.shard.name, ()))
        for number, row in enumerate(manifest.rows):
            for note in row.notes if number not in gone else ():
                kind, _, detail = note.partition(": ")
                kinds.setdefault(kind, {})[f"{manifest.shard.source}/{row.key}"] = detail
    return {
        kind: dict(sorted(names.items(), key=lambda item: item[1], reverse=True))
        for kind, names in sorted(kinds.items())
    }


def some(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else ""
    return f"{', '.join(names[:_EXAMPLES])}{more}"


def _kind(reason: str) -> str:
    """The reason without what differs from image to image."""
    if "must be enlarged" in reason:
        return "too small for the smallest bucket (data.max_upscale)"
    if "would cut away" in reason:
        return "too long or too high for their bucket (data.max_crop)"
    if reason.startswith(NO_CAPTION):
        return NO_CAPTION
    return reason.split(": ", 1)[0] if reason.startswith("unreadable") else reason


def write_contact_sheets(folder: Path, images: list[PlannedImage]) -> None:
    """For each bucket some images, evenly chosen, as they are cropped, with their captions."""
    folder.mkdir(exist_ok=True)
    groups: dict[Bucket, list[PlannedImage]] = {}
    for planned in images:
        groups.setdefault(planned.bucket.alone, []).append(planned)
    for bucket, members in groups.items():
        places = np.linspace(0, len(members) - 1, min(len(members), _SHEET_IMAGES))
        shown, captions = [], []
        for place in places.round().astype(int):
            decoded = decode(members[place])
            if decoded.views:
                small = Image.fromarray(decoded.views[0].pixels)
                small.thumbnail((_SHEET_SIDE, _SHEET_SIDE))
                shown.append(np.asarray(small))
                captions.append(members[place].image.captions[0])
        if shown:
            contact_sheet(shown, captions).save(folder / f"{bucket}.jpg", quality=88)
