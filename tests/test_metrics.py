import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from thoroughness import few

import lazyjax
from lazyjax.equations import equations
from lazyjax.kernels import ntk
from lazyjax.metrics import (
    kappa,
    kernel_alignment,
    layer_movement,
    pattern_change,
    relative_kernel_change,
    relative_weight_movement,
    step_sizes,
    tangent_gap,
    target_alignment,
)
from lazyjax.models import preactivations, shallow_mlp
from lazyjax.tangent import center, scale


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


W0 = {"a": np.array([3.0, 4.0]), "b": np.zeros(2), "c": np.array([[12.0]])}
W = {"a": np.array([3.0, 5.0]), "b": np.array([0.0, 2.0]), "c": np.array([[12.0]])}


def test_weight_movement_is_relative_to_the_start():
    assert relative_weight_movement(W, W0) == pytest.approx(5**0.5 / 13)
    assert relative_weight_movement(W0, W0) == 0


def test_layers_move_relative_to_themselves_or_if_they_were_zero_to_everything():
    moved = layer_movement(W, W0)
    assert list(moved) == ["a", "b", "c"]
    assert moved["a"] == pytest.approx(1 / 5)
    assert moved["b"] == pytest.approx(2 / 13)
    assert moved["c"] == 0


def test_step_sizes_are_relative_to_the_later_weights():
    trajectory = {"u": np.array([[0.0], [3.0], [3.0]]), "v": np.array([[0.0], [4.0], [5.0]])}
    np.testing.assert_allclose(step_sizes(trajectory), [1.0, 1 / 34**0.5])


def test_kernel_change_and_alignment_are_frobenius():
    a, b = normal(0, 5, 5), normal(1, 5, 5)
    assert relative_kernel_change(a, b) == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b))
    cosine = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
    assert kernel_alignment(a, b) == pytest.approx(float(cosine))
    assert kernel_alignment(a, 3 * a) == pytest.approx(1.0)
    h = np.eye(5) - np.ones((5, 5)) / 5
    assert kernel_alignment(a, b, centered=True) == pytest.approx(
        float(kernel_alignment(h @ a @ h, h @ b @ h))
    )
    assert kernel_alignment(a, a + 7, centered=True) == pytest.approx(1.0)


def test_target_alignment_is_that_with_the_outer_product():
    y = normal(2, 6, 2)
    theta = normal(3, 6, 6, 2, 2)
    flat = y.reshape(-1)
    expected = kernel_alignment(theta.transpose(0, 2, 1, 3).reshape(12, 12), np.outer(flat, flat))
    assert target_alignment(theta, y) == pytest.approx(float(expected))
    small = normal(4, 6, 6)
    assert target_alignment(small, y) == pytest.approx(float(kernel_alignment(small, y @ y.T)))
    assert target_alignment(y @ y.T, y) == pytest.approx(1.0)
    shifted = y + 3
    assert target_alignment(y @ y.T, shifted, centered=True) == pytest.approx(
        float(target_alignment(y @ y.T, y, centered=True))
    )


@pytest.mark.parametrize("centered", [False, True])
def test_complex_kernels_and_targets_align_by_the_conjugate(centered):
    draw = np.random.default_rng(0).normal
    J, y = (draw(size=shape) + 1j * draw(size=shape) for shape in ((4, 7), (4, 2)))
    H = np.eye(4) - centered / 4
    for kernel in (J @ J.conj().T, (J @ J.conj().T).real):
        for targets in (y, y.real):
            a, b = (H @ K @ H for K in (kernel, targets @ targets.conj().T))
            expected = np.vdot(a, b).real / np.linalg.norm(a) / np.linalg.norm(b)
            found = target_alignment(jnp.asarray(kernel), jnp.asarray(targets), centered=centered)
            assert found == pytest.approx(expected)


def test_the_gap_is_the_root_of_the_mean_square():
    a, b = normal(0, 7, 2), normal(1, 7, 2)
    assert tangent_gap(a, b) == pytest.approx(np.linalg.norm(a - b) / 14**0.5)


def test_patterns_change_where_a_unit_changes_its_sign():
    module = shallow_mlp(4)
    x = np.array([[-1.0], [0.5], [1.0]])
    output = {"kernel": np.ones((4, 1)), "bias": np.zeros(1)}
    w0 = {"hidden_0": {"kernel": np.ones((1, 4)), "bias": np.zeros(4)}, "output": output}
    w = {**w0, "hidden_0": {"kernel": np.ones((1, 4)), "bias": np.array([-0.7, 0, 0, 2.0])}}
    g = preactivations(module)
    assert pattern_change(g, w0, w0, x) == 0
    assert pattern_change(g, w, w0, x) == pytest.approx(2 / 12)  # x = 0.5 off in one, -1 on in one


def quadratic(forms, slopes):
    """h_i(w) = slopes_i . w + w^T forms_i w / 2."""
    return lambda w, x: (x @ (slopes @ w + jnp.einsum("ipq,p,q->i", forms, w, w) / 2))[:, None]


@pytest.mark.thorough
def test_kappa_is_exact_for_a_tensor_of_rank_one():
    z, u = normal(0, 4), normal(1, 6)
    z, u = z / np.linalg.norm(z), u / np.linalg.norm(u)
    forms = 2.5 * np.einsum("i,p,q->ipq", z, u, u)
    slopes, x = normal(2, 4, 6), np.eye(4)
    w0 = normal(3, 6)
    f, y = quadratic(forms, slopes), normal(4, 4, 1)
    found = kappa(f, w0, x, y, key=jax.random.key(0))
    jacobian = slopes + forms @ w0
    outputs = (slopes + forms @ w0 / 2) @ w0
    residual = np.linalg.norm(outputs[:, None] - y)
    expected = residual * 2.5 / np.linalg.norm(jacobian, 2) ** 2
    assert found.first == pytest.approx(np.linalg.norm(jacobian, 2))
    assert found.second_lower == pytest.approx(2.5, rel=1e-9)
    assert found.second_upper == pytest.approx(2.5, rel=1e-9)
    assert found.lower == pytest.approx(float(expected), rel=1e-9)
    assert found.upper == pytest.approx(float(expected), rel=1e-9)


def test_the_bounds_of_kappa_hold_the_tensor_norm_between_them():
    forms = normal(0, 3, 4, 4)
    forms = (forms + forms.transpose(0, 2, 1)) / 2
    f, x = quadratic(forms, normal(1, 3, 4)), np.eye(3)
    found = kappa(f, np.zeros(4), x, np.ones((3, 1)), key=jax.random.key(0))
    flattening = np.linalg.norm(np.asarray(forms).reshape(3, 16), 2)
    assert found.second_upper == pytest.approx(flattening)
    # a fine search: for each z on the sphere the norm is that of a symmetric matrix
    points = normal(5, 20_000, 3)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    searched = np.abs(np.linalg.eigvalsh(np.einsum("si,ipq->spq", points, forms))).max()
    assert found.second_lower == pytest.approx(searched, rel=1e-3)
    assert searched <= found.second_lower * (1 + 1e-9)
    assert found.second_lower < found.second_upper < np.linalg.norm(forms)


@pytest.mark.thorough
def test_kappa_of_a_centred_model_falls_as_one_over_alpha():
    x = np.linspace(-1, 1, 6)[:, None]
    y, w0 = np.sin(2 * x), {"u": normal(0, 1, 4), "v": normal(1, 4, 1)}
    f = lambda w, x: jnp.tanh(x @ w["u"]) @ w["v"]  # noqa: E731 (a function of one line)
    one = kappa(center(f, w0), w0, x, y, key=jax.random.key(1))
    ten = kappa(scale(center(f, w0), 10.0), w0, x, y, key=jax.random.key(1))
    assert ten.lower == pytest.approx(float(one.lower) / 10, rel=1e-6)
    assert ten.upper == pytest.approx(float(one.upper) / 10, rel=1e-9)
    assert one.first**2 == pytest.approx(np.linalg.eigvalsh(ntk(f, w0, x)[:, :, 0, 0])[-1])


def test_products_of_metrics_are_not_rounded_to_tf32():
    x = jnp.ones((3, 2))
    whole = jax.make_jaxpr(
        lambda w: (
            kappa(
                lambda w, x: jnp.tanh(x @ w), w, x, jnp.ones((3, 1)), key=jax.random.key(0)
            ).upper,
            target_alignment(jnp.eye(3), x),
        )
    )(jnp.ones((2, 1)))

    products = [e for e in equations(whole.jaxpr) if e.primitive.name == "dot_general"]
    assert {e.params["precision"] for e in products} == {(jax.lax.Precision.HIGHEST,) * 2}


def test_kappa_of_a_linear_model_is_zero():
    found = kappa(
        lambda w, x: x * w,
        2.0,
        np.ones((3, 1)),
        np.zeros((3, 1)),
        key=jax.random.key(0),
    )
    assert found.lower == found.upper == 0


# --- half precision and sizes far from one: every metric is free of scale but the gap


A, B = (m @ m.T for m in (normal(0, 6, 6), normal(1, 6, 6)))
Y = normal(2, 6, 2)
PAIRS = {
    "relative_weight_movement": lambda a, b: relative_weight_movement({"w": b}, {"w": a}),
    "layer_movement": lambda a, b: layer_movement({"w": b}, {"w": a})["w"],
    "step_sizes": lambda a, b: step_sizes({"w": jnp.stack([a, b])})[0],
    "relative_kernel_change": lambda a, b: relative_kernel_change(b, a),
    "kernel_alignment": kernel_alignment,
    "centered": lambda a, b: kernel_alignment(a, b, centered=True),
    "target_alignment": lambda a, b: target_alignment(a, b[:, :2]),
    "centered targets": lambda a, b: target_alignment(a, b[:, :2], centered=True),
    "tangent_gap": tangent_gap,
}


@few("size", [1e-30, 1e30, 1e-25, 1e25], 2)
@pytest.mark.parametrize("name", PAIRS)
def test_metrics_are_free_of_scale(name, size):
    a, b = (jnp.asarray(m, jnp.float32) * jnp.float32(size) for m in (A, B))
    exact = PAIRS[name](*(np.asarray(m, np.float64) for m in (a, b)))
    found = PAIRS[name](a, b)
    assert found.dtype == jnp.float32
    assert found == pytest.approx(float(exact), rel=2e-6, abs=0)


@few("share", [0.01, 1.0])  # a difference of close halves is exact
@few("size", [1e3, 1e-3, 1.0], 2)
@few("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", PAIRS)
def test_metrics_of_half_precision_are_taken_in_float32(name, dtype, size, share):
    a, b = (jnp.asarray(m * size, dtype) for m in (A, A + share * B))
    exact = PAIRS[name](*(jnp.asarray(m, jnp.float64) for m in (a, b)))
    found = PAIRS[name](a, b)
    assert found.dtype == jnp.float32
    assert found == pytest.approx(float(exact), rel=1e-5, abs=0)


def test_a_constant_that_is_large_beside_the_kernel_is_centered_away():
    signal = np.outer(np.arange(64) - 31.5, np.arange(64) - 31.5) / 2**12
    shifted = jnp.asarray(signal + 2**5, jnp.float32)  # exact in float32
    assert kernel_alignment(shifted, signal, centered=True) == pytest.approx(1.0, abs=1e-6)


def test_integers_and_complex_weights_have_movements():
    assert relative_weight_movement({"a": np.array([3, 5])}, {"a": np.array([3, 4])}) == 0.2
    whole, start = {"a": np.array([3 + 1j])}, {"a": np.array([3 + 4j])}
    assert relative_weight_movement(whole, start) == pytest.approx(3 / 5)


ZEROS = {
    "start": (lambda: relative_weight_movement(ONE, {"a": np.zeros(2)}), "`params0` must not be"),
    "layers": (lambda: layer_movement(ONE, {"a": np.zeros(2)}), "`params0` must not be zero"),
    "a step": (lambda: step_sizes({"a": np.array([[1.0], [0.0]])}), "`params` must not be zero"),
    "kernel0": (lambda: relative_kernel_change(A, 0 * A), "`kernel0` must not be zero, got zeros"),
    "a": (lambda: kernel_alignment(0 * A, A), "`a` must not be zero, got zeros only"),
    "b": (lambda: kernel_alignment(A, 0 * A), "`b` must not be zero, got zeros only"),
    "kernel": (lambda: target_alignment(0 * A, Y), "`kernel` must not be zero, got zeros only"),
    "targets": (lambda: target_alignment(A, 0 * Y), "`y` must not be zero, got zeros only"),
    "constant": (
        lambda: kernel_alignment(A, np.full((6, 6), 0.1), centered=True),
        "`b` must not be constant over the points where it is centered",
    ),
    "constant columns": (
        lambda: kernel_alignment(np.tile(A[0], (6, 1)), A, centered=True),
        "`a` must not be constant",
    ),
    "constant rows": (
        lambda: kernel_alignment(np.tile(A[:, :1], (1, 6)), A, centered=True),
        "`a` must not be constant",
    ),
    "constant targets": (
        lambda: target_alignment(A, np.full((6, 1), 0.3), centered=True),
        "`y` must not be constant",
    ),
}


@pytest.mark.parametrize("name", ZEROS)
def test_what_is_zero_has_no_ratio(name):
    call, message = ZEROS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_zeros_that_are_traced_give_nan():
    assert jnp.isnan(jax.jit(kernel_alignment)(0 * A, A))
    assert jnp.isnan(jax.vmap(relative_kernel_change)(0 * A[None], 0 * A[None])[0])


SIZES = [1e20, 1e-20, 1.0]


@pytest.mark.thorough
@pytest.mark.parametrize(("outputs", "weights"), list(itertools.product(SIZES, SIZES[::-1])))
def test_kappa_is_free_of_the_units_of_weights_and_outputs(weights, outputs):
    weights, outputs = (np.float32(2.0 ** np.round(np.log2(u))) for u in (weights, outputs))
    w0 = {"u": normal(0, 3, 4).astype(jnp.float32), "v": normal(1, 4, 2).astype(jnp.float32)}
    x, y = (normal(s, 3, n).astype(jnp.float32) for s, n in ((2, 3), (3, 2)))
    net = lambda w, x: jnp.tanh(x @ w["u"]) @ w["v"]  # noqa: E731 (a function of one line)
    f = lambda w, x: net(jax.tree.map(lambda a: a / weights, w), x) * outputs  # noqa: E731 (a function of one line)
    scaled = jax.tree.map(lambda a: a * weights, w0)
    one = kappa(net, w0, x, y, key=jax.random.key(0), restarts=3)
    found = kappa(f, scaled, x, y * outputs, key=jax.random.key(0), restarts=3)
    assert found.lower.dtype == jnp.float32
    assert found.lower == pytest.approx(float(one.lower), rel=1e-5)
    assert found.upper == pytest.approx(float(one.upper), rel=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_kappa_of_half_precision_is_that_of_float32_up_to_its_rounding(dtype):
    w0, x, y = (a.astype(dtype) for a in (normal(0, 3, 2), normal(1, 3, 3), normal(2, 3, 2)))
    net = lambda w, x: jnp.tanh(x @ w)  # noqa: E731 (a function of one line)
    found = kappa(net, w0, x, y, key=jax.random.key(0))
    exact = kappa(net, *(a.astype(jnp.float32) for a in (w0, x, y)), key=jax.random.key(0))
    assert found.upper.dtype == jnp.float32
    assert found.upper == pytest.approx(float(exact.upper), rel=8 * float(jnp.finfo(dtype).eps))


ONE = {"a": np.ones(2)}
KERNEL = np.eye(3)
BAD = {
    "other weights": (lambda: relative_weight_movement(W, ONE), "`params` must have the structure"),
    "other layers": (
        lambda: layer_movement(W, ONE),
        "`params` must have the structure of `params0`",
    ),
    "one step": (
        lambda: step_sizes({"a": np.ones((1, 2))}),
        "`params` must hold the weights of at",
    ),
    "a bare number": (
        lambda: step_sizes({"a": np.ones(())}),
        "`params` must have the batch on axis",
    ),
    "another kernel": (lambda: relative_kernel_change(KERNEL, np.eye(2)), "`kernel` must have the"),
    "another alignment": (lambda: kernel_alignment(KERNEL, np.eye(2)), "`a` must have the shape"),
    "other targets": (
        lambda: target_alignment(jnp.eye(3), jnp.ones((2, 1))),
        "`y` must be the targets",
    ),
    "other predictions": (
        lambda: tangent_gap(np.ones(3), np.ones((3, 1))),
        "`prediction` must have",
    ),
    "other patterns": (
        lambda: pattern_change(lambda w, x: x, W, ONE, 0),
        "`params` must have the str",
    ),
    "no restarts": (
        lambda: kappa(lambda w, x: w * x, 1.0, np.ones((2, 1)), np.ones((2, 1)), key=0, restarts=0),
        "`restarts` must be at least 1, got 0",
    ),
    "no iterations": (
        lambda: kappa(
            lambda w, x: w * x, 1.0, np.ones((2, 1)), np.ones((2, 1)), key=0, iterations=0
        ),
        "`iterations` must be at least 1, got 0",
    ),
    "flat targets": (
        lambda: kappa(lambda w, x: w * x, 1.0, np.ones((2, 1)), np.ones(2), key=0),
        r"`y` must have shape \(2, 1\), got \(2,\). Use y\[:, None\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_integer_parameters_have_no_kappa():
    with pytest.raises(TypeError, match="`params0` must hold floats"):
        kappa(lambda w, x: w * x, 1, np.ones((2, 1)), np.ones((2, 1)), key=0)


@pytest.mark.parametrize("function", [lazyjax.kernel_alignment, lazyjax.relative_kernel_change])
def test_operators_are_sent_to_their_estimates(function):
    A = lazyjax.as_operator(jnp.eye(3))
    with pytest.raises(TypeError, match=f"`{function.__name__}` must be given arrays"):
        function(A, A)
