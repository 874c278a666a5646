"""Train the small vision-language model that is shipped in ``examples/tiny_vlm``.

A model in the LLaVA layout of transformers (CLIP vision encoder, projector, Llama decoder) learns to answer questions
about pictures that ``tiny_vlm_data.py`` draws: colors, shapes, counts and places.  First the encoder learns what its
patches and its class token show, then all parts learn the answers, on a CPU, in a fixed number of steps::

    python examples/train_tiny_vlm.py --out examples/tiny_vlm

The script prints what is right without the picture: the most frequent answer to each question, and this model's own
answers with another scene's picture.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tiny_vlm_data import (
    COLORS,
    END,
    IMAGE,
    IMAGE_TOKENS,
    KINDS,
    MOST,
    PAD,
    PATCH,
    SHAPES,
    SIDE,
    SIZE,
    START,
    WORDS,
    Prior,
    Question,
    Scene,
    ask_some,
    draw_scene,
    encode,
    heldout,
    make_processor,
    prompt,
    render,
)
from torch import nn
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

HELDOUT = 4000
ROUNDING_TOLERANCE = 0.005
TOKEN = {word: n for n, word in enumerate(WORDS)}


def build_model() -> LlavaForConditionalGeneration:
    """A fresh model: encoder of three layers and width 96, decoder of six layers and width 128."""
    vision = CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        projection_dim=96,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=TOKEN[START],
        eos_token_id=TOKEN[END],
        pad_token_id=TOKEN[PAD],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=TOKEN[IMAGE],
        vision_feature_layer=-1,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


GROUPS = ((*COLORS, "nothing"), (*SHAPES, "nothing"), ("top", "bottom"), ("left", "right"))


class Labels(nn.Module):
    """What the encoder is taught by: patches say in the text's words what they show and where; which shapes there are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scene = nn.Linear(width, len(COLORS) * len(SHAPES))

    def forward(
        self, features: torch.Tensor, words: torch.Tensor, pooled: torch.Tensor, scenes: list[Scene]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of patches and class token.

        Projected patches are ``[N, 64, D]``, embeddings of words ``[V, D]``, the pooled class token ``[N, E]``.
        """
        of_patches, of_scenes = encoder_labels(scenes)
        likely = (features.float() @ words.float().T).transpose(1, 2)
        shown = [
            F.cross_entropy(likely[:, [TOKEN[word] for word in group]], of_patches[..., n])
            for n, group in enumerate(GROUPS)
        ]
        return torch.stack(shown).sum(), F.binary_cross_entropy_with_logits(self.scene(pooled).float(), of_scenes)


def encoder_labels(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """The word of each group that fits a patch, int64 ``[N, 64, 4]``, and the kinds of shapes there are, ``[N, 24]``."""
    patches = torch.empty(len(scenes), SIDE, SIDE, len(GROUPS), dtype=torch.long)
    there = torch.zeros(len(scenes), len(COLORS) * len(SHAPES))
    half = torch.arange(SIDE) // (SIDE // 2)
    patches[..., 0], patches[..., 1] = len(COLORS), len(SHAPES)
    patches[..., 2], patches[..., 3] = half[:, None], half
    for row, scene in enumerate(scenes):
        for thing in scene:
            color, shape = list(COLORS).index(thing.color), list(SHAPES).index(thing.shape)
            patches[row, thing.patch // SIDE, thing.patch % SIDE, :2] = torch.tensor([color, shape])
            there[row, color * len(SHAPES) + shape] = 1
    return patches.flatten(1, 2), there


def pack(questions: list[list[Question]], kept: list[list[int]] | None = None) -> dict[str, torch.Tensor]:
    """Several questions after each picture that do not see each other, as if each stood there alone.

    Tokens, positions and labels are int64 ``[N, T]``, the mask is boolean ``[N, 1, T, T]``; labels are -100 outside of
    answers and stand where the token before them is read.  Only the patches that are kept stand in the text, at the
    positions that they have in a whole picture.
    """
    rows = []
    for row, asked in enumerate(questions):
        patches = kept[row] if kept else range(IMAGE_TOKENS)
        ids = prompt("", len(patches))
        places, parts, labels = [0, *(1 + patch for patch in patches)], [0] * len(ids), [-100] * len(ids)
        for number, question in enumerate(asked, start=1):
            text, answer = encode(question.text), [*encode(question.answer), TOKEN[END]]
            # The end itself is never read.
            words = text + answer[:-1]
            ids += words
            places += range(1 + IMAGE_TOKENS, 1 + IMAGE_TOKENS + len(words))
            parts += [number] * len(words)
            labels += [-100] * (len(text) - 1) + answer
        rows.append((ids, places, parts, labels))
    length = max(len(row[0]) for row in rows)

    def padded(column: int, value: int) -> torch.Tensor:
        return torch.tensor([row[column] + [value] * (length - len(row[column])) for row in rows])

    parts = padded(2, -1)
    seen = (parts[:, :, None] == parts[:, None, :]) | (parts[:, None, :] == 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return {
        "ids": padded(0, TOKEN[PAD]),
        "positions": padded(1, 0),
        "mask": (seen & causal).unsqueeze(1),
        "labels": padded(3, -100),
    }


def draw_kept(scenes: list[Scene], chance: random.Random) -> list[list[int]]:
    """Patches of each scene: those with shapes and a part of the ground by chance, as many in each."""
    count = chance.randint(MOST, IMAGE_TOKENS)
    kept = []
    for scene in scenes:
        shown = [thing.patch for thing in scene]
        ground = sorted(set(range(IMAGE_TOKENS)) - set(shown))
        kept.append(sorted(shown + chance.sample(ground, count - len(shown))))
    return kept


def look(model: LlavaForConditionalGeneration, pictures: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """What the encoder gives the text, as transformers hands it over; the projected patches; the pooled class token."""
    seen = model.model.get_image_features(pixel_values=pictures, return_dict=True)
    pooled = model.model.vision_tower.post_layernorm(seen.last_hidden_state[:, 0])
    return seen, torch.stack(list(seen.pooler_output)), pooled


def forward(
    model: LlavaForConditionalGeneration,
    pictures: torch.Tensor,
    batch: dict[str, torch.Tensor],
    kept: list[list[int]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits ``[N, T, V]``, the projected patches ``[N, 64, D]`` and the encoder's pooled class token ``[N, E]``."""
    seen, features, pooled = look(model, pictures)
    if kept:
        seen.pooler_output = [each[patches] for each, patches in zip(seen.pooler_output, kept, strict=True)]
    output = model(
        input_ids=batch["ids"],
        attention_mask=torch.zeros(batch["mask"].shape).masked_fill(~batch["mask"], torch.finfo(torch.float32).min),
        position_ids=batch["positions"],
        mm_encoder_outputs={"image": seen},
        use_cache=False,
    )
    return output.logits, features, pooled


class Optimizers:
    """Muon for the inner matrices, AdamW for the rest, one schedule for both: short warm-up, then cosine to zero."""

    def __init__(self, modules: list[nn.Module], steps: int) -> None:
        named = [(n, p) for module in modules for n, p in module.named_parameters()]
        inner = [p for n, p in named if p.ndim == 2 and ".layers." in n]
        chosen = {id(p) for p in inner}
        other = [p for _, p in named if id(p) not in chosen]
        self.parameters = inner + other
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(inner, lr=0.02, weight_decay=0.05, momentum=0.95),
            torch.optim.AdamW(other, lr=0.002, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.steps, self.step = steps, 0

    def update(self, loss: torch.Tensor) -> None:
        """One step down the gradient of the loss."""
        factor = min(1.0, (self.step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        self.step += 1
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()


def train_encoder(model: LlavaForConditionalGeneration, labels: Labels, steps: int, rows: int, seed: int) -> None:
    """Teach the encoder what is in each patch and in the scene."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    words = model.get_input_embeddings()
    optimizers = Optimizers([model.model.vision_tower, model.model.multi_modal_projector, words, labels], steps)
    began = time.process_time()
    for step in range(steps):
        scenes = [draw_scene(chance) for _ in range(rows)]
        _, features, pooled = look(model, render(scenes, generator))
        patches, scene = labels(features, words.weight, pooled, scenes)
        optimizers.update(patches + 4 * scene)
        if step % 100 == 99:
            spent = (time.process_time() - began) / 60
            print(f"encoder {step + 1}: patches {patches:.4f}, scene {scene:.4f}, {spent:.1f} minutes", flush=True)


def train_answers(
    model: LlavaForConditionalGeneration, labels: Labels, steps: int, rows: int, asked: int, seed: int
) -> tuple[Prior, list[dict[str, float]]]:
    """Teach all parts the answers, the encoder its labels still; what was asked, and the curve of the losses."""
    chance, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1)
    optimizers = Optimizers([model, labels], steps)
    prior, curve = Prior(), []
    began = time.process_time()
    for step in range(steps):
        scenes = [draw_scene(chance) for _ in range(rows)]
        questions = [ask_some(scene, asked, chance) for scene in scenes]
        for some in questions:
            prior.observe(some)
        kept = draw_kept(scenes, chance) if chance.random() < 0.5 else None
        batch = pack(questions, kept)
        with torch.autocast("cpu", torch.bfloat16):
            logits, features, pooled = forward(model, render(scenes, generator), batch, kept)
            patches, scene = labels(features, model.get_input_embeddings().weight, pooled, scenes)
        loss = F.cross_entropy(logits.float().transpose(1, 2), batch["labels"])
        optimizers.update(loss + 0.1 * patches + 0.4 * scene)
        if step % 50 == 49:
            minutes = round((time.process_time() - began) / 60, 2)
            point = {"step": step + 1, "minutes": minutes, "loss": loss.item(), "scene": scene.item()}
            curve.append({name: round(value, 4) for name, value in point.items()})
            print(json.dumps(curve[-1]), flush=True)
    return prior, curve


@torch.no_grad()
def right_answers(
    model: LlavaForConditionalGeneration, pictures: torch.Tensor, questions: list[Question], rows: int = 100
) -> torch.Tensor:
    """Whether the greedy answer is right word by word to its end, boolean ``[N]``."""
    model.eval()
    found = []
    for first in range(0, len(questions), rows):
        batch = pack([[question] for question in questions[first : first + rows]])
        best = forward(model, pictures[first : first + rows], batch)[0].argmax(-1)
        found.append(((best == batch["labels"]) | (batch["labels"] == -100)).all(1))
    return torch.cat(found)


def share(right: torch.Tensor, questions: list[Question]) -> dict[str, float]:
    """Accuracy over all questions and by kind."""
    by_kind = defaultdict(list)
    for value, question in zip(right.tolist(), questions, strict=True):
        by_kind["all"].append(value)
        by_kind[question.kind].append(value)
    return {kind: round(sum(by_kind[kind]) / len(by_kind[kind]), 4) for kind in ("all", *KINDS)}


def main() -> None:
    """Parse the command line, train both stages, choose the storage type, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--encoder-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rows", type=int, default=32, help="pictures of one step")
    parser.add_argument("--asked", type=int, default=12, help="questions about each picture")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model = build_model()
    # For masks of this kind the fused kernel takes 1.6 times as long a step on a CPU.
    model.set_attn_implementation("eager")
    labels = Labels(model.config.vision_config.hidden_size)
    model.train()
    train_encoder(model, labels, options.encoder_steps, 2 * options.rows, options.seed)
    prior, curve = train_answers(model, labels, options.steps, options.rows, options.asked, options.seed)

    pictures, questions = heldout(HELDOUT)
    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    asked = sum(answers.total() for answers in prior.seen.values())
    figures["trained_on"] = {"pictures": options.steps * options.rows, "questions": asked}
    exact = share(right_answers(model, pictures, questions), questions)
    model = model.to(torch.bfloat16).float()
    figures["accuracy_float32"], figures["accuracy"] = (
        exact,
        share(right_answers(model, pictures, questions), questions),
    )
    figures["accuracy_with_another_picture"] = share(right_answers(model, pictures.roll(1, 0), questions), questions)
    text_only = torch.tensor([prior.answer(question.text) == question.answer for question in questions])
    figures["accuracy_of_the_most_frequent_answer"] = share(text_only, questions)
    print(json.dumps(figures, indent=1))
    if figures["accuracy"]["all"] < exact["all"] - ROUNDING_TOLERANCE:
        raise RuntimeError("bfloat16 costs accuracy")
    options.out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=TOKEN[START], eos_token_id=TOKEN[END], pad_token_id=TOKEN[PAD]
    )
    model.to(torch.bfloat16).save_pretrained(options.out)
    make_processor().save_pretrained(options.out)
    curve_text = json.dumps({"figures": figures, "curve": curve}, indent=1)
    (options.out / "curve.json").write_text(curve_text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
