"""What becomes of a call's requests when it fails, on SGLang 0.5.23."""

ABORTS_SENT = True  # SGLang aborts those that the scheduler has (_release_req_states_on_failure)
