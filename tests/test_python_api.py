"""The Python lines of docs/python.md work, and the plain loop is what the module does."""

import copy
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn

import moco
from moco.errors import InputError
from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_the_documented_blocks_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / "docs" / "python.md").read_text()
    names = {}
    for block in text.split("```python\n")[1:]:
        exec(block.split("```")[0], names)
    assert names["loss"].isfinite()
    assert 0 <= names["result"].top1 <= 1


def small_net():
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.feature_dim = 16
    return net


def test_the_plain_loop_and_the_module_have_the_same_weights_after_20_steps():
    settings = {"name": "sgd", "lr": 0.03, "weight_decay": 1e-4}
    method = moco.MoCo(small_net(), settings, embedding_dim=8, queue_size=64, temperature=0.2)
    query_encoder = copy.deepcopy(method.query_encoder)
    key_encoder = copy.deepcopy(method.key_encoder)
    queue = copy.deepcopy(method.queue)
    batches = [torch.randn(2, 16, 3, 16, 16).unbind() for _ in range(20)]

    optimizer = torch.optim.SGD(query_encoder.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    for first, second in batches:
        query = F.normalize(query_encoder(first))
        with torch.no_grad():
            key = F.normalize(key_encoder(second))
        loss = moco.info_nce(query, key, queue.negatives(), 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moco.update_key_encoder(key_encoder, query_encoder, 0.999)
        queue.enqueue(key)

    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(method, torch.utils.data.DataLoader(batches, batch_size=None))
    assert trainer.global_step == 20
    for ours, theirs in (
        (query_encoder, method.query_encoder),
        (key_encoder, method.key_encoder),
        (queue, method.queue),
    ):
        state = theirs.state_dict()
        for name, tensor in ours.state_dict().items():
            torch.testing.assert_close(tensor, state[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["pair", "pair with labels", "our batch"])
def test_a_batch_is_a_pair_of_views_with_or_without_labels(kind):
    method = moco.MoCo(small_net(), embedding_dim=8, queue_size=64)
    first, second = torch.randn(2, 4, 3, 16, 16).unbind()
    batch = {
        "pair": [first, second],
        "pair with labels": ((first, second), torch.zeros(4)),
        "our batch": SimpleNamespace(views=(first, second)),
    }[kind]
    assert method.training_step(batch, 0)["loss"].isfinite()
    with pytest.raises(InputError, match="two views of the images"):
        method.training_step([first, second, first], 0)


def test_a_schedule_needs_to_know_the_number_of_steps():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield list(torch.randn(2, 4, 3, 16, 16))

    loader = torch.utils.data.DataLoader(Endless(), batch_size=None)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    cosine = moco.MoCo(small_net(), {"schedule": "cosine"}, embedding_dim=8, queue_size=64)
    with pytest.raises(InputError, match="give the Trainer max_steps"):
        pl.Trainer(max_epochs=1, **options).fit(cosine, loader)
    trainer = pl.Trainer(max_steps=2, **options)
    trainer.fit(cosine, loader)
    assert trainer.global_step == 2
