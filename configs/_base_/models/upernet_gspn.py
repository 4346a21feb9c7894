# GSPN-T + UPerNet, heads as for Swin-T and ConvNeXt-T in MMSegmentation. The sizes set arch,
# in_channels and drop_path_rate, GSPN-2 also the backbone's type.
_base_ = "./upernet_cgspn.py"
model = dict(
    backbone=dict(
        _delete_=True, type="GSPN", arch="tiny", out_indices=(0, 1, 2, 3), drop_path_rate=0.2
    ),
    neck=None,  # the stages lie at strides of 4 to 32 already
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)
