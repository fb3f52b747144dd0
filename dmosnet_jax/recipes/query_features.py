"""What `config.eval` chooses at test time: mirror images, several images of a query, query expansion."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dmosnet_jax.core.errors import ConfigError, DataError
from dmosnet_jax.core.parallel import print_once
from dmosnet_jax.data.records import MULTI_QUERY
from dmosnet_jax.data.splits import Split, conversion_command, load_split, split_names
from dmosnet_jax.evaluation import queries


class QueryFeatures:
    """How a data set's query features come from those of its images.

    Attributes:
        choices: what differs from one feature of one image a query, for `results.json`; empty by default.
        more: further images to extract, of which `__call__` gets the features.
    """

    def __init__(self, config: Any, query: Split, gallery: Split):
        """Opens what the choices need.

        Raises:
            ConfigError: a query is to be expanded by more images than the gallery has.
            DataError: no query has several images, or their split is damaged.
        """
        chosen = config.eval
        self.more: list[Split] = []
        self.choices: dict[str, Any] = {"flip": True} if chosen.flip else {}
        self._query = query
        if chosen.multi_query:
            self.choices["multi_query"] = self._open_images(config)
        self._expansion: dict[str, Any] = {}
        if chosen.query_expansion:
            if chosen.query_expansion > len(gallery):
                raise ConfigError(
                    f"eval.query_expansion={chosen.query_expansion}: {query.name} has {len(gallery)} gallery images: "
                    "use fewer"
                )
            self._expansion = {"neighbours": chosen.query_expansion, "alpha": chosen.expansion_alpha}
            self.choices["query_expansion"] = dict(self._expansion)

    def _open_images(self, config: Any) -> dict[str, Any]:
        query, images = self._query, self._query
        if MULTI_QUERY in split_names(config.data_dir, query.name):
            images = load_split(config.data_dir, query.name, MULTI_QUERY)
            self.more = [images]
        groups, own = queries.same_person_and_camera(query.pids, query.camids, images.pids, images.camids)
        least = 1 if self.more else 2
        sizes = np.bincount(groups[groups >= 0], minlength=max(own.max(), 0) + 1)
        several = int(((own >= 0) & (sizes[own] >= least)).sum())
        if not several:
            raise DataError(
                f"{query.name} in {config.data_dir} has no further images of its queries, so that "
                "eval.multi_query=True would be single query: convert it again from a source with gt_bbox "
                f"({conversion_command(query.name, config.data_dir)} --overwrite), or leave it out"
            )
        if not self.more:
            print_once(
                f"{query.name} has no images for multiple queries (gt_bbox): a query's feature is the mean over the "
                f"query images of its identity and camera, of which {several} of {len(query)} queries have several"
            )
        return {"images_of": images.split, "pooled_queries": several}

    def __call__(self, features: np.ndarray, gallery: np.ndarray, *more: np.ndarray) -> np.ndarray:
        """Query features to rank with, from those of the query images, of the gallery and of `more`."""
        query = self._query
        if "multi_query" in self.choices:
            images = self.more[0] if self.more else query
            pooled = more[0] if more else features
            features = queries.multi_query(features, query.pids, query.camids, pooled, images.pids, images.camids)
        return queries.expand(features, gallery, **self._expansion) if self._expansion else features


def describe(choices: Mapping[str, Any]) -> str:
    """The choices in a few words, "" where there are none."""
    parts = ["mirror images"] if choices.get("flip") else []
    if "multi_query" in choices:
        found = choices["multi_query"]
        parts.append(f"multi-query ({found['pooled_queries']} by images of {found['images_of']})")
    if "query_expansion" in choices:
        found = choices["query_expansion"]
        name = f"alpha-QE (alpha {found['alpha']:g})" if found["alpha"] else "average QE"
        parts.append(f"{name} of {found['neighbours']}")
    return ", ".join(parts)
