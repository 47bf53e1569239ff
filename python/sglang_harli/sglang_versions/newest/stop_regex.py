"""Where SGLang 0.5.23 looks for a stop pattern."""

BEHIND_EACH_TOKEN = True  # of a step that accepts several, also where the whole has it no more
