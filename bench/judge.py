"""Measures policies on prompts: what they answer, how far they diverge from the full cache, and what they cost."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace

import torch
from torch import Tensor

from bench.real_models import REAL, fetch
from bench.tasks import Case
from hybridkv.config import HybridConfig
from hybridkv.demos import MODEL
from hybridkv.engine import Engine
from hybridkv.model import Model, Processor, from_pretrained
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.plan import Plan
from hybridkv.planning.policies import POLICIES
from hybridkv.planning.prefill import Prefill
from hybridkv.planning.variants import VARIANTS
from hybridkv.sampling import Sampling

PROFILED = ("window", "sinks", "recent")  # fields that the prefill itself depends on


@dataclass(frozen=True)
class Variant:
    """A policy with its configuration, as named on the command line.

    Attributes:
        config: without the head profile, whose file may be yet to be made.
        head_profile: that file, if one is wanted.
        beside: settings that are no fields of `HybridConfig`, but make the policy another one (`variants.VARIANTS`).
    """

    name: str
    policy: str | Callable[[Prefill], Plan]
    config: HybridConfig
    head_profile: str | None = None
    beside: dict[str, str] = field(default_factory=dict)

    def described(self) -> dict:
        """The configuration as rows have it."""
        return asdict(self.config) | {"head_profile": self.head_profile} | self.beside

    def complete(self) -> HybridConfig:
        """The configuration with the head profile."""
        return replace(self.config, head_profile=self.head_profile and HeadProfile.load(self.head_profile))


def variants_at(text: str, budgets: Sequence[float], head_profile: str | None = None) -> list[Variant]:
    """A variant at each of the budgets; `full` has none to obey, and `snapkv:budget=0.3` names its own.

    Args:
        head_profile: file of an offline profile, for those that want one.
    """
    variant = parse_variant(text)
    config = variant.config
    wants = config.classifier == "profile" or config.retrieving_layers or variant.policy == "sparsemm"
    policy, _, settings = text.partition(":")
    given = settings.split(",") if settings else []
    others = [setting for setting in given if not setting.startswith("budget=")]
    if policy == "full":
        budgets = [1.0]
    elif len(others) < len(given):
        budgets = [variant.config.budget]
    name = f"{policy}:{','.join(others)}".rstrip(":")
    return [
        replace(
            variant,
            name=name,
            config=replace(variant.config, budget=budget),
            head_profile=head_profile if wants else None,
        )
        for budget in budgets
    ]


def parse_variant(text: str) -> Variant:
    """`snapkv` or `hybridkv:pool=1,dynamic_share=0.25`.

    Raises:
        ValueError: no such policy, field or value.
    """
    name, _, settings = text.partition(":")
    if name not in POLICIES:
        raise ValueError(f"there is no policy {name!r}; there are {', '.join(POLICIES)}")
    known, given, beside = {f.name: f.type for f in fields(HybridConfig) if f.name != "head_profile"}, {}, {}
    policy: str | Callable[[Prefill], Plan] = name
    for setting in filter(None, settings.split(",")):
        key, _, value = setting.partition("=")
        if setting in VARIANTS:
            if policy != "hybridkv":
                raise ValueError(f"{setting!r} is a variant of hybridkv, and goes with no other")
            policy, beside = VARIANTS[setting], {key: value}
            continue
        if key not in known:
            raise ValueError(f"HybridConfig has no field {key!r}; it has {', '.join(sorted(known))}")
        try:
            given[key] = json.loads(value)
        except json.JSONDecodeError:
            given[key] = value
        if not isinstance(given[key], (float, int) if known[key] is float else known[key]):
            raise ValueError(f"{setting!r}: {key} takes {getattr(known[key], '__name__', known[key])}")
    config = HybridConfig(strict=False, **given)
    config = replace(config, retrieval="bound") if name == "quest" else config
    return Variant(text, policy, config, beside=beside)


@dataclass
class Read:
    """Prompts that went through the prefill: what any policy starts from."""

    prefills: list[Prefill]
    first: Tensor  # (B,) the token that the prefill chooses
    positions: list[int]


def again(prefill: Prefill, config: HybridConfig) -> Prefill:
    """The same record for another plan: loading a cache takes the keys and values out of the record it is given."""
    copy = Prefill(prefill.prunable, config, spans=prefill.spans)
    copy.layers, copy.like = list(prefill.layers), prefill.like
    return copy


def limit_of(cases: Sequence[Case], path: list[list[int]] | None) -> int:
    """How many answer tokens `decode` looks at."""
    return max(map(len, path)) + 1 if path else max(case.limit for case in cases)


def steps_of(cases: Sequence[Case], path: list[list[int]] | None) -> int:
    """How many steps `decode` takes."""
    return max(len(case.then) for case in cases) + limit_of(cases, path) - 1


def decode(
    engine: Engine, read: Read, cases: Sequence[Case], path: list[list[int]] | None = None
) -> tuple[list[list[int]], list[Tensor]]:
    """Runs the engine's policy on prompts, second turns first.

    Args:
        path: tokens to follow for each case; None follows the policy's own likeliest tokens.

    Returns:
        for each case the likeliest answer tokens, and the logits (N, V) that the cache had a part in: all but the
        first token's, which the prefill decides, unless a second turn came before it.
    """
    turns = [case.then for case in cases]
    limit, steps = limit_of(cases, path), steps_of(cases, path)
    engine.load([again(prefill, engine.config) for prefill in read.prefills], steps + 1)
    engine.begin(read.positions, steps + 1, Sampling(), read.first.device)
    state, cache = engine.state, engine.cache
    fed = [list(turn) for turn in turns]
    likeliest: list[list[int]] = [[] for _ in cases]
    logits: list[list[Tensor]] = [[] for _ in cases]

    def settle(b: int, token: int) -> None:
        i = len(likeliest[b])
        likeliest[b].append(token)
        fed[b].append(path[b][min(i, len(path[b]) - 1)] if path else token)

    for b, turn in enumerate(turns):
        if not turn:
            settle(b, int(read.first[b]))
    for t in range(steps):
        state.token.copy_(torch.tensor([row[t] for row in fed]))
        out = engine.model.step(state.token, state.position, cache)
        cache.advance(state.active)
        state.position.add_(state.active)
        for b, token in enumerate(out.argmax(-1).tolist()):
            if t + 1 >= len(turns[b]):
                settle(b, token)
                logits[b].append(out[b])
        if not path and all(set(row) & set(engine.eos) for row in likeliest):
            break
    return [row[:limit] for row in likeliest], [torch.stack(rows) for rows in logits]


def divergence(want: Tensor, got: Tensor) -> Tensor:
    """KL of the second distribution from the first, both log-probabilities (N, V): (N,) nats."""
    return (want.exp() * (want - got)).sum(-1)


def cut(tokens: list[int], eos: Sequence[int], limit: int) -> list[int]:
    """Up to the end token or the limit, the end token left out."""
    ends = [i for i, token in enumerate(tokens) if token in eos]
    return tokens[: min([*ends[:1], limit])]


class Lab:
    """One model, and what every variant of a run has in common."""

    def __init__(self, model: Model, processor: Processor, name: str):
        self.model, self.processor, self.name = model, processor, name

    @torch.no_grad()
    def read(self, cases: Sequence[Case], config: HybridConfig) -> Read:
        prefills = [Prefill(case.prompt.prunable, config, spans=case.prompt.spans) for case in cases]
        read = [self.model.prefill(case.prompt, prefill) for case, prefill in zip(cases, prefills, strict=True)]
        logits, positions = zip(*read, strict=True)
        return Read(prefills, torch.cat(logits).argmax(-1), list(positions))

    @torch.no_grad()
    def measure(
        self, cases: Sequence[Case], variants: Sequence[Variant], answers: bool = True
    ) -> Iterator[tuple[str, list[dict]]]:
        """For each variant, one record a case: right (None without `answers`), kl, bytes, attended tokens."""
        eos = self.model.cfg.eos_token_id
        reads: dict[tuple, Read] = {}
        path: list[list[int]] = []
        for variant in variants:
            config = variant.complete()
            key = tuple(getattr(config, name) for name in PROFILED)
            if key not in reads:
                reads = {key: self.read(cases, config)}  # one at a time: these are whole caches
            read = reads[key]
            if not path:
                path, logits = decode(Engine(self.model, config, "dense", eos, compile=False), read, cases)
                path = [cut(row, eos, case.limit) or row[:1] for row, case in zip(path, cases, strict=True)]
                # The end token is judged, too: as many distributions as the answer has tokens.
                counts = [len(row) + bool(case.then) for row, case in zip(path, cases, strict=True)]
                reference = [rows[:n].log_softmax(-1) for rows, n in zip(logits, counts, strict=True)]
            engine = Engine(self.model, config, variant.policy, eos, compile=False)
            tokens, logits = decode(engine, read, cases, path)
            kl = [
                float(divergence(want, rows[: len(want)].log_softmax(-1)).mean())
                for want, rows in zip(reference, logits, strict=True)
            ]
            del logits
            deviates = any(
                cut(row, eos, min(case.limit, len(want) + 1)) != want
                for row, case, want in zip(tokens, cases, path, strict=True)
            )
            cached, new = engine.cache.count_bytes(), engine.cache.new_chunks(steps_of(cases, path))
            if answers and deviates:
                tokens, _ = decode(engine, read, cases)  # following its own tokens, it goes elsewhere
            yield (
                variant.name,
                [
                    {
                        "right": case.right(self.processor.decode(cut(row, eos, case.limit)))
                        if answers and case.right
                        else None,
                        "kl": divergence,
                        "resident_bytes": cached.resident / len(cases),
                        "full_bytes": cached.full / len(cases),
                        "step_bytes": cached.step / len(cases),
                        "new_chunks": new,
                        "attended_tokens": engine.stats.attended_tokens,
                        "prompt_tokens": len(case.prompt.input_ids),
                        "visual_tokens": case.prompt.visual_tokens,
                    }
                    for case, row, divergence in zip(cases, tokens, kl, strict=True)
                ],
            )


def load_lab(name: str, device: str) -> Lab:
    """A model by name (fetched and converted if need be) or folder, in float32."""
    folder = MODEL if name == "demo" else fetch(name) if name in REAL else name
    return Lab(from_pretrained(folder, dtype=torch.float32, device=device), Processor.from_pretrained(folder), name)
