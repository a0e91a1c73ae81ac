"""A conversation about pictures, videos and long texts, each of which is read once.

    talk = Conversation(engine, processor)
    talk.show(images=["street.jpg"])
    for piece in talk.stream("What does the sign say?"): print(piece, end="")

What was said is text, and read again with each question, until there is enough of it to join the reading.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from hybridkv.engine import Engine
from hybridkv.model import InputError, Processor, Prompt
from hybridkv.reading import Question, Reading
from hybridkv.sampling import Sampling

JOIN = 512  # tokens of earlier turns: from then on they join the reading
ANYTHING = "?"  # stands for the question, which makes no difference to what is read before it


class Conversation:
    """Turns with one engine.

    Args:
        engine: answers; another one of the same model may take its place between two questions.
        system: the system prompt; "" leaves it to the checkpoint's template.
        look: how pictures and videos are looked at: `fps`, `min_pixels`, `max_pixels` of `Processor`.
        join: tokens of earlier turns from which on they join the reading.
        int8: what is read is kept in a byte a number, see `Engine.read`.
        apart: each question is asked as if it were the first: what was said is forgotten, what was shown is not.

    Attributes:
        messages: all that was shown and said, pictures by their size alone.
        reading: what of it was read once; None if nothing was.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        system: str = "",
        look: dict | None = None,
        join: int = JOIN,
        apart: bool = False,
        int8: bool = False,
    ):
        self.engine, self.processor, self.look, self.join = engine, processor, look or {}, join
        self.apart, self.int8 = apart, int8
        self.system = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system prompt."""
        self.messages: list[dict] = list(self.system)
        self.reading: Reading | None = None

    @property
    def read_tokens(self) -> int:
        return self.reading.tokens if self.reading else 0

    def show(
        self,
        images: list = (),
        videos: list = (),
        context: str = "",
        on_layer: Callable[[], None] | None = None,
    ) -> None:
        """Reads pictures, videos or a text, for the questions that follow.

        Raises:
            InputError: something can't be read, or is too long; the conversation is as it was.
        """
        prompt = self.processor(ANYTHING, images, videos, context, after=self.messages, **self.look)
        self._check_length(prompt, 1)
        if prompt.heavy > self.read_tokens:  # a short text is no longer than what is read again anyway
            self.reading = self.engine.read(prompt, self.reading, on_layer=on_layer, int8=self.int8)
        self.messages = prompt.subject

    def stream(
        self,
        question: str,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        on_layer: Callable[[], None] | None = None,
    ) -> Iterator[str]:
        """Answers piece by piece. What was answered is part of the conversation even if nobody waits for the end.

        Raises:
            ValueError: the question can't be read or answered; the conversation is as it was.
        """
        prompt = self.processor(question, after=self.messages)
        self._check_length(prompt, max_new_tokens)
        if prompt.settled - self.read_tokens >= self.join:
            self.reading = self.engine.read(prompt, self.reading, prompt.settled, int8=self.int8)
        given = Question(prompt, self.reading) if self.reading else prompt
        token_ids, text, shown = [], "", 0
        try:
            for (token,) in self.engine.stream([given], max_new_tokens, sampling, on_layer):
                if token not in self.engine.eos:
                    token_ids.append(token)
                text = self.processor.decode(token_ids)
                whole = text.rstrip("\ufffd")  # what an unfinished character decodes to
                if len(whole) > shown:
                    yield whole[shown:]
                    shown = len(whole)
            if len(text) > shown:
                yield text[shown:]
        finally:
            if token_ids and not self.apart:
                self.messages = [*prompt.messages, {"role": "assistant", "content": text}]

    def _check_length(self, prompt: Prompt, new_tokens: int) -> None:
        tokens, limit = len(prompt.input_ids), self.processor.cfg.max_position_embeddings
        if tokens + new_tokens > limit:
            raise InputError(
                f"the conversation would have {tokens} tokens, and with {new_tokens} new ones that is more than the "
                f"model's {limit}: begin anew, or with less"
            )

    def save(self, path: str | Path) -> None:
        """Writes the reading with all that was said, for `load`.

        Raises:
            ValueError: nothing was read.
            OSError: it can't be written.
        """
        if not self.reading:
            raise InputError("nothing was read yet: there is nothing to save but text")
        replace(self.reading, messages=self.messages).save(path)

    def load(self, path: str | Path) -> None:
        """Goes on from what was saved.

        Raises:
            ValueError: it is no reading, or another model's, or says not what it is of.
            OSError: it can't be read.
        """
        reading = Reading.load(path, self.engine.fingerprint)
        if not reading.messages:
            raise InputError(f"{path} does not say which messages it is of: it can't be gone on from")
        self.messages, self.reading = reading.messages, reading
