"""How the command line shows jobs, events, status and data reports to people."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from sglang_harli.config import show_size
from sglang_harli.core import MemoryPurpose
from sglang_harli.names import short_id
from sglang_harli.protocol.escaping import escaped
from sglang_harli.protocol.public import Event, Job, StatusAnswer
from sglang_harli.tools import terminal

if TYPE_CHECKING:
    from sglang_harli.predictor.profile.sweep import Load

PURPOSES = tuple(purpose.value for purpose in MemoryPurpose)
FILE_COLUMNS = 4096
SHOWN_AS = {"requests_finished": "requests_finished (while a job was held)"}
LINE_EVERY_S = 5.0  # without a terminal, `watch` prints a line when the state changes and this often


def console(*, to_stderr: bool = False) -> Console:
    """Where rich draws; texts that are not ours are escaped before they come here."""
    stream = sys.stderr if to_stderr else sys.stdout
    # In a file or a pipe no line is folded: what reads it takes one row for one job.
    width = None if stream.isatty() else FILE_COLUMNS
    return Console(
        file=terminal.unescaped(stream), width=width, highlight=False, markup=False, soft_wrap=True
    )


def show_jobs(jobs: Iterable[Job]) -> None:
    console().print(job_table(jobs))


def clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):  # no time of a calendar
        return str(seconds)


def span(seconds: float | None) -> str:
    """1h02m, 3m05s, 12s; unknown."""
    if seconds is None:
        return "unknown"
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _rate(job: Job) -> float | None:
    """Tokens a second; a job that is in the queue again does not train at the rate that it had."""
    return job.tokens_per_s if job.status == "running" else None


def state(job: Job) -> str:
    text = str(job.status)
    if job.sub_state:
        text += f" ({job.sub_state}{': ' + job.reason if job.reason else ''})"
    elif job.reason:
        text += f" ({job.reason})"
    return text


def job_table(jobs: Iterable[Job]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("job", "suffix", "status", "step", "loss", "created", "model"):
        table.add_column(name, overflow="fold")
    for job in jobs:
        cells = (
            short_id(job.id),
            job.suffix or "-",
            f"{job.status} ({job.sub_state})" if job.sub_state else str(job.status),
            f"{job.step}/{job.total_steps}",
            _number(job.loss, ".4f"),
            clock(job.created_at),
            job.fine_tuned_model or "-",
        )
        table.add_row(*(Text(escaped(cell)) for cell in cells))
    return table


def _told(name: str, value: Any) -> bool:
    return name != "validation" and value not in (None, [], "", 0)


def _validation(data: dict[str, Any]) -> str | None:
    """What is evaluated, of a job that evaluates."""
    about = data.get("validation")
    if about:
        return (
            f"{about.get('file')}, {about.get('rows')} rows, {about.get('target_tokens')} tokens that count"
        )
    rows = data.get("validation_rows")
    return f"{rows} rows of the data" if rows else None


def _evaluation(job: Job) -> str | None:
    """The last evaluation, and the best one."""
    last = job.evaluation
    if not last:
        return None
    text = (
        f"valid_loss {_number(last.get('valid_loss'), '.4f')}, token accuracy "
        f"{_number(last.get('valid_mean_token_accuracy'), '.4f')} at step {last.get('step')}"
    )
    if last.get("full_valid_loss") != last.get("valid_loss") and last.get("full_valid_loss") is not None:
        text += f"; of all rows {last['full_valid_loss']:.4f}, {last['full_valid_mean_token_accuracy']:.4f}"
    if job.best_valid_loss is not None:
        text += f"; the best is {job.best_valid_loss:.4f} at step {job.best_step}"
    return text


def _model(job: Job) -> str | None:
    gone = job.fine_tuned_model in job.deleted_models
    return f"{job.fine_tuned_model} (deleted)" if gone else job.fine_tuned_model


def job_lines(job: Job) -> Iterator[str]:
    data = job.data
    rows = (
        ("job", job.id),
        ("status", state(job)),
        ("base model", job.base or job.model),
        ("suffix", job.suffix),
        ("fine-tuned model", _model(job)),
        ("step", f"{job.step}/{job.total_steps}"),
        ("trained tokens", job.trained_tokens),
        ("loss", _number(job.loss, ".4f")),
        ("evaluation", _evaluation(job)),
        ("learning rate", _number(job.learning_rate, ".3g")),
        ("tokens/s", _number(job.tokens_per_s, ".1f")),
        ("eta", span(job.eta_s) if job.status == "running" else "-"),
        ("created", clock(job.created_at)),
        ("started", clock(job.started_at)),
        ("finished", clock(job.finished_at)),
        ("attempt", job.attempt),
        ("priority", job.priority),
        ("continues", job.resumed_from),
        (
            "data",
            ", ".join(f"{name}: {value}" for name, value in data.items() if _told(name, value)),
        ),
        ("validation", _validation(data)),
        ("run folder", job.run_dir),
    )
    yield from (f"{name + ':':<18}{'-' if value in (None, '') else value}" for name, value in rows)
    values = job.hyperparameters
    yield "hyperparameters:  " + ", ".join(
        f"{name}={getattr(values, name)}" for name in values.__struct_fields__
    )
    if job.error is not None:
        yield f"error:            {job.error.code}: {job.error.message}"


def event_line(event: Event) -> str:
    level = "" if event.level == "info" else f" {event.level.upper()}"
    return f"[{clock(event.created_at)}] #{event.id}{level} {event.type}: {event.message}"


def status_lines(answer: StatusAnswer) -> Iterator[str]:
    yield "jobs: " + ", ".join(f"{name} {count}" for name, count in answer.jobs.items())
    for title, values in (
        ("service", answer.service),
        ("serving", answer.serving),
        ("training", answer.training),
        (f"options (revision {answer.revision})", answer.options),
    ):
        if values is None:
            yield f"{title}: not connected" if title == "serving" else f"{title}: none"
            continue
        yield f"{title}: {values['why']}" if values.get("why") else f"{title}:"
        shown = {name: value for name, value in values.items() if name not in ("parity", "prediction", "why")}
        yield from _nested(shown, "  ")
        yield from parity_lines(values.get("parity"))
        yield from prediction_lines(values.get("prediction"))
    yield from pool_lines(answer.pool)


def parity_lines(parity: dict[str, Any] | None) -> Iterator[str]:
    """How far training is from serving, in a sentence that has the figures."""
    if parity:
        yield f"  parity: {parity['why']}"


def prediction_lines(phases: dict[str, dict[str, Any]] | None) -> Iterator[str]:
    """How good the predicted times of steps and quanta were lately."""
    if not phases:
        return
    yield "  prediction (of the latest 200 of each; upper bound as a multiple of what is expected):"
    for name, score in phases.items():
        yield (
            f"    {name:<20}error {100 * score['mape']:.1f}%, within the upper bound {100 * score['coverage']:.1f}%, "
            f"upper bound {score['upper_ratio']:.2f}, steps {score['steps']}"
        )


def pool_lines(pool: dict[str, Any] | None) -> Iterator[str]:
    """Whose the memory is, and what it has cost training to give it back."""
    if pool is None:
        return
    held = [f"{name} {show_size(pool['by_owner'][name])}" for name in PURPOSES if pool["by_owner"].get(name)]
    yield (
        f"pool ({pool['backing']}): {show_size(pool['total_bytes'])} = requests and prefixes "
        f"{show_size(pool['kv_bytes'])} + training {show_size(pool['train_bytes'])}"
        f"{' (' + ', '.join(held) + ')' if held else ''} + free {show_size(pool['free_bytes'])}"
    )
    took, marks, most = pool["reclaim_ms"], pool["watermarks"], pool["max_train_bytes"]
    yield (
        f"  reclaims {pool['reclaims']} (median {took['p50']:g} ms, longest {took['max']:g} ms), dropped micro-batches "
        f"{pool['dropped_micro_batches']}, spills {pool['spills']}; kept free {show_size(marks['low'])} to "
        f"{show_size(marks['high'])}, at most {'all' if most is None else show_size(most)} to training"
    )


def _nested(values: dict[str, Any], indent: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _nested(value, indent + "  ")
        else:
            shown = f"{value:.6g}" if isinstance(value, float) else value
            if name.endswith("_bytes") and isinstance(value, int):
                name, shown = name.removesuffix("_bytes"), show_size(value)
            yield f"{indent}{SHOWN_AS.get(name, name)}: {'-' if value in (None, '', {}, []) else shown}"


def progress_line(job: Job) -> str:
    """In the form of SGLang's own log lines."""
    return (
        f"[{clock(time.time())}] Finetune, #job: {short_id(job.id)}, status: {state(job)}, "  # stamp: of a line for people
        f"step: {job.step}/{job.total_steps}, loss: {_number(job.loss, '.4f')}, "
        f"lr: {_number(job.learning_rate, '.3g')}, ft throughput (token/s): {_number(_rate(job), '.2f')}, "
        f"eta: {span(job.eta_s)}"
    )


def watch(looks: Iterable[Job]) -> Job:
    """Show a job's states until it is over, and how it ended; returns the last one."""
    screen = console()
    last = _watch_bar(looks, screen) if screen.is_terminal else _watch_lines(looks)
    if last.error is not None:
        terminal.say(f"error: {last.error.code}: {last.error.message}", to_stderr=True)
    elif last.fine_tuned_model:
        terminal.say(f"served as: {last.fine_tuned_model}")
    return last


def _watch_lines(looks: Iterable[Job]) -> Job:
    shown, printed = None, 0.0
    for job in looks:
        key = (job.status, job.sub_state if job.sub_state != "yielding" else "training")
        if key != shown or time.monotonic() - printed >= LINE_EVERY_S:
            shown, printed = key, time.monotonic()
            terminal.say(progress_line(job))
    return job


def _watch_bar(looks: Iterable[Job], screen: Console) -> Job:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[numbers]}"),
    )
    with Progress(*columns, console=screen, expand=True) as progress:
        task = None
        for job in looks:
            numbers = (
                f"loss {_number(job.loss, '.4f')}  {_number(_rate(job), '.0f')} tok/s  eta {span(job.eta_s)}"
            )
            values = {"completed": job.step, "total": job.total_steps, "numbers": numbers}
            if task is None:
                task = progress.add_task(escaped(state(job)), **values)
            else:
                progress.update(task, description=escaped(state(job)), **values)
    return job


def loads_bar(loads: list[Load]) -> Iterator[Load]:
    """Hands the loads of a sweep out one by one, with a bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, console=console(to_stderr=True)) as progress:
        task = progress.add_task("profile", total=len(loads))
        for load in loads:
            progress.update(task, description=f"batch {load.batch}, prompts of {load.prompt_tokens}")
            yield load
            progress.advance(task)


def profile_lines(made: dict[str, Any]) -> Iterator[str]:
    yield f"{made['path']}: {made['points']} measured points, {made['measured']} loads measured now"
    if made["missing"]:
        yield f"{made['missing']} loads are missing: run it again to go on"
    yield "the server reads it when it starts"


def data_report(report: dict[str, Any]) -> None:
    """Print what ``check_data`` found."""
    terminal.say(
        f"{report['file']}: {report['rows']} rows, {report['tokens']} tokens, "
        f"{100 * report['loss_share']:.1f}% with loss, longest row {report['longest_row']} tokens "
        f"(limit {report['max_seq_length'] or 'unknown'}), truncated {report['truncated']}, "
        f"dropped {report['dropped']}"
    )
    if report.get("file_text"):  # a server of a version before says no more than the rest
        rows = f"rows of the format {report['format']}" if report["format"] else "no row of a known format"
        terminal.say(f"{rows} in {report['file_text']}; {report['bad_rows']} rows not accepted")
    if report["summary"]:
        terminal.say(report["summary"])
    most = max((bucket["rows"] for bucket in report["histogram"]), default=1)
    for bucket in report["histogram"]:
        bar = "#" * round(40 * bucket["rows"] / most)
        terminal.say(f"  {bucket['from']:>6}-{bucket['to']:<6} tokens {bucket['rows']:>7} {bar}")
    out = console()
    if report["examples"]:
        how = "green" if out.is_terminal else "between [[ and ]]"
        terminal.say(f"examples (learned tokens {how}):")
    for example in report["examples"]:
        unit = "row" if "row" in example else "line"
        text = Text(f"  {unit} {example[unit]}: ")
        for part in example["parts"]:
            learned = part["learned"]
            # Lines of a text are indented, so that none passes for one of ours.
            shown = escaped(part["text"], lines=True).replace("\n", "\n    ")
            shown = shown if out.is_terminal or not learned else f"[[{shown}]]"
            text.append(shown, style="green" if learned else "dim")
        out.print(text)
