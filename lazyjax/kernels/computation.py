"""One call of `ntk`, from what is asked for to the compiled kernel."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from lazyjax import checks
from lazyjax.factors import Model, model_of, output_shapes
from lazyjax.kernels.methods import METHODS, Engine, Kernels, cheapest
from lazyjax.kernels.request import Call, Options
from lazyjax.kernels.task import COPIES, Task
from lazyjax.kernels.tiles import assemble, choose_blocks, passes
from lazyjax.types import Params


class Job(NamedTuple):
    """The kernel of one leaf of the outputs."""

    shape: Any  # of the outputs of an example, and their dtype
    out: tuple[int, ...]  # those that are asked for
    model: Model
    task: Task


def jobs(call: Call) -> list[Job]:
    """Give what is to be computed for each leaf of the outputs."""
    f, params, x1, x2, outputs, options = call
    summed = options.reduce == "sum"
    n1 = checks.batch("x1", x1)
    n2 = n1 if x2 is None else checks.batch("x2", x2)
    found = []
    for leaf, shape in enumerate(jax.tree.leaves(output_shapes(f, params, x1))):
        out = shape.shape if outputs is None else outputs.shape
        model = model_of(f, params, x1, options.wrt, leaf=leaf, outputs=outputs, summed=summed)
        task = Task(
            n1=n1,
            n2=n2,
            symmetric=x2 is None,
            outputs=1 if summed else math.prod(out),
            reduce=options.reduce,
            apart=options.per_leaf,
            passes=passes(n1, options.batch_size, options.level),
        )
        found.append(Job(shape, out, model, task))
    return found


def name_of(job: Job, x1: Any, method: str) -> str:
    """Give the row of `METHODS` that a method stands for."""
    name = cheapest(job.model, x1, job.task) if method == "auto" else method
    if METHODS[name].needs_reverse and not job.model.reverse:
        raise ValueError(
            f"`method` must not be {name} for a model that has forward mode only (a while loop). "
            "Use 'jacobian_contraction' or 'auto'."
        )
    return name


def engine_of(job: Job, x1: Any, method: str) -> Engine:
    """Set a method to work."""
    return METHODS[name_of(job, x1, method)].engine(job.model, x1, job.task)


def finished(engine: Engine, k: int) -> Engine:
    """Let the contractions give their results with the examples first, and means over outputs."""

    def finish(contract: Callable[[Any, Any], Kernels]) -> Callable[[Any, Any], Kernels]:
        def with_examples_first(f1: Any, f2: Any) -> Kernels:
            return {
                i: tile / k if tile.ndim == 2 else jnp.moveaxis(tile, 2, 1)
                for i, tile in contract(f1, f2).items()
            }

        return with_examples_first

    return engine._replace(contract={g: finish(c) for g, c in engine.contract.items()})


def whole(found: Kernels, job: Job, leaf: int) -> jax.Array:
    """Give the kernel of one leaf, -1 for all of them, in the shape of the outputs."""
    task = job.task
    full = (task.n1, task.n2, *job.out * COPIES[task.reduce])
    return found[leaf].reshape(full) if leaf in found else jnp.zeros(full, job.shape.dtype)


def _kernel(job: Job, call: Call) -> Any:
    """Compute the kernel of one output leaf, whole or a tree of its leaves."""
    task, options = job.task, call.options
    engine = finished(engine_of(job, call.x1, options.method), math.prod(job.out))
    blocks = choose_blocks(engine, task, options.batch_size, options.level)
    found = assemble(engine, task, call.x1, call.x2, blocks)
    if not options.per_leaf:
        return whole(found, job, -1)
    numbers = iter(range(sum(options.wrt)))
    kernels = [whole(found, job, next(numbers)) if moves else None for moves in options.wrt]
    return jax.tree.structure(call.params).unflatten(kernels)


@partial(jax.jit, static_argnames="options")
def kernels(
    f: Partial, params: Params, x1: Any, x2: Any | None, outputs: Any, *, options: Options
) -> Any:
    """Compute the kernel of each leaf of the outputs."""
    call = Call(f, params, x1, x2, outputs, options)
    with jax.default_matmul_precision(options.precision):
        structure = jax.tree.structure(output_shapes(f, params, x1))
        return structure.unflatten([_kernel(job, call) for job in jobs(call)])
