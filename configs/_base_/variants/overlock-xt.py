# OverLoCK-XT: the channels of its outputs and the released ImageNet-1K weights.
cls_channels = [336, 420]  # overview, focus
dense_channels = [56, 112, 340, 420]  # strides 4, 8, 16, 32
pretrained = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_xt_in1k_224.pth'
