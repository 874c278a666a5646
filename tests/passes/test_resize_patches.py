"""Patches of another size: kernels and positions against transformers and arithmetic, sizes, and what is declined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import graphopt
from graphopt.compiler.verify import verify
from graphopt.cost import cost
from graphopt.diagnostics import PlanError
from graphopt.frontend import capture_model, capture_module
from graphopt.ir.pictures import splices
from graphopt.ir.program import Dim, Input, Program
from graphopt.passes.tokens.patches import resize_matrix
from graphopt.passes.tokens.resize_patches import ResizePatches
from graphopt.passkit import Context
from graphopt.testing.laws import LAWS
from graphopt.testing.models import Shape, build
from graphopt.testing.trial import trial
from graphopt.views import Views
from tests.pictures import IMAGE, reader_program

BATCH = Dim("B", 1, 1 << 16, 3)
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 24,
    "patch_size": 4,
}


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES, num_labels=3, num_channels=1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def clip() -> CLIPForImageClassification:
    torch.manual_seed(0)
    return CLIPForImageClassification(CLIPConfig(vision_config=SIZES, num_labels=3)).eval()


@pytest.fixture(scope="module", params=[vit, clip], ids=["vit", "clip"])
def program(request: pytest.FixtureRequest) -> Program:
    return capture_model(request.param())


@pytest.mark.parametrize("patch", [2, 3, 8, 12])
@pytest.mark.parametrize("law", ["surgery_equals_emulation", "cost_is_counted", "nothing_left_behind"])
def test_smaller_and_larger_patches_keep_the_laws(program: Program, patch: int, law: str) -> None:
    config = ResizePatches(patch=patch)
    assert len(trial(config, program).plan.edits) == 1
    LAWS[law](config, program)


def test_no_other_size_is_identity(program: Program) -> None:
    plan = trial(ResizePatches(patch=4), program).plan
    assert not plan.edits
    assert "4 pixels a side already" in plan.declines[0].reason


def test_tokens_go_with_the_square_of_the_side(program: Program) -> None:
    def tokens(p: Program) -> int:
        attention = next(n for n in p.graph.graph.nodes if n.target is torch.ops.graphopt.attention.default)
        return int(attention.args[0].meta["val"].shape[2])

    assert tokens(program) == 1 + 36
    assert tokens(trial(ResizePatches(patch=8), program).after) == 1 + 9
    assert tokens(trial(ResizePatches(patch=2), program).after) == 1 + 144
    after = trial(ResizePatches(patch=8), program).after
    assert cost(after).at(B=1)["flops"] < cost(program).at(B=1)["flops"] / 2


def test_a_larger_kernel_reads_enlarged_patches_as_the_old_one_the_small_ones() -> None:
    model = vit()
    after = trial(ResizePatches(patch=8), capture_model(model)).after
    old = model.vit.embeddings.patch_embeddings.projection
    new = after.weights.evaluate("vit.embeddings.patch_embeddings.projection.weight").double()
    assert new.shape == (16, 1, 8, 8)
    patches = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    larger = F.interpolate(patches, size=(8, 8), mode="bilinear", align_corners=False)
    expected = F.conv2d(patches, old.weight.double())
    torch.testing.assert_close(F.conv2d(larger, new), expected, atol=1e-5, rtol=1e-5)
    resized = trial(ResizePatches(patch=8, kernel="resize"), capture_model(model)).after
    plain = resized.weights.evaluate("vit.embeddings.patch_embeddings.projection.weight")
    reference = F.interpolate(old.weight.detach(), size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(plain, reference, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("patch", [2, 8])
def test_positions_are_resampled_as_transformers_does(patch: int) -> None:
    model = vit()
    after = trial(ResizePatches(patch=patch), capture_model(model)).after
    got = after.weights.evaluate("vit.embeddings.position_embeddings")
    side = 24 // patch
    # It resamples for pictures of another size and patches of the same: as many patches either way.
    stream = torch.zeros(1, 1 + side * side, 16)
    expected = model.vit.embeddings.interpolate_pos_encoding(stream, 4 * side, 4 * side)
    torch.testing.assert_close(got, expected.detach(), atol=1e-5, rtol=1e-5)


def test_resizing_there_and_back_restores_a_kernel() -> None:
    up, down = resize_matrix(4, 8, "bilinear"), resize_matrix(8, 4, "bilinear")
    assert up.shape == (8, 4)
    torch.testing.assert_close(up.sum(1), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(down.sum(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(torch.linalg.pinv(up) @ up, torch.eye(4, dtype=torch.float64))


def tower() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, projection_dim=8)).eval()


@pytest.mark.parametrize("make", [vit, tower])
def test_the_result_is_a_stock_checkpoint(make: Any, tmp_path: Path) -> None:
    model = make()
    after = trial(ResizePatches(patch=8), capture_model(model)).after
    graphopt.save(after, tmp_path / "out", format="transformers")
    loaded = type(model).from_pretrained(tmp_path / "out").eval()
    assert loaded.config.patch_size == 8
    pictures = torch.randn(2, loaded.config.num_channels, 24, 24)
    with torch.no_grad():
        expected = after.module(torch.float32)(pixel_values=pictures)[0]
        torch.testing.assert_close(loaded(pixel_values=pictures)[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("patch", [2, 8])
def test_a_reader_of_pictures_is_a_stock_checkpoint(patch: int, tmp_path: Path) -> None:
    after = trial(ResizePatches(patch=patch), reader_program()).after
    graphopt.save(after, tmp_path / "out", format="transformers")
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    vision = loaded.config.vision_config
    assert (vision.patch_size, vision.image_size, vision.num_hidden_layers) == (patch, 16, 3)
    assert loaded.config.image_seq_length == (16 // patch) ** 2
    ids = torch.tensor([[7, 8, *[IMAGE] * (16 // patch) ** 2, 9, 11]] * 2)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        expected = after.module(torch.float32)(**inputs)[0]
        torch.testing.assert_close(loaded(**inputs)[0], expected, atol=1e-4, rtol=1e-4)


def test_a_size_that_leaves_a_rest_is_refused(program: Program) -> None:
    with pytest.raises(PlanError, match="do not divide into patches of 5") as error:
        ResizePatches(patch=5).plan(Context(Views(program), ()))
    assert error.value.diagnostics[0].help == ("use patch: 4",)


class _Stem(nn.Module):  # type: ignore[misc]
    def __init__(self, stride: int = 2, mixes: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=stride)
        self.mixer = nn.Linear(9, 9) if mixes else None
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.patches(pixel_values).flatten(2)
        if self.mixer is not None:
            x = self.mixer(x)
        return self.head(x.transpose(1, 2).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "reason"), [(_Stem(stride=1), "overlap"), (_Stem(mixes=True), "one entry a patch")], ids=["stem", "mixer"]
)
def test_what_is_no_embedding_of_patches_is_declined(model: nn.Module, reason: str) -> None:
    program = capture_module(model, (Input("pixel_values", ("B", 3, 6, 6), torch.float32),), dims=(BATCH,))
    plan = trial(ResizePatches(patch=3), program).plan
    assert not plan.edits
    assert reason in plan.declines[0].reason


def test_angles_of_places_are_declined() -> None:
    program = build(Shape(kind="vision", positions="rotary"))
    plan = trial(ResizePatches(patch=3), program).plan
    assert not plan.edits
    assert "made for 9 tokens" in plan.declines[0].reason


@pytest.mark.parametrize("patch", [2, 8])
def test_a_text_holds_as_many_placeholders_as_there_are_patches(patch: int) -> None:
    config, program = ResizePatches(patch=patch), reader_program()
    case = trial(config, program)
    (splice,) = splices(case.after)
    assert splice.entries == (16 // patch) ** 2
    certificate = verify(program, case.after, case.plan, config.effect, "full", None, config.name)
    assert certificate["largest_relative_error"] <= certificate["tolerance"]
