"""Draws the demo's picture: a street at night, the same at every run.

python -m demo.scene FILE
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw


def scene(width: int = 1120, height: int = 1120, seed: int = 0) -> Image.Image:
    pick = random.Random(seed)
    image = Image.new("RGB", (width, height), "#101a3a")
    draw = ImageDraw.Draw(image)
    for _ in range(150):
        x, y = pick.randrange(width), pick.randrange(height // 2)
        draw.ellipse((x, y, x + 3, y + 3), fill="#f5f0c0")
    draw.ellipse((width * 0.75, 80, width * 0.75 + 130, 210), fill="#f4eecb")
    x = 0
    while x < width:
        w, h = pick.randrange(90, 190), pick.randrange(300, 760)
        draw.rectangle(
            (x, height - h, x + w - 6, height), fill=pick.choice(["#3b2f4f", "#26354a", "#4a2f33", "#2d4038"])
        )
        for wx in range(x + 14, x + w - 30, 34):
            for wy in range(height - h + 18, height - 120, 46):
                draw.rectangle((wx, wy, wx + 16, wy + 24), fill=pick.choice(["#ffd97a", "#ffd97a", "#1b2233"]))
        x += w
    draw.rectangle((380, height - 170, 760, height - 90), fill="#b03030", outline="white", width=4)
    draw.text((420, height - 155), "HOTEL", fill="white", font_size=44)
    return image


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    scene().save(parser.parse_args().file)
