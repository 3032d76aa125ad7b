"""Rows that survive being killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sdxl_cli.errors import FileError, Interrupted
from sdxl_cli.evaluation.table import USED, Columns, Table


def compute(rows: range) -> Columns:
    """Values that depend on the batch, as sums on a processor do."""
    values = torch.tensor([[row + 0.001 * rows.start, float(len(rows))] for row in rows])
    used = torch.tensor([row % 4 != 3 for row in rows], dtype=torch.uint8)
    return {"values": values, USED: used}


class Ticks:
    """A clock on which every look takes a minute and a half."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 90
        return self.now


@pytest.mark.parametrize("stop", [0, 3, 6, 9])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_was_stopped_gives_the_same_rows(
    tmp_path: Path, stop: int, kind: type[BaseException]
) -> None:
    whole = Table(tmp_path / "whole", 11, {"a": 1})
    whole.fill(compute, batch=3, description="x")

    def failing(rows: range) -> Columns:
        if rows.start == stop:
            raise kind
        return compute(rows)

    with pytest.raises(Interrupted if kind is KeyboardInterrupt else kind):
        Table(tmp_path / "parts", 11, {"a": 1}).fill(failing, batch=3, description="x")
    again = Table(tmp_path / "parts", 11, {"a": 1})
    assert again.done == stop
    again.fill(compute, batch=3, description="x")
    assert torch.equal(again.column("values"), whole.column("values"))
    assert again.unusable() == [3, 7]


def test_files_are_written_on_the_way_so_that_a_kill_costs_little(tmp_path: Path) -> None:
    seen = []

    def looking(rows: range) -> Columns:
        seen.append(len(list((tmp_path / "t").glob("rows-*"))))
        return compute(rows)

    Table(tmp_path / "t", 12, {}).fill(looking, batch=4, description="x", clock=Ticks())
    assert seen == [0, 1, 2]


def test_rows_are_taken_in_any_order_across_files(tmp_path: Path) -> None:
    table = Table(tmp_path / "t", 12, {})
    table.fill(compute, batch=2, description="x", clock=Ticks())
    whole = table.column("values")
    rows = table.rows("values")
    assert len(rows) == len(whole) == 9
    order = np.array([8, 0, 5, 5, 2])
    assert torch.equal(rows.take(order), whole[torch.from_numpy(order)])


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    Table(tmp_path / "t", 5, {"seed": 1})
    with pytest.raises(FileError, match=r"other settings \(seed: 1, now 2\); give another --output"):
        Table(tmp_path / "t", 5, {"seed": 2})
    with pytest.raises(FileError, match=r"rows: 5, now 6"):
        Table(tmp_path / "t", 6, {"seed": 1})


def test_files_that_are_missing_in_between_are_noticed(tmp_path: Path) -> None:
    table = Table(tmp_path / "t", 6, {})
    table.fill(compute, batch=2, description="x", clock=Ticks())
    sorted((tmp_path / "t").glob("rows-*"))[1].unlink()
    with pytest.raises(FileError, match="rows 2 to 4 are missing"):
        Table(tmp_path / "t", 6, {})
