# SPDX-License-Identifier: Apache-2.0
"""Text in, statistics out."""
