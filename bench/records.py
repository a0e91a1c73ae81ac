"""What was measured on each prompt, on disk: a long run goes on where it was cut off, or to more prompts."""

import json
from pathlib import Path


class Records:
    """Lists of records by a text key, appended to a file of JSON lines as they come; in memory without a file."""

    def __init__(self, file: Path | None):
        self.file, self.known = file, {}
        if file and file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    key, rows = json.loads(line)
                except ValueError:  # the last line of a run that was cut off while it wrote
                    continue
                self.known[key] = rows

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def __getitem__(self, key: str) -> list[dict]:
        return self.known[key]

    def add(self, key: str, rows: list[dict]) -> None:
        self.known[key] = rows
        if self.file:
            with open(self.file, "a", encoding="utf-8") as out:
                out.write(json.dumps([key, rows]) + "\n")
