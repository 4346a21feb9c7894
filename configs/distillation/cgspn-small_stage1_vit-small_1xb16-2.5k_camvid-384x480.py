# Stage 1: each mixer learns its teacher's attention. The teacher is the backbone of
# vit-small_upernet_1xb16-2.5k_camvid-360x480.py, taken out by tools/export_backbone.py.
_base_ = [
    "../_base_/models/distiller_cgspn.py",
    "../_base_/datasets/camvid_images.py",
    "../_base_/schedules/schedule_distill_2.5k.py",
    "../_base_/default_runtime.py",
]
model = dict(
    type="ModulewiseDistiller",
    data_preprocessor=dict(size=(384, 480)),
    teacher=dict(
        type="EncoderTeacher",
        encoder=dict(type="CGSPN", arch="small", mixer="attention", img_size=(384, 480)),
        checkpoint="pretrained/vit-small_camvid.safetensors",
    ),
    student=dict(arch="small"),
)
# Layers are independent, and clipping by the norm of all gradients would couple them.
optim_wrapper = dict(optimizer=dict(lr=3e-3), clip_grad=None)
randomness = dict(seed=0)
