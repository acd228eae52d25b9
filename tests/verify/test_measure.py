from __future__ import annotations

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from gaq_compile.errors import ConfigError, VerificationError
from gaq_compile.verify.measure import alternate, measured_run, memory_growth, peak_memory, tensor_peak

MIB = 1 << 20
FILL = "x = bytearray(%d * (1 << 20))\nfor i in range(0, len(x), 4096): x[i] = 1\n"


def _python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_alternating_times_and_ratio():
    found = alternate(lambda: time.sleep(0.006), lambda: time.sleep(0.002), runs=8, warmup=1)
    assert 5.5 < found.a_ms < 12 and 1.8 < found.b_ms < 6
    assert 1.5 < found.ratio < 4
    assert found.ratio_low <= found.ratio <= found.ratio_high
    assert found.runs == 8 and found.spread >= 0


def test_order_alternates_after_the_warm_up():
    calls: list[str] = []
    alternate(lambda: calls.append("a"), lambda: calls.append("b"), runs=3, warmup=1)
    turns = "".join(side for side, _ in itertools.groupby(calls[2:]))
    assert calls[:2] == ["a", "b"] and turns == "abab"  # a b, b a, a b


def test_a_turn_is_more_than_one_call_and_the_first_does_not_count():
    seen: list[float] = []

    def slow_at_first() -> None:
        time.sleep(0.002 if seen and time.perf_counter() - seen[-1] < 0.01 else 0.03)
        seen.append(time.perf_counter())

    found = alternate(slow_at_first, lambda: time.sleep(0.02), runs=3, warmup=1)
    assert found.a_ms < 8 and found.b_ms > 19
    with pytest.raises(ConfigError, match="cannot time 1 runs"):
        alternate(lambda: None, lambda: None, runs=1)


def test_tensor_peak_counts_what_is_alive_at_once():
    x = torch.ones(1 << 18)  # 1 MiB

    def run():
        y = x + 1
        z = y * 2
        del y
        return (z + 1).sum()

    assert abs(tensor_peak(run) - 2 * MIB) < 4096
    assert tensor_peak(lambda: None) == 0


def test_peak_memory_of_a_child_is_its_own_not_its_parents():
    ballast = np.ones(300 * MIB // 8)  # this process is large; a forked child would inherit that peak
    small = peak_memory(_python("pass"))
    large = peak_memory(_python(FILL % 150))
    assert ballast[0] == 1.0
    assert small < 60 * MIB
    assert 140 * MIB < large - small < 170 * MIB


def test_a_peak_that_is_gone_at_the_end_counts():
    run = measured_run(_python(FILL % 150 + "del x\nprint('done')"))
    assert run.peak_bytes > 150 * MIB and run.stdout == "done\n" and run.seconds > 0


def test_commands_that_fail_are_reported():
    with pytest.raises(VerificationError, match="exit status 3"):
        peak_memory(_python("raise SystemExit(3)"))
    with pytest.raises(VerificationError, match="ZeroDivisionError"):
        peak_memory(_python("1 / 0"))
    with pytest.raises(VerificationError, match="did not start"):
        peak_memory(["a-program-that-does-not-exist"])
    with pytest.raises(VerificationError, match="no end after"):
        peak_memory(_python("import time; time.sleep(60)"), timeout=1.0)


@pytest.mark.parametrize("allow_reset", [True, False])
def test_growth_counts_the_peak_above_the_present(allow_reset):
    """In a process of its own: one that has freed much may not grow when it allocates again."""
    code = f"""
import time, numpy as np
from gaq_compile.verify.measure import memory_growth
before = np.ones({200 * MIB // 8})
del before  # an earlier, higher peak
with memory_growth(allow_reset={allow_reset}) as memory:
    during = np.ones({80 * MIB // 8})
    time.sleep(0.02)
    del during
print(memory.growth_bytes, memory.method)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    growth, method = done.stdout.split()
    assert 70 * MIB < int(growth) < 95 * MIB
    assert method in ("reset", "sampled") if allow_reset else method == "sampled"


def test_growth_of_nothing_is_small():
    with memory_growth() as memory:
        pass
    assert memory.growth_bytes < 4 * MIB
