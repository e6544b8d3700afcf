"""The programs of a stored kernel: the features of a block, and a tile from the features of two.

Each is compiled on its own, for one device, and what it needs of memory is known before it runs.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from lazyjax import checks
from lazyjax.kernels import Engine, Job, Request, contract, engine_of, finished, jobs, whole
from lazyjax.kernels import features as features_of
from lazyjax.memory import analysed
from lazyjax.meshes import on_one_device
from lazyjax.types import PyTree


class Cut(NamedTuple):
    """How a kernel is cut: static; the same cut of the same request gives the same bits."""

    orders: tuple[str, ...]  # of each part
    tile: tuple[int, int]  # examples of x1 and of x2
    at_once: int  # examples whose features are computed at once


def _engine(request: Request, cut: Cut, n1: int, n2: int, symmetric: bool) -> tuple[Job, Engine]:
    """Set the method of a request to work on one tile; its x1 may be any examples."""
    (job,) = jobs(request)
    job = job._replace(task=job.task._replace(n1=n1, n2=n2, symmetric=symmetric, orders=cut.orders))
    return job, finished(engine_of(job, request.x1, request.options.method), math.prod(job.out))


@partial(jax.jit, static_argnames="cut")
def features(request: Request, *, cut: Cut) -> Any:
    """Compute the features of a block of examples."""
    with request.options.in_force(), on_one_device():
        _, engine = _engine(request, cut, *cut.tile, False)
        return features_of(engine, request.x1, cut.at_once)


@partial(jax.jit, static_argnames="cut")
def tile(request: Request, f1: PyTree, f2: PyTree, *, cut: Cut) -> Any:
    """Compute a tile from two features, or a symmetric one from f1; x1 may be any examples."""
    n1 = checks.batch("f1", f1)
    n2 = n1 if f2 is None else checks.batch("f2", f2)
    with request.options.in_force(), on_one_device():
        job, engine = _engine(request, cut, n1, n2, f2 is None)
        return whole(contract(engine, job.task, f1, f2, n1, n2), job)


class Programs(NamedTuple):
    """Compiled for one kernel and one device; and the bytes that they need."""

    features: tuple[Any, ...]  # of a block of x1, and of one of x2: of a request of that block
    tile: Any  # of a request, f1 and f2
    diagonal: Any  # that of f1 and None; None if the kernel is not symmetric
    shapes: tuple[Any, ...]  # of the features of a block of x1, and of one of x2
    constant: int  # bytes of what is always there
    passing: int  # bytes of what comes and goes, at most

    def memory(self, held: int) -> int:
        """Give the bytes that a device needs when it holds the features of so many blocks of x1."""
        return self.constant + held * size_of(self.shapes[0]) + self.passing

    def room(self, memory: int) -> int:
        """Count the blocks of x1 whose features can be held within a budget."""
        return (memory - self.memory(0)) // max(1, size_of(self.shapes[0]))


def size_of(shapes: Any) -> int:
    """Count the bytes of a tree of arrays or shapes."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(shapes))


def shapes_on(device: Any, tree: PyTree, size: int | None = None) -> Any:
    """Give the shapes of arrays on a device, or of blocks of that many of their examples."""
    place = SingleDeviceSharding(device)

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        full = leaf.shape if size is None else (size, *leaf.shape[1:])
        return jax.ShapeDtypeStruct(full, jnp.result_type(leaf), sharding=place)

    return jax.tree.map(shape, tree)


def compile_programs(request: Request, cut: Cut, device: Any) -> Programs:
    """Compile the programs of a kernel.

    Parameters
    ----------
    request : Request
        With any number of examples, `x2=None` for a symmetric kernel, and a row of `METHODS`.
    cut : Cut
    device : Device

    Returns
    -------
    Programs

    Raises
    ------
    ValueError
        If XLA does not tell what code needs on this backend.
    """
    like = shapes_on(device, request.of(request.x1))
    made, shapes, passing = [], [], []
    for size in cut.tile[: 1 if request.x2 is None else 2]:
        x = shapes_on(device, request.x1, size)
        lowered = features.lower(like.of(x), cut=cut)
        made.append(lowered.compile())
        shapes.append(shapes_on(device, lowered.out_info))
        passing.append(size_of(x) + size_of(shapes[-1]) + analysed(made[-1]).temp_size_in_bytes)

    def contraction(f2: PyTree) -> Any:
        compiled = tile.lower(like, shapes[0], f2, cut=cut).compile()
        sizes = analysed(compiled)
        twice = 2 * sizes.output_size_in_bytes  # it is copied on its way to the disk
        passing.append(size_of(f2) + twice + sizes.temp_size_in_bytes)
        return compiled

    programs = contraction(shapes[-1]), contraction(None) if request.x2 is None else None
    constant = size_of(like)
    return Programs(tuple(made), *programs, tuple(shapes), constant, max(passing))
