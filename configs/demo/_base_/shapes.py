# What the three demo configs share: a small OverLoCK and the data set that tools/demo/make_scenes.py draws.
# The folder may be set from outside: MMOVERLOCK_DEMO_DATA=FOLDER tools/train.py ...
demo_data_root = '{{$MMOVERLOCK_DEMO_DATA:work_dirs/demo/data}}'

# Everything of OverLoCK in small, for 2 CPU cores. The pictures are 64 and 128 pixels wide: Focus-Net sees maps of 4 to
# 8 and 2 to 4 pixels a side, and kernels larger than the map would only see it enlarged.
demo_arch = dict(
    depths=(1, 1, 1, 1),
    focus_depths=(2, 1),
    widths=(32, 64, 96, 128),
    mlp_ratios=(3, 3, 3, 3),
    focus_heads=(2, 2),
    kernel_sizes=(7, 7, 7, 5),
    small_kernel=3,
)
demo_cls_channels = [128, 160]  # overview, focus
demo_dense_channels = [32, 64, 128, 160]  # strides 4, 8, 16, 32

demo_classes = ('circle', 'cross', 'ring', 'square', 'star', 'triangle')
demo_palette = [(47, 95, 208), (217, 105, 30), (142, 68, 173), (27, 138, 90), (212, 160, 23), (192, 52, 43)]
