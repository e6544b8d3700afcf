"""The compiled training loop: steps under `lax.scan`, in blocks and chunks, ensembles under `vmap`.

A chunk is a scan over blocks, and a block a scan over steps that does nothing but step and hand out
its weights. Movements, the check for divergence and the recording are computed on the weights of a
whole block at once. That is what makes a step of a small network cost its own operations and little
else.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lazyjax import checks
from lazyjax.convolutions import plain_convolutions
from lazyjax.data import batch_indices
from lazyjax.norms import scale_of
from lazyjax.types import Dataset, Loss, ModelFunction, Params, PyTree
from lazyjax.widening import widened

NEVER = np.iinfo(np.int32).max  # `diverged_at` of a run that has not
_MEMBERS = "members of the ensemble"


class Chunk(NamedTuple):
    """What is static in the compiled chunk: sizes, and what has a member axis."""

    block: int  # steps of a block
    unroll: int  # steps of the compiled loop's body
    blocks: int  # blocks of a chunk
    capacity: int  # grid points of a chunk, at most
    batch_size: int | None  # None: full batch
    members: int | None  # None: one run
    data_axis: int | None

    @property
    def steps(self) -> int:
        """Steps that it takes."""
        return self.block * self.blocks


class State(NamedTuple):
    """What a chunk hands to the next."""

    params: Params
    optimizer_state: Any
    last_finite: Params
    diverged_at: jax.Array  # NEVER until it does


class Records(NamedTuple):
    """What a chunk leaves behind, rows over its steps (or its grid points, for `params`)."""

    loss: Any
    movement: Any  # norm(w - w0), a column a leaf
    params: Any


def objective(f: ModelFunction, loss: Loss, params: Params, data: Dataset) -> jax.Array:
    """Compute the mean loss, in float32 at least: a squared error of 300 is not inf in float16."""
    return jnp.mean(widened(loss(widened(f(params, data.x)), data.y)))


def _each(function: Callable[..., jax.Array], *leaves: Sequence[jax.Array]) -> jax.Array:
    """Reduce each leaf, and give the results on a last axis: little to compile a leaf."""
    return jnp.stack([function(*own) for own in zip(*leaves, strict=True)], -1)


def _inner(rows: jax.Array) -> tuple[int, ...]:
    return tuple(range(1, rows.ndim))


def _norms(rows: list[jax.Array]) -> jax.Array:
    """Compute the norm of each row of each leaf, at any size; a pass more than sums of squares."""
    scales = scale_of(_each(lambda r: jnp.max(jnp.abs(r), _inner(r), initial=0.0), rows), ())

    def squared(row: jax.Array, scale: jax.Array) -> jax.Array:
        own = scale.astype(row.dtype).reshape(-1, *(1,) * (row.ndim - 1))
        return jnp.sum(jnp.square(row / own), _inner(row))

    return scales * jnp.sqrt(_each(squared, rows, list(scales.T)))


def _step(
    optimizer: optax.GradientTransformation,
    f: ModelFunction,
    loss: Loss,
    params: Params,
    batch: Dataset,
    state: PyTree,
) -> tuple[jax.Array, Params, Any]:
    """Give the loss, the updates and the new state of the optimiser.

    An optimiser that asks for more than the gradient has it: the loss, or the loss and its gradient
    as functions of the parameters, on this batch.
    """

    @plain_convolutions  # which are ten times faster inside a loop
    def derivative(at: tuple[Params, Dataset]) -> tuple[jax.Array, Params]:
        return jax.value_and_grad(partial(objective, f, loss))(*at)

    @plain_convolutions
    def value_of(at: tuple[Params, Dataset]) -> jax.Array:
        return objective(f, loss, *at)

    value, gradient = derivative((params, batch))
    given: dict[str, Any] = {}
    if _asks_for_more(optimizer, gradient, state, params):
        given = {
            "value": value,
            "grad": gradient,
            "value_fn": lambda params: value_of((params, batch)),
            "grad_fn": lambda params, _: derivative((params, batch))[1],
        }
        parameters = inspect.signature(optimizer.update).parameters
        takes_any = any(own.kind is own.VAR_KEYWORD for own in parameters.values())
        asked = ("value", "grad", "value_fn") if takes_any else parameters  # those of a line search
        given = {name: own for name, own in given.items() if name in asked}
    updates, state = optimizer.update(gradient, state, params, **given)
    return value, updates, state


def _asks_for_more(
    optimizer: optax.GradientTransformation, gradient: Params, state: PyTree, params: Params
) -> bool:
    """Tell whether an optimiser that may have more than the gradient does not go without."""
    if not isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return False
    try:
        jax.eval_shape(optimizer.update, gradient, state, params)
    except (TypeError, ValueError):
        return True
    return False


def _run_chunk(
    optimizer: optax.GradientTransformation,
    chunk: Chunk,
    f: ModelFunction,
    loss: Loss,
    params0: Params,
    data: Dataset,
    key: jax.Array | None,
    state: State,
    start: jax.Array,
    bounds: jax.Array,
    grid: jax.Array,
) -> tuple[State, Records]:
    """Run the steps `start` .. `start + chunk.steps - 1`.

    `grid` (capacity,) holds the steps to record, counted from `start`, and `bounds` (blocks + 1,)
    where in it the points of each block begin.
    """
    leaves0 = jax.tree.leaves(widened(params0))
    # movements are summed in units of the leaf, or of all where it is zero: squares keep in range
    largest = _each(lambda w0: jnp.max(jnp.abs(w0), initial=0.0), leaves0)
    units = scale_of(jnp.where(largest > 0, largest, jnp.max(largest)), ())
    least = np.asarray([jnp.finfo(w0.dtype).tiny * 2.0**40 for w0 in leaves0], units.dtype)
    n = checks.batch("x", data.x)

    def step(carry: Any, indices: Any) -> Any:
        params, optimizer_state = carry
        batch = data if indices is None else jax.tree.map(lambda a: a[indices], data)
        value, updates, optimizer_state = _step(optimizer, f, loss, params, batch, optimizer_state)
        return (optax.apply_updates(params, updates), optimizer_state), (value, params)

    def out_of_range(squared: jax.Array) -> jax.Array:  # in any row, leaf or member
        lost = jnp.any(jnp.isinf(squared) | ((squared > 0) & (squared < least[None])))
        # one answer for all members, so that `vmap` keeps the condition
        return lost if chunk.members is None else jax.lax.psum(lost.astype(int), _MEMBERS) > 0

    def square(row: jax.Array, w0: jax.Array, unit: jax.Array) -> jax.Array:
        # 0 * row makes the sum NaN where a weight is not finite, and inf alone is an overflow of
        # the square: one pass tells both
        moved = (widened(row) - w0[None]) * (1 / unit).astype(w0.dtype)
        return jnp.sum(jnp.square(moved) + 0 * row, _inner(row))

    def block(carry: Any, xs: Any) -> Any:
        state, recorded = carry
        number, first, last = xs
        begin = start + number * chunk.block
        indices = None
        if chunk.batch_size is not None:
            indices = batch_indices(key, begin, n=n, batch_size=chunk.batch_size, steps=chunk.block)
        (params, optimizer_state), (value, rows) = jax.lax.scan(
            step,
            (state.params, state.optimizer_state),
            indices,
            length=chunk.block,
            unroll=chunk.unroll,
        )

        after = jax.tree.leaves(rows)
        squared = _each(square, after, leaves0, list(units))
        finite = jnp.isfinite(value) & ~jnp.any(jnp.isnan(squared), -1)
        movement = jax.lax.cond(
            out_of_range(squared),
            lambda: _norms([widened(r) - w0[None] for r, w0 in zip(after, leaves0, strict=True)]),
            lambda: units[None] * jnp.sqrt(squared),
        )
        here = jnp.where(jnp.all(finite), NEVER, begin + jnp.argmin(finite).astype(jnp.int32))
        diverged_at = jnp.minimum(state.diverged_at, here)

        def at(offset: jax.Array) -> Params:  # the weights of a row, or the last finite ones
            offset = jnp.minimum(offset, diverged_at - 1 - begin)
            row = jnp.maximum(offset, 0)
            return jax.tree.map(
                lambda r, w: jnp.where(
                    offset < 0, w, jax.lax.dynamic_index_in_dim(r, row, keepdims=False)
                ),
                rows,
                state.last_finite,
            )

        def record(slot: jax.Array, recorded: Params) -> Params:
            w = at(grid[slot] - number * chunk.block)
            return jax.tree.map(
                lambda r, wi: jax.lax.dynamic_update_index_in_dim(r, wi, slot, axis=0), recorded, w
            )

        recorded = jax.lax.fori_loop(first, last, record, recorded)
        last_finite = at(jnp.asarray(chunk.block - 1, jnp.int32))
        state = State(params, optimizer_state, last_finite, diverged_at)
        return (state, recorded), (value, movement)

    recorded = jax.tree.map(lambda w: jnp.zeros((chunk.capacity, *w.shape), w.dtype), params0)
    numbers = jnp.arange(chunk.blocks, dtype=jnp.int32)
    (state, recorded), (value, movement) = jax.lax.scan(
        block, (state, recorded), (numbers, bounds[:-1], bounds[1:])
    )
    value, movement = value.reshape(-1), movement.reshape(-1, len(leaves0))
    return state, Records(value, movement, recorded)


@partial(jax.jit, static_argnums=(0, 1), donate_argnames=("state",))
def run_chunk(
    optimizer: optax.GradientTransformation,
    chunk: Chunk,
    f: ModelFunction,
    loss: Loss,
    params0: Params,
    data: Dataset,
    key: jax.Array | None,
    state: State,
    *where: jax.Array,
) -> tuple[State, Records]:
    """Run the steps of a chunk, of one run or of all members; see `_run_chunk` for `where`."""
    run = partial(_run_chunk, optimizer, chunk)
    if chunk.members is not None:
        axes = (0, 0, 0, chunk.data_axis, 0, 0, None, None, None)
        run = jax.vmap(run, in_axes=axes, axis_size=chunk.members, axis_name=_MEMBERS)
    return run(f, loss, params0, data, key, state, *where)


def one_step(
    optimizer: optax.GradientTransformation,
    chunk: Chunk,
    f: ModelFunction,
    loss: Loss,
    params: Params,
    data: Dataset,
) -> Any:
    """Take one step on all data, from a fresh state: what a run is made of, to be traced."""

    def one(f: ModelFunction, loss: Loss, params: Params, data: Dataset) -> Any:
        return _step(optimizer, f, loss, params, data, optimizer.init(params))

    if chunk.members is not None:
        one = jax.vmap(one, (0, 0, 0, chunk.data_axis), axis_size=chunk.members)
    return one(f, loss, params, data)


@partial(jax.jit, static_argnums=(0, 1))
def start(optimizer: optax.GradientTransformation, members: int | None, params: Params) -> State:
    """Give the state at w0, with fresh buffers: the chunk consumes its state."""

    def one(params: Params) -> State:
        copied = jax.tree.map(jnp.copy, params)
        never = jnp.asarray(NEVER, jnp.int32)
        return State(params, optimizer.init(params), copied, never)

    return (one if members is None else jax.vmap(one))(params)


def _on_all_data(chunk: Chunk, function: Any) -> Any:
    """Give a function of (f, loss, params, data) for each member, or as it is for one run."""
    if chunk.members is None:
        return function
    return jax.vmap(function, (0, 0, 0, chunk.data_axis), axis_size=chunk.members)


@partial(jax.jit, static_argnums=0)
def data_loss(
    chunk: Chunk, f: ModelFunction, loss: Loss, params: Params, data: Dataset
) -> jax.Array:
    """Compute the loss on all data."""
    return _on_all_data(chunk, objective)(f, loss, params, data)


def data_gradient(chunk: Chunk, *arguments: Any) -> Params:
    """Compute the gradient of the loss on all data by the parameters."""
    return _on_all_data(chunk, jax.grad(objective, argnums=2))(*arguments)
