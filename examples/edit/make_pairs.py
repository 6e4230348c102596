"""Pairs that teach to color: each photograph of examples/photos, with its black and white copy as its reference.

python examples/edit/make_pairs.py [FOLDER, by default runs/color/pairs]
"""

import sys
from pathlib import Path

from PIL import Image

INSTRUCTION = "color this black and white photograph"
"""The caption of every pair, and later the prompt: what is to be done, not what the picture shows."""


def main(folder: Path) -> None:
    """Write the pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((Path(__file__).parents[1] / "photos").glob("*.jpg")):
        photo = Image.open(path)
        photo.save(folder / f"{path.stem}.png")
        photo.convert("L").save(folder / f"{path.stem}.reference.png")
        (folder / f"{path.stem}.txt").write_text(f"{INSTRUCTION}\n")
    print(f"{len(list(folder.glob('*.txt')))} pairs in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/color/pairs"))
