"""The texts that an image is trained with: lines, tags, prefix and trigger word."""

from collections import Counter

import pytest

from flux2_ds.config.recipe import Captions
from flux2_ds.data.storage import Blob
from flux2_ds.errors import UserError
from flux2_ds.prepare.source_images import SourceImage
from flux2_ds.prepare.texts import check_trigger_words, texts_of


def image_of(*captions: str, name: str = "a.png", source: str = "me") -> SourceImage:
    return SourceImage(source, name, "", captions, Blob(""))


@pytest.mark.parametrize(
    ("captions", "settings", "texts"),
    [
        (["a cat"], {}, ["a cat"]),
        (["a cat\non a mat"], {}, ["a cat\non a mat"]),
        (["a cat\n\n  two \n"], {"one_per_line": True}, ["a cat", "two"]),
        (["one\ntwo", "one"], {"one_per_line": True}, ["one", "two", "one"]),
        (["b, a"], {"prefix": "photo of ", "suffix": ", 4k "}, ["photo of b, a, 4k"]),
        (["x"], {"prefix": {"me": "my "}, "suffix": {"web": "!"}}, ["my x"]),
        (["a [trigger] here"], {"trigger_word": "ohwx"}, ["a ohwx here"]),
        (["a [trigger] here"], {}, ["a [trigger] here"]),
        (["a cat"], {"trigger_word": "ohwx", "add_trigger_word": True}, ["ohwx, a cat"]),
        (["an ohwx cat"], {"trigger_word": "ohwx", "add_trigger_word": True}, ["an ohwx cat"]),
        (["cat"], {"trigger_word": {"web": "w"}, "add_trigger_word": True}, ["cat"]),
        (
            ["cat"],
            {"trigger_word": "ohwx", "add_trigger_word": True, "prefix": "of ohwx: "},
            ["of ohwx: cat"],
        ),
    ],
)
def test_texts(captions, settings, texts):
    assert texts_of(image_of(*captions), Captions(**settings), held_out=False) == tuple(texts)


TAGS = "1girl,  b,c, d ,, e"


def test_tags_are_shuffled_behind_the_first_ones():
    settings = Captions(shuffle_tags=True, keep_tags=2, variants=300)
    found = Counter(texts_of(image_of(TAGS), settings, held_out=False))
    assert all(text.startswith("1girl, b, ") for text in found)
    assert {tuple(sorted(text.split(", "))) for text in found} == {("1girl", "b", "c", "d", "e")}
    assert len(found) == 6 and min(found.values()) > 25  # of 50 expected


def test_tags_are_dropped_in_order_but_for_the_first_and_the_trigger_word():
    settings = Captions(tag_dropout=0.3, keep_tags=1, variants=1000, trigger_word="d")
    texts = texts_of(image_of(TAGS), settings, held_out=False)
    left = Counter(tag for text in texts for tag in text.split(", "))
    assert left["1girl"] == left["d"] == 1000
    assert all(640 < left[tag] < 760 for tag in "bce")  # 700 expected, 4 standard deviations
    assert all(sorted(text.split(", ")) == text.split(", ") for text in texts)


def test_texts_depend_on_name_caption_and_variant_alone():
    """Golden: another draw would have `prepare` encode every text again."""
    four = Captions(shuffle_tags=True, variants=4)
    texts = texts_of(image_of(TAGS), four, held_out=False)
    assert texts == (
        "1girl, d, b, c, e", "1girl, e, b, d, c", "1girl, e, c, b, d", "1girl, e, c, d, b",
    )  # fmt: skip
    two = Captions(shuffle_tags=True, variants=2)
    assert texts_of(image_of(TAGS), two, held_out=False) == texts[:2]
    assert texts_of(image_of(TAGS, name="b.png"), four, held_out=False) != texts
    assert len(texts_of(image_of(TAGS, "x, y"), four, held_out=False)) == 8


def test_other_separators_and_what_is_held_out():
    settings = Captions(tag_separator=" | ", shuffle_tags=True, variants=9, keep_tags=0)
    assert set(texts_of(image_of("a|b | c, d"), settings, held_out=False)) == {"a|b | c, d", "c, d | a|b"}  # fmt: skip
    assert texts_of(image_of("a | b", "c"), settings, held_out=True) == ("a | b",)


def test_a_trigger_word_must_be_in_captions_of_its_source(caplog):
    images = [image_of("an ohwx cat"), image_of("a cat", name="b.png"), image_of("x", source="web")]
    check_trigger_words(images, Captions(trigger_word={"me": "ohwx"}))
    assert "'ohwx' is not in all captions of 1 of 2 images of me: me/b.png" in caplog.text
    with pytest.raises(
        UserError, match=r"trigger_word is 'ohwx', .* no caption of data\.images web"
    ):
        check_trigger_words(images, Captions(trigger_word="ohwx"))
