"""What has no limit that is known here, and is said so."""

from typing import NoReturn


def refuse(what: str, cure: str, where: str = "") -> NoReturn:
    """Refuse a model: the argument, the rule, what came and in which equation, the cure."""
    place = f" in the equation\n    {where}\n" if where else ". "
    raise ValueError(
        "`f` must have a limit of infinite width that can be read off its operations, got "
        f"{what}{place}{cure or 'Use ntk on wide networks'}."
    )
