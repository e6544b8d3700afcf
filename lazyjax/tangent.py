"""The tangent model, its higher Taylor expansions, centring and the output scale alpha.

Each transform takes a model function and returns one with the same signature, as a
`jax.tree_util.Partial`: the function is static, the anchor and alpha are leaves. So a transform can
be made under `jax.vmap` (one anchor a member of an ensemble), passed through `jit` as an argument
without embedding its arrays, and made twice without compiling twice.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from lazyjax import checks
from lazyjax.derivatives import jvp, linearization
from lazyjax.types import ModelFunction, Params, PyTree
from lazyjax.widening import widened


def _displacement(params: Params, params0: Params) -> Params:
    checks.same_tree("params", params, params0, "params0")
    return optax.tree.sub(params, params0)


def _tangent(f: ModelFunction, params0: Params, params: Params, x: PyTree) -> Any:
    value, derivative = jvp(lambda w: f(w, x), params0, _displacement(params, params0))
    return optax.tree.add(value, derivative)


def _tangent_on_batch(value: Any, product: Any, params0: Params, params: Params) -> Any:
    return optax.tree.add(value, product(_displacement(params, params0)))


def linearize(f: ModelFunction, params0: Params, x: PyTree = None) -> Partial:
    """Build the tangent model, the first-order Taylor expansion of `f` in the parameters.

    f_lin(params, x) = f(params0, x) + J(x) (params - params0)

    Parameters
    ----------
    f : ModelFunction
        `f(params, x) -> y`; may contain `custom_vjp` functions.
    params0 : pytree of floats
        The anchor.
    x : array (N, ...) or pytree, optional
        Fix the batch: the value and the residuals at the anchor are then computed once, here.

    Returns
    -------
    jax.tree_util.Partial
        Without `x` a model function `f_lin(params, x) -> y (N, *out)`; with `x` a function
        `params -> y (N, *out)` for that batch.

    Raises
    ------
    TypeError
        If `f` is not callable or `params0` holds anything but floats.
    ValueError
        When it is called with parameters that do not fit `params0`.

    Notes
    -----
    A call costs about two (without `x`) or one (with it) evaluations of `f`. With `x` it keeps the
    residuals, about the memory of one backward pass.

    References
    ----------
    Lee, Xiao, Schoenholz, Bahri, Novak, Sohl-Dickstein, Pennington 2019, "Wide neural networks of
    any depth evolve as linear models under gradient descent", equation 2.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> f = lambda w, x: (w * x) ** 2
    >>> f_lin = linearize(f, jnp.float32(1.0))
    >>> f_lin(jnp.float32(1.5), jnp.array([1.0, 2.0])).tolist()
    [2.0, 8.0]
    """
    f = checks.model_function(f)
    checks.floating("params0", params0)
    if x is None:
        return Partial(_tangent, f, params0)
    value, product = linearization(lambda w: f(w, x), params0)
    return Partial(_tangent_on_batch, value, product, params0)


class _Order(int):
    """An order of expansion: static, so it is kept apart from the leaves of the Partial."""


jax.tree_util.register_static(_Order)


def _taylor(order: int, f: ModelFunction, params0: Params, params: Params, x: PyTree) -> Any:
    delta = _displacement(params, params0)
    dtype = jnp.result_type(*jax.tree.leaves(params0))

    def derivatives(s: jax.Array) -> list[Any]:  # of s -> f(params0 + s delta, x), orders 0 to ..
        return [f(optax.tree.add(params0, optax.tree.scale(s, delta)), x)]

    def raised(lower: Any) -> Any:
        def upper(s: jax.Array) -> list[Any]:
            values, slopes = jvp(lower, s, jnp.ones_like(s))
            return [*values, slopes[-1]]

        return upper

    for _ in range(order):
        derivatives = raised(derivatives)
    terms = derivatives(jnp.zeros((), dtype))
    return jax.tree.map(lambda *d: sum(dk / math.factorial(k) for k, dk in enumerate(d)), *terms)


def taylor(f: ModelFunction, params0: Params, order: int) -> Partial:
    """Build the Taylor expansion of `f` in the parameters, of any order.

    f_taylor(params, x) = sum_k D^k f(params0, x)[delta, ..., delta] / k!,  delta = params - params0

    Parameters
    ----------
    f : ModelFunction
        `f(params, x) -> y`; may contain `custom_vjp` functions.
    params0 : pytree of floats
        The anchor.
    order : int
        The highest derivative, 0 or more; order 1 is `linearize`.

    Returns
    -------
    jax.tree_util.Partial
        A model function `f_taylor(params, x) -> y (N, *out)`.

    Raises
    ------
    TypeError
        If `f` is not callable, `params0` holds anything but floats, or `order` is no whole number.
    ValueError
        If `order` is negative; when called, if the parameters do not fit `params0`.

    Notes
    -----
    Nested forward mode along the line from `params0` to `params`; call it under `jit`, where XLA
    merges the copies that the nesting makes.

    References
    ----------
    Bai and Lee 2020, "Beyond linearization: on quadratic and higher-order approximation of wide
    neural networks".

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> f_quadratic = taylor(lambda w, x: (w * x) ** 2, jnp.float32(1.0), 2)
    >>> f_quadratic(jnp.float32(1.5), jnp.array([1.0, 2.0])).tolist()
    [2.25, 9.0]
    """
    f = checks.model_function(f)
    checks.floating("params0", params0)
    checks.whole("order", order, least=0)
    return Partial(_taylor, _Order(order), f, params0)


def _centered(f: ModelFunction, params0: Params, params: Params, x: PyTree) -> Any:
    return optax.tree.sub(f(params, x), f(params0, x))


def center(f: ModelFunction, params0: Params) -> Partial:
    """Subtract the function at the anchor, so that the model starts at 0.

    h(params, x) = f(params, x) - f(params0, x)

    Parameters
    ----------
    f : ModelFunction
    params0 : pytree
        The anchor.

    Returns
    -------
    jax.tree_util.Partial
        A model function, with the Jacobian of `f`.

    Raises
    ------
    TypeError
        If `f` is not callable or `params0` holds anything but floats.

    Notes
    -----
    Two evaluations of `f`. The difference cancels: near the anchor its absolute error is about
    eps |f|, which `scale` multiplies by alpha.

    References
    ----------
    Chizat, Oyallon, Bach 2019, "On lazy training in differentiable programming", section 1.
    """
    f = checks.model_function(f)
    checks.floating("params0", params0)
    return Partial(_centered, f, params0)


def _scaled(f: ModelFunction, alpha: ArrayLike, params: Params, x: PyTree) -> Any:
    return jax.tree.map(lambda y: jnp.asarray(alpha, y.dtype) * y, widened(f(params, x)))


def scale(f: ModelFunction, alpha: ArrayLike) -> Partial:
    """Multiply the output of a model by alpha.

    Parameters
    ----------
    f : ModelFunction
        Usually a centred model.
    alpha : float
        The output scale, above 0. The larger it is, the lazier the training of a centred model.

    Returns
    -------
    jax.tree_util.Partial
        A model function, of float32 outputs at least; its kernel is alpha^2 times that of `f`.

    Raises
    ------
    TypeError
        If `f` is not callable.
    ValueError
        If `alpha` is not positive and finite.

    Notes
    -----
    Divide the loss by alpha^2 (`lazyjax.training.scale_loss`) and the learning rate stays free of
    alpha.

    References
    ----------
    Chizat, Oyallon, Bach 2019, equation 2.
    """
    checks.positive("alpha", alpha)
    return Partial(_scaled, checks.model_function(f), alpha)


def output_scale(f: ModelFunction) -> Any:
    """Give alpha of a model made by `scale`, and None for any other."""
    return f.args[1] if isinstance(f, Partial) and f.func is _scaled else None
