"""Seconds to the first compiled decoding step, against depth: with an empty compile cache, and with a warm one.

    python -m bench.compile_time --depths 2 8 28

All layers share one compiled region, so the time should hardly grow. Each measurement is a process of its own with a
compile cache of its own; the second run of the same process finds it warm. A row counts the graphs found in it, too.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from torch._dynamo.utils import counters

from bench.common import add_model_arguments, describe, make_model, write_row
from bench.decode import ours
from hybridkv.config import HybridConfig

CONTEXT = 2048


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--depths", type=int, nargs="+", default=[2, 8, 28], help="layers (default: 2 8 28)")
    add("--policies", nargs="+", default=["dense", "full", "hybridkv"])
    add("--one", action="store_true", help=argparse.SUPPRESS)  # measure one depth here, print the seconds
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.one:
        policy = args.policies[0]
        each = ours(make_model(args), policy, HybridConfig(budget=0.2 if policy == "hybridkv" else 1.0), CONTEXT, 1, 8)
        print(each.warm_up().compile_s, counters["aot_autograd"]["autograd_cache_hit"])
        return

    given = list(sys.argv[1:] if argv is None else argv)
    about = describe("bench.compile_time", args, argv)
    print(f"{'layers':>8} {'cache':>12} {'cold, s':>9} {'warm, s':>9}")
    for depth in args.depths:
        for policy in args.policies:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "bench.compile_time", *given, "--one"]
                command += ["--layers", str(depth), "--policies", policy]
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
                row = {"contender": policy}
                for run in ("cold", "warm"):
                    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
                    seconds, hits = done.stdout.split()
                    row |= {f"{run}_s": float(seconds), f"{run}_hits": int(hits)}
            print(f"{depth:8d} {policy:>12} {row['cold_s']:9.1f} {row['warm_s']:9.1f}", flush=True)
            write_row(args.out, row | about | {"layers": depth})


if __name__ == "__main__":
    main()
