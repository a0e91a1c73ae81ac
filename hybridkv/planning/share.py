"""Which lanes of a batch read the same chunks: those of questions about one reading, with the store on the host.

What a dynamic lane's chunks hold follows from the context alone, all but the last one perhaps. So the first question
for which a head is dynamic puts its settled chunks into the store, and fits their sketch; later questions read them
there. Frames, fixed pages, and what comes behind these chunks are each question's own.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hybridkv.planning.plan import Plan
from hybridkv.reading import Question


def share(plans: list[Plan], prompts: Sequence) -> list[Plan]:
    """The same plans, with the `owner` of each lane whose settled chunks another question's lane holds already.

    Two questions share if they are about the same reading, cut the same tokens into chunks, and have the same token ids
    up to the last of these: what a chunk holds depends on nothing else.
    """
    groups: list[tuple[Question, Tensor, Tensor]] = []
    found = list(plans)
    for b, (plan, prompt) in enumerate(zip(plans, prompts, strict=True)):
        if not isinstance(prompt, Question) or not plan.host or not plan.dynamic.any():
            continue
        tokens = plan.settled_tokens
        if plan.lane_chunks < plan.settled_chunks:
            continue
        for other, theirs, owner in groups:
            seen = int(tokens.max()) + 1
            same = other.reading is prompt.reading and torch.equal(theirs, tokens)
            if same and torch.equal(other.input_ids[:seen].cpu(), prompt.input_ids[:seen].cpu()):
                found[b] = replace(plan, owner=torch.where(plan.dynamic, owner, -1))
                owner[plan.dynamic & (owner < 0)] = b
                break
        else:
            groups.append((prompt, tokens, torch.where(plan.dynamic, b, -1)))
    return found
