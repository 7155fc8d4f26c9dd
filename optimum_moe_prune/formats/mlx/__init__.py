# SPDX-License-Identifier: Apache-2.0
"""MLX folders, as ``mlx_lm.convert`` writes and mlx-lm opens them: all experts of a projection in one tensor."""
