"""Kernels of complex parameters and outputs, against dense Jacobians, holomorphic and not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lazyjax
from lazyjax.kernels import METHODS

RNG = np.random.default_rng(0)


def complex_ones(*shape):
    return jnp.asarray(RNG.normal(size=shape) + 1j * RNG.normal(size=shape))


X = jnp.asarray(RNG.normal(size=(6, 3)))
OTHER = jnp.asarray(RNG.normal(size=(4, 3)))
COMPLEX = {"a": complex_ones(3, 7), "b": complex_ones(7), "c": complex_ones(7, 2)}
REAL = {"a": COMPLEX["a"].real, "c": COMPLEX["c"].imag}
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
    "while": (a_while, {"a": 0.1 * COMPLEX["a"]}),
}
MODELS = {
    **HOLOMORPHIC,
    "not holomorphic": (not_holomorphic, {**COMPLEX, "d": REAL["c"]}),
    "real outputs": (real_outputs, {**COMPLEX, "d": REAL["c"]}),
}


def by_parts(f, p, x):
    """Give J (N, K, P) of the parts of the outputs by the parts of the parameters, by columns."""
    leaves, tree = jax.tree.flatten(p)
    parts = [(w.real, w.imag) if jnp.iscomplexobj(w) else (w,) for w in leaves]

    def function(parts):
        y = f(tree.unflatten([w[0] if len(w) == 1 else w[0] + 1j * w[1] for w in parts]), x)
        return jnp.stack([y.real, y.imag], -1) if jnp.iscomplexobj(y) else y

    columns = jax.tree.leaves(jax.jit(jax.jacfwd(function))(parts))
    sizes = [np.size(w) for w in jax.tree.leaves(parts)]
    return np.concatenate(
        [j.reshape(len(x), -1, n) for j, n in zip(columns, sizes, strict=True)], -1
    )


def by_complex_numbers(f, p, x):
    """Give J (N, K, P) = df / dw, by the differences along Re w alone."""
    leaves, tree = jax.tree.flatten(p)

    def function(moved):
        y = f(tree.unflatten([w + m for w, m in zip(leaves, moved, strict=True)]), x)
        return y.real, y.imag

    zeros = [jnp.zeros(np.shape(w)) for w in leaves]
    re, im = jax.jit(jax.jacfwd(function))(zeros)
    return np.concatenate(
        [(a + 1j * b).reshape(len(x), -1, z.size) for a, b, z in zip(re, im, zeros, strict=True)],
        -1,
    )


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


def methods(name, *, hermitian):
    allowed = [m for m in METHODS if not (hermitian and METHODS[m].real_only)]
    return ["jacobian_contraction"] if name == "while" else allowed


@pytest.mark.parametrize("name", MODELS)
def test_the_kernel_of_parts_is_that_of_real_numbers(name):
    f, p = MODELS[name]
    one, other = by_parts(f, p, X), by_parts(f, p, OTHER)
    axis = () if name == "real outputs" else (2,)
    out = (one.shape[1] // (2 if axis else 1), *axis)
    for method in methods(name, hermitian=False):
        found = lazyjax.ntk(f, p, X, complex="real", method=method)
        assert found.shape == (6, 6, *out, *out)
        assert found.dtype == jnp.float64
        close(found, np.einsum("nkp,mlp->nmkl", one, one))
        square = lazyjax.matrix(found)
        np.testing.assert_array_equal(square, square.T)
        found = lazyjax.ntk(f, p, X, OTHER, complex="real", method=method, reduce="trace")
        close(found, reduced(np.einsum("nkp,mlp->nmkl", one, other), "trace"))


@pytest.mark.parametrize("name", HOLOMORPHIC)
def test_the_hermitian_kernel_is_that_of_the_complex_derivative(name):
    f, p = HOLOMORPHIC[name]
    one, other = by_complex_numbers(f, p, X), by_complex_numbers(f, p, OTHER)
    full = np.einsum("nkp,mlp->nmkl", one, one.conj())
    for method in methods(name, hermitian=True):
        found = lazyjax.ntk(f, p, X, complex="hermitian", method=method)
        close(found, full)
        square = lazyjax.matrix(found)
        np.testing.assert_array_equal(square, square.conj().T)
    found = lazyjax.ntk(f, p, X, OTHER, complex="hermitian", batch_size=3)
    close(found, np.einsum("nkp,mlp->nmkl", one, other.conj()))
    tiled = lazyjax.ntk(f, p, X, complex="hermitian", batch_size=4)
    close(tiled, full)


@pytest.mark.parametrize("reduce", ["diagonal", "trace", "sum"])
def test_hermitian_kernels_are_reduced(reduce):
    f, p = HOLOMORPHIC["both kinds"]
    one = by_complex_numbers(f, p, X)
    full = np.einsum("nkp,mlp->nmkl", one, one.conj())
    for method in methods("both kinds", hermitian=True):
        found = lazyjax.ntk(f, p, X, complex="hermitian", method=method, reduce=reduce)
        close(found, reduced(full, reduce))
    own = lazyjax.ntk_diagonal(f, p, X, complex="hermitian", reduce=reduce)
    close(own, np.einsum("nn...->n...", reduced(full, reduce)))


def test_leaves_add_up():
    for convention in ("real", "hermitian"):
        own = lazyjax.ntk(holomorphic_of_both_kinds, MIXED, X, complex=convention, per_leaf=True)
        whole = lazyjax.ntk(holomorphic_of_both_kinds, MIXED, X, complex=convention)
        close(sum(own.values()), np.asarray(whole))


def test_means_are_taken_away_from_complex_derivatives_too():
    weights = jnp.arange(1.0, 7.0)
    J = by_complex_numbers(holomorphic, COMPLEX, X)
    J = J - np.average(J, axis=0, weights=weights)
    expected = np.einsum("n,m,nkp,mlp->nmkl", weights**0.5, weights**0.5, J, J.conj())
    found = lazyjax.ntk(holomorphic, COMPLEX, X, complex="hermitian", center=True, weights=weights)
    close(found, expected)
    square = lazyjax.matrix(found)
    np.testing.assert_array_equal(square, square.conj().T)


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
