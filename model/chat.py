"""From text to token ids: the checkpoint's chat template around it, and control tokens from the template alone.

A tokenizer matches its added tokens (`<|im_start|>`, `<tool_call>`) anywhere, so a document could open a turn of its
own. Here it knows them under secret names only: they are renamed in what the template writes, and what a user gives is
encoded as the text that it is, in one piece with the template's text around it.
"""

import re
import secrets
from collections.abc import Sequence

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from hybridkv.model.config import CheckpointError
from hybridkv.model.pictures import InputError, reason

PAD = re.compile(r"<\|(image|video)_pad\|>")
PLACE = "<|vision_start|><|{}_pad|><|vision_end|>"  # where there is no chat template


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

    def encode(self, context: str, question: str, visual: Sequence[tuple[str, int]] = ()) -> tuple[Tensor, Tensor]:
        """Encodes one user turn: pictures and videos, then the context, then the question.

        Args:
            context: may be empty.
            visual: "image" or "video" and its number of tokens, for each, in order.

        Returns:
            ids: (T,) int64.
            in_context: (T,) bool, the tokens that lie in the context.

        Raises:
            InputError: the template changes the text or has no place for the pictures.
            CheckpointError: the template can't be used at all.
        """
        body = f"{context}\n\n{question}" if context else question
        before, body, after = self._render(body, [kind for kind, _ in visual])
        counts = iter([n for _, n in visual])
        before, after = (PAD.sub(lambda m: m[0] * next(counts), part) for part in (before, after))
        before, after = (self.control.sub(lambda m: self._name(self.ids[m[0]]), part) for part in (before, after))

        text = before + body + after
        encoded = self.encoder.encode(text, add_special_tokens=not self.tokenizer.chat_template)
        ids = [self._id(token, i) for token, i in zip(encoded.tokens, encoded.ids, strict=True)]
        start, end = len(text) - len(after) - len(body.lstrip()), len(text) - len(after)
        contents = {i: content for content, i in self.ids.items()}
        for i, (a, b) in zip(ids, encoded.offsets, strict=True):
            if i in contents and start <= a and b <= end and text[a:b] == contents[i]:
                raise InputError(f"the tokenizer takes {contents[i]} in the text for a control token: remove it")
        a, b = torch.tensor(encoded.offsets).view(-1, 2).unbind(1)
        in_context = (a >= start) & (b <= start + len(context)) & (b > a)
        return torch.tensor(ids, dtype=torch.int64), in_context

    def _id(self, token: str, copied: int) -> int:
        """The checkpoint's id of a token of the copy; added tokens have other ids there."""
        found = self.renamed.search(token) if self.secret in token else None
        return int(found[1]) if found else self.blank.get(token, copied)

    def _render(self, body: str, kinds: list[str]) -> tuple[str, str, str]:
        """What the template writes before the text, the text, and what it writes after it."""
        if not self.tokenizer.chat_template:
            return "".join(PLACE.format(kind) for kind in kinds), body, ""
        place = f"\ue000{self.secret}\ue001"  # stands for the text, so that nothing in it can pass for the template's
        shell = self._apply(place, kinds)
        if PAD.findall(shell) != kinds:
            raise InputError(f"the checkpoint's chat template has no place for {len(kinds)} pictures or videos")
        before, found, after = shell.partition(place)
        whole = self._apply(body, kinds)
        middle = whole[len(before) : len(whole) - len(after)]
        # Spaces around it may go: many templates trim. Nothing else may.
        if not found or whole != before + middle + after or middle.strip() != body.strip():
            raise InputError(
                "the checkpoint's chat template changes the context or the prompt instead of passing it on: "
                "use a checkpoint with another one (chat_template.jinja)"
            )
        return before, middle, after

    def _apply(self, body: str, kinds: list[str]) -> str:
        content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": body}] if kinds else body
        try:
            return self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        except Exception as e:  # a template is a programme: it can raise anything
            raise CheckpointError(f"the checkpoint's chat template can't be used: {reason(e)}") from e
