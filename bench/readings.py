"""Read once, ask often: time to the first token of question 1 and of those after it, and whether answers suffer.

    python -m bench.readings --tokens 1024 4096 --questions 5 --out rows.jsonl

Questions about one board (the bundled model) or one long text with facts in it (any other) are asked against a reading,
and again with everything read anew. `kept` asks question 2 and later of what was kept for question 1, as a cache does
that is pruned once. Nothing is compiled. Seconds are of the processor on a CPU with one thread (so that other work on
the machine does not count), else of the clock; their medians are shown. KL is that to the full cache, in nats a token.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from bench.common import cpu_name, write_row
from bench.judge import Lab, Read, Variant, load_lab
from bench.tasks import PLACES, Case, code, filler
from demo import boards as bd
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine
from hybridkv.model import Model, Processor, Prompt
from hybridkv.planning.plan import Plan
from hybridkv.planning.policies import POLICIES
from hybridkv.planning.prefill import Prefill
from hybridkv.read_on import PrefillOn
from hybridkv.reading import Question, Reading

POLICY = ("hybridkv", "snapkv", "adakv")


@dataclass(frozen=True)
class Asked:
    """A question as a whole prompt, and what says whether an answer is right."""

    prompt: Prompt
    right: Callable[[str], bool]
    limit: int


def board_questions(processor: Processor, tokens: int, n: int, index: int, task: str) -> list[Asked]:
    """Questions of one kind about one board of the test split."""
    side = round(tokens**0.5)
    rng = bd.rng_for("test", 10_000 * tokens + 900_000_000 + index)
    boards = bd.make_boards(rng, 1, side, side)
    image = Image.fromarray(bd.draw(rng, boards[0]))
    asked = []
    for _ in range(n):
        question = bd.ask(rng, boards, task)
        right = lambda text, answer=question.answer: text.strip() == answer  # noqa: E731
        prompt = processor(question.text, images=[image])
        asked.append(Asked(prompt, right, len(question.answer.split()) + 2))
    return asked


def text_questions(processor: Processor, tokens: int, n: int, index: int) -> list[Asked]:
    """Questions about facts that are scattered in one long text."""
    rng = random.Random(f"readings/{tokens}/{index}")
    per_line = len(processor.tokenizer("\n".join(filler(random.Random(0), 100)))["input_ids"]) / 100
    lines, places = filler(rng, max(n + 2, int(tokens / per_line))), rng.sample(PLACES, min(n, len(PLACES)))
    secrets = [code(rng) for _ in places]
    for place, secret in zip(places, secrets, strict=True):
        lines.insert(rng.randint(1, len(lines) - 1), f"The secret number of the {place} is {secret}.")
    text = "\n".join(lines)
    return [
        Asked(
            processor(f"What is the secret number of the {place}? Answer with one sentence.", context=text),
            lambda text, secret=secret: secret in text,
            24,
        )
        for place, secret in zip(places, secrets, strict=True)
    ]


class LabOnReading(Lab):
    """Reads only what a reading lacks of each prompt."""

    reading: Reading

    @torch.no_grad()
    def read(self, cases: Sequence[Case], config: HybridConfig) -> Read:
        read, start = [], self.reading.tokens
        for case in cases:
            record = PrefillOn(self.reading, case.prompt.prunable, config, spans=case.prompt.spans)
            read.append((record, *self.model.prefill(case.prompt, record, start)))
        prefills, logits, positions = zip(*read, strict=True)
        return Read(list(prefills), torch.cat(logits).argmax(-1), list(positions))


def divergence(lab: Lab, asked: list[Asked], policy: str, config: HybridConfig) -> list[float]:
    """Mean KL to the full cache, in nats a token, of each answer; one question at a time, as memory allows."""
    variant = Variant(policy, policy, config)
    cases = [Case(one.prompt, one.right, one.limit) for one in asked]
    return [rows[0]["kl"] for case in cases for _, rows in lab.measure([case], [variant], answers=False)]


class Kept:
    """A policy that keeps for every question what another one kept for the first."""

    def __init__(self, policy: Callable[[Prefill], Plan]):
        self.policy, self.first = policy, None

    def __call__(self, prefill: Prefill) -> Plan:
        if self.first is None:
            plan = self.policy(prefill)
            scores = plan.score and [plan.score(prefill, layer) for layer in range(len(prefill.layers))]
            self.first = replace(plan, score=scores and (lambda prefill, layer: scores[layer]))
        return self.first


def clock(device: torch.device) -> Callable[[], float]:
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def timed(work: Callable[[], object], now: Callable[[], float]) -> tuple[float, object]:
    start = now()
    done = work()
    return now() - start, done


class Packing(Engine):
    """Notes the seconds of packing: where it follows the reading, since the policy wants to see the prompt first."""

    pack_s: float | None = None

    def _fill(self, *args: object) -> None:
        self.pack_s, _ = timed(partial(super()._fill, *args), clock(self.model.device))


def measure(lab: Lab, asked: list[Asked], policy: str, config: HybridConfig, times_only: int = 0) -> dict:
    """One subject's questions, asked in both ways. Lists are of the questions after the first.

    Args:
        times_only: so many of them are read anew, and nothing but times is measured; 0 for all there is.
    """
    model, processor = lab.model, lab.processor
    eos, now = model.cfg.eos_token_id, clock(model.device)
    engine = Packing(model, config, policy, eos, compile=False)

    def ask(prompt: Prompt) -> tuple[float, float | None]:
        """Seconds to the first token, and those of packing."""
        return timed(lambda: engine.ask(reading, prompt, 1), now)[0], engine.pack_s

    read_s, reading = timed(lambda: engine.read(asked[0].prompt), now)
    next_s, pack_s = zip(*[ask(one.prompt) for one in asked], strict=True)
    again_s = [timed(lambda p=one.prompt: engine.generate([p], 1), now)[0] for one in asked[1:][: times_only or None]]
    row = {
        "read_s": read_s,
        "first_s": read_s + next_s[0],
        "next_s": list(next_s[1:]),
        "pack_share": [pack / whole for pack, whole in zip(pack_s[1:], next_s[1:], strict=True) if pack is not None],
        "again_s": again_s,
        "reading_bytes": reading.bytes,
        "prompt_tokens": len(asked[0].prompt.input_ids),
        "new_tokens_read": len(asked[-1].prompt.input_ids) - reading.tokens,
    }
    if times_only:
        return row
    same, right, right_again = [], [], []
    for one in asked[1:]:
        given, whole = (engine.generate([p], one.limit)[0] for p in (Question(one.prompt, reading), one.prompt))
        same.append(given == whole)
        right.append(one.right(processor.decode(given.token_ids)))
        right_again.append(one.right(processor.decode(whole.token_ids)))
    on_reading = LabOnReading(model, processor, lab.name)
    on_reading.reading = reading
    return row | {
        "same": same,
        "right": right,
        "right_again": right_again,
        "kl": divergence(on_reading, asked[1:], policy, config),
        "kl_again": divergence(lab, asked[1:], policy, config),
        "right_kept": kept_for_the_first(model, processor, asked, policy, config),
    }


def kept_for_the_first(
    model: Model, processor: Processor, asked: list[Asked], policy: str, config: HybridConfig
) -> list[bool]:
    """Whether later questions are answered from what was kept for the first; those of its length can be asked."""
    engine = Engine(model, config, Kept(POLICIES[policy]), model.cfg.eos_token_id, compile=False)
    engine.generate([asked[0].prompt], 1)
    alike = [one for one in asked[1:] if len(one.prompt.input_ids) == len(asked[0].prompt.input_ids)]
    return [one.right(processor.decode(engine.generate([one.prompt], one.limit)[0].token_ids)) for one in alike]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="demo", help="demo, smollm2, qwen or a checkpoint folder (default: demo)")
    add("--tokens", nargs="+", type=int, default=[1024], help="of the board or text (default: 1024)")
    add("--questions", type=int, default=5, help="about each subject (default: 5)")
    add("--subjects", type=int, default=1, help="boards or texts (default: 1)")
    add("--task", choices=("lookup", "lookups", "chain", "right"), default="lookup", help="about boards")
    add("--policies", nargs="+", choices=POLICIES, default=list(POLICY))
    add("--budget", type=float, default=0.1)
    add(
        "--times-only",
        type=int,
        nargs="?",
        const=99,
        default=0,
        metavar="N",
        help="leave out answers and divergence, "
        "which take several times as long, and read everything anew for N later questions only",
    )
    add("--device", default="cpu")
    add("--out", type=Path, help="append JSON lines to this file")
    args = parser.parse_args(argv)
    if args.questions < 2 or args.subjects < 1:
        parser.error("at least two questions, and one subject, make a measurement")

    lab, config = load_lab(args.model, args.device), HybridConfig(budget=args.budget, strict=False)
    command = f"python -m bench.readings {' '.join(sys.argv[1:] if argv is None else argv)}"
    about = {"machine": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__, "command": command}
    print(command)
    heads = f"{'tokens':>6} {'policy':>10} {'question 1':>11} {'later':>8} {'anew':>8} {'sooner':>7}"
    print(f"{heads}  same, right, anew, kept; KL, anew")
    for tokens in args.tokens:
        for policy in args.policies:
            runs = []
            for index in range(args.subjects):
                if args.model == "demo":
                    asked = board_questions(lab.processor, tokens, args.questions, index, args.task)
                else:
                    asked = text_questions(lab.processor, tokens, args.questions, index)
                runs.append(measure(lab, asked, policy, config, args.times_only))
            row = summary(runs) | {"model": args.model, "tokens": tokens, "task": args.task, "policy": policy}
            found = "" if args.times_only else f"{shares(row)}; {row['kl']:.4f}, {row['kl_again']:.4f}"
            print(
                f"{tokens:6d} {policy:>10} {row['first_s']:9.2f} s {row['next_s']:6.3f} s {row['again_s']:6.2f} s "
                f"{row['first_s'] / row['next_s']:6.1f}x  {found}",
                flush=True,
            )
            write_row(args.out, row | {"budget": args.budget} | about)


def shares(row: dict) -> str:
    found = [row[name] for name in ("same", "right", "right_again", "right_kept")]
    return ", ".join("-" if share is None else f"{share:.0%}" for share in found)


def summary(runs: list[dict]) -> dict:
    """Medians of seconds, shares of answers, the rest of the first subject."""
    row = {}
    for name, value in runs[0].items():
        values = [v for run in runs for v in (run[name] if isinstance(value, list) else [run[name]])]
        if name.endswith("_s"):
            row[name] = statistics.median(values)
        elif isinstance(value, list):
            row[name] = statistics.mean(values) if values else None
        else:
            row[name] = value
    return row | {"questions": sum(len(run["next_s"]) for run in runs)}


if __name__ == "__main__":
    main()
