"""The order of the samples: properties over random data sets, and one pinned sequence."""

import random
from collections import Counter

import pytest

from flux2_ds.data.buckets import Bucket
from flux2_ds.data.index import Index, Shard
from flux2_ds.data.loader import Share
from flux2_ds.data.order import Order

BUCKETS = [Bucket(32, 32), Bucket(32, 64), Bucket(64, 32), Bucket(48, 48)]


def make_index(shards: list[tuple[Bucket, int]]) -> Index:
    return Index(
        "klein",
        8,
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
    first = epoch * order.steps_per_epoch
    return [order.batch(step) for step in range(first, first + order.steps_per_epoch)]


def served(batches: list) -> Counter:
    return Counter((s.shard, s.row) for _, samples in batches for s in samples)


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_serves_every_sample_as_often_as_the_remainder_rule_says(case, epoch):
    index, arguments = case
    order = Order(index, **arguments)
    counts = served(epoch_of(order, epoch))

    everything = {(n, row) for n, shard in enumerate(index.shards) for row in range(shard.samples)}
    assert set(counts) == everything
    for bucket, samples in index.bucket_counts().items():
        own = [counts[place] for place in everything if index.shards[place[0]].bucket == bucket]
        extra = sum(own) - samples
        assert 0 <= extra < arguments["global_batch"]
        assert extra == order.repeated(bucket)
        # The sequence is continued from its beginning: nobody is served twice more than another.
        assert max(own) - min(own) <= 1


def test_a_batch_is_full_and_of_one_bucket(case):
    index, arguments = case
    for bucket, samples in epoch_of(Order(index, **arguments), 0):
        assert len(samples) == arguments["global_batch"]
        assert {index.shards[sample.shard].bucket for sample in samples} == {bucket}


def test_positions_count_all_samples_ever_served(case):
    index, arguments = case
    order, size = Order(index, **arguments), arguments["global_batch"]
    for step in range(2 * order.steps_per_epoch + 1):
        _, samples = order.batch(step)
        assert [s.position for s in samples] == list(range(step * size, (step + 1) * size))


def test_jumping_to_a_step_gives_what_iterating_gives(case):
    index, arguments = case
    order = Order(index, **arguments)
    steps = range(3 * order.steps_per_epoch)
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


def test_samples_are_shuffled_across_the_shards_of_a_window():
    index = make_index([(BUCKETS[0], 50), (BUCKETS[0], 50)])
    together = Order(index, 50, 0, window=2)
    apart = Order(index, 50, 0, window=1)
    # Two batches of 50 lanes: lane l holds places 2l and 2l + 1 of the shuffled sequence.
    for order, mixed in ((together, True), (apart, False)):
        batches = [samples for _, samples in epoch_of(order, 0)]
        first_half = {samples[lane].shard for samples in batches for lane in range(25)}
        assert (len(first_half) == 2) is mixed


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_processes_serves_the_same_global_batch(world, micro):
    index = make_index([(BUCKETS[0], 13), (BUCKETS[1], 9)])
    order = Order(index, 8, 3, window=2)
    _, samples = order.batch(1)
    shares = [Share(rank, world, 8, micro).micro_batches() for rank in range(world)]
    assert all(len(own) == 8 // world // micro for own in shares)
    pieces = [samples[places] for own in shares for places in own]
    assert all(len(piece) == micro for piece in pieces)
    assert [sample for piece in pieces for sample in piece] == samples


def test_pinned_sequence():
    # A change here changes what every run and every resumed run trains on.
    index = make_index([(BUCKETS[0], 3), (BUCKETS[1], 2), (BUCKETS[0], 2)])
    order = Order(index, 2, 7, window=2)
    found = [
        (str(bucket), [(s.shard, s.row) for s in samples])
        for bucket, samples in (order.batch(step) for step in range(8))
    ]
    assert found == [
        ("32x32", [(2, 0), (0, 1)]),
        ("32x32", [(0, 0), (2, 1)]),
        ("32x32", [(2, 1), (0, 2)]),
        ("64x32", [(1, 0), (1, 1)]),
        ("64x32", [(1, 1), (1, 0)]),
        ("32x32", [(0, 0), (2, 0)]),
        ("32x32", [(0, 1), (0, 2)]),
        ("32x32", [(0, 2), (2, 1)]),
    ]
