"""Programs for a CPU as library calls: what is rewritten, and that results stay those of the program."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from graphopt.backends import cpu, library, lower
from graphopt.ir.program import Program
from graphopt.passkit import PassRegistry
from graphopt.spec import parse_spec
from tests.tiny import program, tokens

LENGTHS = ((1, 1), (1, 9), (3, 40))


def functions(source: Program) -> Counter[str]:
    """How often the graph of a lowered program calls each of our functions."""
    made = lower(source, "cpu")
    assert made.lowered.graph is not None
    return Counter(n.target.__name__ for n in made.lowered.graph.graph.nodes if hasattr(n.target, "__code__"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3", "neox", "mixtral"])
@pytest.mark.parametrize("packed", [False, True])
def test_results_are_those_of_the_program(name: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to float64 as the program itself, with and without padding, at any size."""
    monkeypatch.setattr(cpu, "PACKED", 1 if packed else 1 << 40)
    monkeypatch.setattr(library, "LARGE", 1 if packed else 1 << 40)
    source = program(name)
    made, plain, exact = lower(source, "cpu"), source.module(), source.module(torch.float64)
    assert bool(made.packed) == packed
    for batch, length in LENGTHS:
        given = {"input_ids": tokens(batch, length)}
        for padding in (torch.ones(batch, length, dtype=torch.int64), padded(batch, length)):
            got, base, true = (run(**given, attention_mask=padding)[0] for run in (made, plain, exact))
            real = padding.bool()
            error, allowed = ((x - true)[real].abs().max() for x in (got, base))
            assert error <= 8 * allowed + 1e-6


def padded(batch: int, length: int) -> torch.Tensor:
    """Rows of which the first is whole and each next begins one place later."""
    return (torch.arange(length) >= torch.arange(batch)[:, None]).long()


def test_a_transformer_becomes_few_calls() -> None:
    found = functions(program("llama"))
    layers = found["attend"]
    assert found == {"gain_norm": 2 * layers + 1, "rotate": 2 * layers, "attend": layers, "visible": 1,
                     "product": 4 * layers + 1, "product_with": 3 * layers}  # fmt: skip


def test_windows_have_masks_of_their_own() -> None:
    """Layers that see alike share one mask; layers with a window another."""
    assert functions(program("gemma2"))["visible"] <= 2


def test_a_cached_program_runs() -> None:
    import graphopt

    spec = parse_spec('{"graphopt": 1, "steps": [{"use": "insert_cache"}]}', registry=PassRegistry())
    source = graphopt.compile(program("llama"), spec, verify="off")
    ids = tokens(2, 7)
    torch.testing.assert_close(
        lower(source, "cpu")(input_ids=ids)[0], source.module()(input_ids=ids)[0], rtol=1e-4, atol=1e-5
    )


def test_other_dtypes_run_as_the_program_does() -> None:
    source, ids = program("llama"), tokens(2, 7)
    made = lower(source, "cpu", dtype=torch.bfloat16)
    assert torch.equal(made(input_ids=ids)[0], source.module(torch.bfloat16)(input_ids=ids)[0])


@pytest.mark.parametrize("after", sorted(library.AFTER))
@pytest.mark.parametrize("rows", [(2, 3), (0, 3), (70, 5)])
def test_what_follows_a_product(after: tuple[str, str], rows: tuple[int, ...]) -> None:
    """Plain and packed weights, small and large products, columns that are not dense."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*rows, 64), torch.randn(96, 64) / 8, torch.randn(96)
    wanted = library.AFTER[after](F.linear(x.double(), weight.double(), bias.double()))
    for given in (weight, library.pack(weight, False), library.pack(weight.t().contiguous(), True)):
        torch.testing.assert_close(library.product(x, given, bias, *after).double(), wanted, rtol=1e-4, atol=1e-4)
    other = torch.randn(96, *rows).movedim(0, -1)
    product = F.linear(x, weight)
    for given in (weight, library.pack(weight, False)):
        for kind, true in (("add", product + other), ("mul", product * other)):
            torch.testing.assert_close(library.product_with(x, given, None, other, kind), true, rtol=1e-4, atol=1e-4)
