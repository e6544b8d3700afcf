import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from thoroughness import few

from lazyjax.kernels import ntk
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

X = np.linspace(-1, 1, 9)[:, None]


def size(params):
    return sum(w.size for w in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("module", "parameters"),
    [(shallow_mlp(10), 31), (shallow_mlp(1000), 3001), (deep_mlp(10), 471), (deep_mlp(8), 313)],
)
def test_the_networks_have_as_many_parameters_as_in_the_practical(module, parameters):
    def made(key):
        f, params = from_linen(module, key, X)
        return params, f(params, X)

    params, outputs = jax.eval_shape(made, jax.random.key(0))
    assert size(params) == parameters
    assert outputs.shape == (9, 1)


PAIRED = [("relu", "pytorch"), ("tanh", "ntk"), ("gelu", "lecun")]
OTHERS = [p for p in itertools.product(ACTIVATIONS, PARAMETRIZATIONS) if p not in PAIRED]


@few(("activation", "parametrization"), PAIRED + OTHERS, 3)
def test_an_mlp_is_the_formula(activation, parametrization):
    module = MLP((4, 5), outputs=3, activation=activation, parametrization=parametrization)
    x = np.random.default_rng(1).normal(size=(6, 2))
    f, params = from_linen(module, jax.random.key(0), x)
    assert list(params) == ["hidden_0", "hidden_1", "output"]
    h = x
    for name in params:
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        factor = kernel.shape[0] ** -0.5 if parametrization == "ntk" else 1.0
        h = factor * (h @ kernel) + bias[None]
        h = h if name == "output" else ACTIVATIONS[activation](h)
    np.testing.assert_allclose(f(params, x), h, rtol=1e-12, atol=1e-14)


@few("fan_in", [16, 1])
def test_pytorch_starts_uniform_in_one_over_the_root_of_fan_in(fan_in):
    x = jnp.zeros((1, fan_in))
    _, params = from_linen(MLP((4000,)), jax.random.key(0), x)
    bound = fan_in**-0.5
    for w in map(np.asarray, params["hidden_0"].values()):
        assert np.abs(w).max() <= bound
        assert np.std(w) == pytest.approx(bound / 3**0.5, rel=0.03)
        assert np.abs(np.mean(w)) < 0.05 * bound
    for w in map(np.asarray, params["output"].values()):
        assert np.abs(w).max() <= 4000**-0.5


@pytest.mark.thorough
def test_lecun_and_ntk_start_as_their_papers_say():
    x = jnp.zeros((1, 16))
    _, lecun = from_linen(MLP((4000,), parametrization="lecun"), jax.random.key(0), x)
    assert np.std(lecun["hidden_0"]["kernel"]) == pytest.approx(0.25, rel=0.03)
    assert np.all(np.asarray(lecun["hidden_0"]["bias"]) == 0)
    _, ntk = from_linen(MLP((4000,), parametrization="ntk"), jax.random.key(0), x)
    for w in ntk["hidden_0"].values():
        assert np.std(w) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("module", [shallow_mlp(3), deep_mlp(3), Sinusoidal(4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_parameters_and_outputs_have_the_dtype_of_x(module, dtype):
    def made(key, x):
        f, params = from_linen(module, key, x)
        return params, f(params, x)

    found = jax.eval_shape(made, jax.random.key(0), np.asarray(X, dtype))
    assert {w.dtype for w in jax.tree.leaves(found)} == {jnp.dtype(dtype)}


@few("first_k", [1, 0])
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
        apply(*from_nnx(Counting(nnx.Rngs(seed))))
    assert len(traces) == 3
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


F64 = {"dtype": jnp.float64, "param_dtype": jnp.float64}


class Recurrent(nnx.Module):
    def __init__(self, rngs, cell):
        self.rnn = nnx.RNN(cell(1, 3, rngs=rngs, **F64))
        self.last = nnx.Linear(3, 2, rngs=rngs, **F64)

    def __call__(self, x):
        return self.last(self.rnn(jnp.stack([x, x**2], 1))[:, -1])


class Block(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(1, 1, rngs=rngs, **F64)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(jnp.tanh(self.dense(x)))


class Blocks(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Block))(rngs)

    def __call__(self, x):
        carried = nnx.scan(Block.__call__, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return carried(self.blocks, x)


class Sowing(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(1, 2, rngs=rngs, **F64)

    def __call__(self, x):
        self.sow(nnx.Intermediate, "hidden", self.dense(x))
        return jnp.tanh(self.hidden[-1])


class Counting(nnx.Module):
    """What it holds decides its outputs, and every call changes all of it."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(1, 2, rngs=rngs, **F64)
        self.calls = nnx.Variable(jnp.zeros(()))
        self.buffer, self.log, self.scale = np.ones((1, 2)), [2.0], 1.0

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        self.log.append(1.0)
        self.scale = 2 * self.scale
        factor = self.calls[...] * len(self.log) * self.log[0] * self.scale
        return self.dense(x) * factor * self.buffer

    def shifted(self, x, shift, *, rngs=None):
        noise = 0.0 if rngs is None else jax.random.normal(rngs(), (1, 2))
        return self.dense(x) + shift + noise


class Bridged(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(3, **F64)(x)
        self.sow("intermediates", "hidden", h)
        return nn.Dense(2, **F64)(jnp.tanh(h))


STATEFUL = {  # cells of every kind are rows of kernel_models.py
    "a counter, a list and a number": Counting,
    "linen": lambda rngs: nnx.bridge.ToNNX(Bridged(), rngs=rngs).lazy_init(X),
    "recurrence": lambda rngs: Recurrent(rngs, nnx.GRUCell),
    "dropout in a scan": Blocks,
    "sow": Sowing,
}


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")  # sow is what is tried
@few("name", STATEFUL, 2)
def test_modules_that_touch_their_state_become_pure_functions(name):
    module, other = STATEFUL[name](nnx.Rngs(0)), STATEFUL[name](nnx.Rngs(0))
    module.eval(), other.eval()
    f, params = from_nnx(module)
    assert f.func == from_nnx(other)[0].func
    y = f(params, X)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey))))
    np.testing.assert_array_equal(f(params, X), y)
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey))))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    with jax.numpy_rank_promotion("allow"):  # the module's own first call, as f's is
        np.testing.assert_allclose(other(X), y, rtol=1e-12)
        module(X)
    np.testing.assert_array_equal(f(params, X), y)
    value, tangents = jax.jvp(lambda w: f(w, X), (params,), (params,))
    np.testing.assert_allclose(value, y, rtol=1e-12)
    _, pullback = jax.vjp(jax.jit(lambda w: f(w, X)), params)
    along = optax.tree.vdot(pullback(y)[0], params)
    np.testing.assert_allclose(jnp.vdot(tangents, y), along, rtol=1e-12)


def test_later_changes_of_an_nnx_module_do_not_change_f():
    module = Counting(nnx.Rngs(0))
    f, params = from_nnx(module)
    y = f(params, X)
    module.scale, module.log[0] = 3.0, 5.0
    module.buffer[:] = 2.0
    module.calls[...] = jnp.ones(())
    module.dense.kernel[...] = 0 * module.dense.kernel[...]
    module.train()
    np.testing.assert_array_equal(f(params, X), y)


@pytest.mark.thorough
def test_batch_normalisation_in_training_is_a_pure_function_of_the_batch():
    rngs = nnx.Rngs(0)
    norm = nnx.BatchNorm(3, rngs=rngs, **F64)
    norm.mean, norm.var = nnx.BatchStat(jnp.zeros(3)), nnx.BatchStat(jnp.ones(3))  # of float64
    module = nnx.Sequential(nnx.Linear(1, 3, rngs=rngs, **F64), norm)
    f, params = from_nnx(module)
    z = np.asarray(X) @ params["layers"][0]["kernel"]
    expected = (z - z.mean(0, keepdims=True)) / np.sqrt(z.var(0, keepdims=True) + 1e-5)
    for _ in range(2):
        np.testing.assert_allclose(f(params, X), expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(norm.mean[...], np.zeros(3))
    np.testing.assert_array_equal(norm.var[...], np.ones(3))
    module.eval()
    np.testing.assert_allclose(f(params, X), expected, rtol=1e-10, atol=1e-12)

    def whole(w, x):
        return f(w, x[0])[None]

    (kernel,) = ntk(whole, params, X[None])[0]
    jacobian = jax.tree.leaves(jax.jit(jax.jacobian(f))(params, X))
    j = [np.reshape(j, (*z.shape, -1)) for j in jacobian]
    expected = sum(np.einsum("nkp,mlp->nkml", j, j) for j in j)
    assert kernel.shape == expected.shape
    np.testing.assert_allclose(kernel, expected, rtol=1e-10, atol=1e-12)


def test_params_are_what_a_variable_holds_and_not_what_it_gives():
    class Positive(nnx.Param):
        if hasattr(nnx.Param, "get_value"):

            def get_value(self, **options):
                return jnp.exp(super().get_value(**options))

        else:  # Flax 0.12.0

            def on_get_value(self, value):
                return jnp.exp(value)

    class Scale(nnx.Module):
        def __init__(self):
            self.w = Positive(jnp.ones((1, 2)))

        def __call__(self, x):
            return x @ self.w[...]

    f, params = from_nnx(Scale())
    np.testing.assert_array_equal(params["w"], np.ones((1, 2)))
    np.testing.assert_allclose(f(params, X), X @ (np.e * np.ones((1, 2))), rtol=1e-14)


@few("method", ["shifted", Counting.shifted, Counting(nnx.Rngs(1)).shifted])
def test_another_method_and_keywords_may_be_those_of_an_nnx_module(method):
    module = Counting(nnx.Rngs(0))
    f, params = from_nnx(module, method=method, shift=1.0)
    expected = X @ params["dense"]["kernel"] + params["dense"]["bias"][None] + 1
    np.testing.assert_allclose(f(params, X), expected, rtol=1e-13)
    assert f.func == from_nnx(module, method=method, shift=1.0)[0].func
    assert f.func != from_nnx(module, method=method, shift=2.0)[0].func
    rngs = nnx.Rngs(0)
    g, _ = from_nnx(module, method=method, shift=1.0, rngs=rngs)
    y = g(params, X)
    rngs()
    np.testing.assert_array_equal(g(params, X), y)
    np.testing.assert_allclose(jax.jit(g)(params, X), y, rtol=1e-13)
    pair, _ = from_nnx(module, method=lambda module, x: module.shifted(x["a"], x["b"]))
    np.testing.assert_allclose(pair(params, {"a": X, "b": 1.0}), expected, rtol=1e-13)


@pytest.mark.parametrize("derive", [lambda f, w: f(w, X), lambda f, w: ntk(f, w, X)])
def test_a_linen_module_in_training_names_its_cure(derive):
    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))

    class Dropped(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dropout(0.5, deterministic=not train)(nn.Dense(3)(x))

    f, params = from_linen(Normalised(), jax.random.key(0), X, train=True)
    cure = "`f` must be in evaluation mode.*train=False or use_running_average=True.*batch_stats"
    with pytest.raises(ValueError, match=cure):
        derive(f, params)
    f, params = from_linen(Dropped(), jax.random.key(0), X, train=True)
    cure = "`f` must be deterministic.*train=False or deterministic=True.*dropout"
    with pytest.raises(ValueError, match=cure):
        derive(f, params)


def test_preactivations_are_what_the_activations_get():
    module = MLP((4, 5), activation="tanh")
    _, params = from_linen(module, jax.random.key(0), X)
    first, second = preactivations(module)(params, X)
    params = jax.tree.map(np.asarray, params)
    z = np.asarray(X) @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"]
    np.testing.assert_allclose(first, z, rtol=1e-13)
    assert second.shape == (9, 5)
    z = np.tanh(z) @ params["hidden_1"]["kernel"] + params["hidden_1"]["bias"]
    np.testing.assert_allclose(second, z, rtol=1e-12)


class Deep(nnx.Module):
    def __init__(self, layer):
        self.layers = nnx.List([nnx.Linear(1, 1, rngs=nnx.Rngs(0)), nnx.Sequential(layer)])

    def __call__(self, x, y):
        return x


def dropping(layer):
    return lambda: from_nnx(Deep(layer()), method=lambda module, x: x)


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, a, b):
        return nn.Dense(2)(a + b)


KEY = jax.random.key
ONE_INPUT = (
    r"one input, and {} requires \['{}'\] too.*method=lambda module, x: module\(x\[\"a\"\], x"
)
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
    "dropout that is on": (
        dropping(lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0))),
        ValueError,
        r"`module` must be deterministic.*dropout is on at layers/1/layers/0. Call module.eval\(\)",
    ),
    "dropout in an attention": (
        dropping(
            lambda: nnx.MultiHeadAttention(1, 2, dropout_rate=0.5, decode=False, rngs=nnx.Rngs(0))
        ),
        ValueError,
        r"is on at layers/1/layers/0. Call module.eval\(\)",
    ),
    "dropout in a scan": (
        lambda: from_nnx(Blocks(nnx.Rngs(0))),
        ValueError,
        r"is on at blocks/dropout. Call module.eval\(\)",
    ),
    "dropout alone": (
        lambda: from_nnx(nnx.Dropout(0.5, rngs=nnx.Rngs(0))),
        ValueError,
        "is on at Dropout. Call",
    ),
    "an NNX module of two inputs": (
        lambda: from_nnx(Deep(jnp.tanh)),
        ValueError,
        ONE_INPUT.format("Deep", "y"),
    ),
    "a linen module of two inputs": (
        lambda: from_linen(TwoInputs(), KEY(0), X),
        ValueError,
        ONE_INPUT.format("TwoInputs", "b"),
    ),
    "a setting that is missing": (
        lambda: from_linen(Normed(), KEY(0), X),
        ValueError,
        r"Normed requires \['train'\] too. Give a setting as a keyword, train=",
    ),
    "a method of two inputs": (
        lambda: from_nnx(Counting(nnx.Rngs(0)), method=Counting.shifted),
        ValueError,
        ONE_INPUT.format("Counting", "shift"),
    ),
    "a method that is not there": (
        lambda: from_nnx(Deep(jnp.tanh), method="encode"),
        ValueError,
        "`method` must name a method of Deep, got 'encode'",
    ),
    "a linen method that is not there": (
        lambda: from_linen(nn.Dense(3), KEY(0), X, method="encode"),
        ValueError,
        "`method` must name a method of Dense, got 'encode'",
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
