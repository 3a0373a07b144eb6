"""scikit-build-core, which also asks for torch where none is installed.

torch is not among the build requirements: pip would download a second torch, another than the one that the package
will run with. CMake finds the installed one; only a machine without any gets one for the build.
"""

import os
import subprocess
import sys

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403  the other hooks of PEP 517 as they are

FALLBACK = os.environ.get("NF4LORA_BUILD_TORCH", "torch>=2.11")


def _have_torch() -> bool:
    # -I ignores the sitecustomize with which pip hides installed packages from a build; plain is for other front ends.
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
    return any(subprocess.run([sys.executable, *flags, "-c", code]).returncode == 0 for flags in (["-I"], []))


def _requirements() -> list[str]:
    return [] if _have_torch() else [FALLBACK]


def get_requires_for_build_wheel(config_settings=None):
    return [*_build.get_requires_for_build_wheel(config_settings), *_requirements()]


def get_requires_for_build_editable(config_settings=None):
    return [*_build.get_requires_for_build_editable(config_settings), *_requirements()]
