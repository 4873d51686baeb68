"""Each private name of torch does what geodiag takes it to do: a renamed one fails here."""

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from geodiag.hooks import torch_internals
from tests.paths import ROOT


def test_current_graph_task_id_tells_a_backward_from_the_rest():
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(torch_internals.in_backward()))
    y.sum().backward()
    assert seen == [True]
    assert not torch_internals.in_backward()


def test_compiled_call_impl_is_what_a_compiled_module_runs():
    module = nn.Linear(2, 2)
    assert torch_internals.compiled_call(module) is None
    assert not torch_internals.is_compiled(module)

    module.compile(backend="eager")
    assert torch_internals.is_compiled(module)
    torch_internals.replace_compiled_call(module, lambda *_: "replaced")
    assert module(torch.ones(1, 2)) == "replaced"


def test_orig_mod_is_the_module_inside_of_the_compiled_one():
    module = nn.Linear(2, 2)
    wrapped = torch.compile(module, backend="eager")
    assert torch_internals.is_compiled(wrapped)
    assert torch_internals.without_compile_wrapper(wrapped) is module
    assert torch_internals.without_compile_wrapper(module) is module


def test_forward_hooks_run_in_the_order_of_their_dictionary():
    module = nn.Identity()
    order = []
    module.register_forward_hook(lambda *_: order.append("first"))
    module.register_forward_hook(lambda *_: order.append("second"))
    module.register_forward_hook(lambda *_: order.append("moved"))
    torch_internals.move_last_forward_hook_to_front(module)
    module(1)
    assert order == ["moved", "first", "second"]


def test_forward_pre_hooks_are_listed_with_whether_they_take_keywords():
    module = nn.Identity()

    def plain(*_):
        return None

    def with_kwargs(*_):
        return None

    first = module.register_forward_pre_hook(plain)
    second = module.register_forward_pre_hook(with_kwargs, with_kwargs=True)
    hooks = torch_internals.forward_pre_hooks(module)
    assert hooks == {first.id: (plain, False), second.id: (with_kwargs, True)}


def test_buffers_are_replaced_through_their_dictionary():
    module = nn.BatchNorm1d(2)
    mean = torch.full((2,), 7.0)
    torch_internals.own_buffers(module)["running_mean"] = mean
    assert module.running_mean is mean
    assert set(torch_internals.own_buffers(module)) == {n for n, _ in module.named_buffers()}


def test_version_counts_changes_in_place():
    x = torch.ones(2)
    before = torch_internals.version(x)
    x + 1
    assert torch_internals.version(x) == before
    x.add_(1)
    assert torch_internals.version(x) > before


def test_foreach_norm_is_the_norm_of_each():
    tensors = [torch.randn(3, 4), torch.randn(5)]
    for order in (2.0, torch.inf):
        for norm, tensor in zip(torch_internals.norms(tensors, order), tensors, strict=True):
            torch.testing.assert_close(norm, torch.linalg.vector_norm(tensor, order))


def test_foreach_sub_subtracts_each():
    a = [torch.randn(3), torch.randn(2, 2)]
    b = [torch.randn(3), torch.randn(2, 2)]
    for found, x, y in zip(torch_internals.subtract_all(a, b), a, b, strict=True):
        assert torch.equal(found, x - y)


def test_foreach_copy_copies_each():
    sources: list[Tensor] = [torch.randn(3), torch.randn(2, 2)]
    targets = [torch.zeros(3), torch.zeros(2, 2)]
    torch_internals.copy_all(targets, sources)
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source)


def test_scale_is_the_factor_of_a_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert torch_internals.loss_scale(scaler) is None
    scaler.scale(torch.ones(1))
    assert torch_internals.loss_scale(scaler).item() == 8.0


def test_default_store_is_that_of_the_process_group():
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        torch_internals.default_store().set("key", "value")
        assert torch_internals.default_store().get("key") == b"value"
    finally:
        dist.destroy_process_group()


# -- no other file -------------------------------------------------------------------------

PRIVATE = {
    "_C",
    "_buffers",
    "_compiled_call_impl",
    "_dynamo",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_get_default_store",
    "_modules",
    "_orig_mod",
    "_parameters",
    "_scale",
    "_version",
}
"""Private names of torch. `self._buffers` and the like are names of geodiag's own."""


def private_names(path: Path) -> list[str]:
    """Return the private names of torch in a file: attributes of other objects, and imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            known = node.attr in PRIVATE and not text.startswith("self._")
            if known or re.match(r"torch\.(\w+\.)*_\w", text):
                found.append(text)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = [node.module or "", *(alias.name for alias in node.names)]
            found += [name for name in names if re.search(r"(^|\.)_", name)]
    return found


def test_no_other_file_uses_a_private_name_of_torch():
    files = sorted((ROOT / "hooks").rglob("*.py"))
    found = {str(p.relative_to(ROOT)): private_names(p) for p in files}
    assert found.pop("hooks/torch_internals.py"), "the one place"
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    [
        "module._forward_hooks.clear()",
        "torch._foreach_norm(x)",
        "torch.nn.utils._stateless()",
        "x._version",
        "from torch._dynamo import config",
        "from torch.nn import _reduction",
    ],
)
def test_a_private_name_is_found(tmp_path: Path, code: str):
    path = tmp_path / "module.py"
    path.write_text(code)
    assert private_names(path)
