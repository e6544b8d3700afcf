"""One member measured: its outputs, gaps, kernels and curvature at the recorded steps.

What a user would call by hand is called here, step by step, on the host: `f(w, x)`, `ntk`,
`pattern_change`. So numbers are those of the parts, and no more than one step is on the device.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lazyjax import checks
from lazyjax.comparison.classes import Classes
from lazyjax.comparison.closed import closed_form
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
from lazyjax.training import factor_of_squares, log_grid, scale_of_loss
from lazyjax.types import Dataset, History, Params, PyTree
from lazyjax.widening import widened

_CURVE_POINTS = 600  # of a curve that is kept, log-spaced


class Member(NamedTuple):
    """What one member is trained on, and how: the arguments of `compare`, checked."""

    f: Partial
    tangent: Partial
    start: Params
    anchor: Params
    loss: Partial
    data: Dataset
    test: Dataset | None  # its y None where there are no targets
    mini_batches: bool
    ball: HeavyBall | None
    no_closed_form: str  # what is known of it before training
    classes: Classes | None
    alpha: float  # that was asked for
    epsilon: float
    settings: dict[str, str]


@jax.jit
def _outputs(f: Partial, params: Params, x: PyTree) -> jax.Array:
    return widened(f(params, x))


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
            np.concatenate([np.asarray(_outputs(f, history.at(i), part)) for part in cut])
            for i in range(len(history.steps))
        ]
    )[None]


def curve_steps(member: Member, history: History) -> np.ndarray:
    """Give the steps of curves: those at which the loss on all data is known."""
    if member.mini_batches:
        return history.steps
    return log_grid(int(history.steps[-1]), points=_CURVE_POINTS)


def _course(
    f: Partial, history: History, member: Member, amounts: Amounts, train_x: PyTree
) -> Course:
    at = curve_steps(member, history)
    loss = history.data_loss if member.mini_batches else history.loss[at]
    train = _on_grid(f, history, train_x, amounts.block)
    test = None
    if member.test is not None:
        test = _on_grid(f, history, member.test.x, amounts.block)
    scale = member.alpha**2
    classes, (own, beside) = member.classes, _labels(member, amounts)
    return Course(
        loss=loss[None] * scale,
        movement=history.weight_movement[None, at],
        layer={name: curve[None, at] for name, curve in history.layer_movement.items()},
        diverged_at=np.array([-1 if history.diverged_at is None else history.diverged_at]),
        train=train,
        test=test,
        train_accuracy=_accuracy(classes, train, own),
        test_accuracy=_accuracy(classes, test, beside),
    )


def _labels(member: Member, amounts: Amounts) -> tuple[Any, Any]:
    """Give the classes that the targets name, on the recorded training examples and the tests."""
    classes, test = member.classes, member.test
    if classes is None:
        return None, None
    beside = None if test is None or test.y is None else classes.labels(test.y)
    return classes.labels(np.asarray(member.data.y)[amounts.examples]), beside


def _accuracy(classes: Classes | None, outputs: Any, labels: Any) -> np.ndarray | None:
    if classes is None or outputs is None or labels is None:
        return None
    return 1 - classes.differ(classes.of(outputs), labels)


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


def some_of(data: Dataset, examples: np.ndarray) -> Dataset:
    """Take some of the examples, of every leaf that has them on axis 0."""
    n = checks.batch("data.x", data.x)
    if len(examples) == n:
        return data

    def some(a: Any) -> Any:
        return np.asarray(a)[examples] if np.shape(a)[:1] == (n,) else a

    return Dataset(*jax.tree.map(some, tuple(data)))


def _measured(function: Callable[..., Any], *arguments: Any) -> float:
    """Give a number, NaN where a model has none (no second derivative, weights not finite)."""
    try:
        return float(function(*arguments))
    except Exception:
        return np.nan


def _kappa(member: Member, amounts: Amounts) -> np.ndarray:
    f, _, start, _, loss, (x, y), *_ = member
    if not amounts.kappa or factor_of_squares(loss) is None:
        return np.full((1, 2), np.nan)
    try:
        found = kappa(f, start, x, y, key=jax.random.key(0))
    except Exception:  # no second derivative, or nothing moves at all
        return np.full((1, 2), np.nan)
    return np.asarray([found.lower, found.upper], float)[None]


def measured(
    member: Member, network: History, tangent: History, amounts: Amounts, request: Request
) -> Comparison:
    """Measure what the two trainings of one member have left; its kernels are requested."""
    f, data, test, classes = member.f, member.data, member.test, member.classes
    train_x = some_of(data, amounts.examples).x
    courses = [
        _course(model, history, member, amounts, train_x)
        for model, history in ((f, network), (member.tangent, tangent))
    ]
    own, other = courses

    closed, critical, why = None, np.nan, member.no_closed_form
    if member.ball is not None and not why:
        closed, critical, why = closed_form(
            f,
            member.start,
            member.anchor,
            data,
            None if test is None else test.x,
            network.steps,
            other.train[0],
            member.ball,
            factor_of_squares(member.loss) or 1.0,
            scale_of_loss(member.loss),
            amounts,
        )

    if closed is not None:
        closed = replace(closed, loss=closed.loss * member.alpha**2)

    few = amounts.kernel_examples
    subset = some_of(data, few)
    which = spread(amounts.kernel_points, network.steps)
    columns = _columns(member, few)
    at = [jax.tree.map(jnp.asarray, network.at(i)) for i in which]
    thetas = [kernels(request.at(w)) for w in at]
    moved = [_of_kernel(theta, thetas[0]) for theta in thetas]
    aligned = [np.nan if columns is None else _with_targets(k, columns) for k in thetas]
    sharp = np.full(len(which), np.nan)
    for i in spread(amounts.sharpness_points, which):
        sharp[i] = _measured(largest_curvature, f, member.loss, at[i], subset)
    inputs = relu_inputs(f, member.start, request.x1)
    patterns = None
    if inputs is not None:
        patterns = np.asarray([[_patterns(inputs, w, at[0], request.x1) for w in at]])
    if np.isnan(critical) and member.ball is not None and amounts.sharpness_points:
        flat = _measured(largest_curvature, member.tangent, member.loss, at[0], subset)
        critical = 2 * (1 + member.ball.momentum) / flat if flat > 0 else np.nan

    ball = member.ball or HeavyBall(np.nan, np.nan)
    return Comparison(
        x=jax.tree.map(np.asarray, data.x),
        y=jax.tree.map(np.asarray, data.y),
        test_x=None if test is None else jax.tree.map(np.asarray, test.x),
        test_y=None if test is None else jax.tree.map(np.asarray, test.y),
        steps=network.steps,
        curve_steps=curve_steps(member, network),
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
