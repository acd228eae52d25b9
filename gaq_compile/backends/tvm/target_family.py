"""Processors that share a file of shipped schedules.

A target's exact text (features, number of cores) is too particular a name for a file that many machines
shall find, and a schedule depends on little of it: on registers, their width, and the caches nearest to
them. So shipped files are named by a processor; one that has none is answered by its relatives' (the
first of its line with the same vector unit), then by that of the x86-64 level that its registers' width
stands for.
"""

from __future__ import annotations

import json

from .emit import vector_lanes

_RELATIVES = {
    "znver3": ("znver1", "znver2"),
    "znver4": ("znver5",),
    "skylake": ("haswell", "broadwell"),
    "skylake-avx512": ("skx", "cascadelake", "cooperlake", "cannonlake"),
    "icelake-server": (
        "icelake-client", "rocketlake", "tigerlake", "sapphirerapids", "emeraldrapids", "graniterapids",
    ),
    "alderlake": ("raptorlake", "meteorlake", "arrowlake", "lunarlake"),
}  # fmt: skip
_FAMILY = {cpu: family for family, relatives in _RELATIVES.items() for cpu in relatives}
_LEVELS = {16: "x86-64-v4", 8: "x86-64-v3"}  # by float32 lanes


def target_families(target: str) -> tuple[str, ...]:
    """Names under which schedules for a target (TVM target in JSON) are shipped, the nearest first.

    A target that nothing is known of has no names; that is no error.
    """
    described = json.loads(target)
    cpu = str(described.get("mcpu", ""))
    if described.get("kind") != "llvm" or not cpu:
        return ()
    names = (cpu, _FAMILY.get(cpu), _LEVELS.get(vector_lanes(target)))
    return tuple(dict.fromkeys(name for name in names if name))
