"""A kernel in pieces: the features of a block of examples, and a tile from the features of two.

Each is compiled on its own, for one device, and what it needs of memory is known before it runs.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from lazyjax import checks
from lazyjax.costs import Rates, using
from lazyjax.kernels import Call, Engine, Job, Options, contract, engine_of, finished, jobs, whole
from lazyjax.kernels import features as features_of
from lazyjax.memory import analysed


class Spec(NamedTuple):
    """All that the pieces depend on beside arrays: static; the same spec gives the same bits."""

    options: Options  # the method in it is a row of `METHODS`
    orders: tuple[str, ...]  # of each part
    tile: tuple[int, int]  # examples of x1 and of x2
    at_once: int  # examples whose features are computed at once
    rates: Rates  # by which products are sliced


def _engine(call: Call, spec: Spec, n1: int, n2: int, symmetric: bool) -> tuple[Job, Engine]:
    """Set the method of a spec to work on one tile; x1 of the call may be any examples."""
    (job,) = jobs(call._replace(x2=None, options=spec.options))
    task = job.task._replace(n1=n1, n2=n2, symmetric=symmetric, orders=spec.orders)
    job = job._replace(task=task)
    return job, finished(engine_of(job, call.x1, spec.options.method), math.prod(job.out))


@partial(jax.jit, static_argnames="spec")
def features(f: Any, params: Any, x: Any, outputs: Any, *, spec: Spec) -> Any:
    """Compute the features of a block of examples."""
    call = Call(f, params, x, None, outputs, spec.options)
    with using(spec.rates), jax.default_matmul_precision(spec.options.precision):
        _, engine = _engine(call, spec, *spec.tile, False)
        return features_of(engine, x, spec.at_once)


@partial(jax.jit, static_argnames="spec")
def tile(f: Any, params: Any, like: Any, outputs: Any, f1: Any, f2: Any, *, spec: Spec) -> Any:
    """Compute a tile from two features, or a symmetric one from f1 alone; `like`: any examples."""
    call = Call(f, params, like, None, outputs, spec.options)
    n1 = checks.batch("f1", f1)
    n2 = n1 if f2 is None else checks.batch("f2", f2)
    with using(spec.rates), jax.default_matmul_precision(spec.options.precision):
        job, engine = _engine(call, spec, n1, n2, f2 is None)
        return whole(contract(engine, job.task, f1, f2, n1, n2), job, -1)


class Pieces(NamedTuple):
    """The pieces of one kernel, compiled for one device, and the bytes that they need."""

    features: tuple[Any, ...]  # of a block of x1, and of one of x2: (f, params, x, outputs)
    tile: Any  # (f, params, like, outputs, f1, f2)
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


def shapes_on(device: Any, tree: Any, size: int | None = None) -> Any:
    """Give the shapes of arrays on a device, or of blocks of that many of their examples."""
    place = SingleDeviceSharding(device)

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        full = leaf.shape if size is None else (size, *leaf.shape[1:])
        return jax.ShapeDtypeStruct(full, jnp.result_type(leaf), sharding=place)

    return jax.tree.map(shape, tree)


def compile_pieces(call: Call, spec: Spec, device: Any) -> Pieces:
    """Compile the pieces of a kernel.

    Parameters
    ----------
    call : Call
        With any number of examples; `x2=None` for a symmetric kernel.
    spec : Spec
    device : Device

    Returns
    -------
    Pieces

    Raises
    ------
    ValueError
        If XLA does not tell what code needs on this backend.
    """
    f, params, like, outputs = (
        shapes_on(device, a) for a in (call.f, call.params, call.x1, call.outputs)
    )
    made, shapes, passing = [], [], []
    for size in spec.tile[: 1 if call.x2 is None else 2]:
        x = shapes_on(device, call.x1, size)
        lowered = features.lower(f, params, x, outputs, spec=spec)
        made.append(lowered.compile())
        shapes.append(shapes_on(device, lowered.out_info))
        passing.append(size_of(x) + size_of(shapes[-1]) + analysed(made[-1]).temp_size_in_bytes)

    def contraction(f2: Any) -> Any:
        compiled = tile.lower(f, params, like, outputs, shapes[0], f2, spec=spec).compile()
        sizes = analysed(compiled)
        twice = 2 * sizes.output_size_in_bytes  # it is copied on its way to the disk
        passing.append(size_of(f2) + twice + sizes.temp_size_in_bytes)
        return compiled

    pieces = contraction(shapes[-1]), contraction(None) if call.x2 is None else None
    constant = size_of((f, params, like, outputs))
    return Pieces(tuple(made), *pieces, tuple(shapes), constant, max(passing))
