"""Lists the machine code of the CUDA kernels with cuobjdump, from objects or from the module in a wheel.

cuobjdump must be on PATH, or in the Python that runs this: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
import zipfile
from pathlib import Path


def disassembler() -> tuple[str, dict[str, str]] | None:
    """cuobjdump, and the environment in which it finds nvdisasm; None where one of them is missing."""
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(packaged)])
    cuobjdump = shutil.which("cuobjdump", path=path)
    if cuobjdump is None or shutil.which("nvdisasm", path=path) is None:
        return None
    return cuobjdump, {**os.environ, "PATH": path}


def listing(option: str, compiled: list[Path]) -> str:
    """The output of cuobjdump for all files: with `-sass` instructions, with `-res-usage` registers and memory."""
    cuobjdump, environment = disassembler()
    text = ""
    for path in compiled:
        result = subprocess.run([cuobjdump, option, str(path)], capture_output=True, text=True, env=environment)
        if result.returncode:
            raise SystemExit(f"machine_code: {path.name} must hold machine code of CUDA, got\n{result.stderr}")
        text += result.stdout
    return text


def listing_of_wheel(option: str, wheel: Path) -> str:
    """The output of cuobjdump for the compiled module in a wheel, which is what users install."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("nf4lora/_C") and name.endswith(".so")]
        return listing(option, [Path(archive.extract(name, folder)) for name in names])
