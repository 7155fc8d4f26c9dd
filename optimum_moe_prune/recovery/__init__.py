# SPDX-License-Identifier: Apache-2.0
"""Giving back some of what the cut cost, by changing weights that are retained."""
