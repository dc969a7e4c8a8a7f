"""Spatially variable genes and image patches."""

from __future__ import annotations

import numpy as np
import pytest
import scanpy as sc
from anndata import AnnData
from messages import naming
from PIL import Image

import scllm
from scllm.data.spots import spot_graph


@pytest.fixture(scope="module")
def sections() -> AnnData:
    return scllm.datasets.toy_spatial(n_sections=2, side=8, n_genes=24)


def normalised(adata: AnnData) -> AnnData:
    copy = adata.copy()
    sc.pp.normalize_total(copy, target_sum=1e4)
    sc.pp.log1p(copy)
    return copy


def test_morans_i_is_scanpys_and_that_of_the_formula(sections):
    adata = sections.copy()
    scllm.pp.spatially_variable(adata, n_top_genes=10)
    graph = spot_graph(adata.obsm["spatial"], adata.obs["section"].astype(str))
    values = normalised(adata).X.toarray().astype(float)
    expected = sc.metrics.morans_i(graph.astype(float), values.T.copy())
    np.testing.assert_allclose(adata.var["morans_i"], expected, rtol=1e-4)
    z = values - values.mean(0)
    formula = len(z) / graph.sum() * np.einsum("ig,ij,jg->g", z, graph.toarray(), z) / (z**2).sum(0)
    np.testing.assert_allclose(adata.var["morans_i"], formula, rtol=1e-4)
    chosen = adata.var["spatially_variable"]
    assert chosen.sum() == 10
    assert adata.var["morans_i"][chosen].min() >= adata.var["morans_i"][~chosen].max()


def test_a_graph_of_squidpy_is_used(sections):
    adata = sections.copy()
    adata.obsp["spatial_connectivities"] = spot_graph(adata.obsm["spatial"], adata.obs["section"].astype(str))[
        ::-1, ::-1
    ]
    scllm.pp.spatially_variable(adata, n_top_genes=10)
    values = normalised(adata).X.toarray().astype(float)
    expected = sc.metrics.morans_i(adata.obsp["spatial_connectivities"].tocsr().astype(float), values.T.copy())
    np.testing.assert_allclose(adata.var["morans_i"], expected, rtol=1e-4)


def test_constant_genes_are_counted_and_not_chosen(sections, tmp_path):
    adata = sections.copy()
    adata.X = adata.X.multiply(np.arange(24) >= 4).tocsr()
    with pytest.warns(UserWarning, match=naming(20, 24)):
        scllm.pp.spatially_variable(adata, n_top_genes=22)
    assert adata.uns["scllm"]["spatially_variable"]["n_constant"] == 4
    assert adata.var["morans_i"][:4].isna().all()
    assert not adata.var["spatially_variable"][:4].any()
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.write_zarr(tmp_path / "a.zarr")


def test_patches_tile_the_image(sections):
    adata = sections.copy()
    scllm.pp.image_patches(adata)
    boxes = adata.obsm["patches"]
    assert boxes[:2].tolist() == [[0, 0, 16, 16], [16, 0, 32, 16]]
    table = adata.uns["scllm"]["image_patches"]["table"]
    assert table["section"].tolist() == ["section1", "section2"]
    assert table["outside"].sum() == table["partly_outside"].sum() == 0
    part = adata[adata.obs["section"] == "section2", :5].copy()
    assert part.obsm["patches"].shape == (64, 4)
    assert scllm.pp.image_patches(sections, copy=True).obsm["patches"].tolist() == boxes.tolist()
    assert "patches" not in sections.obsm


def test_the_size_is_in_micrometres_if_the_scale_is_known(sections, caplog):
    adata = sections.copy()
    scllm.pp.image_patches(adata, size=8.0)
    assert (adata.obsm["patches"][:, 2] - adata.obsm["patches"][:, 0] == 8).all()
    assert "as pixels" in caplog.text
    for library in adata.uns["spatial"].values():
        library["scalefactors"] = {**library["scalefactors"], "microns_per_pixel": 0.5}
    scllm.pp.image_patches(adata, size=8.0)
    assert (adata.obsm["patches"][:, 2] - adata.obsm["patches"][:, 0] == 16).all()
    assert "as micrometres" in caplog.text


def test_spots_outside_are_counted_or_an_error(sections):
    adata = sections[:64].copy()
    adata.obsm["spatial"] = adata.obsm["spatial"] + [24.0, 0]
    with pytest.warns(UserWarning, match=naming(8, 64)):
        scllm.pp.image_patches(adata)
    adata.obsm["spatial"] = adata.obsm["spatial"] * 50
    with pytest.raises(ValueError, match=naming("section1", 128, "x and y")):
        scllm.pp.image_patches(adata, size=16)


def test_a_missing_scale_factor_or_image_is_named(sections):
    adata = sections[:64].copy()
    adata.uns["spatial"] = {"section1": {"images": adata.uns["spatial"]["section1"]["images"], "scalefactors": {}}}
    with pytest.raises(ValueError, match=naming("tissue_hires_scalef", "'section1'")):
        scllm.pp.image_patches(adata)
    adata.uns["spatial"] = {}
    with pytest.raises(ValueError, match=naming("image=", "uns['spatial']")):
        scllm.pp.image_patches(adata)
    with pytest.raises(ValueError, match=naming("'section2'")):
        scllm.pp.image_patches(sections.copy(), image={"section1": "he.png"})


def test_her2st_patches_lie_on_the_photograph(shared):
    adata = sc.read_h5ad(shared / "data" / "spatial_her2st" / "C2.h5ad")
    scllm.pp.image_patches(adata, image=shared / "data" / "spatial_her2st" / "C2_HE.jpg")
    row = adata.uns["scllm"]["image_patches"]["table"].iloc[0]
    library = adata.uns["spatial"]["C2"]
    assert [row["width"], row["height"]] == list(library["metadata"]["fullres_size_xy"])
    assert row["edge"] == pytest.approx(library["metadata"]["spot_pitch_fullres"], rel=0.02)
    assert row["outside"] == 0


def test_visium_folder_without_h5_and_hires_image(shared):
    adata = scllm.datasets.read_visium(shared / "data" / "visium_mouse_embryo" / "outs")
    assert adata.shape == (2898, 19465)
    library = adata.uns["spatial"]["visium_mouse_embryo"]
    assert library["images"]["lowres"].shape == (600, 600, 3)
    assert "hires" not in library["images"]
    assert (adata.obs["in_tissue"] == 1).all()
    positions = (shared / "data" / "visium_mouse_embryo" / "outs" / "spatial" / "tissue_positions.csv").read_text()
    line = next(line for line in positions.splitlines() if line.startswith(adata.obs_names[0]))
    assert adata.obsm["spatial"][0] == pytest.approx([float(line.split(",")[5]), float(line.split(",")[4])])
    # spots of a Visium slide are 100 µm apart
    scllm.pp.image_patches(adata, size=100.0)
    pitch = 100 / library["scalefactors"]["microns_per_pixel"]
    assert adata.uns["scllm"]["image_patches"]["table"]["edge"].tolist() == pytest.approx([pitch])


def visium(folder, barcodes=("A-1", "B-1")):
    import gzip

    matrix, spatial = folder / "filtered_feature_bc_matrix", folder / "spatial"
    matrix.mkdir(parents=True)
    spatial.mkdir()
    content = "%%MatrixMarket matrix coordinate integer general\n2 2 2\n1 1 3\n2 2 1\n"
    for name, text in (
        ("matrix.mtx", content),
        ("barcodes.tsv", "A-1\nB-1\n"),
        ("features.tsv", "E1\tG\tGene Expression\nE2\tG\tGene Expression\n"),
    ):
        with gzip.open(matrix / f"{name}.gz", "wt") as file:
            file.write(text)
    lines = [f"{code},1,0,{2 * at},10,{10 * at}" for at, code in enumerate(barcodes)]
    (spatial / "tissue_positions_list.csv").write_text("\n".join(lines))
    (spatial / "scalefactors_json.json").write_text('{"tissue_lowres_scalef": 0.5}')
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(spatial / "tissue_lowres_image.png")
    return folder


def test_old_positions_without_a_header_are_read(tmp_path):
    adata = scllm.datasets.read_visium(visium(tmp_path / "sample" / "outs"))
    assert adata.obsm["spatial"].tolist() == [[0, 10], [10, 10]]
    assert adata.var_names.tolist() == ["G", "G-1"]
    assert list(adata.uns["spatial"]) == ["sample"]


def test_folders_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match=naming(1, 2, "'B-1'", "'C-1'")):
        scllm.datasets.read_visium(visium(tmp_path / "a", barcodes=("C-1", "A-1")))
    other = visium(tmp_path / "b")
    (other / "spatial" / "scalefactors_json.json").unlink()
    with pytest.raises(FileNotFoundError, match=naming("scalefactors_json.json")):
        scllm.datasets.read_visium(other)
    (other / "spatial" / "scalefactors_json.json").write_text("{}")
    (other / "spatial" / "tissue_lowres_image.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=naming("tissue_lowres_image.png")):
        scllm.datasets.read_visium(other)
    xenium = tmp_path / "c"
    xenium.mkdir()
    (xenium / "experiment.xenium").write_text("{}")
    with pytest.raises(ValueError, match=naming("Xenium", "spatial")):
        scllm.datasets.read_visium(xenium)
