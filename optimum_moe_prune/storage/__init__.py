# SPDX-License-Identifier: Apache-2.0
"""How things come to lie on disk: whole or absent, growing and resumed, safetensors headers, JSON values."""
