"""Entries for ``torch.hub``: ``torch.hub.load('OWNER/mmoverlock', 'overlock_tiny', pretrained=True)``.

Each gives the backbone (a pyramid of maps at strides 4, 8, 16, 32); arguments are those of ``mmoverlock.OverLoCK``.
"""

dependencies = ['torch', 'mmengine']


def _backbone(arch: str, pretrained: bool, **kwargs):
    from mmoverlock import OverLoCK
    from mmoverlock.checkpoints import OFFICIAL_RELEASE

    if not pretrained:
        return OverLoCK(arch, **kwargs)
    form = '_reparam' if kwargs.get('deploy') else ''
    url = f'{OFFICIAL_RELEASE}v1/overlock_{arch}_in1k_224{form}.pth'
    model = OverLoCK(arch, init_cfg=dict(type='Pretrained', checkpoint=url), **kwargs)
    model.init_weights()
    return model


def overlock_xtiny(pretrained: bool = False, **kwargs):
    """OverLoCK-XT; ``pretrained`` downloads the official ImageNet-1K weights."""
    return _backbone('xt', pretrained, **kwargs)


def overlock_tiny(pretrained: bool = False, **kwargs):
    """OverLoCK-T; ``pretrained`` downloads the official ImageNet-1K weights."""
    return _backbone('t', pretrained, **kwargs)


def overlock_small(pretrained: bool = False, **kwargs):
    """OverLoCK-S; ``pretrained`` downloads the official ImageNet-1K weights."""
    return _backbone('s', pretrained, **kwargs)


def overlock_base(pretrained: bool = False, **kwargs):
    """OverLoCK-B; ``pretrained`` downloads the official ImageNet-1K weights."""
    return _backbone('b', pretrained, **kwargs)


def contmix_block(dim: int, **kwargs):
    """The ContMix block alone; arguments are those of ``mmoverlock.ContMixBlock``."""
    from mmoverlock import ContMixBlock

    return ContMixBlock(dim, **kwargs)
