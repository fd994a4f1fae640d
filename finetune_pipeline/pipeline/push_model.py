"""Upload a model version to the Hugging Face Hub, in the layout of the deployment target `folder`."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from finetune_pipeline.database import connect
from finetune_pipeline.deployment.files import writing
from finetune_pipeline.deployment.folder import MERGED, write_release
from finetune_pipeline.deployment.hub import upload
from finetune_pipeline.pipeline.deploy import release_of
from finetune_pipeline.registry.champion import resolve
from finetune_pipeline.settings import LoopSettings, home


def push_model(
    loop: LoopSettings,
    version: str,
    repo_id: str,
    log: Callable[[str], None],
    *,
    public: bool = False,
    merged: bool = False,
) -> str:
    """Upload a version (`v1.2.0`, `champion`, `base`) and return the URL of the commit.

    Files of the loop's earlier versions in the repository are deleted in the same commit; its history keeps them.

    Args:
        repo_id: `owner/name`.
        public: see `deployment.hub.upload`.
        merged: upload the merged weights too.

    Raises:
        RegistryError, ArtifactError, ExportError: the model's files are missing or damaged.
        TargetError: the Hub refuses or cannot be reached, or the disk is full.
    """
    release = release_of(loop, resolve(connect(), version, loop.name), log, merged=merged)
    drafts = home() / "cache" / "push"
    with writing(drafts), tempfile.TemporaryDirectory(dir=drafts) as temporary:
        folder = Path(temporary) / release.label
        write_release(release, folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        log(f"upload {release.name} to {repo_id}, {size / 1e6:,.1f} MB")
        replaced = [f"{loop.name}-*.gguf", "base.gguf", f"{MERGED}/*"]
        return upload(folder, repo_id, f"Upload {release.name}", public=public, replaces=replaced)
