"""Fail unless every pure module is covered completely, lines and branches.

The pure modules are those of the import contract named "pure" in pyproject.toml: the same list
that keeps I/O out of them.  Reads the coverage data that `make coverage` left behind.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pure_files() -> list[str]:
    """Paths of the pure modules, relative to the checkout."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = config["tool"]["importlinter"]["contracts"]
    (modules,) = [c["source_modules"] for c in contracts if c.get("id") == "pure"]
    files = [f"{module.replace('.', '/')}.py" for module in modules]
    absent = [name for name in files if not (ROOT / name).is_file()]
    if absent:
        sys.exit(f"pure gate: no such module: {', '.join(absent)}; mend pyproject.toml")
    return files


def main() -> int:
    command = [sys.executable, "-m", "coverage", "report", "--rcfile=tools/coverage.ini"]
    command += ["--show-missing", "--skip-covered", "--fail-under=100"]
    command += [f"--include={','.join(pure_files())}"]
    print("pure modules (100 % of lines and branches wanted; complete ones are not listed):")
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
