_base_ = [
    "../_base_/models/upernet_gspn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/schedule_160k.py",
    "../_base_/default_runtime.py",
]
model = dict(data_preprocessor=dict(size=(512, 512)))
