"""Settings of kernels: the nearest match, files, what is refused, and the choice among measured ones."""

import json
import warnings

import pytest
from pefast.kernels import tile_costs, tuning
from pefast.kernels.forms import RATES
from typer.testing import CliRunner

from pefast import cli, tuner
from pefast.commands.screen import console
from pefast.commands.tune import show

PRODUCT = tuning.Kind("product", 16, 32)
HIGH, MIDDLE, LOW = tuning.CANDIDATES[PRODUCT]
SIZES = {"n": 4096, "k": 4096, "bits": 16, "slots": 16}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The path of a user's file that is not there yet."""
    monkeypatch.setenv("PEFAST_TUNING", str(tmp_path / "mine" / "tuning.json"))
    tuning.forget()
    yield tuning.path()
    tuning.forget()


@pytest.fixture
def shipped(own, tmp_path, monkeypatch):
    """Shipped rows made here: one for any GPU at 4096 rows, one for an H100 at 16."""
    asked = tuning.Asked(PRODUCT, 4096, 4096, 4096)
    devices = {"any": [tuning.row_of(asked, HIGH)], "H100": [tuning.row_of(asked._replace(m=16), LOW)]}
    file = tmp_path / "shipped.json"
    file.write_text(json.dumps({"format": tuning.FORMAT, "devices": devices, "rejected": {}}))
    monkeypatch.setattr(tuning, "SHIPPED", file)
    tuning.forget()


def at(m, device="NVIDIA H100 80GB HBM3", **other):
    return tuning.settings("product", device, m, **SIZES | other)


def test_sizes_fall_into_powers_of_two():
    assert [tuning.bucket(m) for m in (0, 1, 16, 17, 4096, 4097)] == [16, 16, 16, 32, 4096, 8192]


def test_the_nearest_sizes_win(shipped):
    # 256 is as far from 16 as from 4096: of equally near rows the one for this GPU by name
    assert at(16) == at(200) == at(256) == LOW and at(257) == at(4096) == at(100_000) == HIGH
    assert at(16, "NVIDIA A100-SXM4-40GB") == at(16, "") == HIGH


def test_own_rows_lie_over_the_shipped_ones(shipped, own):
    device = "NVIDIA H100 80GB HBM3"
    tuning.save(device, [tuning.row_of(tuning.Asked(PRODUCT, 4096, 4096, 4096), MIDDLE)])
    assert at(4096) == MIDDLE and at(16) == LOW and at(4096, "NVIDIA H100 PCIe") == HIGH
    # a nearer shipped row stays before a farther row of one's own
    assert at(32) == LOW


def test_never_for_fewer_slots_or_another_kind(shipped):
    with pytest.raises(ValueError, match="no setting of 'product' for 16 bits and 300 slots"):
        at(16, slots=300)
    assert tuning.kind_of("product", 16, 33) == ("product", 16, 128, False)
    assert tuning.kind_of("waist", 32, 9, True).dropout and not tuning.kind_of("waist", 16, 9, True).dropout


def test_a_round_trip_through_json(own):
    rows = [
        tuning.row_of(tuning.Asked(kind, 64, 4096, 4096), setting)
        for kind, settings in tuning.CANDIDATES.items()
        for setting in settings[:1]
    ]
    assert tuning.save("A GPU", rows) == own and tuning.load(own) == {"A GPU": rows}
    tuning.save("Another", rows[:1])
    changed = rows[0] | tuning.CANDIDATES[tuning.Kind(*list(rows[0].values())[:4])][1]
    tuning.save("A GPU", [changed])
    assert tuning.load(own) == {"A GPU": [changed, *rows[1:]], "Another": rows[:1]}


def test_written_all_or_nothing(own, monkeypatch):
    rows = [tuning.row_of(tuning.Asked(PRODUCT, 64, 64, 64), HIGH)]
    tuning.save("A GPU", rows)
    before = own.read_text()
    monkeypatch.setattr(tuning.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tuning.save("A GPU", [rows[0] | LOW])
    assert own.read_text() == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a file of `pefast tune`"),
        ('{"format": "another"}', "is not a file of `pefast tune`"),
        ('{"format": "pefast settings 1", "devices": {"GPU": [{"kernel": "product"}]}}', "does not allow"),
        ('{"format": "pefast settings 1", "devices": 3}', "does not allow"),
    ],
)
def test_a_broken_or_foreign_file_is_one_sentence_and_not_used(shipped, own, text, words):
    own.parent.mkdir()
    own.write_text(text)
    with pytest.warns(UserWarning, match=words) as said:
        assert at(4096) == HIGH
    assert len(said) == 1 and str(said[0].message).count("\n") == 0
    with warnings.catch_warnings():
        # said once, not at every launch
        warnings.simplefilter("error")
        assert at(16) == LOW
    with pytest.raises(ValueError, match=words):
        tuning.save("A GPU", [])


def test_a_setting_that_is_not_allowed_is_not_used(shipped, own):
    row = tuning.row_of(tuning.Asked(PRODUCT, 4096, 4096, 4096), HIGH | {"BLOCK_M": 256})
    own.parent.mkdir()
    own.write_text(tuning.as_text({"format": tuning.FORMAT, "devices": {"NVIDIA H100 80GB HBM3": [row]}}))
    with pytest.warns(UserWarning, match="does not allow"):
        assert at(4096) == HIGH


def test_every_kind_has_a_setting_for_every_gpu(own):
    for kind in tuning.CANDIDATES:
        for device in ("", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"):
            for m in (1, 300, 100_000):
                found = tuning.settings(kind.kernel, device, m, 11008, 4096, *kind[1:])
                assert found in tuning.CANDIDATES[tuning.kind_of(*kind)]


def test_a_target_is_offered_what_its_compiler_took():
    back = tuning.Kind("back", 16, 16)
    everywhere = tuning.candidates(back, "sm89")
    assert everywhere and set(map(str, everywhere)) <= set(map(str, tuning.candidates(back, "sm90")))
    # its tallest tile spills on sm_80 and not on sm_90
    assert len(tuning.candidates(back, "sm80")) < len(tuning.candidates(back, "sm90"))


def test_the_model_of_tiles_takes_low_tiles_for_few_rows():
    chip, rates = tile_costs.CHIPS["H100"], RATES["H100"]

    def seconds(setting, m):
        done = tile_costs.work(PRODUCT, setting, m, 4096, 4096)
        return tile_costs.seconds(chip, rates, 1, done)

    assert seconds(LOW, 16) < seconds(HIGH, 16) and seconds(HIGH, 8192) < seconds(LOW, 8192)
    whole_waves = tile_costs.work(PRODUCT, HIGH, 8192, 4096, 4096)
    assert whole_waves.programs == 64 * 32 and whole_waves.flops == 2 * 128 * 128 * (4096 + 32)
    assert tile_costs.blocks(chip, 168, 100 << 10, 8) == 1 and tile_costs.blocks(chip, 64, 32 << 10, 4) == 7


def measured(*times):
    asked = tuning.Asked(PRODUCT, 4096, 4096, 4096)
    return [
        tuner.Measured(asked, setting, time, "" if time else "computes wrong: y")
        for setting, time in zip((HIGH, MIDDLE, LOW), times, strict=True)
    ]


@pytest.mark.parametrize(
    ("times", "right"),
    [
        ((3.0, 2.0, 1.0), LOW),
        ((2.0, 1.0, 3.0), MIDDLE),
        # one that computes wrong is never the fastest
        ((None, 2.0, 3.0), MIDDLE),
        # a lead below the machine's unrest changes nothing
        ((1.0, 0.99, 2.0), HIGH),
    ],
)
def test_the_fastest_that_computes_right_is_kept(times, right):
    (row,) = tuner.best(measured(*times))
    assert {key: row[key] for key in right} == right and row["m"] == 4096


def test_where_all_are_dropped_nothing_is_kept():
    assert tuner.best(measured(None, None, None)) == []


def test_the_table_says_what_was_dropped(capsys, monkeypatch):
    monkeypatch.setattr(console, "width", 200)
    show(measured(3e-6, None, 1e-6))
    said = capsys.readouterr().out
    assert "3.0" in said and "computes wrong: y" in said and "measured on this GPU" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "needs a GPU"),
        (("--tokens", "many"), "wanted are numbers"),
        (("--dtype", "int8"), "bfloat16, float16 and float32"),
    ],
)
def test_the_command_without_a_gpu_is_one_sentence(monkeypatch, own, options, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = CliRunner().invoke(cli.app, ["tune", "--layer", "llama3-8b.q_proj", *options])
    assert done.exit_code == 2 and words in done.output and done.output.count("\n") == 1
    assert not own.exists()
