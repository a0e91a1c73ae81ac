"""Chat messages as the Hugging Face world writes them, checked, and put in the order in which they are read.

    [{"role": "system", "content": "Be brief."},
     {"role": "user", "content": [{"type": "image", "image": "street.jpg"}, {"type": "text", "text": "What is it?"}]},
     {"role": "assistant", "content": "A street."},
     {"role": "user", "content": "And on the left?"}]

Beyond that form, a text part may be marked `"context": True`: a long text to ask about, which a cache may prune. And a
picture that was looked at before may be given by its size alone, `{"type": "image", "grid": [1, 64, 64]}` (for a video
with its `"seconds"` between two time steps), where a reading holds what the model made of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from hybridkv.model.pictures import InputError

ROLES = ("system", "user", "assistant")
SOURCES = ("path", "url")  # other names under which a picture's or video's source is given


@dataclass(frozen=True)
class Words:
    """Text of a message. `context` is a long one to ask about."""

    text: str
    context: bool = False


@dataclass(frozen=True)
class Seen:
    """A picture or video of a message.

    Attributes:
        kind: "image" or "video".
        grid: (t, h, w) in patches.
        tokens: visual tokens.
        seconds: between two time steps; 0 for images.
        patches: (N, patch_dim), or None where only its size is known.
    """

    kind: str
    grid: tuple[int, int, int]
    tokens: int
    seconds: float = 0.0
    patches: Tensor | None = None


@dataclass(frozen=True)
class Turn:
    """One message."""

    role: str
    parts: tuple[Words | Seen, ...]


Look = Callable[[str, dict, str], Seen]  # kind, the part, and its name in errors


def read_messages(messages: Sequence[dict], look: Look) -> list[Turn]:
    """Checks messages, and looks at their pictures and videos.

    Raises:
        InputError: they are no messages, or a picture can't be read; the message and part are named.
    """
    if not messages:
        raise InputError("there are no messages: give at least one of the user's")
    turns = [_turn(message, f"messages[{i}]", look) for i, message in enumerate(messages)]
    if turns[-1].role != "user":
        raise InputError("the last of the messages must be the user's")
    if any(turn.role == "system" for turn in turns[1:]):
        raise InputError("only the first of the messages can be the system's")
    if not any(isinstance(part, Words) and not part.context and part.text.strip() for part in turns[-1].parts):
        raise InputError("the last of the messages holds no question: its text is empty")
    return turns


def _turn(message: dict, name: str, look: Look) -> Turn:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise InputError(f'{name} must be a dict with "role" and "content", got {_short(message)}')
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise InputError(f"{name} has the role {_short(role)}, it must be one of {', '.join(ROLES)}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise InputError(f"the content of {name} must be text or a list of parts, not {type(content).__name__}")
    return Turn(role, tuple(_part(part, f"{name}.content[{i}]", look) for i, part in enumerate(content)))


def _part(part: dict, name: str, look: Look) -> Words | Seen:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("image", "video"):
        return look(kind, part, name)
    if kind != "text" or "text" not in part:
        raise InputError(f'{name} must be a dict whose "type" is text (with "text"), image or video: {_short(part)}')
    check_text(part["text"], name, empty=True)
    return Words(part["text"], bool(part.get("context", False)))


def source_of(part: dict, kind: str) -> object | None:
    """Where a part's picture or video comes from; None if it does not say."""
    return next((part[key] for key in (kind, *SOURCES) if part.get(key) is not None), None)


def check_text(text: str, what: str, empty: bool = False) -> None:
    """Refuses what is no text, or holds none unless it may be `empty`."""
    if not isinstance(text, str):
        raise InputError(f"the {what} must be text (str), not {type(text).__name__}")
    if not empty and not text.strip():
        raise InputError(f"the {what} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(
            f"the {what} holds half of a surrogate pair at character {e.start}, which is no text: decode it again"
        ) from e


def one_turn(images: int, videos: int, context: str, question: str, after: Sequence[dict] = ()) -> list[dict]:
    """A question as a message: pictures and videos, whose sources are given apart, then the context, then the question.

    After a context, in it or at the end of the messages that it goes on from, the question is a paragraph of its own.
    """
    parts = [{"type": "image"} for _ in range(images)] + [{"type": "video"} for _ in range(videos)]
    if context:
        parts.append({"type": "text", "text": context.strip(), "context": True})
    before = parts or (parts_of(after[-1].get("content", "")) if after and isinstance(after[-1], dict) else [])
    apart = bool(before) and isinstance(before[-1], dict) and before[-1].get("context", False)
    return [{"role": "user", "content": [*parts, {"type": "text", "text": f"\n\n{question}" if apart else question}]}]


def going_on(messages: Sequence[dict], more: Sequence[dict]) -> list[dict]:
    """Messages and what comes after them; where the same speaker goes on, in the same turn."""
    messages, more = list(messages), list(more)
    if not messages or not more or not all(isinstance(m, dict) for m in (messages[-1], more[0])):
        return messages + more
    last, first = messages[-1], more[0]
    if last.get("role") != first.get("role"):
        return messages + more
    return [
        *messages[:-1],
        last | {"content": parts_of(last.get("content")) + parts_of(first.get("content"))},
        *more[1:],
    ]


def parts_of(content: str | Sequence[dict]) -> list[dict]:
    """A message's content as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())


def without_pixels(turns: Sequence[Turn]) -> list[dict]:
    """The same as messages that hold no pixels but the pictures' sizes: what JSON can write."""

    def part(p: Words | Seen) -> dict:
        if isinstance(p, Words):
            return {"type": "text", "text": p.text} | ({"context": True} if p.context else {})
        return {"type": p.kind, "grid": list(p.grid)} | ({"seconds": p.seconds} if p.kind == "video" else {})

    return [{"role": turn.role, "content": [part(p) for p in turn.parts]} for turn in turns]


def heavy_part(turns: Sequence[Turn]) -> list[Turn]:
    """The messages up to and including the last picture, video or context; empty if there is none."""
    for i in range(len(turns) - 1, -1, -1):
        for j in range(len(turns[i].parts) - 1, -1, -1):
            part = turns[i].parts[j]
            if isinstance(part, Seen) or part.context:
                return [*turns[:i], Turn(turns[i].role, turns[i].parts[: j + 1])]
    return []


def _short(value: object) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) <= 80 else shown[:77] + "..."
