"""Our Qwen2.5-VL as a model of lmms-eval: `--model hybridkv`."""

from collections.abc import Iterable, Iterator

import torch

from hybridkv.cli import can_compile, choose_device
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine
from hybridkv.lmms.answer import Costs, Generation, answer
from hybridkv.lmms.model import Model
from hybridkv.model import Processor, from_pretrained
from hybridkv.model.checkpoint import resolve
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.profiles import brought_profile, builtin_profile


class HybridKV(Model):
    """`--model hybridkv`.

    Args:
        pretrained: a checkpoint folder or a name on the Hub.
        policy: a name in `planning.policies.POLICIES`.
        budget: see `HybridConfig`; where a prompt's text takes more than that, what must be kept is kept.
        head_profile: a file of `hybridkv.calibrate`; heads are then classified by it.
        calibrate: where there is none, which layers retrieve comes from the profile that the checkpoint brings, or of
            the built-in samples, as on the command line; False lets them be any.
        batch_size: prompts that are answered together.
        fps, min_pixels, max_pixels: see `Processor`.
        device, dtype: default as on the command line.
        compile: False decodes uncompiled; prompts of many sizes would each wait for the compiler.
        config: further fields of `HybridConfig`, by name.
    """

    def __init__(
        self,
        pretrained: str,
        policy: str = "hybridkv",
        budget: float = 0.1,
        head_profile: str | None = None,
        batch_size: int | str = 1,
        fps: float = 2.0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        compile: bool = True,
        calibrate: bool = True,
        max_batch_size: int | None = None,
        **config,
    ):
        super().__init__()
        where = choose_device(device)
        chosen = getattr(torch, dtype) if dtype else torch.float32 if where.type == "cpu" else None
        self.processor = Processor.from_pretrained(pretrained)
        model = from_pretrained(pretrained, dtype=chosen, device=where, progress=False)
        if head_profile:
            config |= {"classifier": "profile", "head_profile": HeadProfile.load(head_profile)}
        elif calibrate and policy == "hybridkv" and float(budget) < 1:
            own = brought_profile(resolve(pretrained)) or builtin_profile(model, self.processor)
            config.setdefault("head_profile", own)
        settings = HybridConfig(budget=float(budget), strict=False, **config)
        compiles = bool(compile) and can_compile(where)
        self.engine = Engine(model, settings, policy, model.cfg.eos_token_id, compiles)
        self.batch_size = int(batch_size)
        self.look = {"fps": float(fps), "min_pixels": min_pixels, "max_pixels": max_pixels}

    def answer(self, conversations: Iterable[list[dict]], how: Generation, costs: Costs) -> Iterator[tuple[str, int]]:
        return answer(self.engine, self.processor, conversations, how, costs, self.batch_size, **self.look)
