"""The main job on the shipped model: run a spec, reload the result, show what changed and let it write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "demo"


def graphopt(*arguments: str) -> None:
    """Run the command line as a user would, showing the command."""
    print("\n$ graphopt " + " ".join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", "graphopt", *arguments], cwd=ROOT, check=True)


if __name__ == "__main__":
    graphopt("run", "specs/recipes/demo.yaml", "--out", str(OUT.relative_to(ROOT)), "--overwrite")
    graphopt("diff", "examples/tiny_lm", "out/demo")
    prompt = "def read_lines(path, encoding=None):"
    graphopt(
        "generate", "out/demo", "--prompt", prompt, "--max-new-tokens", "90", "--temperature", "0.7", "--top-k", "20"
    )
