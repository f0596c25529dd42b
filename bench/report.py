"""Make tables and plots of the results in bench/results.

    python bench/report.py                         updates README.md and bench/README.md
    python bench/report.py --campaign FOLDER       writes FOLDER/summary.md, the results of a campaign on one page

The newest folder of each device is used. The text between the marks of each README is generated: in that of the project
the means of a few suites and a plot, in that of bench/ the means of all suites, the losses, and the rows of one suite.
With --check nothing is written, and the exit status is 1 if a page differs from its results.
"""

import argparse
import json
import re
import sys
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

from gpuconv.benchmark import compare, plots, report, results
from gpuconv.geometry import DIRECTIONS

HERE = Path(__file__).parent
MARKS = "<!-- made by bench/report.py -->", "<!-- end of what bench/report.py made -->"
PICTURED = "resnet50"
SUMMARISED = "resnet50", "vgg16", "audio1d", "unet3d", "grouped", "mobilenet"


def runs(folder):
    """Return the runs of ``gpuconv bench`` in a folder; suites that a run did not name are removed from its rows."""
    found = []
    for path in sorted(folder.glob("*.json")):
        if "rows" in (document := json.loads(path.read_text())) and document.get("schema") == results.SCHEMA:
            run = results.read_json(path)
            asked = run.command.split()
            run.rows = [
                replace(row, suites=[suite for suite in row.suites if suite in asked] or row.suites) for row in run.rows
            ]
            found.append(run)
    return found


def newest():
    """Return the newest folder of each device with its runs, GPUs first, the newest first."""
    by_device = {}
    for folder in sorted(path for path in (HERE / "results").iterdir() if path.is_dir()):
        if made := runs(folder):
            device = made[0].device
            if device not in by_device or made[0].date > by_device[device][1][0].date:
                by_device[device] = folder, made
    newest_first = sorted(by_device.values(), key=lambda pair: pair[1][0].date, reverse=True)
    return sorted(newest_first, key=lambda pair: is_cpu(pair[1]))


def is_cpu(made):
    return made[0].machine["GPU"] == "none"


def all_rows(made):
    return [row for run in made for row in run.rows]


def about(made):
    """Return a sentence with the device, the date and the versions."""
    first = made[0]
    facts = first.machine
    versions = [f"gpuconv {facts['gpuconv']} (commit {(first.commit or 'unknown')[:7]})", f"NumPy {facts['NumPy']}"]
    versions += [str(facts[name]) for name in facts if name.startswith("peer ")]
    if facts["GPU"] != "none":
        versions += [f"CuPy {facts['CuPy']}", f"driver {facts['nvidia-smi']['driver_version']}"]
    where = first.device if facts["GPU"] != "none" else f"{first.device}, {facts['cores']} cores"
    return f"{where}, {first.date[:10]}: {'; '.join(versions)}."


def project_page(folders):
    """Return the text for the README of the project: a few suites of each GPU and the newest CPU, and a link."""
    parts = []
    cpus = [pair for pair in folders if is_cpu(pair[1])]
    for folder, made in [pair for pair in folders if pair not in cpus[1:]]:
        found = [ratio for run in made for ratio in compare.ratios(run.rows)]
        if not found:
            continue
        wins, losses = (sum(ratio.verdict == verdict for ratio in found) for verdict in ("FAST", "SLOW"))
        parts += [
            f"**{about(made)}** Time of the peer divided by the time of gpuconv, both in the faster of their layouts,"
            " as geometric means over the layers of a suite. Above 1 gpuconv is faster.",
            summary(found).markdown(),
            f"Of all {len(found)} rows gpuconv is faster in {wins} and slower in {losses}; the others do not differ"
            " clearly. [bench/](bench/README.md) has all suites, the losses and the method.",
        ]
        if picture(folder).exists():
            link = picture(folder).relative_to(HERE.parent)
            parts.append(f"![Ratio of times for each layer of {PICTURED} in three directions]({link})")
    if len(cpus) == len(folders):
        parts.append("**No result of a GPU exists yet.** `bench/gpu_campaign.sh` is to measure them.")
    return "\n\n".join(parts)


def summary(found):
    """Return a table of the mean ratio of each of the SUMMARISED suites per direction, in gpuconv's better layout.

    It leaves out float64, which bench/README.md has.
    """
    best = {}
    found = [ratio for ratio in found if ratio.row.dtype != "float64"]
    for ratio in found:
        for suite in ratio.row.suites:
            key = suite, ratio.peer.by, ratio.row.direction, ratio.row.contest
            best[key] = max(best.get(key, 0), ratio.value)
    table = report.Table(["suite", "dtype", "peer", *DIRECTIONS], 3)
    dtypes = {suite: ratio.row.dtype for ratio in found for suite in ratio.row.suites}
    for suite, peer in dict.fromkeys(key[:2] for key in best if key[0] in SUMMARISED):
        means = [
            compare.geometric_mean(value for key, value in best.items() if key[:3] == (suite, peer, direction))
            for direction in DIRECTIONS
        ]
        table.lines.append([suite, dtypes[suite], peer, *(f"{mean:.2f}" for mean in means)])
    return table


def lost(ratio):
    return f"{ratio.row.case} {ratio.row.direction} in {ratio.row.layout} ({ratio.value:.2f} of {ratio.peer.by})"


def bench_page(folders):
    """Return the text for the README of bench/: all suites, the limits, the rows of one suite, links to the others."""
    parts = []
    for folder, made in folders:
        found = [ratio for run in made for ratio in compare.ratios(run.rows)]  # within a run rows are timed alternately
        limit = next(iter(made[0].limits.values()))
        peaks = ", ".join(f"{name} {peak / 1e9:.0f}" for name, peak in limit.peaks.items())
        rows = [row for row in all_rows(made) if PICTURED in row.suites]
        parts += [f"### {made[0].device}", about(made)]
        if found:
            parts += [
                "Time of the peer, in its faster memory format, divided by the time of gpuconv, as geometric means:",
                report.means(found).markdown(),
                "The largest losses: " + "; ".join(lost(ratio) for ratio in report.worst(found)) + ".",
            ]
        parts += [
            f"Limits measured there: a copy {limit.bandwidth / 1e9:.0f} GB/s, matrix products in GFLOP/s: {peaks}.",
            "Rate of gpuconv, in operations of the direct algorithm, divided by the rate of a matrix product of NumPy"
            " or CuPy in the same run, as geometric means. Above 1 fewer operations are done than the direct algorithm"
            " has.",
            report.of_product(made).markdown(),
        ]
        if roofline(folder).exists():
            parts.append(f"![Roofline with the layers of {PICTURED}]({roofline(folder).relative_to(HERE)})")
        only = results.Results(made[0].machine, made[0].limits, rows)
        files = ", ".join(f"[{path.name}]({path.relative_to(HERE)})" for path in sorted(folder.glob("*.json")))
        parts += [
            f"<details><summary>The rows of {PICTURED}</summary>",
            report.table(only).markdown(),
            "</details>",
            f"Every row of every suite, with all samples: {files}.",
            "\n".join(f"- {line}" for line in report.refusals(all_rows(made))),
        ]
    return "\n\n".join(part for part in parts if part)


def picture(folder):
    return plots.paths(folder / f"{PICTURED}.png")[0]


def roofline(folder):
    return plots.paths(folder / f"{PICTURED}.png")[1]


def draw(folder, made):
    """Save the plots of a folder: one dtype, one suite."""
    rows = [row for row in all_rows(made) if PICTURED in row.suites and row.dtype == "float32"]
    if rows:
        only = results.Results(made[0].machine, made[0].limits, rows, date=made[0].date, commit=made[0].commit)
        plots.plot(only, folder / f"{PICTURED}.png")


def with_page(path, page):
    """Return the text of a file with ``page`` between its marks."""
    text = path.read_text()
    pattern = re.escape(MARKS[0]) + ".*?" + re.escape(MARKS[1])
    if not re.search(pattern, text, re.DOTALL):
        sys.exit(f"{path} has no marks for bench/report.py")
    return re.sub(pattern, lambda _: f"{MARKS[0]}\n\n{page}\n\n{MARKS[1]}", text, flags=re.DOTALL)


# ------------------------------------------------------------------------------------------------ one campaign


def campaign(folder):
    """Return a page with the results of a campaign, and with what it did not reach."""
    parts = [f"# Campaign {folder.name}", *_tests(folder), *_sanitizer(folder), *_golden(folder), *_micro(folder)]
    for name in ("first.json", "rest.json"):
        if not (folder / name).exists():
            parts.append(f"**{name} was not reached.**")
            continue
        run = results.read_json(folder / name)
        found = compare.ratios(run.rows)
        wrong = [row for row in run.rows if row.wrong]
        parts += [
            f"## {name}: {len(run.rows)} rows, {len(wrong)} wrong; {about([run])}",
            *(f"- WRONG: {row.by}, {row.case}, {row.direction}, {row.dtype}, {row.layout}" for row in wrong),
            report.means(found).markdown() if found else "No peer was timed.",
            *(f"- {line}" for line in report.losses(found)),
            *(f"- {line}" for line in report.refusals(run.rows)),
        ]
        if not run.complete:
            parts.append("**Not reached:** " + "; ".join(run.not_reached or ["nothing was measured"]) + ".")
    return "\n\n".join(parts) + "\n"


def _tests(folder):
    suites = [xml.etree.ElementTree.parse(path).getroot().find("testsuite") for path in folder.glob("tests-*.xml")]
    if not suites:
        return ["**The tests were not reached.**"]
    names = "tests", "failures", "errors", "skipped"
    counts = ", ".join(f"{sum(int(suite.get(name, 0)) for suite in suites)} {name}" for name in names)
    cases = [case for suite in suites for case in suite.iter("testcase")]
    failed = [case for case in cases if {"failure", "error"} & {found.tag for found in case}]
    lines = [f"- {case.get('classname')}: {case.get('name')}" for case in failed[:20]]
    return [f"## Tests, in {len(suites)} runs: {counts}", *lines]


def _sanitizer(folder):
    parts = []
    for tool in ("memcheck", "racecheck"):
        path = folder / f"{tool}.txt"
        if not path.exists():
            parts.append(f"**{tool} was not reached.**")
            continue
        said = path.read_text(errors="replace").splitlines()
        lines = [
            line
            for line in said
            if re.match(r"=+ (ERROR|RACECHECK) SUMMARY|=+ (Error|Invalid|Warning)|\d+ results|wrong", line)
        ]
        parts += [f"## {tool}", "\n".join(f"    {line}" for line in dict.fromkeys(lines[-20:]))]
    return parts


def _golden(folder):
    names = [path.name for path in folder.glob("*.npz")]
    return [f"Golden vectors: {', '.join(names)}" if names else "**No golden vectors were made.**"]


def _micro(folder):
    path = folder / "micro.json"
    if not path.exists():
        return ["**The micro-benchmarks were not reached.**"]
    document = json.loads(path.read_text())
    lines = [f"| {row['name']} | {row['value']:.4g} | {row['unit']} |" for row in document["rows"]]
    table = "\n".join(["| micro-benchmark | value | unit |", "|---|--:|---|", *lines])
    return ["## Micro-benchmarks", table, *(f"- failed: {failure}" for failure in document["failures"])]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a page is not up to date")
    parser.add_argument("--campaign", type=Path, metavar="FOLDER", help="write FOLDER/summary.md")
    options = parser.parse_args()
    if options.campaign:
        page = campaign(options.campaign)
        (options.campaign / "summary.md").write_text(page)
        print(page)
        return 0
    folders = newest()
    if not options.check:
        for folder, made in folders:
            draw(folder, made)
    stale = []
    for path, page in ((HERE.parent / "README.md", project_page(folders)), (HERE / "README.md", bench_page(folders))):
        text = with_page(path, page)
        if text != path.read_text():
            stale.append(path)
            if not options.check:
                path.write_text(text)
    for path in stale:
        print(f"{path.relative_to(HERE.parent)} {'is not up to date' if options.check else 'was written'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
