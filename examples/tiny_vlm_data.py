"""Scenes, questions and answers for ``train_tiny_vlm.py``.

A scene is a 48x48 picture with one to five coloured shapes on a noisy grey ground.  Each shape fills most of one of the
64 patches of 6x6 pixels, so that one to five of them show all there is to see.  Everything is drawn from a generator
that the caller seeds.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIZE = 48
PATCH = 6
SIDE = SIZE // PATCH
DOTS = 5
MOST = 5
COLORS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.75, 0.15),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.9, 0.1),
    "purple": (0.65, 0.15, 0.75),
    "white": (0.98, 0.98, 0.98),
}
SHAPES = {
    "square": ("#####", "#####", "#####", "#####", "#####"),
    "circle": (".###.", "#####", "#####", "#####", ".###."),
    "triangle": ("..#..", "..#..", ".###.", ".###.", "#####"),
    "cross": ("..#..", "..#..", "#####", "..#..", "..#.."),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five")
QUADRANTS = (("top", "left"), ("top", "right"), ("bottom", "left"), ("bottom", "right"))
KINDS = ("color", "shape", "count", "where", "there", "place", "list")
START, END, IMAGE, PAD = "<s>", "</s>", "<image>", "<pad>"
WORDS = (
    PAD, START, END, IMAGE, *COLORS, *SHAPES, *(f"{name}es" if name == "cross" else f"{name}s" for name in SHAPES),
    *NUMBERS, "top", "bottom", "left", "right", "what", "color", "shape", "shapes", "is", "the", "how", "many", "where",
    "there", "a", "at", "all", "list", "nothing", "yes", "no", "?", ",",
)  # fmt: skip
IMAGE_TOKENS = SIDE**2


@dataclass(frozen=True)
class Thing:
    """One shape of a scene, in a patch counted row by row."""

    patch: int
    color: str
    shape: str

    @property
    def quadrant(self) -> tuple[str, str]:
        """The words for the quarter of the picture that it is in."""
        row, column = divmod(self.patch, SIDE)
        return QUADRANTS[2 * (row >= SIDE // 2) + (column >= SIDE // 2)]

    @property
    def name(self) -> str:
        """Color and shape."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Question:
    """One question with its kind and its answer, words parted by single spaces."""

    kind: str
    text: str
    answer: str


Scene = tuple[Thing, ...]


def draw_scene(chance: random.Random) -> Scene:
    """One to five shapes in different patches, in reading order."""
    patches = sorted(chance.sample(range(IMAGE_TOKENS), chance.randint(1, MOST)))
    return tuple(Thing(patch, chance.choice(list(COLORS)), chance.choice(list(SHAPES))) for patch in patches)


def render(scenes: list[Scene], generator: torch.Generator) -> torch.Tensor:
    """The pictures, from -1 to 1, float32 ``[N, 3, 48, 48]``; ground, shades and places in the patch vary."""
    masks = torch.tensor([[[dot == "#" for dot in row] for row in rows] for rows in SHAPES.values()]).float()
    colors, shapes = list(COLORS), list(SHAPES)
    palette = torch.tensor(list(COLORS.values()))
    rows = torch.tensor([n for n, scene in enumerate(scenes) for _ in scene])
    things = [thing for scene in scenes for thing in scene]
    shade = 0.9 + 0.2 * torch.rand(len(things), 1, generator=generator)
    paint = (palette[[colors.index(t.color) for t in things]] * shade).clamp(0, 1)
    offsets = torch.randint(0, PATCH - DOTS + 1, (len(things), 2), generator=generator)
    patches = torch.tensor([t.patch for t in things])
    grid = torch.arange(DOTS)
    y = (patches // SIDE * PATCH + offsets[:, 0])[:, None] + grid
    x = (patches % SIDE * PATCH + offsets[:, 1])[:, None] + grid
    pictures = (0.2 + 0.4 * torch.rand(len(scenes), 1, 1, 1, generator=generator)).repeat(1, SIZE, SIZE, 3)
    index = (rows[:, None, None], y[:, :, None], x[:, None, :])
    mask = masks[[shapes.index(t.shape) for t in things]].unsqueeze(-1)
    pictures[index] = mask * paint[:, None, None, :] + (1 - mask) * pictures[index]
    noise = 0.04 * torch.randn(pictures.shape, generator=generator)
    return ((pictures + noise).clamp(0, 1) * 2 - 1).permute(0, 3, 1, 2).contiguous()


def ask(scene: Scene, kind: str, chance: random.Random) -> Question | None:
    """A question of a kind about the scene, or None when the scene has no unambiguous one."""
    colors = Counter(t.color for t in scene)
    shapes = Counter(t.shape for t in scene)
    names = Counter(t.name for t in scene)
    if kind == "color":
        once = [t for t in scene if shapes[t.shape] == 1]
        thing = chance.choice(once) if once else None
        return Question(kind, f"what color is the {thing.shape} ?", thing.color) if thing else None
    if kind == "shape":
        once = [t for t in scene if colors[t.color] == 1]
        thing = chance.choice(once) if once else None
        return Question(kind, f"what shape is {thing.color} ?", thing.shape) if thing else None
    if kind == "count":
        return _count(scene, colors, shapes, chance)
    if kind == "where":
        once = [t for t in scene if names[t.name] == 1]
        thing = chance.choice(once) if once else None
        return Question(kind, f"where is the {thing.name} ?", " ".join(thing.quadrant)) if thing else None
    if kind == "there":
        name = chance.choice(scene).name
        if chance.random() < 0.5:
            # Half of the absent ones share color or shape with one that is there, so that both must be looked at.
            near = chance.choice(scene)
            color, shape = chance.choice(list(COLORS)), chance.choice(list(SHAPES))
            name = chance.choice((f"{near.color} {shape}", f"{color} {near.shape}", f"{color} {shape}"))
        return Question(kind, f"is there a {name} ?", "yes" if name in names else "no")
    if kind == "place":
        fits = [q for q in QUADRANTS if sum(t.quadrant == q for t in scene) <= 1]
        if not fits:
            return None
        place = chance.choice(fits)
        found = [t.name for t in scene if t.quadrant == place]
        return Question(kind, f"what is at the {' '.join(place)} ?", found[0] if found else "nothing")
    return Question("list", "list all ?", " , ".join(t.name for t in scene))


def _count(scene: Scene, colors: Counter[str], shapes: Counter[str], chance: random.Random) -> Question:
    what = chance.randrange(3)
    if what == 0:
        return Question("count", "how many shapes ?", NUMBERS[len(scene)])
    # Mostly of what is there, else nearly every answer were zero.
    there = chance.random() < 0.7
    if what == 1:
        color = chance.choice(scene).color if there else chance.choice(list(COLORS))
        return Question("count", f"how many {color} shapes ?", NUMBERS[colors[color]])
    shape = chance.choice(scene).shape if there else chance.choice(list(SHAPES))
    plural = f"{shape}es" if shape == "cross" else f"{shape}s"
    return Question("count", f"how many {plural} ?", NUMBERS[shapes[shape]])


def ask_some(scene: Scene, count: int, chance: random.Random) -> list[Question]:
    """``count`` questions about the scene, of kinds drawn at random."""
    found: list[Question] = []
    while len(found) < count:
        question = ask(scene, chance.choice(KINDS), chance)
        found += [question] if question else []
    return found


def heldout(count: int, seed: int = 1_000_003) -> tuple[torch.Tensor, list[Question]]:
    """Pictures float32 ``[N, 3, 48, 48]`` with one question each, of a seed that training does not use."""
    chance = random.Random(seed)
    scenes = [draw_scene(chance) for _ in range(count)]
    questions = [ask_some(scene, 1, chance)[0] for scene in scenes]
    return render(scenes, torch.Generator().manual_seed(seed)), questions


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with start, end, padding and the placeholder of a patch."""
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token=PAD))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
    )


def make_processor() -> LlavaProcessor:
    """Tokens and pictures as the model reads them, from texts such as ``<s> <image> where is the red circle ?``."""
    half = [0.5, 0.5, 0.5]
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=half, image_std=half
    )
    return LlavaProcessor(
        pictures,
        make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )


def encode(text: str) -> list[int]:
    """The tokens of words that are parted by single spaces."""
    return [_INDEX[word] for word in text.split()]


def prompt(question: str, patches: int = IMAGE_TOKENS) -> list[int]:
    """The tokens of start, picture and question."""
    return [_INDEX[START], *[_INDEX[IMAGE]] * patches, *encode(question)]


class Prior:
    """What answers a question best without its picture: the answer that it had most often."""

    def __init__(self) -> None:
        self.seen: dict[str, Counter[str]] = defaultdict(Counter)

    def observe(self, questions: list[Question]) -> None:
        """Count the answers."""
        for question in questions:
            self.seen[question.text][question.answer] += 1

    def answer(self, text: str) -> str:
        """The most frequent answer to exactly this question, the empty text when it is new."""
        return self.seen[text].most_common(1)[0][0] if text in self.seen else ""


_INDEX = {word: n for n, word in enumerate(WORDS)}
