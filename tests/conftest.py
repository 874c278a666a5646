"""Settings and fixtures that all tests share: offline, Hypothesis profiles, a tiny checkpoint with a tokenizer."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Two workers share two cores; more threads than cores would wait for each other.
torch.set_num_threads(1)
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("ci", derandomize=True, max_examples=25, **_COMMON)
settings.register_profile("dev", max_examples=25, **_COMMON)
settings.register_profile("fuzz", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

WORDS = ("the", "def", "return", "self", "import", "of", "a", "to", "is", "in", "and", "for", "not", "with", "if")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with a word tokenizer, and heldout.txt beside its weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig

    directory = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    vocabulary = {word: i for i, word in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "heldout.txt").write_text(" ".join(WORDS * 20))
    return directory


@pytest.fixture
def spec(tmp_path: Path, checkpoint: Path) -> Path:
    """A spec that halves the neurons of the second layer of the checkpoint."""
    data = os.path.relpath(checkpoint / "heldout.txt", tmp_path)
    file = tmp_path / "half.yaml"
    file.write_text(
        "graphopt: 1\n"
        f"model: {checkpoint}\n"
        f"evaluation: {{data: {data}, samples: 4, seq: 16}}\n"
        "steps:\n"
        "  - use: prune_neurons\n"
        "    keep: 50%\n"
        "    where: {layers: [1]}\n"
    )
    return file
