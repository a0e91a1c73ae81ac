"""Options that the commands share: what is asked about, which cache, and how it is answered."""

import argparse
from dataclasses import replace

import torch

from hybridkv.cli import Parser, positive, say
from hybridkv.config import HybridConfig
from hybridkv.model import InputError, Model, Processor
from hybridkv.model.checkpoint import resolve
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.policies import POLICIES
from hybridkv.profiles import brought_profile, builtin_profile

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_input_options(parser: Parser) -> None:
    """The model, and what it is asked about."""
    add, once = parser.add_argument, {"action": "once"}
    add(
        "--model",
        metavar="NAME",
        help="a checkpoint folder, a name on the Hugging Face Hub, or demo: the bundled one",
        **once,
    )
    add("--system", metavar="TEXT", help="the system prompt (default: what the checkpoint's template says)", **once)
    add("--image", action="append", default=[], metavar="FILE", help="a picture; repeat for several")
    add(
        "--video",
        action="append",
        default=[],
        metavar="FILE",
        help="a video file; needs pip install 'hybridkv[video]'; repeat for several",
    )
    add("--context", metavar="FILE", help="a long UTF-8 text to ask about; can be pruned, like pictures", **once)
    add("--fps", type=float, default=2.0, help="frames taken from a second of video (default: 2)")
    add(
        "--min-pixels", type=int, metavar="N", help="scale smaller pictures up to this area (default: the checkpoint's)"
    )
    add(
        "--max-pixels",
        type=int,
        metavar="N",
        help="scale larger pictures down to this area; 28 x 28 pixels are one token",
    )


def add_cache_options(parser: Parser) -> None:
    """Which cache, and how much of it."""
    add = parser.add_argument
    add(
        "--policy",
        choices=POLICIES,
        default="hybridkv",
        help="which cache (default: hybridkv; see hybridkv/planning/policies.py)",
    )
    add(
        "--budget",
        type=float,
        metavar="B",
        help="share of the full cache's bytes in (0, 1], kept or refused (default: 0.1, more for short prompts)",
    )
    add(
        "--store",
        choices=("device", "host"),
        help="where chunks of dynamic heads are: with host, --budget bounds what the device holds (default: host on a "
        "GPU, device on a CPU)",
    )
    add(
        "--head-profile",
        metavar="FILE",
        help="of hybridkv.calibrate: classifies heads by it, and serves sparsemm",
        action="once",
    )
    add(
        "--no-calibration",
        action="store_true",
        help="don't measure which layers need retrieval, once for a checkpoint: all retrieve, which is slower",
    )


def add_answer_options(parser: Parser) -> None:
    """How long answers are, how they are drawn, and where they are computed."""
    add = parser.add_argument
    add("--max-new-tokens", type=positive, default=128, metavar="N", help="longest answer (default: 128)")
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token; else 0.001 to 1000 (default: 0)",
    )
    add(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens up to this probability (default: 1)",
    )
    add("--seed", type=int, default=0, metavar="N", help="for temperatures above 0; 0 or more (default: 0)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: the checkpoint's on a GPU, float32 on a CPU")
    add("--int8-readings", action="store_true", help="what is read once is kept in a byte a number: half of bfloat16")
    add("--no-compile", action="store_true", help="run the decoding step uncompiled: starts at once, decodes slower")


def cache_config(args: argparse.Namespace) -> HybridConfig:
    """A budget that was asked for is kept or refused; the default gives way where a prompt is too short for it."""
    if args.policy == "full" and args.budget is not None:
        raise InputError("--policy full keeps everything, whatever --budget says: leave one of the two out")
    chosen = {"strict": False} if args.budget is None else {"budget": args.budget}
    if args.store is not None:
        chosen |= {"store": args.store}
    if args.head_profile is not None:
        chosen |= {"classifier": "profile", "head_profile": HeadProfile.load(args.head_profile)}
    return HybridConfig(**chosen)


def with_profile(args: argparse.Namespace, config: HybridConfig, model: Model, processor: Processor) -> HybridConfig:
    """The configuration with the checkpoint's own head profile, or a built-in one, if that is wanted and not given."""
    if args.no_calibration or args.policy != "hybridkv" or config.head_profile or config.budget == 1:
        return config
    profile = brought_profile(resolve(args.model))
    if profile is None:
        once = "note: measuring which layers need retrieval, once for this checkpoint (--no-calibration does without)"
        profile = builtin_profile(model, processor, before=lambda: say(once))
    if profile is None:
        say("note: this model can't be asked any of the samples: all layers retrieve")
    return replace(config, head_profile=profile)


def weights_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """What `--dtype` means on a device; None is the checkpoint's own."""
    return DTYPES[name] or (torch.float32 if device.type == "cpu" else None)
