"""Inputs that once gave a wrong kernel without a word, or a crash; each stands for a kind.

Every method, whole and leaf by leaf, is held against the dense Jacobian, and so are the products of
the operator that keeps features, and `verify` runs on each.
"""

from functools import partial
from itertools import product

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from kernel_models import normal
from kernel_reference import check_leaves, check_whole, jacobians, leaf_kernels, quickly
from thoroughness import few

from lazyjax import (
    estimate,
    explain,
    kernel_store,
    matrix,
    ntk,
    ntk_operator,
    sketch,
    verify,
)
from lazyjax.kernels import METHODS

N, V = 5, 6
X = normal(0, N, 4)
IMAGES = normal(1, N, 4, 4, 2)
TOKENS = np.random.default_rng(2).integers(0, V, N)


def weights(**shapes):
    return {name: jnp.asarray(normal(i, *s) / 2) for i, (name, s) in enumerate(shapes.items())}


DENSE = weights(w=(4, 5), b=(5,), c=(5, 2))
CONV = weights(w=(3, 3, 2, 5), b=(5,), c=(5, 2))
TABLE = weights(t=(V, 5), b=(5,), c=(5, 2))
STACK = weights(w=(3, 4, 4), b=(3, 4), c=(4, 2))


def dense(before_w, before_b):
    return lambda p, x: jnp.tanh(x @ before_w(p["w"]) + before_b(p["b"])) @ p["c"]


def convolved(before_w, before_b):
    def f(p, x):
        y = lax.conv_general_dilated(
            x, before_w(p["w"]), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.tanh(y + before_b(p["b"])).mean((1, 2)) @ p["c"]

    return f


def looked_up(before_t, before_b):
    return lambda p, i: jnp.tanh(before_t(p["t"])[i] + before_b(p["b"])) @ p["c"]


def scanned(before_w, before_b):
    def f(p, x):
        def step(h, layer):
            w, b = layer
            return jnp.tanh(h @ before_w(w) + before_b(b)), None

        return lax.scan(step, x, (p["w"], p["b"]))[0] @ p["c"]

    return f


SAME = lambda w: w  # noqa: E731 (a function of one line)
FACTORS = {
    "0.1 b": (SAME, lambda b: 0.1 * b),
    "b / 2": (SAME, lambda b: b / 2),
    "-b": (SAME, lambda b: -b),
    "3 w": (lambda w: 3 * w, SAME),
    "w / sqrt(n) and 0.3 b": (lambda w: w / 5**0.5, lambda b: 0.3 * b),
    "-2 w and -2 b": (lambda w: -2 * w, lambda b: -2 * b),
    "1e-9 b": (SAME, lambda b: 1e-9 * b),
    "b + 1": (SAME, lambda b: b + 1),
    "0.5 - b": (SAME, lambda b: 0.5 - b),
    "w + 0.1": (lambda w: w + 0.1, lambda b: 2 * b),
    "b by channel": (SAME, lambda b: b * np.arange(1.0, 1 + b.shape[-1])),
    "a flipped b": (SAME, lambda b: 0.5 * b[::-1]),
}
LAYERS = {
    "dense": (dense, DENSE, X),
    "convolution": (convolved, CONV, IMAGES),
    "lookup": (looked_up, TABLE, TOKENS),
    "scan": (scanned, STACK, X),
}
KINDS = {
    f"{layer}: {name}": (make(*factors), params, x)
    for layer, (make, params, x) in LAYERS.items()
    for name, factors in FACTORS.items()
}


def orders(view):
    """Look one table up twice, in two orders."""
    return lambda p, i: jnp.tanh(view(p["t"])[i] + p["t"][(2 * i + 1) % V]) @ p["c"]


VIEWS = {
    "flipped": lambda t: t[::-1],
    "permuted": lambda t: t.reshape(2, 3, 5).swapaxes(0, 1).reshape(V, 5),
    "rolled": lambda t: jnp.roll(t, 2, 0),
    "flipped features": lambda t: t[:, ::-1],
    "flipped and scaled": lambda t: -0.5 * t[::-1],
    "flipped twice": lambda t: t[::-1][::-1],
}
KINDS |= {f"two lookups, one {name}": (orders(view), TABLE, TOKENS) for name, view in VIEWS.items()}
KINDS |= {
    "two lookups, both flipped": (
        lambda p, i: jnp.tanh(p["t"][::-1][i] + p["t"][::-1][(i + 1) % V]) @ p["c"],
        TABLE,
        TOKENS,
    ),
    "a flipped lookup and a decoder": (
        lambda p, i: jnp.tanh(p["t"][::-1][i]) @ p["t"].T,
        TABLE,
        TOKENS,
    ),
    "a slice and the rest, flipped": (
        lambda p, i: jnp.tanh(p["t"][:3][::-1][i % 3] + p["t"][3:][i % 3]) @ p["c"],
        TABLE,
        TOKENS,
    ),
}
KINDS |= {
    "a norm of Gemma": (lambda p, x: jnp.tanh((x @ p["w"]) * (1 + p["b"])) @ p["c"], DENSE, X),
    "a literal minus a weight": (lambda p, x: jnp.sin(x @ (0.3 - p["w"])) @ p["c"], DENSE, X),
    "softplus of a weight": (
        lambda p, x: jnp.tanh(x @ (jax.nn.softplus(p["w"]) + 1e-3)) @ p["c"],
        DENSE,
        X,
    ),
    "hard_swish": (lambda p, x: jax.nn.hard_swish(x @ p["w"] + p["b"]) @ p["c"], DENSE, X),
    "sparse_plus": (lambda p, x: jax.nn.sparse_plus(x @ p["w"] + p["b"]) @ p["c"], DENSE, X),
    "a literal in a power and a maximum": (
        lambda p, x: jnp.maximum(2.0, 3 + x @ p["w"]) ** p["b"] @ (p["c"] - 1),
        DENSE,
        X,
    ),
}


@pytest.fixture(autouse=True)
def _promotion():
    with jax.numpy_rank_promotion("allow"):
        yield


FIRST = ["scan: 0.5 - b", "convolution: b by channel"]
ORDERED_KINDS = FIRST + [name for name in KINDS if name not in FIRST]


@few("name", ORDERED_KINDS, len(FIRST))
def test_every_way_to_the_kernel_is_the_dense_jacobian(name):
    f, params, x = KINDS[name]
    (j,) = jacobians(f, params, x)
    expected = leaf_kernels([j], [j])
    methods = METHODS if name.endswith(("0.1 b", "flipped", "Gemma")) else ["auto"]

    def kernels(params, x):
        return [
            (ntk(f, params, x, method=m), ntk(f, params, x, method=m, per_leaf=True))
            for m in methods
        ]

    for whole, leaves in quickly(kernels, params, x):
        check_whole(whole, expected)
        check_leaves(leaves, expected)


@few("name", ["lookup: -2 w and -2 b", *(k for k in KINDS if k != "lookup: -2 w and -2 b")])
def test_an_operator_that_keeps_features_multiplies_by_the_dense_jacobian(name):
    f, params, x = KINDS[name]
    (j,) = jacobians(f, params, x)
    dense = np.concatenate([leaf.reshape(-1, leaf.shape[-1]) for leaf in j], 1)
    v = normal(9, len(dense), 2)
    found = ntk_operator(f, params, x, keep="features") @ v
    np.testing.assert_allclose(found, dense @ (dense.T @ v), rtol=1e-10, atol=1e-12)


@few("name", ["a norm of Gemma", *(k for k in KINDS if k != "a norm of Gemma")])
def test_every_kind_is_verified(name):
    verify(*KINDS[name])


EXTREME = {
    "a tiny input beside a bias": lambda p, x: (1e-25 * x) @ (p["w"] * 1e20) * 1e5 + p["b"],
    "tiny weights": lambda p, x: 1e20 * (x @ (1e-20 * p["w"])),
    "tiny weights and bias": lambda p, x: 1e20 * (x @ (1e-20 * p["w"]) + 1e-20 * p["b"]),
    "huge weights": lambda p, x: 1e-20 * (x @ (1e20 * p["w"]) + 1e20 * p["b"]),
    "tiny inputs": lambda p, x: 1e25 * ((1e-25 * x) @ p["w"]),
    "huge inputs": lambda p, x: 1e-25 * ((1e25 * x) @ p["w"]),
}


def extreme(name):
    f = lambda p, x: jnp.tanh(EXTREME[name](p, x)) @ p["c"]  # noqa: E731 (a function of one line)
    return f, *jax.tree.map(lambda a: a.astype(np.float32), (DENSE, X))


@few(("name", "method"), list(product(EXTREME, METHODS)))
def test_in_float32_constants_neither_overflow_nor_vanish(name, method):
    f, small, x = extreme(name)
    (j,) = jacobians(f, DENSE, X)
    check_whole(ntk(f, small, x, method=method), leaf_kernels([j], [j]), 1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_constants_in_float32_are_verified(name):
    verify(*extreme(name))


HALVES = {
    **{method: lambda *a, m=method, **_: ntk(*a, method=m) for method in METHODS},
    "a store": lambda *a, path: kernel_store(*a, path=path, memory="1GiB")[:],
}


def in_half_precision(dtype):
    """Give a model in half precision, and its kernel in float64."""
    wide = {**DENSE, "c": 300 * np.asarray(DENSE["c"])}  # entries beyond the range of float16
    f = dense(SAME, SAME)
    half, x = jax.tree.map(lambda a: jnp.asarray(np.asarray(a).astype(dtype)), (wide, X))
    (j,) = jacobians(f, *jax.tree.map(lambda a: np.asarray(a).astype(float), (half, x)))
    expected = sum(leaf_kernels([j], [j])[0])
    assert expected.max() > 65504
    return f, half, x, expected


@few(("dtype", "way"), list(product([jnp.bfloat16, jnp.float16], HALVES)))
def test_the_kernel_of_a_model_in_half_precision_is_kept_in_float32(dtype, way, tmp_path):
    *model, expected = in_half_precision(dtype)
    found = HALVES[way](*model, path=tmp_path / "k")
    assert found.dtype == jnp.float32
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 4 * float(jnp.finfo(dtype).eps)


@few("dtype", [jnp.float16, jnp.bfloat16])
def test_products_of_a_model_in_half_precision_are_kept_in_float32(dtype):
    *model, expected = in_half_precision(dtype)
    A = ntk_operator(*model)
    v = normal(3, 2 * N)
    found = A @ v
    assert A.dtype == found.dtype == jnp.float32
    exact = np.asarray(matrix(expected)) @ v
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error < 4 * float(jnp.finfo(dtype).eps)


# --- masks, empty parameters, several outputs


class Model(eqx.Module):
    w: jax.Array
    c: jax.Array
    activation: object = jnp.tanh

    def __call__(self, x):
        return self.activation(x @ self.w) @ self.c


def test_a_filter_specification_of_equinox_is_a_mask():
    model = Model(DENSE["w"], DENSE["c"])
    params, static = eqx.partition(model, eqx.is_array)
    f = lambda p, x: eqx.combine(p, static)(x)  # noqa: E731 (a function of one line)
    spec = jax.tree.map(lambda _: False, params)
    spec = eqx.tree_at(lambda m: m.w, spec, True)
    full = jax.tree.map(eqx.is_array, model)  # False for the activation, which is no leaf of params

    def kernels(params):
        return [ntk(f, params, X, wrt=w) for w in (spec, lambda path: path == "w", full, None)]

    of_w, by_path, of_all, plain = quickly(kernels, params)
    np.testing.assert_array_equal(of_w, by_path)
    np.testing.assert_array_equal(of_all, plain)


def test_a_partial_that_takes_a_path_is_a_function():
    chosen = jax.tree_util.Partial(lambda path: path == "w")
    expected = ntk(dense(SAME, SAME), DENSE, X, wrt=lambda path: path == "w")
    np.testing.assert_array_equal(ntk(dense(SAME, SAME), DENSE, X, wrt=chosen), expected)


def test_what_is_no_array_in_params_gets_a_sentence():
    model = Model(DENSE["w"], DENSE["c"])
    with pytest.raises(TypeError, match=r"`params`.activation must be an array, got .*partition"):
        ntk(lambda p, x: p(x), model, X)


EMPTY = {**DENSE, "e": jnp.zeros(0), "g": jnp.zeros((4, 0))}


def with_empty(p, x):
    return dense(SAME, SAME)(p, x) + jnp.sum(p["e"]) + jnp.sum(x @ p["g"], 1, keepdims=True)


HOW = [{"per_leaf": True, "batch_size": 2}, {}, {"batch_size": 2}, {"memory": "1MB"}]


@few(("how", "method"), list(product(HOW, METHODS)))
def test_empty_parameters_add_nothing(how, method):
    found = ntk(with_empty, EMPTY, X, method=method, **how)
    (j,) = jacobians(dense(SAME, SAME), DENSE, X)
    expected = sum(leaf_kernels([j], [j])[0])
    if "per_leaf" in how:
        assert not np.any(found["e"])
        assert not np.any(found["g"])
        found = sum(found.values())
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    only = ntk(with_empty, EMPTY, X, method=method, wrt=lambda path: path in "eg", **how)
    assert not any(np.any(k) for k in jax.tree.leaves(only))


def products_of(keep):
    return lambda *a, path, **b: ntk_operator(*a, keep=keep, **b) @ normal(0, 2 * N)


def sketched(*arguments, path, **options):
    found = sketch(jax.random.key(0), *arguments, dimension=8, **options)
    assert found.error == 0
    return found.features


ZERO = {
    "features": products_of("features"),
    "a store": lambda *a, path, **b: kernel_store(*a, path=path, memory="1GiB", **b)[:],
    "a sketch": sketched,
    "residuals": products_of("residuals"),
    "nothing": products_of("nothing"),
}


@few(
    ("leaves", "way"),
    [(leaves[i % 2], way) for leaves in (["eg", "u"], ["u", "eg"]) for i, way in enumerate(ZERO)],
    3,
)
def test_a_kernel_of_parameters_that_nothing_depends_on_is_zero_everywhere(leaves, way, tmp_path):
    params = {**EMPTY, "u": jnp.ones(3)}
    wrt = lambda path: path in leaves  # noqa: E731 (a function of one line)
    assert not np.any(ZERO[way](with_empty, params, X, path=tmp_path / "k", wrt=wrt))


@few("leaves", ["u", "eg"])
def test_what_nothing_depends_on_is_explained(leaves):
    params = {**EMPTY, "u": jnp.ones(3)}
    wrt = lambda path: path in leaves  # noqa: E731 (a function of one line)
    explain(with_empty, params, X, wrt=wrt)
    estimate(with_empty, params, X, wrt=wrt)


@pytest.mark.parametrize(
    "use",
    [
        lambda f, p, x, path: kernel_store(f, p, x, path=path / "k", memory="1GiB"),
        lambda f, p, x, path: ntk_operator(f, p, x),
        lambda f, p, x, path: sketch(jax.random.key(0), f, p, x, dimension=8),
    ],
    ids=["kernel_store", "ntk_operator", "sketch"],
)
def test_a_model_with_two_outputs_is_refused_alike(use, tmp_path):
    f = lambda p, x: (x @ p["w"], x @ p["w"])  # noqa: E731 (a function of one line)
    with pytest.raises(TypeError, match=r"`f` must return one array .*got 2\. Take one of them"):
        use(f, DENSE, X, tmp_path)


# --- examples that see each other


def test_similarities_of_all_pairs_are_no_outputs_of_an_example():
    f = lambda p, x: (x @ p["w"]) @ (x @ p["w"]).T  # noqa: E731 (logits of CLIP)
    for use in (ntk, ntk_operator, estimate, explain, partial(verify)):
        with pytest.raises(ValueError, match=r"`f` must give every example outputs of one shape"):
            use(f, DENSE, X)


@pytest.mark.parametrize(
    "f",
    [
        lambda p, x: jnp.mean(x @ p["w"], 0, keepdims=True),  # one row, whatever the batch
        lambda p, x: jnp.tile(x @ p["w"], (2, 1))[:2],
        lambda p, x: (x @ p["w"], (x @ p["w"]) @ (x @ p["w"]).T),
    ],
    ids=["a mean of the batch", "two rows", "pairs beside outputs"],
)
def test_outputs_that_do_not_keep_the_batch_are_refused(f):
    with pytest.raises(ValueError, match="`f` must"):
        ntk(f, DENSE, X)


def test_the_whole_batch_as_one_example_is_taken_as_it_is():
    net = lambda p, x: dense(SAME, SAME)(p, x) - dense(SAME, SAME)(p, x).mean(0)  # noqa: E731 (a function of one line)
    found = ntk(lambda p, x: net(p, x[0])[None], DENSE, X[None])
    (j,) = jacobians(net, DENSE, X)
    whole = sum(leaf.reshape(2 * N, -1) @ leaf.reshape(2 * N, -1).T for leaf in j)
    np.testing.assert_allclose(found.reshape(2 * N, 2 * N), whole, rtol=1e-10, atol=1e-12)
