"""The models, weights and inputs that every contender gets. Needs jax and numpy alone, of any age.

A model is `f(params, x) -> y (N, K)` with params a flat dict; weights and inputs are made once, by
the parent, and handed on in one file.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]
HEADS = 4


class Data(NamedTuple):
    params: Arrays
    x1: np.ndarray
    x2: np.ndarray


class Case(NamedTuple):
    """One row of the table: a model, and how to draw its weights and two batches."""

    title: str
    f: Callable[[Any, Any], Any]
    draw: Callable[[np.random.Generator, bool], Data]  # (rng, quick: tiny sizes)
    reductions: tuple[str, ...] = ("none", "trace")  # of one output both are the same: "none"
    symmetric: tuple[bool, ...] = (False, True)  # x2 given, x2=None
    block: tuple[int, int] | None = None  # examples a block, and when quick
    timed: tuple[int, int] = (256, 4)  # examples that nt.batch is timed on, and when quick


# --- models ---------------------------------------------------------------------------------------


def _dense(params, name, x):
    return x @ params[name + "/w"] + params[name + "/b"][None]


def mlp(params, x, activation=jax.nn.relu):
    depth = sum(name.endswith("/w") for name in params)
    for i in range(depth - 1):
        x = activation(_dense(params, f"{i}", x))
    return _dense(params, f"{depth - 1}", x)


def _conv(w, x, stride=1):
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def cnn(params, x):
    for i in range(3):
        x = jax.nn.relu(_conv(params[f"{i}/w"], x) + params[f"{i}/b"][None, None, None])
    return _dense(params, "head", x.mean((1, 2)))


def _group_norm(params, name, x, groups=8):
    n, h, w, c = x.shape
    z = x.reshape(n, h, w, groups, c // groups)
    z = z - z.mean((1, 2, 4), keepdims=True)
    z = z / jnp.sqrt((z**2).mean((1, 2, 4), keepdims=True) + 1e-5)
    scale, bias = params[name + "/scale"], params[name + "/b"]
    return z.reshape(x.shape) * scale[None, None, None] + bias[None, None, None]


def wide_resnet(params, x):
    x = _conv(params["stem/w"], x)
    for stage in range(3):
        for block in range(2):
            name, stride = f"{stage}{block}", 2 if stage > 0 and block == 0 else 1
            z = jax.nn.relu(_group_norm(params, name + "norm1", x))
            project = name + "project/w"
            shortcut = _conv(params[project], z, stride) if project in params else x
            z = _conv(params[name + "conv1/w"], z, stride)
            z = jax.nn.relu(_group_norm(params, name + "norm2", z))
            x = shortcut + _conv(params[name + "conv2/w"], z)
    x = jax.nn.relu(_group_norm(params, "norm", x))
    return _dense(params, "head", x.mean((1, 2)))


def _layer_norm(params, name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * params[name + "/scale"][None, None] + params[name + "/b"][None, None]


def _linear(params, name, x):
    return x @ params[name + "/w"] + params[name + "/b"][None, None]


def _attention(params, x):
    n, s, d = x.shape
    q, k, v = jnp.split(_linear(params, "qkv", x), 3, axis=-1)
    q, k, v = (z.reshape(n, s, HEADS, d // HEADS) for z in (q, k, v))
    weights = jax.nn.softmax(jnp.einsum("nshd,nthd->nhst", q, k) / (d // HEADS) ** 0.5, axis=-1)
    return _linear(params, "out", jnp.einsum("nhst,nthd->nshd", weights, v).reshape(n, s, d))


def _layer(params, x):
    x = x + _attention(params, _layer_norm(params, "norm1", x))
    z = jax.nn.gelu(_linear(params, "up", _layer_norm(params, "norm2", x)))
    return x + _linear(params, "down", z)


def _part(params, prefix):
    return {name[len(prefix) :]: w for name, w in params.items() if name.startswith(prefix)}


def _ends(params, tokens, layers):
    x = layers(params["embed"][tokens] + params["positions"][None])
    return _dense(params, "head", _layer_norm(params, "norm", x).mean(1))


def transformer(params, tokens):
    def layers(x):
        for i in range(2):
            x = _layer(_part(params, f"layer{i}."), x)
        return x

    return _ends(params, tokens, layers)


def scanned_transformer(params, tokens):
    def layers(x):
        return jax.lax.scan(lambda h, p: (_layer(p, h), None), x, _part(params, "layers."))[0]

    return _ends(params, tokens, layers)


def residual(params, x):
    """u_t - u_xx of a tanh MLP u, at points x = (t, x)."""

    def u(z):
        return mlp(params, z, jnp.tanh)

    def along(g, axis):
        direction = jnp.zeros_like(x).at[:, axis].set(1)
        return lambda z: jax.jvp(g, (z,), (direction,))[1]

    return along(u, 0)(x) - along(along(u, 1), 1)(x)


# --- weights and inputs ---------------------------------------------------------------------------


def _weights(rng, name, *shape, layers=()):
    fan_in = np.prod(shape[:-1])
    return {
        name + "/w": rng.normal(size=(*layers, *shape)) * (2 / fan_in) ** 0.5,
        name + "/b": rng.normal(size=(*layers, shape[-1])) * 0.1,
    }


def _norm(rng, name, width, layers=()):
    return {
        name + "/scale": 1 + 0.1 * rng.normal(size=(*layers, width)),
        name + "/b": 0.1 * rng.normal(size=(*layers, width)),
    }


def _single(params):
    return {name: w.astype(np.float32) for name, w in params.items()}


def _normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def _mlp(sizes, n, quick_sizes=(8, 16, 12, 3), quick_n=6):
    def draw(rng, quick):
        widths, count = (quick_sizes, quick_n) if quick else (sizes, n)
        params = {}
        for i, shape in enumerate(pairwise(widths)):
            params |= _weights(rng, f"{i}", *shape)
        return Data(_single(params), *(_normal(rng, count, widths[0]) for _ in range(2)))

    return draw


def _cnn(n, quick_n=4):
    def draw(rng, quick):
        width, side, outputs, count = (4, 8, 3, quick_n) if quick else (64, 32, 10, n)
        params = {}
        for i, channels in enumerate((3, width, width)):
            params |= _weights(rng, f"{i}", 3, 3, channels, width)
        params |= _weights(rng, "head", width, outputs)
        return Data(_single(params), *(_normal(rng, count, side, side, 3) for _ in range(2)))

    return draw


def _wide_resnet(rng, quick):
    side, outputs, count = (8, 3, 3) if quick else (32, 10, 32)
    params, c_in = _weights(rng, "stem", 3, 3, 3, 16), 16
    for stage, width in enumerate((16, 32, 64)):
        for block in range(2):
            name = f"{stage}{block}"
            params |= _norm(rng, name + "norm1", c_in) | _norm(rng, name + "norm2", width)
            params |= _weights(rng, name + "conv1", 3, 3, c_in, width)
            params |= _weights(rng, name + "conv2", 3, 3, width, width)
            if c_in != width:
                params |= _weights(rng, name + "project", 1, 1, c_in, width)
            c_in = width
    convolutions = [name for name, w in params.items() if w.ndim == 4]
    for name in convolutions:  # convolutions before a norm have no bias
        del params[name[:-1] + "b"]
    params |= _norm(rng, "norm", 64) | _weights(rng, "head", 64, outputs)
    return Data(_single(params), *(_normal(rng, count, side, side, 3) for _ in range(2)))


def _transformer(outputs, n, depth=None):
    def draw(rng, quick):
        d, tokens, words, k, count = 128, 64, 1000, outputs, n
        if quick:
            d, tokens, words, k, count = 8, 5, 11, min(outputs, 3), 3
        params = {"embed": rng.normal(size=(words, d)), "positions": rng.normal(size=(tokens, d))}
        stack = (depth,) if depth else ()
        for prefix in ["layers."] if depth else ["layer0.", "layer1."]:
            for name, shape in (("qkv", (d, 3 * d)), ("out", (d, d)), ("up", (d, 4 * d))):
                params |= _weights(rng, prefix + name, *shape, layers=stack)
            params |= _weights(rng, prefix + "down", 4 * d, d, layers=stack)
            params |= _norm(rng, prefix + "norm1", d, stack)
            params |= _norm(rng, prefix + "norm2", d, stack)
        params |= _norm(rng, "norm", d) | _weights(rng, "head", d, k)
        batches = (rng.integers(0, words, (count, tokens)).astype(np.int32) for _ in range(2))
        return Data(_single(params), *batches)

    return draw


CASES = {
    "a": Case("MLP 784-512-512-10, N = 256", mlp, _mlp((784, 512, 512, 10), 256)),
    "b": Case("MLP 3072-4096-4096-10, N = 64", mlp, _mlp((3072, 4096, 4096, 10), 64)),
    "c": Case("CNN, 3 x 64 channels on 32 x 32, K = 10, N = 64", cnn, _cnn(64)),
    "d": Case("WideResNet-16-1 on 32 x 32, K = 10, N = 32", wide_resnet, _wide_resnet),
    "e": Case("2-layer transformer, 64 tokens, K = 10, N = 32", transformer, _transformer(10, 32)),
    "e1": Case(
        "2-layer transformer, 64 tokens, K = 1, N = 32",
        transformer,
        _transformer(1, 32),
        reductions=("none",),
    ),
    "f": Case(
        "u_t - u_xx of a tanh MLP 2-64-64-64-64-1, N = 1024",
        residual,
        _mlp((2, 64, 64, 64, 64, 1), 1024, (2, 8, 8, 1), 7),
        reductions=("none",),
    ),
    "g": Case(
        "12-layer transformer under scan, 64 tokens, K = 10, N = 8",
        scanned_transformer,
        _transformer(10, 8, depth=12),
    ),
    "a_blocks": Case(
        "MLP 784-512-512-10, N = 4096 in blocks of 128",
        mlp,
        _mlp((784, 512, 512, 10), 4096, quick_n=8),
        reductions=("trace",),
        symmetric=(True,),
        block=(128, 2),
    ),
    "c_blocks": Case(
        "CNN, 3 x 64 channels on 32 x 32, K = 10, N = 1024 in blocks of 64",
        cnn,
        _cnn(1024, quick_n=8),
        reductions=("trace",),
        symmetric=(True,),
        block=(64, 2),
    ),
}


def write(name: str, path: Path, *, quick: bool) -> None:
    """Draw weights and inputs of a case and put them into one file."""
    data = CASES[name].draw(np.random.default_rng(0), quick)
    arrays: dict[str, Any] = {"params:" + key: value for key, value in data.params.items()}
    np.savez(path, x1=data.x1, x2=data.x2, **arrays)


def read(path: str) -> Data:
    """Give weights and inputs from that file."""
    with np.load(path) as file:
        params = {n.split(":", 1)[1]: file[n] for n in file.files if n.startswith("params:")}
        return Data(params, file["x1"], file["x2"])
