"""Why does a large output scale make a one-parameter model convex around its start?

The model h(x; w) = f(x, w) (w - w0) is 0 at w0, and its loss is (alpha h - y)^2 / (2 alpha^2). The
larger alpha, the shorter the way to the data: the tangent model reaches them at a distance of
y / (alpha f(x, w0)). Look at the window shrinking as alpha^(-3/4), slower than that distance, and
at the two curves falling together inside it: the landscape does not change, one only sees less of
it, and what is left is the parabola of the tangent model. At alpha = 1 gradient descent is caught
in a ripple on the way; from alpha = 5 on it reaches the data, nearer and nearer to where its
tangent model does: the distance falls as alpha^-2.

The window of the text for h ends before w0, and the default w0 = 0.4 of its functions differs from
the 1.5 of its cell: both anchors are drawn here, each with its own tangent model.

Source: practical, section 15, after rajatvd.github.io/NTK; Chizat, Oyallon, Bach 2019, Theorem 2.2.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.tree_util import Partial
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.results import Results
from experiments.settings import Settings
from lazyjax import checks, plots
from lazyjax.tangent import linearize, scale
from lazyjax.training import scale_loss, train_ensemble
from lazyjax.types import Dataset

SECTIONS = "15"
QUICK = {"window_points": 500, "steps": 10_000}

TEXT_W0 = 0.4  # the default of the text's functions, which its cell does not use


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """The practical's own setting."""

    seed: int = 0
    """Unused: nothing is random here."""
    w0: float = 1.5
    """The anchor, where h is 0."""
    x: float = 1.5
    """Input of the one training point."""
    y: float = 3.0
    """Target of the one training point."""
    alphas: tuple[float, ...] = (1.0, 5.0, 10.0, 50.0, 100.0, 1000.0, 2000.0, 10_000.0)
    """Output scales."""
    window_points: int = 5000
    """Points of a window, w0 - 2 / alpha^(3/4) to w0 + 2 / alpha^(3/4)."""
    shown_x: float = 2.0
    """Input at which h itself is drawn."""
    learning_rate: float = 5e-4
    """Step size of gradient descent on the loss with 1/2 and / alpha^2."""
    steps: int = 40_000
    """Steps of gradient descent."""

    def __post_init__(self) -> None:
        for name in ("w0", "x", "y", "shown_x"):
            checks.finite(name, np.asarray(getattr(self, name), np.float64))
        checks.whole("number of `alphas`", len(self.alphas), least=2)
        checks.positive("alphas", np.asarray(self.alphas, np.float64))
        checks.whole("window_points", self.window_points, least=10)
        checks.positive("learning_rate", self.learning_rate)
        checks.whole("steps", self.steps, least=1)


def base(w: jax.Array, x: jax.Array) -> jax.Array:
    """Evaluate f(x, w) = w x / 2 + log(1 + w^2) x / 5 + 0.1 sin(exp(2 w))."""
    return w * x / 2 + jnp.log(1 + w**2) * x / 5 + 0.1 * jnp.sin(jnp.exp(2 * w))


def _anchored(w0: jax.Array, w: jax.Array, x: jax.Array) -> jax.Array:
    return base(w, x) * (w - w0)


def anchored(w0: jax.Array) -> Partial:
    """Make the model function h(w, x) = f(x, w) (w - w0).

    Parameters
    ----------
    w0 : ()

    Returns
    -------
    jax.tree_util.Partial
        w (), x (N, 1) -> (N, 1).
    """
    return Partial(_anchored, w0)


def by_hand(w0: jax.Array, w: jax.Array, x: jax.Array) -> jax.Array:
    """Evaluate the text's linearization of h at w0, f(x, w0) (w - w0).

    It is the tangent model since h(x; w0) = 0 and dh/dw (x; w0) = f(x, w0) + (w0 - w0) df/dw.
    """
    return base(w0, x) * (w - w0)


@jax.jit
def _on_line(w0: jax.Array, ws: jax.Array, x: jax.Array) -> dict[str, jax.Array]:
    """Evaluate h, its tangent model and that of the text, at each of `ws` (M,) for x (N, 1)."""
    h = anchored(w0)
    tangent = linearize(h, w0)
    return {
        "network": jax.vmap(lambda w: h(w, x))(ws),
        "tangent": jax.vmap(lambda w: tangent(w, x))(ws),
        "by_hand": jax.vmap(lambda w: by_hand(w0, w, x))(ws),
    }


def _loss(h: np.ndarray, y: float, alpha: float) -> np.ndarray:
    return (alpha * h[:, 0, 0] - y) ** 2 / 2 / alpha**2


def run(config: Config) -> Results:
    """Evaluate the loss of model and tangent model on every window, and descend both."""
    w0, x = jnp.asarray(config.w0, float), jnp.full((1, 1), config.x)
    arrays: dict[str, np.ndarray] = {"alphas": np.asarray(config.alphas)}
    at_w0 = float(base(w0, x)[0, 0])

    shown = jnp.full((1, 1), config.shown_x)
    for anchor in (config.w0, TEXT_W0):
        low, high = min(-1.0, anchor - 1.0), anchor + 1.0  # -1: where the text begins
        ws = np.linspace(low, high, 2000)
        curves = _on_line(jnp.asarray(anchor, float), jnp.asarray(ws), shown)
        arrays[f"w/{anchor:g}"] = ws
        for name, values in curves.items():
            arrays[f"{name}_h/{anchor:g}"] = np.asarray(values)[:, 0, 0]

    errors = []
    for alpha in config.alphas:
        reach = 2 / alpha**0.75
        displacement = np.linspace(-reach, reach, config.window_points)
        curves = _on_line(w0, w0 + jnp.asarray(displacement), x)
        curves = {name: np.asarray(values) for name, values in curves.items()}
        arrays[f"displacement/{alpha:g}"] = displacement
        for name in ("network", "tangent"):
            arrays[f"{name}_landscape/{alpha:g}"] = _loss(curves[name], config.y, alpha)
        size = np.abs(curves["by_hand"]).max()
        errors.append(np.abs(curves["tangent"] - curves["by_hand"]).max() / size)
    arrays["error_of_tangent"] = np.asarray(errors)

    arrays |= _descend(config, w0, x)
    summary = {f"alpha {alpha:g}": _row(config, arrays, i) for i, alpha in enumerate(config.alphas)}
    ends = [row["distance of the two ends"] for row in summary.values()]
    summary["all alphas"] = {
        "f(x, w0)": at_w0,
        "largest relative difference between linearize and the text's formula": float(max(errors)),
        "slope of the distance of the two ends over the last two alphas": _slope(config, ends),
        "slope of the relative difference of the losses over the last two alphas": _slope(
            config, [row["difference of the losses over the largest"] for row in summary.values()]
        ),
    }
    return Results(config=config, arrays=arrays, summary=summary)


def _slope(config: Config, values: list[float]) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):  # in float32 the two may end as one
        rise = np.log(values[-1]) - np.log(values[-2])
    return float(rise / (np.log(config.alphas[-1]) - np.log(config.alphas[-2])))


def _descend(config: Config, w0: jax.Array, x: jax.Array) -> dict[str, np.ndarray]:
    """Descend from w0 at every alpha, model and tangent model."""
    alphas = jnp.asarray(config.alphas, w0.dtype)
    starts = jnp.full(alphas.shape, w0)
    data = Dataset(x, jnp.full((1, 1), config.y))
    h = jax.vmap(lambda w, alpha: scale(anchored(w), alpha))(starts, alphas)
    loss = scale_loss(optax.losses.l2_loss, alphas)  # (alpha h - y)^2 / 2 / alpha^2
    arrays = {}
    for name, model in (("network", h), ("tangent", jax.vmap(linearize)(h, starts))):
        history = train_ensemble(
            model, starts, data, optax.sgd(config.learning_rate), steps=config.steps, loss=loss
        )
        arrays["steps"] = history.steps
        arrays[f"{name}_path"] = np.asarray(history.params) - config.w0  # (alphas, G)
        arrays[f"{name}_loss"] = history.data_loss
    return arrays


def _row(config: Config, arrays: dict[str, np.ndarray], index: int) -> dict[str, float]:
    alpha = config.alphas[index]
    network, tangent = (arrays[f"{name}_landscape/{alpha:g}"] for name in ("network", "tangent"))
    ends = arrays["network_path"][index, -1], arrays["tangent_path"][index, -1]
    inner = network[1:-1]
    minima = np.sum((inner < network[:-2]) & (inner < network[2:]))
    return {
        "half the window": float(arrays[f"displacement/{alpha:g}"][-1]),
        "local minima in the window, network": float(minima),
        "difference of the losses over the largest": float(
            np.abs(network - tangent).max() / tangent.max()
        ),
        "displacement of the network by gradient descent": float(ends[0]),
        "displacement of the tangent model by gradient descent": float(ends[1]),
        "distance of the two ends": float(abs(ends[0] - ends[1])),
        "final loss of the network, times alpha^2": float(
            arrays["network_loss"][index, -1] * alpha**2
        ),
        "final loss of the tangent model, times alpha^2": float(
            arrays["tangent_loss"][index, -1] * alpha**2
        ),
    }


def _plot_landscapes(results: Results) -> Figure:
    arrays, alphas = results.arrays, results.config.alphas
    columns = min(4, len(alphas))
    rows = -(-len(alphas) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 3.1 * rows + 0.5), squeeze=False
    )
    for ax in axes.flat[len(alphas) :]:
        ax.set_visible(False)
    for i, (ax, alpha) in enumerate(zip(axes.flat, alphas, strict=False)):
        displacement = arrays[f"displacement/{alpha:g}"]
        for name in ("network", "tangent"):
            _, line, colour = plots.MODELS[name]
            values = arrays[f"{name}_landscape/{alpha:g}"] * alpha**2
            ax.plot(displacement, values, line, color=colour, linewidth=1.4)
            end, at = arrays[f"{name}_path"][i, -1], arrays[f"{name}_loss"][i, -1] * alpha**2
            face = colour if name == "network" else "none"
            marker = {"markersize": 8 if name == "network" else 13, "markeredgewidth": 1.6}
            ax.plot(end, at, "o", color=colour, markerfacecolor=face, zorder=5, **marker)
        start = results.config.y**2 / 2
        ax.plot(0, start, "s", color="black", markersize=6, zorder=5)
        ax.set(title=rf"$\alpha$ = {alpha:g}")
        ax.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
        ax.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2), useMathText=True)
    for ax in axes[:, 0]:
        ax.set_ylabel(r"$\alpha^2$ loss = $(\alpha\, h - y)^2 / 2$")
    for ax in axes.flat[max(0, len(alphas) - columns) : len(alphas)]:
        ax.set_xlabel(r"$w - w_0$")
    handles = [
        Line2D(
            [], [], linestyle=plots.MODELS[name].line, color=plots.MODELS[name].colour, label=label
        )
        for name, label in (("network", "model h"), ("tangent", "tangent model"))
    ]
    blue, red = plots.MODELS["network"].colour, plots.MODELS["tangent"].colour
    dot: dict[str, Any] = {"linestyle": "", "marker": "o"}
    handles += [
        Line2D([], [], linestyle="", marker="s", color="black", label=r"start, $w_0$"),
        Line2D([], [], color=blue, label="model after gradient descent", **dot),
        Line2D([], [], color=red, markerfacecolor="none", label="tangent model after it", **dot),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle(r"windows of $w_0 \pm 2 \,/\, \alpha^{3/4}$ around the start")
    return figure


def _plot_model(results: Results) -> Figure:
    arrays, config = results.arrays, results.config
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9))
    titles = (
        f"anchor of the cell, $w_0$ = {config.w0:g}",
        f"default of the text, $w_0$ = {TEXT_W0:g}",
    )
    for ax, anchor, title in zip(axes, (config.w0, TEXT_W0), titles, strict=True):
        ws = arrays[f"w/{anchor:g}"]
        for name, label in (("network", "h"), ("tangent", "tangent model of h")):
            _, line, colour = plots.MODELS[name]
            ax.plot(ws, arrays[f"{name}_h/{anchor:g}"], line, color=colour, label=label)
        text = arrays[f"by_hand_h/{anchor:g}"]
        ax.plot(ws, text, ":", color="black", linewidth=2.4, label=r"$f(x, w_0)(w - w_0)$, by hand")
        ax.plot(anchor, 0.0, "s", color="black", label=r"$w_0$", zorder=5)
        if ws[0] < 1.0 < ws[-1]:
            ax.axvspan(ws[0], 1.0, color="0.94", zorder=0, label="window of the text")
        ax.set(title=title, xlabel="w", ylabel=f"h({config.shown_x:g}; w)")
    axes[0].legend()
    return figure


def _plot_limit(results: Results) -> Figure:
    arrays, config, summary = results.arrays, results.config, results.summary
    alphas = arrays["alphas"]
    rows = [summary[f"alpha {alpha:g}"] for alpha in config.alphas]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9))
    # colours of their own: these curves are no models
    green, purple, orange = plots.COLOURS[2], plots.COLOURS[3], plots.COLOURS[4]

    def curve(name: str) -> np.ndarray:
        return np.abs([row[name] for row in rows])

    moved = curve("displacement of the network by gradient descent")
    ends = curve("distance of the two ends")
    axes[0].plot(alphas, curve("half the window"), "-", color="0.6", label="half the window")
    axes[0].plot(alphas, moved, "o-", color=green, label=r"$|w - w_0|$")
    axes[0].plot(alphas, ends, "s-", color=purple, label=r"$|w - w_{tangent}|$")
    for values, slope in ((moved, -1), (ends, -2)):
        guide = values[-1] * (alphas / alphas[-1]) ** float(slope)
        axes[0].plot(alphas, guide, ":", color="black", linewidth=1)
        where = {"xytext": (-8, -14), "textcoords": "offset points", "ha": "right"}
        axes[0].annotate(f"slope {slope}", (alphas[-2], guide[-2]), **where)
    axes[0].set(
        title="where gradient descent ends", ylabel="distance in w", ylim=(ends.min() / 3, None)
    )
    axes[1].plot(alphas, curve("difference of the losses over the largest"), "D-", color=orange)
    axes[1].set(
        title="loss of the model against that of the tangent model",
        ylabel="largest difference in the window, relative",
    )
    for ax in axes:
        ax.set(xscale="log", yscale="log", xlabel=r"output scale $\alpha$")
    axes[0].legend()
    return figure


def plot(results: Results) -> dict[str, Figure]:
    """Draw the landscapes by alpha, h itself, and the limit of large alpha."""
    return {
        "landscapes": _plot_landscapes(results),
        "model": _plot_model(results),
        "limit": _plot_limit(results),
    }


def conclude(results: Results) -> list[str]:
    """Say how model and tangent model come together."""
    alphas, summary = results.config.alphas, results.summary
    first, last = summary[f"alpha {alphas[0]:g}"], summary[f"alpha {alphas[-1]:g}"]
    overall = summary["all alphas"]
    difference = "difference of the losses over the largest"
    minima = "local minima in the window, network"
    distance = "slope of the distance of the two ends over the last two alphas"
    formula = "largest relative difference between linearize and the text's formula"
    return [
        f"In the window of alpha = {alphas[0]:g} local minima of the loss of the model: "
        f"{first[minima]:.0f}; it differs from that of its tangent model by "
        f"{first[difference]:.2g} of the largest value. At alpha = {alphas[-1]:g}: "
        f"{last[minima]:.0f}, and {last[difference]:.2g}.",
        "Gradient descent from w0 ends at w - w0 = "
        f"{first['displacement of the network by gradient descent']:.3g} (tangent model "
        f"{first['displacement of the tangent model by gradient descent']:.3g}) at alpha = "
        f"{alphas[0]:g} and at {last['displacement of the network by gradient descent']:.3e} "
        f"(tangent model {last['displacement of the tangent model by gradient descent']:.3e}) at "
        f"alpha = {alphas[-1]:g}; between the last two alphas the distance of the two falls with "
        f"slope {overall[distance]:.2f} (Theorem 2.2: -2).",
        "The text's hand-written linearization and that of jax.linearize differ by at most "
        f"{overall[formula]:.1e} of its largest value.",
    ]
