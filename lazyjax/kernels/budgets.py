"""Kernels within a budget of memory: XLA says what a way to compute one needs, and nothing runs."""

import re
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lazyjax.kernels.blocks import levels
from lazyjax.kernels.computation import Call, Options, engine_of, jobs, kernels
from lazyjax.kernels.costs import operations
from lazyjax.kernels.methods import METHODS

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


def written(size: float) -> str:
    """Write an amount of memory."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g}{name}"
    return f"{size:.0f}B"


def shapes_of(call: Call) -> tuple[Any, tuple[Any, ...]]:
    """Give the structure of the arrays of a call, and their shapes and dtypes."""
    leaves, structure = jax.tree.flatten(call.arrays)
    return structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def _abstract(structure: Any, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    return structure.unflatten([jax.ShapeDtypeStruct(*shape) for shape in shapes])


def analysed(compiled: Any) -> Any:
    """Give what XLA says of the memory of compiled code."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError(
            "`memory` needs a backend on which XLA tells what code needs, got "
            f"{jax.default_backend()}. Use `ntk` with `batch_size`."
        )
    return analysis


def needed(compiled: Any) -> int:
    """Give the bytes of inputs, temporaries and result of compiled code."""
    analysis = analysed(compiled)
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )


@lru_cache(maxsize=256)
def _peak(structure: Any, shapes: tuple[Any, ...], options: Options, backend: str) -> int:
    return needed(kernels.lower(*_abstract(structure, shapes), options=options).compile())


def peak(call: Call, options: Options) -> int:
    """Give the bytes of inputs, temporaries and result of a call, as XLA counts them.

    It is compiled for that, once for each kind of arguments, and not run.
    """
    return _peak(*shapes_of(call), options, jax.default_backend())


def counted(call: Call, options: Options) -> float:
    """Count the multiply-adds of a call, in its jaxpr."""
    structure, shapes = shapes_of(call)
    traced = jax.make_jaxpr(lambda *arrays: kernels(*arrays, options=options))
    return operations(traced(*_abstract(structure, shapes)).jaxpr)


class Candidate(NamedTuple):
    """A method that a model admits."""

    name: str
    seconds: float  # by the rates of the backend


@lru_cache(maxsize=256)
def _candidates(
    structure: Any, shapes: tuple[Any, ...], options: Options, backend: str
) -> tuple[Candidate, ...]:
    found: list[Candidate] = []

    def trace(*arrays: Any) -> None:
        f, params, x1, x2, outputs = arrays
        every = jobs(Call(f, params, x1, x2, outputs, options))
        for name, method in METHODS.items():
            if method.needs_reverse and not all(job.model.reverse for job in every):
                continue
            seconds = sum(engine_of(job, x1, name).seconds for job in every)
            found.append(Candidate(name, seconds))

    jax.eval_shape(trace, *_abstract(structure, shapes))
    return tuple(sorted(found, key=lambda candidate: candidate.seconds))


def candidates(call: Call) -> tuple[Candidate, ...]:
    """Give the methods that a model admits, the fastest first."""
    return _candidates(*shapes_of(call), call.options, jax.default_backend())


def fit(call: Call, memory: int | float | str) -> Call:
    """Choose the method and the blocks that keep to a budget.

    Parameters
    ----------
    call : Call
    memory : int or str

    Returns
    -------
    Call
        With the fastest method that fits, and the largest blocks of it that do.

    Raises
    ------
    TypeError
        If `memory` is neither a string nor a number.
    ValueError
        If it is no amount, or nothing fits (the message says what would), or XLA does not tell.
    """
    budget = bytes_of(memory)
    asked = call.options.method
    names = [candidate.name for candidate in candidates(call)] if asked == "auto" else [asked]
    sizes = (jax.tree.leaves(x)[0].shape[0] for x in (call.x1, call.x2) if x is not None)
    last = levels(max(sizes))
    least = []
    for name in names:
        here = [call.options._replace(method=name, level=level) for level in range(last + 1)]
        if peak(call, here[0]) <= budget:
            return call._replace(options=here[0])
        least.append(peak(call, here[last]))
        if least[-1] > budget:
            continue
        low, high = 0, last  # the first does not fit, the last does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if peak(call, here[middle]) <= budget else (middle, high)
        return call._replace(options=here[high])
    raise ValueError(
        f"`memory` must be at least {written(1.005 * min(least))} for this kernel, inputs and "
        f"result included, got {memory!r}. Use that, or fewer examples or outputs."
    )
