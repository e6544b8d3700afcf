"""One call of `ntk`, from what is asked for to the compiled kernel."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lazyjax import centering
from lazyjax.blocks import even, in_blocks
from lazyjax.factors import Model, model_of
from lazyjax.holomorphy import is_complex
from lazyjax.kernels import tiles
from lazyjax.kernels.methods import METHODS, Engine, Kernels, cheapest
from lazyjax.kernels.request import Request
from lazyjax.kernels.task import COPIES, WHOLE, Task
from lazyjax.kernels.tiles import Blocks, assemble, choose_blocks, passes
from lazyjax.tiling import mirrored
from lazyjax.types import PyTree


class Job(NamedTuple):
    """The kernel of one leaf of the outputs."""

    shape: jax.ShapeDtypeStruct  # of the outputs of an example, and their dtype
    out: tuple[int, ...]  # those that are asked for
    model: Model
    task: Task


def jobs(request: Request) -> list[Job]:
    """Give what is to be computed for each leaf of the outputs."""
    options, outputs = request.options, request.outputs
    summed = options.reduce == "sum"

    def job(leaf: int, shape: jax.ShapeDtypeStruct) -> Job:
        out = shape.shape if outputs is None else outputs.shape
        model = model_of(
            request.f,
            request.params,
            request.x1,
            options.wrt,
            leaf=leaf,
            outputs=outputs,
            summed=summed,
            metric=request.metric,
        )
        task = Task(
            n1=request.n1,
            n2=request.n2,
            symmetric=request.x2 is None,
            outputs=1 if summed else math.prod(out),
            reduce=options.reduce,
            apart=options.per_leaf,
            signs=options.signs,
            passes=passes(request.n1, options.batch_size, options.level),
        )
        return Job(shape, out, model, task)

    return [job(*output) for output in enumerate(request.shapes)]


def name_of(job: Job, x1: PyTree, method: str) -> str:
    """Give the row of `METHODS` that a method stands for."""
    name = cheapest(job.model, x1, job.task) if method == "auto" else method
    if job.task.signs:  # which only a Jacobian has
        name = "jacobian_contraction"
    if METHODS[name].real_only and is_complex(job.shape.dtype):
        raise ValueError(
            f"`method` must not be {name} for complex='hermitian'. Use 'auto', or complex='real'."
        )
    if METHODS[name].needs_reverse and not job.model.reverse:
        raise ValueError(
            f"`method` must not be {name} for a model that has forward mode only (a while loop). "
            "Use 'jacobian_contraction' or 'auto'."
        )
    return name


def engine_of(job: Job, x1: PyTree, method: str) -> Engine:
    """Set a method to work."""
    return METHODS[name_of(job, x1, method)].engine(job.model, x1, job.task)


def finished(engine: Engine, k: int) -> Engine:
    """Let the contractions give their results with the examples first, and means over outputs."""

    def finish(contract: Callable[[Any, Any], Kernels]) -> Callable[[Any, Any], Kernels]:
        def with_examples_first(f1: PyTree, f2: PyTree) -> Kernels:
            other = f2
            if engine.conjugated:
                other = jax.tree.map(jnp.conj, f1 if f2 is None else f2)
            kernels = {
                i: tile / k if tile.ndim == 2 else jnp.moveaxis(tile, 2, 1)
                for i, tile in contract(f1, other).items()
            }
            if engine.real:
                kernels = jax.tree.map(jnp.real, kernels)
            if f2 is None and engine.conjugated:
                kernels = jax.tree.map(lambda a: (a + mirrored(a)) / 2, kernels)
            return kernels

        return with_examples_first

    return engine._replace(contract={g: finish(c) for g, c in engine.contract.items()})


def whole(
    by_leaf: Kernels, job: Job, leaf: int = WHOLE, other: tuple[int, ...] | None = None
) -> jax.Array:
    """Give the kernel of one leaf, or of all of them, in the shape of the outputs.

    `other` is that of the outputs of the second function, where there is one.
    """
    task = job.task
    outputs = job.out * COPIES[task.reduce]
    if other is not None and task.reduce == "none":
        outputs = (*job.out, *other)
    full = (task.n1, task.n2, *outputs)
    return by_leaf[leaf].reshape(full) if leaf in by_leaf else jnp.zeros(full, job.shape.dtype)


def _engine_and_blocks(job: Job, request: Request) -> tuple[Engine, Blocks]:
    options = request.options
    engine = finished(engine_of(job, request.x1, options.method), math.prod(job.out))
    return engine, choose_blocks(engine, job.task, options.batch_size, options.level)


def _kernel(job: Job, request: Request) -> Any:
    """Compute the kernel of one output leaf, whole or a tree of its leaves."""
    engine, blocks = _engine_and_blocks(job, request)
    by_leaf = assemble(engine, job.task, request.x1, request.x2, blocks)
    return _of_outputs(by_leaf, job, request)


def _of_outputs(by_leaf: Kernels, job: Job, request: Request) -> Any:
    """Give the kernels of leaves in the shape of the outputs, centred and weighed."""
    task, options = job.task, request.options

    def of(leaf: int) -> jax.Array:
        return centering.kernel(
            whole(by_leaf, job, leaf),
            request.weights,
            center=options.center,
            mixed=task.reduce == "none",
            symmetric=task.symmetric,
        )

    return by_leaves(of, request)


def kernel_and_pull(request: Request) -> tuple[jax.Array, Callable[[jax.Array], Any] | None]:
    """Compute the kernel of a batch with itself, and c (n, C) -> J^H c from the same features.

    The second is None where there are none that are kept.
    """
    (job,) = jobs(request)
    engine, blocks = _engine_and_blocks(job, request)
    if engine.pull is None or not blocks.kept:
        return _kernel(job, request), None
    kept, of_features = tiles.features(engine, request.x1, blocks.at_once), engine.pull
    by_leaf = tiles.contract(engine, job.task, kept, None, blocks.rows, blocks.columns)

    def pull(c: jax.Array) -> Any:
        return jax.tree.map(jnp.conj, of_features(kept, jnp.conj(c)))

    return _of_outputs(by_leaf, job, request), pull


def by_leaves(of: Callable[[int], jax.Array], request: Request) -> Any:
    """Give the kernel of all leaves, or a tree of those of each."""
    options = request.options
    if not options.per_leaf:
        return of(WHOLE)
    numbers = iter(range(sum(options.wrt)))
    kernels = [of(next(numbers)) if moves else None for moves in options.wrt]
    return jax.tree.structure(request.params).unflatten(kernels)


@jax.jit
def kernels(request: Request) -> Any:
    """Compute the kernel of each leaf of the outputs."""
    with request.options.in_force():
        return request.tree.unflatten([_kernel(job, request) for job in jobs(request)])


def _diagonal(job: Job, request: Request) -> Any:
    """Compute the kernel of each example with itself, of one output leaf."""
    options = request.options
    task = job.task._replace(n2=1, symmetric=False)
    method = "structured_derivatives" if job.model.reverse else "jacobian_contraction"
    engine = finished(METHODS[method].engine(job.model, request.x1, task), math.prod(job.out))

    def of_example(features: Any) -> Kernels:
        alone = jax.tree.map(lambda a: a[None], features)
        sums: Kernels = {}
        for group, contract in engine.contract.items():
            for leaf, tile in contract(alone[group], alone[group]).items():
                sums[leaf] = sums[leaf] + tile if leaf in sums else tile
        return {leaf: (tile + mirrored(tile))[0, 0] / 2 for leaf, tile in sums.items()}

    def of_block(x: PyTree) -> Kernels:
        return jax.vmap(of_example)(engine.features(x))

    at_once = choose_blocks(engine, task, options.batch_size, options.level).at_once
    by_leaf = in_blocks(of_block, request.x1, even(request.n1, at_once))
    full = (request.n1, *job.out * COPIES[task.reduce])

    def of(leaf: int) -> jax.Array:
        return by_leaf[leaf].reshape(full) if leaf in by_leaf else jnp.zeros(full, job.shape.dtype)

    return by_leaves(of, request)


@jax.jit
def diagonals(request: Request) -> Any:
    """Compute the kernels of examples with themselves, of each leaf of the outputs."""
    with request.options.in_force():
        return request.tree.unflatten([_diagonal(job, request) for job in jobs(request)])
