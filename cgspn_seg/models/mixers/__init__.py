"""Token mixers: modules from (B, H, W, C) tokens to (B, H, W, C), built from an architecture."""

from cgspn_seg.models.mixers.attention import AttentionMixer
from cgspn_seg.models.mixers.cgspn import CGSPNLeanMixer, CGSPNMixer
from cgspn_seg.models.mixers.gspn import GSPNMixer
from cgspn_seg.models.mixers.gspn2 import GSPN2Mixer
from cgspn_seg.models.mixers.registry import MIXERS, build_mixer, mixer_configs

__all__ = [
    "MIXERS",
    "AttentionMixer",
    "CGSPNLeanMixer",
    "CGSPNMixer",
    "GSPN2Mixer",
    "GSPNMixer",
    "build_mixer",
    "mixer_configs",
]
