"""Capture: a transformers checkpoint or a plain torch module becomes a Program."""

from graphopt.capture.export import capture_module
from graphopt.capture.pretrained import capture_config, capture_model, capture_pretrained

__all__ = ["capture_config", "capture_model", "capture_module", "capture_pretrained"]
