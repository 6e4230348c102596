"""Files that appear complete or not at all, and directories in a place that others write to."""

import pytest

from flux2_ds.errors import UserError
from flux2_ds.run.atomic import atomic_path, make_private


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("old")
    with pytest.raises(ValueError, match="half"), atomic_path(path) as partial:
        partial.write_text("ne")
        raise ValueError("half")
    assert path.read_text() == "old"
    with atomic_path(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_somebody_else_has_made_is_refused(tmp_path):
    make_private(tmp_path / "own")
    make_private(tmp_path / "own")  # each rank
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    for name in ("open", "link"):
        with pytest.raises(UserError, match=f"{name} is not a directory of this user alone"):
            make_private(tmp_path / name)
