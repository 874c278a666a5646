"""Formulae in a program's dimensions, printed for people."""

from __future__ import annotations

from typing import Any

import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter


class _Printer(StrPrinter):  # type: ignore[misc]
    """Prints min(S, 4096), the dimension first, and quotients without parentheses that they do not need."""

    # torch's functions print themselves, with parentheses around the whole, unless no such method is asked for.
    printmethod = None

    def _print_Identity(self, expr: Any) -> str:
        return str(self._print(expr.args[0]))

    def _print_FloorDiv(self, expr: Any) -> str:
        base, divisor = (self.parenthesize(each, PRECEDENCE["Atom"], strict=True) for each in expr.args)
        return f"{base}//{divisor}"

    def _print_Min(self, expr: Any) -> str:
        arguments = sorted(expr.args, key=lambda each: (each.is_number, str(each)))
        return f"min({', '.join(f'{int(each):,}' if each.is_Integer else self._print(each) for each in arguments)})"


def formula(expr: sympy.Expr | int) -> str:
    """A sum of products with grouped exact integers, as in `4,390,912*B*S + 1,536*B*S**2`; the highest powers last."""
    terms = sympy.Add.make_args(sympy.expand(sympy.sympify(expr)))
    ordered = sorted(terms, key=lambda term: (_degree(term), str(term.as_coeff_Mul()[1])))
    return " + ".join(map(_term, ordered)).replace("+ -", "- ")


def _degree(term: sympy.Expr) -> int:
    if not term.free_symbols:
        return 0
    # A term with a minimum has no degree; it is the exception and goes last.
    return int(sympy.total_degree(term, *term.free_symbols)) if term.is_polynomial(*term.free_symbols) else 99


def _term(term: sympy.Expr) -> str:
    coefficient, rest = term.as_coeff_Mul()
    number = f"{int(coefficient):,}" if coefficient.is_Integer else str(coefficient)
    if rest == 1:
        return number
    if coefficient == 1:
        return str(_Printer().doprint(rest))
    return f"{number}*{_Printer().parenthesize(rest, PRECEDENCE['Mul'], strict=True)}"
