"""Small random transformers of our own, in plain torch: what the laws are tried on.

A `Shape` says everything about one; `build` makes and captures it. The layouts are those that views must tell apart:
packed and separate projections, norms before, after and around, parallel blocks, rotary and learned positions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)
from graphopt.frontend import capture_module
from graphopt.ir.program import Input, Program

LONGEST = 64
ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh}


@dataclass(frozen=True)
class Shape:
    """Everything about a small model; the defaults are the plainest. `hidden` is independent of heads x head_dim.

    Raises ValueError for what no such model can be: heads that KV heads do not divide, rotary over an odd head size.
    """

    layers: int = 1
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 2
    hidden: int = 4
    neurons: int = 2
    vocabulary: int = 5
    tied: bool = False
    gated: bool = False
    packed_qkv: bool = False
    packed_gate_up: bool = False
    biases: bool = False
    norm: Literal["rms", "layer"] = "rms"
    place: Literal["pre", "post", "sandwich", "parallel"] = "pre"
    positions: Literal["none", "rotary", "partial", "learned"] = "none"
    window: int | None = None
    activation: Literal["relu", "silu", "gelu", "tanh"] = "relu"
    causal: bool = True
    qk_norm: bool = False
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"

    def __post_init__(self) -> None:
        sizes = (self.layers, self.heads, self.kv_heads, self.head_dim, self.hidden, self.neurons, self.vocabulary)
        if min(sizes) < 1 or (self.window is not None and self.window < 1):
            raise ValueError(f"every size must be at least 1: {self}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} KV heads do not divide {self.heads} heads")
        if self.positions in ("rotary", "partial") and self.head_dim % 2:
            raise ValueError(f"rotary embedding turns pairs, but head_dim is {self.head_dim}")
        if self.positions == "partial" and self.head_dim < 4:
            raise ValueError("partial rotary embedding needs a head_dim of 4 or more")
        if self.packed_gate_up and not self.gated:
            raise ValueError("packed_gate_up needs gated")

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the plainest model."""
        plain = asdict(Shape())
        return {name: value for name, value in asdict(self).items() if value != plain[name]}

    def __str__(self) -> str:
        return "Shape(" + ", ".join(f"{name}={value!r}" for name, value in self.to_json().items()) + ")"


@lru_cache(maxsize=256)
def build(shape: Shape, seed: int = 0) -> Program:
    """The captured model of a shape, weights drawn from `seed`; input `input_ids` `[B, S]`, result `[B, S, V]`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(shape)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn_like(parameter)
                gain = parameter.dim() == 1 and name.endswith("weight")
                parameter.copy_(1 + 0.1 * noise if gain else 0.3 * noise)
    model = model.to(getattr(torch, shape.dtype))
    return capture_module(model, (Input("input_ids", ("B", "S"), torch.int64, "tokens"),))


class Model(nn.Module):  # type: ignore[misc]
    """Embedding, layers, head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        if shape.positions == "learned":
            self.positions = nn.Embedding(LONGEST, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = None if shape.place == "post" else make_norm(shape, shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `[B, S, V]` of tokens `[B, S]`."""
        x = self.embedding(input_ids)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        if self.shape.positions == "learned":
            x = x + self.positions(places)
        angles = self._angles(places)
        for layer in self.layers:
            x = layer(x, angles)
        if self.norm is not None:
            x = self.norm(x)
        return self.head(x)  # type: ignore[no-any-return]

    def _angles(self, places: Tensor) -> Tensor | None:
        """Rotation angles `[1, 1, S, R]`."""
        if self.shape.positions not in ("rotary", "partial"):
            return None
        width = rotated(self.shape)
        frequencies = 100.0 ** (-torch.arange(0, width, 2, device=places.device) / width)
        angle = places[:, None] * frequencies[None, :]
        return torch.cat([angle, angle], dim=-1)[None, None]


class Layer(nn.Module):  # type: ignore[misc]
    """Attention and feed-forward around the residual stream, in one of four layouts."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.place = shape.place
        self.attention = Attention(shape)
        self.feed_forward = FeedForward(shape)
        count = {"pre": 2, "post": 2, "sandwich": 4, "parallel": 1}[shape.place]
        self.norms = nn.ModuleList(make_norm(shape, shape.hidden) for _ in range(count))

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        """The stream `[B, S, hidden]` after the layer."""
        norms = list(self.norms)
        if self.place == "parallel":
            y = norms[0](x)
            return x + self.attention(y, angles) + self.feed_forward(y)  # type: ignore[no-any-return]
        if self.place == "post":
            x = norms[0](x + self.attention(x, angles))
            return norms[1](x + self.feed_forward(x))  # type: ignore[no-any-return]
        if self.place == "sandwich":
            x = x + norms[1](self.attention(norms[0](x), angles))
            return x + norms[3](self.feed_forward(norms[2](x)))  # type: ignore[no-any-return]
        x = x + self.attention(norms[0](x), angles)
        return x + self.feed_forward(norms[1](x))  # type: ignore[no-any-return]


class Attention(nn.Module):  # type: ignore[misc]
    """Grouped-query attention, packed or not."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.sizes = [shape.heads * shape.head_dim, *2 * [shape.kv_heads * shape.head_dim]]
        if shape.packed_qkv:
            self.qkv = nn.Linear(shape.hidden, sum(self.sizes), bias=shape.biases)
        else:
            self.q, self.k, self.v = (nn.Linear(shape.hidden, size, bias=shape.biases) for size in self.sizes)
        self.o = nn.Linear(self.sizes[0], shape.hidden, bias=shape.biases)
        if shape.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(shape.head_dim), RMSNorm(shape.head_dim)

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        """What the layer adds to the stream."""
        shape = self.shape
        batch, length, _ = x.shape
        if shape.packed_qkv:
            q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (y.view(batch, length, -1, shape.head_dim).transpose(1, 2) for y in (q, k, v))
        if shape.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        mask = None
        if shape.window is not None:
            mask = torch.ops.graphopt.attention_mask(x, None, length, length, shape.causal, shape.window)
        causal = shape.causal and mask is None
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shape.heads != shape.kv_heads
        )
        return self.o(y.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]


class FeedForward(nn.Module):  # type: ignore[misc]
    """Up, activation (gated or not), down."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.activation = ACTIVATIONS[shape.activation]
        if shape.packed_gate_up:
            self.gate_up = nn.Linear(shape.hidden, 2 * shape.neurons, bias=shape.biases)
        else:
            self.up = nn.Linear(shape.hidden, shape.neurons, bias=shape.biases)
            if shape.gated:
                self.gate = nn.Linear(shape.hidden, shape.neurons, bias=shape.biases)
        self.down = nn.Linear(shape.neurons, shape.hidden, bias=shape.biases)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer adds to the stream."""
        if self.shape.packed_gate_up:
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(self.activation(gate) * up)  # type: ignore[no-any-return]
        if self.shape.gated:
            return self.down(self.activation(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]
        return self.down(self.activation(self.up(x)))  # type: ignore[no-any-return]


class RMSNorm(nn.Module):  # type: ignore[misc]
    """Root mean square normalisation as Llama spells it: statistics in float32, gain in the model's dtype."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """x / rms(x) * gain over the last axis."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)
        return self.weight * normed.to(x.dtype)


def make_norm(shape: Shape, size: int) -> nn.Module:
    """The norm that a shape asks for."""
    return RMSNorm(size) if shape.norm == "rms" else nn.LayerNorm(size, bias=shape.biases)


def rotated(shape: Shape) -> int:
    """How many features of a head turn."""
    return shape.head_dim if shape.positions == "rotary" else 2 * (shape.head_dim // 4)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the leading features of `[B, H, S, D]` by `[1, 1, S, R]`, pairing i with i + R/2."""
    width = angles.shape[-1]
    head, rest = x[..., :width], x[..., width:]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    turned = torch.cat([-head[..., width // 2 :], head[..., : width // 2]], dim=-1)
    head = head * cos + turned * sin
    return head if width == x.shape[-1] else torch.cat([head, rest], dim=-1)
