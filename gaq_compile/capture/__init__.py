"""Models -> FX graphs of gaq operators. One recipe per model family, found by ``find_recipe``."""

from __future__ import annotations

from torch import nn

from ..errors import CaptureError
from .base import EnergyModel, Original, Recipe
from .sevennet import SevenNetRecipe
from .so3krates import So3kratesRecipe
from .transformer import TransformerRecipe

RECIPES: tuple[Recipe, ...] = (SevenNetRecipe(), So3kratesRecipe(), TransformerRecipe())


def find_recipe(model: nn.Module) -> Recipe:
    """The recipe that knows ``model``.

    Raises:
        CaptureError: if no recipe does.
    """
    for recipe in RECIPES:
        if recipe.matches(model):
            return recipe
    raise CaptureError(
        f"no capture recipe for {type(model).__module__}.{type(model).__qualname__}",
        fix="pass the tensors that the model's own forward takes as example_graph, or write a recipe",
    )


__all__ = ["EnergyModel", "Original", "Recipe", "RECIPES", "find_recipe"]
