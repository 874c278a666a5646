"""Pictures and the text around them as a program takes them, by the processor that lies beside its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from graphopt.diagnostics import PlanError
from graphopt.ir.pictures import splices
from graphopt.ir.program import Program

FILES = ("processor_config.json", "preprocessor_config.json")


def read_pictures(program: Program, prompt: str, files: Sequence[Path]) -> tuple[list[int], dict[str, torch.Tensor]]:
    """The tokens of a prompt in which pictures stand, in order, and the inputs that hold these.

    Raises PlanError for a program that takes no pictures or has no processor, for files that are no pictures, and for a
    prompt that does not say where each of them stands.
    """
    found = splices(program)
    if not found:
        raise PlanError.of("no_pictures", "no picture is written into the tokens of this model")
    folder = Path(program.origin.path or "")
    if not program.origin.path or not any((folder / name).is_file() for name in FILES):
        raise PlanError.of(
            "no_processor", f"the model has neither {FILES[0]} nor {FILES[1]} beside its weights to read pictures by"
        )
    pictures = _open(files)
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise PlanError.of("bad_processor", f"the processor in {folder} cannot be loaded: {error}") from error
    mark = str(getattr(processor, "image_token", "<image>"))
    if prompt.count(mark) != len(files):
        raise PlanError.of(
            "pictures_unplaced",
            f"the prompt has {prompt.count(mark)} places for {len(files)} pictures",
            help=(f"write {mark} once for each picture, where it stands in the text",),
        )
    read = processor(images=pictures, text=prompt, return_tensors="pt")
    inputs = {spec.name: read[spec.name] for spec in program.entry.inputs if spec.role == "pictures"}
    ids: list[int] = read["input_ids"][0].tolist()
    places, entries = ids.count(found[0].token), found[0].entries * len(files)
    if places != entries:
        raise PlanError.of(
            "other_processor",
            f"the processor makes {places} places for {len(files)} pictures, and the model {entries} entries",
            help=("its patches have another size: correct patch_size in processor_config.json",),
        )
    return ids, inputs


def _open(files: Sequence[Path]) -> list[object]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise PlanError.of("no_pillow", "pictures are read with pillow, which is not installed") from error
    opened: list[object] = []
    for file in files:
        try:
            with Image.open(file) as picture:
                opened.append(picture.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise PlanError.of("bad_picture", f"{file} cannot be read as a picture: {error}") from error
    return opened
