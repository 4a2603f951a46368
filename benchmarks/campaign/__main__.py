"""Attack medgen with kills, faults, hostile files and hostile requests; print what was lost: nothing, it promises.

python -m benchmarks.campaign --minutes 60 --seed 0
python -m benchmarks.campaign --only kills --seed 0 --round 7    one round again

Rounds of all scenarios take turns until the time is over. Each has its own random numbers, of the seed, the scenario
and the round. After each, invariants are checked: the same bytes as a run without faults, every metric point once, no
half-written file, no process left, no file outside. A round that broke one keeps its folder and log.
"""

import argparse
import os
import random
import shutil
import sys
import time
import traceback
from collections import Counter
from datetime import datetime
from pathlib import Path

from benchmarks.campaign.process import MARK, Violation, check_no_orphans

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("rounds", "kills", "faults", "files", "requests")
KINDS = ("lost", "crashed", "code run", "bytes outside")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.campaign", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="time for all scenarios together")
    parser.add_argument("--rounds", type=int, help="number of rounds of each scenario, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="NAME,...", help="scenarios; default: all")
    parser.add_argument("--round", type=int, help="with --only: this round alone")
    parser.add_argument("--out", type=Path, help="folder of the campaign; default: outputs/campaign-DATE")
    arguments = parser.parse_args()
    out = (arguments.out or ROOT / "outputs" / f"campaign-{datetime.now():%Y%m%d-%H%M%S}").resolve()
    if os.environ.get(MARK) != str(out):
        restart(out)
    from benchmarks.campaign.scenarios import SCENARIOS, unavailable

    names = arguments.only.split(",") if arguments.only else list(SCENARIOS)
    if unknown := set(names) - set(SCENARIOS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; expected some of {', '.join(SCENARIOS)}")
    campaign = Campaign(out, arguments.seed, {name: SCENARIOS[name] for name in names})
    campaign.left_out = {name: reason for name in names if (reason := unavailable(name))}
    try:
        campaign.run(arguments.minutes * 60, arguments.rounds, arguments.round)
    finally:
        campaign.close()
    sys.exit(1 if campaign.violations else 0)


def restart(out: Path) -> None:
    """Start this program again with the campaign's mark, home and temporary folder, and one thread."""
    if out.exists() and any(out.iterdir()):
        sys.exit(f"error: --out {out}: has files; expected a new or empty folder")
    for name in ("home", "tmp"):
        (out / name).mkdir(parents=True, exist_ok=True)
    ours = {MARK: str(out), "HOME": str(out / "home"), "TMPDIR": str(out / "tmp"), "OMP_NUM_THREADS": "1"}
    ours |= {"OMP_WAIT_POLICY": "PASSIVE", "MEDGEN_WEIGHTS": str(out / "home"), "PYTHONFAULTHANDLER": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "XDG", "MPL", "PG"))}
    os.execve(
        sys.executable, [sys.executable, "-m", "benchmarks.campaign", *sys.argv[1:], "--out", str(out)], kept | ours
    )


class Campaign:
    """The rounds, what they counted and what they found."""

    def __init__(self, out: Path, seed: int, scenarios: dict) -> None:
        from benchmarks.campaign.lab import Lab

        self.out, self.seed, self.scenarios = out, seed, scenarios
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in scenarios}
        self.seconds = dict.fromkeys(scenarios, 0.0)
        self.violations: list[str] = []
        self.left_out: dict[str, str] = {}
        self.lab = Lab(out)

    def run(self, seconds: float, rounds: int | None, only: int | None) -> None:
        """Run rounds until the time is over: next the scenario that has had the least."""
        begin = time.monotonic()
        self.lab.make_reference()
        print(f"reference: {time.monotonic() - begin:.0f} s", flush=True)
        names = [name for name in self.scenarios if name not in self.left_out]
        if only is not None or rounds is not None:
            for number in [only] if only is not None else range(rounds or 0):
                for name in names:
                    self.run_round(name, number)
            return
        while names and time.monotonic() - begin < seconds:
            name = min(names, key=lambda each: self.seconds[each])
            self.run_round(name, self.counts[name]["rounds"])

    def run_round(self, name: str, number: int) -> None:
        """Run one round and record a violation."""
        lab, counts = self.lab, self.counts[name]
        for folder in (lab.work, lab.logs, self.out / "tmp"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        lab.counts = Counter()
        outside = self.outside()
        begin = time.monotonic()
        try:
            self.scenarios[name](lab, random.Random(f"{self.seed} {name} {number}"))
            check_no_orphans()
            if new := self.outside() - outside:
                raise Violation("bytes outside", f"outside the project: {', '.join(sorted(new)[:5])}")
        except Exception as error:
            kind = error.kind if isinstance(error, Violation) else "crashed"
            text = str(error) if isinstance(error, Violation) else traceback.format_exc()
            counts[kind] += 1
            self.violations.append(f"{name} {number}: {kind}: {text}")
            kept = self.out / f"{name}-{number}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(lab.logs, kept / "logs")
            shutil.copytree(lab.work, kept / "work", symlinks=True, ignore_dangling_symlinks=True)
            again = f"python -m benchmarks.campaign --only {name} --seed {self.seed} --round {number}"
            print(f"\n{kind}: {text}\n  kept: {kept}\n  again: {again}\n", flush=True)
        finally:
            lab.close()
        self.seconds[name] += time.monotonic() - begin
        counts.update(lab.counts)
        counts["rounds"] += 1
        print(f"{name} {number}: {time.monotonic() - begin:.0f} s, {dict(lab.counts)}", flush=True)
        (self.out / "campaign.md").write_text(self.markdown())

    def outside(self) -> set[str]:
        """Files of the campaign's folder that no command has to change."""
        own = ("work/project/", "work/disk/", "snapshots/", "servers/", "logs/", "tmp/", "home/.")
        return {
            name
            for path in self.out.rglob("*")
            if not path.is_dir() and not (name := path.relative_to(self.out).as_posix()).startswith(own)
        }

    def markdown(self) -> str:
        """One table for docs/results.md."""
        heads = ("scenario", *COLUMNS, *KINDS, "minutes")
        lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        total: Counter[str] = sum(self.counts.values(), Counter())
        for name, counts in [*self.counts.items(), ("all", total)]:
            if name in self.left_out:
                continue
            minutes = sum(self.seconds.values()) if name == "all" else self.seconds[name]
            cells = [f"{counts[column]:,}" for column in (*COLUMNS, *KINDS)]
            lines.append(f"| {name} | {' | '.join(cells)} | {minutes / 60:.1f} |")
        lines += ["", f"Seed {self.seed}."] + [f"Left out: {name}: {reason}." for name, reason in self.left_out.items()]
        lines += [f"\n{found}" for found in self.violations]
        return "\n".join(lines) + "\n"

    def close(self) -> None:
        """Print the table; end the servers, and remove what no violation needs."""
        self.lab.stop()
        print(f"\n{self.markdown()}")
        (self.out / "campaign.md").write_text(self.markdown())
        for name in ("work", "logs", "snapshots", "data", "tmp", "home", "servers"):
            path = self.out / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        print(f"table: {self.out / 'campaign.md'}")


if __name__ == "__main__":
    main()
