# Stage 2; start from stage 1: --cfg-options load_from=work_dirs/.../iter_40000.pth
_base_ = "./cgspn-so400m_stage1_siglip2-so400m_8xb16-40k_images-378x378.py"
model = dict(type="EndToEndDistiller")
optim_wrapper = dict(
    optimizer=dict(lr=5e-4), clip_grad=dict(_delete_=True, max_norm=5.0, norm_type=2)
)
default_hooks = dict(checkpoint=dict(save_best="block/error_mean"))
