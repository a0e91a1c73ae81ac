"""Measures an offline head profile: which KV heads need retrieval, and which look at pictures, on sample prompts.

    python -m hybridkv.calibrate --model demo --out heads.json
    python -m hybridkv.calibrate --model FOLDER --prompts samples.jsonl --out heads.json

Use it with `python -m hybridkv.generate --head-profile heads.json`, or from Python as
`HybridConfig(classifier="profile", head_profile=HeadProfile.load("heads.json"))`. A line of the samples is
`{"prompt": "...", "images": ["a.png"], "context": "..."}`; images, whose names are relative to the folder that the
command is run in, and context may be left out. The bundled model is measured on the bundled demos if no samples are
given.

Without a profile of your own, `python -m hybridkv.generate` measures a model once on samples that are built in, and
takes from that only which layers retrieve. A profile of prompts like yours knows better, and is the best there is.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from hybridkv import demos
from hybridkv.cli import Parser, check_length, choose_device, one_line_errors, positive, read_text, replacing
from hybridkv.config import HybridConfig
from hybridkv.model import InputError, Model, Processor, Prompt, from_pretrained
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.need import measure_heads

NEW_TOKENS = 32  # of an answer that are looked at


def check_prunes(config: HybridConfig) -> None:
    """Refuses a budget that leaves nothing to measure."""
    if config.budget == 1:
        raise ValueError("a budget of 1 prunes nothing: give a smaller one")


@torch.no_grad()
def calibrate(
    model: Model, prompts: Sequence[Prompt], config: HybridConfig, eos: Sequence[int], new_tokens: int, name: str = ""
) -> HeadProfile:
    """Reads each prompt, writes up to `new_tokens` tokens with the full cache, and averages what pruning a head does.

    Raises:
        ValueError: nothing to measure: a budget that prunes nothing, or no prompt that got an answer.
    """
    check_prunes(config)
    each = [
        measure_heads(model, prompt, config, new_tokens, eos)
        for prompt in tqdm(prompts, desc="prompts", leave=False, disable=None)
    ]
    measured = [profile for profile in each if profile is not None]
    if not measured:
        raise ValueError("no prompt got an answer of a single token: nothing was measured")
    return HeadProfile.join(measured, name)


def read_samples(file: Path, processor: Processor, new_tokens: int) -> list[Prompt]:
    """One prompt a line; see the module.

    Raises:
        InputError: a line is no sample, or what it names can't be read; the message has its number.
    """
    prompts = []
    for n, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = sample(line)
            prompt = processor(row["prompt"], images=row.get("images", []), context=row.get("context", ""))
            check_length(prompt, new_tokens, processor.cfg.max_position_embeddings)
        except ValueError as e:
            raise InputError(f"{file}, line {n}: {e}") from e
        prompts.append(prompt)
    return prompts


def sample(line: str) -> dict:
    """A line of the samples. Nothing in it is left unread: what has no meaning here is refused."""

    def unique(pairs: list[tuple]) -> dict:
        if len(pairs) > len(dict(pairs)):
            raise ValueError("a key is there twice")
        return dict(pairs)

    try:
        row = json.loads(line, object_pairs_hook=unique)
    except RecursionError:
        row = None
    if not isinstance(row, dict) or "prompt" not in row:
        raise ValueError('must hold one JSON object with a "prompt"')
    if unknown := sorted(row.keys() - {"prompt", "images", "context"}):
        raise ValueError(f"unknown key {unknown[0]!r}: a sample has prompt, images and context")
    images = row.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError("images must be a list of file names")
    for key in ("prompt", "context"):
        if not isinstance(row.get(key, ""), str):
            raise ValueError(f"{key} must be a text")
    return row


def build_parser() -> Parser:
    parser = Parser("calibrate", __doc__)
    add = parser.add_argument
    add("--model", metavar="NAME", required=True, help="a checkpoint folder, a Hub name, or demo: the bundled one")
    add("--prompts", metavar="FILE", type=Path, help="sample prompts, JSON lines (default for demo: the bundled demos)")
    add("--out", metavar="FILE", type=Path, required=True, help="the profile, a small JSON file; replaced if it exists")
    add("--budget", metavar="B", type=float, default=0.1, help="what heads are pruned to, in (0, 1) (default: 0.1)")
    add(
        "--new-tokens",
        metavar="N",
        type=positive,
        default=NEW_TOKENS,
        help=f"longest answer looked at (default: {NEW_TOKENS})",
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    return parser


def run(args: argparse.Namespace) -> None:
    """What the command does. All that can be refused without the model is refused first."""
    config, device = HybridConfig(budget=args.budget, strict=False), choose_device(args.device)
    check_prunes(config)
    if args.prompts is None and args.model != "demo":
        raise InputError("--prompts is missing: only the bundled model has samples of its own")
    with replacing(args.out, "--out") as file:
        folder = demos.MODEL if args.model == "demo" else args.model
        processor = Processor.from_pretrained(folder)
        if args.prompts is None:
            prompts = [processor(demo.prompt, images=demo.images) for demo in demos.by_name().values()]
        else:
            prompts = read_samples(args.prompts, processor, args.new_tokens)
        model = from_pretrained(folder, dtype=torch.float32 if device.type == "cpu" else None, device=device)
        profile = calibrate(model, prompts, config, model.cfg.eos_token_id, args.new_tokens, args.model)
        profile.save(file)
    print(f"{args.out}: {profile.need.shape[0]} layers x {profile.need.shape[1]} KV heads, {profile.prompts} prompts")


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    with one_line_errors(parser, "use shorter samples, with smaller pictures"):
        run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
