"""Recipes: `FILE.py:name`, a function that returns a RunConfig.

It is one that the file defines, or one of its dictionary RECIPES, if it has one.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from r2vpo_megatron.config import RunConfig
from r2vpo_megatron.config.user_file import import_user_file, user_file_error


def load_recipe(name: str) -> RunConfig:
    """Call the function that `FILE.py:function` names.

    Raises:
        ValueError: no such file or function, or the recipe fails or returns something else.
    """
    file_name, _, function_name = name.partition(":")
    path = Path(file_name)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"recipe {name!r}: no such file {file_name!r}; {_describe_files(path)}")
    module = import_user_file(path, "recipe")
    functions = list_recipes(module)
    if function_name not in functions:
        nearest = difflib.get_close_matches(function_name, functions, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        problem = f"no function {function_name!r}" if function_name else "no function named"
        raise ValueError(
            f"recipe {name!r}: {problem}; {hint}{file_name} has: "
            f"{', '.join(functions) or 'none (a recipe is a function without parameters)'}"
        )
    config = _call(functions[function_name], path)
    if not isinstance(config, RunConfig):
        raise ValueError(f"recipe {name!r} returned {type(config).__name__}, must be a RunConfig")
    return config


def list_recipes(module: ModuleType) -> dict[str, Callable[[], object]]:
    """A recipe file's functions that can be called without arguments, and its RECIPES, by name."""
    own = {
        name: function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and not name.startswith("_")
        and all(
            parameter.default is not parameter.empty
            for parameter in inspect.signature(function).parameters.values()
        )
    }
    return {**getattr(module, "RECIPES", {}), **own}


def _call(recipe: Callable[[], object], path: Path) -> object:
    try:
        return recipe()
    except Exception as error:  # a recipe is the user's code and may raise anything
        raise user_file_error(error, path) from error


def _describe_files(path: Path) -> str:
    """Name the recipe files beside the one that is missing."""
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    files = sorted(str(file) for file in folder.glob("*.py") if not file.name.startswith("_"))
    return f"there are: {', '.join(files)}" if files else "a recipe is FILE.py:function"
