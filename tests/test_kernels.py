from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from kernel_reference import quickly
from thoroughness import few

from lazyjax.equations import equations
from lazyjax.kernels import METHODS, REDUCTIONS, kernels, matrix, ntk
from lazyjax.models import MLP, from_linen


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


PARAMS = {"a": normal(0, 2, 5), "b": normal(1, 5, 4), "bias": normal(2, 1, 4), "c": normal(3, 4, 3)}
X1, X2 = normal(4, 7, 2), normal(5, 4, 2)


def model(params, x):
    """Two hidden layers and K = 3 outputs: with one layer a kernel with swapped axes would pass."""
    h = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"] + params["bias"])
    return h @ params["c"]


def dense_jacobian(f, params, x):
    """The slow reference: J (N, K, P), from the whole batch at once."""
    n = x.shape[0]
    leaves, y = quickly(lambda p, x: (jax.tree.leaves(jax.jacrev(f)(p, x)), f(p, x)), params, x)
    return np.concatenate([j.reshape(n, y.size // n, -1) for j in leaves], axis=-1)


def reference(reduce, outputs=None, x2=None, f=model, params=PARAMS):
    j1 = dense_jacobian(f, params, X1)
    j2 = j1 if x2 is None else dense_jacobian(f, params, x2)
    if outputs is not None:
        j1, j2 = j1[:, list(outputs)], j2[:, list(outputs)]
    theta = np.einsum("nkp,mlp->nmkl", j1, j2)
    k = theta.shape[-1]
    return {
        "none": theta,
        "diagonal": np.einsum("nmkk->nmk", theta),
        "trace": np.einsum("nmkk->nm", theta) / k,
        "sum": np.einsum("nmkl->nm", theta) / k,
    }[reduce]


OUTPUTS = {"all outputs": (None, None), "two outputs in blocks": ((2, 0), (4, 3))}
SECOND = {"x1 with itself": None, "x1 with x2": X2}
FIRST = [
    ("structured_derivatives", "none", "all outputs", "x1 with x2"),
    ("jacobian_contraction", "trace", "two outputs in blocks", "x1 with itself"),
    ("ntk_vector_products", "diagonal", "two outputs in blocks", "x1 with x2"),
]
ROWS = sorted(product(METHODS, REDUCTIONS, OUTPUTS, SECOND), key=lambda row: row not in FIRST)


@few(("method", "reduce", "chosen", "second"), ROWS, len(FIRST))
def test_every_method_is_the_dense_jacobian(method, reduce, chosen, second):
    (outputs, batch_size), x2 = OUTPUTS[chosen], SECOND[second]
    found = ntk(
        model, PARAMS, X1, x2, reduce=reduce, method=method, outputs=outputs, batch_size=batch_size
    )
    expected = reference(reduce, outputs, x2)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


@few(("batch_size", "method"), list(product([3, None], METHODS)))
def test_a_kernel_of_one_batch_is_symmetric_to_the_last_bit_and_positive(method, batch_size):
    kernel = ntk(model, PARAMS, X1, method=method, batch_size=batch_size)
    np.testing.assert_array_equal(kernel, np.transpose(kernel, (1, 0, 3, 2)))
    square = np.asarray(matrix(kernel))
    assert square.shape == (21, 21)
    values = np.linalg.eigvalsh(square)
    assert values[0] > -1e-13 * values[-1]
    jacobian = dense_jacobian(model, PARAMS, X1).reshape(21, -1)
    np.testing.assert_allclose(square, jacobian @ jacobian.T, rtol=1e-11, atol=1e-12)


def test_rows_of_the_matrix_are_as_in_y_reshaped():
    kernel = ntk(model, PARAMS, X1, X2)
    square, kernel = np.asarray(matrix(kernel)), np.asarray(kernel)
    for n, m, k, l in [(0, 0, 0, 0), (6, 3, 2, 1), (5, 0, 1, 2)]:  # noqa: E741 (the paper's symbol)
        assert square[n * 3 + k, m * 3 + l] == kernel[n, m, k, l]


def test_outputs_may_have_several_axes_or_none():
    def square(params, x):
        return model(params, x)[:, :2].reshape(-1, 2, 1) * jnp.ones((1, 1, 2))

    def kernels(params):
        return [
            ntk(square, params, X1, X2),
            ntk(lambda w, x: model(w, x)[:, 0], params, X1, X2),
        ]

    def shape_of(**options):
        return jax.eval_shape(lambda w: ntk(square, w, X1, X2, **options), PARAMS).shape

    kernel, bare = quickly(kernels, PARAMS)
    assert kernel.shape == (7, 4, 2, 2, 2, 2)
    full = reference("none", None, X2)
    np.testing.assert_allclose(kernel[:, :, :, 0, :, 1], full[:, :, :2, :2], rtol=1e-12)
    assert shape_of(reduce="diagonal") == (7, 4, 2, 2)
    assert shape_of(outputs=[3]) == (7, 4, 1, 1)
    assert bare.shape == (7, 4)
    np.testing.assert_allclose(bare, full[:, :, 0, 0], rtol=1e-12)


@jax.custom_vjp
def sine(h):
    return jnp.sin(h)


sine.defvjp(lambda h: (jnp.sin(h), h), lambda h, g: (g * jnp.cos(h),))


def by_while(params, x):
    """Three tanh in a while loop: forward mode only."""
    start = (0, x @ params["a"] @ params["b"])
    _, h = jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1])), start)
    return h @ params["c"]


def test_parameters_that_are_integers_or_do_not_matter_are_constants():
    params = {**PARAMS, "steps": jnp.arange(3), "unused": jnp.ones(4)}
    np.testing.assert_allclose(
        ntk(model, params, X1, X2), reference("none", None, X2), rtol=1e-12, atol=1e-13
    )


def test_pytrees_go_in_and_come_out():
    def f(params, x):
        y = model(params, x["left"] + x["right"])
        return {"two": y[:, :2], "last": y[:, 2]}

    x1, x2 = {"left": X1, "right": 0 * X1}, {"left": 0 * X2, "right": X2}
    found = jax.tree.map(np.asarray, ntk(f, PARAMS, x1, x2))
    full = reference("none", None, X2)
    assert set(found) == {"two", "last"}
    np.testing.assert_allclose(found["two"], full[:, :, :2, :2], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found["last"], full[:, :, 2, 2], rtol=1e-12, atol=1e-13)


@few("method", list(METHODS)[1:] + list(METHODS)[:1])
def test_it_works_under_jit_and_vmap(method):
    stacked = {name: np.stack([w, w + 0.1]) for name, w in PARAMS.items()}
    kernels = jax.jit(jax.vmap(lambda w: ntk(model, w, X1, method=method)))(stacked)
    np.testing.assert_allclose(np.asarray(kernels)[0], reference("none"), rtol=1e-11, atol=1e-12)


@few("method", METHODS)
def test_it_can_be_differentiated(method):
    @jax.jit
    def trace(w):
        return jnp.sum(ntk(model, w, X1, reduce="trace", method=method))

    slope = jax.tree.map(np.asarray, jax.grad(trace)(PARAMS))
    ahead = trace({name: w + 1e-6 * slope[name] for name, w in PARAMS.items()})
    behind = trace({name: w - 1e-6 * slope[name] for name, w in PARAMS.items()})
    square = sum(np.sum(g**2) for g in slope.values())
    assert (ahead - behind) / 2e-6 == pytest.approx(float(square), rel=1e-6)


@pytest.mark.thorough
def test_the_ntk_of_a_wide_network_nears_a_limit_as_one_over_the_root_of_its_width():
    x = normal(7, 3, 2)
    spreads = []
    for width in (16, 256):
        module = MLP((width, width), outputs=2, parametrization="ntk")
        keys = jax.random.split(jax.random.key(width), 6)
        kernels = [ntk(*from_linen(module, k, x), x, reduce="trace") for k in keys]
        spreads.append(float(jnp.mean(jnp.std(jnp.stack(kernels), axis=0))))
    assert 2 < spreads[0] / spreads[1] < 8  # 4 in the mean


@few("method", METHODS)
def test_float32_stays_float32_and_is_right_to_rounding(method):
    single, x = jax.tree.map(lambda a: np.asarray(a, np.float32), (PARAMS, X1))
    kernel = ntk(model, single, x, method=method)
    assert kernel.dtype == jnp.float32
    expected = reference("none")
    assert kernel.shape == expected.shape
    assert np.linalg.norm(kernel - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("method", METHODS)
def test_every_product_has_the_precision_that_is_asked_for(method):
    traced = jax.make_jaxpr(lambda w: ntk(model, w, X1, method=method))(PARAMS)
    products = [e for e in equations(traced.jaxpr) if e.primitive.name == "dot_general"]
    assert products
    assert {e.params["precision"] for e in products} == {(jax.lax.Precision.HIGHEST,) * 2}


REDUCED = ["diagonal", "trace", "sum"]
TURNED = [(m, REDUCED[(i + j) % 3]) for j in range(3) for i, m in enumerate(METHODS)]


@few(("method", "reduce"), TURNED, 3)
def test_reduced_kernels_never_form_the_outputs_squared(method, reduce):
    n, k = 30, 20
    params, x = {**PARAMS, "c": jnp.ones((4, k))}, jnp.ones((n, 2))
    traced = jax.make_jaxpr(lambda w: ntk(model, w, x, reduce=reduce, method=method))(params)
    sizes = [v.aval.size for e in equations(traced.jaxpr) for v in e.outvars]
    assert max(sizes) < n * n * k * k / 2


@few("batch_size", [(1, 5), 1, 6, 7, 100])
def test_blocks_may_be_of_any_size(batch_size):
    found = ntk(model, PARAMS, X1, batch_size=batch_size)
    np.testing.assert_allclose(found, reference("none"), rtol=1e-11, atol=1e-12)


def test_other_arrays_in_a_partial_compile_nothing_new():
    def scaled(factor, w, x):
        return factor * model(w, x)

    one = ntk(Partial(scaled, jnp.array(1.0)), PARAMS, X1)
    before = kernels._cache_size()
    two = ntk(Partial(scaled, jnp.array(2.0)), PARAMS, X1)
    assert kernels._cache_size() == before
    np.testing.assert_allclose(two, 4 * one, rtol=1e-12)


BAD = {
    "no derivative": ((lambda w, x: by_while(w, x) + sine(model(w, x)), PARAMS, X1), {}, ValueError, "`f` must have a derivative in reverse or in forward mode"),
    "no function": (("f", PARAMS, X1), {}, TypeError, "`f` must be a model function.*got str"),
    "a reduction": ((model, PARAMS, X1), {"reduce": "tarce"}, ValueError, "`reduce`.*Did you mean trace"),
    "a method": ((model, PARAMS, X1), {"method": "jacobian"}, ValueError, "`method` must be one of"),
    "a precision": ((model, PARAMS, X1), {"precision": "best"}, ValueError, "`precision` must be a name"),
    "no batch": ((model, PARAMS, X1[:0]), {}, ValueError, "`x1` must hold at least one example"),
    "one example": ((model, PARAMS, X1[0, 0]), {}, ValueError, "`x1` must have the batch on axis 0"),
    "other examples": ((model, PARAMS, X1, normal(0, 4, 3)), {}, ValueError, "`x2` must hold examples like"),
    "other parameters": ((model, {"a": X1}, X1), {}, ValueError, "`params` and `x1` must fit the model"),
    "an output too many": ((model, PARAMS, X1), {"outputs": [3]}, ValueError, "`outputs` must be indices"),
    "no outputs": ((model, PARAMS, X1), {"outputs": []}, ValueError, "`outputs` must be a list of at"),
    "an output twice": ((model, PARAMS, X1), {"outputs": [1, 1]}, ValueError, "`outputs` must be distinct"),
    "half an output": ((model, PARAMS, X1), {"outputs": [0.5]}, TypeError, "`outputs` must be whole"),
    "an empty block": ((model, PARAMS, X1), {"batch_size": 0}, ValueError, "`batch_size` must be at least"),
    "half a block": ((model, PARAMS, X1), {"batch_size": 1.5}, TypeError, "`batch_size` must be a whole"),
    "three blocks": ((model, PARAMS, X1), {"batch_size": (1, 2, 3)}, ValueError, "or a pair of them"),
    "complex parameters": ((model, {**PARAMS, "a": PARAMS["a"] * 1j}, X1), {}, TypeError, "`complex` must say"),
    "complex outputs": ((lambda w, x: model(w, x) * 1j, PARAMS, X1), {}, TypeError, "`complex` must say"),
    "no complex numbers": ((model, PARAMS, X1), {"complex": "real"}, ValueError, "`complex` must be None"),
    "another convention": ((lambda w, x: model(w, x) * 1j, PARAMS, X1), {"complex": "half"}, ValueError, "`complex` must be 'real'"),
    "a Hermitian kernel of real outputs": ((lambda w, x: model(jax.tree.map(jnp.real, w), x), {**PARAMS, "a": PARAMS["a"] * 1j}, X1), {"complex": "hermitian"}, ValueError, "where f\\(params, x\\) is real"),
    "no holomorphic model": ((lambda w, x: model({**w, "a": jnp.abs(w["a"])}, x) + 0j, {**PARAMS, "a": PARAMS["a"] * (1 + 1j)}, X1), {"complex": "hermitian"}, ValueError, "`f` must be holomorphic"),
    "centred perhaps": ((model, PARAMS, X1), {"center": "yes"}, TypeError, "`center` must be True or False"),
    "weights of others": ((model, PARAMS, X1), {"weights": np.ones(2)}, ValueError, "`weights` must have shape"),
    "negative weights": ((model, PARAMS, X1), {"weights": -np.ones(len(X1))}, ValueError, "`weights` must be 0 or more"),
    "weights of 0": ((model, PARAMS, X1), {"weights": np.zeros(len(X1))}, ValueError, "`weights` must not all be 0"),
    "whole weights": ((model, PARAMS, X1), {"weights": np.ones(len(X1), int)}, TypeError, "`weights` must hold floats"),
    "weights of one batch": ((model, PARAMS, X1, X1), {"weights": np.ones(len(X1))}, ValueError, "`weights` must be a pair"),
    "whole outputs": ((lambda w, x: jnp.round(model(w, x)).astype(int), PARAMS, X1), {}, TypeError, "floats"),
    "no floats": ((lambda w, x: x, {"a": jnp.arange(3)}, X1), {}, ValueError, "at least one array of floats"),
    "no batch in y": ((lambda w, x: model(w, x).sum(0), PARAMS, X1), {}, ValueError, "with the batch on axis 0"),
}  # fmt: skip # to be read as a table


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    arguments, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        ntk(*arguments, **options)


def test_outputs_that_are_traced_are_refused():
    with pytest.raises(TypeError, match="`outputs` must be known where the kernel is called"):
        jax.jit(lambda i: ntk(model, PARAMS, X1, outputs=i))(jnp.array([0]))


def test_what_is_no_kernel_has_no_matrix():
    with pytest.raises(ValueError, match=r"`kernel` must have shape \(N1, N2, \*out, \*out\), got"):
        matrix(jnp.zeros((2, 2, 3, 4)))
