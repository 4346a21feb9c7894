# A resolution step, of a million images as in the paper: the student so far teaches at 518 pixels.
_base_ = "./cgspn-so400m_stage2_siglip2-so400m_8xb16-40k_images-378x378.py"
model = dict(
    data_preprocessor=dict(size=(756, 756)),
    teacher=dict(
        _delete_=True,
        type="EncoderTeacher",
        encoder=dict(type="CGSPN", arch="so400m", patch_size=14),
        checkpoint="pretrained/cgspn-so400m_518.safetensors",
    ),
    teacher_scale=518 / 756,
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResize", scale=(4096, 756), ratio_range=(1.0, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(756, 756)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(756, 756), keep_ratio=False),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=4, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=500),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=500, end=32000),
]
train_cfg = dict(max_iters=32000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
