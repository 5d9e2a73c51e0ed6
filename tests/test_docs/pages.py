"""The pages of the documentation and the commands on them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
BLOCK = re.compile(r'^( *)```(\w+)[^\n]*\n(.*?)^\1```', re.MULTILINE | re.DOTALL)


def commands(page):
    """The commands of a page's ``bash`` blocks, in order.

    A command is a line, with those that it continues on; comment lines are left out.

    Args:
        page (Path): A Markdown file.

    Returns:
        list[str]: As they stand there.
    """
    found = []
    for indent, language, text in BLOCK.findall(page.read_text()):
        assert language not in ('sh', 'shell', 'console'), f'{page.name}: call a block of commands bash'
        if language != 'bash':
            continue
        lines = re.sub(r'\\\n', ' ', text.replace('\n' + indent, '\n')).splitlines()
        found += [line.strip() for line in lines if line.strip() and not line.strip().startswith('#')]
    return found
