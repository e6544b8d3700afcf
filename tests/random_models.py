"""Random models, composed of layers of every kind, for Hypothesis to draw.

A model is a `Net`: a list of layers by name, with their options, that shrinks to one that can be
read. `build` makes the weights and the function of it.
"""

import math
from collections.abc import Callable
from itertools import cycle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax
from kernel_models import Case, normal, sine, sine_layer, vjp_sine, vjp_sine_layer

VOCABULARY = 5


class Layer(NamedTuple):
    name: str
    options: dict[str, Any]
    activation: str = "none"
    wrap: str = "none"
    before: tuple[str, ...] = ()  # what is done to each of its weights before it is used
    view: str = "own"  # of an earlier weight, where one fits; "own": it has weights of its own


class Net(NamedTuple):
    x: tuple[int, ...]  # the shape of an example
    layers: list[Layer]
    by_x: str = "none"
    dtype: str = "float64"


def permuted(w: Any) -> Any:
    """Take even rows before odd ones, by a reshape and a transpose where that does it."""
    n = w.shape[0]
    if n % 2:
        return w[np.argsort(np.arange(n) % 2, kind="stable")]
    return w.reshape(n // 2, 2, *w.shape[1:]).swapaxes(0, 1).reshape(w.shape)


VIEWS = {
    "same": lambda w: w,
    "flipped": lambda w: w[::-1],
    "flipped last": lambda w: w[..., ::-1],
    "rolled": lambda w: jnp.roll(w, 1, 0),
    "permuted": permuted,
    "T": lambda w: w.T,
}
"""Weights laid out in another way, of the same shape but for the transpose."""


class Weights:
    """Makes weights, and names them; a weight that is tied has the name of an earlier one."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.view = "own"

    def _earlier(self, shape: tuple[int, ...], view: str) -> str | None:
        for name, array in self.arrays.items():
            if array.shape == shape and shape:
                return f"{name}.{view}"
            if array.shape == shape[::-1] and shape:
                return f"{name}.T.{view}"
            if array.shape[1:] == shape[1:] and array.shape[:1] > shape[:1] > (1,):
                return f"{name}.{shape[0]}.{view}"  # a slice of it
        return None

    def __call__(self, *shape: int, tie: bool = False) -> str:
        view = "same" if tie and self.view == "own" else self.view
        earlier = None if view == "own" else self._earlier(shape, view)
        if earlier:
            return earlier
        name = f"{len(self.arrays):02}"
        fan_in = math.prod(shape[:-1])
        self.arrays[name] = normal(len(self.arrays), *shape) / fan_in**0.5
        return name

    def stacked(self, *shape: int, tie: bool = False) -> str:
        return self(3, *shape, tie=tie)


def look_up(params: dict[str, Any], names: Any) -> Any:
    """Give the weights that names stand for."""

    def one(name: str) -> Any:
        base, *views = name.split(".")
        w = params[base]
        for view in views:
            w = w[: int(view)] if view.isdigit() else VIEWS[view](w)
        return w

    return jax.tree.map(one, names)


BEFORE = {
    "as it is": lambda w: w,
    "0.1 w": lambda w: 0.1 * w,
    "w / 3": lambda w: w / 3,
    "w / sqrt(n)": lambda w: w / math.sqrt(np.shape(w)[0] if np.ndim(w) else 2),
    "-w": lambda w: -w,
    "-0.4 (3 w)": lambda w: -0.4 * (3 * w),
    "w + 0.1": lambda w: w + 0.1,
    "1 + w": lambda w: 1 + w,
    "0.3 - w": lambda w: 0.3 - w,
    "2 (w - 0.2)": lambda w: 2 * (w - 0.2),
    "by channel": lambda w: w * of_channels(w),
    "plus channels": lambda w: of_channels(w) + w,
    "softplus": lambda w: jax.nn.softplus(w) + 1e-3,
}
"""What is done to a weight before it is used."""


def of_channels(w: Any) -> np.ndarray:
    """Give a constant for each entry of the last axis."""
    n = np.shape(w)[-1] if np.ndim(w) else 1
    c = np.asarray(0.5 + np.arange(n), w.dtype)
    return c.reshape((1,) * (np.ndim(w) - 1) + (n,)) if np.ndim(w) else c[0]


# --- layers: `make(new, shape, **options) -> names of weights, apply(weights, h)`

Made = tuple[Any, Callable[[Any, Any], Any]]
LAYERS: dict[str, dict[str, tuple[Callable[..., Made], dict[str, st.SearchStrategy]]]] = {}

FEATURES = st.sampled_from([None, 2, 3])  # None: as many as come in
FLAG = st.booleans()


def layer(*kinds: str, **options: st.SearchStrategy) -> Callable:
    """Add a layer for inputs of some kinds, with what its options are drawn from."""

    def add(make: Callable[..., Made]) -> Callable[..., Made]:
        for kind in kinds:
            LAYERS.setdefault(kind, {})[make.__name__] = (make, options)
        return make

    return add


EVERY = ("vector", "sequence", "image")


BIAS = st.sampled_from(["none", "row", "scalar"])


@layer(*EVERY, features=FEATURES, factor=st.sampled_from([1.0, -0.5]), bias=BIAS, tie=FLAG)
def dense(new, shape, features, factor, bias, tie):
    k = features or shape[-1]
    names = {"w": new(shape[-1], k, tie=tie)}
    if bias != "none":
        names["b"] = new(k) if bias == "row" else new()

    def apply(w, h):
        h = h @ (w["w"] if factor == 1 else factor * w["w"])
        return h if bias == "none" else h + w["b"]

    return names, apply


@layer("vector", "sequence", heads=st.integers(1, 2), first=FLAG)
def to_heads_and_back(new, shape, heads, first):
    d = shape[-1]
    if not first:
        names = new(d, heads, 3), new(heads, 3, d)
        return names, lambda w, h: jnp.einsum(
            "...he,hed->...d", jnp.sin(jnp.einsum("...d,dhe->...he", h, w[0])), w[1]
        )
    names = new(heads, 3, d), new(d, heads, 3)  # the weight is the first operand
    return names, lambda w, h: jnp.einsum(
        "dhe,...he->...d", w[1], jnp.sin(jnp.einsum("hed,...d->...he", w[0], h))
    )


@layer("vector", "sequence")
def within_heads(new, shape):  # the head is a batch axis of the product
    d = shape[-1]
    return new(d, 2, 3), lambda w, h: jnp.einsum("...d,dhe->...dh", h, w).sum(-1) + h


@layer(*EVERY, rank=st.integers(1, 2))
def low_rank(new, shape, rank):
    d = shape[-1]
    return (new(d, rank), new(rank, d)), lambda w, h: h @ (w[0] @ w[1])


@layer(*EVERY, features=FEATURES)
def weight_norm(new, shape, features):
    k = features or shape[-1]
    names = new(shape[-1], k), new(1, k)
    return names, lambda w, h: h @ (w[0] / jnp.linalg.norm(w[0], axis=0) * w[1])


@layer(*EVERY, transposed=FLAG)
def twice(new, shape, transposed):
    d = shape[-1]
    return new(d, d), lambda w, h: jnp.sin(h @ w) @ (w.T if transposed else w)


@layer(*EVERY, axes=st.tuples(FLAG, FLAG, FLAG), drop=FLAG, add=FLAG)
def broadcast(new, shape, axes, drop, add):
    """Multiply by, or add, a weight that has some axes of h and is 1 long along the others."""
    sizes = [n if own else 1 for n, own in zip(shape[1:], axes[-len(shape) + 1 :], strict=True)]
    while drop and sizes and sizes[0] == 1:
        sizes.pop(0)
    return new(*sizes), lambda w, h: h + w if add else h * w


NORMS = {  # the axes to take the moments over, and whether the mean is taken off
    "layer": (lambda n: (n - 1,), True),
    "RMS": (lambda n: (n - 1,), False),
    "instance": (lambda n: tuple(range(1, max(2, n - 1))), True),
    "one group": (lambda n: tuple(range(1, n)), True),
}


@layer(*EVERY, kind=st.sampled_from(list(NORMS)), scale=FLAG, shift=FLAG)
def norm(new, shape, kind, scale, shift):
    names = {"scale": new(shape[-1])} if scale else {}
    names |= {"shift": new(shape[-1])} if shift else {}

    axes, centered = NORMS[kind][0](len(shape)), NORMS[kind][1]

    def apply(w, h):
        h = h - h.mean(axes, keepdims=True) if centered else h
        h = h * lax.rsqrt((h**2).mean(axes, keepdims=True) + 0.1)
        h = h * w["scale"] if scale else h
        return h + w["shift"] if shift else h

    return names, apply


@layer(*EVERY)
def batch_norm(new, shape):  # in evaluation: its statistics are constants
    mean, var = normal(0, shape[-1]), 0.5 + normal(1, shape[-1]) ** 2
    return (new(shape[-1]), new(shape[-1])), lambda w, h: (h - mean) / np.sqrt(var) * w[0] + w[1]


@layer(*EVERY, features=FEATURES)
def gathered(new, shape, features):  # rows of a larger weight, one of them twice
    d = shape[-1]
    rows = np.arange(d) % max(1, d - 1)
    return new(d + 1, features or d), lambda w, h: h @ w[rows]


@layer("vector", "sequence", features=FEATURES, rule=st.sampled_from(["jvp", "vjp"]))
def custom_rule(new, shape, features, rule):
    of = vjp_sine_layer if rule == "vjp" else sine_layer
    flat = lambda h: h.reshape(-1, h.shape[-1])  # noqa: E731 (a function of one line)
    names = new(shape[-1], features or shape[-1])
    return names, lambda w, h: of(flat(h), w).reshape(*h.shape[:-1], -1)


@layer("sequence", features=FEATURES)
def mix_positions(new, shape, features):
    k = features or shape[1]
    return new(shape[1], k), lambda w, h: jnp.einsum("nsd,st->ntd", h, w)


@layer("sequence")
def positions(new, shape):  # a slice of a larger table
    return new(shape[1] + 1, shape[2]), lambda w, h: h + w[: shape[1]]


@layer("sequence", heads=st.integers(1, 2), mask=FLAG, packed=FLAG)
def attention(new, shape, heads, mask, packed):
    s, d = shape[1:]
    causal = np.tri(s, dtype=bool) if mask else np.ones((s, s), bool)
    names = {"qkv": new(d, 3, heads, 2) if packed else [new(d, heads, 2) for _ in range(3)]}
    names["out"] = new(heads, 2, d)

    def apply(w, h):
        if packed:
            q, k, v = jnp.moveaxis(jnp.einsum("nsd,dche->nsche", h, w["qkv"]), 2, 0)
        else:
            q, k, v = (jnp.einsum("nsd,dhe->nshe", h, one) for one in w["qkv"])
        scores = jnp.where(causal, jnp.einsum("nqhe,nkhe->nhqk", q, k), -1e9)
        found = jnp.einsum("nhqk,nkhe->nqhe", jax.nn.softmax(scores), v)
        return jnp.einsum("nqhe,hed->nqd", found, w["out"])

    return names, apply


@layer("sequence", features=FEATURES, reverse=FLAG, bias=FLAG)
def recurrence(new, shape, features, reverse, bias):
    k = features or shape[2]
    names = [new(shape[2], k), new(k, k), *([new(k)] if bias else [])]

    def apply(w, h):
        def step(state, x):
            z = x @ w[0] + state @ w[1]
            state = jnp.tanh(z + w[2] if bias else z)
            return state, state

        start = jnp.zeros((h.shape[0], k), h.dtype)
        _, found = lax.scan(step, start, jnp.moveaxis(h, 1, 0), reverse=reverse)
        return jnp.moveaxis(found, 0, 1)

    return names, apply


@layer("sequence", "image", largest=FLAG)
def pool(new, shape, largest):
    window = tuple(2 if n > 1 else 1 for n in shape[1:-1])
    start, reducer = (-jnp.inf, lax.max) if largest else (0.0, lax.add)
    return None, lambda w, h: lax.reduce_window(
        h, start, reducer, (1, *window, 1), (1,) * h.ndim, "VALID"
    )


def _numbers(n):
    letters = "HW"[:n]
    return ("N" + letters + "C", letters + "IO", "N" + letters + "C")


PAIR = st.tuples(st.integers(1, 2), st.integers(1, 2))
WINDOW = st.tuples(st.integers(1, 3), st.integers(1, 3))


@layer(
    "sequence",
    "image",
    features=FEATURES,
    window=WINDOW,
    stride=PAIR,
    dilation=PAIR,
    input_dilation=PAIR,
    padding=st.sampled_from(["SAME", "VALID", "causal", "circular", "uneven"]),
    groups=st.sampled_from(["one", "two", "depthwise"]),
    bias=FLAG,
)
def convolution(
    new, shape, features, window, stride, dilation, input_dilation, padding, groups, bias
):
    n, c = len(shape) - 2, shape[-1]
    window, stride, dilation, spread = (v[:n] for v in (window, stride, dilation, input_dilation))
    reach = [(w - 1) * step for w, step in zip(window, dilation, strict=True)]
    if any(r >= size for r, size in zip(reach, shape[1:-1], strict=True)):
        padding = "SAME" if padding == "VALID" else padding
    groups = {"one": 1, "two": 1 if c % 2 else 2, "depthwise": c}[groups]
    k = features or c
    k = -(-k // groups) * groups
    names = {"w": new(*window, c // groups, k)} | ({"b": new(k)} if bias else {})
    pads = {
        "causal": [(r, 0) for r in reach],
        "circular": [(0, 0)] * n,
        "uneven": [(r + 1, r - 1) for r in reach],
    }.get(padding, padding)

    def apply(w, h):
        if padding == "circular":
            h = jnp.pad(h, ((0, 0), *((r, 0) for r in reach), (0, 0)), mode="wrap")
        y = lax.conv_general_dilated(
            h,
            w["w"],
            stride,
            pads,
            spread if padding in ("causal", "uneven") else None,
            dilation,
            _numbers(n),
            feature_group_count=groups,
        )
        return y + w["b"] if bias else y

    return names, apply


@layer(
    "sequence",
    "image",
    features=FEATURES,
    window=WINDOW,
    stride=PAIR,
    padding=st.sampled_from(["SAME", "VALID"]),
    flipped=FLAG,
)
def transposed_convolution(new, shape, features, window, stride, padding, flipped):
    n, c, k = len(shape) - 2, shape[-1], features or shape[-1]
    names = new(*window[:n], *((k, c) if flipped else (c, k)))
    return names, lambda w, h: lax.conv_transpose(
        h, w, stride[:n], padding, dimension_numbers=_numbers(n), transpose_kernel=flipped
    )


LOOKUPS = {
    "index": lambda w, t: w[t],
    "take": lambda w, t: jnp.take(w, t, axis=0),
    "one_hot": lambda w, t: jax.nn.one_hot(t, VOCABULARY, dtype=w.dtype) @ w,
}


@layer(
    "tokens",
    features=st.integers(2, 3),
    how=st.sampled_from(list(LOOKUPS)),
    again=st.sampled_from([None, "same", "flipped", "rolled", "permuted"]),
    bias=FLAG,
)
def embedding(new, shape, features, how, again, bias):
    """Look a table up, or look it up twice in two orders of its rows."""
    names = {"w": new(VOCABULARY, features)} | ({"b": new(features)} if bias else {})

    def apply(w, t):
        h = LOOKUPS[how](w["w"], t)
        if again:
            h = jnp.tanh(h + LOOKUPS[how](VIEWS[again](w["w"]), (2 * t + 1) % VOCABULARY))
        return h + w["b"] if bias else h

    return names, apply


# --- the last layer


def _mean(h):
    return h.mean(tuple(range(1, h.ndim - 1))) if h.ndim > 2 else h


def _few(h):  # the Jacobian has a row for each output
    return h if h[0].size <= 16 else _mean(h)


@layer("last", outputs=st.integers(1, 3))
def dense_of_the_mean(new, shape, outputs):
    return new(shape[-1], outputs), lambda w, h: _mean(h) @ w


@layer("last", outputs=st.integers(1, 3))
def dense_of_all(new, shape, outputs):
    size = math.prod(shape[1:])
    return new(size, outputs), lambda w, h: h.reshape(-1, size) @ w


@layer("last", outputs=st.integers(1, 2))
def dense_of_each_position(new, shape, outputs):
    return new(shape[-1], outputs), lambda w, h: _few(h) @ w


@layer("last")
def decoder(new, shape):  # of an embedding, or of another weight, if there is one that fits
    return new(shape[-1], VOCABULARY, tie=True), lambda w, h: _mean(h) @ w


@layer("last")
def no_output_axis(new, shape):
    return new(*shape[1:]), lambda w, h: jnp.tanh(h * w).sum(tuple(range(1, h.ndim)))


@layer("last")
def all_features(new, shape):
    return None, lambda w, h: _few(h)


# --- what is around a layer

ACTIVATIONS = {
    "none": lambda h: h,
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "softplus": jax.nn.softplus,
    "square": lambda h: h**2,
    "hard_swish": jax.nn.hard_swish,
    "sparse_plus": jax.nn.sparse_plus,
    "1 - h / 2": lambda h: 1 - h / 2,
    "3 / (2 + h^2)": lambda h: 3 / (2 + h**2),
    "custom_jvp": sine,
    "custom_vjp": vjp_sine,
}


def _by_weight(apply):
    def either(w, h):
        small = sum(jnp.sum(a) for a in jax.tree.leaves(w)) < 99
        return lax.cond(small, apply, lambda w, h: apply(w, jnp.sin(h)), w, h)

    return either


def _by_example(apply):
    def of_one(w, h):
        either = apply, lambda w, h: apply(w, jnp.sin(h))
        return lax.cond(jnp.sum(h) > 0, *either, w, h[None])[0]

    return jax.vmap(of_one, (None, 0))


WRAPS = {
    "none": lambda apply: apply,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "vmap": lambda apply: lambda w, h: jax.vmap(lambda h: apply(w, h[None])[0])(h),
    "cond on a weight": _by_weight,
    "cond on x": _by_example,
}


def _scaled(c, w):
    return jax.tree.map(lambda leaf: c * leaf, w)


WRAPS_OF_LINEAR_LAYERS = {
    "tiny weights": lambda apply: lambda w, h: 1e20 * apply(_scaled(1e-20, w), h),
    "huge weights": lambda apply: lambda w, h: 1e-20 * apply(_scaled(1e20, w), h),
    "tiny inputs": lambda apply: lambda w, h: 1e20 * apply(w, 1e-20 * h),
    "huge inputs": lambda apply: lambda w, h: 1e-20 * apply(w, 1e20 * h),
}
LINEAR = {"dense", "convolution", "gathered", "transposed_convolution"}
"""Layers that are linear in their weights, and in their inputs if they have no bias."""

WRAPS_OF_THE_SAME_SHAPE = {
    "residual": lambda apply: lambda w, h: h + apply(w, h),
    "scan": lambda apply: lambda w, h: lax.scan(lambda h, w: (apply(w, h), None), h, w)[0],
    "scan of remat": lambda apply: (
        lambda w, h: lax.scan(jax.checkpoint(lambda h, w: (apply(w, h), None)), h, w)[0]
    ),
    "the same twice": lambda apply: lambda w, h: lax.fori_loop(0, 2, lambda _, h: apply(w, h), h),
}


def _made(new: Any, kind: str, spec: Layer, h: Any) -> Made:
    names, linear = LAYERS[kind][spec.name][0](new, h.shape, **spec.options)
    scaled = spec.wrap in WRAPS_OF_LINEAR_LAYERS and spec.name in LINEAR
    if scaled and (spec.options.get("bias") in (None, False, "none") or "weights" in spec.wrap):
        linear = WRAPS_OF_LINEAR_LAYERS[spec.wrap](linear)
    activation = ACTIVATIONS[spec.activation]

    def apply(w, h):
        leaves, structure = jax.tree.flatten(w)
        ready = [BEFORE[name](leaf) for name, leaf in zip(cycle(spec.before), leaves, strict=False)]
        return activation(linear(structure.unflatten(ready or leaves), h))

    return names, apply


def _wrapped(new: Weights, kind: str, spec: Layer, h: Any) -> Made:
    """Make a layer and what is around it, where that fits."""
    new.view = spec.view
    if spec.wrap not in WRAPS_OF_THE_SAME_SHAPE:
        names, apply = _made(new, kind, spec, h)
        return names, WRAPS.get(spec.wrap, WRAPS["none"])(apply)
    trial = Weights()
    names, apply = _made(trial, kind, spec, h)
    same = jax.eval_shape(apply, look_up(trial.arrays, names), h).shape == h.shape
    stacked = same and jax.tree.leaves(names) and spec.wrap.startswith("scan")
    names, apply = _made(new.stacked if stacked else new, kind, spec, h)
    fits = same and (stacked or not spec.wrap.startswith("scan"))
    return names, WRAPS_OF_THE_SAME_SHAPE[spec.wrap](apply) if fits else apply


# --- models

BY_X = {
    "none": lambda f: f,
    "grad": lambda f: lambda p, x: jax.vmap(jax.grad(lambda x: f(p, x[None]).sum()))(x),
    "jvp": lambda f: lambda p, x: jax.jvp(lambda x: f(p, x), (x,), (jnp.cos(x),))[1],
    "a value and its jvp": lambda f: (
        lambda p, x: jnp.stack(jax.jvp(lambda x: f(p, x), (x,), (jnp.cos(x),)), -1)
    ),
}


def kind_of(ndim: int) -> str:
    return {2: "vector", 3: "sequence", 4: "image"}[ndim]


def build(net: Net, n1: int, n2: int | None) -> Case:
    """Make the weights and the function of a model, and n1 examples and n2.

    In half precision every other weight stays in float32.
    """
    tokens, half = net.layers[0].name == "embedding", net.dtype in ("bfloat16", "float16")

    def examples(seed: int, n: int) -> np.ndarray:
        if tokens:
            return np.random.default_rng(seed).integers(0, VOCABULARY, (n, *net.x))
        return normal(seed, n, *net.x).astype(net.dtype)

    x1, x2 = examples(100, n1), None if n2 is None else examples(101, n2)
    new = Weights()
    steps = []
    h = jax.ShapeDtypeStruct(x1.shape, x1.dtype if tokens else "float64")
    for i, spec in enumerate(net.layers):
        kind = "tokens" if tokens and i == 0 else kind_of(len(h.shape))
        last = i == len(net.layers) - 1
        names, apply = _wrapped(new, "last" if last else kind, spec, h)
        steps.append((names, apply))
        h = jax.eval_shape(apply, look_up(new.arrays, names), h)

    def f(params, x):
        for names, apply in steps:
            x = apply(look_up(params, names), x)
        return x

    params = {
        name: array.astype("float32" if half and i % 2 else net.dtype)
        for i, (name, array) in enumerate(new.arrays.items())
    }
    return Case(BY_X[net.by_x](f), params, x1, x2)


# --- what Hypothesis draws


FREQUENT = {"dense", "convolution", "twice"}
"""Layers that are drawn as often as all others together."""
BEFORES = st.lists(st.sampled_from(list(BEFORE)), max_size=3).map(tuple)
TIES = st.sampled_from(["own", "own", "own", *(view for view in VIEWS if view != "T")])


def _layers(kind: str, activations: list[str], wraps: list[str]) -> st.SearchStrategy[Layer]:
    def of(name: str) -> st.SearchStrategy[Layer]:
        scaled = list(WRAPS_OF_LINEAR_LAYERS) if wraps != ["none"] and name in LINEAR else []
        return st.builds(
            Layer,
            st.just(name),
            st.fixed_dictionaries(LAYERS[kind][name][1]),
            st.sampled_from(activations),
            st.sampled_from([*wraps, *scaled]),
            BEFORES,
            TIES,
        )

    names = list(LAYERS[kind])
    often = [name for name in names if name in FREQUENT]
    every = st.sampled_from(names)
    return (st.one_of(every, st.sampled_from(often)) if often else every).flatmap(of)


SCALED = ["0.1 w", "w / 3", "w / sqrt(n)", "-w", "-0.4 (3 w)"]


def _layer_of(names: list[str], kind: str, wraps: list[str], before: Any, **options: Any) -> Any:
    """Draw one of some layers with some of its options given."""

    def of(name: str) -> st.SearchStrategy[Layer]:
        every = LAYERS[kind][name][1] | options
        if "bias" in options and name == "dense":  # it has two kinds of biases
            every |= {"bias": options["bias"].map(lambda bias: "row" if bias else "none")}
        return st.builds(
            Layer,
            st.just(name),
            st.fixed_dictionaries(every),
            st.sampled_from(["none"] if kind == "tokens" else ["tanh", "gelu", "elu"]),
            st.sampled_from(wraps),
            before,
            st.just("own"),
        )

    return st.sampled_from(names).flatmap(of)


CORNERS = {
    "a bias and its product, of two factors": lambda kind: _layer_of(
        [n for n in ("dense", "convolution", "embedding") if n in LAYERS[kind]],
        kind,
        ["none"] if kind == "tokens" else ["none", "jit", "remat"],
        st.tuples(st.sampled_from(SCALED), st.sampled_from(["as it is", *SCALED])),
        bias=st.just(True),
    ),
    "two orders of one table": lambda _: _layer_of(
        ["embedding"],
        "tokens",
        ["none"],
        st.just(()),
        how=st.sampled_from(["index", "take"]),
        again=st.sampled_from(["flipped", "permuted"]),
    ),
    "tiny and huge inputs": lambda kind: _layer_of(
        [n for n in ("dense", "convolution") if n in LAYERS[kind]],
        kind,
        ["tiny inputs", "huge inputs"],
        st.just(()),
        bias=st.just(False),
    ),
}
"""First layers that few draws would meet, and that were wrong once: `(kind) -> layers`."""

SHAPES = {
    "vector": st.tuples(st.integers(2, 4)),
    "sequence": st.tuples(st.integers(2, 4), st.integers(2, 3)),
    "image": st.tuples(st.integers(3, 4), st.integers(3, 4), st.integers(1, 2)),
    "tokens": st.tuples(st.integers(2, 4)),
}


@st.composite
def nets(draw: Any) -> Net:
    """Draw a model of one to three layers and a last one, most with a corner first."""
    corner = draw(st.sampled_from(["two orders of one table", None, *CORNERS]))
    kinds = {"two orders of one table": ["tokens"], "tiny and huge inputs": ["vector", "image"]}
    kind = draw(st.sampled_from(kinds.get(corner, list(SHAPES))))
    if corner:
        first = [draw(CORNERS[corner](kind))]
    else:
        first = [draw(_layers(kind, ["none"], ["none"]))] if kind == "tokens" else []
    hidden = _layers(
        "sequence" if kind == "tokens" else kind,
        list(ACTIVATIONS),
        [*WRAPS, *WRAPS_OF_THE_SAME_SHAPE],
    )
    layers = [
        *first,
        *draw(st.lists(hidden, min_size=0 if corner else 1, max_size=1 if corner else 3)),
        draw(_layers("last", ["none"], ["none"])),
    ]
    backward_only = any(
        layer.activation == "custom_vjp" or layer.options.get("rule") == "vjp" for layer in layers
    )
    by_x = "none"
    if kind != "tokens":
        by_x = draw(st.sampled_from(["none", "none", "grad"] if backward_only else list(BY_X)))
    floats = ["float64"] * 3 + ["float32"] * 2 + ["bfloat16", "float16"]
    floats = {"tiny and huge inputs": ["float32"], "two orders of one table": floats[:5]}.get(
        corner, floats
    )
    dtype = draw(st.sampled_from(floats))
    return Net(draw(SHAPES[kind]), layers, by_x, dtype)
