_base_ = "./cgspn-small_upernet_8xb2-80k_ade20k-512x512.py"
model = dict(
    backbone=dict(arch="large", out_indices=(5, 11, 17, 23), drop_path_rate=0.3),
    neck=dict(embed_dim=1024),
    decode_head=dict(in_channels=[1024, 1024, 1024, 1024], channels=1024),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(layer_decay_rate=0.95))
