"""Every option of harli, once: its name, unit, default, help and check.  Standard library only.

``server_args.HarliServerArgs`` makes SGLang flags of them (``--harli-…``), the finetune service
gets them as JSON, and ``harli set`` changes those named in ``LIVE`` at run time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from sglang_harli import run_paths
from sglang_harli.device_sizes import sizes_of
from sglang_harli.errors import ConfigError, shown

FLAG_PREFIX = "--harli-"
# Set by the launcher, or by HarliServerArgs when a --harli- option came; children inherit it.
SWITCH_ENV = "HARLI_ON"
SWITCH_SERVE = "serve"  # its value with --harli-finetune off: only what serving needs is put in place
SWITCH_PREFILL = "prefill"  # the same on a prefill server, which also serves a decode server's adapters
ENDPOINT_ENV = "HARLI_ENDPOINT"  # the client's default endpoint
CURVE_KEYS_ENV = "HARLI_CURVE_KEYS"  # the client's default folder of keys
POOL_DEBUG_ENV = (
    "HARLI_POOL_DEBUG"  # 1: memory on its way between KV cache and training is poisoned; read once
)
DEFAULT_ENDPOINT = "tcp://127.0.0.1:30100"

_LOOPBACK = re.compile(r"^tcp://(127\.\d+\.\d+\.\d+|localhost|\[::1\]):(\d{1,5})\Z|^ipc://.+\Z")
_BARE_IPV6 = re.compile(r"^tcp://([0-9a-fA-F:.]*:[0-9a-fA-F:.]*):(\d{1,5})\Z")  # its brackets are missing
_ANY_TCP = re.compile(r"^tcp://(\[[0-9a-fA-F:.]+\]|\*|[A-Za-z0-9._-]+):(\d{1,5})\Z")
_URL = re.compile(r"^https?://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?(/[A-Za-z0-9._~/-]*)?\Z")
_SIZE = re.compile(r"^\s*([0-9]{1,24}(?:\.[0-9]{1,24})?)\s*(b|kb|mb|gb|kib|mib|gib)?\s*$", re.IGNORECASE)
MAX_SIZE = 2**60
MAX_COUNT = 1_000_000  # of rows, of checkpoints
MAX_FILE_BYTES = 4 << 30  # of a training file
# Kernels of training's own on CUDA, by family.
KERNEL_FAMILIES: tuple[str, ...] = ("head", "gated", "norm", "rotary", "lora")
GRAPHS = "graphs"  # short quanta launched as CUDA graphs
SWITCHED = (*KERNEL_FAMILIES, GRAPHS)
KERNEL_SWITCHES = ("auto", "on", "off")
_SIZES = ("max_train_mem", "train_reserve", "logits_mem", "max_file_size", "max_part_size", "max_files_size")
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def is_loopback(endpoint: str) -> bool:
    """Whether only this host reaches a ZMQ address (loopback or ipc)."""
    return _LOOPBACK.match(endpoint) is not None


def ipc_path(endpoint: str) -> str | None:
    """The path of the Unix socket behind an ``ipc://`` address; None of another address."""
    return endpoint.removeprefix("ipc://") if endpoint.startswith("ipc://") else None


def parse_size(text: str) -> int:
    """Bytes from ``"512MiB"``, ``"1.5gb"`` or a plain number; ConfigError: none, or above 1 EiB."""
    match = _SIZE.match(text)
    if match is None:
        raise ConfigError(
            f"{shown(text)} is not a size: give bytes or a number with KB, MB, GB, KiB, MiB or GiB"
        )
    size = int(Fraction(match[1]) * _UNITS[(match[2] or "b").lower()])
    if size > MAX_SIZE:
        raise ConfigError(f"{shown(text)} is not accepted: give at most 1073741824GiB")
    return size


def show_size(count: int) -> str:
    """1.5 GiB, 20.0 MiB, 12 B."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def kernel_switches(text: Any) -> dict[str, str] | None:
    """The switch of each of ``SWITCHED`` by the value of ``--harli-kernels``; None: not
    accepted."""
    if text in KERNEL_SWITCHES:
        return dict.fromkeys(SWITCHED, text)
    found: dict[str, str] = dict.fromkeys(SWITCHED, "auto")
    named = [part.strip().partition("=") for part in str(text).split(",")]
    for family, _, switch in named:
        if family not in SWITCHED or switch not in KERNEL_SWITCHES:
            return None
        found[family] = switch
    return found if len({family for family, _, _ in named}) == len(named) else None


def _option(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class HarliOptions:
    """Resolved options of one server.  Field ``x_y`` is the flag ``--harli-x-y``.  Raises
    ConfigError, naming the flag, the value and what is accepted."""

    finetune: str = _option("on", "Accept finetune jobs; off serves as plain SGLang.", choices=("on", "off"))
    tpot_slo_ms: float = _option(50.0, "Target time per output token, milliseconds.")
    ttft_slo_ms: float | None = _option(None, "Target time to first token, milliseconds (default: none).")
    max_itl_ms: float | None = _option(
        None, "Cap on any single gap between tokens, milliseconds (default: none)."
    )
    max_quantum_ms: float | None = _option(
        None,
        "Upper bound of a training quantum while a request runs or waits, milliseconds "
        "(default: twice the TPOT target, or less if --harli-max-itl-ms or --harli-ttft-slo-ms asks for it).",
    )
    max_idle_quantum_ms: float | None = _option(
        None,
        "Upper bound of a training quantum while nothing is served, milliseconds "
        "(default: 250, or half of --harli-ttft-slo-ms).",
    )
    quantum_rows: int | None = _option(
        None,
        "Fix the rows in every training quantum, for bit-identical reruns (default: chosen per quantum).",
    )
    finetune_endpoint: str = _option(
        DEFAULT_ENDPOINT,
        "ZMQ address of the finetune service: loopback (tcp://127.0.0.1:PORT) or ipc://PATH; another one needs "
        "--harli-curve-keys.",
    )
    curve_keys: str | None = _option(
        None,
        "Folder with server.key_secret and clients/*.key: only these clients may connect, encrypted by CURVE "
        "(harli make-keys makes one; default: none).",
    )
    allow_insecure_endpoint: bool = _option(
        False,
        "Let --harli-finetune-endpoint leave loopback without keys: everyone who can reach it may submit jobs.",
    )
    run_dir: str = _option("./harli-runs", "Folder of jobs, data, checkpoints and adapters; one server each.")
    overlap: str = _option(
        "auto",
        "SGLang's overlap scheduling: auto is off on the CPU engine and SGLang's default elsewhere.",
        choices=("auto", "on", "off"),
    )
    max_train_mem: str | None = _option(
        None,
        "Most memory of the KV pool that may be lent to training, such as 2GiB (default: all that the pool can "
        "lend). Where the pool cannot lend it is training's own memory beside it (default then: 10% of the "
        "device's, at most 8GiB on a CPU).",
    )
    train_reserve: str | None = _option(
        None,
        "Memory outside the KV pool for what training needs besides what is lent to it, such as a layer's "
        "working set (default: 256MiB on a CPU, 1GiB on a CUDA device).",
    )
    prefix_keep: float = _option(
        0.5,
        "Share of the KV pool, 0 to 1, that cached prefixes keep: training may have the rest evicted. One that no "
        "request has used for a minute is not kept against what a job needs at least.",
    )
    profile_budget_s: float = _option(
        0.0,
        "Most seconds that a start may spend on measuring decode steps and prefills, where no latency profile for "
        "this server is there; the server is healthy after that. 0: none, it learns while it serves.",
    )
    parity: str = _option(
        "refuse",
        "What follows where training does not compute what serving computes, compared on one prompt once the server "
        "is healthy: refuse lets jobs wait, warn only says so, off does not compare.",
        choices=("refuse", "warn", "off"),
    )
    warm_up: str = _option(
        "auto",
        "Run a tiny finetune job before the server is healthy, so that no request waits for the first use of training's "
        "kernels: auto does so on a GPU.",
        choices=("auto", "on", "off"),
    )
    keep_checkpoints: int = _option(
        2,
        "How many checkpoints of each job stay on the disk, after its end too, besides the best one by its evaluation.",
    )
    kernels: str = _option(
        "auto",
        "Training's own Triton kernels on a CUDA device: auto uses those that compute what torch's do, compared at "
        "the start; on uses them uncompared, off uses torch's. Or by family, such as head=off,lora=on: head, gated, "
        "norm, rotary, lora; those that are not named are auto.",
    )
    logits_mem: str | None = _option(
        None,
        "Largest logits tensor of a training step; the loss is chunked to fit it (default: 64MiB on a CPU, 512MiB on "
        "a CUDA device).",
    )
    max_file_size: str = _option("4GiB", "Largest file that /v1/files and /v1/uploads take.")
    max_part_size: str = _option("64MiB", "Largest part of an upload that /v1/uploads takes.")
    max_files_size: str = _option(
        "64GiB", "Most bytes of all files and parts of uploads together; 64MiB of the disk stay free besides."
    )

    prefill_url: tuple[str, ...] | None = _option(
        None,
        "On a decode server: the prefill servers that send it KV, each http://HOST:PORT; may be repeated. A finished "
        "adapter is loaded on all of them before it answers (default: none, and adapters do not answer).",
    )

    def __post_init__(self) -> None:
        self._check_prefill_urls()
        for f in dataclasses.fields(self):
            choices = f.metadata["choices"]
            if choices and getattr(self, f.name) not in choices:
                raise _bad(f.name, getattr(self, f.name), "one of " + ", ".join(choices))
        for name in LIVE_MS:
            value = getattr(self, name)
            missing = value is None and name == "tpot_slo_ms"  # the one target that is always there
            if missing or (value is not None and not (_is_number(value) and 0 < value <= 3_600_000)):
                raise _bad(name, value, "a number of milliseconds above 0 and at most 3,600,000")
        if self.quantum_rows is not None:
            self._check_count("quantum_rows")
        self._check_count("keep_checkpoints")
        if kernel_switches(self.kernels) is None:
            families = ", ".join(SWITCHED)
            accepted = f"{', '.join(KERNEL_SWITCHES)}, or family=one of them, by commas; families: {families}"
            raise _bad("kernels", self.kernels, accepted)
        self._check_endpoint()
        if not self.run_dir:
            raise _bad("run_dir", self.run_dir, "a folder")
        if not (_is_number(self.prefix_keep) and 0 <= self.prefix_keep <= 1):
            raise _bad("prefix_keep", self.prefix_keep, "a share from 0 to 1")
        if not (_is_number(self.profile_budget_s) and 0 <= self.profile_budget_s <= 3600):
            raise _bad("profile_budget_s", self.profile_budget_s, "a number of seconds from 0 to 3600")
        for name in _SIZES:
            self._check_size(name)
        if self.file_bytes > MAX_FILE_BYTES:
            raise _bad("max_file_size", self.max_file_size, "a size of at most 4GiB, which a job can read")

    def _check_prefill_urls(self) -> None:
        given = self.prefill_url
        if given is None:
            return
        urls = (given,) if isinstance(given, str) else tuple(given)  # JSON and --config have lists
        object.__setattr__(self, "prefill_url", urls or None)
        for url in urls:
            if not isinstance(url, str) or not _URL.match(url):
                raise _bad(
                    "prefill_url", url, "the address of a server, http://HOST:PORT or https://HOST:PORT"
                )
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise _bad("prefill_url", ", ".join(urls), "each prefill server once")

    def _check_count(self, name: str) -> None:
        value = getattr(self, name)
        if not (_is_number(value) and int(value) == value and 1 <= value <= MAX_COUNT):
            raise _bad(name, value, f"an integer of at least 1 and at most {MAX_COUNT:,}")

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        match = _SIZE.match(value) if isinstance(value, str) else None
        if match is None:
            raise _bad(name, value, "a size such as 512MiB or 2GB (KB, MB, GB, KiB, MiB or GiB)")
        if not 2**20 <= Fraction(match[1]) * _UNITS[(match[2] or "b").lower()] <= MAX_SIZE:
            raise _bad(name, value, "a size of at least 1MiB and at most 1073741824GiB")

    def _check_endpoint(self) -> None:
        path = ipc_path(self.finetune_endpoint)
        if path is not None and not run_paths.fits_socket(path):
            raise _bad(
                "finetune_endpoint",
                self.finetune_endpoint,
                f"a path of at most {run_paths.MAX_SOCKET_PATH} bytes behind ipc:// (this one has "
                f"{len(os.fsencode(path))}), which is what a Unix socket can have",
            )
        bare = _BARE_IPV6.match(self.finetune_endpoint)
        if bare is not None:
            form = f"tcp://[{bare[1]}]:{bare[2]}"
            raise _bad("finetune_endpoint", self.finetune_endpoint, f"an IPv6 address in brackets: {form}")
        match = _LOOPBACK.match(self.finetune_endpoint)
        if match is None and (self.curve_keys or self.allow_insecure_endpoint):
            match = _ANY_TCP.match(self.finetune_endpoint)
        if match is None or (match[2] and not 0 < int(match[2]) < 65536):
            raise _bad(
                "finetune_endpoint",
                self.finetune_endpoint,
                "tcp://127.0.0.1:PORT or tcp://[::1]:PORT (loopback only), or ipc://PATH; for another address also --harli-curve-keys "
                "FOLDER (harli make-keys makes one), or --harli-allow-insecure-endpoint",
            )

    # ---- resolved values
    @property
    def enabled(self) -> bool:
        return self.finetune == "on"

    @property
    def busy_quantum_ms(self) -> float:
        """The bound while a request is running or waiting."""
        if self.max_quantum_ms is not None:
            return self.max_quantum_ms
        bounds = [2 * self.tpot_slo_ms]
        if self.max_itl_ms is not None:
            bounds.append(self.max_itl_ms)
        if self.ttft_slo_ms is not None:
            bounds.append(self.ttft_slo_ms / 2)
        return min(bounds)

    @property
    def idle_quantum_ms(self) -> float:
        """The bound while nothing is served: the longest that a prompt at an idle server waits."""
        if self.max_idle_quantum_ms is not None:
            return self.max_idle_quantum_ms
        return 250.0 if self.ttft_slo_ms is None else min(250.0, self.ttft_slo_ms / 2)

    @property
    def kernel_switches(self) -> dict[str, str]:
        """auto, on or off for each of ``SWITCHED``."""
        switches = kernel_switches(self.kernels)
        assert switches is not None  # checked when this was made
        return switches

    def logits_bytes(self, device: str) -> int:
        """The largest logits tensor on a kind of device, such as ``"cuda"``."""
        return sizes_of(device).logits_bytes if self.logits_mem is None else parse_size(self.logits_mem)

    @property
    def file_bytes(self) -> int:
        """Most bytes of one file that comes over HTTP."""
        return parse_size(self.max_file_size)

    @property
    def part_bytes(self) -> int:
        """Most bytes of a part of an upload."""
        return parse_size(self.max_part_size)

    @property
    def all_files_bytes(self) -> int:
        """Most bytes of all files and parts together."""
        return parse_size(self.max_files_size)

    @property
    def max_train_bytes(self) -> int | None:
        """Cap on what the pool lends; None: all that it can."""
        return None if self.max_train_mem is None else parse_size(self.max_train_mem)

    def reserve_bytes(self, cpu: bool) -> int:
        """What stays outside the pool for training."""
        if self.train_reserve is not None:
            return parse_size(self.train_reserve)
        return sizes_of("cpu" if cpu else "cuda").reserve_bytes

    def train_bytes(self, device_bytes: int, cpu: bool) -> int:
        """Training's own budget where the KV pool cannot lend, of ``device_bytes`` of memory."""
        if self.max_train_mem is not None:
            return parse_size(self.max_train_mem)
        share = device_bytes // 10
        return min(share, 8 * 2**30) if cpu else share

    def replace(self, **changes: Any) -> HarliOptions:
        return dataclasses.replace(self, **changes)

    # ---- travel
    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> HarliOptions:
        return cls(**json.loads(text))

    @property
    def absolute_curve_keys(self) -> str | None:
        return self.curve_keys and os.path.abspath(os.path.expanduser(self.curve_keys))

    @property
    def absolute_run_dir(self) -> str:
        return os.path.abspath(os.path.expanduser(self.run_dir))

    @property
    def profile_path(self) -> str:
        """The file of measured latencies, read once when a server starts."""
        return os.path.join(self.absolute_run_dir, "latency-profile.json")


# Options that `harli set` changes at run time: those of latency, in milliseconds, and a size.
LIVE_MS = ("tpot_slo_ms", "ttft_slo_ms", "max_itl_ms", "max_quantum_ms", "max_idle_quantum_ms")
LIVE = (*LIVE_MS, "max_train_mem")
LiveValue = float | str | None  # of one of them: milliseconds, a size, or none


def parse_live(name: str, text: str) -> tuple[str, LiveValue]:
    """One ``name=value`` of ``harli set`` as (field name, value); ``none`` clears an optional one.
    Raises ConfigError for an unknown name (the accepted ones are listed) or value."""
    key = name.replace("-", "_")
    if key not in LIVE:
        known = ", ".join(n.replace("_", "-") for n in LIVE)
        raise ConfigError(f"{shown(name)} cannot be set while the server runs; accepted: {known}", param=name)
    if text.lower() == "none" and key != "tpot_slo_ms":
        return key, None
    value: LiveValue = text
    if key in LIVE_MS:
        try:
            value = float(text)
        except ValueError as error:
            raise ConfigError(
                f"{name}={shown(text)} is not accepted: give a number of milliseconds above 0 and at most 3,600,000",
                param=name,
            ) from error
    HarliOptions().replace(**{key: value})  # the same check as at start-up
    return key, value


def contradiction(max_itl_ms: float | None, tpot_slo_ms: float) -> str | None:
    """Why these options cannot be in force together, or None."""
    if max_itl_ms is not None and max_itl_ms < tpot_slo_ms:
        return f"max-itl-ms={max_itl_ms:g} is below tpot-slo-ms={tpot_slo_ms:g}: every token would miss it"
    return None


def _is_number(value: Any) -> bool:
    """Finite; values also come over the wire, where a text may stand."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _bad(name: str, value: Any, accepted: str) -> ConfigError:
    flag = FLAG_PREFIX + name.replace("_", "-")
    return ConfigError(f"{flag} {shown(value)} is not accepted: give {accepted}", param=flag)


@dataclass(frozen=True, kw_only=True)
class TokenizerFlags:
    """SGLang's flags for the tokenizer, the chat template and the length of a row; paths are
    folders or hub ids.  ``chat_template_kwargs`` are ``--default-chat-template-kwargs``."""

    model_path: str
    tokenizer_path: str
    trust_remote_code: bool = False
    revision: str | None = None
    tokenizer_mode: str = "auto"
    chat_template: str | None = None
    hf_chat_template_name: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    context_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class ServiceConfig(TokenizerFlags):
    """The finetune service's configuration, one JSON document in the environment (SERVICE_ENV)."""

    options: HarliOptions
    served_model_name: str

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ServiceConfig:
        values = json.loads(text)
        return cls(**{**values, "options": HarliOptions(**values["options"])})


SERVICE_ENV = "HARLI_SERVICE_CONFIG"
