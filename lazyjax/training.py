"""Training: any Optax optimiser and loss, one run or an ensemble of them."""

from functools import partial
from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from lazyjax import checks, loop
from lazyjax.data import check_dataset
from lazyjax.equations import Jaxpr, inner_jaxprs
from lazyjax.meshes import in_any_program
from lazyjax.runs import Problem, progress, run
from lazyjax.stages import Settings, log_grid
from lazyjax.types import Dataset, History, Loss, ModelFunction, Params, PyTree
from lazyjax.widening import widened

__all__ = ["log_grid", "progress", "scale_loss", "train", "train_ensemble"]


def _over_alpha_squared(loss: Loss, alpha: ArrayLike, prediction: PyTree, y: PyTree) -> jax.Array:
    value = widened(loss(prediction, y))
    alpha = jnp.asarray(alpha, value.dtype)
    return value / alpha / alpha  # alpha^2 may be out of range where the quotient is not


def scale_loss(loss: Loss, alpha: ArrayLike) -> Partial:
    """Divide a loss by alpha^2, the companion of `lazyjax.tangent.scale`.

    Parameters
    ----------
    loss : callable
        `loss(prediction, y)`, an Optax loss.
    alpha : float, or (E,) array
        The output scale, above 0; one a member for an ensemble.

    Returns
    -------
    jax.tree_util.Partial
        A loss; alpha is its leaf.

    Raises
    ------
    ValueError
        If `alpha` is not positive and finite.

    References
    ----------
    Chizat, Oyallon, Bach 2019, equation 2.
    """
    checks.positive("alpha", alpha)
    return Partial(_over_alpha_squared, as_loss(loss), alpha)


def innermost(loss: Loss) -> Loss:
    while isinstance(loss, Partial):
        loss = loss.args[0] if loss.func is _over_alpha_squared else loss.func
    return loss


def scale_of_loss(loss: Loss) -> Any:
    """Give alpha of a loss made by `scale_loss`, their product where that was done again; or 1."""
    alpha: Any = 1.0
    while isinstance(loss, Partial) and loss.func is _over_alpha_squared:
        loss, own = loss.args
        alpha = alpha * own
    return alpha


def factor_of_squares(loss: Loss) -> float | None:
    """Tell how often a loss holds the squared error: 1, 1/2, or None where it is another."""
    inner = innermost(loss)
    if inner is optax.losses.squared_error:
        return 1.0
    return 0.5 if inner is optax.losses.l2_loss else None


def _with_examples(m: int, n: int, tree: PyTree) -> Any:
    """Give the shapes of a tree with m examples in place of n."""

    def shape(a: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((m, *a.shape[1:]) if a.shape[:1] == (n,) else a.shape, a.dtype)

    return jax.tree.map(shape, tree)


def _holds_pairs(jaxpr: Jaxpr, m: int) -> bool:
    """Tell whether a jaxpr computes an array that has two axes of length m."""
    for equation in jaxpr.eqns:
        if any(getattr(v.aval, "shape", ()).count(m) > 1 for v in equation.outvars):
            return True
        if any(_holds_pairs(j, m) for j in inner_jaxprs(equation)):
            return True
    return False


def _broadcasts(loss: Loss, prediction: PyTree, y: PyTree) -> bool:
    """Tell whether a loss broadcasts arrays of different rank against each other."""
    try:
        with jax.numpy_rank_promotion("raise"):
            jax.eval_shape(loss, prediction, y)
    except Exception:
        return True
    return False


def _pairs_all(f: ModelFunction, loss: Loss, params: Params, data: Dataset, out: Any) -> bool:
    """Tell whether a loss broadcasts the labels of all examples against the predictions of all.

    The number of examples shows itself when it changes, to two sizes that no axis has: then the
    value of the loss must grow with it or not at all. A loss that takes a mean does not tell; it is
    one of pairs if it computes an array of pairs and broadcasts arrays of different rank.
    """
    n = checks.batch("data.x", data.x)
    taken = {size for leaf in jax.tree.leaves((data, out)) for size in leaf.shape}
    sizes = sorted(set(range(11, 13 + len(taken))) - taken)[:2]
    values, pairs = [], []
    for m in sizes:
        x, y = _with_examples(m, n, data)
        try:
            prediction = jax.eval_shape(f, params, x)
        except Exception:  # a model of n examples only
            prediction = _with_examples(m, n, out)
        try:
            jaxpr, value = jax.make_jaxpr(loss, return_shape=True)(prediction, y)
        except Exception:  # a loss of n examples only, or an axis that is n by chance
            inner = {size for leaf in jax.tree.leaves((out, data.y)) for size in leaf.shape[1:]}
            return bool(inner & {1, n}) and _broadcasts(loss, out, data.y)
        values.append(value.size)
        pairs.append(_holds_pairs(jaxpr.jaxpr, m))
    grows = values[0] * sizes[1] == values[1] * sizes[0] or values[0] == values[1]
    return not grows or (all(pairs) and _broadcasts(loss, out, data.y))


def _check_labels(f: ModelFunction, loss: Loss, params: Params, data: Dataset) -> None:
    """Refuse labels that the loss broadcasts against the predictions over the batch."""
    out = checks.outputs(f, params, data.x)
    shapes, wanted = ([a.shape for a in jax.tree.leaves(tree)] for tree in (data.y, out))
    here = f"{', '.join(map(str, shapes))} for predictions of shape {', '.join(map(str, wanted))}"
    with jax.numpy_rank_promotion("allow"):
        try:
            jax.eval_shape(loss, out, data.y)
        except Exception as error:
            raise ValueError(
                f"`data.y` must be labels that `loss` takes, got shape {here}, and "
                f"loss(f(params, x), y) failed. Pass labels as the loss wants them. "
                f"It said: {error}"
            ) from error
        fits = shapes == wanted and jax.tree.structure(data.y) == jax.tree.structure(out)
        if fits or not _pairs_all(f, loss, params, data, out):
            return
    cure = "Pass one label for each prediction."
    if wanted == [(*shape, 1) for shape in shapes]:
        cure = "Use y[:, None]." if len(wanted[0]) == 2 else "Use y[..., None]."
    elif shapes == [(*shape, 1) for shape in wanted]:
        cure = "Use y[..., 0]."
    raise ValueError(
        f"`data.y` must be labels that `loss` takes example by example, got shape {here}: it "
        f"broadcasts every label against every prediction. {cure}"
    )


_OF_FLOATS = (
    optax.losses.squared_error,
    optax.losses.l2_loss,
    optax.losses.huber_loss,
    optax.losses.log_cosh,
    optax.losses.sigmoid_binary_cross_entropy,
    optax.losses.sigmoid_focal_loss,
    optax.losses.hinge_loss,
)
"""Losses of Optax, element by element: targets that are floats have the shape of the outputs."""


def check_member(f: ModelFunction, loss: Loss, params: Params, data: Dataset) -> None:
    """Check what one member is trained on; shapes only, so under `jax.vmap` too."""
    inner = innermost(loss)
    if factor_of_squares(loss) is not None:
        checks.floating("data.y", data.y)
    floats = all(jnp.issubdtype(y.dtype, jnp.floating) for y in jax.tree.leaves(data.y))
    if floats and inner in _OF_FLOATS:
        checks.targets(f, params, data.x, data.y)
    else:
        _check_labels(f, loss, params, data)
    value = jax.eval_shape(partial(loop.objective, f, loss), params, data)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"`loss` must give floats, got {value.dtype}. Pass a loss(prediction, y) of Optax."
        )


def as_dataset(data: Any) -> Dataset:
    """Require a pair of x and y."""
    if not isinstance(data, tuple) or len(data) != 2:
        raise TypeError(
            f"`data` must be Dataset(x, y), got {type(data).__name__}. Use Dataset(x, y)."
        )
    return Dataset(*data)


def as_loss(loss: Loss) -> Partial:
    """Require a function; give it as a pytree, whose arrays travel as arguments of `jit`."""
    if not callable(loss):
        raise TypeError(
            f"`loss` must be callable, got {type(loss).__name__}. "
            "Pass a loss(prediction, y) of Optax."
        )
    return loss if isinstance(loss, Partial) else Partial(loss)


def _prepare(
    f: ModelFunction, params: Params, data: Dataset, loss: Loss, settings: Settings
) -> Problem:
    """Check what does not depend on the members, and make arrays of what came."""
    checks.whole("steps", settings.steps, least=1)
    for name in ("batch_size", "chunk_steps"):
        size = getattr(settings, name)
        if size is not None:
            checks.whole(name, size, least=1)
    if settings.steps >= 2**31 - 2**20:
        raise ValueError(
            f"`steps` must be below 2^31, got {settings.steps}. Train in several runs."
        )
    data, loss = as_dataset(data), as_loss(loss)
    checks.known("params", (f, loss, params), "train")
    checks.known("data", data, "train")
    checks.floating("params", params)
    checks.finite("params", params)
    params, data = jax.tree.map(jnp.asarray, (params, Dataset(data[0], widened(data[1]))))
    return Problem(checks.model_function(f), loss, params, data)


@in_any_program()
def train(
    f: ModelFunction,
    params: Params,
    data: Dataset,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    loss: Loss = optax.losses.squared_error,
    key: jax.Array | None = None,
    batch_size: int | None = None,
    record: int | np.ndarray | None = None,
    chunk_steps: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    label: str | None = None,
) -> History:
    """Train a model from `params`, and keep its history.

    w[t + 1] = w[t] + update(grad of mean(loss(f(w[t], x), y)))

    Parameters
    ----------
    f : ModelFunction
        A network or its tangent model.
    params : pytree of floats
        w0.
    data : Dataset
        `x (N, ...)` and `y`, what the loss takes. Optax' losses of floats, element by element, take
        the shape of `f(params, x)`; for any other loss y may be labels, or a pytree.
    optimizer : optax.GradientTransformation
        Any of Optax. Learning rates are for the mean loss. Those that ask for `value`, `grad`,
        `value_fn` or `grad_fn`, line searches among them, have these of the batch of the step.
    steps : int
        How many steps, 1 or more.
    loss : callable
        `loss(prediction, y)` of Optax; its mean over all elements is trained. By default the
        squared error, without 1/2.
    key : key, optional
        For mini-batches.
    batch_size : int, optional
        Examples a step; every example is visited once per epoch. None or N and more: full batch.
    record : int or array of int, optional
        The steps at which parameters are kept: an array, or a number of log-spaced points (100 by
        default). 0 and `steps` are always among them.
    chunk_steps : int, optional
        Steps between two reports, at most. By default 5000, fewer for large models.
    checkpoint : path, optional
        A file that is rewritten after each chunk. If it is there and of this very run, the run goes
        on from it, to the same bits.
    label : str, optional
        What `progress` is told.

    Returns
    -------
    History
        On the host. See its attributes.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind: parameters or targets that are no real floats, a
        function that cannot be called, a setting that is no whole number; if they are traced.
    ValueError
        If shapes do not fit, the loss broadcasts labels against the predictions of other examples,
        `f` has no derivative in reverse mode, a value is NaN or infinite, a setting is below 1,
        mini-batches have no key, or the checkpoint is broken or of another run.

    Warns
    -----
    UserWarning
        If the run diverges (`diverged_at` says when), and if the weights move so little that
        rounding takes over.

    Notes
    -----
    The same call gives the same bits, stopped and resumed or not. Chunks of another length, and the
    same steps written as a loop, agree to rounding: they are compiled apart, and an optimiser that
    divides by the size of the gradients, such as Adam, makes much of rounding where these vanish.
    The first call compiles; calls that differ only in numbers do not compile again. A model that
    `linearize` and its like return passes its arrays as arguments. Losses and movements are taken
    in float32 at least, whatever the parameters are; predictions and float targets of half
    precision reach the loss as float32. Data that are sharded over a mesh stay where they are: each
    device computes with its share of a batch.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> data = Dataset(jnp.ones((4, 1)), jnp.ones((4, 1)))
    >>> history = train(lambda w, x: w * x, jnp.zeros(()) , data, optax.sgd(0.25), steps=2)
    >>> history.loss.tolist()
    [1.0, 0.25, 0.0625]
    """
    settings = Settings(steps, batch_size, record, chunk_steps, checkpoint, label)
    problem = _prepare(f, params, data, loss, settings)
    check_dataset(problem.data)
    check_member(*problem)
    return run(problem, optimizer, key, settings)


@in_any_program()
def train_ensemble(
    f: ModelFunction,
    params: Params,
    data: Dataset,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    loss: Loss = optax.losses.squared_error,
    key: jax.Array | None = None,
    batch_size: int | None = None,
    record: int | np.ndarray | None = None,
    chunk_steps: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    label: str | None = None,
    data_axis: int | None = None,
) -> History:
    """Train many members at once: seeds, anchors, output scales, data sets.

    Parameters
    ----------
    f : ModelFunction
        One for all, or a transform made under `jax.vmap`, one a member: every array that it holds
        has the members on axis 0.
    params : pytree of floats
        w0 of all members, on axis 0 of every leaf.
    data : Dataset
        The data of all members, or, with `data_axis=0`, one set a member.
    loss : callable
        As in `train`; every array that it holds has the members on axis 0.
    data_axis : None or 0
        Whether the data have the members on axis 0.
    optimizer, steps, key, batch_size, record, chunk_steps, checkpoint, label
        As in `train`. Each member draws its own mini-batches.

    Returns
    -------
    History
        Every array but `steps` has the members on axis 0. A member that diverges is frozen and
        marked in `diverged_at`; the others go on.

    Raises
    ------
    TypeError, ValueError
        As `train`; ValueError also if leaves differ in the number of members.

    Warns
    -----
    UserWarning
        As `train`, once for the ensemble.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> data = Dataset(jnp.ones((4, 1)), jnp.ones((4, 1)))
    >>> w = jnp.array([0.0, 2.0])
    >>> train_ensemble(lambda w, x: w * x, w, data, optax.sgd(0.25), steps=2).loss.tolist()
    [[1.0, 0.25, 0.0625], [1.0, 0.25, 0.0625]]
    """
    settings = Settings(steps, batch_size, record, chunk_steps, checkpoint, label)
    problem = _prepare(f, params, data, loss, settings)
    f, loss, params, data = problem
    if data_axis not in (None, 0):
        raise ValueError(f"`data_axis` must be None or 0, got {data_axis}. Put the members first.")
    held = (f, loss, params) if data_axis is None else (f, loss, params, data)
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(held)]
    if len({shape[:1] for shape in shapes}) != 1 or () in shapes:
        raise ValueError(
            f"`params`, and all that `f` and `loss` hold, must have the members on axis 0, got "
            f"shapes {shapes}. Make them under jax.vmap."
        )
    one = Dataset(*data) if data_axis is None else jax.tree.map(lambda a: a[0], data)
    check_dataset(one)
    checks.finite("data", data)
    jax.eval_shape(
        jax.vmap(lambda f, loss, w: check_member(f, loss, w, one), axis_size=shapes[0][0]),
        f,
        loss,
        params,
    )
    settings = settings._replace(members=shapes[0][0], data_axis=data_axis)
    return run(problem, optimizer, key, settings)
