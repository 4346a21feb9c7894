_base_ = "../gspn/gspn-tiny_upernet_8xb2-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(type="GSPN2"),
    decode_head=dict(in_channels=[88, 176, 352, 704]),
    auxiliary_head=dict(in_channels=352),
)
