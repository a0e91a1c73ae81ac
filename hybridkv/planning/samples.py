"""Samples that mean something to any model: what the built-in calibration reads.

Passages of text with facts, repetitions and questions, and pictures of rendered words and numbers with questions about
them. Each comes with its right answer, which is followed token by token: what a model would have written itself matters
less than where it looks while it is told. All are drawn from seeds, the same at every run.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

TOKENS = 1000  # of a sample's context, about
SIDE, ROWS, COLUMNS = 896, 16, 2  # pixels of a picture, 1,024 tokens of Qwen2.5-VL, and its entries

# fmt: off
NAMES = ["Anna", "Boris", "Clara", "David", "Elena", "Frank", "Greta", "Henry", "Irene", "James", "Karin", "Louis",
         "Maria", "Nelson", "Olga", "Peter", "Rosa", "Simon", "Teresa", "Victor"]
TOWNS = ["Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Athens", "Dublin", "Oslo", "Lisbon", "Prague",
         "Moscow", "Cairo", "Tokyo", "Delhi", "Boston", "Chicago", "Toronto", "Sydney", "Lima"]
THINGS = ["apple", "bread", "chair", "clock", "coffee", "flower", "garden", "hammer", "horse", "island", "jacket",
          "kitchen", "ladder", "lemon", "letter", "mirror", "mountain", "needle", "orange", "paper", "piano", "pocket",
          "river", "silver", "spoon", "summer", "table", "ticket", "tiger", "train", "violin", "water", "window",
          "winter", "wood", "yellow"]
# fmt: on


@dataclass(frozen=True)
class Sample:
    """One prompt and its right answer.

    Attributes:
        line: draws one line of a context of `TOKENS` tokens; None for a sample with a picture.
        question, answer: of the lines, or entries of the picture, that were drawn.
    """

    name: str
    line: Callable[[random.Random, int], str] | None
    ask: Callable[[random.Random, list[str]], tuple[str, str]]


def ledger(rng: random.Random, n: int) -> str:
    return f"{rng.choice(NAMES)} sent {rng.randint(100, 999)} {rng.choice(THINGS)}s from {rng.choice(TOWNS)}."


def register(rng: random.Random, n: int) -> str:
    return f"{rng.choice(THINGS)}-{n}: {rng.randint(1000, 9999)}"


def journey(rng: random.Random, n: int) -> str:
    return f"After stop {n} comes the town of {rng.choice(TOWNS)}, where {rng.choice(NAMES)} lives."


def code(rng: random.Random, n: int) -> str:
    thing = rng.choice(THINGS)
    return f"def count_{thing}_{n}(x):\n    return x.{thing} * {rng.randint(10, 99)}\n"


def some(rng: random.Random, lines: list[str], n: int) -> list[str]:
    """A few lines that differ, in random order, from the middle of the context."""
    middle = sorted(set(lines[len(lines) // 8 : -len(lines) // 8]))
    return rng.sample(middle, n)


def ask_copy(rng: random.Random, lines: list[str]) -> tuple[str, str]:
    at = rng.randint(len(lines) // 4, len(lines) // 2)
    first = " ".join(lines[at].split()[:4])
    return f'Repeat the text from "{first}" on, word for word.', "\n".join(lines[at : at + 4])


def ask_numbers(rng: random.Random, lines: list[str]) -> tuple[str, str]:
    asked = [line.split(": ") for line in some(rng, lines, 3)]
    return f"Give the numbers of {', '.join(key for key, _ in asked)}.", "\n".join(": ".join(pair) for pair in asked)


def ask_journey(rng: random.Random, lines: list[str]) -> tuple[str, str]:
    asked = some(rng, lines, 3)
    stops = [line.split(" comes")[0].removeprefix("After ") for line in asked]
    return f"What comes after {', after '.join(stops)}? Quote the sentences.", "\n".join(asked)


def ask_code(rng: random.Random, lines: list[str]) -> tuple[str, str]:
    asked = some(rng, lines, 2)
    names = [line.split("(")[0].removeprefix("def ") for line in asked]
    return f"Write {' and '.join(names)} again, as they are above.", "\n".join(asked)


def ask_page(rng: random.Random, entries: list[str]) -> tuple[str, str]:
    asked = [entry.split() for entry in some(rng, entries, 3)]
    return f"Which numbers stand beside {', '.join(word for word, _ in asked)}?", "\n".join(map(" ".join, asked))


def ask_column(rng: random.Random, entries: list[str]) -> tuple[str, str]:
    at = rng.randint(2, 6)
    column = entries[:ROWS]
    return f"Read the left column downwards, from {column[at].split()[0]} on.", "\n".join(column[at : at + 4])


TEXTS = [
    Sample("copy", ledger, ask_copy),
    Sample("numbers", register, ask_numbers),
    Sample("journey", journey, ask_journey),
    Sample("code", code, ask_code),
]
PICTURES = [Sample("page", None, ask_page), Sample("column", None, ask_column)]


def draw_page(rng: random.Random) -> tuple[Image.Image, list[str]]:
    """A page of words with a number each, in columns, and its entries, column by column."""
    words = rng.sample(THINGS, ROWS * COLUMNS)
    entries = [f"{word} {rng.randint(100, 999)}" for word in words]
    page = Image.new("RGB", (SIDE, SIDE), "white")
    pen, height = ImageDraw.Draw(page), SIDE // ROWS
    font = ImageFont.load_default(height * 0.6)
    for i, entry in enumerate(entries):
        pen.text((SIDE // COLUMNS * (i // ROWS) + 20, height * (i % ROWS) + 8), entry, fill="black", font=font)
    return page, entries


def make(sample: Sample, processor) -> tuple[object, list[int]]:
    """A sample's prompt and the tokens of its answer, by a model's processor.

    Raises:
        ValueError: this model can't be asked this.
    """
    rng = random.Random(sample.name)
    tokens = processor.tokenizer
    if sample.line is None:
        picture, entries = draw_page(rng)
        question, answer = sample.ask(rng, entries)
        prompt = processor(question, images=[picture])
    else:
        tried = "\n".join(sample.line(rng, n) for n in range(50))
        count = max(16, int(50 * TOKENS / len(tokens(tried)["input_ids"])))
        lines = [sample.line(rng, n) for n in range(count)]
        question, answer = sample.ask(rng, lines)
        prompt = processor(question, context="\n".join(lines))
    return prompt, tokens(answer, add_special_tokens=False)["input_ids"]
