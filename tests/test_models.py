import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lazyjax.models import (
    ACTIVATIONS,
    MLP,
    PARAMETRIZATIONS,
    Sinusoidal,
    deep_mlp,
    from_linen,
    from_nnx,
    preactivations,
    shallow_mlp,
    sinusoidal_features,
)

X = jnp.linspace(-1, 1, 9)[:, None]


def size(params):
    return sum(w.size for w in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("module", "parameters"),
    [(shallow_mlp(10), 31), (shallow_mlp(1000), 3001), (deep_mlp(10), 471), (deep_mlp(8), 313)],
)
def test_the_networks_have_as_many_parameters_as_in_the_practical(module, parameters):
    f, params = from_linen(module, jax.random.key(0), X)
    assert size(params) == parameters
    assert f(params, X).shape == (9, 1)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_an_mlp_is_the_formula(activation, parametrization):
    module = MLP((4, 5), outputs=3, activation=activation, parametrization=parametrization)
    x = jax.random.normal(jax.random.key(1), (6, 2))
    f, params = from_linen(module, jax.random.key(0), x)
    assert list(params) == ["hidden_0", "hidden_1", "output"]
    h = x
    for name in params:
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        factor = kernel.shape[0] ** -0.5 if parametrization == "ntk" else 1.0
        h = factor * (h @ kernel) + bias[None]
        h = h if name == "output" else ACTIVATIONS[activation](h)
    np.testing.assert_allclose(f(params, x), h, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fan_in", [1, 16])
def test_pytorch_starts_uniform_in_one_over_the_root_of_fan_in(fan_in):
    x = jnp.zeros((1, fan_in))
    _, params = from_linen(MLP((4000,)), jax.random.key(0), x)
    bound = fan_in**-0.5
    for w in params["hidden_0"].values():
        assert jnp.abs(w).max() <= bound
        assert jnp.std(w) == pytest.approx(bound / 3**0.5, rel=0.03)
        assert jnp.abs(jnp.mean(w)) < 0.05 * bound
    for w in params["output"].values():
        assert jnp.abs(w).max() <= 4000**-0.5


def test_lecun_and_ntk_start_as_their_papers_say():
    x = jnp.zeros((1, 16))
    _, lecun = from_linen(MLP((4000,), parametrization="lecun"), jax.random.key(0), x)
    assert jnp.std(lecun["hidden_0"]["kernel"]) == pytest.approx(0.25, rel=0.03)
    assert jnp.all(lecun["hidden_0"]["bias"] == 0)
    _, ntk = from_linen(MLP((4000,), parametrization="ntk"), jax.random.key(0), x)
    for w in ntk["hidden_0"].values():
        assert jnp.std(w) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("module", [shallow_mlp(3), deep_mlp(3), Sinusoidal(4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_parameters_and_outputs_have_the_dtype_of_x(module, dtype):
    x = X.astype(dtype)
    f, params = from_linen(module, jax.random.key(0), x)
    assert {w.dtype for w in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert f(params, x).dtype == dtype


@pytest.mark.parametrize("first_k", [0, 1])
def test_the_sinusoidal_model_is_linear_in_its_features(first_k):
    features = sinusoidal_features(X, dimension=6, frequency=0.7, first_k=first_k)
    assert features.shape == (9, 6)
    for i in range(3):
        r = 0.7 * (i + first_k) * np.asarray(X[:, 0])
        np.testing.assert_allclose(features[:, i], np.sin(r), atol=1e-15)
        np.testing.assert_allclose(features[:, 3 + i], np.cos(r), atol=1e-15)
    f, params = from_linen(Sinusoidal(6, 0.7, first_k), jax.random.key(0), X)
    output = params["output"]
    expected = features @ output["kernel"] + output["bias"][None]
    np.testing.assert_allclose(f(params, X), expected, rtol=1e-13)
    assert jnp.abs(output["kernel"]).max() <= 6**-0.5


def test_an_ensemble_is_made_under_vmap():
    keys = jax.random.split(jax.random.key(0), 5)
    params = jax.vmap(lambda key: from_linen(shallow_mlp(4), key, X)[1])(keys)
    assert params["hidden_0"]["kernel"].shape == (5, 1, 4)
    assert len(np.unique(params["output"]["bias"])) == 5


def test_equal_modules_compile_once():
    traces = []

    @jax.jit
    def apply(f, params):
        traces.append(1)
        return f(params, X)

    for seed in range(3):
        apply(*from_linen(shallow_mlp(4), jax.random.key(seed), X))
        apply(*from_nnx(nnx.Linear(1, 3, param_dtype=jnp.float64, rngs=nnx.Rngs(seed))))
    assert len(traces) == 2
    f, _ = from_linen(shallow_mlp(4), jax.random.key(0), X)
    g, _ = from_linen(shallow_mlp(5), jax.random.key(0), X)
    assert jax.tree.structure(f) != jax.tree.structure(g)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train, shift=0.0):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        return nn.Dropout(0.5, deterministic=not train)(x) + shift

    def double(self, x, train):
        return 2 * self(x, train)


def test_collections_other_than_params_are_constants_and_keywords_go_to_every_call():
    module = Normed()
    f, params = from_linen(module, jax.random.key(0), X, train=False, shift=1.0)
    assert set(params) == {"BatchNorm_0", "Dense_0"}
    assert len(jax.tree.leaves(f)) == 2  # running mean and variance
    statistics = {"batch_stats": {"BatchNorm_0": {"mean": jnp.ones(3), "var": 4 * jnp.ones(3)}}}
    g, same = from_linen(module, None, X, variables={"params": params, **statistics}, train=False)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    z = X @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None]
    np.testing.assert_allclose(f(params, X) - 1, z / (1 + 1e-5) ** 0.5, rtol=1e-6)
    np.testing.assert_allclose(g(params, X), (z - 1) / (4 + 1e-5) ** 0.5, rtol=1e-6)
    before = jax.tree.map(np.asarray, f)
    f(params, X)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, f))


def test_another_method_may_be_the_model():
    f, params = from_linen(Normed(), jax.random.key(0), X, train=False)
    g, _ = from_linen(
        Normed(), None, X, variables={"params": params, **f.args[0]}, method="double", train=False
    )
    np.testing.assert_allclose(g(params, X), 2 * f(params, X))


def test_settings_that_cannot_be_hashed_work():
    class Listed(nn.Module):
        sizes: list

        @nn.compact
        def __call__(self, x, scales):
            return nn.Dense(self.sizes[0])(x) * scales[0]

    f, params = from_linen(Listed([2]), jax.random.key(0), X, scales=[3.0])
    assert jax.jit(lambda f, w: f(w, X))(f, params).shape == (9, 2)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(1, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.norm(self.first(x))))


def test_an_nnx_module_becomes_a_pure_function_of_its_params():
    module = Nnx(nnx.Rngs(0))
    f, params = from_nnx(module)
    assert set(params) == {"first", "norm", "last"}
    assert isinstance(params["first"]["kernel"], jax.Array)
    np.testing.assert_allclose(f(params, X), module(X), rtol=1e-6)
    shifted = jax.tree.map(lambda w: w + 0.1, params)
    assert not np.allclose(f(shifted, X), module(X))
    np.testing.assert_allclose(f(params, X), module(X), rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(f(w, X) ** 2)))(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert jnp.abs(gradient["first"]["kernel"]).max() > 0


def test_preactivations_are_what_the_activations_get():
    module = MLP((4, 5), activation="tanh")
    _, params = from_linen(module, jax.random.key(0), X)
    first, second = preactivations(module)(params, X)
    z = X @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"][None]
    np.testing.assert_allclose(first, z, rtol=1e-13)
    assert second.shape == (9, 5)
    np.testing.assert_allclose(
        second,
        jnp.tanh(z) @ params["hidden_1"]["kernel"] + params["hidden_1"]["bias"][None],
        rtol=1e-12,
    )


KEY = jax.random.key
BAD = {
    "no width": (lambda: shallow_mlp(0), ValueError, "`widths` must be at least 1, got 0"),
    "half a unit": (lambda: deep_mlp(2.5), TypeError, "`widths` must be a whole number, got 2.5"),
    "no output": (lambda: MLP((3,), outputs=0), ValueError, "`outputs` must be at least 1"),
    "an activation": (lambda: MLP((3,), activation="rleu"), ValueError, "Did you mean relu"),
    "a start": (lambda: MLP((3,), parametrization="torch"), ValueError, "Did you mean pytorch"),
    "an odd dimension": (
        lambda: Sinusoidal(7),
        ValueError,
        "`dimension` must be even.*7. Use 8",
    ),
    "no features": (lambda: Sinusoidal(0), ValueError, "`dimension` must be at least 2, got 0"),
    "a first k below 0": (lambda: Sinusoidal(4, first_k=-1), ValueError, "`first_k` must be at"),
    "no frequency": (lambda: Sinusoidal(4, 0.0), ValueError, "`frequency` must be positive"),
    "x of shape (N,)": (
        lambda: sinusoidal_features(jnp.zeros(3), dimension=4),
        ValueError,
        r"`x` must have shape \(N, 1\), got \(3,\). Use x\[:, None\]",
    ),
    "no key": (lambda: from_linen(shallow_mlp(3), None, X), ValueError, "`key` must be given"),
    "variables without params": (
        lambda: from_linen(shallow_mlp(3), None, X, variables={"batch_stats": {}}),
        ValueError,
        r"`variables` must hold the collection 'params', got \['batch_stats'\]",
    ),
    "a function for a module": (
        lambda: from_linen(lambda x: x, KEY(0), X),
        TypeError,
        r"`module` must be a flax.linen.Module, got function. Use a model function f\(params, x\)",
    ),
    "an NNX module for linen": (
        lambda: from_linen(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), KEY(0), X),
        TypeError,
        "got Linear. Use from_nnx",
    ),
    "a linen module for NNX": (
        lambda: from_nnx(nn.Dense(3)),
        TypeError,
        "`module` must be a flax.nnx.Module, got Dense. Use from_linen",
    ),
    "preactivations of another module": (
        lambda: preactivations(nn.Dense(3)),
        TypeError,
        "`module` must be an MLP of lazyjax, got Dense",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_models_are_refused(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
