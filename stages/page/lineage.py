"""Show which artifact was made from which."""

from stages.page.manifests import Manifest, commit_of, common_versions, ordered, seconds_of
from stages.page.numbers import NONE, duration, fixed, moment
from stages.page.plot import Graph, Plot
from stages.page.table import Cell, Table


def lineage_table(manifests: dict[str, Manifest], taken: dict[str, str]) -> Table:
    """Return a row for each stage: inputs, time, size and code.

    Args:
        manifests: Stage → its manifest.
        taken: Stage → the experiment that it was taken from, of those that were.
    """
    common = common_versions(manifests)
    rows = [row_of(stage, manifest, common, taken.get(stage)) for stage, manifest in ordered(manifests)]
    head = ("stage", "digest", "made from", "finished", "took", "size", "seed", "code", "differs in")
    if all(row[-1].text == NONE for row in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return Table("Lineage of the artifacts", head, tuple(rows), frozenset({0, 1, 2, 7, 8}))


def row_of(stage: str, manifest: Manifest, common: dict[str, str], source: str | None) -> tuple[Cell, ...]:
    """Return the row of a stage.

    Args:
        stage: The stage.
        manifest: Its manifest.
        common: The library versions that all stages share; others are listed.
        source: The experiment that the stage was taken from; None if it was made here.
    """
    differences = [f"{name} {version}" for name, version in manifest["versions"].items() if common.get(name) != version]
    overridden = (manifest.get("config") or {}).get("overridden", {})
    differences += [f"{key} overridden" for key in sorted(overridden)]
    inputs = ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(manifest["inputs"].items()))
    megabytes = sum(file["bytes"] for file in manifest["outputs"].values()) / 1e6
    resumes = f"{manifest['resumes']} × resumed" if manifest["resumes"] else ""
    return (
        Cell(stage, f"from {source}" if source else ""),
        Cell(manifest["digest"][:12], code=True),
        Cell(inputs or NONE, code=True),
        Cell(moment(manifest["finished_at"])),
        Cell(duration(seconds_of(manifest)), resumes),
        Cell(f"{fixed(megabytes, 1)} MB"),
        Cell(str(manifest["seed"])),
        Cell(commit_of(manifest, 7).removeprefix("git ") or NONE),
        Cell(", ".join(differences) or NONE),
    )


def lineage_plot(manifests: dict[str, Manifest]) -> Plot:
    """Return the lineage as boxes and arrows, the page itself last."""
    edges = nearest_inputs(manifests)
    needed = {source for sources in edges.values() for source in sources}
    nodes = {stage: (manifests[stage]["digest"][:12], stage) for stage in edges}
    nodes["report"] = ("this page", "soft")
    edges["report"] = {stage for stage in edges if stage not in needed}
    caption = "Each stage with its nearest inputs."
    return Plot("lineage", "Lineage of the artifacts", caption, Graph(nodes, edges))


def nearest_inputs(manifests: dict[str, Manifest]) -> dict[str, set[str]]:
    """Return stage → its inputs, without those that another of its inputs already depends on."""
    stages = [stage for stage, _ in ordered(manifests)]
    inputs = {stage: {name for name in manifests[stage]["inputs"] if name in stages} for stage in stages}
    upstream: dict[str, set[str]] = {}
    for stage in stages:
        upstream[stage] = inputs[stage].union(*(upstream[name] for name in inputs[stage]))
    return {
        stage: {name for name in inputs[stage] if not any(name in upstream[other] for other in inputs[stage])}
        for stage in stages
    }
