"""Parameter groups: layer-wise learning rates, no weight decay where it does not belong."""

from collections.abc import Iterator

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from cgspn_seg.errors import closest
from cgspn_seg.sharding import is_sharded, num_axes, own_name

OPTIONS = ("layer_decay_rate", "custom_keys")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Learning rates that decay from the last layer of the encoder to the first.

    A parameter of layer l out of L has ``lr * layer_decay_rate ** (L - 1 - l)``; the heads and what
    follows the encoder's last block have ``lr``. Biases, norms and all other parameters with fewer
    than two axes, and positional embeddings, have no weight decay. Parameters with equal settings
    share a group: an optimizer step over few groups takes a fraction of the time.

    ``paramwise_cfg`` takes:

    - ``layer_decay_rate``: 1 (the default) for the same rate in all layers.
    - ``custom_keys``: as in MMEngine, a dict from a part of a parameter's name to ``lr_mult`` and
      ``decay_mult``; the longest part that occurs in the name wins.

    Raises:
        ValueError: ``paramwise_cfg`` has an unknown key, or the rate is not in (0, 1].
        TypeError: ``layer_decay_rate`` is below 1 and the backbone has no ``get_layer_depth``.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        for key in self.paramwise_cfg:
            if key not in OPTIONS:
                raise ValueError(
                    f"paramwise_cfg has the unknown key {key!r}; {type(self).__name__} takes "
                    f"{OPTIONS}{closest(key, OPTIONS)}"
                )
        rate = self.paramwise_cfg.get("layer_decay_rate", 1.0)
        if not 0 < rate <= 1:
            raise ValueError(f"paramwise_cfg.layer_decay_rate must be in (0, 1]; got {rate}")

    def __call__(self, model: nn.Module) -> object:
        # MMEngine looks through wrappers, FSDP too, whose parameters are then flat.
        whole = model if is_sharded(model) else getattr(model, "module", model)
        self._num_axes = num_axes(whole)
        # Without options MMEngine's constructor would put all parameters in one group with decay.
        self.paramwise_cfg = {"layer_decay_rate": 1.0, **self.paramwise_cfg}
        return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, **_: object) -> None:
        """Appends the parameter groups of the whole model ``module`` to ``params``."""
        groups: dict[tuple[float, float], dict] = {}
        for sharded_name, parameter in module.named_parameters():
            name = own_name(sharded_name)
            if not parameter.requires_grad:
                continue
            lr = self.base_lr
            weight_decay = self.base_wd or 0.0
            if self._num_axes[name] < 2 or name.endswith("pos_embed"):
                weight_decay = 0.0
            for custom in self._custom_settings(name):
                lr *= custom.get("lr_mult", 1.0)
                weight_decay *= custom.get("decay_mult", 1.0)
            lr *= self._layer_scale(module, name)
            group = groups.setdefault(
                (lr, weight_decay), dict(params=[], lr=lr, weight_decay=weight_decay)
            )
            group["params"].append(parameter)
        params.extend(groups.values())
        print_log(
            f"{len(groups)} parameter groups, learning rates "
            f"{min(lr for lr, _ in groups):.3g} to {max(lr for lr, _ in groups):.3g}",
            logger="current",
        )

    def _custom_settings(self, name: str) -> Iterator[dict]:
        keys = [key for key in self.paramwise_cfg.get("custom_keys", {}) if key in name]
        if keys:
            yield self.paramwise_cfg["custom_keys"][max(keys, key=len)]

    def _layer_scale(self, model: nn.Module, name: str) -> float:
        rate = self.paramwise_cfg["layer_decay_rate"]
        if rate == 1.0:
            return 1.0
        backbone = getattr(model, "backbone", None)
        if not hasattr(backbone, "get_layer_depth"):
            raise TypeError(
                f"layer_decay_rate={rate} needs a backbone with get_layer_depth, such as CGSPN; "
                f"got {type(backbone).__name__}. Set layer_decay_rate=1.0"
            )
        layer, num_layers = backbone.get_layer_depth(name, prefix="backbone.")
        return rate ** (num_layers - 1 - layer)
