"""The front end: a transformers checkpoint or a plain torch module becomes a Program."""

from graphopt.frontend.export import capture_module
from graphopt.frontend.pretrained import capture_config, capture_model, capture_pretrained

__all__ = ["capture_config", "capture_model", "capture_module", "capture_pretrained"]
