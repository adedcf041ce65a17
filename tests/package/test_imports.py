"""Imports in fresh processes: what is loaded, what still works without it; the command line."""

import pytest
import torch
from fresh import run_python

import contrastive_kernels as ck
from contrastive_kernels import selfcheck
from contrastive_kernels.__main__ import main

# assert_close would import sympy, which takes a second
CALL = """
import torch
import contrastive_kernels as ck
x, y = torch.randn(7, 5), torch.randn(11, 5)
auto = ck.row_stats(x, y).lse
assert torch.allclose(auto, torch.logsumexp(x @ y.T, 1), rtol=1.3e-6, atol=1e-5)
"""


def block(module: str) -> str:
    return f"import sys\nsys.modules['{module}'] = None\n"


def test_import_is_light():
    heavy = ("triton", "matplotlib", "sklearn", "skimage", "tqdm", "contrastive_kernels.demo")
    run_python(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import contrastive_kernels\n"
        f"loaded = (set(sys.modules) - before) & {set(heavy)}\n"
        "assert not loaded, loaded\n"
    )


def test_package_works_without_triton():
    run_python(block("triton") + CALL)


def test_package_works_with_a_cuda_build_of_torch_and_no_gpu():
    """What such a torch says of itself; losses run on the CPU, and kernels for GPUs say why not."""
    out = run_python(
        "import os, torch\n"
        "os.environ.pop('TRITON_INTERPRET', None)\n"
        "torch.version.cuda = '13.0'\n"
        "torch.backends.cuda.is_built = lambda: True\n"
        "torch._C._cuda_getDeviceCount = lambda: 0\n"
        + CALL
        + "assert ck.backends()['cpu'].usable\n"
        + "for name in ('triton', 'cuda'):\n"
        + "    assert not ck.backends()[name].usable and ck.backends()[name].reason\n"
        + "    try:\n"
        + "        ck.whiten(torch.randn(4, 8, 3), backend=name)\n"
        + "    except RuntimeError as error:\n"
        + "        print('raised')\n"
        + "import contrastive_kernels.triton\n"  # as its kernels are compiled without a GPU
        + "from contrastive_kernels.__main__ import main\n"
        + "assert main(['info']) == 0\n"
    )
    assert out.startswith("raised\nraised\n")


def test_package_works_without_the_extension():
    out = run_python(
        block("contrastive_kernels._cpu")
        + CALL
        + "report = ck.backends()['cpu']\n"
        + "assert not report.usable and report.reason\n"
        + "try:\n"
        + "    ck.row_stats(x, y, backend='cpu')\n"
        + "except RuntimeError as error:\n"
        + "    assert report.reason in str(error), error\n"
        + "    print('raised')\n"
        + "from contrastive_kernels.__main__ import main\n"
        + "assert main(['info']) == 0\n"
    )
    assert out.startswith("raised\n")
    assert "cpu is not usable: " in out
    assert out.splitlines()[-1].startswith("CPU tensors run dense: the extension was built but")


def test_running_dense_for_want_of_the_engine_is_said_once():
    out = run_python(
        block("contrastive_kernels._cpu")
        + "import warnings\n"
        + "with warnings.catch_warnings(record=True) as seen:\n"
        + "    warnings.simplefilter('always')\n"
        + CALL.replace("\n", "\n    ")
        + "ck.nt_xent(x, x)\n"
        + "    ck.info_nce(x, x, backend='reference')\n"
        + "print(*(w.message for w in seen if 'contrastive' in str(w.message)), sep='\\n')\n"
    )
    (line,) = out.splitlines()
    assert line.startswith(
        "contrastive_kernels runs dense on cpu, with the whole similarity matrix"
    )
    assert "import of contrastive_kernels._cpu halted" in line


def test_nothing_is_said_where_the_engine_runs():
    assert (
        run_python(CALL + "import warnings\nwarnings.simplefilter('error')\nck.nt_xent(x, x)") == ""
    )


def test_explicit_backend_without_kernels_for_it_raises():
    x = torch.randn(7, 5)
    with pytest.raises(RuntimeError, match='backend="cuda".*it has no kernels for this operation'):
        ck.row_stats(x, x, backend="cuda")


@pytest.mark.parametrize(
    "missing, message",
    [
        ("", "it takes cuda tensors, and cpu tensors only with TRITON_INTERPRET=1 set"),
        ("metadata.version = lambda name: '3.5.1'\n",
         "triton 3.6 or newer is needed, found 3.5.1"),
        ("metadata.version = lambda name: old('no such package')\n",
         "triton is not installed: pip install triton"),
    ],
    ids=["device", "version", "package"],
)  # fmt: skip
def test_triton_says_why_it_cannot_run(missing, message):
    out = run_python(
        "import os\nos.environ.pop('TRITON_INTERPRET', None)\n"
        + "from importlib import metadata\nold = metadata.version\n"
        + missing
        + CALL
        + "try:\n"
        + "    ck.row_stats(x.cpu(), y.cpu(), backend='triton')\n"
        + "except RuntimeError as error:\n"
        + "    print(error)\n"
        + "import sys\nassert 'triton' not in sys.modules\n"
    )
    assert 'backend="triton" cannot run on cpu tensors: ' in out and message in out


def test_info_names_versions_threads_and_backends(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    labels = ("contrastive_kernels", "torch", "python", "threads", "cpu capability")
    for label in (*labels, *ck.backends()):
        assert any(line.startswith(label) for line in lines), label
    fused = ck.backends()["cpu"].usable
    assert lines[-1].startswith(f"CPU tensors run {'fused' if fused else 'dense: '}")


def test_check_says_ok(capsys):
    usable = ck.backends()["cpu"].usable
    assert main(["info", "--check"]) == (0 if usable else 1)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(" s: OK") if usable else last.startswith("nothing to check")


def test_check_says_what_is_wrong(capsys, monkeypatch):
    def wrong(*operands, backend, **options):
        value = right(*operands, backend=backend, **options)
        return value * (1 + 1e-4) if backend == "cpu" else value

    right = selfcheck.row_softplus
    if not ck.backends()["cpu"].usable:
        pytest.skip("no extension")
    monkeypatch.setattr(selfcheck, "row_softplus", wrong)
    assert main(["info", "--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith("row_softplus, cpu, float32: the error of its value is ") for line in lines
    )
    assert lines[-1].endswith(" s: 4 failed")


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "info"),
        (["demo", "--help"], 0, "--seed"),
        (["info", "--nonsense"], 2, "--nonsense"),
        ([], 2, "command"),
    ],
)
def test_command_line(arguments, status, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == status
    printed = capsys.readouterr()
    assert text in printed.out + printed.err
