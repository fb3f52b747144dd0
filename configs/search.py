"""The most similar images of a gallery for each query: a JSON file, and a page with the pictures.

    python -m dmosnet_jax.main --config=configs/search.py --config.index=gallery --config.images=queries \
        --config.top_k=10 --config.output=matches.json --config.page=matches.html

`output` is a list of `{"query": name, "matches": [{"rank": 1, "file": name, "score": cosine}, ...]}`. The search is
exact. The weights are those that the gallery was made with; where they are elsewhere now, give `--config.checkpoint`.
"""

from ml_collections import ConfigDict, config_dict

from configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    options = common.parse_arg(arg, index="", images="", output="matches.json")
    config = common.base("search")
    config.index = options["index"]
    config.images = options["images"]
    # "": the path that the gallery names.
    config.checkpoint = ""
    common.as_trained(config)
    config.output = options["output"]
    # Replace an earlier result.
    config.overwrite = False
    config.top_k = 10
    # Matches below this cosine similarity are left out; None: none is.
    config.threshold = config_dict.placeholder(float)
    # HTML page of the first `eval.rank_lists` queries with their matches; "" for none.
    config.page = ""
    return config
