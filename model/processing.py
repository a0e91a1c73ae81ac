"""From text, pictures and video to what the model reads: token ids, normalised patches, grids, and the prunable mask.

Tokenizer, chat template and image processor are those of the checkpoint, through transformers (the Pillow-backed
image processor, so torchvision is not needed).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from hybridkv.model.chat import Chat, Encoded
from hybridkv.model.checkpoint import resolve
from hybridkv.model.config import CheckpointError, Config, load_config, read_json
from hybridkv.model.messages import (
    Seen,
    Turn,
    Words,
    check_text,
    going_on,
    heavy_part,
    one_turn,
    read_messages,
    source_of,
    without_pixels,
)
from hybridkv.model.patches import Patcher, check_pixels
from hybridkv.model.pictures import InputError, Picture, open_image, reason
from hybridkv.model.video import check_fps, read_video

Video = str | Path | Sequence[Picture]


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for `Model.prefill`.

    Attributes:
        input_ids: (T,) int64, placeholders expanded to one per visual token.
        prunable: (T,) bool, the tokens that a cache may drop or move: visual tokens, long contexts and what was said
            in earlier turns, never the system prompt, the last question or the chat template.
        visual_tokens: how many of the T tokens come from pictures and video.
        patches: (N, patch_dim) float32 of all pictures and videos, in order; None without any.
        grids: (t, h, w) in patches of each of them.
        seconds_per_grid: seconds between two time steps of each; 0 for images.
        spans: their tokens in the prompt: the first one's place, then time, height and width in tokens.
        heavy: tokens at the start that are read once for many questions: all up to the last picture, video or context.
            They are the same whatever is asked then. 0 without any.
        settled: tokens before the last turn, the same whatever it says; 0 if there is none.
        later: (T,) bool, what will be prunable once another turn follows.
        messages: the prompt's, pictures by their size alone.
        subject: of these, what is up to the last picture, video or context.
    """

    input_ids: Tensor
    prunable: Tensor
    visual_tokens: int
    patches: Tensor | None
    grids: list[tuple[int, int, int]]
    seconds_per_grid: list[float]
    spans: list[tuple[int, int, int, int]] = field(default_factory=list)
    heavy: int = 0
    settled: int = 0
    later: Tensor | None = None
    messages: list[dict] = field(default_factory=list)
    subject: list[dict] = field(default_factory=list)


class Processor:
    """Prepares prompts for one checkpoint.

    >>> processor = Processor.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")
    >>> prompt = processor("What does the sign say?", images=["street.jpg"])
    """

    def __init__(self, tokenizer, image_processor, cfg: Config):
        self.tokenizer = tokenizer
        self.chat = Chat(tokenizer)
        self.patcher = Patcher(image_processor, cfg.vision) if cfg.vision else None
        self.cfg = cfg

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "Processor":
        """The tokenizer and image processor in a checkpoint folder or on the Hub.

        Raises:
            CheckpointError: something is missing, damaged, or does not fit the rest.
        """
        from transformers import AutoTokenizer
        from transformers.utils import logging

        folder = resolve(name)
        cfg = load_config(folder)
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # its advice is about classes that are not used here
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            image_processor = None
            if cfg.vision:
                from transformers import Qwen2VLImageProcessorPil

                image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        except Exception as e:  # damaged files: the tokenizers library raises plain Exception
            raise CheckpointError(f"{folder}: tokenizer or image processor can't be loaded: {reason(e)}") from e
        finally:
            logging.set_verbosity(level)
        if not tokenizer.chat_template and (folder / "chat_template.json").is_file():  # older processors keep it apart
            tokenizer.chat_template = read_json(folder / "chat_template.json").get("chat_template")
        if not tokenizer.is_fast:
            raise CheckpointError(f"{folder} has no fast tokenizer (tokenizer.json)")
        return cls(tokenizer, image_processor, cfg)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def __call__(
        self,
        text: str | Sequence[dict],
        images: Picture | Sequence[Picture] = (),
        videos: str | Path | Sequence[Video] = (),
        context: str = "",
        fps: float = 2.0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        system: str = "",
        after: Sequence[dict] = (),
    ) -> Prompt:
        """Makes a prompt of a question, or of chat messages.

        A question goes into one user turn: the pictures and videos, then the context, then the question. Control
        tokens such as `<|im_end|>` and placeholders such as `<|image_pad|>` in any text are read as the text that they
        are.

        Args:
            text: the question, always kept in the cache; or messages as in `messages.py`, whose pictures are paths or
                Pillow images, or come from `images` and `videos` in order.
            images: paths or Pillow images, or a single one.
            videos: paths (needs PyAV), or lists of frames taken `fps` times a second; or a single path.
            context: long text to ask about; prunable, like visual tokens. Space around it goes.
            fps: frames a second, 0.001 to 1,000; from a file at least 4 and at most 768 frames are taken.
            min_pixels, max_pixels: bounds of a picture's (or frame's) area, from one token's to 16,384 tokens'; None
                keeps the checkpoint's.
            system: the system prompt, always kept in the cache; "" leaves it to the template.
            after: messages that came before, as those of a `Prompt` or a reading; the question goes on from there.

        Raises:
            InputError: something can't be read or does not fit.
            CheckpointError: the checkpoint's chat template can't be used, or its placeholders do not fit its config.
        """
        images = _several(images, "images", (str, Path, Image.Image), "paths or Pillow images")
        videos = _several(videos, "videos", (str, Path), "paths or lists of frames")
        if (images or videos) and not self.cfg.vision:
            raise InputError("this checkpoint is text-only: it can't look at images or videos")
        messages = isinstance(text, list | tuple) and all(isinstance(m, dict) for m in text)
        if not messages:
            check_text(text, "prompt")
        for given, what in ((context, "context"), (system, "system prompt")):
            if given != "":
                check_text(given, what)
        if (messages and context) or (after and system):
            raise InputError("messages bring their own context and system prompt: give it as a part of them")
        check_fps(fps)
        check_pixels(min_pixels, max_pixels, self.patcher)

        waiting = {"image": list(enumerate(images)), "video": list(enumerate(videos))}

        def look(kind: str, part: dict, name: str) -> Seen:
            if not self.cfg.vision:
                raise InputError("this checkpoint is text-only: it can't look at images or videos")
            if part.get("grid") is not None:
                return self._seen_before(kind, part, name)
            source = source_of(part, kind)
            if source is None:
                if not waiting[kind]:
                    raise InputError(f"{name} has no {kind}: give it as {kind!r} in that part, or in {kind}s")
                number, source = waiting[kind].pop(0)
                name = f"{kind}s[{number}]"
            return self._look(kind, source, name, fps, min_pixels, max_pixels)

        if not messages:
            text = one_turn(len(images), len(videos), context, text, after)
        if system:
            text = [{"role": "system", "content": system}, *text]
        turns = read_messages(going_on(after, text), look)
        for kind, left in waiting.items():
            if left:
                raise InputError(f"{len(left)} of the {kind}s have no place in the messages")
        return self._prompt(turns)

    def _look(
        self, kind: str, source: object, name: str, fps: float, min_pixels: int | None, max_pixels: int | None
    ) -> Seen:
        """Opens a picture or video, and makes its patches."""
        seconds = 0.0
        if kind == "image":
            pixels, grid = self.patcher.picture(open_image(source, name), min_pixels, max_pixels)
        else:
            frames, rate = _frames(source, name, fps)
            pixels, grid = self.patcher.video(frames, min_pixels, max_pixels)
            seconds = self.cfg.vision.temporal_patch_size / rate
        return Seen(kind, grid, self._visual_tokens(grid), seconds, pixels)

    def _seen_before(self, kind: str, part: dict, name: str) -> Seen:
        """A picture or video of which only the size is given."""
        grid, seconds, merge = part["grid"], part.get("seconds", 0.0), self.cfg.vision.spatial_merge_size
        known = isinstance(grid, list | tuple) and len(grid) == 3 and all(isinstance(n, int) and n > 0 for n in grid)
        if not known or grid[1] % merge or grid[2] % merge or not isinstance(seconds, int | float):
            raise InputError(f"the grid of {name} must be three numbers of patches, the last two multiples of {merge}")
        return Seen(kind, tuple(grid), self._visual_tokens(grid), float(seconds))

    def _visual_tokens(self, grid: Sequence[int]) -> int:
        t, h, w = grid
        return t * h * w // self.cfg.vision.spatial_merge_size**2

    def _prompt(self, turns: list[Turn]) -> Prompt:
        encoded = self.chat.encode(turns)
        ids, seen = encoded.ids, [part for turn in turns for part in turn.parts if isinstance(part, Seen)]
        visual = (ids == self.cfg.image_token_id) | (ids == self.cfg.video_token_id)
        if int(visual.sum()) != sum(part.tokens for part in seen):
            raise CheckpointError("image_token_id or video_token_id in config.json is not that of the tokenizer")
        words = [(turn, part) for turn in turns for part in turn.parts if isinstance(part, Words)]
        now = [part.context or (turn.role != "system" and turn is not turns[-1]) for turn, part in words]
        later = [part.context or turn.role != "system" for turn, part in words]
        patches = [part.patches for part in seen if part.patches is not None]
        return Prompt(
            input_ids=ids,
            prunable=visual | _in_these(encoded.segment, now),
            visual_tokens=int(visual.sum()),
            patches=torch.cat(patches) if patches else None,
            grids=[part.grid for part in seen],
            seconds_per_grid=[part.seconds for part in seen],
            spans=self._spans(visual, [part.grid for part in seen]),
            heavy=_heavy(turns, encoded, visual),
            settled=encoded.last_turn,
            later=visual | _in_these(encoded.segment, later),
            messages=without_pixels(turns),
            subject=without_pixels(heavy_part(turns)),
        )

    def _spans(self, visual: Tensor, grids: list[tuple[int, int, int]]) -> list[tuple[int, int, int, int]]:
        """Where each input's run of visual tokens starts, and its size in tokens; runs come in the order of grids."""
        spans, at, merge = [], 0, self.cfg.vision.spatial_merge_size if grids else 1
        for t, h, w in grids:
            start = at + int(visual[at:].nonzero()[0])
            spans.append((start, t, h // merge, w // merge))
            at = start + t * h * w // merge**2
        return spans


def _several(given, what: str, single: tuple[type, ...], kinds: str) -> list:
    """A list of what was given; a single path or picture is a list of one."""
    if isinstance(given, single):
        return [given]
    if isinstance(given, Sequence):
        return list(given)
    raise InputError(f"{what} must be a list of {kinds}, not {type(given).__name__}")


def _frames(source: Video, name: str, fps: float) -> tuple[list[Image.Image], float]:
    """A video's frames and how many there are a second."""
    if isinstance(source, str | Path):
        return read_video(source, fps)
    if not isinstance(source, Sequence):
        raise InputError(f"{name} must be a path or a list of frames, not {type(source).__name__}")
    frames = [open_image(frame, f"{name}[{i}]") for i, frame in enumerate(source)]
    if not frames:
        raise InputError("a video needs at least one frame")
    if len({frame.size for frame in frames}) > 1:
        raise InputError("the frames of a video must all have the same size")
    return frames, float(fps)


def _in_these(segment: Tensor, chosen: list[bool]) -> Tensor:
    """Which tokens lie in one of the chosen texts, (T,) bool."""
    return torch.tensor([*chosen, False])[segment]  # -1, no text, is the last


def _heavy(turns: list[Turn], encoded: Encoded, visual: Tensor) -> int:
    """Tokens up to the last picture, video or context, less those at a context's end that the question may change."""
    heavy, seen = heavy_part(turns), int(visual.nonzero()[-1]) + 1 if visual.any() else 0
    if not heavy or isinstance(heavy[-1].parts[-1], Seen):
        return seen
    texts = sum(isinstance(part, Words) for turn in heavy for part in turn.parts)
    return max(seen, encoded.sure[texts - 1])
