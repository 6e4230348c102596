"""Where pictures and captions are found, and what is wrong with the odd ones."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from flux2_ds.config.recipe import Data
from flux2_ds.errors import UserError
from flux2_ds.prepare.plan import with_captions
from flux2_ds.prepare.source_images import Skipped, SourceImage
from flux2_ds.prepare.sources import find_images


def images_of(images, scratch: Path, column: str = "text") -> list[SourceImage]:
    return find_images(images if isinstance(images, dict) else str(images), column, scratch)


def picture(path: Path, side: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), "red").save(path)
    return path


def captions(found: list[SourceImage]) -> dict[str, str | None]:
    return {image.key: image.caption for image in found}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


@pytest.mark.parametrize(("name", "reason"), [("x", "is not a folder"), (".", "holds no images")])
def test_folder_without_pictures(tmp_path, name, reason):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match=rf"data\.images .*{reason}"):
        images_of(tmp_path / name, tmp_path / "scratch")


def test_pictures_are_found_below_in_order_with_captions(folder, tmp_path):
    for name in ("b/été 猫.JPG", "a.png", "c.webp", "d.jpeg", "ignored.doc", "._a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "b/été 猫.txt").write_text("  une chatte, 猫\n", encoding="utf-8")
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbftwo\nlines\n")  # with a byte order mark
    (folder / "c.txt").write_text(" \n")
    (folder / "d.TXT").write_text("in capitals")
    (folder / "c.TXT").write_text("not this one")
    found = images_of(folder, tmp_path)
    assert list(captions(found).items()) == [
        ("a.png", "two\nlines"),
        ("b/été 猫.JPG", "une chatte, 猫"),
        ("c.webp", None),
        ("d.jpeg", "in capitals"),
    ]
    assert [image.problem for image in found] == [None] * 4
    assert {image.source for image in found} == {"images"}


def test_a_name_that_is_not_utf8_can_be_said_and_read(folder, tmp_path):
    path = os.fsencode(folder) + b"/caf\xe9.png"
    with open(path, "wb") as stream:  # noqa: PTH123 - a Path of such a name is what is tested
        Image.new("RGB", (8, 8)).save(stream, "PNG")
    (image,) = images_of(folder, tmp_path)
    assert image.key == "caf\\xe9.png"
    assert image.key.encode() and image.blob.read().startswith(b"\x89PNG")


def test_a_broken_link_is_said(folder, tmp_path):
    picture(folder / "a.png")
    (folder / "b.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "b.txt").write_text("gone")
    whole, broken = images_of(folder, tmp_path)
    assert whole.problem is None
    assert broken.problem == "cannot be read: No such file or directory"


def test_links_are_followed_and_loops_end(folder, tmp_path):
    picture(folder / "a" / "one.png")
    picture(tmp_path / "elsewhere" / "two.png")
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert set(captions(images_of(folder, tmp_path / "s"))) == {"a/one.png", "linked/two.png"}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_of_an_imagefolder(folder, tmp_path, kind):
    picture(folder / "train" / "a.png")
    picture(folder / "train" / "b.png")
    picture(folder / "c.png")
    (folder / "train" / "b.txt").write_text("the file beside it")
    (folder / "c.txt").write_text("c has a file only")
    separated = "from the\u2028table"  # of lines to Unicode, not to JSON
    rows = [("a.png", "a, with a comma\nand a line"), ("b.png", separated), ("x.png", "?")]
    if kind == "csv":
        lines = ["file_name,text", *(f'{name},"{text}"' for name, text in rows)]
    else:
        lines = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False)
                 for name, text in rows]  # fmt: skip
    (folder / "train" / f"metadata.{kind}").write_text("\n".join(lines), encoding="utf-8")
    found = images_of(folder, tmp_path / "s")
    assert captions(found) == {
        "c.png": "c has a file only",
        "train/a.png": "a, with a comma\nand a line",
        "train/b.png": separated,
        "train/x.png": "",
    }
    problems = {image.key: image.problem for image in found if image.problem}
    assert problems == {"train/x.png": "named in the metadata, but there is no such image"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"file_name": "a.png"}', "row 1 has no 'text', but 'file_name'"),
        ('{"file": "a.png", "text": "x"}', "row 1 has no 'file_name'"),
        ('{"file_name": "a.png", "te', r"metadata\.jsonl cannot be read"),
        ("[1, 2]", "row 1 has no 'file_name'"),
        (b"\xff\xfe", r"metadata\.jsonl cannot be read"),
    ],
)
def test_broken_metadata_is_refused(folder, tmp_path, content, reason):
    picture(folder / "a.png")
    data = content if isinstance(content, bytes) else content.encode()
    (folder / "metadata.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=reason):
        images_of(folder, tmp_path)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def encoded(side: int = 32) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side + 8), "blue").save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """A tar as img2dataset writes it, with members that nobody should have put there."""
    path = tmp_path / "tars" / "00000.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as out:
        add(out, "000.jpg", encoded())
        add(out, "000.txt", b"a caption")
        add(out, "000.json", json.dumps({"caption": "not this one", "width": 1}).encode())
        add(out, "001.jpg", encoded(40))
        add(out, "001.json", json.dumps({"caption": "from the json"}).encode())
        add(out, "002.jpg", b"no picture")
        add(out, "002.txt", b"caf\xe9")
        add(out, "/etc/abs.jpg", encoded())
        add(out, "../up.jpg", encoded())
        add(out, "000.jpg", encoded(48))
        add(out, "003.jpg", encoded())
        add(out, "004.HEIC", b"a phone's")
        add(out, "notes.doc", b"no picture")
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        out.addfile(link)
    return path


def test_a_tar_of_raw_pictures(tar, tmp_path):
    found = {image.key: image for image in images_of(tar.parent, tmp_path / "s")}
    good = {key: e for key, e in found.items() if e.problem is None}
    assert {key: (e.caption, e.size) for key, e in good.items()} == {
        "00000.tar/000.jpg": ("a caption", (32, 40)),
        "00000.tar/001.jpg": ("from the json", (40, 48)),
        "00000.tar/003.jpg": (None, (32, 40)),
    }
    assert good["00000.tar/001.jpg"].blob.read() == encoded(40)
    problems = {key.split("@")[0]: e.problem for key, e in found.items() if e.problem}
    assert problems.pop("00000.tar/002.jpg").startswith("unreadable: not a picture")
    assert problems.pop("00000.tar/004.HEIC") == ".heic is not read: convert it to JPEG or PNG"
    outside = "its name in the tar points outside (absolute or with ..)"
    assert problems == {
        "00000.tar//etc/abs.jpg": outside,
        "00000.tar/../up.jpg": outside,
        "00000.tar/000.jpg": "the tar has another image of this name",
    }


def offset_of(tar: Path, name: str) -> int:
    with tarfile.open(tar) as members:
        return members.getmember(name).offset


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole, at: whole[:at] + b"?" + whole[at + 1 :],  # another header
        lambda whole, at: whole[:at],  # cut between two members
        lambda whole, at: whole[: at + 100],  # within a header
        lambda whole, at: whole[: at + 600],  # within a picture
        lambda whole, at: whole[:at] + bytes(3 << 20),  # room kept for what never came
        lambda whole, at: whole + whole,  # two in one
    ],
)
def test_a_damaged_tar_loses_no_picture_in_silence(tar, tmp_path, damage):
    tar.write_bytes(damage(tar.read_bytes(), offset_of(tar, "003.jpg")))
    with pytest.raises(UserError, match=r"00000\.tar cannot be read as a tar \("):
        images_of(tar, tmp_path / "s")


def test_what_a_tar_holds_is_remembered_until_it_changes(tar, tmp_path, monkeypatch):
    first = images_of(tar, tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("read again"))
        assert images_of(tar, tmp_path / "s") == first
    with tarfile.open(tar, "a") as out:
        add(out, "009.jpg", encoded())
    assert len(images_of(tar, tmp_path / "s")) == len(first) + 1


def test_patterns_name_several_tars(tar, tmp_path):
    (tar.parent / "00001.tar").write_bytes(tar.read_bytes())
    for pattern in ("{00000..00001}.tar", "0000*.tar"):
        found = images_of(tar.parent / pattern, tmp_path / "s")
        assert {image.key[:9] for image in found} == {"00000.tar", "00001.tar"}
    with pytest.raises(UserError, match=r"there is no file .*00002\.tar"):
        images_of(tar.parent / "{00000..00002}.tar", tmp_path / "s")
    (tar.parent / "00001.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(UserError, match=r"00001\.tar cannot be read as a tar"):
        images_of(tar.parent, tmp_path / "s")


def test_tars_of_one_name_are_two_sources(tar, tmp_path):
    other = tmp_path / "more" / tar.name
    other.parent.mkdir()
    other.write_bytes(tar.read_bytes())
    with pytest.raises(UserError, match=r"has 00000\.tar/\S+ twice") as caught:
        images_of(f"{tmp_path}/{{tars,more}}/00000.tar", tmp_path / "s")
    assert f"data.images: {{one: {tar}, other: {other}}}" in str(caught.value)
    alone = images_of(tar, tmp_path / "s")
    assert len(images_of({"one": str(tar), "other": str(other)}, tmp_path / "s")) == 2 * len(alone)


def test_several_sources_keep_their_names(folder, tmp_path):
    for name in ("one", "two"):
        picture(folder / name / "same.png")
    sources = {"b": str(folder / "one"), "a": str(folder / "two")}
    found = images_of(sources, tmp_path)
    assert [(e.source, e.key) for e in found] == [("a", "same.png"), ("b", "same.png")]
    with pytest.raises(UserError, match="'no/slash'"):
        images_of({"no/slash": str(folder)}, tmp_path)


@pytest.mark.parametrize("setting", ["error", "skip", "fixed"])
def test_a_caption_that_cannot_be_decoded(folder, tmp_path, setting):
    picture(folder / "a.png")
    picture(folder / "b.png")
    (folder / "a.txt").write_bytes("café".encode("latin-1"))
    (folder / "b.txt").write_text("fine")
    found = images_of(folder, tmp_path)
    data = Data(images="", shards="", missing_caption=setting, fixed_caption="a photo")
    skipped = Skipped()
    if setting == "error":
        with pytest.raises(UserError, match=r"a\.png \(caption a\.txt is not UTF-8"):
            with_captions(found, data, skipped)
        return
    assert [image.key for image in with_captions(found, data, skipped)] == ["b.png"]
    assert skipped.reasons["images/a.png"].startswith("caption a.txt is not UTF-8")
