"""SGLang's arguments with ours added, and the defaults that finetuning and the CPU engine need.

Leans on SGLang: ``server_args.ServerArgs`` through ``sglang_versions``, ``arg_groups.arg_utils``
(A, Arg) and ``utils.common`` (get_device, kill_itself_when_parent_died).

The plugin puts ``HarliServerArgs`` in the place of ``ServerArgs`` in every process.  SGLang's
registry then rebinds ``ServerArgs`` everywhere: the base class is only reached through ``super()``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import typing
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from sglang.srt.arg_groups.arg_utils import A, Arg
from sglang.srt.utils.common import get_device, kill_itself_when_parent_died

from sglang_harli.architectures import ALL_LINEAR
from sglang_harli.config import SWITCH_ENV, SWITCH_PREFILL, SWITCH_SERVE, HarliOptions
from sglang_harli.errors import ConfigError, HarliError, UnsupportedError
from sglang_harli.platforms.cpu import defaults as cpu_defaults
from sglang_harli.platforms.cpu import engine
from sglang_harli.sglang_versions import supported
from sglang_harli.sglang_versions.current import arguments

logger = logging.getLogger(__name__)

PREFIX = "harli_"
# Twice to four times a job's default rank; each of SGLang's adapter slots has this rank.
MAX_LORA_RANK_CPU = 32
MAX_LORA_RANK_DEVICE = 64
LOADED_LORAS = (
    "each more stays in host memory; the least recently used is unloaded, and loaded again when asked for"
)


def _on_off(text: str) -> str:
    """YAML reads a bare ``on`` or ``off`` as a boolean: ``--config`` passes true or false."""
    return {"true": "on", "false": "off"}.get(text, text)


def _annotation(option: dataclasses.Field[Any], type_: Any) -> Any:
    """One option as SGLang declares its flags; None stands for 'not given'."""
    help_ = option.metadata["help"]
    if option.default is not None:
        help_ = f"{help_.rstrip('.')} (default: {option.default})."
    if option.name == "prefill_url":  # extend: repeated, or several at once
        many = {"nargs": "+", "type": str, "metavar": "URL"}
        arg = Arg(help=help_.replace("%", "%%"), action="extend", action_kwargs=many)
        return A[typing.Optional[list[str]], arg]  # noqa: UP045
    choices = option.metadata["choices"]
    parser = _on_off if (choices and "on" in choices) or option.name == "kernels" else None
    arg = Arg(help=help_.replace("%", "%%"), choices=list(choices) if choices else None, type_parser=parser)
    return A[typing.Optional[type_], arg]  # noqa: UP045  (SGLang's flag builder unwraps this form)


def _bare_type(type_: Any) -> Any:
    inner = [t for t in typing.get_args(type_) if t is not type(None)]
    return inner[0] if inner else type_


_TYPES = typing.get_type_hints(HarliOptions)
_FIELDS = [
    (PREFIX + f.name, _annotation(f, _bare_type(_TYPES[f.name]))) for f in dataclasses.fields(HarliOptions)
]


@dataclasses.dataclass(frozen=True)
class Seam:
    """What the plugin contributes to the arguments (it stands above this module).

    Attributes:
        refuse_flags, refuse_model: raise UnsupportedError for what finetuning does not work with:
            arguments before SGLang resolves them, and the model once it is known.
        check_lora_paths: the same for --lora-paths, with finetuning on or off.
        install: puts the rest of the table in place, once the switch is on.
    """

    refuse_flags: Callable[[Any], None]
    refuse_model: Callable[[Any], None]
    check_lora_paths: Callable[[Any], None]
    install: Callable[[], None]


class HarliServerArgs(arguments.with_fields("HarliFields", __name__, _FIELDS)):
    """``ServerArgs`` with one field ``harli_x`` for each option ``x`` of ``HarliOptions``.

    With no such option given, and the switch off, it does nothing.  Any option turns the switch on
    (an environment variable, which children inherit); then the options are checked, what finetuning
    does not support is refused, and needed defaults are filled in and logged.

    SystemExit, with one sentence: an option, argument or model that is not accepted (SGLang logs
    and swallows any other exception of a plugin's).
    """

    seam: ClassVar[Seam | None] = None
    _announced: ClassVar[set[str]] = set()

    def unpickled(self, parent: int) -> None:
        """A process that SGLang spawns has imported for seconds, and does not die with its parent
        yet: SystemExit if the server was killed meanwhile, or it would stay for good."""
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            kill_itself_when_parent_died()
            if os.getppid() != parent:
                raise SystemExit(f"sglang-harli: the server (pid {parent}) ended while its child started")

    def harli_options(self) -> HarliOptions:
        """The options in force (all defaults where none was given); ConfigError: a bad value."""
        return HarliOptions(**self._given())

    @property
    def harli_on(self) -> bool:
        """Whether any option came, here or from the launcher, so that harli takes part."""
        return self.harli_finetune is not None  # resolved for good by before_resolution

    def _given(self) -> dict[str, Any]:
        names = (field.name for field in dataclasses.fields(HarliOptions))
        values = {name: getattr(self, PREFIX + name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    # ---- the steps of resolution (sglang_versions)
    def before_resolution(self) -> None:
        given = self._given()
        if not given and not os.environ.get(SWITCH_ENV):
            return
        with _in_one_sentence():
            options = HarliOptions(**given)
            os.environ[SWITCH_ENV] = self._switch(options)
            for field in dataclasses.fields(options):
                setattr(self, PREFIX + field.name, getattr(options, field.name))
            self._prepare(options)

    def before_memory(self) -> None:
        # The first place where the device is known and the model's config may be read.
        args = arguments.in_force(self)
        if self.harli_on and args.device == "cpu":
            self._keep_float32()
            model = functools.partial(arguments.model_config, self)
            for name, value, reason in cpu_defaults.kv_pool(args, model):
                self._default(name, value, reason)

    def after_resolution(self) -> None:
        if not self.harli_on:
            return
        options = self.harli_options()
        with _in_one_sentence():
            if self.seam and options.enabled:
                self.seam.refuse_model(self)
            if self.seam:
                self.seam.check_lora_paths(self)
        values = ", ".join(f"{f.name}={getattr(options, f.name)!r}" for f in dataclasses.fields(options))
        bounds = (
            f"bound of a quantum (ms) busy: {options.busy_quantum_ms:g}, idle: {options.idle_quantum_ms:g}"
        )
        self._announce(f"harli options: {values}; {bounds}")

    def ready(self) -> None:
        if self.harli_on and self.seam:
            self.seam.install()

    def _switch(self, options: HarliOptions) -> str:
        if options.enabled:
            return "1"
        return SWITCH_PREFILL if self.disaggregation_mode == "prefill" else SWITCH_SERVE

    # ---- what is chosen
    def _prepare(self, options: HarliOptions) -> None:
        self._choose_device()
        if self.seam and options.enabled:
            self.seam.refuse_flags(self)
        cpu = (self.device or "").split(":")[0] == "cpu"
        if cpu:
            decodes = self.disaggregation_mode == "decode"
            more = supported.only("newest", cpu_defaults.DECODE_SERVER) if decodes else ()
            for name, value, reason in (*cpu_defaults.BEFORE_MODEL, *more):
                self._default(name, value, reason)
        self._choose_overlap(options, cpu)
        serves_lora = options.enabled or self._switch(options) == SWITCH_PREFILL
        if cpu and (serves_lora or self.enable_lora or self.lora_paths):
            self._default("lora_backend", "torch_native", cpu_defaults.TORCH_LORA, unset="csgmv")
        if options.prefill_url and self.disaggregation_mode != "decode":
            raise ConfigError(
                "--harli-prefill-url is for a decode server of a pair: give --disaggregation-mode decode, or drop it",
                param="--harli-prefill-url",
            )
        if serves_lora:
            self._enable_lora(cpu)

    def _choose_device(self) -> None:
        if engine.is_on():
            cpu_defaults.require_kernels()
            self._default("device", "cpu", f"{engine.CPU_ENGINE_ENV}=1")
        elif (self.device or "").split(":")[0] == "cpu":
            raise UnsupportedError(f"--device cpu: {cpu_defaults.USE_THE_LAUNCHER}")
        elif self.device is None:
            try:
                get_device()  # SGLang asks the same, and would end in a traceback
            except RuntimeError as error:
                raise UnsupportedError(f"no CUDA device: {cpu_defaults.USE_THE_LAUNCHER}") from error

    def _choose_overlap(self, options: HarliOptions, cpu: bool) -> None:
        if options.overlap == "on" and self.disable_overlap_schedule:
            raise ConfigError("--harli-overlap on contradicts --disable-overlap-schedule: drop one of them")
        if options.overlap == "off" or (options.overlap == "auto" and cpu):
            reason = "--harli-overlap off" if options.overlap == "off" else cpu_defaults.NO_OVERLAP
            self._default("disable_overlap_schedule", True, reason, unset=False)

    def _enable_lora(self, cpu: bool) -> None:
        if self.enable_lora is False:
            raise ConfigError(
                "finetuned adapters need SGLang's LoRA serving, which enable_lora=False turns off"
            )
        self._default("enable_lora", True, "finetuned adapters are served at once")
        self._default("max_loaded_loras", self._loaded_loras(), LOADED_LORAS)
        if self.lora_paths and not (self.max_lora_rank and self.lora_target_modules):
            return  # SGLang sizes its slots by the adapters given; jobs that do not fit are refused
        rank = MAX_LORA_RANK_CPU if cpu else MAX_LORA_RANK_DEVICE
        self._default("max_lora_rank", rank, "holds jobs of the default rank, 16, and larger ones")
        # The embedding and the head are left out on purpose.
        self._default("lora_target_modules", list(ALL_LINEAR), "all linear layers of attention and MLP")

    def _loaded_loras(self) -> int:
        """Room for what is given at start and as many again as a batch takes."""
        twice = 2 * self.max_loras_per_batch  # with overlap loading SGLang takes no more
        given = len(self.lora_paths or ())
        return twice if self.enable_lora_overlap_loading else max(twice, given + twice // 2)

    def _keep_float32(self) -> None:
        """SGLang's ``--dtype auto`` serves a float32 model in float16."""
        auto = arguments.in_force(self).dtype == "auto"
        if auto and cpu_defaults.is_float32(arguments.model_config(self)):
            self._default("dtype", "float32", cpu_defaults.KEEP_FLOAT32, unset="auto")
            arguments.forget_model_config(self)

    def _default(self, name: str, value: Any, reason: str, *, unset: Any = None) -> None:
        """Set an argument that the operator left at SGLang's own default, and say why."""
        if getattr(arguments.in_force(self), name) == unset:
            arguments.set_default(self, name, value)
            flag = "--" + name.replace("_", "-")
            text = " ".join(value) if isinstance(value, list) else value
            self._announce(f"harli default: {flag}{'' if value is True else f' {text}'} ({reason})")

    def _announce(self, line: str) -> None:
        # dataclasses.replace() resolves once more; say each thing once.
        if line not in self._announced:
            self._announced.add(line)
            logger.info("%s", line)


@contextlib.contextmanager
def _in_one_sentence() -> Iterator[None]:
    try:
        yield
    except HarliError as error:
        raise SystemExit(f"sglang-harli: {error}") from error
