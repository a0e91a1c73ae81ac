"""A long text to ask about: a made-up harbour logbook, the same at every run, with a fact hidden in the middle."""

import random

BOATS = ["the ferry Alder", "a grain barge", "two trawlers", "the pilot boat", "a coal steamer", "the mail packet"]
WEATHER = [
    "fog until noon",
    "a light wind from the west",
    "heavy rain",
    "clear skies",
    "a falling glass",
    "sleet and gusts",
]
WORK = [
    "mended the east ladder",
    "painted six buoys",
    "counted the oil drums",
    "tarred the slip",
    "wound the tower clock",
]
PEOPLE = [
    "the harbour master",
    "old Ines",
    "the customs man",
    "the cooper's son",
    "a sailor from Cork",
    "the night watch",
]
REMARKS = [
    "asked for a berth and was given the north one",
    "complained about the price of rope",
    "brought letters and three crates of lemons",
    "left before the tide turned",
    "stayed for supper and told of ice in the strait",
]
FACT = "The magic number of the lighthouse is 58213."
QUESTION = "What is the magic number of the lighthouse?"


def logbook(days: int = 60, seed: int = 0) -> str:
    """About 40 tokens a day; the fact stands 40% in."""
    pick = random.Random(seed)
    lines = []
    for day in range(1, days + 1):
        lines.append(
            f"Day {day}. {pick.choice(WEATHER).capitalize()}. In came {pick.choice(BOATS)}; {pick.choice(PEOPLE)} "
            f"{pick.choice(REMARKS)}. We {pick.choice(WORK)} and {pick.choice(WORK)}."
        )
        if day == round(days * 0.4):
            lines[-1] += f" {FACT}"
    return "\n".join(lines)


if __name__ == "__main__":
    print(logbook())
