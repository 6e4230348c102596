"""Every setting a user may give, with its type, its range and its default.

A recipe holds only what differs from the defaults. Each number has one owner: batch sizes, learning rate,
clipping and precision belong here; sharding, offload and communication belong to the DeepSpeed config that
`deepspeed` names. Checks across settings are in `validate.py`.

Beside a type stands the setting's range, `PATH` for a path, and `MAY_CHANGE` where a run may go on with
another value; any other change needs `accept_changes`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from flux2_ds.config.model_spec import PIXELS_PER_TOKEN
from flux2_ds.config.settings import (
    BELOW_ONE,
    MAY_CHANGE,
    NOT_NEGATIVE,
    PATH,
    POSITIVE,
    SEED,
    MayChange,
    Range,
    at_least,
    between,
    multiple_of,
)

_PIXELS = multiple_of(PIXELS_PER_TOKEN, 16384)
_THREADS = between(1, 1024)
_NOT_EMPTY = Range("not empty", bool)
DEFAULT_SOURCE = "images"
"""Name of the source where `data.images` is one place."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The FLUX.2 model to start from."""

    path: Annotated[str, PATH]
    """Model directory in diffusers' layout, or a Hugging Face hub id."""
    revision: str | None = None
    """Branch, tag or commit, for a hub id."""
    allow_distilled: bool = False
    """Train a step-distilled klein model all the same. Such weights collapse when trained; use the
    base model, or give an assistant adapter in `lora.merge_first`."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Images and the shards made of them."""

    images: Annotated[str | dict[str, str], PATH, MAY_CHANGE]
    """Folder of images, searched recursively, or WebDataset tars of raw images; or several of
    them by name, `{me: photos/me, places: "s3://bucket/{000..099}.tar"}`. Read by `prepare` only;
    docs/data.md says how captions are found."""
    caption_column: Annotated[str | dict[str, str], MAY_CHANGE] = "text"
    """Column of metadata.csv and metadata.jsonl, and key in JSON, that holds the captions; or one for each source that
    has another, by its name in `images`."""
    shards: Annotated[str, PATH]
    """Folder of WebDataset shards and index.json: written by `prepare`, read by `train`, for which it
    may be a URL (s3://, https://, ...)."""
    more_shards: Annotated[dict[str, str], PATH] = field(default_factory=dict)
    """Other folders or URLs of shards of the same model to train on as well, by name."""
    weights: Annotated[dict[str, float], NOT_NEGATIVE] = field(default_factory=dict)
    """How often an epoch serves the samples of a source, by the name it has in `images` or
    `more_shards`: 2 is twice, 0.1 a tenth of them, 0 none, so that only its held-out images are used. Default: 1."""
    resolution: Annotated[int | list[int], between(PIXELS_PER_TOKEN, 16384)] = 1024
    """Images are resized to about resolution² pixels, keeping their aspect ratio; in px. Of
    several, the largest that an image fills."""
    bucket_step: Annotated[int, _PIXELS] = 64
    """Width and height of every bucket, and of reference images of their own size, are multiples of this; a multiple of 16, in
    px."""
    max_aspect: Annotated[float, between(1, 64)] = 2.0
    """Longest side over shortest side of the most elongated bucket."""
    max_upscale: Annotated[float, POSITIVE] = 1.05
    """Images that must be enlarged by more than this factor to fill their bucket are skipped and
    reported."""
    max_crop: Annotated[float, between(0, 1)] = 0.5
    """Images of which the crop to their bucket would cut away more than this share are skipped and
    reported: of those, captions tell more of what is gone than of what is left."""
    crops: Annotated[int, between(1, 64)] = 1
    """Crops encoded of an image that is longer or higher than its bucket: from one end to the other, 16 px or more
    apart; 1 is the center. Training draws one of them each time."""
    horizontal_flip: bool = False
    """Encode each image mirrored, too, with its masks and references; training draws one. Not for images in which text
    or a certain face matters."""
    repeats_from_folders: bool = False
    """Serve the images in a source's folders that are called `10_cats`, as kohya's trainers have them, 10 times an
    epoch, with up to three digits; `weights` come on top."""
    alpha_mask: bool = False
    """The transparency of an image that has no mask beside it is its mask."""
    mask_suffixes: Annotated[list[str], _NOT_EMPTY, MAY_CHANGE] = field(
        default_factory=lambda: [".mask", "-masklabel"]
    )
    """What follows an image's name in that of its mask, before .png, in any case."""
    reference_suffixes: Annotated[list[str], _NOT_EMPTY, MAY_CHANGE] = field(
        default_factory=lambda: [".reference"]
    )
    """What follows an image's name in that of its reference, or with a number in those of several, in any case."""
    missing_caption: Literal["error", "skip", "fixed"] = "error"
    """What to do with an image without a caption: stop, skip and report it, or use
    `fixed_caption`."""
    fixed_caption: str = ""
    """Caption of images that have none, with `missing_caption: fixed`."""
    validation_fraction: Annotated[float, between(0, 0.5)] = 0.0
    """Share of the images that `prepare` holds out from training for evaluation, chosen by a hash
    of their names, so that the choice stays when the data grows; 0..0.5."""
    samples_per_shard: Annotated[int, at_least(1)] = 256
    """Largest number of samples in a shard."""
    shuffle_window: Annotated[int, at_least(1)] = 8
    """Shards among which samples are shuffled; more is closer to a full shuffle."""
    num_workers: Annotated[int, _THREADS, MAY_CHANGE] = 4
    """Threads of each process that read samples ahead; a distant store needs more."""
    cache: Annotated[str | None, PATH, MAY_CHANGE] = None
    """Folder on a local disk for what was read from a URL, in `flux2-ds-cache` within it. Default: none,
    so that every epoch reads everything again."""
    cache_gb: Annotated[float, POSITIVE, MAY_CHANGE] = 50.0
    """Largest size of `cache`; what was used least recently goes first. In GB."""


@dataclass(frozen=True, kw_only=True)
class Captions:
    """The texts that `prepare` makes of the captions and encodes. Training draws one of an image's texts each
    time that it serves it. Changed: `prepare` encodes what differs, and a run goes on with its own shards only."""

    one_per_line: bool = False
    """Each line of a caption is a caption of its own. A list of texts in metadata or JSON is several captions,
    too."""
    trigger_word: str | dict[str, str] = ""
    """Word that stands for what is trained, or one for each source by its name in `data.images`; must be in
    captions, in which `[trigger]` stands for it. Exports name it."""
    add_trigger_word: bool = False
    """Put the trigger word, with a comma, before each text that lacks it."""
    prefix: str | dict[str, str] = ""
    """Text before each caption, as it is, so end it with a blank; or one for each source by its name."""
    suffix: str | dict[str, str] = ""
    """Text behind each caption, as it is; or one for each source by its name."""
    shuffle_tags: bool = False
    """Shuffle the tags of a caption behind the first `keep_tags`; with `variants`."""
    keep_tags: Annotated[int, NOT_NEGATIVE] = 1
    """First tags of a caption that stay where they are, and are not dropped."""
    tag_dropout: Annotated[float, BELOW_ONE] = 0.0
    """Share of the tags behind the first `keep_tags` that a text lacks; one with the trigger word stays. 0..1; with
    `variants`."""
    tag_separator: Annotated[str, _NOT_EMPTY] = ","
    """What stands between tags."""
    variants: Annotated[int, between(1, 1000)] = 1
    """Texts made of each caption, with `shuffle_tags` or `tag_dropout`: each is encoded and stored. Held-out
    images have one, with all tags in order."""


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """How `prepare` encodes."""

    text_device: Literal["accelerator", "cpu"] = "accelerator"
    """Where the text encoder runs; the VAE is always on the accelerator."""
    text_weights: Literal["auto", "fp32", "bf16", "int8", "nf4"] = "auto"
    """Weights of the text encoder. int8 and nf4 are bitsandbytes'. `auto`: bf16, in which it was
    trained, unless `precision` is fp32."""
    text_batch_size: Annotated[int, at_least(1)] = 8
    """Captions encoded at once."""
    vae_precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the VAE. fp32 is what the latents deserve; bf16 is faster."""
    vae_slicing: bool = False
    """Encode the images of a batch one after the other: less memory."""
    vae_tiling: bool = False
    """Encode large images in overlapping tiles: less memory, slightly other latents."""
    image_batch_size: Annotated[int, at_least(1)] = 4
    """Images encoded at once."""
    reference_resolution: Annotated[int, between(PIXELS_PER_TOKEN, 16384)] = 1024
    """Reference images of more than this many px squared are made smaller; in px. Inference uses
    1024."""
    decode_threads: Annotated[int, _THREADS] = 4
    """Threads of each process that decode and crop images."""
    scratch_gb: Annotated[float, POSITIVE] = 100.0
    """Encoded captions that wait for their shard take at most this much disk in `data.shards`; when
    it is full, the images so far are encoded first. In GB."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapter, with any `method` but `full`."""

    rank: Annotated[int, between(1, 65536)] = 32
    """Rank r of the update. With `method: loha` the update has rank r²; 4 to 16 are usual. With `lokr` r is that of
    the larger Kronecker factor, which is a full matrix from half of its longer side on."""
    alpha: Annotated[float | None, POSITIVE] = None
    """Scale of the update is alpha / rank. Default: alpha = rank."""
    rslora: bool = False
    """Scale by alpha / √rank instead (rank-stabilized LoRA), which lets high ranks learn as fast as low ones."""
    targets: str | list[str] = "all"
    """`all`: every linear of both block kinds. `attention`: without the separate feed-forward
    layers of the double blocks. `diffusers`: the default of diffusers' training script. Or a regular
    expression, or several, for the end of linears' names: `attn.to_[qkv]`,
    `single_transformer_blocks.1\\d.attn.to_out`."""
    rank_pattern: Annotated[dict[str, int], between(1, 65536)] = field(default_factory=dict)
    """Other ranks, by an expression such as in `targets`: `{ff.*: 8}`; the first that matches holds."""
    alpha_pattern: Annotated[dict[str, float], POSITIVE] = field(default_factory=dict)
    """Other alphas, by an expression."""
    dropout: Annotated[float, BELOW_ONE] = 0.0
    """Dropout on the adapter's input; 0..1. For `lora` and `dora`."""
    factor: Annotated[int | None, at_least(2)] = None
    """With `method: lokr`: rows and columns of the smaller Kronecker factor, where it divides the linear's; else the
    next smaller divisor. Small: a larger, more expressive adapter. Default: near the square root."""
    decompose_both: bool = False
    """With `method: lokr`: the smaller Kronecker factor has rank r, too."""
    init: Literal["gaussian", "pissa", "olora"] = "gaussian"
    """What A and B begin as. `gaussian`: A random, B zero. `pissa`: the largest singular vectors of W; `olora`: the
    first columns of its QR; both are taken out of the base, which must not be quantized. For `method: lora`."""
    init_from: Annotated[str | None, PATH] = None
    """Adapter file to go on training, in diffusers' names, Black Forest Labs', kohya's or LyCORIS'. Rank, alpha,
    rslora, factor and targets are the file's. Read once: a run that continues has its checkpoint."""
    merge_first: Annotated[list[str], PATH] = field(default_factory=list)
    """Adapter files that become part of the base while training, sampling and previews, and are left out of
    the export: what is trained over them is used beside them. For a distilled klein, its assistant adapter."""
    merge_strengths: list[float] = field(default_factory=list)
    """Of the files of `merge_first`. Default: 1 each."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Batch arithmetic. Gradient accumulation is derived: global / (micro × processes)."""

    global_size: Annotated[int, at_least(1)] = 8
    """Samples per optimizer step, over all processes."""
    micro_size: Annotated[int, at_least(1), MAY_CHANGE] = 1
    """Samples per forward pass of one process."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Flow matching."""

    timestep_sampling: Literal["flux", "uniform", "logit_normal", "shift", "mode"] = "flux"
    """Distribution of t. `flux`: logit-normal, shifted by the number of image tokens. `shift`: the
    same with the fixed `shift`. `logit_normal`: sigmoid(N(logit_mean, logit_std²)). `uniform`: U(0, 1).
    `mode`: more of the middle by `mode_scale`."""
    stratified: bool = False
    """Share the distribution out among the samples of a global batch instead of drawing each t
    independently: a less noisy loss."""
    logit_mean: float = 0.0
    """Mean of the normal under the sigmoid."""
    logit_std: Annotated[float, POSITIVE] = 1.0
    """Standard deviation of the normal under the sigmoid."""
    shift: Annotated[float, POSITIVE] = 3.0
    """s in t' = s·t / (1 + (s-1)·t), with `timestep_sampling: shift`."""
    mode_scale: Annotated[float, between(-1, 1.75)] = 1.29
    """With `timestep_sampling: mode`, between -1 (more of the ends) and 1.75 (more of the middle)."""
    max_shift_tokens: Annotated[int, at_least(1)] = 4096
    """Number of image tokens at which the `flux` shift stops growing."""
    guidance: Annotated[float, NOT_NEGATIVE] = 1.0
    """Guidance value given to FLUX.2-dev while training. klein has no such input."""
    caption_dropout: Annotated[float, between(0, 1)] = 0.0
    """Share of the samples trained with the empty caption; 0..1."""
    reference_dropout: Annotated[float, BELOW_ONE] = 0.0
    """Share of the steps whose samples are trained without their reference images, so that the model still makes
    images from text alone; 0..1."""
    masked_loss: bool = False
    """Weight the loss by the masks of the images that have one: `boat.mask.png` beside `boat.png`,
    white where it is trained on."""
    unmasked_weight: Annotated[float, between(0, 1)] = 0.0
    """With `masked_loss`: weight of what a mask leaves out, beside 1 of what it keeps."""
    loss: Literal["mse", "huber", "pseudo_huber"] = "mse"
    """What an error e of the prediction costs. `mse`: e². `huber`: e² up to `huber_delta`, beyond it growing
    linearly, so that images with a flaw pull less. `pseudo_huber`: the same in one smooth curve."""
    huber_delta: Annotated[float, POSITIVE] = 1.0
    """Error from which `huber` and `pseudo_huber` grow linearly; latents have a standard deviation of 1."""
    weighting: Literal["none", "cosmap", "min_snr"] = "none"
    """Weight of a sample by its t. `cosmap`: 2 / (π(1 - 2t + 2t²)), more of the middle. `min_snr`:
    min((1 - t)², `min_snr_gamma`·t²), less of the ends."""
    min_snr_gamma: Annotated[float, POSITIVE] = 5.0
    """γ of `weighting: min_snr`."""
    source_shift: Annotated[dict[str, float], POSITIVE] = field(default_factory=dict)
    """s in t' = s·t / (1 + (s-1)·t) for the samples of a source, by its name, after the distribution: above 1
    more noise, where composition is learned, below 1 less, where details are. Default: 1."""


@dataclass(frozen=True, kw_only=True)
class Preservation:
    """Keep what the model knew beside what an adapter learns: by images of other things, and by predictions that
    are not to change."""

    sources: list[str] = field(default_factory=list)
    """Regularization sources, by their names in `data.images` or `data.more_shards`: images of what is to stay, your
    own or made by `flux2-ds sample`."""
    target: Literal["image", "base"] = "image"
    """What the prediction on their images is trained towards. `image`: the images. `base`: what the model predicts
    without its adapter, which takes a forward pass more for such samples."""
    prompts: list[str] = field(default_factory=list)
    """Prompts whose images are not to change, such as the class of what is trained: in `share` of the other samples one
    of them is in the caption's place, and the target is as with `base`. `prepare` encodes them."""
    share: Annotated[float, between(0, 1)] = 0.0
    """Share of the samples with one of `prompts`; 0..1."""
    every: Annotated[int, at_least(1)] = 1
    """With `prompts`: only every so many-th step has such samples, `share` of its own. Fewer steps then take the forward
    pass more."""
    weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """Weight of all these samples in the loss, beside 1 of the others."""

    @property
    def uses_base(self) -> bool:
        """Whether the model predicts without its adapter while it is trained."""
        return bool(self.prompts) or self.sources_to_base

    @property
    def sources_to_base(self) -> bool:
        """Whether regularization images are trained towards the model without its adapter."""
        return bool(self.sources) and self.target == "base"

    def due(self, step: int) -> bool:
        """Whether samples of `step`, from 0, may get one of `prompts`."""
        return (step + 1) % self.every == 0


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The optimizer. Trainable weights have fp32 masters in every precision."""

    name: Literal["adamw", "adamw8bit", "adamw8bit_paged", "adafactor", "prodigy", "muon"] = "adamw"
    """`adamw`: in one pass on CUDA; where the ZeRO config offloads the optimizer, its state passes through the card,
    at stage 3 DeepSpeed's CPU Adam updates it.
    `adamw8bit`: bitsandbytes, moments in 8 bits; `_paged`: they move to host memory when the card is
    full. `adafactor`, `prodigy` and `muon` (adapters of `method: lora` only) need `deepspeed: zero0`."""
    learning_rate: Annotated[float, POSITIVE] = 1e-4
    """Peak learning rate. Prodigy finds its own step size and multiplies it by this: set 1."""
    schedule: Literal["constant", "cosine", "linear", "rex"] = "constant"
    """Shape after the warm-up; all but `constant` end at 0. `rex` stays high longer than linear."""
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps over which the learning rate rises linearly from 0."""
    betas: Annotated[tuple[float, float], BELOW_ONE] = (0.9, 0.999)
    """Decay of the first and second moment; not used by adafactor and muon."""
    eps: Annotated[float, NOT_NEGATIVE] = 1e-8
    """Added to the denominator; not used by adafactor and muon."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    """Decoupled weight decay, of matrices: not of a DoRA's magnitudes, norm scales and whatever has one dimension."""
    max_grad_norm: Annotated[float, NOT_NEGATIVE] = 1.0
    """Gradients are clipped to this global L2 norm; 0 turns clipping off."""
    nonfinite: Annotated[Literal["stop", "skip"], MAY_CHANGE] = "stop"
    """What to do when a gradient is NaN or infinite: the update is never made; stop, or count the
    step as skipped and go on. Either way the samples are written to run_dir/nonfinite."""
    ema_decay: Annotated[float | None, Range("in (0, 1)", lambda v: 0 < v < 1)] = None
    """Keep an exponential moving average of the trained weights, with this decay, e.g. 0.999; in
    checkpoints, and exported with `export --weights ema`."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Checkpoints: trainable weights, optimizer and position, as safetensors and JSON."""

    every: Annotated[int, at_least(1)] = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_last: Annotated[int, at_least(1)] = 2
    """Checkpoints kept; older ones are removed."""
    keep_every: Annotated[int | None, at_least(1)] = None
    """Checkpoints at multiples of this many steps are kept for good."""
    keep_best: bool = False
    """Keep the checkpoint with the lowest validation loss as well."""
    background: bool = False
    """Copy what is trained into host memory and write it while training goes on; in pieces, for which training
    waits, where half of the free host memory does not hold it."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """Console, metrics.jsonl, Weights & Biases and TensorBoard."""

    every: Annotated[int, at_least(1)] = 10
    """Steps between log lines."""
    wandb: Literal["online", "offline", "disabled"] = "offline"
    """Weights & Biases mode. Without an API key `online` becomes `offline`, said in the log."""
    tensorboard: bool = False
    """Write event files for TensorBoard, too, into RUN_DIR/tensorboard. Needs `flux2-ds[tensorboard]`."""
    project: str = "flux2-ds"
    """Weights & Biases project."""
    entity: str | None = None
    """W&B's user or team. Default: the key's."""
    name: str | None = None
    """W&B's name of the run. Default: that of run_dir."""
    group: str | None = None
    """W&B's group, to compare runs side by side."""
    tags: list[str] = field(default_factory=list)
    """W&B's tags."""
    notes: str | None = None
    """W&B's notes."""
    alerts: bool = False
    """W&B's alerts, which it mails: when a step is skipped for a NaN, when a run ends by an error, and when nothing
    has moved for half of `launch.hang_timeout_s`."""
    artifacts: list[Literal["checkpoints", "exports"]] = field(default_factory=list)
    """What W&B keeps a copy of, versioned. Of a full fine-tune that is tens of GB a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The loss on images that are not trained on (`data.validation_fraction`), always with the same noise and
    timesteps, in the log and the metrics as `validation/loss`."""

    every: Annotated[int, at_least(1)] = 500
    """Steps between evaluations; the first comes after so many, one more at the end."""
    every_epochs: Annotated[float | None, POSITIVE] = None
    """The same in epochs, rounded to steps, in place of `every`."""
    at_start: bool = False
    """Evaluate before step 1 as well."""
    against_base: bool = False
    """Evaluate the model without its adapter as well, once in each start: how much lower the loss is than
    there, on the same noise, is `validation/gain`, from which it is gone how hard the images are."""
    patience: Annotated[int | None, at_least(1)] = None
    """End the run, with a checkpoint, after so many evaluations in a row without a new lowest loss. Default:
    it goes on to the last step."""
    samples: Annotated[int, at_least(1)] = 64
    """Largest number of held-out samples that are used, from all buckets in proportion, each once."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What `flux2-ds sample` renders, and training with `every`."""

    every: Annotated[int | None, at_least(1)] = None
    """Steps between previews while training: the prompts are rendered before step 1, after each so many steps
    and at the end, into RUN_DIR/previews and W&B. `prepare` encodes the prompts. Default: none."""
    every_epochs: Annotated[float | None, POSITIVE] = None
    """The same in epochs, rounded to steps, in place of `every`."""
    prompts: list[str] = field(default_factory=lambda: ["a photograph"])
    """Prompts; one row of the grid each."""
    references: Annotated[list[str], PATH] = field(default_factory=list)
    """Reference images, in this order, that every prompt edits."""
    height: Annotated[int, _PIXELS] = 1024
    """In px, a multiple of 16."""
    width: Annotated[int, _PIXELS] = 1024
    """In px, a multiple of 16."""
    steps: Annotated[int, between(1, 1000)] = 28
    """Denoising steps."""
    guidance: Annotated[float, NOT_NEGATIVE] = 4.0
    """Guidance scale."""
    seed: Annotated[int, SEED] = 0
    """Seed of the starting noise."""

    @property
    def in_training(self) -> bool:
        """Whether training renders any."""
        return self.every is not None or self.every_epochs is not None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Where the recipe runs."""

    accelerator: Literal["cuda", "cpu"] = "cuda"
    """CUDA GPUs with NCCL, or CPU processes with gloo."""
    processes: Annotated[int | None, between(1, 4096)] = None
    """Processes on each machine. Default: one for each visible GPU; on the CPU one."""
    link: Literal["pcie3", "pcie4", "pcie5", "nvlink"] = "pcie4"
    """What joins each GPU to host memory and, with `base_placement: sharded`, to the other GPUs: for what `plan` and
    `base_placement: auto` take for fastest; `flux2-ds doctor` measures it. `nvlink` is between GPUs; to the host it means pcie5."""
    hostfile: Annotated[str | None, PATH] = None
    """DeepSpeed hostfile (`host slots=8` a line) to run on several machines over ssh."""
    hang_timeout_s: Annotated[float, between(0, 10**7)] = 600.0
    """Seconds in which no process moves on in a step, an evaluation or a checkpoint, after which the
    run is ended and the process that the others wait for is named; 0 turns it off. It must be longer
    than the longest forward and backward pass, and than compiling for one bucket before step 1."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run."""

    run_dir: Annotated[str, PATH, MAY_CHANGE]
    """Where the run is kept: resolved recipe, metrics, checkpoints, exports. Starting again
    continues."""
    seed: Annotated[int, SEED] = 0
    """Seed of data order, noise, timesteps and adapter initialisation."""
    steps: Annotated[
        int, at_least(1), MayChange(if_=lambda new: new["optimizer.schedule"] == "constant")
    ] = 1000
    """Optimizer steps."""
    epochs: Annotated[float | None, POSITIVE] = None
    """Length in epochs of the prepared data, in place of `steps`; with `data.weights` an epoch serves
    each source as often as its weight says. A run keeps the steps that this came to."""
    method: Literal["lora", "dora", "lokr", "loha", "full"] = "lora"
    """Train an adapter, or all weights. `lokr`: ΔW is a Kronecker product (arXiv 2309.14859), `loha`: an elementwise
    product of two low-rank matrices (arXiv 2108.06098). docs/adapters.md says which programs load which."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Compute precision: model, activations and engine follow it."""
    base_weights: Literal["bf16", "fp8", "int8", "nf4", "nf4_fp8", "nf4_int8"] | None = None
    """How an adapter's frozen base is held and multiplied. `fp8`, `int8`: both in 8 bits. `nf4`: held
    in 4 bits, multiplied in `precision`; `nf4_fp8`, `nf4_int8`: held in 4, multiplied in 8. `bf16`:
    neither, with `precision: bf16`. Default: as `precision`. docs/memory-and-speed.md says what each
    costs. Below ZeRO stage 3, unless `bf16`; `base_placement` shards such a base."""
    compute: Literal["precision", "fp8"] = "precision"
    """What the blocks' linears of a full fine-tune in bf16 are multiplied in. `fp8`: forward and both gradients in 8
    bits, with a scale for each row; the weights, the first and the last block and all other layers stay in bf16. For Ada,
    Hopper and newer. An adapter's frozen base has `base_weights` for that."""
    base_placement: Annotated[Literal["gpu", "host", "sharded", "auto"], MAY_CHANGE] = "gpu"
    """Where an adapter's frozen blocks are, below ZeRO stage 3. `gpu`: on every GPU. `host`: in pinned host
    memory, one copy a machine. `sharded`: on the GPUs, a part on each. Two buffers on the GPU hold the block that
    is computed and the next one, which arrives meanwhile. What is computed stays the same. `auto`: `gpu` where
    that fits, else the fastest of the others with its `base_resident`, by the memory that is free and `launch.link`."""
    base_resident: Annotated[float, between(0, 1), MAY_CHANGE] = 0.0
    """Share of the blocks that are on every GPU nevertheless, with `base_placement: host` or `sharded`; 0..1."""
    base_shard_group: Annotated[int | None, at_least(2), MAY_CHANGE] = None
    """How many processes share one copy with `base_placement: sharded`, neighbors by rank; best those of one machine.
    Default: `launch.processes`, or up to 8."""
    attention: Annotated[
        Literal["auto", "native", "cudnn", "flash", "efficient", "math", "flash_attn", "xformers"],
        MAY_CHANGE,
    ] = "auto"
    """Attention backend: torch's (cuDNN, flash, memory-efficient, math, or `native`: its choice) or
    an installed package. `auto`: cuDNN on Hopper, else native."""
    compile: Annotated[bool | None, MAY_CHANGE] = None
    """Compile each block with torch.compile; for training, not for images. Default: on CUDA."""
    cuda_graphs: Annotated[bool | None, MAY_CHANGE] = None
    """Record the forward and backward passes of each shape as CUDA graphs and replay them, so that Python
    does not hold up small models and images. For adapters with compiled blocks, below ZeRO stage 3,
    with `base_placement: gpu`, without lora.dropout and offload_activations. Default: so, in bf16, if
    memory allows."""
    cache_transposed_base: Annotated[bool | None, MAY_CHANGE] = None
    """Hold an fp8 or int8 base a second time, transposed, which spares the backward pass turning every weight
    around: about 2 % of a step for as many bytes again. With `base_placement: gpu` only. Default: if memory
    allows."""
    activation_checkpointing: Annotated[
        Literal["auto", "none", "full"] | float,
        Range("auto, none, full or between 0 and 1", lambda v: isinstance(v, str) or 0 <= v <= 1),
        MAY_CHANGE,
    ] = "auto"
    """Share of the blocks that recompute their activations in the backward pass, 0..1: less memory,
    slower. `none` is 0, `full` is 1, `auto` as few as the card has room for (on the CPU: none)."""
    offload_activations: Annotated[bool, MAY_CHANGE] = False
    """Keep what the blocks that recompute need, their inputs, in pinned host memory until the
    backward pass: less memory on the card, for larger images and micro-batches."""
    deepspeed: Annotated[str | dict[str, Any], PATH, MAY_CHANGE] = "zero2"
    """DeepSpeed config: the name of a shipped file (zero0, zero1, zero2, zero2_offload, zero3,
    zero3_offload_optimizer, zero3_offload), a path, or the config itself."""
    accept_changes: Annotated[bool, MAY_CHANGE] = False
    """Continue a run although the recipe differs from the one it was started with."""
    model: Model
    data: Data
    captions: Annotated[Captions, MAY_CHANGE] = field(default_factory=Captions)
    prepare: Annotated[Prepare, MAY_CHANGE] = field(default_factory=Prepare)
    lora: Lora = field(default_factory=Lora)
    batch: Batch = field(default_factory=Batch)
    objective: Objective = field(default_factory=Objective)
    preservation: Preservation = field(default_factory=Preservation)
    optimizer: Optimizer = field(default_factory=Optimizer)
    checkpoint: Annotated[Checkpoint, MAY_CHANGE] = field(default_factory=Checkpoint)
    log: Annotated[Log, MAY_CHANGE] = field(default_factory=Log)
    validation: Annotated[Validation, MAY_CHANGE] = field(default_factory=Validation)
    preview: Annotated[Preview, MAY_CHANGE] = field(default_factory=Preview)
    launch: Annotated[Launch, MAY_CHANGE] = field(default_factory=Launch)


IN_EPOCHS = {
    "epochs": "steps",
    "validation.every_epochs": "validation.every",
    "preview.every_epochs": "preview.every",
}
"""Setting in epochs -> the one in steps that it stands for; `data.dataset.in_steps` replaces it."""


def trigger_words(value: str | dict[str, str]) -> list[str]:
    """The words of `captions.trigger_word`, each once."""
    words = [value] if isinstance(value, str) else value.values()
    return [word for word in dict.fromkeys(words) if word]


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain YAML and JSON values, every default written out."""
    values = dataclasses.asdict(recipe)
    values["optimizer"]["betas"] = list(recipe.optimizer.betas)
    return values


def is_url(location: str) -> bool:
    """Whether `location` is read through fsspec."""
    return "://" in location
