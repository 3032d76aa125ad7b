"""Looking at pictures on a Ray cluster (https://docs.ray.io): the same rows, from many machines."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sdxl_cli.data.manifest import Row, from_table, to_table
from sdxl_cli.data.pool import CHUNK, chunks
from sdxl_cli.data.tables import Item
from sdxl_cli.errors import UsageError

if TYPE_CHECKING:
    from sdxl_cli.data.scan import Look


def on_ray(look: Look, items: Sequence[Item]) -> Iterator[list[Row]]:
    """Rows of the items, in their order. The cluster is the one ``RAY_ADDRESS`` names, else this machine.

    Every machine must see the pictures under the same path or URL. Ray does again what a lost worker was doing.

    Raises:
        UsageError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray needs Ray; install it with: pip install 'sdxl-cli[ray]'") from error
    ray.init(
        ignore_reinit_error=True, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    # as bytes: Arrow has no type for items
    tasks = [
        {"number": n, "items": pickle.dumps(list(chunk))} for n, chunk in enumerate(chunks(items, CHUNK))
    ]

    def work(task: dict[str, Any]) -> dict[str, Any]:
        import pyarrow as pa

        table = to_table(look(pickle.loads(task["items"])))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return {"number": task["number"], "rows": sink.getvalue().to_pybytes()}

    waiting: dict[int, list[Row]] = {}
    coming = 0
    for result in ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(work).iter_rows():
        waiting[int(result["number"])] = _rows(result["rows"])
        while coming in waiting:  # they arrive as they are done
            yield waiting.pop(coming)
            coming += 1


def _rows(data: bytes) -> list[Row]:
    import pyarrow as pa

    return from_table(pa.ipc.open_stream(data).read_all())
