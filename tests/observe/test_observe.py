"""Statistics: right against a plain computation, the same however the text is batched, deaf to padding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from graphopt.diagnostics import PlanError
from graphopt.frontend.pretrained import capture_model
from graphopt.ir.program import Program
from graphopt.ir.weights import MemorySource
from graphopt.observe import Tap, observe, perplexity
from graphopt.observe.text import next_token_loss
from graphopt.views import Views

LLAMA = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3)
    return model


@pytest.fixture(scope="module")
def program(llama: LlamaForCausalLM) -> Program:
    return capture_model(llama)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (24, 17), generator=torch.Generator().manual_seed(1))


def batched(ids: torch.Tensor, size: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part} for part in ids.split(size)]


def every_tap(program: Program) -> list[Tap]:
    views = Views(program)
    block = views.blocks[1]
    down, output = block.feed_forwards[0].down.x.name, block.attentions[0].o.x.name
    key = block.attentions[0].core.args[1].name
    return [
        Tap(down, "moments"),
        Tap(output, "moments"),
        Tap(key, "gram", "heads"),
        Tap(output, "gram", "last"),
        Tap(block.entry.name, "cosine", "last", block.exit.name),
        Tap(down, "taylor"),
        Tap(output, "taylor"),
    ]


def watched(llama: LlamaForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values from hooks on the model itself; in float64, but its norms compute in float32."""
    found = {}
    model = LlamaForCausalLM(LLAMA).to(torch.float64).eval()
    model.load_state_dict(llama.state_dict())
    layer = model.model.layers[1]

    def keep(name: str, value: torch.Tensor) -> None:
        value.retain_grad()
        found[name] = value

    layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: keep("down", args[0]))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: keep("o", args[0]))
    layer.register_forward_pre_hook(lambda _, args: keep("in", args[0]))
    layer.register_forward_hook(lambda _, args, out: keep("out", out if isinstance(out, torch.Tensor) else out[0]))
    logits = model(ids, use_cache=False).logits
    loss = sum(torch.nn.functional.cross_entropy(row[:-1], target[1:]) for row, target in zip(logits, ids, strict=True))
    loss.backward()
    return found


def test_statistics_equal_a_plain_computation(llama: LlamaForCausalLM, program: Program, ids: torch.Tensor) -> None:
    taps = every_tap(program)
    found = observe(program, taps, batched(ids, 5), dtype=torch.float64)
    plain = watched(llama, ids)
    for tap, name in ((taps[0], "down"), (taps[1], "o")):
        x = plain[name].detach().flatten(0, 1)
        moments = found.moments(tap.node)
        assert moments.count == 24 * 17
        torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.variance, x.var(0, unbiased=False), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.abs_mean, x.abs().mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.square_mean, x.square().mean(0), rtol=1e-5, atol=1e-6)
        samples = plain[name].detach().abs().mean(1).square().sum(0).sqrt()
        torch.testing.assert_close(moments.sample_l2, samples, rtol=1e-5, atol=1e-6)
    x = plain["o"].detach().flatten(0, 1)
    torch.testing.assert_close(found.gram(taps[3].node, "last").gram, x.T @ x, rtol=1e-5, atol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(plain["in"].detach(), plain["out"].detach(), dim=-1).mean()
    assert found.cosine(taps[4].node, taps[4].other or "").mean == pytest.approx(float(cosine), rel=1e-7)
    for tap, name in ((taps[5], "down"), (taps[6], "o")):
        terms = (plain[name].detach() * plain[name].grad).sum(1)
        torch.testing.assert_close(found.taylor(tap.node).terms, terms, rtol=1e-4, atol=1e-6)


def test_statistics_do_not_depend_on_the_batching(program: Program, ids: torch.Tensor) -> None:
    taps = every_tap(program)
    runs = [observe(program, taps, batched(ids, size), dtype=torch.float64) for size in (1, 3, 8)]
    for tap in taps:
        for other in runs[1:]:
            for field in dataclasses.fields(runs[0][tap]):
                a, b = (torch.as_tensor(getattr(each[tap], field.name)) for each in (runs[0], other))
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13 * float(a.abs().max()))


def test_padding_does_not_count(program: Program, ids: torch.Tensor) -> None:
    taps = every_tap(program)
    lengths = [17, 5, 11]
    alone = [{"input_ids": ids[i : i + 1, :n]} for i, n in enumerate(lengths)]
    mask = torch.tensor([[int(j < n) for j in range(17)] for n in lengths])
    filled = torch.where(mask.bool(), ids[:3], torch.tensor(3))
    together = [{"input_ids": filled, "attention_mask": mask}]
    one, other = (observe(program, taps, batches, dtype=torch.float64) for batches in (alone, together))
    for tap in taps:
        for field in dataclasses.fields(one[tap]):
            a, b = (torch.as_tensor(getattr(each[tap], field.name)) for each in (one, other))
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12 * float(a.abs().max()))
    assert one.moments(taps[0].node).count == sum(lengths)


def test_streaming_holds_one_segment_of_weights(
    program: Program, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = MemorySource.get
    monkeypatch.setattr(MemorySource, "get", lambda self, name: (read.append(name), original(self, name))[1])
    node = Views(program).blocks[0].feed_forwards[0].down.x.name
    steps: list[tuple[int, int]] = []
    observe(program, [Tap(node, "moments")], batched(ids, 8), progress=lambda done, total: steps.append((done, total)))
    assert not [name for name in read if ".layers.1." in name or ".layers.2." in name]
    assert len(read) == len(set(read))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_flattened_tokens_are_still_tokens(ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, bos_token_id=1, eos_token_id=2, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    program = capture_model(model)
    down = Views(program).blocks[1].feed_forwards[0].down.x.name
    taps = [Tap(down, "moments"), Tap(down, "taylor")]
    one, other = (observe(program, taps, batched(ids, size), dtype=torch.float64) for size in (1, 8))
    assert one.moments(down).count == 24 * 17
    torch.testing.assert_close(one.moments(down).sample_l2, other.moments(down).sample_l2, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(one.taylor(down).terms, other.taylor(down).terms, rtol=1e-9, atol=1e-13)


def test_an_overflow_is_named(program: Program, ids: torch.Tensor) -> None:
    assert isinstance(program.weights.source, MemorySource)
    name = "model.layers.0.mlp.up_proj.weight"
    broken = program.weights.source.tensors[name].clone()
    broken[3] = 3e38
    source = MemorySource({**program.weights.source.tensors, name: broken})
    bad = dataclasses.replace(program, weights=dataclasses.replace(program.weights, source=source))
    node = Views(program).blocks[0].feed_forwards[0].down.x
    with pytest.raises(PlanError, match=f"%{node.name} .*layers.0.mlp.* is not finite"):
        observe(bad, [Tap(node.name, "moments")], batched(ids, 8))


def test_mistakes_are_refused(program: Program, ids: torch.Tensor) -> None:
    with pytest.raises(PlanError, match="no node %nowhere"):
        observe(program, [Tap("nowhere", "moments")], batched(ids, 8))
    node = program.output_nodes[0].name
    with pytest.raises(PlanError, match="no calibration text"):
        observe(program, [Tap(node, "moments")], [])
    with pytest.raises(PlanError, match=r"expects \[batch, heads"):
        observe(program, [Tap(node, "gram", "heads")], batched(ids, 8))


def test_perplexity_is_the_mean_over_tokens(llama: LlamaForCausalLM, program: Program, ids: torch.Tensor) -> None:
    with torch.no_grad():
        logits = llama(ids, use_cache=False).logits
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())
    for size in (1, 8):
        loss, count = perplexity(program, batched(ids, size))
        assert count == 24 * 16
        assert loss == pytest.approx(float(want), rel=1e-6)
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    short, _ = perplexity(program, [{"input_ids": ids[:, :9]}])
    padded, count = perplexity(program, [{"input_ids": ids, "attention_mask": mask}])
    assert count == 24 * 8
    assert padded == pytest.approx(short, rel=1e-6)


def test_loss_counts_only_pairs_inside_the_mask() -> None:
    logits = torch.zeros(1, 5, 7)
    mask = torch.tensor([[0, 1, 1, 1, 0]])
    losses, counts = next_token_loss(logits, torch.zeros(1, 5, dtype=torch.long), mask)
    assert counts.tolist() == [2.0]
    assert float(losses[0]) == pytest.approx(2 * torch.log(torch.tensor(7.0, dtype=torch.float64)).item())
