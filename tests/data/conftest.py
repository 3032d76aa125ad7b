from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.data.pictures import noise


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Thirteen pictures of many shapes, in a folder with a table; two captions each."""
    root = tmp_path / "pictures"
    root.mkdir()
    sizes: Sequence[tuple[int, int]] = [
        (100, 150),
        (90, 120),
        (150, 100),
        (300, 200),
        (40, 40),
        (200, 200),
        (81, 80),
    ]
    rows = []
    for index, (height, width) in enumerate([*sizes, *sizes[:6]]):
        noise(height, width, index).save(root / f"{index:02d}.png")
        rows.append({"file_name": f"{index:02d}.png", "texts": [f"one {index}", f"two {index}"]})
    rows[3]["aesthetic_score"] = 4.5  # type: ignore[assignment]
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root
