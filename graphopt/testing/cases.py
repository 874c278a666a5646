"""A failing case as a file, how it is run again, and how it becomes smaller."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from graphopt.diagnostics import GraphoptError, SpecError
from graphopt.passkit import Pass, PassRegistry
from graphopt.spec import parse_spec
from graphopt.testing.laws import LAWS
from graphopt.testing.models import Shape, build
from graphopt.testing.trial import LawBroken, Refused, trial

FORMAT = 1


@dataclass(frozen=True)
class Failure:
    """Which law broke, at which step, and what it said."""

    law: str
    step: int
    message: str


@dataclass(frozen=True)
class Case:
    """A model and the steps of a spec: everything that a failure needs to happen again."""

    shape: Shape
    steps: tuple[Mapping[str, Any], ...]
    seed: int = 0

    def spec(self) -> str:
        """The steps as a spec."""
        return json.dumps({"graphopt": 1, "steps": [dict(step) for step in self.steps]}, indent=1)

    def configs(self) -> tuple[Pass, ...]:
        """The passes that the steps say; raises SpecError when they say none."""
        loaded = parse_spec(self.spec(), registry=PassRegistry())
        return tuple(step.config for step in loaded.steps if isinstance(step.config, Pass))

    def run(self, laws: Sequence[str] = tuple(LAWS)) -> Failure | None:
        """Hold every step to the laws on what the steps before it left; the first failure, or None.

        A step that is refused in words ends the run; raises SpecError when the steps are no spec.
        """
        configs = self.configs()
        program = build(self.shape, self.seed)
        for index, config in enumerate(configs):
            for law in laws:
                try:
                    LAWS[law](config, program)
                except Refused:
                    return None
                except LawBroken as error:
                    return Failure(law, index, error.message)
            try:
                program = trial(config, program).after
            except (Refused, GraphoptError):
                return None
        return None

    def to_json(self, failure: Failure) -> dict[str, Any]:
        """Plain data of the case and what became of it."""
        return {
            "reproducer": FORMAT,
            "shape": self.shape.to_json(),
            "seed": self.seed,
            "steps": [dict(step) for step in self.steps],
            "law": failure.law,
            "error": failure.message,
        }

    def save(self, directory: Path, failure: Failure) -> Path:
        """Write a reproducer, named by its law and contents."""
        text = json.dumps(self.to_json(failure), indent=2) + "\n"
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / f"{failure.law}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"
        file.write_text(text, encoding="utf-8")
        return file

    @staticmethod
    def load(file: Path) -> tuple[Case, str]:
        """The case and the law of a reproducer; raises SpecError when the file is none."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data["reproducer"] != FORMAT or data["law"] not in LAWS:
                raise ValueError("another format")
            return Case(Shape(**data["shape"]), tuple(data["steps"]), int(data["seed"])), str(data["law"])
        except (ValueError, KeyError, TypeError) as error:
            raise SpecError.of("bad_reproducer", f"{file} is no reproducer of graphopt fuzz: {error}") from error


def shrink(case: Case, law: str) -> tuple[Case, Failure]:
    """The smallest case that still breaks the law: fewer steps, fewer options, a plainer and smaller model.

    Raises SpecError when the case does not break it.
    """
    failure = _breaks(case, law)
    if failure is None:
        raise SpecError.of("not_reproduced", f"the case does not break {law} here")
    progress = True
    while progress:
        progress = False
        for smaller in _smaller(case):
            found = _breaks(smaller, law)
            if found is not None:
                case, failure, progress = smaller, found, True
                break
    return case, failure


def _breaks(case: Case, law: str) -> Failure | None:
    try:
        return case.run((law,))
    except GraphoptError:
        return None


def _smaller(case: Case) -> Iterator[Case]:
    """Cases one reduction away, the largest reductions first."""
    for index in range(len(case.steps)):
        if len(case.steps) > 1:
            yield Case(case.shape, (*case.steps[:index], *case.steps[index + 1 :]), case.seed)
    for shape in _plainer(case.shape):
        yield Case(shape, case.steps, case.seed)
    for index, step in enumerate(case.steps):
        for name in step:
            if name != "use":
                fewer = {key: value for key, value in step.items() if key != name}
                yield Case(case.shape, (*case.steps[:index], fewer, *case.steps[index + 1 :]), case.seed)


def _plainer(shape: Shape) -> Iterator[Shape]:
    plain, values = Shape(), asdict(shape)
    for name in (item.name for item in fields(Shape)):
        now, least = values[name], getattr(plain, name)
        sizes = [now - (now - least) // 2**k for k in range(1, 5)] if _is_size(now, least) else []
        for value in dict.fromkeys([least, *sizes, *([now - 1] if sizes else [])]):
            if value == now or (_is_size(value, least) and value > now):
                continue
            try:
                yield Shape(**{**values, name: value})
            except ValueError:
                continue


def _is_size(now: Any, least: Any) -> bool:
    return isinstance(now, int) and isinstance(least, int) and not isinstance(now, bool)
