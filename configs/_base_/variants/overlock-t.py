# OverLoCK-T: the channels of its outputs and the released ImageNet-1K weights.
cls_channels = [512, 640]  # overview, focus
dense_channels = [64, 128, 384, 640]  # strides 4, 8, 16, 32
pretrained = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_t_in1k_224.pth'
