"""One member measured: its outputs, gaps, kernels and curvature at the recorded steps.

What a user would call by hand is called here, step by step, on the host: `f(w, x)`, `ntk`,
`pattern_change`. So numbers are those of the parts, and no more than one step is on the device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lazyjax.comparison.classes import Classes
from lazyjax.comparison.closed import closed_form
from lazyjax.comparison.members import Member, outputs, some_of
from lazyjax.comparison.optimizers import HeavyBall
from lazyjax.comparison.records import Comparison, Course, rms
from lazyjax.comparison.sizes import Amounts, pieces, spread
from lazyjax.curvature import largest_curvature
from lazyjax.kernels import Request, kernels
from lazyjax.metrics import (
    kappa,
    kernel_alignment,
    pattern_change,
    relative_kernel_change,
    target_alignment,
)
from lazyjax.patterns import relu_inputs
from lazyjax.training import factor_of_squares, log_grid
from lazyjax.types import Dataset, History, Params, PyTree

_CURVE_POINTS = 600  # of a curve that is kept, log-spaced


_patterns = jax.jit(pattern_change)


@jax.jit
def _of_kernel(kernel: jax.Array, kernel0: jax.Array) -> tuple[jax.Array, jax.Array]:
    return relative_kernel_change(kernel, kernel0), kernel_alignment(kernel, kernel0)


_with_targets = jax.jit(target_alignment)


def _on_grid(f: Partial, history: History, x: PyTree, block: int) -> np.ndarray:
    """Evaluate a model on x at every recorded step, (1, G, n, *out)."""
    cut = pieces(x, block)
    return np.stack(
        [
            np.concatenate([np.asarray(outputs(f, history.at(i), part)) for part in cut])
            for i in range(len(history.steps))
        ]
    )[None]


class _Points(NamedTuple):
    """Where outputs are taken, and the classes of the targets there, if they name any."""

    x: PyTree
    labels: np.ndarray | None


def _points(member: Member, amounts: Amounts) -> dict[str, _Points]:
    """Give the recorded training points, and the test points if there are any."""
    classes, test = member.classes, member.test

    def points(data: Dataset) -> _Points:
        named = classes is not None and data.y is not None
        return _Points(data.x, classes.labels(data.y) if classes and named else None)

    train = points(some_of(member.data, amounts.examples))
    return {"train": train} if test is None else {"train": train, "test": points(test)}


def _course(
    f: Partial,
    history: History,
    member: Member,
    block: int,
    points: dict[str, _Points],
    curve_steps: np.ndarray,
) -> Course:
    loss = history.data_loss if member.mini_batches else history.loss[curve_steps]
    values = {place: _on_grid(f, history, own.x, block) for place, own in points.items()}
    right = {
        place: _accuracy(member.classes, values[place], own.labels) for place, own in points.items()
    }
    return Course(
        loss=loss[None] * member.alpha**2,
        movement=history.weight_movement[None, curve_steps],
        layer={name: curve[None, curve_steps] for name, curve in history.layer_movement.items()},
        diverged_at=np.array([-1 if history.diverged_at is None else history.diverged_at]),
        train=values["train"],
        test=values.get("test"),
        train_accuracy=right["train"],
        test_accuracy=right.get("test"),
    )


def _accuracy(
    classes: Classes | None, values: np.ndarray, labels: np.ndarray | None
) -> np.ndarray | None:
    if classes is None or labels is None:
        return None
    return 1 - classes.differ(classes.of(values), labels)


def _disagreement(classes: Classes | None, a: Any, b: Any) -> np.ndarray | None:
    if classes is None or a is None or b is None:
        return None
    return classes.differ(classes.of(a), classes.of(b))


def _columns(member: Member, few: np.ndarray) -> np.ndarray | None:
    """Give the targets (k, K) that a kernel is held against, where there are such."""
    y = member.data.y
    if not hasattr(y, "dtype"):
        return None
    y = np.asarray(y)[few]
    classes = member.classes
    values = classes is not None and (classes.threshold is not None or classes.one_hot)
    if np.issubdtype(y.dtype, np.floating):
        return y.reshape(len(y), -1)
    if values:
        return y.reshape(len(y), -1).astype(float)
    if classes is None or y.ndim != 1 or y.min() < 0:
        return None
    return np.eye(int(y.max()) + 1)[y]


def _where_there_is_one(function: Callable[[], Any], otherwise: Any) -> Any:
    """Give what needs a second derivative of the model, where the model has one."""
    try:
        return function()
    except Exception:
        return otherwise


def _kappa(member: Member, amounts: Amounts) -> np.ndarray:
    none = np.full((1, 2), np.nan)
    if not amounts.kappa or factor_of_squares(member.loss) is None:
        return none

    def bounds() -> np.ndarray:
        x, y = member.data
        found = kappa(member.f, member.start, x, y, key=jax.random.key(0))
        return np.asarray([found.lower, found.upper], float)[None]

    return _where_there_is_one(bounds, none)


def measured(
    member: Member, network: History, tangent: History, amounts: Amounts, request: Request
) -> Comparison:
    """Measure what the two trainings of one member have left; its kernels are requested."""
    f, data, test, classes = member.f, member.data, member.test, member.classes
    curve_steps = network.steps  # where the loss on all data is known
    if not member.mini_batches:
        curve_steps = log_grid(int(network.steps[-1]), points=_CURVE_POINTS)
    points = _points(member, amounts)
    own, other = (
        _course(model, history, member, amounts.block, points, curve_steps)
        for model, history in ((f, network), (member.tangent, tangent))
    )

    closed, critical, why = None, np.nan, member.no_closed_form
    if member.ball is not None and not why:
        closed, critical, why = closed_form(
            member, member.ball, network.steps, other.train[0], amounts
        )

    few = amounts.kernel_examples
    subset = some_of(data, few)
    which = spread(amounts.kernel_points, network.steps)
    columns = _columns(member, few)
    at = [jax.tree.map(jnp.asarray, network.at(i)) for i in which]
    thetas = [kernels(request.at(w)) for w in at]
    moved = [_of_kernel(theta, thetas[0]) for theta in thetas]
    aligned = [np.nan if columns is None else _with_targets(k, columns) for k in thetas]

    def sharpness_of(model: Partial, params: Params) -> float:
        return _where_there_is_one(
            lambda: float(largest_curvature(model, member.loss, params, subset)), np.nan
        )

    sharp = np.full(len(which), np.nan)
    for i in spread(amounts.sharpness_points, which):
        sharp[i] = sharpness_of(f, at[i])
    if np.isnan(critical) and member.ball is not None and amounts.sharpness_points:
        flat = sharpness_of(member.tangent, at[0])
        critical = 2 * (1 + member.ball.momentum) / flat if flat > 0 else np.nan
    inputs, patterns = relu_inputs(f, member.start, request.x1), None
    if inputs is not None:
        patterns = np.asarray([[_patterns(inputs, w, at[0], request.x1) for w in at]])

    ball = member.ball or HeavyBall(np.nan, np.nan)
    return Comparison(
        x=jax.tree.map(np.asarray, data.x),
        y=jax.tree.map(np.asarray, data.y),
        test_x=None if test is None else jax.tree.map(np.asarray, test.x),
        test_y=None if test is None else jax.tree.map(np.asarray, test.y),
        steps=network.steps,
        curve_steps=curve_steps,
        kernel_steps=network.steps[which],
        examples=amounts.examples,
        kernel_examples=few,
        network=own,
        tangent=other,
        closed=closed,
        no_closed_form=why,
        gap_train=rms(own.train - other.train),
        gap_test=None if own.test is None or other.test is None else rms(own.test - other.test),
        disagreement_train=_disagreement(classes, own.train, other.train),
        disagreement_test=_disagreement(classes, own.test, other.test),
        kernels=np.asarray(thetas)[None] / member.alpha**2,
        kernel_change=np.asarray([change for change, _ in moved])[None],
        kernel_alignment=np.asarray([alignment for _, alignment in moved])[None],
        target_alignment=np.asarray(aligned)[None],
        sharpness=sharp[None],
        pattern_change=patterns,
        kappa=_kappa(member, amounts),
        critical_learning_rate=np.asarray([critical]),
        learning_rate=np.asarray([ball.learning_rate]),
        momentum=np.asarray([ball.momentum]),
        alpha=np.asarray([member.alpha]),
        epsilon=member.epsilon,
        settings=member.settings,
        histories={"network": network, "tangent model": tangent},
    )
