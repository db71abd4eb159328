"""One update of the trainer, which others must equal."""

from __future__ import annotations

import pytest
from conftest import MakeConfig
from runs import ONE_UPDATE, one_update


@pytest.fixture(scope="session")
def plain_update(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory):
    return one_update(make_config(tmp_path_factory.mktemp("plain"), *ONE_UPDATE, "trainer.micro_batch_size=8"))
