"""Row of resuming: a PPO run that is killed many times publishes the bytes of one that was not."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from claims_rows.chain import finished_chain
from claims_rows.pictures import steps
from claims_rows.row import Figure, Measurement, Observed, Place, Row
from claims_rows.verdicts import Rule
from pipeline.errors import Interrupted, UserError
from pipeline.store.artifacts import ArtifactStore
from stages.page.plot import Plot

ROOT = Path(__file__).resolve().parents[3]


def run(place: Place, seed: int, settings: dict) -> dict:
    """Run PPO once without and once with kills, and compare what the two publish.

    A run is killed (SIGKILL) when its journal has a drawn number of rows and it has itself changed
    the journal, so that each kill lands in training. Starts of the process count as cost.
    """
    chain = finished_chain(place, seed, "rm")
    total = settings["updates"]
    draw = random.Random(seed)
    folder, name = Path(place.artifacts) / f"{chain.base.name}.killed", chain.base.name
    whole, killed = (ArtifactStore(folder / side, name) for side in ("whole", "killed"))  # model cards name it
    for store in (whole, killed):  # what an interrupted measurement left is not of this one's kills
        shutil.rmtree(store.folder("ppo"), ignore_errors=True)
    finished_chain(place, seed, "rm", whole, killed)
    words = [f"ppo.total_episodes={total * settings['batch']}", f"ppo.batch_size={settings['batch']}"]
    words += [f"checkpoints.every={settings['every']}", f"seed={seed}"]
    seconds, _ = until_done(place, whole, words, [])
    targets = sorted(draw.sample(range(1, total), settings["kills"]))
    killed_seconds, kills = until_done(place, killed, words, targets)
    same = published(whole) == published(killed)
    return {
        "same": float(same),
        "kills": kills,
        "planned": len(targets),
        "seconds": seconds,
        "killed_seconds": killed_seconds,
    }


def until_done(place: Place, store: ArtifactStore, words: list[str], targets: list[int]) -> tuple[float, int]:
    """Run PPO until it has succeeded; return the seconds, and how often it was killed.

    Args:
        place: Its config.
        store: Its artifacts.
        words: Its settings.
        targets: Rows of the journal at which it is killed, one kill each.
    """
    from sweeps.runner import rlhf_words

    command = rlhf_words("ppo", place.config, str(store.base.parent), store.base.name, words)
    journal, kills, waiting = store.folder("ppo") / "metrics.jsonl", 0, list(targets)
    began = time.monotonic()
    while True:
        found = stamp_of(journal)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if place.stop.requested:
                process.terminate()
                process.wait()
                raise Interrupted()
            if waiting and stamp_of(journal) != found and rows_of(journal) >= waiting[0]:
                process.kill()
                process.wait()
                waiting.pop(0)
                kills += 1
                break
            time.sleep(0.02)
        else:
            if process.returncode:
                raise UserError(f"{store.base.name}: ppo ended with exit code {process.returncode}; see above")
            return time.monotonic() - began, kills


def stamp_of(journal: Path) -> int:
    """Return when a file was last written, in ns; 0 if there is none."""
    return journal.stat().st_mtime_ns if journal.is_file() else 0


def rows_of(journal: Path) -> int:
    """Return the number of whole rows in a file of JSON lines; 0 if there is none."""
    return journal.read_bytes().count(b"\n") if journal.is_file() else 0


def published(store: ArtifactStore) -> dict:
    """Return what the fault matrix compares: the digest of each file, the journal without rates."""
    sys.path.insert(0, str(ROOT / "tests" / "resume"))
    from faults import published as of_folder

    return of_folder(store.folder("ppo"))


MEASUREMENT = Measurement(
    "killed",
    "PPO with and without kills",
    run,
    {
        "whole": {"updates": 50, "batch": 64, "every": 2, "kills": 20},
        "quick": {"updates": 20, "batch": 64, "every": 2, "kills": 5},
        "micro": {"updates": 8, "batch": 8, "every": 2, "kills": 2},
    },
    version=2,
)


def plots(observed: Observed) -> list[Plot]:
    """Return the seconds of both runs."""
    names = [
        ("not killed", "sft", lambda found: found["seconds"]),
        ("killed", "ppo", lambda found: found["killed_seconds"]),
    ]
    kills = ", ".join(str(found["kills"]) for found in observed.values())
    text = f"Kills on each seed: {kills}. Each start imports the libraries anew."
    return [steps("killed", "Seconds until PPO is done", "seconds", names, observed, caption=text)]


ROWS = (
    Row(
        "killed-run-equals-whole",
        "Resuming",
        "A PPO run that is killed twenty times publishes the same bytes as one that is not.",
        "This project; no paper",
        "Ours to show.",
        MEASUREMENT,
        (
            Figure("share of seeds with equal bytes", lambda found: found["same"], Rule("exactly", than=1), 0),
            Figure(
                "share of the planned kills that struck",
                lambda found: found["kills"] / found["planned"],
                Rule("exactly", than=1),
                2,
            ),
        ),
        plots,
        "Not a claim of chance: one seed with other bytes would refute it. Kills come at twenty updates of fifty, "
        "drawn for each seed. Rates (episodes a second) are not compared.",
    ),
)
