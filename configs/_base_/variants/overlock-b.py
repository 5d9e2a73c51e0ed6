# OverLoCK-B: the channels of its outputs and the released ImageNet-1K weights.
cls_channels = [576, 720]  # overview, focus
dense_channels = [80, 160, 528, 720]  # strides 4, 8, 16, 32
pretrained = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_b_in1k_224.pth'
