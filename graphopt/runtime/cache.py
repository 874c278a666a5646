"""The cache of a decoding run: static buffers that the graph writes in place, and how much of them counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphopt.diagnostics import PlanError
from graphopt.ir.leaving import PROMPT, losing, room
from graphopt.ir.program import Input, Program, specialise
from graphopt.runtime.admitted import Admitted
from graphopt.runtime.held import held_of

ROOM = 16
"""entries that buffers of admitted tokens grow by, at least"""


class Cache:
    """Buffers of one batch, in the order of the program's cache inputs, and the entries that each row holds.

    `buffers[name]` is `[B, K, C, D]`; `lengths` `[B]` counts committed entries. Buffers that `shared`, the cache of
    another program, has by the same names are those; `own` says whether there are others. A step of the program writes behind
    them; `commit` keeps what was written. Where tokens leave, caches behind a stage hold `entries[name]` `[B]` and have
    room for what `sizes` (of the program's dimensions, of the prompt P and of pictures I) leave of the capacity. Caches that
    lose what leaves later become as short when the prompt is committed; those that take admitted tokens alone are made
    longer when these need it. Raises PlanError for a program without a cache.
    """

    def __init__(
        self,
        program: Program,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        shared: Cache | None = None,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        if batch < 1 or capacity < 1:
            raise ValueError(f"a cache needs rows and slots, not {batch} and {capacity}")
        self.batch, self.capacity = batch, capacity
        given: dict[str, torch.Tensor] = {} if shared is None else shared.buffers
        rooms = room(program, capacity, {"B": batch, **(sizes or {})})
        leaves = [spec.name for spec in program.entry.inputs if spec.role == "entries"]
        self.held = held_of(program)
        self._admitting = [held for held in self.held if isinstance(held, Admitted)]
        growing = {name for held in self._admitting for name in held.buffers}
        # What a predictor admits is not known ahead: room for the prompt, and more when it is needed.
        begin = min(capacity, (sizes or {}).get("P", 0) + ROOM)
        rooms |= {str(s.shape[2]): begin for s in program.entry.inputs if s.name in growing}
        behind = {f"C{stage}": name for stage, name in enumerate(leaves, 1)}
        specs = [spec for spec in program.entry.inputs if spec.role == "cache"]
        alike: dict[tuple[Any, ...], list[str]] = {}
        for spec in specs:
            if spec.name not in given:
                kind = specialise(spec.dtype, model=program.dtype, target=dtype, device=device)
                form = sizes_of(spec, batch, capacity, rooms), kind, spec.shape[2]
                alike.setdefault(form, []).append(spec.name)
        # Buffers alike are slices of one, so that entries move in all of them at once.
        blocks = [torch.zeros(len(names), *form[0], dtype=form[1], device=device) for form, names in alike.items()]
        slices = {
            name: part
            for names, block in zip(alike.values(), blocks, strict=True)
            for name, part in zip(names, block, strict=True)
        }
        self.buffers: dict[str, torch.Tensor] = {
            spec.name: given[spec.name] if spec.name in given else slices[spec.name] for spec in specs
        }
        self.own = bool(alike)
        self._rooms, self._losing = rooms, losing(program)
        # Blocks `[n, B, K, C, D]` of what grows, and what counts it behind a stage; the buffers that are their slices.
        self._growing = [
            (block, self._losing[names[0]][1] if names[0] in self._losing else behind.get(str(form[2])))
            for (form, names), block in zip(alike.items(), blocks, strict=True)
            if str(form[2]) in ("C", *behind)
        ]
        self._sliced = [names for form, names in alike.items() if str(form[2]) in ("C", *behind)]
        self._growing += [
            (given[spec.name][None], behind.get(str(spec.shape[2])))
            for spec in specs
            if spec.name in given and str(spec.shape[2]) in ("C", *behind)
        ]
        if not self.buffers:
            raise PlanError.of("no_cache", "the program has no cache", help=("apply insert_cache to it first",))
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        if self.held and shared is not None:
            raise PlanError.of(
                "bounded_cache", "bounded heads let entries go, so no other program can share their cache"
            )
        for held in self.held:
            held.clear(self.buffers)
        self.entries = {name: torch.zeros_like(self.lengths) for name in leaves}
        self.leaves = any(spec.role == PROMPT for spec in program.entry.inputs)
        if self.leaves and shared is not None:
            raise PlanError.of("tokens_leave", "tokens leave this program, so no other one can share its cache")
        self._prompt: torch.Tensor | None = None
        self._least = torch.zeros_like(self.lengths)
        self._outputs = program.entry.outputs
        self._results: dict[str, torch.Tensor] = {}
        # What the decoder works out once for a text, by form of the step: its arguments, and tables by place.
        self.given: dict[str, list[Any]] = {}
        self.tables: dict[str, list[torch.Tensor]] = {}

    def written(
        self, results: tuple[torch.Tensor, ...], prompt: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Remember the results of a step, of which bounded heads take in what is committed.

        `prompt` `[B]` is how many tokens the rows of a step have from which tokens leave.
        """
        if self.held or self.entries:
            self._results = dict(zip(self._outputs, results, strict=True))
            self._prompt = prompt
        return results

    def commit(self, kept: int | torch.Tensor) -> None:
        """Keep entries that the last step wrote: the first `kept` of each row (a number or `[B]`), or those of a path.

        A path `[B, n]` lists nodes of a token tree, ancestors first; their entries move to the slots behind the
        committed ones. Rows whose path is shorter are filled with -1 at the end. Raises ValueError for what does not
        fit or is no path.
        """
        if isinstance(kept, int) and not self.held:
            lengths = self.lengths + kept
            longest = max(lengths.tolist())
            if kept < 0 or longest > self.capacity:
                raise ValueError(f"{longest} entries do not fit a cache of {self.capacity}")
            if self.entries:
                self._hold(torch.full_like(self.lengths, kept))
            self.lengths = lengths
        elif isinstance(kept, int):
            self._raise(torch.full_like(self.lengths, kept))
        elif kept.dim() == 1:
            self._raise(kept.to(self.lengths))
        else:
            self._move(kept.to(self.lengths))

    def _move(self, path: torch.Tensor) -> None:
        rows: list[list[int]] = path.tolist()
        kept = [[node for node in row if node >= 0] for row in rows]
        if any(own != row[: len(own)] or own != sorted(set(own)) for own, row in zip(kept, rows, strict=True)):
            raise ValueError("a path names nodes in rising order, and -1 only behind the last")
        count = self.lengths.new_tensor([len(own) for own in kept])
        if all(own == list(range(len(own))) for own in kept):
            self._raise(count)
            return
        if self.batch == 1:
            start, source = int(self.lengths), path[0, : len(kept[0])] + self.lengths
            if start + kept[0][-1] >= self.capacity:
                raise ValueError(f"{start + kept[0][-1] + 1} entries do not fit a cache of {self.capacity}")
            for block, stage in self._growing:
                shift = 0 if stage is None else start - int(self.entries[stage])
                block.narrow(3, start - shift, len(source)).copy_(block.index_select(3, source - shift))
        else:
            self._move_rows(path)
        self._raise(count, path)

    def _move_rows(self, path: torch.Tensor) -> None:
        steps = torch.arange(path.shape[1], device=path.device)
        for block, stage in self._growing:
            lengths = self.lengths if stage is None else self.entries[stage]
            last = block.shape[3] - 1
            source = (lengths[:, None] + torch.where(path >= 0, path, steps)).clamp(max=last)
            target = (lengths[:, None] + steps).clamp(max=last)
            shape = (len(block), -1, block.shape[2], -1, block.shape[4])
            moved = block.gather(3, source[None, :, None, :, None].expand(shape))
            block.scatter_(3, target[None, :, None, :, None].expand(shape), moved)

    def _raise(self, counts: torch.Tensor, path: torch.Tensor | None = None) -> None:
        longest = int((self.lengths + counts).max())
        if longest > self.capacity or int(counts.min()) < 0:
            raise ValueError(f"{longest} entries do not fit a cache of {self.capacity}")
        if self.held and int(counts.max()):
            if not self._results:
                raise ValueError("there is no step whose entries could be kept")
            if path is None:
                steps = torch.arange(int(counts.max()), device=counts.device)
                path = torch.where(steps < counts[:, None], steps, -1)
            for admitting in self._admitting:
                self._widen(admitting, admitting.need(self.buffers, self._results, self.lengths, path))
            for held in self.held:
                held.absorb(self.buffers, self._results, self.lengths, path)
        if self.entries:
            self._hold(counts)
        if self.held and int(counts.max()):
            # A second commit of the same step would take its entries in twice.
            self._results = {}
        self.lengths = self.lengths + counts

    def _hold(self, counts: torch.Tensor) -> None:
        """What caches behind stages hold grows by what has not left of a prompt, and by every token behind it."""
        if self._prompt is None:
            self.entries = {name: held + counts for name, held in self.entries.items()}
            return
        if not torch.equal(counts, self._prompt):
            raise ValueError(
                f"tokens leave a prompt as a whole: its rows have {self._prompt.tolist()} tokens, not {counts.tolist()}"
            )
        for stage, name in enumerate(self.entries, 1):
            self.entries[name] = self._results[f"kept_{stage}"]
        for place, names in enumerate(self._sliced):
            if names[0] in self._losing:
                stays, _, dimension = self._losing[names[0]]
                size = self._rooms.get(dimension, self.capacity)
                parts = [shortened(self.buffers[name], self._results[stays], size) for name in names]
                self._swap(place, torch.stack(parts))
        self._least, self._prompt = counts, None

    def _widen(self, admitting: Admitted, need: int) -> None:
        """Make room for so many entries in buffers of admitted tokens."""
        size = self.buffers[admitting.buffers[0]].shape[2]
        if need <= size:
            return
        longer = min(self.capacity, max(need + ROOM, size * 5 // 4))
        for name in admitting.buffers:
            old = self.buffers[name]
            new = old.new_full((*old.shape[:2], longer, *old.shape[3:]), -1 if old.dtype == torch.int64 else 0)
            new[:, :, :size] = old
            self.buffers[name] = new
            for given in self.given.values():
                given[:] = [new if value is old else value for value in given]

    def _swap(self, place: int, block: torch.Tensor) -> None:
        """Let buffers be slices of another block, in what steps are given as well."""
        self._growing[place] = (block, self._growing[place][1])
        for name, new in zip(self._sliced[place], block, strict=True):
            old, self.buffers[name] = self.buffers[name], new
            for given in self.given.values():
                given[:] = [new if value is old else value for value in given]

    def truncate(self, lengths: int | torch.Tensor) -> None:
        """Forget entries: rows keep the first `lengths` (a number or `[B]`) of what they hold.

        Raises ValueError for more than they hold, and for heads that are bounded, which cannot go back but to nothing.
        """
        wanted = torch.full_like(self.lengths, lengths) if isinstance(lengths, int) else lengths.to(self.lengths)
        if bool((wanted > self.lengths).any()) or bool((wanted < 0).any()):
            raise ValueError(f"rows hold {self.lengths.tolist()} entries, and cannot be cut to {wanted.tolist()}")
        if self.held and bool((wanted != self.lengths).any()):
            if bool(wanted.any()) and len(self._admitting) < len(self.held):
                raise ValueError(
                    "bounded heads have let entries go, and cannot go back: truncate to 0, or do not commit"
                )
            for held in self.held:
                if isinstance(held, Admitted):
                    held.forget(self.buffers, wanted)
                else:
                    held.clear(self.buffers)
        if self.entries:
            none = wanted == 0
            if bool(((wanted < self._least) & ~none).any()) or (bool(none.any()) and not bool(none.all())):
                raise ValueError("tokens have left the prompt as a whole: truncate to 0 in all rows, or behind it")
            gone = self.lengths - wanted
            self.entries = {name: (own - gone).masked_fill(none, 0) for name, own in self.entries.items()}
            for place, names in enumerate(self._sliced):
                if names[0] in self._losing and bool(none.all()):
                    sizes = list(self._growing[place][0].shape)
                    sizes[3] = self.capacity
                    self._swap(place, self._growing[place][0].new_zeros(sizes))
        self.lengths = wanted.clone()

    def reorder(self, rows: torch.Tensor) -> None:
        """Let row i continue what row `rows[i]` held."""
        for buffer in self.buffers.values():
            buffer.copy_(buffer[rows])
        self.lengths = self.lengths[rows]
        self.entries = {name: held[rows] for name, held in self.entries.items()}
        self._least = self._least[rows]

    def bytes(self) -> int:
        """Bytes of all buffers, as they lie in memory."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers.values())


def sizes_of(spec: Input, batch: int, capacity: int, rooms: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a cache input for so many rows and entries; its own sizes where it is bounded.

    `rooms` are the capacities of caches behind stages at which tokens leave.
    """
    named = {"C": capacity, **rooms}
    return tuple(size if isinstance(size, int) else named.get(size, batch) for size in spec.shape)


def shortened(buffer: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """Entries `index` `[B, L]` of `[B, K, C, D]`, side by side in a buffer of `size` entries."""
    short = buffer.new_zeros(*buffer.shape[:2], size, buffer.shape[3])
    wide = index[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
    short[:, :, : index.shape[1]] = buffer.gather(2, wide)
    return short
