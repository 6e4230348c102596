"""The order of the samples: properties over random data sets, and one pinned sequence."""

import math
import random
from collections import Counter, OrderedDict, defaultdict
from dataclasses import replace

import pytest

from flux2_ds.config.buckets import Bucket
from flux2_ds.data.index import Index, Shard
from flux2_ds.data.order import Order

BUCKETS = [Bucket(32, 32), Bucket(32, 64), Bucket(64, 32), Bucket(48, 48)]


def make_index(shards: list[tuple[Bucket, int]]) -> Index:
    return Index(
        "klein",
        8,
        {},
        {},
        [Shard(f"{n}.tar", bucket, count, 0, "") for n, (bucket, count) in enumerate(shards)],
    )


def random_index(chance: random.Random) -> Index:
    buckets = BUCKETS[: chance.randint(1, len(BUCKETS))]
    count = chance.randint(1, 8)
    return make_index([(chance.choice(buckets), chance.randint(1, 12)) for _ in range(count)])


@pytest.fixture(params=range(25))
def case(request: pytest.FixtureRequest) -> tuple[Index, dict[str, int]]:
    """A random data set with the rest of `Order`'s arguments."""
    chance = random.Random(request.param)
    arguments = {
        "global_batch": chance.choice([1, 2, 3, 4, 8, 16]),
        "seed": chance.randrange(2**40),
        "window": chance.randint(1, 5),
    }
    return random_index(chance), arguments


def epoch_of(order: Order, epoch: int) -> list:
    return [
        order.batch(step) for step in range(order.first_step(epoch), order.first_step(epoch + 1))
    ]


def small_buckets(index: Index, global_batch: int) -> dict[Bucket, int]:
    """Those that do not fill a global batch, beside others."""
    counts = index.bucket_counts()
    return {b: n for b, n in counts.items() if n < global_batch and len(counts) > 1}


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_serves_every_sample_as_often_as_the_remainder_rule_says(case, epoch):
    index, arguments = case
    order = Order(index, **arguments)
    counts = Counter((s.shard, s.row) for _, batch in epoch_of(order, epoch) for s in batch)
    everything = {(n, row) for n, shard in enumerate(index.shards) for row in range(shard.samples)}
    small = small_buckets(index, arguments["global_batch"])
    assert {place for place in everything if index.shards[place[0]].bucket not in small} <= set(
        counts
    )
    for bucket, samples in index.bucket_counts().items():
        if bucket in small:
            continue
        own = [counts[place] for place in everything if index.shards[place[0]].bucket == bucket]
        extra = sum(own) - samples
        assert 0 <= extra < arguments["global_batch"]
        assert extra == order.repeated(bucket)
        # The sequence is continued from its beginning: nobody is served twice more than another.
        assert max(own) - min(own) <= 1


def test_a_batch_is_full_of_one_bucket_and_counts_its_positions(case):
    index, arguments = case
    order, size = Order(index, **arguments), arguments["global_batch"]
    for step in range(order.first_step(2) + 1):
        bucket, samples = order.batch(step)
        assert {index.shards[sample.shard].bucket for sample in samples} == {bucket}
        assert [s.position for s in samples] == list(range(step * size, (step + 1) * size))


def test_batches_of_a_bucket_come_in_sequence(case):
    """Laid end to end, the lanes of a bucket hold whole windows of shards, one after the other."""
    index, arguments = case
    order = Order(index, **arguments)
    batches = defaultdict(list)
    for bucket, samples in epoch_of(order, 1):
        batches[bucket].append([(s.shard, s.row) for s in samples])
    for bucket, own in batches.items():
        if bucket in small_buckets(index, arguments["global_batch"]):
            continue
        lanes = zip(*own, strict=True)
        sequence = [place for lane in lanes for place in lane]
        count = index.bucket_counts()[bucket]
        assert sequence == [sequence[n % count] for n in range(len(sequence))]
        left = sequence[:count]
        while left:
            shards = list(dict.fromkeys(shard for shard, _ in left))
            # The window's shards are those of its samples; which they are follows from its length.
            size = 0
            for taken in range(1, len(shards) + 1):
                size = sum(index.shards[n].samples for n in shards[:taken])
                if {n for n, _ in left[:size]} == set(shards[:taken]):
                    break
            assert taken <= arguments["window"]
            assert len(set(left[:size])) == size
            left = left[size:]


@pytest.mark.parametrize("chance", range(40))
def test_samples_of_a_bucket_that_fills_no_batch_count_like_all_others(chance):
    draw = random.Random(chance)
    size = draw.choice([2, 3, 8, 16])
    index = make_index(
        [(draw.choice(BUCKETS), draw.randint(1, 9)) for _ in range(draw.randint(2, 5))]
    )
    order = Order(index, size, draw.randrange(2**40), window=draw.randint(1, 3))
    small = small_buckets(index, size)
    served: Counter[tuple[int, int]] = Counter()
    for epoch in range(size):
        served.update((s.shard, s.row) for _, batch in epoch_of(order, epoch) for s in batch)
        for bucket, samples in small.items():
            own = [
                served[number, row]
                for number, shard in enumerate(index.shards)
                if shard.bucket == bucket
                for row in range(shard.samples)
            ]
            # At any time: in turn among each other, and within a batch of what is due.
            assert max(own) - min(own) <= 1
            assert abs(sum(own) - (epoch + 1) * samples) < size
    for (number, _), count in served.items():
        if index.shards[number].bucket in small:
            assert count == size  # once an epoch, on average
    assert order.first_step(size) == round(size * order.steps_per_epoch)
    assert len(order.warnings()) == len(small)
    if not small:
        assert order.steps_per_epoch == sum(-(-n // size) for n in index.bucket_counts().values())


def test_a_bucket_that_fills_no_batch_is_named_with_its_share():
    """Of 29 landscape images and a portrait the portrait had 16 of 48 places."""
    order = Order(make_index([(BUCKETS[1], 29), (BUCKETS[2], 1)]), 16, 0, window=8)
    (warning,) = order.warnings()
    assert warning.startswith(
        "bucket 32x64 has 1 of 30 samples (3.3%), and batch.global_size is 16: it is served in one "
        "of 16 epochs"
    )
    buckets = [order.batch(step)[0] for step in range(order.first_step(160))]
    assert buckets.count(BUCKETS[2]) == 10 and len(buckets) == 160 * 2 + 10
    pairs = [(Bucket(64, 64, (Bucket(16, 16 * n),)), n) for n in range(1, 10)]
    (warning,) = Order(make_index(pairs), 16, 0, window=8).warnings()
    assert warning.startswith("9 buckets of 1 to 9 samples, 45 of 45 in all, have fewer than")


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 64])
def test_processes_serve_the_same_global_batches(world_size):
    index = make_index([(BUCKETS[n % 3], 7 + n) for n in range(9)])
    order = Order(index, 64, 5, window=2)
    for step in range(0, order.first_step(3), 2):
        bucket, whole = order.batch(step)
        tensor_shards = []
        for rank in range(world_size):
            own = slice(rank * 64 // world_size, (rank + 1) * 64 // world_size)
            found, samples = Order(index, 64, 5, window=2).batch(step, own)
            assert found == bucket
            tensor_shards += samples
        assert tensor_shards == whole


WEIGHTS = {"a": 2.0, "b": 0.4, "c": 1.0, "d": 3.7}


@pytest.mark.parametrize("chance", range(10))
def test_weights_say_how_often_a_sample_is_served(chance):
    draw = random.Random(chance)
    shards = [
        Shard(f"{n}", draw.choice(BUCKETS[:2]), draw.randint(1, 20), 0, "", draw.choice("abcde"))
        for n in range(draw.randint(1, 9))
    ]
    index = Index("klein", 8, {}, {}, shards)
    order = Order(index, draw.choice([1, 3, 8]), chance, window=3, weights=WEIGHTS)
    counts: Counter[tuple[int, int]] = Counter()
    for epoch in range(10):
        served = Counter((s.shard, s.row) for _, batch in epoch_of(order, epoch) for s in batch)
        expected = {}
        for number, shard in enumerate(shards):
            weight = WEIGHTS.get(shard.source, 1.0)
            expected[number] = math.ceil(round(weight * shard.samples, 6))
        for bucket in order.batches:
            if isinstance(order.batches[bucket], float):
                continue  # too small for a batch: an epoch has one or none
            own = [n for n, shard in enumerate(shards) if shard.bucket == bucket]
            found = sum(count for (shard, _), count in served.items() if shard in own)
            assert found == sum(expected[n] for n in own) + order.repeated(bucket)
        counts += served
    # In the long run every sample of a shard is served about equally often, and none is left out.
    for number, shard in enumerate(shards):
        own = [counts[number, row] for row in range(shard.samples)]
        assert min(own) > 0
    # Weight 1 is no weight.
    plain, one = Order(index, 4, 1, 2), Order(index, 4, 1, 2, weights=dict.fromkeys("abcde", 1.0))
    assert [plain.batch(s) for s in range(40)] == [one.batch(s) for s in range(40)]


@pytest.mark.parametrize(
    ("weights", "global_batch", "epochs", "steps"),
    [
        ({}, 4, 3, 9),  # 10 samples are 3 batches
        ({"a": 2.0}, 4, 3, 12),  # of a 6 of 3, and of b 7
        ({"a": 2.0, "b": 0.1}, 1, 10, 70),
        ({"b": 0.0}, 1, 10, 30),  # of b nothing
        ({}, 4, 0.5, 2),
        ({}, 4, 2.3, 7),
        ({}, 64, 0.01, 1),
    ],
)
def test_the_length_of_epochs_counts_what_weights_serve(weights, global_batch, epochs, steps):
    sizes = [("a", 3), ("b", 7)]
    shards = [Shard(name, BUCKETS[0], samples, 0, "", name) for name, samples in sizes]
    order = Order(Index("klein", 8, {}, {}, shards), global_batch, 0, window=2, weights=weights)
    assert order.length(epochs) == steps


def test_a_source_of_weight_0_is_not_served(case):
    index, arguments = case
    shards = [replace(s, source="ab"[n % 2]) for n, s in enumerate(index.shards)]
    shards.append(Shard("c.tar", BUCKETS[0], 5, 0, "", "a"))
    order = Order(replace(index, shards=shards), **arguments, weights={"b": 0})
    served = {s.shard for epoch in (0, 1, 30) for _, batch in epoch_of(order, epoch) for s in batch}
    assert {shards[number].source for number in served} == {"a"}


def test_the_length_of_whole_epochs_is_where_the_next_one_starts(case):
    index, arguments = case
    order = Order(index, **arguments)
    assert [order.length(n) for n in (5, 9)] == [max(1, order.first_step(n)) for n in (5, 9)]


def test_epochs_longer_than_a_block_of_turns(monkeypatch):
    index = make_index([(BUCKETS[0], 500), (BUCKETS[1], 61), (BUCKETS[2], 3)])
    whole = Order(index, 2, 0, window=2)
    monkeypatch.setattr("flux2_ds.data.order._BLOCK", 16)
    blocks = Order(index, 2, 0, window=2)
    one, other = ([bucket for bucket, _ in epoch_of(order, 1)] for order in (whole, blocks))
    assert Counter(one) == Counter(other) and one != other
    for bucket in whole.batches:
        # Each bucket serves its batches in sequence, whatever the turns; positions tell them apart.
        sequences = [
            [[(s.shard, s.row) for s in samples] for found, samples in epoch_of(order, 1)
             if found == bucket]
            for order in (whole, blocks)
        ]  # fmt: skip
        assert sequences[0] == sequences[1]
    for block in range(0, len(other), 16):
        assert other[block : block + 16].count(BUCKETS[0]) in range(10, 17)


def test_a_hundred_million_samples_cost_what_one_step_needs():
    shard = Shard("x", BUCKETS[0], 50_000, 0, "")
    other = Shard("y", BUCKETS[1], 50_000, 0, "")
    index = Index("klein", 8, {}, {}, [shard, other] * 1000)
    order = Order(index, 8, 0, window=2)
    assert order.steps_per_epoch == 12_500_000
    seen = {}
    for step in (0, 1, 12_499_999, 30_000_000):
        bucket, samples = order.batch(step)
        assert len(samples) == 8 and {index.shards[s.shard].bucket for s in samples} == {bucket}
        seen[step] = [(s.shard, s.row) for s in samples]
    assert Order(index, 8, 0, window=2).batch(30_000_000)[1] == order.batch(30_000_000)[1]
    assert len({tuple(each) for each in seen.values()}) == 4


def test_jumping_to_a_step_gives_what_iterating_gives(case):
    index, arguments = case
    order = Order(index, **arguments)
    steps = range(order.first_step(3))
    iterated = [order.batch(step) for step in steps]
    for step in reversed(steps):
        assert order.batch(step) == iterated[step]
        assert Order(index, **arguments).batch(step) == iterated[step]


def test_seed_and_epoch_change_the_order():
    index = make_index([(BUCKETS[0], 30), (BUCKETS[0], 20), (BUCKETS[1], 25)])

    def sequence(seed: int, epoch: int) -> list[tuple[int, int]]:
        batches = epoch_of(Order(index, 4, seed, window=2), epoch)
        return [(s.shard, s.row) for _, samples in batches for s in samples]

    different = [sequence(0, 0), sequence(1, 0), sequence(0, 1), sequence(1, 1)]
    assert len({tuple(each) for each in different}) == 4
    assert sequence(0, 0) == sequence(0, 0)


def opened(order: Order, lanes: int) -> int:
    """Times that a process with the first `lanes` lanes comes to a shard in an epoch, if it keeps in
    mind those of one window a lane and bucket."""
    readers: OrderedDict[int, None] = OrderedDict()
    count = 0
    for _, samples in epoch_of(order, 0):
        for sample in samples[:lanes]:
            count += sample.shard not in readers
            readers[sample.shard] = None
            readers.move_to_end(sample.shard)
            if len(readers) > 8 * lanes * len(order.batches):
                readers.popitem(last=False)
    return count


@pytest.mark.parametrize(
    ("buckets", "lanes", "world_size"), [(1, 8, 1), (2, 4, 1), (4, 2, 1), (4, 8, 8), (4, 8, 1)]
)
def test_shards_are_read_nearly_sequentially(buckets, lanes, world_size):
    index = make_index([(BUCKETS[n % buckets], 40) for n in range(128)])
    own = lanes // world_size
    # Sequential reading opens a shard once; a window that two lanes share may be opened by each.
    assert opened(Order(index, lanes, 0, window=8), own) <= 128 // world_size + 8 * own * buckets


def test_pinned_sequence():
    # A change here changes what every run and every resumed run trains on.
    index = make_index([(BUCKETS[0], 3), (BUCKETS[1], 2), (BUCKETS[0], 2)])
    order = Order(index, 2, 7, window=2)
    found = [
        (str(bucket), [(s.shard, s.row) for s in samples])
        for bucket, samples in (order.batch(step) for step in range(8))
    ]
    assert found == [
        ("64x32", [(1, 1), (1, 0)]),
        ("32x32", [(2, 1), (0, 0)]),
        ("32x32", [(0, 1), (0, 2)]),
        ("32x32", [(2, 0), (2, 1)]),
        ("32x32", [(2, 1), (0, 1)]),
        ("32x32", [(2, 0), (0, 2)]),
        ("64x32", [(1, 0), (1, 1)]),
        ("32x32", [(0, 0), (2, 1)]),
    ]
