"""Drafting with heads that a program carries: Medusa (arXiv 2401.10774) and Hydra (arXiv 2402.05109)."""

from __future__ import annotations

import torch

from graphopt.diagnostics import PlanError
from graphopt.ir.extract import extract
from graphopt.ir.program import Input, Program
from graphopt.ir.run import Runner
from graphopt.runtime.speculate.build import Template, best_first, from_template
from graphopt.runtime.speculate.drafter import Rows
from graphopt.runtime.speculate.tree import Tree


def split(program: Program) -> tuple[Program, tuple[Program, ...]]:
    """The program without its heads, which also gives `hidden`, and one program of `hidden` for each head.

    Raises PlanError when it has none.
    """
    heads = [name for name in program.entry.outputs if name.startswith("heads.")]
    if not heads:
        raise PlanError.of("no_heads", "the program has no draft heads", help=("compile it with insert_heads",))
    base = [name for name in program.entry.outputs if name not in heads]
    node = dict(zip(program.entry.outputs, program.output_nodes, strict=True))["hidden"]
    tokens = next(spec for spec in program.entry.inputs if spec.role == "tokens")
    cut = {"hidden": Input("hidden", (*tokens.shape[:2], int(node.meta["val"].shape[-1])), program.dtype, "values")}
    return extract(program, base), tuple(extract(program, [name], cut) for name in heads)


class Heads:
    """Drafts from the hidden state of the last token that the program read.

    Medusa's heads guess each place by itself, and the tree takes the paths of the largest products of their
    probabilities, or those of a `template`. Hydra's read the path: a level is scored behind every node of the one before
    it, of which the `width` likeliest are expanded. `ranks` candidates of a node are looked at.
    """

    def __init__(
        self,
        heads: tuple[Program, ...],
        dtype: torch.dtype = torch.float32,
        *,
        ranks: int = 8,
        width: int = 4,
        template: Template | None = None,
    ) -> None:
        self.runs = [Runner(head, dtype, "cpu") for head in heads]
        ahead = [spec for spec in heads[0].entry.inputs if spec.role == "ahead"]
        self.further = int(ahead[0].shape[-1]) if ahead else 0
        self.ranks, self.width, self.template = ranks, width, template
        self.hidden = torch.empty(0)
        if template is not None and (self.further or template.levels > len(heads)):
            raise ValueError("a template is for independent heads, and has no more levels than there are heads")

    @property
    def reads(self) -> int:
        """The hidden state of the last token."""
        return 1

    def begin(self, prompt: tuple[int, ...], rows: Rows) -> None:
        """Take the hidden state of the prompt's last token."""
        self.hidden = rows.of("hidden", len(rows.token) - 1)

    def observe(self, rows: Rows, path: tuple[int, ...]) -> None:
        """Take the hidden state of the last token that was kept."""
        self.hidden = rows.of("hidden", path[-1])

    def truncate(self, length: int) -> None:
        """Nothing is remembered but the last state, which the next step replaces."""

    def propose(self, root: int, budget: int) -> Tree:
        """A tree of at most `budget` nodes."""
        with torch.inference_mode():
            return self._by_path(root, budget) if self.further else self._by_place(root, budget)

    def _by_place(self, root: int, budget: int) -> Tree:
        template = self.template.cut(budget) if self.template is not None else None
        levels = min(len(self.runs) if template is None else template.levels, budget - 1)
        ranks = min(self.ranks if template is None else template.ranks, budget - 1)
        logits = torch.stack([run(hidden=self.hidden[None, None])[0][0, 0] for run in self.runs[:levels]])
        best = torch.log_softmax(logits, dim=-1).topk(ranks, dim=-1)
        if template is not None:
            return from_template(template, root, best.indices.tolist())
        return best_first(root, best.indices.tolist(), best.values.tolist(), budget)

    def _by_path(self, root: int, budget: int) -> Tree:
        """Every level scores the children of the `width` likeliest nodes; the likeliest of all scored are kept."""
        token, parent, score, paths = [root], [-1], [0.0], [[root]]
        level = [0]
        for run in self.runs:
            ahead = torch.zeros(1, len(level), self.further, dtype=torch.long)
            for i, node in enumerate(level):
                ahead[0, i, : len(paths[node])] = torch.tensor(paths[node])
            hidden = self.hidden.expand(1, len(level), -1)
            best = torch.log_softmax(run(hidden=hidden, ahead=ahead)[0][0], dim=-1).topk(self.ranks, dim=-1)
            made = len(token)
            for node, words, values in zip(level, best.indices.tolist(), best.values.tolist(), strict=True):
                for word, value in zip(words, values, strict=True):
                    token.append(word)
                    parent.append(node)
                    score.append(score[node] + value)
                    paths.append([*paths[node], word])
            level = sorted(range(made, len(token)), key=score.__getitem__, reverse=True)[: self.width]
        # A child is never likelier than its parent, so that the likeliest nodes are closed under parents.
        kept = sorted(sorted(range(1, len(token)), key=lambda n: (-score[n], n))[: budget - 1])
        place = {0: 0} | {node: i for i, node in enumerate(kept, start=1)}
        return Tree((root, *(token[n] for n in kept)), (-1, *(place[parent[n]] for n in kept)))
