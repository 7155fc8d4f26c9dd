# SPDX-License-Identifier: Apache-2.0
"""Names that users and files know: of files in an output, and of allocations."""

# Files in an output.

PLAN_NAME = "moe_pruning_plan.json"
CONFIG_NAME = "moe_pruner_config.json"
"""The recipe."""
STATS_NAME = "stats.json"
LIST_NAME = ".moe_pruning_files.json"
"""Which files this package wrote into a pruned checkpoint; hidden, since it is of no use elsewhere."""
EVALUATION_NAME = "moe_evaluation.json"
CARD_NAME = "README.md"
BASE_CARD_NAME = "README.base.md"
"""Where the card of the model before pruning is kept."""
NEW_CARD_NAME = "README.new.md"
"""A new card, beside one that was edited by hand."""
REPORT_NAME = "report.html"
REPORT_PICTURES = "report_pictures"

STANDALONE_STEM = "modeling_unequal_moe"
"""The code that loads a checkpoint whose layers differ without this package; ``architectures/unequal.py`` says it too,
since it travels."""

# How a budget is spread over the layers.
UNIFORM = "uniform"
GLOBAL = "global"
BY_SENSITIVITY = "sensitivity"

# What becomes of heads for further tokens (MTP).
PRUNE = "prune"
KEEP = "keep"
DROP = "drop"

NOTES_LOGGER = "optimum_moe_prune.notes"
"""Where what a person must know of a plan is logged, when it is made."""
