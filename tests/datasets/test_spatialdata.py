"""Spots of SpatialData lie where its transformations place them."""

from __future__ import annotations

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from messages import naming

import scllm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that it imports
    spatialdata = pytest.importorskip("spatialdata", reason="needs the extra 'spatial'")
    from spatialdata import transformations
    from spatialdata.models import Image2DModel, ShapesModel, TableModel

pytestmark = pytest.mark.filterwarnings("ignore")
SPOTS = {"s3": (20.0, 30.0), "s1": (40.0, 50.0), "s2": (60.0, 10.0)}  # in pixels of the image


@pytest.fixture
def picture() -> np.ndarray:
    y, x = np.mgrid[:90, :120]
    return np.stack([2 * y, 2 * x, y + x]).astype(np.uint8)


@pytest.fixture
def stored(tmp_path, picture):
    """The image is turned by a quarter, doubled and shifted; the spots are stored in tenths of the common units."""
    affine = np.array([[0.0, -2, 300], [2, 0, 7], [0, 0, 1]])
    xy = np.array(list(SPOTS.values())) @ affine[:2, :2].T + affine[:2, 2]
    turned = transformations.Affine(affine, input_axes=("x", "y"), output_axes=("x", "y"))
    tenths = transformations.Scale([0.1, 0.1], axes=("x", "y"))
    shapes = ShapesModel.parse(
        xy * 10, geometry=0, radius=4.0, index=pd.Index(list(SPOTS)), transformations={"global": tenths}
    )
    obs = pd.DataFrame(
        {"region": pd.Categorical(["spots"] * 3), "spot": ["s1", "s2", "s3"], "x": [1, 2, 3]}, index=list("abc")
    )
    counts = ad.AnnData(np.arange(6, dtype=np.float32).reshape(3, 2), obs=obs)
    table = TableModel.parse(counts, region="spots", region_key="region", instance_key="spot")
    image = Image2DModel.parse(
        picture, dims=("c", "y", "x"), scale_factors=[2], transformations={"global": turned, "pixels": turned}
    )
    data = spatialdata.SpatialData(images={"he": image}, shapes={"spots": shapes}, tables={"table": table})
    data.write(tmp_path / "data.zarr")
    return tmp_path / "data.zarr"


def test_spots_are_placed_in_pixels_of_the_image(stored, picture):
    adata = scllm.datasets.read_spatialdata(stored)
    assert adata.obs["spot"].tolist() == ["s1", "s2", "s3"]
    np.testing.assert_allclose(adata.obsm["spatial"], [SPOTS[name] for name in ("s1", "s2", "s3")])
    scllm.pp.image_patches(adata, size=8, pixels=8)
    scllm.tl.embed_patches(adata, encoder=lambda patches: patches.float().mean((1, 2)))
    expected = [picture[:, y - 4 : y + 4, x - 4 : x + 4].mean((1, 2)) for x, y in ((40, 50), (60, 10), (20, 30))]
    np.testing.assert_allclose(adata.obsm["X_patch"], expected, atol=0.5)


def test_the_object_gives_the_same_as_its_folder(stored, tmp_path):
    whole = spatialdata.read_zarr(stored)
    adata = scllm.datasets.read_spatialdata(whole, image="he", table="table", coordinate_system="global")
    np.testing.assert_array_equal(adata.obsm["spatial"], scllm.datasets.read_spatialdata(stored).obsm["spatial"])
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert "spatial" not in whole.tables["table"].obsm


def test_what_does_not_fit_is_named(stored, tmp_path):
    with pytest.raises(ValueError, match=naming("'he'", "'other'", "image=")):
        scllm.datasets.read_spatialdata(stored, image="other")
    with pytest.raises(ValueError, match=naming("'global'", "'pixels'", "coordinate_system=")):
        scllm.datasets.read_spatialdata(stored, coordinate_system="pixels")
    with pytest.raises(FileNotFoundError, match=naming("gone.zarr")):
        scllm.datasets.read_spatialdata(tmp_path / "gone.zarr")
    whole = spatialdata.read_zarr(stored)
    whole.tables["table"].obs["spot"] = ["s1", "s2", "s9"]
    with pytest.raises(ValueError, match=naming(1, 3, "'s9'")):
        scllm.datasets.read_spatialdata(whole)
    with pytest.raises(ValueError, match=naming("memory", "write")):
        scllm.datasets.read_spatialdata(spatialdata.SpatialData(images={"he": whole.images["he"]}))
