"""Choosing block sizes: by an injected timer, stored by content, device and sizes, and within what a target has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.backends import autotune
from graphopt.backends.autotune import SHARED, Tuner, defaults, fits, neighbours, sizes_of, tuned
from graphopt.backends.kernel import Kernel
from graphopt.backends.load import module_of
from graphopt.backends.lowering import Options, lower_graph
from graphopt.diagnostics import PlanError
from tests.backends.conftest import trace

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def product(rows: int) -> tuple[Kernel, tuple[torch.Tensor, ...]]:
    """A product with a weight, and its arguments."""
    inputs = (torch.randn(rows, 300), torch.randn(70, 300))
    made = lower_graph(trace(torch.nn.functional.linear, *inputs), "cpu", Options(interpret=True, products="triton"))
    return made.groups[0].kernel, inputs


class Launches:
    """A module of a kernel whose launch notes its sizes instead of running."""

    def __init__(
        self, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, slow: Callable[[dict[str, int]], float]
    ) -> None:
        self.calls: list[dict[str, int]] = []
        self.slow, real = slow, module_of(kernel.source, kernel.digest, False).launch

        def launch(*arguments: Any, **choice: int) -> dict[str, int]:
            self.calls.append(choice)
            return choice

        launch.__signature__ = __import__("inspect").signature(real)  # type: ignore[attr-defined]
        monkeypatch.setattr(
            autotune, "module_of", lambda *_, **__: type("Module", (), {"launch": staticmethod(launch)})
        )

    def timer(self, run: Callable[[], Any]) -> float:
        run()
        return self.slow(self.calls[-1])


def tuner(launches: Launches, directory: Path, device: str = "one", target: str | None = None) -> Tuner:
    return Tuner(device, launches.timer, target, directory)


def test_the_fastest_is_found_and_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel, inputs = product(1)
    launches = Launches(kernel, monkeypatch, lambda c: 1 + abs(c["NBLOCK"] - 16) + abs(c["RBLOCK"] - 1024) / 512)
    best = tuner(launches, tmp_path).choose(kernel, inputs)
    assert (best["NBLOCK"], best["RBLOCK"]) == (16, 1024)
    tried = len(launches.calls)
    assert tried == len({json.dumps(c, sort_keys=True) for c in launches.calls}), "no choice is timed twice"

    # The next process, equal sizes and sizes that round to the same: nothing is timed again.
    assert tuner(launches, tmp_path).choose(kernel, inputs) == best
    run = tuned(kernel, tuner(launches, tmp_path))
    assert run(*inputs) == best
    assert len(launches.calls) == tried + 1
    # Another device or other sizes are other questions.
    tuner(launches, tmp_path, "two").choose(kernel, inputs)
    tuner(launches, tmp_path).choose(kernel, (torch.randn(9, 300), inputs[1]))
    stored = [json.loads(file.read_text()) for file in tmp_path.glob("tuned_*.json")]
    assert {(each["device"], each["sizes"]) for each in stored} == {
        ("one", "1x512 128x512"), ("two", "1x512 128x512"), ("one", "16x512 128x512")}  # fmt: skip
    assert all(each["kernel"] == kernel.digest and each["times"] for each in stored)


def test_noise_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel, inputs = product(1)
    launches = Launches(kernel, monkeypatch, lambda c: 1.0 - 0.001 * c["NBLOCK"])
    assert tuner(launches, tmp_path).choose(kernel, inputs) == defaults(kernel)


@pytest.mark.parametrize("damage", ["", "{}", '{"kernel": "x", "chosen": {}}', "wrong sizes"])
def test_a_damaged_file_is_tuned_again(damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kernel, inputs = product(1)
    launches = Launches(kernel, monkeypatch, lambda c: c["RBLOCK"])
    chooser = tuner(launches, tmp_path)
    best, (file,) = chooser.choose(kernel, inputs), tmp_path.glob("tuned_*.json")
    if damage == "wrong sizes":
        damage = json.dumps({**json.loads(file.read_text()), "chosen": {**best, "RBLOCK": "2; evil()"}})
    file.write_text(damage)
    before = len(launches.calls)
    assert chooser.choose(kernel, inputs) == best
    assert len(launches.calls) > before


def test_what_a_device_cannot_run_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from triton.runtime.errors import OutOfResources

    kernel, inputs = product(5)

    def slow(choice: dict[str, int]) -> float:
        if choice["NBLOCK"] > 64:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 1 / choice["NBLOCK"]

    best = tuner(Launches(kernel, monkeypatch, slow), tmp_path).choose(kernel, inputs)
    assert best["NBLOCK"] == 64


def test_choices_are_filtered_ahead_of_time() -> None:
    """Tiles of 256 by 4096 in float32 take more shared memory than there is; the template's own sizes fit."""
    kernel, _ = product(5)
    assert fits(kernel, {}, "sm_90")
    assert not fits(kernel, {"NBLOCK": 256, "RBLOCK": 256, "XBLOCK": 64}, "gfx942")
    assert SHARED["gfx942"] == 64 * 1024
    assert {"XBLOCK": 8, "num_warps": 4} not in list(neighbours("gemm", {"XBLOCK": 16, "num_warps": 4}))


def test_sizes_round_up() -> None:
    assert sizes_of((torch.empty(1, 5, 64), 33)) == "1x8x64 64"


def test_interpreted_kernels_have_no_times() -> None:
    with pytest.raises(PlanError, match="tune"):
        Options.of({"tune": True, "interpret": True})


@CUDA
def test_on_a_device(tmp_path: Path) -> None:
    x, weight = torch.randn(1, 4096, device="cuda"), torch.randn(4096, 4096, device="cuda")
    made = lower_graph(trace(torch.nn.functional.linear, x, weight), "cuda", Options(tune=True))
    torch.testing.assert_close(made([x, weight]), x @ weight.t(), rtol=1e-3, atol=1e-3)
