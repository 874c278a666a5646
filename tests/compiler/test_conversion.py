"""A sharded checkpoint through the conversions of benchmarks/convert.py, at a shape of seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from graphopt import compile
from graphopt.ir.program import Program

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 16}
HEAD = 4
SKIPPED = (2,)
KEPT = (0, 1, 3, 4, 5)


@pytest.fixture(scope="module")
def convert() -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks" / "convert.py"
    spec = importlib.util.spec_from_file_location("benchmarks_convert", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.VOCABULARY = 128  # type: ignore[attr-defined]
    return module


@pytest.fixture(scope="module")
def place(convert: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("conversion")
    convert.make_checkpoint(directory / "model", SHAPE)
    assert len(list((directory / "model").glob("*.safetensors"))) > 1
    return directory


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in directory.glob("model*.safetensors") for name, value in load_file(path).items()}


def run(convert: ModuleType, place: Path, job: str) -> tuple[Program, dict[str, torch.Tensor]]:
    spec = convert.spec_of(place, job, convert.JOBS[job], SHAPE["num_hidden_layers"])
    program = compile(place / "model", spec, out=place / job, verify="shapes", memory=1 << 40)
    return program, tensors(place / job)


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    return scores.argsort(descending=True)[:count].sort().values


def test_the_chain_is_what_its_arithmetic_says(convert: ModuleType, place: Path) -> None:
    """Layers, heads, neurons and groups as plain tensor arithmetic has them, to the bit."""
    before = tensors(place / "model")
    want = {name: value for name, value in before.items() if "layers" not in name}
    for layer in KEPT:
        stem = f"model.layers.{layer}."
        part = {name.removeprefix(stem): value for name, value in before.items() if name.startswith(stem)}
        q, k, v, o = (part[f"self_attn.{p}_proj.weight"].double() for p in "qkvo")
        cut = [x.reshape(16, HEAD, 64) for x in (q, k, v, o.T)]
        heads = best(sum(x.square().sum((1, 2)) for x in cut), 12)  # type: ignore[arg-type]
        q, k, v, o = (x[heads] for x in cut)
        mean = [x.reshape(3, 4, HEAD, 64).mean(1) for x in (k, v)]
        part |= {
            f"self_attn.{p}_proj.weight": (x.reshape(-1, 64).T if p == "o" else x.reshape(-1, 64)).bfloat16()
            for p, x in zip("qkvo", (q, *mean, o), strict=True)
        }
        gate, up, down = (part[f"mlp.{p}_proj.weight"].double() for p in ("gate", "up", "down"))
        neurons = best(gate.square().sum(1) + up.square().sum(1) + down.square().sum(0), 72)
        part |= {f"mlp.{p}_proj.weight": part[f"mlp.{p}_proj.weight"][neurons] for p in ("gate", "up")}
        part["mlp.down_proj.weight"] = part["mlp.down_proj.weight"][:, neurons]
        want |= {stem + name: value for name, value in part.items()}
    _, got = run(convert, place, "chain")
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


def test_skipping_reads_what_stays_once_and_nothing_else(convert: ModuleType, place: Path) -> None:
    program, got = run(convert, place, "skip")
    source = program.weights.source
    assert source.bytes_read == sum(value.nbytes for value in got.values())  # type: ignore[union-attr]
    before = tensors(place / "model")
    for new, old in enumerate(KEPT):
        assert torch.equal(
            got[f"model.layers.{new}.mlp.up_proj.weight"], before[f"model.layers.{old}.mlp.up_proj.weight"]
        )


def test_scoring_reads_what_it_scores_and_saving_reads_all_once(convert: ModuleType, place: Path) -> None:
    program, _ = run(convert, place, "prune")
    before = tensors(place / "model")
    scored = sum(value.nbytes for name, value in before.items() if "_proj" in name)
    source = program.weights.source
    assert source.bytes_read <= scored + sum(value.nbytes for value in before.values())  # type: ignore[union-attr]


def test_the_page_shows_the_published_figures(convert: ModuleType) -> None:
    text = convert.PAGE.read_text()
    begin, end = convert.MARKS
    results = Path(convert.__file__).parent / "results" / "convert.json"
    assert text.partition(begin)[2].partition(end)[0] == convert.figures(results)
