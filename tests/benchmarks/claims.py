"""Measure what the papers of this field claim: a verdict a row, on one page.

    make claims [QUICK=1] [ONLY="sft-over-base tax-gamma"]
    python tests/benchmarks/claims.py [--quick] [--only ROW …] [--list] [key=value …]

Each row names a claim with its source, what is measured for it, and the rule by which an interval
over seeds becomes a verdict: holds, weaker, does not hold, or cannot be told. Rows are declared in
claims_rows/; most of them call another benchmark of this folder for one seed after another. Those
of a real model need it and its data, and run only where --only names them.

Seeds are shared by as many processes as there are cores (--workers), each with one thread; what
they print is in claims/logs/. A measurement that is finished on a seed is kept (claims/measured/),
with a digest of its settings, and is not run again; one that was interrupted goes on with what its
stages have finished. Writes claims/index.html and claims/claims.json, those of --quick in
claims/quick/. `--keep` also writes results/claims.json: the rows that are finished at their
whole size on every seed, and those that it has from earlier runs with the settings and rules of
today. So a whole run may be spread over several nights, and over several machines.
Settings were chosen on seeds 0 to 2, and other benchmarks have shown seeds up to 7, so a whole run
reports 11 to 15. --size micro runs everything with a model of a few thousand parameters, in
minutes, to show that it runs.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from argparse import SUPPRESS, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, not an installed copy

from claims_rows.catalogue import ROWS, SIZES, measurements
from claims_rows.kept import Kept, kept_of, measure, settings_of
from claims_rows.page import Entry, ours_text, page
from claims_rows.row import Measurement, Place, Row, derived, finding_of
from claims_rows.verdicts import FEWEST_SEEDS, NOT_RUN
from sweeps.runner import make_parser, parse_arguments, relative, run_command
from sweeps.text import markdown, with_interval

from pipeline.errors import Interrupted, UserError
from pipeline.stage import StopFlag
from pipeline.store import integrity
from pipeline.store.files import write_json

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def parse(argv: list[str]) -> Namespace:
    """Parse and check the command line."""
    parser = make_parser("claims.py", __doc__, HERE / "results")
    parser.set_defaults(config=None)
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds to run, in place of those of the size")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows to run (--list names them); the page shows all")
    parser.add_argument("--list", action="store_true", help="list the rows, and run nothing")
    parser.add_argument(
        "--published", action="store_true", help="print results/claims.json as tests/README.md has it, and run nothing"
    )
    parser.add_argument("--size", choices=list(SIZES), default="whole", help="how large everything is")
    parser.add_argument("--quick", action="store_true", help="the same as --size quick: two seeds, smaller sizes")
    parser.add_argument("--out", default="claims", type=Path, metavar="DIR", help="folder of the page")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that share the seeds"
    )
    parser.add_argument("--measure-only", action="store_true", help="write no page")
    parser.add_argument(
        "--share-of-seeds", action="store_true", help=SUPPRESS
    )  # --seeds is a process's share of the size's
    parser.add_argument(
        "--keep",
        action="store_true",
        help="also write results/claims.json: rows finished at their whole size, beside those of earlier runs",
    )
    args = parse_arguments(parser, argv)
    args.size = "quick" if args.quick else args.size
    args.rows = chosen(args.only, args.size)
    args.artifacts = str(Path(args.artifacts).resolve())
    args.own_seeds = bool(args.seeds) and not args.share_of_seeds
    args.seeds = tuple(dict.fromkeys(args.seeds or SIZES[args.size].seeds))
    args.folder = args.out / {"whole": ""}.get(args.size, args.size)
    args.config = str(Path(args.config).resolve()) if args.config else None
    if args.config and not Path(args.config).is_file():
        raise UserError(f"{args.config}: no such file")
    if args.keep and (args.size != "whole" or args.config or args.overrides or len(args.seeds) < FEWEST_SEEDS):
        raise UserError(
            f"command line: --keep publishes rows at their whole size with {FEWEST_SEEDS} seeds or more; "
            "leave out --quick, --size, -c and settings"
        )
    return args


def chosen(only: Sequence[str] | None, size: str) -> list[Row]:
    """Return the rows with these names, in the order of the page.

    Args:
        only: The names. None: every row, but those that need a real model and its data; these need
            neither at the size micro.
        size: The size of the run.
    """
    known = [row.key for row in ROWS]
    if unknown := [name for name in only or [] if name not in known]:
        raise UserError(f"command line: --only {unknown[0]}: no such row; rows are {', '.join(known)}")
    if only is None:
        return [row for row in ROWS if size == "micro" or row.measurement.micro is None]
    return [row for row in ROWS if row.key in only]


def run(argv: list[str], stop: StopFlag) -> None:
    """Measure what is not finished, then write the page and the JSON file."""
    args = parse(argv)
    if args.list:
        listed = args.rows if args.only else ROWS
        print(markdown(["row", "claim", "source"], [[row.key, row.claim, row.source] for row in listed]))
        return
    if args.published:
        if not (rows := published_rows(args)):
            raise UserError(f"{relative(published_file(args))}: no such file; `claims.py --keep` writes it")
        print(published_table(rows))
        return
    entries: list[Entry] = []
    try:
        if args.workers > 1 and len(args.seeds) > 1:
            measure_in_processes(args, argv, stop)
        else:
            measure_here(args, stop)
    finally:
        if not args.measure_only:
            entries = [entry_of(args, row) for row in ROWS]
            write(args, entries)
    asked = [entry for entry in entries if entry.row in args.rows]
    if failed := {entry.row.measurement.key: entry.failed for entry in asked if entry.failed}:
        raise UserError([f"{key}, {message}" for key, message in failed.items()])


def measure_here(args: Namespace, stop: StopFlag) -> None:
    """Measure on every seed what is not finished.

    What fails is kept as failed, and the rest goes on.

    Raises:
        Interrupted: A signal came; the next run goes on from there.
    """
    for measurement in measurements(args.rows):
        place, settings = place_of(args, stop, measurement), measurement.settings[args.size]
        for seed, kept in files_of(args, place, measurement).items():
            if kept.finished() is not None:
                continue
            print(f"claims: {measurement.key} ({measurement.what}), seed {seed}", file=sys.stderr, flush=True)
            try:
                measure(kept, lambda m=measurement, p=place, s=seed, own=settings: m.run(p, s, own))
            except Interrupted:
                raise
            except Exception:  # one row must not cost a night; the page and the exit code tell
                print(f"claims: {measurement.key}, seed {seed}: not measured:", file=sys.stderr)
                traceback.print_exc()
            if stop.requested:
                raise Interrupted()


def measure_in_processes(args: Namespace, argv: list[str], stop: StopFlag) -> None:
    """Measure the seeds in several processes of this program, each with a share of them.

    Args:
        args: The command line.
        argv: Its words.
        stop: Set by a signal.

    Raises:
        Interrupted: A signal came; it is passed on, and the next run goes on from there.
        UserError: A process ended by what is not the fault of a row.
    """
    folder, environment = args.folder / "logs", os.environ | {"OMP_NUM_THREADS": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    processes: dict[Path, subprocess.Popen] = {}
    for i in range(min(args.workers, len(args.seeds))):
        seeds = [str(seed) for seed in args.seeds[i :: args.workers]]
        log = folder / f"seeds-{'-'.join(seeds)}.log"
        words = [word for word in argv if word != "--keep"]
        words += [] if args.own_seeds else ["--share-of-seeds"]
        command = [sys.executable, __file__, *words, "--workers", "1", "--measure-only", "--seeds", *seeds]
        print(f"claims: seeds {' '.join(seeds)}: {relative(log)}", file=sys.stderr, flush=True)
        with log.open("a", encoding="utf-8") as file:
            # A session of its own: a signal of the terminal comes once, from here.
            options = {"stdout": file, "stderr": subprocess.STDOUT, "env": environment, "start_new_session": True}
            processes[log] = subprocess.Popen(command, **options)
    told = False
    while any(process.poll() is None for process in processes.values()):
        if stop.requested and not told:
            told = True
            for process in processes.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.2)
    if stop.requested:
        raise Interrupted()
    wrong = [
        f"{relative(log)}: ended with exit code {one.returncode}" for log, one in processes.items() if one.returncode
    ]
    if wrong:
        raise UserError(wrong)


def place_of(args: Namespace, stop: StopFlag, measurement: Measurement) -> Place:
    """Write the config that a measurement runs with, and return where it runs."""
    size = SIZES[args.size]
    base = Place(size.name, args.config or str(ROOT / size.config), args.artifacts, args.folder / "lines", stop)
    if measurement.config is None:
        return derived(base, size.name, [*size.settings, *args.overrides])
    if args.size == "micro" and measurement.micro is not None:
        settings = [*size.settings, *measurement.micro, *args.overrides]
        return derived(base, f"{size.name}-{measurement.key}", settings)
    own = Place(size.name, str(ROOT / measurement.config), args.artifacts, base.lines, stop)
    return derived(own, f"{size.name}-{measurement.key}", args.overrides)


def files_of(args: Namespace, place: Place, measurement: Measurement) -> dict[int, Kept]:
    """Return the file of a measurement on each seed; `place` is where it runs."""
    settings, seeds = measurement.settings[args.size], seeds_of(args, measurement)
    return {seed: kept_of(args.folder / "measured", measurement, place, seed, settings) for seed in seeds}


def seeds_of(args: Namespace, measurement: Measurement) -> list[int]:
    """Return the seeds that a measurement runs on: those asked for, or as many as are enough."""
    spared = SIZES[args.size].seeds[measurement.seeds :] if measurement.seeds and not args.own_seeds else ()
    return [seed for seed in args.seeds if seed not in spared]


def fewest_seeds(measurement: Measurement) -> int:
    """Return the number of seeds below which a verdict on a measurement is marked as quick."""
    return min(FEWEST_SEEDS, measurement.seeds or FEWEST_SEEDS)


def entry_of(args: Namespace, row: Row) -> Entry:
    """Return a row with what was found for it.

    Settings of the command line are for the rows that it asks for: others show what was found
    without them.
    """
    if row not in args.rows:
        args = Namespace(**vars(args) | {"overrides": []})
    place = place_of(args, StopFlag(), row.measurement)
    files = files_of(args, place, row.measurement)
    kept = {seed: record for seed, file in files.items() if (record := file.read()) is not None}
    records = {seed: record for seed, record in kept.items() if record["found"] is not None}
    failed = [f"seed {seed}: {record['failed']}" for seed, record in kept.items() if record["failed"]]
    observed = {seed: record["found"] for seed, record in records.items()}
    return Entry(
        row=row,
        finding=finding_of(row, observed),
        plots=[replace(plot, name=f"{row.key}-{plot.name}") for plot in row.plots(observed)] if observed else [],
        quick=args.size != "whole" or len(records) < fewest_seeds(row.measurement),
        command=command_of(args, row),
        minutes=sum(record["seconds"] for record in records.values()) / 60 if records else None,
        commit=", ".join(dict.fromkeys(record["commit"] or "unknown" for record in records.values())),
        date=max((record["date"] for record in records.values()), default=""),
        failed="; ".join(failed),
        digest=digest_of(args, place, row.measurement, list(records)),
    )


def command_of(args: Namespace, row: Row) -> str:
    """Return the command that makes a row alone, as this run does."""
    if args.size == "micro":
        words = ["python", "tests/benchmarks/claims.py", "--size", "micro", "--only", row.key]
    else:
        words = ["make", "claims", f"ONLY={row.key}", *(["QUICK=1"] if args.size == "quick" else [])]
    if args.config:
        words += ["-c", args.config] if args.size == "micro" else [f"CONFIG={args.config}"]
    return shlex.join([*words, *args.overrides])


def write(args: Namespace, entries: Sequence[Entry]) -> None:
    """Write the page and the JSON file of all rows, and print the verdicts of those asked for."""
    args.folder.mkdir(parents=True, exist_ok=True)
    dates = sorted(entry.date for entry in entries if entry.date)
    meta = f"size: {args.size}, seeds {' '.join(map(str, args.seeds))}" + (f", {dates[-1]}" if dates else "")
    (args.folder / "index.html").write_text(page(meta, entries), encoding="utf-8")
    write_json(args.folder / "claims.json", [as_row(entry) for entry in entries])
    lines = []
    for entry in [entry for entry in entries if entry.row in args.rows]:
        mark = " (quick)" if entry.quick and entry.finding["verdict"] != NOT_RUN else ""
        lines.append([entry.row.key, ours_text(entry), f"{entry.finding['verdict']}{mark}"])
    print(markdown(["row", "ours, 95 % interval", "verdict"], lines))
    print(f"\npage: {relative(args.folder / 'index.html')}")
    if args.keep:
        print(keep(args, entries))


def keep(args: Namespace, entries: Sequence[Entry]) -> str:
    """Publish the rows that are finished at their whole size; leave what earlier runs published.

    An earlier row stays where this run has not finished it, if it was measured with the settings of
    today and judged by the rules of today. Otherwise it is taken out, and named.

    Args:
        args: The command line.
        entries: All rows, with what was found for them.

    Returns:
        Lines that say what was done.
    """
    earlier = {row["row"]: row for row in published_rows(args) if row["verdict"] != NOT_RUN}
    rows, finished, stay = [], set(), set()
    for entry in entries:
        row, before = entry.row, earlier.get(entry.row.key)
        if not entry.quick and not entry.failed:
            rows.append(as_row(entry))
            finished.add(row.key)
        elif before is not None and is_of_today(args, row, before):
            rows.append(before | {"claim": row.claim, "source": row.source, "paper": row.paper, "note": row.note})
            stay.add(row.key)
        else:
            rows.append(as_row(unfinished(entry)))
    counted = f"{len(finished)} of {len(entries)} rows are finished"
    counted += f", {len(stay)} stay from earlier runs" if stay else ""
    if not finished:
        return f"nothing kept: {counted}"
    write_json(published_file(args), rows)
    gone = sorted(set(earlier) - finished - stay)
    lines = [f"kept: {relative(published_file(args))} ({counted})"]
    lines += [f"taken out, as their settings or rules are no longer today's: {', '.join(gone)}"] if gone else []
    return "\n".join(lines)


def published_file(args: Namespace) -> Path:
    """Return the file of published rows."""
    return args.results / "claims.json"


def published_rows(args: Namespace) -> list[dict]:
    """Return the published rows; none if there is no file of them."""
    file = published_file(args)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def is_of_today(args: Namespace, row: Row, published: dict) -> bool:
    """Return whether a published row has today's settings on its seeds, and today's rules."""
    rules = [(figure["name"], figure["rule"]) for figure in finding_of(row, {})["figures"]]
    same_rules = [(figure["name"], figure["rule"]) for figure in published["figures"]] == rules
    if not same_rules:
        return False
    place = place_of(args, StopFlag(), row.measurement)
    return published["digest"] == digest_of(args, place, row.measurement, published["seeds"])


def digest_of(args: Namespace, place: Place, measurement: Measurement, seeds: Sequence[int]) -> str:
    """Return a digest of what decides a measurement on some seeds, but for the content of data."""
    own = measurement.settings[args.size]
    return integrity.sha256_json([settings_of(measurement, place, seed, own) for seed in seeds])


def published_table(rows: Sequence[dict]) -> str:
    """Return the table of published rows that have a verdict, in Markdown.

    Args:
        rows: The rows of claims.json.
    """
    lines = [["claim", "source", "ours, 95 % interval over seeds", "verdict"], ["---"] * 4]
    for row in rows:
        main = row["figures"][0]
        ours = "not defined" if main["value"] is None else f"{main['name']}: {with_interval(main, main['digits'])}"
        if row["verdict"] != NOT_RUN:
            lines.append([f"{row['claim']} (`{row['row']}`)", row["source"], ours, f"**{row['verdict']}**"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def unfinished(entry: Entry) -> Entry:
    """Return a row as one that has not run: what a part of its seeds gave is no result."""
    return replace(entry, finding=finding_of(entry.row, {}), plots=[], minutes=None, commit="", date="")


def as_row(entry: Entry) -> dict:
    """Return a row of claims.json."""
    row, main = entry.row, entry.finding["figures"][0]
    return {
        "row": row.key,
        "claim": row.claim,
        "source": row.source,
        "paper": row.paper,
        "figure": main["name"],
        "ours": main["value"],
        "ci95": main["ci95"],
        "seeds": entry.finding["seeds"],
        "verdict": entry.finding["verdict"],
        "rule": main["rule"],
        "quick": entry.quick,
        "command": entry.command,
        "minutes": None if entry.minutes is None else round(entry.minutes, 1),
        "commit": entry.commit or None,
        "date": entry.date or None,
        "digest": entry.digest,
        "note": row.note,
        "figures": entry.finding["figures"],
    }


if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
