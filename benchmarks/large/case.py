"""The model whose kernel is stored, and processes that store it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parents[2]


def _conv(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def cnn(params: Any, x: jax.Array) -> jax.Array:
    """Two convolutions, a mean over positions, ten outputs."""
    for name in "ab":
        x = jax.nn.relu(_conv(x, params[name]) + params[name + "/bias"][None, None, None])
    return x.mean((1, 2)) @ params["head"] + params["head/bias"][None]


def draw(n: int, dtype: str = "float32", channels: int = 32) -> tuple[Callable, Any, np.ndarray]:
    """Give the model, its parameters and n inputs of 8 x 8 x 3."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * np.prod(shape[:-1]) ** -0.5).astype(dtype)

    params = {
        "a": normal(3, 3, 3, channels),
        "b": normal(3, 3, channels, channels),
        "head": normal(channels, 10),
        "a/bias": np.zeros(channels, dtype),
        "b/bias": np.zeros(channels, dtype),
        "head/bias": np.zeros(10, dtype),
    }
    return cnn, jax.tree.map(jnp.asarray, params), rng.normal(size=(n, 8, 8, 3)).astype(dtype)


def start(module: str, *arguments: Any, **environment: str) -> subprocess.Popen:
    """Start a module of this folder as a worker."""
    return subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.large.{module}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    """Wait for a worker; give what it prints."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a worker has failed with exit code {process.returncode}")
    return out


def answer(process: subprocess.Popen) -> Any:
    """Wait for a worker and read the last line that it prints."""
    return json.loads(finish(process).splitlines()[-1])
