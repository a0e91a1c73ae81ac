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

from hybridkv.model.chat import Chat
from hybridkv.model.checkpoint import resolve
from hybridkv.model.config import CheckpointError, Config, load_config, read_json
from hybridkv.model.patches import Patcher, check_pixels
from hybridkv.model.pictures import InputError, Picture, open_image, reason
from hybridkv.model.video import check_fps, read_video

Video = str | Path | Sequence[Picture]


@dataclass(frozen=True)
class Prompt:
    """One prompt, ready for `Model.prefill`.

    Attributes:
        input_ids: (T,) int64, placeholders expanded to one per visual token.
        prunable: (T,) bool, the tokens that a cache may drop or move: visual tokens and long context, never the
            question or the chat template.
        visual_tokens: how many of the T tokens come from pictures and video.
        patches: (N, patch_dim) float32 of all images, then all videos; None without any.
        grids: (t, h, w) in patches of each of them.
        seconds_per_grid: seconds between two time steps of each; 0 for images.
        spans: their tokens in the prompt: the first one's place, then time, height and width in tokens.
    """

    input_ids: Tensor
    prunable: Tensor
    visual_tokens: int
    patches: Tensor | None
    grids: list[tuple[int, int, int]]
    seconds_per_grid: list[float]
    spans: list[tuple[int, int, int, int]] = field(default_factory=list)


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
        text: str,
        images: Picture | Sequence[Picture] = (),
        videos: str | Path | Sequence[Video] = (),
        context: str = "",
        fps: float = 2.0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Prompt:
        """Makes a prompt: the pictures and videos, then the context, then the question, in one user turn.

        Control tokens such as `<|im_end|>` and placeholders such as `<|image_pad|>` in the text or the context are
        read as the text that they are.

        Args:
            text: the question; always kept in the cache.
            images: paths or Pillow images, or a single one.
            videos: paths (needs PyAV), or lists of frames taken `fps` times a second; or a single path.
            context: long text to ask about; prunable, like visual tokens. Space around it goes.
            fps: frames a second, 0.001 to 1,000; from a file at least 4 and at most 768 frames are taken.
            min_pixels, max_pixels: bounds of a picture's (or frame's) area, from one token's to 16,384 tokens'; None
                keeps the checkpoint's.

        Raises:
            InputError: something can't be read or does not fit.
            CheckpointError: the checkpoint's chat template can't be used, or its placeholders do not fit its config.
        """
        images = _several(images, "images", (str, Path, Image.Image), "paths or Pillow images")
        videos = _several(videos, "videos", (str, Path), "paths or lists of frames")
        if (images or videos) and not self.cfg.vision:
            raise InputError("this checkpoint is text-only: it can't look at images or videos")
        _check_text(text, "prompt")
        if context != "":
            _check_text(context, "context")
        check_fps(fps)
        check_pixels(min_pixels, max_pixels, self.patcher)

        patches, grids, seconds = [], [], []
        for i, source in enumerate(images):
            picture = open_image(source, f"images[{i}]")
            pixels, grid = self.patcher.picture(picture, min_pixels, max_pixels)
            patches.append(pixels)
            grids.append(grid)
            seconds.append(0.0)
        for i, source in enumerate(videos):
            frames, rate = _frames(source, f"videos[{i}]", fps)
            pixels, grid = self.patcher.video(frames, min_pixels, max_pixels)
            patches.append(pixels)
            grids.append(grid)
            seconds.append(self.cfg.vision.temporal_patch_size / rate)

        merge = self.cfg.vision.spatial_merge_size**2 if grids else 1
        counts = [t * h * w // merge for t, h, w in grids]
        kinds = ["image"] * len(images) + ["video"] * len(videos)
        ids, in_context = self.chat.encode(context.strip(), text, list(zip(kinds, counts, strict=True)))
        visual = (ids == self.cfg.image_token_id) | (ids == self.cfg.video_token_id)
        if int(visual.sum()) != sum(counts):
            raise CheckpointError("image_token_id or video_token_id in config.json is not that of the tokenizer")
        return Prompt(
            input_ids=ids,
            prunable=in_context | visual,
            visual_tokens=int(visual.sum()),
            patches=torch.cat(patches) if patches else None,
            grids=grids,
            seconds_per_grid=seconds,
            spans=self._spans(visual, grids),
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


def _check_text(text: str, what: str) -> None:
    if not isinstance(text, str):
        raise InputError(f"the {what} must be text (str), not {type(text).__name__}")
    if not text.strip():
        raise InputError(f"the {what} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(
            f"the {what} holds half of a surrogate pair at character {e.start}, which is no text: decode it again"
        ) from e
