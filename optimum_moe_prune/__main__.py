# SPDX-License-Identifier: Apache-2.0
"""``python -m optimum_moe_prune``: the same commands as ``optimum-cli moe-prune``."""

from .commands import main

if __name__ == "__main__":
    main()
