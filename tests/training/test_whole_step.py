"""From picture and caption files to loss and LoRA gradients, as the trainer computes them and as a step
written from diffusers' public classes computes them. The two share the files and the random numbers."""

import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from peft import LoraConfig
from PIL import Image
from transformers import AutoTokenizer

from flux2_ds.config.model_spec import Spec
from flux2_ds.config.plan import Plan
from flux2_ds.config.recipe import Batch, Data, Launch, Lora, Model, Objective, Recipe
from flux2_ds.data.index import Index
from flux2_ds.data.loader import draw
from flux2_ds.data.order import Order
from flux2_ds.data.shards import ShardReader, read_conditioning
from flux2_ds.distributed import Process
from flux2_ds.model import transformer
from flux2_ds.prepare import __main__ as prepare
from flux2_ds.training.build import build_loader, build_model, build_objective

HEIGHT, WIDTH = 48, 80
REFERENCES = [(64, 64), (64, 96)]
COLUMNS = 2  # of tokens in the mask
CAPTIONS = {"a": "a red boat on a lake", "b": "An old lighthouse, seen from the sea."}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Relative: on the loss, and on the norm of each gradient's error. Measured: 6e-8 and 2e-6 in fp32, 2e-4
# and 0.035 in bf16, 2e-5 and 0.015 in fp16.
TOLERANCES = {"fp32": (1e-6, 1e-4), "bf16": (2e-3, 0.06), "fp16": (2e-4, 0.03)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of exactly their bucket's size, so that nothing is cropped, each with references,
    one with a mask that leaves the right."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)

    def save(name: str, height: int, width: int) -> None:
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")

    for name, caption in CAPTIONS.items():
        save(name, HEIGHT, WIDTH)
        (folder / f"{name}.txt").write_text(caption)
        for number, size in enumerate(REFERENCES, start=1):
            save(f"{name}.reference{number}", *size)
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[:, WIDTH - 16 * COLUMNS :] = 255
    Image.fromarray(mask).save(folder / "a.mask.png")
    return folder


# The last: with the settings of the objective that are off by default.
OFF_BY_DEFAULT = Objective(caption_dropout=1.0, stratified=True, masked_loss=True)
CASES = [
    ("fp32", Objective()),
    ("bf16", Objective()),
    ("fp16", Objective()),
    ("fp32", OFF_BY_DEFAULT),
]


@pytest.fixture(scope="module", params=CASES)
def recipe(request: Any, tiny_model: Path, photos: Path, tmp_path_factory: Any) -> Recipe:
    return Recipe(
        run_dir="unused",
        precision=request.param[0],
        objective=request.param[1],
        model=Model(path=str(tiny_model)),
        data=Data(
            images=str(photos),
            shards=str(tmp_path_factory.mktemp("step") / "shards"),
            resolution=64,
            bucket_step=16,
        ),
        lora=Lora(rank=4),
        batch=Batch(global_size=2, micro_size=2),
        launch=Launch(accelerator="cpu"),
    )


def ours(recipe: Recipe, spec: Spec) -> tuple[Any, torch.Tensor, list[tuple[str, int]], list[Any]]:
    """The trained model after a backward pass, the loss, each sample's (caption, position), and what
    the sinusoids of t were made of."""
    index: Index = prepare.prepare(recipe, Path(recipe.model.path), spec)
    process = Process(0, 1, torch.device("cpu"))
    conditioning = read_conditioning(recipe.data.shards, index)
    order = Order(index, recipe.batch.global_size, recipe.seed, recipe.data.shuffle_window)
    loader = build_loader(recipe, index, order, process, conditioning)
    objective = build_objective(recipe, spec, conditioning, process.device)
    # Not `make_plan`, which refuses fp16 on the CPU because of DeepSpeed; there is no engine here.
    plan = Plan(recipe, 1, 1, {})
    model, _ = build_model(Path(recipe.model.path), spec, plan, process, index.largest_tokens)

    def check_dtype(module: torch.nn.Module, args: Any, output: Any) -> None:
        streams = output if isinstance(output, tuple) else (output,)
        assert {stream.dtype for stream in streams} == {DTYPES[recipe.precision]}

    generator = torch.Generator().manual_seed(9)
    for name, parameter in transformer.trainable(model).items():
        if "lora_B" in name:  # zero at the start, which would leave A without gradients
            parameter.data.normal_(0, 0.05, generator=generator)
    seen: list[Any] = []
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.register_forward_hook(check_dtype)
    model.time_guidance_embed.time_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    (batch,) = loader.read(0)
    loss = objective.loss(lambda **given: model(**given, return_dict=False)[0], batch)
    scale = 2.0**16 if recipe.precision == "fp16" else 1.0  # as DeepSpeed's loss scaler begins
    (loss * scale).backward()
    for parameter in transformer.trainable(model).values():
        parameter.grad /= scale
    samples = []
    for sample in batch.samples:
        shard = index.shards[sample.shard]
        meta = ShardReader(Path(recipe.data.shards) / shard.name, shard).meta(sample.row)
        samples.append((Path(meta["source"]).stem, sample.position))
    return model, loss, samples, seen


def theirs(
    recipe: Recipe, spec: Spec, photos: Path, samples: list[tuple[str, int]], adapter: dict
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Model, loss and t of the same step, in fp32 on the weights that the precision stores."""
    directory, dtype = Path(recipe.model.path), DTYPES[recipe.precision]
    pipeline = getattr(diffusers, spec.pipeline).from_pretrained(
        directory, tokenizer=None, dtype=torch.float32
    )
    # transformers offers dev's PixtralProcessor only beside torchvision.
    side = "right" if spec.variant == "klein" else "left"
    pipeline.tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer", padding_side=side)
    pipeline.text_encoder.to(torch.float32 if dtype == torch.float32 else torch.bfloat16)
    model = Flux2Transformer2DModel.from_pretrained(directory / "transformer", dtype=dtype).float()
    model.requires_grad_(False)
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    blocks = [name for name in linears if "transformer_blocks" in name]
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=blocks))
    missing, unexpected = model.load_state_dict(adapter, strict=False)
    assert not unexpected and not [name for name in missing if "lora" in name]

    pictures = [Image.open(photos / f"{name}.png") for name, _ in samples]
    pixels = pipeline.image_processor.preprocess(pictures, height=HEIGHT, width=WIDTH)
    with torch.no_grad():
        latents = pipeline._encode_vae_image(pixels, generator=None)
        dropped = recipe.objective.caption_dropout == 1
        captions = ["" if dropped else CAPTIONS[name] for name, _ in samples]
        text, text_ids = pipeline.encode_prompt(captions)
    x0 = pipeline._pack_latents(latents).double()
    tokens = (HEIGHT // 16) * (WIDTH // 16)
    assert x0.shape == (2, tokens, 128)
    draws = [draw(recipe.seed, position, tokens) for _, position in samples]
    conditions = [
        pipeline.prepare_image_latents(
            [
                pipeline.image_processor.preprocess(Image.open(photos / f"{name}.reference{k}.png"))
                for k in (1, 2)
            ],
            batch_size=1,
            generator=None,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        for name, _ in samples
    ]
    references, reference_ids = (torch.cat(each) for each in zip(*conditions, strict=True))
    noise = torch.stack([each.noise for each in draws]).double()
    deviates = torch.tensor([each.deviate for each in draws], dtype=torch.float64)
    if recipe.objective.stratified:  # two samples: one in the lower half, one in the upper
        halves = torch.tensor([position % 2 for _, position in samples])
        deviates = torch.special.ndtri((halves + torch.special.ndtr(deviates)) / 2)
    t = torch.sigmoid(deviates)
    s = math.exp(0.5 + 0.65 * (tokens - 256) / (4096 - 256))
    t = s * t / (1 + (s - 1) * t)
    x_t = (1 - t[:, None, None]) * x0 + t[:, None, None] * noise
    prediction = model(
        hidden_states=torch.cat([x_t.float(), references], dim=1),
        encoder_hidden_states=text.to(dtype).float(),
        timestep=t.float(),
        img_ids=torch.cat([pipeline._prepare_latent_ids(latents), reference_ids], dim=1),
        txt_ids=text_ids,
        guidance=torch.ones(2) if spec.variant == "dev" else None,
    ).sample[:, :tokens]
    if recipe.objective.masked_loss:
        errors = (prediction - (noise - x0)).square().view(2, HEIGHT // 16, WIDTH // 16, 128)
        means = {"a": lambda e: e[:, -COLUMNS:].mean(), "b": lambda e: e.mean()}
        loss = sum(means[name](errors[row]) for row, (name, _) in enumerate(samples)).float() / 2
    else:
        loss = torch.nn.functional.mse_loss(prediction, (noise - x0).float())
    loss.backward()
    return model, loss, t


def test_the_step_from_files_to_gradients(recipe: Recipe, tiny_spec: Spec, photos: Path) -> None:
    model, loss, samples, seen = ours(recipe, tiny_spec)
    assert {name for name, _ in samples} == set(CAPTIONS)
    adapter = {n: p.detach() for n, p in transformer.trainable(model).items()}
    reference, expected, t = theirs(recipe, tiny_spec, photos, samples, adapter)
    on_loss, on_gradients = TOLERANCES[recipe.precision]

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=on_loss, atol=0)
    # What enters the sinusoids is 1000 t to the precision of fp32, whatever the model computes in.
    torch.testing.assert_close(seen[0].double(), 1000 * t, rtol=1e-6, atol=0)
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    assert wanted.keys() == adapter.keys()
    for name, parameter in transformer.trainable(model).items():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and wanted[name].norm() > 0, name
        error = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
        assert error < on_gradients, f"{name}: {error:.4f}"
