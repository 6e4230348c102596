"""The tiny models are complete, load as the real ones do, and follow from their seed."""

from pathlib import Path

import pytest
import torch

from flux2_ds.model.pipeline import load_pipeline
from flux2_ds.model.tiny import make_tiny
from flux2_ds.spec import Spec


def tensors(directory: Path) -> dict[str, bytes]:
    files = directory.rglob("*.safetensors")
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def test_it_renders_through_the_pipeline(tiny_model: Path, tiny_spec: Spec) -> None:
    pipeline = load_pipeline(tiny_model, tiny_spec, torch.float32)
    image = pipeline(prompt="a cat", height=64, width=96, num_inference_steps=2).images[0]
    assert image.size == (96, 64)
    assert len(image.getcolors(maxcolors=64 * 96)) > 100


def test_the_seed_decides_everything(tiny_model: Path, tiny_spec: Spec, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    torch.manual_seed(123)
    make_tiny(tmp_path / "same", tiny_spec.variant, seed=0)
    make_tiny(tmp_path / "other", tiny_spec.variant, seed=1)
    torch.random.set_rng_state(state)
    first, same = tensors(tiny_model), tensors(tmp_path / "same")
    assert len(first) == 3
    assert first == same
    assert all(tensors(tmp_path / "other")[name] != content for name, content in first.items())


def test_the_callers_random_state_is_left_alone(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    make_tiny(tmp_path / "model", "klein")
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        make_tiny(tmp_path, "klein")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_photographs_survive_the_fitted_vae(tmp_path: Path) -> None:
    """A few steps already reconstruct better than the photographs' mean colour would."""
    from flux2_ds.model import tiny

    photos = tiny._load_photos(Path(__file__).parents[2] / "examples" / "photos")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = tiny._shared_parts(guidance=False)["vae"]
        tiny.fit_vae(vae, photos, steps=20)
        crops = tiny._crops(photos, 8, 128)
    with torch.no_grad():
        mean = vae.encode(crops).latent_dist.mode()
        error = (vae.decode(mean).sample - crops).square().mean()
    assert error < 0.5 * crops.var()
    patches = vae.bn.running_mean.abs().max(), vae.bn.running_var.min()
    assert patches[0] > 0.01 and patches[1] > 0
