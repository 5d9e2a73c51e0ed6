# The multi-scale and crop augmentation of DETR, as in mmdet's ms-crop-3x configs: half of the
# pictures are resized, the other half are resized, cropped and resized.
scales = [(short, 1333) for short in range(480, 801, 32)]
ms_crop = dict(
    type='RandomChoice',
    transforms=[
        [dict(type='RandomChoiceResize', scales=scales, keep_ratio=True)],
        [
            dict(
                type='RandomChoiceResize',
                scales=[(400, 1333), (500, 1333), (600, 1333)],
                keep_ratio=True,
            ),
            dict(
                type='RandomCrop',
                crop_type='absolute_range',
                crop_size=(384, 600),
                allow_negative_crop=True,
            ),
            dict(type='RandomChoiceResize', scales=scales, keep_ratio=True),
        ],
    ],
)
