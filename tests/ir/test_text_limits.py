"""What the text form can say and where its limits are, each limit tried at the last value that passes and the next."""

from __future__ import annotations

import math
import re

import pytest
import torch

from graphopt.diagnostics import ArtifactError
from graphopt.ir import text_parse
from graphopt.ir.program import Program
from graphopt.ir.text import diff_text, fingerprint, print_program
from graphopt.ir.weights import Const, Source, Weight
from tests.ir.conftest import TABLE, TEXT, make

RETURN = "return logits = %shown, hidden = %norm\n"


def with_calls(*lines: str) -> str:
    """The text by hand with more calls before its return."""
    return TEXT.replace(RETURN, "".join(line + "\n" for line in lines) + RETURN)


def refused(text: str, code: str = "bad_graph") -> ArtifactError:
    with pytest.raises(ArtifactError) as caught:
        make(text)
    assert caught.value.code == code, caught.value
    return caught.value


def arguments(call: str) -> tuple[object, ...]:
    """The arguments of one more call as they are read."""
    return tuple(make(with_calls(f"%x = {call}")).nodes["x"].args)


# --- what is said --------------------------------------------------------------------------------------------------


def test_the_text_is_its_own_round_trip(by_hand: Program) -> None:
    printed = print_program(by_hand)
    assert print_program(make(printed)) == printed
    assert [line.split("  #")[0] for line in printed.splitlines()] == [
        line.split("  #")[0] for line in TEXT.splitlines()
    ]
    assert diff_text(by_hand, make(printed)) == ""
    assert fingerprint(make(printed)) == fingerprint(by_hand)


def test_declarations_mean_what_they_say(by_hand: Program) -> None:
    assert by_hand.dtype == torch.bfloat16
    assert [(dim.name, dim.low, dim.high, dim.hint) for dim in by_hand.dims] == [("B", 1, 8, 2), ("S", 1, 64, 5)]
    spec = by_hand.entry.inputs[1]
    assert (spec.name, spec.shape, spec.dtype, spec.role) == ("mask", ("B", "S"), torch.int64, "padding")
    assert by_hand.entry.outputs == ("logits", "hidden")
    embed, table = by_hand.weights["embed.weight"], by_hand.weights["table"]
    assert isinstance(embed.expr, Source)
    assert (embed.expr.name, embed.expr.shape, embed.expr.dtype) == ("embed.weight", (7, 4), torch.bfloat16)
    assert embed.aliases == ("head.weight",)
    assert isinstance(table.expr, Const)
    assert torch.equal(table.expr.value, TABLE)
    assert table.kind == "constant"
    assert by_hand.nodes["wide"].meta["path"] == "model.layers.0"
    assert "path" not in by_hand.nodes["seen"].meta


def test_several_aliases_and_weights_that_nothing_reads() -> None:
    text = TEXT.replace("aliases @head.weight", 'aliases @head.weight, @"other name"').replace(
        "weight @table", "weight @spare parameter f32[2] unread\nweight @table"
    )
    program = make(text)
    assert program.weights["embed.weight"].aliases == ("head.weight", "other name")
    assert "spare" in program.weights
    assert "spare" not in program.weight_nodes
    printed = print_program(program)
    assert "weight @spare parameter f32[2] unread" in printed.splitlines()
    assert ' aliases @head.weight, @"other name"' in printed
    assert print_program(make(printed)) == printed


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("[1, -2]", [1, -2]), ("[1, 2,]", [1, 2]), ("(1,)", (1,)), ("()", ()), ("[]", []), ("[[1], [2]]", [[1], [2]]),
        ("0.5", 0.5), ("-1.5e-07", -1.5e-07), ("2e3", 2000.0), ("inf", math.inf), ("-inf", -math.inf),
        ("True", True), ("False", False), ("None", None), ("-0", 0), ("7", 7), ("bf16", torch.bfloat16),
        ("device", torch.device("cpu")), ("strided", torch.strided), ("contiguous_format", torch.contiguous_format),
        ("slice(1, None, 2)", slice(1, None, 2)), ("9223372036854775807", 2**63 - 1), ("-9223372036854775808", -(2**63)),
    ],
)  # fmt: skip
def test_values_of_arguments(said: str, value: object) -> None:
    line = text_parse._Line("graph.txt", 1, said)
    read = text_parse._Parser("graph.txt", {}, None)._value(line, None, None)
    assert read == value
    assert type(read) is type(value)
    line.end()


def test_nan_is_read() -> None:
    line = text_parse._Line("graph.txt", 1, "nan")
    assert math.isnan(text_parse._Parser("graph.txt", {}, None)._value(line, None, None))


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -2.5, 1e-9, math.inf, "tanh", torch.float16, torch.int8, torch.strided, torch.channels_last,
     slice(None, 3, None), [1, [2, 3]], (1,), (1, 2), ()],
)  # fmt: skip
def test_values_print_as_they_are_read(value: object) -> None:
    from graphopt.ir.text import _print_value

    line = text_parse._Line("graph.txt", 1, _print_value(value, {}))
    read = text_parse._Parser("graph.txt", {}, None)._value(line, torch.ops.aten.gelu.default, "approximate")
    assert read == value
    assert type(read) is type(value)


def test_a_value_without_text_is_refused() -> None:
    from graphopt.ir.text import _print_value

    assert _print_value(torch.device("cpu"), {}) == "device"
    with pytest.raises(ArtifactError, match="type Tensor has no text form") as caught:
        _print_value(TABLE[:1, :1], {})
    assert caught.value.code == "not_textual"


def test_named_arguments_and_strings() -> None:
    program = make(
        with_calls('%x = aten.gelu.default(%norm, approximate="tanh")', "%y = aten.add.Tensor(%x, %x, alpha=2)")
    )
    assert program.nodes["x"].kwargs == {"approximate": "tanh"}
    assert program.nodes["y"].kwargs == {"alpha": 2}
    assert '%x = aten.gelu.default(%norm, approximate="tanh")' in print_program(program)
    assert arguments('aten.div.Tensor_mode(%norm, %norm, rounding_mode="floor")')
    refused(with_calls('%y = aten.add.Tensor(%norm, %norm, alpha="2")'))
    assert "alpha" in str(refused(with_calls("%y = aten.add.Tensor(%norm, 1, alpha=2, alpha=2)")))
    assert "positional" in str(refused(with_calls("%y = aten.add.Tensor(%norm, alpha=2, 1)")))
    assert "takes no argument" in str(refused(with_calls("%y = operator.add(1, b=2)")))


def test_paths_are_comments_with_escapes() -> None:
    program = make(with_calls(r"%x = aten.neg.default(%norm)  # odd\"path\u00e9"))
    assert program.nodes["x"].meta["path"] == 'odd"pathé'
    assert print_program(make(print_program(program))) == print_program(program)
    refused(with_calls(r"%x = aten.neg.default(%norm)  # bad\q"))


def test_sizes_are_computed_in_python() -> None:
    program = make(
        with_calls(
            "%s = aten.sym_size.int(%norm, 1)",
            "%t = operator.floordiv(%s, 2)",
            "%u = torch.sym_max(%t, 1)",
            "%x = aten.slice.Tensor(%norm, 1, 0, %u)",
        ).replace("hidden = %norm", "hidden = %x")
    )
    got = program.module()(ids=torch.zeros(2, 7, dtype=torch.int64))[1]
    assert got.shape == (2, 3, 4)
    assert print_program(make(print_program(program))) == print_program(program)


# --- where it ends -------------------------------------------------------------------------------------------------


def test_depth_of_arguments() -> None:
    deepest = text_parse.DEEPEST_ARGUMENT
    parser = text_parse._Parser("graph.txt", {}, None)
    for depth, fits in ((deepest, True), (deepest + 1, False)):
        line = text_parse._Line("graph.txt", 1, "[" * depth + "]" * depth)
        if fits:
            parser._value(line, None, None)
            assert line.depth == 0
        else:
            with pytest.raises(ArtifactError, match=f"deeper than {deepest}"):
                parser._value(line, None, None)
    # Side by side is not deep.
    parser._value(text_parse._Line("graph.txt", 1, "[" + "[1], " * 40 + "]"), None, None)


def test_length_of_lines_and_names() -> None:
    longest = text_parse.LONGEST_LINE
    assert text_parse._Line("graph.txt", 1, "#" * longest).comment == "#" * longest
    with pytest.raises(ArtifactError, match=f"a line of {longest + 1} characters, the limit is {longest}"):
        text_parse._Line("graph.txt", 1, "#" * (longest + 1))
    name = "n" * text_parse.LONGEST_NAME
    assert name in make(TEXT.replace("weight @table", f"weight @{name} buffer f32[1]\nweight @table")).weights
    refused(TEXT.replace("weight @table", f"weight @{name}n buffer f32[1]\nweight @table"), "too_large")
    make(TEXT.replace("dim S", f"dim {name} 1..2 hint 2\ndim S"))
    refused(TEXT.replace("dim S", f"dim {name}n 1..2 hint 2\ndim S"))


def test_size_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_parse, "MOST_CHARACTERS", len(TEXT))
    monkeypatch.setattr(text_parse, "MOST_LINES", TEXT.count("\n"))
    make(TEXT)
    refused(TEXT + " ", "too_large")
    monkeypatch.setattr(text_parse, "MOST_CHARACTERS", 1 << 20)
    refused(TEXT + "\n", "too_large")


def test_integers_of_declarations() -> None:
    line = text_parse._Line("graph.txt", 1, "0 7 8 -1 000000000000000000007 00000000000000000007")
    assert (line.integer(7), line.integer(7)) == (0, 7)
    for _ in range(3):
        with pytest.raises(ArtifactError, match=r"integer in 0\.\.7"):
            line.integer(7)
    assert line.integer(7) == 7


def test_ranges_of_dimensions() -> None:
    make(TEXT.replace("1..8 hint 2", "2..2 hint 2"))
    for wrong in ("0..8 hint 2", "3..8 hint 2", "1..8 hint 9", "9..8 hint 9", "1..8 hint 0", "1..8 hint 1"):
        refused(TEXT.replace("1..8 hint 2", wrong), "too_large" if wrong.endswith("9") else "bad_graph")
    refused(TEXT.replace("dim S", "dim B 1..2 hint 2\ndim S"))


def test_number_of_axes() -> None:
    most = text_parse.MOST_AXES
    make(TEXT.replace("weight @table", f"weight @x buffer f32[{', '.join('1' * most)}]\nweight @table"))
    refused(
        TEXT.replace("weight @table", f"weight @x buffer f32[{', '.join('1' * (most + 1))}]\nweight @table"),
        "too_large",
    )


def test_chains_of_products_end_at_the_widest_integer() -> None:
    lines = ["%s0 = aten.sym_size.int(%norm, 1)", "%s1 = operator.mul(%s0, %s0)"]
    widths = [64, 128]
    while widths[-1] * 2 <= text_parse.WIDEST_INTEGER:
        lines.append(f"%s{len(widths)} = operator.mul(%s{len(widths) - 1}, %s{len(widths) - 1})")
        widths.append(widths[-1] * 2)
    assert widths[-1] == text_parse.WIDEST_INTEGER
    parser = text_parse._Parser("graph.txt", {}, None)
    line = text_parse._Line("graph.txt", 1, "%x")
    wide = make(TEXT).nodes["norm"]
    parser.bits[wide] = text_parse.WIDEST_INTEGER
    assert parser._width(line, line.next, "operator.getitem", [wide, 0]) == 64
    assert parser._width(line, line.next, "aten.mul.Tensor", [wide, wide]) == 64
    parser.bits[wide] = text_parse.WIDEST_INTEGER - 64
    assert parser._width(line, line.next, "operator.mul", [wide, 3]) == text_parse.WIDEST_INTEGER
    assert parser._width(line, line.next, "operator.add", [wide, 3]) == text_parse.WIDEST_INTEGER - 63
    assert parser._width(line, line.next, "operator.neg", []) == 1
    parser.bits[wide] = text_parse.WIDEST_INTEGER
    for called in ("operator.add", "operator.mul", "operator.neg"):
        with pytest.raises(ArtifactError, match="chain of products"):
            parser._width(line, line.next, called, [wide, 3])


# --- what is refused, and where ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("dim S 1..64 hint 5", "dim S 1..64 hint 5 6", "expected the end of the line, found '6'"),
        ("dim S 1..64 hint 5", "dim S 1,64 hint 5", "expected '..', found ','"),
        ("dim S 1..64 hint 5", "dim S 1..64", "expected 'hint', found the end of the line"),
        ("dim S 1..64 hint 5", 'dim "S" 1..64 hint 5', "expected a dimension name"),
        ("input $mask", "input @mask", "a name that begins with '$'"),
        ("input $mask", "input mask", "a name that begins with '$'"),
        ("input $mask", "input $ids", "declared twice"),
        ("[B, S] padding", "[B, S] 7", "expected a role"),
        ("[B, S] padding", "[B, S] pad.ding", "identifiers"),
        ("[B, S] padding", "[B S] padding", "expected ','"),
        ("weight @norm.weight", "weight @embed.weight", "declared twice"),
        ("parameter bf16[4]", "parameter bf16[B]", "expected int"),
        ("constant f32[64, 4]", "constant f32[64, 5]", "the value of constant 'table' is f32[64, 4]"),
        ("constant f32[64, 4]", "constant bf16[64, 4]", "the value of constant 'table' is f32[64, 4]"),
        ("weight @table constant", "weight @tables constant", "the value of constant 'tables' is missing"),
        ("%seen = aten.unsqueeze.default($mask, -1)", "%wide = aten.neg.default($mask)", "no new node name"),
        ("%seen = aten", "%se.en = aten", "no new node name"),
        ("%seen = aten.unsqueeze.default($mask, -1)", "%seen = aten.unsqueeze.default($mask, -1) 3", "end of the line"),
        ("($mask, -1)", "($mask -1)", "expected ','"),
        ("($mask, -1)", "($mask, ])", "expected a value, found ']'"),
        ("($mask, -1)", "($mask, nothing)", "unknown word 'nothing'"),
        ("($mask, -1)", "($mask, slice(1, 2))", "start, stop and step"),
        ("($mask, -1)", "($mask, 999999999999999999999)", "more than 64 bits"),
        ("return logits = %shown", "return logits = 3", "only nodes can be returned"),
        ("return logits = %shown", "return 3 = %shown", "expected the name of a result"),
        ("hidden = %norm\n", "hidden = %norm\n%x = aten.neg.default(%norm)\n", "nothing may follow the return line"),
        ("dtype bf16", "dtype 7", "expected a dtype"),
        ("dtype bf16", "dtype bf61", "'bf61' is no dtype"),
        ("dtype bf16\n", "", "without a return or a dtype line"),
        ("%norm = ", "dim X 1..2 hint 1\n%norm = ", "declarations come before the first call"),
        ('weight @norm.weight', 'weight @"norm\\q"', "bad escape"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_place(old: str, new: str, words: str) -> None:
    text = TEXT.replace(old, new, 1)
    assert text != TEXT
    error = refused(text, "too_large" if "64 bits" in words else "bad_constant" if "constant" in words else "bad_graph")
    assert words in str(error)
    place = error.place
    assert place is not None
    assert place.file == "graph.txt"
    if "without a return" not in words:
        number = next(i for i, (a, b) in enumerate(zip(TEXT.split("\n"), text.split("\n"), strict=False), 1) if a != b)
        assert place.line == number
        line = text.split("\n")[place.line - 1]
        assert 1 <= place.col <= len(line) + 1
        assert place.source == line
        found = re.search("found '(.*)'", str(error))
        if found is not None:
            assert line[place.col - 1 :].startswith(found[1])
            assert place.length == len(found[1])


def test_suggestions() -> None:
    assert "bf16" in str(refused(TEXT.replace("dtype bf16", "dtype bf61")).diagnostics[0].help)
    error = refused(TEXT.replace("[B, S] tokens", "[B, SS] tokens").replace("dim S", "dim Seq").replace("S]", "Seq]"))
    assert "Seq" in str(error.diagnostics[0].help)
    assert "True" in str(refused(with_calls("%x = aten.neg.default(Tru)")).diagnostics[0].help)


def test_the_first_line_says_the_version() -> None:
    refused(TEXT.replace("graphopt 1", "graphopt 2"), "bad_version")
    refused(TEXT.replace("graphopt 1", "graphopt 0"), "bad_version")
    assert refused(TEXT.replace("graphopt 1", "grafopt 1")).place.line == 1  # type: ignore[union-attr]
    make(TEXT.replace("graphopt 1\n", "graphopt 1\n\n   \n"))


def test_calls_that_do_not_fit_are_found_by_shape() -> None:
    text = with_calls("%a = aten.neg.default(%norm)", "%b = aten.mm.default(%a, %a)", "%c = aten.neg.default(%b)")
    error = refused(text)
    assert "this call is not well typed" in str(error)
    assert error.place is not None
    assert error.place.line == text.split("\n").index("%b = aten.mm.default(%a, %a)") + 1


@pytest.mark.parametrize(
    ("op", "known"),
    [
        ("aten.add.Tensor", True), ("aten._softmax.default", True), ("aten._to_copy.default", True),
        ("graphopt.rotary.default", True), ("operator.getitem", True), ("math.ceil", True), ("torch.sym_min", True),
        ("aten.add.Tensor.x", False), ("aten.add", False), ("aten.add.NoSuch", False), ("aten.nothing.default", False),
        ("aten._fft_c2c.default", False), ("aten.add_.Tensor", False), ("aten.add.out", False),
        ("prim.add.default", False), ("operator.matmul", False), ("math.log", False), ("aten.from_file.default", False),
        ("aten.op__x.default", False), ("aten.record_stream.default", False), ("aten.is_pinned.default", True),
    ],
)  # fmt: skip
def test_ops_that_a_program_may_call(op: str, known: bool) -> None:
    line = text_parse._Line("graph.txt", 3, op)
    if known:
        assert text_parse._resolve(line, line.next) is not None
    else:
        with pytest.raises(ArtifactError, match="is no op that a program may call"):
            text_parse._resolve(line, line.next)


def test_names_become_safe_parameters() -> None:
    awkward = ('"1.a"', '"for"', '"a.b"', "a_b", '"a-b"', '"def"')
    lines = "".join(f"weight @{name} buffer f32[2]\n" for name in awkward)
    calls = [f"%x{i} = aten.neg.default(@{name})" for i, name in enumerate(awkward)]
    program = make(with_calls(*calls).replace("weight @table", f"{lines}weight @table"))
    targets = [str(node.target) for node in program.graph.graph.nodes if node.op == "placeholder"]
    assert len(set(targets)) == len(targets)
    assert all(target.isidentifier() for target in targets)
    assert targets[2:8] == ["w_1_a", "w_for", "a_b", "a_b_", "a_b__", "w_def"]
    assert {node.meta["weight"] for node in program.weight_nodes.values()} >= {"1.a", "for", "a.b", "a_b", "a-b", "def"}


# --- printing ------------------------------------------------------------------------------------------------------


def test_differences_name_nodes_within_their_path(by_hand: Program) -> None:
    other = make(TEXT.replace("%norm, @embed.weight)", "%norm, @embed.weight, None)").replace("1e-05", "1e-06"))
    lines = diff_text(by_hand, other).splitlines()
    assert lines[:2] == ["--- before", "+++ after"]
    changed = [line for line in lines[2:] if line[0] in "+-"]
    assert [line.split(" = ")[0] for line in changed] == [
        "-model.norm: rms_norm", "-head: linear", "+model.norm: rms_norm", "+head: linear"
    ]  # fmt: skip
    assert changed[0].endswith("@norm.weight, 1e-05, False) -> bf16[B, S, 4]")
    assert any(
        line.startswith("-head: linear = aten.linear.default(%model.norm:rms_norm, @embed.weight)") for line in changed
    )


def test_differences_show_one_line_around_them(by_hand: Program) -> None:
    lines = diff_text(by_hand, make(TEXT.replace("-1)", "2)"))).splitlines()
    assert [line[0] for line in lines[3:]] == [" ", "-", "+", " "]


def test_nodes_of_one_kind_are_counted_within_a_path(by_hand: Program) -> None:
    from graphopt.ir.text import _by_path

    lines = _by_path(by_hand)
    here = [line.split(" = ")[0] for line in lines if line.startswith("model.layers.0:")]
    assert here == ["model.layers.0: to", "model.layers.0: add", "model.layers.0: to.1"]
    second = next(line for line in lines if line.startswith("model.layers.0: to.1"))
    assert second == "model.layers.0: to.1 = aten.to.dtype(%add, bf16) -> bf16[B, S, 4]"
    assert lines[-1] == "return logits = %:mul, hidden = %model.norm:rms_norm"


def test_fingerprints_see_everything_but_values_and_names(by_hand: Program) -> None:
    base = fingerprint(by_hand)
    same = TEXT.replace("%shown", "%result").replace("model.layers.0", "elsewhere")
    assert fingerprint(make(same)) == base
    for old, new in (
        ("hint 5", "hint 6"), ("1..64", "1..63"), ("dtype bf16", "dtype f32"), ("[B, S] padding", "[B, S] values"),
        ("-1)", "2)"), ("1e-05", "1e-06"), ("hidden = %norm", "hidden = %back"), ("hidden =", "stream ="),
        ("weight @norm.weight parameter", "weight @norm.weight buffer"), (" aliases @head.weight", ""),
    ):  # fmt: skip
        assert fingerprint(make(TEXT.replace(old, new))) != base, new
    spare = by_hand.weights.with_weight(Weight("spare", Const(TABLE, torch.float32)))
    from dataclasses import replace

    assert fingerprint(replace(by_hand, weights=spare)) != base
