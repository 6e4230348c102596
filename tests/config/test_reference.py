"""docs/recipes.md says what the recipe's fields say."""

from pathlib import Path

from flux2_ds.config.reference import page


def test_the_page_is_up_to_date() -> None:
    written = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert written.read_text(encoding="utf-8") == page(), "run `make docs`"
