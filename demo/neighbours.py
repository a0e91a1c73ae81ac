"""How often a cell's neighbour is misread, and where on the board: what most wrong answers on large boards come from.

    python -m demo.neighbours hybridkv/demos/boards --sides 16 32 64 --boards 4

For every cell with a key, what the head that reads right (or down) would say if it looked at that cell alone; see
`Trainee.readings`. Edges are cells whose row or column, along the direction, is in the first or last eighth.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from demo import boards as bd
from demo.batches import IMAGE, READS, Batch, Scene, make_batch
from demo.trainee import RETRIEVES, answer_states, reading_heads
from demo.vocabulary import KEY_TOKENS
from hybridkv.model import Model, from_pretrained

KINDS = ("right", "down")


@torch.no_grad()
def misread(model: Model, batch: Batch, scene: Scene) -> dict[str, Tensor]:
    """For `right` and `down` (rows, cols) of one board: 1 misread, 0 read, nan where a key or its neighbour is none."""
    said: dict[str, Tensor] = {}

    def watch(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
        if layer != RETRIEVES:
            return
        out = rearrange(model.layers[layer].self_attn.o_proj.weight, "c (q d) -> q d c", d=v.shape[3])
        groups, heads = reading_heads(len(out), v.shape[1])
        cells = v[0, :, : len(batch.prefix)][:, batch.prefix == IMAGE]  # (H, cells, D)
        for kind in KINDS:
            i = READS.index(kind)
            said[kind] = cells[groups[i]] @ out[heads[i]]  # (cells, C)

    answer_states(model, model.embed_tokens.weight, model.visual(batch.patches, batch.grids), batch, watch)
    names = model.lm_head.weight[KEY_TOKENS.start : KEY_TOKENS.stop]
    wrong = {}
    for kind in KINDS:
        first, second = batch.cells[kind].T
        judged = (batch.cells["key"][:, 0] < len(bd.GLYPHS)) & (first < len(bd.GLYPHS))
        wrong[kind] = ((said[kind] @ names.T).argmax(-1) != first * len(bd.GLYPHS) + second).float()
        wrong[kind] = wrong[kind].masked_fill(~judged, torch.nan).view(scene.rows, scene.cols)
    return wrong


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint folder")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[16, 32, 64], help="rows and columns (default: 16 32 64)"
    )
    parser.add_argument("--boards", type=int, default=4, help="boards of each size (default: 4)")
    parser.add_argument("--split", choices=bd.SPLITS, default="validation")
    args = parser.parse_args(argv)
    model = from_pretrained(args.folder, dtype=torch.float32)
    print("| board | direction | cells | misread | at edges | elsewhere |\n|---|---|---|---|---|---|")
    for side in args.sides:
        scene, found = Scene(side, side), {kind: [] for kind in KINDS}
        for i in tqdm(range(args.boards), desc=f"{side} x {side}", leave=False, disable=None):
            batch = make_batch(bd.rng_for(args.split, 1_000_000 * side + i), scene, 1, {"lookup": 1.0}, 24)
            for kind, wrong in misread(model, batch, scene).items():
                found[kind].append(wrong if kind == "down" else wrong.T)  # along the first dimension
        for kind, boards in found.items():
            wrong = torch.stack(boards)
            rim = max(1, side // 8)
            shares = (wrong, torch.cat([wrong[:, :rim], wrong[:, -rim:]], 1), wrong[:, rim:-rim])
            cells = int((~wrong.isnan()).sum())
            print(f"| {side} x {side} | {kind} | {cells} | " + " | ".join(f"{s.nanmean():.2%}" for s in shares) + " |")


if __name__ == "__main__":
    main()
