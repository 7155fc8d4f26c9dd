# SPDX-License-Identifier: Apache-2.0
"""``python -m optimum_moe_prune``: the same commands as ``optimum-cli moe-prune``."""

import sys

from .environment import check_packages
from .errors import RequestError

if __name__ == "__main__":
    try:
        from .commands import main
    except ImportError:
        try:
            check_packages()  # what reads the command line is one of them
        except RequestError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        raise
    try:
        main()
    except KeyboardInterrupt:  # before a command was at work
        print("interrupted: nothing was begun", file=sys.stderr)
        sys.exit(130)
