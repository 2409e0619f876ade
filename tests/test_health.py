"""Bad steps are told from good ones, left out up to a limit, and said; good ones never are."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from llm_training.health import (
    MAX_OVERFLOWS,
    OK,
    HealthMonitor,
    HealthState,
    Kind,
    NonFiniteError,
    UnhealthyError,
    Verdict,
    deviations_above,
    next_position,
    note_rewind,
    plan_rewind,
    write_dump,
)

NAN, INF = math.nan, math.inf
BROKEN = Verdict(Kind.NON_FINITE, "gradient norm inf")
STEP_SIZE = 8


def a_monitor(max_skipped: int = 3, deviations: float | None = 6.0, **sizes: int) -> HealthMonitor:
    return HealthMonitor(HealthState(), max_skipped, deviations, **sizes)


def skip(monitor: HealthMonitor, step: int, verdict: Verdict = BROKEN) -> str:
    """Leaves out `step` of a run that counts steps from 0, eight samples each."""
    samples = (step * STEP_SIZE, (step + 1) * STEP_SIZE)
    return monitor.note_skipped(step, samples, verdict, "runs/a/step-00000100")


def feed(monitor: HealthMonitor, losses: list[float]) -> list[int]:
    """Takes every loss of a run to the monitor; the steps that were left out."""
    left_out = []
    for step, loss in enumerate(losses):
        verdict = monitor.judge_loss(loss)
        if verdict.is_ok:
            monitor.note_good(loss, 1.0)
        else:
            left_out.append(step)
            skip(monitor, step, verdict)
    return left_out


# ----------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("deviations", [None, 6.0])
def test_a_broken_number_is_never_good(value: float, deviations: float | None) -> None:
    monitor = a_monitor(deviations=deviations)
    assert monitor.judge_loss(value) == Verdict(Kind.NON_FINITE, f"loss {value}")
    assert monitor.judge_norm(value) == Verdict(Kind.NON_FINITE, f"gradient norm {value}")


def test_a_spike_is_told_once_there_is_a_history() -> None:
    monitor = a_monitor(min_history=32)
    noise = random.Random(0)
    for _ in range(31):
        monitor.note_good(noise.gauss(2.0, 0.05), noise.gauss(1.0, 0.1))
    assert monitor.judge_loss(4.0) == monitor.judge_norm(9.0) == OK
    monitor.note_good(2.0, 1.0)
    loss, norm = monitor.judge_loss(4.0), monitor.judge_norm(9.0)
    assert loss.kind is Kind.LOSS_SPIKE and loss.reason.startswith("loss 4, ")
    assert norm.kind is Kind.NORM_SPIKE and " deviations above 0.99" in norm.reason
    # What is lower than ever is no spike.
    assert monitor.judge_loss(0.1) == monitor.judge_norm(0.0) == OK


def test_without_a_limit_nothing_finite_is_a_spike() -> None:
    monitor = a_monitor(deviations=None)
    assert feed(monitor, [1.0] * 200 + [1e30]) == []


def test_deviations_are_those_of_a_normal_distribution() -> None:
    noise = random.Random(1)
    history = [noise.gauss(10.0, 2.0) for _ in range(20_000)]
    assert deviations_above(16.0, history) == pytest.approx(3.0, rel=0.05)
    assert deviations_above(4.0, history) == pytest.approx(-3.0, rel=0.05)
    # One outlier in ten moves a plain standard deviation by a factor of hundreds.
    spoilt = history + [1e4] * 2000
    assert deviations_above(16.0, spoilt) == pytest.approx(3.0, rel=0.25)


def test_a_curve_without_noise_has_room_of_its_own() -> None:
    constant = [2.0] * 64
    assert deviations_above(2.0, constant) == 0.0
    assert deviations_above(2.1, constant) == pytest.approx(5.0)
    assert deviations_above(1.0, [0.0] * 64) == 0.0
    assert feed(a_monitor(), [2.0] * 300) == []


# ------------------------------------------------------------------------------------------- curves


def fast(step: int) -> float:
    return 2.0 + 8.8 * math.exp(-step / 15)


def slow(step: int) -> float:
    return 1.5 + 9.0 / math.sqrt(1 + step / 4)


def stairs(step: int) -> float:
    return 6.0 if step < 80 else 3.0


@pytest.mark.parametrize("curve", [fast, slow, stairs])
def test_a_falling_loss_gives_no_false_alarm(curve: Callable[[int], float]) -> None:
    for seed in range(40):
        noise = random.Random(seed)
        losses = [curve(step) * (1 + noise.gauss(0, 0.02)) for step in range(500)]
        assert feed(a_monitor(), losses) == []


def test_every_spike_of_a_noisy_curve_is_found() -> None:
    for seed in range(40):
        noise = random.Random(seed)
        losses = [slow(step) * (1 + noise.gauss(0, 0.02)) for step in range(500)]
        spikes = sorted(noise.sample(range(250, 500), 5))
        for step in spikes:
            losses[step] *= 2
        assert feed(a_monitor(max_skipped=5), losses) == spikes


def test_spikes_do_not_raise_the_bar() -> None:
    monitor = a_monitor()
    feed(monitor, [2.0] * 100 + [4.0] + [2.0] * 10)
    assert 4.0 not in monitor.state.losses and len(monitor.state.losses) == 110
    assert not monitor.judge_loss(2.5).is_ok


def test_a_curve_that_stays_high_stops_the_run() -> None:
    with pytest.raises(UnhealthyError, match=r"6 in a row .*steps 100-105.* and 5 may be"):
        feed(a_monitor(max_skipped=5), [2.0] * 100 + [4.0] * 100)


def test_a_new_level_is_taken_after_half_a_window() -> None:
    monitor = a_monitor(max_skipped=1000, window=40)
    left_out = feed(monitor, [2.0] * 100 + [4.0] * 100)
    assert left_out == list(range(100, 120))
    assert min(monitor.state.losses) == 4.0  # the old level is no longer looked at
    assert not monitor.judge_loss(5.0).is_ok


def test_the_windows_are_bounded() -> None:
    monitor = a_monitor(window=16)
    for step in range(100):
        monitor.note_good(float(step), 2.0 * step)
    assert monitor.state.losses == [float(step) for step in range(84, 100)]
    assert monitor.state.norms == [2.0 * step for step in range(84, 100)]


# ----------------------------------------------------------------------------------------- counting


def test_a_line_for_each_step_that_is_left_out() -> None:
    monitor = a_monitor()
    assert skip(monitor, 120) == (
        "step 120 left out: gradient norm inf (samples 960-967; 1 in a row, 1 in all)"
    )
    assert skip(monitor, 121).endswith("(samples 968-975; 2 in a row, 2 in all)")
    monitor.note_good(2.0, 1.0)
    assert skip(monitor, 123).endswith("1 in a row, 3 in all)")


def test_too_many_in_a_row_stop_the_run_and_say_all() -> None:
    monitor = a_monitor(max_skipped=2)
    skip(monitor, 119)
    monitor.note_good(2.0, 1.0)
    skip(monitor, 121)
    skip(monitor, 122, Verdict(Kind.LOSS_SPIKE, "loss 9"))
    with pytest.raises(NonFiniteError) as found:
        skip(monitor, 123)
    message = str(found.value)
    assert message.startswith("Gradient norm inf in step 123: 3 in a row had to be left out")
    assert "(steps 121-123, samples 968-991), and 2 may be" in message
    assert "runs/a/step-00000100" in message and "--learning_rate" in message


def test_none_may_be_left_out() -> None:
    with pytest.raises(NonFiniteError, match=r"step 5: 1 in a row .*steps 5, samples 40-47"):
        skip(a_monitor(max_skipped=0), 5)


def test_spikes_alone_are_no_broken_numbers() -> None:
    with pytest.raises(UnhealthyError) as found:
        skip(a_monitor(max_skipped=0), 5, Verdict(Kind.NORM_SPIKE, "gradient norm 9"))
    assert not isinstance(found.value, NonFiniteError)


def test_overflows_count_for_themselves() -> None:
    monitor = a_monitor(max_skipped=0)
    for step in range(MAX_OVERFLOWS - 1):
        line = monitor.note_overflow(step, (step, step + 1), "")
    assert line.startswith("step 48 left out: fp16 overflow") and "49 in a row" in line
    assert monitor.state.num_skipped == 0
    monitor.note_good(2.0, 1.0)
    for step in range(MAX_OVERFLOWS - 1):
        monitor.note_overflow(step, (step, step + 1), "")
    with pytest.raises(NonFiniteError, match=r"50 steps in a row, up to step 60 .*no checkpoint"):
        monitor.note_overflow(60, (60, 61), "")


def test_the_state_survives_a_checkpoint() -> None:
    noise = random.Random(2)
    losses = [3.0 * (1 + noise.gauss(0, 0.02)) for _ in range(100)]
    whole, first = a_monitor(), a_monitor()
    feed(whole, [*losses, 9.0, 9.0])
    feed(first, losses)
    skip(first, 100)
    resumed = HealthMonitor(HealthState(**json.loads(json.dumps(asdict(first.state)))), 3, 6.0)
    skip(resumed, 101)
    assert resumed.state == whole.state
    assert resumed.judge_loss(3.2) == whole.judge_loss(3.2)


# ------------------------------------------------------------------------------------------- rewind


def test_a_rewind_passes_over_the_bad_stretch_and_a_margin() -> None:
    state = HealthState(num_skipped=4, row_step=20, row_sample=160)
    common = {"checkpoint_sample": 80, "end": 192, "max_rewinds": 1}
    assert plan_rewind(state, margin=16, **common) == (144, 192)
    assert plan_rewind(state, margin=800, **common) == (80, 192)  # from the checkpoint on
    state.rewinds = 1
    assert plan_rewind(state, margin=16, **common) is None
    assert plan_rewind(HealthState(), margin=16, **common) is None


def test_a_rewind_stays_counted() -> None:
    before = HealthState(num_skipped=4, skipped_in_row=4, rewinds=1, passed_over=[[0, 8]])
    kept = HealthState(num_skipped=1, losses=[2.0])
    note_rewind(kept, before, (144, 192))
    assert kept == HealthState(
        num_skipped=4, losses=[2.0], rewinds=2, passed_over=[[0, 8], [144, 192]]
    )


@pytest.mark.parametrize(
    ("position", "found"),
    [(0, 0), (8, 8), (9, 24), (16, 24), (23, 24), (24, 24), (32, 56), (40, 56), (56, 56)],
)
def test_steps_keep_away_from_what_is_passed_over(position: int, found: int) -> None:
    # Two of the ranges touch, and they are not in order.
    assert next_position(position, 8, [[48, 56], [16, 24], [36, 48]]) == found


def test_a_run_reads_all_but_what_is_passed_over() -> None:
    position, read = 0, []
    while position < 100:
        position = next_position(position, 4, [[20, 40], [60, 64]])
        read += range(position, position + 4)
        position += 4
    assert read == [n for n in range(100) if not (20 <= n < 40 or 60 <= n < 64)]


# ----------------------------------------------------------------------------------------- the rest


def test_a_dump_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "bad_steps/step-00000120.json"
    write_dump(
        path,
        step=120,
        sample_ids=[7, 3],
        losses=[2.5, NAN],
        norms_by_layer={"layers.0": INF, "lm_head": 0.5},
        texts=["def f():", "π"],
    )

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert found == {
        "step": 120,
        "sample_ids": [7, 3],
        "losses": [2.5, "nan"],
        "norms_by_layer": {"layers.0": "inf", "lm_head": 0.5},
        "texts": ["def f():", "π"],
    }
