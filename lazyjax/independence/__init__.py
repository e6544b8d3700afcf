"""Are the examples of a batch independent? Read from the model's jaxprs, or found by a trial."""

from lazyjax.independence.trial import check_examples

__all__ = ["check_examples"]
