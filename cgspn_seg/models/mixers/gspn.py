"""The GSPN mixer: line scans of all channels, with coefficients made of a narrow proxy."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cgspn_seg.errors import closest, require_positive_int
from cgspn_seg.models.arch import Architecture
from cgspn_seg.models.mixers.registry import MIXERS
from cgspn_seg.ops import DIRECTIONS, channels_to_add, direction_indices, line_scan
from cgspn_seg.ops.fused import merge_directions

COMPAT = "gspn-v1"
"""The value of `compat` that reproduces how the original code maps its directions."""


class GlobalResponseNorm(nn.Module):
    """GRN (ConvNeXt V2, section 3): channels compete by their norms over the image.

    With n_c the L2 norm of channel c over all pixels, x ← x + γ ⊙ x n / mean_c(n) + β.

    Args:
        dims: channels.
        eps: added to the mean.
    """

    def __init__(self, dims: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dims))
        self.bias = nn.Parameter(torch.zeros(dims))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        # The sum of the squares over an image leaves the range of half precision.
        norms = torch.linalg.vector_norm(
            x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        response = norms / (norms.mean(-1, keepdim=True) + self.eps)
        return torch.addcmul(self.bias, x, (1 + self.weight * response).to(x.dtype))


@MIXERS.register_module(name="gspn")
class GSPNMixer(nn.Module):
    """Generalized spatial propagation (GSPN, sections 3 and 4).

    Of d = 1.5 C channels, all of which are scanned::

        x = depthwise7x7(P_in x)
        z = P_s x                                    the proxy, of s channels
        h = line_scan(x, ŵ(z), λ(z))                 one state per direction
        y = Σ_d m_d (u_d(z) ⊙ h_d + D_d(z) ⊙ x)      four learned scalars m
        out = P_out GRN(LayerNorm(y))

    No product has a bias, nor has the filter. The merge starts as the mean.

    Args:
        arch: gives C and s.
        proxy_dims: s, instead of the architecture's.
        directions: the scans; see :func:`cgspn_seg.ops.line_scan`.
        segment_length: lines after which the state restarts (the local variant, 2 in GSPN); None
            for the whole image, whatever its size (the global one).
        compat: "gspn-v1" for the function that the original code computes: it turns the image for
            each direction, but neither turns the coefficients with it nor the result back, so that
            pixels meet coefficients and results of other places. Square feature maps only. For
            weights trained with that code; None otherwise.

    Raises:
        ValueError: an option is no positive integer, a direction is unknown or repeated, `compat`
            is unknown, or the channels are odd.
    """

    needs_pos_embed = False
    local_perception = ()

    def __init__(
        self,
        arch: Architecture,
        proxy_dims: int | None = None,
        directions: Sequence[str] = DIRECTIONS,
        segment_length: int | None = None,
        compat: str | None = None,
    ) -> None:
        super().__init__()
        if arch.embed_dims % 2:
            raise ValueError(
                f"embed_dims must be even for 1.5 times as many to be whole; got {arch.embed_dims}"
            )
        dims = arch.embed_dims * 3 // 2
        proxy = arch.latent_dims if proxy_dims is None else proxy_dims
        require_positive_int("proxy_dims", proxy)
        if segment_length is not None:
            require_positive_int("segment_length", segment_length)
        direction_indices(directions)  # an unknown name is an error now, not in the first step
        if compat not in (None, COMPAT):
            raise ValueError(
                f"compat must be None or {COMPAT!r}; got {compat!r}{closest(str(compat), [COMPAT])}"
            )
        self.directions = tuple(directions)
        self.segment_length = segment_length
        self.compat = compat
        d = len(self.directions)
        self.in_proj = nn.Linear(arch.embed_dims, dims, bias=False)
        self.conv = nn.Conv2d(dims, dims, 7, padding=3, groups=dims, bias=False)
        self.proxy = nn.Linear(dims, proxy, bias=False)
        # One product for ŵ, λ, u and D of all directions.
        self.coefficients = nn.Linear(proxy, 6 * d * dims, bias=False)
        self.merge = nn.Parameter(torch.full((d,), 1 / d))
        self.norm = nn.LayerNorm(dims)
        self.grn = GlobalResponseNorm(dims)
        self.out = nn.Linear(dims, arch.embed_dims, bias=False)

    def reset_parameters(self) -> None:
        """Gives what leads to the scan PyTorch's default initialization, that of convolutions too.

        λ, u and D have no bias, so that y is a product of up to four small numbers: with the
        encoder's 0.02 its variance would lie far below the ``eps`` of the norm after it.
        """
        for layer in (self.in_proj, self.proxy, self.coefficients):
            layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        # The permuted view is what PyTorch calls channels_last: no copy on the way in or out.
        x = self.conv(self.in_proj(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        padding = channels_to_add(x) if self.compat is None else 0
        weights = self._merged_weights(padding)
        coefficients = F.linear(self.proxy(x), torch.cat(weights))
        logits, input_gate, output_gate, skip = coefficients.split([len(w) for w in weights], -1)
        d, dims = len(self.directions), x.shape[-1]
        logits = logits.unflatten(-1, (d, 3, dims + padding))
        input_gate, output_gate = (
            part.unflatten(-1, (d, dims + padding)) for part in (input_gate, output_gate)
        )
        skip = skip.unflatten(-1, (-1, dims + padding))[..., :dims]
        if self.compat is None:
            scanned = F.pad(x, (0, padding)) if padding else x
            h = self._scan(scanned, logits, input_gate, self.directions)
            merged = merge_directions(h, output_gate, None)[..., :dims]
            y = torch.addcmul(merged, skip.squeeze(3), x)
        else:
            y = self._turned(x, logits, input_gate, output_gate, skip)
        return self.out(self.grn(self.norm(y)))

    def _merged_weights(self, padding: int) -> list[Tensor]:
        """The weights of ŵ, λ, m u and m D; that of the last summed over directions, unless each is
        for an image of its own. All have zeros for the padding of each direction, D too: pixels
        are then whole slices apart.

        u and D are linear in z. Merged here, m is no pass over an image, and not rounded to half
        precision under autocast.
        """
        d, dims = len(self.directions), self.conv.in_channels
        logits, *others = self.coefficients.weight.split([3 * d * dims, *[d * dims] * 3])
        input_gate, output_gate, skip = (w.unflatten(0, (d, dims)) for w in others)
        scales = self.merge[:, None, None]
        output_gate, skip = scales * output_gate, scales * skip
        if self.compat is None:
            skip = skip.sum(0, keepdim=True)
        weights = logits.unflatten(0, (3 * d, dims)), input_gate, output_gate, skip
        padded = [F.pad(w, (0, 0, 0, padding)) for w in weights] if padding else weights
        return [w.flatten(0, 1) for w in padded]

    def _scan(
        self, x: Tensor, logits: Tensor, input_gate: Tensor, directions: Sequence[str]
    ) -> Tensor:
        return line_scan(
            x, logits, input_gate, directions=directions, segment_length=self.segment_length
        )

    def _turned(
        self, x: Tensor, logits: Tensor, input_gate: Tensor, output_gate: Tensor, skip: Tensor
    ) -> Tensor:
        """The original's directions: scans to the right of an image turned for each of them."""
        if x.shape[1] != x.shape[2]:
            raise ValueError(
                f"compat={COMPAT!r} needs square feature maps, as the original code does; got "
                f"{x.shape[1]} x {x.shape[2]}. Train on square crops and test by square windows "
                "(model.test_cfg.mode=slide model.test_cfg.crop_size=[512,512] "
                "model.test_cfg.stride=[341,341]), or leave compat out"
            )
        y = 0
        for d, direction in enumerate(self.directions):
            turned = x.transpose(1, 2) if direction in ("down", "up") else x
            turned = turned.flip(2) if direction in ("up", "left") else turned
            one = slice(d, d + 1)
            h = self._scan(turned, logits[..., one, :, :], input_gate[..., one, :], ("right",))
            y = y + output_gate[..., d, :] * h.squeeze(3) + skip[..., d, :] * turned
        return y
