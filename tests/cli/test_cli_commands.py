"""Commands from outside: output, exit codes, JSON, and what they load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

import graphopt
from graphopt.cli import app

RUNNER = CliRunner()
TINY_VLM = Path(__file__).resolve().parents[2] / "examples" / "tiny_vlm"


def call(*arguments: str | Path, code: int = 0) -> Any:
    """The result of a command, which must exit with `code`."""
    result = RUNNER.invoke(app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def data(*arguments: str | Path, code: int = 0) -> Any:
    """What a command prints as JSON."""
    return json.loads(call(*arguments, "--json", code=code).stdout)


def test_version_and_help() -> None:
    assert call("--version").stdout == f"graphopt {graphopt.__version__}\n"
    shown = call("--help").stdout
    for name in ("run", "plan", "explain", "diff", "cost", "eval", "generate", "passes", "schema", "doctor"):
        assert name in shown
    assert call(code=2)


def test_run_saves_reports_and_compares(spec: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = data("run", spec, "--out", out)
    first, last = report["rows"]
    assert report["at"] == {"B": 1, "S": 512}
    assert first["figures"]["parameters"] - last["figures"]["parameters"] == 3 * 24 * 32
    assert {"perplexity", "kv_bytes", "flops", "bytes"} <= set(last["figures"])
    assert (last["edits"], last["certificate"]["level"], last["effect"]) == (1, "full", "approximate")
    shown = call("explain", out).stdout
    assert "gated silu, 32 -> 24 -> 32" in shown
    assert "prune_neurons" in shown
    compared = data("diff", checkpoint, out)
    assert compared["views"]["changed"] == [{"blocks": ["model.layers.1"], "changes": {"mlp neurons": [48, 24]}}]
    changed = {each["name"].split(".")[-2] for each in compared["weights"]["changed"]}
    assert changed == {"gate_proj", "up_proj", "down_proj"}
    page = call("diff", checkpoint, out, "--graph").stdout
    assert "mlp neurons" in page
    assert "@@" in page
    again = call("run", spec, "--out", out, code=1)
    assert "error" in again.stderr
    assert again.stdout == ""


def test_run_prints_a_table_and_takes_settings(spec: Path) -> None:
    result = call("run", spec, "--set", "steps.0.keep=75%", "--verify", "off")
    lines = result.stdout.splitlines()
    assert " ".join(lines[0].split()) == "step parameters FLOPs KV bytes bytes perplexity edits declined certificate"
    assert lines[2].endswith("not verified")
    assert lines[-1] == "FLOPs and KV bytes at B=1, S=512"
    assert "nothing was saved" in result.stderr


def test_plan_lists_edits_and_declines(spec: Path) -> None:
    shown = call("plan", spec).stdout
    assert "model.layers.1.mlp: keep 24 of 48" in shown
    assert "decline" in shown
    step = data("plan", spec)["steps"][0]
    assert step["edits"][0]["edit"] == "cut"
    assert step["declines"][0]["candidate"].startswith("model.layers.0.mlp")
    assert step["place"]["line"] == 5


def test_spec_errors_name_their_place(spec: Path) -> None:
    spec.write_text(spec.read_text().replace("keep", "kep"))
    result = call("plan", spec, code=1)
    assert result.stdout == ""
    assert f"{spec}:6:5: error: unknown field 'kep'" in result.stderr
    assert "did you mean 'keep'?" in result.stderr
    found = data("plan", spec, code=1)
    assert found["error"] == "SpecError"
    assert found["diagnostics"][0]["place"]["line"] == 6


def test_wrong_usage_exits_with_2(checkpoint: Path) -> None:
    call("plan", code=2)
    call("explain", checkpoint, "--nonsense", code=2)
    call("cost", checkpoint, "--at", "B=one", code=2)
    call("cost", checkpoint, "--at", "B=1", code=2)
    call("eval", checkpoint, "--data", checkpoint / "absent.txt", code=2)


def test_errors_of_models_are_rendered(tmp_path: Path) -> None:
    assert "error" in call("explain", tmp_path / "absent", code=1).stderr
    assert data("cost", tmp_path / "absent", code=1)["diagnostics"][0]["code"] == "no_model"


def test_cost_counts_at_sizes(checkpoint: Path) -> None:
    found = data("cost", checkpoint, "--at", "B=2,S=10")
    assert found["numbers"]["kv_bytes"] == 2 * 10 * found["kv_bytes_per_token"] == 2 * 10 * 2 * 2 * 32 * 4
    assert found["parameters"] == sum(part["parameters"] for part in [*found["blocks"], *found["outside"]])
    shown = call("cost", checkpoint, "--at", "B=2,S=10").stdout
    assert f"{found['numbers']['flops']:,}" in shown
    assert "model.layers.{0,1}.self_attn" in shown


def test_eval_measures_perplexity(checkpoint: Path) -> None:
    found = data("eval", checkpoint, "--data", checkpoint / "heldout.txt", "--samples", "4", "--seq", "16")
    # A random model is about as good as a guess among the 16 words.
    assert 12 < found["perplexity"] < 22
    assert found["tokens"] == 4 * 15
    short = call("eval", checkpoint, "--data", checkpoint / "heldout.txt", "--samples", "400", code=1)
    assert "text_too_short" in short.stderr


def test_generate_streams_the_continuation(checkpoint: Path) -> None:
    arguments = ("generate", checkpoint, "--prompt", "def return", "--max-new-tokens", "5")
    found = data(*arguments)
    assert found["text"].startswith("def return")
    assert 1 <= found["new_tokens"] <= 5
    assert call(*arguments).stdout == found["text"] + "\n"
    sampling = ("--temperature", "2", "--top-k", "9", "--top-p", "0.9", "--seed")
    drawn = [data(*arguments, *sampling, seed) for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1]
    assert drawn[0]["tokens"][:2] == found["tokens"][:2]


def test_generate_looks_at_pictures(tmp_path: Path) -> None:
    """A picture stands where the prompt says; with a cache or without, the answer is about it."""
    picture = Image.new("RGB", (32, 32), (90, 90, 90))
    picture.paste((25, 190, 40), (9, 9, 16, 16))
    picture.save(tmp_path / "green.png")
    asked = ("--prompt", "<s> <image> what color is the square ?", "--max-new-tokens", "1")
    found = data("generate", TINY_VLM, *asked, "--image", tmp_path / "green.png")
    assert found["text"].endswith("? green")
    assert data("generate", TINY_VLM, *asked, "--image", tmp_path / "green.png", "--no-cache")["text"] == found["text"]
    unplaced = call("generate", TINY_VLM, "--prompt", "list all ?", "--image", tmp_path / "green.png", code=1)
    assert "write <image> once for each picture" in unplaced.stderr
    (tmp_path / "text.png").write_text("no picture")
    assert (
        "cannot be read as a picture"
        in call("generate", TINY_VLM, *asked, "--image", tmp_path / "text.png", code=1).stderr
    )


def test_generate_says_what_it_cannot_do(checkpoint: Path, tmp_path: Path) -> None:
    idle = call("generate", checkpoint, "--prompt", "def", "--top-k", "5", code=2)
    assert "nothing is drawn at temperature 0" in idle.stderr
    spec = tmp_path / "spec.yaml"
    spec.write_text("graphopt: 1\n")
    assert f"graphopt run {spec} --out" in call("generate", spec, "--prompt", "def", code=1).stderr
    assert "no picture is written" in call("generate", checkpoint, "--prompt", "def", "--image", spec, code=1).stderr


def test_explain_json_and_graph(checkpoint: Path) -> None:
    found = data("explain", checkpoint)
    assert [block["attentions"][0]["heads"] for block in found["blocks"]] == [4, 4]
    assert found["head"]["tied"]
    assert call("explain", checkpoint, "--graph").stdout.startswith("graphopt ")


def test_explain_lowered(checkpoint: Path) -> None:
    """Every kernel and library call with its template, bytes, FLOPs and least time; sources when they are asked for."""
    found = data("explain", checkpoint, "--lowered", "--at", "B=2,S=1")
    assert found["mode"] == "Triton kernels"
    assert found["at"] == {"B": 2, "S": 1}
    assert "sources" not in found
    roof = found["roof"]
    for row in found["rows"]:
        times = {"bytes": row["moved"] / roof["bytes_per_second"], "flops": row["computed"] / roof["flops_per_second"]}
        assert row["seconds"] == pytest.approx(max(times.values()))
        assert row["seconds"] == pytest.approx(times[row["bound"]])
        assert row["ops"]
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1.0)
    weights = next(row for row in found["rows"] if row["kernel"] == "gemm")
    assert weights["bound"] == "bytes"
    page = call("explain", checkpoint, "--lowered", "--at", "B=2,S=1", "--source", "gemm").stdout
    assert f"{weights['moved']:,.0f} bytes, {weights['computed']:,.0f} FLOPs" in page
    assert "@triton.jit" in page
    every = data("explain", checkpoint, "--lowered", "--at", "B=2,S=1", "--source", "all")["sources"]
    assert set(every) == {row["name"] for row in found["rows"] if row["kernel"]}
    assert all("def launch(" in source for source in every.values())
    other = data("explain", checkpoint, "--lowered", "--at", "B=2,S=1", "--target", "mi300x")
    assert other["roof"] == {"device": "mi300x", "bytes_per_second": 5.3e12, "flops_per_second": 1307e12,
                             "source": "data sheet"}  # fmt: skip
    assert "'h200'" in call("explain", checkpoint, "--lowered", "--target", "h20", code=1).stderr
    refused = call("explain", checkpoint, "--lowered", "--source", "gemmm", code=1).stderr
    assert "no kernel's name begins with 'gemmm'" in refused
    assert "gemv_" in refused
    assert "B, S" in call("explain", checkpoint, "--lowered", "--at", "B=2", code=2).stderr


def test_passes_are_listed_and_explained() -> None:
    assert "prune_neurons" in call("passes").stdout
    assert "prune_neurons" in data("passes")
    shown = call("passes", "prune_neurons").stdout
    for word in ("options", "keep", "default", "approximate"):
        assert word in shown
    found = data("passes", "prune_neurons")
    assert {"name", "type", "default", "description", "required"} == set(found["options"][0])
    assert "did you mean 'prune_heads'?" in call("passes", "prune_haeds", code=1).stderr


def test_schema_is_json() -> None:
    assert json.loads(call("schema").stdout)["title"] == "graphopt spec"


def test_doctor_is_healthy_here_and_says_when_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from graphopt.cli import doctor

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = data("doctor")
    assert found["healthy"]
    names = {each["name"] for each in found["findings"]}
    assert names == {"python", "torch", "transformers", "triton", "device", "cache"}
    monkeypatch.setattr(doctor, "SUPPORTED", {"torch": ((1, 0), (1, 13)), "triton": ((99, 0), (99, 1))})
    assert "PROBLEM" in call("doctor", code=1).stdout


def test_interruption_is_one_line(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphopt.compiler.compile.capture", interrupt)
    result = RUNNER.invoke(app, ["explain", str(checkpoint)])
    assert result.exit_code == 130
    assert result.stderr == "graphopt: interrupted\n"


SIGNALLED = """
import signal, sys, time
from graphopt.cli import main, specs
# A parent that runs tests in the background has SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
def wait(*a):
    print("ready", flush=True)
    time.sleep(60)
specs._load = wait
sys.argv = ["graphopt", "plan", "x.yaml"]
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals differ")
def test_control_c_exits_with_130() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "graphopt: interrupted\n"


LIGHT = """
import sys
from graphopt.cli import main
sys.argv = ["graphopt", "plan", sys.argv[1]]
try:
    main()
except SystemExit as left:
    heavy = [name for name in ("torch", "transformers", "sympy", "scipy") if name in sys.modules]
    print(left.code, heavy)
"""


def test_spec_errors_load_nothing_heavy(spec: Path) -> None:
    spec.write_text(spec.read_text().replace("prune_neurons", "prune_neuron"))
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", LIGHT, str(spec)], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    assert done.stdout == "1 []\n"
    assert "did you mean 'prune_neurons'?" in done.stderr
    # Under a second on an idle machine; the bound leaves room for a busy one, the line above is the real test.
    assert seconds < 10
