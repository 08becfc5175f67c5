"""The self-test and the noise that is recorded: known loads, known differences, on live workers."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import psutil
import pytest

from optimize.pipeline import selftest
from optimize.pipeline.contract import Gates
from optimize.pipeline.measure import Speed
from optimize.pipeline.noise import Noise, NoiseMeter
from optimize.pipeline.selftest import calibrate
from optimize.pipeline.statistics import Interval
from optimize.pipeline.verdict import Status, judge_speed
from tests.conftest import Cli

BUSY = "import time\nend = time.time() + 60\nwhile time.time() < end: pass"


@pytest.fixture
def busy() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    yield process
    process.kill()
    process.wait()


def test_what_others_use_is_told_from_what_we_use(busy: "subprocess.Popen[bytes]") -> None:
    theirs, ours, family = NoiseMeter(), NoiseMeter(busy.pid), NoiseMeter(os.getpid())  # whose child it is
    start, used = time.monotonic(), psutil.Process(busy.pid).cpu_times().user
    time.sleep(3)
    share = (
        (psutil.Process(busy.pid).cpu_times().user - used) / (time.monotonic() - start) / len(os.sched_getaffinity(0))
    )
    assert theirs.read(0.0).others - ours.read(0.0).others == pytest.approx(share, abs=0.05)
    assert theirs.read(0.0).others - family.read(0.0).others == pytest.approx(share, abs=0.05)
    assert share > 0.1  # else nothing was busy, and nothing was tested


def test_noise_is_told_when_it_is_notable() -> None:
    quiet = Noise(others=0.01, stolen=0.0, load=0.1, megahertz=None, spread=0.012)
    loud = Noise(others=0.48, stolen=0.2, load=3.0, megahertz=None, spread=0.3)
    assert str(quiet) == "the baseline differs from itself by 1.2%"
    assert "other processes took 48% of the processors" in str(loud)
    assert "the hypervisor kept 20%" in str(loud)


@pytest.mark.parametrize(
    ("low", "value", "high", "words"),
    [
        (1.00, 1.10, 1.21, "about 5 times the budget"),  # log(1.1) / log(1.1 / 1.05), squared, is 4.2
        (1.04, 1.0501, 1.06, "too close to the gate for any budget"),
    ],
)
def test_an_inconclusive_verdict_says_what_would_tell(low: float, value: float, high: float, words: str) -> None:
    noise = Noise(0.48, 0.0, 3.0, None, 0.3)
    status, reason = judge_speed(Speed(Interval(value, low, high), (), 8, noise), Gates())
    assert status == Status.INCONCLUSIVE
    assert reason is not None
    assert words in reason
    assert "other processes took 48%" in reason


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        (Interval(0.8, 0.7, 0.9), "slower against eager"),
        (Interval(1.0, 0.99, 1.01), "no difference against eager"),
        (Interval(1.03, 1.025, 1.04), "below the gate of 1.05"),
    ],
)
def test_what_is_not_faster_is_told_from_what_is_slower(interval: Interval, words: str) -> None:
    status, reason = judge_speed(Speed(interval, (), 8), Gates())
    assert status == Status.NOT_FASTER
    assert reason is not None
    assert words in reason


def test_as_many_products_are_counted_as_take_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Products:
        """Each takes a tenth of a millisecond by the clock, and some calls as long again."""

        def __init__(self, count: int) -> None:
            self._count, self._late = count, itertools.cycle((True, False))

        def run(self, _: object) -> None:
            nonlocal now
            now += self._count * 1e-4 * (1 + next(self._late))

    monkeypatch.setattr(selftest, "Products", Products)
    monkeypatch.setattr(selftest, "time", SimpleNamespace(perf_counter=lambda: now))
    assert [calibrate(seconds) for seconds in (1e-4, 0.001, 0.2)] == [10, 10, 2000]


def test_the_self_test_measures_the_known_difference(cli: Cli) -> None:
    outcome = cli("doctor", "--self-test", "--budget", "15s")
    assert outcome.report is not None, outcome.output
    heavier = outcome.report["heavier"]["overall"]
    assert heavier["low"] < 1.1 * 1.1
    assert heavier["high"] > 1.1 / 1.1
    assert outcome.report["resolves"]["300"] < outcome.report["resolves"]["60"] < outcome.report["resolves"]["15"]
    assert outcome.code in (0, 6)  # whether this host is quiet enough now is what it tells
    assert ("sound:" in outcome.output) == (outcome.code == 0)
