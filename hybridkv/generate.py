"""Ask a vision-language model about pictures, video or a long text, with a compressed key-value cache.

Without arguments it shows a bundled demo: a small trained model, a picture, and the answers of both caches.

examples:
  the bundled demos, and one of them:
    python -m hybridkv.generate --list-demos
    python -m hybridkv.generate --demo chain --budget 0.2
  one picture, a tenth of the cache:
    python -m hybridkv.generate --model Qwen/Qwen2.5-VL-3B-Instruct --image street.jpg --prompt "What is written here?"
  the same beside the full cache:
    python -m hybridkv.generate --model FOLDER --image a.png --image b.png --prompt "What changed?" --compare
  a long text, for scripts:
    python -m hybridkv.generate --model FOLDER --context report.txt --prompt "Who signed it?" --json

The answer streams to stdout; progress and the table go to stderr. `--budget` bounds the bytes that a decoding step
needs of the prompt's cache, sketches and tables included. Chunks of dynamic heads stay on the device for now:
`resident` shows what is held, `read/step` what a step reads.
"""

import argparse
import json
from collections.abc import Sequence

import torch
from tqdm import tqdm

from hybridkv import demos
from hybridkv.cli import (
    Parser,
    Status,
    can_compile,
    check_length,
    choose_device,
    one_line_errors,
    positive,
    read_text,
    say,
)
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine
from hybridkv.model import InputError, Model, Processor, Prompt, from_pretrained
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.planning.policies import POLICIES
from hybridkv.report import report, table
from hybridkv.sampling import Sampling

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_parser() -> Parser:
    parser = Parser("generate", __doc__)
    add = parser.add_argument
    once = {"action": "once"}
    add(
        "--model",
        metavar="NAME",
        help="a checkpoint folder, a name on the Hugging Face Hub, or demo: the bundled one",
        **once,
    )
    add("--prompt", metavar="TEXT", help="the question; always kept in the cache", **once)
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
    add("--demo", metavar="NAME", help="a bundled model, pictures and question, beside the full cache", **once)
    add("--list-demos", action="store_true", help="name the bundled demos and stop")
    add(
        "--head-profile",
        metavar="FILE",
        help="of hybridkv.calibrate: classifies heads by it, and serves sparsemm",
        **once,
    )
    add("--compare", action="store_true", help="answer with the full cache, too, and show both")
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
    add("--no-compile", action="store_true", help="run the decoding step uncompiled: starts at once, decodes slower")
    add("--json", action="store_true", help="one JSON object for each policy on stdout, nothing else there")
    return parser


def choose_demo(args: argparse.Namespace) -> demos.Demo | None:
    """Fills in what a demo stands for; None if the command line brings its own model and question."""
    own = args.image or args.video or any(x is not None for x in (args.model, args.prompt, args.context))
    if args.demo is None and own:
        missing = [name for name in ("model", "prompt") if getattr(args, name) is None]
        if missing:
            raise InputError(f"--{missing[0]} is missing; without any of --model, --prompt, --image a demo runs")
        args.model = demos.MODEL if args.model == "demo" else args.model
        return None
    if own:
        raise InputError("--demo brings its own model, pictures and question: leave --model, --prompt, --image out")
    known, name = demos.by_name(), demos.DEFAULT if args.demo is None else args.demo
    if name not in known:
        raise InputError(f"there is no demo {name!r}; there are {', '.join(known)}")
    demo = known[name]
    args.model, args.prompt, args.image, args.compare = demos.MODEL, demo.prompt, demo.images, True
    return demo


def cache_config(args: argparse.Namespace) -> HybridConfig:
    """A budget that was asked for is kept or refused; the default gives way where a prompt is too short for it."""
    if args.policy == "full" and args.budget is not None:
        raise InputError("--policy full keeps everything, whatever --budget says: leave one of the two out")
    chosen = {"strict": False} if args.budget is None else {"budget": args.budget}
    if args.head_profile is not None:
        chosen |= {"classifier": "profile", "head_profile": HeadProfile.load(args.head_profile)}
    return HybridConfig(**chosen)


def read_inputs(args: argparse.Namespace, device: torch.device) -> tuple[Model, Processor, Prompt]:
    """The model, its processor and the prompt. What is cheap to check is checked before the weights are read."""
    processor = Processor.from_pretrained(args.model)
    prompt = processor(
        args.prompt,
        images=args.image,
        videos=args.video,
        context="" if args.context is None else read_text(args.context),
        fps=args.fps,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
    )
    check_length(prompt, args.max_new_tokens, processor.cfg.max_position_embeddings)
    dtype = DTYPES[args.dtype] or (torch.float32 if device.type == "cpu" else None)
    return from_pretrained(args.model, dtype=dtype, device=device), processor, prompt


def answer(
    engine: Engine, processor: Processor, prompt: Prompt, max_new_tokens: int, sampling: Sampling, show: bool
) -> tuple[str, list[int]]:
    """One answer, its text and its tokens, streamed to stdout if `show`."""
    status, token_ids, shown, text = Status(), [], 0, ""
    bar = tqdm(total=engine.model.cfg.num_hidden_layers, desc="prefill", unit="layer", leave=False, disable=None)
    for n, (token,) in enumerate(engine.stream([prompt], max_new_tokens, sampling, on_layer=bar.update)):
        bar.close()
        status.clear()
        if token not in engine.eos:
            token_ids.append(token)
        text = processor.decode(token_ids)
        if n == 0 and engine.compile:
            status.show("compiling the decoding step, once for prompts of about this size ...")
        elif show:
            whole = text.rstrip("\ufffd")  # what an unfinished character decodes to
            print(whole[shown:], end="", flush=True)
            shown = max(shown, len(whole))
    status.clear()
    if show:
        print(text[shown:])
    return text, token_ids


def run(args: argparse.Namespace) -> None:
    """What the command does. All that can be refused without the model is refused first."""
    if args.list_demos:
        print("\n".join(f"{demo.name:10}{demo.about}" for demo in demos.by_name().values()))
        return
    config, sampling = cache_config(args), Sampling(args.temperature, args.top_p, args.seed)
    demo, device = choose_demo(args), choose_device(args.device)
    if demo and not args.json:
        pictures = " ".join(str(image) for image in demo.images)
        print(f"demo:     {demo.name} (--list-demos names the others)\npicture:  {pictures}")
        print(f"question: {demo.prompt}\nright:    {demo.answer}\n", flush=True)
    model, processor, prompt = read_inputs(args, device)
    compile = not args.no_compile and can_compile(device)
    rows = []
    for policy in dict.fromkeys((args.policy, "full") if args.compare else (args.policy,)):
        if args.compare and not args.json:
            print(f"--- {policy} cache" + (f", budget {config.budget:g}" if policy != "full" else ""), flush=True)
        engine = Engine(model, config, policy, model.cfg.eos_token_id, compile)
        text, token_ids = answer(engine, processor, prompt, args.max_new_tokens, sampling, show=not args.json)
        rows.append(report(prompt, policy, text, token_ids, engine))
        if args.json:
            print(json.dumps(rows[-1]), flush=True)
    if not args.json:
        say("\n" + table(rows))


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    with one_line_errors(parser, "lower --max-pixels, shorten the context, or use --dtype bfloat16"):
        run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
