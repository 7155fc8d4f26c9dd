# SPDX-License-Identifier: Apache-2.0
"""A plan -> a smaller model, in memory or from file to file."""
