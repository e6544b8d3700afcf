"""Amounts of memory: as they are written, and what XLA says that compiled code needs."""

import re
from typing import Any

import jax

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base**power
    for unit, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("kMGT", start=1)
}


def bytes_of(memory: int | float | str) -> int:
    """Read an amount of memory: `"2GiB"`, `"500 MB"` or a number of bytes."""
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-zA-Z]*)\s*", memory)
        units = {unit.lower(): size for unit, size in _UNITS.items()}
        try:
            size = float(match[1]) * units[match[2].lower()] if match else 0.0
        except (KeyError, ValueError):
            size = 0.0
    elif isinstance(memory, int | float) and not isinstance(memory, bool):
        size = float(memory)
    else:
        raise TypeError(
            f"`memory` must be an amount like '2GiB' or a number of bytes, got {memory!r}. "
            "Use a string."
        )
    if not 1 <= size < float("inf"):
        raise ValueError(
            f"`memory` must be an amount like '2GiB', '500MB' or a positive number of bytes, got "
            f"{memory!r}. Use one of {', '.join(unit for unit in _UNITS if unit)}."
        )
    return int(size)


def format_bytes(size: float) -> str:
    """Write an amount of memory."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g}{name}"
    return f"{size:.0f}B"


def analysed(compiled: Any) -> Any:
    """Give what XLA says of the memory of compiled code."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError(
            "`memory` needs a backend on which XLA tells what code needs, got "
            f"{jax.default_backend()}. Use `ntk` with `batch_size`."
        )
    return analysis


def bytes_needed(compiled: Any) -> int:
    """Give the bytes of inputs, temporaries and result of compiled code."""
    analysis = analysed(compiled)
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def too_little(least: float, of: str, memory: int | float | str, cure: str) -> ValueError:
    """Give the error for a budget that is too small."""
    return ValueError(
        f"`memory` must be at least {format_bytes(1.005 * least)} for {of}, got {memory!r}. "
        f"Use that, or {cure}."
    )
