"""All figures of a comparison."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.mathtext import MathTextParser

from lazyjax.comparison import Comparison
from lazyjax.plots.changes import kernels, measures
from lazyjax.plots.courses import layers, training
from lazyjax.plots.looks import style
from lazyjax.plots.outputs import functions, is_a_function, predictions


def _legible(label: str) -> str:
    """Keep Matplotlib from reading a label as mathematics that is none."""
    try:
        MathTextParser("path").parse(label)
    except ValueError:
        return label.replace("$", r"\$")
    return label


def comparison(
    compared: Comparison,
    labels: Sequence[str] | None = None,
    *,
    target: np.ndarray | None = None,
) -> dict[str, Figure]:
    """Draw all figures of a comparison, in the style of lazyjax.

    Parameters
    ----------
    compared : Comparison
    labels : sequence of str, optional
        One a member; none where the members are seeds.
    target : (M,) or (M, 1), optional
        The target on the test points, for a function of one number.

    Returns
    -------
    dict of Figure
        `functions`, for a function of one number with test points, or else `predictions`;
        `training`, `layers`, `kernels`, `measures`.

    Raises
    ------
    ValueError
        If there is not one label a member, or one target a test point.
    """
    if labels is not None and (isinstance(labels, str) or len(labels) != compared.members):
        raise ValueError(
            f"`labels` must be one for each of the {compared.members} members, got {labels!r}. "
            "Leave them out where the members are seeds."
        )
    if labels is not None:
        labels = [_legible(label) for label in labels]
    if target is not None:
        tests = 0 if compared.network.test is None else compared.network.test.shape[2]
        if np.size(target) != tests:
            raise ValueError(
                f"`target` must have one value for each of the {tests} test points, got shape "
                f"{np.shape(target)}. Pass those of the function on `test`."
            )
    with style():
        if is_a_function(compared):
            outputs = {"functions": functions(compared, labels, target_values=target)}
        else:
            outputs = {"predictions": predictions(compared, labels)}
        return outputs | {
            "training": training(compared, labels),
            "layers": layers(compared, labels),
            "kernels": kernels(compared, labels),
            "measures": measures(compared, labels),
        }
