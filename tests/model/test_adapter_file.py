"""An adapter file becomes the adapter that it was written from, or part of the base; or says why not."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import ONE_OF_EACH, SPECS, build_transformer, error, gaussian
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from flux2_ds.config.adapter import adapted_linears
from flux2_ds.config.adapter_file import settings_of_file, with_file
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.recipe import Data, Log, Lora, Model, Recipe
from flux2_ds.data.dataset import check_run
from flux2_ds.errors import UserError
from flux2_ds.model.adapter_layouts import (
    Adapter,
    Hadamard,
    Kronecker,
    Update,
    bfl_tensors,
    change_rows,
    diffusers_tensors,
    kohya_tensors,
    lycoris_tensors,
)
from flux2_ds.model.adapter_programs import read_file
from flux2_ds.model.load import read_weights
from flux2_ds.model.lora import LoraLinear, add_lora, lora_config, set_adapter
from flux2_ds.model.merge import BaseWeights, initial_adapter, merge_into
from flux2_ds.model.safetensors_file import write_adapter
from flux2_ds.model.transformer import empty_transformer

SPEC = SPECS["klein"]
Tensors = dict[str, torch.Tensor]
LAYOUTS = {"diffusers": diffusers_tensors, "bfl": bfl_tensors, "kohya": kohya_tensors,
           "lycoris": lycoris_tensors}  # fmt: skip
SETTINGS = {
    "all": Lora(rank=4, alpha=6.0),
    "rslora": Lora(rank=4, rslora=True, targets="diffusers"),
    "patterns": Lora(
        rank=4,
        alpha=6.0,
        targets=["attn.to_[qv]", "attn.to_out", "ff.*"],
        rank_pattern={"attn.to_q": 2, "linear_in": 7},
        alpha_pattern={"attn.to_v": 3.0},
    ),
}


def adapter_of(
    settings: Lora, spec: Spec = SPEC, dora: bool = False, method: str = "lora"
) -> Adapter:
    adapter: Adapter = {}
    for seed, (name, linear) in enumerate(adapted_linears(spec, settings).items()):
        down = gaussian(linear.rank, linear.columns, seed=seed)
        up = gaussian(linear.rows, linear.rank, seed=seed + 500) / 20
        magnitude = gaussian(linear.rows, seed=seed).abs() + 0.5 if dora else None
        adapter[name] = Update(down, up, magnitude)
        if method == "loha":
            adapter[name] = Hadamard(adapter[name], Update(down.roll(1, 1), up.roll(1, 0)))
        if method == "lokr":
            (a, b), (c, d) = linear.kronecker.shape
            r, full = linear.rank, linear.kronecker.full[1]
            shapes = [(b, d)] if full else [(b, r), (r, d)]
            w2 = tuple(gaussian(*shape, seed=seed + n) for n, shape in enumerate(shapes))
            adapter[name] = Kronecker(gaussian(a, c, seed=seed + 9), w2)
    return adapter


def write(path: Path, tensors: Tensors, **metadata: str) -> str:
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if metadata:  # as flux2-ds
        write_adapter(path, tensors, metadata)
    else:
        save_file(tensors, path, {"format": "pt"})
    return str(path)


@pytest.mark.parametrize("says", [True, False], ids=["of flux2-ds", "of another program"])
@pytest.mark.parametrize("layout", ["diffusers", "bfl", "kohya"])
@pytest.mark.parametrize("which", SETTINGS)
def test_a_run_begins_as_the_file(which: str, layout: str, says: bool, tmp_path: Path) -> None:
    settings = SETTINGS[which]
    adapter = adapter_of(settings)
    metadata = {"flux2_ds.lora": json.dumps(asdict(settings))} if says else {}
    path = write(tmp_path / "a.safetensors", LAYOUTS[layout](adapter), **metadata)
    found, method, _ = settings_of_file("lora.init_from", path, SPEC)
    assert method == "lora"
    if says:
        assert found == settings
    elif which != "patterns":
        assert (found.alpha, found.targets) == (None, settings.targets)
    model = build_transformer(SPEC)
    add_lora(model, lora_config(SPEC, found), seed=0)
    set_adapter(model, read_file("lora.init_from", path, SPEC))
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            scale, pair = module.scaling["default"], (module.lora_B, module.lora_A)
            up, down = (each["default"].weight for each in pair)
            if name in adapter:
                assert error(scale * up @ down, adapter[name].up @ adapter[name].down) < 1e-6
            else:  # k, in one module with the q and v of another program
                assert not says and layout != "diffusers" and not up.any()
    layers = {n for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    assert layers >= adapter.keys() and (layers == adapter.keys() or not says)


def test_a_dora_begins_as_the_file(tmp_path: Path) -> None:
    settings = Lora(rank=3)
    adapter = adapter_of(settings, dora=True)
    path = write(tmp_path / "a.safetensors", diffusers_tensors(adapter))
    found, method, _ = settings_of_file("lora.init_from", path, SPEC)
    assert method == "dora" and found == settings
    model = build_transformer(SPEC)
    empty = "transformer_blocks.0.attn.to_q"
    model.get_submodule(empty).weight.data[5] = 0
    add_lora(model, lora_config(SPEC, found, "dora"), seed=0)
    set_adapter(model, read_file("lora.init_from", path, SPEC))
    for name, update in adapter.items():
        m = model.get_submodule(name).lora_magnitude_vector["default"].weight
        expected = update.magnitude.clone()
        expected[5] *= name != empty  # a row of zeros in W has none
        assert torch.equal(m, expected)


PRODUCTS = {
    "lokr": Lora(rank=4, alpha=2.0),
    "of a factor": Lora(rank=5, factor=4, rank_pattern={"attn.to_out": 99}, targets="diffusers"),
    "loha": Lora(rank=3, alpha=6.0, targets="attention"),
}


@pytest.mark.parametrize("says", [True, False], ids=["of flux2-ds", "of another program"])
@pytest.mark.parametrize("layout", ["lycoris", "kohya"])
@pytest.mark.parametrize("which", PRODUCTS)
def test_a_lokr_or_loha_begins_as_the_file(
    which: str, layout: str, says: bool, tmp_path: Path
) -> None:
    method = "loha" if which == "loha" else "lokr"
    settings = PRODUCTS[which]
    if layout == "kohya" and method == "lokr":
        settings = replace(settings, targets=["attn.to_out", "attn.to_add_out"])
    adapter = adapter_of(settings, method=method)
    metadata = {"flux2_ds.lora": json.dumps(asdict(settings))} if says else {}
    path = write(tmp_path / "a.safetensors", LAYOUTS[layout](adapter), **metadata)
    found, kind, _ = settings_of_file("lora.init_from", path, SPEC)
    assert kind == method and settings_of_file("lora.init_from", path, None).method == method
    model = build_transformer(SPEC)
    add_lora(model, lora_config(SPEC, found, method), seed=0)
    set_adapter(model, read_file("lora.init_from", path, SPEC))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert layers.keys() == adapter.keys()
    for name, layer in layers.items():
        expected = change_rows(adapter[name], slice(None))
        assert error(layer.get_delta_weight("default"), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_alpha_of_other_programs(dtype: torch.dtype, tmp_path: Path) -> None:
    """kohya's in a tensor, PEFT's in the metadata; the strength is the file's."""
    settings = Lora(rank=4, targets="diffusers")
    adapter = adapter_of(settings)
    tensors = kohya_tensors(adapter)
    for name in tensors:
        if name.endswith("alpha"):
            tensors[name] = torch.tensor(2.0 * 3 if "qkv" in name else 2.0, dtype=dtype)
    path = write(tmp_path / "a.safetensors", tensors)
    found, *_ = settings_of_file("lora.init_from", path, SPEC)
    scales = {each.scale for each in adapted_linears(SPEC, found).values()}
    assert scales == {0.5} and found.alpha == 2.0
    halved = read_file("lora.init_from", path, SPEC)
    name = "single_transformer_blocks.0.attn.to_out"
    assert (
        error(halved[name].up @ halved[name].down, adapter[name].up @ adapter[name].down / 2) < 1e-6
    )

    config = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": True,
              "transformer.alpha_pattern": {"attn.to_k": 2}}  # fmt: skip
    path = write(tmp_path / "b.safetensors", diffusers_tensors(adapter),
                 lora_adapter_metadata=json.dumps(config))  # fmt: skip
    found, *_ = settings_of_file("lora.init_from", path, SPEC)
    linears = adapted_linears(SPEC, found)
    assert linears["transformer_blocks.0.attn.to_k"].scale == 1.0
    assert linears["transformer_blocks.0.attn.to_q"].scale == 4.0


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.pop(f"transformer.transformer_blocks.0.attn.to_q.{name}.weight")


def add(name: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def nan(tensors: Tensors) -> None:
    tensors["transformer.transformer_blocks.1.attn.to_q.lora_A.weight"][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("lora_A"), r"lack their other factor; the first is .*to_q\.lora_B"),
        (without("lora_B"), r"lack their other factor; the first is .*to_q\.lora_A"),
        (without("lora_magnitude_vector"), "magnitudes for 29 of 30 linears"),
        (add("transformer.x_embedder.lora_A.weight", 3, 4), "the first is transformer.x_embedder"),
        (add("diffusion_model.single_blocks.0.linear2.dora_scale", 64, 1), "a DoRA of ComfyUI's"),
        (add("transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight", 3, 4), "FLUX.1"),
        (add("transformer.transformer_blocks.18.attn.to_q.lora_A.weight", 3, 4), "a larger model"),
        (lambda tensors: tensors.clear(), "it adapts no linear"),
        (nan, r"transformer_blocks\.1\.attn\.to_q is not finite"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(
    change: Callable[[Tensors], Any], message: str, tmp_path: Path
) -> None:
    tensors = diffusers_tensors(adapter_of(Lora(rank=3), dora=True))
    change(tensors)
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(UserError, match=message):
        read_file("lora.init_from", path, SPEC)


def test_products_that_cannot_be_trained_here_are_refused(tmp_path: Path) -> None:
    lokr = lycoris_tensors(adapter_of(Lora(rank=3), method="lokr"))
    first = "lycoris_transformer_blocks_0_attn_to_q"
    qkv = {
        n.replace(first, "lora_unet_double_blocks_0_img_attn_qkv"): t
        for n, t in lokr.items()
        if first in n
    }
    several = lycoris_tensors(adapter_of(Lora(rank=3, factor=2, targets="attn.to_q"), method="lokr")) | {
        name: tensor for name, tensor in lokr.items() if "to_k" in name
    }  # fmt: skip
    loha = lycoris_tensors(adapter_of(Lora(rank=3), method="loha"))
    for tensors, message in (
        (qkv, "one LoKr for q, k and v"),
        (several, "apart by several factors"),
        ({n: t for n, t in lokr.items() if n != f"{first}.lokr_w1"}, "lack their other factor"),
        (lokr | {f"{first}.lokr_w1": torch.ones(3, 3)}, r"is \[3, 3\] × \[8, 3\]"),
        ({n: t for n, t in loha.items() if n != f"{first}.hada_w2_a"}, "lack their other factor"),
        (loha | {f"{first}.hada_w2_b": torch.ones(3, 9)}, r"\[3, 9\] there"),
        (
            loha | {n: t for n, t in lokr.items() if "to_k" in n},
            "6 tensors are for no linear",
        ),
    ):
        path = write(tmp_path / "a.safetensors", tensors)
        with pytest.raises(UserError, match=message):
            read_file("lora.init_from", path, SPEC)


def test_files_of_another_size_or_none_are_refused(tmp_path: Path) -> None:
    wide = replace(SPEC, heads=4)
    path = write(tmp_path / "a.safetensors", bfl_tensors(adapter_of(Lora(rank=3), wide)))
    with pytest.raises(UserError, match=r"to_q is \[384, 9\] × \[9, 128\] there, and \[192, 64\]"):
        settings_of_file("lora.init_from", path, SPEC)
    assert settings_of_file("lora.init_from", path, wide)[0].targets == "all"
    assert len(settings_of_file("lora.init_from", path, None)[0].targets) == 30
    merging = Recipe(
        run_dir=str(tmp_path / "run"), model=Model(path="m"), data=Data(images="i", shards="s"),
        lora=Lora(merge_first=[path]), log=Log(wandb="disabled"),
    )  # fmt: skip
    check_run(merging, None, wide, None)
    with pytest.raises(UserError, match=r"lora.merge_first .*a\.safetensors .* and \[192, 64\]"):
        check_run(merging, None, SPEC, None)
    settings = json.dumps(asdict(Lora(rank=5)))
    path = write(tmp_path / "b.safetensors", diffusers_tensors(adapter_of(Lora(rank=3))),
                 **{"flux2_ds.lora": settings})  # fmt: skip
    with pytest.raises(UserError, match=r"is damaged: its metadata .* rank 5"):
        settings_of_file("lora.init_from", path, SPEC)
    for metadata in (
        {"flux2_ds.lora": "x"},
        {"flux2_ds.lora": '{"rank": "a"}'},
        {"lora_adapter_metadata": "[]"},
        {
            "lora_adapter_metadata": '{"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"(": 3}}'
        },
    ):
        path = write(tmp_path / "b.safetensors", diffusers_tensors(adapter_of(Lora())), **metadata)
        with pytest.raises(UserError, match="has metadata or an alpha that cannot be read"):
            settings_of_file("lora.init_from", path, SPEC)
    for content in (b"", b"run_dir: x\nsteps: 3\n", b"\2\0\0\0\0\0\0\0{}}"[:9]):
        (tmp_path / "c").write_bytes(content)
        with pytest.raises(UserError, match="is no safetensors file"):
            settings_of_file("lora.merge_first", str(tmp_path / "c"), SPEC)
    with pytest.raises(UserError, match=r"lora.merge_first .* cannot be read"):
        settings_of_file("lora.merge_first", str(tmp_path / "none"), SPEC)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, None),
        ({"rank": 4, "alpha": 6.0}, None),
        ({"targets": ["attn.to_[qkv]", "attn.to_out.*", "attn.to_qkv_mlp_proj"]}, None),
        ({"rank": 8}, "lora.rank is 8, and lora.init_from f has 4"),
        ({"alpha": 4.0}, "lora.alpha is 4.0, .* has 6.0"),
        ({"rslora": True}, "lora.rslora is True"),
        ({"targets": "attention"}, "lora.targets is attention, .* has diffusers"),
        ({"rank_pattern": {"attn.to_q": 2}}, "lora.rank_pattern"),
    ],
)
def test_a_setting_that_contradicts_the_file_is_refused(
    asked: dict[str, Any], message: str | None
) -> None:
    found = Lora(rank=4, alpha=6.0, targets="diffusers")
    given = Lora(init_from="f", dropout=0.1, **asked)
    if message is None:
        assert with_file(given, found, SPEC) == replace(found, init_from="f", dropout=0.1)
    else:
        with pytest.raises(UserError, match=message):
            with_file(given, found, SPEC)


@pytest.mark.parametrize("method", ["lora", "dora", "lokr", "loha"])
@pytest.mark.parametrize("mode", [None, "int8", "nf4"])
def test_adapters_are_merged_into_the_base_in_fp32(
    mode: str | None, method: str, tmp_path: Path
) -> None:
    """W + Σ s·ΔW, one after the other, rounded once, and quantized then; whichever rows are read."""
    plain = build_transformer(ONE_OF_EACH, torch.bfloat16).state_dict()
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / "diffusion_pytorch_model.safetensors")
    merges = [(adapter_of(Lora(rank=3), ONE_OF_EACH, method == "dora", method), 0.7),
              (adapter_of(Lora(rank=2, targets="attn.to_k"), ONE_OF_EACH), -2.0)]  # fmt: skip
    merged = {}
    for name, weight in plain.items():
        changed = weight.double()
        for adapter, strength in merges:
            if (update := adapter.get(name.removesuffix(".weight"))) is not None:
                new = changed + change_rows(update, slice(None)).double()
                if isinstance(update, Update) and update.magnitude is not None:
                    new *= (update.magnitude / new.norm(dim=1))[:, None]
                changed = changed + strength * (new - changed)
        merged[name] = changed
    edit = merge_into(merges)
    for name in ("transformer_blocks.0.attn.to_k.weight", "x_embedder.weight"):
        rows = edit(name, plain[name][5:9], 5, torch.float32)
        assert error(rows, merged[name][5:9]) < 1e-6
        assert error(BaseWeights(tmp_path / "plain", merges).merged(name, {}), merged[name]) < 1e-6
    rounded = {
        name: merged[name].to(torch.float32).bfloat16()
        if f"{name}".endswith("weight")
        else plain[name]
        for name in plain
    }
    (tmp_path / "merged").mkdir()
    save_file(rounded, tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    models = []
    for folder, how in (("plain", {"edit": edit}), ("merged", {})):
        models.append(empty_transformer(ONE_OF_EACH))
        cpu = torch.device("cpu")
        read_weights(models[-1], tmp_path / folder, torch.bfloat16, cpu, mode, **how)
    expected = models[1].state_dict()
    for name, value in models[0].state_dict().items():
        different = (value.float() != expected[name].float()).float().mean()
        assert different < 2e-3, name  # a sum in fp32 may round to the other neighbour


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_begins_as_that_of_peft(init: str, tmp_path: Path) -> None:
    """B·A and what is left of W; of PiSSA's factors the signs are free."""
    model = build_transformer(ONE_OF_EACH)
    for (
        parameter
    ) in model.parameters():  # singular values that fall off, as those of trained weights do
        if parameter.ndim == 2:
            u, s, v = torch.linalg.svd(parameter.data, full_matrices=False)
            parameter.data = (u * s.sort(descending=True)[0] ** 4) @ v
    save_file(model.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    settings = Lora(rank=4, alpha=6.0, init=init, targets="attention")
    base = BaseWeights(tmp_path)
    found = initial_adapter(base, ONE_OF_EACH, settings, torch.device("cpu"))
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=init, target_modules=list(found))
    with pytest.raises(UserError, match=r"has no rank 65\. Lower lora.rank"):
        initial_adapter(base, ONE_OF_EACH, replace(settings, rank=65), torch.device("cpu"))
    theirs = inject_adapter_in_model(config, model)
    for name, update in found.items():
        layer = theirs.get_submodule(name)
        up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        assert error(update.up @ update.down, 1.5 * up @ down) < 1e-4, name
        assert error(update.up.norm(dim=0), up.norm(dim=0)) < 1e-4
        rest = merge_into([(found, -1.0)])(
            f"{name}.weight", base.merged(f"{name}.weight", {}), 0, torch.float32
        )
        assert error(rest, layer.base_layer.weight) < 1e-4
