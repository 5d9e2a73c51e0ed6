"""A folder of pictures for each class."""

from pathlib import Path
from typing import List

from ..cli import UserError
from .masks import SPLIT_FOLDERS
from .pictures import Pictures
from .samples import Classes, Sample


def read(source: Path, options, classes: Classes, problems) -> List[Sample]:
    """Read ``CLASS/*`` or ``{train,val,test}/CLASS/*``.

    Args:
        source (Path): The folder.
        options (Options): ``images`` names the folder of classes below it.
        classes (Classes): The class names; by default those of the folders.
        problems (Problems): Gets what is wrong.

    Returns:
        list[Sample]: Pictures with one class each.
    """
    pictures = Pictures(options.folder(source, options.images), problems)
    samples = []
    for path in pictures.all:
        parts = path.relative_to(pictures.folder).parts
        split = SPLIT_FOLDERS.get(parts[0].lower()) if len(parts) > 2 else None
        parts = parts[1:] if split else parts
        if len(parts) < 2:
            problems.add(path, 'is in no folder of a class: move it into one')
            continue
        label = classes.take(parts[0], path)
        picture = label and pictures.usable(path)
        if picture:
            rest = Path(*parts[1:]).with_suffix('').as_posix().replace('/', '_')
            samples.append(Sample(picture, f'{label}/{rest}', split, label=label))
    if not samples and not problems.found:
        raise UserError(f'{pictures.folder} has no folders of classes with pictures in them')
    names = {}
    for sample in samples:
        other = names.setdefault((sample.split, sample.name.lower()), sample)
        if other is not sample:  # a.jpg and a.png, or b/c.jpg and b_c.jpg
            sample.name = f'{sample.name}_{sample.picture.digest[:8]}'
    return samples
