"""insert_cache on graphs of every kind: places, masks, encoders, and what it declines and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.compiler.verify_decode import verify_decode
from graphopt.diagnostics import VerifyError
from graphopt.frontend.export import DEFAULT_DIMS, capture_module
from graphopt.ir.program import Dim, Input, Program
from graphopt.ir.rewriter import Rewriter
from graphopt.ir.run import Runner
from graphopt.passkit import Context, PassRegistry, Plan
from graphopt.passkit.edits import apply_edits
from graphopt.runtime import Decoder, generate, with_cache
from graphopt.runtime.stages import Stage
from graphopt.spec import LoadedSpec, parse_spec
from graphopt.views import Views
from tests import tiny

TOKENS = Input("ids", ("B", "S"), torch.int64, "tokens")
VOCABULARY, WIDTH, HEADS = 31, 16, 4


def plan_of(program: Program, layers: tuple[int, ...] | None = None) -> Plan:
    views = Views(program)
    chosen = tuple(range(len(views.blocks))) if layers is None else layers
    return PassRegistry().get("insert_cache")().plan(Context(views, chosen))


def spec_of(*steps: dict[str, Any]) -> LoadedSpec:
    return parse_spec(json.dumps({"graphopt": 1, "steps": list(steps)}), registry=PassRegistry())


class Toy(nn.Module):  # type: ignore[misc]
    """One attention between an embedding and a head; `mask` gives its mask and `place` adds to the embedding."""

    def __init__(
        self,
        mask: Callable[[int, Tensor], Tensor] | None = None,
        place: Callable[[Tensor, Any], Tensor] | None = None,
        causal: bool = True,
        mix: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(64, WIDTH))
        self.slopes = nn.Parameter(torch.rand(HEADS))
        self.mask, self.place, self.causal, self.mix = mask, place, causal, mix

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        x = self.embed(ids)
        if self.place is not None:
            x = x + self.place(ids, self)
        if self.mix is not None:
            x = x + self.mix(x)
        q, k, v = (y.view(batch, length, HEADS, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        mask = None if self.mask is None else self.mask(length, self.slopes)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal and mask is None)
        return F.linear(x + self.out(y.transpose(1, 2).reshape(batch, length, -1)), self.embed.weight)


def toy(**choices: Any) -> Program:
    return capture_module(Toy(**choices).double(), (TOKENS,))


def causal(length: int) -> Tensor:
    return torch.arange(length)[:, None] >= torch.arange(length)[None]


def sinusoid(ids: Tensor, model: Toy) -> Tensor:
    angle = torch.arange(ids.shape[1])[:, None] * 0.3 ** torch.arange(WIDTH // 2)
    return torch.cat([angle.sin(), angle.cos()], -1)


PLACES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "table by slice": lambda ids, model: model.table[: ids.shape[1]],
    "table by index": lambda ids, model: F.embedding(torch.arange(ids.shape[1]), model.table),
    "table with a batch axis": lambda ids, model: model.table[None, : ids.shape[1]].expand(ids.shape[0], -1, -1),
    "offset and step": lambda ids, model: F.embedding(torch.arange(2, 2 + ids.shape[1]), model.table),
    "sinusoid": sinusoid,
}
MASKS: dict[str, Callable[[int, Tensor], Tensor]] = {
    "bool": lambda n, slopes: causal(n)[None, None],
    "window": lambda n, slopes: (causal(n) & (torch.arange(n)[:, None] - torch.arange(n)[None] < 5))[None, None],
    "chunks": lambda n, slopes: (causal(n) & (torch.arange(n)[:, None] // 4 == torch.arange(n)[None] // 4))[None, None],
    "ALiBi": lambda n, slopes: (
        (torch.arange(n)[None] - torch.arange(n)[:, None])[None] * slopes[:, None, None]
    ).masked_fill(~causal(n), -1e30)[None],
    "ALiBi by column": lambda n, slopes: (torch.arange(n) * slopes[:, None, None]).masked_fill(~causal(n), -1e30)[None],
}


@pytest.mark.parametrize("name", PLACES)
def test_places_that_the_graph_counts_itself(name: str) -> None:
    program = toy(place=PLACES[name])
    cached, reason = with_cache(program)
    assert reason is None
    assert {spec.role for spec in cached.entry.inputs} == {"tokens", "positions", "lengths", "spans", "cache"}
    verify_decode(program, cached, None, "insert_cache")


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_rows_and_columns_are_built_for_new_rows_and_cached_columns(name: str) -> None:
    program = toy(mask=MASKS[name])
    cached, reason = with_cache(program)
    assert reason is None
    verify_decode(program, cached, None, "insert_cache")


def convolved(x: Tensor) -> Tensor:
    """Each feature with its two predecessors in time."""
    kernel = torch.ones(WIDTH, 1, 3, dtype=x.dtype)
    return F.conv1d(F.pad(x.transpose(1, 2), (2, 0)), kernel, groups=WIDTH).transpose(1, 2)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"causal": False}, "sees later tokens"),
        ({"mask": lambda n, slopes: (causal(n) | causal(n).T)[None, None]}, "does not hide later tokens"),
        ({"mix": lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1]}, "along the sequence"),
        ({"mix": lambda x: x.cumsum(1)}, "along the sequence"),
        ({"mix": lambda x: convolved(x)}, "along the sequence"),
        ({"mix": lambda x: x.mean(1, keepdim=True)}, "along the sequence"),
        ({"mix": lambda x: (x @ x.transpose(1, 2)).tril() @ x}, "compares tokens with each other"),
        ({"mix": lambda x: torch.linalg.qr(x.transpose(1, 2))[0][:, :, :1].transpose(1, 2)}, "keep tokens apart"),
    ],
)  # fmt: skip
def test_what_cannot_decode_is_declined_by_node(choices: dict[str, Any], words: str) -> None:
    plan = plan_of(toy(**choices))
    assert not plan.edits
    assert words in plan.declines[0].reason
    if "mix" in choices:
        assert "%" in plan.declines[0].reason


def test_a_spec_that_cannot_is_refused_with_the_reason() -> None:
    program = toy(mix=lambda x: x.cumsum(1))
    with pytest.raises(graphopt.diagnostics.PlanError, match="nothing to change") as caught:
        graphopt.compile(program, spec_of({"use": "insert_cache"}))
    assert any("%cumsum" in note for note in caught.value.diagnostics[0].notes)


class Translator(nn.Module):  # type: ignore[misc]
    """An encoder over one text and a decoder over another that looks back at it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.inner, self.own = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.ask, self.answer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2).flatten(2)

    def forward(self, source: Tensor, ids: Tensor) -> Tensor:
        encoded = self.embed(source) + self.place(torch.arange(source.shape[1]))
        encoded = encoded + self.attend(*self.inner(encoded).chunk(3, -1), is_causal=False)
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        x = x + self.attend(*self.own(x).chunk(3, -1), is_causal=True)
        x = x + self.attend(self.ask(x), *self.answer(encoded).chunk(2, -1), is_causal=False)
        return F.linear(x, self.embed.weight)


def test_cross_attention_is_computed_once_and_decodes() -> None:
    model = Translator().double()
    source = Input("source", ("B", "T"), torch.int64, "values")
    program = capture_module(model, (source, TOKENS), dims=(*DEFAULT_DIMS, Dim("T", 1, 64, 11)))
    plan = plan_of(program)
    assert len(plan.edits) == 1
    assert [decline.reason for decline in plan.declines] == [
        "its keys do not grow with the decoded text: they are computed once"
    ] * 2
    cached, _ = with_cache(program)
    decoder = Decoder(cached, torch.float64)
    products = [n for n in decoder.lowered.order if n.target is torch.ops.aten.linear.default]
    early = {str(n.args[1]) for n in products if decoder.lowered.stage[n] == Stage.START}
    assert early == {"inner_weight", "answer_weight"}
    texts = torch.randint(0, VOCABULARY, (2, 9)), torch.randint(0, VOCABULARY, (2, 7))
    with torch.no_grad():
        expected = model(*texts)
    held = decoder.cache(2, 8, source=texts[0])
    for start, count in ((0, 4), (4, 1), (5, 2)):
        logits = decoder.step(held, texts[1][:, start : start + count])[0]
        torch.testing.assert_close(logits, expected[:, start : start + count], rtol=1e-9, atol=1e-9)
        held.commit(count)
    with pytest.raises(TypeError, match="'source' is missing"):
        decoder.cache(2, 8)


def test_slots_follow_the_blocks_that_exist() -> None:
    steps = [
        {"use": "skip_layers", "layers": [1]},
        {"use": "prune_heads", "keep": "50%", "unit": "kv_group", "score": "magnitude"},
    ]
    steps.append({"use": "insert_cache"})
    program = graphopt.compile(tiny.program("llama"), spec_of(*steps))
    shapes = [spec.shape for spec in program.entry.inputs if spec.role == "cache"]
    assert shapes == [("B", 1, "C", 8)] * 4
    assert program.trail[-1].certificate["reference"] == "stateless run"


@pytest.mark.parametrize("name", ["gemma2", "mistral"])
def test_layers_may_have_different_kv_heads_and_windows(name: str) -> None:
    fewer = {"use": "regroup_kv", "kv_heads": "1", "init": "mean", "where": {"layers": [1]}}
    stateless = graphopt.compile(tiny.program(name), spec_of(fewer), verify="off")
    ids, mask = tiny.tokens(3, 14, seed=2), torch.ones(3, 14, dtype=torch.long)
    mask[1, :4], mask[2, :11] = 0, 0
    run = Runner(stateless, torch.float64, "cpu")
    expected = generate(run, ids, padding=mask, max_new_tokens=8)
    # In the shorter row, what is written fills the window and goes on behind it.
    for windows in ("whole", "ring"):
        program = graphopt.compile(stateless, spec_of({"use": "insert_cache", "windows": windows}), verify="off")
        heads = [spec.shape[1] for spec in program.entry.inputs if spec.role == "cache"]
        assert sorted(heads) == [1, 1, 2, 2, 2, 2]
        got = generate(Decoder(program, torch.float64), ids, padding=mask, max_new_tokens=8)
        assert got.tolist() == expected.tolist()


def test_a_wrong_cache_is_not_certified() -> None:
    program = tiny.program("mistral")
    views = Views(program)
    right = plan_of(program)
    cached = apply_edits(program, views, right.edits)
    rewriter = Rewriter(cached)
    core = next(n for n in rewriter.graph.nodes if n.target is torch.ops.graphopt.cached_attention.default)
    core.args = (*core.args[:11], 7, core.args[12])
    with pytest.raises(VerifyError, match="differs from the stateless run"):
        verify_decode(program, rewriter.finish(), None, "insert_cache")


def test_costs_are_those_of_a_full_cache() -> None:
    from graphopt.cost import cost

    program = tiny.program("llama")
    cached, _ = with_cache(program)
    before, after = cost(program), cost(cached)
    assert after.at(B=2, S=5, C=5) == before.at(B=2, S=5)
    assert after.kv_bytes_per_token == before.kv_bytes_per_token == 3 * 2 * 2 * 8 * 4
    step = after.at(B=1, S=1, C=100)["flops"]
    assert step == before.at(B=1, S=1)["flops"] + 99 * 3 * 4 * 4 * 8


def test_padding_is_no_input_any_more_and_the_text_form_reads_back() -> None:
    from graphopt.ir.text import fingerprint, parse_program, print_program

    cached, _ = with_cache(tiny.program("bloom"))
    assert not any(spec.role == "padding" for spec in cached.entry.inputs)
    constants = {
        w.name: cached.weights.evaluate(w.name) for w in cached.weights.weights.values() if w.kind == "constant"
    }
    parsed = parse_program(print_program(cached), constants, cached.weights.source)
    assert fingerprint(replace(parsed, origin=cached.origin)) == fingerprint(cached)
