"""Domain-specific batch norms (Chang et al. 2019, arXiv 1906.03950) as trees: all else is shared between the domains.

Images of different domains meet nowhere but in batch norms. So a network with a set of norms for each domain is the
same network run once for each, with that domain's norms in their places.
"""

from collections.abc import Mapping
from typing import Any

from dmosnet_jax.models.functional import Tree


def norms_of(params: Tree, stats: Tree) -> Tree:
    """The part of the parameters that belongs to batch norms: to modules that have running statistics.

    Args:
        params: parameter tree of a network.
        stats: its statistics.

    Returns:
        Scale and bias of each batch norm, under the names that they have in `params`.
    """
    return {
        name: norms_of(params[name], node)
        if all(isinstance(child, Mapping) for child in node.values())
        else params[name]
        for name, node in stats.items()
    }


def with_norms(params: Mapping[str, Any], norms: Tree) -> Tree:
    """The parameters with the batch norms of another domain, as `norms_of` gives them."""
    return {
        name: node if name not in norms else with_norms(node, norms[name]) if isinstance(node, Mapping) else norms[name]
        for name, node in params.items()
    }
