"""What parts a model has, counted from its module tree and one eager run, never from a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import dropwhile, groupby
from typing import Any

import torch
from small_models import run
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

_ATTENTION = ("attention", "attn")
_MIXERS = (*_ATTENTION, "mamba", "mixer", "ssm", "deltanet", "rwkv", "recurrent", "lstm", "shortconv", "rglru")


def count_parts(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, int]:
    """Blocks, softmax attentions, feed-forwards and expert banks that an eager run goes through, by the module tree.

    Blocks are calls of the members of outermost module lists that hold a matrix product; attentions calls of modules
    named so that run a softmax; feed-forwards the down projections outside attentions and other mixers that read what an
    up projection of the same block writes; expert banks modules with three-dimensional weights or lists inside blocks.
    Calls of blocks that the model's result does not depend on are left out with all that they hold: some classes run
    layers whose result they do not read (the last character layer of a Canine that classifies, the last layer of LLaVA's
    pictures), and no graph of the result has those.
    """
    blocks, halves = list({id(block): block for _, block in _blocks(model)}.values()), _halves(model)
    calls: list[Counter[str]] = [Counter()]  # What lies outside blocks, then each call of a block.
    running = [0]
    inside: list[Any] = []
    softmax: set[int] = set()
    products: set[int] = set()
    handles = []

    def enter(module: Any, *_: Any) -> None:
        inside.append(module)

    def leave(module: Any, *_: Any) -> None:
        inside.pop()
        calls[running[-1]]["attentions"] += id(module) in softmax and id(module) in products
        softmax.discard(id(module))
        products.discard(id(module))

    def block_begins(*_: Any) -> None:
        calls.append(Counter())
        running.append(len(calls) - 1)

    def block_called(module: Any, _: Any, result: Any) -> None:
        call = calls[running.pop()]
        call["blocks"] += id(module) not in halves
        result = result if isinstance(result, torch.Tensor) else result[0]
        dense, banks = _feed_forwards(module, set(result.shape[1:]))
        call["feed_forwards"] += dense
        call["experts"] += banks

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(function, "__name__", "")
            if inside and ("softmax" in name or name == "scaled_dot_product_attention"):
                softmax.add(id(inside[-1]))
            factors = [a for a in (args[1:] if name == "einsum" else args) if isinstance(a, torch.Tensor)]
            weighs = name in ("matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention")
            if inside and weighs and not any(isinstance(a, torch.nn.Parameter) for a in factors):
                products.add(id(inside[-1]))
            return function(*args, **(kwargs or {}))

    for module in model.modules():
        name = type(module).__name__.lower()
        if any(word in name for word in _ATTENTION) or isinstance(module, torch.nn.MultiheadAttention):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    for block in blocks:
        handles += [block.register_forward_pre_hook(block_begins), block.register_forward_hook(block_called)]
    try:
        with Watch():
            result = run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    read = [call for number, call in enumerate(calls) if not number or _is_read(model, blocks, number, inputs, result)]
    return {part: sum(call[part] for call in read) for part in ("blocks", "attentions", "feed_forwards", "experts")}


def _is_read(model: Any, blocks: list[Any], number: int, inputs: dict[str, torch.Tensor], expected: Any) -> bool:
    """Whether the model's result changes with that of the call of a block that has this number, counted from 1."""
    done = 0

    def disturbed(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value + torch.randn_like(value) if floating else value

    def block_called(_module: Any, _inputs: Any, result: Any) -> Any:
        nonlocal done
        done += 1
        return tree_map(disturbed, result) if done == number else None

    # Before the hooks with which a model keeps the results of its layers.
    handles = [block.register_forward_hook(block_called, prepend=True) for block in blocks]
    try:
        got = run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    pairs = zip(tree_leaves(got), tree_leaves(expected), strict=True)
    return not all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def _blocks(model: Any) -> Iterator[tuple[str, Any]]:
    """Members of outermost module lists in which a matrix product happens behind at least one more module."""
    taken: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or any(name.startswith(t + ".") for t in taken):
            continue
        deep = [child for child in module if any(_is_linear(m) for m in child.modules()) and list(child.children())]
        if not deep:
            continue
        inner = [m for child in deep for m in child.modules() if isinstance(m, torch.nn.ModuleList)]
        nested = [m for m in inner if any(_mixes(c) and _linears_outside_mixers(c) > 1 for c in m)]
        if nested and not any(_looks_like_block(child, nested) for child in deep):
            continue  # Groups of layers (stages): their members are the blocks.
        taken.append(name)
        for index, child in enumerate(module):
            if child in deep:
                yield f"{name}.{index}", child


def _halves(model: Any) -> set[int]:
    """Members of lists that only feed forward, and so are the second half of a layer.

    What mixes tokens is in a list of its own beside theirs (XLM), or before them in the same list (Nemotron-H): the graph
    shows one layer, which mixes tokens and feeds forward after it.
    """
    found: set[int] = set()
    for _, members in groupby(_blocks(model), key=lambda named: named[0].rpartition(".")[0]):
        after = dropwhile(lambda named: not _looks_like_block(named[1]), members)
        found |= {id(child) for _, child in after if not _looks_like_block(child)}
    for parent in model.modules():
        lists = [child for child in parent.children() if isinstance(child, torch.nn.ModuleList)]
        mixing = {len(one) for one in lists if any(_looks_like_block(child) for child in one)}
        plain = [one for one in lists if not any(_looks_like_block(child) for child in one) and len(one) in mixing]
        found |= {id(child) for one in plain for child in one}
    return found


def _mixes(module: Any) -> bool:
    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d)
    return _looks_like_block(module) or any(isinstance(part, convolutions) for part in module.modules())


def _looks_like_block(module: Any, without: list[Any] = ()) -> bool:  # type: ignore[assignment]
    hidden = {id(m) for part in without for m in part.modules()}
    return any(
        any(word in type(m).__name__.lower() for word in _MIXERS) and id(m) not in hidden for m in module.modules()
    )


def _linears_outside_mixers(module: Any) -> int:
    inside = {
        id(part)
        for mixer in module.modules()
        if any(word in type(mixer).__name__.lower() for word in _MIXERS) and mixer is not module
        for part in mixer.modules()
    }
    return sum(1 for part in module.modules() if _is_linear(part) and id(part) not in inside)


def _is_linear(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, torch.Tensor)
        and weight.dim() == 2
        and not isinstance(module, torch.nn.Embedding)
        and not list(module.children())
    )


def _sizes(module: Any) -> tuple[int, int]:
    """(in, out) of a linear layer, transposed ones (Conv1D) included."""
    rows, columns = module.weight.shape
    return (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)


def _feed_forwards(block: Any, widths: set[int]) -> tuple[int, int]:
    """Dense feed-forwards and expert banks of one block, the axes of whose result are `widths`."""
    mixers, banks, lists = [], [], []
    for name, module in block.named_modules():
        kind = type(module).__name__.lower()
        if (
            name
            and any(word in kind for word in _MIXERS)
            and not any(w in kind for w in ("mlp", "layer", "block", "feedforward"))
        ):
            mixers.append(name)
        if any(p.dim() == 3 and p.shape[1] > 1 and p.shape[2] > 1 for p in module.parameters(recurse=False)):
            banks.append(name)
        # A list of parts of one kind may be a bank; one of several kinds is a sequence of parts, and so is one of parts
        # that are called layers: a MobileBERT layer feeds forward four times, three of them in such a list.
        kinds = {type(child).__name__.lower() for child in module} if isinstance(module, torch.nn.ModuleList) else set()
        if name and len(kinds) == 1 and "layer" not in next(iter(kinds)):
            lists.append(name)
    hidden = [*mixers, *banks, *lists]
    linears = [
        _sizes(module)
        for name, module in block.named_modules()
        if _is_linear(module) and not any(name == h or name.startswith(h + ".") for h in hidden)
    ]
    dense = 0
    for place, down in enumerate(linears):
        # Where there are as many tokens as neurons (PVT's first stage), either product would pass for the other's up
        # projection: there the first of them is it.
        before = linears[:place] if down[0] in widths else linears
        ups = [up for up in before if up[0] == down[1] and up[1] in (down[0], 2 * down[0]) and up != down]
        dense += bool(ups) and down[0] != down[1] and down[1] in widths
    outer = [n for n in banks if not any(n.startswith(m + ".") for m in mixers)]
    listed = [
        n
        for n in lists
        if not any(n.startswith(m + ".") for m in [*mixers, *outer])
        and any(
            "expert" in type(c).__name__.lower() or "mlp" in type(c).__name__.lower() for c in block.get_submodule(n)
        )
    ]
    return dense, len(outer) + len(listed)
