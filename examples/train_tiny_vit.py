"""Train the small image classifier that is shipped in ``examples/tiny_vit``.

A Vision Transformer learns the handwritten digits that come with scikit-learn, on a CPU, in a few minutes.  The 8x8
pictures are enlarged to 32x32, so that patches of 4x4 pixels make 64 tokens::

    python examples/train_tiny_vit.py --out examples/tiny_vit

The held-out digits are written beside the weights, so that whoever uses the model needs no scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

SIZE = 32
PATCH = 4
HELDOUT = 360
ROUNDING_TOLERANCE = 0.003


def enlarge(digits: torch.Tensor) -> torch.Tensor:
    """Pictures as the model reads them: uint8 ``[N, 8, 8]`` from 0 to 16 to float32 ``[N, 1, 32, 32]`` from -1 to 1."""
    values = digits.float().unsqueeze(1) / 8 - 1
    return F.interpolate(values, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def load_heldout(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The held-out digits beside a model: pictures float32 ``[N, 1, 32, 32]`` and labels int64 ``[N]``."""
    stored = load_file(directory / "heldout.safetensors")
    return enlarge(stored["digits"]), stored["labels"].long()


def split_digits(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training digits and labels, held-out digits and labels: uint8 ``[N, 8, 8]`` and ``[N]``, split at random."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    digits, labels = torch.tensor(bunch.images, dtype=torch.uint8), torch.tensor(bunch.target, dtype=torch.uint8)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rest, held = order[HELDOUT:], order[:HELDOUT]
    return digits[rest], labels[rest], digits[held], labels[held]


def build_model() -> ViTForImageClassification:
    """A fresh ViT of four layers and width 64 for 64 patches and ten classes."""
    config = ViTConfig(
        image_size=SIZE,
        patch_size=PATCH,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def vary(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures turned, scaled and moved a little, each its own way, float32 ``[N, 1, H, W]``."""
    rows = len(pictures)

    def between(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(rows, generator=generator)

    angle, scale = between(-0.2, 0.2), between(0.85, 1.15)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    moves = [between(-0.2, 0.2), between(-0.12, 0.12)]
    matrices = torch.stack([cos, -sin, moves[0], sin, cos, moves[1]], dim=1).view(rows, 2, 3)
    grid = F.affine_grid(matrices, list(pictures.shape), align_corners=False)
    # Outside of the picture is paper, which is -1 and not 0.
    return F.grid_sample(pictures + 1, grid, align_corners=False) - 1


@torch.no_grad()
def accuracy(model: ViTForImageClassification, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of pictures that get their label."""
    model.eval()
    return (model(pixel_values=pictures).logits.argmax(-1) == labels).float().mean().item()


def train(
    model: ViTForImageClassification, pictures: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int
) -> None:
    """Train with AdamW, one-cycle learning rate and pictures that vary; prints the loss every tenth epoch."""
    generator = torch.Generator().manual_seed(seed)
    batch, rate = 64, 2e-3
    steps = epochs * (len(labels) // batch)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": other, "weight_decay": 0.0}])
    step, began = 0, time.monotonic()
    for epoch in range(epochs):
        model.train()
        losses = []
        for rows in torch.randperm(len(labels), generator=generator)[: steps // epochs * batch].split(batch):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
            logits = model(pixel_values=vary(pictures[rows], generator)).logits
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            step += 1
        if epoch % 10 == 9:
            minutes = (time.monotonic() - began) / 60
            print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}, {minutes:.1f} minutes", flush=True)


def main() -> None:
    """Parse the command line, train, choose the storage type, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    digits, labels, held_digits, held_labels = split_digits(options.seed)
    model = build_model()
    train(model, enlarge(digits), labels.long(), options.epochs, options.seed)

    options.out.mkdir(parents=True, exist_ok=True)
    save_file({"digits": held_digits, "labels": held_labels}, options.out / "heldout.safetensors")
    pictures, truth = load_heldout(options.out)
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    figures["training_digits"], figures["heldout_digits"] = len(labels), len(truth)
    figures["heldout_accuracy_float32"] = accuracy(model, pictures, truth)
    model = model.to(torch.bfloat16).float()
    figures["heldout_accuracy"] = accuracy(model, pictures, truth)
    figures["training_accuracy"] = accuracy(model, enlarge(digits), labels.long())
    figures["paper_share_of_patches"] = round((F.max_pool2d(pictures, PATCH) < -0.9).float().mean().item(), 3)
    if figures["heldout_accuracy"] < figures["heldout_accuracy_float32"] - ROUNDING_TOLERANCE:
        raise RuntimeError(f"bfloat16 costs accuracy: {figures}")
    model.to(torch.bfloat16).save_pretrained(options.out)
    (options.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
