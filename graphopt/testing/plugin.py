"""The pytest plugin: `--laws-examples N`, and after the run how many examples each pass was held to.

Imports nothing heavy, because pytest loads it in every run of an environment that has graphopt.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the number of examples that `laws_of` draws."""
    parser.getgroup("graphopt").addoption(
        "--laws-examples", type=int, default=None, metavar="N", help="examples that every pass is held to (20)"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print, for each pass, how many laws held on how many examples."""
    rows: dict[str, list[tuple[str, int, int, str]]] = {}
    for outcome in ("passed", "failed", "xfailed"):
        for report in terminalreporter.stats.get(outcome, []):
            found = dict(getattr(report, "user_properties", ()))
            if report.when == "call" and "law" in found:
                row = (str(found["law"]), int(found["examples"]), int(found["edited"]), outcome)
                rows.setdefault(str(found["pass"]), []).append(row)
    if not rows:
        return
    terminalreporter.section("graphopt laws")
    for name, laws in sorted(rows.items()):
        held = sum(outcome == "passed" for *_, outcome in laws)
        examples, edited = max(row[1] for row in laws), max(row[2] for row in laws)
        terminalreporter.write_line(f"{name}: {held} of {len(laws)} laws on {examples} examples, {edited} with edits")
        for law, count, _, outcome in laws:
            if outcome != "passed":
                terminalreporter.write_line(f"  {law}: {outcome} after {count} examples")
