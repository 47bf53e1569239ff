"""The frozen surface: names that users, scripts and dashboards rely on, in one list.

Changing one means editing this list and CHANGELOG.md in the same commit.
"""

from __future__ import annotations

import ast
import dataclasses
import re

import msgspec

from sglang_harli import config, core
from sglang_harli.protocol import base_print, internal, job_limits, public
from sglang_harli.protocol.calls import files, fine_tuning
from sglang_harli.tools.doctor import examine, finding
from sglang_harli.tools.doctor.asked import Asked
from support.project_files import package_files, parse

# --harli-<name with dashes>: default.
FLAGS = {
    "finetune": "on",
    "tpot_slo_ms": 50.0,
    "ttft_slo_ms": None,
    "max_itl_ms": None,
    "max_quantum_ms": None,
    "max_idle_quantum_ms": None,
    "quantum_rows": None,
    "finetune_endpoint": "tcp://127.0.0.1:30100",
    "curve_keys": None,
    "allow_insecure_endpoint": False,
    "run_dir": "./harli-runs",
    "overlap": "auto",
    "max_train_mem": None,
    "train_reserve": None,
    "prefix_keep": 0.5,
    "profile_budget_s": 0.0,
    "parity": "refuse",
    "warm_up": "auto",
    "keep_checkpoints": 2,
    "kernels": "auto",
    "logits_mem": None,
    "max_file_size": "4GiB",
    "max_part_size": "64MiB",
    "max_files_size": "64GiB",
    "prefill_url": None,
}
LIVE_FLAGS = (
    *("tpot_slo_ms", "ttft_slo_ms", "max_itl_ms", "max_quantum_ms", "max_idle_quantum_ms"),
    "max_train_mem",
)
ENVIRONMENT = {
    *("HARLI_ON", "HARLI_ENDPOINT", "HARLI_CURVE_KEYS", "HARLI_SERVICE_CONFIG", "HARLI_FAULT_POINTS"),
    *("HARLI_POOL_DEBUG", "HARLI_POOL_BACKING", "HARLI_API_KEY", "HARLI_SGLANG_VERSION"),
}

PROTOCOL_VERSION = 1
VERBS = (
    "submit",
    "upload",
    "list",
    "get",
    "events",
    "pause",
    "resume",
    "cancel",
    "prioritize",
    "status",
    "set",
    "unsubscribe",
    "check",
)
# Of the inner endpoint, where the HTTP process asks.
FILE_VERBS = (
    *("file_append", "file_complete", "file_abort", "file_get", "file_list", "file_delete", "file_path"),
    *("part_complete", "upload_create", "upload_complete", "upload_cancel"),
)
JOB_VERBS = ("events_before", "model_delete", "checkpoints")
JOB_STATES = ["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
SUB_STATES = ["training", "yielding", "waiting_data", "waiting_memory", "checkpointing", "publishing"]
EVENT_TYPES = (
    *(
        "job_created",
        "data_validated",
        "validating",
        "data_invalid",
        "queued",
        "prioritized",
        "started",
        "step_metrics",
        "eval_metrics",
        "early_stopped",
        "checkpoint_saved",
        "paused",
    ),
    *("resumed", "sub_state", "adapter_saved", "adapter_published", "warning", "failed", "cancelled"),
    *("succeeded", "model_deleted"),
)
HYPERPARAMETERS = {
    "n_epochs": 3,
    "learning_rate": 2e-4,
    "lr_scheduler": "linear",
    "warmup_ratio": 0.0,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "lora_r": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "max_seq_length": None,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "checkpoint_every": 50,
    "seed": 42,
    "on_overflow": "error",
    "eval_steps": None,
    "eval_rows": None,
    "validation_split": 0.0,
    "early_stopping_patience": None,
    "early_stopping_min_delta": 0.0,
    "publish_best": False,
}

# Names in SGLang's /metrics, with their labels.
METRICS = {
    "harli_service_up": "",
    "harli_service_restarts_total": "",
    "harli_finetune_degraded": "",
    "harli_prefill_server_up": "url",
    "harli_prefill_adapters_missing": "url",
    "harli_jobs": "status",
    "harli_pool_bytes": "owner",
    "harli_pool_watermark_bytes": "mark",
    "harli_pool_reclaims_total": "",
    "harli_pool_reclaim_seconds": "",
    "harli_dropped_micro_batches_total": "",
    "harli_predictor_mape_ratio": "phase",
    "harli_predictor_coverage_ratio": "phase",
    "harli_predictor_upper_ratio": "phase",
    "harli_predictor_steps_total": "phase",
    "harli_parity_difference": "",
    "harli_parity_accepted": "",
    "harli_parity_ok": "",
    "harli_slack_seconds": "",
    "harli_quanta_total": "load",
    "harli_quanta_per_step": "",
    "harli_yield_seconds_total": "reason",
    "harli_slo_requests_total": "met",
    "harli_slo_attainment_ratio": "",
    "harli_requests_without_clock_total": "",
    "harli_impossible_target": "target",
}

# Checks of `harli doctor`, by which --only and scripts name them, and the fields of its JSON.
DOCTOR_CHECKS = (
    *("python", "harli", "sglang", "packages", "plugin", "environment"),
    *("http-port", "finetune-endpoint", "ephemeral-ports", "shared-memory", "sockets", "run-dir", "disk"),
    *("job-store", "finetune-service", "http-server", "curve-keys", "access"),
    *("open-files", "cores", "memory", "clock", "device", "seams", "hooks"),
)
DOCTOR_STATES = ["ok", "skipped", "warning", "problem"]
DOCTOR_REPORT = (1, "version ok asked checks", "name status found mend")

# Fields of what goes over a socket: the public messages, then those between a server's processes.
MESSAGES = {
    "Request": "v id verb args",
    "Reply": "v id ok result error event",
    "ErrorBody": "code message param details",
    "SubmitArgs": (
        "filename size sha256 suffix hyperparameters idempotency_key priority resume_from upload training_file "
        "validation_file metadata model validation_upload validation_filename validation_size validation_sha256"
    ),
    "CheckArgs": "filename size sha256 hyperparameters upload",
    "UploadArgs": "upload filename size sha256 offset",
    "UploadAnswer": "offset",
    "ListArgs": "limit after status metadata",
    "JobArgs": "job",
    "PrioritizeArgs": "job priority",
    "EventsArgs": "job after limit follow",
    "SetArgs": "values if_revision",
    "SetAnswer": "outcome revision effective message",
    "StatusAnswer": "service serving training jobs options revision pool",
    "Event": "id job created_at level type message data",
    "JobError": "code message param",
    "Job": (
        "id object created_at started_at finished_at status sub_state reason model suffix fine_tuned_model step "
        "total_steps trained_tokens loss learning_rate tokens_per_s eta_s attempt hyperparameters data error run_dir "
        "priority resumed_from base training_file validation_file metadata evaluation best_step best_valid_loss "
        "result_files deleted_models slo"
    ),
    "Slo": "tpot_slo_ms ttft_slo_ms max_itl_ms",
    "TensorRef": "name dtype shape offset nbytes",
    "SlotRef": "path nbytes tensors",
    "RunSpec": "job attempt hyperparameters total_steps memory_bytes",
    "BatchCursor": "epoch step index",
    "ServedLimits": (
        "architecture model_path tokenizer_path served_model_name dtype device vocab_size hidden_size num_layers "
        "linear_sizes max_seq_length max_lora_rank lora_target_modules train_memory_bytes logits_bytes "
        "layout space_bytes"
    ),
    "MemoryLayout": "parameter_bytes accumulated_bytes inputs input_bytes logit_bytes head_tokens",
    "BasePrint": "model path dtype math weights digest",
    "Hello": "seq pid rank limits refusal job attempt step next_cursor options revision hold base updates taken",
    "Pulse": "seq job attempt step next_cursor state_bytes has_slot snapshot stopping taken",
    "BatchesTaken": "seq job attempt cursor",
    "RunStarted": "seq job attempt step state_bytes",
    "StepDone": (
        "seq job attempt step epoch loss learning_rate grad_norm tokens target_tokens seconds total_tokens after "
        "evaluated train_mean_token_accuracy"
    ),
    "EvaluationDone": (
        "seq job attempt step epoch valid_loss valid_mean_token_accuracy rows target_tokens state full_valid_loss "
        "full_valid_mean_token_accuracy after"
    ),
    "SnapshotReady": (
        "seq job attempt step slot meta reason after evaluated train_loss train_mean_token_accuracy"
    ),
    "RunStopped": "seq job attempt step after reason evaluated",
    "RunFailed": "seq job attempt step code message after passing evaluated",
    "Progress": "seq job attempt step sub_state reason tokens",
    "StatusReport": "seq request serving training pool",
    "OptionsSet": "seq request outcome revision effective text",
    "Welcome": "seq pid answers",
    "StartRun": "seq spec scheduler updates step restore meta begin",
    "EvaluationBatches": "count sampled whole",
    "EvaluationState": "step best_step best_loss stale",
    "MicroBatch": "seq job attempt cursor micro_batches lengths rows step_target_tokens evaluation",
    "SnapshotSlot": "seq job attempt slot",
    "SnapshotSaved": "seq job attempt step ok",
    "StopRun": "seq job attempt snapshot",
    "Ack": "seq seqs",
    "StatusRequest": "seq request",
    "SetOptions": "seq request values if_revision",
    "HttpHello": "seq pid served_model_name tokenizer",
    "ServiceState": "seq pid endpoint_bound scheduler_seen refusal adapters jobs greeted_by others tokenizer_lost",
    "PublishAdapter": "seq request job name config slot folder",
    "AdapterPublished": "seq request job name ok code text passing",
    "AdapterWanted": "seq name",
    "PrefillState": "seq servers",
    "AdapterRefused": "seq name code text",
    "ExpiresAfter": "anchor seconds",
    "FileObject": "id object bytes created_at expires_at filename purpose status status_details",
    "UploadObject": "id object bytes created_at expires_at filename purpose status file",
    "UploadPart": "id object created_at upload_id",
    "FileList": "object data first_id last_id has_more",
    "FileDeleted": "id object deleted",
    "FilePath": "path bytes filename",
    "StreamAnswer": "offset",
    "FileAppendArgs": "stream offset expected part",
    "FileCompleteArgs": "stream filename purpose size sha256 expires_after idempotency_key",
    "StreamArgs": "stream",
    "FileArgs": "file",
    "FileListArgs": "purpose after limit order",
    "UploadCreateArgs": "filename purpose bytes mime_type expires_after idempotency_key",
    "PartCompleteArgs": "stream upload size sha256 idempotency_key",
    "UploadCompleteArgs": "upload part_ids md5",
    "UploadCancelArgs": "upload",
    "EventsBeforeArgs": "job before limit",
    "EventsPage": "events has_more",
    "CheckpointsArgs": "job before limit",
    "Checkpoint": "step created_at model metrics",
    "CheckpointsPage": "checkpoints has_more",
    "ModelArgs": "model",
    "ModelDeletion": "model again also",
}
# ------------------------------------------------------------------ end of the list


def structs(module) -> dict[str, type[msgspec.Struct]]:
    own = (v for v in vars(module).values() if isinstance(v, type) and issubclass(v, msgspec.Struct))
    return {v.__name__: v for v in own if v.__module__ == module.__name__ and v.__name__ != "Message"}


def test_flags():
    assert {f.name: f.default for f in dataclasses.fields(config.HarliOptions)} == FLAGS
    assert config.FLAG_PREFIX == "--harli-"
    assert config.LIVE == LIVE_FLAGS
    assert FLAGS["finetune_endpoint"] == config.DEFAULT_ENDPOINT
    assert config.MAX_FILE_BYTES == public.MAX_DATA_BYTES


def test_every_flag_explains_itself():
    for f in dataclasses.fields(config.HarliOptions):
        text = f.metadata["help"]
        assert text.endswith((".", ")")), f"--harli-{f.name}: the help is not a sentence"
        if f.name.endswith("_ms"):
            assert "milliseconds" in text, f"--harli-{f.name}: the help does not give the unit"


def test_environment_variables():
    named = {name for p in package_files() for name in re.findall(r"\bHARLI_[A-Z_]+\b", p.read_text())}
    assert named == ENVIRONMENT


def test_verbs_states_and_events():
    assert public.VERSION == PROTOCOL_VERSION
    assert public.VERBS == VERBS
    assert files.VERBS == FILE_VERBS
    assert fine_tuning.VERBS == JOB_VERBS
    assert [s.value for s in core.JobStatus] == JOB_STATES
    assert [s.value for s in core.SubState] == SUB_STATES
    assert public.EVENT_TYPES == EVENT_TYPES


def test_metrics():
    """Read from the text of the tables: importing them would need SGLang."""
    found = {}
    for path in package_files():
        for table in (node for node in ast.walk(parse(path)) if isinstance(node, ast.Dict)):
            for key, row in zip(table.keys, table.values, strict=True):
                name = key.value if isinstance(key, ast.Constant) else None
                if str(name).startswith("harli_") and isinstance(row, ast.Tuple) and len(row.elts) == 3:
                    found[name] = " ".join(ast.literal_eval(row.elts[2]))
    assert found == METRICS


def test_doctor():
    assert tuple(examine.CHECKS) == DOCTOR_CHECKS
    assert [str(status) for status in finding.Status] == DOCTOR_STATES
    report = examine.report(Asked(run_dir="."), [examine.Result("cores", finding.ok("2 cores"))])
    fields = " ".join(report), " ".join(report["checks"][0])
    assert (examine.REPORT_VERSION, *fields) == DOCTOR_REPORT


def test_hyperparameters():
    fields = msgspec.structs.fields(public.Hyperparameters)
    assert {f.name: f.default for f in fields} == HYPERPARAMETERS


def test_message_fields():
    found = {**structs(public), **structs(internal), **structs(job_limits), **structs(base_print)}
    for module in (files, fine_tuning):
        assert not found.keys() & structs(module).keys()
        found |= structs(module)
    found.pop("Hyperparameters")  # its own test
    names = {name: {f.name for f in msgspec.structs.fields(kind)} for name, kind in found.items()}
    assert names == {name: set(fields.split()) for name, fields in MESSAGES.items()}
