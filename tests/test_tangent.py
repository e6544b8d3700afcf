import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from thoroughness import few

from lazyjax.derivatives import has_custom_vjp, jvp, linearization
from lazyjax.tangent import center, linearize, output_scale, scale, taylor


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


def with_activation(activation):
    def f(params, x):
        hidden = activation(x @ params["hidden_0"] + params["bias"])
        return jnp.tanh(hidden @ params["hidden_1"]) @ params["output"]

    return f


def through_scan(params, x):
    def layer(h, w):
        return jax.checkpoint(lambda h: jnp.tanh(h @ w))(h), None

    h, _ = jax.lax.scan(layer, x @ params["hidden_0"], params["hidden_1"][None])
    return h @ params["output"] + 0 * params["bias"].sum()


def through_cond(params, x):
    h = x @ params["hidden_0"] + params["bias"]
    h = jax.lax.cond(params["bias"][0, 0] < 10, jnp.tanh, jnp.sin, h)
    return h @ params["hidden_1"] @ params["output"]


MODELS = {
    "tanh": with_activation(jnp.tanh),
    "custom_vjp": with_activation(sine),
    "custom_vjp under jit and scan": with_activation(
        jax.jit(lambda h: jax.lax.scan(lambda c, _: (sine(c), None), h, length=1)[0])
    ),
    "scan and remat": through_scan,
    "cond": through_cond,
}


@pytest.fixture
def params0():
    rng = np.random.default_rng(0)
    shapes = {"hidden_0": (2, 5), "bias": (1, 5), "hidden_1": (5, 5), "output": (5, 3)}
    return {name: jnp.asarray(rng.normal(size=shape) / 2) for name, shape in shapes.items()}


@pytest.fixture
def direction(params0):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), params0)


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(2).normal(size=(7, 2)))


def moved(params0, direction, size):
    def along(w, d):
        return jnp.asarray(np.asarray(w) + size * np.asarray(d))

    return jax.tree.map(along, params0, direction)


def dense_tangent(f, params0, params, x):
    """The slow reference: f + J delta with the whole Jacobian."""
    value = np.asarray(f(params0, x))
    for name, jacobian in jax.jit(jax.jacrev(f))(params0, x).items():
        delta = np.asarray(params[name]) - np.asarray(params0[name])
        value = value + np.tensordot(jacobian, delta, axes=delta.ndim)
    return value


@few("name", reversed(MODELS))
def test_linearize_is_the_value_plus_the_jacobian_times_the_displacement(
    name, params0, direction, x
):
    f, params = MODELS[name], moved(params0, direction, 0.3)
    expected = dense_tangent(f, params0, params, x)
    f_lin, products = jax.jit(linearize(f, params0)), jax.jit(linearize(f, params0, x))
    for y in (f_lin(params, x), products(params)):
        assert y.shape == expected.shape == (7, 3)
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)


@few("order", [2, 0, 1, 3])
@few("name", ["custom_vjp under jit and scan", "scan and remat", "tanh", "custom_vjp", "cond"], 2)
def test_the_taylor_error_has_slope_order_plus_one(name, order, params0, direction, x):
    f = MODELS[name]
    f_taylor = jax.jit(taylor(f, params0, order))
    sizes = np.array([0.02, 0.01])
    errors = []
    for size in sizes:
        params = moved(params0, direction, size)
        errors.append(float(jnp.linalg.norm(f_taylor(params, x) - f(params, x))))
    slope = np.log(errors[0] / errors[1]) / np.log(sizes[0] / sizes[1])
    assert abs(slope - (order + 1)) < 0.15


def test_the_error_of_linearize_has_slope_two(params0, direction, x):
    f, sizes = MODELS["tanh"], np.array([1e-2, 1e-3, 1e-4])
    f_lin = linearize(f, params0)
    points = [moved(params0, direction, size) for size in sizes]
    errors = [float(jnp.linalg.norm(f_lin(w, x) - f(w, x))) for w in points]
    slopes = np.diff(np.log(errors)) / np.diff(np.log(sizes))
    np.testing.assert_allclose(slopes, 2.0, atol=0.02)


@few("name", sorted(MODELS, key=lambda name: name != "custom_vjp"))
def test_taylor_of_order_one_is_linearize(name, params0, direction, x):
    f, params = MODELS[name], moved(params0, direction, 0.5)
    y, wanted = (jax.jit(g)(params, x) for g in (taylor(f, params0, 1), linearize(f, params0)))
    np.testing.assert_allclose(y, wanted, rtol=1e-12, atol=1e-13)


def test_taylor_of_order_two_is_exact_for_a_quadratic_model(params0, direction, x):
    def f(w, x):
        return (x @ w["hidden_0"]) ** 2

    params = moved(params0, direction, 1.0)
    y = jax.jit(taylor(f, params0, 2))(params, x)
    np.testing.assert_allclose(y, f(params, x), rtol=1e-12, atol=1e-14)


def test_relu_networks_expand_to_any_order(params0, direction, x):
    f = with_activation(jax.nn.relu)
    params = moved(params0, direction, 1e-4)
    error = jnp.linalg.norm(jax.jit(taylor(f, params0, 3))(params, x) - f(params, x))
    assert error < 1e-13


def test_center_is_zero_at_the_anchor_and_keeps_the_jacobian(params0, x):
    f = MODELS["tanh"]
    h = center(f, params0)
    assert jnp.all(h(params0, x) == 0)
    jacobians = (jax.tree.leaves(jax.jit(jax.jacrev(g))(params0, x)) for g in (h, f))
    for a, b in zip(*jacobians, strict=True):
        np.testing.assert_array_equal(a, b)


def test_scale_multiplies_the_output_and_tells_its_alpha(params0, x):
    f = MODELS["tanh"]
    g = scale(f, 30.0)
    np.testing.assert_allclose(g(params0, x), 30 * f(params0, x), rtol=1e-15)
    assert output_scale(g) == 30.0
    assert output_scale(f) is None
    assert output_scale(center(f, params0)) is None


def test_transforms_can_be_made_under_vmap_one_a_member(params0, direction, x):
    f = MODELS["tanh"]
    each = [params0, moved(params0, direction, 1.0)]
    anchors = jax.tree.map(lambda *w: jnp.asarray(np.stack(w)), *each)
    alphas = jnp.array([1.0, 10.0])

    def one(w, alpha):
        return scale(center(linearize(f, w), w), alpha)

    def two_steps(anchors, alphas):
        return jax.vmap(lambda g: g(params0, x))(jax.vmap(one)(anchors, alphas))

    outputs = jax.jit(two_steps)(anchors, alphas)
    alone = jax.jit(lambda w, alpha: one(w, alpha)(params0, x))
    for output, anchor, alpha in zip(outputs, each, alphas, strict=True):
        np.testing.assert_allclose(output, alone(anchor, alpha), rtol=1e-12, atol=1e-13)
    products = jax.vmap(lambda w: linearize(f, w, x))
    last = jax.eval_shape(lambda w: jax.vmap(lambda g: g(params0))(products(w)), anchors)
    assert last.shape == (2, 7, 3)


def test_a_transform_made_twice_compiles_once(params0, direction, x):
    f = MODELS["tanh"]
    traces = []

    @jax.jit
    def apply(g, params, x):
        traces.append(1)
        return g(params, x)

    for size in (0.0, 0.1):
        apply(linearize(f, moved(params0, direction, size)), params0, x)
        apply(taylor(f, moved(params0, direction, size), 2), params0, x)
    assert len(traces) == 2


def test_custom_vjps_are_found_where_they_are_differentiated(params0, x):
    assert has_custom_vjp(MODELS["custom_vjp"], params0, x)
    assert has_custom_vjp(MODELS["custom_vjp under jit and scan"], params0, x)
    assert not has_custom_vjp(MODELS["tanh"], params0, x)
    assert not has_custom_vjp(lambda h: jax.nn.relu(h), x)

    @jax.custom_jvp
    def opaque(h):
        return sine(h)

    opaque.defjvp(lambda primals, tangents: (opaque(*primals), tangents[0]))
    assert not has_custom_vjp(opaque, x)


def test_a_straight_through_estimator_keeps_its_own_gradient():
    @jax.custom_vjp
    def sign(h):
        return jnp.sign(h)

    sign.defvjp(lambda h: (jnp.sign(h), None), lambda _, g: (g,))
    value, slope = jvp(sign, jnp.array([0.5, -2.0]), jnp.array([3.0, 4.0]))
    assert value.tolist() == [1.0, -1.0]
    assert slope.tolist() == [3.0, 4.0]
    _, product = linearization(sign, jnp.array([0.5, -2.0]))
    assert product(jnp.array([3.0, 4.0])).tolist() == [3.0, 4.0]


def test_float32_stays_float32(params0, x):
    single = jax.tree.map(lambda w: w.astype(jnp.float32), (params0, x))
    for g in (
        linearize(MODELS["tanh"], single[0]),
        taylor(MODELS["tanh"], single[0], 2),
        scale(center(MODELS["tanh"], single[0]), 3.0),
        scale(center(MODELS["tanh"], single[0]), jnp.asarray(3.0)),
    ):
        assert jax.eval_shape(g, *single).dtype == jnp.float32


def test_transforms_return_model_functions(params0):
    assert isinstance(linearize(MODELS["tanh"], params0), Partial)


@pytest.mark.parametrize("transform", [linearize, center, lambda f, w: taylor(f, w, 2)])
def test_anchors_of_integers_are_refused(transform, params0):
    whole = jax.tree.map(lambda w: w.astype(int), params0)
    with pytest.raises(TypeError, match=r"`params0`.* must hold floats, got int64. Convert it"):
        transform(MODELS["tanh"], whole)


@pytest.mark.parametrize("transform", [linearize, center, lambda f, w: taylor(f, w, 2)])
def test_complex_anchors_are_refused_without_dropping_a_part(transform, params0):
    both = jax.tree.map(lambda w: w + 0j, params0)
    message = (
        r"`params0`\['bias'\] must be real, got complex128. Split it .* imaginary part inside f."
    )
    with pytest.raises(TypeError, match=message):
        transform(MODELS["tanh"], both)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_scale_beyond_half_precision_leaves_finite_outputs(dtype):
    f = lambda w, x: w * x  # noqa: E731 (a function of one line)
    y = scale(f, 1e5)(jnp.asarray(2.0, dtype), jnp.ones((3, 1), dtype))
    assert y.dtype == jnp.float32
    assert y.tolist() == [[2e5]] * 3


@pytest.mark.parametrize("transform", [linearize, center, lambda f, w: taylor(f, w, 2)])
def test_what_is_no_function_is_refused(transform, params0):
    with pytest.raises(TypeError, match="`f` must be a model function.*got str. Use lazyjax"):
        transform("f", params0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, np.nan, np.inf])
def test_alphas_that_are_not_positive_are_refused(alpha):
    with pytest.raises(ValueError, match="`alpha` must be positive and finite, got"):
        scale(MODELS["tanh"], alpha)


@pytest.mark.parametrize(
    ("order", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_orders_that_are_no_whole_numbers_from_zero_are_refused(order, error, params0):
    with pytest.raises(error, match="`order` must be"):
        taylor(MODELS["tanh"], params0, order)


def test_parameters_that_do_not_fit_the_anchor_are_refused(params0, x):
    f_lin = linearize(MODELS["tanh"], params0)
    with pytest.raises(ValueError, match="`params` must have the structure of `params0`"):
        f_lin({"hidden_0": params0["hidden_0"]}, x)
    with pytest.raises(ValueError, match=r"`params`.*must have shape \(2, 5\), as in `params0`"):
        f_lin({**params0, "hidden_0": params0["hidden_0"][:1]}, x)
