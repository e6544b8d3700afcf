"""One run of the training loop, or of an ensemble: chunks, the history, checkpoints, warnings.

`loop` has the compiled part; here its records are gathered on the host, chunk by chunk, so that a
progress bar moves, a run can be continued, and device memory does not grow with the steps.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from lazyjax import checks, loop
from lazyjax.checkpoints import fingerprint, load_tree, save_tree, what_is
from lazyjax.equations import constants
from lazyjax.spectrum import largest_eigenvalue
from lazyjax.tangent import output_scale
from lazyjax.traces import as_it_is
from lazyjax.types import Dataset, History, Loss, ModelFunction, Params, leaf_names

_BLOCK_STEPS = 64  # enough to spread what a block costs over its steps
_BLOCK_NUMBERS = 2**20  # weights of a block, at most: they stay in the cache
_UNROLL = 2  # a third less time for the steps of a small model, and little more to compile
_UNROLL_NUMBERS = 2**12
_CHUNK_STEPS = 5000
_CHUNK_NUMBERS = 2**26  # weights stepped over in a chunk: large models report after few steps
_ROUNDING = 50  # eps sqrt(steps) this many times: where rounding costs a movement one percent

_listener: ContextVar[Callable[[int, int, str | None], None] | None] = ContextVar(
    "lazyjax_training_progress", default=None
)


@contextlib.contextmanager
def progress(callback: Callable[[int, int, str | None], None]) -> Iterator[None]:
    """Report the progress of every training run inside the `with` block.

    Parameters
    ----------
    callback : callable
        Called as `callback(done, total, label)` after each chunk, in steps; `label` is what the
        run was given.
    """
    token = _listener.set(callback)
    try:
        yield
    finally:
        _listener.reset(token)


def log_grid(steps: int, *, points: int = 100) -> np.ndarray:
    """Give steps spaced evenly in log(1 + step), from 0 to `steps`, both included.

    Parameters
    ----------
    steps : int
        The last step, 1 or more.
    points : int
        How many points to aim at; equal ones are merged, so that short runs give fewer.

    Returns
    -------
    (G,) array of int

    Raises
    ------
    TypeError, ValueError
        If `steps` < 1 or `points` < 2, or they are no whole numbers.

    Examples
    --------
    >>> log_grid(1000, points=8).tolist()
    [0, 2, 6, 18, 51, 138, 372, 1000]
    """
    checks.whole("steps", steps, least=1)
    checks.whole("points", points, least=2)
    grid = np.expm1(np.linspace(0.0, np.log1p(steps), points))
    return np.unique(np.append(np.rint(grid).astype(int), steps))


def _plan(
    steps: int, numbers: int, chunk_steps: int | None, **fields: Any
) -> tuple[loop.Plan, int]:
    """Choose the sizes of blocks and chunks, and give the number of chunks.

    The loop takes a row for each of the steps 0 .. `steps`, the last one only for its loss. The
    chunks are as equal as blocks allow, so that little is stepped in vain.
    """
    rows = steps + 1
    if chunk_steps is None:
        chunk_steps = int(np.clip(_CHUNK_NUMBERS // numbers, 8, _CHUNK_STEPS))
    chunks = -(-rows // chunk_steps)
    rows_of_chunk = -(-rows // chunks)
    block = int(np.clip(_BLOCK_NUMBERS // numbers, 1, min(_BLOCK_STEPS, rows_of_chunk)))
    blocks = -(-rows_of_chunk // block)
    unroll = min(block, _UNROLL) if numbers <= _UNROLL_NUMBERS else 1
    plan = loop.Plan(block=block, unroll=unroll, blocks=blocks, capacity=0, **fields)
    return plan, -(-rows // plan.chunk)


def _grid(record: int | np.ndarray | None, steps: int) -> np.ndarray:
    if record is None:
        return log_grid(steps)
    if isinstance(record, int):
        return log_grid(steps, points=record)
    grid = np.asarray(record)
    whole = np.issubdtype(grid.dtype, np.integer) and grid.ndim == 1 and grid.size > 0
    if not whole or np.any(np.diff(grid) <= 0) or grid[0] < 0 or grid[-1] > steps:
        raise ValueError(
            f"`record` must be whole steps that rise from 0 to at most `steps` = {steps}, got "
            f"{record}. Use np.arange(0, steps + 1, 100), a number of points, or None."
        )
    return np.union1d(grid, [0, steps])


def _recipe(plan: loop.Plan, chunk: Any, arguments: tuple[Any, ...]) -> str:
    """Tell a run from any other: its compiled step, and every number that goes in."""
    jaxpr = jax.make_jaxpr(chunk)(*arguments)
    text = re.sub(r"0x[0-9a-f]+", "", str(jaxpr))  # addresses differ from process to process
    return fingerprint(f"{plan} {text}", constants(jaxpr), arguments)


def _norm(array: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Compute norms in float32 at least, free of scale; on the host, where nothing compiles."""
    array = np.abs(np.asarray(array, jnp.promote_types(array.dtype, jnp.float32)))
    largest = np.max(array, axis, keepdims=True, initial=0)
    largest = np.where((largest > 0) & np.isfinite(largest), largest, 1)
    root = np.sqrt(np.sum(np.square(array / largest), axis))
    return largest.reshape(root.shape) * root


def _norms(plan: loop.Plan, params0: Params) -> np.ndarray:
    """Give the norm of each leaf at w0, a column a leaf."""
    first = 0 if plan.members is None else 1
    return np.stack(
        [_norm(np.asarray(w), tuple(range(first, np.ndim(w)))) for w in jax.tree.leaves(params0)],
        axis=-1,
    )


def _history(
    plan: loop.Plan,
    params0: Params,
    own0: np.ndarray,
    grid: np.ndarray,
    loss: np.ndarray,
    movement: np.ndarray,
    recorded: Params,
    diverged_at: np.ndarray,
) -> History:
    """Turn movements into relative ones; blank the curves from the divergence on."""
    steps = loss.shape[-1] - 1
    late = np.arange(steps + 1) >= diverged_at[..., None]
    loss = np.where(late, np.nan, loss)
    movement = np.where(late[..., None], np.nan, movement)
    all0 = _norm(own0, -1)[..., None]
    borrowed = np.any(own0.reshape(-1, own0.shape[-1]) == 0, axis=0)
    reference = np.where(borrowed, all0, own0)
    with np.errstate(all="ignore"):  # all of w0 may be 0: movement inf
        layers = movement / reference[..., None, :]
        relative = movement / all0[..., None]
        squares = np.einsum("...i,...i->...", relative, relative, dtype=np.float64)  # in its range
        whole = np.sqrt(squares).astype(movement.dtype)
    names = leaf_names(params0)
    diverged = [int(t) if t <= steps else None for t in np.atleast_1d(diverged_at)]
    return History(
        loss=loss,
        weight_movement=whole,
        layer_movement={name: layers[..., i] for i, name in enumerate(names)},
        relative_to_all=tuple(name for name, b in zip(names, borrowed, strict=True) if b),
        steps=grid,
        params=recorded,
        data_loss=loss[..., grid],
        diverged_at=diverged[0] if plan.members is None else tuple(diverged),
    )


def _warn_of_divergence(
    f: ModelFunction, params: Params, data: Dataset, history: History, data_axis: int | None
) -> None:
    steps = history.diverged_at
    if isinstance(steps, tuple):
        marked = [i for i, step in enumerate(steps) if step is not None]
        if not marked:
            return
        first = marked[0]
        who = f"members {marked} of {len(steps)} diverged, member {first} at step {steps[first]}"
        f, params = jax.tree.map(lambda a: a[first], (f, params))
        data = data if data_axis is None else jax.tree.map(lambda a: a[first], data)
    elif steps is None:
        return
    else:
        who = f"training diverged at step {steps}"
    largest = float(largest_eigenvalue(f, params, data.x))
    elements = sum(y.size for y in jax.tree.leaves(jax.eval_shape(f, params, data.x)))
    critical = 2 * elements / largest if largest > 0 else np.inf
    warnings.warn(
        f"{who}: its loss or its parameters are no longer finite. The history keeps what came "
        f"before. For gradient descent on the squared loss the critical learning rate at the "
        f"anchor is {critical:.3g} (power iteration on J J^T); train below it.",
        UserWarning,
        stacklevel=4,
    )


def _warn_of_rounding(f: ModelFunction, params: Params, own0: np.ndarray, history: History) -> None:
    """Warn where the weights moved by so little that rounding has eaten into the movement."""
    own0 = np.atleast_2d(own0)
    share = own0 / np.where(np.any(own0, -1), _norm(own0, -1), 1)[:, None]
    eps = _norm(share * [float(jnp.finfo(w.dtype).eps) for w in jax.tree.leaves(params)], -1)
    peak = np.max(np.nan_to_num(np.atleast_2d(history.weight_movement), posinf=np.inf), axis=1)
    limit = _ROUNDING * eps * np.sqrt(history.steps[-1])
    lost = (peak < limit) & (peak > 0)
    if not np.any(lost):
        return
    worst = np.argmin(np.where(lost, peak, np.inf))
    alpha = output_scale(f)
    point = ""
    if alpha is not None:
        # the movement of a lazy model is proportional to 1 / alpha
        reach = (np.broadcast_to(np.asarray(alpha, float), peak.shape) * peak / limit)[lost]
        point = f", which this model reaches at alpha = {np.min(reach):.1e}"
    cure = "float64: jax.config.update('jax_enable_x64', True), and make parameters and data anew"
    if eps[worst] > jnp.finfo(jnp.float32).eps * 2:
        cure = "float32: keep the parameters in it, and cast them to half precision inside f"
    warnings.warn(
        f"the weights moved by {peak[worst]:.1e} of their norm. Over {history.steps[-1]} steps "
        f"rounding (eps {eps[worst]:.1e}) takes over, at more than about 1 % of the outputs' "
        f"change, below a movement of {limit[worst]:.1e}{point}. Train in {cure}.",
        UserWarning,
        stacklevel=4,
    )


@contextlib.contextmanager
def _with_gradient(plan: loop.Plan, *arguments: Any) -> Iterator[None]:
    """Say of a chunk that cannot be traced that the model has no gradient, where it has none."""
    try:
        yield
    except Exception:
        try:
            jax.eval_shape(partial(loop.data_gradient, plan), *arguments)
        except Exception as error:
            raise ValueError(
                "`f` must have a derivative in reverse mode by its parameters, and has none; a "
                "while loop, and a fori_loop of a number of turns that is not known, have none. "
                "Use jax.lax.scan, or jax.lax.fori_loop with a known number of turns, or give f "
                f"a jax.custom_vjp. Reverse mode said: {error}"
            ) from error
        raise


def run(
    f: Partial,
    params: Params,
    data: Dataset,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    loss: Loss,
    key: jax.Array | None,
    batch_size: int | None,
    record: int | np.ndarray | None,
    chunk_steps: int | None,
    checkpoint: str | PathLike[str] | None,
    label: str | None,
    members: int | None = None,
    data_axis: int | None = None,
) -> History:
    n = checks.batch("data.x", jax.tree.map(lambda a: a[0], data.x) if data_axis == 0 else data.x)
    full = batch_size is None or batch_size >= n
    if not full and key is None:
        raise ValueError(
            f"`key` must be given for mini-batches of {batch_size} of {n} examples, got None. "
            "Use key=jax.random.key(0)."
        )
    grid = _grid(record, steps)
    leaves = jax.tree.leaves(params)
    plan, chunks = _plan(
        steps,
        max(1, sum(w.size for w in leaves)),
        chunk_steps,
        batch_size=None if full else batch_size,
        members=members,
        data_axis=data_axis,
    )
    edges = np.searchsorted(grid, plan.chunk * np.arange(chunks + 1))
    plan = plan._replace(capacity=int(np.max(np.diff(edges))))
    keys = None if full or key is None else key
    if keys is not None and members is not None:
        keys = jax.random.split(keys, members)
    # the model as it is now, and with it the loss and the optimiser
    now = as_it_is(f, loss, params, data, function=partial(loop.one_step, optimizer, plan))

    lead = () if members is None else (members,)
    state = loop.start(optimizer, members, params)
    curve = np.full(
        (*lead, steps + 1), np.nan
    )  # of the dtypes of the first chunk, once it is there
    movement = np.full((*lead, steps + 1, len(leaves)), np.nan)
    recorded = jax.tree.map(
        lambda w: np.zeros((*lead, len(grid), *w.shape[len(lead) :]), w.dtype), params
    )
    begin = 0

    def where(chunk: int) -> tuple[Any, ...]:
        local = grid[edges[chunk] : edges[chunk + 1]] - chunk * plan.chunk
        bounds = np.searchsorted(local, plan.block * np.arange(plan.blocks + 1))
        local = np.pad(local, (0, plan.capacity - len(local)))
        return np.int32(chunk * plan.chunk), bounds.astype(np.int32), local.astype(np.int32)

    recipe = ""
    if checkpoint is not None:
        with _with_gradient(plan, f, loss, params, data):
            recipe = "checkpoint of the training run " + _recipe(
                plan,
                partial(loop.run_chunk, optimizer, plan),
                (now, loss, params, data, keys, state, *where(0)),
            )
        if Path(checkpoint).exists():
            if what_is(checkpoint) != recipe:
                raise ValueError(
                    f"`checkpoint` must be of this very run, got {checkpoint}, of another model, "
                    "data, optimiser or setting. Name another file or delete this one."
                )
            like = (begin, state, curve, movement, recorded)
            begin, state, curve, movement, recorded = load_tree(checkpoint, like, about=recipe)

    report = _listener.get() or (lambda done, total, label: None)
    at = (slice(None),) * len(lead)
    for chunk in range(int(begin), chunks):
        rows = slice(chunk * plan.chunk, min((chunk + 1) * plan.chunk, steps + 1))
        points = slice(edges[chunk], edges[chunk + 1])
        if np.all(np.asarray(state.diverged_at) <= steps):  # nothing left to train
            rows, points = slice(rows.start, steps + 1), slice(points.start, len(grid))
            new = jax.tree.map(lambda w: np.asarray(w)[(*at, None)], state.last_finite)
            _put(recorded, new, (*at, points), (*at, slice(None)))
            report(steps, steps, label)
            break
        with _with_gradient(plan, f, loss, params, data):
            state, records = loop.run_chunk(
                optimizer, plan, now, loss, params, data, keys, state, *where(chunk)
            )
        if chunk == 0:
            curve = curve.astype(records.loss.dtype)
            movement = movement.astype(records.movement.dtype)
        wanted = slice(rows.stop - rows.start)
        curve[(*at, rows)] = np.asarray(records.loss)[(*at, wanted)]
        movement[(*at, rows)] = np.asarray(records.movement)[(*at, wanted)]
        _put(recorded, records.params, (*at, points), (*at, slice(points.stop - points.start)))
        if checkpoint is not None:
            save_tree(checkpoint, (chunk + 1, state, curve, movement, recorded), about=recipe)
        report(min((chunk + 1) * plan.chunk, steps), steps, label)

    own0 = _norms(plan, params)
    diverged_at = np.asarray(state.diverged_at)
    history = _history(plan, params, own0, grid, curve, movement, recorded, diverged_at)
    if not full:
        history = replace(history, data_loss=_data_losses(plan, now, loss, data, history))
    _warn_of_divergence(f, params, data, history, data_axis)
    _warn_of_rounding(f, params, own0, history)
    return history


def _put(kept: Params, new: Params, where: Any, which: Any) -> None:
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(new), strict=True):
        a[where] = np.asarray(b)[which]


def _data_losses(
    plan: loop.Plan, f: ModelFunction, loss: Loss, data: Dataset, history: History
) -> np.ndarray:
    """Compute the loss on all data on the grid, NaN where the run has diverged."""
    values = [loop.data_loss(plan, f, loss, history.at(i), data) for i in range(len(history.steps))]
    gone = np.isnan(history.loss[..., history.steps])
    return np.where(gone, np.nan, np.stack([np.asarray(v) for v in values], axis=-1))
