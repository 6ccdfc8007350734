"""The files that list the jobs of a sweep: written, read, damaged."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mnist_exp.config.schema import task_config
from mnist_exp.errors import ConfigError
from mnist_exp.sweeps.manifest import CONFIGS, MANIFEST, Manifest, SweepJob

SETTINGS = {"on_error": "stop", "skip_invalid": True, "test": "all", "max_jobs": 10}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Two jobs that can be run, and one that cannot."""
    hydra = {"runtime": {"cwd": "/a"}, "run": {"dir": "/a/run"}}
    config = OmegaConf.create({"seed": 0, "twice": "${seed}", "hydra": hydra})
    jobs = [
        SweepJob(n, [f"seed={n}"], {"seed": str(n)}, config, folder=tmp_path / str(n))
        for n in (0, 1)
    ]
    invalid = SweepJob(2, ["seed=x"], {"seed": "x"}, problem="seed=x: must be a number")
    return Manifest("stacked", SETTINGS, [*jobs, invalid], [[0, 1]])


def test_what_is_saved_is_loaded(manifest: Manifest, tmp_path: Path) -> None:
    manifest.ended = {0: ("FINISHED", ""), 1: ("NOT RUN", "why"), 2: ("INVALID", "a problem")}
    manifest.save(tmp_path)
    manifest.save_configs(tmp_path)
    loaded, jobs = Manifest.load(tmp_path), Manifest.load_configs(tmp_path)
    assert (loaded.launcher, loaded.stacks) == ("stacked", [[0, 1]])
    assert (loaded.settings, loaded.ended) == (SETTINGS, manifest.ended)
    assert [job.describe() for job in loaded.jobs] == [job.describe() for job in manifest.jobs]
    assert [job.folder for job in loaded.valid] == [tmp_path / "0", tmp_path / "1"]
    assert jobs == manifest.valid  # whose interpolations are kept as they are
    assert OmegaConf.to_container(task_config(jobs[0].config)) == {"seed": 0, "twice": "${seed}"}


def test_a_relative_path_of_an_earlier_version_begins_where_the_sweep_did(
    manifest: Manifest, tmp_path: Path
) -> None:
    for job in manifest.valid:
        OmegaConf.update(job.config, "dataset.root", "images", force_add=True)
    manifest.save_configs(tmp_path)
    assert Manifest.load_configs(tmp_path)[1].config.dataset.root == "/a/images"


def test_the_keys_of_the_files_are_those_of_earlier_versions(
    manifest: Manifest, tmp_path: Path
) -> None:
    manifest.save(tmp_path)
    manifest.save_configs(tmp_path)
    saved = json.loads((tmp_path / MANIFEST).read_text())
    assert saved.keys() == {"launcher", "settings", "jobs", "stacks"}
    assert all(job.keys() == {"values", "problem", "folder"} for job in saved["jobs"])
    configs = json.loads((tmp_path / CONFIGS).read_text())
    assert all(
        job.keys() == {"number", "words", "values", "folder", "config"} for job in configs
    )  # fmt: skip


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"jobs": [1]}', '{"jobs": []}'])
def test_a_damaged_file_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        Manifest.load(tmp_path)


def test_settings_of_an_earlier_version_are_understood(manifest: Manifest, tmp_path: Path) -> None:
    manifest.settings = {"on_error": "stop", "skip_invalid": False, "test": "all", "yes": False}
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path).sweep_config.on_error == "stop"
