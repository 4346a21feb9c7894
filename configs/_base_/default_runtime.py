# What all configs share: the parts of this package, the environment, logging and the data check.
default_scope = "mmseg"
custom_imports = dict(
    imports=["cgspn_seg.models", "cgspn_seg.datasets", "cgspn_seg.engine"],
    allow_failed_imports=False,
)
env_cfg = dict(
    # Searching for the fastest convolutions gains nothing with channels_last.
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
channels_last = True  # the memory layout of the weights, and with it of the features
vis_backends = [dict(type="LocalVisBackend")]
visualizer = dict(type="SegLocalVisualizer", vis_backends=vis_backends, name="visualizer")
log_processor = dict(by_epoch=False)
log_level = "INFO"
load_from = None
resume = False
custom_hooks = [
    # Looks for missing labels, wrong label ids and the like before the first iteration.
    dict(type="CheckDataHook", max_seconds=60),
    # Keeps the list of images where a data set has a `fraction`.
    dict(type="SaveSubsetHook"),
]

tta_model = dict(type="SegTTAModel")
