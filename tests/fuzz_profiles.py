"""Files of head profiles: valid ones must be read to the number, others refused with one ValueError.

python -m tests.fuzz_profiles --cases 5000
"""

import argparse
import json
import math
import random
import tempfile
from collections import Counter
from pathlib import Path

from hybridkv import HeadProfile

ODD = [
    None,
    True,
    "x",
    "",
    -1,
    0,
    10**400,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    [],
    {},
    [[]],
    [[1], [1, 2]],
    [1, 2],
    [["a"]],
]


def valid(rng: random.Random) -> tuple[dict, bytes]:
    """A profile as a dictionary, and a file that says it, perhaps in another way than ours."""
    layers, heads = rng.randint(1, 40), rng.randint(1, 16)
    scale = rng.choice([1e-6, 1.0, 30.0])
    tables = {
        name: [[rng.random() * scale for _ in range(heads)] for _ in range(layers)] for name in ("need", "visual")
    }
    row = tables | {"prompts": rng.randint(1, 99), "model": rng.choice(["", "demo", "ein Modell, 模型"])}
    shuffled = dict(rng.sample(sorted(row.items()), len(row))) | rng.choice([{}, {"more": 1}])
    text = json.dumps(shuffled, indent=rng.choice([None, 2]), ensure_ascii=rng.random() < 0.5)
    return row, text.encode()


def broken(rng: random.Random) -> bytes:
    """A file that is no profile: a field is missing, odd or of another shape, or its bytes are damaged."""
    row, data = valid(rng)
    match rng.choice(["drop", "odd", "number", "shape", "bytes", "cut", "other"]):
        case "drop":
            row.pop(rng.choice(list(row)))
        case "odd":
            name = rng.choice(["need", "visual"])
            row[name] = rng.choice(ODD)
        case "number":
            table = row[rng.choice(["need", "visual"])]
            line = rng.choice(table)
            line[rng.randrange(len(line))] = rng.choice([None, "x", -0.1, math.nan, math.inf, 10**400, [], {}])
        case "shape":
            table = row[rng.choice(["need", "visual"])]
            rng.choice(
                [table.pop, lambda: table[0].append(0.5), lambda: table.append([]), lambda: table.append([0.5] * 99)]
            )()
        case "bytes":
            return data.replace(b"]", rng.choice([b"", b"}", b"\xff", b"\x00"]), 1)
        case "cut":
            return data[: rng.randrange(len(data) - 3)]
        case "other":
            return rng.choice(
                [b"", b"[]", b"null", b"3", b'"x"', b"[" * 100_000, b"\xff\xfe", b"{}", b'{"need": [[1]]}']
            )
    return json.dumps(row).encode()


def fuzz(cases: int, seed: int = 0) -> dict[str, int]:
    """Counts of outcomes: right, refused, and, which must be none, wrong."""
    rng, counts = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "heads.json")
        for case in range(cases):
            row, data = valid(rng)
            good = rng.random() < 0.4
            file.write_bytes(data if good else broken(rng))
            try:
                profile = HeadProfile.load(file)
            except ValueError as e:
                outcome = "refused" if not good and str(e) and str(file) in str(e) else "wrong"
            else:
                same = all(
                    abs(a - b) <= 1e-6 * b
                    for name in ("need", "visual")
                    for got, want in zip(getattr(profile, name).tolist(), row[name], strict=True)
                    for a, b in zip(got, want, strict=True)
                )
                same &= (profile.prompts, profile.model) == (row["prompts"], row["model"])
                outcome = "right" if good and same else "wrong"
            counts[outcome] += 1
            if outcome == "wrong":
                print(f"case {case} of seed {seed} is wrong: {file.read_bytes()[:200]!r}")
    return dict(counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(fuzz(args.cases, args.seed))
