"""Asks PyPI for known weaknesses of the pinned packages; part of `make check`.

    python tests/audit.py

The exit code is 1 where one is known. Without a network, or behind a mirror that has no advisories,
nothing can be told: that is said, and is no failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ("--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json")


def main() -> int:
    """Prints what is known; the exit code."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(ROOT / "requirements.txt"), *OPTIONS]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    lines, has_weakness = report(ended.stdout)
    print("\n".join(lines))
    return int(has_weakness)


def report(output: str) -> tuple[list[str], bool]:
    """What pip-audit's JSON says, for a person, and whether a weakness is known."""
    try:
        packages: list[dict[str, Any]] = json.loads(output)["dependencies"]
    except (ValueError, KeyError):
        return ["Packages not audited: no advisories could be fetched."], False
    known = [(package, weakness) for package in packages for weakness in package.get("vulns", [])]
    lines = [
        f"{package['name']} {package['version']}: {weakness['id']}, mended in"
        f" {', '.join(weakness['fix_versions']) or 'no version yet'}"
        for package, weakness in known
    ]
    asked = [package for package in packages if "skip_reason" not in package]
    lines.append(f"Audited {len(asked)} of {len(packages)} packages: {len(known)} known weaknesses")
    return lines, bool(known)


if __name__ == "__main__":
    sys.exit(main())
