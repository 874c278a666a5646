"""Mutation score of graphopt.ir and two passes: of many small faults, how many do the tests notice?

`python benchmarks/mutation.py --sample 400` writes benchmarks/results/mutation.json; `make mutants` sets up and runs it.
Mutants are cosmic-ray's (its operators and its way of applying them). Each runs in a fork of this process, which has
loaded the libraries and none of graphopt, so that a mutant costs its tests and no start of torch. Files stay as they are.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.machinery
import importlib.metadata
import json
import os
import random
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mutation.json"
GRAPH, LIMITS, FORM, WEIGHTS = (
    f"tests/ir/test_{name}.py" for name in ("program", "text_limits", "text_form", "weights")
)
SKIP, WIDTH = "tests/passes/test_skip_plan.py", "tests/passes/test_width_plan.py"
PRUNE = (WIDTH, "tests/passes/test_prune_plan.py")
# Which tests each module is held to, the quickest first: the first failure ends a mutant.
TARGETS: dict[str, tuple[str, ...]] = {
    "ir/program.py": (GRAPH, LIMITS, WEIGHTS, SKIP, WIDTH),
    "ir/purity.py": (GRAPH, SKIP, WIDTH),
    "ir/rewriter.py": (GRAPH, SKIP, WIDTH),
    "ir/run.py": (GRAPH, SKIP, WIDTH),
    "ir/shapes.py": (GRAPH, LIMITS, SKIP, WIDTH),
    "ir/text.py": (LIMITS, FORM, GRAPH),
    "ir/text_parse.py": (LIMITS, FORM, GRAPH),
    "ir/weights.py": (WEIGHTS, GRAPH, LIMITS, SKIP, WIDTH),
    "passes/depth/formula.py": (SKIP,),
    "passes/depth/skip_layers.py": (SKIP,),
    "passes/width/base.py": PRUNE,
    "passes/width/plan.py": PRUNE,
    "passes/width/prune_heads.py": PRUNE,
    "passes/width/prune_hidden.py": PRUNE,
    "passes/width/prune_neurons.py": PRUNE,
    "passes/width/prune_units.py": PRUNE,
}
# These start processes of their own, which import the true module.
SKIPPED = "not same_in_every_process and not need_no_torch"
# Equal by construction: identity and equality of None, classes and interned constants.
EQUIVALENT = ("Is_Eq", "IsNot_NotEq", "Eq_Is", "NotEq_IsNot")
# A mutant may take so many times as long as its tests do without one, and at most so many seconds.
PATIENCE, LONGEST = 10, 900.0
FATAL = "fatal"


@dataclass(frozen=True)
class Mutant:
    """One fault: a cosmic-ray operator at its n-th place in a file, and the line before and after."""

    file: str
    operator: str
    occurrence: int
    line: int
    column: int
    before: str
    after: str


def mutants(file: str, choice: random.Random) -> Iterator[Mutant]:
    """One mutant for each place and family of operators; which of a family's replacements it gets is drawn."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / "graphopt" / file).read_text(encoding="utf-8")
    types = list(_type_only(source))
    tree = get_ast(source)
    found: dict[tuple[int, int, str], list[tuple[str, int]]] = {}
    for name in operator_names():
        kind = get_operator(name)
        if kind.arguments() or name.endswith(EQUIVALENT):
            continue
        places = [place for node in ast_nodes(tree) for place in kind().mutation_positions(node)]
        for occurrence, (start, _) in enumerate(places):
            if not any(first <= start < last for first, last in types):
                family = name.removeprefix("core/").split("_")[0]
                found.setdefault((*start, family), []).append((name, occurrence))
    lines = source.splitlines()
    for (line, column, _), options in sorted(found.items()):
        name, occurrence = choice.choice(sorted(options))
        changed = mutate_code(source, get_operator(name)(), occurrence).splitlines()
        differs = next((i for i, (a, b) in enumerate(zip(lines, changed, strict=False)) if a != b), line - 1)
        yield Mutant(
            file, name.removeprefix("core/"), occurrence, line, column, lines[differs].strip(), changed[differs].strip()
        )


def _type_only(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Spans that never run: annotations of functions, `if TYPE_CHECKING`, and unions in annotations of fields."""
    for node in ast.walk(ast.parse(source)):
        parts: list[ast.expr | None] = []
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            parts = [node.returns, *(each.annotation for each in every if each is not None)]
        elif isinstance(node, ast.AnnAssign):
            unions = [each for each in ast.walk(node.annotation) if isinstance(each, ast.BinOp)]
            parts = list(unions)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield (node.lineno, node.col_offset), (node.test.end_lineno or 0, (node.test.end_col_offset or 0) + 1)
        for part in parts:
            if part is not None:
                yield (part.lineno, part.col_offset), (part.end_lineno or 0, part.end_col_offset or 0)


class _Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from changed source, and leaves all others to Python."""

    def __init__(self, name: str, file: Path, source: str) -> None:
        self.name, self.file, self.source = name, file, source

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The changed module."""
        if name != self.name:
            return None
        spec = importlib.machinery.ModuleSpec(name, self, origin=str(self.file))
        spec.has_location = True
        return spec

    def exec_module(self, module: ModuleType) -> None:
        """Run the changed source."""
        exec(compile(self.source, str(self.file), "exec"), module.__dict__)


def run(tests: Sequence[str], mutant: Mutant | None, log: Path, limit: float = LONGEST) -> tuple[str, float]:
    """Run tests in a fork on a mutant (or on none): `killed`, `survived` or `timeout`, and the seconds."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(tests, mutant, log)
    while time.monotonic() - start < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code == 5 or (code == 4 and mutant is None):
                raise RuntimeError(f"pytest could not run {tests}: see {log}")
            return ("survived" if code == 0 else "killed"), time.monotonic() - start
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout", time.monotonic() - start


def _child(tests: Sequence[str], mutant: Mutant | None, log: Path) -> None:
    code = 70
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if mutant is not None:
            file = ROOT / "graphopt" / mutant.file
            name = "graphopt." + mutant.file.removesuffix(".py").replace("/", ".")
            sys.meta_path.insert(0, _Loader(name, file, _changed(file, mutant)))
        import pytest

        # Plugins that are found by themselves would be imported, and with them graphopt, past our loader.
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "pytest_timeout", "-k", SKIPPED]
        code = int(pytest.main([*options, *tests]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)


def _changed(file: Path, mutant: Mutant) -> str:
    if mutant.operator == FATAL:
        return "raise RuntimeError"
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    operator = get_operator(f"core/{mutant.operator}")()
    return str(mutate_code(file.read_text(encoding="utf-8"), operator, mutant.occurrence))


def preload() -> None:
    """Import what tests need and graphopt does not change, once for all mutants."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", HYPOTHESIS_PROFILE="ci", TRANSFORMERS_VERBOSITY="error")
    sys.path.insert(0, str(ROOT))
    sys.dont_write_bytecode = True
    import hypothesis
    import networkx
    import pydantic
    import pytest
    import scipy.sparse
    import sympy
    import torch._dynamo
    import torch.export
    import torch.utils.flop_counter
    import transformers.models.llama.modeling_llama

    del hypothesis, networkx, pydantic, pytest, scipy, sympy, transformers
    torch.set_num_threads(1)
    assert not any(name == "graphopt" or name.startswith("graphopt.") for name in sys.modules)


def main() -> int:
    """The command line; returns 1 when fewer than 85% of mutants were noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=None, help="mutants drawn by seed; all when left out")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop when they have passed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=".", help="a pattern that file names must match")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    choice = random.Random(given.seed)
    everything = [mutant for file in TARGETS for mutant in mutants(file, choice)]
    chosen = [mutant for mutant in everything if re.search(given.only, mutant.file)]
    # In a drawn order, so that what has run is a sample whenever the time is up.
    choice.shuffle(chosen)
    chosen = chosen[: given.sample]
    preload()
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"mutant-{os.getpid()}.log"
    limits: dict[tuple[str, ...], float] = {}
    for tests in sorted({TARGETS[mutant.file] for mutant in chosen}):
        outcome, seconds = run(tests, None, log)
        limits[tests] = min(LONGEST, 60 + PATIENCE * seconds)
        print(f"without a mutant: {outcome} {seconds:.0f} s  {' '.join(tests)}", flush=True)
        if outcome != "survived":
            raise RuntimeError(f"the tests fail without a mutant:\n{log.read_text()[-3000:]}")
    # By file, because a module that the loader misses would let all of its mutants live.
    for file in sorted({mutant.file for mutant in chosen}):
        fatal = Mutant(file, FATAL, 0, 1, 0, "", "")
        if run(TARGETS[file], fatal, log)[0] != "killed":
            raise RuntimeError(f"{file} can be broken without any effect: mutants do not reach the tests")
    counts: dict[str, Counter[str]] = {}
    survivors: list[Mutant] = []
    start = time.monotonic()
    for number, mutant in enumerate(chosen, 1):
        if time.monotonic() - start > 60 * given.minutes:
            chosen = chosen[: number - 1]
            break
        outcome, seconds = run(TARGETS[mutant.file], mutant, log, limits[TARGETS[mutant.file]])
        counts.setdefault(mutant.file, Counter())[outcome] += 1
        if outcome == "survived":
            survivors.append(mutant)
        said = f"{number}/{len(chosen)} {outcome} {seconds:.1f} s {mutant.file}:{mutant.line} {mutant.operator}"
        print(said + (f"\n    {mutant.before}\n    {mutant.after}" if outcome == "survived" else ""), flush=True)
        _write(given.out, given.seed, everything, counts, survivors, time.monotonic() - start)
    noticed = 1 - len(survivors) / len(chosen)
    print(f"{noticed:.1%} of {len(chosen)} mutants noticed, {len(survivors)} survived")
    return 0 if noticed >= 0.85 else 1


def _write(
    file: Path,
    seed: int,
    everything: Sequence[Mutant],
    counts: dict[str, Counter[str]],
    survivors: Sequence[Mutant],
    seconds: float,
) -> None:
    total: Counter[str] = sum(counts.values(), Counter())
    ran = sum(total.values())
    data = {
        "tool": f"cosmic-ray {importlib.metadata.version('cosmic-ray')}",
        "seed": seed,
        "mutants": len(everything),
        "ran": ran,
        "killed": total["killed"],
        "timeout": total["timeout"],
        "survived": total["survived"],
        "score": round(1 - total["survived"] / ran, 4),
        "seconds": round(seconds),
        "files": {name: dict(sorted(count.items())) for name, count in counts.items()},
        "survivors": [asdict(mutant) for mutant in survivors],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
