"""A program with a cache, ready to decode: prefill, single tokens and token trees are calls of one step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from graphopt.diagnostics import PlanError
from graphopt.ir.leaving import PROMPT
from graphopt.ir.pictures import splices
from graphopt.ir.program import Program
from graphopt.ops.cached import Slots
from graphopt.ops.trees import walk
from graphopt.runtime.cache import Cache
from graphopt.runtime.lower import Lowered


class Decoder:
    """Runs the steps of a program with a cache; each text has a cache of its own.

    Raises PlanError for a program without a cache, and for one whose draft heads read tokens to come.
    """

    def __init__(
        self, program: Program, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.program, self.dtype, self.device = program, dtype, device
        if not program.cached:
            raise PlanError.of("no_cache", "the program has no cache", help=("apply insert_cache to it first",))
        if any(spec.role == "ahead" for spec in program.entry.inputs):
            raise PlanError.of(
                "reads_ahead",
                "its draft heads read tokens that are not there yet, so that no step can give their results",
                help=("decode with a `speculate` step, or extract the results without the heads",),
            )
        self._placeholders = tuple(splice.token for splice in splices(program))
        with torch.inference_mode():
            self.lowered = Lowered(program, dtype, device)

    def cache(
        self,
        batch: int,
        capacity: int,
        *,
        shared: Cache | None = None,
        prompt: int | None = None,
        **context: torch.Tensor,
    ) -> Cache:
        """An empty cache for `batch` rows of at most `capacity` entries; `context` are the program's other inputs.

        Where tokens leave, caches behind a stage are shorter by those of a prompt of `prompt` tokens (the longest row's).
        What depends on the context alone (an encoder, its keys and values) is computed here, once. With `shared` it
        lies on the buffers of another program's cache, as far as that program has them.
        """
        sizes = {} if prompt is None else {"P": prompt}
        for spec in self.program.entry.inputs:
            if spec.role == "pictures":
                sizes[str(spec.shape[0])] = len(context[spec.name]) if spec.name in context else 0
        cache = Cache(self.program, batch, capacity, self.dtype, self.device, shared, sizes)
        with torch.inference_mode():
            values = self.lowered.start(context, cache.buffers, capacity)
        for name, form in self.lowered.forms.items():
            cache.given[name] = given = form.fixed(values)
            cache.tables[name] = [given[index] for index, _ in form.tables]
        return cache

    def step(
        self,
        cache: Cache,
        tokens: torch.Tensor,
        *,
        parents: Sequence[tuple[int, ...]] | None = None,
        prompt: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Results of new tokens `[B, S]` behind what the cache holds; their entries are written, not yet committed.

        `parents` makes the tokens a tree, one row of S pointers for all rows or one for each: token i hangs on the
        earlier token that its pointer names (-1: on what is committed), sees its ancestors and itself, and stands as deep
        as it has ancestors. Where tokens leave, the first step of a text is its whole
        prompt, of which `prompt` `[B, S]` says which tokens are real (all when None). Raises ValueError when the cache is
        full, and for pictures behind the prompt.
        """
        first = self._begins(cache, tokens)
        with torch.inference_mode():
            count = tokens.shape[1]
            positions = spans = None
            if parents is not None:
                spans, depth = (part.to(self.device) for part in walk(tuple(parents)))
                positions = cache.lengths[:, None] + depth
            slots = Slots(cache.lengths, count, cache.capacity, positions, spans)
            # Tables by place serve all rows at once when the rows stand at the same places.
            if slots.start is None or (parents is not None and len(parents) > 1) or (first and cache.leaves):
                name = "ragged"
            else:
                name = "token" if count == 1 else "text"
            form, given = self.lowered.forms[name], cache.given[name]
            given[form.inputs["tokens"]] = tokens
            for (index, axis), table in zip(form.tables, cache.tables[name], strict=True):
                given[index] = (
                    table.narrow(axis, slots.start, count)
                    if positions is None
                    else table.index_select(axis, positions[0])
                )
            counts = None
            if cache.leaves:
                real = torch.ones_like(tokens) if prompt is None else prompt.to(tokens)
                real = real if first else real[:, :0]
                counts = real.sum(-1) if first else None
                slots.held = tuple(cache.entries.values())
                for key, value in ((PROMPT, real), *cache.entries.items()):
                    if key in form.inputs:
                        given[form.inputs[key]] = value
            for role in form.inputs:
                if role in ("positions", "lengths", "spans"):
                    given[form.inputs[role]] = getattr(slots, role)
            return cache.written(form.call(slots, *given), counts)

    def _begins(self, cache: Cache, tokens: torch.Tensor) -> bool:
        """Whether a step is the first of its text; raises ValueError for what only a first one can bring."""
        if not cache.leaves and not self._placeholders:
            return False
        first = not bool(cache.lengths.any())
        if not first and any(bool((tokens == token).any()) for token in self._placeholders):
            raise ValueError("pictures stand in the prompt: this step is not the first of its text")
        if not first and cache.leaves and not bool(cache.lengths.all()):
            raise ValueError("tokens leave prompts: all rows of a cache begin together")
        return first
