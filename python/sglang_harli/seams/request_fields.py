"""The fields of SGLang's generation and embedding requests that have been looked at.

Any client may send any of them: one that SGLang means to fill in itself can end the scheduler
(patches/06-request-fields).  A field of a new release is a line of the seam check until it stands
here, guarded or harmless.
"""

from __future__ import annotations

_BOTH = frozenset(
    [
        "audio_data",
        "background",
        "bootstrap_host",
        "bootstrap_pair_key",
        "bootstrap_port",
        "bootstrap_room",
        "conversation_id",
        "custom_labels",
        "custom_logit_processor",
        "decode_tp_size",
        "dimensions",
        "disagg_prefill_dp_rank",
        "embed_override_token_id",
        "embed_overrides",
        "encoder_urls",
        "external_trace_header",
        "extra_key",
        "http_worker_ipc",
        "image_data",
        "image_max_dynamic_patch",
        "images_config",
        "input_embeds",
        "input_ids",
        "is_cross_encoder_request",
        "log_metrics",
        "logprob_start_len",
        "lora_id",
        "lora_path",
        "max_dynamic_patch",
        "min_dynamic_patch",
        "mm_hashes",
        "modalities",
        "multi_item_delimiter_indices",
        "need_wait_for_mm_inputs",
        "no_logs",
        "num_items_assigned",
        "positional_embed_overrides",
        "priority",
        "received_time",
        "require_reasoning",
        "return_bytes",
        "return_entropy",
        "return_hidden_states",
        "return_indexer_topk",
        "return_logprob",
        "return_pooled_hidden_states",
        "return_prompt_token_ids",
        "return_routed_experts",
        "return_sampling_mask",
        "return_text_in_logprobs",
        "rid",
        "routed_dp_rank",
        "routed_experts_start_len",
        "routing_key",
        "sampling_params",
        "session_id",
        "session_params",
        "stream",
        "text",
        "token_ids_logprob",
        "top_logprobs_num",
        "use_audio_in_video",
        "video_data",
        "video_max_dynamic_patch",
    ]
)
KNOWN: dict[str, frozenset[str]] = {  # by the folders of ``sglang_versions.supported``
    "pinned": _BOTH | {"mm_data_mooncake"},
    "newest": _BOTH
    | frozenset(
        [
            "cache_salt",
            "data_parallel_rank",
            "decision_layout",
            "kv_hints",
            "max_thinking_tokens",
            "mm_content_hashes",
            "mm_processor_kwargs",
            "return_flat_raw_output_top_logprobs",
            "return_flat_raw_top_logprobs",
            "return_flat_raw_top_logprobs_b64",
            "sampling_logprobs_mode",
            "token_indices_to_pool",
            "video_config",
            "watermark",
        ]
    ),
}
