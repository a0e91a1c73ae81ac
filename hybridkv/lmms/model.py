"""What our models of lmms-eval share: its interface."""

import time
from collections.abc import Iterable, Iterator
from itertools import groupby

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from hybridkv.lmms.answer import Costs, Generation


class Model(lmms):
    """Requests become conversations, answers come in order, and what they cost goes into the results.

    A model has `batch_size`, and `answer`.
    """

    is_simple = False

    def answer(self, conversations: Iterable[list[dict]], how: Generation, costs: Costs) -> Iterator[tuple[str, int]]:
        """Answers, and of how many tokens; what they took is added to `costs`."""
        raise NotImplementedError

    def messages(self, request: Instance) -> list[dict]:
        """What a request asks."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        return ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])).model_dump()["messages"]

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        results, costs, start = [], Costs(), time.perf_counter()
        with tqdm(total=len(requests), desc="answers") as bar:
            # Those of a task with the same arguments go together.
            for _, some in groupby(requests, key=lambda request: (request.task_name, repr(request.args[2]))):
                some = list(some)
                kwargs = some[0].args[2]
                answers = self.answer(map(self.messages, some), Generation.of(kwargs), costs)
                for request, (text, tokens) in zip(some, answers, strict=True):
                    results.append(GenerationResult(text, TokenCounts(output_tokens=tokens)))
                    self.cache_hook.add_partial("generate_until", (request.args[0], kwargs), text)
                    bar.update()
        took = time.perf_counter() - start
        log_metrics(took, costs.tokens, costs.tokens / max(took, 1e-9), costs.shares())
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("a compressed cache answers: choose tasks that generate (output_type generate_until)")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            "tasks of several rounds are not answered: choose one with output_type generate_until"
        )
