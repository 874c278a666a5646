"""Loss terms: each says which nodes it reads of student and teacher, and what it makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from graphopt.diagnostics import PlanError, did_you_mean
from graphopt.ir.leaving import admitting
from graphopt.ir.program import Program
from graphopt.passkit.training import HeadsLoss, HiddenLoss, KeptLoss, LogitsLoss, Losses
from graphopt.train.data import IGNORED
from graphopt.views import Views

Values = Mapping[str, torch.Tensor]


class Term:
    """One loss term: `student` and `teacher` name the nodes it reads; calling it gives a mean over tokens."""

    name: str
    weight: float
    student: tuple[str, ...]
    teacher: tuple[str, ...]

    def __call__(self, ids: torch.Tensor, student: Values, teacher: Values) -> torch.Tensor:
        """The term's value on a batch of tokens `[B, S]`."""
        raise NotImplementedError


@dataclass(frozen=True)
class NextToken(Term):
    """Mean cross-entropy of the next token of the text, in nats."""

    weight: float
    student: tuple[str, ...]
    teacher: tuple[str, ...] = ()
    name: str = "next_token"

    def __call__(self, ids: torch.Tensor, student: Values, teacher: Values) -> torch.Tensor:
        """Logits `[B, S, V]` against ids shifted by one."""
        return _cross_entropy(student[self.student[0]][:, :-1], ids[:, 1:])


@dataclass(frozen=True)
class LogitDivergence(Term):
    """T^2 KL(teacher || student), mean over tokens; over those in front of a target where only some are to be predicted."""

    weight: float
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    temperature: float
    name: str = "logits"

    def __call__(self, ids: torch.Tensor, student: Values, teacher: Values) -> torch.Tensor:
        """Logits `[B, S, V]` of both."""
        ours, theirs = student[self.student[0]], teacher[self.teacher[0]]
        wanted = ids[:, 1:] != IGNORED
        if bool(wanted.all()):
            ours, theirs = ours.flatten(0, 1), theirs.flatten(0, 1)
        else:
            ours, theirs = ours[:, :-1][wanted], theirs[:, :-1][wanted]
        ours = F.log_softmax(ours / self.temperature, dim=-1)
        theirs = F.log_softmax(theirs / self.temperature, dim=-1)
        return self.temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class HiddenError(Term):
    """Mean over pairs of nodes of |student - teacher|^2 / |teacher|^2."""

    weight: float
    student: tuple[str, ...]
    teacher: tuple[str, ...]
    name: str = "hidden"

    def __call__(self, ids: torch.Tensor, student: Values, teacher: Values) -> torch.Tensor:
        """Nodes `[B, S, D]` in the order of the pairs."""
        errors = [
            (student[ours] - teacher[theirs]).square().mean() / teacher[theirs].square().mean().clamp_min(1e-12)
            for ours, theirs in zip(self.student, self.teacher, strict=True)
        ]
        return torch.stack(errors).mean()


@dataclass(frozen=True)
class DraftHeads(Term):
    """Sum over heads k of decay^k times the cross-entropy of the token k + 1 places ahead; an early exit is head 0.

    `student` is the program's own logits, then those of the heads, each `[B, S, V]`; the first of these is head `first`.
    """

    weight: float
    student: tuple[str, ...]
    first: int
    decay: float
    target: str
    teacher: tuple[str, ...] = ()
    name: str = "heads"

    def __call__(self, ids: torch.Tensor, student: Values, teacher: Values) -> torch.Tensor:
        """Head k at position t answers for the token at t + k + 1, which the base predicts at t + k."""
        base, total = student[self.student[0]].detach(), torch.zeros((), dtype=student[self.student[0]].dtype)
        for k, name in enumerate(self.student[1:], start=self.first):
            logits = student[name]
            if self.target == "text":
                loss = _cross_entropy(logits[:, : -(k + 1)], ids[:, k + 1 :])
            else:
                wanted = torch.softmax(base[:, k:], dim=-1)
                loss = -(wanted * F.log_softmax(logits[:, : logits.shape[1] - k], dim=-1)).sum(-1).mean()
            total = total + self.decay**k * loss
        return total


@dataclass(frozen=True)
class GateSize(Term):
    """Mean over layers of the mean absolute gate of their KV heads (DuoAttention, arXiv 2410.10819)."""

    weight: float
    student: tuple[str, ...]
    teacher: tuple[str, ...] = ()
    name: str = "gates"

    def __call__(self, ids: torch.Tensor, student: Values, teacher: Values) -> torch.Tensor:
        """Gates `[K]`, which the text has no say in."""
        return torch.stack([student[name].abs().mean() for name in self.student]).mean()


@dataclass(frozen=True)
class KeptShare(Term):
    """(admitted share - wanted share)^2, mean over predictors (Dynamic-LLaVA, arXiv 2412.00876)."""

    weight: float
    student: tuple[str, ...]
    share: float
    teacher: tuple[str, ...] = ()
    name: str = "kept"

    def __call__(self, ids: torch.Tensor, student: Values, teacher: Values) -> torch.Tensor:
        """For each predictor which tokens it admits, with a gradient, and which it is not asked about, `[B, S]`."""
        errors = []
        for admit, unasked in zip(self.student[::2], self.student[1::2], strict=True):
            asked = (~student[unasked]).to(student[admit].dtype)
            kept = (student[admit] * asked).sum() / asked.sum().clamp_min(1)
            errors.append((kept - self.share).square())
        return torch.stack(errors).mean()


def terms_of(losses: Losses, student: Program, teacher: Program | None) -> tuple[Term, ...]:
    """The terms that a spec names, bound to nodes of two programs; raises PlanError when they do not fit."""
    if losses.needs_teacher and teacher is None:
        raise PlanError.of("no_teacher", "a loss compares with a teacher, but there is none")
    logits = student.output_nodes[0].name
    found: list[Term] = []
    if losses.next_token:
        found.append(NextToken(losses.next_token, (logits,)))
    if losses.logits is not None and teacher is not None:
        found.append(_divergence(losses.logits, student, teacher))
    if losses.hidden is not None and teacher is not None:
        found.append(_hidden(losses.hidden, student, teacher))
    if losses.heads is not None:
        found.append(_heads(losses.heads, student))
    if losses.kept is not None:
        found.append(_kept(losses.kept, student))
    if losses.gates:
        found.append(_gates(losses.gates, student))
    return tuple(term for term in found if term.weight)


def _divergence(loss: LogitsLoss, student: Program, teacher: Program) -> Term:
    ours, theirs = student.output_nodes[0], teacher.output_nodes[0]
    sizes = [int(node.meta["val"].shape[-1]) for node in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise PlanError.of("other_vocabulary", f"the student predicts {sizes[0]} tokens and the teacher {sizes[1]}")
    return LogitDivergence(loss.weight, (ours.name,), (theirs.name,), loss.temperature)


def _hidden(loss: HiddenLoss, student: Program, teacher: Program) -> Term:
    ours, theirs = ({block.path: block.exit for block in Views(p).blocks} for p in (student, teacher))
    common = [path for path in ours if path in theirs]
    for path in loss.blocks or ():
        if path not in common:
            raise PlanError.of("no_block", f"no block {path!r} in student and teacher", help=did_you_mean(path, common))
    pairs = [(ours[path], theirs[path]) for path in loss.blocks or common]
    if not pairs:
        raise PlanError.of("no_block", "student and teacher have no block in common whose hidden states could agree")
    for mine, other in pairs:
        sizes = [int(node.meta["val"].shape[-1]) for node in (mine, other)]
        if sizes[0] != sizes[1]:
            raise PlanError.of("other_width", f"the stream is {sizes[0]} wide, the teacher's {sizes[1]}")
    return HiddenError(loss.weight, tuple(a.name for a, _ in pairs), tuple(b.name for _, b in pairs))


def _heads(loss: HeadsLoss, student: Program) -> Term:
    named = dict(zip(student.entry.outputs, student.output_nodes, strict=True))
    early = [named["exit"].name] if "exit" in named else []
    heads = early or [node.name for name, node in named.items() if name.startswith("heads.")]
    if not heads:
        raise PlanError.of("no_heads", "the program has no draft heads to train", help=("put insert_heads before it",))
    first = 0 if early else 1
    return DraftHeads(loss.weight, (student.output_nodes[0].name, *heads), first, loss.decay, loss.target)


def _gates(weight: float, student: Program) -> Term:
    cores = [n for n in student.graph.graph.nodes if n.target is torch.ops.graphopt.bounded_attention.default]
    names = [node.args[10].name for node in cores if node.args[10] is not None]
    if not names:
        raise PlanError.of("no_gates", "the program has no gates to train", help=("put learn_gates before it",))
    return GateSize(weight, tuple(names))


def _kept(loss: KeptLoss, student: Program) -> Term:
    decided = dict.fromkeys(core.args[9] for core in admitting(student))
    if not decided or loss.share is None:
        missing = "no predictor that admits tokens" if not decided else "no share that shall be kept"
        raise PlanError.of("no_predictor", f"the program has {missing}", help=("train in drop_tokens, span: answer",))
    names = [side.name for node in decided for side in node.args[:2]]  # type: ignore[union-attr]
    return KeptShare(loss.weight, tuple(names), float(loss.share.fraction))


def _cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), ids.flatten())
