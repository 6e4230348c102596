"""The loader: its tensors depend on the step alone, not on processes, restarts or threads."""

import itertools
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

from flux2_ds.config.buckets import Bucket
from flux2_ds.config.recipe import Preservation
from flux2_ds.data.index import Index
from flux2_ds.data.loader import (
    Loader,
    MicroBatch,
    Share,
    draw,
    draw_prompt,
    draw_variants,
    normals,
    references_dropped,
)
from flux2_ds.data.order import Order
from flux2_ds.data.shards import Record, View, write_shard
from flux2_ds.errors import UserError

GLOBAL_BATCH, SEED = 4, 11
EMPTY_TEXT = torch.zeros(6, 2)
BUCKETS = [Bucket(32, 48), Bucket(32, 32), Bucket(32, 48)]


def text_of(caption: str) -> torch.Tensor:
    return torch.full((6, 2), float(caption))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Index]:
    """Three shards of 5, 4 and 6 samples; latent and text of a sample hold its number."""
    folder = tmp_path_factory.mktemp("shards")
    number = itertools.count(1)
    shards = []
    for place, (bucket, samples) in enumerate(zip(BUCKETS, [5, 4, 6], strict=True)):
        shape = (32, bucket.height // 8, bucket.width // 8)
        numbers = [next(number) for _ in range(samples)]
        records = [
            Record(f"{n}.jpg", (str(n),), (View(torch.full(shape, float(n))),)) for n in numbers
        ]
        shards.append(write_shard(folder / f"{place}.tar", bucket, records, text_of))
    return folder, Index("klein", 2, {}, {}, shards)


def make_loader(
    prepared: tuple[Path, Index],
    share: Share | None = None,
    dropout: float = 0.0,
    seed: int = SEED,
    **more: object,
) -> Loader:
    folder, index = prepared
    return Loader(
        str(folder),
        index,
        Order(index, GLOBAL_BATCH, seed, window=2),
        share or Share(0, 1, GLOBAL_BATCH, GLOBAL_BATCH),
        seed=seed,
        caption_dropout=dropout,
        empty_text=EMPTY_TEXT,
        **more,  # type: ignore[arg-type]
    )


def tensors(batches: list[MicroBatch]) -> list[torch.Tensor]:
    """Latents, text, noise and deviates of consecutive micro-batches as one."""
    return [
        torch.cat([getattr(batch, name) for batch in batches])
        for name in ("latents", "text", "noise", "deviates")
    ]


def assert_same(left: list[MicroBatch], right: list[MicroBatch]) -> None:
    for one, other in zip(tensors(left), tensors(right), strict=True):
        assert torch.equal(one, other)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def wait_for_threads_to_end() -> bool:
    deadline = time.monotonic() + 5
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not loader_threads()


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)])
def test_processes_and_micro_batches_do_not_change_the_global_batch(prepared, world_size, micro):
    alone = make_loader(prepared)
    shares = [Share(rank, world_size, GLOBAL_BATCH, micro) for rank in range(world_size)]
    loaders = [make_loader(prepared, share) for share in shares]
    for step in range(6):
        tensor_shards = [batch for loader in loaders for batch in loader.read(step)]
        assert all(len(batch.samples) == micro for batch in tensor_shards)
        assert_same(tensor_shards, alone.read(step))


def test_batch_holds_the_samples_of_the_order(prepared):
    _, index = prepared
    order = Order(index, GLOBAL_BATCH, SEED, window=2)
    first_number = [1, 6, 10]  # of each shard
    for step in range(order.first_step(1)):
        bucket, samples = order.batch(step)
        (batch,) = make_loader(prepared).read(step)
        assert (batch.bucket, batch.samples) == (bucket, samples)
        assert batch.latents.shape == (4, 32, bucket.height // 8, bucket.width // 8)
        assert batch.noise.shape == (4, bucket.tokens, 128)
        assert batch.deviates.shape == (4,)
        for place, sample in enumerate(samples):
            number = first_number[sample.shard] + sample.row
            assert (batch.latents[place] == number).all()
            assert (batch.text[place] == number).all()
            drawn = draw(SEED, sample.position, bucket.tokens)
            assert torch.equal(batch.noise[place], drawn.noise)
            assert batch.deviates[place] == drawn.deviate


def test_a_sample_is_described_by_its_shard_and_image(prepared):
    loader = make_loader(prepared)
    (batch,) = loader.read(1)
    for number, sample in enumerate(batch.samples):
        facts = loader.describe(sample)
        assert facts["source"] == f"{int(batch.latents[number, 0, 0, 0])}.jpg"
        assert facts["shard"] == f"{sample.shard}.tar"
        assert (facts["row"], facts["position"]) == (sample.row, GLOBAL_BATCH + number)


def test_starting_at_a_step_equals_skipping_to_it(prepared):
    whole = list(make_loader(prepared).steps(0, 9))
    later = list(make_loader(prepared).steps(6, 9))
    assert (len(whole), len(later)) == (9, 3)
    for skipped, resumed in zip(whole[6:], later, strict=True):
        assert_same(skipped, resumed)


def test_more_shards_and_texts_than_are_kept(prepared, monkeypatch):
    plain = [make_loader(prepared).read(step) for step in range(8)]
    monkeypatch.setattr("flux2_ds.data.loader._OPEN_SHARDS", 1)
    monkeypatch.setattr("flux2_ds.data.loader._TEXTS_KEPT", 1)
    for few, many in zip(make_loader(prepared).steps(0, 8), plain, strict=True):
        assert_same(few, many)


def test_one_caption_for_all_is_read_once(tmp_path):
    bucket = Bucket(32, 32)
    records = [Record(f"{n}", ("7",), (View(torch.full((32, 4, 4), float(n))),)) for n in range(8)]
    index = Index("klein", 2, {}, {}, [write_shard(tmp_path / "x.tar", bucket, records, text_of)])
    reads = []

    def fetch(blob, check):
        reads.append(blob.size)
        return blob.view(check)

    loader = make_loader((tmp_path, index), fetch=fetch)
    for _ in range(2):
        for batch in itertools.chain(*(loader.read(step) for step in range(2))):
            assert (batch.text == 7).all()
    # The table, each latent twice, and the text: once alone and beside the latent of its own sample.
    assert len(reads) in (1 + 16, 1 + 16 + 1)


def test_one_of_several_texts_and_views_is_drawn_by_position(tmp_path):
    """Whatever the ranks; noise is that of one text and view."""
    bucket, texts = Bucket(32, 32), ("1", "2", "2", "3")

    def written(name: str, texts: tuple[str, ...], views: int) -> tuple[Path, Index]:
        def view(n: int, v: int) -> View:
            return View(torch.full((32, 4, 4), n + v / 4), torch.full((2, 2), v / 4), [])

        records = [Record(f"{n}", texts, tuple(view(n, v) for v in range(views))) for n in range(8)]
        shard = write_shard(tmp_path / name, bucket, records, text_of)
        return tmp_path, Index("klein", 2, {}, {}, [shard])

    several = written("x.tar", texts, 3)
    whole = [batch for step in make_loader(several, masked=True).steps(0, 100) for batch in step]
    found = torch.cat([batch.text[:, 0, 0] for batch in whole]).tolist()
    views = torch.cat([batch.latents[:, 0, 0, 0] % 1 * 4 for batch in whole]).int().tolist()
    assert views == torch.cat([4 * batch.masks[:, 0, 0] for batch in whole]).int().tolist()
    positions = [sample.position for batch in whole for sample in batch.samples]
    drawn = [draw_variants(SEED, position, 4, 3) for position in positions]
    assert (found, views) == ([float(texts[t]) for t, _ in drawn], [v for _, v in drawn])
    assert all(abs(drawn.count((t, v)) - 400 / 12) < 22 for t in range(4) for v in range(3))
    half = make_loader(several, Share(1, 2, GLOBAL_BATCH, 1))
    for step in (7, 3):
        batches = half.read(step)
        for name in ("text", "latents"):
            own = torch.cat([getattr(each, name) for each in batches])
            assert torch.equal(own, getattr(whole[step], name)[2:])
    one = make_loader(written("y.tar", ("2",), 1)).read(5)
    for name in ("noise", "deviates"):
        assert torch.equal(getattr(one[0], name), getattr(whole[5], name))


def test_a_share_of_the_samples_gets_a_prompt_by_its_position(prepared):
    """Whatever the ranks; regularization sources keep their captions, and nothing else changes."""
    folder, index = prepared
    shards = [replace(s, source=name) for s, name in zip(index.shards, "aba", strict=True)]
    named = folder, replace(index, shards=shards)
    prompts = [torch.full((6, 2), 50.0), torch.full((6, 2), 60.0)]
    kept = {"preservation": Preservation(sources=["b"], share=0.4), "prompts": prompts}
    plain, loader = make_loader(named), make_loader(named, **kept)
    half = make_loader(named, Share(1, 2, GLOBAL_BATCH, 1), **kept)
    found, places = [], 0
    for step in range(60):
        (batch,), (before,) = loader.read(step), plain.read(step)
        for row, sample in enumerate(batch.samples):
            drawn = draw_prompt(SEED, sample.position, 2, 0.4)
            expected = drawn if batch.sources[row] == "a" else None
            assert batch.prompted[row] == (expected is not None)
            text = before.text[row] if expected is None else prompts[expected]
            assert torch.equal(batch.text[row], text)
            found.append(expected)
            places += batch.sources[row] == "a"
        for name in ("latents", "noise", "deviates"):
            assert torch.equal(getattr(batch, name), getattr(before, name))
        assert [p for b in half.read(step) for p in b.prompted] == list(batch.prompted)[2:]
    assert 0.3 < (found.count(0) + found.count(1)) / places < 0.5
    assert min(found.count(0), found.count(1)) > 0.3 * 0.4 * places
    # Golden: a run must go on with the same prompts.
    drawn = [draw_prompt(3, position, 3, 0.5) for position in range(8)]
    assert drawn == [None, 1, None, None, 2, 0, None, None]


def test_preservation_may_be_for_every_so_many_th_step(prepared):
    kept = Preservation(prompts=["a", "b"], share=1.0, every=3)
    loader = make_loader(prepared, preservation=kept, prompts=2 * [torch.zeros(6, 2)])
    for step in range(7):
        (batch,) = loader.read(step)
        assert batch.prompted == GLOBAL_BATCH * [step in (2, 5)]


def test_references_are_dropped_for_whole_steps(tmp_path):
    """Of some steps, whatever the ranks; nothing else of a sample changes."""
    bucket = Bucket(32, 32, (Bucket(16, 48),))
    views = [
        View(torch.full((32, 4, 4), n), None, [torch.full((32, 2, 6), n)])
        for n in map(float, range(5))
    ]
    records = [Record(f"{n}", (f"{n}",), (view,)) for n, view in enumerate(views)]
    data = (
        tmp_path,
        Index("klein", 2, {}, {}, [write_shard(tmp_path / "x.tar", bucket, records, text_of)]),
    )
    plain, loader = make_loader(data), make_loader(data, reference_dropout=0.3)
    half = make_loader(data, Share(1, 2, GLOBAL_BATCH, 1), reference_dropout=0.3)
    dropped = []
    for step in range(40):
        (batch,), (before,) = loader.read(step), plain.read(step)
        assert_same([batch], [before])
        assert torch.equal(before.references[0][:, 0, 0, 0], before.latents[:, 0, 0, 0])
        dropped.append(not batch.references)
        assert batch.bucket == (bucket.alone if dropped[-1] else bucket)
        assert dropped[-1] == references_dropped(SEED, step, 0.3)
        if not dropped[-1]:
            assert torch.equal(batch.references[0], before.references[0])
        assert [not each.references for each in half.read(step)] == 2 * dropped[-1:]
    assert 6 <= sum(dropped) <= 18
    # Golden: a run must go on with the same steps.
    assert [step for step in range(30) if references_dropped(3, step, 0.3)] == [
        2, 4, 10, 12, 13, 14, 17, 19, 20, 21, 23, 28, 29
    ]  # fmt: skip


def test_the_draw_of_variants_is_what_it_was():
    """Golden: a run must go on with the same texts and views."""
    drawn = [draw_variants(3, position, 5, 4) for position in range(8)]
    assert [text for text, _ in drawn] == [2, 3, 1, 0, 2, 0, 2, 3]
    assert [view for _, view in drawn] == [0, 2, 1, 0, 1, 0, 1, 2]
    assert draw_variants(3, 0, 1, 1) == (0, 0)


def test_draw_depends_on_seed_and_position_alone():
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    first, again = draw(3, 17, 6), draw(3, 17, 6)
    assert torch.equal(torch.randn(3), expected)  # the global generator is left alone
    assert torch.equal(first.noise, again.noise)
    assert (first.noise.dtype, first.noise.shape) == (torch.float32, (6, 128))
    # Not the bucket, either: deviate and drop come before the noise.
    for same in (again, draw(3, 17, 64)):
        assert (first.deviate, first.drop) == (same.deviate, same.drop)
    for other in (draw(3, 18, 6), draw(4, 17, 6), draw(17, 3, 6)):
        assert not torch.equal(first.noise, other.noise)
        assert first.deviate != other.deviate
        assert first.drop != other.drop


def test_pinned_draw():
    # A change here changes what every resumed run trains on.
    drawn = draw(7, 5, 1)
    found = [drawn.deviate, drawn.drop, *drawn.noise[0, :3].tolist()]
    assert found == pytest.approx(
        [0.7495165, 0.1196154, -1.1226215, -0.9864067, 1.1221752], abs=1e-6
    )


def test_noise_is_the_transform_of_its_bits():
    count = 2**16
    found = normals(np.random.SFC64(3), count).astype(np.float64)
    words = np.random.SFC64(3).random_raw(count // 2).view(np.uint32) >> 1
    radius, angle = (words.astype(np.float64) + 0.5).reshape(2, -1) / 2**31
    length = np.sqrt(-2 * np.log(radius))
    turned = 2 * np.pi * angle
    expected = np.concatenate([length * np.cos(turned), length * np.sin(turned)])
    assert np.abs(found - expected).max() < 1e-5


def test_noise_is_normal_to_its_tails():
    count = 2**21
    noise = normals(np.random.SFC64(SEED), count)
    values = torch.from_numpy(noise).double()
    below = torch.special.ndtr(values.sort().values)
    assert (below - torch.arange(count) / count).abs().max() < 1.95 / count**0.5
    for bound in (1.0, 2.0, 3.0, 4.0, 5.0):
        expected = 2 * NormalDist().cdf(-bound) * count
        assert abs((values.abs() > bound).sum() - expected) < 5 * expected**0.5
    # The two numbers of a pair share their radius, neighbours nothing; none depends on another.
    for one, other in (values.view(2, -1), (values[1:], values[:-1])):
        for power in (1, 2):
            both = torch.corrcoef(torch.stack([one**power, other**power]))
            assert abs(both[0, 1]) < 5 / len(one) ** 0.5


def kolmogorov_distance(values: list[float], cdf) -> float:
    ordered = sorted(values)
    n = len(ordered)
    return max(max(abs(cdf(v) - i / n), abs(cdf(v) - (i + 1) / n)) for i, v in enumerate(ordered))


def test_draws_over_positions_follow_their_distributions():
    drawn = [draw(SEED, position, 1) for position in range(4000)]
    bound = 1.95 / 4000**0.5  # exceeded by chance once in a thousand seeds
    assert kolmogorov_distance([d.deviate for d in drawn], NormalDist().cdf) < bound
    assert kolmogorov_distance([d.drop for d in drawn], lambda value: value) < bound
    noise = torch.cat([d.noise for d in drawn])
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    # Deviate, drop and noise of a sample are independent of each other.
    columns = torch.tensor([[d.deviate, d.drop, d.noise[0, 0]] for d in drawn])
    assert (torch.corrcoef(columns.T) - torch.eye(3)).abs().max() < 0.06


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_caption_dropout_gives_the_empty_text_and_changes_nothing_else(prepared, dropout):
    loader, plain = make_loader(prepared, dropout=dropout), make_loader(prepared)
    empty, drawn = [], []
    for step in range(30):
        (batch,), (full,) = loader.read(step), plain.read(step)
        for one, other in zip(tensors([batch])[::2], tensors([full])[::2], strict=True):
            assert torch.equal(one, other)  # latents and noise
        assert torch.equal(batch.deviates, full.deviates)
        empty += (batch.text == 0).all(dim=(1, 2)).tolist()
        drawn += [draw(SEED, sample.position, 1).drop < dropout for sample in batch.samples]
    assert empty == drawn
    assert abs(sum(empty) / len(empty) - dropout) < 0.15


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_error_in_the_reading_thread_is_raised_at_its_step(prepared, tmp_path, damage):
    folder, index = prepared
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy / index.shards[1].name)
    order = Order(index, GLOBAL_BATCH, SEED, window=2)
    bad = next(s for s in itertools.count() if any(x.shard == 1 for x in order.batch(s)[1]))

    seen = 0
    with pytest.raises(UserError, match=index.shards[1].name):
        for _ in make_loader((copy, index)).steps(0, 100):
            seen += 1
    assert seen == bad
    assert wait_for_threads_to_end()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": (View(torch.zeros(32, 4, 5)),)}, r"0\.tar, sample \d: its latent .*4, 5\), not .*4, 4\)"),
        ({"views": (View(torch.zeros(32, 4, 4), torch.zeros(3, 2)),)},
         r"its mask has the shape \(3, 2\), not \(2, 2\)"),
        ({"texts": ("short",)}, r"its text has the shape \(5, 2\), not \(6, 2\)"),
    ],
)  # fmt: skip
def test_a_tensor_of_another_shape_is_refused_though_its_checksum_is_right(
    tmp_path, changes, message
):
    record = Record(
        **{"source": "a.jpg", "texts": ("1",), "views": (View(torch.zeros(32, 4, 4)),)} | changes
    )
    shard = write_shard(
        tmp_path / "0.tar",
        BUCKETS[1],
        [record] * 4,
        lambda text: torch.arange(12.0).view(6, 2)[text == "short" :],
    )
    loader = make_loader((tmp_path, Index("klein", 2, {}, {}, [shard])), masked=True)
    with pytest.raises(UserError, match=message):
        loader.read(0)


def test_abandoned_iterator_ends_its_thread(prepared):
    steps = make_loader(prepared).steps(0, 10**6)
    next(steps)
    assert len(loader_threads()) == 1
    steps.close()
    assert wait_for_threads_to_end()


def test_an_abandoned_iterator_reads_no_more_of_what_it_asked_for(prepared):
    """A process that stops while the store is away would wait for all of it."""
    away, reads = threading.Event(), []

    def fetch(blob, check):
        if away.is_set():
            reads.append(blob)
            time.sleep(0.2)
        return blob.view(check)

    steps = make_loader(prepared, fetch=fetch, num_workers=1).steps(0, 10**6)
    next(steps)
    away.set()
    while not reads:
        next(steps)
    steps.close()
    under_way = len(reads)
    time.sleep(1.2)  # in which a whole step would be read
    assert len(reads) <= under_way + 2  # of one sample: a latent and another's text
    assert wait_for_threads_to_end()


@pytest.mark.parametrize(("first", "last"), [(3, 5), (5, 5)])
def test_finished_iterator_ends_its_thread(prepared, first, last):
    assert len(list(make_loader(prepared).steps(first, last))) == last - first
    assert wait_for_threads_to_end()
