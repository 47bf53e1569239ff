"""Where SGLang 0.5.16 looks for a stop pattern."""

BEHIND_EACH_TOKEN = False  # of a step that accepts several, only where the whole has it too
