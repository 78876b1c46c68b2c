"""Measuring with a clock of our own: every allowed setting computes right, one that does not is dropped."""

import pytest
import torch
from pefast.kernels import delta_linear_gradients, tuning
from planted_faults import mutant

from pefast import tuner

LAYER = tuner.Layer(40, 140, 70, 5)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


@pytest.mark.parametrize("rank", [5, 20, 50, 100])
def test_every_setting_for_16_bits_computes_right(device, rank):
    found = tuner.measure(LAYER._replace(r=rank), device, "sm90", lambda launch: 1.0)
    assert all(one.fault == "" for one in found)
    kernels = {one.asked.kind.kernel for one in found}
    both = {"waist", "product", "narrow", "down"} | ({"whole", "back"} if rank <= 64 else set())
    assert kernels == both
    for one in found:
        assert one.setting in tuning.CANDIDATES[one.asked.kind]


@pytest.mark.parametrize(("rank", "dropout"), [(5, 0.0), (40, 0.3)])
def test_every_setting_for_32_bits_computes_right(device, rank, dropout):
    layer = LAYER._replace(dtype=torch.float32, r=rank, dropout=dropout)
    found = tuner.measure(layer, device, "sm90", lambda launch: 1.0)
    assert found and all(one.fault == "" for one in found)
    # a wide rank in fp32 has no setting that makes the waist in every tile
    assert ("whole" in {one.asked.kind.kernel for one in found}) == (rank == 5)


def test_the_clock_decides_and_times_one_launch_alone(device):
    launched = []

    def clock(launch):
        launched.append(launch())
        # each call takes half of the one before
        return 0.5 ** len(launched)

    found = tuner.measure(LAYER, device, "sm90", clock)
    rows = tuner.best(found)
    # y and dx are products of different sizes
    names = ["waist", "product", "narrow", "product", "down", "whole", "back"]
    assert len(launched) == len(found) and [row["kernel"] for row in rows] == names
    last = {one.asked: one for one in found}
    assert rows == [tuning.row_of(asked, one.setting) for asked, one in last.items()]


def test_one_that_computes_wrong_is_dropped(device, tmp_path, monkeypatch):
    changed = mutant(
        delta_linear_gradients, tmp_path, "db *= tl.load(scale_ptr", "db *= 1.1 * tl.load(scale_ptr"
    )
    monkeypatch.setattr(delta_linear_gradients, "narrow", changed.narrow)
    found = tuner.measure(LAYER, device, "sm90", lambda launch: 1.0)
    wrong = [one for one in found if one.fault]
    # whatever is tried while narrow computes wrong is dropped with it, and what does without narrow is kept
    assert {one.asked.kind.kernel for one in found} - {one.asked.kind.kernel for one in wrong} == {
        "whole",
        "back",
    }
    assert all("computes wrong: db" in one.fault and one.seconds is None for one in wrong)
    assert "narrow" not in {row["kernel"] for row in tuner.best(found)}
