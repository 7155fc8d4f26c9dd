# SPDX-License-Identifier: Apache-2.0
"""What a calibration leaves behind: statistics by layer, in memory and as a folder."""
