"""A key-value cache: a stateless program becomes one that decodes step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from graphopt.passkit.base import Context, Pass
from graphopt.passkit.facts import Effect, Fact

if TYPE_CHECKING:
    from graphopt.passes.cache.sequence import Sequence
    from graphopt.passes.cache.slots import Slot
    from graphopt.passkit.edits import Plan
    from graphopt.views import Attention


class InsertCache(Pass):
    """Let every causal attention keep its keys and values, so that a new token costs one step and not a whole run.

    Tokens become the new tokens alone. Their positions, the lengths of the rows' caches, which new tokens see
    which, and two buffers an attention become inputs. Prefill, a decoded token and the verification
    of a token tree are three uses of the one graph. What the model computed from places in the sequence (rotary angles,
    learned positions, biases by distance) is computed from the positions instead; what it computed from the padding
    goes, because rows have lengths. Attention over another text (an encoder's) keeps its keys, which do not grow. Heads
    that a bound_cache step has bounded get buffers of their entries alone, and return what the runtime then takes in.
    `windows: ring` does the same for attention with a window: its buffers hold as many entries as the window, whatever
    the length of the text, and what has left it is gone, so that such a cache is cut to nothing or not at all. What a
    quantize_cache step has rounded is kept packed, in blocks, behind a ring of the last tokens.

    Where tokens leave a text (drop_tokens, merge_tokens), the first step takes the whole prompt, an input says which of
    its tokens are real, and what leaves is chosen there once and for all: later layers have shorter buffers, and results
    say how many entries of each row they have got. Pictures stand in the prompt. Caches of layers to which a predictor
    admits tokens (drop_tokens with `span: answer`) hold the prompt and what was admitted behind it, and grow with that.

    A model whose tokens meet outside of causal attention (convolutions over time, state spaces, token shift) is
    declined with the name of the node. So is one whose bias has no proven meaning at a cached step. Put passes that
    change heads, widths or layers before this one. `where` has no say in it.

    ```yaml
    - use: insert_cache
    ```
    """

    name: ClassVar[str] = "insert_cache"
    effect: ClassVar[Effect] = Effect.LOSSLESS_DECODE
    forbids: ClassVar[frozenset[Fact]] = frozenset({Fact.LOWERED, Fact.KV_CACHED})
    adds: ClassVar[frozenset[Fact]] = frozenset({Fact.KV_CACHED})

    windows: Literal["whole", "ring"] = "whole"
    """whether attention with a window keeps all entries, or those that its window reaches"""

    def plan(self, context: Context) -> Plan:
        """An edit for each attention that decodes, a decline for each that needs no cache; all or none of the former."""
        from graphopt.ir.follow import Lost
        from graphopt.ir.rewriter import Rewriter
        from graphopt.passes.cache.places import Unplaceable
        from graphopt.passes.cache.sequence import Sequence
        from graphopt.passes.cache.slots import Stage, tokens_of
        from graphopt.passkit.edits import Decline, Plan

        program, attentions = context.program, context.views.attentions
        tokens = tokens_of(program)
        if tokens is None:
            return Plan((), (Decline("model", "it does not take one batch of tokens [B, S]"),))
        if not attentions:
            return Plan((), (Decline("model", "no attention was found, so there is nothing to cache"),))
        try:
            sequence = Sequence(program, tokens)
        except Lost as error:
            return Plan((), (Decline("model", f"tokens leave, and it cannot be told which: {error}"),))
        growing = [a for a in attentions if a.core in sequence.live and a.core.args[1] in sequence.live]
        declines = [
            Decline(_name(a), "its keys do not grow with the decoded text: they are computed once")
            for a in attentions
            if a not in growing
        ]
        reasons = {_name(a): reason for a in growing if (reason := self._unfit(a, sequence)) is not None}
        mixing = sequence.mixing()
        if mixing is not None and not reasons:
            node, what = mixing
            where = f" ({node.meta['path']})" if "path" in node.meta else ""
            reasons = dict.fromkeys(
                (_name(a) for a in growing), f"tokens meet outside of attention, at %{node.name}{where}: {what}"
            )
        edits = [self._slot(index, a, sequence) for index, a in enumerate(growing)]
        # Tables by key position are as long as the buffers that grow, so the first of these comes first.
        edits.sort(key=lambda slot: not slot.grows)
        if not reasons and edits:
            try:
                rewriter = Rewriter(program)
                stage = Stage.of(rewriter, program)
                for slot in edits:
                    stage.buffers(slot)
                    stage.mask(program.nodes[slot.node])
            except (Unplaceable, Lost) as error:
                reasons = {_name(a): f"its places have no proven meaning at a cached step: {error}" for a in growing}
        if reasons:
            other = "another attention cannot be cached: " + next(iter(reasons.values()))
            declines += [Decline(_name(a), reasons.get(_name(a), other)) for a in growing]
            return Plan((), tuple(declines))
        return Plan(tuple(edits), tuple(declines))

    def _slot(self, index: int, attention: Attention, sequence: Sequence) -> Slot:
        from graphopt.ops import admitted_attention, bounded_attention
        from graphopt.passes.cache.admitted import AdmittedSlot
        from graphopt.passes.cache.held import held_slot
        from graphopt.passes.cache.packed import PackedSlot, is_quantised
        from graphopt.passes.cache.slots import Slot

        k, v = (attention.core.args[i].meta["val"] for i in (1, 2))  # type: ignore[union-attr]
        slot = Slot(
            _name(attention),
            attention.core.name,
            index,
            (int(k.shape[1]), int(k.shape[3])),
            (int(v.shape[1]), int(v.shape[3])),
            k.dtype,
            _level(sequence, k.shape[2]),
        )
        core, window, mask = attention.core, attention.core.args[7], attention.core.args[3]
        if is_quantised(core):
            return PackedSlot.of(slot, core)
        if core.target is admitted_attention:
            return AdmittedSlot(**vars(slot))
        computed = mask is not None and mask.meta["val"].dim() != 2  # type: ignore[union-attr]
        ring = self.windows == "ring" and window is not None and not computed
        return held_slot(slot, core) if ring or core.target is bounded_attention else slot

    def _unfit(self, attention: Attention, sequence: Sequence) -> str | None:
        """Why an attention cannot be cached."""
        from graphopt.ops import bounded_attention
        from graphopt.passes.cache.probe import hides_later
        from graphopt.passes.cache.sequence import expression

        core = attention.core
        if core.target is bounded_attention and core.args[10] is not None:
            return "its gates are learnt, but nothing is decided: put bound_cache before this step"
        q, k, v, mask = core.args[:4]
        for name, side in (("queries", q), ("keys", k), ("values", v)):
            shape = side.meta["val"].shape  # type: ignore[union-attr]
            sizes = [expression(size) for size in shape]
            whole = len(sizes) == 4 and sizes[0] == sequence.batch
            counted = whole and (sizes[2] == sequence.length or _level(sequence, sizes[2]) > 0)
            if not counted or not (sizes[1].is_Integer and sizes[3].is_Integer):
                return f"its {name} are {list(shape)}, not [B, heads, S, size]"
        if _level(sequence, q.meta["val"].shape[2]):  # type: ignore[union-attr]
            return self._unfit_behind(attention, sequence)
        if sequence.leaving is not None and sequence.leaving.past:
            return self._unfit_past(attention, sequence)
        if mask is not None and mask in sequence.live:
            return "its mask depends on the tokens"
        computed = mask is not None and mask.meta["val"].dim() != 2  # type: ignore[union-attr]
        if not attention.causal and not computed:
            return "it sees later tokens"
        if computed and not attention.causal and not hides_later(sequence, mask):  # type: ignore[arg-type]
            return "its mask does not hide later tokens"
        if mask is not None and not computed and not sequence.is_padding(mask):  # type: ignore[arg-type]
            return f"its mask %{mask.name} is no padding"  # type: ignore[union-attr]
        return None

    def _unfit_past(self, attention: Attention, sequence: Sequence) -> str | None:
        """Why an attention whose cache loses what leaves later cannot be cached."""
        from graphopt.ops import admitted_attention, bounded_attention
        from graphopt.passes.cache.packed import is_quantised

        core, mask = attention.core, attention.core.args[3]
        if core.target is admitted_attention:
            return "what leaves later leaves its cache, and it admits only some tokens"
        if core.target is bounded_attention:
            return "what leaves later leaves its cache, and its heads are bounded"
        if is_quantised(core):
            return "what leaves later leaves its cache, and blocks of it count places"
        if not attention.causal:
            return "it sees later tokens"
        if mask is not None and (mask.meta["val"].dim() != 2 or not sequence.is_padding(mask)):  # type: ignore[union-attr,arg-type]
            return "what leaves later leaves its cache, and its mask says more than which tokens are there"
        return None if core.args[7] is None else "what leaves later leaves its cache, and its window counts places"

    def _unfit_behind(self, attention: Attention, sequence: Sequence) -> str | None:
        """Why an attention behind a stage at which tokens leave cannot be cached."""
        from graphopt.ops import bounded_attention
        from graphopt.passes.cache.packed import is_quantised

        core, found = attention.core, sequence.leaving
        mask = core.args[3]
        assert found is not None
        if core.target is bounded_attention:
            return "tokens have left, and its heads are bounded"
        if is_quantised(core):
            return "tokens have left, and blocks of its cache count places"
        if not attention.causal:
            return "it sees later tokens"
        if mask is not None and (mask.meta["val"].dim() != 2 or not found.hides(mask)):  # type: ignore[union-attr,arg-type]
            return "tokens have left, and its mask says more than which are there"
        return None if core.args[7] is None else "tokens have left, and its window counts places"


def _level(sequence: Sequence, size: Any) -> int:
    """Behind how many stages there are so many tokens; 0 for any other number."""
    return 0 if sequence.leaving is None else sequence.leaving.level(size) or 0


def _name(attention: Attention) -> str:
    """What an attention is called: its path, or its node where the model itself is the attention."""
    return attention.path or f"%{attention.core.name}"
