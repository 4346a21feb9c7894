_base_ = "../gspn/gspn-tiny_upernet_1xb16-2.5k_camvid-360x480.py"
model = dict(
    backbone=dict(type="GSPN2"),
    decode_head=dict(in_channels=[88, 176, 352, 704]),
    auxiliary_head=dict(in_channels=352),
)
