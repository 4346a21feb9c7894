# For a resolution step: a million images, as in the C-GSPN paper, on eight GPUs with 4 each.
_base_ = "./schedule_distill_40k.py"
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=500),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=False, begin=500, end=32000),
]
train_cfg = dict(max_iters=32000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000, save_best="block/error_mean"))
