"""What is fetched: checked, kept, or read from a file; without a connection the error says what to do."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pandas as pd
import pytest
from messages import naming

from scllm import datasets, settings
from scllm.datasets._fetch import fetch

CONTENT = b"gene,label\nTP53,True\n"
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(settings, "cache_dir", tmp_path / "cache")


@pytest.fixture
def offline(monkeypatch) -> None:
    """Nothing listens on this port."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of an https server that has one file, and one that redirects to http."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        check=True, capture_output=True,
    )  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", f"http://localhost:{listening.server_port}/file")
                self.end_headers()
                return
            content = CONTENT * (10_000 if self.path == "/large" else 1)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args) -> None:
            pass

    listening = HTTPServer(("localhost", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    listening.socket = context.wrap_socket(listening.socket, server_side=True)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    monkeypatch.setenv("no_proxy", "localhost")
    yield f"https://localhost:{listening.server_port}"
    listening.shutdown()
    listening.server_close()
    thread.join()


def left_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


def test_a_file_is_fetched_once(server, offline) -> None:
    path = fetch("set.csv", f"{server}/file", DIGEST, advice="Do that.")
    assert path.read_bytes() == CONTENT
    assert left_in(settings.cache_dir) == ["set.csv"]
    # from the cache: no one is asked
    assert fetch("set.csv", "https://nowhere.invalid/file", DIGEST, advice="Do that.") == path


def test_the_cache_is_where_the_platform_keeps_caches() -> None:
    code = "import scllm; print(scllm.settings.cache_dir)"
    env = os.environ | {"XDG_CACHE_HOME": "/somewhere/caches"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert run.stdout.strip() == "/somewhere/caches/scllm"


def test_a_download_draws_a_progress_bar_where_one_may_be_drawn(server, monkeypatch, capsys) -> None:
    fetch("first.csv", f"{server}/file", DIGEST, advice="Do that.")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fetch("second.csv", f"{server}/file", DIGEST, advice="Do that.")
    assert "100%" in capsys.readouterr().err


def test_a_file_with_another_checksum_is_not_kept(server) -> None:
    with pytest.raises(ValueError, match=rf"checksum sha256:0, got .*{DIGEST[7:]}(?s:.)* do that"):
        fetch("set.csv", f"{server}/file", "sha256:0", advice="Do that.")
    assert left_in(settings.cache_dir) == []


def test_a_full_disk_is_not_taken_for_a_missing_connection(server) -> None:
    settings.cache_dir.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"^\[Errno 27\] File too large"):
            fetch("set.csv", f"{server}/large", DIGEST, advice="Do that.")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left_in(settings.cache_dir) == []


@pytest.mark.parametrize("address", ["{server}/moved", "http://localhost/file"])
def test_only_https_is_fetched(server, address) -> None:
    with pytest.raises(FileNotFoundError, match="is not an https address"):
        fetch("set.csv", address.format(server=server), DIGEST, advice="Do that.")
    assert left_in(settings.cache_dir) == []


@pytest.fixture
def labels(shared) -> Path:
    return shared / "data" / "gene_sets" / "dosage_sensitivity_tfs.csv"


def test_the_gene_set_has_490_genes_of_which_122_are_sensitive(labels) -> None:
    table = datasets.gene_set("dosage_sensitivity", path=labels)
    assert table.index.name == "ensembl_id"
    assert table.index.is_unique
    assert table.columns.tolist() == ["gene_symbol", "dosage_sensitive"]
    assert (len(table), int(table["dosage_sensitive"].sum())) == (490, 122)
    assert table.loc["ENSG00000125398"].tolist() == ["SOX9", True]


def test_published_files_in_the_cache_are_the_same_set(labels, offline) -> None:
    given = pd.read_csv(labels)
    folder = settings.cache_dir / "gene_sets"
    folder.mkdir(parents=True)
    for kind, end in (("sensitive", ""), ("insensitive", "\n")):
        part = given[given["dosage_sensitive"] == (kind == "sensitive")]
        lines = ["ensembl_id,gene_name", *(part["ensembl_id"] + "," + part["gene_symbol"])]
        (folder / f"most_reliable_dosage_{kind}_TFs.csv").write_text("\n".join(lines) + end)
    pd.testing.assert_frame_equal(datasets.gene_set(), datasets.gene_set(path=labels).sort_index())
    # one letter differs: neither is it taken, nor is what is there lost
    damaged = folder / "most_reliable_dosage_sensitive_TFs.csv"
    damaged.write_text(damaged.read_text().replace("SOX9", "SOX8"))
    with pytest.raises(FileNotFoundError, match=r"most_reliable_dosage_sensitive_TFs\.csv, got no answer"):
        datasets.gene_set()
    assert "SOX8" in damaged.read_text()


@pytest.mark.parametrize("get", [datasets.gene_set, datasets.pancreas])
def test_without_a_connection_the_error_says_what_to_do(get, offline) -> None:
    message = r"https://\S+, got no answer \(.*\)\. .*pass it with path="
    with pytest.raises(FileNotFoundError, match=message):
        get()


CASES = {
    "another set": (lambda folder: datasets.gene_set("dosage"), ValueError, "'dosage'", "Did you mean"),
    "no file": (lambda folder: datasets.gene_set(path=folder / "none"), FileNotFoundError, "/none", "Check"),
    "no h5ad": (lambda folder: datasets.pancreas(folder / "none"), FileNotFoundError, "/none", "Check"),
    "text": (lambda folder: datasets.pancreas(written(folder, "a,b")), ValueError, "cannot be read", "again"),
    "columns": (lambda folder: datasets.gene_set(path=written(folder, "a,b\n1,2\n")), ValueError,
                r"'dosage_sensitive'.*\['a', 'b'\]", "Rename"),
    "labels": (lambda folder: datasets.gene_set(
        path=written(folder, "ensembl_id,gene_symbol,dosage_sensitive\nENSG1,A,Yes\n")), ValueError,
               "dosage_sensitive .*'Yes' for 'ENSG1'", "file"),
    "no label": (lambda folder: datasets.gene_set(
        path=written(folder, "ensembl_id,gene_symbol,dosage_sensitive\nENSG1,A,True\nENSG2,B,\n")), ValueError,
                 "dosage_sensitive .*nan for 'ENSG2'", "file"),
    "no row": (lambda folder: datasets.gene_set(path=written(folder, "ensembl_id,gene_symbol,dosage_sensitive\n")),
               ValueError, "no rows", "another file"),
    "nothing": (lambda folder: datasets.gene_set(path=written(folder, "")), ValueError,
                r"'dosage_sensitive'.*\[\]", "Rename"),
    "a file as name": (lambda folder: datasets.gene_set("mine.csv"), ValueError, "'mine.csv'",
                       r"For a file of your own: path='mine\.csv'"),
}  # fmt: skip


def written(folder: Path, text: str) -> Path:
    (folder / "set.csv").write_text(text)
    return folder / "set.csv"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input_says_what_was_seen_and_what_to_do(case, tmp_path) -> None:
    call, error, seen, advice = case
    with pytest.raises(error, match=rf"(?s){seen}.*{advice}"):
        call(tmp_path)


def test_pancreas_cells_come_from_a_file(shared) -> None:
    adata = datasets.pancreas(shared / "data" / "pancreas_2studies.h5ad")
    assert {"cell_type", "batch"} <= set(adata.obs)
    assert adata.obs["batch"].nunique() == 3


def test_the_files_own_names_of_columns_are_translated(adata, tmp_path) -> None:
    adata.obs = adata.obs.rename(columns={"cell_type": "celltype", "batch": "tech"})
    adata.write_h5ad(tmp_path / "pancreas.h5ad")
    assert datasets.pancreas(tmp_path / "pancreas.h5ad").obs.columns.tolist() == ["cell_type", "batch"]
    del adata.obs["tech"]
    adata.write_h5ad(tmp_path / "pancreas.h5ad")
    with pytest.raises(ValueError, match=naming("'batch'", "'cell_type'", "pancreas.h5ad")):
        datasets.pancreas(tmp_path / "pancreas.h5ad")
