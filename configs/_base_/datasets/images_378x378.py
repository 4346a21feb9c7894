# Any images, without labels: data/images/training and validation, with any folders in them.
dataset_type = "ImageFolderDataset"
data_root = "{{$CGSPN_DATA:data}}/images"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    # The short side comes to 378 to 567 pixels.
    dict(type="RandomResize", scale=(4096, 378), ratio_range=(1.0, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(378, 378)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(378, 378), keep_ratio=False),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type=dataset_type, data_root=data_root, folders="training", pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type, data_root=data_root, folders="validation", pipeline=test_pipeline
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="DistillationMetric")
test_evaluator = val_evaluator
