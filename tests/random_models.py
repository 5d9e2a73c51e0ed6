"""Tiny models of the three tasks with random weights, for the tests of inference."""

import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from common import randomise
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmoverlock import compat

sys.path.insert(0, str(Path(__file__).parent / 'test_tools'))
from tiny_configs import write_config  # noqa: E402

#: A detector that finds a few things, not a hundred: drawing them takes time.
FEW = "model['test_cfg'] = dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=4))"


def random_model(folder, task, meta=None):
    """Writes the tiny config of a task and a checkpoint of it.

    Args:
        folder (Path): Where to.
        task (str): 'cls', 'det' or 'seg'.
        meta (dict, optional): Of the checkpoint. Defaults to two made-up classes for a classifier, none else.

    Returns:
        tuple[str, str]: Config and checkpoint.
    """
    compat.apply()
    config = write_config(folder / f'tiny_{task}.py', task, folder, FEW if task == 'det' else '')
    cfg = Config.fromfile(config)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    # As it starts, a backbone looks everywhere alike, and every picture gets the same scores.
    randomise(model if task == 'cls' else model.backbone)
    if meta is None:
        meta = dict(dataset_meta=dict(classes=('cat', 'dog'))) if task == 'cls' else {}
    checkpoint = folder / f'{task}.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
    return config, str(checkpoint)


def smooth_pictures(sizes, seed=0):
    """Coloured clouds, BGR: a random network finds more in them than in noise."""
    rng = np.random.default_rng(seed)
    noise = (rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in sizes)
    clouds = (cv2.GaussianBlur(picture, (0, 0), 4).astype(float) for picture in noise)
    return [np.clip((cloud - 127) * 6 + 127, 0, 255).astype(np.uint8) for cloud in clouds]


def write_video(path, frames, fps=10):
    """An MPEG-4 video."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), fps, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()
