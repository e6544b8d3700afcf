"""The network beside its tangent model and the closed form: one training of each, measured alike.

What the experiments that train a network share. Members are seeds, widths or alphas: one call
trains an ensemble.
"""

from collections.abc import Sequence
from functools import cache

import flax.linen as nn
import jax
import numpy as np
import optax

from lazyjax.comparison import Comparison, compare_ensemble
from lazyjax.models import from_linen
from lazyjax.training import scale_loss
from lazyjax.types import Dataset, History, ModelFunction, Params

_sgd = cache(optax.sgd)  # one object a rate: what is trained again is not compiled again


def compare(
    f: ModelFunction,
    start: Params,
    data: Dataset,
    *,
    learning_rate: float,
    steps: int,
    grid_x: jax.Array,
    momentum: float = 0.0,
    anchor: Params | None = None,
    alphas: jax.Array | None = None,
) -> tuple[Comparison, History]:
    """Train an ensemble and its tangent models alike, and predict the latter in closed form.

    Parameters
    ----------
    f : ModelFunction
        One for all, or made under `jax.vmap`, one a member.
    start : pytree of (E, ...)
        Where training starts.
    data : Dataset
        x (N, 1), y (N, 1), the same for all members.
    learning_rate : float
        Of gradient descent on the mean squared error (over alpha^2, if there are `alphas`).
    steps : int
    grid_x : (M, 1)
        Where functions are drawn.
    momentum : float
        Of the heavy ball.
    anchor : pytree of (E, ...), optional
        Where the tangent models expand, `start` by default.
    alphas : (E,), optional
        The output scales that `f` has; the loss is divided by alpha^2.

    Returns
    -------
    Comparison
    history : History
        Of the networks.
    """
    # numpy: each little operation of jnp would cost a compilation
    order = np.argsort(np.asarray(data.x[:, 0]))
    data = Dataset(np.asarray(data.x)[order], np.asarray(data.y)[order])
    members = jax.tree.leaves(start)[0].shape[0]
    scales = np.ones(members, data.y.dtype) if alphas is None else np.asarray(alphas)
    return compare_ensemble(
        f,
        start,
        data,
        _sgd(learning_rate, momentum or None),
        steps=steps,
        grid_x=grid_x,
        loss=scale_loss(optax.losses.squared_error, scales),  # one alpha a member
        anchor=anchor,
    )


def ensemble(
    module: nn.Module, key: jax.Array, x: jax.Array, members: int
) -> tuple[ModelFunction, Params]:
    """Initialise a Flax module `members` times: f, and parameters with the members on axis 0."""
    params = jax.vmap(lambda k: from_linen(module, k, x)[1])(jax.random.split(key, members))
    first = jax.tree.map(lambda w: w[0], params)
    f, _ = from_linen(module, None, x, variables={"params": first})
    return f, params


def member_summary(compared: Comparison, index: int) -> dict[str, float]:
    """Give the numbers to conclude from for one member."""
    network, tangent, closed = compared.network, compared.tangent, compared.closed_form
    gap = compared.gap_train[index, -1]
    numbers = {
        "final loss of the network": network.loss[index, -1],
        "final loss of the tangent model": tangent.loss[index, -1],
        "final loss in closed form": closed.loss[index, -1],
        "relative weight movement of the network": network.movement[index, -1],
        "relative weight movement of the tangent model": tangent.movement[index, -1],
        "gap between network and tangent model, training points": gap,
        "gap between network and tangent model, grid": compared.gap_grid[index, -1],
        "the same over the change of the network": gap
        / np.sqrt(np.mean(np.square(network.train[index, -1] - network.train[index, 0]))),
        "largest gap between tangent model and closed form": np.max(closed.gap[index]),
        "relative kernel change": compared.kernel_change[index, -1],
        "kernel alignment": compared.kernel_alignment[index, -1],
        "critical learning rate": compared.critical_learning_rate[index],
    }
    return {name: float(value) for name, value in numbers.items()}


def summarise(compared: Comparison, labels: list[str]) -> dict[str, dict[str, float]]:
    """Give `member_summary` for each member by its label."""
    return {label: member_summary(compared, i) for i, label in enumerate(labels)}


def range_of(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Give median, least and most of a number over the members."""
    least, median, most = np.min(values), np.median(values), np.max(values)
    return {"median": float(median), "least": float(least), "most": float(most)}


def spread(compared: Comparison) -> dict[str, dict[str, float]]:
    """Give `range_of` every number of `member_summary`."""
    members = [member_summary(compared, i) for i in range(compared.members)]
    return {name: range_of([member[name] for member in members]) for name in members[0]}
