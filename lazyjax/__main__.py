"""`python -m lazyjax kernel MODULE:FACTORY --data x.npz --out K.zarr`: a kernel in a file."""

import importlib
import math
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from lazyjax import checks
from lazyjax.memory import format_bytes
from lazyjax.store import kernel_store

_USAGE = """usage: python -m lazyjax kernel MODULE:FACTORY --data x.npz --out K.zarr [options]

Compute the empirical neural tangent kernel of a model and write it to the disk, tile by tile.
`python -m lazyjax kernel --help` shows the options."""


def kernel(
    factory: Annotated[tyro.conf.Positional[str], tyro.conf.arg(name="", metavar="MODULE:FACTORY")],
    *,
    data: Path,
    out: Path,
    reduce: str = "none",
    memory: str = "4GiB",
    tile: int | None = None,
    resume: bool = False,
) -> None:
    """Compute the empirical neural tangent kernel of a model and write it to the disk.

    The result is a zarr array. JAX_ENABLE_X64=1 in the environment computes in float64.

    Parameters
    ----------
    factory
        a function that gives (f, params), in a module that can be imported from here
    data
        an npz file with x, or with x1 and x2; or an npy file with x, which may be larger than
        memory
    out
        the folder of the kernel, a new one
    reduce
        none, diagonal, trace or sum: what is kept of the outputs
    memory
        budget of each device
    tile
        examples in a tile, at most
    resume
        go on with what is in the folder
    """
    if out.exists() and not resume:
        raise ValueError(f"`--out` must be new, got {out}. Name another, or add --resume.")
    f, params = _model(factory)
    x1, x2 = _inputs(data)
    begin = time.perf_counter()
    stored = kernel_store(f, params, x1, x2, path=out, memory=memory, reduce=reduce, tile=tile)
    size = format_bytes(math.prod(stored.shape) * stored.dtype.itemsize)
    seconds = time.perf_counter() - begin
    print(f"{out}: {stored.shape} {stored.dtype}, {size}, {seconds:.1f} s")


def _model(name: str) -> tuple[Any, Any]:
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


def _inputs(path: Path) -> tuple[Any, Any]:
    """Read x1, and x2 or None."""
    if not path.is_file():
        raise FileNotFoundError(
            f"`--data` must be a file, got {path}. Save one: np.savez(path, x=x)"
        )
    try:
        opened = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"`--data` must be an npz or npy file, got {path} ({error}). Use np.savez(path, x=x)."
        ) from error
    if isinstance(opened, np.ndarray):
        return opened, None
    names = set(opened.files)
    if names not in ({"x"}, {"x1"}, {"x1", "x2"}):
        raise ValueError(
            f"`--data` must hold x, or x1 and x2, got {sorted(names)} in {path}. "
            "Use np.savez(path, x=x)."
        )
    return opened["x" if "x" in names else "x1"], opened["x2"] if "x2" in names else None


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; give the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if words else 2
    signal.signal(signal.SIGTERM, _stop)
    try:
        checks.one_of("command", words[0], ["kernel"])
        tyro.cli(kernel, prog="python -m lazyjax kernel", args=words[1:])
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as told:  # help, or a flag that tyro has refused
        return int(told.code or 0)
    except KeyboardInterrupt:
        print("Interrupted. The same command with --resume goes on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
