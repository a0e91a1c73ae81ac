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
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from hybridkv import demos
from hybridkv.config import HybridConfig
from hybridkv.engine import Engine, Stats
from hybridkv.model import CheckpointError, InputError, Model, Processor, Prompt, from_pretrained
from hybridkv.planning.budget import BudgetError
from hybridkv.planning.policies import POLICIES
from hybridkv.sampling import Sampling

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (--help explains)\n")


def build_parser() -> Parser:
    parser = Parser(
        prog="python -m hybridkv.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", metavar="NAME", help="a checkpoint folder, a name on the Hugging Face Hub, or demo: the bundled one")
    add("--prompt", metavar="TEXT", help="the question; always kept in the cache")
    add("--image", action="append", default=[], metavar="FILE", help="a picture; repeat for several")
    add(
        "--video", action="append", default=[], metavar="FILE", help="a video file; needs pip install 'hybridkv[video]'"
    )
    add("--context", metavar="FILE", help="a long UTF-8 text to ask about; can be pruned, like pictures")
    add("--fps", type=float, default=2.0, help="frames taken from a second of video (default: 2)")
    add("--min-pixels", type=int, help="scale smaller pictures up to this area (default: the checkpoint's)")
    add("--max-pixels", type=int, help="scale larger pictures down to this area; 784 pixels are one token")
    add(
        "--policy",
        choices=POLICIES,
        default="hybridkv",
        help="%(choices)s (default: hybridkv; see hybridkv/policies.py)",
    )
    add(
        "--budget",
        type=float,
        help="share of the full cache's bytes (default: 0.1, more for short prompts)",
    )
    add("--demo", metavar="NAME", help="a bundled model, pictures and question, beside the full cache")
    add("--list-demos", action="store_true", help="name the bundled demos and stop")
    add("--head-profile", metavar="FILE", help="of hybridkv.calibrate: classifies heads by it, and serves sparsemm")
    add("--compare", action="store_true", help="answer with the full cache, too, and show both")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest tokens up to this probability (default: 1)")
    add("--seed", type=int, default=0, help="for temperatures above 0 (default: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--dtype", choices=DTYPES, default="auto", help="auto: the checkpoint's on a GPU, float32 on a CPU")
    add("--no-compile", action="store_true", help="run the decoding step uncompiled: starts at once, decodes slower")
    add("--json", action="store_true", help="one JSON object for each policy on stdout, nothing else there")
    return parser


def read_context(path: str | None) -> str:
    if path is None:
        return ""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise InputError(f"{path} does not exist") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 text: {e.reason} at byte {e.start}") from e
    except OSError as e:
        raise InputError(f"{path} can't be read: {e.strerror}") from e
    if not text.strip():
        raise InputError(f"{path} holds no text")
    return text


def choose_demo(args: argparse.Namespace) -> demos.Demo | None:
    """Fills in what a demo stands for; None if the command line brings its own model and question."""
    own = args.model or args.prompt or args.image or args.video or args.context
    if args.demo is None and own:
        missing = [name for name in ("model", "prompt") if not getattr(args, name)]
        if missing:
            raise InputError(f"--{missing[0]} is missing; without any of --model, --prompt, --image a demo runs")
        args.model = demos.MODEL if args.model == "demo" else args.model
        return None
    if own:
        raise InputError("--demo brings its own model, pictures and question: leave --model, --prompt, --image out")
    known, name = demos.load(), args.demo or demos.DEFAULT
    if name not in known:
        raise InputError(f"there is no demo {name!r}; there are {', '.join(known)}")
    demo = known[name]
    args.model, args.prompt, args.image, args.compare = demos.MODEL, demo.prompt, demo.images, True
    return demo


def load(args: argparse.Namespace) -> tuple[Model, Processor, Prompt]:
    """The model, its processor and the prompt. What is cheap to check is checked before the weights are read."""
    try:
        device = torch.device(args.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"device {args.device!r} can't be used: {str(e).splitlines()[0]}") from e
    if args.max_new_tokens < 1:
        raise InputError("--max-new-tokens must be at least 1")
    processor = Processor.from_pretrained(args.model)
    prompt = processor(
        args.prompt,
        images=args.image,
        videos=args.video,
        context=read_context(args.context),
        fps=args.fps,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
    )
    tokens, limit = len(prompt.input_ids), processor.cfg.max_position_embeddings
    if tokens + args.max_new_tokens > limit:
        raise InputError(
            f"the prompt has {tokens} tokens, {prompt.visual_tokens} of them visual; with {args.max_new_tokens} new "
            f"ones that is more than the model's {limit}: shorten the context, or lower --max-pixels, --fps or "
            f"--max-new-tokens"
        )
    dtype = DTYPES[args.dtype] or (torch.float32 if device.type == "cpu" else None)
    return from_pretrained(args.model, dtype=dtype, device=device), processor, prompt


class Status:
    """One line on stderr that says what takes so long; taken away when it is over, if stderr is a terminal."""

    def __init__(self) -> None:
        self.terminal, self.shown = sys.stderr.isatty(), False

    def show(self, text: str) -> None:
        print(text, end="" if self.terminal else "\n", file=sys.stderr, flush=True)
        self.shown = True

    def clear(self) -> None:
        if self.shown and self.terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self.shown = False


def cache_config(args: argparse.Namespace) -> HybridConfig:
    """A budget that was asked for is kept or refused; the default gives way where a prompt is too short for it."""
    chosen = {"strict": False} if args.budget is None else {"budget": args.budget}
    if args.head_profile:
        chosen |= {"classifier": "profile", "head_profile": args.head_profile}
    return HybridConfig(**chosen)


def answer(model: Model, processor: Processor, prompt: Prompt, policy: str, args: argparse.Namespace) -> dict:
    """Generates one answer, streaming it to stdout unless `--json`; returns what `--json` prints."""
    eos = model.cfg.eos_token_id
    engine = Engine(model, cache_config(args), policy, eos=eos, compile=not args.no_compile)
    status, token_ids, shown, text = Status(), [], 0, ""
    bar = tqdm(total=model.cfg.num_hidden_layers, desc="prefill", unit="layer", leave=False, disable=None)
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    steps = engine.stream([prompt], args.max_new_tokens, sampling, on_layer=bar.update)
    for n, (token,) in enumerate(steps):
        bar.close()
        status.clear()
        if token not in eos:
            token_ids.append(token)
        text = processor.decode(token_ids)
        if n == 0 and engine.compile:
            status.show("compiling the decoding step, once for prompts of about this size ...")
        elif not args.json:
            whole = text.rstrip("\ufffd")  # what an unfinished character decodes to
            print(whole[shown:], end="", flush=True)
            shown = max(shown, len(whole))
    bar.close()
    status.clear()
    if not args.json:
        print(text[shown:])
    return report(prompt, policy, text, token_ids, engine.stats, args, model)


def report(
    prompt: Prompt, policy: str, text: str, token_ids: list[int], stats: Stats, args: argparse.Namespace, model: Model
) -> dict:
    """What `--json` prints."""
    budget, needed = cache_config(args).budget, stats.bytes.step / stats.bytes.full
    if policy != "full" and needed > budget < 1:  # only without --budget
        print(
            f"note: a budget of {budget:g} can't hold the text of this short prompt; used {needed:.2f}", file=sys.stderr
        )
        budget = needed
    return {
        "policy": policy,
        "budget": 1.0 if policy == "full" else budget,
        "text": text,
        "token_ids": token_ids,
        "prompt_tokens": len(prompt.input_ids),
        "visual_tokens": prompt.visual_tokens,
        "static_heads": stats.static_heads,
        "dynamic_heads": stats.dynamic_heads,
        "full_bytes": stats.bytes.full,
        "resident_bytes": stats.bytes.resident,
        "step_bytes": stats.bytes.step,
        "new_token_bytes": stats.bytes.new,
        "allocated_bytes": stats.bytes.allocated,
        "attended_tokens": stats.attended_tokens,
        "ttft_s": stats.ttft_s,
        "ms_per_token": stats.ms_per_token,
        "compile_s": stats.compile_s,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def size(n: float) -> str:
    """Bytes in three digits: 1.73 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5 or unit == "GB":
            return f"{n:.3g} {unit}"
        n /= 1000
    raise AssertionError


def table(rows: list[dict]) -> str:
    """The short table under the answers, one line for each policy."""
    first = rows[0]
    text_tokens = first["prompt_tokens"] - first["visual_tokens"]
    lines = [f"prompt: {first['prompt_tokens']} tokens, {text_tokens} text + {first['visual_tokens']} visual"]
    head = ("cache", "heads static/dynamic", "full", "resident", "read/step", "tokens/step", "first token", "ms/token")
    cells = [head]
    for row in rows:
        share = [f"{size(row[key])} ({row[key] / row['full_bytes']:.1%})" for key in ("resident_bytes", "step_bytes")]
        cells.append(
            (
                "full" if row["policy"] == "full" else f"{row['policy']} {row['budget']:.2g}",
                f"{row['static_heads']} / {row['dynamic_heads']}",
                size(row["full_bytes"]),
                *share,
                f"{row['attended_tokens']:.0f} of {row['prompt_tokens']}",
                f"{row['ttft_s']:.2f} s",
                "-" if row["ms_per_token"] is None else f"{row['ms_per_token']:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", "TensorFloat32", UserWarning)  # a hint of the compiler's, for GPUs
    try:
        cache_config(args)  # before anything is loaded
        Sampling(args.temperature, args.top_p, args.seed)
        if args.list_demos:
            print("\n".join(f"{demo.name:10}{demo.about}" for demo in demos.load().values()))
            return
        demo = choose_demo(args)
        if demo and not args.json:
            pictures = " ".join(str(image) for image in demo.images)
            print(f"demo:     {demo.name} (--list-demos names the others)\npicture:  {pictures}")
            print(f"question: {demo.prompt}\nright:    {demo.answer}\n", flush=True)
        model, processor, prompt = load(args)
        rows = []
        for policy in dict.fromkeys((args.policy, "full") if args.compare else (args.policy,)):
            if args.compare and not args.json:
                print(
                    f"--- {policy} cache" + (f", budget {cache_config(args).budget:g}" if policy != "full" else ""),
                    flush=True,
                )
            rows.append(answer(model, processor, prompt, policy, args))
            if args.json:
                print(json.dumps(rows[-1]), flush=True)
        if not args.json:
            print("\n" + table(rows), file=sys.stderr)
    except torch.OutOfMemoryError:
        parser.error("out of memory on the device: lower --max-pixels or the context, or use --dtype bfloat16")
    except (CheckpointError, InputError, BudgetError, ValueError) as e:
        parser.error(" ".join(str(e).split()))
    except KeyboardInterrupt:
        parser.exit(130, "\n")


if __name__ == "__main__":
    main()
