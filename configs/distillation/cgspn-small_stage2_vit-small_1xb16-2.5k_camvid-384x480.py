# Stage 2: the whole student, from the image, compared with its teacher in every block. It starts
# from stage 1's checkpoint: --cfg-options load_from=work_dirs/.../iter_2500.pth
_base_ = "./cgspn-small_stage1_vit-small_1xb16-2.5k_camvid-384x480.py"
model = dict(type="EndToEndDistiller")
optim_wrapper = dict(
    optimizer=dict(lr=5e-4), clip_grad=dict(_delete_=True, max_norm=5.0, norm_type=2)
)
default_hooks = dict(checkpoint=dict(save_best="block/error_mean"))
