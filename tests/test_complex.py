"""Kernels of complex parameters and outputs, against dense Jacobians, holomorphic and not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_reference import quickly
from thoroughness import few

import lazyjax
from lazyjax.kernels import METHODS

RNG = np.random.default_rng(0)


def complex_ones(*shape):
    return RNG.normal(size=shape) + 1j * RNG.normal(size=shape)


X = RNG.normal(size=(6, 3))
OTHER = RNG.normal(size=(4, 3))
NUMBERS = {"a": complex_ones(3, 7), "b": complex_ones(7), "c": complex_ones(7, 2)}
COMPLEX = jax.tree.map(jnp.asarray, NUMBERS)
REAL = {"a": NUMBERS["a"].real, "c": NUMBERS["c"].imag}
MIXED = {**COMPLEX, "d": REAL["c"], "s": complex_ones()}


def holomorphic(p, x):
    return jnp.tanh(0.3 * (x @ p["a"] + p["b"][None])) @ p["c"]


def holomorphic_of_both_kinds(p, x):  # real leaves in complex products
    h = jnp.log(jnp.cosh(0.3 * (x @ p["a"] + p["b"][None])))
    return p["s"] * (h @ p["d"] + (2j * h) @ (-p["c"]))


def ansatz(p, x):  # logarithms of cosines as they are written for large arguments
    h = 0.3 * (x @ p["a"] + p["b"][None])
    h = jnp.where(h.real > 0, h, -h)
    return (h + jnp.log1p(jnp.exp(-2 * h))) @ p["c"]


def transposed_and_tied(p, x):
    h = jnp.sin(0.3 * x @ p["a"])
    return jnp.einsum("nk,dk->nd", h, p["a"]) + 0.1 * jnp.sin(h) @ p["a"].T


def complex_convolution(p, x):
    signal = (x[:, :, None] + 0j) * p["b"][None, None, :2]
    filters = p["a"][:, :2, None] * jnp.ones((1, 1, 2))
    y = jax.lax.conv_general_dilated(
        signal, filters, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.sin(y).sum(1)


def not_holomorphic(p, x):
    h = jnp.tanh(0.3 * (x @ p["a"] + jnp.conj(p["b"])[None]))
    h = jnp.abs(h) + h
    return h @ p["d"] + jnp.exp(0.1j * h.real) @ p["c"]


def real_outputs(p, x):
    return jnp.abs(not_holomorphic(p, x))


def complex_at_the_end(p, x):
    y = jnp.tanh(x @ p["a"]) @ p["c"]
    return jax.lax.complex(y, jnp.sin(y))


def real_weights_of_complex_values(p, x):
    return jnp.tanh((1j * jnp.tanh(x @ p["a"]) + 0.3) @ p["c"])


def recomputed(p, x):
    act = jax.checkpoint(lambda h: jnp.log(jnp.cosh(jnp.where(h.real > 0, h, -h))))
    h, _ = jax.lax.scan(lambda h, w: (act(0.3 * h @ w), None), x + 0j, p["a"][None, :, :3])
    return h


def a_scan(p, x):
    weights = jnp.stack([p["a"][:, :3], p["a"][:, 3:6]])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(0.3 * h @ w), None), x + 0j, weights)
    return h


def a_while(p, x):
    h = x @ p["a"]
    return jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.sin(s[1])), (0, h))[1]


HOLOMORPHIC = {
    "dense": (holomorphic, COMPLEX),
    "both kinds": (holomorphic_of_both_kinds, MIXED),
    "ansatz": (ansatz, COMPLEX),
    "tied": (transposed_and_tied, {"a": COMPLEX["a"]}),
    "convolution": (complex_convolution, {"a": COMPLEX["a"], "b": COMPLEX["b"]}),
    "scan": (a_scan, {"a": COMPLEX["a"]}),
    "recomputed": (recomputed, {"a": COMPLEX["a"]}),
    "at the end": (complex_at_the_end, REAL),
    "real weights": (real_weights_of_complex_values, REAL),
    "while": (a_while, {"a": jnp.asarray(0.1 * NUMBERS["a"])}),
}
MODELS = {
    **HOLOMORPHIC,
    "not holomorphic": (not_holomorphic, {**COMPLEX, "d": REAL["c"]}),
    "real outputs": (real_outputs, {**COMPLEX, "d": REAL["c"]}),
}


def by_parts(f, p):
    """Give J (N, K, P) of the parts of the outputs by the parts of the parameters, at x and other."""
    leaves, tree = jax.tree.flatten(p)
    parts = [(np.real(w), np.imag(w)) if jnp.iscomplexobj(w) else (w,) for w in leaves]

    def function(parts, x):
        y = f(tree.unflatten([w[0] if len(w) == 1 else w[0] + 1j * w[1] for w in parts]), x)
        return jnp.stack([y.real, y.imag], -1) if jnp.iscomplexobj(y) else y

    both = np.concatenate([X, OTHER])
    columns = jax.tree.leaves(quickly(jax.jacfwd(function), parts, both))
    sizes = [np.size(w) for w in jax.tree.leaves(parts)]
    J = [j.reshape(len(both), -1, n) for j, n in zip(columns, sizes, strict=True)]
    return np.split(np.concatenate(J, -1), [len(X)])


def by_complex_numbers(f, p):
    """Give J (N, K, P) = df / dw at x and other, by the differences along Re w alone."""
    leaves, tree = jax.tree.flatten(p)

    def function(moved, x):
        y = f(tree.unflatten([w + m for w, m in zip(leaves, moved, strict=True)]), x)
        return y.real, y.imag

    zeros, both = [np.zeros(np.shape(w)) for w in leaves], np.concatenate([X, OTHER])
    re, im = quickly(jax.jacfwd(function), zeros, both)
    J = [(a + 1j * b).reshape(len(both), -1, z.size) for a, b, z in zip(re, im, zeros, strict=True)]
    return np.split(np.concatenate(J, -1), [len(X)])


def reduced(full, reduce):
    k = full.shape[-1]
    return {
        "none": full,
        "diagonal": np.einsum("nmkk->nmk", full),
        "trace": np.einsum("nmkk->nm", full) / k,
        "sum": np.einsum("nmkl->nm", full) / k,
    }[reduce]


def close(found, expected):
    found = np.asarray(found).reshape(expected.shape)
    assert np.max(np.abs(found - expected)) <= 1e-12 * np.max(np.abs(expected))


def rows(models, first, *, hermitian):
    """Give each model with each method that it has, first the rows that run each time."""
    found = [
        (name, method)
        for name in models
        for method in METHODS
        if not (hermitian and METHODS[method].real_only)
        and (name != "while" or method == "jacobian_contraction")
    ]
    return sorted(found, key=lambda row: row not in first)


FIRST = [("real outputs", "structured_derivatives")]


@few(("name", "method"), rows(MODELS, FIRST, hermitian=False), len(FIRST))
def test_the_kernel_of_parts_is_that_of_real_numbers(name, method):
    f, p = MODELS[name]
    one, other = by_parts(f, p)
    axis = () if name == "real outputs" else (2,)
    out = (one.shape[1] // (2 if axis else 1), *axis)

    def kernels(p, x, other):
        found = lazyjax.ntk(f, p, x, complex="real", method=method)
        between = lazyjax.ntk(f, p, x, other, complex="real", method=method, reduce="trace")
        return found, lazyjax.matrix(found), between

    found, square, between = quickly(kernels, p, X, OTHER)
    assert found.shape == (6, 6, *out, *out)
    assert found.dtype == jnp.float64
    close(found, np.einsum("nkp,mlp->nmkl", one, one))
    np.testing.assert_array_equal(square, square.T)
    close(between, reduced(np.einsum("nkp,mlp->nmkl", one, other), "trace"))


FIRST_HERMITIAN = [
    ("convolution", "structured_derivatives"),
    ("recomputed", "structured_derivatives"),
    ("at the end", "jacobian_contraction"),
]


@few(("name", "method"), rows(HOLOMORPHIC, FIRST_HERMITIAN, hermitian=True), len(FIRST_HERMITIAN))
def test_the_hermitian_kernel_is_that_of_the_complex_derivative(name, method):
    f, p = HOLOMORPHIC[name]
    one, _ = by_complex_numbers(f, p)
    found = lazyjax.ntk(f, p, X, complex="hermitian", method=method)
    close(found, np.einsum("nkp,mlp->nmkl", one, one.conj()))
    square = np.asarray(lazyjax.matrix(found))
    np.testing.assert_array_equal(square, square.conj().T)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "itself"),
    [
        ("tied", False),
        *((name, i) for name in HOLOMORPHIC for i in (True, False) if (name, i) != ("tied", False)),
    ],
)
def test_hermitian_kernels_are_computed_in_tiles(name, itself):
    f, p = HOLOMORPHIC[name]
    one, other = by_complex_numbers(f, p)
    x2, size, other = (None, 4, one) if itself else (OTHER, 3, other)
    found = lazyjax.ntk(f, p, X, x2, complex="hermitian", batch_size=size)
    close(found, np.einsum("nkp,mlp->nmkl", one, other.conj()))


@few(
    ("reduce", "method"),
    [
        ("trace", "jacobian_contraction"),
        ("diagonal", "structured_derivatives"),
        ("sum", "structured_derivatives"),
        ("diagonal", "jacobian_contraction"),
        ("trace", "structured_derivatives"),
        ("sum", "jacobian_contraction"),
    ],
)
def test_hermitian_kernels_are_reduced(reduce, method):
    f, p = HOLOMORPHIC["both kinds"]
    one, _ = by_complex_numbers(f, p)
    full = np.einsum("nkp,mlp->nmkl", one, one.conj())
    found = lazyjax.ntk(f, p, X, complex="hermitian", method=method, reduce=reduce)
    close(found, reduced(full, reduce))


@few("reduce", ["sum", "trace", "diagonal"])
def test_hermitian_kernels_have_a_diagonal(reduce):
    f, p = HOLOMORPHIC["both kinds"]
    one, _ = by_complex_numbers(f, p)
    full = np.einsum("nkp,mlp->nmkl", one, one.conj())
    own = lazyjax.ntk_diagonal(f, p, X, complex="hermitian", reduce=reduce)
    close(own, np.einsum("nn...->n...", reduced(full, reduce)))


@pytest.mark.thorough
@pytest.mark.parametrize("convention", ["hermitian", "real"])
def test_leaves_add_up(convention):
    def kernels(p):
        return [
            lazyjax.ntk(holomorphic_of_both_kinds, p, X, complex=convention, per_leaf=own)
            for own in (True, False)
        ]

    own, whole = quickly(kernels, MIXED)
    close(sum(own.values()), whole)


def test_means_are_taken_away_from_complex_derivatives_too():
    weights = np.arange(1.0, 7.0)
    J, _ = by_complex_numbers(holomorphic, COMPLEX)
    J = J - np.average(J, axis=0, weights=weights)
    expected = np.einsum("n,m,nkp,mlp->nmkl", weights**0.5, weights**0.5, J, J.conj())
    found = lazyjax.ntk(holomorphic, COMPLEX, X, complex="hermitian", center=True, weights=weights)
    close(found, expected)
    square = np.asarray(lazyjax.matrix(found))
    np.testing.assert_array_equal(square, square.conj().T)


@pytest.mark.thorough
def test_it_runs_under_jit():
    found = jax.jit(lambda p: lazyjax.ntk(holomorphic, p, X, complex="hermitian"))(COMPLEX)
    close(found, np.asarray(lazyjax.ntk(holomorphic, COMPLEX, X, complex="hermitian")))


@pytest.mark.parametrize(
    "f",
    [
        not_holomorphic,
        lambda p, x: holomorphic(p, x) * jnp.abs(p["b"]).sum(),
        lambda p, x: holomorphic(p, x) * p["b"].imag.sum(),
        lambda p, x: holomorphic(p, x) * jnp.exp(p["b"].real).sum(),
        lambda p, x: holomorphic(p, x) + jnp.angle(p["c"]).sum(),
        lambda p, x: jnp.where(x[:, :1] > 0, holomorphic(p, x), jnp.conj(holomorphic(p, x))),
        lambda p, x: jax.lax.map(lambda y: jax.lax.complex(y.real, 2 * y.imag), holomorphic(p, x)),
        lambda p, x: jax.lax.convert_element_type(holomorphic(p, x).real, float) + 0j,
        lambda p, x: a_while(p, jnp.fft.irfft(x @ p["a"])[:, :3]),
        lambda p, x: jax.checkpoint(lambda h: h * jnp.abs(h))(x @ p["a"]),
        lambda p, x: jax.lax.scan(lambda h, w: (h * 2, h.real * w), x @ p["a"], p["b"])[1].sum(0),
        lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda h: h, jnp.conj, x @ p["a"]),
    ],
)
def test_a_model_that_is_not_holomorphic_is_refused(f):
    with pytest.raises(ValueError, match="`f` must be holomorphic in its complex parameters"):
        lazyjax.ntk(f, {**COMPLEX, "d": REAL["c"]}, X, complex="hermitian")


def test_products_know_no_hermitian_kernel():
    with pytest.raises(ValueError, match="`method` must not be ntk_vector_products"):
        lazyjax.ntk(holomorphic, COMPLEX, X, complex="hermitian", method="ntk_vector_products")


def test_a_budget_is_kept_by_what_knows_hermitian_kernels():
    found = lazyjax.ntk(holomorphic, COMPLEX, X, complex="hermitian", memory="1GiB")
    close(found, np.asarray(lazyjax.ntk(holomorphic, COMPLEX, X, complex="hermitian")))
