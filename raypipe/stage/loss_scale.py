"""Dynamic loss scaling for fp16: gradients are scaled up so that small ones do not vanish in float16.

The rules and numbers are those of ``torch.amp.GradScaler``. The class itself looks at the gradients of one process
again; here every rank has the norms of all gradients anyway, so all take the same step with the same few numbers.
"""

from __future__ import annotations

import torch

__all__ = ["LossScale"]

_INITIAL, _GROWTH, _BACKOFF, _INTERVAL = 65536.0, 2.0, 0.5, 2000
_MOST: float = torch.finfo(torch.float32).max
_LEAST = 1e-4
"""Where fairseq gives up too: gradients that overflow at this scale are not finite for another reason."""


class LossScale:
    """The scale of a run, the same on all ranks.

    Attributes:
        value: what the next step's loss is multiplied by.
        skipped: how many of the last steps were skipped one after the other.
    """

    def __init__(self) -> None:
        self.value = _INITIAL
        self.skipped = 0
        self._taken = 0

    def update(self, *, skipped: bool) -> None:
        """Halves the scale after a step that was skipped, and doubles it after 2000 others in a row."""
        self.skipped = self.skipped + 1 if skipped else 0
        self._taken = 0 if skipped else self._taken + 1
        if skipped:
            self.value *= _BACKOFF
        elif self._taken == _INTERVAL:
            self._taken = 0
            if self.value * _GROWTH <= _MOST:
                self.value *= _GROWTH

    @property
    def exhausted(self) -> bool:
        """Whether a smaller scale cannot help."""
        return self.value < _LEAST
