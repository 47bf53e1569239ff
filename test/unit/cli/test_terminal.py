"""Nothing that `harli` prints steers a terminal or breaks on one, whatever the data, the names and
the streams."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sglang_harli.cli import view
from sglang_harli.client.blocking_client import FinetuneClient
from sglang_harli.core import JobStatus
from sglang_harli.protocol.escaping import escaped, json_text
from sglang_harli.protocol.public import Hyperparameters, Job
from support.cli_process import CliProcess, Done
from support.models import write_tokenizer
from support.project_files import PACKAGE, parse, relative
from support.service.service_process import ServiceProcess

pytestmark = pytest.mark.long

STEERING = "\x1b[31mred\x1b]0;owned\x07\x9b1m\u202egnp.\u2066x\u2069\x7f"
CHAT = [
    {"role": "user", "content": f"Grüße {STEERING}\nerror: fake"},
    {"role": "assistant", "content": "Möwe 👋"},
]


def steers(text: bytes) -> set[str]:
    """The characters in an output that a terminal would obey."""
    bidi = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
    shown = text.decode("utf-8", "replace")
    return {
        c for c in shown if (unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") and c != "\n") or c in bidi
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("terminal")


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    (folder / "model").mkdir()
    write_tokenizer(folder / "model", vocab_size=400)
    (folder / "model" / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 512}')
    return str(folder / "model")


@pytest.fixture(scope="module")
def cli() -> Iterator[CliProcess]:
    with CliProcess() as process:
        yield process


@pytest.fixture(scope="module")
def service(model: str) -> Iterator[ServiceProcess]:
    process = ServiceProcess(model)
    try:
        yield process.start()
    finally:
        process.close()


@pytest.fixture(scope="module")
def data(folder: Path) -> bytes:
    """A file whose name, fields and texts steer; the second line is at fault, the fourth too
    long."""
    path = os.fsencode(folder) + b"/caf\xe9 \x1b[31m\n\xe2\x80\xae.jsonl"
    rows = [
        {"messages": CHAT, STEERING: 1},
        {"messages": [{"role": STEERING, "content": "x"}]},
        {"frage\u202e": "x"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "word " * 600}]},
    ]
    Path(os.fsdecode(path)).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ------------------------------------------------------------------ the function
@given(st.text())
def test_escaped_text_only_shows(text):
    found = escaped(text)
    assert not steers(found.encode()) and "\n" not in found
    assert escaped(found) == found
    kept = escaped(text, lines=True)
    assert not steers(kept.encode()) and kept.count("\n") == text.count("\n")


@given(
    st.text(), st.sampled_from(["utf-8", "ascii", "latin-1", "no-such-encoding"]), st.sampled_from([None, 2])
)
def test_json_is_the_same_in_every_encoding(text, encoding, indent):
    value = {"text": text, "key" + text: [text, 1, None, True, 0.5]}
    found = json_text(value, encoding=encoding, indent=indent)
    assert json.loads(found) == value
    assert not steers(found.encode())
    if encoding in ("ascii", "latin-1"):
        found.encode(encoding)


def test_what_json_has_not():
    assert (
        json_text({"a": [float("nan"), float("inf")], "b": 2**80})
        == '{"a":[null,null],"b":1208925819614629174706176}'
    )


def test_ordinary_text_stays():
    text = "Grüße 👩‍👩‍👧 – „Möwe“ עברית العربية 日本語 a\\b \u00a0"
    assert escaped(text) == text


def test_commands_print_in_one_place():
    """All of it goes through ``tools.terminal``: no other module of the command line prints."""
    files = [*(PACKAGE / "cli").glob("*.py"), PACKAGE / "cli" / "view.py"]
    wrong = [
        f"{relative(path)}:{node.lineno}"
        for path in files
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]
    assert not wrong, f"print by terminal.say: {wrong}"


# ------------------------------------------------------------------ check-data
def well(done: Done, code: int) -> None:
    assert done.code == code, done.err
    assert b"Traceback" not in done.err
    assert not steers(done.out) | steers(done.err)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_check_data_on_any_terminal(cli, model, data, encoding):
    done = cli.run("check-data", data, "--model", model, encoding=encoding)
    well(done, 3)
    out, err = done.out.decode(encoding), done.err.decode(encoding)
    assert r"caf\xe9 \x1b[31m\n\u202e.jsonl: 1 rows" in out
    assert r"\x1b[31mred\x1b]0;owned\x07" in out and r"fields ignored: \x1b[31m" in out
    assert (
        "\n    error: fake" in out and "\nerror: fake" not in out
    )  # a line of the data passes for none of ours
    assert ("Möwe" if encoding != "ascii" else r"M\xf6we") in out
    assert ("👋" if encoding == "utf-8" else r"\U0001f44b") in out
    assert "line 2: message 1: field 'role' is" in err
    assert "line 4: " in err and "the limit is 512" in err
    found = cli.run("check-data", data, "--model", model, "--json", encoding=encoding)
    well(found, 3)
    report = json.loads(found.out.decode(encoding))
    assert report["file"].endswith("caf\\xe9 \x1b[31m\n\u202e.jsonl")
    assert report["examples"][0]["parts"][0]["text"].count(STEERING) == 1
    assert [row["line"] for row in report["bad_lines"]] == [2, 3, 4]


def test_no_warning_of_the_tokenizer_s_own_limit(cli, model, data):
    assert b"indexing errors" not in cli.run("check-data", data, "--model", model).err


def test_a_locale_without_utf8(model, data):
    """Where Python itself takes the terminal and file names for ASCII."""
    names = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "sglang_harli.cli", "check-data", data, "--model", model]
    for more in ([], ["--json"]):
        done = subprocess.run([*command, *more], capture_output=True, timeout=120, env=os.environ | names)
        well(Done(done.returncode, done.stdout, done.stderr), 3)
        assert b"caf\\" in done.stdout and done.stdout.isascii()


def test_a_file_that_cannot_be_read(cli, model, folder):
    os.mkfifo(folder / "pipe")
    for name, says in (
        (folder, b"is a folder: give a file"),
        (folder / "pipe", b"is a pipe: give a file"),
        ("/dev/null", b"is a device"),
        ("-", b"standard input is not read: give a file"),
        (os.fsencode(folder) + b"/missing\x1b\xe9", rb"missing\x1b\xe9 cannot be read: No such file"),
    ):
        for more in ([], ["--json"]):
            done = cli.run("check-data", os.fsencode(name), "--model", model, *more)
            well(done, 3)
            assert says in done.err
            assert not more or json.loads(done.out)["error"]["code"] == "unreadable_file"


def test_on_a_real_terminal_colours_are_ours(model, data):
    keeper, terminal = pty.openpty()
    command = [sys.executable, "-m", "sglang_harli.cli", "check-data", data, "--model", model]
    with subprocess.Popen(command, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        parts = []
        with contextlib.suppress(OSError), os.fdopen(keeper, "rb", buffering=0) as screen:  # EIO at its end
            while part := screen.read(4096):
                parts.append(part)
        assert process.wait(60) == 3
    shown = b"".join(parts).replace(b"\r\n", b"\n")
    assert re.search(rb"\x1b\[32m[^\n]*" + "Möwe 👋".encode(), shown)  # learned tokens are green
    assert not steers(re.sub(rb"\x1b\[[0-9;]*m", b"", shown))
    assert b"\x1b[31m" not in shown


def test_texts_of_a_server_are_no_markup_of_ours():
    name = "[bold]a[/bold]\x1b[31m"
    job = Job(id="ftjob-1", created_at=0, status=JobStatus.SUCCEEDED, hyperparameters=Hyperparameters())
    shown = io.StringIO()
    Console(file=shown, width=300, force_terminal=True).print(
        view.job_table([msgspec.structs.replace(job, fine_tuned_model=name)])
    )
    assert r"[bold]a[/bold]\x1b[31m" in shown.getvalue()


def test_a_list_in_a_pipe_has_a_line_for_each_job(monkeypatch: pytest.MonkeyPatch):
    job = Job(id="ftjob-1", created_at=0, status=JobStatus.RUNNING, hyperparameters=Hyperparameters())
    job = msgspec.structs.replace(job, sub_state="training", fine_tuned_model="a-long-name-" * 20)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout", shown := io.StringIO())
    view.show_jobs([job, job])
    head, *lines = shown.getvalue().splitlines()
    assert head.split()[0] == "job" and len(lines) == 2
    assert all("running (training)" in line and line.rstrip().endswith("a-long-name-" * 20) for line in lines)


@pytest.mark.parametrize(("status", "shown"), [("running", "12.50"), ("queued", "-")])
def test_a_job_that_waits_again_shows_no_rate(status: str, shown: str):
    job = Job(id="ftjob-1", created_at=0, status=JobStatus(status), hyperparameters=Hyperparameters())
    line = view.progress_line(msgspec.structs.replace(job, tokens_per_s=12.5))
    assert f"ft throughput (token/s): {shown}, " in line


# ------------------------------------------------------------------ streams
@pytest.mark.parametrize("more", [[], ["--json"]])
@pytest.mark.parametrize(
    ("streams", "code", "says"),
    [
        ({"out": "closed"}, 3, b"line 2: "),
        ({"out": "full"}, 1, b"error: the output cannot be written: No space left on device\n"),
        ({"out": "pipe"}, 141, b""),
        ({"err": "closed"}, 3, b""),
        ({"err": "full"}, 3, b""),
        ({"err": "pipe"}, 3, b""),
        ({"out": "closed", "err": "closed"}, 3, b""),
    ],
)
def test_streams_that_cannot_be_written(cli, model, data, streams, code, says, more):
    done = cli.run("check-data", data, "--model", model, *more, **streams)
    well(done, code)
    assert says in done.err and (says or not done.err or code == 3)


@pytest.mark.parametrize(
    "args", [["--version"], ["--help"], ["submit", "--help"], ["list", "--status"], ["nonsense"]]
)
def test_commands_that_need_nothing_on_streams_that_cannot_be_written(cli, args):
    for out in ("closed", "full", "pipe"):
        done = cli.run(*args, out=out)
        assert b"Traceback" not in done.err and done.code in (0, 1, 2, 141)
        assert b"Exception ignored" not in done.err


def test_a_reader_that_ends_early_ends_the_command_quietly(model, data):
    """With a real interpreter, which flushes once more at its end."""
    command = [sys.executable, "-m", "sglang_harli.cli", "check-data", os.fsdecode(data), "--model", model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.wait(120), process.stderr.read()) == (141, b"")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert (done.returncode, done.stderr) == (
        1,
        b"error: the output cannot be written: No space left on device\n",
    )


# ------------------------------------------------------------------ commands that talk to a service
ODD = [b"caf\xe9\x1b]0;owned\x07\n", "\u202ea\x1bb\n".encode()]  # no UTF-8; UTF-8


@pytest.mark.parametrize(
    "command",
    [
        ["show", "X"],
        ["watch", "X"],
        ["events", "X"],
        ["prioritize", "X", "1"],
        ["list", "--status", "X"],
        ["list", "--limit", "X"],
        ["submit", "--data", "DATA", "--suffix", "X"],
        ["submit", "--data", "DATA", "--idempotency-key", "X"],
        ["submit", "--data", "DATA", "n_epochs=", "X"],
        ["submit", "--data", "DATA", "", "X", "=3"],
        ["submit", "--data", "X"],
        ["submit", "--resume-from", "X"],
        ["set", "tpot-slo-ms=", "X"],
        ["set", "max-train-mem=", "X"],
        ["list", "--endpoint", "X"],
        ["--curve-keys", "X", "list"],
        ["check-data", "DATA", "--model", "X"],
        ["check-data", "DATA", "--model", "MODEL", "--on-overflow", "X"],
        ["make-keys", "/dev/null/", "X"],
        ["make-model", "/dev/null/", "X"],
        ["make-model", "/dev/null/a", "--arch", "X"],
        ["profile", "--url", "X"],
        ["simulate", "--trace", "X"],
        ["simulate", "--trace", "DATA", "--mode", "X"],
        ["X"],
        ["list", "X"],
    ],
    ids=" ".join,
)
def test_arguments_of_any_bytes(cli, service, model, data, command):
    words = {"X": None, "DATA": data, "MODEL": model.encode()}
    for number, odd in enumerate(ODD):
        args: list[bytes] = []
        glue = False
        for word in command:
            piece = words.get(word, word.encode())
            piece = odd if piece is None else piece
            if glue or word.startswith("="):
                args[-1] += piece
            else:
                args.append(piece)
            glue = word == "" or (word.endswith(("=", "/")) and word != "=")
        more = [b"--json"] * number
        done = cli.run(*args, *more, encoding="utf-8" if number else "ascii", HARLI_ENDPOINT=service.endpoint)
        key = "--idempotency-key" in command and odd != ODD[0]  # any text in UTF-8 is a key
        assert done.code in ((3,) if key else (1, 2, 3, 4, 6)), (args, done)
        well(done, done.code)
        assert done.err, args
        assert not (more and done.out) or "error" in json.loads(done.out) or "ok" in json.loads(done.out)


def test_a_job_whose_names_steer(cli, service, folder, data):
    path = os.fsencode(folder) + b"/good\xe9\x1b[31m.jsonl"
    Path(os.fsdecode(path)).write_text(json.dumps({"messages": CHAT, STEERING: 1}) + "\n")
    for encoding in ("utf-8", "ascii"):
        made = cli.run(
            "submit", "--data", path, "--suffix", encoding, encoding=encoding, HARLI_ENDPOINT=service.endpoint
        )
        well(made, 0)
        assert rb"file: good\xe9\x1b[31m.jsonl" in made.out
    with FinetuneClient(service.endpoint) as client:
        job = client.find("ascii")
        assert job.data["file"] == "good\\xe9\x1b[31m.jsonl"
    for command in (["show", "ascii"], ["events", "ascii"], ["list"], ["status"], ["cancel", "ascii"]):
        for more in ([], ["--json"]):
            done = cli.run(*command, *more, HARLI_ENDPOINT=service.endpoint)
            well(done, 0)
            lines = done.out.splitlines()
            assert not more or [json.loads(line) for line in lines]
    assert b"fields ignored: \\x1b" in cli.run("events", "ascii", HARLI_ENDPOINT=service.endpoint).out
    assert not steers(service.log.read_bytes())
    assert b"fields ignored: \\x1b" in service.log.read_bytes()
