"""Models of every kind, a row each: what the kernel is held to in `test_kernel_models.py`.

All of them are tiny and in float64, see one example at a time, and have two hidden layers and two
outputs or more wherever that makes sense. A new row is tested untouched.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.nn import softmax, softplus, tanh

from lazyjax.models import from_linen, from_nnx


class Case(NamedTuple):
    f: Callable[[Any, Any], Any]
    params: Any
    x1: Any  # three examples
    x2: Any  # two


MODELS: dict[str, Callable[[], Case]] = {}
"""In float64, each without one rounding to less."""
ROUNDED: dict[str, Callable[[], Case]] = {}
"""In float32, or through it."""


# --- how a row is made


def normal(seed, *shape):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def filled(shapes, seed=0):
    """Give random arrays for a tree of shapes; what is called `var` is positive."""

    def array(path, leaf):
        value = normal(seed + len(jax.tree_util.keystr(path)), *leaf.shape)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.ones(leaf.shape, leaf.dtype)
        if jax.tree_util.keystr(path).endswith("var']"):
            value = 0.5 + np.abs(value)
        return value / max(1, np.prod(leaf.shape[:-1])) ** 0.5

    return jax.tree_util.tree_map_with_path(array, shapes)


def weights(shapes):
    """Give normal weights of variance 1 / fan_in; an int stands for itself, as an integer leaf."""
    return {
        name: jnp.asarray(shape)
        if isinstance(shape, int)
        else jnp.asarray(normal(i, *shape) / (shape[-2] if len(shape) > 1 else 1) ** 0.5)
        for i, (name, shape) in enumerate(shapes.items())
    }


def examples(x):
    """Give three examples and two, of shape x; {"tokens": S} stands for S tokens below 6."""
    if isinstance(x, dict):
        rng = np.random.default_rng(0)
        return tuple(rng.integers(0, 6, (n, x["tokens"])) for n in (3, 2))
    return normal(100, 3, *x), normal(101, 2, *x)


def model(name, x=(4,), rows=MODELS, **shapes):
    """Add a function of (p, x) as a row, with the shape of an example and of each weight."""

    def add(f):
        assert name not in rows
        rows[name] = lambda: Case(f, weights(shapes), *examples(x))
        return f

    return add


def linen(name, module, x=(4,), rows=MODELS, **call):
    """Add a Flax linen module as a row."""

    def case():
        x1, x2 = examples(x)
        shapes = jax.eval_shape(partial(module.init, **call), jax.random.key(0), x1)
        f, params = from_linen(module, None, x1, variables=filled(shapes), **call)
        return Case(f, params, x1, x2)

    assert name not in rows
    rows[name] = case


def nnx_module(name, build, x=(4,), rows=MODELS):
    """Add a Flax NNX module as a row, from a function of its random numbers."""

    def key_or(shape, value):
        if not jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
            return value
        return jax.random.split(jax.random.key(0), shape.shape)

    def case():
        module = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        module.eval()
        f, params = from_nnx(module)
        return Case(jax.tree.map(key_or, f, filled(f)), filled(params), *examples(x))

    assert name not in rows
    rows[name] = case


def equinox_module(name, build, x=(4,)):
    """Add an Equinox module, which sees one example, as a row, from a function of a key."""

    def case():
        with jax.debug_key_reuse(False):  # shapes alone: every layer may take the same key
            shapes = eqx.filter_eval_shape(build, jax.random.key(0))
        shapes, static = eqx.partition(shapes, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
        f = lambda params, x: jax.vmap(eqx.combine(params, static))(x)  # noqa: E731 (a function of one line)
        return Case(f, filled(shapes), *examples(x))

    assert name not in MODELS
    MODELS[name] = case


def readout(h, k=2):
    """Mix all of an example's numbers into k outputs, by a matrix that is no parameter."""
    h = h.reshape(h.shape[0], -1)
    return h @ jnp.asarray(normal(102, h.shape[1], k) / h.shape[1] ** 0.5, h.dtype)


MLP = {"a": (4, 5), "b": (5, 3), "c": (3, 2)}


def mlp(p, x):
    return tanh(tanh(x @ p["a"]) @ p["b"]) @ p["c"]


# --- products

model("dense", **MLP)(mlp)
model("dense with biases", **MLP, d=(5,), e=(1, 3), g=(2,))(
    lambda p, x: tanh(tanh(x @ p["a"] + p["d"]) @ p["b"] + p["e"]) @ p["c"] + p["g"]
)
model("factors of the weights", **MLP, d=(5,), e=(3,))(
    lambda p, x: tanh(tanh(x @ (-p["a"] / 2) + p["d"]) @ (3 * p["b"]) + p["e"]) @ p["c"]
)
model("the same bias in two layers, and as a weight", a=(4, 4), b=(4, 4), c=(4, 2), d=(4,), e=(4,))(
    lambda p, x: (
        (h := tanh(tanh(x @ p["a"] + p["d"]) @ p["b"] + p["d"] + p["e"])) @ p["c"]
        + (h @ p["e"])[:, None]
    )
)
model("products with and without their biases", a=(4, 5), b=(5, 3), c=(3, 2), d=(5,), e=(3,))(
    lambda p, x: (
        tanh(z := tanh((h := x @ p["a"]) + p["d"]) * h @ p["b"]) * tanh(z + p["e"]) @ p["c"]
    )
)
model("dense with scales that broadcast", (3, 4), **MLP, d=(5,), e=(3, 1), g=())(
    lambda p, x: (tanh(tanh(x @ p["a"] * p["d"]) * p["e"] @ p["b"]) * p["g"]) @ p["c"]
)
model("biases of several axes", (3, 4), **MLP, d=(3, 5), e=(3, 1), g=(1, 3))(
    lambda p, x: tanh(tanh(x @ p["a"] + p["d"] + p["e"]) @ p["b"] + p["e"] * p["g"]) @ p["c"]
)
model("dense on a sequence", (4, 3), a=(3, 5), b=(5, 4), c=(4, 2))(mlp)
model("dense on every token but one output", (4, 3), a=(3, 5), b=(5, 4), c=(4, 2))(
    lambda p, x: mlp(p, x).sum(1)
)
model("einsum over heads", (2, 3), a=(2, 3, 4), b=(2, 4, 3), c=(2, 3, 2))(
    lambda p, x: jnp.einsum(
        "bhd,hdo->bo",
        tanh(jnp.einsum("bhd,hde->bhe", tanh(jnp.einsum("bhd,hde->bhe", x, p["a"])), p["b"])),
        p["c"],
    )
)
model("einsum to heads and back", (3, 4), a=(4, 2, 3), b=(2, 3, 5), c=(5, 2))(
    lambda p, x: (
        tanh(
            jnp.einsum("nshd,hdo->nso", tanh(jnp.einsum("nsd,dhe->nshe", x, p["a"])), p["b"])
        ).mean(1)
        @ p["c"]
    )
)
model("einsum over several axes", (3, 4), a=(3, 4, 2, 3), b=(4, 2, 3), c=(2, 4))(
    lambda p, x: jnp.einsum(
        "no,ko->nk",
        tanh(jnp.einsum("nhd,ohd->no", tanh(jnp.einsum("nsd,sdhe->nhe", x, p["a"])), p["b"])),
        p["c"],
    )
)
model("einsum with the weight first", (3, 4), a=(5, 4), b=(3, 3), c=(2, 5))(
    lambda p, x: jnp.einsum(
        "oe,nse->nos",
        p["c"],
        tanh(jnp.einsum("ts,nse->nte", p["b"], tanh(jnp.einsum("ed,nsd->nse", p["a"], x)))),
    )
)
model("an MLP mixer", (3, 4), a=(3, 3), b=(4, 4), c=(3, 3), d=(4, 2))(
    lambda p, x: (
        tanh(
            jnp.einsum(
                "nsd,st->ntd", tanh(tanh(jnp.einsum("nsd,st->ntd", x, p["a"])) @ p["b"]), p["c"]
            )
        )
        @ p["d"]
    )
)
model("a weight on the diagonal", a=(4, 4), b=(4,), c=(4, 2))(
    lambda p, x: tanh(jnp.einsum("nd,d->nd", tanh(x @ p["a"]), p["b"])) @ p["c"]
)
model("a bilinear layer", a=(4, 5), b=(5, 5, 3), c=(3, 2))(
    lambda p, x: (
        tanh(jnp.einsum("ni,ijk,nj->nk", h := tanh(x @ p["a"]), p["b"], h, optimize=False)) @ p["c"]
    )
)
model("a quadratic form", a=(4, 5), b=(5, 5), c=(2, 2))(
    lambda p, x: (
        jnp.einsum("ni,ij,nj->n", h := tanh(x @ p["a"]), p["b"], h)[:, None] * p["c"].sum(0)
    )
)


# --- convolutions

CONVOLUTIONS = {  # of an example, of the two kernels, options of both convolutions
    "stride 2": ((6, 6, 2), (3, 3, 2, 3), (3, 3, 3, 2), {"window_strides": (2, 2)}),
    "strides 2 and 1": ((6, 5, 2), (2, 3, 2, 3), (2, 2, 3, 2), {"window_strides": (2, 1), "padding": "VALID"}),
    "SAME padding": ((5, 5, 2), (3, 3, 2, 3), (2, 2, 3, 2), {}),
    "VALID padding": ((6, 6, 2), (3, 3, 2, 3), (3, 3, 3, 2), {"padding": "VALID"}),
    "asymmetric padding": ((5, 5, 2), (3, 3, 2, 3), (2, 3, 3, 2), {"padding": ((2, 0), (0, 1))}),
    "negative padding": ((6, 6, 2), (3, 2, 2, 3), (2, 2, 3, 2), {"padding": ((-1, 1), (2, -1))}),
    "kernel dilation": ((6, 6, 2), (2, 3, 2, 3), (2, 2, 3, 2), {"rhs_dilation": (2, 1)}),
    "input dilation": ((3, 3, 2), (3, 3, 2, 3), (3, 2, 3, 2), {"lhs_dilation": (2, 1), "padding": ((0, 1), (1, 0))}),
    "all at once": ((5, 5, 2), (2, 3, 2, 2), (2, 2, 2, 2), {"window_strides": (2, 1), "padding": ((1, 2), (0, 1)), "lhs_dilation": (2, 1), "rhs_dilation": (1, 2)}),
    "groups": ((5, 5, 4), (3, 3, 2, 4), (3, 3, 2, 6), {"feature_group_count": 2}),
    "groups and stride": ((5, 5, 4), (3, 3, 2, 4), (3, 3, 2, 2), {"feature_group_count": 2, "window_strides": (2, 2)}),
    "depthwise": ((5, 5, 3), (3, 3, 1, 3), (3, 3, 1, 6), {"feature_group_count": 3}),
    "1-D": ((6, 2), (3, 2, 3), (3, 3, 2), {}),
    "1-D causal": ((6, 2), (3, 2, 3), (3, 3, 2), {"padding": ((2, 0),)}),
    "3-D": ((4, 3, 4, 2), (2, 2, 3, 2, 3), (2, 2, 2, 3, 2), {"padding": "VALID"}),
    "1x1": ((4, 4, 2), (1, 1, 2, 3), (1, 1, 3, 2), {}),
    "1x1 and stride": ((5, 5, 2), (1, 1, 2, 3), (1, 1, 3, 2), {"window_strides": (2, 2)}),
    "as large as the image": ((4, 4, 2), (4, 4, 2, 3), (1, 1, 3, 2), {"padding": "VALID"}),
}  # fmt: skip # to be read as a table


def convolve(x, kernel, padding="SAME", window_strides=None, **options):
    space = "HWD"[: x.ndim - 2]
    numbers = ("N" + space + "C", space + "IO", "N" + space + "C")
    strides = window_strides or (1,) * len(space)
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=numbers, **options
    )


def cnn(options, p, x):
    h = tanh(convolve(x, p["a"], **options))
    return readout(tanh(convolve(h, p["b"], **options)))


for _name, (_x, _a, _b, _options) in CONVOLUTIONS.items():
    model(f"convolution: {_name}", _x, a=_a, b=_b)(partial(cnn, _options))


@model("convolution: circular by hand", (5, 5, 2), a=(3, 3, 2, 3), b=(3, 3, 3, 2))
def circular(p, x):
    for w in (p["a"], p["b"]):
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
        x = tanh(convolve(x, w, "VALID"))
    return readout(x)


@model("convolution: channels first", (2, 5, 5), a=(3, 2, 3, 3), b=(2, 3, 2, 2), c=(1, 2, 1, 1))
def channels_first(p, x):
    numbers = ("NCHW", "OIHW", "NCHW")
    for w in (p["a"], p["b"]):
        x = lax.conv_general_dilated(x, w, (2, 1), "SAME", dimension_numbers=numbers)
        x = tanh(x + p["c"][:, :1])
    return readout(x)


@model("convolution: transposed", (3, 3, 2), a=(3, 3, 2, 3), b=(2, 2, 3, 2))
def transposed(p, x):
    for w in (p["a"], p["b"]):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = tanh(lax.conv_transpose(x, w, (2, 1), "SAME", dimension_numbers=numbers))
    return readout(x)


@model("convolution: transposed kernel", (3, 3, 2), a=(3, 3, 3, 2), b=(2, 2, 2, 3))
def transposed_kernel(p, x):
    for w in (p["a"], p["b"]):
        x = tanh(lax.conv_transpose(x, w, (2, 2), "VALID", transpose_kernel=True))
    return readout(x)


@model("convolution: an output for each pixel", (4, 4, 2), a=(3, 3, 2, 3), b=(3, 3, 3, 2), c=(2,))
def per_pixel(p, x):
    return convolve(tanh(convolve(x, p["a"])), p["b"]) + p["c"]


@model("convolution: max and average pools", (6, 6, 2), a=(3, 3, 2, 3), b=(2, 2, 3, 4), c=(4, 2))
def pools(p, x):
    h = nn.max_pool(convolve(x, p["a"]), (2, 2), (2, 2))
    h = nn.avg_pool(tanh(convolve(h, p["b"])), (2, 2))
    return h.mean((1, 2)) @ p["c"]


@model(
    "convolution: residual and strided", (6, 6, 2), a=(3, 3, 2, 3), b=(3, 3, 3, 3), c=(1, 1, 3, 2)
)
def residual(p, x):
    h = tanh(convolve(x, p["a"], window_strides=(2, 2)))
    h = h + tanh(convolve(h, p["b"]))
    return convolve(h, p["c"]).mean((1, 2))


@model("convolution: of the batch of a batch", (2, 5, 5, 2), a=(3, 3, 2, 3), b=(3, 3, 3, 2))
def frames(p, x):  # frames of a film are examples of the convolution
    h = x.reshape(-1, *x.shape[2:])
    h = tanh(convolve(tanh(convolve(h, p["a"])), p["b"]))
    return readout(h.reshape(*x.shape[:2], *h.shape[1:]))


linen(
    "Conv",
    nn.Sequential([nn.Conv(3, (3, 3)), nn.gelu, nn.Conv(3, (2, 2), strides=2), nn.gelu, readout]),
    (5, 5, 2),
)
linen(
    "Conv, CIRCULAR",
    nn.Sequential(
        [
            nn.Conv(3, (3, 3), padding="CIRCULAR"),
            nn.gelu,
            nn.Conv(2, (2, 3), padding="CIRCULAR"),
            nn.gelu,
            readout,
        ]
    ),
    (4, 4, 2),
)
linen(
    "Conv, CAUSAL",
    nn.Sequential(
        [
            nn.Conv(3, 3, padding="CAUSAL", kernel_dilation=2),
            nn.gelu,
            nn.Conv(2, 2, padding="CAUSAL"),
            nn.gelu,
            readout,
        ]
    ),
    (5, 2),
)
linen(
    "Conv, depthwise separable",
    nn.Sequential(
        [nn.Conv(4, (3, 3), feature_group_count=2), nn.gelu, nn.Conv(3, (1, 1)), nn.gelu, readout]
    ),
    (4, 4, 2),
)
linen(
    "Conv, masked",
    nn.Sequential(
        [
            nn.Conv(3, (3,), mask=np.tri(3)[:, :2, None] * np.ones(3)),
            nn.gelu,
            nn.Conv(2, (2,)),
            nn.gelu,
            readout,
        ]
    ),
    (5, 2),
)
linen(
    "ConvTranspose",
    nn.Sequential(
        [
            nn.ConvTranspose(3, (3, 3), strides=(2, 1)),
            nn.gelu,
            nn.ConvTranspose(2, (2, 2), padding="VALID"),
            nn.gelu,
            readout,
        ]
    ),
    (3, 3, 2),
)
linen(
    "ConvTranspose, CIRCULAR",
    nn.Sequential([nn.ConvTranspose(3, (3,), strides=2, padding="CIRCULAR"), nn.gelu, readout]),
    (4, 2),
)
linen(
    "ConvLocal",
    nn.Sequential([nn.ConvLocal(3, (2,)), nn.gelu, nn.ConvLocal(2, (2,)), nn.gelu, readout]),
    (4, 2),
)
linen(
    "flattened image",
    nn.Sequential(
        [
            lambda x: x.reshape(x.shape[0], -1),
            nn.Dense(4),
            nn.tanh,
            nn.Dense(3),
            nn.tanh,
            nn.Dense(2),
        ]
    ),
    (3, 3, 2),
)


# --- norms

NORMS = {
    "batch norm in evaluation": nn.BatchNorm(use_running_average=True),
    "layer norm": nn.LayerNorm(),
    "layer norm over two axes": nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1)),
    "group norm": nn.GroupNorm(num_groups=2),
    "RMS norm": nn.RMSNorm(),
    "instance norm": nn.InstanceNorm(),
}
for _name, _norm in NORMS.items():
    linen(
        _name,
        nn.Sequential(
            [
                nn.Conv(4, (2,)),
                _norm,
                nn.tanh,
                nn.Dense(4),
                _norm.copy(name=None),
                nn.tanh,
                nn.Dense(2),
            ]
        ),
        (5, 2),
    )
linen(
    "weight norm",
    nn.Sequential(
        [nn.WeightNorm(nn.Dense(4)), nn.tanh, nn.WeightNorm(nn.Dense(3)), nn.tanh, nn.Dense(2)]
    ),
)
model("weight norm by hand", **MLP, d=(5,), e=(1, 3))(
    lambda p, x: (
        tanh(
            tanh(x @ (p["a"] / jnp.linalg.norm(p["a"], axis=0) * p["d"]))
            @ (p["b"] * p["e"] / jnp.sqrt((p["b"] ** 2).sum(0)))
        )
        @ p["c"]
    )
)
model("weights over their norm", **MLP)(
    lambda p, x: mlp({k: w / jnp.linalg.norm(w) for k, w in p.items()}, x)
)
model("spectral norm by three steps", **MLP, u=(4,))(
    lambda p, x: mlp({**p, "a": p["a"] / power_iteration(p["a"], p["u"])}, x)
)
model("less the mean of the features", **MLP)(
    lambda p, x: mlp(p, (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True))
)


def power_iteration(w, u):
    for _ in range(3):
        v = u @ w
        u = w @ (v / jnp.linalg.norm(v))
        u = u / jnp.linalg.norm(u)
    return u @ w @ v / jnp.linalg.norm(v)


# --- embeddings and gathers

TOKENS = {"tokens": 4}
model("table[tokens]", TOKENS, a=(6, 3), b=(3, 4), c=(4, 2))(
    lambda p, t: tanh(tanh(p["a"][t]) @ p["b"]) @ p["c"]
)
model("take", TOKENS, a=(6, 3), b=(3, 4), c=(4, 2))(
    lambda p, t: tanh(tanh(jnp.take(p["a"], t, axis=0)) @ p["b"]).mean(1) @ p["c"]
)
model("tokens out of bounds, zero", TOKENS, a=(4, 3), b=(3, 4), c=(4, 2))(
    lambda p, t: tanh(tanh(p["a"].at[t].get(mode="fill", fill_value=0.0)) @ p["b"]) @ p["c"]
)
model("tokens out of bounds, clipped", TOKENS, a=(4, 3), b=(3, 4), c=(4, 2))(
    lambda p, t: tanh(tanh(jnp.take(p["a"], t, axis=0, mode="clip")) @ p["b"]) @ p["c"]
)
model("tokens that count from the end", TOKENS, a=(6, 3), b=(3, 4), c=(4, 2))(
    lambda p, t: tanh(tanh(p["a"][t - 6]) @ p["b"]) @ p["c"]
)
model("take along axis 1", TOKENS, a=(3, 6), b=(3, 4), c=(4, 2))(
    lambda p, t: (
        tanh(jnp.einsum("dns,de->nse", tanh(jnp.take(p["a"], t, axis=1)), p["b"])).mean(1) @ p["c"]
    )
)
model("take_along_axis", TOKENS, a=(4, 6), b=(4, 3), c=(3, 2))(
    lambda p, t: (
        tanh(
            tanh(
                jnp.take_along_axis(jnp.broadcast_to(p["a"], (len(t), 4, 6)), t[..., None], axis=2)[
                    ..., 0
                ]
            )
            @ p["b"]
        )
        @ p["c"]
    )
)
model("one_hot @ table", TOKENS, a=(6, 3), b=(3, 4), c=(4, 2))(
    lambda p, t: tanh(tanh(jax.nn.one_hot(t, 6) @ p["a"]) @ p["b"]) @ p["c"]
)
model("a tied decoder", TOKENS, a=(6, 3), b=(3, 3))(
    lambda p, t: tanh(tanh(p["a"][t]) @ p["b"]) @ p["a"].T
)
model("positions by a slice of a table", TOKENS, a=(6, 3), b=(5, 3), c=(3, 2))(
    lambda p, t: tanh(p["a"][t] + p["b"][: t.shape[1]]) @ p["c"]
)
model("two tables, summed", TOKENS, a=(6, 3), b=(6, 3), c=(3, 2))(
    lambda p, t: tanh(p["a"][t] + p["b"][t[:, ::-1]] * p["a"][5 - t]) @ p["c"]
)
model("a weight for each token", TOKENS, a=(6, 3, 3), b=(4, 3), c=(3, 2))(
    lambda p, t: tanh(jnp.einsum("sd,nsde->nse", p["b"], p["a"][t])).mean(1) @ p["c"]
)


class TiedDecoder(nn.Module):
    @nn.compact
    def __call__(self, t):
        embed = nn.Embed(6, 3)
        return embed.attend(tanh(nn.Dense(3)(tanh(embed(t)))))


linen("Embed and attend", TiedDecoder(), TOKENS)


# --- attention


class Attention(nn.Module):
    """Embeds tokens where they are integers, then attends with a causal mask."""

    use_bias: bool = True
    normalize: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(6, 4)(x) if jnp.issubdtype(x.dtype, jnp.integer) else tanh(nn.Dense(4)(x))
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        h = nn.MultiHeadDotProductAttention(
            2, use_bias=self.use_bias, normalize_qk=self.normalize, deterministic=True
        )(x, mask=mask)
        return nn.Dense(2)(tanh(x + h))


linen("attention with a causal mask", Attention(use_bias=False), (4, 3))
linen("attention with biases", Attention(), (3, 3))  # the kernel of the key's bias is zero
linen("attention of tokens, normalised", Attention(normalize=True), {"tokens": 3})


def attend(q, k, v, mask=None):
    scores = jnp.einsum("nqd,nkd->nqk", q, k) / q.shape[-1] ** 0.5
    scores = scores if mask is None else jnp.where(mask, scores, -1e9)
    return jnp.einsum("nqk,nkd->nqd", softmax(scores), v)


model("attention with packed weights", (3, 4), a=(4, 12), b=(4, 4), c=(4, 2))(
    lambda p, x: (
        tanh(attend(*jnp.split(x @ p["a"], 3, axis=-1), mask=np.tri(3, dtype=bool)) @ p["b"])
        @ p["c"]
    )
)
model("attention with a packed weight split before", (3, 4), a=(4, 12), b=(4, 2))(
    lambda p, x: tanh(attend(*(x @ w for w in jnp.split(p["a"], 3, axis=1)))) @ p["b"]
)
model("attention by a learned query", (3, 4), a=(2, 4), b=(4, 4), c=(4, 4), d=(4, 2))(
    lambda p, x: (
        attend(jnp.broadcast_to(p["a"], (len(x), 2, 4)), tanh(x @ p["b"]), tanh(x @ p["c"]))
        @ p["d"]
    )
)
model("linear attention", (3, 4), a=(4, 4), b=(4, 4), c=(4, 4), d=(4, 2))(
    lambda p, x: (
        jnp.einsum(
            "nqd,nde->nqe",
            softplus(x @ p["a"]),
            jnp.einsum("nkd,nke->nde", softplus(x @ p["b"]), x @ p["c"]),
        )
        @ p["d"]
    )
)


class Transformer(nn.Module):
    """Two layers with layer norm, ten outputs."""

    width: int = 4

    @nn.compact
    def __call__(self, t):
        d = self.width
        h = nn.Embed(6, d)(t) + self.param("positions", nn.initializers.normal(), (t.shape[1], d))
        for _ in range(2):
            z = nn.LayerNorm()(h)
            h = h + nn.MultiHeadDotProductAttention(2, deterministic=True)(z)
            h = h + nn.Dense(d)(nn.gelu(nn.Dense(d + 1)(nn.LayerNorm()(h))))
        return nn.Dense(10)(nn.LayerNorm()(h).mean(1))


linen("a transformer", Transformer(), TOKENS)


# --- recurrent nets

F64 = {"param_dtype": jnp.float64}  # the carry of a cell begins in it
linen("LSTM", nn.Sequential([nn.RNN(nn.LSTMCell(3, **F64)), nn.Dense(2)]), (4, 2))
linen(
    "GRU", nn.Sequential([nn.RNN(nn.GRUCell(3, **F64), reverse=True), nn.tanh, nn.Dense(2)]), (4, 2)
)
linen(
    "a stack of two cells",
    nn.Sequential([nn.RNN(nn.SimpleCell(3, **F64)), nn.RNN(nn.SimpleCell(2, **F64))]),
    (3, 2),
)


@model("recurrence by scan", (4, 2), a=(2, 3), b=(3, 3), c=(3, 2), d=(1, 3))
def recurrence(p, x):
    def step(h, x):
        return tanh(h @ p["b"] + x @ p["a"] + p["d"]), None

    h, _ = lax.scan(step, jnp.zeros((len(x), 3), x.dtype), jnp.swapaxes(x, 0, 1))
    return tanh(h) @ p["c"]


@model("recurrence by scan, an output a step", (4, 2), a=(2, 3), b=(3, 3), c=(3, 2), d=(3,))
def recurrence_outputs(p, x):
    def step(h, x):
        h = tanh(h @ p["b"] + x @ p["a"])
        return h, h @ p["c"]

    start = jnp.broadcast_to(p["d"], (len(x), 3))
    _, y = lax.scan(step, start, jnp.swapaxes(x, 0, 1), reverse=True)
    return jnp.swapaxes(y, 0, 1)


@model("recurrence of projected inputs", (4, 2), a=(2, 3), b=(3, 3), c=(3, 2))
def recurrence_projected(p, x):
    xs = jnp.swapaxes(tanh(x @ p["a"]), 0, 1)
    h, _ = lax.scan(lambda h, x: (tanh(h @ p["b"] + x), None), xs[0], xs[1:])
    return h @ p["c"]


@model("a linear recurrence by associative_scan", (4, 2), a=(2, 3), b=(3,), c=(3, 2))
def associative(p, x):
    u = tanh(x @ p["a"])
    decay = jnp.broadcast_to(jax.nn.sigmoid(p["b"]), u.shape)
    combine = lambda s, t: (s[0] * t[0], t[0] * s[1] + t[1])  # noqa: E731 (a function of one line)
    return tanh(lax.associative_scan(combine, (decay, u), axis=1)[1]) @ p["c"]


# --- loops over layers

STACK = {"a": (3, 4, 4), "b": (3, 4), "c": (4, 2)}


def scanned(step=lambda h, w: (tanh(h @ w[0] + w[1]), None), **options):
    return lambda p, x: lax.scan(step, x, (p["a"], p["b"]), **options)[0] @ p["c"]


model("scan over layers", **STACK)(scanned())
model("scan over layers, reversed", **STACK)(scanned(reverse=True))
model("scan over layers, unrolled", **STACK)(scanned(unroll=2))
model("scan over layers with remat", **STACK)(
    scanned(jax.checkpoint(lambda h, w: (tanh(h @ w[0] + w[1]), None)))
)
model("scan over residual layers", a=(3, 4, 5), b=(3, 5, 4), c=(4, 2))(
    scanned(lambda h, w: (h + tanh(h @ w[0]) @ w[1], None))
)
model("scan over layers, outputs of each", **STACK)(
    lambda p, x: (
        jnp.moveaxis(lax.scan(lambda h, w: (h := tanh(h @ w), h), x, p["a"])[1], 0, 1) @ p["c"]
    )
)
model("scan in scan", a=(2, 3, 4, 4), c=(4, 2))(
    lambda p, x: (
        lax.scan(lambda h, w: lax.scan(lambda h, w: (tanh(h @ w), None), h, w), x, p["a"])[0]
        @ p["c"]
    )
)
model("scan that carries the weight", a=(4, 4), c=(4, 2))(
    lambda p, x: (
        lax.scan(lambda s, _: ((tanh(s[0] @ s[1]), s[1]), None), (x, p["a"]), length=3)[0][0]
        @ p["c"]
    )
)
model("scan that changes the weight it carries", a=(4, 4), c=(4, 2))(
    lambda p, x: (
        lax.scan(lambda s, _: ((tanh(s[0] @ s[1]), s[1].T), None), (x, p["a"]), length=3)[0][0]
        @ p["c"]
    )
)
model("scan with the same weight each time", a=(4, 4), c=(4, 2))(
    lambda p, x: lax.scan(lambda h, _: (tanh(h @ p["a"]), None), x, length=3)[0] @ p["c"]
)
model("fori_loop", a=(4, 4), c=(4, 2))(
    lambda p, x: lax.fori_loop(0, 3, lambda i, h: tanh(h @ p["a"]), x) @ p["c"]
)
model("fori_loop that picks its layer", a=(3, 4, 4), c=(4, 2))(
    lambda p, x: lax.fori_loop(0, 3, lambda i, h: tanh(h @ p["a"][i]), x) @ p["c"]
)
model("while_loop", a=(4, 4), c=(4, 2))(
    lambda p, x: (
        lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, tanh(s[1] @ p["a"])), (0, x))[1]
        @ p["c"]
    )
)
model("map over the batch", **MLP)(lambda p, x: lax.map(lambda x: mlp(p, x), x))
model("vmap over the batch", **MLP)(lambda p, x: jax.vmap(mlp, (None, 0))(p, x))
model("vmap over an ensemble", a=(3, 4, 5), b=(3, 5, 3), c=(3, 3, 2))(
    lambda p, x: jax.vmap(mlp, (0, None), 1)(p, x)
)


class Block(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        h = h + nn.MultiHeadDotProductAttention(2, deterministic=True)(nn.LayerNorm()(h))
        return h + nn.Dense(4)(nn.gelu(nn.Dense(3)(nn.LayerNorm()(h)))), None


class ScannedBlocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return nn.Dense(2)(blocks()(nn.Dense(4)(x), None)[0])


linen("Flax scan over transformer blocks", ScannedBlocks(), (3, 2))


@model("scan over transformer blocks", (3, 4), a=(2, 4, 12), b=(2, 4, 4), c=(4, 2), d=(2, 4))
def scanned_blocks(p, x):
    def block(h, w):
        a, b, d = w
        z = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-3) * d
        h = h + attend(*jnp.split(z @ a, 3, axis=-1))
        return h + tanh(h @ b), None

    return lax.scan(block, x, (p["a"], p["b"], p["d"]))[0].mean(1) @ p["c"]


# --- wrapped functions


@jax.custom_jvp
def sine(h):
    return jnp.sin(h)


sine.defjvps(lambda t, y, h: t * jnp.cos(h))


@jax.custom_jvp
def sine_layer(h, w):
    return jnp.sin(h @ w)


@sine_layer.defjvp
def _sine_layer_jvp(primals, tangents):
    (h, w), (dh, dw) = primals, tangents
    return sine_layer(h, w), jnp.cos(h @ w) * (dh @ w + h @ dw)


@jax.custom_vjp
def vjp_sine(h):
    return jnp.sin(h)


vjp_sine.defvjp(lambda h: (jnp.sin(h), h), lambda h, g: (g * jnp.cos(h),))


@jax.custom_vjp
def vjp_sine_layer(h, w):
    return jnp.sin(h @ w)


def _vjp_sine_layer_bwd(residuals, g):
    h, w = residuals
    g = g * jnp.cos(h @ w)
    return (g @ w.T).astype(h.dtype), (h.T @ g).astype(w.dtype)


vjp_sine_layer.defvjp(lambda h, w: (jnp.sin(h @ w), (h, w)), _vjp_sine_layer_bwd)


@jax.custom_vjp
def straight_through(h):
    return jnp.round(2 * h)


straight_through.defvjp(lambda h: (jnp.round(2 * h), None), lambda _, g: (2 * g,))

WRAPPED = {
    "remat of all": jax.checkpoint(mlp),
    "remat of a layer": lambda p, x: jax.checkpoint(lambda h, w: tanh(h @ w))(tanh(x @ p["a"]), p["b"]) @ p["c"],
    "remat that closes over a weight": lambda p, x: jax.checkpoint(lambda h: tanh(h @ p["b"]))(tanh(x @ p["a"])) @ p["c"],
    "remat with a policy": jax.checkpoint(mlp, policy=jax.checkpoint_policies.dots_saveable),
    "jit inside": lambda p, x: jax.jit(lambda h, w: tanh(h @ w))(tanh(x @ p["a"]), p["b"]) @ p["c"],
    "jit of jit": jax.jit(lambda p, x: tanh(jax.jit(mlp)(p, x))),
    "custom_jvp": lambda p, x: sine(sine(x @ p["a"]) @ p["b"]) @ p["c"],
    "custom_jvp with a weight": lambda p, x: sine_layer(sine_layer(x, p["a"]), p["b"]) @ p["c"],
    "custom_vjp": lambda p, x: vjp_sine(vjp_sine(x @ p["a"]) @ p["b"]) @ p["c"],
    "custom_vjp with a weight": lambda p, x: vjp_sine_layer(vjp_sine_layer(x, p["a"]), p["b"]) @ p["c"],
    "custom_vjp that is no derivative": lambda p, x: straight_through(straight_through(x @ p["a"]) @ p["b"]) @ p["c"],
    "relu and friends": lambda p, x: nn.elu(nn.silu(nn.relu(x @ p["a"]) @ p["b"])) @ p["c"],
    "softmax and log_softmax": lambda p, x: jax.nn.log_softmax(softmax(x @ p["a"]) @ p["b"]) @ p["c"],
    "logsumexp": lambda p, x: jax.nn.logsumexp(x @ p["a"], axis=1, keepdims=True) * mlp(p, x),
    "stop_gradient of a layer": lambda p, x: tanh(tanh(x @ lax.stop_gradient(p["a"])) @ p["b"]) @ p["c"],
    "stop_gradient of a hidden layer": lambda p, x: mlp(p, x) * lax.stop_gradient(x @ p["a"]).sum(1, keepdims=True),
    "cond on a weight": lambda p, x: lax.cond(p["a"][0, 0] < 9, mlp, lambda p, x: jnp.sin(x @ p["a"])[:, :2], p, x),
    "cond on x, under vmap": lambda p, x: jax.vmap(lambda x: lax.cond(x[0] > 0, mlp, lambda p, x: tanh(x @ p["a"])[:2], p, x))(x),
    "cond on x, under map": lambda p, x: lax.map(lambda x: lax.cond(x[0] > 0, mlp, lambda p, x: tanh(x @ p["a"])[:2], p, x), x),
    "cond that closes over weights": lambda p, x: lax.cond(p["c"].sum() < 9, lambda h: tanh(h @ p["b"]), lambda h: h[:, :3], tanh(x @ p["a"])) @ p["c"],
    "where on x": lambda p, x: jnp.where(x[:, :1] > 0, mlp(p, x), jnp.sin(x @ p["a"])[:, :2]),
}  # fmt: skip # to be read as a table
for _name, _f in WRAPPED.items():
    model(_name, **MLP)(_f)

model("switch on an integer leaf", **MLP, i=1)(
    lambda p, x: lax.switch(p["i"], [jnp.sin, tanh, softplus], mlp(p, x))
)
model("switch between layers", **MLP, i=2)(
    lambda p, x: lax.switch(
        p["i"], [lambda p, x: x[:, :2], mlp, lambda p, x: sine(mlp(p, x) @ p["c"].T)[:, :2]], p, x
    )
)


# --- what becomes of a weight before it meets x

SQUARE = {"a": (4, 4), "b": (4, 4), "c": (4, 2)}


def same(w):
    """Three layers of weights that are made of others."""
    return lambda p, x: mlp(dict(zip("abc", w(p), strict=True)), x)


MADE = {
    "the same weight in two layers": lambda p: (p["a"], p["a"], p["c"]),
    "a weight and its transpose": lambda p: (p["a"], p["a"].T, p["c"]),
    "the mean of two weights": lambda p: ((p["a"] + p["b"]) / 2, p["b"], p["c"]),
    "a difference": lambda p: (p["a"] - p["b"], p["b"] - 2 * p["a"], p["c"]),
    "a product of two weights": lambda p: (p["a"] @ p["b"], p["b"], p["c"]),
    "a weight times itself": lambda p: (p["a"] @ p["a"], p["b"], p["c"]),
    "a weight times its transpose": lambda p: (p["a"] @ p["a"].T, p["b"], p["c"]),
    "an elementwise square": lambda p: (p["a"] ** 2, p["b"] * p["a"], p["c"]),
    "a mask on a weight": lambda p: (p["a"] * np.tri(4), jnp.where(np.tri(4) > 0, p["b"], 0), p["c"]),
    "tril of a weight": lambda p: (jnp.tril(p["a"]), jnp.triu(p["b"], 1), p["c"]),
    "a sum with the identity": lambda p: (jnp.eye(4) + p["a"], p["b"] - np.eye(4), p["c"]),
    "a weight that is reshaped": lambda p: (p["a"].reshape(2, 8).T.reshape(4, 4), p["b"][::-1], p["c"].reshape(2, 4).T),
    "a weight and what it is backwards": lambda p: (p["a"], p["a"][:, ::-1], p["c"]),
    "two slices of a weight that overlap": lambda p: (p["a"][:, :3], p["a"][1:], p["c"]),
    "a weight that is flipped and rolled": lambda p: (p["a"][:, ::-1], jnp.roll(p["b"], 1, 0), p["c"][::-1]),
    "weights that are joined": lambda p: (jnp.concatenate([p["a"][:2], p["b"][2:]]), jnp.concatenate([p["c"], p["c"]], 1), p["c"]),
    "weights that are stacked": lambda p: (jnp.stack([p["a"][0], p["b"][1], p["a"][2], p["a"][3]]), p["b"], p["c"]),
    "a row that is repeated": lambda p: (jnp.broadcast_to(p["a"][:1], (4, 4)) * p["b"], jnp.repeat(p["c"], 2, 1), p["c"]),
    "a weight that is tiled": lambda p: (jnp.tile(p["c"], (1, 2)), p["b"], p["c"]),
    "a weight that is padded": lambda p: (jnp.pad(p["c"], ((0, 0), (1, 1))), p["b"], p["c"]),
    "a dynamic slice": lambda p: (lax.dynamic_slice(jnp.concatenate([p["a"], p["b"]]), (3, 0), (4, 4)), p["b"], p["c"]),
    "a weight that is updated in place": lambda p: (p["a"].at[1:3].set(p["b"][:2]), p["b"].at[0].add(p["a"][0]), p["c"]),
    "a weight that is gathered": lambda p: (p["a"][np.array([0, 2, 2, 1])], p["b"][:, np.array([3, 0, 1, 1])], p["c"]),
    "tanh of a weight": lambda p: (tanh(p["a"]), jnp.exp(p["b"]), p["c"]),
    "softmax of a weight": lambda p: (softmax(p["a"]), p["b"], p["c"]),
    "a sum of a weight": lambda p: (p["a"] * p["b"].sum(), p["b"] / p["a"].sum(1, keepdims=True), p["c"]),
    "an inverse": lambda p: (jnp.linalg.inv(p["a"] + 3 * np.eye(4)), p["b"], p["c"]),
    "an orthogonal weight": lambda p: (jnp.linalg.solve(np.eye(4) + p["a"] - p["a"].T, np.eye(4) - p["a"] + p["a"].T), p["b"], p["c"]),
    "a weight that does not matter": lambda p: (p["a"], p["a"].T, p["a"][:, :2]),
    "a weight times zero": lambda p: (p["a"], 0 * p["b"] + p["a"], p["c"]),
}  # fmt: skip # to be read as a table
for _name, _w in MADE.items():
    model(_name, **SQUARE)(same(_w))


def _through_float32():
    """Make values and cotangents small whole numbers, which float32 holds without rounding."""
    layer = lambda h, w: nn.relu(h @ w.astype(jnp.float32).astype(jnp.float64))  # noqa: E731 (a function of one line)
    f = lambda p, x: layer(layer(x, p["a"]), p["b"]) @ p["c"]  # noqa: E731 (a function of one line)
    return Case(f, *jax.tree.map(lambda a: jnp.round(2 * a), (weights(SQUARE), *examples((4,)))))


MODELS["weights through float32"] = _through_float32

model("low rank", a=(4, 2), b=(2, 5), c=(5, 2), d=(2, 3), e=(3, 2))(
    lambda p, x: tanh(tanh(x @ (p["a"] @ p["b"])) @ p["c"] @ p["d"]) @ p["e"]
)
model("a low-rank update (LoRA)", **MLP, d=(4, 2), e=(2, 5))(
    lambda p, x: mlp({**p, "a": p["a"] + 0.5 * p["d"] @ p["e"]}, x)
)
model("one vector for all weights", v=(43,))(
    lambda p, x: (
        mlp(
            {
                "a": p["v"][:20].reshape(4, 5),
                "b": p["v"][20:35].reshape(5, 3),
                "c": p["v"][35:41].reshape(3, 2),
            },
            x,
        )
        + p["v"][41:]
    )
)
model("a Kronecker product", a=(2, 2), b=(2, 2), c=(4, 2))(
    same(lambda p: (jnp.kron(p["a"], p["b"]), jnp.kron(p["b"], p["a"]), p["c"]))
)
model("a convolution and its kernel in a dense layer", (4, 3), a=(3, 3, 4), b=(12, 2))(
    lambda p, x: (
        tanh(
            tanh(tanh(convolve(x, p["a"])).mean(1) @ p["a"].reshape(9, 4).T) @ p["a"].reshape(9, 4)
        )
        @ p["b"].reshape(4, 6)
    )
)
model("a weight as the input of a convolution", (4, 4, 2), a=(4, 4, 2), b=(3, 3, 2, 3))(
    lambda p, x: readout(tanh(convolve(x + tanh(convolve(p["a"][None], p["b"]))[..., :2], p["b"])))
)
model("a hypernetwork", (4,), a=(4, 5), b=(5, 12), c=(4, 3), d=(3, 2))(
    lambda p, x: (
        tanh(jnp.einsum("nd,nde->ne", x, (tanh(x @ p["a"]) @ p["b"]).reshape(-1, 4, 3))) @ p["d"]
    )
)


# --- scalars, and parameters that do not matter

model("scalar parameters", **MLP, t=(), s=())(
    lambda p, x: softmax(tanh(tanh(x @ p["a"]) * p["s"] @ p["b"]) / p["t"]) @ p["c"] + p["s"]
)
model("integers and unused parameters", **MLP, i=3, u=(2, 2))(
    lambda p, x: mlp(p, x) * p["i"] + 0 * p["u"].sum()
)
model("powers of a scalar", **MLP, s=())(
    lambda p, x: mlp(p, x) ** 2 * jnp.exp(p["s"]) + jnp.abs(p["s"]) ** 1.5 * x[:, :2]
)


# --- inputs and outputs

model("no output axis", **MLP)(lambda p, x: mlp(p, x).sum(1))
model("several output axes", **MLP)(
    lambda p, x: (
        tanh(x @ p["a"])[:, :, None, None] * mlp(p, x)[:, None, :, None] * np.ones((1, 1, 2))
    )
)
model("outputs that share nothing", **MLP, d=(4, 1))(
    lambda p, x: jnp.concatenate([mlp(p, x), tanh(x @ p["d"])], 1)
)
model("an output that is an input", **MLP)(lambda p, x: jnp.concatenate([mlp(p, x), x], 1))
model("an output that is a parameter", **MLP, d=(2,))(
    lambda p, x: jnp.stack([mlp(p, x), jnp.broadcast_to(p["d"], (len(x), 2))], 1)
)
model("pytree outputs", **MLP, d=(4,))(
    lambda p, x: {"two": mlp(p, x), "none": (tanh(x @ p["d"]), jnp.sin(x @ p["a"]))}
)


def _pytree_inputs():
    f = lambda p, x: mlp(p["w"], x["left"] + x["right"][0] @ p["m"][0])  # noqa: E731 (a function of one line)
    params = {"w": weights(MLP), "m": [jnp.asarray(normal(7, 2, 4)), None]}
    x1, x2 = ({"left": x, "right": (x[:, :2],)} for x in examples((4,)))
    return Case(f, params, x1, x2)


MODELS["pytree inputs and parameters"] = _pytree_inputs
MODELS["parameters that are one array"] = lambda: Case(
    lambda w, x: tanh(tanh(x @ w) @ w.T) @ w, jnp.asarray(normal(0, 4, 3)), *examples((4,))
)


# --- derivatives with respect to x


def scalar(p, x):
    return mlp(p, x)[..., 0]


def residual_by_jvp(p, x):
    t, s = jnp.eye(4)[0], jnp.eye(4)[1]
    along = lambda f, v: lambda x: jax.jvp(f, (x,), (jnp.broadcast_to(v, x.shape),))[1]  # noqa: E731 (a function of one line)
    u = partial(scalar, p)
    return along(u, t)(x) - along(along(u, s), s)(x) + u(x) ** 2


def residual_by_grad(p, x):
    def at(x):
        u = partial(scalar, p)
        return jax.grad(u)(x)[0] - jax.grad(lambda x: jax.grad(u)(x)[1])(x)[1]

    return jax.vmap(at)(x)


def residual_by_hessian(p, x):
    def at(x):
        u, h = jax.grad(scalar, 1)(p, x), jax.hessian(scalar, 1)(p, x)
        return jnp.stack([u[0] - h[1, 1], jnp.trace(h)])

    return jax.vmap(at)(x)


DERIVATIVES = {
    "a gradient by x": lambda p, x: jax.grad(lambda x: scalar(p, x).sum())(x),
    "a gradient by x, an example at a time": lambda p, x: jax.vmap(jax.grad(partial(scalar, p)))(x),
    "a Jacobian by x, reverse": lambda p, x: jax.vmap(jax.jacrev(partial(mlp, p)))(x),
    "a Jacobian by x, forward": lambda p, x: jax.vmap(jax.jacfwd(partial(mlp, p)))(x),
    "a value and its gradient": lambda p, x: jax.vmap(jax.value_and_grad(partial(scalar, p)))(x),
    "a residual u_t - u_xx + u^2, jvp of jvp": residual_by_jvp,
    "a residual u_t - u_xx, grad of grad": residual_by_grad,
    "a residual u_t - u_xx and a Laplacian, hessian": residual_by_hessian,
    "a step of descent inside": lambda p, x: mlp(jax.tree.map(lambda w, g: w - 0.1 * g, p, jax.grad(lambda p: jnp.sum(mlp(p, np.ones((1, 4))) ** 2))(p)), x),
}  # fmt: skip # to be read as a table
for _name, _f in DERIVATIVES.items():
    model(_name, **MLP)(_f)


# --- Flax NNX and Equinox


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 3, (2, 2), rngs=rngs, **F64)
        self.norm = nnx.LayerNorm(3, rngs=rngs, **F64)
        self.dense = nnx.Linear(3, 2, rngs=rngs, **F64)

    def __call__(self, x):
        return self.dense(tanh(self.norm(self.conv(x)))).mean((1, 2))


def attend_in_heads(q, k, v, **_):
    """Attend as NNX does, whose own attention goes through float32."""
    return jnp.einsum("nhqk,nkhd->nqhd", softmax(jnp.einsum("nqhd,nkhd->nhqk", q, k)), v)


class NnxTransformer(nnx.Module):
    def __init__(self, rngs, **options):
        self.embed = nnx.Embed(6, 4, rngs=rngs, **F64)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs, **options, **F64)
        self.norm = nnx.RMSNorm(4, rngs=rngs, **F64)

    def __call__(self, t):
        h = self.embed(t)
        return self.embed.attend(self.norm(h + self.attention(h)))


class NnxRecurrent(nnx.Module):
    def __init__(self, rngs, *cells):
        f64 = {"dtype": jnp.float64, **F64}  # the simple cell computes in float32 else
        layers = [nnx.RNN(cell(2, 3, rngs=rngs, **f64)) for cell in cells]
        self.recurrent = layers[0] if len(cells) == 1 else nnx.Bidirectional(*layers)
        self.dense = nnx.Linear(3 * len(cells), 2, rngs=rngs, **F64)

    def __call__(self, x):
        return self.dense(tanh(self.recurrent(x)[:, -1]))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs, **F64)
        self.norm = nnx.BatchNorm(4, rngs=rngs, **F64)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(tanh(self.norm(self.dense(x))))


class NnxBlocks(nnx.Module):
    """Blocks that are stacked, with their random streams, and applied by a scan or side by side."""

    def __init__(self, rngs, one_after_another):
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(NnxBlock))(rngs)
        self.dense = nnx.Linear(4, 2, rngs=rngs, **F64)
        self.one_after_another = one_after_another

    def __call__(self, x):
        if self.one_after_another:
            axes = {"in_axes": (0, nnx.Carry), "out_axes": nnx.Carry}
            return self.dense(nnx.scan(NnxBlock.__call__, **axes)(self.blocks, x))
        return self.dense(nnx.vmap(NnxBlock.__call__, in_axes=(0, None))(self.blocks, x).sum(0))


class NnxCounting(nnx.Module):
    def __init__(self, rngs):
        self.first = NnxBlock(rngs)
        self.dense = nnx.Linear(4, 2, rngs=rngs, **F64)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] = self.calls[...] + 1
        h = nnx.remat(NnxBlock.__call__)(self.first, x)
        self.hidden = nnx.Intermediate(h)
        return self.dense(tanh(h))


class LinenForNnx(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, **F64)(tanh(nn.Dense(4, **F64)(x)))
        self.sow("intermediates", "hidden", x)
        return nn.Dense(2, **F64)(tanh(nn.Dense(3, **F64)(x)))


def bridged(rngs):
    return nnx.bridge.ToNNX(LinenForNnx(), rngs=rngs).lazy_init(jnp.zeros((1, 4)))


class EquinoxNet(eqx.Module):
    convolution: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.convolution = eqx.nn.Conv2d(2, 3, 3, stride=2, padding=1, key=key)
        self.norm = eqx.nn.LayerNorm((3, 2, 2))
        self.mlp = eqx.nn.MLP(12, 2, 4, 1, activation=tanh, key=key)

    def __call__(self, x):
        return self.mlp(self.norm(tanh(self.convolution(x))).reshape(-1))


class EquinoxRecurrent(eqx.Module):
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, key):
        self.cell = eqx.nn.GRUCell(2, 3, key=key)
        self.head = eqx.nn.Linear(3, 2, key=key)

    def __call__(self, x):
        return self.head(lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(3), x)[0])


class EquinoxAttention(eqx.Module):
    attention: eqx.nn.MultiheadAttention

    def __init__(self, key):
        self.attention = eqx.nn.MultiheadAttention(2, 4, key=key)

    def __call__(self, x):
        h = tanh(x)
        return self.attention(h, h, h, mask=jnp.tri(len(h), dtype=bool))


nnx_module("NNX convolution", NnxNet, (3, 3, 2))
nnx_module("NNX transformer", partial(NnxTransformer, attention_fn=attend_in_heads), {"tokens": 3})
for _cell in (nnx.SimpleCell, nnx.LSTMCell, nnx.GRUCell, nnx.OptimizedLSTMCell):
    nnx_module(f"NNX recurrence: {_cell.__name__}", lambda r, c=_cell: NnxRecurrent(r, c), (3, 2))
nnx_module(
    "NNX recurrence: both ways",
    lambda rngs: NnxRecurrent(rngs, nnx.GRUCell, nnx.SimpleCell),
    (3, 2),
)
nnx_module("NNX blocks in a scan, with dropout", lambda rngs: NnxBlocks(rngs, True))
nnx_module("NNX blocks side by side, with dropout", lambda rngs: NnxBlocks(rngs, False))
nnx_module("NNX that counts and keeps its features, rematerialised", NnxCounting)
nnx_module("NNX around a linen module", bridged)
equinox_module("Equinox MLP", lambda key: eqx.nn.MLP(4, 2, 3, 2, activation=tanh, key=key))
equinox_module("Equinox convolution", EquinoxNet, (2, 4, 4))
equinox_module("Equinox GRU", EquinoxRecurrent, (3, 2))
equinox_module("Equinox attention", EquinoxAttention, (3, 4))


# --- the rest


@model("a batch that is reshaped and back", (3, 4), **MLP)
def reshaped(p, x):
    return mlp(p, x.reshape(-1, 4)).reshape(x.shape[0], 3, 2)


@model("a mixture of experts", a=(4, 3), b=(3, 4, 5), c=(3, 5, 2))
def mixture(p, x):
    gate = softmax(x @ p["a"])
    h = jnp.einsum("nhe,heo->nho", tanh(jnp.einsum("nd,hde->nhe", x, p["b"])), p["c"])
    return jnp.einsum("nh,nho->no", gate, h)


@model("a mixture of the best two experts", a=(4, 3), b=(3, 4, 5), c=(3, 5, 2))
def sparse_mixture(p, x):
    values, index = lax.top_k(x @ p["a"], 2)
    h = tanh(jnp.einsum("nd,nkde->nke", x, p["b"][index]))
    return jnp.einsum("nk,nke,nkeo->no", softmax(values), h, p["c"][index])


REST = {
    "top_k": lambda h: lax.top_k(h, 3)[0],
    "sort": lambda h: jnp.sort(h, axis=1),
    "maximum and minimum": lambda h: jnp.stack([h.max(1), h.min(1), h[:, :3].prod(1)], 1),
    "cumsum": lambda h: jnp.cumsum(h, axis=1) * lax.cumsum(h, axis=1, reverse=True),
    "cumprod and cummax": lambda h: jnp.cumprod(h, axis=1) + lax.cummax(h, axis=1),
    "a norm": lambda h: h / jnp.linalg.norm(h, axis=1, keepdims=True),
    "a spectrum": lambda h: jnp.abs(jnp.fft.rfft(h, axis=1)) ** 2,
    "a filter of frequencies": lambda h: jnp.fft.irfft(jnp.fft.rfft(h, axis=1) * np.array([1, 2, 1j]), 5, axis=1),
    "a Gram matrix": lambda h: jnp.einsum("ni,nj->nij", h, h),
    "a difference and a roll": lambda h: jnp.diff(h, axis=1) * jnp.roll(h, 1, 1)[:, 1:],
    "a polynomial": lambda h: h**3 - 2 * h**2 + h / (1 + h**2),
    "clip and abs": lambda h: jnp.clip(h, -0.3, 0.3) + jnp.abs(h),
    "a determinant": lambda h: jnp.linalg.slogdet(np.eye(5) + h[:, :, None] * h[:, None, :])[1][:, None],
    "a linear system": lambda h: jnp.linalg.solve(np.eye(5) + h[:, :, None] * h[:, None, :], jnp.sin(h)[..., None])[..., 0],
}  # fmt: skip # to be read as a table
for _name, _g in REST.items():
    model(_name, a=(4, 5), b=(5, 5))(
        lambda p, x, g=_g: readout(jnp.sin(g(tanh(x @ p["a"]) @ p["b"])))
    )

model("a spectrum of the input", (6,), a=(8, 4), b=(4, 3), c=(3, 2))(
    lambda p, x: mlp(p, jnp.concatenate([jnp.fft.rfft(x).real, jnp.fft.rfft(x).imag], 1))
)


# --- rounded to float32


def in_float32(build):
    """Give the same model with weights and inputs in float32."""

    def convert(a):
        floats = jnp.issubdtype(a.dtype, jnp.floating)
        return jnp.asarray(np.asarray(a), np.float32 if floats else a.dtype)

    case = build()
    return Case(case.f, *jax.tree.map(convert, (case.params, case.x1, case.x2)))


WIDE = {}
linen("a transformer of 16 features", Transformer(16), {"tokens": 8}, rows=WIDE)
SOME = (
    "dense with biases",
    "convolution: residual and strided",
    "a tied decoder",
    "recurrence by scan",
)
for _name, _build in ({name: MODELS[name] for name in SOME} | WIDE).items():
    ROUNDED[f"{_name}, in float32"] = partial(in_float32, _build)
model("a weight through float32", rows=ROUNDED, **SQUARE)(
    same(lambda p: (p["a"].astype(jnp.float32).astype(jnp.float64), p["b"], p["c"]))
)
nnx_module("NNX attention, which goes through float32", NnxTransformer, {"tokens": 3}, rows=ROUNDED)
