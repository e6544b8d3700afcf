"""A network beside its tangent model and the closed form: one training of each, measured alike."""

from lazyjax.comparison.optimizers import HeavyBall, heavy_ball
from lazyjax.comparison.records import ClosedForm, Comparison, Course, join
from lazyjax.comparison.running import compare, compare_ensemble
from lazyjax.comparison.sizes import FREE, SHARE, Amounts, amounts
from lazyjax.comparison.verdict import THRESHOLDS, Thresholds, Verdict, verdicts

__all__ = [
    "FREE",
    "SHARE",
    "THRESHOLDS",
    "Amounts",
    "ClosedForm",
    "Comparison",
    "Course",
    "HeavyBall",
    "Thresholds",
    "Verdict",
    "amounts",
    "compare",
    "compare_ensemble",
    "heavy_ball",
    "join",
    "verdicts",
]
