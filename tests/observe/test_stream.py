"""Streams within limits keep their bits; two processes find what one does."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.frontend import capture_module
from graphopt.ir.program import Input, Program
from graphopt.observe import Tap, observe, perplexity, stream
from graphopt.observe.spill import Spill
from graphopt.observe.stream import Limits

VOCABULARY = 50


class Model(torch.nn.Module):
    """Three residual layers between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, 16)
        self.up = torch.nn.ModuleList(torch.nn.Linear(16, 24) for _ in range(3))
        self.down = torch.nn.ModuleList(torch.nn.Linear(24, 16) for _ in range(3))
        self.head = torch.nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[B, S, V]`."""
        x = self.embed(input_ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return self.head(x)


def make() -> tuple[Program, list[Tap], list[dict[str, torch.Tensor]]]:
    """A program, taps of every kind and five batches of unequal size."""
    torch.manual_seed(0)
    program = capture_module(Model().eval(), (Input("input_ids", ("B", "S"), torch.int64, "tokens"),))
    relus = [node.name for node in program.graph.graph.nodes if "relu" in str(node.target)]
    adds = [node.name for node in program.graph.graph.nodes if "add.Tensor" in str(node.target)]
    taps = [Tap(name, "moments") for name in relus]
    taps += [Tap(relus[1], "gram", "last"), Tap(adds[0], "cosine", "last", adds[1]), Tap(relus[2], "taylor")]
    generator = torch.Generator().manual_seed(1)
    sizes = (3, 2, 3, 1, 3)
    ids = [torch.randint(0, VOCABULARY, (size, 9), generator=generator) for size in sizes]
    return program, taps, [{"input_ids": each} for each in ids]


def found(
    program: Program, taps: list[Tap], batches: list[dict[str, torch.Tensor]], **more: object
) -> dict[str, object]:
    """All figures of an observation and an evaluation, by name."""
    statistics = observe(program, taps, batches, **more)  # type: ignore[arg-type]
    values = {
        f"{i} {tap.kind} {field.name}": torch.as_tensor(getattr(statistics[tap], field.name))
        for i, tap in enumerate(taps)
        for field in dataclasses.fields(statistics[tap])
    }
    nats, count = perplexity(program, batches, more.get("limits"))  # type: ignore[arg-type]
    return {**values, "nats": torch.tensor(nats, dtype=torch.float64), "count": torch.tensor(count)}


@pytest.fixture(scope="module")
def made() -> tuple[Program, list[Tap], list[dict[str, torch.Tensor]]]:
    return make()


@pytest.mark.parametrize(
    "limits", [Limits(weights=1), Limits(weights=1, activations=0), Limits(weights=2000, activations=2000), Limits()]
)
def test_limits_keep_the_bits(
    made: tuple[Program, list[Tap], list[dict[str, torch.Tensor]]],
    limits: Limits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    want = found(*made)
    monkeypatch.setattr(stream, "PIECE", 500)
    got = found(*made, limits=dataclasses.replace(limits, directory=tmp_path / "spill"))
    assert want.keys() == got.keys()
    for name, value in want.items():
        assert torch.equal(value, got[name]), name  # type: ignore[arg-type]
    assert (tmp_path / "spill").is_dir() == (limits.activations is not None)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_products_by_rows_differ_by_rounding_alone(
    made: tuple[Program, list[Tap], list[dict[str, torch.Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    program, taps, batches = made
    taps = [tap for tap in taps if tap.kind != "taylor"]
    want = found(program, taps, batches, dtype=torch.float64)
    monkeypatch.setattr(stream, "PIECE", 500)
    products = []
    by_rows = stream._by_rows

    def counted(program: Program, node: torch.fx.Node, *rest: Any) -> Any:
        products.append(node.args[1].meta["weight"])  # type: ignore[union-attr]
        return by_rows(program, node, *rest)

    monkeypatch.setattr(stream, "_by_rows", counted)
    got = found(program, taps, batches, dtype=torch.float64, limits=Limits(weights=1, split=True))
    assert len(set(products)) == 7
    for name, value in want.items():
        exact = name in ("nats", "count")
        torch.testing.assert_close(got[name], value, rtol=1e-6 if exact else 1e-12, atol=0 if exact else 1e-12)


def test_spilled_tensors_come_back_with_their_layout(tmp_path: Path) -> None:
    base = torch.randn(4, 6, 5)
    values = {
        "turned": base.transpose(0, 2),
        "part": base[1:, ::2],
        "wide": torch.randn(3, 1).expand(3, 7),
        "flags": torch.tensor([True, False]),
        "half": torch.randn(8).to(torch.bfloat16),
        "empty": torch.empty(0, 3),
        "size": 7,
    }
    spill = Spill(0, tmp_path, 2)
    kept = [spill.put(0, dict(values)), spill.put(1, {"x": base}), spill.put(0, dict(values))]
    assert spill.written > 0
    back = spill.get(kept[2])
    assert back["size"] == 7
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(back[name], value)
            assert (back[name].stride(), back[name].dtype) == (value.stride(), value.dtype)
    assert back["turned"].untyped_storage().data_ptr() == back["part"].untyped_storage().data_ptr()
    assert torch.equal(spill.get(kept[1])["x"], base)


def test_two_processes_find_what_one_does(
    made: tuple[Program, list[Tap], list[dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    """Bits are the same but for Gram matrices, whose sums are added up in another order."""
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch\n"
        "from test_stream import found, make\n"
        "from graphopt.observe.distributed import join, leave, mine, rank, together\n"
        "joined = join()\n"
        "assert joined and len(mine(5)) == (2, 3)[rank()]\n"
        "program, taps, batches = make()\n"
        "both = [found(program, taps, batches), found(program, taps, batches[:1])]\n"
        "torch.save(both, f'{sys.argv[1]}/{rank()}.pt')\n"
        "together()\n"
        "leave(joined)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, str(script), str(tmp_path)], check=True, timeout=600)
    program, taps, batches = made
    for number, part in enumerate((batches, batches[:1])):
        want = found(program, taps, part)
        for rank in range(2):
            got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)[number]
            assert want.keys() == got.keys()
            for name, value in want.items():
                if "gram" in name:
                    torch.testing.assert_close(got[name], value, rtol=1e-14, atol=1e-12)
                else:
                    assert torch.equal(got[name], value), name  # type: ignore[arg-type]
