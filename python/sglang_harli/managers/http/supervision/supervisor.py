"""HTTP process: locks the run directory, starts the finetune service and keeps it up.

The service is outside SGLang's own watchdog of subprocesses, whose answer to a death is to end the
server.  One daemon thread forks it, waits for it and forks it again: the parent-death signal that
the child asks for (child_process.py) is tied to that thread, so it ends last.
"""

from __future__ import annotations

import atexit
import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

from sglang_harli import run_paths
from sglang_harli.config import SERVICE_ENV, HarliOptions, ServiceConfig
from sglang_harli.errors import ConfigError, StateError, UnsupportedError
from sglang_harli.managers.http.supervision.endpoint_check import check_endpoint_free
from sglang_harli.platforms.cpu import engine
from sglang_harli.protocol import curve_keys, shared_memory
from sglang_harli.sglang_versions import supported

logger = logging.getLogger(__name__)

SERVICE_MODULE = "sglang_harli.service.app"
# For the service after SIGTERM: SGLang's own answer to an end is an immediate SIGKILL.
STOP_GRACE_S = 5.0
# SGLang ends by killing its children, then itself: log a death only if this process lives on.
_SETTLE_S = 0.3
_STDERR = 2


# ------------------------------------------------------------------ one server per run directory
class RunDirLock:
    """An exclusive flock on ``run_dir/lock``; the file holds the pid, for a second server's error.

    The kernel gives the lock back when the holder ends, so an old file does not matter.  Missing
    folders are made.

    Raises:
        StateError: another server holds it (its pid is named).
        UnsupportedError: the folder cannot be made, written or locked.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self.path = os.path.join(run_dir, "lock")
        try:
            os.makedirs(run_dir, mode=0o700, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UnsupportedError(
                f"--harli-run-dir {run_dir}: {error.strerror} ({error.filename}); give a folder that can be written",
                param="--harli-run-dir",
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise StateError(
                f"--harli-run-dir {run_dir} is in use by the server with pid {holder}: "
                "stop that server or give another folder",
                code="run_dir_locked",
            ) from error
        except OSError as error:
            os.close(self._fd)
            raise UnsupportedError(
                f"--harli-run-dir {run_dir} is on a file system without locks ({error.strerror}): "
                "give a folder on a local disk",
                param="--harli-run-dir",
            ) from error
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        os.close(self._fd)  # the file stays: unlinking it would let two servers lock two files of one name


# ------------------------------------------------------------------ the child
@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """Wait ``first_s`` before a restart, doubled at each death in a row, at most ``longest_s``.  A
    child that lived for ``healthy_s`` starts a new row; after ``limit`` deaths it stays down."""

    first_s: float = 0.5
    longest_s: float = 30.0
    healthy_s: float = 60.0
    limit: int = 8

    def delay_s(self, deaths: int) -> float | None:
        """The wait after the ``deaths``-th death in a row (counted from 1); None: give up."""
        if deaths >= self.limit:
            return None
        return min(self.first_s * 2 ** (deaths - 1), self.longest_s)


class Supervisor:
    """Runs ``python -m module`` as a child that dies with this process, and restarts it.

    Args:
        environment: variables of the child on top of this process's own.

    Attributes:
        pid: of the child, None while it is down; starts: how often it was started.
        gave_up: None, or why it is not (re)started any more.
    """

    def __init__(
        self, module: str, environment: dict[str, str], *, policy: RestartPolicy = RestartPolicy()
    ) -> None:
        self._module = module
        self._environment = environment
        self._policy = policy
        self._child: subprocess.Popen[bytes] | None = None
        # Orders stop() against a start in progress.  Reentrant: a signal may interrupt stop().
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="harli-supervisor", daemon=True)
        self.starts = 0
        self.gave_up: str | None = None

    @property
    def pid(self) -> int | None:
        child = self._child
        return child.pid if child is not None and child.returncode is None else None

    def start(self) -> None:
        self._thread.start()

    def give_up(self, reason: str) -> None:
        """Never start the child; instead of ``start``."""
        self.gave_up = reason
        logger.error("harli: %s; serving goes on without finetuning: restart the server", reason)

    def kill_child(self) -> None:
        """SIGKILL to a child that hangs; it is started again as after any other death."""
        with self._lock:
            if self._child is not None and not self._stopping.is_set():
                self._child.kill()  # nothing where it is gone already

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """SIGTERM, and SIGKILL after ``grace_s``; returns when the child is gone.  Repeatable."""
        with self._lock:
            self._stopping.set()
            child = self._child
        if child is None:
            return
        if grace_s:
            child.terminate()
            self._thread.join(grace_s)
        if self._thread.is_alive():
            if grace_s:
                logger.warning(
                    "harli: the finetune service did not end within %g s of SIGTERM: killed", grace_s
                )
            child.kill()
            self._thread.join()

    def _supervise(self) -> None:
        deaths = 0
        while True:
            since = time.monotonic()
            ending = self._run_once()
            if self._stopping.wait(_SETTLE_S):
                return
            lived_s = time.monotonic() - since
            deaths = 1 if lived_s >= self._policy.healthy_s else deaths + 1
            delay_s = self._policy.delay_s(deaths)
            if delay_s is None:
                self.give_up(
                    f"the finetune service ended {deaths} times in a row, the last time with {ending}"
                )
                return
            logger.warning(
                "harli: the finetune service ended with %s after %.1f s; restarting in %g s",
                ending,
                lived_s,
                delay_s,
            )
            if self._stopping.wait(delay_s):
                return

    def _run_once(self) -> str:
        """Start the child, wait for its end and say how it ended."""
        command = [
            sys.executable,
            "-m",
            "sglang_harli.managers.http.supervision.child_process",
            str(os.getpid()),
            self._module,
        ]
        with self._lock:
            if self._stopping.is_set():
                return "a stop"
            try:
                self._child = subprocess.Popen(
                    command,
                    env={**engine.without_stand_in(os.environ), **self._environment},
                    stdin=subprocess.DEVNULL,
                    stdout=_STDERR,  # stdout may be somebody's pipe; the log is stderr
                    # Out of the terminal's process group: on Ctrl-C SGLang ends in its own order.
                    start_new_session=True,
                )
            except OSError as error:  # no memory or no process left: as good as a death
                return f"a failed start ({error})"
            self.starts += 1
        logger.info("harli: finetune service started, pid %d", self._child.pid)
        code = self._child.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


# ------------------------------------------------------------------ of this server
_claimed: RunDirLock | None = None  # taken before SGLang was imported
_running: tuple[Supervisor, RunDirLock] | None = None
_graceful = False  # a signal ended it, it did not crash
_tree_ended = False


def service_environment(options: HarliOptions, args: Any) -> dict[str, str]:
    """What the service finds in its environment: its configuration, which SGLang this is, and no
    device.  ``args``: SGLang's arguments in force."""
    config = ServiceConfig(
        options=options.replace(run_dir=options.absolute_run_dir),
        served_model_name=args.served_model_name or args.model_path,
        model_path=args.model_path,
        tokenizer_path=args.tokenizer_path or args.model_path,
        trust_remote_code=bool(args.trust_remote_code),
        revision=args.revision,
        tokenizer_mode=args.tokenizer_mode,
        chat_template=args.chat_template,
        hf_chat_template_name=args.hf_chat_template_name,
        chat_template_kwargs=args.default_chat_template_kwargs or {},
        context_length=args.context_length,
    )
    return {
        SERVICE_ENV: config.to_json(),
        supported.VERSION_ENV: supported.installed(),
        "CUDA_VISIBLE_DEVICES": "",
    }


def claim(options: HarliOptions) -> None:
    """Lock the run directory if it is there, and check keys and endpoint; errors as in ``start``.
    The launcher asks before SGLang is imported, which takes a minute on a busy machine."""
    global _claimed
    if os.path.isdir(options.absolute_run_dir):  # else it is made only by a server that comes so far
        _claimed = RunDirLock(options.absolute_run_dir)
    _check(options)


def _check(options: HarliOptions) -> None:
    if options.absolute_curve_keys:
        curve_keys.check_server_folder(options.absolute_curve_keys)
    check_endpoint_free(options.finetune_endpoint)


def _lock(run_dir: str) -> RunDirLock:
    global _claimed
    lock, _claimed = _claimed, None
    if lock is not None and lock.run_dir == run_dir:
        return lock
    if lock is not None:
        lock.release()
    return RunDirLock(run_dir)


def start(options: HarliOptions, args: Any) -> None:
    """Lock the run directory and start the finetune service, before SGLang launches its processes.
    ``args``: SGLang's arguments in force.  SystemExit: run directory, endpoint or keys are
    unusable, or another server's."""
    global _running
    if not options.enabled or args.node_rank != 0:
        return
    run_dir = options.absolute_run_dir
    lock = None
    try:
        lock = _lock(run_dir)
        _check(options)
    except (ConfigError, StateError, UnsupportedError) as error:
        if lock is not None:
            lock.release()
        raise SystemExit(f"sglang-harli: {error}") from error
    supervisor = Supervisor(SERVICE_MODULE, service_environment(options, args))
    _running = supervisor, lock
    atexit.register(stop)
    shared_memory.remove_stale(run_paths.shm_dir(run_dir))
    try:
        run_paths.make_ipc_dir(run_dir)
    except OSError as error:  # another user's folder, a full disk: no reason not to serve
        supervisor.give_up(f"there is no folder for the sockets of the finetune service ({error})")
        return
    supervisor.start()


def running() -> Supervisor | None:
    """The supervisor of this server's service, if one was started in this process."""
    return None if _running is None else _running[0]


def graceful_end() -> None:
    """A signal ends the server: whatever kills its processes, the service is to finish first."""
    global _graceful
    _graceful = True


def stop_with_tree(parent_pid: int | None = None, *args: Any, **kwargs: Any) -> None:
    """Hook before SGLang's ``kill_process_tree``, by which a server ends: after SIGTERM, and when a
    process of its tree has crashed; then the service has nothing to wait for."""
    global _tree_ended
    if parent_pid in (None, os.getpid()):
        _tree_ended = True
        _end(STOP_GRACE_S if _graceful else 0.0)


def tree_ended() -> bool:
    """Whether SGLang has killed this server's processes: no scheduler answers any more."""
    return _tree_ended


def stop(*args: Any, **kwargs: Any) -> None:
    """End the service and unlock the run directory: at exit, and hook before ``Engine.shutdown``,
    which would kill the service as one of its children and see it come back."""
    _end(STOP_GRACE_S)


def _end(grace_s: float) -> None:
    global _running
    if _running is None:
        return
    supervisor, lock = _running
    _running = None
    supervisor.stop(grace_s)
    shared_memory.remove_stale(run_paths.shm_dir(lock.run_dir))  # of a run that was in training: it is memory
    lock.release()
