# SPDX-License-Identifier: Apache-2.0
"""Architecture rows, how their routers choose, and layers with different numbers of experts."""

from .spec import MoESpec
from .table import architecture_of, list_architectures, register_architecture

__all__ = ["MoESpec", "architecture_of", "list_architectures", "register_architecture"]
