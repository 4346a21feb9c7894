# For small data sets, trained from scratch: one learning rate for all layers, 5 % of warm-up.
_base_ = "./schedule_80k.py"
optim_wrapper = dict(
    optimizer=dict(lr=5e-4),
    paramwise_cfg=dict(layer_decay_rate=1.0),
    clip_grad=dict(max_norm=5.0, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=125),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=125, end=2500),
]
train_cfg = dict(max_iters=2500, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=500))
