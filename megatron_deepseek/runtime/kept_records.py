"""Results of a long run on disk, by number, from which a killed one goes on.

    {"number": 3, "digest": "0f3a...", ...}

A line is a result, appended as soon as it is there, in any order. `digest` is of all that it was made from; lines of
another digest are of other options, and are passed over. Only places in the file are held in memory.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_deepseek.foreign_json import parse_json
from megatron_deepseek.runtime.appending import AppendedFile


def digest_of(*made_from: object) -> str:
    """Return what tells a result from those made from something else: 16 hexadecimal digits of values in JSON's types.
    """
    asked = json.dumps(made_from, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(asked.encode(errors="surrogatepass")).hexdigest()[:16]


class KeptRecords:
    """The file of results. `digests`: of the results that are wanted, by number. `tell` gets a line of its troubles.

    A last line that was not finished is cut off. Raise ValueError for a file that holds something else.
    """

    def __init__(self, path: Path, digests: Mapping[int, str], tell: Callable[[str], None]):
        self.path, self._digests = path, digests
        path.parent.mkdir(parents=True, exist_ok=True)
        self._places = self._find()
        self._end = path.stat().st_size if path.exists() else 0
        self._file = AppendedFile(path, tell)

    def _find(self) -> dict[int, int]:
        """Return at which byte the result of each number begins, of several the last."""
        if not self.path.exists():
            return {}
        places, begin = {}, 0
        with open(self.path, "rb") as file:
            for count, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                record = parse_json(line, f"{self.path}, line {count}")
                if not isinstance(record, dict) or not {"number", "digest"} <= record.keys():
                    raise ValueError(f"{self.path}, line {count} is no result of such a run; name another --output, or "
                                     "remove the file")
                if self._digests.get(record["number"]) == record["digest"]:
                    places[record["number"]] = begin
                begin += len(line)
        if begin < self.path.stat().st_size:
            os.truncate(self.path, begin)
        return places

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return the result of a number."""
        with open(self.path, "rb") as file:
            file.seek(self._places[number])
            return json.loads(file.readline())

    def keep(self, number: int, result: Mapping[str, Any]) -> None:
        """Write a result, whole or not at all."""
        record = {"number": number, "digest": self._digests[number], **result}
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        self._file.write(line)
        self._places[number], self._end = self._end, self._end + len(line)

    def close(self) -> None:
        """Close the file. Raise OSError if the last results could not be written."""
        self._file.close()
