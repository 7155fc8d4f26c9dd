# SPDX-License-Identifier: Apache-2.0
"""GGUF files, as llama.cpp reads them: experts are cut as blocks of bytes, whatever they are quantised to."""
