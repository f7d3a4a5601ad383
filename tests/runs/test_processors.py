"""Threads from what a process may use, and the line of a machine that is busy with other work."""

import pytest

from moco.runs.processors import (
    ProcessorTime,
    busy_line,
    fit_threads,
    processor_quota,
    processor_time,
)

V1 = "4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n"
IDLE = ProcessorTime(0, 0)


@pytest.fixture
def machine(tmp_path):
    """Return a function that writes the files of a machine, and returns their root."""

    def write(cgroup, files):
        for name, text in {"proc/self/cgroup": cgroup, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        # The smallest limit on the way up counts.
        (
            "0::/user/job\n",
            {
                "sys/fs/cgroup/user/job/cpu.max": "400000 100000",
                "sys/fs/cgroup/user/cpu.max": "200000 100000",
            },
            2,
        ),
        # A container sees its own cgroup at the mount.
        (
            V1,
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            V1,
            {
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ("0::/\n", {}, None),
        ("nonsense\n\n0::/\n", {"sys/fs/cgroup/cpu.max": "100000 0\n"}, None),
    ],
)
def test_quotas_of_both_versions_are_read(cgroup, files, expected, machine):
    assert processor_quota(machine(cgroup, files)) == expected


def test_a_system_without_such_files_has_no_quota(tmp_path):
    assert processor_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("environment", "quota", "number"),
    [
        ({}, 1.5, "1"),
        ({}, 0.5, "1"),
        ({}, 4.0, "4"),
        ({}, 8.0, None),
        ({}, None, None),
        ({"OMP_NUM_THREADS": "6"}, 1.5, "6"),
    ],
)
def test_a_quota_decides_the_threads_unless_the_user_does(environment, quota, number):
    fit_threads(environment, quota, 8)
    assert environment.get("OMP_NUM_THREADS") == number


def test_a_busy_machine_is_said(caplog):
    line = busy_line(ProcessorTime(10, 12), IDLE, 20, 2, 2, {})
    assert line.startswith("other programs keep this machine busy: the 2 threads of this run wait ")
    assert "55% of the time (2 processors, load average " in line
    assert "OMP_NUM_THREADS=1 before the command" in line
    line = busy_line(ProcessorTime(10, 12), IDLE, 20, 4, 4, {"OMP_NUM_THREADS": "4"})
    assert "a smaller OMP_NUM_THREADS than 4" in line


@pytest.mark.parametrize(
    ("own", "loaders", "threads"),
    [
        ((39, 0.4), (0, 0), 2),  # an idle machine
        ((20, 18), (18, 19), 2),  # the run's own loader processes are the others
        ((2, 3), (0, 0), 2),  # the run waits for its data
        ((10, 12), (0, 0), 1),  # one thread waits for no other
    ],
)
def test_a_machine_that_is_busy_with_this_run_alone_is_not_said(own, loaders, threads):
    assert busy_line(ProcessorTime(*own), ProcessorTime(*loaders), 20, threads, 2, {}) is None


def test_the_time_of_this_process_grows():
    before = processor_time()
    if before is None:
        pytest.skip("the kernel does not say how long threads wait")
    sum(range(300_000))
    assert processor_time().since(before).running > 0
    assert processor_time(["999999999"]) is None
