# The paper's teacher, SigLIP2 SO400M/14, whose folder from Hugging Face lies in pretrained/.
_base_ = [
    "../_base_/models/distiller_cgspn.py",
    "../_base_/datasets/images_378x378.py",
    "../_base_/schedules/schedule_distill_40k.py",
    "../_base_/default_runtime.py",
]
model = dict(
    type="ModulewiseDistiller",
    data_preprocessor=dict(size=(378, 378), test_cfg=dict(size_divisor=14)),
    teacher=dict(type="TransformersTeacher", path="pretrained/siglip2-so400m-patch14-384"),
    student=dict(arch="so400m", patch_size=14),
)
# Layers are independent, and clipping by the norm of all gradients would couple them.
optim_wrapper = dict(clip_grad=None)
