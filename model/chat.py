"""From text to token ids: the checkpoint's chat template around it, and control tokens from the template alone.

A tokenizer matches its added tokens (`<|im_start|>`, `<tool_call>`) anywhere, so a document could open a turn of its
own. Here it knows them under secret names only: they are renamed in what the template writes, and what a user gives is
encoded as the text that it is, in one piece with the template's text around it.
"""

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from hybridkv.model.config import CheckpointError
from hybridkv.model.messages import Seen, Turn, Words
from hybridkv.model.pictures import InputError, reason

PAD = re.compile(r"<\|(image|video)_pad\|>")
PLACE = "<|vision_start|><|{}_pad|><|vision_end|>"  # where there is no chat template
UNSURE = 32  # characters at the end of a text whose tokens what follows may change


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids.

    Attributes:
        ids: (T,) int64.
        segment: (T,) int64, which of all texts a token lies in, counted through the turns; -1 for what the template
            wrote, and for a token of two texts.
        sure: tokens that stay what they are whatever follows a text, for each of them.
        last_turn: tokens that stay what they are whatever the last turn says; 0 if none is sure to.
    """

    ids: Tensor
    segment: Tensor
    sure: list[int]
    last_turn: int


class Chat:
    """A tokenizer with its chat template.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        added = backend.get_added_tokens_decoder()
        self.blank = {t.content: i for i, t in added.items() if t.content.isspace()}  # runs of spaces are text
        self.ids = {t.content: i for i, t in added.items() if t.content not in self.blank}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.secret = str(secrets.randbits(64))
        self.renamed = re.compile(rf"{self.secret}:(\d+)")

        self.encoder = Tokenizer(backend.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor"):
            if getattr(backend, part) is not None:
                setattr(self.encoder, part, getattr(backend, part))
        names = {i: t.content if t.content in self.blank else self._name(i) for i, t in added.items()}
        self.encoder.add_tokens(
            [
                AddedToken(names[i], lstrip=t.lstrip, rstrip=t.rstrip, normalized=t.normalized, special=t.special)
                for i, t in added.items()
            ]
        )

    def _name(self, token_id: int) -> str:
        return f"\ue000{self.secret}:{token_id}\ue001"

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        """Encodes a conversation whose last turn is the user's.

        Raises:
            InputError: the template changes the text or has no place for the pictures.
            CheckpointError: the template can't be used at all.
        """
        counts = iter([part.tokens for turn in turns for part in turn.parts if isinstance(part, Seen)])

        def as_read(shell: str) -> str:
            """Placeholders once for each visual token, control tokens under their secret names."""
            shell = PAD.sub(lambda m: m[0] * next(counts), shell)
            return self.control.sub(lambda m: self._name(self.ids[m[0]]), shell)

        shells, texts, (last_shell, offset) = self._render(turns)
        chat, places, segments, last_turn = "", [], [], 0
        for i, shell in enumerate(shells):
            if i == last_shell:
                chat, shell = chat + as_read(shell[:offset]), shell[offset:]
                last_turn = len(chat)
            chat += as_read(shell)
            if i < len(texts):
                segments += [(len(chat) + a, len(chat) + b) for a, b in texts[i].pieces]
                places.append((len(chat), len(chat) + len(texts[i].text)))
                chat += texts[i].text

        encoded = self.encoder.encode(chat, add_special_tokens=not self.tokenizer.chat_template)
        ids = [self._id(token, i) for token, i in zip(encoded.tokens, encoded.ids, strict=True)]
        ids = torch.tensor(ids, dtype=torch.int64)
        a, b = torch.tensor(encoded.offsets, dtype=torch.int64).view(-1, 2).unbind(1)
        segment = torch.full_like(ids, -1)
        for i, (start, end) in enumerate(segments):
            segment[(a >= start) & (b <= end) & (b > a)] = i
        control = self._refuse_control(chat, ids, encoded.offsets, places)

        def before(place: int) -> int:
            """Tokens before the first one that ends behind this place."""
            return int((b > place).int().argmax())

        sure = [before(end - UNSURE) for _, end in segments]
        n = before(last_turn)
        if not (n in control and int(a[n]) == last_turn):
            n = before(last_turn - UNSURE)
        return Encoded(ids, segment, sure, n if last_turn else 0)

    def _refuse_control(self, chat: str, ids: Tensor, offsets: list, places: list[tuple[int, int]]) -> set[int]:
        """Which of the tokens are control tokens; none may lie in the `places` of text."""
        contents = {i: content for content, i in self.ids.items()}
        control = {n for n, i in enumerate(ids.tolist()) if i in contents}
        for n in control:
            (a, b), content = offsets[n], contents[int(ids[n])]
            if chat[a:b] == content and any(start <= a and b <= end for start, end in places):
                raise InputError(f"the tokenizer takes {content} in the text for a control token: remove it")
        return control

    def _id(self, token: str, copied: int) -> int:
        """The checkpoint's id of a token of the copy; added tokens have other ids there."""
        found = self.renamed.search(token) if self.secret in token else None
        return int(found[1]) if found else self.blank.get(token, copied)

    def _render(self, turns: Sequence[Turn]) -> tuple[list[str], list["Run"], tuple[int, int]]:
        """What the template writes before, between and after the texts; the texts; and where the last turn begins.

        That is the number of one of the former, and a place in it.
        """
        kinds = [part.kind for turn in turns for part in turn.parts if isinstance(part, Seen)]
        runs = [run for turn in turns for run in text_runs(turn)]
        texts = ["".join(words.text for words in run) for run in runs]
        if not self.tokenizer.chat_template:
            if len(turns) > 1:
                raise InputError("this checkpoint has no chat template: it answers one question, no conversation")
            shells = [""]
            for part in contents(turns[0]):
                if isinstance(part, str):
                    shells.append("")
                else:
                    shells[-1] += PLACE.format(part["type"])
            return shells, [Run.of(run, text) for run, text in zip(runs, texts, strict=True)], (0, 0)
        places = [self._place(i) for i in range(len(texts))]
        shells, rest = self._shells(self._apply(turns, places), len(texts))
        if PAD.findall("".join(shells)) != kinds:
            raise InputError(f"the checkpoint's chat template has no place for {len(kinds)} pictures or videos")
        written = None if rest else between(self._apply(turns, texts), shells, texts)
        if written is None:
            raise InputError(
                "the checkpoint's chat template changes the context or the prompt instead of passing it on: "
                "use a checkpoint with another one (chat_template.jinja)"
            )
        return shells, [Run.of(*each) for each in zip(runs, written, strict=True)], self._last(turns, shells, places)

    def _place(self, i: int) -> str:
        """Stands for a text, so that nothing in it can pass for the template's."""
        return f"\ue000{self.secret}.{i}\ue001"

    def _shells(self, chat: str, n: int) -> tuple[list[str], bool]:
        """A rendered chat less the places of n texts; True beside it if some are missing, or not in order."""
        found = re.split(rf"\ue000{self.secret}\.(\d+)\ue001", chat)
        return found[::2], found[1::2] != [str(i) for i in range(n)]

    def _last(self, turns: Sequence[Turn], shells: list[str], places: list[str]) -> tuple[int, int]:
        """Where the last turn begins, if the template only adds it to those before; the start of it all if not."""
        if len(turns) == 1:
            return 0, 0
        try:
            before, _ = self._shells(self._apply(turns[:-1], places, going_on=False), 0)
        except CheckpointError:  # a template that wants the user to have the last word, or the first
            return 0, 0
        n = len(before) - 1
        continues = before[:n] == shells[:n] and shells[n].startswith(before[n])
        return (n, len(before[n])) if continues else (0, 0)

    def _apply(self, turns: Sequence[Turn], texts: Sequence[str], going_on: bool = True) -> str:
        """The chat as the template writes it, with these texts."""
        texts, messages = iter(texts), []
        for turn in turns:
            content = [next(texts, "") if isinstance(part, str) else part for part in contents(turn)]
            if all(isinstance(part, str) for part in content):
                content = "".join(content)
            else:
                content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
            messages.append({"role": turn.role, "content": content})
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=going_on)
        except Exception as e:  # a template is a programme: it can raise anything
            raise CheckpointError(f"the checkpoint's chat template can't be used: {reason(e)}") from e


@dataclass(frozen=True)
class Run:
    """Texts of a turn with nothing between them, as the template passes them on.

    Attributes:
        pieces: where each of them lies in `text`.
    """

    text: str
    pieces: list[tuple[int, int]]

    @classmethod
    def of(cls, words: Sequence[Words], written: str) -> "Run":
        text, pieces = "".join(each.text for each in words), []
        at = 0 if text.startswith(written) else len(text.lstrip()) - len(text)  # what was trimmed in front
        for each in words:
            pieces.append((max(0, at), max(0, min(at + len(each.text), len(written)))))
            at += len(each.text)
        return cls(written, pieces)


def text_runs(turn: Turn) -> list[list[Words]]:
    """The texts of a turn, those with nothing between them together."""
    groups = groupby(turn.parts, key=lambda part: isinstance(part, Words))
    return [list(parts) for are_words, parts in groups if are_words]


def contents(turn: Turn) -> list[str | dict]:
    """A turn's parts for a template: "" for each run of text, and what kind of picture."""
    groups = groupby(turn.parts, key=lambda part: isinstance(part, Words))
    return [part for words, parts in groups for part in ([""] if words else [{"type": p.kind} for p in parts])]


def between(chat: str, shells: list[str], texts: list[str]) -> list[str] | None:
    """The texts as they lie between the shells. Spaces around one may go, as many templates trim; nothing else may."""
    if not chat.startswith(shells[0]):
        return None
    at, written = len(shells[0]), []
    for text, shell in zip(texts, shells[1:], strict=True):
        ways = (text, text.rstrip(), text.lstrip(), text.strip())
        found = next((way for way in ways if chat.startswith(way + shell, at)), None)
        if found is None:
            return None
        written.append(found)
        at += len(found) + len(shell)
    return written if at == len(chat) else None
