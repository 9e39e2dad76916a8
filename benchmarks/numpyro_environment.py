"""NumPyro in a virtual environment of its own, so that its pins and the package's never meet."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

PINS = ("jax==0.10.2", "jaxlib==0.10.2", "numpyro==0.22.0", "numpy==2.4.6")
DEFAULT = Path(__file__).resolve().parents[1] / ".venv-numpyro"


def interpreter(env: Path) -> Path:
    """The environment's Python; the environment is made first where it is not there (Python 3.11 or later, .6 GB)."""
    python = env / "bin" / "python"
    if not (made := env / ".installed").exists():
        print(f"making {env}: {' '.join(PINS)}", file=sys.stderr, flush=True)
        venv.create(env, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PINS], check=True)
        made.touch()
    return python


def variables(threads: int) -> dict[str, str]:
    """The environment variables of a NumPyro process with this many threads on the CPU."""
    # XLA makes a pool of NPROC threads, one for each processor otherwise.
    limits = {name: str(threads) for name in ("NPROC", "OMP_NUM_THREADS")}
    flags = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
    return os.environ | limits | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
