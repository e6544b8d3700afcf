"""Lazy or not: what a comparison says, in a word with its numbers."""

from typing import NamedTuple

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
_ROUNDING = 100  # epsilons of the outputs, up to which two models are one


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
    """

    word: str
    gap: float
    kernel_change: float
    until: int | None

    def __str__(self) -> str:
        """Say it in a sentence."""
        if self.word == "diverged":
            return "diverged: a loss or weights that are not finite"
        if self.word == "nothing learned":
            return "nothing learned: the outputs of the network did not change"
        when = "" if self.until is None else f", lazy until step {self.until}"
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
    ValueError
        If the thresholds do not rise.
    """
    if not 0 < thresholds.lazy < thresholds.not_lazy:
        raise ValueError(
            f"`thresholds` must rise from above 0, got {thresholds}. Use Thresholds(0.1, 0.3)."
        )
    return [_verdict(compared, i, thresholds) for i in range(compared.members)]


def _verdict(compared: Comparison, member: int, thresholds: Thresholds) -> Verdict:
    outputs = compared.network.train[member]
    gap, change = compared.gap_train[member], float(compared.kernel_change[member, -1])
    inner = tuple(range(1, outputs.ndim))
    with np.errstate(all="ignore"):  # nothing is learned at the start, and what diverges overflows
        learned = np.sqrt(np.mean(np.square(outputs - outputs[:1]), axis=inner))
        size = np.sqrt(np.mean(np.square(outputs), axis=inner))
        rounding = _ROUNDING * np.finfo(outputs.dtype).eps * size
        share = np.where(gap > rounding, gap / learned, 0.0)
    passed = np.flatnonzero(share > thresholds.lazy)
    until = int(compared.steps[passed[0]]) if len(passed) else None
    end, steps = float(share[-1]), (compared.network.diverged_at, compared.tangent.diverged_at)
    if any(step[member] >= 0 for step in steps):
        return Verdict("diverged", end, change, until)
    if learned[-1] == 0:
        return Verdict("nothing learned", end, change, until)
    largest = max(end, change)
    word = "lazy" if largest <= thresholds.lazy else "in between"
    return Verdict("not lazy" if largest >= thresholds.not_lazy else word, end, change, until)
