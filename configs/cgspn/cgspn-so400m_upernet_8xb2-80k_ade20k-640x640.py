_base_ = "./cgspn-small_upernet_8xb2-80k_ade20k-640x640.py"
model = dict(
    backbone=dict(arch="so400m", out_indices=(6, 13, 20, 26), drop_path_rate=0.3),
    neck=dict(embed_dim=1152),
    decode_head=dict(in_channels=[1152, 1152, 1152, 1152], channels=1024),
    auxiliary_head=dict(in_channels=1152),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(layer_decay_rate=0.95))
