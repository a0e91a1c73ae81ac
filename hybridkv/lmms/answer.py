"""From lmms-eval's chat messages and generation arguments to answers of an engine. Imports nothing of lmms-eval."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from PIL import Image

from hybridkv.engine import Engine, Stats
from hybridkv.model import InputError, Processor
from hybridkv.sampling import Sampling

MAX_NEW_TOKENS = 128  # where a task does not say


@dataclass(frozen=True)
class Generation:
    """How a task wants its answers: what of `generation_kwargs` has a meaning here.

    Attributes:
        until: an answer is cut before the first of these.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    sampling: Sampling = field(default_factory=Sampling)
    until: tuple[str, ...] = ()

    @classmethod
    def of(cls, kwargs: dict) -> "Generation":
        """
        Raises:
            InputError: several beams are asked for; answers would be others than the task means.
        """
        if (kwargs.get("num_beams") or 1) != 1:
            raise InputError("a task asks for beam search, which the engine has not: set num_beams=1 in --gen_kwargs")
        warm = (kwargs.get("temperature") or 0.0) if kwargs.get("do_sample", True) else 0.0
        until = kwargs.get("until") or ()
        top_p = kwargs.get("top_p")
        return cls(
            int(kwargs.get("max_new_tokens") or MAX_NEW_TOKENS),
            Sampling(float(warm), 1.0 if top_p is None else float(top_p)),
            (until,) if isinstance(until, str) else tuple(until),
        )

    def cut(self, text: str) -> str:
        """An answer without what comes after a stop text, and without space around it."""
        ends = [text.find(stop) for stop in self.until if stop and stop in text]
        return text[: min(ends)].strip() if ends else text.strip()


def our_messages(messages: Sequence[dict]) -> list[dict]:
    """lmms-eval's messages in the form that `Processor` takes.

    Its parts are {"type": "text", "text": ...} and {"type": "image" or "video", "url": a path or Pillow image}.

    Raises:
        InputError: a part is none of these, such as sound, or a clip's part with start and end.
    """
    ours = []
    for message in messages:
        parts = []
        for part in message["content"]:
            kind = part["type"]
            if kind == "text":
                parts.append({"type": "text", "text": part["text"]})
            elif kind in ("image", "video"):
                if any(part.get(key) is not None for key in ("start_time", "end_time")) or isinstance(
                    part["url"], dict
                ):
                    raise InputError("a task shows a part of a video, from a start to an end, which is not read here")
                parts.append({"type": kind, kind: part["url"]})
            else:
                raise InputError(f"a task gives {kind}, which the model can't take")
        ours.append({"role": message["role"], "content": parts})
    return ours


@dataclass
class Costs:
    """What answering took, summed over prompts; shares are of the full cache's bytes."""

    prompts: int = 0
    tokens: int = 0
    resident: int = 0
    step: int = 0
    full: int = 0

    def add(self, stats: Stats, prompts: int, tokens: int) -> None:
        """Counts one batch. (The reference for speed, `dense`, counts no bytes.)"""
        self.prompts += prompts
        self.tokens += tokens
        if counted := stats.bytes:
            self.resident += counted.resident
            self.step += counted.step
            self.full += counted.full

    def shares(self) -> dict[str, float]:
        """For lmms-eval's results, where `bench.leaderboard` looks for them."""
        if not self.full:
            return {}
        return {
            "resident_share": self.resident / self.full,
            "step_share": self.step / self.full,
            "resident_bytes": self.resident / self.prompts,
        }


def subject(messages: Sequence[dict]) -> bytes | None:
    """What a conversation is about: a digest of all up to its last picture or video; None without any."""
    parts = [(message["role"], part) for message in messages for part in message["content"]]
    last = max((i for i, (_, part) in enumerate(parts) if part["type"] != "text"), default=-1)
    digest = hashlib.sha256()
    for role, part in parts[: last + 1]:
        source = part.get("text", part.get("url"))
        if isinstance(source, Image.Image):
            digest.update(repr((source.mode, source.size)).encode() + source.tobytes())
        digest.update(repr((role, part["type"], source if isinstance(source, str) else "")).encode())
    return digest.digest() if last >= 0 else None


def batches(conversations: Iterable[Sequence[dict]], size: int) -> Iterator[tuple[bool, list[Sequence[dict]]]]:
    """Conversations in their order, `size` at a time, and whether they are all about one subject.

    Those that follow each other and have a subject in common stay together, so that it is read once.
    """
    alone: list[Sequence[dict]] = []
    for about, group in groupby(conversations, key=subject):
        group = list(group)
        if about is not None and len(group) > 1:
            if alone:
                yield False, alone
                alone = []
            yield True, group
            continue
        for one in group:
            alone.append(one)
            if len(alone) == size:
                yield False, alone
                alone = []
    if alone:
        yield False, alone


def answer(
    engine: Engine,
    processor: Processor,
    conversations: Iterable[Sequence[dict]],
    how: Generation,
    costs: Costs,
    size: int = 1,
    **look,
) -> Iterator[tuple[str, int]]:
    """Answers conversations in their order; questions about one picture that follow each other share a reading.

    Args:
        conversations: lmms-eval's messages, for each prompt.
        costs: what it took is added here.
        size: prompts that are answered together.
        look: how pictures and videos are read, for `Processor`: `fps`, `min_pixels`, `max_pixels`.

    Yields:
        for each its answer, and of how many tokens.
    """
    for together, group in batches(conversations, size):
        reading = None
        for first in range(0, len(group), size):
            prompts = [processor(our_messages(messages), **look) for messages in group[first : first + size]]
            if together:
                reading = reading or engine.read(prompts[0])
                results = engine.ask(reading, prompts, how.max_new_tokens, how.sampling)
            else:
                results = engine.generate(prompts, how.max_new_tokens, how.sampling)
            costs.add(engine.stats, len(prompts), sum(len(result.token_ids) for result in results))
            for result in results:
                yield how.cut(processor.decode(result.token_ids)), len(result.token_ids)
