"""Fuzzing: `python -m graphopt.testing.fuzz --minutes N --out DIR` draws pipelines over models until the time is up.

Each failure is saved once as a small file; `graphopt shrink FILE` makes it smaller still.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable

from graphopt.testing.cases import Case, Failure
from graphopt.testing.strategies import Pipeline, pipelines

ROUND = 10


@dataclass
class Session:
    """What a run has found so far."""

    out: Path
    cases: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    found: dict[tuple[str, str, str], Path] = field(default_factory=dict)

    def take(self, pipeline: Pipeline) -> None:
        """Run one pipeline, and save its failure when it is new."""
        case = Case(pipeline.shape, tuple(step.to_yaml() for step in pipeline.steps))
        self.cases += 1
        self.steps.update(step.name for step in pipeline.steps)
        failure = case.run()
        if failure is None:
            return
        kind = (failure.law, pipeline.steps[failure.step].name, _without_figures(failure))
        if kind not in self.found:
            self.found[kind] = case.save(self.out, failure)

    def write(self) -> None:
        """Keep what was found so far in `summary.txt`, so that a run that is stopped has a result too."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "summary.txt").write_text(f"{self}\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = [f"{self.cases} pipelines, {sum(self.steps.values())} steps, {len(self.found)} kinds of failure"]
        lines += [f"  {name}: {count} times" for name, count in sorted(self.steps.items())]
        lines += [f"  {law} at {use}: {file}" for (law, use, _), file in self.found.items()]
        return "\n".join(lines)


def fuzz(minutes: float, out: Path, start: int = 0) -> Session:
    """Draw pipelines for so many minutes from seed `start` on; failures are written to `out`."""
    session = Session(out)
    end = time.monotonic() + 60 * minutes
    round_ = start
    while time.monotonic() < end:
        _round(session, round_, end)
        round_ += 1
        session.write()
    return session


def _round(session: Session, number: int, end: float) -> None:
    @seed(number)
    @settings(
        max_examples=ROUND,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(pipelines())
    def take(pipeline: Pipeline) -> None:
        if time.monotonic() < end:
            session.take(pipeline)

    try:
        take()
    except Unsatisfiable:
        return


def _without_figures(failure: Failure) -> str:
    """A message without numbers and node names, so that one bug is saved once."""
    return re.sub(r"%\w+|[-+]?\d[\d.e+-]*", "#", failure.message)[:200]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 when something was found."""
    parser = argparse.ArgumentParser(prog="python -m graphopt.testing.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"))
    parser.add_argument("--seed", type=int, default=0)
    given_ = parser.parse_args(arguments)
    session = fuzz(given_.minutes, given_.out, given_.seed)
    sys.stdout.write(f"{session}\n")
    return 1 if session.found else 0


if __name__ == "__main__":
    sys.exit(main())
