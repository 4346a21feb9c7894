_base_ = "./cgspn-small_upernet_8xb2-80k_ade20k-640x640.py"
model = dict(
    backbone=dict(arch="base", drop_path_rate=0.2),
    neck=dict(embed_dim=768),
    decode_head=dict(in_channels=[768, 768, 768, 768], channels=768),
    auxiliary_head=dict(in_channels=768),
)
