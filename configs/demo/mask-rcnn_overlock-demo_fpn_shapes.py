# Mask R-CNN on 128x128 scenes of shapes, from the backbone of the demo classifier.
# Expected: box AP50 about 83, mask AP50 about 78 on held-out scenes, in 4 to 7 minutes on 2 cores.
#   python tools/train.py configs/demo/mask-rcnn_overlock-demo_fpn_shapes.py \
#       --cfg-options model.backbone.init_cfg.checkpoint=work_dirs/overlock-demo_shapes/CLASSIFIER.pth
_base_ = ['../detection/mask-rcnn_overlock-xt_fpn_1x_coco.py', './_base_/shapes.py']

# Heads of a quarter of the usual width, and anchors of 16 to 256 pixels in place of 32 to 512.
norm_cfg = dict(type='BN')
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, **_base_.demo_arch),
        drop_path_rate=0.0,
        init_cfg=dict(checkpoint='CLASSIFIER.pth', prefix='backbone.'),
    ),
    neck=dict(in_channels=_base_.demo_dense_channels, out_channels=64, norm_cfg=norm_cfg),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=6),
        mask_roi_extractor=dict(out_channels=64),
        mask_head=dict(in_channels=64, conv_out_channels=32, num_convs=2, num_classes=6, norm_cfg=norm_cfg),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=30)),
)

train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2]['scale'] = test_pipeline[1]['scale'] = (128, 128)  # as they are
train_pipeline[3] = dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal'])
data_root = _base_.demo_data_root + '/coco/'
metainfo = dict(classes=_base_.demo_classes, palette=_base_.demo_palette)
train_dataloader = dict(
    batch_size=8, num_workers=1, dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=train_pipeline)
)
val_dataloader = dict(
    batch_size=8, num_workers=1, dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=test_pipeline)
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json', classwise=True)
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=1.5e-3), clip_grad=dict(max_norm=5.0))
max_iters = 400
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=50, end=max_iters),
]
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=max_iters, val_interval=100)
default_hooks = dict(
    logger=dict(interval=10, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=100, max_keep_ckpts=1, save_best=None),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
