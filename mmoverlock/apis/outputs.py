"""What inference writes, laid out as mmdet's inferencer does: ``vis/`` and ``preds/``."""

import json
import os.path as osp
from contextlib import ExitStack
from typing import Optional

import cv2
import numpy as np

from ..cli import UserError, replacing
from .inputs import Picture


class Writer:
    """Writes predictions and drawn pictures; every file appears whole or not at all.

    - Picture: ``preds/NAME.json``, ``vis/NAME.jpg``, and of a segmentor ``preds/NAME.png``, whose pixels are labels.
    - Video: ``preds/NAME.jsonl`` with a line for each frame, ``vis/NAME.mp4``, and ``preds/NAME_frames/FRAME.png``.

    Use it as a context: what is still open when an error comes is removed.

    Args:
        inferencer (Inferencer): Whose results are written.
        out (str): Folder, made when the first file is.
        draw (bool): Write ``vis/``. Defaults to True.
        predictions (bool): Write ``preds/``. Defaults to True.

    Raises:
        mmoverlock.cli.UserError: ``out`` is a file.
    """

    def __init__(self, inferencer, out: str, draw: bool = True, predictions: bool = True) -> None:
        if osp.exists(out) and not osp.isdir(out):
            raise UserError(f'{out} is a file; name a folder')
        self.inferencer, self.out = inferencer, out
        self.draw, self.predictions = draw, predictions
        self._source = self._video = self._lines = None
        self._open = ExitStack()

    def __enter__(self) -> 'Writer':
        return self

    def __exit__(self, *error) -> Optional[bool]:
        self._source = self._lines = None
        if self._video is not None:
            self._video.release()
            self._video = None
        return self._open.__exit__(*error)

    def add(self, picture: Picture, sample) -> None:
        """Write one picture or frame.

        Args:
            picture (Picture): What was read.
            sample (DataSample): Its prediction.
        """
        if picture.source is not self._source:
            self.__exit__(None, None, None)  # the video before this one is complete
            self._source, self._open = picture.source, ExitStack()
        if self.predictions:
            self._write_prediction(picture, self.inferencer.result(picture, sample))
        if self.draw:
            drawn = self.inferencer.draw(picture.image, sample)[..., ::-1]
            if picture.frame is None:
                with replacing(self._path('vis', '.jpg')) as partial:
                    _save(partial, drawn)
            else:
                self._write_frame(drawn, picture.fps)

    def _path(self, folder: str, ending: str) -> str:
        return osp.join(self.out, folder, self._source.name + ending)

    def _write_prediction(self, picture: Picture, result: dict) -> None:
        labels = result.pop('sem_seg', None)
        if labels is not None:
            ending = '.png' if picture.frame is None else f'_frames/{picture.frame:06d}.png'
            path = self._path('preds', ending)
            with replacing(path) as partial:
                _save(partial, labels)
            result['sem_seg'] = osp.relpath(path, self.out).replace('\\', '/')
        if picture.frame is None:
            with replacing(self._path('preds', '.json')) as partial, open(partial, 'w', encoding='utf-8') as file:
                json.dump(result, file)
            return
        if self._lines is None:
            partial = self._open.enter_context(replacing(self._path('preds', '.jsonl')))
            self._lines = self._open.enter_context(open(partial, 'w', encoding='utf-8'))
        self._lines.write(json.dumps(result) + '\n')

    def _write_frame(self, drawn: np.ndarray, fps: float) -> None:
        size = drawn.shape[1::-1]
        if self._video is None:
            partial = self._open.enter_context(replacing(self._path('vis', '.mp4')))
            self._video = cv2.VideoWriter(partial, cv2.VideoWriter_fourcc(*'mp4v'), fps, size)
            if not self._video.isOpened():
                raise UserError('OpenCV cannot write MPEG-4 here: install opencv-python, or do without drawn videos')
        self._video.write(np.ascontiguousarray(drawn))


def _save(path: str, image: np.ndarray) -> None:
    if not cv2.imwrite(path, image):
        raise OSError(f'{path} cannot be written')
