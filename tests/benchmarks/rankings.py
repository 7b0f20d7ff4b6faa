"""What whole rankings are worth: reward models from K = 9 against one pair a prompt, and DPO from orders against pairs.

    python tests/benchmarks/rankings.py [-c configs/tiny.yaml] [--seeds 0 1 2] [--pairs 2880] [key=value …]

Reward models: `--pairs` prompts with one judged pair each; K = 9 on so many prompts that the judged pairs are as many
(equal labels: a 36th of the prompts); and K = 9 on so many that a pass over them computes as many tokens (equal
compute). One labeler a prompt. A reward model is judged by how often its score orders two SFT samples of an evaluation
prompt as gold does, and by the gold of the best of 16 that it picks.
Policies: DPO on all pairs of a ranking, DPO by Plackett–Luce on its whole order, and PPO-ptx, all from the chain of
demo_seeds (NAME-seed0 …), by how often a sample's gold beats that of an SFT sample of the same prompt.

Intervals are over prompts; differences are taken on the same prompts. Leaves tables, a page (artifacts/NAME.rankings/
index.html) and a JSON line a variant and seed in results/rankings.jsonl; experiments are in
artifacts/NAME-seed0.rankings/ …. On configs/tiny.yaml and two cores: about five minutes a seed, and four more for each
seed whose chain is not there yet. Run it again to go on where it was stopped.
"""

import re
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))  # the code beside this file, wherever another copy is installed

from sweeps.beside import Workshop, command, options, parsed, relative, sampling, show  # noqa: E402
from sweeps.estimates import best_of, difference, gold_order, mean_ci, wins  # noqa: E402
from sweeps.page import page  # noqa: E402
from sweeps.points import keep, provenance, samples_of  # noqa: E402

from data.encode import encode_prompt, encode_response  # noqa: E402
from data.sources import load  # noqa: E402
from pipeline.artifacts import ArtifactStore  # noqa: E402
from pipeline.errors import UserError  # noqa: E402
from pipeline.running import duration  # noqa: E402
from pipeline.stage import StopFlag  # noqa: E402
from stages.models.loading import load_tokenizer  # noqa: E402
from stages.report import fixed  # noqa: E402
from stages.report_svg import Figure, dot_plot  # noqa: E402

K = 9
PAIRS_OF_K = K * (K - 1) // 2
SAMPLES = 16
ORDERED, WINS = "ordered as gold", "gold wins against SFT"
MODELS = ("one pair a prompt", "K = 9, equal labels", "K = 9, equal compute")
POLICIES = {  # name: (stage, settings)
    "DPO, pairs": ("dpo", []),
    "DPO, Plackett–Luce": ("dpo", ["dpo.loss_type=plackett_luce"]),
    "PPO-ptx": ("ppo", []),
}


def run(argv: list[str], stop: StopFlag) -> None:
    parser = options("rankings.py", __doc__, HERE / "results")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="a chain each")
    parser.add_argument("--pairs", type=int, default=80 * PAIRS_OF_K, metavar="N", help=f"a multiple of {PAIRS_OF_K}")
    asked, began = parsed(parser, argv), time.monotonic()
    if asked.pairs % PAIRS_OF_K:
        raise UserError(f"command line: --pairs {asked.pairs}; should be a multiple of {PAIRS_OF_K}")
    shop = Workshop(asked.config, asked.overrides, stop)
    first = shop.open()
    if first.data.rankings is not None or first.data.evaluation_prompts != "world":
        raise UserError("data: the comparison needs the embedded world's labelers and gold (data.rankings: null)")
    if asked.pairs > first.world.prompts:
        raise UserError(f"command line: --pairs {asked.pairs}; the world has {first.world.prompts} prompts")
    found: dict[str, list[tuple[dict, dict, dict]]] = {}  # name → (samples, SFT's samples, manifest), a seed each
    for seed in dict.fromkeys(asked.seeds):
        names = [f"seed={seed}", f"name={first.name}-seed{seed}"]
        chain = shop.load(*names)
        main = ArtifactStore(asked.artifacts, chain.name)
        shop.say(f"\nrankings, seed {seed}: the chain ({duration(time.monotonic() - began)} so far)")
        shop.bring(chain, main, "ppo", "dpo")

        def bring(name: str, policy: str, settings: list[str], seed=seed, names=names, chain=chain, main=main):
            """The experiment of a variant, and the samples in it."""
            shop.say(f"\nrankings, seed {seed}: {name} ({duration(time.monotonic() - began)} so far)")
            short = re.sub("[^a-z0-9]+", "-", name.lower())
            beside = shop.load(*names, f"name={short}", *settings, *sampling(first, policy, SAMPLES))
            store = ArtifactStore(Path(asked.artifacts) / f"{chain.name}.rankings", short)
            shop.bring_beside(beside, store, "samples", main)
            return store, samples_of(store)

        _, sft = bring("SFT", "sft", [])
        sizes = {MODELS[0]: asked.pairs, MODELS[1]: asked.pairs // PAIRS_OF_K}
        for name in MODELS:
            store, samples = bring(name, "sft", judged(sizes[name], 2 if name == MODELS[0] else K))
            found.setdefault(name, []).append((samples, sft, store.manifest("rm") | {"prompts": sizes[name]}))
            if name == MODELS[0]:
                sizes[MODELS[2]] = round(asked.pairs * tokens_share(store, main.folder("sft") / "model"))
        for name, (policy, settings) in POLICIES.items():
            store, samples = bring(name, policy, settings)
            found.setdefault(name, []).append((samples, sft, store.manifest(policy)))

    rows = [line(first.name, asked, name, seed, *one) for name in found
            for seed, one in zip(dict.fromkeys(asked.seeds), found[name], strict=True)]  # fmt: skip
    keep(asked.results / "rankings.jsonl", rows, lambda row: (row["experiment"], row["variant"], row["seed"]))
    seeds = " ".join(map(str, dict.fromkeys(asked.seeds)))
    tables = [table(found, MODELS, reward_model_figures), table(found, tuple(POLICIES), policy_figures)]
    for what, one in zip(("reward models", "policies"), tables, strict=True):
        show(shop.console, f"{first.name}, seeds {seeds}: {what}", *one)
    sentences = verdicts(found)
    for text in sentences:
        shop.say(text)
    file = Path(asked.artifacts) / f"{first.name}.rankings" / "index.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    title = f"{first.name}: what whole rankings are worth"
    meta = f"{asked.config}, seeds {seeds}, {max(row['date'] for row in rows)}"
    file.write_text(page(title, meta, sentences, pictures(found), tables), encoding="utf-8")
    shop.say(f"\nlines: {relative(asked.results / 'rankings.jsonl')}")
    shop.say(f"picture: {file} ({duration(time.monotonic() - began)})")


def judged(prompts: int, k: int) -> list[str]:
    """Settings: so many prompts with K responses, one labeler each; steps of about as many tokens."""
    size = {2: 8, K: 2}[k]
    return [
        f"rankings.num_prompts={prompts}",
        f"rankings.samples_per_prompt={k}",
        "rankings.labelers_per_prompt=1",
        f"rm.per_device_train_batch_size={size}",
    ]


def tokens_share(store: ArtifactStore, tokenizer_folder: Path) -> float:
    """(P + 2R) / (P + 9R) by the mean lengths of the pairs' own prompts and responses."""
    tokenizer = load_tokenizer(tokenizer_folder)
    rows = load("rankings", path=store.folder("rankings") / "train.jsonl", limit=500)
    prompt = np.mean([len(encode_prompt(tokenizer, row.prompt)) for row in rows])
    response = np.mean([len(encode_response(tokenizer, text)) for row in rows for text in row.responses])
    return float((prompt + 2 * response) / (prompt + K * response))


def reward_model_figures(samples: dict, _) -> dict[str, np.ndarray]:
    """A number a prompt (NaN: none): how often two SFT samples are ordered as by gold, and the best of 16's gold."""
    scores, gold = np.array(samples["scores"]), np.array(samples["gold"])
    return {ORDERED: gold_order(scores, gold), f"gold of best of {SAMPLES}": best_of(scores, gold, SAMPLES)}


def policy_figures(samples: dict, sft: dict) -> dict[str, np.ndarray]:
    """A number a prompt: how often gold beats SFT's, gold, and KL to SFT in nats a response."""
    gold = np.array(samples["gold"])
    return {
        WINS: wins(gold, np.array(sft["gold"])),
        "gold": gold.mean(1),
        "KL to SFT": np.array(samples["kl"]).mean(1),
    }


def line(experiment: str, asked, name: str, seed: int, samples: dict, sft: dict, manifest: dict) -> dict:
    figures = (reward_model_figures if name in MODELS else policy_figures)(samples, sft)
    means = {key: known(each) for key, each in figures.items()}
    return {
        "bench": "rankings",
        "experiment": experiment,
        "variant": name,
        "seed": seed,
        **{key: {"value": float(x.mean()), "ci95": mean_ci(x, seed), "prompts": len(x)} for key, x in means.items()},
        "accuracy_on_labels": manifest["metrics"].get("accuracy"),
        "ranked_prompts": manifest.get("prompts"),
        "overrides": asked.overrides,
        **provenance(manifest),
    }


def known(each: np.ndarray) -> np.ndarray:
    return each[~np.isnan(each)]


def table(found: dict, names: tuple[str, ...], figures) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: means over the prompts of all seeds with 95 % intervals, and the range over seeds."""
    rows, headings = [], ["variant"]
    for name in names:
        cells = [name]
        each = [figures(samples, sft) for samples, sft, _ in found[name]]
        for key in each[0]:
            by_seed = [known(one[key]) for one in each]
            of_all, means = np.concatenate(by_seed), [float(x.mean()) for x in by_seed]
            low, high = mean_ci(of_all, 0)
            cells.append(f"{fixed(of_all.mean(), 3)} ({fixed(low, 3)} to {fixed(high, 3)})")
            cells.append(f"{fixed(min(means), 3)} to {fixed(max(means), 3)}")
        headings = ["variant", *[h for key in each[0] for h in (key, "over seeds")]]
        rows.append(cells)
    return headings, rows


def every(found: dict, name: str, figures, key: str) -> np.ndarray:
    """The figure of each prompt of each seed, one after the other; NaN where a prompt has none."""
    return np.concatenate([figures(samples, sft)[key] for samples, sft, _ in found[name]])


def verdicts(found: dict) -> list[str]:
    """A sentence a comparison: the difference on the same prompts, with its interval."""
    models = lambda name: every(found, name, reward_model_figures, ORDERED)  # noqa: E731
    policies = lambda name: every(found, name, policy_figures, WINS)  # noqa: E731
    pairs, whole, ppo = POLICIES
    says = "orders {} often as gold does than one pair a prompt".format
    wins_by = lambda than: (lambda more: f"wins {more} often against SFT than {than}")  # noqa: E731
    return [
        *(compared(name, models(name), models(MODELS[0]), says) for name in MODELS[1:]),
        *(compared(name, policies(name), policies(pairs), wins_by(pairs)) for name in (whole, ppo)),
        compared(ppo, policies(ppo), policies(whole), wins_by(whole)),
    ]


def compared(name: str, ours: np.ndarray, theirs: np.ndarray, says) -> str:
    both = ~np.isnan(ours) & ~np.isnan(theirs)
    gap = difference(ours[both], theirs[both], 0)
    low, high = gap["ci95"]
    verdict = "" if low > 0 or high < 0 else ": no clear difference"
    more = f"{fixed(abs(gap['value']), 3)} {'less' if gap['value'] < 0 else 'more'}"
    return f"{name} {says(more)} (95 % interval {fixed(low, 3)} to {fixed(high, 3)}){verdict}."


def pictures(found: dict) -> list[Figure]:
    """A dot with its interval a variant: reward models by their order, policies by their win rate."""
    plots = []
    for names, figures, key, title, tones, caption in (
        (
            MODELS,
            reward_model_figures,
            ORDERED,
            "Reward models",
            ("rm",) * len(MODELS),
            "How often the score orders two SFT samples of a held-out prompt as gold does.",
        ),
        (
            tuple(POLICIES),
            policy_figures,
            WINS,
            "Policies",
            [stage for stage, _ in POLICIES.values()],
            "How often gold prefers a sample to one of SFT's for the same held-out prompt, ties half.",
        ),
    ):
        rows = []
        for name, tone in zip(names, tones, strict=True):
            values = known(every(found, name, figures, key))
            rows.append((name, [(values.mean(), *mean_ci(values, 0), tone, f"{values.mean():.3f}")]))
        note = " Bars: 95 % intervals over the prompts of all seeds; one that crosses the dashed line could be chance."
        plots.append(Figure(title, dot_plot(rows, key, title, reference=0.5), caption + note))
    return plots


if __name__ == "__main__":
    sys.exit(command(run, sys.argv[1:]))
