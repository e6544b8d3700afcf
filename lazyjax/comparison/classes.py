"""Is it a classifier, and what does it answer? Read from targets, outputs and loss."""

from typing import Any, NamedTuple

import numpy as np
import optax

from lazyjax.training import innermost
from lazyjax.types import Loss, PyTree

_OF_LOGITS = (
    optax.losses.sigmoid_binary_cross_entropy,
    optax.losses.sigmoid_focal_loss,
    optax.losses.hinge_loss,
)


class Classes(NamedTuple):
    """How outputs (..., *out) become classes: the largest, or which side of a threshold."""

    threshold: float | None  # None: the class is the largest entry of the last axis
    one_hot: bool = False  # whether targets name it in the same way

    def of(self, outputs: np.ndarray) -> np.ndarray:
        """Give the classes."""
        if self.threshold is None:
            return np.argmax(outputs, axis=-1)
        return (outputs > self.threshold).astype(int)

    def labels(self, y: Any) -> np.ndarray:
        """Give the classes that the targets name."""
        y = np.asarray(y)
        if self.threshold is None:
            return np.argmax(y, axis=-1) if self.one_hot else y
        return (y > self.threshold).astype(int)

    def differ(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Give the share of examples in different classes, (E, G, n, ...) -> (E, G)."""
        a, b = np.broadcast_arrays(a, b)
        return np.mean(a != b, axis=tuple(range(2, a.ndim)))


def classes_of(loss: Loss, y: PyTree, out: tuple[int, ...]) -> Classes | None:
    """Tell how outputs of shape `out` an example are read as classes; None where they are values.

    Whole labels and one-hot targets name the largest output; targets of 0 and 1 under a loss of
    logits, and of -1 and 1 under any, the side of 0; of 0 and 1 under a loss of values, of 1/2.
    """
    if not hasattr(y, "dtype"):
        return None
    y, inner = np.asarray(y), innermost(loss)
    several = bool(out) and out[-1] > 1
    if several and np.issubdtype(y.dtype, np.integer) and y.shape[1:] == out[:-1]:
        return Classes(None)
    if y.shape[1:] != out or y.dtype == bool:
        return None
    values = np.unique(y) if y.size <= 10**7 else np.unique(y[:1000])
    zeros_and_ones = bool(np.isin(values, (0, 1)).all())
    if several and zeros_and_ones and bool((y.sum(-1) == 1).all()) and inner not in _OF_LOGITS:
        return Classes(None, one_hot=True)
    if bool(np.isin(values, (-1, 1)).all()) or (zeros_and_ones and inner in _OF_LOGITS):
        return Classes(0.0)
    return Classes(0.5) if zeros_and_ones else None
