"""Command lines good and bad, run through `main`: a right answer and exit code 0, or one line on stderr and 2.

    python -m tests.fuzz_cli --cases 2500 --seed 0

Every command line is also done without the command: the processor and the engine are called directly, with what plain
Python makes of the words. Where that works the command must give the same; where it does not the command must refuse.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from hybridkv import Engine, HeadProfile, HybridConfig, Sampling, demos, generate
from hybridkv.planning.policies import POLICIES
from hybridkv.profiles import brought_profile
from tests.cli_world import World, bundled_model_kept, files, make_world, refused, run
from tests.fuzz_calibrate import calibrate_case

SLOW = 60  # seconds after which a command line counts as hanging
# What the command prints and the engine says.
SAME = ("policy", "token_ids", "text", "prompt_tokens", "visual_tokens", "step_bytes", "full_bytes")

KINDS = {"valid": 10, "number": 6, "file": 5, "text": 3, "words": 3, "samples": 3}  # how often each is drawn

NUMBERS = [
    "nan", "NaN", "inf", "-inf", "1e400", "1e-400", "1e308", "1e-45", "0", "-0", "0.0", "-1", "1", "2", "0.5", "1.0",
    "007", "1_0", "٣", "", " ", "x", "0x10", "1,5", "1/2", "½", "True", "None", "--", "9" * 20, "-" + "9" * 20,
    "9" * 5000, "0.1\n", "2e0", "+1", "1000000000000", "9223372036854775807", "9223372036854775808", "0.0009", "1001",
    "\udcff",
]  # fmt: skip
NUMERIC = {
    "--budget": float, "--temperature": float, "--top-p": float, "--seed": int, "--fps": float, "--min-pixels": int,
    "--max-pixels": int, "--max-new-tokens": int,
}  # fmt: skip
PIXELS = ("--min-pixels", "--max-pixels")
TEXTS = [
    "", " ", "\n\t", "\ud800", "\udcff what", "\0", "a\0b", "<|image_pad|>", "<|im_end|>", "<|vision_start|>",
    "- what?", "é" * 50, "e\u0301", "🦜", "שלום", "\u202e", "\x1b[31m", "x" * 3000, "%s {} %(prog)s", "a\nb", "\u2028",
    "\ufeff", "\ufffd",
]  # fmt: skip
WORDS = [
    ["--bogus"], ["--bud", "0.5"], ["extra"], ["--image"], ["--budget"], ["--prompt", "again"], ["--model", "demo"],
    ["--demo", "lookup"], ["--demo", "nothing"], ["--demo", ""], ["--policy", "none"], ["--policy", ""],
    ["--dtype", "int8"], ["--dtype", "float64"], ["--device", "hpu"], ["--device", "meta"], ["--device", "cuda:99"],
    ["--device", "cpu:1"], ["--device", ""], ["--device", "\0"], ["--json=yes"], ["--compare", "full"], ["--bo\ngus"],
    ["--\udcff"], ["-x"], ["-1"], ["--no-compile=1"], ["--list-demo"],
]  # fmt: skip


def draw_options(world: World, r: random.Random) -> dict[str, list[str]]:
    """A valid command line, with answers of a token or two, as options and their values."""
    options = {"--model": ["demo"], "--device": ["cpu"], "--max-new-tokens": [r.choice("112")]}
    options["--prompt"] = [r.choice(["Where does V3 point?", "Follow Jt.", "Read right from aj.", "é 🦜?"])]
    if r.random() < 0.8:
        options["--image"] = [
            world.path(r.choice(["small.png", "middle.png", "wide.png"])) for _ in range(r.choice((1, 1, 2)))
        ]
    if r.random() < 0.3:
        options["--context"] = [world.path(r.choice(["context.txt", "bom.txt"]))]
    if r.random() < 0.7:
        options["--budget"] = [r.choice(["0.3", "0.7", "0.9", "1.0", "1"])]
    if r.random() < 0.6:
        options["--policy"] = [r.choice([*POLICIES])]
    if r.random() < 0.2:
        options["--head-profile"] = [world.path("heads.json")]
    if r.random() < 0.3:
        options |= {
            "--temperature": [r.choice(["0.001", "0.7", "1000"])],
            "--top-p": ["0.9"],
            "--seed": [r.choice("01")],
        }
    if r.random() < 0.2:
        options["--max-pixels"] = [r.choice(["20000", "4000"])]
    if r.random() < 0.3:
        options["--store"] = [r.choice(["host", "device"])]
    if r.random() < 0.2:
        options["--report"] = [world.path("report.html")]
    return options


def directly(world: World, options: dict[str, list[str]]) -> dict | None:
    """What the engine says to the same options; None if they can't be used."""
    one = {name: values[0] for name, values in options.items()}
    try:
        number = {name: kind(one[name]) for name, kind in NUMERIC.items() if name in one}
        context = Path(one["--context"]).read_bytes().decode("utf-8-sig") if "--context" in one else ""
        if one["--device"] != "cpu" or ("--context" in one and not context.strip()):
            return None
        prompt = world.processor(
            one["--prompt"],
            images=options.get("--image", []),
            videos=options.get("--video", []),
            context=context,
            fps=number.get("--fps", 2.0),
            min_pixels=number.get("--min-pixels"),
            max_pixels=number.get("--max-pixels"),
        )
        if "--report" in one and not may_replace(Path(one["--report"]), world, options):
            return None
        chosen = {"budget": number["--budget"]} if "--budget" in one else {"strict": False}
        chosen["store"] = one.get("--store", "device")
        if "--head-profile" in one:
            chosen |= {"classifier": "profile", "head_profile": HeadProfile.load(one["--head-profile"])}
        new = number["--max-new-tokens"]
        sampling = Sampling(number.get("--temperature", 0.0), number.get("--top-p", 1.0), number.get("--seed", 0))
        if new < 1 or len(prompt.input_ids) + new > world.processor.cfg.max_position_embeddings:
            return None
        policy = one.get("--policy", "hybridkv")
        if policy == "hybridkv" and "head_profile" not in chosen:
            chosen["head_profile"] = brought_profile(demos.MODEL)
        engine = Engine(world.model, HybridConfig(**chosen), policy, world.model.cfg.eos_token_id, compile=False)
        (result,) = engine.generate([prompt], new, sampling)
    except (ValueError, OSError):
        return None
    row = {"policy": policy, "token_ids": result.token_ids, "text": world.processor.decode(result.token_ids)}
    row |= {"prompt_tokens": len(prompt.input_ids), "visual_tokens": prompt.visual_tokens}
    row |= {"step_bytes": engine.stats.bytes.step, "full_bytes": engine.stats.bytes.full}
    if engine.config.budget == 1 and policy != "full":  # then every policy keeps everything
        full = directly(world, options | {"--policy": ["full"]})
        assert full["token_ids"] == row["token_ids"], "budget 1 differs from the full cache"
    over = policy != "full" and row["step_bytes"] > engine.config.budget * row["full_bytes"]
    seen, drawn = "--image" in options or "--video" in options, sampling.temperature > 0
    unused = (number.get("--fps", 2) != 2 and "--video" not in options) + (not drawn and sampling.top_p != 1)
    unused += (not drawn and sampling.seed != 0) + sum(not seen and name in one for name in PIXELS)
    return row | {"noted": (over and engine.config.budget < 1) + unused}


def may_replace(page: Path, world: World, options: dict[str, list[str]]) -> bool:
    """Whether a page can be written there: not a folder, in one, and not what the command reads."""
    read = [value for name in ("--image", "--context", "--head-profile") for value in options.get(name, [])]
    return not page.is_dir() and page.parent.is_dir() and page not in [Path(value) for value in read]


def generate_case(world: World, r: random.Random, kind: str) -> tuple[list[str], str]:
    """One command line, and what became of it: `right`, `refused`, or `wrong`."""
    options = draw_options(world, r)
    if kind == "number":
        options[r.choice([*NUMERIC])] = [r.choice(NUMBERS)]
    elif kind == "file":
        options[r.choice(["--image", "--video", "--context", "--head-profile"])] = [r.choice(files(world))]
        if r.random() < 0.2:
            options["--report"] = [r.choice([*options.get("--image", []), world.path("folder"), world.path("none/x")])]
    elif kind == "text":
        options["--prompt"] = [r.choice(TEXTS)]
    as_json, compare = r.random() < 0.7, r.random() < 0.2
    argv = ["--no-compile"] + ["--json"] * as_json + ["--compare"] * compare
    for name, values in options.items():
        for value in values:
            argv += [f"{name}={value}"] if value.startswith("-") or r.random() < 0.3 else [name, value]
    argv += r.choice(WORDS) if kind == "words" else []
    page = Path(world.path("report.html"))
    page.unlink(missing_ok=True)
    outcome = run(generate.main, argv)
    if page.exists() and (outcome.code or "</html>" not in page.read_text(encoding="utf-8")):
        return argv, "wrong"
    policy = options.get("--policy", ["hybridkv"])[0]
    unheard = policy == "full" and "--budget" in options
    unheard |= policy not in ("hybridkv", "sparsemm") and "--head-profile" in options
    row = None if kind == "words" or unheard else directly(world, options)
    if row is None:
        return argv, "refused" if refused(outcome, "generate") and not (as_json and outcome.out) else "wrong"
    rows = [row]
    if compare and row["policy"] != "full":
        rows.append(directly(world, options | {"--policy": ["full"]}))
    if as_json:
        printed = [json.loads(line) for line in outcome.out.splitlines()]
        same = [{key: x[key] for key in SAME} for x in printed] == [{key: x[key] for key in SAME} for x in rows]
        notes = outcome.err.count("\n") == outcome.err.count("note: ") == row["noted"]
    else:
        budget = float(options.get("--budget", ["0.1"])[0])
        heads = [f"--- {x['policy']} cache" + f", budget {budget:g}" * (x["policy"] != "full") + "\n" for x in rows]
        same = outcome.out == "".join(head * compare + f"{x['text']}\n" for head, x in zip(heads, rows, strict=True))
        notes = outcome.err.count("note: ") == row["noted"] and "read/step" in outcome.err
    asked = "--report" in options
    return argv, "right" if outcome.code == 0 and same and notes and page.exists() == asked else "wrong"


def fuzz(cases: int, seed: int, verbose: bool = False) -> dict[str, int]:
    """Counts of what became of the cases: right, refused, wrong, traceback, slow."""
    counts, threads = Counter(right=0, refused=0, wrong=0, traceback=0, slow=0), torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        with bundled_model_kept(world):
            for case in range(cases):
                r = random.Random(f"{seed} {case}")
                kind, start = r.choices([*KINDS], [*KINDS.values()])[0], time.perf_counter()
                try:
                    argv, became = calibrate_case(world, r) if kind == "samples" else generate_case(world, r, kind)
                except Exception as e:  # any at all is what is looked for
                    argv, became = [f"{type(e).__name__}: {e}"], "traceback"
                counts[became] += 1
                slow = time.perf_counter() - start > SLOW
                counts["slow"] += slow
                if verbose and (slow or became in ("wrong", "traceback")):
                    print(f"{became}: case {case}, {kind}: {' '.join(map(repr, argv))[:600]}", flush=True)
    torch.set_num_threads(threads)
    return dict(counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(json.dumps(fuzz(args.cases, args.seed, verbose=True)))
