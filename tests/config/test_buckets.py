"""The bucket table and the choice of a bucket, against brute force."""

import itertools
import random

import pytest

from flux2_ds.config.buckets import Bucket, bucket_table, choose_bucket, upscale_factor

TABLES = [(1024, 64, 2.0), (512, 64, 2.0), (768, 32, 1.5), (160, 32, 2.0), (256, 64, 1.0)]


@pytest.fixture(params=TABLES, ids=str)
def settings(request: pytest.FixtureRequest) -> tuple[int, int, float]:
    return request.param


def kept_share(width: int, height: int, bucket: Bucket) -> float:
    """Share of the picture's area that is left after it is scaled to cover the bucket and cropped."""
    scale = max(bucket.width / width, bucket.height / height)
    return bucket.width * bucket.height / (scale * width * scale * height)


def test_table_holds_every_largest_bucket_and_nothing_else(settings):
    resolution, step, max_aspect = settings
    area = resolution**2
    sides = range(step, 3 * resolution, step)
    expected = {
        Bucket(height, width)
        for height, width in itertools.product(sides, sides)
        if height * width <= area
        and ((height + step) * width > area or height * (width + step) > area)
        and max(height / width, width / height) <= max_aspect
    }
    assert Bucket(resolution, resolution) in expected
    assert bucket_table(resolution, step, max_aspect) == sorted(expected)


def test_no_bucket_when_the_step_is_larger_than_the_resolution():
    assert bucket_table(32, 64, 2.0) == []


def test_tokens_are_the_16_pixel_squares():
    assert Bucket(height=512, width=768).tokens == 32 * 48


def test_choice_crops_least_and_nothing_of_a_buckets_own_shape(settings):
    table = bucket_table(*settings)
    chance = random.Random(0)
    sizes = [(chance.randint(50, 4000), chance.randint(50, 4000)) for _ in range(200)]
    for width, height in [*sizes, *((3 * bucket.width, 3 * bucket.height) for bucket in table)]:
        best = max(kept_share(width, height, bucket) for bucket in table)
        chosen = choose_bucket(width, height, table)
        assert kept_share(width, height, chosen) == pytest.approx(best, abs=2e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_larger_area_breaks_a_tie(reverse):
    table = sorted([Bucket(64, 64), Bucket(128, 128), Bucket(64, 128)], reverse=reverse)
    assert choose_bucket(500, 500, table) == Bucket(128, 128)


@pytest.mark.parametrize(
    ("width", "height", "factor"),
    [(512, 512, 2.0), (2048, 2048, 0.5), (512, 2048, 2.0), (2048, 512, 2.0), (1024, 1024, 1.0)],
)
def test_upscale_factor_is_that_of_the_side_that_must_grow_most(width, height, factor):
    assert upscale_factor(width, height, Bucket(1024, 1024)) == factor
