"""Holding a pass to all laws: `check_pass` for a report, `laws_of` for one pytest test a law."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from graphopt.passkit import Pass
from graphopt.testing.configurations import configurations
from graphopt.testing.laws import LAWS
from graphopt.testing.models import Shape, build
from graphopt.testing.strategies import shapes_of
from graphopt.testing.trial import LawBroken, Refused, trial

IDLE_SHARE = 4


@dataclass(frozen=True)
class Example:
    """A drawn case: the model, the configuration and its program."""

    shape: Shape
    config: Pass

    def __str__(self) -> str:
        return f"{self.config.to_yaml()} on {self.shape}"


@dataclass
class Verdict:
    """What became of one law: examples judged, of them with edits, and the smallest failure."""

    law: str
    examples: int = 0
    edited: int = 0
    failure: LawBroken | None = None
    example: Example | None = None

    def error(self) -> LawBroken | None:
        """The failure with its example, ready to be raised."""
        if self.failure is None:
            return None
        return LawBroken(self.law, f"{self.failure.message}\n  smallest example: {self.example}")


@dataclass
class Report:
    """The verdicts on one pass, by law.

    `refused` counts drawn examples that the pass refused in words, `idle` plans without edits.
    """

    name: str
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    refused: int = 0
    idle: int = 0

    @property
    def broken(self) -> dict[str, LawBroken]:
        """Failures by law."""
        return {law: error for law, verdict in self.verdicts.items() if (error := verdict.error()) is not None}

    def __str__(self) -> str:
        lines = [f"{self.name:<28} examples  edited"]
        for law, verdict in self.verdicts.items():
            word = "" if verdict.failure is None else "   BROKEN"
            lines.append(f"  {law:<26} {verdict.examples:>8} {verdict.edited:>7}{word}")
        return "\n".join([*lines, f"  {self.refused} refused in words, {self.idle} plans without edits"])


def check_pass(
    pass_class: type[Pass], *, max_examples: int = 20, shapes: Sequence[Shape] | None = None, start: int = 0
) -> Report:
    """Hold a pass to every law on drawn models and configurations; raises LawBroken with the smallest example.

    `shapes` limits the models to a pool, such as `strategies.covering()`. Raises LawBroken, too, when no example was
    changed at all, because then nothing was proved.
    """
    report = judge(pass_class, max_examples=max_examples, shapes=shapes, start=start)
    errors = list(report.broken.values())
    if errors:
        raise LawBroken(errors[0].law, "\n\n".join([errors[0].message, *map(str, errors[1:]), str(report)]))
    if not any(verdict.edited for verdict in report.verdicts.values()):
        raise LawBroken(
            "plan_is_complete", f"no example of {max_examples} was changed, so nothing was proved\n{report}"
        )
    return report


def judge(
    pass_class: type[Pass], *, max_examples: int = 20, shapes: Sequence[Shape] | None = None, start: int = 0
) -> Report:
    """The report of `check_pass`, failures included instead of raised."""
    report = Report(pass_class.name, {law: Verdict(law) for law in LAWS})

    def hold(example: Example) -> None:
        changed = _changed(example)
        if changed is None:
            report.refused += 1
        elif not changed:
            report.idle += 1
        # A few plans without edits are judged as well, but they cannot stand in for plans that change something.
        assume(changed or (changed is not None and report.idle <= 1 + max_examples // IDLE_SHARE))
        for verdict in report.verdicts.values():
            if verdict.failure is None:
                _hold(verdict, example)

    with contextlib.suppress(Unsatisfiable):
        _search(_examples(pass_class, shapes), hold, max_examples, start, shrink=False)
    for verdict in report.verdicts.values():
        if verdict.failure is not None:
            _smallest(verdict, pass_class, shapes, max_examples, start)
    return report


def _changed(example: Example) -> bool | None:
    """Whether the plan has edits; None when it is refused."""
    try:
        return bool(trial(example.config, build(example.shape)).plan.edits)
    except Refused:
        return None
    except Exception:
        # Anything else that planning raises is for the laws to judge.
        return True


def _hold(verdict: Verdict, example: Example) -> None:
    program = build(example.shape)
    try:
        LAWS[verdict.law](example.config, program)
    except LawBroken as error:
        verdict.failure, verdict.example = error, example
    verdict.examples += 1
    # The plan may itself be what fails.
    with contextlib.suppress(Exception):
        verdict.edited += bool(trial(example.config, program).plan.edits)


def _smallest(
    verdict: Verdict, pass_class: type[Pass], shapes: Sequence[Shape] | None, max_examples: int, start: int
) -> None:
    """Let Hypothesis shrink one law's failure."""

    def again(example: Example) -> None:
        try:
            LAWS[verdict.law](example.config, build(example.shape))
        except Refused:
            return
        except LawBroken as error:
            verdict.failure, verdict.example = error, example
            raise

    try:
        _search(_examples(pass_class, shapes), again, max_examples, start, shrink=True)
    except LawBroken:
        return


def _search(
    examples: st.SearchStrategy[Example], hold: Callable[[Example], None], count: int, start: int, *, shrink: bool
) -> None:
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=phases,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(examples)
    def run(example: Example) -> None:
        hold(example)

    run()


@st.composite
def _examples(draw: st.DrawFn, pass_class: type[Pass], shapes: Sequence[Shape] | None) -> Example:
    shape = draw(shapes_of(shapes))
    return Example(shape, draw(configurations(pass_class, build(shape))))


def laws_of(
    pass_class: type[Pass],
    *,
    max_examples: int | None = None,
    shapes: Sequence[Shape] | None = None,
    known: Mapping[str, str] | None = None,
) -> type[Any]:
    """A pytest class with one test for each law: `TestMine = laws_of(Mine)`.

    All laws judge the same examples, drawn once when the first test runs. `known` maps a law that is broken today to
    the reason; its test is an expected failure, and fails when the law holds again. `--laws-examples` of the pytest
    plugin sets the number of examples where `max_examples` does not.
    """
    known = dict(known or {})
    unknown = sorted(set(known) - set(LAWS))
    if unknown:
        raise ValueError(f"no such law: {', '.join(unknown)}")

    @lru_cache(maxsize=1)
    def report(count: int) -> Report:
        return judge(pass_class, max_examples=count, shapes=shapes)

    def test_of(law: str) -> Callable[..., None]:
        def test(self: Any, request: Any, record_property: Any) -> None:
            import pytest

            count = max_examples or request.config.getoption("--laws-examples", default=None) or 20
            verdict = report(count).verdicts[law]
            record_property("pass", pass_class.name)
            record_property("law", law)
            record_property("examples", verdict.examples)
            record_property("edited", verdict.edited)
            error = verdict.error()
            if law in known:
                if error is None:
                    pytest.fail(f"{law} holds again; remove it from known: {known[law]}", pytrace=False)
                pytest.xfail(f"{known[law]}: {error}")
            if error is not None:
                raise error
            if not verdict.edited:
                pytest.fail(f"no example of {count} was changed, so {law} proved nothing", pytrace=False)

        test.__doc__ = LAWS[law].__doc__
        test.__name__ = f"test_{law}"
        return test

    tests = {f"test_{law}": test_of(law) for law in LAWS}
    return type(f"Test{pass_class.__name__}", (), {"__doc__": f"Every law on {pass_class.name}.", **tests})
