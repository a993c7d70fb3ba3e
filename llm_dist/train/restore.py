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
    for name, now in parts.data.fingerprints.items():
        if (before := manifest.fingerprints.get(name)) != now:
            raise ResumeRefused(
                f"data.train={parts.run.data.train}: its {name} fingerprint is {now[:12]}, but the run's checkpoint at "
                f"step {manifest.step} was trained on {str(before)[:12]}; restore the folder or choose another run.name"
            )
