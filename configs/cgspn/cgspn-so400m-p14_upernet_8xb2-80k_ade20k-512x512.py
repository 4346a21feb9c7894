# Patches of 14 pixels, for students of SigLIP2 SO400M/14 (configs/distillation), which go in with
# --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = "./cgspn-so400m_upernet_8xb2-80k_ade20k-512x512.py"
model = dict(
    # The neck halves the map of patches, so crops are padded to multiples of 28.
    data_preprocessor=dict(size=(532, 532), test_cfg=dict(size_divisor=28)),
    backbone=dict(patch_size=14),
)
