"""The command line. It parses options, calls the library and prints results; it has no logic of its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import gpuconv
from gpuconv import dtypes, settings
from gpuconv.arguments import LAYOUTS, PADDING_MODES, PADDING_NAMES
from gpuconv.arrays import BackendError
from gpuconv.benchmark import command
from gpuconv.geometry import DIRECTIONS
from gpuconv.gpu.occupancy import ARCHITECTURES
from gpuconv.select import ALGORITHMS


class _Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (try {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 on success, 1 for a wrong result, 2 for a bad option, 130 on interrupt, 141 on EPIPE."""
    parser = _parser()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:2] == ["bench", "compare"]:  # bench takes names of suites, so it cannot have commands
        arguments[:2] = ["bench compare"]
    options = parser.parse_args(arguments)
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except (ValueError, TypeError, BackendError) as error:
        print(f"gpuconv {options.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"gpuconv {options.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> _Parser:
    parser = _Parser(prog="gpuconv", description="Convolution forward and backward for NumPy and CuPy arrays.")
    parser.add_argument("--version", action="version", version=f"gpuconv {gpuconv.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command.add_bench(commands)
    command.add_compare(commands)
    command.add_tune(commands)

    check = commands.add_parser("check", help="compare every available algorithm with a float64 reference")
    check.set_defaults(run=_check)

    info = commands.add_parser("info", help="versions, backend, devices, environment variables")
    info.set_defaults(run=_info)

    explain = commands.add_parser("explain", help="which algorithm would compute a convolution, and why not the others")
    explain.add_argument("x", type=_ints, metavar="X_SHAPE", help="such as 8,64,56,56")
    explain.add_argument("w", type=_ints, metavar="W_SHAPE", help="such as 64,64,3,3")
    explain.add_argument("--stride", type=_per_axis, default=1, help="N or N,N (default 1)")
    explain.add_argument(
        "--padding",
        type=_padding,
        default=0,
        help=f"N or N,N or LOW:HIGH,LOW:HIGH or {', '.join(PADDING_NAMES)}; negative ones as --padding=-1,-1",
    )
    explain.add_argument("--padding-mode", choices=PADDING_MODES, default=PADDING_MODES[0])
    explain.add_argument("--dilation", type=_per_axis, default=1, help="N or N,N (default 1)")
    explain.add_argument("--groups", type=int, default=1)
    explain.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0])
    explain.add_argument("--flip", action="store_true", help="true convolution")
    explain.add_argument("--dtype", choices=dtypes.NAMES, default="float32")
    explain.add_argument("--direction", choices=DIRECTIONS, help="only this direction (default all)")
    explain.add_argument("--backend", choices=settings.BACKENDS)
    explain.add_argument("--algorithm", choices=("auto", *ALGORITHMS), default="auto")
    explain.set_defaults(run=_explain)

    kernels = commands.add_parser(
        "kernels",
        help="compile every CUDA kernel, without a GPU: registers, spills, shared memory, occupancy",
        description="Compiles every CUDA kernel with NVRTC for each architecture, with all dtypes, tiles and widths of"
        " offsets, without a GPU. Each line gives the range over these. Exit status 1 on a spill or a compile error.",
    )
    kernels.add_argument(
        "--arch", type=_names, metavar="ARCH,ARCH", help=f"such as sm_80,sm_90a (default {','.join(ARCHITECTURES)})"
    )
    kernels.add_argument("--json", type=Path, metavar="FILE", help="write the resource usage of every kernel as JSON")
    kernels.add_argument(
        "--sass", action="store_true", help="also count instructions: prologue, main loop, epilogue (needs nvdisasm)"
    )
    kernels.set_defaults(run=_kernels)
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _ints(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.strip("()[] ").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be ints with commas between them, got {text!r}") from None


def _per_axis(text: str) -> int | tuple[int, ...]:
    values = _ints(text)
    return values[0] if len(values) == 1 else values


def _padding(text: str) -> Any:
    if text in PADDING_NAMES:
        return text
    if ":" not in text:
        return _per_axis(text)
    pairs = tuple(_ints(part.replace(":", ",")) for part in text.split(","))
    if any(len(pair) != 2 for pair in pairs):
        raise argparse.ArgumentTypeError(f"must be LOW:HIGH for every axis, got {text!r}")
    return pairs


def _check(options: argparse.Namespace) -> int:
    from gpuconv.benchmark import check

    places, missing = check.backends()
    failures = count = 0
    for outcome in check.outcomes(places):
        verdict = "ok" if not outcome.wrong else "WRONG"
        refused = f", {outcome.refused} refused" if outcome.refused else ""
        print(
            f"{outcome.backend:<6} {outcome.algorithm:<8} {outcome.direction:<12} {outcome.dtype:<11} {verdict:<6}"
            f"{outcome.right} right{refused}, largest error {outcome.worst:.2f} of its bound"
        )
        for geometry in outcome.wrong:
            print(f"    {geometry}")
        failures += len(outcome.wrong)
        count += outcome.right + len(outcome.wrong)
    if missing:
        print(f"cupy   not checked: {missing}")
    print(f"{count} results checked, {failures} wrong")
    return 1 if failures or not count else 0


def _info(options: argparse.Namespace) -> int:
    gpuconv.show_config()
    return 0


def _explain(options: argparse.Namespace) -> int:
    for direction in [options.direction] if options.direction else DIRECTIONS:
        print(
            gpuconv.explain(
                options.x, options.w, stride=options.stride, padding=options.padding,
                padding_mode=options.padding_mode, dilation=options.dilation, groups=options.groups,
                layout=options.layout, flip=options.flip, dtype=options.dtype,
                direction=direction, backend=options.backend, algorithm=options.algorithm,
            )
        )  # fmt: skip
    return 0


def _kernels(options: argparse.Namespace) -> int:
    from gpuconv.gpu import compiler, report, sass

    command.check_writable(options.json)
    if options.sass and sass.nvdisasm() is None:
        raise ValueError(f"--sass needs nvdisasm: {sass.INSTALL_HINT}")
    architectures = report.known(options.arch)
    print(f"NVRTC {'.'.join(map(str, compiler.version()))}\n\n{report.HEADER}")
    rows, failures = [], []
    for architecture in architectures:
        found = list(report.rows(architecture, with_sass=options.sass))
        failures += [str(row) for row in found if isinstance(row, compiler.CompileError)]
        rows += [row for row in found if isinstance(row, report.CompiledKernel)]
        for line in report.lines(row for row in rows if row.arch == architecture):
            print(line, flush=True)
    print(*report.sass_lines(rows), sep="\n", end="\n" if options.sass else "")
    failures += [f"{row.kernel} spills on {row.arch}: {row}" for row in rows if row.spill_stores or row.spill_loads]
    if options.json:
        report.write_json(options.json, rows)
    for failure in failures:
        print(f"gpuconv kernels: {failure}", file=sys.stderr)
    return 1 if failures else 0
