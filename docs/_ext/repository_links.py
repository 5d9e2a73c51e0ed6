"""Links that leave the pages (``../configs/...``, ``../tools/...``) name the file instead: the site has pages only.

The pages are also read in a checkout, where such links work as they are. A link to a file that is not there is a
warning, and thus an error of the build.
"""

import re
from pathlib import Path

from sphinx.util import logging

DOCS = Path(__file__).resolve().parents[1]
LINK = re.compile(r'\[([^\]]*)\]\((\.\./[^)#\s]*)(?:#[^)]*)?\)')
logger = logging.getLogger(__name__)


def name_files(app, docname, source):
    folder = (DOCS / docname).parent

    def replace(match):
        text, target = match.groups()
        path = (folder / target).resolve()
        if not path.exists():
            logger.warning('%s: no such file: %s', docname, target)
        name = path.relative_to(DOCS.parent).as_posix()
        return f'`{name}`' if text.strip('`') in (name, path.name) else f'{text} (`{name}`)'

    source[0] = LINK.sub(replace, source[0])


def setup(app):
    app.connect('source-read', name_files)
    return dict(version='1', parallel_read_safe=True, parallel_write_safe=True)
