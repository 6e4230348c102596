"""What an export says of itself: the metadata that user interfaces read, a model card, and the hub."""

from __future__ import annotations

import datetime
import json
import logging
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from flux2_ds.checkpoint.manager import STATE_NAME, Checkpoint
from flux2_ds.config.adapter import merges, targets_line
from flux2_ds.config.model_spec import RELEASED, Spec
from flux2_ds.config.recipe import Lora, trigger_words
from flux2_ds.errors import OutageError, UserError, counted, without_secrets
from flux2_ds.model.safetensors_file import content_digest
from flux2_ds.run.run_dir import Weights

log = logging.getLogger("flux2_ds")

PREVIEWS = "previews.png"
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""Of the hub's HTTP client, whichever it is."""


@dataclass(frozen=True)
class Export:
    """A file or directory that was written, and the programs that load what was trained from it."""

    path: Path
    programs: tuple[str, ...]
    error: float | None = None
    """Largest relative error of an update after reading it back."""


@dataclass(frozen=True)
class Origin:
    """What was trained on what, as the checkpoint's own recipe says."""

    checkpoint: Checkpoint
    weights: Weights
    spec: Spec
    directory: Path
    """Of the base model."""
    title: str
    given_trigger: str | None = None
    repository: str | None = None
    """Of the hub, where it will be."""
    lora: Lora = field(default_factory=Lora)
    """The settings of the adapter in the files."""

    @property
    def trigger(self) -> str | None:
        """Words that a prompt should have: those given, or that the captions were trained with."""
        captions = self.settings.get("captions", {})
        return (
            self.given_trigger or ", ".join(trigger_words(captions.get("trigger_word", ""))) or None
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe that was trained with, every default written out."""
        values: dict[str, Any] = self.checkpoint.state()["recipe"]
        return values

    @property
    def adapter(self) -> dict[str, Any]:
        """Its settings; of files the names alone, because a path says who trained."""
        begun = self.lora.init_from and Path(self.lora.init_from).name
        merged = [Path(path).name for path in self.lora.merge_first]
        return asdict(replace(self.lora, init_from=begun, merge_first=merged))

    @property
    def beside(self) -> list[tuple[str, float]]:
        """Files that were part of the base in training, and their strengths."""
        return merges(Lora(**self.adapter))

    @property
    def base(self) -> str:
        """The hub id of the base model; of a directory the name alone, because a path says who trained."""
        path: str = self.settings["model"]["path"]
        return path if path in RELEASED or not Path(path).is_dir() else Path(path).resolve().name

    @property
    def revision(self) -> str | None:
        """The base's commit in the hub's cache, or the one that the recipe names."""
        if self.directory.parent.name == "snapshots":
            return self.directory.name
        named: str | None = self.settings["model"]["revision"]
        return named

    @property
    def architecture(self) -> str:
        """As other trainers name it."""
        known = {spec: name for name, spec in RELEASED.items() if "base" in name or "dev" in name}
        name = known.get(self.spec, f"/FLUX.2-{self.spec.variant}").rpartition("/")[2]
        return name.replace("-base", "").replace("FLUX", "Flux").replace("B", "b")

    @property
    def samples_seen(self) -> int:
        """Samples that the checkpoint's steps have trained on, repetitions counted."""
        size: int = self.settings["batch"]["global_size"]
        return self.checkpoint.step * size

    @property
    def resolution(self) -> int:
        """The largest side of a square picture; in px."""
        sides = self.settings["data"]["resolution"]
        return max(sides) if isinstance(sides, list) else int(sides)


_MODULES = {"lokr": "networks.lokr", "loha": "networks.loha"}
"""Method -> the module of kohya's scripts that trains such adapters."""


def file_metadata(
    origin: Origin, name: str, tensors: dict[str, torch.Tensor] | None, *, black_forest: bool
) -> dict[str, str]:
    """`modelspec.*` and kohya's `ss_*` keys of a file `name`; `tensors` of an adapter, whose hash UIs look up.

    `black_forest`: the names are Black Forest Labs', not diffusers'.
    """
    settings, state = origin.settings, origin.checkpoint.state()
    adapter, optimizer, objective = origin.adapter, settings["optimizer"], settings["objective"]
    full = settings["method"] == "full"
    saved = (origin.checkpoint.path / STATE_NAME).stat().st_mtime
    date = datetime.datetime.fromtimestamp(saved, datetime.UTC)
    repository = "black-forest-labs/flux2" if black_forest else "huggingface/diffusers"
    values: dict[str, Any] = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": origin.architecture + ("" if tensors is None else "/lora"),
        "modelspec.implementation": f"https://github.com/{repository}",
        "modelspec.title": origin.title,
        "modelspec.description": _description(origin),
        "modelspec.date": date.isoformat(timespec="seconds"),
        "modelspec.resolution": f"{origin.resolution}x{origin.resolution}",
        "modelspec.trigger_phrase": origin.trigger,
        "ss_output_name": name,
        "ss_sd_model_name": origin.base,
        "ss_base_model_version": origin.architecture.lower().replace(".", "_").replace("-", "_"),
        "ss_steps": origin.checkpoint.step,
        "ss_max_train_steps": settings["steps"],
        "ss_total_batch_size": settings["batch"]["global_size"],
        "ss_resolution": f"({origin.resolution}, {origin.resolution})",
        "ss_seed": settings["seed"],
        "ss_mixed_precision": settings["precision"],
        "ss_learning_rate": optimizer["learning_rate"],
        "ss_optimizer": optimizer["name"],
        "ss_lr_scheduler": optimizer["schedule"],
        "ss_lr_warmup_steps": optimizer["warmup_steps"],
        "ss_timestep_sampling": objective["timestep_sampling"],
        "ss_guidance_scale": objective["guidance"] if origin.spec.guidance else None,
        "flux2_ds.base_revision": origin.revision,
        "flux2_ds.method": settings["method"],
        "flux2_ds.weights": origin.weights,
        "flux2_ds.samples_seen": origin.samples_seen,
        "flux2_ds.data": state["index"],
        "flux2_ds.versions": json.dumps(state["versions"]),
    }
    if not full:
        values |= {
            "ss_network_module": _MODULES.get(settings["method"], "networks.lora_flux_2"),
            "ss_network_dim": adapter["rank"],
            # The strength is in the factors: every program that looks for an alpha finds the rank.
            "ss_network_alpha": adapter["rank"],
            "ss_network_args": json.dumps({"use_dora": settings["method"] == "dora"}),
            "flux2_ds.lora": json.dumps(adapter),
        }
    if tensors is not None:
        digest = content_digest(tensors)
        values |= {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
    return {key: str(value) for key, value in values.items() if value is not None}


def _description(origin: Origin) -> str:
    settings = origin.settings
    average = ", moving average" if origin.weights == "ema" else ""
    return (
        f"{settings['method']} of {origin.base}, {counted(origin.checkpoint.step, 'step')}{average}"
    )


def write_card(folder: Path, origin: Origin, exports: list[Export], previews: Path) -> list[Path]:
    """Write README.md, and the previews beside it if there are any; returns the files."""
    settings, written = origin.settings, [folder / "README.md"]
    front: dict[str, Any] = {"base_model": origin.base, "library_name": "diffusers"}
    front["pipeline_tag"] = "text-to-image"
    front["tags"] = ["flux2", "text-to-image", "diffusers", "flux2-ds"]
    if settings["method"] != "full":
        front["base_model_relation"] = "adapter"
        front["tags"] = ["lora", *front["tags"]]
    if origin.trigger:
        front["instance_prompt"] = origin.trigger
    parts = ["---\n" + yaml.safe_dump(front, sort_keys=False) + "---", f"# {origin.title}"]
    if origin.trigger:
        parts.append(f"Write `{origin.trigger}` in the prompt.")
    if previews.is_file():
        shutil.copyfile(previews, folder / PREVIEWS)
        written.append(folder / PREVIEWS)
        parts.append(f"![The same prompts after more and more steps]({PREVIEWS})")
    parts += [
        _beside(origin),
        _files(folder, exports),
        *(_use(folder, *use, origin) for use in _uses(exports)),
    ]
    parts += [_table(origin), f"Its use is subject to the licence of {origin.base}."]
    written[0].write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return written


def _beside(origin: Origin) -> str:
    if not origin.beside:
        return ""
    files = ", ".join(f"`{name}` at strength {strength:g}" for name, strength in origin.beside)
    dora = origin.settings["method"] == "dora"
    order = " Load it first; in diffusers, `fuse_lora()` it before this one." if dora else ""
    return (
        f"It was trained over the base with {files} merged into it, which is not part of these files: load that as "
        f"well to get what was trained, unless it was an assistant adapter.{order}"
    )


def _files(folder: Path, exports: list[Export]) -> str:
    rows = ["| file | for | checked |", "|---|---|---|"]
    for export in exports:
        name = export.path.relative_to(folder)
        checked = "" if export.error is None else f"largest error of an update {export.error:.0e}"
        rows.append(f"| `{name}` | {', '.join(export.programs)} | {checked} |")
    return "## Files\n\n" + "\n".join(rows)


def _uses(exports: list[Export]) -> list[tuple[Export, str]]:
    """Each file with its first program; the only file of an adapter with diffusers, too, if it is one of them."""
    uses = [(each, each.programs[0]) for each in exports]
    if len(uses) == 1 and "diffusers" in exports[0].programs[1:]:
        uses.append((exports[0], "diffusers"))
    return uses


def _use(folder: Path, export: Export, reader: str, origin: Origin) -> str:
    name, pipeline = export.path.relative_to(folder), origin.spec.pipeline
    adapter = export.error is not None
    if reader == "ComfyUI" and adapter:
        how = (
            f"Put `{name}` into `models/loras` and load it with a LoraLoaderModelOnly node between the "
            "diffusion model and the sampler; strength 1 is what was trained."
        )
    elif reader == "ComfyUI":
        how = (
            f"Put `{name}` into `models/diffusion_models` and load it with a Load Diffusion Model node in "
            "place of the base."
        )
    elif reader == "diffusers":
        source, dtype = origin.repository or ".", "dtype=torch.bfloat16"
        lines = ["import torch", "from diffusers import " + pipeline, ""]
        if adapter:
            lines += [
                f'pipeline = {pipeline}.from_pretrained("{origin.base}", {dtype})',
                f'pipeline.load_lora_weights("{source}", weight_name="{name}")',
            ]
        else:
            lines[1] = f"from diffusers import Flux2Transformer2DModel, {pipeline}"
            lines += [
                "transformer = Flux2Transformer2DModel.from_pretrained(",
                f'    "{source}", subfolder="{name}", {dtype}',
                ")",
                f"pipeline = {pipeline}.from_pretrained(",
                f'    "{origin.base}", transformer=transformer, {dtype}',
                ")",
            ]
        prompt = ", ".join(filter(None, (origin.trigger, "a photograph")))
        lines.append(f'pipeline.to("cuda")("{prompt}").images[0].save("picture.png")')
        how = "```python\n" + "\n".join(lines) + "\n```"
    else:
        how = f"`flux_2_generate_image.py --lora_weight {name}`"
    return f"## In {reader}\n\n{how}"


def _table(origin: Origin) -> str:
    settings = origin.settings
    adapter, data = origin.adapter, origin.checkpoint.state()["index"]
    revision = f" at {origin.revision}" if origin.revision else ""
    rows = {"base": f"{origin.base}{revision}", "method": settings["method"]}
    if settings["method"] != "full":
        alpha = adapter["rank"] if adapter["alpha"] is None else adapter["alpha"]
        targets = targets_line(adapter["targets"])
        scale = f"{alpha:g} / √rank" if adapter.get("rslora") else f"{alpha:g}"
        rows["rank, alpha, targets"] = f"{adapter['rank']}, {scale}, `{targets}`"
        for setting in ("rank_pattern", "alpha_pattern", "factor"):
            if adapter.get(setting):
                rows[setting] = f"`{json.dumps(adapter[setting])}`"
        if adapter["init_from"]:
            rows["begun as"] = f"`{adapter['init_from']}`"
    rows |= {
        "steps": f"{origin.checkpoint.step}, {origin.samples_seen} samples",
        "resolution": f"{origin.resolution} px",
        "timesteps": settings["objective"]["timestep_sampling"],
        "optimizer": f"{settings['optimizer']['name']}, {settings['optimizer']['learning_rate']:g}",
        "data": f"index {data}",
        "versions": ", ".join(f"{k} {v}" for k, v in origin.checkpoint.state()["versions"].items()),
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "## Training\n\n" + "\n".join(["| | |", "|---|---|", *lines])


def check_hub(repository: str) -> None:
    """Refuse, before anything is written, a repository's name that is none and a missing or wrong token."""
    try:
        validate_repo_id(repository)
        HfApi().whoami()
    except HFValidationError as error:
        raise UserError(
            f"--push {repository} is no repository of the hub, such as me/cats: {error}"
        ) from error
    except LocalTokenNotFoundError as error:
        raise UserError(
            "--push needs a token that may write. Log in with `hf auth login`."
        ) from error
    except (_HTTP_ERROR, OSError) as error:
        raise _refused(repository, error) from error


def push(repository: str, folder: Path, paths: list[Path], message: str) -> str:
    """Upload `paths` of `folder` to a repository of the hub, made private if there is none; returns its address."""
    names = [str(path.relative_to(folder)) for path in paths]
    patterns = [f"{name}/*" if (folder / name).is_dir() else name for name in names]
    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=patterns, commit_message=message
        )
    except (_HTTP_ERROR, OSError) as error:
        raise _refused(repository, error) from error
    return str(address)


def _refused(repository: str, error: Exception) -> UserError:
    lines = without_secrets(str(error)).strip().splitlines()
    kind = OutageError if not isinstance(error, HfHubHTTPError) else UserError
    return kind(
        f"--push {repository}: the hub did not take it ({lines[0] if lines else type(error).__name__}). Check "
        "the name, and that your token may write there (`hf auth whoami`); what was exported is kept."
    )
