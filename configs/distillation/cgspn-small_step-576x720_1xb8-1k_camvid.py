# A resolution step: the student of stage 2 is the teacher, gives all its weights, and sees images
# of two thirds of the student's size. No load_from: it would bring adapters to the teacher before.
_base_ = "./cgspn-small_stage2_vit-small_1xb16-2.5k_camvid-384x480.py"
model = dict(
    data_preprocessor=dict(size=(576, 720)),
    teacher=dict(
        encoder=dict(_delete_=True, type="CGSPN", arch="small"),
        checkpoint="pretrained/cgspn-small_stage2_camvid.safetensors",
    ),
    teacher_scale=2 / 3,
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResize", scale=(768, 576), ratio_range=(1.0, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(576, 720)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(768, 576), keep_ratio=True),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=50),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=50, end=1000),
]
train_cfg = dict(max_iters=1000, val_interval=500)
