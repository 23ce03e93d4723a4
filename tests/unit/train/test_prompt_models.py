import dataclasses

from bitdance_scale.checkpoint.export_release import export_release, open_checkpoint
from bitdance_scale.checkpoint.import_release import import_release
from bitdance_scale.checkpoint.release_source import open_source
from bitdance_scale.checkpoint.start_weights import model_checkpoint
from bitdance_scale.config.load import load_network
from bitdance_scale.evaluation.benchmarks.solving import Solving
from bitdance_scale.generate.published_layout import DIFFUSERS
from bitdance_scale.train.drawer import find_model
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


def test_a_folder_in_diffusers_layout_is_told_from_others_by_its_components(tmp_path):
    import_release(open_source(write_published(tmp_path / "published"), None), tmp_path / "imported")
    folder = tmp_path / "exported"
    export_release(open_checkpoint(tmp_path / "imported", layout=DIFFUSERS), folder)
    assert find_model(folder).facts.sizes_px and model_checkpoint(folder) is None
    digests = [published_source(folder, Solving((32, 32), 1, 1.0, "euler"), None).digest()]
    for component in ("diffusion_head", "text_encoder", "tokenizer"):
        path = next((folder / component).glob("*.json"))
        path.write_text(path.read_text() + " ")
        digests.append(published_source(folder, Solving((32, 32), 1, 1.0, "euler"), None).digest())
    assert len(set(digests)) == 4
