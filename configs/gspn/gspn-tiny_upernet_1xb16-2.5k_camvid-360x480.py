# From random weights on 367 images, by the recipe of C-GSPN's config for CamVid.
_base_ = [
    "../_base_/models/upernet_gspn.py",
    "../_base_/datasets/camvid.py",
    "../_base_/schedules/schedule_2.5k.py",
    "../_base_/default_runtime.py",
]
model = dict(
    # 360 is no multiple of the 32 pixels of the coarsest feature map.
    data_preprocessor=dict(size=(384, 480)),
    backbone=dict(drop_path_rate=0.1),
    decode_head=dict(channels=256, num_classes=11),
    auxiliary_head=dict(num_classes=11),
)
randomness = dict(seed=0)
