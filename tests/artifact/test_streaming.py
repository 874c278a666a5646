"""Tensors stream: rows have the bits of the whole, shards survive a kill, each tensor is read once."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graphopt.artifact.directory import replacing
from graphopt.artifact.journal import Journal, digest
from graphopt.artifact.saving import _reading_once
from graphopt.artifact.tensors import Entry, write_sharded
from graphopt.diagnostics import ArtifactError
from graphopt.frontend.checkpoint import CheckpointSource
from graphopt.ir.weights import (
    Affine,
    BlockMap,
    Cat,
    Const,
    Expr,
    MatMul,
    MemorySource,
    Rows,
    Source,
    Sum,
    Take,
    Weight,
    WeightStore,
    all_finite,
)

X = Source("x", (40, 6), torch.bfloat16)
EXPRESSIONS: dict[str, Expr] = {
    "source": X,
    "rows": Rows(X, 3, 33),
    "constant": Const(torch.arange(80.0).reshape(40, 2), torch.bfloat16),
    "take_rows": Take(X, 0, tuple(range(1, 40, 3))),
    "take_columns": Take(X, 1, (5, 0, 3)),
    "take_unordered": Take(X, 0, tuple(reversed(range(40)))),
    "take_of_take": Take(Take(X, 0, tuple(range(0, 40, 2))), 0, (0, 7, 8, 19)),
    "cat_rows": Take(Cat((X, X), 0), 0, (1, 39, 40, 41, 79)),
    "cat_columns": Cat((X, X), 1),
    "affine": Affine(X, 0.3, 1.7),
    "sum": Sum((X, Affine(X, 0.1))),
    "product": MatMul(X, Const(torch.randn(6, 3), torch.float32), torch.bfloat16),
    "map": BlockMap(X, 0, ((0, 1), (2, 3)), torch.randn(2, 2, 10, 10)),
}


def store(expr: Expr) -> WeightStore:
    value = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    return WeightStore({"w": Weight("w", expr)}, MemorySource({"x": value}))


@pytest.mark.parametrize("name", EXPRESSIONS)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_rows_have_the_bits_of_the_whole(name: str, dtype: torch.dtype | None) -> None:
    weights = store(EXPRESSIONS[name])
    whole = weights.evaluate("w", dtype)
    parts = list(weights.pieces("w", 30, dtype))
    assert whole.shape == EXPRESSIONS[name].shape
    assert torch.equal(torch.cat(parts), whole)
    assert (len(parts) > 1) == (name not in ("take_unordered", "product", "map")), len(parts)
    index = [i for i in (0, 1, 2, 5) if i < len(whole)]
    assert torch.equal(weights.rows("w", index, dtype), whole[index])


def test_moving_values_needs_no_wider_dtype_and_no_rounding() -> None:
    assert EXPRESSIONS["take_of_take"].moves
    assert not EXPRESSIONS["affine"].moves
    value = torch.tensor([[1 + 2**-30, -0.0], [5e-324, 1e300]], dtype=torch.float64)
    part = Take(Source("x", (2, 2), torch.float64), 0, (1, 0))
    weights = WeightStore({"w": Weight("w", part)}, MemorySource({"x": value}))
    assert torch.equal(weights.evaluate("w"), value[[1, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])
def test_finiteness(dtype: torch.dtype) -> None:
    value = torch.randn(1000).clamp(-3, 3).to(dtype)
    assert all_finite(value)
    assert all_finite(torch.full((7,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype))
    bad = value.clone().float()
    bad[-1] = float("nan")
    assert not all_finite(bad.to(dtype))
    assert all_finite(torch.empty(0, dtype=dtype))
    assert all_finite(torch.tensor([1, 2]))


def checkpoint(directory: Path) -> WeightStore:
    """Twelve tensors in one file, and weights that cut, scale and keep them."""
    directory.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i:02d}": torch.randn(64, 32, generator=generator) for i in range(12)}
    if not (directory / "model.safetensors").is_file():
        save_file(tensors, directory / "model.safetensors")
    made: dict[str, Weight] = {}
    for i, name in enumerate(tensors):
        source = Source(name, (64, 32), torch.float32)
        expr = (source, Take(source, i % 2, tuple(range(0, 32, 2))), Affine(source, 2.0))[i % 3]
        made[name] = Weight(name, expr)
    return WeightStore(made, CheckpointSource(directory))


def entries(weights: WeightStore, pause: float = 0.0) -> dict[str, Entry]:
    def entry(name: str) -> Entry:
        expr = weights[name].expr

        def pieces(size: int) -> Any:
            for piece in weights.pieces(name, 2048):
                time.sleep(pause)
                yield piece

        return Entry(
            expr.shape, expr.dtype, lambda: weights.evaluate(name), pieces=pieces, key=lambda: digest(weights, expr)
        )

    return {name: entry(name) for name in weights}


def write(directory: Path, weights: WeightStore, pause: float = 0.0) -> list[str]:
    with replacing(directory, 0) as temporary:
        journal = Journal(temporary)
        write_sharded(temporary, "model", entries(weights, pause), 10_000, journal)
        journal.close()
    return journal.kept


def contents(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


class Stop(Exception):
    """What ends a save in the middle."""


def interrupted(directory: Path, weights: WeightStore, after: int) -> None:
    """Leave `directory` as a kill after `after` finished shards leaves it."""

    class Stopping(Journal):
        def finished(self, line: Any) -> None:
            super().finished(line)
            if len(list(self.directory.glob("*.safetensors"))) == after:
                raise Stop

    directory.mkdir()
    with pytest.raises(Stop):
        write_sharded(directory, "model", entries(weights), 10_000, Stopping(directory))


def test_finished_shards_are_kept_and_others_written_again(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path / "in")
    write(tmp_path / "whole", weights)
    want = contents(tmp_path / "whole")
    shards = [name for name in want if name.endswith(".safetensors")]
    assert len(shards) > 4
    interrupted(tmp_path / ".out.partial", weights, 3)
    before = weights.source.bytes_read  # type: ignore[union-attr]
    assert write(tmp_path / "out", weights) == shards[:3]
    assert contents(tmp_path / "out") == want
    assert weights.source.bytes_read - before < before  # type: ignore[union-attr]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


@pytest.mark.parametrize("change", ["bytes", "source", "plan", "journal"])
def test_what_changed_is_not_kept(tmp_path: Path, change: str) -> None:
    weights = checkpoint(tmp_path / "in")
    partial = tmp_path / ".out.partial"
    interrupted(partial, weights, 2)
    first = sorted(partial.glob("*.safetensors"))[0]
    if change == "bytes":
        data = bytearray(first.read_bytes())
        data[-1] ^= 1
        first.write_bytes(data)
    elif change == "source":
        tensors = {name: value + 1 for name, value in load_file(tmp_path / "in" / "model.safetensors").items()}
        save_file(tensors, tmp_path / "in" / "model.safetensors")
        weights = checkpoint(tmp_path / "in")
    elif change == "plan":
        weights = weights.with_expr("t00", lambda expr: Affine(expr, 3.0))
    else:
        (partial / "journal.jsonl").write_bytes(b'{"file": "model-00001\xff')
    kept = write(tmp_path / "out", weights)
    assert first.name not in kept
    assert len(kept) == (1 if change in ("bytes", "plan") else 0)
    write(tmp_path / "whole", weights)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_tensors_in_memory_have_no_identity() -> None:
    assert digest(store(X), X) is None
    assert digest(store(X), Const(torch.ones(3), torch.float32)) is not None


def test_digests_tell_expressions_apart(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path / "in")
    x = Source("t00", (64, 32), torch.float32)
    y = Source("t01", (64, 32), torch.float32)
    every = [x, y, Take(x, 0, (1, 2)), Take(x, 0, (2, 1)), Take(x, 1, (1, 2)), Affine(x, 1.5), Affine(x, 1.5, 1.0)]
    every += [Sum((x, y)), Sum((y, x)), Cat((x, y), 0), Const(torch.zeros(2), torch.float32)]
    every += [Const(torch.zeros(2), torch.bfloat16), Const(torch.zeros(2, 1), torch.float32), Rows(x, 0, 3)]
    assert len({digest(weights, expr) for expr in every}) == len(every)


def test_two_processes_do_not_write_one_artifact(tmp_path: Path) -> None:
    with (
        replacing(tmp_path / "out", 0),
        pytest.raises(ArtifactError, match="another process") as caught,
        replacing(tmp_path / "out", 0),
    ):
        raise AssertionError("both write")
    assert caught.value.code == "being_written"


def test_a_tensor_that_several_weights_are_made_of_is_read_once(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path / "in")
    read: Counter[str] = Counter()

    class Counting(CheckpointSource):
        def get(self, name: str) -> torch.Tensor:
            read[name] += 1
            return super().get(name)

    x = Source("t00", (64, 32), torch.float32)
    halves = {f"half{i}": Weight(f"half{i}", Take(x, 0, tuple(range(32 * i, 32 * i + 32)))) for i in range(2)}
    bias = {"bias": Weight("bias", MatMul(x, Const(torch.ones(32), torch.float32), torch.float32))}
    shared = WeightStore({**halves, **bias}, Counting(tmp_path / "in"))
    once = _reading_once(shared, set(shared))
    for name in once:
        assert torch.equal(once.evaluate(name), weights.with_weight(shared[name]).evaluate(name))
    assert read == {"t00": 1}
    assert not once.source.held  # type: ignore[union-attr]


def test_a_tensor_that_is_held_serves_rows_and_goes(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path / "in")
    x = Source("t00", (64, 32), torch.float32)
    bias = Weight("bias", MatMul(x, Const(torch.ones(32), torch.float32), torch.float32))
    columns = Weight("columns", Take(x, 1, (1, 2, 5)))
    once = _reading_once(WeightStore({"bias": bias, "columns": columns}, weights.source), {"bias", "columns"})
    before = weights.source.bytes_read  # type: ignore[union-attr]
    once.evaluate("bias")
    assert set(once.source.held) == {"t00"}  # type: ignore[union-attr]
    pieces = list(once.pieces("columns", 100))
    assert len(pieces) > 4
    assert torch.equal(torch.cat(pieces), weights.with_weight(columns).evaluate("columns"))
    assert not once.source.held  # type: ignore[union-attr]
    assert weights.source.bytes_read - before == 2 * 64 * 32 * 4  # type: ignore[union-attr]


def test_a_killed_save_is_resumed(tmp_path: Path) -> None:
    """Three real kills at moments spread over the save; the last run finishes it."""
    write(tmp_path / "whole", checkpoint(tmp_path / "in"))
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "import test_streaming as t; base = Path(sys.argv[2]); print('go', flush=True);"
        "print(len(t.write(base / 'out', t.checkpoint(base / 'in'), float(sys.argv[3]))))"
    )

    def start(pause: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path), str(pause)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    begun = 0
    partial = tmp_path / ".out.partial"
    for kill in range(1, 4):
        with start(0.01) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "go\n"
            deadline = time.monotonic() + 60
            while len(list(partial.glob("*.safetensors"))) < 2 * kill and time.monotonic() < deadline:
                time.sleep(0.002)
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        begun = len(list(partial.glob("*.safetensors")))
    with start(0.0) as child:
        kept = int(child.communicate()[0].split()[-1])
    assert child.returncode == 0
    assert begun - 1 <= kept <= begun
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / ".out.partial").exists()


def test_entries_without_rows_are_written_whole(tmp_path: Path) -> None:
    entry = Entry((3, 2), torch.float32, lambda: torch.ones(3, 2))
    write_sharded(
        tmp_path, "model", {"a": entry, "b": replace(entry, shape=(), make=lambda: torch.tensor(2.0))}, 1 << 20
    )
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["a"], torch.ones(3, 2))
    assert float(found["b"]) == 2.0
    with pytest.raises(ArtifactError, match="'a'"):
        write_sharded(tmp_path, "other", {"a": replace(entry, make=lambda: torch.ones(2, 2))}, 1 << 20)
