"""Cutting calibration text into sequences."""

from __future__ import annotations

import pytest
import torch

from graphopt.diagnostics import PlanError
from graphopt.observe import token_batches


def test_sequences_are_spread_and_do_not_overlap() -> None:
    tokens = torch.arange(1000)
    rows = torch.cat([batch["input_ids"] for batch in token_batches(tokens, 8, 50, batch=3)])
    assert rows.shape == (8, 50)
    assert torch.equal(rows - rows[:, :1], torch.arange(50).expand(8, 50))
    assert [int(row[0]) // 125 for row in rows] == list(range(8))
    assert [int(row[-1]) // 125 for row in rows] == list(range(8))


def test_the_seed_decides() -> None:
    tokens = torch.arange(1000)
    one, same, other = (token_batches(tokens, 4, 20, batch=4, seed=seed)[0]["input_ids"] for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_batch_size_changes_nothing_else() -> None:
    tokens = torch.arange(1000)
    rows = [torch.cat([b["input_ids"] for b in token_batches(tokens, 7, 20, batch=size)]) for size in (1, 3, 7)]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_documents_keep_their_bounds() -> None:
    documents = [torch.arange(100 * i, 100 * i + n) for i, n in enumerate((45, 20, 7, 1))]
    batches = token_batches(documents, 4, 20, batch=4)
    rows, mask = batches[0]["input_ids"], batches[0]["attention_mask"]
    assert mask.sum(1).tolist() == [20, 20, 20, 7]
    assert [int(row[0]) for row in rows] == [0, 20, 100, 200]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(PlanError, match="does not hold 8 sequences of 50 tokens") as caught:
        token_batches(torch.arange(399), 8, 50)
    assert "at most 7 samples" in str(caught.value)
    with pytest.raises(PlanError, match="2 documents does not hold 5"):
        token_batches([torch.arange(30), torch.arange(20)], 5, 20)
