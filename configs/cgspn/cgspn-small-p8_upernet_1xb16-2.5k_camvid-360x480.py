# Patches of 8 pixels: four times the tokens, which propagation can afford, and the same weights but
# for the patch embedding. The features lie at strides of 4 to 32 as with patches of 16.
_base_ = "./cgspn-small_upernet_1xb16-2.5k_camvid-360x480.py"
model = dict(backbone=dict(patch_size=8), neck=dict(rescales=[2, 1, 0.5, 0.25]))
