# A C-GSPN encoder beside a frozen teacher; stage, sizes and teacher are set by what inherits this.
model = dict(
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        test_cfg=dict(size_divisor=32),
    ),
    student=dict(type="CGSPN"),
)
