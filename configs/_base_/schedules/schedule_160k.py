# MMSegmentation's recipe for Swin on ADE20K: one learning rate for all layers, 1,500 iterations of
# warm-up, then linear decay to 0.
_base_ = "./schedule_80k.py"
optim_wrapper = dict(
    optimizer=dict(lr=6e-5, weight_decay=0.01), paramwise_cfg=dict(layer_decay_rate=1.0)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160000),
]
train_cfg = dict(max_iters=160000, val_interval=16000)
default_hooks = dict(checkpoint=dict(interval=16000))
