"""What a person wants to see afterwards: report.json, report.txt and contact sheets."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.model_spec import TEXT_TOKENS
from flux2_ds.data.images import contact_sheet
from flux2_ds.data.index import Index
from flux2_ds.prepare.choose import bucket_lines
from flux2_ds.prepare.pictures import decode
from flux2_ds.prepare.source_images import Picture, Skipped
from flux2_ds.run.atomic import atomic_write_text

REPORT_NAME, SUMMARY_NAME, SHEETS = "report.json", "report.txt", "contact_sheets"
_SHEET_PICTURES, _SHEET_SIDE = 36, 192
_EXAMPLES = 5
_MUCH = 0.3
"""Pictures that lose so much to the crop are named: their captions may tell of what is cut away."""


@dataclass
class Report:
    """What happened; filled in as it happens."""

    skipped: Skipped = field(default_factory=Skipped)
    long_captions: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    dropped: int = 0
    encoded: int = 0
    seconds: float = 0.0

    def values(self, index: Index, pictures: list[Picture]) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "samples": index.samples,
            "kept": self.kept,
            "encoded": self.encoded,
            "dropped": self.dropped,
            "images_per_second": round(self.encoded / self.seconds, 3) if self.seconds else None,
            "held_out": index.part(held_out=True).samples,
            "sources": dict(Counter(picture.entry.source for picture in pictures)),
            "buckets": {str(bucket): count for bucket, count in index.bucket_counts().items()},
            "with_mask": sum(picture.entry.mask is not None for picture in pictures),
            "with_references": sum(bool(picture.entry.references) for picture in pictures),
            "captions": len({picture.caption for picture in pictures}),
            "captions_cut": self.long_captions,
            "cropped_much": cropped_much(pictures),
            "skipped": self.skipped.reasons,
        }

    def summary(self, index: Index, pictures: list[Picture]) -> str:
        """The report for people."""
        lines = [
            f"{index.samples} samples in {len(index.shards)} shards: {self.kept} kept from before, "
            f"{self.encoded} encoded, {self.dropped} dropped because their picture is gone or changed",
            f"{index.part(held_out=True).samples} of them held out for evaluation",
            *bucket_lines(s.bucket for s in index.shards for _ in range(s.samples)),
        ]
        if cropped := cropped_much(pictures):
            some = ", ".join(
                f"{name} ({lost:.0%})" for name, lost in list(cropped.items())[:_EXAMPLES]
            )
            lines.append(
                f"{len(cropped)} pictures lose more than {_MUCH:.0%} to the crop; crop them yourself or "
                f"raise data.max_aspect: {some}"
            )
        if self.long_captions:
            lines.append(
                f"{len(self.long_captions)} captions are longer than {TEXT_TOKENS} tokens with the "
                "template; what is beyond is not seen in training:"
            )
            longest = sorted(self.long_captions.items(), key=lambda item: -item[1])
            lines += [f"  {count:5d} tokens: {text[:70]}…" for text, count in longest[:_EXAMPLES]]
        lines.append(f"{len(self.skipped.reasons)} pictures skipped")
        kinds: dict[str, list[str]] = {}
        for name, reason in self.skipped.reasons.items():
            kinds.setdefault(_kind(reason), []).append(name)
        for kind, names in sorted(kinds.items(), key=lambda item: -len(item[1])):
            more = f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else ""
            lines.append(f"  {len(names):5d} {kind}: {', '.join(names[:_EXAMPLES])}{more}")
        return "\n".join(lines) + "\n"


def cropped_much(pictures: list[Picture]) -> dict[str, float]:
    """The share that the crop cuts away, by name, most first."""
    much = [picture for picture in pictures if picture.lost > _MUCH]
    much.sort(key=lambda picture: -picture.lost)
    return {picture.entry.name: picture.lost for picture in much}


def _kind(reason: str) -> str:
    """The reason without what differs from picture to picture."""
    if "must be enlarged" in reason:
        return "too small for the smallest bucket (data.max_upscale)"
    return reason.split(": ", 1)[0] if reason.startswith("unreadable") else reason


def write_report(folder: Path, report: Report, index: Index, pictures: list[Picture]) -> str:
    """Write report.json, report.txt and the contact sheets; returns the summary."""
    values = json.dumps(report.values(index, pictures), indent=1, ensure_ascii=False)
    summary = report.summary(index, pictures)
    atomic_write_text(folder / REPORT_NAME, values + "\n")
    atomic_write_text(folder / SUMMARY_NAME, summary)
    write_contact_sheets(folder / SHEETS, pictures)
    return summary


def write_contact_sheets(folder: Path, pictures: list[Picture]) -> None:
    """For each bucket some pictures, evenly chosen, as they are cropped, with their captions."""
    folder.mkdir(exist_ok=True)
    groups: dict[Bucket, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.bucket, []).append(picture)
    for bucket, members in groups.items():
        places = np.linspace(0, len(members) - 1, min(len(members), _SHEET_PICTURES))
        groups[bucket] = [members[place] for place in places.round().astype(int)]
    for bucket, members in groups.items():
        shown, captions = [], []
        for picture in members:
            decoded = decode(picture)
            if decoded.pixels is not None:
                small = Image.fromarray(decoded.pixels)
                small.thumbnail((_SHEET_SIDE, _SHEET_SIDE))
                shown.append(np.asarray(small))
                captions.append(picture.caption)
        if shown:
            contact_sheet(shown, captions).save(folder / f"{bucket}.jpg", quality=88)
