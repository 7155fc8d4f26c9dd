# SPDX-License-Identifier: Apache-2.0
"""What is lost: losses, divergences, sensitivities, benchmark tasks, speed."""
