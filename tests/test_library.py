# SPDX-License-Identifier: Apache-2.0
"""What every op keeps because of how it is registered: gradients, versions, written tensors, copies of the package."""

import copy
import inspect
import itertools
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from test_ops import clone, made
from torch.autograd import forward_ad

import specedit_kernels
from specedit_kernels import ops

PACKAGE = Path(specedit_kernels.__file__).parent


def one_call_each(device):
    """{op's name: (overload, args, kwargs)}: the first fp32 call of each op that has rows."""
    calls = {}
    for op, args, kwargs in made(device):
        if all(x.numel() for x in args if isinstance(x, torch.Tensor)):
            calls.setdefault(op.__name__, (op.default, args, kwargs))
    return calls


NAMES = sorted(ops.names())
WRITTEN = {
    name: [argument.name for argument in getattr(torch.ops.specedit, name).default._schema.arguments
           if argument.alias_info is not None]
    for name in NAMES
}  # fmt: skip
IN_PLACE = [(name, argument) for name in NAMES for argument in WRITTEN[name]]
OF_MAPS = {"add_bias_"}  # they write a map that is contiguous or has channels last, and refuse others


@pytest.fixture
def call(request, device):
    """(overload, positional arguments, keyword arguments) of the op that the test is parametrized with."""

    def make(name):
        op, args, kwargs = one_call_each(device)[name]
        args, kwargs = copy.deepcopy((args, kwargs))
        return op, list(args), kwargs

    return make


def test_every_op_is_here():
    assert set(one_call_each(torch.device("cpu"))) == set(NAMES)
    assert {name for name, written in WRITTEN.items() if written} == {name for name in NAMES if name.endswith("_")}


def same(a, b):
    """torch.equal, which knows no e4m3."""
    return torch.equal(*(x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in (a, b)))


def floats(args):
    return [i for i, x in enumerate(args) if isinstance(x, torch.Tensor) and x.is_floating_point()]


@pytest.mark.parametrize("name", NAMES)
def test_functional_transforms_are_refused(call, name):
    op, args, kwargs = call(name)
    names = [argument.name for argument in op._schema.arguments]
    for i in floats(args):

        def run(x):
            rest = list(clone(args))
            rest[i] = x
            returned = op(*rest, **kwargs)
            return (rest[0] if returned is None else returned[0] if isinstance(returned, tuple) else returned).sum()

        refused = rf"{name}: {names[i]}: expected a tensor that does not require grad \(the op has no backward\)"
        with pytest.raises(ValueError, match=refused):
            torch.func.grad(run)(args[i])
        with pytest.raises(ValueError, match=rf"{name}: {names[i]}: expected a tensor without a tangent"):
            torch.func.jvp(run, (args[i],), (args[i],))
        with forward_ad.dual_level(), pytest.raises(ValueError, match=rf"{names[i]}: expected a tensor without a tan"):
            run(forward_ad.make_dual(args[i], args[i]))
        with pytest.raises(ValueError, match=f"{name}: expected plain tensors, got batched ones"):
            torch.func.vmap(run)(torch.stack([args[i]] * 2))
        # Tensors that are not differentiated pass beside one that is.
        plain, kept = clone(args), kwargs
        torch.func.grad(lambda x: (op(*plain, **kept), x.sum())[1])(args[i].float())


@pytest.mark.parametrize("name", NAMES)
def test_every_float_argument_is_asked(call, name):
    op, args, kwargs = call(name)
    for i in floats(args):
        asked = list(args)
        asked[i] = args[i].detach().requires_grad_()
        with pytest.raises(ValueError, match="does not require grad"):
            op(*asked, **kwargs)
        with torch.no_grad():
            op(*asked, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name, argument", IN_PLACE)
def test_what_is_written_says_so(backend, call, name, argument):
    op, args, kwargs = call(name)
    i = [a.name for a in op._schema.arguments].index(argument)
    version = args[i]._version
    op(*args, **kwargs)
    assert args[i]._version > version
    # Autograd then finds that a tensor which it saved is another. It saves none of e4m3, which has no products.
    if args[i].dtype != torch.float8_e4m3fn:
        weight = torch.ones((), device=args[i].device, requires_grad=True)
        args[i] = args[i].clone()
        loss = (weight * args[i]).sum()
        with torch.no_grad():
            op(*args, **kwargs)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    # A tensor of normal mode keeps count in inference mode.
    version = args[i]._version
    with torch.inference_mode():
        op(*args, **kwargs)
    assert args[i]._version > version


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_keeps_its_version(backend, call, name):
    op, args, kwargs = call(name)
    read = [x for x, a in zip(args, op._schema.arguments) if isinstance(x, torch.Tensor) and a.alias_info is None]
    versions = [x._version for x in read]
    op(*args, **kwargs)
    assert versions == [x._version for x in read]


@pytest.mark.slow
@pytest.mark.parametrize("name, argument", IN_PLACE)
def test_inference_tensors_are_written_in_their_mode_alone(backend, call, name, argument):
    op, args, kwargs = call(name)
    i = [a.name for a in op._schema.arguments].index(argument)
    with torch.inference_mode():
        args[i] = args[i].clone()
        op(*args, **kwargs)
        before = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    with pytest.raises(RuntimeError, match=f"{name}: {argument}: .*inference tensor outside"):
        op(*args, **kwargs)
    assert all(same(a, b) for a, b in zip(args, before) if isinstance(a, torch.Tensor))


@pytest.mark.slow
@pytest.mark.parametrize("name, argument", IN_PLACE)
def test_outputs_that_lie_on_themselves_are_refused(backend, call, name, argument):
    """Before anything is written, to any output."""
    op, args, kwargs = call(name)
    i = [a.name for a in op._schema.arguments].index(argument)
    size, good = args[i].shape, list(args)
    windows = torch.zeros(4 * args[i].numel(), dtype=args[i].dtype, device=args[i].device)
    for bad in (
        args[i][:1].clone().expand(size),
        args[i][:, :1].clone().expand(size),
        windows.as_strided(size, [1 if d == len(size) - 1 else max(1, s // 2) for d, s in enumerate(args[i].stride())]),
    ):
        if all(stride or n == 1 for n, stride in zip(size, bad.stride())) and bad.stride() == good[i].stride():
            continue  # of a dimension of size 1 nothing lies on itself
        args = list(clone(good))
        args[i], before = bad, clone(args)
        with pytest.raises(ValueError, match=f"{name}: {argument}: expected a tensor whose elements do not overlap in"):
            op(*args, **kwargs)
        assert all(same(a, b) for j, (a, b) in enumerate(zip(args, before))
                   if isinstance(a, torch.Tensor) and j != i)  # fmt: skip
    # A slice and a transposed view are fine; of a map, channels last are.
    args = list(clone(good))
    shape = list(size)
    roomy = torch.zeros([n + 3 for n in shape], dtype=args[i].dtype, device=args[i].device)
    args[i] = roomy[tuple(slice(1, n + 1) for n in shape)]
    if name in OF_MAPS:
        with pytest.raises(ValueError, match=f"{name}: {argument}: expected a contiguous tensor or one with channels"):
            op(*args, **kwargs)
        assert not roomy.any()
        order = [0, *range(2, len(shape)), 1]  # of the dimensions in memory
    else:
        op(*args, **kwargs)
        order = [1, 0, *range(2, len(shape))]
    lies = torch.zeros([shape[d] for d in order], dtype=args[i].dtype, device=args[i].device)
    args[i] = lies.permute([order.index(d) for d in range(len(shape))])
    op(*args, **kwargs)


def tensor_arguments(name):
    return [a.name for a in getattr(torch.ops.specedit, name).default._schema.arguments if "Tensor" in str(a.type)]


@pytest.mark.parametrize("name, argument", [(name, a) for name in NAMES for a in tensor_arguments(name)])
def test_a_tensor_without_dimensions_is_named(call, name, argument):
    if (name, argument) in (("lerp_", "weight"), ("lerp_fp8_", "weight"), ("dequantize", "x"), ("dequantize", "scale")):
        return  # it may have none
    op, args, kwargs = call(name)
    names = [a.name for a in op._schema.arguments]
    given = dict(zip(names, args)) | kwargs
    integer = argument.endswith(("index", "lens")) or argument.startswith("cu_") or argument == "region"
    like = given.get(argument)
    dtype = like.dtype if like is not None else torch.int32 if integer else torch.float32
    given[argument] = torch.ones((), dtype=dtype, device=args[0].device)
    if argument.startswith("cu_"):
        x = args[0].flatten(0, 1)
        given = dict(q=x, k=x, v=x, max_seqlen_q=5, max_seqlen_k=5, cu_seqlens_q=torch.tensor([0, 5, 10]).int(),
                     cu_seqlens_k=torch.tensor([0, 5, 10]).int()) | {argument: given[argument].cpu()}  # fmt: skip
        if name.endswith("scatter_"):
            return  # not a layout of this op
    with pytest.raises((ValueError, TypeError), match=f"{name}: "):
        op(**given)


FAR = [float("nan"), float("inf"), -float("inf"), 1e39, -1e39]


@pytest.mark.parametrize("name, option, bad", [
    (name, a.name, bad) for name in NAMES for a in getattr(torch.ops.specedit, name).default._schema.arguments
    if "float" in str(a.type) and a.name != "threshold" for bad in FAR + ([] if a.name == "scale" else [-1e-9])
])  # fmt: skip
def test_numbers_that_fp32_does_not_hold(call, name, option, bad):
    op, args, kwargs = call(name)
    given = dict(zip((a.name for a in op._schema.arguments), args)) | kwargs
    with pytest.raises(ValueError, match=f"{name}: {option}: expected a finite number"):
        op(**given | {option: bad})


def test_thresholds_beyond_fp32_are_infinite(backend, device):
    score = torch.tensor([[0.0, 1e38, float("nan"), float("inf")]], device=device)
    for threshold, selected in ((1e39, 1), (-1e39, 4), (float("inf"), 1)):
        mask, _, count = torch.ops.specedit.select_tokens(score, (2, 2), threshold)
        assert count.tolist() == [selected] and int(mask.sum()) == selected
    for huge in (2**31, 2**40):
        count = torch.ops.specedit.select_tokens(torch.zeros(1, 4, device=device), (2, 2), 1.0, 0, huge)[2]
        assert count.tolist() == [1]
        count = torch.ops.specedit.select_tokens(score, (2, 2), 1.0, huge, 0)[2]
        assert count.tolist() == [4]


def test_packed_rows_ask_for_their_lengths():
    x = torch.ones(8, 2, 64)
    with pytest.raises(ValueError, match=r"q: expected \[B, S, H, D\].*need cu_seqlens_q and cu_seqlens_k\), got \[8"):
        torch.ops.specedit.mixed_res_attn(x, x, x)


def arguments_of(name):
    stem = ops._backends._OPS[name].stem
    return getattr(import_module(f"specedit_kernels.reference.{stem}"), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(backend, call, device, name):
    """Neither the ops on any backend, nor the reference where it is called directly, as the tests' oracle is."""
    for run in (getattr(torch.ops.specedit, name), arguments_of(name)):
        results = []
        for enabled in (False, True):
            _, args, kwargs = call(name)
            if not isinstance(run, torch._ops.OpOverloadPacket):
                args, kwargs = as_reference(name, args, kwargs, run), {}
            with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
                returned = run(*args, **kwargs)
            returned = returned if isinstance(returned, tuple) else (returned,)
            results.append([x for x in (*returned, *args) if isinstance(x, torch.Tensor)])
        for a, b in zip(*results):
            assert a.dtype == b.dtype and torch.equal(a.double().nan_to_num(), b.double().nan_to_num())


def as_reference(name, args, kwargs, run):
    """Arguments of a call of the op as those of its reference: positional, the grid in two, defaults filled in."""
    schema = getattr(torch.ops.specedit, name).default._schema.arguments
    given = {a.name: a.default_value for a in schema} | dict(zip((a.name for a in schema), args)) | kwargs
    if "grid" in given:
        given["grid_h"], given["grid_w"] = given.pop("grid")
    if "q" in given and given.get("scale", 0.2) is None:  # of scores
        given["scale"] = 0.2
    if given.get("split", 0) is None:
        given["split"] = 0
    return [given[parameter] for parameter in inspect.signature(run).parameters]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_help_says_the_contract(name):
    doc = inspect.getdoc(getattr(ops, name))
    assert len(doc) > 100 and inspect.getdoc(getattr(torch.ops.specedit, name)) == doc
    code = f"import specedit_kernels, torch; help(torch.ops.specedit.{name})"
    if name == "merge_attn":
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        assert all(line.strip() in said for line in doc.splitlines())


def python(code, *path):
    """Run ``code`` in a fresh process with ``path`` before all other places of modules."""
    code = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def copies(tmp_path):
    """copies(name): a copy of the package's Python under another name, in a folder of its own."""
    count = itertools.count()

    def copy(name="specedit_kernels"):
        folder = tmp_path / str(next(count))
        for room in ("ops", "reference", "triton_kernels"):
            # a clone has the last one beside the package
            source = PACKAGE.parent if room == "triton_kernels" else PACKAGE
            shutil.copytree(source / room, folder / name / room, ignore=shutil.ignore_patterns("__pycache__"))
        for file in PACKAGE.glob("_[a-z]*.py"):
            shutil.copy(file, folder / name)
        (folder / name / "__init__.py").write_text("from . import ops\n")
        return folder

    return copy


PURGE = """
import gc
for n in [n for n in sys.modules if n.partition(".")[0] == "specedit_kernels"]: del sys.modules[n]
gc.collect()
"""
CALL = "x = torch.ones(1, 4, 1, 16); torch.ops.{}.mixed_res_attn(x, x, x)\n"


@pytest.mark.slow
def test_a_second_import():
    python(
        "import torch, specedit_kernels"
        + PURGE
        + "import specedit_kernels\n"
        + CALL.format("specedit")
        + "specedit_kernels.ops.mixed_res_attn(x, x, x)"
    )


@pytest.mark.slow
def test_ops_outlive_their_modules(copies):
    """Purged, and the folder no longer among the places of modules: an op not yet called still finds its own code."""
    folder = copies()
    python(
        f"import torch, specedit_kernels; assert specedit_kernels.__file__.startswith({str(folder)!r})"
        + PURGE
        + f"sys.path.remove({str(folder)!r}); import shutil\n"
        f"shutil.move({str(folder / 'specedit_kernels' / '__init__.py')!r}, {str(folder / 'gone.py')!r})\n"
        + CALL.format("specedit")
        + "assert not [n for n in sys.modules if n.startswith('specedit_kernels')]",
        folder,
    )


@pytest.mark.slow
def test_ops_stay_with_their_own_copy(copies):
    """The first copy's ops run the first copy's code, also where its name means another copy by then."""
    first, second = copies(), copies()
    path = second / "specedit_kernels" / "reference" / "mixed_res_attn.py"
    path.write_text(path.read_text() + "\nraise ImportError('the second copy')\n")
    python(
        "import torch, specedit_kernels"
        + PURGE
        + f"sys.path.insert(0, {str(second)!r}); import specedit_kernels\n"
        + CALL.format("specedit")
        + f"assert sys.modules['specedit_kernels'].__file__.startswith({str(second)!r})",
        first,
    )


@pytest.mark.slow
def test_two_names_in_one_process(copies):
    folder = copies("another_name")
    python(
        "import torch, specedit_kernels, another_name\n"
        + CALL.format("specedit")
        + "another_name.ops.mixed_res_attn(x, x, x)",
        folder,
    )


@pytest.mark.slow
def test_another_namespace_beside(copies):
    """One file names the namespace: a copy with another one has ops and kernels of its own."""
    folder = copies("another_name")
    file = folder / "another_name" / "_ops.py"
    text = file.read_text().replace("ops.specedit", "ops._specedit_beside")
    file.write_text(text.replace('"specedit::', '"_specedit_beside::'))
    python(
        "import torch, specedit_kernels, another_name\n"
        + CALL.format("specedit")
        + CALL.format("_specedit_beside")
        + "another_name.ops.gather_tokens(x, torch.zeros(1, 2).int(), 2)\n"
        "assert 'another_name.reference.gather_tokens' in sys.modules\n"
        "assert 'specedit_kernels.reference.gather_tokens' in sys.modules\n"
        "assert another_name.ops.NAMESPACE == '_specedit_beside'",
        folder,
    )


@pytest.mark.slow
def test_another_version_says_so(copies):
    """Two copies of one namespace whose ops differ cannot both have it."""
    folder = copies("another_name")
    file = folder / "another_name" / "ops" / "merge_attn.py"
    file.write_text(file.read_text().replace("Tensor lse_b) ->", "Tensor lse_b, int more=0) ->"))
    python(
        "import torch, specedit_kernels\n"
        "try: import another_name\n"
        "except ImportError as error: assert 'merge_attn is defined already' in str(error)\n"
        "else: raise SystemExit('accepted')",
        folder,
    )
