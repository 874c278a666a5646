"""Code that no one wrote for us: torch's own transformer and attention modules, and a GPT written by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt.frontend import capture_module
from graphopt.ir.program import Input
from graphopt.passkit import Context, PassRegistry
from graphopt.passkit.edits import apply_edits, emulate_edits
from graphopt.views import Views

TOKENS = (Input("idx", ("B", "S"), torch.int64, "tokens"),)
HIDDEN = (Input("x", ("B", "S", 32), torch.float32),)
SOURCE = (Input("src", ("B", "S", 32), torch.float32),)


class CausalSelfAttention(nn.Module):
    """Packed projections; the softmax spelled out over a triangle buffer, or torch's fused attention."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.heads = fused, 4
        self.c_attn, self.c_proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.size()
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in self.c_attn(x).split(32, 2))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            scores = scores.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = F.softmax(scores, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Layer(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attn = CausalSelfAttention(fused)
        self.mlp = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class HandWrittenGPT(nn.Module):
    """Learnt positions, pre-norm layers and a tied head, as short training repositories write them."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(96, 32), nn.Embedding(64, 32)
        self.h = nn.ModuleList(Layer(fused) for _ in range(3))
        self.ln_f = nn.LayerNorm(32)
        self.lm_head = nn.Linear(32, 96, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.wte(idx) + self.wpe(positions)
        for layer in self.h:
            x = layer(x)
        return self.lm_head(self.ln_f(x))


class EinsumAttention(nn.Module):
    """Products in Einstein's notation, keys in either order, and rows that see nothing set to zero."""

    def __init__(self, turned: bool) -> None:
        super().__init__()
        self.turned = turned
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.turned:
            scores = torch.einsum("bhij,bhjk->bhik", q, k.transpose(-1, -2))
        else:
            scores = torch.einsum("bhid,bhjd->bhij", q, k)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()[None, None]
        probabilities = (scores / 8**0.5).masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0.0)
        y = torch.einsum("bhij,bhjd->bhid", probabilities, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


class FoldedAttention(nn.Module):
    """Heads folded into the batch, and nothing masked."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, S, _ = x.shape
        q, k, v = (p(x).view(B, S, 4, 8).transpose(1, 2).reshape(B * 4, S, 8) for p in (self.q, self.k, self.v))
        y = torch.bmm(torch.softmax(torch.bmm(q / math.sqrt(8), k.transpose(1, 2)), -1), v)
        return self.o(y.view(B, 4, S, 8).transpose(1, 2).reshape(B, S, 32))


class SelfAttention(nn.Module):
    """nn.MultiheadAttention behind a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


class SmallConvNet(nn.Module):
    """The digit classifier of torch's examples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(16 * 12 * 12, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        x = self.dropout2(F.relu(self.fc1(torch.flatten(self.dropout1(x), 1))))
        return F.log_softmax(self.fc2(x), dim=1)


class WordLanguageModel(nn.Module):
    """The transformer of torch's language-model example: length before batch, sinusoidal positions, a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(96, 32), nn.Linear(32, 96)
        layer = nn.TransformerEncoderLayer(32, 4, 56, dropout=0.2)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        position = torch.arange(64).unsqueeze(1) * torch.exp(torch.arange(0, 32, 2) * (-math.log(10000.0) / 32))
        table = torch.stack([position.sin(), position.cos()], -1).flatten(1)
        self.register_buffer("positions", table.unsqueeze(1))

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        source = idx.t()
        mask = torch.triu(torch.full((source.size(0), source.size(0)), float("-inf"), device=idx.device), 1)
        x = self.embedding(source) * math.sqrt(32) + self.positions[: source.size(0)]
        return F.log_softmax(self.decoder(self.encoder(x, mask=mask)), dim=-1)


class VisionTransformer(nn.Module):
    """Patches by a convolution, a class token, learnt positions and pre-norm encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 17, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 56, batch_first=True, norm_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(32), enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])


class EncoderDecoder(nn.Module):
    """nn.Transformer over two sequences, self- and cross-attention through nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(32, 4, 2, 2, 56, batch_first=True)

    def forward(self, src: torch.Tensor) -> torch.Tensor:
        return self.transformer(src, src[:, 1:])


def encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 56, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)


# Module, inputs, a shape that is not captured, and the attentions, feed-forwards and blocks that it has.
CASES = {
    "gpt": (lambda: HandWrittenGPT(), TOKENS, (3, 5), (3, 3, 3)),
    "gpt, fused": (lambda: HandWrittenGPT(fused=True), TOKENS, (3, 5), (3, 3, 3)),
    "encoder, post-norm": (lambda: encoder(False), SOURCE, (2, 7, 32), (3, 3, 3)),
    "encoder, pre-norm": (lambda: encoder(True), SOURCE, (2, 7, 32), (3, 3, 3)),
    "word language model": (WordLanguageModel, TOKENS, (3, 5), (3, 3, 3)),
    "vision transformer": (
        VisionTransformer,
        (Input("x", ("B", 3, 32, 32), torch.float32),),
        (5, 3, 32, 32),
        (3, 3, 3),
    ),
    "encoder and decoder": (EncoderDecoder, SOURCE, (2, 7, 32), (6, 4, None)),
    "attention, einsum": (lambda: EinsumAttention(False), HIDDEN, (2, 7, 32), (1, 0, None)),
    "attention, einsum over turned keys": (lambda: EinsumAttention(True), HIDDEN, (2, 7, 32), (1, 0, None)),
    "attention, folded heads": (FoldedAttention, HIDDEN, (2, 7, 32), (1, 0, None)),
    "attention": (SelfAttention, HIDDEN, (2, 7, 32), (1, 0, None)),
    "convolutions": (
        SmallConvNet,
        (Input("x", ("B", 1, 28, 28), torch.float32),),
        (5, 1, 28, 28),
        (0, None, 0),
    ),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_plain_module(case: str) -> None:
    make, specs, shape, counts = CASES[case]
    torch.manual_seed(0)
    module = make().eval()
    program = capture_module(module, specs)
    given = torch.randint(0, 96, shape) if specs is TOKENS else torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(**{specs[0].name: given})[0], module(given), rtol=1e-4, atol=1e-5)
    views = Views(program)
    found = (len(views.attentions), len(views.feed_forwards), len(views.blocks))
    assert all(have == want for have, want in zip(found, counts, strict=True) if want is not None), found


SURGERIES = {
    "heads": ("prune_heads", {"unit": "query", "keep": "heads - 1"}),
    "neurons": ("prune_neurons", {"keep": "floor(0.75 * neurons)"}),
    "layers": ("skip_layers", {"layers": 1}),
}


@pytest.mark.parametrize("surgery", sorted(SURGERIES))
@pytest.mark.parametrize("case", ["gpt", "encoder, post-norm", "vision transformer", "word language model"])
def test_plain_module_is_cut(case: str, surgery: str) -> None:
    make, specs, shape, _ = CASES[case]
    torch.manual_seed(0)
    program = capture_module(make().eval(), specs)
    name, options = SURGERIES[surgery]
    step = PassRegistry().get(name).model_validate_json(json.dumps(options))
    views = Views(program)
    plan = step.plan(Context(views, tuple(range(len(views.blocks)))))
    assert plan.edits, plan.declines
    given = torch.randint(0, 96, shape) if specs is TOKENS else torch.randn(shape, dtype=torch.float64)
    cut, expected = (
        do(program, views, plan.edits).module(torch.float64)(**{specs[0].name: given})[0]
        for do in (apply_edits, emulate_edits)
    )
    torch.testing.assert_close(cut, expected, rtol=1e-9, atol=1e-9)
