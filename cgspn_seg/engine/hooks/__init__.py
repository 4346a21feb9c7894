"""Hooks; importing this registers them with MMSegmentation."""

from cgspn_seg.engine.hooks.check_data import CheckDataHook

__all__ = ["CheckDataHook"]
