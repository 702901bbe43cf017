"""The report of a fit: what it says, and that it is as wide as asked."""

from __future__ import annotations

import jsonschema
import pytest
import torch
from tests.golden.models import Encoder, mean_square

import frostline as fl
from frostline.reports.data import schema
from frostline.reports.fit import fit_text


@pytest.fixture(scope="module")
def fit() -> fl.Fit:
    rows = {"the last block of them": "@last:1", "all": "@all"}
    return fl.fit(Encoder(2, 32), torch.randint(0, 1000, (2, 16)), mean_square, train=rows, memory="1200KiB")


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_asked(fit: fl.Fit, width: int) -> None:
    assert max(map(len, fit_text(fit, width).splitlines())) <= width


def test_it_says_what_was_resized_and_what_is_not_in_the_peak(fit: fl.Fit) -> None:
    text = " ".join(str(fit).split())
    assert "the batch is dimension 0 of tokens (2 as found)." in text
    assert "the sequence length is dimension 1 of tokens (16 as found)." in text
    assert "scratch inside kernels is not in it" in text
    assert "predicted" in text


def test_at_most_three_things_to_freeze_are_printed_a_row(fit: fl.Fit) -> None:
    table = str(fit).partition("one thing more")[2].partition("\n\n")[0]
    assert "~" in table
    for row in fit:
        assert row.length is not None
        shown = [f.what for f in row.batch.freezing[:3]]
        assert all(what in table for what in shown)


def test_its_data_is_valid_and_has_everything(fit: fl.Fit) -> None:
    data = fit.to_dict()
    jsonschema.Draft202012Validator(schema()).validate(data)
    assert [row["batch"]["size"] for row in data["rows"]] == [row.batch.size for row in fit]
    assert fit["all"].subset.names
    with pytest.raises(KeyError, match="no row 'none'; there is 'the last block of them'"):
        fit["none"]
