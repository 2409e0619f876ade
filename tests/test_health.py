"""A broken number stops the run before it reaches the weights, and says where it came from."""

import pytest

from llm_training.health import NonFiniteError, require_finite


def test_finite_numbers_pass() -> None:
    require_finite("loss", 0.0, 1, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_others_stop_the_run(value: float) -> None:
    with pytest.raises(NonFiniteError, match=r"gradient norm of step 7 \(samples from 56\) is"):
        require_finite("gradient norm", value, 7, 56)
