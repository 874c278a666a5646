"""A few of transformers' classes through `torch.compile`, as benchmarks/transformers_models.py runs more of them."""

from __future__ import annotations

import pytest

from benchmarks.transformers_models import judge


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["causal_lm/gemma2", "masked_lm/bert", "image_classification/convnext"])
def test_a_class_is_right_at_other_lengths(name: str) -> None:
    found = judge(name, "graphopt")
    assert found["result"] == "ok", found
    assert found["recompiled"] <= 1
