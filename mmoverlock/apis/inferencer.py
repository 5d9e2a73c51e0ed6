"""One inferencer for the three tasks, over those of mmpretrain, mmdet and mmseg."""

import contextlib
import itertools
import os.path as osp
import warnings
from typing import Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import autocast

from .. import cli, compat
from .configs import find_config, official_weights
from .inputs import Picture, Source, expand, read

TASKS = dict(mmpretrain='classification', mmdet='detection', mmseg='segmentation')


class Inferencer:
    """Classes, boxes and masks, or a segmentation map of pictures and videos.

    The model, its test pipeline and its drawing are those of mmpretrain's ``ImageClassificationInferencer``, mmdet's
    ``DetInferencer`` or mmseg's ``MMSegInferencer``; the config's ``default_scope`` says which. Pictures of different
    sizes never share a padded batch, as padding would change what Overview-Net sees: results do not depend on
    ``batch_size``, but for rounding.

    Class names come from the checkpoint, else from the config's data set, else they are numbers.

    Args:
        model (str | Config): A config file, the name of a config of this package, or a config. Configs are Python:
            reading one runs the code in it.
        checkpoint (str, optional): A file of a training or of the official release, or an https address; None takes the
            official weights of a config of this package. Nothing in it is executed. Defaults to None.
        device (str, optional): As PyTorch names it, ``'cuda:0'`` or ``'cpu'``; None takes the best there is. Defaults
            to None.
        score_thr (float): Boxes below this score are left out. Defaults to 0.3, as in mmdet's drawings.
        topk (int): How many classes a classifier gives a picture. Defaults to 5.
        amp (bool): Compute in half precision: float16 on a GPU, bfloat16 on a CPU. Defaults to False.
        cfg_options (dict, optional): Changes to the config, by dotted key.

    Attributes:
        task (str): ``'classification'``, ``'detection'`` or ``'segmentation'``.
        classes (tuple[str]): Class names, in the order of the labels.
        model (nn.Module): The model itself.
        cfg (Config): Its config.

    Raises:
        mmoverlock.cli.UserError: The config, the checkpoint or a package is missing, or they do not fit together.
    """

    def __init__(
        self,
        model: Union[str, Config],
        checkpoint: Optional[str] = None,
        device: Optional[str] = None,
        score_thr: float = 0.3,
        topk: int = 5,
        amp: bool = False,
        cfg_options: Optional[dict] = None,
    ) -> None:
        compat.apply()  # before the task's package is imported
        if isinstance(model, str):
            path = find_config(model)
            self.name = osp.splitext(osp.basename(path))[0]
            self.cfg = cli.load_config(path, cfg_options)
            checkpoint = checkpoint or official_weights(path)
        else:
            self.cfg = model.copy()
            self.cfg.merge_from_dict(cfg_options or {})
            self.name = osp.splitext(osp.basename(self.cfg.filename or 'model'))[0]
            if checkpoint is None:
                raise cli.UserError('a config that is no file of this package needs a checkpoint')
        self.checkpoint = str(checkpoint)
        self.scope = self.cfg.get('default_scope')
        if self.scope not in TASKS or not self.cfg.get('model') or not self.cfg.get('test_dataloader'):
            raise cli.UserError(
                f'{self.name} is no config of a whole model: it needs default_scope ({", ".join(TASKS)}), model and '
                'test_dataloader; is it a base file?'
            )
        self.task = TASKS[self.scope]
        self.device = torch.device(_check_device(device))
        self.score_thr, self.topk, self.amp = score_thr, topk, amp
        cli.check_packages(self.cfg)
        content = cli.check_whole(self.cfg, self.checkpoint)
        with self._quietly():
            self.inferencer = self._build()
            self.model = self.inferencer.model
            self._set_classes((content or {}).get('meta') or {})

    # -- building

    def _build(self):
        """The task's own inferencer."""
        if self.scope == 'mmpretrain':
            from mmpretrain import ImageClassificationInferencer
            from mmpretrain.visualization import UniversalVisualizer

            inferencer = ImageClassificationInferencer(self.cfg, self.checkpoint, device=str(self.device))
            inferencer.visualizer = UniversalVisualizer()
            inferencer.collate_fn = default_collate
            return inferencer
        if self.scope == 'mmdet':
            from mmdet.apis import DetInferencer

            return DetInferencer(self.cfg, self.checkpoint, device=str(self.device), show_progress=False)
        from mmseg.apis import MMSegInferencer

        return MMSegInferencer(self.cfg, self.checkpoint, device=str(self.device))

    def _set_classes(self, checkpoint_meta: dict) -> None:
        """Names and colours, also where the task's inferencer would take those of COCO, Cityscapes or none."""
        number = _number_of_classes(self.model)
        # mmdet 2 and mmseg 0 wrote CLASSES and PALETTE beside the rest.
        saved = {k.lower(): v for k, v in (checkpoint_meta.get('dataset_meta') or checkpoint_meta).items()}
        metas = [saved, self._dataset_meta()]
        # Names of another number of classes belong to another model.
        fitting = [m for m in metas if m.get('classes') and (number is None or len(m['classes']) == number)]
        self.classes = tuple(fitting[0]['classes']) if fitting else tuple(str(i) for i in range(number or 0))
        palettes = [m['palette'] for m in fitting if isinstance(m.get('palette'), (list, tuple))]
        palette = next((p for p in palettes if len(p) == len(self.classes)), None) or _palette(len(self.classes))
        meta = dict(classes=self.classes, palette=palette)
        if self.scope == 'mmpretrain':
            self.inferencer.classes = self.classes
        else:
            self.model.dataset_meta = self.inferencer.visualizer.dataset_meta = meta

    def _dataset_meta(self) -> dict:
        dataset = self.cfg.test_dataloader.dataset
        while 'dataset' in dataset:
            dataset = dataset['dataset']
        try:
            # Its annotations are not read, and need not be there.
            return DATASETS.build({**dataset, 'lazy_init': True, 'pipeline': []}).metainfo
        except Exception:  # a data set of the user's own: what it may need is not known
            return {}

    @contextlib.contextmanager
    def _quietly(self):
        """The task's registries, without warnings of the OpenMMLab packages about what is set or checked here."""
        with DefaultScope.overwrite_default_scope(self.scope), warnings.catch_warnings():
            warnings.filterwarnings('ignore', category=UserWarning, module=r'mm(engine|cv|pretrain|det|seg)\.')
            yield

    # -- running

    def __call__(self, inputs, batch_size: int = 1, return_vis: bool = False) -> List[dict]:
        """Results of all inputs.

        Args:
            inputs: What :func:`mmoverlock.apis.expand` takes: files, folders, globs, videos, https addresses, arrays
                (BGR) or Pillow images, one or a list.
            batch_size (int): Pictures computed at once, if of one size. Defaults to 1.
            return_vis (bool): Add the drawn picture as ``visualization``, (H, W, 3) uint8, RGB. Defaults to False.

        Returns:
            list[dict]: For each picture, and each frame of a video, ``input``, ``height`` and ``width`` in pixels, for
            frames ``frame`` and ``time`` in seconds, and by task, best first:

            - classification: ``labels``, ``classes`` (names) and ``scores`` of the ``topk`` best;
            - detection: ``labels``, ``classes``, ``scores``, ``bboxes`` (x1, y1, x2, y2 in pixels) and, where the model
              has them, ``masks`` (COCO run-length encoding);
            - segmentation: ``sem_seg``, (H, W) labels of uint8 or uint16, and ``shares``, class to share of the pixels.

        Raises:
            mmoverlock.cli.UserError: An input is missing or cannot be read.
        """
        results = []
        for picture, sample in self.stream(expand(inputs), batch_size):
            if picture.error:
                raise cli.UserError(f'{picture.source.label} {picture.error}')
            results.append(self.result(picture, sample))
            if return_vis:
                results[-1]['visualization'] = self.draw(picture.image, sample)
        return results

    def stream(self, sources: Sequence[Source], batch_size: int = 1) -> Iterator[Tuple[Picture, Optional[object]]]:
        """Results one after the other, with no more than ``batch_size`` pictures in memory.

        Args:
            sources (Sequence[Source]): From :func:`mmoverlock.apis.expand`.
            batch_size (int): Pictures computed at once, if of one size. Defaults to 1.

        Yields:
            tuple[Picture, DataSample | None]: In the order of the inputs; None for a picture that cannot be read.
        """
        if batch_size < 1:
            raise cli.UserError(f'the batch size must be at least 1, got {batch_size}')
        pictures = read(sources, *self._decoder())
        while batch := list(itertools.islice(pictures, batch_size)):
            good = [p for p in batch if p.error is None]
            samples = iter(self.predict([p.image for p in good]))
            for picture in batch:
                yield picture, next(samples) if picture.error is None else None

    def _decoder(self) -> Tuple[str, Optional[str]]:
        """How the config's pipeline decodes, so that a picture gives the same here as in a test."""
        for step in self.cfg.test_dataloader.dataset.get('pipeline', ()):
            if str(step['type']).split('.')[-1] == 'LoadImageFromFile':
                return step.get('color_type', 'color'), step.get('imdecode_backend')
        return 'color', None

    def prepare(self, image: np.ndarray) -> dict:
        """The config's test pipeline on one picture.

        Args:
            image (np.ndarray): (H, W, 3) uint8, BGR.

        Returns:
            dict: ``inputs``, (3, h, w) as the model's data preprocessor takes it, and ``data_samples``.
        """
        if self.scope == 'mmpretrain':  # its pipeline has lost the step that loads
            image = dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
        with self._quietly():
            return self.inferencer.pipeline(image)

    def predict(self, images: Sequence[np.ndarray]) -> list:
        """Data samples of pictures.

        Args:
            images (Sequence[np.ndarray]): Each (H, W, 3) uint8, BGR.

        Returns:
            list[DataSample | DetDataSample | SegDataSample]: As the task's package has them; boxes below ``score_thr``
            are left out.
        """
        groups, samples = {}, [None] * len(images)
        for index, image in enumerate(images):
            data = self.prepare(image)
            groups.setdefault(tuple(data['inputs'].shape), []).append((index, data))
        for group in groups.values():
            batch = self.inferencer.collate_fn([data for _, data in group])
            with self._quietly(), autocast(device_type=self.device.type, enabled=self.amp):
                found = self.inferencer.forward(batch)
            for (index, _), sample in zip(group, found):
                if self.scope == 'mmdet':
                    sample.pred_instances = sample.pred_instances[sample.pred_instances.scores >= self.score_thr]
                samples[index] = sample
        return samples

    # -- results

    def result(self, picture: Picture, sample) -> dict:
        """What :meth:`__call__` gives for a picture.

        Args:
            picture (Picture): The picture.
            sample (DataSample): Its prediction, from :meth:`predict`.

        Returns:
            dict: See :meth:`__call__`.
        """
        height, width = picture.image.shape[:2]
        result = dict(input=picture.source.label)
        if picture.frame is not None:
            result.update(frame=picture.frame, time=picture.frame / picture.fps)
        result.update(height=height, width=width)
        if self.task == 'classification':
            scores, labels = sample.pred_score.float().topk(min(self.topk, sample.pred_score.numel()))
            result.update(labels=labels.tolist(), classes=self._names(labels.tolist()), scores=scores.tolist())
        elif self.task == 'detection':
            found = self.inferencer.pred2dict(sample)
            result.update(labels=found['labels'], classes=self._names(found['labels']))
            result.update({k: found[k] for k in ('scores', 'bboxes', 'masks') if k in found})
        else:
            # 255 is mmseg's "ignore": with more classes than that, labels need two bytes.
            labels = sample.pred_sem_seg.data[0].cpu().numpy()
            result['sem_seg'] = labels.astype(np.uint8 if len(self.classes) < 256 else np.uint16)
            numbers, pixels = np.unique(labels, return_counts=True)
            order = np.argsort(-pixels, kind='stable')
            names = self._names(numbers[order])
            result['shares'] = dict(zip(names, (pixels[order] / labels.size).tolist()))
        return result

    def _names(self, labels) -> List[str]:
        return [self.classes[int(i)] if int(i) < len(self.classes) else str(int(i)) for i in labels]

    def draw(self, image: np.ndarray, sample) -> np.ndarray:
        """A picture with its prediction, as the task's package draws it.

        Args:
            image (np.ndarray): (H, W, 3) uint8, BGR.
            sample (DataSample): Its prediction, from :meth:`predict`.

        Returns:
            np.ndarray: (H, W, 3) uint8, RGB.
        """
        rgb = np.ascontiguousarray(image[..., ::-1])
        with self._quietly():
            if self.task == 'classification':
                visualizer = self.inferencer.visualizer
                visualizer.visualize_cls(rgb, sample, classes=self.classes, draw_gt=False)
                return visualizer.get_image()
            # The threshold has been applied.
            options = dict(pred_score_thr=0.0) if self.task == 'detection' else {}
            return self.inferencer.visualize([rgb], [sample.cpu()], return_vis=True, **options)[0]


def _check_device(device: Optional[str]) -> str:
    """The device to use, after a look whether it is there."""
    if device is None:
        from mmengine.device import get_device

        return get_device()
    try:
        torch.empty(0, device=device)
    except Exception as error:  # RuntimeError, AssertionError: torch has no one error for it
        raise cli.UserError(f'device {device} cannot be used ({str(error).splitlines()[0]}); try cpu') from error
    return device


def _number_of_classes(model) -> Optional[int]:
    """What the model's last layer tells apart, or None if its head does not say."""
    head = getattr(model, 'roi_head', model)
    for name in ('bbox_head', 'decode_head', 'head'):
        part = getattr(head, name, None)
        if isinstance(part, torch.nn.ModuleList):  # the stages of a cascade
            part = part[-1]
        if hasattr(part, 'num_classes'):
            return part.num_classes
    return None


def _palette(number: int) -> List[Tuple[int, ...]]:
    """Colours for classes that have none: always the same, well apart for a few, at random after."""
    from matplotlib import colormaps

    colours = [tuple(round(255 * c) for c in colour) for colour in colormaps['tab20'].colors]
    rng = np.random.default_rng(0)
    return colours[:number] + [tuple(c) for c in rng.integers(0, 256, (max(number - len(colours), 0), 3)).tolist()]
