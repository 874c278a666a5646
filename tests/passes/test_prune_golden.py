"""Published parameter counts, on the meta device."""

from __future__ import annotations

from transformers import LlamaConfig

from graphopt.frontend import capture_config
from graphopt.passes.width.prune_heads import PruneHeads
from graphopt.passes.width.prune_neurons import PruneNeurons
from graphopt.passkit import Context
from graphopt.passkit.edits import apply_edits
from graphopt.select.options import Amount, Order
from graphopt.views import Views

LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)


def test_a_quarter_of_heads_and_neurons_of_llama_8b() -> None:
    """LLM-Pruner (arXiv 2305.11627) printed the second count: layers 4 to 29 keep 6 KV groups and 10752 neurons."""
    whole = capture_config(LLAMA_3_1_8B)
    assert whole.weights.parameters == 8_030_261_248
    views = Views(whole)
    context = Context(views, tuple(range(4, 30)))
    quarter = Amount.parse("75%")
    heads = PruneHeads(unit="kv_group", keep=quarter, score=Order()).plan(context)
    neurons = PruneNeurons(keep=quarter, score=Order()).plan(context)
    assert len(heads.edits) == len(neurons.edits) == 26
    assert {decline.reason for decline in heads.declines + neurons.declines} == {"outside `where`"}
    small = apply_edits(whole, views, heads.edits + neurons.edits)
    assert small.weights.parameters == 6_612_586_496
    attentions = Views(small).attentions
    assert [(a.heads, a.kv_heads) for a in attentions] == [(32, 8)] * 4 + [(24, 6)] * 26 + [(32, 8)] * 2
