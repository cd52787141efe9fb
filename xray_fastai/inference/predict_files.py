"""Runs `xray-fastai predict`: rows on the terminal or in an output file, which a later run may continue."""

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from itertools import chain, islice
from pathlib import Path

from xray_fastai import DISCLAIMER
from xray_fastai.config.class_names import UNCERTAIN
from xray_fastai.config.predict_config import PredictConfig
from xray_fastai.export.reader import why_chosen
from xray_fastai.inference.append import Ledger
from xray_fastai.inference.facts import Facts
from xray_fastai.inference.heat_maps import HeatMaps, check_outside
from xray_fastai.inference.model import open_model
from xray_fastai.inference.resume import skip_done
from xray_fastai.inference.row_file import RowFile
from xray_fastai.inference.rows import DIGITS, RowBuilder, Withheld
from xray_fastai.inference.sharding import follow, predict_sharded
from xray_fastai.inference.stream import Source, check_folders, image_sources
from xray_fastai.inference.terminal_table import MAX_ROWS, SHOWN_DIGITS, Table
from xray_fastai.inference.tta import describe as describe_tta
from xray_fastai.system import distributed
from xray_fastai.system.device import describe
from xray_fastai.system.progress import progress_bar
from xray_fastai.system.signals import ignore_closed_output, output_is_closed
from xray_fastai.system.text import count_of


def predict_command(paths: list[str], model: Path | None, config: PredictConfig) -> int:
    """Predict onto the terminal or into `config.output`, by all processes.

    Args:
        paths: files and folders; `-` is a list of paths on standard input.
        model: an export's folder; None takes the newest in ./exports.
        config: `append` adds to `output` what has no row in it, `resume` continues it after its last row; `heatmaps` is
            a folder that gets an overlay of each image, and keeps the files that it has.

    Returns:
        How many files could not be read, with `resume` including those of the continued file; the same in each process.

    Raises:
        UserError: as `predict`; or the output file exists, cannot be written to, or does not fit these inputs.
        SystemExit: 130 on Ctrl-C, after a message that says what was kept; 141 if standard output was closed.
    """
    with distributed.session() as first:
        if first:
            return distributed.share(_predict(paths, model, config))
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
        follow(config.device)
        return distributed.share()


def _predict(paths: list[str], model: Path | None, config: PredictConfig) -> int:
    output = None if config.output is None else Path(config.output)
    if output is not None:
        RowFile.check(output, config.append or config.resume)
    check_folders(paths, config.recursive, or_empty=config.append)
    check_outside(paths, config)
    opened = open_model(model, config.device, config.precision).at_prevalence(config.prevalence)
    builder = RowBuilder(opened, config)
    maps = None if config.heatmaps is None else HeatMaps(Path(config.heatmaps), opened)
    listed = chain.from_iterable(_standard_input() if path == "-" else [path] for path in paths)
    passed_over: Counter[str] = Counter()
    sources = image_sources(listed, config.recursive, passed_over)
    unknown = "-" in paths or config.append
    bar = progress_bar(None if unknown else lambda: sum(1 for _ in image_sources(paths, config.recursive)))
    try:
        print(DISCLAIMER)
        print(f"{'model':<14}{opened.path}{why_chosen(model)}")
        processes = f", {distributed.world_size()} processes" if distributed.world_size() > 1 else ""
        print(f"{'device':<14}{describe(opened.device)}{processes}, precision {opened.precision}")
        print(builder, flush=True)
        types = {column.name: column.type for column in builder.columns}
        continued = config.append or config.resume, "append" if config.append else "resume"
        with nullcontext() if output is None else RowFile(output, types, *continued) as file:
            try:
                counts = _run(builder, sources, file, maps, bar)
            except KeyboardInterrupt:
                how = "run the same command again" if config.append else "continue it by --resume"
                kept = "" if file is None else f"; {output} has {count_of(file.rows, 'row')}, {how}"
                print(f"\nStopped{kept}.", file=sys.stderr)
                raise SystemExit(130) from None
        if passed_over:
            print(f"{'passed over':<14}{count_of(passed_over.total(), 'file')} whose name is no image's")
        if counts[None]:
            where = "their rows say why" if output is None else f"the column error of {output} says why"
            print(f"Error: {counts[None]:,} of {counts.total():,} files could not be read; {where}", file=sys.stderr)
        print(DISCLAIMER, flush=True)
    except OSError as error:
        if not output_is_closed(error):
            raise
        raise SystemExit(ignore_closed_output()) from None
    return counts[None]


def _run(
    builder: RowBuilder,
    sources: Iterator[Source],
    file: RowFile | None,  # None: the terminal
    maps: "HeatMaps | None",
    bar: AbstractContextManager[Callable[[int], None]],  # takes the number of rows
) -> Counter:
    """Predict all sources and print a summary.

    Returns:
        The number of rows by predicted class, including those of a continued file; the errors are under None, and
        the uncertain ones under their reasons.
    """
    model, config, counts = builder.model, builder.config, Counter()
    facts, ledger = Facts(model, config), None
    if file is None:
        sources = facts.noted(sources)
        names = list(islice(sources, MAX_ROWS))
        digits = SHOWN_DIGITS + builder.rule.digits - DIGITS
        table, sources = Table(model.classes, names, digits), chain(names, sources)
        print()
    elif config.append:
        ledger = Ledger(file, facts.of_run)
        sources = facts.noted(sources, ledger.is_new)
        file.write([])
    else:
        counts = skip_done(file, sources, builder)
        sources = facts.noted(sources)
        file.write([])
        if counts:
            print(f"{'continued':<14}after {count_of(counts.total(), 'row')} of {file.path}", flush=True)
    before, start = counts.total(), time.perf_counter()
    shared = predict_sharded(model, sources, config.batch_size, config.tta, with_images=maps is not None)
    with closing(shared) as batches, bar as advance:
        for batch in batches:
            results = builder.results(batch, counts.total(), facts)
            rows = [builder.row(result) for result in results]
            with nullcontext() if maps is None else maps.written(batch, results):
                (table if file is None else file).write(rows)
            if ledger is not None:
                ledger.supersede(rows)
            counts.update(result.withheld or result.label for result in results)
            if file is not None or counts.total() > MAX_ROWS:
                advance(counts.total())
    if ledger is not None:
        ledger.close()
    seconds, new = time.perf_counter() - start, counts.total() - before
    print(f"\n{'predicted':<14}{count_of(new, 'file')} in {seconds:.1f} s, {new / seconds:.0f} images/s")
    if ledger is not None:
        print(f"{'known':<14}{count_of(ledger.known, 'file')} with a row in {file.path}")
    if config.tta:
        print(f"{'tta':<14}{describe_tta(seconds)}")
    by_class = ", ".join(f"{counts[name]:,} {name}" for name in model.classes)
    print(f"{'predictions':<14}{by_class}; errors: {counts[None]:,}")
    if reasons := {reason: counts[reason] for reason in Withheld if counts[reason]}:
        listed = ", ".join(f"{number:,} {builder.rule.why(reason)}" for reason, number in reasons.items())
        print(f"{UNCERTAIN:<14}{sum(reasons.values()):,} {UNCERTAIN}: {listed}")
    if file is not None:
        print(f"{'written':<14}{file.path}, {count_of(file.rows, 'row')}")
    sys.stdout.flush()
    return counts


def _standard_input() -> Iterator[str]:
    for line in sys.stdin.buffer:  # bytes: a file name may not be UTF-8
        if line.strip():
            yield os.fsdecode(line.rstrip(b"\r\n"))
