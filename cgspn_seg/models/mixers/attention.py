"""Multi-head self-attention, the mixer of the isomorphic ViT."""

from torch import Tensor, nn
from torch.nn import functional as F

from cgspn_seg.models.arch import Architecture
from cgspn_seg.models.mixers.registry import MIXERS


@MIXERS.register_module(name="attention")
class AttentionMixer(nn.Module):
    """Softmax self-attention over all tokens of the image, by PyTorch's fused kernels.

    Args:
        arch: gives the channels and the number of heads, which must divide them.
        qkv_bias: whether query, key and value have biases.
    """

    needs_pos_embed = True
    local_perception = ()

    def __init__(self, arch: Architecture, qkv_bias: bool = True) -> None:
        super().__init__()
        dims, self.num_heads = arch.embed_dims, arch.num_heads
        if dims % self.num_heads:
            raise ValueError(
                f"num_heads must divide embed_dims; got {self.num_heads} heads and {dims} channels"
            )
        self.qkv = nn.Linear(dims, 3 * dims, bias=qkv_bias)
        self.proj = nn.Linear(dims, dims)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        shape = x.shape
        qkv = self.qkv(x).view(shape[0], shape[1] * shape[2], 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(query, key, value)
        return self.proj(y.transpose(1, 2).reshape(shape))
