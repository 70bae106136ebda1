"""Supervised training: its loss, what it trains, and that a config's factors leave it alone."""

import pytest
import torch
import torch.nn.functional as F
from method_config import icl_msr_config, method_config
from method_training import Views, train

from metamask_plugin.methods import Supervised


def build(config=method_config, **overrides):
    torch.manual_seed(0)
    return Supervised(config(method="supervised", **overrides))


def test_its_loss_is_the_cross_entropy_of_all_views_and_labelled_images():
    model = build(method_kwargs__alpha=100.0, method_kwargs__scale_loss=0.1)
    feats, labels = [torch.randn(6, 256) for _ in range(2)], torch.tensor([3, -1, 0, 9, 9, 1])
    model.task.before_batch(torch.arange(6), labels, 0)
    loss, *_ = model.regular_loss({"feats": feats}, None)
    known = labels != -1
    expected = sum(F.cross_entropy(model.task.classifier(h[known]), labels[known]) for h in feats) / 2
    torch.testing.assert_close(loss, expected)


def test_without_labels_the_loss_is_zero():
    model = build()
    model.task.before_batch(torch.arange(2), torch.tensor([-1, -1]), 0)
    loss, *_ = model.regular_loss({"feats": [torch.randn(2, 256)] * 2}, None)
    assert loss == 0


@pytest.mark.parametrize("config", [method_config, icl_msr_config])
def test_the_encoder_learns_the_labels(config):
    model = build(config)
    before = model.backbone.state_dict()["layers.0.weight"].clone()
    data = Views(original=config is icl_msr_config)
    train(model, max_epochs=12, original=config is icl_msr_config)
    assert not torch.equal(model.backbone.state_dict()["layers.0.weight"], before)
    with torch.no_grad():  # in training mode, whose batch statistics it has learnt with
        predicted = model.task.project(model.backbone(data.images[:8, 0])).argmax(dim=1)
    assert (predicted == torch.arange(8)).float().mean() > 0.9
