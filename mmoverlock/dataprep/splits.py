"""Which picture is trained on, and which are held out."""

import random
from collections import Counter, defaultdict
from typing import List

from ..cli import UserError
from .samples import Sample

SPLITS = ('train', 'val', 'test')


def assign(samples: List[Sample], val: float, test: float, seed: int, anew: bool, problems) -> None:
    """Give every picture its split.

    A split of the source's own is kept, where it has one for validation. Else pictures are drawn by chance, those of a
    classification data set by class, so that each class is held out in proportion.

    Args:
        samples (list[Sample]): The pictures; ``split`` is set.
        val (float): Share of pictures to validate on.
        test (float): Share of pictures to test on.
        seed (int): Of the drawing: the same pictures and seed give the same split.
        anew (bool): Whether to disregard the source's own split.
        problems (Problems): Gets remarks.

    Raises:
        UserError: If there are too few pictures.
    """
    own = {s.split for s in samples}
    if anew or not {'train', 'val'} <= own:
        drawn = [s for s in samples if anew or s.split != 'test']
        if len(drawn) < 2:
            raise UserError(f'{len(drawn)} picture: two are needed at least, one to train on and one to validate')
        _draw(drawn, val, 0.0 if 'test' in own and not anew else test, random.Random(seed))
    counts = Counter(s.split for s in samples)
    if not counts['train']:
        raise UserError('no picture is left to train on: lower --val and --test')
    _warn_of_copies(samples, problems)


def _draw(samples: List[Sample], val: float, test: float, rng: random.Random) -> None:
    groups = defaultdict(list)
    for sample in sorted(samples, key=lambda s: (s.name, str(s.picture.path))):
        groups[sample.label].append(sample)
    for _, group in sorted(groups.items(), key=lambda item: str(item[0])):
        rng.shuffle(group)
        numbers = [max(1, round(len(group) * share)) if share else 0 for share in (val, test)]
        while sum(numbers) >= len(group) and any(numbers):  # one to train on at least
            numbers[numbers.index(max(numbers))] -= 1
        for i, sample in enumerate(group):
            sample.split = 'val' if i < numbers[0] else 'test' if i < sum(numbers) else 'train'


def _warn_of_copies(samples: List[Sample], problems) -> None:
    """A picture that is trained on and held out makes results too good."""
    places = defaultdict(list)
    for sample in samples:
        places[sample.picture.digest].append(sample)
    for copies in places.values():
        if len({s.split for s in copies}) > 1:
            first, second = copies[0].picture.path.name, copies[1].picture.path.name
            problems.note(f'the same picture is in two splits ({first} and {second}, for example): results flatter')
            return
