"""The wave functions, samples and local energies that every side gets. Needs jax and numpy alone.

A wave function is `f(params, x) -> log psi (N,)`, real or complex, with params a flat dict and x
configurations of 64 spins, +1 or -1. Weights, spins and local energies are drawn once, by the
parent, and handed on in one file. Local energies are noise: what a step costs depends on none.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]
SIDE, PATCH, HEADS, LAYERS = 8, 2, 4, 2
SPINS = SIDE**2


class Data(NamedTuple):
    params: Arrays
    x: np.ndarray  # (N, 64)
    energies: np.ndarray  # (N,)


class Case(NamedTuple):
    """One row of the table."""

    title: str
    f: Callable[[Any, Any], Any]
    draw: Callable[[np.random.Generator, bool], Arrays]  # (rng, quick: tiny sizes) -> params
    n: int
    system: str | None = None  # of complex log psi: real (Re and Im, 2 N), or hermitian (N)


# --- wave functions -------------------------------------------------------------------------------


def log_cosh(z):
    z = jnp.where(z.real < 0, -z, z)
    return z + jnp.log1p(jnp.exp(-2 * z)) - np.log(2).astype(z.real.dtype)


def _dense(params, name, x):
    bias = params[name + "/b"]
    return x @ params[name + "/w"] + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _log_psi(y):
    """Of two outputs, the real and the imaginary part."""
    return y[:, 0] if y.shape[1] == 1 else jax.lax.complex(y[:, 0], y[:, 1])


def ffn(params, x):
    for i in range(2):
        x = jnp.tanh(_dense(params, f"{i}", x))
    return _log_psi(_dense(params, "2", x))


def rbm(params, x):
    x = x.astype(params["visible"].dtype)
    return x @ params["visible"] + log_cosh(_dense(params, "hidden", x)).sum(1)


def _norm(params, name, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * params[name + "/scale"][None, None] + params[name + "/b"][None, None]


def _attention(params, name, x):
    n, s, d = x.shape
    q, k, v = jnp.split(_dense(params, name + "qkv", x), 3, axis=-1)
    q, k, v = (z.reshape(n, s, HEADS, d // HEADS) for z in (q, k, v))
    weights = jax.nn.softmax(jnp.einsum("nshd,nthd->nhst", q, k) / (d // HEADS) ** 0.5, axis=-1)
    mixed = jnp.einsum("nhst,nthd->nshd", weights, v).reshape(n, s, d)
    return _dense(params, name + "out", mixed)


def vision_transformer(params, x):
    across = SIDE // PATCH
    x = x.reshape(-1, across, PATCH, across, PATCH).transpose(0, 1, 3, 2, 4)
    x = _dense(params, "embed", x.reshape(-1, across**2, PATCH**2)) + params["positions"][None]
    for i in range(LAYERS):
        x = x + _attention(params, f"{i}", _norm(params, f"{i}norm1", x))
        z = jax.nn.gelu(_dense(params, f"{i}up", _norm(params, f"{i}norm2", x)))
        x = x + _dense(params, f"{i}down", z)
    return _log_psi(_dense(params, "head", _norm(params, "norm", x).mean(1)))


# --- weights and inputs ---------------------------------------------------------------------------


def _weights(rng, name, *shape):
    return {
        name + "/w": rng.normal(size=shape) / shape[0] ** 0.5,
        name + "/b": 0.1 * rng.normal(size=shape[1:]),
    }


def _ffn(outputs):
    def draw(rng, quick):
        width, params = 8 if quick else 256, {}
        for i, shape in enumerate(pairwise((SPINS, width, width, outputs))):
            params |= _weights(rng, f"{i}", *shape)
        return params

    return draw


def _rbm(*, imaginary):
    def draw(rng, quick):
        def one():
            visible = {"visible": 0.1 * rng.normal(size=SPINS)}
            return visible | _weights(rng, "hidden", SPINS, 8 if quick else 4 * SPINS)

        real = one()
        if not imaginary:
            return real
        both = zip(real.items(), one().values(), strict=True)
        # small, as log cosh has poles on the imaginary axis
        return {name: w + 0.2j * other for (name, w), other in both}

    return draw


def _vision_transformer(outputs):
    def draw(rng, quick):
        d, patches = 8 if quick else 64, (SIDE // PATCH) ** 2
        params = _weights(rng, "embed", PATCH**2, d) | _weights(rng, "head", d, outputs)
        params["positions"] = 0.1 * rng.normal(size=(patches, d))
        shapes = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}
        norms = ["norm"]
        for i in range(LAYERS):
            norms += [f"{i}norm1", f"{i}norm2"]
            for name, shape in shapes.items():
                params |= _weights(rng, f"{i}{name}", *shape)
        for name in norms:
            params[name + "/scale"] = 1 + 0.1 * rng.normal(size=d)
            params[name + "/b"] = 0.1 * rng.normal(size=d)
        return params

    return draw


CASES = {
    "ffn": Case("FFN 64-256-256-1, real", ffn, _ffn(1), 1024),
    "ffn_4096": Case("FFN 64-256-256-1, real", ffn, _ffn(1), 4096),
    "ffn_complex": Case("FFN 64-256-256-2, Re and Im", ffn, _ffn(2), 1024, "real"),
    "ffn_complex_4096": Case("FFN 64-256-256-2, Re and Im", ffn, _ffn(2), 4096, "real"),
    "rbm": Case("RBM 64 x 256, real", rbm, _rbm(imaginary=False), 1024),
    "rbm_4096": Case("RBM 64 x 256, real", rbm, _rbm(imaginary=False), 4096),
    "rbm_holomorphic": Case(
        "RBM 64 x 256, complex parameters", rbm, _rbm(imaginary=True), 1024, "hermitian"
    ),
    "vit": Case(
        "transformer, 16 patches, d = 64, real", vision_transformer, _vision_transformer(1), 512
    ),
    "vit_complex": Case(
        "transformer, 16 patches, d = 64, Re and Im",
        vision_transformer,
        _vision_transformer(2),
        512,
        "real",
    ),
}


def write(name: str, path: Path, *, quick: bool) -> None:
    """Draw weights, spins and local energies of a case and put them into one file."""
    rng, case = np.random.default_rng(0), CASES[name]
    n = 24 if quick else case.n
    params: dict[str, Any] = {"params:" + key: w for key, w in case.draw(rng, quick).items()}
    energies = rng.normal(size=n) + (0 if case.system is None else 1j * rng.normal(size=n))
    np.savez(path, x=rng.choice([-1.0, 1.0], (n, SPINS)), energies=energies, **params)


def read(path: str, dtype: type[np.floating]) -> Data:
    """Give them from that file, in float32 or float64 (and the complex numbers of them)."""
    with np.load(path) as file:
        arrays = {
            name: a.astype(np.result_type(dtype, np.complex64) if np.iscomplexobj(a) else dtype)
            for name, a in file.items()
        }
    params = {name.split(":", 1)[1]: a for name, a in arrays.items() if ":" in name}
    return Data(params, arrays["x"], arrays["energies"])
