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
        anchor: where the decay was laid anew on the way: a step, and the share of the decay that
            lay behind it; from there it goes on evenly up to the last step. None: it was not.

    Source: cosine: Loshchilov & Hutter 2017 (arXiv:1608.03983), eq. 5, without restarts;
        warmup-stable-decay: Hu et al. 2024 (arXiv:2404.06395), sec. 4, with a linear decay.
    """

    kind: str
    peak: float
    warmup_steps: int
    decay_steps: int | None
    total_steps: int
    min_ratio: float
    anchor: tuple[int, float] | None = None

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

    def laid_anew(self, step: int, total_steps: int) -> LearningRateSchedule:
        """The same from `step` on, but ended after `total_steps`.

        A decay that is under way, or should be by then, goes on from where it stands over the steps
        that are left. So the rate at `step` stays what it was, and no later one is above it.
        """
        free = replace(self, total_steps=total_steps, anchor=None)
        start = max(step, self.warmup_steps)
        done = self._decay_progress(start) if self.kind != "constant" else 0.0
        if done == 0 and (self.kind == "constant" or free._decay_start >= start):
            return free
        return replace(self, total_steps=total_steps, anchor=(start, done))

    @property
    def _decay_start(self) -> int:
        is_last = self.kind == "warmup-stable-decay"
        return self.total_steps - self.decay_length if is_last else self.warmup_steps

    def _decay_progress(self, step: int) -> float:
        """Share of the decay that lies behind `step`, 0 to 1."""
        if self.anchor is None:
            return min(1.0, max(0.0, (step - self._decay_start) / self.decay_length))
        start, done = self.anchor
        left = max(1, self.total_steps - start)
        return done + (1 - done) * min(1.0, max(0.0, (step - start) / left))
