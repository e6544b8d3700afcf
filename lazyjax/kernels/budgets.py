"""Kernels within a budget of memory: XLA says what a way to compute one needs, and nothing runs."""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lazyjax.costs import operations
from lazyjax.kernels.computation import engine_of, jobs, kernels
from lazyjax.kernels.methods import METHODS
from lazyjax.kernels.request import Call, Options
from lazyjax.kernels.tiles import levels
from lazyjax.memory import bytes_needed, bytes_of, too_little


def shapes_of(call: Call) -> tuple[Any, tuple[Any, ...]]:
    """Give the structure of the arrays of a call, and their shapes and dtypes."""
    leaves, structure = jax.tree.flatten(call.arrays)
    return structure, tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)


def _abstract(structure: Any, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    return structure.unflatten([jax.ShapeDtypeStruct(*shape) for shape in shapes])


@lru_cache(maxsize=256)
def _peak(structure: Any, shapes: tuple[Any, ...], options: Options, backend: str) -> int:
    return bytes_needed(kernels.lower(*_abstract(structure, shapes), options=options).compile())


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
    of = "this kernel, inputs and result included"
    raise too_little(min(least), of, memory, "fewer examples or outputs")
