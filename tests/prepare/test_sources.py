"""Where pictures and captions are found, and what is wrong with the odd ones."""

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from flux2_ds.commands.loopback import served
from flux2_ds.config.recipe import Data, is_url
from flux2_ds.data.images import _FORMATS, UnreadableImageError, load_upright
from flux2_ds.errors import UserError
from flux2_ds.prepare.plan import with_captions
from flux2_ds.prepare.source_images import Skipped, SourceImage
from flux2_ds.prepare.sources import find_images


def images_of(images, scratch: Path, column: str | dict[str, str] = "text") -> list[SourceImage]:
    images = images if isinstance(images, dict) else str(images)
    return find_images(Data(images=images, shards="", caption_column=column), scratch)[0]


def picture(path: Path, side: int = 32) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), "red").save(path)
    return path


def captions(found: list[SourceImage]) -> dict[str, str | None]:
    """The one caption of each image."""
    assert all(len(image.captions) < 2 for image in found)
    return {image.key: next(iter(image.captions), None) for image in found}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


@pytest.mark.parametrize(("name", "reason"), [("x", "is not a folder"), (".", "holds no images")])
def test_folder_without_images(tmp_path, name, reason):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match=rf"data\.images .*{reason}"):
        images_of(tmp_path / name, tmp_path / "scratch")


def test_images_are_found_below_in_order_with_captions(folder, tmp_path):
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
        "train/x.png": None,
    }
    problems = {image.key: image.problem for image in found if image.problem}
    assert problems == {"train/x.png": "named in the metadata, but not there"}


@pytest.mark.parametrize(
    ("name", "content", "faults"),
    [
        ("metadata.jsonl", '{"file_name": "a.png"}', ["row 1: has no 'text', but 'file_name'"]),
        (
            "metadata.jsonl",
            '{"file": "a.png", "text": "x"}',
            ["row 1: has no 'file_name', but 'file'"],
        ),
        ("metadata.jsonl", '{"file_name": "a.png", "te', ["row 1: is not JSON"]),
        ("metadata.jsonl", "[1, 2]", ["row 1: is not a JSON object"]),
        ("metadata.jsonl", b"\xff\xfe\x00", ["metadata.jsonl: is not UTF-16"]),
        ("metadata.jsonl", b"caf\xe9", ["metadata.jsonl: is not UTF-8"]),
        ("metadata.jsonl", '{"file_name": 7, "text": "x"}', ["row 1: has the file_name 7"]),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": {}}',
            ["row 1: column 'text' is an object"],
        ),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": true}',
            ["row 1: column 'text' is true"],
        ),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": 3}',
            ["row 1: column 'text' is a number"],
        ),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": ["a", ["b"]]}',
            ["row 1: column 'text' is a list in a list"],
        ),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "a\\u0000b"}',
            ["row 1: column 'text' holds a NUL"],
        ),
        (
            "metadata.csv",
            "file_name,text\na.png,red, blue\n",
            ["row 1: has 3 fields and the header 2"],
        ),
        (
            "metadata.csv",
            "file_name,text\nb.png,x\na.png\n",
            ["row 2: has 1 fields and the header 2"],
        ),
        ("metadata.csv", "file_name,text,text\na.png,x,y\n", ["metadata.csv: has a column twice"]),
        (
            "metadata.csv",
            "file_name,text\na.png,x\nfile_name,text\n",
            ["row 2: is the header again"],
        ),
        (
            "metadata.csv",
            'file_name,text\na.png,"x\n',
            ["row 1: is no CSV (unexpected end of data)"],
        ),
        (
            "metadata.csv",
            "file_name,text\na.png,x\n./a.png,y\n",
            ["row 2: names ./a.png again, after", "row 1"],
        ),
        (
            "metadata.csv",
            "file_name,text\na.png,red, blue\nb.png,x\nb.png,y\nc.png,1,2\n",
            [
                "row 1: has 3 fields and the header 2",
                "(and 1 more such rows)",
                "row 3: names b.png again",
            ],
        ),
    ],
)
def test_all_faults_of_metadata_are_named_together(folder, tmp_path, name, content, faults):
    picture(folder / "a.png")
    data = content if isinstance(content, bytes) else content.encode()
    (folder / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        images_of(folder, tmp_path)
    for fault in faults:
        assert fault in str(caught.value)


def test_an_image_that_two_files_name_is_refused(folder, tmp_path):
    picture(folder / "b" / "a.png")
    (folder / "metadata.csv").write_text("file_name,text\nb/a.png,one\n")
    (folder / "b" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "two"}')
    with pytest.raises(
        UserError, match=r"metadata\.jsonl, row 1: names a\.png again, after .*csv, row 1"
    ):
        images_of(folder, tmp_path)


CAPTIONS_BESIDE = {
    "windows.txt": (b"one\r\ntwo\rthree\r\n", "one\ntwo\nthree"),
    "utf16.txt": ("une été".encode("utf-16"), "une été"),
    "mark.txt": (b"\xef\xbb\xbf  marked \t", "marked"),
    "other.caption": (b"a caption\r\n", "a caption"),
    "text.json": (b'{"width": 3, "text": "from text"}', "from text"),
    "caption.json": (b'{"text": null, "caption": "from caption"}', "from caption"),
    "prompt.json": (b'{"text": NaN, "prompt": "from prompt"}', "from prompt"),
    "column.json": (b'{"text": "not this", "tags": "from the column"}', "from the column"),
    "list.json": (b'{"text": ["one", null, " ", "two", "one"]}', "one", "two", "one"),
    "nothing.json": (b'{"width": 3}',),
    "null.json": (b'{"text": [null, ""]}',),
}
NO_CAPTIONS = {
    "nul.txt": (b"a\0b", "caption nul.txt holds a NUL character"),
    "latin.caption": (b"caf\xe9", "caption latin.caption is not UTF-8"),
    "number.json": (b'{"text": ["a", 3]}', "caption number.json: 'text' is a number, not a text"),
    "flag.json": (
        b'{"caption": true}',
        "caption flag.json: 'caption' is true or false, not a text",
    ),
    "text_only.json": (b'"a text"', "caption text_only.json is not a JSON object"),
    "cut.json": (b'{"text": "', "caption cut.json is not a JSON object"),
    "long.txt": (b"x" * 1_500_000, "caption long.txt has 1.5 MB"),
}


@pytest.mark.parametrize("packed", [False, True])
def test_captions_beside_images(folder, tmp_path, packed):
    """The same of a folder and of a tar."""
    for name, (content, *_) in {**CAPTIONS_BESIDE, **NO_CAPTIONS}.items():
        picture(folder / f"{Path(name).stem}.jpg")
        (folder / name).write_bytes(content)
    location = folder
    if packed:
        location = tmp_path / "photos.tar"
        with tarfile.open(location, "w") as out:
            for path in sorted(folder.iterdir()):
                out.add(path, f"./{path.name}")
    for _ in range(2):  # what was found in tars is remembered
        found = {
            Path(image.key).stem: image for image in images_of(location, tmp_path / "s", "tags")
        }
        for name, (_, *expected) in CAPTIONS_BESIDE.items():
            image = found.pop(Path(name).stem)
            assert (image.captions, image.problem) == (tuple(expected), None)
        for name, (_, problem) in NO_CAPTIONS.items():
            image = found.pop(Path(name).stem)
            assert not image.captions and str(image.problem).startswith(problem)
        assert not found


def test_what_csv_leaves_out_is_a_missing_caption(folder, tmp_path):
    for name in "abcd":
        picture(folder / f"{name}.png")
    (folder / "metadata.csv").write_bytes(
        "file_name,text\r\na.png,NaN\r\nb.png,\r\n\r\nc.png,null\r\nd.png,\"a, \"\"b\"\"\r\nc\"\r\n"
        .encode("utf-16")
    )  # fmt: skip
    expected = {"a.png": None, "b.png": None, "c.png": None, "d.png": 'a, "b"\nc'}
    assert captions(images_of(folder, tmp_path)) == expected


def test_a_source_may_have_a_caption_column_of_its_own(folder, tmp_path):
    for name, column in (("one", "text"), ("two", "prompt_de")):
        picture(folder / name / "a.png")
        (folder / name / "metadata.csv").write_text(f"file_name,{column}\na.png,of {name}\n")
    sources = {name: str(folder / name) for name in ("one", "two")}
    found = images_of(sources, tmp_path, {"two": "prompt_de"})
    assert [image.captions for image in found] == [("of one",), ("of two",)]


HIDDEN = (".ipynb_checkpoints/a-checkpoint.png", "@eaDir/a.png/SYNOFILE_THUMB.png", "__MACOSX/._a.png",
          "deep/.thumbnails/a.png", "deep/__MACOSX/b.png", ".hidden.png")  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_hidden_or_a_programs_own_is_ignored_and_other_files_are_counted(
    folder, tmp_path, packed
):
    location = folder
    for name in ("a.png", "deep/b.jfif", "deep/c.JPE", *HIDDEN):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(path, "PNG" if name.endswith("png") else "JPEG")
    (folder / "a.txt").write_text("a")
    for name in (
        "x.zip",
        "deep/y.zip",
        "alone.txt",
        "deep/film.MP4",
        "noext",
        ".hidden.zip",
        "z.json",
    ):
        (folder / name).write_text("{}")
    if packed:
        location = tmp_path / "photos.tar"
        with tarfile.open(location, "w") as out:
            out.add(folder, ".")
    for _ in range(2):
        images, unused = find_images(Data(images=str(location), shards=""), tmp_path / "s")
        keys = {image.key.removeprefix("photos.tar/").removeprefix("./") for image in images}
        assert keys == {"a.png", "deep/b.jfif", "deep/c.JPE"}
        assert not any(image.problem for image in images)
        counts = {suffix: count for suffix, (count, _) in unused.files.items()}
        assert counts == {".zip": 2, ".txt": 1, ".mp4": 1, "without a suffix": 1, ".json": 1}
    line = unused.line()
    assert "6 other files are not used: 2 .zip (unpack it; the first is " in line
    assert "1 .txt (of no image; the first is " in line and "alone.txt" in line


def test_what_is_too_large_is_not_read(folder, tmp_path):
    """A tar's members say their size, however little there is of them."""
    picture(folder / "a.png")
    with (folder / "b.png").open("wb") as file:
        file.truncate(40 << 30)
    with (folder / "a.txt").open("wb") as file:
        file.truncate(15_000_000)
    found = {image.key: image for image in images_of(folder, tmp_path)}
    assert found["b.png"].problem == "42.9 GB: no image that is read is so large"
    assert found["a.png"].problem == "caption a.txt has 15.0 MB, and captions at most 1"

    for form in ("gnu", "pax"):
        location = tmp_path / f"{form}.tar"
        tar = [
            "tar",
            "-C",
            str(folder),
            f"--format={form}",
            "-Scf",
            str(location),
            "a.png",
            "b.png",
        ]
        subprocess.run(tar, check=True)
        found = {image.key: image for image in images_of(location, tmp_path / "s")}
        assert "sparse" in str(found[f"{form}.tar/b.png"].problem)
        assert found[f"{form}.tar/a.png"].problem is None


def test_no_program_is_started_to_read_an_image(folder, tmp_path, monkeypatch):
    """Pillow reads EPS by Ghostscript, whatever the file's name."""
    (folder / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n"
    )
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    with pytest.raises(UnreadableImageError, match="not an image that is read"):
        load_upright(str(folder / "a.png"))


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


def test_a_tar_of_raw_images(tar, tmp_path):
    found = {image.key: image for image in images_of(tar.parent, tmp_path / "s")}
    good = {key: e for key, e in found.items() if e.problem is None}
    assert {key: (e.captions, e.size) for key, e in good.items()} == {
        "00000.tar/000.jpg": (("a caption",), (32, 40)),
        "00000.tar/001.jpg": (("from the json",), (40, 48)),
        "00000.tar/003.jpg": ((), (32, 40)),
    }
    assert good["00000.tar/001.jpg"].blob.read() == encoded(40)
    problems = {key.split("@")[0]: e.problem for key, e in found.items() if e.problem}
    assert problems.pop("00000.tar/002.jpg").startswith("unreadable: not an image")
    assert problems.pop("00000.tar/004.HEIC") in (  # with and without its plugin
        ".heic is not read: install pillow-heif, or convert it to JPEG or PNG",
        f"unreadable: not an image that is read ({', '.join(_FORMATS)})",
    )
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
def test_a_damaged_tar_loses_no_image_in_silence(tar, tmp_path, damage):
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


@pytest.mark.parametrize("kind", ["http", "s3"])
def test_tars_of_raw_images_in_a_store(tar, tmp_path, kind):
    local = images_of(tar, tmp_path / "one")
    with served(kind, tar.parent) as server:
        remote = images_of(f"{server.url}/{{00000..00000}}.tar", tmp_path / "two")
        assert [(e.key, e.captions, e.size) for e in remote] == [
            (e.key, e.captions, e.size) for e in local
        ]
        for one, other in zip(local, remote, strict=True):
            assert is_url(other.blob.location)
            assert one.blob.read() == other.blob.read()
        if kind == "s3":
            assert images_of(f"{server.url}/0*.tar", tmp_path / "two") == remote
            with pytest.raises(UserError, match=r"there is no file s3://data/1\*\.tar"):
                images_of(f"{server.url}/1*.tar", tmp_path / "two")


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
