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
  many prompts, a JSON object a line:
    python -m hybridkv.generate --model FOLDER --batch prompts.jsonl --out answers.jsonl

The answer streams to stdout; progress and the table go to stderr. `--budget` bounds the bytes of the prompt's cache,
sketches and tables included: with `--store host`, the default on a GPU, what the device holds (`resident`; chunks of
dynamic heads are in host memory, `host`); with `--store device` what a decoding step reads (`read/step`).
"""

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from hybridkv import demos
from hybridkv.batch import answer_lines
from hybridkv.cli import (
    Parser,
    Status,
    can_compile,
    check_length,
    choose_device,
    one_line_errors,
    read_text,
    replacing,
    say,
)
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine
from hybridkv.html import Run, page
from hybridkv.model import InputError, Model, Processor, Prompt, from_pretrained
from hybridkv.options import (
    add_answer_options,
    add_cache_options,
    add_input_options,
    cache_config,
    weights_dtype,
    with_profile,
)
from hybridkv.report import report, table
from hybridkv.sampling import Sampling

PROFILED = ("hybridkv", "sparsemm")  # policies that go by a head profile


def build_parser() -> Parser:
    parser = Parser("generate", __doc__)
    add, once = parser.add_argument, {"action": "once"}
    add("--prompt", metavar="TEXT", help="the question; always kept in the cache", **once)
    add_input_options(parser)
    add("--demo", metavar="NAME", help="a bundled model, pictures and question, beside the full cache", **once)
    add("--list-demos", action="store_true", help="name the bundled demos and stop")
    add_cache_options(parser)
    add("--compare", action="store_true", help="answer with the full cache, too, and show both")
    add_answer_options(parser)
    add("--report", metavar="FILE", help="a page of HTML: what was kept, and what each word fetched", **once)
    add("--json", action="store_true", help="one JSON object for each policy on stdout, nothing else there")
    add("--batch", metavar="FILE", help="a prompt a line, as JSON (docs/command-line.md); wants --out", **once)
    add(
        "--out",
        metavar="FILE",
        help="where the answers of --batch go; what is answered there is not asked again",
        **once,
    )
    add("--memory", type=float, metavar="GB", help="for the caches of --batch (default: a quarter of what is free)")
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
    args.no_calibration = True  # layers that are all alike compile soonest
    return demo


def check_report(args: argparse.Namespace) -> None:
    """Refuses a page that would take the place of what is asked about."""
    inputs = [*args.image, *args.video, *(x for x in (args.context, args.head_profile) if x is not None)]
    for name in inputs:
        if os.path.exists(name) and os.path.exists(args.report) and os.path.samefile(name, args.report):
            raise InputError(f"--report {args.report} would replace what is asked about: name another file")


def say_unused(args: argparse.Namespace) -> None:
    """Says which options make no difference to this prompt."""
    pictures = bool(args.image or args.video)
    unused = {
        "--fps, without --video,": args.fps != 2 and not args.video,
        "--min-pixels, without pictures,": args.min_pixels is not None and not pictures,
        "--max-pixels, without pictures,": args.max_pixels is not None and not pictures,
        "--top-p, without --temperature,": args.top_p != 1 and args.temperature == 0,
        "--int8-readings, without --batch,": args.int8_readings,
        "--seed, without --temperature,": args.seed != 0 and args.temperature == 0,
    }
    for name, made in unused.items():
        if made:
            say(f"note: {name} makes no difference")


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
        system="" if args.system is None else args.system,
    )
    check_length(prompt, args.max_new_tokens, processor.cfg.max_position_embeddings)
    model = from_pretrained(args.model, dtype=weights_dtype(args.dtype, device), device=device)
    return model, processor, prompt


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
    if args.head_profile is not None and args.policy not in PROFILED:
        raise InputError(f"--policy {args.policy} takes no --head-profile: leave one of the two out")
    config, sampling = cache_config(args), Sampling(args.temperature, args.top_p, args.seed)
    if not (args.batch is args.out is args.memory is None):
        if answer_lines(args, config, sampling, choose_device(args.device)):
            raise SystemExit(2)
        return
    demo, device = choose_demo(args), choose_device(args.device)
    if args.report is not None:
        check_report(args)
    with nullcontext() if args.report is None else replacing(Path(args.report), "--report") as file:
        answer_one(args, config, sampling, demo, device, file)
    say_unused(args)  # last: what is refused says one line


def answer_one(
    args: argparse.Namespace,
    config: HybridConfig,
    sampling: Sampling,
    demo: demos.Demo | None,
    device: torch.device,
    file: Path | None,
) -> None:
    """Answers one prompt with each policy that is asked for; the page about it goes to `file`, if there is one."""
    if demo and not args.json:
        pictures = " ".join(str(image) for image in demo.images)
        print(f"demo:     {demo.name} (--list-demos names the others)\npicture:  {pictures}")
        print(f"question: {demo.prompt}\nright:    {demo.answer}\n", flush=True)
    model, processor, prompt = read_inputs(args, device)
    config = with_profile(args, config, model, processor)
    compile = not args.no_compile and can_compile(device)
    rows, runs = [], []
    for policy in dict.fromkeys((args.policy, "full") if args.compare else (args.policy,)):
        if args.compare and not args.json:
            print(f"--- {policy} cache" + (f", budget {config.budget:g}" if policy != "full" else ""), flush=True)
        engine = Engine(model, config, policy, model.cfg.eos_token_id, compile, record=file is not None)
        text, token_ids = answer(engine, processor, prompt, args.max_new_tokens, sampling, show=not args.json)
        rows.append(report(prompt, policy, text, token_ids, engine))
        if file:
            runs.append(Run.of(engine, token_ids))
        if args.json:
            print(json.dumps(rows[-1]), flush=True)
    if not args.json:
        say("\n" + table(rows))
    if file:
        file.write_text(page(processor, prompt, runs), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    with one_line_errors(parser, "lower --max-pixels, shorten the context, or use --dtype bfloat16"):
        run(parser.parse_args(argv))


if __name__ == "__main__":
    main()
