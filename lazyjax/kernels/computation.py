"""One call of `ntk`, from what is asked for to the compiled kernel."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from lazyjax import checks
from lazyjax.kernels.arguments import (
    check_batch_size,
    check_precision,
    chosen_outputs,
    differentiated,
    model_of,
    output_shapes,
    same_examples,
)
from lazyjax.kernels.batches import check_examples
from lazyjax.kernels.blocks import assemble, choose_blocks, passes
from lazyjax.kernels.methods import METHODS, REDUCTIONS, Engine, Kernels, Task, cheapest
from lazyjax.traces import as_it_is, one_example
from lazyjax.types import ModelFunction, Params

COPIES = {"none": 2, "diagonal": 1, "trace": 0, "sum": 0}
"""How often the shape of the outputs is in that of a kernel."""


class Options(NamedTuple):
    """What is asked for: static, so that a call with the same options compiles nothing new."""

    reduce: str
    method: str
    wrt: tuple[bool, ...]  # of each leaf of params
    per_leaf: bool
    batch_size: tuple[int, int] | None
    precision: str
    level: int = 0  # how much memory is saved, as in `blocks.choose_blocks`


class Call(NamedTuple):
    """The arguments of a call, checked: `kernels(*arrays, options=options)`."""

    f: Partial
    params: Params
    x1: Any
    x2: Any | None
    outputs: Any
    options: Options

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What is traced."""
        return self[:-1]


def check(
    f: ModelFunction,
    params: Params,
    x1: Any,
    x2: Any | None,
    *,
    reduce: str,
    wrt: Any,
    outputs: Sequence[int] | None,
    precision: str,
    method: str = "auto",
    per_leaf: bool = False,
    batch_size: int | tuple[int, int] | None = None,
) -> Call:
    """Check the arguments of `ntk`, before any work."""
    f = checks.model_function(f)
    checks.one_of("reduce", reduce, REDUCTIONS)
    checks.one_of("method", method, ["auto", *METHODS])
    check_precision(precision)
    checks.batch("x1", x1)
    if x2 is not None:
        checks.batch("x2", x2)
        same_examples(x1, x2)
    mask = differentiated(params, wrt)
    options = Options(reduce, method, mask, per_leaf, check_batch_size(batch_size), precision)
    f = as_it_is(f, params, one_example(x1))
    index = chosen_outputs(outputs, output_shapes(f, params, x1))
    alone = checks.batch("x1", x1) == 1 and x2 is not None
    check_examples(f, params, x2 if alone else x1)
    return Call(f, params, x1, x2, index, options)


def only_output(call: Call, purpose: str) -> tuple[tuple[int, ...], Any]:
    """Require a model with one output array; give the shape of the outputs that are asked for, and
    their dtype."""
    shapes = jax.tree.leaves(output_shapes(call.f, call.params, call.x1))
    if len(shapes) != 1:
        raise TypeError(
            f"`f` must return one array for {purpose}, got {len(shapes)}. Take one of them, as in "
            "lambda params, x: f(params, x)[0], or concatenate them in f."
        )
    return shapes[0].shape if call.outputs is None else call.outputs.shape, shapes[0].dtype


class Job(NamedTuple):
    """The kernel of one leaf of the outputs."""

    shape: Any  # of the outputs of an example, and their dtype
    out: tuple[int, ...]  # those that are asked for
    model: Any
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


def engine_of(job: Job, x1: Any, method: str) -> Engine:
    """Set a method to work."""
    name = cheapest(job.model, x1, job.task) if method == "auto" else method
    if METHODS[name].needs_reverse and not job.model.reverse:
        raise ValueError(
            f"`method` must not be {name} for a model that has forward mode only (a while loop). "
            "Use 'jacobian_contraction' or 'auto'."
        )
    return METHODS[name].engine(job.model, x1, job.task)


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
