"""The commands of docs/real-data.md, nine trainings: in a file, and so in a process, of their own."""

import sandbox
from pages import ROOT
from test_commands import follow


def test_commands(tmp_path):
    follow(ROOT / 'docs/real-data.md', sandbox.make(tmp_path), set())
