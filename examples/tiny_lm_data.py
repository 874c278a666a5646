"""Text, tokenizer and n-gram baseline for ``train_tiny_lm.py``.

The corpus is what every CPython installation holds: the language reference in ``pydoc_data.topics``, the docstrings
of the modules written in C, and the source of the standard library without its tests.  Whole documents are held out,
chosen by a hash of their name, so the split does not depend on the order in which files are found.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import random
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "_bundled",
    "__pycache__",
    "lib-dynload",
    "pydoc_data",
}
# Generated tables and build settings: long runs of numbers and paths teach a small model nothing.
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
SKIPPED_FILES = {"html/entities.py"}
C_MODULES = (
    "array", "binascii", "builtins", "cmath", "collections", "_csv", "_datetime", "_decimal", "errno", "faulthandler",
    "_functools", "gc", "_hashlib", "_io", "itertools", "_json", "marshal", "math", "mmap", "_operator", "_pickle",
    "posix", "_random", "select", "_socket", "_sqlite3", "_sre", "_ssl", "_struct", "sys", "_thread", "time",
    "unicodedata", "_weakref", "zlib",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One named text; ``place`` in [0, 1) is the hash of the name that decides the split."""

    name: str
    text: str

    @property
    def place(self) -> float:
        """Hash of the name, in [0, 1)."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:6], "big") / 2**48


def _source_documents() -> list[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.as_posix() in SKIPPED_FILES:
            continue
        if any(part.startswith(SKIPPED_PREFIXES) for part in relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        is_table = relative.parts[0] == "encodings" and ("_table" in text or "_map" in text)
        if not is_table and len(text) >= 200:
            documents.append(Document(f"lib/{relative.as_posix()}", text))
    return documents


def _docstring_documents() -> list[Document]:
    documents = []
    for name in C_MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        parts = [f"{name}\n\n{inspect.getdoc(module) or ''}"]
        for key, value in sorted(vars(module).items()):
            if key.startswith("_") or getattr(value, "__module__", name) not in (name, None):
                continue
            members = [(key, value)]
            if inspect.isclass(value):
                members += [(f"{key}.{k}", v) for k, v in sorted(vars(value).items()) if not k.startswith("_")]
            for title, member in members:
                if callable(member) and isinstance(member.__doc__, str):
                    parts.append(f"{title}\n    " + inspect.getdoc(member).replace("\n", "\n    "))
        documents.append(Document(f"doc/{name}", "\n\n".join(parts)))
    return documents


def load_documents() -> list[Document]:
    """Every document of the corpus, in name order."""
    reference = [Document(f"topic/{name}", text) for name, text in sorted(topics.topics.items())]
    found = {document.text.strip(): document for document in reference + _docstring_documents() + _source_documents()}
    return sorted(found.values(), key=lambda document: document.name)


def _paragraph_key(paragraph: str) -> str:
    return " ".join(paragraph.split())


def split_documents(documents: list[Document], heldout_share: float = 0.03) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents; ``heldout_share`` is the fraction of documents held out."""
    heldout = [document for document in documents if document.place < heldout_share]
    keys = {_paragraph_key(part) for document in heldout for part in document.text.split("\n\n")}
    # Reference topics quote one another, so a paragraph that is held out must leave the training text everywhere.
    unseen = {key for key in keys if len(key) >= 80}
    train = []
    for document in documents:
        if document.place >= heldout_share:
            parts = [part for part in document.text.split("\n\n") if _paragraph_key(part) not in unseen]
            train.append(Document(document.name, "\n\n".join(parts)))
    return train, heldout


def join_texts(documents: list[Document], limit: int, per_document: int) -> str:
    """Documents in hash order joined by the separator, at most ``limit`` characters, ``per_document`` of each."""
    pieces: list[str] = []
    size = 0
    for document in sorted(documents, key=lambda document: document.place):
        piece = document.text[:per_document].rstrip() + "\n"
        if size + len(piece) > limit:
            continue
        pieces.append(piece)
        size += len(piece)
    return END.join(pieces)


def train_tokenizer(documents: list[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``vocab_size`` tokens whose only special token separates documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> list[np.ndarray]:
    """Token ids of each document followed by the separator, int64 ``[tokens]`` each."""
    end = tokenizer.convert_tokens_to_ids(END)
    batch = tokenizer.backend_tokenizer.encode_batch([document.text for document in documents])
    return [np.array([*encoding.ids, end], dtype=np.int64) for encoding in batch]


class Windows:
    """Endless batches of token windows: each epoch shuffles the documents, joins them and cuts them afresh."""

    def __init__(self, documents: list[np.ndarray], repeat_share: float, seed: int) -> None:
        self.documents = documents
        self.repeat_share = repeat_share
        self.random = random.Random(seed)
        self.stream = np.empty(0, dtype=np.int64)
        self.starts: list[int] = []
        self.length = 0

    def _next_window(self, length: int) -> np.ndarray:
        if not self.starts or length != self.length:
            self.length = length
            order = self.random.sample(self.documents, len(self.documents))
            self.stream = np.concatenate(order)
            self.starts = list(range(self.random.randrange(length), len(self.stream) - length - 1, length))
            self.random.shuffle(self.starts)
        start = self.starts.pop()
        return self.stream[start : start + length + 1]

    def batch(self, rows: int, length: int) -> np.ndarray:
        """``rows`` windows of ``length`` predictions each, int64 ``[rows, length + 1]``."""
        result = []
        for _ in range(rows):
            window = self._next_window(length)
            if self.random.random() < self.repeat_share:
                other = self._next_window(length)
                chunk = window[: self.random.randint(length // 8, length // 3)]
                if self.random.random() < 0.5:
                    # Out of order, the chunk can be foretold by copying only.
                    chunk = chunk[self.random.sample(range(len(chunk)), len(chunk))]
                gap = self.random.randint(1, length // 4)
                window = np.concatenate([chunk, other[:gap], chunk, other[gap:]])[: length + 1]
            result.append(window)
        return np.stack(result)


class NgramModel:
    """Interpolated Kneser-Ney n-gram model on token ids; its probabilities sum to one over the vocabulary."""

    def __init__(self, tokens: np.ndarray, vocab_size: int, order: int = 5) -> None:
        self.order = order
        self.bits = int(vocab_size - 1).bit_length()
        if self.bits * order > 63:
            raise ValueError("an n-gram does not fit 63 bits")
        self.vocab_size = vocab_size
        keys, counts = np.unique(self._keys(tokens, order), return_counts=True)
        self.levels: list[tuple[np.ndarray, ...]] = []
        for length in range(order, 0, -1):
            singles, pairs = (counts == 1).sum(), (counts == 2).sum()
            discount = singles / max(singles + 2 * pairs, 1)
            contexts, first = np.unique(keys >> self.bits, return_index=True)
            totals = np.add.reduceat(counts, first)
            kinds = np.diff(np.append(first, len(keys)))
            self.levels.insert(0, (keys, np.maximum(counts - discount, 0.0), contexts, totals, discount * kinds))
            # A lower order counts the distinct words seen before the n-gram, not how often it was seen.
            keys, counts = np.unique(keys & ((1 << (self.bits * (length - 1))) - 1), return_counts=True)

    def _keys(self, tokens: np.ndarray, length: int) -> np.ndarray:
        count = len(tokens) - length + 1
        keys = np.zeros(count, dtype=np.int64)
        for offset in range(length):
            keys = (keys << self.bits) | tokens[offset : offset + count]
        return keys

    @staticmethod
    def _find(table: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
        return np.where(table[place] == keys, values[place], 0.0)

    def probabilities(self, grams: np.ndarray) -> np.ndarray:
        """Probability of the last token of each row given those before, ``[rows, order]`` to float64 ``[rows]``."""
        result = np.full(len(grams), 1.0 / self.vocab_size)
        for length, (keys, counts, contexts, totals, reserved) in enumerate(self.levels, start=1):
            key = np.zeros(len(grams), dtype=np.int64)
            for column in range(self.order - length, self.order):
                key = (key << self.bits) | grams[:, column]
            context = key >> self.bits
            total = self._find(contexts, totals, context)
            safe = np.maximum(total, 1.0)
            mixed = (self._find(keys, counts, key) + self._find(contexts, reserved, context) * result) / safe
            result = np.where(total > 0, mixed, result)
        return result

    def losses(self, tokens: np.ndarray, padding: int) -> np.ndarray:
        """Loss of every token in nats, float64 ``[tokens]``; ``padding`` stands before the first."""
        padded = np.concatenate([np.full(self.order - 1, padding), tokens])
        return -np.log(self.probabilities(np.lib.stride_tricks.sliding_window_view(padded, self.order)))

    def normalisation_error(self, tokens: np.ndarray, samples: int = 20) -> float:
        """Largest distance from one of the summed probabilities over ``samples`` contexts of ``tokens``."""
        worst = 0.0
        for start in np.linspace(0, len(tokens) - self.order, samples).astype(int):
            context = np.tile(tokens[start : start + self.order - 1], (self.vocab_size, 1))
            rows = np.concatenate([context, np.arange(self.vocab_size)[:, None]], axis=1)
            worst = max(worst, abs(float(self.probabilities(rows).sum()) - 1.0))
        return worst


def describe_python() -> str:
    """Name and version of the running interpreter, whose library is the corpus."""
    return f"{sys.implementation.name} {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
