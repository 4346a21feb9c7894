# The isomorphic ViT: everything as in C-GSPN's config, attention in place of propagation.
_base_ = "./cgspn-small_upernet_1xb16-2.5k_camvid-360x480.py"
model = dict(backbone=dict(mixer="attention"))
