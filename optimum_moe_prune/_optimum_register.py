# SPDX-License-Identifier: Apache-2.0
"""Placed into ``optimum/commands/register/`` by the build, where ``optimum-cli`` looks for commands."""

from optimum_moe_prune.commands import MoEPruneCommand

REGISTER_COMMANDS = [MoEPruneCommand]
