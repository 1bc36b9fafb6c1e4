"""The learning rate, a pure function of the step."""


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    steps: float | None,
    decay_fraction: float,
    warmup_start_step: int = 0,
) -> float:
    """Linear warmup, a constant rate, then a linear decay to zero at the end of the run.

    Args:
        step: number of steps done before.
        peak: the constant rate.
        warmup_steps: steps until the rate is constant.
        steps: length of the run; None never decays.
        decay_fraction: fraction of the run over which the rate decays; 0 never decays.
        warmup_start_step: step at which the optimizer was created.
    """
    rate = peak * min(1.0, (step - warmup_start_step + 1) / max(1, warmup_steps))
    if steps is None or decay_fraction == 0:
        return rate
    return rate * max(0.0, min(1.0, (1 - step / steps) / decay_fraction))
