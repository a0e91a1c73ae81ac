"""Any vision-language model of transformers that the adapter knows, as a model of lmms-eval: `--model hybridkv_hf`."""

from collections.abc import Iterable, Iterator

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from hybridkv.cli import choose_device
from hybridkv.hf import compile as compile_steps
from hybridkv.lmms.answer import Costs, Generation
from hybridkv.lmms.answer_hf import answer_hf
from hybridkv.lmms.model import Model
from hybridkv.planning.head_profile import HeadProfile


class HybridKVHF(Model):
    """`--model hybridkv_hf`.

    Args:
        pretrained: a checkpoint folder or a name on the Hub.
        policy, budget, head_profile, batch_size, device, dtype, config: as for `ours.HybridKV`.
        compile: True compiles the decoding step: much faster on long answers, and slow where prompts differ in length.
        fps: frames a second of a video, where the model's processor takes that.
    """

    def __init__(
        self,
        pretrained: str,
        policy: str = "hybridkv",
        budget: float = 0.1,
        head_profile: str | None = None,
        batch_size: int | str = 1,
        fps: float | None = None,
        device: str | None = None,
        dtype: str | None = None,
        compile: bool = False,
        max_batch_size: int | None = None,
        **config,
    ):
        super().__init__()
        where = choose_device(device)
        chosen = getattr(torch, dtype) if dtype else torch.float32 if where.type == "cpu" else "auto"
        self.processor = AutoProcessor.from_pretrained(pretrained)
        self.processor.tokenizer.padding_side = "left"
        self.model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=chosen).to(where).eval()
        self.model.set_attn_implementation("hybridkv")
        if compile:
            compile_steps(self.model)
        profile = HeadProfile.load(head_profile) if head_profile else None
        self.settings = {"policy": policy, "budget": float(budget), "strict": False, "head_profile": profile} | config
        self.batch_size = int(batch_size)
        self.template = {} if fps is None else {"fps": float(fps)}

    def answer(self, conversations: Iterable[list[dict]], how: Generation, costs: Costs) -> Iterator[tuple[str, int]]:
        return answer_hf(
            self.model,
            self.processor,
            conversations,
            how,
            costs,
            self.batch_size,
            self.template,
            **self.settings,
        )
