"""Contracts: of each graphopt op what may be asked of it and what it means."""

from typing import Any

from graphopt.testing.contracts.contract import Contract, Sample
from graphopt.testing.contracts.layers import LAYERS
from graphopt.testing.contracts.packed import PACKED
from graphopt.testing.contracts.tokens import TOKENS

CONTRACTS: dict[Any, Contract] = {contract.op: contract for contract in (*LAYERS, *TOKENS, *PACKED)}

__all__ = ["CONTRACTS", "Contract", "Sample"]
