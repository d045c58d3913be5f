"""Every fault: the rows of docs/reliability.md."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.faults import disks, kills, locks, one_file, other, shards
from tests.faults.world import Fault, Once, World

COMMANDS = ("upcycle", "convert", "cpt", "tokenize", "analyze-routing", "eval", "quickstart")
SURGERY = ("average", "grow", "prune", "densify", "convert")
REWRITING = ("upcycle", *SURGERY)
SLOW = ("average", "grow", "densify", "convert")  # prune stands for them among the fast tests


def _two(command: str) -> Once:
    return lambda world, chance: locks.two_writers(world, command)


def _of(once: Callable[[World, Random, str], str], command: str) -> Once:
    return lambda world, chance: once(world, chance, command)


KILL, STOP, FULL = "SIGKILL at a random instant", "Ctrl-C or SIGTERM, once or twice", "the disk fills up"
FAULTS: list[Fault] = [
    Fault(KILL, "upcycle", _of(kills.rewriting, "upcycle"), 50, slow=True),
    *(Fault(KILL, command, _of(kills.rewriting, command), 20, slow=True) for command in SURGERY),
    Fault(KILL, "cpt", kills.cpt, 50, slow=True),
    Fault(KILL, "analyze-routing over an earlier report", kills.report, 10, slow=True),
    Fault(KILL, "eval over earlier results", kills.results, 10, slow=True),
    Fault(KILL, "tokenize", kills.tokenize, 10, slow=True),
    Fault(KILL, "sample", one_file.kill, 10, slow=True),
    Fault(STOP, "inspect, upcycle, tokenize, analyze-routing", kills.told_to_stop, 30, slow=True),
    Fault("one of two processes is killed", "cpt", kills.one_of_two, 10, slow=True),
    Fault("no memory for a block", "a worker of upcycle", other.worker, 20),
    Fault("no memory (RLIMIT_AS)", "each command that writes", other.memory, 20, slow=True),
    *(
        Fault(FULL, command, _of(disks.rewriting, command), 10, slow=command in SLOW, mounts=True)
        for command in REWRITING
    ),
    *(
        Fault("a disk that is too small", command, _of(disks.too_small, command), 10, slow=command in SLOW, mounts=True)
        for command in REWRITING
    ),
    Fault(FULL, "cpt", disks.cpt, 10, slow=True, mounts=True),
    Fault(FULL, "analyze-routing over an earlier report", disks.report, 10, slow=True, mounts=True),
    Fault(FULL, "eval over earlier results", disks.results, 10, slow=True, mounts=True),
    Fault(FULL, "tokenize", disks.tokenize, 10, mounts=True),
    Fault(FULL, "sample", one_file.full, 10, slow=True, mounts=True),
    Fault(FULL, "plan --html over an earlier page", one_file.page, 10, mounts=True),
    Fault("TMPDIR and caches on a full disk", "each command that writes", disks.temporary, 10, slow=True, mounts=True),
    Fault("a read-only disk", "each command that writes", disks.read_only, 20, slow=True, mounts=True),
    Fault("a read-only disk", "sample, plan --html", one_file.read_only, 10, slow=True, mounts=True),
    Fault("the disk turns read-only", "each command that writes", disks.turns_read_only, 10, slow=True, mounts=True),
    Fault("OUT is deleted or moved away", "each command that writes", disks.vanished, 20, slow=True),
    *(
        Fault("two processes write one OUT", command, _two(command), 10, slow=command != "upcycle")
        for command in COMMANDS
    ),
    Fault("two processes write one OUT", "sample", one_file.two, 10, slow=True),
    Fault("four processes write one OUT", "each command that writes", locks.all_at_once, 10, slow=True),
    Fault("the holder of OUT is killed", "each command that writes", locks.after_a_kill, 10, slow=True),
    Fault("a shard of the source is cut short", "upcycle", shards.truncated_source, 15),
    *(
        Fault(
            "the source is cut short or changed during the run",
            command,
            _of(shards.truncated_meanwhile, command),
            15,
            slow=True,
        )
        for command in ("upcycle", "convert")
    ),
    Fault("the model changes before a killed run continues", "sample", one_file.changed, 10, slow=True),
    Fault("a bit of a source's header is flipped", "upcycle", shards.flipped_header, 40),
    Fault("a bit of a source's header is flipped", "plan", one_file.damaged, 20),
    Fault("a bit of a source's weights is flipped", "upcycle", shards.flipped_source, 30),
    Fault("a bit of a source in the hub's cache is flipped", "upcycle", shards.flipped_hub, 15),
    Fault("two shards of the source are swapped", "upcycle", shards.swapped_source, 10),
    Fault("the index names an absent file", "each command that reads", shards.absent, 25),
    Fault("a shard of a finished folder is cut short", "each command that reads", shards.truncated_result, 25),
    Fault("two shards of a finished folder are swapped", "each command that reads", shards.swapped_result, 25),
    Fault("a bit of a finished folder's weights is flipped", "verify", shards.flipped_result, 20),
    Fault("a bit of the newest step folder is flipped", "cpt, resuming", shards.flipped_step, 20, slow=True),
    Fault("the clock jumps by up to a year", "each command that writes", other.clock, 15, slow=True),
    Fault(
        "standard streams closed, full, or left by their reader",
        "inspect, upcycle, analyze-routing",
        other.closed,
        30,
        slow=True,
    ),
]
