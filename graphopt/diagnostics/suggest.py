"""The closest word to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST_WORD = 64


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate most like `word`, or None when none is close."""
    if len(word) > LONGEST_WORD:
        return None
    by_folded = {candidate.casefold(): candidate for candidate in sorted(candidates, reverse=True)}
    matches = difflib.get_close_matches(word.casefold(), sorted(by_folded), n=1, cutoff=0.6)
    return by_folded[matches[0]] if matches else None


def did_you_mean(word: str, candidates: Iterable[str]) -> tuple[str, ...]:
    """Return the help line that offers the closest candidate, or nothing."""
    match = closest(word, candidates)
    return () if match is None else (f"did you mean '{match}'?",)
