"""Natural gradients against the system of all parameters, and what SPRING says of its step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kernel_reference import quickly
from thoroughness import few

import lazyjax

RNG = np.random.default_rng(0)
X = RNG.normal(size=(7, 3))
WEIGHTS = np.arange(1.0, 8.0) / 9


def net(p, x):
    hidden = jnp.tanh(jnp.tanh(x @ p["a"] + p["b"][None]) @ p["c"])
    return hidden @ p["d"]


def complex_ones(*shape):
    return RNG.normal(size=shape) + 1j * RNG.normal(size=shape)


SHAPES = {"a": (3, 6), "b": (6,), "c": (6, 5), "d": (5, 2)}
PARAMS = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
COMPLEX = {name: 0.5 * complex_ones(*shape) for name, shape in SHAPES.items()}
RESIDUAL = RNG.normal(size=(7, 2))


def flat(tree):
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])


def rows(f, p):
    """Give J (N K, P) of real outputs by real parameters."""
    leaves = jax.tree.leaves(quickly(jax.jacobian(f), p, X))
    sizes = [np.size(w) for w in jax.tree.leaves(p)]
    return np.concatenate([j.reshape(-1, n) for j, n in zip(leaves, sizes, strict=True)], 1)


def system(jacobian, residual, weights, center):
    """Give B (N K, P) and sqrt(W) r (N K,)."""
    k = jacobian.shape[0] // len(X)
    by_example = jacobian.reshape(len(X), k, -1)
    r = np.asarray(residual).reshape(len(X), k)
    if center:
        by_example = by_example - np.average(by_example, axis=0, weights=weights)
        r = r - np.average(r, axis=0, weights=weights)
    root = np.sqrt(weights)[:, None]
    return (root[..., None] * by_example).reshape(len(X) * k, -1), (root * r).reshape(-1)


@few(("center", "weights"), [(True, WEIGHTS), (False, None), (True, None), (False, WEIGHTS)])
def test_it_solves_the_system_of_all_parameters(center, weights):
    found = lazyjax.natural_gradient(
        net, PARAMS, X, RESIDUAL, damping=0.1, center=center, weights=weights
    )
    B, r = system(
        rows(net, PARAMS), RESIDUAL, weights if weights is not None else np.ones(7) / 7, center
    )
    expected = np.linalg.solve(B.T @ B + 0.1 * np.eye(B.shape[1]), B.T @ r)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, PARAMS)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-9, atol=1e-11)


def test_with_momentum_it_is_the_least_squares_solution_nearest_to_the_last_update():
    """delta = argmin |B d - r|^2 + damping |d - mu previous|^2 (Goldshlager et al., equation 3.3)."""
    previous = jax.tree.map(lambda w: 0.1 * np.cos(w), PARAMS)
    found = lazyjax.natural_gradient(
        net, PARAMS, X, RESIDUAL, damping=0.1, center=True, momentum=0.9, previous=previous
    )
    B, r = system(rows(net, PARAMS), RESIDUAL, np.ones(7) / 7, True)
    left = np.concatenate([B, np.sqrt(0.1) * np.eye(B.shape[1])])
    right = np.concatenate([r, np.sqrt(0.1) * 0.9 * flat(previous)])
    expected = np.linalg.lstsq(left, right, rcond=None)[0]
    np.testing.assert_allclose(flat(found), expected, rtol=1e-8, atol=1e-10)


def test_the_cut_leaves_small_eigenvectors_out():
    found = lazyjax.natural_gradient(net, PARAMS, X, RESIDUAL, damping=0.0, cutoff=1e-2)
    B, r = system(rows(net, PARAMS), RESIDUAL, np.ones(7) / 7, False)
    u, s, vt = np.linalg.svd(B, full_matrices=False)
    kept = s**2 > 1e-2 * s[0] ** 2
    assert 0 < kept.sum() < len(s)
    expected = vt[kept].T @ (u[:, kept].T @ r / s[kept])
    np.testing.assert_allclose(flat(found), expected, rtol=1e-8, atol=1e-10)


REAL, IMAGINARY = np.asarray(RESIDUAL).T


@few("residual", [REAL + 1j * IMAGINARY, REAL])
def test_complex_outputs_of_real_parameters_are_two_real_ones(residual):
    def amplitude(p, x):
        y = net(p, x)
        return y[:, 0] + 1j * y[:, 1]

    pair = np.stack([residual.real, residual.imag], -1)

    def both(p):
        options = {"damping": 0.1, "center": True}
        found = lazyjax.natural_gradient(amplitude, p, X, residual, complex="real", **options)
        return found, lazyjax.natural_gradient(net, p, X, pair, **options)

    found, expected = quickly(both, PARAMS)
    np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-9, atol=1e-11)


@few("mu", [0.8, None])
def test_complex_parameters_have_a_hermitian_form(mu):
    y = quickly(jax.jacobian(net, holomorphic=True), COMPLEX, X + 0j)
    J = np.concatenate([j.reshape(14, -1) for j in jax.tree.leaves(y)], 1)
    residual = complex_ones(7, 2)
    B, r = system(J, residual, np.ones(7) / 7, True)
    last = None if mu is None else jax.tree.map(lambda w: 0.1 * np.asarray(w), COMPLEX)
    found = lazyjax.natural_gradient(
        net,
        COMPLEX,
        X,
        residual,
        damping=0.1,
        center=True,
        complex="hermitian",
        momentum=mu,
        previous=last,
    )
    shift = 0 if last is None else mu * flat(last)
    right = B.conj().T @ (r - B @ (shift + np.zeros(B.shape[1])))
    expected = np.linalg.solve(B.conj().T @ B + 0.1 * np.eye(B.shape[1]), right) + shift
    np.testing.assert_allclose(flat(found), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.thorough
def test_complex_parameters_may_be_two_real_ones():
    """The real form of complex parameters is that of their parts."""
    residual = complex_ones(7, 2)
    pair = np.stack([residual.real, residual.imag], -1)
    apart = jax.tree.map(lambda w: (np.real(w), np.imag(w)), COMPLEX)

    def parts(p, x):
        pairs = {name: one + 1j * other for name, (one, other) in p.items()}
        y = net(pairs, x)
        return jnp.stack([y.real, y.imag], -1)

    def both(p, apart):
        found = lazyjax.natural_gradient(net, p, X, residual, damping=0.1, complex="real")
        return found, lazyjax.natural_gradient(parts, apart, X, pair, damping=0.1)

    found, expected = quickly(both, COMPLEX, apart)
    together = {name: a + 1j * b for name, (a, b) in expected.items()}
    np.testing.assert_allclose(flat(found), flat(together), rtol=1e-8, atol=1e-10)


def test_it_is_a_transformation_of_optax_under_scan():
    rule = lazyjax.scale_by_natural_gradient(net, damping=1e-3, center=True, momentum=0.9)
    optimizer = optax.chain(rule, optax.scale_by_learning_rate(0.1))

    def step(carry, _):
        p, state = carry
        residual = net(p, X) - RESIDUAL
        update, state = optimizer.update(p, state, p, x=X, residual=residual)
        return (optax.apply_updates(p, update), state), update

    (found, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, length=3))(
        PARAMS
    )

    @jax.jit
    def by_hand(p, last):
        last = lazyjax.natural_gradient(
            net, p, X, net(p, X) - RESIDUAL, damping=1e-3, center=True, momentum=0.9, previous=last
        )
        return jax.tree.map(lambda w, d: w - 0.1 * d, p, last), last

    p, last = PARAMS, jax.tree.map(np.zeros_like, PARAMS)
    for _ in range(3):
        p, last = by_hand(p, last)
    np.testing.assert_allclose(flat(found), flat(p), rtol=1e-7, atol=1e-9)


def test_what_is_not_differentiated_does_not_move():
    found = lazyjax.natural_gradient(
        net,
        {**PARAMS, "steps": jnp.arange(3)},
        X,
        RESIDUAL,
        damping=0.1,
        wrt=lambda path: path in "ac",
    )
    assert not np.any(found["b"])
    assert not np.any(found["steps"])
    assert found["steps"].dtype == jnp.arange(3).dtype
    assert np.any(found["a"])


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"damping": 0.0}, ValueError, "`damping` must be positive"),
        ({"damping": -1.0, "cutoff": 0.1}, ValueError, "`damping` must be 0 or more"),
        ({"cutoff": -0.1}, ValueError, "`cutoff` must be 0 or more"),
        ({"momentum": 0.9}, ValueError, "`previous` must be given with `momentum`"),
        ({"previous": PARAMS}, ValueError, "`momentum` must be given with `previous`"),
        ({"momentum": -0.9, "previous": PARAMS}, ValueError, "`momentum` must be 0 or more"),
        ({"momentum": 0.9, "previous": {}}, ValueError, "`previous` must have the structure"),
        ({"residual": RESIDUAL[:, 0]}, ValueError, "`residual` must have the shape of f"),
        ({"residual": RESIDUAL.astype(int)}, TypeError, "`residual` must hold floats"),
        ({"weights": np.ones(3)}, ValueError, "`weights` must have shape"),
        ({"complex": "real"}, ValueError, "`complex` must be None"),
    ],
)  # fmt: skip # to be read as a table
def test_bad_input_is_refused(options, kind, text):
    options = {"damping": 0.1, "residual": RESIDUAL, **options}
    residual = options.pop("residual")
    with pytest.raises(kind, match=text):
        lazyjax.natural_gradient(net, PARAMS, X, residual, **options)


def test_a_hermitian_form_of_real_parameters_is_refused():
    with pytest.raises(ValueError, match="`params` must be complex for"):
        lazyjax.natural_gradient(
            lambda p, x: net(p, x) + 0j, PARAMS, X, RESIDUAL, damping=0.1, complex="hermitian"
        )


@pytest.mark.parametrize("shape", [(7,), (7, 2, 2)])
@pytest.mark.parametrize("kind", [float, complex])
def test_residuals_of_other_outputs_are_refused(shape, kind):
    for f in (net, lambda p, x: jnp.abs(net(p, x))):
        residual = jnp.ones(shape, kind if f is net else float)
        with pytest.raises(ValueError, match=r"`residual` must have the shape .* \(7, 2\), got"):
            lazyjax.natural_gradient(f, COMPLEX, X, residual, damping=0.1, complex="real")
    with pytest.raises(TypeError, match="`residual` must be real"):
        lazyjax.natural_gradient(f, COMPLEX, X, RESIDUAL + 0j, damping=0.1, complex="real")


def test_weights_that_are_held_by_a_compiled_function_are_known():
    weights = jnp.ones(7)
    found = jax.jit(
        lambda p: lazyjax.natural_gradient(net, p, X, RESIDUAL, damping=0.1, weights=weights)
    )(PARAMS)
    plain = lazyjax.natural_gradient(net, PARAMS, X, RESIDUAL, damping=0.1, weights=weights)
    np.testing.assert_allclose(flat(found), flat(plain), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["params", "x", "residual"])
def test_the_transformation_says_what_it_needs(name):
    rule = lazyjax.scale_by_natural_gradient(net, damping=1e-3)
    given = {"params": PARAMS, "x": X, "residual": RESIDUAL, name: None}
    with pytest.raises(ValueError, match=f"`{name}` must be given to update"):
        rule.update(PARAMS, rule.init(PARAMS), given.pop("params"), **given)
