"""Our Qwen2.5-VL as a model of lmms-eval."""

import time
from collections.abc import Iterator
from itertools import groupby

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from hybridkv.cli import can_compile, choose_device
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine
from hybridkv.lmms.answer import Costs, Generation, answer
from hybridkv.model import Processor, from_pretrained
from hybridkv.planning.head_profile import HeadProfile


class Model(lmms):
    """What both of our models share: requests in batches, answers in order, costs in the results.

    A model has `answer(conversations, how, costs)`, see `answer.answer`, and a `batch_size`.
    """

    is_simple = False

    def messages(self, request: Instance) -> list[dict]:
        """What a request asks."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        chat = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        return chat.model_dump()["messages"]

    def batches(self, requests: list[Instance]) -> Iterator[list[Instance]]:
        """Requests in order, so many at a time that go together: those of a task, with the same arguments."""
        for _, of_task in groupby(requests, key=lambda r: (r.task_name, repr(r.args[2]))):
            of_task = list(of_task)
            for first in range(0, len(of_task), self.batch_size):
                yield of_task[first : first + self.batch_size]

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        results, costs, start = [], Costs(), time.perf_counter()
        with tqdm(total=len(requests), desc="answers") as bar:
            for batch in self.batches(requests):
                kwargs = batch[0].args[2]
                texts = self.answer([self.messages(r) for r in batch], Generation.of(kwargs), costs)
                for request, (text, tokens) in zip(batch, texts, strict=True):
                    results.append(GenerationResult(text, TokenCounts(output_tokens=tokens)))
                    self.cache_hook.add_partial("generate_until", (request.args[0], kwargs), text)
                bar.update(len(batch))
        took = time.perf_counter() - start
        log_metrics(took, costs.tokens, costs.tokens / max(took, 1e-9), costs.shares())
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("a compressed cache answers: choose tasks that generate (output_type generate_until)")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            "tasks of several rounds are not answered: choose one with output_type generate_until"
        )


class HybridKV(Model):
    """`--model hybridkv`.

    Args:
        pretrained: a checkpoint folder or a name on the Hub.
        policy: a name in `planning.policies.POLICIES`.
        budget: see `HybridConfig`; where a prompt's text takes more than that, what must be kept is kept.
        head_profile: a file of `hybridkv.calibrate`; heads are then classified by it.
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
        settings = HybridConfig(budget=float(budget), strict=False, **config)
        compiles = bool(compile) and can_compile(where)
        self.engine = Engine(model, settings, policy, model.cfg.eos_token_id, compiles)
        self.batch_size = int(batch_size)
        self.look = {"fps": float(fps), "min_pixels": min_pixels, "max_pixels": max_pixels}

    def answer(self, conversations: list[list[dict]], how: Generation, costs: Costs) -> list[tuple[str, int]]:
        return answer(self.engine, self.processor, conversations, how, costs, **self.look)
