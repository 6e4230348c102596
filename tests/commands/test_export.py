"""An exported checkpoint gives, in every program that it is for, what the trained model gave."""

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_loaders
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from factories import load_pipeline
from peft.tuners.lycoris_utils import LycorisLayer
from safetensors import safe_open
from safetensors.torch import load_file

from flux2_ds.checkpoint.manager import Checkpoint
from flux2_ds.checkpoint.tensor_store import TensorShard
from flux2_ds.commands import export as export_module
from flux2_ds.commands.export import (
    READERS,
    Request,
    choose,
    export,
    file_dtype,
    wait_until_written,
)
from flux2_ds.config.adapter import adapted_linears
from flux2_ds.config.adapter_file import settings_of_file
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import Data, Launch, Lora, Model, Recipe, recipe_values
from flux2_ds.distributed import Process
from flux2_ds.errors import UserError
from flux2_ds.model import transformer
from flux2_ds.model.adapter_layouts import Layout
from flux2_ds.model.adapter_programs import CHECKED, read_file, read_merges
from flux2_ds.model.lora import add_lora, lora_config
from flux2_ds.model.merge import BaseWeights
from flux2_ds.run.run_dir import INITIAL_ADAPTER, as_trained, lock_run_dir
from flux2_ds.training.build import build_model, write_initial_adapter

Tensors = dict[str, torch.Tensor]
Write = Callable[..., Path]


def recipe_for(model: Path, run_dir: Path, method: str, **lora: Any) -> Recipe:
    return Recipe(
        run_dir=str(run_dir),
        method=method,  # type: ignore[arg-type]
        precision="fp32",
        model=Model(path=str(model)),
        data=Data(images="photos", shards="shards"),
        lora=Lora(rank=4, alpha=6.0, **lora),
    )


def trained(recipe: Recipe, spec: Spec) -> Flux2Transformer2DModel:
    """The tiny transformer with some change to all that the method trains."""
    model = Flux2Transformer2DModel.from_pretrained(recipe.model.path, subfolder="transformer")
    merged = BaseWeights(Path(recipe.model.path) / "transformer", read_merges(recipe.lora, spec))
    model.load_state_dict({name: merged.merged(name, {}) for name in merged.shapes()})
    if recipe.method == "full":
        model.requires_grad_(True)
    else:
        config = lora_config(spec, recipe.lora, recipe.method)
        add_lora(model, config, seed=0)
    generator = torch.Generator().manual_seed(5)
    for parameter in transformer.trainable(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def predict(model: Flux2Transformer2DModel, spec: Spec) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 4, 128, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, spec.text_width, generator=generator),
            timestep=torch.tensor([0.4]),
            img_ids=torch.tensor([(0.0, y, x, 0) for y in range(2) for x in range(2)]),
            txt_ids=torch.tensor([(0.0, 0, 0, i) for i in range(5)]),
            guidance=torch.ones(1) if spec.guidance else None,
        ).sample


def run_state(recipe: Recipe) -> dict[str, Any]:
    """What training notes in a checkpoint, for an export to say."""
    return {"recipe": recipe_values(recipe), "index": "0123abcd", "versions": {"torch": "2.13"}}


def save(model: Flux2Transformer2DModel, recipe: Recipe, write_checkpoint: Write) -> Checkpoint:
    weights = [("weights", name, p) for name, p in transformer.trainable(model).items()]
    checkpoints = Path(recipe.run_dir) / "checkpoints"
    write_checkpoint(checkpoints, 7, weights, run_state(recipe))
    return choose(checkpoints, 7)


def export_as(
    recipe: Recipe, chosen: Checkpoint, dtype: torch.dtype = torch.float32, **request: Any
) -> list[Path]:
    exports, _ = export(recipe, chosen, Request(dtype=dtype, **request))
    return [written.path for written in exports]


@pytest.mark.parametrize(
    ("method", "layout"),
    [
        ("lora", "diffusers"),
        ("lora", "bfl"),
        ("lora", "kohya"),
        ("dora", "diffusers"),
        ("lokr", None),
        ("full", None),
    ],
)
def test_diffusers_computes_what_was_trained(
    method: str,
    layout: Layout | None,
    tiny_model: Path,
    tiny_spec: Spec,
    tmp_path: Path,
    write_checkpoint: Write,
) -> None:
    recipe = recipe_for(tiny_model, tmp_path / "run", method)
    model = trained(recipe, tiny_spec)
    expected = predict(model, tiny_spec)
    chosen = save(model, recipe, write_checkpoint)
    (path,) = export_as(recipe, chosen, layout=layout)

    if method == "full":
        loaded = Flux2Transformer2DModel.from_pretrained(path)
    else:
        pipeline = load_pipeline(tiny_model, tiny_spec, torch.float32)
        base = predict(pipeline.transformer, tiny_spec)
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        loaded = pipeline.transformer
        assert (base - expected).abs().max() > 1e-2
    torch.testing.assert_close(predict(loaded, tiny_spec), expected, rtol=1e-4, atol=1e-5)


def weights_after(model: Flux2Transformer2DModel, spec: Spec) -> Tensors:
    """Every linear of the blocks with its update, by the formulas of LoRA and DoRA."""
    named = dict(model.named_parameters())
    weights = {}
    for name, weight in named.items():
        if "transformer_blocks." not in name or weight.ndim != 2 or not name.endswith(".weight"):
            continue
        if ".lora_" in name:
            continue
        linear = name.removesuffix(".weight").removesuffix(".base_layer")
        after, down = weight.detach(), named.get(f"{linear}.lora_A.default.weight")
        if down is not None:
            layer: Any = model.get_submodule(linear)
            up = named[f"{linear}.lora_B.default.weight"]
            after = after + layer.scaling["default"] * up.detach() @ down.detach()
        elif isinstance(layer := model.get_submodule(linear), LycorisLayer):
            after = after + layer.get_delta_weight("default").detach()  # by PEFT
        magnitude = named.get(f"{linear}.lora_magnitude_vector.default.weight")
        if magnitude is not None:
            after = magnitude.detach()[:, None] * after / after.norm(dim=1, keepdim=True)
        weights[linear] = after
    assert len(weights) == 12 * spec.double_blocks + 2 * spec.single_blocks
    return weights


def in_bfl(weights: Tensors, spec: Spec) -> Tensors:
    """The same weights in Black Forest Labs' modules."""
    aliases = adapter_loaders.COMFYUI_ALIASES
    fused: Tensors = {}
    for name, weight in weights.items():
        kind, block, linear = name.split(".", 2)
        module = aliases[kind][linear][0]
        key = f"{'double' if kind == 'transformer_blocks' else 'single'}_blocks.{block}.{module}"
        fused[key] = torch.cat([fused[key], weight]) if key in fused else weight
    shapes = adapter_loaders.bfl_shapes(spec.double_blocks, spec.single_blocks, spec.width)
    assert {name: tuple(weight.shape) for name, weight in fused.items()} == shapes
    named = {f"{name}.weight": weight for name, weight in fused.items()}
    back = convert_flux2_transformer_checkpoint_to_diffusers(named)
    assert back.keys() == {f"{name}.weight" for name in weights}
    assert all(torch.equal(back[f"{name}.weight"], weight) for name, weight in weights.items())
    return fused


LOADERS = {
    "ComfyUI": adapter_loaders.comfyui,
    "musubi-tuner": adapter_loaders.musubi_tuner,
    "ai-toolkit": adapter_loaders.ai_toolkit,
    "OneTrainer": adapter_loaders.onetrainer,
}


PATTERNS = {
    "targets": ["attn.to_[qv]", "0.ff.*", "attn.to_out"],
    "rank_pattern": {"attn.to_q": 2, "linear_in": 7},
    "alpha_pattern": {"attn.to_v": 3.0},
}


NO_FUSED = {
    "targets": ["ff.*", "attn.to_out", "attn.to_qkv_mlp_proj"],
    "rank_pattern": {"ff.*": 40},
}


@pytest.mark.parametrize(
    "lora",
    [{}, {"targets": "attention"}, {"targets": "diffusers", "rslora": True}, PATTERNS, NO_FUSED],
    ids=["all", "attention", "rslora", "patterns", "no fused"],
)
@pytest.mark.parametrize("method", ["lora", "dora", "lokr", "loha"])
def test_the_programs_that_a_file_is_for_load_what_was_trained(
    method: str,
    lora: dict[str, Any],
    tiny_model: Path,
    tiny_spec: Spec,
    tmp_path: Path,
    write_checkpoint: Write,
) -> None:
    """And those that it is not for do not: the table says no less than what is so."""
    if method in ("lokr", "loha") and lora.get("rslora"):
        lora = {
            "targets": "diffusers",
            "factor": 8,
            "decompose_both": True,
            "alpha_pattern": {"attn.*": 3.0},
        }
    recipe = recipe_for(tiny_model, tmp_path / "run", method, **lora)
    base = Flux2Transformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    before = weights_after(base, tiny_spec)
    model = trained(recipe, tiny_spec)
    after = weights_after(model, tiny_spec)
    chosen = save(model, recipe, write_checkpoint)
    for layout, kind in CHECKED:
        if kind != method:
            continue
        if (layout, kind) == ("kohya", "lokr") and lora != NO_FUSED:
            with pytest.raises(UserError, match="q, k and v are one linear there"):
                export_as(recipe, chosen, layout=layout)
            continue
        (path,) = export_as(recipe, chosen, layout=layout)
        tensors = load_file(path)
        for program, loader in LOADERS.items():
            theirs, expected = before, after
            if program != "OneTrainer":  # it trains diffusers' model
                theirs, expected = in_bfl(before, tiny_spec), in_bfl(after, tiny_spec)
            loaded, ignored = loader(theirs, tensors)
            errors = {
                name: (loaded[name] - weight).norm() / (weight - theirs[name]).norm()
                for name, weight in expected.items()
                if not torch.equal(weight, theirs[name])
            }
            right = not ignored and max(errors.values()) < 1e-4
            assert right == (program in CHECKED[layout, method]), (layout, program, errors)
        with safe_open(path, "pt") as file:
            checked = file.metadata()["flux2_ds.checked_for"]
        assert checked == ", ".join(CHECKED[layout, method])


def test_an_adapter_is_exported_for_diffusers_and_for_comfyui(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path, write_checkpoint: Write
) -> None:
    recipe = recipe_for(tiny_model, tmp_path / "cats", "lora")
    chosen = save(trained(recipe, tiny_spec), recipe, write_checkpoint)
    paths = export_as(recipe, chosen, torch.bfloat16)
    assert [path.name for path in paths] == [
        "cats-step_00000007-diffusers.safetensors",
        "cats-step_00000007-comfyui.safetensors",
    ]
    assert all(path.stat().st_mode & 0o044 for path in paths), "others may read it"
    with safe_open(paths[0], "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata["transformer.lora_alpha"] == metadata["transformer.r"] == 4


def test_a_file_that_does_not_hold_what_was_trained_is_not_kept(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path, write_checkpoint: Write
) -> None:
    recipe = recipe_for(tiny_model, tmp_path / "run", "lora")
    model = trained(recipe, tiny_spec)
    for name, parameter in transformer.trainable(model).items():
        parameter.data *= 1e-7 if "lora_B" in name else 1  # fp16 ends at 6e-8
    chosen = save(model, recipe, write_checkpoint)
    with pytest.raises(UserError, match="--dtype fp32"):
        export_as(recipe, chosen, torch.float16)
    assert not list((tmp_path / "run" / "export").iterdir())
    assert len(export_as(recipe, chosen)) == 2


@pytest.mark.parametrize(
    ("method", "layout", "message"),
    [
        ("dora", "kohya", "drop the magnitudes"),
        ("full", "kohya", "--layout kohya is for adapters"),
        ("full", "lycoris", "--layout lycoris is for adapters alone"),
        ("lora", "lycoris", "no program loads a LoRA by these names. Export --layout diffusers or"),
        ("loha", "diffusers", "no program loads a LoHa by these names. Export --layout lycoris or"),
    ],
)
def test_layouts_that_cannot_hold_what_was_trained(
    method: str,
    layout: Layout,
    message: str,
    tiny_model: Path,
    tmp_path: Path,
    write_checkpoint: Write,
) -> None:
    write_checkpoint(tmp_path / "checkpoints", 7, [("weights", "a", torch.zeros(1))])
    recipe = recipe_for(tiny_model, tmp_path, method)
    with pytest.raises(UserError, match=message):
        export_as(recipe, choose(tmp_path / "checkpoints", 7), layout=layout)


def test_the_precision_of_the_file_is_the_one_asked_for(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path, write_checkpoint: Write
) -> None:
    recipe = recipe_for(tiny_model, tmp_path / "run", "lora")
    chosen = save(trained(recipe, tiny_spec), recipe, write_checkpoint)
    assert file_dtype(recipe, "bf16") == torch.bfloat16
    bf16 = dataclasses.replace(recipe, precision="bf16")
    for changes in ({"method": "dora"}, {"lora": Lora(init="pissa")}):
        assert file_dtype(dataclasses.replace(bf16, **changes), None) == torch.float32
        assert file_dtype(dataclasses.replace(bf16, **changes), None, merge=True) == torch.bfloat16
    pissa = dataclasses.replace(bf16, lora=Lora(init="pissa"))
    assert file_dtype(pissa, None, reduced=True) == torch.bfloat16 == file_dtype(bf16, None)
    (path,) = export_as(recipe, chosen, torch.bfloat16, layout="diffusers")
    tensors = load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    linears = 12 * tiny_spec.double_blocks + 2 * tiny_spec.single_blocks
    assert len(tensors) == 2 * linears


@pytest.mark.parametrize("method", ["lora", "dora", "lokr", "loha", "full"])
@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
def test_all_weights_with_the_adapter_in_them(
    method: str,
    layout: Layout,
    tiny_model: Path,
    tiny_spec: Spec,
    tmp_path: Path,
    write_checkpoint: Write,
) -> None:
    recipe = recipe_for(tiny_model, tmp_path / "run", method)
    model = trained(recipe, tiny_spec)
    expected = predict(model, tiny_spec)
    chosen = save(model, recipe, write_checkpoint)
    (path,) = export_as(recipe, chosen, layout=layout, merge=method != "full")
    if layout == "diffusers":
        loaded = Flux2Transformer2DModel.from_pretrained(path)
    else:  # diffusers' own converter of Black Forest Labs' names
        config = Flux2Transformer2DModel.load_config(tiny_model / "transformer")
        loaded = Flux2Transformer2DModel.from_config(config)
        loaded.load_state_dict(convert_flux2_transformer_checkpoint_to_diffusers(load_file(path)))
    torch.testing.assert_close(predict(loaded, tiny_spec), expected, rtol=1e-4, atol=1e-5)


def test_fp8_weights_have_the_scales_that_comfyui_reads(
    tiny_model: Path, tiny_spec: Spec, tmp_path: Path, write_checkpoint: Write
) -> None:
    recipe = recipe_for(tiny_model, tmp_path / "run", "lora")
    model = trained(recipe, tiny_spec)
    expected = in_bfl(weights_after(model, tiny_spec), tiny_spec)
    chosen = save(model, recipe, write_checkpoint)
    (path,) = export_as(recipe, chosen, torch.float8_e4m3fn, layout="bfl", merge=True)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        layers = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    assert all(layer == {"format": "float8_e4m3fn"} for layer in layers.values())
    assert layers.keys() == expected.keys()
    for name, weight in expected.items():
        assert tensors[f"{name}.weight"].dtype == torch.float8_e4m3fn
        found = tensors[f"{name}.weight"].float() * tensors[f"{name}.weight_scale"]
        assert (found - weight).norm() / weight.norm() < 0.03
    assert tensors["img_in.weight"].dtype == torch.bfloat16


def test_an_export_in_several_files_and_of_the_average(
    tiny_model: Path,
    tiny_spec: Spec,
    tmp_path: Path,
    write_checkpoint: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_for(tiny_model, tmp_path / "run", "full")
    model = trained(recipe, tiny_spec)
    tensor_shards = [
        TensorShard(kind, name, p.detach().flatten() * factor, 0, tuple(p.shape))
        for kind, factor in (("weights", 1), ("ema", 2))
        for name, p in model.named_parameters()
    ]
    write_checkpoint(tmp_path / "run" / "checkpoints", 3, tensor_shards, run_state(recipe))
    chosen = choose(tmp_path / "run" / "checkpoints", 3)
    monkeypatch.setattr(export_module, "FILE_SIZE", "1MB")
    (path,) = export_as(recipe, chosen, weights="ema")
    assert path.parent.name == "step_00000003-ema"
    assert len(list(path.glob("*.safetensors"))) > 2
    loaded = dict(Flux2Transformer2DModel.from_pretrained(path).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded[name], parameter * 2)


def test_what_is_not_there_is_named(
    tiny_model: Path, tmp_path: Path, write_checkpoint: Write
) -> None:
    root = tmp_path / "run" / "checkpoints"
    for step in (3, 6):
        write_checkpoint(root, step, [("weights", "a", torch.zeros(1))])
    with pytest.raises(UserError, match=r"no checkpoint of step 7\. There are: 3, 6\."):
        choose(root, 7)
    recipe = recipe_for(tiny_model, tmp_path / "run", "lora")
    with pytest.raises(UserError, match=r"trained without optimizer\.ema_decay"):
        export_as(recipe, choose(root, 6), weights="ema")


def test_a_checkpoint_that_is_being_written_is_waited_for(tiny_model: Path, tmp_path: Path) -> None:
    recipe = recipe_for(tiny_model, tmp_path / "run", "lora")
    partial = tmp_path / "run" / "checkpoints" / ".step_00000004.partial"
    partial.mkdir(parents=True)
    wait_until_written(recipe)  # nobody trains: a kill has left it
    with lock_run_dir(recipe):
        waiting = threading.Thread(target=wait_until_written, args=(recipe,))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        partial.rename(partial.with_name("step_00000004"))
        waiting.join(30)
        assert not waiting.is_alive()


def test_adapter_settings_are_those_of_the_checkpoint(
    tiny_model: Path, tmp_path: Path, write_checkpoint: Write
) -> None:
    recipe = recipe_for(tiny_model, tmp_path / "run", "dora")
    state = {"recipe": recipe_values(recipe)}
    write_checkpoint(tmp_path / "run/checkpoints", 3, [("weights", "a", torch.zeros(1))], state)
    now = dataclasses.replace(recipe, method="lora", precision="bf16", lora=Lora(rank=4, alpha=9.0))
    chosen = choose(tmp_path / "run/checkpoints", 3)
    found = as_trained(now, chosen.state()["recipe"], chosen.path)
    assert found == dataclasses.replace(recipe, precision="bf16")


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_that_was_trained_over_another(
    method: str, tiny_model: Path, tiny_spec: Spec, tmp_path: Path, write_checkpoint: Write
) -> None:
    """It is right beside that one, which is left out of its file and named there."""
    first = recipe_for(tiny_model, tmp_path / "first", "lora", targets="attention")
    chosen = save(trained(first, tiny_spec), first, write_checkpoint)
    (beside,) = export_as(first, chosen, layout="bfl")
    stacked = {"merge_first": [str(beside)], "merge_strengths": [0.5]}
    recipe = recipe_for(tiny_model, tmp_path / "run", method, **stacked)
    plain = Flux2Transformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    model = trained(recipe, tiny_spec)
    after = weights_after(model, tiny_spec)
    chosen = save(model, recipe, write_checkpoint)

    (path,) = export_as(recipe, chosen, layout="bfl")
    weights = in_bfl(weights_after(plain, tiny_spec), tiny_spec)
    half = {n: t * (0.5 if "lora_B" in n else 1) for n, t in load_file(beside).items()}
    weights, _ = adapter_loaders.comfyui(weights, half)
    weights, ignored = adapter_loaders.comfyui(weights, load_file(path))
    assert not ignored
    for name, expected in in_bfl(after, tiny_spec).items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-5)
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["flux2_ds.lora"])
    assert said["merge_first"] == [beside.name] and said["merge_strengths"] == [0.5]
    assert f"`{beside.name}` at strength 0.5" in (path.parent / "README.md").read_text()

    (path,) = export_as(recipe, chosen, merge=True, keep_merge_first=True)
    kept = Flux2Transformer2DModel.from_pretrained(path)
    torch.testing.assert_close(
        predict(kept, tiny_spec), predict(model, tiny_spec), rtol=1e-4, atol=1e-5
    )
    if method == "dora":
        with pytest.raises(UserError, match="Add --keep_merge_first true"):
            export_as(recipe, chosen, merge=True)
        return
    (path,) = export_as(recipe, chosen, merge=True)
    alone, base = (
        weights_after(m, tiny_spec) for m in (Flux2Transformer2DModel.from_pretrained(path), plain)
    )
    both = weights_after(kept, tiny_spec)
    name = "transformer_blocks.0.attn.to_q"
    update = read_merges(recipe.lora, tiny_spec)[0][0][name]
    difference = 0.5 * update.up @ update.down
    torch.testing.assert_close(both[name] - alone[name], difference, rtol=1e-3, atol=1e-5)
    assert (alone[name] - base[name]).norm() > 0.1


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
@pytest.mark.parametrize("layout", ["diffusers", "bfl", "kohya"])
def test_a_lower_rank_keeps_the_largest_singular_values(
    layout: Layout,
    init: str,
    tiny_model: Path,
    tiny_spec: Spec,
    tmp_path: Path,
    write_checkpoint: Write,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = recipe_for(
        tiny_model, tmp_path / "run", "lora", rank_pattern={"attn.to_q": 3}, init=init
    )
    base = Flux2Transformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    before = weights_after(base, tiny_spec)
    model = trained(recipe, tiny_spec)
    changes = {n: w - before[n] for n, w in weights_after(model, tiny_spec).items()}
    if init == "pissa":
        write_initial(recipe, tiny_model, tiny_spec)
        began = read_file("", str(tmp_path / "run" / INITIAL_ADAPTER), tiny_spec)
        changes = {n: change - began[n].up @ began[n].down for n, change in changes.items()}
    chosen = save(model, recipe, write_checkpoint)
    with caplog.at_level("INFO"):
        (path,) = export_as(recipe, chosen, layout=layout, rank=2)
    assert path.name.endswith(f"-rank2-{READERS[layout]}.safetensors")
    settings, *_ = settings_of_file("", str(path), tiny_spec)
    assert {each.rank for each in adapted_linears(tiny_spec, settings).values()} == {2}
    lost = []
    for name, update in read_file("", str(path), tiny_spec).items():
        u, s, v = torch.linalg.svd(changes[name].double(), full_matrices=False)
        nearest = (u[:, :2] * s[:2]) @ v[:2]
        torch.testing.assert_close((update.up @ update.down).double(), nearest, rtol=0, atol=1e-5)
        lost.append((s[2:].norm() / s.norm()).item())
    assert f"at most {max(lost):.1e}" in caplog.text
    for method, rank in (("dora", 2), ("lora", 0)):
        with pytest.raises(UserError, match=f"--rank is {rank}, and method {method}"):
            export_as(dataclasses.replace(recipe, method=method), chosen, rank=rank)


def write_initial(recipe: Recipe, model: Path, spec: Spec) -> None:
    plan, alone = make_plan(recipe, 1), Process(0, 1, torch.device("cpu"))
    path = Path(recipe.run_dir) / INITIAL_ADAPTER
    write_initial_adapter(path, model, spec, plan, alone, ())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_began_as_a_part_of_the_base_is_exported_as_a_change_of_the_whole_base(
    init: str, tiny_model: Path, tiny_spec: Spec, tmp_path: Path, write_checkpoint: Write
) -> None:
    """Built as a start builds it: before a step the model is the plain one, and after some the export's."""
    recipe = recipe_for(tiny_model, tmp_path / "run", "lora", init=init, rslora=True)
    recipe = dataclasses.replace(
        recipe, deepspeed="zero0", compile=False, launch=Launch(accelerator="cpu")
    )
    alone, plan = Process(0, 1, torch.device("cpu")), make_plan(recipe, 1)
    model, _ = build_model(tiny_model, tiny_spec, plan, alone, 16)
    plain = Flux2Transformer2DModel.from_pretrained(tiny_model, subfolder="transformer")
    expected = predict(plain, tiny_spec)
    torch.testing.assert_close(predict(model, tiny_spec), expected, rtol=1e-4, atol=1e-5)
    linear = "transformer_blocks.0.attn.to_q"
    left = model.get_submodule(linear).base_layer.weight
    assert (left - plain.get_submodule(linear).weight).norm() > 0.1
    for parameter in transformer.trainable(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    chosen = save(model, recipe, write_checkpoint)
    again, _ = build_model(tiny_model, tiny_spec, plan, alone, 16, resumed=True)
    assert torch.equal(again.get_submodule(linear).base_layer.weight, left)
    for layout in ("diffusers", "bfl", "kohya"):
        (path,) = export_as(recipe, chosen, layout=layout)
        pipeline = load_pipeline(tiny_model, tiny_spec, torch.float32)
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        found = predict(pipeline.transformer, tiny_spec)
        torch.testing.assert_close(found, predict(model, tiny_spec), rtol=1e-4, atol=1e-5)
    assert (found - expected).abs().max() > 1e-2
