"""`slipstream kernels lock`: look at a repository without running it, show what would be pinned, ask, and write the lock."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slipstream.cli.options import AsJson
from slipstream.cli.show import Table, note, print_json, print_tables, size
from slipstream.errors import KernelError, TrustError

if TYPE_CHECKING:
    from slipstream.trust import Build, Lock, Pin, Policy

LockFile = Annotated[
    str | None,
    typer.Option("--lock", metavar="FILE", help="The lock. Default: ./kernels.lock, else yours.", show_default=False),
]
PolicyFile = Annotated[
    str | None,
    typer.Option(
        "--policy", metavar="FILE", help="The policy. Default: ./kernels-policy.toml, else yours.", show_default=False
    ),
]
COLUMNS = ("repository", "version", "commit", "build", "files", "size", "code", "signed by")


def lock(
    repos: Annotated[
        list[str] | None,
        typer.Argument(metavar="[REPO]...", help="org/repo, or a folder. None: accept the lock that is here."),
    ] = None,
    version: Annotated[
        int | None, typer.Option(min=0, help="Version to pin. Default: the newest.", show_default=False)
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="COMMIT", help="Commit to pin, in place of a version.", show_default=False)
    ] = None,
    lock: LockFile = None,
    policy: PolicyFile = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Review and pin kernels, with the kernels that they need.

    Downloads the build for this machine, executes nothing, shows what would be pinned, and asks. Other builds of that commit
    are pinned by the hashes that the Hub states, and compared when they are fetched. Without a policy, one that allows exactly
    these repositories and their signers is written beside the lock.
    """
    from slipstream.trust import Lock, record
    from slipstream.trust.lock import write_atomically

    if version is not None and revision is not None:
        raise typer.BadParameter("--version and --revision name two things; give one")
    files = _Files.of(lock, policy)
    rules = files.rules(repos or ())
    pins, fetched = dict(files.lock().pins), {}
    before = dict(pins)
    fresh = _resolved(repos or ())
    # What nobody here has agreed to is shown with it, as one answer accepts the whole file.
    asked = fresh + ([] if fresh and files.lock_is_accepted() else list(pins))
    if not asked:
        raise TrustError(f"{files.lock_path} pins nothing yet; name what to pin: slipstream kernels lock org/repo")
    for pin in _pins(asked, pins, rules, dict.fromkeys(fresh, (version, revision))):
        pins[pin.repo] = pin
        fetched[pin.repo] = _fetch(pin, rules, new_policy=files.policy is None)
    made = Lock(pins, files.lock_path)
    Lock.parse(made.text().encode(), files.lock_path)  # what could not be read again is not written
    shown = [
        described(pins[r], b) | {"review": str(fetched[r] or "")} for r in fetched for b in pins[r].builds.values()
    ]
    text = None if files.policy is not None else _new_policy([pins[r] for r in fetched])
    if not as_json:
        _show(shown, [pins[r] for r in fetched], before, files, text)
    if not yes and not _agreed():
        note("nothing was written")
        raise typer.Exit(1)
    if text is not None:
        write_atomically(files.policy_path, text)
    write_atomically(files.lock_path, made.text())
    # What was shown, and not what may have come into the file while somebody read.
    record.accept(made, files.policy_path, text.encode() if text is not None else files.policy or b"")
    if as_json:
        print_json({"lock": files.lock_path, "policy": files.policy_path, "new_policy": text, "kernels": shown})
    else:
        note(f"written to {files.lock_path}; accepted on this machine as it is now")


def described(pin: Pin, build: Build) -> dict[str, Any]:
    return {
        "repo": pin.repo, "version": pin.version, "revision": pin.revision, "variant": build.variant,
        "sha256": build.sha256, "files": len(build.files), "bytes": build.size,
        "code": "native" if build.is_native else "Python", "signer": build.signer,
    }  # fmt: skip


def row(found: dict[str, Any]) -> tuple[str, ...]:
    version, commit = found["version"], found["revision"] or "a folder"
    return (
        found["repo"], "" if version is None else str(version), commit[:12], found["variant"], str(found["files"]),
        size(found["bytes"]), found["code"], found["signer"] or "nobody",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Files:
    """Which two files are read and written."""

    lock_path: Path
    policy_path: Path
    policy: bytes | None  # as it was when this began

    @classmethod
    def of(cls, lock: str | None, policy: str | None) -> _Files:
        from slipstream.config.paths import config_root
        from slipstream.trust.policy import LOCK, POLICY

        paths = []
        for name, named in ((LOCK, lock), (POLICY, policy)):
            here, users = Path.cwd() / name, config_root() / name
            default = users if users.exists() and not here.exists() else here
            paths.append(Path(named).expanduser().absolute() if named else default)
        lock_path, policy_path = paths
        return cls(lock_path, policy_path, policy_path.read_bytes() if policy_path.exists() else None)

    def lock_is_accepted(self) -> bool:
        from slipstream.trust import record

        return not self.lock_path.exists() or record.is_accepted(self.lock_path, self.lock_path.read_bytes())

    def lock(self) -> Lock:
        from slipstream.trust import Lock

        if not self.lock_path.exists():
            return Lock({}, self.lock_path)
        return Lock.parse(self.lock_path.read_bytes(), self.lock_path)

    def rules(self, repos: Sequence[str]) -> Policy:
        """The policy as it is, whether it was accepted yet or not; without one, what the new one will allow."""
        from slipstream.trust import Policy
        from slipstream.trust.lock import is_repo

        if self.policy is not None:
            return Policy.parse(self.policy, self.policy_path)
        names = _resolved(repos)
        folders = tuple(Path(n) for n in names if not is_repo(n))
        return Policy(repos=("*/*",), hub=True, folders=folders, path=self.policy_path)


def _resolved(repos: Sequence[str]) -> list[str]:
    from slipstream.trust import Policy

    return [Policy().repo_of(repo) for repo in repos]


def _pins(
    asked: list[str], known: dict[str, Pin], rules: Policy, fresh: dict[str, tuple[int | None, str | None]]
) -> Iterator[Pin]:
    """The pins of what was asked for and of all that it needs: as they are known, but looked up for what is `fresh`."""
    from slipstream.ops.hub import store
    from slipstream.trust.fetch import pin_folder, pin_from_hub
    from slipstream.trust.lock import is_repo
    from slipstream.trust.tree import hash_tree

    left, seen = list(asked), set()
    while left:
        repo = left.pop(0)
        if repo in seen:
            continue
        seen.add(repo)
        if not is_repo(repo) and not Path(repo).is_dir():
            raise TrustError(f"{repo} is no folder, and a repository of the Hub is written org/name; check the path")
        if why := rules.allows(repo):
            raise TrustError(f"{repo}: {why}. Whoever is responsible for that file must list it there first")
        try:
            if repo in known and repo not in fresh:
                pin = known[repo]
            elif is_repo(repo):
                with store().scratch() as scratch:
                    version, revision = fresh.get(repo, (None, None))
                    pin = pin_from_hub(
                        repo, rules.endpoint, rules.trusted_root, scratch, version=version, revision=revision
                    )
            else:
                pin = pin_folder(Path(repo), rules.trusted_root, hash_tree)
        except TrustError as e:
            raise TrustError(f"{repo}: {e}") from e
        left += pin.depends
        yield pin


def _fetch(pin: Pin, rules: Policy, *, new_policy: bool) -> Path | None:
    """Have the build for this machine here, compared and checked but not run. None: there is none for it."""
    import torch

    from slipstream.ops.hub import build_for, verified
    from slipstream.trust.signature import Signer

    try:
        build = build_for(pin, "cuda" if torch.cuda.is_available() else "cpu")
    except KernelError as e:
        if not e.rejected:
            raise
        return None
    if new_policy and build.signer and build.issuer:
        rules = replace(rules, signers=(Signer(build.signer, build.issuer),))
    try:
        return verified(pin, build, rules)[0]
    except TrustError as e:
        raise TrustError(f"{pin.repo}: {e}") from e


def _show(
    shown: list[dict[str, Any]], pins: list[Pin], before: dict[str, Pin], files: _Files, text: str | None
) -> None:
    from slipstream.trust import record

    print_tables([Table(f"To be pinned in {files.lock_path}", [row(f) for f in shown], COLUMNS)])
    for pin in pins:
        old = before.get(pin.repo)
        if old is not None and old != pin:
            note(f"{pin.repo} was pinned before: version {old.version}, commit {old.revision or 'none'}")
        if old is not None and (pin.version or 0) < (old.version or 0):
            note(f"WARNING: this goes back to an older version of {pin.repo}")
    for path in sorted({f["review"] for f in shown} - {""}):
        note(f"to read before you agree: {path}")
    for repo in sorted({f["repo"] for f in shown if not f["review"]}):
        note(f"{repo} has no build for this machine")
    if files.policy is not None and not record.is_accepted(files.policy_path, files.policy):
        note(f"{files.policy_path} will be accepted as it is:\n{files.policy.decode()}")
    if text is not None:
        note(f"there is no policy yet; {files.policy_path} will be:\n{text}")


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise TrustError("there is nobody to ask here; review what is shown, and run this again with --yes")
    return typer.confirm("Code in these files will run in your process. Pin it?", default=False, err=True)


def _new_policy(pins: list[Pin]) -> str:
    hub = [p.repo for p in pins if not p.is_local]
    sources = (["hub"] if hub else []) + [p.repo for p in pins if p.is_local]
    lines = [
        "# Whose kernels may run. What is not listed here is refused; docs/security.md explains each entry.",
        f"repos = {json.dumps(hub)}",
        f"sources = {json.dumps(sources)}",
    ]
    signers = sorted({(b.signer, b.issuer) for p in pins for b in p.builds.values() if b.signer and b.issuer})
    for identity, issuer in signers:
        signed = [p.repo for p in pins if any(b.signer == identity for b in p.builds.values())]
        lines += ["", "[[signers]]", f"identity = {json.dumps(identity)}", f"issuer = {json.dumps(issuer)}"]
        lines += [f"repos = {json.dumps(signed)}"]
    return "\n".join(lines) + "\n"
