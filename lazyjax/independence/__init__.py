"""Are the examples of a batch independent? Read from the model's jaxprs, or found by a trial."""

from lazyjax.independence.suspects import Suspect, suspects
from lazyjax.independence.trial import check_examples

__all__ = ["Suspect", "check_examples", "suspects"]
