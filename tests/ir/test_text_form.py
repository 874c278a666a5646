"""The text form: exact round trips, stable fingerprints, readable diffs, and a parser that trusts nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from torch import fx

from graphopt.diagnostics import ArtifactError
from graphopt.frontend import capture_config
from graphopt.ir.program import Program
from graphopt.ir.text import diff_text, fingerprint, parse_program, print_program

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
MAKE = """
import transformers
from graphopt.frontend import capture_config
from graphopt.ir.text import fingerprint
print(fingerprint(capture_config(transformers.Qwen2Config(num_key_value_heads=2, **{})))) 
"""


@pytest.fixture(scope="module")
def program() -> Program:
    config = transformers.Qwen2Config(num_key_value_heads=2, dtype="float32", **SMALL)
    return capture_config(config, dtype=torch.float32)


@pytest.fixture(scope="module")
def text(program: Program) -> str:
    return print_program(program)


def constants(program: Program) -> dict[str, torch.Tensor]:
    return {name: w.expr.value for name, w in program.weights.weights.items() if w.kind == "constant"}


def parse(program: Program, text: str) -> Program:
    return parse_program(text, constants(program), None)


def test_round_trip_is_exact(program: Program, text: str) -> None:
    again = parse(program, text)
    assert print_program(again) == text
    assert fingerprint(again) == fingerprint(program)
    assert diff_text(program, again) == ""
    assert again.entry == program.entry
    assert again.dims == program.dims
    paths = [[node.meta.get("path") for node in p.graph.graph.nodes] for p in (program, again)]
    assert paths[0] == paths[1]
    assert all("val" in node.meta for node in again.graph.graph.nodes)


def test_the_text_is_readable(text: str) -> None:
    lines = text.splitlines()
    assert lines[:3] == ["graphopt 1", "dtype f32", "dim B 1..65536 hint 3"]
    assert "input $input_ids i64[B, S] tokens" in lines
    assert "weight @model.layers.0.self_attn.k_proj.bias parameter f32[16]" in lines
    attentions = [line for line in lines if "= graphopt.attention.default(" in line]
    assert attentions[1].endswith("# model.layers.1.self_attn")
    assert lines[-1].startswith("return logits = %linear")


def test_fingerprint_ignores_names_and_sees_changes(program: Program) -> None:
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(program.graph.graph.nodes):
        copy = mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        if node.op == "call_function":
            copy.name = f"renamed_{i}"
    renamed = replace(program, graph=fx.GraphModule(torch.nn.Module(), graph))
    assert fingerprint(renamed) == fingerprint(program)
    norm = next(n for n in graph.nodes if n.target is torch.ops.graphopt.rms_norm.default)
    norm.args = (*norm.args[:2], 1e-3, *norm.args[3:])
    assert fingerprint(renamed) != fingerprint(program)
    difference = diff_text(program, renamed)
    changed = [line for line in difference.splitlines()[2:] if line[0] in "+-"]
    assert len(changed) == 2
    assert all("model.layers.0.input_layernorm: rms_norm" in line for line in changed)
    weight = program.weights["lm_head.weight"]
    retyped = program.weights.with_weight(replace(weight, aliases=("other",)))
    assert fingerprint(replace(program, weights=retyped)) != fingerprint(program)


def test_fingerprint_is_the_same_in_every_process() -> None:
    script = MAKE.format(SMALL)
    found = set()
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "HF_HUB_OFFLINE": "1"}
        found.add(subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True).stdout)
    assert len(found) == 1
    assert len(found.pop().strip()) == 64


def with_line(text: str, line: str) -> str:
    """The text with one more call before the return."""
    head, _, tail = text.rpartition("return ")
    return f"{head}{line}\nreturn {tail}"


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("%x = os.system($input_ids)", "unknown_op", "os.system"),
        ("%x = __import__($input_ids)", "unknown_op", "__import__"),
        ("%x = operator.attrgetter($input_ids)", "unknown_op", "operator.attrgetter"),
        ("%x = operator.pow(9, 9)", "unknown_op", "operator.pow"),
        ("%x = aten.from_file.default($input_ids)", "unknown_op", "from_file"),
        ("%x = aten.add_.Tensor($input_ids, 1)", "unknown_op", "add_"),
        ("%x = aten.__class__.default($input_ids)", "unknown_op", "__class__"),
        ("%x = aten._resize_output_.default($input_ids)", "unknown_op", "_resize_output_"),
        ("%x = aten._unsafe_index.Tensor($input_ids, [])", "unknown_op", "_unsafe_index"),
        ("%x = aten.save.default($input_ids)", "unknown_op", "save"),
        ("%x = prims.add.default($input_ids, 1)", "unknown_op", "prims"),
        ("%x = aten.add.Tensor($input_ids, 1, alpha=1, beta=2)", "bad_graph", "no argument 'beta'"),
        ("%x = aten.add.Tensor($input_ids, 1, **evil)", "bad_graph", "'*'"),
        ("%x = aten.add.Tensor($nothing, 1)", "bad_graph", "not defined"),
        ("%x = aten.add.Tensor(%later, 1)", "bad_graph", "not defined"),
        ('%x = aten.add.Tensor($input_ids, "1")', "bad_graph", "string"),
        ("%x = aten.add.Tensor($input_ids, 1", "bad_graph", "expected"),
        ("%x = aten.add.Tensor($input_ids, lambda)", "bad_graph", "lambda"),
        ("%x = aten.mm.default($input_ids, $input_ids, $input_ids)", "bad_graph", "not well typed"),
        ("%linear = aten.neg.default($input_ids)", "bad_graph", "no new node name"),
        ("%x; = aten.neg.default($input_ids)", "bad_graph", "expected"),
        ("%x = aten.view.default($input_ids, " + "[" * 50 + "]" * 50 + ")", "too_large", "deeper"),
        ("%x = aten.view.default($input_ids, [" + "9" * 30 + "])", "too_large", "64 bits"),
        ("%x = aten.view.default($input_ids, [" + "1, " * 40_000 + "1])", "too_large", "characters"),
        ("weight @late parameter f32[1]", "bad_graph", "before the first call"),
        ("eval $input_ids", "bad_graph", "cannot begin"),
    ],
)
def test_the_parser_refuses(program: Program, text: str, line: str, code: str, words: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        parse(program, with_line(text, line))
    assert caught.value.code == code
    assert words in str(caught.value)
    place = caught.value.place
    assert place is not None
    assert place.line == text.count("\n")
    assert place.file == "graph.txt"


def test_chains_of_squares_are_refused(program: Program, text: str) -> None:
    lines = ["%s0 = aten.sym_size.int($input_ids, 0)"]
    lines += [f"%s{i + 1} = operator.mul(%s{i}, %s{i})" for i in range(40)]
    with pytest.raises(ArtifactError, match="chain of products"):
        parse(program, with_line(text, "\n".join(lines)))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("graphopt 1", "graphopt 2", "reads version 1"),
        ("graphopt 1", "import os", "expected 'graphopt'"),
        ("dim B 1..65536 hint 3", "dim B 9..2 hint 3", "integer in 0..2"),
        ("dim B 1..65536 hint 3", "dim B.x 1..65536 hint 3", "no new dimension"),
        ("input $input_ids i64[B, S] tokens", "input $input_ids i64[Q, S] tokens", "unknown dimension 'Q'"),
        ("input $input_ids i64[B, S] tokens", 'input $"a=print(1)" i64[B, S] tokens', "identifiers"),
        ("parameter f32[64]", "parameter f31[64]", "no dtype"),
        ("weight @lm_head.weight parameter", "weight @lm_head.weight pickle", "parameter, buffer or constant"),
        ("f32[64, 32]", "f32[99999999999999999, 32]", "integer in"),
        ("constant f32[4]", "constant f32[5]", "the value of constant"),
        ("return logits", "", "cannot begin"),
    ],
)
def test_declarations_are_checked(program: Program, text: str, old: str, new: str, words: str) -> None:
    source = text.replace(old, new, 1)
    if old == "parameter f32[64]":
        source = text.replace("f32[64, 32]", "f31[64, 32]", 1)
    with pytest.raises(ArtifactError, match=words.replace("(", r"\(")):
        parse(program, source)


def test_weight_names_never_reach_generated_source(program: Program, text: str) -> None:
    evil = 'x=__import__("os").system("true"), *'
    quoted = '@"x=__import__(\\"os\\").system(\\"true\\"), *"'
    again = parse(program, text.replace("@model.norm.weight", quoted))
    assert evil in again.weights
    assert "__import__(" not in again.graph.code


def test_a_text_without_end_and_a_huge_one(program: Program, text: str) -> None:
    with pytest.raises(ArtifactError, match="without a return"):
        parse(program, text.rpartition("return ")[0])
    with pytest.raises(ArtifactError) as caught:
        parse(program, "\n" * (1 << 20))
    assert caught.value.code == "too_large"


def test_programs_with_module_calls_have_no_text(program: Program) -> None:
    graph = fx.Graph()
    x = graph.placeholder("input_ids")
    x.meta["input"] = "input_ids"
    graph.output((graph.call_function(os.path.join, (x, x)),))
    with pytest.raises(ArtifactError, match="no aten or graphopt op"):
        print_program(replace(program, graph=fx.GraphModule(torch.nn.Module(), graph)))
