"""What presets share: inner rules by name."""

from __future__ import annotations

from eckart.optimizers.rules import RULES, Adam, Lion, Rule
from eckart.registry import suggest


def rule_for(inner: str | Rule, betas: tuple[float, float], eps: float, *, eps_corrected: bool = True) -> Rule:
    """The rule of that name, with these settings where it has them; a rule is taken as it is."""
    if isinstance(inner, Rule):
        return inner
    if inner not in RULES:
        raise ValueError(f"unknown inner rule {inner!r}{suggest(inner, list(RULES))}")
    rule = RULES[inner]
    if issubclass(rule, Adam):
        return rule(betas=betas, eps=eps, eps_corrected=eps_corrected)
    return rule(betas=betas) if issubclass(rule, Lion) else rule()
