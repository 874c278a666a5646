"""The training loop: batches through student and teacher, a weighted sum of loss terms, AdamW on the leaves.

A run is a function of the program, what it is asked, the text and the seed: stopping, saving and resuming on the same
machine changes no bit of the result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from graphopt.diagnostics import ArtifactError, PlanError
from graphopt.ir.program import Program
from graphopt.observe.text import token_input
from graphopt.passkit.training import Training
from graphopt.train.data import Batch, Examples, Windows
from graphopt.train.forward import Forward
from graphopt.train.leaves import Leaves
from graphopt.train.losses import terms_of
from graphopt.train.schedule import factor

STATE_FILE = "training.safetensors"


@dataclass(frozen=True)
class Record:
    """What became of a run: mean losses by term over its first and last tenth, and what it took."""

    steps: int
    tokens: int
    parameters: int
    first: dict[str, float]
    last: dict[str, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data for the trail."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "trained_parameters": self.parameters,
            "loss_first": {name: round(value, 4) for name, value in self.first.items()},
            "loss_last": {name: round(value, 4) for name, value in self.last.items()},
            "seconds": round(self.seconds, 1),
        }


class Trainer:
    """A training run: `step` moves the weights once, `result` is the program as it is now.

    `tokens` `[N]` is the text. Raises PlanError when terms, weights or text do not fit.
    """

    def __init__(
        self,
        program: Program,
        training: Training,
        tokens: torch.Tensor | Mapping[str, torch.Tensor],
        teacher: Program | None = None,
    ) -> None:
        recipe = training.recipe
        self.program, self.training = program, training
        self.dtype = torch.float64 if program.dtype == torch.float64 else torch.float32
        self.terms = terms_of(training.losses, program, teacher)
        self.forward = Forward(program, (node for term in self.terms for node in term.student), self.dtype)
        _check_reached(self.forward, training.weights)
        self.leaves = Leaves(program, training.weights, self.forward.weights, self.dtype, training.lora, recipe.seed)
        self.teacher = self._teacher(teacher)
        name = token_input(program)
        self.data: Windows | Examples = (
            Windows(tokens, recipe.batch, recipe.seq, recipe.seed)
            if isinstance(tokens, torch.Tensor)
            else Examples(tokens, name, recipe.batch, recipe.seed)
        )
        self.optimizer = torch.optim.AdamW(
            list(self.leaves.tensors.values()), lr=recipe.rate, betas=recipe.betas, weight_decay=recipe.decay
        )
        self.done = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []

    def _teacher(self, teacher: Program | None) -> tuple[Forward, dict[str, torch.Tensor]] | None:
        nodes = [node for term in self.terms for node in term.teacher]
        if teacher is None or not nodes:
            return None
        forward = Forward(teacher, nodes, self.dtype)
        return forward, {name: teacher.weights.evaluate(name, self.dtype) for name in forward.weights}

    def step(self) -> dict[str, float]:
        """One update; returns the loss terms by name and their weighted sum as `loss`.

        Raises PlanError when the loss is not finite.
        """
        started = time.perf_counter()
        recipe = self.training.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate * factor(recipe, self.done)
        self.optimizer.zero_grad()
        found: dict[str, float] = {}
        for part in range(recipe.accumulate):
            losses = self.losses(self.data[self.done * recipe.accumulate + part])
            (losses["loss"] / recipe.accumulate).backward()  # type: ignore[no-untyped-call]
            for name, value in losses.items():
                found[name] = found.get(name, 0.0) + float(value.detach()) / recipe.accumulate
        if not all(abs(value) < float("inf") for value in found.values()):
            raise PlanError.of(
                "not_finite",
                f"the loss is {found['loss']} at step {self.done + 1}",
                help=("train with a smaller rate, or check the program before training",),
            )
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self.leaves.tensors.values()), recipe.clip)
        self.optimizer.step()
        self.done += 1
        self.seconds += time.perf_counter() - started
        self.history.append(found)
        return found

    def losses(self, batch: Batch | torch.Tensor) -> dict[str, torch.Tensor]:
        """Every term on a batch, or on tokens `[B, S]`, and the weighted sum as `loss`."""
        if isinstance(batch, torch.Tensor):
            batch = Batch({token_input(self.program): batch}, batch)
        inputs = {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in batch.inputs.items()}
        student = self.forward(self.leaves.current(), inputs)
        theirs: dict[str, torch.Tensor] = {}
        if self.teacher is not None:
            forward, weights = self.teacher
            with torch.no_grad():
                theirs = forward(weights, inputs)
        found = {term.name: term(batch.targets, student, theirs) for term in self.terms}
        total = torch.stack([term.weight * found[term.name] for term in self.terms]).sum()
        return {**found, "loss": total}

    def result(self) -> Program:
        """The program with the weights as they are now."""
        return self.leaves.result()

    def record(self) -> Record:
        """What became of the steps so far."""
        tenth = max(1, len(self.history) // 10)
        recipe = self.training.recipe
        return Record(
            self.done,
            self.done * recipe.accumulate * recipe.batch * recipe.seq,
            sum(tensor.numel() for tensor in self.leaves.tensors.values()),
            _mean(self.history[:tenth]),
            _mean(self.history[-tenth:]),
            self.seconds,
        )

    def save(self, directory: Path) -> None:
        """Write the state, complete or not at all: tensors, moments, step and losses so far."""
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in self.leaves.tensors.items():
            state = self.optimizer.state[tensor]
            tensors |= {f"{name}:value": tensor.detach(), f"{name}:mean": state["exp_avg"]}
            tensors |= {f"{name}:square": state["exp_avg_sq"], f"{name}:step": state["step"]}
        facts = {"asked": self._asked(), "done": str(self.done), "history": json.dumps(self.history)}
        facts["seconds"] = str(self.seconds)
        directory.mkdir(parents=True, exist_ok=True)
        beside = directory / f"{STATE_FILE}.partial"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata=facts)
        beside.replace(directory / STATE_FILE)

    def load(self, directory: Path) -> bool:
        """Continue from a saved state; False when there is none.

        Raises ArtifactError when it belongs to another run.
        """
        file = directory / STATE_FILE
        if not file.is_file():
            return False
        with safe_open(file, framework="pt") as held:
            facts = held.metadata() or {}
            if facts.get("asked") != self._asked():
                raise ArtifactError.of(
                    "other_run",
                    f"{file} holds the state of a run with other options or of another model",
                    help=("resume with the same spec and model, or remove the file",),
                )
            for name, tensor in self.leaves.tensors.items():
                with torch.no_grad():
                    tensor.copy_(held.get_tensor(f"{name}:value"))
                self.optimizer.state[tensor] = {
                    "step": held.get_tensor(f"{name}:step"),
                    "exp_avg": held.get_tensor(f"{name}:mean"),
                    "exp_avg_sq": held.get_tensor(f"{name}:square"),
                }
        self.done, self.history = int(facts["done"]), json.loads(facts["history"])
        self.seconds = float(facts["seconds"])
        return True

    def _asked(self) -> str:
        sizes = {name: list(tensor.shape) for name, tensor in self.leaves.tensors.items()}
        # Terms that are not asked for say nothing, so that a state outlives the addition of a term.
        losses = self.training.losses.model_dump(mode="json", exclude_defaults=True)
        asked = {**self.training.to_json(), "losses": losses, "sizes": sizes, "text": len(self.data)}
        return json.dumps(asked, sort_keys=True)


def train(
    program: Program,
    training: Training,
    tokens: torch.Tensor | Mapping[str, torch.Tensor],
    teacher: Program | None = None,
    *,
    state: Path | None = None,
    save_every: int = 100,
    tell: Callable[[int], object] | None = None,
) -> tuple[Program, Record]:
    """Train to the last step of the recipe; the program with its new weights, and what became of the run.

    With `state` the run continues from that directory when it holds a state, and saves one every `save_every` steps.
    `tell(n)` is called after each n steps. Raises PlanError when terms, weights or text do not fit.
    """
    trainer = Trainer(program, training, tokens, teacher)
    if state is not None and trainer.load(state) and tell is not None:
        tell(trainer.done)
    while trainer.done < training.recipe.steps:
        trainer.step()
        if tell is not None:
            tell(1)
        if state is not None and (trainer.done % save_every == 0 or trainer.done == training.recipe.steps):
            trainer.save(state)
    return trainer.result(), trainer.record()


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(row[name] for row in rows) / len(rows) for name in (rows[0] if rows else {})}


def _check_reached(forward: Forward, names: tuple[str, ...]) -> None:
    lost = sorted(set(names) - set(forward.weights))
    if lost:
        raise PlanError.of(
            "not_reached",
            f"no loss term depends on {lost[0]!r}" + (f" and {len(lost) - 1} others" if len(lost) > 1 else ""),
            help=("add a loss term that reads them, or leave them frozen",),
        )
