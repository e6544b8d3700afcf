"""Which cases of a test run each time, and which `--thorough` only."""

import pytest


def few(names, cases, count=1):
    """Parametrise a test: its first `count` cases run each time, the others with `--thorough`."""
    one = isinstance(names, str) and "," not in names

    def marked(case):
        if hasattr(case, "marks"):  # a pytest.param
            return pytest.param(*case.values, marks=[*case.marks, pytest.mark.thorough], id=case.id)
        return pytest.param(*((case,) if one else case), marks=pytest.mark.thorough)

    cases = list(cases)
    return pytest.mark.parametrize(names, cases[:count] + [marked(case) for case in cases[count:]])
