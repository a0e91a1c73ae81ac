"""Questions with checkable answers: boards for the demo model, long text for language models. All drawn from seeds."""

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image

from demo import boards as bd
from hybridkv.model import Processor, Prompt


@dataclass(frozen=True)
class Case:
    """One prompt and how its answer is judged.

    Attributes:
        right: says whether a generated text is right; None where only the divergence from the full cache counts.
        limit: new tokens.
        then: a second turn, fed token by token after the prompt's cache was compressed.
    """

    prompt: Prompt
    right: Callable[[str], bool] | None
    limit: int
    then: list[int] = field(default_factory=list)


# ---- boards ---------------------------------------------------------------------------------------------------------


def board_case(processor: Processor, task: str, tokens: int, index: int, split: str = "test") -> Case:
    """A square board of `tokens` cells, or two halves of one.

    Raises:
        ValueError: no such board.
    """
    if math.isqrt(tokens) ** 2 != tokens or tokens % 2 or tokens < 16:
        raise ValueError(f"boards are even squares of 16 cells or more, got {tokens} tokens: try 64, 256, 1024")
    side, paired = math.isqrt(tokens), task in ("compare", "changed")
    rng = bd.rng_for(split, 10_000 * tokens + 100_000_000 * bd.TASKS.index(task) + index)
    several = paired or task == "which"
    boards = bd.make_boards(rng, 1 + several, side, side // (1 + several), compare=paired)
    question = bd.ask(rng, boards, task)
    images = [Image.fromarray(bd.draw(rng, board)) for board in boards]
    answer = question.answer
    return Case(processor(question.text, images=images), lambda text: text.strip() == answer, len(answer.split()) + 2)


# ---- text -----------------------------------------------------------------------------------------------------------

# fmt: off
PLACES = [
    "lighthouse", "harbour", "market", "bakery", "library", "station", "bridge", "museum", "garden",
    "castle", "mill", "tower", "chapel", "school",
]
ITEMS = [
    "rope", "lamps", "timber", "wool", "salt", "herring", "barrels", "slates", "candles", "bricks",
    "coal", "honey", "apples", "linen", "nails", "glass",
]
PEOPLE = [
    "Aldous", "Berta", "Cyril", "Dora", "Edmund", "Flora", "Gilbert", "Hanna", "Ivo", "Judith",
    "Klaas", "Linnea", "Magnus", "Nora", "Oswin", "Petra",
]
VERBS = [
    "delivered", "counted", "repaired", "bought", "sold", "inspected", "painted", "moved", "stored",
    "weighed",
]
# fmt: on


def filler(rng: random.Random, n: int) -> list[str]:
    """Lines of a day book that answer no question."""
    return [
        f"{rng.choice(PEOPLE)} {rng.choice(VERBS)} {rng.randint(2, 90)} {rng.choice(ITEMS)} "
        f"at the {rng.choice(PLACES)}."
        for _ in range(n)
    ]


def spread(rng: random.Random, lines: list[str], facts: list[str]) -> str:
    """The facts at random places among the lines."""
    for fact in facts:
        lines.insert(rng.randint(1, len(lines) - 1), fact)
    return "\n".join(lines)


def code(rng: random.Random) -> str:
    return str(rng.randint(10_000, 99_999))


def needle(rng: random.Random, lines: list[str]) -> tuple[str, str, list[str]]:
    place, secret = rng.choice(PLACES), code(rng)
    text = spread(rng, lines, [f"The secret number of the {place} is {secret}."])
    return text, f"What is the secret number of the {place}? Answer with one sentence.", [secret]


def needles(rng: random.Random, lines: list[str]) -> tuple[str, str, list[str]]:
    places, secrets = rng.sample(PLACES, 4), [code(rng) for _ in range(4)]
    text = spread(rng, lines, [f"The secret number of the {p} is {s}." for p, s in zip(places, secrets, strict=True)])
    asked = f"the {places[0]}, the {places[1]}, the {places[2]} and the {places[3]}"
    return text, f"What are the secret numbers of {asked}? List all four.", secrets


def links(rng: random.Random, lines: list[str]) -> tuple[str, str, list[str]]:
    path = rng.sample(PLACES, 4)
    facts = [f"From the {a} the letter went to the {b}." for a, b in itertools.pairwise(path)]
    text = spread(rng, lines, facts)
    question = f"Follow the letter: it starts at the {path[0]}. Name each place it went to next, in order."
    return text, question, path[1:]


def copy(rng: random.Random, lines: list[str]) -> tuple[str, str, list[str]]:
    passage = [f"{rng.choice(PEOPLE)} wrote: {' '.join(rng.sample(ITEMS, 6))}." for _ in range(2)]
    start = rng.randint(1, len(lines) - 1)
    lines[start:start] = ["Begin of the letter.", *passage, "End of the letter."]
    question = "Copy the two lines between 'Begin of the letter.' and 'End of the letter.' word for word."
    return "\n".join(lines), question, passage


def prose(rng: random.Random, lines: list[str]) -> tuple[str, str, list[str]]:
    return "\n".join(lines), "Continue this day book with five more lines in the same style.", []


def program(rng: random.Random, lines: list[str]) -> tuple[str, str, list[str]]:
    body = []
    for i, line in enumerate(lines):
        name = f"{rng.choice(VERBS)}_{rng.choice(ITEMS)}_{i}"
        body.append(
            f"def {name}(stock, n={rng.randint(1, 99)}):\n    # {line}\n    return stock.get({name!r}, 0) + n\n"
        )
    return "\n".join(body), "Write the next function of this file, in the same style.", []


TEXT = {"needle": needle, "needles": needles, "links": links, "copy": copy, "prose": prose, "program": program}
TEXT_TASKS = (*TEXT, "second")
"""needle   one fact          needles  four facts in one answer          links    each step names the next
copy     two lines, word for word       prose, program  continue; judged by divergence only
second   another fact, asked for after the cache was compressed for the first"""

FOLLOW_UP = "<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def text_case(processor: Processor, task: str, tokens: int, index: int) -> Case:
    """A context of about `tokens` tokens and a question about it."""
    rng = random.Random(f"{task}/{tokens}/{index}")
    per_line = len(processor.tokenizer("\n".join(filler(random.Random(0), 100)))["input_ids"]) / 100
    n = max(4, int(tokens / per_line / (4 if task == "program" else 1)))
    lines, then = filler(rng, n), []
    text, question, parts = (needle if task == "second" else TEXT[task])(rng, lines)
    if task == "second":
        place, secret = rng.choice([p for p in PLACES if p not in question]), code(rng)
        text = spread(rng, text.split("\n"), [f"The secret number of the {place} is {secret}."])
        asked = f"What is the secret number of the {place}? Answer with one sentence."
        then = processor.tokenizer(parts[0] + FOLLOW_UP.format(question=asked), add_special_tokens=False)["input_ids"]
        parts = [secret]
    prompt = processor(question, context=text)
    if not parts:
        return Case(prompt, None, 48)
    return Case(prompt, lambda answer: _in_order(answer, parts), 24 + 16 * len(parts), then)


def _in_order(text: str, parts: list[str]) -> bool:
    at = 0
    for part in parts:
        at = text.find(part, at) + 1
        if not at:
            return False
    return True


def make_case(processor: Processor, task: str, tokens: int, index: int) -> Case:
    """Sample `index` of a task at a size; the same at every run."""
    if task in bd.TASKS:
        return board_case(processor, task, tokens, index)
    return text_case(processor, task, tokens, index)
