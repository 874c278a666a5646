"""Running programs: decoding with a cache, generation."""

from graphopt.runtime.cache import Cache
from graphopt.runtime.decoder import Decoder
from graphopt.runtime.generate import Sampling, generate
from graphopt.runtime.with_cache import with_cache

__all__ = ["Cache", "Decoder", "Sampling", "generate", "with_cache"]
