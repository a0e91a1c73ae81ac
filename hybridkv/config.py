"""Every choice of the method, in one place. Defaults come from measurements, see docs/quality.md."""

import math
from dataclasses import dataclass, fields

import torch

from hybridkv.planning.head_profile import HeadProfile

SKETCH_FLOOR = 32  # a quarter of head_dim is too coarse for heads of 64 (SmolLM2) and 32 (the bundled model)

WORD = 4  # dimensions of a key sketch that share an int32

CHOICES = {
    "classifier": ("focus", "profile", "threshold"),
    "retrieval": ("sketch", "bound", "exact"),
    "group": ("mean", "max"),
    "score": ("max", "mean"),
}


@dataclass(frozen=True)
class HybridConfig:
    """How a prompt's cache is compressed.

    Attributes:
        budget: bytes of the prompt's cache as a share of the full cache's bytes: kept tokens, retrieved chunks, key
            sketches, tables and all rounding charged. With the store on the host it bounds what the device holds, with
            the store on the device what one decoding step reads. 1.0 keeps everything.
        strict: what happens if the budget can't hold what must be kept, as with short prompts: True raises
            `BudgetError`, False keeps what must be kept and no more.
        page_size: tokens in a page, which is also the chunk that dynamic heads retrieve. A power of two, 16 or more.
        classifier: how heads are told apart: `focus` (see `LayerProfile`), `profile` (the offline head profile), or
            `threshold` (the paper's fixed one). What it was compared with is in `planning/variants.py`.
        retrieving_layers: share of the layers that dynamic heads may be in, the neediest by `head_profile`; without a
            profile all of them. None takes three quarters, and with the classifier `profile` all. Retrieval costs a
            layer its kernels, however few of its heads use them.
        dynamic_share: share of KV heads, over all layers, that are dynamic, one at least unless it is 0; `threshold`
            does not look at it.
        threshold: a head is static when at least this share of its attention is settled once the prompt is read (see
            `classify.settled_share`). The paper's is 0.9.
        head_profile: which heads need retrieval, measured once for a checkpoint: by `python -m hybridkv.calibrate` on
            prompts like one's own, or by `profiles.builtin_profile`.
        dynamic_weight: pages of a dynamic head for each page of a static head (the paper's coefficient between types).
        retrieval: how chunks are summed up for scoring: by a `sketch` of their keys (`cache/sketch.py`), by their
            `bound` (`cache/bounds.py`), or, to compare with, by the `exact` keys (`cache/exact.py`).
        group: how a KV head's query heads agree on a chunk: `mean` or `max` of the shares they would give it.
        tiles: a picture's chunks are tiles, 4 x 4 tokens for a page of 16, instead of runs of its raster lines.
        sketch_rank: dimensions of the int8 key sketch, a multiple of 4; None takes SKETCH_FLOOR, but at least a quarter
            and at most half of head_dim, rounded up.
        window: the prompt's last text queries that the profile looks at, and as many of a context that is text; for
            `focus` also how many tokens back is far.
        score: what a token is worth to a static head: the `max` or the `mean` over the window's queries and the group.
        pool: width of the neighbourhood in text whose best score, times `pool_weight`, a token may claim instead of its
            own before heads are pruned; odd, 1 is none.
        pool_weight: what a text neighbour's score is worth, in (0, 1]: 1 is plain max-pooling, which policies of the
            literature use whatever is set here.
        pool_side: visual tokens along both sides of a picture's neighbourhood, max-pooled; odd.
        sinks: first tokens of the prompt that every head keeps.
        recent: last tokens of the prompt that every head keeps.
        store: where the chunks of dynamic heads are: on the `device`, or on the `host`, from where a step fetches those
            that it reads and that are not on the device yet. None: on the host for a GPU, on the device for a CPU.
        stickiness: with the store on the host, a chunk that is on the device leaves it only for one whose share of the
            attention is larger by this factor, 1 or more. Fewer chunks are fetched, and slightly worse ones are read.
        keep_new: newest generated tokens that static heads keep, at least; None for all. (Dynamic heads keep all.)
    """

    budget: float = 0.1
    strict: bool = True
    page_size: int = 16
    classifier: str = "focus"
    retrieving_layers: float | None = None
    dynamic_share: float = 0.25
    threshold: float = 0.9
    head_profile: HeadProfile | None = None
    dynamic_weight: float = 2.0
    retrieval: str = "sketch"
    group: str = "mean"
    tiles: bool = False
    sketch_rank: int | None = None
    window: int = 32
    score: str = "max"
    pool: int = 15
    pool_weight: float = 0.2
    pool_side: int = 3
    sinks: int = 4
    recent: int = 16
    store: str | None = None
    stickiness: float = 2.0
    keep_new: int | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(message)

        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            if kind in (bool, int, float, str):
                known = isinstance(value, (int, float) if kind is float else kind)
                known &= (kind is bool) == isinstance(value, bool)
                check(known, f"{field.name} takes a {kind.__name__}, got {value!r}")
                check(kind is not int or abs(value) < 1 << 31, f"{field.name} is out of range: {value}")
        check(0 < self.budget <= 1, f"budget must lie in (0, 1], got {self.budget}")
        # FlexAttention's smallest block on GPUs is 16, and blocks must be powers of two.
        power = self.page_size >= 16 and self.page_size & (self.page_size - 1) == 0
        check(power, f"page_size must be a power of two from 16 on, got {self.page_size}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            check(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if not isinstance(self.head_profile, HeadProfile | None):
            raise TypeError(f"head_profile takes a HeadProfile: HeadProfile.load({self.head_profile!r})")
        check(0 <= self.dynamic_share <= 1, f"dynamic_share must lie in [0, 1], got {self.dynamic_share}")
        layers = 1 if self.retrieving_layers is None else self.retrieving_layers
        check(0 < layers <= 1, f"retrieving_layers must lie in (0, 1], got {layers}")
        check(0 <= self.threshold <= 1, f"threshold must lie in [0, 1], got {self.threshold}")
        check(
            0 < self.dynamic_weight < math.inf, f"dynamic_weight must be positive and finite, got {self.dynamic_weight}"
        )
        rank = WORD if self.sketch_rank is None else self.sketch_rank
        check(
            isinstance(rank, int) and rank > 0 and rank % WORD == 0,
            f"sketch_rank must be a positive multiple of {WORD}, got {rank}",
        )
        check(self.window > 0, f"window must be positive, got {self.window}")
        for name in ("pool", "pool_side"):
            width = getattr(self, name)
            check(width > 0 and width % 2 == 1, f"{name} must be odd and positive, got {width}")
        check(0 < self.pool_weight <= 1, f"pool_weight must lie in (0, 1], got {self.pool_weight}")
        known = (None, "device", "host")
        check(self.store in known, f"store must be device, host or None, got {self.store!r}")
        check(1 <= self.stickiness < 1e6, f"stickiness must be 1 or more, got {self.stickiness}")
        kept = 1 if self.keep_new is None else self.keep_new
        check(type(kept) is int and 0 < kept < 1 << 31, f"keep_new must be a positive number of tokens, got {kept!r}")
        check(self.sinks >= 0 and self.recent >= 0, "sinks and recent can't be negative")

    def on_host(self, device: torch.device) -> bool:
        """Whether the chunks of dynamic heads are in host memory, for a cache on this device."""
        return device.type == "cuda" if self.store is None else self.store == "host"

    def rank(self, head_dim: int) -> int:
        """Dimensions of the key sketch for keys of `head_dim`."""
        rank = self.sketch_rank or max(head_dim // 4, min(SKETCH_FLOOR, head_dim // 2))
        rank = -(-rank // WORD) * WORD
        if rank > head_dim:
            raise ValueError(f"a sketch_rank of {rank} is above head_dim {head_dim}")
        return rank
