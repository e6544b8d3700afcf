"""What an experiment leaves, and how it is kept on disk: whole, or not at all.

A results folder holds `config.json`, `arrays.npz`, `summary.json`, the figures, `timings.json` and,
written last, `done.json` with checksums of the others that count. Without a fitting `done.json` the
folder counts for nothing. Arrays and summary are the same bytes in every run of the same config.
"""

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from lazyjax.checkpoints import pack, unpack, write_whole
from lazyjax.comparison import Comparison

MARKER = "done.json"
FORMAT = 2  # of what is on disk: a folder of another one counts for nothing


class Missing(Exception):
    """An experiment lacks an optional package; the message says how to get it."""


class Results(NamedTuple):
    """What `run` of an experiment returns, and all that `plot` and `conclude` get."""

    config: Any
    arrays: dict[str, np.ndarray]
    summary: dict[str, Any]  # nested, of floats; what a reader should conclude from


def range_of(values: Any) -> dict[str, float]:
    """Give median, least and most of a number over the members."""
    return {
        "median": float(np.median(values)),
        "least": float(np.min(values)),
        "most": float(np.max(values)),
    }


def spread(members: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Give `range_of` each number that all members have."""
    return {
        name: range_of([member[name] for member in members])
        for name in members[0]
        if all(name in member for member in members)
    }


def rows(compared: Comparison) -> list[dict[str, float]]:
    """Give the numbers of each member."""
    return [compared.numbers(i) for i in range(compared.members)]


def percent(share: float) -> str:
    """Say a share in per cent, with two digits."""
    return f"{float(f'{100 * share:.2g}'):g} %"


def ending(numbers: dict[str, float]) -> str:
    """Say how far a network ended from its tangent model, in a sentence of its numbers."""
    return (
        f"the network ends at a loss of {numbers['final loss of the network']:.1e}, its tangent "
        f"model at {numbers['final loss of the tangent model']:.1e}. The weights moved by "
        f"{percent(numbers['relative weight movement of the network'])}, the kernel by "
        f"{percent(numbers['relative kernel change'])}, and the gap between the two is "
        f"{percent(numbers['gap as a share of what was learned'])} of what the network learned."
    )


def _plain(value: Any) -> Any:
    """Make a value JSON can hold: numbers that are not finite become strings."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _numbers(value: Any) -> Any:
    """Undo `_plain`."""
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def to_json(value: Any) -> bytes:
    """Encode as JSON, ending in a newline; the same value gives the same bytes."""
    return (json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Read what `to_json` wrote; None if there is no such file or it is broken."""
    try:
        return _numbers(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def config_as_json(config: Any) -> Any:
    """Give a config as it comes back from disk."""
    return json.loads(to_json(dataclasses.asdict(config)))


def _checksum(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


_COUNTED = ("config.json", "arrays.npz", "summary.json")


def clear(folder: Path) -> None:
    """Make the folder, without marker and without what a killed run may have left half done."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).unlink(missing_ok=True)
    for path in folder.glob(".*.tmp"):
        path.unlink()


def save(folder: Path, results: Results) -> None:
    """Write config, arrays and summary, each whole."""
    write_whole(folder / "config.json", to_json(dataclasses.asdict(results.config)))
    write_whole(folder / "arrays.npz", pack(results.arrays))
    write_whole(folder / "summary.json", to_json(results.summary))


def save_figures(folder: Path, figures: dict[str, Figure]) -> None:
    """Write the figures, and remove those of an earlier run that are none of them."""
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        write_whole(folder / f"{name}.png", buffer.getvalue())
    for path in folder.glob("*.png"):
        if path.stem not in figures:
            path.unlink()


def finish(folder: Path, figures: list[str], timings: dict[str, float]) -> None:
    """Write the timings, and then the marker."""
    write_whole(folder / "timings.json", to_json(timings))
    marker = {
        "format": FORMAT,
        "checksums": {name: _checksum(folder / name) for name in _COUNTED},
        "figures": figures,
    }
    write_whole(folder / MARKER, to_json(marker))


def is_whole(folder: Path) -> bool:
    """Tell whether the folder holds a finished experiment, nothing torn and nothing edited."""
    marker = read_json(folder / MARKER)
    if not isinstance(marker, dict) or not isinstance(marker.get("checksums"), dict):
        return False
    return marker.get("format") == FORMAT and all(
        marker["checksums"].get(name) == _checksum(folder / name) is not None for name in _COUNTED
    )


def has_figures(folder: Path) -> bool:
    """Tell whether all figures of a finished experiment are there."""
    marker = read_json(folder / MARKER) or {}
    return all((folder / f"{name}.png").is_file() for name in marker.get("figures", [None]))


def is_finished(folder: Path, config: Any) -> bool:
    """Tell whether the folder holds this experiment, finished, with this config."""
    return is_whole(folder) and read_json(folder / "config.json") == _numbers(
        config_as_json(config)
    )


def load(folder: Path, config_type: Any) -> Results:
    """Read back what `save` wrote.

    Parameters
    ----------
    folder : Path
    config_type : dataclass
        The `Config` of the experiment.

    Returns
    -------
    Results

    Raises
    ------
    FileNotFoundError
        If the folder holds no finished experiment.
    """
    if not is_whole(folder):
        raise FileNotFoundError(
            f"`name` must be an experiment with finished results, got none in {folder}. "
            f"Run it first: python -m experiments run {folder.name}"
        )
    return read(folder, config_type)


def read(folder: Path, config_type: Any) -> Results:
    """Read back what `save` wrote, finished or not."""
    fields = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in read_json(folder / "config.json").items()
    }
    summary = read_json(folder / "summary.json")
    return Results(config_type(**fields), unpack(folder / "arrays.npz"), summary)
