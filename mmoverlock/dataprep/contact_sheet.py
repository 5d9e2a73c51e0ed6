"""A picture of pictures: whether the labels fit is seen at once."""

from pathlib import Path
from typing import List

import numpy as np

from .. import cli

CAPTION, GAP = 18, 8  # pixels


def contact_sheet(
    cfg, split: str = 'train', number: int = 24, columns: int = 6, cell: int = 320, augmented: bool = False
):
    """Draw labelled pictures of a config's data set, as the pipelines read them.

    The task's own data set and visualizer do the work: what is drawn is what a training gets.

    Args:
        cfg (Config): A config of mmpretrain, mmdet or mmseg.
        split (str): 'train', 'val' or 'test'. Defaults to 'train'.
        number (int): How many pictures, evenly spread over the data set. Defaults to 24.
        columns (int): Pictures in a row. Defaults to 6.
        cell (int): Longer side of a picture in pixels. Defaults to 320.
        augmented (bool): Through the config's own pipeline, with its resizing and augmentation, in place of loading
            alone. Defaults to False.

    Returns:
        np.ndarray: (H, W, 3) uint8, RGB.

    Raises:
        UserError: If the config has no such loader or the data set is empty.
    """
    from mmengine.registry import DATASETS, VISUALIZERS, init_default_scope

    loader = cfg.get(f'{split}_dataloader')
    if not loader:
        raise cli.UserError(f'the config has no {split}_dataloader')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    scope = cfg.get('default_scope')
    settings = dict(loader['dataset'])
    if not augmented:
        settings['pipeline'] = _load_only(scope, settings.get('pipeline') or [], cell)
    with cli.explain_json(cfg):
        dataset = DATASETS.build(settings)
    if not len(dataset):
        raise cli.UserError(f'{split}_dataloader: the data set is empty')
    visualizer = VISUALIZERS.build(
        dict(cfg.visualizer, vis_backends=None, save_dir=None, name=f'contact_sheet_{id(dataset)}')
    )
    visualizer.dataset_meta = dataset.metainfo
    chosen = np.linspace(0, len(dataset) - 1, min(number, len(dataset))).astype(int)
    cells = []
    for index in chosen.tolist():
        item = dataset[index]
        image = item['inputs'].permute(1, 2, 0).numpy()[..., ::-1].astype(np.uint8)  # loaded as BGR
        sample = item['data_samples']
        drawn = _draw(visualizer, scope, np.ascontiguousarray(image), sample, dataset.metainfo, cell)
        cells.append((drawn, Path(getattr(sample, 'img_path', '') or '').name))
    return _sheet(cells, columns, cell)


def _load_only(scope: str, pipeline: List[dict], cell: int) -> List[dict]:
    """Load a picture and its labels, and make both of a size to look at."""
    kinds = {str(step['type']).split('.')[-1]: dict(step) for step in pipeline}
    load = kinds.get('LoadImageFromFile', dict(type='LoadImageFromFile'))
    if scope == 'mmpretrain':
        return [load, dict(type='PackInputs')]
    annotations = kinds.get('LoadAnnotations', dict(type='LoadAnnotations'))
    if scope == 'mmdet':
        annotations = dict(dict(with_bbox=True), **annotations)
    resize = dict(type='Resize', scale=(cell, cell), keep_ratio=True)
    return [load, annotations, resize, dict(type='PackDetInputs' if scope == 'mmdet' else 'PackSegInputs')]


def _draw(visualizer, scope: str, image: np.ndarray, sample, metainfo: dict, cell: int) -> np.ndarray:
    if scope == 'mmpretrain':
        return visualizer.visualize_cls(
            image,
            sample,
            classes=metainfo.get('classes'),
            draw_pred=False,
            resize=int(cell * min(image.shape[:2]) / max(image.shape[:2])),
        )
    boxes = sample.gt_instances.get('bboxes') if 'gt_instances' in sample else None
    if hasattr(boxes, 'tensor'):  # mmdet's visualizer draws plain boxes
        sample.gt_instances.bboxes = boxes.tensor
    visualizer.add_datasample('', image, sample, draw_gt=True, draw_pred=False)
    return visualizer.get_image()


def _sheet(cells: List[tuple], columns: int, cell: int) -> np.ndarray:
    """Drawn pictures in rows, each above its file's name."""
    from PIL import Image, ImageDraw

    pictures = [Image.fromarray(image) for image, _ in cells]
    for picture in pictures:
        picture.thumbnail((cell, cell))
    columns = min(columns, len(cells))
    width = max(p.width for p in pictures) + GAP
    height = max(p.height for p in pictures) + CAPTION + GAP
    sheet = Image.new('RGB', (columns * width + GAP, -(-len(cells) // columns) * height + GAP), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, (picture, (_, name)) in enumerate(zip(pictures, cells)):
        left, top = GAP + i % columns * width, GAP + i // columns * height
        sheet.paste(picture, (left, top))
        draw.text((left, top + picture.height + 2), name[-(width // 7) :], fill='black')
    return np.asarray(sheet)
