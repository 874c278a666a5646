"""Small plain torch modules, each with one structure that views have to recognise; no name in them means anything."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH, HEADS, SIZE, NEURONS, EXPERTS, CHOSEN, WORDS = 16, 4, 4, 24, 3, 2, 32


class Norm(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.g = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.g


class Attend(nn.Module):
    """Softmax attention; `kv` key-value heads repeated by expand, an optional output gate, an optional second source."""

    def __init__(self, kv: int = HEADS, gate: bool = False, causal: bool = True) -> None:
        super().__init__()
        self.kv, self.causal = kv, causal
        self.a = nn.Linear(WIDTH, HEADS * SIZE, bias=False)
        self.b = nn.Linear(WIDTH, kv * SIZE, bias=False)
        self.c = nn.Linear(WIDTH, kv * SIZE, bias=False)
        self.d = nn.Linear(HEADS * SIZE, WIDTH, bias=False)
        self.e = nn.Linear(WIDTH, HEADS * SIZE, bias=False) if gate else None

    def apart(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, SIZE)).transpose(1, 2)

    def repeated(self, x: Tensor) -> Tensor:
        if self.kv == HEADS:
            return x
        b, k, s, d = x.shape
        return x[:, :, None].expand(b, k, HEADS // self.kv, s, d).reshape(b, HEADS, s, d)

    def turn(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        source = x if other is None else other
        q = self.turn(self.apart(self.a(x), HEADS))
        k = self.turn(self.apart(self.b(source), self.kv))
        v = self.apart(self.c(source), self.kv)
        y = nn.functional.scaled_dot_product_attention(
            q, self.repeated(k), self.repeated(v), is_causal=self.causal and other is None
        )
        y = y.transpose(1, 2).flatten(2)
        return self.d(y * torch.sigmoid(self.e(x)) if self.e is not None else y)


class Turned(Attend):
    """Attention under rotary embedding, spelled in one of four ways."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling

    def angles(self, length: int) -> Tensor:
        return torch.arange(length)[:, None] * torch.tensor([1.0, 0.1])[None]

    def turn(self, x: Tensor) -> Tensor:
        angle = self.angles(x.shape[2])
        cos, sin = angle.cos(), angle.sin()
        if self.spelling == "neighbours":
            turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
            return x * cos.repeat_interleave(2, -1) + turned * sin.repeat_interleave(2, -1)
        if self.spelling == "two products":
            one, two = x.chunk(2, dim=-1)
            return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)
        if self.spelling == "complex":
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(3)
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return x * torch.cat((cos, cos), -1) + turned * torch.cat((sin, sin), -1)


class Feed(nn.Module):
    """Feed-forward, gated and with a norm over its neurons on request."""

    def __init__(self, neurons: int = NEURONS, gate: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, neurons, bias=False)
        self.b = nn.Linear(WIDTH, neurons, bias=False) if gate else None
        self.c = nn.Linear(neurons, WIDTH, bias=False)
        self.n = Norm(neurons) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x)).square() if self.n is not None else nn.functional.silu(self.a(x))
        y = y * self.b(x) if self.b is not None else y
        return self.c(self.n(y) if self.n is not None else y)


class Bank(nn.Module):
    """Experts as stacked matrices: gathered by a router's choice, up and gate in one product, and one shared expert.

    With `neighbours` the matrices stand the other way round, have biases, and up and gate alternate.
    """

    def __init__(self, neighbours: bool = False) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.r = nn.Linear(WIDTH, EXPERTS, bias=False)
        up, down = (EXPERTS, 2 * NEURONS, WIDTH), (EXPERTS, WIDTH, NEURONS)
        if neighbours:
            up, down = (EXPERTS, WIDTH, 2 * NEURONS), (EXPERTS, NEURONS, WIDTH)
        self.u = nn.Parameter(torch.randn(up) * 0.3)
        self.v = nn.Parameter(torch.randn(down) * 0.3)
        self.p = nn.Parameter(torch.randn(EXPERTS, 2 * NEURONS) * 0.3)
        self.q = nn.Parameter(torch.randn(EXPERTS, WIDTH) * 0.3)
        self.s = Feed(gate=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        weight, choice = torch.topk(torch.softmax(self.r(rows), -1), CHOSEN)
        picked = choice.reshape(-1)
        many = rows.repeat_interleave(CHOSEN, 0)
        if self.neighbours:
            both = torch.bmm(many.unsqueeze(1), self.u[picked]).squeeze(1) + self.p[picked]
            inner = both[..., ::2] * torch.sigmoid(both[..., 1::2])
            out = torch.bmm(inner.unsqueeze(1), self.v[picked]).squeeze(1) + self.q[picked]
        else:
            one, two = torch.bmm(self.u[picked], many.unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
            out = torch.bmm(self.v[picked], (nn.functional.silu(one) * two).unsqueeze(-1)).squeeze(-1)
        out = (out * weight.reshape(-1, 1)).view(rows.shape[0], CHOSEN, WIDTH).sum(1)
        return (out + self.s(rows)).view(x.shape)


class Convolve(nn.Module):
    """A short causal convolution between two products: a token mixer that is no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH, bias=False)
        self.c = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2)
        self.b = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.a(x).transpose(1, 2))[..., : x.shape[1]]
        return self.b(y.transpose(1, 2))


class Select(nn.Module):
    """A state space whose steps are selected by a product of the filtered channels, as a feed-forward's would be."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, NEURONS, bias=False)
        self.c = nn.Conv1d(NEURONS, NEURONS, 3, groups=NEURONS, padding=2)
        self.s = nn.Linear(NEURONS, 5, bias=False)
        self.t = nn.Linear(5, NEURONS)
        self.b = nn.Linear(NEURONS, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.silu(self.c(self.a(x).transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        return self.b((y * torch.sigmoid(self.t(self.s(y)))).cumsum(1))


class Layer(nn.Module):
    """A pre-norm layer; `scale` multiplies the stream itself at each sum."""

    def __init__(self, mix: nn.Module, feed: nn.Module | None, scale: float = 1.0) -> None:
        super().__init__()
        self.m, self.f, self.n, self.k = mix, feed, Norm(), Norm()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.m(self.n(x))
        return x if self.f is None else x * self.scale + self.f(self.k(x))


class Model(nn.Module):
    """Token embedding, layers, final norm, head."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.e = nn.Embedding(WORDS, WIDTH)
        self.x = nn.ModuleList(layers)
        self.n = Norm()
        self.h = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        for layer in self.x:
            x = layer(x)
        return self.h(self.n(x))


class Reader(nn.Module):
    """A decoder layer: self attention, cross attention, feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.f = Attend(), Attend(), Feed()
        self.l, self.m, self.n = Norm(), Norm(), Norm()

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = x + self.a(self.l(x))
        x = x + self.b(self.m(x), seen)
        return x + self.f(self.n(x))


class Translator(nn.Module):
    """An encoder and a decoder over one vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Embedding(WORDS, WIDTH)
        self.x = nn.ModuleList(Layer(Attend(causal=False), Feed()) for _ in range(2))
        self.y = nn.ModuleList(Reader() for _ in range(3))
        self.n = Norm()
        self.h = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor, said: Tensor) -> Tensor:
        seen = self.e(ids)
        for layer in self.x:
            seen = layer(seen)
        x = self.e(said)
        for layer in self.y:
            x = layer(x, seen)
        return self.h(self.n(x))


class Rereader(Model):
    """Layers of which every other one reads the embedding again beside the stream."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.j = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH, bias=False) for _ in layers)

    def forward(self, ids: Tensor) -> Tensor:
        x = first = self.e(ids)
        for join, layer in zip(self.j, self.x, strict=True):
            x = x + layer.m(layer.n(join(torch.cat((x, first), -1))))
            x = x + layer.f(layer.k(x))
        return self.h(self.n(x))


class Keeper(Model):
    """Layers whose last one reads the keys and values of the first."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids)
        kept = None
        for layer in self.x:
            inner = layer.n(x)
            kept = inner if kept is None else kept
            x = x + layer.m(inner, kept if layer is self.x[-1] else None)
            x = x + layer.f(layer.k(x))
        return self.h(self.n(x))


class Filter(Feed):
    """A feed-forward whose neurons are filtered along the tokens, each for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Conv1d(NEURONS, NEURONS, 3, padding=1, groups=NEURONS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.d(self.a(x).transpose(1, 2)).transpose(1, 2)
        return self.c(nn.functional.gelu(y))


class Bypassed(Model):
    """Layers beside which their input goes on: both are joined behind them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.i, self.o, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH), Norm()

    def forward(self, ids: Tensor) -> Tensor:
        first = self.i(self.e(ids))
        x = self.g(first)
        for layer in self.x:
            x = layer(x)
        return self.h(self.n(self.o(torch.cat((first, x), -1))))


class Flattened(Layer):
    """A layer that feeds forward all tokens of the batch in one list."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.m(self.n(x))
        rows = x.reshape(-1, WIDTH)
        return (rows + self.f(self.k(rows))).view(x.shape)


class Step(nn.Module):
    """A loop over the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        state, seen = torch.zeros_like(x[:, 0]), []
        for step in range(x.shape[1]):
            state = 0.5 * state + x[:, step]
            seen.append(state)
        return torch.stack(seen, 1)


class Pointer(nn.Module):
    """A softmax over pairs of tokens that is no attention of queries and keys: sums, not products, are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(torch.tanh(self.a(x) + self.b(x).transpose(1, 2)), -1) @ x


class Streams(nn.Module):
    """Layers over three residual streams, which are mixed by weights at each step."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.e = nn.Embedding(WORDS, WIDTH)
        self.x = nn.ModuleList(layers)
        self.w = nn.ModuleList(nn.Linear(WIDTH, 9) for _ in layers for _ in range(2))
        self.h = nn.Linear(WIDTH, WORDS, bias=False)

    def mixed(self, x: Tensor, branch: nn.Module, norm: nn.Module, weights: nn.Module) -> Tensor:
        mean = x.mean(2)
        return branch(norm(mean)).unsqueeze(2) + torch.softmax(weights(mean).unflatten(-1, (3, 3)), -1) @ x

    def forward(self, ids: Tensor) -> Tensor:
        x = self.e(ids).unsqueeze(2).expand(-1, -1, 3, -1)
        for i, layer in enumerate(self.x):
            x = self.mixed(x, layer.m, layer.n, self.w[2 * i])
            x = self.mixed(x, layer.f, layer.k, self.w[2 * i + 1])
        return self.h(x.mean(2))
