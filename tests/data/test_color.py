"""Color profiles: pixels become sRGB, by formulas that are written down here a second time."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from flux2_ds.config.buckets import Bucket
from flux2_ds.data.images import DAMAGED_PROFILE, load_cropped, load_mask

D50 = (0.9642, 1.0, 0.8249)
D65 = (0.95047, 1.0, 1.08883)
TO_SRGB = np.array([[3.2404542, -1.5371385, -0.4985314], [-0.9692660, 1.8760108, 0.0415560],
                    [0.0556434, -0.2040259, 1.0572252]])  # fmt: skip
"""From XYZ of D65."""
P3 = np.array([[0.4865709, 0.2656677, 0.1982173], [0.2289746, 0.6917385, 0.0792869],
               [0.0, 0.0451134, 1.0439444]])  # fmt: skip
ADOBE = np.array([[0.5767309, 0.1855540, 0.1881852], [0.2973769, 0.6273491, 0.0752741],
                  [0.0270343, 0.0706872, 0.9911085]])  # fmt: skip
BRADFORD = np.array([[1.0478112, 0.0228866, -0.0501270], [0.0295424, 0.9904844, -0.0170491],
                     [-0.0092345, 0.0150436, 0.7521316]])  # fmt: skip
"""From XYZ of D65 to XYZ of D50."""


def decode(value: np.ndarray) -> np.ndarray:
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def encode(value: np.ndarray) -> np.ndarray:
    value = value.clip(0, 1)
    return np.where(value <= 0.0031308, value * 12.92, 1.055 * value ** (1 / 2.4) - 0.055)


def numbers(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def icc(space: bytes, connection: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    start, body = 132 + 12 * len(tags), b""
    table = struct.pack(">I", len(tags))
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    head = (
        struct.pack(">I", start + len(body)) + bytes(4) + b"\2\x40\0\0" + kind + space + connection
    )
    head += bytes(12) + b"acsp" + bytes(28) + numbers(*D50)
    return head.ljust(128, b"\0") + table + body


def xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + numbers(*values)


def power(exponent: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(exponent * 256)) + bytes(2)


def table(curve: np.ndarray) -> bytes:
    levels = (curve * 65535).round().astype(">u2")
    return b"curv" + bytes(4) + struct.pack(">I", len(levels)) + levels.tobytes()


def rgb_profile(matrix: np.ndarray, curve: bytes) -> bytes:
    red, green, blue = (BRADFORD @ matrix).T
    colors = {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue, b"wtpt": D50}
    tags = {name: xyz(color) for name, color in colors.items()}
    return icc(b"RGB ", b"XYZ ", b"mntr", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


SRGB_CURVE = table(decode(np.arange(1024) / 1023))
GRAY_PROFILE = icc(b"GRAY", b"XYZ ", b"mntr", {b"wtpt": xyz(D50), b"kTRC": power(1.0)})
"""Linear."""


def cmyk_profile() -> bytes:
    """A printer whose inks make no color but lightness: 100 without ink, 20 less of each."""
    corners = [bin(n).count("1") for n in range(16)]
    grid = b"".join(bytes([round((100 - 20 * inks) * 2.55), 128, 128]) for inks in corners)
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + numbers(1, 0, 0, 0, 1, 0, 0, 0, 1)
    ramps = bytes(range(256))
    return icc(
        b"CMYK", b"Lab ", b"prtr", {b"A2B0": lut + 4 * ramps + grid + 3 * ramps, b"wtpt": xyz(D50)}
    )


COLORS = np.random.default_rng(0).integers(0, 256, (48, 48, 3), np.uint8)
LEVELS = np.tile(np.arange(0, 256, 5, dtype=np.uint8)[:48], (48, 1))


def load(path: Path, notes: list[str] | None = None) -> np.ndarray:
    return load_cropped(path.read_bytes(), Bucket(48, 48), notes).astype(int)


def converted(matrix: np.ndarray, exponent: float | None) -> np.ndarray:
    value = COLORS / 255
    linear = decode(value) if exponent is None else value**exponent
    return encode(linear @ (TO_SRGB @ matrix).T) * 255


def chunks(gamma: float | None, primaries: tuple[float, ...] | None) -> PngInfo:
    info = PngInfo()
    if gamma is not None:
        info.add(b"gAMA", struct.pack(">I", round(gamma * 100000)))
    if primaries is not None:
        info.add(b"cHRM", struct.pack(">8I", *(round(each * 100000) for each in primaries)))
    return info


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize(
    ("profile", "matrix", "exponent"),
    [
        (rgb_profile(P3, SRGB_CURVE), P3, None),
        (rgb_profile(ADOBE, power(563 / 256)), ADOBE, 563 / 256),
    ],
)
def test_pixels_are_converted_by_the_profile(tmp_path, name, profile, matrix, exponent):
    options = {"lossless": True} if name.endswith("webp") else {}
    Image.fromarray(COLORS).save(tmp_path / name, icc_profile=profile, **options)
    found, expected = load(tmp_path / name), converted(matrix, exponent)
    assert abs(found - expected).max() <= 2
    assert abs(COLORS - expected).max() > 20
    # Masks are no colors.
    mask = tmp_path / "mask.png"
    Image.fromarray(COLORS).save(mask, icc_profile=profile)
    Image.fromarray(COLORS).save(tmp_path / "plain.png")
    masks = [
        load_mask((tmp_path / n).read_bytes(), (48, 48), Bucket(48, 48))
        for n in ("mask.png", "plain.png")
    ]
    np.testing.assert_array_equal(*masks)


def test_jpeg_gray_cmyk_and_alpha(tmp_path):
    flat = np.tile(np.array([200, 60, 90], np.uint8), (48, 48, 1))
    Image.fromarray(flat).save(
        tmp_path / "a.jpg", quality=100, icc_profile=rgb_profile(P3, SRGB_CURVE)
    )
    expected = encode(decode(flat[0, 0] / 255) @ (TO_SRGB @ P3).T) * 255
    assert abs(load(tmp_path / "a.jpg") - expected).max() <= 3  # of which the JPEG costs one

    expected = encode(LEVELS / 255) * 255
    for name, image in {
        "gray.png": Image.fromarray(LEVELS),
        "alpha.png": Image.merge("LA", [Image.fromarray(LEVELS), Image.new("L", (48, 48), 255)]),
        "deep.tif": Image.fromarray(LEVELS.astype(np.uint16) * 257),
    }.items():
        image.save(tmp_path / name, icc_profile=GRAY_PROFILE)
        assert abs(load(tmp_path / name) - expected[..., None]).max() <= 2, name

    for inks, lightness in (((0, 0, 0, 0), 100), ((255, 0, 0, 0), 80), ((0, 255, 255, 0), 60)):
        for name in ("a.tif", "b.jpg"):
            Image.new("CMYK", (48, 48), inks).save(
                tmp_path / name, icc_profile=cmyk_profile(), quality=100
            )
            linear, black = (((level + 16) / 116) ** 3 for level in (lightness, 20))
            linear = (linear - black) / (1 - black)  # all inks together are black
            assert abs(load(tmp_path / name) - encode(np.array(linear)) * 255).max() <= 2

    clear = Image.fromarray(COLORS).convert("RGBA")
    clear.putalpha(Image.new("L", (48, 48), 0))
    clear.save(tmp_path / "clear.png", icc_profile=rgb_profile(P3, SRGB_CURVE))
    assert (load(tmp_path / "clear.png") == 255).all()


@pytest.mark.parametrize(
    ("gamma", "primaries", "matrix", "exponent"),
    [
        (1.0, None, None, 1.0),
        (1 / 1.8, None, None, 1.8),
        (0.45455, (0.3127, 0.329, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06), ADOBE, 2.2),
        (None, (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06), P3, None),
    ],
)
def test_a_pngs_gamma_and_primaries_count_where_there_is_no_profile(
    tmp_path, gamma, primaries, matrix, exponent
):
    path = tmp_path / "a.png"
    Image.fromarray(COLORS).save(path, pnginfo=chunks(gamma, primaries))
    expected = converted(np.linalg.inv(TO_SRGB) if matrix is None else matrix, exponent)
    assert abs(load(path) - expected).max() <= 2
    if exponent is not None and matrix is None:
        Image.fromarray(LEVELS).save(path, pnginfo=chunks(gamma, primaries))
        expected = encode((LEVELS / 255) ** exponent) * 255
        assert abs(load(path) - expected[..., None]).max() <= 2
    Image.fromarray(COLORS).save(
        path, pnginfo=chunks(gamma, primaries), icc_profile=rgb_profile(P3, SRGB_CURVE)
    )
    assert abs(load(path) - converted(P3, None)).max() <= 2


def test_srgb_stays_what_it_is(tmp_path):
    path = tmp_path / "a.png"
    srgb = np.linalg.inv(TO_SRGB)
    primaries = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
    for options in (
        {"icc_profile": rgb_profile(srgb, SRGB_CURVE)},
        {"pnginfo": chunks(0.45455, None)},
        {"pnginfo": chunks(0.45455, primaries)},
    ):
        Image.fromarray(COLORS).save(path, **options)
        np.testing.assert_array_equal(load(path), COLORS)


@pytest.mark.parametrize(
    ("profile", "image"),
    [
        (rgb_profile(P3, SRGB_CURVE)[:200], Image.fromarray(COLORS)),
        (b"no profile", Image.fromarray(COLORS)),
        (GRAY_PROFILE, Image.fromarray(COLORS)),
        (cmyk_profile(), Image.fromarray(COLORS)),
    ],
)
def test_a_damaged_profile_is_not_applied_and_said(tmp_path, profile, image):
    notes: list[str] = []
    image.save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(load(tmp_path / "a.png", notes), COLORS)
    assert len(notes) == 1 and notes[0].startswith(DAMAGED_PROFILE)


def test_heic_and_avif_are_read_where_their_plugin_is(tmp_path):
    pytest.importorskip("pillow_heif")
    flat = Image.new("RGB", (48, 48), (200, 60, 90))
    for suffix in ("heic", "avif"):
        flat.save(tmp_path / f"a.{suffix}", quality=100)
        assert abs(load(tmp_path / f"a.{suffix}") - (200, 60, 90)).max() <= 3
    with io.BytesIO((tmp_path / "a.heic").read_bytes()) as file:
        assert Image.open(file).size == (48, 48)
