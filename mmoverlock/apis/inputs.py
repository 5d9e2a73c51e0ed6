"""What inference reads: pictures, folders, globs, videos, https addresses, arrays. One picture in memory at a time."""

import glob
import os
import os.path as osp
import re
import tempfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Iterable, Iterator, List, Optional, Union
from urllib.parse import urlparse

import cv2
import numpy as np

from ..cli import UserError

PICTURES = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.tif', '.tiff', '.ppm', '.pgm')
VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv', '.flv')
_MAGIC = re.compile(r'[*?[]')


@dataclass
class Source:
    """One input: a picture or a video, not read yet.

    Attributes:
        input: Path, address, or array.
        name (str): What its results are called: relative, without ending, no two alike.
        is_video (bool): Whether it has frames.
    """

    input: Union[str, np.ndarray]
    name: str
    is_video: bool = False

    @property
    def label(self) -> str:
        """str: What people call it."""
        return self.input if isinstance(self.input, str) else self.name


@dataclass
class Picture:
    """A picture or a frame of a video, or why there is none.

    Attributes:
        source (Source): Where it is from.
        image (np.ndarray | None): (H, W, 3) uint8, BGR; None if it cannot be read.
        error (str | None): Why it cannot be read.
        frame (int | None): Number of the frame in a video, from 0.
        fps (float | None): Frames a second of a video.
    """

    source: Source
    image: Optional[np.ndarray] = None
    error: Optional[str] = None
    frame: Optional[int] = None
    fps: Optional[float] = None


def expand(inputs) -> List[Source]:
    """All pictures and videos that the inputs name.

    Args:
        inputs (str | PathLike | np.ndarray | PIL.Image.Image | Sequence): One or several of: a picture or video file;
            a folder, searched with all folders in it; a glob such as ``'data/**/*.jpg'``; an https address; an array
            (H, W, 3) or (H, W), uint8, BGR as OpenCV has it; a Pillow image. Of folders and globs, what has the ending
            of a picture or video.

    Returns:
        list[Source]: In the order given; within a folder or glob by name.

    Raises:
        mmoverlock.cli.UserError: A file is missing, nothing is found, or an address is not https.
    """
    if isinstance(inputs, (str, os.PathLike, np.ndarray)) or hasattr(inputs, 'convert'):
        inputs = [inputs]
    sources, taken = [], set()
    for number, one in enumerate(inputs):
        if isinstance(one, (str, os.PathLike)):
            found = _named(os.fspath(one))
        else:
            found = [Source(_array(one, number), f'{number:06d}')]
        for source in found:
            source.name = _unused(source.name, taken)
        sources += found
    if not sources:
        raise UserError('no inputs: name pictures, folders, globs, videos or https addresses')
    return sources


def _named(path: str) -> List[Source]:
    if '://' in path:
        if not path.startswith('https://'):
            raise UserError(f'{path}: only https is read from, as anyone on the way could change the picture')
        return [_source(path, osp.splitext(osp.basename(urlparse(path).path))[0] or urlparse(path).hostname)]
    path = osp.expanduser(path)
    if osp.isfile(path):
        return [_source(path, Path(path).stem)]
    if osp.isdir(path):
        root, found = path, glob.glob(osp.join(glob.escape(path), '**', '*'), recursive=True)
    elif _MAGIC.search(path):
        root, found = osp.dirname(path[: _MAGIC.search(path).start()]), glob.glob(path, recursive=True)
    else:
        raise UserError(f'input not found: {path} (looked for {osp.abspath(path)})')
    found = sorted(f for f in found if f.lower().endswith(PICTURES + VIDEOS) and osp.isfile(f))
    if not found:
        raise UserError(f'no picture and no video in {path} (endings: {" ".join(PICTURES + VIDEOS)})')
    return [_source(f, _relative(f, root)) for f in found]


def _relative(path: str, root: str) -> str:
    """The path from a folder, without ending; never leading out of the folder that results are written to."""
    parts = Path(osp.relpath(path, root or '.')).with_suffix('').parts
    return '/'.join(part for part in parts if part != '..')


def _source(path: str, name: str) -> Source:
    ending = urlparse(path).path if path.startswith('https://') else path
    return Source(path, name, ending.lower().endswith(VIDEOS))


def _unused(name: str, taken: set) -> str:
    """The name, with a number if another input has it; case does not tell files apart everywhere."""
    new, number = name, 1
    while new.lower() in taken:
        number += 1
        new = f'{name}-{number}'
    taken.add(new.lower())
    return new


def _array(image, number: int) -> np.ndarray:
    if hasattr(image, 'convert'):  # of Pillow
        image = np.asarray(image.convert('RGB'))[..., ::-1]
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size:
        if image.ndim == 2:
            return np.repeat(image[..., None], 3, axis=2)
        if image.ndim == 3 and image.shape[2] == 3:
            return np.ascontiguousarray(image)
    what = f'{image.dtype} {image.shape}' if isinstance(image, np.ndarray) else type(image).__name__
    raise UserError(
        f'input {number} is {what}: name a file, or give an array (height, width, 3) of uint8, blue first, or a '
        'Pillow image'
    )


def count(sources: Iterable[Source]) -> Optional[int]:
    """How many pictures and frames there are, for a progress bar; None where only reading would tell."""
    total = 0
    for source in sources:
        if not source.is_video:
            total += 1
        elif osp.isfile(source.input):
            total += max(int(cv2.VideoCapture(source.input).get(cv2.CAP_PROP_FRAME_COUNT)), 0)
        else:
            return None
    return total


def read(sources: Iterable[Source], flag: str = 'color', backend: Optional[str] = None) -> Iterator[Picture]:
    """Read one picture or frame after the other.

    Args:
        sources (Iterable[Source]): What :func:`expand` found.
        flag (str): Colours, as in ``mmcv.imread``. Defaults to 'color'.
        backend (str, optional): Decoder, as in ``mmcv.imread``. Defaults to None, mmcv's choice.

    Yields:
        Picture: Of a file that cannot be read, one that says why.
    """
    for source in sources:
        if isinstance(source.input, np.ndarray):
            yield Picture(source, source.input)
        elif source.input.startswith('https://'):
            yield from _read_address(source, flag, backend)
        else:
            yield from _read_file(source, source.input, flag, backend)


def _read_address(source: Source, flag: str, backend: Optional[str]) -> Iterator[Picture]:
    from ..checkpoints import fetch

    with tempfile.TemporaryDirectory() as folder:
        path = osp.join(folder, 'input' + osp.splitext(urlparse(source.input).path)[1])
        try:
            fetch(source.input, path)
        except (OSError, ValueError, HTTPException) as error:  # urllib's own are OSErrors
            yield Picture(source, error=f'cannot be fetched ({error})')
            return
        yield from _read_file(source, path, flag, backend)


def _read_file(source: Source, path: str, flag: str, backend: Optional[str]) -> Iterator[Picture]:
    import mmcv

    if source.is_video:
        yield from _read_video(source, path)
        return
    try:
        content = Path(path).read_bytes()
        image = mmcv.imfrombytes(content, flag=flag, backend=backend) if content else None
        reason = 'it is not a picture, or damaged' if content else 'the file is empty'
    except Exception as error:  # each decoder has errors of its own
        image, reason = None, str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if image is None:
        yield Picture(source, error=f'cannot be read ({reason})')
    else:
        yield Picture(source, image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2))


def _read_video(source: Source, path: str) -> Iterator[Picture]:
    video, frame = cv2.VideoCapture(path), 0
    try:
        fps = video.get(cv2.CAP_PROP_FPS) or 25.0
        while True:
            read, image = video.read()
            if not read:
                break
            yield Picture(source, image, frame=frame, fps=fps)
            frame += 1
    finally:
        video.release()
    if not frame:
        yield Picture(source, error='cannot be read (it is not a video, damaged, or of a codec that OpenCV lacks)')
