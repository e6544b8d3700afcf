"""The network beside its tangent model and the closed form: one training of each, measured alike.

What the experiments that train a network share. Everything has the members (seeds, widths, alphas)
on axis 0, so that one call trains an ensemble, and `join` puts models of different shapes together.
"""

from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from lazyjax.dynamics import gradient_descent
from lazyjax.kernels import ntk
from lazyjax.metrics import kernel_alignment, relative_kernel_change
from lazyjax.models import from_linen
from lazyjax.spectrum import critical_learning_rate
from lazyjax.tangent import linearize
from lazyjax.training import log_grid, scale_loss, train_ensemble
from lazyjax.types import Dataset, History, ModelFunction, Params

_sgd = cache(optax.sgd)  # one object a rate: what is trained again is not compiled again

CURVE_POINTS = 600  # of a curve that is stored, log-spaced
KERNEL_POINTS = 16  # steps at which the kernel is measured, log-spaced


@partial(jax.jit, static_argnames=("momentum",))
def _closed_form(
    f: ModelFunction,
    start: Params,
    anchor: Params,
    data: Dataset,
    grid_x: jax.Array,
    steps: jax.Array,
    learning_rate: jax.Array,
    alpha: jax.Array,
    momentum: float,
) -> dict[str, jax.Array]:
    """Predict one member's tangent model: outputs and movement at `steps`."""
    f_lin = linearize(f, anchor)
    kernel = ntk(f, anchor, data.x)
    dynamics = gradient_descent(
        kernel,
        data.y,
        f_lin(start, data.x),
        learning_rate=learning_rate / alpha**2,
        momentum=momentum,
    )
    coefficients = dynamics.coefficients(steps)  # (G, N, K)
    moved = dynamics.train(steps) - dynamics.train(jnp.zeros((1,), steps.dtype))
    square = jnp.sum(coefficients * moved, axis=(1, 2))  # norm(J^T a)^2 = a^T Theta a
    critical = alpha**2 * critical_learning_rate(kernel, momentum=momentum)
    return {
        "closed_train": dynamics.train(steps),
        "closed_grid": dynamics.test(steps, ntk(f, anchor, grid_x, data.x), f_lin(start, grid_x)),
        "closed_movement": jnp.sqrt(jnp.maximum(square, 0.0)) / optax.tree.norm(start),
        "critical_learning_rate": critical,
    }


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, None))
def _kernels(f: ModelFunction, on_grid: Params, x: jax.Array) -> dict[str, jax.Array]:
    """Compute the trace kernel of each member at each of its recorded parameters."""
    kernels = jax.lax.map(lambda w: ntk(f, w, x, reduce="trace"), on_grid)
    return {
        "kernels": kernels,
        "kernel_change": jax.vmap(relative_kernel_change, (0, None))(kernels, kernels[0]),
        "kernel_alignment": jax.vmap(kernel_alignment, (0, None))(kernels, kernels[0]),
    }


@jax.jit
@partial(jax.vmap, in_axes=(0, 0, None))
def _outputs(f: ModelFunction, on_grid: Params, x: jax.Array) -> jax.Array:
    """Compute the outputs of each member at each of its recorded parameters."""
    return jax.lax.map(lambda w: f(w, x), on_grid)


def _rms(difference: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(difference), axis=(-2, -1)))


def _curves(name: str, history: History, at: np.ndarray) -> dict[str, np.ndarray]:
    diverged_at = history.diverged_at if isinstance(history.diverged_at, tuple) else ()
    curves = {
        f"{name}_loss": history.loss[:, at],
        f"{name}_movement": history.weight_movement[:, at],
        f"{name}_diverged_at": np.array([-1 if t is None else t for t in diverged_at]),
    }
    layers = {
        f"{name}_layer/{leaf}": curve[:, at] for leaf, curve in history.layer_movement.items()
    }
    return curves | layers


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
) -> tuple[dict[str, np.ndarray], History]:
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
    arrays : dict of arrays
        Members on axis 0. `<model>_loss`, `<model>_movement`, `<model>_layer/<leaf>` (E, C) at
        `curve_steps` (C,) for the models network and tangent; at `steps` (G,) `<model>_train`
        (E, G, N, 1), `<model>_grid` (E, G, M, 1), `gap_train`, `gap_grid` (rms between network and
        tangent model), `closed_gap` (rms between tangent model and closed form on the training
        points) and `closed_movement`; at `kernel_steps` the kernels (E, P, N, N), ordered by x,
        `kernel_change` and `kernel_alignment`.
    history : History
        Of the networks.
    """
    members = jax.tree.leaves(start)[0].shape[0]
    anchor = start if anchor is None else anchor
    f = f if isinstance(f, Partial) else Partial(f)
    # numpy: each little operation of jnp would cost a compilation
    order = np.argsort(np.asarray(data.x[:, 0]))
    data = Dataset(np.asarray(data.x)[order], np.asarray(data.y)[order])
    scales = np.ones(members, data.y.dtype) if alphas is None else np.asarray(alphas)

    optimizer = _sgd(learning_rate, momentum or None)
    loss = scale_loss(optax.losses.squared_error, scales)  # one alpha a member
    settings: dict[str, Any] = {"steps": steps, "loss": loss}
    tangent = jax.vmap(linearize)(f, anchor)
    network_history = train_ensemble(f, start, data, optimizer, label="network", **settings)
    tangent_history = train_ensemble(
        tangent, start, data, optimizer, label="tangent model", **settings
    )

    grid = network_history.steps
    at = log_grid(steps, points=CURVE_POINTS)
    arrays = {"steps": grid, "curve_steps": at, "x": data.x, "y": data.y, "grid_x": grid_x}
    arrays |= _curves("network", network_history, at) | _curves("tangent", tangent_history, at)
    for name, model, history in (
        ("network", f, network_history),
        ("tangent", tangent, tangent_history),
    ):
        outputs = _outputs(model, history.params, np.concatenate([data.x, grid_x]))
        arrays[f"{name}_train"] = outputs[:, :, : len(data.x)]
        arrays[f"{name}_grid"] = outputs[:, :, len(data.x) :]

    closed = partial(_closed_form, momentum=momentum)
    rate = np.asarray(learning_rate, data.y.dtype)
    arrays |= jax.vmap(closed, (0, 0, 0, None, None, None, None, 0))(
        f, start, anchor, data, grid_x, grid, rate, scales
    )
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    arrays["closed_loss"] = (
        np.mean(np.square(arrays["closed_train"] - arrays["y"]), axis=(-2, -1))
        / np.square(np.asarray(scales))[:, None]
    )
    arrays["gap_train"] = _rms(arrays["network_train"] - arrays["tangent_train"])
    arrays["gap_grid"] = _rms(arrays["network_grid"] - arrays["tangent_grid"])
    arrays["closed_gap"] = _rms(arrays["closed_train"] - arrays["tangent_train"])

    which = np.unique(np.linspace(0, len(grid) - 1, KERNEL_POINTS).astype(int))
    on_grid = jax.tree.map(lambda w: w[:, which], network_history.params)
    kernels = _kernels(f, on_grid, data.x)
    arrays |= {name: np.asarray(value) for name, value in kernels.items()}
    arrays["kernel_steps"] = grid[which]
    return arrays, network_history


def ensemble(
    module: nn.Module, key: jax.Array, x: jax.Array, members: int
) -> tuple[ModelFunction, Params]:
    """Initialise a Flax module `members` times: f, and parameters with the members on axis 0."""
    params = jax.vmap(lambda k: from_linen(module, k, x)[1])(jax.random.split(key, members))
    first = jax.tree.map(lambda w: w[0], params)
    f, _ = from_linen(module, None, x, variables={"params": first})
    return f, params


_SHARED = ("steps", "curve_steps", "x", "y", "grid_x", "kernel_steps")


def join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Put the arrays of several comparisons together, members on axis 0."""
    return {
        name: parts[0][name]
        if name in _SHARED
        else np.concatenate([part[name] for part in parts], axis=0)
        for name in parts[0]
    }


def member_summary(arrays: dict[str, np.ndarray], index: int) -> dict[str, float]:
    """Give the numbers to conclude from for one member."""
    change = _rms(arrays["network_train"][index, -1] - arrays["network_train"][index, 0])
    numbers = {
        "final loss of the network": arrays["network_loss"][index, -1],
        "final loss of the tangent model": arrays["tangent_loss"][index, -1],
        "final loss in closed form": arrays["closed_loss"][index, -1],
        "relative weight movement of the network": arrays["network_movement"][index, -1],
        "relative weight movement of the tangent model": arrays["tangent_movement"][index, -1],
        "gap between network and tangent model, training points": arrays["gap_train"][index, -1],
        "gap between network and tangent model, grid": arrays["gap_grid"][index, -1],
        "the same over the change of the network": arrays["gap_train"][index, -1] / change,
        "largest gap between tangent model and closed form": np.max(arrays["closed_gap"][index]),
        "relative kernel change": arrays["kernel_change"][index, -1],
        "kernel alignment": arrays["kernel_alignment"][index, -1],
        "critical learning rate": arrays["critical_learning_rate"][index],
    }
    return {name: float(value) for name, value in numbers.items()}


def summarise(arrays: dict[str, np.ndarray], labels: list[str]) -> dict[str, dict[str, float]]:
    """Give `member_summary` for each member by its label."""
    return {label: member_summary(arrays, i) for i, label in enumerate(labels)}


def spread(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Give median, least and most over the members of every number of `member_summary`."""
    members = [member_summary(arrays, i) for i in range(len(arrays["network_loss"]))]
    statistics = {"median": np.median, "least": np.min, "most": np.max}
    return {
        name: {
            statistic: float(of([member[name] for member in members]))
            for statistic, of in statistics.items()
        }
        for name in members[0]
    }
