# For distillation on a small data set: as for training on it, with the learning rate of new mixers.
_base_ = "./schedule_2.5k.py"
optim_wrapper = dict(optimizer=dict(lr=1e-3))
default_hooks = dict(checkpoint=dict(save_best="mixer/error_mean", rule="less"))
