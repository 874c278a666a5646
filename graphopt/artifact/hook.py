"""Making transformers know graphopt checkpoints without importing transformers.

`import graphopt` calls `install`. If transformers' auto classes are loaded already, ours are registered at once;
otherwise a finder on `sys.meta_path` waits for the few modules that registration needs, lets the ordinary finders
import them unchanged, registers when all that are being imported are whole, and takes itself away.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"
# Our model class imports the last two; while one of them is half imported, registering has to wait for it.
_WATCHED = (_CONFIGS, _MODELS, "transformers.modeling_utils", "transformers.generation.utils")


def install() -> None:
    """Register now what can be registered, and watch for the rest."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    finder.advance()


class _Finder(MetaPathFinder):
    """Tells us when a watched module has been imported; finds nothing by itself."""

    def __init__(self) -> None:
        self.configs = self.models = self.busy = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with a loader that reports back."""
        if fullname not in _WATCHED:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if finder is self or find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Reporting(spec.loader, self)
                return spec
        return None

    def advance(self) -> None:
        """Register what has become possible; remove this finder when all is done."""
        if self.busy:
            return
        self.busy = True
        try:
            if not self.configs and _whole(_CONFIGS):
                from graphopt.artifact.config import register_config

                register_config()
                self.configs = True
            if not self.models and _whole(_MODELS) and not any(map(_partial, _WATCHED)):
                from graphopt.artifact.models import register_models

                register_models()
                self.models = True
        finally:
            self.busy = False
        if self.configs and self.models and self in sys.meta_path:
            sys.meta_path.remove(self)


class _Reporting(Loader):
    """The loader of a watched module; everything but the report is the original's."""

    def __init__(self, original: Any, finder: _Finder) -> None:
        self.original, self.finder = original, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the original does."""
        module: ModuleType | None = self.original.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module with its own loader, then report."""
        if module.__spec__ is not None:
            module.__spec__.loader = self.original
        module.__loader__ = self.original
        self.original.exec_module(module)
        module.__graphopt_whole__ = True  # type: ignore[attr-defined]
        self.finder.advance()


def _partial(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not _whole(name)


def _whole(name: str) -> bool:
    # The import system clears `_initializing` only after our report, so our own mark counts as well.
    module = sys.modules.get(name)
    if module is None:
        return False
    initializing = getattr(getattr(module, "__spec__", None), "_initializing", False)
    return bool(getattr(module, "__graphopt_whole__", False)) or not initializing
