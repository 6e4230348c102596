"""What is due after a step, as a table."""

import pytest

from flux2_ds.training.cadence import Cadence

CADENCE = Cadence(steps=12, log=3, checkpoint=4, validation=5, preview=6)


@pytest.mark.parametrize(
    ("done", "stopping", "due"),
    [
        (0, False, "log validation checkpoint preview"),
        (1, False, ""),
        (3, False, "log"),
        (4, False, "checkpoint"),
        (5, False, "log validation"),
        (6, False, "log preview"),
        (12, False, "log validation checkpoint preview last"),
        (1, True, "log checkpoint last"),
        (5, True, "log checkpoint last"),
        (6, True, "log checkpoint last"),
        (12, True, "log checkpoint last"),
    ],
)
def test_what_is_due(done, stopping, due):
    assert [name for name, set_ in vars(CADENCE.due(done, stopping)).items() if set_] == due.split()


def test_what_is_due_where_the_run_ends_early():
    due = CADENCE.due(10, ended=True)
    assert (due.log, due.validation, due.checkpoint, due.preview, due.last) == (True,) * 5


def test_what_is_never_wanted_is_never_due():
    never = Cadence(steps=4, log=9, checkpoint=9, validation=None, preview=None).due(4)
    assert (never.validation, never.preview, never.checkpoint) == (False, False, True)
