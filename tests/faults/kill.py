"""``make faults``: SIGKILL at random points of runs of every method; resumed, they are compared bit for bit.

    python tests/faults/kill.py --points 50 [--seed N] [--only "grpo overlap"]

A run is killed up to three times: at a random event (a write, also with half of it done; a sync, a rename, a
removal; a micro-batch's gradient; an optimiser's step) or after a random time; then it runs to its end, and
log, checkpoints and model have to be those of the same run that was left alone. Some sittings are new
processes; the others are forked, which is faster. Exit code 1 where a run differs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults_runs import CASES, RESUME, Ended, Server, World, counts, kill, logged, same

IN_TIME = 0.2
"""The share of points that are moments, not events."""
BOTH = 0.5
"""Of the kills in a run of two processes those that end both; otherwise the other has to end by itself."""
NEW_PROCESS = 0.06
"""The share of sittings in a new interpreter."""
ROW = "{:<14} {:>7}  {:<52} {:>9}  {}"


def main() -> int:
    """Kill, resume, compare; 1 where a run differs."""
    parser = argparse.ArgumentParser(description="kill runs at random points and compare them bit for bit")
    parser.add_argument("--points", type=int, default=50, help="how many kills")
    parser.add_argument("--seed", type=int, default=None, help="of the points; drawn and printed without it")
    parser.add_argument("--only", default="", help="one case: " + ", ".join(CASES))
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    draw, began = random.Random(seed), time.monotonic()
    print(f"seed {seed}, {options.points} points\n")
    print(ROW.format("run", "sitting", "killed", "logged", "result"))
    with tempfile.TemporaryDirectory(prefix="trimtab-faults-") as folder:
        server = Server(Path(folder))
        try:
            world = World(Path(folder), server)
            names = [options.only] if options.only else list(CASES)
            points, runs, bad = 0, 0, 0
            while points < options.points:
                name = names[runs % len(names)]
                killed, fault = one_run(world, name, draw, options.points - points)
                points, runs, bad = points + killed, runs + 1, bad + bool(fault)
        finally:
            server.close()
    print(f"\n{points} points in {runs} runs, {time.monotonic() - began:.0f} s: ", end="")
    print(f"{bad} run(s) differ (seed {seed})" if bad else "every run ended as if it had not been killed")
    return 1 if bad else 0


def one_run(world: World, name: str, draw: random.Random, most: int) -> tuple[int, str]:
    """Kill one run up to three times and finish it: the number of kills, and what is wrong at the end."""
    straight, unhurt = world.timed(name)
    out = world.scratch() / "run"
    killed, sittings, wanted = 0, 0, min(most, draw.choice((1, 1, 2, 3)))
    rows: list[list[Any]] = []
    wrong = ""
    while True:
        last = killed == wanted or sittings > 8
        shown, how = ("", {}) if last else point(unhurt, draw)
        two = "size" in world.cases[name][2]
        how["new"] = not two and "after_s" not in how and draw.random() < NEW_PROCESS
        ended = world.run(name, out, *(RESUME if sittings else ()), **how)
        sittings += 1
        if ended.status == -9 and not last:
            killed += 1
            where = f" at {ended.events[-1]}" if "after_s" in how and ended.events else ""
            rows.append([name, sittings, shown + where, (logged(out) or ["-"])[-1]])
            continue
        if ended.status != 0:
            at = f" ({shown})" if shown else ""
            wrong = f"exit {ended.status}{at}: {(ended.err.strip().splitlines() or ['?'])[-1]}"
            break
        if killed:
            break  # an event that did not come again: the run is finished and can be compared
        # The first sitting went through: begin again with another point.
        out = world.scratch() / "run"
        sittings = 0
    try:
        if not wrong:
            same(straight, out)
    except AssertionError as difference:
        wrong = (str(difference).splitlines() or ["?"])[0]
    for row in rows:
        print(ROW.format(*row, "same" if not wrong else f"DIFFERS: {wrong}"), flush=True)
    if wrong and not rows:
        print(ROW.format(name, sittings, "", "", wrong), flush=True)
    return killed, wrong


def point(unhurt: Ended, draw: random.Random) -> tuple[str, dict[str, Any]]:
    """Where to kill next: in words, and for the run. Rare kinds of event come as often as common ones."""
    how: dict[str, Any] = {}
    which = ""
    if len(unhurt.statuses) > 1:
        how = {"rank": draw.randint(0, 1), "both": draw.random() < BOTH}
        which = f"process {how['rank']}{' and the other' if how['both'] else ''} "
    if draw.random() < IN_TIME:
        after = draw.uniform(0, unhurt.wall_s)
        return f"{which}after {after:.2f} s", {**how, "after_s": after}
    found = counts(unhurt.other if how.get("rank") else unhurt.events)
    kinds = sorted({kind for kind, _ in found})
    kind = draw.choice(kinds)
    moments = [when for k, when in sorted(found) if k == kind]
    when = draw.choice(moments)
    n = draw.randint(1, found[kind, when])
    shown = f"{which}{when} {kind} {n} of {found[kind, when]}"
    return shown, {**how, "faults": [kill(kind, n, when)]}


if __name__ == "__main__":
    sys.exit(main())
