_base_ = "./gspn2-tiny_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(arch="small", drop_path_rate=0.4),
    decode_head=dict(in_channels=[104, 208, 416, 832]),
    auxiliary_head=dict(in_channels=416),
)
