"""Variances read off Flax modules, against closed forms and against samples."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn import initializers
from thoroughness import few

from lazyjax.limits import infinite
from lazyjax.limits.modules import variances
from lazyjax.models import MLP, from_linen, from_nnx

IN, OUT = 240, 160


def torch_uniform(key, shape, dtype=jnp.float32):
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def centered(key, shape, dtype=jnp.float32):
    return 3 - 2 * (jax.random.uniform(key, shape, dtype) + 1)


def ntk_normal(key, shape, dtype=jnp.float32):
    return -(jax.random.normal(key, (*shape, 1), dtype)[..., 0].T / 4).T.reshape(shape)


def part(key, shape, dtype=jnp.float32):
    more = jax.random.normal(key, (shape[0] + 3, 2 * shape[1]), dtype)
    return jax.lax.slice(more, (3, 0), more.shape, (1, 2))


def cut(key, shape, dtype=jnp.float32):
    return jax.random.truncated_normal(key, -1.5, 1.5, shape, dtype) / 2


def of_truncated(end):
    """The variance of a standard normal number that is drawn again where it is beyond the end."""
    density = math.exp(-(end**2) / 2) / math.sqrt(2 * math.pi)
    return 1 - 2 * end * density / math.erf(end / math.sqrt(2))


# the variance, by the fans
INITIALISERS = {
    "lecun_normal": (initializers.lecun_normal(), 1 / IN),
    "lecun_uniform": (initializers.lecun_uniform(), 1 / IN),
    "he_normal": (initializers.he_normal(), 2 / IN),
    "he_uniform": (initializers.he_uniform(), 2 / IN),
    "glorot_normal": (initializers.glorot_normal(), 2 / (IN + OUT)),
    "glorot_uniform": (initializers.glorot_uniform(), 2 / (IN + OUT)),
    "fan_in, normal": (initializers.variance_scaling(1.7, "fan_in", "normal"), 1.7 / IN),
    "fan_out, normal": (initializers.variance_scaling(3.0, "fan_out", "normal"), 3 / OUT),
    "fan_out, truncated": (initializers.variance_scaling(3.0, "fan_out", "truncated_normal"), 3 / OUT),
    "fan_avg, uniform": (initializers.variance_scaling(0.5, "fan_avg", "uniform"), 1 / (IN + OUT)),
    "other axes": (initializers.he_normal(in_axis=-1, out_axis=-2), 2 / OUT),
    "normal": (initializers.normal(0.3), 0.09),
    "normal of 0": (initializers.normal(0.0), 0.0),
    "truncated_normal": (initializers.truncated_normal(0.2), 0.04 * of_truncated(2)),
    "truncated at 1": (initializers.truncated_normal(0.2, lower=-1.0, upper=1.0), 0.04 * of_truncated(1)),
    "truncated at 5": (initializers.truncated_normal(0.2, lower=-5.0, upper=5.0), 0.04 * of_truncated(5)),
    "zeros": (initializers.zeros, None),
    "constant": (initializers.constant(0.7), None),
    "identity": (lambda key, shape, dtype: jnp.eye(*shape, dtype=dtype), None),
    "a key of its own": (lambda key, shape, dtype: jax.random.normal(jax.random.key(7), shape, dtype), None),
    "pytorch's uniform": (torch_uniform, 1 / (3 * IN)),
    "uniform, moved": (centered, 1 / 3),
    "normal, turned": (ntk_normal, 1 / 16),
    "normal, a part": (part, 1.0),
    "truncated, own": (cut, of_truncated(1.5) / 4),
}  # fmt: skip # to be read as a table


HALF = (
    "lecun_normal",
    "he_uniform",
    "fan_out, normal",
    "normal",
    "truncated at 5",
    "uniform, moved",
)


def assert_samples_agree(v, samples):
    """Hold a variance, and the mean 0, against entries: 5 standard errors."""
    w = np.concatenate([np.ravel(s) for s in samples]).astype(float)
    assert abs(np.mean(w)) <= 5 * np.sqrt(v / w.size)
    assert abs(np.mean(w**2) - v) <= 5 * np.std(w**2) / np.sqrt(w.size) + 1e-6 * v


def assert_tree_agrees(tree, make, count):
    """Hold a tree of variances against the params of a few initialisations."""
    draws = [make(jax.random.key(seed)) for seed in range(count)]

    def is_none(v):
        return v is None

    assert jax.tree.structure(tree, is_leaf=is_none) == jax.tree.structure(draws[0])
    each = zip(*map(jax.tree.leaves, draws), strict=True)
    for v, samples in zip(jax.tree.leaves(tree, is_leaf=is_none), each, strict=True):
        if v is None:
            assert all(np.array_equal(samples[0], s) for s in samples)
        else:
            assert isinstance(v, float)
            assert_samples_agree(v, samples)


@few("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", INITIALISERS)
def test_linen_initialisers_have_their_closed_forms(name, dtype):
    init, expected = INITIALISERS[name]
    module = nn.Dense(OUT, kernel_init=init, param_dtype=dtype)
    found = variances(module, jax.ShapeDtypeStruct((1, IN), jnp.float32))
    assert found["bias"] is None
    if expected is None:
        assert found["kernel"] is None
    else:
        np.testing.assert_allclose(
            found["kernel"], expected, rtol=1e-6 if dtype == jnp.float32 else 1e-14
        )


@few("dtype", [jnp.float32, jnp.float64])
@few("name", sorted(INITIALISERS, key=lambda name: name != "normal, a part"))
def test_draws_of_the_initialisers_have_these_variances(name, dtype):
    init, variance = INITIALISERS[name]
    draw = init(jax.random.key(1), (IN, OUT), dtype)
    if variance is None:
        assert np.array_equal(draw, init(jax.random.key(2), (IN, OUT), dtype))
    else:
        assert_samples_agree(variance, [draw])


@pytest.mark.parametrize("name", [*HALF, "zeros", "pytorch's uniform"])
def test_nnx_initialisers_have_the_same(name):
    init, expected = INITIALISERS[name]
    found = variances(lambda rngs: nnx.Linear(IN, OUT, kernel_init=init, rngs=rngs))
    assert found["bias"] is None
    if expected is None:
        assert found["kernel"] is None
    else:
        np.testing.assert_allclose(found["kernel"], expected, rtol=1e-6)


@few("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", HALF)
def test_initialisers_of_half_precision_are_those_of_their_rounded_scale(name, dtype):
    init, expected = INITIALISERS[name]
    found = variances(nn.Dense(OUT, kernel_init=init, param_dtype=dtype), jnp.zeros((1, IN)))
    np.testing.assert_allclose(found["kernel"], expected, rtol=4 * float(jnp.finfo(dtype).eps))


def test_old_keys_and_a_key_of_another_kind_change_nothing():
    def old(key, shape, dtype):
        raw = jax.random.split(jax.random.key_data(key))[1]
        return initializers.normal(0.5)(raw, shape, dtype)

    found = variances(nn.Dense(4, kernel_init=old), jnp.zeros((1, 3)))
    np.testing.assert_allclose(found["kernel"], 0.25, rtol=1e-6)


# --- modules


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), kernel_init=initializers.he_normal())(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x)).mean((1, 2))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.LayerNorm()(nn.Dense(6, bias_init=initializers.normal(0.1))(x))
        return nn.Dense(2, use_bias=False, kernel_init=initializers.glorot_uniform())(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.tanh(nn.Dense(x.shape[-1], bias_init=initializers.normal(0.5))(x)), None


def scanned(own=True, body=Block):
    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(
                body, variable_axes={"params": 0}, split_rngs={"params": own}, length=5
            )()(x, None)[0]

    return Deep()


def repeated():
    class Same(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(
                Block, variable_broadcast="params", split_rngs={"params": False}, length=5
            )()(x, None)[0]

    return Same()


def mapped(own=True):
    class Several(nn.Module):
        @nn.compact
        def __call__(self, x):
            each = nn.vmap(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": own},
                in_axes=None,
                axis_size=5,
            )
            return each()(x)[0].mean(0)

    return Several()


X, PICTURES, TOKENS = np.zeros((2, 7)), np.zeros((2, 6, 6, 3)), np.zeros((2, 4), int)
LAYER = {"Dense_0": {"bias": 0.25, "kernel": 1 / 7}}
PROJECTION = {"bias": None, "kernel": 1 / 7}
MODULES = {
    "dense": (nn.Dense(5), X, {"bias": None, "kernel": 1 / 7}),
    "dense, no bias": (nn.Dense(5, use_bias=False), X, {"kernel": 1 / 7}),
    "dense, several axes": (nn.DenseGeneral((3, 2), axis=(-2, -1)), jnp.zeros((2, 4, 5)), {"bias": None, "kernel": 1 / 20}),
    "convolution": (nn.Conv(4, (3, 3)), PICTURES, {"bias": None, "kernel": 1 / 27}),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=3), PICTURES, {"bias": None, "kernel": 1 / 9}),
    "transposed": (nn.ConvTranspose(4, (3, 3)), PICTURES, {"bias": None, "kernel": 1 / 27}),
    "embedding": (nn.Embed(11, 5), TOKENS, {"embedding": 1 / 5}),
    "layer norm": (nn.LayerNorm(), X, {"bias": None, "scale": None}),
    "group norm": (nn.GroupNorm(1), X, {"bias": None, "scale": None}),
    "batch norm": (nn.BatchNorm(use_running_average=True), X, {"bias": None, "scale": None}),
    "attention": (
        nn.MultiHeadDotProductAttention(2, qkv_features=8),
        jnp.zeros((2, 4, 7)),
        {"query": PROJECTION, "key": PROJECTION, "value": PROJECTION, "out": {"bias": None, "kernel": 1 / 8}},
    ),
    "a network": (
        Net(),
        PICTURES,
        {
            "Conv_0": {"bias": None, "kernel": 2 / 27},
            "BatchNorm_0": {"bias": None, "scale": None},
            "Dense_0": {"bias": 0.01, "kernel": 1 / 8},
            "LayerNorm_0": {"bias": None, "scale": None},
            "Dense_1": {"kernel": 2 / 8},
        },
    ),
    "ours, pytorch": (
        MLP((9,), 2),
        X,
        {"hidden_0": {"kernel": 1 / 21, "bias": 1 / 21}, "output": {"kernel": 1 / 27, "bias": 1 / 27}},
    ),
    "ours, lecun": (
        MLP((9,), 2, parametrization="lecun"),
        X,
        {"hidden_0": {"kernel": 1 / 7, "bias": None}, "output": {"kernel": 1 / 9, "bias": None}},
    ),
    "ours, ntk": (
        MLP((9,), 2, parametrization="ntk"),
        X,
        {"hidden_0": {"kernel": 1.0, "bias": 1.0}, "output": {"kernel": 1.0, "bias": 1.0}},
    ),
    "scanned": (scanned(), X, {"ScanBlock_0": LAYER}),
    "scanned, remat": (scanned(body=nn.remat(Block)), X, {"ScanCheckpointBlock_0": LAYER}),
    "scanned, one layer": (repeated(), X, {"ScanBlock_0": LAYER}),
    "mapped": (mapped(), X, {"VmapBlock_0": LAYER}),
    "shared": (nn.Sequential([layer := nn.Dense(7), nn.relu, layer]), X, {"layers_0": {"bias": None, "kernel": 1 / 7}}),
}  # fmt: skip # to be read as a table


def assert_close(found, expected, rtol=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, rtol=rtol)


@pytest.mark.parametrize("name", MODULES)
def test_linen_modules_have_the_closed_forms_of_every_leaf(name):
    module, x, expected = MODULES[name]
    assert_close(variances(module, x), expected)


@few("name", sorted(MODULES, key=lambda name: name != "scanned"))
def test_draws_of_linen_modules_have_these_variances(name):
    module, x, expected = MODULES[name]
    assert_tree_agrees(expected, lambda key: from_linen(module, key, x)[1], 4)


class Model(nnx.Module):
    def __init__(self, width=6, *, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), kernel_init=initializers.he_normal(), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.hidden = nnx.Linear(8, width, bias_init=initializers.normal(0.1), rngs=rngs)
        self.out = nnx.Linear(width, 2, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.norm(self.conv(x)))).mean((1, 2))
        return self.out(nnx.tanh(self.hidden(x)))


class Stack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=5)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(7, 7, bias_init=initializers.normal(0.5), rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        return x


MODEL = {
    "conv": {"bias": None, "kernel": 2 / 27},
    "norm": {"bias": None, "scale": None},
    "hidden": {"bias": 0.01, "kernel": 1 / 8},
    "out": {"kernel": 1 / 6},
}
HEADS = {"bias": None, "kernel": 1 / 8}
NNX = {
    "a class": (Model, MODEL),
    "a function": (lambda rngs: Model(rngs=rngs), MODEL),
    "stacked": (Stack, {"layers": {"bias": 0.25, "kernel": 1 / 7}}),
    "embedding": (lambda rngs: nnx.Embed(11, 5, rngs=rngs), {"embedding": 1 / 5}),
    "layer norm": (lambda rngs: nnx.LayerNorm(7, rngs=rngs), {"bias": None, "scale": None}),
    "attention": (
        lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs),
        {"query": HEADS, "key": HEADS, "value": HEADS, "out": HEADS},
    ),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx_modules_have_the_closed_forms_of_every_leaf(name):
    make, expected = NNX[name]
    assert_close(variances(make), expected)


@few("name", sorted(NNX, key=lambda name: name != "embedding"))
def test_draws_of_nnx_modules_have_these_variances(name):
    make, expected = NNX[name]

    @jax.jit
    def params(key):
        module = make(rngs=nnx.Rngs(key))
        module.eval()
        return from_nnx(module)[1]

    assert_tree_agrees(expected, params, 4)


def test_only_shapes_of_the_input_matter_and_jit_may_be_around():
    module = Net()
    expected = MODULES["a network"][2]
    assert_close(variances(module, jax.ShapeDtypeStruct((1, 6, 6, 3), jnp.float32)), expected)

    @jax.jit
    def f(x):
        assert_close(variances(module, x), expected)
        return x

    f(PICTURES)


def test_keywords_and_methods_are_passed_on():
    found = variances(Net(), PICTURES, train=True)
    assert_close(found, MODULES["a network"][2])
    head = variances(nn.Dense(5), {"a": X}, method=lambda module, x: module(x["a"]))
    assert_close(head, {"bias": None, "kernel": 1 / 7})


def test_leaves_that_are_no_floats_are_not_random():
    def table(key, shape):
        return jax.random.randint(key, shape, 0, 9)

    class Lookup(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x) + self.param("table", table, (1, 3))

    assert variances(Lookup(), X)["table"] is None


def test_infinite_takes_the_tree_as_it_is():
    width = 16
    module = nn.Sequential(
        [
            nn.Dense(width, kernel_init=initializers.he_uniform(), param_dtype=jnp.float64),
            nn.relu,
            nn.Dense(1, param_dtype=jnp.float64),
        ]
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    f, params = from_linen(module, jax.random.key(0), x)
    found = infinite(f, params, x, variance=variances(module, x))
    by_hand = {
        "layers_0": {"kernel": 2 / 3, "bias": None},
        "layers_2": {"kernel": 1 / width, "bias": None},
    }
    expected = infinite(f, params, x, variance=by_hand)
    np.testing.assert_allclose(found.nngp, expected.nngp, rtol=1e-12)
    np.testing.assert_allclose(found.ntk, expected.ntk, rtol=1e-12)
    # E relu(u) relu(v) for u, v of variances and covariance k (Cho, Saul 2009), by hand
    k = 2 / 3 * np.asarray(x) @ np.asarray(x).T
    norms = np.sqrt(np.outer(np.diag(k), np.diag(k)))
    angle = np.arccos(np.clip(k / norms, -1, 1))
    nngp = norms * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
    np.testing.assert_allclose(found.nngp, nngp, rtol=1e-6)


# --- what is refused


def dense(init, bias=initializers.zeros):
    return nn.Dense(4, kernel_init=init, bias_init=bias)


def tied(key, shape, dtype):
    one = jax.random.normal(key, (shape[0], 1), dtype)
    return jnp.broadcast_to(one, shape)


def ramp(key, shape, dtype):
    return jax.random.normal(key, shape, dtype) * jnp.arange(1.0, 5.0, dtype=dtype)[None]


def half_normal(key, shape, dtype):
    return jnp.abs(jax.random.normal(key, shape, dtype))


def rectified(key, shape, dtype):
    return jnp.maximum(jax.random.normal(key, shape, dtype), 0)


def signs(key, shape, dtype):
    return jax.random.rademacher(key, shape, dtype)


def joined(key, shape, dtype):
    half = jax.random.normal(key, (shape[0], shape[1] // 2), dtype)
    return jnp.concatenate([half, -half], 1)


def same_keys(key, shape, dtype):
    keys = jnp.broadcast_to(key, (shape[0],))
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:], dtype))(keys)


def of_the_key(key, shape, dtype):
    return jnp.broadcast_to(jax.random.key_data(key)[0].astype(dtype), shape)


class Twins(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = self.param("a", nn.initializers.lecun_normal(), (7, 7))
        return x @ a @ self.param("b", lambda key: a.T)


REFUSED = {
    "orthogonal": (dense(initializers.orthogonal()), "kernel with orthogonal random numbers"),
    "delta_orthogonal": (nn.Conv(8, (3, 3), kernel_init=initializers.delta_orthogonal()), "kernel with orthogonal random numbers"),
    "uniform": (dense(initializers.uniform(0.2)), "kernel with entries of mean 0.1"),
    "a mean": (dense(initializers.normal(), lambda *a: 1 + initializers.normal()(*a)), "bias with entries of mean 1"),
    "cut at one side": (dense(initializers.truncated_normal(lower=-1.0)), "kernel with entries of mean"),
    "one for all": (dense(tied), "`broadcast_in_dim` of random numbers"),
    "a ramp": (dense(ramp), "`mul` of random numbers .*(ramp)"),
    "half normal": (dense(half_normal), "kernel with `abs` of random numbers .*(half_normal)"),
    "rectified": (dense(rectified), "`max` of random numbers .*(rectified)"),
    "signs": (dense(signs), "kernel with .* of random numbers"),
    "joined": (dense(joined), "`concatenate` of random numbers .*(joined)"),
    "the same keys": (dense(same_keys), "`random_bits` of random numbers"),
    "of the key": (dense(of_the_key), "kernel with entries made of a key"),
    "twins": (Twins(), "b with the random numbers of a"),
    "one key in a scan": (scanned(own=False), "ScanBlock_0/Dense_0/bias with `scan` of random numbers"),
    "one key in a map": (mapped(own=False), "VmapBlock_0/Dense_0/bias with `broadcast_in_dim`"),
    "complex": (nn.Dense(4, param_dtype=jnp.complex64), "kernel with .* of random numbers"),
}  # fmt: skip # to be read as a table


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_variance_of_independent_entries_is_refused(name):
    module, text = REFUSED[name]
    x = PICTURES if isinstance(module, nn.Conv) else X
    with pytest.raises(ValueError, match=f"`module` must begin with independent.*{text}") as error:
        variances(module, x)
    assert error.match(r"Give `infinite` the variance of this leaf by a function \(path, shape\)")


def test_an_nnx_module_that_is_made_is_refused_and_so_is_no_module():
    with pytest.raises(TypeError, match=r"`module` .* got Linear. Use variances\(lambda rngs: "):
        variances(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with pytest.raises(
        TypeError, match="`module` must be a flax.linen.Module, or a function .* int"
    ):
        variances(3)
    with pytest.raises(TypeError, match="`module` must be a flax.nnx.Module, got int"):
        variances(lambda rngs: 3)
    with pytest.raises(ValueError, match="`x` must be given to initialise the module, got None"):
        variances(nn.Dense(3))
