# SPDX-License-Identifier: Apache-2.0
"""The programs that open what this package writes: what each takes of numbers of experts, and which keys it reads."""
