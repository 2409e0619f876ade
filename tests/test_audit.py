"""What the audit of packages says of weaknesses, and where it knows nothing."""

import json

from tests.audit import report

SOUND = {"name": "numpy", "version": "2.4.6", "vulns": []}
WEAK = {
    "name": "torch",
    "version": "1.0",
    "vulns": [{"id": "CVE-1", "fix_versions": ["1.1"]}, {"id": "CVE-2", "fix_versions": []}],
}
UNKNOWN = {"name": "local", "skip_reason": "Dependency not found on PyPI"}


def test_weaknesses_are_named() -> None:
    lines, has_weakness = report(json.dumps({"dependencies": [SOUND, WEAK, UNKNOWN]}))
    assert has_weakness
    assert lines == [
        "torch 1.0: CVE-1, mended in 1.1",
        "torch 1.0: CVE-2, mended in no version yet",
        "Audited 2 of 3 packages: 2 known weaknesses",
    ]


def test_without_advisories_that_is_said() -> None:
    assert report("") == (["Packages not audited: no advisories could be fetched."], False)
    lines, has_weakness = report(json.dumps({"dependencies": [UNKNOWN]}))
    assert lines == ["Audited 0 of 1 packages: 0 known weaknesses"]
    assert not has_weakness
