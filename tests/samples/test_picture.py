import numpy as np
import pytest
import torch
from PIL import Image

from fulgurite.samples import DataError, Picture, pixels_of


def test_pixels_are_those_of_the_file(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    picture = Picture(tmp_path / "a.png")
    picture.check()
    assert torch.equal(picture.pixels(), torch.from_numpy(values).permute(2, 0, 1))
    assert torch.equal(pixels_of(picture), picture.pixels())


def test_a_tensor_is_itself():
    pixels = torch.zeros(3, 2, 2, dtype=torch.uint8)
    assert pixels_of(pixels) is pixels


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "I;16"])
def test_other_colour_spaces_become_rgb(mode, tmp_path):
    image = Image.fromarray(np.full((4, 4, 3), 200, np.uint8))
    image = Image.fromarray(np.full((4, 4), 200, np.uint16)) if mode == "I;16" else image.convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    assert Picture(path).pixels().shape == (3, 4, 4)


def test_transparency_is_white(tmp_path):
    values = np.zeros((2, 2, 4), np.uint8)
    values[0, 0] = (10, 20, 30, 255)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = Picture(tmp_path / "a.png").pixels()
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]
    assert pixels[:, 1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_what_is_no_picture_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png: cannot read the picture"):
        Picture(tmp_path / "a.png").check()


def test_a_cut_file_fails_where_its_pixels_are_asked_for(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    Picture(tmp_path / "a.png").check()
    with pytest.raises(DataError, match=r"a\.png: cannot read the picture"):
        Picture(tmp_path / "a.png").pixels()
