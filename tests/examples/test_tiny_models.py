"""The shipped vision models load in stock transformers and do what their cards say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True, scope="module")
def _examples_on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


def test_both_are_small() -> None:
    files = [p for name in ("tiny_vit", "tiny_vlm") for p in (EXAMPLES / name).iterdir()]
    assert sum(p.stat().st_size for p in files) < 6e6


def test_digits_are_recognised() -> None:
    from train_tiny_vit import accuracy, load_heldout
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(EXAMPLES / "tiny_vit", dtype=torch.float32)
    pictures, labels = load_heldout(EXAMPLES / "tiny_vit")
    assert len(labels) == 360
    assert accuracy(model, pictures, labels) >= 0.97


def test_answers_depend_on_the_picture() -> None:
    from tiny_vlm_data import heldout
    from train_tiny_vlm import right_answers
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(EXAMPLES / "tiny_vlm", dtype=torch.float32)
    pictures, questions = heldout(200)
    right = right_answers(model, pictures, questions).float().mean()
    elsewhere = right_answers(model, pictures.roll(1, 0), questions).float().mean()
    assert right > 0.95
    assert elsewhere < right - 0.5


def test_the_stock_processor_writes_what_was_trained_on() -> None:
    from PIL import Image
    from tiny_vlm_data import heldout, prompt
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(EXAMPLES / "tiny_vlm")
    model = AutoModelForImageTextToText.from_pretrained(EXAMPLES / "tiny_vlm", dtype=torch.float32)
    pictures, questions = heldout(4)
    right = 0
    for picture, question in zip(pictures, questions, strict=True):
        image = Image.fromarray(((picture.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
        inputs = processor(images=image, text=f"<s> <image> {question.text}", return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == prompt(question.text)
        torch.testing.assert_close(inputs["pixel_values"][0], picture, atol=0.005, rtol=0)
        answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        right += processor.decode(answer, skip_special_tokens=True).strip() == question.answer
    assert right >= 3
