"""The types that flow through the house: parameters, model functions, data, histories."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

PyTree = Any
"""Arrays in tuples, lists, dicts and whatever else JAX knows as a pytree; or one array."""

Params = PyTree
"""A pytree of arrays."""

Wrt = Callable[[str], bool] | PyTree
"""Which leaves are differentiated: a function of the path, or a mask (or the upper part of one)."""

Weights = list[jax.Array]
"""The leaves of the parameters that are differentiated."""

ModelFunction = Callable[[Params, PyTree], PyTree]
"""`f(params, x) -> y`: pure, batch on axis 0, `x (N, ...)`, `y (N, *out)`."""

Loss = Callable[[PyTree, PyTree], jax.Array]
"""`loss(prediction, y)`, as Optax has them; its mean over all elements is what is trained."""


def leaf_names(params: Params) -> tuple[str, ...]:
    """Name the leaves by their paths, as in `hidden_0/kernel`; a bare array is `w`."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return tuple(
        jax.tree_util.keystr(path, simple=True, separator="/") if path else "w" for path in paths
    )


class Dataset(NamedTuple):
    """Inputs `x (N, ...)` and targets `y (N, *out)`: arrays, or pytrees of them."""

    x: PyTree
    y: PyTree


@dataclass(frozen=True, kw_only=True)
class History:
    """What a training run leaves: arrays on the host, all starting at w0.

    In the history of an ensemble every array but `steps` has the members on axis 0, and
    `diverged_at` is a tuple with one entry a member; `member` picks one.

    Attributes
    ----------
    loss : (steps + 1,)
        The loss at w[t]; with mini-batches, on the batch of step t. NaN from `diverged_at` on.
    weight_movement : (steps + 1,)
        norm(w[t] - w0) / norm(w0), over all parameters.
    layer_movement : dict of (steps + 1,)
        The same for each leaf, by its path; a leaf of `relative_to_all` is divided by the norm of
        all of w0, as its own norm at w0 is 0.
    relative_to_all : tuple of str
        The leaves whose norm at w0 is 0 (Flax biases are).
    steps : (G,)
        The steps of the grid, from 0 to the last.
    params : pytree of (G, ...)
        The parameters on the grid; from `diverged_at` on, those of the last finite step.
    data_loss : (G,)
        The loss on all data, on the grid.
    diverged_at : int or None, or a tuple of them
        The first step whose loss or parameters are not finite.
    """

    loss: np.ndarray
    weight_movement: np.ndarray
    layer_movement: dict[str, np.ndarray]
    relative_to_all: tuple[str, ...]
    steps: np.ndarray
    params: Params
    data_loss: np.ndarray
    diverged_at: int | tuple[int | None, ...] | None = None

    @property
    def is_ensemble(self) -> bool:
        """Whether the arrays have the members on axis 0."""
        return self.loss.ndim == 2

    @property
    def final(self) -> Params:
        """The parameters at the last step of the grid."""
        return self.at(-1)

    def at(self, index: int) -> Params:
        """Give the parameters at entry `index` of the grid `steps`."""
        if self.is_ensemble:
            return jax.tree.map(lambda w: w[:, index], self.params)
        return jax.tree.map(lambda w: w[index], self.params)

    def member(self, index: int) -> "History":
        """Give the history of one member of an ensemble."""
        if not isinstance(self.diverged_at, tuple):
            raise TypeError(
                "`member` is for the history of an ensemble, not of one run. Use it as it is."
            )
        return History(
            loss=self.loss[index],
            weight_movement=self.weight_movement[index],
            layer_movement={name: curve[index] for name, curve in self.layer_movement.items()},
            relative_to_all=self.relative_to_all,
            steps=self.steps,
            params=jax.tree.map(lambda w: w[index], self.params),
            data_loss=self.data_loss[index],
            diverged_at=self.diverged_at[index],
        )

    def plot(self) -> Any:
        """Draw loss and movements against the step: a Figure of Matplotlib."""
        from lazyjax.plots import history, style

        with style():
            return history(self)

    def _repr_html_(self) -> str:
        """Show how it ended, and small curves, in a notebook."""
        from lazyjax.pages import history_card

        return history_card(self)
