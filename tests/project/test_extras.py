"""The wheel in environments that lack packages: what works with each extra."""

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from geodiag.extras import EXTRAS, MissingPackageError, requires_extra
from tests.paths import ROOT, SAMPLES
from tests.project.environments import Environment, install, required

pytestmark = pytest.mark.slow

READ = f"""
import geodiag
run = geodiag.open_run({str(SAMPLES / "mhc-tear")!r})
steps = run.read("steps", ["step", "loss"])
layers = run.read_arrow("layers", ["step", "amax_gain_fwd"], steps=(0, 10))
print(len(steps), layers.num_rows > 0, geodiag.explain(run).spike_onset > 0)
print(geodiag.SpikeDetector().update(0, 3.0))
"""

RECORD = """
import geodiag, torch
class Blocks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        block = torch.nn.Linear
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(block(8, 8)) for _ in range(3))
    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x
model = Blocks()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
with geodiag.attach(model, optimizer, "recorded") as run:
    for _ in range(2):
        loss = model(torch.randn(4, 8)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step(loss)
print(geodiag.open_run("recorded").read("steps")["step"].tolist())
"""

COMMANDS = """
import json, sys
from geodiag.cli.__main__ import main
for words in json.loads(sys.argv.pop()):
    sys.argv[1:] = words
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code
    print(f"exit {code}", file=sys.stderr)
"""
"""Runs several command lines in one process, which saves the start of one for each."""


def run_commands(environment: Environment, folder: Path, *lines: str) -> list[str]:
    """Run command lines of geodiag; return what they write to stderr, with a line `exit CODE`."""
    words = [line.replace("RUN", str(SAMPLES / "hc")).split() for line in lines]
    done = environment.python("-c", COMMANDS, json.dumps(words), cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.fixture(scope="module")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return install(wheel, tmp_path_factory.mktemp("core"))


@pytest.fixture(scope="module")
def with_cli(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return install(wheel, tmp_path_factory.mktemp("cli"), "cli")


@pytest.fixture(scope="module")
def with_torch(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return install(wheel, tmp_path_factory.mktemp("torch"), "torch")


@pytest.fixture(scope="module")
def with_app(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return install(wheel, tmp_path_factory.mktemp("app"), "app")


def test_the_core_environment_has_none_of_the_optional_packages(
    core: Environment, tmp_path: Path
) -> None:
    names = ["torch", "dash", "plotly", "typer", "rich", "pytest", "pandas"]
    code = (
        f"from importlib import import_module\nfor name in {names}:\n"
        "    try: import_module(name)\n    except ModuleNotFoundError as e: print(e.name)"
    )
    assert core.python("-c", code, cwd=tmp_path).stdout.split() == names[:-1]


def test_the_core_reads_and_explains_a_run(core: Environment, tmp_path: Path) -> None:
    done = core.python("-c", READ, cwd=tmp_path)
    assert done.stdout.startswith("300 True True\n"), done.stderr
    assert done.returncode == 0, done.stderr


def test_a_public_name_without_torch_names_the_extra(core: Environment, tmp_path: Path) -> None:
    names = ["attach", "AnticipatoryRouting", "Snapshots"]
    code = (
        f"import geodiag\nfor name in {names}:\n    try: getattr(geodiag, name)\n"
        "    except geodiag.GeodiagError as e: print(isinstance(e, ImportError), e)"
    )
    done = core.python("-c", code, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        f"True geodiag.{name} needs torch, which is not installed: pip install 'geodiag[torch]'"
        for name in names
    ], done.stderr


def test_the_command_without_typer_names_the_extra(core: Environment, tmp_path: Path) -> None:
    done = core.python("-m", "geodiag.cli", "show", SAMPLES / "hc", cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(
        r"geodiag: the command line needs (typer|rich), which is not installed: "
        r"pip install 'geodiag\[cli\]'\n",
        done.stderr,
    )


def test_queries_need_no_more_than_the_cli(with_cli: Environment, tmp_path: Path) -> None:
    queries = ["show RUN", "spikes RUN", "cascade RUN", "runs RUN", "export RUN --to csv"]
    assert run_commands(with_cli, tmp_path, *queries) == ["exit 0"] * len(queries)


def test_a_command_that_lacks_a_package_names_the_extra(
    with_cli: Environment, tmp_path: Path
) -> None:
    commands = {
        "dashboard RUN --no-open": "app",
        "report RUN": "app",
        "compare RUN RUN": "app",
        "train --steps 2": "torch",
        "demo --no-serve": "torch",
        "bench overhead": "torch",
    }
    lines = run_commands(with_cli, tmp_path, *commands)
    assert len(lines) == 2 * len(commands), lines
    for command, error, code in zip(commands, lines[::2], lines[1::2], strict=True):
        assert error.startswith("geodiag: this command needs "), command
        end = f", which is not installed: pip install 'geodiag[{commands[command]}]'"
        assert error.endswith(end), command
        assert code == "exit 1", command


def test_recording_needs_no_more_than_torch(with_torch: Environment, tmp_path: Path) -> None:
    done = with_torch.python("-c", RECORD, cwd=tmp_path)
    assert done.stdout.endswith("[0, 1]\n"), done.stderr


def test_the_pages_need_no_torch(with_app: Environment, tmp_path: Path) -> None:
    code = (
        "import geodiag, geodiag.dashboard.serve\n"
        "from geodiag.dashboard.reports.report_page import report\n"
        f"page = report(geodiag.open_run({str(SAMPLES / 'hc')!r})).html(0.0)\n"
        "print(page.startswith('<!doctype html>'))"
    )
    done = with_app.python("-c", code, cwd=tmp_path)
    assert done.stdout.lower() == "true\n", done.stderr


def test_the_script_starts_where_packages_may_be_missing(wheel: Path, tmp_path: Path) -> None:
    install(wheel, tmp_path)
    (found,) = tmp_path.glob("lib/*/site-packages/*.dist-info/entry_points.txt")
    assert "geodiag = geodiag.cli.__main__:main" in found.read_text()


def test_the_modules_of_an_extra_are_those_that_pyproject_installs() -> None:
    owners = metadata.packages_distributions()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, modules in EXTRAS.items():
        wanted = project["optional-dependencies"][extra]
        direct = {canonicalize_name(Requirement(line).name) for line in wanted}
        found = {canonicalize_name(n) for m in modules for n in owners.get(m, [m])}
        assert direct <= found <= required(wanted, set()), extra


def test_requirements_are_followed_through_extras_of_extras() -> None:
    needs = ["numpy", 'geodiag[app]; extra == "all"', 'dash; extra == "app"', 'torch; extra == "t"']
    assert "dash" not in required(needs, set())
    assert {"numpy", "dash", "flask"} <= required(needs, {"all"})
    assert "torch" not in required(needs, {"all"})


def test_a_missing_module_of_another_package_stays_as_it_is() -> None:
    with pytest.raises(ModuleNotFoundError) as caught, requires_extra("geodiag.attach"):
        raise ModuleNotFoundError("No module named 'mine'", name="mine")
    assert not isinstance(caught.value, MissingPackageError)
