"""The fused passes as Triton kernels; :mod:`cgspn_seg.ops.fused` is their face."""
