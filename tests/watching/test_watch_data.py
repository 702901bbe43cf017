"""What was watched, as data: the schema holds it."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from tests.watching.watching import watched, write

from frostline.reports.data import schema

SCRIPTS = Path(__file__).parents[2] / "examples" / "scripts"


@pytest.mark.parametrize("name", ["middle_layer.py", "everything.py", "digits_cnn.py"])
def test_the_data_is_what_the_schema_says(name: str) -> None:
    seen, _ = watched(SCRIPTS / name)
    data = seen.to_dict()
    again = json.loads(json.dumps(data))
    assert again == data
    jsonschema.Draft202012Validator(schema()).validate(again)
    assert [finding["rule"] for finding in data["findings"]] == [finding.rule for finding in seen.findings]


def test_a_script_that_trains_nothing_is_valid_too(tmp_path: Path) -> None:
    seen, _ = watched(write(tmp_path, "print('hello')"))
    data = json.loads(json.dumps(seen.to_dict()))
    jsonschema.Draft202012Validator(schema()).validate(data)
    assert (data["num_steps"], data["now"], data["findings"]) == (0, None, [])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema()).validate({**data, "surprise": 1})
