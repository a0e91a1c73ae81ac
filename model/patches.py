"""From pictures and frames to normalised patches, as the checkpoint's image processor makes them."""

from numbers import Integral

from einops import rearrange
from PIL import Image
from torch import Tensor

from hybridkv.model.config import CheckpointError, VisionConfig
from hybridkv.model.pictures import InputError, reason, short

# The limits that Qwen's own tools use: 16,384 tokens of 28 x 28 pixels a picture; for video at most 768 tokens a frame
# pair, 24,576 in all.
PICTURE_TOKENS, TOKEN_PIXELS = 16384, 28 * 28
FRAME_PIXELS, FRAME_PIXELS_MIN, VIDEO_PIXELS = 768 * 28 * 28, 128 * 28 * 28, 24576 * 28 * 28


class Patcher:
    """One checkpoint's image processor.

    Raises:
        CheckpointError: `preprocessor_config.json` can't be used, or does not fit `config.json`.
    """

    def __init__(self, image_processor, vision: VisionConfig):
        self.image_processor = image_processor
        self.vision = vision
        for name, want in (
            ("patch_size", vision.patch_size),
            ("merge_size", vision.spatial_merge_size),
            ("temporal_patch_size", vision.temporal_patch_size),
        ):
            found = getattr(image_processor, name)
            if found != want:
                raise CheckpointError(f"preprocessor_config.json has {name} {found}, config.json has {want}")
        size = dict(image_processor.size)  # its bounds go by either of two names
        self.low = size.get("shortest_edge") or size.get("min_pixels")
        self.high = size.get("longest_edge") or size.get("max_pixels")
        if not (isinstance(self.low, int) and isinstance(self.high, int) and 0 < self.low <= self.high):
            raise CheckpointError("preprocessor_config.json must hold min_pixels and max_pixels, two areas in pixels")
        side = vision.patch_size * vision.spatial_merge_size
        try:
            patches, _ = self._patches([Image.new("RGB", (side, side))], side**2, side**2)
        except Exception as e:  # its values are not checked before they are used, so that anything may come
            raise CheckpointError(f"preprocessor_config.json can't be used: {reason(e)}") from e
        if patches.shape != (1, vision.spatial_merge_size**2, vision.patch_dim) or not patches.isfinite().all():
            raise CheckpointError("preprocessor_config.json does not make the patches that config.json describes")

    def picture(self, picture: Image.Image, low: int | None, high: int | None) -> tuple[Tensor, tuple[int, int, int]]:
        """Patches (N, patch_dim) of a picture, and its grid (1, h, w); None keeps the checkpoint's own bound."""
        patches, (h, w) = self._patches([picture], low, high)
        return patches[0], (1, h, w)

    def video(
        self, frames: list[Image.Image], low: int | None, high: int | None
    ) -> tuple[Tensor, tuple[int, int, int]]:
        """Patches (N, patch_dim) of frames of one size, and their grid: a time step holds `temporal_patch_size`."""
        step = self.vision.temporal_patch_size
        frames = frames + [frames[-1]] * (-len(frames) % step)
        grid_t = len(frames) // step
        high = high or max(low or FRAME_PIXELS_MIN, min(FRAME_PIXELS, VIDEO_PIXELS // grid_t))
        low = low or min(high, FRAME_PIXELS_MIN)
        patches, (h, w) = self._patches(frames, low, high)
        # The image processor fills a still picture's patch with `step` copies of it: keep one from each frame.
        still = rearrange(patches, "f n (c s d) -> f n c s d", c=self.vision.in_channels, s=step)[:, :, :, 0]
        return rearrange(still, "(t s) n c d -> (t n) (c s d)", s=step), (grid_t, h, w)

    def _patches(
        self, pictures: list[Image.Image], low: int | None, high: int | None
    ) -> tuple[Tensor, tuple[int, int]]:
        """Patches (F, N, patch_dim) of pictures of one size, and their grid (h, w)."""
        high = high or max(low or 0, self.high)
        low = low or min(high, self.low)
        size = {"shortest_edge": int(low), "longest_edge": int(high)}  # NumPy's integers are refused there
        try:
            out = self.image_processor(images=pictures, size=size, return_tensors="pt")
        except ValueError as e:
            width, height = pictures[0].size
            raise InputError(f"a picture of {width} x {height} pixels can't be used: {e}") from e
        _, h, w = out["image_grid_thw"][0].tolist()
        return rearrange(out["pixel_values"], "(f n) d -> f n d", f=len(pictures)), (h, w)


def check_pixels(low: int | None, high: int | None, patcher: Patcher | None) -> None:
    """A caller's bounds lie between one visual token's area and that of 16,384 tokens, or what the checkpoint allows.

    Raises:
        InputError: they do not, or are no whole numbers, or the lower one is above the upper one.
    """
    token = (patcher.vision.patch_size * patcher.vision.spatial_merge_size) ** 2 if patcher else TOKEN_PIXELS
    most = max(PICTURE_TOKENS * token, patcher.high if patcher else 0)
    for name, value in (("min_pixels", low), ("max_pixels", high)):
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if value is not None and not (whole and token <= value <= most):
            raise InputError(f"{name} must be a whole number from {token:,} to {most:,}, not {short(value)}")
    if low is not None and high is not None and low > high:
        raise InputError(f"min_pixels {low} is above max_pixels {high}")
