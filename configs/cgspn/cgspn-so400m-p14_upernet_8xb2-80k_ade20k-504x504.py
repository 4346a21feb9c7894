# Patches of 14 pixels, for students of SigLIP2 SO400M/14 (configs/distillation), which go in with
# --cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=FILE
_base_ = [
    "../_base_/models/upernet_cgspn.py",
    "../_base_/datasets/ade20k_504x504.py",
    "../_base_/schedules/schedule_80k.py",
    "../_base_/default_runtime.py",
]
model = dict(
    # The neck halves the map of patches, so sizes are multiples of 28.
    data_preprocessor=dict(size=(504, 504), test_cfg=dict(size_divisor=28)),
    backbone=dict(
        arch="so400m", patch_size=14, img_size=504, out_indices=(6, 13, 20, 26), drop_path_rate=0.3
    ),
    neck=dict(embed_dim=1152),
    decode_head=dict(in_channels=[1152, 1152, 1152, 1152], channels=1024),
    auxiliary_head=dict(in_channels=1152),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(layer_decay_rate=0.95))
