"""Test folders of the rooms that differ from the last commit: `python tools/changed_tests.py`.

Prints paths for pytest. A change in `hooks/measure/` selects `tests/hooks/measure`; without
changes, the files of the last commit count. Tests of the project's structure are always selected.
"""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def changed_files() -> list[str]:
    """Return files that are changed or new; without any, those of the last commit."""
    commands = (
        ["git", "diff", "--name-only", "HEAD"],
        ["git", "ls-files", "--others", "--exclude-standard"],
        ["git", "diff", "--name-only", "HEAD~1", "HEAD"],
    )
    outputs = [
        subprocess.run(c, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
        for c in commands
    ]
    return [*outputs[0], *outputs[1]] or outputs[2]


def tests_of(file: str) -> Path | None:
    """Return the closest test folder of a source file, or the test file itself."""
    path = Path(file)
    if path.suffix != ".py":
        return None
    if path.parts[0] == "tests":
        return path if path.name.startswith("test_") else path.parent
    for folder in path.parents:
        if folder.name and (ROOT / "tests" / folder).is_dir():
            return Path("tests") / folder
    return None


if __name__ == "__main__":
    found = {tests_of(file) for file in changed_files()} - {None, Path("tests")}
    selected = sorted(str(path) for path in found if path is not None and (ROOT / path).exists())
    print("tests/project", *(path for path in selected if not path.startswith("tests/project")))
