"""Every setting a user may give.

A recipe holds only what differs from the defaults below. Each number has one owner: batch sizes,
learning rate, clipping and precision belong here; sharding, offload and communication belong to the
DeepSpeed file that `deepspeed` names. Checks across settings are in `plan.py` and `validate.py`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

from flux2_ds.config.buckets import bucket_table, resolutions
from flux2_ds.config.model_spec import PIXELS_PER_TOKEN
from flux2_ds.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Model:
    """The FLUX.2 model to start from."""

    path: str
    """Model directory in diffusers' layout, or a Hugging Face hub id."""
    revision: str | None = None
    """Branch, tag or commit, for a hub id."""
    allow_distilled: bool = False
    """Train a step-distilled klein model all the same. Such weights collapse when trained; use the
    base model."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Photographs and the shards made of them."""

    images: str | dict[str, str]
    """Folder of pictures, searched recursively, or WebDataset tars of raw pictures; or several of
    them by name, `{me: photos/me, places: "s3://bucket/{000..099}.tar"}`. Read by `prepare` only;
    docs/data.md says how captions are found."""
    caption_column: str = "text"
    """Column of metadata.csv and metadata.jsonl that holds the captions."""
    shards: str
    """Folder of WebDataset shards and index.json: written by `prepare`, read by `train`, for which it
    may be a URL (s3://, https://, ...)."""
    more_shards: dict[str, str] = field(default_factory=dict)
    """Other folders or URLs of shards of the same model to train on as well, by name."""
    weights: dict[str, float] = field(default_factory=dict)
    """How often an epoch serves the samples of a source, by the name it has in `images` or
    `more_shards`: 2 is twice, 0.1 a tenth of them. Default: 1."""
    resolution: int | list[int] = 1024
    """Pictures are resized to about resolution² pixels, keeping their aspect ratio; in px. Of
    several, the largest that a picture fills."""
    bucket_step: int = 64
    """Width and height of every bucket are multiples of this; a multiple of 16, in px."""
    max_aspect: float = 2.0
    """Longest side over shortest side of the most elongated bucket."""
    max_upscale: float = 1.0
    """Pictures that must be enlarged by more than this factor to fill their bucket are skipped and
    reported."""
    missing_caption: Literal["error", "skip", "fixed"] = "error"
    """What to do with a picture without a caption: stop, skip and report it, or use
    `fixed_caption`."""
    fixed_caption: str = ""
    """Caption of pictures that have none, with `missing_caption: fixed`."""
    validation_fraction: float = 0.0
    """Share of the pictures that `prepare` holds out from training for evaluation, chosen by a hash
    of their names, so that the choice stays when the data grows; 0..0.5."""
    samples_per_shard: int = 256
    """Largest number of samples in a shard."""
    shuffle_window: int = 8
    """Shards among which samples are shuffled; more is closer to a full shuffle."""
    num_workers: int = 4
    """Threads of each process that read samples ahead; a distant store needs more."""
    cache: str | None = None
    """Folder on a local disk for what was read from a URL, in `flux2-ds-cache` within it. Default: none,
    so that every epoch reads everything again."""
    cache_gb: float = 50.0
    """Largest size of `cache`; what was used least recently goes first. In GB."""


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """How `prepare` encodes."""

    processes: int | None = None
    """Processes of each machine, one GPU each. Default: one for each visible GPU, or for each slot of
    `launch.hostfile`; one on the CPU."""
    text_device: Literal["accelerator", "cpu"] = "accelerator"
    """Where the text encoder runs; the VAE is always on the accelerator."""
    text_weights: Literal["auto", "fp32", "bf16", "int8", "nf4"] = "auto"
    """Weights of the text encoder. int8 and nf4 are bitsandbytes'. `auto`: bf16, in which it was
    trained, unless `precision` is fp32."""
    text_batch: int = 8
    """Captions encoded at once."""
    vae_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the VAE. fp32 is what the latents deserve; bf16 is faster."""
    vae_slicing: bool = False
    """Encode the pictures of a batch one after the other: less memory."""
    vae_tiling: bool = False
    """Encode large pictures in overlapping tiles: less memory, slightly other latents."""
    image_batch: int = 4
    """Pictures encoded at once."""
    reference_resolution: int = 1024
    """Reference images of more than this many px squared are made smaller; in px. Inference uses
    1024."""
    decode_threads: int = 4
    """Threads of each process that decode and crop pictures."""
    scratch_gb: float = 100.0
    """Encoded captions that wait for their shard take at most this much disk in `data.shards`; when
    it is full, the pictures so far are encoded first. In GB."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapter, with `method: lora` or `dora`."""

    rank: int = 32
    """Rank r of the update."""
    alpha: float | None = None
    """Scale of the update is alpha / rank. Default: alpha = rank."""
    targets: Literal["all", "attention", "diffusers"] = "all"
    """`all`: every linear of both block kinds. `attention`: without the separate feed-forward
    layers of the double blocks. `diffusers`: the default of diffusers' training script."""
    dropout: float = 0.0
    """Dropout on the adapter's input; 0..1."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Batch arithmetic. Gradient accumulation is derived: global / (micro × processes)."""

    global_size: int = 8
    """Samples per optimizer step, over all processes."""
    micro_size: int = 1
    """Samples per forward pass of one process."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Flow matching."""

    timesteps: Literal["flux", "uniform", "logit_normal", "shift", "mode"] = "flux"
    """Distribution of t. `flux`: logit-normal, shifted by the number of image tokens. `shift`: the
    same with the fixed `shift`. `logit_normal`: sigmoid(N(mean, std²)). `uniform`: U(0, 1). `mode`: more of
    the middle by `mode_scale`."""
    stratified: bool = False
    """Share the distribution out among the samples of a global batch instead of drawing each t
    independently: a less noisy loss."""
    mean: float = 0.0
    """Mean of the normal under the sigmoid."""
    std: float = 1.0
    """Standard deviation of the normal under the sigmoid."""
    shift: float = 3.0
    """s in t' = s·t / (1 + (s-1)·t), with `timesteps: shift`."""
    mode_scale: float = 1.29
    """With `timesteps: mode`, between -1 (more of the ends) and 1.75 (more of the middle)."""
    max_shift_tokens: int = 4096
    """Number of image tokens at which the `flux` shift stops growing."""
    guidance: float = 1.0
    """Guidance value given to FLUX.2-dev while training. klein has no such input."""
    caption_dropout: float = 0.0
    """Share of the samples trained with the empty caption; 0..1."""
    masked_loss: bool = False
    """Weight the loss by the masks of the pictures that have one: `boat.mask.png` beside `boat.png`,
    white where it is trained on."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimizer. Trainable weights have fp32 masters in every precision."""

    name: Literal["adamw", "adamw8bit", "adamw8bit_paged", "adafactor", "prodigy", "muon"] = "adamw"
    """`adamw`: fused on CUDA; DeepSpeed's CPU Adam when the ZeRO config offloads the optimizer.
    `adamw8bit`: bitsandbytes, moments in 8 bits; `_paged`: they move to host memory when the card is
    full. `adafactor`, `prodigy` and `muon` (adapters of `method: lora` only) need `deepspeed: zero0`."""
    learning_rate: float = 1e-4
    """Peak learning rate. Prodigy finds its own step size and multiplies it by this: set 1."""
    schedule: Literal["constant", "cosine", "linear", "rex"] = "constant"
    """Shape after the warm-up; all but `constant` end at 0. `rex` stays high longer than linear."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment; not used by adafactor and muon."""
    eps: float = 1e-8
    """Added to the denominator; not used by adafactor and muon."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global L2 norm; 0 turns clipping off."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What to do when a gradient is NaN or infinite: the update is never made; stop, or count the
    step as skipped and go on. Either way the samples are written to run_dir/nonfinite."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the trained weights, with this decay, e.g. 0.999; in
    checkpoints, and exported with `export --weights ema`."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Checkpoints: trainable weights, optimizer and position, as safetensors and JSON."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Checkpoints kept; older ones are removed."""
    keep_every: int | None = None
    """Checkpoints at multiples of this many steps are kept for good."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """Console, metrics.jsonl and Weights & Biases."""

    every: int = 10
    """Steps between log lines."""
    wandb: Literal["online", "offline", "disabled"] = "offline"
    """Weights & Biases mode. Without an API key `online` becomes `offline`, said in the log."""
    project: str = "flux2-ds"
    """Weights & Biases project."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The loss on pictures that are not trained on (`data.validation_fraction`), always with the same noise and
    timesteps, in the log and the metrics as `validation_loss`."""

    every: int = 500
    """Steps between evaluations; the first comes after so many, one more at the end."""
    samples: int = 64
    """Largest number of held-out samples that are used, from all buckets in proportion, each once."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What `flux2-ds sample` renders, and training with `every`."""

    every: int | None = None
    """Steps between previews while training: the prompts are rendered before step 1, after each so many steps
    and at the end, into RUN_DIR/previews and W&B. `prepare` encodes the prompts. Default: none."""
    prompts: list[str] = field(default_factory=lambda: ["a photograph"])
    """Prompts; one row of the grid each."""
    references: list[str] = field(default_factory=list)
    """Reference images, in this order, that every prompt edits."""
    height: int = 1024
    """In px, a multiple of 16."""
    width: int = 1024
    """In px, a multiple of 16."""
    steps: int = 28
    """Denoising steps."""
    guidance: float = 4.0
    """Guidance scale."""
    seed: int = 0
    """Seed of the starting noise."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Where the recipe runs."""

    accelerator: Literal["cuda", "cpu"] = "cuda"
    """CUDA GPUs with NCCL, or CPU processes with gloo."""
    processes: int | None = None
    """Processes on each machine. Default: one for each visible GPU."""
    hostfile: str | None = None
    """DeepSpeed hostfile (`host slots=8` a line) to run on several machines over ssh."""
    over: Literal["ssh", "pdsh"] = "ssh"
    """How a hostfile's machines are reached: one ssh each, or DeepSpeed's own way with pdsh, which
    passes no environment on."""
    hang_timeout_s: float = 600.0
    """Seconds in which no process moves on in a step, an evaluation or a checkpoint, after which the
    run is ended and the process that the others wait for is named; 0 turns it off. It must be longer
    than the longest forward and backward pass, and than compiling for one bucket before step 1."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run."""

    run_dir: str
    """Where the run is kept: resolved recipe, metrics, checkpoints, exports. Starting again
    continues."""
    seed: int = 0
    """Seed of data order, noise, timesteps and adapter initialisation."""
    steps: int = 1000
    """Optimizer steps."""
    method: Literal["lora", "dora", "full"] = "lora"
    """Train a LoRA or DoRA adapter, or all weights."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Compute precision: model, activations and engine follow it."""
    base_weights: Literal["bf16", "fp8", "int8", "nf4", "nf4_fp8", "nf4_int8"] | None = None
    """How an adapter's frozen base is held and multiplied. `fp8`, `int8`: both in 8 bits. `nf4`: held
    in 4 bits, multiplied in `precision`; `nf4_fp8`, `nf4_int8`: held in 4, multiplied in 8. `bf16`:
    neither, with `precision: bf16`. Default: as `precision`. docs/performance.md says what each
    costs."""
    attention: Literal[
        "auto", "native", "cudnn", "flash", "efficient", "math", "flash_attn", "xformers"
    ] = "auto"
    """Attention backend: torch's (cuDNN, flash, memory-efficient, math, or `native`: its choice) or
    an installed package. `auto`: cuDNN on Hopper, else native."""
    compile: bool | None = None
    """Compile each block with torch.compile; for training, not for pictures. Default: on CUDA."""
    cuda_graphs: bool | None = None
    """Record the forward and backward passes of each shape as CUDA graphs and replay them, so that Python
    does not hold up small models and pictures. For adapters with compiled blocks, below ZeRO stage 3,
    without lora.dropout, offload_activations and reference images of several sizes. Default: so, in bf16, if
    memory allows."""
    cache_transposed_base: bool | None = None
    """Hold an fp8 or int8 base a second time, transposed, which spares the backward pass turning every weight
    around: about 2 % of a step for as many bytes again. Not at ZeRO stage 3. Default: if memory allows."""
    activation_checkpointing: Literal["auto", "none", "full"] | float = "auto"
    """Share of the blocks that recompute their activations in the backward pass, 0..1: less memory,
    slower. `none` is 0, `full` is 1, `auto` as few as the card has room for (on the CPU: none)."""
    offload_activations: bool = False
    """Keep what the blocks that recompute need, their inputs, in page-locked host memory until the
    backward pass: less memory on the card, for larger pictures and micro-batches."""
    deepspeed: str | dict[str, Any] = "zero2"
    """DeepSpeed config: the name of a shipped file (zero0, zero1, zero2, zero2_offload, zero3,
    zero3_offload_optimizer, zero3_offload), a path, or the config itself."""
    accept_changes: bool = False
    """Continue a run although the recipe differs from the one it was started with."""
    model: Model
    """The FLUX.2 model to start from."""
    data: Data
    """Photographs and the shards made of them."""
    prepare: Prepare = field(default_factory=Prepare)
    """How `prepare` encodes."""
    lora: Lora = field(default_factory=Lora)
    """The adapter, with `method: lora` or `dora`."""
    batch: Batch = field(default_factory=Batch)
    """Batch arithmetic."""
    objective: Objective = field(default_factory=Objective)
    """Flow matching."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """The optimizer."""
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    """Checkpoints."""
    log: Log = field(default_factory=Log)
    """Console, metrics.jsonl and Weights & Biases."""
    validation: Validation = field(default_factory=Validation)
    """The loss on pictures that are not trained on."""
    preview: Preview = field(default_factory=Preview)
    """Pictures of what is trained."""
    launch: Launch = field(default_factory=Launch)
    """Where the recipe runs."""


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain YAML and JSON values, every default written out."""
    values = dataclasses.asdict(recipe)
    values["optimizer"]["betas"] = list(recipe.optimizer.betas)
    return values


_TOKEN = PIXELS_PER_TOKEN
_RULES: list[tuple[str, Callable[[Any], bool], str]] = [
    ("between 0 and 2⁶⁴ - 1", lambda v: 0 <= v < 2**64, "seed preview.seed"),
    ("at least 1", lambda v: v >= 1,
     "steps batch.global_size batch.micro_size lora.rank data.samples_per_shard data.shuffle_window "
     "data.num_workers prepare.processes prepare.text_batch prepare.image_batch prepare.decode_threads "
     "validation.every validation.samples checkpoint.every checkpoint.keep_last checkpoint.keep_every "
     "log.every launch.processes preview.steps preview.every objective.max_shift_tokens"),
    ("0 or more", lambda v: v >= 0,
     "launch.hang_timeout_s objective.guidance optimizer.warmup_steps "
     "optimizer.max_grad_norm optimizer.eps optimizer.weight_decay"),
    ("positive", lambda v: v > 0,
     "data.max_upscale data.cache_gb prepare.scratch_gb optimizer.learning_rate lora.alpha "
     "objective.shift objective.std"),
    (f"a multiple of {_TOKEN}", lambda v: v > 0 and v % _TOKEN == 0,
     "data.bucket_step preview.height preview.width"),
    (f"at least {_TOKEN}", lambda v: v >= _TOKEN, "prepare.reference_resolution"),
    ("between 0 and 1", lambda v: 0 <= v <= 1, "objective.caption_dropout"),
    ("in [0, 1)", lambda v: 0 <= v < 1, "lora.dropout"),
    ("in [0, 1)", lambda v: all(0 <= beta < 1 for beta in v), "optimizer.betas"),
    ("in (0, 1)", lambda v: 0 < v < 1, "optimizer.ema_decay"),
    ("between 0 and 0.5", lambda v: 0 <= v <= 0.5, "data.validation_fraction"),
    ("between 1 and 64", lambda v: 1 <= v <= 64, "data.max_aspect"),
    ("between -1 and 1.75", lambda v: -1 <= v <= 1.75, "objective.mode_scale"),
    ("auto, none, full or between 0 and 1", lambda v: isinstance(v, str) or 0 <= v <= 1,
     "activation_checkpointing"),
    ("one prompt or more", bool, "preview.prompts"),
]  # fmt: skip
"""What a setting must be, if it is given, and the settings of which that holds."""


def check_ranges(recipe: Recipe) -> None:
    """Refuse settings that are wrong whatever the hardware.

    Raises:
        UserError: naming the setting, its value and the rule.
    """
    data, every = recipe.data, recipe.checkpoint.every
    _check_urls(data)
    for rule, holds, names in _RULES:
        for name in names.split():
            _require(name, attrgetter(name)(recipe), holds, rule)
    for name, weight in data.weights.items():
        _require(f"data.weights.{name}", weight, lambda v: 0 < v < math.inf, "positive")
    _require(
        "checkpoint.keep_every",
        recipe.checkpoint.keep_every,
        lambda v: v % every == 0,
        f"a multiple of checkpoint.every, which is {every}",
    )
    for resolution in resolutions(data.resolution) or [0]:
        if not bucket_table(resolution, data.bucket_step, data.max_aspect):
            raise UserError(
                f"data.resolution {data.resolution} with data.bucket_step {data.bucket_step} gives no "
                "bucket. The step must not be larger than a resolution."
            )
    if data.missing_caption == "fixed" and not data.fixed_caption:
        raise UserError(
            "data.missing_caption is fixed but data.fixed_caption is empty. Give the caption."
        )


def _require(name: str, value: Any, holds: Callable[[Any], bool], rule: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}; it must be a finite number.")
    if value is not None and not holds(value):
        raise UserError(f"{name} is {value}; it must be {rule}.")


def _check_urls(data: Data) -> None:
    """Refuse what may be a secret: passwords, a server's user names and queries. `sftp://me@host` has none."""
    images = {"": data.images} if isinstance(data.images, str) else data.images
    named = {
        "data.shards": data.shards,
        **{f"data.images.{name}".rstrip("."): location for name, location in images.items()},
        **{f"data.more_shards.{name}": location for name, location in data.more_shards.items()},
    }
    for name, location in named.items():
        if re.search(r"https?://[^/]*@|://[^/]*:[^/]*@", location, re.IGNORECASE):
            raise UserError(
                f"{name} is a URL with a user name or a password in it, and logs, recipe.yaml and W&B would "
                "show it. Take it out and give credentials as docs/data.md says under Reading."
            )
        # In other stores' names a ? may stand for any character.
        if re.search(r"https?://[^?]*\?|://[^?]*\?[^/]*=", location, re.IGNORECASE):
            raise UserError(
                f"{name} is a URL with a query (?...), such as signed URLs have; logs, recipe.yaml and W&B "
                "would show it, and it does not name a folder or a .tar. Take it out and give credentials as "
                "docs/data.md says under Reading."
            )


def is_url(location: str) -> bool:
    """Whether `location` is read through fsspec."""
    return "://" in location
