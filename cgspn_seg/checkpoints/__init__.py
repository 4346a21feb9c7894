"""Reading checkpoints: safely, and only where they fit.

Importing this package registers `Pretrained` (the checked one) and `CheckpointCheckHook` with
MMSegmentation. Safe loading itself is a property of the process, so a tool asks for it with
:func:`protect_checkpoint_loading`.
"""

from cgspn_seg import compat  # noqa: F401  (before mmseg)
from cgspn_seg.checkpoints.fit import (
    CheckpointFit,
    load_weights,
    require_complete,
    require_usable,
    state_dict_of,
)
from cgspn_seg.checkpoints.hook import CheckpointCheckHook
from cgspn_seg.checkpoints.loading import (
    CheckpointError,
    load_checkpoint,
    protect_checkpoint_loading,
)
from cgspn_seg.checkpoints.pretrained import CheckedPretrainedInit
from cgspn_seg.checkpoints.stored_config import require_same_function, stored_config

__all__ = [
    "CheckedPretrainedInit",
    "CheckpointCheckHook",
    "CheckpointError",
    "CheckpointFit",
    "load_checkpoint",
    "load_weights",
    "protect_checkpoint_loading",
    "require_complete",
    "require_same_function",
    "require_usable",
    "state_dict_of",
    "stored_config",
]
