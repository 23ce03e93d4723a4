import dataclasses

from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.release_source import open_source
from bitdance_scale.config.load import load_network
from bitdance_scale.evaluation.benchmarks.solving import Solving
from bitdance_scale.train.prompt_models import published_source, run_source
from tests.distributed.toy import toy_config
from tests.released import write_published


def test_a_model_says_how_many_tokens_it_draws_at_once(tmp_path):
    solving = Solving((64, 64), 1, 1.0, "euler")
    published = write_published(tmp_path / "published", block_side=2)
    assert published_source(published, solving, None).block_tokens == 4
    import_release(open_source(published, None), tmp_path / "run")
    config = dataclasses.replace(toy_config(), **vars(load_network(tmp_path / "run/config.toml")))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, max_pack_tokens=1024))
    assert run_source(config, tmp_path / "run").block_tokens == 4
