"""Random features whose inner products are the kernel, made from the factors of the Jacobian.

A count sketch sends coordinate i of a vector to place h(i) with the sign s(i), and adds up what
meets there: inner products are kept in expectation. That of an outer product a (x) d is the
circular convolution of those of a and of d. So a part of the model is sketched without its gradient
where that is large, and through it where it is small, one part after the other.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lazyjax import checks, factors
from lazyjax.blocks import in_close_blocks
from lazyjax.centering import check_weights, forth
from lazyjax.factors import Factors, Shape, bias_jacobian, jacobian_of
from lazyjax.kernels import Request, check, jobs, kernels, only_output
from lazyjax.meshes import in_any_program
from lazyjax.types import ModelFunction, Params, PyTree, Wrt


class Sketch(NamedTuple):
    """Random features of a batch.

    Attributes
    ----------
    features : (N, *out, dimension)
        z, with E[z(x)_k . z(x')_l] = Theta(x, x')_kl.
    error : float
        norm(Z - Theta)_F / norm(Theta)_F, Z the inner products of the features, on pairs of
        examples that were drawn for it.
    standard_error : float
        Of the error, from the spread over those examples.
    """

    features: jax.Array
    error: float
    standard_error: float


class _Hash(NamedTuple):
    """Places and signs for P coordinates, as even as can be: none gets two before all have one."""

    order: jax.Array  # (turns D,): the coordinate at turn t and place i, or P for none
    signs: jax.Array  # (turns D,), in that order; 0 for none


def _hash(key: jax.Array, size: int, dimension: int, dtype: DTypeLike) -> _Hash:
    slots = -(-size // dimension) * dimension
    order_key, sign_key = jax.random.split(key)
    order = jax.random.permutation(order_key, slots)
    signs = jax.random.rademacher(sign_key, (slots,), dtype)
    return _Hash(jnp.minimum(order, size), jnp.where(order < size, signs, 0))


def _sketched(own: _Hash, values: jax.Array, dimension: int) -> jax.Array:
    """Sketch (.., P) to (.., dimension)."""
    size, lead = values.shape[-1], values.shape[:-1]
    taken = jnp.take(values, jnp.minimum(own.order, size - 1), axis=-1)
    taken = taken * own.signs.reshape((1,) * len(lead) + (-1,))
    return jnp.sum(taken.reshape(*lead, -1, dimension), -2)


def _sketched_tokens(own: _Hash, tokens: jax.Array, dimension: int) -> jax.Array:
    """Sketch one-hot vectors: (n, s) to (n, 1, s, dimension); a token below 0 is none."""
    slot = jnp.argsort(own.order)[jnp.maximum(tokens, 0)]
    signs = jnp.where(tokens >= 0, own.signs[slot], 0)
    places = jax.nn.one_hot(slot % dimension, dimension, dtype=signs.dtype)
    return (signs[..., None] * places)[:, None]


class _Way(NamedTuple):
    """How a part is sketched."""

    hashes: Callable[[jax.Array, Shape, int, Any], Any]  # key, shape, dimension, dtype
    apply: Callable[[Any, Factors, Shape, int], jax.Array]  # hashes, factors (n, ..) -> (n, k, D)


def _gradient_hash(key: jax.Array, shape: Shape, dimension: int, dtype: DTypeLike) -> _Hash:
    return _hash(key, shape.b * shape.p * shape.q, dimension, dtype)


def _through_gradient(own: _Hash, f: Factors, shape: Shape, dimension: int) -> jax.Array:
    """Form the Jacobian of a part, (n, k, P), and sketch it."""
    return _sketched(own, jax.vmap(lambda one: jacobian_of(one, shape))(f), dimension)


def _factor_hashes(key: jax.Array, shape: Shape, dimension: int, dtype: DTypeLike) -> Any:
    left, right = jax.random.split(key)
    if shape.tokens:
        first = _hash(left, shape.tokens, dimension, dtype)
    else:
        every = partial(_hash, size=shape.p, dimension=dimension, dtype=dtype)
        first = jax.vmap(every)(jax.random.split(left, shape.b))
    every = partial(_hash, size=shape.q, dimension=dimension, dtype=dtype)
    return first, jax.vmap(every)(jax.random.split(right, shape.b))


def _through_factors(hashes: Any, f: Factors, shape: Shape, dimension: int) -> jax.Array:
    """Sketch sum_bs a_bs (x) d_kbs, each b with hashes of its own."""
    left, right = hashes
    each = partial(_sketched, dimension=dimension)
    if shape.tokens:
        a = _sketched_tokens(left, f.a, dimension)
    else:
        a = jax.vmap(each, (0, 1), 1)(left, f.a)
    d = jax.vmap(each, (0, 2), 2)(right, f.d)
    both = jnp.einsum("nbsf,nkbsf->nkf", jnp.fft.rfft(a), jnp.fft.rfft(d))
    return jnp.fft.irfft(both, dimension)


GRADIENT = _Way(_gradient_hash, _through_gradient)
FACTORS = _Way(_factor_hashes, _through_factors)
_FFT = 8  # multiply-adds of a transform of length D, over D log2(D), with what goes with it


def _way(shape: Shape, dimension: int) -> _Way:
    """Choose the cheaper way to sketch a part."""
    k, positions = shape.outputs, shape.b * shape.s
    if shape.mixed:
        return GRADIENT
    formed = k * shape.b * shape.q * ((0 if shape.tokens else shape.s * shape.p) + shape.p)
    transforms = (positions * (1 + k) + k) * _FFT * dimension * math.log2(max(2, dimension))
    return GRADIENT if formed < transforms else FACTORS


@partial(jax.jit, static_argnames="dimension")
def _features(key: jax.Array, request: Request, *, dimension: int) -> jax.Array:
    """Compute the features (N, K, dimension), block by block and part by part."""
    (job,) = jobs(request)
    model = factors.require_reverse(job.model, "a sketch of its kernel")
    plan = factors.plan(model.jaxpr, len(model.w), lambda shape: factors.FACTORS, apart=False)
    made = partial(factors.features, plan, model.w)
    like = jax.eval_shape(made, jax.tree.map(lambda a: jnp.asarray(a)[:1], request.x1))
    pairs, plain = like.get("factors", {}), like.get("jacobian", {})
    shapes = {i: plan.shapes[i]._replace(b=own.d.shape[2]) for i, own in pairs.items()}
    dtype = model.jaxpr.out_avals[0].dtype

    # one draw for all blocks
    keys = iter(jax.random.split(key, 2 * len(shapes) + len(plain) + 1))
    ways = {i: _way(shape, dimension) for i, shape in shapes.items()}
    hashes = {i: ways[i].hashes(next(keys), s, dimension, dtype) for i, s in shapes.items()}
    biases = {
        i: _hash(next(keys), s.b * s.q, dimension, dtype) for i, s in shapes.items() if s.bias
    }
    rest = {i: _hash(next(keys), j.shape[-1], dimension, dtype) for i, j in plain.items()}

    def of_block(x: PyTree) -> jax.Array:
        features = made(x)
        shares = []
        for i, shape in shapes.items():
            own = features["factors"][i]
            shares.append(ways[i].apply(hashes[i], own, shape, dimension))
            if i in biases:
                bias = jax.vmap(bias_jacobian)(own.d, own.bias)
                shares.append(_sketched(biases[i], bias, dimension))
        shares += [_sketched(rest[i], features["jacobian"][i], dimension) for i in rest]
        return sum(shares[1:], shares[0])

    with request.options.in_force():
        return in_close_blocks(of_block, request.x1, plan.jaxpr)


@in_any_program()
def sketch(
    key: jax.Array,
    f: ModelFunction,
    params: Params,
    x: PyTree,
    *,
    dimension: int,
    wrt: Wrt | None = None,
    outputs: Sequence[int] | None = None,
    pairs: int = 256,
    precision: str = "highest",
    center: bool = False,
    weights: Any = None,
) -> Sketch:
    """Make random features whose inner products are the empirical NTK in expectation.

    E[z(x)_k . z(x')_l] = <df_k(x) / dparams, df_l(x') / dparams>

    Parameters
    ----------
    key : key
        Of the hashes and of the pairs. Batches whose features are to be multiplied need the same
        one: `jax.random.clone(key)`.
    f, params, x, wrt, outputs, precision
        As for `ntk`; f with one output array.
    dimension : int
        D, of the features.
    pairs : int
        Pairs of different examples on which the error is measured, about as many, drawn from x.
    center, weights
        As for `ntk`: of the features the mean is taken away, and each is multiplied by the root of
        its weight. The error is that of the features as they were before.

    Returns
    -------
    Sketch

    Raises
    ------
    TypeError
        As `ntk`, or if f has more than one output array, or `dimension` or `pairs` is no whole
        number.
    ValueError
        As `ntk`, or if f has no reverse mode, or `dimension` or `pairs` is below 1.

    Notes
    -----
    The gradient of all parameters is never formed: a large product is sketched from its factors, at
    O(D log D) a position and output, a small one through its own gradient, and then forgotten. An
    inner product errs by about sqrt((|J|^2 |J'|^2 + (J . J')^2) / D), by up to three times that for
    parts that are sketched from their factors. The trace kernel is
    einsum("nkd,mkd->nm", z, z) / K.

    References
    ----------
    Charikar, Chen, Farach-Colton 2002, "Finding frequent items in data streams" (count sketch).
    Pham and Pagh 2013, "Fast and scalable polynomial kernels via explicit feature maps" (of outer
    products). Zandieh, Han, Avron, Shoham, Kim, Shin 2021, "Scaling neural tangent kernels via
    sketching and random features".

    Examples
    --------
    >>> f = lambda w, x: jnp.tanh(x @ w)
    >>> z = sketch(jax.random.key(0), f, jnp.ones((2, 3)), jnp.ones((4, 2)), dimension=50).features
    >>> z.shape
    (4, 3, 50)
    """
    checks.whole("dimension", dimension, least=1)
    checks.whole("pairs", pairs, least=1)
    checks.flag("center", center)
    own = check_weights(weights, checks.batch("x", x))
    request = check(f, params, x, wrt=wrt, outputs=outputs, precision=precision)
    out, _ = only_output(request, "a sketch")
    hash_key, pair_key = jax.random.split(key)
    z = _features(hash_key, request, dimension=dimension)
    n = request.n1
    side = min(math.ceil(pairs**0.5), max(1, n // 2))
    chosen = jax.random.permutation(pair_key, n)
    one, other = (chosen[:side], chosen[side : 2 * side]) if n > 1 else (chosen, chosen)
    x1, x2 = (jax.tree.map(lambda a, i=i: jnp.asarray(a)[i], x) for i in (one, other))
    (exact,) = jax.tree.leaves(kernels(request.of(x1, x2)))
    exact = exact.reshape(*exact.shape[:2], z.shape[1], z.shape[1])
    products = jnp.einsum("nkd,mld->nmkl", z[one], z[other], precision=precision)
    error, standard_error = _error(np.asarray(products), np.asarray(exact))
    z = forth(z, own, center=center)
    return Sketch(z.reshape(n, *out, dimension), error, standard_error)


def _error(products: np.ndarray, exact: np.ndarray) -> tuple[float, float]:
    """Give the relative error, and its standard error by the jackknife over the examples."""
    products, exact = products.astype(np.float64), exact.astype(np.float64)
    missed = np.sum((products - exact) ** 2, (2, 3))
    whole = np.sum(exact**2, (2, 3))

    def ratio(missed: np.ndarray, whole: np.ndarray) -> float:
        return float((missed.sum() / whole.sum()) ** 0.5) if whole.any() else 0.0

    def without(i: int) -> float:
        return ratio(np.delete(missed, i, 0), np.delete(whole, i, 0))

    n = len(missed)
    each = np.array([without(i) for i in range(n)]) if n > 1 else np.full(2, np.nan)
    spread = float(np.sqrt((n - 1) * np.mean((each - each.mean()) ** 2)))
    return ratio(missed, whole), spread
