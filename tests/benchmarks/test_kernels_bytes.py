"""`geodiag bench kernels_bytes`: what the profiler says becomes rows; the counters themselves need
a GPU.
"""

from geodiag.benchmarks.kernels_bytes import COUNTERS, STEPS, counted, markdown

HEAD = ",".join(f'"{name}"' for name in ("ID", "Process ID", "Kernel Name", *COUNTERS))
NCU_OUTPUT = f"""==PROF== Connected to process 7
==PROF== Profiling "mix": 0%....50%....100% - 1 pass
{HEAD}
"","","","byte","byte","byte","ns"
"0","7","mix","1,000","200","5,000","3,000"
"1","7","void at::native::fill<4>(int)","8","8","8","100"
"2","7","mix","3,000","400","7,000","5,000"
"""


def test_the_launches_of_a_kernel_are_averaged_over_the_profiled_steps() -> None:
    mix, fills = counted(NCU_OUTPUT)
    assert STEPS == 2
    assert mix == {
        "kernel": "mix",
        "read": 2000.0,
        "written": 300.0,
        "through_l2": 6000.0,
        "ns": 4000.0,
    }
    assert fills["kernel"] == "torch: fills"
    assert fills["read"] == 4.0


def test_the_page_holds_moved_bytes_against_those_that_must_move() -> None:
    rows = [{**r, "must": 2000 if r["kernel"] == "mix" else 0} for r in counted(NCU_OUTPUT)]
    machine = {"cpu": "a processor", "gpu": "a GPU", "cores": 1, "system": "Linux"}
    result = {
        "size": (4, 8),
        "machine": machine,
        "versions": {"torch": "2"},
        "command": "x",
        "sites": {"alone": rows},
    }
    (line,) = (row for row in markdown(result).splitlines() if row.startswith("| `mix`"))
    assert line.split("|")[5].strip() == f"{2300 / 2000:.2f}"
