# SPDX-License-Identifier: Apache-2.0
"""``python -m optimum_moe_prune``: the same commands as ``optimum-cli moe-prune``."""

import sys

if __name__ == "__main__":
    try:
        from .commands import main

        main()
    except KeyboardInterrupt:  # before a command was at work
        sys.exit(130)
