"""Do the built-in samples choose the layers that samples of a task would?

    python -m bench.layers --model smollm2 --task-profiles bench/results/profile-smollm2.json --out FILE

Measures the built-in profile, unless FILE has it. For a quarter and a half of the layers: how many both choose, and
what share of the need that the task's profile found lies in the layers chosen by the built-in one (in brackets: in the
layers that it would choose itself).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.judge import load_lab
from hybridkv.planning.classify import highest
from hybridkv.planning.head_profile import HeadProfile
from hybridkv.profiles import builtin_profile

SHARES = (0.25, 0.5)


def compared(ours: HeadProfile, theirs: HeadProfile, share: float) -> tuple[int, int, float, float]:
    """Layers that both choose, layers chosen, and the share of their need in our choice and in theirs."""
    need = theirs.need.sum(1)
    mine, best = (highest(profile.need.sum(1), share) for profile in (ours, theirs))
    covered, most = (float(need[chosen].sum() / need.sum()) for chosen in (mine, best))
    return int((mine & best).sum()), int(best.sum()), covered, most


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="as in bench.quality")
    parser.add_argument("--task-profiles", type=Path, nargs="+", required=True, help="of hybridkv.calibrate")
    parser.add_argument("--out", type=Path, help="the built-in profile; taken from there if it exists")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.out and args.out.exists():
        ours = HeadProfile.load(args.out)
    else:
        lab = load_lab(args.model, args.device)
        ours = builtin_profile(lab.model, lab.processor)
        if args.out:
            ours.save(args.out)
    for file in args.task_profiles:
        for share in SHARES:
            both, chosen, covered, most = compared(ours, HeadProfile.load(file), share)
            agreed = f"{both} of {chosen} the same, {covered:.0%} ({most:.0%}) of the need"
            print(f"{file.stem}, {share:g} of the layers: {agreed}")


if __name__ == "__main__":
    main()
