"""What becomes of a call's requests when it fails, on SGLang 0.5.16."""

ABORTS_SENT = False  # those that the scheduler has run on, and nobody reads their results
