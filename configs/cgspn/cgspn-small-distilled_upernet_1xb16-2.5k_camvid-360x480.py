# Fine-tuning a distilled encoder, at a tenth of the rate, which keeps what it has learned. With few
# labels, that matters: --cfg-options train_dataloader.dataset.fraction=0.1
_base_ = "./cgspn-small_upernet_1xb16-2.5k_camvid-360x480.py"
model = dict(
    backbone=dict(
        init_cfg=dict(
            type="Pretrained", checkpoint="pretrained/cgspn-small_stage2_camvid.safetensors"
        )
    )
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))))
