_base_ = "./cgspn-small_upernet_8xb2-80k_ade20k-640x640.py"
model = dict(
    backbone=dict(arch="tiny"),
    neck=dict(embed_dim=192),
    decode_head=dict(in_channels=[192, 192, 192, 192]),
    auxiliary_head=dict(in_channels=192),
)
