"""Bytes of a training step, by part, from dimensions alone; and what to change if they are not there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flux2_ds.config.adapter import adapted_linears, adapter_tensors
from flux2_ds.config.model_spec import (
    DOUBLE_LINEARS,
    PIXELS_PER_TOKEN,
    SINGLE_LINEARS,
    TEXT_TOKENS,
    TOKEN_CHANNELS,
    Spec,
)
from flux2_ds.config.plan import Plan, captures, compiles, streamed_blocks, transposable
from flux2_ds.config.recipe import Recipe

GIB = 2**30
_CUDA_GRAPHS, TRANSPOSED = "CUDA graphs", "transposed base"
_SNAPSHOT = "checkpoint snapshot"
_OPTIONAL = {_CUDA_GRAPHS: "cuda_graphs", TRANSPOSED: "cache_transposed_base"}
"""What is made only where memory is left for it -> its setting."""

_KEPT = {
    (True, "lora", False): (12, 11),
    (True, "lora", True): (12, 11),
    (True, "dora", False): (13.5, 12),
    (True, "dora", True): (24, 21),
    (True, "lokr", False): (18, 15),
    (True, "full", False): (13, 12),
    (False, "lora", False): (24.5, 19),
    (False, "lora", True): (36, 24),
    (False, "dora", False): (35.5, 29),
    (False, "dora", True): (47, 34),
    (False, "lokr", False): (18, 15),
    (False, "full", False): (32, 21),
}
"""(compiled, method, with dropout) -> residual streams that a double and a single block keep for the backward
pass without checkpointing; adapters on all linears. Of LoKr and LoHa without what its factors add for each token."""
_WORKING, _WORKING_LATE = 24, 34
"""Streams of the block that runs, with what it has kept: compiled; and where it is not, or DeepSpeed's stage 3 has
gathered the next block's weights already."""
_RENDERING = 21  # the same without a backward pass
_DECODER_CHANNELS = 128  # of the released VAE, at the image's full size
_CONTEXT = 0.6 * GIB  # CUDA context, cuBLAS and cuDNN workspaces, outside torch's count

ZERO_GROUP = 1 << 29
"""Elements that ZeRO's stages 1 and 2 shard together."""
_LIVE = 1e9  # DeepSpeed's default of stage3_max_live_parameters and of sub_group_size
_PERSISTENT = 1e5  # and of stage3_param_persistence_threshold


@dataclass(frozen=True)
class Memory:
    """Peak of one process, in bytes, by part: on its card, and of host memory."""

    card: dict[str, float]
    host: dict[str, float]

    def __or__(self, other: Memory) -> Memory:
        return Memory(self.card | other.card, self.host | other.host)

    @property
    def on_card(self) -> float:
        """What torch allocates at the peak."""
        return sum(self.card.values())

    @property
    def on_host(self) -> float:
        """Host memory of one process beside its libraries."""
        return sum(self.host.values())

    @property
    def needed_on_host(self) -> float:
        """The same without a snapshot, which is taken in pieces where there is no room."""
        return self.on_host - self.host.get(_SNAPSHOT, 0)

    @property
    def records(self) -> bool:
        """Whether passes are recorded as CUDA graphs."""
        return _CUDA_GRAPHS in self.card

    @property
    def transposes(self) -> bool:
        """Whether the base is held a second time, transposed."""
        return TRANSPOSED in self.card

    @property
    def spare(self) -> list[str]:
        """The settings that would free memory if they were false."""
        return [setting for part, setting in _OPTIONAL.items() if part in self.card]

    def fits(self, card_bytes: float, host_bytes: float = math.inf) -> bool:
        """Whether so many free bytes are enough, with the CUDA context and 2 % of slack on the card."""
        return self.on_card * 1.02 + _CONTEXT <= card_bytes and self.needed_on_host <= host_bytes


def estimate(
    spec: Spec, plan: Plan, image_tokens: int, kept: int, card_bytes: float = math.inf
) -> Memory:
    """Estimate the memory of one process of a run.

    `image_tokens`: of the largest bucket, references included. `kept`: number of blocks that keep their
    activations. `card_bytes`: free on the card; CUDA graphs and a transposed base that would not fit are not
    counted, nor made unless the recipe asks for them.
    """
    run = _Run(spec, plan)
    memory = _weights(run) | _training_state(run) | _activations(run, image_tokens, kept)
    if run.bf16_masters and run.stage == 2 and plan.accumulation == 1:
        # Those of a group are allocated when its first bucket is full: by then the activations of its blocks, and of
        # the groups before it, are gone.
        activations, gradients = memory.card["activations"], memory.card["gradients"]
        at_once = min(1, ZERO_GROUP / run.trained)
        highest = max(at_once * gradients, gradients - (1 - at_once) * activations)
        memory.card["gradients"] = max(0, highest - activations * _bucket(run) / run.trained)
    if plan.recipe.checkpoint.background:
        # Of an adapter rank 0 has all.
        memory.host[_SNAPSHOT] = checkpoint_bytes(spec, plan.recipe) / plan.processes
    optional = {}
    if captures(plan):
        optional[_CUDA_GRAPHS] = _cuda_graphs(run, memory)
    if transposable(plan):
        optional[TRANSPOSED] = float(sum(block_matrices(spec)))
    for part, size in optional.items():
        more = memory | Memory({part: size}, {})
        if getattr(plan.recipe, _OPTIONAL[part]) or more.fits(card_bytes):
            memory = more
    return memory


class _Run:
    """What several parts ask of a run; sizes are numbers of elements."""

    def __init__(self, spec: Spec, plan: Plan) -> None:
        self.spec, self.plan, self.recipe = spec, plan, plan.recipe
        self.stage, self.zero = plan.zero_stage, plan.zero
        self.full = plan.recipe.method == "full"
        self.element = 4 if plan.recipe.precision == "fp32" else 2
        """Bytes of a weight or activation in the compute precision."""
        self.trained = trained_parameters(spec, plan.recipe)
        self.share = self.trained / plan.processes if self.stage else self.trained
        """Of what is trained, the part whose optimizer state this process has."""
        self.bf16_masters = self.full and plan.recipe.precision == "bf16"


def _weights(run: _Run) -> Memory:
    """The base, what ZeRO-3 gathers of it and leaves whole, and the adapter."""
    recipe, processes = run.recipe, run.plan.processes
    card: dict[str, float] = {}
    host: dict[str, float] = {}
    whole = base_bytes(run.spec, recipe.base_weights, run.element)
    on_host = run.plan.offloads("offload_param")
    (host if on_host else card)["base weights"] = whole / (processes if run.stage == 3 else 1)
    if streamed := streamed_bytes(recipe, run.spec):
        card["base weights"] = whole - sum(streamed)
        if run.plan.shard_group is None:
            host["base weights"] = sum(streamed) / run.plan.per_host  # which share one copy
        else:
            card["base weights"] += sum(streamed) / run.plan.shard_group
        card["streaming buffers"] = buffer_bytes(streamed)
    if on_host:
        # DeepSpeed moves what is trained into one pinned piece.
        part, element = ("base weights", run.element) if run.full else ("adapter", 4)
        host[part] = _pinned_bytes(element * run.share)
    if run.stage == 3:
        if processes > 1 or on_host:  # else they are whole where they lie
            live = run.zero.get("stage3_max_live_parameters", _LIVE)
            card["gathered weights"] = min(whole, live * run.element)
        if processes > 1:
            card["kept whole"] = _kept_whole(run)
        if (group := run.zero.get("zero_hpz_partition_size", 1)) > 1:
            at = host if on_host else card
            at["hpZ's copy"] = whole / min(group, processes)
    if not run.full:
        card["adapter"] = 4 * (run.share if run.stage == 3 else run.trained)
    return Memory(card, host)


def _kept_whole(run: _Run) -> float:
    """An adapter's small tensors, which ZeRO-3 keeps whole on each card, beside a process's part."""
    tensors = [] if run.full else adapter_tensors(run.spec, run.recipe)
    threshold = run.zero.get("stage3_param_persistence_threshold", _PERSISTENT)
    return 4 * sum(elements for elements in tensors if elements <= threshold)


def _training_state(run: _Run) -> Memory:
    """Masters, gradients, the optimizer's state, ZeRO's buffers and the average."""
    memory = Memory({}, {})
    recipe, adam = run.recipe, run.recipe.optimizer.name
    offloaded = run.plan.offloads("offload_optimizer")
    at = memory.host if offloaded else memory.card
    if offloaded and run.stage == 3:
        memory.host.update(_cpu_adam(run))
    else:
        if run.stage and (run.full or run.stage < 3):
            at["fp32 masters"] = 4 * run.share
        summed = run.plan.accumulation > 1
        in_bf16 = run.plan.deepspeed.get("communication_data_type", "bf16") == "bf16"
        passes = offloaded or (adam == "adamw" and compiles(recipe))
        element = 4
        if run.bf16_masters and run.stage == 1:
            element = 8 if offloaded and summed else 6  # in both dtypes
        elif run.bf16_masters and run.stage == 2 and passes and not summed and in_bf16:
            element = 2  # flat_adamw.py reads them
        where = memory.host if offloaded and run.stage == 2 and summed else memory.card
        where["gradients"] = element * (run.share if run.stage >= 2 else run.trained)
    at["optimizer"] = optimizer_bytes(adam) * run.share
    # At stage 1 DeepSpeed's optimizer for these has no buffers, unless it works on the host.
    bufferless = run.bf16_masters and run.stage == 1 and not offloaded
    if run.stage and run.zero.get("contiguous_gradients", True) and not bufferless:
        memory.card["reduction buffers"] = _reduction_buffers(run)
    if recipe.optimizer.ema_decay is not None:
        at["EMA"] = 4 * run.share
    return memory


def _cpu_adam(run: _Run) -> dict[str, float]:
    """Host memory that DeepSpeed 0.19.8 gives its CPU Adam at stage 3 beside the moments.

    Pinned, where the config says so, are the sums of gradients in one piece and a copy of them in groups.
    """
    share = run.share
    pin = _pinned_bytes if run.zero["offload_optimizer"].get("pin_memory", True) else float
    group = min(share, run.zero.get("sub_group_size", _LIVE))
    groups, rest = divmod(share, group)
    copies = groups * pin(4 * group) + (pin(4 * rest) if rest else 0)
    return {"fp32 masters": 4 * share, "gradients": pin(4 * share) + copies}


def _reduction_buffers(run: _Run) -> float:
    """Buckets of gradients on their way between the processes.

    Stage 3 orders a bucket by process in a copy. An adapter fills its bucket once most activations are gone.
    """
    buffers = 2 if (run.full if run.stage == 3 else run.zero.get("overlap_comm")) else 1
    halved = run.recipe.precision == "fp16" or (run.bf16_masters and run.stage > 1)
    bucket = _bucket(run)
    given = run.plan.deepspeed.get("communication_data_type")
    # A bucket is copied where it travels in another dtype, and by DeepSpeed's `reduce_scatter`.
    copy = 0 if given is None or (given == "fp32") != halved else 4 if halved else 2
    if run.stage < 3 and run.zero.get("reduce_scatter", True):
        copy += 2 if halved else 4
    return ((2 if halved else 4) * buffers + copy) * bucket


def _bucket(run: _Run) -> float:
    """Elements; engine.py sees to it that there are no more than are trained."""
    return min(run.zero.get("reduce_bucket_size", 5e8), run.trained)


def _activations(run: _Run, image_tokens: int, kept: int) -> Memory:
    """What blocks keep for the backward pass, what one needs while it runs, and the batch."""
    spec, recipe = run.spec, run.recipe
    tokens = image_tokens + TEXT_TOKENS
    stream = tokens * recipe.batch.micro_size * spec.width * run.element
    double = max(0, kept - spec.single_blocks)
    single = kept - double
    in_double, in_single = kept_streams(recipe, spec)
    card, host = stream * (in_double * double + in_single * single), {}
    late = not compiles(recipe) or run.stage == 3
    if kept and not late:
        card -= stream * in_single  # of the last block, whose backward pass is the first
    if recipe.offload_activations:
        text = _pinned_bytes(stream * TEXT_TOKENS / tokens)
        image = _pinned_bytes(stream * image_tokens / tokens)
        inputs = (spec.double_blocks - double) * (text + image)
        inputs += (spec.single_blocks - single) * _pinned_bytes(stream)
        host = {"activations": inputs}
    else:
        card += stream * (spec.blocks - kept)
    # The block that runs: its intermediates, and its widest weight as the product reads it.
    working = (_WORKING_LATE if late else _WORKING) * stream + expanded_bytes(
        spec, recipe.base_weights
    )
    if recipe.method == "loha":  # its factors as those of a LoRA of rank r²
        each = [run.element * linear.rank**2 * (linear.rows + linear.columns)
                for linear in adapted_linears(spec, recipe.lora).values()]  # fmt: skip
        card, working = card + sum(each) * kept / spec.blocks, working + 3 * max(each)
    if recipe.compute == "fp8":  # a gradient's operands, and the widest weight's gradient
        working += 10 * tokens * recipe.batch.micro_size * spec.width + 2 * 9 * spec.width**2
    batch = recipe.batch.micro_size * TEXT_TOKENS * spec.text_width * 4.0
    return Memory({"activations": card, "working": working, "batch": batch}, host)


def _cuda_graphs(run: _Run, memory: Memory) -> float:
    """Gradients are copied out of the recorded passes, whose memory nothing else may use, and once more if they
    are then added to others or sharded."""
    recipe = run.recipe
    copies = 1 + (run.plan.accumulation > 1 or run.stage == 2)
    others: list[float] = [0]
    if recipe.data.validation_fraction or recipe.preservation.uses_base:
        others.append(memory.card["working"])
    if recipe.preview.in_training:
        pixels = recipe.preview.height * recipe.preview.width
        tokens, base = pixels // PIXELS_PER_TOKEN**2, recipe.base_weights
        others.append(
            rendering_bytes(run.spec, base, run.element, tokens, pixels, _DECODER_CHANNELS)
        )
    return 4 * run.trained * copies + memory.card["batch"] + max(others)


def kept_streams(recipe: Recipe, spec: Spec) -> tuple[float, float]:
    """What a double and a single block keep for the backward pass without checkpointing, in streams."""
    drops = recipe.method != "full" and recipe.lora.dropout > 0
    like = "lora" if recipe.method == "loha" else recipe.method
    double, single = _KEPT[compiles(recipe), like, drops]
    if recipe.method not in ("lokr", "loha"):
        return double, single
    more = [0, 0]
    for name, linear in adapted_linears(spec, recipe.lora).items():
        more[name.startswith("single")] += linear.kept(recipe.method)
    double += more[0] / spec.width / max(1, spec.double_blocks)
    return double, single + more[1] / spec.width / max(1, spec.single_blocks)


def _pinned_bytes(size: float) -> float:
    """What torch allocates: powers of two."""
    return 2.0 ** math.ceil(math.log2(size))


def not_yet_allocated(plan: Plan, memory: Memory, *, resumed: bool) -> float:
    """Bytes of the card that the warm-up finds free and the first step does not: the optimizer's state, below
    stage 3 ZeRO's buffers and gradients, at stages 0 and 1 those that wait for the next micro-batch's."""
    parts = ["optimizer"] * (not resumed)
    parts += ["reduction buffers"] * (plan.zero_stage < 3)
    waiting = plan.zero_stage < 2 and plan.accumulation > 1
    parts += ["gradients"] * (plan.zero_stage == 2 or waiting)
    return sum(memory.card.get(part, 0.0) for part in parts)


def kept_blocks(spec: Spec, plan: Plan, image_tokens: int, card_bytes: float) -> int:
    """How many blocks keep their activations: those that `activation_checkpointing` leaves; with `auto` as many
    as fit into `card_bytes`."""
    setting = plan.recipe.activation_checkpointing
    if setting != "auto":
        share = {"none": 0.0, "full": 1.0}[setting] if isinstance(setting, str) else setting
        return spec.blocks - round(share * spec.blocks)
    for kept in range(spec.blocks, 0, -1):
        # Kept blocks gain more than what is made where memory is left for it: for that there is none here.
        if estimate(spec, plan, image_tokens, kept, card_bytes=0).fits(card_bytes):
            return kept
    return 0


# Sizes of models and adapters

_NF4_BITS, _ROW_SCALE = 0.5 + 1 / 64, 4  # bytes a weight, its block's scale included, and a row
_TIMESTEP_FREQUENCIES = 256
_STATE = {"adamw8bit": 2, "adamw8bit_paged": 2, "adafactor": 0.1, "prodigy": 16, "muon": 4}
_MOMENTS = 8  # two in fp32


def block_matrices(spec: Spec) -> list[int]:
    """Elements of each of the blocks' linears."""
    double, single = DOUBLE_LINEARS.values(), SINGLE_LINEARS.values()
    widths = [*double] * spec.double_blocks + [*single] * spec.single_blocks
    return [spec.width**2 * inputs * outputs for inputs, outputs in widths]


def other_matrices(spec: Spec) -> list[int]:
    """Elements of each of the other linears: embedders, modulation and output layers."""
    width = spec.width
    embedders = [width * TOKEN_CHANNELS, width * spec.text_width]
    time = [width * _TIMESTEP_FREQUENCIES, width**2] * (1 + spec.guidance)
    modulation = [6 * width**2, 6 * width**2, 3 * width**2]
    return [*embedders, *time, *modulation, 2 * width**2, width * TOKEN_CHANNELS]


def adapter_parameters(spec: Spec, recipe: Recipe) -> int:
    """Elements of the adapter."""
    return sum(adapter_tensors(spec, recipe))


def trained_parameters(spec: Spec, recipe: Recipe) -> int:
    """Elements of what is trained: the model, or the adapter."""
    if recipe.method == "full":
        return sum(block_matrices(spec) + other_matrices(spec))
    return adapter_parameters(spec, recipe)


def optimizer_bytes(name: str) -> float:
    """Bytes of an optimizer's state for each trained element."""
    return _STATE.get(name, _MOMENTS)


def checkpoint_bytes(spec: Spec, recipe: Recipe) -> float:
    """Bytes of a checkpoint on disk: fp32 weights, the optimizer's state, the average."""
    name = recipe.optimizer.name
    # With each element of an 8-bit optimizer's two moments its scale is stored.
    scales = 8 if "8bit" in name else 0
    average = 0 if recipe.optimizer.ema_decay is None else 4
    each = 4 + optimizer_bytes(name) + scales + average
    return each * trained_parameters(spec, recipe)


def base_bytes(spec: Spec, base_weights: str | None, element: int) -> float:
    """Bytes of the model's weights. `element`: bytes of one that is not quantised."""
    blocks = _bytes_per_weight(spec, base_weights, element) * sum(block_matrices(spec))
    return blocks + element * sum(other_matrices(spec))


def _bytes_per_weight(spec: Spec, base_weights: str | None, element: int) -> float:
    """Of the blocks' linears."""
    if base_weights in ("fp8", "int8"):
        return 1 + _ROW_SCALE / spec.width
    if base_weights is not None and base_weights.startswith("nf4"):
        return _NF4_BITS + _ROW_SCALE / spec.width
    return element


def buffer_bytes(streamed: list[float]) -> float:
    """Of the two buffers on the card through which blocks of so many bytes pass."""
    return max(streamed[::2], default=0) + max(streamed[1::2], default=0)


def streamed_bytes(recipe: Recipe, spec: Spec) -> list[float]:
    """Bytes of each block whose frozen weights pass through the card."""
    element = 4 if recipe.precision == "fp32" else 2
    each = _bytes_per_weight(spec, recipe.base_weights, element) * spec.width**2
    double, single = (
        each * sum(inputs * outputs for inputs, outputs in linears.values())
        for linears in (DOUBLE_LINEARS, SINGLE_LINEARS)
    )
    return [
        double if n < spec.double_blocks else single for n in streamed_blocks(recipe, spec.blocks)
    ]


def rendering_bytes(
    spec: Spec,
    base_weights: str | None,
    element: int,
    image_tokens: int,
    pixels: int,
    channels: int,
) -> float:
    """Least bytes beside the weights while an image is denoised and decoded; kernels' workspaces come on top.

    `image_tokens`: references included. `channels`: of the VAE's decoder at the image's full size. Both
    parts were counted in tensors that exist at once, on the CPU.
    """
    stream = (image_tokens + TEXT_TOKENS) * spec.width * element
    # Rotations are in fp32. The decoder's last stage takes in twice its channels, three times at once.
    return max(
        _RENDERING * stream + expanded_bytes(spec, base_weights), 6.0 * channels * pixels * element
    )


def expanded_bytes(spec: Spec, base_weights: str | None) -> int:
    """Bytes of the widest weight as the product reads it."""
    product = {"fp8": 2, "int8": 2, "nf4": 2, "nf4_fp8": 1, "nf4_int8": 1}
    return 9 * spec.width**2 * product.get(base_weights or "", 0)


# What to change if memory is not enough

Doing = Literal["step", "text encoder", "transformer", "image"]


def out_of_memory(
    recipe: Recipe, doing: Doing, what: str, error: Exception, spare: Sequence[str] = ()
) -> str:
    """Say that the card's memory was not enough for `what`, and what to change; `error` is torch's."""
    reason = str(error).splitlines()[0]
    return f"the card's memory is not enough for {what} ({reason}). {advice(recipe, doing, spare)}"


def advice(recipe: Recipe, doing: Doing, spare: Sequence[str] = ()) -> str:
    """Say what to change if memory is not enough for what is done. `spare`: settings that may become false."""
    preview, prepare, micro = recipe.preview, recipe.prepare, recipe.batch.micro_size
    base = recipe.base_weights or recipe.precision
    smaller_base = recipe.method != "full" and not base.startswith("nf4")
    # ZeRO-3 is for a plain base that stays there.
    below = "deepspeed: zero2 with " if str(recipe.deepspeed).startswith("zero3") else ""
    smaller = "nf4" if base in ("fp8", "int8") else "fp8 or nf4"
    streamable = recipe.method != "full" and recipe.base_placement in ("gpu", "auto")
    checkpointing = recipe.activation_checkpointing
    all_checkpointed = checkpointing in ("full", 1.0)
    ways = {
        "step": [
            (not all_checkpointed, f"activation_checkpointing: full (it is {checkpointing})"),
            (all_checkpointed and not recipe.offload_activations, "offload_activations: true"),
            *((True, f"{setting}: false") for setting in spare),
            (micro > 1, f"a smaller batch.micro_size (it is {micro})"),
            (smaller_base, f"{below}base_weights: {smaller}"),
            (streamable, f"{below}base_placement: host"),
            (True, "a smaller data.resolution, prepared anew"),
        ],
        "text encoder": [
            (prepare.text_weights != "nf4", "prepare.text_weights: nf4"),
            (prepare.text_device != "cpu", "prepare.text_device: cpu"),
        ],
        "transformer": [(smaller_base, "base_weights: nf4"), (streamable, "base_placement: host")],
        "image": [
            (True, "smaller preview.width and preview.height"),
            (bool(preview.references), "fewer preview.references"),
            (smaller_base, "base_weights: nf4"),
            (streamable, "base_placement: host"),
        ],
    }[doing]
    chosen = [text for holds, text in ways if holds]
    change = f"Set {', or '.join(chosen)}" if chosen else ""
    if doing == "step":
        return f"{change}. `flux2-ds plan` lists what fits."
    larger = "un sample on a larger machine with the same run_dir."
    return f"{change}, or r{larger}" if change else f"R{larger}"


PREVIEW_ADVICE = (
    "Set smaller preview.width and preview.height, or cuda_graphs: false, or cache_transposed_base: false, "
    "or remove preview.every."
)
"""What to change if memory is not enough for the previews of a training."""
