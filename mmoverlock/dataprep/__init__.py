"""Data of your own: read common label formats, check them, write what the configs read. See docs/your-own-data.md.

Nothing here needs mmdet, mmseg or mmpretrain, but :func:`contact_sheet`, which shows what they will read.
"""

from .contact_sheet import contact_sheet
from .convert import READERS, RECORD, Options, Result, convert

__all__ = ['READERS', 'RECORD', 'Options', 'Result', 'contact_sheet', 'convert']
