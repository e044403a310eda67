"""Recipes and rewards in files of the user's: import by path, errors with the file's own line."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType


def import_user_file(path: Path, kind: str) -> ModuleType:
    """Import a file as the module `KIND_STEM`.

    Args:
        path: An existing .py file.
        kind: "recipe" or "reward".

    Raises:
        ValueError: The file's own code raised; names its line.
    """
    spec = importlib.util.spec_from_file_location(f"{kind}_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    # As the import system does: dataclasses defined in the file look themselves up here.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        del sys.modules[spec.name]
        raise user_file_error(error, path) from error
    return module


def user_file_error(error: Exception, path: Path) -> ValueError:
    """Name the file's own line, which is where the user can do something."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return ValueError(f"{path}:{error.lineno}: {type(error).__name__}: {error.msg}")
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).absolute() == path.absolute()
    ]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    return ValueError(f"{where}: {type(error).__name__}: {error}")
