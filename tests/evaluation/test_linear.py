"""What the linear probes share."""

import numpy as np
import torch

from patchword.evaluation.linear import CHUNK, accuracy, cross_entropy, fold, moments


def test_moments_of_more_rows_than_a_piece():
    """The deviation is with n, and 1e-5 is added to it, not to the variance."""
    features = torch.randn(CHUNK + 100, 3) * torch.tensor([1.0, 1e-4, 0.0]) + 5
    mean, std = moments(features)
    values = features.double().numpy()
    np.testing.assert_allclose(mean.numpy(), values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std.numpy(), values.std(0) + 1e-5, rtol=1e-6)


def test_folded_weights_give_the_logits_of_standardised_features():
    features, weight, bias = torch.randn(20, 4).double() * 3 + 2, torch.randn(5, 4), torch.randn(5)
    weight, bias = weight.double(), bias.double()
    mean, std = moments(features)
    raw_weight, raw_bias = fold(weight, bias, mean, std)
    wanted = (features - mean) / std @ weight.T + bias
    torch.testing.assert_close(features @ raw_weight.T + raw_bias, wanted)


def test_figures_of_more_rows_than_a_piece():
    features, labels = torch.randn(CHUNK + 100, 3), torch.randint(0, 4, (CHUNK + 100,))
    weight, bias = torch.randn(4, 3).double(), torch.randn(4).double()
    logits = features.double() @ weight.T + bias
    wanted = torch.nn.functional.cross_entropy(logits, labels)
    np.testing.assert_allclose(cross_entropy(weight, bias, features, labels), float(wanted))
    right = float((logits.argmax(1) == labels).double().mean())
    assert accuracy(weight, bias, features, labels) == right
