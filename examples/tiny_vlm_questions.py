"""Write examples/tiny_vlm/questions.safetensors: pictures with a question and its answer each, for steps that train.

Rows are named as the program's inputs are; `answers` marks the tokens that are to be predicted. The seed is one that
neither training nor the held-out figures use.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_vlm_data import END, PAD, ask_some, draw_scene, encode, prompt, render

ROWS, SEED = 192, 2_000_003


def main() -> None:
    """Draw the scenes, ask one question about each, and pad on the right."""
    chance = random.Random(SEED)
    scenes = [draw_scene(chance) for _ in range(ROWS)]
    asked = [ask_some(scene, 1, chance)[0] for scene in scenes]
    texts = [(prompt(question.text), [*encode(question.answer), *encode(END)]) for question in asked]
    length = max(len(text) + len(answer) for text, answer in texts)
    (pad,) = encode(PAD)
    ids = torch.full((ROWS, length), pad)
    answers, mask = torch.zeros(ROWS, length, dtype=torch.bool), torch.zeros(ROWS, length, dtype=torch.int64)
    for row, (text, answer) in enumerate(texts):
        end = len(text) + len(answer)
        ids[row, :end] = torch.tensor(text + answer)
        answers[row, len(text) : end] = True
        mask[row, :end] = 1
    pictures = render(scenes, torch.Generator().manual_seed(SEED)).to(torch.bfloat16)
    rows = {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures, "answers": answers}
    save_file(rows, Path(__file__).parent / "tiny_vlm" / "questions.safetensors")


if __name__ == "__main__":
    main()
