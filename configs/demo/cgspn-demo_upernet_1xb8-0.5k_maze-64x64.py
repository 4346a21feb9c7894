# A C-GSPN of four small layers that learns in about a minute on two CPU cores; see tools/demo.py.
# Everything not named here is as for ADE20K.
_base_ = "../cgspn/cgspn-tiny_upernet_8xb2-80k_ade20k-512x512.py"

model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(
        arch=dict(
            _delete_=True,
            embed_dims=64,
            num_layers=4,
            num_heads=4,
            feedforward_channels=128,
            latent_dims=32,
        ),
        patch_size=4,
        img_size=64,
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.0,
    ),
    neck=dict(embed_dim=64),
    decode_head=dict(in_channels=[64] * 4, channels=16, num_classes=4),
    auxiliary_head=dict(in_channels=64, channels=16, num_classes=4),
)

# What tools/draw_mazes.py draws: as in ADE20K, the label 0 (here walls) is ignored.
mazes = dict(
    type="BaseSegDataset",
    data_root="{{$CGSPN_DATA:data}}/mazes",
    reduce_zero_label=True,
    metainfo=dict(
        classes=("red", "amber", "green", "blue"),
        palette=[[222, 73, 60], [246, 190, 74], [46, 160, 116], [62, 112, 201]],
    ),
)
# Mazes come in their final size, and their colors are what matters.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomFlip", prob=0.75, direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
# Images this small are read faster than a worker passes them on.
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(pipeline=train_pipeline, **mazes),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(pipeline=test_pipeline, **mazes),
)
test_dataloader = val_dataloader

optim_wrapper = dict(
    optimizer=dict(lr=3e-3, weight_decay=0.01),
    paramwise_cfg=dict(layer_decay_rate=1.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=25),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=25, end=500),
]
train_cfg = dict(max_iters=500, val_interval=50)
default_hooks = dict(logger=dict(interval=5), checkpoint=dict(interval=500))
randomness = dict(seed=0)
