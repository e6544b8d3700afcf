"""Networks as users write them, that neural-tangents has no layers for, each made at a width.

The weights of the last product are called `out`: the output is linear in them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.infinite.cases import conv, dense, normed, pooled
from lazyjax import from_linen, from_nnx, variances

N, K = 4, 4  # examples, outputs


class Network(NamedTuple):
    f: Callable[[Any, Any], Any]
    params: Any
    x: Any
    variance: Any = 1.0


class Model(NamedTuple):
    holds: str
    make: Callable[[int], Network]
    grows: bool = False  # the NTK with the width: in standard parametrisation
    largest: int = 256  # width; the others are 1/4 and 1/2 of it
    draws: int = 1000  # at the largest width; twice as many at the others


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape)) / 2


# --- Flax modules, in standard parametrisation


def linear(width: int, **options: Any) -> nn.Dense:
    return nn.Dense(width, param_dtype=jnp.float64, **options)


class Perceptron(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        bias = nn.initializers.normal(0.3)
        for _ in range(3):
            x = nn.silu(linear(self.width, bias_init=bias)(x))
        return linear(K, bias_init=bias, name="out")(x)


class Normed(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train: bool):
        for _ in range(2):
            x = nn.relu(linear(self.width)(x))
            x = nn.LayerNorm(param_dtype=jnp.float64)(x)
            x = nn.Dropout(0.3, deterministic=not train)(x)
        return linear(K, name="out")(nn.tanh(linear(self.width)(x)))


class Images(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train: bool):
        def convolved(x):
            return nn.Conv(self.width, (3, 3), param_dtype=jnp.float64)(x)

        def active(x):
            return nn.BatchNorm(not train, param_dtype=jnp.float64)(nn.relu(x))

        x = active(convolved(x))
        x = x + active(convolved(active(convolved(x))))
        return linear(K, name="out")(x.mean((1, 2)))


def linen(kind: Any, *shape: int, **call: Any) -> Callable[[int], Network]:
    def make(n: int) -> Network:
        module, x = kind(n), normal(N, *shape)
        f, params = from_linen(module, jax.random.key(0), x, **call)
        return Network(f, params, x, variances(module, x, **call))

    return make


class Block(nnx.Module):
    def __init__(self, width: int, **options: Any):
        self.norm = nnx.RMSNorm(width, **options)
        self.up = nnx.Linear(width, 2 * width, **options)
        self.down = nnx.Linear(2 * width, width, **options)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Blocks(nnx.Module):
    def __init__(self, width: int, **options: Any):
        self.first = nnx.Linear(5, width, **options)
        self.blocks = nnx.List(Block(width, **options) for _ in range(2))
        self.out = nnx.Linear(width, K, **options)

    def __call__(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def blocks(n: int) -> Network:
    def make(rngs: nnx.Rngs) -> Blocks:
        return Blocks(n, param_dtype=jnp.float64, rngs=rngs)

    return Network(*from_nnx(make(nnx.Rngs(0))), normal(N, 5), variances(make))


# --- functions of weights


def of(f: Any, x: tuple[int, ...], shapes: Callable[[int], Any]) -> Callable[[int], Network]:
    """Give what makes a network of a function and the shapes of its weights at a width."""

    def is_shape(s: Any) -> bool:
        return isinstance(s, tuple) and all(isinstance(n, int) for n in s)

    def make(n: int) -> Network:
        return Network(f, jax.tree.map(jnp.zeros, shapes(n), is_leaf=is_shape), normal(N, *x))

    return make


def scanned(w, x):
    def block(h, p):
        return h + dense(jnp.tanh(h), *p) / 2, None

    return dense(jax.lax.scan(block, dense(x, w["a"]), w["blocks"])[0], w["out"])


def rms_normed(x, scale):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale[None]


def swiglu(w, x):
    h = dense(x, w["a"])
    for gate, up, down, scale in w["blocks"]:
        z = rms_normed(h, scale)
        h = h + dense(jax.nn.silu(dense(z, gate)) * dense(z, up), down)
    return dense(rms_normed(h, w["scale"]), w["out"])


def language(n: int) -> Network:
    block = (jnp.zeros((n, 2 * n)), jnp.zeros((n, 2 * n)), jnp.zeros((2 * n, n)), jnp.ones(n))
    params = {"a": jnp.zeros((5, n)), "blocks": [block] * 2, "scale": jnp.full(n, 1.2)}

    def variance(path: str, shape: tuple[int, ...]) -> float | None:
        return 1.0 if len(shape) > 1 else None

    return Network(swiglu, params | {"out": jnp.zeros((n, K))}, normal(N, 5), variance)


@jax.custom_jvp
def spike(z):
    return jax.nn.sigmoid(2 * z)


spike.defjvps(lambda t, y, z: t / (1 + jnp.square(z)))


def straight_through(z):
    return z + jax.lax.stop_gradient(jnp.sign(z) - z)


def piecewise(z):
    return jnp.where(z > 1, 1 + 0.1 * (z - 1), jnp.where(z < -0.5, -jnp.exp(z), z / 2))


def perceptron(phi: Callable[[Any], Any]) -> Callable[[int], Network]:
    def f(w, x):
        h = phi(dense(x, w["a"], w["b"]))
        return dense(phi(dense(h, w["c"], w["d"])), w["out"])

    return of(f, (5,), lambda n: {"a": (5, n), "b": (n,), "c": (n, n), "d": (n,), "out": (n, K)})


def sentences(w, x):
    h = w["tokens"][x["tokens"]] + w["places"][None]
    h = jax.nn.gelu(dense(normed(h), w["a"], w["b"]))
    h = jnp.where(x["mask"][..., None], h, 0).sum(1) / x["mask"].sum(1, keepdims=True)
    return dense(jax.nn.relu(dense(h, w["c"])), w["out"])


def sentence(n: int) -> Network:
    shapes = {"tokens": (5, n), "places": (6, n), "a": (n, n), "b": (n,), "c": (n, n)}
    network = of(sentences, (), lambda n: {**shapes, "out": (n, K)})(n)
    tokens = np.random.default_rng(0).integers(0, 5, (N, 6))
    mask = np.arange(6)[None] < np.array([6, 4, 5, 3])[:, None]
    return network._replace(x={"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask)})


def resnext(w, x):
    x = conv(x, w["a"])
    y = jax.lax.conv_general_dilated(
        jax.nn.relu(x),
        w["b"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    ) / np.sqrt(np.prod(w["b"].shape[:-1]))
    return dense(pooled(jax.nn.relu(x + conv(jax.nn.relu(y), w["c"]))), w["out"])


def fixed_attention(w, x):
    place = jnp.arange(x.shape[1])
    attention = jax.nn.softmax(-jnp.abs(place[:, None] - place[None]) / 2.0)
    h = dense(x, w["a"])
    for i in "bc":
        h = h + jnp.einsum("st,ntd->nsd", attention, dense(jax.nn.gelu(normed(h)), w[i]))
    return dense(jnp.tanh(h[:, -1]), w["out"])


def graphs(w, x):
    edges = x["edges"] + jnp.eye(x["edges"].shape[1])[None]
    root = jax.lax.rsqrt(edges.sum(-1))
    edges = edges * root[:, None] * root[:, :, None]
    h = x["nodes"]
    for i in "ab":
        h = jax.nn.leaky_relu(dense(jnp.einsum("nst,ntd->nsd", edges, h), w[i]), 0.1)
    return dense(h.mean(1), w["out"])


def graph(n: int) -> Network:
    network = of(graphs, (5, 3), lambda n: {"a": (3, n), "b": (n, n), "out": (n, K)})(n)
    edges = np.triu(np.random.default_rng(1).random((N, 5, 5)) < 0.5, 1)
    edges = jnp.asarray((edges | edges.swapaxes(1, 2)).astype(float))
    return network._replace(x={"nodes": network.x, "edges": edges})


def highway(w, x):
    h = dense(x, w["a"])
    t = jax.nn.sigmoid(dense(h, w["t"], w["s"]))
    return dense(t * jnp.tanh(dense(h, w["b"])) + (1 - t) * h, w["out"])


def two_fields(w, x):
    u, v = dense(x, w["a"]), dense(jax.nn.silu(dense(x, w["b"])), w["c"])
    return dense(jnp.sin(u / 2 + jnp.cos(v / 2)), w["out"])


def gains(w, x):
    h = jnp.tanh(dense(x, w["a"])) * w["gain"][None]
    return dense(jax.nn.softplus(dense(h, w["b"])) * (1 + w["more"][None] / 2), w["out"])


def wavenet(w, x):
    h, skip = dense(x, w["a"]), 0.0
    for d, (both, to) in zip((1, 2), w["layers"], strict=True):
        past = jnp.pad(h, ((0, 0), (d, 0), (0, 0)))
        a, b = jnp.split(conv(past, both, padding="VALID", dilation=(d,)), 2, -1)
        y = dense(jnp.tanh(a) * jax.nn.sigmoid(b), to)
        h, skip = h + y / 2, skip + y
    return dense(jax.nn.relu(skip)[:, -1], w["out"])


OMEGA = 30.0


def sines(w, x):
    for a, b in w["layers"]:
        x = jnp.sin(OMEGA * (x @ a + b[None]))
    return x @ w["out"]


def siren(n: int) -> Network:
    """Sitzmann et al. 2020, with the variances that are there."""

    def variance(path: str, shape: tuple[int, ...]) -> float:
        if len(shape) == 1:
            return 1 / (3 * n)
        return 1 / (3 * shape[0] ** 2) if path == "layers/0/0" else 2 / shape[0] / OMEGA**2

    shapes = [((2, n), (n,)), ((n, n), (n,)), ((n, n), (n,))]
    network = of(sines, (2,), lambda n: {"layers": shapes, "out": (n, K)})(n)
    return network._replace(x=0.3 + 0.16 * network.x, variance=variance)


MODELS: dict[str, Model] = {
    "perceptron": Model("linen: SiLU, random biases", linen(Perceptron, 5), True),
    "norms": Model("linen: LayerNorm of activations, dropout", linen(Normed, 5, train=False), True),
    "images": Model(
        "linen: Conv, BatchNorm, residual", linen(Images, 3, 3, 2, train=False), True, 128, 800
    ),
    "blocks": Model("NNX: RMSNorm, GELU, residual", blocks, True, draws=500),
    "scan": Model(
        "residual tanh, weights stacked in a scan",
        of(
            scanned,
            (5,),
            lambda n: {"a": (5, n), "blocks": ((3, n, n), (3, n)), "out": (n, K)},
        ),
    ),
    "SwiGLU": Model(
        "gates, RMS norms with trained scales, residual", language, largest=128, draws=2000
    ),
    "own derivative": Model("custom_jvp, of spiking networks", perceptron(spike), draws=500),
    "straight through": Model(
        "z + stop_gradient(sign(z) - z)", perceptron(straight_through), draws=500
    ),
    "piecewise": Model("jnp.where in jnp.where, linear and exp", perceptron(piecewise)),
    "sentences": Model("embeddings, norm, mean under a mask", sentence, draws=2000),
    "ResNeXt": Model(
        "convolution in groups, residual, pool",
        of(
            resnext,
            (3, 3, 2),
            lambda n: {
                "a": (3, 3, 2, n),
                "b": (3, 3, n // 4, n),
                "c": (1, 1, n, n),
                "out": (n, K),
            },
        ),
        largest=128,
        draws=2000,
    ),
    "fixed attention": Model(
        "softmax of distances, norm of positions",
        of(
            fixed_attention,
            (5, 3),
            lambda n: {"a": (3, n), "b": (n, n), "c": (n, n), "out": (n, K)},
        ),
        draws=500,
    ),
    "graphs": Model("edges that differ by example, pool", graph, draws=2000),
    "highway": Model(
        "sigmoid gate between tanh and input",
        of(
            highway,
            (5,),
            lambda n: {"a": (5, n), "t": (n, n), "s": (n,), "b": (n, n), "out": (n, K)},
        ),
    ),
    "two fields": Model(
        "sin(u / 2 + cos(v / 2)), two branches",
        of(
            two_fields,
            (5,),
            lambda n: {"a": (5, n), "b": (5, n), "c": (n, n), "out": (n, K)},
        ),
        draws=500,
    ),
    "gains": Model(
        "random scales, one a channel",
        of(
            gains,
            (5,),
            lambda n: {"a": (5, n), "gain": (n,), "b": (n, n), "more": (n,), "out": (n, K)},
        ),
    ),
    "WaveNet": Model(
        "gated convolutions, causal, dilated, skips",
        of(
            wavenet,
            (4, 2),
            lambda n: {"a": (2, n), "layers": [((2, n, 2 * n), (n, n))] * 2, "out": (n, K)},
        ),
        largest=128,
        draws=2000,
    ),
    "SIREN": Model("sin(30 z), with its own variances", siren, True, draws=500),
}
