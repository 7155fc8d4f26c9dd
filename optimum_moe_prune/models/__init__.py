# SPDX-License-Identifier: Apache-2.0
"""A model as modules: its MoE blocks, checks, layer by layer, one layer at a time from files, unequal layers."""
