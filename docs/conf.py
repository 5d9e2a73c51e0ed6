"""Sphinx configuration: `make docs` builds the site from these pages and the docstrings, warnings as errors."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / '_ext'), str(HERE.parent)]

from mmoverlock.version import __version__  # noqa: E402

project = 'mmoverlock'
author = 'The mmoverlock contributors'
copyright = '2026, the mmoverlock contributors; Apache-2.0'
version = release = __version__

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.mathjax',
    'sphinx_copybutton',
    'repository_links',
    'model_zoo',
]
exclude_patterns = ['_build']
html_theme = 'furo'
html_title = f'mmoverlock {__version__}'

myst_enable_extensions = ['dollarmath', 'linkify', 'colon_fence']
myst_linkify_fuzzy_links = False
myst_heading_anchors = 3

autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # types stand in the docstrings
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Comments and prompts are not what a reader wants to paste.
copybutton_prompt_text = r'\$ |>>> '
copybutton_prompt_is_regexp = True
