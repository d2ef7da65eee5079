"""What a run will take: counted as training counts it, and refused where no node can hold it."""

import pytest

from ask_ray.config import SettingsError, load
from ask_ray.training.forecast import check_memory, forecast, gpu_room, told_of_gpu

SETTINGS = load(
    {
        "model": {"width": 0.1, "dim": 16},
        "training": {"workers": 2, "batch_size": 8, "epochs": 5},
        "knowledge": {"captions_per_clip": 2},
        "data": {"cache_mib": 1},
    }
)

PARAMETERS = 1234


def test_the_forecast_counts_what_training_will_do(small_corpus):
    made = forecast(SETTINGS, small_corpus, PARAMETERS)
    assert (made.clips, made.steps_per_epoch, made.steps) == (150, 9, 45)
    assert made.entries == 300
    assert made.parameters == PARAMETERS
    waveforms = 150 * small_corpus.mean_bytes("train")
    assert waveforms > 2**20, "more than the cache keeps"
    assert (made.worker_bytes, made.node_bytes) == (16 * made.parameters + 2**20, 4 * 300 * 16 * 8)
    corrected = load(
        {**SETTINGS.model_dump(mode="json"), "knowledge": {"captions_per_clip": 2, "corrections": {"write_back": True}}}
    )
    rows_of_another = 2 * 300 * 16 * 4
    assert forecast(corrected, small_corpus, PARAMETERS).worker_bytes == made.worker_bytes + made.node_bytes + rows_of_another


def test_tokens_of_what_is_evaluated_count_too(small_corpus):
    plain, made = (forecast(SETTINGS, small_corpus, PARAMETERS, frames) for frames in (0, 13))
    assert plain.token_bytes == 0
    tokens = 20 * 13 + 20 * 3 * SETTINGS.model.max_words  # 20 test clips with 3 captions each
    assert made.token_bytes == tokens * (2 * 16 + 4)
    assert made.worker_bytes == plain.worker_bytes + made.token_bytes


def test_without_the_method_nothing_is_kept_of_a_knowledge_base(small_corpus):
    plain = SETTINGS.model_copy(update={"ask": SETTINGS.ask.model_copy(update={"enabled": False})})
    assert forecast(plain, small_corpus, PARAMETERS).entries == 0
    assert forecast(plain, small_corpus, PARAMETERS).node_bytes == 0


@pytest.mark.parametrize(("nodes", "fits"), [([2.1, 0.9], True), ([1.9, 1.9], True), ([1.9, 0.9], False), ([], False)])
def test_every_worker_must_fit_on_a_node(small_corpus, nodes, fits):
    made = forecast(SETTINGS, small_corpus, PARAMETERS)
    sizes = [made.node_bytes + share * made.worker_bytes for share in nodes]
    if fits:
        check_memory(made, 2, sizes)
    else:
        with pytest.raises(SettingsError, match=r"^training\.workers: each of 2 workers keeps .* lower"):
            check_memory(made, 2, sizes)


def test_what_stays_on_a_gpu_is_told_and_in_red_where_it_is_more_than_there_is():
    parameters = 2**28  # of 16 bytes each: 4 GiB
    assert told_of_gpu(parameters, 4 << 30) == (
        "4.00 GiB of parameters with optimiser a worker, 4.00 on a GPU of this machine; and activations"
    )
    assert told_of_gpu(parameters + 1, 4 << 30).startswith("[red]4.00 GiB")


def test_a_run_without_gpus_is_told_nothing_of_them():
    assert gpu_room(load({"training": {"device": "cpu"}})) == 0
