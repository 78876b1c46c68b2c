"""The shipped settings are those that the table and the cost model give, and the table is the compiler's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pefast.kernels import tuning

from pefast import kernels

FOLDER = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(not kernels.HAS_TRITON, reason=kernels.WHY_NOT),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
SAMPLE = """
import json, settings
from pefast.kernels import tuning
table = json.loads(settings.TABLE.read_text())
for name, kind, at in (("sm90", ("back", 16, 16, False), 0), ("sm80", ("back", 16, 16, False), 0)):
    kind = tuning.Kind(*kind)
    setting = tuning.CANDIDATES[kind][at]
    made = [list(one) for one in settings.compiled(name, kind, setting)]
    noted = table[settings.name_of(name, kind, setting)]
    print(json.dumps([made, noted, settings.gate_version(), table["triton"]]))
"""


@pytest.fixture(scope="module")
def derived():
    import settings

    table = json.loads(settings.TABLE.read_text(encoding="utf-8"))
    return table, settings.derive(table), settings.every()


def test_the_shipped_file_is_what_the_command_derives(derived):
    _, content, _ = derived
    assert tuning.SHIPPED.read_text(encoding="utf-8") == tuning.as_text(content)


def test_every_setting_was_compiled_for_every_target_of_the_table(derived):
    import settings

    table, content, every = derived
    for kind, setting in every:
        for target in content["rejected"]:
            assert table[settings.name_of(target, kind, setting)], (target, kind, setting)
    assert {"sm80", "sm90"} <= set(content["rejected"])


def test_what_is_shipped_passed_its_target(derived):
    import settings

    _, content, _ = derived
    for device, rows in content["devices"].items():
        rejected = content["rejected"]
        where = rejected if device == "any" else [settings.TARGET_OF[device]]
        for row in rows:
            kind = [row[key] for key in tuning.KEYS[:4]]
            setting = {key: value for key, value in row.items() if key not in tuning.KEYS}
            assert not any([*kind, setting] in rejected[target] for target in where)
    # the gate says no to some, or nothing would be shown
    assert all(content["rejected"][target] for target in ("sm80",))


@pytest.mark.slow
def test_the_table_is_what_the_compiler_makes():
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE], cwd=FOLDER, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2
    for made, noted, now, then in lines:
        assert made and (made == noted or now != then)
