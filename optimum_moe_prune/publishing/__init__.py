# SPDX-License-Identifier: Apache-2.0
"""What people see: card, report, Hub, exported plans."""
