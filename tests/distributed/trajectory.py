"""A worker of test_engine.py: trains a tiny transformer by `Engine` for each case it is given.

Gets folders from pool.py, runs the cases in FOLDER/cases.json and writes FOLDER/results.json. A case of bench.py has its recipe's settings as `bench`. The model, the data and the reference in plain PyTorch are here too, so that both sides share
nothing but them.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import cpuinfo
import pytest
import torch
from diffusers import Flux2Transformer2DModel

from flux2_ds.checkpoint import manager as checkpoint
from flux2_ds.config.model_spec import Spec
from flux2_ds.config.plan import make_plan
from flux2_ds.config.recipe import Batch, Data, Launch, Lora, Model, Optimizer, Recipe
from flux2_ds.engine import optimizers
from flux2_ds.model import transformer
from flux2_ds.model.activation_checkpointing import blocks_of, configure_blocks
from flux2_ds.model.cuda_graphs import use_cuda_graphs
from flux2_ds.model.load import place_weight
from flux2_ds.model.lora import add_lora, lora_config

SPEC = Spec("klein", "Flux2KleinPipeline", 1, 2, 2, 32, 48, False)
GLOBAL_BATCH = 4
LEARNING_RATE = 5e-3
ADAM = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
CLIP = 0.05  # below the gradient norms here, so that clipping takes part


def base(spec: Spec = SPEC) -> Flux2Transformer2DModel:
    """The same small model every time."""
    torch.manual_seed(0)
    model = transformer.new_transformer(spec)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # well above the default, so that every block matters to the loss
            parameter.data.normal_(0, 1.5 / parameter.shape[1] ** 0.5)
    transformer.keep_timestep_exact(model)
    return model


def build(
    method: str,
    model: Flux2Transformer2DModel | None = None,
    *,
    base_weights: str | None = None,
    compute: str = "precision",
    blocks: dict[str, Any] | None = None,
    partitioned: bool = False,
    dtype: torch.dtype = torch.float32,
    rank: int = 3,
    spread: float = 0.2,
) -> torch.nn.Module:
    """`model` or `base()` made trainable. A LoRA's B, or another factor that is zero, is spread about it, so that the others have gradients.

    `blocks`: how they run, if not as diffusers runs them.
    """
    if model is None:
        model = base().to(dtype)
        for name, weight in list(model.named_parameters()):
            place_weight(model, name, weight.data, base_weights)
    if method == "full":
        model.requires_grad_(True)
        if compute == "fp8":
            transformer.multiply_in_fp8(model)
    else:
        config = lora_config(SPEC, Lora(rank=rank), method)
        add_lora(model, config, seed=1)
        generator = torch.Generator().manual_seed(2)
        for parameter in transformer.trainable(model).values():
            if not parameter.any():
                parameter.data.normal_(0, spread, generator=generator)
    if blocks is not None:
        configure_blocks(model, **blocks, attention=None, partitioned=partitioned)
    return model.train()


def global_batch(step: int) -> dict[str, torch.Tensor]:
    """Inputs and target of one step, for all GLOBAL_BATCH places."""
    generator = torch.Generator().manual_seed(1000 + step)
    return {
        "hidden_states": torch.randn(GLOBAL_BATCH, 6, 128, generator=generator),
        "encoder_hidden_states": torch.randn(GLOBAL_BATCH, 5, 48, generator=generator),
        "timestep": torch.rand(GLOBAL_BATCH, generator=generator),
        "target": torch.randn(GLOBAL_BATCH, 6, 128, generator=generator),
    }


def loss_of(forward: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    grid = [(0, y, x, 0) for y in range(2) for x in range(3)]
    inputs = {name: value for name, value in batch.items() if name != "target"}
    device = batch["target"].device
    prediction = forward(
        **inputs,
        img_ids=torch.tensor(grid, dtype=torch.float32, device=device),
        txt_ids=torch.tensor([(0, 0, 0, i) for i in range(5)], dtype=torch.float32, device=device),
    )
    return (prediction.float() - batch["target"]).square().mean()


def reference(
    method: str,
    steps: int,
    skipped: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
    """Losses, final weights and norms of gradients of plain PyTorch with clipping; AdamW, or what `settings` name.

    `skipped`: a step without an update. `dtype`: of the base.
    """
    model = build(method, dtype=dtype).to(device)
    named = transformer.trainable(model)
    if settings:
        optimizer = optimizers.build(
            Optimizer(**{**ADAM, **settings}), list(named.values()), fused=False
        )
    else:
        matrices, vectors = (
            [p for p in named.values() if (p.ndim > 1) == wide] for wide in (True, False)
        )
        grouped = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(grouped, **ADAM)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_of(settings)
    losses, norms = [], []
    for step in range(steps):
        batch = {name: value.to(device) for name, value in global_batch(step).items()}
        loss = loss_of(lambda **inputs: model(**inputs, return_dict=False)[0], batch)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), CLIP).item())
        if step != skipped:
            optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in named.items()}, norms


def learning_rate_of(settings: dict[str, Any]) -> float:
    """Prodigy scales its own."""
    return 1.0 if settings.get("name") == "prodigy" else LEARNING_RATE


def run_case(case: dict[str, Any], process: Any) -> list[float]:
    """Train one case; `load` and `save` name a checkpoint root, `load_at` a step if not the newest, `save_at` one before
    the last. Losses are those of this run.

    `optimizer`, `learning_rate`, `dtype`, `rank`, `spread`, `base_weights`, `compute` and `blocks` replace the defaults;
    `rehearse`: two passes before the first step that are none of the training's. `replayed`: passes are
    recorded when they come for the second time, as CUDA graphs are. `previewed`: the model is used between steps.
    `lora`: settings with which a start builds the model, from `files` by the config `name`, in `run_dir`.
    `base`: before each pass the plain model predicts, its adapter switched off. `background`: a step after which
    a checkpoint is saved beside the training. `norms`: what each step's gradients must have. `group`: elements that
    ZeRO shards together.
    """
    from deepspeed.comm.comm import cdb as comm
    from deepspeed.utils import groups

    from flux2_ds import distributed as agreement
    from flux2_ds.checkpoint import manager as saving
    from flux2_ds.checkpoint.background import BackgroundSave
    from flux2_ds.engine import engine as engines
    from flux2_ds.engine.host_memory import HostBuffers
    from flux2_ds.engine.zero3 import gathering
    from flux2_ds.training import build as assembly

    micro = case["micro"]
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's, of which a process has one
    config = {
        **case["deepspeed"],
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": GLOBAL_BATCH // (micro * process.world_size),
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
    }
    offload = "offload_optimizer" in config.get("zero_optimization", {})
    dtype = getattr(torch, case.get("dtype", "bfloat16" if "bf16" in config else "float32"))
    options = ("base_weights", "compute", "blocks", "rank", "spread")
    chosen = {name: case[name] for name in options if name in case}
    loaded = None
    with gathering(config):
        if "lora" in case:  # the way train.py starts
            recipe = Recipe(
                run_dir=case["run_dir"],
                method=case["method"],
                precision="fp32",
                deepspeed=case["name"],
                model=Model(path=case["files"]),
                data=Data(images="", shards=""),
                batch=Batch(global_size=GLOBAL_BATCH, micro_size=micro),
                lora=Lora(**case["lora"]),
                launch=Launch(accelerator="cpu"),
            )
            plan = make_plan(recipe, process.world_size)
            files, resumed = Path(case["files"]), "load" in case
            loaded, _ = assembly.build_model(files, SPEC, plan, process, 6, resumed=resumed)
        elif "files" in case:  # the way train.py builds a model at stage 3
            base_weights = case.get("base_weights")
            loaded = assembly.load_as(
                config,
                Path(case["files"]),
                dtype,
                base_weights,
                process,
                streamed=case.get("streamed", ()),
                shard_group=case.get("shard_group"),
            )
        stage = config.get("zero_optimization", {}).get("stage", 0)
        model: torch.nn.Module | None = loaded
        if "lora" not in case:
            model = build(case["method"], loaded, partitioned=stage == 3, dtype=dtype, **chosen)
    replays: list[int] = []
    if case.get("replayed"):
        use_cuda_graphs(model, partial(computed_again, replays))
    chosen_optimizer = case.get("optimizer", {})
    settings = Optimizer(**{**ADAM, **chosen_optimizer})
    learning_rate = case.get("learning_rate", learning_rate_of(chosen_optimizer))
    compiled = case.get("blocks", {}).get("compiled", False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    group = patch.object(engines, "ZERO_GROUP", case.get("group", engines.ZERO_GROUP))
    with group, patch.object(optimizers, "build", fused) if case.get("fused") else nullcontext():
        engine = engines.Engine(
            model,
            config,
            settings,
            offload_optimizer=offload,
            sharded=case["method"] == "full",
            compiled=blocks_of(model) if compiled else (),
        )
    if stage > 1:
        trained = transformer.trainable(model).values()
        bucket = engine._engine.optimizer.reduce_bucket_size
        assert bucket == sum(getattr(p, "ds_numel", p.numel()) for p in trained)
    first = 0
    if "load" in case:
        root, at = Path(case["load"]), case.get("load_at")
        found = (
            checkpoint.newest(root)[0]
            if at is None
            else checkpoint.Checkpoint(checkpoint.checkpoint_path(root, at), at)
        )
        assert found is not None
        engine.state.load(found)
        first = found.step
    if case.get("rehearse"):
        generator = torch.get_rng_state()
        for number in (100, 101):
            engine.rehearse(partial(loss_of, batch=global_batch(number)))
        assert torch.equal(torch.get_rng_state(), generator)
    own = GLOBAL_BATCH // process.world_size
    losses, unadapted, pending = [], base(), None
    for step in range(first, case["steps"]):
        total = torch.zeros((), device=process.device)
        for at in range(process.rank * own, (process.rank + 1) * own, micro):
            batch = {
                name: value[at : at + micro].to(process.device)
                for name, value in global_batch(step).items()
            }
            if "base" in case:
                base_loss = loss_of(engine.forward_base, batch)
                plain = loss_of(lambda **x: unadapted(**x, return_dict=False)[0], batch)
                assert not base_loss.requires_grad
                assert float(base_loss) == pytest.approx(float(plain), rel=1e-6)
            loss = loss_of(engine.forward, batch)
            poisoned = (
                step == case.get("poison") and at == GLOBAL_BATCH - own
            )  # in the last process
            engine.backward(loss * math.inf if poisoned else loss)
            if [step, process.rank] == case.get("kill"):
                os.kill(os.getpid(), signal.SIGKILL)
            with patch.object(
                comm, "all_gather_into_tensor", wraps=comm.all_gather_into_tensor
            ) as gathers:
                engine.step(learning_rate)
            if stage == 3:  # small parameters are whole again, by one collective for each dtype
                small = engine._engine.optimizer.persistent_parameters
                last = at + micro == (process.rank + 1) * own
                assert not last or all(p.ds_status.name == "AVAILABLE" for p in small)
                assert gathers.call_count <= len({p.dtype for p in model.parameters()})
            total += loss.detach() * micro / own
        losses.append(float(agreement.all_reduce_mean(total)))
        if "norms" in case:  # of which clipped updates of Adam, and so the losses, say nothing
            assert float(engine.gradient_norm()) == pytest.approx(case["norms"][step], rel=1e-4)
        if case.get("previewed"):
            look(engine)
        moments = (case["steps"], case.get("save_at"), case.get("background"))
        if "save" in case and step + 1 in moments:
            if pending is not None:
                pending.wait(lambda: None)
            state = engine.state
            what = Path(case["save"]), step + 1, state.tensor_shards, state.counters(), process
            with killed_while_saving(case.get("kill_saving"), step + 1, process.rank):
                if step + 1 == case.get("background"):
                    buffers = HostBuffers(math.inf, process.device)
                    pending = BackgroundSave(*what, buffers, ended, sharded=state.sharded)
                else:
                    saving.save(*what, sharded=state.sharded)
    if case.get("replayed"):
        assert len(replays) == 2 * (case["steps"] * own // micro - 1)
    if "graphs" in case:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == case["graphs"], f"{graphs} graphs: {case}"
    return losses


def run_bench(settings: dict[str, Any], process: Any) -> list[float]:
    """Losses of the steps that bench.py times on the small model, in the last process."""
    from flux2_ds import distributed as agreement
    from flux2_ds.commands import bench
    from flux2_ds.distributed import barrier

    losses = []
    measure = bench.measure

    def recorded(step: bench.Step, *call: Any) -> bench.Timing:
        def kept() -> torch.Tensor:
            losses.append(float(loss := step()))
            return loss

        return measure(kept, *call)

    recipe = Recipe(
        run_dir="unused",
        precision="fp32",
        model=Model(path="unused"),
        data=Data(images="unused", shards="unused"),
        batch=Batch(global_size=GLOBAL_BATCH),
        optimizer=Optimizer(learning_rate=LEARNING_RATE),
        launch=Launch(accelerator="cpu"),
        **settings,
    )
    options = {"width": 32, "height": 48, "warm_up": 1, "measure": 1}
    asked = SimpleNamespace(**options, card=None, against=None, profile=None)
    torch.manual_seed(process.rank)  # what is to be the same in all processes has a seed of its own
    with patch.multiple(
        bench,
        init_process_group=lambda accelerator: process,
        destroy_process_group=barrier,
        planned_spec=lambda *_: SPEC,
        measure=recorded,
    ):
        result = bench.bench(recipe, asked)
    assert len(set(map(str, agreement.all_gather_object(result)))) == 1  # the same is told to all
    assert result["samples_per_second"] * result["seconds_per_step"] == pytest.approx(GLOBAL_BATCH)
    last: list[float] = agreement.all_gather_object(losses)[-1]
    return last


@torch.no_grad()
def look(engine: Any) -> None:
    """The model called as a preview's pipeline calls it."""
    with engine.evaluating(), torch.compiler.set_stance("force_eager"):
        loss_of(lambda **inputs: engine.model(**inputs, return_dict=False)[0], global_batch(99))


def computed_again(replays: list[int], run: Callable[[], None]) -> Callable[[], None]:
    """A record of a pass as a CUDA graph is, in that it reads and writes the same tensors."""
    run()

    def again() -> None:
        replays.append(1)
        run()

    return again


build_optimizer = optimizers.build


def fused(settings: Optimizer, parameters: Any, *, fused: bool, **grouped: Any) -> Any:
    """As on CUDA; torch has a fused AdamW for the CPU, too."""
    return build_optimizer(settings, parameters, fused=True, **grouped)


def ended(path: Path, failure: str | None) -> None:
    assert failure is None


@contextmanager
def killed_while_saving(when: list[Any] | None, step: int, rank: int) -> Iterator[None]:
    """`when`: [step, rank, function of checkpoint.py before whose end the process kills itself]."""
    if when is None or when[:2] != [step, rank]:
        yield
        return
    inner = getattr(checkpoint, when[2])

    def cut_short(*arguments: Any) -> Any:
        result = inner(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(checkpoint, when[2], cut_short)
    yield


def main(orders: Connection) -> None:
    """Run the cases of every folder that comes."""
    from flux2_ds.distributed import barrier, destroy_process_group, init_process_group

    torch.set_num_threads(1)
    cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)  # CPU Adam asks each time, for seconds
    # Traced, differentiated and divided into passes as ever, but run by torch's own kernels.
    torch.compile = partial(torch.compile, backend="aot_eager_decomp_partition")
    process = init_process_group("cpu")
    while True:
        try:
            folder = orders.recv()
        except EOFError:  # the tests have ended
            break
        cases = json.loads((folder / "cases.json").read_text())
        results = []
        for case in cases:
            train = run_bench if "bench" in case else run_case
            results.append(train(case.get("bench", case), process))
            # DeepSpeed collects garbage for each engine, and would look at all that earlier ones have left.
            gc.collect()
            gc.freeze()
        if process.is_rank0:
            (folder / "results.json").write_text(json.dumps(results))
        barrier()
        (folder / f"done-{process.rank}").touch()
    destroy_process_group()
