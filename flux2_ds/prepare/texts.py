"""The texts that an image is trained with, made of its captions by `captions` in the recipe. No torch."""

from __future__ import annotations

import hashlib
import logging

import numpy as np

from flux2_ds.config.recipe import Captions
from flux2_ds.errors import UserError
from flux2_ds.prepare.source_images import SourceImage

log = logging.getLogger("flux2_ds")

TRIGGER = "[trigger]"
"""Stands in captions for the trigger word."""
_NAMED = 5


def texts_of(image: SourceImage, settings: Captions, *, held_out: bool) -> tuple[str, ...]:
    """`variants` texts of each caption; one that recurs is drawn as much more often.

    A function of the image's name, its captions and the settings alone. What is held out has one text: its first
    caption, tags as they are.
    """
    captions: tuple[str, ...] = image.captions
    if settings.one_per_line:
        lines = (line.strip() for caption in captions for line in caption.split("\n"))
        captions = tuple(filter(None, lines))
    word = of_source(settings.trigger_word, image.source)
    if held_out:
        drawn = list(captions[:1])
    elif settings.shuffle_tags or settings.tag_dropout:
        drawn = [
            _draw_tags(caption, settings, word, f"{image.name}|{number}|{variant}")
            for number, caption in enumerate(captions)
            for variant in range(settings.variants)
        ]
    else:
        drawn = list(captions)
    return tuple(_complete(text, settings, image.source, word) for text in drawn)


def of_source(setting: str | dict[str, str], source: str) -> str:
    """The value of a setting that may be given for each source."""
    return setting if isinstance(setting, str) else setting.get(source, "")


def _draw_tags(caption: str, settings: Captions, word: str, key: str) -> str:
    """The first tags, and of the others those that are kept, in random order; `key` decides both."""
    separator = settings.tag_separator
    tags = [tag for tag in map(str.strip, caption.split(separator)) if tag]
    rest = tags[settings.keep_tags :]
    seed = int.from_bytes(hashlib.sha256(f"tags|{key}".encode()).digest())
    words = np.random.Philox(np.random.SeedSequence(seed)).random_raw(2 * len(rest)).tolist()
    least = settings.tag_dropout * 2**64
    kept = [n for n, tag in enumerate(rest) if words[n] >= least or _has_trigger(tag, word)]
    if settings.shuffle_tags:
        kept.sort(key=lambda n: words[len(rest) + n])
    return f"{separator.rstrip()} ".join([*tags[: settings.keep_tags], *(rest[n] for n in kept)])


def _has_trigger(text: str, word: str) -> bool:
    return bool(word) and (word in text or TRIGGER in text)


def _complete(text: str, settings: Captions, source: str, word: str) -> str:
    if word:
        text = text.replace(TRIGGER, word)
    text = of_source(settings.prefix, source) + text + of_source(settings.suffix, source)
    if settings.add_trigger_word and word not in text:
        text = f"{word}, {text}"
    return text.strip()


def check_trigger_words(images: list[SourceImage], settings: Captions) -> None:
    """Refuse a trigger word that no text of its source has; warn of one that some lack."""
    sources: dict[str, list[SourceImage]] = {}
    for image in images:
        sources.setdefault(image.source, []).append(image)
    for source, members in sources.items():
        word = of_source(settings.trigger_word, source)
        if not any(word in text for image in members for text in image.captions):
            raise UserError(
                f"captions.trigger_word is {word!r}, which is in no caption of data.images {source}. Write it, "
                f"or {TRIGGER}, into the captions, or set captions.add_trigger_word: true."
            )
        lacking = [i.name for i in members if any(word not in text for text in i.captions)]
        if lacking:
            log.warning(
                "the trigger word %r is not in all captions of %d of %d images of %s: %s%s", word, len(lacking),
                len(members), source, ", ".join(lacking[:_NAMED]), ", ..." * (len(lacking) > _NAMED),
            )  # fmt: skip
