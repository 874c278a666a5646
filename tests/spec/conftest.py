"""Two small passes to write specs for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from graphopt.diagnostics import SpecError
from graphopt.spec import Expr, LoadedSpec, Percent, Share, Shorthand, Strict, load_spec


class Uniform(Strict):
    kind: Literal["uniform"] = "uniform"


class Global(Strict):
    kind: Literal["global"] = "global"
    tolerance: Share = Percent.parse("1%")


class PruneHeads(Strict):
    """Removes attention heads."""

    keep: Share
    unit: Literal["query", "group"] = "query"
    score: Literal["magnitude", "fluctuation"] = "magnitude"
    allocate: Annotated[Uniform | Global, Field(discriminator="kind"), Shorthand("kind")] = Uniform()
    heads: tuple[int, ...] = ()


class RegroupKV(Strict):
    """Merges key-value heads."""

    kv_heads: Expr
    init: Literal["mean", "svd"] = "mean"
    rank: int | Percent | None = None


class Passes:
    table: dict[str, type[BaseModel]]

    def __init__(self) -> None:
        self.table = {"prune_heads": PruneHeads, "regroup_kv": RegroupKV}

    def names(self) -> Iterable[str]:
        return self.table

    def get(self, name: str) -> type[BaseModel]:
        return self.table[name]


@pytest.fixture
def registry() -> Passes:
    return Passes()


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write() -> Callable[[str, str], Path]:
    def _write(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return _write


@pytest.fixture
def load(write: Callable[[str, str], Path], registry: Passes) -> Callable[..., LoadedSpec]:
    def _load(text: str, *overrides: str) -> LoadedSpec:
        return load_spec(write("a.yaml", text), list(overrides), registry=registry)

    return _load


@pytest.fixture
def fail(load: Callable[..., LoadedSpec]) -> Callable[..., str]:
    """The whole message that a spec is refused with."""

    def _fail(text: str, *overrides: str) -> str:
        with pytest.raises(SpecError) as caught:
            load(text, *overrides)
        return str(caught.value)

    return _fail
