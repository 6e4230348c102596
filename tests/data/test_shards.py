"""Shards and their index: written, read back, and refused when damaged."""

import dataclasses
import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import webdataset
from safetensors.torch import load

from flux2_ds.config.buckets import Bucket
from flux2_ds.data.index import (
    CONDITIONING_NAME,
    INDEX_NAME,
    Index,
    Shard,
    read_index,
    write_index,
)
from flux2_ds.data.shards import Record, ShardReader, View, pack_text, write_shard
from flux2_ds.errors import UserError

BUCKET = Bucket(height=32, width=48)
CAPTIONS = ["a cat", "été, 猫", "a cat", ""]


def text_of(caption: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(caption))
    return torch.randn(512, 8, generator=generator).bfloat16()


def make_records() -> list[Record]:
    generator = torch.Generator().manual_seed(1)
    return [
        Record(f"photo {n}.jpg", (caption,), (View(torch.randn(32, 4, 6, generator=generator)),))
        for n, caption in enumerate(CAPTIONS)
    ]


@pytest.fixture
def written(tmp_path: Path) -> Shard:
    return write_shard(tmp_path / "48x32-00000.tar", BUCKET, make_records(), text_of)


@pytest.fixture
def shard(written: Shard, tmp_path: Path) -> Path:
    return tmp_path / written.name


def read_everything(path: Path, facts: Shard) -> list[tuple[torch.Tensor, torch.Tensor]]:
    reader = ShardReader(path, facts)
    return [(reader.latent(row), reader.text(row)) for row in range(len(CAPTIONS))]


def test_what_is_written_is_read_back_bit_for_bit(shard, written):
    reader = ShardReader(shard, written)
    # In another order than on disk: access is random.
    for row, record in reversed(list(enumerate(make_records()))):
        latent, text = reader.latent(row), reader.text(row)
        for one, both in zip((latent, text), reader.sample(row), strict=True):
            assert torch.equal(one, both)
        assert (latent.dtype, text.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(latent, record.views[0].latent)
        assert torch.equal(text, text_of(record.texts[0]))
        first = CAPTIONS.index(record.texts[0])  # a caption that recurs is stored once
        assert reader.meta(row) == {
            **{"caption": record.texts[0], "source": record.source, "height": 32, "width": 48},
            "text_key": f"{first:08d}",
        }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("left", "right", "kept"),
    [(0, 0, 512), (400, 0, 112), (0, 30, 482), (100, 100, 312), (511, 0, 1)],
)
def test_rows_that_repeat_at_the_ends_of_a_text_are_stored_once(tmp_path, dtype, left, right, kept):
    text = text_of("a").to(dtype)
    text[:left], text[512 - right :] = text[left], text[511 - right]
    text[left, 0] = float("nan")  # bits count, not values
    text[:left, 0] = float("nan")
    facts = write_shard(tmp_path / "x.tar", BUCKET, make_records()[:1], lambda _: text)
    reader = ShardReader(tmp_path / "x.tar", facts)
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    for found in (reader.text(0), reader.sample(0)[1]):
        assert torch.equal(found.view(bits), text.view(bits)) and found.dtype == dtype
    with tarfile.open(tmp_path / "x.tar") as tar:
        member = tar.extractfile("00000000.text.safetensors")
        assert member is not None
        stored = load(member.read())
    assert stored["text"].shape == (kept, 8) and ("padding" in stored) == (kept < 512)
    zeros = torch.tensor([[0.0], [-0.0]]).expand(2, 8)  # equal, but not to the last bit
    assert pack_text(zeros.to(dtype))["text"].shape == (2, 8)


def test_several_texts_of_a_sample_are_read_back_and_stored_once(tmp_path):
    several = [("a cat", "x"), ("x", "été, 猫", "x"), ("x",)]
    records = [
        dataclasses.replace(r, texts=t) for r, t in zip(make_records(), several, strict=False)
    ]
    facts = write_shard(tmp_path / "x.tar", BUCKET, records, text_of)
    reader = ShardReader(tmp_path / "x.tar", facts)
    for row, texts in enumerate(several):
        assert reader.texts(row) == len(texts)
        for number, text in enumerate(texts):
            assert torch.equal(reader.text(row, number), text_of(text))
    assert reader.text_digest(1, 0) == reader.text_digest(1, 2) == reader.text_digest(0, 1)
    assert reader.meta(1)["captions"] == [*several[1]]
    assert reader.meta(1)["text_keys"] == ["00000000.text1", "00000001.text1", "00000000.text1"]
    assert "captions" not in reader.meta(2)
    with tarfile.open(tmp_path / "x.tar") as tar:
        stored = {member.name: member.size for member in tar if ".text" in member.name}
    assert [*stored] == [f"0000000{key}.safetensors" for key in ("0.text", "0.text1", "1.text1")]
    assert (facts.texts, facts.text_bytes) == (3, sum(stored.values()))


def test_several_views_of_an_image_are_read_back_with_their_companions(tmp_path):
    generator = torch.Generator().manual_seed(2)
    views = tuple(
        View(torch.randn(32, 4, 6, generator=generator), torch.rand(2, 3, generator=generator),
             [torch.randn(32, 4, 4, generator=generator)])
        for _ in range(3)
    )  # fmt: skip
    records = [dataclasses.replace(make_records()[0], views=views), make_records()[1]]
    facts = write_shard(tmp_path / "x.tar", BUCKET, records, text_of)
    reader = ShardReader(tmp_path / "x.tar", facts)
    assert (reader.views(0), reader.views(1), facts.latents, facts.masks) == (3, 1, 4, 1)
    for number, view in enumerate(views):
        found = (reader.latent(0, number), reader.mask(0, number), *reader.references(0, number))
        for one, other in zip(found, (view.latent, view.mask, *view.references), strict=True):
            assert torch.equal(one, other)
    assert reader.mask(1) is None and reader.references(1) == []


def test_facts_of_a_shard_are_those_of_its_file(tmp_path):
    path = tmp_path / "x.tar"
    facts = write_shard(path, BUCKET, make_records(), text_of)
    assert (facts.name, facts.bucket, facts.samples) == ("x.tar", BUCKET, len(CAPTIONS))
    assert facts.size == path.stat().st_size
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert facts.sha256 == digest
    assert [file.name for file in tmp_path.iterdir()] == ["x.tar"]


def test_same_input_makes_the_same_file(tmp_path):
    for name in ("first.tar", "second.tar"):
        write_shard(tmp_path / name, BUCKET, make_records(), text_of)
    assert (tmp_path / "first.tar").read_bytes() == (tmp_path / "second.tar").read_bytes()
    with tarfile.open(tmp_path / "first.tar") as tar:
        assert {member.mtime for member in tar} == {0}


def test_recurring_caption_is_encoded_once(tmp_path):
    encoded = []

    def counted(caption: str) -> torch.Tensor:
        encoded.append(caption)
        return text_of(caption)

    write_shard(tmp_path / "x.tar", BUCKET, make_records(), counted)
    assert encoded == ["a cat", "été, 猫", ""]


def test_failure_while_writing_leaves_no_shard(tmp_path):
    def fail(caption: str) -> torch.Tensor:
        raise RuntimeError("encoder gone")

    with pytest.raises(RuntimeError, match="encoder gone"):
        write_shard(tmp_path / "x.tar", BUCKET, make_records(), fail)
    assert not (tmp_path / "x.tar").exists()


def test_plain_webdataset_reads_it(shard):
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert len(samples) == len(CAPTIONS)
    for sample, record in zip(samples, make_records(), strict=True):
        assert json.loads(sample["json"])["caption"] == record.texts[0]
        assert torch.equal(load(sample["latent.safetensors"])["latent"], record.views[0].latent)
    assert ["text.safetensors" in sample for sample in samples] == [True, True, False, True]


def test_a_sample_is_one_read(shard, written):
    reads = []

    def fetch(blob, check):
        reads.append(blob.size)
        return blob.view(check)

    reader = ShardReader(shard, written, fetch)
    assert len(reads) == 1  # the table of contents
    for row, own in enumerate([True, True, False, True]):
        reads.clear()
        reader.sample(row)
        assert len(reads) == (1 if own else 2)
        assert reader.own_text(row) == own
        assert sum(reads) < 512 * 8 * 2 + 32 * 4 * 6 * 4 + 4096


def test_dropped_rows_are_not_counted(shard, written):
    facts = dataclasses.replace(written, dropped=[0, 2], samples=2)
    reader = ShardReader(shard, facts)
    assert [reader.meta(row)["source"] for row in range(2)] == ["photo 1.jpg", "photo 3.jpg"]
    with pytest.raises(UserError, match=r"has 3 samples, index\.json counts 4"):
        ShardReader(shard, dataclasses.replace(written, dropped=[0]))


def share(part: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * part)]


@pytest.mark.parametrize(
    "damage",
    [
        *(share(part) for part in (0.0, 0.05, 0.3, 0.6, 0.9)),
        lambda content: b"this is no tar" * 100,
        lambda content: bytes(len(content)),
        *(
            lambda content, at=at: content[:at] + b"?" + content[at + 1 :]
            for at in (700, 2000, 9000)
        ),
    ],
)
def test_damaged_shard_is_refused(shard, written, damage):
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(UserError, match=r"48x32-00000\.tar is incomplete or damaged"):
        read_everything(shard, written)


def test_shard_cut_while_it_is_read_is_refused(shard, written):
    reader = ShardReader(shard, written)
    with shard.open("r+b") as stream:
        stream.truncate(5000)
    with pytest.raises(UserError, match=r"damaged \(0 instead of \d+ bytes at \d+\)"):
        reader.text(3)


def test_missing_shard_is_refused(tmp_path, written):
    with pytest.raises(UserError, match=r"gone\.tar cannot be read: No such file"):
        ShardReader(tmp_path / "gone.tar", written)


@pytest.fixture
def index(shard: Path, written: Shard) -> Index:
    """The index of one shard, written beside it."""
    facts = dataclasses.replace(written, source="photos", dropped=[3], samples=len(CAPTIONS) - 1)
    prints = {"pipeline": "Flux2KleinPipeline", "vae": "ab12"}
    index = Index("klein", 8, prints, {"resolution": 64, "max_aspect": 1.5}, [facts])
    write_index(shard.parent, index)
    (shard.parent / CONDITIONING_NAME).touch()
    return index


def test_index_round_trip(shard, index):
    assert read_index(shard.parent) == index
    other = Bucket(16, 16)
    more = [Shard("a", other, 7, 1, ""), *index.shards, Shard("b", BUCKET, 2, 1, "")]
    counted = Index("klein", 8, {}, {}, more)
    assert list(counted.bucket_counts().items()) == [(other, 7), (BUCKET, len(CAPTIONS) + 1)]
    assert counted.samples == len(CAPTIONS) + 8


def test_digest_names_content_and_order_of_the_shards(shard, index):
    (one,) = index.shards
    other = dataclasses.replace(one, sha256="1" * 64)
    fewer = dataclasses.replace(one, dropped=[], samples=len(CAPTIONS))
    listings = [[one], [other], [fewer], [one, other], [other, one]]
    digests = [dataclasses.replace(index, shards=listing).digest for listing in listings]
    assert len(set(digests)) == len(listings)
    assert digests[0] == read_index(shard.parent).digest
    assert dataclasses.replace(index, fingerprint={}, settings={}).digest == digests[0]


def test_folder_without_conditioning_is_refused(shard, index):
    (shard.parent / CONDITIONING_NAME).unlink()
    with pytest.raises(UserError, match=f"{CONDITIONING_NAME} is missing"):
        read_index(shard.parent)


def test_folder_without_index_says_to_prepare(tmp_path):
    with pytest.raises(UserError, match="flux2-ds prepare"):
        read_index(tmp_path)


@pytest.mark.parametrize("size", [None, 512])
def test_shard_that_is_missing_or_of_another_size(shard, index, size):
    shard.unlink()
    if size is not None:
        shard.write_bytes(bytes(size))
    found = "is missing" if size is None else f"has {size} bytes"
    with pytest.raises(UserError, match=f"{shard.name} {found}"):
        read_index(shard.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "has format 3, this version of flux2-ds reads 4"),
        ({"shards": []}, "does not have its sha256"),
        ({"text_width": 9}, "does not have its sha256"),
        ({"sha256": None}, "does not have its sha256"),
        ({"shards": [{"name": "x.tar"}]}, "damaged"),
        ({"shards": None}, "damaged"),
    ],
)
def test_index_that_this_version_does_not_read(shard, index, change, message):
    path = shard.parent / INDEX_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        read_index(shard.parent)


def test_index_without_samples_is_refused(shard, index):
    write_index(shard.parent, dataclasses.replace(index, shards=[]))
    with pytest.raises(UserError, match="lists no samples"):
        read_index(shard.parent)


@pytest.mark.parametrize("content", ["", '{"format": 4, "sha', "[]", "[" * 100_000])
def test_index_that_is_not_json_of_ours(tmp_path, content):
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        read_index(tmp_path)
