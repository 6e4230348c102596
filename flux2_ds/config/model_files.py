"""The files of a model: where they are, and digests that say which ones they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import xxhash
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from flux2_ds.config.model_spec import PADDING_SIDES, read_json
from flux2_ds.errors import UserError, without_secrets

DIGESTS = "digests.json"
"""In the directory of an exported transformer: name of a file -> its XXH3."""
_VOLATILE = {"_diffusers_version", "_name_or_path", "transformers_version"}
_PROBES, _PROBE_BYTES = 8, 1 << 16


def model_directory(path: str, revision: str | None, parts: list[str]) -> Path:
    """The local directory of a model: `path` itself, or the hub's cache after fetching `parts`.

    The configs of all parts and the tokenizer come along: the variant is recognised from them, and the
    tokenizer takes part in the fingerprint.
    """
    if Path(path).is_dir():
        return Path(path)
    patterns = ["model_index.json", "*/*.json", "tokenizer/*", *(f"{part}/*" for part in parts)]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = without_secrets(str(error)).strip().splitlines()[0]
        raise UserError(
            f"model.path {path!r} is neither a directory here nor a model the Hugging Face hub "
            f"serves: {reason}. Check the path; for a gated model accept its licence and log in "
            "with `hf auth login`."
        ) from error


def fingerprint(directory: Path) -> dict[str, str]:
    """Digests of what shapes a prepared sample: VAE, text encoder, tokenizer, pipeline class, and the
    side on which prompts are padded.

    Parts that are not on this machine are left out.
    """
    pipeline = read_json(directory / "model_index.json")["_class_name"]
    result = {"pipeline": pipeline, "padding": PADDING_SIDES[pipeline]}
    for part in ("vae", "text_encoder", "tokenizer"):
        suffixes = {path.suffix for path in (directory / part).glob("*")}
        if suffixes and (part == "tokenizer" or ".safetensors" in suffixes):
            result[part] = part_digest(directory, part)
    return result


def part_digest(directory: Path, part: str) -> str:
    """Digest of one part of a model.

    Configs count without version stamps; of each weight file its name, size, header and some probes of
    its body count, which tells different weights apart without reading 48 GB.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in (directory / part).glob("*") if path.is_file()):
        digest.update(f"{file.name}:".encode() + _file_digest(file))
    return digest.hexdigest()[:16]


def base_digest(directory: Path, merged: list[tuple[str, float]]) -> str:
    """Digest of what an adapter is trained over: the transformer, and the files that are merged into it."""
    digest = part_digest(directory, "transformer")
    for path, strength in merged:
        with Path(path).open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(f"{digest}:{content}:{strength}".encode()).hexdigest()[:16]
    return digest


def file_digests(folder: Path, known: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Size, time of change (ns) and XXH3 of each safetensors file in `folder`, all of which is read; but not of
    a file that has the size and time that `known` has of it."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        status, before = file.stat(), (known or {}).get(file.name, {})
        facts = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        if facts.items() <= before.items():
            found[file.name] = before
        else:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
            found[file.name] = {**facts, "xxh3": digest}
    return found


def changed_files(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the files whose contents differ in two answers of `file_digests`, or that only one has."""
    return [
        name
        for name in sorted(before.keys() | now.keys())
        if before.get(name, {}).get("xxh3") != now.get(name, {}).get("xxh3")
    ]


def check_fingerprint(prepared: dict[str, str], directory: Path, shards: str) -> list[str]:
    """Compare the shards' fingerprint with the model's; returns the parts that could not be.
    Refuses another model's shards.
    """
    here = fingerprint(directory)
    for part, digest in prepared.items():
        if part in here and here[part] != digest:
            raise UserError(
                f"data.shards {shards} were made by another model: their {part} is {digest}, that "
                f"of model.path {directory} is {here[part]}. Prepare the shards with this model, "
                "or train the model that they were prepared with."
            )
    return [part for part in prepared if part not in here]


def _file_digest(path: Path) -> bytes:
    if path.name.endswith("config.json"):
        config = read_json(path)
        kept = {key: value for key, value in config.items() if key not in _VOLATILE}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).digest()
    digest = hashlib.sha256()
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as stream:
        if path.suffix != ".safetensors":
            digest.update(stream.read())
        else:
            for probe in range(_PROBES):
                stream.seek(max(0, size - _PROBE_BYTES) * probe // (_PROBES - 1))
                digest.update(stream.read(_PROBE_BYTES))
    return digest.digest()
