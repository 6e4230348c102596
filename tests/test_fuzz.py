"""Recipes and files at random, damaged or hostile: each is refused in one line with code 2, or read as it was.
No traceback, and nothing that a checksum covers is read as something else.

`make fuzz N=1000 SEED=0`; a failure names its number, with which it comes again.
"""

import copy
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from torch import distributed, nn

from flux2_ds.checkpoint import manager
from flux2_ds.checkpoint.tensor_store import TensorShard
from flux2_ds.commands import export, sample
from flux2_ds.commands.tiny import make_tiny
from flux2_ds.config.model_files import fingerprint
from flux2_ds.config.model_spec import read_spec
from flux2_ds.config.parse import load_recipe, parse_recipe, recipe_parser
from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import Recipe, recipe_values
from flux2_ds.data.dataset import build_order, check_run, read_data
from flux2_ds.data.loader import Loader, Share
from flux2_ds.data.shards import read_conditioning, read_prompts
from flux2_ds.distributed import Process
from flux2_ds.errors import EXIT_USER_ERROR, UserError
from flux2_ds.model import transformer
from flux2_ds.model.load import read_weights
from flux2_ds.model.pipeline import load_vae
from flux2_ds.model.text_encoder import TextEncoder
from flux2_ds.prepare import __main__ as prepare
from flux2_ds.run.metrics import read_metrics
from flux2_ds.run.run_dir import check_run_dir, trained_recipe, write_run_dir
from launcher.hosts import read_hostfile

N, SEED = int(os.environ.get("FUZZ", "15")), int(os.environ.get("SEED", "0"))
CPU = torch.device("cpu")
RECIPE = {
    "run_dir": "run", "steps": 4, "precision": "fp32", "deepspeed": "zero0", "model": {"path": "model"},
    "data": {"images": "photos", "shards": "shards", "resolution": 64, "bucket_step": 16},
    "lora": {"rank": 2}, "batch": {"global_size": 2, "micro_size": 1},
    "optimizer": {"name": "adamw", "learning_rate": 1e-4, "betas": [0.9, 0.99]},
    "preview": {"every": 2, "prompts": ["a cat", "a dog"], "height": 64, "width": 64},
    "objective": {"timestep_sampling": "logit_normal", "logit_mean": 0.5},
    "checkpoint": {"every": 2}, "log": {"wandb": "disabled"}, "launch": {"accelerator": "cpu", "processes": 1},
}  # fmt: skip
NASTY: list[Any] = [
    None, True, -1, 0, 1, 1e308, float("nan"), float("-inf"), 2**63 - 1, 10**30, "9" * 5000, "", " ", "a" * 300,
    "a/" * 2000, "\0", "\u2028", "../..", "$(reboot)", "~", "s3://", "https://u:p@h/x?a=b", "{", "null", "nan",
    [], {}, [[]], [None], {"": 1}, {"a": {"a": {"a": 1}}}, [1] * 50, "zero3_offload", "full", "cuda", 64, 1e-4,
]  # fmt: skip


def seeded(test: str) -> Any:
    return pytest.mark.parametrize("number", range(SEED, SEED + N), ids=lambda n: f"{test}-{n}")


def refused(read: Callable[[], Any]) -> Any:
    """What is read, or the `UserError`; any other exception is a defect."""
    try:
        return read()
    except UserError as error:
        assert error.code in (EXIT_USER_ERROR, 1)
        assert str(error).strip() and "\n" not in str(error).strip(), f"not one line: {error}"
        return error


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The bytes with one kind of damage."""
    at, length = draw.randrange(len(content) + 1), draw.choice((1, 8, 512))
    kind = draw.choice(("bit", "bit", "cut", "zeros", "noise", "insert", "empty", "repeat"))
    if kind == "bit" and content:
        at = min(at, len(content) - 1)
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    middle = {
        "cut": b"", "zeros": bytes(length), "noise": draw.randbytes(length), "insert": draw.randbytes(length),
        "repeat": content[at : at + length] * 2,
    }  # fmt: skip
    if kind not in middle:
        return b""
    rest = b"" if kind == "cut" else content[at + (0 if kind == "insert" else length) :]
    return content[:at] + middle[kind] + rest


def changed(values: Any, draw: random.Random) -> Any:
    """JSON values with one entry removed, renamed or replaced."""
    values = copy.deepcopy(values)
    places = [(values, key) for key in values] if isinstance(values, dict) else []
    for parent, key in places:
        if isinstance(parent[key], (dict, list)) and len(places) < 5000:
            inner = parent[key]
            places += [
                (inner, k) for k in (inner if isinstance(inner, dict) else range(len(inner)))
            ]
    if not places:
        return draw.choice(NASTY)
    parent, key = draw.choice(places)
    kind = draw.choice(("replace", "replace", "replace", "remove", "rename"))
    if kind == "replace":
        parent[key] = draw.choice(NASTY)
    else:
        value = parent.pop(key)
        if kind == "rename" and isinstance(parent, dict):
            parent[draw.choice((f"{key}x", key[1:], "", "run_dir"))] = value
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, its shards, a run with two checkpoints, an export, a hostfile and a DeepSpeed config."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "photos").mkdir()
        for number in range(3):
            Image.new("RGB", (64, 64), (60 * number, 30, 200)).save(f"photos/{number}.png")
            Path(f"photos/{number}.txt").write_text(f"color {number}")
        make_tiny(Path("model"), "klein")
        Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        recipe, spec = load_recipe("recipe.yaml"), read_spec(Path("model"))
        prepare.prepare(recipe, Path("model"), spec)
        write_run_dir(make_plan(recipe, 1))
        model = transformer.new_transformer(spec)
        transformer.make_trainable(model, spec, recipe)
        state = {"index": "", "recipe": recipe_values(recipe), "processes": 1}
        state |= {"versions": {}, "base": "", "metrics": {}}
        distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
        for step in (2, 4):
            weights = [
                TensorShard("weights", name, p.detach() + step / 100)
                for name, p in transformer.trainable(model).items()
            ]
            checkpoints, alone = folder / "run" / "checkpoints", Process(0, 1, CPU)
            manager.save(checkpoints, step, lambda w=weights: w, state, alone, sharded=False)  # type: ignore[misc]
        distributed.destroy_process_group()
        request = export.Request(dtype=torch.float32, layout="diffusers")
        export.export(recipe, export.choose(Path("run/checkpoints"), 4), request)
        Path("run/metrics.jsonl").write_text(
            "".join(f'{{"step": {n}, "train/loss": 1.5}}\n' for n in range(4))
        )
        Path("hostfile").write_text("node01 slots=8\nnode02 slots=8  # two\n")
        Path("zero.json").write_text(
            json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": True}})
        )
    return folder


@seeded("recipe")
def test_a_recipe_at_random_is_taken_or_refused_in_one_line(
    number: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(f"recipe {number}")
    values = RECIPE
    for _ in range(draw.randrange(1, 4)):
        values = changed(values, draw) if isinstance(values, dict) else values
    content = yaml.safe_dump(values, allow_unicode=draw.random() < 0.5).encode()
    if draw.random() < 0.4:
        content = damaged(content, draw)
    (tmp_path / "recipe.yaml").write_bytes(content)
    monkeypatch.chdir(folder)

    def read() -> None:
        recipe, _ = parse_recipe(
            recipe_parser("fuzz", ""), ["--config", str(tmp_path / "recipe.yaml")]
        )
        make_plan(recipe, 1)
        check_run(recipe, read_data(recipe), read_spec(Path("model")), Path("model"))

    refused(read)


def shards(recipe: Recipe) -> list[torch.Tensor]:
    """All that training reads of them."""
    data = read_data(recipe)
    index = data[0]
    check_run(recipe, data, read_spec(Path("model")), Path("model"))
    conditioning = read_conditioning(recipe.data.shards, index)
    prompts = read_prompts(recipe.data.shards, recipe.preview.prompts, index.text_width)
    loader = Loader(
        recipe.data.shards, index, build_order(recipe, index), Share(0, 1, 2, 2), seed=0, caption_dropout=0.0,
        empty_text=conditioning["empty_text"],
    )  # fmt: skip
    batches = [batch for step in range(2) for batch in loader.read(step)]
    return [
        *conditioning.values(),
        *prompts.values(),
        *(t for b in batches for t in (b.latents, b.text)),
    ]


def checkpoint(recipe: Recipe) -> list[torch.Tensor]:
    """The newest intact one's tensors, less what its step has added to each."""
    found, _ = manager.newest(Path("run/checkpoints"))
    assert found is not None, "a run that has been trained starts over"
    return [tensor - found.step / 100 for tensor in found.tensors("weights").values()]


def model(recipe: Recipe) -> None:
    """Its parts, which have no checksums before a run has trained over them."""
    spec = read_spec(Path("model"))
    fingerprint(Path("model"))
    with torch.device("meta"):
        built: nn.Module = transformer.build_transformer(Path("model"))
    read_weights(built, Path("model/transformer"), torch.float32, CPU)
    load_vae(Path("model"), torch.float32)
    TextEncoder(Path("model"), spec, torch.float32, CPU).tokens(["a cat"])


def adapter(recipe: Recipe) -> list[torch.Tensor]:
    """Its factors, and what its header says of it."""
    file = sample.choose_export(recipe, None)
    read = sample.read_adapter(file, read_spec(Path("model")))
    with safe_open(file, framework="pt") as opened:
        says = json.dumps(opened.metadata(), sort_keys=True).encode()
    factors = [tensor for update in read.values() for tensor in (update.down, update.up)]
    return [*factors, torch.frombuffer(bytearray(says), dtype=torch.uint8)]


def run_dir(recipe: Recipe) -> None:
    check_run_dir(replace(recipe, accept_changes=True))
    trained_recipe(recipe)
    read_metrics(Path("run/metrics.jsonl"))


READERS: dict[str, tuple[list[str], Callable[[Recipe], Any]]] = {
    "shards": (["shards/*.*"], shards),
    "checkpoint": (["run/checkpoints/*/*"], checkpoint),
    "export": (["run/export/*.safetensors"], adapter),
    "run": (["run/recipe.yaml", "run/metrics.jsonl"], run_dir),
    "model": (["model/*/*", "model/*.json"], model),
    "hostfile": (["hostfile"], lambda recipe: read_hostfile(Path("hostfile"))),
    "deepspeed": (
        ["zero.json"],
        lambda recipe: make_plan(replace(recipe, deepspeed="zero.json"), 1),
    ),
}
CHECKSUMMED = ("shards", "checkpoint", "export")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    return load_recipe(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def intact(folder: Path, recipe: Recipe) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return {kind: READERS[kind][1](recipe) for kind in CHECKSUMMED}


@seeded("file")
def test_a_damaged_file_is_refused_in_one_line_or_read_as_it_was(
    number: int,
    folder: Path,
    recipe: Recipe,
    intact: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = random.Random(f"file {number}")
    monkeypatch.chdir(folder)
    kind = draw.choice([*READERS, "shards", "checkpoint", "model"])
    patterns, read = READERS[kind]
    file = draw.choice(
        sorted(path for each in patterns for path in folder.glob(each) if path.is_file())
    )
    content = file.read_bytes()
    if file.suffix == ".json" and draw.random() < 0.5:
        spoilt = json.dumps(changed(json.loads(content), draw)).encode()
    else:
        spoilt = damaged(content, draw)
    try:
        if draw.random() < 0.05:
            file.unlink()
        else:
            file.write_bytes(spoilt)
        found = refused(lambda: read(recipe))
    finally:
        file.write_bytes(content)
    if kind in CHECKSUMMED and not isinstance(found, UserError):
        for tensor, expected in zip(found, intact[kind], strict=True):
            torch.testing.assert_close(
                tensor, expected, rtol=0, atol=1e-6, msg=f"{file} is read otherwise"
            )
