# SPDX-License-Identifier: Apache-2.0
"""A model as files: where it comes from, its tensors, where experts lie, and how they are cut out."""
