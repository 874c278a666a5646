"""Trainable tensors: the leaves that gradients reach, and the program that their values make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from graphopt.diagnostics import PlanError
from graphopt.ir.program import Program
from graphopt.ir.weights import Const
from graphopt.passkit.training import Lora


class Leaves:
    """The weights of a program by name, of which some are trained in `dtype`.

    A tensor under several names is one weight here, so that ties stay ties. With LoRA each trained matrix is
    W + (alpha / rank) B A, B zero at first, so that nothing changes before the first step.
    Raises PlanError for a weight that cannot be trained so.
    """

    def __init__(
        self,
        program: Program,
        names: Iterable[str],
        read: Iterable[str],
        dtype: torch.dtype,
        lora: Lora | None = None,
        seed: int = 0,
    ) -> None:
        self.program, self.lora = program, lora
        self.names = tuple(dict.fromkeys(names))
        _check(program, self.names, lora)
        self.values = {name: program.weights.evaluate(name, dtype) for name in dict.fromkeys((*read, *self.names))}
        self.tensors: dict[str, torch.Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for name in self.names:
            if lora is None:
                self.values[name] = self.tensors[name] = self.values[name].clone().requires_grad_()
                continue
            rows, columns = self.values[name].shape
            a = torch.randn(lora.rank, columns, dtype=dtype, generator=generator) / columns**0.5
            self.tensors[f"{name}:a"] = a.requires_grad_()
            self.tensors[f"{name}:b"] = torch.zeros(rows, lora.rank, dtype=dtype, requires_grad=True)

    def current(self) -> Mapping[str, torch.Tensor]:
        """All weights as the graph reads them now, differentiable in `tensors`."""
        if self.lora is None:
            return self.values
        return self.values | {name: self._merged(name) for name in self.names}

    def _merged(self, name: str) -> torch.Tensor:
        assert self.lora is not None
        scale = self.lora.alpha / self.lora.rank
        return self.values[name] + scale * (self.tensors[f"{name}:b"] @ self.tensors[f"{name}:a"])

    def result(self) -> Program:
        """The program with the trained weights, each rounded once to the dtype in which it is stored."""
        weights, now = self.program.weights, self.current()
        for name in self.names:
            kind = weights[name].expr.dtype
            value = now[name].detach().to(kind).contiguous().clone()
            weights = weights.with_weight(replace(weights[name], expr=Const(value, kind)))
        return replace(self.program, weights=weights)


def _check(program: Program, names: tuple[str, ...], lora: Lora | None) -> None:
    if not names:
        raise PlanError.of("nothing_to_train", "no weight is selected for training")
    for name in names:
        weight = program.weights[name]
        if weight.kind != "parameter" or not weight.expr.dtype.is_floating_point:
            raise PlanError.of("not_trainable", f"{name} is a {weight.kind} of {weight.expr.dtype} and is not trained")
        if lora is not None and len(weight.expr.shape) != 2:
            raise PlanError.of("not_a_matrix", f"LoRA trains matrices, but {name} is {list(weight.expr.shape)}")
