from __future__ import annotations

import json
import pickle

import pytest

from graphopt.diagnostics import BudgetError, Diagnostic, GraphoptError, Place, PlanError, closest, render
from graphopt.spec import ScalarError

PLACE = Place("a.yaml", 5, 5, 5, "    scoer: taylor")


def test_a_diagnostic_reads_like_rustc() -> None:
    diagnostic = Diagnostic(
        "unknown_field", "unknown field 'scoer' in pass 'p'", PLACE, ("fields: use, score",), ("did you mean 'score'?",)
    )
    assert render(diagnostic) == (
        "a.yaml:5:5: error: unknown field 'scoer' in pass 'p'  [unknown_field]\n"
        "    5 |     scoer: taylor\n"
        "      |     ^^^^^\n"
        "      = fields: use, score\n"
        "      = help: did you mean 'score'?"
    )


def test_a_diagnostic_without_place_or_source_is_one_line() -> None:
    assert render(Diagnostic("c", "m")) == "error: m  [c]"
    assert render(Diagnostic("c", "m", Place("a.yaml", 2, 3))) == "a.yaml:2:3: error: m  [c]"


def test_color_adds_nothing_but_color() -> None:
    diagnostic = Diagnostic("c", "m", PLACE, ("n",))
    colored = render(diagnostic, color=True)
    for code in ("\x1b[1;31m", "\x1b[1;34m", "\x1b[1m", "\x1b[0m"):
        assert code in colored
        colored = colored.replace(code, "")
    assert colored == render(diagnostic)


def test_control_and_direction_characters_never_reach_the_terminal() -> None:
    place = Place("a\x1b.yaml", 1, 4, 2, "a: \x1b]\u202e")
    text = render(Diagnostic("c", "m\x1b[31m", place, ("n\x07",)))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b" in text


def test_the_caret_follows_wide_characters_and_long_lines() -> None:
    assert render(Diagnostic("c", "m", Place("f", 1, 3, 2, "漢: ab"))).splitlines()[2] == "      |    ^^"
    line = "x" * 500 + "BAD" + "y" * 500
    source, caret = render(Diagnostic("c", "m", Place("f", 1, 501, 3, line))).splitlines()[1:]
    assert len(source) < 170
    assert source[caret.index("^") : caret.index("^") + 3] == "BAD"
    assert caret.count("^") == 3


@pytest.mark.parametrize(
    "error",
    [
        GraphoptError(Diagnostic("a", "m", PLACE), Diagnostic("b", "n")),
        BudgetError.of("budget", "cannot be met", PLACE, notes=("n",), help=("h",)),
        ScalarError.about("s", "m", start=3, length=2),
    ],
)
def test_errors_survive_pickle_and_json(error: GraphoptError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert again.diagnostics == error.diagnostics
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert json.loads(json.dumps(error.to_json()))["diagnostics"][0]["code"] == error.code


def test_a_budget_error_is_a_plan_error() -> None:
    assert issubclass(BudgetError, PlanError)


def test_closest() -> None:
    assert closest("scoer", ["score", "keep"]) == "score"
    assert closest("SCORE", ["score"]) == "score"
    assert closest("zzz", ["score"]) is None
    assert closest("s" * 10_000, ["score"]) is None
