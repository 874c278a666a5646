"""Reports for people and scripts: what a program is, how two differ, what a run did."""

from graphopt.report.describe import Description, describe
from graphopt.report.diff import diff, diff_page
from graphopt.report.explain import explain, explain_json
from graphopt.report.page import Page, fold
from graphopt.report.run_report import run_report

__all__ = ["Description", "Page", "describe", "diff", "diff_page", "explain", "explain_json", "fold", "run_report"]
