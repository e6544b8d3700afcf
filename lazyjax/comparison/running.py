"""Networks and their tangent models, trained alike and measured alike: one, or an ensemble."""

import math
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from lazyjax import checks
from lazyjax.comparison.classes import classes_of
from lazyjax.comparison.measuring import measured
from lazyjax.comparison.members import Member, some_of
from lazyjax.comparison.optimizers import heavy_ball
from lazyjax.comparison.records import Comparison, join
from lazyjax.comparison.sizes import amounts
from lazyjax.comparison.words import settings_in_words, why_none
from lazyjax.equations import epsilon
from lazyjax.kernels import check, only_output, same_examples, within_budget
from lazyjax.memory import bytes_of
from lazyjax.tangent import center, linearize, scale
from lazyjax.traces import one_example
from lazyjax.training import (
    as_dataset,
    as_loss,
    check_member,
    scale_loss,
    train,
    train_ensemble,
)
from lazyjax.types import Dataset, History, Loss, ModelFunction, Params, PyTree


def compare(
    f: ModelFunction,
    params: Params,
    data: Dataset,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    test: Dataset | PyTree | None = None,
    loss: Loss = optax.losses.squared_error,
    key: jax.Array | None = None,
    batch_size: int | None = None,
    anchor: Params | None = None,
    alpha: ArrayLike | Sequence[float] | None = None,
    memory: int | float | str = "2GiB",
    checkpoint: str | PathLike[str] | None = None,
) -> Comparison:
    """Compare a network with its tangent model: both trained alike, and measured alike.

    Parameters
    ----------
    f : ModelFunction
        With one output array (N, *out).
    params : pytree of floats
        Where training starts.
    data : Dataset
        x (N, ...) and y, what the loss takes.
    optimizer, steps, loss, key, batch_size
        As in `train`. Network and tangent model have the same mini-batches.
    test : Dataset, or array (M, ...) or pytree, optional
        Points beside those of the data on which the two are compared, with targets or without.
    anchor : pytree, optional
        Where the tangent model expands, `params` by default.
    alpha : float, or (E,) of them, optional
        Train alpha (f - f(params)), the loss divided by alpha^2; several are the members.
    memory : str or number of bytes
        A budget for what is measured and recorded (not for training): beyond it, and where it would
        cost more than its share of training, kernels are of a random sample of the examples, and
        the closed form is computed without forming the kernel.
    checkpoint : path, optional
        A folder, made if it is missing, where both trainings keep what they have: the same call
        goes on from it.

    Returns
    -------
    Comparison
        With one member, or one for each alpha. `lazyjax.verdicts` says of each whether it was lazy.

    Raises
    ------
    TypeError, ValueError
        As `train` and `ntk`; ValueError also if `anchor` is no tree like `params`, `test` holds
        other examples than `data.x`, `alpha` is not positive, or `memory` is no amount.

    Notes
    -----
    Beside the two trainings it takes the outputs of both on training and test points at about a
    hundred steps, and at sixteen the kernel of the mean of the outputs and the sharpness. What
    takes more than a twentieth of the operations of training, and more than a second, is done at
    fewer steps and on fewer examples, drawn once (`examples`, `kernel_examples`). The closed form
    is added where it is known: for the squared error on the full batch under gradient descent with
    one rate and a heavy ball, however the optimiser was put together.

    References
    ----------
    Chizat, Oyallon, Bach 2019, "On lazy training in differentiable programming".

    Examples
    --------
    >>> import optax
    >>> from lazyjax.comparison import verdicts
    >>> data = Dataset(jnp.eye(3), jnp.ones((3, 1)))
    >>> f = lambda w, x: x @ w
    >>> compared = compare(f, jnp.zeros((3, 1)), data, optax.sgd(0.1), steps=50)
    >>> verdicts(compared)[0].word  # a linear model is its tangent model
    'lazy'
    """
    data, loss = as_dataset(data), as_loss(loss)
    plan = _Plan(optimizer, steps, batch_size, key, memory, checkpoint)
    if alpha is None:
        return _compared(plan, _Models(f, params, loss, anchor), data, test)
    if not np.issubdtype(np.asarray(alpha).dtype, np.number):
        raise TypeError(
            f"`alpha` must be a number or a list of them, got {alpha!r}. Use (1.0, 10.0, 100.0)."
        )
    if np.ndim(alpha) > 1 or np.size(alpha) == 0:
        raise ValueError(
            f"`alpha` must be a number or a list of them, got shape {np.shape(alpha)}. Use "
            "(1.0, 10.0, 100.0)."
        )
    checks.positive("alpha", alpha)
    checks.floating("params", params)
    if anchor is not None:
        checks.same_tree("anchor", anchor, params, "params")
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    alphas = np.atleast_1d(np.asarray(alpha, dtype))
    models = _scaled(_Models(checks.model_function(f), params, loss, anchor), alphas)
    several = np.ndim(alpha) == 1
    if not several:
        models = _member(models, 0)
    return _compared(plan, models, data, test, several=several, alphas=alphas)


def compare_ensemble(
    f: ModelFunction,
    params: Params,
    data: Dataset,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    test: Dataset | PyTree | None = None,
    loss: Loss = optax.losses.squared_error,
    key: jax.Array | None = None,
    batch_size: int | None = None,
    anchor: Params | None = None,
    memory: int | float | str = "2GiB",
    checkpoint: str | PathLike[str] | None = None,
) -> Comparison:
    """Compare many networks with their tangent models: seeds, anchors, models of one structure.

    Parameters
    ----------
    f : ModelFunction
        With one output array; one for all, or made under `jax.vmap`, one a member: every array that
        it holds has the members on axis 0.
    params : pytree of (E, ...)
        Where training starts.
    data : Dataset
        x (N, ...) and y, the same for all members.
    anchor : pytree of (E, ...), optional
        Where the tangent models expand, `params` by default.
    loss : callable
        As in `train`; every array that it holds has the members on axis 0.
    optimizer, steps, test, key, batch_size, memory, checkpoint
        As in `compare`. Each member draws its own mini-batches.

    Returns
    -------
    Comparison
        With E members.

    Raises
    ------
    TypeError, ValueError
        As `compare`; ValueError also if leaves differ in the number of members.

    Examples
    --------
    >>> data = Dataset(jnp.eye(3), jnp.ones((3, 1)))
    >>> w = jnp.zeros((2, 3, 1))
    >>> compare_ensemble(lambda w, x: x @ w, w, data, optax.sgd(0.1), steps=5).members
    2
    """
    data, loss = as_dataset(data), as_loss(loss)
    plan = _Plan(optimizer, steps, batch_size, key, memory, checkpoint)
    models = _Models(f, params, loss, anchor)
    return _compared(plan, models, data, test, several=True)


class _Plan(NamedTuple):
    """How it is trained, and within what it is measured."""

    optimizer: optax.GradientTransformation
    steps: int
    batch_size: int | None
    key: jax.Array | None
    memory: int | float | str
    checkpoint: str | PathLike[str] | None


class _Models(NamedTuple):
    """What is trained; of several, members on axis 0 of every array."""

    f: Any
    start: Params
    loss: Partial
    anchor: Params | None


def _member(tree: PyTree, index: int) -> Any:
    return jax.tree.map(lambda a: a[index], tree)


@jax.jit
def _scaled(models: _Models, alphas: jax.Array) -> _Models:
    """Give alpha (f - f(w0)) and the loss / alpha^2 for each alpha."""
    f, start, loss, anchor = models

    def one(alpha: jax.Array) -> _Models:
        return _Models(scale(center(f, start), alpha), start, scale_loss(loss, alpha), anchor)

    # under vmap weights that are the same for all alphas come out once an alpha
    return jax.vmap(one)(alphas)


def _checked(plan: _Plan, models: _Models, data: Dataset, test: Any) -> Dataset | None:
    """Check what training does not check itself; give the test points."""
    if not (hasattr(plan.optimizer, "init") and hasattr(plan.optimizer, "update")):
        raise TypeError(
            f"`optimizer` must be one of Optax, got {type(plan.optimizer).__name__}. "
            "Use optax.sgd(0.1)."
        )
    checks.whole("steps", plan.steps, least=1)
    if plan.batch_size is not None:
        checks.whole("batch_size", plan.batch_size, least=1)
    bytes_of(plan.memory)
    checks.known("params", tuple(models), "compare")
    checks.known("data", tuple(data), "compare")
    checks.floating("params", models.start)
    checks.batch("data.x", data.x)
    if models.anchor is not None:
        checks.same_tree("anchor", models.anchor, models.start, "params")
        checks.floating("anchor", models.anchor)
        checks.finite("anchor", models.anchor)
    if test is None:
        return None
    test = test if isinstance(test, Dataset) else Dataset(test, None)
    m = checks.batch("test", test.x)
    same_examples(data.x, test.x, ("data.x", "test"))
    checks.finite("test", test)
    if test.y is not None:
        same_examples(data.y, test.y, ("data.y", "test.y"))
        if checks.batch("test.y", test.y) != m:
            raise ValueError(
                f"`test` must have one target for each of its {m} examples, got "
                f"{checks.batch('test.y', test.y)}. Use Dataset(x, y) of one batch, or x alone."
            )
    return test


def _compared(
    plan: _Plan,
    models: _Models,
    data: Dataset,
    test: Any,
    *,
    several: bool = False,
    alphas: np.ndarray | None = None,
) -> Comparison:
    """Train both and measure them."""
    test = _checked(plan, models, data, test)
    f, loss = checks.model_function(models.f), models.loss
    start = jax.tree.map(jnp.asarray, models.start)
    anchor = start if models.anchor is None else jax.tree.map(jnp.asarray, models.anchor)
    data = Dataset(*jax.tree.map(jnp.asarray, tuple(data)))
    members = checks.batch("params", start) if several else 1

    def member(tree: PyTree, index: int) -> Any:
        return _member(tree, index) if several else tree

    if several and jax.tree.leaves(f):
        held = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(f)}
        if held != {(members,)}:
            raise ValueError(
                f"`f` must hold arrays with the {members} members on axis 0, got shapes "
                f"{[np.shape(leaf) for leaf in jax.tree.leaves(f)]}. Make it under jax.vmap."
            )
    f_first, start_first = member(f, 0), member(start, 0)
    request = check(f_first, start_first, data.x, reduce="trace")
    out, _ = only_output(request, "a comparison")
    check_member(f_first, member(loss, 0), start_first, data)
    tests = 0 if test is None else checks.batch("test", test.x)
    how_much = amounts(
        request,
        tests,
        steps=plan.steps,
        batch_size=plan.batch_size,
        memory=plan.memory,
        members=members,
    )
    few = some_of(data, how_much.kernel_examples).x
    of_kernel = request.of(jax.tree.map(jnp.asarray, few))
    if how_much.tight:
        of_kernel = within_budget(of_kernel, how_much.memory)
    rounding = epsilon(jax.make_jaxpr(request.f)(start_first, one_example(data.x)).jaxpr)
    full = plan.batch_size is None or plan.batch_size >= request.n1
    ball = heavy_ball(plan.optimizer, start_first, plan.steps)
    files: dict[str, Path | None] = dict.fromkeys(("network", "tangent model"))
    if plan.checkpoint is not None:
        folder = Path(plan.checkpoint)
        folder.mkdir(parents=True, exist_ok=True)
        files = {name: folder / f"{name.replace(' ', '_')}.npz" for name in files}

    def trained(model: Partial, label: str) -> History:
        return (train_ensemble if several else train)(
            model,
            start,
            data,
            plan.optimizer,
            steps=plan.steps,
            loss=loss,
            batch_size=plan.batch_size,
            key=None if plan.key is None else jax.random.clone(plan.key),  # the same mini-batches
            record=how_much.points,
            checkpoint=files[label],
            label=label,
        )

    tangent = (jax.vmap(linearize) if several else linearize)(f, anchor)
    models_by_name = {"network": f, "tangent model": tangent}
    histories = {name: trained(model, name) for name, model in models_by_name.items()}

    settings = settings_in_words(
        start_first, loss, ball, plan.steps, plan.batch_size, plan.memory
    ) | {
        "examples": f"{request.n1:,}",
        "test examples": f"{tests:,}" if tests else "none",
        "outputs": f"{math.prod(out):,}",
    }
    compared = []
    for i in range(members):
        own_f, own_tangent, own_start, own_anchor, own_loss = member(
            (f, tangent, start, anchor, loss), i
        )
        # the model as it is now, as the request has it
        now = jax.tree.unflatten(jax.tree.structure(request.f), jax.tree.leaves(own_f))
        one = Member(
            f=now,
            tangent=own_tangent,
            start=own_start,
            anchor=own_anchor,
            loss=own_loss,
            data=data,
            test=test,
            mini_batches=not full,
            ball=ball,
            no_closed_form=why_none(loss, full, ball),
            classes=classes_of(loss, data.y, out),
            alpha=1.0 if alphas is None else float(alphas[i]),
            epsilon=rounding,
            settings=settings,
        )
        network, other = (h.member(i) if several else h for h in histories.values())
        asked = replace(of_kernel, f=now, params=own_start)
        compared.append(measured(one, network, other, how_much, asked))
    return replace(join(compared) if several else compared[0], histories=histories)
