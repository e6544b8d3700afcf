"""What commands are given: a factory of models, and files of arrays."""

import importlib
import zipfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

Factory = Annotated[tyro.conf.Positional[str], tyro.conf.arg(name="", metavar="MODULE:FACTORY")]


def model(name: str) -> tuple[Any, Any]:
    """Give the model function and the parameters that a factory makes."""
    module, _, function = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`MODULE:FACTORY` must name a function in a module, got {name} ({error}). Use "
            "models:make for `make` in models.py of this folder."
        ) from error
    made = factory() if callable(factory) else factory
    if not (isinstance(made, tuple) and len(made) == 2 and callable(made[0])):
        raise TypeError(
            f"`MODULE:FACTORY` must give (f, params), got {type(made).__name__} from {name}. "
            "Return a model function and its parameters."
        )
    return made


def arrays_of(path: Path, cure: str) -> np.ndarray | dict[str, np.ndarray]:
    """Read a file of arrays: one array, mapped, or all of an archive, which is closed again."""
    if not path.is_file():
        raise FileNotFoundError(f"`--data` must be a file, got {path}. Save one: {cure}")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            return dict(found)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"`--data` must be an npz or npy file, got {path} ({error}). Use {cure}."
        ) from error
