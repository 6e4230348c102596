"""Whether prepared shards are those of a recipe and its model. No torch: the launcher asks, too."""

from __future__ import annotations

from flux2_ds.data.index import Index
from flux2_ds.errors import UserError
from flux2_ds.recipe import Recipe
from flux2_ds.spec import Spec


def check_settings(recipe: Recipe, index: Index) -> None:
    """Refuse shards that were prepared with other settings.

    Raises:
        UserError: naming the setting and both values.
    """
    for name, prepared in index.settings.items():
        wanted = getattr(recipe.data, name)
        if wanted != prepared:
            raise UserError(
                f"data.{name} is {wanted}, but data.shards {recipe.data.shards} were prepared with "
                f"{prepared}. Prepare shards in another folder, or set it back."
            )


def check_variant(recipe: Recipe, index: Index, spec: Spec) -> None:
    """Refuse shards that were prepared for another kind of model.

    Raises:
        UserError: another variant or text width.
    """
    if (index.variant, index.text_width) != (spec.variant, spec.text_width):
        raise UserError(
            f"data.shards {recipe.data.shards} were prepared for FLUX.2-{index.variant} with text "
            f"width {index.text_width}; model.path {recipe.model.path} is FLUX.2-{spec.variant} with "
            f"{spec.text_width}. Prepare the shards with this model."
        )
