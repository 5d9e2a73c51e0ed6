# OverLoCK-XT on ImageNet-1K, 224x224.
# Published: 82.7 top-1 (arXiv 2502.20087, official release). Cost: not published.
#   tools/dist_train.sh configs/classification/overlock-xt_8xb256_in1k.py 8
_base_ = [
    '../_base_/models/overlock_cls.py',
    '../_base_/datasets/imagenet_bs256.py',
    '../_base_/schedules/imagenet_bs2048_310e.py',
    '../_base_/variants/overlock-xt.py',
]
model = dict(
    backbone=dict(arch='xt', drop_path_rate=0.1),
    head=dict(in_channels=_base_.cls_channels),
)
test_pipeline = _base_.test_pipeline
test_pipeline[1]['scale'] = 242  # 224 / 0.925
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
