"""Go on from the latest checkpoint that is whole, or begin: what every start does before it trains."""

from __future__ import annotations

from collections.abc import Callable

from llm_dist.checkpoint import commit, layout
from llm_dist.checkpoint.layout import DamagedCheckpoint, Found, Manifest
from llm_dist.checkpoint.store import Store
from llm_dist.errors import ResumeRefused
from llm_dist.runtime import Runtime
from llm_dist.train.account import Account
from llm_dist.train.build import Parts
from llm_dist.train.folder import what_differs


def restore(parts: Parts, store: Store, runtime: Runtime, say: Callable[[str], None]) -> Account:
    """Fill the engine from the latest whole checkpoint and return its account; a new account where there is none.

    A damaged checkpoint is named and set aside, and the one before it is used. Collective: all ranks call this.

    Raises:
        ResumeRefused: the checkpoint was made from other data or another tokenizer.
    """
    while (found := _latest(store, runtime)) is not None:
        manifest, damage = _try(parts, store, runtime, found)
        if manifest is not None:
            return Account.from_dict(manifest.trajectory)
        say(damage)
        if runtime.is_first:
            aside = commit.set_aside(found)
            before = layout.latest(store.folder)
            lost = f"{found.step - before.step} steps are computed again" if before else "starting again from step 0"
            say(f"set aside as {aside.name}; {lost}")
        runtime.barrier()
    return Account()


def _latest(store: Store, runtime: Runtime) -> Found | None:
    """What rank 0 sees counts, so that all ranks read the same checkpoint."""
    found = layout.latest(store.folder) if runtime.is_first else None
    step = runtime.share(found.step if found else None)
    return None if step is None else Found(step, store.folder / layout.checkpoint_name(step))


def _try(parts: Parts, store: Store, runtime: Runtime, found: Found) -> tuple[Manifest | None, str]:
    manifest, damage = None, None
    try:
        manifest = store.restore(found, parts.engine.state())
    except DamagedCheckpoint as error:
        damage = error
    words = runtime.first_error(damage)
    if words is not None:
        return None, words
    assert manifest is not None
    _check_same_run(parts, manifest)
    parts.engine.state_was_written(manifest.optimizer_step)
    return manifest, ""


def _check_same_run(parts: Parts, manifest: Manifest) -> None:
    """Every source the checkpoint was trained on is there; new ones may have joined."""
    now = parts.data.fingerprints
    for name, before in manifest.fingerprints.items():
        if not name.startswith("data.") and name != "tokenizer":
            continue
        if now.get(name) != before:
            raise ResumeRefused(
                f"{what_differs(name, now.get(name), before)} at step {manifest.step}; restore it or choose another "
                "run.name"
            )
