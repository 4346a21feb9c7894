"""The GSPN-2 mixer: line scans of a few proxy channels that share their coefficients."""

from collections.abc import Sequence

from cgspn_seg.models.arch import Architecture
from cgspn_seg.models.mixers.cgspn import CGSPNMixer
from cgspn_seg.models.mixers.registry import MIXERS
from cgspn_seg.ops import DIRECTIONS


@MIXERS.register_module(name="gspn2")
class GSPN2Mixer(CGSPNMixer):
    """Compact channel propagation (GSPN-2, section on the model).

    The tokens are projected to C_proxy channels, scanned there and projected back::

        z = P↓ x                              C to C_proxy
        h = line_scan(z, ŵ(z), λ(z))          one set of coefficients for all channels, λ for each
        out = P↑ Σ_d u_d(z) ⊙ norm(h_d)       C_proxy to C

    That is C-GSPN's mixer without the gate around it and with G = 1, hence the base class. Local
    perception units stand before the mixer and before the MLP. What the paper leaves open (where ŵ,
    λ and u come from, the norm of the states, the merge) is as in C-GSPN.

    Args:
        arch: gives C and C_proxy.
        proxy_dims: C_proxy, instead of the architecture's.
        directions: the scans; see :func:`cgspn_seg.ops.line_scan`.
        segment_length: lines after which the state restarts (the local variant; 2 in GSPN); None
            for the whole image, whatever its size (the global one).
        state_norm: whether the states are normalized (LayerNorm over C_proxy).

    Raises:
        ValueError: an option is no positive integer, or a direction is unknown or repeated.
    """

    local_perception = ("mixer", "mlp")
    gated = False

    def __init__(
        self,
        arch: Architecture,
        proxy_dims: int | None = None,
        directions: Sequence[str] = DIRECTIONS,
        segment_length: int | None = None,
        state_norm: bool = True,
    ) -> None:
        super().__init__(arch, proxy_dims, 1, directions, segment_length, state_norm)
