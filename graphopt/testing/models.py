"""Small random transformers of our own, in plain torch: what the laws are tried on.

A `Shape` says everything about one; `build` makes and captures it. The layouts are those that views must tell apart:
packed and separate projections, norms before, after and around, parallel blocks, rotary and learned positions, experts,
a decoder alone, one that reads an encoder, and blocks over patches of a picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt.ops  # noqa: F401  (defines torch.ops.graphopt)
from graphopt.frontend import capture_module
from graphopt.ir.program import Dim, Input, Program

LONGEST = 64
ROTARY = ("rotary", "interleaved", "partial")
# Pictures are 3 x 6 x 6 and their patches 2 x 2.
CHANNELS, SIDE, PATCH = 3, 6, 2
ACTIVATIONS = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu, "tanh": torch.tanh}


@dataclass(frozen=True)
class Shape:
    """Everything about a small model; the defaults are the plainest. `hidden` is independent of heads x head_dim.

    `experts` 0 is one feed-forward; otherwise each token goes to `chosen` of them. An encoder-decoder has `layers` on
    either side. Raises ValueError for what no such model can be: heads that KV heads do not divide, rotary over an odd
    head size, more chosen experts than there are.
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
    positions: Literal["none", "rotary", "interleaved", "partial", "learned"] = "none"
    window: int | None = None
    activation: Literal["relu", "silu", "gelu", "tanh"] = "relu"
    causal: bool = True
    qk_norm: bool = False
    experts: int = 0
    chosen: int = 1
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    kind: Literal["decoder", "encoder_decoder", "vision"] = "decoder"

    def __post_init__(self) -> None:
        sizes = (self.layers, self.heads, self.kv_heads, self.head_dim, self.hidden, self.neurons, self.vocabulary)
        if min(sizes) < 1 or (self.window is not None and self.window < 1):
            raise ValueError(f"every size must be at least 1: {self}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} KV heads do not divide {self.heads} heads")
        if self.positions in ROTARY and self.head_dim % 2:
            raise ValueError(f"rotary embedding turns pairs, but head_dim is {self.head_dim}")
        if self.positions == "partial" and self.head_dim < 4:
            raise ValueError("partial rotary embedding needs a head_dim of 4 or more")
        if self.packed_gate_up and not self.gated:
            raise ValueError("packed_gate_up needs gated")
        if self.experts < 0 or not 1 <= self.chosen <= max(1, self.experts):
            raise ValueError(f"{self.chosen} experts cannot be chosen of {self.experts}")

    def to_json(self) -> dict[str, Any]:
        """Only what differs from the plainest model."""
        plain = asdict(Shape())
        return {name: value for name, value in asdict(self).items() if value != plain[name]}

    def __str__(self) -> str:
        return "Shape(" + ", ".join(f"{name}={value!r}" for name, value in self.to_json().items()) + ")"


@lru_cache(maxsize=256)
def build(shape: Shape, seed: int = 0) -> Program:
    """The captured model of a shape, weights drawn from `seed`.

    A decoder takes `input_ids` `[B, S]` and gives `[B, S, V]`; an encoder-decoder takes `features` `[B, T, hidden]`, as
    those of speech do, besides; vision takes `pixel_values` `[B, 3, 6, 6]` and gives `[B, V]`.
    """
    dtype = getattr(torch, shape.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _KINDS[shape.kind](shape)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn_like(parameter)
                gain = parameter.dim() == 1 and name.endswith("weight")
                parameter.copy_(1 + 0.1 * noise if gain else 0.3 * noise)
    inputs = _inputs(shape, dtype)
    named = {size for spec in inputs for size in spec.shape}
    return capture_module(model.to(dtype), inputs, dims=tuple(dim for dim in DIMS if dim.name in named))


DIMS = (Dim("B", 1, 1 << 16, 3), Dim("S", 1, 1 << 20, 19), Dim("T", 1, 1 << 20, 7))


def _inputs(shape: Shape, dtype: torch.dtype) -> tuple[Input, ...]:
    if shape.kind == "vision":
        return (Input("pixel_values", ("B", CHANNELS, SIDE, SIDE), dtype),)
    tokens = Input("input_ids", ("B", "S"), torch.int64, "tokens")
    return (
        (tokens, Input("features", ("B", "T", shape.hidden), dtype)) if shape.kind == "encoder_decoder" else (tokens,)
    )


class Stack(nn.Module):  # type: ignore[misc]
    """Layers, positions in front of them and a norm behind."""

    def __init__(self, shape: Shape, cross: bool = False) -> None:
        super().__init__()
        self.shape = shape
        if shape.positions == "learned":
            self.positions = nn.Embedding(LONGEST, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, cross) for _ in range(shape.layers))
        self.norm = None if shape.place == "post" else make_norm(shape, shape.hidden)

    def run(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """The stream `[B, S, hidden]` after all layers; `memory` `[B, T, hidden]` is what they also look at."""
        places = torch.arange(x.shape[1], device=x.device)
        if self.shape.positions == "learned":
            x = x + self.positions(places)
        angles = self._angles(places)
        for layer in self.layers:
            x = layer(x, angles, memory)
        return x if self.norm is None else self.norm(x)

    def _angles(self, places: Tensor) -> Tensor | None:
        """Rotation angles `[1, 1, S, R]`, each for the two features that turn together."""
        if self.shape.positions not in ROTARY:
            return None
        width = rotated(self.shape)
        frequencies = 100.0 ** (-torch.arange(0, width, 2, device=places.device) / width)
        angle = places[:, None] * frequencies[None, :]
        if self.shape.positions == "interleaved":
            return angle.repeat_interleave(2, dim=-1)[None, None]
        return torch.cat([angle, angle], dim=-1)[None, None]


class Decoder(Stack):
    """Embedding, layers, head."""

    def __init__(self, shape: Shape, cross: bool = False) -> None:
        super().__init__(shape, cross)
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, memory: Tensor | None = None) -> Tensor:
        """Logits `[B, S, V]` of tokens `[B, S]`."""
        return self.head(self.run(self.embedding(input_ids), memory))  # type: ignore[no-any-return]


class EncoderDecoder(nn.Module):  # type: ignore[misc]
    """A decoder whose layers also look at what an encoder made of features."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.encoder = Stack(replace(shape, causal=False))
        self.decoder = Decoder(shape, cross=True)

    def forward(self, input_ids: Tensor, features: Tensor) -> Tensor:
        """Logits `[B, S, V]` of the decoder's tokens `[B, S]` and features `[B, T, hidden]`."""
        return self.decoder(input_ids, self.encoder.run(features))  # type: ignore[no-any-return]


class Vision(Stack):
    """Patches of a picture as the stream, their mean to classes."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(replace(shape, causal=False))
        self.patches = nn.Conv2d(CHANNELS, shape.hidden, PATCH, stride=PATCH)
        self.head = nn.Linear(shape.hidden, shape.vocabulary)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Class logits `[B, V]` of pictures `[B, 3, 6, 6]`."""
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        return self.head(self.run(x).mean(1))  # type: ignore[no-any-return]


_KINDS: dict[str, Callable[[Shape], nn.Module]] = {
    "decoder": Decoder,
    "encoder_decoder": EncoderDecoder,
    "vision": Vision,
}


class Layer(nn.Module):  # type: ignore[misc]
    """Attention, attention over a memory where there is one, and feed-forward, in one of four layouts."""

    def __init__(self, shape: Shape, cross: bool = False) -> None:
        super().__init__()
        self.place = shape.place
        self.attention = Attention(shape)
        self.feed_forward = Experts(shape) if shape.experts else FeedForward(shape)
        count = {"pre": 2, "post": 2, "sandwich": 4, "parallel": 1}[shape.place]
        self.norms = nn.ModuleList(make_norm(shape, shape.hidden) for _ in range(count))
        if cross:
            self.cross = Attention(replace(shape, causal=False, window=None, packed_qkv=False))
            self.cross_norm = make_norm(shape, shape.hidden)

    def forward(self, x: Tensor, angles: Tensor | None, memory: Tensor | None = None) -> Tensor:
        """The stream `[B, S, hidden]` after the layer."""
        if memory is not None:
            x = x + self.cross(self.cross_norm(x), None, memory)
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

    def forward(self, x: Tensor, angles: Tensor | None, memory: Tensor | None = None) -> Tensor:
        """What the layer adds to the stream; keys and values come from `memory` where there is one."""
        shape = self.shape
        batch, length, _ = x.shape
        if shape.packed_qkv:
            q, k, v = self.qkv(x).split(self.sizes, dim=-1)
        else:
            source = x if memory is None else memory
            q, k, v = self.q(x), self.k(source), self.v(source)
        q, k, v = (y.view(batch, y.shape[1], -1, shape.head_dim).transpose(1, 2) for y in (q, k, v))
        if shape.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            near = shape.positions == "interleaved"
            q, k = rotate(q, angles, near), rotate(k, angles, near)
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


class Experts(nn.Module):  # type: ignore[misc]
    """Feed-forwards of which each token goes to some, its router's share of each."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.activation = ACTIVATIONS[shape.activation]
        self.router = nn.Linear(shape.hidden, shape.experts, bias=False)
        self.up = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.neurons))
        if shape.gated:
            self.gate = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.neurons))
        self.down = nn.Parameter(torch.empty(shape.experts, shape.neurons, shape.hidden))

    def forward(self, x: Tensor) -> Tensor:
        """What the layer adds to the stream."""
        rows = x.reshape(-1, self.shape.hidden)
        shares, places = self.router(rows).softmax(-1).topk(self.shape.chosen, dim=-1)
        chosen = places.reshape(-1)
        many = rows.repeat_interleave(self.shape.chosen, 0).unsqueeze(1)
        y = self.activation(torch.bmm(many, (self.gate if self.shape.gated else self.up)[chosen]))
        if self.shape.gated:
            y = y * torch.bmm(many, self.up[chosen])
        each = torch.bmm(y, self.down[chosen]).squeeze(1) * shares.reshape(-1, 1)
        return each.view(rows.shape[0], self.shape.chosen, self.shape.hidden).sum(1).view(x.shape)


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
    return 2 * (shape.head_dim // 4) if shape.positions == "partial" else shape.head_dim


def rotate(x: Tensor, angles: Tensor, near: bool = False) -> Tensor:
    """Turn the leading features of `[B, H, S, D]` by `[1, 1, S, R]`, pairing i with i + R/2, or 2i with 2i + 1."""
    width = angles.shape[-1]
    head, rest = x[..., :width], x[..., width:]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    if near:
        turned = torch.stack([-head[..., 1::2], head[..., ::2]], dim=-1).flatten(-2)
    else:
        turned = torch.cat([-head[..., width // 2 :], head[..., : width // 2]], dim=-1)
    head = head * cos + turned * sin
    return head if width == x.shape[-1] else torch.cat([head, rest], dim=-1)
