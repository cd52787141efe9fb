"""Runs `xray-fastai predict`: rows on the terminal or in an output file, which a later run may continue."""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from xray_fastai import DISCLAIMER
from xray_fastai.config.class_names import UNCERTAIN
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.export.reader import why_chosen
from xray_fastai.inference.append import Ledger
from xray_fastai.inference.facts import Facts
from xray_fastai.inference.heat_maps import HeatMaps, check_outside
from xray_fastai.inference.inputs import check_paths, without_outputs
from xray_fastai.inference.messages import Messages
from xray_fastai.inference.model import open_model
from xray_fastai.inference.report import Report
from xray_fastai.inference.resume import skip_done
from xray_fastai.inference.row_file import RowFile
from xray_fastai.inference.rows import RowBuilder, Withheld
from xray_fastai.inference.sharding import follow, predict_sharded
from xray_fastai.inference.stream import Source, check_folders, image_sources
from xray_fastai.inference.terminal_table import MAX_ROWS, Table, shown_digits
from xray_fastai.inference.tta import describe as describe_tta
from xray_fastai.inference.workbook import Workbook
from xray_fastai.system import distributed
from xray_fastai.system.device import describe
from xray_fastai.system.errors import UserError
from xray_fastai.system.progress import progress_bar
from xray_fastai.system.signals import ignore_closed_output, output_is_closed
from xray_fastai.system.text import count_of


def predict_command(paths: list[str], model: Path | None, config: PredictConfig) -> int:
    """Predict onto the terminal or into `config.output`, by all processes.

    Args:
        paths: files and folders; `-` is a list of paths on standard input.
        model: an export's folder; None takes the default (`export.reader.find_export`).
        config: `append` adds to `output` what has no row in it, `resume` continues it after its last row; `heatmaps` is
            a folder that gets an overlay of each image, and keeps the files that it has.

    Returns:
        How many files could not be read, with `resume` including those of the continued file; the same in each process.

    Raises:
        UserError: as `predict`; or a file exists, cannot be written to, or does not fit these inputs.
        SystemExit: 130 on Ctrl-C, after a message that says what was kept; 141 if standard output was closed.
    """
    with distributed.session() as first:
        if first:
            with Messages(config.quiet, config.log) as messages:
                return distributed.share(_predict(paths, model, config, messages))
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
        follow(config.device)
        return distributed.share()


def _predict(paths: list[str], model: Path | None, config: PredictConfig, messages: Messages) -> int:
    _check(paths, config)
    opened = open_model(model, config.device, config.precision).at_prevalence(config.prevalence)
    builder = RowBuilder(opened, config)
    maps = None if config.heatmaps is None else HeatMaps(Path(config.heatmaps), opened)
    report = None if config.report is None else Report(config.report, builder)
    listed = chain.from_iterable(_standard_input() if path == "-" else [path] for path in paths)
    passed_over: Counter[str] = Counter()
    sources = without_outputs(image_sources(listed, config.recursive, passed_over), config)
    unknown = "-" in paths or config.append
    bar = progress_bar(None if unknown else lambda: sum(1 for _ in image_sources(paths, config.recursive)))
    try:
        messages.say(DISCLAIMER)
        messages.say(f"{'model':<14}{opened.path}{why_chosen(model)}")
        processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
        messages.say(f"{'device':<14}{describe(opened.device)}{processes}, precision {opened.precision}")
        messages.say(str(builder))
        with _output(builder) as output:
            run = _Run(builder, output, maps, report, messages)
            try:
                counts = run.predict(sources, nullcontext(lambda done: None) if config.quiet else bar)
            except KeyboardInterrupt:
                messages.tell_error(f"\nStopped{_kept(output, config)}.")
                raise SystemExit(130) from None
        if output is not None:
            messages.say(f"{'written':<14}{output.path}, {count_of(output.rows, 'row')}")
        if maps is not None:
            messages.say(f"{'heat maps':<14}{maps.folder}, {count_of(maps.count, 'picture')}")
        if report is not None:
            report.write(config.output)
            messages.say(f"{'report':<14}{report.path}")
        if others := passed_over.total():
            messages.say(f"{'passed over':<14}{count_of(others, 'file')} whose name is no image's")
        if counts[None]:
            where = f"{config.report} says why" if config.quiet else "their rows say why"
            where = where if output is None else f"the column error of {output.path} says why"
            messages.tell_error(f"Error: {counts[None]:,} of {counts.total():,} files could not be read; {where}")
        messages.say(DISCLAIMER)
        place = config.output or config.report
        messages.say_last(
            f"{place}: {count_of(counts.total(), 'file')} by {opened.path.resolve().name}: {run.summary(counts)}"
        )
    except OSError as error:
        if not output_is_closed(error):
            raise
        raise SystemExit(ignore_closed_output()) from None
    return counts[None]


def _check(paths: list[str], config: PredictConfig) -> None:
    """Check what can be checked before a model is loaded.

    Raises:
        UserError: a path does not exist, a folder has no image, or a file could not be written.
    """
    check_paths(paths, config)
    if config.output is not None and _is_workbook(config):
        if config.append or config.resume:
            option = "append" if config.append else "resume"
            raise UserError("an .xlsx file cannot be continued; give the name of a .csv file by output=", option=option)
        Workbook.check(Path(config.output))
    elif config.output is not None:
        RowFile.check(Path(config.output), config.append or config.resume)
    if config.report is not None:
        Report.check(Path(config.report))
    check_folders(paths, config.recursive, or_empty=config.append)
    check_outside(paths, config)


def _is_workbook(config: PredictConfig) -> bool:
    return Path(config.output or "").suffix.lower() == ".xlsx"


def _output(builder: RowBuilder) -> AbstractContextManager[RowFile | Workbook | None]:
    """Open the output file; None is the terminal."""
    config = builder.config
    types = {column.name: column.type for column in builder.columns}
    if config.output is None:
        return nullcontext()
    if _is_workbook(config):
        return Workbook(config.output, types, shown_digits(builder))
    continued = config.append or config.resume
    return RowFile(config.output, types, continued, "append" if config.append else "resume", config.excel)


def _kept(output: RowFile | Workbook | None, config: PredictConfig) -> str:
    """Return what a run that is stopped leaves, as the end of a sentence."""
    if output is None:
        return ""
    if isinstance(output, Workbook):
        return f"; {output.path} was not written"
    how = "run the same command again" if config.append else "continue it by --resume"
    return f"; {output.path} has {count_of(output.rows, 'row')}, {how}"


@dataclass(frozen=True)
class _Run:
    """Holds where the rows of one run go."""

    builder: RowBuilder
    output: RowFile | Workbook | None  # None: the terminal
    maps: HeatMaps | None
    report: Report | None
    messages: Messages

    def predict(self, sources: Iterator[Source], bar: AbstractContextManager[Callable[[int], None]]) -> Counter:
        """Predict all sources and print a summary.

        Args:
            sources: files.
            bar: takes the number of rows.

        Returns:
            The number of rows by predicted class, with `resume` including those of the continued file; the errors are
            under None, and the uncertain ones under their reasons.
        """
        model, config, output, counts = self.builder.model, self.builder.config, self.output, Counter()
        facts = Facts(model, config)
        write, ledger = (lambda rows: None) if output is None else output.write, None
        if output is None:
            sources = facts.noted(sources)
            if not config.quiet:
                names = list(islice(sources, MAX_ROWS))
                sources = chain(names, sources)
                write = Table(model.classes, names, shown_digits(self.builder)).write
                self.messages.say("")
        elif config.append:
            ledger = Ledger(output, facts.of_run)
            sources = facts.noted(sources, ledger.is_new)
            write([])
        else:
            if config.resume:
                counts = skip_done(output, sources, self.builder)
            sources = facts.noted(sources)
            write([])
            if counts:
                self.messages.say(f"{'continued':<14}after {count_of(counts.total(), 'row')} of {output.path}")
        before, start = counts.total(), time.perf_counter()
        shared = predict_sharded(model, sources, config.batch_size, config.tta, with_images=self.maps is not None)
        with closing(shared) as batches, bar as advance:
            for batch in batches:
                results = self.builder.results(batch, counts.total(), facts)
                rows = [self.builder.row(result) for result in results]
                with nullcontext() if self.maps is None else self.maps.written(batch, results):
                    write(rows)
                for note in filter(None, (ledger, self.report, self.messages)):
                    note.add(rows)
                counts.update(result.withheld or result.label for result in results)
                if output is not None or counts.total() > MAX_ROWS:
                    advance(counts.total())
        seconds, new = time.perf_counter() - start, counts.total() - before
        if ledger is not None:
            ledger.close()
        self.messages.say(
            f"\n{'predicted':<14}{count_of(new, 'file')} in {seconds:.1f} s, {new / seconds:.0f} images/s"
        )
        if ledger is not None:
            self.messages.say(f"{'known':<14}{count_of(ledger.known, 'file')} with a row in {output.path}")
        if config.tta:
            self.messages.say(f"{'tta':<14}{describe_tta(seconds)}")
        self.messages.say(f"{'predictions':<14}{self.summary(counts)}")
        if reasons := {reason: counts[reason] for reason in Withheld if counts[reason]}:
            listed = ", ".join(f"{number:,} {self.builder.rule.why(reason)}" for reason, number in reasons.items())
            self.messages.say(f"{UNCERTAIN:<14}{sum(reasons.values()):,} {UNCERTAIN}: {listed}")
        return counts

    def summary(self, counts: Counter) -> str:
        """Return the counts in one line, for people; without `quiet` the uncertain ones have a line of their own."""
        by_class = ", ".join(f"{counts[name]:,} {name}" for name in self.builder.model.classes)
        withheld = sum(counts[reason] for reason in Withheld)
        if self.messages.quiet and withheld:
            by_class += f", {withheld:,} {UNCERTAIN}"
        return f"{by_class}; errors: {counts[None]:,}"


def _standard_input() -> Iterator[str]:
    for line in sys.stdin.buffer:  # bytes: a file name may not be UTF-8
        if line.strip():
            yield os.fsdecode(line.rstrip(b"\r\n"))
