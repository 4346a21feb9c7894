# A resolution step: the student so far is the teacher, and sees images of 378 pixels.
_base_ = [
    "../_base_/models/distiller_cgspn.py",
    "../_base_/datasets/images_378x378.py",
    "../_base_/schedules/schedule_distill_step.py",
    "../_base_/default_runtime.py",
]
model = dict(
    type="EndToEndDistiller",
    data_preprocessor=dict(size=(518, 518), test_cfg=dict(size_divisor=14)),
    teacher=dict(
        type="EncoderTeacher",
        encoder=dict(type="CGSPN", arch="so400m", patch_size=14),
        checkpoint="pretrained/cgspn-so400m_378.safetensors",
    ),
    student=dict(arch="so400m", patch_size=14),
    teacher_scale=378 / 518,
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResize", scale=(4096, 518), ratio_range=(1.0, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(518, 518)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(518, 518), keep_ratio=False),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=4, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
