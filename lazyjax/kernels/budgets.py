"""Kernels within a budget of memory: XLA says what a way to compute one needs, and nothing runs."""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lazyjax.costs import operations
from lazyjax.kernels.computation import engine_of, jobs, kernels
from lazyjax.kernels.methods import METHODS, admits
from lazyjax.kernels.request import Request
from lazyjax.kernels.tiles import levels
from lazyjax.memory import bytes_needed, bytes_of, too_little

Kind = tuple[Any, tuple[jax.ShapeDtypeStruct, ...], str]


def _kind(request: Request) -> Kind:
    """Tell kinds of requests apart: by structure, which holds options, by shapes, by backend."""
    leaves, structure = jax.tree.flatten(request)
    shapes = (jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    return structure, tuple(shapes), jax.default_backend()


def _of_shapes(kind: Kind) -> Request:
    structure, shapes, _ = kind
    return structure.unflatten(shapes)


@lru_cache(maxsize=256)
def _peak(kind: Kind) -> int:
    return bytes_needed(kernels.lower(_of_shapes(kind)).compile())


def peak(request: Request) -> int:
    """Give the bytes of inputs, temporaries and result of a request, as XLA counts them.

    It is compiled for that, once for each kind of arguments, and not run.
    """
    return _peak(_kind(request))


def operations_of(request: Request) -> float:
    """Count the multiply-adds of a request, in its jaxpr."""
    return operations(jax.make_jaxpr(kernels)(_of_shapes(_kind(request))).jaxpr)


class Candidate(NamedTuple):
    """A method that a model admits."""

    name: str
    seconds: float  # by the rates of the backend


@lru_cache(maxsize=256)
def _candidates(kind: Kind) -> tuple[Candidate, ...]:
    admitted: list[Candidate] = []

    def trace(request: Request) -> None:
        with request.options.in_force():
            every = jobs(request)
            for name, method in METHODS.items():
                if not all(admits(method, job.model) for job in every):
                    continue
                seconds = sum(engine_of(job, request.x1, name).seconds for job in every)
                admitted.append(Candidate(name, seconds))

    jax.eval_shape(trace, _of_shapes(kind))
    return tuple(sorted(admitted, key=lambda candidate: candidate.seconds))


def candidates(request: Request) -> tuple[Candidate, ...]:
    """Give the methods that a model admits, the fastest first."""
    return _candidates(_kind(request))


def within_budget(request: Request, memory: int | float | str) -> Request:
    """Choose the method and the blocks that keep to a budget.

    Parameters
    ----------
    request : Request
    memory : int or str

    Returns
    -------
    Request
        With the fastest method that fits, and the largest blocks of it that do.

    Raises
    ------
    TypeError
        If `memory` is neither a string nor a number.
    ValueError
        If it is no amount, or nothing fits (the message says what would), or XLA does not tell.
    """
    budget = bytes_of(memory)
    asked = request.options.method
    names = [own.name for own in candidates(request)] if asked == "auto" else [asked]
    last = levels(max(request.n1, request.n2))
    least = []
    for name in names:
        here = [request.having(method=name, level=level) for level in range(last + 1)]
        if peak(here[0]) <= budget:
            return here[0]
        least.append(peak(here[last]))
        if least[-1] > budget:
            continue
        low, high = 0, last  # the first does not fit, the last does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if peak(here[middle]) <= budget else (middle, high)
        return here[high]
    of = "this kernel, inputs and result included"
    raise too_little(min(least), of, memory, "fewer examples or outputs")
