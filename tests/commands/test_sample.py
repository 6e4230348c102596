"""Previews: over every base they are what diffusers' own pipeline renders with the exported file."""

import dataclasses
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from factories import load_pipeline
from PIL import Image
from safetensors import torch as safetensors
from test_export import export_as, recipe_for, save, trained
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux2_ds.commands import sample
from flux2_ds.config.buckets import Bucket
from flux2_ds.config.memory import rendering_bytes
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import Launch, Prepare, Preview, Recipe
from flux2_ds.data.images import check_format, load_reference
from flux2_ds.errors import UserError
from flux2_ds.model.lora import add_lora, lora_config
from flux2_ds.model.pipeline import load_image_pipeline
from flux2_ds.ops.quantized_linear import QuantizedLinear, dequantize
from flux2_ds.run.run_dir import export_path, write_run_dir
from flux2_ds.training.previews import Prompt, open_reference, render

CPU = torch.device("cpu")


def previewed(model: Path, run_dir: Path, method: str = "lora") -> Recipe:
    return dataclasses.replace(
        recipe_for(model, run_dir, method),
        preview=Preview(prompts=["a cat", "a dog"], height=64, width=96, steps=2),
        launch=Launch(accelerator="cpu"),
    )


def exported(recipe: Recipe, spec: Spec, write_checkpoint: Callable[..., Path]) -> Path:
    model = trained(recipe, spec)
    (file,) = export_as(recipe, save(model, recipe, write_checkpoint), layout="diffusers")
    return file


def unrounded(pipeline: Any) -> Any:
    """The pipeline, giving what the VAE decodes: in 8 bits tiny models' images are all alike."""
    pipeline.image_processor.postprocess = lambda image, **_: list(image)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Any, references: list[Image.Image]) -> torch.Tensor:
    """What diffusers renders from the prompts."""
    images = [
        pipeline(
            prompt=prompt, image=references or None, height=64, width=96, num_inference_steps=2,
            guidance_scale=4.0, generator=torch.Generator().manual_seed(0),
        ).images[0]
        for prompt in ("a cat", "a dog")
    ]  # fmt: skip
    return torch.stack(images)


@pytest.mark.parametrize(("method", "base"), [("lora", "nf4"), ("dora", None), ("full", None)])
def test_both_columns_are_diffusers_own(
    method: str,
    base: Any,
    tiny_model: Path,
    tiny_spec: Spec,
    tmp_path: Path,
    write_checkpoint: Callable[..., Path],
) -> None:
    recipe = previewed(tiny_model, tmp_path / "run", method)
    lora = dataclasses.replace(recipe.lora, dropout=0.5)
    recipe = dataclasses.replace(recipe, base_weights=base, lora=lora)
    file = exported(recipe, tiny_spec, write_checkpoint)
    references = [Image.new("RGB", (64, 80), (250, 20, 20))]

    prompts = sample.encode_prompts(recipe, tiny_spec, tiny_model, CPU)
    # As after a resume with another alpha: the file's own counts.
    recipe = dataclasses.replace(recipe, lora=dataclasses.replace(recipe.lora, alpha=60.0))
    model = sample.load_transformer(recipe, tiny_model, CPU)
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert bool(quantized) == (base is not None)
    pipeline = unrounded(load_image_pipeline(tiny_model, tiny_spec, model, CPU))
    before = images(pipeline, recipe, prompts, references)
    if method == "full":
        pipeline.transformer = sample.load_transformer(recipe, file.parent, CPU)
    else:
        sample.put_adapter(model, sample.read_adapter(file, tiny_spec))
    after = images(pipeline, recipe, prompts, references)

    reference = unrounded(load_pipeline(tiny_model, tiny_spec, torch.float32))
    for name, linear in quantized.items():
        stored = dequantize(linear.quantized()).bfloat16()
        reference.transformer.get_submodule(name).weight.data = stored.float()
    torch.testing.assert_close(before, theirs(reference, references), rtol=0, atol=1e-4)
    assert (before - theirs(reference, [])).abs().max() > 5e-3
    if method == "full":
        reference.transformer = Flux2Transformer2DModel.from_pretrained(file)
    else:
        reference.load_lora_weights(str(file.parent), weight_name=file.name)
    torch.testing.assert_close(after, theirs(reference, references), rtol=0, atol=1e-3)
    assert (before - after).abs().max() > 5e-2

    if method == "full":
        sample.check_transformer(file)
        assert not list(file.parent.glob("*.partial")) and (file / "config.json").is_file()
        (weights,) = file.glob("*.safetensors")
        content = weights.read_bytes()
        weights.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        with pytest.raises(UserError, match=rf"{weights.name} is not what was exported"):
            sample.check_transformer(file)


def images(
    pipeline: Any, recipe: Recipe, prompts: list[Prompt], references: list[Image.Image]
) -> torch.Tensor:
    return torch.stack([render(pipeline, recipe.preview, p, references) for p in prompts])


def test_an_adapter_of_any_run_and_every_strength(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    recipe = previewed(tiny_model, tmp_path / "run")
    file = exported(recipe, tiny_spec, write_checkpoint)
    model = sample.load_transformer(recipe, tiny_model, CPU)
    inputs = noise(tiny_spec, 24)
    with attention_backend("native"), torch.no_grad():
        base = model(**inputs).sample
        sample.put_adapter(model, sample.read_adapter(file, tiny_spec))
        full = model(**inputs).sample
        sample.set_strength(model, 0)
        torch.testing.assert_close(model(**inputs).sample, base)
        sample.set_strength(model, 0.5)
        half = model(**inputs).sample
        sample.set_strength(model, 1)
        assert torch.equal(model(**inputs).sample, full)
    assert min((half - base).abs().max(), (full - half).abs().max()) > 1e-3


def test_a_damaged_adapter_is_refused(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    file = exported(previewed(tiny_model, tmp_path / "run"), tiny_spec, write_checkpoint)
    tensors = safetensors.load_file(file)
    name = next(iter(tensors))
    broken = {
        "cut": file.read_bytes()[:-100],
        "none": b"not an adapter",
        "flipped": (whole := file.read_bytes())[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        "header": whole.replace(b'"modelspec.', b'"modelspek.', 1),
        "unsigned": whole.replace(b"flux2_ds.sha256", b"flux2_ds.shb256"),
        "nan": safetensors.save({**tensors, name: tensors[name] * float("nan")}),
        "other": safetensors.save(
            {key: tensor[:, :-1].contiguous() for key, tensor in tensors.items()}
        ),
        "empty": safetensors.save({}),
    }
    for kind, content in broken.items():
        path = tmp_path / f"{kind}.safetensors"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{kind}\.safetensors cannot be used as an adapter"):
            sample.read_adapter(path, tiny_spec)


def test_images_of_other_settings_are_not_written_over(tmp_path: Path) -> None:
    first, again, other = (
        sample.free_output(tmp_path / "samples/a.png", {"prompts": prompts}, given=False)
        for prompts in (["a cat"], ["a cat"], ["a dog"])
    )
    assert (first, again) == (tmp_path / "samples/a.png",) * 2
    assert other == tmp_path / "samples/a-2.png"
    with pytest.raises(UserError, match="--output"):
        sample.free_output(tmp_path / "samples/a.png", {"prompts": ["a dog"]}, given=True)


@pytest.mark.parametrize(
    ("size", "reason"), [(None, "No such file"), ((32, 64), "too small"), ((64, 640), "ratio")]
)
def test_references_that_cannot_be_used(
    tmp_path: Path, size: tuple[int, int] | None, reason: str
) -> None:
    path = tmp_path / "reference.png"
    if size is not None:
        Image.new("RGB", size).save(path)
    with pytest.raises(UserError, match=rf"(?s)preview\.references: .*reference\.png .*{reason}"):
        open_reference(str(path), Preview())


def test_references_are_read_as_in_training(tmp_path: Path) -> None:
    """Transparent parts are white, and 16 bits are scaled."""
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((64, 64), 0x7F00, np.uint16)).save(tmp_path / "scan.png")
    for name, level in (("clear.png", 255), ("scan.png", 0x7F)):
        assert (np.asarray(open_reference(str(tmp_path / name), Preview())) == level).all()
        assert (load_reference(str(tmp_path / name), Bucket(64, 64)) == level).all()


def test_a_reference_of_the_previews_proportions_has_its_size(tmp_path: Path) -> None:
    preview = Preview(height=128, width=192)
    for size, expected in (((600, 400), (192, 128)), ((600, 500), (600, 500))):
        Image.new("RGB", size).save(tmp_path / "reference.png")
        assert open_reference(str(tmp_path / "reference.png"), preview).size == expected


def test_sizes_are_those_of_what_is_loaded(tiny_model: Path, tiny_spec: Spec) -> None:
    for base, placement in ((None, "gpu"), ("fp8", "host"), ("nf4", "gpu")):
        recipe = dataclasses.replace(
            previewed(tiny_model, Path("unused")),
            precision="bf16",
            base_weights=base,
            base_placement=placement,
        )
        model = sample.load_transformer(recipe, tiny_model, CPU)
        pipeline = load_image_pipeline(tiny_model, tiny_spec, model, CPU)
        config = lora_config(tiny_spec, recipe.lora)
        add_lora(model, config, 0)
        held = [*model.parameters(), *pipeline.vae.parameters(), *pipeline.vae.buffers()]
        found = sample.part_bytes(recipe, tiny_spec, tiny_model, [])
        # Blocks that pass through a buffer share its memory.
        storages = {s.data_ptr(): s.nbytes() for s in map(torch.Tensor.untyped_storage, held)}
        assert found["weights"] == pytest.approx(sum(storages.values()), rel=0.01)
    encoder = load_pipeline(tiny_model, tiny_spec, torch.bfloat16).text_encoder
    assert found["text encoder"] == pytest.approx(encoder.get_memory_footprint(), rel=0.01)


class Live(TorchDispatchMode):
    """Counts bytes of tensors that exist at once, beside those that are known."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.peak = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if torch.is_tensor(tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.sizes.values()))
        return output


def noise(spec: Spec, tokens: int) -> dict[str, torch.Tensor]:
    """The transformer's inputs for an image of so many tokens."""
    guidance = {"guidance": torch.ones(1)} if spec.guidance else {}
    return guidance | {
        "hidden_states": torch.randn(1, tokens, 128),
        "encoder_hidden_states": torch.randn(1, 512, spec.text_width),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(tokens, 4),
        "txt_ids": torch.zeros(512, 4),
    }


def test_an_image_takes_what_is_counted(tiny_model: Path, tiny_spec: Spec) -> None:
    """Of both parts the peak of living tensors is the formula's, and hardly more."""
    recipe = previewed(tiny_model, Path("unused"))
    recipe = dataclasses.replace(recipe, preview=Preview(height=512, width=384, steps=1))
    model = sample.load_transformer(recipe, tiny_model, CPU)
    vae = load_image_pipeline(tiny_model, tiny_spec, model, CPU).vae
    stored = sample.stored_shapes(tiny_model / "vae")
    (channels,) = stored["decoder.conv_norm_out.weight"]
    tokens, pixels = 32 * 24, 512 * 384
    inputs = noise(tiny_spec, tokens)
    latent = torch.randn(1, 32, 64, 48)
    given = [*model.parameters(), *vae.parameters(), *vae.buffers(), latent, *inputs.values()]
    with attention_backend("native"), torch.no_grad():  # diffusers keeps the one last set
        with Live(given) as forward:
            model(**inputs)
        with Live(given) as decoding:
            vae.decode(latent)
    for live, counted in ((forward, (tokens, 0)), (decoding, (0, pixels))):
        least = rendering_bytes(tiny_spec, None, 4, *counted, channels)
        assert least <= live.peak < 1.15 * least
    found = sample.part_bytes(recipe, tiny_spec, tiny_model, [])["image"]
    assert found == pytest.approx(max(forward.peak, decoding.peak), rel=0.15)
    references = 3 * [Image.new("RGB", (2048, 1024))]  # of which the pipeline takes 1024² px
    more = sample.part_bytes(recipe, tiny_spec, tiny_model, references)["image"]
    assert more == rendering_bytes(tiny_spec, None, 4, tokens + 3 * 4096, 0, 0) > found


@pytest.mark.parametrize("attention", ["auto", "math"])
def test_attention_is_the_recipes(attention: Any, tiny_model: Path, tiny_spec: Spec) -> None:
    recipe = dataclasses.replace(previewed(tiny_model, Path("unused")), attention=attention)
    inputs = noise(tiny_spec, 24)
    native = sample.load_transformer(previewed(tiny_model, Path("unused")), tiny_model, CPU)
    with attention_backend("native"), torch.no_grad():
        model = sample.load_transformer(recipe, tiny_model, CPU)
        with torch.profiler.profile() as profile:
            found = model(**inputs).sample
        fused = {e.key for e in profile.key_averages() if "flash_attention" in e.key}
        assert bool(fused) == (attention == "auto")
        torch.testing.assert_close(found, native(**inputs).sample, rtol=1e-4, atol=1e-5)


def test_what_memory_cannot_hold_is_refused(tmp_path: Path) -> None:
    recipe = previewed(tmp_path, tmp_path)
    sample.check_room(recipe, "transformer", 60 << 30, 60 << 30)
    text = {"prepare": Prepare(text_weights="nf4")}
    for changes, part, told in (
        ({"base_weights": "fp8"}, "transformer", r"base_weights fp8 .*Set base_weights: nf4, or"),
        (
            {"base_weights": "nf4"},
            "transformer",
            r"base_weights nf4 .* free\. Set base_placement: host, or run sample on a larger",
        ),
        (
            {"base_weights": "nf4", "base_placement": "host"},
            "transformer",
            r"base_weights nf4 .* free\. Run sample on a larger",
        ),
        ({"method": "full"}, "transformer", r"precision fp32 .* free\. Run sample on a larger"),
        ({"prepare": Prepare(text_weights="int8")}, "text encoder", "int8 .*text_weights: nf4, or"),
        (text, "text encoder", r"Set prepare\.text_device: cpu, or run"),
        ({}, "image", r"96x64 px .*Set smaller preview\.width .* or base_weights: nf4, or"),
    ):
        changed = dataclasses.replace(recipe, **changes)
        size = r"takes at least 32\.0 GiB, and 23\.5 GiB are free"
        with pytest.raises(UserError, match=f"{part} .*{size}"):
            sample.check_room(changed, part, 32 << 30, int(23.5 * 2**30))
        with pytest.raises(UserError, match=told):
            sample.check_room(changed, part, 32 << 30, int(23.5 * 2**30))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("encode_prompts", r"the text encoder .* 9 GiB\)\. Set prepare\.text_weights: nf4"),
        ("load_transformer", r"the transformer with .* 9 GiB\)\. Set base_weights: nf4"),
        ("render", r"an image of 96x64 px over .* 9 GiB\)\. Set smaller preview\.width"),
    ],
)
def test_a_card_that_is_too_small_after_all(
    where: str,
    message: str,
    tiny_model: Path,
    tiny_spec: Spec,
    tmp_path: Path,
    write_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = previewed(tiny_model, tmp_path / "run")
    exported(recipe, tiny_spec, write_checkpoint)
    write_run_dir(make_plan(recipe, 1))
    command = ["sample", "--config", str(tmp_path / "run" / "recipe.yaml")]

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nGPU 0 has")

    monkeypatch.setattr(sample, where, full)
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(UserError, match=f"the card's memory is not enough for {message}"):
        sample.main()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", [*command, "--launch.accelerator", "cuda"])
    with pytest.raises(UserError, match=r"no GPU is visible .*add --launch\.accelerator cpu"):
        sample.main()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_newest_export_of_the_weights_asked_for_is_chosen(tmp_path: Path, method: str) -> None:
    recipe = previewed(tmp_path, tmp_path / "run[1]", method)
    for step, weights in ((3, "trained"), (7, "trained"), (7, "ema"), (9, "ema")):
        path = export_path(recipe, step, weights)  # type: ignore[arg-type]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert sample.choose_export(recipe, None) == export_path(recipe, 7)
    assert sample.choose_export(recipe, None, "ema") == export_path(recipe, 9, "ema")
    assert sample.step_of(export_path(recipe, 9, "ema")) == 9
    with pytest.raises(UserError, match="export --weights ema"):
        sample.choose_export(recipe, 3, "ema")


def test_an_output_that_is_no_image_is_refused() -> None:
    check_format("--output", Path("a.PNG"))
    for name in ("a", "a.txt"):
        with pytest.raises(UserError, match=rf"--output {name}: no image format"):
            check_format("--output", Path(name))
