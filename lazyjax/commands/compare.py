"""`python -m lazyjax compare MODULE:FACTORY --data d.npz --steps 2000 --out page/`: one page."""

import contextlib
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

import lazyjax.comparison
from lazyjax import checks
from lazyjax.commands.arguments import Factory, arrays_of, model
from lazyjax.comparison import verdicts
from lazyjax.curvature import sharpness
from lazyjax.laws import check_momentum
from lazyjax.tangent import center, linearize
from lazyjax.training import progress
from lazyjax.types import Dataset, Loss, ModelFunction, Params

LOSSES: dict[str, Loss] = {
    "squared_error": optax.losses.squared_error,
    "softmax_cross_entropy": optax.losses.softmax_cross_entropy,
    "integer_labels": optax.losses.softmax_cross_entropy_with_integer_labels,
    "sigmoid_cross_entropy": optax.losses.sigmoid_binary_cross_entropy,
    "huber": optax.losses.huber_loss,
}

OPTIMIZERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "rmsprop": optax.rmsprop,
    "lion": optax.lion,
}

_CURE = "np.savez(path, x=x, y=y)"
_EXAMPLES = 1000  # of which the critical learning rate is computed


def compare(
    factory: Factory,
    *,
    data: Path,
    out: Path,
    steps: int,
    optimizer: str = "sgd",
    learning_rate: str = "auto",
    momentum: float = 0.0,
    loss: str | None = None,
    batch_size: int | None = None,
    alpha: tuple[float, ...] = (),
    seed: int = 0,
    memory: str = "2GiB",
    resume: bool = False,
) -> None:
    """Train a network and its tangent model alike, and write a page that says how lazy it was.

    The folder has index.html, comparison.npz (`lazyjax.Comparison.load` reads it) and both
    trainings as far as they are. JAX_ENABLE_X64=1 in the environment computes in float64.

    Parameters
    ----------
    factory
        a function that gives (f, params), in a module that can be imported from here
    data
        an npz file with x and y, and with test_x, or test_x and test_y, if there are test points
    out
        the folder of the page, a new one
    steps
        of training
    optimizer
        sgd, adam, adamw, rmsprop or lion, of Optax
    learning_rate
        a number; auto is half of the critical one of the tangent model, for sgd
    momentum
        of the heavy ball, for sgd
    loss
        squared_error, softmax_cross_entropy (one-hot y), integer_labels, sigmoid_cross_entropy or
        huber; by default integer_labels if y holds whole numbers, else squared_error
    batch_size
        examples a step; by default all
    alpha
        output scales: train alpha (f - f at the start) with the loss over alpha^2
    seed
        of the mini-batches
    memory
        budget of what is measured
    resume
        go on with what is in the folder
    """
    if out.exists() and not resume:
        raise ValueError(f"`--out` must be new, got {out}. Name another, or add --resume.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"`--out` must be a folder, got the file {out}. Name another.")
    checks.whole("--steps", steps, least=1)
    checks.one_of("--optimizer", optimizer, OPTIMIZERS)
    if loss is not None:
        checks.one_of("--loss", loss, LOSSES)
    check_momentum(momentum)
    if momentum and optimizer != "sgd":
        raise ValueError(
            f"`--momentum` must be 0 for {optimizer}, got {momentum}. Use --optimizer sgd."
        )
    f, params = model(factory)
    points, test = _points(data)
    whole = np.issubdtype(points.y.dtype, np.integer)
    function = LOSSES[loss or ("integer_labels" if whole else "squared_error")]
    model_of_rate = center(f, params) if alpha else f  # which is trained
    rate = _rate(learning_rate, optimizer, momentum, model_of_rate, params, points, function)
    rule = OPTIMIZERS[optimizer](rate) if not momentum else optax.sgd(rate, momentum)
    with _bars() as show, progress(show):
        compared = lazyjax.comparison.compare(
            f,
            params,
            points,
            rule,
            steps=steps,
            test=test,
            loss=function,
            batch_size=batch_size,
            key=None if batch_size is None else jax.random.key(seed),
            alpha=alpha or None,
            memory=memory,
            checkpoint=out,
        )
    compared.save(out / "comparison.npz")
    labels = [f"alpha = {a:g}" for a in alpha] or None
    page = compared.report(out, labels, code=f"python -m lazyjax {shlex.join(sys.argv[1:])}")
    for label, own in zip(labels or [""], verdicts(compared), strict=True):
        print(f"{label}: {own}" if label else own)
    print(page)


def _points(path: Path) -> tuple[Dataset, Dataset | None]:
    """Read the data, and the test points if there are any."""
    found = arrays_of(path, _CURE)
    held = {} if isinstance(found, np.ndarray) else found
    names = set(held)
    if not {"x", "y"} <= names <= {"x", "y", "test_x", "test_y"} or (
        "test_y" in names and "test_x" not in names
    ):
        raise ValueError(
            "`--data` must hold x and y, and test_x and test_y if there are test points, got "
            f"{sorted(names) or 'one array'} in {path}. Use {_CURE}."
        )
    for name, array in held.items():
        if array.dtype.kind not in "biuf":
            raise ValueError(
                f"`--data` must hold numbers, got {array.dtype} for {name} in {path}. Use {_CURE}."
            )
    arrays = {name: jnp.asarray(array) for name, array in held.items()}
    test = None if "test_x" not in names else Dataset(arrays["test_x"], arrays.get("test_y"))
    return Dataset(arrays["x"], arrays["y"]), test


def _rate(
    asked: str,
    optimizer: str,
    momentum: float,
    f: ModelFunction,
    params: Params,
    data: Dataset,
    loss: Loss,
) -> float:
    """Read a learning rate; `auto` is half of the critical one of the tangent model."""
    if asked != "auto":
        try:
            rate = float(asked)
        except ValueError as error:
            raise ValueError(
                f"`--learning-rate` must be a number or auto, got {asked}. Use auto."
            ) from error
        checks.positive("--learning-rate", rate)
        return rate
    if optimizer != "sgd":
        raise ValueError(
            f"`--learning-rate` must be a number for {optimizer}, got auto. Use 0.001, or sgd."
        )
    few = Dataset(data.x[:_EXAMPLES], data.y[:_EXAMPLES])
    curvature = float(sharpness(linearize(f, params), params, few, loss=loss))
    if not 0 < curvature < np.inf:
        raise ValueError(
            f"`--learning-rate` must be a number where the loss has no curvature, got auto and "
            f"{curvature:.3g}. Use 0.1."
        )
    return (1 + momentum) / curvature


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[int, int, str | None], None]]:
    """Show a bar for each training; give what `progress` calls."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(done: int, total: int, label: str | None) -> None:
            name = label or "training"
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield show
