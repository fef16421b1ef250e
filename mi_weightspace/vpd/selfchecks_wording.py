"""What a report may say about a decomposition: causal importance, on this data, up to a budget."""

from __future__ import annotations

import re

from mi_weightspace.core.errors import ConfigError

_NUMBER = (
    r"(?:\d[\d,.]*|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|"
    r"forty|fifty|hundreds? of|thousands? of|dozens? of|several|many|few)"
)
_NEVER = (
    r"\b(?:is|are|was|were|be)\s+the\s+(?:\w+\s+)?mechanisms?\b",
    rf"\b(?:{_NUMBER})\s+(?:\w+\s+)?mechanisms?\b",
    r"\bno\s+structure\b",
)
_CONVERGED_ONLY = (r"\bsparse(?:ly)?\b", r"\bsparsity\b")
ALLOWED = "causally important on this distribution up to this budget"


def violations(text: str, *, converged: bool = True) -> list[str]:
    """The phrases of a text that a decomposition cannot support.

    "is the mechanism", "has N mechanisms" and "no structure" never; "sparse" not before a run has
    converged: importances are set late, by the end of the anneal.
    """
    patterns = _NEVER if converged else _NEVER + _CONVERGED_ONLY
    return [m.group(0) for p in patterns for m in re.finditer(p, text, flags=re.IGNORECASE)]


def guard(text: str, *, converged: bool = True) -> str:
    """The text itself, if it claims no more than a decomposition shows.

    Raises:
        ConfigError: it says more; names the phrases.
    """
    found = violations(text, converged=converged)
    if found:
        raise ConfigError(
            "wording of a report",
            given=", ".join(repr(f) for f in found),
            expected="a claim about importance on the data and up to the budget measured"
            + ("" if converged else ", of a run that has converged"),
            remedy=f"Say '{ALLOWED}'.",
        )
    return text
