"""The predicted bytes are those counted by hand, and the command prints them."""

import pytest
from pefast.kernels import forms
from typer.testing import CliRunner

from pefast import cli, roofline

SHAPE = forms.Shape(8192, 4096, 4096, 16, dropout=True)


def relative(shape):
    """Bytes of each road, of the frozen layer's."""
    base, *others = roofline.roads(shape)
    return {road.name: (road.read + road.written) / (base.read + base.written) for road in others}


def test_bytes_of_the_frozen_layer():
    base = roofline.roads(SHAPE)[0]
    x, w = 2 * 8192 * 4096, 2 * 4096 * 4096
    assert base.read == 2 * (x + w) and base.written == 2 * x and base.flops == 4 * 8192 * 4096 * 4096


def test_bytes_of_each_road_at_a_large_layer():
    found = relative(SHAPE)
    assert found["PEFT, dropout"] == pytest.approx(5.2, abs=0.02)
    assert found["Unsloth, no dropout"] == pytest.approx(3.0, abs=0.02)
    assert found["LoRAFusion's split"] == pytest.approx(2.2, abs=0.02)
    assert found["pefast, split"] == pytest.approx(1.6, abs=0.01)
    # x once more for da
    assert found["pefast, whole, no dropout"] == pytest.approx(1.2, abs=0.02)


def test_the_single_pass_with_nothing_kept_in_the_cache(monkeypatch):
    """The parts of da and db counted as written and read again."""
    monkeypatch.setattr(forms, "_kept", lambda written: written)
    assert 1.23 < relative(SHAPE)["pefast, whole, no dropout"] <= 1.25


def test_the_count_sees_a_tensor_read_twice():
    """A planted fault: a split that reads dy apart for dh and for db is no longer below its bound."""
    launches = forms.backward("split", SHAPE)
    again = launches[0]._replace(read=launches[0].read + SHAPE.bytes("mn"))
    road = roofline.Road("", [*forms.forward("split", SHAPE), again, *launches[1:]])
    base = roofline.roads(SHAPE)[0]
    assert (road.read + road.written) / (base.read + base.written) > 1.75


def test_it_says_where_we_lose():
    rates = forms.RATES["H100"]
    words = roofline.losses(SHAPE._replace(m=4096), rates)
    assert "whole loses" in words[0] and "from rank 32" in words[0] and "50 % extra" in words[0]
    assert 1.2 < float(words[0].split("takes ")[1].split()[0]) < 1.35
    share = float(words[1].split("slower than ")[1].split()[0])
    assert 0.8 < share < 0.95
    # at that speed the times are equal
    slow = [x._replace(speed=share) if x.speed != 1 else x for x in forms.forward("split", SHAPE)]
    assert forms.seconds(slow, rates) > forms.seconds(forms.forward("split", SHAPE), rates)


def test_layers_by_name():
    assert roofline.layer("llama3-8b.q_proj") == (4096, 4096)
    assert roofline.layer("llama3-8b.k_proj") == (1024, 4096)
    assert roofline.layer("bert-base.up") == (3072, 768)
    with pytest.raises(ValueError, match="no layer 'up_prj'"):
        roofline.layer("llama3-8b.up_prj")
    with pytest.raises(ValueError, match="no model 'bret'"):
        roofline.layer("bret.up")


def test_the_command():
    options = ["bench", "--roofline", "--layer", "llama3-8b.q_proj", "--rank", "16", "--tokens", "8192"]
    done = CliRunner(env={"COLUMNS": "140"}).invoke(cli.app, options)
    assert done.exit_code == 0, done.output
    assert "predicted, not measured" in done.output
    slow = CliRunner(env={"COLUMNS": "140"}).invoke(cli.app, [*options, "--tflops", "100"])
    assert slow.exit_code == 0 and slow.output != done.output
    bad = CliRunner().invoke(cli.app, ["bench", "--roofline", "--layer", "nothing"])
    assert bad.exit_code == 2
