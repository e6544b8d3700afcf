"""Convolutional networks in the limit, against covariances over positions by lists of indices."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convolution_reference import (
    FUNCTIONS,
    WIDTH,
    B,
    Block,
    Conv,
    Field,
    Pool,
    W,
    of_relu,
    reference,
)
from flax import nnx
from thoroughness import few

from lazyjax import infinite, variances
from lazyjax.models import from_nnx


def output_of(layers, x, product):
    for layer in layers:
        if isinstance(layer, Block):
            x = sum(output_of(branch, x, product) for branch in layer)
        elif isinstance(layer, Pool):
            x = nn.avg_pool(x, *layer)
        else:
            x = FUNCTIONS[layer][0](x) if isinstance(layer, str) else product(x, layer)
    return x


class Network(nn.Module):
    layers: tuple[Any, ...]

    @nn.compact
    def __call__(self, x):
        def product(x, layer):
            if not layer.window:
                return nn.Dense(WIDTH, use_bias=layer.bias)(x)
            return nn.Conv(WIDTH, *layer)(x)

        return output_of(self.layers, x, product)


def standard(path, shape):
    return W / math.prod(shape[:-1]) if len(shape) > 1 else B


def factored(f):
    """Give f in NTK parametrisation, of weights of variance 1."""

    def scaled(path, w):
        return w * math.sqrt(standard(path, w.shape))

    return lambda w, x: f(jax.tree_util.tree_map_with_path(scaled, w), x)


def of_module(module, x):
    """Give f, and the shapes of its weights in float64."""
    shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x)["params"]
    params = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, x.dtype), shapes)
    return lambda w, x: module.apply({"params": w}, x), params


def images(*shape):
    return np.random.default_rng(0).normal(size=(5, *shape))


def check(found, wanted):
    for one, other in zip(found[:2], wanted[:2], strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=1e-13)


CONV, ODD = Conv((2, 3)), Conv((3, 2), (1, 2), [(2, 0), (1, 2)])
FLAT, MEAN = ("flatten", Conv()), ("mean", Conv())

NETWORKS = {
    "valid": ((4, 5, 2), (CONV, "relu", CONV, "relu", *FLAT)),
    "same": ((4, 5, 3), (Conv((3, 2), padding="SAME"), "relu", Conv((2, 3), padding="SAME"), "erf", *MEAN)),
    "same, by strides": ((5, 6, 2), (Conv((3, 2), (2, 3), "SAME"), "relu", Conv((2, 2), (1, 2), "SAME"), "relu", *MEAN)),
    "any padding": ((4, 5, 2), (ODD, "relu", ODD, "relu", *MEAN)),
    "any padding, flattened": ((4, 5, 2), (ODD, "relu", ODD, "erf", *FLAT)),
    "windows of zeros": ((3, 3, 2), (Conv((2, 2), 1, [(3, 0), (0, 2)], bias=False), "relu", Conv((2, 2)), "relu", *MEAN)),
    "circular": ((4, 5, 2), (Conv((3, 2), padding="CIRCULAR"), "relu", Conv((4, 3), (1, 2), "CIRCULAR"), "relu", *MEAN)),
    "circular, dilated": ((5, 2), (Conv((3,), 2, "CIRCULAR", 1, 2), "relu", Conv((3,), 1, "CIRCULAR", 1, 4), "erf", *FLAT)),
    "reflected": ((4, 5, 2), (Conv((3, 3), padding="REFLECT"), "relu", Conv((2, 3), padding="REFLECT"), "relu", *MEAN)),
    "causal": ((6, 2), (Conv((3,), padding="CAUSAL"), "relu", Conv((2,), 1, "CAUSAL", 1, 2), "relu", *MEAN)),
    "dilated": ((5, 6, 2), (Conv((2, 3), 1, [(1, 0), (0, 2)], 1, (3, 2)), "relu", Conv((2, 2), (2, 1), "SAME", 1, (1, 2)), "relu", *MEAN)),
    "spread": ((3, 4, 2), (Conv((2, 3), (1, 2), [(1, 2), (0, 1)], (2, 3)), "relu", Conv((3, 2), (2, 1), [(0, 1), (1, 1)], (1, 2), (2, 1)), "relu", *MEAN)),
    "spread, flattened": ((3, 4, 2), (CONV, "relu", Conv((3, 2), (2, 1), [(0, 1), (1, 1)], (3, 2), (2, 1)), "relu", *FLAT)),
    "one axis": ((6, 3), (Conv((3,), 2, [(2, 1)]), "relu", Conv((2,), padding="SAME"), "erf", *MEAN)),
    "three axes": ((2, 3, 2, 2), (Conv((2, 2, 1), (1, 2, 1), "SAME"), "relu", Conv((1, 2, 2)), "relu", *MEAN)),
    "an axis of length 1": ((1, 4, 2), (Conv((3, 3), padding="SAME"), "relu", Conv((1, 2), (1, 2)), "relu", *MEAN)),
    "groups": ((4, 3, 2), (CONV, "relu", Conv((2, 1), groups=4), "relu", Conv((2, 1), 1, "SAME", groups=2), "relu", *MEAN)),
    "no bias, several dense": ((4, 3, 2), (Conv((2, 2), bias=False), "erf", "flatten", Conv(bias=False), "relu", Conv())),
    "pools, then flattened": ((5, 6, 2), (CONV, "relu", Pool((2, 2), (1, 2)), Conv((2, 1)), "relu", Pool((2, 2)), *FLAT)),
    "a pool, then an activation": ((4, 5, 2), (CONV, Pool((2, 3), (2, 1), [(1, 0), (0, 1)]), "relu", *FLAT)),
    "pools that count zeros": ((4, 5, 2), (CONV, "relu", Pool((2, 2), (2, 2), "SAME"), Conv((1, 2)), "erf", *FLAT)),
    "pools that do not": ((4, 5, 2), (CONV, "relu", Pool((2, 2), (2, 2), "SAME", False), Conv((2, 2)), "relu", *FLAT)),
    "a residual block": ((4, 4, 2), (CONV, Block(("relu", Conv((3, 3), padding="SAME"), "relu", Conv((2, 2), padding="SAME"))), "relu", *MEAN)),
    "a block with strides": ((4, 5, 2), (CONV, Block(("relu", Conv((3, 3), (2, 2), "SAME")), ("relu", Conv((1, 1), (2, 2)))), "relu", *FLAT)),
}  # fmt: skip # to be read as a table


TELLING = ("a block with strides", "circular, dilated")


@few("name", sorted(NETWORKS, key=lambda name: name not in TELLING), len(TELLING))
def test_networks_follow_the_covariances_of_their_positions(name):
    shape, layers = NETWORKS[name]
    x = images(*shape)
    f, params = of_module(Network(layers), x)
    found = infinite(f, params, x[:3], x[3:], variance=standard)
    check(found, [kernel[:3, 3:] for kernel in reference(layers, x, factored=False)])
    assert found.error == 0


FACTORED = ("groups", "valid", "any padding", "spread", "pools, then flattened", "a residual block")


@few("name", FACTORED)
def test_networks_with_factors_do_so_too_and_are_symmetric(name):
    shape, layers = NETWORKS[name]
    x = images(*shape)[:3]
    f, params = of_module(Network(layers), x)
    found = infinite(factored(f), params, x, variance=1.0)
    check(found, reference(layers, x, factored=True))
    assert np.array_equal(found.ntk, found.ntk.T)
    assert np.array_equal(found.nngp, found.nngp.T)


ORDERS = {
    "channels last": (("NHWC", "HWIO", "NHWC"), ("NHWC", "HWIO", "NHWC")),
    "channels first": (("NCHW", "OIHW", "NCHW"), ("NCHW", "OIHW", "NCHW")),
    "height and width change places": (("NHWC", "HWIO", "NCWH"), ("NCWH", "HOWI", "NHWC")),
    "filters with the width first": (("NCHW", "WOIH", "NHCW"), ("NHCW", "IWHO", "NWHC")),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", ORDERS)
def test_the_axes_of_a_plain_convolution_may_have_any_order(name):
    layers = (
        Conv((2, 3), (1, 2), [(1, 0), (0, 2)], (1, 2), (2, 1)),
        Conv((3, 2), (2, 1), [(0, 1), (2, 1)], (1, 1), (1, 2), 2),
    )

    def convolved(w, b, x, layer, order):
        def of(option):  # of an option for height and width, in the order of the filters' axes
            return [option["HW".index(c)] for c in order[1] if c in "HW"]

        z = jax.lax.conv_general_dilated(
            x, w, *map(of, layer[1:5]), order, feature_group_count=layer.groups
        )
        b = b.reshape([WIDTH if c == "C" else 1 for c in order[2]])
        return math.sqrt(W * WIDTH / w.size) * z + math.sqrt(B) * b

    def f(params, x):
        x = x.transpose(["NHWC".index(c) for c in ORDERS[name][0][0]])
        for weights, *how in zip(params[:2], layers, ORDERS[name], strict=True):
            x = jax.nn.relu(convolved(*weights, x, *how))
        axes = [i for i, c in enumerate(ORDERS[name][1][2]) if c in "HW"]
        w, b = params[2]
        return math.sqrt(W / WIDTH) * x.mean(axes) @ w + math.sqrt(B) * b[None]

    x, params = images(3, 4, 2), []
    for layer, channels, order in zip(layers, (2, WIDTH), ORDERS[name], strict=True):
        sizes = dict(zip("HWIO", (*layer.window, channels // layer.groups, WIDTH), strict=True))
        params.append((jnp.zeros([sizes[c] for c in order[1]]), jnp.zeros(WIDTH)))
    params.append((jnp.zeros((WIDTH, WIDTH)), jnp.zeros(WIDTH)))
    found = infinite(f, params, x[:3], x[3:], variance=1.0)
    layers = (layers[0], "relu", layers[1], "relu", *MEAN)
    check(found, [kernel[:3, 3:] for kernel in reference(layers, x, factored=True)])


class Model(nnx.Module):
    def __init__(self, rngs):
        options = {
            "kernel_init": nnx.initializers.variance_scaling(W, "fan_in", "normal"),
            "bias_init": nnx.initializers.normal(math.sqrt(B)),
            "param_dtype": jnp.float64,
            "rngs": rngs,
        }
        self.one = nnx.Conv(2, WIDTH, (2, 3), (1, 2), padding="CIRCULAR", **options)
        self.two = nnx.Conv(
            *(WIDTH, WIDTH, (3, 2)),
            padding=((2, 0), (0, 1)),
            kernel_dilation=(1, 2),
            feature_group_count=2,
            **options,
        )
        self.three = nnx.ConvTranspose(WIDTH, WIDTH, (3, 2), (2, 1), **options)
        self.last = nnx.Linear(WIDTH, WIDTH, **options)

    def __call__(self, x):
        x = jax.nn.relu(self.two(jax.nn.relu(self.one(x))))
        return self.last(jax.nn.relu(self.three(x)).mean((1, 2)))


@pytest.mark.thorough
def test_an_nnx_module_with_the_variances_of_its_initialisers_is_its_layers():
    layers = (
        Conv((2, 3), (1, 2), "CIRCULAR"),
        Conv((3, 2), 1, [(2, 0), (0, 1)], 1, (1, 2), 2),
        Conv((3, 2), 1, [(2, 1), (1, 0)], (2, 1)),  # transposed, of twice the height
    )
    x = images(4, 5, 2)
    f, params = from_nnx(Model(nnx.Rngs(0)))
    found = infinite(f, params, x[:3], x[3:], variance=variances(Model))
    layers = [part for layer in layers for part in (layer, "relu")]
    check(found, [kernel[:3, 3:] for kernel in reference([*layers, *MEAN], x, factored=False)])


def test_two_paddings_of_one_field_are_told_apart():
    def f(w, x):
        h = jax.nn.relu(x @ w[0])
        circular = jnp.concatenate([h[:, 4:], h, h[:, :1]], 1)
        reflected = jnp.concatenate([h[:, 1:2], h, h[:, 3:4]], 1)
        return (circular + reflected).reshape(len(h), -1) @ w[1]

    x = images(5, 2)
    found = infinite(f, (jnp.zeros((2, 3)), jnp.zeros((21, 1))), x, variance=1.0)
    k = np.einsum("nsc,mtc->nmst", x, x)
    h = of_relu(Field(k, k, (5,), 3))
    moved = np.eye(5)[[4, 0, 1, 2, 3, 4, 0]] + np.eye(5)[[1, 0, 1, 2, 3, 4, 3]]
    k, theta = (np.einsum("rs,nmst,rt->nm", moved, a, moved) for a in h[:2])
    check(found, (3 * k, 3 * k + 3 * theta))


# --- networks that are the same ---


def kernels_of(layers, x, **options):
    f, params = of_module(Network(layers), x)
    return infinite(f, params, x, **{"variance": standard, **options})


@pytest.mark.thorough
def test_a_window_on_one_pixel_is_a_dense_layer():
    x = images(1, 1, 3)
    wide = (Conv((3, 2), padding="SAME"), "relu", Conv((2, 3), (2, 1), "SAME"), "erf", *FLAT)
    dense = (Conv(), "relu", Conv(), "erf", Conv())
    found = kernels_of(wide, x, variance=0.3)
    check(found, kernels_of(dense, x.reshape(5, 3), variance=0.3))


@pytest.mark.thorough
def test_a_window_as_wide_as_the_image_is_a_dense_layer_of_all_pixels():
    x = images(3, 4, 2)
    ends = ("relu", Conv((1, 1)), "relu", *FLAT)
    first = kernels_of((Conv((3, 4)), *ends), x)
    check(first, kernels_of(("flatten", Conv(), "relu", Conv(), "relu", Conv()), x))
    later = kernels_of((CONV, "relu", Conv((2, 2)), *ends), x)
    check(later, kernels_of((CONV, "relu", "flatten", Conv(), "relu", Conv(), "relu", Conv()), x))


TILES = ({"batch_size": 3}, {"batch_size": 2}, {"memory": "150kB"}, {"x2": None})


@pytest.mark.thorough
@pytest.mark.parametrize("options", TILES, ids=str)
def test_tiles_change_nothing(options):
    shape, layers = NETWORKS["same"]
    x = images(*shape)
    whole = kernels_of(layers, x, x2=x)  # in one tile
    check(kernels_of(layers, x, **{"x2": x, **options}), whole)


# --- what is refused ---

REFUSED = {
    "a window for each channel": (Conv((2, 2), groups=WIDTH), "groups that sum over no width"),
    "an activation of pooled activations": (Pool((2, 2)), "activations whose positions were mixed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_limit_is_refused_by_name(name):
    layer, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        kernels_of((CONV, "relu", layer, "erf", *FLAT), images(4, 5, 2))
