"""A second question about what was read once, under every policy: each prunes anew, or must do with what was kept.

    python -m bench.second --tokens 1024 --subjects 20 --out bench/results/second.jsonl
    python -m bench.second --model smollm2 --tokens 2000 --subjects 8 --out bench/results/second.jsonl

Two questions about one board (the bundled model) or one long text with facts in it (any other). `anew`: the second is
asked of the reading, and makes a plan of its own. `kept`: it finds what was kept for the first, as in a cache that is
pruned once. `int8`: it is asked of a reading in a byte a number. KL is that to the full cache, along its answer, in
nats a token, the first token left out, which no cache has a part in; `rounded` that from `anew` to `int8`.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor

from bench.common import cpu_name, write_row
from bench.judge import Lab, Read, cut, decode, divergence, load_lab
from bench.readings import POLICY, Asked, Kept, LabOnReading, board_questions, text_questions
from bench.report import bootstrap
from bench.tasks import Case
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine
from hybridkv.int8 import Int8
from hybridkv.planning.policies import POLICIES

WAYS = ("anew", "kept", "int8")


class Subject:
    """One board or text, read once, and its two questions."""

    def __init__(self, lab: Lab, asked: Sequence[Asked], config: HybridConfig):
        self.lab, self.config, self.eos = lab, config, lab.model.cfg.eos_token_id
        self.first, self.second = (Case(one.prompt, one.right, one.limit) for one in asked)
        reading = Engine(lab.model, config, compile=False).read(asked[0].prompt)
        self.bytes = {"anew": reading.bytes}
        small = replace(reading, k=[Int8.of(t) for t in reading.k], v=[Int8.of(t) for t in reading.v], fits={})
        self.bytes["int8"] = small.bytes
        self.reads = {"anew": self._read(reading, self.second), "int8": self._read(small, self.second)}
        self.before = self._read(reading, self.first)
        full = Engine(lab.model, config, "dense", self.eos, compile=False)
        (path,), (logits,) = decode(full, self.reads["anew"], [self.second])
        self.path = cut(path, self.eos, self.second.limit) or path[:1]
        self.logits = logits[: len(self.path)]

    def _read(self, reading: object, case: Case) -> Read:
        lab = LabOnReading(self.lab.model, self.lab.processor, self.lab.name)
        lab.reading = reading
        return lab.read([case], self.config)

    def asked(self, policy: str) -> dict:
        """By one policy: for each way, whether the answer is right and how far it diverges."""
        row, logits = {}, {}
        for way in WAYS:
            engine = Engine(self.lab.model, self.config, Kept(POLICIES[policy]), self.eos, compile=False)
            if way == "kept":
                decode(engine, self.before, [self.first], [[0]])  # plans for the first question
            read = self.reads.get(way, self.reads["anew"])
            (tokens,), (logits[way],) = decode(engine, read, [self.second], [self.path])
            if cut(tokens, self.eos, len(self.path) + 1) != self.path:
                (tokens,), _ = decode(engine, read, [self.second])  # following its own tokens, it goes elsewhere
            text = self.lab.processor.decode(cut(tokens, self.eos, self.second.limit))
            row |= {f"right_{way}": self.second.right(text), f"kl_{way}": self._from(self.logits, logits[way])}
        return row | {"kl_rounded": self._from(logits["anew"], logits["int8"])}

    def _from(self, want: Tensor, got: Tensor) -> float:
        """KL along the path, both logits (N, V), in nats a token."""
        want = want[: len(self.path)].log_softmax(-1)
        return float(divergence(want, got[: len(want)].log_softmax(-1)).mean())


def questions(lab: Lab, tokens: int, index: int, task: str) -> list[Asked]:
    """Two of the same length, so that what was kept for one can be read by the other."""
    if lab.name == "demo":
        drawn = board_questions(lab.processor, tokens, 14, index, task)
    else:
        drawn = text_questions(lab.processor, tokens, 14, index)
    pairs = itertools.combinations(drawn, 2)
    return list(next((a, b) for a, b in pairs if len(a.prompt.input_ids) == len(b.prompt.input_ids)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="demo", help="demo, smollm2, qwen or a checkpoint folder (default: demo)")
    add("--tokens", type=int, default=1024, help="of the board or text (default: 1024)")
    add("--subjects", type=int, default=20, help="boards or texts (default: 20)")
    add("--task", choices=("lookup", "lookups", "chain", "right"), default="lookups", help="about boards")
    add("--policies", nargs="+", choices=POLICIES, default=["full", *POLICY])
    add("--budget", type=float, default=0.1)
    add("--device", default="cpu")
    add("--out", type=Path, help="append JSON lines to this file")
    args = parser.parse_args(argv)
    if args.subjects < 1:
        parser.error("one subject at least makes a measurement")
    lab, config = load_lab(args.model, args.device), HybridConfig(budget=args.budget, strict=False)
    command = f"python -m bench.second {' '.join(sys.argv[1:] if argv is None else argv)}"
    print(command)
    found: dict[str, list[dict]] = {policy: [] for policy in args.policies}
    for index in range(args.subjects):
        with torch.no_grad():
            subject = Subject(lab, questions(lab, args.tokens, index, args.task), config)
            for policy in args.policies:
                found[policy].append(subject.asked(policy))
    for policy, rows in found.items():
        row = {name: mean(row[name] for row in rows) for name in rows[0]}
        row |= {f"{name}_ci": bootstrap(np.array([each[name] for each in rows], dtype=float)) for name in row}
        print(policy, *(f"{way}: {row[f'right_{way}']:.0%} right, KL {row[f'kl_{way}']:.5f};" for way in WAYS))
        print(f"{'':{len(policy)}} int8 from anew: KL {row['kl_rounded']:.6f}", flush=True)
        about = {"model": args.model, "tokens": args.tokens, "task": args.task if lab.name == "demo" else "needle"}
        row |= {"reading_bytes": subject.bytes["anew"], "int8_bytes": subject.bytes["int8"], "budget": args.budget}
        about |= {"machine": cpu_name(), "torch": torch.__version__, "command": command}
        write_row(args.out, row | {"subjects": args.subjects, "policy": policy} | about)


if __name__ == "__main__":
    main()
