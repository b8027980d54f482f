"""Sweeps: a notebook run once for each combination of parameter values, and a table of it all.

A sweep lives in one folder, named after what is asked: the same command goes on where an earlier
one stopped. It ends with results.csv, results.parquet and index.html.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit import parameters as notebook_parameters
from labkit import progress, records, report, runs, values
from labkit.course import find, read
from labkit.engine import Engine
from labkit.errors import EngineError, RunError, SettingsError
from labkit.parameters import Text
from labkit.records import NotebookRun, RunReport
from labkit.settings import EngineSettings

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from nbformat import NotebookNode

CSV, PARQUET, PLOTS = "results.csv", "results.parquet", "plots"
MOST_RUNS = 1000
MOST_PLOTS = 12
# What a row says of the run itself, beside its parameters and what the notebook recorded.
FACTS = ("status", "seconds", "peak_memory_bytes", "error", "notebook")

Conduct = Callable[[RunReport], RunReport]


def parse(grid: Sequence[str]) -> dict[str, list[Text]]:
    """Values by name out of "NAME=1,2,3" as typed; a value with commas stands in [] or quotes.

    Raises RunError for a name without values, an empty value, or a name given twice.
    """
    parsed: dict[str, list[Text]] = {}
    for each in grid:
        name, equals, text = each.partition("=")
        split = [part.strip() for part in _split(text)]
        if not (name.strip() and equals) or not all(split):
            raise RunError(
                f"--grid {each} does not say which values to take.",
                "It needs a name, an equals sign, and values between commas, none of them empty.",
                "For example: --grid MAX_MODEL_LEN=512,1024,2048",
            )
        if name.strip() in parsed:
            raise RunError(f"--grid names {name.strip()} twice.", next="Put its values together.")
        parsed[name.strip()] = list(map(Text, split))
    return parsed


def plan(
    notebook: str | Path, grid: Mapping[str, Sequence[object]], fixed: Mapping[str, object]
) -> list[NotebookRun]:
    """A record for each combination; starts nothing.

    `fixed` goes to every run. Raises RunError for a name or value that the notebook does not
    take, and for a combination that vLLM could not start with.
    """
    source = find(notebook)
    content = read(source)
    takes = notebook_parameters.read(content, source.stem)
    if not grid:
        raise RunError("A sweep needs a grid.", next="For example: --grid MAX_MODEL_LEN=512,1024")
    if both := grid.keys() & fixed.keys():
        raise RunError(f"{sorted(both)[0]} is both fixed and part of the grid.", next="Choose one.")
    count = 1
    for choices in grid.values():
        count *= len(choices)
    if count > MOST_RUNS:
        raise RunError(
            f"This grid has {count:,} combinations.",
            f"A sweep takes at most {MOST_RUNS:,}.",
            "Take fewer values, or sweep one part after the other.",
        )
    width = len(str(count))
    return [
        NotebookRun(
            f"{source.stem}-{number:0{width}}", source, len(content.cells),
            _checked({**fixed, **values_}, takes, source.stem),
        )
        for number, values_ in enumerate(_combinations(grid), start=1)
    ]  # fmt: skip


def run(
    notebook: str | Path,
    grid: Mapping[str, Sequence[object]],
    fixed: Mapping[str, object] | None = None,
    out: str | Path | None = None,
    timeout: float = 600,
    display: runs.Display = progress.show,
    conduct: Conduct | None = None,
) -> RunReport:
    """Run a notebook with each combination of the grid, and write the table of the results.

    Runs that an earlier sweep of the same grid, notebook and folder has done are not done again.
    `conduct` runs what is left of a report, by default here, one after the other. Raises RunError
    before anything starts, and runs.Interrupted.
    """
    limits = runs.limits_of(timeout)
    planned = plan(notebook, grid, fixed or {})
    folder = _folder(out, planned)
    result = RunReport(folder, _resumed(folder, planned))
    result.seconds = sum(record.seconds for record in result.notebooks)
    try:
        return conduct(result) if conduct else runs.conduct(result, limits, display)
    finally:
        tabulate(result, list(grid))


def in_kernel(
    model: str,
    grid: Mapping[str, Sequence[object]],
    measure: Callable[[Engine], Mapping[str, object]],
) -> "pd.DataFrame":
    """Start an engine in this kernel for each combination of its settings, and measure each.

    One row a combination: the settings, seconds to start, and what `measure` returned; where an
    engine did not start, `error` says why. Much faster than a run of a notebook for each, since
    vLLM is imported once. Raises SettingsError for settings that vLLM does not have, before
    anything starts.
    """
    import pandas as pd

    combinations = list(_combinations(grid))
    engines = [Engine(model, **settings) for settings in combinations]
    rows = []
    for settings, engine in zip(combinations, engines, strict=True):
        rows.append(dict(settings) | _measured(engine, measure))
    return pd.DataFrame(rows)


def _measured(
    engine: Engine, measure: Callable[[Engine], Mapping[str, object]]
) -> dict[str, object]:
    """A row of one engine, without the lines that it prints."""
    begun = time.monotonic()
    try:
        with redirect_stdout(StringIO()), engine:
            seconds = round(time.monotonic() - begun, 2)
            return {"start_seconds": seconds, **measure(engine), "error": None}
    except EngineError as error:
        return {"error": error.why or error.what}


def table(result: RunReport) -> "pd.DataFrame":
    """One row a run: its parameters, what became of it, and everything that it recorded."""
    import pandas as pd

    rows = []
    for record in result.notebooks:
        facts = {"status": record.status, "seconds": record.seconds,
                 "peak_memory_bytes": record.peak_memory_bytes,
                 "error": record.error.message if record.error else None,
                 "notebook": record.notebook}  # fmt: skip
        recorded = values.read(result.folder / record.notebook) if record.notebook else {}
        rows.append(record.parameters | recorded | facts)
    frame = pd.DataFrame(rows)
    return frame[[name for name in frame if name not in FACTS] + list(FACTS)]


def tabulate(result: RunReport, swept: Sequence[str]) -> None:
    """Write results.csv, results.parquet, the plots and the page, as far as the sweep has got."""
    frame = table(result)
    records.replace(result.folder / CSV, frame.to_csv(index=False))
    draft = result.folder / f".{PARQUET}.new"
    # A column in which runs recorded different kinds of things becomes one of texts.
    frame.map(_plain_cell).convert_dtypes().to_parquet(draft, index=False)
    os.replace(draft, result.folder / PARQUET)
    report.write(result, frame=frame, plots=_plots(result.folder, frame, swept))


def _plots(folder: Path, frame: "pd.DataFrame", swept: Sequence[str]) -> list[str]:
    """Draw every number that the runs recorded over the grid; returns the files' names."""
    place = folder / PLOTS
    place.mkdir(exist_ok=True)
    done = frame[frame["status"] == "ok"]
    numbers = [
        name for name in done.select_dtypes("number")
        if name not in swept and done[name].nunique() > 1
    ]  # fmt: skip
    names = []
    for name in numbers[:MOST_PLOTS] if len(done) > 1 else []:
        chart(done, name, swept).savefig(place / f"{name}.png", dpi=110)
        names.append(f"{PLOTS}/{name}.png")
    return names


def chart(frame: "pd.DataFrame", name: str, swept: Sequence[str]) -> "Figure":
    """One recorded number over the first swept parameter, a line for each of the other values."""
    from matplotlib.figure import Figure

    first, *others = swept
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axis = figure.subplots()
    groups = frame.groupby(others, dropna=False) if others else [((), frame)]
    for key, rows in groups:
        label = ", ".join(f"{n}={v}" for n, v in zip(others, key, strict=True))
        rows = rows.sort_values(first, key=lambda column: column.map(_order))
        axis.plot(rows[first].astype(str), rows[name], marker="o", label=label or None)
    axis.set(xlabel=first, ylabel=name)
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    axis.spines[["top", "right"]].set_visible(False)
    if others:
        axis.legend(frameon=False, fontsize=8)
    return figure


def _order(value: object) -> tuple[bool, float, str]:
    """Numbers by size, before texts in their order."""
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)


def _plain_cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _split(text: str) -> Iterator[str]:
    """Parts between commas, but for those within brackets, braces or quotes."""
    depth, quote, part = 0, "", ""
    for sign in text:
        if sign == "," and not depth and not quote:
            yield part
            part = ""
            continue
        if sign in "\"'" and quote in ("", sign):
            quote = "" if quote else sign
        depth += (sign in "[{(") - (sign in "]})") if not quote else 0
        part += sign
    yield part


def _combinations(grid: Mapping[str, Sequence[object]]) -> Iterator[dict[str, object]]:
    for choice in product(*grid.values()):
        yield dict(zip(grid, choice, strict=True))


def _checked(
    chosen: dict[str, object], takes: Mapping[str, Any], name: str
) -> dict[str, object]:
    """The values as the notebook will get them, once vLLM could start with them."""
    accepted = notebook_parameters.share_out(chosen, {name: takes})[name]
    fields = EngineSettings.model_fields
    settings = {n.lower(): v for n, v in accepted.items() if n.lower() in fields and n.isupper()}
    settings = {n: v for n, v in settings.items() if v is not None and n != "model"}
    try:
        EngineSettings(model="any", **settings)
    except SettingsError as error:
        shown = ", ".join(f"{n}={v}" for n, v in accepted.items())
        what = f"The combination {shown} is not possible."
        raise RunError(what, error.what, error.next) from None
    return accepted


def _folder(out: str | Path | None, planned: Sequence[NotebookRun]) -> Path:
    """The sweep's folder, made where it is not there; by default named by what is asked."""
    source = planned[0].source
    asked = [_code(read(source)), *(record.parameters for record in planned)]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:10]
    folder = Path(out).expanduser() if out else Path("runs") / f"sweep-{source.stem}-{digest}"
    folder = folder.resolve()
    mark = folder / ".sweep"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if mark.exists() and mark.read_text() != digest:
            raise RunError(
                f"{folder} holds another sweep.",
                "Its notebook, grid or parameters are not those of this one.",
                "Choose another folder with --out, or delete that one.",
            )
        mark.write_text(digest)
        (folder / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise RunError(
            f"The results cannot be written to {folder}.",
            f"{error.strerror or error}: {error.filename}.",
            "Choose a folder of your own with --out.",
        ) from error
    return folder


def _code(content: "NotebookNode") -> list[str]:
    return [cell.source for cell in content.cells if cell.cell_type == "code"]


def _resumed(folder: Path, planned: Sequence[NotebookRun]) -> list[NotebookRun]:
    """The planned runs, with those in their place that have passed before."""
    passed = {
        record.name: record for record in records.saved(folder)
        if record.passed and record.notebook and (folder / record.notebook).exists()
    }  # fmt: skip
    for record in planned:
        if record.name not in passed:
            shutil.rmtree(folder / "logs" / record.name, ignore_errors=True)
    return [passed.get(record.name, record) for record in planned]
