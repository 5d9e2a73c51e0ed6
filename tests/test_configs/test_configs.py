"""The configs: all there, the recipe of the paper, models that build and train a step."""

import copy
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, TRANSFORMS, init_default_scope

from mmoverlock import OverLoCK

ROOT = Path(__file__).parents[2]
VARIANTS = ('xt', 't', 's', 'b')
DETECTORS = ('mask-rcnn', 'retinanet', 'cascade-mask-rcnn')
RELEASE = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/'

CLASSIFICATION = [f'classification/overlock-{v}_8xb256_in1k' for v in VARIANTS]
DETECTION = [f'detection/{d}_overlock-{v}_fpn_{s}_coco' for d in DETECTORS for v in VARIANTS for s in ('1x', 'ms-3x')]
SEGMENTATION = [f'segmentation/overlock-{v}_upernet_8xb2-160k_ade20k-512x512' for v in VARIANTS]
NAMES = CLASSIFICATION + DETECTION + SEGMENTATION

# The recipes and results as published. XT has neither for dense tasks: its drop path is ours.
DROP_PATH = dict(
    classification=dict(xt=0.1, t=0.15, s=0.4, b=0.5),
    detection=dict(xt=0.1, t=0.2, s=0.4, b=0.6),
    segmentation=dict(xt=0.1, t=0.2, s=0.3, b=0.5),
)
CROP_RATIO = dict(xt=0.925, t=0.95, s=0.95, b=0.975)
CHANNELS = dict(xt=[56, 112, 340, 420], t=[64, 128, 384, 640], s=[64, 128, 448, 640], b=[80, 160, 528, 720])
# Counted on the official code: the classifier with its auxiliary head; the dense backbones.
PARAMETERS = dict(
    classification=dict(xt=17307272, t=34990472, s=58309772, b=98012968),
    detection=dict(xt=15657380, t=33127096, s=56446524, b=96091496),
    segmentation=dict(xt=15514328, t=32796472, s=56115900, b=95673464),
)
PUBLISHED = {
    **dict(zip(CLASSIFICATION, [[82.7], [84.2], [84.8], [85.1]])),
    **dict(zip(SEGMENTATION[1:], [[50.3], [51.3], [51.7]])),
    **dict(
        zip(
            DETECTION[2:8],
            [[48.3, 43.3], [49.6, 43.9], [49.4, 44.0], [51.0, 45.0], [49.9, 44.4], [51.4, 45.3]],
        )
    ),
}

TINY = dict(
    depths=(1, 1, 1, 1),
    focus_depths=(2, 1),
    widths=(8, 16, 16, 32),
    mlp_ratios=(2, 2, 2, 2),
    focus_mlp_ratio=2,
    focus_heads=(1, 2),
    kernel_sizes=(7, 7, 7, 7),
    small_kernel=5,
)


@lru_cache(maxsize=None)
def size_and_channels(arch, out_indices=(0, 1, 2, 3), out_type='pyramid', fuse_overview=False, **_):
    """Parameters and output channels of a backbone, cached: drop path changes neither."""
    with torch.device('meta'):
        backbone = OverLoCK(arch, out_indices=out_indices, out_type=out_type, fuse_overview=fuse_overview)
    return sum(p.numel() for p in backbone.parameters()), list(backbone.out_channels)


@lru_cache(maxsize=None)
def parse(name):
    return Config.fromfile(ROOT / f'configs/{name}.py')


def load(name):
    return copy.deepcopy(parse(name))


def variant_of(name):
    return name.split('overlock-')[1].split('_')[0]


@pytest.fixture(params=NAMES)
def config(request):
    """Name, task, variant and config of every one."""
    name = request.param
    return name, name.split('/')[0], variant_of(name), load(name)


def test_all_configs_are_there():
    found = {f'{path.parent.name}/{path.stem}' for task in DROP_PATH for path in (ROOT / 'configs' / task).glob('*.py')}
    assert len(NAMES) == 32
    assert found == set(NAMES)


def test_header(config):
    name = config[0]
    lines = (ROOT / f'configs/{name}.py').read_text().splitlines()
    header = '\n'.join(lines[: next(i for i, line in enumerate(lines) if line[:1] != '#')])
    assert f'tools/dist_train.sh configs/{name}.py 8' in header
    if name in PUBLISHED:
        assert all(f'{value} ' in header for value in PUBLISHED[name])
        assert 'arXiv 2502.20087' in header
    else:
        assert 'Published: none' in header


def test_backbone(config):
    name, task, variant, cfg = config
    backbone = dict(cfg.model.backbone)
    assert backbone.pop('type') == 'mmoverlock.OverLoCK'
    assert (backbone['arch'], backbone['drop_path_rate']) == (variant, DROP_PATH[task][variant])
    assert backbone.get('fuse_overview', False) == (task == 'detection')
    assert cfg.default_scope == dict(classification='mmpretrain', detection='mmdet', segmentation='mmseg')[task]
    if task == 'classification':
        assert 'init_cfg' not in backbone
    else:
        url = f'{RELEASE}overlock_{variant}_in1k_224.pth'
        assert backbone['init_cfg'] == dict(type='Pretrained', checkpoint=url)

    backbone.pop('init_cfg', None)
    params, channels = size_and_channels(**backbone)
    expected = PARAMETERS[task][variant]
    if 'retinanet' in name:
        expected -= 2 * CHANNELS[variant][0]  # no stride 4 output, so no norm for it
    if task != 'classification':  # where the head counts too: test_builds
        assert params == expected
    # The heads expect what the backbone returns.
    if task == 'classification':
        assert list(cfg.model.head.in_channels) == channels
    elif task == 'detection':
        assert channels == CHANNELS[variant][1 if 'retinanet' in name else 0 :]
        assert list(cfg.model.neck.in_channels) == channels
    else:
        assert channels == CHANNELS[variant]
        assert list(cfg.model.decode_head.in_channels) == channels
        assert cfg.model.auxiliary_head.in_channels == channels[2]


@pytest.mark.parametrize('name', CLASSIFICATION)
def test_imagenet_recipe(name):
    cfg = load(name)
    optim = cfg.optim_wrapper
    assert optim.type == 'AmpOptimWrapper'
    assert optim.optimizer == dict(type='AdamW', lr=2e-3, betas=(0.9, 0.999), weight_decay=0.05, fused=True)
    assert optim.clip_grad == dict(max_norm=5.0)
    assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size == 2048

    assert cfg.model.head.aux_loss_weight == 0.4
    loss = cfg.model.head.loss
    assert (loss.type, loss.mode, loss.label_smooth_val) == ('LabelSmoothLoss', 'original', 0.1)
    assert cfg.model.train_cfg == dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)])

    (ema,) = cfg.custom_hooks
    assert (ema.type, ema.ema_type) == ('EMAHook', 'mmoverlock.FiniteEMA')
    assert (ema.momentum, ema.update_buffers) == (1e-4, True)
    assert ema.evaluate_on_ema and not ema.evaluate_on_origin

    for dataloader in (cfg.val_dataloader, cfg.test_dataloader):
        resize, crop = dataloader.dataset.pipeline[1:3]
        assert resize.scale == int(224 / CROP_RATIO[variant_of(name)])
        assert (resize.edge, resize.interpolation, crop.crop_size) == ('short', 'bicubic', 224)


def test_imagenet_augmentation():
    load, crop, flip, augment, again, erase, _ = load_pipeline(CLASSIFICATION[0])
    assert flip['prob'] == 0.5
    interpolations = [t['interpolation'] for (t,) in crop['transforms']]
    assert interpolations == ['bilinear', 'bicubic']
    assert augment == again and augment['type'] == 'RandomChoice'
    for (t,), interpolation in zip(augment['transforms'], interpolations):
        assert t['policies'] == 'timm_increasing' and t['num_policies'] == 1
        assert (t['magnitude_level'], t['magnitude_std'], t['total_level']) == (9, 0.5, 10)
        # timm fills with the mean, rounded; pictures are BGR here.
        assert t['hparams'] == dict(interpolation=interpolation, pad_val=[104, 116, 124])
    assert (erase['erase_prob'], erase['mode']) == (0.25, 'rand')
    assert (erase['min_area_ratio'], erase['max_area_ratio']) == (0.02, 1 / 3)
    assert erase['fill_color'] == [103.53, 116.28, 123.675]
    assert erase['fill_std'] == [57.375, 57.12, 58.395]


def load_pipeline(name):
    return load(name).train_dataloader.dataset.pipeline


def rates(cfg, epochs, epoch_length):
    """Learning rate of the first iteration of every epoch, as the Runner would set it."""
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = []
    for kwargs in cfg.param_scheduler:
        kwargs = {k: v for k, v in kwargs.items() if k != '_scope_'}
        cls = PARAM_SCHEDULERS.get(kwargs.pop('type'))
        if kwargs.pop('convert_to_iter_based', False):
            schedulers.append(cls.build_iter_from_epoch(optimizer, epoch_length=epoch_length, **kwargs))
        else:
            schedulers.append(cls(optimizer, **kwargs))
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]['lr'])
        for i in range(epoch_length):
            optimizer.step()
            for scheduler in schedulers:
                if not scheduler.by_epoch or i == epoch_length - 1:
                    scheduler.step()
    return found


def test_imagenet_schedule():
    cfg = load(CLASSIFICATION[0])
    assert cfg.train_cfg.max_epochs == 310
    lr = rates(cfg, 310, 4)
    assert lr[0] == pytest.approx(1e-6, rel=1e-2)
    assert lr[5] == max(lr)
    for epoch in (5, 120, 299):
        assert lr[epoch] == pytest.approx(1e-5 + (2e-3 - 1e-5) * (1 + np.cos(epoch / 300 * np.pi)) / 2, rel=1e-4)
    assert lr[300:] == pytest.approx([1e-5] * 10, rel=1e-9)  # the cooldown


@pytest.mark.parametrize('name', DETECTION)
def test_coco_recipe(name):
    cfg = load(name)
    triple = '3x' in name
    epochs, steps, warmup = (36, [27, 33], 1000) if triple else (12, [8, 11], 500)
    lr = 1e-4 if triple else 2e-4
    optim = cfg.optim_wrapper
    assert optim.type == 'OptimWrapper'  # the published dense training runs in fp32
    assert optim.optimizer == dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=0.05, fused=True)
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.train_cfg.max_epochs == epochs
    linear, step = cfg.param_scheduler
    assert (linear.start_factor, linear.by_epoch, linear.end) == (0.001, False, warmup)
    assert (step.milestones, step.gamma, step.end) == (steps, 0.1, epochs)
    assert cfg.sync_bn == 'torch'
    with_mask = 'mask' in name
    pipeline = cfg.train_dataloader.dataset.pipeline
    assert pipeline[1].get('with_mask', False) == with_mask
    assert cfg.val_evaluator.metric == (['bbox', 'segm'] if with_mask else 'bbox')
    resizes = str(pipeline)
    assert ('absolute_range' in resizes) == triple
    if triple:
        for short in (400, 480, 800):
            assert f'({short}, 1333)' in resizes


@pytest.mark.parametrize('name', SEGMENTATION)
def test_ade20k_recipe(name):
    cfg = load(name)
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01, fused=True)
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.train_cfg.max_iters == 160000
    linear, poly = cfg.param_scheduler
    assert (linear.start_factor, linear.by_epoch, linear.end) == (1e-6, False, 1500)
    assert (poly.power, poly.eta_min, poly.begin, poly.end) == (1.0, 0.0, 1500, 160000)
    model = cfg.model
    assert model.decode_head.num_classes == model.auxiliary_head.num_classes == 150
    assert model.auxiliary_head.in_index == 2
    assert model.data_preprocessor.size == (512, 512)
    assert model.test_cfg.mode == 'whole'
    assert cfg.sync_bn == 'torch'


# --- building, pipelines, a step of training ----------------------------------------------------


# All classifiers, for their size; of the others one variant: the heads differ in in_channels alone.
@pytest.mark.parametrize('name', CLASSIFICATION + [n for n in NAMES[4:] if '-xt_' in n and '3x' not in n])
def test_builds(name):
    cfg = load(name)
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert isinstance(model.backbone, OverLoCK)
    if name in CLASSIFICATION:
        expected = PARAMETERS['classification'][variant_of(name)]
        assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize('name', [n for n in DETECTION if '3x' in n])
def test_both_schedules_have_one_model(name):
    assert load(name).model == load(name.replace('ms-3x', '1x')).model


@pytest.fixture
def picture(tmp_path):
    path = str(tmp_path / 'picture.jpg')
    cv2.imwrite(path, np.random.RandomState(0).randint(0, 256, (90, 125, 3), np.uint8))
    return path


def run_pipeline(cfg, pipeline, results):
    init_default_scope(cfg.default_scope)
    for transform in pipeline:
        results = TRANSFORMS.build(transform)(results)
    return results


def test_imagenet_pipelines(picture):
    cfg = load(CLASSIFICATION[0])
    for dataloader in (cfg.train_dataloader, cfg.val_dataloader):
        for _ in range(8):
            out = run_pipeline(cfg, dataloader.dataset.pipeline, dict(img_path=picture, gt_label=1))
            assert out['inputs'].shape == (3, 224, 224) and out['inputs'].dtype == torch.uint8


@pytest.mark.parametrize('detector', ['mask-rcnn', 'retinanet'])
def test_coco_pipelines(detector, picture):
    cfg = load(f'detection/{detector}_overlock-xt_fpn_ms-3x_coco')
    polygon = [10, 10, 100, 10, 100, 80, 10, 80]
    instance = dict(bbox=[10, 10, 100, 80], bbox_label=3, ignore_flag=0, mask=[polygon])
    shorts = set()
    for _ in range(8):
        out = run_pipeline(
            cfg,
            cfg.train_dataloader.dataset.pipeline,
            dict(img_path=picture, img_id=0, height=90, width=125, instances=[instance]),
        )
        shorts.add(min(out['inputs'].shape[1:]))
        assert ('masks' in out['data_samples'].gt_instances) == (detector == 'mask-rcnn')
    assert len(shorts) > 1


def test_ade20k_test_pictures_are_multiples_of_32(picture, tmp_path):
    cfg = load(SEGMENTATION[0])
    truth = str(tmp_path / 'truth.png')
    cv2.imwrite(truth, np.ones((90, 125), np.uint8))
    sample = dict(img_path=picture, seg_map_path=truth, seg_fields=[], label_map=None, reduce_zero_label=True)
    out = run_pipeline(cfg, cfg.test_dataloader.dataset.pipeline, sample)
    assert out['inputs'].shape == (3, 512, 736)  # 711 before
    assert out['data_samples'].gt_sem_seg.data.shape == (1, 90, 125)


def tiny(name):
    """The config with a model that trains a step in a second."""
    cfg = load(name)
    cfg.model.backbone.update(arch=TINY, init_cfg=None)
    backbone = {k: v for k, v in cfg.model.backbone.items() if k != 'type'}
    channels = list(OverLoCK(**backbone).out_channels)
    if name in CLASSIFICATION:
        cfg.model.head.update(in_channels=channels, hidden_channels=16, num_classes=5)
        cfg.model.data_preprocessor = dict(cfg.data_preprocessor, num_classes=5)
        cfg.optim_wrapper.type = 'OptimWrapper'  # AMP needs a GPU
    elif name in DETECTION:
        cfg.model.neck.in_channels = channels
        if 'mask' in name:
            samplers = cfg.model.train_cfg.rcnn
            for rcnn in samplers if isinstance(samplers, list) else [samplers]:
                rcnn.sampler.num = 16
    else:
        cfg.model.decode_head.update(in_channels=channels, channels=16)
        cfg.model.auxiliary_head.update(in_channels=channels[2], channels=16)
        cfg.model.data_preprocessor.size = (64, 64)
        # As the Runner does outside distributed training.
        for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
            head.norm_cfg = dict(type='BN')
    return cfg


def random_batch(name):
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    if name in CLASSIFICATION:
        from mmpretrain.structures import DataSample

        samples = [DataSample().set_gt_label(i) for i in range(2)]
        return dict(inputs=torch.stack(images), data_samples=samples)
    if name in DETECTION:
        from mmdet.structures import DetDataSample
        from mmdet.structures.mask import BitmapMasks
        from mmengine.structures import InstanceData

        samples = []
        for _ in images:
            box = [8, 8, 40, 40]
            masks = np.zeros((1, 64, 64), np.uint8)
            masks[:, 8:40, 8:40] = 1
            sample = DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1, 1), img_id=0))
            sample.gt_instances = InstanceData(
                bboxes=torch.tensor([box], dtype=torch.float32),
                labels=torch.tensor([3]),
                masks=BitmapMasks(masks, 64, 64),
            )
            sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
            samples.append(sample)
        return dict(inputs=images, data_samples=samples)
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = [SegDataSample(metainfo=dict(img_shape=(64, 64))) for _ in images]
    for sample in samples:
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, 64, 64)))
    return dict(inputs=images, data_samples=samples)


@pytest.mark.parametrize('name', [n for n in NAMES if '-xt_' in n and '3x' not in n])
def test_trains_a_step(name):
    """A step on random pictures: finite losses, and a gradient for every parameter.

    A parameter without one would stop distributed training.
    """
    torch.manual_seed(0)
    cfg = tiny(name)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    data = model.data_preprocessor(random_batch(name), training=True)
    loss, log = model.parse_losses(model(**data, mode='loss'))
    assert all(torch.isfinite(v).all() for v in log.values())
    optim_wrapper.backward(loss)
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    before = model.backbone.stem[0].conv.weight.detach().clone()
    optim_wrapper.step()
    assert not torch.equal(before, model.backbone.stem[0].conv.weight)


# --- metafiles ----------------------------------------------------------------------------------


def test_metafiles():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    assert sorted(index['Import']) == [f'configs/{task}/metafile.yml' for task in DROP_PATH]
    models = {}
    for path in index['Import']:
        meta = yaml.safe_load((ROOT / path).read_text())
        collections = {c['Name'] for c in meta['Collections']}
        for collection in meta['Collections']:
            assert (ROOT / collection['README']).is_file()
        for model in meta['Models']:
            assert model['In Collection'] in collections
            assert (ROOT / model['Config']).is_file()
            models[f'{Path(path).parent.name}/{model["Name"]}'] = model
    assert set(models) == set(NAMES)
    for name, model in models.items():
        assert model['Config'] == f'configs/{name}.py'
        metrics = [v for r in model.get('Results', []) for v in r['Metrics'].values()]
        assert metrics == PUBLISHED.get(name, [])
        assert ('Weights' in model) == (name in PUBLISHED)


@pytest.mark.parametrize('task', list(DROP_PATH))
def test_readme_lists_all(task):
    text = (ROOT / f'configs/{task}/README.md').read_text()
    for name in NAMES:
        if name.startswith(task):
            row = next(line for line in text.splitlines() if f'({Path(name).name}.py)' in line)
            assert all(f'| {value} ' in row for value in PUBLISHED.get(name, []))
