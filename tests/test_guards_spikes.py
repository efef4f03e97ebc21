"""What is a spike, on written curves: planted ones are seen, noise, warm-up and a long decline are not."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from flm_jax.guards import Spike, SpikeDetector, SpikeGuard
from flm_jax.guards.spikes import Window, median

CURVE = Path(__file__).resolve().parent / "golden" / "curve.json"


def spikes(losses, guard=None, quiet=0, norms=None) -> list[Spike]:
    """The spikes in a curve of losses, each step looked at once."""
    detector = SpikeDetector(guard or SpikeGuard(), quiet)
    norms = np.ones(len(losses)) if norms is None else norms
    given = enumerate(zip(losses, norms, strict=True), 1)
    return [found for step, (loss, norm) in given if (found := detector.look(step, float(loss), float(norm)))]


def declining(steps: int, noise: float, seed: int = 0) -> np.ndarray:
    """Losses that fall from 11 nats to about 3, as those of a small model do, with normal noise."""
    at = np.arange(steps)
    return 2.9 + 8.1 / (1 + at / 60) ** 0.8 + noise * np.random.default_rng(seed).standard_normal(steps)


def test_the_window_has_numpys_median_and_deviation():
    values = np.random.default_rng(0).standard_normal(40)
    for size in (9, 16):
        window = Window(size)
        for value in values:
            window.add(float(value))
        last = values[-size:]
        middle = np.median(last)
        assert window.full and median(last.tolist()) == middle
        assert window.spread() == pytest.approx((middle, 1.4826 * np.median(abs(last - middle))))


def test_planted_spikes_are_seen_at_their_first_step_and_nothing_else_is():
    losses = declining(3_000, noise=0.03)
    planted = [700, 701, 702, 1500, 2999]
    losses[np.array(planted) - 1] += [1.0, 2.0, 1.0, 0.5, 3.0]
    found = spikes(losses)
    assert [spike.step for spike in found] == planted
    # A spike does not enter the window that later steps are compared with: its own steps share a beginning.
    assert [spike.since for spike in found] == [700, 700, 700, 1500, 2999]
    first = found[0]
    assert first.what == "loss" and first.value == losses[699]
    assert first.median == pytest.approx(np.median(losses[571:699])) and first.median < first.bound < first.value


@pytest.mark.parametrize("noise", [0.01, 0.3])
def test_there_is_no_false_alarm_in_ten_thousand_steps_of_noise(noise):
    losses = 3.0 + noise * np.random.default_rng(1).standard_normal(10_000)
    norms = np.exp(0.2 * np.random.default_rng(2).standard_normal(10_000))
    guard = SpikeGuard(gradient_sigmas=6.0)
    assert spikes(losses, guard, norms=norms) == []
    # The same noise has steps above three deviations: the test would see it if the bound were not kept.
    if noise > 0.1:
        assert len(spikes(losses, SpikeGuard(sigmas=3.0))) > 5


def test_there_is_none_on_a_decline_a_warm_up_and_a_mask_ramp():
    losses = declining(4_000, noise=0.05)
    assert spikes(losses) == []
    # The rate warms up over 1100 steps, and the loss jumps while it does.
    warm = losses.copy()
    warm[1000:1100] += 2.0
    assert spikes(warm, quiet=1100) == []
    assert spikes(warm)[0].step == 1001
    # Masks rise over 200 steps, the loss with them; where they have risen, it stays there.
    ramp = 3.0 + 0.02 * np.random.default_rng(3).standard_normal(1_000)
    ramp[150:] += 1.0
    assert spikes(ramp, quiet=200) == []
    assert spikes(ramp)[0].step == 151


def test_the_loss_of_a_real_run_has_none_and_its_gradient_norm_only_single_steps():
    curve = json.loads(CURVE.read_text())
    losses, norms = curve["losses"], curve["norms"]
    assert len(losses) == 900 and spikes(losses, SpikeGuard(sigmas=4.0), 30) == []
    assert len(spikes(losses, SpikeGuard(sigmas=3.0), 30)) == 2
    assert {spike.what for spike in spikes(losses, SpikeGuard(gradient_sigmas=6.0), 30, norms)} == {"grad_norm"}
    assert spikes(losses, SpikeGuard(gradient_sigmas=6.0, in_a_row=2), 30, norms) == []
    losses[600] += 2.0  # the loss of a batch that is noise, at a step whose loss would be 2.3
    assert [spike.step for spike in spikes(losses, quiet=30)] == [601]


def test_a_stage_begins_with_an_empty_window():
    guard = SpikeGuard(window=16)
    steady = 2.0 + 0.01 * np.random.default_rng(0).standard_normal(40)
    assert spikes([*steady, 9.0], guard)[0].step == 41
    assert spikes([9.0], guard) == []
    assert spikes([*steady[:15], 9.0], guard) == [] and spikes([*steady[:16], 9.0], guard)[0].step == 17


def test_small_excesses_over_a_calm_window_are_none():
    calm = [2.0] * 20
    assert spikes([*calm, 2.09], SpikeGuard(window=16)) == []
    assert spikes([*calm, 2.11], SpikeGuard(window=16))[0].bound == pytest.approx(2.1)
    assert spikes([*calm, 2.01], SpikeGuard(window=16, least=0.0))[0].step == 21


def test_several_steps_in_a_row_may_be_asked_for():
    calm = [2.0, 2.01] * 10
    guard = SpikeGuard(window=16, in_a_row=3)
    assert spikes([*calm, 5.0, 5.0, 2.0, 5.0, 5.0, 2.0], guard) == []
    (found,) = spikes([*calm, 5.0, 5.0, 5.0], guard)
    assert (found.step, found.since) == (23, 21)


def test_gradient_norms_are_looked_at_only_if_asked_for():
    losses, norms = [2.0] * 30, [1.0, 1.2, 0.9] * 9 + [1.0, 50.0, 1.0]
    assert spikes(losses, SpikeGuard(window=16), norms=norms) == []
    (found,) = spikes(losses, SpikeGuard(window=16, gradient_sigmas=6.0), norms=norms)
    assert (found.step, found.what) == (29, "grad_norm")
    assert found.value == pytest.approx(50.0) and found.median == pytest.approx(1.0)
    assert math.isfinite(SpikeDetector(SpikeGuard()).look(1, 2.0, 0.0) or 0.0)


def test_a_detector_goes_on_from_its_memory_as_if_it_had_not_stopped():
    losses = declining(400, noise=0.03)
    losses[[250, 251, 330]] += 2.0
    guard = SpikeGuard(window=32, in_a_row=2)
    whole = spikes(losses, guard)
    assert [spike.step for spike in whole] == [252]
    for cut in (10, 100, 251, 252, 331):  # 251: between the two steps of the spike
        first = SpikeDetector(guard)
        found = [first.look(step, float(loss), 1.0) for step, loss in enumerate(losses[:cut], 1)]
        memory = json.loads(json.dumps(first.memory()))
        second = SpikeDetector(guard, memory=memory)
        found += [second.look(step, float(loss), 1.0) for step, loss in enumerate(losses[cut:], cut + 1)]
        assert [spike for spike in found if spike] == whole
    with pytest.raises(ValueError, match="lacks the field 'norms'"):
        SpikeDetector(guard, memory={"losses": []})
    with pytest.raises(ValueError, match="the memory of the spike guard is 'x'"):
        SpikeDetector(guard, memory={"losses": ["x"], "norms": [], "above": 0, "since": 0})


def test_a_rewind_goes_far_enough_back_and_what_it_may_need_is_kept():
    guard = SpikeGuard(rewind_steps=100, save_every=50)
    assert [guard.rewind_to(since) for since in (1, 100, 149, 150, 199, 200)] == [0, 0, 0, 50, 50, 100]
    assert list(guard.points(331, 330)) == [200, 250, 300]
    for step in range(1, 400):  # whatever is seen after a step, its checkpoint is among those that are kept
        kept = guard.points(step + 1, step)
        later = {guard.rewind_to(since) for since in range(step + 1, step + 60)}
        assert {at for at in later if at <= step} <= set(kept)
