"""Train the small language model that is shipped in ``examples/tiny_lm``.

A Llama of about three million parameters with plain multi-head attention learns Python source and documentation from
the running interpreter's own library, on a CPU, within a wall-time budget.  The script prepares the text, trains the
tokenizer and an n-gram baseline, trains the model with Muon and AdamW, measures it and saves it::

    python examples/train_tiny_lm.py --minutes 90 --out examples/tiny_lm

Learning rate and window length follow the elapsed share of the budget, so a run on a slower or busier machine ends in
time with a fully decayed model that has seen fewer tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_lm_data import (
    END,
    NgramModel,
    Windows,
    describe_python,
    encode_documents,
    join_texts,
    load_documents,
    split_documents,
    train_tokenizer,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 2048
CONTEXT = 512
HELDOUT_CHARACTERS = 300_000
CALIBRATION_CHARACTERS = 200_000
ROUNDING_TOLERANCE = 0.003
# Long enough to be made of several tokens, and an underscore, digit or inner capital tells it from a word of prose.
NAME = re.compile(r"\b(?=\w*[a-z][A-Z]|\w*\w_\w|[A-Za-z_]+\d)[A-Za-z_]\w{3,}\b")
# None ends in white space: the tokenizer joins a line break to the indentation that follows it.
PROMPTS = (
    "def read_lines(path, encoding=None):",
    "class ConnectionPool:",
    "The with statement is used to",
    "import os\nimport sys",
)


def build_model(context: int = CONTEXT) -> LlamaForCausalLM:
    """A fresh Llama with about three million parameters for windows of ``context`` tokens."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=24,
        max_position_embeddings=context,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def token_losses(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """Next-token losses in nats, int64 ``[rows, length + 1]`` to float32 ``[rows, length]``."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")


def cut_windows(tokens: np.ndarray, length: int = CONTEXT) -> torch.Tensor:
    """Windows that overlap in one token, so that each predicts ``length`` tokens, ``[rows, length + 1]``."""
    rows = (len(tokens) - 1) // length
    return torch.from_numpy(np.stack([tokens[row * length : row * length + length + 1] for row in range(rows)]))


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, windows: torch.Tensor, rows: int = 8) -> torch.Tensor:
    """Losses in nats of all windows, taken ``rows`` at a time, float32 ``[windows, length]``."""
    model.eval()
    return torch.cat([token_losses(model, part) for part in windows.split(rows)])


def induction_losses(model: LlamaForCausalLM, rows: int = 32, length: int = 128) -> tuple[float, float]:
    """Mean loss in nats on random tokens and on their exact repetition, ``rows`` sequences of twice ``length``."""
    generator = torch.Generator().manual_seed(1)
    half = torch.randint(1, VOCAB_SIZE, (rows, length), generator=generator)
    losses = evaluate(model, torch.cat([half, half], dim=1))
    # The first token of the repetition cannot be known to be one.
    return losses[:, : length - 1].mean().item(), losses[:, length:].mean().item()


def name_masks(text: str, offsets: list[tuple[int, int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Non-first tokens of names at their first and at later occurrences in a window, bool ``[windows, length]``."""
    rows = (len(offsets) - 1) // length
    first = np.zeros((rows, length), dtype=bool)
    later = np.zeros((rows, length), dtype=bool)
    starts = np.array([start for start, _ in offsets])
    seen: set[tuple[int, str]] = set()
    for match in NAME.finditer(text):
        low, high = np.searchsorted(starts, [match.start() + 1, match.end()])
        # A window's own first token is only context, so position p is prediction p - 1.
        row, last = (low - 1) // length, (high - 2) // length
        if high <= low or row != last or row >= rows:
            continue
        key = (int(row), match.group())
        (later if key in seen else first)[row, low - 1 - row * length : high - 1 - row * length] = True
        seen.add(key)
    return first, later


def schedule(progress: float, fresh_steps: int, warmup_steps: int = 30, decay: float = 0.5) -> float:
    """Learning-rate factor at ``progress`` in [0, 1], ``fresh_steps`` after the optimizers began: WSD to zero."""
    return max(0.0, min(1.0, (fresh_steps + 1) / warmup_steps, (1.0 - progress) / decay))


def save_weights(model: LlamaForCausalLM, path: Path, dtype: torch.dtype) -> None:
    """Write the weights in ``dtype`` beside ``path``, then rename, so that a reader never sees half a file."""
    state = {
        name: tensor.detach().to(dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    beside = path.with_suffix(".partial")
    save_file(state, beside, metadata={"format": "pt"})
    os.replace(beside, path)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` beside ``path``, then rename."""
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the tokenizer into ``out`` under the class name that transformers used before version 5."""
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("backend", None)
    # Version 5 reads the older name as well; an older version cannot know the newer one.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, config)


def loss_and_gradients(
    model: LlamaForCausalLM, parameters: list[torch.nn.Parameter], batch: torch.Tensor
) -> tuple[float, tuple[torch.Tensor, ...]]:
    """Mean loss in nats of ``batch`` ``[rows, length + 1]`` and its gradients, on one core."""
    torch.set_num_threads(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_losses(model, batch).mean()
    return loss.item(), torch.autograd.grad(loss, parameters)


def train(
    documents: list[np.ndarray],
    heldout: np.ndarray,
    checkpoint: Path,
    minutes: float,
    repeat_share: float,
    seed: int,
    batch_tokens: int,
    workers: int,
    resume: bool,
) -> None:
    """Train for ``minutes`` of wall time and leave float32 weights and the learning curve in ``checkpoint``."""
    torch.manual_seed(seed)
    model = build_model()
    record: dict[str, object] = {"budget_minutes": minutes, "repeat_share": repeat_share, "seed": seed}
    curve: list[dict[str, float]] = []
    tokens = step = 0
    began = saved = time.monotonic()
    if resume:
        model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
        earlier = json.loads((checkpoint / "curve.json").read_text(encoding="utf-8"))
        tokens, step, curve = earlier["tokens"], earlier["steps"], earlier["curve"]
        began -= 60 * earlier["minutes"]
        record["resumed_at_steps"] = [*earlier.get("resumed_at_steps", []), step]
    record["batch_tokens"] = batch_tokens
    resumed_step = step
    windows = Windows(documents, repeat_share, seed + step)
    probe = cut_windows(heldout)[::6]
    parameters = list(model.parameters())
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    recent: list[float] = []

    def save() -> None:
        spent = round((time.monotonic() - began) / 60, 2)
        save_weights(model, checkpoint / "model.safetensors", torch.float32)
        write_json(
            checkpoint / "curve.json", record | {"minutes": spent, "tokens": tokens, "steps": step, "curve": curve}
        )

    # One thread per share of the batch: threads that meet once a step stay fast on a machine that others use too,
    # where threads that meet inside every operation wait for one another.
    pool = ThreadPoolExecutor(workers)
    while (progress := (time.monotonic() - began) / (60 * minutes)) < 1.0:
        # Short windows are cheaper while the model still learns what is near.
        length = CONTEXT // 2 if progress < 0.7 else CONTEXT
        rows = batch_tokens // length
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * schedule(progress, step - resumed_step)
        model.train()
        parts = torch.from_numpy(windows.batch(rows, length)).chunk(workers)
        results = list(pool.map(partial(loss_and_gradients, model, parameters), parts))
        shares = [len(part) / rows for part in parts]
        for index, parameter in enumerate(parameters):
            parameter.grad = sum(share * result[1][index] for share, result in zip(shares, results, strict=True))
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        recent.append(sum(share * result[0] for share, result in zip(shares, results, strict=True)))
        tokens += rows * length
        step += 1
        if step % 100 == 0 or step == 20:
            fresh, repeated = induction_losses(model)
            point = {
                "minutes": round((time.monotonic() - began) / 60, 2),
                "step": step,
                "tokens": tokens,
                "train": round(float(np.mean(recent)), 4),
                "heldout": round(evaluate(model, probe).mean().item(), 4),
                "random": round(fresh, 4),
                "repeated": round(repeated, 4),
            }
            recent.clear()
            curve.append(point)
            print(json.dumps(point), flush=True)
        if time.monotonic() - saved > 180:
            save()
            saved = time.monotonic()
    save()
    pool.shutdown()


def generate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    """``prompt`` and up to 160 tokens sampled after it at temperature 0.7 from the 40 likeliest."""
    torch.manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=160,
        do_sample=True,
        temperature=0.7,
        top_k=40,
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def finish(documents: list[np.ndarray], heldout_text: str, checkpoint: Path, out: Path) -> None:
    """Choose the storage type, measure the checkpoint against the n-gram baseline and save both in ``out``."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    encoding = tokenizer.backend_tokenizer.encode(heldout_text)
    heldout = np.array(encoding.ids)
    windows = cut_windows(heldout)
    model = build_model()
    weights = load_file(checkpoint / "model.safetensors")
    losses = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model.load_state_dict({name: tensor.to(dtype).float() for name, tensor in weights.items()}, strict=False)
        losses[dtype] = evaluate(model, windows).mean().item()
    rounding = losses[torch.bfloat16] - losses[torch.float32]
    dtype = torch.bfloat16 if rounding <= ROUNDING_TOLERANCE else torch.float16
    model.load_state_dict({name: tensor.to(dtype).float() for name, tensor in weights.items()}, strict=False)
    model.config.dtype = dtype
    model.config.save_pretrained(out)
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(out)
    save_weights(model, out / "model.safetensors", dtype)

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    own = evaluate(model, windows).numpy()
    ngram = NgramModel(np.concatenate(documents), VOCAB_SIZE)
    error = ngram.normalisation_error(heldout)
    if error > 1e-6:
        raise RuntimeError(f"the n-gram probabilities sum to one only within {error}")
    baseline = ngram.losses(heldout, padding=0)[1 : own.size + 1].reshape(own.shape)
    first, later = name_masks(heldout_text, encoding.offsets, CONTEXT)
    fresh, repeated = induction_losses(model)
    figures = {
        "python": describe_python(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "stored_as": str(dtype).removeprefix("torch."),
        "training_tokens_per_epoch": int(sum(map(len, documents))),
        "heldout_tokens": int(own.size),
        "heldout_characters_per_token": round(len(heldout_text) / len(heldout), 3),
        "heldout_loss": round(float(own.mean()), 4),
        "heldout_perplexity": round(math.exp(own.mean()), 3),
        "heldout_loss_float32": round(losses[torch.float32], 4),
        "heldout_loss_float16": round(losses[torch.float16], 4),
        "heldout_loss_bfloat16": round(losses[torch.bfloat16], 4),
        "ngram_loss": round(float(baseline.mean()), 4),
        "names_first_tokens": int(first.sum()),
        "names_first_loss": round(float(own[first].mean()), 4),
        "names_first_ngram_loss": round(float(baseline[first].mean()), 4),
        "names_later_tokens": int(later.sum()),
        "names_later_loss": round(float(own[later].mean()), 4),
        "names_later_ngram_loss": round(float(baseline[later].mean()), 4),
        "random_loss": round(fresh, 4),
        "random_repeated_loss": round(repeated, 4),
    }
    print(json.dumps(figures, indent=1))
    samples = [generate(model, tokenizer, prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    print("\n-----\n".join(samples))
    training = json.loads((checkpoint / "curve.json").read_text(encoding="utf-8"))
    write_json(out / "curve.json", {"figures": figures, **training, "samples": samples})
    plot_curve(training["curve"], figures["ngram_loss"], out / "curve.svg")


def plot_curve(curve: list[dict[str, float]], ngram_loss: float, path: Path) -> None:
    """Draw the losses of the curve in nats over millions of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tiny_lm"})
    from matplotlib import pyplot

    tokens = [point["tokens"] / 1e6 for point in curve]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    labels = {
        "train": "training",
        "heldout": "held out, every sixth window",
        "random": "random tokens",
        "repeated": "the same random tokens again",
    }
    for key, label in labels.items():
        axes.plot(tokens, [point[key] for point in curve], label=label, linewidth=1.2)
    axes.axhline(ngram_loss, linestyle="--", color="grey", linewidth=1, label="5-gram, held out")
    axes.set(xlabel="tokens seen (millions)", ylabel="nats per token", ylim=(0, 13))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Parse the command line and run every stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=90.0, help="wall-time budget of the training itself")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument(
        "--checkpoint-dir",
        type=Path,
        default=Path(tempfile.gettempdir()) / "tiny_lm_checkpoint",
        help="folder of the float32 weights written every three minutes",
    )
    parser.add_argument("--repeat-share", type=float, default=0.1, help="share of windows that repeat a chunk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens of one step")
    parser.add_argument("--workers", type=int, default=torch.get_num_threads(), help="threads that share a batch")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint, within the same budget")
    parser.add_argument("--finish-only", action="store_true", help="measure and save the last checkpoint as it is")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    options.checkpoint_dir.mkdir(parents=True, exist_ok=True)

    train_documents, heldout_documents = split_documents(load_documents())
    heldout_text = join_texts(heldout_documents, HELDOUT_CHARACTERS, per_document=60_000)
    calibration_text = join_texts(train_documents, CALIBRATION_CHARACTERS, per_document=4_000)
    (options.out / "heldout.txt").write_text(heldout_text, encoding="utf-8")
    (options.out / "calibration.txt").write_text(calibration_text, encoding="utf-8")
    tokenizer = train_tokenizer(train_documents, VOCAB_SIZE)
    save_tokenizer(tokenizer, options.out)
    documents = encode_documents(tokenizer, train_documents)
    heldout = np.array(tokenizer.backend_tokenizer.encode(heldout_text).ids)
    print(
        f"{len(train_documents)} training documents with {sum(map(len, documents))} tokens, "
        f"{len(heldout_documents)} held out with {len(heldout)} tokens; separator {END}",
        flush=True,
    )
    if not options.finish_only:
        train(
            documents,
            heldout,
            options.checkpoint_dir,
            options.minutes,
            options.repeat_share,
            options.seed,
            options.batch_tokens,
            options.workers,
            options.resume,
        )
    finish(documents, heldout_text, options.checkpoint_dir, options.out)


if __name__ == "__main__":
    main()
