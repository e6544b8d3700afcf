"""Kernels within a budget of memory: XLA says what a way to compute one needs, and nothing runs."""

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lazyjax.costs import operations
from lazyjax.kernels.computation import engine_of, jobs, kernels
from lazyjax.kernels.methods import METHODS, admits
from lazyjax.kernels.pairs import kernels_between
from lazyjax.kernels.request import Request
from lazyjax.kernels.tiles import levels
from lazyjax.memory import bytes_needed, bytes_of, too_little

Kind = tuple[Any, tuple[jax.ShapeDtypeStruct, ...], str]


def _kind(*requests: Request) -> Kind:
    """Tell kinds of requests apart: by structure, which holds options, by shapes, by backend."""
    leaves, structure = jax.tree.flatten(requests)
    shapes = (jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    return structure, tuple(shapes), jax.default_backend()


def _of_shapes(kind: Kind) -> tuple[Request, ...]:
    structure, shapes, _ = kind
    return structure.unflatten(shapes)


@lru_cache(maxsize=256)
def _peak(kind: Kind) -> int:
    requests = _of_shapes(kind)
    program = kernels if len(requests) == 1 else kernels_between
    return bytes_needed(program.lower(*requests).compile())


def peak(*requests: Request) -> int:
    """Give the bytes of inputs, temporaries and result, as XLA counts them.

    Of one request, or of the two of a kernel between two functions. It is compiled for that, once
    for each kind of arguments, and not run.
    """
    return _peak(_kind(*requests))


def operations_of(request: Request) -> float:
    """Count the multiply-adds of a request, in its jaxpr."""
    return operations(jax.make_jaxpr(kernels)(*_of_shapes(_kind(request))).jaxpr)


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

    jax.eval_shape(trace, *_of_shapes(kind))
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
    bytes_of(memory)  # an error before any work
    asked = request.options.method
    names = [own.name for own in candidates(request)] if asked == "auto" else [asked]
    (fitting,) = _fitting(names, (request,), memory)
    return fitting


def pair_within_budget(
    one: Request, other: Request, memory: int | float | str
) -> tuple[Request, Request]:
    """Choose, for the kernel between two functions, as `within_budget` does for one.

    Raises
    ------
    TypeError, ValueError
        As `within_budget`.
    """
    asked = one.options.method
    names = ["auto", "jacobian_contraction"] if asked == "auto" else [asked]
    one, other = _fitting(names, (one, other), memory)
    return one, other


def _fitting(
    names: list[str], requests: tuple[Request, ...], memory: int | float | str
) -> tuple[Request, ...]:
    """Take the first of the methods that fits at some level, at its lowest."""
    budget = bytes_of(memory)
    last = levels(max(max(request.n1, request.n2) for request in requests))

    def having(name: str, level: int) -> tuple[Request, ...]:
        return tuple(request.having(method=name, level=level) for request in requests)

    least = []
    for name in names:
        if peak(*having(name, 0)) <= budget:
            return having(name, 0)
        least.append(peak(*having(name, last)))
        if least[-1] > budget:
            continue
        low, high = 0, last  # the first does not fit, the last does
        while high - low > 1:
            middle = (low + high) // 2
            fits = peak(*having(name, middle)) <= budget
            low, high = (low, middle) if fits else (middle, high)
        return having(name, high)
    of = "this kernel, inputs and result included"
    raise too_little(min(least), of, memory, "fewer examples or outputs")
