"""The ImageNet recipe piece by piece, each against the definition of its source: timm, which the authors used."""

import copy
import types
from collections import Counter

import numpy as np
import pytest
import torch
from common import TINY
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, TRANSFORMS, init_default_scope
from mmengine.runner import Runner
from test_configs import CLASSIFICATION, NAMES, load, rates, tiny
from torch import nn

NAME = CLASSIFICATION[0]
STEPS = dict(load=0, crop=1, flip=2, augment=3, augment_again=4, erase=5, pack=6)


@pytest.fixture
def timm():
    return pytest.importorskip('timm')


def build_step(name):
    cfg = load(NAME)
    init_default_scope('mmpretrain')
    return TRANSFORMS.build(cfg.train_dataloader.dataset.pipeline[STEPS[name]])


def photo(seed=0, size=64):
    """Smooth colours with some noise, BGR: flat or random pictures hide what an operation does."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[:size, :size] / size
    waves = [np.sin(6 * x * (i + 1) + rng.rand()) * np.cos(5 * y + i) for i in range(3)]
    return np.clip(np.stack(waves, -1) * 90 + 120 + rng.randn(size, size, 3) * 8, 0, 255).astype(np.uint8)


# --- RandAugment: rand-m9-mstd0.5-inc1 ------------------------------------------------------------

#: Ours, by type and direction, and timm's name.
OPERATIONS = {
    ('AutoContrast', None): 'AutoContrast',
    ('Equalize', None): 'Equalize',
    ('Invert', None): 'Invert',
    ('Rotate', None): 'Rotate',
    ('Posterize', None): 'PosterizeIncreasing',
    ('Solarize', None): 'SolarizeIncreasing',
    ('SolarizeAdd', None): 'SolarizeAdd',
    ('ColorTransform', None): 'ColorIncreasing',
    ('Contrast', None): 'ContrastIncreasing',
    ('Brightness', None): 'BrightnessIncreasing',
    ('Sharpness', None): 'SharpnessIncreasing',
    ('Shear', 'horizontal'): 'ShearX',
    ('Shear', 'vertical'): 'ShearY',
    ('Translate', 'horizontal'): 'TranslateXRel',
    ('Translate', 'vertical'): 'TranslateYRel',
}


def operations():
    """The 15 operations of the config, by timm's name."""
    (randaugment,) = build_step('augment').transforms[0].transforms
    return randaugment, {OPERATIONS[type(t).__name__, getattr(t, 'direction', None)]: t for t in randaugment.transforms}


def test_randaugment_has_the_operations_of_timm(timm):
    from timm.data.auto_augment import rand_augment_transform

    theirs = rand_augment_transform('rand-m9-mstd0.5-inc1', dict(translate_const=100))
    randaugment, ours = operations()
    assert set(ours) == {op.name for op in theirs.ops} and len(ours) == len(randaugment.transforms)
    assert theirs.num_layers == 2 * randaugment.num_policies and theirs.choice_weights is None
    for op in theirs.ops:
        own = ours[op.name]
        assert (op.prob, op.magnitude, op.magnitude_std) == (0.5, 9, 0.5)
        assert own.prob == op.prob
        if getattr(own, 'magnitude_range', None) is not None:
            assert (own.magnitude_level, own.magnitude_std, own.total_level) == (9, 0.5, 10)


@pytest.mark.parametrize('level', [0, 2.5, 9, 10])
def test_randaugment_levels_mean_what_they_do_in_timm(timm, level):
    from timm.data.auto_augment import LEVEL_TO_ARG

    _, ours = operations()
    checked = 0
    for name, own in ours.items():
        if LEVEL_TO_ARG[name] is None:
            continue
        expected = LEVEL_TO_ARG[name](level, {})[0]
        low, high = own.magnitude_range
        value = low + (high - low) * level / 10
        if name.startswith(('Color', 'Contrast', 'Brightness', 'Sharpness')):
            expected = abs(expected - 1)  # a factor there, its distance from 1 here; both draw the sign
        assert value == pytest.approx(abs(expected), abs=1 if name.startswith(('Post', 'Sol')) else 1e-6), name
        checked += 1
    assert checked == 12


#: Level, and by how many grey levels a result may differ.
PIXELS = dict(
    AutoContrast=0, Equalize=0, Invert=0, PosterizeIncreasing=0, SolarizeIncreasing=0, SolarizeAdd=0,
    BrightnessIncreasing=0, ColorIncreasing=1, ContrastIncreasing=1,
)  # fmt: skip


@pytest.mark.parametrize('name', PIXELS)
def test_randaugment_pixels(timm, name, monkeypatch):
    """The operations that resample nothing give the pixels of timm's."""
    from PIL import Image
    from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP

    own = copy.deepcopy(operations()[1][name])
    monkeypatch.setattr('random.random', lambda: 0.1)  # no negative sign in timm
    arguments = LEVEL_TO_ARG[name](8.0, {}) if LEVEL_TO_ARG[name] else ()
    own.prob, own.random_negative_prob, own.magnitude_std, own.magnitude_level = 1.0, 0.0, 0, 8.0
    for seed in range(3):
        image = photo(seed)
        got = own(dict(img=image.copy()))['img'][..., ::-1]
        expected = np.asarray(NAME_TO_OP[name](Image.fromarray(image[..., ::-1].copy()), *arguments))
        assert np.abs(got.astype(int) - expected).max() <= PIXELS[name]
        assert (np.abs(expected.astype(int) - image[..., ::-1]) > 2).any()  # it does something


def test_operations_and_interpolations_are_drawn_evenly():
    """timm draws two of 15 with replacement, and for each resampling bilinear or bicubic."""
    np.random.seed(0)
    crop, augment = build_step('crop'), build_step('augment')
    for choice in (crop, augment):
        drawn = Counter(choice.random_pipeline_index() for _ in range(2000))
        assert set(drawn) == {0, 1} and abs(drawn[0] - 1000) < 4 * np.sqrt(500)
    assert [t.transforms[0].interpolation for t in crop.transforms] == ['bilinear', 'bicubic']
    for variant, name in zip(augment.transforms, ('bilinear', 'bicubic')):
        resampling = [t for t in variant.transforms[0].transforms if hasattr(t, 'interpolation')]
        assert len(resampling) == 5 and all(t.interpolation == name for t in resampling)
    (randaugment,) = augment.transforms[0].transforms
    drawn = Counter(randaugment.random_policy_indices()[0] for _ in range(3000))
    assert set(drawn) == set(range(15)) and max(drawn.values()) < 200 + 5 * np.sqrt(200)


def test_crop_and_flip():
    crop = build_step('crop').transforms[0].transforms[0]
    assert (crop.scale, crop.crop_ratio_range, crop.backend) == ((224, 224), (0.08, 1.0), 'pillow')
    assert crop.aspect_ratio_range == pytest.approx((3 / 4, 4 / 3))
    assert build_step('flip').prob == 0.5


def test_random_erasing_is_pixel_mode():
    """A quarter of the pictures; 2 to 33 % of the area; noise of ImageNet's mean and deviation, one draw a pixel."""
    np.random.seed(0)
    erase = build_step('erase')
    assert erase.aspect_range == pytest.approx((0.3, 1 / 0.3))
    areas, noise = [], []
    for _ in range(1200):
        image = np.full((64, 64, 3), 7, np.uint8)
        erased = erase(dict(img=image))['img']
        touched = (erased != 7).any(-1)
        if touched.any():
            rows, cols = np.where(touched)
            box = erased[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]
            assert touched.sum() > 0.9 * box.shape[0] * box.shape[1]  # one rectangle
            areas.append(box.shape[0] * box.shape[1] / 64**2)
            noise.append(box.reshape(-1, 3))
    assert abs(len(areas) - 300) < 4 * np.sqrt(1200 * 0.25 * 0.75)
    assert 0.015 < min(areas) and max(areas) < 0.35 and abs(np.mean(areas) - 0.176) < 0.02
    noise = np.concatenate(noise).astype(float)
    # clipped to 0..255, which draws mean and deviation in a little
    assert np.abs(noise.mean(0) - [103.53, 116.28, 123.675]).max() < 2
    assert np.abs(noise.std(0) - [57.375, 57.12, 58.395]).max() < 3
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.05


# --- mixing, smoothing, both heads ----------------------------------------------------------------


def augments():
    from mmpretrain.models.utils.batch_augments import RandomBatchAugment

    init_default_scope('mmpretrain')
    return RandomBatchAugment(**load(NAME).model.train_cfg)


def test_mixup_and_cutmix():
    """Every batch is mixed, by one of the two, with equal chance; shares follow Beta(0.8, 0.8) and Beta(1, 1)."""
    np.random.seed(0)
    torch.manual_seed(0)
    mix = augments()
    images = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)])
    scores = torch.eye(2)
    shares = dict(mixup=[], cutmix=[])
    for _ in range(3000):
        image, score = mix(images.clone(), scores)
        torch.testing.assert_close(score.sum(1), torch.ones(2))
        if torch.equal(score, scores) and torch.equal(image, images):
            continue  # a partner is oneself half of the time, in a batch of two
        torch.testing.assert_close(score[:, 1], image.mean((1, 2, 3)), rtol=1e-4, atol=1e-4)  # share and pixels agree
        whole = ((image == 0) | (image == 1)).all()
        shares['cutmix' if whole else 'mixup'].append(score[0, 0].item())
    counts = {k: len(v) for k, v in shares.items()}
    total = sum(counts.values())
    assert total > 1200 and abs(counts['mixup'] - total / 2) < 5 * np.sqrt(total) / 2 + 0.03 * total
    lam = np.array(shares['mixup'])
    assert np.mean(lam * (1 - lam)) == pytest.approx(0.8 / (2 * (2 * 0.8 + 1)), abs=0.01)
    assert abs(np.mean(lam) - 0.5) < 0.04


def test_soft_targets_reach_both_heads(timm):
    """Loss of a mixed batch: timm's smoothed and mixed targets, main + 0.4 * auxiliary."""
    from mmpretrain.structures import DataSample
    from timm.data.mixup import mixup_target
    from timm.loss import SoftTargetCrossEntropy

    cfg = tiny(NAME)
    init_default_scope('mmpretrain')
    head = MODELS.build(cfg.model).head.eval()
    feats = tuple(torch.randn(4, c, 3, 3) for c in cfg.model.head.in_channels)
    labels, lam = torch.tensor([0, 3, 1, 1]), 0.3
    one_hot = torch.eye(5)[labels]
    mixed = lam * one_hot + (1 - lam) * one_hot.flip(0)
    losses = head.loss(feats, [DataSample().set_gt_score(s) for s in mixed])
    target = mixup_target(labels, 5, lam, smoothing=0.1)
    criterion = SoftTargetCrossEntropy()
    torch.testing.assert_close(losses['loss'], criterion(head(feats), target))
    torch.testing.assert_close(losses['aux_loss'], 0.4 * criterion(head.aux_forward(feats), target))
    assert set(losses) == {'loss', 'aux_loss'}


def test_mixed_batches_reach_the_loss():
    """From uint8 pictures to the head, as the Runner has it: targets that are no longer one class."""
    cfg = tiny(NAME)
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model)
    from mmpretrain.structures import DataSample

    np.random.seed(1)
    torch.manual_seed(1)
    inputs = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    data = model.data_preprocessor(
        dict(inputs=inputs, data_samples=[DataSample().set_gt_label(i % 5) for i in range(8)]), training=True
    )
    scores = torch.stack([s.gt_score for s in data['data_samples']])
    assert scores.shape == (8, 5) and ((scores > 0.01).sum(1) == 2).any()
    torch.testing.assert_close(scores.sum(1), torch.ones(8))


# --- averages, rates, groups ----------------------------------------------------------------------


class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.fc = nn.Linear(3, 2)


def test_ema_of_parameters_and_buffers_is_evaluated(timm):
    """timm's ModelEmaV2 of the same run; validation sees the average, training goes on with its own."""
    from timm.utils import ModelEmaV2

    cfg = load(NAME)
    init_default_scope('mmpretrain')
    hook = HOOKS.build({k: v for k, v in cfg.custom_hooks[0].items() if k != 'priority'})
    model = WithBuffers()
    runner = types.SimpleNamespace(model=model, iter=0, epoch=0)
    hook.before_run(runner)
    hook.after_train_iter(runner, 0)  # the first takes the model as it is, as timm's starts
    theirs = ModelEmaV2(model, decay=0.9999)
    for _ in range(50):
        with torch.no_grad():
            for value in [*model.parameters(), model.bn.running_mean, model.bn.running_var]:
                value.add_(torch.rand_like(value) + 1)
        hook.after_train_iter(runner, 0)
        theirs.update(model)
    before = copy.deepcopy(model.state_dict())
    hook.before_val_epoch(runner)
    average = copy.deepcopy(model.state_dict())
    hook.after_val_epoch(runner)
    torch.testing.assert_close(model.state_dict(), before)
    for name, value in theirs.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(average[name], value)
            assert not torch.allclose(average[name], before[name], rtol=0.1)


def test_rates_are_those_of_timm(timm):
    from timm.scheduler import CosineLRScheduler

    cfg = load(NAME)
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=2e-3)
    theirs = CosineLRScheduler(optimizer, t_initial=300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    expected = []
    for epoch in range(cfg.train_cfg.max_epochs):
        theirs.step(epoch)
        expected.append(optimizer.param_groups[0]['lr'])
    # The cosine is under the warm-up here: a part in a thousand, or a hundredth of the smallest rate.
    np.testing.assert_allclose(rates(cfg, 310, 2), expected, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize('gpus, batch', [(8, 256), (1, 256), (64, 32), (4, 64)])
def test_rate_for_another_total_batch(gpus, batch):
    """1e-3 for 1,024 pictures, in proportion, as the authors' --auto-lr."""
    cfg = load(NAME)
    cfg.auto_scale_lr.enable = True
    wrapper = OptimWrapper(torch.optim.AdamW([torch.zeros(1)], lr=cfg.optim_wrapper.optimizer.lr))
    runner = types.SimpleNamespace(
        world_size=gpus,
        param_schedulers=cfg.param_scheduler,
        _train_dataloader=dict(batch_size=batch),
        logger=types.SimpleNamespace(info=lambda text: None),
    )
    Runner.scale_lr(runner, wrapper, cfg.auto_scale_lr)
    assert wrapper.optimizer.param_groups[0]['lr'] == pytest.approx(1e-3 * gpus * batch / 1024)


def test_weight_decay_groups_are_those_of_timm(timm):
    from timm.optim import param_groups_weight_decay

    cfg = tiny(NAME)
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    ours = {id(p): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    theirs = {id(p): g['weight_decay'] for g in param_groups_weight_decay(model, 0.05) for p in g['params']}
    assert ours == theirs and set(ours.values()) == {0.0, 0.05}


@pytest.mark.parametrize('name', [n for n in NAMES if '-xt_' in n])
def test_every_schedule_guards_against_infinities(name):
    cfg = load(name)
    init_default_scope(cfg.default_scope)
    assert HOOKS.build(cfg.default_hooks.non_finite_guard).max_consecutive == 20


# --- gradient checkpointing -----------------------------------------------------------------------


def test_checkpointing_per_stage_as_ckpt_stg():
    """The authors' --ckpt-stg a b c d recomputes the first blocks of each stage; c and d are Focus-Net's too."""
    from mmoverlock import OverLoCK

    arch = dict(TINY, depths=(2, 1, 2, 1))
    with_cp = {1: 1, 3: 2, 5: 1}
    model = OverLoCK(arch, with_cp=with_cp).train()
    calls = Counter()
    for stage in (1, 2, 3, 4, 5, 6):
        blocks = getattr(model, f'stage{stage}' if stage < 5 else f'focus{stage - 2}')
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda m, a, key=(stage, i): calls.update([key]))
    sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64))).backward()
    twice = {key for key, count in calls.items() if count == 2}
    assert twice == {(1, 0), (3, 0), (3, 1), (5, 0)} and set(calls.values()) == {1, 2}
    with pytest.raises(ValueError, match=r'with_cp names stages 1 to 6, got \(7,\)'):
        OverLoCK(arch, with_cp=[7])
