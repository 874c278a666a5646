"""Generation equals transformers' own, token by token, and is what its arguments say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from graphopt.ir.run import Runner
from graphopt.runtime import generate
from graphopt.runtime.generate import choose

CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Gemma2Config": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    },
}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Runner]:
    """A random tiny model of transformers and the runner of its program."""
    import transformers

    from graphopt.artifact import load

    torch.manual_seed(0)
    given = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.5}
    if request.param != "GPT2Config":
        given["num_attention_heads"] = 4
    config = getattr(transformers, request.param)(**given, **CONFIGS[request.param])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    directory: Path = tmp_path_factory.mktemp("model")
    model.save_pretrained(directory)
    return model, Runner(load(directory), torch.float32, "cpu")


def theirs(model: Any, ids: torch.Tensor, mask: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy tokens of transformers' generate, never stopping."""
    result: torch.Tensor = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return result


def test_greedy_equals_transformers(pair: tuple[Any, Runner]) -> None:
    model, run = pair
    ids = torch.randint(1, 61, (3, 6), generator=torch.Generator().manual_seed(1))
    assert torch.equal(generate(run, ids, max_new_tokens=9), theirs(model, ids, torch.ones_like(ids), 9))


def test_left_padding_equals_transformers(pair: tuple[Any, Runner]) -> None:
    model, run = pair
    ids = torch.randint(1, 61, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    ids = ids * mask
    ours = generate(run, ids, padding=mask, max_new_tokens=8)
    assert torch.equal(ours, theirs(model, ids, mask, 8))
    alone = generate(run, ids[1:, 2:], max_new_tokens=8)
    assert torch.equal(ours[1:, 2:], alone)


def test_a_seed_decides_the_sample(pair: tuple[Any, Runner]) -> None:
    _, run = pair
    ids = torch.tensor([[3, 4, 5]])

    def sample(seed: int) -> list[int]:
        return generate(run, ids, max_new_tokens=12, temperature=1.5, seed=seed)[0].tolist()  # type: ignore[no-any-return]

    assert sample(7) == sample(7)
    assert len({tuple(sample(seed)) for seed in range(4)}) > 1
    cold = generate(run, ids, max_new_tokens=6, temperature=2.0, top_k=1)
    assert torch.equal(cold, generate(run, ids, max_new_tokens=6))


def test_rows_stop_at_eos_and_are_streamed(pair: tuple[Any, Runner]) -> None:
    _, run = pair
    ids = torch.tensor([[3, 4, 5]])
    free = generate(run, ids, max_new_tokens=10)[0, 3:].tolist()
    seen: list[int] = []
    stop = free[4]
    result = generate(run, ids, max_new_tokens=10, eos=stop, stream=lambda token: seen.append(int(token[0])))
    first = free.index(stop) + 1
    assert result[0, 3:].tolist() == free[:first] == seen


def test_a_finished_row_repeats_its_end(pair: tuple[Any, Runner]) -> None:
    _, run = pair
    prompts = torch.randint(1, 61, (12, 3), generator=torch.Generator().manual_seed(3))
    free = generate(run, prompts, max_new_tokens=8)[:, 3:].tolist()
    ends, goes_on = next((i, j) for i in range(12) for j in range(12) if free[i][0] not in free[j])
    result = generate(run, prompts[[ends, goes_on]], max_new_tokens=8, eos=[free[ends][0]])
    assert result[0, 3:].tolist() == [free[ends][0]] * 8
    assert result[1, 3:].tolist() == free[goes_on]


def test_sampling_follows_the_law() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).expand(20000, -1)
    generator = torch.Generator().manual_seed(0)

    def shares(**limits: Any) -> torch.Tensor:
        drawn = choose(logits, generator, temperature=1.0, **limits)
        return torch.bincount(drawn, minlength=4) / len(drawn)

    # 20,000 draws: a standard error of at most 0.0036, so 0.02 is more than five of them.
    assert torch.allclose(shares(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.02)
    assert torch.allclose(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02)
    assert torch.allclose(shares(top_p=0.7), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02)
    assert torch.equal(shares(top_p=0.5), torch.tensor([1.0, 0, 0, 0]))
    assert torch.equal(shares(top_p=1e-9), torch.tensor([1.0, 0, 0, 0]))


@pytest.mark.parametrize(
    "given",
    [
        {"max_new_tokens": -1},
        {"max_new_tokens": 1, "top_p": 0.0},
        {"max_new_tokens": 1, "top_k": 0},
        {"max_new_tokens": 1, "temperature": -1.0},
        {"max_new_tokens": 1, "padding": torch.tensor([[1, 1, 0]])},
        {"max_new_tokens": 1, "padding": torch.tensor([[1, 1]])},
    ],
)
def test_numbers_out_of_range_are_refused(pair: tuple[Any, Runner], given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"padd|at least"):
        generate(pair[1], torch.tensor([[1, 2, 3]]), **given)


def test_nothing_new_is_the_prompt(pair: tuple[Any, Runner]) -> None:
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(generate(pair[1], ids, max_new_tokens=0), ids)
