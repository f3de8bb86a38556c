"""A compressed network's folder: its recipe, from which it can be built again, beside its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from brittle.compression.rebuild import check_rebuilt, ranks_and_sizes, refilled
from brittle.errors import InputError
from brittle.models.borrow import unwrapped
from brittle.models.build import check_trusted
from brittle.models.checkpoints import read_state, save_state
from brittle.results.checks import check
from brittle.results.compression import SCHEMA_VERSION, CompressionRecipe
from brittle.storage.codec import from_json, to_json
from brittle.storage.files import remove_files, write_text

RECIPE, MODEL = "recipe.json", "model.safetensors"
"""The files of a folder."""
CONFIG = "config.json"
"""The file that makes a folder a training run; one folder is one network."""


def save_compressed(folder: str | Path, model: nn.Module, recipe: CompressionRecipe) -> CompressionRecipe:
    """Write a compressed network into a folder, whole or not at all.

    What was removed is read off the network: the ranks and sizes by which it differs from its architecture. Nothing is
    written unless the network can be built again from these. The recipe is written last, so that a folder without
    one is no compressed network; files of other names in the folder stay.

    Args:
        folder: Made if missing; a compressed network that it holds is replaced.
        model: The network with its ``Normalize``, if ``recipe.mean`` says that there is one; left as it is.
        recipe: What it was made of; its ``ranks`` and ``sizes`` are not looked at.

    Returns:
        The recipe as it was written, with its ranks and sizes.

    Raises:
        InputError: The recipe names no architecture, the network is not the architecture with other sizes and low-rank
            pairs, or the folder is that of a run.
        OSError: Writing failed.
    """
    folder, model = Path(folder), unwrapped(model)
    if (folder / CONFIG).exists():
        raise InputError(f"folder: expected one that is not a training run's; got {folder}, which holds a {CONFIG}")
    ranks, sizes = ranks_and_sizes(model, recipe)
    recipe = dataclasses.replace(recipe, ranks=ranks, sizes=sizes)
    check(recipe, "recipe")
    check_rebuilt(model, recipe)
    text = to_json(recipe)
    remove_files(folder, [RECIPE])
    save_state(model, folder / MODEL)
    write_text(folder / RECIPE, text)
    return recipe


def load_compressed(folder: str | Path, *, arch: str | None = None) -> tuple[nn.Module, CompressionRecipe]:
    """The network of a folder, in evaluation mode, and its recipe; no code of the folder is run.

    Args:
        folder: As :func:`save_compressed` left it.
        arch: Only for a network that a function of yours builds: ``module:function``, as the recipe names it. A
            folder from elsewhere could name any function, so none is called that the caller has not named.

    Raises:
        InputError: The folder is not one of a compressed network, its recipe or weights cannot be, or do not fit, or
            it names a function other than ``arch``.
    """
    folder = Path(folder)
    recipe = read_recipe(folder)
    check_trusted(recipe.arch, arch, f"{folder} is a compressed network")
    return refilled(recipe, read_state(folder / MODEL)).eval(), recipe


def read_recipe(folder: str | Path) -> CompressionRecipe:
    """Read a folder's ``recipe.json``.

    Raises:
        InputError: It is missing or not one, or says what cannot be.
    """
    path = Path(folder) / RECIPE
    if not path.is_file():
        raise InputError(f"folder: expected the folder of a compressed network; got {folder}, which holds no {RECIPE}")
    recipe = from_json(path.read_bytes(), {SCHEMA_VERSION: CompressionRecipe}, str(path))
    check(recipe, str(path))
    return recipe
