"""Images from disk: odd files become sRGB, broken ones an error with a reason."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flux2_ds.config.buckets import Bucket
from flux2_ds.data.contact_sheet import contact_sheet
from flux2_ds.data.images import UnreadableImageError
from flux2_ds.data.images import image_size as image_size_of
from flux2_ds.data.images import load_cropped as load_cropped_of

ORIENTATION = 0x0112
HOW_A_CAMERA_STORES_IT = {
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


def image_size(path: Path) -> tuple[int, int]:
    """By the header of the file, and by its contents."""
    size = image_size_of(str(path))
    assert image_size_of(path.read_bytes()) == size
    return size


def load_cropped(path: Path, bucket: Bucket) -> np.ndarray:
    return load_cropped_of(path.read_bytes(), bucket)


def noise_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A sound JPEG of 64 x 48."""
    path = tmp_path / "photo.jpg"
    Image.fromarray(noise_image(48, 64)).save(path)
    return path


@pytest.mark.parametrize("orientation", HOW_A_CAMERA_STORES_IT)
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = noise_image(32, 48)
    stored = np.ascontiguousarray(HOW_A_CAMERA_STORES_IT[orientation](upright))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for name in ("été 猫.png", "scan.tif"):
        path = tmp_path / name
        Image.fromarray(stored).save(path, exif=exif)
        assert image_size(path) == (48, 32)
        np.testing.assert_array_equal(load_cropped(path, Bucket(32, 48)), upright)


def test_a_png_is_turned_by_what_stands_before_its_pixels(tmp_path):
    """Alike when it is measured and when it is decoded; what stands behind the pixels is not looked for."""
    upright, path = noise_image(32, 48), tmp_path / "xmp.png"
    facts = PngInfo()
    facts.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    Image.fromarray(HOW_A_CAMERA_STORES_IT[6](upright)).save(path, pnginfo=facts)
    assert image_size(path) == (48, 32)
    np.testing.assert_array_equal(load_cropped(path, Bucket(32, 48)), upright)

    Image.fromarray(upright).save(path)
    whole, exif = path.read_bytes(), Image.Exif()
    exif[ORIENTATION] = 6
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    behind = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(whole[:-12] + behind + whole[-12:])
    assert image_size(path) == (48, 32)
    np.testing.assert_array_equal(load_cropped(path, Bucket(32, 48)), upright)


@pytest.mark.parametrize(
    "other",
    [
        (0x100, 1, 1, b"\0\0\0\1"),  # struct.error when Pillow writes it again
        (0x10F, 5, 1, b"\0\0\0\1"),  # AttributeError
        (0x11A, 2, 1, b"\0\0\0\1"),  # TypeError
    ],
)
def test_exif_that_is_damaged_elsewhere_still_turns(tmp_path, other):
    upright = noise_image(32, 48)
    entries = sorted([other, (ORIENTATION, 3, 1, b"\0\6\0\0")])
    directory = b"".join(struct.pack(">HHI4s", *entry) for entry in entries)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2" + directory + bytes(4)
    path = tmp_path / "turned.webp"
    Image.fromarray(HOW_A_CAMERA_STORES_IT[6](upright)).save(path, lossless=True, exif=exif)
    assert image_size(path) == (48, 32)
    np.testing.assert_array_equal(load_cropped(path, Bucket(32, 48)), upright)


def test_exif_that_cannot_be_read_turns_nothing(tmp_path):
    upright, path = noise_image(32, 48), tmp_path / "damaged.webp"
    Image.fromarray(upright).save(path, lossless=True, exif=b"Exif\0\0no TIFF header")
    assert image_size(path) == (48, 32)
    np.testing.assert_array_equal(load_cropped(path, Bucket(32, 48)), upright)


def palette(transparent: bool) -> tuple[Image.Image, dict]:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 200, 30, 60])
    return image, {"transparency": 1} if transparent else {}


def sixteen_bit(level: int) -> Image.Image:
    return Image.fromarray(np.full((32, 32), level, dtype=np.uint16))


@pytest.mark.parametrize(
    ("name", "image", "options", "colour"),
    [
        ("gray.png", Image.new("L", (32, 32), 100), {}, (100, 100, 100)),
        ("bilevel.png", Image.new("1", (32, 32), 1), {}, (255, 255, 255)),
        ("rgba.png", Image.new("RGBA", (32, 32), (10, 20, 30, 255)), {}, (10, 20, 30)),
        ("half.png", Image.new("RGBA", (32, 32), (0, 0, 0, 51)), {}, (204, 204, 204)),
        ("invisible.png", Image.new("RGBA", (32, 32), (0, 0, 0, 0)), {}, (255, 255, 255)),
        ("gray_alpha.png", Image.new("LA", (32, 32), (0, 0)), {}, (255, 255, 255)),
        ("palette.png", *palette(transparent=False), (200, 30, 60)),
        ("clear_palette.png", *palette(transparent=True), (255, 255, 255)),
        ("cmyk.tif", Image.new("CMYK", (32, 32), (0, 255, 255, 0)), {}, (255, 0, 0)),
        ("black16.png", sixteen_bit(0), {}, (0, 0, 0)),
        ("middle16.png", sixteen_bit(0x8000), {}, (128, 128, 128)),
        ("middle16.tif", sixteen_bit(0x8000), {}, (128, 128, 128)),
        ("white16.tif", sixteen_bit(0xFFFF), {}, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(tmp_path, name, image, options, colour):
    image.save(tmp_path / name, **options)
    pixels = load_cropped(tmp_path / name, Bucket(32, 32))
    assert (pixels.dtype, pixels.shape) == (np.uint8, (32, 32, 3))
    assert {tuple(map(int, pixel)) for pixel in pixels.reshape(-1, 3)} == {colour}


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_scale_are_unreadable(tmp_path, mode):
    Image.new(mode, (32, 32), 100).save(tmp_path / "deep.tif")
    with pytest.raises(UnreadableImageError, match=f"pixel format {mode} "):
        load_cropped(tmp_path / "deep.tif", Bucket(32, 32))


def test_truncated_file_is_unreadable(photo):
    photo.write_bytes(photo.read_bytes()[: photo.stat().st_size // 2])
    with pytest.raises(UnreadableImageError, match="truncated"):
        load_cropped(photo, Bucket(32, 32))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"just text", "not an image"), (b"\x89PNG\r\n\x1a\n", "not an image")],
)
@pytest.mark.parametrize(
    "read", [image_size_of, lambda content: load_cropped_of(content, Bucket(32, 32))]
)
def test_what_is_no_image_is_unreadable(content, reason, read):
    with pytest.raises(UnreadableImageError, match=reason):
        read(content)


@pytest.mark.parametrize("name", ["moving.webp", "moving.png"])
def test_animated_files_are_unreadable(tmp_path, name):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with pytest.raises(UnreadableImageError, match="animated"):
        image_size_of(str(tmp_path / name))


def test_pages_of_a_tiff_are_not_frames(tmp_path):
    pages = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert (load_cropped(tmp_path / "pages.tif", Bucket(32, 32)) == (255, 0, 0)).all()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [2000, 1000])  # Pillow warns above it, and refuses twice of it
def test_a_decompression_bomb_is_unreadable(photo, limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(
        UnreadableImageError, match="more than 0 megapixels, as decompression bombs"
    ):
        image_size(photo)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3072)
    assert image_size(photo) == (64, 48)


@pytest.mark.parametrize(("height", "width"), [(64, 160), (160, 64), (64, 64)])
@pytest.mark.parametrize("place", [0.0, 0.25, None, 1.0])
def test_a_crop_lies_at_its_place_or_in_the_center(tmp_path, height, width, place):
    image = noise_image(height, width)
    Image.fromarray(image).save(tmp_path / "wide.png")
    given = {} if place is None else {"place": place}
    cropped = load_cropped_of((tmp_path / "wide.png").read_bytes(), Bucket(64, 64), **given)
    place = 0.5 if place is None else place
    top, left = int((height - 64) * place), int((width - 64) * place)
    np.testing.assert_array_equal(cropped, image[top : top + 64, left : left + 64])


@pytest.mark.parametrize(("width", "height"), [(37, 211), (211, 37), (16, 16), (500, 333)])
def test_image_covers_its_bucket(tmp_path, width, height):
    Image.new("RGB", (width, height), (9, 90, 200)).save(tmp_path / "plain.png")
    pixels = load_cropped(tmp_path / "plain.png", Bucket(48, 80))
    assert pixels.shape == (48, 80, 3)
    assert (pixels == (9, 90, 200)).all()  # no border in another colour


def test_contact_sheet_holds_every_image():
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    sizes = [(8, 16), (16, 8), (16, 16)]
    images = [np.full((*s, 3), c, dtype=np.uint8) for s, c in zip(sizes, colours, strict=True)]
    captions = ["", "été", "long " * 90]
    sheet = np.asarray(contact_sheet(images, captions)).reshape(-1, 3)
    for (height, width), colour in zip(sizes, colours, strict=True):
        assert (sheet == colour).all(axis=1).sum() == height * width
