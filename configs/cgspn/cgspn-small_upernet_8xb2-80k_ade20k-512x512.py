_base_ = [
    "../_base_/models/upernet_cgspn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/schedule_80k.py",
    "../_base_/default_runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(arch="small", img_size=512),
)
