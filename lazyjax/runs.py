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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from lazyjax import checks, loop
from lazyjax.checkpoints import fingerprint, load_tree, save_tree, what_is
from lazyjax.equations import constants
from lazyjax.spectrum import largest_eigenvalue
from lazyjax.stages import Kept, Settings, empty, stages_of, to_the_end, with_chunk
from lazyjax.tangent import output_scale
from lazyjax.traces import as_it_is
from lazyjax.types import Dataset, History, Loss, ModelFunction, Params, PyTree, leaf_names

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


class Problem(NamedTuple):
    """What is trained; of an ensemble, members on axis 0."""

    f: Partial
    loss: Partial
    params: Params
    data: Dataset


def _norm(array: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Compute norms in float32 at least, free of scale; on the host, where nothing compiles."""
    array = np.abs(np.asarray(array, jnp.promote_types(array.dtype, jnp.float32)))
    largest = np.max(array, axis, keepdims=True, initial=0)
    largest = np.where((largest > 0) & np.isfinite(largest), largest, 1)
    root = np.sqrt(np.sum(np.square(array / largest), axis))
    return largest.reshape(root.shape) * root


def _norms(chunk: loop.Chunk, params0: Params) -> np.ndarray:
    """Give the norm of each leaf at w0, a column a leaf."""
    first = 0 if chunk.members is None else 1
    return np.stack(
        [_norm(np.asarray(w), tuple(range(first, np.ndim(w)))) for w in jax.tree.leaves(params0)],
        axis=-1,
    )


def _history(
    chunk: loop.Chunk,
    params0: Params,
    own0: np.ndarray,
    grid: np.ndarray,
    kept: Kept,
) -> History:
    """Turn movements into relative ones; blank the curves from the divergence on."""
    steps, diverged_at = kept.loss.shape[-1] - 1, np.asarray(kept.state.diverged_at)
    late = np.arange(steps + 1) >= diverged_at[..., None]
    loss = np.where(late, np.nan, kept.loss)
    movement = np.where(late[..., None], np.nan, kept.movement)
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
        params=kept.params,
        data_loss=loss[..., grid],
        diverged_at=diverged[0] if chunk.members is None else tuple(diverged),
    )


def _of_a_member(tree: PyTree, axis: int | None, member: int = 0) -> Any:
    """Give what belongs to one member, where members have an axis."""
    return tree if axis is None else jax.tree.map(lambda a: a[member], tree)


def _warn_of_divergence(problem: Problem, history: History, data_axis: int | None) -> None:
    f, _, params, data = problem
    steps = history.diverged_at
    if isinstance(steps, tuple):
        marked = [i for i, step in enumerate(steps) if step is not None]
        if not marked:
            return
        first = marked[0]
        who = f"members {marked} of {len(steps)} diverged, member {first} at step {steps[first]}"
        f, params = _of_a_member((f, params), 0, first)
        data = _of_a_member(data, data_axis, first)
    elif steps is None:
        return
    else:
        who = f"training diverged at step {steps}"
    largest = float(largest_eigenvalue(f, params, data.x))
    elements = sum(y.size for y in jax.tree.leaves(jax.eval_shape(f, params, data.x)))
    critical = elements / largest if largest > 0 else np.inf
    warnings.warn(
        f"{who}: its loss or its parameters are no longer finite. The history keeps what came "
        f"before. For gradient descent on the mean squared error the critical learning rate at the "
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
def _with_gradient(chunk: loop.Chunk, *arguments: Any) -> Iterator[None]:
    """Say of a chunk that cannot be traced that the model has no gradient, where it has none."""
    try:
        yield
    except Exception:
        try:
            jax.eval_shape(partial(loop.data_gradient, chunk), *arguments)
        except Exception as error:
            raise ValueError(
                "`f` must have a derivative in reverse mode by its parameters, and has none; a "
                "while loop, and a fori_loop of a number of turns that is not known, have none. "
                "Use jax.lax.scan, or jax.lax.fori_loop with a known number of turns, or give f "
                f"a jax.custom_vjp. Reverse mode said: {error}"
            ) from error
        raise


class _Checkpoint(NamedTuple):
    """A file that holds what a run has so far."""

    path: Path
    recipe: str  # that tells this run from any other: its compiled step, and every number in it

    def load(self, like: Kept) -> Kept:
        """Give what the file has, or what there is without it."""
        if not self.path.exists():
            return like
        if what_is(self.path) != self.recipe:
            raise ValueError(
                f"`checkpoint` must be of this very run, got {self.path}, of another model, "
                "data, optimiser or setting. Name another file or delete this one."
            )
        kept = load_tree(self.path, like, about=self.recipe)
        return kept._replace(done=int(kept.done))

    def save(self, kept: Kept) -> None:
        save_tree(self.path, kept, about=self.recipe)


def _checkpoint(
    path: str | PathLike[str], problem: Problem, chunk: loop.Chunk, step: Any, *arguments: Any
) -> _Checkpoint:
    with _with_gradient(chunk, *problem):
        jaxpr = jax.make_jaxpr(step)(*arguments)
    text = re.sub(r"0x[0-9a-f]+", "", str(jaxpr))  # addresses differ from process to process
    recipe = fingerprint(f"{chunk} {text}", constants(jaxpr), arguments)
    return _Checkpoint(Path(path), "checkpoint of the training run " + recipe)


def run(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    key: jax.Array | None,
    settings: Settings,
) -> History:
    """Train, chunk by chunk; go on from the checkpoint if there is one."""
    f, loss, params, data = problem
    n = checks.batch("data.x", _of_a_member(data.x, settings.data_axis))
    if settings.batch_size is None or settings.batch_size >= n:
        settings, key = settings._replace(batch_size=None), None
    elif key is None:
        raise ValueError(
            f"`key` must be given for mini-batches of {settings.batch_size} of {n} examples, got "
            "None. Use key=jax.random.key(0)."
        )
    elif settings.members is not None:
        key = jax.random.split(key, settings.members)
    stages = stages_of(params, settings)
    chunk = stages.chunk
    # the model as it is now, and with it the loss and the optimiser
    now = as_it_is(f, loss, params, data, function=partial(loop.one_step, optimizer, chunk))
    step, given = partial(loop.run_chunk, optimizer, chunk), (now, loss, params, data, key)
    kept, file = empty(stages, params, loop.start(optimizer, settings.members, params)), None
    if settings.checkpoint is not None:
        first = (*given, kept.state, *stages.where(0))
        file = _checkpoint(settings.checkpoint, problem, chunk, step, *first)
        kept = file.load(kept)

    report = _listener.get() or (lambda done, total, label: None)
    while kept.done < stages.chunks:
        if np.all(np.asarray(kept.state.diverged_at) <= settings.steps):  # nothing left to train
            kept = to_the_end(kept, stages)
        else:
            with _with_gradient(chunk, *problem):
                state, records = step(*given, kept.state, *stages.where(kept.done))
            kept = with_chunk(kept, stages, state, records)
            if file is not None:
                file.save(kept)
        report(min(kept.done * chunk.steps, settings.steps), settings.steps, settings.label)

    own0 = _norms(chunk, params)
    history = _history(chunk, params, own0, stages.grid, kept)
    if settings.batch_size is not None:
        history = replace(history, data_loss=_data_losses(chunk, now, loss, data, history))
    _warn_of_divergence(problem, history, settings.data_axis)
    _warn_of_rounding(f, params, own0, history)
    return history


def _data_losses(
    chunk: loop.Chunk, f: ModelFunction, loss: Loss, data: Dataset, history: History
) -> np.ndarray:
    """Compute the loss on all data on the grid, NaN where the run has diverged."""
    values = [
        loop.data_loss(chunk, f, loss, history.at(i), data) for i in range(len(history.steps))
    ]
    gone = np.isnan(history.loss[..., history.steps])
    return np.where(gone, np.nan, np.stack([np.asarray(v) for v in values], axis=-1))
