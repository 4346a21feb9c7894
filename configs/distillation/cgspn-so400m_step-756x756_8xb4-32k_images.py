# The next resolution step: the student of 518 pixels is the teacher.
_base_ = "./cgspn-so400m_step-518x518_8xb4-32k_images.py"
model = dict(
    data_preprocessor=dict(size=(756, 756)),
    teacher=dict(checkpoint="pretrained/cgspn-so400m_518.safetensors"),
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
