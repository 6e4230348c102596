"""Adapters and exact timesteps on a small transformer of the real class."""

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from factories import SPECS, build_transformer
from torch import nn

from flux2_ds.config.model_spec import Spec, target_modules
from flux2_ds.config.recipe import Data, Lora, Model, Recipe
from flux2_ds.model import transformer
from flux2_ds.model.lora import add_lora, lora_config
from flux2_ds.ops.fp8_linear import Fp8Linear


def inputs(spec: Spec, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 6, 128, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(2, 5, 48, generator=generator).to(dtype),
        "timestep": torch.tensor([0.7771, 0.3337]),
        "img_ids": torch.tensor([(0.0, y, x, 0) for y in range(2) for x in range(3)]),
        "txt_ids": torch.tensor([(0.0, 0, 0, i) for i in range(5)]),
        "guidance": torch.ones(2) if spec.guidance else None,
    }


@pytest.mark.parametrize("variant", SPECS)
@pytest.mark.parametrize(
    ("targets", "double", "single"), [("all", 12, 2), ("attention", 8, 2), ("diffusers", 4, 2)]
)
def test_target_sets_match_the_model(variant: str, targets: str, double: int, single: int) -> None:
    spec = SPECS[variant]
    model = build_transformer(spec)
    names = target_modules(spec, targets)
    assert (
        len(names) == len(set(names)) == double * spec.double_blocks + single * spec.single_blocks
    )
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in names)
    if targets == "all":
        linears = {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and "transformer_blocks" in name
        }
        assert set(names) == linears


@pytest.mark.parametrize("variant", SPECS)
def test_gradients_of_fp8_products_point_where_those_of_bf16_do(variant: str) -> None:
    """Block by block, and of what stays in bf16; measured: 0.998 at least."""
    spec, gradients = SPECS[variant], []
    outer = (
        "transformer_blocks.0.",
        f"single_transformer_blocks.{SPECS[variant].single_blocks - 1}.",
    )
    for compute in ("precision", "fp8"):
        model = build_transformer(spec, torch.bfloat16)
        transformer.keep_timestep_exact(model)
        recipe = Recipe(
            run_dir="r", model=Model(path="m"), data=Data(images="i", shards="s"), method="full",
            compute=compute,
        )  # fmt: skip
        transformer.make_trainable(model, spec, recipe)
        given = inputs(spec) | {
            "encoder_hidden_states": inputs(spec)["encoder_hidden_states"].bfloat16()
        }
        model(**given).sample.float().square().mean().backward()
        gradients.append({name: p.grad.float() for name, p in model.named_parameters()})
        in_fp8 = {n for n, m in model.named_modules() if isinstance(m, Fp8Linear)}
        inner = {n for n in target_modules(spec, "all") if not n.startswith(outer)}
        assert in_fp8 == (inner if compute == "fp8" else set())
        assert not any(p.dtype != torch.bfloat16 for p in model.parameters())
    blocks: dict[str, list[list[torch.Tensor]]] = {}
    for name, plain in gradients[0].items():
        of_block = blocks.setdefault(".".join(name.split(".")[:2]), [[], []])
        for parts, grad in zip(of_block, (plain, gradients[1][name]), strict=True):
            parts.append(grad.flatten())
    cosines = {
        name: float(torch.nn.functional.cosine_similarity(torch.cat(plain), torch.cat(fp8), dim=0))
        for name, (plain, fp8) in blocks.items()
    }
    assert 0.995 < min(cosines.values()) < 0.9995, cosines


@pytest.mark.parametrize("variant", SPECS)
@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing(variant: str, dora: bool) -> None:
    """B is zero: the output is that of the base, to the last bit (DoRA: to rounding)."""
    spec = SPECS[variant]
    model = build_transformer(spec)
    with torch.no_grad():
        before = model(**inputs(spec)).sample
        add_lora(model, lora_config(spec, Lora(rank=4), "dora" if dora else "lora"), seed=0)
        after = model(**inputs(spec)).sample
    if dora:
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(after, before)


def test_only_the_adapter_is_trained_and_it_is_fp32() -> None:
    spec = SPECS["klein"]
    model = build_transformer(spec, torch.bfloat16)
    add_lora(model, lora_config(spec, Lora(rank=4)), seed=0)
    named = transformer.trainable(model)
    assert len(named) == 2 * (12 * 2 + 2 * 3)
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in named.items())
    base = [p for name, p in model.named_parameters() if "lora_" not in name]
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in base)


def test_the_adapter_depends_on_its_seed_alone() -> None:
    spec = SPECS["klein"]

    def weights(seed: int, disturb: int) -> list[torch.Tensor]:
        model = build_transformer(spec)
        torch.manual_seed(disturb)
        state = torch.random.get_rng_state()
        add_lora(model, lora_config(spec, Lora(rank=4)), seed)
        assert torch.equal(torch.random.get_rng_state(), state)
        return list(transformer.trainable(model).values())

    first, again, other = weights(3, 0), weights(3, 1), weights(4, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("variant", SPECS)
def test_the_timestep_reaches_its_embedding_exactly(variant: str) -> None:
    """In bf16 diffusers would round 777.1 to 776 before the sinusoids."""
    spec = SPECS[variant]
    model = build_transformer(spec, torch.bfloat16)
    seen: dict[str, torch.Tensor] = {}
    model.time_guidance_embed.time_proj.register_forward_hook(
        lambda module, args, output: seen.setdefault("sinusoids", output)
    )
    transformer.keep_timestep_exact(model)
    with torch.no_grad():
        given = inputs(spec)
        model(**given)
    t = given["timestep"]
    assert t is not None
    expected = get_timestep_embedding(
        t.double() * 1000, 256, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    torch.testing.assert_close(seen["sinusoids"].double(), expected.double(), rtol=0, atol=2e-4)
    rounded = get_timestep_embedding(
        t.bfloat16() * 1000, 256, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    assert (rounded - expected).abs().max() > 0.1


@pytest.mark.parametrize("variant", SPECS)
def test_exact_timesteps_leave_an_fp32_model_as_it_is(variant: str) -> None:
    spec = SPECS[variant]
    model = build_transformer(spec)
    with torch.no_grad():
        before = model(**inputs(spec)).sample
        transformer.keep_timestep_exact(model)
        assert torch.equal(model(**inputs(spec)).sample, before)


@pytest.mark.parametrize("variant", SPECS)
def test_the_hooks_change_nothing_but_the_timestep(variant: str) -> None:
    """With t and guidance that bf16 holds exactly, the bf16 model gives what diffusers gives."""
    spec = SPECS[variant]
    given = inputs(spec) | {"timestep": torch.tensor([0.5, 0.25])}
    given |= {name: given[name].bfloat16().float() for name in ("hidden_states",)}  # type: ignore[union-attr]
    plain, hooked = build_transformer(spec, torch.bfloat16), build_transformer(spec, torch.bfloat16)
    transformer.keep_timestep_exact(hooked)
    lower = {
        name: value.bfloat16() if name in ("hidden_states", "encoder_hidden_states") else value
        for name, value in given.items()
    }
    with torch.no_grad():
        expected, found = plain(**lower).sample, hooked(**given).sample
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_what_overflows_fp16_is_clamped() -> None:
    """diffusers clamps the residual stream if it is fp16: nothing of ours may widen it."""
    spec = SPECS["klein"]
    largest = {}
    for dtype in (torch.float32, torch.float16):
        model = build_transformer(spec)
        transformer.keep_timestep_exact(model)
        add_lora(model, lora_config(spec, Lora(rank=4)), seed=0)
        block = model.single_transformer_blocks[0]
        block.attn.to_out.weight.data *= 3e5  # still within fp16 itself
        model.single_stream_modulation.linear.weight.data *= 30
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.to(dtype)
        outputs: list[torch.Tensor] = []
        block.register_forward_hook(lambda module, args, output, kept=outputs: kept.append(output))
        with torch.no_grad():
            assert model(**inputs(spec)).sample.isfinite().all()
        largest[dtype] = outputs[0].abs().max()
    assert largest[torch.float32] > 65504 == largest[torch.float16]
