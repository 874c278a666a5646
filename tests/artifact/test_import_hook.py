"""`import graphopt` is light and makes transformers' auto classes know our checkpoints, in any order of imports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from graphopt.artifact import save
from graphopt.ir.program import Program

ORDERS = {
    "graphopt_first": "import graphopt; from transformers import AutoModelForCausalLM",
    "transformers_first": "import transformers; import graphopt; from transformers import AutoModelForCausalLM",
    "auto_class_first": "from transformers import AutoModelForCausalLM; import graphopt",
    "through_generation": "import graphopt; import transformers.generation.utils; "
    "from transformers import AutoModelForCausalLM",
    "twice": "import graphopt; from graphopt.artifact.hook import install; install(); install(); "
    "from transformers import AutoModelForCausalLM",
}


@pytest.fixture(scope="module")
def artifact(captured: Callable[..., Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hook") / "out"
    save(captured("llama"), directory, format="graphopt")
    return directory


@pytest.mark.parametrize("order", list(ORDERS))
def test_auto_classes_load_our_checkpoint(artifact: Path, order: str) -> None:
    script = f"""
{ORDERS[order]}
import sys
from graphopt.artifact.hook import _Finder
model = AutoModelForCausalLM.from_pretrained({str(artifact)!r})
assert type(model).__name__ == "GraphoptForCausalLM"
assert not any(isinstance(finder, _Finder) for finder in sys.meta_path)
from transformers import AutoConfig, AutoModel
assert type(AutoConfig.from_pretrained({str(artifact)!r})).__name__ == "GraphoptConfig"
assert type(AutoModel.from_pretrained({str(artifact)!r})).__name__ == "GraphoptForCausalLM"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_import_is_light() -> None:
    script = """
import sys, time
start = time.perf_counter()
import graphopt
assert time.perf_counter() - start < 0.3, time.perf_counter() - start
assert not {"torch", "transformers", "safetensors"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
