"""Which examples to label next: the greedy selections of active learning.

Both choose one example after the other. MaxDet takes that of the largest variance given those
chosen (pivoted Cholesky), MaxDist that which is farthest from its nearest chosen one (k-center).
"""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from lazyjax import checks
from lazyjax.meshes import alike, in_any_program, zeros
from lazyjax.norms import scale_of
from lazyjax.operators import KernelOperator, as_operator
from lazyjax.sketches import Sketch
from lazyjax.widening import widened


class Selection(NamedTuple):
    """Examples in the order in which they were chosen.

    Attributes
    ----------
    indices : (count,)
        All different, and none that was given.
    scores : (count,)
        Of each when it was chosen, not rising but for rounding. `"pivoted_cholesky"`: its
        conditional variance, in the units of the kernel, ridge included. `"max_distance"`: its
        squared distance to the nearest example that was given or chosen before; infinity if there
        was none. 0 where no more than rounding was left: those are the first by number.
    """

    indices: jax.Array
    scores: jax.Array


class _Kernel(NamedTuple):
    """A kernel as a selection sees it, over the square of a power of two."""

    diagonal: jax.Array  # (N,)
    row: Partial  # example -> (N,), without ridge or shift: no one reads its own entry
    distances: Partial  # example -> (N,), squared
    rounding: jax.Array  # of an entry, over the largest of the diagonal
    slack: jax.Array  # of a squared distance, over k(x, x) + k(x', x')
    scale: jax.Array  # the power of two


def _operator_row(A: KernelOperator, example: jax.Array) -> jax.Array:
    return A.rows_of(example[None])[0]


def _operator_distances(A: KernelOperator, diagonal: jax.Array, example: jax.Array) -> jax.Array:
    """Compute k(x, x) + k(x', x') - 2 k(x, x')."""
    row = _operator_row(A, example)
    return (diagonal - row) + (diagonal[example] - row)


@jax.jit
def _of_operator(A: KernelOperator, diagonal: jax.Array, rounding: jax.Array) -> _Kernel:
    return _Kernel(
        diagonal=diagonal,
        row=Partial(_operator_row, A),
        distances=Partial(_operator_distances, A, diagonal),
        rounding=rounding,
        slack=8 * rounding,
        scale=jnp.ones_like(A.scale),
    )


def _feature_row(z: jax.Array, scale: jax.Array, outputs: ArrayLike, example: Any) -> jax.Array:
    return jnp.matmul(z, z[example] / scale, precision="highest") / scale / outputs


def _feature_distances(
    z: jax.Array, scale: jax.Array, outputs: ArrayLike, example: Any
) -> jax.Array:
    """Compute |z - z'|^2, in which nothing cancels."""
    return jnp.sum(jnp.square((z - z[example][None]) / scale), 1) / outputs


@jax.jit
def _of_features(z: jax.Array, outputs: ArrayLike, rounding: jax.Array) -> _Kernel:
    """Take z (N, P), each entry within its rounding, so that what it leaves is of second order."""
    scale = scale_of(z)
    return _Kernel(
        diagonal=jnp.sum(jnp.square(z / scale), 1) / outputs,
        row=Partial(_feature_row, z, scale, outputs),
        distances=Partial(_feature_distances, z, scale, outputs),
        rounding=jnp.maximum(rounding**2, jnp.finfo(z.dtype).eps),
        slack=(4 * rounding) ** 2,
        scale=scale,
    )


class _Step(NamedTuple):
    """One example that joins those chosen or given."""

    example: jax.Array
    number: jax.Array  # from 0
    fresh: jax.Array  # False for one that has joined before, which changes nothing


class _Method(NamedTuple):
    """A selection: the scores at the start and after each step, and what they are at the end."""

    start: Callable[[_Kernel, jax.Array, int], tuple[jax.Array, Any]]  # kernel, ridge, steps
    step: Callable[[_Kernel, jax.Array, jax.Array, Any, _Step], tuple[jax.Array, Any, jax.Array]]
    what: str


def _variances(kernel: _Kernel, ridge: jax.Array, steps: int) -> tuple[jax.Array, Any]:
    diagonal = kernel.diagonal + ridge
    floor = (8 + steps) * kernel.rounding * jnp.max(diagonal)
    return diagonal, (zeros((steps, diagonal.size), diagonal), floor)


def _condition(
    kernel: _Kernel, ridge: jax.Array, variances: jax.Array, state: Any, new: _Step
) -> tuple[jax.Array, Any, jax.Array]:
    """Add a column l = (k_i - L L_i) / sqrt(v_i) to the factor, and take l^2 from the variances."""
    L, floor = state  # (steps, N), transposed; the columns to come are 0
    i = new.example
    pivot = jnp.where(new.fresh, variances[i], 0)
    rest = kernel.row(i) - jnp.matmul(L[:, i], L, precision="highest")
    column = jnp.where(pivot > 0, rest / jnp.sqrt(jnp.where(pivot > 0, pivot, 1)), 0)
    variances = variances - column**2
    L = L.at[new.number].set(column)
    return jnp.where(variances > floor, variances, 0), (L, floor), jnp.min(variances)


def _infinity(kernel: _Kernel, ridge: jax.Array, steps: int) -> tuple[jax.Array, Any]:
    return jnp.full_like(kernel.diagonal, jnp.inf), ()


def _approach(
    kernel: _Kernel, ridge: jax.Array, nearest: jax.Array, state: Any, new: _Step
) -> tuple[jax.Array, Any, jax.Array]:
    distances = kernel.distances(new.example)
    size = kernel.diagonal + kernel.diagonal[new.example]
    apart = jnp.where(distances > kernel.slack * size, distances, 0)
    nearest = jnp.where(new.fresh, jnp.minimum(nearest, apart), nearest)
    return nearest, state, jnp.min(distances)


METHODS = {
    "pivoted_cholesky": _Method(_variances, _condition, "conditional variance"),
    "max_distance": _Method(_infinity, _approach, "squared distance"),
}


@partial(jax.jit, static_argnames=("count", "method"))
def _selected(
    kernel: _Kernel, given: jax.Array, ridge: jax.Array, *, count: int, method: str
) -> tuple[Selection, jax.Array, jax.Array]:
    """Choose; give also how many scores are not 0, and the least over the largest k(x, x)."""
    start, step, _ = METHODS[method]
    n, steps = kernel.diagonal.size, given.size + count
    # XLA would divide by the square of the scale, which need not be in range
    ridge = jax.lax.optimization_barrier(ridge / kernel.scale) / kernel.scale
    scores, state = start(kernel, ridge, steps)
    labelled = jnp.zeros(n, bool).at[given].set(True)
    least, tiny = jnp.zeros((), scores.dtype), jnp.finfo(scores.dtype).tiny

    def next_one(carry: Any, number: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        scores, state, joined, least = carry
        # first those given, by the largest score as well: rounding then stays rounding
        candidates = (labelled | (number >= given.size)) & ~joined
        order = jnp.where(jnp.isinf(scores), kernel.diagonal, scores)
        i = jnp.argmax(jnp.where(candidates, order, -jnp.inf))
        score = scores[i]
        new = _Step(i, number, candidates[i])
        scores, state, lowest = step(kernel, ridge, scores, state, new)
        joined = joined.at[i].set(joined[i] | candidates[i])
        return (scores, state, joined, jnp.minimum(least, lowest)), (i, score)

    carry = alike((scores, state, jnp.zeros(n, bool), least), (kernel, given, ridge))
    (*_, least), (indices, scores) = jax.lax.scan(next_one, carry, jnp.arange(steps))
    indices, scores = indices[given.size :], scores[given.size :]
    selection = Selection(indices, scores * kernel.scale * kernel.scale)
    largest = jnp.maximum(jnp.max(kernel.diagonal + ridge), tiny)
    return selection, jnp.count_nonzero(scores), least / largest


def _checked_kernel(kernel: Any) -> _Kernel:
    if isinstance(kernel, Sketch):
        raise TypeError(
            "`kernel` must be an array or a KernelOperator, got a Sketch. Pass features=sketch."
        )
    rounding = None
    if not isinstance(kernel, KernelOperator):
        checks.floating("kernel", kernel)
        shape = np.shape(kernel)
        if len(shape) != 2 or shape[0] != shape[1]:
            cure = "Use features= for features (N, D)."
            raise ValueError(
                f"`kernel` must have shape (N, N), got {shape}. "
                + ('Use ntk(..., reduce="trace").' if len(shape) > 2 else cure)
            )
        checks.finite("kernel", kernel)
        rounding = jnp.finfo(jnp.result_type(kernel)).eps
        kernel = as_operator(kernel)
    if kernel.outputs != 1:
        raise ValueError(
            f"`kernel` must have one row an example, got {kernel.outputs} of them. "
            'Use ntk_operator(..., reduce="trace").'
        )
    if not kernel.psd:
        raise ValueError(
            "`kernel` must be symmetric and positive semi-definite, got one of shape "
            f"{kernel.shape} that is not known to be. Use the kernel of a batch with itself, or "
            "features= for features (N, D)."
        )
    diagonal = kernel.diagonal()
    checks.not_negative("kernel", diagonal, "Use a kernel, whose diagonal is 0 or more.")
    eps = jnp.finfo(kernel.dtype).eps if rounding is None else rounding
    return _of_operator(kernel, diagonal, jnp.asarray(eps, kernel.dtype))


def _checked_features(features: Any) -> _Kernel:
    if isinstance(features, KernelOperator):
        raise TypeError("`features` must be an array, got a KernelOperator. Pass kernel=operator.")
    z = features.features if isinstance(features, Sketch) else features
    checks.floating("features", z)
    shape = np.shape(z)
    if len(shape) < 2:
        raise ValueError(
            f"`features` must have shape (N, *out, D), got {shape}. Use z[:, None] for D = 1."
        )
    eps = jnp.finfo(jnp.result_type(z)).eps
    z = jnp.asarray(widened(z)).reshape(shape[0], -1)
    kernel = _of_features(z, math.prod(shape[1:-1]), jnp.asarray(eps, z.dtype))
    checks.finite("features", kernel.diagonal)
    return kernel


def _checked_given(given: Any, count: int, n: int) -> jax.Array:
    labelled = jnp.asarray(given)
    if not labelled.size:
        labelled = labelled.astype(int)
    if labelled.ndim != 1 or not jnp.issubdtype(labelled.dtype, jnp.integer):
        raise TypeError(
            f"`given` must hold whole numbers (g,), got {labelled.dtype} of shape "
            f"{labelled.shape}. Use jnp.flatnonzero(mask) for a mask."
        )
    if count > n - labelled.size:
        raise ValueError(
            f"`count` must be at most {n - labelled.size}, the examples that are not given, got "
            f"{count}. Choose fewer."
        )
    if checks.is_known(labelled):
        numbers = np.asarray(labelled)
        if np.any((numbers < 0) | (numbers >= n)):
            raise ValueError(
                f"`given` must be in 0 to {n - 1}, got {numbers.min()} to {numbers.max()}. "
                "Count examples from 0, in the batch of the kernel."
            )
        if np.unique(numbers).size < numbers.size:
            raise ValueError(
                f"`given` must name each example once, got {numbers.size} numbers of "
                f"{np.unique(numbers).size} examples. Use jnp.unique(given)."
            )
    return labelled


@in_any_program()
def select(
    count: int,
    *,
    kernel: ArrayLike | KernelOperator | None = None,
    features: ArrayLike | Sketch | None = None,
    method: str = "pivoted_cholesky",
    given: ArrayLike | Sequence[int] = (),
    ridge: ArrayLike = 0.0,
) -> Selection:
    """Choose the examples to label next, of a kernel or of features, one after the other.

    The next one is argmax_i s_i, with C those given and chosen so far, and

    pivoted_cholesky (MaxDet)   s_i = k_ii - k_iC (k_CC)^-1 k_Ci,  k with the ridge on its diagonal
    max_distance (MaxDist)      s_i = min_c k_ii + k_cc - 2 k_ic = min_c |z_i - z_c|^2

    Parameters
    ----------
    count : int
        Examples to choose.
    kernel : (N, N) or KernelOperator, optional
        Of a batch with itself, one row an example: `ntk(..., reduce="trace")`. The ridge and the
        factor of an operator count.
    features : (N, *out, D) or Sketch, optional
        z, in the place of the kernel einsum("nkd,mkd->nm", z, z) / K, which is not formed.
    method : str
        A row of `METHODS`.
    given : (g,) int
        Examples that are labelled already. They count as chosen first.
    ridge : float
        For `"pivoted_cholesky"`, the variance of the noise of a label, in the units of the kernel,
        in addition to that of an operator.

    Returns
    -------
    Selection

    Raises
    ------
    TypeError
        If the kernel or the features hold no floats, or one is passed as the other; or `count` or
        `given` holds no whole numbers.
    ValueError
        If there is not one of `kernel` and `features`; their shape does not fit, they are not
        finite, or the kernel is not symmetric and positive semi-definite; `count` is not in 1 to
        N - g; `method` is unknown; `given` is out of range or names an example twice; or the ridge
        is negative, or given for `"max_distance"`.

    Warns
    -----
    UserWarning
        Outside of `jit`, if less than rounding is left for some: their scores are 0.

    Notes
    -----
    Ties go to the lowest number. Without any given, `"max_distance"` begins with the largest k_ii.
    The product of the scores of `"pivoted_cholesky"` is the determinant of the kernel of those
    chosen, given those given. Each of the c = count + g steps takes a row of the kernel: of
    features O(N K D) operations, of an operator a row computed anew or, where it computes none, a
    product. To that `"pivoted_cholesky"` adds O(N c) a step and c N numbers of memory,
    `"max_distance"` O(N). An operator is asked for its `diagonal` too. No N x N matrix is formed.
    The shift of an operator is added twice to every distance, which changes no choice. Distances in
    a kernel cancel: what is below 8 eps (k_ii + k_cc) is 0, while those of features are right to
    their own rounding. A conditional variance is 0 below (8 + c) eps max k_ii. Runs under `jit` and
    `vmap`, with `count` and `method` static.

    References
    ----------
    Holzmueller, Zaverkin, Kaestner, Steinwart 2022, "A framework and benchmark for deep batch
    active learning for regression" (MaxDet and MaxDist, with empirical NTKs and their sketches).
    Harbrecht, Peters, Schneider 2012, "On the low-rank approximation by the pivoted Cholesky
    decomposition". Gonzalez 1985, "Clustering to minimize the maximum intercluster distance" (the
    largest distance left is within twice the least possible). Sener and Savarese 2018, "Active
    learning for convolutional neural networks: a core-set approach".

    Examples
    --------
    >>> z = jnp.array([[3.0, 0.0], [2.9, 0.0], [0.0, 2.0], [0.0, 0.0]])
    >>> chosen = select(2, features=z)
    >>> chosen.indices.tolist(), chosen.scores.tolist()
    ([0, 2], [9.0, 4.0])
    >>> select(2, kernel=z @ z.T, given=[0], method="max_distance").indices.tolist()
    [2, 3]
    """
    checks.whole("count", count, least=1)
    checks.one_of("method", method, METHODS)
    if (kernel is None) == (features is None):
        raise ValueError(
            f"`kernel` or `features` must be given, got {'none' if kernel is None else 'both'}. "
            "Use kernel= for (N, N) or an operator, features= for (N, *out, D) or a sketch."
        )
    if np.ndim(ridge):
        raise ValueError(f"`ridge` must be a number, got shape {np.shape(ridge)}. Use one value.")
    checks.not_negative("ridge", ridge)
    if method == "max_distance" and not (checks.is_known(ridge) and not np.any(ridge)):
        raise ValueError(
            f"`ridge` must be 0 for max_distance, which knows no noise, got {ridge}. Leave it out."
        )
    seen = _checked_kernel(kernel) if features is None else _checked_features(features)
    labelled = _checked_given(given, count, seen.diagonal.size)
    noise = jnp.asarray(ridge, seen.diagonal.dtype)
    selection, left, least = _selected(seen, labelled, noise, count=count, method=method)
    if checks.is_known((left, least)):
        _tell(int(left), count, float(least), seen, METHODS[method].what)
    return selection


def _tell(left: int, count: int, least: float, kernel: _Kernel, what: str) -> None:
    """Raise if the kernel is indefinite, and warn if it has come to an end."""
    # a kernel may have come through less precision than its dtype tells
    if not least >= -max(1e-3, 4 * float(kernel.rounding) ** 0.5):
        raise ValueError(
            f"`kernel` must be positive semi-definite, got a {what} of {least:.1e} of the largest "
            'k(x, x). Compute the kernel at precision="highest"'
            + (", or in float64." if kernel.diagonal.dtype != np.float64 else ".")
        )
    if left < count:
        warnings.warn(
            f"after {left} examples of {count} no {what} is above rounding: the others are the "
            "first by number, with score 0. Choose fewer, or by a kernel of larger rank or of more "
            "digits.",
            UserWarning,
            stacklevel=4,
        )
