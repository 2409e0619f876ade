"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LearningRateSchedule:
    """Warm-up, then one of four shapes; nothing is remembered between calls.

    Args:
        kind: "linear", "cosine", "constant" or "warmup-stable-decay".
        peak: learning rate at the end of the warm-up.
        warmup_steps: steps of the linear rise; step `warmup_steps` is the first at the peak.
        decay_steps: steps that the decay takes, from the end of the warm-up (linear, cosine) or up
            to the last step (warmup-stable-decay); None: all that remain, or a fifth of all.
        total_steps: optimizer steps of the whole run.
        min_ratio: rate at the end of the decay, as a share of the peak.

    Source: cosine: Loshchilov & Hutter 2017 (arXiv:1608.03983), eq. 5, without restarts;
        warmup-stable-decay: Hu et al. 2024 (arXiv:2404.06395), sec. 4, with a linear decay.
    """

    kind: str
    peak: float
    warmup_steps: int
    decay_steps: int | None
    total_steps: int
    min_ratio: float

    def at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return self.peak
        done = self._decay_progress(step)
        kept = 0.5 * (1 + math.cos(math.pi * done)) if self.kind == "cosine" else 1 - done
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * kept)

    @property
    def decay_length(self) -> int:
        """Steps that the decay takes."""
        if self.kind == "warmup-stable-decay":
            return self.decay_steps or max(1, self.total_steps // 5)
        return self.decay_steps or max(1, self.total_steps - self.warmup_steps)

    def decay_now(self, step: int) -> LearningRateSchedule:
        """The same with the decay of warmup-stable-decay begun at `step`, and ended so much sooner.

        It is the same object for other shapes, and where that decay begins no later anyway.
        """
        length = self.decay_length
        if self.kind != "warmup-stable-decay" or step + length >= self.total_steps:
            return self
        return replace(self, decay_steps=length, total_steps=step + length)

    def _decay_progress(self, step: int) -> float:
        """Share of the decay that lies behind `step`, 0 to 1."""
        length = self.decay_length
        is_last = self.kind == "warmup-stable-decay"
        start = self.total_steps - length if is_last else self.warmup_steps
        return min(1.0, max(0.0, (step - start) / length))
