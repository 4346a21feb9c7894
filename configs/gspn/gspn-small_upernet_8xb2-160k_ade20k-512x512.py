_base_ = "./gspn-tiny_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(arch="small", drop_path_rate=0.4),
    decode_head=dict(in_channels=[108, 216, 432, 864]),
    auxiliary_head=dict(in_channels=432),
)
