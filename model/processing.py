"""From text, pictures and video to what the model reads: token ids, normalised patches, grids, and the prunable mask.

Tokenizer, chat template and image processor are those of the checkpoint, through transformers (the Pillow-backed
image processor, so torchvision is not needed).
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from hybridkv.model.checkpoint import resolve
from hybridkv.model.config import CheckpointError, Config, load_config, read_json

Picture = str | Path | Image.Image
Video = str | Path | Sequence[Picture]

# The limits that Qwen's own tools use for video: at most 768 tokens of 28 x 28 pixels a frame pair, 24,576 in all.
FRAME_PIXELS, FRAME_PIXELS_MIN, VIDEO_PIXELS = 768 * 28 * 28, 128 * 28 * 28, 24576 * 28 * 28
MAX_FRAMES = 768


class InputError(ValueError):
    """A prompt, picture or video that can't be used; the message says what is wrong and what to do."""


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


def open_image(source: Picture) -> Image.Image:
    """An upright RGB picture. Transparency is laid over white; 16-bit grey is scaled to 8 bits.

    Raises:
        InputError: missing, unreadable, animated, too large to decode safely, or of a mode without a clear meaning.
    """
    name = str(source) if isinstance(source, str | Path) else "image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = source if isinstance(source, Image.Image) else Image.open(source)
            if getattr(image, "n_frames", 1) > 1:
                raise InputError(f"{name} is animated ({image.n_frames} frames): give one frame, or use it as a video")
            image = ImageOps.exif_transpose(image)
            image.load()
    except FileNotFoundError as e:
        raise InputError(f"{name} does not exist") from e
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        limit = Image.MAX_IMAGE_PIXELS
        raise InputError(f"{name} has more than {limit:,} pixels and is not decoded: scale it down first") from e
    except UnidentifiedImageError as e:
        raise InputError(f"{name} is not a picture that Pillow can read") from e
    except (OSError, SyntaxError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(f"{name} can't be read: {e}") from e
    if image.mode.startswith("I;16"):
        return image.point(lambda value: value / 256).convert("L").convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError(
            f"{name} has {image.mode!r} pixels without a fixed range: convert it to 8 bits a channel first"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def read_video(path: str | Path, fps: float) -> tuple[list[Image.Image], float]:
    """About `fps` frames a second of a video file, and the rate that was really taken. Needs the `video` extra."""
    try:
        import av
    except ImportError as e:
        raise InputError("reading a video file needs PyAV: pip install 'hybridkv[video]'") from e
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} holds no video stream")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 0) or fps
            every = max(1.0, rate / fps)
            frames, due = [], 0.0
            for i, frame in enumerate(container.decode(stream)):
                if i >= due:
                    frames.append(frame.to_image())
                    due += every
                if len(frames) > MAX_FRAMES:
                    raise InputError(
                        f"{path} gives more than {MAX_FRAMES} frames at {fps} a second: lower fps or cut it"
                    )
    except av.FFmpegError as e:
        raise InputError(f"{path} can't be read as video: {e}") from e
    if not frames:
        raise InputError(f"{path} holds no frames")
    return frames, rate / every


class Processor:
    """Prepares prompts for one checkpoint.

    >>> processor = Processor.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")
    >>> prompt = processor("What does the sign say?", images=["street.jpg"])
    """

    def __init__(self, tokenizer, image_processor, cfg: Config):
        self.tokenizer = tokenizer
        self.image_processor = image_processor  # None for a text-only checkpoint
        self.cfg = cfg

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "Processor":
        """The tokenizer and image processor in a checkpoint folder or on the Hub."""
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
        except (OSError, ValueError, KeyError, TypeError) as e:
            reason = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise CheckpointError(f"{folder}: tokenizer or image processor can't be loaded: {reason}") from e
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
        images: Sequence[Picture] = (),
        videos: Sequence[Video] = (),
        context: str = "",
        fps: float = 2.0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Prompt:
        """Makes a prompt: the pictures and videos, then the context, then the question, in one user turn.

        Args:
            text: the question; always kept in the cache.
            images: paths or Pillow images.
            videos: paths (needs PyAV), or lists of frames taken `fps` times a second.
            context: long text to ask about; prunable, like visual tokens.
            fps: frames a second.
            min_pixels, max_pixels: bounds of a picture's (or frame's) area; None keeps the checkpoint's.

        Raises:
            InputError: something can't be read or does not fit.
        """
        if (images or videos) and not self.cfg.vision:
            raise InputError("this checkpoint is text-only: it can't look at images or videos")
        if not text.strip():
            raise InputError("the prompt is empty")
        context = context.strip()
        for special in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"):
            if self.cfg.vision and (special in text or special in context):
                raise InputError(f"the text holds the placeholder {special}, which stands for a picture: remove it")

        patches, grids, seconds = [], [], []
        for source in images:
            picture = open_image(source)
            pixels, grid = self._patches([picture], min_pixels, max_pixels)
            patches.append(pixels[0])
            grids.append((1, *grid))
            seconds.append(0.0)
        for source in videos:
            frames, rate = read_video(source, fps) if isinstance(source, str | Path) else (list(source), fps)
            pixels, grid = self._video(frames, min_pixels, max_pixels)
            patches.append(pixels)
            grids.append(grid)
            seconds.append(self.cfg.vision.temporal_patch_size / rate)

        ids, prunable = self._tokens(text, context, len(images), len(videos), grids)
        visual = (ids == self.cfg.image_token_id) | (ids == self.cfg.video_token_id)
        return Prompt(
            input_ids=ids,
            prunable=prunable | visual,
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

    def _patches(
        self, pictures: list[Image.Image], low: int | None, high: int | None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Patches (F, N, patch_dim) of pictures of one size, and their grid (h, w)."""
        default = self.image_processor.size
        if low and high and low > high:
            raise InputError(f"min_pixels {low} is above max_pixels {high}")
        high = high or max(low or 0, default["longest_edge"])
        low = low or min(high, default["shortest_edge"])
        size = {"shortest_edge": low, "longest_edge": high}
        try:
            out = self.image_processor(images=pictures, size=size, return_tensors="pt")
        except ValueError as e:
            raise InputError(
                f"a picture of {pictures[0].size[0]} x {pictures[0].size[1]} pixels can't be used: {e}"
            ) from e
        _, h, w = out["image_grid_thw"][0].tolist()
        return rearrange(out["pixel_values"], "(f n) d -> f n d", f=len(pictures)), (h, w)

    def _video(self, frames: list[Picture], low: int | None, high: int | None) -> tuple[Tensor, tuple[int, int, int]]:
        """Patches (N, patch_dim) of a video and its grid: each time step holds `temporal_patch_size` frames."""
        frames = [open_image(frame) for frame in frames]
        if not frames:
            raise InputError("a video needs at least one frame")
        if len({frame.size for frame in frames}) > 1:
            raise InputError("the frames of a video must all have the same size")
        step = self.cfg.vision.temporal_patch_size
        frames += [frames[-1]] * (-len(frames) % step)
        grid_t = len(frames) // step
        high = high or max(low or FRAME_PIXELS_MIN, min(FRAME_PIXELS, math.floor(VIDEO_PIXELS / grid_t)))
        low = low or min(high, FRAME_PIXELS_MIN)
        pixels, (h, w) = self._patches(frames, low, high)
        # The image processor fills a still picture's patch with `step` copies of it: keep one from each frame.
        c = self.cfg.vision.in_channels
        still = rearrange(pixels, "f n (c s d) -> f n c s d", c=c, s=step)[:, :, :, 0]
        return rearrange(still, "(t s) n c d -> (t n) (c s d)", s=step), (grid_t, h, w)

    def _tokens(self, text: str, context: str, n_images: int, n_videos: int, grids: list) -> tuple[Tensor, Tensor]:
        """Token ids of the rendered chat and the mask of those that lie in the context."""
        body = f"{context}\n\n{text}" if context else text
        visual = ["<|vision_start|><|image_pad|><|vision_end|>"] * n_images
        visual += ["<|vision_start|><|video_pad|><|vision_end|>"] * n_videos
        templated = bool(self.tokenizer.chat_template)
        if templated:
            kinds = ["image"] * n_images + ["video"] * n_videos
            content = [{"type": kind} for kind in kinds] + [{"type": "text", "text": body}] if kinds else body
            rendered = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
        else:
            rendered = "".join(visual) + body

        parts = [rendered]
        merge = self.cfg.vision.spatial_merge_size**2 if grids else 1
        for i, (t, h, w) in enumerate(grids):
            pad = "<|image_pad|>" if i < n_images else "<|video_pad|>"
            before, found, after = parts.pop().partition(pad)
            if not found:
                raise InputError(f"the checkpoint's chat template has no place for {len(grids)} pictures or videos")
            parts += [before, pad * (t * h * w // merge), after]
        rendered = "".join(parts)

        encoded = self.tokenizer(rendered, add_special_tokens=not templated, return_offsets_mapping=True)
        ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        prunable = torch.zeros(len(ids), dtype=torch.bool)
        if context:
            start = rendered.find(context)
            if start < 0:
                raise InputError(
                    "the checkpoint's chat template changes the context text: put it into the prompt instead"
                )
            offsets = torch.tensor(encoded["offset_mapping"])
            prunable = (
                (offsets[:, 0] >= start) & (offsets[:, 1] <= start + len(context)) & (offsets[:, 1] > offsets[:, 0])
            )
        return ids, prunable
