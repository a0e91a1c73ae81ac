"""`answer.answer` for a model of transformers, through `HybridKVCache`. Imports nothing of lmms-eval."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from transformers import PreTrainedModel

from hybridkv.hf import HybridKVCache
from hybridkv.lmms.answer import Costs, Generation, our_messages


def answer_hf(
    model: PreTrainedModel,
    processor,
    conversations: Iterable[Sequence[dict]],
    how: Generation,
    costs: Costs,
    size: int = 1,
    template: dict | None = None,
    **cache,
) -> Iterator[tuple[str, int]]:
    """Answers conversations in their order, each by itself: readings are our engine's.

    Args:
        model: its attention set to `hybridkv`.
        processor: of transformers, with a chat template; its tokenizer pads on the left.
        size: prompts that are answered together.
        template: further arguments of `processor.apply_chat_template`.
        cache: those of `HybridKVCache`: `policy`, `budget`, `strict`, ...

    Yields:
        for each its answer, and of how many tokens.
    """
    waiting, sampling = iter(conversations), how.sampling
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    warm = {"do_sample": False}
    if sampling.temperature > 0:
        warm = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
    while group := [our_messages(messages) for messages in islice(waiting, size)]:
        inputs = processor.apply_chat_template(
            group,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            **(template or {}),
        ).to(model.device)
        kv = HybridKVCache(model, inputs, max_new_tokens=how.max_new_tokens, **cache)
        out = model.generate(**inputs, past_key_values=kv, max_new_tokens=how.max_new_tokens, **warm)
        answers = []
        for ids in out[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
            answers.append(ids[:end])
        costs.add(kv.stats(), len(group), sum(map(len, answers)))
        for ids in answers:
            yield how.cut(processor.decode(ids, skip_special_tokens=True)), len(ids)
