"""The kit's own proof: every planted bug is caught by the law that is named for it, and by no law without it."""

from __future__ import annotations

import pytest

from graphopt.testing import LAWS, LawBroken
from graphopt.testing.planted import BUGS, Planted


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name.replace(" ", "_") for bug in BUGS])
def test_planted_bug_is_caught_by_its_law(bug: Planted) -> None:
    law = LAWS[bug.law]
    law(*bug.case())
    config, program = bug.case()
    with bug.plant(), pytest.raises(LawBroken) as caught:
        law(config, program)
    assert caught.value.law == bug.law
    assert caught.value.message
    law(*bug.case())


def test_every_law_has_a_bug_that_it_catches() -> None:
    assert {bug.law for bug in BUGS} == set(LAWS)
