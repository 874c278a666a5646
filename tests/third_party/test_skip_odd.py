"""The whole suite of the example pass: one line."""

from graphopt_skip_odd import SkipOdd

from graphopt.testing import laws_of

TestSkipOdd = laws_of(SkipOdd)
