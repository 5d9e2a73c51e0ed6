"""What is wrong with labels and pictures: collected, so that a user sees all of it at once."""

import sys
from collections import Counter
from typing import List

SHOWN = 20


class Problems:
    """Mistakes that stop a conversion (or are left out of it), and remarks that do not.

    Attributes:
        found (list[str]): One line a mistake: the file, the place in it, what is wrong and what to do.
        notes (Counter): Remark to how often it applied.
    """

    def __init__(self):
        self.found: List[str] = []
        self.notes: Counter = Counter()

    def add(self, where, what: str) -> None:
        """Note a mistake.

        Args:
            where (str | Path): The file, with the line or the object in it.
            what (str): What is wrong there, and what to do.
        """
        line = f'{where}: {what}'
        if line not in self.found:  # a picture that two labels name
            self.found.append(line)

    def note(self, text: str) -> None:
        """Count a remark."""
        self.notes[text] += 1

    def show(self, file=None) -> None:
        """Print the mistakes, the first twenty of them, on stderr."""
        file = file or sys.stderr
        for line in self.found[:SHOWN]:
            print(f'  {line}', file=file)
        if len(self.found) > SHOWN:
            print(f'  ... and {len(self.found) - SHOWN} more', file=file)

    def lines(self) -> List[str]:
        """The remarks, each with its count."""
        return [f'{text} ({count})' if count > 1 else text for text, count in self.notes.items()]
