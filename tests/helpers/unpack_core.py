"""Lay the Python part of a release of megatron-core into a folder, whatever Python it asks for.

    python unpack_core.py 0.19.2 FOLDER

From 0.17 on pip refuses it on Python 3.11, but all that the interchange of checkpoints needs is Python. Its wheel is
taken for Python 3.12 and unpacked, with triton beside it, which it imports. FOLDER then goes first on PYTHONPATH.
"""

import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def unpack(version: str, folder: Path) -> None:
    """Do it, unless FOLDER has that version already."""
    if (folder / f"megatron_core-{version}.dist-info").is_dir() and (folder / "triton").is_dir():
        return
    with TemporaryDirectory() as wheels:
        subprocess.run([*PIP, "download", "--no-deps", "--only-binary=:all:", "--python-version", "3.12",
                        f"megatron-core=={version}", "--dest", wheels], check=True)
        (wheel,) = Path(wheels).glob("*.whl")
        zipfile.ZipFile(wheel).extractall(folder)
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(folder), "--upgrade", "triton"], check=True)


if __name__ == "__main__":
    unpack(sys.argv[1], Path(sys.argv[2]))
