"""The event log of a decoding run, from which every figure derives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Event(NamedTuple):
    """One run of the program: `rows` tokens went in, `emitted` came out, of which `accepted` were drafted.

    The first event is the prompt's; it emits one token. `drafting` are the seconds that the drafter took of `seconds`.
    Plain steps in a row share their seconds.
    """

    rows: int
    emitted: int
    accepted: int
    seconds: float
    drafting: float = 0.0


@dataclass
class Log:
    """Events of one sequence."""

    events: list[Event] = field(default_factory=list)

    @property
    def steps(self) -> list[Event]:
        """Events after the prompt's."""
        return self.events[1:]

    @property
    def emitted(self) -> int:
        """Tokens that came out, the prompt's first one included."""
        return sum(event.emitted for event in self.events)

    @property
    def tau(self) -> float:
        """Tokens a step after the prompt; plain decoding has 1. NaN before the first step."""
        steps = self.steps
        return sum(event.emitted for event in steps) / len(steps) if steps else float("nan")

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were kept; NaN when none was drafted."""
        drafted = sum(event.rows - 1 for event in self.steps)
        return sum(event.accepted for event in self.steps) / drafted if drafted else float("nan")

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.events[0].seconds if self.events else float("nan")

    @property
    def tpot(self) -> float:
        """Seconds a token after the first one."""
        emitted = sum(event.emitted for event in self.steps)
        return sum(event.seconds for event in self.steps) / emitted if emitted else float("nan")

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "steps": len(self.steps),
            "emitted": self.emitted,
            "tau": self.tau,
            "acceptance_rate": self.acceptance_rate,
            "ttft": self.ttft,
            "tpot": self.tpot,
        }
