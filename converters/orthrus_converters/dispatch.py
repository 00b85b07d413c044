"""From the request to a plan: which kind of conversion it is, and whether its flags make sense."""

from __future__ import annotations

from pathlib import Path

from orthrus_converters.convert import plan_checkpoint
from orthrus_converters.graft import base_of, plan_graft
from orthrus_converters.imatrix import Imatrix, read_imatrix
from orthrus_converters.plan import Plan, Request, check_outputs, heads_path
from orthrus_converters.repack import plan_gguf, plan_merge
from orthrus_converters.sources import FileSource, resolve
from orthrus_converters.type_plan import TypeChoice
from orthrus_gguf.errors import OrthrusError


def plan_conversion(request: Request) -> Plan:
    """Read and check everything but the weights' values; decide all names, types and sizes.

    Raises OrthrusError if there is something that cannot be converted or written.
    """
    _check_flags(request)
    if request.merge:
        assert request.source is not None
        return plan_merge(request, Path(request.source), _heads_file(request, request.source))
    imatrix = _imatrix(request)
    if request.base is not None:
        assert request.heads is not None
        return plan_graft(request, request.base, request.heads, imatrix)
    assert request.source is not None
    source = resolve(request.source, request.revision)
    if isinstance(source, FileSource):
        _refuse_target(request)
        return plan_gguf(request, source.path, imatrix)
    base = base_of(source)
    if base is not None:
        _refuse_target(request)
        _check_kept(request, str(source.folder))
        return plan_graft(request, base, request.source, imatrix)
    return plan_checkpoint(request, source, imatrix)


def _heads_file(request: Request, base: str) -> Path:
    """The heads to merge: those named, or those beside the base."""
    path = Path(request.heads) if request.heads is not None else heads_path(Path(base))
    if request.heads is None and Path(base).exists() and not path.exists():
        raise OrthrusError(
            f"{base}: its heads are not beside it, as {path.name}; name them with --heads FILE"
        )
    return path


def _imatrix(request: Request) -> Imatrix | None:
    if request.imatrix is None:
        return None
    check_outputs(request, [request.imatrix])
    return read_imatrix(request.imatrix)


def _refuse_target(request: Request) -> None:
    if request.target is not None:
        raise OrthrusError(
            f"--target {request.target}: goes with a drafter's checkpoint only; leave it out"
        )


def _check_flags(request: Request) -> None:
    """Raise OrthrusError for combinations that have no meaning."""
    choice = request.choice
    if request.source is None and request.base is None:
        raise OrthrusError(
            "expected MODEL and OUT.gguf, or --base, --heads and OUT.gguf; see --help"
        )
    if request.merge or request.base is not None:
        _refuse_target(request)
    if request.merge:
        others = request.split or request.base or request.imatrix or choice != TypeChoice()
        if others:
            raise OrthrusError("--merge copies all tensors as they are: only --heads goes with it")
        return
    if choice.pure and choice.file_type is None:
        raise OrthrusError("--pure needs --type TYPE, the one type for all matrices")
    if request.base is not None:
        if request.source is not None:
            raise OrthrusError(f"--base takes the place of MODEL; leave out {request.source}")
        if request.heads is None:
            raise OrthrusError("--base needs --heads CHECKPOINT_OR_GGUF, the heads to add to it")
        _check_kept(request, "--base")
    elif request.heads is not None:
        raise OrthrusError("--heads goes with --base BASE.gguf, or with --merge")


def _check_kept(request: Request, what: str) -> None:
    """Raise OrthrusError for flags that would change a base that heads are added to."""
    choice = request.choice
    if request.split or choice != TypeChoice(heads=choice.heads):
        raise OrthrusError(
            f"{what} keeps its base's tensors as they are: of the type flags, only --heads-type "
            "goes with it"
        )
