"""The log of train_lm.py, one JSON object a line, and Ctrl-C held back where it would tear something apart."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Log:
    """Appends rows to a file and keeps them in `rows`."""

    def __init__(self, path: Path, step: int):
        """Keeps what an earlier part of this run logged up to `step`; a new run starts at 0 and keeps nothing."""
        earlier = path.read_text().splitlines() if step and path.is_file() else []
        self.rows = [row for row in map(_parse, earlier) if row and row["step"] <= step]
        # Rows behind the checkpoint, of a run that was killed, will be computed again
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self._path = path

    def write(self, **row: Any) -> None:
        self.rows.append(row)
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    # The last line of a run that was killed may be cut off
    except json.JSONDecodeError:
        return None


class Interrupt:
    """Ctrl-C raises KeyboardInterrupt, but not before a block under `held` is through."""

    def __init__(self) -> None:
        self._held = self._pending = False
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, *_: Any) -> None:
        if not self._held:
            raise KeyboardInterrupt
        self._pending = True

    @contextmanager
    def held(self) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._pending:
            raise KeyboardInterrupt

    def ignore(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
