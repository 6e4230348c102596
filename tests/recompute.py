"""Losses and gradient norms of a run's first steps, from its shards: by docs/numerics.md, with nothing of this project.

    python tests/recompute.py RUN_DIR

For a full fine-tune in fp32 with AdamW and the default objective, which may have caption dropout and stratified
timesteps. Prints what it computes beside what the run has recorded.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import accumulate, count, islice
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
import webdataset
import yaml
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load

Values = dict[str, Any]
NORMAL = NormalDist()


def philox(*key: int, words: int) -> Any:
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(words)


def shuffled(items: list[Any], *key: int) -> list[Any]:
    return [items[n] for n in np.argsort(philox(1, *key, words=len(items)), kind="stable")]


def global_batches(shards: list[Values], recipe: Values) -> Iterator[list[tuple[int, int]]]:
    """(shard, row) at each place of the global batches, without end."""
    seed, size, data = recipe["seed"], recipe["batch"]["global_size"], recipe["data"]
    window, weights = data["shuffle_window"], data["weights"]
    served = [math.ceil(weights.get(s["source"], 1) * s["repeats"] * s["samples"] - 1e-9) for s in shards]  # fmt: skip
    sides = [(s["bucket"]["height"], s["bucket"]["width"]) for s in shards]
    members = [[n for n, s in enumerate(sides) if s == bucket] for bucket in sorted(set(sides))]
    totals = [sum(served[n] for n in numbers) for numbers in members]
    small = [total if total < size and len(totals) > 1 else 0 for total in totals]
    start = int(philox(1, seed, words=1)[0]) % size
    phases = [(start + before) % size for before in accumulate([0, *small[:-1]])]

    @cache
    def sequence(epoch: int, bucket: int) -> list[tuple[int, int]]:
        numbers, found = shuffled(members[bucket], seed, epoch, bucket, 0), []
        for first in range(0, len(numbers), window):
            rows = [
                (n, (epoch * served[n] + k) % shards[n]["samples"])
                for n in numbers[first : first + window]
                for k in range(served[n])
            ]
            found += shuffled(rows, seed, epoch, bucket, 1 + first)
        return found

    def turns(epoch: int, bucket: int) -> range:
        """The batches of an epoch; of a small bucket counted from the first epoch on."""
        if not small[bucket]:
            return range(-(-totals[bucket] // size))
        first, end = ((e * small[bucket] + phases[bucket]) // size for e in (epoch, epoch + 1))
        return range(first, end)

    for epoch in count():
        ours = [turns(epoch, bucket) for bucket in range(len(members))]
        order = [bucket for bucket, batches in enumerate(ours) for _ in batches]
        assert len(order) <= 4096, "longer epochs are shuffled in blocks"
        batch = [iter(batches) for batches in ours]
        for bucket in shuffled(order, seed, epoch, len(members)):
            number, lanes = next(batch[bucket]), range(size)
            if small[bucket]:
                places = [divmod(number * size + lane, totals[bucket]) for lane in lanes]
            else:
                places = [(epoch, (lane * len(ours[bucket]) + number) % totals[bucket]) for lane in lanes]  # fmt: skip
            yield [sequence(turn, bucket)[place] for turn, place in places]


def sample_at(position: int, samples: list[Values], row: int, empty: torch.Tensor, recipe: Values) -> Values:  # fmt: skip
    """The sample at a position: latent and text, with its random numbers."""
    sample, seed, objective = samples[row], recipe["seed"], recipe["objective"]
    meta = json.loads(sample["json"])
    keys = meta.get("text_keys") or [f"{meta['text_key']}.text"]
    first, second = philox(4, seed, position, words=2).tolist()
    views = sum(name.startswith("latent") for name in sample)
    view = second % views if len(keys) > 1 or views > 1 else 0
    latent = load(sample[f"latent{view or ''}.safetensors"])["latent"]
    key, member = keys[first % len(keys)].split(".")
    home = next(each for each in samples if each["__key__"] == key)
    stored = load(home[f"{member}.safetensors"])
    before, after = stored.get("padding", torch.zeros(2, dtype=torch.int64)).tolist()
    text = stored["text"]
    text = torch.cat([text[:1].expand(before, -1), text, text[-1:].expand(after, -1)])

    bits = np.random.SFC64(np.random.SeedSequence((2, seed, position)))
    for_t, for_drop = bits.random_raw(2).tolist()
    if (for_drop >> 11) / 2**53 < objective["caption_dropout"]:
        text = empty
    u = ((for_t >> 12) + 0.5) / 2**52
    if objective["stratified"]:
        size = recipe["batch"]["global_size"]
        u = (position % size + u) / size
    tokens = latent.numel() // 128
    mu = 0.5 + 0.65 * (min(tokens, objective["max_shift_tokens"]) - 256) / 3840
    z = objective["logit_mean"] + objective["logit_std"] * NORMAL.inv_cdf(u)
    t = 1 / (1 + math.exp(-z))
    t = math.exp(mu) * t / (1 + (math.exp(mu) - 1) * t)
    halves = bits.random_raw(tokens * 64).view(np.uint32) >> 1
    radius, angle = (halves.astype(np.float64) + 0.5).reshape(2, -1) / 2**31
    length, angle = np.sqrt(-2 * np.log(radius)), 2 * np.pi * angle
    noise = np.concatenate([length * np.cos(angle), length * np.sin(angle)]).reshape(tokens, 128)
    return {"latent": latent, "text": text, "t": t, "noise": torch.from_numpy(noise).float()}


def loss_of(model: Flux2Transformer2DModel, sample: Values, conditioning: Values) -> torch.Tensor:
    """Mean squared error of the velocity."""
    latent, noise, t, width = sample["latent"], sample["noise"], sample["t"], len(sample["text"])
    rows, columns = latent.shape[1] // 2, latent.shape[2] // 2
    grid = latent.view(32, rows, 2, columns, 2).permute(1, 3, 0, 2, 4).reshape(-1, 128)
    x0 = (grid - conditioning["latent_mean"]) / conditioning["latent_std"]
    prediction = model(
        hidden_states=((1 - t) * x0 + t * noise)[None],
        encoder_hidden_states=sample["text"][None].float(),
        timestep=torch.tensor([t]),
        img_ids=torch.tensor([(0, y, x, 0) for y in range(rows) for x in range(columns)]).float(),
        txt_ids=torch.tensor([(0, 0, 0, n) for n in range(width)]).float(),
        guidance=torch.ones(1) if model.config.guidance_embeds else None,
        return_dict=False,
    )[0]
    return (prediction[0] - (noise - x0)).square().mean()


def learning_rate(step: int, recipe: Values) -> float:
    """Of a step from 0."""
    settings = recipe["optimizer"]
    peak, warm_up = settings["learning_rate"], settings["warmup_steps"]
    if step < warm_up:
        return float(peak * (step + 1) / warm_up)
    left = 1 - (step - warm_up) / (recipe["steps"] - warm_up)
    shapes: dict[str, Callable[[], float]] = {
        "constant": lambda: 1.0,
        "cosine": lambda: (1 - math.cos(math.pi * left)) / 2,
        "linear": lambda: left,
        "rex": lambda: left / (0.5 + 0.5 * left),
    }
    return float(peak * shapes[settings["schedule"]]())


def recompute(run_dir: Path, steps: int) -> list[tuple[float, float]]:
    """(train/loss, train/gradient_norm) of the first steps of a run."""
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    assert (recipe["method"], recipe["precision"]) == ("full", "fp32")
    assert recipe["objective"]["timestep_sampling"] == "flux"
    folder = Path(recipe["data"]["shards"])
    index = json.loads((folder / "index.json").read_text())
    shards = [shard for shard in index["shards"] if not shard["held_out"]]
    conditioning = load((folder / "conditioning.safetensors").read_bytes())
    stored = [
        list(webdataset.WebDataset([str(folder / s["name"])], shardshuffle=False)) for s in shards
    ]
    dropped = [set(shard["dropped"]) for shard in shards]
    kept = [
        [row for row in range(len(samples)) if row not in gone]
        for samples, gone in zip(stored, dropped, strict=True)
    ]
    model = Flux2Transformer2DModel.from_pretrained(Path(recipe["model"]["path"]) / "transformer")
    model.requires_grad_(True)
    settings, size = recipe["optimizer"], recipe["batch"]["global_size"]
    matrices, vectors = (
        [p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False)
    )
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    found = []
    for step, places in enumerate(islice(global_batches(shards, recipe), steps)):
        total = 0.0
        for place, (shard, row) in enumerate(places):
            sample = sample_at(
                step * size + place, stored[shard], kept[shard][row],
                conditioning["empty_text"], recipe,
            )  # fmt: skip
            loss = loss_of(model, sample, conditioning) / size
            loss.backward()
            total += loss.item()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        limit = settings["max_grad_norm"] or math.inf
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()
        found.append((total, norm.item()))
    return found


if __name__ == "__main__":
    records = map(json.loads, (Path(sys.argv[1]) / "metrics.jsonl").read_text().splitlines())
    for ours, record in zip(recompute(Path(sys.argv[1]), 3), records, strict=False):
        print(*ours, record["train/loss"], record["train/gradient_norm"])
