# CamVid's images without their labels, for distillation. They are enlarged to fill crops of whole
# patches, since padding would be compared too.
_base_ = "./images_378x378.py"
data_root = "{{$CGSPN_DATA:data}}/camvid/images"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResize", scale=(512, 384), ratio_range=(1.0, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(384, 480)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(512, 384), keep_ratio=True),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(num_workers=4, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(num_workers=4, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
