"""Samples, files and numbers of every kind for `hybridkv.calibrate`; the cases are drawn and counted by `fuzz_cli`."""

import json
import random

import torch

from hybridkv import HeadProfile, HybridConfig, calibrate
from tests.cli_world import World, refused, run


def draw_sample(world: World, r: random.Random) -> object:
    """A line of a samples file that is as it should be, more often than not."""
    row = {"prompt": "Where does V3 point?", "images": [world.path("wide.png")]}
    return r.choice(
        [
            row,
            row,
            row,
            row | {"context": "V3 K8 " * 20},
            row | {"prompt": r.choice([3, None, "", ["a"], "\ud800", {}])},
            row
            | {"images": r.choice([world.path("wide.png"), None, [3], [None], [["a.png"]], ["none.png"], ["\0"], {}])},
            row | {"context": r.choice([3, None, ["a"], "\ud800"])},
            row | {r.choice(["image", "Prompt", "videos", ""]): []},
            r.choice([3, None, "prompt", ["prompt"], {}, {"images": []}]),
        ]
    )


def good_sample(row: object, world: World) -> bool:
    if not isinstance(row, dict) or "prompt" not in row or row.keys() - {"prompt", "images", "context"}:
        return False
    images, texts = row.get("images", []), (row["prompt"], row.get("context", ""))
    paths = isinstance(images, list) and all(image == world.path("wide.png") for image in images)
    return paths and all(isinstance(x, str) and "\ud800" not in x for x in texts) and bool(row["prompt"])


def calibrate_case(world: World, r: random.Random) -> tuple[list[str], str]:
    """As `generate_case`, for `hybridkv.calibrate`: a whole profile is written, or what was there is left alone."""
    samples, out = world.folder / "samples.jsonl", world.folder / "out" / "profile.json"
    rows = [draw_sample(world, r) for _ in range(r.choice((1, 1, 2)))]
    lines = [json.dumps(row, ensure_ascii=r.random() < 0.5) for row in rows]
    if broken := r.random() < 0.15:
        lines.append(r.choice(["{", "prompt", "[" * 100_000, '{"prompt": "a", "prompt": "b"}', "\ufeff{}", "9" * 5000]))
    samples.write_bytes(r.choice(["\n", "\r\n", "\n\n"]).join(lines).encode("utf-8", "surrogatepass"))
    out.parent.mkdir(exist_ok=True)
    out.write_text("before")
    new, budget, where = "1", "0.5", str(out)
    if spoilt := r.random() < 0.3:
        new, budget, where = r.choice(
            [
                (r.choice(["0", "-1", "x", "nan", "9" * 20]), budget, where),
                (new, r.choice(["0", "1", "nan", "-1", "2", "inf", "x"]), where),
                (
                    new,
                    budget,
                    r.choice(["", ".", "/", world.path("no/p.json"), world.path("circle"), "/dev/null", "a\0b"]),
                ),
                (new, budget, world.path("x" * 300)),
            ]
        )
    argv = [
        "--model=demo",
        "--device=cpu",
        f"--prompts={samples}",
        f"--out={where}",
        f"--new-tokens={new}",
        f"--budget={budget}",
    ]
    outcome = run(calibrate.main, argv)
    leftovers = [path.name for path in out.parent.iterdir() if path != out] + [*world.folder.glob(".*.tmp")]
    if broken or spoilt or not all(good_sample(row, world) for row in rows):
        ok = refused(outcome, "calibrate") and out.read_text() == "before" and not outcome.out
        return [*argv, *lines], "refused" if ok and not leftovers else "wrong"
    prompts = [world.processor(row["prompt"], images=row["images"], context=row.get("context", "")) for row in rows]
    config, eos = HybridConfig(budget=0.5, strict=False), world.model.cfg.eos_token_id
    profile, there = calibrate.calibrate(world.model, prompts, config, eos, 1, "demo"), HeadProfile.load(out)
    same = torch.equal(profile.need, there.need) and torch.equal(profile.visual, there.visual)
    return [*argv, *lines], "right" if outcome.code == 0 and same and not outcome.err and not leftovers else "wrong"
