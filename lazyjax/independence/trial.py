"""Whether a model treats each example alone, as the kernel takes it to.

The jaxprs tell most models that do at the cost of two traces. One that is suspect is put to a trial
by numbers: how an example's outputs change with the parameters, which is what the kernel is made
of, must not depend on the other examples, on its position in the batch, or on the size of the
batch. Values that are not known (under `jit`, `vmap` and `grad`) are made up for it.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import eval_jaxpr
from jax.tree_util import Partial

from lazyjax import checks
from lazyjax.equations import Jaxpr, epsilon, equations
from lazyjax.independence.suspects import Suspect, suspects
from lazyjax.types import ModelFunction, Params, PyTree

_ALONE = "pass the whole batch as one example: ntk(lambda p, x: f(p, x[0])[None], params, x[None])."
FAULTS = {
    "others": "`f` must treat each example alone, but the examples of a batch see each other{}. "
    "Put batch normalisation into evaluation mode, use_running_average=True, or module.eval() for "
    f"NNX, or {_ALONE}",
    "random": "`f` must be deterministic, but its random numbers differ between the examples of a "
    "batch{}. Turn dropout off: deterministic=True, or module.eval() for NNX.",
    "shape": "`f` must give every example outputs of one shape, (N, *out) for N of them{}. Return "
    f"a row an example, or {_ALONE}",
    "position": "`f` must treat each example alone, but its outputs change with the position of an "
    f"example in the batch{{}}. Make them equal, or {_ALONE}",
    "size": "`f` must treat each example alone, but its outputs change with the size of the "
    f"batch{{}}. Divide by it outside of f, or {_ALONE}",
}
"""What can be wrong with a model, and the cure."""

Row = tuple[np.ndarray, ...]
"""What each output leaf gives for one example."""

_NEAR = 0.03  # of a change: examples that see each other differ by as much as they change
_LIMIT = 256
_passed: dict[Any, None] = {}  # models without fault, the latest of them


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jax.typeof(leaf).dtype, jax.dtypes.prng_key)


# --- the values that a model is tried on


def _made_up(leaf: Any, rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Any:
    if _is_key(leaf):
        return jax.random.split(jax.random.key(0, impl=jax.random.key_impl(leaf)), shape)
    value = scale * rng.standard_normal(shape) if _is_float(leaf) else rng.integers(0, 2, shape)
    return np.asarray(value, jax.typeof(leaf).dtype)


def _scale(shape: tuple[int, ...]) -> float:
    return max(1, math.prod(shape[:-1])) ** -0.5


def _weight(leaf: Any, rng: np.random.Generator) -> Any:
    """Give a leaf of f or params; where it is not known, normal, or positive if it is no matrix."""
    if checks.is_known(leaf):
        return leaf if _is_key(leaf) else np.asarray(leaf, jax.typeof(leaf).dtype)
    shape = jax.typeof(leaf).shape
    value = _made_up(leaf, rng, shape, _scale(shape))
    return 0.5 + np.abs(value) if len(shape) < 2 and _is_float(leaf) else value


def _step(leaf: Any, rng: np.random.Generator) -> Any:
    """Give a change of a weight that shrinks it, so that what converges goes on to converge.

    One that is zero is changed too: what stands before it would not show.
    """
    if not _is_float(leaf):
        return np.zeros((), bool)
    if not np.any(leaf):
        return _made_up(leaf, rng, leaf.shape, 0.3 * _scale(leaf.shape))
    return (-leaf * rng.uniform(0.1, 0.4, leaf.shape)).astype(leaf.dtype)


def _pair(x: list[Any], rng: np.random.Generator) -> list[Any]:
    """Give two examples, in a batch; the second is made up where it would be the first again."""
    both = []
    for leaf in x:
        if checks.is_known(leaf):
            rows = leaf[:2] if _is_key(leaf) else np.asarray(leaf[:2])
            both.append(rows[np.array([0, -1])])
        else:
            both.append(_made_up(leaf, rng, (2, *jax.typeof(leaf).shape[1:]), 1.0))
    if all(_is_key(leaf) or np.array_equal(leaf[0], leaf[1]) for leaf in both):
        for leaf in filter(_is_float, both):
            leaf[1] = 0.7 * leaf[0] + 0.1
    return both


# --- the trial


def _norm(values: np.ndarray) -> float:
    return float(np.linalg.norm(values[np.isfinite(values)]))


def _less(high: list[np.ndarray], low: list[np.ndarray]) -> list[np.ndarray]:
    with np.errstate(invalid="ignore"):
        return [np.nan_to_num(a - b, posinf=0, neginf=0) for a, b in zip(high, low, strict=True)]


def _far(these: Row, those: Row, near: float, floors: list[float]) -> bool:
    """Tell whether an output of one row is not near that of another, relative to both."""
    outputs = zip(these, those, floors, strict=True)
    return any(_norm(a - b) > near * max(_norm(a), _norm(b)) + floor for a, b, floor in outputs)


def _runner(model: Jaxpr, constants: list[Any]) -> Callable[..., list[np.ndarray]]:
    """Give the model as a function of all leaves, to (batch, numbers) of each output."""

    @jax.jit
    def run(constants: list[Any], leaves: list[Any]) -> list[jax.Array]:
        return eval_jaxpr(model.jaxpr, constants, *leaves)

    def outputs(leaves: list[Any]) -> list[np.ndarray]:
        fresh = [
            [jax.random.clone(v) if _is_key(v) else v for v in part] for part in (constants, leaves)
        ]
        return [np.asarray(y).astype(np.float64).reshape(len(y), -1) for y in run(*fresh)]

    return outputs


def _trial(two: Jaxpr, three: Jaxpr, f: Any, params: Any, x: PyTree) -> str | None:
    """Give the fault of a model on examples a and b, or None.

    In batches of equal size rounding is equal too, and the tolerance is for iterations that stop
    by the whole batch. Between positions and between sizes rounding differs, and may have grown.
    """
    rng = np.random.default_rng(0)
    made = {id(c): _weight(c, rng) for c in (*two.consts, *three.consts)}
    models = {n: _runner(m, [made[id(c)] for c in m.consts]) for n, m in ((2, two), (3, three))}
    fixed, w = ([_weight(leaf, rng) for leaf in jax.tree.leaves(tree)] for tree in (f, params))
    steps = [_step(leaf, rng) for leaf in w]
    pair = _pair(jax.tree.leaves(x), rng)

    def outputs(t: float, *rows: int) -> list[np.ndarray]:
        moved = [
            leaf + np.asarray(t * step, leaf.dtype) if _is_float(leaf) else leaf
            for leaf, step in zip(w, steps, strict=True)
        ]
        return models[len(rows)]([*fixed, *moved, *(leaf[np.array(rows)] for leaf in pair)])

    def change(*rows: int) -> list[Row]:
        return list(zip(*_less(outputs(1, *rows), outputs(0, *rows)), strict=True))

    a, b = 0, 1
    ab, aa, bb = change(a, b), change(a, a), change(b, b)
    ys, eps = outputs(1, a, b), epsilon(two.jaxpr)
    floors = [8 * eps * _norm(y) for y in ys]
    if _far(ab[a], aa[a], _NEAR, floors) or _far(ab[b], bb[b], _NEAR, floors):
        return "others"
    noises = _less(outputs(1 + 4 * eps, a, b), ys)
    floors = [eps**0.5 * _norm(y) + 4 * _norm(v) for y, v in zip(ys, noises, strict=True)]
    if _far(aa[0], aa[1], _NEAR, floors) or _far(bb[0], bb[1], _NEAR, floors):
        return "position"
    aba = change(a, b, a)
    return "size" if any(_far(ab[i], aba[i], _NEAR, floors) for i in (a, b)) else None


def _trace(f: Partial, params: Params, x: PyTree, n: int) -> Jaxpr:
    def batch(leaf: Any) -> jax.ShapeDtypeStruct:
        one = jax.typeof(leaf)
        return jax.ShapeDtypeStruct((n, *one.shape[1:]), one.dtype)

    with jax.default_matmul_precision("highest"):
        return jax.make_jaxpr(lambda f, p, x: f(p, x))(f, params, jax.tree.map(batch, x))


def _misshapen(two: Jaxpr, three: Jaxpr) -> str | None:
    """Tell of outputs that lack the batch, or grow along another axis with the examples."""
    shapes = [[y.shape for y in model.out_avals] for model in (two, three)]
    for of_two, of_three in zip(*shapes, strict=True):
        if (of_two[:1], of_three[:1]) != ((2,), (3,)) or of_two[1:] != of_three[1:]:
            return f", but gave {of_two} for two and {of_three} for three"
    return None


def _can_run(two: Jaxpr, known: bool) -> bool:
    """Tell whether a model ends, without work for the host."""
    names = {equation.primitive.name for equation in equations(two.jaxpr)}
    return not names & ({"pure_callback", "io_callback"} | (set() if known else {"while"}))


def _message(fault: str, suspected: list[Suspect]) -> str:
    if fault == "position" and any(suspect.fault == "random" for suspect in suspected):
        fault = "random"
    named = sorted(suspected, key=lambda suspect: (suspect.fault != fault, suspect.moves))
    return FAULTS[fault].format(f": {named[0].what}" if named else "")


def check_examples(f: ModelFunction, params: Params, x: PyTree) -> None:
    """Require that a model treats each example of a batch alone.

    Parameters
    ----------
    f : ModelFunction
        `f(params, x) -> y (N, *out)`.
    params : pytree
    x : array (N, ...) or pytree, batch on axis 0 of every leaf
        Two examples are looked at.

    Raises
    ------
    ValueError
        If the outputs of an example depend on the others (batch normalisation in training mode), on
        its position (dropout that is on) or on the size of the batch; if their shape does, as that
        of a similarity of all pairs.

    Notes
    -----
    The model is traced on two and on three examples, and compiled for both only if the jaxprs are
    suspect. One that passed is remembered by its function and its shapes. Let through without a
    trial is what cannot be traced or run on such batches, what calls back to Python, and, where
    values are made up, what has a `while`, which need not end on them.
    """
    f = checks.model_function(f)
    known = checks.is_known((f, params, x))
    examples = [jax.typeof(leaf) for leaf in jax.tree.leaves(x)]
    key = (
        known,
        jax.tree.structure((f, params, x)),
        *(jax.typeof(leaf) for leaf in jax.tree.leaves((f, params))),
        *((one.shape[1:], one.dtype) for one in examples),
    )
    if key in _passed:
        return
    try:
        two, three = (_trace(f, params, x, n) for n in (2, 3))
    except Exception:  # the model's own: some take one size of batch only
        return
    if wrong := _misshapen(two, three):
        if checks.batch("x", x) == 1:  # it is the whole batch
            return
        raise ValueError(FAULTS["shape"].format(wrong))
    suspected, fault = suspects(two, three, len(examples)), None
    hidden, same = ({id(c) for c in m.consts if not checks.is_known(c)} for m in (two, three))
    if suspected != [] and hidden == same and _can_run(two, known and not hidden):
        try:
            with jax.ensure_compile_time_eval():
                fault = _trial(two, three, f, params, x)
        except Exception:  # the model's own again; of jax_debug_nans
            fault = None
    if fault:
        raise ValueError(_message(fault, suspected or []))
    if not hidden:
        _passed[key] = None
        if len(_passed) > _LIMIT:
            del _passed[next(iter(_passed))]
