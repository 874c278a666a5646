"""Accuracy with fewer tokens on the shipped vision models: benchmarks/results/tokens.json and docs/tokens.md.

The classifier of digits keeps some of its patches from its second layer on, chosen by each score. The vision-language
model keeps some of its picture tokens in the stages of three published specs, and in the same stages by chance. Costs are
those that the programs count; times are medians of whole runs on one thread. Run it once for the accuracies and, on a
machine that does nothing else, with `--times` for the times; `--page` writes the page from what is stored.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml

import graphopt
from graphopt.cost import cost
from graphopt.ir.leaving import PROMPT, with_prompt
from graphopt.ir.program import Program
from graphopt.passkit import Context, PassRegistry
from graphopt.passkit.edits import apply_edits
from graphopt.spec import parse_spec
from graphopt.views import Views

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
RESULTS = ROOT / "benchmarks" / "results" / "tokens.json"
PAGE = ROOT / "docs" / "tokens.md"
SHARES = (0.75, 0.5, 0.25)
SEEDS, ANSWER_SEEDS = range(5), range(3)
STAGE = 2
CHANCE = "by chance"
SCORES: dict[str, dict[str, Any]] = {
    "attention from the class token": {"score": {"kind": "attention", "of": "class"}},
    "the same of the next layer": {"score": {"kind": "attention", "of": "class", "at": "next"}},
    "attention from all tokens": {"score": {"kind": "attention", "of": "all"}},
    "similarity to the class token": {"score": "similarity"},
    "norm": {"score": "norm"},
    "attention from the class token, merged": {
        "score": {"kind": "attention", "of": "class"},
        "action": "merge",
    },
}
ANSWER_SCORES: dict[str, dict[str, Any]] = {
    "attention from the last token, next layer": {"kind": "attention", "of": "last", "at": "next"},
    "attention from the last token": {"kind": "attention", "of": "last"},
    "attention from the text": {"kind": "attention", "of": "text"},
    "similarity to the text": {"kind": "similarity"},
    "norm": {"kind": "norm"},
}
# What a reader sees in the stored figures; to be written anew with them.
FINDINGS = (
    "- Digits hardly need choosing: fixed places by chance keep 98.8% with a quarter of the patches, as good as the best",
    "  scores. Norm, similarity and the class token's attention in the first layer choose patches that are alike.",
    "- Questions about pictures do: five of 64 patches show something, and by chance a shape is lost as often as a patch is.",
    "  Choosing is better than chance for every method at every share, by 16 to 52 points: pyramiddrop and mustdrop, whose",
    "  attention is nobody's training, and most of all the trained predictor of dynamic_llava, which at 25% keeps what all",
    "  tokens know.",
    "- What attention loses are lists: the question asks for nothing in particular, so that its last word attends to few",
    "  shapes. Colors, shapes, counts and whether something is there survive at a quarter; mustdrop, which asks all words of",
    "  the question, keeps places as well, where pyramiddrop, which asks the last one, loses a third.",
    "- Norm and similarity keep the ground and lose the shapes: they are far worse than chance here.",
    "- The predictor learns from what stays alone. At a rate of 2e-3 two of five trainings drove shapes out for good (32 and",
    "  37% right); at the 1e-3 of the spec eight with different seeds and shares all ended between 95% and 99% (300 questions",
    "  of another seed).",
    "- The model was trained with a part of the ground left out of half of its texts, so that fewer tokens as such do not",
    "  disturb it. One that was trained on whole pictures alone, with shapes of four patches each, answered as well by chance",
    "  as by attention: at 50% nearly every shape keeps a patch.",
    "- Time falls with the FLOPs, by less where choosing costs: by the attention of all tokens, for which the weights are",
    "  computed once more, keeping 75% or 50% of the patches is slower than keeping all.",
)
METHODS = ("pyramiddrop", "mustdrop", "dynamic_llava")
PICTURES, QUESTIONS, LENGTH = 60, 400, 72
# How many questions figures without a number of their own were measured with.
FEWER = 200
sys.path.insert(0, str(EXAMPLES))


def percent(share: float) -> str:
    """A share as a spec writes it."""
    return f"{100 * share:.6g}%"


def applied(program: Program, steps: list[dict[str, Any]], calibration: dict[str, Any] | None = None) -> Program:
    """The program after some steps, not verified: tests verify the passes in full."""
    spec = {"graphopt": 1, "steps": steps, **({"calibration": calibration} if calibration else {})}
    loaded = parse_spec(yaml.safe_dump(spec), registry=PassRegistry(), file="tokens.yaml")
    if calibration:
        return graphopt.compile(program, loaded, verify="off")
    for step in loaded.steps:
        views = Views(program)
        plan = step.config.plan(Context(views, tuple(range(len(views.blocks)))))
        if not plan.edits:
            raise ValueError(f"{step.use} declines: {plan.declines}")
        program = apply_edits(program, views, plan.edits, step.id)
    return program


def time_beside(
    whole: Program, program: Program, inputs: dict[str, torch.Tensor], repeats: int = 9
) -> dict[str, float]:
    """Median seconds of a run and of its ratio to a run of the whole model right before; the first two are left out."""
    runs = [each.module(torch.float32) for each in (whole, program)]
    found = []
    with torch.no_grad():
        for _ in range(repeats + 2):
            started = [time.perf_counter()]
            for run in runs:
                run(**inputs)
                started.append(time.perf_counter())
            found.append((started[1] - started[0], started[2] - started[1]))
    mine = statistics.median(own for _, own in found[2:])
    return {"seconds": mine, "time_ratio": statistics.median(own / other for other, own in found[2:])}


def digit_programs() -> Iterator[tuple[str, float, Program]]:
    """The classifier whole and with a share of its patches from the second layer on, by score."""
    program = graphopt.capture(EXAMPLES / "tiny_vit")
    yield "all patches", 1.0, program
    step = {"use": "drop_tokens", "span": "patches", "layers": 1}
    chance = {f"{CHANCE} {seed}": {"score": {"kind": "random", "seed": seed}} for seed in SEEDS}
    pairs = {"use": "merge_tokens", "span": "patches", "layers": 1, "by": "pairs"}
    for share in SHARES:
        for name, options in {**SCORES, **chance}.items():
            yield name, share, applied(program, [{**step, "keep": percent(share), **options}])
        yield "pairs merged (ToMe)", share, applied(program, [{**pairs, "keep": percent(share)}])
    for patch in (8, 2):
        yield f"patches of {patch} pixels", 1.0, applied(program, [{"use": "resize_patches", "patch": patch}])


def digits(times: bool) -> list[dict[str, Any]]:
    """Accuracy on the held-out digits, or the time of a batch of them, with FLOPs a picture."""
    from train_tiny_vit import load_heldout

    pictures, labels = load_heldout(EXAMPLES / "tiny_vit")
    rows = []
    whole = graphopt.capture(EXAMPLES / "tiny_vit")
    for name, share, program in digit_programs():
        row: dict[str, Any] = {"score": name, "keep": share}
        if times:
            row |= time_beside(whole, program, {"pixel_values": pictures[:PICTURES]})
        else:
            with torch.no_grad():
                best = program.module(torch.float32)(pixel_values=pictures)[0].argmax(-1)
            row["accuracy"] = (best == labels).float().mean().item()
            row["flops"] = int(cost(program).at(B=1)["flops"])
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def by_chance(step: dict[str, Any], seed: int) -> dict[str, Any]:
    """A step that keeps as many tokens in the same places of the model, but any; what would merge leaves."""
    read = {key: value for key, value in step.items() if key not in ("by", "loss", "teacher", "recipe", "score")}
    return {**read, "use": "drop_tokens", "score": {"kind": "random", "seed": seed}}


def method_steps(name: str, share: float, seed: int | None) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The steps of a spec with another share a stage of the decoder, by chance in all stages with a seed; its data."""
    file = ROOT / "specs" / "methods" / f"{name}.yaml"
    spec = yaml.safe_load(file.read_text(encoding="utf-8"))
    # The prompt is judged here; words of these short answers are all admitted.
    steps = [step for step in spec["steps"] if step.get("span") != "answer"]
    for step in steps:
        if step["use"] == "drop_tokens":
            stages = len(step["keep"]) if isinstance(step["keep"], list) else 0
            step["keep"] = [percent(share**i) for i in range(1, stages + 1)] if stages else percent(share)
    if seed is not None:
        steps = [by_chance(step, seed) for step in steps]
    for step in steps:
        if "recipe" in step:
            # PyYAML reads 1e-3 as a word.
            step["recipe"]["rate"] = float(step["recipe"]["rate"])
    if not any("recipe" in step for step in steps):
        return steps, None
    data = spec["calibration"]
    return steps, {**data, "data": str((file.parent / data["data"]).resolve())}


def method_programs(program: Program, methods: Iterable[str] = METHODS) -> Iterator[tuple[str, str, float, Program]]:
    """The vision-language model after each method at each share: method, choice, share, program."""
    for method in methods:
        for share in SHARES:
            for seed in (None, *ANSWER_SEEDS):
                steps, data = method_steps(method, share, seed)
                choice = "its own" if seed is None else f"{CHANCE} {seed}"
                yield method, choice, share, applied(program, steps, data)


def stage_programs(program: Program) -> Iterator[tuple[str, str, float, Program]]:
    """The vision-language model with one stage, chosen by each score."""
    chance = {f"{CHANCE} {seed}": {"kind": "random", "seed": seed} for seed in ANSWER_SEEDS}
    for share in SHARES:
        for name, score in {**ANSWER_SCORES, **chance}.items():
            step = {"use": "drop_tokens", "span": "image", "layers": STAGE, "keep": percent(share), "score": score}
            yield "one stage", name, share, applied(program, [step])


def cases(questions: list[Any]) -> dict[tuple[int, int], list[tuple[int, list[int], list[int]]]]:
    """For each question its number, its tokens with all of the answer but the end, and the answer, by both lengths.

    A greedy answer is right when every word is the likeliest behind the right ones before it.
    """
    from tiny_vlm_data import END, encode, prompt

    found = defaultdict(list)
    for number, question in enumerate(questions):
        asked, answer = prompt(question.text), encode(f"{question.answer} {END}")
        found[len(asked), len(answer)].append((number, asked + answer[:-1], answer))
    return found


def right_answers(program: Program, pictures: torch.Tensor, questions: list[Any]) -> dict[str, Any]:
    """Share of questions whose whole greedy answer is right, of all and by kind; the prompt chooses what leaves."""
    program = with_prompt(program)
    run = program.module(torch.float32)
    choosing = any(spec.role == PROMPT for spec in program.entry.inputs)
    right = torch.zeros(len(questions), dtype=torch.bool)
    with torch.no_grad():
        for (asked, written), group in cases(questions).items():
            for first in range(0, len(group), 64):
                numbers, ids, answers = (list(column) for column in zip(*group[first : first + 64], strict=True))
                given = {PROMPT: torch.ones(len(ids), asked, dtype=torch.int64)} if choosing else {}
                logits = run(input_ids=torch.tensor(ids), pixel_values=pictures[numbers], **given)[0]
                right[numbers] = (logits[:, -written:].argmax(-1) == torch.tensor(answers)).all(1)
    by_kind = defaultdict(list)
    for question, good in zip(questions, right.tolist(), strict=True):
        by_kind[question.kind].append(good)
    kinds = {kind: statistics.mean(map(float, found)) for kind, found in sorted(by_kind.items())}
    return {"accuracy": right.float().mean().item(), "kinds": kinds}


def answers(times: bool, made: Callable[[Program], Iterable[tuple[str, str, float, Program]]]) -> list[dict[str, Any]]:
    """Accuracy on held-out questions, or the time of a batch of prompts, with FLOPs and KV bytes of one prompt."""
    from tiny_vlm_data import heldout, prompt

    pictures, questions = heldout(QUESTIONS)
    ids = torch.tensor([prompt(questions[0].text)] * 16)
    whole = graphopt.capture(EXAMPLES / "tiny_vlm")
    rows = []
    for method, choice, share, program in chain([("all tokens", "", 1.0, whole)], made(whole)):
        row: dict[str, Any] = {"method": method, "choice": choice, "keep": share, "questions": QUESTIONS}
        if times:
            row |= time_beside(whole, program, {"input_ids": ids, "pixel_values": pictures[:16]})
        else:
            row |= right_answers(program, pictures, questions)
            found = cost(program).at(B=1, S=LENGTH, I=1)
            row |= {"flops": int(found["flops"]), "kv_bytes": int(found["kv_bytes"])}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New figures beside those that are stored for the same case."""
    names = ("score", "method", "choice", "keep")
    rows = {tuple(row.get(name) for name in names): dict(row) for row in old}
    for row in new:
        rows.setdefault(tuple(row.get(name) for name in names), {}).update(row)
    return list(rows.values())


def without_chance(rows: list[dict[str, Any]], names: tuple[str, ...], of: str) -> list[dict[str, Any]]:
    """The rows with one for all seeds: means, and the lowest and highest accuracy."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        name = CHANCE if row[of].startswith(CHANCE) else row[of]
        found[(*(row.get(each) for each in names), name)].append({**row, of: name})
    result = []
    for group in found.values():
        figures = [key for key in group[0] if all(isinstance(each.get(key), float | int) for each in group)]
        row = {**group[0], **{key: sum(each[key] for each in group) / len(group) for key in figures}}
        row["spread"] = (min(each["accuracy"] for each in group), max(each["accuracy"] for each in group))
        result.append(row)
    return result


def accuracy_cell(row: dict[str, Any] | None) -> str:
    """Accuracy, with the range over seeds where there are several."""
    if row is None:
        return ""
    low, high = row["spread"]
    several = f" ({100 * low:.1f} to {100 * high:.1f})" if low != high else ""
    return f"{100 * row['accuracy']:.1f}%{several}"


def time_cell(row: dict[str, Any] | None) -> str:
    """Time of a batch against that of the whole model."""
    return f"{row['time_ratio']:.2f}" if row and "time_ratio" in row else "-"


def digit_table(rows: list[dict[str, Any]]) -> list[str]:
    """One line a score, accuracies and times at each share."""
    rows = without_chance(rows, ("keep",), "score")
    by = {(row["score"], row["keep"]): row for row in rows}
    whole = by["all patches", 1.0]
    lines = ["| chosen by | 75% | 50% | 25% | time at 75% | 50% | 25% |", "|---|---|---|---|---|---|---|"]
    for name in dict.fromkeys(row["score"] for row in rows if row["keep"] < 1):
        at = [by.get((name, share)) for share in SHARES]
        lines.append(f"| {name} | {' | '.join(map(accuracy_cell, at))} | {' | '.join(time_cell(row) for row in at)} |")
    by_share = [by["norm", share]["flops"] / whole["flops"] for share in SHARES]
    lines += [
        "",
        f"FLOPs of a picture, chosen by norm: {', '.join(f'{100 * part:.0f}%' for part in by_share)} of the whole model's.",
    ]
    return lines


def patch_table(rows: list[dict[str, Any]]) -> list[str]:
    """Patches of other sizes, untrained."""
    whole = next(row for row in rows if row["score"] == "all patches")
    lines = ["| patches | accuracy | FLOPs | time |", "|---|---|---|---|"]
    for row in rows:
        if row["keep"] == 1:
            name = "4 pixels, as trained" if row is whole else row["score"].removeprefix("patches of ")
            part = row["flops"] / whole["flops"]
            lines.append(f"| {name} | {100 * row['accuracy']:.1f}% | {part:.2f} | {time_cell(row)} |")
    return lines


def answer_table(rows: list[dict[str, Any]]) -> list[str]:
    """One line a method and share."""
    rows = without_chance(rows, ("method", "keep"), "choice")
    by = {(row["method"], row["choice"], row["keep"]): row for row in rows}
    whole = by["all tokens", "", 1.0]
    lines = [
        "| method | share a stage | questions | accuracy | the same stages by chance | FLOPs | KV bytes | time |",
        "|---|---|---|---|---|---|---|---|",
        f"| all tokens | | {whole.get('questions', FEWER):.0f} | {accuracy_cell(whole)} | | 1.00 | 1.00 | 1.00 |",
    ]
    for method in METHODS:
        for share in SHARES:
            if (method, "its own", share) not in by:
                continue
            row, chance = by[method, "its own", share], by[method, CHANCE, share]
            flops, kv = (row[key] / whole[key] for key in ("flops", "kv_bytes"))
            asked = f"{row.get('questions', FEWER):.0f}"
            cells = (percent(share), asked, accuracy_cell(row), accuracy_cell(chance), f"{flops:.2f}", f"{kv:.2f}")
            lines.append(f"| {method} | {' | '.join(cells)} | {time_cell(row)} |")
    return lines


def kind_table(rows: list[dict[str, Any]]) -> list[str]:
    """One line a method and share: each kind of question by the method's own choice and by one draw of chance."""
    by = {(row["method"], row["choice"], row["keep"]): row["kinds"] for row in rows if "kinds" in row}
    whole = by["all tokens", "", 1.0]
    lines = [f"| method | share | {' | '.join(whole)} |", f"|{'---|' * (2 + len(whole))}"]
    lines.append(f"| all tokens | | {' | '.join(f'{100 * value:.0f}%' for value in whole.values())} |")
    for method in METHODS:
        for share in SHARES:
            own, chance = (by.get((method, choice, share)) for choice in ("its own", f"{CHANCE} 0"))
            if own and chance:
                cells = (f"{100 * own[kind]:.0f}% ({100 * chance[kind]:.0f}%)" for kind in whole)
                lines.append(f"| {method} | {percent(share)} | {' | '.join(cells)} |")
    return lines


def stage_table(rows: list[dict[str, Any]]) -> list[str]:
    """One line a score, accuracies and times at each share."""
    rows = without_chance(rows, ("method", "keep"), "choice")
    by = {(row["choice"], row["keep"]): row for row in rows}
    lines = ["| chosen by | 75% | 50% | 25% | time at 75% | 50% | 25% |", "|---|---|---|---|---|---|---|"]
    for name in (*ANSWER_SCORES, CHANCE):
        at = [by.get((name, share)) for share in SHARES]
        lines.append(f"| {name} | {' | '.join(map(accuracy_cell, at))} | {' | '.join(map(time_cell, at))} |")
    return lines


def page(stored: dict[str, Any]) -> str:
    """The page in Markdown, of the sections that are stored."""
    lines = [
        "# Fewer tokens",
        "",
        "Written by `python benchmarks/tokens.py --page` from benchmarks/results/tokens.json. Passes:",
        "[drop_tokens](passes/drop_tokens.md), [merge_tokens](passes/merge_tokens.md) and",
        "[resize_patches](passes/resize_patches.md). Nothing was trained after the change, but for the predictor of",
        "dynamic_llava. Times (`--times`) are of the eager program on one CPU thread, against the whole model's; - is not",
        "measured.",
        "",
        *FINDINGS,
        "",
    ]
    digit_rows, answer_rows, stage_rows = stored["digits"], stored["answers"], stored["stages"]
    if digit_rows:
        whole = next(row for row in digit_rows if row["score"] == "all patches")
        lines += [
            "## Digits",
            "",
            "The classifier in examples/tiny_vit keeps a share of its 64 patches from the second of its four layers on. All",
            f"patches: {100 * whole['accuracy']:.1f}% of 360 held-out digits. By chance: mean and range of five",
            "draws, each of the same places in all pictures.",
            "",
            *digit_table(digit_rows),
            "",
            "## Patches of another size",
            "",
            "`resize_patches` on the same pictures, kernels by pseudo-inverse, without training.",
            "",
            *patch_table(digit_rows),
            "",
        ]
    if answer_rows:
        lines += [
            "## Questions about pictures",
            "",
            "The model in examples/tiny_vlm, held-out questions, whole answers right word by word; the prompt chooses",
            "what leaves, as where answers are written. In each of their decoder stages pyramiddrop and mustdrop keep the",
            "share of what the stage before left (mustdrop merges three of the encoder's patches besides, and its words see",
            "in no layer what has left by the last stage); dynamic_llava keeps it once. By chance, in all stages: mean and",
            f"range of three draws. FLOPs and KV bytes are of one prompt of {LENGTH} tokens with one picture,",
            "against the whole model's.",
            "",
            *answer_table(answer_rows),
            "",
            "By kind of question, in brackets by one draw of chance:",
            "",
            *kind_table(answer_rows),
            "",
        ]
    if stage_rows:
        lines += [
            "## One stage",
            "",
            f"{stage_rows[0].get('questions', FEWER)} of the questions with one stage of drop_tokens in front of layer",
            f"{STAGE} of 0 to 5, by score.",
            "",
            *stage_table(stage_rows),
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure what is asked for, store it and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("digits", "answers", "stages"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="of the answers")
    parser.add_argument("--times", action="store_true", help="measure times instead of accuracies")
    parser.add_argument("--page", action="store_true", help="write the page from what is stored, measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measures: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
        "digits": digits,
        "answers": lambda times: answers(times, partial(method_programs, methods=options.methods)),
        "stages": lambda times: answers(times, stage_programs),
    }
    for name in () if options.page else measures:
        if options.only in (None, name):
            rows = measures[name](options.times)
            stored = read_results()
            stored[name] = merged(stored[name], rows)
            RESULTS.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    if any(read_results().values()):
        PAGE.write_text(page(read_results()), encoding="utf-8")


def read_results() -> dict[str, list[dict[str, Any]]]:
    """What is stored, by section."""
    empty: dict[str, list[dict[str, Any]]] = {"digits": [], "answers": [], "stages": []}
    return {**empty, **(json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {})}


if __name__ == "__main__":
    main()
