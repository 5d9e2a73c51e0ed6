# Copyright (c) mmoverlock authors. Licensed under Apache-2.0.
"""Draw what the tested models said about the first held-out scenes, and count it class by class.

Reads the predictions that ``tools/test.py --out`` wrote; no model is run. Writes pictures, and
``summary.json`` with the numbers of the report's tables. Everything is counted from the files
anew, so that it can be held against the metrics that the tests printed.
"""

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.structures import InstanceData, PixelData

if importlib.util.find_spec('mmoverlock') is None:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmoverlock import compat  # noqa: E402

ZOOM = 3  # the scenes are small: draw on enlarged ones, so that lines and letters stay fine
GAP = 12  # white pixels between the pictures of a row


def _imread(path):
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if picture is None:
        raise SystemExit(f'draw_results: cannot read {path}; was the data set moved?')
    return picture[..., ::-1]


def _enlarge(picture, interpolation=cv2.INTER_CUBIC):
    size = (picture.shape[1] * ZOOM, picture.shape[0] * ZOOM)
    return cv2.resize(np.ascontiguousarray(picture), size, interpolation=interpolation)


def _save_row(path, *pictures):
    gap = np.full((pictures[0].shape[0], GAP, 3), 255, np.uint8)
    row = [part for picture in pictures for part in (gap, picture)][1:]
    cv2.imwrite(str(path), np.hstack(row)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])


# ---------------------------------------------------------------- classification


def classification(config, predictions, out, number):
    """Copy the first held-out pictures and the worst mistakes; count the confusions.

    Args:
        config (Config): Config of the classifier.
        predictions (Path): File that ``tools/test.py --out`` wrote.
        out (Path): Folder for the pictures.
        number (int): How many of each.

    Returns:
        dict: ``pictures`` and ``mistakes`` (file, truth, guess, score), ``confusion`` (rows are
        truths), ``classes``.
    """
    classes = list(config.demo_classes)
    samples = load(predictions)
    confusion = np.zeros((len(classes),) * 2, int)
    entries = []
    for sample in samples:
        truth, guess = int(sample['gt_label']), int(sample['pred_label'])
        confusion[truth, guess] += 1
        entries.append((sample['img_path'], truth, guess, float(sample['pred_score'].max())))
    # File names count through all classes: by name, the first ones show every class.
    entries.sort(key=lambda e: Path(e[0]).name)
    mistakes = sorted((e for e in entries if e[1] != e[2]), key=lambda e: -e[3])

    def keep(kind, chosen):
        kept = []
        for i, (path, truth, guess, score) in enumerate(chosen):
            file = out / f'classification_{kind}_{i}.jpg'
            shutil.copyfile(path, file)
            kept.append(dict(file=file.name, truth=classes[truth], guess=classes[guess], score=score))
        return kept

    return dict(
        pictures=keep('first', entries[:number]),
        mistakes=keep('mistake', mistakes[:number]),
        confusion=confusion.tolist(),
        classes=classes,
        right=int(np.trace(confusion)),
        total=len(entries),
    )


# ---------------------------------------------------------------- detection


def _average_precisions(coco, samples, kind):
    """AP50 of every category: a list of percentages, nan where a category has no instance."""
    from pycocotools.cocoeval import COCOeval

    results = []
    for sample in samples:
        found = sample['pred_instances']
        for i, (box, label, score) in enumerate(
            zip(found['bboxes'].tolist(), found['labels'].tolist(), found['scores'].tolist())
        ):
            x1, y1, x2, y2 = box
            result = dict(
                image_id=sample['img_id'], category_id=label + 1, score=score, bbox=[x1, y1, x2 - x1, y2 - y1]
            )
            if kind == 'segm':
                result = {k: v for k, v in result.items() if k != 'bbox'}
                result['segmentation'] = found['masks'][i]
            results.append(result)
    if not results:
        return [0.0] * len(coco.cats)
    evaluation = COCOeval(coco, coco.loadRes(results), kind)
    evaluation.params.iouThrs = np.array([0.5])
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval['precision'][0, :, :, 0, -1]  # (recalls, categories)
    return [float(100 * p[p > -1].mean()) if (p > -1).any() else float('nan') for p in precision.T]


def detection(config, predictions, out, number, threshold=0.5):
    """Draw truth and prediction side by side; compute AP50 class by class.

    Args:
        config (Config): Config of the detector.
        predictions (Path): File that ``tools/test.py --out`` wrote.
        out (Path): Folder for the pictures.
        number (int): How many scenes.
        threshold (float): Least score of a prediction that is drawn. Defaults to 0.5.

    Returns:
        dict: ``pictures``, ``classes``, ``box_ap50``, ``mask_ap50`` (percent), ``instances``.
    """
    from mmdet.structures import DetDataSample
    from mmdet.visualization import DetLocalVisualizer, local_visualizer
    from pycocotools import mask as run_lengths
    from pycocotools.coco import COCO

    classes = list(config.demo_classes)
    dataset = config.test_dataloader.dataset
    coco = COCO(str(Path(dataset.data_root) / dataset.ann_file))
    samples = sorted(load(predictions), key=lambda s: s['img_id'])
    # mmdet writes smaller on smaller shapes, too small to read here.
    local_visualizer._get_adaptive_scales = lambda areas: np.full(len(areas), 1.2)
    palette = [tuple(c) for c in config.demo_palette]
    visualizer = DetLocalVisualizer(alpha=0.5, line_width=3, bbox_color=palette, mask_color=palette)
    visualizer.dataset_meta = dict(classes=config.demo_classes, palette=palette)

    def instances(boxes, labels, masks, scores=None):
        masks = np.stack([_enlarge(m.astype(np.uint8), cv2.INTER_NEAREST) for m in masks] or [np.zeros((0, 0))]).astype(
            bool
        )
        data = InstanceData(
            bboxes=torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4) * ZOOM,
            labels=torch.as_tensor(labels, dtype=torch.long),
        )
        data.masks = masks[: len(data.labels)]
        if scores is not None:
            data.scores = torch.as_tensor(scores)
        return data

    def paint(picture, **kwargs):
        if not len(next(iter(kwargs.values())).labels):
            return picture
        sample = DetDataSample(**kwargs)
        visualizer.add_datasample(
            '',
            picture,
            sample,
            draw_gt='gt_instances' in kwargs,
            draw_pred='pred_instances' in kwargs,
            pred_score_thr=threshold,
        )
        return visualizer.get_image()

    files = []
    for sample in samples[:number]:
        picture = _enlarge(_imread(sample['img_path']))
        truth = coco.imgToAnns[sample['img_id']]
        boxes = [[a['bbox'][0], a['bbox'][1], a['bbox'][0] + a['bbox'][2], a['bbox'][1] + a['bbox'][3]] for a in truth]
        left = paint(
            picture,
            gt_instances=instances(boxes, [a['category_id'] - 1 for a in truth], [coco.annToMask(a) for a in truth]),
        )
        found = sample['pred_instances']
        sure = (found['scores'] >= threshold).nonzero().flatten().tolist()
        right = paint(
            picture,
            pred_instances=instances(
                found['bboxes'][sure],
                found['labels'][sure],
                [run_lengths.decode(found['masks'][i]) for i in sure],
                found['scores'][sure],
            ),
        )
        files.append(f'detection_{len(files)}.jpg')
        _save_row(out / files[-1], left, right)

    counts = [len(coco.getAnnIds(catIds=[i])) for i in range(1, len(classes) + 1)]
    return dict(
        pictures=files,
        classes=classes,
        instances=counts,
        threshold=threshold,
        box_ap50=_average_precisions(coco, samples, 'bbox'),
        mask_ap50=_average_precisions(coco, samples, 'segm'),
    )


# ---------------------------------------------------------------- segmentation


def segmentation(config, predictions, out, number):
    """Draw picture, truth and prediction side by side; compute IoU class by class.

    Args:
        config (Config): Config of the segmentor.
        predictions (Path): Folder that ``tools/test.py --out`` wrote.
        out (Path): Folder for the pictures.
        number (int): How many scenes.

    Returns:
        dict: ``pictures``, ``classes``, ``iou`` (percent).
    """
    from mmseg.structures import SegDataSample
    from mmseg.visualization import SegLocalVisualizer

    dataset = config.test_dataloader.dataset
    root, folders = Path(dataset.data_root), dataset.data_prefix
    classes, palette = dataset.metainfo.classes, dataset.metainfo.palette
    visualizer = SegLocalVisualizer(alpha=0.9)
    visualizer.dataset_meta = dict(classes=classes, palette=palette)

    def paint(picture, labels, kind):
        data = PixelData(data=torch.from_numpy(_enlarge(labels, cv2.INTER_NEAREST)).long()[None])
        sample = SegDataSample(**{kind: data})
        visualizer.add_datasample(
            '', picture, sample, draw_gt=kind == 'gt_sem_seg', draw_pred=kind == 'pred_sem_seg', with_labels=False
        )
        return visualizer.get_image()

    n, files = len(classes), []
    confusion = np.zeros((n, n), int)
    for path in sorted((root / folders.seg_map_path).glob('*.png')):
        # Label maps count from 1, as in ADE20K.
        truth = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE).astype(int) - 1
        guess = cv2.imread(str(predictions / path.name), cv2.IMREAD_GRAYSCALE)
        if guess is None:
            raise SystemExit(f'draw_results: {predictions / path.name} is missing; run tools/test.py again')
        guess = guess.astype(int) - 1
        confusion += np.bincount((n * truth + guess).ravel(), minlength=n * n).reshape(n, n)
        if len(files) < number:
            picture = _enlarge(_imread(root / folders.img_path / f'{path.stem}.jpg'))
            files.append(f'segmentation_{len(files)}.jpg')
            _save_row(
                out / files[-1],
                picture,
                paint(picture, truth.astype(np.uint8), 'gt_sem_seg'),
                paint(picture, guess.astype(np.uint8), 'pred_sem_seg'),
            )
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    iou = np.where(union > 0, 100 * np.diag(confusion) / np.maximum(union, 1), np.nan)
    return dict(pictures=files, classes=list(classes), iou=iou.tolist(), palette=[list(c) for c in palette])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('out', type=Path, help='folder for pictures and summary.json')
    for task in ('classification', 'detection', 'segmentation'):
        parser.add_argument(
            f'--{task}',
            nargs=2,
            metavar=('CONFIG', 'PREDICTIONS'),
            help=f'config of {task} and what tools/test.py --out wrote',
        )
    parser.add_argument('--number', type=int, default=8, help='scenes a task (default: 8)')
    args = parser.parse_args(argv)
    compat.apply()
    args.out.mkdir(parents=True, exist_ok=True)
    summary = {}
    for task, count in ((classification, 3 * args.number), (detection, args.number), (segmentation, args.number)):
        given = getattr(args, task.__name__)
        if given:
            config, predictions = Config.fromfile(given[0]), Path(given[1])
            if not predictions.exists():
                parser.error(f'{predictions} does not exist: run tools/test.py --out first')
            summary[task.__name__] = task(config, predictions, args.out, count)
    (args.out / 'summary.json').write_text(json.dumps(summary, indent=1))
    print(f'{args.out}: {len(list(args.out.glob("*.jpg")))} pictures')


if __name__ == '__main__':
    main()
