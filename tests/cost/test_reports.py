"""Pages about programs: explain, diff, cost and the summary of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from graphopt.cost import cost
from graphopt.ir.program import Applied
from graphopt.report.costs import cost_page
from graphopt.report.diff import diff, diff_page
from graphopt.report.explain import explain, explain_json
from graphopt.report.page import fold
from graphopt.report.run_report import markdown, plain, run_report

MHA = """\
llama  (LlamaForCausalLM)
  parameters  28,384  (110.88 KiB in float32)
  input       input_ids int64[B, S]
  input       attention_mask int64[B, S]
  input       position_ids int64[B, S]
  dims        B 1..65,536, S 1..1,048,576
  embedding   64 x 32, tied to the head
model.layers.{0..2}  3 blocks, each
  self_attn   4 heads x 8, 4 KV heads (MHA), rotary, causal, no bias
  mlp         gated silu, 32 -> 48 -> 32, no bias
  norm        RMSNorm, pre
  parameters  8,768  (34.25 KiB)
  FLOPs       17,408*B*S + 128*B*S**2
  KV bytes    256*B*S
end
  norm        RMSNorm
  head        32 -> 64, tied
total
  parameters  28,384
  FLOPs       56,320*B*S + 384*B*S**2
  KV bytes    768*B*S
"""


def lines(program: Any) -> list[str]:
    """The lines of a program's page."""
    return explain(program).plain().splitlines()


def test_a_page_says_all(program_of: Any) -> None:
    assert explain(program_of("llama")).plain() == MHA
    assert explain(program_of("llama")).rich().plain == MHA


def test_pages_name_what_families_differ_in(program_of: Any) -> None:
    gqa = "\n".join(lines(program_of("llama_gqa")))
    assert "4 heads x 8, 2 KV heads (GQA), rotary, causal, no bias" in gqa
    assert "tied" not in gqa
    neox = "\n".join(lines(program_of("neox")))
    assert "LayerNorm, pre, attention and feed-forward in parallel" in neox
    assert "packed qkv, biases" in neox
    gpt2 = "\n".join(lines(program_of("gpt2")))
    assert "positions   learnt, 64 x 32" in gpt2
    assert "gelu (tanh form), 32 -> 128 -> 32, biases" in gpt2
    gemma = "\n".join(lines(program_of("gemma2")))
    assert "model.layers.{0,2}  2 blocks, each" in gemma
    assert "window 8, softcap 50" in gemma
    assert "RMSNorm, sandwich" in gemma
    assert "q and k normed" in "\n".join(lines(program_of("qwen3")))


def test_uneven_and_removed_layers_show(program_of: Any, uneven: Any) -> None:
    before = program_of("llama_gqa")
    after = uneven(before)
    applied = Applied(
        step="skip",
        options={},
        effect="approximate",
        edits=({"edit": "skip", "block": "model.layers.2", "index": 2, "parts": [], "why": ""},),
        declines=({"candidate": "model.layers.1", "reason": "kept"},),
        certificate={"level": "full", "largest_relative_error": 1e-15, "tolerance": 1e-12, "reference": "emulation"},
        before={"parameters": 2000, "perplexity": 10.0, "kv_bytes": 4096, "at": {"B": 1, "S": 512}},
        after={"parameters": 1500, "perplexity": 11.0, "kv_bytes": 2048, "at": {"B": 1, "S": 512}},
        place="spec.yaml:4:5",
    )
    after = replace(after, trail=(applied,))
    page = "\n".join(lines(after))
    assert "model.layers.0  1 block" in page
    assert "2 heads x 8, 1 KV head (MQA)" in page
    assert "model.layers.2  removed by skip (spec.yaml:4:5)" in page
    assert "perplexity 10.000 -> 11.000" in page
    assert json.loads(json.dumps(explain_json(after)))["removed"][0]["path"] == "model.layers.2"

    report = run_report(after)
    assert plain(report).splitlines()[2].split("  ")[0] == "skip"
    assert "1,500 (-25.0%)" in plain(report)
    assert "2.00 KiB (-50.0%)" in plain(report)
    assert "equals the emulation within 1.0e-15 (allowed 1.0e-12)" in plain(report)
    table = markdown(report).splitlines()
    assert table[0] == "| step | parameters | KV bytes | perplexity | edits | declined | certificate |"
    assert len({line.count("|") for line in table[:4]}) == 1
    assert table[-1] == "FLOPs and KV bytes at B=1, S=512"


def test_a_difference_begins_with_views(program_of: Any, uneven: Any) -> None:
    before = program_of("llama_gqa")
    after = uneven(before)
    found = diff(before, after, graph=True)
    assert not found["equal"]
    assert found["views"]["removed"] == ["model.layers.2"]
    assert found["views"]["changed"][0]["changes"] == {
        "self_attn heads": [4, 2],
        "self_attn KV heads": [2, 1],
        "mlp neurons": [48, 16],
    }
    assert found["cost"]["parameters"] == [cost(before).parameters, cost(after).parameters]
    assert found["ops"]["graphopt.attention.default"] == [3, 2]
    assert "aten.linear" in found["graph"]
    page = diff_page(before, after).plain()
    assert "model.layers.2: removed" in page
    assert "gone model.layers.2.*  9 weights" in page
    assert page.index("mlp neurons") < page.index("mlp.gate_proj.weight") < page.index("FLOPs")


def test_a_program_equals_itself(program_of: Any) -> None:
    found = diff(program_of("gemma2"), program_of("gemma2"), graph=True)
    assert found["equal"]
    assert found["graph"] == ""


def test_names_fold() -> None:
    assert fold(["a.0.b", "a.1.b", "a.2.b", "a.5.b"]) == ["a.{0..2,5}.b"]
    assert fold(["a.3.b"]) == ["a.3.b"]
    assert fold(["a.0.b", "a.1.c"]) == ["a.0.b", "a.1.c"]
    assert fold(["a.0.1", "a.1.0"]) == ["a.0.1", "a.1.0"]
    assert fold([f"a.{i}.b.{j}" for i in range(2) for j in range(3)]) == ["a.{0,1}.b.{0..2}"]


def test_parts_fold_on_the_page_of_costs(program_of: Any) -> None:
    page = cost_page("tiny", cost(program_of("llama")), {"B": 1, "S": 4}).plain()
    assert "model.layers.{0..2}.self_attn" in page
    assert "FLOPs       231,424  = 56,320*B*S + 384*B*S**2" in page
