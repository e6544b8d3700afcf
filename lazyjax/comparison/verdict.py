"""Lazy or not: what a comparison says, in a word with its numbers, and what to make of it."""

from typing import Any, NamedTuple

import numpy as np

from lazyjax.comparison.records import Comparison


class Thresholds(NamedTuple):
    """Up to which a run is lazy, and from which on it is not.

    Attributes
    ----------
    lazy, not_lazy : float
        Of the gap as a share of what was learned, and of the relative kernel change alike.
    """

    lazy: float = 0.1
    not_lazy: float = 0.3


THRESHOLDS = Thresholds()
_LARGE_RATE = 0.8  # of the critical one, from which on steps may drive a network out
_LATE = 0.9  # of the loss at half time, below which a model still learns at the end
_MOVED = 0.1  # relative movement of the weights that is no small one
_ROUNDING = 50  # eps sqrt(steps) this many times: below it a movement is rounding to one percent


class Verdict(NamedTuple):
    """What a comparison says of one member.

    Attributes
    ----------
    word : str
        `"lazy"`, `"not lazy"`, `"in between"`; `"diverged"` if the network or its tangent model
        did, and `"nothing learned"` if the outputs of the network did not change.
    gap : float
        The root mean square between network and tangent model on the training points at the end,
        over that between the network at the end and at the start: the share of what was learned. 0
        where it is rounding.
    kernel_change : float
        norm(Theta - Theta_0) / norm(Theta_0) at the end, of the network.
    until : int or None
        The first recorded step at which the gap was above the threshold of lazy, as a share of what
        was learned up to there; None if it never was.
    came_back : bool
        Whether the gap was below it again in the end.
    advice : tuple of str
        What would make it lazier, the most promising first; empty where it is lazy.
    warnings : tuple of str
        What to know before the word is believed.
    """

    word: str
    gap: float
    kernel_change: float
    until: int | None
    came_back: bool = False
    advice: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say it in a sentence, and what would make it lazier and what to know in others."""
        return "\n".join((self.sentence, *self.advice, *(f"Warning: {w}" for w in self.warnings)))

    @property
    def sentence(self) -> str:
        """The word with its numbers."""
        if self.word == "diverged":
            return "diverged: a loss or weights that are not finite"
        if self.word == "nothing learned":
            return "nothing learned: the outputs of the network did not change"
        when = "" if self.until is None else f", lazy until step {self.until}"
        if self.until is not None and self.came_back:
            when = f", after a larger gap from step {self.until} on"
        return (
            f"{self.word}: the gap to the tangent model is {self.gap:.2g} of what the network "
            f"learned, and its kernel moved by {self.kernel_change:.2g}{when}"
        )


def verdicts(compared: Comparison, thresholds: Thresholds = THRESHOLDS) -> list[Verdict]:
    """Say of each member whether it was lazy.

    Parameters
    ----------
    compared : Comparison
    thresholds : Thresholds
        A run is lazy if gap and kernel change are at most `lazy`, and not lazy if one of them is at
        least `not_lazy`.

    Returns
    -------
    list of Verdict
        One a member.

    Raises
    ------
    TypeError, ValueError
        If the thresholds are no pair of numbers that rise from above 0.

    Notes
    -----
    What would make a run lazier is read from theory, not tried: gap and kernel change fall as
    1 / alpha of a centred model (Chizat et al. 2019, theorem 2.2) and about as width^(-1/2) (Jacot
    et al. 2018); so does kappa, which says how far from lazy the start is. Steps near the critical
    learning rate drive a network to where its kernel is smaller (Lewkowycz et al. 2020, "The large
    learning rate phase of deep learning"), and for them a smaller rate comes first.
    """
    try:
        lazy, not_lazy = map(float, thresholds)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`thresholds` must be two numbers, got {thresholds!r}. Use Thresholds(0.1, 0.3)."
        ) from error
    if not 0 < lazy < not_lazy < np.inf:
        raise ValueError(
            f"`thresholds` must rise from above 0, got {thresholds}. Use Thresholds(0.1, 0.3)."
        )
    return [_verdict(compared, i, Thresholds(lazy, not_lazy)) for i in range(compared.members)]


def _verdict(compared: Comparison, member: int, thresholds: Thresholds) -> Verdict:
    share, change = compared.share[member], float(compared.kernel_change[member, -1])
    passed = np.flatnonzero(share > thresholds.lazy)
    until = int(compared.steps[passed[0]]) if len(passed) else None
    end, warnings = float(share[-1]), tuple(_warnings(compared, member))
    back = until is not None and end <= thresholds.lazy
    courses = (compared.network, compared.tangent)
    if any(course.diverged_at[member] >= 0 for course in courses):
        return Verdict("diverged", end, change, until, warnings=warnings)
    if compared.learned[member, -1] == 0:
        return Verdict("nothing learned", end, change, until, warnings=warnings)
    largest = max(end, change)
    if largest <= thresholds.lazy:
        return Verdict("lazy", end, change, until, back, warnings=warnings)
    word = "not lazy" if largest >= thresholds.not_lazy else "in between"
    advice = tuple(_advice(compared, member, largest / thresholds.lazy))
    return Verdict(word, end, change, until, back, advice, warnings)


def _of_critical(compared: Comparison, member: int) -> float:
    """Give the learning rate over the critical one; NaN if one is not known."""
    with np.errstate(all="ignore"):
        return float(compared.learning_rate[member] / compared.critical_learning_rate[member])


def _advice(compared: Comparison, member: int, excess: float) -> list[str]:
    """Say what would make it lazier, by how many times the threshold was passed."""
    rate, movement = _of_critical(compared, member), compared.network.movement[member, -1]
    (low, high), alpha = compared.kappa[member], compared.alpha[member]
    advice = []
    if rate >= _LARGE_RATE:
        advice.append(
            f"A smaller learning rate would make it lazier: this one is {rate:.2g} of the critical "
            "one."
        )
    width = f"a network about {_rounded(excess**2)} times as wide or more"
    scale = f"an output scale alpha of {_rounded(alpha * excess)} or more (compare(..., alpha=))"
    first = f"To be lazier: {scale}, or {width}."
    if _MOVED < movement < np.inf:
        first = f"The weights moved by {movement:.2g}. To be lazier: {width}, or {scale}."
    advice.append(first)
    if np.isfinite(low):
        where = "far below 1 at the start, so that little is missing"
        if high >= 0.1:
            where = "not small at the start"
        advice.append(f"kappa is {low:.2g} to {high:.2g}, {where}.")
    return advice


def _rounded(number: float) -> str:
    """Write two digits of a number, as in 2,800."""
    return f"{float(f'{number:.2g}'):,g}"


def _still_learns(curve: np.ndarray, steps: np.ndarray) -> bool:
    """Tell whether a loss fell by more than a tenth over the second half of training."""
    half = curve[np.searchsorted(steps, steps[-1] / 2)]
    with np.errstate(all="ignore"):
        return bool(curve[-1] < _LATE * half)


def _warnings(compared: Comparison, member: int) -> list[str]:
    """Say what to know before the word is believed."""
    found = []
    courses: dict[str, Any] = {"network": compared.network, "tangent model": compared.tangent}
    for name, course in courses.items():
        if course.diverged_at[member] >= 0:
            found.append(f"the {name} diverged at step {course.diverged_at[member]}.")
    rate = _of_critical(compared, member)
    if rate > 1:
        found.append(
            f"the learning rate, {compared.learning_rate[member]:.3g}, is {rate:.2g} times the "
            "critical one: the tangent model is not stable near its start."
        )
    if any(course.diverged_at[member] >= 0 for course in courses.values()):
        return found
    network, tangent = (course.loss[member] for course in courses.values())
    steps = compared.curve_steps
    if _still_learns(tangent, steps) and not _still_learns(network, steps):
        found.append(
            f"the tangent model has not converged, at a loss of {tangent[-1]:.2g} (network "
            f"{network[-1]:.2g}): train longer, or the gap is one of speed."
        )
    movement = np.max(compared.network.movement[member])
    limit = _ROUNDING * compared.epsilon * np.sqrt(steps[-1])
    if 0 < movement < limit:
        found.append(
            f"the weights moved by {movement:.1e} of their norm, where rounding takes over: train "
            "in float64."
        )
    for what, few in (("gaps", compared.examples), ("kernels", compared.kernel_examples)):
        if len(few) < compared.examples_in_all:
            found.append(f"{what} are those of {len(few)} examples, drawn at random.")
    return found
