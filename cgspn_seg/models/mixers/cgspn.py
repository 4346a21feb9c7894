"""The C-GSPN mixer: four line scans in a compressed latent, in place of self-attention."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cgspn_seg.errors import require_positive_int
from cgspn_seg.models.arch import Architecture
from cgspn_seg.models.mixers.registry import MIXERS
from cgspn_seg.ops import DIRECTIONS, direction_indices, line_scan
from cgspn_seg.ops.fused import gated_projection, merge_directions


@MIXERS.register_module(name="cgspn")
class CGSPNMixer(nn.Module):
    """Compressed propagation (C-GSPN, section on the block): C -> C_c, scan, C_c -> C, with a gate
    around it.

    With z = P↓ x the latent, all that the scan takes is linear in z::

        h = line_scan(z, ŵ(z), λ(z))          one state per direction
        y = P↑ Σ_d u_d(z) ⊙ norm(h_d)
        out = P_o (y ⊙ SiLU(P_g x))

    The state's scale grows with the number of lines it has passed, hence the norm. The two C x C
    products P_g and P_o are what the paper's parameter count leaves room for. λ and u start open:
    their biases are 1.

    Args:
        arch: gives C and C_c.
        latent_dims: C_c, instead of the architecture's.
        weight_groups: G, channel groups that share coefficients; None for one group per channel
            (C-GSPN), 1 for coefficients shared by all channels (GSPN-2).
        directions: the scans; see :func:`cgspn_seg.ops.line_scan`.
        segment_length: lines after which the state restarts; None for the whole image. With 1
            nothing is propagated.
        state_norm: whether the states are normalized (LayerNorm over C_c).

    Raises:
        ValueError: an option is no positive integer, ``weight_groups`` does not divide the latent
            channels, or a direction is unknown or repeated.
    """

    needs_pos_embed = False
    local_perception = ("mixer",)
    gated = True  # whether the two C x C products are there

    def __init__(
        self,
        arch: Architecture,
        latent_dims: int | None = None,
        weight_groups: int | None = None,
        directions: Sequence[str] = DIRECTIONS,
        segment_length: int | None = None,
        state_norm: bool = True,
    ) -> None:
        super().__init__()
        dims = arch.embed_dims
        latent = arch.latent_dims if latent_dims is None else latent_dims
        self.weight_groups = latent if weight_groups is None else weight_groups
        require_positive_int("latent_dims", latent)
        require_positive_int("weight_groups", self.weight_groups)
        if segment_length is not None:
            require_positive_int("segment_length", segment_length)
        if latent % self.weight_groups:
            raise ValueError(
                f"weight_groups must divide the {latent} latent channels; got {self.weight_groups}"
            )
        direction_indices(directions)  # an unknown name is an error now, not in the first step
        self.directions = tuple(directions)
        self.segment_length = segment_length
        # P↓ and P_g are one product.
        self.in_proj = nn.Linear(dims, latent + (dims if self.gated else 0))
        # One product for the logits ŵ, λ and u of all directions; the scan reads slices of it in
        # place.
        self.coefficients = nn.Linear(latent, sum(self._coefficient_widths(latent)))
        self.state_norm = nn.LayerNorm(latent) if state_norm else None
        self.up = nn.Linear(latent, dims)
        self.out = nn.Linear(dims, dims) if self.gated else None
        with torch.no_grad():
            self.coefficients.bias.split(self._coefficient_widths(latent))[0].zero_()
            self.coefficients.bias[-2 * len(self.directions) * latent :] = 1

    def _coefficient_widths(self, latent: int) -> list[int]:
        d = len(self.directions)
        return [d * 3 * self.weight_groups, d * latent, d * latent]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        d, latent = len(self.directions), self.coefficients.in_features
        projected = self.in_proj(x)
        z, gate = projected.split((latent, projected.shape[-1] - latent), dim=-1)
        # As a matrix: with more axes and gaps between rows, the bias would be a pass of its own.
        coefficients = self.coefficients(z.flatten(0, 2)).unflatten(0, z.shape[:3])
        logits, input_gate, output_gate = coefficients.split(
            self._coefficient_widths(latent), dim=-1
        )
        h = line_scan(
            z,
            logits.unflatten(-1, (d, 3, self.weight_groups)),
            input_gate.unflatten(-1, (d, latent)),
            directions=self.directions,
            segment_length=self.segment_length,
        )
        merged = merge_directions(h, output_gate.unflatten(-1, (d, latent)), self.state_norm)
        if self.out is None:
            return self.up(merged)
        return gated_projection(merged, gate, self.up, self.out)


@MIXERS.register_module(name="cgspn-lean")
class CGSPNLeanMixer(CGSPNMixer):
    """The low-rank core of C-GSPN alone: :class:`CGSPNMixer` without its two C x C products."""

    gated = False
