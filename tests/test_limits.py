import math
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from thoroughness import few

from lazyjax import infinite, ntk
from lazyjax.models import from_linen

X = np.random.default_rng(0).normal(size=(4, 3))
W2 = (np.zeros((3, 16)), np.zeros((16, 16)), np.zeros((16, 1)))
OTHER = np.random.default_rng(1).normal(size=(3, 3))


def erf(z):
    return jax.scipy.special.erf(z)


# E phi phi' and E dphi dphi' of k11, k12, k22, from the papers, by the angle
def of_relu(a, c, b):
    angle = np.arccos(np.clip(c / np.sqrt(a * b), -1, 1))
    rest = np.sqrt(np.maximum(a * b - c**2, 0))
    return (rest + (np.pi - angle) * c) / (2 * np.pi), (np.pi - angle) / (2 * np.pi)


def of_abs(a, c, b):
    one, slope = of_relu(a, c, b)
    other, opposite = of_relu(a, -c, b)
    return 2 * (one + other), 2 * (slope - opposite)


def of_erf(a, c, b):
    product = (1 + 2 * a) * (1 + 2 * b)
    return (
        2 / np.pi * np.arcsin(2 * c / np.sqrt(product)),
        4 / np.pi / np.sqrt(product - 4 * c**2),
    )


def of_sin(a, c, b):
    decay = np.exp(-(a + b) / 2)
    return decay * np.sinh(c), decay * np.cosh(c)


CLOSED = {
    "relu": (jax.nn.relu, of_relu),
    "abs": (jnp.abs, of_abs),
    "erf": (erf, of_erf),
    "sin": (jnp.sin, of_sin),
}


def mlp(phi, *, ntk_parametrised):
    def f(layers, x):
        for i, (w, b) in enumerate(layers):
            x = phi(x) if i else x
            x = (
                1.2 * x @ w / math.sqrt(w.shape[0]) + 0.3 * b[None]
                if ntk_parametrised
                else x @ w + b[None]
            )
        return x

    return f


def layers_of(depth, *, width=16):
    sizes = [3, *[width] * depth, 2]
    return [(jnp.zeros((a, b)), jnp.zeros(b)) for a, b in pairwise(sizes)]


def by_recursion(dual, depth, x1, x2, *, width=None):
    """The recursion over layers, written for numbers; with a width in standard parametrisation."""

    def run(a, b, exact):
        def inner(u, v):
            return (u @ v) / 3

        ks = [inner(a, a), inner(a, b), inner(b, b)]
        k11, k12, k22 = (1.44 * k + 0.09 for k in ks)
        theta = (3 * ks[1] if width else 1.44 * ks[1]) + (1 if width else 0.09)
        for _ in range(depth):
            if exact:
                k12 = k11 = k22
            (s11, _), (s12, d12), (s22, _) = (
                dual(k11, k11, k11),
                dual(k11, k12, k22),
                dual(k22, k22, k22),
            )
            theta = 1.44 * d12 * theta + (width * s12 + 1 if width else 1.44 * s12 + 0.09)
            k11, k12, k22 = (1.44 * s + 0.09 for s in (s11, s12, s22))
        return k12, theta

    pairs = [[run(np.asarray(a), np.asarray(b), a is b) for b in x2] for a in x1]
    return np.moveaxis(np.array(pairs), -1, 0)


@few("depth", [2, 1, 10])
@few("name", ["erf", "relu", "abs", "sin"], 2)
@few("ntk_parametrised", [False, True])
def test_deep_networks_follow_the_recursion_of_the_papers(name, depth, ntk_parametrised):
    phi, dual = CLOSED[name]
    layers = layers_of(depth)
    variance = 1.0 if ntk_parametrised else [(1.44 / w.shape[0], 0.09) for w, _ in layers]
    f = mlp(phi, ntk_parametrised=ntk_parametrised)
    found = infinite(f, layers, X, OTHER, variance=variance)
    wanted = by_recursion(dual, depth, X, OTHER, width=None if ntk_parametrised else 16)
    np.testing.assert_allclose(found.nngp, wanted[0], rtol=1e-12)
    np.testing.assert_allclose(found.ntk, wanted[1], rtol=1e-12)
    assert found.error == 0


@few("depth", [3, 5])
@few("name", ["sin", "relu", "abs", "erf"])
def test_an_example_with_itself_is_exact(name, depth):
    phi, dual = CLOSED[name]
    f = mlp(phi, ntk_parametrised=True)
    found = infinite(f, layers_of(depth), X, variance=1.0)
    rows = list(X)
    wanted = by_recursion(dual, depth, rows, rows)
    np.testing.assert_allclose(np.diag(found.ntk), np.diag(wanted[1]), rtol=1e-12)
    np.testing.assert_allclose(found.ntk, wanted[1], rtol=1e-12)


@few("phi", [jax.nn.relu, jax.nn.gelu])
@few("options", [{"batch_size": 3}, {"batch_size": 1}, {"memory": "1MB"}, {}])
def test_kernels_are_symmetric_to_the_last_bit_whatever_the_tiles(phi, options):
    f, layers = mlp(phi, ntk_parametrised=True), layers_of(2)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(11, 3)))
    whole = infinite(f, layers, x, x, variance=1.0)
    found = infinite(f, layers, x, variance=1.0, **options)
    for kernel, same in ((found.nngp, whole.nngp), (found.ntk, whole.ntk)):
        assert np.array_equal(kernel, kernel.T)
        np.testing.assert_allclose(kernel, same, rtol=1e-12)


def quadrature_of(phi, k):
    """E phi phi' on a grid of two dimensions."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    root = np.linalg.cholesky(k)
    z = root @ np.stack([g.ravel() for g in np.meshgrid(nodes, nodes, indexing="ij")])
    values = np.prod(jax.jit(phi)(z), axis=0)
    return np.outer(weights, weights).ravel() @ values


SMOOTH = {
    "softplus": jax.nn.softplus,
    "silu": jax.nn.silu,
    "gelu by tanh": jax.nn.gelu,
    "gaussian": lambda z: jnp.exp(-jnp.square(z)),
    "exact gelu": lambda z: jax.nn.gelu(z, approximate=False),
    "cubic": lambda z: 1 + z - 2 * z**2 + z**3 / 3,
    "cos": jnp.cos,
}


@few("name", SMOOTH)
def test_smooth_activations_are_a_grid_of_two_dimensions(name):
    phi = SMOOTH[name]
    x = 0.7 * np.asarray(X[:2])

    def f(w, x):
        return phi(x @ w[0]) @ w[1] / 4

    w = (jnp.zeros((3, 16)), jnp.zeros((16, 1)))
    found = infinite(f, w, x, variance=1.0)
    k = x @ x.T
    slope = quadrature_of(jax.vmap(jax.vmap(jax.grad(phi))), k)
    np.testing.assert_allclose(found.nngp[0, 1], quadrature_of(phi, k), rtol=1e-10)
    np.testing.assert_allclose(found.ntk[0, 1], quadrature_of(phi, k) + k[0, 1] * slope, rtol=1e-10)
    assert found.error < 1e-8


# each by its pieces from low to high, a + b z + c exp(z), 0 elsewhere
KINKS = {
    "elu": (jax.nn.elu, [(-np.inf, 0, -1, 0, 1), (0, np.inf, 0, 1, 0)]),
    "hard tanh": (jax.nn.hard_tanh, [(-np.inf, -1, -1, 0, 0), (-1, 1, 0, 1, 0), (1, np.inf, 1, 0, 0)]),
    "relu6": (jax.nn.relu6, [(0, 6, 0, 1, 0), (6, np.inf, 6, 0, 0)]),
    "hard sigmoid": (jax.nn.hard_sigmoid, [(-3, 3, 1 / 2, 1 / 6, 0), (3, np.inf, 1, 0, 0)]),
    "shifted relu": (lambda z: jax.nn.relu(z - 0.4), [(0.4, np.inf, -0.4, 1, 0)]),
    "soft threshold": (
        lambda z: jnp.sign(z) * jnp.maximum(jnp.abs(z) - 0.3, 0),
        [(-np.inf, -0.3, 0.3, 1, 0), (0.3, np.inf, -0.3, 1, 0)],
    ),
}  # fmt: skip # to be read as a table


def value_of(pieces, z):
    return sum(
        np.where((low < z) & (z < high), a + b * z + c * np.exp(np.minimum(z, high)), 0)
        for low, high, a, b, c in pieces
    )


@np.vectorize
def normal_cdf(z):
    return math.erfc(-z / math.sqrt(2)) / 2


def mean_given(pieces, m, s):
    """E g(z) for z of mean m and standard deviation s, in closed form."""
    total = 0
    for low, high, a, b, c in pieces:
        ends = (low - m) / s, (high - m) / s
        mass, moved = (normal_cdf(ends[1] - d) - normal_cdf(ends[0] - d) for d in (0, s))
        down = np.exp(-(ends[0] ** 2) / 2) - np.exp(-(ends[1] ** 2) / 2)
        total += (a + b * m) * mass + b * s * down / math.sqrt(2 * np.pi)
        total += c * np.exp(m + s**2 / 2) * moved
    return total


def by_pieces(pieces, k11, k12, k22):
    """E g(z) g(z'): given z in closed form, over z between kinks, closer where z' has them."""
    s, t = math.sqrt(k11), k12 / k11
    rest = math.sqrt(max(k22 - t * k12, 0))
    ends = np.array([end for piece in pieces for end in piece[:2] if np.isfinite(end)])
    near = np.array([0, 0.5, 1, 2, 3, 4, 6, 8]) * rest / abs(t)
    cuts = [s * np.arange(-10, 10.5, 0.5), ends]
    cuts += [end / t + sign * near for end in ends for sign in (-1, 1)]
    cuts = np.unique(np.clip(np.concatenate(cuts), -10 * s, 10 * s))
    nodes, weights = np.polynomial.legendre.leggauss(20)
    half = np.diff(cuts)[:, None] / 2
    z = cuts[:-1, None] + half * (1 + nodes)
    density = np.exp(-((z / s) ** 2) / 2) / (s * math.sqrt(2 * np.pi))
    inside = mean_given(pieces, t * z, rest) if rest > 1e-7 * s else value_of(pieces, t * z)
    return np.sum(half * weights * density * value_of(pieces, z) * inside)


@few("name", sorted(KINKS, key=lambda name: name != "shifted relu"))
def test_kinks_are_where_the_grid_is_cut(name):
    phi, pieces = KINKS[name]

    def f(w, x):
        return phi(x @ w[0]) @ w[1] / 4

    # far from each other, nearly parallel, nearly opposite, the same, and of small variance
    one, two, three = 0.8 * np.asarray(X[:3])
    x1 = np.stack([one, 0.01 * two])
    x2 = np.stack([two, 3 * three, one + 1e-3 * two, 1e-3 * three - one, one, 0.02 * two])
    found = infinite(
        f, (jnp.zeros((3, 16)), jnp.zeros((16, 1))), jnp.asarray(x1), jnp.asarray(x2), variance=1.0
    )
    k = x1 @ x2.T
    slopes = [(low, high, b, 0, c) for low, high, _, b, c in pieces]
    value, slope = (
        np.array([[by_pieces(g, u @ u, u @ v, v @ v) for v in x2] for u in x1])
        for g in (pieces, slopes)
    )
    z = np.linspace(-7.1, 7.2, 50)
    np.testing.assert_allclose(value_of(pieces, z), phi(jnp.asarray(z)), atol=1e-12)
    np.testing.assert_allclose(found.nngp, value, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose((found.ntk - found.nngp) / k, slope, atol=1e-8)


@pytest.mark.thorough
def test_the_mean_of_a_function_with_kinks_far_away_is_that_of_its_pieces():
    phi, pieces = KINKS["hard sigmoid"]

    def f(w, x):
        h = phi(x @ w[0])
        return (h - h.mean(-1, keepdims=True)) @ w[1] / 4

    x = np.asarray(X[:2]) * np.array([[0.05], [1.0]])
    found = infinite(f, (jnp.zeros((3, 16)), jnp.zeros((16, 1))), jnp.asarray(x), variance=1.0)
    k = x @ x.T
    mean = [mean_given(pieces, 0.0, math.sqrt(v)) for v in np.diag(k)]
    second = [[by_pieces(pieces, k[i, i], k[i, j], k[j, j]) for j in (0, 1)] for i in (0, 1)]
    np.testing.assert_allclose(found.nngp, second - np.outer(mean, mean), atol=1e-14)


# --- what is read off the operations ---


@few("phi", [jnp.sin, jnp.tanh])
def test_a_scan_is_its_layers_written_out(phi):
    def stacked(w, x):
        def layer(h, p):
            return h + phi(h) @ p[0] / 4 + p[1][None], None

        h, _ = jax.lax.scan(layer, x @ w[0], w[1])
        return h @ w[2] / 4

    def written(w, x):
        h = x @ w[0]
        for i in range(3):
            h = h + phi(h) @ w[1][0][i] / 4 + w[1][1][i][None]
        return h @ w[2] / 4

    w = (jnp.zeros((3, 16)), (jnp.zeros((3, 16, 16)), jnp.zeros((3, 16))), jnp.zeros((16, 1)))
    one, two = (infinite(f, w, X / 2, variance=0.5) for f in (stacked, written))
    np.testing.assert_allclose(one.ntk, two.ntk, rtol=1e-12)
    np.testing.assert_allclose(one.nngp, two.nngp, rtol=1e-12)


def test_a_table_of_tokens_is_a_product_with_one_hot_vectors():
    tokens = jnp.asarray([[0, 1, 1], [2, 1, 0], [3, 3, 3]])

    def looked_up(w, x):
        h = jax.nn.relu(w[0][x] + w[1][None])
        return h.mean(1) @ w[2] / 4

    def multiplied(w, x):
        h = jax.nn.relu(jax.nn.one_hot(x, 4) @ w[0] + w[1][None])
        return h.mean(1) @ w[2] / 4

    w = (jnp.zeros((4, 16)), jnp.zeros((3, 16)), jnp.zeros((16, 2)))
    one, two = (infinite(f, w, tokens, variance=1.0) for f in (looked_up, multiplied))
    np.testing.assert_allclose(one.ntk, two.ntk, rtol=1e-12)
    assert not np.allclose(one.ntk[0, 2], one.ntk[0, 1])


def masked(x, h):
    keep = x[..., :1] != 100.0
    return jnp.where(keep, h, 0).sum(1) / keep.sum(1)


def masked_by_weights(x, h):
    keep = (x[..., 0] != 100.0).astype(h.dtype)
    return jnp.einsum("ns,nsc->nc", keep / keep.sum(1, keepdims=True), h)


def resized(_, h):
    h = jax.image.resize(h, (len(h), 6, 16), "linear")
    return (h * np.arange(6.0)[None, :, None]).sum(1)


def resized_by_matrix(_, h):
    linear = jax.image.resize(jnp.eye(4), (6, 4), "linear")
    return jnp.einsum("ts,nsc,t->nc", linear, h, np.arange(6.0))


@few("pool, other", [(resized, resized_by_matrix), (masked, masked_by_weights)])
def test_masks_and_resizing_are_sums_over_positions(pool, other):
    x = np.random.default_rng(0).normal(size=(3, 4, 5))
    keep = np.array([[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]], bool)
    x[~keep] = 100.0

    def network(pool):
        return lambda w, x: pool(x, jax.nn.relu(x @ w[0])) @ w[1] / 4

    w = (np.zeros((5, 16)), np.zeros((16, 1)))
    one, two = (infinite(network(f), w, x, variance=0.5) for f in (pool, other))
    np.testing.assert_allclose(one.ntk, two.ntk, rtol=1e-12)
    np.testing.assert_allclose(one.nngp, two.nngp, rtol=1e-12)


def test_a_gate_of_two_halves_is_the_product_of_their_kernels():
    def f(w, x):
        a, b = jnp.split(x @ w[0], 2, -1)
        return (jax.nn.relu(a) * b) @ w[1] / 4

    found = infinite(f, (jnp.zeros((3, 32)), jnp.zeros((16, 1))), X, variance=1.0)
    k = np.asarray(X @ X.T)
    d = np.diag(k)
    value, slope = of_relu(d[:, None], k, d[None])
    np.testing.assert_allclose(found.nngp, value * k, rtol=1e-7)
    np.testing.assert_allclose(found.ntk, value * k + slope * k * k + value * k, rtol=1e-7)


@pytest.mark.thorough
def test_a_gate_by_one_field_is_a_function_of_it():
    def f(w, x):
        z = x @ w[0]
        return (z * jax.nn.sigmoid(z)) @ w[1] / 4

    def g(w, x):
        return jax.nn.silu(x @ w[0]) @ w[1] / 4

    w = (jnp.zeros((3, 16)), jnp.zeros((16, 1)))
    one, two = (infinite(h, w, X, variance=1.0) for h in (f, g))
    np.testing.assert_allclose(one.ntk, two.ntk, rtol=1e-12)


@pytest.mark.thorough
def test_functions_of_two_fields_are_integrated_over_four_variables():
    def f(w, x):
        return jnp.sin(x @ w[0] + jnp.cos(x @ w[1])) @ w[2] / 4

    w = (jnp.zeros((3, 16)), jnp.zeros((3, 16)), jnp.zeros((16, 1)))
    x = X[:2] / 2
    found = infinite(f, w, x, variance=1.0)
    # sin(u + v) = sin u cos v + cos u sin v, of independent u and v = cos(z)
    c, s = [], []
    for g, into in ((jnp.cos, c), (jnp.sin, s)):
        into.append(
            infinite(lambda w, x, g=g: g(jnp.cos(x @ w[1])) @ w[2] / 4, w, x, variance=1.0).nngp
        )
    sines = infinite(lambda w, x: jnp.sin(x @ w[0]) @ w[2] / 4, w, x, variance=1.0).nngp
    cosines = infinite(lambda w, x: jnp.cos(x @ w[0]) @ w[2] / 4, w, x, variance=1.0).nngp
    np.testing.assert_allclose(found.nngp, sines * c[0] + cosines * s[0], rtol=1e-8)


def test_weights_of_a_norm_count_by_their_derivatives():
    def norm(z, gamma, beta):
        z = z - z.mean(-1, keepdims=True)
        return z * jax.lax.rsqrt(jnp.square(z).mean(-1, keepdims=True)) * gamma[None] + beta[None]

    def f(w, x):
        return jax.nn.relu(norm(x @ w[0], w[1], w[2])) @ w[3] / 4

    w = (jnp.zeros((3, 16)), jnp.full(16, 2.0), jnp.zeros(16), jnp.zeros((16, 1)))
    found = infinite(f, w, X, variance=(1.0, None, None, 1.0))
    k = np.asarray(X @ X.T)
    rho = k / np.sqrt(np.outer(np.diag(k), np.diag(k)))
    value, slope = of_relu(1.0, np.clip(rho, -1, 1), 1.0)
    # of z = gamma u: of w4, of W by gamma^2 rho, of gamma by u phi'(z), of beta by 1
    wanted = 4 * value + 4 * rho * slope + value + slope
    np.testing.assert_allclose(found.ntk, wanted, rtol=1e-7)


def test_tokens_with_places_a_norm_and_a_pool_are_their_parts_by_hand():
    """Positions are selected, scaled and pooled on one side of a pair and not yet on the other."""
    tokens = np.asarray([[0, 1, 2, 1], [2, 2, 0, 1], [1, 0, 0, 2]])

    def f(w, x, gamma):
        h = w[0][x] + w[1][None]
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True)) * gamma
        return (h + 0.5 * jnp.flip(h, 1)).mean(1) @ w[2] / 4

    w = (jnp.zeros((3, 16)), jnp.zeros((4, 16)), jnp.zeros((16, 1)))
    scaled = infinite(
        lambda w, x: f(w[:3], x, w[3][None, None]),
        (*w, jnp.full(16, 1.5)),
        tokens,
        variance=(1.0, 1.0, 1.0, None),
    )
    # Gaussian of variance 2 everywhere: h / sqrt(2), pooled with its mirror image: 1.5 of the mean
    same = (tokens[:, None, :, None] == tokens[None, :, None]) + np.eye(4)
    k = 1.5**2 * (same / 2).mean((2, 3))
    np.testing.assert_allclose(scaled.nngp, 1.5**2 * k, rtol=1e-12)
    np.testing.assert_allclose(scaled.ntk, 1.5**2 * k + 1.5**2 * k + k, rtol=1e-12)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(32, bias_init=nn.initializers.normal(0.1))(x))
        x = nn.gelu(nn.Dense(32)(x))
        return nn.Dense(2)(x)


@pytest.mark.thorough
def test_a_module_of_flax_is_read_with_the_variances_of_its_initialisers():
    from lazyjax import variances

    module = Network()
    f, params = from_linen(module, jax.random.key(0), X)
    found = infinite(f, params, X, variance=variances(module, X))
    assert found.ntk.shape == (4, 4)
    assert np.linalg.eigvalsh(found.ntk).min() > 0


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.LayerNorm()(nn.Dense(32)(x)))
        return nn.Dense(2)(nn.relu(nn.Dense(32)(x)))


@pytest.mark.thorough
def test_biases_that_begin_at_0_are_of_variance_0_before_a_norm_too():
    from lazyjax import variances

    f, params = from_linen(Normed(), jax.random.key(0), X)
    given = variances(Normed(), X)
    found = infinite(f, params, X, variance=given)
    random = {name: leaf | {"bias": 0.0} for name, leaf in given.items() if "Dense" in name}
    wanted = infinite(f, params, X, variance=given | random)
    np.testing.assert_allclose(found.nngp, wanted.nngp, rtol=1e-12)
    np.testing.assert_allclose(found.ntk, wanted.ntk, rtol=1e-12)


@pytest.mark.thorough
def test_the_kernel_of_a_network_comes_near_with_its_width():
    def gaps(n):
        f = mlp(jnp.sin, ntk_parametrised=True)
        layers = layers_of(2, width=n)
        limit = infinite(f, layers, X, variance=1.0).ntk
        found = []
        for seed in range(8):
            drawn = optax.tree.random_like(jax.random.key(seed), layers, jax.random.normal)
            found.append(np.linalg.norm(ntk(f, drawn, X, reduce="trace") - limit))
        return np.sqrt(np.mean(np.square(found)))

    slope = math.log(gaps(512) / gaps(32)) / math.log(16)
    assert -0.75 < slope < -0.3


BESIDE = {
    "a jump": lambda z: z + jnp.sign(z),
    "a straight-through gradient": lambda z: z + jax.lax.stop_gradient(jnp.tanh(z) - z),
    "a rule of its own": lambda z: z + own_rule(z),
    "two fields": lambda z, y: z + y + jax.lax.stop_gradient(jnp.tanh(z + y)),
}


@jax.custom_jvp
def own_rule(z):
    return jnp.tanh(z)


own_rule.defjvps(lambda t, y, z: 3 * t)


@pytest.mark.thorough
@pytest.mark.parametrize("name", BESIDE)
def test_a_field_beside_a_function_of_it_does_not_ask_for_its_derivative(name):
    phi, x = BESIDE[name], X[:2] / 2
    w = (jnp.zeros((3, 16)), jnp.zeros((3, 16)), jnp.zeros((16, 1)))
    if name == "two fields":
        phi, several = (lambda z: z + jnp.tanh(z)), phi
        found = infinite(lambda w, x: several(x @ w[0], x @ w[1]) @ w[2] / 4, w, x, variance=0.5)
        k = np.asarray(x @ x.T)
    else:
        found = infinite(lambda w, x: phi(x @ w[0]) @ w[2] / 4, w, x, variance=1.0)
        k = np.asarray(x @ x.T)
    z = np.linspace(-8, 8, 2001)
    weights = np.exp(-(z**2) / 2) * (z[1] - z[0]) / np.sqrt(2 * np.pi)
    root = np.linalg.cholesky(k)
    one, two = root[0, 0] * z[:, None] + 0 * z, root[1, 0] * z[:, None] + root[1, 1] * z
    values = np.asarray(phi(jnp.asarray(one))) * np.asarray(phi(jnp.asarray(two)))
    scale = 0.5 if name == "two fields" else 1.0
    np.testing.assert_allclose(found.nngp[0, 1], scale * (weights @ values @ weights), atol=1e-4)


@pytest.mark.thorough
def test_a_function_of_jax_with_a_rule_of_its_own_keeps_the_rule():
    g = jax.custom_jvp(jnp.tanh)
    g.defjvps(lambda t, y, z: 3 * t)
    w = (jnp.zeros((3, 16)), jnp.zeros((16, 1)))
    found = infinite(lambda w, x: g(x @ w[0]) @ w[1] / 4, w, X / 2, variance=1.0)
    np.testing.assert_allclose(found.ntk - found.nngp, 9 * X @ X.T / 4, rtol=1e-10)


class Evaluated(nn.Module):
    train: bool | None  # None: without normalisation

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, use_bias=False, param_dtype=jnp.float64)(x)
        if self.train is not None:
            x = nn.BatchNorm(not self.train, epsilon=0.0, param_dtype=jnp.float64)(x)
        return nn.Dense(2, param_dtype=jnp.float64, name="out")(nn.relu(x))


@pytest.mark.thorough
def test_batch_normalisation_as_it_begins_adds_scales_and_shifts_in_evaluation_mode():
    from lazyjax import variances

    kernels = []
    for train in (None, False):
        module = Evaluated(train)
        f, params = from_linen(module, jax.random.key(0), X)
        kernels.append(infinite(f, params, X, variance=variances(module, X)))
    without, with_it = kernels
    np.testing.assert_allclose(with_it.nngp, without.nngp, rtol=1e-10)
    # by the scale u phi'(u) = phi(u), by the shift phi'(u), times the variance of the last weights
    k = np.asarray(X @ X.T) / 3
    d = np.diag(k)
    value, slope = of_relu(d[:, None], k, d[None])
    np.testing.assert_allclose(with_it.ntk - without.ntk, value + slope, rtol=1e-7)


@pytest.mark.thorough
def test_a_norm_of_positions_that_were_mixed_has_size_1():
    mix = jnp.asarray(np.random.default_rng(4).normal(size=(3, 3)))

    def f(w, x):
        h = x @ w[0]
        h = h + jnp.einsum("st,ntd->nsd", mix, jax.nn.gelu(h))
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True))
        return h[:, 1] @ w[1] / 4

    x = jnp.asarray(np.random.default_rng(5).normal(size=(4, 3, 2)))
    w = (jnp.zeros((2, 16)), jnp.zeros((16, 1)))
    found = infinite(f, w, x, variance=1.0)
    np.testing.assert_allclose(np.diag(found.nngp), 1.0, rtol=1e-12)
    assert np.abs(found.nngp[0, 1]) < 0.99


def test_masks_of_the_input_are_what_multiplies():
    def chosen(w, x):
        h = jax.nn.relu(x["h"] @ w[0])
        return jnp.where(x["mask"][..., None], h, 0).sum(1) @ w[1] / 4

    def multiplied(w, x):
        h = jax.nn.relu(x["h"] @ w[0])
        return (h * x["mask"][..., None]).sum(1) @ w[1] / 4

    rng = np.random.default_rng(3)
    x = {
        "h": jnp.asarray(rng.normal(size=(4, 5, 3))),
        "mask": jnp.asarray(rng.random((4, 5)) > 0.4),
    }
    w = (jnp.zeros((3, 16)), jnp.zeros((16, 1)))
    one, two = (infinite(f, w, x, variance=1.0) for f in (chosen, multiplied))
    np.testing.assert_allclose(one.ntk, two.ntk, rtol=1e-12)


@pytest.mark.thorough
def test_an_error_is_relative_to_the_functions_and_not_to_an_expectation_of_0():
    def f(w, x):
        h = jax.nn.relu(x @ w[0])
        return (h + jnp.tanh(h @ w[1] / 4)) @ w[2] / 4

    assert infinite(f, W2, X / 2, variance=1.0).error < 1e-6


# --- what is refused ---

REFUSED = {
    "a recurrent weight": (
        lambda w, x: jnp.tanh(jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]) @ w[1]) @ w[2],
        "used twice",
    ),
    "a transposed weight": (
        lambda w, x: jnp.tanh(jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]) @ w[1].T) @ w[2],
        "used twice",
    ),
    "logits of attention": (
        lambda w, x: jnp.einsum("na,nb->nab", x @ w[0], x @ w[1][:3]).sum(-1) @ w[2],
        "product of two fields",
    ),
    "a softmax over the width": (
        lambda w, x: jax.nn.softmax(x @ w[0]) @ w[2],
        "reduce_max",
    ),
    "the largest of positions": (
        lambda w, x: jnp.max(jnp.tanh(x[:, :, None] * w[0][:1][None]), 1) @ w[2],
        "reduce_max",
    ),
    "a readout without weights": (
        lambda w, x: jnp.tanh(x @ w[0]).sum(-1, keepdims=True) / 4,
        "sum over the width",
    ),
    "a mean without weights": (
        lambda w, x: jnp.tanh(x @ w[0]).mean(-1, keepdims=True),
        "not random",
    ),
    "a wide axis that meets the output": (
        lambda w, x: x @ w[0] + jnp.tanh(x @ w[0][:, ::1]) @ w[1],
        "used twice",
    ),
    "a skip to the output": (
        lambda w, x: (lambda z: z + jnp.tanh(z) @ w[1])(x @ w[0]),
        "wide axis that meets the output",
    ),
    "weights that are multiplied": (
        lambda w, x: jnp.tanh(x @ (w[0] @ w[1])) @ w[2],
        "product of two weights",
    ),
    "normalised weights": (
        lambda w, x: jnp.tanh(x @ (w[0] / jnp.linalg.norm(w[0]))) @ w[2],
        "sum over the width|used twice",
    ),
    "weights that depend on each other": (
        lambda w, x: jnp.tanh(jnp.tanh(x @ w[0]) @ (w[1] + w[1].T)) @ w[2],
        "used twice",
    ),
    "the input beside the width": (
        lambda w, x: jnp.tanh(x @ w[0][:, :3] + x) @ w[2][:3],
        "along the width",
    ),
    "numbers that differ over the width": (
        lambda w, x: jnp.tanh((x @ w[0]) * jnp.arange(16.0)[None]) @ w[2],
        "differ from channel to channel",
    ),
    "channels in another order": (
        lambda w, x: jnp.tanh(x @ w[0])[:, ::-1] @ w[2],
        "channels in another order",
    ),
    "a scale of all channels": (
        lambda w, x: jnp.tanh(x @ w[0] + w[2][:1]) @ w[1][:, :1],
        "several channels share",
    ),
    "a slope of all channels": (
        lambda w, x: jax.nn.relu(x @ w[0]) * w[2][0, 0] @ w[1][:, :1],
        "several channels share|the weight 2",
    ),
    "an output at every position": (
        lambda w, x: (jnp.tanh(x[:, :, None] * w[0][:1][None]) @ w[2])[..., 0],
        "outputs that differ",
    ),
    "a complex transform": (
        lambda w, x: jnp.abs(jnp.fft.fft(x @ w[0])) @ w[2],
        "fft",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_limit_is_refused_by_name(name):
    f, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        infinite(f, W2, X, variance=1.0)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"variance": -1.0}, ValueError, "`variance` of 0 must be 0 or more"),
        ({"variance": "lecun"}, TypeError, "`variance` of 0 must be one number"),
        ({"variance": (1.0, (1.0, 2.0), 1.0)}, ValueError, "`variance` must be a number, a func"),
        ({"variance": (1.0, "x", 1.0)}, TypeError, "`variance` of 1 must be one number"),
        ({"variance": (1.0, None, 1.0)}, ValueError, "the matrix 1, which is not random"),
        ({"degree": 4}, ValueError, "`degree` must be at least 16"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        pytest.param(
            *({"memory": "1kB"}, ValueError, "`memory` must be at least"),
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_bad_arguments_are_told(change, kind, text):
    def f(w, x):
        return jax.nn.relu(jax.nn.relu(x @ w[0]) @ w[1]) @ w[2]

    with pytest.raises(kind, match=text):
        infinite(f, W2, X, **{"variance": 1.0, **change})


def test_examples_that_see_each_other_are_refused():
    def f(w, x):
        return jnp.tanh((x - x.mean(0, keepdims=True)) @ w[0]) @ w[2]

    with pytest.raises(ValueError, match="examples"):
        infinite(f, W2, X, variance=1.0)


def test_a_rough_quadrature_is_told():
    def f(w, x):
        return jnp.tanh(20 * x @ w[0]) @ w[2]

    with pytest.warns(UserWarning, match="larger degree"):
        infinite(f, W2, X, variance=1.0, degree=16)


@few("depth", [1, 2])
def test_it_runs_under_jit_and_in_float32(depth):
    f, layers = mlp(jax.nn.relu, ntk_parametrised=True), layers_of(depth)
    wanted = infinite(f, layers, X, OTHER, variance=1.0)
    found = jax.jit(lambda x, y: infinite(f, layers, x, y, variance=1.0))(X, OTHER)
    np.testing.assert_allclose(found.ntk, wanted.ntk, rtol=1e-12)
    small = jax.tree.map(lambda w: w.astype(jnp.float32), (layers, X, OTHER))
    single = infinite(f, *small, variance=1.0)
    assert single.ntk.dtype == jnp.float32
    np.testing.assert_allclose(single.ntk, wanted.ntk, rtol=1e-5)


def test_shapes_are_enough_for_what_is_random():
    f, layers = mlp(jax.nn.relu, ntk_parametrised=True), layers_of(1)
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), layers)
    one, two = (infinite(f, w, X, variance=1.0) for w in (layers, shapes))
    assert np.array_equal(one.ntk, two.ntk)
    with pytest.raises(TypeError, match="`params` must hold the values"):
        infinite(f, shapes, X, variance=lambda path, shape: 1.0 if len(shape) == 2 else None)
