# SPDX-License-Identifier: Apache-2.0
"""A recipe and statistics -> a plan."""
