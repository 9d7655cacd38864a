"""The suite's options, report header and fixtures."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

from benchmarks.peers import liger_ops
from benchmarks.record import made
from benchmarks.suite.harness import CLOCK, Suite
from minimind_fast.ops import precision

SUITE = pytest.StashKey[Suite]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("minimind_fast benchmarks")
    group.addoption("--shapes", choices=("default", "all"), default="default", help="all T, models and documents")
    group.addoption("--presets", default="", help="models, joined by commas")
    group.addoption("--tokens", default="", help="T, joined by commas")
    group.addoption("--budget_s", type=float, default=1e9, help="begin no row after this many seconds")
    wide = "also time other people's implementations with up to this many times eager's error, marked"
    group.addoption("--peer_error", type=float, default=0.0, help=wide)
    group.addoption("--threads", type=int, default=0, help="of a CPU (default: PyTorch's own choice)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    names = [name for name in config.getoption("--presets").split(",") if name]
    tokens = [int(count) for count in config.getoption("--tokens").split(",") if count]
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)
    limits = config.getoption("--budget_s"), config.getoption("--peer_error")
    suite = Suite(config.getoption("--shapes") == "all", names, tokens, *limits)
    config.stash[SUITE] = suite
    liger_ops.tune_all = suite.everything
    given = {argument.split("=")[0] for argument in map(str, config.invocation_params.args)}
    # pytest-benchmark's defaults are one second per row, too long for a first look, and twelve columns.
    wanted = {"--benchmark-columns": ["median", "iqr", "rounds"]}
    if not suite.on_gpu:
        wanted.update({"--benchmark-max-time": "0.2", "--benchmark-min-rounds": 3})  # type: ignore[dict-item]
    for name, value in wanted.items():
        if name not in given:
            setattr(config.option, name.removeprefix("--").replace("-", "_"), value)


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.option.collectonly:
        return
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    for line in session.config.stash[SUITE].limits():
        reporter.write_line(line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize tests by their module's ROWS: a function of the suite that returns one tuple per row, eager first."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.ROWS[metafunc.function.__name__](metafunc.config.stash[SUITE])
        metafunc.parametrize("case", cases, ids=["-".join(str(x) for x in case) for case in cases])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.stash[SUITE].on_gpu:
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK, disable_gc=False))


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    suite = config.stash[SUITE]
    output_json["minimind_fast"] = {
        "made": made(),
        "device": suite.device_name,
        "on_gpu": suite.on_gpu,
        "torch": torch.__version__,
        "roofs": suite.roofs,
        "limits": suite.limits(),
        "skipped": suite.skipped,
    }


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
    """Record why a row has no time, for the report."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        item.config.stash[SUITE].skipped.setdefault(reason, []).append(item.name)
    return report


@pytest.fixture
def suite(request: pytest.FixtureRequest) -> Iterator[Suite]:
    found = request.config.stash[SUITE]
    found.stop_if_out_of_time()
    with precision.exact_matmuls():  # a row that trains sets the switches for itself, not for the next
        yield found
    found.tidy()
