"""What an installation of the client alone costs: the built wheel in a fresh environment, from the package index.

Printed: packages and bytes that are installed, seconds that it took, and the median of five cold imports in
milliseconds. It ends with an error where something of a server came along, or where `forge` does not run.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from tools.release import ROOT, build_wheel, read_release

_NEVER = ("torch", "sqlalchemy", "datasets", "numpy", "training_common", "cognate_server", "agent_server")
_IMPORTS = {"client": "cognateforge.client", "cli": "cognateforge.cli.app"}
_RUNS = 5


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="client-install-") as scratch:
        print(json.dumps({"bench": "client_install", **measure(Path(scratch))}))


def measure(scratch: Path) -> dict[str, float | int]:
    """Install the wheel and return what it costs. Errors: SystemExit; CalledProcessError."""
    wheel = build_wheel(read_release("client"), scratch / "dist")
    venv.create(scratch / "venv", with_pip=False)
    python = str(scratch / "venv" / "bin" / "python")
    begin_s = time.monotonic()
    pip = (sys.executable, "-m", "pip", "--python", python, "--quiet", "--disable-pip-version-check", "install")
    subprocess.run((*pip, "--constraint", str(ROOT / "constraints.txt"), str(wheel)), check=True, env=_clean())
    install_s = time.monotonic() - begin_s
    site = next((scratch / "venv" / "lib").glob("python3*/site-packages"))
    told = _run(python, "-c", "from importlib import metadata; print(*(d.name for d in metadata.distributions()))")
    packages = told.split()
    for name in _NEVER:
        found = _run(python, "-c", f"import importlib.util as u; print(u.find_spec({name!r}))")
        if found.strip() != "None":
            raise SystemExit(f"a client alone has {name}: {found}")
    shown = _run(str(scratch / "venv" / "bin" / "forge"), "--version").strip()
    if shown != f"forge {read_release('client').version}":
        raise SystemExit(f"forge --version says {shown!r}")
    files = [path for path in site.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {
        "wheel_bytes": wheel.stat().st_size,
        "install_s": round(install_s, 1),
        "packages": len(packages),
        "dependencies": len(packages) - 1,
        "installed_bytes": sum(path.stat().st_size for path in files),
        **{f"import_{name}_ms": _import_ms(python, module) for name, module in _IMPORTS.items()},
    }


def _import_ms(python: str, module: str) -> float:
    """Return the median time of an import in a process of its own, whose bytecode is there."""
    code = f"import time; t = time.perf_counter(); import {module}; print(1e3 * (time.perf_counter() - t))"
    return round(statistics.median([float(_run(python, "-c", code)) for _ in range(_RUNS + 1)][1:]), 1)


def _run(*command: str) -> str:
    # Away from the checkout, whose packages would be found.
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd="/", env=_clean()).stdout


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


if __name__ == "__main__":
    main()
