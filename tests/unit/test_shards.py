"""Shards and their index: written, read back, and refused when damaged."""

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import webdataset
from safetensors.torch import load

from flux2_ds.data.buckets import Bucket
from flux2_ds.data.index import CONDITIONING_NAME, INDEX_NAME, Index, Shard, read_index, write_index
from flux2_ds.data.shards import Record, ShardReader, write_shard
from flux2_ds.errors import UserError

BUCKET = Bucket(height=32, width=48)
CAPTIONS = ["a cat", "été, 猫", "a cat", ""]


def text_of(caption: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(caption))
    return torch.randn(512, 8, generator=generator).bfloat16()


def make_records() -> list[Record]:
    generator = torch.Generator().manual_seed(1)
    return [
        Record(f"photo {n}.jpg", caption, torch.randn(32, 4, 6, generator=generator))
        for n, caption in enumerate(CAPTIONS)
    ]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "48x32-00000.tar"
    write_shard(path, BUCKET, make_records(), text_of)
    return path


def read_everything(path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    reader = ShardReader(path)
    return [(reader.latent(row), reader.text(row)) for row in range(len(CAPTIONS))]


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Write the tar again with `change` applied to every member; None leaves it out."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar.getmembers()]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in members:
            changed = change(member.name, data)
            if changed is not None:
                member.size = len(changed)
                tar.addfile(member, io.BytesIO(changed))


def test_what_is_written_is_read_back_bit_for_bit(shard):
    reader = ShardReader(shard)
    # In another order than on disk: access is random.
    for row, record in reversed(list(enumerate(make_records()))):
        latent, text = reader.latent(row), reader.text(row)
        assert (latent.dtype, text.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(latent, record.latent)
        assert torch.equal(text, text_of(record.caption))
        first = CAPTIONS.index(record.caption)  # a caption that recurs is stored once
        assert reader.meta(row) == {
            **{"caption": record.caption, "source": record.source, "height": 32, "width": 48},
            "text_key": f"{first:08d}",
        }


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
        assert json.loads(sample["json"])["caption"] == record.caption
        assert torch.equal(load(sample["latent.safetensors"])["latent"], record.latent)
    assert ["text.safetensors" in sample for sample in samples] == [True, True, False, True]


def share(part: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * part)]


@pytest.mark.parametrize(
    "damage",
    [
        *(share(part) for part in (0.0, 0.05, 0.3, 0.6, 0.9)),
        lambda content: b"this is no tar" * 100,
        lambda content: bytes(20480),  # a tar of nothing
    ],
)
def test_damaged_shard_is_refused(shard, damage):
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(UserError, match=r"48x32-00000\.tar"):
        read_everything(shard)


def test_shard_cut_between_two_samples_is_refused(shard):
    rewrite(shard, lambda name, data: data if name < "00000002" else None)
    with pytest.raises(UserError, match=r"48x32-00000\.tar has 2 samples"):
        read_everything(shard)


def test_shard_cut_while_it_is_open_is_refused(shard):
    reader = ShardReader(shard)
    with shard.open("r+b") as stream:
        stream.truncate(5000)
    with pytest.raises(UserError, match="ends after"):
        reader.text(3)


@pytest.mark.parametrize("member", ["00000000.text.safetensors", "00000003.latent.safetensors"])
def test_missing_member_is_named(shard, member):
    rewrite(shard, lambda name, data: None if name == member else data)
    with pytest.raises(UserError, match=f"no member {member}"):
        read_everything(shard)


def test_missing_shard_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"gone\.tar"):
        ShardReader(tmp_path / "gone.tar")


@pytest.fixture
def index(shard: Path) -> Index:
    """The index of one shard, written beside it."""
    facts = Shard(shard.name, BUCKET, len(CAPTIONS), shard.stat().st_size, "0" * 64)
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
    assert list(counted.bucket_counts().items()) == [(other, 7), (BUCKET, len(CAPTIONS) + 2)]
    assert counted.samples == len(CAPTIONS) + 9


def test_digest_names_content_and_order_of_the_shards(shard, index):
    (one,) = index.shards
    other = dataclasses.replace(one, sha256="1" * 64)
    listings = [[one], [other], [one, other], [other, one]]
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
    with pytest.raises(UserError, match=f"{shard.name} has {size} bytes"):
        read_index(shard.parent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"shards": []}, "lists no samples"),
        ({"shards": [{"name": "x.tar"}]}, "damaged"),
        ({"shards": None}, "damaged"),
    ],
)
def test_index_that_this_version_does_not_read(shard, index, change, message):
    path = shard.parent / INDEX_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        read_index(shard.parent)


@pytest.mark.parametrize("content", ["", '{"format": 2, "sha', "[]", '{"format": 2}'])
def test_index_that_is_not_json_of_ours(tmp_path, content):
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        read_index(tmp_path)
