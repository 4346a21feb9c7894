"""What the encoders have in common: checks of arguments, initialization, freezing, numbering."""

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cgspn_seg.errors import closest
from cgspn_seg.models.arch import Architecture
from cgspn_seg.models.backbones.block import Block


class Encoder(BaseModule):
    """Base class of the encoders.

    Subclasses call :meth:`_finish` when their parts are there, and say by :meth:`_blocks`,
    :meth:`_layer_of` and :meth:`_frozen_parts` how deep each lies, and by :attr:`out_channels` how
    wide their outputs are.

    Args:
        depth: number of what ``out_indices`` and ``frozen_stages`` count.
        unit: what that is, in messages: "layers" or "stages".
        out_indices: as the subclasses describe it.
        drop_path_rate: likewise.
        gelu: likewise.
        with_cp: likewise.
        frozen_stages: likewise.
        init_cfg: likewise.

    Raises:
        ValueError: an argument is out of range.
    """

    mixer_key = "mixer"  # of the config, where the mixers' options are

    def __init__(
        self,
        depth: int,
        unit: str,
        *,
        out_indices: Sequence[int],
        drop_path_rate: float,
        gelu: str,
        with_cp: bool,
        frozen_stages: int,
        init_cfg: Mapping | Sequence[Mapping] | None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1); got {drop_path_rate}")
        if gelu not in ("tanh", "none"):
            raise ValueError(f"gelu must be 'tanh' or 'none'; got {gelu!r}")
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= depth:
            raise ValueError(
                f"frozen_stages must lie between -1 and the {depth} {unit}; got {frozen_stages!r}"
            )
        self.with_cp = with_cp
        self.out_indices = resolve_out_indices(out_indices, depth, unit)
        self.frozen_stages = frozen_stages

    def train(self, mode: bool = True) -> "Encoder":
        """Sets training mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """The depth of a parameter, for layer-wise learning rates.

        Args:
            param_name: the parameter's name in the whole model.
            prefix: what stands before this encoder's own names, for example "backbone.".

        Returns:
            The parameter's layer (0 for the embedding, i + 1 for block i, the number of layers less
            one for what comes after the blocks and for parameters outside the encoder), and the
            number of layers.
        """
        num_layers = sum(len(blocks) for blocks in self._blocks()) + 2
        layer = None
        if param_name.startswith(prefix):
            layer = self._layer_of(param_name.removeprefix(prefix))
        return (num_layers - 1 if layer is None else layer), num_layers

    def function_options(self) -> dict[str, dict[str, Any]]:
        """The options that decide what is computed and that no tensor's name or shape tells.

        Of a mixer these are the options that it keeps under their own names, and the sizes of its
        architecture that it keeps, such as the number of heads.

        Returns:
            For each option, as a config names it, its value in each block, by the block's name.
        """
        found: dict[str, dict[str, Any]] = {}
        for name, block in self.named_modules():
            if not isinstance(block, Block):
                continue
            values = {"gelu": block.mlp.act.approximate, "norm_eps": block.norm1.eps}
            known = inspect.signature(type(block.mixer)).parameters
            for option, parameter in list(known.items())[1:]:
                if hasattr(block.mixer, option):
                    value = getattr(block.mixer, option)
                    if isinstance(parameter.default, bool):  # kept as a part that is there or not
                        value = value is not None and value is not False
                    values[f"{self.mixer_key}[{option!r}]"] = value
            for field in fields(Architecture):
                if hasattr(block.mixer, field.name):
                    values[f"arch[{field.name!r}]"] = getattr(block.mixer, field.name)
            for option, value in values.items():
                found.setdefault(option, {})[name] = value
        return found

    @property
    @abstractmethod
    def out_channels(self) -> tuple[int, ...]:
        """Channels of each output."""

    @abstractmethod
    def _blocks(self) -> Sequence[nn.ModuleList]:
        """The blocks in the order they run in, in one list or several."""

    @abstractmethod
    def _layer_of(self, name: str) -> int | None:
        """The layer of a parameter by its own name; None for one that comes after the blocks."""

    @abstractmethod
    def _frozen_parts(self) -> Sequence[nn.Module | nn.Parameter]:
        """What ``frozen_stages`` freezes, where it is not -1."""

    def _finish(self) -> None:
        """Initializes the products, and freezes what is to be frozen."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        for blocks in self._blocks():
            for block in blocks:
                if hasattr(block.mixer, "reset_parameters"):
                    block.mixer.reset_parameters()
                if block.mixer_lpu is not None and block.mlp_lpu is not None:
                    # They multiply the residual stream: with PyTorch's default and two of them a
                    # block, its scale would grow 200 times in a stage of 22 blocks.
                    for unit in (block.mixer_lpu, block.mlp_lpu):
                        nn.init.trunc_normal_(unit.conv.weight, std=0.02)
                        nn.init.zeros_(unit.conv.bias)
        self._freeze()

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        for part in self._frozen_parts():
            part.requires_grad_(False)
            if isinstance(part, nn.Module):
                part.eval()

    def _run(self, block: nn.Module, x: Tensor, frozen: bool, **options: Any) -> Any:
        """A block's output; with ``with_cp``, the block will run again for its gradients."""
        if self.with_cp and torch.is_grad_enabled() and not frozen:
            return checkpoint(block, x, use_reentrant=False, **options)
        return block(x, **options)


def refuse_unknown(cls: type, unknown: Mapping[str, Any]) -> None:
    """Raises TypeError, with the nearest known name, for arguments that ``cls`` does not have."""
    if unknown:
        known = list(inspect.signature(cls).parameters)[:-1]
        name = next(iter(unknown))
        raise TypeError(
            f"{cls.__name__} has no argument {name!r}; it takes {known}{closest(name, known)}"
        )


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Rates that grow linearly from 0 in the first block to ``last`` in the last of ``depth``."""
    return torch.linspace(0, last, depth, device="cpu").tolist()


def resolve_out_indices(out_indices: Sequence[int], depth: int, unit: str) -> tuple[int, ...]:
    """Indices from 0 on out of such that may count from the end.

    Raises:
        ValueError: there is none, or one is out of range or there twice.
    """
    if not isinstance(out_indices, Sequence) or not out_indices:
        raise ValueError(
            f"out_indices must be a sequence of indices of {unit}; got {out_indices!r}"
        )
    for index in out_indices:
        if not -depth <= index < depth:
            raise ValueError(
                f"out_indices must lie between {-depth} and {depth - 1} for {depth} {unit}; "
                f"got {index}"
            )
    resolved = tuple(index % depth for index in out_indices)
    if len(set(resolved)) != len(resolved):
        raise ValueError(f"out_indices must not repeat; got {tuple(out_indices)}")
    return resolved
